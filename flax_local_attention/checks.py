"""Checks of plain arguments, one for each kind of value: the rule, what was given, and what to do."""

import numbers
from typing import Any

import numpy as np


def is_number(value: Any) -> bool:
    """Whether a value is a real number known now: of Python or NumPy, but no bool."""
    return isinstance(value, numbers.Real | np.integer | np.floating) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether a value is an integer known now: of Python or NumPy, but no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int):
    """Raise unless a value is an int, and at least `least`."""
    if not is_integer(value):
        raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def check_flag(name: str, value: Any):
    """Raise unless a value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r} of type {type(value).__name__}.")


def check_rate(name: str, value: Any) -> float:
    """Return a share of numbers to drop, in ``[0, 1)``, as a float."""
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number, got {value!r}; 0 drops nothing.")
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value}; 0 drops nothing.")
    return float(value)
