"""Local attention in time and memory linear in the sequence: blocks of queries, each over its run of keys."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_local_attention.dense import Operands, Pairs, Scoring, attend, l2_normalize, query_positions, scores, see
from flax_local_attention.window import Window

# Queries in a block. Larger blocks make better matrix products and waste more scores at their corners.
TARGET_BLOCK = 256


def windowed_attention(
    operands: Operands, window: Window, scoring: Scoring, q_offset: int | jax.Array = 0
) -> jax.Array:
    """Local attention of one head, a block of queries at a time.

    Blocks are taken in turn by `lax.map`; each reads the run of keys that its queries see, clamped to
    the sequence, so nothing is padded and no score outside the runs is made. A gradient recomputes a
    block's scores instead of keeping them. What is left of the sequence, shorter than a block, is a
    block of its own.

    Args, returns: as `dense.dense_attention`, in O(n (block + backward + forward)) time and O(n d)
    memory.
    """
    n, n_keys = operands.q.shape[0], operands.k.shape[0]
    fades = scoring.rotary is not None and scoring.rotary.use_xpos
    block = block_size(window, n, aligned=operands.bias is not None, fades=fades)
    count, rest = divmod(n, block)

    def attend_blocks(firsts, size):
        run = _longest_run(window, firsts, size, n_keys, q_offset)
        bias = None if operands.bias is None else _bias_of_blocks(window, operands.bias, q_offset, n, block, run)
        one = jax.checkpoint(lambda first: _attend_block(operands, bias, window, scoring, q_offset, first, size, run))
        return lax.map(one, jnp.asarray(firsts)).reshape(len(firsts) * size, -1)

    out = attend_blocks(np.arange(count) * block, block)
    if rest == 0:
        return out
    return jnp.concatenate([out, attend_blocks(np.array([count * block]), rest)])


def block_size(window: Window, n: int, aligned: bool = False, fades: bool = False) -> int:
    """Queries in a block: near `TARGET_BLOCK`, whole windows or equal parts of one where that matters.

    Args:
        window: Who sees whom. Blocks of an exact window may be cut anywhere.
        n: Queries, at least 1.
        aligned: Whether a bias needs blocks to keep step with the windows.
        fades: Whether xPos scales keys, which bounds a block to one window to stay in float32's range.
    """
    w = window.window_size
    if fades:
        return min(w, n)
    if window.exact_windowsize and not aligned:
        return min(TARGET_BLOCK, n)
    if w <= TARGET_BLOCK:
        return min(TARGET_BLOCK // w * w, n)
    parts = range(1, w // (TARGET_BLOCK // 4) + 1)
    return min(next((w // p for p in parts if w % p == 0 and w // p <= TARGET_BLOCK), w), n)


def _attend_block(operands, bias, window, scoring, q_offset, first, size, run):
    """Attention of the queries ``[first, first + size)`` over `run` keys."""
    begin = q_offset + first
    start = jnp.clip(window.start(begin), 0, operands.k.shape[0] - run)

    def queries(x):
        return None if x is None else lax.dynamic_slice_in_dim(x, first, size)

    def keys(x):
        return None if x is None else lax.dynamic_slice_in_dim(x, start, run)

    i, j = begin + jnp.arange(size), start + jnp.arange(run)
    q, k, v = queries(operands.q), keys(operands.k), keys(operands.v)
    if scoring.shared_qk:
        k = l2_normalize(k)
    if scoring.rotary is not None:
        middle = begin + (size + window.forward - window.backward) // 2
        q = scoring.rotary.rotate_queries(q, query_positions(i - middle, window, scoring.rotary))
        k = scoring.rotary.rotate_keys(k, j - middle)
    pairs = Pairs(
        visible=see(window, i, j, keys(operands.mask), queries(operands.q_segments), keys(operands.k_segments)),
        itself=i[:, None] == j if scoring.shared_qk else None,
        bias=None if bias is None else _bias_of_block(bias, first, start - q_offset, size, run),
    )
    rng = None if operands.dropout_rng is None else jax.random.fold_in(operands.dropout_rng, first)
    return attend(scores(q, k, scoring.precision), v, pairs, scoring, operands.sink, rng)


def _longest_run(window, firsts, size, n_keys, q_offset):
    """Keys that `size` queries can see together, the most over blocks that begin at `firsts`."""
    if isinstance(q_offset, int):
        begins = q_offset + firsts
        lengths = np.minimum(window.stop(begins + size - 1), n_keys) - np.maximum(window.start(begins), 0)
    else:  # known when it runs: the most over all ways that a block can lie in the windows
        begins = np.arange(window.window_size)
        lengths = window.stop(begins + size - 1) - window.start(begins)
    return int(np.clip(lengths.max(), 1, n_keys))


def _bias_of_blocks(window, bias, q_offset, n, block, run):
    """The slab's bias ``[w, s]`` laid out by query and key, for as many queries as it takes to repeat.

    Row r belongs to query ``first + r`` of a block whose `first` is a multiple of the number of rows,
    column c to the key ``run`` places before that query 0 and c after, so that a block's part is one
    slice: a gather in every block would cost more than the scores.
    """
    rows = min(max(block, window.window_size), n)
    columns = 2 * run + rows
    left = run + rows
    padded = jnp.pad(bias, ((0, 0), (left, columns)))
    i = q_offset + jnp.arange(rows)

    def row(place, slot):
        return lax.dynamic_slice(padded, (place, left + slot), (1, columns))[0]

    return jax.vmap(row)(window.place(i), window.slot(i, q_offset - run))


def _bias_of_block(bias, first, start, size, run):
    row = first % bias.shape[0]
    return lax.dynamic_slice(bias, (row, start - (first - row) + run), (size, run))
