"""Primitives that are lowered to kernels or to plain code, by the device that a program is lowered for."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from flax_local_attention.kernels.pallas_triton import without_deprecation
from flax_local_attention.sharding import spec_of, spread_by_compiler


class Target(NamedTuple):
    """The target of a lowering: the device, and how arrays are spread over several.

    Attributes:
        platform: "cuda", "rocm", "tpu" or "cpu".
        capability: Compute capability of an NVIDIA GPU, (9, 0) say; None if it is not known.
        is_export: Whether the program is exported: other versions of JAX, and perhaps other devices, run it.
        is_described: Whether the current abstract mesh has the device, which need not be on this machine.
        is_known: Whether the device is on this machine or described; not asked for GPUs, which have `capability`.
        partition: How its arrays are still to be spread over devices: "none" of them, by the compiler on a mesh that is
            "known", or in a way that is "unknown" here.
    """

    platform: str
    capability: tuple[int, int] | None = None
    is_export: bool = False
    is_described: bool = False
    is_known: bool = True
    partition: str = "none"


def make_primitive(name: str, static: Sequence[str]) -> Primitive:
    """Make a primitive with several results that runs by itself as a compiled program; `static` are its parameters."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    compiled = jax.jit(primitive.bind, static_argnames=tuple(static))

    @primitive.def_impl
    def run(*arguments, **params):
        with jax.disable_jit(False):
            return compiled(*arguments, **params)

    return primitive


def instantiate(tangents: Sequence[Any]) -> list:
    """Replace tangents that are known to be zero by arrays of zeros."""
    return [ad.instantiate_zeros(t) for t in tangents]


def differentiate_linear(
    bind: Callable, plain: Callable, primals: Sequence[Any], tangents: Sequence[Any], count: int, known: int
) -> tuple[list, list]:
    """Differentiate a primitive that is linear in its last arguments.

    Tangents of these arguments go through the primitive itself, tangents of others through its plain code.

    Args:
        bind: The primitive, a function of all arguments.
        plain: Its plain code, a function of a list of all arguments.
        primals: Arguments: arrays, results computed from them, and from `known` on those that it is linear in.
        tangents: Their tangents.
        count: How many arguments are arrays.
        known: How many are arrays or results.

    Returns:
        The results and their tangents.
    """
    results = bind(*primals)
    if all(type(t) is ad.Zero for t in tangents[:count]):
        return results, bind(*primals[:known], *instantiate(tangents[known:]))
    # Results follow from the arrays, so their tangents add nothing.
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
        choose: ``choose(types, target, **params)`` returns the kernels for a call, None for the plain path.
        plain: ``plain(arrays, platform=..., **params)`` computes it by JAX's own operations.
        by_kernels: ``by_kernels(arrays, kernels=..., **params)`` computes it by kernels. None if there are no kernels.
        spread: ``spread(types, compute, **params)`` makes the function of arrays that are still to be partitioned over
            devices, see `over_devices`; None of it leaves that to the compiler. ``compute(arrays, **params)`` is the
            primitive on one device. None if the compiler partitions the plain path, and there are no kernels then.
    """

    def compute(arrays, target, params, is_spread=False):
        """Compute the primitive; its types are of one device, or `spread` spreads them."""
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
        # Types by themselves: inside shard_map they name a mesh that is not current while a program is lowered.
        types = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        is_spread = target.partition == "known"
        lowered = mlir.lower_fun(
            lambda *arrays: tuple(compute(list(arrays), target, params, is_spread)), multiple_results=True
        )
        with without_deprecation():
            return lowered(ctx.replace(avals_in=types), *arguments)

    for platform in ("cpu", "cuda", "rocm", "tpu", None):
        mlir.register_lowering(primitive, rule, platform=platform)


def _target(ctx) -> Target:
    """Find the target of a lowering rule."""
    module = ctx.module_context
    platform = (ctx.platforms or module.platforms)[0]
    capability = _capability() if platform == "cuda" else None
    is_export, is_described = module.lowering_parameters.for_export, _is_described(platform)
    is_known = platform != "tpu" or is_described or _has_tpu()
    return Target(platform, capability, is_export, is_described, is_known, _partition_of(module.axis_context))


@functools.cache
def _has_tpu():
    """Return whether this machine has a TPU: JAX compiles kernels for no other that is not described."""
    try:
        return bool(jax.local_devices(backend="tpu"))
    except RuntimeError:
        return False


def _is_described(platform):
    """Return whether the current abstract mesh describes a device of a platform; CUDA's are of "gpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform in (platform, {"cuda": "gpu"}.get(platform))


def partition_by_devices(primitives: set[Primitive]):
    """Let JAX tell the lowering rules of these primitives the devices of a program, where there are several.

    JAX keeps a set of such primitives, and refuses to lower them for a mesh without devices.
    """
    try:
        from jax._src import dispatch, xla_bridge

        # Does not initialise devices: a program that is traced first may join a cluster later.
        if xla_bridge.backends_are_initialized() and _device_count() > 1:
            dispatch.prim_requires_devices_during_lowering |= primitives
    except (ImportError, AttributeError):  # not public: without them the plain path is taken on a mesh
        return


@functools.cache
def _device_count():
    """Count the GPUs of all hosts, or the CPU devices where there are more; TPUs, whose programs JAX does not partition
    by our rules, do not count.
    """
    return max(len(jax.devices("cpu")), _gpu_count())


def _gpu_count():
    try:
        return len(jax.devices("cuda"))
    except RuntimeError:
        return 0


def _partition_of(context):
    """Find how arrays are still to be spread over devices, see `Target.partition`.

    Inside ``shard_map`` a program is local if all axes of the mesh are manual, or it has one device. Else one device
    means "none", and several are "known" where the compiler partitions a program for a known assignment of devices on a
    mesh.
    """
    mesh = getattr(context, "mesh", None)
    if mesh is not None:  # inside shard_map
        is_local = set(context.manual_axes) == set(mesh.axis_names) or mesh.size == 1
        return "none" if is_local else "unknown"
    if context.num_devices == 1:
        return "none"
    is_known = context.device_assignment is not None and context.abstract_mesh is not None
    return "known" if is_known else "unknown"


# Compute capabilities by the beginning of a device's kind, for devices that an abstract mesh describes.
CAPABILITIES = {"NVIDIA A100": (8, 0), "NVIDIA H100": (9, 0), "NVIDIA H200": (9, 0), "NVIDIA GH200": (9, 0)}


def _capability() -> tuple[int, int] | None:
    """Find the compute capability of the GPU to compile for: an abstract mesh's, or the first of this machine."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return next((found for kind, found in CAPABILITIES.items() if described.device_kind.startswith(kind)), None)
    try:
        found = jax.local_devices(backend="cuda")[0].compute_capability
    except RuntimeError:
        return None
    major, minor = str(found).split(".")
    return int(major), int(minor)
