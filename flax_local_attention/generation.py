"""Generation of tokens, in one compiled loop or as a stream."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from flax_local_attention.array_checks import check_integers, check_key, check_mask
from flax_local_attention.cache import TransformerCache, check_cache_dtype
from flax_local_attention.checks import (
    check_count,
    check_flag,
    check_kind,
    describe,
)
from flax_local_attention.residual_streams import prepare_connections
from flax_local_attention.sampling import Sampling, draw_tokens
from flax_local_attention.sharding import read_known, spec_of, spread_by_compiler, vary_like
from flax_local_attention.stacking import unstack_layers
from flax_local_attention.tokens import to_int32
from flax_local_attention.transformer import LocalTransformer

# Tokens generated between two checks whether all rows have ended.
STEPS_PER_CHECK = 8

# Most logits of a prefill chunk, [b, chunk, c], and the fewest and most tokens of a chunk, which take precedence.
PREFILL_LOGITS, PREFILL_CHUNKS = 2**24, (512, 4096)


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
    eos: int | Sequence[int] | None = None,
    prompt_lengths: jax.Array | None = None,
    prompt_mask: jax.Array | None = None,
    cache_dtype: Dtype | None = None,
    cache: TransformerCache | None = None,
    return_log_probs: bool = False,
) -> tuple[Any, ...]:
    """Continue prompts token by token, in one compiled loop over a cache of O(window).

    Each token costs the same, however long the text before it. Without absolute embeddings the length is unlimited.
    Sampling applies temperature, `top_k`, `top_p` and `min_p` in this order. There is no repetition penalty: a token's
    distribution is a function of the model alone. A row's tokens depend on `rng`, its number and its prompt, not on
    other rows. A second call with the same shapes and options compiles nothing, whatever the values of the rates. Rows
    of a prompt that is spread over devices stay spread. In a compiled function the values of traced prompts are not
    checked.

    Args:
        model: Causal model with a vocabulary. With `scan_layers=True` each call copies the layers once.
        variables: Variables of the model.
        prompt: Tokens to continue, ``[b, n]`` integers.
        length: Number of new tokens, at least 1.
        rng: Random key; not required at temperature 0.
        temperature: Divisor of the logits. 0 takes the likeliest token.
        top_k: Sample from the k likeliest tokens only. None keeps all.
        top_p: Sample from the fewest tokens whose probabilities add up to this. None keeps all.
        min_p: Sample from tokens with at least this share of the likeliest token's probability. None keeps all.
        eos: Token that ends a row, or several such tokens. None ends no row.
        prompt_lengths: Number of existing tokens in each row of `prompt`, ``[b]`` in ``[1, n]``, for prompts of unequal
            length that are padded on the right. None means all.
        prompt_mask: Which tokens of `prompt` exist, ``[b, n]`` bool, at least one in a row, in place of
            `prompt_lengths`. Padding may be anywhere, for example on the left, where tokenizers put it for generation.
            Rows continue as they would without padding.
        cache_dtype: Floating dtype of the cached keys and values. None means the model's.
        cache: The tokens before the prompt, from the model's `init_cache` or an earlier call. It is not donated, so
            several calls may continue from it. New tokens belong to the document of its last token.
        return_log_probs: Also return the log-probabilities of the new tokens.

    Returns:
        A tuple of up to four entries:

        * The new tokens, ``[b, length]``, in the prompt's dtype (int32 if it cannot hold every token). All tokens after
          a row's end are `eos`, the first one if there are several.
        * The number of tokens up to each row's end, ``[b]`` int32, `eos` included.
        * With `return_log_probs=True`: the log-probability of each token, ``[b, length]`` float32, under the model's
          own distribution, the log-softmax of its logits before temperature and other rules. 0 after a row's end.
        * With `cache`: the grown cache. It holds the tokens of each row up to its end: those that were in it, the
          prompt and the new tokens, the last one included. A call with this cache and another prompt continues as if
          all these tokens were its prompt.

    Raises:
        TypeError: `model` is not a `LocalTransformer` (a model inside an NNX module is not) or is bound; the prompt is
            not integers, or `cache` is not a `TransformerCache`.
        ValueError: A shape or value is wrong, the cache does not belong to this model and these rows, or the cached
            tokens, the prompt and `length` together exceed the model's `max_seq_len`.

    Examples:
        >>> model = LocalTransformer(num_tokens=16, max_seq_len=64, dim=32, depth=1, local_attn_window_size=8)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        >>> tokens, lengths = generate(model, variables, jnp.array([[1, 2, 3]]), 5, temperature=0.0)
        >>> tokens.shape, lengths
        ((1, 5), Array([5], dtype=int32))
        >>> *_, cache = generate(
        ...     model, variables, jnp.array([[1, 2, 3]]), 5, temperature=0.0, cache=model.init_cache(batch=1)
        ... )
        >>> answer, _, cache = generate(model, variables, jnp.array([[4, 5]]), 6, temperature=0.0, cache=cache)
        >>> cache.length
        Array([16], dtype=int32)
    """
    sampling = Sampling.create(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, eos=eos)
    check_flag("return_log_probs", return_log_probs)
    prompts = _read_prompts(prompt, prompt_lengths, prompt_mask)
    start = _Start(cache, cache_dtype)
    request = _check_request(model, variables, prompts, length, sampling, start, rng)
    wanted = _Wanted(request.length, return_log_probs, cache is not None)

    def run(variables, prompt, cache, segment_ids):
        logits, prefilled = request.prefill(variables, prompt, cache, segment_ids)
        new = _decode(request.model, variables, logits, prefilled, sampling, rng, wanted, segment_ids)
        further = (new.log_probs, new.cache if wanted.cache else None)
        return new.tokens.astype(request.dtype), new.lengths, *(x for x in further if x is not None)

    def specs():
        rows = spec_of(request.prompt.tokens, rank=1)
        of_cache = jax.tree.map(lambda x: PartitionSpec(*rows, *spec_of(x)[1:]), cache)
        return rows, rows, *([rows] if wanted.log_probs else []), *([of_cache] if wanted.cache else [])

    return spread_by_compiler(run, request.arrays, specs)


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
    eos: int | Sequence[int] | None = None,
    prompt_lengths: jax.Array | None = None,
    prompt_mask: jax.Array | None = None,
    cache_dtype: Dtype | None = None,
    cache: TransformerCache | None = None,
) -> Iterator[np.ndarray]:
    """Yield the tokens of `generate` one position at a time, and stop early once all rows have ended.

    The arguments, errors and tokens are the same as in `generate`. Wrong arguments raise at the call, not at the first
    token. A stream may be abandoned at any token, so it returns no grown cache. To continue, pass the next call the
    same `cache`, and a prompt of this prompt, the tokens taken and the new text. For log-probabilities, use `generate`.

    Yields:
        The next token of each row, ``[b]``, as a NumPy array.
    """
    sampling = Sampling.create(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, eos=eos)
    prompts = _read_prompts(prompt, prompt_lengths, prompt_mask)
    if isinstance(prompt, Tracer):
        raise TypeError("`prompt` of `stream` must be known, got a traced one; in a compiled function call `generate`.")
    return _stream(_check_request(model, variables, prompts, length, sampling, _Start(cache, cache_dtype), rng))


class _Start(NamedTuple):
    """The cache that prompts are appended to, or the dtype of a new one."""

    cache: TransformerCache | None
    dtype: Dtype | None


class _Wanted(NamedTuple):
    """The results wanted from the decoding loop; static."""

    length: int  # new tokens
    log_probs: bool = False
    cache: bool = False  # with the tokens of each row up to its end, and no fillers


class _Prompt(NamedTuple):
    """Prompts with all padding on the right."""

    tokens: jax.Array  # [b, n] int32, 0 in the padding
    lengths: jax.Array  # [b] int32


@dataclasses.dataclass(frozen=True)
class _Request:
    """The checked arguments of `generate` or `stream`, made by `_check_request`."""

    model: LocalTransformer  # with layers that are not stacked
    variables: Any
    prompt: _Prompt
    length: int
    sampling: Sampling
    rng: jax.Array | None
    start: _Start
    segment_ids: jax.Array | None  # the document of the new tokens, [b, 1]; None if all tokens are in document 0
    dtype: Dtype  # of the new tokens

    @property
    def arrays(self):
        """The arguments of `prefill`."""
        return self.variables, self.prompt, self.start.cache, self.segment_ids

    def prefill(self, variables, prompt, cache, segment_ids):
        """Return the logits after each prompt, and a new cache with the prompts in it."""
        if cache is not None:
            return _extend(self.model, variables, prompt, cache, segment_ids)
        room = _room(prompt.tokens.shape[1] + self.length)
        return _prefill(self.model, variables, prompt, room, self.start.dtype)


def _stream(request):
    """Yield the new tokens of a request, ``[b]`` at a time."""
    logits, cache = request.prefill(*request.arrays)
    done = jnp.zeros(logits.shape[0], bool)
    for step in range(request.length):
        token, done = _draw_and_end(logits, done, request.sampling, request.rng, step)
        yield np.asarray(token.astype(request.dtype))
        if step + 1 == request.length or bool(done.all()):
            return
        logits, cache = _step(request.model, request.variables, token, cache, request.segment_ids)


def _room(tokens):
    """Round the tokens that layers remember up, so that few compiled programs serve all lengths."""
    step = max(64, 2 ** (tokens.bit_length() - 3))
    return -(-tokens // step) * step


@partial(jax.jit, static_argnums=(0, 3, 4))
def _prefill(model, variables, prompt, max_length, cache_dtype):
    """Return the logits after each row's prompt, ``[b, c]`` float32, and a cache with the prompts in it."""

    def feed(variables, prompt):
        return _feed_prompts(
            model, variables, prompt, model.init_cache(prompt.tokens.shape[0], cache_dtype, max_length)
        )

    return spread_by_compiler(feed, (variables, prompt), lambda: spec_of(prompt.tokens, rank=1))


@partial(jax.jit, static_argnums=0)
def _extend(model, variables, prompt, cache, segment_ids):
    """Return the same results as `_prefill` for prompts appended to a copy of a cache."""

    def feed(*arrays):
        return _feed_prompts(model, *arrays)

    # Copied because the result is donated, and `jit` returns unchanged arguments without copying them.
    arrays = variables, prompt, jax.tree.map(jnp.copy, cache), segment_ids
    return spread_by_compiler(feed, arrays, lambda: spec_of(prompt.tokens, rank=1))


def _feed_prompts(model, variables, prompt, cache, segment_ids=None):
    """Append prompts to a cache, chunk by chunk, up to the end of the longest; results are as in `_prefill`."""
    b, n = prompt.tokens.shape
    chunk = _prefill_chunk(b, n, model.num_tokens)
    padded = jnp.pad(prompt.tokens, ((0, 0), (0, -n % chunk)))

    def feed(index, carry):
        cache, last = carry
        tokens = lax.dynamic_slice_in_dim(padded, index * chunk, chunk, axis=1)
        exists = (index * chunk + jnp.arange(chunk, dtype=jnp.int32))[None] < prompt.lengths[:, None]
        ids = None if segment_ids is None else jnp.broadcast_to(segment_ids, tokens.shape)
        logits, cache = model.apply(variables, tokens, mask=exists, cache=cache, deterministic=True, segment_ids=ids)
        count = exists.sum(1)
        newest = jnp.take_along_axis(logits, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return cache, jnp.where(count[:, None] > 0, newest.astype(jnp.float32), last)

    carry = cache, jnp.zeros((b, model.num_tokens), jnp.float32)
    if chunk == n:
        cache, logits = feed(0, carry)
    else:
        carry = vary_like(carry, (prompt, segment_ids, variables))
        cache, logits = lax.fori_loop(0, -(-prompt.lengths.max() // chunk), feed, carry)
    return logits, cache


def _prefill_chunk(b, n, num_tokens):
    """Return the chunk size for n prompt tokens: n, or a multiple of 64 that makes about equal chunks."""
    least, most = PREFILL_CHUNKS
    b = b if isinstance(b, int) else 1  # symbolic, in a program to export
    count = -(-n // max(least, min(most, PREFILL_LOGITS // (b * num_tokens))))
    return n if count == 1 else -(-n // (64 * count)) * 64


class _Rows(NamedTuple):
    """The state of the decoding loop."""

    step: jax.Array  # index of the next token, [] int32
    token: jax.Array  # the newest token of each row, [b] int32
    tokens: jax.Array  # [b, length] int32, `eos` where there is none yet
    done: jax.Array  # which rows have ended, [b] bool
    lengths: jax.Array  # tokens up to each row's end, [b] int32
    cache: Any
    log_probs: jax.Array | None = None  # [b, length] float32, 0 where there is none yet


class _New(NamedTuple):
    """The results of the decoding loop."""

    tokens: jax.Array  # [b, length] int32
    lengths: jax.Array  # tokens up to each row's end, [b] int32
    cache: Any  # always returned, so that the argument can be donated
    log_probs: jax.Array | None  # [b, length] float32


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def _decode(model, variables, logits, cache, sampling, rng, wanted, segment_ids=None):
    """Continue each row from the logits after its prompt, ``[b, c]``, and return the wanted `_New`."""
    variables = prepare_connections(_narrowed(model, nn.meta.unbox(variables)))
    has_fillers = wanted.cache and bool(sampling.eos)

    def feed(rows):
        """Feed the newest token of each row; a wanted cache stores no fillers."""
        exists = rows.lengths == rows.step if has_fillers else None
        return _step(model, variables, rows.token, rows.cache, segment_ids, exists)

    def advance(_, rows):
        logits, cache = feed(rows)
        lengths = rows.lengths + (~rows.done).astype(jnp.int32)
        token, done = _draw_and_end(logits, rows.done, sampling, rng, rows.step)
        tokens, log_probs = rows.tokens.at[:, rows.step].set(token), rows.log_probs
        if log_probs is not None:
            log_probs = log_probs.at[:, rows.step].set(jnp.where(rows.done, 0, _log_probs(logits, token)))
        return _Rows(rows.step + 1, token, tokens, done, lengths, cache, log_probs)

    rows = _first_rows(logits, cache, sampling, rng, wanted)
    rows = vary_like(rows, (rows, variables, segment_ids))
    if sampling.eos:
        rows = _advance_until_done(advance, rows, wanted.length)
    else:
        rows = lax.fori_loop(0, wanted.length - 1, advance, rows)
    cache = feed(rows)[1] if wanted.cache else rows.cache
    return _New(rows.tokens, rows.lengths, cache, rows.log_probs)


def _first_rows(logits, cache, sampling, rng, wanted):
    """Draw the first new token of each row."""
    b = logits.shape[0]
    token, done = _draw_and_end(logits, jnp.zeros(b, bool), sampling, rng, 0)
    filler = sampling.eos[0] if sampling.eos else 0
    tokens = jnp.full((b, wanted.length), filler, jnp.int32).at[:, 0].set(token)
    log_probs = None
    if wanted.log_probs:
        log_probs = jnp.zeros(tokens.shape, jnp.float32).at[:, 0].set(_log_probs(logits, token))
    return _Rows(jnp.int32(1), token, tokens, done, jnp.ones(b, jnp.int32), cache, log_probs)


def _log_probs(logits, token):
    """Return the log-probability of a token in each row, ``[b]``, from logits ``[b, c]`` float32."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]


def _advance_until_done(advance, rows, length):
    """Advance rows until all have ended or have `length` tokens.

    A device runs a loop of known length on its own. Whether all rows have ended is checked once in `STEPS_PER_CHECK`
    tokens.
    """

    def advance_by(count):
        """Make the function that advances by `count` tokens, a Python int."""
        return lambda rows: lax.fori_loop(0, count, advance, rows)

    def goes_on(rows):
        return (rows.step + STEPS_PER_CHECK <= length) & ~rows.done.all()

    rows = lax.while_loop(goes_on, advance_by(STEPS_PER_CHECK), rows)
    rest = (length - 1) % STEPS_PER_CHECK
    return lax.cond(rows.done.all(), lambda rows: rows, advance_by(rest), rows)


def _narrowed(model, variables):
    """Cast weights to the model's dtype once, before the loop, where matrix products would cast them at each step."""
    dtype = getattr(model, "dtype", None)
    if dtype is None:
        return variables

    def narrow(path, x):
        names = [getattr(key, "key", None) for key in path]
        is_cast = names[-1] in ("kernel", "embedding") and "global_attn" not in names
        return x.astype(dtype) if is_cast and x.dtype.itemsize > jnp.dtype(dtype).itemsize else x

    return jax.tree_util.tree_map_with_path(narrow, variables)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(model, variables, token, cache, segment_ids=None, exists=None):
    """Return the logits after one more token in each row, ``[b, c]`` float32, and the grown cache.

    Args:
        model: As in `generate`.
        variables: As in `generate`.
        token: The new token of each row, ``[b]`` int32.
        cache: The earlier tokens.
        segment_ids: The document of each row's new token, ``[b, 1]``. None means document 0.
        exists: Rows whose token exists, ``[b]`` bool; the cache does not store others. None means all.
    """
    exists = None if exists is None else exists[:, None]
    logits, cache = model.apply(
        variables, token[:, None], mask=exists, cache=cache, deterministic=True, segment_ids=segment_ids
    )
    return logits[:, 0].astype(jnp.float32), cache


@jax.jit
def _draw_and_end(logits, done, sampling, rng, step):
    """Return the next token of each row, ``[b]`` int32 (`eos` in ended rows), and which rows have ended after it."""

    def draw(logits, done):
        token = draw_tokens(logits, sampling, rng, step)
        if not sampling.eos:
            return token, done
        token = jnp.where(done, sampling.eos[0], token).astype(jnp.int32)
        return token, done | sampling.ends(token)

    return spread_by_compiler(draw, (logits, done), lambda: spec_of(logits, rank=1))


def _check_request(model, variables, prompts, length, sampling, start, rng):
    """Check the arguments of `generate` or `stream`, and return them as a request."""
    _check_model(model)
    check_count("length", length, 1)
    _check_start(start, prompts.tokens.shape[0])
    held = _Held.of(start.cache)
    exists, tokens = prompts.known_to_exist(), read_known(prompts.tokens)
    if exists is not None:
        if start.cache is None or held is not None:
            _check_room(model, exists.sum(1), length, held)
        if tokens is not None:
            _check_tokens(tokens[exists], model.num_tokens)
    _check_rng(rng, sampling)
    sampling.check_eos(model.num_tokens)
    segment_ids = None if start.cache is None else _document(start.cache, held)
    dtype = _dtype_of_tokens(prompts.tokens.dtype, model.num_tokens)
    model, variables = _unstacked(model, variables)
    prompt = _move_left(to_int32(prompts.tokens), prompts.lengths, prompts.mask)
    request = _Request(model, variables, prompt, int(length), sampling, rng, start, segment_ids, dtype)
    if start.cache is not None:  # tracing the model raises if the cache is not its own
        _extend.eval_shape(model, *request.arrays)
    return request


class _Held(NamedTuple):
    """Known lengths and documents of the rows in a cache, each ``[b]``."""

    length: np.ndarray
    segment_id: np.ndarray  # of the last token
    segment_start: np.ndarray  # position of the first token in the last token's document

    @classmethod
    def of(cls, cache):
        """Read a cache; return None if there is none, or if it is traced or partly on other hosts."""
        if cache is None or read_known(cache.length) is None:
            return None
        return cls(*jax.device_get(_read_cache(cache)))


@jax.jit
def _read_cache(cache):
    return cache.length, *cache.last_document()


def _document(cache, held):
    """Return the document of each row's last token, ``[b, 1]``; None if all rows are known to have document 0 alone."""
    if held is None:
        return _read_cache(cache)[1][:, None]
    has_documents = held.segment_id.any() or held.segment_start.any()
    return jnp.asarray(held.segment_id)[:, None] if has_documents else None


class _Prompts(NamedTuple):
    """Prompts as they were given, arrays of JAX or NumPy."""

    tokens: Any  # [b, n] integers
    lengths: Any  # [b] integers, or None
    mask: Any  # [b, n] bool, or None; all tokens exist if both are None

    def known_to_exist(self):
        """Return which tokens exist, ``[b, n]`` bool; None if that is traced or symbolic."""
        b, n = self.tokens.shape
        if self.mask is not None:
            return read_known(self.mask)
        if not isinstance(b, int):
            return None
        lengths = np.full((b,), n) if self.lengths is None else read_known(self.lengths)
        return None if lengths is None else np.arange(n) < lengths[:, None]


def _read_prompts(prompt, lengths, mask):
    """Check the shapes and dtypes of prompts, and their values where these are known."""
    prompt = _as_array("prompt", prompt)
    lengths = None if lengths is None else _as_array("prompt_lengths", lengths)
    mask = None if mask is None else _as_array("prompt_mask", mask)
    _check_prompt(prompt)
    if mask is not None and lengths is not None:
        raise ValueError("`prompt_mask` takes the place of `prompt_lengths`, got both; give one or the other.")
    if mask is not None:
        _check_prompt_mask(mask, *prompt.shape)
    if lengths is not None:
        _check_prompt_lengths(lengths, *prompt.shape)
    return _Prompts(prompt, lengths, mask)


def _as_array(name, x):
    """Return a JAX array unchanged; turn lists of numbers into a NumPy array."""
    if isinstance(x, jax.Array):
        return x
    try:
        return np.asarray(x)
    except ValueError:  # NumPy's, for lists of different lengths
        raise ValueError(
            f"`{name}` must have rows of the same length, got {describe(x)}; pad them, and give their lengths as "
            "`prompt_lengths`."
        ) from None


def _check_model(model):
    """Raise unless a model is a causal Linen module with a vocabulary, and not bound."""
    if not (isinstance(model, nn.Module) and hasattr(model, "num_tokens")):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"`model` must be a LocalTransformer, got {given}; make one, or take it and its `variables` out of the "
            "object that holds them, for `nnx.bridge.ToNNX` by `model.to_nnx__module` and "
            "{'params': nnx.to_pure_dict(nnx.state(model, nnx.Param))}."
        )
    if model.scope is not None:
        raise TypeError(
            f"`model` must not be bound to variables, got a bound {type(model).__name__}; separate them by "
            "`model, variables = model.unbind()`."
        )
    if model.num_tokens is None or not model.causal:
        raise ValueError(
            "`model` must be causal and have a vocabulary to generate tokens, got "
            f"num_tokens={model.num_tokens}, causal={model.causal}; use a language model."
        )


def _check_prompt(prompt):
    check_integers("prompt", prompt, "encode the text first")
    if prompt.ndim != 2 or prompt.size == 0:
        raise ValueError(
            f"`prompt` must be [b, n] with at least one token a row, got shape {prompt.shape}; reshape it."
        )
    if not isinstance(prompt.shape[1], int):
        raise ValueError(
            f"`prompt` must have a known number of tokens, got {prompt.shape[1]}; fix that dimension of its shape."
        )


def _check_start(start, b):
    """Raise unless a given cache is a `TransformerCache` of b rows, or the dtype of a new cache is valid."""
    cache, dtype = start
    if cache is None:
        if dtype is not None:
            check_cache_dtype(dtype, "cache_dtype")
        return
    if dtype is not None:
        raise ValueError(
            "`cache_dtype` is for a cache that the call makes, got it with `cache`; give it to `init_cache`."
        )
    check_kind("cache", cache, TransformerCache, "make one with the model's `init_cache`")
    if cache.length.shape[0] != b:
        raise ValueError(
            f"`cache` must have a row for each of the {b} prompts, got {cache.length.shape[0]}; make one with "
            f"`init_cache(batch={b})`."
        )


def _check_room(model, counts, length, held):
    """Raise unless the position table has room for the prompts, of `counts` tokens, ``[b]``, and the new tokens.

    The last new token needs a position only if a cache is returned, because only then is it fed.
    """
    before = np.zeros_like(counts) if held is None else held.length - held.segment_start
    longest = int((before + counts).max())
    fed = length - 1 if held is None else length
    if model.use_abs_pos_emb and longest + fed > model.max_seq_len:
        after = "" if held is None else f" after up to {before.max()} tokens in the cache"
        raise ValueError(
            f"`prompt` and new tokens must fit `max_seq_len` ({model.max_seq_len}), got {counts.max()} and "
            f"{length}{after}; generate fewer, or train a model with `use_abs_pos_emb=False` for unlimited length."
        )


def _check_tokens(tokens, num_tokens):
    wrong = tokens[(tokens < 0) | (tokens >= num_tokens)]
    if wrong.size:
        raise ValueError(
            f"`prompt` must hold tokens in [0, {num_tokens}), got {wrong[0]}; mark padding by "
            "`prompt_lengths` or `prompt_mask`, not by a padding token."
        )


def _check_rng(rng, sampling):
    if rng is not None:
        check_key("rng", rng)
    elif sampling.temperature is not None:
        raise ValueError(
            f"`rng` must be given to sample at temperature {sampling.temperature}, got None; pass for example "
            "jax.random.key(0), or `temperature=0.0`."
        )


def _check_prompt_lengths(lengths, b, n):
    check_integers("prompt_lengths", lengths, "they count tokens")
    known = read_known(lengths)
    if lengths.shape != (b,) or (known is not None and (known.min() < 1 or known.max() > n)):
        raise ValueError(
            f"`prompt_lengths` must be [{b}], each from 1 to {n}, got {lengths if known is None else known.tolist()}; "
            "a row needs a token to begin with."
        )


def _check_prompt_mask(mask, b, n):
    check_mask("prompt_mask", mask, "True where a token exists")
    known = read_known(mask)
    if mask.shape != (b, n) or (known is not None and not known.any(1).all()):
        counts = "" if known is None else f" with {known.sum(-1).tolist()} of them"
        raise ValueError(
            f"`prompt_mask` must be [{b}, {n}] with a True in each row, got shape {mask.shape}{counts}; a row needs a "
            "token to begin with."
        )


def _dtype_of_tokens(dtype, num_tokens):
    """Return the dtype of the new tokens: the prompt's, or int32 if the prompt's cannot hold every token."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jnp.int32 if np.iinfo(dtype).max < num_tokens - 1 else dtype


@jax.jit
def _move_left(tokens, lengths, mask):
    """Move the tokens that exist to the left, in their order, and count them in each row."""

    def move(tokens, lengths, mask):
        b, n = tokens.shape
        if mask is not None:
            lengths = mask.sum(1, dtype=jnp.int32)
            tokens = jnp.take_along_axis(tokens, jnp.argsort(~mask, axis=1, stable=True), axis=1)
        lengths = jnp.full((b,), n, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        return _Prompt(jnp.where(jnp.arange(n, dtype=jnp.int32)[None] < lengths[:, None], tokens, 0), lengths)

    return spread_by_compiler(move, (tokens, lengths, mask), lambda: spec_of(tokens, rank=1))


def _unstacked(model, variables):
    """Return the model and its weights with unstacked layers, so that no step has to unstack them."""
    if not getattr(model, "scan_layers", False):
        return model, variables
    return model.clone(scan_layers=False), jax.jit(unstack_layers)(variables)
