"""How arrays are spread over devices, where JAX asks: over explicit axes of a mesh, and inside ``jax.shard_map``."""

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
    """Call a function whose operations the compiler spreads over all axes of a mesh, as it does over automatic ones.

    On explicit axes, those of ``jax.make_mesh``, JAX has each operation's result spread by its arguments alone, and
    refuses those for which that is not enough: gathers, scatters, loops whose state begins with zeros.

    Args:
        fn: The function.
        arrays: Its arguments, trees of arrays.
        specs: Function that returns the `PartitionSpec` of the results, a tree of them or one for all, see `spec_of`.
            It is called only if an array is on a mesh of explicit axes.
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
    """Have all axes of the current mesh automatic: within, operations say nothing of how their results are spread.

    Where a mesh of explicit axes is current, each operation that is traced anew has its result spread as its arguments
    are known to be. Those of a lowering rule are not known: all would be gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_types))):
        yield


def spec_of(*arrays: Any, rank: int | None = None) -> PartitionSpec:
    """Return how arrays of like axes are spread over explicit ones of a mesh: as the first that is, axis by axis.

    Args:
        *arrays: Arrays, of which the first axes are alike.
        rank: How many axes the spec is for. None means those of the first array; axes that an array lacks are whole.
    """
    count: int = arrays[0].ndim if rank is None else rank
    specs = [tuple(jax.typeof(x).sharding.spec)[:count] for x in arrays]
    axes = zip(*(spec + (None,) * (count - len(spec)) for spec in specs), strict=True)
    return PartitionSpec(*(next((name for name in names if name is not None), None) for names in axes))


def shards_of(x: Any) -> tuple[int, ...]:
    """Return over how many devices each axis of an array is spread by explicit axes of a mesh; 1 for whole axes."""
    mesh = jax.typeof(x).sharding.mesh
    return tuple(count_shards(mesh, entry) for entry in spec_of(x))


def count_shards(mesh: Any, entry: Any) -> int:
    """Return over how many devices of a mesh an entry of a `PartitionSpec` spreads an axis."""
    return math.prod(mesh.shape[name] for name in _names(entry))


def apart(spec: Iterable[Any], *others: Iterable[Any]) -> PartitionSpec:
    """Return a spec without the mesh axes that other specs name."""
    used = {name for other in others for entry in other for name in _names(entry)}
    return PartitionSpec(*(_entry(name for name in _names(entry) if name not in used) for entry in spec))


def respread(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Spread an array over explicit axes of a mesh by a spec that names no axis which it is not spread over already."""
    return x if spec == spec_of(x) else jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, spec))


def _names(entry):
    """Return the names of mesh axes in an entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(names):
    """Return the entry of a `PartitionSpec` for names of mesh axes."""
    names = tuple(names)
    return names if len(names) > 1 else next(iter(names), None)


def is_in_order(axis_name: str | tuple[str, ...], names: Sequence[str]) -> bool:
    """Return whether mesh axes are in the order of the mesh: in another one JAX (0.10) sends to other devices."""
    places = [names.index(name) for name in _names(axis_name)]
    return places == sorted(places)


def spread_like(x: jax.Array, like: jax.Array, count: int) -> jax.Array:
    """Return x with its first `count` axes spread as those of another array, where that is over explicit axes.

    A reshape of JAX forgets how an axis of size 1 is spread.
    """
    if explicit_mesh([like]) is None:
        return x
    return respread(x, PartitionSpec(*spec_of(like, rank=count), *tuple(spec_of(x))[count:]))


def explicit_mesh(arrays: Any) -> Any:
    """Return the mesh that any array of a tree is on, if it has explicit axes; else None."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def read_known(x: Any) -> np.ndarray | None:
    """Return an array as NumPy's, so that checking it records nothing; None if it is traced, or other hosts have parts.

    Under ``jit`` an operation of JAX on a known array is traced as well.
    """
    is_known = not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)
    return np.asarray(x) if is_known else None


def varying_axes(arrays: Any) -> frozenset:
    """Return the mesh axes that any array of a tree varies over, inside ``jax.shard_map``."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))


def vary_like(tree: Any, arrays: Any) -> Any:
    """Let a tree vary over the mesh axes that any of `arrays` varies over, as the state of a loop must."""
    axes = varying_axes(arrays)

    def vary(x):
        missing = tuple(axes - varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def vary_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Let all arrays vary over the mesh axes that any varies over, as JAX requires inside shard_map."""
    return vary_like(list(arrays), arrays)
