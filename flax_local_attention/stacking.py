"""Conversion between two layouts of layer parameters: one entry per layer, or all stacked along a leading axis."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict, freeze, unfreeze

METADATA = {nn.PARTITION_NAME: None}  # the axis of layers is not sharded


def stack_layers(tree: Any) -> Any:
    """Stack the parameters of layers: the layout of `LocalTransformer(scan_layers=True)`.

    In every mapping, the entries ``layers_0``, ``layers_1``, ... become one entry ``layers``, whose arrays have a
    leading axis of layers. Everything else is unchanged. Gradients and optimizer states are converted like parameters:
    Adam continues as before, but an optimizer that computes norms or row statistics of an array gets those of all
    layers together.

    Args:
        tree: Parameters, variables, or any pytree with such mappings in it.

    Returns:
        The same pytree with stacked layers, bitwise equal. NumPy arrays stay NumPy arrays. Boxes such as
        `nn.Partitioned` get the name None for the new axis.

    Raises:
        ValueError: There are no layers, a layer is missing, or layers differ in names, shapes, dtypes or boxes.

    Examples:
        >>> stack_layers({"layers_0": {"bias": np.array([1, 2])}, "layers_1": {"bias": np.array([3, 4])}})
        {'layers': {'bias': array([[1, 2],
               [3, 4]])}}
    """
    return _convert(tree, _stack, "layers_0, layers_1, ...")


def unstack_layers(tree: Any) -> Any:
    """Unstack the parameters of layers, the inverse of `stack_layers`.

    Args:
        tree: Parameters, variables, or any pytree with stacked layers in it.

    Returns:
        The same pytree with ``layers_0``, ``layers_1``, ..., bitwise equal. NumPy arrays become views.

    Raises:
        ValueError: There are no stacked layers, or their arrays differ in the number of layers.

    Examples:
        >>> unstack_layers({"layers": {"bias": np.array([[1, 2], [3, 4]])}})
        {'layers_0': {'bias': array([1, 2])}, 'layers_1': {'bias': array([3, 4])}}
    """
    return _convert(tree, _unstack, "layers")


def _convert(tree: Any, convert: Callable[[Mapping], dict | None], wanted: str) -> Any:
    """Convert every mapping with layers in a tree; `convert` returns None for a mapping without, which is searched."""
    found = []

    def visit(x):
        if isinstance(x, FrozenDict):
            return freeze(visit(unfreeze(x)))
        if not isinstance(x, Mapping):
            return x
        if "layers" in x and "layers_0" in x:
            raise ValueError("`tree` must have layers in one layout, got layers and layers_0; drop one of them.")
        converted = convert(x)
        if converted is None:
            return {name: jax.tree.map(visit, value, is_leaf=_is_mapping) for name, value in x.items()}
        found.append(converted)
        return converted

    tree = jax.tree.map(visit, tree, is_leaf=_is_mapping)
    if not found:
        raise ValueError(
            f"`tree` must have the parameters of layers under {wanted}, got none; pass those of a LocalTransformer, "
            "or leave the tree as it is if it has the other layout already."
        )
    return tree


def _is_mapping(x):
    return isinstance(x, Mapping)


def _stack(tree):
    names = [name for name in tree if re.fullmatch(r"layers_\d+", str(name))]
    if not names:
        return None
    wanted = [f"layers_{index}" for index in range(len(names))]
    if set(names) != set(wanted):
        raise ValueError(f"`tree` must have all layers from layers_0 on, got {sorted(names)}; add the missing ones.")
    first, *others = (tree[name] for name in wanted)
    for name, other in zip(wanted[1:], others, strict=True):
        _check_same(first, other, name)
    stacked = nn.meta.add_axis(jax.tree.map(_stack_arrays, first, *others), 0, METADATA)
    return {name: x for name, x in tree.items() if name not in wanted} | {"layers": stacked}


def _stack_arrays(*arrays):
    return np.stack(arrays) if isinstance(arrays[0], np.ndarray | np.generic) else jnp.stack(arrays)


def _check_same(first, other, name):
    ours, theirs = (
        {jax.tree_util.keystr(path): _describe(x) for path, x in jax.tree.leaves_with_path(layer)}
        for layer in (first, other)
    )
    for path in ours | theirs:
        if ours.get(path) != theirs.get(path):
            raise ValueError(
                f"`tree` must have the same parameters in all layers to be stacked, got {path} of {ours.get(path)} in "
                f"layers_0 and of {theirs.get(path)} in {name}; leave layers that differ as they are."
            )
    if jax.tree.structure(first) != jax.tree.structure(other):
        raise ValueError(
            f"`tree` must have the same containers and boxes in all layers, got different ones in layers_0 and {name}; "
            "give all layers the same ones, or remove boxes with `nn.unbox`."
        )


def _describe(x):
    return f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}"


def _unstack(tree):
    stacked = tree.get("layers")
    if not isinstance(stacked, Mapping):
        return None
    paths = {np.shape(x)[:1]: jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(stacked)}
    if len(paths) != 1 or () in paths:
        got = " and ".join(f"{list(size)} in {path}" for size, path in paths.items())
        raise ValueError(
            f"`tree` must have one leading axis of layers in all stacked arrays, got {got or 'no arrays'}; pass what "
            "`stack_layers` or a model with `scan_layers=True` returned."
        )
    ((depth,),) = paths
    stacked = nn.meta.remove_axis(stacked, 0, METADATA)
    # With the ellipsis NumPy returns an array without axes, not a number.
    layers = {f"layers_{index}": jax.tree.map(lambda x, index=index: x[index, ...], stacked) for index in range(depth)}
    return {name: x for name, x in tree.items() if name != "layers"} | layers
