"""Draw every picture of the benchmarks from the records in `benchmarks/figures`.

    python -m benchmarks.plot                       (into docs/pictures/benchmarks)
    python -m benchmarks.plot --folder /tmp/pictures

Each picture is two SVG files with a transparent background, NAME-light.svg for a white page and NAME-dark.svg for a
dark one. The same records give the same files, byte by byte, with the same version of matplotlib. A picture of which
there is no record yet is left out.
"""

import argparse
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks import record
from benchmarks.record import median

FOLDER = Path(__file__).parents[1] / "docs" / "pictures" / "benchmarks"
OURS = "this library"
Record = Mapping[str, Any]


class Theme(NamedTuple):
    """Colours of a page: text, what stands back, lines of the grid, and the colours of lines by name."""

    text: str
    muted: str
    grid: str
    colours: dict[str, str]


THEMES = {
    "light": Theme(
        "#1f2430",
        "#5c6370",
        "#d9dce3",
        {
            "blue": "#1d5fd1",
            "sky": "#4aa8e0",
            "green": "#1a8a5a",
            "orange": "#d9730d",
            "red": "#c8324a",
            "pink": "#c2649a",
            "violet": "#7a4fc0",
            "grey": "#7b8190",
        },
    ),
    "dark": Theme(
        "#e4e7ee",
        "#a2a8b6",
        "#3a3f4d",
        {
            "blue": "#6ea8ff",
            "sky": "#8fd3ff",
            "green": "#4cc38a",
            "orange": "#ffa24c",
            "red": "#ff6b7f",
            "pink": "#f0a3cf",
            "violet": "#b794ff",
            "grey": "#9aa1b1",
        },
    ),
}


class Peer(NamedTuple):
    """How a form is called in pictures, and its colour and marker."""

    label: str
    colour: str
    marker: str = "o"


PEERS = {
    "ours": Peer(OURS, "blue"),
    "ours xla": Peer(f"{OURS}, plain path", "sky"),
    "cudnn": Peer("cuDNN", "green", "s"),
    "flex": Peer("FlexAttention", "orange", "D"),
    "original": Peer("local-attention (PyTorch)", "red", "^"),
    "original-compiled": Peer("local-attention, compiled", "pink", "v"),
    "windows": Peer("all windows at once (JAX)", "violet", "P"),
    "dot_product": Peer("jax.nn.dot_product_attention", "grey", "X"),
    "masked": Peer("PyTorch SDPA, masked", "orange", "d"),
}
NAMES = {
    "None": "ours",
    "xla": "ours xla",
    "torch original": "original",
    "torch FlexAttention": "flex",
    "torch SDPA with a mask": "masked",
    "jax all windows at once": "windows",
    "jax dot_product_attention xla": "dot_product",
    "jax dot_product_attention cudnn": "cudnn",
}
"""Forms whose names differ from those in `PEERS`."""


def peer_of(row: Mapping[str, Any]) -> str:
    """Return the key in `PEERS` of a row's form."""
    return NAMES.get(row["form"], row["form"])


def draw_growth(records: list[Record], theme: Theme) -> Figure:
    """Draw time and memory of forward + gradient against n, a line for each form."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_lines(left, records, "gradient_ms", theme)
    left.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: duration(ms)))
    draw_lines(right, records, "gradient_peak_mib", theme)
    right.yaxis.set_major_locator(LogLocator(8))
    right.yaxis.set_major_formatter(FuncFormatter(lambda mib, _: size(mib)))
    set_title(left, "Time of forward + gradient", theme)
    set_title(right, "Memory of forward + gradient, beside the inputs", theme)
    case = records[0]["rows"][0]
    shape = f"[{case['b']}, {case['h']}, n, {case['d']}]"
    rotary = " with rotary" if case.get("rotary") else ""
    text = f"{shape} {case['dtype']}, causal, window {case['window']}, {case['kind']}{rotary}"
    set_caption(figure, f"{text}; both axes logarithmic", records, theme)
    return figure


LEFT, ABOVE, BELOW = ("right", -5, 4), ("center", 0, 6), ("left", 6, -4)


def draw_lines(axes: Axes, records: list[Record], quantity: str, theme: Theme) -> None:
    """Draw a quantity against n, log-log: a line for each form, and hollow points for those measured at one n only."""
    lines: dict[str, dict[int, float]] = {}
    for row in itertools.chain.from_iterable(found["rows"] for found in records):
        figure = row.get(quantity)
        if value := median(figure) if isinstance(figure, list) else figure:
            lines.setdefault(peer_of(row), {}).setdefault(row["n"], value)
    lengths = sorted({n for points in lines.values() for n in points})
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: tokens(n)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.08)
    axes.set_xlim(lengths[0] / 1.25, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.62)
    axes.set_xlabel("n, tokens")
    ends = {}
    for name, points in lines.items():
        n, values = zip(*sorted(points.items()), strict=True)
        draw_line(axes, name, n, values, theme)
        if n[-1] == lengths[-1]:
            ends[name] = n[-1], values[-1]
        else:
            is_highest = values[-1] == max(points.get(n[-1], 0) for points in lines.values())
            place = LEFT if len(n) == 1 else ABOVE if is_highest else BELOW
            name_point(axes, name, (n[-1], values[-1]), place, theme)
    label_ends(axes, ends, theme)


def name_point(axes: Axes, name: str, point: tuple[float, float], place: tuple[str, int, int], theme: Theme) -> None:
    """Name a point where no line ends: `place` is the side of the name at the point, and its offset in points."""
    peer, (side, *offset) = PEERS[name], place
    axes.annotate(
        peer.label,
        point,
        offset,
        textcoords="offset points",
        color=theme.colours[peer.colour],
        fontsize=9,
        ha=side,
    )


def draw_line(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], theme: Theme) -> None:
    """Draw one form's points and the line through them; a point that stands alone is hollow."""
    peer = PEERS[name]
    colour, is_ours = theme.colours[peer.colour], name == "ours"
    axes.plot(
        x,
        y,
        color=colour,
        marker=peer.marker,
        markersize=6 if is_ours else 5,
        markerfacecolor=colour if len(x) > 1 else "none",
        linewidth=2.6 if is_ours else 1.5,
        zorder=3 if is_ours else 2,
    )


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], theme: Theme, gap: float = 0.062) -> None:
    """Name each line at its end, in its colour; names that would overlap move apart."""
    axes.figure.draw_without_rendering()
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((*to_axes.transform(end), name) for name, end in ends.items())
    placed.sort(key=lambda each: each[1])
    heights = apart([y for _, y, _ in placed], gap)
    for (x, y, name), height in zip(placed, heights, strict=True):
        peer = PEERS[name]
        axes.annotate(
            peer.label,
            (x, y),
            (x + 0.025, height),
            "axes fraction",
            "axes fraction",
            color=theme.colours[peer.colour],
            fontsize=9,
            fontweight="bold" if name == "ours" else "normal",
            va="center",
        )


def apart(heights: list[float], gap: float) -> list[float]:
    """Move sorted heights so that neighbours are `gap` apart at least, each group around its mean."""
    groups = [[height] for height in heights]
    merged: list[list[float]] = []
    for group in groups:
        merged.append(group)
        while len(merged) > 1 and _low(merged[-1], gap) - _high(merged[-2], gap) < gap:
            last = merged.pop()
            merged[-1] = merged[-1] + last
    return [_low(group, gap) + number * gap for group in merged for number in range(len(group))]


def _low(group, gap):
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _high(group, gap):
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def draw_kernels(records: list[Record], theme: Theme) -> Figure:
    """Draw the time of each peer over ours, a row for each shape, forward and with gradient."""
    times: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in records[0]["rows"]:
        heads = row["h"] if row["h"] == row["kv_heads"] else f"{row['h']}/{row['kv_heads']}"
        shape = f"{row['b']}, {heads}, {row['n']:,}, {row['d']};  {row['window']:,}"
        times.setdefault(shape, {})[peer_of(row)] = row
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    shared = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, step, title in zip(shared, ("forward_ms", "gradient_ms"), ("Forward", "Forward + gradient"), strict=True):
        for place, forms in enumerate(times.values()):
            ours = median(forms["ours"][step]) or 0.0
            ratios = {name: (median(forms[name][step]) or 0.0) / ours for name in ("cudnn", "flex") if name in forms}
            axes.plot([1, max(ratios.values())], [place, place], color=theme.grid, linewidth=5, zorder=1)
            axes.annotate(duration(ours), (0.97, place), color=theme.muted, fontsize=8.5, ha="right", va="center")
            for name, ratio in ({"ours": 1.0} | ratios).items():
                peer = PEERS[name]
                colour = theme.colours[peer.colour]
                axes.plot(ratio, place, peer.marker, color=colour, markersize=7, zorder=3, label=peer.label)
        axes.axvline(1, color=theme.colours["blue"], linewidth=1.5, zorder=2)
        axes.set_xlim(0.75, 2)
        axes.set_xlabel("time over this library's (to the right: slower)")
        set_title(axes, title, theme)
        axes.grid(False, axis="y")
    shared[0].set_yticks(range(len(times)), list(times))
    shared[0].set_ylabel("[b, h, n, d];  window")
    shared[0].invert_yaxis()
    add_legend(shared[0], theme)
    text = "bfloat16, causal exact windows; left of each line: this library's time"
    set_caption(figure, text, records, theme)
    return figure


def draw_batches(records: list[Record], theme: Theme) -> Figure:
    """Draw tokens a second at each batch, ours beside the original."""
    rows = [row for row in records[0]["rows"] if "batch" in row and "tokens_per_second" in row]
    rates = {(peer_of(row), row["batch"]): median(row["tokens_per_second"]) or 0.0 for row in rows}
    batches = sorted({batch for _, batch in rates})
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, batch in enumerate(batches):
        ends = {name: rates[name, batch] for name in ("original", "ours")}
        axes.plot(list(ends.values()), [place, place], color=theme.grid, linewidth=5, zorder=1)
        for name, rate in ends.items():
            peer, side = PEERS[name], 1 if name == "ours" else -1
            colour = theme.colours[peer.colour]
            text = {"color": colour, "fontsize": 9, "fontweight": "bold" if side > 0 else "normal"}
            axes.plot(rate, place, peer.marker, color=colour, markersize=9, zorder=3)
            beside = {"xytext": (10 * side, 0), "ha": "left" if side > 0 else "right", "va": "center"}
            axes.annotate(f"{rate:,.0f}", (rate, place), textcoords="offset points", **beside, **text)
            if place == 0:
                axes.annotate(peer.label, (rate, place), (0, 12), textcoords="offset points", ha="center", **text)
        middle = (ends["ours"] * ends["original"]) ** 0.5
        write_above(axes, (middle, place), f"{ends['ours'] / ends['original']:.0f} times", theme.text, 9)
    axes.set(xscale="log", xlim=(min(rates.values()) / 5, max(rates.values()) * 5), ylim=(len(batches) - 0.6, -0.8))
    axes.set_yticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens a second, all rows together (logarithmic)")
    set_title(axes, "Generation", theme)
    axes.grid(False, axis="y")
    set_caption(figure, records[0].get("model", ""), records, theme)
    return figure


def draw_lengths(records: list[Record], theme: Theme) -> Figure:
    """Draw tokens a second against the number of tokens generated, ours beside the original."""
    rows = [row for row in records[0]["rows"] if row.get("batch") == 1 and "tokens_per_second" in row]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    ends = {}
    for name in ("ours", "original"):
        points = sorted((row["new"], median(row["tokens_per_second"]) or 0.0) for row in rows if peer_of(row) == name)
        x, y = zip(*points, strict=True)
        draw_line(axes, name, x, y, theme)
        ends[name] = points[-1]
        for new, rate in points:
            write_above(axes, (new, rate), f"{rate:,.0f}", theme.muted, 8.5)
    lengths, rates = sorted({row["new"] for row in rows}), [rate for _, rate in ends.values()]
    axes.set(xscale="log", yscale="log", ylim=(min(rates) / 4, max(rates) * 4))
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.32)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens generated in one call")
    axes.set_ylabel("tokens a second")
    label_ends(axes, ends, theme)
    set_title(axes, "Generation, batch 1", theme)
    set_caption(figure, f"{records[0].get('model', '')}; both axes logarithmic", records, theme)
    return figure


def draw_scaling(records: list[Record], theme: Theme) -> Figure:
    """Draw the share of one device's speed that each of two devices keeps, with gradient."""
    rows = [row for row in records[0]["rows"] if row.get("step", "gradient") == "gradient" and "share" in row]
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        shares.setdefault(_work_of(row), {})[row["over"]] = 100 * row["share"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, by_axis in enumerate(shares.values()):
        for offset, axis, colour in ((-0.19, "sequence", "blue"), (0.19, "data", "sky")):
            share, name = by_axis[axis], "batch" if axis == "data" else "sequence"
            axes.barh(place + offset, share, 0.34, color=theme.colours[colour], label=f"{name} spread over both")
            axes.annotate(
                f"{share:.1f} %",
                (share, place + offset),
                (-5, 0),
                textcoords="offset points",
                color="white" if theme is THEMES["light"] and axis == "sequence" else "#10131a",
                fontsize=8.5,
                ha="right",
                va="center_baseline",
            )
    axes.axvline(100, color=theme.text, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.annotate("no loss", (100, -0.62), (4, 0), textcoords="offset points", color=theme.text, fontsize=9)
    axes.set(xlim=(0, 112), ylim=(len(shares) - 0.45, -0.75))
    axes.set_yticks(range(len(shares)), list(shares))
    axes.xaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    axes.set_xlabel("speed of each device, % of one alone")
    set_title(axes, "Two GPUs, twice the work", theme)
    axes.grid(False, axis="y")
    add_legend(axes, theme)
    set_caption(figure, "bfloat16, forward + gradient; sizes are those of one device", records, theme)
    return figure


def _work_of(row):
    if row["work"] == "attention":
        b, h, n, d = row["shape"]
        return f"attention [{b}, {h}, {tokens(n)}, {d}],\n{row['keys']:,} keys"
    streams = f"{row['streams']} stream{'s' if row['streams'] > 1 else ''}"
    return f"training step, {tokens(row['tokens'])} tokens,\n{streams}"


def set_title(axes: Axes, text: str, theme: Theme) -> None:
    """Set a title above the left end, and the colours of the frame."""
    axes.set_title(text, loc="left", color=theme.text, fontsize=11, fontweight="bold", pad=10)
    axes.set_facecolor("none")
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(colors=theme.muted, labelcolor=theme.text, labelsize=9, length=0)
    axes.xaxis.label.set(color=theme.text, fontsize=9.5)
    axes.yaxis.label.set(color=theme.text, fontsize=9.5)


def write_above(axes: Axes, point: tuple[float, float], text: str, colour: str, size: float) -> None:
    """Write a text centred above a point."""
    axes.annotate(text, point, (0, 8), textcoords="offset points", color=colour, fontsize=size, ha="center")


def add_legend(axes: Axes, theme: Theme) -> None:
    """Name each kind of mark once, above the axes on the right."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside upper right",
        ncols=len(unique),
        frameon=False,
        fontsize=9,
        labelcolor=theme.text,
    )


def set_caption(figure: Figure, text: str, records: list[Record], theme: Theme) -> None:
    """Say below a figure what is drawn, and on which devices and dates it was measured."""
    where = "; ".join(dict.fromkeys(f"{found['device']}, {found['date']}" for found in records))
    figure.supxlabel(f"{text}\n{where}", color=theme.muted, fontsize=8.5, x=0.01, ha="left")


def duration(ms: float) -> str:
    """Write a time in the unit that suits it."""
    unit, factor = ("s", 1e-3) if ms >= 1000 else ("ms", 1.0) if ms >= 0.01 else ("µs", 1e3)
    return f"{ms * factor:.3g} {unit}"


def size(mib: float) -> str:
    """Write MiB in the unit that suits it."""
    return f"{mib / 1024:.3g} GiB" if mib >= 1024 else f"{mib:.3g} MiB"


def tokens(n: float) -> str:
    """Write a number of tokens in short: 64k is 65,536, and 1M is 1,048,576."""
    return f"{n / 2**20:g}M" if n >= 2**20 else f"{n / 2**10:g}k" if n >= 2**10 else f"{n:g}"


class Picture(NamedTuple):
    """How a picture is drawn, and the names of its records, the most important one first."""

    draw: Callable[[list[Record], Theme], Figure]
    records: tuple[str, ...]

    def paths(self) -> list[Path]:
        """List the records that there are."""
        paths = [record.FOLDER / f"{name}.json" for name in self.records]
        return [path for path in paths if path.exists()]


PICTURES = {
    "growth-h100": Picture(
        draw_growth,
        (
            "growth-h100",
            "growth-h100-flex",
            "growth-h100-flex-long",
            "growth-h100-original",
            "growth-h100-original-compiled",
        ),
    ),
    "growth-cpu": Picture(
        draw_growth, ("growth-cpu", "growth-cpu-forms", "growth-cpu-memory", "growth-cpu-memory-long")
    ),
    "kernels-h100": Picture(draw_kernels, ("kernels-h100",)),
    "generation-h100": Picture(draw_batches, ("generation-h100",)),
    "generation-length-h100": Picture(draw_lengths, ("generation-length-h100",)),
    "generation-cpu": Picture(draw_batches, ("generation-cpu",)),
    "scaling-h200": Picture(draw_scaling, ("scaling-h200",)),
}


def draw_all(folder: Path) -> list[Path]:
    """Draw every picture that has records, in both themes; return the files."""
    drawn = []
    for (name, picture), (kind, theme) in itertools.product(PICTURES.items(), THEMES.items()):
        if paths := picture.paths():
            settings = {"svg.hashsalt": name, "svg.fonttype": "path", "font.family": "DejaVu Sans"}
            with rc_context(settings):
                figure = picture.draw([record.load(path) for path in paths], theme)
                drawn.append(folder / f"{name}-{kind}.svg")
                metadata = {"Date": None, "Source": digest(paths)}
                figure.savefig(drawn[-1], transparent=True, metadata=metadata)
    return drawn


def digest(paths: Iterable[Path]) -> str:
    """Return a digest of records, which their pictures name as their source."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write the pictures")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for path in draw_all(options.folder):
        print(path)


if __name__ == "__main__":
    main()
