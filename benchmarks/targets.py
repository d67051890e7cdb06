"""Devices to compile for without having them: TPUs, up to whole slices, and an H100. Nothing is run on them.

A TPU needs ``pip install "jax[tpu]"``; an H100 needs ``jax-cuda12-plugin``, ``jax-cuda12-pjrt`` and NVIDIA's
``nvcc``, ``cuda-runtime``, ``nvrtc``, ``cupti`` and ``nvjitlink`` wheels, in an environment of its own.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# libtpu would otherwise ask the machine for these, and lock a TPU that is not used here.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CUDA_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # cuDNN is not needed to compile
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
H100 = Path(__file__).parent / "h100.txtpb"


def missing(target: str) -> str | None:
    """Say what must be installed to compile for "tpu" or "h100"; None if nothing."""
    if target == "tpu" and not importlib.util.find_spec("libtpu"):
        return "jax[tpu] is not installed"
    if target == "h100" and not any(map(importlib.util.find_spec, CUDA_PLUGINS)):
        return "jax-cuda12-plugin is not installed"
    return None


def devices(target: str) -> Sequence[jax.Device]:
    """Return four devices of a TPU v5e slice ("tpu"), or four H100 SXM of one host ("h100")."""
    if target == "tpu":
        return tpu_slice("v5e:2x2")
    _set_defaults(CUDA_ENVIRONMENT)
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x4", target_config=H100.read_text()
    ).devices


def tpu_slice(topology: str) -> Sequence[jax.Device]:
    """Return all devices of a slice, such as "v5e:16x16" or "v5p:8x8x8"."""
    _set_defaults(TPU_ENVIRONMENT)
    return topologies.get_topology_desc(topology, "tpu").devices


def _set_defaults(environment):
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def compile_for(
    target: str,
    fn: Callable,
    *shapes: jax.ShapeDtypeStruct,
    specs: Sequence[PartitionSpec] | None = None,
    options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compile `fn` for devices of a target.

    Args:
        target: "tpu" or "h100".
        fn: Function of arrays.
        *shapes: Shape and dtype of each array.
        specs: How each array is sharded over a mesh of 2 x 2 devices, "data" and "heads". None means one device.
        options: Options of the compiler.

    Returns:
        The executable for these devices. It cannot be run here but reports what it needs.
    """
    found = np.array(devices(target)[: 1 if specs is None else 4]).reshape(-1, 1 if specs is None else 2)
    mesh = Mesh(found, ("data", "heads"), axis_types=(AxisType.Auto, AxisType.Auto))
    specs = [PartitionSpec()] * len(shapes) if specs is None else specs
    arrays = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(shapes, specs, strict=True)
    ]
    # The abstract mesh tells JAX (0.11 and later), and the choice of kernels, which device to compile for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(fn).lower(*arrays).compile(compiler_options=options)
