"""Where the package touches Pallas' Triton backend: launching programs, masked loads and stores, inline assembly.

JAX deprecates that backend since 0.11, and names no date for its removal. All that would have to be replaced is here.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

LOG2_E = float(np.log2(np.e))

# Axes of a grid beyond the first hold no more programs, on any NVIDIA GPU.
MOST_PROGRAMS = 65535


class Tile(NamedTuple):
    """Size of a program: the rows that stay, the columns that move in its loop, warps, and stages of the pipeline."""

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


# Loads and stores. A program's references are arrays of one head; `lead` picks from an axis that it got whole.


def load_rows(ref: Any, lead: tuple, first: jax.Array, size: int, where: jax.Array | None = None) -> jax.Array:
    """Read `size` rows from `first` on; zeros where `where`, ``[size]`` bool, is false, which may be beyond the end."""
    rest = ref.shape[len(lead) + 1 :]
    index = (*lead, pl.ds(first, size), *(slice(None) for _ in rest))
    if where is None:
        return ref[index]
    mask = jax.lax.broadcast_in_dim(where, (size, *rest), (0,))
    return _triton().load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def store_rows(ref: Any, first: jax.Array, x: jax.Array, where: jax.Array | None = None):
    """Write rows from `first` on, those for which `where` is true."""
    index = (pl.ds(first, x.shape[0]), *(slice(None) for _ in x.shape[1:]))
    if where is None:
        ref[index] = x.astype(ref.dtype)
    else:
        mask = jax.lax.broadcast_in_dim(where, x.shape, (0,))
        _triton().store(ref.at[index], x.astype(ref.dtype), mask=mask)


# Elementwise functions. What Pallas makes of `jnp.exp2` (0.10 to 0.12) keeps denormals and does not fuse its argument:
# six instructions instead of two, 5 to 12 % of a kernel's time.


def exp2_of(x: jax.Array, factor: float, less: jax.Array, assembly: bool) -> jax.Array:
    """Return ``2 ** (factor x - less)``."""
    if not assembly:
        return jnp.exp2(x * factor - less)
    text = f"{{ .reg .f32 t; fma.rn.ftz.f32 t, $1, {_literal(factor)}, $2; ex2.approx.ftz.f32 $0, t; }}"
    return _assemble(text, x, jnp.broadcast_to(-less, x.shape))


def tanh_of(x: jax.Array, assembly: bool) -> jax.Array:
    """Return tanh(x) by one exponential and one reciprocal, within 2e-7; the library's takes forty instructions."""
    if not assembly:
        return jnp.tanh(x)
    double, one, minus_two = map(_literal, (2 * LOG2_E, 1.0, -2.0))
    text = (
        f"{{ .reg .f32 t; mul.ftz.f32 t, $1, {double}; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, {one}; "
        f"rcp.approx.ftz.f32 t, t; fma.rn.ftz.f32 $0, t, {minus_two}, {one}; }}"
    )
    return _assemble(text, x)


def _assemble(text, *arguments):
    shape = jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)
    constraints = ",".join(["=f", *("f" for _ in arguments)])
    (out,) = _triton().elementwise_inline_asm(
        text, args=arguments, constraints=constraints, pack=1, result_shape_dtypes=[shape]
    )
    return out


def _literal(number):
    return f"0f{np.float32(number).view(np.uint32):08X}"


# Launching


class Launch(NamedTuple):
    """How programs are laid out over arrays whose leading axes are ``[b, h, g]``, or of size 1 where shared.

    Attributes:
        tile: Of a program.
        keep: The one of these axes that a program gets whole, 0 or 2, to loop over it; None if a program is of one
            row and one head. Arrays that share that axis come without it.
        interpret: Run on any device, slowly and as plain JAX: for tests.
        partitioned: Whether the program it becomes part of is still to be partitioned over devices. A launch then
            partitions itself over b and h.
    """

    tile: Tile
    keep: int | None = None
    interpret: bool = False
    partitioned: bool = False

    def __call__(
        self,
        name: str,
        program: Callable[..., None],
        arrays: Mapping[str, jax.Array],
        results: Sequence[jax.ShapeDtypeStruct],
        blocks: int,
    ) -> list[jax.Array]:
        """Run ``program(block, refs, *results)`` for all blocks, heads and rows.

        Args:
            name: Of the kernel, in profiles.
            program: Takes the block's number, the references of `arrays` by name, and those of the results.
            arrays: ``[b, h, g, ...]``, or one number of shape ``[1]``.
            results: Shapes and dtypes of the results, ``[b, h, g, ...]``.
            blocks: Blocks of a head.
        """
        names = tuple(arrays)

        def run(*values):
            b, h, g = values[0].shape[:3]
            local = [_resized(x, values[0], arrays[names[0]].shape) for x in results]
            sizes = [1 if axis == self.keep else size for axis, size in enumerate((b, h, g))]

            def kernel(*refs):
                program(pl.program_id(0), dict(zip(names, refs, strict=False)), *refs[len(names) :])

            return pl.pallas_call(
                kernel,
                name=name,
                grid=(blocks, sizes[1] * sizes[2], sizes[0]),
                in_specs=[self._spec(x.shape, sizes[2]) for x in values],
                out_specs=[self._spec(x.shape, sizes[2]) for x in local],
                out_shape=local,
                interpret=self.interpret,
                compiler_params=_triton().CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages),
            )(*values)

        run = _partition(run, arrays, results) if self.partitioned else run
        return list(run(*arrays.values()))

    def _spec(self, shape, g):
        """Which part of an array a program gets: all of one head, and of a kept axis all entries."""
        if len(shape) == 1:
            return pl.BlockSpec(shape, lambda block, head, row: (0,))
        lead, rest = shape[:3], shape[3:]
        sizes = tuple(lead[axis] if axis == self.keep and lead[axis] > 1 else None for axis in range(3))

        def place(block, head, row):
            places = (row, head // g, head % g) if g > 1 else (row, head, 0)
            own = (
                at if size is None and lead[axis] > 1 else 0
                for axis, (at, size) in enumerate(zip(places, sizes, strict=True))
            )
            return (*own, *(0 for _ in rest))

        return pl.BlockSpec((*sizes, *rest), place)


def _resized(x, first, whole):
    """Type of a result where the first argument is a part, of its rows and heads, of an array of the whole shape."""
    lead = (own if size == all_of else size for size, own, all_of in zip(x.shape, first.shape, whole[:3], strict=False))
    # Inside shard_map Pallas wants to be told how it varies: as the arguments do.
    varying = jax.typeof(first).manual_axis_type
    return jax.ShapeDtypeStruct((*lead, *x.shape[3:]), x.dtype, manual_axis_type=varying)


def _partition(run, arrays, results):
    """Let a function of arrays be partitioned over the axes b and h of its first argument."""
    shapes = [x.shape for x in (*arrays.values(), *results)]
    whole = shapes[0][:2]
    letters = iter(f"x{k}" for k in range(10 * len(shapes)))
    replicated = []

    def axes_of(shape):
        names = []
        for axis, size in enumerate(shape):
            if len(shape) > 1 and axis < 2 and size == whole[axis] > 1:
                names.append("bh"[axis])
            else:
                names.append(next(letters))
                replicated.append(names[-1])
        return " ".join(names)

    axes = [axes_of(shape) for shape in shapes]
    rule = f"{', '.join(axes[: len(arrays)])} -> {', '.join(axes[len(arrays) :])}"

    def partition(mesh, argument_shapes, result_shapes):
        spec = (*argument_shapes[0].sharding.spec, None, None)[:2]

        def sharding(shape):
            own = (spec[axis] if size == whole[axis] > 1 else None for axis, size in enumerate(shape[:2]))
            return NamedSharding(mesh, PartitionSpec(*own if len(shape) > 1 else ()))

        shardings = [sharding(shape) for shape in shapes]
        return mesh, run, tuple(shardings[len(arrays) :]), tuple(shardings[: len(arrays)])

    partitioned = custom_partitioning(run)
    partitioned.def_partition(partition=partition, sharding_rule=rule, need_replication_factors=tuple(replicated))
    return partitioned
