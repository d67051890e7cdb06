"""The decoding kernel for NVIDIA GPUs: the new token of each row attends to a ring of keys, and is written to the ring.

The grid is ``(spans, h g, b)``. A program has one query head and a span of the ring, `SHORTEST` to `LONGEST` keys,
which its loop visits in blocks of at most `COLS` keys by an online softmax. The program of the first span adds the
token's own key and writes it to the ring in place. No program reads that slot from the ring, so none reads what another
one writes. Where there are several spans, plain JAX merges their results. A gradient is left to plain JAX.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flax_local_attention.kernels.constants import FLOAT32, LEAST
from flax_local_attention.kernels.pallas_triton import (
    MOST_PROGRAMS,
    Launch,
    Tile,
    load_part,
    load_row,
    load_rows,
    store_row,
    store_where,
    tanh_of,
)
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import SoftCap, inverse_of

# The fewest and the most keys of a span, and the most that a program takes at a time.
SHORTEST, LONGEST, COLS = 64, 512, 128

# Number of programs that keep an H100 busy; with fewer, shorter spans are faster.
PROGRAMS = 1024


class RingArrays(NamedTuple):
    """The arrays of decoding one token, with leading axes ``[b, h, g]``, of size 1 where shared; None if not given.

    Attributes:
        q: Queries, ``[1, d]``.
        k: Keys of the new tokens, ``[1, d]``, not yet rotated.
        v: Values of the new tokens, ``[1, d]``.
        ring_k: Keys of earlier tokens, ``[size, d]``.
        ring_v: Values of earlier tokens, ``[size, d]``.
        slot: Slot of the new key, ``[1]`` int32; `size` if it is not to be written.
        laps: For each slot, ``[size]`` int32: 0 if its key is hidden; else 1 if the key was written in the query's own
            lap round the ring, 2 if in the lap before. The new key's own slot is 0.
        q_tables: Rotations of the query for keys of both laps, ``[2, 2, d / 2]``; None without rotary.
        k_table: Rotation of the new key, ``[2, d / 2]``; None without rotary.
        sink: Extra logit, ``[1]``.
    """

    q: Any
    k: Any
    v: Any
    ring_k: Any
    ring_v: Any
    slot: Any
    laps: Any
    q_tables: Any = None
    k_table: Any = None
    sink: Any = None


def ring_problems(new: Operands, ring_k: Any, ring_v: Any, options: AttentionOptions) -> list[str]:
    """Return the reasons why the kernel cannot serve a call of these shapes, dtypes and options; empty if it can."""
    b, h, g, _, d = new.q.shape
    reasons = []
    if not 16 <= d <= 256 or d & (d - 1):
        reasons.append(f"heads must be a power of two wide, from 16 to 256, got {d}")
    if new.v.shape[-1] != d:
        reasons.append(f"values must be as wide as keys, got {new.v.shape[-1]} and {d}")
    if b > MOST_PROGRAMS or h * g > MOST_PROGRAMS:
        reasons.append(f"at most {MOST_PROGRAMS} rows and heads, got {b} and {h * g}")
    if any(x.dtype not in (jnp.bfloat16, jnp.float16, FLOAT32) for x in (*new[:3], ring_k, ring_v)):
        reasons.append("queries, keys and values must be of a dtype up to float32")
    if options.rotary is not None and (options.rotary.dim < d or options.rotary.interleaved):
        reasons.append("rotary must turn the whole head, in halves")
    if options.shared_qk:
        reasons.append("keys under `shared_qk` are not normalised")
    return reasons


def attend_ring(arrays: RingArrays, options: AttentionOptions, interpret: bool) -> Sequence[jax.Array]:
    """Attend to a ring and write the new key to it.

    Returns:
        The output, ``[b, h, g, 1, d]`` in q's dtype, and the keys and values of the ring, ``[b, h, 1, size, d]``. These
        are updated in place if the arguments are not used again.
    """
    b, h, g, _, d = arrays.q.shape
    size = arrays.ring_k.shape[-2]
    span = choose_span(b * h * g, size)
    spans = -(-size // span)
    tile = Tile(span, min(span, COLS))
    launch = Launch(tile, None, interpret)
    given = {name: x for name, x in arrays._asdict().items() if x is not None}
    results = {
        "out": jax.ShapeDtypeStruct((b, h, g, spans, d), arrays.q.dtype if spans == 1 else FLOAT32),
        "largest": jax.ShapeDtypeStruct((b, h, g, spans), FLOAT32),
        "total": jax.ShapeDtypeStruct((b, h, g, spans), FLOAT32),
        "grown_k": jax.ShapeDtypeStruct(arrays.ring_k.shape, arrays.ring_k.dtype),
        "grown_v": jax.ShapeDtypeStruct(arrays.ring_v.shape, arrays.ring_v.dtype),
    }
    out, largest, total, k, v = launch(
        "decode_ring",
        _Program(options, d, size, tile, interpret),
        given,
        results,
        spans,
        in_place={"ring_k": "grown_k", "ring_v": "grown_v"},
    )
    return (out if spans == 1 else _merge(out, largest, total).astype(arrays.q.dtype)), k, v


def choose_span(heads: int, size: int) -> int:
    """Choose the number of keys of a span.

    Args:
        heads: Query heads in all rows of the batch.
        size: Slots of a ring.
    """
    span = SHORTEST
    while span < LONGEST and heads * -(-size // span) > PROGRAMS:
        span *= 2
    return span


def _merge(out, largest, total):
    """Merge the outputs of spans, ``[..., spans, d]``, by their largest scores and totals, ``[..., spans]``."""
    weights = total * jnp.exp(largest - largest.max(-1, keepdims=True))
    shares = weights * inverse_of(weights.sum(-1, keepdims=True))
    return (shares[..., None] * out).sum(-2, keepdims=True)


class _Program:
    """The program of a span, see `Launch.__call__`."""

    def __init__(self, options, d, size, tile, interpret):
        self.half, self.size, self.tile = d // 2, size, tile
        self.scale = d**-0.5 if options.scale is None else options.scale
        self.cap = SoftCap.of(options, self.scale, lambda x: tanh_of(x, not interpret))

    def __call__(self, span, refs, out, largest, total, grown_k, grown_v):
        cols, begin = self.tile.cols, span * self.tile.rows
        near, far = (self._rotated(refs["q"], self._table(refs, "q_tables", (lap,))) for lap in range(2))

        def step(turn, state):
            first = begin + turn * cols
            is_there = first + lax.iota(jnp.int32, cols) < self.size
            laps = load_rows(refs["laps"], (), first, cols, is_there)
            v = load_rows(refs["ring_v"], (), first, cols, is_there)
            k = [load_part(refs["ring_k"], first, cols, at, self.half, is_there) for at in self._halves]
            products = jnp.where(laps == 1, _product(near, k), _product(far, k))
            is_seen = laps > 0
            scores = jnp.where(is_seen, self._score(products), -jnp.inf)
            # A hidden value may be NaN, which stays NaN with a weight of 0.
            return _add(state, scores, jnp.where(is_seen[:, None], v.astype(FLOAT32), 0))

        state = self._begin(span == 0, refs, near, grown_k, grown_v)
        turns = (jnp.minimum(self.tile.rows, self.size - begin) + cols - 1) // cols
        most, sum_of, gathered = lax.fori_loop(0, turns, step, state)
        largest[span], total[span] = most, sum_of
        store_row(out, (span,), gathered * inverse_of(sum_of))

    def _begin(self, is_first, refs, near, grown_k, grown_v):
        """Write the new key to its slot, and return the state of the softmax over this key and the sink.

        Only the program of the first span does so; the others write nothing and begin with no key.
        """
        k = self._rotated(refs["k"], self._table(refs, "k_table", ()))
        k = [x.astype(grown_k.dtype) for x in k]
        v = load_row(refs["v"], (0,), 2 * self.half).astype(grown_v.dtype)
        slot = refs["slot"][0]
        is_written = is_first & (slot < self.size)
        for at, x in zip(self._halves, k, strict=True):
            store_where(grown_k, (slot, pl.ds(jnp.int32(at), self.half)), x, is_written)
        store_where(grown_v, (slot, pl.ds(jnp.int32(0), 2 * self.half)), v, is_written)
        score = jnp.where(is_first, self._score(_product(near, [x.astype(FLOAT32) for x in k])), LEAST)
        sink = jnp.where(is_first, refs["sink"][0].astype(FLOAT32), -jnp.inf) if "sink" in refs else -jnp.inf
        most = jnp.maximum(score, sink)
        weight = jnp.where(is_first, jnp.exp(score - most), 0.0)
        return most, weight + jnp.exp(sink - most), weight * v.astype(FLOAT32)

    @property
    def _halves(self):
        """The first indices of the real and the imaginary numbers of a row, see `Rotary`."""
        return 0, self.half

    def _table(self, refs, name, lead):
        """Load the cosines and sines of a table, ``[d / 2]`` each; None without rotary."""
        return [load_row(refs[name], (*lead, at), self.half) for at in range(2)] if name in refs else None

    def _rotated(self, ref, table):
        """Load a row in halves, rotate it, and round it as the plain path does; float32."""
        real, imaginary = (ref[0, pl.ds(at, self.half)].astype(FLOAT32) for at in self._halves)
        if table is not None:
            cos, sin = table
            real, imaginary = real * cos - imaginary * sin, imaginary * cos + real * sin
        return [x.astype(ref.dtype).astype(FLOAT32) for x in (real, imaginary)]

    def _score(self, products):
        return products * self.scale if self.cap is None else self.cap.bound(products)


def _product(query, keys):
    """Multiply a query by keys, both in halves ``[..., d / 2]``, to ``[...]``, float32."""
    return sum(jnp.sum(x * y.astype(FLOAT32), axis=-1) for x, y in zip(query, keys, strict=True))


def _add(state, scores, v):
    """Add keys with these scores, ``[cols]``, and values, ``[cols, d]``, to the state of the softmax.

    The state is the largest score, the total, and the sum of weighted values, ``[d]``.
    """
    most, total, gathered = state
    grown = jnp.maximum(most, jnp.max(scores))
    weights, factor = jnp.exp(scores - grown), jnp.exp(most - grown)
    return grown, total * factor + jnp.sum(weights), gathered * factor + jnp.sum(weights[:, None] * v, axis=0)
