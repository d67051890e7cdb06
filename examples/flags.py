"""The command line of the example: flags for its files, its devices and every field of its configuration."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.config import (
    INTEGER_LIMIT,
    MAY_CHANGE,
    PRESETS,
    Config,
    Windows,
    check_number,
    format_value,
    format_windows,
    parse_windows,
    range_of,
)


class UsageError(ValueError):
    """The options are invalid; the message says why and what to do."""


@contextlib.contextmanager
def as_usage_error() -> Iterator[None]:
    """Raise the library's ValueError and TypeError as UsageError, which is printed on one line without a traceback."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def train_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a training run; its result holds a field of `Config` only if its flag is given."""
    parser = new_parser(prog, description)
    files = parser.add_argument_group("files")
    add_data_flag(files)
    files.add_argument(
        "--run",
        "--out",
        dest="run",
        type=directory,
        metavar="DIR",
        help="directory of the run (default: a new runs/PRESET-DATE)",
    )
    files.add_argument(
        "--resume", action="store_true", help="continue the run in --run (default: the newest run in runs/)"
    )
    add_cache_flag(files)
    add_device_flags(parser.add_argument_group("devices"))
    add_logging_flags(parser.add_argument_group("monitoring"))
    presets = parser.add_argument_group("preset")
    presets.add_argument(
        "--preset",
        choices=PRESETS,
        help="values of all flags below, in brackets there (default: cpu-demo on a CPU, else original)",
    )
    add_field_flags(parser)
    return parser


def generate_parser(prog: str, _: str | None) -> argparse.ArgumentParser:
    """Return the parser of `generate`."""
    parser = new_parser(f"{prog} generate", "Continue a prompt with the model of a run, printing each byte at once.")
    add_run_flags(parser)
    count, share = number_parser(int, zero=False), number_parser(float, zero=False)
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="text to continue (default: a new line)")
    parser.add_argument("--length", type=count, default=500, metavar="N", help="bytes to generate (default: 500)")
    parser.add_argument(
        "--temperature",
        type=number_parser(float, zero=True),
        metavar="X",
        help="sampling temperature; 0: always the likeliest byte (default: the run's)",
    )
    parser.add_argument("--top-k", type=count, metavar="K", help="sample from the K likeliest bytes only")
    parser.add_argument(
        "--top-p", type=share, metavar="P", help="sample from the fewest bytes whose probabilities sum to P or more"
    )
    parser.add_argument(
        "--min-p", type=share, metavar="P", help="sample from bytes at least P times as likely as the likeliest"
    )
    parser.add_argument(
        "--seed", type=number_parser(int, zero=True), default=0, metavar="N", help="seed of the sampling (default: 0)"
    )
    add_cache_flag(parser)
    return parser


def evaluate_parser(prog: str, _: str | None) -> argparse.ArgumentParser:
    """Return the parser of `evaluate`."""
    parser = new_parser(f"{prog} evaluate", "Score every byte of a split with the model of a run.")
    add_run_flags(parser)
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="split to score (default: test)"
    )
    add_data_flag(parser, "the run's")
    add_cache_flag(parser)
    return parser


def new_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser without arguments that accepts no abbreviated flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog, description=description, formatter_class=formatter, allow_abbrev=False)


def add_run_flags(parser: Any) -> None:
    """Add the flags that name a checkpoint."""
    parser.add_argument(
        "--run",
        "--out",
        dest="run",
        type=directory,
        metavar="DIR",
        help="directory of the run (default: the newest run in runs/)",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("best", "newest"),
        default="best",
        help="the checkpoint with the fewest bits per byte in validation, or the newest (default: best)",
    )


def add_data_flag(parser: Any, default: str = "enwik8, downloaded once") -> None:
    """Add the flag that names the corpus."""
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help=f"corpus, as a raw, .gz or .zip file (default: {default})"
    )


def add_cache_flag(parser: Any) -> None:
    """Add the flag that names the directory of compiled programs."""
    parser.add_argument(
        "--compilation-cache",
        type=Path,
        metavar="DIR",
        help="directory of JAX's compilation cache (default: JAX_COMPILATION_CACHE_DIR, else the user's "
        "cache; JAX_ENABLE_COMPILATION_CACHE=false turns it off)",
    )


def add_device_flags(parser: Any) -> None:
    """Add the flags that choose the devices of a run; they do not change what it learns."""
    count, index = number_parser(int, zero=False), number_parser(int, zero=True)
    for name, default, meaning in (
        ("data", None, "devices that share the rows of a batch (default: as many as divide --batch-size)"),
        ("sequence", 1, "devices that share the tokens of a sequence (default: 1)"),
        ("tensor", 1, "devices that share the heads and hidden units of a layer (default: 1)"),
    ):
        parser.add_argument(f"--{name}-parallel", type=count, default=default, metavar="N", help=meaning)
    parser.add_argument("--coordinator", type=address, metavar="HOST:PORT", help="address where process 0 listens")
    parser.add_argument("--processes", type=count, metavar="N", help="number of processes; each gets the same command")
    parser.add_argument("--process", type=index, metavar="I", help="index of this process, from 0")
    parser.add_argument(
        "--distributed", action="store_true", help="let JAX detect the three flags above (on Slurm, TPU pods, MPI)"
    )


def add_logging_flags(parser: Any) -> None:
    """Add the flags that send metrics to other tools and record a profile."""
    parser.add_argument("--tensorboard", action="store_true", help="log metrics for TensorBoard (needs tensorboardX)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log metrics to a Weights & Biases project (needs wandb)")
    parser.add_argument("--profile", action="store_true", help="record a JAX profile of a few steps")


def add_field_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of `Config`, under the field's group."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        name = field.metadata["group"]
        groups.setdefault(name, parser.add_argument_group(name))
        groups[name].add_argument(
            flag(field.name), default=argparse.SUPPRESS, help=describe_field(field), **argument_options(field)
        )


def describe_field(field: dataclasses.Field) -> str:
    """Return the help of a field's flag: its meaning and its value in each preset."""
    values = {name: format_value(getattr(preset, field.name)) for name, preset in PRESETS.items()}
    shown = values.popitem()[1] if len(set(values.values())) == 1 else ", ".join(f"{k} {v}" for k, v in values.items())
    return f"{field.metadata['meaning']} ({shown})".replace("%", "%%")


def argument_options(field: dataclasses.Field) -> dict[str, Any]:
    """Return the arguments of `add_argument` that parse a field."""
    if field.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    if "choices" in field.metadata:
        return {"choices": field.metadata["choices"]}
    if field.type == Windows:
        return {"type": windows, "metavar": "W[,W...]"}
    kind = float if field.type is float else int
    metavar = "X" if kind is float else "N"
    parse = number_parser(kind, **range_of(field), all_allowed=field.metadata.get("all", False))
    return {"type": parse, "metavar": metavar}


def flag(name: str) -> str:
    """Return the flag that sets a field."""
    return "--" + name.replace("_", "-")


def number_parser(kind: type, zero: bool, maximum: float = math.inf, all_allowed: bool = False) -> Callable[[str], Any]:
    """Return a function that parses a number of type `kind` and refuses one out of range."""
    maximum = min(maximum, math.inf if kind is float else 2**63 - 1)  # JAX takes a seed as a signed 64-bit integer

    def parse(text: str) -> int | float | None:
        if text == "all" and all_allowed:
            return None
        value = kind(text)
        try:
            check_number(value, zero, maximum)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    parse.__name__ = kind.__name__  # argparse quotes the name if the text is not a number: "invalid int value"
    return parse


def address(text: str) -> str:
    """Return `text` if it has the form HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text!r}")
    return text


def directory(text: str) -> Path:
    """Return `text` as a path; refuse an empty one, which comes from an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("must name a directory, got an empty name")
    return Path(text)


def windows(text: str) -> Windows:
    """Parse the windows of the layers."""
    try:
        return parse_windows(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be one number, or one per layer as in 64,64,global, each from 1 to {INTEGER_LIMIT:,}, got {text!r}"
        ) from error


def choose_config(preset: Config, given: Mapping[str, Any], saved: Config | None) -> Config:
    """Return the preset, or a resumed run's saved configuration, with the given options in place.

    Raises:
      UsageError: the windows are neither one nor one per layer, or a resumed run may not change an option.
    """
    if saved is not None:  # --decay-steps=all keeps the saved number
        given = {name: value for name, value in given.items() if (name, value) != ("decay_steps", None)}
    config = dataclasses.replace(saved or preset, **given)
    if saved is not None:
        changed = [name for name in given if name not in MAY_CHANGE and given[name] != getattr(saved, name)]
        if changed:
            flags = ", ".join(flag(name) for name in changed)
            raise UsageError(f"--resume must keep the run's options, got other values for {flags}; leave them out")
    if len(config.windows) not in (1, config.depth):
        raise UsageError(
            f"--windows must be one number, or one per layer with --depth {config.depth}, got "
            f"{format_windows(config.windows)}; give 1 or {config.depth}"
        )
    if config.decay_steps is None:
        config = dataclasses.replace(config, decay_steps=config.steps)
    return config
