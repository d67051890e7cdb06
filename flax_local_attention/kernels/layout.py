"""How arrays of kernels lie in memory, and how kernels are spread over devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


class Layout(NamedTuple):
    """The layout of an array ``[b, h, g, ...]`` in memory: as it is, or ``[b, n, h, d]``."""

    is_token_major: bool

    def outside(self, x: Any) -> Any:
        """Return an array, or its type, in the layout of memory."""
        if not self.is_token_major:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            b, h, _, n, d = x.shape
            return x.update(shape=(b, n, h, d))
        return jnp.swapaxes(x[:, :, 0], 1, 2)

    def inside(self, x):
        """Return an array ``[b, h, g, ...]`` from its layout in memory."""
        return jnp.swapaxes(x, 1, 2)[:, :, None] if self.is_token_major else x

    def lead(self, shape):
        """Return the sizes b, h, g from a shape in memory."""
        return (shape[0], shape[2], 1) if self.is_token_major else shape[:3]

    def rest(self, shape):
        """Return the other sizes."""
        return (shape[1], shape[3]) if self.is_token_major else shape[3:]

    def join(self, lead, rest):
        """Join entries for the leading axes and for the others in the order of memory."""
        if not self.is_token_major:
            return (*lead, *rest)
        (b, h, _), (n, d) = lead, rest
        return b, n, h, d


def on_each_device(
    kernel: Callable[[Sequence[jax.Array], Sequence[jax.ShapeDtypeStruct]], Sequence[jax.Array]],
    arrays: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    layouts: Sequence[Layout],
    partitioned: bool,
) -> list[jax.Array]:
    """Run a kernel for the part of the arrays that each device holds.

    Args:
        kernel: Function of arrays and of types of results, both as they lie in memory; returns the results.
        arrays, results: Arrays ``[b, h, g, ...]``, and types of the results.
        layouts: Their layouts, arrays first.
        partitioned: Whether the compiled program is still to be partitioned over devices, over b and h.

    Returns:
        The results, ``[b, h, g, ...]``.
    """
    of_results = layouts[len(arrays) :]
    given = [layout.outside(x) for layout, x in zip(layouts, arrays, strict=False)]

    def run(*values):
        lead, whole = layouts[0].lead(values[0].shape), arrays[0].shape[:3]
        own = [
            layout.outside(_resized(x, lead, whole, values[0])) for layout, x in zip(of_results, results, strict=True)
        ]
        return tuple(kernel(values, own))

    if partitioned:
        types = [layout.outside(x) for layout, x in zip(of_results, results, strict=True)]
        run = _partition(run, given, types, layouts)
    return [layout.inside(x) for layout, x in zip(of_results, run(*given), strict=True)]


def _resized(x, lead, whole, like):
    """Make the type of a part's result, with its own leading axes where the result has the axes `whole`.

    Args:
        x: Type of the whole result, ``[b, h, g, ...]``.
        lead: Leading axes of the part of the first argument that a device holds.
        whole: Leading axes of the whole first argument.
        like: An argument, for the mesh axes that the result varies over.
    """
    lead = (own if size == all_of else size for size, own, all_of in zip(x.shape, lead, whole, strict=False))
    # Inside shard_map Pallas needs the mesh axes that a result varies over: those of the arguments.
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct((*lead, *x.shape[3:]), x.dtype, manual_axis_type=varying)


def _partition(run, arrays, results, layouts):
    """Let a function of arrays be partitioned over the axes b and h of its first argument.

    Heads and rows do not meet in a kernel, so that each device runs it on those it holds. All other axes are
    replicated, and so are b and h where an array shares them.

    Args:
        run: Function from arrays to results, in the layouts of memory.
        arrays, results: Arrays, and types of the results.
        layouts: Their layouts, arrays first.

    Returns:
        The function with two rules: one in letters for Shardy, one by the mesh for the compiled program.
    """
    shapes = [x.shape for x in (*arrays, *results)]
    whole = layouts[0].lead(shapes[0])[:2]
    letters = iter(f"x{k}" for k in range(10 * len(shapes)))
    replicated = []

    def shared_axes(shape, layout):
        """Find the axes of an array that are b and h, where it has them whole."""
        if len(shape) == 1:
            return {}
        axes = {0: "b", (2 if layout.is_token_major else 1): "h"}
        return {axis: name for axis, name in axes.items() if shape[axis] == whole["bh".index(name)] > 1}

    def letters_of(shape, layout):
        """Write an array's axes as letters: b and h where it has them whole, else letters of their own, replicated."""
        shared = shared_axes(shape, layout)
        names = [shared.get(axis) or next(letters) for axis in range(len(shape))]
        replicated.extend(name for axis, name in enumerate(names) if axis not in shared)
        return " ".join(names)

    axes = [letters_of(*pair) for pair in zip(shapes, layouts, strict=True)]
    rule = f"{', '.join(axes[: len(arrays)])} -> {', '.join(axes[len(arrays) :])}"

    def rule_by_mesh(mesh, argument_shapes, result_shapes):
        """Return mesh, function for a part, and shardings of results and arguments: those of the first argument."""
        first = {name: axis for axis, name in shared_axes(shapes[0], layouts[0]).items()}
        spec = tuple(argument_shapes[0].sharding.spec) + (None,) * len(shapes[0])
        over = {name: spec[axis] for name, axis in first.items()}

        def sharding(shape, layout):
            shared = shared_axes(shape, layout)
            return NamedSharding(mesh, PartitionSpec(*(over.get(shared.get(axis)) for axis in range(len(shape)))))

        shardings = [sharding(*pair) for pair in zip(shapes, layouts, strict=True)]
        return mesh, run, tuple(shardings[len(arrays) :]), tuple(shardings[: len(arrays)])

    partitioned = custom_partitioning(run)
    partitioned.def_partition(partition=rule_by_mesh, sharding_rule=rule, need_replication_factors=tuple(replicated))
    return partitioned
