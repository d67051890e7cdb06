"""Scores, the softmax over keys and its derivative, shared by all implementations.

Most functions here take one head and some of its queries and keys; `over_heads` maps them over heads.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from flax_local_attention.operands import Operands, silence, wide_dtype
from flax_local_attention.options import AttentionOptions
from flax_local_attention.rotary import Rotary
from flax_local_attention.window import Window

# A token's score for itself under `shared_qk` (Reformer, arXiv 2001.04451, section 2).
SELF_SCORE = -5e4

# The largest float32.
LARGEST = float(np.finfo(np.float32).max)

# Name of the residuals that the gradient of a block stores, for `jax.checkpoint_policies`.
LOG_SUM = "local_attention_log_sum"


class LogSum(NamedTuple):
    """The log-sum-exp of a softmax as two numbers per query: ``sum_j exp(score_j) = exp(largest) total``.

    Both are float32, or float64 if operands are. A single number, ``largest + log(total)``, would round the total away
    next to a large score, and probabilities recomputed from it would not add up to 1. A sink counts as a score.

    Attributes:
        largest: The largest score, ``[..., n]``; finite even for a query that sees no key. It has no derivative: the
            derivative of the sum is attributed to `total`.
        total: ``sum_j exp(score_j - largest)``, ``[..., n]``; 0 for a query that sees no key.

    Examples:
        >>> LogSum(jnp.float32(3.0), jnp.float32(1.0)).log_sum_exp()
        Array(3., dtype=float32)
    """

    largest: jax.Array
    total: jax.Array

    def log_sum_exp(self) -> jax.Array:
        """Return the log-sum-exp as one number, ``[..., n]``; -inf for a query that sees no key."""
        is_empty = self.total == 0
        return jnp.where(is_empty, -jnp.inf, self.largest + jnp.log(jnp.where(is_empty, 1, self.total)))


def merge_parts(parts: Sequence[tuple[jax.Array, LogSum]]) -> tuple[jax.Array, LogSum]:
    """Merge attention to disjoint sets of keys, see `merge_attention`; in the dtype of the first part."""
    largest = lax.stop_gradient(functools.reduce(jnp.maximum, [log_sum.largest for _, log_sum in parts]))
    totals = [log_sum.total * jnp.exp(lax.stop_gradient(log_sum.largest) - largest) for _, log_sum in parts]
    total = sum(totals[1:], start=totals[0])
    weighted = [out.astype(part.dtype) * part[..., None] for (out, _), part in zip(parts, totals, strict=True)]
    out = sum(weighted[1:], start=weighted[0]) / _not_zero(total)[..., None]
    return out.astype(parts[0][0].dtype), LogSum(largest, total)


def attend_head(
    head: Operands,
    i: jax.Array,
    j: jax.Array,
    options: AttentionOptions,
    q_table: jax.Array | None,
    k_table: jax.Array | None,
    log_sum: LogSum | None = None,
) -> tuple[jax.Array, LogSum]:
    """Attend from queries at positions i to keys at positions j.

    Args:
        head: Operands of one head after `Operands.widen_scores`: these queries and keys, with a bias of ``[i, j]``.
        i: Positions of the queries, ``[i]``.
        j: Positions of the keys, ``[j]``.
        options: Options of the call.
        q_table: Table for the queries from `Rotary.query_table`; None without rotary.
        k_table: Table for the keys from `Rotary.key_table`; None without rotary.
        log_sum: The log-sum-exp of the softmax if it is known, so that a gradient does not recompute it.

    Returns:
        The output of each query, ``[i, d]`` in q's dtype, and its log-sum-exp, ``[i]``.
    """
    head = hide_masked(head)
    head = head._replace(k=prepare_keys(head.k, options, k_table))
    return attend_scores(make_scores(head, options, q_table), head, i, j, options, log_sum)


def hide_masked(head: Operands) -> Operands:
    """Zero the keys and values of masked tokens, and silence their queries, see `silence`.

    Masked tokens, even with NaN, then do not affect other tokens, forward or backward. The operands may have leading
    axes that broadcast.
    """
    if head.mask is not None:
        is_seen = head.mask[..., None]
        head = head._replace(k=jnp.where(is_seen, head.k, 0), v=jnp.where(is_seen, head.v, 0))
    return head if head.q_mask is None else head._replace(q=silence(head.q, head.q_mask))


def prepare_keys(k: jax.Array, options: AttentionOptions, table: jax.Array | None) -> jax.Array:
    """L2-normalise keys under `shared_qk`, and rotate them: ``[..., n, d]`` in k's dtype, rounded once."""
    if not options.shared_qk and table is None:
        return k
    wide = k.astype(wide_dtype(k.dtype))
    wide = l2_normalize(wide) if options.shared_qk else wide
    wide = wide if table is None or options.rotary is None else options.rotary.turn(wide, table)
    return wide.astype(k.dtype)


def turn_before(
    operands: Operands, positions: jax.Array, options: AttentionOptions
) -> tuple[Operands, AttentionOptions]:
    """Rotate queries and keys before a call; return its operands and its options, without rotary.

    The call normalises keys under `shared_qk`, which keeps a rotation but undoes `Rotary.factor`. In that case queries
    get the factor of the keys too.

    Args:
        operands: Operands of all heads, with as many queries as keys.
        positions: Their positions, ``[n]``, or with leading axes that broadcast against q's.
        options: Options with rotary that has no xPos.
    """
    rotary = options.rotary
    assert rotary is not None
    of_queries = of_keys = rotary
    if options.shared_qk:
        of_queries, of_keys = (dataclasses.replace(rotary, factor=factor) for factor in (rotary.factor**2, 1.0))
    at = query_positions(positions, options.window, rotary)
    q = rotary.turn(operands.q, of_queries.query_table(at, operands.dtype))
    k = rotary.turn(operands.k, of_keys.key_table(positions, operands.dtype))
    return operands._replace(q=q, k=k), dataclasses.replace(options, rotary=None)


def make_scores(head: Operands, options: AttentionOptions, q_table: jax.Array | None) -> jax.Array:
    """Compute scores, the scaled products of queries and prepared keys, ``[i, j]`` in float32 or wider."""
    dtype = head.dtype
    scale = head.q.shape[-1] ** -0.5 if options.scale is None else options.scale
    scale = scale if head.scale is None else head.scale
    # In narrow dtypes the scores are scaled: a scaled query would be rounded once more, and could overflow. In wide
    # dtypes the queries are scaled, because they are fewer numbers.
    is_wide = head.q.dtype == dtype
    q = head.q.astype(dtype)
    q = q * scale if is_wide else q
    q = q if q_table is None or options.rotary is None else options.rotary.turn(q, q_table)
    # Queries come first, as in the result of the product's transpose rule: the other order costs a transposed copy of
    # the gradient in every block.
    scores = jnp.einsum(
        "id,jd->ij", q.astype(head.q.dtype), head.k, precision=options.precision, preferred_element_type=dtype
    )
    return scores if is_wide else scores * scale


def attend_scores(
    scores: jax.Array,
    head: Operands,
    i: jax.Array,
    j: jax.Array,
    options: AttentionOptions,
    log_sum: LogSum | None = None,
) -> tuple[jax.Array, LogSum]:
    """Attend with given scores, ``[i, j]``; everything else is as in `attend_head`."""
    scores = _modify_scores(scores, head, i, j, options)
    keep = None
    if options.dropout_rate and head.dropout_seed is not None:
        is_kept = keeps(head.dropout_seed, i[:, None], j[None], options.dropout_rate)
        keep = is_kept.astype(scores.dtype) / (1 - options.dropout_rate)
    out, largest, total = _softmax(options.precision, scores, head.v, head.sink, keep, log_sum)
    return out.astype(head.q.dtype), LogSum(largest, total)


def keeps(seed: jax.Array, i: jax.Array, j: jax.Array, rate: float) -> jax.Array:
    """Return whether dropout keeps the probabilities of queries at i for keys at j, which broadcast; bool.

    The result is a hash of the seed and the positions, 32 bits each, so all implementations keep the same
    probabilities, however they split the sequence into blocks.

    Source: The constants are from ``lowbias32``, which Chris Wellons' hash-prospector found.
    """
    row = _mix(i.astype(jnp.uint32) ^ seed)
    bits = _mix(row + j.astype(jnp.uint32) * np.uint32(0x9E3779B1))
    return (bits >> np.uint32(8)).astype(jnp.int32) >= round(rate * 2**24)


def _mix(x):
    """Scramble 32 bits, one to one, by the rounds of ``lowbias32``."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


@dataclasses.dataclass(frozen=True)
class SoftCap:
    """A smooth bound of the scores, ``cap tanh(score / cap)``.

    Attributes:
        cap: Largest absolute value of bounded scores.
        scale: Factor from the given products to scores; 1 if scores are given.
        tanh: Implementation of tanh.
    """

    cap: float
    scale: float
    tanh: Callable[[jax.Array], jax.Array]

    @classmethod
    def of(
        cls, options: AttentionOptions, scale: float = 1.0, tanh: Callable[[jax.Array], jax.Array] = jnp.tanh
    ) -> "SoftCap | None":
        """Make the bound in `options`; return None if there is none."""
        cap = options.logits_soft_cap
        return None if cap is None else cls(cap, scale, tanh)

    def bound(self, products: jax.Array) -> jax.Array:
        """Compute bounded scores."""
        return self.cap * self._tanh(products)

    def slope(self, products: jax.Array) -> jax.Array:
        """Compute the derivative of bounded scores with respect to scores."""
        tanh = self._tanh(products)
        return 1 - tanh * tanh

    def _tanh(self, products):
        """Compute ``tanh(score / cap)`` from products.

        The factor is clipped to finite float32, so that products of 0 give 0.
        """
        return self.tanh(products * float(np.clip(self.scale / self.cap, -LARGEST, LARGEST)))


def _modify_scores(scores, head, i, j, options):
    """Bound scores, add the bias, and add -inf for keys that are not seen, ``[i, j]``."""
    cap = SoftCap.of(options)
    scores = scores if cap is None else cap.bound(scores)
    if head.bias is not None:
        scores += head.bias
    i, j = i[:, None], j[None]
    if options.shared_qk:
        scores = jnp.where((i == j) & (scores > -jnp.inf), SELF_SCORE, scores)
    visible = options.window.sees(i, j)
    if head.mask is not None:
        visible &= head.mask[None]
    if head.q_segments is not None and head.k_segments is not None:
        visible &= head.q_segments[:, None] == head.k_segments[None]
    # Added, not selected: XLA:CPU (jaxlib 0.10) fuses a sum into the product before it.
    return scores + jnp.where(visible, 0, -jnp.inf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(precision, scores, v, sink, keep, log_sum):
    """Weigh values by a softmax over keys, ``[i, d]``; also return largest and total of its log-sum-exp, ``[i]``.

    ``out[i] = sum_j p[i, j] v[j]`` with ``p[i, j] = exp(score[i, j] - largest[i]) / total[i]``. A sink adds
    ``exp(sink - largest[i])`` to the total. A query without keys (all scores -inf, and no sink) gets 0 and no gradient.

    Args:
        precision: Precision of the product with the values.
        scores: ``[i, j]``, -inf for keys that are not seen.
        v: ``[j, d]``.
        sink: ``[]``, or None.
        keep: Factors of dropout, ``[i, j]``, 0 or ``1 / (1 - rate)``, or None. They multiply p in the output, not in
            the total.
        log_sum: Largest and total if they are known, or None.
    """
    if log_sum is not None:
        largest, total = log_sum
        weights = jnp.exp(scores - largest[:, None])
    else:
        largest = jnp.maximum(scores.max(1), jnp.finfo(scores.dtype).min)  # finite, so that exp(-inf - largest) is 0
        if sink is not None:
            largest = jnp.maximum(largest, sink)
        # Without the barrier XLA (0.11) on an H100 computes the weights twice, once for their sum: 1.35 times the time.
        # As in the rule below, the largest score has no derivative. `stop_gradient` is needed because JAX 0.10
        # differentiates these steps instead of using the rule in forward-over-reverse mode through a checkpoint.
        largest = jax.lax.optimization_barrier(jax.lax.stop_gradient(largest))
        weights = jnp.exp(scores - largest[:, None])
        total = weights.sum(1)
        if sink is not None:
            total += jnp.exp(sink - largest)
    # Dividing after the product touches d numbers per query instead of one per key.
    out = _weigh(weights if keep is None else weights * keep, v, precision) / _not_zero(total)[:, None]
    return out, largest, total


@_softmax.defjvp
def _softmax_jvp(precision, primals, tangents):
    """Differentiate the softmax from its log-sum-exp, the only residual needed to recompute the probabilities.

    With ``p = exp(score - largest - log(total))``:

        d_log_sum[i] = sum_j p[i, j] d_score[i, j] + p_sink[i] d_sink
        d_p[i, j]    = p[i, j] (d_score[i, j] - d_log_sum[i])
        d_out[i]     = sum_j d_p[i, j] v[j] + p[i, j] d_v[j]
        d_total[i]   = total[i] d_log_sum[i]

    Differentiating the steps of `_softmax` instead takes one more matrix product and two more passes.
    """
    scores, v, sink, keep, log_sum = primals
    d_scores, d_v, d_sink, *_ = tangents
    out, largest, total = _softmax(precision, scores, v, sink, keep, log_sum)
    largest, total = checkpoint_name(largest, LOG_SUM), checkpoint_name(total, LOG_SUM)
    log_total = jnp.log(_not_zero(total))
    p = jnp.exp(scores - largest[:, None] - log_total[:, None])
    weighted = p * d_scores
    d_log_sum = weighted.sum(1)
    if sink is not None:
        d_log_sum += jnp.exp(sink - largest - log_total) * d_sink
    d_p = weighted - p * d_log_sum[:, None]
    if keep is not None:
        p, d_p = p * keep, d_p * keep
    d_out = _weigh_wide(d_p, v, precision) + _weigh_wide(p, d_v, precision)
    return (out, largest, total), (d_out, jnp.zeros_like(largest), total * d_log_sum)


def inverse_of(total: jax.Array) -> jax.Array:
    """Return ``1 / total``; 0 for a query that sees no key."""
    return jnp.where(total == 0, 0.0, 1 / jnp.where(total == 0, 1.0, total))


def _not_zero(total):
    """Return the total, or 1 for a query that sees no key, whose output is then 0."""
    return jnp.where(total == 0, 1, total)


def _weigh(weights, v, precision):
    """Compute ``sum_j weights[i, j] v[j]`` with factors in v's dtype and sums in the dtype of the weights."""
    return _weigh_wide(weights.astype(v.dtype), v, precision, weights.dtype)


def _weigh_wide(weights, v, precision, dtype=None):
    """Compute the same with weights in their own dtype, for derivatives.

    A gradient has the dtype of its factor. The gradient of weights, a product of values and a cotangent, may overflow
    in float16 although the gradients computed from it do not.
    """
    return lax.dot_general(
        weights, v, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=dtype or weights.dtype
    )


def l2_normalize(x: jax.Array) -> jax.Array:
    """Compute ``x / max(|x|, 1e-12)`` over the last axis, in float32 or wider, with a finite gradient at 0."""
    wide = x.astype(wide_dtype(x.dtype))
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


def bias_of(window: Window, bias: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Look up a bias ``[w, s]`` for queries at i and keys at j, ``[i, j]``; arbitrary for keys that are not seen."""
    columns = jnp.clip(window.bias_column(i[:, None], j[None]), 0, window.slab - 1)
    return bias[window.bias_row(i)[:, None], columns]


def lay_out_bias(window: Window, bias: jax.Array, i: jax.Array, first_key: jax.Array, columns: int) -> jax.Array:
    """Look up a bias ``[w, s]`` for queries at i and the keys from `first_key` on, ``[i, columns]``.

    The bias of a block of queries and a block of keys is then one slice of the result: a gather in every block would
    cost more than the scores. Keys outside the slab get 0. The slab must begin within `columns` keys.
    """
    padded = jnp.pad(bias, ((0, 0), (columns, columns)))

    def lay_out_row(row, column):
        return jax.lax.dynamic_slice(padded, (row, columns + column), (1, columns))[0]

    return jax.vmap(lay_out_row)(window.bias_row(i), window.bias_column(i, first_key))


def query_positions(i: jax.Array, window: Window, rotary: Rotary) -> jax.Array:
    """Return the positions by which rotary rotates queries at i: i, or the original's if `reference`."""
    return i + window.forward if rotary.reference else i
