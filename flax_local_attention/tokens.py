"""The tokens of a call with their masks, documents and positions, and checks of token values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_local_attention.array_checks import check_integers
from flax_local_attention.exchange import next_of_spread
from flax_local_attention.sharding import read_known, spec_of


class Tokens(NamedTuple):
    """The checked tokens of a call with their masks, documents and positions.

    Attributes:
        x: Tokens, ``[b, n]`` int32, or continuous ones, ``[b, n, e]``.
        mask: The mask as given, which may differ between heads.
        exists: Which tokens any head may see, ``[b, n]`` bool.
        segment_ids: Documents, ``[b, n]`` integers.
        positions: Explicit positions, ``[b, n]`` int32.
    """

    x: jax.Array
    mask: jax.Array | None = None
    exists: jax.Array | None = None
    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None

    def with_next(self, end: int) -> tuple["Tokens", "Tokens"]:
        """Return all tokens but the last of each row, and the token that follows each of them.

        Rows that are spread over explicit mesh axes keep their last token, so that shards stay equal. The token `end`
        then follows it.

        Args:
            end: Token that follows the last one.
        """
        if spec_of(self.x)[1] is None:
            return jax.tree.map(lambda x: x[..., :-1], self), jax.tree.map(lambda x: x[..., 1:], self)
        exists, ids = (None if x is None else next_of_spread(x, self.x, 0) for x in (self.exists, self.segment_ids))
        return self, Tokens(next_of_spread(self.x, self.x, end), exists=exists, segment_ids=ids)


def to_int32(x):
    """Cast tokens to int32, clipped to its range, whose ends are outside any vocabulary.

    A plain cast would wrap large tokens around, possibly into the vocabulary.
    """
    limits, own = jnp.iinfo(jnp.int32), jnp.iinfo(x.dtype)
    if own.max > limits.max:  # NumPy arrays by NumPy: JAX would first truncate int64
        clip = np.clip if isinstance(x, np.ndarray) else jnp.clip
        x = clip(x, max(limits.min, own.min), limits.max)
    return jnp.asarray(x).astype(jnp.int32)


def check_vocabulary(x: jax.Array, exists: jax.Array | None, num_tokens: int, ignore_index: int):
    """Raise if a known token that is not masked is neither in the vocabulary nor `ignore_index`."""
    tokens, there = read_known(x), True if exists is None else read_known(exists)
    if tokens is None or there is None:
        return
    wrong = tokens[((tokens < 0) | (tokens >= num_tokens)) & (tokens != ignore_index) & there]
    if wrong.size:
        raise ValueError(
            f"`x` must be tokens in [0, {num_tokens}), `ignore_index` ({ignore_index}) or masked, "
            f"got {wrong[0]}; check the tokenizer against `num_tokens`."
        )


def check_labels(labels: jax.Array, shape: tuple[int, ...], num_tokens: int, ignore_index: int):
    """Raise unless labels are integers of the tokens' shape, and known labels are tokens or `ignore_index`."""
    check_integers("labels", labels, "pass the next token of each token of x")
    if labels.shape != shape:
        raise ValueError(
            f"`labels` must be the next token of each token of x, {list(shape)}, got shape {labels.shape}; slice both "
            "from the same rows: `rows[:, :-1]` and `rows[:, 1:]`."
        )
    known = read_known(labels)
    wrong = None if known is None else known[((known < 0) | (known >= num_tokens)) & (known != ignore_index)]
    if wrong is not None and wrong.size:
        raise ValueError(
            f"`labels` must be in [0, {num_tokens}) or `ignore_index` ({ignore_index}), got {wrong[0]}; check the "
            "tokenizer against `num_tokens`."
        )


def check_token_shape(x: jax.Array):
    """Raise unless tokens are integers, ``[b, n]``."""
    check_integers("x", x, "for continuous input set `num_tokens=None`")
    if x.ndim != 2:
        raise ValueError(f"`x` must be tokens [b, n], got shape {x.shape}; reshape it.")


def check_continuous(x: jax.Array, dim: int):
    """Raise unless continuous input is floating, ``[b, n, e]`` with e = dim."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be of a floating dtype when `num_tokens` is None, got {x.dtype}; cast it.")
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"`x` must be [b, n, {dim}] when `num_tokens` is None, got shape {x.shape}; project it.")


def check_room(positions: np.ndarray | jax.Array, exists: jax.Array | None, max_seq_len: int):
    """Raise if indices or known positions are outside the position table; traced positions embed as NaN there."""
    there = positions
    if not isinstance(positions, np.ndarray):
        there, is_there = read_known(positions), ... if exists is None else read_known(exists)
        if there is None or is_there is None:
            return
        there = there[is_there]
    if there.size and (there.max() >= max_seq_len or there.min() < 0):
        wrong = f"{there.max() + 1} tokens" if there.min() >= 0 else f"position {there.min()}"
        raise ValueError(
            f"The sequence must be at most `max_seq_len` ({max_seq_len}) long, got {wrong}; "
            "shorten it, or set `use_abs_pos_emb=False` for unlimited length."
        )
