"""What a run shows: a bar that moves on a terminal, and lines of at most 100 columns everywhere."""

import contextlib
import os
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax

COLUMNS = 100
LEAST_BAR = 10  # columns of a bar and the space beside it

# Floating-point operations a second of one device, bfloat16 and dense, by the makers' data sheets. The first name that
# is in what JAX calls the device counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


class Progress(NamedTuple):
    """How far training is, and how it goes.

    Attributes:
      step, steps: done, and in all.
      left: seconds that the rest will take at this pace; None before there is one.
      bits: per byte of the last steps; None before there are any.
      rate: tokens a second.
      share: of the devices' peak; None where that is not known.
    """

    step: int
    steps: int
    left: float | None = None
    bits: float | None = None
    rate: float | None = None
    share: float | None = None

    def where(self) -> str:
        """Return the step, of how many, and the percentage."""
        width = len(f"{self.steps:,}")
        return f"step {self.step:>{width},} of {self.steps:,}  {100 * self.step // max(self.steps, 1):3} %"

    def figures(self, columns: int) -> str:
        """Return the other figures that are known, the first ones if not all fit."""
        memory = peak_memory()
        parts = [
            None if self.left is None else f"{clock(self.left)} left",
            None if self.bits is None else f"{self.bits:.3f} bits/byte",
            None if self.rate is None else f"{short(self.rate)} tokens/s",
            None if self.share is None else f"{100 * self.share:.1f} % of peak",
            None if memory is None else f"{memory / 2**30:.1f} GiB",
        ]
        known = list(filter(None, parts))
        while len("  ".join(known)) > columns:
            known.pop()
        return "  ".join(known)


class Screen(contextlib.ExitStack):
    """Prints lines, below which a bar moves if this is a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None

    @property
    def is_live(self) -> bool:
        """Whether a bar can move here."""
        return sys.stdout.isatty()

    def start(self, progress: Progress) -> None:
        """Show a bar from now on."""
        if not self.is_live or self._bar:
            return
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = TextColumn("{task.fields[where]}"), BarColumn(bar_width=None), TextColumn("{task.fields[figures]}")
        self._bar = self.enter_context(Bar(*columns, transient=True, expand=True))
        self._task = self._bar.add_task("", total=progress.steps, where=progress.where(), figures="")

    def move(self, progress: Progress) -> None:
        """Move the bar."""
        if self._bar:
            where = progress.where()
            figures = progress.figures(self._bar.console.width - len(where) - LEAST_BAR)
            self._bar.update(self._task, completed=progress.step, where=where, figures=figures)

    def log(self, progress: Progress) -> None:
        """Print how far training is; a terminal shows it on the bar."""
        if not self._bar:
            where = progress.where()
            say(f"{where}  {progress.figures(COLUMNS - len(where) - 2)}")


def say(text: str = "") -> None:
    """Print a line where results go; no run ends because its reader has left, as `head` does, or its disk is full."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        print_nothing()
    except OSError:  # the line waits in the buffer
        pass


def print_nothing() -> None:
    """Drop what goes to standard output, until the process ends."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def show(name: str, text: str) -> None:
    """Print a text under a name at the left, wrapped."""
    lines = textwrap.wrap(text, COLUMNS - 10, break_long_words=False, break_on_hyphens=False) or [""]
    say("\n".join(f"{name if index == 0 else '':9} {line}" for index, line in enumerate(lines)))


def this_command() -> str:
    """Return how this program was started."""
    script = Path(sys.argv[0])
    return f"python {script}" if script.name == "enwik8.py" else "python -m examples.enwik8"


def speaks_unicode() -> bool:
    """Return whether the braille of a chart can be printed."""
    try:
        "\N{BRAILLE PATTERN DOTS-1}".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def tell(message: str) -> None:
    """Print a message where errors go, under the script's name, if it can be printed."""
    with contextlib.suppress(OSError):
        print(f"enwik8.py: {message}", file=sys.stderr, flush=True)


def quote(text: str) -> str:
    """Return a text of the model's, marked at the left and wrapped."""
    wrapped = (
        textwrap.wrap(line, COLUMNS - 4, drop_whitespace=False, replace_whitespace=False) or [""]
        for line in text.split("\n")
    )
    return "\n".join(f"  | {line}".rstrip() for lines in wrapped for line in lines)


def printable(data: bytes) -> str:
    """Return `data` as text that no terminal takes for commands: control characters are replaced."""
    return keep_printable(data.decode("utf-8", errors="replace"))


def keep_printable(text: str) -> str:
    """Replace the letters that a terminal takes for commands."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def short(number: float) -> str:
    """Return a number in about three digits, as in 950, 18.5k and 1.43M."""
    for factor, letter, digits in ((1e6, "M", 2), (1e3, "k", 1)):
        if number >= factor:
            return f"{number / factor:.{digits}f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Return a time as 1:23 or 4:05:06."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def peak_flops(dtype: str) -> float | None:
    """Return the operations a second of one device at its peak; None if that is not known, or not in this dtype."""
    kind = jax.devices()[0].device_kind
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def peak_memory() -> int | None:
    """Return the most bytes that were in use at once: on the first device, or of the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
