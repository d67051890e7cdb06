"""How parameters are spread over the devices of a mesh: names of their axes, and mesh axes of these names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from flax_local_attention.checks import check_kind, describe

AXIS_RULES: Sequence[tuple[str, Any]] = (
    ("batch", "data"),
    ("sequence", "sequence"),
    ("heads", "model"),
    ("mlp", "model"),
    ("vocab", "model"),
    ("embed", None),
)
"""Mesh axes by the names of parameters' and tokens' axes; ``("embed", "data")`` in place of the last one is FSDP."""

# By the last names of a parameter's path. Axes of those that are not here are whole: they are small.
_AXES: Mapping[tuple[str, ...], tuple[str | None, ...]] = {
    ("token_emb", "embedding"): ("vocab", "embed"),
    ("pos_emb", "embedding"): (None, "embed"),
    ("to_logits", "kernel"): ("embed", "vocab"),
    ("to_qkv", "kernel"): ("embed", "heads"),
    ("to_qkv", "bias"): ("heads",),
    ("to_v_gate", "kernel"): ("embed", "heads"),
    ("to_v_gate", "bias"): ("heads",),
    ("to_out", "kernel"): ("heads", "embed"),
    ("sinks",): ("heads",),
    ("memory_k",): ("heads", None, None),
    ("memory_v",): ("heads", None, None),
    ("to_hidden", "kernel"): ("embed", "mlp"),
    ("ff", "to_out", "kernel"): ("mlp", "embed"),
}


def parameter_axes(tree: Any) -> Any:
    """Name the axes of parameters, as `flax.linen.logical_to_mesh_sharding` takes them.

    Arrays are found by the last names of their paths, so that gradients and states of optimizers have the axes of
    their parameters. The axis of stacked layers is whole, as are arrays whose number of axes is not the parameter's,
    the factors of Adafactor say.

    Args:
        tree: Parameters, variables, or any pytree with these in it, of arrays or their shapes.

    Returns:
        The tree with a `PartitionSpec` of names in place of each array: "embed", "heads", "mlp", "vocab" or None.

    Example:
        >>> params = {"to_logits": {"kernel": jnp.zeros((8, 256))}, "norm": {"scale": jnp.ones(8)}}
        >>> jax.tree.map(tuple, parameter_axes(params))
        {'norm': {'scale': (None,)}, 'to_logits': {'kernel': ('embed', 'vocab')}}
    """
    return jax.tree.map_with_path(lambda path, x: PartitionSpec(*_axes(_names(path), np.ndim(x))), tree)


def parameter_shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Sequence[tuple[str, Any]] = AXIS_RULES) -> Any:
    """Spread parameters over a mesh: heads, feed-forward and vocabulary over its axis "model", by default.

    Args:
        tree: Parameters, variables, gradients or states of optimizers, of arrays or their shapes.
        mesh: The mesh. Its axes may be explicit or automatic.
        rules: Pairs of a name in `parameter_axes` and a mesh axis, several or None; the first of a name counts.

    Returns:
        The tree with a `NamedSharding` in place of each array, for `jax.device_put` or ``jax.jit(out_shardings=)``. An
        axis is whole if the mesh lacks its mesh axis, if this does not divide it, or if an axis before has it.

    Example:
        >>> model = LocalTransformer(num_tokens=256, max_seq_len=64, dim=32, depth=1, local_attn_window_size=16)
        >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
        >>> shardings = parameter_shardings(shapes, mesh, [("embed", "data"), *AXIS_RULES])
        >>> tuple(shardings["params"]["to_logits"]["kernel"].spec)
        ('data', 'model')
        >>> variables = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    """
    check_kind("mesh", mesh, Mesh | AbstractMesh, "make one by jax.make_mesh((4, 2), ('data', 'model')), say")
    by_name = _read_rules(rules)

    def place(x, names):
        used, entries = set(), []
        for size, name in zip(np.shape(x), names, strict=True):
            axes = by_name.get(name)
            axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
            axes = tuple(axis for axis in axes if axis in mesh.shape and axis not in used)
            axes = axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
            used.update(axes)
            entries.append(axes if len(axes) > 1 else next(iter(axes), None))
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map(place, tree, parameter_axes(tree))


def _read_rules(rules):
    """Return the mesh axes of each name; the first rule of a name counts."""
    by_name: dict[str, Any] = {}
    for rule in rules if isinstance(rules, Sequence) else (rules,):
        if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[0], str)):
            raise TypeError(
                f"`rules` must be pairs of a name and a mesh axis, got {describe(rule)}; write "
                "[('embed', 'data'), *AXIS_RULES], say."
            )
        by_name.setdefault(*rule)
    return by_name


def _names(path):
    """Return the names in a path of a tree, without the last one of a box such as `nn.Partitioned`."""
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    return names[:-1] if names[-1:] == ["value"] else names


def _axes(names, rank):
    """Return names of the axes of an array, from those in its path."""
    found = next((_AXES[key] for size in (3, 2, 1) if (key := tuple(names[-size:])) in _AXES), None)
    axes = None if found is None else (None, *found) if "layers" in names else found
    return axes if axes is not None and len(axes) == rank else (None,) * rank
