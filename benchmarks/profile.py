"""Where the device's time goes in a training step or a generated token, by kind of kernel.

    python -m benchmarks.profile
    python -m benchmarks.profile --streams 1 --top 40 --record step.json
    python -m benchmarks.profile --generate 64 --batch 16

Runs under JAX's profiler and adds up the kernels of its trace in three ways: by class, by name without numbers, and,
for a training step, by the part of the model that XLA's metadata names. A kernel counts as one operation: a fusion has
the name and the part of its last one. Wall time is measured before, without the profiler. Device time is the sum over
all streams, so it exceeds the wall time where kernels overlap. On a CPU the operations of XLA's threads take the place
of kernels.
"""

import argparse
import collections
import functools
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks.machine import describe_machine, device_and_date, seconds_a_call
from benchmarks.tables import table
from benchmarks.training import Training, add_setting_options, build_model, fields_of, setting_of
from flax_local_attention import generate

PROMPT = 8
TOP_K = 25
CLASSES = {
    "attention": r"^local_attention|fmha|flash|sdpa",
    "residual streams": r"^residual_streams",
    "products": r"gemm|cutlass|nvjet|cublas|xmma|matmul|splitk|dot|convolution|ynn",  # the last is XLA:CPU's
    "lookups and sorts": r"gather|scatter|sort|top_?k",
    "reductions": r"reduc|softmax|norm",
    "concatenations": r"concat",
    "transposes and copies": r"transpose|copy|copies|memcpy|memset|slice|pad",
    "elementwise": r"fusion|loop|wrapped|elementwise|add|multiply|select|convert|broadcast",
}
"""Patterns of a kernel's lower-case name; the first that matches counts."""
PARTS = {
    "optimizer": r"/optimizer/",
    "residual streams": r"_streams/|jit\(_write\)|residual_streams",
    "attention": r"LocalAttention|local_attention",
    "attention's projections and norm": r"/attn/",
    "feed-forward": r"/ff/",
    "logits and loss": r"_head|_loss",
    "embeddings": r"_embed",
}
"""Patterns of an operation's source in XLA's metadata; the first that matches counts."""
CONTAINERS = re.compile(r"^(while|call|conditional)[.\d]*$")  # their time is that of the operations inside
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*metadata=\{op_name="([^"]*)"', re.MULTILINE)


class Kernel(NamedTuple):
    """One launch: the kernel's name, its operation, and its time."""

    name: str
    operation: str
    nanoseconds: float


def class_of(name: str) -> str:
    """Classify a kernel by its name."""
    return _first_match(CLASSES, name.lower(), "other")


def part_of(source: str) -> str:
    """Find the part of the model, and the direction, that an operation belongs to."""
    part = _first_match(PARTS, source, "unknown")
    if part in ("optimizer", "unknown") or "jvp(" not in source:
        return part
    return f"{part}, {'backward' if 'transpose(' in source else 'forward'}"


def kind_of(name: str) -> str:
    """Strip the numbers that tell a kernel from others of its kind."""
    return re.sub(r"\d+", "#", re.sub(r"([_.]\d+)+$", "", name))[:70]


def _first_match(patterns, text, otherwise):
    return next((name for name, pattern in patterns.items() if re.search(pattern, text)), otherwise)


def sources_of(program: str) -> dict[str, str]:
    """Map each operation of an optimized program, named as in kernels, to its source."""
    return {_identifier(name): source for name, source in INSTRUCTION.findall(program)}


def _identifier(name):
    return re.sub(r"[.-]", "_", name)


def _source_of(kernel, sources):
    names = _identifier(kernel.operation), _identifier(kernel.name)
    return next((sources[name] for name in names if name in sources), kernel.name)


def read_trace(path: Path) -> Iterator[Kernel]:
    """Yield the kernels of a trace: what a GPU's streams ran, or XLA's threads on a CPU."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if devices or (operation and not CONTAINERS.match(event.name)):
                    yield Kernel(event.name, str(operation or event.name), event.duration_ns)


def profile(run: Callable[[], jax.Array], calls: int) -> tuple[float, list[Kernel]]:
    """Return the median seconds of a call without the profiler, and the kernels of `calls` under it."""
    jax.block_until_ready(run())
    times = [seconds_a_call(run, calls=calls) for _ in range(5)]
    detail = jax.profiler.ProfileOptions()
    detail.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=detail)
        seconds_a_call(run, calls=calls)
        jax.profiler.stop_trace()
        kernels = [kernel for path in Path(folder).rglob("*.xplane.pb") for kernel in read_trace(path)]
    return statistics.median(times), kernels


def add_up(kernels: list[Kernel], key: Callable[[Kernel], str], count: int) -> dict[str, tuple[float, float]]:
    """Add up milliseconds and launches by group, divided by `count`, the longest first."""
    times = collections.defaultdict(list)
    for kernel in kernels:
        times[key(kernel)].append(kernel.nanoseconds / 1e6)
    sums = {group: (sum(each) / count, len(each) / count) for group, each in times.items()}
    return dict(sorted(sums.items(), key=lambda item: item[1], reverse=True))


def group_table(heading: str, groups: Mapping[str, tuple[float, float]], top: int | None = None) -> str:
    """Return the table of groups; all after the first `top` share one row."""
    total = sum(time for time, _ in groups.values()) or 1.0
    rows, rest = list(groups.items())[:top], list(groups.values())[top:] if top else []
    if rest:
        rows.append((f"{len(rest)} more", (sum(time for time, _ in rest), sum(count for _, count in rest))))
    cells = [[name, f"{time:.3f}", f"{time / total:.1%}", f"{count:.1f}"] for name, (time, count) in rows]
    return table([heading, "ms", "share", "launches"], cells)


def training_run(options):
    """Return a training step, and the source of each of its operations."""
    training = Training.fresh(setting_of(options, options.streams), options.dtype, fields_of(options))
    return functools.partial(training.run, training.batch), sources_of(training.compile().as_text())


def generation_run(options):
    """Return a call that generates, and no sources, since its program's text is not at hand."""
    setting = setting_of(options, options.streams)
    model = build_model(setting, options.dtype, fields_of(options))
    prompt = jnp.asarray(setting.random_batch()[:, :PROMPT])
    variables = jax.jit(model.init)(jax.random.key(0), prompt)
    rules = {"rng": jax.random.key(1), "top_k": TOP_K}
    return (lambda: generate(model, variables, prompt, options.generate, **rules)[0]), {}


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting_options(parser)
    parser.add_argument("--streams", type=int, default=4, help="residual streams")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--generate", type=int, metavar="N", help=f"generate N tokens after {PROMPT} instead")
    parser.add_argument("--steps", type=int, help="steps in a trace (default: 5, or 1 generation)")
    parser.add_argument("--top", type=int, default=25, help="kernels to list by name")
    record.add_option(parser)
    return parser.parse_args()


def main():
    options = read_options()
    run, sources = (generation_run if options.generate else training_run)(options)
    calls = options.steps or (1 if options.generate else 5)
    seconds, kernels = profile(run, calls)
    unit, tokens = ("token", options.generate) if options.generate else ("step", 1)
    count = calls * tokens
    groups = {
        "class": add_up(kernels, lambda kernel: class_of(kernel.name), count),
        "kernel": add_up(kernels, lambda kernel: kind_of(kernel.name), count),
    }
    if sources:
        groups["part"] = add_up(kernels, lambda kernel: part_of(_source_of(kernel, sources)), count)
    wall, device = 1e3 * seconds / tokens, sum(kernel.nanoseconds for kernel in kernels) / 1e6 / count
    print(device_and_date())
    print(f"{setting_of(options, options.streams)}, {options.dtype}\n")
    print(f"wall {wall:.3f} ms a {unit}, device {device:.3f} ms, {len(kernels) / count:.0f} kernels")
    for heading, group in groups.items():
        print(f"\n{group_table(heading, group, options.top if heading == 'kernel' else None)}", flush=True)
    if options.record:
        rows = [
            {"by": by, "name": name, "ms": time, "launches": launches}
            for by, group in groups.items()
            for name, (time, launches) in group.items()
        ]
        totals = {"unit": unit, "wall_ms": wall, "device_ms": device}
        record.save(options.record, describe_machine(jax.default_backend()) | totals, rows)


if __name__ == "__main__":
    main()
