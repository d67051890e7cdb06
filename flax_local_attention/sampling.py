"""Sampling tokens from logits."""

import operator
from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from flax_local_attention.array_checks import to_number
from flax_local_attention.checks import (
    check_count,
    check_number,
    describe,
    is_integer,
    optional,
)

# Largest vocabulary whose top k are found by comparing all pairs of logits.
FEW_LOGITS = 512


@struct.dataclass
class Sampling:
    """Rules of sampling, checked by `create`; a single argument of jitted functions.

    The rates `temperature`, `top_p` and `min_p` are traced, so another rate compiles nothing. `top_k`, `eos` and
    whether a rate is given are static.

    Attributes:
        temperature: Divisor of the logits. None takes the likeliest token.
        top_k: Sample from the k likeliest tokens only, see `keep_top_k`. None keeps all.
        top_p: Sample from the fewest tokens whose probabilities add up to this, see `keep_top_p`. None keeps all.
        min_p: Sample from tokens with at least this share of the likeliest token's probability, see `keep_min_p`. None
            keeps all.
        eos: Tokens that each end a row. The first one fills a row after its end. Empty if no token ends rows.

    Examples:
        >>> sampling = Sampling.create(temperature=0.7, top_k=40, top_p=0.9)
        >>> jax.tree.leaves(sampling)
        [0.7, 0.9]
        >>> jax.tree.structure(sampling) == jax.tree.structure(sampling.replace(top_p=0.8))
        True
    """

    temperature: float | jax.Array | None = 1.0
    top_k: int | None = struct.field(pytree_node=False, default=None)
    top_p: float | jax.Array | None = None
    min_p: float | jax.Array | None = None
    eos: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @classmethod
    def create(
        cls,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos: int | Sequence[int] | None = None,
    ) -> "Sampling":
        """Check the rules and make their value. `check_eos` checks `eos` once the vocabulary is known.

        Args:
            temperature: At least 0; 0 takes the likeliest token.
            top_k: At least 1.
            top_p: In ``(0, 1]``.
            min_p: In ``[0, 1]``.
            eos: A token, or several of them.

        Raises:
            TypeError: A rule has the wrong type.
            ValueError: A rule is out of range.
        """
        temperature, top_p, min_p = (to_number(rate) for rate in (temperature, top_p, min_p))
        check_number("temperature", temperature)
        if not temperature >= 0:
            raise ValueError(f"`temperature` must be at least 0, got {temperature}; 0 takes the likeliest token.")
        if top_k is not None:
            check_count("top_k", top_k, 1)
        optional(check_number)("top_p", top_p)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {top_p}; None keeps all.")
        optional(check_number)("min_p", min_p)
        if min_p is not None and not 0 <= min_p <= 1:
            raise ValueError(f"`min_p` must be in [0, 1], got {min_p}; None keeps all.")
        return cls(_number(temperature) or None, top_k, _number(top_p), _number(min_p), _tokens(eos))

    def check_eos(self, num_tokens: int):
        """Raise unless every `eos` is in the vocabulary of `num_tokens` tokens."""
        for token in self.eos:
            if not (is_integer(token) and 0 <= token < num_tokens):
                raise ValueError(
                    f"`eos` must be a token in [0, {num_tokens}), got {token!r}; give one, several, or None."
                )

    def ends(self, token: jax.Array) -> jax.Array:
        """Return which tokens, ``[b]``, end their rows; requires at least one `eos`."""
        return reduce(operator.or_, (token == end for end in self.eos))


def _number(rate):
    """Return a rate as a Python float, so that an int or a NumPy number does not compile another program."""
    return None if rate is None else float(rate)


def _tokens(eos):
    """Return one or several tokens as a tuple of Python ints; empty for None."""
    if eos is None:
        return ()
    tokens = np.atleast_1d(np.asarray(eos, object)).tolist()
    for token in tokens:
        if not is_integer(token):
            raise TypeError(f"`eos` must be an integer or several, got {describe(eos)}; None ends no row.")
    return tuple(map(int, tokens))


def draw_tokens(logits: jax.Array, sampling: Sampling, rng: jax.Array | None, step: int | jax.Array) -> jax.Array:
    """Draw a token for each row, which depends on the row's index and logits, `rng` and `step`, not on other rows.

    Args:
        logits: ``[b, c]``.
        sampling: Rules of sampling.
        rng: Random key; may be None if the likeliest token is taken.
        step: Index of the new token, from 0.

    Returns:
        ``[b]`` int32.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(partial(_draw_token, rng, step))
    return draw(jnp.arange(logits.shape[0]), apply_rules(logits, sampling)).astype(jnp.int32)


def _draw_token(rng, step, row, logits):
    key = jax.random.fold_in(jax.random.fold_in(rng, row), step)
    return jax.random.categorical(key, logits)


def apply_rules(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Divide logits, ``[..., c]``, by the temperature, then exclude tokens by `top_k`, `top_p` and `min_p`."""
    if sampling.temperature is not None:
        logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Exclude all but the k largest logits; logits equal to the k-th are kept too.

    The original's ``filter_thres`` keeps ``k = max(1, int((1 - filter_thres) * c))`` of c tokens.

    Args:
        logits: ``[..., c]``.
        k: How many to keep, at least 1; c or more keeps all.

    Returns:
        ``[..., c]``, -inf for excluded tokens.
    """
    c = logits.shape[-1]
    if c <= FEW_LOGITS:  # counting larger logits is one operation, a sort is many
        larger = (logits[..., None, :] > logits[..., :, None]).sum(-1, dtype=jnp.int32)
        return jnp.where(larger >= k, -jnp.inf, logits)
    smallest = lax.top_k(logits, min(k, c))[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """Exclude all but the fewest likeliest tokens whose probabilities add up to p (nucleus sampling).

    Args:
        logits: ``[..., c]``.
        p: In ``(0, 1]``; 1 keeps all.

    Returns:
        ``[..., c]``, -inf for excluded tokens.

    Source: arXiv 1904.09751, section 3.1.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # total probability of the likelier tokens
    smallest = jnp.min(jnp.where((before < p) | (p >= 1), ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_min_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """Exclude tokens whose probability is less than p times the likeliest token's.

    Args:
        logits: ``[..., c]``.
        p: In ``[0, 1]``; 0 keeps all.

    Returns:
        ``[..., c]``, -inf for excluded tokens.

    Source: arXiv 2407.01082, section 3.
    """
    return jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)
