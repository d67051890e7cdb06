"""Partitioning of an operation over the devices of a mesh: each device computes its own part."""

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
"""A name for each axis of an array, such as "b" or "n"; None for an axis that is never spread over devices.

Axes of one name, in several arrays, are spread over the same mesh axes.
"""


def label(x: Any, *names: str | None) -> Labels:
    """Label the first axes of an array, or of its type, by these names; axes of size 1 and the others get None."""
    found = [name if size > 1 else None for name, size in zip(names, x.shape, strict=False)]
    return (*found, *[None] * (len(x.shape) - len(found)))


def over_devices(
    run: Callable[[Sequence[jax.Array], Mapping[str, tuple[str, ...]]], Sequence[jax.Array]],
    arguments: Sequence[Labels],
    results: Sequence[Labels],
    may_spread: Callable[[str, int], bool] = lambda name, shards: True,
) -> Callable[..., Sequence[jax.Array]]:
    """Partition an operation over the labelled axes of its arrays.

    The first argument that is sharded along a label decides how the label is spread; all other axes are replicated. A
    result that lacks a spread label is summed over its shards.

    Args:
        run: Function of a device's part of the arguments, and of the mesh axes that each label is spread over. It
            returns the device's part of each result, or its summand.
        arguments: Labels of the arguments.
        results: Labels of the results.
        may_spread: Whether a label may be spread over this many shards.

    Returns:
        The operation as a function of whole arrays, for a program that the compiler partitions. It has no derivatives.
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
        decode_shardings=False,  # decoding fails where an axis is spread over a part of a mesh axis
    )
    return partitioned


def _spec_of(x, mesh):
    """Return the mesh axes that each axis of an argument is spread over; empty if they are not whole mesh axes."""
    try:
        from jax._src.sharding_impls import parse_flatten_op_sharding

        return tuple(parse_flatten_op_sharding(x.sharding._hlo_sharding, mesh)[0])
    except Exception:  # the function is not public: where it is missing or fails, the argument is replicated
        return ()


def _choose_axes(mesh, arguments, types, may_spread):
    """Choose the mesh axes of each label from the arguments' shardings: they divide its size, and serve one label."""
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
