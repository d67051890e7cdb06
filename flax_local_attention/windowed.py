"""Local attention in time and memory linear in the sequence: blocks of queries, each over its run of keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_local_attention.dense import (
    LOG_SUM,
    Operands,
    Scoring,
    attend,
    make_logits,
    over_heads,
    prepare_keys,
    prepare_queries,
    query_positions,
    scores,
)
from flax_local_attention.operands import head_axes
from flax_local_attention.window import Window

# Least and most queries in a block, by backend; between them a block is as long as a window, or half as long as an
# exact window's reach. Larger blocks make better matrix products and take fewer steps, smaller ones waste fewer
# scores: a block makes scores with all keys that any of its queries sees. benchmarks/RESULTS.md has the measurements.
BLOCK_LIMITS = {"cpu": (64, 256), "gpu": (256, 256), "tpu": (256, 256)}
# Set to try another size everywhere.
TARGET_BLOCK: int | None = None


def windowed_attention(
    operands: Operands, window: Window, scoring: Scoring, q_offset: int | jax.Array = 0
) -> jax.Array:
    """Local attention, a block of queries at a time.

    Blocks are taken in turn; each reads the run of keys that its queries see, clamped to the sequence, so
    nothing is padded and no score outside the runs is made. A gradient recomputes a block's scores instead
    of keeping them. What is left of the sequence, shorter than a block, is a block of its own.

    Args:
        operands: The arrays of all heads; q, k and v with the leading axes that the caller gave them.
        window: Who sees whom.
        scoring: The static options.
        q_offset: Position of the first query among the keys.

    Returns:
        Of q's shape, in v's dtype, in O(n (block + backward + forward) d) time and, beside the result,
        memory that does not grow with n.
    """
    n = operands.q.shape[-2]
    fades = scoring.rotary is not None and scoring.rotary.use_xpos
    block = block_size(window, n, aligned=operands.bias is not None, fades=fades)
    out = _vary_like(jnp.zeros(operands.q.shape, operands.v.dtype), operands)
    repeat = min(max(block, window.window_size), n)  # a bias repeats after as many queries
    whole = n // block * block
    for firsts, size in ((range(0, whole, block), block), (range(whole, n, block), n - whole)):
        if firsts:
            run = _longest_run(window, np.array(firsts), size, operands.k.shape[-2], q_offset)
            out = _attend_blocks(out, operands, scoring, q_offset, window, firsts, size, run, repeat)
    return out


def block_size(window: Window, n: int, aligned: bool = False, fades: bool = False) -> int:
    """Queries in a block: near the backend's target, whole windows or equal parts of one where that matters.

    Args:
        window: Who sees whom. Blocks of an exact window may be cut anywhere.
        n: Queries, at least 1.
        aligned: Whether a bias needs blocks to keep step with the windows.
        fades: Whether xPos scales keys, which bounds a block to one window to stay in float32's range.
    """
    w = window.window_size
    least, most = BLOCK_LIMITS.get(jax.default_backend(), (256, 256))
    natural = (window.backward + window.forward) // 2 if window.exact_windowsize else w
    target = TARGET_BLOCK or min(max(natural, least), most)
    if window.exact_windowsize and not aligned:
        return min(target, w if fades else n, n)
    if w <= target:
        return min(w if fades else target // w * w, n)
    equal_parts = (w // p for p in range(1, w // (target // 4) + 1) if w % p == 0 and w // p <= target)
    return min(next(equal_parts, w if aligned else target), n)


# Jitted so that the layers of a model, which are alike, are traced and differentiated once.
@functools.partial(jax.jit, static_argnames=("window", "firsts", "size", "run", "repeat"))
def _attend_blocks(out, operands, scoring, q_offset, window, firsts, size, run, repeat):
    """Write to `out` the attention of the blocks of `size` queries that begin at `firsts`, each over `run` keys."""
    sizes = head_axes(operands.q, operands.k)
    # So far from the first key of its run can a query be, and still see a key of it.
    farthest = run + window.backward + window.window_size
    tables = _rotary_tables(window, scoring.rotary, farthest + size, run)
    bias = operands.bias
    if bias is not None:
        bias = over_heads(lambda head: _bias_of_blocks(window, head, q_offset, repeat, farthest, run), bias)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(LOG_SUM))
    def attend_block(first):
        start = jnp.clip(window.start(q_offset + first), 0, operands.k.shape[-2] - run)
        block = operands.of_queries(first, size).of_keys(start, run).split_heads(sizes)
        i, j = q_offset + first + jnp.arange(size), start + jnp.arange(run)
        if tables is None:
            q, k = prepare_queries(block.q, scoring, None), prepare_keys(block.k, scoring, None)
        else:
            q_table = lax.dynamic_slice_in_dim(tables[0], i[0] - start, size)
            q, k = prepare_queries(block.q, scoring, q_table), prepare_keys(block.k, scoring, tables[1])
        block = block._replace(q=q, k=k)
        if bias is not None:
            block = block._replace(bias=_bias_of_block(bias, farthest, first, start - q_offset, size, run))
        out = over_heads(lambda head: _attend_head(head, window, i, j, scoring, first), block)
        return out.reshape(*operands.q.shape[:-2], size, -1)

    def step(out, first):
        return _add_slice(out, attend_block(first), first), None

    return lax.scan(step, out, jnp.array(firsts))[0]


def _attend_head(head, window, i, j, scoring, first):
    logits = make_logits(scores(head.q, head.k, scoring), window, i, j, head, scoring, head.bias)
    rng = None if head.dropout_rng is None else jax.random.fold_in(head.dropout_rng, first)
    return attend(logits, head.v, scoring, head.sink, rng)


def _vary_like(x, operands):
    """Let x vary over the mesh axes that any operand varies over: under shard_map a loop's state must say so."""
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(operands)))
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def _add_slice(x, part, first):
    """Add `part` to x at `first` of the axis before the last, in place.

    Of a sum the cotangent passes unchanged: the gradient of a loop of these reads it where it is, while that
    of stacked or overwritten parts needs copies as large as the result.
    """
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(x.ndim)), inserted_window_dims=(), scatter_dims_to_operand_dims=(x.ndim - 2,)
    )
    return lax.scatter_add(
        x, jnp.asarray(first)[None], part, numbers, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS, unique_indices=True
    )


def _longest_run(window, firsts, size, n_keys, q_offset):
    """Keys that `size` queries can see together, the most over blocks that begin at `firsts`."""
    if isinstance(q_offset, int):
        begins = q_offset + firsts
        lengths = np.minimum(window.stop(begins + size - 1), n_keys) - np.maximum(window.start(begins), 0)
    else:  # known when it runs: the most over all ways that a block can lie in the windows
        begins = np.arange(window.window_size)
        lengths = window.stop(begins + size - 1) - window.start(begins)
    return int(np.clip(lengths.max(initial=1), 1, n_keys))


def _rotary_tables(window, rotary, queries, keys):
    """Factors of queries and keys by their place, counted from the first key of a run; made once for all blocks."""
    if rotary is None:
        return None
    middle = keys // 2  # where xPos is 1
    i, j = jnp.arange(queries) - middle, jnp.arange(keys) - middle
    return rotary.query_table(query_positions(i, window, rotary)), rotary.key_table(j)


def _bias_of_blocks(window, bias, q_offset, rows, before, run):
    """The slab's bias ``[w, s]`` laid out by query and key, for as many queries as it takes to repeat.

    Row r belongs to query ``first + r`` of a block whose `first` is a multiple of the number of rows,
    column c to the key `before` places before that query 0 and c after, so that a block's part is one
    slice: a gather in every block would cost more than the scores.
    """
    columns = before + rows + run
    left = before + rows
    padded = jnp.pad(bias, ((0, 0), (left, columns)))
    i = q_offset + jnp.arange(rows)

    def row(place, slot):
        return lax.dynamic_slice(padded, (place, left + slot), (1, columns))[0]

    return jax.vmap(row)(window.place(i), window.slot(i, q_offset - before))


def _bias_of_block(bias, before, first, start, size, run):
    """Entries of the queries ``[first, first + size)`` and the `run` keys from `start`, counted from query 0."""
    row = first % bias.shape[-2]
    part = lax.dynamic_slice_in_dim(bias, row, size, -2)
    return lax.dynamic_slice_in_dim(part, start - (first - row) + before, run, -1)
