"""The directory of a run: its settings, its metrics, its samples, and the paths of everything in it."""

import contextlib
import dataclasses
import datetime
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from examples.checkpoints import DAMAGED, reason
from examples.config import MAY_CHANGE, Config
from examples.corpus import Corpus, cache_dir, describe_error
from examples.files import (
    SETTINGS_LIMIT,
    append,
    entry_key,
    find_link_out,
    read_bounded,
    read_lines,
    write_atomically,
)
from examples.flags import UsageError, flag
from examples.screen import print_error

RUNS = Path("runs")  # parent of runs without --run
SETTINGS = "settings.json"
ABOUT = {"config": dict, "fingerprint": str, "seconds": float, "losses": list}  # metadata that a checkpoint must have


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options a run was started with.

    Attributes:
      config: hyperparameters.
      data: file of the corpus; None is enwik8.
      fingerprint: checksum of the corpus.
    """

    config: Config
    data: Path | None
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        data = None if self.data is None else str(self.data.resolve())
        return {"config": self.config.to_json(), "data": data, "fingerprint": self.fingerprint}

    def check_corpus(self, corpus: Corpus) -> None:
        """Refuse another corpus than the run was started with.

        Raises:
          UsageError: the fingerprints differ.
        """
        if self.fingerprint != corpus.fingerprint():
            raise UsageError("a run must keep its corpus, got different bytes; give the same --data")

    def check_checkpoint(self, about: dict[str, Any]) -> None:
        """Refuse a checkpoint whose metadata does not match these settings.

        Raises:
          UsageError: another version of the example wrote it, or it belongs to a run with other options.
        """
        lacking = [name for name, kind in ABOUT.items() if not isinstance(about.get(name), kind)]
        if lacking:
            raise UsageError(
                f"checkpoints must be of this version of the example, got some without {', '.join(lacking)}; "
                "use the version that wrote them, or start a new run"
            )
        saved, ours = about["config"], self.config.to_json()
        differing = [name for name in saved | ours if name not in MAY_CHANGE and saved.get(name) != ours.get(name)]
        if differing or about["fingerprint"] != self.fingerprint:
            names = ", ".join(map(flag, differing)) or "--data"
            raise UsageError(
                f"a run must keep the options of its checkpoints, got other values for {names}; give the same"
            )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Settings":
        """Return the settings that `to_json` converted."""
        data = None if fields["data"] is None else Path(fields["data"])
        return cls(Config.from_json(fields["config"]), data, fields["fingerprint"])


class RunFiles:
    """The files and directories of a run.

    Attributes:
      directory: directory of the run.
      settings, checkpoints, metrics, samples, curve, profile, events: paths in it.
      parts: all of these paths.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.settings = directory / SETTINGS
        self.checkpoints = directory / "checkpoints"
        self.metrics = directory / "metrics.jsonl"
        self.samples = directory / "samples"
        self.curve = directory / "curve.png"
        self.profile = directory / "profile"
        self.events = directory / "tensorboard"
        self.parts = self.settings, self.checkpoints, self.metrics, self.samples, self.curve, self.profile, self.events

    def read_settings(self) -> Settings:
        """Read the options the run was started with.

        Raises:
          UsageError: there is no run, or its settings are damaged or from another version.
        """
        try:
            return Settings.from_json(json.loads(read_bounded(self.settings, SETTINGS_LIMIT).decode("utf-8")))
        except FileNotFoundError as error:
            raise UsageError(
                f"--run must name a run, got {str(self.directory)!r} without {SETTINGS}; name another, or train first"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{str(self.settings)!r} must be readable and intact, got {describe_error(error)}; delete it and give "
                "the run's options again with --resume"
            ) from error

    def settings_to_resume(self, given: bool) -> Settings | None:
        """Return the settings of a run to resume; None if the file is lost and flags are `given` in its place.

        Raises:
          UsageError: as `read_settings`.
        """
        if given and not self.settings.exists() and self.checkpoints.exists():
            return None
        return self.read_settings()

    def check_new(self) -> None:
        """Refuse a directory that holds a run, or files that a run would overwrite.

        Raises:
          UsageError: a part of a run exists, or the name is too long.
        """
        try:
            existing = self.list_parts()
        except OSError as error:
            raise UsageError(
                f"--run must name a directory that can be created, got {reason(error)}; name another"
            ) from error
        if self.settings.exists() or self.checkpoints.exists():
            raise UsageError(
                f"--run must name a new directory, got {str(self.directory)!r} with a run in it; add --resume to "
                "continue that, or name another"
            )
        if existing:
            raise UsageError(
                f"--run must name a new directory, got {str(self.directory)!r} with {existing}; name another"
            )

    def list_parts(self) -> str:
        """Return the names of the parts that exist, separated by commas."""
        return ", ".join(path.name for path in self.parts if path.exists() or path.is_symlink())

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Create the directory and lock it until this context, or the process, ends.

        Raises:
          UsageError: it cannot be created, a link leads out of it, or another process has locked it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                is_ours = stack.enter_context(locked(self.directory))
            except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
                raise UsageError(
                    f"--run must name a directory that can be written, got {error}; name another"
                ) from error
            if not is_ours:
                raise UsageError(
                    f"--run must name a directory that no other process trains in, got {str(self.directory)!r}; "
                    "wait for that one, stop it, or name another"
                )
            if link := find_link_out(self.directory, (*self.parts, self.directory / DAMAGED)):
                raise UsageError(
                    f"--run must name a directory without links that lead out of it, got {str(link)!r}, a link to "
                    f"{os.path.realpath(link)!r}; move that here, or make the whole directory a link"
                )
            yield

    def save_settings(self, settings: Settings) -> None:
        """Write the options the run was started with.

        Raises:
          UsageError: the file cannot be written.
        """
        try:
            write_atomically(self.settings, (json.dumps(settings.to_json(), indent=2) + "\n").encode())
        except OSError as error:
            raise UsageError(f"--run must name a directory that can be written, got {error}; name another") from error

    def save_sample(self, step: int, text: str) -> None:
        """Write the sample of a step; a failure is printed and does not stop the run."""
        try:
            self.samples.mkdir(exist_ok=True)
            write_atomically(self.samples / f"{step:07}.txt", text.encode())
        except OSError as error:
            print_error(f"the sample of step {step:,} could not be saved ({reason(error)})")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Try to lock a directory; yield False if another process holds the lock, True also where locks do not exist."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    opened, is_ours = os.open(directory, os.O_RDONLY), True
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_ours = False
    except OSError:  # the file system has no locks
        pass
    try:
        yield is_ours
    finally:
        os.close(opened)


class Journal:
    """Writes `metrics.jsonl`, one JSON object per line.

    Attributes:
      path: the file; None in processes that write none.
      unwritten: lines that could not be written yet; the next call of `add` tries again.
    """

    def __init__(self, path: Path | None, done: int):
        """Open the file to continue after `done` steps; lines of later steps are dropped.

        Raises:
          UsageError: the file cannot be read or written.
        """
        self.path, self.unwritten = path, ""
        self._written: set[tuple[int, str]] = set()
        if path is not None and path.exists():
            try:
                lines = [line for line in read_lines(path) if json.loads(line)["step"] <= done] if done else []
                write_atomically(path, "".join(lines).encode())
            except OSError as error:
                raise UsageError(
                    f"{str(path)!r} must be readable and writable, got {reason(error)}; move it away"
                ) from error
            self._written = {entry_key(json.loads(line)) for line in lines}

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry, unless its step and split are in the file: a finished run scores the test split again."""
        if self.path is None or entry_key(entry) in self._written:
            return
        has_failed = bool(self.unwritten)
        self.unwritten += json.dumps(entry) + "\n"
        try:
            append(self.path, self.unwritten.encode())
            self.unwritten = ""
        except OSError as error:
            if not has_failed:
                print_error(
                    f"metrics cannot be written to {str(self.path)!r} ({reason(error)}); the next log line tries again"
                )


def new_directory(preset: str, seconds: int) -> Path:
    """Return a directory in `RUNS` that does not exist yet, named after the preset and the time (s since the epoch)."""
    stem = f"{preset}-{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d-%H%M%S}"
    names = [stem, *(f"{stem}-{count}" for count in range(2, 100))]
    return next(RUNS / name for name in names if not (RUNS / name).exists())


def newest_directory() -> Path:
    """Return the run in `RUNS` whose settings were written last.

    Raises:
      UsageError: there is no run.
    """
    found = sorted(RUNS.glob(f"*/{SETTINGS}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"without --run, {str(RUNS)!r} must hold a run, got none; give --run DIR")
    return found[-1].parent


def keep_compiled(directory: Path | None) -> None:
    """Turn on JAX's compilation cache in `directory` (None: JAX's setting, else the user's cache).

    Raises:
      UsageError: the directory cannot be written. The cache is then off, and a run only compiles again.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    directory = directory or Path(jax.config.jax_compilation_cache_dir or cache_dir() / "compiled")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        jax.config.update("jax_compilation_cache_dir", None)
        raise UsageError(
            f"the compilation cache must be writable, got {error}; compiling without it, name another "
            "--compilation-cache"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # faster ones save no time
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
