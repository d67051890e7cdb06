"""Programs of the TPU kernels: what one step computes from a block of queries and a block of keys.

The formulas are those of `triton_programs`. A program owns a block of queries, or of keys for dK and dV. It keeps its
sums in scratch memory, adds one block of the other side in each step, and writes its results in the last step, see
`pallas_tpu`. Both backward programs recompute the scores, and P from the log-sum-exp.

Scores are ``[j, i]``, keys first: one number a query is then a row ``[1, i]``, which is broadcast along sublanes. Sums
of a query's features are ``[d, i]`` for the same reason, in either layout of memory, and are transposed once, after the
last step.

`call` is the static part of a call, see `tpu.Call`; `refs` are the blocks of a step by name.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flax_local_attention.kernels.constants import FLOAT32, LEAST, LOG2_E
from flax_local_attention.kernels.family import sink_in_base_2, to_stored
from flax_local_attention.operands import largest_harmless
from flax_local_attention.softmax import SELF_SCORE, SoftCap, inverse_of, keeps


def _dot(call, a, b, a_axis, b_axis):
    """Multiply two tiles over one axis each, to float32."""
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, axes, precision=call.precision, preferred_element_type=FLOAT32)


def _scores_of(call, keys, queries):
    """Return the products of keys with queries, or of values with cotangents, ``[j, i]``."""
    return _dot(call, keys, queries, call.feature_axis, call.feature_axis)


def _to_queries(call, keys, weights):
    """Sum keys or values times weights ``[j, i]`` over the keys, to ``[d, i]``."""
    return _dot(call, keys, weights.astype(keys.dtype), call.token_axis, 0)


def _to_keys(call, queries, weights):
    """Sum queries or cotangents times weights ``[j, i]`` over the queries, to ``[j, d]`` or ``[d, j]`` as laid out."""
    weights = weights.astype(queries.dtype)
    if call.token_axis == 0:
        return _dot(call, weights, queries, 1, 0)
    return _dot(call, queries, weights, 1, 1)


def _sum_before(step, ref, first: Any = 0.0):
    """Return a sum as it was before a step; `first` before the first step.

    This selection runs during the products; zeroing the sums before the first step would take extra time.
    """
    return jnp.where(step.is_first, first, ref[...])


def _as_column(row):
    """Transpose a row of 32-bit numbers ``[1, m]`` to a column ``[m, 1]``."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _transposed(call, x):
    """Transpose ``[d, i]`` to the layout of memory, or back; it is the same layout if features come first."""
    return x if call.token_axis == 1 else x.T


def _by_token(call, x, row):
    """Zero the tokens of a block where a row ``[1, m]`` of int32 is 0."""
    seen = row if call.token_axis == 1 else _as_column(row)
    return jnp.where(jnp.broadcast_to(seen, x.shape) != 0, x, jnp.zeros((), x.dtype))


def _read_moving(call, ref, block, size, n):
    """Read a block that moves with the steps, with zeros beyond the last of n tokens: memory there may hold NaN.

    A block that stays needs no zeros: tokens beyond the end reach only their own results, which are not kept.
    """
    x = ref[...]
    if n % size == 0:
        return x
    exists = jnp.broadcast_to(_positions(block, size, call.token_axis), x.shape) < n
    return jnp.where(exists, x, jnp.zeros((), x.dtype))


def _positions(block, size, axis):
    """Return the indices of a block's tokens: a column ``[size, 1]`` for axis 0, a row ``[1, size]`` for axis 1."""
    return block * size + lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


class _Pair:
    """A block of queries and a block of keys: their scores, and what is computed from these.

    ``factor seen`` is ``log2(e) S`` for the scores S. All tiles of scores are ``[j, i]``.

    Attributes:
        seen: Scores before they are multiplied by `factor`; -inf where a key is hidden.
        factor: Factor from `seen` to exponents of 2.
        keys: The block of keys; zeros where masked.
    """

    def __init__(self, call, refs, step, queries):
        """Make the scores of a block of queries and the block of keys of a step."""
        options = call.options
        self.call, (q_size, k_size) = call, step.sizes
        rows = _positions(step.place.q_block, q_size, 1)
        self.i, self.j = step.q_offset + rows, _positions(step.place.k_block, k_size, 0)
        self.exists = None if call.n % q_size == 0 else (rows < call.n).astype(jnp.int32)
        self.mask = refs["mask"][...] if "mask" in refs else None
        self._place = step.place.k_block, k_size, call.n_keys
        self.keys = self._of_keys(refs["k"])
        self.products = _scores_of(call, self.keys, queries)
        self.cap = SoftCap.of(options, options.scale)
        seen, self.factor = self.products, options.scale * LOG2_E
        if self.cap is not None:
            seen, self.factor = self.cap.bound(seen), LOG2_E
        if options.shared_qk:
            seen, self.factor = seen * self.factor, 1.0
            seen = jnp.where((self.i == self.j) & (seen > -jnp.inf), SELF_SCORE * LOG2_E, seen)
        self.seen = jnp.where(self._is_seen(refs), seen, -jnp.inf)
        self.keep = None
        if options.dropout_rate:
            seed = lax.bitcast_convert_type(refs["seed"][...], jnp.uint32)
            self.keep = keeps(seed, self.i, self.j, options.dropout_rate)

    def _of_keys(self, ref):
        """Read keys or values, with zeros for masked tokens."""
        x = _read_moving(self.call, ref, *self._place)
        return x if self.mask is None else _by_token(self.call, x, self.mask)

    def _is_seen(self, refs):
        """Return which keys a query sees, ``[j, i]`` bool."""
        window, n_keys = self.call.options.window, self.call.n_keys
        # The window shows a query the keys from start to stop: two rows ``[1, i]``.
        start, stop = window.start(self.i), jnp.minimum(window.stop(self.i), n_keys)
        if self.exists is not None:
            stop = jnp.where(self.exists != 0, stop, 0)
        is_seen = (self.j >= start) & (self.j < stop)
        if self.mask is not None:
            is_seen &= jnp.broadcast_to(_as_column(self.mask), is_seen.shape) != 0
        if "q_segments" in refs:
            is_seen &= _as_column(refs["k_segments"][...]) == refs["q_segments"][...]
        return is_seen

    def values(self, refs):
        """Read the block of values; zeros where masked."""
        return self._of_keys(refs["v"])

    def exponentials(self, largest):
        """Return ``2 ** (factor seen - largest)`` for a row `largest`, in base 2."""
        return jnp.exp2(self.seen * self.factor - largest)

    def drop(self, x):
        """Zero x where dropout drops a probability, and multiply the rest by ``1 / (1 - rate)``."""
        rate = self.call.options.dropout_rate
        return x if self.keep is None else jnp.where(self.keep, x * (1 / (1 - rate)), 0.0)

    def gradient(self, weights, dp, delta):
        """Return the gradient of the scores, ``dS = weights (drop(dp) - delta)``; with a soft cap, times its slope.

        Under `shared_qk` a token's score for itself is a constant, so its gradient is 0.
        """
        ds = weights * (self.drop(dp) - delta)
        ds = jnp.where(self.i == self.j, 0.0, ds) if self.call.options.shared_qk else ds
        return ds if self.cap is None else ds * self.cap.slope(self.products)


def _sees_keys(log_sum):
    """Return whether each query sees a key, int32."""
    return (log_sum < -LEAST).astype(jnp.int32)


def _is_answered(call, refs):
    """Return whether each query is answered, ``[1, i]`` int32: its token is not masked, or its numbers are harmless.

    As in `silence`, a masked token gets no answer if its query is not finite, or so large that products may overflow.
    """
    q = _transposed(call, jnp.abs(refs["q"][...].astype(FLOAT32)))
    is_harmless = (q <= largest_harmless(refs["q"].dtype)).astype(FLOAT32)  # false for NaN
    return ((jnp.min(is_harmless, 0, keepdims=True) > 0) | (refs["q_mask"][...] != 0)).astype(jnp.int32)


def attend_program(
    call: Any,
    step: Any,
    refs: Mapping[str, Any],
    out: Any,
    largest_ref: Any,
    total_ref: Any,
    gathered: Any,
    largest: Any,
    total: Any,
    silenced: Any = None,
):
    """Attend from a block of queries to a block of keys: one step of the online softmax, see `triton_programs`.

    Args:
        call: Static part of the call.
        step: The step.
        refs: Blocks by name.
        out: Output, written in the last step.
        largest_ref: Largest scores, written in the last step.
        total_ref: Totals, written in the last step.
        gathered: Weighted values so far, ``[d, i]``.
        largest: Largest scores so far, a row, in base 2.
        total: Totals so far, a row.
        silenced: If there is a mask, the block of queries with zeros for those that are not answered.
    """
    if silenced is not None:

        @pl.when(step.is_first)
        def silence():
            silenced[...] = _by_token(call, refs["q"][...], _is_answered(call, refs))

    @pl.when(step.place.is_visited)
    def gather():
        pair = _Pair(call, refs, step, refs["q"][...] if silenced is None else silenced[...])
        first, count = LEAST, 0.0
        if "sink" in refs:
            sink = sink_in_base_2(refs["sink"][...])
            first = jnp.maximum(sink, LEAST)
            count = jnp.exp2(sink - first)
        before = _sum_before(step, largest, first)
        grown = jnp.maximum(before, jnp.max(pair.seen, 0, keepdims=True) * pair.factor)
        fade = jnp.exp2(before - grown)
        weights = pair.exponentials(grown)
        largest[...] = grown
        total[...] = _sum_before(step, total, count) * fade + jnp.sum(weights, 0, keepdims=True)
        added = _to_queries(call, pair.values(refs), pair.drop(weights))
        gathered[...] = _sum_before(step, gathered) * fade + added

    @pl.when(step.is_last)
    def finish():
        sums = total[...]
        if silenced is not None:
            sums = jnp.where(_is_answered(call, refs) != 0, sums, 0.0)  # no gradient either
        stored, factor = to_stored(largest[...])
        out[...] = _transposed(call, gathered[...] * inverse_of(sums)).astype(out.dtype)
        largest_ref[...] = jnp.where(sums == 0, LEAST, stored)
        total_ref[...] = sums * factor


def dq_program(call: Any, step: Any, refs: Mapping[str, Any], dq: Any, gathered: Any, silenced: Any = None):
    """Add a block of keys to the gradient of a block of queries.

    Args:
        call: Static part of the call.
        step: The step.
        refs: Blocks by name.
        dq: Gradient, written in the last step.
        gathered: Sum of the steps so far, ``[d, i]``.
        silenced: If there is a mask, the block of queries with zeros for those that see no key.
    """
    if silenced is not None:

        @pl.when(step.is_first)
        def silence():
            silenced[...] = _by_token(call, refs["q"][...], _sees_keys(refs["log_sum"][...]))

    @pl.when(step.place.is_visited)
    def gather():
        pair = _Pair(call, refs, step, refs["q"][...] if silenced is None else silenced[...])
        dp = _scores_of(call, pair.values(refs), refs["do"][...])
        ds = pair.gradient(pair.exponentials(refs["log_sum"][...]), dp, refs["delta"][...])
        gathered[...] = _sum_before(step, gathered) + _to_queries(call, pair.keys, ds)

    @pl.when(step.is_last)
    def finish():
        dq[...] = _transposed(call, gathered[...] * call.options.scale).astype(dq.dtype)


def dkv_program(call, step, refs, dk, dv, key_gradient, value_gradient):
    """Add a block of queries of one head to the gradients of a block of keys."""

    @pl.when(step.place.is_visited)
    def gather():
        place = step.place.q_block, step.sizes[0], call.n
        queries, do = (_read_moving(call, refs[name], *place) for name in ("q", "do"))
        log_sum, delta = refs["log_sum"][...], refs["delta"][...]
        if call.n % step.sizes[0]:
            exists = _positions(step.place.q_block, step.sizes[0], 1) < call.n
            log_sum, delta = jnp.where(exists, log_sum, -LEAST), jnp.where(exists, delta, 0.0)
        if "mask" in refs:
            queries = _by_token(call, queries, _sees_keys(log_sum))
        pair = _Pair(call, refs, step, queries)
        p = pair.exponentials(log_sum)
        dp = _scores_of(call, pair.values(refs), do)
        value_gradient[...] = _sum_before(step, value_gradient) + _to_keys(call, do, pair.drop(p))
        added = _to_keys(call, queries, pair.gradient(p, dp, delta))
        key_gradient[...] = _sum_before(step, key_gradient) + added

    @pl.when(step.is_last)
    def finish():
        dk[...] = (key_gradient[...] * call.options.scale).astype(dk.dtype)
        dv[...] = value_gradient[...].astype(dv.dtype)
