"""Count how the package is built: arguments handed on, wide functions and classes, lengths, docstrings.

    python -m benchmarks.structure                     the working tree
    python -m benchmarks.structure --at v0.2.0         another revision beside it
    python -m benchmarks.structure --list --option logits_soft_cap

A *forward* is an argument of a call that is just a parameter of an enclosing function, or a field of `self`. It is
forwarded under the same name (``f(x=x)``), under another (``f(y=x)``), or by position (``f(x)``). A function's length
is that of its body without docstring, comments and blank lines.
"""

import argparse
import ast
import io
import statistics
import subprocess
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "flax_local_attention"
WIDE, MANY_FIELDS, LONG = 12, 24, 45
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Counts:
    """The counts of a tree.

    Attributes:
        lines: Lines of all files.
        docstrings: How many of them are in docstrings.
        forwards: Places of forwards, by kind.
        widths: Parameters of each function.
        fields: Fields that each class declares.
        lengths: Lines of each function.
        mentions: Lines that name an option, by file.
    """

    lines: int = 0
    docstrings: int = 0
    forwards: dict[str, list[str]] = field(
        default_factory=lambda: {"same name": [], "another name": [], "by position": []}
    )
    widths: dict[str, int] = field(default_factory=dict)
    fields: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    mentions: dict[str, int] = field(default_factory=dict)


def read_tree(revision: str | None) -> dict[str, str]:
    """Return the text of each file of the package, in the working tree or at a revision."""
    if revision is None:
        return {str(path): path.read_text() for path in sorted(Path(PACKAGE).rglob("*.py"))}
    git = lambda *arguments: subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout  # noqa: E731
    names = git("ls-tree", "-r", "--name-only", revision, PACKAGE).split()
    return {name: git("show", f"{revision}:{name}") for name in names if name.endswith(".py")}


def count_tree(files: dict[str, str], option: str) -> Counts:
    """Count all files of a tree."""
    counts = Counts()
    for path, text in files.items():
        tree, code = ast.parse(text), code_lines(text)
        counts.lines += text.count("\n")
        docs = set().union(*(docstring_lines(node) for node in ast.walk(tree)))
        counts.docstrings += len(docs)
        visit(tree, path, [], code - docs, counts)
        if mentions := sum(option in line for line in text.splitlines()):
            counts.mentions[path] = mentions
    return counts


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that hold code or part of a string."""
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kept = [token for token in tokens if token.type not in blank]
    return {line for token in kept for line in range(token.start[0], token.end[0] + 1)}


def docstring_lines(node: ast.AST) -> set[int]:
    """Return the numbers of the lines of a definition's or a module's docstring."""
    if not isinstance(node, ast.Module | ast.ClassDef | Function) or ast.get_docstring(node) is None:
        return set()
    return set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))


def visit(node: ast.AST, path: str, around: list[Function], code: set[int], counts: Counts):
    """Count a node and all inside it; `around` are the functions that enclose it."""
    for child in ast.iter_child_nodes(node):
        inner = around
        if isinstance(child, Function):
            inner = [*around, child]
            place = f"{path}:{child.lineno} {child.name}"
            counts.widths[place] = len(parameters(child))
            body = range(child.body[0].lineno, (child.end_lineno or 0) + 1)
            counts.lengths[place] = len(code.intersection(body))
        elif isinstance(child, ast.ClassDef):
            declared = [x for x in child.body if isinstance(x, ast.AnnAssign) and getattr(x.target, "id", "_") != "_"]
            counts.fields[f"{path}:{child.lineno} {child.name}"] = len(declared)
        elif isinstance(child, ast.Call) and around:
            names = {name for function in around for name in parameters(function)}
            for kind, name in forwards(child, names):
                counts.forwards[kind].append(f"{path}:{child.lineno} {name}")
        visit(child, path, inner, code, counts)


def parameters(function: Function) -> list[str]:
    """Return the names of a function's parameters, without `self` and `cls`."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def forwards(call: ast.Call, names: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the kind and name of each argument of a call that is a forward."""
    for keyword in call.keywords:
        name = handed_on(keyword.value, names)
        if name and keyword.arg:
            yield ("same name" if name == keyword.arg else "another name"), name
    for argument in call.args:
        if name := handed_on(argument, names):
            yield "by position", name


def handed_on(value: ast.expr, names: set[str]) -> str | None:
    """Return the name of the parameter or field of `self` that a value is, or None."""
    if isinstance(value, ast.Name) and value.id in names:
        return value.id
    is_field = isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == "self"
    return value.attr if is_field else None


def rows(counts: Counts, option: str) -> Iterator[tuple[str, str]]:
    """Yield the name and value of each count, as they are printed."""
    yield "lines", f"{counts.lines:,}"
    yield "in docstrings", f"{counts.docstrings / counts.lines:.1%}"
    for kind, places in counts.forwards.items():
        yield f"forwards, {kind}", f"{len(places)} ({1000 * len(places) / counts.lines:.1f} per 1,000 lines)"
    lengths = sorted(counts.lengths.values())
    yield "functions", f"{len(lengths):,}"
    yield "their median length", f"{statistics.median(lengths):g}"
    yield "nine in ten at most", f"{lengths[int(0.9 * len(lengths))]}"
    yield f"longer than {LONG}", above(counts.lengths, LONG)
    yield f"wider than {WIDE}", above(counts.widths, WIDE)
    yield f"classes of more than {MANY_FIELDS} fields", above(counts.fields, MANY_FIELDS)
    yield f"`{option}`", f"{sum(counts.mentions.values())} lines in {len(counts.mentions)} files"


def above(sizes: dict[str, int], most: int) -> str:
    """Return the definitions whose size exceeds `most`, with their sizes."""
    names = [f"{place.split()[-1]} {size}" for place, size in sizes.items() if size > most]
    return ", ".join(names) or "none"


def main():
    """Print the counts, one column a tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", metavar="REVISION", help="count this revision too")
    parser.add_argument("--option", default="logits_soft_cap", help="option whose mentions are counted (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list every forward under the same name")
    arguments = parser.parse_args()
    revisions = [None] if arguments.at is None else [arguments.at, None]
    trees = [count_tree(read_tree(revision), arguments.option) for revision in revisions]
    for (name, value), *others in zip(*(rows(counts, arguments.option) for counts in trees), strict=True):
        print(f"{name:34}", *(f"{x:32}" for x in (value, *(other for _, other in others))))
    if arguments.list:
        print("\n".join(trees[-1].forwards["same name"]))


if __name__ == "__main__":
    main()
