"""`AttentionOptions`: everything in a call of attention that is not an array, as one value."""

import contextlib
import dataclasses
import json
from typing import Any

import jax

from flax_local_attention.array_checks import check_precision, to_number
from flax_local_attention.checks import (
    check_finite,
    check_flag,
    check_kind,
    check_positive,
    check_rate,
    describe,
    is_number,
    optional,
)
from flax_local_attention.rotary import Rotary
from flax_local_attention.window import Window


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Options of attention, checked when made.

    They are hashable, so jitted functions can take them as a static argument. `attend` takes them besides the arrays of
    a call, `KVCache` keeps them, and `attention_fn` is made from them.

    Args:
        window: Which keys a query sees.
        rotary: Rotary position embedding of queries and keys. None means none. A missing `scale_base` of xPos is
            filled in, see `Rotary.for_window`.
        scale: Factor of the scores, a number. None means ``d ** -0.5``. A traced scale is an array of the call, see
            `local_attention`.
        shared_qk: Whether queries double as keys (Reformer). Keys are then L2-normalised, and a token sees itself only
            if it sees nothing else.
        logits_soft_cap: Bound of the scaled scores, ``cap tanh(score / cap)``, before a bias. None means no bound.
        dropout_rate: Share of probabilities to drop, in ``[0, 1)``. It acts only in calls with a `dropout_rng`, so
            training and decoding can share options.
        precision: Precision of the matrix products, as in `jax.numpy.einsum`.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or rotary does not fit the window.

    Examples:
        >>> options = AttentionOptions(Window.sliding(4096), rotary=Rotary(64), scale=1.0)
        >>> options == AttentionOptions(Window.sliding(4096), rotary=Rotary(64), scale=1)
        True
    """

    window: Window
    rotary: Rotary | None = None
    scale: float | None = None
    shared_qk: bool = False
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self):
        check_kind("window", self.window, Window, "write for example `Window(512, causal=True)`")
        _check_equality("window", self.window, Window)
        self._set("rotary", _fill_rotary(self.rotary, self.window))
        self._set_number("scale", optional(_check_scale))
        check_flag("shared_qk", self.shared_qk)
        self._set_number("logits_soft_cap", optional(check_positive))
        self._set_number("dropout_rate", check_rate)
        self._set("precision", _hashable_precision(self.precision))
        check_precision("precision", self.precision)

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def _set_number(self, name, check):
        """Check a field and turn it into a Python float."""
        self._set(name, check(name, to_number(getattr(self, name))))

    @classmethod
    def of(cls, options: "AttentionOptions | Window | None") -> "AttentionOptions":
        """Return options unchanged; make a window into options with defaults for everything else.

        Args:
            options: Options or a window.

        Raises:
            TypeError: `options` is neither.
        """
        if isinstance(options, cls):
            return options
        if isinstance(options, Window):
            return cls(options)
        raise TypeError(
            f"`options` must be AttentionOptions or a Window, got {describe(options)}; write "
            "for example `AttentionOptions(Window(512, causal=True))`."
        )


def options_to_json(options: AttentionOptions) -> str:
    """Write options as JSON, for the cache of an exported program; `options_from_json` reads them.

    Raises:
        TypeError: The window or rotary is of a subclass, which would be read back as the base class.
    """
    for name, value, plain in (("window", options.window, Window), ("rotary", options.rotary, Rotary)):
        if value is not None and type(value) is not plain:
            raise TypeError(
                f"`{name}` must be a {plain.__name__} itself to be serialised, got {type(value).__name__}; "
                "export a program that makes its cache inside."
            )
    return json.dumps(dataclasses.asdict(options), default=lambda value: value.item())


def options_from_json(text: str) -> AttentionOptions:
    """Read options from JSON written by `options_to_json`."""
    fields = json.loads(text)
    fields["window"] = Window(**fields["window"])
    fields["rotary"] = fields["rotary"] and Rotary(**fields["rotary"])
    return AttentionOptions(**fields)


def check_restated(options: AttentionOptions, restated: dict[str, Any]):
    """Raise unless the options that a call restates by keyword, fields of a window included, equal its cache's.

    Raises:
        TypeError: A keyword is not an option.
        ValueError: An option differs from the cache's.
    """
    of_window = {field.name for field in dataclasses.fields(Window)}
    unknown = restated.keys() - of_window - {field.name for field in dataclasses.fields(AttentionOptions)}
    if unknown:
        given = " and ".join(f"`{name}`" for name in sorted(unknown))
        raise TypeError(f"`options` must be fields of AttentionOptions or Window, got {given}; leave them out.")
    same = dict.fromkeys(restated, False)
    for name, value in restated.items():
        with contextlib.suppress(TypeError, ValueError):  # a value that no option can have
            changed = dataclasses.replace(options.window if name in of_window else options, **{name: value})
            same[name] = changed in (options, options.window)
    if others := [name for name in restated if not same[name]]:
        raise ValueError(
            f"`options` must equal the cache's, got {', '.join(f'`{name}` {restated[name]!r}' for name in others)} "
            f"with a cache made for {options}; leave them out, or make the cache by KVCache.create(options, ...)."
        )


def refuse_options(function: str, call: str, removed: dict[str, Any]):
    """Raise a TypeError for options given as keywords; `call` shows how to pass them instead."""
    if removed:
        names = ", ".join(f"`{name}`" for name in removed)
        raise TypeError(
            f"`{function}` takes arrays by keyword and options as one AttentionOptions, got {names}; write {call}."
        )


def _fill_rotary(rotary, window):
    if rotary is None:
        return None
    if not isinstance(rotary, Rotary):
        width = rotary if is_number(rotary) else 64
        raise TypeError(
            f"`rotary` must be a Rotary or None, got {describe(rotary)}; write for example `rotary=Rotary({width})`."
        )
    _check_equality("rotary", rotary, Rotary)
    return rotary.for_window(window)


def _check_equality(name, value, plain):
    """Raise for an instance of a subclass whose equality ignores some of its attributes.

    Options are static arguments of compiled functions: equal options share a program.
    """
    unknown = set(vars(value)) - {field.name for field in dataclasses.fields(value)}
    if unknown and type(value).__eq__ is plain.__eq__:
        kind = type(value).__name__
        raise TypeError(
            f"`{name}` must compare all its attributes, got a {kind} that ignores {', '.join(sorted(unknown))} and "
            f"compares the fields of {plain.__name__} alone; decorate {kind} with dataclasses.dataclass(frozen=True)."
        )


def _check_scale(name, scale):
    if not is_number(scale):
        raise TypeError(
            f"`{name}` of options must be a number known when they are made, got {describe(scale)}; pass an array to "
            "the call (`scale=` of `local_attention`), or multiply q by it."
        )
    return check_finite(name, scale)


def _hashable_precision(precision):
    """Make a precision hashable and serialisable: strings in place of enumerators, tuples in place of lists."""
    if isinstance(precision, list) or type(precision) is tuple:  # a `jax.lax.DotAlgorithm` is a tuple of its own
        return tuple(map(_hashable_precision, precision))
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    return precision.name if isinstance(precision, jax.lax.DotAlgorithmPreset) else precision
