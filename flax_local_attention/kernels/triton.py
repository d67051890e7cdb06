"""Fused local attention on NVIDIA GPUs: forward, and gradients of q, of k and v, and of a bias.

A program has one block of rows, and goes through the blocks of columns that `visited_blocks` says: queries over keys
forward and for the gradient of q, keys over queries for those of k and v. Those that hold an edge of the window are
masked, under a branch; the others are not. Exponents are of 2.

Tiles that move through a loop are used as they are loaded. One that is reshaped or transposed first is copied to a
buffer that a product before may still be reading (Triton as of jax 0.11): the gradient was wrong on a device, and right
when interpreted.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from flax_local_attention.kernels.contract import Unsupported
from flax_local_attention.kernels.dispatch import Target, attend_by
from flax_local_attention.kernels.pallas_triton import (
    LOG2_E,
    MOST_PROGRAMS,
    Launch,
    Tile,
    exp2_of,
    is_available,
    load_rows,
    store_rows,
    tanh_of,
)
from flax_local_attention.kernels.plan import visited_blocks
from flax_local_attention.operands import Operands, largest_harmless, over_heads
from flax_local_attention.options import AttentionOptions
from flax_local_attention.rotary import rotate
from flax_local_attention.softmax import (
    SELF_SCORE,
    LogSum,
    hide_masked,
    keeps,
    lay_out_bias,
    prepare_keys,
    query_positions,
)
from flax_local_attention.window import Window

FLOAT32 = jnp.float32
LEAST = float(jnp.finfo(FLOAT32).min)
LN_2 = math.log(2)

# Values of `precision` by which float32 may be multiplied as TensorFloat-32, the only way that these kernels have.
TF32_WORDS = ("default", "fastest", "bfloat16", "tensorfloat32", "TF32_TF32_F32", "BF16_BF16_F32")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of the kernels: forward, gradient of q (and of a bias), gradients of k and v."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @property
    def most_queries(self) -> int:
        """Most queries of a block."""
        return max(self.forward.rows, self.dq.rows, self.dkv.cols)

    @property
    def most_keys(self) -> int:
        """Most keys of a block."""
        return max(self.forward.cols, self.dq.cols, self.dkv.rows)

    def within(self, queries: int, keys: int) -> "Tiles":
        """Tiles with no more queries and keys in a block."""
        of_queries = (
            tile._replace(rows=min(tile.rows, queries), cols=min(tile.cols, keys)) for tile in (self.forward, self.dq)
        )
        dkv = self.dkv._replace(rows=min(self.dkv.rows, keys), cols=min(self.dkv.cols, queries))
        forward, dq = of_queries
        return Tiles(forward, dq, dkv)


class TileRow(NamedTuple):
    """A row of the table of tiles.

    Attributes:
        head_size: Most that it is for.
        reach: Least number of keys, beside a query's own window, that it is for.
        is_busy: Whether it is for calls with more to compute than scores too: a mask, documents, a bias, a soft cap,
            dropout or shared queries. These need registers.
        tiles: To take.
    """

    head_size: int
    reach: int
    is_busy: bool
    tiles: Tiles


# The first row that is for a call is taken. Measured on an H100 at head sizes 64 and 128 (benchmarks/RESULTS.md); the
# others are the largest that spill no register. More warps, and loops of their own for the edges, were slower.
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
class Triton:
    """Local attention by fused kernels, for NVIDIA GPUs of compute capability 8.0 and up.

    Memory beside inputs and results: two float32 numbers a query and head, two more while a gradient is made, and
    copies of q and k where they are rotated, normalised, or of a head size that is no power of two. Results repeat
    bitwise. float32 is multiplied as TensorFloat-32. Logits may be as large as 2e6: beyond, float32 leaves them too
    coarse in base 2.

    Args:
        tiles: Sizes of the programs. None means those that were measured best.
        interpret: Run on any device, slowly: for tests of everything but the compiler.
        assembly: Whether exponentials are inline assembly; not where kernels are interpreted.

    Example:
        >>> q = k = v = jnp.ones((2, 64, 64))
        >>> local_attention(q, k, v, window_size=16, implementation=Triton(interpret=True)).shape
        (2, 64, 64)
    """

    tiles: Tiles | None = None
    interpret: bool = False
    assembly: bool = True

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`; derivatives beyond the gradient are the plain path's."""
        if reasons := self.problems(operands, options):
            raise Unsupported(
                f"Triton kernels cannot serve this call: {'; '.join(reasons)}; leave `implementation` None."
            )
        return attend_by(self, operands, options)

    def choose(self, operands: Operands, options: AttentionOptions, target: Target) -> "Triton":
        """Return itself, as every `Chooser`, unless the target cannot run it."""
        problem = None
        if target.partition == "unknown":
            problem = "arrays to be spread over a mesh in a way that is not known when they are compiled"
        elif not self.interpret and target.platform != "cuda":
            problem = target.platform
        elif not self.interpret and target.capability is not None and target.capability < (8, 0):
            problem = f"a GPU of {target.capability}"
        if problem is not None:
            raise Unsupported(
                "Triton kernels need an NVIDIA GPU of compute capability 8.0 or more, on one device, a mesh or inside "
                f"shard_map, got {problem}; leave `implementation` None, or use Triton(interpret=True) to try them."
            )
        return self

    def problems(self, operands: Operands, options: AttentionOptions) -> list[str]:
        """Return why these kernels cannot serve a call: nothing if they can. Shapes and options decide."""
        q, window = operands.q, options.window
        d = q.shape[-1]
        reasons = []
        if not is_available():
            reasons.append("this JAX has no Triton backend in Pallas")
        if options.rotary is not None and options.rotary.use_xpos:
            reasons.append("xPos is scaled in every block anew")
        if q.dtype not in (jnp.bfloat16, jnp.float16, FLOAT32) or {q.dtype} != {operands.k.dtype, operands.v.dtype}:
            reasons.append(f"q, k and v must be of one dtype up to float32, got {q.dtype}, {operands.k.dtype}")
        widest = (FLOAT32_TILES if q.dtype == FLOAT32 else TILES)[-1].head_size
        if d > widest:
            return [*reasons, f"heads of {q.dtype} must be at most {widest} wide, got {d}"]
        if operands.scale is not None or (options.scale is not None and options.scale <= 0):
            reasons.append("`scale` must be a positive number, no array")
        for name in ("mask", "q_mask", "q_segments", "k_segments"):
            x = getattr(operands, name)
            if x is not None and x.shape[2] > 1:
                reasons.append(f"`{name}` must be the same for query heads that share a head of keys")
        if operands.bias is not None and _bias_period(window, self.choose_tiles(operands, options)) is None:
            reasons.append(
                f"a bias needs `window_size` to be a multiple of 16 or a power of two, got {window.window_size}"
            )
        if max(q.shape[0], q.shape[1] * q.shape[2]) > MOST_PROGRAMS:
            reasons.append(f"at most {MOST_PROGRAMS} rows and as many heads, got {q.shape[:3]}")
        return reasons

    def allows_float32(self, options: AttentionOptions) -> bool:
        """Return whether a call in float32 may be multiplied as TensorFloat-32, by its `precision` or JAX's default."""
        precision = options.precision
        precision = jax.config.jax_default_matmul_precision if precision is None else precision  # pyright: ignore
        words = precision if isinstance(precision, tuple) else (precision,)
        return all(word in TF32_WORDS for word in words)

    def choose_tiles(self, operands: Operands, options: AttentionOptions) -> Tiles:
        """Return the tiles of a call that these kernels can serve; operands may be shapes."""
        if self.tiles is not None:
            return self.tiles
        d, window = _padded(operands.q.shape[-1]), options.window
        is_dropping = options.dropout_rate and operands.dropout_seed is not None
        given = (operands.mask, operands.q_segments, operands.bias, options.logits_soft_cap)
        is_busy = any(x is not None for x in given) or options.shared_qk or bool(is_dropping)
        table = FLOAT32_TILES if operands.q.dtype == FLOAT32 else TILES
        reach = window.backward + window.forward
        fits = (row for row in table if d <= row.head_size and reach >= row.reach and row.is_busy >= is_busy)
        return next(fits).tiles

    # What `dispatch` calls, in a lowering rule.

    def forward(self, operands: Operands, options: AttentionOptions, partitioned: bool) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`."""
        d = operands.q.shape[-1]
        q, k, v = prepare(operands.q, operands.k, operands.v, operands, options)
        call = _Call.create(self, operands, options, partitioned)
        out, largest, total = call.forward({"q": q, "k": k, "v": v} | call.arrays(operands))
        return out[..., :d], LogSum(largest, total)

    def backward(
        self,
        operands: Operands,
        options: AttentionOptions,
        partitioned: bool,
        out: jax.Array,
        log_sum: LogSum,
        d_out: jax.Array,
        d_total: jax.Array | None,
        wanted: tuple[str, ...],
    ) -> dict[str, jax.Array]:
        """Return the gradients of the operands that are wanted, from those of the result and of the sum's total."""
        (q, k, v), pull_back = jax.vjp(
            lambda q, k, v: prepare(q, k, v, operands, options), operands.q, operands.k, operands.v
        )
        call = _Call.create(self, operands, options, partitioned)
        arrays = {"q": q, "k": k, "v": v, "do": _pad_heads(d_out.astype(q.dtype)), "largest": log_sum.largest}
        arrays |= call.arrays(operands) | {"total": log_sum.total, "o": _pad_heads(out)}
        if d_total is not None:
            arrays["shift"] = log_sum.total * d_total
        dq, sums = call.dq(arrays)
        arrays |= sums
        gradients = {}
        if set(wanted) & {"q", "k", "v"}:
            gradients = dict(zip("qkv", pull_back((dq, *call.dkv(arrays))), strict=True))
        if "bias" in wanted and operands.bias is not None:
            gradients["bias"] = call.dbias(arrays, operands.bias, operands)
        if "sink" in wanted and operands.sink is not None:
            p = jnp.exp(operands.sink[..., None].astype(FLOAT32) - log_sum.largest) * _inverse(log_sum.total)
            gradients["sink"] = _sum_shared(-(p * sums["delta"]).sum(-1), operands.sink)
        return {name: gradients[name] for name in wanted}


def prepare(
    q: jax.Array, k: jax.Array, v: jax.Array, operands: Operands, options: AttentionOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turn, normalise and pad queries and keys as the kernels want them, in one pass over each."""
    rotary, window = options.rotary, options.window
    if rotary is not None or options.shared_qk:
        # Kernels leave out what masked tokens hold by themselves, but what is computed of it here may be no number.
        q, k, *_ = hide_masked(operands._replace(q=q, k=k))
    q_table = k_table = None
    if rotary is not None:
        i, j = operands.q_offset + jnp.arange(q.shape[-2]), jnp.arange(k.shape[-2])
        q_table = rotary.query_table(query_positions(i, window, rotary), FLOAT32)
        k_table = rotary.key_table(j, FLOAT32)
        q = rotate(q, q_table)
    return _pad_heads(q), _pad_heads(prepare_keys(k, options, k_table)), _pad_heads(v)


def _pad_heads(x):
    """Widen heads with zeros to a power of two, 16 at least: they change no product."""
    d = x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, _padded(d) - d)])


def _padded(d):
    return max(16, 1 << (d - 1).bit_length())


def _sum_shared(x, like):
    """Sum a gradient over the leading axes that an operand shares."""
    axes = tuple(axis for axis in range(3) if like.shape[axis] == 1 < x.shape[axis])
    return x.sum(axes, keepdims=True).astype(like.dtype)


def _bias_period(window: Window, tiles: Tiles) -> int | None:
    """Queries after which the layout of a bias repeats, so that blocks divide it; None if there is no such layout."""
    w, rows = window.window_size, tiles.most_queries
    if w % rows == 0 or rows % w == 0:
        return max(w, rows)
    return w if w % 16 == 0 else None


@dataclasses.dataclass(frozen=True)
class _Call:
    """All that is static in a call of the kernels."""

    window: Window
    scale: float
    cap: float | None
    shared_qk: bool
    dropout_rate: float
    q_offset: int | None
    n: int
    n_keys: int
    group: int
    tiles: Tiles
    bias_period: int
    bias_before: int
    interpret: bool
    assembly: bool
    partitioned: bool

    @classmethod
    def create(cls, kernels: Triton, operands: Operands, options: AttentionOptions, partitioned: bool) -> "_Call":
        q, window = operands.q, options.window
        d, offset = q.shape[-1], operands.q_offset
        tiles = kernels.choose_tiles(operands, options)
        period = before = 0
        if operands.bias is not None:
            period = _bias_period(window, tiles) or 0
            tiles = tiles.within(math.gcd(period, tiles.most_queries), math.gcd(period, tiles.most_keys))
            wide = tiles.most_keys
            before = -(-(window.backward + window.window_size + wide) // wide) * wide
        return cls(
            window=window,
            scale=d**-0.5 if options.scale is None else options.scale,
            cap=options.logits_soft_cap,
            shared_qk=options.shared_qk,
            dropout_rate=options.dropout_rate if operands.dropout_seed is not None else 0.0,
            q_offset=offset if isinstance(offset, int) else None,
            n=q.shape[-2],
            n_keys=operands.k.shape[-2],
            group=q.shape[2],
            tiles=tiles,
            bias_period=period,
            bias_before=before,
            interpret=kernels.interpret,
            assembly=kernels.assembly and not kernels.interpret,
            partitioned=partitioned,
        )

    def arrays(self, operands: Operands) -> dict[str, jax.Array]:
        """Return what the kernels need beside q, k and v, by the names that programs call it."""
        as_bytes = {"mask": operands.mask, "q_mask": operands.q_mask}
        arrays = {name: x.astype(jnp.int8) for name, x in as_bytes.items() if x is not None}
        if operands.q_segments is not None and operands.k_segments is not None:
            arrays |= {"q_segments": operands.q_segments, "k_segments": operands.k_segments}
        if operands.sink is not None:
            arrays["sink"] = operands.sink[..., None].astype(FLOAT32)
        if self.dropout_rate and operands.dropout_seed is not None:
            arrays["seed"] = operands.dropout_seed[..., None]
        if self.q_offset is None:
            arrays["q_offset"] = jnp.asarray(operands.q_offset, jnp.int32).reshape(1)
        if operands.bias is not None:
            arrays["bias"] = self.lay_out_bias(operands.bias, operands.q_offset)
        return arrays

    def lay_out_bias(self, bias, q_offset):
        """Lay a slab's bias ``[w, s]`` out so that the part of two blocks is one slice, ``[period, columns]``."""
        # Half of float32's range: scaled to base 2, its least number would be -inf, which hides a key.
        if bias.dtype == FLOAT32:
            bias = jnp.where(jnp.isneginf(bias), bias, jnp.clip(bias, LEAST / 2, -LEAST / 2))
        window, keys = self.window, self.tiles.most_keys
        i, first_key = q_offset + jnp.arange(self.bias_period), self.bias_first_key(q_offset)
        columns = self.bias_before + 2 * keys + self.bias_period + window.window_size + window.forward
        return over_heads(lambda slab: lay_out_bias(window, slab, i, first_key, -(-columns // keys) * keys), bias)

    def bias_first_key(self, q_offset):
        """Position of the key of the layout's first column, beside a first query at `q_offset`: a multiple of a block.

        Where the layout repeats, so do columns and keys, by as many.
        """
        return q_offset // self.tiles.most_keys * self.tiles.most_keys - self.bias_before

    # Launches

    def forward(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the result, and its sums' largest logits and totals."""
        q, tile = arrays["q"], self.tiles.forward

        def program(block, refs, out, largest, total):
            _attend_program(self, tile, block, refs, out, largest, total)

        sums = jax.ShapeDtypeStruct(q.shape[:-1], FLOAT32)
        results = [jax.ShapeDtypeStruct(q.shape, q.dtype), sums, sums]
        return self._launch("local_attention", program, arrays, results, tile, -(-self.n // tile.rows))

    def dq(self, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the gradient of q, and of each query what `dkv` needs: its name is that of the array there."""
        q, tile = arrays["q"], self.tiles.dq

        def program(block, refs, dq, *sums):
            _dq_program(self, tile, block, refs, dq, *sums)

        sums = jax.ShapeDtypeStruct(q.shape[:-1], FLOAT32)
        results = [jax.ShapeDtypeStruct(q.shape, q.dtype), sums, sums]
        arrays = _without(arrays, "q_mask", "sink")
        dq, *sums = self._launch("local_attention_dq", program, arrays, results, tile, -(-self.n // tile.rows))
        return dq, dict(zip(("delta", "log_sum"), sums, strict=True))

    def dkv(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the gradients of k and v, summed over the query heads that share them."""
        k, tile = arrays["k"], self.tiles.dkv

        def program(block, refs, dk, dv):
            _dkv_program(self, tile, block, refs, dk, dv, self._places(arrays, 2))

        results = [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2
        arrays = _without(arrays, "q_mask", "sink", "o", "largest", "total", "shift")
        return self._launch("local_attention_dkv", program, arrays, results, tile, -(-self.n_keys // tile.rows), keep=2)

    def dbias(self, arrays: Mapping[str, jax.Array], bias: jax.Array, operands: Operands) -> jax.Array:
        """Return the gradient of the bias as it was given, ``[b, h, g, w, s]``."""
        laid_out, tile = arrays["bias"], self.tiles.dq
        keep = 0 if laid_out.shape[0] == 1 and not self.partitioned else None

        def program(block, refs, d_bias):
            _dbias_program(self, tile, block, refs, d_bias, self._places(arrays, keep))

        b, h, g = operands.q.shape[:3]
        rows, columns = laid_out.shape[-2:]
        results = [jax.ShapeDtypeStruct((1 if keep == 0 else b, h, g, rows, columns), FLOAT32)]
        arrays = _without(arrays, "q_mask", "sink", "o", "shift")
        blocks = (rows // tile.rows) * (columns // tile.cols)
        (d_bias,) = self._launch("local_attention_dbias", program, arrays, results, tile, blocks, keep=keep)
        slabs = over_heads(lambda x: self._gather_bias(x, operands.q_offset), d_bias)
        return _sum_shared(slabs, bias).astype(bias.dtype)

    def _gather_bias(self, laid_out, q_offset):
        """Sum ``[period, columns]`` to ``[w, s]``: the transpose of `lay_out_bias`, always in the same order."""
        window = self.window
        slots = window.slot(q_offset + jnp.arange(self.bias_period), self.bias_first_key(q_offset))
        rows = jax.vmap(lambda row, slot: lax.dynamic_slice_in_dim(row, -slot, window.slab))(laid_out, slots)
        by_place = jnp.roll(rows, window.place(q_offset), axis=0)
        return by_place.reshape(-1, window.window_size, window.slab).sum(0)

    def _launch(self, name, program, arrays, results, tile, blocks, keep=None):
        return Launch(tile, keep, self.interpret, self.partitioned)(name, program, arrays, results, blocks)

    def _places(self, arrays, axis):
        """Make the function from a name and a place on a kept axis to the place in a reference of that name."""
        kept = {name for name, x in arrays.items() if axis is not None and x.ndim > 1 and x.shape[axis] > 1}
        return lambda name, place: (place,) if name in kept else ()


def _without(arrays, *names):
    return {name: x for name, x in arrays.items() if name not in names}


# Programs


def _no_lead(name):
    return ()


class _Rows:
    """Rows of a program or of one step of its loop: where they are, and how to read and write them.

    Attributes:
        first, size: Rows ``[first, first + size)`` of the arrays; those beyond the n that there are read as zeros.
        positions: Of these rows, ``[size]``.
    """

    def __init__(self, first: jax.Array, size: int, n: int, origin: Any = 0, is_ragged: bool | None = None):
        self.first, self.size, self.n = first, size, n
        rows = first + lax.iota(jnp.int32, size)
        self.positions = origin + rows
        self.begin = origin + first
        is_ragged = n % size != 0 if is_ragged is None else is_ragged
        self.exist = (rows >= 0) & (rows < n) if is_ragged else None
        last = first + (size - 1)
        self.end = origin + (jnp.minimum(last, n - 1) if is_ragged else last)

    def read(self, refs, name, lead: tuple = (), where=None):
        """Read rows; zeros for those where `where` is false."""
        there = self.exist if where is None else where if self.exist is None else where & self.exist
        return load_rows(refs[name], lead, self.first, self.size, there)

    def read_given(self, refs, name, lead: tuple = ()):
        """Read rows of an array that may not be given."""
        return self.read(refs, name, lead) if name in refs else None

    def write(self, ref, x):
        """Write rows."""
        store_rows(ref, self.first, x, self.exist)


def _dot(call, a, b, contracted):
    # TensorFloat-32 for float32, whatever the default of JAX: full precision would not run on tensor cores.
    precision = lax.Precision.HIGHEST if call.interpret else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=FLOAT32)


def _dot_transposed(call, a, b):
    return _dot(call, a, b, ((1,), (1,)))


def _dot_plain(call, a, b):
    return _dot(call, a, b, ((1,), (0,)))


def _origin(call, refs):
    return refs["q_offset"][0] if call.q_offset is None else call.q_offset


class _Scores:
    """Scores of a block of queries and one of keys, on their way to logits and probabilities.

    Attributes:
        logits: -inf where a key is not seen; ``2 ** (factor logits)`` is what the softmax sums.
    """

    def __init__(self, call: _Call, refs, raw, q: _Rows, k: _Rows, is_edge, *, keys_first=False, lead=_no_lead, **read):
        self.call, self.raw = call, raw
        as_q, as_k = (_as_columns, _as_rows) if keys_first else (_as_rows, _as_columns)
        self.i, self.j = as_q(q.positions), as_k(k.positions)
        self.as_q = as_q
        logits, self.factor = raw, call.scale * LOG2_E
        if call.cap is not None:
            logits, self.factor = call.cap * self._tanh(), LOG2_E
        if "bias" in refs:
            bias = self._bias(refs["bias"], q, k, lead("bias"))
            logits = logits * self.factor + (bias.T if keys_first else bias) * LOG2_E
            self.factor = 1.0
        if isinstance(is_edge, bool):
            logits = self._cut(logits, k) if is_edge else logits
        else:
            logits = lax.cond(is_edge, lambda x: self._cut(x, k), lambda x: x, logits)
        if read.get("mask") is not None:
            logits = jnp.where(as_k(read["mask"]), logits, -jnp.inf)
        if read.get("q_segments") is not None:
            logits = jnp.where(as_q(read["q_segments"]) == as_k(read["k_segments"]), logits, -jnp.inf)
        if call.shared_qk:
            # In base 2, where the largest logit is the score itself: times a factor it would be off by a rounding,
            # which at this size is 0.3 % of a probability.
            logits, self.factor = logits * self.factor, 1.0
            logits = jnp.where((self.i == self.j) & (logits > -jnp.inf), SELF_SCORE * LOG2_E, logits)
        self.logits = logits
        self.keep = None
        if call.dropout_rate:
            self.keep = keeps(refs["seed"][(*lead("seed"), 0)], self.i, self.j, call.dropout_rate)

    def _tanh(self):
        cap = self.call.cap
        assert cap is not None
        return tanh_of(self.raw * (self.call.scale / cap), self.call.assembly)

    def _bias(self, ref, q, k, lead):
        """The part of a bias that belongs to these queries and keys, ``[q, k]``."""
        row = lax.rem(q.first, self.call.bias_period)
        column = k.first - (q.first - row) - self.call.bias_first_key(q.begin - q.first)
        return ref[(*lead, pl.ds(row, q.size), pl.ds(column, k.size))].astype(FLOAT32)

    def _cut(self, logits, k):
        window = self.call.window
        seen = window.sees(self.i, self.j)
        if k.exist is not None:
            seen &= (self.j >= 0) & (self.j < k.n)
        return jnp.where(seen, logits, -jnp.inf)

    def exponentials(self, largest):
        """Return ``2 ** (factor logits - largest)``, for a `largest` a query."""
        return exp2_of(self.logits, self.factor, largest, self.call.assembly)

    def drop(self, x):
        """Drop what probabilities weigh, and scale up the rest."""
        return x if self.keep is None else jnp.where(self.keep, x * (1 / (1 - self.call.dropout_rate)), 0.0)

    def gradient(self, weights, dp, delta):
        """Return the gradient of the scores before their scale, see `gradient_of_logits`."""
        ds = self.gradient_of_logits(weights, dp, delta)
        if self.call.cap is not None:
            tanh = self._tanh()
            ds *= 1 - tanh * tanh
        return ds

    def gradient_of_logits(self, weights, dp, delta):
        """Return ``weights (dp - delta)``: of probabilities, or of exponentials if the others are over the total."""
        ds = weights * (self.drop(dp) - delta)
        return jnp.where(self.i == self.j, 0.0, ds) if self.call.shared_qk else ds


def _as_rows(x):
    return x[:, None]


def _as_columns(x):
    return x[None, :]


def _is_seen(mask):
    return None if mask is None else mask != 0


def _visit(visited, step, carry):
    """Run ``step(block, is_edge, carry)`` over visited blocks."""
    return lax.fori_loop(
        visited.start, visited.stop, lambda block, carry: step(block, visited.has_edge(block), carry), carry
    )


def _attend_program(call, tile, block, refs, out, largest_ref, total_ref):
    q = _Rows(block * tile.rows, tile.rows, call.n, _origin(call, refs))
    queries = q.read(refs, "q")
    q_segments = q.read_given(refs, "q_segments")
    is_answered = None
    if "q_mask" in refs:
        # As `silence` does: a masked token's query that is not finite, or so large that products may not be.
        size = jnp.max(jnp.abs(queries.astype(FLOAT32)), 1)
        is_answered = (size <= largest_harmless(queries.dtype)) | (q.read(refs, "q_mask") != 0)
        queries = jnp.where(_as_rows(is_answered), queries, jnp.zeros((), queries.dtype))

    def step(block, is_edge, carry):
        gathered, m, total = carry
        k = _Rows(block * tile.cols, tile.cols, call.n_keys)
        mask = _is_seen(k.read_given(refs, "mask"))
        keys, values = k.read(refs, "k", where=mask), k.read(refs, "v", where=mask)
        scores = _Scores(
            call,
            refs,
            _dot_transposed(call, queries, keys),
            q,
            k,
            is_edge,
            mask=mask,
            q_segments=q_segments,
            k_segments=k.read_given(refs, "k_segments"),
        )
        grown = jnp.maximum(m, jnp.max(scores.logits, 1) * scores.factor)
        fade = jnp.exp2(m - grown)
        p = scores.exponentials(_as_rows(grown))
        total = total * fade + jnp.sum(p, 1)
        return gathered * _as_rows(fade) + _dot_plain(call, scores.drop(p).astype(values.dtype), values), grown, total

    m, total = jnp.full((tile.rows,), LEAST, FLOAT32), jnp.zeros((tile.rows,), FLOAT32)
    if "sink" in refs:
        sink = refs["sink"][0] * LOG2_E
        m = jnp.maximum(m, sink)
        total = jnp.exp2(sink - m)
    visited = visited_blocks(call.window, q.begin, q.end, tile.cols, call.n_keys)
    gathered, m, total = _visit(visited, step, (jnp.zeros(queries.shape, FLOAT32), m, total))
    if is_answered is not None:
        total = jnp.where(is_answered, total, 0.0)  # no gradient either
    # The sum is counted from the largest logit as it is stored, so that what a gradient makes of it adds up to 1.
    stored = m * LN_2
    q.write(out, gathered * _as_rows(1 / jnp.where(total == 0, 1.0, total)))
    q.write(largest_ref, jnp.where(total == 0, LEAST, stored))
    q.write(total_ref, total * exp2_of(m, 1.0, _to_base_2(stored), call.assembly))


def _to_base_2(largest):
    return jnp.maximum(largest * LOG2_E, LEAST)


def _inverse(total):
    return jnp.where(total == 0, 0.0, 1 / jnp.where(total == 0, 1.0, total))


def _dq_program(call, tile, block, refs, dq, delta, log_sum):
    q = _Rows(block * tile.rows, tile.rows, call.n, _origin(call, refs))
    total = q.read(refs, "total")
    inverse = _inverse(total)
    queries = q.read(refs, "q", where=total > 0 if "mask" in refs else None)
    do, less = q.read(refs, "do"), _to_base_2(q.read(refs, "largest"))
    q_segments = q.read_given(refs, "q_segments")
    sums = jnp.sum(q.read(refs, "o").astype(FLOAT32) * do.astype(FLOAT32), 1)
    if "shift" in refs:
        sums -= q.read(refs, "shift")
    q.write(delta, sums)
    # Of a query that sees no key so large that its probabilities are 0.
    q.write(log_sum, jnp.where(total == 0, -LEAST, less + jnp.log2(jnp.where(total == 0, 1.0, total))))

    def step(block, is_edge, gathered):
        k = _Rows(block * tile.cols, tile.cols, call.n_keys)
        mask = _is_seen(k.read_given(refs, "mask"))
        keys, values = k.read(refs, "k", where=mask), k.read(refs, "v", where=mask)
        scores = _Scores(
            call,
            refs,
            _dot_transposed(call, queries, keys),
            q,
            k,
            is_edge,
            mask=mask,
            q_segments=q_segments,
            k_segments=k.read_given(refs, "k_segments"),
        )
        # Over the total by one multiplication and addition.
        dp = _dot_transposed(call, do, values) * _as_rows(inverse)
        ds = scores.gradient(scores.exponentials(_as_rows(less)), dp, _as_rows(sums * inverse))
        return gathered + _dot_plain(call, ds.astype(keys.dtype), keys)

    visited = visited_blocks(call.window, q.begin, q.end, tile.cols, call.n_keys)
    q.write(dq, _visit(visited, step, jnp.zeros(queries.shape, FLOAT32)) * call.scale)


def _dkv_program(call, tile, block, refs, dk, dv, places):
    """Keys come first in all products, so that no tile is transposed."""
    k = _Rows(block * tile.rows, tile.rows, call.n_keys)
    mask = _is_seen(k.read_given(refs, "mask"))
    keys, values = k.read(refs, "k", where=mask), k.read(refs, "v", where=mask)
    k_segments = k.read_given(refs, "k_segments")
    origin = _origin(call, refs)
    visited = visited_blocks(call.window.transposed, k.begin, k.end, tile.cols, call.n, origin)
    count = visited.stop - visited.start

    def step(turn, carry):
        dk, dv = carry
        head, block = 0, turn
        if call.group > 1:
            head, block = lax.div(turn, count), visited.start + lax.rem(turn, count)

        def lead(name):
            return places(name, head)

        q = _Rows(block * tile.cols, tile.cols, call.n, origin)
        log_sum = q.read(refs, "log_sum", lead("log_sum"))
        queries = q.read(refs, "q", lead("q"), where=None if mask is None else log_sum < -LEAST)
        do, delta = q.read(refs, "do", lead("do")), q.read(refs, "delta", lead("delta"))
        scores = _Scores(
            call,
            refs,
            _dot_transposed(call, keys, queries),
            q,
            k,
            visited.has_edge(block),
            keys_first=True,
            lead=lead,
            mask=mask,
            q_segments=q.read_given(refs, "q_segments"),
            k_segments=k_segments,
        )
        # By one number: largest logit and total apart took 7 % more of the kernel's time. Probabilities are then off by
        # a rounding of it, as by one of their logits: 0.3 % at 50,000.
        p = scores.exponentials(_as_columns(log_sum))
        ds = scores.gradient(p, _dot_transposed(call, values, do), _as_columns(delta))
        p = scores.drop(p).astype(do.dtype)
        return dk + _dot_plain(call, ds.astype(queries.dtype), queries), dv + _dot_plain(call, p, do)

    # One loop over the heads of a group and their blocks: a loop in a loop would empty the pipeline for each head.
    first, last = (jnp.zeros_like(count), count * call.group) if call.group > 1 else (visited.start, visited.stop)
    nothing = jnp.zeros(keys.shape, FLOAT32)
    key_gradient, value_gradient = lax.fori_loop(first, last, step, (nothing, nothing))
    k.write(dk, key_gradient * call.scale)
    k.write(dv, value_gradient)


def _dbias_program(call, tile, block, refs, d_bias, places):
    """One part of a head's layout, over the periods of the sequence and, where the bias is shared by them, the rows."""
    window, period = call.window, call.bias_period
    columns = d_bias.shape[-1] // tile.cols
    row, column = lax.div(block, columns) * tile.rows, lax.rem(block, columns) * tile.cols
    origin = _origin(call, refs)
    batch = refs["q"].shape[0] if places("q", 0) else 1
    # What of the layout lies in the window is the same in all periods.
    key = call.bias_first_key(origin) + column
    seen = (key < window.stop(origin + row + tile.rows - 1)) & (key + tile.cols > window.start(origin + row))

    def step(turn, gathered):
        place = lax.rem(turn, batch)

        def lead(name):
            return places(name, place)

        first = lax.div(turn, batch) * period
        q = _Rows(first + row, tile.rows, call.n, origin, is_ragged=True)
        k = _Rows(first + key, tile.cols, call.n_keys, is_ragged=True)
        mask = k.read(refs, "mask", lead("mask")) != 0 if "mask" in refs else None
        keys, values = (k.read(refs, name, lead(name), where=mask) for name in "kv")
        total = q.read(refs, "total", lead("total"))
        queries = q.read(refs, "q", lead("q"), where=None if mask is None else total > 0)
        do, delta = q.read(refs, "do", lead("do")), q.read(refs, "delta", lead("delta"))
        inverse, less = _inverse(total), _to_base_2(q.read(refs, "largest", lead("largest")))
        segments = [x.read_given(refs, name, lead(name)) for x, name in ((q, "q_segments"), (k, "k_segments"))]
        scores = _Scores(
            call,
            refs,
            _dot_transposed(call, queries, keys),
            q,
            k,
            True,
            lead=lead,
            mask=mask,
            q_segments=segments[0],
            k_segments=segments[1],
        )
        dp = _dot_transposed(call, do, values) * _as_rows(inverse)
        e = scores.exponentials(_as_rows(less))
        return gathered + scores.gradient_of_logits(e, dp, _as_rows(delta * inverse))

    turns = jnp.where(seen, np.int32(-(-call.n // period) * batch), np.int32(0))
    part = pl.ds(row, tile.rows), pl.ds(column, tile.cols)
    d_bias[part] = lax.fori_loop(np.int32(0), turns, step, jnp.zeros((tile.rows, tile.cols), FLOAT32))
