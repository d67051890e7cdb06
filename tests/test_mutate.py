"""Mutation testing draws mutants of every file, each one change that makes another program."""

import ast

import pytest

from tests import mutate

FILES = sorted(str(path.relative_to(mutate.PACKAGE)) for path in mutate.PACKAGE.rglob("*.py"))


@pytest.fixture(scope="module")
def drawn():
    return mutate.draw(80, 5, FILES)


def test_every_file_of_the_package_has_tests_that_exist():
    assert sorted(mutate.TESTS) == FILES
    assert all((mutate.ROOT / test).exists() for file in mutate.TESTS for test in mutate.tests_of(file))


def test_mutants_are_drawn_of_every_file_that_has_code(drawn):
    assert len(set(drawn)) == 80
    assert set(FILES) - {mutant.file for mutant in drawn} == {"__init__.py", "kernels/contract.py"}


def test_a_seed_draws_the_same_mutants_again():
    drawn = mutate.draw(9, 5, FILES[:3])
    assert drawn == mutate.draw(9, 5, FILES[:3])
    assert drawn != mutate.draw(9, 6, FILES[:3])


def test_a_mutant_is_another_program_that_differs_in_one_place(drawn):
    for mutant in drawn:
        before, after = (mutate.PACKAGE / mutant.file).read_text(), mutant.changed()
        assert ast.dump(ast.parse(before)) != ast.dump(ast.parse(after)), mutant
        before, after = before.splitlines(), after.splitlines()
        assert len(before) == len(after), mutant
        changed = [line for line, pair in enumerate(zip(before, after, strict=True), start=1) if pair[0] != pair[1]]
        assert changed[0] >= mutant.line, mutant
        assert changed[-1] <= mutant.line + mutant.before.count("\n"), mutant


TEXT = '''
"""A text of 1 and 2."""
__all__ = ["a" + "b"]

def f(x: Literal[1], y: int = 3, *, last=True) -> Literal[2]:
    """Return 4."""
    assert x < 5
    if x and y <= z:
        raise ValueError("too large: " + str(-7))
    x = g(x, axis=-1)
    h(min(x - y, (x + y) * z) if not last else last)
    return f"{x + 10}"
'''


def test_every_operator_finds_its_places_and_none_in_texts(tmp_path, monkeypatch):
    (tmp_path / "file.py").write_text(TEXT)
    monkeypatch.setattr(mutate, "PACKAGE", tmp_path)
    source = mutate.Source("file.py")
    changes = [str(mutant).split(" ", 1)[1] for mutant in source.mutants() if source.is_changed_by(mutant)]
    assert changes == [
        "change a boolean: True -> False",
        "change a comparison: <= -> <",
        "change a comparison: <= -> >",
        "drop a keyword: axis=-1 -> ",
        "drop a term: x and y <= z -> (y <= z)",
        "drop a term: x and y <= z -> x",
        "drop a term: x - y -> x",
        "drop a term: (x + y) * z -> (x + y)",
        "drop a term: (x + y) * z -> z",
        "drop a term: x + y -> x",
        "drop a term: x + y -> y",
        "negate a condition: not last -> last",
        "off by one: 3 -> 2",
        "off by one: 3 -> 4",
        "off by one: 1 -> 0",
        "off by one: 1 -> 2",
        'skip a statement: raise ValueError("too large: " + str(-7)) -> pass',
        "skip a statement: x = g(x, axis=-1) -> pass",
        "skip a statement: h(min(x - y, (x + y) * z) if not last else last) -> pass",
        "swap a sign: -1 -> 1",
        "swap a sign: - -> +",
        "swap a sign: + -> -",
        "swap an axis: -1 -> -2",
        "swap and/or: and -> or",
        "swap min/max: min -> max",
    ]
