"""The output of a run: a progress bar on a terminal, lines of at most 100 columns elsewhere."""

import contextlib
import os
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax

COLUMNS = 100
LEAST_BAR = 10  # columns left for the bar and its margins

# Dense bfloat16 floating-point operations per second of one device, from the vendors' data sheets. The first name that
# occurs in JAX's `device_kind` counts.
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
    """The progress and the metrics of training.

    Attributes:
      step, steps: steps done and total steps.
      left: estimated seconds left; None before the first step.
      bits: bits per byte since the last log line; None before the first step.
      rate: tokens per second; None before the first step.
      share: used share of the devices' peak FLOP/s; None if the peak is unknown.
    """

    step: int
    steps: int
    left: float | None = None
    bits: float | None = None
    rate: float | None = None
    share: float | None = None

    def where(self) -> str:
        """Return the step, the total and the percentage."""
        width = len(f"{self.steps:,}")
        return f"step {self.step:>{width},} of {self.steps:,}  {100 * self.step // max(self.steps, 1):3} %"

    def metrics(self, columns: int) -> str:
        """Return the known metrics, as many as fit into `columns`."""
        memory = peak_memory()
        parts = [
            None if self.left is None else f"{format_duration(self.left)} left",
            None if self.bits is None else f"{self.bits:.3f} bits/byte",
            None if self.rate is None else f"{abbreviate(self.rate)} tokens/s",
            None if self.share is None else f"{100 * self.share:.1f} % of peak",
            None if memory is None else f"{memory / 2**30:.1f} GiB",
        ]
        known = list(filter(None, parts))
        while len("  ".join(known)) > columns:
            known.pop()
        return "  ".join(known)


class Screen(contextlib.ExitStack):
    """A progress bar below the printed lines if standard output is a terminal, else log lines."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None

    @property
    def is_live(self) -> bool:
        """Whether standard output is a terminal."""
        return sys.stdout.isatty()

    def start(self, progress: Progress) -> None:
        """Show the bar, if this is a terminal."""
        if not self.is_live or self._bar:
            return
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = TextColumn("{task.fields[where]}"), BarColumn(bar_width=None), TextColumn("{task.fields[metrics]}")
        self._bar = self.enter_context(Bar(*columns, transient=True, expand=True))
        self._task = self._bar.add_task("", total=progress.steps, where=progress.where(), metrics="")

    def move(self, progress: Progress) -> None:
        """Update the bar, if there is one."""
        if self._bar:
            where = progress.where()
            metrics = progress.metrics(self._bar.console.width - len(where) - LEAST_BAR)
            self._bar.update(self._task, completed=progress.step, where=where, metrics=metrics)

    def log(self, progress: Progress) -> None:
        """Print a log line, unless the bar shows the same."""
        if not self._bar:
            where = progress.where()
            print_line(f"{where}  {progress.metrics(COLUMNS - len(where) - 2)}")


def print_line(text: str = "") -> None:
    """Print to standard output; a closed pipe or a full disk does not stop the run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        print_nothing()
    except OSError:  # the line stays in the buffer
        pass


def print_nothing() -> None:
    """Discard standard output until the process ends."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def print_field(name: str, text: str) -> None:
    """Print a text in a wrapped column with its name to the left."""
    lines = textwrap.wrap(text, COLUMNS - 10, break_long_words=False, break_on_hyphens=False) or [""]
    print_line("\n".join(f"{name if index == 0 else '':9} {line}" for index, line in enumerate(lines)))


def this_command() -> str:
    """Return the command that started this program."""
    script = Path(sys.argv[0])
    return f"python {script}" if script.name == "enwik8.py" else "python -m examples.enwik8"


def can_print_braille() -> bool:
    """Return whether standard output can encode the braille characters of a chart."""
    try:
        "\N{BRAILLE PATTERN DOTS-1}".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def print_error(message: str) -> None:
    """Print a message to standard error, after the script's name; ignore a closed or full one."""
    with contextlib.suppress(OSError):
        print(f"enwik8.py: {message}", file=sys.stderr, flush=True)


def quote(text: str) -> str:
    """Wrap a sample and mark its lines with `|` at the left."""
    wrapped = (
        textwrap.wrap(line, COLUMNS - 4, drop_whitespace=False, replace_whitespace=False) or [""]
        for line in text.split("\n")
    )
    return "\n".join(f"  | {line}".rstrip() for lines in wrapped for line in lines)


def printable(data: bytes) -> str:
    """Decode bytes as text that is safe to print on a terminal."""
    return keep_printable(data.decode("utf-8", errors="replace"))


def keep_printable(text: str) -> str:
    """Replace control characters, which a terminal would execute."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def abbreviate(number: float) -> str:
    """Format a number with about three digits, as in 950, 18.5k and 1.43M."""
    for factor, suffix, digits in ((1e6, "M", 2), (1e3, "k", 1)):
        if number >= factor:
            return f"{number / factor:.{digits}f}{suffix}"
    return f"{number:.0f}"


def format_duration(seconds: float) -> str:
    """Format seconds as 1:23 or 4:05:06."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def peak_flops(dtype: str) -> float | None:
    """Return the peak FLOP/s of one device; None if it is unknown or the dtype is not bfloat16."""
    kind = jax.devices()[0].device_kind
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def peak_memory() -> int | None:
    """Return the peak memory in bytes: of the first device, or of the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
