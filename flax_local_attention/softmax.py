"""The one step of every implementation: scores, logits, softmax over the keys, and its derivative.

Functions here see one head and some of its queries and keys; `over_heads` maps them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from flax_local_attention.operands import Operands, silence, wide_dtype
from flax_local_attention.options import AttentionOptions
from flax_local_attention.rotary import Rotary, rotate
from flax_local_attention.window import Window

# A token's score for itself under `shared_qk` (Reformer, arXiv 2001.04451, section 2).
SELF_SCORE = -5e4

# Name of the intermediate results that a block's gradient keeps, for `jax.checkpoint_policies`.
LOG_SUM = "local_attention_log_sum"


class LogSum(NamedTuple):
    """The sum of a softmax, apart from its largest logit: ``sum_j exp(logit_j) = exp(largest) total``.

    Two numbers a query, float32 (float64 where operands are): their sum ``largest + log(total)`` rounded to one number
    would lose the total beside a large logit, and weights made again from it would not add up to 1.

    Attributes:
        largest: The largest logit, ``[..., n]``; finite, also for a query that sees no key. It has no derivative:
            `total` carries that of the sum.
        total: ``sum_j exp(logit_j - largest)``, ``[..., n]``; 0 for a query that sees no key.

    Example:
        >>> LogSum(jnp.float32(3.0), jnp.float32(1.0)).log_sum_exp()
        Array(3., dtype=float32)
    """

    largest: jax.Array
    total: jax.Array

    def log_sum_exp(self) -> jax.Array:
        """Return the logarithm of the sum, ``[..., n]``; -inf for a query that sees no key."""
        is_empty = self.total == 0
        return jnp.where(is_empty, -jnp.inf, self.largest + jnp.log(jnp.where(is_empty, 1, self.total)))


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
        head: Operands of one head: these queries and keys, and their bias laid out as ``[i, j]``.
        i: Positions of the queries, ``[i]``.
        j: Positions of the keys, ``[j]``.
        options: Of the call.
        q_table: What to rotate the queries by, of `Rotary.query_table`; None without rotary.
        k_table: What to rotate the keys by.
        log_sum: The softmax's sum, where it is known: a gradient then does not make it again.

    Returns:
        What each query gathered, ``[i, d]`` in q's dtype, and its softmax's sum, ``[i]``.
    """
    head = hide_masked(head)
    head = head._replace(k=prepare_keys(head.k, options, k_table))
    return attend_scores(make_scores(head, options, q_table), head, i, j, options, log_sum)


def hide_masked(head: Operands) -> Operands:
    """Let nothing that masked tokens hold reach another token, forward or backward, NaN among it.

    Their keys and values become zeros, and their queries too if they are not finite, see `silence`. The operands may
    have leading axes that broadcast.
    """
    if head.mask is not None:
        is_seen = head.mask[..., None]
        head = head._replace(k=jnp.where(is_seen, head.k, 0), v=jnp.where(is_seen, head.v, 0))
    return head if head.q_mask is None else head._replace(q=silence(head.q, head.q_mask))


def prepare_keys(k: jax.Array, options: AttentionOptions, table: jax.Array | None) -> jax.Array:
    """Normalise keys if they are shared, and rotate them: ``[..., n, d]`` in k's dtype, rounded once."""
    if not options.shared_qk and table is None:
        return k
    wide = k.astype(wide_dtype(k.dtype))
    wide = l2_normalize(wide) if options.shared_qk else wide
    wide = wide if table is None else rotate(wide, table)
    return wide.astype(k.dtype)


def make_scores(head: Operands, options: AttentionOptions, q_table: jax.Array | None) -> jax.Array:
    """Make scaled scores ``[i, j]``, in float32 or wider, of queries and of keys that are prepared."""
    dtype = head.dtype
    scale = head.q.shape[-1] ** -0.5 if options.scale is None else options.scale
    scale = scale if head.scale is None else head.scale.astype(dtype)
    # A query rounded to a narrow dtype is rounded once, and a scale would move it out of range: there scores are
    # scaled. In wide dtypes queries are, which are fewer numbers.
    is_wide = head.q.dtype == dtype
    q = head.q.astype(dtype)
    q = q * scale if is_wide else q
    q = q if q_table is None else rotate(q, q_table)
    # Queries first, as the transpose rule of a product gives the gradient: the other order costs a transposed copy
    # of it in every block.
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
    """Attend by scores ``[i, j]``; all else as in `attend_head`."""
    logits = _make_logits(scores, head, i, j, options)
    keep = None
    if options.dropout_rate and head.dropout_seed is not None:
        is_kept = keeps(head.dropout_seed, i[:, None], j, options.dropout_rate)
        keep = is_kept.astype(logits.dtype) / (1 - options.dropout_rate)
    sink = None if head.sink is None else head.sink.astype(logits.dtype)
    out, largest, total = _softmax(options.precision, logits, head.v, sink, keep, log_sum)
    return out.astype(head.q.dtype), LogSum(largest, total)


def keeps(seed: jax.Array, i: jax.Array, j: jax.Array, rate: float) -> jax.Array:
    """Return whether dropout keeps the probabilities of queries at i and keys at j, which broadcast; bool.

    A hash of seed and positions, 32 bits each: every implementation keeps the same ones, however it cuts the sequence.

    Source: the constants are those of `lowbias32`, by Chris Wellons' search for hashes of low bias (hash-prospector).
    """
    row = _mix(i.astype(jnp.uint32) ^ seed)
    bits = _mix(row + j.astype(jnp.uint32) * np.uint32(0x9E3779B1))
    return (bits >> np.uint32(8)).astype(jnp.int32) >= round(rate * 2**24)


def _mix(x):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _make_logits(scores, head, i, j, options):
    """Cap scores, add the bias, and add -inf where a key is not seen, ``[i, j]``."""
    if options.logits_soft_cap is not None:
        scores = options.logits_soft_cap * jnp.tanh(scores / options.logits_soft_cap)
    if head.bias is not None:
        scores += head.bias.astype(scores.dtype)
    i = i[:, None]
    if options.shared_qk:
        scores = jnp.where((i == j) & (scores > -jnp.inf), SELF_SCORE, scores)
    visible = options.window.sees(i, j)
    if head.mask is not None:
        visible &= head.mask
    if head.q_segments is not None and head.k_segments is not None:
        visible &= head.q_segments[:, None] == head.k_segments
    # Added, not selected: XLA:CPU (jaxlib 0.10) fuses a sum into the product before it.
    return scores + jnp.where(visible, 0, -jnp.inf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(precision, logits, v, sink, keep, log_sum):
    """Softmax over the keys times the values, ``[i, d]``; the largest logit and the sum beside it, ``[i]``.

    ``out[i] = sum_j p[i, j] v[j]`` with ``p[i, j] = exp(logit[i, j] - largest[i]) / total[i]``; a sink adds
    ``exp(sink - largest[i])`` to the total. A query that sees no key (all -inf, and no sink) gets 0, and no gradient.
    """
    if log_sum is not None:
        largest, total = log_sum
        weights = jnp.exp(logits - largest[:, None])
    else:
        largest = jnp.maximum(logits.max(1), jnp.finfo(logits.dtype).min)  # finite, so that exp(-inf - largest) is 0
        if sink is not None:
            largest = jnp.maximum(largest, sink)
        # Without the barrier XLA (0.11) on an H100 makes the weights twice, once for their sum: 1.35 times the time.
        # Without derivative, as in the rule below: JAX 0.10 differentiates these steps instead of it where a checkpoint
        # is differentiated twice, forward over reverse.
        largest = jax.lax.optimization_barrier(jax.lax.stop_gradient(largest))
        weights = jnp.exp(logits - largest[:, None])
        total = weights.sum(1)
        if sink is not None:
            total += jnp.exp(sink - largest)
    # Dividing after the product touches d numbers a query instead of one for each key.
    out = _weigh(weights if keep is None else weights * keep, v, precision) / _not_zero(total)[:, None]
    return out, largest, total


@_softmax.defjvp
def _softmax_jvp(precision, primals, tangents):
    """Differentiate the softmax from its largest logit and its total, which suffice to make the weights again.

    Differentiating the steps of `_softmax` instead takes one more matrix product and two more passes.
    """
    logits, v, sink, keep, log_sum = primals
    d_logits, d_v, d_sink, *_ = tangents
    out, largest, total = _softmax(precision, logits, v, sink, keep, log_sum)
    largest, total = checkpoint_name(largest, LOG_SUM), checkpoint_name(total, LOG_SUM)
    log_total = jnp.log(_not_zero(total))
    p = jnp.exp(logits - largest[:, None] - log_total[:, None])
    weighted = p * d_logits
    d_log_sum = weighted.sum(1)
    if sink is not None:
        d_log_sum += jnp.exp(sink - largest - log_total) * d_sink
    d_p = weighted - p * d_log_sum[:, None]
    if keep is not None:
        p, d_p = p * keep, d_p * keep
    d_out = _weigh(d_p, v, precision) + _weigh(p, d_v, precision)
    return (out, largest, total), (d_out, jnp.zeros_like(largest), total * d_log_sum)


def _not_zero(total):
    return jnp.where(total == 0, 1, total)


def _weigh(weights, v, precision):
    return jnp.einsum(
        "ij,jd->id", weights.astype(v.dtype), v, precision=precision, preferred_element_type=weights.dtype
    )


def l2_normalize(x: jax.Array) -> jax.Array:
    """``x / max(|x|, 1e-12)`` over the last axis, in x's dtype: in float32 or wider, with a finite gradient at 0."""
    wide = x.astype(wide_dtype(x.dtype))
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


def bias_of(window: Window, bias: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Lay a slab's bias ``[w, s]`` out by queries at i and keys at j, ``[i, j]``; any value where unseen."""
    slots = jnp.clip(window.slot(i[:, None], j), 0, window.slab - 1)
    return bias[window.place(i)[:, None], slots]


def lay_out_bias(window: Window, bias: jax.Array, i: jax.Array, first_key: jax.Array, columns: int) -> jax.Array:
    """Lay a slab's bias ``[w, s]`` out by queries at i and as many keys as there are columns, from `first_key` on.

    The part of a block of queries and one of keys is then one slice: a gather in every block would cost more than the
    scores. Keys outside the slab, which must begin within as many columns, get 0.
    """
    padded = jnp.pad(bias, ((0, 0), (columns, columns)))

    def row(place, slot):
        return jax.lax.dynamic_slice(padded, (place, columns + slot), (1, columns))[0]

    return jax.vmap(row)(window.place(i), window.slot(i, first_key))


def query_positions(i: jax.Array, window: Window, rotary: Rotary) -> jax.Array:
    """Where rotary takes queries to be: at i, or where the original puts them (`Rotary.reference`)."""
    return i + window.forward if rotary.reference else i
