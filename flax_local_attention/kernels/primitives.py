"""Primitives that are lowered to kernels or to plain code, depending on the device of the program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from flax_local_attention.kernels.pallas_triton import without_deprecation
from flax_local_attention.sharding import as_automatic, spec_of, spread_by_compiler


class Target(NamedTuple):
    """The target of a lowering: the device, and how arrays are spread over several.

    Attributes:
        platform: "cuda", "rocm", "tpu" or "cpu".
        capability: Compute capability of an NVIDIA GPU, (9, 0) say; None if it is unknown.
        is_export: Whether the program is exported: other versions of JAX, and perhaps other devices, run it.
        is_described: Whether the current abstract mesh describes the device, which then need not be on this machine.
        is_known: Whether the device is on this machine or described; always True but for TPUs.
        partition: How the compiler has yet to partition the arrays over devices: "none" if it does not, "known" if the
            mesh is known, "unknown" else.
    """

    platform: str
    capability: tuple[int, int] | None = None
    is_export: bool = False
    is_described: bool = False
    is_known: bool = True
    partition: str = "none"


def make_primitive(name: str, static: Sequence[str]) -> Primitive:
    """Make a primitive with several results; outside jit it runs as a compiled program.

    Args:
        name: Name of the primitive.
        static: Names of its parameters.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    compiled = jax.jit(primitive.bind, static_argnames=tuple(static))

    @primitive.def_impl
    def run(*arguments, **params):
        with jax.disable_jit(False):
            return compiled(*arguments, **params)

    return primitive


def instantiate(tangents: Sequence[Any]) -> list:
    """Replace symbolic zeros by arrays of zeros."""
    return [ad.instantiate_zeros(t) for t in tangents]


def differentiate_linear(
    bind: Callable, plain: Callable, primals: Sequence[Any], tangents: Sequence[Any], count: int, known: int
) -> tuple[list, list]:
    """Differentiate a primitive that is linear in its last arguments.

    Tangents of these arguments go through the primitive itself. If another argument has a tangent, all go through the
    plain code.

    Args:
        bind: The primitive, a function of all arguments.
        plain: Its plain code, a function of the list of all arguments.
        primals: Arguments: `count` arrays, results computed from them, and from `known` on the linear arguments.
        tangents: Tangents of the arguments.
        count: Number of arrays.
        known: Number of arrays and results.

    Returns:
        The results and their tangents.
    """
    results = bind(*primals)
    if all(type(t) is ad.Zero for t in tangents[:count]):
        return results, bind(*primals[:known], *instantiate(tangents[known:]))
    # The plain code computes the results from the arrays again, so the tangents of the results add nothing.
    moving = {at: t for at, t in enumerate(tangents) if type(t) is not ad.Zero and not count <= at < known}

    def differentiate(primals, tangents):
        def fn(*values):
            given = dict(zip(moving, values, strict=True))
            return tuple(plain([given.get(at, x) for at, x in enumerate(primals)]))

        return jax.jvp(fn, tuple(primals[at] for at in moving), tangents)[1]

    arrays = tuple(primals), tuple(moving.values())
    return results, list(spread_by_compiler(differentiate, arrays, lambda: tuple(map(spec_of, results))))


def lower(
    primitive: Primitive,
    choose: Callable,
    plain: Callable,
    by_kernels: Callable | None,
    spread: Callable | None = None,
):
    """Register how a primitive is lowered.

    Args:
        primitive: From `make_primitive`.
        choose: ``choose(types, target, **params)`` returns the kernels for a call, or None for the plain path.
        plain: ``plain(arrays, platform=..., **params)`` computes the primitive in plain JAX.
        by_kernels: ``by_kernels(arrays, kernels=..., **params)`` computes it by kernels. None: it has no kernels.
        spread: ``spread(types, compute, kernels=..., **params)`` returns the function of arrays that are still to be
            partitioned over devices, see `over_devices`; ``compute(arrays, **params)`` is the primitive on one device.
            If it returns None, or is None, the compiler partitions the primitive.
    """

    def compute(arrays, target, params, is_spread=False):
        """Compute the primitive, of one device's arrays or, with `is_spread`, of arrays that are to be partitioned."""
        types = [ShapedArray(x.shape, x.dtype) for x in arrays]
        kernels = None if by_kernels is None else choose(types, target, **params)
        if is_spread and spread is not None and target.platform != "tpu":
            one = target._replace(partition="none")
            fn = spread(types, lambda arrays, **own: compute(arrays, one, params | own), kernels=kernels, **params)
            if fn is not None:
                return fn(*arrays)
        if kernels is not None and by_kernels is not None:
            return by_kernels(arrays, kernels=kernels, **params)
        return plain(arrays, platform=target.platform, **params)

    def rule(ctx, *arguments, **params):
        target = _target(ctx)
        # Inside shard_map the types name a mesh that is not current during lowering, so these have no sharding.
        types = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        is_spread = target.partition == "known"
        lowered = mlir.lower_fun(
            lambda *arrays: tuple(compute(list(arrays), target, params, is_spread)), multiple_results=True
        )
        with without_deprecation(), as_automatic():
            return lowered(ctx.replace(avals_in=types), *arguments)

    for platform in ("cpu", "cuda", "rocm", "tpu", None):
        mlir.register_lowering(primitive, rule, platform=platform)


def _target(ctx) -> Target:
    """Return the target of a lowering rule."""
    module = ctx.module_context
    platform = (ctx.platforms or module.platforms)[0]
    capability = _capability() if platform == "cuda" else None
    is_export, is_described = module.lowering_parameters.for_export, _is_described(platform)
    is_known = platform != "tpu" or is_described or _has_tpu()
    return Target(platform, capability, is_export, is_described, is_known, _partition_of(module.axis_context))


@functools.cache
def _has_tpu():
    """Return whether this machine has a TPU: JAX compiles kernels only for such a TPU or a described one."""
    try:
        return bool(jax.local_devices(backend="tpu"))
    except RuntimeError:
        return False


def _is_described(platform):
    """Return whether the current abstract mesh describes a device of a platform; "gpu" there means CUDA."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform in (platform, {"cuda": "gpu"}.get(platform))


def partition_by_devices(primitives: set[Primitive]):
    """Let JAX pass the devices of a program to the lowering rules of these primitives, where there are several.

    JAX keeps a set of such primitives, and refuses to lower them for a mesh without devices.
    """
    try:
        from jax._src import dispatch, xla_bridge

        # This must not initialise the devices: a process may trace a program before it joins a cluster.
        if xla_bridge.backends_are_initialized() and _device_count() > 1:
            dispatch.prim_requires_devices_during_lowering |= primitives
    except (ImportError, AttributeError):  # these are not public: without them, a mesh gets the plain path
        return


@functools.cache
def _device_count():
    """Return the number of GPUs of all hosts or of CPU devices, whichever is larger.

    TPUs do not count: JAX does not partition their programs by our rules.
    """
    return max(len(jax.devices("cpu")), _gpu_count())


def _gpu_count():
    try:
        return len(jax.devices("cuda"))
    except RuntimeError:
        return 0


def _partition_of(context):
    """Return how the compiler has yet to partition the arrays of a program, see `Target.partition`.

    Inside ``shard_map`` it is "none" if all axes of the mesh are manual or the mesh has one device, else "unknown".
    Elsewhere it is "none" for one device, and "known" for several whose assignment to a mesh is known.
    """
    mesh = getattr(context, "mesh", None)
    if mesh is not None:  # inside shard_map
        is_local = set(context.manual_axes) == set(mesh.axis_names) or mesh.size == 1
        return "none" if is_local else "unknown"
    if context.num_devices == 1:
        return "none"
    is_known = context.device_assignment is not None and context.abstract_mesh is not None
    return "known" if is_known else "unknown"


# Compute capabilities of the devices that an abstract mesh may describe, by the beginning of their kind.
CAPABILITIES = {"NVIDIA A100": (8, 0), "NVIDIA H100": (9, 0), "NVIDIA H200": (9, 0), "NVIDIA GH200": (9, 0)}


def _capability() -> tuple[int, int] | None:
    """Return the compute capability of the GPU to compile for: the one that a mesh describes, or this machine's."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return next((found for kind, found in CAPABILITIES.items() if described.device_kind.startswith(kind)), None)
    try:
        found = jax.local_devices(backend="cuda")[0].compute_capability
    except RuntimeError:
        return None
    major, minor = str(found).split(".")
    return int(major), int(minor)
