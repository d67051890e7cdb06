"""Local attention inside Flax's own multi-head modules, of Linen and NNX."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype

from flax_local_attention.array_checks import (
    check_array,
    check_dtype,
    check_floating,
    check_integers,
    check_real,
)
from flax_local_attention.attention import attend
from flax_local_attention.checks import check_flag, describe, optional
from flax_local_attention.kernels import Implementation, choose_implementation
from flax_local_attention.operands import Operands, check_offset
from flax_local_attention.options import AttentionOptions, refuse_options
from flax_local_attention.sharding import read_known, spread_like
from flax_local_attention.window import Window

_EINSUMS = "custom einsums cannot be applied to blocks of queries; leave `*_einsum_cls` out"

# Keywords that Flax passes and local attention does not use: the reason to refuse one, or None if it changes nothing.
OTHERS = {
    "broadcast_dropout": None,
    "force_fp32_for_softmax": None,
    "is_causal": None,  # if the window is causal too
    "bias": "it is n x n; give `attn_bias`, [h, w, s], to `attention_fn` instead",
    "qk_attn_weights_einsum": _EINSUMS,
    "attn_weights_value_einsum": _EINSUMS,
    "module": "`sow_weights` needs n x n probabilities, which are never formed; leave it out",
}


def attention_fn(
    options: AttentionOptions | Window | None = None,
    *,
    segment_ids: jax.Array | None = None,
    attn_bias: jax.Array | None = None,
    q_offset: int | jax.Array | None = None,
    sinks: jax.Array | None = None,
    autopad: bool = False,
    implementation: str | Implementation | None = None,
    **removed: Any,
) -> Callable[..., jax.Array]:
    """Make the ``attention_fn`` of ``nn.MultiHeadDotProductAttention`` or ``nnx.MultiHeadAttention``.

    The function takes ``query, key, value`` of ``[b, n, h, d]`` and the keywords that those modules pass. It raises an
    error for a keyword that local attention cannot support, and uses these:

    * ``mask`` of keys alone, ``[b, 1, 1, n]`` (or ``[1, 1, 1, n]``), such as
      ``nn.make_attention_mask(jnp.ones((b, 1)), exists)``. Masks with an axis of queries are refused: the window and
      `segment_ids` decide which keys a query sees. A numeric mask must hold 0 and 1, as Flax's masks do, and not
      numbers to add to scores. If a traced mask holds other numbers, the result is NaN.
    * ``dropout_rate``, ``dropout_rng``, ``deterministic``. Every head and row drops its own probabilities,
      even with ``broadcast_dropout``.
    * ``dtype`` and ``precision``; a given precision replaces the options'. Softmax is float32 or wider.

    Args:
        options: Options without dropout, which is the module's; or a window alone, which means defaults for
            everything else.
        segment_ids: As in `local_attention`.
        attn_bias: As in `local_attention`.
        q_offset: As in `local_attention`; required if queries and keys differ in length. They do in the modules' own
            decoding, which does not pass its position on: decode with `LocalMHA` instead.
        sinks: As in `local_attention`.
        autopad: Has no effect: a `Window` takes any length.
        implementation: As in `local_attention`.
        **removed: Nothing. An option given by keyword raises an error that says how to pass it.

    Returns:
        A function from ``[b, n, h, d]`` to ``[b, n, h, d]``.

    Raises:
        TypeError: `options` is neither options nor a window, or a keyword is an option.
        ValueError: The options have dropout. The returned function raises the errors of `local_attention`, and errors
            for keywords that it does not support.

    Examples:
        >>> from flax import linen as nn
        >>> options = AttentionOptions(Window.sliding(4), rotary=Rotary(8))
        >>> module = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention_fn(options))
        >>> x = jnp.ones((1, 12, 16))
        >>> module.init_with_output(jax.random.key(0), x)[0].shape
        (1, 12, 16)
    """
    refuse_options("attention_fn", "attention_fn(AttentionOptions(Window(512, causal=True)))", removed)
    options = _without_dropout(AttentionOptions.of(options))
    _check_given(segment_ids, attn_bias, sinks)
    check_flag("autopad", autopad)
    implementation = choose_implementation(implementation)
    if q_offset is not None:
        check_offset(q_offset)
    offset = 0 if q_offset is None else q_offset
    create = partial(Operands.create, segment_ids=segment_ids, attn_bias=attn_bias, sinks=sinks, q_offset=offset)

    def attend_heads(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Dtype | None = None,
        precision: jax.lax.PrecisionLike = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        **others: Any,
    ) -> jax.Array:
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_floating(name, x)
        check_flag("deterministic", deterministic)
        optional(check_dtype)("dtype", dtype)
        # Linen passes only keywords that are in the signature: the two einsums must be there to be refused.
        others["qk_attn_weights_einsum"] = qk_attn_weights_einsum
        others["attn_weights_value_einsum"] = attn_weights_value_einsum
        _refuse_others(others, options.window)
        _check_lengths(query, key, q_offset)
        q, k, v = (jnp.moveaxis(x, -2, -3) for x in promote_dtype(query, key, value, dtype=dtype))
        mask, is_mask = _mask_of_keys(mask)
        call_options = _options_of_call(options, 0.0 if deterministic else dropout_rate, dropout_rng, precision)
        operands = create(q, k, v, call_options, mask=mask, dropout_rng=dropout_rng)
        out, _ = attend(operands, call_options, implementation=implementation)
        out = out if is_mask is None else jnp.where(is_mask, out, jnp.nan)
        return jnp.moveaxis(spread_like(out.reshape(*q.shape[:-1], v.shape[-1]), q, q.ndim - 1), -3, -2)

    return attend_heads


def _check_given(segment_ids, attn_bias, sinks):
    """Raise unless arrays have the right dtypes; calls check their shapes."""
    if segment_ids is not None:
        check_integers("segment_ids", segment_ids, "number the documents")
    for name, x in (("attn_bias", attn_bias), ("sinks", sinks)):
        if x is not None:
            check_real(name, x, "cast it, for example to float32")


def _without_dropout(options):
    if options.dropout_rate:
        raise ValueError(
            f"`dropout_rate` must be the module's, got {options.dropout_rate} in `options`; give it to the module."
        )
    return options


def _options_of_call(options, dropout_rate, dropout_rng, precision):
    """Return the options with the module's dropout rate, and its precision if it has one."""
    precision = options.precision if precision is None else precision
    options = dataclasses.replace(options, dropout_rate=dropout_rate, precision=precision)
    if options.dropout_rate and dropout_rng is None:
        raise ValueError("`dropout_rng` must be given when `dropout_rate` is not 0, got None; pass `rngs`.")
    return options


def _refuse_others(others, window):
    """Raise for a keyword that is unknown or not supported."""
    for name, value in others.items():
        if name not in OTHERS:
            raise TypeError(
                f"Keywords from a Flax module must be known to `attention_fn`, got `{name}`; leave out the module's "
                "argument that causes it."
            )
        if value is not None and OTHERS[name]:
            raise ValueError(f"`{name}` must be None, got {describe(value)}: {OTHERS[name]}.")
    if others.get("is_causal") and not window.causal:
        raise ValueError("`is_causal` must be the window's, got True; give `attention_fn` a causal window.")


def _check_lengths(query, key, q_offset):
    if q_offset is None and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"`q_offset` must be given if queries and keys differ in number, got {query.shape[-3]} and "
            f"{key.shape[-3]}; give it, or decode with LocalMHA: Flax's modules do not pass on the position of a query."
        )


def _mask_of_keys(mask):
    """Return a mask ``[b, 1, 1, n]`` as ``[b, n]`` bool; and, for traced numbers, whether all are 0 or 1, ``[]``."""
    if mask is None:
        return None, None
    check_array("mask", mask)
    if mask.ndim < 3 or mask.shape[-2] != 1 or mask.shape[-3] != 1:
        raise ValueError(
            f"`mask` must be of keys alone, [b, 1, 1, n], got {mask.shape}; make it by "
            "nn.make_attention_mask(jnp.ones((b, 1)), exists), and use the window and `segment_ids` for the rest."
        )
    numbers, mask = read_known(mask), mask[..., 0, 0, :]
    if mask.dtype == jnp.bool_:
        return mask, None
    if numbers is None:
        return mask == 1, ((mask == 0) | (mask == 1)).all()
    mask = numbers[..., 0, 0, :]
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"`mask` must be True or 1 where a key may be seen, else False or 0, got numbers from {mask.min()} "
            f"to {mask.max()}; convert a mask that is added to scores, by `mask > -1` for example."
        )
    return mask == 1, None
