"""Checks of plain arguments, one for each kind of value: the rule, what was given, and what to do."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np


def is_number(value: Any) -> bool:
    """Return whether a value is a real number of Python or NumPy, but no bool and no traced value."""
    return isinstance(value, numbers.Real | np.integer | np.floating) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or NumPy, but no bool and no traced value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_integer(name: str, value: Any):
    """Raise unless a value is an int."""
    if not is_integer(value):
        raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}.")


def check_count(name: str, value: Any, least: int):
    """Raise unless a value is an int of at least `least`."""
    check_integer(name, value)
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def check_flag(name: str, value: Any):
    """Raise unless a value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}; write bool(...).")


def check_finite(name: str, value: Any) -> float:
    """Return a finite number as a float."""
    _check_number(name, value, "give one that is known before tracing")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}; leave it out for its default.")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Return a positive and finite number as a float."""
    _check_number(name, value, "give one that is known before tracing")
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value}; leave it out for its default.")
    return float(value)


def check_rate(name: str, value: Any) -> float:
    """Return a share of numbers to drop, in ``[0, 1)``, as a float."""
    _check_number(name, value, "0 drops nothing")
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value}; 0 drops nothing.")
    return float(value)


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Make a check that returns None as it is, and takes all else as `check` does."""
    return lambda name, value: None if value is None else check(name, value)


def _check_number(name, value, remedy):
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number, got {value!r}; {remedy}.")
