"""Other places for figures than the run's own files: TensorBoard, and Weights & Biases. Both are optional packages."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.checkpoints import reason
from examples.flags import UsageError
from examples.screen import tell

Logger = Callable[[dict[str, Any]], None]


def forgiving(log: Logger, place: str) -> Logger:
    """Return `log` with failures told of, the first of several alike: they cost figures in that place, not the run."""
    failures: set[str] = set()

    def log_or_tell(entry: dict[str, Any]) -> None:
        try:
            log(entry)
        except Exception as error:  # of a package, a network or a disk
            if (failure := reason(error)) not in failures:
                tell(f"{place} did not take the figures of step {entry['step']:,} ({failure})")
            failures.add(failure)

    return log_or_tell


def require(package: str, flag: str) -> Any:
    """Import an optional package.

    Raises:
      UsageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"{flag} needs the package {package}, got {error}; pip install {package}") from error


def tensorboard_logger(directory: Path) -> Logger:
    """Return a function that adds an entry of the journal to the events in a directory."""
    writer = require("tensorboardX", "--tensorboard").SummaryWriter(str(directory))

    def log(entry: dict[str, Any]) -> None:
        for name, value in scalars(entry).items():
            writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return log


def wandb_logger(project: str, directory: Path, config: dict[str, Any]) -> Logger:
    """Return a function that adds an entry of the journal to a run of Weights & Biases, named like the directory.

    Raises:
      UsageError: the package is not installed, or cannot start a run.
    """
    wandb = require("wandb", "--wandb")
    try:
        run = wandb.init(project=project, id=directory.name, resume="allow", dir=str(directory), config=config)
    except Exception as error:
        words = " ".join(str(error).split())
        raise UsageError(
            f"--wandb needs a run of Weights & Biases, got {words}; log in, or set WANDB_MODE=offline"
        ) from error

    def log(entry: dict[str, Any]) -> None:
        run.log(scalars(entry) | {"step": entry["step"]})

    return log


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Return the figures of an entry by the names of their curves."""
    figures = {
        f"bits_per_byte/{entry['split']}": entry["bits_per_byte"],
        "tokens_per_second": entry.get("tokens_per_second"),
        "share_of_peak": entry.get("share_of_peak"),
    }
    return {name: value for name, value in figures.items() if value is not None}
