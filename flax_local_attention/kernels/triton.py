"""Fused local attention on NVIDIA GPUs: the calls that the kernels serve, their tiles, and their launches.

| kernel | a program owns | it visits | it writes |
| --- | --- | --- | --- |
| `local_attention` | a block of queries | their keys | O, largest and total |
| `local_attention_dq` | a block of queries | their keys | dQ, and the delta and log-sum-exp of each query |
| `local_attention_dkv` | a block of keys | their queries | dK and dV |
| `local_attention_dbias` | a part of the bias's layout | its queries and keys | the gradient of this part |

The loop of a program runs over the blocks that `visited_blocks` finds. All backward kernels recompute scores and
probabilities. `triton_programs` has what a program computes, `pallas_triton` the grid, and `family` the work around the
kernels. Plain JAX lays a bias out before the kernels, so that they read one slice of it for two blocks;
`Call._gather_bias` is the transpose of that.
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
    has_precision_in,
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

# Values of `precision` that allow products in TensorFloat-32, the only products in float32 that these kernels have.
TF32_WORDS = ("default", "fastest", "bfloat16", "tensorfloat32", "TF32_TF32_F32", "BF16_BF16_F32")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the kernels.

    Attributes:
        forward: Tile of the forward kernel.
        dq: Tile of the kernels for the gradients of q and of a bias.
        dkv: Tile of the kernel for the gradients of k and v.
    """

    forward: Tile
    dq: Tile
    dkv: Tile

    @property
    def most_queries(self) -> int:
        """The most queries in a block of any kernel."""
        return max(self.forward.rows, self.dq.rows, self.dkv.cols)

    @property
    def most_keys(self) -> int:
        """The most keys in a block of any kernel."""
        return max(self.forward.cols, self.dq.cols, self.dkv.rows)

    def within(self, queries: int, keys: int) -> "Tiles":
        """Limit the queries and the keys in a block to these numbers."""
        of_queries = (
            tile._replace(rows=min(tile.rows, queries), cols=min(tile.cols, keys)) for tile in (self.forward, self.dq)
        )
        dkv = self.dkv._replace(rows=min(self.dkv.rows, keys), cols=min(self.dkv.cols, queries))
        forward, dq = of_queries
        return Tiles(forward, dq, dkv)


class TileRow(NamedTuple):
    """A row of the table of tiles.

    Attributes:
        head_size: Largest head size that the row is for.
        reach: Least reach of a window, ``backward + forward``, that the row is for.
        is_busy: Whether the row is also for calls that need more registers, see `family.is_busy`.
        tiles: Tiles to take.
    """

    head_size: int
    reach: int
    is_busy: bool
    tiles: Tiles


# The first row that fits a call is taken. Tiles for head sizes of 64 and 128 were measured on an H100
# (benchmarks/RESULTS.md); the others are the largest that spill no registers. More warps, and separate loops for blocks
# with an edge, were slower.
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
    """Local attention by fused kernels for NVIDIA GPUs, compute capability 8.0 and up.

    Memory beside inputs and results: two float32 numbers a query and head, two more while a gradient is computed, and
    copies of q and k where they are rotated, normalised or padded. Heads of queries, keys and values are padded to one
    size, a power of two of at least 16. Results repeat bitwise. float32 is multiplied as TensorFloat-32. Scores may be
    as large as 2e6; beyond, float32 is too coarse for them in base 2.

    Args:
        tiles: Sizes of the programs. None means the fastest that were measured.
        interpret: Whether to interpret the kernels on any device; slow, for tests of all but the compiler.
        assembly: Whether to compute exponentials by inline assembly; interpreted kernels never do.
        token_major: Whether to read q, k, v and write the output as ``[b, n, h, d]``, which saves their transposition
            between the projections of a layer. It has no effect where query heads share keys.

    Examples:
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
        """Return the further reasons why this family cannot serve a call, as every `KernelFamily`."""
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
        return has_precision_in(options, TF32_WORDS)

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
        """Return the padded head size, the same for keys and values: products need a power of two, at least 16."""
        widest = max(operands.q.shape[-1], operands.v.shape[-1])
        width = max(16, 1 << (widest - 1).bit_length())
        return width, width

    def create_call(self, operands: Operands, options: AttentionOptions) -> "Call":
        """Make the static part of a call, as every `KernelFamily`."""
        return Call.create(self, operands, options)


def _bias_period(window: Window, tiles: Tiles) -> int | None:
    """Return after how many queries the layout of a bias repeats, a multiple of the blocks; None if there is none.

    A bias repeats after each window, so the period may be any multiple of the window. If neither window nor block
    divides the other, the period is the window, and `Call.create` shrinks the blocks until they divide it. A window
    that is a multiple of 16 leaves blocks of at least 16.
    """
    w, rows = window.size, tiles.most_queries
    if w % rows == 0 or rows % w == 0:
        return max(w, rows)
    return w if w % 16 == 0 else None


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call of the kernels.

    Attributes:
        options: Options of the call, see `fill_options`.
        q_offset: Offset of the queries; None if it is traced.
        n: Number of queries.
        n_keys: Number of keys.
        group: Query heads that share a head of keys.
        tiles: Sizes of the programs.
        bias_period: Queries after which the layout of a bias repeats; 0 without a bias.
        bias_before: Columns of this layout before the key at the first query's position.
        interpret: As in `Triton`.
        assembly: As in `Triton`; False where the kernels are interpreted.
        token_major: As in `Triton`; False where query heads share keys.
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
        """Make the static part of a call, and match its tiles and the layout of its bias to each other.

        With a bias, blocks are shrunk to divide the period. `bias_before` is a multiple of a block of keys that covers
        the reach of a window before the first query.
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
        """Return the arrays that the kernels need beside q, k and v, by their names in the programs.

        Masks are bytes, a sink and a seed get an axis of size 1, and an offset is an array only if it is traced.
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
        """Lay a bias ``[w, s]`` out as ``[period, columns]``, so that one slice holds the part for two blocks.

        A row belongs to a query, a column to a key, see `softmax.lay_out_bias`. Rows repeat after a period. Columns
        reach from the first key of a window before the first query to a block beyond the last key of the last query's
        window.
        """
        # All but -inf are limited to half of float32's range: its least number times log2(e) would be -inf, which hides
        # a key.
        if bias.dtype == FLOAT32:
            bias = jnp.where(jnp.isneginf(bias), bias, jnp.clip(bias, LEAST / 2, -LEAST / 2))
        window, keys = self.options.window, self.tiles.most_keys
        i, first_key = q_offset + jnp.arange(self.bias_period), self.bias_first_key(q_offset)
        columns = self.bias_before + 2 * keys + self.bias_period + window.size + window.forward
        return over_heads(lambda slab: lay_out_bias(window, slab, i, first_key, -(-columns // keys) * keys), bias)

    def bias_first_key(self, q_offset):
        """Return the position of the key in the layout's first column, a multiple of a block.

        The first row belongs to the query at `q_offset`. In each repetition keys move on by as many as queries do.
        """
        return q_offset // self.tiles.most_keys * self.tiles.most_keys - self.bias_before

    # Launches

    def forward(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the output, and the largest score and total of each query's log-sum-exp."""
        q, tile = arrays["q"], self.tiles.forward

        def program(block, refs, out, largest, total):
            attend_program(self, tile, block, refs, out, largest, total)

        sums = jax.ShapeDtypeStruct(q.shape[:-1], FLOAT32)
        results = {"o": jax.ShapeDtypeStruct(q.shape, q.dtype), "largest": sums, "total": sums}
        return self._launch("local_attention", program, arrays, results, tile, -(-self.n // tile.rows))

    def dq(self, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the gradient of q, and the numbers of each query that `dkv` needs, by their names there.

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

        A program gets all g heads of a group (``keep=2``) and loops over them, so that no sum follows the kernel.
        """
        k, tile = arrays["k"], self.tiles.dkv

        def program(block, refs, dk, dv):
            dkv_program(self, tile, block, refs, dk, dv, self._lead_of(arrays, 2))

        results = {name: jax.ShapeDtypeStruct(k.shape, k.dtype) for name in ("dk", "dv")}
        arrays = without(arrays, "q_mask", "sink", "o", "largest", "total", "shift")
        return self._launch("local_attention_dkv", program, arrays, results, tile, -(-self.n_keys // tile.rows), keep=2)

    def dbias(self, arrays: Mapping[str, jax.Array], bias: jax.Array, operands: Operands) -> jax.Array:
        """Return the gradient of the bias in its own shape, ``[b, h, g, w, s]``.

        The kernel computes the gradient of the layout, ``[b or 1, h, g, period, columns]``. `_gather_bias` sums it to
        ``[w, s]``, and the axes that the bias shares are summed last. If rows of the batch share the bias, a program
        loops over the rows of its device (``keep=0``).
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
        """Sum a layout to ``[w, s]`` in a fixed order: the transpose of `lay_out_bias`."""
        window = self.options.window
        columns = window.bias_column(q_offset + jnp.arange(self.bias_period), self.bias_first_key(q_offset))
        slabs = jax.vmap(lambda row, column: lax.dynamic_slice_in_dim(row, -column, window.slab))(laid_out, columns)
        by_row = jnp.roll(slabs, window.bias_row(q_offset), axis=0)
        return by_row.reshape(-1, window.size, window.slab).sum(0)

    def _launch(self, name, program, arrays, results, tile, blocks, keep=None):
        """Launch a program for all blocks and heads, see `Launch`."""
        launch = Launch(tile, keep, self.interpret)
        return launch(name, program, arrays, results, blocks, TOKEN_MAJOR if self.token_major else ())

    def _lead_of(self, arrays, axis):
        """Return the function from an array's name, and an index on the kept axis, to the reference's leading index.

        The reference of an array has the whole kept axis. If the array shares that axis, its reference lacks it, and
        the leading index is empty.
        """
        kept = {name for name, x in arrays.items() if axis is not None and x.ndim > 1 and x.shape[axis] > 1}
        return lambda name, index: (index,) if name in kept else ()
