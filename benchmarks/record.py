"""Record figures: what was measured, by which command, on which machine, when.

A record is a JSON file with the facts named in `FACTS`, others that a benchmark adds, and `rows`, one line each. A time
in a row is a list with one entry per round, or with the median alone if the rounds were not kept. `benchmarks/figures`
holds the records from which `benchmarks.plot` draws.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "figures"
FACTS = ("command", "device", "host", "versions", "date")


def add_option(parser: argparse.ArgumentParser):
    """Add the option that names the file to record in; None records nothing."""
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the figures to this JSON file")


def save(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]):
    """Write the rows of this process's command, and the facts about its machine."""
    text = json.dumps({"command": command()} | dict(facts), indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(_rounded(row))}" for row in rows)
    path.write_text(f'{text},\n "rows": [\n{lines}\n ]\n}}\n')


def load(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: It lacks a fact or has no row.
    """
    record = json.loads(path.read_text())
    if missing := [name for name in (*FACTS, "rows") if not record.get(name)]:
        raise ValueError(f"A record must have {', '.join(FACTS)} and rows; {path.name} lacks {', '.join(missing)}.")
    return record


def command() -> str:
    """Return the command of this process, without the option that records it."""
    arguments, kept = iter(sys.argv[1:]), []
    for argument in arguments:
        if argument == "--record":
            next(arguments, None)
        elif not argument.startswith("--record="):
            kept.append(argument)
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *kept])


def _rounded(value):
    """Return a value of a row with its floats to five digits, more than any measurement is worth."""
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def median(figure: Sequence[float] | None) -> float | None:
    """Return the median over the rounds of a figure; None if it was not measured."""
    return statistics.median(figure) if figure else None
