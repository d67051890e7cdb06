"""Decoding: a ring of exactly the keys that a next query can see, and attention over it."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jax import export, lax
from jax.core import Tracer

from flax_local_attention.operands import Operands, over_heads, wide_dtype
from flax_local_attention.options import AttentionOptions, options_from_json, options_to_json, refuse_options
from flax_local_attention.softmax import attend_scores, bias_of, make_scores, prepare_keys
from flax_local_attention.window import Window

# New tokens attended to at a time: a longer chunk is taken in pieces, so that it costs O(s (size + piece)).
PIECE = 256


@struct.dataclass
class KVCache:
    """The keys and values that a next query can see, in a ring: O(window) whatever the length so far.

    The key at position j stands in slot ``j % size``; ``size`` is ``B w + 1`` for an exact window and
    ``(B + 1) w`` for a plain one. Rows of the batch have lengths of their own.

    The options of attention stay with the keys, which are stored as these options have them: so no two calls can
    differ in them. Keys are stored rotated by their slot, once. A query's distance to a key is then the difference of
    their slots, plus ``size`` where the ring has come round in between: age costs nothing, adds no
    error, and positions never grow.

    Attributes:
        k: Keys, ``[b, h, size, d]``.
        v: Values, as k.
        segment_ids: Documents of the keys, ``[b, size]`` int32.
        length: Tokens so far, ``[b]`` int32: the position of the next one.
        options: How queries attend to the keys; static, not an array.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    length: jax.Array
    options: AttentionOptions = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        options: AttentionOptions | Window,
        batch: int,
        kv_heads: int,
        dim_head: int,
        *,
        dtype: Dtype = jnp.float32,
    ) -> "KVCache":
        """Make an empty cache.

        Args:
            options: How queries attend, with a causal window; or the window alone, with all else at its default.
            batch: Rows, b.
            kv_heads: Heads of keys and values, h.
            dim_head: Width of a head, d.
            dtype: Of keys and values.

        Raises:
            TypeError: `options` are neither.
            ValueError: The window is not causal, a size is less than 1, or rotary is of another width.

        Example:
            >>> options = AttentionOptions(Window.sliding(256), rotary=Rotary(64, theta=1e6))
            >>> KVCache.create(options, batch=1, kv_heads=2, dim_head=64, dtype=jnp.bfloat16).k.shape
            (1, 2, 256, 64)
        """
        options = AttentionOptions.of(options)
        window = options.window
        if not window.causal:
            raise ValueError(
                f"A cache needs a causal window, got {window}; a window that looks ahead cannot be decoded token by "
                "token."
            )
        if options.rotary is not None and options.rotary.dim != dim_head:
            raise ValueError(
                f"`rotary.dim` must be `dim_head` ({dim_head}), got {options.rotary.dim}; use Rotary({dim_head})."
            )
        for name, value in (("batch", batch), ("kv_heads", kv_heads), ("dim_head", dim_head)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}; give the sizes of the keys to come.")
        shape = (batch, kv_heads, window.capacity, dim_head)
        return cls(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            segment_ids=jnp.zeros((batch, window.capacity), jnp.int32),
            length=jnp.zeros((batch,), jnp.int32),
            options=options,
        )

    @property
    def window(self) -> Window:
        """The window that the ring is made for."""
        return self.options.window

    @property
    def size(self) -> int:
        """Slots of the ring."""
        return self.k.shape[2]

    def positions(self) -> jax.Array:
        """Position of the key in each slot, ``[b, size]``; negative in a slot not yet used."""
        last = self.length[:, None] - 1
        return last - (last - jnp.arange(self.size)) % self.size

    def append(self, k: jax.Array, v: jax.Array, segment_ids: jax.Array, exists: jax.Array) -> "KVCache":
        """Write new keys ``[b, h, s, d]``, already rotated, of the tokens that exist, ``[b, s]`` (a prefix)."""
        s = k.shape[2]
        count = exists.sum(1, dtype=jnp.int32)[:, None]
        # Of more tokens than slots only the last stay; slot `size` is outside and drops the rest.
        stays = exists & (jnp.arange(s) >= count - self.size)
        slots = jnp.where(stays, (self.length[:, None] + jnp.arange(s)) % self.size, self.size)

        def write(ring, new, slots):
            return ring.at[..., slots, :].set(new.astype(ring.dtype), mode="drop", unique_indices=s == 1)

        return dataclasses.replace(
            self,
            k=jax.vmap(write)(self.k, k, slots),
            v=jax.vmap(write)(self.v, v, slots),
            segment_ids=jax.vmap(lambda ring, new, at: ring.at[at].set(new, mode="drop"))(
                self.segment_ids, segment_ids, slots
            ),
            length=self.length + count[:, 0],
        )


def make_exportable(cache: type, write: Callable[[Any], bytes], read: Callable[[bytes], Any]):
    """Let `jax.export` serialise programs that take or return a cache: write and read its static fields."""
    with contextlib.suppress(ValueError):  # registered before, by a module that was reloaded
        export.register_pytree_node_serialization(
            cache,
            serialized_name=f"flax_local_attention.{cache.__name__}",
            serialize_auxdata=write,
            deserialize_auxdata=read,
        )


make_exportable(
    KVCache,
    lambda fields: options_to_json(fields[0]).encode(),
    lambda text: (options_from_json(text.decode()),),
)


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
    **removed: Any,
) -> tuple[jax.Array, KVCache]:
    """Attend from new tokens to those in a cache and to each other: `local_attention`, continued.

    Feeding a sequence in chunks of any size gives what `local_attention` gives for the whole of it. One
    token costs O(size d), whatever came before.

    Args:
        q: Queries of the new tokens, ``[b, h g, s, d]``.
        k: Their keys, ``[b, h, s, d]``.
        v: Their values, as k.
        cache: What came before. It may be donated.
        mask: Which of the s tokens exist, ``[b, s]`` bool, True for a prefix of each row; the others leave
            no trace, and what is returned for them has no meaning. None means all.
        segment_ids: Documents of the new tokens, ``[b, s]``.
        attn_bias, sinks, dropout_rng: As in `local_attention`, and the first two the same in every call.
        **removed: Nothing. Options are the cache's; an option given here is an error that says so.

    Returns:
        What each new token gathered, of q's shape and dtype, and the cache with the new tokens in it.

    Raises:
        TypeError, ValueError: As `local_attention`; also for a cache of another batch or shape of heads, for a mask
            that is not a prefix (where it is concrete), and for a keyword that is an option.

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
    _check_prefix(mask)
    if q.size == 0:
        return jnp.zeros_like(q), cache
    b, s = q.shape[0], q.shape[2]
    exists = jnp.ones((b, s), bool) if mask is None else jnp.broadcast_to(mask, (b, s))

    def attend_piece(cache, first, size):
        piece = operands.of_queries(first, size).of_keys(first, size)
        return _attend_piece(cache, piece, lax.dynamic_slice_in_dim(exists, first, size, 1))

    outs = []
    pieces, rest = divmod(s, PIECE)
    if pieces:
        firsts = jnp.arange(pieces) * PIECE
        cache, out = lax.scan(lambda cache, first: attend_piece(cache, first, PIECE), cache, firsts)
        outs.append(jnp.moveaxis(out, 0, -3).reshape(*out.shape[1:-2], pieces * PIECE, -1))
    if rest:
        cache, out = attend_piece(cache, pieces * PIECE, rest)
        outs.append(out)
    return jnp.concatenate(outs, axis=-2).reshape(q.shape), cache


def _attend_piece(cache, new, exists):
    """The cache with a few new tokens in it, and what they gather, ``[b, h, g, s, d]``."""
    b, s = exists.shape
    i = cache.length[:, None] + jnp.arange(s)
    k = over_heads(lambda head: prepare_keys(head[0], cache.options, _key_table(head[1], cache)), (new.k, _lead(i)))
    k, v = k[:, :, 0].astype(cache.k.dtype), new.v[:, :, 0].astype(cache.v.dtype)
    segments = jnp.zeros((b, s), jnp.int32)
    if new.q_segments is not None:
        segments = jnp.broadcast_to(new.q_segments[:, 0, 0], (b, s)).astype(jnp.int32)
    grown = cache.append(k, v, segments, exists)
    if s == 1:  # the key that a single token displaces is the one it cannot see any more
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
    return grown, over_heads(lambda row: _attend_row(row[0], row[1], row[2], cache), (rows, _lead(i), _lead(j)))


def _lead(x):
    """``[b, n]`` to the axes ``[b, h, g, n]`` of operands."""
    return x[:, None, None]


def _attend_row(row: Operands, i, j, cache):
    """Attention of one head in one row, ``[i, d]``."""
    bias = None if row.bias is None else bias_of(cache.window, row.bias, i, j)
    return attend_scores(_scores(row, i, j, cache), row._replace(bias=bias), i, j, cache.options)[0]


def _scores(row, i, j, cache):
    """Scores with keys that are rotated by slot: two rotations of a query serve the two laps it can see."""
    rotary = cache.options.rotary
    if rotary is None:
        return make_scores(row, cache.options, None)

    def scores(slots):
        return make_scores(row, cache.options, rotary.query_table(slots - cache.size // 2, row.dtype))

    same_lap = (i // cache.size)[:, None] == j // cache.size
    return jnp.where(same_lap, scores(i % cache.size), scores(i % cache.size + cache.size))


def _key_table(positions, cache):
    rotary = cache.options.rotary
    if rotary is None:
        return None
    return rotary.key_table(positions % cache.size - cache.size // 2, wide_dtype(cache.k.dtype))


def check_is_cache(cache: KVCache):
    """Raise unless it is one."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"`cache` must be a KVCache, got {type(cache).__name__}; make one with KVCache.create.")


def check_heads(cache: KVCache, k: jax.Array):
    """Raise unless a cache has the batch, the heads and the width of new keys."""
    expected = (cache.k.shape[0], cache.k.shape[1], cache.k.shape[3])
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != expected:
        raise ValueError(
            f"`cache` must have k's batch, heads and width, got k {k.shape} and a cache for "
            f"[{expected[0]}, {expected[1]}, s, {expected[2]}]; make a cache for this batch and model."
        )


def _check_prefix(mask):
    if mask is None or isinstance(mask, Tracer) or mask.ndim != 2 or mask.dtype != jnp.bool_:
        return
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "`mask` with a cache must be True for a prefix of each row (tokens that exist, then none), "
            "got a True after a False; put the row's tokens first."
        )
