"""Mapping of published weights to the parameters of the recipes, by name.

    from safetensors.numpy import load_file

    variables = load(model, parameters(load_file("model.safetensors")))

Merge a checkpoint in several files into one mapping: ``load_file(first) | load_file(second)``.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype


def parameters(tensors: Mapping[str, np.ndarray], *, norm_offset: float = 0.0, dtype: Dtype = np.float32) -> dict:
    """Map published tensors to parameters.

    ``model.layers.3.mlp.up_proj.weight`` becomes ``layers_3/mlp/up_proj/kernel``, transposed: PyTorch has
    ``[out, in]``, Flax ``[in, out]``. Attention weights become parameters of `LocalMHA`.

    Args:
        tensors: Published names to arrays.
        norm_offset: Added to the scales of norms: 1 for models that multiply by ``1 + weight``.
        dtype: Dtype of the parameters. With `jnp.bfloat16` they take half the memory and the model computes in it.

    Returns:
        The tree of parameters.
    """
    flat = dict(_rename(name, np.asarray(x, np.float32), norm_offset) for name, x in tensors.items())
    tree = unflatten_dict(flat)
    for layer in tree.values():
        if "self_attn" in layer:
            layer["self_attn"] = _attention(layer["self_attn"])
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def load(model: nn.Module, params: dict, *inputs: jax.Array) -> dict:
    """Return the variables of a model after checking that the parameters have its names and shapes.

    Args:
        model: The model.
        params: Its parameters, from `parameters`.
        *inputs: Inputs of a call of the model, to infer the shapes; without any, one token.

    Returns:
        The variables, ``{"params": params}``.

    Raises:
        ValueError: Names or shapes differ from the model's.
    """
    wanted = jax.eval_shape(model.init, jax.random.key(0), *(inputs or [jnp.zeros((1, 1), int)]))["params"]
    expected, given = ({"/".join(path): x.shape for path, x in flatten_dict(tree).items()} for tree in (wanted, params))
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if wrong:
        shown = ", ".join(f"{name} {given.get(name)} in place of {expected.get(name)}" for name in wrong[:4])
        raise ValueError(
            f"`params` must have the model's names and shapes, got {len(wrong)} that differ: {shown}; build the model "
            "with the checkpoint's configuration."
        )
    return {"params": params}


def _rename(name, x, norm_offset):
    """Return the path and the value of a published tensor in Flax's conventions."""
    *path, kind = re.sub(r"\.(\d+)\.", r"_\1.", name.removeprefix("model.")).split(".")
    if kind != "weight":
        return (*path, kind), x
    if "embed" in path[-1]:
        return (*path, "embedding"), x
    return ((*path, "kernel"), x.T) if x.ndim == 2 else ((*path, "scale"), x + norm_offset)


def _attention(published):
    """Map published attention parameters to those of `LocalMHA`, which projects q, k and v, in this order, at once.

    Published norms divide q and k by their root mean square; `LocalMHA` divides by their Euclidean norm, which is
    ``dim_head ** 0.5`` times that. The scales absorb the factor.
    """
    separate = [published[name] for name in ("q_proj", "k_proj", "v_proj") if name in published]
    qkv = jax.tree.map(lambda *parts: np.concatenate(parts, -1), *separate) if separate else published["qkv_proj"]
    own = {"to_qkv": qkv, "to_out": published["o_proj"]}
    for norm, scale in (("q_norm", "q_scale"), ("k_norm", "k_scale")):
        if norm in published:
            own[scale] = published[norm]["scale"] * published[norm]["scale"].size ** 0.5
    return own | {name: published[name] for name in ("sinks",) if name in published}
