"""The TPU backend of Pallas: launches of programs whose grid steps visit blocks of columns.

The grid is ``(b, h, g, programs, steps)``, with 1 in place of g where a program visits all heads of a group. A program
owns a block of rows of one head and has a step for each block of columns that it may visit. Its sums stay in scratch
memory (VMEM) between steps, while Pallas copies the blocks of the next step. Index maps compute the block of a step
from the window, see `Walk`: no list of blocks is stored. A program with fewer blocks than others stays at its last
block in the remaining steps, where it copies and computes nothing.

Arrays of features are ``[n, d]`` or ``[d, n]`` in memory. One number a token is a row ``[1, n]`` of 4 bytes a token: a
column ``[n, 1]`` would be padded to 128 lanes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from flax_local_attention.kernels.layout import Layout, run_in_memory
from flax_local_attention.kernels.plan import VisitedBlocks, visited_blocks
from flax_local_attention.window import TransposedWindow, Window

LANES = 128

# Names of the arrays with features, of those with keys along their tokens, and of those with one number a head.
FEATURES = frozenset({"q", "k", "v", "o", "do", "dq", "dk", "dv"})
OF_KEYS = frozenset({"k", "v", "dk", "dv", "mask", "k_segments"})
OF_HEADS = frozenset({"sink", "seed"})


@functools.cache
def _tpu() -> ModuleType:
    """Import the backend on first use, because it takes as long to import as the rest of the package."""
    from jax.experimental.pallas import tpu

    return tpu


class Block(NamedTuple):
    """The size of a program: the rows that it owns, and the columns of a step."""

    rows: int
    cols: int


@dataclasses.dataclass(frozen=True)
class Walk:
    """The blocks that programs visit, and in which order.

    Attributes:
        window: Which columns a row sees. Rows are queries; for a transposed window they are keys.
        block: Size of a program.
        n: Number of queries.
        n_keys: Number of keys.
        q_offset: Position of the first query; None if it is traced.
        group: Query heads that share a head of keys. If rows are keys, a program visits the queries of all of them.
    """

    window: Window | TransposedWindow
    block: Block
    n: int
    n_keys: int
    q_offset: int | None
    group: int

    @property
    def by_keys(self) -> bool:
        """Whether rows are keys."""
        return isinstance(self.window, TransposedWindow)

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of queries and of keys in a block."""
        rows, cols = self.block
        return (cols, rows) if self.by_keys else (rows, cols)

    @property
    def programs(self) -> int:
        """The number of blocks of rows."""
        return -(-(self.n_keys if self.by_keys else self.n) // self.block.rows)

    @property
    def heads(self) -> int:
        """The number of query heads that a program visits."""
        return self.group if self.by_keys else 1

    @functools.cached_property
    def run(self) -> int:
        """The most blocks of columns of one head that a block of rows visits."""
        if self.q_offset is None:
            # The rows of a window share its start and stop, except for a causal stop. So a block that begins with the
            # last row of a window, or ends with the first one, sees the most.
            (rows, cols), period = self.block, self._period
            firsts = (period - 1, (1 - rows) % period)
            most = max(self.window.stop(first + rows - 1) - self.window.start(first) for first in firsts)
            return max(1, min((most + cols - 2) // cols + 1, -(-self._columns // cols)))
        visited = self.visited(np.arange(self.programs), self.q_offset)
        return max(1, int(np.max(visited.stop - visited.start)))

    @property
    def steps(self) -> int:
        """The number of steps of a program."""
        return self.run * self.heads

    @property
    def _period(self):
        return (self.window.window if isinstance(self.window, TransposedWindow) else self.window).size

    @property
    def _columns(self):
        return self.n if self.by_keys else self.n_keys

    def visited(self, program: Any, q_offset: Any) -> VisitedBlocks:
        """Return the blocks of columns that a block of rows visits, for a number, a NumPy array or a traced value."""
        (rows, cols), count = self.block, self.n_keys if self.by_keys else self.n
        xp = np if isinstance(program, np.ndarray) else jnp
        row_origin, column_origin = (0, q_offset) if self.by_keys else (q_offset, 0)
        first = row_origin + program * rows
        last = row_origin + xp.minimum(program * rows + (rows - 1), count - 1)
        return visited_blocks(self.window, first, last, cols, self._columns, column_origin)

    def place(self, program: Any, step: Any, q_offset: Any) -> "Place":
        """Return the blocks of a program at a step."""
        visited = self.visited(program, q_offset)
        head, turn = (lax.div(step, self.run), lax.rem(step, self.run)) if self.heads > 1 else (0, step)
        column = visited.start + turn
        # Clamped to a block that exists, also for rows that see nothing.
        given = jnp.maximum(jnp.minimum(column, visited.stop - 1), 0)
        q_block, k_block = (given, program) if self.by_keys else (program, given)
        return Place(head, q_block, k_block, (column < visited.stop) | (step == 0))


class Place(NamedTuple):
    """The blocks of a program at a step.

    Attributes:
        head: Query head in the group, counted from the grid's.
        q_block: Index of the block of queries.
        k_block: Index of the block of keys.
        is_visited: Whether the step computes something: the first step always does, the last ones may not.
    """

    head: Any
    q_block: Any
    k_block: Any
    is_visited: Any


class Step(NamedTuple):
    """One step of a program.

    Attributes:
        place: Blocks of the step.
        q_offset: Position of the first query.
        sizes: Numbers of queries and of keys in a block.
        is_first: Whether the step is the program's first.
        is_last: Whether the step is the program's last.
    """

    place: Place
    q_offset: Any
    sizes: tuple[int, int]
    is_first: Any
    is_last: Any


class Launch(NamedTuple):
    """How programs are launched over arrays whose leading axes are ``[b, h, g]``, of size 1 where shared.

    Attributes:
        walk: Blocks that the programs visit.
        is_feature_major: Whether arrays of features lie in memory as ``[d, n]``.
        interpret: Whether to interpret the kernel on any device as plain JAX; slow, for tests.
    """

    walk: Walk
    is_feature_major: bool
    interpret: bool

    def __call__(
        self,
        name: str,
        program: Callable[..., None],
        arrays: Mapping[str, jax.Array],
        results: Mapping[str, jax.ShapeDtypeStruct],
        scratch: Sequence[tuple[tuple[int, int], Any]],
    ) -> list[jax.Array]:
        """Run ``program(step, refs, *results, *scratch)`` for all steps, blocks, heads and rows of the batch.

        Args:
            name: Name of the kernel in profiles.
            program: Function of the `Step`, the references of `arrays` by name, and those of results and scratch.
            arrays: Arrays ``[b, h, g, ...]`` by name, and maybe a traced `q_offset` ``[1]``.
            results: Types of the results, ``[b, h, g, ...]``, by name.
            scratch: Shapes and dtypes of the arrays that keep their values between the steps of a program.
        """
        layouts = [Layout(False)] * (len(arrays) + len(results))

        def run(values, types):
            return self._run(name, program, dict(zip(arrays, values, strict=True)), types, list(results), scratch)

        with jax.enable_x64(False):  # index maps must be in 32 bits on TPUs
            return run_in_memory(run, list(arrays.values()), list(results.values()), layouts)

    def _run(self, name, program, arrays, types, order, scratch):
        """Run a program over the arrays of one device."""
        tpu, walk = _tpu(), self.walk
        is_traced = walk.q_offset is None
        b, h, g = arrays["q"].shape[:3]
        offset = [arrays.pop("q_offset")] if is_traced else []
        inside = [self._inside(name, x) for name, x in arrays.items()]
        outside = [x.update(shape=self._shape(name, x.shape)) for name, x in zip(order, types, strict=True)]
        names = tuple(arrays)

        def kernel(*refs):
            q_offset = refs[0][0] if is_traced else walk.q_offset
            refs = refs[len(offset) :]
            turn = pl.program_id(4)
            place = walk.place(pl.program_id(3), turn, q_offset)
            step = Step(place, q_offset, walk.sizes, turn == 0, turn == walk.steps - 1)
            program(step, dict(zip(names, refs, strict=False)), *refs[len(names) :])

        done = pl.pallas_call(
            kernel,
            name=name,
            grid_spec=tpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(offset),
                grid=(b, h, 1 if walk.by_keys else g, walk.programs, walk.steps),
                in_specs=[self._spec(name, x.shape) for name, x in zip(names, inside, strict=True)],
                out_specs=[self._spec(name, x.shape) for name, x in zip(order, outside, strict=True)],
                scratch_shapes=[tpu.VMEM(*shape) for shape in scratch],
            ),
            out_shape=outside,
            interpret=self.interpret,
            compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",) * 4 + ("arbitrary",)),
        )(*offset, *inside)
        return tuple(self._restore(name, x, like.shape) for name, x, like in zip(order, done, types, strict=True))

    def _shape(self, name, shape):
        """Return the shape that an array ``[b, h, g, n, d]``, ``[b, h, g, n]`` or ``[b, h, g, 1]`` has in memory."""
        if name not in FEATURES:
            return (*shape[:3], 1, shape[3])
        return (*shape[:3], shape[4], shape[3]) if self.is_feature_major else shape

    def _inside(self, name, x):
        """Bring an array to its shape in memory."""
        if name not in FEATURES:
            return x[..., None, :]
        return jnp.swapaxes(x, -1, -2) if self.is_feature_major else x

    def _restore(self, name, x, shape):
        """Bring a result from its shape in memory back to its shape."""
        return jnp.swapaxes(x, -1, -2) if name in FEATURES and self.is_feature_major else x.reshape(shape)

    def _spec(self, name, shape):
        """Specify the block of an array that a step gets.

        Args:
            name: Name of the array.
            shape: Its shape in memory.

        Returns:
            A block specification. Its index map sends the grid's ``(row, head, member, program, step)`` to a block; an
            axis of size 1 is shared.
        """
        q_size, k_size = self.walk.sizes
        token_axis = 3 if name in FEATURES and not self.is_feature_major else 4
        block = [None, None, None, *shape[3:]]
        if name not in OF_HEADS:
            block[token_axis] = k_size if name in OF_KEYS else q_size

        def index(row, head, member, program, step, *offset):
            place = self.walk.place(program, step, offset[0][0] if offset else self.walk.q_offset)
            lead = row, head, member + place.head
            at = [at if size > 1 else 0 for at, size in zip(lead, shape, strict=False)] + [0, 0]
            if name not in OF_HEADS:
                at[token_axis] = place.k_block if name in OF_KEYS else place.q_block
            return tuple(at)

        return pl.BlockSpec(tuple(block), index)
