"""Programs of the Triton kernels: what a program computes for its block of rows, forward and for each gradient.

With i a query, j a key that it sees, and inner products of vectors:

    S[i, j] = scale q[i] k[j] + bias[i, j]        O[i] = sum_j P[i, j] v[j]
    P[i, j] = exp(S[i, j] - largest[i]) / total[i]

    dP[i, j] = dO[i] v[j]                         dQ[i] = scale sum_j dS[i, j] k[j]
    delta[i] = O[i] dO[i]                         dK[j] = scale sum_i dS[i, j] q[i]
    dS[i, j] = P[i, j] (dP[i, j] - delta[i])      dV[j] = sum_i P[i, j] dO[i]

A program owns one block of rows of one head. Its rows, and its sums in float32, stay in registers. Its loop visits the
blocks of columns that `visited_blocks` finds: queries visit keys forward and for dQ, keys visit queries for dK and dV.
No two programs write the same entry. Blocks with an edge of the window are masked, under a branch; the others are not.
Beside the operands, only O, largest and total are kept for a gradient, so each backward kernel recomputes S and P.
Exponents are in base 2. `call` is the static part of a call, see `triton.Call`; `refs` are the arrays of one head.

Tiles that are loaded in a loop go to a product as they are loaded. Triton (as of JAX 0.11) copies a tile that is
reshaped or transposed first to a buffer that an earlier product may still be reading: the gradient was then wrong on a
GPU, and right when interpreted.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from flax_local_attention.kernels.constants import FLOAT32, LEAST, LOG2_E
from flax_local_attention.kernels.family import sink_in_base_2, to_base_2, to_stored
from flax_local_attention.kernels.pallas_triton import exp2_of, load_rows, store_rows, tanh_of
from flax_local_attention.kernels.plan import visited_blocks
from flax_local_attention.operands import largest_harmless
from flax_local_attention.softmax import SELF_SCORE, SoftCap, inverse_of, keeps


def _no_lead(name):
    return ()


class _Rows:
    """The rows of a program, or of one step of its loop: their positions, and how to load and store them.

    A ragged block reaches beyond the arrays, at the end or, for `dbias_program`, before the beginning. Its loads and
    stores are masked.

    Attributes:
        first: Index of the first row.
        size: Number of rows.
        n: Rows of the arrays; rows beyond them are read as zeros.
        positions: Positions of the rows, ``[size]``.
        begin: Position of the first row.
        end: Position of the last row that exists.
        exist: Which rows exist, ``[size]`` bool; None means all.
    """

    def __init__(self, first: jax.Array, size: int, n: int, origin: Any = 0, is_ragged: bool | None = None):
        """Describe a block of rows.

        Args:
            first: Index of its first row in the arrays.
            size: Rows in the block.
            n: Rows of the arrays.
            origin: Position of row 0: the offset of the queries, 0 for keys.
            is_ragged: Whether rows may lie outside the arrays. None means that blocks begin at multiples of `size`, so
                rows lie outside only if n is not a multiple.
        """
        self.first, self.size, self.n = first, size, n
        rows = first + lax.iota(jnp.int32, size)
        self.positions = origin + rows
        self.begin = origin + first
        is_ragged = n % size != 0 if is_ragged is None else is_ragged
        self.exist = (rows >= 0) & (rows < n) if is_ragged else None
        last = first + (size - 1)
        self.end = origin + (jnp.minimum(last, n - 1) if is_ragged else last)

    def read(self, refs, name, lead: tuple = (), where=None):
        """Load rows, with zeros where `where` is false."""
        there = self.exist if where is None else where if self.exist is None else where & self.exist
        return load_rows(refs[name], lead, self.first, self.size, there)

    def read_given(self, refs, name, lead: tuple = ()):
        """Load rows of an array, or return None if it is not given."""
        return self.read(refs, name, lead) if name in refs else None

    def write(self, ref, x):
        """Store the rows that exist in a result."""
        store_rows(ref, self.first, x, self.exist)


def _dot(call, a, b, contracted):
    """Multiply two tiles, contracting one axis of each, to float32.

    Operands in float32 are multiplied as TensorFloat-32 whatever JAX's default precision, because tensor cores have no
    full precision. An interpreted kernel multiplies them in full.
    """
    precision = lax.Precision.HIGHEST if call.interpret else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=FLOAT32)


def _dot_transposed(call, a, b):
    """Return ``a b^T``, ``[i, d]`` and ``[j, d]`` to ``[i, j]``."""
    return _dot(call, a, b, ((1,), (1,)))


def _dot_plain(call, a, b):
    """Return ``a b``, ``[i, j]`` and ``[j, d]`` to ``[i, d]``."""
    return _dot(call, a, b, ((1,), (0,)))


def _origin(call, refs):
    """Return the position of the first query: a known int, or a number loaded from memory."""
    return refs["q_offset"][0] if call.q_offset is None else call.q_offset


class _Scores:
    """The scores of a block of queries and a block of keys, with bias and masks, and what is computed from them.

    The softmax sums ``2 ** (factor seen)``, with ``factor seen = log2(e) S``. The factor is ``scale log2(e)`` where
    only masks are applied to the products ``Q K^T``, so that one fused instruction scales and subtracts. A soft cap, a
    bias or `shared_qk` needs true scores, which leaves a factor of ``log2(e)`` or 1. All arrays are ``[i, j]``, or
    ``[j, i]`` if keys come first.

    Attributes:
        products: Products of queries and keys.
        seen: Scores before they are multiplied by `factor`; -inf where a key is hidden.
        factor: Factor from `seen` to exponents of 2.
        keep: Which probabilities dropout keeps; None means all.
    """

    def __init__(
        self, call: Any, refs, products, q: _Rows, k: _Rows, is_edge, *, mask, q_segments, k_segments, keys_first, lead
    ):
        """Make scores from products: bound them, add the bias, cut the window, and mask.

        Args:
            call: Static part of the call, see `triton.Call`.
            refs: Arrays by name, of which the bias and the seed of dropout are read.
            products: ``Q K^T``, or ``K Q^T`` if keys come first; float32.
            q: Rows of the queries.
            k: Rows of the keys.
            is_edge: Whether the window hides a key of the block from some query: a bool, or traced.
            mask: Which keys may be seen, ``[k.size]`` bool, or None.
            q_segments: Segments of the queries, or None.
            k_segments: Segments of the keys, or None.
            keys_first: Whether arrays are ``[j, i]``.
            lead: Function from an array's name to the leading index of its reference, see `triton.Call._lead_of`.
        """
        options = call.options
        self.call, self.products = call, products
        self.cap = SoftCap.of(options, options.scale, functools.partial(tanh_of, assembly=call.assembly))
        as_q, as_k = (_as_columns, _as_rows) if keys_first else (_as_rows, _as_columns)
        self.i, self.j = as_q(q.positions), as_k(k.positions)
        seen, self.factor = products, options.scale * LOG2_E
        if self.cap is not None:
            seen, self.factor = self.cap.bound(products), LOG2_E
        if "bias" in refs:
            bias = self._bias(refs["bias"], q, k, lead("bias"))
            seen = seen * self.factor + (bias.T if keys_first else bias) * LOG2_E
            self.factor = 1.0
        if isinstance(is_edge, bool):
            seen = self._cut(seen, k) if is_edge else seen
        else:
            seen = lax.cond(is_edge, lambda x: self._cut(x, k), lambda x: x, seen)
        if mask is not None:
            seen = jnp.where(as_k(mask), seen, -jnp.inf)
        if q_segments is not None:
            seen = jnp.where(as_q(q_segments) == as_k(k_segments), seen, -jnp.inf)
        if options.shared_qk:
            # Put in base 2, because the largest score may be this one: multiplied by a factor later, it would be off by
            # a rounding, which at this size is 0.3 % of a probability.
            seen, self.factor = seen * self.factor, 1.0
            seen = jnp.where((self.i == self.j) & (seen > -jnp.inf), SELF_SCORE * LOG2_E, seen)
        self.seen = seen
        self.keep = None
        if options.dropout_rate:
            self.keep = keeps(refs["seed"][(*lead("seed"), np.int32(0))], self.i, self.j, options.dropout_rate)

    def _bias(self, ref, q, k, lead):
        """Load the part of a bias for these queries and keys, ``[i, j]``.

        The layout repeats after `bias_period` queries, and its columns move on by as many. The part for a block of
        queries and a block of keys that it visits is one slice, see `triton.Call.lay_out_bias`.
        """
        row = lax.rem(q.first, np.int32(self.call.bias_period))
        column = k.first - (q.first - row) - self.call.bias_first_key(q.begin - q.first)
        return ref[(*lead, pl.ds(row, q.size), pl.ds(column, k.size))].astype(FLOAT32)

    def _cut(self, scores, k):
        """Put -inf where a key is outside the window or the sequence."""
        is_inside = self.call.options.window.sees(self.i, self.j)
        if k.exist is not None:
            is_inside &= (self.j >= 0) & (self.j < k.n)
        return jnp.where(is_inside, scores, -jnp.inf)

    def exponentials(self, largest):
        """Return ``2 ** (factor seen - largest)``, with one `largest` a query, in base 2.

        For a running or final largest score these are the weights of the softmax; for a log-sum-exp they are P.
        """
        return exp2_of(self.seen, self.factor, largest, self.call.assembly)

    def drop(self, x):
        """Zero x where dropout drops a probability, and multiply the rest by ``1 / (1 - rate)``.

        The function is its own transpose: it is applied to P forward and to dP backward.
        """
        rate = self.call.options.dropout_rate
        return x if self.keep is None else jnp.where(self.keep, x * (1 / (1 - rate)), 0.0)

    def gradient(self, weights, dp, delta):
        """Return the gradient of the scores before the soft cap: `bounded_gradient`, times the cap's slope if any."""
        ds = self.bounded_gradient(weights, dp, delta)
        return ds if self.cap is None else ds * self.cap.slope(self.products)

    def bounded_gradient(self, weights, dp, delta):
        """Return the gradient of the bounded scores and of the bias, ``dS = weights (drop(dp) - delta)``.

        The weights are probabilities, or exponentials if `dp` and `delta` are divided by the total. Under `shared_qk` a
        token's score for itself is a constant, so its gradient is 0.
        """
        ds = weights * (self.drop(dp) - delta)
        return jnp.where(self.i == self.j, 0.0, ds) if self.call.options.shared_qk else ds


def _as_rows(x):
    """Reshape ``[i]`` to ``[i, 1]``: one number a row."""
    return x[:, None]


def _as_columns(x):
    """Reshape ``[j]`` to ``[1, j]``: one number a column."""
    return x[None, :]


def _is_seen(mask):
    """Convert a mask from bytes to bool; None stays None."""
    return None if mask is None else mask != 0


def _over_keys(call, tile, refs, q, queries, gather, carry):
    """Fold ``carry = gather(scores, keys, values, carry)`` over the blocks of keys that a block of queries visits.

    Args:
        call: Static part of the call, see `triton.Call`.
        tile: Queries of the program and keys of a step.
        refs: Arrays of one head by name.
        q: Rows of the queries.
        queries: The queries, ``[tile.rows, d]``, in registers.
        gather: Function of the block's `_Scores` ``[i, j]``, its keys and values ``[j, d]`` (zeros where masked or
            beyond the end), and the carry.
        carry: Initial carry of the loop.

    Returns:
        The last carry.
    """
    q_segments = q.read_given(refs, "q_segments")
    visited = visited_blocks(call.options.window, q.begin, q.end, tile.cols, call.n_keys)

    def step(block, carry):
        k = _Rows(block * tile.cols, tile.cols, call.n_keys)
        mask = _is_seen(k.read_given(refs, "mask"))
        keys, values = k.read(refs, "k", where=mask), k.read(refs, "v", where=mask)
        scores = _Scores(
            call,
            refs,
            _dot_transposed(call, queries, keys),
            q,
            k,
            visited.has_edge(block),
            mask=mask,
            q_segments=q_segments,
            k_segments=k.read_given(refs, "k_segments"),
            keys_first=False,
            lead=_no_lead,
        )
        return gather(scores, keys, values, carry)

    return lax.fori_loop(visited.start, visited.stop, step, carry)


def attend_program(call, tile, block, refs, out, largest_ref, total_ref):
    """Attend from a block of queries: write the output, and the largest score and total of each query's log-sum-exp.

    This is the online softmax. For each block of keys, with the largest score m before it and m' after it:

        weights = exp(S - m')
        total   = total exp(m - m') + sum_j weights
        O       = O exp(m - m') + drop(weights) V

    At the end O is divided by the total. The carry, O ``[i, d]`` and two numbers a query, stays in registers. A sink is
    a score with no value: the loop begins with it as m, and with a total of ``exp(sink - m)``. Dropout acts on the
    weights of the output, not on the total.
    """
    q = _Rows(block * tile.rows, tile.rows, call.n, _origin(call, refs))
    queries = q.read(refs, "q")
    is_answered = None
    if "q_mask" in refs:
        # As in `silence`: zero the query of a masked token if it is not finite, or so large that products may overflow.
        # A comparison is false for NaN; a maximum may ignore it.
        is_harmless = jnp.abs(queries.astype(FLOAT32)) <= largest_harmless(queries.dtype)
        is_answered = (jnp.min(is_harmless.astype(FLOAT32), 1) > 0) | (q.read(refs, "q_mask") != 0)
        queries = jnp.where(_as_rows(is_answered), queries, jnp.zeros((), queries.dtype))

    def gather(scores, keys, values, carry):
        """Add a block of keys to the running output, which is rescaled to the new largest score first."""
        gathered, largest, total = carry
        grown = jnp.maximum(largest, jnp.max(scores.seen, 1) * scores.factor)
        fade = jnp.exp2(largest - grown)
        weights = scores.exponentials(_as_rows(grown))
        total = total * fade + jnp.sum(weights, 1)
        gathered *= _as_rows(fade)
        return gathered + _dot_plain(call, scores.drop(weights).astype(values.dtype), values), grown, total

    largest, total = jnp.full((tile.rows,), LEAST, FLOAT32), jnp.zeros((tile.rows,), FLOAT32)
    if "sink" in refs:
        sink = sink_in_base_2(refs["sink"][0])
        largest = jnp.maximum(largest, sink)
        total = jnp.exp2(sink - largest)
    carry = jnp.zeros(queries.shape, FLOAT32), largest, total
    gathered, largest, total = _over_keys(call, tile, refs, q, queries, gather, carry)
    if is_answered is not None:
        total = jnp.where(is_answered, total, 0.0)  # no gradient either
    stored, factor = to_stored(largest)
    q.write(out, gathered * _as_rows(inverse_of(total)))
    q.write(largest_ref, jnp.where(total == 0, LEAST, stored))
    q.write(total_ref, total * factor)


def _exponent_of(largest, total):
    """Return the largest score in base 2, or the largest float32 for a query without a total: its weights are 0."""
    return jnp.where(total == 0, -LEAST, to_base_2(largest))


def dq_program(call, tile, block, refs, dq, delta, log_sum):
    """Write the gradient of a block of queries, and the delta and log-sum-exp that `dkv_program` reads.

    ``delta = sum_d O dO - shift``, ``dS = P (drop(dO V^T) - delta)`` and ``dQ = scale sum_j dS K``, over the same
    blocks of keys as forward. `shift` is ``total d_total``: the cotangent of the total adds to dS in proportion to P,
    as delta does. The log-sum-exp is in base 2, ``log2(e) largest + log2(total)``.
    """
    q = _Rows(block * tile.rows, tile.rows, call.n, _origin(call, refs))
    total = q.read(refs, "total")
    inverse = inverse_of(total)
    queries = q.read(refs, "q", where=total > 0 if "mask" in refs else None)
    do, less = q.read(refs, "do"), _exponent_of(q.read(refs, "largest"), total)
    sums = jnp.sum(q.read(refs, "o").astype(FLOAT32) * do.astype(FLOAT32), 1)
    if "shift" in refs:
        sums -= q.read(refs, "shift")
    q.write(delta, sums)
    q.write(log_sum, less + jnp.log2(jnp.where(total == 0, 1.0, total)))

    def gather(scores, keys, values, gathered):
        """Add ``dS K`` of a block of keys, ``[i, d]``."""
        # The total divides dP and delta instead of P: one fused multiply-add then divides and subtracts.
        dp = _dot_transposed(call, do, values) * _as_rows(inverse)
        ds = scores.gradient(scores.exponentials(_as_rows(less)), dp, _as_rows(sums * inverse))
        return gathered + _dot_plain(call, ds.astype(keys.dtype), keys)

    gathered = _over_keys(call, tile, refs, q, queries, gather, jnp.zeros(queries.shape, FLOAT32))
    q.write(dq, gathered * call.options.scale)


def dkv_program(call, tile, block, refs, dk, dv, lead_of):
    """Write the gradients of a block of keys, ``dK = scale sum_i dS^T Q`` and ``dV = sum_i drop(P)^T dO``.

    The loop visits the queries that see some key of the block, in all query heads of the group, so that shared keys
    need no sum afterwards. P is computed from the log-sum-exp and dS from delta, which `dq_program` wrote. All products
    are ``[j, i]``, keys first, so that no tile is transposed.
    """
    k = _Rows(block * tile.rows, tile.rows, call.n_keys)
    mask = _is_seen(k.read_given(refs, "mask"))
    keys, values = k.read(refs, "k", where=mask), k.read(refs, "v", where=mask)
    k_segments = k.read_given(refs, "k_segments")
    origin = _origin(call, refs)
    visited = visited_blocks(call.options.window.transposed, k.begin, k.end, tile.cols, call.n, origin)
    count = visited.stop - visited.start

    def step(turn, carry):
        """Add a block of queries of one head to dK and dV; with groups, turns run over heads and their blocks."""
        dk, dv = carry
        head, block = 0, turn
        if call.group > 1:
            head, block = lax.div(turn, count), visited.start + lax.rem(turn, count)

        def lead(name):
            return lead_of(name, head)

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
            mask=mask,
            q_segments=q.read_given(refs, "q_segments"),
            k_segments=k_segments,
            keys_first=True,
            lead=lead,
        )
        # The log-sum-exp is one number here: with two, largest and total, the kernel took 7 % more time. Its rounding,
        # like a score's, changes probabilities by 0.3 % at 50,000.
        p = scores.exponentials(_as_columns(log_sum))
        ds = scores.gradient(p, _dot_transposed(call, values, do), _as_columns(delta))
        p = scores.drop(p).astype(do.dtype)
        return dk + _dot_plain(call, ds.astype(queries.dtype), queries), dv + _dot_plain(call, p, do)

    # One loop over the heads of a group and their blocks: a nested loop would drain the pipeline after each head.
    first, last = (jnp.zeros_like(count), count * call.group) if call.group > 1 else (visited.start, visited.stop)
    nothing = jnp.zeros(keys.shape, FLOAT32)
    key_gradient, value_gradient = lax.fori_loop(first, last, step, (nothing, nothing))
    k.write(dk, key_gradient * call.options.scale)
    k.write(dv, value_gradient)


def dbias_program(call, tile, block, refs, d_bias, lead_of):
    """Write the gradient of one part of a head's layout, summed over periods and over the rows that share the bias.

    A program owns a part ``[tile.rows, tile.cols]`` of the layout ``[period, columns]``. It visits the queries and keys
    of this part in every period, for each row of the batch that shares the bias, and adds their dS. One program sums a
    part in a fixed order, so results repeat bitwise. A part that no window reaches stays zero without a loop. Queries
    and keys may lie before or beyond the sequence, so every block is masked.
    """
    window, period = call.options.window, call.bias_period
    columns = d_bias.shape[-1] // tile.cols
    row, column = lax.div(block, columns) * tile.rows, lax.rem(block, columns) * tile.cols
    origin = _origin(call, refs)
    batch = refs["q"].shape[0] if lead_of("q", 0) else 1
    # A part of the layout is in the window in all periods, or in none.
    key = call.bias_first_key(origin) + column
    is_in_window = (key < window.stop(origin + row + tile.rows - 1)) & (key + tile.cols > window.start(origin + row))

    def step(turn, gathered):
        """Add the dS of one period and one row of the batch."""
        batch_row = lax.rem(turn, batch)

        def lead(name):
            return lead_of(name, batch_row)

        first = lax.div(turn, batch) * period
        q = _Rows(first + row, tile.rows, call.n, origin, is_ragged=True)
        k = _Rows(first + key, tile.cols, call.n_keys, is_ragged=True)
        mask = _is_seen(k.read_given(refs, "mask", lead("mask")))
        keys, values = (k.read(refs, name, lead(name), where=mask) for name in "kv")
        total = q.read(refs, "total", lead("total"))
        queries = q.read(refs, "q", lead("q"), where=None if mask is None else total > 0)
        do, delta = q.read(refs, "do", lead("do")), q.read(refs, "delta", lead("delta"))
        inverse, less = inverse_of(total), _exponent_of(q.read(refs, "largest", lead("largest")), total)
        scores = _Scores(
            call,
            refs,
            _dot_transposed(call, queries, keys),
            q,
            k,
            True,
            mask=mask,
            q_segments=q.read_given(refs, "q_segments", lead("q_segments")),
            k_segments=k.read_given(refs, "k_segments", lead("k_segments")),
            keys_first=False,
            lead=lead,
        )
        dp = _dot_transposed(call, do, values) * _as_rows(inverse)
        weights = scores.exponentials(_as_rows(less))
        return gathered + scores.bounded_gradient(weights, dp, _as_rows(delta * inverse))

    turns = jnp.where(is_in_window, np.int32(-(-call.n // period) * batch), np.int32(0))
    part = pl.ds(row, tile.rows), pl.ds(column, tile.cols)
    d_bias[part] = lax.fori_loop(np.int32(0), turns, step, jnp.zeros((tile.rows, tile.cols), FLOAT32))
