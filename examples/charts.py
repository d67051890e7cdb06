"""The learning curves of a run, drawn in the terminal or saved as a PNG.

    from examples.charts import draw, read_curves
    print(draw(read_curves(Path("run/metrics.jsonl"))))

The steep start of a run would flatten the rest, so a chart may leave it out; the legend then gives the highest value.
"""

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.files import read_lines, write_atomically

TRAIN, VALIDATION = "train", "validation"

STEEP_PART = 0.05  # share of the steps, at the start, that may lie above the chart
NICE = (1, 1.5, 2, 2.5, 4, 5)  # allowed differences between two rows, times a power of ten
LEAST_UNIT = 0.01  # least difference between two rows, so that nearly equal values look flat
SMALLEST = 24, 6  # least columns and lines of a chart

FIRST_DOTS = 0x2800  # code point of the braille character without dots
DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bit of each dot of a braille character, by row


INK, PALE = "#333a45", "#e4e7ec"
LOOKS = {
    TRAIN: {"color": "#8fb4dc", "linewidth": 1.3},
    VALIDATION: {"color": "#c8503c", "linewidth": 1.6, "marker": "o", "markersize": 5},
}


class MissingPackage(ImportError):  # noqa: N818 - names what is missing, not what failed
    """An optional package is not installed; the message says how to install it."""


class Curve(NamedTuple):
    """Bits per byte over the steps of a run."""

    name: str
    steps: tuple[int, ...]
    bits: tuple[float, ...]


class Glyphs(NamedTuple):
    """The characters of a chart; a cell holds `across` x `down` dots of a line."""

    across: int
    down: int
    line: str
    mark: str
    above: str
    side: str
    side_tick: str
    floor: str
    floor_tick: str
    corner: str


UNICODE = Glyphs(2, 4, "⠒⠒", "●", "▲", "│", "┤", "─", "┬", "└")
ASCII = Glyphs(1, 1, ".", "o", "^", "|", "+", "-", "+", "+")


class Axis(NamedTuple):
    """The values of the rows: row i, counted from the lowest, is centred at `(first + i) * unit`."""

    first: int
    unit: float
    rows: int

    @property
    def top(self) -> float:
        """The value at the upper edge of the highest row."""
        return (self.first + self.rows - 0.5) * self.unit


# ---- the metrics of a run


def read_curves(metrics: Path) -> list[Curve]:
    """Read the training and validation curves of a run's `metrics.jsonl`, skipping incomplete lines."""
    entries = [json.loads(line) for line in read_lines(metrics)]
    curves = []
    for name in (TRAIN, VALIDATION):
        points = [(entry["step"], entry["bits_per_byte"]) for entry in entries if entry["split"] == name]
        if points:
            curves.append(Curve(name, *zip(*points, strict=True)))
    return curves


def keep_finite(curves: Sequence[Curve]) -> list[Curve]:
    """Drop NaNs and infinities, and curves without any other point."""
    kept = []
    for curve in curves:
        points = [point for point in points_of(curve) if math.isfinite(point[1])]
        if points:
            kept.append(Curve(curve.name, *zip(*points, strict=True)))
    return kept


def points_of(curve: Curve) -> Iterator[tuple[int, float]]:
    """Yield the points (step, bits) of a curve."""
    return zip(curve.steps, curve.bits, strict=True)


def last_step_of(curves: Sequence[Curve]) -> int:
    """Return the last step of all curves, at least 1."""
    return max(1, *(step for curve in curves for step in curve.steps))


def highest_point(curves: Sequence[Curve]) -> tuple[int, float]:
    """Return the point (step, bits) with the most bits of all curves."""
    return max((point for curve in curves for point in points_of(curve)), key=lambda point: point[1])


def value_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the lowest and the highest value to show; curves must be finite and have a point.

    Values in the first `STEEP_PART` of the steps do not count if they would flatten the others.
    """
    points = [point for curve in curves for point in points_of(curve)]
    steep = STEEP_PART * max(step for step, _ in points)
    later = [bits for step, bits in points if step > steep]
    low, high = (limit(bits for _, bits in points) for limit in (min, max))
    if len(later) > 1 and high - low > 1.5 * (max(later) - low) > 0:
        high = max(later)
    return low, high


# ---- in the terminal


def draw(curves: Sequence[Curve], width: int = 72, height: int = 14, unicode: bool = True) -> str:
    """Draw curves as text: the training curve as a dotted line, validation as marks.

    Args:
      curves: curves to draw; NaNs and infinities are left out.
      width: most columns of a line.
      height: lines of the chart with its legend and axis.
      unicode: use braille and box-drawing characters, else ASCII.

    Returns:
      `height` lines without a final newline; "" if there is no point or no room.
    """
    curves = keep_finite(curves)
    if not curves or width < SMALLEST[0] or height < SMALLEST[1]:
        return ""
    glyphs = UNICODE if unicode else ASCII
    axis = choose_axis(*value_range(curves), rows=height - 3)  # 3: the legend, the floor and the steps below it
    names = row_names(axis)
    margin = max(map(len, names))
    columns = width - margin - 2
    last_step = last_step_of(curves)
    cells = plot(curves, axis, last_step, columns, glyphs)
    sides = [glyphs.side_tick if name else glyphs.side for name in names]
    body = [f"{name:>{margin}} {side}{''.join(row)}" for name, side, row in zip(names, sides, cells, strict=True)]
    legend = describe_curves(curves, axis.top, width, glyphs)
    floor = draw_floor(last_step, columns, margin, glyphs)
    return "\n".join(line.rstrip() for line in (legend, *body, *floor))


def choose_axis(low: float, high: float, rows: int) -> Axis:
    """Return the finest axis of round numbers whose `rows` span the values from `low` to `high`."""
    finest = max((high - low) / rows, LEAST_UNIT)
    power = 10.0 ** math.floor(math.log10(finest))
    units = (nice * scale for scale in (power, 10 * power) for nice in NICE)
    axes = (Axis(math.floor(low / unit + 0.49), unit, rows) for unit in units if unit >= LEAST_UNIT)
    return next(axis for axis in axes if axis.top >= high + 0.01 * axis.unit)


def row_names(axis: Axis) -> list[str]:
    """Return the label of each row from the top: every second value, "" for the others."""
    apart = 2 * axis.unit
    decimals = next((count for count in range(1, 4) if math.isclose(round(apart, count), apart)), 4)
    multiples = range(axis.first + axis.rows - 1, axis.first - 1, -1)
    return ["" if multiple % 2 else f"{multiple * axis.unit:.{decimals}f}" for multiple in multiples]


def plot(curves: Sequence[Curve], axis: Axis, last_step: int, columns: int, glyphs: Glyphs) -> list[list[str]]:
    """Return the characters of the plot, [rows][columns]; marks cover lines, and the arrow covers both."""

    def place(step: int, bits: float) -> tuple[float, float]:
        """Return the column and the row, from the top; whole numbers are the centres of cells."""
        return step / last_step * (columns - 1), axis.first + axis.rows - 1 - bits / axis.unit

    cells = [[" "] * columns for _ in range(axis.rows)]
    lines = [curve for curve in curves if curve.name == TRAIN]
    for curve in lines:
        draw_line(cells, [place(*point) for point in points_of(curve)], glyphs)
    for curve in (curve for curve in curves if curve not in lines):
        for column, row in (place(*point) for point in points_of(curve)):
            if row >= -0.5:
                cells[round(row)][round(column)] = glyphs.mark
    step, highest = highest_point(curves)
    if highest > axis.top:
        cells[0][round(place(step, highest)[0])] = glyphs.above
    return cells


def draw_line(cells: list[list[str]], points: Sequence[tuple[float, float]], glyphs: Glyphs) -> None:
    """Draw a dotted line through `points`, (column, row) in cells; dots above the chart are left out."""
    lit: dict[tuple[int, int], int] = {}
    for across, down in trace(points, glyphs):
        row, column = down // glyphs.down, across // glyphs.across
        if row >= 0:
            lit[row, column] = lit.get((row, column), 0) | DOT_BITS[down % glyphs.down][across % glyphs.across]
    for (row, column), bits in lit.items():
        cells[row][column] = chr(FIRST_DOTS + bits) if glyphs is UNICODE else glyphs.line


def trace(points: Sequence[tuple[float, float]], glyphs: Glyphs) -> Iterator[tuple[int, int]]:
    """Yield the dots (across, down) of the straight lines from point to point."""
    fine = [(glyphs.across * (column + 0.5), glyphs.down * (row + 0.5)) for column, row in points]
    for start, stop in zip(fine, fine[1:] or fine, strict=False):
        longest = max(abs(stop[0] - start[0]), abs(stop[1] - start[1]))
        count = math.ceil(longest) + 1
        for part in (index / count for index in range(count + 1)):
            across, down = (first + part * (last - first) for first, last in zip(start, stop, strict=True))
            yield math.floor(across), math.floor(down)


def describe_curves(curves: Sequence[Curve], top: float, width: int, glyphs: Glyphs) -> str:
    """Return as much of the legend as fits: each curve's last value, and the highest value if it exceeds `top`."""
    parts = ["bits per byte"]
    for curve in curves:
        parts.append(f"{glyphs.line if curve.name == TRAIN else glyphs.mark} {label(curve)}")
    _, highest = highest_point(curves)
    if highest > top:
        parts.append(f"{glyphs.above} up to {highest:.2f}")
    while len("   ".join(parts)) > width:
        parts.pop()
    return "   ".join(parts)


def label(curve: Curve) -> str:
    """Return the name of a curve with its last value, and the best one if validation has become worse since."""
    last, best = curve.bits[-1], min(curve.bits)
    before = f", best {best:.3f}" if curve.name == VALIDATION and best < last else ""
    return f"{curve.name} {last:.3f}{before}"


def draw_floor(last_step: int, columns: int, margin: int, glyphs: Glyphs) -> tuple[str, str]:
    """Return the horizontal axis and the line of steps below its ticks."""
    unit = next_round(last_step * (len(f"{last_step:,}") + 4) / columns)
    line, names = [glyphs.floor] * columns, [" "] * columns
    for step in range(0, last_step + 1, unit):
        column, name = round(step / last_step * (columns - 1)), f"{step:,}"
        start = max(0, min(column - len(name) // 2, columns - len(name)))
        line[column], names[start : start + len(name)] = glyphs.floor_tick, name
    if not "".join(names[1:8]).strip():
        names[1:7] = " steps"
    return " " * (margin + 1) + glyphs.corner + "".join(line), " " * (margin + 2) + "".join(names)


def next_round(least: float) -> int:
    """Return the first of 1, 2, 5, 10, 20, 50, ... that is at least `least`."""
    power = 10 ** max(0, math.floor(math.log10(max(least, 1))))
    return next(nice * power for nice in (1, 2, 5, 10) if nice * power >= least)


# ---- as a PNG


def save_png(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Save a chart of the curves, atomically.

    Raises:
      MissingPackage: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    except ImportError as error:
        raise MissingPackage("a PNG chart needs matplotlib; install it with `pip install matplotlib`") from error
    curves = keep_finite(curves)
    figure = Figure(figsize=(8, 4.5), dpi=160)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=INK, fontsize=12, pad=30, parse_math=False)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("bits per byte", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color=PALE)
    axes.tick_params(colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    if curves:
        add_curves(axes, curves)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_atomically(path, drawn.getvalue())


def add_curves(axes: Any, curves: Sequence[Curve]) -> None:
    """Draw finite curves on matplotlib's `axes`, with the vertical range of the terminal's chart."""
    low, high = value_range(curves)
    room = 0.06 * max(high - low, 0.1)
    axes.set_xlim(0, 1.01 * last_step_of(curves))
    axes.set_ylim(low - room, high + room)
    for curve in curves:
        shown = [point for point in points_of(curve) if curve.name == TRAIN or point[1] <= high]
        look = LOOKS.get(curve.name, LOOKS[VALIDATION])
        axes.plot([step for step, _ in shown], [bits for _, bits in shown], label=label(curve), **look)
    step, highest = highest_point(curves)
    if highest > high:
        axes.plot([], [], " ", label=f"above: {highest:.2f} at step {step:,}")
    position = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0, "ncols": 3}  # below the title
    axes.legend(frameon=False, labelcolor=INK, **position)
