"""A whole training step beside the original's: time, memory, compilation, and how near it is to its lower bound.

    python -m benchmarks.step                               (the original under torch.compile)
    python -m benchmarks.step --eager                       (the original as it is)
    python -m benchmarks.step --large                       (ours alone, a larger model)
    python -m benchmarks.step --warm-cache /tmp/jax_cache   (also the first step of a process with a filled cache)

A step is forward, backward, clip and Adam on the same random tokens. Ours computes in `--dtype` with float32
parameters; the original runs under autocast to it, with TF32 allowed. Each row has a process of its own, one after
another; times are medians over rounds of enqueued steps. The peak is the allocator's: for ours since the process
started, so XLA's tuning counts; for PyTorch since the rounds started. "As compiled" is what XLA reserves for the step,
arguments included. The first step is traced, compiled and run; "compile" is the part before it runs, or for PyTorch the
time by which the first step exceeds the median.

The bound is the FLOPs of all products over the measured rate of a large one, plus the bytes of parameters, gradients,
Adam's state and elementwise stages over the measured rate of a copy; `benchmarks/bound.py` counts them.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import record
from benchmarks.machine import GIB, MIB, copy_rate, describe_machine, pin_threads, product_rate
from benchmarks.tables import bullets, header, row, spread
from benchmarks.training import Setting, Training, add_setting_options, fields_of, setting_of

LARGE = {"dim": 1024, "depth": 12, "batch": 8}
NAMES = {"ours": "ours", "warm": "ours, compiled before", "original": "the original"}
COLUMNS = ["", "streams", "ms a step", "tokens/s", "times ours", "of the bound"]
COLUMNS += ["peak MiB", "as compiled", "compile s", "first step s", "loss, first and last"]


def figures(kind: str, setting: Setting, options: argparse.Namespace) -> dict:
    """Measure a row in this process."""
    if kind == "original":
        from benchmarks.torch_training import OriginalTraining

        training = OriginalTraining.fresh(setting, options.dtype, options.eager, options.threads)
    else:
        training = Training.fresh(setting, options.dtype, fields_of(options))
    measured: dict = training.start()
    training.seconds(2)  # warms up
    measured["seconds"] = [training.seconds(options.calls) for _ in range(options.rounds)]
    measured |= {"peak": training.peak(), "last loss": float(training.run(training.batch))}
    if isinstance(training, Training):
        import jax

        platform = jax.default_backend()
        measured |= {"reserved": training.reserved(), "machine": describe_machine(platform, options.threads)}
        measured |= bound_figures(setting, training, platform) if kind == "ours" else {}
    return measured


def bound_figures(setting: Setting, training: Training, platform: str) -> dict:
    """Return the work of a step, the rates of this machine, and the least time that follows."""
    import jax

    from benchmarks.bound import bound_of

    jaxpr = jax.make_jaxpr(training.step)(training.state, training.batch)
    parameters = sum(x.size for x in jax.tree.leaves(training.state[0]))
    dtype = training.model.dtype or training.model.param_dtype
    bound = bound_of(setting, jaxpr, parameters, jax.numpy.dtype(dtype).itemsize)
    size, copied, calls = (8192, GIB, 20) if platform == "gpu" else (512, GIB // 64, 1)
    rates = product_rate(str(jax.numpy.dtype(dtype)), size, calls), copy_rate(copied, calls)
    return {"parameters": parameters, "bound": bound._asdict(), "rates": rates, "least": bound.seconds(*rates)}


def measure(kind: str, streams: int, options: argparse.Namespace) -> dict:
    """Measure a row in a process of its own; return its figures, or its problem."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if kind == "warm":
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(Path(options.warm_cache).resolve()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--row", kind, str(streams)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"problem": f"took more than --limit {options.limit:g} s"}
    if done.returncode:
        return {"problem": _problem(done.stderr) or f"ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _problem(stderr):
    """Return the last line that names an exception, or the last line."""
    lines = stderr.strip().splitlines()
    named = [text for text in lines if re.match(r"[\w.]*(Error|Exception|Exit|Unsupported)\b", text)]
    return (named or lines or [""])[-1][:300]


def cells_of(kind: str, streams: int, measured: dict, ours: dict | None, setting: Setting) -> list[str]:
    """Return the cells of a row; in brackets the fastest and the slowest round."""
    seconds = statistics.median(measured["seconds"])
    cells = [NAMES[kind], str(streams), spread([1e3 * s for s in measured["seconds"]], 2)]
    cells += [f"{setting.batch_size * setting.tokens / seconds:,.0f}"]
    cells += [f"{seconds / statistics.median(ours['seconds']):.2f}" if ours else "-"]
    cells += [f"{measured['least'] / seconds:.0%}" if "least" in measured else "-"]
    cells += ["-" if measured.get(name) is None else f"{measured[name] / MIB:,.0f}" for name in ("peak", "reserved")]
    cells += [f"{measured[name]:.1f}" for name in ("compile", "first")]
    return [*cells, f"{measured['loss']:.4f}, {measured['last loss']:.4f}"]


def bound_text(streams: int, measured: dict) -> str:
    """Return the parts of a row's bound, in words."""
    bound, (flops, moved) = measured["bound"], measured["rates"]
    products, attention = bound["product_flops"] / 1e12, bound["attention_flops"] / 1e12
    state, activations = bound["state_bytes"] / 1e9, bound["activation_bytes"] / 1e9
    return (
        f"* {streams} streams, {measured['parameters'] / 1e6:.1f} M parameters: "
        f"at least {1e3 * measured['least']:.2f} ms, for {products:.3f} TFLOP of products and "
        f"{attention:.3f} of attention at {flops / 1e12:.1f} TFLOP/s, "
        f"{state:.2f} GB of state and {activations:.2f} of elementwise stages at {moved / 1e9:.0f} GB/s"
    )


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting_options(parser)
    parser.add_argument("--streams", nargs="+", type=int, default=[4, 1], help="residual streams")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--large", action="store_true", help=f"ours alone, with {LARGE} by default")
    parser.add_argument("--alone", action="store_true", help="without the original")
    parser.add_argument("--eager", action="store_true", help="the original without torch.compile")
    parser.add_argument("--warm-cache", metavar="DIR", help="also time ours with a filled compilation cache in DIR")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, of which times are medians")
    parser.add_argument("--calls", type=int, default=10, help="steps timed together")
    parser.add_argument("--threads", type=int, help="CPUs to run on (default: all that the process may use)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a row may take")
    record.add_option(parser)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)  # what this process measures for its parent
    if parser.parse_known_args()[0].large:
        parser.set_defaults(**LARGE)
    return parser.parse_args()


def main():
    options = read_options()
    options.threads = pin_threads(options.threads)
    if options.row:
        kind, streams = options.row
        print(json.dumps(figures(kind, setting_of(options, int(streams)), options)))
        return
    kinds = ["ours"] if options.large or options.alone else ["ours", "original"]
    kinds += ["warm", "warm"] if options.warm_cache else []  # the first of two fills the cache
    setting = setting_of(options, 1)
    print(f"{setting.sizes}, {options.dtype}, {options.rounds} rounds of {options.calls} steps\n")
    print(header(COLUMNS), flush=True)
    rows, notes, facts, ours = [], [], {}, {}
    for streams, (number, kind) in itertools.product(options.streams, enumerate(kinds)):
        measured = measure(kind, streams, options)
        facts |= measured.pop("machine", {})
        rows.append({"form": kind, "streams": streams} | measured)
        ours = measured if kind == "ours" else ours
        if "problem" in measured:
            notes.append(f"* failed: {NAMES[kind]}, {streams} streams: {measured['problem']}")
        elif kind != "warm" or number + 1 == len(kinds):
            print(row(cells_of(kind, streams, measured, None if "problem" in ours else ours, setting)), flush=True)
        if "bound" in measured:
            notes.append(bound_text(streams, measured))
    print("\n" + "\n".join([*notes, bullets(facts)]))
    if options.record:
        record.save(options.record, facts, rows)


if __name__ == "__main__":
    main()
