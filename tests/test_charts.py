"""The charts of a run show its curves at the right places, in any terminal."""

import json
import math
import re
import sys

import pytest

from examples import charts
from examples.charts import Curve

STEPS = tuple(range(0, 2001, 100))
FALLING = tuple(2.4 + 5.9 * math.exp(-step / 150) for step in STEPS)
RUN = [Curve("train", STEPS[1:], FALLING[1:]), Curve("validation", STEPS[::5], tuple(b + 0.1 for b in FALLING[::5]))]


def entry(step, split, bits):
    """Return a line of `metrics.jsonl`."""
    figures = {"step": step, "seconds": 1.5, "split": split, "bits_per_byte": bits}
    return json.dumps(figures | {"tokens_per_second": None, "corpus": "fox.txt"})


def test_curves_are_read_as_a_run_wrote_them_without_the_test_and_a_torn_last_line(tmp_path):
    lines = [(0, "validation", 8.1), (3, "train", 4.5), (6, "train", 4.0), (6, "validation", 4.2), (6, "test", 4.3)]
    text = "\n".join([entry(*line) for line in lines] + [entry(9, "train", 3.5)[:-7]])
    (tmp_path / "metrics.jsonl").write_text(text)
    expected = [Curve("train", (3, 6), (4.5, 4.0)), Curve("validation", (0, 6), (8.1, 4.2))]
    assert charts.read_curves(tmp_path / "metrics.jsonl") == expected
    (tmp_path / "metrics.jsonl").write_text("")
    assert charts.read_curves(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("size", [(72, 14), (24, 6), (100, 30), (41, 9)])
@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("scale", [1, 1e-3, 1e9])
def test_a_chart_keeps_to_its_size_and_its_characters(size, unicode, scale):
    curves = [Curve(name, steps, tuple(scale * b for b in bits)) for name, steps, bits in RUN]
    drawn = charts.draw(curves, *size, unicode=unicode)
    lines = drawn.split("\n")
    assert len(lines) == size[1]
    assert max(map(len, lines)) <= size[0]
    assert drawn.isascii() != unicode
    assert lines[-1].replace("steps", "").split() == [f"{step:,}" for step in range(0, 2001, 2000 // len(ticks(lines)))]


def ticks(lines):
    """Return the ticks of a chart's horizontal axis but the first."""
    return re.findall(r"[┬+]", lines[-2])[1:] if "┬" in lines[-2] else re.findall(r"[+]", lines[-2])[2:]


def rows_of(drawn):
    """Return the rows of a chart: their values, None for a row without a label, and their cells."""
    rows = [re.match(r" *([\d.]*) [+|](.*)", line) for line in drawn.split("\n")[1:-2]]
    return [(float(row[1]) if row[1] else None, row[2]) for row in rows if row]


def test_marks_and_lines_stand_at_their_values_and_steps():
    levels = Curve("train", (0, 50, 100), (2.0, 3.0, 3.0)), Curve("validation", (0, 60, 100), (3.0, 2.0, 2.6))
    rows = dict(rows_of(charts.draw(levels, 60, 14, unicode=False)))
    columns = len(rows[3.0])
    assert rows[3.0].startswith("o")
    assert rows[3.0].endswith("." * (columns // 2 - 1))
    assert rows[2.0].startswith(".")
    assert rows[2.0].rstrip().endswith("o")
    assert len(rows[2.0].rstrip()) - 1 == round(0.6 * (columns - 1))
    assert rows[2.6].index("o") == columns - 1


def test_the_steep_start_is_cut_and_its_height_named():
    drawn = charts.draw(RUN, unicode=False)
    values = [value for value, _ in rows_of(drawn) if value]
    assert min(values) <= 2.4
    assert 3 < max(values) < 6
    assert "^ up to 8.40" in drawn.split("\n")[0]
    assert rows_of(drawn)[0][1][0] == "^"


def test_a_spike_late_in_a_run_is_shown_whole():
    bits = tuple(9.0 if step == 1000 else value for step, value in zip(STEPS, FALLING, strict=True))
    drawn = charts.draw([Curve("train", STEPS, bits)], unicode=False)
    assert max(value for value, _ in rows_of(drawn) if value) > 8.5
    assert "up to" not in drawn


def test_the_legend_has_the_last_values():
    legend = charts.draw(RUN).split("\n")[0]
    assert f"train {FALLING[-1]:.3f}" in legend
    assert f"validation {FALLING[-1] + 0.1:.3f}" in legend


@pytest.mark.parametrize("bits", [(2.5,), (2.5, 2.5, 2.5), (math.nan, 2.5, math.inf, -math.inf)])
@pytest.mark.parametrize("name", ["train", "validation"])
def test_one_value_is_drawn_whatever_else_is_not_finite(name, bits):
    drawn = charts.draw([Curve(name, tuple(range(len(bits))), bits)], unicode=False)
    cells = {value: row.strip() for value, row in rows_of(drawn)}
    assert cells.pop(2.5)
    assert not any(cells.values())


@pytest.mark.parametrize("curves", [[], [Curve("train", (1, 2), (math.nan, math.inf))], [Curve("train", (), ())]])
def test_without_a_point_there_is_no_chart(curves):
    assert charts.draw(curves) == ""


def test_without_room_there_is_no_chart():
    assert charts.draw(RUN, width=23) == charts.draw(RUN, height=5) == ""


@pytest.mark.parametrize("curves", [RUN, [Curve("validation", (0,), (8.0,))], [], [RUN[0], Curve("train", (), ())]])
def test_a_png_replaces_what_was_there_and_leaves_no_part(tmp_path, curves):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    path.write_text("old")
    charts.save_png(curves, path, "a $title_ of any file")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_without_matplotlib_a_png_says_what_to_install_and_keeps_the_old_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "curves.png").write_text("old")
    with pytest.raises(charts.MissingPackage, match="pip install matplotlib"):
        charts.save_png(RUN, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_text() == "old"


def test_the_legend_has_the_best_validation_if_it_has_become_worse_since():
    worse = charts.Curve("validation", (10, 20, 30), (4.0, 3.0, 3.5))
    assert "validation 3.500, best 3.000" in charts.draw([worse])
    assert "best" not in charts.draw([worse._replace(bits=(4.0, 3.5, 3.0))])
    assert "best" not in charts.draw([worse._replace(name="train")])
