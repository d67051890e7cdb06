"""Flags of the example: its files, its devices, and one flag for every field of its configuration."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.config import (
    MAY_CHANGE,
    MOST,
    PRESETS,
    Config,
    Windows,
    check_number,
    range_of,
    read_windows,
    write_value,
    write_windows,
)


class UsageError(ValueError):
    """The options cannot be served; the message says why and what to do."""


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Within, what the library refuses is an option that cannot be served: a sentence and no traceback."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def train_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a training run. The flag of a field is absent from its result unless it is given."""
    parser = new_parser(prog, description)
    files = parser.add_argument_group("files")
    add_data_flag(files)
    files.add_argument(
        "--run",
        "--out",
        dest="run",
        type=directory,
        metavar="DIR",
        help="where it is kept (default: a new runs/PRESET-DATE)",
    )
    files.add_argument("--resume", action="store_true", help="go on where --run stopped (default: the newest of runs/)")
    add_cache_flag(files)
    add_device_flags(parser.add_argument_group("devices"))
    add_watching_flags(parser.add_argument_group("other places to look"))
    presets = parser.add_argument_group("preset")
    presets.add_argument(
        "--preset", choices=PRESETS, help="defaults of what follows (default: cpu-demo on a CPU, else original)"
    )
    add_field_flags(parser)
    return parser


def generate_parser(prog: str, _: str | None) -> argparse.ArgumentParser:
    """Return the parser of `generate`."""
    parser = new_parser(f"{prog} generate", "Write on from a prompt with the model of a run, as it is drawn.")
    add_run_flags(parser)
    count, share = value_reader(int, zero=False), value_reader(float, zero=False)
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="what comes before (default: a new line)")
    parser.add_argument("--length", type=count, default=500, metavar="N", help="bytes to write (default: 500)")
    parser.add_argument(
        "--temperature", type=value_reader(float, zero=True), help="0 takes the likeliest bytes (default: the run's)"
    )
    parser.add_argument("--top-k", type=count, metavar="K", help="draw from the K likeliest bytes only")
    parser.add_argument("--top-p", type=share, metavar="P", help="draw from the fewest bytes that have it together")
    parser.add_argument("--min-p", type=share, metavar="P", help="draw from bytes with this share of the likeliest's")
    parser.add_argument("--seed", type=value_reader(int, zero=True), default=0, help="of what is drawn (default: 0)")
    add_cache_flag(parser)
    return parser


def evaluate_parser(prog: str, _: str | None) -> argparse.ArgumentParser:
    """Return the parser of `evaluate`."""
    parser = new_parser(f"{prog} evaluate", "Score each byte of a split with the model of a run.")
    add_run_flags(parser)
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="which part (default: test)")
    add_data_flag(parser, "the run's")
    add_cache_flag(parser)
    return parser


def new_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return an empty parser that accepts no abbreviations."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog, description=description, formatter_class=formatter, allow_abbrev=False)


def add_run_flags(parser: Any) -> None:
    """Add the flags that name a checkpoint."""
    parser.add_argument(
        "--run", "--out", dest="run", type=directory, metavar="DIR", help="default: the newest of runs/"
    )
    parser.add_argument(
        "--checkpoint",
        choices=("best", "newest"),
        default="best",
        help="fewest bits in validation, or the last (default: best)",
    )


def add_data_flag(parser: Any, default: str = "enwik8, downloaded once") -> None:
    """Add the flag that names the corpus."""
    parser.add_argument("--data", type=Path, metavar="FILE", help=f"raw, .gz or .zip file (default: {default})")


def add_cache_flag(parser: Any) -> None:
    """Add the flag that names where compiled programs are kept."""
    parser.add_argument(
        "--compilation-cache",
        type=Path,
        metavar="DIR",
        help="directory of compiled programs, kept for later runs (default: JAX_COMPILATION_CACHE_DIR, else the user's "
        "cache; JAX_ENABLE_COMPILATION_CACHE=false keeps none)",
    )


def add_device_flags(parser: Any) -> None:
    """Add the flags that name the devices a run uses; they do not change what it learns."""
    count, index = value_reader(int, zero=False), value_reader(int, zero=True)
    for name, default, meaning in (
        ("data", None, "parts of a batch (default: the most that divide --batch-size and that there are devices for)"),
        ("sequence", 1, "parts of a sequence (default: 1)"),
        ("tensor", 1, "parts of the layers, by heads (default: 1)"),
    ):
        parser.add_argument(f"--{name}-parallel", type=count, default=default, metavar="N", help=meaning)
    parser.add_argument("--coordinator", type=address, metavar="HOST:PORT", help="where process 0 of several listens")
    parser.add_argument("--processes", type=count, metavar="N", help="how many take part; all get the same command")
    parser.add_argument("--process", type=index, metavar="I", help="which of them this is, counted from 0")
    parser.add_argument(
        "--distributed", action="store_true", help="take part with what JAX finds of these three (Slurm, TPU pods, MPI)"
    )


def add_watching_flags(parser: Any) -> None:
    """Add the flags that name where figures go beside the screen and the run's own files."""
    parser.add_argument("--tensorboard", action="store_true", help="write events into the run (needs tensorboardX)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to a project of Weights & Biases (needs wandb)")
    parser.add_argument("--profile", action="store_true", help="trace a few steps into the run")


def add_field_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of `Config`, in the group that the field names."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        name = field.metadata["group"]
        groups.setdefault(name, parser.add_argument_group(name))
        groups[name].add_argument(
            flag(field.name), default=argparse.SUPPRESS, help=describe_field(field), **how_to_read(field)
        )


def describe_field(field: dataclasses.Field) -> str:
    """Return the help of a field's flag: what it is for, and its value in each preset."""
    values = {name: write_value(getattr(preset, field.name)) for name, preset in PRESETS.items()}
    shown = values.popitem()[1] if len(set(values.values())) == 1 else ", ".join(f"{k} {v}" for k, v in values.items())
    return f"{field.metadata['meaning']} ({shown})".replace("%", "%%")


def how_to_read(field: dataclasses.Field) -> dict[str, Any]:
    """Return the arguments of `add_argument` that read a field."""
    if field.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    if "choices" in field.metadata:
        return {"choices": field.metadata["choices"]}
    if field.type == Windows:
        return {"type": windows, "metavar": "W[,W...]"}
    kind = float if field.type is float else int
    metavar = "X" if kind is float else "N"
    read = value_reader(kind, **range_of(field), all_allowed=field.metadata.get("all", False))
    return {"type": read, "metavar": metavar}


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def value_reader(kind: type, zero: bool, most: float = math.inf, all_allowed: bool = False) -> Callable[[str], Any]:
    """Return the function that reads a number of type `kind` and refuses what must not be."""
    most = min(most, math.inf if kind is float else 2**63 - 1)  # a seed is a signed word

    def read(text: str) -> int | float | None:
        if text == "all" and all_allowed:
            return None
        value = kind(text)
        try:
            check_number(value, zero, most)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    read.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return read


def address(text: str) -> str:
    """Return `text` if it has the form of a host and a port."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text!r}")
    return text


def directory(text: str) -> Path:
    """Return `text` as a path if it is not empty, as a variable of the shell that is not set is."""
    if not text:
        raise argparse.ArgumentTypeError("must name a directory, got an empty name")
    return Path(text)


def windows(text: str) -> Windows:
    """Return the windows of the layers."""
    try:
        return read_windows(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be a number, or one a layer as in 64,64,global, each from 1 to {MOST:,}, got {text!r}"
        ) from error


def choose_config(preset: Config, given: Mapping[str, Any], saved: Config | None) -> Config:
    """Return the preset, or the saved configuration of a resumed run, with the given options in place.

    Raises:
      UsageError: the windows are not as many as the layers, or an option that a resumed run must keep differs.
    """
    if saved is not None:
        given = {name: value for name, value in given.items() if (name, value) != ("decay_steps", None)}  # as it has
    config = dataclasses.replace(saved or preset, **given)
    if saved is not None:
        changed = [name for name in given if name not in MAY_CHANGE and given[name] != getattr(saved, name)]
        if changed:
            flags = ", ".join(flag(name) for name in changed)
            raise UsageError(f"--resume keeps the run's options, got other values for {flags}; leave them out")
    if len(config.windows) not in (1, config.depth):
        raise UsageError(
            f"--windows must be one number or one for each of --depth {config.depth} layers, got "
            f"{write_windows(config.windows)}; give {config.depth}"
        )
    if config.decay_steps is None:
        config = dataclasses.replace(config, decay_steps=config.steps)
    return config
