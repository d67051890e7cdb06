"""Pictures of how attention runs: over layers, from a cache, over devices, and in blocks."""

import math

import numpy as np

from docs.drawing import facts
from docs.drawing.canvas import CELL, FINE, WIDTH, Canvas, Picture, runs_of
from flax_local_attention import Window

# ---- what one token depends on

TOKENS, DEPTH, NARROW = 18, 4, Window.sliding(4)
LOCAL_REACH = facts.reach([NARROW] * DEPTH, TOKENS)
WHOLE_REACH = facts.reach([Window.sliding(None), *[NARROW] * DEPTH], TOKENS)


def paint_reach(canvas: Canvas):
    """Paint the tokens that the last one depends on, through local layers and a global one above them."""
    colors, pitch, side, bottom = canvas.palette, 42, TOKENS * CELL, 248
    step = NARROW.capacity - 1
    sums = (f"1 + {DEPTH} · {step} = {len(LOCAL_REACH[-1])} of {TOKENS} tokens", f"all {len(WHOLE_REACH[-1])} tokens")
    titles = (f"{DEPTH} local layers", "and a global one on top")
    for x, title, note, reached in zip((64, 348), titles, sums, (LOCAL_REACH, WHOLE_REACH), strict=True):
        canvas.title(x, 18, title)
        top = bottom - pitch * (len(reached) - 1)
        for row, tokens in enumerate(reached):
            y, is_global = top + pitch * row, reached is WHOLE_REACH and row == 0
            color = colors.wide if is_global else colors.local
            if row + 1 < len(reached):
                left, right, below = x + tokens[0] * CELL, x + (tokens[-1] + 1) * CELL, reached[row + 1]
                near, far = y + CELL + 1, y + pitch - 1
                to_left, to_right = x + below[0] * CELL, x + (below[-1] + 1) * CELL
                canvas.shape([(left, near), (right, near), (to_right, far), (to_left, far)], color, opacity=0.22)
            chosen = np.isin(np.arange(TOKENS), tokens)
            canvas.cells(x, y, [~chosen], colors.faint)
            canvas.cells(x, y, [chosen], color)
        canvas.text(x + side, bottom + 36, note, anchor="end")
    for layer in range(DEPTH + 2):
        y = bottom - pitch * layer + CELL / 2
        canvas.text(54, y, "input" if layer == 0 else f"layer {layer}", anchor="end", middle=True)


# ---- the cache

KEPT = Window.sliding(6)
STEPS, REWIND, FIRST = (5, 3, 3, -2), 2, 2
CHUNKS = (7, 1, 1, 1, 1, 1)


def paint_ring(canvas: Canvas):
    """Paint what a cache holds at four moments."""
    colors, moments = canvas.palette, facts.moments(KEPT, STEPS, rewind=REWIND, keep_first=FIRST)
    code = f"Window.sliding({KEPT.capacity}), rewind={REWIND}, keep_first={FIRST}"
    canvas.text(WIDTH / 2, 18, code, mono=True, anchor="middle")
    for at, (step, moment) in enumerate(zip(STEPS, moments, strict=True)):
        x, y, title = 150 + 300 * (at % 2), 186 + 284 * (at // 2), f"{moment.length} tokens"
        canvas.title(x, y - 132, title if step > 0 else f"rewind({-step}): {title}", anchor="middle")
        paint_moment(canvas, x, y, moment)
    rows = [
        [
            (dot(canvas, colors.local), "seen, in the window", 190),
            (dot(canvas, colors.wide), "seen, kept from the start", 220),
            (dot(canvas, "none", colors.alert), "next slot", 0),
        ],
        [(dot(canvas, colors.pale), "held, not seen", 190), (dot(canvas, colors.faint), "forgotten", 0)],
    ]
    for row, entries in enumerate(rows):
        canvas.legend(604 + 26 * row, entries, x=44)


def dot(canvas: Canvas, fill: str, stroke: str | None = None):
    """Return a legend's sign of a slot."""
    return lambda x, y: canvas.circle(x + CELL / 2, y, CELL / 2, fill=fill, stroke=stroke, thick=2)


def paint_moment(canvas: Canvas, x: float, y: float, moment: facts.Moment):
    """Paint a ring around x and y, clockwise from slot 0 at the top, with the first tokens in its middle."""
    colors, radius, slot_radius = canvas.palette, 76, 19

    def paint_slot(x, y, token, fill, ink):
        if token < 0:
            canvas.circle(x, y, slot_radius, fill=colors.paper, stroke=colors.line, dashed=True)
        else:
            canvas.circle(x, y, slot_radius, fill=fill)
            canvas.text(x, y, str(token), size=16, color=ink, anchor="middle", middle=True)

    canvas.circle(x, y, radius, stroke=colors.faint, thick=6)
    for slot, token in enumerate(moment.slots):
        angle = 2 * math.pi * slot / len(moment.slots)
        across, down = math.sin(angle), -math.cos(angle)
        at = x + radius * across, y + radius * down
        if token >= moment.length:
            look = colors.faint, colors.quiet
        elif token in moment.from_ring:
            look = colors.local, colors.local_ink
        else:
            look = colors.pale, colors.ink
        paint_slot(*at, token, *look)
        if slot == moment.next_slot:
            canvas.circle(*at, slot_radius + 3, stroke=colors.alert, thick=2)
            tail, tip = radius + slot_radius + 30, radius + slot_radius + 7
            canvas.arrow((x + tail * across, y + tail * down), (x + tip * across, y + tip * down), colors.alert)
    for at, token in enumerate(moment.first):
        is_seen = token in moment.seen - moment.from_ring
        look = (colors.wide, colors.wide_ink) if is_seen else (colors.pale, colors.ink)
        paint_slot(x + (at - (len(moment.first) - 1) / 2) * 42, y, token, *look)


def paint_decode(canvas: Canvas):
    """Paint that a chunk and then single tokens see what they see in one call."""
    colors, window, n, y = canvas.palette, Window.sliding(5), sum(CHUNKS), 34
    side = n * CELL

    def paint(x, y, seen):
        canvas.cells(x, y, ~seen, colors.faint)
        canvas.cells(x, y, seen, colors.local)

    canvas.title(4, 18, "Forward pass")
    paint(4, y, facts.seen_in_call(window, n))
    canvas.text(226, y + side / 2, "=", size=34, anchor="middle", middle=True, color=colors.ink)
    x, first, seen = 280, 0, facts.seen_in_chunks(window, CHUNKS)
    canvas.title(x, 18, "From a cache")
    for size in CHUNKS:
        paint(x, y, seen[first : first + size])
        canvas.lines([[(x + side + 10, y + 1), (x + side + 10, y + size * CELL - 1)]], colors.line, thick=2)
        text = f"prefill: {size} tokens" if size > 1 else f"token {first}"
        canvas.text(x + side + 20, y + size * CELL / 2, text, middle=True)
        y += size * CELL + 7
        first += size


# ---- devices

SHARDS, SHARD = 4, 5


def paint_halo(canvas: Canvas):
    """Paint what each device fetches from the one before it, and in which parts its queries attend."""
    colors = canvas.palette
    found = facts.on_shards(Window.sliding(4), SHARDS, SHARD)
    halo, pitch, y = found.fetched.shape[1], 156, 70
    for device in range(SHARDS):
        x = 4 + pitch * device
        own = x + halo * CELL + 5
        exists = found.fetched[device] >= 0
        canvas.title(own + SHARD * CELL / 2, 18, f"device {device}", anchor="middle")
        canvas.cells(x, y, [exists], colors.wide)
        canvas.cells(x, y, [~exists], colors.faint)
        canvas.cells(own, y, [[True] * SHARD], colors.local)
        if device + 1 < SHARDS:
            sent = np.isin(np.arange(device * SHARD, (device + 1) * SHARD), found.fetched[device + 1])
            ((start, count),) = runs_of(sent)
            left, right = own + start * CELL + 1, own + (start + count) * CELL - 1
            canvas.lines([[(left, y - 5), (right, y - 5)]], colors.wide, thick=3)
            canvas.arrow(((left + right) / 2, y - 6), (x + pitch + halo * CELL / 2, y - 3), colors.wide, bend=44)

    x, y, pitch = 76, 120, SHARD * CELL + 5
    for device in range(SHARDS):
        canvas.text(x - 12, y + device * pitch + SHARD * CELL / 2, f"device {device}", anchor="end", middle=True)
        for shard in range(SHARDS):
            block = tuple(slice(at * SHARD, (at + 1) * SHARD) for at in (device, shard))
            own, border = found.own[block], found.halo[block]
            at = x + shard * pitch, y + device * pitch
            canvas.cells(*at, ~(own | border), colors.faint)
            canvas.cells(*at, own, colors.local)
            canvas.cells(*at, border, colors.wide)

    x, y = 404, 190
    canvas.title(x, y - 26, "On each device")
    canvas.text(x, y, "network")
    canvas.text(x, y + 64, "compute")
    bars = [
        (0, 10, 122, "fetch the halo", colors.wide, colors.wide_ink),
        (0, 74, 128, "own keys", colors.local, colors.local_ink),
        (132, 74, 60, "halo", colors.wide, colors.wide_ink),
    ]
    for left, top, width, text, fill, ink in bars:
        canvas.rect(x + left, y + top, width, 28, fill=fill)
        canvas.text(x + left + width / 2, y + top + 14, text, color=ink, anchor="middle", middle=True)
    canvas.text(x + 192, y + 124, "then merge", anchor="end")


# ---- blocks

LONG, TILE, BLOCK = 32, 4, 8
REACHING = Window.sliding(13)


def paint_tiles(canvas: Canvas, x: float, y: float, window: Window, kinds: np.ndarray):
    """Paint what is done with each tile, and what is visible in it."""
    seen, size = facts.seen_by_window(window, LONG), TILE * FINE
    for row, column in np.ndindex(kinds.shape):
        part = seen[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        paint_tile(canvas, x + column * size, y + row * size, kinds[row, column], part)


def paint_tile(canvas: Canvas, x: float, y: float, kind: int, part: np.ndarray):
    """Paint a tile, and what is visible in it."""
    colors, side = canvas.palette, TILE * FINE - 2
    fill = {facts.SKIPPED: colors.faint, facts.MASKED: colors.pale, facts.WHOLE: colors.local}[kind]
    canvas.rect(x + 1, y + 1, side, side, fill=fill, radius=0)
    if kind == facts.MASKED:
        canvas.cells(x + 1, y + 1, part, colors.local, size=side / TILE, gap=0)
        canvas.rect(x + 1.75, y + 1.75, side - 1.5, side - 1.5, stroke=colors.local, radius=0)


def paint_run(canvas: Canvas, x: float, y: float, kinds: np.ndarray, *, down: bool = False):
    """Paint the loop over visited tiles of a row, or of a column, as an arrow."""
    ((start, count),), size = runs_of(kinds != facts.SKIPPED), TILE * FINE
    ends = [(x + along * (not down), y + along * down) for along in (start * size + 5, (start + count) * size - 3)]
    canvas.arrow(*ends, canvas.palette.ink, thick=2.5)


def paint_blocks(canvas: Canvas):
    """Paint the tiles that are visited: of full attention, by queries, by keys, and by the plain path."""
    colors, side, size = canvas.palette, LONG * FINE, TILE * FINE
    full, row, column = Window.sliding(None), 5, 2
    places = [(x, y) for y in (32, 350) for x in (30, 346)]
    forward, backward = (facts.tiles(REACHING, LONG, TILE, rows_are_keys=by_keys) for by_keys in (False, True))
    panels = [
        ("Full attention, causal", full, facts.tiles(full, LONG, TILE)),
        ("Forward: queries visit keys", REACHING, forward),
        ("dk, dv: keys visit queries", REACHING, backward),
    ]
    for (x, y), (title, window, kinds) in zip(places, panels, strict=False):
        visited, masked = (kinds != facts.SKIPPED).sum(), (kinds == facts.MASKED).sum()
        canvas.title(x, y - 12, title)
        paint_tiles(canvas, x, y, window, kinds)
        canvas.text(x, y + side + 20, f"{visited} of {kinds.size} tiles, {masked} with a mask")
    paint_run(canvas, places[1][0], places[1][1] + (row + 0.5) * size, forward[row])
    paint_run(canvas, places[2][0] + (column + 0.5) * size, places[2][1], backward[:, column], down=True)

    x, y = places[3]
    canvas.title(x, y - 12, "Plain JAX: blocks of queries")
    blocks, seen = facts.plain_blocks(REACHING, LONG, BLOCK), facts.seen_by_window(REACHING, LONG)
    canvas.rect(x, y, side, side, fill=colors.faint, radius=0)
    for queries, keys in blocks:
        left, top, width, height = (FINE * at for at in (keys[0], queries[0], len(keys), len(queries)))
        canvas.rect(x + left, y + top, width, height, fill=colors.pale, radius=0)
        canvas.cells(x, y + top, seen[queries[0] : queries[-1] + 1], colors.local, size=FINE, gap=0)
        canvas.rect(x + left + 1, y + top + 1, width - 2, height - 2, stroke=colors.own, radius=0)
    canvas.text(x, y + side + 20, f"{len(blocks)} blocks of {BLOCK} queries and {len(blocks[0][1])} keys")

    def sign(kind):
        part = np.tril(np.ones((TILE, TILE), bool))
        return lambda x, y: paint_tile(canvas, x - 12, y - size / 2, kind, part)

    entries = [
        (sign(facts.WHOLE), "whole: no mask", 170),
        (sign(facts.MASKED), "an edge: masked", 180),
        (sign(facts.SKIPPED), "skipped", 0),
    ]
    canvas.legend(y + side + 58, entries, x=41)


PICTURES = {
    "reach": Picture(
        WIDTH,
        296,
        "What one token depends on, layer by layer",
        f"Rows of tokens, one a layer. Through {DEPTH} local layers, each with a window of {NARROW.capacity} keys, the "
        f"last token depends on {len(LOCAL_REACH[-1])} tokens: a cone that widens by {NARROW.capacity - 1} a layer. "
        f"With a global layer on top, it depends on all {TOKENS}.",
        paint_reach,
    ),
    "ring": Picture(
        WIDTH,
        644,
        "The cache: a ring of the keys that a next query can see",
        f"A ring of {KEPT.capacity + REWIND} slots at four moments. Tokens fill the slots in order, then each new "
        f"token overwrites the oldest. The next query sees the last {KEPT.capacity - 1} tokens in the ring, and the "
        f"first {FIRST}, which are kept apart. After a rewind by {REWIND} tokens, their slots are written again.",
        paint_ring,
    ),
    "decode": Picture(
        WIDTH,
        242,
        "Decoding equals the forward pass",
        f"Two grids of {sum(CHUNKS)} queries by {sum(CHUNKS)} keys, which are equal: one of a forward pass, one of "
        f"decoding with a cache, a prefill of {CHUNKS[0]} tokens and then token by token.",
        paint_decode,
    ),
    "halo": Picture(
        WIDTH,
        424,
        "A sequence over four devices",
        "Each device holds a part of the sequence and fetches the last keys of the device before it, the halo. It "
        "attends to its own keys while the halo travels, then to the halo, and merges the two results.",
        paint_halo,
    ),
    "blocks": Picture(
        WIDTH,
        652,
        "The tiles that attention visits",
        "Four grids of queries and keys, cut into tiles. Full attention visits a triangle of tiles. With a window, a "
        "block of queries visits a few blocks of keys. For the gradients of keys and values, a block of keys visits a "
        "few blocks of queries. Tiles inside the window need no mask, tiles at its edges do. The plain path takes a "
        "block of queries and one run of keys at a time.",
        paint_blocks,
    ),
}
