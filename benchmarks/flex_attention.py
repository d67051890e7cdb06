"""Times FlexAttention with local windows, compiled; `benchmarks/gpu.py` runs it in a process of its own.

Writes one line of JSON a case to the file named first: milliseconds forward and with the gradients of q, k and v.
"""

import json
import statistics
import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import ProfilerActivity, profile


def rule_of(case):
    """Who sees whom, as FlexAttention wants it."""
    w = case["w"]
    quarter = -(-case["n"] // 4)
    return {
        "exact": lambda b, h, i, j: (j <= i) & (j >= i - w),
        "plain": lambda b, h, i, j: (j <= i) & (j >= (i // w - 1) * w),
        "both": lambda b, h, i, j: (j <= i + w) & (j >= i - w),
        "segments": lambda b, h, i, j: (j <= i) & (j >= i - w) & (i // quarter == j // quarter),
    }[case["kind"]]


def graphed(fn, calls=5):
    """The same calls as one CUDA graph."""
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


def by_events(fn, calls_each, repeats=10):
    """Median milliseconds of one call."""
    fn()
    torch.cuda.synchronize()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            fn()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats / calls_each)
    return statistics.median(times)


def of_kernels(fn):
    """Milliseconds that the device's kernels take by themselves."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(5):
            fn()
        torch.cuda.synchronize()
    return sum(getattr(event, "self_device_time_total", 0) for event in record.key_averages()) / 5e3


def least(fn):
    """The least of three ways to time it."""
    fn()
    torch.cuda.synchronize()
    return min(by_events(fn, 1), by_events(*graphed(fn)), of_kernels(fn))


def times_of(case):
    torch._dynamo.reset()
    b, n, d = case["b"], case["n"], case["d"]
    heads = (case["h"], case["kv_heads"], case["kv_heads"], case["h"])
    dtype = getattr(torch, case["dtype"])
    q, k, v, cotangent = (torch.randn(b, h, n, d, device="cuda", dtype=dtype) for h in heads)
    mask = create_block_mask(rule_of(case), None, None, n, n, device="cuda", _compile=True)
    flex = torch.compile(flex_attention, dynamic=False)
    options = {"block_mask": mask, "enable_gqa": case["h"] != case["kv_heads"]}
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return flex(q, k, v, **options)

    def gradient():
        return torch.autograd.grad(flex(*leaves, **options), leaves, cotangent)

    return [least(forward), least(gradient)]


def main():
    path, cases = sys.argv[1], json.loads(sys.argv[2])
    for case in cases:
        try:
            row = {"case": case, "milliseconds": times_of(case)}
        except Exception as problem:  # the next case may do
            row = {"case": case, "problem": repr(problem)[:200]}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
