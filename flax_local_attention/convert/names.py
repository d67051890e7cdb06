"""The names and shapes of all parameters, ours and the original's: `TABLES`, and the search in them by name."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np
from flax import linen as nn

from flax_local_attention.feed_forward import FeedForward
from flax_local_attention.layers import LocalMHA
from flax_local_attention.position_bias import DynamicPositionBias
from flax_local_attention.transformer import LocalTransformer

Side = Literal["ours", "theirs", "older"]
"""Whose names and layouts: ours, the original's ("theirs"), or the original's up to version 1.10 ("older")."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter under both names; in a table, ``{}`` stands for the number of its layer.

    Attributes:
        ours: Path in our parameters. Empty for a buffer, which we do not need.
        theirs: Name in the original's state dict.
        axes: Sizes of the original's array, separated by spaces: arguments of the model, or keys of `DERIVED`.
        when: Option that the parameter belongs to; empty if it is always present.
        layer: Number of the layer, once it is known.
    """

    ours: str
    theirs: str
    axes: str
    when: str = ""
    layer: int | None = None

    def of_layer(self, layer: int | None) -> "Entry":
        """Return the entry with the number of its layer filled in, if it belongs to one."""
        if "{}" not in self.theirs:
            return self
        return dataclasses.replace(self, ours=self.ours.format(layer), theirs=self.theirs.format(layer), layer=layer)

    @property
    def older(self) -> str:
        """The name in the original's state dict up to version 1.10; empty for residual streams, which came later."""
        return "" if self.when == "num_residual_streams" else self.theirs.replace(".branch.", ".")

    @property
    def transposed(self) -> bool:
        """Whether the layouts differ: a Linear's weight is [out, in], a Dense's kernel [in, out]."""
        return self.ours.endswith("kernel")


def _within(ours: str, theirs: str, table: tuple[Entry, ...], when: str = "") -> tuple[Entry, ...]:
    """Prefix the names of a module's table, to make it a part of a larger module's table."""
    return tuple(
        dataclasses.replace(
            entry, ours=entry.ours and ours + entry.ours, theirs=theirs + entry.theirs, when=entry.when or when
        )
        for entry in table
    )


def _position_bias(width: str) -> tuple[Entry, ...]:
    return (
        Entry("dense_0/kernel", "mlp.0.weight", f"{width} 1"),
        Entry("dense_0/bias", "mlp.0.bias", width),
        Entry("dense_1/kernel", "mlp.2.weight", f"{width} {width}"),
        Entry("dense_1/bias", "mlp.2.bias", width),
        Entry("dense_2/kernel", "mlp.4.weight", f"heads {width}"),
        Entry("dense_2/bias", "mlp.4.bias", "heads"),
    )


ATTENTION = (
    Entry("norm/scale", "norm.weight", "dim", when="prenorm"),
    Entry("norm/bias", "norm.bias", "dim", when="prenorm"),
    Entry("to_qkv/kernel", "to_qkv.weight", "3*inner dim"),
    Entry("q_scale", "q_scale", "dim_head", when="qk_rmsnorm"),
    Entry("k_scale", "k_scale", "dim_head", when="qk_rmsnorm"),
    Entry("to_v_gate/kernel", "to_v_gate.0.weight", "heads dim", when="gate_values_per_head"),
    Entry("to_v_gate/bias", "to_v_gate.0.bias", "heads", when="gate_values_per_head"),
    Entry("to_out/kernel", "to_out.weight", "dim inner"),
    Entry("", "attn_fn.rel_pos.inv_freq", "dim_head//2", when="use_rotary_pos_emb"),
)

FEED_FORWARD = (
    Entry("norm/scale", "0.weight", "dim"),
    Entry("norm/bias", "0.bias", "dim"),
    Entry("to_hidden/kernel", "1.weight", "2*width dim"),
    Entry("to_out/kernel", "4.weight", "dim width"),
)

HYPER_CONNECTION = (
    Entry("gamma", "norm.gamma", "dim"),
    Entry("static_alpha", "static_alpha", "num_residual_streams num_residual_streams+1"),
    Entry("dynamic_alpha_fn", "dynamic_alpha_fn", "dim num_residual_streams+1"),
    Entry("dynamic_alpha_scale", "dynamic_alpha_scale", ""),
    Entry("static_beta", "static_beta", "num_residual_streams"),
    Entry("dynamic_beta_fn", "dynamic_beta_fn", "dim"),
    Entry("dynamic_beta_scale", "dynamic_beta_scale", ""),
)

TRANSFORMER = (
    Entry("token_emb/embedding", "token_emb.weight", "num_tokens dim", when="num_tokens"),
    Entry("pos_emb/embedding", "pos_emb.weight", "max_seq_len dim", when="num_tokens"),
    *_within("dynamic_pos_bias/", "dynamic_pos_bias.", _position_bias("dim//2"), when="use_dynamic_pos_bias"),
    *_within("layers_{}/global_streams/", "global_layers.{}.", HYPER_CONNECTION, when="num_residual_streams"),
    *_within("layers_{}/attn_streams/", "layers.{}.0.", HYPER_CONNECTION, when="num_residual_streams"),
    *_within("layers_{}/attn/", "layers.{}.0.branch.", ATTENTION),
    *_within("layers_{}/ff_streams/", "layers.{}.1.", HYPER_CONNECTION, when="num_residual_streams"),
    *_within("layers_{}/ff/", "layers.{}.1.branch.", FEED_FORWARD),
    Entry("norm/scale", "to_logits.0.weight", "dim", when="num_tokens"),
    Entry("norm/bias", "to_logits.0.bias", "dim", when="num_tokens"),
    Entry("to_logits/kernel", "to_logits.1.weight", "num_tokens dim", when="num_tokens"),
)

TABLES: dict[type[nn.Module], tuple[Entry, ...]] = {
    LocalTransformer: TRANSFORMER,
    LocalMHA: ATTENTION,
    FeedForward: FEED_FORWARD,
    DynamicPositionBias: _position_bias("dim"),
}

GLOBAL_BRANCH: dict[Side, str] = {
    "ours": "layers_{}/global_attn/",
    "theirs": "global_layers.{}.branch.",
    "older": "global_layers.{}.",
}
"""The prefix of the names of an inserted global layer's weights."""

DERIVED = {
    "inner": lambda sizes: sizes["heads"] * sizes["dim_head"],
    "3*inner": lambda sizes: 3 * sizes["inner"],
    "2*width": lambda sizes: 2 * sizes["width"],
    "dim//2": lambda sizes: sizes["dim"] // 2,
    "dim_head//2": lambda sizes: sizes["dim_head"] // 2,
    "num_residual_streams+1": lambda sizes: sizes["num_residual_streams"] + 1,
    "1": lambda _: 1,
}
"""Sizes in the tables that are computed from others, in the order of computation."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Arrays sorted by entry.

    Attributes:
        entries: Arrays in the original's layout, by entry.
        branches: Weights of inserted global layers, by the number of the layer and then by their names in it.
        unknown: Arrays whose names are in no table, by name.
    """

    entries: dict[Entry, np.ndarray]
    branches: dict[int, dict[str, np.ndarray]]
    unknown: dict[str, np.ndarray]


def sort_by_entry(kind: type[nn.Module], named: Mapping[str, np.ndarray], side: Side) -> Weights:
    """Sort arrays by entry, from their names on one side."""
    weights = Weights({}, {}, {})
    for name, x in named.items():
        template, layer = _split_layer(name)
        branch = GLOBAL_BRANCH[side]
        if entry := find_entry(kind, name, side):
            weights.entries[entry] = x.T if side == "ours" and entry.transposed else x
        elif kind is LocalTransformer and layer is not None and template.startswith(branch):
            weights.branches.setdefault(layer, {})[template.removeprefix(branch)] = x
        else:
            weights.unknown[name] = x
    return weights


def find_entry(kind: type[nn.Module], name: str, side: Side) -> Entry | None:
    """Return the entry with this name on one side, or None."""
    template, layer = _split_layer(name)
    entry = _by_template(kind, side).get(template)
    if entry is not None and getattr(entry.of_layer(layer), side) == name:
        return entry.of_layer(layer)
    return None


@functools.cache
def _by_template(kind: type[nn.Module], side: Side) -> dict[str, Entry]:
    return {getattr(entry, side): entry for entry in TABLES[kind] if getattr(entry, side)}


def _split_layer(name: str) -> tuple[str, int | None]:
    """Split a name into one with ``{}`` in place of the layer's number, and this number."""
    match = re.match(r"(?:global_)?layers[._](0|[1-9][0-9]{0,8})(?=[./])", name)
    if match is None:
        return name, None
    return f"{name[: match.start(1)]}{{}}{name[match.end(1) :]}", int(match[1])
