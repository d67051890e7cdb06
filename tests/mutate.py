"""Mutation testing: change one thing in the package at a time and check that a test fails.

    python -m tests.mutate --count 60 --seed 0 --jobs 2 --out mutants.jsonl

The seed draws mutants from every file of the package. Each is a copy of the repository with one expression or
statement changed, in which the tests that `TESTS` names for that file run until one fails. A mutant without a failing
test has survived: write a test that fails, or, if none can, add the mutant to `EQUIVALENT` with the reason.
The exit status is 1 if any mutant has survived. A mutant already in `--out` is not run again.
"""

import argparse
import ast
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flax_local_attention"

TESTS = {
    "__init__.py": "surface house",
    "attention.py": "attention softmax masked_tokens",
    "cache.py": "cache_steps switches cache explicit_mesh",
    "array_checks.py": "wrong_calls attention",
    "checks.py": "options window rotary wrong_calls",
    "decoding.py": "cache_steps decoding cache",
    "embedding.py": "fused transformer",
    "exchange.py": "sharding sequence",
    "feed_forward.py": "golden narrow_dtypes layers fused",
    "field_checks.py": "fields wrong_calls",
    "fields.py": "fields surface partitioning layers",
    "flax_attention.py": "flax_attention",
    "frequencies.py": "rotary",
    "generation.py": "generation",
    "head.py": "head",
    "layers.py": "golden fields surface layers switches cache explicit_mesh",
    "linear.py": "linear layers",
    "norm.py": "golden narrow_dtypes layers fused",
    "operands.py": "dense masked_tokens narrow_dtypes attention",
    "options.py": "options attention cache_steps",
    "parallel.py": "sharding sequence",
    "partitioning.py": "partitioning parallel_training",
    "position_bias.py": "golden narrow_dtypes layers",
    "residual_streams.py": "residual_streams golden fused transformer",
    "ring_attention.py": "sharding sequence",
    "rotary.py": "rotary attention cache_steps",
    "sampling.py": "sampling generation",
    "sharding.py": "sharding linear switches explicit_mesh",
    "softmax.py": "softmax dense narrow_dtypes masked_tokens windowed",
    "stacking.py": "stacking",
    "tokens.py": "switches transformer generation",
    "transformer.py": "golden surface fields transformer",
    "transformer_layer.py": "golden transformer",
    "window.py": "window plan wide_windows windowed cache_steps",
    "convert/__init__.py": "convert house",
    "convert/check.py": "convert house",
    "convert/infer.py": "convert house",
    "convert/names.py": "convert house",
    "kernels/__init__.py": "fused dispatch attention",
    "kernels/borders.py": "sharding sequence",
    "kernels/constants.py": "triton windowed",
    "kernels/contract.py": "attention windowed",
    "kernels/dense.py": "dense windowed",
    "kernels/devices.py": "fused dispatch explicit_mesh",
    "kernels/dispatch.py": "dispatch sharding aot",
    "kernels/family.py": "dispatch triton tpu windowed",
    "kernels/fastest.py": "dispatch tpu aot",
    "kernels/fused.py": "fused dispatch",
    "kernels/layout.py": "fused triton tpu",
    "kernels/mosaic.py": "mosaic dispatch aot",
    "kernels/mosaic_programs.py": "mosaic",
    "kernels/pallas_mosaic.py": "mosaic aot",
    "kernels/pallas_tpu.py": "tpu windowed aot",
    "kernels/pallas_triton.py": "triton fused decoding aot",
    "kernels/plan.py": "plan windowed",
    "kernels/primitives.py": "dispatch fused export",
    "kernels/ring.py": "decoding",
    "kernels/rows.py": "fused house",
    "kernels/tpu.py": "tpu windowed sequence aot",
    "kernels/tpu_programs.py": "tpu windowed",
    "kernels/triton.py": "triton windowed dispatch aot",
    "kernels/triton_programs.py": "triton windowed",
    "kernels/windowed.py": "windowed dispatch wide_windows dense",
}
"""The test files that must notice a change in a file of the package, the most specific and quickest first."""

SURVIVED = "SURVIVED"
PYTEST = (
    *("-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"),
    *("-m", "not exhaustive and not processes"),
)

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "convert/check.py",
        "return bool(np.allclose(x.astype(np.float32), wanted, rtol=precision, ))",
    ): "the least frequency is 1e-4, so the relative tolerance decides",
    (
        "kernels/fused.py",
        'is_new_enough = target.platform == "cuda" and (target.capability or (0, -1)) >= (8, 0)',
    ): "any pair below (8, 0) says no",
    (
        "kernels/tpu_programs.py",
        "total[...] = _sum_before(step, total, count) * fade + jnp.sum(weights, 0, keepdims=False)",
    ): "the sum is added to a row of its length",
    (
        "kernels/plan.py",
        "is_power = size & (size - 2) == 0",
    ): "differs for blocks of 1 alone, for which both ways to divide agree",
    (
        "residual_streams.py",
        "x = self.mixed[-1]",
    ): "streams have one dtype, and where there is one stream it is the last",
    (
        "kernels/mosaic.py",
        "TileRow(64, 0, Tiles(Tile(64, 128, 2, 3, True), Tile(64, 128, 2, 2, True), Tile(64, 64, 2, 3, False))),",
    ): "tiles move the time of a call, not its result",
}
"""Equivalent mutants: the file, the line after the change, and why no test can fail."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: `before`, at a byte offset, becomes `after`."""

    file: str
    line: int
    column: int
    operator: str
    before: str
    after: str
    offset: int

    def changed(self) -> str:
        """Return the changed text of the file."""
        data = (PACKAGE / self.file).read_bytes()
        return (data[: self.offset] + self.after.encode() + data[self.offset + len(self.before.encode()) :]).decode()

    def changed_line(self) -> str:
        return self.changed().splitlines()[self.line - 1].strip()

    def __str__(self):
        before = " ".join(self.before.split())
        return f"{self.file}:{self.line}:{self.column} {self.operator}: {before} -> {self.after.strip()}"


COMPARISONS = {
    ast.Lt: ("<", "<=", ">="),
    ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="),
    ast.GtE: (">=", ">", "<"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
OPPOSITES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
AXES = {"0": "1", "1": "0", "-1": "-2", "-2": "-1"}


class Source:
    """The text of a file and the changes that can be made in it."""

    def __init__(self, file: str):
        self.file, self.data = file, (PACKAGE / file).read_bytes()
        self.tree = ast.parse(self.data)
        lines = self.data.splitlines(keepends=True)
        self.starts = [sum(map(len, lines[:i])) for i in range(len(lines))]

    def start(self, node):
        return self.starts[node.lineno - 1] + node.col_offset

    def stop(self, node):
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def place(self, offset: int) -> tuple[int, int]:
        line = self.data[:offset].count(b"\n")
        return line + 1, offset - self.starts[line] + 1

    def text(self, node) -> str:
        return self.data[self.start(node) : self.stop(node)].decode()

    def replace(self, node, after: str):
        """Replace a node by a text with as many lines."""
        lines = "\n" * (self.text(node).count("\n") - after.count("\n"))
        is_word = re.fullmatch(r"[\w.-]+", after) and not lines
        if isinstance(node, ast.expr) and not is_word:
            return self.start(node), self.text(node), f"({after}{lines})"
        return self.start(node), self.text(node), after + lines

    def swap(self, left, right, before: str, after: str):
        """Replace the operator between two nodes."""
        gap = self.data[self.stop(left) : self.start(right)].decode()
        return self.stop(left) + len(gap[: gap.find(before)].encode()), before, after

    def changes(self, node):
        """Yield every change of one node: the operator's name, the offset in bytes, and the texts before and after."""
        match node:
            case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() as op, right):
                yield "drop a term", *self.replace(node, self.text(left))
                if isinstance(op, ast.Add | ast.Mult):
                    yield "drop a term", *self.replace(node, self.text(right))
                if isinstance(op, ast.Add | ast.Sub):
                    signs = ("+", "-") if isinstance(op, ast.Add) else ("-", "+")
                    yield "swap a sign", *self.swap(left, right, *signs)
            case ast.AugAssign(target, ast.Add(), value):
                yield "swap a sign", *self.swap(target, value, "+=", "-=")
            case ast.UnaryOp(ast.USub(), operand):
                yield "swap a sign", *self.replace(node, self.text(operand))
            case ast.UnaryOp(ast.Not(), operand):
                yield "negate a condition", *self.replace(node, self.text(operand))
            case ast.BoolOp(op, values):
                words = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                for left, right in itertools.pairwise(values):
                    yield "swap and/or", *self.swap(left, right, *words)
                if len(values) == 2:
                    yield from (("drop a term", *self.replace(node, self.text(value))) for value in values)
            case ast.Compare(first, ops, others):
                for left, op, right in zip([first, *others], ops, others, strict=False):
                    before, *afters = COMPARISONS[type(op)]
                    yield from (("change a comparison", *self.swap(left, right, before, after)) for after in afters)
            case ast.Constant(bool() as value):
                yield "change a boolean", *self.replace(node, str(not value))
            case ast.Constant(int() as value):
                yield from (("off by one", *self.replace(node, str(value + step))) for step in (1, -1))
            case ast.Call(func, _, keywords) if self.text(func) != "zip":
                name = getattr(func, "attr", getattr(func, "id", None))
                if name in OPPOSITES:
                    yield "swap min/max", self.stop(func) - len(name), name, OPPOSITES[name]
                for keyword in keywords:
                    rest = self.data[self.stop(keyword) : self.stop(node)].decode()
                    comma = re.match(r"\s*,[ ]*", rest)
                    yield "drop a keyword", self.start(keyword), self.text(keyword) + (comma[0] if comma else ""), ""
            case ast.keyword("axis" | "axes" | "dimension" | "split_axis" | "concat_axis", value):
                for axis in getattr(value, "elts", [value]):
                    if self.text(axis) in AXES:
                        yield "swap an axis", *self.replace(axis, AXES[self.text(axis)])
            case ast.If(test) | ast.IfExp(test) | ast.While(test):
                if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp):
                    yield "negate a condition", *self.replace(test, f"not {self.text(test)}")
        if self.can_be_skipped(node):
            yield "skip a statement", *self.replace(node, "pass")

    def can_be_skipped(self, node) -> bool:
        """Return whether deleting this statement changes behaviour without merely leaving a name undefined."""
        match node:
            case ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break():
                return True
            case ast.Expr(value):  # a string is documentation, and chex assertions hold
                return not isinstance(value, ast.Constant) and not self.text(node).startswith("chex.")
            case ast.Assign(targets, value):
                targets = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
                return bool(targets) and targets <= {name.id for name in ast.walk(value) if isinstance(name, ast.Name)}
        return False

    def walk(self, node):
        """Visit all nodes but annotations, docstrings, error messages, `__all__`, `assert` and `strict=`."""
        yield node
        is_fact = isinstance(node, ast.Assert) or (isinstance(node, ast.keyword) and node.arg == "strict")
        if is_fact or isinstance(node, ast.Raise | ast.JoinedStr) or self.is_list_of_names(node):
            return
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self.walk(child)

    def is_list_of_names(self, node) -> bool:
        return isinstance(node, ast.Assign) and self.text(node.targets[0]) == "__all__"

    def mutants(self) -> list[Mutant]:
        """Return all mutants of the file, in the order of their offsets."""
        changes = {change for node in self.walk(self.tree) for change in self.changes(node)}
        return [
            Mutant(self.file, *self.place(offset), operator, before, after, offset)
            for operator, offset, before, after in sorted(changes)
        ]

    def is_changed_by(self, mutant: Mutant) -> bool:
        """Return whether a mutant parses and is another program."""
        try:
            return ast.dump(ast.parse(mutant.changed())) != ast.dump(self.tree)
        except SyntaxError:
            return False

    def draw(self, count: int, seed: int) -> list[Mutant]:
        """Draw mutants, each kind of change equally often."""
        rng, kinds, drawn = random.Random(f"{seed} {self.file}"), {}, []
        for mutant in self.mutants():
            kinds.setdefault(mutant.operator, []).append(mutant)
        while kinds and len(drawn) < count:
            kind = rng.choice(sorted(kinds))
            mutant = kinds[kind].pop(rng.randrange(len(kinds[kind])))
            drawn += [mutant] if self.is_changed_by(mutant) else []
            kinds = {kind: left for kind, left in kinds.items() if left}
        return sorted(drawn, key=lambda mutant: mutant.offset)


def draw(count: int, seed: int, files: list[str]) -> list[Mutant]:
    """Draw mutants: one from each file that has any, the rest in proportion to file length."""
    sources = {file: source for file in files if (source := Source(file)).mutants()}
    lines = [len(source.starts) for source in sources.values()]
    rest = max(count - len(sources), 0)
    ends = [round(rest * total / sum(lines)) for total in itertools.accumulate(lines, initial=0)]
    shares = [1 + stop - start for start, stop in itertools.pairwise(ends)]
    return [
        mutant for source, share in zip(sources.values(), shares, strict=True) for mutant in source.draw(share, seed)
    ]


class Copies:
    """Copies of the repository in which tests run, and the results of tests without a mutant."""

    def __init__(self, folder: str, limit: float):
        self.folder, self.limit, self.passes, self.numbers = Path(folder), limit, {}, itertools.count()
        self.original = self.copy("original")

    def copy(self, name: str) -> Path:
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.jsonl")
        return Path(shutil.copytree(ROOT, self.folder / name, ignore=ignored))

    def python(self, copy: Path, *arguments: str) -> tuple[int | None, str]:
        """Run Python in a copy; return its exit status, None after a timeout, and its output."""
        env = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(copy)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *arguments], cwd=copy, env=env, **pipes)
        try:
            written = process.communicate(timeout=self.limit)[0]
            return process.returncode, written
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]

    def check_original(self, files: list[str]):
        """Raise unless tests import the package in the copy and all of them can be collected."""
        _, path = self.python(self.original, "-c", "import flax_local_attention as package; print(package.__file__)")
        if not path.startswith(str(self.original)):
            raise RuntimeError(f"Tests must import the package of their copy, got {path}")
        status, written = self.python(self.original, "-m", "pytest", "--collect-only", *files)
        if status != 0:
            raise RuntimeError(f"Tests must be collected without a mutant:\n{written[-2000:]}")

    def passes_without(self, test: str) -> bool:
        """Return whether a test passes on this machine without a mutant."""
        if test not in self.passes:
            self.passes[test] = "::" not in test or self.python(self.original, *PYTEST, test)[0] == 0
        return self.passes[test]

    def first_failure(self, copy: Path, file: str) -> str | None:
        """Return the first test of a file that fails with the mutant and passes without."""
        while True:
            broken = [f"--deselect={test}" for test, passes in self.passes.copy().items() if not passes]
            status, written = self.python(copy, *PYTEST, *broken, file)
            failed = re.search(r"^(?:FAILED|ERROR) (\S+\.py(?:::.+?)?)(?: - .*)?$", written, re.MULTILINE)
            if status in (0, 5):  # 5: no test of this file runs on this machine
                return None
            test = failed[1] if failed else f"{file}: {'time limit' if status is None else f'exit status {status}'}"
            if self.passes_without(test):
                return test

    def check(self, mutant: Mutant) -> dict:
        """Run the tests of a mutant's file until one fails."""
        began, copy = time.monotonic(), self.copy(f"mutant{next(self.numbers)}")
        (copy / PACKAGE.name / mutant.file).write_text(mutant.changed())
        failures = (self.first_failure(copy, file) for file in tests_of(mutant.file))
        killed_by = next((test for test in failures if test), None)
        shutil.rmtree(copy, ignore_errors=True)
        fate = f"killed by {killed_by}" if killed_by else EQUIVALENT.get((mutant.file, mutant.changed_line()), SURVIVED)
        return {"mutant": str(mutant), "fate": fate, "seconds": round(time.monotonic() - began)}


def tests_of(file: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in TESTS[file].split()]


def check_all(mutants: list[Mutant], jobs: int, limit: float) -> Iterator[dict]:
    """Yield the result of each mutant as soon as it is known."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies = Copies(folder, limit)
        copies.check_original(sorted({test for mutant in mutants for test in tests_of(mutant.file)}))
        try:
            for future in as_completed([pool.submit(copies.check, mutant) for mutant in mutants]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        print(*[f"{test} fails without a mutant too" for test, passes in copies.passes.items() if not passes], sep="\n")


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="mutants to draw; at least one of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--files", nargs="+", default=list(TESTS), choices=TESTS, metavar="FILE", help="of the package")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at the same time, each on one core")
    parser.add_argument(
        "--limit", type=float, default=900, help="seconds for one test file; a mutant that takes longer is killed"
    )
    parser.add_argument(
        "--out", type=Path, help="file of JSON lines that keeps results; those in it are not made again"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    arguments = parser.parse_args()

    mutants = draw(arguments.count, arguments.seed, arguments.files)
    if arguments.list:
        print(*mutants, sep="\n")
        return
    known = arguments.out.read_text().splitlines() if arguments.out and arguments.out.exists() else []
    results = {result["mutant"]: result for result in map(json.loads, known)}
    mutants = [mutant for mutant in mutants if str(mutant) not in results]
    for result in check_all(mutants, arguments.jobs, arguments.limit):
        results[result["mutant"]] = result
        print(f"{result['mutant']}: {result['fate']}, {result['seconds']} s", flush=True)
        if arguments.out:
            with arguments.out.open("a") as out:
                print(json.dumps(result), file=out)
    fates = [result["fate"] for result in results.values()]
    killed, survived = [fate for fate in fates if fate.startswith("killed")], fates.count(SURVIVED)
    print(
        f"{len(fates)} mutants: {len(killed)} killed, {sum('::' not in fate for fate in killed)} of them by an error "
        f"on import, a crash or the time limit; {len(fates) - len(killed) - survived} equivalent; {survived} survived."
    )
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
