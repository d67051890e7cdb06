"""Checkpoints, written atomically in the background by orbax and verified when they are read.

The newest two are kept, and the best one in validation. A checkpoint holds the training state and metadata, called
`about`: the configuration, the position in the data and a digest of every array, because orbax does not detect bytes
that changed on the disk.
"""

import contextlib
import errno
import functools
import itertools
import json
import math
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import CoroutineType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax import lax
from orbax.checkpoint.checkpoint_managers import preservation_policy

from examples.devices import any_process
from examples.flags import UsageError

METADATA_LIMIT = 2**20  # most bytes of a checkpoint besides its arrays
ATTEMPTS = 5  # most attempts to read a directory that a run is changing
REPLACED_SECONDS = 0.5  # a run deletes a checkpoint in less time
DAMAGED = "damaged"  # directory, next to the checkpoints, for those that fail verification
UNFINISHED = "*.orbax-checkpoint-tmp*"  # left by a save that was killed or found the disk full


class Checkpoint(NamedTuple):
    """A verified checkpoint.

    Attributes:
      step: number of steps done.
      state: training state on the devices of the run, or the part of it that the template asked for.
      about: metadata given to `Checkpoints.save`.
    """

    step: int
    state: Any
    about: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint fails verification; the message says how."""


class NewestAndBest(preservation_policy.PreservationPolicy):
    """Orbax policy that keeps the newest two checkpoints and the best one in validation."""

    def __init__(self, best_first: Callable[[Iterable[int]], list[int]]):
        """Take the function that sorts steps, the best first."""
        self.best_first = best_first

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return whether to keep each checkpoint."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*newest_first(steps)[:2], *self.best_first(steps)[:1]}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints in a directory.

    Attributes:
      newest_saved: newest step known to be on the disk; None if there is none.
    """

    def __init__(self, directory: Path, report: Callable[[str], None], read_only: bool = False):
        """Open a directory.

        Args:
          directory: directory of the checkpoints, created unless it exists.
          report: function that prints a message for the user.
          read_only: change nothing in the directory, which a run may be changing.
        """
        logging.set_verbosity(logging.FATAL)  # `report` replaces orbax's messages
        self.directory, self.report, self.read_only = directory.resolve(), report, read_only
        self._remove_unfinished()
        self._bits: dict[int, float] = {}  # validation bits per byte by step, read so far
        self._failure = ""  # why the last save failed; empty if it did not
        options = ocp.CheckpointManagerOptions(preservation_policy=NewestAndBest(self.best_first), read_only=read_only)
        self._manager = self._open(options)
        self.newest_saved: int | None = self._manager.latest_step()
        if not read_only:
            self.best_bits()  # fills `_bits` for the policy

    def _open(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
        """Return orbax's manager; retry in a read-only directory, whose files a run may be deleting."""
        for _ in range(ATTEMPTS - 1 if self.read_only else 0):
            with contextlib.suppress(FileNotFoundError):
                return ocp.CheckpointManager(self.directory, options=options)
        return ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Return the steps that have checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, about: dict[str, Any], bits: float | None) -> None:
        """Copy the state to the host and write it in the background.

        A failure, now or in the background, is reported and not raised.

        Args:
          step: number of steps done.
          state: training state.
          about: metadata, a JSON object.
          bits: bits per byte of the validation split, to find the best checkpoint; None if it was not scored.
        """
        self.finish()
        if step in self._manager.all_steps():
            return
        about = {**about, "bits": bits, "digests": by_path(jax.device_get(digest_arrays(state)))}
        about["checksum"] = checksum(about)
        parts = ocp.args.Composite(state=ocp.args.PyTreeSave(state), about=ocp.args.JsonSave(about))
        self._bits[step] = math.inf if bits is None else bits
        try:
            self._check_room(state)
            self._manager.save(step, args=parts)
        except Exception as error:
            self._give_up(error)

    def _check_room(self, state: Any) -> None:
        """Raise OSError, in all processes, if the disk of any process has no room for a state."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + METADATA_LIMIT
        free = shutil.disk_usage(self.directory).free
        if any_process(free < size):
            raise OSError(errno.ENOSPC, f"it takes {math.ceil(size / 2**20):,} MiB, and {free // 2**20:,} MiB are free")

    def finish(self) -> bool:
        """Wait for the save in progress; return whether it succeeded."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)
            return False
        newest = self._manager.latest_step()
        if newest != self.newest_saved:
            self.newest_saved, self._failure = newest, ""
        return True

    def close(self) -> None:
        """Wait for the save in progress and close orbax's manager."""
        self.finish()
        with contextlib.suppress(Exception):  # `finish` has reported it
            self._manager.close()

    def restore(
        self, choose: Callable[[Iterable[int]], list[int]], template: Any, check: Callable[[dict[str, Any]], None]
    ) -> Checkpoint | None:
        """Restore the first intact checkpoint; damaged ones before it are reported and moved aside.

        Args:
          choose: function that sorts the available steps in the order to try.
          template: shapes, dtypes and shardings of the state or of a part of it.
          check: function that raises if the metadata belongs to another run.

        Returns:
          The checkpoint, or None if none is intact.
        """
        for _ in range(ATTEMPTS):
            found, damaged = self._first_intact(choose(self.steps()), template, check)
            if not damaged or not self._has_changed():
                break
        for step, error in damaged.items():
            self.report(f"the checkpoint of step {step:,} is damaged ({error})")
        if found:
            self._put_aside(list(damaged))
            self.newest_saved = found.step
        return found

    def _first_intact(
        self, steps: list[int], template: Any, check: Callable
    ) -> tuple[Checkpoint | None, dict[int, DamagedError]]:
        """Return the first intact checkpoint of `steps`, None without one, and the errors of those before it."""
        damaged = {}
        for step in steps:
            try:
                return self._read(step, template, check), damaged
            except DamagedError as error:
                silence_unawaited_coroutines()
                damaged[step] = error
        return None, damaged

    def _has_changed(self) -> bool:
        """Return whether a run has meanwhile replaced checkpoints in a read-only directory."""
        if not self.read_only:
            return False
        before = self.steps()
        time.sleep(REPLACED_SECONDS)
        self._bits.clear()
        try:
            self._manager.reload()
        except FileNotFoundError:  # a checkpoint was deleted during the reload
            return True
        return self.steps() != before

    def about(self, step: int) -> dict[str, Any]:
        """Read and verify the metadata of a checkpoint.

        Raises:
          DamagedError: it cannot be read, or is not what was saved.
        """
        try:
            about = dict(self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about)
        except Exception as error:
            raise DamagedError(reason(error)) from error
        if about.pop("checksum", None) != checksum(about):
            raise DamagedError("its metadata is not what was saved")
        if not isinstance(about.get("digests"), dict) or not isinstance(about.get("bits", ""), float | int | None):
            raise DamagedError("another version saved it")
        return about

    def best_first(self, steps: Iterable[int]) -> list[int]:
        """Sort steps by their bits per byte in validation, the fewest first; among equals, the newest first."""
        return sorted(steps, key=lambda step: (self.bits(step), -step))

    def bits(self, step: int) -> float:
        """Return the bits per byte in validation of a checkpoint; infinity if it was not scored or is damaged."""
        if step not in self._bits:
            try:
                bits = self.about(step).get("bits")
            except DamagedError:
                bits = None
            self._bits[step] = math.inf if bits is None else bits
        return self._bits[step]

    def best_bits(self) -> float:
        """Return the fewest bits per byte in validation of all checkpoints."""
        return min(map(self.bits, self.steps()), default=math.inf)

    def _read(self, step: int, template: Any, check: Callable) -> Checkpoint:
        """Restore a checkpoint and verify the digest of every array.

        Raises:
          DamagedError: a digest differs or a file cannot be read, in any process.
        """
        about = self.about(step)
        check(about)
        try:
            restore = ocp.args.PyTreeRestore(
                template, restore_args=ocp.checkpoint_utils.construct_restore_args(template), partial_restore=True
            )
            state = self._manager.restore(step, args=ocp.args.Composite(state=restore)).state
            found, expected = by_path(jax.device_get(digest_arrays(state))), about["digests"]
            changed = [path for path, digest in found.items() if expected[path] != digest]
            error = DamagedError(f"{changed[0]} is not what was saved") if changed else None
        except Exception as cause:  # orbax, TensorStore and JSON raise many types on damaged files
            error = DamagedError(reason(cause))
        if any_process(error is not None):
            raise error or DamagedError("another process cannot read it")
        return Checkpoint(step, state, about)

    def _put_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints to `DAMAGED`, so that new ones of the same steps can be saved.

        Raises:
          UsageError: they cannot be moved.
        """
        if self.read_only or not steps:
            return
        if jax.process_index() == 0:
            aside = self.directory.with_name(DAMAGED)
            try:
                aside.mkdir(exist_ok=True)
                for step in steps:
                    names = (f"{step}-{count}" for count in itertools.count(1))
                    name = next(name for name in names if not (aside / name).exists())
                    (self.directory / str(step)).rename(aside / name)
            except OSError as error:
                raise UsageError(
                    f"damaged checkpoints must be moved to {str(aside)!r}, got {reason(error)}; make both directories "
                    "writable, or delete these checkpoints"
                ) from error
        any_process(False)  # a barrier: all processes wait for the moves
        self._manager.reload()

    def _give_up(self, error: Exception) -> None:
        """Report a failed save, unless the last one failed for the same reason, and free its disk space."""
        self._remove_unfinished()
        failure = reason(error)
        if failure != self._failure:
            self.report(f"a checkpoint could not be written ({failure}); the next validation tries again")
        self._failure = failure

    def _remove_unfinished(self) -> None:
        """Delete the files of unfinished saves."""
        if jax.process_index() == 0 and not self.read_only:
            for path in self.directory.glob(UNFINISHED):
                shutil.rmtree(path, ignore_errors=True)


def newest_first(steps: Iterable[int]) -> list[int]:
    """Sort steps in descending order."""
    return sorted(steps, reverse=True)


# Phrases in the errors of TensorStore and orbax, and what they mean.
CODES = {
    "NOT_FOUND": "a file is missing",
    "DATA_LOSS": "a file has changed",
    "OUT_OF_RANGE": "a file is cut off",
    "FAILED_PRECONDITION": "a file is missing or cut off",
    "not found in the checkpoint": "a part is missing",
    "pytree structure error": "a part is missing",
}


def reason(error: BaseException) -> str:
    """Describe an error in a few words: the operating system's message if a library's error contains one."""
    first = " ".join(str(error).split())
    text = " ".join(" ".join(map(str, causes(error))).split())
    if system := re.search(r"([^:\[\]]+) \[os_error_code", text):
        return system.group(1).strip()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((words for code, words in CODES.items() if code in text), f"{type(error).__name__}: {first}"[:100])


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the chain of its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@functools.cache
def silence_unawaited_coroutines() -> None:
    """Suppress Python's warnings about coroutines until the process ends: a failed restore of orbax leaves some."""
    hook = sys.unraisablehook

    def show_others(unraisable: Any, closed: str = "Event loop is closed", coroutine: type = CoroutineType) -> None:
        if not isinstance(unraisable.object, coroutine) and str(unraisable.exc_value) != closed:
            hook(unraisable)

    sys.unraisablehook = show_others
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def checksum(about: dict[str, Any]) -> int:
    """Return the CRC-32 of a JSON object."""
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def by_path(tree: Any) -> dict[str, int]:
    """Flatten a tree of integers to a dict from paths to integers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): int(leaf) for path, leaf in leaves}


@jax.jit
def digest_arrays(tree: Any) -> Any:
    """Return a 32-bit digest of each array that depends on every bit and its position, but not on the sharding.

    Each word is mixed with its index (the finalizer of MurmurHash3), and the results are summed modulo 2^32. Integer
    sums are exact, so devices may add them in any order.
    """

    def digest(array: jax.Array) -> jax.Array:
        words = to_words(array)
        index = lax.iota(jnp.uint32, words.size).reshape(words.shape)
        mixed = (words + jnp.uint32(1)) * jnp.uint32(0x9E3779B1) ^ index * jnp.uint32(0x85EBCA77)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return jax.tree.map(digest, tree)


def to_words(array: jax.Array) -> jax.Array:
    """Return the bits of an array's elements as 32-bit words."""
    array = array.astype(jnp.uint8) if array.dtype == bool else array
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)
