"""The one softmax, and the definition of local attention over all keys at once.

Functions here see one head: queries ``[n, d]``, keys and values ``[n, d]``. `over_heads` maps them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flax_local_attention.rotary import Rotary, rotate
from flax_local_attention.window import Window

# A token's score for itself under `shared_qk` (Reformer, arXiv 2001.04451, section 2).
SELF_SCORE = -5e4

# Name of the one intermediate result that a block's gradient keeps, for `jax.checkpoint_policies`.
LOG_SUM = "local_attention_log_sum"


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores are made of queries and keys: all options that are not arrays of a call."""

    scale: float | jax.Array
    shared_qk: bool = False
    rotary: Rotary | None = None
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0
    precision: jax.lax.PrecisionLike = None


jax.tree_util.register_dataclass(
    Scoring,
    data_fields=["scale"],
    meta_fields=[field.name for field in dataclasses.fields(Scoring) if field.name != "scale"],
)


class Operands(NamedTuple):
    """The arrays of a call; None for those not given.

    Each carries three leading axes ``[b, h, g]``, of size 1 where its values are shared, until `over_heads`
    has mapped them away. Before `split_heads`, q, k and v have the leading axes that the caller gave them.
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

    def of_queries(self, first: int | jax.Array, size: int) -> "Operands":
        """Keep `size` queries from `first` on."""
        return self._replace(q=_cut(self.q, first, size, -2), q_segments=_cut(self.q_segments, first, size, -1))

    def of_keys(self, first: int | jax.Array, size: int) -> "Operands":
        """Keep `size` keys from `first` on."""
        return self._replace(
            k=_cut(self.k, first, size, -2),
            v=_cut(self.v, first, size, -2),
            mask=_cut(self.mask, first, size, -1),
            k_segments=_cut(self.k_segments, first, size, -1),
        )

    def split_heads(self, sizes: tuple[int, int, int]) -> "Operands":
        """Give q, k and v the leading axes ``[b, h, g]``, of these sizes.

        To be done to parts of them: in front of a loop, XLA:CPU (jaxlib 0.10) copies a reshaped argument.
        """
        q, k, v = self.q, self.k, self.v
        b, h, _ = sizes
        return self._replace(
            q=q.reshape(*sizes, *q.shape[-2:]),
            k=k.reshape(b, h, 1, *k.shape[-2:]),
            v=v.reshape(b, h, 1, *v.shape[-2:]),
        )


def _cut(x, first, size, axis):
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def over_heads(fn: Callable[[Any], Any], operands: Any, depth: int = 3) -> Any:
    """Map `fn` (by vmap) over the leading ``[b, h, g]`` of a tree of operands; an axis of size 1 is shared."""
    if depth == 0:
        return fn(operands)
    size = max(x.shape[0] for x in jax.tree.leaves(operands))
    axes = jax.tree.map(lambda x: 0 if x.shape[0] == size else None, operands)
    operands = jax.tree.map(lambda x: x if x.shape[0] == size else x.squeeze(0), operands)
    return jax.vmap(lambda mapped: over_heads(fn, mapped, depth - 1), in_axes=(axes,))(operands)


def prepare_queries(q: jax.Array, scoring: Scoring, table: jax.Array | None) -> jax.Array:
    """Queries as they enter the products, ``[..., n, d]``: scaled, and rotated by a table of their positions."""
    q = (q.astype(jnp.float32) * scoring.scale).astype(q.dtype)
    return q if table is None else rotate(q, table)


def prepare_keys(k: jax.Array, scoring: Scoring, table: jax.Array | None) -> jax.Array:
    """Keys as they enter the products, ``[..., n, d]``: normalised if shared, and rotated."""
    k = l2_normalize(k) if scoring.shared_qk else k
    return k if table is None else rotate(k, table)


def scores(q: jax.Array, k: jax.Array, scoring: Scoring) -> jax.Array:
    """Products of prepared queries and keys, ``[i, j]``, accumulated in float32.

    Queries first, as the transpose rule of a product gives the gradient: the other order costs a transposed
    copy of it in every block.
    """
    return jnp.einsum("id,jd->ij", q, k, precision=scoring.precision, preferred_element_type=jnp.float32)


def make_logits(
    products: jax.Array,
    window: Window,
    i: jax.Array,
    j: jax.Array,
    operands: Operands,
    scoring: Scoring,
    bias: jax.Array | None,
) -> jax.Array:
    """Logits of queries at positions i and keys at positions j.

    Args:
        products: Of queries and keys, ``[i, j]``.
        window: Who sees whom.
        i: Positions of the queries, ``[i]``.
        j: Positions of the keys, ``[j]``.
        operands: Mask and segments of these queries and keys.
        scoring: The static options.
        bias: Added to the scores, ``[i, j]``.

    Returns:
        ``[i, j]`` float32, -inf where unseen.
    """
    if scoring.logits_soft_cap is not None:
        products = scoring.logits_soft_cap * jnp.tanh(products / scoring.logits_soft_cap)
    if bias is not None:
        products += bias.astype(jnp.float32)
    i = i[:, None]
    if scoring.shared_qk:
        products = jnp.where(i == j, SELF_SCORE, products)
    visible = window.sees(i, j)
    if operands.mask is not None:
        visible &= operands.mask
    if operands.q_segments is not None and operands.k_segments is not None:
        visible &= operands.q_segments[:, None] == operands.k_segments
    # Added, not selected: XLA:CPU (jaxlib 0.10) fuses a sum into the product before it.
    return products + jnp.where(visible, 0, -jnp.inf)


def attend(
    logits: jax.Array,
    v: jax.Array,
    scoring: Scoring,
    sink: jax.Array | None = None,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Softmax over the keys, times the values: the only softmax in plain JAX.

    ``out[i] = sum_j p[i, j] v[j]`` with ``p[i, j] = exp(logit[i, j]) / sum_j exp(logit[i, j])``, plus
    ``exp(sink)`` below the bar if there is a sink. A query that sees no key (all -inf) gets 0, and no
    gradient flows through it.

    Args:
        logits: ``[i, j]`` float32, -inf where unseen.
        v: Values, ``[j, d]``.
        scoring: The static options.
        sink: Logit of the key that is nobody, ``[]``.
        dropout_rng: Key for dropping probabilities; none are dropped without it.

    Returns:
        ``[i, d]`` in v's dtype; the softmax is in float32.
    """
    sink = None if sink is None else sink.astype(jnp.float32)
    keep = None
    if scoring.dropout_rate and dropout_rng is not None:
        kept = jax.random.bernoulli(dropout_rng, 1 - scoring.dropout_rate, logits.shape)
        keep = kept / (1 - scoring.dropout_rate)
    return _gather(scoring.precision, logits, v, sink, keep)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gather(precision, logits, v, sink, keep):
    """What each query gathers, ``[i, d]``, and the logarithm of its softmax's sum, ``[i]``."""
    largest = jnp.maximum(logits.max(1), jnp.finfo(jnp.float32).min)  # finite, so that exp(-inf - largest) is 0
    if sink is not None:
        largest = jnp.maximum(largest, sink)
    # Without the barrier XLA (0.11) on an H100 makes the weights twice, once for their sum: 1.35 times the time.
    largest = jax.lax.optimization_barrier(largest)
    weights = jnp.exp(logits - largest[:, None])
    total = weights.sum(1)
    if sink is not None:
        total += jnp.exp(sink - largest)
    total = jnp.where(total == 0, 1, total)
    # Dividing after the product touches d numbers a query instead of one for each key.
    out = _weigh(weights if keep is None else weights * keep, v, precision) / total[:, None]
    return out.astype(v.dtype), largest + jnp.log(total)


@_gather.defjvp
def _gather_jvp(precision, primals, tangents):
    """Of the softmax by its logarithmic sum, which alone a gradient needs to make the probabilities again.

    Differentiating the steps of `_gather` instead takes one more matrix product and two more passes.
    """
    logits, v, sink, keep = primals
    d_logits, d_v, d_sink, _ = tangents
    out, log_sum = _gather(precision, logits, v, sink, keep)
    log_sum = checkpoint_name(log_sum, LOG_SUM)
    p = jnp.exp(logits - log_sum[:, None])
    weighted = p * d_logits
    d_log_sum = weighted.sum(1)
    if sink is not None:
        d_log_sum += jnp.exp(sink - log_sum) * d_sink
    d_p = weighted - p * d_log_sum[:, None]
    if keep is not None:
        p, d_p = p * keep, d_p * keep
    d_out = _weigh(d_p, v, precision) + _weigh(p, d_v, precision)
    return (out, log_sum), (d_out.astype(v.dtype), d_log_sum)


def _weigh(weights, v, precision):
    return jnp.einsum("ij,jd->id", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32)


def l2_normalize(x: jax.Array) -> jax.Array:
    """``x / max(|x|, 1e-12)`` over the last axis: in float32, with a finite gradient at 0."""
    x32 = x.astype(jnp.float32)
    square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


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
    rotary, q_table, k_table = scoring.rotary, None, None
    if rotary is not None:
        q_table, k_table = rotary.query_table(query_positions(i, window, rotary)), rotary.key_table(j)
    q = prepare_queries(operands.q, scoring, q_table)
    k = prepare_keys(operands.k, scoring, k_table)
    bias = None if operands.bias is None else bias_of(window, operands.bias, i, j)
    logits = make_logits(scores(q, k, scoring), window, i, j, operands, scoring, bias)
    return attend(logits, operands.v, scoring, operands.sink, operands.dropout_rng)
