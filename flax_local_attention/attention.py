"""The front door: check a call, bring it to one shape, and compute it."""

import jax
import jax.numpy as jnp

from flax_local_attention.operands import check_length, check_shapes, make_operands, make_scoring
from flax_local_attention.rotary import Rotary
from flax_local_attention.window import Window
from flax_local_attention.windowed import windowed_attention


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window_size: int,
    causal: bool = False,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_windowsize: bool = False,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    attn_bias: jax.Array | None = None,
    scale: float | None = None,
    shared_qk: bool = False,
    rotary: Rotary | None = None,
    q_offset: int | jax.Array = 0,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    autopad: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    r"""Attend to the keys of a window around each query.

    ``out[i] = sum_j softmax_j(scale q[i] . k[j] + bias) v[j]``, over the keys that query i sees:
    those of its `Window`, but for masked keys and other segments. Only they count: the border of the
    sequence and the length of a last, ragged window change nothing. A query that sees no key gets
    zeros, and no gradient. Time is O(n s d) and memory beside inputs and result O(s^2) to O(s n d / w),
    for a slab of s tokens: both linear in n, forward and backward.

    Positions, scores and softmax are float32 whatever the inputs are.

    Args:
        q: Queries, ``[..., n, d]``, usually ``[b, h g, n, d]``.
        k: Keys, ``[..., n, d]``. They may have fewer heads than q, a divisor of it: each head of keys
            then serves as many neighbouring heads of queries (grouped queries). They may be of another
            length than q, see `q_offset`.
        v: Values, as k.
        window_size: Tokens in a window, see `Window` for the four kinds of window.
        causal: Whether no query sees a key after itself.
        look_backward: Windows seen before a query's own.
        look_forward: Windows seen after it. None means 0 if causal, else 1.
        exact_windowsize: Count distances from the query, not from its window's borders.
        mask: Which keys may be seen, ``[b, n]`` bool. Its leading axes are q's first ones; size 1
            broadcasts. Keys and values that may not be seen change nothing, as long as they are finite.
        segment_ids: Which document a token belongs to, ``[b, n]`` integers, leading axes as in `mask`:
            documents packed in one sequence never see each other. Needs `q_offset` 0.
        attn_bias: Added to the scores, ``[h, w, s]``: a row for each place in a window, a column for
            each slot of the slab. Its leading axes are q's last ones, by NumPy's rule.
            ``Window.relative_positions`` has the distance of every place and slot.
        scale: Factor of the scores. None means ``d ** -0.5``.
        shared_qk: Keys are queries (Reformer): they are L2-normalised, and a token sees itself only
            when it sees nothing else.
        rotary: Turn queries and keys by their positions, see `Rotary`.
        q_offset: Position of the first query among the keys, at least 0; may be traced. For queries
            and keys of different lengths.
        logits_soft_cap: ``c tanh(x / c)`` bounds the scaled scores, before the bias is added.
        sinks: Logit of a key that is nobody, ``[h g]``: a head can attend to nothing. Its axes are q's
            last leading ones.
        dropout_rate: Share of probabilities to drop, in ``[0, 1)``.
        dropout_rng: Random key for dropping; required if the rate is not 0.
        autopad: Allow a number of keys that is no multiple of `window_size`.
        precision: Of the two matrix products, as in `jax.numpy.einsum`.

    Returns:
        What each query gathered, of q's shape and dtype.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, a value or a combination is wrong; the message says what to do.

    Example:
        >>> q = k = v = jnp.ones((2, 8, 1024, 64))
        >>> local_attention(q, k, v, window_size=256, causal=True, rotary=Rotary(64)).shape
        (2, 8, 1024, 64)

    Source: ``local-attention`` 1.11.2. It is departed from where padding is seen, where a query sees no
    key, and where rotary looks forward; ``tests/test_original.py`` shows each.
    """
    window = Window(window_size, causal, look_backward, look_forward, exact_windowsize)
    check_shapes(q, k, v)
    check_length(k.shape[-2], window, q_offset, autopad)
    if segment_ids is not None and not (isinstance(q_offset, int) and q_offset == 0):
        raise ValueError(f"`segment_ids` needs queries from the first key on, got `q_offset` {q_offset}; use `mask`.")
    scoring = make_scoring(q, window, scale, shared_qk, rotary, logits_soft_cap, dropout_rate, dropout_rng, precision)
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q)
    rng = dropout_rng if dropout_rate else None
    operands = make_operands(q, k, v, window, mask, segment_ids, attn_bias, sinks, rng)
    return windowed_attention(operands, window, scoring, q_offset).astype(q.dtype)
