"""The choice of the fastest implementation of a call: from measurements on GPUs, from compiled programs on TPUs."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flax_local_attention.kernels.dispatch import Kernels, attend_by
from flax_local_attention.kernels.family import KernelFamily, is_busy
from flax_local_attention.kernels.mosaic import MosaicGPU
from flax_local_attention.kernels.pallas_mosaic import keeps_registers
from flax_local_attention.kernels.primitives import Target
from flax_local_attention.kernels.tpu import TPU
from flax_local_attention.kernels.triton import Triton
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum


class Choice(NamedTuple):
    """A row of the table: some kernels, and the calls for which they are the fastest.

    Attributes:
        kernels: The kernels.
        platform: Platform that the program is lowered for.
        capabilities: Lowest and highest compute capability of its GPU; None where the platform has none.
        head_sizes: Smallest and largest head size.
        least_tokens: Fewest queries.
        least_reach: Least number of keys that a query sees beside its own, ``backward + forward``.
        is_plain: Whether the row is only for calls that are not busy, see `is_busy`.
    """

    kernels: KernelFamily
    platform: str
    capabilities: tuple[tuple[int, int], tuple[int, int]] | None
    head_sizes: tuple[int, int]
    least_tokens: int
    least_reach: int = 0
    is_plain: bool = False

    def serves(self, operands: Operands, options: AttentionOptions, target: Target) -> bool:
        """Return whether the row is for a call; operands may be shapes."""
        if target.platform != self.platform or not self._runs_on(target):
            return False
        if self.kernels.problems(operands, options):
            return False
        q, window = operands.q, options.window
        (least, most), widest = self.head_sizes, max(q.shape[-1], operands.v.shape[-1])
        if not least <= widest <= most or q.shape[-2] < self.least_tokens:
            return False
        if q.dtype == jnp.float32 and not self.kernels.allows_float32(options):
            return False
        is_far = window.backward + window.forward >= self.least_reach
        return is_far and not (self.is_plain and is_busy(operands, options))

    def _runs_on(self, target):
        """Return whether a target runs these kernels.

        An exported program has kernels only if an abstract mesh describes its device, and later versions of JAX will
        run them.
        """
        if target.partition == "unknown" or self.kernels.problem_of(target) is not None:
            return False
        if target.is_export and not (target.is_described and self.kernels.IS_STABLE):
            return False
        if self.capabilities is None:
            return True
        least, most = self.capabilities
        return target.capability is not None and least <= target.capability <= most


HOPPER, FROM_AMPERE = ((9, 0), (9, 0)), ((8, 0), (99, 0))

# The first row that serves a call is taken, else the plain path (benchmarks/RESULTS.md).
#
# Triton on an H100, at [8, 8, 2048, d] and window 256, is this many times as fast as the plain path, forward and with
# gradient: 15 at d 32, 11 at 64, 5 at 96 (padded), 4 and 2.2 at 256. Other GPUs from 8.0 on compile the same programs,
# but were not measured.
#
# Mosaic GPU is faster than Triton at a head size of 128. The factors in windows of 1,024 are 1.15 forward and 1.11 to
# 1.13 with gradient; 1.3 and 1.2 with segments, 1.5 and 1.2 with a mask, 1.1 with a soft cap. In windows of 256 they
# are 1.07 and 1.03. At a head size of 64 it takes 0.97 to 1.12 times as long. Where JAX has no Triton, it serves all
# that it can.
#
# The TPU kernels were compiled, not run. Their programs take as many cycles as those of JAX's splash attention. Their
# smallest block has 128 tokens.
_WIDE = (
    Choice(MosaicGPU(), "cuda", HOPPER, (65, 128), 128, 512),
    Choice(MosaicGPU(), "cuda", HOPPER, (65, 128), 128, is_plain=True),
)
CHOICES = (
    *(_WIDE if keeps_registers() else ()),
    Choice(Triton(), "cuda", FROM_AMPERE, (16, 256), 64),
    Choice(MosaicGPU(), "cuda", HOPPER, (16, 128), 64),
    Choice(TPU(), "tpu", None, (16, 256), 128),
)


@dataclasses.dataclass(frozen=True)
class Fastest:
    """The fastest implementation that serves a call on the device that a program is lowered for.

    ``implementation=None`` means this value. It never refuses a call: `Windowed` computes what no kernel serves, and
    derivatives beyond a gradient. An exported program has kernels only for a device that an abstract mesh describes,
    and only `MosaicGPU` and `TPU`, which later versions of JAX promise to run.

    Args:
        token_major: See `Triton`.

    Examples:
        >>> q = k = v = jnp.ones((2, 64, 64))
        >>> local_attention(q, k, v, window_size=16, implementation=Fastest()).shape
        (2, 64, 64)
    """

    token_major: bool = False

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`."""
        return attend_by(self, operands, options)

    def choose(self, operands: Operands, options: AttentionOptions, target: Target) -> Kernels | None:
        """Return the kernels of the first row of the table that serves a call, or None, as every `Chooser`."""
        found = next((row.kernels for row in CHOICES if row.serves(operands, options, target)), None)
        if found is None or not self.token_major:
            return found
        return found.by_tokens()
