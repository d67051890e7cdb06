"""Inference of a model from its weights: its kind, sizes, options and layers."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from flax import linen as nn

from flax_local_attention.convert.names import DERIVED, TABLES, Entry, Side, Weights, find_entry
from flax_local_attention.transformer import LocalTransformer


@dataclasses.dataclass(frozen=True)
class Inferred:
    """What weights show of their model.

    Attributes:
        sizes: Size of each word in `Entry.axes`.
        options: Options whose parameters are present, see `Entry.when`.
        depth: Number of layers.
        global_layers: Numbers of the layers, from 0, before which a global layer is inserted.
    """

    sizes: dict[str, int]
    options: frozenset[str]
    depth: int
    global_layers: tuple[int, ...]

    def arguments(self, kind: type[nn.Module]) -> dict[str, Any]:
        """Return the arguments of a module that the weights show."""
        switches = ("prenorm", "qk_rmsnorm", "gate_values_per_head", "use_dynamic_pos_bias")
        arguments = {name: name in self.options for name in switches}
        if "use_rotary_pos_emb" in self.options:  # rotary may also be on without its buffers
            arguments["use_rotary_pos_emb"] = True
        arguments |= {"num_tokens": None, "num_residual_streams": 1, "depth": self.depth, "signed": False}
        fields = {field.name for field in dataclasses.fields(kind)}
        return {name: value for name, value in (arguments | self.sizes).items() if name in fields}

    def contradictions(self, kind: type[nn.Module], given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the arguments in `given` that the weights contradict, with the values that the weights show."""
        for name, value in self.arguments(kind).items():
            if given.get(name, value) != value:
                yield name, value

    def entries(self, kind: type[nn.Module]) -> Iterator[Entry]:
        """Yield the entries of a module that has these options and layers, always with the buffers."""
        # A transformer always normalises before attention, and has no argument for it.
        options = self.options | {"", "use_rotary_pos_emb"} | ({"prenorm"} if kind is LocalTransformer else set())
        for entry in TABLES[kind]:
            if entry.when in options:
                layers = self.global_layers if entry.theirs.startswith("global_layers") else range(self.depth)
                yield from [entry.of_layer(layer) for layer in layers] if "{}" in entry.theirs else [entry]

    def shape(self, entry: Entry) -> tuple[int, ...] | None:
        """Return an entry's shape in the original's layout, or None if a size is unknown."""
        axes = entry.axes.split()
        return tuple(self.sizes[axis] for axis in axes) if self.sizes.keys() >= set(axes) else None


def infer_model(weights: Weights) -> Inferred:
    """Infer a model; where weights contradict each other, by the majority."""
    # By the number of distinct layers, not by the highest: one large number must not make a long list of missing ones.
    depth = max(1, len({entry.layer for entry in weights.entries if entry.theirs.startswith("layers")}))
    inserted = {entry.layer for entry in weights.entries if entry.theirs.startswith("global_layers")}
    global_layers = tuple(layer for layer in range(depth) if layer in inserted | set(weights.branches))
    return Inferred(_infer_sizes(weights), frozenset(entry.when for entry in weights.entries), depth, global_layers)


def _infer_sizes(weights: Weights) -> dict[str, int]:
    seen: dict[str, Counter] = {}
    for entry, x in weights.entries.items():
        for axis, size in zip(entry.axes.split(), x.shape, strict=False):
            if size:
                seen.setdefault(axis, Counter())[size] += 1
    sizes = {axis: counter.most_common(1)[0][0] for axis, counter in seen.items()}
    if "dim_head//2" in sizes:
        sizes.setdefault("dim_head", 2 * sizes["dim_head//2"])
    for known, other in (("dim_head", "heads"), ("heads", "dim_head")):
        if known in sizes and "inner" in sizes:
            sizes.setdefault(other, sizes["inner"] // sizes[known])
    for axis, derive in DERIVED.items():
        with suppress(KeyError):  # it cannot be derived: keep the size that the weights show
            sizes[axis] = derive(sizes)
    return sizes


def infer_fields(inferred: Inferred, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the `LocalTransformer` of these weights: those that they show, and those given."""
    inner = inferred.sizes["inner"]
    fields = {"max_seq_len": 0, **inferred.arguments(LocalTransformer)}
    fields["ff_mult"] = _infer_mult(inferred.sizes["dim"], inferred.sizes["width"])
    fields["layers_insert_global_attn"] = tuple(layer + 1 for layer in inferred.global_layers) or None
    fields |= given
    for name, other in (("heads", "dim_head"), ("dim_head", "heads")):
        if name in fields:
            if fields[name] < 1 or inner % fields[name]:
                raise ValueError(
                    f"`{name}` must divide `heads * dim_head`, {inner} by the weights, got {fields[name]}; correct it."
                )
            fields.setdefault(other, inner // fields[name])
    return fields


def _infer_mult(dim: int, width: int) -> float:
    """Return a multiplier for which `FeedForward` has this width, with few digits if possible."""
    middle = 3 * (width + 0.5) / (2 * dim)  # the middle of all that give this width
    candidates = (*(round(middle, digits) for digits in (None, 1, 2, 3)), middle)
    return next(mult for mult in candidates if int(dim * mult * 2 / 3) == width)


def infer_side(names: Iterable[str]) -> Side:
    """Infer whether a state dict has the original's current names or those of older versions, after any prefix."""
    names = sorted(names)
    counts = {
        side: max(_count_fits([LocalTransformer], names, side).values(), default=0) for side in ("theirs", "older")
    }
    return "older" if counts["older"] > counts["theirs"] else "theirs"


def infer_kind(names: Iterable[str], side: Side) -> type[nn.Module]:
    """Infer the kind of module that has the most of these names, after any prefix."""
    names = sorted(names)
    for (kind, _), _ in _count_fits(TABLES, names, side).most_common(1):
        return kind
    raise ValueError(
        f"`state_dict` must have the names of {', '.join(kind.__name__ for kind in TABLES)}, got {names[:5]}"
        f"{' and more' if len(names) > 5 else ''}; give the weights of one of these."
    )


def advise(kind: type[nn.Module], names: Iterable[str], side: Side) -> str:
    """Return what to do about weights that do not fit: give the prefix of most names, or the right module."""
    for (_, prefix), count in _count_fits([kind], names, side).most_common(1):
        if prefix:
            return f"{count} names are right after {prefix!r}: pass `prefix={prefix!r}`"
    advice = "give the weights of this module, or the module of these weights, which `model_from_torch` infers"
    if side == "older":
        advice += (
            "; names without `branch` are those of local-attention 1.10 and older: `num_residual_streams` is 1, see "
            "`from_torch`"
        )
    return advice


def _count_fits(kinds: Iterable[type[nn.Module]], names: Iterable[str], side: Side) -> Counter:
    """Count the names that each kind has after each prefix, by kind and prefix."""
    starts = [(name, match.end()) for name in names for match in re.finditer(r"^|\.", name)]
    return Counter(
        (kind, name[:start]) for kind in kinds for name, start in starts if find_entry(kind, name[start:], side)
    )
