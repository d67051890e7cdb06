"""How a query attends: every option of a call that is not an array, as one value."""

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flax_local_attention.checks import check_rate, is_number
from flax_local_attention.rotary import Rotary
from flax_local_attention.window import Window


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Options of attention: checked when made, hashable, and so a static argument of jitted functions.

    `attend` takes them beside the arrays of a call, `KVCache` keeps them, and `attention_fn` is made of them.

    Args:
        window: Which keys a query sees.
        rotary: Turn queries and keys by their positions. The `scale_base` of xPos, if left out, becomes half of the
            window's size.
        scale: Factor of the scores, a number. None means ``d ** -0.5``. A traced one is an array of the call, see
            `local_attention`.
        shared_qk: Keys are queries (Reformer): they are L2-normalised, and a token sees itself only where it sees
            nothing else.
        logits_soft_cap: ``c tanh(x / c)`` bounds the scaled scores, before a bias is added. None means no bound.
        dropout_rate: Share of probabilities to drop, in ``[0, 1)``. It acts only in calls with a `dropout_rng`, so
            that training and decoding have the same options.
        precision: Of the matrix products, as in `jax.numpy.einsum`.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field is out of range.

    Example:
        >>> options = AttentionOptions(Window.sliding(4096), rotary=Rotary(64), logits_soft_cap=50.0)
        >>> options == AttentionOptions(Window.sliding(4096), rotary=Rotary(64), logits_soft_cap=50)
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
        if not isinstance(self.window, Window):
            raise TypeError(
                f"`window` must be a Window, got {self.window!r} of type {type(self.window).__name__}; "
                "write `Window(512, causal=True)`, say."
            )
        _check_equality("window", self.window, Window)
        self._set("rotary", _fill_rotary(self.rotary, self.window))
        self._set("scale", _check_scale(self.scale))
        if not isinstance(self.shared_qk, bool | np.bool_):
            raise TypeError(f"`shared_qk` must be True or False, got {self.shared_qk!r}; write bool(...).")
        self._set("logits_soft_cap", _check_cap(self.logits_soft_cap))
        self._set("dropout_rate", check_rate("dropout_rate", _to_number(self.dropout_rate)))
        self._set("precision", _check_precision(self.precision))

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, options_or_window: "AttentionOptions | Window | None") -> "AttentionOptions":
        """Return options as they are, and a window as options that leave all else at its default."""
        if isinstance(options_or_window, cls):
            return options_or_window
        if isinstance(options_or_window, Window):
            return cls(options_or_window)
        raise TypeError(
            f"`options` must be AttentionOptions or a Window, got {options_or_window!r} of type "
            f"{type(options_or_window).__name__}; write `AttentionOptions(Window(512, causal=True))`, say."
        )


def options_to_json(options: AttentionOptions) -> str:
    """Write options as JSON, which `options_from_json` reads: what an exported program keeps of a cache's options.

    Raises:
        TypeError: Window or rotary are of a class of one's own, which would be read back as the plain one.
    """
    for name, value, plain in (("window", options.window, Window), ("rotary", options.rotary, Rotary)):
        if value is not None and type(value) is not plain:
            raise TypeError(
                f"`{name}` must be a {plain.__name__} itself to be serialised, got {type(value).__name__}; "
                "export a program that makes its cache inside."
            )
    return json.dumps(dataclasses.asdict(options), default=lambda value: value.item())


def options_from_json(text: str) -> AttentionOptions:
    """Read options that `options_to_json` wrote."""
    fields = json.loads(text)
    fields["window"] = Window(**fields["window"])
    fields["rotary"] = fields["rotary"] and Rotary(**fields["rotary"])
    return AttentionOptions(**fields)


def refuse_options(function: str, call: str, removed: dict[str, Any]):
    """Raise a TypeError for keywords that a function does not take: `call` is how options are given to it."""
    if removed:
        names = ", ".join(f"`{name}`" for name in removed)
        raise TypeError(
            f"`{function}` takes arrays by keyword and options as one AttentionOptions, got {names}; write {call}."
        )


def _to_number(value):
    """Turn an array of one number into it; leave a traced one, and all else, as it is."""
    is_known = isinstance(value, jax.Array | np.ndarray) and not isinstance(value, Tracer)
    return value.item() if is_known and value.ndim == 0 else value


def _fill_rotary(rotary, window):
    if rotary is None:
        return None
    if not isinstance(rotary, Rotary):
        width = rotary if is_number(rotary) else 64
        raise TypeError(f"`rotary` must be a Rotary or None, got {rotary!r}; write `rotary=Rotary({width})`, say.")
    _check_equality("rotary", rotary, Rotary)
    return rotary.for_window(window.window_size)


def _check_equality(name, value, plain):
    """Raise for an instance of a subclass whose equality does not know its attributes.

    Options are static arguments of compiled functions: two that are equal share a program.
    """
    unknown = set(vars(value)) - {field.name for field in dataclasses.fields(value)}
    if unknown and type(value).__eq__ is plain.__eq__:
        kind = type(value).__name__
        raise TypeError(
            f"`{name}` must be compared by all that it holds, got a {kind} with {', '.join(sorted(unknown))} besides "
            f"the fields of {plain.__name__}; decorate {kind} with dataclasses.dataclass(frozen=True)."
        )


def _check_scale(scale):
    if scale is None:
        return None
    scale = _to_number(scale)
    if not is_number(scale):
        raise TypeError(
            f"`scale` of options must be a number known when they are made, got {scale!r}; give an array to the call "
            "(`scale=` of `local_attention`), or multiply q by it."
        )
    if not math.isfinite(scale):
        raise ValueError(f"`scale` must be finite, got {scale}; None means d ** -0.5.")
    return float(scale)


def _check_cap(cap):
    if cap is None:
        return None
    cap = _to_number(cap)
    if not is_number(cap):
        raise TypeError(
            f"`logits_soft_cap` must be a number known when options are made, got {cap!r}; leave it out for no cap."
        )
    if not 0 < cap < math.inf:
        raise ValueError(f"`logits_soft_cap` must be positive and finite, got {cap}; leave it out for no cap.")
    return float(cap)


def _check_precision(precision):
    """Make precision hashable and its enumerators words; what a word means is checked by JAX where it is used."""
    if isinstance(precision, list) or type(precision) is tuple:  # a `jax.lax.DotAlgorithm` is a tuple of its own
        return tuple(map(_check_precision, precision))
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    return precision.name if isinstance(precision, jax.lax.DotAlgorithmPreset) else precision
