"""The code of README and guide runs as it stands, and their tables speak of tests that exist."""

import re
import tomllib
from pathlib import Path

import pytest

from flax_local_attention import Window

ROOT = Path(__file__).parent.parent


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_every_block_runs_after_those_above_it(page):
    blocks = python_blocks(page)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_pictures_are_those_of_the_windows():
    windows = [
        Window(3, causal=True),
        Window(3, causal=True, exact_windowsize=True),
        Window(3),
        Window(3, exact_windowsize=True),
    ]
    drawn = zip(*(window.draw(9).splitlines() for window in windows), strict=True)
    readme = [re.sub(r" +", " ", line).strip() for line in (ROOT / "README.md").read_text().splitlines()]
    for row in drawn:
        assert " ".join(row) in readme


def test_the_table_of_differences_names_tests_that_exist():
    table = (ROOT / "README.md").read_text().split("## Different from the original")[1].split("\n## ")[0]
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", table)
    assert len(named) >= 15
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"


def test_the_page_on_reliability_names_tests_and_numbers_that_are():
    from tests import test_wrong_calls as wrong

    page = (ROOT / "docs/reliability.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) >= 8
    assert [name for name in named if f"def {name}(" not in tests] == []
    calls = sum(len(list(wrong.calls_of(*argument))) for argument in wrong.ARGUMENTS)
    assert f"| {len(wrong.DOORS)}, {len(wrong.ARGUMENTS)} |" in page
    assert f"| {calls:,}, all refused clearly |" in page


def test_the_test_command_is_the_one_that_installs_what_the_tests_import():
    assert 'pip install -e ".[test]" && python -m pytest' in (ROOT / "README.md").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["test"][0].startswith("flax-local-attention[train,")
