"""What the pictures show, asked of the library.

Queries and keys are zeros, so that a query gives equal weight to all keys that it sees. Values are one-hot, so that the
output says which keys these are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from flax_local_attention import AttentionOptions, KVCache, Operands, Window, cached_attention, local_attention
from flax_local_attention.kernels.borders import fetch_borders, parts_of
from flax_local_attention.kernels.dense import Dense
from flax_local_attention.kernels.plan import visited_blocks
from flax_local_attention.kernels.windowed import plan_blocks


def seen_by_window(window: Window, n: int) -> np.ndarray:
    """Return which keys each query sees, ``[n, n]`` bool."""
    return window.sees(np.arange(n)[:, None], np.arange(n))


def seen_in_call(window: Window, n: int, *, memory: int = 0, **arrays) -> np.ndarray:
    """Return which keys each query of a call gathers values from, ``[n, memory + n]`` bool.

    Args:
        window: Window of the call.
        n: Tokens.
        memory: Keys that every query sees, the first columns.
        arrays: Further arguments of `local_attention`.
    """
    q, values = jnp.zeros((1, 1, n, 1)), jnp.eye(memory + n)[None, None]
    if memory:
        arrays["global_keys"] = jnp.zeros((1, memory, 1)), values[0, :, :memory]
    return np.asarray(local_attention(q, q, values[:, :, memory:], window=window, **arrays)[0, 0] > 0)


def seen_in_chunks(window: Window, chunks: tuple[int, ...]) -> np.ndarray:
    """Return which keys each query gathers values from if tokens come in chunks, through a cache; ``[n, n]`` bool."""
    n, first, rows = sum(chunks), 0, []
    cache = KVCache.create(window, batch=1, kv_heads=1, dim_head=1, dim_value=n)
    for size in chunks:
        q, values = jnp.zeros((1, 1, size, 1)), jnp.eye(n)[None, None, first : first + size]
        out, cache = cached_attention(q, q, values, cache)
        rows.append(out[0, 0] > 0)
        first += size
    return np.concatenate(rows)


def reach(layers: list[Window], n: int) -> list[range]:
    """Return the tokens that the last one depends on, after each layer from the top one down to the input."""
    reached = [range(n - 1, n)]
    for window in layers:
        first, last = reached[-1][0], reached[-1][-1]
        reached.append(range(max(window.start(first), 0), min(window.stop(last), n)))
    return reached


class Moment(NamedTuple):
    """What a cache holds between two calls; tokens are numbers from 0 on.

    Attributes:
        length: Tokens so far.
        slots: The token in each slot of the ring, -1 in one not yet used.
        first: The tokens kept from the beginning, -1 where there is none yet.
        next_slot: Slot of the next token.
        seen: Tokens that the next query sees, its own included.
        from_ring: Those of them that it reads from the ring.
    """

    length: int
    slots: list[int]
    first: list[int]
    next_slot: int
    seen: set[int]
    from_ring: set[int]


def moments(window: Window, steps: tuple[int, ...], *, rewind: int, keep_first: int) -> list[Moment]:
    """Return what a cache holds after each step: tokens appended, or forgotten where it is negative."""
    most = sum(max(step, 0) for step in steps) + 1
    cache = KVCache.create(
        window, batch=1, kv_heads=1, dim_head=1, dim_value=most, rewind=rewind, keep_first=keep_first
    )
    found = []
    for step in steps:
        if step < 0:
            cache = cache.rewind(-step)
        for _ in range(step):
            _, cache = _take_token(cache)
        assert cache.first is not None
        length, seen = int(cache.length[0]), _take_token(cache)[0]
        found.append(
            Moment(
                length,
                _tokens(cache.v),
                _tokens(cache.first.v),
                int(cache.slots(jnp.ones((1, 1), bool))[0, 0]),
                seen,
                {token for token in seen if window.start(length) <= token < length},
            )
        )
    return found


def _take_token(cache):
    """Return the tokens that the next one sees, and the cache with it."""
    q = jnp.zeros((1, 1, 1, 1))
    value = jax.nn.one_hot(cache.length, cache.v.shape[-1])[:, None, None]
    out, cache = cached_attention(q, q, value, cache)
    return {int(token) for token in np.flatnonzero(out[0, 0, 0] > 0)}, cache


def _tokens(v):
    """Return which token's value each slot holds, -1 for none."""
    values = np.asarray(v[0, 0])
    return [int(row.argmax()) if row.any() else -1 for row in values]


class Shards(NamedTuple):
    """Who sees what on the devices of a spread sequence, by the parts in which they attend.

    Attributes:
        fetched: Tokens that each device fetches from before its own, ``[shards, halo]``; -1 where there is none.
        own, halo: Keys that each query sees in its own shard and in what is fetched, ``[n, n]`` bool.
    """

    fetched: np.ndarray
    own: np.ndarray
    halo: np.ndarray


def on_shards(window: Window, shards: int, size: int) -> Shards:
    """Attend on so many devices, each with `size` tokens of a sequence."""
    options, n = AttentionOptions(window), shards * size
    mesh = jax.make_mesh((shards,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:shards])

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec("sequence"), out_specs=PartitionSpec("sequence"))
    def attend(values):
        q = jnp.zeros_like(values[None, None, :, :1])
        operands = fetch_borders(Operands.create(q, q, values[None, None], options), window, "sequence")
        assert operands.before is not None
        _, fetched, exists, _ = (None if x is None else x[0, 0, 0] for x in operands.before)
        own, halo = (Dense()(part.operands, options)[0][0, 0, 0] > 0 for part in parts_of(operands))
        return jnp.where(exists, fetched.argmax(-1), -1), own, jnp.zeros_like(own).at[: len(halo)].set(halo)

    fetched, own, halo = map(np.asarray, attend(jnp.eye(n)))
    return Shards(fetched.reshape(shards, -1), own, halo)


SKIPPED, MASKED, WHOLE = range(3)


def tiles(window: Window, n: int, size: int, *, rows_are_keys: bool = False) -> np.ndarray:
    """Return what kernels do with each tile of queries and keys, ``[queries, keys]`` of SKIPPED, MASKED and WHOLE.

    Args:
        window: Window of the call.
        n: Tokens.
        size: Tokens in a block, a divisor of n.
        rows_are_keys: Whether blocks of keys visit blocks of queries, as for the gradients of keys and values.
    """
    found = np.full((n // size, n // size), SKIPPED)
    for row in range(n // size):
        by = window.transposed if rows_are_keys else window
        visited = visited_blocks(by, row * size, row * size + size - 1, size, n)
        found[row, visited.start : visited.stop] = MASKED
        found[row, visited.whole_start : visited.whole_stop] = WHOLE
    return found.T if rows_are_keys else found


def plain_blocks(window: Window, n: int, size: int) -> list[tuple[range, range]]:
    """Return the queries of each block of the plain path, and the keys that it reads."""
    plan = plan_blocks(AttentionOptions(window), n, n, limits=(size, size))
    blocks = []
    for firsts, count, run in plan.parts():
        for first in firsts:
            start = min(max(window.start(first), 0), n - run)
            blocks.append((range(first, first + count), range(start, start + run)))
    return blocks
