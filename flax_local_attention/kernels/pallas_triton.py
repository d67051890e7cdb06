"""Where the package touches Pallas' Triton backend: launching programs, masked loads and stores, inline assembly.

JAX deprecates that backend since 0.11, and names no date for its removal. All that would have to be replaced is here.
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


def load_row(ref: Any, lead: tuple, size: int) -> jax.Array:
    """Read the row at `lead`, ``[size]``; zeros beyond its end."""
    lead = tuple(map(jnp.int32, lead))
    if size == ref.shape[-1]:
        return ref[(*lead, slice(None))]
    return _triton().load(ref.at[_beyond(lead, size)], mask=_is_there(ref, size), other=jnp.zeros((), ref.dtype))


def store_row(ref: Any, lead: tuple, x: jax.Array):
    """Write the row at `lead`, but for what is beyond its end."""
    lead, x, size = tuple(map(jnp.int32, lead)), x.astype(ref.dtype), x.shape[0]
    if size == ref.shape[-1]:
        ref[(*lead, slice(None))] = x
    else:
        _triton().store(ref.at[_beyond(lead, size)], x, mask=_is_there(ref, size))


def _beyond(lead, size):
    """Index of a row and what follows it; from an array, since JAX 0.12 refuses numbers that lead beyond the end."""
    return (*lead, pl.ds(jnp.int32(0), size))


def _is_there(ref, size):
    return jax.lax.iota(jnp.int32, size) < ref.shape[-1]


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
        results: Mapping[str, jax.ShapeDtypeStruct],
        blocks: int,
        token_major: Container[str] = (),
    ) -> list[jax.Array]:
        """Run ``program(block, refs, *results)`` for all blocks, heads and rows.

        Args:
            name: Of the kernel, in profiles.
            program: Takes the block's number, the references of `arrays` by name, and those of the results.
            arrays: ``[b, h, g, ...]``, or one number of shape ``[1]``.
            results: Shapes and dtypes of the results, ``[b, h, g, ...]``, by names of their own.
            blocks: Blocks of a head.
            token_major: Names of arrays and results ``[b, h, 1, n, d]`` that lie in memory as ``[b, n, h, d]``: as they
                come from a product, and go to one.
        """
        places = [_Place(name in token_major) for name in (*arrays, *results)]
        names, count = tuple(arrays), len(arrays)

        def run(*values):
            b, h, g = places[0].lead(values[0].shape)
            whole = next(iter(arrays.values())).shape[:3]
            local = [
                place.outside(_resized(x, (b, h, g), whole, values[0]))
                for place, x in zip(places[count:], results.values(), strict=True)
            ]
            sizes = [1 if axis == self.keep else size for axis, size in enumerate((b, h, g))]

            def kernel(*refs):
                program(pl.program_id(0), dict(zip(names, refs, strict=False)), *refs[count:])

            return pl.pallas_call(
                kernel,
                name=name,
                grid=(blocks, sizes[1] * sizes[2], sizes[0]),
                in_specs=[self._spec(x.shape, sizes[2], at) for x, at in zip(values, places, strict=False)],
                out_specs=[self._spec(x.shape, sizes[2], at) for x, at in zip(local, places[count:], strict=True)],
                out_shape=local,
                interpret=self.interpret,
                compiler_params=_triton().CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages),
            )(*values)

        given = [place.outside(x) for place, x in zip(places, arrays.values(), strict=False)]
        types = [place.outside(x) for place, x in zip(places[count:], results.values(), strict=True)]
        run = _partition(run, given, types, places) if self.partitioned else run
        return [place.inside(x) for place, x in zip(places[count:], run(*given), strict=True)]

    def _spec(self, shape, g, place):
        """Which part of an array a program gets: all of one head, and of a kept axis all entries."""
        if len(shape) == 1:
            return pl.BlockSpec(shape, lambda block, head, row: (0,))
        lead = place.lead(shape)
        sizes = tuple(lead[axis] if axis == self.keep and lead[axis] > 1 else None for axis in range(3))

        def index(block, head, row):
            at = (row, head // g, head % g) if g > 1 else (row, head, 0)
            own = [
                at if size is None and lead[axis] > 1 else 0
                for axis, (at, size) in enumerate(zip(at, sizes, strict=True))
            ]
            return place.join(own, [0 for _ in shape[3 if not place.is_token_major else 2 :]])

        return pl.BlockSpec(place.join(sizes, place.rest(shape)), index)


class _Place(NamedTuple):
    """How an array ``[b, h, g, ...]`` lies in memory: so, or as ``[b, n, h, d]``."""

    is_token_major: bool

    def outside(self, x):
        """The array, or its type, as it lies."""
        if not self.is_token_major:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            b, h, _, n, d = x.shape
            return x.update(shape=(b, n, h, d))
        return jnp.swapaxes(x[:, :, 0], 1, 2)

    def inside(self, x):
        """The array as it is meant."""
        return jnp.swapaxes(x, 1, 2)[:, :, None] if self.is_token_major else x

    def lead(self, shape):
        """Sizes b, h, g of an array as it lies."""
        return (shape[0], shape[2], 1) if self.is_token_major else shape[:3]

    def rest(self, shape):
        """Its other sizes."""
        return (shape[1], shape[3]) if self.is_token_major else shape[3:]

    def join(self, lead, rest):
        """Put what belongs to the leading axes and to the others where they lie."""
        if not self.is_token_major:
            return (*lead, *rest)
        (b, h, _), (n, d) = lead, rest
        return b, n, h, d


def _resized(x, lead, whole, like):
    """Type of a result of a part, with these leading axes, of arrays that have the leading axes `whole`."""
    lead = (own if size == all_of else size for size, own, all_of in zip(x.shape, lead, whole, strict=False))
    # Inside shard_map Pallas wants to be told how it varies: as the arguments do.
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct((*lead, *x.shape[3:]), x.dtype, manual_axis_type=varying)


def _partition(run, arrays, results, places):
    """Let a function of arrays be partitioned over the axes b and h of its first argument."""
    shapes = [x.shape for x in (*arrays, *results)]
    whole = places[0].lead(shapes[0])[:2]
    letters = iter(f"x{k}" for k in range(10 * len(shapes)))
    replicated = []

    def shared_axes(shape, place):
        """The axes of an array that are b and h, where it has them whole."""
        if len(shape) == 1:
            return {}
        axes = {0: "b", (2 if place.is_token_major else 1): "h"}
        return {axis: name for axis, name in axes.items() if shape[axis] == whole["bh".index(name)] > 1}

    def letters_of(shape, place):
        shared = shared_axes(shape, place)
        names = [shared.get(axis) or next(letters) for axis in range(len(shape))]
        replicated.extend(name for axis, name in enumerate(names) if axis not in shared)
        return " ".join(names)

    axes = [letters_of(*pair) for pair in zip(shapes, places, strict=True)]
    rule = f"{', '.join(axes[: len(arrays)])} -> {', '.join(axes[len(arrays) :])}"

    def partition(mesh, argument_shapes, result_shapes):
        first = {name: axis for axis, name in shared_axes(shapes[0], places[0]).items()}
        spec = tuple(argument_shapes[0].sharding.spec) + (None,) * len(shapes[0])
        over = {name: spec[axis] for name, axis in first.items()}

        def sharding(shape, place):
            shared = shared_axes(shape, place)
            return NamedSharding(mesh, PartitionSpec(*(over.get(shared.get(axis)) for axis in range(len(shape)))))

        shardings = [sharding(*pair) for pair in zip(shapes, places, strict=True)]
        return mesh, run, tuple(shardings[len(arrays) :]), tuple(shardings[: len(arrays)])

    partitioned = custom_partitioning(run)
    partitioned.def_partition(partition=partition, sharding_rule=rule, need_replication_factors=tuple(replicated))
    return partitioned
