"""Local attention in plain JAX, with time and memory linear in the sequence: blocks of queries and their runs of keys.

A loop visits the blocks of queries. Each block reads one slice of keys, its run, which holds all keys that its queries
may see. The backward pass recomputes the scores of a block, from the saved log-sum-exp.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_local_attention.checks import at_least, optional
from flax_local_attention.operands import Operands, over_heads
from flax_local_attention.options import AttentionOptions
from flax_local_attention.sharding import vary_like
from flax_local_attention.softmax import LOG_SUM, LogSum, attend_head, lay_out_bias, query_positions

# The fewest and the most queries in a block, on a CPU and elsewhere: larger blocks keep a GPU busy
# (benchmarks/RESULTS.md).
LIMITS = {"cpu": (64, 256), "default": (256, 256)}


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """The blocks of queries, and the keys that each block reads: plain ints, fixed when a call is traced.

    Attributes:
        size: Queries in a block.
        count: Number of blocks of this size.
        run: Keys that a block reads: all that its queries may see.
        rest: Queries in a shorter last block; 0 if there is none.
        rest_run: Keys that this last block reads.
        period: Queries after which the layout of a bias repeats: whole windows, or all queries.
    """

    size: int
    count: int
    run: int
    rest: int
    rest_run: int
    period: int

    def parts(self) -> Iterator[tuple[range, int, int]]:
        """Yield first queries, queries in a block and keys in its run, for the equal blocks and then for any rest."""
        whole = self.count * self.size
        yield range(0, whole, self.size), self.size, self.run
        if self.rest:
            yield range(whole, whole + 1), self.rest, self.rest_run


def plan_blocks(
    options: AttentionOptions,
    n: int,
    n_keys: int,
    q_offset: int | jax.Array = 0,
    *,
    aligned: bool = False,
    limits: tuple[int, int] = LIMITS["default"],
) -> BlockPlan:
    """Cut queries into blocks: as long as a window, or half as long as an exact window's reach, within limits.

    Larger blocks make more efficient matrix products and take fewer steps. Smaller ones waste fewer scores: a block
    computes scores for all keys that any of its queries sees.

    Args:
        options: Options of the call. With xPos a block is at most one window, or the reach of a window of size 1, see
            `Window.span`, so that the scale stays in float32's range.
        n: Number of queries, at least 1.
        n_keys: Number of keys, at least 1.
        q_offset: Position of the first query. If it is traced, runs are as long as any position may need.
        aligned: Whether blocks must be whole windows or divide one, as a bias needs. Else an exact window may be cut
            anywhere, as may a window of size 1.
        limits: The fewest and the most queries in a block.
    """
    for name, length in (("q", n), ("k", n_keys)):
        if not isinstance(length, int):
            raise ValueError(
                f"`{name}` must have a number of tokens, n of [b, h, n, d], to be cut into blocks, got {length}; fix "
                'that dimension of its shape (others may be symbolic), or use `implementation="dense"`.'
            )
    window = options.window
    w = window.size
    fades = options.rotary is not None and options.rotary.use_xpos
    natural = (window.backward + window.forward + 1) // 2 if window.exact_windowsize else w
    target = min(max(natural, limits[0]), limits[1])
    if w == 1 or (window.exact_windowsize and not aligned):
        size = min(target, window.span) if fades else target
    elif w <= target:
        size = w if fades else target // w * w
    else:
        equal_parts = (w // p for p in range(1, w // max(target // 4, 1) + 1) if w % p == 0 and w // p <= target)
        size = next(equal_parts, w if aligned else target)
    size = min(size, n)
    count, rest = divmod(n, size)
    run = _longest_run(window, size * np.arange(count), size, n_keys, q_offset)
    rest_run = _longest_run(window, np.array([n - rest]), rest, n_keys, q_offset) if rest else 0
    return BlockPlan(size, count, run, rest, rest_run, period=min(max(size, w), n))


def _longest_run(window, firsts, size, n_keys, q_offset):
    """Return the most keys that `size` queries can see together, over blocks that begin at `firsts`."""
    if isinstance(q_offset, int):
        begins = q_offset + firsts
        lengths = np.minimum(window.stop(begins + size - 1), n_keys) - np.maximum(window.start(begins), 0)
    else:  # traced: a block that begins with the last query of a window sees the most
        begins = np.array([window.size - 1])
        lengths = window.stop(begins + size - 1) - window.start(begins)
    return int(np.clip(lengths.max(initial=1), 1, n_keys))


@dataclasses.dataclass(frozen=True)
class Windowed:
    """Local attention in plain JAX, a block of queries at a time, in time O(n (block + backward + forward) d).

    Blocks run one after another. Each reads the run of keys that its queries see, clamped to the sequence: nothing is
    padded, and no score outside the runs is computed. A gradient recomputes a block's scores instead of keeping them.
    In one compiled program, memory beside inputs and results does not grow with n, except for two numbers a query and
    head that a gradient keeps.

    Args:
        block: The most queries in a block; some windows take fewer. With a bias, and a window that no such block
            divides, a block is the whole window. None chooses by the window and by the platform that a program is
            lowered for.

    Examples:
        >>> q = k = v = jnp.ones((2, 64, 64))
        >>> local_attention(q, k, v, window_size=16, implementation=Windowed(block=32)).shape
        (2, 64, 64)
    """

    block: int | None = None

    def __post_init__(self):
        if isinstance(self.block, np.integer):
            object.__setattr__(self, "block", int(self.block))
        optional(at_least(1))("block", self.block)

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`."""
        return self.on_platform(operands, options, None)

    def on_platform(
        self, operands: Operands, options: AttentionOptions, platform: str | None, log_sum: LogSum | None = None
    ) -> tuple[jax.Array, LogSum]:
        """Attend in the blocks for a platform; None means the one that the program is lowered for.

        If `log_sum` is given, as this method returns it, a gradient does not recompute the output.
        """
        n, n_keys, aligned = operands.q.shape[-2], operands.k.shape[-2], operands.bias is not None
        names = LIMITS if platform is None else (platform, platform)
        plans = [self.plan(options, n, n_keys, operands.q_offset, aligned=aligned, platform=name) for name in names]
        return _attend(operands, log_sum, options, *plans)

    def plan(
        self,
        options: AttentionOptions,
        n: int,
        n_keys: int,
        q_offset: int | jax.Array = 0,
        *,
        aligned: bool = False,
        platform: str,
    ) -> BlockPlan:
        """Plan the blocks of a call for a platform, ``"cpu"`` or another; other arguments are as in `plan_blocks`."""
        limits = LIMITS.get(platform, LIMITS["default"]) if self.block is None else (self.block, self.block)
        return plan_blocks(options, n, n_keys, q_offset, aligned=aligned, limits=limits)


# Jitted, so that equal layers of a model are traced and differentiated once.
@functools.partial(jax.jit, static_argnames=("options", "on_cpu", "elsewhere"))
def _attend(operands, log_sum, options, on_cpu, elsewhere):
    """Attend by the plan for a CPU or by that for other platforms, depending on what the program is lowered for."""

    def by(plan):
        return functools.partial(_attend_blocks, options=options, plan=plan)

    if on_cpu == elsewhere:
        return by(on_cpu)(operands, log_sum)
    return lax.platform_dependent(operands, log_sum, cpu=by(on_cpu), default=by(elsewhere))


def _attend_blocks(operands, known_sum, options, plan):
    """Attend by a plan, in a loop over its blocks and once more for a shorter last block.

    Args:
        operands: Operands of all heads.
        known_sum: Log-sum-exp of all queries, ``[b, h, g, n]``, or None.
        options: Options of the call.
        plan: Blocks of queries, and the keys that each reads.

    Returns:
        The output, ``[b, h, g, n, d]``, and the log-sum-exp, ``[b, h, g, n]``.
    """
    (b, h, g, n, _), d = operands.q.shape, operands.v.shape[-1]
    operands = operands.widen_scores()
    out = vary_like(jnp.zeros((b, h * g, n, d), operands.q.dtype), operands)
    log_sums = []
    for firsts, size, run in plan.parts():
        attend_block = _block_attention(operands, known_sum, options, size, run, plan.period)

        def step(out, first, attend_block=attend_block):
            part, log_sum = attend_block(first)
            return _add_slice(out, part.reshape(b, h * g, -1, d), first), log_sum

        out, log_sum = lax.scan(step, out, jnp.array(firsts, jnp.int32))
        log_sums.append(jax.tree.map(_join_blocks, log_sum))
    log_sum = jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *log_sums)
    return out.reshape(b, h, g, n, d), log_sum


def _block_attention(operands, known_sum, options, size, run, period):
    """Return the function from the first of `size` queries to their attention over a run of keys.

    The run begins at ``window.start`` of the first query, moved into the sequence. Positions of rotary are relative to
    the run, so one table of rotations serves all blocks; so does one layout of the bias. The function is
    rematerialised: a gradient keeps only its log-sum-exp.

    Args:
        operands: Operands of all heads.
        known_sum: Log-sum-exp of all queries, or None.
        options: Options of the call.
        size: Queries in a block.
        run: Keys in a run.
        period: Queries after which the layout of the bias repeats.

    Returns:
        A function that returns the output, ``[b, h, g, size, d]``, and the log-sum-exp, ``[b, h, g, size]``.
    """
    window, sizes, n_keys, q_offset = options.window, operands.q.shape[:3], operands.k.shape[-2], operands.q_offset
    # The farthest that a query can be from the first key of its run, and still see a key in it.
    farthest = run + window.backward + window.size
    if isinstance(q_offset, int):
        farthest = min(farthest, q_offset + operands.q.shape[-2])
    tables = _RotaryTables(options, run, operands.dtype)
    # One table for all blocks, unless the offset is traced: the sequence then does not limit how far a window reaches.
    q_table = tables.of_queries(jnp.arange(farthest + size)) if isinstance(q_offset, int) else None
    k_table = tables.of_keys()
    if operands.bias is not None:
        # The first row belongs to a query whose index is a multiple of the period, the first column to the key
        # `farthest` positions before it.
        rows, columns = q_offset + jnp.arange(period, dtype=jnp.int32), farthest + period + run
        lay_out = functools.partial(lay_out_bias, window, i=rows, first_key=q_offset - farthest, columns=columns)
        operands = operands._replace(bias=over_heads(lay_out, operands.bias))
    folded = operands.fold_groups()

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(LOG_SUM))
    def attend_block(first):
        start = jnp.clip(window.start(q_offset + first), 0, n_keys - run)
        i, j = q_offset + first + jnp.arange(size, dtype=jnp.int32), start + jnp.arange(run, dtype=jnp.int32)
        if q_table is None:
            turns = tables.of_queries(i - start)
        else:
            turns = lax.dynamic_slice_in_dim(q_table, i[0] - start, size)

        def attend_one(part):
            head, log_sum = part
            bias = head.bias
            if bias is not None:
                bias = _bias_of_block(bias, farthest, first, start - q_offset, size, run)
            return attend_head(head._replace(bias=bias), i, j, options, turns, k_table, log_sum)

        log_sum = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, -1), known_sum)
        block = folded.of_queries(first, size).of_keys(start, run).split_groups(sizes)
        return over_heads(attend_one, (block, log_sum))

    return attend_block


def _add_slice(x, part, first):
    """Add `part` to x in place, from `first` on along the axis before the last.

    A sum passes its cotangent on unchanged, so the gradient of a loop of sums reads the cotangent in place. The
    gradient of stacked or overwritten parts would need copies as large as the result.
    """
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(x.ndim)), inserted_window_dims=(), scatter_dims_to_operand_dims=(x.ndim - 2,)
    )
    return lax.scatter_add(
        x, jnp.asarray(first)[None], part, numbers, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS, unique_indices=True
    )


def _join_blocks(x):
    """Join blocks that are stacked along the leading axis, ``[blocks, ..., i]`` to ``[..., n]``."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)


@dataclasses.dataclass(frozen=True)
class _RotaryTables:
    """The rotations of the queries and keys of a block.

    Positions count from the middle of its run, where the scale of xPos is 1.

    Attributes:
        options: Options of the call.
        run: Keys in the run.
        dtype: Dtype of the tables.
    """

    options: AttentionOptions
    run: int
    dtype: jnp.dtype

    def of_queries(self, i):
        """Return the table of queries at positions i, counted from the run's first key; None without rotary."""
        rotary = self.options.rotary
        if rotary is None:
            return None
        return rotary.query_table(query_positions(i - self.run // 2, self.options.window, rotary), self.dtype)

    def of_keys(self):
        """Return the table of the keys of a run; None without rotary."""
        rotary = self.options.rotary
        return None if rotary is None else rotary.key_table(jnp.arange(self.run) - self.run // 2, self.dtype)


def _bias_of_block(bias, before, first, start, size, run):
    """Slice the layout of a bias for queries from `first` on and keys from `start` on, counted from the first query.

    Args:
        bias: Layout ``[..., period, columns]``, from `lay_out_bias`.
        before: Columns before the key at the first query's position.
        first: First query of the block. Its row is ``first % period``; the columns move back by as much as the row
            does.
        start: First key of the run.
        size: Number of queries.
        run: Number of keys.

    Returns:
        The part ``[..., size, run]``.
    """
    row = first % bias.shape[-2]
    part = lax.dynamic_slice_in_dim(bias, row, size, -2)
    return lax.dynamic_slice_in_dim(part, start - (first - row) + before, run, -1)
