"""The machine that figures are measured on: its name, its rates, and how calls are timed on it."""

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
    """Restrict this process to `threads` CPUs, from which XLA sizes its pool when it is loaded; return how many."""
    if not hasattr(os, "sched_setaffinity"):  # only Linux can
        return threads or os.cpu_count()
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[: threads or len(allowed)])
    return len(os.sched_getaffinity(0))


def seconds_a_call(run: Callable[..., Any], arrays=(), calls: int = 1) -> float:
    """Time one call of JAX: the mean over `calls` that are enqueued together and waited for once."""
    import jax

    begin = time.perf_counter()
    out = None
    for _ in range(calls):
        out = run(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls


def product_rate(dtype: str, size: int, calls: int) -> float:
    """Measure the FLOP/s of a square matrix product."""
    import jax.numpy as jnp

    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / _median_seconds(jnp.matmul, (x, x), calls)


def copy_rate(size: int, calls: int) -> float:
    """Measure the bytes/s at which an array of `size` bytes is read and written."""
    import jax.numpy as jnp

    line = jnp.ones((size // 2,), jnp.bfloat16)
    return 2 * line.nbytes / _median_seconds(lambda x: x + 1, (line,), calls)


def _median_seconds(fn, arrays, calls, rounds=5):
    import jax

    run = jax.jit(fn).lower(*arrays).compile()
    jax.block_until_ready(run(*arrays))
    return statistics.median(seconds_a_call(run, arrays, calls) for _ in range(rounds))


def machine_rates(dtype, device, calls):
    """Measure the machine's own rates: a matrix product in TFLOP/s and, on a GPU, a copy in GB/s."""
    size = 8192 if device == "gpu" else 2048
    rates = {f"jax {dtype} matrix product of {size}, TFLOP/s": product_rate(dtype, size, calls) / 1e12}
    if device == "gpu":
        rates["copy of 1 GiB, read and written, GB/s"] = copy_rate(GIB, calls) / 1e9
    return rates


def describe_machine(device, threads=None):
    """Return what a figure is worthless without: device, host, versions and date; on a CPU also threads and load."""
    import jax

    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    facts = {
        "device": _cpu_name() if device == "cpu" else kind if count == 1 else f"{count} x {kind}",
        "host": f"{os.cpu_count()} CPUs" + (f", driver {_gpu_driver()}" if device == "gpu" else ""),
        "versions": f"Python {platform.python_version()}, " + ", ".join(versions),
        "date": time.strftime("%Y-%m-%d"),
    }
    if threads is not None and device == "cpu":
        facts["threads"] = f"XLA {threads} (affinity), torch {_torch_threads(threads)}"
    if device == "cpu":
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
