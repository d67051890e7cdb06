"""The directory of a run: its settings, its figures, its samples, and where the rest of it is."""

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
from examples.corpus import Corpus, cache_dir, describe
from examples.files import (
    SETTINGS_LIMIT,
    append,
    find_link_out,
    name_figure,
    read_bounded,
    read_lines,
    write_atomically,
)
from examples.flags import UsageError, flag
from examples.screen import tell

RUNS = Path("runs")  # where runs are that no --run names
SETTINGS = "settings.json"
ABOUT = {"config": dict, "fingerprint": str, "seconds": float, "losses": list}  # what a run needs beside a state


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run was started with.

    Attributes:
      config: all that decides what it learns.
      data: the corpus's file; None is enwik8.
      fingerprint: of the corpus.
    """

    config: Config
    data: Path | None
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        data = None if self.data is None else str(self.data.resolve())
        return {"config": self.config.to_json(), "data": data, "fingerprint": self.fingerprint}

    def check_corpus(self, corpus: Corpus) -> None:
        """Refuse bytes that are not those that the run was started with.

        Raises:
          UsageError: they are others.
        """
        if self.fingerprint != corpus.fingerprint():
            raise UsageError("a run needs the bytes that it began with, got others; give the same --data")

    def check_checkpoint(self, about: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings.

        Raises:
          UsageError: it is another version's, or another run's, which the flags or `settings.json` do not describe.
        """
        lacking = [name for name, kind in ABOUT.items() if not isinstance(about.get(name), kind)]
        if lacking:
            raise UsageError(
                f"checkpoints must be of this version of the example, got others, which lack {', '.join(lacking)}; "
                "use the version that wrote them, or start a new run"
            )
        saved, ours = about["config"], self.config.to_json()
        unlike = [name for name in saved | ours if name not in MAY_CHANGE and saved.get(name) != ours.get(name)]
        if unlike or about["fingerprint"] != self.fingerprint:
            what = ", ".join(map(flag, unlike)) or "--data"
            raise UsageError(f"a run needs the options of its checkpoints, got other values for {what}; give theirs")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Settings":
        """Return what `to_json` wrote."""
        data = None if fields["data"] is None else Path(fields["data"])
        return cls(Config.from_json(fields["config"]), data, fields["fingerprint"])


class RunFiles:
    """Where the parts of a run are.

    Attributes:
      directory: of the run.
      checkpoints, metrics, samples, curve, profile, events: directories and files in it.
      parts: all of them.
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
        """Return what the run was started with.

        Raises:
          UsageError: there is no run, or its settings are damaged or another version's.
        """
        try:
            return Settings.from_json(json.loads(read_bounded(self.settings, SETTINGS_LIMIT).decode("utf-8")))
        except FileNotFoundError as error:
            raise UsageError(
                f"--run must name a run, got {str(self.directory)!r} without {SETTINGS}; name another, or start one"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{str(self.settings)!r} must be readable and whole, got {describe(error)}; delete it and give the "
                "run's options again with --resume, and it goes on"
            ) from error

    def settings_to_resume(self, given: bool) -> Settings | None:
        """Return the settings of a run that is to go on; None if they are lost, and flags are given in their place.

        Raises:
          UsageError: as `read_settings`.
        """
        if given and not self.settings.exists() and self.checkpoints.exists():
            return None
        return self.read_settings()

    def check_new(self) -> None:
        """Refuse a directory with a run in it, or with files that a run would overwrite.

        Raises:
          UsageError: there is a part of a run, or the name is too long.
        """
        try:
            there = self.list_parts()
        except OSError as error:
            raise UsageError(
                f"--run must name a directory that can be made, got {reason(error)}; name another"
            ) from error
        if self.settings.exists() or self.checkpoints.exists():
            raise UsageError(f"--run must name a new directory, got a run's, {str(self.directory)!r}; add --resume")
        if there:
            raise UsageError(f"--run must name a new directory, got {str(self.directory)!r} with {there}; name another")

    def list_parts(self) -> str:
        """Return the names of what is there."""
        return ", ".join(path.name for path in self.parts if path.exists() or path.is_symlink())

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Make the directory, and let no other process claim it until this is left or the process ends.

        Raises:
          UsageError: it cannot be made, a link leads out of it, or another process has claimed it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                is_ours = stack.enter_context(locked(self.directory))
            except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
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
                    f"--run must name a directory that holds all of a run, got {str(link)!r}, a link to "
                    f"{os.path.realpath(link)!r}; put there what it names, or link the directory of the run"
                )
            yield

    def keep_settings(self, settings: Settings) -> None:
        """Keep what the run was started with.

        Raises:
          UsageError: they cannot be written.
        """
        try:
            write_atomically(self.settings, (json.dumps(settings.to_json(), indent=2) + "\n").encode())
        except OSError as error:
            raise UsageError(f"--run must name a directory that can be written, got {error}; name another") from error

    def keep_sample(self, step: int, text: str) -> None:
        """Keep what the model wrote after so many steps."""
        try:
            self.samples.mkdir(exist_ok=True)
            write_atomically(self.samples / f"{step:07}.txt", text.encode())
        except OSError as error:
            tell(f"the sample of step {step:,} could not be kept ({reason(error)})")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Lock a directory, unless another process has; yield whether it is ours. Where there are no locks, all are."""
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
    except OSError:  # a file system without locks
        pass
    try:
        yield is_ours
    finally:
        os.close(opened)


class Journal:
    """`metrics.jsonl`: one JSON object a line for each figure. Lines that cannot be written wait for the next try."""

    def __init__(self, path: Path | None, done: int):
        """Go on after `done` steps, dropping the lines of later ones. A path of None keeps nothing.

        Raises:
          UsageError: the file cannot be read or written.
        """
        self.path, self.waiting = path, ""
        self._there: set[tuple[int, str]] = set()
        if path is not None and path.exists():
            try:
                kept = [line for line in read_lines(path) if json.loads(line)["step"] <= done] if done else []
                write_atomically(path, "".join(kept).encode())
            except OSError as error:
                raise UsageError(
                    f"{str(path)!r} must be readable and writable, got {reason(error)}; move it away"
                ) from error
            self._there = {name_figure(json.loads(line)) for line in kept}

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a figure, unless it is there: one that a finished run computes again."""
        if self.path is None or name_figure(entry) in self._there:
            return
        is_known = bool(self.waiting)  # that the last try failed
        self.waiting += json.dumps(entry) + "\n"
        try:
            append(self.path, self.waiting.encode())
            self.waiting = ""
        except OSError as error:
            if not is_known:
                tell(f"figures cannot be written to {str(self.path)!r} ({reason(error)}); they wait for the next try")


def new_directory(preset: str, seconds: int) -> Path:
    """Return a directory of `RUNS` that is not there yet, named by a preset and a time in seconds since the epoch."""
    stem = f"{preset}-{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d-%H%M%S}"
    names = [stem, *(f"{stem}-{count}" for count in range(2, 100))]
    return next(RUNS / name for name in names if not (RUNS / name).exists())


def newest_directory() -> Path:
    """Return the run in `RUNS` that was started last.

    Raises:
      UsageError: there is none.
    """
    found = sorted(RUNS.glob(f"*/{SETTINGS}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"without --run the newest run in {str(RUNS)!r} is taken, got none there; give --run DIR")
    return found[-1].parent


def keep_compiled(directory: Path | None) -> None:
    """Let JAX keep compiled programs in `directory` (None: JAX's own choice, else the user's cache) for later runs.

    Raises:
      UsageError: the directory cannot be written; nothing is kept then, and a run works as well.
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
        raise UsageError(f"compiled programs are not kept, got {error}; name another --compilation-cache") from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # below, a file saves nothing
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
