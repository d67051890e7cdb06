"""Where the time of our attention goes on a CPU: matrix products, softmax or moving data.

    python -m benchmarks.shares --shapes 1x8x8192x64:256 2x8x2048x64:256 --rotary

Runs the forward pass with gradients under JAX's profiler and sorts XLA's operations by what they read and write. Shares
are of the operations' own time, which is that of the whole call as long as they run one by one. Floating-point
operations include scores that no query sees; the rate of a large matrix product in the same run is printed beside them.
"""

import argparse
import collections
import re
import statistics
import tempfile
from pathlib import Path

import jax

from benchmarks import jax_forms
from benchmarks.cases import add_case_options, cases_of
from benchmarks.machine import device_and_date, machine_rates, seconds_a_call
from benchmarks.tables import bullets, table
from flax_local_attention import Windowed

PRODUCTS, FUSED, SOFTMAX, REST = (
    "matrix products",
    "a product and the gradient of the softmax in one",
    "mask, softmax and its gradient",
    "slices, rotary, sums into place",
)
CALLS = 5
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*)$", re.MULTILINE)


def kinds_of(hlo: str, scores: tuple[int, int]) -> dict[str, str]:
    """Map each operation of an optimized program to its kind; `scores` are the last two axes of a block's scores."""
    bodies = dict(re.findall(r"\n%(\S+) \(.*?\{\n(.*?)\n\}", hlo, re.DOTALL))
    shape = re.compile(rf"\[(?:\d+,)*{scores[0]},{scores[1]}\]")
    kinds = {}
    for name, text in INSTRUCTION.findall(hlo):
        called = re.search(r"calls=%(\S+?)[,\s]", text + " ")
        body = bodies.get(called[1], "") if called else text
        opcodes = set(re.findall(r"\} (\w[\w-]*)\(", body))
        if "dot" in opcodes:
            kinds[name] = FUSED if opcodes & {"multiply", "reduce"} else PRODUCTS
        else:
            kinds[name] = SOFTMAX if shape.search(body + text) else REST
    return kinds


def profile(compiled, inputs) -> tuple[float, collections.Counter]:
    """Return the median seconds of a call, and the seconds of each operation in it."""
    jax.block_until_ready(compiled(*inputs))
    times = [seconds_a_call(compiled, inputs) for _ in range(CALLS)]
    seconds = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                jax.block_until_ready(compiled(*inputs))
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    seconds[event.name] += event.duration_ns / 1e9 / CALLS
    return statistics.median(times), seconds


def describe(case):
    """Print the shares of one case."""
    run = jax.jit(jax_forms.with_gradient(jax_forms.ours(case)))
    inputs = jax_forms.inputs(case)
    compiled = run.lower(*inputs).compile()
    plan = Windowed().plan(case.options, case.n, case.n, platform="cpu")
    block, keys = plan.size, plan.run
    flops = (
        7 * 2 * case.b * case.h * case.n * keys * case.d
    )  # two products forward; one recomputed, four for the gradients
    kinds = kinds_of(compiled.as_text(), (block, keys))
    total, seconds = profile(compiled, inputs)
    loops = {name for name in seconds if name.startswith("while")}  # their time is that of the operations inside
    shares = collections.Counter()
    for name, time_taken in seconds.items():
        if name in kinds and name not in loops:
            shares[kinds[name]] += time_taken
    print(f"\n{case.title}: {1e3 * total:.0f} ms, blocks of {block}, {flops / total / 1e9:.0f} GFLOP/s over all\n")
    kinds = (PRODUCTS, FUSED, SOFTMAX, REST)
    rows = [[kind, f"{1e3 * shares[kind]:.0f}", f"{shares[kind] / shares.total():.0%}"] for kind in kinds]
    print(table(["operations", "ms", "share"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser, ["1x8x8192x64:256", "2x8x2048x64:256"], ["float32"])
    options = parser.parse_args()
    if jax.default_backend() != "cpu":
        raise SystemExit("Only a CPU's operations have the names that this file knows; set JAX_PLATFORMS=cpu.")
    print(device_and_date())
    print(bullets(machine_rates("float32", "cpu", 1)))
    for case in cases_of(options):
        describe(case)


if __name__ == "__main__":
    main()
