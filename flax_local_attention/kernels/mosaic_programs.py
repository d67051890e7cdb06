"""Programs of the Mosaic GPU kernels: what one warpgroup computes for its rows of a tile.

The formulas are those of `triton_programs`: O, largest and total in the forward kernel; dQ, delta and log-sum-exp in
the dQ kernel; dK and dV from these in the last one. A warpgroup's rows lie in shared memory, its sums in registers. The
loop runs ``work.steps`` times, once for each block of columns, which is read from a ring in shared memory, see
`pallas_mosaic`. Both backward programs recompute the scores, and P from the log-sum-exp. Products (WGMMA) are
asynchronous: the program waits for one only where it needs its result, or the memory that the product reads.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from flax_local_attention.kernels.constants import LEAST, LOG2_E
from flax_local_attention.kernels.family import log_sum_of, sink_in_base_2, to_stored
from flax_local_attention.kernels.pallas_mosaic import (
    LAYOUTS,
    Columns,
    Rows,
    Turns,
    Work,
    accumulate,
    add_product,
    finish_products,
    full,
    iota,
    multiply,
    multiply_transposed,
    over_cols,
    over_rows,
    read_accumulator,
)
from flax_local_attention.softmax import SoftCap, inverse_of


class _Scores:
    """Scores of a warpgroup's rows and the blocks of columns that it visits, ``[rows, cols]``.

    Rows are queries and columns keys, or the other way round. From the products ``Q K^T``, or ``K Q^T``, `see` makes
    scores; the softmax sums ``2 ** (factor seen)``. The factor is ``scale log2(e)``, or ``log2(e)`` after a soft cap.

    Args:
        call: Static part of the call, see `mosaic.Call`.
        tile: Size of a program.
        work: The program's tile.
        rows: Rows of this warpgroup.
        columns: Blocks of columns.
        keys_first: Whether rows are keys.
    """

    def __init__(self, call: Any, tile: Any, work: Work, rows: Rows, columns: Columns, keys_first: bool = False):
        options = call.options
        self._window = options.window.transposed if keys_first else options.window
        self._origin_of_rows, self._origin = (0, call.q_offset) if keys_first else (call.q_offset, 0)
        self._first, self._end = rows.first, np.int32(call.n if keys_first else call.n_keys)
        self._work, self._columns, self.shape = work, columns, (tile.rows, tile.cols)
        self.cap = SoftCap.of(options, options.scale, _tanh)
        self.factor = (1.0 if self.cap else options.scale) * LOG2_E
        own, self._segments = ("k_segments", "q_segments") if keys_first else ("q_segments", "k_segments")
        self._own_segments = rows.read(own, LAYOUTS.rows) if own in rows.memory else None
        self._own_mask = rows.read("mask", LAYOUTS.rows) if "mask" in rows.memory else None

    def see(self, products: jax.Array, step: jax.Array) -> jax.Array:
        """Make the scores of a step's block from its products: bound them, and put -inf where a key is hidden."""
        seen = products if self.cap is None else self.cap.bound(products)
        block, _ = self._work.block(step)
        seen = lax.cond(self._work.visited.has_edge(block), lambda x: self._cut(x, block), lambda x: x, seen)
        if self._own_mask is not None:
            seen = jnp.where(over_rows(self._own_mask, self.shape) != 0, seen, -jnp.inf)
        if "mask" in self._columns:
            mask = self._columns.read("mask", step, LAYOUTS.cols)
            seen = jnp.where(over_cols(mask, self.shape) != 0, seen, -jnp.inf)
        if self._own_segments is not None:
            segments = self._columns.read(self._segments, step, LAYOUTS.cols)
            is_same = over_rows(self._own_segments, self.shape) == over_cols(segments, self.shape)
            seen = jnp.where(is_same, seen, -jnp.inf)
        return seen

    def _cut(self, scores, block):
        """Put -inf where a key is outside the window or the sequence, by comparing columns with two bounds a row."""
        rows = np.int32(self._origin_of_rows) + self._first + iota(self.shape[:1], 0, LAYOUTS.rows)
        columns = iota(self.shape, 1, LAYOUTS.both)
        first = block * np.int32(self.shape[1])
        start = jnp.maximum(self._window.start(rows), np.int32(self._origin)) - np.int32(self._origin) - first
        stop = jnp.minimum(self._window.stop(rows) - np.int32(self._origin), self._end) - first
        is_seen = (columns >= over_rows(start, self.shape)) & (columns < over_rows(stop, self.shape))
        return jnp.where(is_seen, scores, -jnp.inf)

    def exponentials(self, seen: jax.Array, largest: jax.Array) -> jax.Array:
        """Return ``2 ** (factor seen - largest)``; `largest` is ``[rows, cols]``, in base 2."""
        return jnp.exp2(seen * self.factor - largest)

    def gradient(self, products: jax.Array, p: jax.Array, dp: jax.Array, delta: jax.Array) -> jax.Array:
        """Return dS, ``P (dP - delta)``; with a soft cap, times its slope ``1 - tanh^2``."""
        ds = p * (dp - delta)
        return ds if self.cap is None else ds * self.cap.slope(products)


def _tanh(x):
    """Return tanh(x) by one exponential; the backend's approximation is off by 5e-4."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2_E)))


def attend_program(call: Any, work: Work, rows: Rows, columns: Columns, turns: Turns):
    """Attend from a tile of queries, by the online softmax of `triton_programs.attend_program`.

    While one warpgroup exponentiates, the other multiplies, see `Turns`.
    """
    tile, queries = call.tiles.forward, rows.memory["q"]
    scores = _Scores(call, tile, work, rows, columns)
    largest, total = (full((tile.rows,), x, LAYOUTS.rows) for x in (LEAST, 0.0))
    if "sink" in rows.numbers:
        sink = sink_in_base_2(rows.numbers["sink"]())
        largest = full((tile.rows,), jnp.maximum(sink, LEAST), LAYOUTS.rows)
        total = jnp.exp2(full((tile.rows,), sink, LAYOUTS.rows) - largest)
    pl.when(work.steps > 0)(lambda: columns.wait("k", np.int32(0)))

    def gather(step, carry):
        """Add a block of keys to the running output, which is rescaled to the new largest score first."""
        gathered, largest, total = carry

        def multiply_queries(products):
            multiply_transposed(products, queries, columns.block("k", step))
            turns.swap()
            return read_accumulator(products)

        seen = accumulate(multiply_queries, scores.shape)
        columns.release("k", step)
        seen = scores.see(seen, step)
        grown = jnp.maximum(largest, seen.max(axis=1) * scores.factor)
        fade = jnp.exp2(largest - grown)
        weights = scores.exponentials(seen, over_rows(grown, scores.shape))
        gathered *= over_rows(fade, gathered.shape)
        total = total * fade + weights.sum(axis=1)
        # The compiler must not move any of this beyond the end of the turn.
        gathered, total, grown, weights = lax.optimization_barrier((gathered, total, grown, weights.astype(call.dtype)))
        turns.end()
        columns.wait("v", step)
        turns.wait()

        def wait_for_keys():
            pl.when(step + 1 < work.steps)(lambda: columns.wait("k", step + 1))

        gathered = add_product(gathered, weights, columns.block("v", step), wait_for_keys, call.interpret)
        columns.release("v", step)
        return gathered, grown, total

    carry = full((tile.rows, call.width), 0.0, LAYOUTS.both), largest, total
    gathered, largest, total = lax.fori_loop(np.int32(0), work.steps, gather, carry)
    rows.finish()
    stored, factor = to_stored(largest)
    rows.write("o", gathered * over_rows(inverse_of(total), gathered.shape))
    rows.write("largest", jnp.where(total == 0, LEAST, stored))
    rows.write("total", total * factor)


def dq_program(call: Any, work: Work, rows: Rows, columns: Columns, turns: Turns):
    """Write the gradient of a tile of queries, and the delta and log-sum-exp that `dkv_program` reads."""
    del turns
    tile, queries, do = call.tiles.dq, rows.memory["q"], rows.memory["do"]
    scores = _Scores(call, tile, work, rows, columns)
    outputs, cotangents = (rows.read(name, LAYOUTS.both).astype(jnp.float32) for name in ("o", "do"))
    delta = (outputs * cotangents).sum(axis=1)
    if "shift" in rows.memory:
        delta -= rows.read("shift", LAYOUTS.rows)
    total, largest = (rows.read(name, LAYOUTS.rows) for name in ("total", "largest"))
    log_sum = log_sum_of(largest, total)

    def over_keys(gathered):
        def gather(step, nothing):
            """Add ``dS K`` of a block of keys."""

            def multiply_queries(products, dp):
                columns.wait("k", step)
                multiply_transposed(products, queries, columns.block("k", step))
                columns.wait("v", step)
                multiply_transposed(dp, do, columns.block("v", step))
                products = read_accumulator(products, pending=1)
                p = scores.exponentials(scores.see(products, step), over_rows(log_sum, scores.shape))
                dp = read_accumulator(dp)
                columns.release("v", step)
                return products, p, dp

            products, p, dp = accumulate(multiply_queries, scores.shape, scores.shape)
            ds = scores.gradient(products, p, dp, over_rows(delta, scores.shape))
            multiply(gathered, ds.astype(call.dtype), columns.block("k", step), rows.spare)
            finish_products()
            columns.release("k", step)
            return nothing

        lax.fori_loop(np.int32(0), work.steps, gather, None)
        return read_accumulator(gathered)

    gathered = accumulate(over_keys, (tile.rows, call.width))
    rows.finish()
    rows.write("dq", gathered * call.options.scale)
    rows.write("delta", delta)
    rows.write("log_sum", log_sum)


def dkv_program(call: Any, work: Work, rows: Rows, columns: Columns, turns: Turns):
    """Write the gradients of a tile of keys, summed over the query heads that share them.

    All products are ``[keys, queries]``, so that no tile is transposed.
    """
    del turns
    tile, keys, values = call.tiles.dkv, rows.memory["k"], rows.memory["v"]
    scores = _Scores(call, tile, work, rows, columns, keys_first=True)

    def over_queries(dk, dv):
        def gather(step, nothing):
            """Add a block of queries of one head to dK and dV."""
            queries, do = columns.block("q", step), columns.block("do", step)

            def multiply_keys(products, dp):
                columns.wait("q", step)
                multiply_transposed(products, keys, queries)
                columns.wait("do", step)
                multiply_transposed(dp, values, do)
                log_sum = columns.read("log_sum", step, LAYOUTS.cols)
                products = read_accumulator(products, pending=1)
                p = scores.exponentials(scores.see(products, step), over_cols(log_sum, scores.shape))
                delta = columns.read("delta", step, LAYOUTS.cols)
                return products, p, read_accumulator(dp), delta

            products, p, dp, delta = accumulate(multiply_keys, scores.shape, scores.shape)
            multiply(dv, p.astype(call.dtype), do, rows.spare)
            ds = scores.gradient(products, p, dp, over_cols(delta, scores.shape))
            if call.interpret:
                finish_products()  # the product above reads `rows.spare`, which the next one overwrites
            multiply(dk, ds.astype(call.dtype), queries, rows.spare)
            finish_products(pending=1)
            columns.release("do", step)
            finish_products()
            columns.release("q", step)
            return nothing

        lax.fori_loop(np.int32(0), work.steps, gather, None)
        return read_accumulator(dk), read_accumulator(dv)

    dk, dv = accumulate(over_queries, (tile.rows, call.width), (tile.rows, call.width))
    rows.finish()
    rows.write("dk", dk * call.options.scale)
    rows.write("dv", dv)
