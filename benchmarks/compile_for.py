"""What XLA compiles for a TPU v5e and an H100 from each form of local attention; neither device is needed.

    python -m benchmarks.compile_for                                  (the targets whose compilers are installed)
    python -m benchmarks.compile_for --shapes 1x8x65536x64:256 1x8x262144x64:256 --target tpu --blocks 128 512

Columns: temporary memory in the device's main memory; the most that is held beside arguments and results, including
on-chip memory, in whose 128 MiB a TPU's compiler places whatever fits; bytes accessed, as XLA counts them (a loop's
body once, so compare them within a form only); for a TPU, the copies and transposes that remain in the program, and
how much they write, a loop's body once again.
"""

import argparse
import math
import re
import time

import jax
import jaxlib

from benchmarks import jax_forms
from benchmarks.cases import BYTES, add_case_options, cases_of
from benchmarks.machine import MIB
from benchmarks.tables import header, reason, row
from benchmarks.targets import compile_for, missing
from flax_local_attention import Windowed

FORMS = ["ours", "ours xla", "jax all windows at once", "jax dot_product_attention xla"]
COPY = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S*(?:, [^)]*\))? (?:copy|copy-start|transpose)\(")
COLUMNS = ["form", "step", "temporary MiB", "with on-chip MiB", "accessed MiB", "copies, MiB", "compile s"]
SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}


def copies(hlo: str) -> list[int]:
    """List the bytes that each copy or transpose in an optimized program writes, scalars left out."""
    found = []
    for kind, axes in COPY.findall(hlo):
        size = math.prod(map(int, axes.split(","))) if axes else 1
        if size > 1024:  # smaller ones are indices and loop counters
            found.append(size * SIZES.get(kind, 4))
    return found


def cells_of(target, name, case, step):
    """Compile a form for a target and return the cells of its row."""
    attend = jax_forms.form(name, case)
    array = jax.ShapeDtypeStruct(case.shape, case.dtype)
    begin = time.perf_counter()
    if step == "forward":
        compiled = compile_for(target, attend, array, array, array)
    else:
        compiled = compile_for(target, jax_forms.with_gradient(attend), array, array, array, array)
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    beside = memory.peak_memory_in_bytes - memory.argument_size_in_bytes - memory.output_size_in_bytes
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    return [
        name,
        step,
        f"{memory.temp_size_in_bytes / MIB:.2f}",
        f"{max(beside, memory.temp_size_in_bytes) / MIB:.2f}",
        "-" if accessed is None else f"{accessed / MIB:.0f}",
        _describe_copies(compiled) if target == "tpu" else "-",
        f"{seconds:.1f}",
    ]


def _describe_copies(compiled):
    found = copies(compiled.as_text())
    return f"{len(found)} of {sum(found) / MIB:.1f}"


def print_table(target, case, names):
    """Print the rows of one case on one target as they are compiled."""
    q = math.prod(case.shape) * BYTES[case.dtype] / MIB
    plan = Windowed().plan(case.options, case.n, case.n, platform=target)
    print(f"\n{target}: {case.title}; q is {q:.0f} MiB, ours takes blocks of {plan.size} queries and {plan.run} keys\n")
    print(header(COLUMNS))
    problems = []
    for name in names:
        for step in ("forward", "gradient"):
            try:
                print(row(cells_of(target, name, case, step)), flush=True)
            except Exception as problem:  # a form that cannot be compiled is named, and the others go on
                problems.append(f"Skipped {name}, {step}: {reason(problem)}")
    for problem in problems:
        print(f"\n{problem}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser, ["1x8x8192x64:256", "1x8x65536x64:256", "1x8x262144x64:256"], ["bfloat16"])
    parser.add_argument("--target", nargs="+", default=["tpu", "h100"], choices=["tpu", "h100"])
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--blocks", nargs="*", type=int, default=[], help="block sizes to compile ours with, too")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the target is described, not looked for
    print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {time.strftime('%Y-%m-%d')}")
    names = [*options.forms, *(f"ours block {size}" for size in options.blocks)]
    for target in options.target:
        if lacking := missing(target):
            print(f"\nSkipped {target}: {lacking}")
            continue
        for case in cases_of(options):
            print_table(target, case, names)


if __name__ == "__main__":
    main()
