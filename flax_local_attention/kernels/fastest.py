"""The choice of the fastest implementation for a call, by measurements."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flax_local_attention.kernels.dispatch import Kernels, attend_by
from flax_local_attention.kernels.primitives import Target
from flax_local_attention.kernels.tpu import TPU
from flax_local_attention.kernels.triton import Triton
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum


class Choice(NamedTuple):
    """A row of the table: the calls for which some kernels are the fastest.

    Attributes:
        kernels: The kernels.
        platform: Platform that the program is lowered for.
        capability: Least compute capability of its GPU; None where it has none.
        head_sizes: Least and largest head size.
        least_tokens: Fewest queries.
    """

    kernels: Triton | TPU
    platform: str
    capability: tuple[int, int] | None
    head_sizes: tuple[int, int]
    least_tokens: int

    def serves(self, operands: Operands, options: AttentionOptions, target: Target) -> bool:
        """Return whether a call is one of these calls; operands may be shapes."""
        q = operands.q
        if target.platform != self.platform:
            return False
        if self.capability is not None and (target.capability or (0, 0)) < self.capability:
            return False
        if target.is_export or target.partition == "unknown" or self.kernels.problem_of(target) is not None:
            return False
        least, most = self.head_sizes
        if not all(least <= x.shape[-1] <= most for x in (q, operands.v)) or q.shape[-2] < self.least_tokens:
            return False
        if q.dtype == jnp.float32 and not self.kernels.allows_float32(options):
            return False
        return not self.kernels.problems(operands, options)


# The first row that serves a call is taken, else the plain path. On an H100 at [8, 8, 2048, d] and window 256, the
# kernels are this many times as fast as the plain path, forward and with gradient: 15 at d 32, 11 at 64, 5 at 96
# (padded), 4 and 2.2 at 256. Other GPUs from 8.0 on compile the same programs, and were not measured
# (benchmarks/RESULTS.md).
#
# Kernels for TPUs were compiled, not run: by the compiler's schedule they take as long as JAX's own splash attention. A
# block of theirs is of 128 tokens at least.
CHOICES = (Choice(Triton(), "cuda", (8, 0), (16, 256), 64), Choice(TPU(), "tpu", None, (16, 256), 128))


@dataclasses.dataclass(frozen=True)
class Fastest:
    """The fastest implementation that serves a call on the device that a program is lowered for.

    ``implementation=None`` means this value. It never refuses: where no kernel serves, and for derivatives beyond a
    gradient, it is `Windowed`. An exported program has no kernels, so that any version of JAX can run it.

    Args:
        token_major: See `Triton`.

    Example:
        >>> q = k = v = jnp.ones((2, 64, 64))
        >>> local_attention(q, k, v, window_size=16, implementation=Fastest()).shape
        (2, 64, 64)
    """

    token_major: bool = False

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`."""
        return attend_by(self, operands, options)

    def choose(self, operands: Operands, options: AttentionOptions, target: Target, step: str) -> Kernels | None:
        """Return the kernels of the first row of the table that serves a call, as every `Chooser`."""
        found = next((row.kernels for row in CHOICES if row.serves(operands, options, target)), None)
        return dataclasses.replace(found, token_major=self.token_major) if isinstance(found, Triton) else found
