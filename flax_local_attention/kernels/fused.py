"""Operations that are defined by plain code and have kernels for their value and their gradient.

Like attention they are three primitives, lowered to kernels where these serve, else to the plain code, which also gives
all derivatives beyond a gradient. Residuals are the arguments and the arrays that kernels save. Plain code computes
some values twice, which XLA merges.

================ ================================= ================================
primitive        arguments                         results
================ ================================= ================================
``name``         arrays                            results, saved
``name_jvp``     arrays, saved, tangents           tangents of the results
``name_vjp``     arrays, saved, cotangents         gradients of the `wanted` arrays
================ ================================= ================================

`count` is the number of arrays, `wanted` the numbers of those that a derivative is taken by, and `asked` the kernels.
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

STATIC = ("asked", "count", "wanted")


class GradientCall(NamedTuple):
    """The arguments of a gradient by kernels.

    Attributes:
        arrays: Arguments of the operation.
        saved: Arrays that the kernels of its value saved.
        cotangents: Cotangents of its results.
        wanted: Numbers of the arguments whose gradients are wanted.
    """

    arrays: Sequence[jax.Array]
    saved: Sequence[jax.Array]
    cotangents: Sequence[jax.Array]
    wanted: Sequence[int]


class RowKernels(Protocol):
    """Kernels of an operation on tokens, a hashable value."""

    @property
    def interpret(self) -> bool:
        """Whether to run on any device, slowly: for tests."""
        ...

    def problems(self, arrays: Sequence[Any]) -> list[str]:
        """Return the reasons, by shapes and dtypes, why they cannot serve a call: none if they can."""
        ...

    def axes(self, arrays: Sequence[Any], results: Sequence[Any]) -> tuple[list[Labels], list[Labels]]:
        """Return the labels by which arrays, and results and saved arrays, may be spread over devices, from shapes."""
        ...

    def forward(self, arrays: Sequence[jax.Array]) -> Sequence[jax.Array] | None:
        """Return the results and the saved arrays, or None where plain code is as fast."""
        ...

    def backward(self, call: GradientCall) -> Sequence[jax.Array] | None:
        """Return the gradients of the wanted arguments, or None to leave them to plain code."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Fused:
    """An operation on arrays, called as ``fused(kernels, *arrays)``.

    Attributes:
        name: Name of the operation.
        plain: Its definition, from arrays to a tuple of arrays, all floating.
        saved: How many of this tuple, the last ones, are no results but saved for the gradient by kernels.
    """

    name: str
    plain: Callable[..., tuple[jax.Array, ...]]
    saved: int = 0

    def __call__(self, kernels: RowKernels | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Compute the results, by these kernels where they serve; None means plain code everywhere."""
        partition_by_devices(set(self._primitives))
        arrays = tuple(vary_alike([jnp.asarray(x) for x in arrays]))
        return self._results(self._call(*arrays, asked=kernels, count=len(arrays)))

    @functools.cached_property
    def _call(self):
        """The first primitive, jitted so that like branches of a model are traced and lowered once."""
        return jax.jit(self._primitives[0].bind, static_argnames=("asked", "count"))

    @functools.cached_property
    def _primitives(self):
        """The three primitives, made when they are first used: types, derivatives, rules of vmap, and lowerings."""
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

    def _of_wanted(self, arrays, wanted):
        """Make the function from the wanted arguments to the results, and find their values.

        The other arguments are constants of the function.
        """

        def fn(*chosen):
            given = dict(zip(wanted, chosen, strict=True))
            return self._results(self.plain(*(given.get(at, x) for at, x in enumerate(arrays))))

        return fn, tuple(arrays[at] for at in wanted)

    def _plain_jvp(self, arguments, count, wanted, **_):
        """Differentiate the plain code along tangents of the wanted arguments; saved arrays are not needed."""
        fn, chosen = self._of_wanted(arguments[:count], wanted)
        return jax.jvp(fn, chosen, tuple(arguments[count + self.saved :]))[1]

    def _plain_vjp(self, arguments, count, wanted, **_):
        """Compute gradients of the wanted arguments by the plain code; saved arrays are not needed."""
        fn, chosen = self._of_wanted(arguments[:count], wanted)
        return jax.vjp(fn, *chosen)[1](tuple(arguments[count + self.saved :]))

    # Derivatives

    def _differentiate(self, primals, tangents, *, asked, count):
        """Give values and their tangents: the rule of the first primitive, which binds the second.

        Arguments whose tangents are not known to be zero are wanted. Saved arrays have no tangent: nothing but a
        gradient reads them.
        """
        value, jvp, _ = self._primitives
        values = value.bind(*primals, asked=asked, count=count)
        along = {at: t for at, t in enumerate(tangents) if type(t) is not ad.Zero}
        d_values = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in values]
        if along:
            saved = values[len(values) - self.saved :]
            d_results = jvp.bind(*primals, *saved, *along.values(), asked=asked, count=count, wanted=tuple(along))
            d_values[: len(d_results)] = d_results
        return values, d_values

    def _differentiate_again(self, primitive, plain, primals, tangents, *, count, **params):
        """Differentiate the second or third primitive, which are linear in what follows arrays and saved ones."""
        params["count"] = count
        bind, plain = functools.partial(primitive.bind, **params), functools.partial(plain, **params)
        return differentiate_linear(bind, plain, primals, tangents, count, count + self.saved)

    def _transpose_jvp(self, cotangents, *arguments, count, **params):
        """Turn cotangents of the results' tangents into gradients: bind the third primitive."""
        known = count + self.saved
        if all(type(t) is ad.Zero for t in cotangents):
            return [None] * known + [ad.Zero(x.aval) for x in arguments[known:]]
        along = instantiate(cotangents)
        return [None] * known + self._primitives[2].bind(*arguments[:known], *along, count=count, **params)

    def _transpose_vjp(self, cotangents, *arguments, count, **params):
        """Turn cotangents of gradients into tangents of the results: bind the second primitive."""
        known, along = count + self.saved, instantiate(cotangents)
        return [None] * known + self._primitives[1].bind(*arguments[:known], *along, count=count, **params)

    # Kernels

    def _by_kernels(self, arrays, kernels, **_):
        """Compute results and saved arrays by kernels, or by plain code where the kernels say that it is as fast."""
        values = kernels.forward(arrays)
        return self.plain(*arrays) if values is None else values

    def _vjp_by_kernels(self, arguments, kernels, count, wanted, **_):
        arrays, saved, cotangents = arguments[:count], arguments[count:][: self.saved], arguments[count + self.saved :]
        found = kernels.backward(GradientCall(arrays, saved, cotangents, wanted))
        return self._plain_vjp(arguments, count=count, wanted=wanted) if found is None else found

    # Over devices: kernels run for the tokens that each has; the compiler spreads plain code

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
    """Map the plain code: mapped calls have no kernels."""
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
    mapped = jax.vmap(lambda *values: tuple(plain(values, **params)), tuple(axes), axis_size=size)
    results = mapped(*arguments)
    return results, [0] * len(results)


def _choose(types, target: Target, *, asked, count, **_):
    """Return the kernels that serve a call, or None for the plain code.

    They serve on NVIDIA GPUs of compute capability 8.0 or more, or interpreted anywhere. Exported programs, and meshes
    whose partition is not known, get the plain code.
    """
    if asked is None or target.is_export or target.partition == "unknown":
        return None
    is_new_enough = target.platform == "cuda" and (target.capability or (0, 0)) >= (8, 0)
    if not (is_new_enough or asked.interpret) or not is_available() or asked.problems(types[:count]):
        return None
    return asked
