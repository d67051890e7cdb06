"""Sampling rules, and generation as one compiled loop."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.typing import Dtype
from jax import lax

from flax_local_attention.cache import check_cache_dtype
from flax_local_attention.checks import is_integer
from flax_local_attention.stacking import unstack_layers
from flax_local_attention.transformer import LocalTransformer

# Vocabularies in which each logit is compared with each.
FEW_LOGITS = 512

# Tokens made between questions whether all rows have ended.
TOGETHER = 8

# Prompt tokens taken at a time: bounds the logits of a long prompt to [b, chunk, c].
PREFILL_CHUNK = 512


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


def generate(
    model: LocalTransformer,
    variables: Any,
    prompt: jax.Array,
    length: int,
    *,
    rng: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos: int | None = None,
    prompt_lengths: jax.Array | None = None,
    prompt_mask: jax.Array | None = None,
    cache_dtype: Dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Continue prompts, a token at a time, in one compiled loop over a cache of O(window).

    Each token costs the same, whatever came before; without absolute embeddings the length is unlimited.
    Rules apply in the order temperature, `top_k`, `top_p`, `min_p`. A row's tokens depend on `rng`, its
    number and its prompt, not on the rows beside it. A second call with the same shapes, options (of the
    rates, whether they are given) and longest prompt compiles nothing.

    Args:
        model: Causal, with tokens. With `scan_layers=True` each call copies its layers once.
        variables: Of the model.
        prompt: Tokens to continue, ``[b, n]`` integers.
        length: New tokens, at least 1.
        rng: Random key; may be left out at temperature 0.
        temperature: Divides the logits. 0 takes the likeliest token.
        top_k: How many tokens may be drawn, see `keep_top_k`. None means all.
        top_p: How much probability may be drawn, see `keep_top_p`. None means all.
        min_p: Least probability, relative to the likeliest, see `keep_min_p`. None means any.
        eos: Token that ends a row. None means none does.
        prompt_lengths: Tokens of each row's prompt that exist, ``[b]`` in ``[1, n]``: prompts of unequal
            length stand at the left of `prompt`. None means all of them.
        prompt_mask: Tokens of the prompts that exist, ``[b, n]`` bool, at least one in a row, in place of
            `prompt_lengths`: they may stand anywhere, at the right as tokenizers pad for generation. Rows continue as
            they would without their padding.
        cache_dtype: Of the cached keys and values, floating. None means the model's.

    Returns:
        The new tokens ``[b, length]``, in prompt's dtype (int32 if that cannot hold every token), `eos` after
        a row's `eos`; and how many are the row's own ``[b]`` int32, `eos` included.

    Raises:
        TypeError: The prompt is not of integers.
        ValueError: A shape or value is wrong, or prompt and `length` do not fit the model's `max_seq_len`.

    Example:
        >>> model = LocalTransformer(num_tokens=16, max_seq_len=64, dim=32, depth=1, local_attn_window_size=8)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        >>> tokens, lengths = generate(model, variables, jnp.array([[1, 2, 3]]), 5, temperature=0.0)
        >>> tokens.shape, lengths
        ((1, 5), Array([5], dtype=int32))
    """
    prompt, prompt_lengths, dtype = _check_prompt(model, prompt, length, prompt_lengths, prompt_mask)
    if cache_dtype is not None:
        check_cache_dtype(cache_dtype)
    rules = _check_rules(model, rng, temperature, top_k, top_p, min_p, eos)
    model, variables = _unstacked(model, variables)
    logits, cache = _prefill(model, variables, prompt, prompt_lengths, prompt.shape[1] + length, cache_dtype)
    tokens, lengths, _ = _decode(model, variables, logits, cache, rules, length, bool(temperature == 0), top_k, eos)
    return tokens.astype(dtype), lengths


def stream(
    model: LocalTransformer,
    variables: Any,
    prompt: jax.Array,
    length: int,
    *,
    rng: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos: int | None = None,
    prompt_lengths: jax.Array | None = None,
    prompt_mask: jax.Array | None = None,
    cache_dtype: Dtype | None = None,
) -> Iterator[np.ndarray]:
    """Yield the tokens of `generate` as they come, ``[b]`` at a time; ends early when all rows have.

    Arguments, errors and tokens are those of `generate`. Bad arguments raise at the call.
    """
    prompt, prompt_lengths, dtype = _check_prompt(model, prompt, length, prompt_lengths, prompt_mask)
    if cache_dtype is not None:
        check_cache_dtype(cache_dtype)
    rules = _check_rules(model, rng, temperature, top_k, top_p, min_p, eos)
    model, variables = _unstacked(model, variables)

    def tokens():
        logits, cache = _prefill(model, variables, prompt, prompt_lengths, prompt.shape[1] + length, cache_dtype)
        done = jnp.zeros(prompt.shape[0], bool)
        for step in range(length):
            token, done = _draw_and_end(logits, done, rules, step, bool(temperature == 0), top_k, eos)
            yield np.asarray(token.astype(dtype))
            if step + 1 == length or bool(done.all()):
                return
            logits, cache = _step(model, variables, token, cache)

    return tokens()


def _unstacked(model, variables):
    """The same model and weights with layers that are not stacked, so that no step takes them apart."""
    if not getattr(model, "scan_layers", False):
        return model, variables
    return model.clone(scan_layers=False), jax.jit(unstack_layers)(variables)


class _Rules(NamedTuple):
    """The options of sampling that may change without compiling anew."""

    rng: jax.Array | None
    temperature: float
    top_p: float | None
    min_p: float | None


@partial(jax.jit, static_argnums=(0, 4, 5))
def _prefill(model, variables, prompt, lengths, max_length, cache_dtype):
    """Logits after each row's prompt, ``[b, c]`` float32, and the cache with the prompts in it."""
    b, n = prompt.shape
    chunk = min(n, PREFILL_CHUNK)
    prompt = jnp.pad(prompt, ((0, 0), (0, -n % chunk)))
    exists = jnp.arange(prompt.shape[1]) < lengths[:, None]

    def feed(carry, chunk):
        cache, last = carry
        tokens, exists = chunk
        logits, cache = model.apply(variables, tokens, mask=exists, cache=cache, deterministic=True)
        count = exists.sum(1)
        newest = jnp.take_along_axis(logits, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return (cache, jnp.where(count[:, None] > 0, newest.astype(jnp.float32), last)), None

    start = model.init_cache(b, cache_dtype, max_length), jnp.zeros((b, model.num_tokens), jnp.float32)
    chunks = tuple(rearrange(x, "b (m n) -> m b n", n=chunk) for x in (prompt, exists))
    (cache, logits), _ = lax.scan(feed, start, chunks)
    return logits, cache


@partial(jax.jit, static_argnums=(0, 5, 6, 7, 8), donate_argnums=3)
def _decode(model, variables, logits, cache, rules, length, greedy, top_k, eos):
    """All new tokens ``[b, length]``, how many are each row's own, and the cache (so that it can be donated)."""
    b, variables = logits.shape[0], _narrowed(model, nn.meta.unbox(variables))
    token, done = _draw_and_end(logits, jnp.zeros(b, bool), rules, 0, greedy, top_k, eos)
    tokens = jnp.full((b, length), 0 if eos is None else eos, jnp.int32).at[:, 0].set(token)

    def advance(_, state):
        step, token, tokens, done, lengths, cache = state
        logits, cache = _step(model, variables, token, cache)
        lengths += ~done
        token, done = _draw_and_end(logits, done, rules, step, greedy, top_k, eos)
        return step + 1, token, tokens.at[:, step].set(token), done, lengths, cache

    def advance_by(count):
        """Make the function that goes on by some tokens, as many as are known when it is compiled."""
        return lambda state: lax.fori_loop(0, count, advance, state)

    state = (jnp.int32(1), token, tokens, done, jnp.ones(b, jnp.int32), cache)
    if eos is None:
        state = advance_by(length - 1)(state)
    else:
        # A device goes through a loop of known length by itself. It is asked whether all rows have ended once a block.
        state = lax.while_loop(
            lambda state: (state[0] + TOGETHER <= length) & ~state[3].all(), advance_by(TOGETHER), state
        )
        rest = (length - 1) % TOGETHER
        state = lax.cond(state[3].all(), lambda state: state, advance_by(rest), state)
    _, _, tokens, _, lengths, cache = state
    return tokens, lengths, cache


def _narrowed(model, variables):
    """The same variables, with the weights that products cast to the model's dtype cast once, before the loop."""
    dtype = getattr(model, "dtype", None)
    if dtype is None:
        return variables

    def narrow(path, x):
        names = [getattr(key, "key", None) for key in path]
        is_cast = names[-1] in ("kernel", "embedding") and "global_attn" not in names
        return x.astype(dtype) if is_cast and x.dtype.itemsize > jnp.dtype(dtype).itemsize else x

    return jax.tree_util.tree_map_with_path(narrow, variables)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(model, variables, token, cache):
    """Logits after one more token in each row, ``[b, c]`` float32, and the grown cache."""
    logits, cache = model.apply(variables, token[:, None], cache=cache, deterministic=True)
    return logits[:, 0].astype(jnp.float32), cache


@partial(jax.jit, static_argnums=(4, 5, 6))
def _draw_and_end(logits, done, rules, step, greedy, top_k, eos):
    """The next token of each row, ``[b]`` int32 (`eos` in rows that are done), and which are done after it."""
    token = jnp.argmax(logits, axis=-1) if greedy else _draw(logits, rules, step, top_k)
    token = token.astype(jnp.int32)
    if eos is None:
        return token, done
    token = jnp.where(done, eos, token)
    return token, done | (token == eos)


def _draw(logits, rules, step, top_k):
    logits = logits / rules.temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if rules.top_p is not None:
        logits = keep_top_p(logits, rules.top_p)
    if rules.min_p is not None:
        logits = keep_min_p(logits, rules.min_p)

    def draw(row, logits):
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(rules.rng, row), step), logits)

    return jax.vmap(draw)(jnp.arange(logits.shape[0]), logits)


def _check_prompt(model, prompt, length, prompt_lengths, prompt_mask):
    """Raise unless the model can continue the prompts.

    Returns:
        Prompts as int32, at the left and cut to the longest; their lengths; and the dtype of the new tokens.
    """
    if model.num_tokens is None or not model.causal:
        raise ValueError(
            "`model` must be causal and have tokens to be generated from, got "
            f"num_tokens={model.num_tokens}, causal={model.causal}; use a language model."
        )
    prompt = np.asarray(prompt)
    if not np.issubdtype(prompt.dtype, np.integer):
        raise TypeError(f"`prompt` must be integer tokens, got {prompt.dtype}; encode the text first.")
    if prompt.ndim != 2 or prompt.size == 0:
        raise ValueError(f"`prompt` must be [b, n] with at least one token a row, got shape {prompt.shape}.")
    exists = _existing(prompt, prompt_lengths, prompt_mask)
    if not is_integer(length) or length < 1:
        raise ValueError(f"`length` must be an int of at least 1, got {length!r}; it counts the new tokens.")
    existing = prompt[exists]
    wrong = existing[(existing < 0) | (existing >= model.num_tokens)]
    if wrong.size:
        raise ValueError(
            f"`prompt` must hold tokens in [0, {model.num_tokens}), got {wrong[0]}; give shorter rows by "
            "`prompt_lengths` or `prompt_mask`, not by a padding token."
        )
    lengths = exists.sum(1)
    longest = int(lengths.max())
    if model.use_abs_pos_emb and longest + length - 1 > model.max_seq_len:
        raise ValueError(
            f"Prompt and new tokens must fit `max_seq_len` ({model.max_seq_len}), got {longest} and {length}; ask "
            "for fewer, or train a model with `use_abs_pos_emb=False` for unlimited length."
        )
    dtype = jax.dtypes.canonicalize_dtype(prompt.dtype)
    if np.iinfo(dtype).max < model.num_tokens - 1:
        dtype = jnp.int32
    order = np.argsort(~exists, axis=1, kind="stable")[:, :longest]  # those that exist first, as they stand
    prompt = np.where(np.arange(longest) < lengths[:, None], np.take_along_axis(prompt, order, 1), 0)
    return jnp.asarray(prompt.astype(np.int32)), jnp.asarray(lengths, jnp.int32), dtype


def _existing(prompt, lengths, mask):
    """Which tokens of the prompts exist, ``[b, n]`` bool."""
    b, n = prompt.shape
    if mask is None:
        lengths = np.full(b, n) if lengths is None else np.asarray(lengths)
        if not np.issubdtype(lengths.dtype, np.integer):
            raise TypeError(f"`prompt_lengths` must be integers, got {lengths.dtype}; they count tokens.")
        if lengths.shape != (b,) or lengths.min() < 1 or lengths.max() > n:
            raise ValueError(
                f"`prompt_lengths` must be [{b}], each from 1 to {n}, got {lengths.tolist()}; "
                "a row needs a token to begin with."
            )
        return np.arange(n) < lengths[:, None]
    if lengths is not None:
        raise ValueError("`prompt_mask` takes the place of `prompt_lengths`, got both; give one or the other.")
    mask = np.asarray(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"`prompt_mask` must be bool, True where a token exists, got {mask.dtype}; compare it with 0.")
    if mask.shape != (b, n) or not mask.any(1).all():
        raise ValueError(
            f"`prompt_mask` must be [{b}, {n}] with a True in each row, got shape {mask.shape} with "
            f"{mask.sum(-1).tolist()} of them; a row needs a token to begin with."
        )
    return mask


def _check_rules(model, rng, temperature, top_k, top_p, min_p, eos):
    if not temperature >= 0:
        raise ValueError(f"`temperature` must be at least 0, got {temperature}; 0 takes the likeliest token.")
    if temperature > 0 and rng is None:
        raise ValueError(
            f"`rng` must be given to sample at temperature {temperature}, got None; pass jax.random.key(0), say, "
            "or `temperature=0.0`."
        )
    if top_k is not None and (not is_integer(top_k) or top_k < 1):
        raise ValueError(f"`top_k` must be an int of at least 1, got {top_k!r}; None keeps all.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}; None keeps all.")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"`min_p` must be in [0, 1], got {min_p}; None keeps all.")
    if eos is not None and not (is_integer(eos) and 0 <= eos < model.num_tokens):
        raise ValueError(f"`eos` must be a token in [0, {model.num_tokens}), got {eos!r}; None ends no row.")
    return _Rules(rng, temperature, top_p, min_p)
