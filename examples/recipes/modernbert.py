"""ModernBERT (arXiv 2412.13663): an encoder in which one layer in three is global and the others are local.

A local layer sees `local_attention` tokens, half on either side. Local and global layers have different rotary
frequencies.

    import jax
    from safetensors.numpy import load_file

    from examples.recipes.modernbert import Config, ModernBert, modernbert_parameters
    from examples.recipes.weights import load

    model = ModernBert(Config())
    variables = load(model, modernbert_parameters(load_file("model.safetensors")))
    logits = jax.jit(model.apply)(variables, tokens, mask=mask)  # [b, n] to [b, n, c], padding on either side
    packed_logits = jax.jit(model.apply)(variables, packed, segment_ids=segment_ids)  # several texts per row

Texts packed into one row do not see each other: each gets the same logits as on its own. A packed row takes as much
memory as one text of its length.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from examples.recipes.weights import parameters
from flax_local_attention import LocalMHA, Rotary, Window


@dataclasses.dataclass(frozen=True)
class Config:
    """The names of published configurations, with the values of ModernBERT-base as defaults."""

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    norm_eps: float = 1e-5
    global_rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    local_attention: int = 128
    global_attn_every_n_layers: int = 3


class Layer(nn.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))`` with GEGLU; layer 0 has no norm before attention."""

    config: Config
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, segment_ids: jax.Array | None) -> jax.Array:
        """Run both branches, ``[b, n, e]`` to ``[b, n, e]``."""
        c = self.config
        norm = functools.partial(nn.LayerNorm, c.norm_eps, use_bias=False)
        normed = norm(name="attn_norm")(x) if self.index else x
        x += attention(c, self.index, name="self_attn")(normed, mask=mask, segment_ids=segment_ids)
        hidden = nn.Dense(2 * c.intermediate_size, use_bias=False, name="Wi")(norm(name="mlp_norm")(x))
        hidden, gate = jnp.split(hidden, 2, axis=-1)
        return x + nn.Dense(c.hidden_size, use_bias=False, name="Wo")(nn.gelu(hidden, approximate=False) * gate)


class ModernBert(nn.Module):
    """The encoder and its head for masked language modelling."""

    config: Config

    @nn.compact
    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Compute logits of tokens, ``[b, n]`` to ``[b, n, c]``; `mask` and `segment_ids` are ``[b, n]``."""
        c = self.config
        norm = functools.partial(nn.LayerNorm, c.norm_eps, use_bias=False)
        embedding = nn.Embed(c.vocab_size, c.hidden_size, name="tok_embeddings")
        x = norm(name="norm")(embedding(tokens))
        for i in range(c.num_hidden_layers):
            x = Layer(c, i, name=f"layers_{i}")(x, mask, segment_ids)
        x = nn.Dense(c.hidden_size, use_bias=False, name="head_dense")(norm(name="final_norm")(x))
        x = norm(name="head_norm")(nn.gelu(x, approximate=False))
        bias = self.param("decoder_bias", nn.initializers.zeros_init(), (c.vocab_size,))
        return embedding.attend(x) + bias[None, None]


def attention(config: Config, index: int, name: str) -> LocalMHA:
    """Build the attention of a layer."""
    is_global = index % config.global_attn_every_n_layers == 0
    d, side = config.hidden_size // config.num_attention_heads, config.local_attention // 2
    return LocalMHA(
        config.hidden_size,
        Window.everything() if is_global else Window.between(side, side),
        heads=config.num_attention_heads,
        dim_head=d,
        rotary=Rotary(d, config.global_rope_theta if is_global else config.local_rope_theta),
        name=name,
    )


RENAMED = {
    "model.embeddings.": "",
    "attn.Wqkv": "self_attn.qkv_proj",
    "attn.Wo": "self_attn.o_proj",
    "mlp.": "",
    "head.": "head_",
    "decoder.bias": "decoder_bias",
}


def modernbert_parameters(tensors: Mapping[str, np.ndarray]) -> dict:
    """Map published tensors to the parameters of `ModernBert`."""
    renamed = {}
    for name, x in tensors.items():
        for published, ours in RENAMED.items():
            name = name.replace(published, ours)
        renamed[name] = x
    return parameters(renamed)
