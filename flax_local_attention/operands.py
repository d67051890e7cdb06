"""Checks at the door, and the one shape that a call's arrays are brought to."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flax_local_attention.dense import Operands, Scoring
from flax_local_attention.rotary import Rotary
from flax_local_attention.window import Window


def check_shapes(q, k, v):
    """Raise unless q, k and v are float arrays of shapes that fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_array(name, x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"`{name}` must be of a floating dtype, got {x.dtype}; cast it, say to float32.")
        if x.ndim < 2:
            raise ValueError(f"`{name}` must be [..., n, d], got shape {x.shape}; add the missing axes.")
    if k.shape != v.shape:
        raise ValueError(f"`k` and `v` must have the same shape, got {k.shape} and {v.shape}; make them alike.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"`q` and `k` must have the same width d, got q {q.shape} and k {k.shape}; project them alike."
        )
    q_lead, k_lead = q.shape[:-2], k.shape[:-2]
    grouped = len(q_lead) == len(k_lead) > 0 and q_lead[:-1] == k_lead[:-1] and 0 < k_lead[-1] <= q_lead[-1]
    if q_lead != k_lead and not (grouped and q_lead[-1] % k_lead[-1] == 0):
        raise ValueError(
            "`k` and `v` must have q's leading axes, or fewer heads in the last of them, a divisor of q's: "
            f"got q {q.shape} and k {k.shape}; reshape or repeat them."
        )


def _check_array(name, x):
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"`{name}` must be an array, got {type(x).__name__}; pass it through jnp.asarray.")


def check_length(n_keys: int, window: Window, q_offset: int | jax.Array, autopad: bool):
    """Raise unless the keys fill whole windows (or need not) and the queries begin among them."""
    if n_keys % window.window_size and not autopad:
        raise ValueError(
            f"The sequence must be a multiple of `window_size` ({window.window_size}) long, got {n_keys} tokens; "
            "pass `autopad=True` to allow any length (padding is never seen)."
        )
    if isinstance(q_offset, bool) or not jnp.issubdtype(jnp.result_type(q_offset), jnp.integer):
        raise TypeError(f"`q_offset` must be an integer, got {q_offset!r}; it counts tokens.")
    if jnp.ndim(q_offset):
        raise ValueError(f"`q_offset` must be one number for all rows, got shape {jnp.shape(q_offset)}; map over rows.")
    if isinstance(q_offset, int) and q_offset < 0:
        raise ValueError(
            f"`q_offset` must be at least 0, got {q_offset}; it is the first query's place among the keys."
        )


def make_scoring(q, window, scale, shared_qk, rotary, logits_soft_cap, dropout_rate, dropout_rng, precision) -> Scoring:
    """Check the options that say how scores are made, and fill in their defaults."""
    if rotary is not None:
        if not isinstance(rotary, Rotary):
            raise TypeError(f"`rotary` must be a Rotary or None, got {rotary!r}; write `rotary=Rotary({q.shape[-1]})`.")
        if rotary.dim != q.shape[-1]:
            raise ValueError(
                f"`rotary.dim` must be the width of a head, got {rotary.dim} for q of shape {q.shape}; "
                f"use Rotary({q.shape[-1]})."
            )
        rotary = rotary.for_window(window.window_size)
        _check_fading(rotary, window, q.dtype)
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"`logits_soft_cap` must be positive, got {logits_soft_cap}; leave it out for no cap.")
    if scale is not None and jnp.ndim(scale):
        raise ValueError(f"`scale` must be one number, got shape {jnp.shape(scale)}; multiply q by it instead.")
    if not isinstance(dropout_rate, int | float):
        raise TypeError(f"`dropout_rate` must be a number, got {dropout_rate!r}; 0 drops nothing.")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"`dropout_rate` must be in [0, 1), got {dropout_rate}; 0 drops nothing.")
    if dropout_rate and dropout_rng is None:
        raise ValueError(
            f"`dropout_rng` must be given when `dropout_rate` is not 0, got None with a rate of {dropout_rate}; "
            "pass a key such as jax.random.key(0)."
        )
    logits_soft_cap = None if logits_soft_cap is None else float(logits_soft_cap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Scoring(scale, shared_qk, rotary, logits_soft_cap, dropout_rate, precision)


def _check_fading(rotary, window, dtype):
    """Raise if the scale of xPos would leave the dtype's range between the ends of a slab."""
    if not rotary.use_xpos:
        return
    most = 12 if dtype == jnp.float16 else 64
    if window.slab > most * rotary.scale_base:
        raise ValueError(
            f"`scale_base` of xPos must be at least a slab / {most} in {dtype}, got {rotary.scale_base} for a slab of "
            f"{window.slab} tokens: its scale would leave the range; give a larger one, or a smaller window."
        )


def head_axes(q: jax.Array, k: jax.Array) -> tuple[int, int, int]:
    """Sizes ``(b, h, g)`` of the leading axes of q: all but the last, heads of k, heads of q to each."""
    *batch, heads = q.shape[:-2] or (1,)
    kv_heads = k.shape[-3] if k.ndim > 2 else 1
    return math.prod(batch), kv_heads, heads // kv_heads


def make_operands(q, k, v, window, mask, segment_ids, attn_bias, sinks, dropout_rng) -> Operands:
    """Check the arrays that go with q, k and v, and give each but those its leading axes ``[b, h, g]``."""
    n, n_keys = q.shape[-2], k.shape[-2]
    lead = q.shape[:-2] or (1,)
    _, heads, _ = sizes = head_axes(q, k)
    for name, x in (("mask", mask), ("segment_ids", segment_ids), ("attn_bias", attn_bias), ("sinks", sinks)):
        if x is not None:
            _check_array(name, x)
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(f"`mask` must be bool, True where a key may be seen, got {mask.dtype}; compare it with 0.")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"`segment_ids` must be integers, got {segment_ids.dtype}; number the documents.")
    if segment_ids is not None and n != n_keys:
        raise ValueError(f"`segment_ids` needs as many queries as keys, got {n} and {n_keys}; use `mask` instead.")
    segments = _from_left("segment_ids", segment_ids, n_keys, lead, heads)
    return Operands(
        q=q,
        k=k,
        v=v,
        mask=_from_left("mask", mask, n_keys, lead, heads),
        q_segments=segments,
        k_segments=segments,
        bias=_from_right("attn_bias", attn_bias, (window.window_size, window.slab), lead, heads),
        sink=_from_right("sinks", sinks, (), lead, heads),
        dropout_rng=None if dropout_rng is None else jax.random.split(dropout_rng, sizes),
    )


def _from_left(name, x, length, lead, heads):
    """``[b, n]`` with leading axes that are the first ones of `lead`."""
    if x is None:
        return None
    axes = x.shape[:-1]
    if x.ndim < 1 or x.shape[-1] != length or not _broadcasts(axes, lead):
        raise ValueError(
            f"`{name}` must be [b, n] with n = {length} and, before it, the first of q's leading axes {lead} "
            f"(or 1), got {x.shape}; reshape it to line up from the left."
        )
    return _split_lead(x, axes + (1,) * (len(lead) - len(axes)), 1, lead, heads)


def _from_right(name, x, shape, lead, heads):
    """``[h, *shape]`` with leading axes that are the last ones of `lead`."""
    if x is None:
        return None
    axes = x.shape[: max(x.ndim - len(shape), 0)]
    if x.shape[len(axes) :] != shape or not _broadcasts(axes[::-1], lead[::-1]):
        wanted = ", ".join(("h", *map(str, shape)))
        raise ValueError(
            f"`{name}` must be [{wanted}] with, before the last {len(shape)} axes, the last of q's leading axes "
            f"{lead} (or 1), got {x.shape}; reshape it to line up from the right."
        )
    return _split_lead(x, (1,) * (len(lead) - len(axes)) + axes, len(shape), lead, heads)


def _broadcasts(axes, lead):
    return len(axes) <= len(lead) and all(a in (1, size) for a, size in zip(axes, lead, strict=False))


def _split_lead(x, axes, rank, lead, heads):
    """From leading axes of which some are 1, ``[*batch, h g]``, to ``[b, h, g]``; the last `rank` stay."""
    rest = x.shape[x.ndim - rank :]
    *batch, last = axes
    x = x.reshape(*axes, *rest)
    if any(size != 1 for size in batch):
        batch = lead[:-1]
        x = jnp.broadcast_to(x, (*batch, last, *rest))
    return x.reshape(math.prod(batch), *((1, 1) if last == 1 else (heads, lead[-1] // heads)), *rest)
