"""Longformer (arXiv 2004.05150): an encoder with local windows and a few global tokens, which see and are seen by all.

A window spans `attention_window` tokens, half on either side. Which tokens are global depends on the task: the first
one to classify a text, those of the question to answer it. They have separate query, key and value projections.

    import jax
    from safetensors.numpy import load_file

    from examples.recipes.longformer import Config, Longformer, longformer_parameters, places_of
    from examples.recipes.weights import load

    model = Longformer(Config())
    variables = load(model, longformer_parameters(load_file("model.safetensors")))
    places = places_of(global_mask)  # indices of the global tokens, [b, n] bool to [b, m]
    states = jax.jit(model.apply)(variables, tokens, mask, places)  # [b, n] to [b, n, e], padding on either side

Time is linear in n for a fixed number m of global tokens. Another m compiles again; to avoid that, pad `places` with n,
which stands for no token.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from examples.recipes.weights import parameters
from flax_local_attention import LocalAttention, Window


@dataclasses.dataclass(frozen=True)
class Config:
    """The names of published configurations, with the values of longformer-base-4096 as defaults."""

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 4098
    type_vocab_size: int = 1
    pad_token_id: int = 1
    attention_window: tuple[int, ...] = (512,) * 12


class Attention(nn.Module):
    """Attention to a window and the global tokens; global tokens attend to all, with separate projections."""

    config: Config
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, places: jax.Array) -> jax.Array:
        """Attend, ``[b, n, e]`` to ``[b, n, e]``; `mask` and `places` are as in `Longformer`."""
        c = self.config
        dense = functools.partial(nn.Dense, c.hidden_size)
        heads = functools.partial(rearrange, pattern="b n (h d) -> b h n d", h=c.num_attention_heads)

        q, k, v = (dense(name=name)(x) for name in ("query", "key", "value"))
        side = c.attention_window[self.index] // 2
        local = LocalAttention(Window.between(side, side))
        global_keys = heads(pick(k, places)), heads(pick(v, places)), pick(mask, places)
        out = local(heads(q), heads(k), heads(v), put(mask, places, False), global_keys=global_keys)

        q = dense(name="query_global")(pick(x, places))
        k, v = (dense(name=name)(x) for name in ("key_global", "value_global"))
        own = LocalAttention(Window.everything())(heads(q), heads(k), heads(v), mask)
        out, own = (rearrange(y, "b h n d -> b n (h d)") for y in (out, own))
        return dense(name="output")(put(out, places, own))


def pick(x: jax.Array, places: jax.Array) -> jax.Array:
    """Return the entries of x at `places`, ``[b, n, ...]`` to ``[b, m, ...]``; zeros where a place is n."""
    return x.at[jnp.arange(len(x))[:, None], places].get(mode="fill", fill_value=0)


def put(x: jax.Array, places: jax.Array, entries: jax.typing.ArrayLike) -> jax.Array:
    """Replace the entries of x, ``[b, n, ...]``, at `places` by `entries`, ``[b, m, ...]``; skip places that are n."""
    return x.at[jnp.arange(len(x))[:, None], places].set(entries, mode="drop")


class Layer(nn.Module):
    """``x = norm(x + attention(x))``, then ``x = norm(x + output(gelu(intermediate(x))))``."""

    config: Config
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, places: jax.Array) -> jax.Array:
        """Run both branches, ``[b, n, e]`` to ``[b, n, e]``."""
        c, norm = self.config, functools.partial(nn.LayerNorm, self.config.layer_norm_eps)
        attended = Attention(c, self.index, name="attention")(x, mask, places)
        x = norm(name="attention_norm")(x + attended)
        hidden = nn.gelu(nn.Dense(c.intermediate_size, name="intermediate")(x), approximate=False)
        return norm(name="norm")(x + nn.Dense(c.hidden_size, name="output")(hidden))


class Longformer(nn.Module):
    """The encoder."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None, places: jax.Array | None = None) -> jax.Array:
        """Encode tokens, ``[b, n]`` to ``[b, n, e]``.

        `mask`, ``[b, n]`` bool, is False for padding; `places`, ``[b, m]`` integers from `places_of`, are the indices
        of the global tokens.
        """
        c = self.config
        mask = jnp.ones_like(tokens, bool) if mask is None else jnp.asarray(mask)
        places = jnp.zeros((len(tokens), 0), int) if places is None else places
        x = nn.Embed(c.vocab_size, c.hidden_size, name="word_embeddings")(tokens)
        positions = c.pad_token_id + jnp.where(mask, jnp.cumsum(mask, 1), 0)
        x += nn.Embed(c.max_position_embeddings, c.hidden_size, name="position_embeddings")(positions)
        x += nn.Embed(c.type_vocab_size, c.hidden_size, name="token_type_embeddings")(jnp.zeros_like(tokens))
        x = nn.LayerNorm(c.layer_norm_eps, name="norm")(x)
        for i in range(c.num_hidden_layers):
            x = Layer(c, i, name=f"layers_{i}")(x, mask, places)
        return x


def places_of(global_mask: np.ndarray) -> np.ndarray:
    """Return the indices of global tokens, ``[b, n]`` bool to ``[b, m]``; rows with fewer than m are filled with n."""
    n = global_mask.shape[1]
    return np.sort(np.where(global_mask, np.arange(n), n))[:, : global_mask.sum(1).max()]


RENAMED = {
    "embeddings.LayerNorm": "norm",
    "encoder.layer.": "layers.",
    "attention.self.": "attention.",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "norm",
}


def longformer_parameters(tensors: Mapping[str, np.ndarray]) -> dict:
    """Map published tensors to the parameters of `Longformer`, which has no head and no pooler."""
    renamed = {}
    for name, x in tensors.items():
        part, _, rest = name.removeprefix("longformer.").partition(".")
        if part not in ("embeddings", "encoder") or rest == "position_ids":
            continue
        name = rest if rest.endswith("embeddings.weight") else f"{part}.{rest}"
        for published, ours in RENAMED.items():
            name = name.replace(published, ours)
        renamed[name] = x
    return parameters(renamed)
