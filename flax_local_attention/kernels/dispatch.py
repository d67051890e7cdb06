"""Attention as JAX primitives, lowered to fused kernels or to the plain path by the device of the program.

There are three primitives: attention, its derivative along tangents (forward mode), and the gradients of its operands
(reverse mode).

| primitive | arguments | results |
| --- | --- | --- |
| `attend_p` | arrays | out, largest, total |
| `attend_jvp_p` | arrays; out, largest, total; tangents | d_out, d_total |
| `attend_vjp_p` | arrays; out, largest, total; d_out and, unless it is zero, d_total | gradients of `wanted` arrays |

Arrays are the operands that a call was given, named by `_Call.names`. The last two primitives are linear in the
arguments that follow the results, and each is the other's transpose. To take a gradient, JAX binds the second by
`_differentiate`, and transposes it to the third by `_transpose_jvp`.

Kernels serve the first and the third. The plain path serves all other calls, and all derivatives beyond a gradient.
The device is known only when a program is lowered: `_choose` picks the kernels there, so one traced program serves any
device.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad, batching
from jax.sharding import NamedSharding, PartitionSpec

from flax_local_attention.kernels.borders import (
    SIDES,
    InParts,
    PlainPart,
    fetch_borders,
    has_borders,
    join_borders,
    part_shapes,
    problems_of_shards,
)
from flax_local_attention.kernels.contract import Unsupported
from flax_local_attention.kernels.devices import over_devices
from flax_local_attention.kernels.primitives import (
    Target,
    differentiate_linear,
    instantiate,
    lower,
    make_primitive,
    partition_by_devices,
)
from flax_local_attention.kernels.windowed import Windowed
from flax_local_attention.operands import OF_TOKENS, Border, Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.sharding import vary_alike
from flax_local_attention.softmax import LOG_SUM, LogSum

# Name of the output for `jax.checkpoint_policies`: kernels keep it for the gradient, beside the log-sum-exp, `LOG_SUM`.
RESULT = "local_attention_result"

DIFFERENTIABLE = ("q", "k", "v", "bias", "scale", "sink")
DIFFERENTIABLE_BORDERS = tuple(f"{side}.{name}" for side in SIDES for name in ("k", "v"))


class Results(NamedTuple):
    """The results of attention and their cotangents, from which a gradient is computed.

    Attributes:
        out: The output of each query.
        log_sum: The log-sum-exp of each query.
        d_out: Cotangent of the output.
        d_total: Cotangent of the log-sum-exp's total; None if it is zero.
        wanted: Names of the operands whose gradients are wanted.
    """

    out: jax.Array
    log_sum: LogSum
    d_out: jax.Array
    d_total: jax.Array | None
    wanted: tuple[str, ...]


class Kernels(Protocol):
    """A family of fused kernels, such as `Triton`."""

    def forward(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`."""
        ...

    def backward(self, operands: Operands, options: AttentionOptions, results: Results) -> dict[str, jax.Array]:
        """Return the gradients of the wanted operands, from the results of attention."""
        ...


class Chooser(Protocol):
    """A hashable value that chooses the kernels of a call."""

    def choose(self, operands: Operands, options: AttentionOptions, target: Target) -> Kernels | None:
        """Return the kernels for a call, or None for the plain path; the operands are shapes.

        Raises:
            Unsupported: The call asks for kernels that the target cannot run.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call: the names of its operands, a known offset, its options, and its chooser."""

    names: tuple[str, ...]
    q_offset: int | None
    options: AttentionOptions
    chooser: Chooser

    def operands(self, arrays, chosen: Mapping[str, Any] | None = None) -> Operands:
        """Return the arrays as operands, with those in `chosen`, by name, in place of their own."""
        given = dict(zip(self.names, arrays, strict=True)) | dict(chosen or {})
        fields: dict[str, Any] = {"q_offset": self.q_offset}
        for side in SIDES:
            border = {name.removeprefix(f"{side}."): given.pop(name) for name in self.names if name.startswith(side)}
            fields[side] = Border(**border) if border else None
        return Operands(**fields | given)


def attend_by(chooser: Chooser, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
    """Attend by the kernels that are chosen when the program is lowered."""
    partition_by_devices({attend_p, attend_jvp_p, attend_vjp_p})
    if options.precision is None:  # JAX's products read the default when they are traced, not when they are lowered
        default = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        options = options if default is None else dataclasses.replace(options, precision=default)
    offset = operands.q_offset
    given = {name: x for name, x in _by_name(operands) if x is not None and not isinstance(x, int)}
    if not isinstance(offset, int):
        given["q_offset"] = jnp.asarray(offset, jnp.int32)
    call = _Call(tuple(given), offset if isinstance(offset, int) else None, options, chooser)
    out, largest, total = _attend(vary_alike(list(given.values())), call)
    return out, LogSum(largest, total)


def _by_name(operands):
    """Yield the operands by name; a border's have names such as "before.k"."""
    for name, x in operands._asdict().items():
        if isinstance(x, Border):
            yield from ((f"{name}.{field}", y) for field, y in x._asdict().items())
        else:
            yield name, x


# Jitted, so that equal layers of a model are traced, differentiated and lowered once.
@functools.partial(jax.jit, static_argnames="call")
def _attend(arrays, call):
    """Bind the first primitive."""
    return tuple(attend_p.bind(*arrays, call=call))


STATIC = ("call", "wanted", "has_d_total")
attend_p = make_primitive("local_attention", STATIC)  # arrays -> out, largest, total
attend_jvp_p = make_primitive("local_attention_jvp", STATIC)  # arrays, out, largest, total, tangents -> d_out, d_total
attend_vjp_p = make_primitive(
    "local_attention_vjp", STATIC
)  # arrays, out, largest, total, d_out[, d_total] -> gradients


class _Arguments(NamedTuple):
    """The arguments of the second or third primitive: operands, results of attention, and tangents or cotangents.

    The primitive is linear in the last ones.
    """

    arrays: list
    results: list
    linear: list

    @classmethod
    def of(cls, call: _Call, arguments) -> "_Arguments":
        """Split a primitive's arguments: one array for each name of the call, three results, and the rest."""
        count = len(call.names)
        return cls(list(arguments[:count]), list(arguments[count : count + 3]), list(arguments[count + 3 :]))


# Types


def _result_types(arrays, call):
    """Return the types of out, in q's dtype, and of largest and total, ``[b, h, g, n]`` in float32 or wider."""
    operands = call.operands(arrays)
    q, rows = operands.q, operands.q.shape[:-1]
    sums = _like(q, rows, operands.dtype)
    return _like(q, (*rows, operands.v.shape[-1]), q.dtype), sums, sums


def _like(aval, shape, dtype):
    """Make the type of an array of this shape and dtype whose axes are sharded like the first axes of another."""
    spec = PartitionSpec(*tuple(aval.sharding.spec)[: len(shape)])
    return aval.update(shape=shape, dtype=dtype, sharding=NamedSharding(aval.sharding.mesh, spec), weak_type=False)


attend_p.def_abstract_eval(lambda *arrays, call: _result_types(arrays, call))


@attend_jvp_p.def_abstract_eval
def _attend_jvp_types(*arguments, call, wanted):
    """Return the types of the tangents of out and total."""
    out, _, total = _result_types(_Arguments.of(call, arguments).arrays, call)
    return out, total


@attend_vjp_p.def_abstract_eval
def _attend_vjp_types(*arguments, call, wanted, has_d_total):
    """Return the types of the gradients, which are those of the wanted arrays, in the order of the call."""
    return [x for name, x in zip(call.names, arguments, strict=False) if name in wanted]


# The plain path, which defines all three primitives


def _plain(arrays, call, platform=None):
    """Attend by `Windowed`; return out, largest and total."""
    out, log_sum = Windowed().on_platform(join_borders(call.operands(arrays)), call.options, platform)
    return out, *log_sum


def _function_of_wanted(arrays, call, wanted, platform=None, log_sum=None):
    """Return the function from the wanted operands to the output and the total, and its arguments.

    The other operands are constants of the function.
    """

    def fn(chosen):
        out, sums = Windowed().on_platform(join_borders(call.operands(arrays, chosen)), call.options, platform, log_sum)
        return out, sums.total

    return fn, {name: x for name, x in zip(call.names, arrays, strict=True) if name in wanted}


def _plain_jvp(arguments, call, wanted, platform=None):
    """Compute d_out and d_total by differentiating the plain path along the tangents of the wanted operands."""
    arrays, _, tangents = _Arguments.of(call, arguments)
    fn, chosen = _function_of_wanted(arrays, call, wanted, platform)
    return jax.jvp(fn, (chosen,), (dict(zip(wanted, tangents, strict=True)),))[1]


def _plain_vjp(arguments, call, wanted, has_d_total, platform=None, reuses_log_sum=False):
    """Compute gradients; with `reuses_log_sum`, which recomputes no log-sum-exp, they must not be differentiated."""
    arrays, (_, *log_sum), cotangents = _Arguments.of(call, arguments)
    fn, chosen = _function_of_wanted(arrays, call, wanted, platform, LogSum(*log_sum) if reuses_log_sum else None)
    results, pull_back = jax.vjp(fn, chosen)
    d_total = cotangents[1] if has_d_total else jnp.zeros_like(results[1])
    gradients = pull_back((cotangents[0], d_total))[0]
    return [gradients[name] for name in call.names if name in wanted]


# Derivatives


def _differentiate(primals, tangents, *, call):
    """Compute attention and its tangents: the rule of the first primitive.

    Out, largest and total are the residuals of a gradient, so they are named for `jax.checkpoint_policies`. The wanted
    operands are the differentiable ones whose tangent is not zero. The largest score has no tangent, see `LogSum`.
    """
    out, largest, total = attend_p.bind(*primals, call=call)
    out = checkpoint_name(out, RESULT)
    largest, total = checkpoint_name(largest, LOG_SUM), checkpoint_name(total, LOG_SUM)
    moving = {name: t for name, t in zip(call.names, tangents, strict=True) if type(t) is not ad.Zero}
    wanted = tuple(name for name in call.names if name in moving and name in (*DIFFERENTIABLE, *DIFFERENTIABLE_BORDERS))
    d_largest = ad.Zero(jax.typeof(largest))
    if not wanted:
        return (out, largest, total), (ad.Zero(jax.typeof(out)), d_largest, ad.Zero(jax.typeof(total)))
    d_out, d_total = attend_jvp_p.bind(
        *primals, out, largest, total, *(moving[name] for name in wanted), call=call, wanted=wanted
    )
    return (out, largest, total), (d_out, d_largest, d_total)


ad.primitive_jvps[attend_p] = _differentiate


def _differentiate_again(primitive, plain):
    """Register the derivative of the second or third primitive, which is linear in the arguments after the results."""

    def rule(primals, tangents, *, call, **params):
        bind = functools.partial(primitive.bind, call=call, **params)
        plain_call, count = functools.partial(plain, call=call, **params), len(call.names)
        return differentiate_linear(bind, plain_call, primals, tangents, count, count + 3)

    ad.primitive_jvps[primitive] = rule


_differentiate_again(attend_jvp_p, _plain_jvp)
_differentiate_again(attend_vjp_p, _plain_vjp)


def _transpose_jvp(cotangents, *arguments, call, wanted):
    """Turn the cotangents of d_out and d_total into gradients of the wanted operands by the third primitive.

    The cotangent of the total is zero in most calls. It is then left out, and kernels skip its term.
    """
    d_out, d_total = cotangents
    known, linear = arguments[: len(call.names) + 3], arguments[len(call.names) + 3 :]
    has_d_total = type(d_total) is not ad.Zero
    if type(d_out) is ad.Zero and not has_d_total:
        gradients = [ad.Zero(x.aval) for x in linear]
    else:
        given = [ad.instantiate_zeros(d_out), *([d_total] if has_d_total else [])]
        gradients = attend_vjp_p.bind(*known, *given, call=call, wanted=wanted, has_d_total=has_d_total)
    return [None] * len(known) + list(gradients)


def _transpose_vjp(cotangents, *arguments, call, wanted, has_d_total):
    """Turn the cotangents of gradients into those of d_out and d_total by the second primitive."""
    known = arguments[: len(call.names) + 3]
    d_out, d_total = attend_jvp_p.bind(*known, *instantiate(cotangents), call=call, wanted=wanted)
    return [None] * len(known) + [d_out, *([d_total] if has_d_total else [])]


def _transpose_attention(cotangents, *arguments, call):
    """Transpose attention as a linear function of the values."""
    at = call.names.index("v")
    if [index for index, x in enumerate(arguments) if ad.is_undefined_primal(x)] != [at]:
        raise NotImplementedError(
            "Attention must be transposed as a function of `v`, the only operand that it is linear in, got others; "
            "take a gradient by `jax.vjp`."
        )
    values = arguments[at].aval
    zeros = jnp.zeros(values.shape, values.dtype)
    known = [zeros if index == at else x for index, x in enumerate(arguments)]
    results = attend_p.bind(*known, call=call)
    d_out = ad.instantiate_zeros(cotangents[0])
    (d_v,) = attend_vjp_p.bind(*known, *results, d_out, call=call, wanted=("v",), has_d_total=False)
    return [d_v if index == at else None for index in range(len(arguments))]


ad.primitive_transposes[attend_p] = _transpose_attention
ad.primitive_transposes[attend_jvp_p] = _transpose_jvp
ad.primitive_transposes[attend_vjp_p] = _transpose_vjp


# vmap: a mapped axis becomes part of b


def _batch(primitive, plain):
    """Register the rule of a primitive under vmap: it folds the mapped axis into b, ``[size b, ...]``.

    Kernels thus serve mapped calls too. An operand that rows share stays as it is, unless it is mapped or
    differentiated. Where axes cannot be folded (a mapped offset, no rows, symbolic sizes), the plain path is mapped.
    """

    def rule(arguments, axes, *, call, **params):
        size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
        names = dict(zip(call.names, range(len(call.names)), strict=True))
        # All rows are cut into blocks by one offset, and `over_heads` needs known sizes.
        is_offset_mapped = "q_offset" in names and axes[names["q_offset"]] is not None
        if is_offset_mapped or size == 0 or not all(isinstance(length, int) for x in arguments for length in x.shape):
            mapped = jax.vmap(lambda *values: tuple(plain(values, call, **params)), tuple(axes), axis_size=size)
            results = mapped(*arguments)
            return results, [0] * len(results)
        moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(arguments, axes, strict=True)]
        rows = [x.shape[0 if axis is None else 1] if x.ndim else 0 for x, axis in zip(moved, axes, strict=True)]
        b, wanted = rows[names["q"]], params.get("wanted", ())
        may_share = {
            at for name, at in names.items() if name.split(".")[-1] not in ("q", "k", "v") and name not in wanted
        }
        folded = [
            x if axis is None and (rows[at] == 0 or (rows[at] == 1 and at in may_share)) else _fold(x, axis, size, b)
            for at, (x, axis) in enumerate(zip(moved, axes, strict=True))
        ]
        results = [x.reshape(size, b, *x.shape[1:]) for x in primitive.bind(*folded, call=call, **params)]
        if primitive is attend_vjp_p:  # the gradient of a shared operand is summed over the rows that share it
            own = [rows[at] for name, at in names.items() if name in wanted]
            results = [x.sum(1, keepdims=True) if count < b else x for x, count in zip(results, own, strict=True)]
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = rule


def _fold(x, axis, size, b):
    """Fold ``[size, b or 1, ...]``, or ``[b or 1, ...]`` where no axis is mapped, to ``[size b, ...]``."""
    x = x[None] if axis is None else x
    return jnp.broadcast_to(x, (size, b, *x.shape[2:])).reshape(size * b, *x.shape[2:])


_batch(attend_p, _plain)
_batch(attend_jvp_p, _plain_jvp)
_batch(attend_vjp_p, _plain_vjp)


# Lowering


def _by_kernels(arguments, call, kernels):
    """Attend by kernels; return out, largest and total."""
    out, log_sum = kernels.forward(call.operands(arguments), call.options)
    return out, *log_sum


def _vjp_by_kernels(arguments, call, kernels, wanted, has_d_total):
    """Compute the gradients of the wanted operands by kernels, in the order of the call."""
    arrays, (out, *log_sum), cotangents = _Arguments.of(call, arguments)
    results = Results(out, LogSum(*log_sum), cotangents[0], cotangents[1] if has_d_total else None, wanted)
    gradients = kernels.backward(call.operands(arrays), call.options, results)
    return [gradients[name] for name in call.names if name in wanted]


def _choose(avals, target, call, **params):
    """Ask the call's chooser for kernels; None means the plain path.

    Where a shard's own keys have kernels, each border gets its kernels too, or else the plain path.
    """
    operands = call.operands(avals[: len(call.names)])
    choose = functools.partial(call.chooser.choose, options=call.options, target=target)
    if not has_borders(operands):
        return choose(operands)
    whole, *borders = part_shapes(operands)
    found = choose(whole)
    return found and InParts((found, *(_choose_for_border(choose, border, target) for border in borders)))


def _choose_for_border(choose, operands, target):
    """Choose kernels for the keys of a border, or the plain path if none can serve them."""
    try:
        return choose(operands) or PlainPart(target.platform)
    except Unsupported:
        return PlainPart(target.platform)


# Partitioning over devices, by rows, heads and tokens


def _labels(call, types, more=()):
    """Label the axes of the operands of a call, and of the arguments that follow them.

    Args:
        call: The call.
        types: Types of all arguments.
        more: For each argument after the operands, how many of q's leading axes it has.
    """
    shapes = dict(zip(call.names, (x.shape for x in types), strict=False))
    sizes = shapes["q"]
    is_square = call.q_offset == 0 and sizes[-2] == shapes["k"][-2]

    def of(name, shape):
        lead = [label if size == whole > 1 else None for label, size, whole in zip("bh", shape, sizes, strict=False)]
        labels = lead + [None] * (len(shape) - len(lead))
        if name in OF_TOKENS and is_square:
            labels[OF_TOKENS[name]] = "n"
        return tuple(labels)

    own = [of(name, shape) for name, shape in shapes.items()]
    return own + [of("q", sizes)[:count] for count in more]


def _may_spread(call, types):
    """Return the function that says whether a label may be spread over this many shards."""
    operands = call.operands(types[: len(call.names)])

    def may_spread(label, shards):
        if label != "n":
            return True
        if operands.dropout_seed is not None:  # dropout hashes the positions of tokens in the whole sequence
            return False
        is_cut_evenly = operands.q.shape[-2] % shards == 0
        return is_cut_evenly and not problems_of_shards(operands, call.options, shards)

    return may_spread


def _with_borders(call, arrays, over):
    """Fetch the borders of a shard; return the arrays, and the call, with the borders among its operands."""
    operands = call.operands(arrays)
    if "n" in over:
        operands = fetch_borders(operands, call.options.window, over["n"])
    given = {name: x for name, x in _by_name(operands) if x is not None and not isinstance(x, int)}
    return list(given.values()), dataclasses.replace(call, names=tuple(given))


def _spread(types, compute, kernels, call):
    """Make attention of whole arrays; each device attends to the rows, heads and tokens that it has."""

    def run(values, over):
        arrays, own = _with_borders(call, values, over)
        return compute(arrays, call=own)

    labels = _labels(call, types)
    q = labels[call.names.index("q")]
    return over_devices(run, labels, [q, q[:-1], q[:-1]], _may_spread(call, types))


def _spread_vjp(types, compute, kernels, call, wanted, has_d_total):
    """Make the gradients of whole arrays; each device sends the gradients of fetched keys back to their shards."""

    def run(values, over):
        arrays, rest = list(values[: len(call.names)]), values[len(call.names) :]
        keys = [at for at, name in enumerate(call.names) if name in ("k", "v")]

        def fetch(pair):
            given = [pair[keys.index(at)] if at in keys else x for at, x in enumerate(arrays)]
            found, own = _with_borders(call, given, over)
            chosen = {name: x for name, x in zip(own.names, found, strict=True) if name.split(".")[-1] in ("k", "v")}
            return chosen, (found, own)

        chosen, pull_back, (found, own) = jax.vjp(fetch, [arrays[at] for at in keys], has_aux=True)
        asked = tuple(
            name for name in own.names if name in wanted or (name in chosen and name.split(".")[-1] in wanted)
        )
        gradients = dict(
            zip(asked, compute([*found, *rest], call=own, wanted=asked, has_d_total=has_d_total), strict=True)
        )
        zeros = {name: jnp.zeros_like(x) for name, x in chosen.items() if name not in gradients}
        (pair,) = pull_back({name: (gradients | zeros)[name] for name in chosen})
        gradients |= {call.names[at]: x for at, x in zip(keys, pair, strict=True)}
        return [gradients[name] for name in call.names if name in wanted]

    labels = _labels(call, types, (5, 4, 4, 5, 4)[: len(types) - len(call.names)])
    results = [label for name, label in zip(call.names, labels, strict=False) if name in wanted]
    return over_devices(run, labels, results, _may_spread(call, types))


lower(attend_p, _choose, _plain, _by_kernels, _spread)
lower(attend_jvp_p, _choose, _plain_jvp, None)
lower(attend_vjp_p, _choose, functools.partial(_plain_vjp, reuses_log_sum=True), _vjp_by_kernels, _spread_vjp)
