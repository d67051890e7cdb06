"""The devices of a training run: a mesh of those of one host or of several, what lies on it, and processes that agree.

Axes of a mesh are "data" (rows of a batch), "sequence" (tokens of a row) and "model" (parts of a layer).
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

ROWS_AND_TOKENS = P("data", "sequence")  # of [b, n]: training cuts sequences too
ROWS = P(("data", "sequence"))  # of [b, n]: evaluation keeps them whole
HEARTBEAT_SECONDS = 30  # a process that is silent for longer counts as ended, and the others end too


# ---- processes


def join_processes(distributed: bool, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Wait for the other processes of the run, if there are any. What is not given is asked of the cluster.

    Raises:
      UsageError: the processes cannot be counted or found.
    """
    if not distributed and (coordinator, processes, process) == (None, None, None):
        return
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(
            f"the processes of a run must find one another, got what JAX refuses ({' '.join(str(error).split())}); "
            "give --coordinator, --processes and --process, which JAX knows by itself on some clusters only"
        ) from error


@contextlib.contextmanager
def first_process_prints() -> Iterator[None]:
    """Drop what the other processes print; errors are not dropped."""
    with contextlib.ExitStack() as stack:
        if jax.process_index() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def prepare_alike(prepare: Callable[[], Any], summarise: Callable[[Any], str]) -> Any:
    """Return what `prepare` makes, if it makes the same on every process, judged by its summary.

    Raises:
      ValueError: as `prepare`, or because another process cannot go on or would do something else.
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
            "all processes must have the same options, bytes and checkpoint, got others in process "
            f"{', '.join(map(str, others))} than in 0; give all the same command, and files that all see"
        )
    return made


def in_first_process(act: Callable[[], None]) -> None:
    """Do something in process 0; if it fails there, no process goes on. All must call it.

    Raises:
      ValueError: as `act`, or because it failed in process 0.
    """

    def act_if_first() -> None:
        if jax.process_index() == 0:
            act()

    prepare_alike(act_if_first, repr)


# ---- the mesh


def choose_mesh(data: int | None, sequence: int, tensor: int, config: Any) -> Mesh:
    """Return the mesh of `--data-parallel`, `--sequence-parallel` and `--tensor-parallel`.

    Raises:
      UsageError: there are too few devices, or the parts of what `config` describes would not be equal.
    """
    there = jax.device_count()
    data = data or largest_divisor(config.batch_size, there // (sequence * tensor))
    used = data * sequence * tensor
    if used > there:
        raise UsageError(
            f"--data-parallel times --sequence-parallel times --tensor-parallel must be at most {there}, the number of "
            f"devices, got {data} x {sequence} x {tensor}; give smaller ones"
        )
    for flag, size, of, parts in (
        ("--batch-size", config.batch_size, "--data-parallel", data),
        ("--seq-len", config.seq_len, "--sequence-parallel", sequence),
        ("--heads", config.heads, "--tensor-parallel", tensor),
    ):
        if size % parts:
            raise UsageError(f"{flag} must be a multiple of {of}, got {size} and {parts}; change one of them")
    if used < there and jax.process_count() > 1:
        raise UsageError(
            f"several processes must use all of their devices, got {data} x {sequence} x {tensor} of {there}; "
            "give a larger --batch-size, --sequence-parallel or --tensor-parallel"
        )
    return jax.make_mesh((data, sequence, tensor), ("data", "sequence", "model"), devices=jax.devices()[:used])


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is not more than `most`, and 1 if there is none."""
    return next((parts for parts in range(most, 1, -1) if number % parts == 0), 1)


def describe_mesh(mesh: Mesh) -> str:
    """Return which devices a run uses."""
    parts = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    there, processes = jax.device_count(), jax.process_count()
    shared = f" of {processes} processes" if processes > 1 else ""
    idle = f"; {there - mesh.size} more stay idle" if mesh.size < there else ""
    return f"{mesh.size} {jax.default_backend()}{shared} ({parts}){idle}"


# ---- what lies on the mesh


def placed(template: Any, mesh: Mesh) -> Any:
    """Return the shapes of a state with the places of its arrays on the mesh."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, template, parameter_shardings(template, mesh))


def place_rows(read: Callable[..., np.ndarray], shape: tuple[int, ...], mesh: Mesh, spec: P) -> jax.Array:
    """Put `[..., b, n]` on the mesh; `read(index)` gives a part, and is asked for those of this process alone.

    Args:
      read: function from slices of all axes to the part of the array that they cut.
      shape: of the array.
      mesh: the run's.
      spec: how the last two axes lie on it, `ROWS_AND_TOKENS` or `ROWS`.
    """
    leading = (None,) * (len(shape) - 2)
    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(*leading, *spec)), read)


def rows_everywhere(rows: int, mesh: Mesh) -> int:
    """Return the least number of rows, at least `rows`, that `ROWS` can spread evenly."""
    parts = mesh.shape["data"] * mesh.shape["sequence"]
    return -(-rows // parts) * parts


def place_like_rows(cache: Any, rows: int, mesh: Mesh) -> Any:
    """Put a cache of so many rows on the mesh, its rows like those of `ROWS`."""

    def place(leaf: Any) -> jax.Array:
        spec = ROWS if leaf.ndim and leaf.shape[0] == rows else P()
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])

    return jax.tree.map(place, cache)


def collect(tree: Any) -> Any:
    """Return whole arrays of NumPy on every process; all must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)


def any_process(flag: bool) -> bool:
    """Return whether any process has raised its flag; all must call it."""
    return bool(np.max(multihost_utils.process_allgather(np.asarray(flag)))) if jax.process_count() > 1 else flag


def first_of_processes(number: int) -> int:
    """Return the number of process 0; all must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number))) if jax.process_count() > 1 else number
