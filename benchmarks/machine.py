"""The machine that figures are of: what it is, what it can do, and how calls are timed on it."""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

MIB, GIB = 2**20, 2**30
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "local-attention", "hyper-connections", "triton")


def pin_threads(threads):
    """Keep this process to as many CPUs; XLA sizes its pool by that when it is loaded."""
    if not hasattr(os, "sched_setaffinity"):  # only Linux can
        return threads or os.cpu_count()
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[: threads or len(allowed)])
    return len(os.sched_getaffinity(0))


def seconds_a_call(run: Callable[..., Any], arrays=(), calls: int = 1) -> float:
    """Time one call of JAX, of `calls` that are enqueued together and waited for once."""
    import jax

    begin = time.perf_counter()
    out = None
    for _ in range(calls):
        out = run(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls


def product_rate(dtype: str, size: int, calls: int) -> float:
    """FLOP/s of a square matrix product."""
    import jax.numpy as jnp

    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / _median_seconds(jnp.matmul, (x, x), calls)


def copy_rate(size: int, calls: int) -> float:
    """Bytes/s of reading and writing an array of `size` bytes."""
    import jax.numpy as jnp

    line = jnp.ones((size // 2,), jnp.bfloat16)
    return 2 * line.nbytes / _median_seconds(lambda x: x + 1, (line,), calls)


def _median_seconds(fn, arrays, calls, rounds=5):
    import jax

    run = jax.jit(fn).lower(*arrays).compile()
    jax.block_until_ready(run(*arrays))
    return statistics.median(seconds_a_call(run, arrays, calls) for _ in range(rounds))


def machine_rates(dtype, device, calls):
    """What the machine itself can do: matrix products in TFLOP/s, and copies in GB/s on a GPU."""
    size = 8192 if device == "gpu" else 2048
    rates = {f"jax {dtype} matrix product of {size}, TFLOP/s": product_rate(dtype, size, calls) / 1e12}
    if device == "gpu":
        rates["copy of 1 GiB, read and written, GB/s"] = copy_rate(GIB, calls) / 1e9
    return rates


def describe_machine(device, threads):
    """Device, threads and versions: what a figure is worth nothing without."""
    import jax

    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    facts = {"device": jax.devices()[0].device_kind, "platform": device, "date": time.strftime("%Y-%m-%d")}
    facts["versions"] = f"Python {platform.python_version()}, " + ", ".join(versions)
    if device == "gpu":
        facts["driver"] = _gpu_driver()
    if device == "cpu":
        facts["device"] = _cpu_name()
        facts["threads"] = f"XLA {threads} (affinity), torch {_torch_threads(threads)}"
        # Other programs slow PyTorch's threads, which wait for each other, more than XLA's.
        facts["load before the run"] = f"{os.getloadavg()[0]:.1f}; compare nothing if others are at work"
    return facts


def device_and_date() -> str:
    """Return the device, JAX's version and the date, on one line."""
    import jax

    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"


def _gpu_driver():
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _cpu_name():
    facts = Path("/proc/cpuinfo")
    found = facts.exists() and re.search(r"model name\s*: (.*)", facts.read_text())
    return found[1] if found else platform.processor()


def _torch_threads(threads):
    try:
        import torch
    except ImportError:
        return "absent"
    torch.set_num_threads(threads)
    return torch.get_num_threads()
