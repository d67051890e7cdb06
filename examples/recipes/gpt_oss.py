"""GPT-OSS (arXiv 2508.10925): every other layer sees the last `sliding_window` tokens, the rest see all.

Each head has an attention sink: an extra learned logit with no value behind it. The projections of attention have
biases, rotary positions are scaled by YaRN, and the feed-forward is a mixture of experts.

    import jax
    from safetensors.numpy import load_file

    from examples.recipes.gpt_oss import Config, gpt_oss
    from examples.recipes.parts import greedy
    from examples.recipes.weights import load, parameters

    model = gpt_oss(Config())
    variables = load(model, parameters(load_file("model.safetensors")))
    logits = jax.jit(model.apply)(variables, tokens)  # [b, n] to [b, n, c]
    new = greedy(model, variables, prompts, mask, length=100)  # prompts padded on the left

Published files hold the experts in MXFP4, as ``*_blocks`` and ``*_scales``; unpack them to ``gate_up_proj`` and
``down_proj`` first.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from examples.recipes.parts import Decoder, PreNormLayer
from flax_local_attention import LocalMHA, Rotary, Window


@dataclasses.dataclass(frozen=True)
class Config:
    """The names of published configurations, with the values of gpt-oss-20b as defaults."""

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 24
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    original_max_position_embeddings: int = 4096
    sliding_window: int = 128


class Mixture(nn.Module):
    """A mixture of experts: each token uses the `num_experts_per_tok` experts that a router scores highest."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform each token on its own, ``[b, n, e]`` to ``[b, n, e]``."""
        c, tokens = self.config, x.reshape(-1, x.shape[-1])
        scores, chosen = jax.lax.top_k(nn.Dense(c.num_local_experts, name="router")(tokens), c.num_experts_per_tok)
        order = jnp.argsort(chosen.ravel())  # sorts the pairs (token, expert) by expert
        token, expert = order // c.num_experts_per_tok, chosen.ravel()[order]
        out = Experts(c, name="experts")(tokens[token], expert) * nn.softmax(scores).ravel()[order, None]
        return jnp.zeros_like(tokens).at[token].add(out).reshape(x.shape)


class Experts(nn.Module):
    """Gated feed-forwards ``down((up + 1) * gate * sigmoid(1.702 gate))``, with both clipped at `swiglu_limit`."""

    config: Config

    @nn.compact
    def __call__(self, rows: jax.Array, expert: jax.Array) -> jax.Array:
        """Transform each row, ``[t, e]``, by its expert, ``[t]`` integers in ascending order."""
        c = self.config
        hidden = self._product("gate_up_proj", rows, expert, 2 * c.intermediate_size)
        gate = jnp.minimum(hidden[:, ::2], c.swiglu_limit)
        up = jnp.clip(hidden[:, 1::2], -c.swiglu_limit, c.swiglu_limit)
        return self._product("down_proj", (up + 1) * gate * nn.sigmoid(1.702 * gate), expert, c.hidden_size)

    def _product(self, name, rows, expert, features):
        experts = self.config.num_local_experts
        init = nn.initializers.lecun_normal(batch_axis=0)
        kernel = self.param(name, init, (experts, rows.shape[-1], features))
        bias = self.param(f"{name}_bias", nn.initializers.zeros_init(), (experts, features))
        return jax.lax.ragged_dot(rows, kernel, jnp.bincount(expert, length=experts)) + jnp.take(bias, expert, axis=0)


def gpt_oss(config: Config) -> Decoder:
    """Build the model of a configuration."""
    c = config
    layers = tuple(
        PreNormLayer(attention(c, is_global=i % 2 == 1), Mixture(c), c.rms_norm_eps) for i in range(c.num_hidden_layers)
    )
    return Decoder(c.vocab_size, c.hidden_size, layers, nn.RMSNorm(c.rms_norm_eps))


def attention(config: Config, is_global: bool) -> LocalMHA:
    """Build the attention of a layer."""
    c, d, n = config, config.head_dim, config.original_max_position_embeddings
    return LocalMHA(
        c.hidden_size,
        Window.sliding(None if is_global else c.sliding_window),
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        dim_head=d,
        attention_sinks=True,
        use_bias=True,
        use_out_bias=True,
        rotary=Rotary.yarn(d, c.rope_theta, factor=c.rope_factor, original_max_position_embeddings=n, truncate=False),
    )
