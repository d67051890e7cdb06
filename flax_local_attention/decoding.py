"""Attention of new tokens to those in a cache and to each other: `local_attention`, continued."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from flax_local_attention.attention import attend, merge_attention, turn
from flax_local_attention.cache import LOST, KVCache, check_heads, check_is_cache, count_before, spoil
from flax_local_attention.kernels import (
    Fastest,
    Implementation,
    Triton,
    Unsupported,
    choose_implementation,
    row_kernels,
)
from flax_local_attention.kernels.dispatch import attend_by
from flax_local_attention.kernels.fused import Fused, GradientCall
from flax_local_attention.kernels.ring import RingArrays, attend_ring, ring_problems
from flax_local_attention.operands import (
    Operands,
    check_last_position,
    check_positions,
    check_turns,
    over_heads,
    wide_dtype,
)
from flax_local_attention.options import refuse_options
from flax_local_attention.softmax import LogSum, attend_scores, bias_of, hide_masked, make_scores, prepare_keys

# Most new tokens in a block: a longer chunk is cut into blocks, so that it costs O(n (size + block) d).
BLOCK = 256

# Fewest new tokens that kernels take at once.
LONG = 64


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
    **removed: Any,
) -> tuple[jax.Array, KVCache]:
    """Attend from a chunk of new tokens to those in a cache and to each other: `local_attention`, continued.

    Chunks of any size give what `local_attention` gives for the whole sequence. One token costs O(size d), whatever
    came before. Windows, and rotary without `positions`, count the tokens before a token in its row, so rows may be
    padded anywhere: the outputs of their tokens are those without padding.

    Args:
        q: Queries of the new tokens, ``[b, h g, n, d]``.
        k: Their keys, ``[b, h, n, d]``.
        v: Their values, as k.
        cache: The tokens before. It may be donated.
        mask: Which of the n tokens exist, ``[b, n]`` bool; the others leave no trace, whatever they hold, and their
            outputs have no meaning. None means all.
        segment_ids: Documents of the new tokens, ``[b, n]``. Without them the tokens see all others, and later tokens
            see them in segment 0.
        attn_bias, sinks, dropout_rng: As in `local_attention`; the first two must be the same in every call.
        positions: Positions by which rotary turns the tokens, ``[b, n]`` integers, in place of the number of tokens
            before them; given in every call or in none. Windows do not use them.
        implementation: "triton" and None mean, on GPUs that these serve, a kernel for one new token in each row, and
            the kernels of `local_attention` for 64 or more with an exact window, without a bias, dropout, and tokens
            between them that do not exist. All other calls are plain code, and none is refused. Tokens that kernels
            take together see each other's keys as they are given, not as the cache's dtype rounds them.
        **removed: Nothing. Options are the cache's; an option given here is an error that says so.

    Returns:
        The output of each new token, of q's shape and dtype, and the cache with the new tokens in it.

    Raises:
        TypeError, ValueError: As `local_attention`; also for a cache of another batch or shape of heads, for keys of
            another number than queries, for a mask or segments that differ between heads, for `positions` without
            rotary or with xPos, and for a keyword that is an option.

    Example:
        >>> options = AttentionOptions(Window(4, causal=True), rotary=Rotary(8))
        >>> cache = KVCache.create(options, batch=1, kv_heads=2, dim_head=8)
        >>> q = k = v = jnp.ones((1, 2, 3, 8))
        >>> out, cache = cached_attention(q, k, v, cache)
        >>> out.shape, cache.length
        ((1, 2, 3, 8), Array([3], dtype=int32))

    Source: ``tests/test_cache.py::test_decode_equals_forward_at_every_position``.
    """
    refuse_options("cached_attention", "KVCache.create(options, ...), then cached_attention(q, k, v, cache)", removed)
    check_is_cache(cache)
    chosen = choose_implementation(implementation)
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
    )
    check_heads(cache, k)
    b, n = q.shape[0], q.shape[2]
    _check_rows(operands, cache, n)
    turned = check_positions(positions, b, n)
    if turned is not None:
        check_turns(cache.options)
    if q.size == 0:
        return jnp.zeros_like(q), cache
    exists = jnp.ones((b, n), bool)
    if operands.mask is not None:
        exists = jnp.broadcast_to(operands.mask[:, 0, 0], (b, n))

    new = operands._replace(v=_spoiled(operands.v, cache), q_offset=None)
    may_be_whole = _can_attend_at_once(cache, new)
    cache, out = _attend_chunk(cache, new, exists, turned, chosen, BLOCK, may_be_whole)
    return out.reshape(q.shape), cache


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _attend_chunk(cache, new, exists, positions, chosen, block, may_be_whole):
    """Append new tokens to the cache, and return it with their output, ``[b, h, g, n, d]``: at once or in blocks.

    Args:
        cache: The tokens before.
        new: Operands of n new tokens.
        exists: Which of them exist, ``[b, n]`` bool.
        positions: Positions by which rotary turns them, ``[b, n]``, or None.
        chosen: The implementation.
        block: Most tokens in a block.
        may_be_whole: Whether `_attend_at_once` serves them.
    """

    def in_blocks(cache):
        return _attend_in_blocks(cache, new, exists, positions, chosen, block)

    def at_once(cache):
        assert isinstance(chosen, Triton | Fastest)
        return _attend_at_once(cache, new, exists, positions, _Willing(chosen), block)

    def choose(cache):
        if new.mask is None:
            return at_once(cache)
        is_without_gaps = jnp.all(exists[:, 1:] <= exists[:, :-1])
        return lax.cond(is_without_gaps, at_once, in_blocks, cache)

    if not isinstance(chosen, Triton | Fastest) or not may_be_whole:
        return in_blocks(cache)
    if isinstance(chosen, Triton) and chosen.interpret:  # on any device
        return choose(cache)
    return lax.platform_dependent(cache, cuda=choose, default=in_blocks)


@dataclasses.dataclass(frozen=True)
class _Willing:
    """Kernels of attention where they serve, else plain code: a cache refuses no call that plain code can answer."""

    kernels: Triton | Fastest

    def __call__(self, operands, options):
        """Attend, as every `Implementation`."""
        return attend_by(self, operands, options)

    def choose(self, operands, options, target):
        """Return the kernels that serve a call on a target, as every `Chooser`; None for plain code."""
        if target.is_export or (isinstance(self.kernels, Triton) and self.kernels.problems(operands, options)):
            return None
        try:
            return self.kernels.choose(operands, options, target)
        except Unsupported:
            return None


def _attend_in_blocks(cache, new, exists, positions, implementation, block):
    """Attend block by block, each to the ring and to itself; see `_attend_chunk`."""

    def attend_block(cache, first, size):
        part = new.of_queries(first, size).of_keys(first, size)
        exist, turn = (None if x is None else lax.dynamic_slice_in_dim(x, first, size, 1) for x in (exists, positions))
        return _attend_block(cache, part, exist, turn, implementation)

    return _over_blocks(attend_block, cache, exists.shape[1], block)


def _over_blocks(attend_block, cache, n, block):
    """Join what ``attend_block(cache, first, size)`` returns of n tokens beside the cache, ``[b, h, g, size, ...]``."""
    outs = []
    count, rest = divmod(n, block)
    if count:
        cache, out = lax.scan(lambda cache, at: attend_block(cache, at * block, block), cache, jnp.arange(count))
        out = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3), out)
        outs.append(jax.tree.map(lambda x: x.reshape(*x.shape[:3], count * block, *x.shape[5:]), out))
    if rest:
        cache, out = attend_block(cache, count * block, rest)
        outs.append(out)
    return cache, jax.tree.map(lambda *parts: jnp.concatenate(parts, 3), *outs)


def _can_attend_at_once(cache, new):
    """Return whether a chunk is of enough tokens to take them at once, and its options allow it.

    A plain window begins at multiples of its size, which a row's new tokens need not.
    """
    is_exact = cache.window.exact_windowsize and cache.window.capacity > 1
    return is_exact and new.q.shape[-2] >= LONG and new.bias is None and new.dropout_seed is None


def _attend_at_once(cache, new, exists, positions, implementation, block):
    """Attend among new tokens as without a cache, from the first of them to the ring too; see `_attend_chunk`.

    The tokens that exist must come before those that do not, so that their distances are those of their indices.
    """
    n, reach = exists.shape[1], cache.window.capacity - 1
    new = hide_masked(new)
    operands, options = new._replace(q_offset=0), cache.options
    if positions is not None:
        operands, options = turn(operands, options, positions)
    own, own_sum = attend(operands, options, implementation=implementation)
    queries = min(n, reach)  # those that see a key of the ring
    held = _attend_held(cache, new, exists, positions, queries, block)
    first = own[..., :queries, :], LogSum(*(x[..., :queries] for x in own_sum))
    out = jnp.concatenate([merge_attention([first, held])[0], own[..., queries:, :]], axis=-2)
    grown = cache.count(_segments(new, exists, cache), exists)
    # The token whose key comes to each slot, among the new ones.
    at = grown.positions() - cache.length[:, None]
    is_new, at = (at >= 0)[:, None, :, None], jnp.clip(at, 0, n - 1)
    k, v = (jax.vmap(lambda x, at: x[:, at])(x[:, :, 0], at) for x in (new.k, new.v))
    i = cache.length[:, None] + at
    ahead = None if positions is None else jnp.take_along_axis(positions, at, axis=1) - i
    k = _prepared(k[:, :, None], i, ahead, cache)[:, :, 0]
    k, v = (jnp.where(is_new, x.astype(ring.dtype), ring) for x, ring in ((k, cache.k), (v, cache.v)))
    return dataclasses.replace(grown, k=k, v=v), out


def _attend_held(cache, new, exists, positions, queries, block):
    """Attend from the first queries of new tokens to the keys in the ring, block by block; also the log-sum-exp."""
    j, i = cache.positions(), cache.length[:, None] + jnp.arange(exists.shape[1])
    ahead = None if positions is None else positions - i
    rows = new._replace(k=cache.k[:, :, None], v=cache.v[:, :, None], mask=_lead(j >= 0), q_mask=None, sink=None)
    if new.q_segments is not None:
        rows = rows._replace(q_segments=_lead(_segments(new, exists, cache)), k_segments=_lead(cache.segment_ids))

    def attend_block(cache, first, size):
        of_block = (None if x is None else lax.dynamic_slice_in_dim(x, first, size, 1) for x in (i, ahead))
        heads = rows.of_queries(first, size), *map(_lead, of_block), _lead(j)
        return cache, over_heads(lambda head: _attend_row(head[0], head[1], head[3], head[2], cache), heads)

    return _over_blocks(attend_block, cache, queries, block)[1]


def _attend_block(cache, new, exists, positions, implementation):
    """Append a block of new tokens to the cache, and return it with their output, ``[b, h, g, n, d]``.

    Args:
        cache: The tokens before.
        new: Operands of n new tokens, at most `BLOCK`.
        exists: Which of them exist, ``[b, n]`` bool.
        positions: Positions by which rotary turns them, ``[b, n]``, or None.
        implementation: As in `_attend_chunk`.
    """
    new = hide_masked(new)._replace(mask=None, q_mask=None)
    if exists.shape[1] > 1 or new.bias is not None or new.dropout_seed is not None:
        return _attend_and_append(cache, new, exists, positions)
    arrays, tree = jax.tree.flatten((cache, new, exists, positions))
    kernels = row_kernels(implementation, functools.partial(TokenKernels, tree))
    out, k, v = _attend_token(tree)(kernels, *arrays)
    grown = dataclasses.replace(cache, k=k, v=v)
    return grown.count(_segments(new, exists, cache), exists), out


@functools.cache
def _attend_token(tree):
    """Make the operation of one new token in each row, once: its primitives are registered with JAX.

    Its arguments are the leaves of the arguments of `_attend_and_append`, its results the output and the ring's keys
    and values.
    """

    def plain(*arrays):
        grown, out = _attend_and_append(*tree.unflatten(arrays))
        return out, grown.k, grown.v

    return Fused("cached_attention", plain)


@dataclasses.dataclass(frozen=True)
class TokenKernels:
    """The kernel of one new token in each row, see `attend_ring`.

    Attributes:
        tree: Structure of the arguments of `_attend_and_append`, whose leaves are the arrays of a call.
        interpret: Whether to run on any device, slowly: for tests.
    """

    tree: Any
    interpret: bool = False

    def problems(self, arrays: Sequence[Any]) -> list[str]:
        """Return the reasons, by shapes, dtypes and options, why it cannot serve a call: none if it can."""
        cache, new, *_ = self.tree.unflatten(arrays)
        return ring_problems(new, cache.k, cache.v, cache.options)

    def forward(self, arrays: Sequence[jax.Array], partitioned: bool) -> Sequence[jax.Array]:
        """Return the output, and the keys and values of the ring."""
        cache, new, exists, positions = self.tree.unflatten(arrays)
        i, slots = cache.length[:, None], cache.slots(exists)
        j = cache.count(_segments(new, exists, cache), exists).positions()
        is_seen = (j >= 0) & (j != i) & cache.window.sees(i, j)
        if new.q_segments is not None:
            is_seen &= _segments(new, exists, cache) == cache.segment_ids
        ahead = None if positions is None else positions - i
        laps = jnp.where(is_seen, jnp.where(i // cache.size == j // cache.size, 1, 2), 0)
        ring = RingArrays(
            new.q,
            new.k,
            new.v,
            cache.k[:, :, None],
            cache.v[:, :, None],
            _lead(slots),
            _lead(laps.astype(jnp.int32)),
            sink=None if new.sink is None else new.sink[..., None],
        )
        if (rotary := cache.options.rotary) is not None:
            both_laps = i % cache.size + jnp.array([0, cache.size])
            ring = ring._replace(
                q_tables=_lead(rotary.query_table(_turned(both_laps, ahead, cache))),
                k_table=_lead(rotary.key_table(_turned(i % cache.size, ahead, cache))[:, 0]),
            )
        out, k, v = attend_ring(ring, cache.options, self.interpret, partitioned)
        return out, k[:, :, 0], v[:, :, 0]

    def backward(self, call: GradientCall) -> None:
        """Leave the gradient to plain code."""
        return None


def _attend_and_append(cache, new, exists, positions):
    """Attend and append by plain code; arguments and results as in `_attend_block`.

    One token attends to the ring with itself in it: it overwrites a key that no query sees any more. Several attend to
    the ring as it was and to each other, since the last of them may overwrite keys that the first ones see.
    """
    n = exists.shape[1]
    i = cache.length[:, None] + count_before(exists)
    # How far the position by which rotary turns a token is ahead of its position in the row.
    ahead = None if positions is None else positions - i
    k = _prepared(new.k, i, ahead, cache)
    k, v = k[:, :, 0].astype(cache.k.dtype), new.v[:, :, 0].astype(cache.v.dtype)
    segments = _segments(new, exists, cache)
    grown = cache.append(k, v, segments, exists)
    if n == 1:  # a single token overwrites the key that it cannot see any more
        keys, values, k_segments, j = grown.k, grown.v, grown.segment_ids, grown.positions()
        there = j >= 0
    else:
        held = cache.positions()
        keys, values = jnp.concatenate([cache.k, k], 2), jnp.concatenate([cache.v, v], 2)
        k_segments = jnp.concatenate([cache.segment_ids, segments], 1)
        j, there = jnp.concatenate([held, i], 1), jnp.concatenate([held >= 0, exists], 1)
    rows = new._replace(k=keys[:, :, None], v=values[:, :, None], mask=_lead(there))
    if new.q_segments is not None:
        rows = rows._replace(q_segments=_lead(segments), k_segments=_lead(k_segments))
    heads = rows, _lead(i), _lead(j), _lead(ahead)
    return grown, over_heads(lambda head: _attend_row(head[0], head[1], head[2], head[3], cache)[0], heads)


def _prepared(k, i, ahead, cache):
    """Make new keys ``[b, h, 1, n, d]`` at positions i, ``[b, n]``, as the ring holds them."""
    return over_heads(
        lambda head: prepare_keys(head[0], cache.options, _key_table(head[1], head[2], cache)),
        (k, _lead(i), _lead(ahead)),
    )


def _spoiled(v, cache):
    """Replace the new values of rows that went back too far by NaN, see `KVCache.rewind`."""
    return spoil(v, cache.longest == LOST) if cache.slack else v


def _segments(new, exists, cache):
    """Return the documents of new tokens, ``[b, n]``; 0 where none are given."""
    dtype = cache.segment_ids.dtype
    if new.q_segments is None:
        return jnp.zeros(exists.shape, dtype)
    return jnp.broadcast_to(new.q_segments[:, 0, 0], exists.shape).astype(dtype)


def _lead(x):
    """Give ``[b, n]`` the axes ``[b, h, g, n]`` of operands."""
    return None if x is None else x[:, None, None]


def _attend_row(row: Operands, i, j, ahead, cache):
    """Attend in one head of one row, ``[i, d]``, also the log-sum-exp.

    Args:
        row: Operands of this head; its mask says which keys there are.
        i, j: Positions of queries and keys in the row, ``[i]`` and ``[j]``.
        ahead: What rotary's positions are ahead of i, ``[i]``, or None.
        cache: Gives options and size.
    """
    bias = None if row.bias is None else bias_of(cache.window, row.bias, i, j)
    return attend_scores(_scores(row, i, j, ahead, cache), row._replace(bias=bias), i, j, cache.options)


def _scores(row, i, j, ahead, cache):
    """Make scores of keys that are rotated by slot: two rotations of a query serve the two laps that it can see.

    A lap is one time round the ring, ``position // size``. A query in slot s sees a key in slot t of its own lap at
    distance ``s - t``, of the lap before at ``s - t + size``. A window spans no more than the ring, so there are no
    others.
    """
    rotary = cache.options.rotary
    if rotary is None:
        return make_scores(row, cache.options, None)

    def scores(slots):
        return make_scores(row, cache.options, rotary.query_table(_turned(slots, ahead, cache), row.dtype))

    same_lap = (i // cache.size)[:, None] == j // cache.size
    return jnp.where(same_lap, scores(i % cache.size), scores(i % cache.size + cache.size))


def _key_table(i, ahead, cache):
    """Make the rotations of new keys at positions i, ``[n]``, by their slots; None without rotary."""
    rotary = cache.options.rotary
    if rotary is None:
        return None
    return rotary.key_table(_turned(i % cache.size, ahead, cache), wide_dtype(cache.k.dtype))


def _turned(slots, ahead, cache):
    """Return the positions by which rotary turns tokens in these slots, from the middle slot, where xPos is 1."""
    middle = slots - cache.size // 2
    return middle if ahead is None else middle + ahead


def _check_rows(operands, cache, n):
    """Raise unless each query has a key, all heads share mask and documents, and positions fit int32."""
    if operands.k.shape[-2] != n:
        raise ValueError(
            f"`k` and `v` must be of the new tokens, as many as `q` with a cache, got {operands.k.shape[-2]} and {n}; "
            "keys from before are in the cache."
        )
    for name, x in (("mask", operands.mask), ("segment_ids", operands.q_segments)):
        if x is not None and x.shape[1:3] != (1, 1):
            raise ValueError(
                f"`{name}` must be [b, n] with a cache, the same for all heads, got one for {x.shape[1] * x.shape[2]} "
                "heads; make a cache for each, or leave the axis out."
            )
    if not isinstance(cache.length, Tracer) and getattr(cache.length, "is_fully_addressable", True):
        check_last_position("cache.length", int(np.asarray(cache.length).max()) + n, "begin a new cache")
