"""Checks of arguments; each error states the rule, what was given, and what to do."""

import math
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any

import numpy as np


def describe(value: Any) -> str:
    """Describe a wrong value for an error message."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # an array, traced or not
        return f"an array {value.dtype}{list(value.shape)}"
    text = repr(value)
    return f"{text if len(text) < 100 else f'{text[:97]}...'} of type {type(value).__name__}"


def is_number(value: Any) -> bool:
    """Return whether a value is a real number of Python or NumPy, neither a bool nor traced."""
    return isinstance(value, numbers.Real | np.integer | np.floating) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or NumPy, neither a bool nor traced."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_integer(name: str, value: Any):
    """Raise unless a value is an integer of Python or NumPy."""
    if not is_integer(value):
        raise TypeError(f"`{name}` must be an int, got {describe(value)}; give a whole number.")


def check_count(name: str, value: Any, least: int):
    """Raise unless a value is an int of at least `least`."""
    check_integer(name, value)
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}; give a larger one.")


def check_flag(name: str, value: Any):
    """Raise unless a value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {describe(value)}; write bool(...).")


def check_number(name: str, value: Any):
    """Raise unless a value is a real number that is known before tracing."""
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number, got {describe(value)}; give one that is known before tracing.")


def check_finite(name: str, value: Any) -> float:
    """Return a number as a float; raise unless it is finite."""
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}; leave it out for its default.")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Return a number as a float; raise unless it is positive and finite."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value}; leave it out for its default.")
    return float(value)


def check_rate(name: str, value: Any) -> float:
    """Return a dropout rate as a float; raise unless it is in ``[0, 1)``."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value}; 0 drops nothing.")
    return float(value)


def check_function(name: str, value: Any):
    """Raise unless a value is callable."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, got {describe(value)}; give one, or leave it out.")


def check_kind(name: str, value: Any, kind: type | types.UnionType, remedy: str):
    """Raise unless a value is an instance of a class, or of a union of classes; `remedy` says how to get one."""
    if not isinstance(value, kind):
        kinds: Any = typing.get_args(kind) or (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise TypeError(f"`{name}` must be a {wanted}, got {describe(value)}; {remedy}.")


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Make a check that accepts None, and otherwise does what `check` does."""
    return lambda name, value: None if value is None else check(name, value)


def at_least(least: int) -> Callable[[str, Any], None]:
    """Make a check that a value is an integer of at least `least`."""
    return lambda name, value: check_count(name, value, least)
