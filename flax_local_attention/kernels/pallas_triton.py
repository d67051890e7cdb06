"""The Triton backend of Pallas: launches of programs, masked loads and stores, inline assembly.

The grid is ``(blocks, h g, b)``, with one program for each block of rows of a head. A program gets references to the
GPU's memory: loads bring tiles to registers, stores write them back. Each reference covers a whole head, ``[n, d]`` or
``[n]`` say, and the program loads the blocks that it visits. The sizes of tiles are powers of two; entries beyond the
end of an array are masked.

JAX 0.11 deprecated the backend without a date for its removal. All code that depends on it is in this file.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from flax_local_attention.kernels.constants import LOG2_E
from flax_local_attention.kernels.layout import Layout, run_in_memory

# The most programs along the second and third axis of a grid, on any NVIDIA GPU.
MOST_PROGRAMS = 65535


class Tile(NamedTuple):
    """The size of a program.

    Attributes:
        rows: Rows that the program owns.
        cols: Columns of a step of its loop.
        warps: Warps of the program.
        stages: Stages of the pipeline that loads columns.
    """

    rows: int
    cols: int
    warps: int = 4
    stages: int = 2


@contextlib.contextmanager
def without_deprecation() -> Iterator[None]:
    """Suppress the warning of the backend's deprecation: a user of this package can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*[Tt]riton", DeprecationWarning)
        yield


@functools.cache
def _triton() -> ModuleType:
    """Import the backend once, without its warning."""
    with without_deprecation():
        from jax.experimental.pallas import triton
    return triton


@functools.cache
def is_available() -> bool:
    """Return whether this JAX has the backend."""
    try:
        _triton()
    except ImportError:
        return False
    return True


# Loads and stores. A program's references are arrays of one head. `lead` holds the indices of axes before these.


def load_rows(ref: Any, lead: tuple, first: jax.Array, size: int, where: jax.Array | None = None) -> jax.Array:
    """Load `size` rows from `first` on, with zeros where `where`, ``[size]`` bool, is false.

    It must be false for rows beyond the end.
    """
    rest = ref.shape[len(lead) + 1 :]
    index = (*lead, pl.ds(first, size), *(slice(None) for _ in rest))
    if where is None:
        return ref[index]
    mask = jax.lax.broadcast_in_dim(where, (size, *rest), (0,))
    return _triton().load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def load_part(ref: Any, first: jax.Array, size: int, at: int, width: int, where: jax.Array) -> jax.Array:
    """Load `width` entries from `at` on of `size` rows, ``[size, width]``; see `load_rows`."""
    index = (pl.ds(first, size), pl.ds(jnp.int32(at), width))
    mask = jax.lax.broadcast_in_dim(where, (size, width), (0,))
    return _triton().load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def load_tile(ref: Any, rows: int, cols: int) -> jax.Array:
    """Load a whole array ``[n, e]``, padded with zeros to ``[rows, cols]``."""
    (n, e), index = ref.shape, (pl.ds(jnp.int32(0), rows), pl.ds(jnp.int32(0), cols))
    is_there = (jax.lax.iota(jnp.int32, rows) < n)[:, None] & (jax.lax.iota(jnp.int32, cols) < e)[None]
    return _triton().load(ref.at[index], mask=is_there, other=jnp.zeros((), ref.dtype))


def store_where(ref: Any, index: tuple, x: jax.Array, where: jax.Array):
    """Store x at an index where `where`, of x's shape or one bool, is true; elsewhere it may be out of bounds."""
    _triton().store(ref.at[index], x.astype(ref.dtype), mask=jnp.broadcast_to(where, x.shape))


def store_rows(ref: Any, first: jax.Array, x: jax.Array, where: jax.Array | None = None):
    """Store rows from `first` on, where `where` is true."""
    index = (pl.ds(first, x.shape[0]), *(slice(None) for _ in x.shape[1:]))
    if where is None:
        ref[index] = x.astype(ref.dtype)
    else:
        mask = jax.lax.broadcast_in_dim(where, x.shape, (0,))
        _triton().store(ref.at[index], x.astype(ref.dtype), mask=mask)


def load_row(ref: Any, lead: tuple, size: int) -> jax.Array:
    """Load the row at `lead`, padded with zeros to ``[size]``."""
    lead = tuple(map(jnp.int32, lead))
    if size == ref.shape[-1]:
        return ref[(*lead, slice(None))]
    return _triton().load(ref.at[_padded_index(lead, size)], mask=_is_there(ref, size), other=jnp.zeros((), ref.dtype))


def store_row(ref: Any, lead: tuple, x: jax.Array):
    """Store x to the row at `lead`, without the entries beyond its end."""
    lead, x, size = tuple(map(jnp.int32, lead)), x.astype(ref.dtype), x.shape[0]
    if size == ref.shape[-1]:
        ref[(*lead, slice(None))] = x
    else:
        _triton().store(ref.at[_padded_index(lead, size)], x, mask=_is_there(ref, size))


def _padded_index(lead, size):
    """Make the index of `size` entries of a row; the start is traced: JAX 0.12 refuses known indices out of bounds."""
    return (*lead, pl.ds(jnp.int32(0), size))


def _is_there(ref, size):
    """Return which of the first `size` entries lie within the last axis of an array, ``[size]`` bool."""
    return jax.lax.iota(jnp.int32, size) < ref.shape[-1]


# Elementwise functions. The backend (JAX 0.10 to 0.12) compiles `jnp.exp2` to code that keeps denormals and does not
# fuse its argument: six instructions instead of two, which take 5 to 12 % of a kernel's time.


def exp2_of(x: jax.Array, factor: float, less: jax.Array, assembly: bool) -> jax.Array:
    """Return ``2 ** (factor x - less)`` elementwise, with `less` broadcast to x.

    The assembly is one fused multiply-add and one approximate exponential; denormals become 0.
    """
    if not assembly:
        return jnp.exp2(x * factor - less)
    text = f"{{ .reg .f32 t; fma.rn.ftz.f32 t, $1, {_literal(factor)}, $2; ex2.approx.ftz.f32 $0, t; }}"
    return _assemble(text, x, jnp.broadcast_to(-less, x.shape))


def tanh_of(x: jax.Array, assembly: bool) -> jax.Array:
    """Return tanh(x) within 2e-7, by one exponential and one reciprocal; the backend's own takes forty instructions.

    The formula is ``tanh(x) = 1 - 2 / (1 + exp(2 x))``, with the exponential in base 2.
    """
    if not assembly or x.ndim == 0:  # inline assembly takes tiles only
        return jnp.tanh(x)
    double, one, minus_two = map(_literal, (2 * LOG2_E, 1.0, -2.0))
    text = (
        f"{{ .reg .f32 t; mul.ftz.f32 t, $1, {double}; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, {one}; "
        f"rcp.approx.ftz.f32 t, t; fma.rn.ftz.f32 $0, t, {minus_two}, {one}; }}"
    )
    return _assemble(text, x)


def _assemble(text, *arguments):
    """Apply PTX to each entry of float32 arrays of one shape; ``$0`` is the result, ``$1`` the first argument."""
    shape = jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)
    constraints = ",".join(["=f", *("f" for _ in arguments)])
    (out,) = _triton().elementwise_inline_asm(
        text, args=arguments, constraints=constraints, pack=1, result_shape_dtypes=[shape]
    )
    return out


def _literal(number):
    """Write a number as a float32 literal of PTX, by its bits, so that it is not rounded again."""
    return f"0f{np.float32(number).view(np.uint32):08X}"


# Launching


class Launch(NamedTuple):
    """How programs are launched over arrays whose leading axes are ``[b, h, g]``, of size 1 where shared.

    Attributes:
        tile: Size of a program.
        keep: Leading axis, 0 or 2, that a program gets whole and loops over; None if it has one row of the batch and
            one head. The reference of an array that shares this axis lacks it.
        interpret: Whether to interpret the kernel on any device as plain JAX; slow, for tests.
    """

    tile: Tile
    keep: int | None = None
    interpret: bool = False

    def __call__(
        self,
        name: str,
        program: Callable[..., None],
        arrays: Mapping[str, jax.Array],
        results: Mapping[str, jax.ShapeDtypeStruct],
        blocks: int,
        token_major: Container[str] = (),
        in_place: Mapping[str, str] | None = None,
    ) -> list[jax.Array]:
        """Run ``program(block, refs, *results)`` for all blocks, heads and rows of the batch.

        Args:
            name: Name of the kernel in profiles.
            program: Function of the block's index, the references of `arrays` by name, and those of the results.
            arrays: Arrays ``[b, h, g, ...]``, or one number ``[1]``, by name.
            results: Types of the results, ``[b, h, g, ...]``, by name.
            blocks: Blocks of a head.
            token_major: Names of arrays and results ``[b, h, 1, n, d]`` that lie in memory as ``[b, n, h, d]``, the
                layout of a layer's projections.
            in_place: For an array, the result that shares its memory. Such a result starts with the array's values.
        """
        layouts = [Layout(name in token_major) for name in (*arrays, *results)]
        names, count = tuple(arrays), len(arrays)
        order = list(results)
        same_memory = {names.index(x): order.index(result) for x, result in (in_place or {}).items()}

        def run(values, types):
            lead = layouts[0].lead(values[0].shape)
            sizes = [1 if axis == self.keep else size for axis, size in enumerate(lead)]

            def kernel(*refs):
                program(pl.program_id(0), dict(zip(names, refs, strict=False)), *refs[count:])

            return pl.pallas_call(
                kernel,
                name=name,
                grid=(blocks, sizes[1] * sizes[2], sizes[0]),
                in_specs=[self._spec(x.shape, sizes[2], at) for x, at in zip(values, layouts, strict=False)],
                out_specs=[self._spec(x.shape, sizes[2], at) for x, at in zip(types, layouts[count:], strict=True)],
                out_shape=types,
                input_output_aliases=same_memory,
                interpret=self.interpret,
                compiler_params=_triton().CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages),
            )(*values)

        return run_in_memory(run, list(arrays.values()), list(results.values()), layouts)

    def _spec(self, shape, g, layout):
        """Specify the part of an array that a program gets: all of one head, and the whole kept axis.

        Args:
            shape: Shape of the array in memory.
            g: Query heads that the grid's second axis counts for each head of keys; 1 if g is kept.
            layout: Layout of the array.

        Returns:
            A block specification. Its index map sends the grid's ``(block, head, row)`` to b, h and g; an axis of size
            1 is shared. The reference does not depend on the block: programs slice their blocks themselves.
        """
        if len(shape) == 1:
            return pl.BlockSpec(shape, lambda block, head, row: (0,))
        lead = layout.lead(shape)
        sizes = tuple(lead[axis] if axis == self.keep and lead[axis] > 1 else None for axis in range(3))

        def index(block, head, row):
            at = (row, head // g, head % g) if g > 1 else (row, head, 0)
            own = [
                at if size is None and lead[axis] > 1 else 0
                for axis, (at, size) in enumerate(zip(at, sizes, strict=True))
            ]
            return layout.join(own, [0 for _ in layout.rest(shape)])

        return pl.BlockSpec(layout.join(sizes, layout.rest(shape)), index)
