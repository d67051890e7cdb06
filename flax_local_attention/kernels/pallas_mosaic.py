"""The Mosaic GPU backend of Pallas: launches, copies and barriers, and wrappers of its operations.

The grid has one axis of programs. A program owns a tile of rows of one head and visits blocks of columns. It has one to
three warpgroups that compute `Tile.rows` rows each, and one that copies by the tensor memory accelerator (TMA). Rows
*stay* in shared memory for the whole tile. Columns *move*: their blocks go through a ring of `Tile.stages` slots, each
with a barrier that says that it is full and one that says that all warpgroups have read it. A persistent program has
several tiles, and gets the rows of the next one while it computes this one. TMA reads zeros beyond the end of an array,
and writes nothing there.

JAX calls this interface highly unstable. What differs between its versions, 0.10 to 0.12, is in this file.
"""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from flax_local_attention.kernels.layout import Layout, run_in_memory
from flax_local_attention.kernels.plan import VisitedBlocks

# Number of programs of a persistent kernel: one for each multiprocessor of an H100 SXM or H200.
MULTIPROCESSORS = 132
# Registers of a computing and of a copying thread, by the number of computing warpgroups.
REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32)}


class Tile(NamedTuple):
    """The size of a program.

    Attributes:
        rows: Rows of a warpgroup, a multiple of 64.
        cols: Columns of a block, a multiple of 64.
        groups: Warpgroups that compute, one to three.
        stages: Slots of the ring.
        persistent: Whether a program computes several tiles.
    """

    rows: int
    cols: int
    groups: int = 2
    stages: int = 2
    persistent: bool = False


@functools.cache
def _mosaic() -> Any:
    """Import the backend once."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


@functools.cache
def is_available() -> bool:
    """Return whether this JAX has the backend."""
    try:
        return hasattr(_mosaic(), "kernel")
    except ImportError:
        return False


@functools.cache
def has_interpreter() -> bool:
    """Return whether this JAX can interpret the backend's kernels on a CPU, as versions from 0.11 on can."""
    return is_available() and hasattr(_mosaic(), "InterpretGPUParams")


def keeps_registers() -> bool:
    """Return whether this JAX compiles these kernels with the registers that they ask for.

    JAX 0.12 compiles them as relocatable code. The assembler then gives all warpgroups equally many registers: those
    that compute have too few, so products wait for each other and registers spill.
    """
    return jax.__version_info__ < (0, 12)


@functools.cache
def miscompiling_cuda() -> str | None:
    """Return the version of CUDA on this machine if its assembler miscompiles the masks of these kernels, else None.

    JAX names versions 12.8.0 to 12.9.0. The runtime cannot tell 12.9.1 from 12.9.0, but the assembler's package can.
    """
    try:
        from jax._src.lib import cuda_versions

        version = 0 if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    except (ImportError, AttributeError, RuntimeError):  # the module is not public, or there is no CUDA
        return None
    if not 12080 <= version < 12100:
        return None
    try:
        found = importlib.metadata.version("nvidia-cuda-nvcc-cu12")
    except importlib.metadata.PackageNotFoundError:
        return f"{version // 1000}.{version % 1000 // 10}"
    return found if tuple(map(int, found.split(".")[:3])) < (12, 9, 86) else None


# Arithmetic. The accumulator of a product has its own layout over the registers of a warpgroup. An array with one
# number a row, or one a column, has the layout of the accumulator's sums.


class Layouts:
    """The register layouts of arrays ``[rows, cols]``, ``[rows]`` and ``[cols]``."""

    @functools.cached_property
    def both(self) -> Any:
        """Layout of an accumulator, ``[rows, cols]``."""
        return _mosaic().Layout.WGMMA

    @functools.cached_property
    def rows(self) -> Any:
        """Layout of one number a row, ``[rows]``."""
        return _mosaic().Layout.WGMMA.reduce(1)

    @functools.cached_property
    def cols(self) -> Any:
        """Layout of one number a column, ``[cols]``."""
        return _mosaic().Layout.WGMMA.reduce(0)


LAYOUTS = Layouts()


def full(shape: tuple[int, ...], value: Any, layout: Any) -> jax.Array:
    """Return an array of one float32 number in registers."""
    return _mosaic().layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, ...], axis: int, layout: Any) -> jax.Array:
    """Return the index of each entry along an axis, int32."""
    return _mosaic().broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def load(ref: Any, layout: Any) -> jax.Array:
    """Load shared memory to registers."""
    return _mosaic().load(ref, *_index(), layout=layout)


@functools.cache
def _index():
    """Return the positional index argument of a load: JAX 0.10 needs an empty one, later versions none."""
    idx = inspect.signature(_mosaic().load).parameters.get("idx")
    return ((),) if idx is not None and idx.default is inspect.Parameter.empty else ()


def over_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Broadcast one number a row along the columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def over_cols(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Broadcast one number a column along the rows."""
    return lax.broadcast_in_dim(x, shape, (1,))


def accumulate(fn: Callable, *shapes: tuple[int, int]) -> Any:
    """Call a function with accumulators of these shapes, set to zero, and return its result."""
    accumulators = [_mosaic().ACC(shape, jnp.float32) for shape in shapes]
    return pl.run_scoped(fn, *accumulators)


def multiply(accumulator: Any, a: jax.Array, b: Any, spare: Any):
    """Start adding ``a b`` to an accumulator; a lies in registers, b in shared memory.

    The interpreter (JAX 0.11 and 0.12) only multiplies operands in shared memory, so a is copied to `spare` there. On
    devices `spare` is None.
    """
    if spare is not None:
        spare[...] = a
        _mosaic().commit_smem()
        a = spare
    _mosaic().wgmma(accumulator, a, b)


def multiply_transposed(accumulator: Any, a: Any, b: Any):
    """Start adding ``a b^T`` to an accumulator; both lie in shared memory."""
    _mosaic().wgmma(accumulator, a, b.transpose((1, 0)))


def finish_products(pending: int = 0):
    """Wait until at most the last `pending` products are unfinished."""
    _mosaic().wgmma_wait(pending)


def read_accumulator(accumulator: Any, pending: int = 0) -> jax.Array:
    """Read an accumulator once at most the last `pending` products are unfinished."""
    return _mosaic().wgmma_accumulator_load(accumulator, wait_n=pending) if pending else accumulator[...]


def add_product(x: jax.Array, a: jax.Array, b: Any, meanwhile: Callable[[], None], interpret: bool) -> jax.Array:
    """Return ``x + a b``; x and a lie in registers, b in shared memory; `meanwhile` is called while the product runs.

    The interpreter (JAX 0.11 and 0.12) has no accumulators with an initial value.
    """

    def add(accumulator):
        _mosaic().wgmma(accumulator, a, b)
        meanwhile()

    if not interpret:
        return pl.run_state(add)(_mosaic().ACC.init(x))
    meanwhile()
    return x + jnp.dot(a, b[...], preferred_element_type=jnp.float32)


# A program's memory


class Work(NamedTuple):
    """A tile of a program.

    Attributes:
        batch: Row of the batch.
        head: Head of keys.
        member: Query head among those that share the head of keys.
        first: First row of the tile.
        visited: Blocks of columns to visit, the same for each member of a group.
        steps: Number of blocks that move, for all members that the program visits.
    """

    batch: jax.Array
    head: jax.Array
    member: jax.Array
    first: jax.Array
    visited: VisitedBlocks
    steps: jax.Array

    def block(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the block that moves at a step, and the member of the group that it belongs to."""
        count = self.visited.stop - self.visited.start
        return self.visited.start + lax.rem(step, count), lax.div(step, count)


class Columns:
    """The blocks of columns in the ring, as a computing warpgroup reads them.

    Args:
        memory: Slots of each array, by name.
        is_full: Barriers of each array's slots that complete when a block has arrived.
        is_empty: Barriers of each array's slots that complete when all warpgroups have read a block.
        begin: Number of blocks that went through the ring before this tile.
        stages: Slots of the ring.
    """

    def __init__(
        self,
        memory: Mapping[str, Any],
        is_full: Mapping[str, Any],
        is_empty: Mapping[str, Any],
        begin: Any,
        stages: int,
    ):
        self._memory, self._is_full, self._is_empty = memory, is_full, is_empty
        self._begin, self._stages = begin, stages

    def __contains__(self, name: str) -> bool:
        """Return whether an array of this name moves."""
        return name in self._memory

    def _slot(self, step):
        return lax.rem(self._begin + step, np.int32(self._stages))

    def wait(self, name: str, step: Any):
        """Wait until the block of a step has arrived."""
        _mosaic().barrier_wait(self._is_full[name].at[self._slot(step)])

    def block(self, name: str, step: Any) -> Any:
        """Return the memory of an array's block, to be read after `wait`."""
        return self._memory[name].at[self._slot(step)]

    def read(self, name: str, step: Any, layout: Any) -> jax.Array:
        """Wait for one number a column, read them, and release their slot."""
        self.wait(name, step)
        x = load(self.block(name, step), layout)
        self.release(name, step)
        return x

    def release(self, name: str, step: Any):
        """Release a slot: this warpgroup has read it."""
        _mosaic().barrier_arrive(self._is_empty[name].at[self._slot(step)])


class Rows(NamedTuple):
    """The rows of a computing warpgroup.

    Attributes:
        first: Index of the first row.
        memory: Arrays of these rows in shared memory, by name.
        numbers: Functions that read an array with one number a head, by name.
        finish: Function to call after the last read of `memory` and before `write`.
        write: Function of a result's name and its rows, which stores them.
        spare: Shared memory for `multiply` in an interpreted kernel, else None.
    """

    first: jax.Array
    memory: Mapping[str, Any]
    numbers: Mapping[str, Callable[[], jax.Array]]
    finish: Callable[[], None]
    write: Callable[[str, jax.Array], None]
    spare: Any = None

    def read(self, name: str, layout: Any) -> jax.Array:
        """Load an array's rows to registers."""
        return load(self.memory[name], layout)


class Turns:
    """The turns of two warpgroups at the tensor cores: while one multiplies, the other exponentiates.

    Without a barrier there are no turns, and all methods do nothing.
    """

    def __init__(self, barrier: Any):
        self._barrier = barrier

    def end(self):
        """Arrive at the end of this warpgroup's turn."""
        if self._barrier is not None:
            _mosaic().barrier_arrive(self._barrier)

    def wait(self):
        """Wait for the end of the other warpgroup's turn."""
        if self._barrier is not None:
            _mosaic().barrier_wait(self._barrier)

    def swap(self):
        """End this warpgroup's turn and wait for the end of the other's."""
        self.end()
        self.wait()


# Launching


class Launch(NamedTuple):
    """How programs are launched over arrays whose leading axes are ``[b, h, g]``, of size 1 where shared.

    Attributes:
        tile: Size of a program.
        over_group: Whether a program visits the columns of all members of a group, instead of being one member's.
        takes_turns: Whether two warpgroups take turns at the tensor cores, see `Turns`.
        interpret: Whether to interpret the kernel on a CPU; slow, for tests.
    """

    tile: Tile
    over_group: bool = False
    takes_turns: bool = False
    interpret: bool = False

    def __call__(
        self,
        name: str,
        program: Callable[..., None],
        arrays: Mapping[str, jax.Array],
        results: Mapping[str, jax.ShapeDtypeStruct],
        stay: Sequence[str],
        move: Sequence[str],
        visit: Callable[[Any, Any], VisitedBlocks],
        in_memory_of: Mapping[str, str],
        token_major: Container[str] = (),
    ) -> list[jax.Array]:
        """Run ``program(work, rows, columns, turns)`` for all tiles of rows, heads and rows of the batch.

        Args:
            name: Name of the kernel in profiles.
            program: Function of `Work`, `Rows`, `Columns` and `Turns`; it writes the results.
            arrays: Arrays by name: ``[b, h, g, n, d]``, ``[b, h, g, n]``, or one number a head, ``[b, h, g, 1]``.
            results: Types of the results by name; they have the rows of the arrays that stay.
            stay: Names of the arrays whose rows stay.
            move: Names of the arrays whose blocks of columns move.
            visit: Function from a tile's first and last row to the blocks that it visits.
            in_memory_of: For some results, the array that stays whose shared memory the result is staged in.
            token_major: Names of arrays and results ``[b, h, 1, n, d]`` that lie in memory as ``[b, n, h, d]``.
        """
        layouts = [Layout(x in token_major) for x in (*arrays, *results)]

        def run(values, types):
            places = [
                _Place.of(x, layout, value, self.tile, stay, move)
                for x, layout, value in zip((*arrays, *results), layouts, (*values, *types), strict=True)
            ]
            inputs = dict(zip(arrays, places, strict=False))
            outputs = dict(zip(results, places[len(arrays) :], strict=True))
            kernel = _Kernel(self, program, inputs, outputs, stay, move, visit, in_memory_of)
            return kernel.run(name, values, types)

        return run_in_memory(run, list(arrays.values()), list(results.values()), layouts)


class _Place(NamedTuple):
    """The form of an array, or a result, in a kernel: ``[b, h g, ...]`` or ``[b, n, h, d]``.

    Attributes:
        layout: Which of the two.
        sizes: Sizes b, h and g; 1 where shared.
        rest: Sizes of the other axes, n and maybe d.
        dtype: Dtype of the array.
        padded: n rounded up to whole tiles, for arrays ``[b, h, g, n]``: their copies do not stop at the end.
    """

    layout: Layout
    sizes: tuple[int, ...]
    rest: tuple[int, ...]
    dtype: Any
    padded: int

    @classmethod
    def of(cls, name, layout, x, tile, stay, move):
        """Describe an array, or the type of a result, in its layout in memory."""
        rest = layout.rest(x.shape)
        size = tile.cols if name in move else tile.groups * tile.rows
        is_one_number = name not in stay and name not in move and rest == (1,)
        return cls(layout, layout.lead(x.shape), rest, x.dtype, -(-rest[0] // (1 if is_one_number else size)) * size)

    @property
    def shape(self):
        """The shape in the kernel."""
        if self.layout.is_token_major:
            return self.layout.join(self.sizes, self.rest)
        b, h, g = self.sizes
        return b, h * g, *((self.padded,) if len(self.rest) == 1 else self.rest)

    def fold(self, x):
        """Reshape and pad an array to this shape."""
        if self.layout.is_token_major:
            return x
        x = x.reshape(*self.shape[:2], *self.rest)
        return jnp.pad(x, [(0, after - before) for before, after in zip(x.shape, self.shape, strict=True)])

    def head(self, batch, head, member):
        """Return the indices of a row of the batch and of a head, 0 where the axis is shared."""
        b, h, g = (
            index if size > 1 else np.int32(0) for index, size in zip((batch, head, member), self.sizes, strict=True)
        )
        return b, h * np.int32(self.sizes[2]) + g

    def rows(self, ref, batch, head, member, first, size):
        """Slice rows of one head."""
        b, h = self.head(batch, head, member)
        at = pl.ds(first, size)
        return ref.at[(b, at, h)] if self.layout.is_token_major else ref.at[(b, h, at)]

    def number(self, ref, batch, head, member):
        """Read the one number of a head."""
        return ref[(*self.head(batch, head, member), np.int32(0))]

    def memory(self, *lead):
        """Describe shared memory for rows with these leading sizes; operands of products are swizzled."""
        mosaic = _mosaic()
        tiled = (mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128)) if len(self.rest) > 1 else ()
        return mosaic.SMEM((*lead, *self.rest[1:]), self.dtype, transforms=tiled)


class _Memory(NamedTuple):
    """The shared memory and the barriers of a program.

    Attributes:
        stay: Rows of this tile, and of the next one if the program is persistent, by name.
        columns: Blocks of columns in the ring, by name.
        staging: Rows of the results that are not staged in the memory of an array.
        rows_full: Barriers that complete when the rows of a tile have arrived.
        rows_empty: Barriers that complete when all warpgroups have read the rows; only in a persistent program.
        is_full: Barriers of the ring that complete when a block has arrived, by name.
        is_empty: Barriers of the ring that complete when all warpgroups have read a block, by name.
        turn: Barrier of `Turns`, if two warpgroups take turns.
        spare: Memory for `multiply`, in an interpreted kernel.
    """

    stay: Any
    columns: Any
    staging: Any
    rows_full: Any
    rows_empty: Any
    is_full: Any
    is_empty: Any
    turn: Any
    spare: Any


class _Kernel:
    """A launch for the arrays of one device."""

    def __init__(self, launch, program, inputs, outputs, stay, move, visit, in_memory_of):
        self.launch, self.program, self.visit, self.in_memory_of = launch, program, visit, in_memory_of
        self.tile, self.inputs, self.outputs, self.stay, self.move = launch.tile, inputs, outputs, stay, move
        self.rows = launch.tile.groups * launch.tile.rows
        b, h, self.group = inputs["q"].sizes
        self.members = 1 if launch.over_group else self.group
        self.heads, self.n = h, inputs[stay[0]].rest[0]
        self.blocks = -(-self.n // self.rows)
        self.tiles = self.blocks * self.members * h * b
        self.programs = min(self.tiles, MULTIPROCESSORS) if self.tile.persistent else self.tiles
        self.slots = 2 if self.tile.persistent else 1

    def run(self, name, values, types):
        """Run the kernel on arrays as they lie in memory; `types` are the types of the results, likewise."""
        mosaic = _mosaic()
        memory = self._memory()
        kinds, tree = jax.tree.flatten(memory, is_leaf=lambda x: not isinstance(x, dict | list | _Memory))

        def body(*refs):
            count = len(self.inputs) + len(self.outputs)
            arrays = dict(zip((*self.inputs, *self.outputs), refs[:count], strict=True))
            self._body(arrays, jax.tree.unflatten(tree, refs[count:]))

        body.__name__ = name
        kernel = mosaic.kernel(
            body,
            out_type=[x.update(shape=place.shape) for x, place in zip(types, self.outputs.values(), strict=True)],
            grid=(self.programs,),
            grid_names=("program",),
            num_threads=self.tile.groups + 1,
            thread_name="group",
            scratch_types=kinds,
            compiler_params=mosaic.CompilerParams(approx_math=True),
            **({"interpret": mosaic.InterpretGPUParams()} if self.launch.interpret else {}),
        )
        results = kernel(*(place.fold(x) for place, x in zip(self.inputs.values(), values, strict=True)))
        return [x[..., : like.shape[-1]].reshape(like.shape) for x, like in zip(results, types, strict=True)]

    def _memory(self):
        """Describe the memory of a program."""
        tile, barrier = self.tile, _mosaic().Barrier
        is_pair = self.launch.takes_turns and tile.groups == 2
        staging = [x for x in self.outputs if tile.persistent or x not in self.in_memory_of]
        spare = _mosaic().SMEM((tile.groups, tile.rows, tile.cols), self.inputs["q"].dtype)
        return _Memory(
            stay={x: self.inputs[x].memory(self.slots, tile.groups, tile.rows) for x in self.stay},
            columns={x: self.inputs[x].memory(tile.stages, tile.cols) for x in self.move},
            staging={x: self.outputs[x].memory(tile.groups, tile.rows) for x in staging},
            rows_full=barrier(num_arrivals=len(self.stay) * tile.groups, num_barriers=self.slots),
            rows_empty=[barrier(num_arrivals=tile.groups, num_barriers=self.slots)] if tile.persistent else [],
            is_full={x: barrier(num_barriers=tile.stages) for x in self.move},
            is_empty={x: barrier(num_arrivals=tile.groups, num_barriers=tile.stages) for x in self.move},
            turn=[barrier(num_arrivals=2)] if is_pair else [],
            spare=[spare] if self.launch.interpret else [],
        )

    def _body(self, arrays, memory):
        """Run a program: the last warpgroup copies, the others compute."""
        tile, group, turns = self.tile, lax.axis_index("group"), Turns(*memory.turn or [None])

        @pl.when(group < tile.groups)
        def _():
            _mosaic().set_max_registers(REGISTERS[tile.groups][0], action="increase")
            pl.when(group == 1)(turns.swap)
            self._over_tiles(lambda turn, begin: self._compute(turn, begin, arrays, memory, group, turns))
            pl.when(group == 0)(turns.swap)
            _mosaic().wait_smem_to_gmem(0)

        @pl.when(group == tile.groups)
        def _():
            _mosaic().set_max_registers(REGISTERS[tile.groups][1], action="decrease")
            self._drain(self._over_tiles(lambda turn, begin: self._copy(turn, begin, arrays, memory)), memory)

    def _over_tiles(self, fn):
        """Call ``fn(turn, begin)`` for each tile of the program, and return the number of blocks that moved.

        `begin` is the number of blocks that moved before the tile; `fn` returns it with the tile's blocks added.
        """
        if not self.tile.persistent:
            return fn(np.int32(0), np.int32(0))
        return lax.fori_loop(np.int32(0), self._own_tiles(), fn, np.int32(0))

    def _own_tiles(self):
        """Return the number of tiles of a persistent program."""
        return lax.div(np.int32(self.tiles - 1) - lax.axis_index("program"), np.int32(self.programs)) + 1

    def _work(self, turn):
        """Find the tile of a turn: tiles are ordered by block, then member of a group, head, and row of the batch."""
        index, at = lax.axis_index("program") + turn * np.int32(self.programs), []
        for size in (self.blocks, self.members, self.heads):
            at.append(lax.rem(index, np.int32(size)))
            index = lax.div(index, np.int32(size))
        block, member, head = at
        first = block * np.int32(self.rows)
        visited = self.visit(first, jnp.minimum(first + np.int32(self.rows), np.int32(self.n)) - 1)
        count = visited.stop - visited.start
        return Work(index, head, member, first, visited, count * np.int32(self.group // self.members))

    def _compute(self, turn, begin, arrays, memory, group, turns):
        """Compute this warpgroup's rows of a tile."""
        mosaic, work, tile = _mosaic(), self._work(turn), self.tile
        slot, first = lax.rem(turn, np.int32(self.slots)), work.first + group * np.int32(tile.rows)
        own = {x: ref.at[slot, group] for x, ref in memory.stay.items()}
        head = work.batch, work.head, work.member

        def write(x, value):
            home = memory.staging[x].at[group] if x in memory.staging else own[self.in_memory_of[x]]
            home[...] = value.astype(self.outputs[x].dtype)
            mosaic.commit_smem()
            mosaic.copy_smem_to_gmem(home, self.outputs[x].rows(arrays[x], *head, first, tile.rows))

        def finish():
            for empty in memory.rows_empty:
                mosaic.barrier_arrive(empty.at[slot])
                # Wait until the results of the tile before have left shared memory.
                mosaic.wait_smem_to_gmem(0, wait_read_only=True)

        mosaic.barrier_wait(memory.rows_full.at[slot])
        others = [x for x in self.inputs if x not in self.stay and x not in self.move]
        numbers = {x: functools.partial(self.inputs[x].number, arrays[x], *head) for x in others}
        spare = memory.spare[0].at[group] if memory.spare else None
        columns = Columns(memory.columns, memory.is_full, memory.is_empty, begin, tile.stages)
        self.program(work, Rows(first, own, numbers, finish, write, spare), columns, turns)
        return begin + work.steps

    def _copy(self, turn, begin, arrays, memory):
        """Copy the rows of all warpgroups of a tile, and the blocks of columns that it visits."""
        mosaic, work, tile = _mosaic(), self._work(turn), self.tile
        slot = lax.rem(turn, np.int32(self.slots))
        for empty in memory.rows_empty:
            pl.when(turn >= self.slots)(functools.partial(mosaic.barrier_wait, empty.at[slot]))
        for x, ref in memory.stay.items():
            for group in range(tile.groups):
                first = work.first + np.int32(group * tile.rows)
                place = self.inputs[x].rows(arrays[x], work.batch, work.head, work.member, first, tile.rows)
                mosaic.copy_gmem_to_smem(place, ref.at[slot, group], memory.rows_full.at[slot])

        def fetch(step, nothing):
            block, member = work.block(step)
            member = member if self.launch.over_group else work.member
            slot, is_reused = lax.rem(begin + step, np.int32(tile.stages)), begin + step >= tile.stages
            for x, ref in memory.columns.items():
                pl.when(is_reused)(functools.partial(mosaic.barrier_wait, memory.is_empty[x].at[slot]))
                first = block * np.int32(tile.cols)
                place = self.inputs[x].rows(arrays[x], work.batch, work.head, member, first, tile.cols)
                mosaic.copy_gmem_to_smem(place, ref.at[slot], memory.is_full[x].at[slot])
            return nothing

        lax.fori_loop(np.int32(0), work.steps, fetch, None)
        return begin + work.steps

    def _drain(self, moved, memory):
        """Wait for the last read of each slot, as the interpreter requires."""
        wait = _mosaic().barrier_wait
        for slot in range(self.tile.stages):
            for empty in memory.is_empty.values():
                pl.when(moved > slot)(functools.partial(wait, empty.at[slot]))
        for empty in memory.rows_empty:
            for slot in range(self.slots):
                pl.when(self._own_tiles() > slot)(functools.partial(wait, empty.at[slot]))
