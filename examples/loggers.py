"""Loggers that send a run's metrics to TensorBoard and to Weights & Biases; both are optional packages."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from examples.checkpoints import reason
from examples.flags import UsageError
from examples.screen import print_error


class Logger(NamedTuple):
    """A destination for metrics besides `metrics.jsonl`.

    Attributes:
      log: takes an entry of the journal.
      close: waits until all entries have been written.
    """

    log: Callable[[dict[str, Any]], None]
    close: Callable[[], None]


def forgiving(logger: Logger, place: str) -> Logger:
    """Return a logger whose failures do not stop the run; each distinct one is printed once."""
    failures: set[str] = set()

    def forgive(act: Callable[..., None]) -> Callable[..., None]:
        def act_or_print_error(*args: Any) -> None:
            try:
                act(*args)
            except Exception as error:  # from the package, the network or the disk
                if (failure := reason(error)) not in failures:
                    print_error(f"{place} did not log all metrics ({failure})")
                failures.add(failure)

        return act_or_print_error

    return Logger(forgive(logger.log), forgive(logger.close))


def require(package: str, flag: str) -> Any:
    """Import an optional package.

    Raises:
      UsageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"{flag} needs {package}, got {error}; install it with `pip install {package}`") from error


def tensorboard_logger(directory: Path) -> Logger:
    """Return a logger that writes TensorBoard events into a directory."""
    writer = require("tensorboardX", "--tensorboard").SummaryWriter(str(directory))

    def log(entry: dict[str, Any]) -> None:
        for name, value in scalars(entry).items():
            writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return Logger(log, writer.close)


def wandb_logger(project: str, directory: Path, config: dict[str, Any]) -> Logger:
    """Return a logger that logs to a Weights & Biases run named after the directory, the same one when resumed.

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

    return Logger(log, run.finish)


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a journal entry, by the names of their curves."""
    metrics = {
        f"bits_per_byte/{entry['split']}": entry["bits_per_byte"],
        "tokens_per_second": entry.get("tokens_per_second"),
        "share_of_peak": entry.get("share_of_peak"),
    }
    return {name: value for name, value in metrics.items() if value is not None}
