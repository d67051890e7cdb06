"""Checks of module fields, one for each field name: a name means the same in every module."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax_local_attention.array_checks import check_dtype, check_precision, to_number
from flax_local_attention.checks import (
    at_least,
    check_finite,
    check_flag,
    check_function,
    check_integer,
    check_kind,
    check_positive,
    check_rate,
    describe,
    optional,
)
from flax_local_attention.kernels import choose_implementation
from flax_local_attention.rotary import Rotary


def check_fields(module: Any):
    """Raise unless every field of a module passes the check for its name, or is None where its annotation allows it.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field is out of range.
    """
    for name, check in _checks_of(type(module)):
        check(name, getattr(module, name))


@functools.cache
def _checks_of(kind):
    """Return pairs of a name and a check for the fields of a class that have one."""
    checked = [field for field in dataclasses.fields(kind) if field.name in CHECKS]
    return [
        (field.name, optional(CHECKS[field.name]) if _takes_none(field.type) else CHECKS[field.name])
        for field in checked
    ]


def _takes_none(annotation):
    """Return whether an annotation, which is a string under postponed evaluation, allows None."""
    return "None" in annotation if isinstance(annotation, str) else type(None) in typing.get_args(annotation)


def _check_rotary(name, value):
    """Raise unless a value is a `Rotary`, False or None, or a sequence of these, one for each layer."""
    for rotary in value if isinstance(value, Sequence) and not isinstance(value, str) else (value,):
        if rotary is not None and rotary is not False and not isinstance(rotary, Rotary):
            raise TypeError(
                f"`{name}` must be a Rotary, False or None, got {describe(rotary)}; write for example "
                "`rotary=Rotary(64, theta=1e6)`."
            )


def _check_layers(name, value):
    """Raise unless a value is a sequence of layer numbers."""
    check_kind(name, value, Sequence, "list layer numbers, from 1")
    for layer in value:
        check_integer(name, layer)


CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("dim", "dim_head", "dim_value", "heads", "kv_heads", "num_residual_streams"), at_least(1)),
    "num_tokens": at_least(1),
    **dict.fromkeys(("max_seq_len", "depth", "look_backward", "look_forward", "memory_tokens"), at_least(0)),
    "ignore_index": check_integer,
    **dict.fromkeys(("dropout", "attn_dropout", "ff_dropout"), check_rate),
    **dict.fromkeys(("scale", "qk_scale"), lambda name, value: check_finite(name, to_number(value))),
    **dict.fromkeys(("mult", "ff_mult", "logits_soft_cap", "xpos_scale_base"), check_positive),
    **dict.fromkeys(("causal", "exact_windowsize", "autopad", "prenorm", "signed", "deterministic"), check_flag),
    **dict.fromkeys(("qk_rmsnorm", "gate_values_per_head", "attention_sinks", "shared_qk"), check_flag),
    **dict.fromkeys(("use_rotary_pos_emb", "use_xpos", "use_bias", "use_out_bias", "reference_rotary"), check_flag),
    **dict.fromkeys(("use_dynamic_pos_bias", "use_abs_pos_emb", "remat", "scan_layers"), check_flag),
    **dict.fromkeys(("dtype", "param_dtype"), check_dtype),
    **dict.fromkeys(("kernel_init", "out_kernel_init", "bias_init", "embedding_init"), check_function),
    "precision": check_precision,
    "implementation": lambda name, value: choose_implementation(value, name),
    "rotary": _check_rotary,
    "global_attn_layer": check_function,
    "layers_insert_global_attn": _check_layers,
}
"""The check for each field name. Windows are checked in `fields.window_of`."""
