"""Sharding of arrays where JAX requires it to be stated: over explicit mesh axes, and inside ``jax.shard_map``."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def spread_by_compiler(fn: Callable, arrays: Sequence[Any], specs: Callable[[], Any]) -> Any:
    """Call a function and let the compiler shard its operations, even over explicit mesh axes.

    On explicit axes, the default of ``jax.make_mesh``, JAX derives the sharding of each operation's result from its
    arguments, and raises an error where it cannot: for gathers, scatters, and loops whose state starts as zeros.

    Args:
        fn: The function.
        arrays: Its arguments, trees of arrays.
        specs: Function that returns the `PartitionSpec` of the results, a tree of them or one for all, see `spec_of`.
            It is called only if an array is on a mesh with explicit axes.
    """
    mesh = explicit_mesh(arrays)
    if mesh is None:
        return fn(*arrays)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=shardings)(*arrays)


@contextlib.contextmanager
def as_automatic() -> Iterator[None]:
    """Make all axes of the current mesh automatic within a context, so that operations do not state shardings.

    Under a current mesh with explicit axes, JAX derives the sharding of each newly traced operation from its arguments.
    In a lowering rule the arguments' shardings are unknown, and all results would be gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_types))):
        yield


def spec_of(*arrays: Any, rank: int | None = None) -> PartitionSpec:
    """Return the spec of arrays over explicit mesh axes: for each axis, that of the first array that is sharded there.

    Args:
        *arrays: Arrays with the same meaning of their first axes.
        rank: Number of axes of the spec. None means the first array's. Axes that an array lacks are not sharded.
    """
    count: int = arrays[0].ndim if rank is None else rank
    specs = [tuple(jax.typeof(x).sharding.spec)[:count] for x in arrays]
    axes = zip(*(spec + (None,) * (count - len(spec)) for spec in specs), strict=True)
    return PartitionSpec(*(next((name for name in names if name is not None), None) for names in axes))


def shards_of(x: Any) -> tuple[int, ...]:
    """Return the number of shards of each axis of an array over explicit mesh axes."""
    mesh = jax.typeof(x).sharding.mesh
    return tuple(count_shards(mesh, entry) for entry in spec_of(x))


def count_shards(mesh: Any, entry: Any) -> int:
    """Return the number of shards that an entry of a `PartitionSpec` makes on a mesh."""
    return math.prod(mesh.shape[name] for name in _names(entry))


def apart(spec: Iterable[Any], *others: Iterable[Any]) -> PartitionSpec:
    """Return a spec without the mesh axes that other specs use."""
    used = {name for other in others for entry in other for name in _names(entry)}
    return PartitionSpec(*(_entry(name for name in _names(entry) if name not in used) for entry in spec))


def respread(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Reshard an array over explicit mesh axes, by a spec that uses no other axes than its own."""
    return x if spec == spec_of(x) else jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, spec))


def _names(entry):
    """Return the names of mesh axes in an entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(names):
    """Return the entry of a `PartitionSpec` for names of mesh axes."""
    names = tuple(names)
    return names if len(names) > 1 else next(iter(names), None)


def is_in_order(axis_name: str | tuple[str, ...], names: Sequence[str]) -> bool:
    """Return whether mesh axes are in the order of the mesh; in another order JAX 0.10 sends to wrong devices."""
    places = [names.index(name) for name in _names(axis_name)]
    return places == sorted(places)


def spread_like(x: jax.Array, like: jax.Array, count: int) -> jax.Array:
    """Shard the first `count` axes of x like another array's, if that is on a mesh with explicit axes.

    This restores the sharding of axes of size 1, which JAX's reshape loses.
    """
    if explicit_mesh([like]) is None:
        return x
    return respread(x, PartitionSpec(*spec_of(like, rank=count), *tuple(spec_of(x))[count:]))


def explicit_mesh(arrays: Any) -> Any:
    """Return the first mesh with explicit axes that an array of a tree is on; None if there is none."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def read_known(x: Any) -> np.ndarray | None:
    """Return an array as a NumPy array, to check its values; None if it is traced, or partly on other hosts.

    NumPy is used because under ``jit`` JAX traces operations on known arrays too.
    """
    is_known = not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)
    return np.asarray(x) if is_known else None


def varying_axes(arrays: Any) -> frozenset:
    """Return the mesh axes over which any array of a tree varies, inside ``jax.shard_map``."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))


def vary_like(tree: Any, arrays: Any) -> Any:
    """Make a tree vary over the mesh axes over which any of `arrays` varies, as required for the state of a loop."""
    axes = varying_axes(arrays)

    def vary(x):
        missing = tuple(axes - varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def vary_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Make all arrays vary over the same mesh axes, as JAX requires inside shard_map."""
    return vary_like(list(arrays), arrays)
