"""Time PyTorch's forms on a GPU; `benchmarks/gpu.py` runs this file in a process of its own.

    python -m benchmarks.gpu_torch FILE CASES SECONDS FORM ...

CASES is a list of cases in JSON. Appends one line of JSON per case and form to FILE: times of a call, forward and with
the gradients of q, k and v, and the most memory that PyTorch's allocator holds beside the inputs.
"""

import contextlib
import json
import statistics
import sys
import time

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import MIB
from benchmarks.tables import Skipped, reason

ROUNDS, REPEATS = 9, 10


def visibility(case):
    """Return the function that tells FlexAttention which keys a query sees."""
    w = case["w"]
    quarter = -(-case["n"] // 4)
    return {
        "exact": lambda b, h, i, j: (j <= i) & (j >= i - w),
        "plain": lambda b, h, i, j: (j <= i) & (j >= (i // w - 1) * w),
        "both": lambda b, h, i, j: (j <= i + w) & (j >= i - w),
        "segments": lambda b, h, i, j: (j <= i) & (j >= i - w) & (i // quarter == j // quarter),
    }[case["kind"]]


def flex(case):
    """Return FlexAttention, compiled, with the window as a block mask."""
    n = case["n"]
    mask = create_block_mask(visibility(case), None, None, n, n, device="cuda", _compile=True)
    attend = torch.compile(flex_attention, dynamic=False)
    options = {"block_mask": mask, "enable_gqa": case["h"] != case["kv_heads"]}
    return lambda q, k, v: attend(q, k, v, **options)


def original(case):
    """Return the attention of `local-attention` as it is, which has neither grouped heads nor packed documents."""
    if case["h"] != case["kv_heads"] or case["kind"] not in ("exact", "plain", "both"):
        raise Skipped("the original has neither grouped heads nor this kind of window")
    from local_attention import LocalAttention

    return LocalAttention(
        window_size=case["w"],
        causal=case["kind"] != "both",
        look_forward=int(case["kind"] == "both"),
        exact_windowsize=case["kind"] != "plain",
        autopad=True,
    ).cuda()


FORMS = {"flex": flex, "original": original, "original-compiled": lambda case: torch.compile(original(case))}


def graphed(fn, calls=5):
    """Capture calls in one CUDA graph; return what replays it, and how many calls it has."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            fn()
    return graph.replay, calls


def by_events(fn, calls_each=1):
    """Time a call by CUDA events, in milliseconds, once a round."""
    fn()
    torch.cuda.synchronize()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPEATS):
            fn()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / REPEATS / calls_each)
    return times


def by_kernels(fn, calls=5):
    """Add up the device time of a call's kernels, in milliseconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            fn()
        torch.cuda.synchronize()
    return [sum(getattr(event, "self_device_time_total", 0) for event in trace.key_averages()) / 1e3 / calls]


def fastest(fn):
    """Time a call in three ways, and return the times of the way with the least median."""
    ways = [by_events(fn), by_kernels(fn)]
    with contextlib.suppress(RuntimeError):  # what waits for the device cannot be captured in a graph
        ways.append(by_events(*graphed(fn)))
    return min(ways, key=statistics.median)


def peak(fn):
    """Return the most memory held during a call beside what was held before it, in MiB."""
    fn()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def figures(case, form):
    """Measure a form on a case."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    heads = (case["h"], case["kv_heads"], case["kv_heads"], case["h"])
    dtype = getattr(torch, case["dtype"])
    q, k, v, cotangent = (torch.randn(case["b"], h, case["n"], case["d"], device="cuda", dtype=dtype) for h in heads)
    attend = FORMS[form](case)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return attend(*leaves)

    def gradient():
        out = attend(*leaves)
        return out, torch.autograd.grad(out, leaves, cotangent)

    steps = {"forward": forward, "gradient": gradient}
    sizes = {f"{step}_peak_mib": peak(fn) for step, fn in steps.items()}
    return sizes | {f"{step}_ms": fastest(fn) for step, fn in steps.items()}


def main():
    path, cases, limit, *forms = sys.argv[1:]
    end = time.monotonic() + float(limit)
    for form in forms:
        for case in json.loads(cases):
            if time.monotonic() > end:
                return
            try:
                row = figures(case, form)
            except Exception as problem:  # the next case may do
                row = {"problem": reason(problem)}
            with open(path, "a") as file:
                file.write(json.dumps({"case": case, "form": form} | row) + "\n")


if __name__ == "__main__":
    main()
