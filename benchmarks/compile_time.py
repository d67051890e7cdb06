"""How long a model takes to trace and to compile, and then to run a step.

    python -m benchmarks.compile_time
    PYTHONPATH=<another checkout> python -P benchmarks/compile_time.py    (another version)

Measures the loss of a `LocalTransformer` with its gradient, on 4 x 1024 tokens, with 1 and with 4 residual streams.
Each round starts with empty caches; the table has medians. This file imports no other file of the benchmarks, because
the other checkout may lack it.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np

from flax_local_attention import LocalTransformer

STAGES = ("trace", "lower", "compile", "all", "step")


def measure(depth: int, streams: int, rounds: int) -> tuple[dict[str, float], float]:
    """Return the seconds of each stage, medians over `rounds`, and the temporary memory in MiB."""
    model = LocalTransformer(
        num_tokens=256,
        max_seq_len=1024,
        dim=256,
        depth=depth,
        local_attn_window_size=256,
        num_residual_streams=streams,
    )
    tokens = np.random.default_rng(0).integers(0, 256, (4, 1025)).astype(np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :64])

    def loss(variables, tokens):
        return model.apply(variables, tokens, return_loss=True)

    jax.jit(jax.value_and_grad(loss)).lower(variables, tokens[:, :65])  # so that JAX's own imports are not timed
    seconds = {stage: [] for stage in STAGES}
    compiled = None
    for _ in range(rounds):
        jax.clear_caches()
        times = [time.perf_counter()]
        traced = jax.jit(jax.value_and_grad(loss)).trace(variables, tokens)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        compiled = lowered.compile()
        times.append(time.perf_counter())
        for stage, first, last in zip(STAGES, times, times[1:], strict=False):
            seconds[stage].append(last - first)
        seconds["all"].append(times[-1] - times[0])
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(compiled(variables, tokens))
        seconds["step"].append(time.perf_counter() - start)
    medians = {stage: statistics.median(times) for stage, times in seconds.items()}
    return medians, compiled.memory_analysis().temp_size_in_bytes / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12, help="layers")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4], help="residual streams")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{jax.default_backend()}, jax {jax.__version__}, {os.cpu_count()} cores, depth {options.depth}, seconds\n")
    print(f"| residual streams | {' | '.join(STAGES)} | temporary MiB |")
    print("| --- |" + " --- |" * (len(STAGES) + 1))
    for streams in options.streams:
        medians, memory = measure(options.depth, streams, options.rounds)
        print(f"| {streams} | {' | '.join(f'{medians[s]:.2f}' for s in STAGES)} | {memory:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
