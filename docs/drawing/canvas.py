"""A small SVG canvas: one palette, one font, cells, text and arrows."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

WIDTH = 600  # of a whole picture, in pixels
CELL = 14  # a query and a key
FINE = CELL / 2  # the same in a large grid
SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
NAME, NOTE = 16, 14  # sizes of text


class Palette(NamedTuple):
    """The colours of a theme, by what they stand for. Blue, orange and green differ in lightness too.

    Attributes:
        paper: Background of the page, which no picture paints; it fills what must hide things behind it.
        ink, quiet: Text and lesser text.
        faint: Cells that nobody sees.
        line: Thin lines.
        local, local_ink: What a window sees, and text on it.
        pale: What a window sees and something else hides, or what is computed and then masked.
        own: A query's own key.
        wide, wide_ink: What is seen from everywhere or comes from elsewhere, and text on it.
        other: A second document.
        alert: What is written now.
    """

    paper: str
    ink: str
    quiet: str
    faint: str
    line: str
    local: str
    local_ink: str
    pale: str
    own: str
    wide: str
    wide_ink: str
    other: str
    alert: str


THEMES = {
    "light": Palette(
        paper="#ffffff",
        ink="#1f2430",
        quiet="#59616e",
        faint="#eceff3",
        line="#8b94a3",
        local="#3d8fd9",
        local_ink="#0b1f33",
        pale="#c3def5",
        own="#124a82",
        wide="#d47c00",
        wide_ink="#2a1a00",
        other="#17826a",
        alert="#c4341a",
    ),
    "dark": Palette(
        paper="#1e2129",
        ink="#e6e9ef",
        quiet="#a9b1bf",
        faint="#2d323d",
        line="#727b8c",
        local="#4795de",
        local_ink="#06182a",
        pale="#2c4a69",
        own="#b9dcfb",
        wide="#f2a93b",
        wide_ink="#332000",
        other="#3fbf9b",
        alert="#ff8466",
    ),
}


class Picture(NamedTuple):
    """A picture to be drawn in each theme.

    Attributes:
        width, height: Size in pixels, to which it scales.
        title, description: What screen readers say.
        paint: Function that adds its elements to a canvas.
    """

    width: float
    height: float
    title: str
    description: str
    paint: Callable[["Canvas"], None]

    def draw(self, theme: str) -> str:
        """Return the picture as SVG in one of `THEMES`."""
        canvas = Canvas(self.width, self.height, self.title, self.description, THEMES[theme])
        self.paint(canvas)
        return str(canvas)


class Canvas:
    """An SVG image under construction; its functions add elements in the order of painting."""

    def __init__(self, width: float, height: float, title: str, description: str, palette: Palette):
        """Begin an image.

        Args:
            width, height: Its size in pixels, to which it scales.
            title, description: What screen readers say.
            palette: Colours of the theme.
        """
        self.palette = palette
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_number(width)}" height="{_number(height)}" '
            f'viewBox="0 0 {_number(width)} {_number(height)}" role="img" aria-labelledby="title desc" '
            f'font-family="{SANS}" style="font-variant-numeric:tabular-nums">\n'
            f'<title id="title">{escape(title)}</title>\n<desc id="desc">{escape(description)}</desc>'
        )
        self._elements: list[str] = []

    def __str__(self) -> str:
        return "\n".join([self._head, *self._elements, "</svg>\n"])

    def _add(self, tag, text=None, **attributes):
        named = {name.replace("_", "-"): value for name, value in attributes.items() if value is not None}
        written = "".join(f' {name}="{_number(value)}"' for name, value in named.items())
        self._elements.append(f"<{tag}{written}/>" if text is None else f"<{tag}{written}>{escape(text)}</{tag}>")

    def text(
        self, x, y, text, *, size=NOTE, color=None, anchor=None, bold=False, mono=False, turned=False, middle=False
    ):
        """Write a line of text.

        Args:
            x, y: Where it begins: left end of its base line.
            text: What it says.
            size: Height of the font.
            color: Colour; None means that of lesser text.
            anchor: What stands at x: None for the beginning, "middle" or "end".
            bold, mono: Which font.
            turned: Whether it runs down.
            middle: Whether y is the middle of its digits instead of the base line.
        """
        y += 0.36 * size if middle else 0
        self._add(
            "text",
            text,
            x=x,
            y=y,
            fill=color or self.palette.quiet,
            font_size=size,
            font_weight=600 if bold else None,
            font_family=MONO if mono else None,
            text_anchor=anchor,
            transform=f"rotate(90 {_number(x)} {_number(y)})" if turned else None,
        )

    def title(self, x, y, text, *, color=None, anchor=None):
        """Write the name of a part of the picture."""
        self.text(x, y, text, size=NAME, color=color or self.palette.ink, anchor=anchor, bold=True)

    def cells(self, x, y, chosen, color, *, size=CELL, gap=2.0, transform=None):
        """Fill the chosen cells of a grid, ``[rows, columns]`` bool: a dashed line for each run of a row."""
        chosen = np.asarray(chosen, bool)
        runs = [
            f"M{_number(x + start * size + gap / 2)} {_number(y + (row + 0.5) * size)}h{_number(count * size - gap)}"
            for row, cells in enumerate(chosen)
            for start, count in runs_of(cells)
        ]
        if runs:
            self._add(
                "path",
                d="".join(runs),
                stroke=color,
                stroke_width=size - gap,
                stroke_dasharray=f"{_number(size - gap)} {_number(gap)}" if gap else None,
                fill="none",
                transform=transform,
            )

    def rect(self, x, y, width, height, *, fill="none", stroke=None, thick=1.5, radius=3, dashed=False):
        """Draw a rectangle with round corners."""
        self._add(
            "rect",
            x=x,
            y=y,
            width=width,
            height=height,
            rx=radius or None,
            fill=fill,
            stroke=stroke,
            stroke_width=thick if stroke else None,
            stroke_dasharray="3 3" if dashed else None,
        )

    def circle(self, x, y, radius, *, fill="none", stroke=None, thick=1.5, dashed=False):
        """Draw a circle."""
        self._add(
            "circle",
            cx=x,
            cy=y,
            r=radius,
            fill=fill,
            stroke=stroke,
            stroke_width=thick if stroke else None,
            stroke_dasharray="3 3" if dashed else None,
        )

    def shape(self, points, color, *, opacity=None):
        """Fill a polygon."""
        self._add("path", d=_path(points) + "z", fill=color, fill_opacity=opacity)

    def lines(self, lines, color, *, thick=1.5, dashed=False):
        """Draw lines, each a list of points."""
        self._add(
            "path",
            d="".join(map(_path, lines)),
            stroke=color,
            stroke_width=thick,
            stroke_dasharray="3 3" if dashed else None,
            fill="none",
        )

    def arrow(self, start, end, color, *, bend=0.0, thick=2.0):
        """Draw an arrow between two points; `bend` moves its middle to the left of its way."""
        (x, y), (to_x, to_y) = start, end
        length = math.hypot(to_x - x, to_y - y)
        middle = (x + to_x) / 2 + bend * (to_y - y) / length, (y + to_y) / 2 - bend * (to_x - x) / length
        angle = math.atan2(to_y - middle[1], to_x - middle[0])
        along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))

        def from_tip(back, aside):
            return to_x - back * along[0] + aside * across[0], to_y - back * along[1] + aside * across[1]

        points = [_point(point) for point in (start, middle, from_tip(7, 0))]
        self._add("path", d=f"M{points[0]}Q{points[1]} {points[2]}", stroke=color, stroke_width=thick, fill="none")
        self.shape([from_tip(9, 4.5), end, from_tip(9, -4.5)], color)

    def legend(self, y, entries, *, x=0.0):
        """Explain colours in a row.

        Args:
            y: Middle of the row.
            entries: Colour, text and width of each; the colour may be a function that draws a sign at x and y.
            x: Where the row begins.
        """
        for sign, text, width in entries:
            if callable(sign):
                sign(x, y)
            else:
                self.cells(x, y - CELL / 2, [[True]], sign)
            self.text(x + CELL + 7, y, text, middle=True)
            x += width


def runs_of(chosen) -> Iterator[tuple[int, int]]:
    """Yield the first cell and the number of cells of each run of chosen ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(chosen, np.int8), [0]])))
    yield from ((int(start), int(stop - start)) for start, stop in edges.reshape(-1, 2))


def _number(value):
    """Write a number with at most two decimals; text as it is."""
    if isinstance(value, str):
        return value
    return f"{round(float(value), 2):.2f}".rstrip("0").rstrip(".")


def _point(point):
    return " ".join(map(_number, point))


def _path(points):
    return "M" + "L".join(map(_point, points))
