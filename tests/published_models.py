"""Published models built from the recipes' modules, each a function of a configuration of `transformers`."""

import functools

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from examples.recipes.gemma3 import Layer as Gemma3Layer
from examples.recipes.parts import Decoder, GatedMLP, PreNormLayer, attend
from flax_local_attention import LocalAttention, LocalMHA, Rotary, Window


def attention(config, window, **own):
    """Build attention with a configuration's heads, and the fields in `own`."""
    fields = {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "dim_head": head_width(config),
    }
    return LocalMHA(config.hidden_size, window, **fields | own)


def head_width(config):
    """Return the width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def decoder(config, attentions, width=None):
    """Build a decoder of pre-norm layers."""
    width = config.intermediate_size if width is None else width
    layers = tuple(PreNormLayer(each, GatedMLP(width), config.rms_norm_eps) for each in attentions)
    return Decoder(config.vocab_size, config.hidden_size, layers, nn.RMSNorm(config.rms_norm_eps))


def window_of(config, i):
    """Return the window of layer `i`."""
    return Window.sliding(config.sliding_window if config.layer_types[i] == "sliding_attention" else None)


def qwen3(config):
    """Build Qwen 3: queries and keys are normalised; layers from `max_window_layers` on have a window."""
    rotary = Rotary(config.head_dim, theta=config.rope_parameters["rope_theta"])
    qk_norm = {"qk_rmsnorm": True, "qk_scale": config.head_dim**-0.5}
    layers = range(config.num_hidden_layers)
    return decoder(config, [attention(config, window_of(config, i), rotary=rotary, **qk_norm) for i in layers])


def phi3(config, length):
    """Build Phi-3 for texts up to a length: LongRoPE on a part of each head."""
    rope = config.rope_parameters
    original = rope["original_max_position_embeddings"]
    rotary = Rotary.longrope(
        int(head_width(config) * rope["partial_rotary_factor"]),
        rope["rope_theta"],
        factors=rope["short_factor"] if length <= original else rope["long_factor"],
        factor=config.max_position_embeddings / original,
        original_max_position_embeddings=original,
    )
    layers = range(config.num_hidden_layers)
    return decoder(config, [attention(config, Window.sliding(config.sliding_window), rotary=rotary) for _ in layers])


class ParallelLayer(nn.Module):
    """``x + attention(norm(x)) + mlp(norm(x))``, with one norm."""

    self_attn: LocalMHA
    mlp: nn.Module
    epsilon: float

    @nn.compact
    def __call__(self, x, mask, cache):
        normed = nn.LayerNorm(self.epsilon, use_bias=False, name="input_layernorm")(x)
        attended, cache = attend(self.self_attn, normed, mask, cache)
        return x + attended + self.mlp(normed), cache


def cohere2(config):
    """Build Cohere 2: parallel branches; local layers have interleaved rotary, global ones none."""
    rotary = Rotary(config.head_dim, theta=config.rope_parameters["rope_theta"], interleaved=True)
    windows = [window_of(config, i) for i in range(config.num_hidden_layers)]
    layers = tuple(
        ParallelLayer(
            attention(config, window, rotary=False if window.is_global else rotary),
            GatedMLP(config.intermediate_size),
            config.layer_norm_eps,
        )
        for window in windows
    )
    norm = nn.LayerNorm(config.layer_norm_eps, use_bias=False)
    return Decoder(
        config.vocab_size, config.hidden_size, layers, norm, tie_word_embeddings=True, logit_scale=config.logit_scale
    )


class TemperedAttention(nn.Module):
    """Global attention without rotary whose scores are scaled by the query's position."""

    config: object

    @nn.compact
    def __call__(self, x, mask=None, cache=None):
        c = self.config
        h, kv, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv = nn.Dense((h + 2 * kv) * d, use_bias=False, name="to_qkv")(x)
        q, k, v = jnp.split(rearrange(qkv, "b n (h d) -> b h n d", d=d), [h, h + kv], axis=1)
        distance = jnp.floor((jnp.arange(x.shape[1]) + 1) / c.floor_scale)
        q *= (jnp.log1p(distance) * c.attn_scale + 1)[:, None]
        out = LocalAttention(Window.sliding(None))(q, k, v, mask=mask)
        return nn.Dense(c.hidden_size, use_bias=False, name="to_out")(rearrange(out, "b h n d -> b n (h d)"))


def llama4(config):
    """Build Llama 4 without experts: chunked layers with rotary and normalised q and k, global layers without."""
    rotary = Rotary(config.head_dim, theta=config.rope_parameters["rope_theta"], interleaved=True)
    qk_norm = {"qk_rmsnorm": True, "qk_scale": config.head_dim**-0.5}
    attentions = [
        attention(config, Window.chunks(config.attention_chunk_size), rotary=rotary, **qk_norm)
        if kind == "chunked_attention"
        else TemperedAttention(config)
        for kind in config.layer_types
    ]
    return decoder(config, attentions, width=config.intermediate_size_mlp)


def mimo_v2_flash(config):
    """Build MiMo-V2-Flash without experts: narrow values; sliding layers have sinks and twice the key heads."""
    attentions = []
    for i, kind in enumerate(config.layer_types):
        is_sliding, rope = kind == "sliding_attention", config.rope_parameters[kind]
        rotary = Rotary(int(config.head_dim * rope["partial_rotary_factor"]), theta=rope["rope_theta"])
        fields = {
            "dim_value": config.v_head_dim,
            "kv_heads": config.num_key_value_heads * (2 if is_sliding else 1),
            "attention_sinks": is_sliding,
        }
        attentions.append(attention(config, window_of(config, i), rotary=rotary, **fields))
    return decoder(config, attentions)


class CappedDecoder(Decoder):
    """A decoder with a soft cap on its logits."""

    logits_soft_cap: float = 30.0

    def __call__(self, tokens, mask=None, caches=None):
        out = super().__call__(tokens, mask, caches)
        logits, grown = (out, None) if caches is None else out
        logits = self.logits_soft_cap * jnp.tanh(logits / self.logits_soft_cap)
        return logits if caches is None else (logits, grown)


def gemma2(config):
    """Build Gemma 2: Gemma 3's layers with soft caps on scores and logits instead of normalised queries and keys."""
    fields = {
        "scale": config.query_pre_attn_scalar**-0.5,
        "logits_soft_cap": config.attn_logit_softcapping,
        "rotary": Rotary(config.head_dim, theta=config.rope_parameters["rope_theta"]),
    }
    windows = [window_of(config, i) for i in range(config.num_hidden_layers)]
    return CappedDecoder(
        config.vocab_size,
        config.hidden_size,
        tuple(Gemma3Layer(attention(config, window, **fields), config) for window in windows),
        nn.RMSNorm(config.rms_norm_eps),
        tie_word_embeddings=True,
        embed_scale=config.hidden_size**0.5,
        logits_soft_cap=config.final_logit_softcapping,
    )


class StreamingLayer(nn.Module):
    """A layer of Moonshine's streaming encoder, without rotary."""

    config: object
    window: Window

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        norm = functools.partial(nn.LayerNorm, 1e-5, use_bias=False)
        normed = norm(name="input_layernorm")(x)
        x += attention(c, self.window, rotary=False, name="self_attn")(normed, mask=mask)
        hidden = nn.Dense(c.intermediate_size, name="fc1")(norm(name="post_attention_layernorm")(x))
        return x + nn.Dense(c.hidden_size, name="fc2")(nn.gelu(hidden, approximate=False))


class StreamingEncoder(nn.Module):
    """The layers of Moonshine's streaming encoder, each with a window on both sides."""

    config: object

    @nn.compact
    def __call__(self, x, mask=None):
        for i, (left, right) in enumerate(self.config.sliding_windows):
            window = Window.between(left - 1, max(right - 1, 0))
            x = StreamingLayer(self.config, window, name=f"layers_{i}")(x, mask)
        return nn.LayerNorm(1e-5, use_bias=False, name="final_norm")(x)
