"""Fused local attention on NVIDIA GPUs: the calls that its kernels serve, their tiles, and their launches.

===================== ====================== ==================== =============================================
kernel                a program owns         and visits           writes
===================== ====================== ==================== =============================================
local_attention       a block of queries     their keys           O, largest and total
local_attention_dq    a block of queries     their keys           dQ, and each query's delta and log-sum-exp
local_attention_dkv   a block of keys        their queries        dK and dV
local_attention_dbias a part of the layout   its queries and keys the gradient of the bias, as it is laid out
===================== ====================== ==================== =============================================

`triton_programs` has what a program computes, `family` what is done around the kernels. JAX's own operations lay a bias
out, and `Call._gather_bias` transposes that.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from flax_local_attention.kernels.constants import FLOAT32, LEAST
from flax_local_attention.kernels.family import (
    TOKEN_MAJOR,
    KernelFamily,
    fill_options,
    is_busy,
    sum_shared,
    without,
)
from flax_local_attention.kernels.pallas_triton import MOST_PROGRAMS, Launch, Tile, is_available
from flax_local_attention.kernels.primitives import Target
from flax_local_attention.kernels.triton_programs import attend_program, dbias_program, dkv_program, dq_program
from flax_local_attention.operands import Operands, over_heads
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import lay_out_bias
from flax_local_attention.window import Window

# Values of `precision` by which float32 may be multiplied as TensorFloat-32, the only way that these kernels have.
TF32_WORDS = ("default", "fastest", "bfloat16", "tensorfloat32", "TF32_TF32_F32", "BF16_BF16_F32")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of the kernels: forward, for the gradient of q (and of a bias), and for those of k and v."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @property
    def most_queries(self) -> int:
        """Most queries in a block."""
        return max(self.forward.rows, self.dq.rows, self.dkv.cols)

    @property
    def most_keys(self) -> int:
        """Most keys in a block."""
        return max(self.forward.cols, self.dq.cols, self.dkv.rows)

    def within(self, queries: int, keys: int) -> "Tiles":
        """Return tiles with at most these numbers of queries and keys in a block."""
        of_queries = (
            tile._replace(rows=min(tile.rows, queries), cols=min(tile.cols, keys)) for tile in (self.forward, self.dq)
        )
        dkv = self.dkv._replace(rows=min(self.dkv.rows, keys), cols=min(self.dkv.cols, queries))
        forward, dq = of_queries
        return Tiles(forward, dq, dkv)


class TileRow(NamedTuple):
    """A row of the table of tiles.

    Attributes:
        head_size: Largest head size that it is for.
        reach: Least number of keys, beside a query's own window, that it is for.
        is_busy: Whether it is also for calls that compute more than scores: a mask, documents, a bias, a soft cap,
            dropout or shared queries. These need registers.
        tiles: Tiles to take.
    """

    head_size: int
    reach: int
    is_busy: bool
    tiles: Tiles


# The first row that fits a call is taken. Tiles were measured on an H100 at head sizes 64 and 128
# (benchmarks/RESULTS.md); the others are the largest that spill no register. More warps, and separate loops for the
# edges, were slower.
TILES = (
    TileRow(64, 256, True, Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3))),
    TileRow(64, 0, True, Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3))),
    TileRow(128, 512, False, Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))),
    TileRow(128, 0, False, Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))),
    TileRow(128, 0, True, Tiles(Tile(64, 32, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2))),
    TileRow(256, 0, True, Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2))),
)
FLOAT32_TILES = (
    TileRow(64, 0, True, Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2))),
    TileRow(128, 0, True, Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))),
)


@dataclasses.dataclass(frozen=True)
class Triton(KernelFamily):
    """Local attention by fused kernels, for NVIDIA GPUs of compute capability 8.0 and up.

    Memory beside inputs and results: two float32 numbers a query and head, two more while a gradient is computed, and
    copies of q and k where they are rotated, normalised, or of a head size that is no power of two, or not that of the
    values: kernels compute with the wider of both. Results repeat
    bitwise. float32 is multiplied as TensorFloat-32. Scores may be as large as 2e6: beyond, float32 is too coarse for
    them in base 2.

    Args:
        tiles: Sizes of the programs. None means those that were measured best.
        interpret: Whether to run on any device, slowly: for tests of everything but the compiler.
        assembly: Whether exponentials are inline assembly; interpreted kernels have none.
        token_major: Whether to read q, k, v and write the result as ``[b, n, h, d]``, which saves transposing them
            between the products of a layer; not where query heads share keys.

    Example:
        >>> q = k = v = jnp.ones((2, 64, 64))
        >>> local_attention(q, k, v, window_size=16, implementation=Triton(interpret=True)).shape
        (2, 64, 64)
    """

    NAME = "Triton"
    NEEDS = "an NVIDIA GPU of compute capability 8.0 or more"
    DTYPES = (jnp.bfloat16, jnp.float16, FLOAT32)
    TILES = Tiles

    tiles: Tiles | None = None
    interpret: bool = False
    assembly: bool = True
    token_major: bool = False

    def problem_of(self, target: Target) -> str | None:
        """Return why these kernels cannot run on a target, as every `KernelFamily`."""
        if target.platform != "cuda":
            return target.platform
        if target.capability is not None and target.capability < (8, 0):
            return f"a GPU of {target.capability}"
        return None

    def own_problems(self, operands: Operands, options: AttentionOptions) -> list[str]:
        """Return the reasons of this family alone why it cannot serve a call, as every `KernelFamily`."""
        q, window = operands.q, options.window
        reasons = []
        d, _ = self.widths(operands)
        if not is_available():
            reasons.append("this JAX has no Triton backend in Pallas")
        widest = (FLOAT32_TILES if q.dtype == FLOAT32 else TILES)[-1].head_size
        if d > widest:
            widths = f"{q.shape[-1]}, with values of {operands.v.shape[-1]}"
            return [*reasons, f"heads of {q.dtype} must be at most {widest} wide, got {widths}"]
        if operands.bias is not None and _bias_period(window, self.choose_tiles(operands, options)) is None:
            reasons.append(f"a bias needs `window_size` to be a multiple of 16 or a power of two, got {window.size}")
        if max(q.shape[0], q.shape[1] * q.shape[2]) > MOST_PROGRAMS:
            reasons.append(f"at most {MOST_PROGRAMS} rows and as many heads, got {q.shape[:3]}")
        return reasons

    def allows_float32(self, options: AttentionOptions) -> bool:
        """Return whether the `precision` of a call in float32 allows products in TensorFloat-32."""
        precision = options.precision
        words = precision if isinstance(precision, tuple) else (precision,)
        return all(word in TF32_WORDS for word in words)

    def choose_tiles(self, operands: Operands, options: AttentionOptions) -> Tiles:
        """Return the tiles of a call that these kernels can serve; operands may be shapes."""
        if self.tiles is not None:
            return self.tiles
        (d, _), window = self.widths(operands), options.window
        busy = is_busy(operands, options)
        table = FLOAT32_TILES if operands.q.dtype == FLOAT32 else TILES
        reach = window.backward + window.forward
        fits = (row for row in table if d <= row.head_size and reach >= row.reach and row.is_busy >= busy)
        return next(fits).tiles

    def by_tokens(self) -> Self:
        """Return these kernels with `token_major`."""
        return dataclasses.replace(self, token_major=True)

    def widths(self, operands: Operands) -> tuple[int, int]:
        """Return the head size in the kernels, for values too: a power of two, at least 16, as products need."""
        widest = max(operands.q.shape[-1], operands.v.shape[-1])
        width = max(16, 1 << (widest - 1).bit_length())
        return width, width

    def create_call(self, operands: Operands, options: AttentionOptions) -> "Call":
        """Describe a call, as every `KernelFamily`."""
        return Call.create(self, operands, options)


def _bias_period(window: Window, tiles: Tiles) -> int | None:
    """Find the queries after which a bias's layout repeats, a number that blocks divide; None if there is none.

    A bias repeats after each window, so any multiple of the window will do. If neither of window and block divides the
    other, the period is the window, and `Call.create` makes the blocks smaller until they divide it: to 16 at the
    least.
    """
    w, rows = window.size, tiles.most_queries
    if w % rows == 0 or rows % w == 0:
        return max(w, rows)
    return w if w % 16 == 0 else None


@dataclasses.dataclass(frozen=True)
class Call:
    """All that is static in a call of the kernels.

    Attributes:
        options: Options of the call, with the scale filled in, and a dropout rate only where it acts.
        q_offset: Offset of the queries; None if it is traced.
        n, n_keys: Queries and keys.
        group: Query heads that share a head of keys.
        tiles: Sizes of the programs.
        bias_period: Queries after which the layout of a bias repeats; 0 without a bias.
        bias_before: Columns of this layout before the key at the first query's position.
        interpret, assembly, token_major: As in `Triton`, where they act.
    """

    options: AttentionOptions
    q_offset: int | None
    n: int
    n_keys: int
    group: int
    tiles: Tiles
    bias_period: int
    bias_before: int
    interpret: bool
    assembly: bool
    token_major: bool

    @classmethod
    def create(cls, kernels: Triton, operands: Operands, options: AttentionOptions) -> "Call":
        """Describe a call of the kernels, and fit its tiles and the layout of its bias together.

        With a bias, blocks are cut to divide the period. `bias_before` is a multiple of a block of keys that covers the
        reach of a window before the first query.
        """
        q, window = operands.q, options.window
        offset = operands.q_offset
        tiles = kernels.choose_tiles(operands, options)
        period = before = 0
        if operands.bias is not None:
            period = _bias_period(window, tiles) or 0
            tiles = tiles.within(math.gcd(period, tiles.most_queries), math.gcd(period, tiles.most_keys))
            wide = tiles.most_keys
            before = -(-(window.backward + window.size + wide) // wide) * wide
        return cls(
            options=fill_options(operands, options),
            q_offset=offset if isinstance(offset, int) else None,
            n=q.shape[-2],
            n_keys=operands.k.shape[-2],
            group=q.shape[2],
            tiles=tiles,
            bias_period=period,
            bias_before=before,
            interpret=kernels.interpret,
            assembly=kernels.assembly and not kernels.interpret,
            token_major=kernels.token_major and q.shape[2] == 1,
        )

    def arrays(self, operands: Operands) -> dict[str, jax.Array]:
        """Return the arrays that the kernels need beside q, k and v, by their names in programs.

        Masks are bytes, a sink and a seed get an axis of one entry, and an offset is an array only if it is traced.
        """
        as_bytes = {"mask": operands.mask, "q_mask": operands.q_mask}
        arrays = {name: x.astype(jnp.int8) for name, x in as_bytes.items() if x is not None}
        if operands.q_segments is not None and operands.k_segments is not None:
            arrays |= {"q_segments": operands.q_segments, "k_segments": operands.k_segments}
        if operands.sink is not None:
            arrays["sink"] = operands.sink[..., None].astype(FLOAT32)
        if self.options.dropout_rate and operands.dropout_seed is not None:
            arrays["seed"] = operands.dropout_seed[..., None]
        if self.q_offset is None:
            arrays["q_offset"] = jnp.asarray(operands.q_offset, jnp.int32).reshape(1)
        if operands.bias is not None:
            arrays["bias"] = self.lay_out_bias(operands.bias, operands.q_offset)
        return arrays

    def lay_out_bias(self, bias, q_offset):
        """Lay a bias ``[w, s]`` out, ``[period, columns]``, so that one slice is the part for two blocks.

        A row belongs to a query, a column to a key, see `softmax.lay_out_bias`. Rows repeat after a period. Columns
        reach from the first key of a window before the first query to a block beyond the last key of the last query's
        window.
        """
        # Half of float32's range: scaled to base 2, its least number would be -inf, which hides a key.
        if bias.dtype == FLOAT32:
            bias = jnp.where(jnp.isneginf(bias), bias, jnp.clip(bias, LEAST / 2, -LEAST / 2))
        window, keys = self.options.window, self.tiles.most_keys
        i, first_key = q_offset + jnp.arange(self.bias_period), self.bias_first_key(q_offset)
        columns = self.bias_before + 2 * keys + self.bias_period + window.size + window.forward
        return over_heads(lambda slab: lay_out_bias(window, slab, i, first_key, -(-columns // keys) * keys), bias)

    def bias_first_key(self, q_offset):
        """Return the position of the key in the layout's first column, a multiple of a block.

        The layout begins with a query at `q_offset`. When it repeats, keys move on by as many as queries do.
        """
        return q_offset // self.tiles.most_keys * self.tiles.most_keys - self.bias_before

    # Launches

    def forward(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the result, and the largest scores and totals of its log-sum-exp."""
        q, tile = arrays["q"], self.tiles.forward

        def program(block, refs, out, largest, total):
            attend_program(self, tile, block, refs, out, largest, total)

        sums = jax.ShapeDtypeStruct(q.shape[:-1], FLOAT32)
        results = {"o": jax.ShapeDtypeStruct(q.shape, q.dtype), "largest": sums, "total": sums}
        return self._launch("local_attention", program, arrays, results, tile, -(-self.n // tile.rows))

    def dq(self, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the gradient of q, and the arrays that `dkv` needs of each query, by their names there.

        These are delta, ``[b, h, g, n]``, and the log-sum-exp in base 2, likewise; see `dq_program`.
        """
        q, tile = arrays["q"], self.tiles.dq

        def program(block, refs, dq, *sums):
            dq_program(self, tile, block, refs, dq, *sums)

        sums = jax.ShapeDtypeStruct(q.shape[:-1], FLOAT32)
        results = {"dq": jax.ShapeDtypeStruct(q.shape, q.dtype), "delta": sums, "log_sum": sums}
        arrays = without(arrays, "q_mask", "sink")
        dq, *sums = self._launch("local_attention_dq", program, arrays, results, tile, -(-self.n // tile.rows))
        return dq, dict(zip(("delta", "log_sum"), sums, strict=True))

    def dkv(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the gradients of k and v, summed over the query heads that share them.

        A program gets all g heads of a group (``keep=2``) and loops over them, so no sum follows.
        """
        k, tile = arrays["k"], self.tiles.dkv

        def program(block, refs, dk, dv):
            dkv_program(self, tile, block, refs, dk, dv, self._lead_of(arrays, 2))

        results = {name: jax.ShapeDtypeStruct(k.shape, k.dtype) for name in ("dk", "dv")}
        arrays = without(arrays, "q_mask", "sink", "o", "largest", "total", "shift")
        return self._launch("local_attention_dkv", program, arrays, results, tile, -(-self.n_keys // tile.rows), keep=2)

    def dbias(self, arrays: Mapping[str, jax.Array], bias: jax.Array, operands: Operands) -> jax.Array:
        """Return the gradient of the bias as it was given, ``[b, h, g, w, s]``.

        The kernel makes that of the layout, ``[b or 1, h, g, period, columns]``. `_gather_bias` brings it back to the
        slab, and the axes that the bias shares are summed. If rows share the bias, a program loops over them
        (``keep=0``), but not where devices hold different rows.
        """
        laid_out, tile = arrays["bias"], self.tiles.dq
        keep = 0 if laid_out.shape[0] == 1 else None

        def program(block, refs, d_bias):
            dbias_program(self, tile, block, refs, d_bias, self._lead_of(arrays, keep))

        b, h, g = operands.q.shape[:3]
        rows, columns = laid_out.shape[-2:]
        results = {"d_bias": jax.ShapeDtypeStruct((1 if keep == 0 else b, h, g, rows, columns), FLOAT32)}
        arrays = without(arrays, "q_mask", "sink", "o", "shift")
        blocks = (rows // tile.rows) * (columns // tile.cols)
        (d_bias,) = self._launch("local_attention_dbias", program, arrays, results, tile, blocks, keep=keep)
        slabs = over_heads(lambda x: self._gather_bias(x, operands.q_offset), d_bias)
        return sum_shared(slabs, bias).astype(bias.dtype)

    def _gather_bias(self, laid_out, q_offset):
        """Sum a layout to ``[w, s]``, always in the same order: the transpose of `lay_out_bias`."""
        window = self.options.window
        columns = window.bias_column(q_offset + jnp.arange(self.bias_period), self.bias_first_key(q_offset))
        slabs = jax.vmap(lambda row, column: lax.dynamic_slice_in_dim(row, -column, window.slab))(laid_out, columns)
        by_row = jnp.roll(slabs, window.bias_row(q_offset), axis=0)
        return by_row.reshape(-1, window.size, window.slab).sum(0)

    def _launch(self, name, program, arrays, results, tile, blocks, keep=None):
        """Run a program over ``[b, h, g]`` and its blocks, see `Launch`."""
        launch = Launch(tile, keep, self.interpret)
        return launch(name, program, arrays, results, blocks, TOKEN_MAJOR if self.token_major else ())

    def _lead_of(self, arrays, axis):
        """Make the function from a name and an index on a kept axis to the leading index of that array's reference.

        A program gets an array whole along the kept axis, unless the array shares that axis: its reference then lacks
        it, and the leading index is empty.
        """
        kept = {name for name, x in arrays.items() if axis is not None and x.ndim > 1 and x.shape[axis] > 1}
        return lambda name, index: (index,) if name in kept else ()
