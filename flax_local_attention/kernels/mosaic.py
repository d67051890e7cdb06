"""Fused local attention on Hopper GPUs by Mosaic GPU: the calls that the kernels serve, their tiles, their launches.

| kernel | a warpgroup owns | it visits | it writes |
| --- | --- | --- | --- |
| `local_attention` | rows of queries | their keys | O, largest and total |
| `local_attention_dq` | rows of queries | their keys | dQ, and the delta and log-sum-exp of each query |
| `local_attention_dkv` | rows of keys | their queries | dK and dV |

A program has ``groups * rows`` rows of one head, and its loop runs over the blocks of columns that `visited_blocks`
finds for them. Both backward kernels recompute scores and probabilities. `mosaic_programs` has what a warpgroup
computes, `pallas_mosaic` the grid and the copies, and `family` the work around the kernels.

JAX 0.12 gives the computing warpgroups too few registers (`keeps_registers`), so these kernels are then not preferred
to Triton's. CUDA 12.8.0 to 12.9.0 miscompiles their masks (`miscompiling_cuda`), so they refuse to run there.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from flax_local_attention.kernels.borders import join_borders
from flax_local_attention.kernels.constants import FLOAT32
from flax_local_attention.kernels.dispatch import DIFFERENTIABLE, Results
from flax_local_attention.kernels.family import TOKEN_MAJOR, KernelFamily, fill_options
from flax_local_attention.kernels.mosaic_programs import attend_program, dkv_program, dq_program
from flax_local_attention.kernels.pallas_mosaic import Launch, Tile, has_interpreter, is_available, miscompiling_cuda
from flax_local_attention.kernels.plan import visited_blocks
from flax_local_attention.kernels.primitives import Target
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum


class Tiles(NamedTuple):
    """The tiles of the kernels.

    Attributes:
        forward: Tile of the forward kernel.
        dq: Tile of the kernel for the gradient of q.
        dkv: Tile of the kernel for the gradients of k and v.
    """

    forward: Tile
    dq: Tile
    dkv: Tile


class TileRow(NamedTuple):
    """A row of the table of tiles.

    Attributes:
        width: Head size in the kernels.
        reach: Least reach of a window, ``backward + forward``.
        tiles: Tiles to take.
    """

    width: int
    reach: int
    tiles: Tiles


# The first row that fits a call is taken. Tiles were measured on an H100 (benchmarks/RESULTS.md). Three warpgroups,
# other blocks, and separate loops for blocks with an edge were slower.
TILES = (
    TileRow(64, 0, Tiles(Tile(64, 128, 2, 3, True), Tile(64, 128, 2, 2, True), Tile(64, 64, 2, 3, True))),
    TileRow(128, 512, Tiles(Tile(64, 128, 2, 2), Tile(64, 64, 2, 2), Tile(64, 64, 2, 2))),
    TileRow(128, 0, Tiles(Tile(64, 64, 2, 3, True), Tile(64, 64, 2, 2), Tile(64, 64, 2, 2))),
)
WIDEST = TILES[-1].width

# Lengths must be multiples of this: the tensor memory accelerator copies rows in groups of 8.
ROWS = 8


@dataclasses.dataclass(frozen=True)
class MosaicGPU(KernelFamily):
    """Local attention by fused kernels for NVIDIA Hopper GPUs, compute capability 9.0.

    They need as much memory beside inputs and results as `Triton`, but pad heads to 64 or 128, and with a mask they
    copy q, k and v to zero the masked tokens. Results repeat bitwise. Up to scores of 50,000, the rounding of a query's
    log-sum-exp changes a gradient's probabilities by at most 0.3 %. An exported program may contain these kernels; the
    process that runs it must import ``jax.experimental.pallas.mosaic_gpu`` first.

    Args:
        tiles: Sizes of the programs. None means the fastest that were measured.
        interpret: Whether to interpret the kernels on a CPU; slow, for tests of all but the compiler. It needs JAX
            0.11.
        token_major: As in `Triton`.

    Examples:
        >>> q = k = v = jnp.ones((2, 64, 64), jnp.bfloat16)
        >>> MosaicGPU().problems(Operands.create(q, k, v, AttentionOptions(Window(16))), AttentionOptions(Window(16)))
        []
    """

    NAME = "Mosaic GPU"
    NEEDS = "an NVIDIA GPU of compute capability 9.0"
    DTYPES = (jnp.bfloat16, jnp.float16)
    HIDES_MASKED = False
    IS_STABLE = True
    TILES = Tiles

    tiles: Tiles | None = None
    interpret: bool = False
    token_major: bool = False

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`; the plain path computes derivatives beyond the gradient."""
        if self.interpret and not self.problems(operands, options):
            return _interpret(self, join_borders(operands), options)
        return super().__call__(operands, options)

    def problem_of(self, target: Target) -> str | None:
        """Return why these kernels cannot run on a target, as every `KernelFamily`."""
        if target.platform != "cuda":
            return target.platform
        if target.capability is not None and target.capability != (9, 0):
            return f"a GPU of {target.capability}"
        if (version := miscompiling_cuda()) is not None:
            return f"CUDA {version}, and versions 12.8.0 to 12.9.0 miscompile the masks of these kernels"
        return None

    def own_problems(self, operands: Operands, options: AttentionOptions) -> list[str]:
        """Return the further reasons why this family cannot serve a call, as every `KernelFamily`."""
        reasons = []
        if not is_available():
            reasons.append("this JAX has no Mosaic GPU backend in Pallas")
        elif self.interpret and not has_interpreter():
            reasons.append("this JAX cannot interpret Mosaic GPU kernels, as 0.11 and later can")
        widest = max(operands.q.shape[-1], operands.v.shape[-1])
        if widest > WIDEST:
            reasons.append(f"heads must be at most {WIDEST} wide, got {widest}")
        lengths = operands.q.shape[-2], operands.k.shape[-2]
        if any(n % ROWS for n in lengths):
            reasons.append(f"queries and keys must be multiples of {ROWS}, got {lengths[0]} and {lengths[1]}")
        if not isinstance(operands.q_offset, int):
            reasons.append("`q_offset` must be known")
        if operands.bias is not None:
            reasons.append("they add no bias")
        if options.shared_qk:
            reasons.append("they do not serve `shared_qk`")
        if options.dropout_rate and operands.dropout_seed is not None:
            reasons.append("they have no dropout")
        return reasons

    def by_tokens(self) -> Self:
        """Return these kernels with `token_major`."""
        return dataclasses.replace(self, token_major=True)

    def widths(self, operands: Operands) -> tuple[int, int]:
        """Return the padded head size, the same for keys and values: 64 or 128."""
        widest = max(operands.q.shape[-1], operands.v.shape[-1])
        width = next(row.width for row in TILES if widest <= row.width)
        return width, width

    def choose_tiles(self, operands: Operands, options: AttentionOptions) -> Tiles:
        """Return the tiles of a call that these kernels can serve; operands may be shapes."""
        if self.tiles is not None:
            return self.tiles
        (width, _), window = self.widths(operands), options.window
        reach = window.backward + window.forward
        return next(row.tiles for row in TILES if width == row.width and reach >= row.reach)

    def create_call(self, operands: Operands, options: AttentionOptions) -> "Call":
        """Make the static part of a call, as every `KernelFamily`."""
        width, _ = self.widths(operands)
        assert isinstance(operands.q_offset, int)
        return Call(
            options=fill_options(operands, options),
            q_offset=operands.q_offset,
            n=operands.q.shape[-2],
            n_keys=operands.k.shape[-2],
            width=width,
            dtype=operands.q.dtype,
            tiles=self.choose_tiles(operands, options),
            interpret=self.interpret,
            token_major=self.token_major and operands.q.shape[2] == 1,
        )


def _interpret(kernels, operands, options):
    """Attend by interpreted kernels. They call back to Python, which JAX refuses in lowering rules of primitives."""

    @jax.custom_vjp
    def attend(chosen):
        return kernels.forward(operands._replace(**chosen), options)

    def attend_forward(given):
        chosen = {name: x.value for name, x in given.items()}
        out, log_sum = attend(chosen)
        return (out, log_sum), (chosen, out, log_sum)

    def attend_backward(kept, cotangents):
        chosen, out, log_sum = kept
        d_out, (_, d_total) = cotangents
        is_zero = [isinstance(x, SymbolicZero) for x in (d_out, d_total)]
        d_out = jnp.zeros(out.shape, out.dtype) if is_zero[0] else d_out
        results = Results(out, log_sum, d_out, None if is_zero[1] else d_total, tuple(chosen))
        return (kernels.backward(operands._replace(**chosen), options, results=results),)

    attend.defvjp(attend_forward, attend_backward, symbolic_zeros=True)
    return attend({name: x for name in DIFFERENTIABLE if (x := getattr(operands, name)) is not None})


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call of the kernels.

    Attributes:
        options: Options of the call, with the scale filled in.
        q_offset: Offset of the queries.
        n: Number of queries.
        n_keys: Number of keys.
        width: Head size in the kernels.
        dtype: Dtype of q, k and v.
        tiles: Sizes of the programs.
        interpret: As in `MosaicGPU`.
        token_major: As in `MosaicGPU`; False where query heads share keys.
    """

    options: AttentionOptions
    q_offset: int
    n: int
    n_keys: int
    width: int
    dtype: Any
    tiles: Tiles
    interpret: bool
    token_major: bool

    def arrays(self, operands: Operands) -> dict[str, jax.Array]:
        """Return the arrays that the kernels need beside q, k and v, by their names in the programs."""
        names = ("mask", "q_segments", "k_segments")
        given = {name: getattr(operands, name) for name in names}
        arrays = {name: x.astype(jnp.int32) for name, x in given.items() if x is not None}
        if operands.sink is not None:
            arrays["sink"] = operands.sink[..., None].astype(FLOAT32)
        return arrays

    def forward(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the output, and the largest score and total of each query's log-sum-exp."""
        q = arrays["q"]
        sums = jax.ShapeDtypeStruct(q.shape[:-1], FLOAT32)
        results = {"o": jax.ShapeDtypeStruct(q.shape, q.dtype), "largest": sums, "total": sums}
        return self._over_queries("local_attention", attend_program, arrays, results, ["q"], {"o": "q"})

    def dq(self, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the gradient of q, and the delta and log-sum-exp of each query, by their names in `dkv`."""
        q = arrays["q"]
        sums = jax.ShapeDtypeStruct(q.shape[:-1], FLOAT32)
        results = {"dq": jax.ShapeDtypeStruct(q.shape, q.dtype), "delta": sums, "log_sum": sums}
        stay = ["q", "do", "o", "largest", "total", *(["shift"] if "shift" in arrays else [])]
        homes = {"dq": "q", "delta": "largest", "log_sum": "total"}
        dq, *sums = self._over_queries("local_attention_dq", dq_program, arrays, results, stay, homes)
        return dq, dict(zip(("delta", "log_sum"), sums, strict=True))

    def dkv(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the gradients of k and v, summed over the query heads that share them."""
        k, tile = arrays["k"], self.tiles.dkv
        window = self.options.window.transposed
        has = arrays.__contains__
        return self._launch(
            "local_attention_dkv",
            dkv_program,
            arrays,
            {name: jax.ShapeDtypeStruct(k.shape, k.dtype) for name in ("dk", "dv")},
            Launch(tile, over_group=True, interpret=self.interpret),
            stay=["k", "v", *filter(has, ("mask", "k_segments"))],
            move=["q", "do", "log_sum", "delta", *filter(has, ("q_segments",))],
            visit=lambda first, last: visited_blocks(window, first, last, tile.cols, self.n, self.q_offset),
            in_memory_of={"dk": "k", "dv": "v"},
        )

    def _over_queries(self, name, program, arrays, results, stay, in_memory_of):
        """Launch a program whose rows are queries and whose columns are keys."""
        is_forward = name == "local_attention"
        tile = self.tiles.forward if is_forward else self.tiles.dq
        window, offset, has = self.options.window, self.q_offset, arrays.__contains__
        return self._launch(
            name,
            program,
            arrays,
            results,
            Launch(tile, takes_turns=is_forward, interpret=self.interpret),
            stay=[*stay, *filter(has, ("q_segments",))],
            move=["k", "v", *filter(has, ("mask", "k_segments"))],
            visit=lambda first, last: visited_blocks(window, offset + first, offset + last, tile.cols, self.n_keys),
            in_memory_of=in_memory_of,
        )

    def _launch(self, name, program, arrays, results, launch, stay, move, visit, in_memory_of):
        """Launch a program for all tiles and heads, see `Launch`."""
        needed = {x: arrays[x] for x in (*stay, *move)}
        if name == "local_attention" and "sink" in arrays:
            needed["sink"] = arrays["sink"]
        token_major = TOKEN_MAJOR if self.token_major else ()
        return launch(name, partial(program, self), needed, results, stay, move, visit, in_memory_of, token_major)
