"""Mistral (arXiv 2310.06825): grouped queries, and every layer sees the last `sliding_window` tokens.

    import jax
    from safetensors.numpy import load_file

    from examples.recipes.mistral import Config, mistral
    from examples.recipes.parts import greedy
    from examples.recipes.weights import load, parameters

    model = mistral(Config())
    variables = load(model, parameters(load_file("model.safetensors")))
    logits = jax.jit(model.apply)(variables, tokens)  # [b, n] to [b, n, c]
    new = greedy(model, variables, prompts, mask, length=100)  # prompts padded on the left

Time is linear in n, and in decoding each layer caches `sliding_window` tokens. From version 0.2 on, configurations have
``sliding_window=None``: every layer is global.
"""

import dataclasses

from flax import linen as nn

from examples.recipes.parts import Decoder, GatedMLP, PreNormLayer
from flax_local_attention import LocalMHA, Rotary, Window


@dataclasses.dataclass(frozen=True)
class Config:
    """The names of published configurations, with the values of Mistral 7B v0.1 as defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = 4096


def mistral(config: Config) -> Decoder:
    """Build the model of a configuration."""
    c = config
    layers = tuple(
        PreNormLayer(attention(c), GatedMLP(c.intermediate_size), c.rms_norm_eps) for _ in range(c.num_hidden_layers)
    )
    return Decoder(c.vocab_size, c.hidden_size, layers, nn.RMSNorm(c.rms_norm_eps))


def attention(config: Config) -> LocalMHA:
    """Build the attention of a layer."""
    c = config
    return LocalMHA(
        c.hidden_size,
        Window.sliding(c.sliding_window),
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        dim_head=c.head_dim,
        rotary=Rotary(c.head_dim, c.rope_theta),
    )
