"""Operations that are defined in plain JAX and have kernels for their value and their gradient.

An operation is three primitives, as attention is in `dispatch`. They are lowered to kernels where these serve a call,
else to the plain code, which also computes all derivatives beyond a gradient. The residuals of a gradient are the
arguments and the arrays that the kernels save. The plain code computes some values twice; XLA merges them.

| primitive | arguments | results |
| --- | --- | --- |
| `name` | arrays | results, saved |
| `name_jvp` | arrays, saved, tangents | tangents of the results |
| `name_vjp` | arrays, saved, cotangents | gradients of the `wanted` arrays |

Their parameters are `requested`, the kernels to use; `count`, the number of arrays; and `wanted`, the indices of the
arrays to differentiate by.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from flax_local_attention.kernels.devices import Labels, over_devices
from flax_local_attention.kernels.pallas_triton import is_available
from flax_local_attention.kernels.primitives import (
    Target,
    differentiate_linear,
    instantiate,
    lower,
    make_primitive,
    partition_by_devices,
)
from flax_local_attention.sharding import vary_alike

STATIC = ("requested", "count", "wanted")


class GradientCall(NamedTuple):
    """The arguments of a gradient by kernels.

    Attributes:
        arrays: Arguments of the operation.
        saved: Arrays that the forward kernels saved.
        cotangents: Cotangents of the results.
        wanted: Indices of the arguments whose gradients are wanted.
    """

    arrays: Sequence[jax.Array]
    saved: Sequence[jax.Array]
    cotangents: Sequence[jax.Array]
    wanted: Sequence[int]


class RowKernels(Protocol):
    """The kernels of a token-wise operation; a hashable value."""

    @property
    def interpret(self) -> bool:
        """Whether to interpret the kernels on any device; slow, for tests."""
        ...

    def problems(self, arrays: Sequence[Any]) -> list[str]:
        """Return the reasons why they cannot serve a call of these shapes and dtypes; empty if they can."""
        ...

    def axes(self, arrays: Sequence[Any], results: Sequence[Any]) -> tuple[list[Labels], list[Labels]]:
        """Label the axes that may be spread over devices, of the arrays and of results and saved arrays together."""
        ...

    def forward(self, arrays: Sequence[jax.Array]) -> Sequence[jax.Array] | None:
        """Compute the results and the saved arrays; None leaves a call to plain code that is as fast."""
        ...

    def backward(self, call: GradientCall) -> Sequence[jax.Array] | None:
        """Compute the gradients of the wanted arguments; None leaves them to plain code."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Fused:
    """An operation on arrays, called as ``fused(kernels, *arrays)``.

    Attributes:
        name: Name of the operation.
        plain: Its definition, from arrays to a tuple of floating arrays.
        saved: How many arrays at the end of this tuple are not results: they are saved for the backward kernels.
    """

    name: str
    plain: Callable[..., tuple[jax.Array, ...]]
    saved: int = 0

    def __call__(self, kernels: RowKernels | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Compute the results by these kernels where they can serve the call; None means plain code everywhere."""
        partition_by_devices(set(self._primitives))
        arrays = tuple(vary_alike([jnp.asarray(x) for x in arrays]))
        return self._results(self._call(*arrays, requested=kernels, count=len(arrays)))

    @functools.cached_property
    def _call(self):
        """The first primitive, jitted so that equal branches of a model are traced and lowered once."""
        return jax.jit(self._primitives[0].bind, static_argnames=("requested", "count"))

    @functools.cached_property
    def _primitives(self):
        """The three primitives with their types, derivatives, vmap rules and lowerings; made on first use."""
        value, jvp, vjp = (make_primitive(self.name + suffix, STATIC) for suffix in ("", "_jvp", "_vjp"))
        traced = jax.jit(self.plain)

        def types(*avals, count, **_):
            return traced.trace(*avals[:count]).jaxpr.out_avals

        value.def_abstract_eval(types)  # arrays -> results, saved
        jvp.def_abstract_eval(
            lambda *avals, **params: self._results(types(*avals, **params))
        )  # arrays, saved, tangents
        vjp.def_abstract_eval(lambda *avals, wanted, **_: [avals[at] for at in wanted])  # arrays, saved, cotangents
        ad.primitive_jvps[value] = self._differentiate
        ad.primitive_jvps[jvp] = functools.partial(self._differentiate_again, jvp, self._plain_jvp)
        ad.primitive_jvps[vjp] = functools.partial(self._differentiate_again, vjp, self._plain_vjp)
        ad.primitive_transposes[jvp] = self._transpose_jvp
        ad.primitive_transposes[vjp] = self._transpose_vjp
        for primitive, plain, by_kernels, spread in (
            (value, self._plain, self._by_kernels, self._spread),
            (jvp, self._plain_jvp, None, None),
            (vjp, self._plain_vjp, self._vjp_by_kernels, self._spread_vjp),
        ):
            batching.primitive_batchers[primitive] = functools.partial(_batch, plain)
            lower(primitive, _choose, plain, by_kernels, spread)
        return value, jvp, vjp

    def _results(self, values):
        """Return the results without the saved arrays."""
        return tuple(values[: len(values) - self.saved])

    # The plain code of each primitive

    def _plain(self, arrays, **_):
        return self.plain(*arrays)

    def _function_of_wanted(self, arrays, wanted):
        """Return the function from the wanted arguments to the results, and its arguments.

        The other arguments are constants of the function.
        """

        def fn(*chosen):
            given = dict(zip(wanted, chosen, strict=True))
            return self._results(self.plain(*(given.get(at, x) for at, x in enumerate(arrays))))

        return fn, tuple(arrays[at] for at in wanted)

    def _plain_jvp(self, arguments, count, wanted, **_):
        """Differentiate the plain code along the tangents of the wanted arguments; the saved arrays are not used."""
        fn, chosen = self._function_of_wanted(arguments[:count], wanted)
        return jax.jvp(fn, chosen, tuple(arguments[count + self.saved :]))[1]

    def _plain_vjp(self, arguments, count, wanted, **_):
        """Compute the gradients of the wanted arguments by the plain code; the saved arrays are not used."""
        fn, chosen = self._function_of_wanted(arguments[:count], wanted)
        return jax.vjp(fn, *chosen)[1](tuple(arguments[count + self.saved :]))

    # Derivatives

    def _differentiate(self, primals, tangents, *, requested, count):
        """Compute values and tangents: the rule of the first primitive, which binds the second.

        The wanted arguments are those whose tangent is not zero. Saved arrays have no tangent: only backward kernels
        read them.
        """
        value, jvp, _ = self._primitives
        values = value.bind(*primals, requested=requested, count=count)
        moving = {at: t for at, t in enumerate(tangents) if type(t) is not ad.Zero}
        d_values = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in values]
        if moving:
            saved = values[len(values) - self.saved :]
            d_results = jvp.bind(
                *primals, *saved, *moving.values(), requested=requested, count=count, wanted=tuple(moving)
            )
            d_values[: len(d_results)] = d_results
        return values, d_values

    def _differentiate_again(self, primitive, plain, primals, tangents, *, count, **params):
        """Differentiate the second or third primitive, which is linear in the arguments after the saved arrays."""
        params["count"] = count
        bind, plain = functools.partial(primitive.bind, **params), functools.partial(plain, **params)
        return differentiate_linear(bind, plain, primals, tangents, count, count + self.saved)

    def _transpose_jvp(self, cotangents, *arguments, count, **params):
        """Turn the cotangents of the results' tangents into gradients by the third primitive."""
        known = count + self.saved
        if all(type(t) is ad.Zero for t in cotangents):
            return [None] * known + [ad.Zero(x.aval) for x in arguments[known:]]
        given = (*arguments[:known], *instantiate(cotangents))
        return [None] * known + self._primitives[2].bind(*given, count=count, **params)

    def _transpose_vjp(self, cotangents, *arguments, count, **params):
        """Turn the cotangents of gradients into tangents of the results by the second primitive."""
        known = count + self.saved
        given = (*arguments[:known], *instantiate(cotangents))
        return [None] * known + self._primitives[1].bind(*given, count=count, **params)

    # Kernels

    def _by_kernels(self, arrays, kernels, **_):
        """Compute results and saved arrays by the kernels, or by plain code where they leave the call to it."""
        values = kernels.forward(arrays)
        return self.plain(*arrays) if values is None else values

    def _vjp_by_kernels(self, arguments, kernels, count, wanted, **_):
        arrays, saved, cotangents = arguments[:count], arguments[count:][: self.saved], arguments[count + self.saved :]
        found = kernels.backward(GradientCall(arrays, saved, cotangents, wanted))
        return self._plain_vjp(arguments, count=count, wanted=wanted) if found is None else found

    # Partitioning over devices: kernels run on each device's tokens; the compiler partitions plain code

    def _axes(self, kernels, arrays):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        return kernels.axes(shapes, jax.eval_shape(self.plain, *shapes))

    def _spread(self, types, compute, kernels, **_):
        if kernels is None:
            return None
        return over_devices(lambda values, over: compute(list(values)), *self._axes(kernels, types))

    def _spread_vjp(self, types, compute, kernels, count, wanted, **_):
        if kernels is None:
            return None
        arguments, results = self._axes(kernels, types[:count])
        outs, saved = results[: len(results) - self.saved], results[len(results) - self.saved :]
        given, wanted = [*arguments, *saved, *outs], [arguments[at] for at in wanted]
        return over_devices(lambda values, over: compute(list(values)), given, wanted)


def _batch(plain, arguments, axes, **params):
    """Map the plain code: no kernels serve a call under vmap."""
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
    mapped = jax.vmap(lambda *values: tuple(plain(values, **params)), tuple(axes), axis_size=size)
    results = mapped(*arguments)
    return results, [0] * len(results)


def _choose(types, target: Target, *, requested, count, **_):
    """Return the kernels that serve a call, or None for the plain code.

    Kernels run on NVIDIA GPUs of compute capability 8.0 or more, or interpreted anywhere. Exported programs, and meshes
    whose partition is unknown, get the plain code.
    """
    if requested is None or target.is_export or target.partition == "unknown":
        return None
    is_new_enough = target.platform == "cuda" and (target.capability or (0, 0)) >= (8, 0)
    if not (is_new_enough or requested.interpret) or not is_available() or requested.problems(types[:count]):
        return None
    return requested
