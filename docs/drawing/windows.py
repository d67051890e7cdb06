"""Pictures of who sees whom: the windows, full and local attention, and what hides keys."""

import functools

import jax.numpy as jnp
import numpy as np

from docs.drawing import facts
from docs.drawing.canvas import CELL, FINE, WIDTH, Canvas, Picture
from flax_local_attention import Window

N = 12  # tokens of a grid
SIDE = N * CELL

WINDOWS = {
    "plain-causal": ("Plain, causal", "Window(3, causal=True)"),
    "exact-causal": ("Exact, causal", "Window(3, causal=True,\n exact_windowsize=True)"),
    "sliding": ("Sliding", "Window.sliding(5)"),
    "plain-both": ("Plain, both ways", "Window(3)"),
    "exact-both": ("Exact, both ways", "Window(3,\n exact_windowsize=True)"),
    "between": ("Between", "Window.between(4, 1)"),
    "chunks": ("Chunks", "Window.chunks(4)"),
    "global-causal": ("Global, causal", "Window.sliding(None)"),
    "global-both": ("Global, both ways", "Window.everything()"),
}
"""Names of the windows that are drawn, and the expressions that make them."""

ONE = (28, 24)  # corner of the grid in the picture of one window
PLACES = {name: (28 + 199 * (at % 3), 30 + 262 * (at // 3)) for at, name in enumerate(WINDOWS)}


def window_of(name: str) -> Window:
    """Return the window of `WINDOWS` with this name."""
    return eval(WINDOWS[name][1], {"Window": Window})


def paint_window(canvas: Canvas, x: float, y: float, window: Window):
    """Paint which keys each query sees, with its own key marked, and the borders that the window counts from."""
    colors, seen, own = canvas.palette, facts.seen_by_window(window, N), np.eye(N, dtype=bool)
    canvas.cells(x, y, ~seen, colors.faint)
    canvas.cells(x, y, seen & ~own, colors.local)
    canvas.cells(x, y, seen & own, colors.own)
    if not window.is_global and not window.exact_windowsize:
        borders = [at * CELL for at in range(window.size, N, window.size)]
        across = [[(x, y + at), (x + SIDE, y + at)] for at in borders]
        canvas.lines(across + [[(x + at, y), (x + at, y + SIDE)] for at in borders], colors.quiet, thick=1.25)


def paint_axes(canvas: Canvas, x: float, y: float, keys_at: float = 0):
    """Name the axes of a grid: queries run down, keys run to the right from `keys_at` on."""
    line = canvas.palette.quiet
    canvas.text(x - 17, y, "queries", turned=True)
    canvas.arrow((x - 12.5, y + 57), (x - 12.5, y + 75), line, thick=1.5)
    canvas.text(x + keys_at, y - 9, "keys")
    canvas.arrow((x + keys_at + 36, y - 13.5), (x + keys_at + 54, y - 13.5), line, thick=1.5)


def paint_code(canvas: Canvas, x: float, y: float, code: str):
    """Write an expression of one or two lines."""
    for row, line in enumerate(code.split("\n")):
        canvas.text(x, y + 18 * row, line.strip(), mono=True)


def border_sign(canvas: Canvas):
    """Return the legend's sign of a border of windows."""

    def paint(x, y):
        canvas.lines([[(x + CELL / 2, y - 9), (x + CELL / 2, y + 9)]], canvas.palette.quiet, thick=1.25)

    return paint


def paint_one(canvas: Canvas, name: str):
    """Paint one window with its axes and its expression."""
    x, y = ONE
    paint_axes(canvas, x, y)
    paint_window(canvas, x, y, window_of(name))
    paint_code(canvas, x, y + SIDE + 20, WINDOWS[name][1])


def picture_of(name: str) -> Picture:
    """Return the small picture of one window."""
    title, code = WINDOWS[name]
    rows = "; ".join(
        f"query {i} sees keys {seen.min()} to {seen.max()}"
        for i, seen in ((i, np.flatnonzero(facts.seen_by_window(window_of(name), N)[i])) for i in (4, 8))
    )
    return Picture(
        226,
        ONE[1] + SIDE + 26 + 18 * code.count("\n"),
        f"{title}: {' '.join(code.split())}",
        f"A grid of {N} queries, one a row, and {N} keys, one a column. {rows[0].upper()}{rows[1:]}.",
        functools.partial(paint_one, name=name),
    )


def paint_windows(canvas: Canvas):
    """Paint all windows, three a row."""
    for name, (title, code) in WINDOWS.items():
        x, y = PLACES[name]
        canvas.title(x, y - 10, title)
        paint_window(canvas, x, y, window_of(name))
        paint_code(canvas, x, y + SIDE + 19, code)
    paint_axes(canvas, *next(iter(PLACES.values())), keys_at=SIDE - 54)
    colors = canvas.palette
    canvas.legend(
        790,
        [
            (colors.local, "seen", 90),
            (colors.own, "seen: the query's own key", 230),
            (border_sign(canvas), "border of windows", 0),
        ],
        x=28,
    )


# ---- full attention, local attention, and a model of both

MANY, NEAR = 65536, 512  # tokens and window of the figures
PLATE = (1, 0, -0.5, 0.4)  # a grid that lies on the floor
LAYERS = 5


def count_pairs(window: Window) -> str:
    """Return the pairs of a query and a key that it sees, in words."""
    pairs = window.visible_pairs(MANY)
    return f"{pairs / 1e9:.1f} billion pairs" if pairs >= 1e9 else f"{pairs / 1e6:.0f} million pairs"


def paint_plate(canvas: Canvas, x: float, y: float, window: Window, color: str):
    """Paint a layer as a grid that lies on the floor, its far left corner at x and y."""
    side, corner = 12 * 9, np.array([x, y])
    edges = np.array([[0, 0], [side, 0], [side, side], [0, side]]) @ np.reshape(PLATE, (2, 2)) + corner
    canvas.shape(edges, canvas.palette.faint)
    canvas.lines([[*edges, edges[0], edges[1]]], canvas.palette.line, thick=1)
    matrix = f"matrix({' '.join(map(str, PLATE))} {x} {y})"
    canvas.cells(0, 0, facts.seen_by_window(window, 12), color, size=9, gap=1.5, transform=matrix)


def paint_hero(canvas: Canvas):
    """Paint full attention, local attention, and a stack of layers of both."""
    colors, n, y = canvas.palette, 24, 64
    panels = [
        (8, "Full attention", "n² / 2 pairs", Window.sliding(None), colors.wide),
        (210, "Local attention", "n · w pairs", Window.sliding(4), colors.local),
    ]
    for x, title, cost, window, color in panels:
        seen = facts.seen_by_window(window, n)
        canvas.title(x, 22, title)
        canvas.text(x, 44, cost)
        canvas.cells(x, y, ~seen, colors.faint, size=FINE, gap=1)
        canvas.cells(x, y, seen, color, size=FINE, gap=1)
    canvas.text(8, y + SIDE + 24, count_pairs(Window.sliding(None)))
    canvas.text(210, y + SIDE + 24, count_pairs(Window.sliding(NEAR)))
    canvas.text(8, y + SIDE + 44, f"at n = {MANY:,}")
    canvas.text(210, y + SIDE + 44, f"with w = {NEAR}")
    x = 420
    canvas.title(x, 22, "A model of both")
    canvas.text(x, 44, "local below, global on top")
    for layer in range(LAYERS):
        is_top = layer == LAYERS - 1
        window, color = (Window.sliding(None), colors.wide) if is_top else (Window.sliding(3), colors.local)
        paint_plate(canvas, x + 56, y + 164 - 39 * layer - 6 * is_top, window, color)


# ---- what hides keys, and what adds them


def paint_masks(canvas: Canvas):
    """Paint packed documents, padding, and keys that every query sees."""
    colors, window, y, memory = canvas.palette, Window.sliding(5), 74, 2
    within, all_tokens = facts.seen_by_window(window, N), np.ones(N, bool)
    documents, exists = np.repeat([0, 1, 2], [5, 3, 4]), np.arange(N) < 9
    second = documents == 1

    def paint(x, title, code, seen, groups, aside=0):
        """Paint a call: its tokens in a row, each group in its colour, and below which keys each query sees."""
        canvas.title(x, 18, title)
        canvas.text(x, 38, code, mono=True)
        canvas.cells(x + aside, y, ~within, colors.faint)
        canvas.cells(x + aside, y, within & ~seen, colors.pale)
        for color, group in groups:
            canvas.cells(x + aside, y - 22, [group], color)
            canvas.cells(x + aside, y, seen & group, color)

    packed = facts.seen_in_call(window, N, segment_ids=jnp.array(documents)[None])
    paint(2, "Packed documents", "segment_ids=", packed, [(colors.local, ~second), (colors.other, second)])
    padded = facts.seen_in_call(window, N, mask=jnp.array(exists)[None])
    paint(199, "Padding", "mask=", padded, [(colors.local, exists), (colors.pale, ~exists)])
    recalled = facts.seen_in_call(window, N, memory=memory)
    groups = [(colors.local, all_tokens)]
    paint(396, "Memory tokens", "global_keys=", recalled[:, memory:], groups, aside=memory * CELL + 6)
    canvas.cells(396, y - 22, [[True] * memory], colors.wide)
    canvas.cells(396, y, recalled[:, :memory], colors.wide)
    canvas.legend(
        y + SIDE + 28,
        [
            (colors.local, "seen", 80),
            (colors.pale, "in the window, hidden", 200),
            (colors.wide, "seen by every query", 0),
        ],
        x=2,
    )


PICTURES = {
    "windows": Picture(
        WIDTH,
        810,
        "The windows: which keys each query sees",
        f"Nine grids of {N} queries by {N} keys. "
        + " ".join(f"{title}: {' '.join(code.split())}." for title, code in WINDOWS.values()),
        paint_windows,
    ),
    **{f"window-{name}": picture_of(name) for name in WINDOWS},
    "hero": Picture(
        WIDTH,
        290,
        "Full attention, local attention, and a model of both",
        "Full attention fills a triangle of queries and keys, local attention a band. In a model, several local layers "
        f"lie below a global one. At {MANY:,} tokens, full attention has {count_pairs(Window.sliding(None))} and a "
        f"window of {NEAR} has {count_pairs(Window.sliding(NEAR))}.",
        paint_hero,
    ),
    "masks": Picture(
        WIDTH,
        286,
        "What hides keys, and what adds them",
        "Three grids of queries and keys. Packed documents: a query sees keys of its own document only. Padding: no "
        "query sees it. Memory tokens: every query sees them, besides its window.",
        paint_masks,
    ),
}
