"""What the weights of a model show of it: its kind, sizes, options and layers."""

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
        sizes: Words in the table's axes, and their sizes.
        options: Options whose parameters there are.
        depth: Layers.
        global_layers: Numbers of the layers before which a global one is inserted, from 0.
    """

    sizes: dict[str, int]
    options: frozenset[str]
    depth: int
    global_layers: tuple[int, ...]

    def arguments(self, kind: type[nn.Module]) -> dict[str, Any]:
        """Return those arguments of a module that the weights show."""
        switches = ("prenorm", "qk_rmsnorm", "gate_values_per_head", "use_dynamic_pos_bias")
        arguments = {name: name in self.options for name in switches}
        if "use_rotary_pos_emb" in self.options:  # without its buffers it may be on all the same
            arguments["use_rotary_pos_emb"] = True
        arguments |= {"num_tokens": None, "num_residual_streams": 1, "depth": self.depth, "signed": False}
        fields = {field.name for field in dataclasses.fields(kind)}
        return {name: value for name, value in (arguments | self.sizes).items() if name in fields}

    def contradictions(self, kind: type[nn.Module], given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the arguments in `given` that the weights contradict, each with the value that they show."""
        for name, value in self.arguments(kind).items():
            if given.get(name, value) != value:
                yield name, value

    def entries(self, kind: type[nn.Module]) -> Iterator[Entry]:
        """Yield the entries of a module that has these options and layers, the buffers always among them."""
        # A transformer always normalises before attention, and has no argument for it.
        options = self.options | {"", "use_rotary_pos_emb"} | ({"prenorm"} if kind is LocalTransformer else set())
        for entry in TABLES[kind]:
            if entry.when in options:
                layers = self.global_layers if entry.theirs.startswith("global_layers") else range(self.depth)
                yield from [entry.of_layer(layer) for layer in layers] if "{}" in entry.theirs else [entry]

    def shape(self, entry: Entry) -> tuple[int, ...] | None:
        """Return an entry's shape in the original's layout, if its sizes are known."""
        axes = entry.axes.split()
        return tuple(self.sizes[axis] for axis in axes) if self.sizes.keys() >= set(axes) else None


def infer_model(weights: Weights) -> Inferred:
    """Infer what weights show; where they contradict each other, what most of them show."""
    # Counting distinct layers, not to the highest number, keeps what is missing as long as what is given.
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
        with suppress(KeyError):  # what it follows from is unknown, so it is what the weights say
            sizes[axis] = derive(sizes)
    return sizes


def infer_fields(inferred: Inferred, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the `LocalTransformer` that the weights are of: those given, and those that weights show."""
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
    """Return a multiplier for which `FeedForward` has this width, of few digits if there is one."""
    middle = 3 * (width + 0.5) / (2 * dim)  # of all that serve
    candidates = (*(round(middle, digits) for digits in (None, 1, 2, 3)), middle)
    return next(mult for mult in candidates if int(dim * mult * 2 / 3) == width)


def infer_side(names: Iterable[str]) -> Side:
    """Infer which of the original's names a state dict has, those of now or of older versions, after any prefix."""
    names = sorted(names)
    counts = {
        side: max(_count_fits([LocalTransformer], names, side).values(), default=0) for side in ("theirs", "older")
    }
    return "older" if counts["older"] > counts["theirs"] else "theirs"


def infer_kind(names: Iterable[str], side: Side) -> type[nn.Module]:
    """Return the kind of module that has the most of these names, whatever comes before them."""
    names = sorted(names)
    for (kind, _), _ in _count_fits(TABLES, names, side).most_common(1):
        return kind
    raise ValueError(
        f"`state_dict` must have the names of {', '.join(kind.__name__ for kind in TABLES)}, got {names[:5]}"
        f"{' and more' if len(names) > 5 else ''}; give the weights of one of these."
    )


def advise(kind: type[nn.Module], names: Iterable[str], side: Side) -> str:
    """Say what to do about weights that do not fit: take off what comes before most of the names of this kind."""
    for (_, prefix), count in _count_fits([kind], names, side).most_common(1):
        if prefix:
            return f"{count} names are right without {prefix!r} before them: pass `prefix={prefix!r}`"
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
