"""Wrong calls generated from public signatures: for each argument, values that its annotation rules out."""

import collections.abc
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST = 10
"""Wrong values per argument of a `Door`."""


class Thing:
    """An object that no argument accepts."""

    def __repr__(self):
        return "Thing()"


VALUES = {
    "none": None,
    "true": True,
    "zero": 0,
    "minus": -1,
    "fraction": 1.5,
    "nan": float("nan"),
    "word": "no such word",
    "thing": Thing(),
    "class": Thing,
    "list": [1.5, "x"],
    "mapping": {"no": "such"},
    "array": np.array([0.5, 2.5]),
}
"""Values to try for any argument, by name."""

NUMBERS = ("zero", "minus", "fraction", "nan")
DATA = (jax.Array, np.ndarray)

RIGHT = {
    type(None): ("none",),
    bool: ("true",),
    int: (),
    float: ("fraction",),
    str: (),
    jax.Array: (),
    np.ndarray: (),
    collections.abc.Callable: ("class",),
    typing.Any: tuple(VALUES),
}
"""Values that a type accepts; `zero` and `minus` are wrong unless `Door.takes` allows them."""


@dataclasses.dataclass(frozen=True)
class Door:
    """A public function, class or method with a correct call.

    Attributes:
        name: Name in a test's id.
        call: The function to call.
        right: Arguments of a correct call.
        takes: Names in `VALUES`, or of changes of arrays, that an argument accepts besides its annotation.
        of: Object with the signature, if `call` lacks it.
        says: What a message may name instead of the argument.
        without: Arguments that other tests cover.
    """

    name: str
    call: Callable[..., Any]
    right: dict[str, Any]
    takes: dict[str, str] = dataclasses.field(default_factory=dict)
    of: Callable[..., Any] | None = None
    says: dict[str, str] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    def arguments(self) -> Iterator[inspect.Parameter]:
        """Yield the parameters of the signature."""
        for name, parameter in inspect.signature(self.of or self.call, eval_str=True).parameters.items():
            is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if is_named and name not in ("self", "parent", "name", *self.without):
                yield parameter

    def wrong(self, parameter: inspect.Parameter) -> dict[str, Any]:
        """Return wrong values for an argument, by name."""
        kinds = _kinds(parameter.annotation)
        takes = {value for kind in kinds for value in RIGHT.get(kind, ())} | set(
            self.takes.get(parameter.name, "").split()
        )
        right = self.right.get(parameter.name, parameter.default)
        changes = _changes(right) if kinds & set(DATA) and isinstance(right, DATA) else {}
        values = changes | {name: value for name, value in VALUES.items() if not _is_taken(name, value, kinds)}
        kept = {name: value for name, value in values.items() if name not in takes}
        return dict(list(kept.items())[:MOST])


def _is_taken(name, value, kinds):
    """Return whether an annotation names the type of a value."""
    return name not in NUMBERS and any(inspect.isclass(kind) and type(value) is kind for kind in kinds)


def _kinds(annotation) -> set[Any]:
    """Return the types that an annotation accepts; a callable protocol counts as a function."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = set().union(*map(_kinds, typing.get_args(annotation)))
        return kinds - {typing.Any, type, str} if np.dtype in kinds else kinds  # Flax annotates a dtype as Any
    origin = typing.get_origin(annotation) or annotation
    return {type(None) if origin is None else origin}


def _changes(x) -> dict[str, Any]:
    """Return arrays that differ from a correct one in dtype or shape, and its numbers as lists."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return {}
    dtypes = {"floats": jnp.float32, "integers": jnp.int32, "bools": jnp.bool_, "complex": jnp.complex64}
    kinds = {"floats": jnp.floating, "integers": jnp.integer, "bools": jnp.bool_, "complex": jnp.complexfloating}
    changes = {"lists": np.asarray(x).tolist()} if x.ndim else {}
    changes |= {name: x.astype(dtypes[name]) for name in dtypes if not jnp.issubdtype(x.dtype, kinds[name])}
    changes["more_axes"] = x[(None,) * 3]
    if x.ndim:
        changes["fewer_axes"] = x[0]
        changes["longer"] = jnp.concatenate([x, x, x], axis=-1)
        changes["more_rows"] = jnp.concatenate([x, x, x], axis=0)
    return changes


CLEAR = re.compile(r"`[^`]+`.*\bgot\b.*[;:] .+\.$", re.DOTALL)
"""The three parts of a message: the rule with an argument in backticks, what was given, and what to do."""


def what_is_unclear(door: Door, argument: str, call: Callable[[], Any]) -> str | None:
    """Return what is wrong with the error of a wrong call; None if it is clear."""
    try:
        call()
    except (TypeError, ValueError, NotImplementedError) as error:
        message = str(error)
        if not CLEAR.search(message):
            return f"{type(error).__name__}: {message[:300]}"
        named = door.says.get(argument, argument).split("|")
        return None if any(re.search(rf"`[^`]*\b{name}\b", message) for name in named) else f"names another: {message}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "accepted"


def calls_of(door: Door, parameter: inspect.Parameter) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield wrong calls as pairs (name, call): concrete, and also traced if an argument is an array."""
    for name, value in door.wrong(parameter).items():
        given = door.right | {parameter.name: value}
        yield name, lambda given=given: door.call(**given)
        traced = {key: x for key, x in given.items() if isinstance(x, jax.Array)}
        if isinstance(value, jax.Array) and door.takes.get("traced") != "none":
            rest = {key: x for key, x in given.items() if key not in traced}
            yield (
                f"{name}_traced",
                lambda traced=traced, rest=rest: jax.eval_shape(lambda traced: door.call(**traced, **rest), traced),
            )
