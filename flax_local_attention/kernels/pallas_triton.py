"""All uses of Pallas' Triton backend: launches of programs, masked loads and stores, inline assembly.

A launch runs one program for each point of the grid ``(blocks, h g, b)``. A program gets references, which name memory
of the GPU: loads bring tiles to registers, stores write them back. Each reference is all of one head, ``[n, d]`` or
``[n]`` say, so that a program can visit blocks of its own choice. Shapes of tiles are powers of two; entries beyond an
array's end are masked.

JAX 0.11 deprecated that backend without a date for its removal. All that would have to be replaced is here.
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

# Axes of a grid beyond the first hold no more programs, on any NVIDIA GPU.
MOST_PROGRAMS = 65535


class Tile(NamedTuple):
    """The size of a program: rows that stay, columns that move in its loop, warps, and stages of the pipeline."""

    rows: int
    cols: int
    warps: int = 4
    stages: int = 2


@contextlib.contextmanager
def without_deprecation() -> Iterator[None]:
    """Do not warn of the backend's deprecation: a user of the package can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*[Tt]riton", DeprecationWarning)
        yield


@functools.cache
def _triton() -> ModuleType:
    """Import the backend, once and without its warning."""
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


# Loads and stores. A program's references are arrays of one head; `lead` indexes an axis that it got whole.


def load_rows(ref: Any, lead: tuple, first: jax.Array, size: int, where: jax.Array | None = None) -> jax.Array:
    """Read `size` rows from `first` on; zeros where `where`, ``[size]`` bool, is false: it must be beyond the end."""
    rest = ref.shape[len(lead) + 1 :]
    index = (*lead, pl.ds(first, size), *(slice(None) for _ in rest))
    if where is None:
        return ref[index]
    mask = jax.lax.broadcast_in_dim(where, (size, *rest), (0,))
    return _triton().load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def load_part(ref: Any, first: jax.Array, size: int, at: int, width: int, where: jax.Array) -> jax.Array:
    """Read entries from `at` on of `size` rows, ``[size, width]``; see `load_rows`."""
    index = (pl.ds(first, size), pl.ds(jnp.int32(at), width))
    mask = jax.lax.broadcast_in_dim(where, (size, width), (0,))
    return _triton().load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def load_tile(ref: Any, rows: int, cols: int) -> jax.Array:
    """Read all of an array ``[n, e]``, widened with zeros to ``[rows, cols]``."""
    (n, e), index = ref.shape, (pl.ds(jnp.int32(0), rows), pl.ds(jnp.int32(0), cols))
    is_there = (jax.lax.iota(jnp.int32, rows) < n)[:, None] & (jax.lax.iota(jnp.int32, cols) < e)[None]
    return _triton().load(ref.at[index], mask=is_there, other=jnp.zeros((), ref.dtype))


def store_where(ref: Any, index: tuple, x: jax.Array, where: jax.Array):
    """Write x at an index where `where`, of x's shape or one bool, is true; the index may else lie beyond the end."""
    _triton().store(ref.at[index], x.astype(ref.dtype), mask=jnp.broadcast_to(where, x.shape))


def store_rows(ref: Any, first: jax.Array, x: jax.Array, where: jax.Array | None = None):
    """Write rows from `first` on where `where` is true."""
    index = (pl.ds(first, x.shape[0]), *(slice(None) for _ in x.shape[1:]))
    if where is None:
        ref[index] = x.astype(ref.dtype)
    else:
        mask = jax.lax.broadcast_in_dim(where, x.shape, (0,))
        _triton().store(ref.at[index], x.astype(ref.dtype), mask=mask)


def load_row(ref: Any, lead: tuple, size: int) -> jax.Array:
    """Read the row at `lead`, ``[size]``; zeros beyond its end."""
    lead = tuple(map(jnp.int32, lead))
    if size == ref.shape[-1]:
        return ref[(*lead, slice(None))]
    return _triton().load(ref.at[_beyond(lead, size)], mask=_is_there(ref, size), other=jnp.zeros((), ref.dtype))


def store_row(ref: Any, lead: tuple, x: jax.Array):
    """Write the row at `lead`, as far as it reaches."""
    lead, x, size = tuple(map(jnp.int32, lead)), x.astype(ref.dtype), x.shape[0]
    if size == ref.shape[-1]:
        ref[(*lead, slice(None))] = x
    else:
        _triton().store(ref.at[_beyond(lead, size)], x, mask=_is_there(ref, size))


def _beyond(lead, size):
    """Make an index of `size` entries of a row, with a traced start: JAX 0.12 refuses known ones beyond the end."""
    return (*lead, pl.ds(jnp.int32(0), size))


def _is_there(ref, size):
    """Return which entries of a row of `size` lie within the array's last axis, ``[size]`` bool."""
    return jax.lax.iota(jnp.int32, size) < ref.shape[-1]


# Elementwise functions. Pallas (0.10 to 0.12) compiles `jnp.exp2` to code that keeps denormals and does not fuse its
# argument: six instructions instead of two, 5 to 12 % of a kernel's time.


def exp2_of(x: jax.Array, factor: float, less: jax.Array, assembly: bool) -> jax.Array:
    """Return ``2 ** (factor x - less)``, elementwise, `less` broadcast to x.

    The assembly is one fused multiplication and addition and one approximate exponential; denormals become 0.
    """
    if not assembly:
        return jnp.exp2(x * factor - less)
    text = f"{{ .reg .f32 t; fma.rn.ftz.f32 t, $1, {_literal(factor)}, $2; ex2.approx.ftz.f32 $0, t; }}"
    return _assemble(text, x, jnp.broadcast_to(-less, x.shape))


def tanh_of(x: jax.Array, assembly: bool) -> jax.Array:
    """Return tanh(x) by one exponential and one reciprocal, within 2e-7; the library's takes forty instructions.

    ``tanh(x) = 1 - 2 / (1 + exp(2 x))``, with the exponential in base 2.
    """
    if not assembly or x.ndim == 0:  # assembly takes tiles
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
    """Write a number as a float32 literal of PTX: its bits, so that nothing is rounded."""
    return f"0f{np.float32(number).view(np.uint32):08X}"


# Launching


class Launch(NamedTuple):
    """The layout of programs over arrays whose leading axes are ``[b, h, g]``, of size 1 where shared.

    Attributes:
        tile: Size of a program.
        keep: Axis among these, 0 or 2, that a program gets whole, to loop over it; None if a program has one row and
            one head. Arrays that share that axis come without it.
        interpret: Whether to run on any device, slowly and as plain JAX: for tests.
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
        """Run ``program(block, refs, *results)`` for all blocks, heads and rows.

        Args:
            name: Name of the kernel in profiles.
            program: Function of the block's number, the references of `arrays` by name, and those of the results.
            arrays: ``[b, h, g, ...]``, or one number ``[1]``.
            results: Shapes and dtypes of the results, ``[b, h, g, ...]``, by names of their own.
            blocks: Blocks of a head.
            token_major: Names of arrays and results ``[b, h, 1, n, d]`` that lie in memory as ``[b, n, h, d]``, the
                layout of a product of tokens.
            in_place: Names of results by the names of arrays in whose memory they are made. Such a result begins as
                its array.
        """
        layouts = [Layout(name in token_major) for name in (*arrays, *results)]
        names, count = tuple(arrays), len(arrays)
        order = list(results)
        same_memory = {names.index(x): order.index(result) for x, result in (in_place or {}).items()}

        def run(values, own):
            lead = layouts[0].lead(values[0].shape)
            sizes = [1 if axis == self.keep else size for axis, size in enumerate(lead)]

            def kernel(*refs):
                program(pl.program_id(0), dict(zip(names, refs, strict=False)), *refs[count:])

            return pl.pallas_call(
                kernel,
                name=name,
                grid=(blocks, sizes[1] * sizes[2], sizes[0]),
                in_specs=[self._spec(x.shape, sizes[2], at) for x, at in zip(values, layouts, strict=False)],
                out_specs=[self._spec(x.shape, sizes[2], at) for x, at in zip(own, layouts[count:], strict=True)],
                out_shape=own,
                input_output_aliases=same_memory,
                interpret=self.interpret,
                compiler_params=_triton().CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages),
            )(*values)

        return run_in_memory(run, list(arrays.values()), list(results.values()), layouts)

    def _spec(self, shape, g, layout):
        """Make the specification of the part that a program gets: all of one head, and of a kept axis all entries.

        Args:
            shape: Shape of the array in memory.
            g: Query heads that the grid's second axis counts for each head of keys; 1 if g is kept.
            layout: Layout of the array.

        Returns:
            A block specification whose index map sends ``(block, head, row)`` of the grid to b, h and g. The block's
            number does not move the reference: programs cut their blocks themselves. An axis of size 1 is shared.
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
