"""Which form of local attention is fastest, and which needs the least memory: ours, JAX's or PyTorch's.

    python -m benchmarks.attention --shapes 1x8x8192x64:256 2x8x2048x64:256 --rotary
    python -m benchmarks.attention --shapes 8x8x2048x64:256 4x8x8192x64:512 --dtype bfloat16 --blocks 64 128 512
    python -m benchmarks.attention --shapes 1x8x{2048,4096,8192,16384}x64:256 --record growth.json
    python -m benchmarks.attention --reps 0                                       (memory alone)

Runs on the CPU or on a GPU, whichever JAX finds. Every form first computes the result and the gradients of q, k and v,
which are compared with ours; then all forms take turns, so that what disturbs the machine disturbs them alike. Times
are medians. Temporary memory excludes inputs and results; peak memory excludes inputs only. XLA reports both for JAX.
For PyTorch the peak is measured: by its allocator on a GPU, by the growth of the process on a CPU (within 10 %). A form
that cannot run is named with the reason.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import re
import statistics
import time
from pathlib import Path

from benchmarks import record
from benchmarks.machine import MIB, describe_machine, machine_rates, pin_threads, seconds_a_call
from benchmarks.tables import Skipped, bullets, reason, spread, table

STEPS = ("forward", "gradient")
COLUMNS = ["form", "forward ms", "forward + gradient ms", "times ours"]
COLUMNS += ["temporary MiB", "peak MiB", "compile s", "max err"]
FORMS = [
    "ours",
    "torch original",
    "jax all windows at once",
    "jax dot_product_attention xla",
    "jax dot_product_attention cudnn",
    "torch SDPA with a mask",
    "torch FlexAttention",
]


class JaxRunner:
    """A form in JAX, compiled for one case, forward and with gradient."""

    def __init__(self, name, case):
        import jax

        from benchmarks import jax_forms

        attend, inputs = jax_forms.form(name, case), jax_forms.inputs(case)
        self.steps = STEPS
        self.inputs = {"forward": inputs[:3], "gradient": inputs}
        functions = {"forward": attend, "gradient": jax_forms.with_gradient(attend)}
        self.compiled, self.compile_seconds = {}, {}
        for step in STEPS:
            begin = time.perf_counter()
            self.compiled[step] = jax.jit(functions[step]).lower(*self.inputs[step]).compile()
            self.compile_seconds[step] = time.perf_counter() - begin

    def results(self):
        """Return the result and the gradients, as float32 on the host."""
        import numpy as np

        return [np.asarray(x.astype("float32")) for x in self.compiled["gradient"](*self.inputs["gradient"])]

    def seconds(self, step, calls):
        """Time one call: the mean over `calls` that are enqueued together."""
        return seconds_a_call(self.compiled[step], self.inputs[step], calls)

    def temporary(self, step):
        """Return the bytes beside inputs and results, as compiled."""
        return self.compiled[step].memory_analysis().temp_size_in_bytes

    def peak(self, step):
        """Return the bytes beside inputs at the highest, as compiled: XLA allocates them all when a call starts."""
        return self.temporary(step) + self.compiled[step].memory_analysis().output_size_in_bytes


class TorchRunner:
    """A form in PyTorch, for one case."""

    def __init__(self, name, case, device):
        try:
            import torch
        except ImportError:
            raise Skipped("torch is not installed") from None
        from benchmarks import torch_forms

        self.torch, self.device = torch, "cuda" if device == "gpu" else "cpu"
        if device == "gpu" and not torch.cuda.is_available():
            raise Skipped("this torch has no CUDA")
        *self.inputs, self.cotangent = torch_forms.inputs(case, self.device)
        self.attend = torch_forms.form(name, case, self.device)
        self.compile_seconds = {"forward": self._first_call("forward")}
        with contextlib.suppress(NotImplementedError):  # FlexAttention has no gradient on a CPU
            self.compile_seconds["gradient"] = self._first_call("gradient")
        self.steps = tuple(self.compile_seconds)

    def _first_call(self, step):
        """Time how much longer the first call takes than the second: what compiling takes, if anything is compiled."""
        first = self.seconds(step, 1)
        return max(first - self.seconds(step, 1), 0)

    def _run(self, step):
        if step == "forward":
            with self.torch.no_grad():
                return (self.attend(*self.inputs),)
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        out = self.attend(*inputs)
        return out, *self.torch.autograd.grad(out, inputs, self.cotangent)

    def results(self):
        return [x.detach().float().cpu().numpy() for x in self._run(self.steps[-1])]

    def seconds(self, step, calls):
        if self.device == "cpu":
            begin = time.perf_counter()
            for _ in range(calls):
                self._run(step)
            return (time.perf_counter() - begin) / calls
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            self._run(step)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def temporary(self, step):
        return None

    def peak(self, step):
        if self.device == "cpu":
            return host_peak(lambda: self._run(step))
        cuda = self.torch.cuda
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        self.seconds(step, 1)
        return cuda.max_memory_allocated() - before


def host_peak(run):
    """Measure the most bytes by which this process grows during a call; None where the system does not say."""
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that the allocator kept would hide what a call takes
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(case, names, options, device):
    """Measure one case; return a row per form, and the reason for each form that has none."""
    from benchmarks.cases import refuse_scores

    runners, rows, reasons = {}, {}, {}
    ours = None
    for name in names:
        try:
            if name == "torch SDPA with a mask":
                refuse_scores(case.n**2, options.limit_gib, score_bytes=1)
            if name == "jax dot_product_attention xla":
                refuse_scores(case.b * case.h * case.n**2, options.limit_gib)
            runner = TorchRunner(name, case, device) if name.startswith("torch") else JaxRunner(name, case)
            results = runner.results() if len(names) > 1 else []
            ours = results if ours is None else ours
            rows[name] = {
                "error": _largest_difference(results, ours),
                "compile": runner.compile_seconds,
                "temporary": {step: runner.temporary(step) for step in runner.steps},
                "peak": {step: runner.peak(step) for step in runner.steps},
            }
            runners[name] = runner
        except Exception as problem:  # a peer that fails is named, and the others go on
            if name == "ours":
                raise
            reasons[name] = reason(problem)
    for name, times in take_turns(runners, options.reps, options.calls).items():
        rows[name]["seconds"] = times
    return rows, reasons


def take_turns(runners, reps, calls):
    """Time every form and step, once a round."""
    times = {name: {step: [] for step in runner.steps} for name, runner in runners.items()}
    for _ in range(reps):
        for step in STEPS:
            for name, runner in runners.items():
                if step in runner.steps:
                    time.sleep(0.01)  # the previous form's threads spin for a while, waiting for work
                    times[name][step].append(runner.seconds(step, calls))
    return times


def _largest_difference(results, expected):
    return max((float(abs(a - b).max()) for a, b in zip(results, expected, strict=False)), default=0.0)


def cells_of(name, row, ours):
    """Return the cells of a form's row; a time is the median (least to most)."""
    seconds = {step: statistics.median(times) for step, times in row["seconds"].items() if times}
    ratios = {step: seconds[step] / statistics.median(ours["seconds"][step]) for step in seconds}
    cells = [name, *(_milliseconds(row["seconds"].get(step)) for step in STEPS), _pair(ratios, 1, 2)]
    cells += [_pair(row["temporary"], MIB), _pair(row["peak"], MIB), _pair(row["compile"], 1)]
    return [*cells, f"{row['error']:.1e}"]


def _milliseconds(seconds):
    if not seconds:
        return "-"
    ms = [1e3 * s for s in seconds]
    return spread(ms, 3 if statistics.median(ms) < 10 else 1)


def _pair(values, unit, digits=1):
    numbers = [values.get(step) for step in STEPS]
    return " / ".join("-" if number is None else f"{number / unit:.{digits}f}" for number in numbers)


def read_options():
    from benchmarks.cases import add_case_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser, ["2x8x2048x64:256", "1x8x8192x64:256"], ["float32"])
    parser.add_argument("--forms", nargs="+", default=FORMS, help="forms to measure; 'ours' is always among them")
    parser.add_argument("--blocks", nargs="*", type=int, default=[], help="block sizes to try ours with")
    parser.add_argument(
        "--reps", type=int, default=9, help="rounds, of which times are medians; 0 measures memory alone"
    )
    parser.add_argument("--calls", type=int, help="calls timed together (default: 1 on a CPU, 20 on a GPU)")
    parser.add_argument("--threads", type=int, help="CPUs to run on (default: all that the process may use)")
    parser.add_argument("--limit-gib", type=float, help="skip forms whose n x n takes more (8 on a CPU, 40 on a GPU)")
    record.add_option(parser)
    return parser.parse_args()


def rows_of(case, rows):
    """Yield the rows of one case as they are recorded; memory in MiB."""
    for name, row in rows.items():
        flat = {"form": name} | case.facts
        flat |= {f"{step}_ms": [1e3 * s for s in times] for step, times in row["seconds"].items() if times}
        for quantity in ("temporary", "peak"):
            sizes = {step: size for step, size in row[quantity].items() if size is not None}
            flat |= {f"{step}_{quantity}_mib": size / MIB for step, size in sizes.items()}
        yield flat


def main():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of a GPU's memory too
    options = read_options()
    threads = pin_threads(options.threads)
    import jax

    from benchmarks.cases import cases_of

    device = jax.default_backend()
    options.calls = options.calls or (20 if device == "gpu" else 1)
    options.limit_gib = options.limit_gib or (40 if device == "gpu" else 8)
    facts = describe_machine(device, threads)
    for dtype in options.dtype if options.reps else []:
        facts |= machine_rates(dtype, device, options.calls)
    print(bullets(facts))
    blocks = [f"ours block {size}" for size in options.blocks]
    names = ["ours", *blocks, *(name for name in options.forms if name != "ours")]
    recorded = []
    for case in cases_of(options):
        rows, why = measure(case, names, options, device)
        recorded += rows_of(case, rows)
        print(f"\n{case.title}; each pair is forward / with gradient, q is {case.array_bytes / MIB:.0f} MiB\n")
        print(table(COLUMNS, (cells_of(name, row, rows["ours"]) for name, row in rows.items())), flush=True)
        for name, problem in why.items():
            print(f"\nSkipped {name}: {problem}")
        if options.record:
            record.save(options.record, facts, recorded)


if __name__ == "__main__":
    main()
