"""Sampling: which tokens may be drawn from logits, and drawing one."""

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

# Vocabularies in which each logit is compared with each.
FEW_LOGITS = 512


@struct.dataclass
class Sampling:
    """How tokens are drawn: made and checked by `create`, and one argument of jitted functions.

    The rates `temperature`, `top_p` and `min_p` are traced: another rate compiles nothing. Static are `top_k`, `eos`
    and whether a rate is given.

    Attributes:
        temperature: Divides the logits. None takes the likeliest token.
        top_k: Sample from the k likeliest tokens only, see `keep_top_k`. None keeps all.
        top_p: Sample from the fewest tokens that have this probability together, see `keep_top_p`. None keeps all.
        min_p: Sample from tokens with this share of the likeliest's probability, see `keep_min_p`. None keeps all.
        eos: Tokens of which each ends a row. The first stands in a row after its end. Empty if nothing ends one.

    Example:
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
        """Check options and make their value; `check_eos` checks `eos`, where the vocabulary is known.

        Args:
            temperature: At least 0; 0 takes the likeliest token.
            top_k: At least 1.
            top_p: In ``(0, 1]``.
            min_p: In ``[0, 1]``.
            eos: A token, or several of them.

        Raises:
            ValueError: An option is out of range.
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
        """Raise unless every `eos` is a token in a vocabulary of `num_tokens`."""
        for token in self.eos:
            if not (is_integer(token) and 0 <= token < num_tokens):
                raise ValueError(
                    f"`eos` must be a token in [0, {num_tokens}), got {token!r}; give one, several, or None."
                )

    def ends(self, token: jax.Array) -> jax.Array:
        """Return which of the tokens, ``[b]``, end their rows; `eos` has one at least."""
        return reduce(operator.or_, (token == end for end in self.eos))


def _number(rate):
    """Return a rate as a Python float, so that an int, or one of NumPy, compiles no other program."""
    return None if rate is None else float(rate)


def _tokens(eos):
    """Return one token, or several, as a tuple of Python numbers; empty for None."""
    if eos is None:
        return ()
    tokens = np.atleast_1d(np.asarray(eos, object)).tolist()
    for token in tokens:
        if not is_integer(token):
            raise TypeError(f"`eos` must be a token or several, integers, got {describe(eos)}; None ends no row.")
    return tuple(map(int, tokens))


def draw_tokens(logits: jax.Array, sampling: Sampling, rng: jax.Array | None, step: int | jax.Array) -> jax.Array:
    """Draw a token for each row. It depends on the row's number and logits, on `rng` and `step`, not on other rows.

    Args:
        logits: ``[b, c]``.
        sampling: Rules of which tokens may be drawn.
        rng: Random key; may be None where the likeliest token is taken.
        step: Number of the new token, from 0.

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
    """Divide logits, ``[..., c]``, by the temperature, then rule out tokens by `top_k`, `top_p` and `min_p`."""
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
    """Rule out all but the k largest logits (and those equal to the k-th).

    The original's ``filter_thres`` keeps ``k = max(1, int((1 - filter_thres) * c))`` of c tokens.

    Args:
        logits: ``[..., c]``.
        k: How many to keep, at least 1; as many as there are keeps all.

    Returns:
        ``[..., c]``, -inf where ruled out.
    """
    c = logits.shape[-1]
    if c <= FEW_LOGITS:  # counting those that are larger is one operation, where a sort is many
        larger = (logits[..., None, :] > logits[..., :, None]).sum(-1, dtype=jnp.int32)
        return jnp.where(larger >= k, -jnp.inf, logits)
    smallest = lax.top_k(logits, min(k, c))[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """Rule out all but the fewest most likely tokens whose probabilities add up to p (nucleus sampling).

    Args:
        logits: ``[..., c]``.
        p: In ``(0, 1]``; 1 keeps all.

    Returns:
        ``[..., c]``, -inf where ruled out.

    Source: arXiv 1904.09751, section 3.1.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the more likely ones
    smallest = jnp.min(jnp.where((before < p) | (p >= 1), ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_min_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """Rule out tokens less likely than p times the likeliest.

    Args:
        logits: ``[..., c]``.
        p: In ``[0, 1]``; 0 keeps all.

    Returns:
        ``[..., c]``, -inf where ruled out.

    Source: arXiv 2407.01082, section 3.
    """
    return jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)
