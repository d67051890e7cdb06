"""What a training run leaves behind, and what a later one goes on from: figures, checkpoints, compiled programs."""

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import chex
import jax
from flax import serialization

from examples.corpus import Corpus, cache_dir
from examples.flags import UsageError

CHECKPOINT = "checkpoint.msgpack"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All that a resumed run needs; the seed (in `config`) and the step (in `state`) draw the data."""

    state: Any  # as read from a file, nested dictionaries
    config: Any  # the run's dataclass
    fingerprint: str  # of the corpus
    seconds: float  # that the run had taken


class Records:
    """The figures of a run: printed, and with a directory also kept as `metrics.jsonl`, beside the checkpoint."""

    def __init__(self, corpus: Corpus, directory: Path | None, seconds: float, done: int):
        """Go on after `done` steps that took `seconds`, dropping the lines of later ones."""
        self.corpus, self.directory = corpus, directory
        self.began = time.perf_counter() - seconds
        if directory:
            path = directory / "metrics.jsonl"
            write_atomically(path, "".join(read_lines(path, done)).encode())

    def seconds(self) -> float:
        """Return the time since the run began, without the pause before a resumption."""
        return time.perf_counter() - self.began

    def add(self, step: int, split: str, bits: float, rate: float | None = None) -> None:
        """Print one figure and keep it."""
        seconds, name = self.seconds(), self.corpus.name
        pace = f"  {rate:,.0f} tokens/s" if rate is not None else ""
        figure = f"{split:10}  {bits:.3f} bits per byte of {name}"
        print(f"{seconds:6.1f} s  step {step:6,}  {figure}{pace}", flush=True)
        if self.directory:
            entry = {"step": step, "seconds": round(seconds, 2), "split": split, "bits_per_byte": bits}
            entry |= {"tokens_per_second": rate, "corpus": name}
            with open(self.directory / "metrics.jsonl", "a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")

    def save(self, state: Any, config: Any) -> None:
        """Write the checkpoint of a state, if there is a directory for it."""
        if self.directory:
            checkpoint = Checkpoint(state, config, self.corpus.fingerprint(), self.seconds())
            save_checkpoint(self.directory / CHECKPOINT, checkpoint)


def read_lines(path: Path, last_step: int) -> list[str]:
    """Return the whole lines of a metrics file that are not later than `last_step`."""
    if not path.exists() or last_step == 0:
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= last_step]


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`; whoever reads it sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as sink:
        sink.write(content)
        sink.flush()
        os.fsync(sink.fileno())
    os.replace(partial, path)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to a file."""
    content = {
        "state": serialization.to_state_dict(checkpoint.state),
        "config": json.dumps(dataclasses.asdict(checkpoint.config)),
        "fingerprint": checkpoint.fingerprint,
        "seconds": checkpoint.seconds,
    }
    write_atomically(path, serialization.msgpack_serialize(jax.device_get(content)))


def read_checkpoint(path: Path, config_type: type) -> Checkpoint:
    """Return what `save_checkpoint` wrote, its configuration as a `config_type`.

    Raises:
      UsageError: there is no such file, or it is not whole.
    """
    try:
        content: dict[str, Any] = serialization.msgpack_restore(path.read_bytes())
        config = config_type(**json.loads(str(content["config"])))
        return Checkpoint(content["state"], config, content["fingerprint"], content["seconds"])
    except FileNotFoundError as error:
        raise UsageError(f"--resume needs a checkpoint, got no {str(path)!r}; start without --resume") from error
    except Exception as error:  # whatever msgpack, json and the configuration make of damaged bytes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"--resume needs a whole checkpoint, got {str(path)!r} ({reason}); start a new run") from error


def restore_state(template: Any, saved: dict[str, Any]) -> Any:
    """Return the saved state, arrays of NumPy, in the form of `template`, whose shapes suffice.

    Raises:
      UsageError: it is another model's.
    """
    try:
        restored = serialization.from_state_dict(template, saved)
        chex.assert_trees_all_equal_shapes_and_dtypes(restored, template)
    except (AssertionError, ValueError) as error:
        raise UsageError("--resume needs the state of this very model, got another's; start a new run") from error
    return restored


def open_run(out: Path | None, resume: bool, config_type: type) -> Checkpoint | None:
    """Make the output directory and return the checkpoint that is to be resumed, if any.

    Raises:
      UsageError: there is nothing to resume, or a checkpoint would be overwritten.
    """
    if out is None:
        if resume:
            raise UsageError("--resume needs the directory of a run, got none; give --out DIR")
        return None
    path = out / CHECKPOINT
    if resume:
        return read_checkpoint(path, config_type)
    if path.exists():
        raise UsageError(f"--out must name a new directory, got {str(out)!r} with a checkpoint; add --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out must name a directory that can be made, got {error}; name another") from error
    return None


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
