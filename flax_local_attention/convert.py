"""Weights of the PyTorch original: into our parameters and back.

`TABLES` pairs the names of both sides and says the shape of every array in words. Both directions,
the checks, and what can be told of a model from its weights are readings of it. Nothing here needs PyTorch.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_local_attention.feed_forward import FeedForward
from flax_local_attention.layers import LocalMHA
from flax_local_attention.position_bias import DynamicPositionBias
from flax_local_attention.stacking import stack_layers, unstack_layers
from flax_local_attention.transformer import LocalTransformer
from flax_local_attention.window import Window

THETA = 10000.0  # of every rotary embedding in the original's modules and in ours

GlobalBranch = Callable[[int, Mapping[str, Any]], Mapping[str, Any]]
"""Converts the weights of one inserted global layer: its number (from 0) and its entries to the other side's."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter under both names; in a table, ``{}`` stands for the number of the layer.

    Attributes:
        ours: Path in our parameters. Empty for a buffer, which we have no need of.
        theirs: Name in the original's state dict.
        axes: Sizes of the original's array: words of the model's arguments, see `_parse_axis`.
        when: Option without which there is no such parameter.
        layer: Number of the layer, once it is known.
    """

    ours: str
    theirs: str
    axes: str
    when: str = ""
    layer: int | None = None

    def of_layer(self, layer: int) -> "Entry":
        """The same with the layer's number filled in, where it has one."""
        if "{}" not in self.theirs:
            return self
        return dataclasses.replace(self, ours=self.ours.format(layer), theirs=self.theirs.format(layer), layer=layer)

    @property
    def transposed(self) -> bool:
        """Whether the layouts differ: a Linear's weight is [out, in], a Dense's kernel [in, out]."""
        return self.ours.endswith("kernel")


def _within(ours: str, theirs: str, table: tuple[Entry, ...], when: str = "") -> tuple[Entry, ...]:
    """A module's table as part of a larger one."""
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
    Entry("", "attn_fn.rel_pos.inv_freq", "angles", when="use_rotary_pos_emb"),
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
    *_within("dynamic_pos_bias/", "dynamic_pos_bias.", _position_bias("bias_width"), when="use_dynamic_pos_bias"),
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

GLOBAL_BRANCH = {"ours": r"layers_(\d+)/global_attn/(.+)", "theirs": r"global_layers\.(\d+)\.branch\.(.+)"}

# Sizes in the table that are no arguments themselves, and what they must be.
DERIVED: dict[str, tuple[tuple[str, ...], str, Callable[..., int]]] = {
    "inner": (("heads", "dim_head"), "heads * dim_head", lambda heads, dim_head: heads * dim_head),
    "angles": (("dim_head",), "dim_head // 2", lambda dim_head: dim_head // 2),
    "bias_width": (("dim",), "dim // 2", lambda dim: dim // 2),
}


def from_torch(
    state_dict: Mapping[str, Any],
    module: nn.Module | None = None,
    *,
    prefix: str = "",
    global_branch: GlobalBranch | None = None,
) -> dict[str, Any]:
    """Turn a state dict of the original into variables of ours.

    The original is ``local-attention`` 1.11.2, and the modules are its `LocalTransformer`, `LocalMHA`,
    `FeedForward` and `DynamicPositionBias`. Read a ``.safetensors`` file with
    ``safetensors.numpy.load_file(path)``. A pickled ``.pt`` can run any code when it is opened; read it
    yourself with ``torch.load(path, map_location="cpu", weights_only=True)``, which refuses that.

    Args:
        state_dict: Names to arrays of a floating dtype: of NumPy, JAX or PyTorch.
        module: Module of ours that the variables are for; the weights are checked against it. None: only
            against each other, and which kind of module they are of is told from their names.
        prefix: Take only the names that begin so, and take it off: ``"module."`` of a model that was
            wrapped, ``"encoder."`` of a part of a larger one.
        global_branch: Converts the weights of an inserted global layer: from the number of the layer
            (from 0) and the weights by their names in it, to the parameters of our module.

    Returns:
        ``{"params": ...}`` of NumPy arrays, copies in the dtypes that were given. Put them on a device with
        ``jax.device_put``. The buffers ``inv_freq`` are checked and left out. Layers are stacked if `module` has
        `scan_layers=True`.

    Raises:
        TypeError: An argument or a value in the state dict is of the wrong type.
        ValueError: Entries are missing, surplus or misshapen (the message lists all of them), or the
            module is not the one that the weights were trained in. A module that looks forward with
            rotary needs ``reference_rotary=True``: the original turns queries by wrong angles, and its
            weights have learned them. To train on with right ones, convert with it and then apply the
            variables with ``module.clone(reference_rotary=False)``.

    Example:
        >>> shapes = {"0.weight": (4,), "0.bias": (4,), "1.weight": (20, 4), "4.weight": (4, 10)}
        >>> state_dict = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        >>> variables = from_torch(state_dict, FeedForward(dim=4))
        >>> variables["params"]["to_hidden"]["kernel"].shape
        (4, 20)
        >>> sorted(to_torch(variables)) == sorted(state_dict)
        True
    """
    named = _read_state_dict(state_dict, prefix)
    kind = _told_kind(named, "theirs") if module is None else _kind_of(module)
    if module is not None:
        _check_reference_rotary(module)
    weights = _checked(kind, named, "theirs", module)
    params = {entry.ours: _copy(x.T if entry.transposed else x) for entry, x in weights.entries.items() if entry.ours}
    for layer, branch in weights.branches.items():
        converted = flatten_dict(_global_converter(global_branch)(layer, branch), sep="/")
        paths = {path: f"layers_{layer}/global_attn/{path}" for path in converted}
        params |= {paths[path]: _copy(_to_numpy(paths[path], x)) for path, x in converted.items()}
    variables = {"params": unflatten_dict(params, sep="/")}
    return stack_layers(variables) if getattr(module, "scan_layers", False) else variables


def to_torch(
    variables: Mapping[str, Any],
    module: nn.Module | None = None,
    *,
    prefix: str = "",
    global_branch: GlobalBranch | None = None,
) -> dict[str, np.ndarray]:
    """Turn variables of ours into a state dict of the original.

    Load it there with ``torch_module.load_state_dict({k: torch.from_numpy(x) for k, x in state_dict.items()})``;
    PyTorch reads no bfloat16 from NumPy: ``torch.from_numpy(x.astype(np.float32)).bfloat16()``. A module that
    looks forward with rotary computes the same there only with ``reference_rotary=True`` here.

    Args:
        variables: ``{"params": ...}`` of one of the modules that `from_torch` names, layers stacked or not.
        module: The module. With it the buffers ``inv_freq`` are written, so that a strict load finds
            every name; and the parameters are checked against it.
        prefix: What every name shall begin with.
        global_branch: Converts the parameters of an inserted global layer: from the number of the layer
            (from 0) and our parameters, to weights by their names in the original's.

    Returns:
        Names to NumPy arrays, copies in the dtypes of the parameters.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Parameters are missing, misshapen, or without a counterpart in the original, such as
            grouped heads and attention sinks; the message lists all of them.
    """
    named = _read_variables(variables)
    kind = _told_kind(named, "ours") if module is None else _kind_of(module)
    weights = _checked(kind, named, "ours", module)
    arrays = {entry.theirs: _copy(x) for entry, x in weights.entries.items()}
    if module is not None and _has_rotary(module):
        buffers = [entry for entry in weights.told.expand(kind) if not entry.ours]
        arrays |= {entry.theirs: inverse_frequencies(module.dim_head) for entry in buffers}
    for layer, branch in weights.branches.items():
        converted = _global_converter(global_branch)(layer, unflatten_dict(branch, sep="/"))
        names = {name: f"global_layers.{layer}.branch.{name}" for name in converted}
        arrays |= {names[name]: _copy(_to_numpy(names[name], x)) for name, x in converted.items()}
    return {prefix + name: x for name, x in arrays.items()}


def model_from_torch(
    state_dict: Mapping[str, Any],
    *,
    local_attn_window_size: int | Sequence[int | None] | None = None,
    heads: int | None = None,
    dim_head: int | None = None,
    causal: bool = True,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_windowsize: bool = True,
    use_xpos: bool = False,
    xpos_scale_base: float | None = None,
    qk_scale: float = 8,
    shared_qk: bool = False,
    ignore_index: int = -1,
    global_attn_layer: Callable[[int], nn.Module] | None = None,
    prefix: str = "",
) -> LocalTransformer:
    """Build the `LocalTransformer` that a state dict of the original's is the weights of.

    Sizes, depth, residual streams, gates, `qk_rmsnorm` and dynamic bias are told from the weights, and
    `reference_rotary` is set where the model looks forward with rotary. What weights do not tell are the
    arguments here, with the original's defaults; give those that the model was made with. The window size
    must be given. So must `heads` or `dim_head`, if neither gates, a dynamic bias, `qk_rmsnorm` nor the
    buffers ``inv_freq`` tell them. What changes no answer, such as dropout or `dtype`, is set afterwards:
    ``model.clone(dtype=jnp.bfloat16)``.

    Args:
        state_dict: As in `from_torch`, which then converts it: ``from_torch(state_dict, model)``.
        local_attn_window_size: Tokens in a window, or one number a layer as in `LocalTransformer`.
        heads: Heads.
        dim_head: Width of a head.
        causal, look_backward, look_forward, exact_windowsize, use_xpos, xpos_scale_base, qk_scale, shared_qk,
            ignore_index, global_attn_layer: As in `LocalTransformer`.
        prefix: As in `from_torch`.

    Returns:
        The model, without variables. Of a model without tokens, `max_seq_len` is 0: it limits nothing.

    Raises:
        TypeError: A value in the state dict is of the wrong type.
        ValueError: The weights are incomplete or contradict each other or an argument, or an argument is
            missing that they do not tell.
    """
    named = _read_state_dict(state_dict, prefix)
    told = _checked(LocalTransformer, named, "theirs", None).told
    _check_asked(told, local_attn_window_size, heads, dim_head, global_attn_layer)
    arguments: dict[str, Any] = {"max_seq_len": 0, **told.arguments(LocalTransformer)}
    arguments |= _settle_heads(told.sizes, heads, dim_head)
    assert local_attn_window_size is not None  # it was asked for
    model = LocalTransformer(
        **arguments,
        local_attn_window_size=local_attn_window_size,
        ff_mult=_simplest_mult(told.sizes["dim"], told.sizes["width"]),
        layers_insert_global_attn=tuple(layer + 1 for layer in told.global_layers) or None,
        global_attn_layer=global_attn_layer,
        causal=causal,
        look_backward=look_backward,
        look_forward=look_forward,
        exact_windowsize=exact_windowsize,
        use_xpos=use_xpos,
        xpos_scale_base=xpos_scale_base,
        qk_scale=qk_scale,
        shared_qk=shared_qk,
        ignore_index=ignore_index,
    )
    return model.clone(reference_rotary=_looks_forward(model))


def inverse_frequencies(dim_head: int) -> np.ndarray:
    """The original's buffer ``inv_freq``: the angle per position of each pair of a head, ``[dim_head / 2]``."""
    return (THETA ** -(np.arange(0, dim_head, 2) / dim_head)).astype(np.float32)


# What is told of a model from its weights


@dataclasses.dataclass(frozen=True)
class Told:
    """What weights tell of their model.

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
        """Those arguments of a module that the weights tell."""
        switches = ("prenorm", "qk_rmsnorm", "gate_values_per_head", "use_dynamic_pos_bias")
        arguments = {name: name in self.options for name in switches}
        if "use_rotary_pos_emb" in self.options:  # without its buffers it may be on all the same
            arguments["use_rotary_pos_emb"] = True
        arguments |= {"num_tokens": None, "num_residual_streams": 1, "depth": self.depth}
        fields = {field.name for field in dataclasses.fields(kind)}
        return {name: value for name, value in (arguments | self.sizes).items() if name in fields}

    def contradictions(self) -> list[str]:
        """Sizes that do not fit together."""
        found = []
        for name, (needs, words, formula) in DERIVED.items():
            if {name, *needs} <= set(self.sizes):
                value = formula(*(self.sizes[need] for need in needs))
                if value != self.sizes[name]:
                    found.append(f"`{words}` is {value} by some entries, {self.sizes[name]} by others")
        return found

    def expand(self, kind: type[nn.Module]) -> Iterator[Entry]:
        """Entries of the module that has these options and layers, the buffers always among them."""
        # A transformer always normalises before attention, and has no argument for it.
        options = self.options | {"", "use_rotary_pos_emb"} | ({"prenorm"} if kind is LocalTransformer else set())
        for entry in TABLES[kind]:
            if entry.when in options:
                layers = self.global_layers if entry.theirs.startswith("global_layers") else range(self.depth)
                yield from [entry.of_layer(layer) for layer in layers] if "{}" in entry.theirs else [entry]

    def shape(self, entry: Entry) -> tuple[int, ...] | None:
        """Shape of an entry in the original's layout, if its sizes are told."""
        parsed = [_parse_axis(axis) for axis in entry.axes.split()]
        if any(word and word not in self.sizes for _, word, _ in parsed):
            return None
        return tuple(times * self.sizes.get(word, 0) + plus for times, word, plus in parsed)


def _tell(entries: Mapping[Entry, np.ndarray], branches: Mapping[int, Any]) -> Told:
    """Read what the weights tell; where they contradict each other, what most of them say."""
    votes: dict[str, Counter] = {}
    for entry, x in entries.items():
        for axis, size in zip(entry.axes.split(), x.shape, strict=False):
            times, word, plus = _parse_axis(axis)
            if word and size > plus and (size - plus) % times == 0:
                votes.setdefault(word, Counter())[(size - plus) // times] += 1
    sizes = {word: counter.most_common(1)[0][0] for word, counter in votes.items()}
    if "angles" in sizes:
        sizes.setdefault("dim_head", 2 * sizes["angles"])
    for known, other in (("dim_head", "heads"), ("heads", "dim_head")):
        if known in sizes and "inner" in sizes and sizes["inner"] % sizes[known] == 0:
            sizes.setdefault(other, sizes["inner"] // sizes[known])
    # Counting distinct layers, not to the highest number, keeps what is missing as long as what is given.
    depth = max(1, len({entry.layer for entry in entries if entry.theirs.startswith("layers")}))
    inserted = {entry.layer for entry in entries if entry.theirs.startswith("global_layers")} | set(branches)
    options = frozenset(entry.when for entry in entries)
    return Told(sizes, options, depth, tuple(layer for layer in range(depth) if layer in inserted))


def _parse_axis(axis: str) -> tuple[int, str, int]:
    """Read a size that is a word, a multiple (``3*inner``), some more (``streams+1``), or a number."""
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z_]*)\+?(\d*)", axis)
    assert match, axis
    times, word, plus = match.groups()
    return int(times or 1), word, int(plus or 0)


def _check_asked(told, local_attn_window_size, heads, dim_head, global_attn_layer):
    """Raise unless the caller gave what weights cannot tell, and no more global layers than they have."""
    asked = ["`local_attn_window_size`"] if local_attn_window_size is None else []
    if "heads" not in told.sizes and heads is None and dim_head is None:
        asked.append("`heads` or `dim_head`")
    if told.global_layers and global_attn_layer is None:
        asked.append(f"`global_attn_layer` (for the layers {told.global_layers}, from 0)")
    if asked:
        raise ValueError(
            f"Arguments that the weights do not tell must be given, got no {' and no '.join(asked)}; pass those that "
            "the model was made with (the original's defaults: a window of 512, 8 heads of 64)."
        )
    if global_attn_layer is not None and not told.global_layers:
        raise ValueError(
            "`global_attn_layer` needs weights of inserted layers, got a state dict without; leave it out "
            "(layers that have no weights: `model.clone(global_attn_layer=...)`)."
        )


def _settle_heads(sizes, heads, dim_head):
    """`heads` and `dim_head` from the weights and what the caller gave of them."""
    inner, given = sizes["inner"], {"heads": heads, "dim_head": dim_head}
    for name, value in given.items():
        told = sizes.get(name)
        if value is not None and (value < 1 or inner % value or told not in (None, value)):
            rule = f"a divisor of {inner}" if told is None else str(told)
            raise ValueError(f"`{name}` must be that of the weights, {rule}, got {value}; correct it or leave it out.")
    known = {name: sizes.get(name, value) for name, value in given.items()}
    heads = known["heads"] or inner // known["dim_head"]
    dim_head = known["dim_head"] or inner // heads
    if heads * dim_head != inner:
        raise ValueError(
            f"`heads * dim_head` must be that of the weights, {inner}, got {heads} * {dim_head}; leave one out."
        )
    return {"heads": heads, "dim_head": dim_head}


def _simplest_mult(dim: int, width: int) -> float:
    """A multiplier for which `FeedForward` has this width: 4 if it serves, else one of few digits."""
    for divisor in range(1, 2 * dim + 1):
        least = -(-3 * width * divisor // (2 * dim))
        for mult in (4, least if divisor == 1 else least / divisor):
            if int(dim * mult * 2 / 3) == width:
                return mult
    return 3 * (width + 0.5) / (2 * dim)  # the middle of those that serve


# Reading, checking, naming


@dataclasses.dataclass(frozen=True)
class Weights:
    """Checked weights: entries in the original's layout, inserted layers apart, and what they tell."""

    entries: dict[Entry, np.ndarray]
    branches: dict[int, dict[str, np.ndarray]]
    told: Told


class _Problems:
    """What is wrong with the weights, to be raised as one error."""

    def __init__(self, side: str):
        self.side = side
        self.lines: dict[str, None] = {}

    def add(self, what: str, entry: Entry | str, text: str = ""):
        name = entry if isinstance(entry, str) else getattr(entry, self.side) or entry.theirs
        self.lines[f"  {what}: {name} {text}".rstrip()] = None

    def shape(self, entry: Entry, shape: tuple[int, ...] | None) -> str:
        if shape is None:
            return ""
        return str(list(shape[::-1] if self.side == "ours" and entry.transposed else shape))

    def branch(self, layer: int) -> str:
        return f"layers_{layer}/global_attn/*" if self.side == "ours" else f"global_layers.{layer}.branch.*"


def _checked(kind: type[nn.Module], named: Mapping[str, np.ndarray], side: str, module: nn.Module | None) -> Weights:
    """Find every array's entry, and raise unless there are all that must be, and no others.

    `side` says whose names these are, ``"ours"`` or ``"theirs"``.
    """
    entries, branches, surplus = _locate(kind, named, side)
    told = _tell(entries, branches)
    problems = _Problems(side)
    if module is not None:
        _compare_with_module(kind, module, entries, branches, told, problems)
    if module is None or side == "ours":  # parameters of ours must also be such as the original can have
        _compare_with_table(kind, entries, branches, told, problems)
    for name, x in surplus.items():
        problems.add("surplus", name, str(list(x.shape)))
    for entry, x in entries.items():
        if not entry.ours and x.ndim == 1 and not _is_inverse_frequencies(x):
            problems.add("not of theta 10000", entry)
    if problems.lines:
        what = "variables" if side == "ours" else "state_dict"
        raise ValueError(
            f"`{what}` must have all entries of a {kind.__name__} of the original, "
            f"{'' if module is None else 'with the arguments of `module`, '}and no others; got\n"
            + "\n".join(problems.lines)
            + "\n"
            + _advice([kind], named, side)
        )
    return Weights(entries, branches, told)


def _compare_with_table(kind, entries, branches, told, problems):
    """Note what is wrong with the weights by themselves."""
    for contradiction in told.contradictions():
        problems.add("contradiction", contradiction)
    _compare(entries, {entry: told.shape(entry) for entry in told.expand(kind)}, problems)
    for layer in set(branches) - set(told.global_layers):
        problems.add("surplus", problems.branch(layer))


def _compare_with_module(kind, module, entries, branches, told, problems):
    """Note where the weights are not those of the module."""
    for name, value in told.arguments(kind).items():
        if getattr(module, name) != value:
            problems.add("argument", f"`{name}` is {value} by the weights, {getattr(module, name)} in `module`")
    own_entries, own_branches, others = _locate(kind, _abstract_params(module), "ours")
    wanted = {entry: x.shape for entry, x in own_entries.items()}
    if _has_rotary(module):
        own = _tell(own_entries, own_branches)
        wanted |= {entry: (module.dim_head // 2,) for entry in own.expand(kind) if not entry.ours}
    _compare(entries, wanted, problems)
    for path, x in others.items():
        problems.add("without a counterpart", path, str(list(x.shape)))
    for layer in set(own_branches) - set(branches):
        problems.add("missing", problems.branch(layer))
    for layer in set(branches) - set(own_branches):
        problems.add("surplus", problems.branch(layer))


def _compare(given, wanted, problems):
    """Note the entries that are missing, surplus or misshapen; buffers may be missing."""
    for entry, shape in wanted.items():
        if entry.ours and entry not in given:
            problems.add("missing", entry, problems.shape(entry, shape))
    for entry, x in given.items():
        shown = problems.shape(entry, x.shape)
        if entry not in wanted:
            problems.add("surplus", entry, shown)
        elif wanted[entry] is not None and x.shape != wanted[entry]:
            problems.add("misshapen", entry, f"{shown}, not {problems.shape(entry, wanted[entry])}")


def _locate(kind, named, side):
    """Sort arrays by name: entries (in the original's layout), weights of inserted layers, and unknown ones."""
    table = _by_name(kind, named, side)
    entries, branches, unknown = {}, {}, {}
    for name, x in named.items():
        branch = re.fullmatch(GLOBAL_BRANCH[side], name) if kind is LocalTransformer else None
        if name in table:
            entry = table[name]
            entries[entry] = x.T if side == "ours" and entry.transposed else x
        elif branch:
            branches.setdefault(int(branch[1]), {})[branch[2]] = x
        else:
            unknown[name] = x
    return entries, branches, unknown


def _by_name(kind, names, side) -> dict[str, Entry]:
    """Entries of a table by their names, for every layer that a name may be of."""
    layers = sorted({int(number) for name in names for number in re.findall(r"\d{1,9}", name)})
    entries = (entry.of_layer(layer) for entry in TABLES[kind] for layer in (layers if "{}" in entry.theirs else [0]))
    return {getattr(entry, side): entry for entry in entries if getattr(entry, side)}


def _told_kind(named, side) -> type[nn.Module]:
    """Kind of module that has the most of these names."""
    matches = {kind: len(_by_name(kind, named, side).keys() & set(named)) for kind in TABLES}
    kind = max(matches, key=lambda kind: matches[kind])
    if not matches[kind]:
        raise ValueError(
            f"The names must be those of {', '.join(kind.__name__ for kind in TABLES)}, "
            f"got {sorted(named)[:5]}{' and more' if len(named) > 5 else ''}. {_advice(TABLES, named, side)}"
        )
    return kind


def _kind_of(module) -> type[nn.Module]:
    for kind in TABLES:
        if isinstance(module, kind):
            if getattr(module, "signed", False):
                raise ValueError(
                    "`module` must have a counterpart in the original, got a DynamicPositionBias with `signed=True`; "
                    "the original's weights are for `signed=False`."
                )
            return kind
    raise TypeError(
        f"`module` must be one of {', '.join(kind.__name__ for kind in TABLES)}, got {type(module).__name__}; "
        "convert the parts of a larger model one by one, with `prefix`."
    )


def _advice(kinds, named, side) -> str:
    """What to do about weights that do not fit."""
    prefixes = dict.fromkeys(name[: match.end()] for name in named for match in re.finditer(r"\.", name))
    fits = {prefix: _fitting(kinds, prefix, named) for prefix in ("", *prefixes)}
    best = max(fits, key=lambda prefix: fits[prefix])
    if side == "theirs" and fits[best] > fits[""]:
        return f"{fits[best]} names are right without {best!r} before them: pass `prefix={best!r}`."
    return "Give the weights of this module, or the module of these weights (`model_from_torch` builds one)."


def _fitting(kinds, prefix, named) -> int:
    """How many of the names that begin with `prefix` are right without it."""
    rest = {name.removeprefix(prefix) for name in named if name.startswith(prefix)}
    return max(len(_by_name(kind, rest, "theirs").keys() & rest) for kind in kinds)


def _has_rotary(module: Any) -> bool:
    """Whether the attention of the original's module has rotary position embedding, and so its buffers."""
    if isinstance(module, LocalTransformer):
        return not module.use_dynamic_pos_bias
    return isinstance(module, LocalMHA) and module.use_rotary_pos_emb


def _looks_forward(module: Any) -> bool:
    """Whether a window of a module looks forward with rotary; the buffers do not depend on windows."""
    if not _has_rotary(module):
        return False
    sizes = module.window_sizes() if isinstance(module, LocalTransformer) else (module.window_size,)
    windows = [
        Window(size, module.causal, module.look_backward, module.look_forward, module.exact_windowsize)
        for size in sizes
        if size is not None
    ]
    return any(window.forward for window in windows)


def _check_reference_rotary(module):
    if _looks_forward(module) and not module.reference_rotary:
        raise ValueError(
            "`module` must have `reference_rotary=True` where it looks forward with rotary, got False: the weights "
            "have learned the original's angles, which are off; set it. To train on with right angles, apply the "
            "converted variables with `module.clone(reference_rotary=False)`."
        )


def _abstract_params(module: nn.Module) -> dict[str, np.ndarray]:
    """Parameters that a module has, by path, as zeros that take no memory."""
    if isinstance(module, LocalTransformer):
        module = module.clone(scan_layers=False)  # the tables name each layer

    def init():
        if isinstance(module, DynamicPositionBias):
            return module.init(jax.random.key(0), 1, 1)
        tokens = isinstance(module, LocalTransformer) and module.num_tokens is not None
        x = jnp.zeros((1, 1), jnp.int32) if tokens else jnp.zeros((1, 1, module.dim))
        return module.init(jax.random.key(0), x)

    params: Any = nn.meta.unbox(jax.eval_shape(init)["params"])
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: np.broadcast_to(np.float32(0), x.shape) for path, x in flat.items()}


def _read_state_dict(state_dict, prefix) -> dict[str, np.ndarray]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must map names to arrays, got {type(state_dict).__name__}; "
            "pass what `safetensors.numpy.load_file` or `module.state_dict()` returns."
        )
    return {name[len(prefix) :]: _to_numpy(name, x) for name, x in state_dict.items() if name.startswith(prefix)}


def _read_variables(variables) -> dict[str, np.ndarray]:
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        raise TypeError(
            f"`variables` must be a mapping with 'params' in it, got {_describe(variables)}; "
            "pass {'params': params}, as `module.init` returns it."
        )
    params = flatten_dict(nn.meta.unbox(variables["params"]), sep="/")
    named = {path: _to_numpy(path, x) for path, x in params.items()}
    if any(path.startswith("layers/") for path in named):
        unstacked: Any = flatten_dict(unstack_layers(unflatten_dict(named, sep="/")), sep="/")
        return unstacked
    return named


def _describe(x) -> str:
    return f"one with {sorted(map(str, x))[:5]}" if isinstance(x, Mapping) else type(x).__name__


def _to_numpy(name: str, x: Any) -> np.ndarray:
    """Array of NumPy, of JAX, or, told by its methods, of PyTorch."""
    if hasattr(x, "detach") and hasattr(x, "numpy"):
        x = x.detach().cpu()
        # NumPy has no bfloat16 of its own, so PyTorch refuses it one; through float32 every bit is kept.
        x = x.float().numpy().astype(jnp.bfloat16) if str(x.dtype) == "torch.bfloat16" else x.numpy()
    if not hasattr(x, "__array__"):
        raise TypeError(
            f"{name!r} must be an array, got {type(x).__name__}; pass the mapping of names to arrays itself."
        )
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name!r} must be of a floating dtype, got {x.dtype}; undo its quantisation first.")
    return x


def _copy(x: np.ndarray) -> np.ndarray:
    """The array by itself, in its own memory and order: files and other libraries want it so."""
    return np.array(x, order="C")


def _is_inverse_frequencies(x: np.ndarray) -> bool:
    """Whether a buffer is what theta 10000 gives, within the precision of its dtype."""
    wanted = inverse_frequencies(2 * x.size)
    precision = max(1e-5, float(jnp.finfo(x.dtype).eps))
    return bool(np.allclose(x.astype(np.float32), wanted, rtol=precision, atol=1e-7))


def _global_converter(global_branch: GlobalBranch | None) -> GlobalBranch:
    if global_branch is None:
        raise ValueError(
            "`global_branch` must be given where global layers are inserted, got None; pass a function from the "
            "number of the layer and its weights to the same weights under the other side's names."
        )
    return global_branch
