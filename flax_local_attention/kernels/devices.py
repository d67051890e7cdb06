"""How an operation is spread over the devices of a mesh when its program is partitioned: each computes its own part."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from flax_local_attention.sharding import as_automatic, is_in_order

Labels = tuple[str | None, ...]
"""The axes of an array that are spread with those of others, by names such as "b" and "n"; None for all else."""


def label(x: Any, *names: str | None) -> Labels:
    """Return the labels of an array, or its type, whose first axes are these, where they are not of size 1."""
    found = [name if size > 1 else None for name, size in zip(names, x.shape, strict=False)]
    return (*found, *[None] * (len(x.shape) - len(found)))


def over_devices(
    run: Callable[[Sequence[jax.Array], Mapping[str, tuple[str, ...]]], Sequence[jax.Array]],
    arguments: Sequence[Labels],
    results: Sequence[Labels],
    may_spread: Callable[[str, int], bool] = lambda name, shards: True,
) -> Callable[..., Sequence[jax.Array]]:
    """Let an operation be partitioned over the axes that its arrays have in common.

    An axis is spread as the first argument that is spread along it; all others are put on each device. A result that
    lacks an axis that is spread is a sum over it.

    Args:
        run: Function of a device's part of the arguments, and of the mesh axes that each label is spread over; it
            returns the device's part of the results, or its summand.
        arguments, results: Labels of their axes.
        may_spread: Whether a label may be spread over so many shards.

    Returns:
        The function of whole arrays, for a program that is still to be partitioned. It has no derivatives.
    """
    counter = itertools.count()

    def write(labels):
        return " ".join(name or f"x{next(counter)}" for name in labels)

    written = [", ".join(map(write, group)) for group in (arguments, results)]
    whole = tuple(f"x{at}" for at in range(next(counter)))

    def rule_by_mesh(mesh, argument_types, result_types):
        """Return the mesh, the function of a device, and the shardings of results and arguments."""
        over = _choose_axes(mesh, arguments, argument_types, may_spread)

        def sharding(labels):
            return NamedSharding(mesh, PartitionSpec(*(over.get(name) for name in labels)))

        summed = [sum((axes for name, axes in over.items() if name not in labels), ()) for labels in results]

        def on_device(*values):
            with as_automatic():
                found = run(values, over)
                return tuple(lax.psum(x, axes) if axes else x for x, axes in zip(found, summed, strict=True))

        return mesh, on_device, tuple(map(sharding, results)), tuple(map(sharding, arguments))

    partitioned = custom_partitioning(jax.jit(lambda *values: tuple(run(values, {}))))
    partitioned.def_partition(
        partition=rule_by_mesh,
        sharding_rule=" -> ".join(written),
        need_replication_factors=whole,
        decode_shardings=False,  # it fails where an axis is spread over a part of a mesh axis
    )
    return partitioned


def _spec_of(x, mesh):
    """Return how an argument is spread over mesh axes; nothing if that is over parts of them."""
    try:
        from jax._src.sharding_impls import parse_flatten_op_sharding

        return tuple(parse_flatten_op_sharding(x.sharding._hlo_sharding, mesh)[0])
    except Exception:  # not public; then, and where it cannot say, the argument is put on each device
        return ()


def _choose_axes(mesh, arguments, types, may_spread):
    """Return the mesh axes of each label, by how the arguments are spread: such as divide it, none of them twice."""
    over: dict[str, tuple[str, ...]] = {}
    for labels, x in zip(arguments, types, strict=True):
        for name, axes in zip(labels, _spec_of(x, mesh), strict=False):
            if name is None or axes is None or name in over:
                continue
            axes = (axes,) if isinstance(axes, str) else tuple(axes)
            shards, size = math.prod(mesh.shape[axis] for axis in axes), x.shape[labels.index(name)]
            is_free = axes and not set(itertools.chain(*over.values())) & set(axes)
            if is_free and is_in_order(axes, mesh.axis_names) and size % shards == 0 and may_spread(name, shards):
                over[name] = axes
    return over
