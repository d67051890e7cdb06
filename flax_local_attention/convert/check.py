"""Reading of arrays of NumPy, JAX and PyTorch, and the check that they are exactly the parameters of a module."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_local_attention.checks import check_kind, describe
from flax_local_attention.convert.infer import advise, infer_model
from flax_local_attention.convert.names import GLOBAL_BRANCH, TABLES, Entry, Side, Weights, sort_by_entry
from flax_local_attention.fields import window_of
from flax_local_attention.layers import LocalMHA
from flax_local_attention.position_bias import DynamicPositionBias
from flax_local_attention.stacking import unstack_layers
from flax_local_attention.transformer import LocalTransformer

THETA = 10000.0  # theta of rotary in the original's modules and in ours

Shape = tuple[int, ...] | None
"""The shape of an array; None if any shape will do."""


def inverse_frequencies(dim_head: int) -> np.ndarray:
    """Return the original's buffer ``inv_freq``: the angle per position of each pair, ``[dim_head / 2]``."""
    return (THETA ** -(np.arange(0, dim_head, 2) / dim_head)).astype(np.float32)


# Arrays


def read_state_dict(state_dict: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """Read the arrays whose names begin with `prefix`; their names lose it."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must map names to arrays, got {describe(state_dict)}; "
            "pass what `safetensors.numpy.load_file` or `module.state_dict()` returns."
        )
    check_prefix(prefix)
    for name in state_dict:
        _check_name(name)
    return {name[len(prefix) :]: to_numpy(name, x) for name, x in state_dict.items() if name.startswith(prefix)}


def check_prefix(prefix: str):
    """Raise unless a prefix is a string."""
    check_kind("prefix", prefix, str, "write 'encoder.', say, or leave it out")


def _check_name(name: Any):
    """Raise unless the name of an entry is a string."""
    if not isinstance(name, str):
        raise TypeError(
            f"`state_dict` must have names of type str, got {describe(name)}; pass the state dict itself, which maps "
            "names to arrays."
        )


def read_variables(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read parameters by path; stacked layers are unstacked."""
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        raise TypeError(
            f"`variables` must be a mapping with 'params' in it, got {describe(variables)}; "
            "pass {'params': params}, as `module.init` returns it."
        )
    params = flatten_dict(nn.meta.unbox(variables["params"]), sep="/")
    named = {path: to_numpy(path, x) for path, x in params.items()}
    if any(path.startswith("layers/") for path in named):
        named: Any = flatten_dict(unstack_layers(unflatten_dict(named, sep="/")), sep="/")
    return named


def to_numpy(name: str, x: Any) -> np.ndarray:
    """Convert an array of NumPy, JAX or PyTorch to NumPy; anything else becomes an array of dtype object."""
    if hasattr(x, "detach") and hasattr(x, "numpy"):
        x = _read_tensor(name, x.detach())
    if isinstance(x, Mapping):
        raise TypeError(
            f"`{name}` must be an array, got {type(x).__name__}; pass the inner mapping of names to arrays."
        )
    return np.asarray(x) if hasattr(x, "__array__") else _wrap(x)


def _read_tensor(name: str, x: Any) -> np.ndarray:
    """Convert a tensor of PyTorch to NumPy."""
    if getattr(x, "is_meta", False):
        raise TypeError(f"`{name}` must hold numbers, got a tensor of the meta device; load its weights first.")
    x = x.cpu()
    try:
        # PyTorch does not convert bfloat16, which NumPy itself lacks; float32 keeps every bit on the way.
        return x.float().numpy().astype(jnp.bfloat16) if str(x.dtype) == "torch.bfloat16" else x.numpy()
    except TypeError as error:  # sparse, or of one of PyTorch's quantised dtypes
        raise TypeError(
            f"`{name}` must be dense and of a dtype that NumPy has, got {x.dtype}: {error}; undo its quantisation "
            "first, or pass `x.to_dense()`."
        ) from error


def _wrap(x: Any) -> np.ndarray:
    """Put an object that is no array into an array of dtype object without axes."""
    wrapped = np.empty((), object)
    wrapped[()] = x
    return wrapped


def check_weight(name: str, x: np.ndarray):
    """Raise unless a weight is an array of a floating dtype."""
    if x.dtype == object and not x.ndim:
        raise TypeError(f"`{name}` must be an array, got {type(x.item()).__name__}; give the weight itself.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be of a floating dtype, got {x.dtype}; undo its quantisation first.")


# Modules


def kind_of(module: Any) -> type[nn.Module]:
    """Return which of the original's modules a module is."""
    for kind in TABLES:
        if isinstance(module, kind):
            _check_fields(module)
            return kind
    raise TypeError(
        f"`module` must be one of {', '.join(kind.__name__ for kind in TABLES)}, got {describe(module)}; "
        "convert the parts of a larger model one by one, with `prefix`."
    )


def _check_fields(module):
    """Raise if a module has fields that change its results, that the original lacks and that weights do not show."""
    for name in ("rotary", "scale"):
        value = getattr(module, name, None)
        if value is not None:
            raise ValueError(
                f"`module` must have `{name}=None`, got {value}, which the original cannot have; convert with "
                f"`module.clone({name}=None)` if the weights are of a model without it."
            )


def has_rotary(module: Any) -> bool:
    """Return whether the original's module has rotary position embedding, and so the buffers of it."""
    if isinstance(module, LocalTransformer):
        return not module.use_dynamic_pos_bias
    return isinstance(module, LocalMHA) and module.use_rotary_pos_emb


def looks_forward(module: Any) -> bool:
    """Return whether some window of a module looks forward with rotary."""
    if not has_rotary(module):
        return False
    sizes = module.window_sizes() if isinstance(module, LocalTransformer) else (module.window_size,)
    windows = [window_of(module, size) for size in sizes]
    return any(window.forward for window in windows if not window.is_global)


def check_reference_rotary(module: Any):
    """Raise if a module rotates queries by other angles than the original does."""
    if looks_forward(module) and not module.reference_rotary:
        raise ValueError(
            "`module` must have `reference_rotary=True` where it looks forward with rotary, got False: the weights "
            "have learned the original's angles, which are wrong; set it. To continue training with the right angles, "
            "apply the converted variables with `module.clone(reference_rotary=False)`."
        )


def _abstract_params(module: Any) -> dict[str, np.ndarray]:
    """Return a module's parameters, by path, as zeros that take no memory."""
    if isinstance(module, LocalTransformer):
        module = module.clone(scan_layers=False)  # the tables name each layer
    if isinstance(module, DynamicPositionBias):
        inputs = 1, 1
    elif getattr(module, "num_tokens", None) is not None:
        inputs = (jnp.zeros((1, 1), jnp.int32),)
    else:
        inputs = (jnp.zeros((1, 1, module.dim)),)
    variables: Any = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    params: Any = flatten_dict(nn.meta.unbox(variables["params"]), sep="/")
    return {path: np.broadcast_to(np.float32(0), x.shape) for path, x in params.items()}


# Comparison


def check_weights(kind: type[nn.Module], named: Mapping[str, np.ndarray], side: Side, module: Any) -> Weights:
    """Sort arrays by their entries; raise unless they are exactly those of a module.

    Args:
        kind: Kind of the module.
        named: Arrays by name.
        side: Whose names these are.
        module: Module of ours that the arrays must fit. None: they must fit each other.
    """
    weights = sort_by_entry(kind, named, side)
    for entry, x in weights.entries.items():
        check_weight(getattr(entry, side), x)
    problems = dict.fromkeys(_find_problems(kind, weights, side, module))
    if problems:
        what = "variables" if side == "ours" else "state_dict"
        arguments = "" if module is None else "with the module's arguments, "
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(
            f"`{what}` must have all entries of a {kind.__name__} of the original, {arguments}and no others, got\n"
            f"{lines}\nwhat to do: {advise(kind, named, side)}."
        )
    return weights


def _find_problems(kind: type[nn.Module], weights: Weights, side: Side, module: Any) -> Iterator[str]:
    """Yield a line for each problem; some may be repeated."""
    inferred = infer_model(weights)
    given = _by_name({entry: x.shape for entry, x in weights.entries.items()}, weights.branches, side)
    given |= {name: x.shape for name, x in weights.unknown.items()}
    # Buffers may be missing.
    entries = [entry for entry in inferred.entries(kind) if entry.ours or entry in weights.entries]
    expected = {entry: inferred.shape(entry) for entry in entries}
    if module is not None:
        for name, value in inferred.contradictions(kind, vars(module)):
            yield f"argument: `{name}` is {value} by the weights, {getattr(module, name)} in the module"
        own = sort_by_entry(kind, _abstract_params(module), "ours")
        yield from (f"without a counterpart: {path} {list(x.shape)}" for path, x in own.unknown.items())
        shapes = {entry: shape for entry, shape in expected.items() if has_rotary(module) and not entry.ours}
        shapes |= {entry: x.shape for entry, x in own.entries.items()}
        yield from _compare(given, _by_name(shapes, own.branches, side))
    if module is None or side == "ours":  # our parameters must also be possible in the original
        branches = [layer for layer in weights.branches if layer in inferred.global_layers]
        yield from _compare(given, _by_name(expected, branches, side))
    for entry, x in weights.entries.items():
        if not entry.ours and x.ndim == 1 and not _is_inverse_frequencies(x):
            yield f"not of theta 10000: {getattr(entry, side)}"


def _by_name(entries: Mapping[Entry, Shape], branches: Iterable[int], side: Side) -> dict[str, Shape]:
    """Return shapes by name, in one side's layout; an inserted layer has one name for all its weights, and no shape."""
    shapes = {
        getattr(entry, side): shape[::-1] if shape and side == "ours" and entry.transposed else shape
        for entry, shape in entries.items()
        if getattr(entry, side)
    }
    return shapes | {f"{GLOBAL_BRANCH[side].format(layer)}*": None for layer in branches}


def _compare(given: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Iterator[str]:
    """Yield a line for each entry that is missing, surplus or misshapen."""
    for name, shape in wanted.items():
        if name not in given:
            yield f"missing: {name}{_show(shape)}"
        elif shape is not None and given[name] != shape:
            yield f"misshapen: {name}{_show(given[name])}, not{_show(shape)}"
    for name, shape in given.items():
        if name not in wanted:
            yield f"surplus: {name}{_show(shape)}"


def _show(shape: Shape) -> str:
    return "" if shape is None else f" {list(shape)}"


def _is_inverse_frequencies(x: np.ndarray) -> bool:
    """Return whether a buffer has the inverse frequencies of theta 10000, within the precision of its dtype."""
    wanted = inverse_frequencies(2 * x.size)
    precision = max(1e-5, float(jnp.finfo(x.dtype).eps))
    return bool(np.allclose(x.astype(np.float32), wanted, rtol=precision, atol=1e-7))
