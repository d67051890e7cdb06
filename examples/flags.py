"""Flags of a training script: its files, and one flag for every field of its configuration, a frozen dataclass."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """The options cannot be served; the message says why and what to do."""


def build_parser(
    description: str | None, presets: Mapping[str, Any], zero_allowed: Collection[str]
) -> argparse.ArgumentParser:
    """Return the parser.

    The flag of a field is absent from the result unless it is given. A number must be greater than 0, or at least 0
    for the fields in `zero_allowed`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_flags(parser)
    add_device_flags(parser)
    parser.add_argument("--preset", choices=presets, help="defaults of what follows (default: by JAX's backend)")
    for field in dataclasses.fields(next(iter(presets.values()))):
        defaults = ", ".join(f"{name}: {getattr(preset, field.name)}" for name, preset in presets.items())
        reading: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if field.type is bool
            else {"type": value_reader(field.type, field.name in zero_allowed)}
        )
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=f"({defaults})", **reading)
    return parser


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name what a run reads and where it writes."""
    parser.add_argument("--data", type=Path, help="raw, .gz or .zip file to train on (default: enwik8)")
    parser.add_argument("--out", type=Path, help="directory for metrics.jsonl and checkpoint.msgpack")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--compilation-cache",
        type=Path,
        metavar="DIR",
        help="directory of compiled programs, kept for later runs (default: JAX_COMPILATION_CACHE_DIR, else the user's "
        "cache; JAX_ENABLE_COMPILATION_CACHE=false keeps none)",
    )


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the devices a run uses; they do not change what it learns."""
    count, index = value_reader(int, zero_allowed=False), value_reader(int, zero_allowed=True)
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


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def value_reader(kind: Any, zero_allowed: bool) -> Callable[[str], Any]:
    """Return the function that reads a field of type `kind` and refuses what the field cannot be."""
    if kind is str:
        return dtype_name
    number = float if kind is float else int

    def read(text: str) -> int | float | None:
        if text == "all" and kind == int | None:
            return None
        value = number(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            raise argparse.ArgumentTypeError(f"must be {'at least' if zero_allowed else 'greater than'} 0, got {text}")
        return value

    read.__name__ = number.__name__  # argparse names it when the text is no number at all
    return read


def address(text: str) -> str:
    """Return `text` if it has the form of a host and a port."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text!r}")
    return text


def dtype_name(text: str) -> str:
    """Return `text` if it names a dtype that the model computes in."""
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"must be float32 or bfloat16, got {text!r}")
    return text


def choose_config(preset: Any, given: Mapping[str, Any], saved: Any | None, may_change: Collection[str]) -> Any:
    """Return the preset, or the saved configuration of a resumed run, with the given options in place.

    Raises:
      UsageError: an option outside `may_change` differs from the saved one.
    """
    base = saved or preset
    config = dataclasses.replace(base, **given)
    changed = [name for name in given if name not in may_change and getattr(config, name) != getattr(base, name)]
    if saved and changed:
        flags = ", ".join(flag(name) for name in changed)
        raise UsageError(f"--resume keeps the run's options, got other values for {flags}; leave them out")
    return config
