"""The pictures of the documentation: the files are what the code draws, and they show what the library does."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from docs import draw
from docs.drawing import facts, running, windows
from docs.drawing.canvas import CELL, THEMES
from flax_local_attention import Window

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn():
    return draw.draw_all()


def test_the_files_are_what_the_code_draws(drawn):
    files = {path.name: path.read_text(encoding="utf-8") for path in draw.FOLDER.glob("*.svg")}
    assert sorted(files) == sorted(drawn)
    changed = [name for name, text in drawn.items() if files[name] != text]
    assert changed == [], "run `python -m docs.draw`"


def test_every_picture_is_small_and_says_what_it_shows_in_words(drawn):
    for name, text in drawn.items():
        root = ElementTree.fromstring(text)
        assert len(text) < 32_000, name
        assert len(root.find(f"{SVG}title").text) > 10, name
        assert len(root.find(f"{SVG}desc").text) > 60, name
        width, height = float(root.get("width")), float(root.get("height"))
        assert root.get("viewBox").split()[2:] == [root.get("width"), root.get("height")], name
        for mark in root.iter(f"{SVG}text"):
            assert float(mark.get("font-size")) >= 14, name
            assert 0 <= float(mark.get("x")) <= width, name
            assert 10 <= float(mark.get("y")) <= height - 4, name


def test_both_themes_show_the_same(drawn):
    for name in draw.PICTURES:
        light, dark = (re.sub("#[0-9a-f]{6}", "", drawn[f"{name}-{theme}.svg"]) for theme in THEMES)
        assert light == dark, name


def contrast(one, other):
    """Return the contrast of two colours as WCAG 2 defines it."""

    def luminance(color):
        parts = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_signs_stand_out(theme):
    colors = THEMES[theme]
    texts = [("ink", "paper"), ("quiet", "paper"), ("quiet", "faint"), ("ink", "pale")]
    for text, ground in [*texts, ("local_ink", "local"), ("wide_ink", "wide")]:
        assert contrast(getattr(colors, text), getattr(colors, ground)) >= 4.5, (text, ground)
    for sign in ("local", "own", "wide", "other", "alert"):  # 3 is what WCAG asks of graphics
        assert contrast(getattr(colors, sign), colors.paper) >= 3, sign


def cells_in(text, colors, x, y, n):
    """Return the cells of an n x n grid at x and y that are filled in one of the colours."""
    filled = np.zeros((n, n), bool)
    for path in ElementTree.fromstring(text).iter(f"{SVG}path"):
        if path.get("stroke") not in colors or "stroke-dasharray" not in path.attrib:
            continue
        for left, middle, length in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", path.get("d")):
            start, row = (float(left) - 1 - x) / CELL, (float(middle) - y) / CELL - 0.5
            if 0 <= row < n and 0 <= start < n:
                assert start == int(start), "not on the grid"
                assert row == int(row), "not on the grid"
                filled[int(row), int(start) : int(start) + round((float(length) + 2) / CELL)] = True
    return filled


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", windows.WINDOWS)
def test_the_windows_are_those_that_the_library_draws(drawn, name, theme):
    colors, n = THEMES[theme], windows.N
    expected = [[mark == "#" for mark in row] for row in windows.window_of(name).draw(n).split("\n")]
    places = [(f"window-{name}", windows.ONE), ("windows", windows.PLACES[name])]
    for picture, place in places:
        text = drawn[f"{picture}-{theme}.svg"]
        np.testing.assert_array_equal(cells_in(text, {colors.local, colors.own}, *place, n), expected)
        np.testing.assert_array_equal(cells_in(text, {colors.own}, *place, n), np.eye(n, dtype=bool))
        np.testing.assert_array_equal(cells_in(text, {colors.faint}, *place, n), ~np.array(expected))


def test_tokens_from_a_cache_see_what_they_see_in_one_call():
    window, n = Window.sliding(5), sum(running.CHUNKS)
    np.testing.assert_array_equal(facts.seen_in_chunks(window, running.CHUNKS), facts.seen_in_call(window, n))
    np.testing.assert_array_equal(facts.seen_in_call(window, n), facts.seen_by_window(window, n))


def test_the_reach_is_that_of_composed_layers():
    for layers, reached in ((running.DEPTH, running.LOCAL_REACH), (running.DEPTH + 1, running.WHOLE_REACH)):
        within = facts.seen_by_window(running.NARROW, running.TOKENS)
        path = np.linalg.matrix_power(within.astype(int), running.DEPTH)
        if layers > running.DEPTH:
            path = facts.seen_by_window(Window.sliding(None), running.TOKENS) @ path
        assert np.flatnonzero(path[-1]).tolist() == list(reached[-1])


def test_the_ring_holds_the_last_tokens_and_shows_the_window_and_the_first():
    window, first = running.KEPT, list(range(running.FIRST))
    moments = facts.moments(window, running.STEPS, rewind=running.REWIND, keep_first=running.FIRST)
    assert [moment.length for moment in moments] == np.cumsum(running.STEPS).tolist()
    size = window.capacity + running.REWIND
    for moment in moments:
        recent = set(range(max(moment.length - window.capacity + 1, 0), moment.length))
        assert moment.first == first
        assert moment.from_ring == recent
        assert moment.seen == recent | {moment.length} | set(first)
        assert moment.next_slot == moment.length % size
        assert all(token < 0 or token % size == slot for slot, token in enumerate(moment.slots))


def test_the_parts_of_devices_make_up_the_window():
    found = facts.on_shards(Window.sliding(4), running.SHARDS, running.SHARD)
    n = running.SHARDS * running.SHARD
    np.testing.assert_array_equal(found.own | found.halo, facts.seen_by_window(Window.sliding(4), n))
    assert not (found.own & found.halo).any()
    assert found.fetched.tolist() == [[-1] * 3, [2, 3, 4], [7, 8, 9], [12, 13, 14]]


def test_blocks_of_queries_read_all_keys_that_they_see():
    for queries, keys in facts.plain_blocks(running.REACHING, running.LONG, running.BLOCK):
        seen = facts.seen_by_window(running.REACHING, running.LONG)[list(queries)].any(0)
        assert set(np.flatnonzero(seen)) <= set(keys)
