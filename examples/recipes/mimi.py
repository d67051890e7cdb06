"""Mimi (arXiv 2410.00037): a streaming transformer over audio frames.

The codec has two: one after the convolutions of its encoder, one before those of its decoder. Every layer sees the last
`sliding_window` frames, so a stream of any length needs constant memory:

    import jax
    from safetensors.numpy import load_file

    from examples.recipes.mimi import Config, Mimi, mimi_parameters
    from examples.recipes.weights import load

    model = Mimi(Config())
    params = mimi_parameters(load_file("model.safetensors"), "encoder_transformer.")
    variables = load(model, params, chunks[0])
    step = jax.jit(model.apply)
    caches, outs = model.init_cache(batch=chunks[0].shape[0]), []
    for chunk in chunks:  # [b, n, e] with any n
        out, caches = step(variables, chunk, caches=caches)
        outs.append(out)

Chunks of any size give the same result as the whole sequence in one call.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from examples.recipes.parts import Caches, attend, init_caches, run
from examples.recipes.weights import parameters
from flax_local_attention import KVCache, LocalMHA, Rotary, Window


@dataclasses.dataclass(frozen=True)
class Config:
    """The names of published configurations, with the values of Mimi as defaults."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int = 250
    layer_scale_initial_scale: float = 0.01


class LayerScale(nn.Module):
    """A learned scale per channel, initialised to a small value."""

    initial_scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale each token, ``[b, n, e]`` to ``[b, n, e]``."""
        return x * self.param("scale", nn.initializers.constant(self.initial_scale), x.shape[-1:])[None, None]


class Layer(nn.Module):
    """``x += scale * attention(norm(x))``, then ``x += scale * mlp(norm(x))``."""

    self_attn: LocalMHA
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run both branches, ``[b, n, e]`` to ``[b, n, e]``."""
        c = self.config
        normed = nn.LayerNorm(c.norm_eps, name="input_layernorm")(x)
        attended, cache = attend(self.self_attn, normed, mask, cache)
        x += LayerScale(c.layer_scale_initial_scale, name="self_attn_layer_scale")(attended)
        normed = nn.LayerNorm(c.norm_eps, name="post_attention_layernorm")(x)
        hidden = nn.gelu(nn.Dense(c.intermediate_size, use_bias=False, name="fc1")(normed), approximate=False)
        hidden = nn.Dense(c.hidden_size, use_bias=False, name="fc2")(hidden)
        return x + LayerScale(c.layer_scale_initial_scale, name="mlp_layer_scale")(hidden), cache


class Mimi(nn.Module):
    """One of Mimi's two transformers."""

    config: Config

    def setup(self):
        """Build the layers."""
        self.layers = make_layers(self.config)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, caches: Caches | None = None) -> Any:
        """Transform frames, ``[b, n, e]`` to ``[b, n, e]``; with caches, return those and the grown caches."""
        x, grown = run(self.layers, x, mask, caches)
        return x if caches is None else (x, grown)

    @nn.nowrap
    def init_cache(self, batch: int) -> Caches:
        """Return empty caches of `sliding_window` frames."""
        return init_caches(make_layers(self.config), batch)


def make_layers(config: Config) -> tuple[Layer, ...]:
    """Build the layers of a configuration."""
    d = config.hidden_size // config.num_attention_heads

    def attention():
        return LocalMHA(
            config.hidden_size,
            Window.sliding(config.sliding_window),
            heads=config.num_attention_heads,
            dim_head=d,
            rotary=Rotary(d, config.rope_theta),
        )

    return tuple(Layer(attention(), config) for _ in range(config.num_hidden_layers))


def mimi_parameters(tensors: Mapping[str, np.ndarray], prefix: str) -> dict:
    """Map the published tensors whose names begin with `prefix` to the parameters of `Mimi`."""
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    return parameters({name.replace("mlp.", ""): x for name, x in own.items()})
