"""What the recipes share: a gated feed-forward, a pre-norm layer, a decoder and greedy decoding.

Modules have the names of published checkpoints, by which `weights.parameters` maps their tensors. A layer is called as
``layer(x, mask, cache)`` and returns x and the updated cache, or None without one; its attribute `self_attn` is its
`LocalMHA`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_local_attention import KVCache, LocalMHA

Caches = Sequence[KVCache]


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``: SwiGLU, or GEGLU with ``nn.gelu``."""

    width: int
    activation: Callable[[jax.Array], jax.Array] = nn.silu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform each token on its own, ``[b, n, e]`` to ``[b, n, e]``."""
        gate, up = (nn.Dense(self.width, use_bias=False, name=name)(x) for name in ("gate_proj", "up_proj"))
        return nn.Dense(x.shape[-1], use_bias=False, name="down_proj")(self.activation(gate) * up)


class PreNormLayer(nn.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))``: the layer of Llama, Mistral, Qwen and GPT-OSS."""

    self_attn: LocalMHA
    mlp: nn.Module
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run both branches, ``[b, n, e]`` to ``[b, n, e]``."""
        norm = functools.partial(nn.RMSNorm, self.epsilon)
        attended, cache = attend(self.self_attn, norm(name="input_layernorm")(x), mask, cache)
        x += attended
        return x + self.mlp(norm(name="post_attention_layernorm")(x)), cache


class Decoder(nn.Module):
    """A language model: embedding, layers, final norm and head.

    Attributes:
        vocab_size, hidden_size: Rows and columns of the embedding.
        layers: The layers.
        norm: The norm before the head.
        tie_word_embeddings: Use the embedding as the head.
        embed_scale: Factor on the embedded tokens.
        logit_scale: Factor on the logits.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[nn.Module, ...]
    norm: nn.Module
    tie_word_embeddings: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None, caches: Caches | None = None) -> Any:
        """Compute logits of tokens, ``[b, n]`` to ``[b, n, c]``; with caches, also return the updated caches.

        `mask`, ``[b, n]`` bool, is False for padding, on either side; padding is not cached.
        """
        embedding = nn.Embed(self.vocab_size, self.hidden_size, name="embed_tokens")
        x, updated = run(self.layers, embedding(tokens) * self.embed_scale, mask, caches)
        x = self.norm(x)
        head = embedding.attend if self.tie_word_embeddings else nn.Dense(self.vocab_size, False, name="lm_head")
        logits = head(x) * self.logit_scale
        return logits if caches is None else (logits, updated)

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int) -> Caches:
        """Return empty caches: a sliding layer caches its window, a global one `max_length` tokens."""
        return init_caches(self.layers, batch, max_length)


def attend(
    attention: LocalMHA, x: jax.Array, mask: jax.Array | None, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None]:
    """Attend, ``[b, n, e]`` to ``[b, n, e]``; return the result and the updated cache, or None without one."""
    out = attention(x, mask=mask, cache=cache)
    return out if cache is not None else (out, None)


def run(
    layers: Sequence[nn.Module], x: jax.Array, mask: jax.Array | None, caches: Caches | None
) -> tuple[jax.Array, tuple]:
    """Run layers one after the other, each with its cache if there are any; return x and the updated caches."""
    updated = []
    for layer, cache in zip(layers, caches or [None] * len(layers), strict=True):
        x, cache = layer(x, mask, cache)
        updated.append(cache)
    return x, tuple(updated)


def init_caches(layers: Sequence[Any], batch: int, max_length: int | None = None) -> Caches:
    """Return an empty cache for each layer; layers without a window cache `max_length` tokens."""
    return tuple(layer.self_attn.init_cache(batch, max_length=max_length) for layer in layers)


@functools.partial(jax.jit, static_argnames=("model", "length"))
def greedy(model: Decoder, variables: Any, prompts: jax.Array, mask: jax.Array, length: int) -> jax.Array:
    """Continue prompts with the likeliest token at each step.

    Args:
        model, variables: The model and its variables.
        prompts: Tokens, ``[b, n]``, padded on the left.
        mask: False for padding, ``[b, n]`` bool.
        length: Tokens to generate.

    Returns:
        New tokens, ``[b, length]``.
    """
    b, n = prompts.shape
    logits, caches = model.apply(variables, prompts, mask, model.init_cache(b, n + length))

    def step(state, _):
        token, caches = state
        logits, caches = model.apply(variables, token[:, None], None, caches)
        return (jnp.argmax(logits[:, -1], -1), caches), token

    first = jnp.argmax(logits[:, -1], -1)
    _, tokens = jax.lax.scan(step, (first, caches), length=length)
    return tokens.T
