"""Gemma 3 (arXiv 2503.19786): five of six layers see the last `sliding_window` tokens, the sixth sees all.

Local and global layers have different rotary frequencies. Queries and keys are normalised, and each branch has a norm
before and after it. Published norms multiply by ``1 + weight``; the loader adds the one.

    import jax
    from safetensors.numpy import load_file

    from examples.recipes.gemma3 import Config, gemma3
    from examples.recipes.parts import greedy
    from examples.recipes.weights import load, parameters

    model = gemma3(Config())
    variables = load(model, parameters(load_file("model.safetensors"), norm_offset=1.0))
    logits = jax.jit(model.apply)(variables, tokens)  # [b, n] to [b, n, c]
    new = greedy(model, variables, prompts, mask, length=100)  # prompts padded on the left

In decoding, only the global layers cache the whole text. Larger checkpoints also process images: their text model is
the tensors whose names begin with ``language_model.``, and its global layers have ``rope_factor=8.0``.
"""

import dataclasses
import functools

import jax
from flax import linen as nn

from examples.recipes.parts import Decoder, GatedMLP, attend
from flax_local_attention import KVCache, LocalMHA, Rotary, Window


@dataclasses.dataclass(frozen=True)
class Config:
    """The names of published configurations, with the values of Gemma 3 1B as defaults."""

    vocab_size: int = 262144
    hidden_size: int = 1152
    intermediate_size: int = 6912
    num_hidden_layers: int = 26
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 256
    query_pre_attn_scalar: float = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_local_base_freq: float = 1e4
    rope_factor: float = 1.0
    sliding_window: int = 512
    sliding_window_pattern: int = 6


class Layer(nn.Module):
    """``x += norm(attention(norm(x)))``, then ``x += norm(mlp(norm(x)))``."""

    self_attn: LocalMHA
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run both branches, ``[b, n, e]`` to ``[b, n, e]``."""
        norm = functools.partial(nn.RMSNorm, self.config.rms_norm_eps)
        attended, cache = attend(self.self_attn, norm(name="input_layernorm")(x), mask, cache)
        x += norm(name="post_attention_layernorm")(attended)
        mlp = GatedMLP(self.config.intermediate_size, nn.gelu, name="mlp")
        hidden = mlp(norm(name="pre_feedforward_layernorm")(x))
        return x + norm(name="post_feedforward_layernorm")(hidden), cache


def gemma3(config: Config) -> Decoder:
    """Build the model of a configuration."""
    c = config
    kinds = [(i + 1) % c.sliding_window_pattern == 0 for i in range(c.num_hidden_layers)]
    layers = tuple(Layer(attention(c, is_global), c) for is_global in kinds)
    norm, scale = nn.RMSNorm(c.rms_norm_eps), c.hidden_size**0.5
    return Decoder(c.vocab_size, c.hidden_size, layers, norm, tie_word_embeddings=True, embed_scale=scale)


def attention(config: Config, is_global: bool) -> LocalMHA:
    """Build the attention of a layer."""
    c, d = config, config.head_dim
    return LocalMHA(
        c.hidden_size,
        Window.sliding(None if is_global else c.sliding_window),
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        dim_head=d,
        qk_rmsnorm=True,
        qk_scale=c.query_pre_attn_scalar**-0.5,
        rotary=Rotary.linear(d, c.rope_theta, factor=c.rope_factor) if is_global else Rotary(d, c.rope_local_base_freq),
    )
