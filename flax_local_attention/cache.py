"""Caches for decoding: a ring of exactly the keys that the next query can see, and caches of layers and models."""

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

# `KVCache.longest` of a row that was rewound too far.
LOST = LAST_POSITION


class FirstTokens(NamedTuple):
    """The first m tokens of each row, which `KVCache` keeps; 0 in place of tokens to come.

    Attributes:
        k: Keys, ``[b, h, m, d]``, rotated by their position.
        v: Values, ``[b, h, m, d]``.
        segment_ids: Documents, ``[b, m]``.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array


@struct.dataclass
class KVCache:
    """The keys and values that the next query can see, in a ring: O(window) for a text of any length.

    A token's position is the number of tokens before it in its row. The key at position j is stored in slot
    ``j % size``. ``size`` is ``B w + 1`` for an exact window and ``(B + 1) w`` for a plain one, plus the tokens that
    `rewind` may forget. Each row of the batch has its own length.

    The cache holds the options of attention, because the stored keys depend on them: no call can use other options.
    Each key is rotated once, by its slot. The distance between a query and a key is the difference of their slots,
    plus ``size`` if the ring has wrapped around in between. So rotation costs nothing for old keys, its error does not
    grow, and neither do positions.

    Attributes:
        k: Keys, ``[b, h, size, d]``.
        v: Values, ``[b, h, size, d]``; their width may differ.
        segment_ids: Documents of the keys, ``[b, size]`` int32 (int64 under ``jax_enable_x64``).
        length: Tokens in each row, ``[b]`` int32: the position of the next token.
        longest: Largest `length` that each row has had, ``[b]`` int32: `rewind` counts from it.
        options: Options of attention; static.
        is_bounded: Whether the cache remembers fewer tokens than the window it was made for; static.
        first: The first tokens of each row, which all later tokens see; None if none are kept.
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
            options: Options with a causal window; or the window alone, which means defaults for everything else.
            batch: Rows, b.
            kv_heads: Heads of keys and values, h.
            dim_head: Width of a head, d.
            dim_value: Width of a head's values. None means `dim_head`.
            dtype: Floating dtype of keys and values.
            rewind: Most tokens that `KVCache.rewind` may forget; each adds a slot.
            keep_first: Tokens at the beginning of each row that all later tokens see besides their windows. They keep
                a model stable on texts longer than those it was trained on (StreamingLLM, arXiv 2309.17453). For these
                keys, rotary places query i at ``min(i, keep_first + capacity - 1)``: their distance stops growing when
                the window moves past them. A bias does not affect them.
            max_length: Most tokens that the cache remembers, the last ones, for a window that is longer or has no
                limit. The cache then uses ``Window.sliding(max_length)``, which sees the same keys in a text of up to
                `max_length` tokens.
            global_keys: Keys that every query sees, as in `local_attention`, with a mask of ``[b, m]``. The cache keeps
                a copy.

        Raises:
            TypeError: `options` is neither options nor a window, a size is not an int, or `dtype` is not floating.
            ValueError: The window is not causal, the window has no limit and `max_length` is None, a size is out of
                range, rotary is wider than a head, or `global_keys` have the wrong shape.

        Examples:
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
                "it, or a window with a limit."
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
        """The window of the options."""
        return self.options.window

    @property
    def size(self) -> int:
        """Slots of the ring."""
        return self.k.shape[2]

    @property
    def slack(self) -> int:
        """Slots beyond those that a query can see: the most tokens that `rewind` may forget."""
        return self.size - self.window.capacity

    def positions(self) -> jax.Array:
        """Return the position of the key in each slot, ``[b, size]``; negative for an unused slot."""
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
        """Store new tokens without attending to them.

        `append` followed by `attend_cache` does in two steps what `cached_attention` does in one. With two steps,
        several layers can read the keys of one.

        Args:
            k: Keys of the new tokens, ``[b, h, n, d]``.
            v: Values of the new tokens, ``[b, h, n, d]``; their width may differ.
            mask: As in `cached_attention`.
            segment_ids: As in `cached_attention`.
            positions: As in `cached_attention`.

        Returns:
            The cache with the new tokens in it.

        Raises:
            TypeError: As in `cached_attention`.
            ValueError: As in `cached_attention`.

        Examples:
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
        """Write checked new tokens.

        Args:
            new: Operands of the new tokens, after `hide_masked` and `spoil_lost`.
            exists: Which of the tokens exist, ``[b, n]`` bool.
            positions: Explicit positions for rotary, ``[b, n]``, or None.
        """
        i = self.length[:, None] + count_before(exists)
        k, slots = self.prepare(new.k, i, None if positions is None else positions - i), self.slots(exists)
        stored = dataclasses.replace(self, k=_write(self.k, k[:, :, 0], slots), v=_write(self.v, new.v[:, :, 0], slots))
        return stored.store_first(new, exists, positions).count(segments_of(new, exists, self), exists)

    def prepare(self, k: jax.Array, slots: jax.Array, ahead: jax.Array | None) -> jax.Array:
        """Normalise and rotate keys as the cache stores them.

        Args:
            k: Keys, ``[b, h, 1, n, d]``.
            slots: Their slots, ``[b, n]``, or their positions, which are taken modulo `size`.
            ahead: Explicit position of each token minus its position in the row, ``[b, n]``, or None.

        Returns:
            Keys, ``[b, h, 1, n, d]``.
        """
        return self._prepare_at(k, slots % self.size, ahead)

    def _prepare_at(self, k, places, ahead):
        """Normalise and rotate keys for given places, ``[b, n]``; see `prepare`."""
        rotary = self.options.rotary
        if rotary is None:
            return over_heads(lambda k: prepare_keys(k, self.options, None), k)
        table = rotary.key_table(self.turned(places, ahead), wide_dtype(self.k.dtype))
        return over_heads(lambda head: prepare_keys(head[0], self.options, head[1]), (k, lead_heads(table)))

    def turned(self, slots: jax.Array, ahead: jax.Array | None) -> jax.Array:
        """Return the positions by which rotary rotates tokens in given slots.

        They count from the middle slot, where the scale of xPos is 1. With `ahead`, which excludes xPos, they are not
        shifted, because explicit positions may be as large as int32 allows.

        Args:
            slots: Slots, integers.
            ahead: As in `prepare`.
        """
        return slots - self.size // 2 if ahead is None else slots + ahead

    def store_first(self, new: Operands, exists: jax.Array, positions: jax.Array | None) -> "KVCache":
        """Keep the new tokens that are among the first of their rows; see `store` for the arguments."""
        first = self.first
        if first is None:
            return self
        m, i = first.k.shape[2], self.length[:, None] + count_before(exists)
        places = jnp.where(exists, jnp.minimum(i, m), m)  # m is out of range: not written
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
        """Update lengths and documents for new tokens, ``[b, n]``, whose keys and values are stored already."""
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
        """Forget the last tokens, for example rejected drafts of speculative decoding, at no cost.

        Args:
            count: Tokens to forget, one number or ``[b]`` integers, one for each row; may be traced.

        Returns:
            The cache without these tokens: later queries see what they would see if the tokens had never been there.

        Raises:
            TypeError: `count` is not an integer or an array of integers.
            ValueError: `count` has the wrong shape, is negative, exceeds the length of a row, or exceeds the `rewind`
                that the cache was made with, counted from the largest length that the row has had. If `count` is
                traced, such a row raises nothing, but its outputs are NaN from then on.

        Examples:
            >>> cache = KVCache.create(Window.sliding(4), batch=1, kv_heads=2, dim_head=8, rewind=3)
            >>> drafts = jnp.ones((1, 2, 3, 8))
            >>> _, cache = cached_attention(drafts, drafts, drafts, cache)
            >>> cache.rewind(2).length
            Array([1], dtype=int32)
        """
        is_known = _check_forget(count, self)
        count = jnp.asarray(count, jnp.int32)
        if is_known:
            return dataclasses.replace(self, length=self.length - count)
        is_held = (count >= 0) & (count <= self._most_to_forget(self.length, self.longest, jnp))
        return dataclasses.replace(
            self,
            v=spoil(self.v, ~is_held),
            length=jnp.where(is_held, self.length - count, 0),
            longest=jnp.where(is_held, self.longest, LOST),
        )

    def _most_to_forget(self, length, longest, numpy):
        """Return how many tokens each row can forget, ``[b]``; `numpy` is `np` or `jnp`.

        A row can forget at most all its tokens, and none that overwrote a key that would be visible again.
        """
        return numpy.minimum(length, length - longest + self.slack)


def bound_options(options: AttentionOptions, max_length: int | None) -> AttentionOptions:
    """Return options whose causal window is at most `max_length` keys long; None means no bound.

    In a text of up to `max_length` tokens, queries see the same keys with both.
    """
    window = options.window
    if max_length is None or not window.causal or not (window.is_global or window.capacity > max_length):
        return options
    return dataclasses.replace(options, window=Window.sliding(max_length))


@jax.jit
def _append(cache, new, exists, positions):
    """Hide masked tokens, spoil lost rows and store the rest; see `KVCache.store`."""

    def append(cache, new, exists, positions):
        new = hide_masked(new._replace(v=spoil_lost(new.v, cache)))
        return cache.store(new, exists, positions)

    return spread_by_compiler(append, (cache, new, exists, positions), lambda: specs_of(cache, new))


def specs_of(cache: KVCache, new: Operands) -> KVCache:
    """Return the specs of a cache over explicit mesh axes after new tokens: its own, or else those of the tokens."""
    heads = spec_of(cache.k, new.k, rank=2)
    grown = dataclasses.replace(cache, global_keys=None)
    specs = jax.tree.map(lambda x: heads if x.ndim == cache.k.ndim else PartitionSpec(*heads[:1]), grown)
    return dataclasses.replace(specs, global_keys=jax.tree.map(spec_of, cache.global_keys))


def _write(x, new, slots):
    """Write new entries, ``[b, h, n, d]`` or ``[b, n]``, to slots ``[b, n]``, except to slots out of range.

    This is a primitive of its own, so that `checkify` does not see the scatter inside: in any mode of a scatter it
    reports slots out of range as errors, and it fails for a scatter under vmap (jax 0.10 to 0.12).
    """
    return _write_slots(None, x, new.astype(x.dtype), slots)[0]


def _scatter(x, new, slots):
    """Scatter new entries, as the definition of `_write`."""
    is_one = slots.shape[1] == 1

    def write(x, new, slots):
        at = slots if x.ndim == 1 else (..., slots, slice(None))
        return x.at[at].set(new, mode="drop", unique_indices=is_one)

    return (jax.vmap(write)(x, new, slots),)


_write_slots = Fused("write_slots", _scatter)


def _check_forget(count, cache):
    """Raise unless a cache can forget `count` tokens, and return whether every value for this check was known."""
    if not (is_integer(count) or is_array(count)):
        raise TypeError(f"`count` must be an int or an array of integers, got {describe(count)}; it counts tokens.")
    number, b = read_known(count), cache.length.shape[0]
    given: Any = count if number is None else number
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"`count` must be integers, got {count.dtype}; it counts tokens.")
    if given.shape not in ((), (b,)):
        raise ValueError(f"`count` must be one number or [{b}], one for each row, got shape {given.shape}; reshape it.")
    if number is None and not cache.slack:
        raise ValueError(
            "`count` must be known for a cache with `rewind=0`, got a traced one; make one with a larger `rewind`."
        )
    if number is not None and (number.min() < 0 or number.max() > LAST_POSITION):
        raise ValueError(f"`count` must be from 0 to the number of tokens in a row, got {count}; change it.")
    length, longest = read_known(cache.length), read_known(cache.longest)
    if number is None or length is None or longest is None:
        return False
    most = cache._most_to_forget(length, longest, np)
    if (number > most).any():
        raise ValueError(
            f"`count` must be from 0 to the {most.tolist()} tokens that rows can forget, got {count}; make the "
            f"cache with a larger `rewind` than {cache.slack}, which counts from the largest length of a row."
        )
    return True


def spoil(v: jax.Array, is_lost: jax.Array) -> jax.Array:
    """Replace the values ``[b, ...]`` of lost rows by NaN; `is_lost` is ``[b]`` bool."""
    is_lost = is_lost.reshape(-1, *[1] * (v.ndim - 1))
    return jnp.where(is_lost, jnp.asarray(jnp.nan, v.dtype), v)


def spoil_lost(v: jax.Array, cache: KVCache) -> jax.Array:
    """Replace new values, ``[b, ...]``, of rows that were rewound too far by NaN, see `KVCache.rewind`."""
    return spoil(v, cache.longest == LOST) if cache.slack else v


def segments_of(new: Operands, exists: jax.Array, cache: KVCache) -> jax.Array:
    """Return the documents of new tokens, ``[b, n]``; 0 if none are given."""
    dtype = cache.segment_ids.dtype
    if new.q_segments is None:
        return jnp.zeros(exists.shape, dtype)
    return jnp.broadcast_to(new.q_segments[:, 0, 0], exists.shape).astype(dtype)


def lead_heads(x: jax.Array) -> jax.Array:
    """Give ``[b, ...]`` the axes ``[b, h, g, ...]`` of operands."""
    return x[:, None, None]


def count_before(exists: jax.Array) -> jax.Array:
    """Count the existing tokens before each one, ``[b, n]`` bool to int32."""
    exists = exists.astype(jnp.int32)
    return jnp.cumsum(exists, axis=1) - exists


def ring_slots(positions: jax.Array, exists: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Find the slots of new tokens in a ring, ``[b, n]``; `size`, which is out of range, for tokens not to store.

    Args:
        positions: Positions of the tokens in their row, ``[b, n]``.
        exists: Which of them exist, ``[b, n]`` bool.
        length: Tokens including the new ones, ``[b]``; only the last `size` of them are stored.
        size: Slots.
    """
    return jnp.where(exists & (positions >= length[:, None] - size), positions % size, size)


def make_exportable(cache: type, write: Callable[[Any], bytes], read: Callable[[bytes], Any]):
    """Let `jax.export` serialise programs that take or return a cache.

    Args:
        cache: Class of the cache.
        write: Function that turns its static fields into bytes.
        read: The inverse of `write`.
    """
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
    """Raise unless a dtype is floating and has 8 bits or more."""
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
    """Raise if an array that must describe n new tokens, ``[..., n]``, describes more, such as the whole text."""
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
    """Return which new tokens exist, ``[b, n]`` bool, and their explicit positions, ``[b, n]``, or None.

    Raises:
        TypeError: `positions` are not integers.
        ValueError: Queries and keys differ in number, a mask or documents differ between heads, `positions` are wrong
            or not allowed, or positions exceed int32.
    """
    (b, _, _, n, _), n_keys = operands.q.shape, operands.k.shape[-2]
    if n_keys != n:
        raise ValueError(
            f"With a cache `k` and `v` must have the new tokens alone, as many as `q`, got {n_keys} and {n}; "
            "leave out earlier keys, which are in the cache."
        )
    for name, x in (("mask", operands.mask), ("segment_ids", operands.q_segments)):
        if x is not None and x.shape[1:3] != (1, 1):
            raise ValueError(
                f"`{name}` must be [b, n] with a cache, the same for all heads, got one for each of "
                f"{x.shape[1] * x.shape[2]} heads; make a cache for each head, or drop that axis."
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
    """The cache of a layer: its attention's, and that of its inserted global layer, if any."""

    attn: KVCache
    global_attn: Any = None

    def rewind(self, count: int | jax.Array) -> "LayerCache":
        """Forget the last tokens, see `KVCache.rewind`; an inserted layer's cache must have the same method."""
        if self.global_attn is not None and not hasattr(self.global_attn, "rewind"):
            raise ValueError(
                "The cache of a layer of `global_attn_layer` must have `rewind(count)` to forget tokens, got "
                f"{type(self.global_attn).__name__} without; add it, or keep the earlier cache."
            )
        global_attn = None if self.global_attn is None else self.global_attn.rewind(count)
        return LayerCache(self.attn.rewind(count), global_attn)


@struct.dataclass
class TransformerCache:
    """The cache of a `LocalTransformer`.

    Attributes:
        rings: One cache per layer, without the lengths of its rows, which all layers share; see `layers`.
        length: Tokens in each row, ``[b]`` int32.
        longest: Largest `length` that each row has had, ``[b]`` int32.
        segment_ids: Documents of the last tokens, ``[b, rewind + 1]`` int32. The token at position p has slot
            ``p % (rewind + 1)``.
        segment_starts: Positions at which these documents begin, ``[b, rewind + 1]`` int32. Absolute positions count
            from there.
    """

    rings: tuple[LayerCache, ...]
    length: jax.Array
    longest: jax.Array
    segment_ids: jax.Array
    segment_starts: jax.Array

    @classmethod
    def create(cls, layers: Sequence[LayerCache], batch: int, rewind: int) -> "TransformerCache":
        """Make a cache from the empty caches of layers; no two of its arrays are shared, so it can be donated."""
        length, longest = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
        segment_ids, starts = jnp.zeros((batch, rewind + 1), int), jnp.zeros((batch, rewind + 1), jnp.int32)
        return cls((), length, longest, segment_ids, starts).with_layers(layers)

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """One cache per layer, with the lengths of its rows."""
        return tuple(_with_lengths(layer, self.length, self.longest) for layer in self.rings)

    def with_layers(self, layers: Sequence[LayerCache]) -> "TransformerCache":
        """Return this cache with other layers and their lengths."""
        rings = tuple(_with_lengths(layer, None, None) for layer in layers)
        if not rings:
            return self
        return dataclasses.replace(self, rings=rings, length=layers[0].attn.length, longest=layers[0].attn.longest)

    def place(self, exists: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, "TransformerCache"]:
        """Find the positions of new tokens in their documents, and count the tokens.

        Args:
            exists: Which of the new tokens exist, ``[b, n]`` bool.
            segment_ids: Their documents, ``[b, n]`` integers. None means the document of the last token.

        Returns:
            Positions, ``[b, n]`` int32, and the cache with the tokens counted and its layers unchanged.
        """
        counts = dataclasses.replace(self, rings=())
        positions, counted = spread_by_compiler(
            TransformerCache._place,
            (counts, exists, segment_ids),
            lambda: spec_of(self.length, exists, rank=1),
        )
        return positions, dataclasses.replace(counted, rings=self.rings)

    def _place(self, exists, segment_ids):
        """Do what `place` does, for a cache without layers."""
        positions = self.length[:, None] + count_before(exists)
        last_id, start = self.last_document()
        length = self.length + exists.sum(1, dtype=jnp.int32)
        counted = dataclasses.replace(self, length=length, longest=jnp.maximum(self.longest, length))
        size = self.segment_ids.shape[1]
        if segment_ids is None:
            starts, segment_ids = start[:, None], last_id[:, None]
            if size == 1:  # the last token's document continues
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
        """Forget the last tokens of each row; arguments and errors are as in `KVCache.rewind`."""
        layers = [layer.rewind(count) for layer in self.layers]  # which check `count`
        length = jnp.maximum(self.length - jnp.asarray(count, jnp.int32), 0)
        return dataclasses.replace(self, length=length).with_layers(layers)


def _with_lengths(layer: LayerCache, length: Any, longest: Any) -> LayerCache:
    """Return the cache of a layer with other lengths of its rows; None if the lengths are kept elsewhere."""
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
    ids = jnp.where(newest < 0, last_id[:, None], ids)  # segment of the newest existing token up to each
    ids_before = jnp.concatenate([last_id[:, None], ids[:, :-1]], axis=1)
    begins = jnp.where(exists & (segment_ids != ids_before), positions, 0)
    return jnp.maximum(lax.cummax(begins, axis=1), start[:, None])


def count_in_documents(segment_ids: jax.Array) -> jax.Array:
    """Count the earlier tokens in the same document for each token, ``[b, n]`` with n at least 1.

    If rows are spread over explicit axes of a mesh, devices exchange the last segment and the start of the last
    document of their parts of rows.
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
