"""The one softmax, and the definition of local attention over all keys at once.

Functions here see one head: queries ``[n, d]``, keys and values ``[n, d]``. `over_heads` maps them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_local_attention.rotary import Rotary
from flax_local_attention.window import Window

# A token's score for itself under `shared_qk` (Reformer, arXiv 2001.04451, section 2).
SELF_SCORE = -5e4


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores are made of queries and keys: the static half of a call's options."""

    scale: float
    shared_qk: bool = False
    rotary: Rotary | None = None
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0
    precision: jax.lax.PrecisionLike = None


class Operands(NamedTuple):
    """The arrays of a call; None for those not given.

    Each carries three leading axes ``[b, h, g]``, of size 1 where its values are shared, until
    `over_heads` has mapped them away.
    """

    q: jax.Array  # [n, d]
    k: jax.Array  # [n, d]
    v: jax.Array  # [n, d]
    mask: jax.Array | None = None  # [n] of keys, True may be seen
    q_segments: jax.Array | None = None  # [n]
    k_segments: jax.Array | None = None  # [n]
    bias: jax.Array | None = None  # [w, s]
    sink: jax.Array | None = None  # []
    dropout_rng: jax.Array | None = None  # []


class Pairs(NamedTuple):
    """What attention needs to know of queries at positions i and keys at positions j, beside their scores."""

    visible: jax.Array  # [i, j]
    itself: jax.Array | None = None  # [i, j], given under `shared_qk`
    bias: jax.Array | None = None  # [i, j]


def over_heads(fn: Callable[[Any], Any], operands: Any, depth: int = 3) -> Any:
    """Map `fn` (by vmap) over the leading ``[b, h, g]`` of a tree of operands; an axis of size 1 is shared."""
    if depth == 0:
        return fn(operands)
    size = max(x.shape[0] for x in jax.tree.leaves(operands))
    axes = jax.tree.map(lambda x: 0 if x.shape[0] == size else None, operands)
    operands = jax.tree.map(lambda x: x if x.shape[0] == size else x.squeeze(0), operands)
    return jax.vmap(lambda mapped: over_heads(fn, mapped, depth - 1), in_axes=(axes,))(operands)


def scores(q: jax.Array, k: jax.Array, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Products of all queries and keys, ``[i, j]``, accumulated in float32."""
    return jnp.einsum("id,jd->ij", q, k, precision=precision, preferred_element_type=jnp.float32)


def attend(
    products: jax.Array,
    v: jax.Array,
    pairs: Pairs,
    scoring: Scoring,
    sink: jax.Array | None = None,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Softmax over the visible keys, times the values: the only softmax in plain JAX.

    ``out[i] = sum_j p[i, j] v[j]`` with ``p[i, j] = exp(logit[i, j]) / sum_j exp(logit[i, j])`` over
    the visible j, plus ``exp(sink)`` below the bar if there is a sink. A query that sees no key gets 0,
    and no gradient flows through it.

    Args:
        products: Products of queries and keys, ``[i, j]`` float32.
        v: Values, ``[j, d]``.
        pairs: Who sees whom, and what is added to the scores.
        scoring: The static options.
        sink: Logit of the key that is nobody, ``[]``.
        dropout_rng: Key for dropping probabilities; none are dropped without it.

    Returns:
        ``[i, d]`` in v's dtype; the softmax is in float32.
    """
    logits = _logits(products, pairs, scoring)
    largest = logits.max(-1, initial=jnp.finfo(jnp.float32).min)  # finite, so that exp(-inf - largest) is 0
    if sink is not None:
        sink = sink.astype(jnp.float32)
        largest = jnp.maximum(largest, sink)
    largest = jax.lax.stop_gradient(largest)  # it cancels: the result does not depend on it
    weights = jnp.exp(logits - largest[:, None])
    total = weights.sum(-1)
    if sink is not None:
        total += jnp.exp(sink - largest)
    if scoring.dropout_rate and dropout_rng is not None:
        keep = jax.random.bernoulli(dropout_rng, 1 - scoring.dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1 - scoring.dropout_rate), 0)
    out = jnp.einsum(
        "ij,jd->id", weights.astype(v.dtype), v, precision=scoring.precision, preferred_element_type=jnp.float32
    )
    # Dividing after the product touches d numbers a query instead of one for each key.
    return (out / jnp.where(total == 0, 1, total)[:, None]).astype(v.dtype)


def _logits(products, pairs, scoring):
    logits = products * scoring.scale
    if scoring.logits_soft_cap is not None:
        logits = scoring.logits_soft_cap * jnp.tanh(logits / scoring.logits_soft_cap)
    if pairs.bias is not None:
        logits += pairs.bias.astype(jnp.float32)
    if pairs.itself is not None:
        logits = jnp.where(pairs.itself, SELF_SCORE, logits)
    return jnp.where(pairs.visible, logits, -jnp.inf)


def l2_normalize(x: jax.Array) -> jax.Array:
    """``x / max(|x|, 1e-12)`` over the last axis: in float32, with a finite gradient at 0."""
    x32 = x.astype(jnp.float32)
    square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


def see(window: Window, i: jax.Array, j: jax.Array, mask=None, q_segments=None, k_segments=None) -> jax.Array:
    """Who sees whom, ``[i, j]``, of queries at positions i and keys at positions j (both 1-dimensional)."""
    visible = window.sees(i[:, None], j)
    if mask is not None:
        visible &= mask
    if q_segments is not None:
        visible &= q_segments[:, None] == k_segments
    return visible


def bias_of(window: Window, bias: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Entries of a slab's bias ``[w, s]`` for queries at i and keys at j, ``[i, j]``; any value where unseen."""
    slots = jnp.clip(window.slot(i[:, None], j), 0, window.slab - 1)
    return bias[window.place(i)[:, None], slots]


def query_positions(i: jax.Array, window: Window, rotary: Rotary) -> jax.Array:
    """Where rotary takes queries to be: at i, or where the original puts them (`Rotary.reference`)."""
    return i + window.forward if rotary.reference else i


def dense_attention(operands: Operands, window: Window, scoring: Scoring, q_offset: int | jax.Array = 0) -> jax.Array:
    """Local attention by its definition, over all keys at once: time and memory in n squared.

    What the fast paths are tested against. Positions are counted from the first key, so xPos leaves
    float32 far from it.

    Args:
        operands: The arrays of one head.
        window: Who sees whom.
        scoring: The static options.
        q_offset: Position of the first query among the keys.

    Returns:
        ``[n, d]``, in v's dtype.
    """
    i = q_offset + jnp.arange(operands.q.shape[0])
    j = jnp.arange(operands.k.shape[0])
    q, k = operands.q, operands.k
    if scoring.shared_qk:
        k = l2_normalize(k)
    if scoring.rotary is not None:
        q = scoring.rotary.rotate_queries(q, query_positions(i, window, scoring.rotary))
        k = scoring.rotary.rotate_keys(k, j)
    pairs = Pairs(
        visible=see(window, i, j, operands.mask, operands.q_segments, operands.k_segments),
        itself=i[:, None] == j if scoring.shared_qk else None,
        bias=None if operands.bias is None else bias_of(window, operands.bias, i, j),
    )
    products = scores(q, k, scoring.precision)
    return attend(products, operands.v, pairs, scoring, operands.sink, operands.dropout_rng)
