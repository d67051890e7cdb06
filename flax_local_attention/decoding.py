"""Attention of new tokens to a cache and to each other: `local_attention`, continued."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_local_attention.attention import attend, merge_attention, of_global_keys
from flax_local_attention.cache import (
    KVCache,
    check_heads,
    check_is_cache,
    check_new_tokens,
    check_of_new,
    count_before,
    lead_heads,
    segments_of,
    specs_of,
    spoil,
    spoil_lost,
)
from flax_local_attention.kernels import (
    Dense,
    Fastest,
    Implementation,
    KernelFamily,
    Unsupported,
    choose_implementation,
    row_kernels,
)
from flax_local_attention.kernels.devices import Labels, label
from flax_local_attention.kernels.dispatch import attend_by
from flax_local_attention.kernels.fused import Fused, GradientCall
from flax_local_attention.kernels.ring import RingArrays, attend_ring, ring_problems
from flax_local_attention.operands import Operands, over_heads
from flax_local_attention.options import check_restated
from flax_local_attention.sharding import read_known, spec_of, spread_by_compiler, vary_like
from flax_local_attention.softmax import attend_scores, bias_of, hide_masked, make_scores
from flax_local_attention.window import Window

# Most new tokens in a block. A longer chunk is cut into blocks, so that it costs O(n (size + block) d).
BLOCK = 256

# Fewest new tokens for which kernels attend to a whole chunk at once.
LEAST_FOR_KERNELS = 64


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    *,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    attn_bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout_rng: jax.Array | None = None,
    positions: jax.Array | None = None,
    implementation: str | Implementation | None = None,
    global_keys: Sequence[Any] | None = None,
    **restated: Any,
) -> tuple[jax.Array, KVCache]:
    """Attend from a chunk of new tokens to the tokens in a cache and to each other.

    Chunks of any size give the same outputs as one call of `local_attention` for the whole sequence. One token costs
    O(size d), however many tokens the cache has seen. Windows, and rotary without `positions`, count existing tokens
    only, so rows may be padded anywhere: outputs of existing tokens are the same as without padding.

    Args:
        q: Queries of the new tokens, ``[b, h g, n, d]``.
        k: Keys of the new tokens, ``[b, h, n, d]``.
        v: Values of the new tokens, ``[b, h, n, d]``; their width may differ.
        cache: The earlier tokens. It may be donated.
        mask: Which of the n tokens exist, ``[b, n]`` bool. The others change nothing, whatever they hold, and their
            outputs are arbitrary. None means all.
        segment_ids: Documents of the new tokens, ``[b, n]``. Without them the new tokens see all earlier ones, and
            are stored as segment 0.
        attn_bias: As in `local_attention`; the same in every call.
        sinks: As in `local_attention`; the same in every call.
        dropout_rng: As in `local_attention`.
        positions: Positions of the tokens for rotary, ``[b, n]`` integers, in place of the number of tokens before
            them; given in every call or in none. Windows do not use them.
        implementation: "triton" and None use a kernel for calls with one new token in each row, on GPUs that it
            serves and without `keep_first` or global keys. "triton", "tpu" and None use the kernels of
            `local_attention` for calls with 64 new tokens or more and an exact window, without a bias, dropout, or
            missing tokens between existing ones. Everything else runs as plain code; no call is refused. Tokens that
            kernels process together see each other's keys before these are rounded to the cache's dtype.
        global_keys: Keys that every query sees, as in `local_attention`, in every call. None means the global keys that
            the cache was made with.
        **restated: Options, which must equal the cache's.

    Returns:
        A pair: the output of each new token, with q's shape (except for the width, which is v's) and dtype; and the
        cache with the new tokens in it.

    Raises:
        TypeError: As in `local_attention`.
        ValueError: As in `local_attention`; also if the cache's batch, heads or widths differ, there are not as many
            keys as queries, a mask or segments differ between heads, `positions` are given without rotary or with xPos,
            or an option differs from the cache's.

    Examples:
        >>> options = AttentionOptions(Window(4, causal=True), rotary=Rotary(8))
        >>> cache = KVCache.create(options, batch=1, kv_heads=2, dim_head=8)
        >>> q = k = v = jnp.ones((1, 2, 3, 8))
        >>> out, cache = cached_attention(q, k, v, cache)
        >>> out.shape, cache.length
        ((1, 2, 3, 8), Array([3], dtype=int32))

    Source: ``tests/test_cache.py::test_decode_equals_forward_at_every_position``.
    """
    check_is_cache(cache)
    check_restated(cache.options, restated)
    chosen = choose_implementation(implementation)
    check_of_new(_count_queries(q), mask, segment_ids, positions)
    operands = Operands.create(
        q,
        k,
        v,
        cache.options,
        mask=mask,
        segment_ids=segment_ids,
        attn_bias=attn_bias,
        sinks=sinks,
        dropout_rng=dropout_rng,
        global_keys=cache.global_keys if global_keys is None else global_keys,
    )
    check_heads(cache, k, v)
    exists, turned = check_new_tokens(cache, operands, positions)
    shape = (*q.shape[:-1], v.shape[-1])
    if q.size == 0:
        return jnp.zeros(shape, q.dtype), cache

    new = operands._replace(v=spoil_lost(operands.v, cache), q_offset=None)
    may_be_whole = _can_attend_at_once(cache, new)
    cache, out = _attend_chunk(cache, new, exists, turned, chosen, BLOCK, may_be_whole)
    return out.reshape(shape), cache


def attend_cache(
    q: jax.Array,
    cache: KVCache,
    *,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    attn_bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout_rng: jax.Array | None = None,
    positions: jax.Array | None = None,
    global_keys: Sequence[Any] | None = None,
) -> jax.Array:
    """Attend from the last tokens of a cache to all tokens in it, themselves included.

    ``cache.append(k, v)`` followed by this function does in two steps what ``cached_attention(q, k, v, cache)`` does in
    one. The ring holds the keys that the next token can see, so queries of n tokens need a cache with ``rewind`` of at
    least ``n - 1``. For longer chunks call `cached_attention` in every layer, and ignore its cache in layers that read
    another layer's keys.

    Args:
        q: Queries of the last n tokens of each row, ``[b, h g, n, d]``.
        cache: A cache that these tokens were appended to.
        mask: Which of the n tokens exist, ``[b, n]`` bool, as in `KVCache.append`. Outputs of the others are arbitrary.
        segment_ids: Documents of the n tokens, ``[b, n]``. Without them the tokens see all others.
        attn_bias: As in `cached_attention`.
        sinks: As in `cached_attention`.
        dropout_rng: As in `cached_attention`.
        positions: As in `cached_attention`.
        global_keys: As in `cached_attention`.

    Returns:
        The output of each token, with q's shape (except for the width, which is the values') and dtype.

    Raises:
        TypeError: As in `cached_attention`.
        ValueError: As in `cached_attention`; also if a row has fewer than n tokens, or its ring has lost a key that one
            of them sees. If lengths are traced, the outputs of such a row are NaN instead.

    Examples:
        >>> cache = KVCache.create(Window.sliding(4), batch=1, kv_heads=2, dim_head=8, rewind=2)
        >>> k = v = jnp.ones((1, 2, 3, 8))
        >>> attend_cache(jnp.ones((1, 2, 3, 8)), cache.append(k, v)).shape
        (1, 2, 3, 8)
    """
    check_is_cache(cache)
    n = _count_queries(q)
    check_of_new(n, mask, segment_ids, positions)
    # The keys are in the cache; these only satisfy the checks.
    k, v = (jnp.zeros((*x.shape[:2], n, x.shape[3]), x.dtype) for x in (cache.k, cache.v))
    operands = Operands.create(
        q,
        k,
        v,
        cache.options,
        mask=mask,
        segment_ids=segment_ids,
        attn_bias=attn_bias,
        sinks=sinks,
        dropout_rng=dropout_rng,
        global_keys=cache.global_keys if global_keys is None else global_keys,
    )
    exists, turned = check_new_tokens(cache, operands, positions)
    shape = (*q.shape[:-1], v.shape[-1])
    if q.size == 0:
        return jnp.zeros(shape, q.dtype)
    _check_held(cache, mask, q.shape[0], n)
    before, is_held = _tokens_before(cache, exists)
    out = _attend_last(cache, operands._replace(q_offset=None), exists, turned, before)
    return spoil(out, ~is_held).reshape(shape)


def _count_queries(q):
    """Count queries, ``[..., n, d]``; return 0 for other values, which `Operands.create` refuses."""
    return q.shape[-2] if getattr(q, "ndim", 0) > 1 else 0


@jax.jit
def _attend_last(cache, new, exists, positions, before):
    """Attend from tokens that follow `before` others in their rows, ``[b]``; see `_attend_block` for the rest."""

    def attend(cache, new, exists, positions, before):
        hidden = hide_masked(new)._replace(mask=None, q_mask=None)
        tokens = _Tokens.of(cache, hidden, exists, positions, before)
        return _attend_all(cache, hidden, tokens, _Keys.of(cache))

    return spread_by_compiler(attend, (cache, new, exists, positions, before), lambda: spec_of(new.q, rank=4))


def _tokens_before(cache, exists):
    """Count the tokens before the last ones, ``[b]``, and return whether the ring has all keys that these see.

    Args:
        cache: A cache with the last tokens in it.
        exists: Which of the last tokens exist, ``[b, n]``.
    """
    count = exists.sum(1, dtype=jnp.int32)
    return cache.length - count, count <= _most_held(cache, cache.length, cache.longest, jnp)


def _most_held(cache, length, longest, numpy):
    """Count the last tokens of each row whose visible keys the ring still has, ``[b]``; `numpy` is `np` or `jnp`."""
    return numpy.minimum(length, cache.slack + 1 - (longest - length))


def _check_held(cache, mask, b, n):
    """Raise if the ring has lost keys that the last n tokens see, provided that lengths and mask are known."""
    length, longest = read_known(cache.length), read_known(cache.longest)
    exists = np.ones(n, bool) if mask is None else read_known(mask)
    if length is None or longest is None or exists is None:
        return
    count, most = np.broadcast_to(exists.sum(-1, dtype=int), b), _most_held(cache, length, longest, np)
    if (count > most).any():
        raise ValueError(
            f"`q` must be of tokens whose keys the ring still has, at most {most.tolist()} in its rows, got "
            f"{count.tolist()}; make the cache with a `rewind` larger than {cache.slack}, or use cached_attention."
        )


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _attend_chunk(cache, new, exists, positions, chosen, block, may_be_whole):
    """Append new tokens to the cache, and return it and their output, ``[b, h, g, n, d]``.

    Args:
        cache: The earlier tokens.
        new: Operands of n new tokens.
        exists: Which of the new tokens exist, ``[b, n]`` bool.
        positions: Explicit positions for rotary, ``[b, n]``, or None.
        chosen: The implementation.
        block: Most tokens in a block.
        may_be_whole: Whether `_attend_at_once` may be used.
    """

    def in_blocks(cache, new, exists, positions):
        return _attend_in_blocks(cache, new, exists, positions, chosen, block)

    def at_once(cache, new, exists, positions):
        assert isinstance(chosen, KernelFamily | Fastest)
        return _attend_at_once(cache, new, exists, positions, _KernelsOrPlain(chosen), block)

    def choose(cache, new, exists, positions):
        arrays = cache, new, exists, positions
        if new.mask is None:
            return at_once(*arrays)
        is_without_gaps = jnp.all(exists[:, 1:] <= exists[:, :-1])
        return lax.cond(is_without_gaps, at_once, in_blocks, *arrays)

    def attend(*arrays):
        if not isinstance(chosen, KernelFamily | Fastest) or not may_be_whole:
            return in_blocks(*arrays)
        if isinstance(chosen, KernelFamily) and chosen.interpret:  # on any device
            return choose(*arrays)
        return lax.platform_dependent(*arrays, cuda=choose, tpu=choose, default=in_blocks)

    arrays = cache, new, exists, positions
    arrays = vary_like(arrays, arrays)
    return spread_by_compiler(attend, arrays, lambda: (specs_of(cache, new), spec_of(new.q, rank=4)))


@dataclasses.dataclass(frozen=True)
class _KernelsOrPlain:
    """Kernels of attention for calls that they serve, and plain code for others, so that none is refused."""

    kernels: KernelFamily | Fastest

    def __call__(self, operands, options):
        """Attend, as every `Implementation`."""
        return attend_by(self, operands, options)

    def choose(self, operands, options, target):
        """Return the kernels that serve a call on a target, as every `Chooser`; None means plain code."""
        if target.is_export or (isinstance(self.kernels, KernelFamily) and self.kernels.problems(operands, options)):
            return None
        try:
            return self.kernels.choose(operands, options, target)
        except Unsupported:
            return None


def _attend_in_blocks(cache, new, exists, positions, implementation, block):
    """Attend block by block, from each block to the ring and to itself; see `_attend_chunk`."""

    def attend_block(cache, first, size):
        part = new.of_queries(first, size).of_keys(first, size)
        exist, turn = (None if x is None else lax.dynamic_slice_in_dim(x, first, size, 1) for x in (exists, positions))
        return _attend_block(cache, part, exist, turn, implementation)

    return _over_blocks(attend_block, cache, exists.shape[1], block)


def _over_blocks(attend_block, cache, n, block):
    """Attend from n tokens block by block; return the cache and the joined outputs, ``[b, h, g, n, ...]``.

    ``attend_block(cache, first, size)`` returns the cache and the outputs of a block, ``[b, h, g, size, ...]``.
    """
    outs = []
    count, rest = divmod(n, block)
    if count:
        cache, out = lax.scan(
            lambda cache, at: attend_block(cache, at * block, block), cache, jnp.arange(count, dtype=jnp.int32)
        )
        out = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3), out)
        outs.append(jax.tree.map(lambda x: x.reshape(*x.shape[:3], count * block, *x.shape[5:]), out))
    if rest:
        cache, out = attend_block(cache, count * block, rest)
        outs.append(out)
    return cache, jax.tree.map(lambda *parts: jnp.concatenate(parts, 3), *outs)


def _can_attend_at_once(cache, new):
    """Return whether `_attend_at_once` serves a chunk: it has enough tokens, and its options allow it.

    Plain windows are excluded: they begin at multiples of their size, and new tokens need not.
    """
    is_exact = cache.window.exact_windowsize and cache.window.capacity > 1
    return is_exact and new.q.shape[-2] >= LEAST_FOR_KERNELS and new.bias is None and new.dropout_seed is None


def _attend_at_once(cache, new, exists, positions, implementation, block):
    """Attend among the new tokens as without a cache, and from the first ones to the ring; see `_attend_chunk`.

    Existing tokens must come before missing ones, so that their distances equal those of their indices.
    """
    n, reach = exists.shape[1], cache.window.capacity - 1
    new = hide_masked(new)
    own = attend(new._replace(q_offset=0), cache.options, positions=positions, implementation=implementation)
    queries = min(n, reach)  # those that see a key of the ring
    rows = new._replace(mask=None, q_mask=None, sink=None, global_keys=None)
    tokens = _Tokens.of(cache, new, exists, positions)
    grown = cache.store_first(new, exists, positions).count(tokens.segment_ids, exists)
    if cache.first is not None:
        own = merge_attention([own, _over_queries(_attend_first, grown, rows, tokens, n, block)])
    held = _over_queries(_attend_ring, cache, rows, tokens, queries, block)
    of_some = jax.tree.map(lambda x: x[:, :, :, :queries], own)
    out = jnp.concatenate([merge_attention([of_some, held])[0], own[0][..., queries:, :]], axis=-2)
    # The index of the new token whose key each slot gets.
    at = grown.positions() - cache.length[:, None]
    is_new, at = (at >= 0)[:, None, :, None], jnp.clip(at, 0, n - 1)
    k, v = (jax.vmap(lambda x, at: x[:, at])(x[:, :, 0], at) for x in (new.k, new.v))
    i = cache.length[:, None] + at
    ahead = None if positions is None else jnp.take_along_axis(positions, at, axis=1) - i
    k = cache.prepare(k[:, :, None], i, ahead)[:, :, 0]
    k, v = (jnp.where(is_new, x.astype(ring.dtype), ring) for x, ring in ((k, cache.k), (v, cache.v)))
    return dataclasses.replace(grown, k=k, v=v), out


class _Tokens(NamedTuple):
    """Positions and documents of query tokens, each ``[b, n]``.

    Attributes:
        i: Positions in their rows.
        ahead: Explicit positions for rotary minus i; None without explicit positions.
        segment_ids: Documents.
    """

    i: jax.Array
    ahead: jax.Array | None
    segment_ids: jax.Array

    @classmethod
    def of(cls, cache, new, exists, positions, length=None):
        """Place tokens after the first `length` tokens of their rows, ``[b]``; None means after the whole cache."""
        length = cache.length if length is None else length
        i = length[:, None] + count_before(exists)
        return cls(i, None if positions is None else positions - i, segments_of(new, exists, cache))


class _Keys(NamedTuple):
    """Keys of a ring, possibly with further ones.

    Attributes:
        k: Keys, rotated by slot, ``[b, h, n, d]``.
        v: Values, ``[b, h, n, d]``.
        segment_ids: Documents, ``[b, n]``.
        j: Positions, ``[b, n]``.
        is_there: Which keys exist, ``[b, n]`` bool.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    j: jax.Array
    is_there: jax.Array

    @classmethod
    def of(cls, cache):
        """Read a ring."""
        j = cache.positions()
        return cls(cache.k, cache.v, cache.segment_ids, j, j >= 0)


def _over_queries(attend_some, cache, new, tokens, queries, block):
    """Call ``attend_some(cache, new, tokens)`` for the first `queries` tokens, block by block, and join its outputs."""

    def attend_block(cache, first, size):
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, 1), tokens)
        return cache, attend_some(cache, new.of_queries(first, size), part)

    return _over_blocks(attend_block, cache, queries, block)[1]


def _attend_block(cache, new, exists, positions, implementation):
    """Append a block of new tokens to the cache, and return it and their output, ``[b, h, g, n, d]``.

    Args:
        cache: The earlier tokens.
        new: Operands of n new tokens, at most `BLOCK`.
        exists: Which of the new tokens exist, ``[b, n]`` bool.
        positions: Explicit positions for rotary, ``[b, n]``, or None.
        implementation: As in `_attend_chunk`.
    """
    new = hide_masked(new)._replace(mask=None, q_mask=None)
    is_plain = cache.first is None and all(x is None for x in (new.bias, new.dropout_seed, new.global_keys))
    if exists.shape[1] > 1 or not is_plain:
        return _attend_and_append(cache, new, exists, positions)
    arrays, tree = jax.tree.flatten((cache, new, exists, positions))
    kernels = row_kernels(implementation, functools.partial(TokenKernels, tree))
    out, k, v = _attend_token(tree)(kernels, *arrays)
    grown = dataclasses.replace(cache, k=k, v=v)
    return grown.count(segments_of(new, exists, cache), exists), out


@functools.cache
def _attend_token(tree):
    """Make the operation for one new token in each row; cached, because its primitives are registered with JAX.

    Its arguments are the leaves of the arguments of `_attend_and_append`. Its results are the output and the ring's
    keys and values.
    """

    def plain(*arrays):
        grown, out = _attend_and_append(*tree.unflatten(arrays))
        return out, grown.k, grown.v

    return Fused("cached_attention", plain)


@dataclasses.dataclass(frozen=True)
class TokenKernels:
    """The kernel for one new token in each row, see `attend_ring`.

    Attributes:
        tree: Structure of the arguments of `_attend_and_append`, whose leaves are the arrays of a call.
        interpret: Whether to run on any device, slowly, for tests.
    """

    tree: Any
    interpret: bool = False

    def problems(self, arrays: Sequence[Any]) -> list[str]:
        """Return the reasons why the kernel cannot serve a call with these shapes, dtypes and options."""
        cache, new, *_ = self.tree.unflatten(arrays)
        return ring_problems(new, cache.k, cache.v, cache.options)

    def axes(self, arrays: Sequence[Any], results: Sequence[Any]) -> tuple[list[Labels], list[Labels]]:
        """Label rows and heads, which can be spread: the first axes of an array that have their sizes."""
        b, h = self.tree.unflatten(arrays)[1].q.shape[:2]

        def labels(x):
            has_heads = len(x.shape) > 2 and x.shape[1] == h
            return label(x, "b" if x.shape[:1] == (b,) else None, *(["h"] if has_heads else []))

        return [label(x) if not x.shape else labels(x) for x in arrays], list(map(labels, results))

    def forward(self, arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """Compute the output, and the keys and values of the ring."""
        cache, new, exists, positions = self.tree.unflatten(arrays)
        i, ahead, segments = _Tokens.of(cache, new, exists, positions)
        slots, j = cache.slots(exists), cache.count(segments, exists).positions()
        is_seen = (j >= 0) & (j != i) & cache.window.sees(i, j)
        if new.q_segments is not None:
            is_seen &= segments == cache.segment_ids
        laps = jnp.where(is_seen, jnp.where(i // cache.size == j // cache.size, 1, 2), 0)
        ring = RingArrays(
            new.q,
            new.k,
            new.v,
            cache.k[:, :, None],
            cache.v[:, :, None],
            lead_heads(slots),
            lead_heads(laps.astype(jnp.int32)),
            sink=None if new.sink is None else new.sink[..., None],
        )
        if (rotary := cache.options.rotary) is not None:
            both_laps = i % cache.size + jnp.array([[0, cache.size]])
            ring = ring._replace(
                q_tables=lead_heads(rotary.query_table(cache.turned(both_laps, ahead))),
                k_table=lead_heads(rotary.key_table(cache.turned(i % cache.size, ahead))[:, 0]),
            )
        out, k, v = attend_ring(ring, cache.options, self.interpret)
        return out, k[:, :, 0], v[:, :, 0]

    def backward(self, call: GradientCall) -> None:
        """Leave the gradient to plain code."""
        return None


def _attend_and_append(cache, new, exists, positions):
    """Attend and append in plain code; arguments and results are as in `_attend_block`.

    A single token is stored before it attends: it overwrites a key that no query sees any more. Several tokens attend
    to the old ring and to each other, because the last of them may overwrite keys that the first ones see.
    """
    tokens, grown = _Tokens.of(cache, new, exists, positions), cache.store(new, exists, positions)
    if exists.shape[1] == 1:
        return grown, _attend_all(grown, new, tokens, _Keys.of(grown))
    k, v = cache.prepare(new.k, tokens.i, tokens.ahead).astype(cache.k.dtype), new.v.astype(cache.v.dtype)
    own = _Keys(k[:, :, 0], v[:, :, 0], tokens.segment_ids, tokens.i, exists)
    held = _Keys.of(cache)
    keys = _Keys(*(jnp.concatenate([x, y], min(x.ndim - 1, 2)) for x, y in zip(held, own, strict=True)))
    return grown, _attend_all(grown, new, tokens, keys)


def _attend_all(cache, new, tokens, keys):
    """Attend to given keys, to the first tokens of each row, and to global keys, ``[b, h, g, n, d]``.

    Args:
        cache: The cache with the new tokens in it.
        new: Operands of the queries; their keys are not used.
        tokens: Positions and documents of the queries.
        keys: Keys of the ring, possibly with further ones.
    """
    parts = [_attend_keys(cache, new, tokens, keys)]
    if cache.first is not None:
        parts.append(_attend_first(cache, new, tokens))
    if new.global_keys is not None:
        parts.append(Dense()(*of_global_keys(new, cache.options)))
    return merge_attention(parts)[0]


def _attend_ring(cache, new, tokens):
    """Attend to the keys of a ring; also return the log-sum-exp."""
    return _attend_keys(cache, new, tokens, _Keys.of(cache))


def _attend_keys(cache, new, tokens, keys):
    """Attend to given keys, see `_attend_all`; also return the log-sum-exp, ``[b, h, g, n]``."""
    rows = new._replace(
        k=keys.k[:, :, None], v=keys.v[:, :, None], mask=lead_heads(keys.is_there), q_mask=None, global_keys=None
    )
    if new.q_segments is not None:
        rows = rows._replace(q_segments=lead_heads(tokens.segment_ids), k_segments=lead_heads(keys.segment_ids))
    i, j, ahead = jax.tree.map(lead_heads, (tokens.i, keys.j, tokens.ahead))
    return over_heads(lambda head: _attend_row(cache, *head), (rows.widen_scores(), i, j, ahead))


def _attend_row(cache, row: Operands, i, j, ahead):
    """Attend in one head of one row, ``[i, d]``; also return the log-sum-exp.

    Args:
        cache: Cache with the options and the size of the ring.
        row: Operands of this head; the mask is False for keys that do not exist.
        i: Positions of queries in the row, ``[i]``.
        j: Positions of keys in the row, ``[j]``.
        ahead: Explicit positions for rotary minus i, ``[i]``, or None.
    """
    bias = None if row.bias is None else bias_of(cache.window, row.bias, i, j)
    return attend_scores(_scores(row, i, j, ahead, cache), row._replace(bias=bias), i, j, cache.options)


def _scores(row, i, j, ahead, cache):
    """Compute scores with keys that are rotated by slot, using two rotations of each query for the two visible laps.

    A lap is one round of the ring, ``position // size``. A query in slot s sees a key in slot t of its own lap at
    distance ``s - t``, and one of the previous lap at distance ``s - t + size``. No other lap is visible, because a
    window is not longer than the ring.
    """
    if cache.options.rotary is None:
        return make_scores(row, cache.options, None)
    same_lap = (i // cache.size)[:, None] == (j // cache.size)[None]
    slots = i % cache.size
    return jnp.where(
        same_lap, _turned_scores(row, slots, ahead, cache), _turned_scores(row, slots + cache.size, ahead, cache)
    )


def _turned_scores(row, slots, ahead, cache):
    """Compute scores of queries that are rotated by slots, ``[i]``."""
    rotary = cache.options.rotary
    return make_scores(row, cache.options, rotary and rotary.query_table(cache.turned(slots, ahead), row.dtype))


def _attend_first(cache, new, tokens):
    """Attend to the first tokens of each row that lie before the window; also return the log-sum-exp."""
    first, options = cache.first, cache.options
    m = first.k.shape[2]
    j = jnp.arange(m, dtype=jnp.int32)
    is_seen = j[None, None] < options.window.start(tokens.i)[..., None]
    if new.q_segments is not None:
        is_seen &= tokens.segment_ids[..., None] == first.segment_ids[:, None]
    rows = new._replace(
        k=first.k[:, :, None],
        v=first.v[:, :, None],
        mask=None,
        q_mask=None,
        q_segments=None,
        k_segments=None,
        sink=None,
        global_keys=None,
        bias=lead_heads(jnp.where(is_seen, 0.0, -jnp.inf)),
    ).widen_scores()
    options = dataclasses.replace(options, window=Window.sliding(None), rotary=None)

    def attend_row(row, i, ahead):
        places = jnp.minimum(i, m + cache.window.capacity - 1)
        return attend_scores(_turned_scores(row, places, ahead, cache), row, i, j, options)

    i, ahead = jax.tree.map(lead_heads, (tokens.i, tokens.ahead))
    return over_heads(lambda head: attend_row(*head), (rows, i, ahead))
