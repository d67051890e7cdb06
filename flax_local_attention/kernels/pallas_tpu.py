"""All uses of Pallas' TPU backend: launches of programs over a grid whose steps name the blocks to visit.

A launch runs one program for each block of rows of each head. The last axis of its grid has a step for each block of
columns that the rows may visit; between steps the program's sums stay in scratch memory. Each step gets its blocks in
the chip's memory, copied there while the step before it runs. Programs visit the blocks of a window by arithmetic, see
`Walk`: no list of blocks is made. A program that has fewer than others repeats its last one, which copies nothing, and
computes nothing.

Arrays of features are ``[n, d]`` or ``[d, n]`` in memory, numbers of a token a row ``[1, n]``, which takes 4 bytes a
token: a column would take 128 lanes.
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

# Arrays with features, and those of keys; all others are of queries, or one number a head.
FEATURES = frozenset({"q", "k", "v", "o", "do", "dq", "dk", "dv"})
OF_KEYS = frozenset({"k", "v", "dk", "dv", "mask", "k_segments"})
OF_HEADS = frozenset({"sink", "seed"})


@functools.cache
def _tpu() -> ModuleType:
    """Import the backend, which takes as long as the rest of the package, once it is used."""
    from jax.experimental.pallas import tpu

    return tpu


class Block(NamedTuple):
    """The size of a program: rows that stay, and columns that move with its steps."""

    rows: int
    cols: int


@dataclasses.dataclass(frozen=True)
class Walk:
    """The blocks that programs visit, and in which order.

    Attributes:
        window: Which columns a row sees. Rows are queries; for a transposed window they are keys.
        block: Size of a program.
        n, n_keys: Queries and keys.
        q_offset: Position of the first query; None if it is traced.
        group: Query heads that share a head of keys. Keys visit the queries of all of them.
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
        """Queries and keys in a block."""
        rows, cols = self.block
        return (cols, rows) if self.by_keys else (rows, cols)

    @property
    def programs(self) -> int:
        """Blocks of rows."""
        return -(-(self.n_keys if self.by_keys else self.n) // self.block.rows)

    @property
    def heads(self) -> int:
        """Heads of a group that a program visits."""
        return self.group if self.by_keys else 1

    @functools.cached_property
    def run(self) -> int:
        """Most blocks of columns that a block of rows visits."""
        if self.q_offset is None:
            # Rows of a window see the same, but for causal ones: most is seen by a block that begins with the last row
            # of a window, or ends with the first.
            (rows, cols), period = self.block, self._period
            firsts = (period - 1, (1 - rows) % period)
            most = max(self.window.stop(first + rows - 1) - self.window.start(first) for first in firsts)
            return max(1, min((most + cols - 2) // cols + 1, -(-self._columns // cols)))
        visited = self.visited(np.arange(self.programs), self.q_offset)
        return max(1, int(np.max(visited.stop - visited.start)))

    @property
    def steps(self) -> int:
        """Steps of a program."""
        return self.run * self.heads

    @property
    def _period(self):
        return (self.window.window if isinstance(self.window, TransposedWindow) else self.window).size

    @property
    def _columns(self):
        return self.n if self.by_keys else self.n_keys

    def visited(self, program: Any, q_offset: Any) -> VisitedBlocks:
        """Return the blocks of columns that a block of rows visits; numbers, NumPy arrays or traced values."""
        (rows, cols), count = self.block, self.n_keys if self.by_keys else self.n
        xp = np if isinstance(program, np.ndarray) else jnp
        row_origin, column_origin = (0, q_offset) if self.by_keys else (q_offset, 0)
        first = row_origin + program * rows
        last = row_origin + xp.minimum(program * rows + (rows - 1), count - 1)
        return visited_blocks(self.window, first, last, cols, self._columns, column_origin)

    def place(self, program: Any, step: Any, q_offset: Any) -> "Place":
        """Find what a program has at a step."""
        visited = self.visited(program, q_offset)
        head, turn = (lax.div(step, self.run), lax.rem(step, self.run)) if self.heads > 1 else (0, step)
        column = visited.start + turn
        # A block that exists, also for rows that see nothing.
        given = jnp.maximum(jnp.minimum(column, visited.stop - 1), 0)
        q_block, k_block = (given, program) if self.by_keys else (program, given)
        return Place(head, q_block, k_block, (column < visited.stop) | (step == 0))


class Place(NamedTuple):
    """What a program has at a step.

    Attributes:
        head: Number of the query head in its group, from the grid's.
        q_block, k_block: Numbers of the blocks.
        is_visited: Whether the step visits a block: the first step always does, the last ones may not.
    """

    head: Any
    q_block: Any
    k_block: Any
    is_visited: Any


class Step(NamedTuple):
    """One step of a program.

    Attributes:
        place: Its blocks.
        q_offset: Position of the first query.
        sizes: Queries and keys in a block.
        is_first, is_last: Whether it is the first or last of the program.
    """

    place: Place
    q_offset: Any
    sizes: tuple[int, int]
    is_first: Any
    is_last: Any


class Launch(NamedTuple):
    """The layout of programs over arrays whose leading axes are ``[b, h, g]``, of size 1 where shared.

    Attributes:
        walk: Blocks that the programs visit.
        is_feature_major: Whether arrays of features lie in memory as ``[d, n]``.
        interpret: Whether to run on any device, slowly and as plain JAX: for tests.
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
        """Run ``program(step, refs, *results, *scratch)`` for all steps, blocks, heads and rows.

        Args:
            name: Name of the kernel in profiles.
            program: Function of the `Step`, the references of `arrays` by name, those of the results, and of scratch.
            arrays: ``[b, h, g, ...]``, and maybe a traced `q_offset` ``[1]``.
            results: Shapes and dtypes of the results, ``[b, h, g, ...]``, by names of their own.
            scratch: Shapes and dtypes of arrays that keep their values between the steps of a program.
        """
        layouts = [Layout(False)] * (len(arrays) + len(results))

        def run(values, own):
            return self._run(name, program, dict(zip(arrays, values, strict=True)), own, list(results), scratch)

        with jax.enable_x64(False):  # TPUs count in 32 bits, and so must index maps
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
        """Return the shape in memory of an array ``[b, h, g, n, d]``, ``[b, h, g, n]`` or ``[b, h, g, 1]``."""
        if name not in FEATURES:
            return (*shape[:3], 1, shape[3])
        return (*shape[:3], shape[4], shape[3]) if self.is_feature_major else shape

    def _inside(self, name, x):
        """Bring an array to its shape in memory."""
        if name not in FEATURES:
            return x[..., None, :]
        return jnp.swapaxes(x, -1, -2) if self.is_feature_major else x

    def _restore(self, name, x, shape):
        """Bring a result from its shape in memory back to its own."""
        return jnp.swapaxes(x, -1, -2) if name in FEATURES and self.is_feature_major else x.reshape(shape)

    def _spec(self, name, shape):
        """Make the specification of the block that a step gets of an array.

        Args:
            name: Name of the array.
            shape: Its shape in memory.

        Returns:
            A block specification whose index map sends the grid's ``(row, head, member, program, step)`` to a block;
            an axis of size 1 is shared.
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
