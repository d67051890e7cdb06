"""Checks of arguments, one for each kind of value: the rule, what was given, and what to do."""

import math
import numbers
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

import numpy as np


def describe(value: Any) -> str:
    """Say in a few words what was given in place of a value that was wanted."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # an array, traced or not
        return f"an array {value.dtype}{list(value.shape)}"
    text = repr(value)
    return f"{text if len(text) < 100 else f'{text[:97]}...'} of type {type(value).__name__}"


def is_number(value: Any) -> bool:
    """Return whether a value is a real number of Python or NumPy, but no bool and no traced value."""
    return isinstance(value, numbers.Real | np.integer | np.floating) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or NumPy, but no bool and no traced value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_integer(name: str, value: Any):
    """Raise unless a value is an int."""
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
    """Return a finite number as a float."""
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}; leave it out for its default.")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Return a positive and finite number as a float."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value}; leave it out for its default.")
    return float(value)


def check_rate(name: str, value: Any) -> float:
    """Return a share of numbers to drop, in ``[0, 1)``, as a float."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value}; 0 drops nothing.")
    return float(value)


def check_choice(name: str, value: Any, choices: Collection[Any]):
    """Raise unless a value is one of a few."""
    if not isinstance(value, str) or value not in choices:
        wanted = " or ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be {wanted}, got {describe(value)}; choose one of them.")


def check_function(name: str, value: Any):
    """Raise unless a value can be called."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, got {describe(value)}; give one, or leave it out.")


def check_kind(name: str, value: Any, kind: type | types.UnionType, remedy: str):
    """Raise unless a value is of a class, or of one of a union; the remedy says how to come by one."""
    if not isinstance(value, kind):
        kinds: Any = typing.get_args(kind) or (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise TypeError(f"`{name}` must be a {wanted}, got {describe(value)}; {remedy}.")


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Make a check that returns None as it is, and takes all else as `check` does."""
    return lambda name, value: None if value is None else check(name, value)


def at_least(least: int) -> Callable[[str, Any], None]:
    """Make a check of a count."""
    return lambda name, value: check_count(name, value, least)
