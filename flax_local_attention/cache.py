"""Caches for decoding: a ring of exactly the keys that a next query can see, and those of layers and models."""

import contextlib
import dataclasses
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.typing import Dtype
from jax import export, lax
from jax.sharding import PartitionSpec

from flax_local_attention.array_checks import check_dtype, check_floating, is_array
from flax_local_attention.checks import (
    check_count,
    check_kind,
    describe,
    is_integer,
)
from flax_local_attention.exchange import shift
from flax_local_attention.kernels.fused import Fused
from flax_local_attention.operands import (
    LAST_POSITION,
    GlobalKeys,
    Operands,
    check_fading,
    check_global_keys,
    check_last_position,
    check_positions,
    check_turns,
    over_heads,
    wide_dtype,
)
from flax_local_attention.options import AttentionOptions, options_from_json, options_to_json
from flax_local_attention.sharding import is_in_order, read_known, spec_of, spread_by_compiler
from flax_local_attention.softmax import hide_masked, prepare_keys
from flax_local_attention.window import Window

# `KVCache.longest` of a row that went back too far.
LOST = LAST_POSITION


class FirstTokens(NamedTuple):
    """The first m tokens of each row, which `KVCache` keeps; those that are not there yet hold 0.

    Attributes:
        k: Keys, ``[b, h, m, d]``, rotated by their position.
        v: Values, likewise.
        segment_ids: Documents, ``[b, m]``.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array


@struct.dataclass
class KVCache:
    """The keys and values that a next query can see, in a ring: O(window) whatever the length so far.

    A token's position is the number of tokens before it in its row. The key at position j stands in slot
    ``j % size``; ``size`` is ``B w + 1`` for an exact window and ``(B + 1) w`` for a plain one, plus the tokens of
    `rewind`. Rows of the batch have lengths of their own.

    The options of attention stay with the keys, which are stored as these options need them: no two calls can differ
    in them. Keys are stored rotated by their slot, once. The distance of a query and a key is then the difference of
    their slots, plus ``size`` where the ring has come round in between: age costs nothing and adds no error, and
    positions never grow.

    Attributes:
        k: Keys, ``[b, h, size, d]``.
        v: Values, as k.
        segment_ids: Documents of the keys, ``[b, size]`` int32 (int64 under ``jax_enable_x64``).
        length: Tokens so far, ``[b]`` int32: the position of the next one.
        longest: Largest `length` so far, ``[b]`` int32: `rewind` counts from it.
        options: How queries attend to the keys; static, not an array.
        is_bounded: Whether the cache remembers fewer tokens than the window it was made for; static.
        first: The first tokens of each row, which all later ones see; None if none are kept.
        global_keys: Further keys that every query sees, see `local_attention`; None if there are none.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    length: jax.Array
    longest: jax.Array
    options: AttentionOptions = struct.field(pytree_node=False)
    is_bounded: bool = struct.field(pytree_node=False, default=False)
    first: FirstTokens | None = None
    global_keys: GlobalKeys | None = None

    @classmethod
    def create(
        cls,
        options: AttentionOptions | Window,
        batch: int,
        kv_heads: int,
        dim_head: int,
        *,
        dim_value: int | None = None,
        dtype: Dtype = jnp.float32,
        rewind: int = 0,
        keep_first: int = 0,
        max_length: int | None = None,
        global_keys: Sequence[Any] | None = None,
    ) -> "KVCache":
        """Make an empty cache.

        Args:
            options: How queries attend, with a causal window; or the window alone, with all else at its default.
            batch: Rows, b.
            kv_heads: Heads of keys and values, h.
            dim_head: Width of a head, d.
            dim_value: Width of a head's values. None means that of its keys.
            dtype: Dtype of keys and values, floating.
            rewind: Tokens that `KVCache.rewind` may go back; each adds a slot.
            keep_first: Tokens at the beginning of each row that all later ones see besides their windows, by which a
                model that was trained on shorter texts stays sound (StreamingLLM, arXiv 2309.17453). For them rotary
                turns query i as if it stood at ``min(i, keep_first + capacity - 1)``: they stay at the distance at
                which the window left them. A bias does not reach them.
            max_length: Tokens that the cache remembers, the last ones, if its window has more or no limit. It is then
                that of ``Window.sliding(max_length)``, which in a text of so many tokens sees what the window would.
            global_keys: Keys that every query sees, as in `local_attention`, of which the cache keeps a copy; with a
                mask ``[b, m]``.

        Raises:
            TypeError: `options` are neither, a size is no int, or `dtype` is not floating.
            ValueError: The window is not causal or has no limit, a size is out of range, rotary is of another width, or
                `global_keys` are of another shape.

        Example:
            >>> options = AttentionOptions(Window.sliding(256), rotary=Rotary(64, theta=1e6))
            >>> KVCache.create(options, batch=1, kv_heads=2, dim_head=64, dtype=jnp.bfloat16).k.shape
            (1, 2, 256, 64)
        """
        made_for = AttentionOptions.of(options)
        if max_length is not None:
            check_count("max_length", max_length, 1)
        dim_value = dim_head if dim_value is None else dim_value
        sizes = {"batch": batch, "kv_heads": kv_heads, "dim_head": dim_head, "dim_value": dim_value}
        for name, value in sizes.items():
            if not export.is_symbolic_dim(value):
                check_count(name, value, 1)
        check_count("rewind", rewind, 0)
        check_count("keep_first", keep_first, 0)
        check_cache_dtype(dtype)
        options = bound_options(made_for, max_length)
        window = options.window
        if not window.causal:
            raise ValueError(
                f"`options` of a cache must have a causal window, got {window}; set `causal=True`: a window that looks "
                "ahead cannot be decoded token by token."
            )
        if window.is_global:
            raise ValueError(
                f"`max_length`, the tokens to remember, must be given for a window without a limit, got {window}; give "
                "one of the two."
            )
        if options.rotary is not None and options.rotary.dim > dim_head:
            raise ValueError(
                f"`rotary.dim` must be at most `dim_head` ({dim_head}), got {options.rotary.dim}; use "
                f"Rotary({dim_head})."
            )
        size = window.capacity + rewind
        check_fading(options, size + keep_first, dtype)

        def make(slots):
            k, v = (jnp.zeros((batch, kv_heads, slots, width), dtype) for width in (dim_head, dim_value))
            return k, v, jnp.zeros((batch, slots), int)

        k, v, segment_ids = make(size)
        check_global_keys(global_keys, k, v, (batch, kv_heads), kv_heads)
        return cls(
            k=k,
            v=v,
            segment_ids=segment_ids,
            length=jnp.zeros((batch,), jnp.int32),
            longest=jnp.zeros((batch,), jnp.int32),
            options=options,
            is_bounded=not made_for.window.is_global and options != made_for,
            first=FirstTokens(*make(keep_first)) if keep_first else None,
            global_keys=None if global_keys is None else jax.tree.map(jnp.array, GlobalKeys(*global_keys)),
        )

    @property
    def window(self) -> Window:
        """The window that the ring is made for."""
        return self.options.window

    @property
    def size(self) -> int:
        """Slots of the ring."""
        return self.k.shape[2]

    @property
    def slack(self) -> int:
        """Slots beyond what a query can see: tokens that `rewind` may go back."""
        return self.size - self.window.capacity

    def positions(self) -> jax.Array:
        """Return the position of the key in each slot, ``[b, size]``; negative in a slot not yet used."""
        last = self.length[:, None] - 1
        return last - (last - jnp.arange(self.size, dtype=jnp.int32)[None]) % self.size

    def append(
        self,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> "KVCache":
        """Store new tokens without attending to them: the first of two steps, of which `attend_cache` is the other.

        `cached_attention` takes both at once, chunks of any size, and its cache need not be used. In two steps, several
        layers can read the keys of one.

        Args:
            k: Keys of the new tokens, ``[b, h, n, d]``.
            v: Their values, likewise.
            mask, segment_ids, positions: As in `cached_attention`.

        Returns:
            The cache with the new tokens in it.

        Raises:
            TypeError, ValueError: As `cached_attention`.

        Example:
            >>> cache = KVCache.create(Window.sliding(4), batch=1, kv_heads=2, dim_head=8)
            >>> k = v = jnp.ones((1, 2, 1, 8))
            >>> cache = cache.append(k, v)
            >>> attend_cache(jnp.ones((1, 6, 1, 8)), cache).shape
            (1, 6, 1, 8)
        """
        check_floating("k", k)
        check_floating("v", v)
        check_heads(self, k, v)
        check_of_new(k.shape[2], mask, segment_ids, positions)
        operands = Operands.create(k, k, v, self.options, mask=mask, segment_ids=segment_ids)
        exists, positions = check_new_tokens(self, operands, positions)
        return self if k.size == 0 else _append(self, operands._replace(q_offset=None), exists, positions)

    def store(self, new: Operands, exists: jax.Array, positions: jax.Array | None) -> "KVCache":
        """Write new tokens that are checked.

        Args:
            new: Their operands; masked ones are hidden, and values of lost rows spoiled, see `spoil_lost`.
            exists: Which of them exist, ``[b, n]`` bool.
            positions: Positions by which rotary turns them, ``[b, n]``, or None.
        """
        i = self.length[:, None] + count_before(exists)
        k, slots = self.prepare(new.k, i, None if positions is None else positions - i), self.slots(exists)
        stored = dataclasses.replace(self, k=_write(self.k, k[:, :, 0], slots), v=_write(self.v, new.v[:, :, 0], slots))
        return stored.store_first(new, exists, positions).count(segments_of(new, exists, self), exists)

    def prepare(self, k: jax.Array, slots: jax.Array, ahead: jax.Array | None) -> jax.Array:
        """Make keys as the cache holds them, ``[b, h, 1, n, d]``.

        Args:
            k: Keys as they are given, ``[b, h, 1, n, d]``.
            slots: Their slots, ``[b, n]``, or positions, from which slots follow.
            ahead: What the positions by which rotary turns tokens are ahead of those in their row, ``[b, n]``, or None.
        """
        return self._prepare_at(k, slots % self.size, ahead)

    def _prepare_at(self, k, places, ahead):
        """Normalise and rotate keys as if they stood at these places, ``[b, n]``, in the ring."""
        rotary = self.options.rotary
        if rotary is None:
            return over_heads(lambda k: prepare_keys(k, self.options, None), k)
        table = rotary.key_table(self.turned(places, ahead), wide_dtype(self.k.dtype))
        return over_heads(lambda head: prepare_keys(head[0], self.options, head[1]), (k, lead_heads(table)))

    def turned(self, slots: jax.Array, ahead: jax.Array | None) -> jax.Array:
        """Return the positions by which rotary turns tokens in these slots.

        They count from the middle slot, where xPos is 1. Positions that are given, never with xPos, may be the last
        ones that int32 holds, and count from nothing else.
        """
        return slots - self.size // 2 if ahead is None else slots + ahead

    def store_first(self, new: Operands, exists: jax.Array, positions: jax.Array | None) -> "KVCache":
        """Keep those new tokens that are the first of their rows; arguments are those of `store`."""
        first = self.first
        if first is None:
            return self
        m, i = first.k.shape[2], self.length[:, None] + count_before(exists)
        places = jnp.where(exists, jnp.minimum(i, m), m)  # m is outside
        k = self._prepare_at(new.k, places, None if positions is None else positions - i)
        kept = FirstTokens(
            k=_write(first.k, k[:, :, 0], places),
            v=_write(first.v, new.v[:, :, 0], places),
            segment_ids=_write(first.segment_ids, segments_of(new, exists, self), places),
        )
        return dataclasses.replace(self, first=kept)

    def slots(self, exists: jax.Array) -> jax.Array:
        """Return the slots of new tokens, ``[b, n]``, see `ring_slots`."""
        length = self.length + exists.sum(1, dtype=jnp.int32)
        return ring_slots(self.length[:, None] + count_before(exists), exists, length, self.size)

    def count(self, segment_ids: jax.Array, exists: jax.Array) -> "KVCache":
        """Count new tokens, ``[b, n]``, whose keys and values stand in their slots."""
        length = self.length + exists.sum(1, dtype=jnp.int32)

        slots = self.slots(exists)
        if slots.shape[1] == 1:  # elementwise, so that XLA writes the rings of several layers at once
            is_new = jnp.arange(self.size, dtype=jnp.int32)[None] == slots
            segment_ids = jnp.where(is_new, segment_ids.astype(self.segment_ids.dtype), self.segment_ids)
        else:
            segment_ids = _write(self.segment_ids, segment_ids, slots)
        return dataclasses.replace(
            self,
            segment_ids=segment_ids,
            length=length,
            longest=jnp.maximum(self.longest, length),
        )

    def rewind(self, count: int | jax.Array) -> "KVCache":
        """Forget the last tokens, after rejected drafts say; they cost nothing, and other tokens may replace them.

        Args:
            count: Tokens to forget, one number or ``[b]`` integers, one for each row; may be traced.

        Returns:
            The cache without these tokens: later queries see what they would have seen before them.

        Raises:
            TypeError: `count` is not of integers.
            ValueError: `count` is of another shape, negative, more than there are, or goes back more than the `rewind`
                that the cache was made with, counted from the longest that a row has been. If it is traced, such a row
                raises nothing, but its outputs are NaN from then on.

        Example:
            >>> cache = KVCache.create(Window.sliding(4), batch=1, kv_heads=2, dim_head=8, rewind=3)
            >>> drafts = jnp.ones((1, 2, 3, 8))
            >>> _, cache = cached_attention(drafts, drafts, drafts, cache)
            >>> cache.rewind(2).length
            Array([1], dtype=int32)
        """
        is_known = _check_back(count, self)
        count = jnp.asarray(count, jnp.int32)
        if is_known:
            return dataclasses.replace(self, length=self.length - count)
        is_held = (count >= 0) & (count <= self._most_back(self.length, self.longest, jnp))
        return dataclasses.replace(
            self,
            v=spoil(self.v, ~is_held),
            length=jnp.where(is_held, self.length - count, 0),
            longest=jnp.where(is_held, self.longest, LOST),
        )

    def _most_back(self, length, longest, numpy):
        """Count the tokens that rows can go back, ``[b]``; `numpy` is NumPy or JAX's.

        They are at most the tokens that there are, and none that overwrote a key that is needed again.
        """
        return numpy.minimum(length, length - longest + self.slack)


def bound_options(options: AttentionOptions, max_length: int | None) -> AttentionOptions:
    """Return options by which a causal query sees its last `max_length` keys, if their window has more or no limit.

    In a text of so many tokens they see the same. None bounds nothing.
    """
    window = options.window
    if max_length is None or not window.causal or not (window.is_global or window.capacity > max_length):
        return options
    return dataclasses.replace(options, window=Window.sliding(max_length))


@jax.jit
def _append(cache, new, exists, positions):
    """Write new tokens as they are given; see `KVCache.store`."""

    def append(cache, new, exists, positions):
        new = hide_masked(new._replace(v=spoil_lost(new.v, cache)))
        return cache.store(new, exists, positions)

    return spread_by_compiler(append, (cache, new, exists, positions), lambda: specs_of(cache, new))


def specs_of(cache: KVCache, new: Operands) -> KVCache:
    """Return how a cache with new tokens is spread over explicit axes of a mesh: as it was, or as the tokens are."""
    heads = spec_of(cache.k, new.k, rank=2)
    grown = dataclasses.replace(cache, global_keys=None)
    specs = jax.tree.map(lambda x: heads if x.ndim == cache.k.ndim else PartitionSpec(*heads[:1]), grown)
    return dataclasses.replace(specs, global_keys=jax.tree.map(spec_of, cache.global_keys))


def _write(x, new, slots):
    """Write new entries, ``[b, h, n, d]`` or ``[b, n]``, to slots ``[b, n]``, but for those outside.

    This is an operation of its own, which `checkify` does not look into: it takes slots outside for errors, whatever
    the mode of a scatter, and fails at one that is mapped (jax 0.10 to 0.12).
    """
    return _write_slots(None, x, new.astype(x.dtype), slots)[0]


def _scatter(x, new, slots):
    """Define `_write`."""
    is_one = slots.shape[1] == 1

    def write(x, new, slots):
        at = slots if x.ndim == 1 else (..., slots, slice(None))
        return x.at[at].set(new, mode="drop", unique_indices=is_one)

    return (jax.vmap(write)(x, new, slots),)


_write_slots = Fused("write_slots", _scatter)


def _check_back(count, cache):
    """Raise unless `count` is one number of tokens, or one for each row, that a cache can go back.

    Return whether all of this is known, so that none remains to be checked.
    """
    if not (is_integer(count) or is_array(count)):
        raise TypeError(f"`count` must be an int or an array of integers, got {describe(count)}; it counts tokens.")
    number, b = read_known(count), cache.length.shape[0]
    given: Any = count if number is None else number
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"`count` must be of integers, got {count.dtype}; it counts tokens.")
    if given.shape not in ((), (b,)):
        raise ValueError(f"`count` must be one number or [{b}], one for each row, got shape {given.shape}; reshape it.")
    if number is None and not cache.slack:
        raise ValueError(
            "`count` must be known for a cache that was made with `rewind=0`, got a traced one; make one with a larger."
        )
    if number is not None and (number.min() < 0 or number.max() > LAST_POSITION):
        raise ValueError(f"`count` must be at least 0, and of no more tokens than there are, got {count}; give fewer.")
    length, longest = read_known(cache.length), read_known(cache.longest)
    if number is None or length is None or longest is None:
        return False
    most = cache._most_back(length, longest, np)
    if (number > most).any():
        raise ValueError(
            f"`count` must be from 0 to the {most.tolist()} tokens that rows can go back, got {count}; make the "
            f"cache with a larger `rewind` than {cache.slack}, which counts from the longest that a row has been."
        )
    return True


def spoil(v: jax.Array, is_lost: jax.Array) -> jax.Array:
    """Replace the values ``[b, ...]`` of rows that are lost, ``[b]`` bool, by NaN."""
    is_lost = is_lost.reshape(-1, *[1] * (v.ndim - 1))
    return jnp.where(is_lost, jnp.asarray(jnp.nan, v.dtype), v)


def spoil_lost(v: jax.Array, cache: KVCache) -> jax.Array:
    """Replace new values, ``[b, ...]``, of rows that went back too far by NaN, see `KVCache.rewind`."""
    return spoil(v, cache.longest == LOST) if cache.slack else v


def segments_of(new: Operands, exists: jax.Array, cache: KVCache) -> jax.Array:
    """Return the documents of new tokens, ``[b, n]``; 0 where none are given."""
    dtype = cache.segment_ids.dtype
    if new.q_segments is None:
        return jnp.zeros(exists.shape, dtype)
    return jnp.broadcast_to(new.q_segments[:, 0, 0], exists.shape).astype(dtype)


def lead_heads(x: jax.Array) -> jax.Array:
    """Give ``[b, ...]`` the axes ``[b, h, g, ...]`` of operands."""
    return x[:, None, None]


def count_before(exists: jax.Array) -> jax.Array:
    """Count the tokens that exist before each, ``[b, n]`` bool to int32."""
    exists = exists.astype(jnp.int32)
    return jnp.cumsum(exists, axis=1) - exists


def ring_slots(positions: jax.Array, exists: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Find the slots of new tokens in a ring, ``[b, n]``; `size`, which is outside, for those that leave no trace.

    Args:
        positions: Positions of the tokens in their row, ``[b, n]``.
        exists: Which of them exist, ``[b, n]`` bool.
        length: Tokens including the new ones, ``[b]``: only the last `size` of them stay.
        size: Slots.
    """
    return jnp.where(exists & (positions >= length[:, None] - size), positions % size, size)


def make_exportable(cache: type, write: Callable[[Any], bytes], read: Callable[[bytes], Any]):
    """Let `jax.export` serialise programs that take or return a cache, whose static fields are written and read."""
    with contextlib.suppress(ValueError):  # registered before, by a module that was reloaded
        export.register_pytree_node_serialization(
            cache,
            serialized_name=f"flax_local_attention.{cache.__name__}",
            serialize_auxdata=write,
            deserialize_auxdata=read,
        )


def _read_fields(text):
    """Read the static fields of an exported cache."""
    fields = json.loads(text)
    return options_from_json(fields["options"]), fields["is_bounded"]


make_exportable(
    KVCache,
    lambda fields: json.dumps({"options": options_to_json(fields[0]), "is_bounded": fields[1]}).encode(),
    _read_fields,
)


def check_cache_dtype(dtype: Dtype, name: str = "dtype"):
    """Raise unless a dtype holds the fractions of keys."""
    check_dtype(name, dtype)
    if jnp.finfo(dtype).bits < 8:
        raise TypeError(
            f"`{name}` of a cache must have 8 bits or more, got {jnp.dtype(dtype)}; use jnp.bfloat16, or "
            "jnp.float8_e4m3fn, the smallest, to save memory."
        )


def check_is_cache(cache: KVCache):
    """Raise unless a cache is a `KVCache`."""
    check_kind("cache", cache, KVCache, "make one with KVCache.create")


def check_heads(cache: KVCache, k: jax.Array, v: jax.Array):
    """Raise unless a cache has the batch, heads and widths of new keys and values."""
    for name, x, held in (("k", k, cache.k), ("v", v, cache.v)):
        b, h, _, d = held.shape
        if x.ndim != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (b, h, d):
            raise ValueError(
                f"`cache` must have {name}'s batch, heads and width, got {name} {x.shape} and a cache for "
                f"[{b}, {h}, n, {d}]; make a cache for this batch and model."
            )


def check_of_new(n: int, mask: Any, segment_ids: Any, positions: Any):
    """Raise if an array that is to say something of n new tokens, ``[..., n]``, is of the whole text so far."""
    for name, x, meaning in (
        ("mask", mask, "which of the new tokens exist"),
        ("segment_ids", segment_ids, "which documents the new tokens belong to"),
        ("positions", positions, "where the new tokens are"),
    ):
        if getattr(x, "ndim", 0) and x.shape[-1] > n > 0:
            raise ValueError(
                f"With a cache `{name}` must say {meaning}, [b, {n}], got {x.shape}; leave out the tokens that are in "
                f"the cache: `{name}[..., -{n}:]`."
            )


def check_new_tokens(
    cache: KVCache, operands: Operands, positions: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return which new tokens exist, ``[b, n]`` bool, and their positions if these are given, ``[b, n]``.

    Raises:
        TypeError, ValueError: There is not a query for each key, a mask or documents differ between heads, `positions`
            are wrong or not to be given, or positions go beyond int32.
    """
    (b, _, _, n, _), n_keys = operands.q.shape, operands.k.shape[-2]
    if n_keys != n:
        raise ValueError(
            f"`k` and `v` must be of the new tokens, as many as `q` with a cache, got {n_keys} and {n}; "
            "keys from before are in the cache."
        )
    for name, x in (("mask", operands.mask), ("segment_ids", operands.q_segments)):
        if x is not None and x.shape[1:3] != (1, 1):
            raise ValueError(
                f"`{name}` must be [b, n] with a cache, the same for all heads, got one for {x.shape[1] * x.shape[2]} "
                "heads; make a cache for each, or leave the axis out."
            )
    if (length := read_known(cache.length)) is not None:
        check_last_position("cache.length", int(length.max()) + n, "begin a new cache")
    positions = check_positions(positions, b, n)
    if positions is not None:
        check_turns(cache.options)
    if operands.mask is None:
        return jnp.ones((b, n), bool), positions
    return jnp.broadcast_to(operands.mask[:, 0, 0], (b, n)), positions


@struct.dataclass
class LayerCache:
    """What a layer remembers: its attention's cache and, if one is inserted, its global layer's."""

    attn: KVCache
    global_attn: Any = None

    def rewind(self, count: int | jax.Array) -> "LayerCache":
        """Forget the last tokens, see `KVCache.rewind`; an inserted layer's cache must offer the same."""
        if self.global_attn is not None and not hasattr(self.global_attn, "rewind"):
            raise ValueError(
                "The cache of a layer of `global_attn_layer` must offer `rewind(count)` to go back, got "
                f"{type(self.global_attn).__name__} without; add it, or keep the cache from before."
            )
        global_attn = None if self.global_attn is None else self.global_attn.rewind(count)
        return LayerCache(self.attn.rewind(count), global_attn)


@struct.dataclass
class TransformerCache:
    """What a `LocalTransformer` remembers.

    Attributes:
        rings: One cache a layer, without the lengths of its rows, which are the same in all layers; see `layers`.
        length: Tokens so far, ``[b]`` int32.
        longest: The most that `length` has been, ``[b]`` int32.
        segment_ids: Documents of the last tokens, ``[b, rewind + 1]`` int32: that of the token at position p in slot
            ``p % (rewind + 1)``.
        segment_starts: Positions at which these documents begin, likewise: absolute positions count from there.
    """

    rings: tuple[LayerCache, ...]
    length: jax.Array
    longest: jax.Array
    segment_ids: jax.Array
    segment_starts: jax.Array

    @classmethod
    def create(cls, layers: Sequence[LayerCache], batch: int, rewind: int) -> "TransformerCache":
        """Make a cache of empty ones; its arrays are its own, so that it may be donated."""
        length, longest = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
        segment_ids, starts = jnp.zeros((batch, rewind + 1), int), jnp.zeros((batch, rewind + 1), jnp.int32)
        return cls((), length, longest, segment_ids, starts).with_layers(layers)

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """One cache a layer, with the lengths of its rows."""
        return tuple(_with_lengths(layer, self.length, self.longest) for layer in self.rings)

    def with_layers(self, layers: Sequence[LayerCache]) -> "TransformerCache":
        """Return this cache with other layers, and their lengths."""
        rings = tuple(_with_lengths(layer, None, None) for layer in layers)
        if not rings:
            return self
        return dataclasses.replace(self, rings=rings, length=layers[0].attn.length, longest=layers[0].attn.longest)

    def place(self, exists: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, "TransformerCache"]:
        """Find where new tokens stand in their documents, and count them.

        Args:
            exists: Which of the new tokens exist, ``[b, n]`` bool.
            segment_ids: Their documents, ``[b, n]`` integers. None means that of the last token.

        Returns:
            Positions, ``[b, n]`` int32, and the cache that counts the tokens; its layers are as before.
        """
        counts = dataclasses.replace(self, rings=())
        positions, counted = spread_by_compiler(
            TransformerCache._place,
            (counts, exists, segment_ids),
            lambda: spec_of(self.length, exists, rank=1),
        )
        return positions, dataclasses.replace(counted, rings=self.rings)

    def _place(self, exists, segment_ids):
        """Place tokens by a cache without layers, see `place`."""
        positions = self.length[:, None] + count_before(exists)
        last_id, start = self.last_document()
        length = self.length + exists.sum(1, dtype=jnp.int32)
        counted = dataclasses.replace(self, length=length, longest=jnp.maximum(self.longest, length))
        size = self.segment_ids.shape[1]
        if segment_ids is None:
            starts, segment_ids = start[:, None], last_id[:, None]
            if size == 1:  # the last token's document goes on
                return positions - starts, counted
        else:
            segment_ids = segment_ids.astype(last_id.dtype)
            starts = begin_documents(positions, exists, segment_ids, last_id, start)
        slots = ring_slots(positions, exists, length, size)
        ids, starts_of_slots = (jnp.broadcast_to(x, slots.shape) for x in (segment_ids, starts))
        return positions - starts, dataclasses.replace(
            counted,
            segment_ids=_write(self.segment_ids, ids, slots),
            segment_starts=_write(self.segment_starts, starts_of_slots, slots),
        )

    def last_document(self) -> tuple[jax.Array, jax.Array]:
        """Return the document of the last token, and the position at which it begins, both ``[b]``."""
        slot = (self.length[:, None] - 1) % self.segment_ids.shape[1]
        last = (jnp.take_along_axis(x, slot, axis=1)[:, 0] for x in (self.segment_ids, self.segment_starts))
        return next(last), next(last)

    def rewind(self, count: int | jax.Array) -> "TransformerCache":
        """Forget the last tokens of each row; arguments and errors are those of `KVCache.rewind`."""
        layers = [layer.rewind(count) for layer in self.layers]  # which check `count`
        length = jnp.maximum(self.length - jnp.asarray(count, jnp.int32), 0)
        return dataclasses.replace(self, length=length).with_layers(layers)


def _with_lengths(layer: LayerCache, length: Any, longest: Any) -> LayerCache:
    """Return the cache of a layer with other lengths of its rows, None for those that are kept elsewhere."""
    return dataclasses.replace(layer, attn=dataclasses.replace(layer.attn, length=length, longest=longest))


for _tuple in (FirstTokens, GlobalKeys):
    with contextlib.suppress(ValueError):  # registered before, by a module that was reloaded
        export.register_namedtuple_serialization(_tuple, serialized_name=f"flax_local_attention.{_tuple.__name__}")

for _cache in (LayerCache, TransformerCache):
    make_exportable(_cache, lambda _: b"", lambda _: ())


def begin_documents(
    positions: jax.Array, exists: jax.Array, segment_ids: jax.Array, last_id: jax.Array, start: jax.Array
) -> jax.Array:
    """Find the position at which each token's document begins, ``[b, n]``; a document is a run of equal segments.

    Args:
        positions: Positions of the tokens in their row, ``[b, n]``.
        exists: Which of the tokens exist, ``[b, n]`` bool.
        segment_ids: Their segments, ``[b, n]`` with n at least 1.
        last_id: Segment of the token before them, ``[b]``.
        start: Position at which its document begins, ``[b]``.
    """
    newest = lax.cummax(jnp.where(exists, jnp.arange(positions.shape[1], dtype=jnp.int32), -1), axis=1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(newest, 0), axis=1)
    ids = jnp.where(newest < 0, last_id[:, None], ids)  # of the newest token up to each
    ids_before = jnp.concatenate([last_id[:, None], ids[:, :-1]], axis=1)
    begins = jnp.where(exists & (segment_ids != ids_before), positions, 0)
    return jnp.maximum(lax.cummax(begins, axis=1), start[:, None])


def count_in_documents(segment_ids: jax.Array) -> jax.Array:
    """Count the tokens of each one's document before it, ``[b, n]`` with n at least 1.

    On a row that is spread over explicit axes of a mesh, devices exchange the last segment and the begin
    of the last document of each of their rows.
    """

    def count(ids, last_id=None, shard: Any = 0):
        b, n = ids.shape
        positions = jnp.broadcast_to(shard * n + jnp.arange(n, dtype=jnp.int32), (b, n))
        exist, last_id = jnp.ones((b, n), bool), ids[:, 0] if last_id is None else last_id
        return positions, begin_documents(positions, exist, ids, last_id, jnp.zeros((b,), jnp.int32))

    def count_on_shard(ids):
        shard, shards = lax.axis_index(name), lax.axis_size(name)
        before = shift(ids[:, -1], name, 1)
        positions, starts = count(ids, jnp.where(shard == 0, ids[:, 0], before), shard)
        latest = lax.all_gather(starts[:, -1], name)
        start = jnp.where(jnp.arange(shards)[:, None] < shard, latest, 0).max(0)
        return positions - jnp.maximum(starts, start[:, None])

    spec, name = spec_of(segment_ids), spec_of(segment_ids)[1]
    mesh = jax.typeof(segment_ids).sharding.mesh
    if name is None or not is_in_order(name, mesh.axis_names):
        return spread_by_compiler(lambda ids: operator.sub(*count(ids)), (segment_ids,), lambda: spec)
    names = set(mesh.explicit_axes)
    return jax.shard_map(count_on_shard, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=names)(segment_ids)
