"""Sharding of parameters over a mesh: names of parameter axes, and rules from these names to mesh axes."""

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
"""Rules from names of axes to mesh axes; put ``("embed", "data")`` before them to shard parameters fully."""

# Axis names by the last names of a parameter's path. Other parameters are small and are replicated.
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
    """Name the axes of parameters, in the format of `flax.linen.logical_to_mesh_sharding`.

    Arrays are identified by the last names of their paths, so gradients and optimizer states get the axes of their
    parameters. The axis of stacked layers has no name. Neither have the axes of arrays whose number of axes differs
    from the parameter's, such as the factors of Adafactor.

    Args:
        tree: Parameters, variables, or any pytree with these in it, of arrays or their shapes.

    Returns:
        The tree with a `PartitionSpec` in place of each array, with the names "embed", "heads", "mlp", "vocab" or None.

    Examples:
        >>> params = {"to_logits": {"kernel": jnp.zeros((8, 256))}, "norm": {"scale": jnp.ones(8)}}
        >>> jax.tree.map(tuple, parameter_axes(params))
        {'norm': {'scale': (None,)}, 'to_logits': {'kernel': ('embed', 'vocab')}}
    """
    return jax.tree.map_with_path(lambda path, x: PartitionSpec(*_axes(_names(path), np.ndim(x))), tree)


def parameter_shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Sequence[tuple[str, Any]] = AXIS_RULES) -> Any:
    """Make shardings of parameters over a mesh; by default its axis "model" shards heads, feed-forward and vocabulary.

    Args:
        tree: Parameters, variables, gradients or optimizer states, of arrays or their shapes.
        mesh: The mesh. Its axes may be explicit or automatic.
        rules: Pairs of a name from `parameter_axes` and a mesh axis, a tuple of them or None. The first rule for a name
            counts.

    Returns:
        The tree with a `NamedSharding` in place of each array, for `jax.device_put` or ``jax.jit(out_shardings=)``. An
        axis is not sharded if the mesh lacks its mesh axis, if the mesh axis does not divide it, or if an earlier axis
        of the array uses the same mesh axis.

    Raises:
        TypeError: `mesh` is not a mesh, or `rules` are not pairs.

    Examples:
        >>> model = LocalTransformer(num_tokens=256, max_seq_len=64, dim=32, depth=1, local_attn_window_size=16)
        >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
        >>> shardings = parameter_shardings(shapes, mesh, [("embed", "data"), *AXIS_RULES])
        >>> tuple(shardings["params"]["to_logits"]["kernel"].spec)
        ('data', 'model')
        >>> variables = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    """
    check_kind("mesh", mesh, Mesh | AbstractMesh, "make one, for example by jax.make_mesh((4, 2), ('data', 'model'))")
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
    """Return the mesh axes by name; the first rule for a name counts."""
    by_name: dict[str, Any] = {}
    for rule in rules if isinstance(rules, Sequence) else (rules,):
        if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[0], str)):
            raise TypeError(
                f"`rules` must be pairs of a name and a mesh axis, got {describe(rule)}; write "
                "for example [('embed', 'data'), *AXIS_RULES]."
            )
        by_name.setdefault(*rule)
    return by_name


def _names(path):
    """Return the names in a path of a tree, without the "value" of a box such as `nn.Partitioned`."""
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    return names[:-1] if names[-1:] == ["value"] else names


def _axes(names, rank):
    """Return the names of the axes of an array, from the names in its path."""
    found = next((_AXES[key] for size in (3, 2, 1) if (key := tuple(names[-size:])) in _AXES), None)
    axes = None if found is None else (None, *found) if "layers" in names else found
    return axes if axes is not None and len(axes) == rank else (None,) * rank
