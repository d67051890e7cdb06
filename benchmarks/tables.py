"""Markdown tables of figures, and the reason for a missing row."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Skipped(Exception):  # noqa: N818 - not an error: the reason why a form has no row
    """A form cannot serve a case on this machine; the message says why."""


def header(columns: Sequence[str]) -> str:
    """Return the first two lines of a table."""
    return f"{row(columns)}\n{row(['---'] * len(columns))}"


def row(cells: Iterable[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a whole table."""
    return "\n".join([header(columns), *map(row, rows)])


def spread(figures: Sequence[float], digits: int) -> str:
    """Return the median, with the least and the most in brackets."""
    middle, least, most = (f"{f(figures):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({least} to {most})"


def bullets(facts: Mapping[str, Any]) -> str:
    """Return a list of facts, one a line."""
    texts = {name: f"{fact:.3g}" if isinstance(fact, float) else fact for name, fact in facts.items()}
    return "\n".join(f"* {name}: {text}" for name, text in texts.items())


def reason(problem: Exception) -> str:
    """Return why a form has no row, on one line."""
    first = (str(problem).strip().splitlines() or [""])[0][:200]
    return first if isinstance(problem, Skipped) else f"{type(problem).__name__}: {first}"
