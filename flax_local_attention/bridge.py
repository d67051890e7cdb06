"""Local attention inside the multi-head modules of Flax, Linen's and NNX's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype

from flax_local_attention.attention import local_attention
from flax_local_attention.rotary import Rotary
from flax_local_attention.window import Window


def attention_fn(
    *,
    window_size: int,
    causal: bool = False,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_windowsize: bool = False,
    segment_ids: jax.Array | None = None,
    attn_bias: jax.Array | None = None,
    scale: float | None = None,
    shared_qk: bool = False,
    rotary: Rotary | None = None,
    q_offset: int | jax.Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    autopad: bool = False,
) -> Callable[..., jax.Array]:
    """Make the ``attention_fn`` of ``nn.MultiHeadDotProductAttention`` or ``nnx.MultiHeadAttention``.

    The function takes ``query, key, value`` of ``[b, n, h, d]`` and the keywords that those modules pass.
    Of these it heeds the ones below, and refuses what local attention cannot do; none is lost silently:

    * ``mask`` of keys alone, ``[b, 1, 1, n]`` (or ``[1, 1, 1, n]``), as of
      ``nn.make_attention_mask(jnp.ones((b, 1)), exists)``. Masks with an axis of queries are refused: who
      sees whom is the window's to say, and what remains is `segment_ids`.
    * ``dropout_rate``, ``dropout_rng``, ``deterministic``. Every head and row drops its own probabilities,
      also where ``broadcast_dropout`` would have them drop alike.
    * ``dtype`` and ``precision``. Softmax is in float32 in any case.

    Args:
        window_size, causal, look_backward, look_forward, exact_windowsize, segment_ids, attn_bias, scale,
            shared_qk, rotary, q_offset, logits_soft_cap, sinks, autopad: As in `local_attention`. `q_offset`
            must be given if queries and keys differ in length, as in the modules' own decoding, whose position
            is not passed on: decode with `LocalMHA` instead.

    Returns:
        A function of ``[b, n, h, d]`` to the same.

    Raises:
        TypeError, ValueError: As `Window`. The function raises them as `local_attention`, and for keywords
            that it cannot heed.

    Example:
        >>> from flax import linen as nn
        >>> attend = attention_fn(window_size=4, causal=True, rotary=Rotary(8))
        >>> module = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attend)
        >>> x = jnp.ones((1, 12, 16))
        >>> module.init_with_output(jax.random.key(0), x)[0].shape
        (1, 12, 16)
    """
    Window(window_size, causal, look_backward, look_forward, exact_windowsize)  # refuse at once what is wrong

    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Dtype | None = None,
        precision: jax.lax.PrecisionLike = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> jax.Array:
        del broadcast_dropout, force_fp32_for_softmax
        _refuse(bias=bias, module=module, qk=qk_attn_weights_einsum, value=attn_weights_value_einsum)
        if is_causal and not causal:
            raise ValueError("`is_causal` must be the window's, got True; give `causal=True` to `attention_fn`.")
        if q_offset is None and query.shape[-3] != key.shape[-3]:
            raise ValueError(
                f"Queries and keys must be as many, got {query.shape[-3]} and {key.shape[-3]}; give `q_offset`, or "
                "decode with LocalMHA: a module that decodes does not say where its query is."
            )
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        out = local_attention(
            *(jnp.moveaxis(x, -2, -3) for x in (query, key, value)),
            window_size=window_size,
            causal=causal,
            look_backward=look_backward,
            look_forward=look_forward,
            exact_windowsize=exact_windowsize,
            mask=_mask_of_keys(mask),
            segment_ids=segment_ids,
            attn_bias=attn_bias,
            scale=scale,
            shared_qk=shared_qk,
            rotary=rotary,
            q_offset=0 if q_offset is None else q_offset,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
            dropout_rate=0.0 if deterministic else dropout_rate,
            dropout_rng=dropout_rng,
            autopad=autopad,
            precision=precision,
        )
        return jnp.moveaxis(out, -3, -2)

    return attend


def _refuse(bias, module, qk, value):
    if bias is not None:
        raise ValueError("`bias` is n x n; give `attn_bias` of a slab, [h, w, s], to `attention_fn` instead.")
    if module is not None:
        raise ValueError("`sow_weights` needs n x n probabilities, which are never formed; leave it out.")
    if qk is not None or value is not None:
        raise ValueError("Einsums of one's own do not reach blocks of queries; leave `*_einsum_cls` out.")


def _mask_of_keys(mask):
    """``[b, 1, 1, n]`` to ``[b, n]``."""
    if mask is None:
        return None
    if mask.ndim < 3 or mask.shape[-2] != 1 or mask.shape[-3] != 1:
        raise ValueError(
            f"`mask` must be of keys alone, [b, 1, 1, n], got {mask.shape}; make it by "
            "nn.make_attention_mask(jnp.ones((b, 1)), exists), and let the window and `segment_ids` say the rest."
        )
    return mask[..., 0, 0, :].astype(bool)
