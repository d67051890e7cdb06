"""The benchmarks' pictures are what their recorded figures give."""

import json
import re

import pytest

from benchmarks import record

RECORDS = sorted(record.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_record_names_its_command_device_host_versions_and_date(path):
    found = record.load(path)
    assert found["command"].startswith("python -m benchmarks.")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", found["date"])
    assert "Python 3." in found["versions"]
    assert all("form" in row or "work" in row for row in found["rows"])


@pytest.mark.parametrize("fact", [*record.FACTS, "rows"])
def test_a_record_without_a_fact_is_refused_by_name(fact, tmp_path):
    found = dict.fromkeys(record.FACTS, "known") | {"rows": [{"form": "ours"}]}
    del found[fact]
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"lacks {fact}"):
        record.load(path)


def test_a_record_has_the_command_without_its_own_option_and_keeps_figures_to_five_digits(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    arguments = ["benchmarks/gpu.py", "--forms", "None", "cudnn", "--record", str(path), "--memory"]
    monkeypatch.setattr("sys.argv", arguments)
    facts = dict.fromkeys(record.FACTS[1:], "known")
    record.save(path, facts, [{"form": "ours", "n": 1234567, "forward_ms": [0.123456789, 12.0]}])
    found = record.load(path)
    assert found["command"] == "python -m benchmarks.gpu --forms None cudnn --memory"
    assert found["rows"] == [{"form": "ours", "n": 1234567, "forward_ms": [0.12346, 12.0]}]


def test_pictures_are_drawn_from_the_figures_as_they_are_now(tmp_path):
    """The same bytes with the version of matplotlib that drew them; with another one, of the same records."""
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    drawn = plot.draw_all(tmp_path)
    assert sorted(path.name for path in drawn) == sorted(path.name for path in plot.FOLDER.iterdir())
    for path in drawn:
        ours, kept = path.read_text(), (plot.FOLDER / path.name).read_text()
        assert fact(ours, "source") == fact(kept, "source"), path.name
        if fact(ours, "creator") == fact(kept, "creator"):
            assert ours == kept, path.name


def fact(svg, name):
    """Return what an SVG says of itself, its source or its creator, tags and all."""
    return re.search(rf"<dc:{name}>.*?</dc:{name}>", svg, re.DOTALL)[0]
