"""The devices of a training run: its processes, its mesh and the arrays sharded over it.

The mesh axes are "data" (rows of a batch), "sequence" (tokens of a row) and "model" (parts of a layer).
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.flags import UsageError
from flax_local_attention import parameter_shardings

ROWS_AND_TOKENS = P("data", "sequence")  # sharding of [b, n] in training: rows and tokens
ROWS = P(("data", "sequence"))  # sharding of [b, n] in evaluation: rows only, over both axes
HEARTBEAT_SECONDS = 30  # a process silent for longer counts as dead, and the others exit


# ---- processes


def join_processes(distributed: bool, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Wait for the other processes of the run, if there are any; JAX asks the cluster for what is None.

    Raises:
      UsageError: JAX cannot find the cluster or reach the other processes.
    """
    if not distributed and (coordinator, processes, process) == (None, None, None):
        return
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(
            f"the processes of a run must find one another, got an error from JAX ({' '.join(str(error).split())}); "
            "give --coordinator, --processes and --process, which JAX detects on some clusters only"
        ) from error


@contextlib.contextmanager
def first_process_prints() -> Iterator[None]:
    """Discard the standard output of all processes but the first; their errors are still printed."""
    with contextlib.ExitStack() as stack:
        if jax.process_index() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def prepare_identically(prepare: Callable[[], Any], summarise: Callable[[Any], str]) -> Any:
    """Return what `prepare` returns, once its summary is the same in every process; all must call it.

    Raises:
      ValueError: `prepare` raised it, here or in another process, or the summaries differ.
    """
    try:
        made, error = prepare(), None
    except ValueError as reason:
        made, error = None, reason
    summary = "" if error else summarise(made)
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(summary.encode()).digest(), np.uint8))
    others = np.flatnonzero((digests != digests[0]).any(axis=-1))
    if error:
        raise error
    if len(others):
        raise UsageError(
            "all processes must have the same options, corpus and checkpoint, got different ones in process "
            f"{', '.join(map(str, others))} and in 0; give all the same command, and files that all can read"
        )
    return made


def in_first_process(act: Callable[[], None]) -> None:
    """Call `act` in process 0 only; if it fails there, every process raises. All must call this.

    Raises:
      ValueError: `act` raised it in process 0.
    """

    def act_if_first() -> None:
        if jax.process_index() == 0:
            act()

    prepare_identically(act_if_first, repr)


# ---- the mesh


def choose_mesh(data: int | None, sequence: int, tensor: int, config: Any) -> Mesh:
    """Return the mesh of `--data-parallel`, `--sequence-parallel` and `--tensor-parallel`.

    Raises:
      UsageError: there are too few devices, or a size in `config` is not divisible.
    """
    available = jax.device_count()
    data = data or largest_divisor(config.batch_size, available // (sequence * tensor))
    used = data * sequence * tensor
    if used > available:
        raise UsageError(
            f"--data-parallel times --sequence-parallel times --tensor-parallel must be at most {available}, the "
            f"number of devices, got {data} x {sequence} x {tensor}; give smaller numbers"
        )
    for flag, size, of, parts in (
        ("--batch-size", config.batch_size, "--data-parallel", data),
        ("--seq-len", config.seq_len, "--sequence-parallel", sequence),
        ("--heads", config.heads, "--tensor-parallel", tensor),
    ):
        if size % parts:
            raise UsageError(f"{flag} must be a multiple of {of}, got {size} and {parts}; change one of them")
    if used < available and jax.process_count() > 1:
        raise UsageError(
            f"several processes must use all of their devices, got {data} x {sequence} x {tensor} of {available}; "
            "give a larger --batch-size, --sequence-parallel or --tensor-parallel"
        )
    return jax.make_mesh((data, sequence, tensor), ("data", "sequence", "model"), devices=jax.devices()[:used])


def largest_divisor(number: int, maximum: int) -> int:
    """Return the largest divisor of `number` up to `maximum`, at least 1."""
    return next((parts for parts in range(maximum, 1, -1) if number % parts == 0), 1)


def describe_mesh(mesh: Mesh) -> str:
    """Describe the devices that a run uses, on one line."""
    parts = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    available, processes = jax.device_count(), jax.process_count()
    shared = f" of {processes} processes" if processes > 1 else ""
    idle = f"; {available - mesh.size} more stay idle" if mesh.size < available else ""
    return f"{mesh.size} {jax.default_backend()}{shared} ({parts}){idle}"


# ---- arrays on the mesh


def with_shardings(template: Any, mesh: Mesh) -> Any:
    """Add the shardings of the arrays of a state to their shapes and dtypes."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, template, parameter_shardings(template, mesh))


def place_rows(read: Callable[..., np.ndarray], shape: tuple[int, ...], mesh: Mesh, spec: P) -> jax.Array:
    """Make an array `[..., b, n]` on the mesh; each process reads only the parts on its own devices.

    Args:
      read: function from a tuple of slices, one per axis, to that part of the array.
      shape: shape of the array.
      mesh: mesh of the run.
      spec: sharding of the last two axes, `ROWS_AND_TOKENS` or `ROWS`.
    """
    leading = (None,) * (len(shape) - 2)
    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(*leading, *spec)), read)


def rows_everywhere(rows: int, mesh: Mesh) -> int:
    """Round `rows` up to a number that `ROWS` divides evenly."""
    parts = mesh.shape["data"] * mesh.shape["sequence"]
    return -(-rows // parts) * parts


def place_like_rows(cache: Any, rows: int, mesh: Mesh) -> Any:
    """Put a decode cache of `rows` rows on the mesh, sharded as `ROWS`; leaves without rows are replicated."""

    def place(leaf: Any) -> jax.Array:
        spec = ROWS if leaf.ndim and leaf.shape[0] == rows else P()
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])

    return jax.tree.map(place, cache)


def collect(tree: Any) -> Any:
    """Gather sharded arrays into whole NumPy arrays in every process; all must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)


def any_process(flag: bool) -> bool:
    """Return whether `flag` is True in any process; all must call it."""
    return bool(np.max(multihost_utils.process_allgather(np.asarray(flag)))) if jax.process_count() > 1 else flag


def broadcast_from_first(number: int) -> int:
    """Return the `number` that process 0 passed; all must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number))) if jax.process_count() > 1 else number
