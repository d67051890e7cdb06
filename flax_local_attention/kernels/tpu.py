"""Fused local attention on TPUs: the calls that the kernels serve, their tiles, and their launches.

| kernel | a program owns | it visits | it writes |
| --- | --- | --- | --- |
| `local_attention` | a block of queries | their keys | O, largest and total |
| `local_attention_dq` | a block of queries | their keys | dQ |
| `local_attention_dkv` | a block of keys | their queries | dK and dV |

The loop of a program is the last axis of the grid, with a step for each block that `visited_blocks` finds. Both
backward kernels recompute scores and probabilities. Plain JAX computes the delta and log-sum-exp of each query before
them. `tpu_programs` has what a program computes at a step, `pallas_tpu` the grid, and `family` the work around the
kernels.

JAX 0.10 to 0.12 has no `custom_partitioning` on TPUs, so the kernels run on one device or inside `shard_map`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_local_attention.kernels.constants import FLOAT32
from flax_local_attention.kernels.family import KernelFamily, fill_options, has_precision_in, log_sum_of, without
from flax_local_attention.kernels.pallas_tpu import LANES, Block, Launch, Walk
from flax_local_attention.kernels.primitives import Target
from flax_local_attention.kernels.tpu_programs import attend_program, dkv_program, dq_program
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.window import TransposedWindow, Window

# Values of `precision` for which products round float32 operands to bfloat16, as XLA does; others keep full precision.
BFLOAT16_WORDS = (None, "default", "fastest", "bfloat16", "BF16_BF16_F32")

WIDEST = 256

# Cycles of a step by its block: forward, for the gradient of q, and for the gradients of k and v. They are numbers of
# instruction bundles at head size 128 in bfloat16, as compiled for a TPU v5e (benchmarks/RESULTS.md). The same blocks
# are best at 64 and 256.
CYCLES = {
    Block(128, 128): (196, 202, 239),
    Block(256, 256): (527, 517, 608),
    Block(512, 256): (779, 831, 1125),
    Block(512, 512): (1434, 1526, 1923),
}
# Cycles around a step, including an estimated wait for its copies, and cycles at the end of a program.
AROUND_STEP, AT_END = 270, 120


class Tiles(NamedTuple):
    """The blocks of the kernels.

    Attributes:
        forward: Block of the forward kernel.
        dq: Block of the kernel for the gradient of q.
        dkv: Block of the kernel for the gradients of k and v.
    """

    forward: Block
    dq: Block
    dkv: Block


@dataclasses.dataclass(frozen=True)
class TPU(KernelFamily):
    """Local attention by fused kernels for TPUs.

    Memory beside inputs and results: two float32 numbers a query and head, two more while a gradient is computed, and
    copies of q and k where they are rotated, normalised or padded to a multiple of 16. Heads whose size is a multiple
    of 128 lie in memory as ``[n, d]``, others as ``[d, n]``, which needs no padding; XLA lays such arrays out in the
    same way. Results repeat bitwise.

    Args:
        tiles: Sizes of the programs. None means those with the fewest cycles, counted in compiled programs.
        interpret: Whether to interpret the kernels on any device; slow, for tests of all but the compiler.

    Examples:
        >>> q = k = v = jnp.ones((2, 64, 64))
        >>> local_attention(q, k, v, window_size=16, implementation=TPU(interpret=True)).shape
        (2, 64, 64)
    """

    NAME = "TPU"
    NEEDS = "a TPU"
    DTYPES = (jnp.bfloat16, FLOAT32)
    PLACES = "on one device or inside shard_map"
    IS_STABLE = True
    LARGEST_CAP = math.inf
    TILES = Tiles

    tiles: Tiles | None = None
    interpret: bool = False

    def problem_of(self, target: Target) -> str | None:
        """Return why these kernels cannot run on a target, as every `KernelFamily`."""
        if target.platform != "tpu":
            return target.platform
        if not target.is_known:
            return "a TPU that is neither on this machine nor described by an abstract mesh"
        # JAX (0.10 to 0.12) has no `custom_partitioning` on TPUs: https://github.com/jax-ml/jax/issues/38196
        return None if target.partition == "none" else "arrays that the compiler partitions over a mesh"

    def own_problems(self, operands: Operands, options: AttentionOptions) -> list[str]:
        """Return the further reasons why this family cannot serve a call, as every `KernelFamily`."""
        reasons = []
        widths = operands.q.shape[-1], operands.v.shape[-1]
        if max(widths) > WIDEST:
            reasons.append(f"heads must be at most {WIDEST} wide, got {widths[0]}, with values of {widths[1]}")
        if operands.bias is not None:
            reasons.append("they add no bias")
        return reasons

    def widths(self, operands: Operands) -> tuple[int, int]:
        """Return the padded head sizes of queries and keys, and of values: multiples of 16."""
        width, value_width = (-(-x.shape[-1] // 16) * 16 for x in (operands.q, operands.v))
        return width, value_width

    def choose_tiles(self, operands: Operands, options: AttentionOptions) -> Tiles:
        """Return the tiles of a call that these kernels can serve; operands may be shapes."""
        if self.tiles is not None:
            return self.tiles
        window = options.window
        windows = (window, window, window.transposed)

        def cycles(kernel, block):
            walk = _walk(windows[kernel], block, operands)
            return walk.programs * (walk.steps * (CYCLES[block][kernel] + AROUND_STEP) + AT_END)

        return Tiles(*(min(CYCLES, key=functools.partial(cycles, kernel)) for kernel in range(3)))

    def create_call(self, operands: Operands, options: AttentionOptions) -> "Call":
        """Make the static part of a call, as every `KernelFamily`."""
        window, tiles = options.window, self.choose_tiles(operands, options)
        return Call(
            options=fill_options(operands, options),
            walks=(
                _walk(window, tiles.forward, operands),
                _walk(window, tiles.dq, operands),
                _walk(window.transposed, tiles.dkv, operands),
            ),
            token_axis=1 if any(width % LANES for width in self.widths(operands)) else 0,
            precision=_precision_of(operands, options),
            interpret=self.interpret,
        )


def _walk(window: Window | TransposedWindow, block: Block, operands: Operands) -> Walk:
    """Make the walk of programs with this block; for a transposed window, rows are keys."""
    q, k, offset = operands.q, operands.k, operands.q_offset
    return Walk(window, block, q.shape[-2], k.shape[-2], offset if isinstance(offset, int) else None, q.shape[2])


def _precision_of(operands: Operands, options: AttentionOptions) -> lax.Precision:
    """Return the precision of products: full for float32 where the options ask for it, as in the plain path."""
    is_narrow = operands.q.dtype != FLOAT32 or has_precision_in(options, BFLOAT16_WORDS)
    return lax.Precision.DEFAULT if is_narrow else lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call of the kernels.

    Attributes:
        options: Options of the call, see `fill_options`.
        walks: Blocks that programs visit: forward, for the gradient of q, and for the gradients of k and v.
        token_axis: Axis of the tokens in a block of features: 0 in ``[n, d]``, 1 in ``[d, n]``.
        precision: Precision of products.
        interpret: As in `TPU`.
    """

    options: AttentionOptions
    walks: tuple[Walk, Walk, Walk]
    token_axis: int
    precision: lax.Precision
    interpret: bool

    @property
    def n(self) -> int:
        """The number of queries."""
        return self.walks[0].n

    @property
    def n_keys(self) -> int:
        """The number of keys."""
        return self.walks[0].n_keys

    @property
    def feature_axis(self) -> int:
        """The axis of the features in a block."""
        return 1 - self.token_axis

    def arrays(self, operands: Operands) -> dict[str, jax.Array]:
        """Return the arrays that the kernels need beside q, k and v, in 32 bits, by their names in the programs."""
        as_integers = {"mask": operands.mask, "q_mask": operands.q_mask}
        if operands.q_segments is not None and operands.k_segments is not None:
            as_integers |= {"q_segments": operands.q_segments, "k_segments": operands.k_segments}
        arrays = {name: x.astype(jnp.int32) for name, x in as_integers.items() if x is not None}
        if operands.sink is not None:
            arrays["sink"] = operands.sink[..., None].astype(FLOAT32)
        if self.options.dropout_rate and operands.dropout_seed is not None:
            arrays["seed"] = lax.bitcast_convert_type(operands.dropout_seed[..., None], jnp.int32)
        if self.walks[0].q_offset is None:
            arrays["q_offset"] = jnp.asarray(operands.q_offset, jnp.int32).reshape(1)
        return arrays

    def forward(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the output, and the largest score and total of each query's log-sum-exp."""
        q, v, walk = arrays["q"], arrays["v"], self.walks[0]
        rows = walk.block.rows
        scratch = [((v.shape[-1], rows), FLOAT32), ((1, rows), FLOAT32), ((1, rows), FLOAT32)]
        if "q_mask" in arrays:
            scratch.append(self._block_of(q, rows))
        sums = jax.ShapeDtypeStruct(q.shape[:-1], FLOAT32)
        results = {"o": jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype), "largest": sums, "total": sums}
        return self._launch("local_attention", attend_program, arrays, results, scratch, walk)

    def dq(self, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the gradient of q, and the numbers of each query that `dkv` needs, by their names there.

        These are delta, ``[b, h, g, n]``, and the log-sum-exp in base 2, likewise.
        """
        q, walk = arrays["q"], self.walks[1]
        rows = walk.block.rows
        scratch = [((q.shape[-1], rows), FLOAT32)]
        if "mask" in arrays:
            scratch.append(self._block_of(q, rows))
        # These are sums over features, which the kernel would have to transpose to rows ``[1, n]``.
        delta = jnp.sum(arrays["o"].astype(FLOAT32) * arrays["do"].astype(FLOAT32), -1)
        delta = delta - arrays["shift"] if "shift" in arrays else delta
        sums = {"delta": delta, "log_sum": log_sum_of(arrays["largest"], arrays["total"])}
        results = {"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)}
        arrays = self._of_gradient(arrays) | sums
        (dq,) = self._launch("local_attention_dq", dq_program, arrays, results, scratch, walk)
        return dq, sums

    def dkv(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the gradients of k and v, summed over the query heads that share them: a program visits them all."""
        k, v, walk = arrays["k"], arrays["v"], self.walks[2]
        scratch = [(self._shape_of(x, walk.block.rows), FLOAT32) for x in (k, v)]
        results = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in (("dk", k), ("dv", v))}
        arrays = self._of_gradient(arrays)
        return self._launch("local_attention_dkv", dkv_program, arrays, results, scratch, walk)

    def _of_gradient(self, arrays):
        """Return the arrays that the backward kernels read."""
        return without(arrays, "q_mask", "sink", "o", "largest", "total", "shift")

    def _shape_of(self, x, size):
        """Return the shape of a block of `size` tokens."""
        return (size, x.shape[-1]) if self.token_axis == 0 else (x.shape[-1], size)

    def _block_of(self, x, size):
        return self._shape_of(x, size), x.dtype

    def _launch(self, name, program, arrays, results, scratch, walk):
        """Launch a program for all blocks and heads, see `Launch`."""

        def run(step, refs, *rest):
            program(self, step, refs, *rest)

        launch = Launch(walk, self.token_axis == 1, self.interpret)
        return launch(name, run, arrays, results, scratch)
