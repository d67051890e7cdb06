"""README and the pages name commands, tests and numbers that are so."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_of_differences_names_tests_that_exist():
    page = (ROOT / "docs/differences.md").read_text()
    named = re.findall(r"\[test\]\(\S+/(tests/\w+\.py) \"(\w+)\"\)", page)
    assert len(named) == page.split("## Renamed")[0].count("\n| ") - 2  # but the heading and its rule
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
