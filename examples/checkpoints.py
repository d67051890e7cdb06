"""Checkpoints: written by orbax beside the training, each whole or not there at all, and verified when they are read.

The newest two are kept, and the one with the fewest bits in validation. A checkpoint holds the state of training, the
place in the data, and a digest of every array, because orbax does not notice bytes that were changed on the disk.
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

ROOM_BESIDE = 2**20  # bytes of a checkpoint beside its arrays, at most
READINGS = 5  # of a directory that changes meanwhile, at most
REPLACED_SECONDS = 0.5  # in which a run that has begun to delete a checkpoint has done so
DAMAGED = "damaged"  # beside the checkpoints: where those are put that are not what was saved
UNFINISHED = "*.orbax-checkpoint-tmp*"  # what a save that was killed or had no room leaves behind


class Checkpoint(NamedTuple):
    """A verified checkpoint.

    Attributes:
      step: steps done.
      state: of training, on the devices of the run; or the part of it that was asked for.
      about: what `Checkpoints.save` was given to keep beside it.
    """

    step: int
    state: Any
    about: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint is not what was saved; the message says how that was noticed."""


class NewestAndBest(preservation_policy.PreservationPolicy):
    """Keeps the newest two checkpoints, and the best one of those that were scored."""

    def __init__(self, by_bits: Callable[[Iterable[int]], list[int]]):
        """Take the function that orders steps, the best first."""
        self.by_bits = by_bits

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return for each checkpoint whether it is kept."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*newest_first(steps)[:2], *self.by_bits(steps)[:1]}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints in a directory.

    Attributes:
      kept: the newest step that is known to be on the disk; None if there is none.
    """

    def __init__(self, directory: Path, tell: Callable[[str], None], read_only: bool = False):
        """Open a directory.

        Args:
          directory: where they are; it is made if it must be.
          tell: function that shows the user a sentence.
          read_only: whether nothing in it is to change.
        """
        logging.set_verbosity(logging.FATAL)  # orbax's own words on what is told here in a sentence
        self.directory, self.tell, self.read_only = directory.resolve(), tell, read_only
        self._remove_unfinished()
        self._bits: dict[int, float] = {}  # in validation, of the steps that were asked for
        self._failure = ""  # why the last save failed, if it did
        options = ocp.CheckpointManagerOptions(preservation_policy=NewestAndBest(self.by_bits), read_only=read_only)
        self._manager = self._open(options)
        self.kept: int | None = self._manager.latest_step()
        if not read_only:
            self.best_bits()  # reads those of all steps, for the policy

    def _open(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
        """Return orbax's manager of the directory; one that is only read may change meanwhile."""
        for _ in range(READINGS - 1 if self.read_only else 0):
            with contextlib.suppress(FileNotFoundError):
                return ocp.CheckpointManager(self.directory, options=options)
        return ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Return the steps that there are checkpoints of, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, about: dict[str, Any], bits: float | None) -> None:
        """Copy the state off the devices and write it in the background.

        A save that fails, at once or in the background, is told of; training need not stop for it.

        Args:
          step: steps done.
          state: of training.
          about: more to keep, as JSON has it.
          bits: per byte of the validation split, by which the best one is known; None if it was not scored.
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
        """Raise OSError, in all processes, if the disk of any has no room for a state."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + ROOM_BESIDE
        free = shutil.disk_usage(self.directory).free
        if any_process(free < size):
            raise OSError(errno.ENOSPC, f"it takes {math.ceil(size / 2**20):,} MiB, and {free // 2**20:,} MiB are free")

    def finish(self) -> bool:
        """Wait for the save that is under way; return whether it is on the disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)
            return False
        newest = self._manager.latest_step()
        if newest != self.kept:
            self.kept, self._failure = newest, ""
        return True

    def close(self) -> None:
        """Wait for the save that is under way, and let the directory go."""
        self.finish()
        with contextlib.suppress(Exception):  # what `finish` has told of
            self._manager.close()

    def restore(
        self, choose: Callable[[Iterable[int]], list[int]], template: Any, check: Callable[[dict[str, Any]], None]
    ) -> Checkpoint | None:
        """Return the first whole checkpoint; damaged ones before it are told of, and put aside.

        Args:
          choose: function from the steps there are to those to try, in order.
          template: shapes of the state, or of a part of it, with their places on devices.
          check: function that is given what was kept beside a state and raises if the run is another.

        Returns:
          The checkpoint, or None if none is whole.
        """
        for _ in range(READINGS):
            found, damaged = self._first_whole(choose(self.steps()), template, check)
            if not damaged or not self._has_changed():
                break
        for step, error in damaged.items():
            self.tell(f"the checkpoint of step {step:,} is damaged ({error})")
        if found:
            self._put_aside(list(damaged))
            self.kept = found.step
        return found

    def _first_whole(
        self, steps: list[int], template: Any, check: Callable
    ) -> tuple[Checkpoint | None, dict[int, DamagedError]]:
        """Return the first whole checkpoint of some steps, if there is one, and what is wrong with those before it."""
        damaged = {}
        for step in steps:
            try:
                return self._read(step, template, check), damaged
            except DamagedError as error:
                expect_left_coroutines()
                damaged[step] = error
        return None, damaged

    def _has_changed(self) -> bool:
        """Return whether a run under way has replaced checkpoints of a directory that is only read."""
        if not self.read_only:
            return False
        before = self.steps()
        time.sleep(REPLACED_SECONDS)
        self._bits.clear()
        try:
            self._manager.reload()
        except FileNotFoundError:  # one was deleted while it was looked at
            return True
        return self.steps() != before

    def about(self, step: int) -> dict[str, Any]:
        """Return what was kept beside a state.

        Raises:
          DamagedError: it cannot be read.
        """
        try:
            about = dict(self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about)
        except Exception as error:
            raise DamagedError(reason(error)) from error
        if about.pop("checksum", None) != checksum(about):
            raise DamagedError("what is beside the state is not what was saved")
        if not isinstance(about.get("digests"), dict) or not isinstance(about.get("bits", ""), float | int | None):
            raise DamagedError("another version has saved it")
        return about

    def by_bits(self, steps: Iterable[int]) -> list[int]:
        """Return the steps, those with the fewest bits in validation first, the newest first among equals."""
        return sorted(steps, key=lambda step: (self.bits(step), -step))

    def bits(self, step: int) -> float:
        """Return the bits in validation of a checkpoint; infinity if it was not scored, or cannot be read."""
        if step not in self._bits:
            try:
                bits = self.about(step).get("bits")
            except DamagedError:
                bits = None
            self._bits[step] = math.inf if bits is None else bits
        return self._bits[step]

    def best_bits(self) -> float:
        """Return the fewest bits in validation of all checkpoints."""
        return min(map(self.bits, self.steps()), default=math.inf)

    def _read(self, step: int, template: Any, check: Callable) -> Checkpoint:
        """Return a verified checkpoint."""
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
        except Exception as cause:  # whatever orbax, TensorStore and JSON make of damaged files
            error = DamagedError(reason(cause))
        if any_process(error is not None):
            raise error or DamagedError("another process cannot read it")
        return Checkpoint(step, state, about)

    def _put_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints out of the way of the next ones of their steps.

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
                    f"damaged checkpoints must be moved to {str(aside)!r}, got {reason(error)}; make that possible, or "
                    "delete them"
                ) from error
        any_process(False)  # all wait for it
        self._manager.reload()

    def _give_up(self, error: Exception) -> None:
        """Tell of a save that failed, unless the last one failed for the same reason, and free what it took."""
        self._remove_unfinished()
        failure = reason(error)
        if failure != self._failure:
            self.tell(f"a checkpoint could not be written ({failure}); the next validation tries again")
        self._failure = failure

    def _remove_unfinished(self) -> None:
        """Remove what saves have left that did not end."""
        if jax.process_index() == 0 and not self.read_only:
            for path in self.directory.glob(UNFINISHED):
                shutil.rmtree(path, ignore_errors=True)


def newest_first(steps: Iterable[int]) -> list[int]:
    """Return the steps from the last to the first."""
    return sorted(steps, reverse=True)


# What TensorStore and orbax call what they find.
CODES = {
    "NOT_FOUND": "a file is missing",
    "DATA_LOSS": "a file has changed",
    "OUT_OF_RANGE": "a file is cut off",
    "FAILED_PRECONDITION": "a file is missing or cut off",
    "not found in the checkpoint": "a part is missing",
    "pytree structure error": "a part is missing",
}


def reason(error: BaseException) -> str:
    """Return what went wrong in a few words: the system's if they are among those of a library."""
    first = " ".join(str(error).split())
    text = " ".join(" ".join(map(str, chain(error))).split())
    if system := re.search(r"([^:\[\]]+) \[os_error_code", text):
        return system.group(1).strip()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((words for code, words in CODES.items() if code in text), f"{type(error).__name__}: {first}"[:100])


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and what caused that."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@functools.cache
def expect_left_coroutines() -> None:
    """Drop what Python says, until it ends, of coroutines: orbax leaves some behind when a restore fails."""
    show = sys.unraisablehook

    def show_others(unraisable: Any, closed: str = "Event loop is closed", coroutine: type = CoroutineType) -> None:
        if not isinstance(unraisable.object, coroutine) and str(unraisable.exc_value) != closed:
            show(unraisable)

    sys.unraisablehook = show_others
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def checksum(about: dict[str, Any]) -> int:
    """Return a value that differs between different JSON objects."""
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def by_path(tree: Any) -> dict[str, int]:
    """Return the leaves of a tree of integers by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): int(leaf) for path, leaf in leaves}


@jax.jit
def digest_arrays(tree: Any) -> Any:
    """Return a digest of each array: 32 bits that depend on every bit of it and its place, but not on any mesh.

    Each word is mixed with its index (the last step of MurmurHash3) and the results are summed modulo 2^32, in
    integers, so that devices may add them up in any order.
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
    """Return the bits of an array's elements as words of 32 bits."""
    array = array.astype(jnp.uint8) if array.dtype == bool else array
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)
