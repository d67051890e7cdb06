"""Conversion of weights from the PyTorch original to our parameters and back. It does not need PyTorch.

`names` pairs the parameter names of both sides, `infer` infers a model from its weights, and `check` reads arrays and
reports what is wrong with them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_local_attention.checks import check_function, optional
from flax_local_attention.convert.check import (
    check_prefix,
    check_reference_rotary,
    check_weight,
    check_weights,
    has_rotary,
    inverse_frequencies,
    kind_of,
    looks_forward,
    read_state_dict,
    read_variables,
    to_numpy,
)
from flax_local_attention.convert.infer import Inferred, infer_fields, infer_kind, infer_model, infer_side
from flax_local_attention.convert.names import GLOBAL_BRANCH, Side
from flax_local_attention.stacking import stack_layers
from flax_local_attention.transformer import LocalTransformer

__all__ = ["GlobalBranch", "from_torch", "inverse_frequencies", "model_from_torch", "to_torch"]

GlobalBranch = Callable[[int, Mapping[str, Any]], Mapping[str, Any]]
"""A function that converts an inserted global layer to the other side.

Its arguments are the number of the layer, from 0, and the layer's weights by name. It returns the weights by the names
of the other side.
"""


def from_torch(
    state_dict: Mapping[str, Any],
    module: nn.Module | None = None,
    *,
    prefix: str = "",
    global_branch: GlobalBranch | None = None,
) -> dict[str, Any]:
    """Convert a state dict of the original to variables of ours.

    The original is ``local-attention`` 1.11.2, with its modules `LocalTransformer`, `LocalMHA`, `FeedForward` and
    `DynamicPositionBias`. Read a ``.safetensors`` file with ``safetensors.numpy.load_file(path)``. A pickled ``.pt``
    file can run any code when it is opened; ``torch.load(path, map_location="cpu", weights_only=True)`` refuses that.

    Weights of versions 1.5.7 to 1.10 load too. Their names have no ``branch``, and their model has
    ``num_residual_streams=1``. The variables compute what 1.11.2 computes from the same weights; so do all versions
    from 1.8.5 on. Older ones differ in three ways:

    * Before 1.8.5, the first windows saw padding in sequences of whole windows.
    * Before 1.8.5, ``causal=False`` turned exact windows into plain ones: set ``exact_windowsize=False``.
    * Before 1.7.2, rotary in a window that looks forward used the right angles, see Raises.

    Args:
        state_dict: Names to arrays of NumPy, JAX or PyTorch. Weights are of a floating dtype. Remove anything else that
            a checkpoint holds, such as a step count: surplus entries are an error.
        module: Module of ours that the variables are for; the weights are checked against it. None infers the kind of
            module from the names, and checks the weights only against each other.
        prefix: Convert only the entries whose names begin with it, and remove it from their names: ``"module."`` for a
            model that was wrapped, ``"encoder."`` for a part of a larger one.
        global_branch: Function that converts an inserted global layer: from the number of the layer (from 0) and its
            weights, by their names in it, to the parameters of our module.

    Returns:
        ``{"params": ...}`` with NumPy arrays, copies in the dtypes that were given. Put them on a device with
        ``jax.device_put``. The buffers ``inv_freq`` are checked and left out. Layers are stacked if `module` has
        `scan_layers=True`.

    Raises:
        TypeError: An argument or a value in the state dict is of the wrong type.
        ValueError: Entries are missing, surplus or misshapen (the message lists all of them), or the module is not the
            one that the weights were trained in. A module that looks forward with rotary needs
            ``reference_rotary=True``: the original rotates queries by wrong angles, and its weights have learned them.
            To continue training with the right angles, or for weights of a version before 1.7.2, convert with
            ``reference_rotary=True`` and then apply the variables with ``module.clone(reference_rotary=False)``.

    Examples:
        >>> shapes = {"0.weight": (4,), "0.bias": (4,), "1.weight": (20, 4), "4.weight": (4, 10)}
        >>> state_dict = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        >>> variables = from_torch(state_dict, FeedForward(dim=4))
        >>> variables["params"]["to_hidden"]["kernel"].shape
        (4, 20)
        >>> sorted(to_torch(variables)) == sorted(state_dict)
        True
    """
    optional(check_function)("global_branch", global_branch)
    named = read_state_dict(state_dict, prefix)
    side = infer_side(named)
    kind = infer_kind(named, side) if module is None else kind_of(module)
    check_reference_rotary(module)
    weights = check_weights(kind, named, side, module)
    params = {entry.ours: x.T if entry.transposed else x for entry, x in weights.entries.items() if entry.ours}
    params |= _convert_branches(weights.branches, "ours", global_branch)
    params = {path: _copy(x) for path, x in params.items()}
    variables = {"params": unflatten_dict(params, sep="/")}
    return stack_layers(variables) if getattr(module, "scan_layers", False) else variables


def to_torch(
    variables: Mapping[str, Any],
    module: nn.Module | None = None,
    *,
    prefix: str = "",
    global_branch: GlobalBranch | None = None,
) -> dict[str, np.ndarray]:
    """Convert variables of ours to a state dict of the original.

    Load it with ``torch_module.load_state_dict({k: torch.from_numpy(x) for k, x in state_dict.items()})``. PyTorch
    cannot read bfloat16 from NumPy: use ``torch.from_numpy(x.astype(np.float32)).bfloat16()``. A module that looks
    forward with rotary computes the same in both only if it has ``reference_rotary=True`` here.

    Args:
        variables: ``{"params": ...}`` of one of the modules that `from_torch` names, layers stacked or not.
        module: Module of these variables. If it is given, the parameters are checked against it and the buffers
            ``inv_freq`` are written, so that a strict load finds every name.
        prefix: Prefix to put before every name.
        global_branch: Function that converts an inserted global layer: from the number of the layer (from 0) and our
            parameters to weights by their names in the original's layer.

    Returns:
        Names to NumPy arrays, copies in the dtypes of the parameters.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Parameters are missing, misshapen or have no counterpart in the original, such as grouped heads and
            attention sinks; the message lists all of them.
    """
    check_prefix(prefix)
    optional(check_function)("global_branch", global_branch)
    named = read_variables(variables)
    kind = infer_kind(named, "ours") if module is None else kind_of(module)
    weights = check_weights(kind, named, "ours", module)
    arrays = {entry.theirs: x for entry, x in weights.entries.items()}
    if module is not None and has_rotary(module):
        buffers = (entry for entry in infer_model(weights).entries(kind) if not entry.ours)
        arrays |= {entry.theirs: inverse_frequencies(module.dim_head) for entry in buffers}
    arrays |= _convert_branches(weights.branches, "theirs", global_branch)
    return {prefix + name: _copy(x) for name, x in arrays.items()}


def model_from_torch(
    state_dict: Mapping[str, Any],
    *,
    local_attn_window_size: int | Sequence[int | None] | None = None,
    heads: int | None = None,
    dim_head: int | None = None,
    global_attn_layer: Callable[[int], nn.Module] | None = None,
    prefix: str = "",
    **fields: Any,
) -> LocalTransformer:
    """Build the `LocalTransformer` whose weights a state dict of the original holds.

    Sizes, depth, residual streams, gates, `qk_rmsnorm` and dynamic bias are inferred from the weights, of any version
    that `from_torch` converts. `reference_rotary` is set where the model looks forward with rotary. The arguments are
    what weights cannot show; give the values that the model was built with. The window size is always needed. `heads`
    or `dim_head` is needed unless gates, a dynamic bias, `qk_rmsnorm` or the buffers ``inv_freq`` show it.

    Args:
        state_dict: As in `from_torch`. Convert it afterwards with ``from_torch(state_dict, model)``.
        local_attn_window_size: Tokens in a window, or one number a layer as in `LocalTransformer`.
        heads: Number of heads.
        dim_head: Width of a head.
        global_attn_layer: As in `LocalTransformer`; needed where the weights have inserted layers.
        prefix: As in `from_torch`.
        **fields: Any other fields of `LocalTransformer`. Weights do not show `causal`, `look_backward`, `look_forward`,
            `exact_windowsize`, `use_xpos`, `xpos_scale_base`, `qk_scale`, `shared_qk` and `ignore_index`; their
            defaults are the original's. Nor do weights show fields that do not change what a model computes from
            them, such as `attn_dropout`, `scan_layers` and `dtype`, which can also be set later:
            ``model.clone(dtype=jnp.bfloat16)``. Fields that weights do show may be given, and are then checked
            against them.

    Returns:
        The model, without variables. A model without tokens gets a `max_seq_len` of 0, which limits nothing.

    Raises:
        TypeError: A value in the state dict is of the wrong type, or there is no such field.
        ValueError: The weights are incomplete or contradict each other or an argument, or an argument that they do not
            show is missing.
    """
    named = read_state_dict(state_dict, prefix)
    side = infer_side(named)
    inferred = infer_model(check_weights(LocalTransformer, named, side, None))
    given = {"local_attn_window_size": local_attn_window_size, "heads": heads, "dim_head": dim_head}
    given["global_attn_layer"] = global_attn_layer
    fields |= {name: value for name, value in given.items() if value is not None}
    _check_given(fields, inferred)
    model = LocalTransformer(**infer_fields(inferred, fields))
    model = model.clone(reference_rotary=fields.get("reference_rotary", looks_forward(model)))
    check_weights(LocalTransformer, named, side, model)
    return model


def _check_given(fields: Mapping[str, Any], inferred: Inferred):
    """Raise if an argument that weights cannot show is missing, or if one contradicts the weights."""
    missing = [] if "local_attn_window_size" in fields else ["`local_attn_window_size`"]
    if not {"heads", "dim_head"} & {*fields, *inferred.sizes}:
        missing.append("`heads` or `dim_head`")
    if inferred.global_layers and "global_attn_layer" not in fields:
        missing.append(f"`global_attn_layer` (for the layers {inferred.global_layers}, from 0)")
    if missing:
        raise ValueError(
            f"`fields` that the weights do not show must be given, got no {' and no '.join(missing)}; pass those that "
            "the model was built with (the original's defaults are a window of 512, and 8 heads of 64)."
        )
    for name, value in inferred.contradictions(LocalTransformer, fields):
        raise ValueError(
            f"`{name}` must be that of the weights, {value}, got {fields[name]}; correct it or leave it out."
        )
    if "global_attn_layer" in fields and not inferred.global_layers:
        raise ValueError(
            "`global_attn_layer` needs weights of inserted layers, got a state dict without them; leave it out. If the "
            "layers have no weights, use `model.clone(global_attn_layer=...)`."
        )


def _convert_branches(branches: Mapping[int, dict], side: Side, global_branch: GlobalBranch | None) -> dict[str, Any]:
    """Convert the weights of inserted global layers to one side, by their full names on that side."""
    arrays = {}
    for layer, branch in branches.items():
        if global_branch is None:
            raise ValueError(
                "`global_branch` must be given where global layers are inserted, got None; pass a function from the "
                "number of the layer and its weights to the same weights under the other side's names."
            )
        if side == "ours":
            converted = flatten_dict(global_branch(layer, branch), sep="/")
        else:
            converted = global_branch(layer, unflatten_dict(branch, sep="/"))
        named = {GLOBAL_BRANCH[side].format(layer) + name: x for name, x in converted.items()}
        arrays |= {name: to_numpy(name, x) for name, x in named.items()}
    for name, x in arrays.items():
        check_weight(name, x)
    return arrays


def _copy(x: np.ndarray) -> np.ndarray:
    """Copy an array to its own memory in C order, as files and other libraries need it."""
    return np.array(x, order="C")
