"""Generation as one compiled loop, and as a stream of tokens."""

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

# Tokens made between questions whether all rows have ended.
TOGETHER = 8

# Prompt tokens taken at a time, so that the logits of a long prompt, [b, chunk, c], stay few; at the least and most.
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
    """Continue prompts, a token at a time, in one compiled loop over a cache of O(window).

    Each token costs the same, whatever came before; without absolute embeddings the length is unlimited.
    Rules apply in the order temperature, `top_k`, `top_p`, `min_p`. A row's tokens depend on `rng`, its
    number and its prompt, not on the rows beside it. A second call with the same shapes and options (of the
    rates, whether they are given) compiles nothing. Rows of a prompt that is spread over devices stay spread. In a
    compiled function, where prompts are traced, their numbers are not checked. There are no penalties of repetition: a
    token's distribution is a function of the model alone.

    Args:
        model: Causal, with tokens. With `scan_layers=True` each call copies its layers once.
        variables: Of the model.
        prompt: Tokens to continue, ``[b, n]`` integers.
        length: New tokens, at least 1.
        rng: Random key; may be left out at temperature 0.
        temperature: Divides the logits. 0 takes the likeliest token.
        top_k: Sample from the k likeliest tokens only, see `keep_top_k`. None keeps all.
        top_p: Sample from the fewest tokens that have this probability together, see `keep_top_p`. None keeps all.
        min_p: Sample from tokens with this share of the likeliest's probability, see `keep_min_p`. None keeps all.
        eos: Token that ends a row, or several of which each does. None ends no row.
        prompt_lengths: Tokens of each row's prompt that exist, ``[b]`` in ``[1, n]``: prompts of unequal
            length stand at the left of `prompt`. None means all of them.
        prompt_mask: Tokens of the prompts that exist, ``[b, n]`` bool, at least one in a row, in place of
            `prompt_lengths`: they may stand anywhere, at the right as tokenizers pad for generation. Rows continue as
            they would without their padding.
        cache_dtype: Of the cached keys and values, floating. None means the model's.
        cache: What stands before the prompt, from the model's `init_cache` or an earlier call. It is left as it is, so
            that several calls may go on from it. New tokens belong to the document of its last token.
        return_log_probs: Return the log-probabilities of the new tokens too.

    Returns:
        * The new tokens, ``[b, length]``, in prompt's dtype (int32 if that cannot hold every token); after a row's
          `eos` stands `eos`, the first if there are several.
        * How many of them are the row's own, ``[b]`` int32, `eos` included.
        * With `return_log_probs=True` the log-probability of each, ``[b, length]`` float32, in the model's own
          distribution: the log-softmax of its logits, before temperature and rules; 0 after a row's end.
        * With a cache the grown one. It holds exactly the tokens of each row: what was in it, the prompt and the new
          tokens that are the row's own, also the last one. A call with it and another prompt continues as one with all
          these tokens as its prompt.

    Raises:
        TypeError: `model` is something else, such as a model inside an NNX module, or bound; the prompt is not of
            integers, or `cache` is not a `TransformerCache`.
        ValueError: A shape or value is wrong, the cache is not one of this model and these rows, or what is in the
            cache, prompt and `length` do not fit the model's `max_seq_len`.

    Example:
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
    """Yield the tokens of `generate` as they come, ``[b]`` at a time; ends early when all rows have.

    Arguments, errors and tokens are those of `generate`. Bad arguments raise at the call. A stream may be left at any
    token, so it returns no grown cache: to go on, give the next call the same `cache`, and as its prompt this prompt,
    the tokens taken and what comes next. Log-probabilities are left to `generate`.
    """
    sampling = Sampling.create(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, eos=eos)
    prompts = _read_prompts(prompt, prompt_lengths, prompt_mask)
    if isinstance(prompt, Tracer):
        raise TypeError("`prompt` of `stream` must be known, got a traced one; in a compiled function call `generate`.")
    return _stream(_check_request(model, variables, prompts, length, sampling, _Start(cache, cache_dtype), rng))


class _Start(NamedTuple):
    """The cache that prompts are appended to, or of which dtype an empty one is."""

    cache: TransformerCache | None
    dtype: Dtype | None


class _Wanted(NamedTuple):
    """What a loop is to make; static."""

    length: int  # new tokens
    log_probs: bool = False
    cache: bool = False  # whose rows hold all tokens that are their own, and no filler


class _Prompt(NamedTuple):
    """Prompts at the left."""

    tokens: jax.Array  # [b, n] int32, 0 where none exists
    lengths: jax.Array  # [b] int32


@dataclasses.dataclass(frozen=True)
class _Request:
    """What `generate` and `stream` are asked for, checked by `_check_request`."""

    model: LocalTransformer  # with layers that are not stacked
    variables: Any
    prompt: _Prompt
    length: int
    sampling: Sampling
    rng: jax.Array | None
    start: _Start
    segment_ids: jax.Array | None  # the document that the new tokens belong to, [b, 1]; None if there is one alone
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
    """Return how many tokens layers shall remember: these and a few more, so that few programs serve all lengths."""
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
    """Return the same of prompts that are appended to a cache, which stays as it is."""

    def feed(*arrays):
        return _feed_prompts(model, *arrays)

    # Copied, because `jit` returns an argument that it does not change as it is, and the result is donated.
    arrays = variables, prompt, jax.tree.map(jnp.copy, cache), segment_ids
    return spread_by_compiler(feed, arrays, lambda: spec_of(prompt.tokens, rank=1))


def _feed_prompts(model, variables, prompt, cache, segment_ids=None):
    """Append prompts to a cache, part by part up to the longest; all else is as in `_prefill` and `_extend`."""
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
    """Return how many of n prompt tokens to take at a time: all, or even parts of a multiple of 64 tokens."""
    least, most = PREFILL_CHUNKS
    b = b if isinstance(b, int) else 1  # symbolic, in a program to export
    count = -(-n // max(least, min(most, PREFILL_LOGITS // (b * num_tokens))))
    return n if count == 1 else -(-n // (64 * count)) * 64


class _Rows(NamedTuple):
    """The rows that a loop continues, token by token."""

    step: jax.Array  # number of the next token, [] int32
    token: jax.Array  # the newest of each row, [b] int32
    tokens: jax.Array  # [b, length] int32, `eos` where there are none yet
    done: jax.Array  # which rows have ended, [b] bool
    lengths: jax.Array  # tokens that are a row's own, [b] int32
    cache: Any
    log_probs: jax.Array | None = None  # [b, length] float32, 0 where there are none yet


class _New(NamedTuple):
    """What a loop has made."""

    tokens: jax.Array  # [b, length] int32
    lengths: jax.Array  # tokens that are a row's own, [b] int32
    cache: Any  # returned in any case, so that the given one can be donated
    log_probs: jax.Array | None  # [b, length] float32


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def _decode(model, variables, logits, cache, sampling, rng, wanted, segment_ids=None):
    """Continue each row from the logits after its prompt, ``[b, c]``, and return the `_New` that is wanted."""
    variables = prepare_connections(_narrowed(model, nn.meta.unbox(variables)))
    has_fillers = wanted.cache and bool(sampling.eos)

    def feed(rows):
        """Feed the newest token of each row; fillers leave no trace in a cache that is wanted."""
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
    """Return the log-probability of a token in each row, ``[b]``, by logits ``[b, c]`` float32."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]


def _advance_until_done(advance, rows, length):
    """Advance rows until all have ended or hold `length` tokens.

    A device goes through a loop of known length by itself. It is asked whether all rows have ended once in `TOGETHER`
    tokens.
    """

    def advance_by(count):
        """Make the function that advances by `count` tokens, a number known when it is compiled."""
        return lambda rows: lax.fori_loop(0, count, advance, rows)

    rows = lax.while_loop(lambda rows: (rows.step + TOGETHER <= length) & ~rows.done.all(), advance_by(TOGETHER), rows)
    rest = (length - 1) % TOGETHER
    return lax.cond(rows.done.all(), lambda rows: rows, advance_by(rest), rows)


def _narrowed(model, variables):
    """Cast the weights that products cast to the model's dtype: once, before the loop."""
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
        model, variables: As in `generate`.
        token: The tokens, ``[b]`` int32.
        cache: The tokens before.
        segment_ids: Their documents, ``[b, 1]``. None means the only one.
        exists: Rows whose token exists, ``[b]`` bool: in others it leaves no trace. None means all.
    """
    exists = None if exists is None else exists[:, None]
    logits, cache = model.apply(
        variables, token[:, None], mask=exists, cache=cache, deterministic=True, segment_ids=segment_ids
    )
    return logits[:, 0].astype(jnp.float32), cache


@jax.jit
def _draw_and_end(logits, done, sampling, rng, step):
    """Return the next token of each row, ``[b]`` int32 (`eos` in rows that are done), and which are done after it."""

    def draw(logits, done):
        token = draw_tokens(logits, sampling, rng, step)
        if not sampling.eos:
            return token, done
        token = jnp.where(done, sampling.eos[0], token).astype(jnp.int32)
        return token, done | sampling.ends(token)

    return spread_by_compiler(draw, (logits, done), lambda: spec_of(logits, rank=1))


def _check_request(model, variables, prompts, length, sampling, start, rng):
    """Return the request of these arguments, or raise where the model cannot serve it."""
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
    if start.cache is not None:  # the model itself refuses what is not its own cache, when it is traced
        _extend.eval_shape(model, *request.arrays)
    return request


class _Held(NamedTuple):
    """What is known of the tokens in a cache, each ``[b]``."""

    length: np.ndarray
    segment_id: np.ndarray  # of the last token
    segment_start: np.ndarray  # the position at which its document begins

    @classmethod
    def of(cls, cache):
        """Read a cache; None without one, and if it is traced or other hosts have parts of it."""
        if cache is None or read_known(cache.length) is None:
            return None
        return cls(*jax.device_get(_read_cache(cache)))


@jax.jit
def _read_cache(cache):
    return cache.length, *cache.last_document()


def _document(cache, held):
    """Return the documents that rows go on with, ``[b, 1]``; None if each is known to have one alone, of number 0."""
    if held is None:
        return _read_cache(cache)[1][:, None]
    has_documents = held.segment_id.any() or held.segment_start.any()
    return jnp.asarray(held.segment_id)[:, None] if has_documents else None


class _Prompts(NamedTuple):
    """Prompts as they were given, arrays of JAX or NumPy. Those that are traced are not checked."""

    tokens: Any  # [b, n] integers
    lengths: Any  # [b] integers, or None
    mask: Any  # [b, n] bool, or None; all tokens exist if both are None

    def known_to_exist(self):
        """Return which tokens exist, ``[b, n]`` bool; None if that is not known."""
        b, n = self.tokens.shape
        if self.mask is not None:
            return read_known(self.mask)
        if not isinstance(b, int):
            return None
        lengths = np.full((b,), n) if self.lengths is None else read_known(self.lengths)
        return None if lengths is None else np.arange(n) < lengths[:, None]


def _read_prompts(prompt, lengths, mask):
    """Check the shapes and dtypes of prompts, and what is known of their numbers."""
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
    """Return an array of JAX as it is, and lists of numbers as NumPy's."""
    if isinstance(x, jax.Array):
        return x
    try:
        return np.asarray(x)
    except ValueError:  # of NumPy, for lists of different lengths
        raise ValueError(
            f"`{name}` must have rows of one length, got {describe(x)}; pad them, and give their lengths as "
            "`prompt_lengths`."
        ) from None


def _check_model(model):
    """Raise unless a model is a Linen module of tokens, not bound, and causal."""
    if not (isinstance(model, nn.Module) and hasattr(model, "num_tokens")):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"`model` must be a LocalTransformer, got {given}; make one, or take it and its `variables` out of what "
            "holds them, out of `nnx.bridge.ToNNX` by `model.to_nnx__module` and "
            "{'params': nnx.to_pure_dict(nnx.state(model, nnx.Param))}."
        )
    if model.scope is not None:
        raise TypeError(
            f"`model` must not be bound to variables, got a bound {type(model).__name__}; take it and its `variables` "
            "apart by `model, variables = model.unbind()`."
        )
    if model.num_tokens is None or not model.causal:
        raise ValueError(
            "`model` must be causal and have tokens to be generated from, got "
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
            f"`prompt` must have a number of tokens, got {prompt.shape[1]}; fix that dimension of its shape."
        )


def _check_start(start, b):
    """Raise unless the cache, if one is given, is of a transformer and has b rows, and if not, its dtype holds keys."""
    cache, dtype = start
    if cache is None:
        if dtype is not None:
            check_cache_dtype(dtype, "cache_dtype")
        return
    if dtype is not None:
        raise ValueError(
            "`cache_dtype` is of a cache that is made for the call, got one with `cache`; give it to `init_cache`."
        )
    check_kind("cache", cache, TransformerCache, "make one with the model's `init_cache`")
    if cache.length.shape[0] != b:
        raise ValueError(
            f"`cache` must have a row for each of the {b} prompts, got {cache.length.shape[0]}; make one with "
            f"`init_cache(batch={b})`."
        )


def _check_room(model, counts, length, held):
    """Raise unless there are positions for the tokens of prompts, ``[b]``, and for the new ones.

    The last new token needs a position only if a cache shall hold it.
    """
    before = np.zeros_like(counts) if held is None else held.length - held.segment_start
    longest = int((before + counts).max())
    fed = length - 1 if held is None else length
    if model.use_abs_pos_emb and longest + fed > model.max_seq_len:
        after = "" if held is None else f" after up to {before.max()} tokens in the cache"
        raise ValueError(
            f"`prompt` and new tokens must fit `max_seq_len` ({model.max_seq_len}), got {counts.max()} and "
            f"{length}{after}; ask for fewer, or train a model with `use_abs_pos_emb=False` for unlimited length."
        )


def _check_tokens(tokens, num_tokens):
    wrong = tokens[(tokens < 0) | (tokens >= num_tokens)]
    if wrong.size:
        raise ValueError(
            f"`prompt` must hold tokens in [0, {num_tokens}), got {wrong[0]}; give shorter rows by "
            "`prompt_lengths` or `prompt_mask`, not by a padding token."
        )


def _check_rng(rng, sampling):
    if rng is not None:
        check_key("rng", rng)
    elif sampling.temperature is not None:
        raise ValueError(
            f"`rng` must be given to sample at temperature {sampling.temperature}, got None; pass jax.random.key(0), "
            "say, or `temperature=0.0`."
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
    """Return the dtype of the new tokens: the prompt's, or int32 if that cannot hold them all."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jnp.int32 if np.iinfo(dtype).max < num_tokens - 1 else dtype


@jax.jit
def _move_left(tokens, lengths, mask):
    """Return the tokens that exist, in their order, at the left, and how many they are in each row."""

    def move(tokens, lengths, mask):
        b, n = tokens.shape
        if mask is not None:
            lengths = mask.sum(1, dtype=jnp.int32)
            tokens = jnp.take_along_axis(tokens, jnp.argsort(~mask, axis=1, stable=True), axis=1)
        lengths = jnp.full((b,), n, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        return _Prompt(jnp.where(jnp.arange(n, dtype=jnp.int32)[None] < lengths[:, None], tokens, 0), lengths)

    return spread_by_compiler(move, (tokens, lengths, mask), lambda: spec_of(tokens, rank=1))


def _unstacked(model, variables):
    """Return the same model and weights with layers that are not stacked, so that no step takes them apart."""
    if not getattr(model, "scan_layers", False):
        return model, variables
    return model.clone(scan_layers=False), jax.jit(unstack_layers)(variables)
