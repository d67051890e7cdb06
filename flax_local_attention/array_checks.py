"""Checks of arrays, dtypes, precisions and random keys."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flax_local_attention.checks import describe


def is_array(value: Any) -> bool:
    """Return whether a value is an array of JAX or NumPy, traced or not."""
    return isinstance(value, jax.Array | np.ndarray)


def to_number(value: Any) -> Any:
    """Return the number in a scalar array; return traced arrays and other values unchanged."""
    is_known = is_array(value) and not isinstance(value, Tracer)
    return value.item() if is_known and value.ndim == 0 else value


def check_dtype(name: str, value: Any):
    """Raise unless a value is a floating dtype, or its name."""
    if not is_floating_dtype(value):
        raise TypeError(f"`{name}` must be a floating dtype, got {describe(value)}; write for example jnp.bfloat16.")


def is_floating_dtype(value: Any) -> bool:
    """Return whether a value is a floating dtype, or its name."""
    try:
        return value is not None and bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except (TypeError, ValueError):
        return False


def check_precision(name: str, value: Any):
    """Raise unless a value is a valid precision of matrix products."""
    try:
        _try_precision(tuple(value) if isinstance(value, list) else value)
    except (TypeError, ValueError):
        raise ValueError(
            f"`{name}` must be a precision of `jax.lax.dot`, got {describe(value)}; write for example 'highest', "
            "jax.lax.Precision.HIGHEST or None."
        ) from None


@functools.cache
def _try_precision(value):
    x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    jax.eval_shape(functools.partial(jax.lax.dot, precision=value), x, x)


def check_array(name: str, x: Any):
    """Raise unless x is an array of JAX or NumPy, traced or not."""
    if not is_array(x):
        raise TypeError(f"`{name}` must be an array, got {describe(x)}; pass it through jnp.asarray.")


def check_floating(name: str, x: Any):
    """Raise unless x is an array of a floating dtype."""
    _check_dtype_of(name, x, (jnp.floating,), "of a floating dtype", "cast it, for example to float32")


def check_real(name: str, x: Any, remedy: str):
    """Raise unless x is an array of integers or of a floating dtype; `remedy` says what to do."""
    _check_dtype_of(name, x, (jnp.floating, jnp.integer), "of real numbers", remedy)


def check_integers(name: str, x: Any, remedy: str):
    """Raise unless x is an array of integers; `remedy` says what to do, or what the integers are."""
    _check_dtype_of(name, x, (jnp.integer,), "integers", remedy)


def check_mask(name: str, x: Any, meaning: str = "True where a key may be seen"):
    """Raise unless x is an array of bool; `meaning` says where it is True."""
    _check_dtype_of(name, x, (jnp.bool_,), f"bool, {meaning}", "compare it with 0")


def _check_dtype_of(name, x, kinds, wanted, remedy):
    check_array(name, x)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        raise TypeError(f"`{name}` must be {wanted}, got {x.dtype}; {remedy}.")


def check_key(name: str, key: Any):
    """Raise unless a value is one random key, typed or raw."""
    is_typed = is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_raw = is_array(key) and key.dtype == jnp.uint32
    if not ((is_typed and key.ndim == 0) or (is_raw and key.ndim == 1)):
        raise TypeError(f"`{name}` must be a random key, got {describe(key)}; pass for example jax.random.key(0).")
