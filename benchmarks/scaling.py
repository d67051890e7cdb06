"""Weak scaling: how much longer each device takes when more devices share the work, for attention and a training step.

    python -m benchmarks.scaling                              (all parts, on one device and on all)
    python -m benchmarks.scaling --parts attention trace
    python -m benchmarks.scaling --parts largest --tokens 2097152

The sequence, or the batch, grows with the number of devices, so that each device computes as much as one alone. The
share is the time of the slowest device alone over that of all together: 100 % if the exchange is free. Each time is
the median over rounds of calls enqueued together for at least a third of a second, on each device and on all in turn.

"trace" runs the gradient of attention under JAX's profiler and reports how much of the exchange's time each device
spends on other kernels too. "largest" takes training steps of one sequence on all devices, and tries the same on one.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import record
from benchmarks.machine import GIB, describe_machine, seconds_a_call
from benchmarks.tables import bullets, header, reason, row
from flax_local_attention import LocalTransformer, Window, local_attention

AXES = "data", "sequence"
COLUMNS = ["", "one device, fastest to slowest, ms", "all devices, ms", "share"]
# [b, h, n of a device, d] and the keys that a query sees.
SHAPES = [(1, 8, 2**20, 64, 512), (1, 16, 2**18, 128, 1024), (4, 8, 2**17, 64, 256)]
EXCHANGE = ("sendrecv", "collective-permute", "collective_permute")


class Mesh(NamedTuple):
    """Devices, and what is spread over them: the sequence or the batch."""

    devices: tuple[int, ...]
    axis: str

    @property
    def count(self) -> int:
        """Devices of the mesh."""
        return len(self.devices)

    def make(self) -> jax.sharding.Mesh:
        """Make the mesh."""
        sizes = [self.count if name == self.axis else 1 for name in AXES]
        return jax.make_mesh(sizes, AXES, devices=[jax.devices()[number] for number in self.devices])

    def grown(self, b: int, n: int) -> tuple[int, int]:
        """Return the batch and the length that these devices compute together."""
        return (b * self.count, n) if self.axis == "data" else (b, n * self.count)


def attention_run(mesh: Mesh, shape: tuple[int, ...], with_gradient: bool) -> Callable[[], Any]:
    """Make a call of attention, with its gradient or without."""
    b, h, n, d, keys = shape
    b, n = mesh.grown(b, n)
    sharding = NamedSharding(mesh.make(), PartitionSpec("data", None, "sequence"))

    @functools.partial(jax.jit, out_shardings=sharding)
    def draw(seed):
        return jax.random.normal(jax.random.key(seed), (b, h, n, d), jnp.bfloat16)

    def attend(q, k, v):
        return local_attention(q, k, v, window=Window.sliding(keys))

    def gradient(q, k, v, cotangent):
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(cotangent)

    arrays = [draw(seed) for seed in range(4 if with_gradient else 3)]
    run = jax.jit(gradient if with_gradient else attend).lower(*arrays).compile()
    return lambda: run(*arrays)


def training(model: LocalTransformer) -> tuple[Callable, Callable]:
    """Return a function that makes parameters and Adam's state, and one that takes a step on tokens and labels."""
    optimizer = optax.adam(1e-4)

    def start():
        params = model.init(jax.random.key(0), jnp.zeros((1, 128), jnp.int32))
        return params, optimizer.init(params)

    def step(state, tokens, labels):
        def loss(params):
            return model.apply(params, tokens, labels=labels, method="sum_loss").mean

        params, memory = state
        value, gradient = jax.value_and_grad(loss)(params)
        updates, memory = optimizer.update(gradient, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    return start, step


class Step(NamedTuple):
    """A training step of the original's model on random bytes.

    Attributes:
        b, n: Rows per device, and tokens per row.
        streams: Residual streams.
        dim, depth: Width and layers.
        is_large: Whether layers run in a loop and the gradient recomputes them.
    """

    b: int
    n: int
    streams: int = 1
    dim: int = 512
    depth: int = 6
    is_large: bool = False

    def start(self, mesh: Mesh) -> Callable[[], Any]:
        """Make the state and compile; return the function that takes one step and returns its loss."""
        b, n = mesh.grown(self.b, self.n)
        model = LocalTransformer(
            num_tokens=256,
            max_seq_len=n,
            dim=self.dim,
            depth=self.depth,
            heads=self.dim // 64,
            local_attn_window_size=256,
            use_abs_pos_emb=False,
            num_residual_streams=self.streams,
            remat=self.is_large,
            scan_layers=self.is_large,
            dtype=jnp.bfloat16,
        )
        made = mesh.make()
        whole = NamedSharding(made, PartitionSpec())

        start, step = training(model)
        begin = jax.jit(start, out_shardings=whole)
        step = jax.jit(step, donate_argnums=0)
        text = np.random.RandomState(0).randint(0, 256, (b, n + 1), np.int32)
        spread = NamedSharding(made, PartitionSpec(*AXES))
        batch = jax.device_put(text[:, :-1], spread), jax.device_put(text[:, 1:], spread)
        state = begin()
        compiled = step.lower(state, *batch).compile()
        memory = compiled.memory_analysis()
        reserved = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        print(f"* {b} x {n:,} tokens on {mesh.count}: {reserved / GIB:.1f} GiB a device as compiled", flush=True)

        def run():
            nonlocal state
            state, value = compiled(state, *batch)
            return value

        return run


def compare(title: str, make: Callable[[Mesh], Callable[[], Any]], axis: str, options) -> dict:
    """Print and return the times of the same work per device, on each device alone and on all together."""
    every = tuple(range(jax.device_count()))
    runs, calls = {}, {}
    for devices in (*((number,) for number in every), every):
        runs[devices] = make(Mesh(devices, axis))
        jax.block_until_ready(runs[devices]())
        seconds = seconds_a_call(runs[devices], calls=3)
        calls[devices] = max(options.calls, round(options.seconds / seconds))
    times: dict[tuple[int, ...], list[float]] = {devices: [] for devices in runs}
    for _ in range(options.rounds):
        for devices, run in runs.items():
            times[devices].append(1e3 * seconds_a_call(run, calls=calls[devices]))
    *alone, together = (statistics.median(each) for each in times.values())
    share = max(alone) / together
    print(
        row([f"{title}, {axis}", f"{min(alone):.3f} to {max(alone):.3f}", f"{together:.3f}", f"{share:.1%}"]),
        flush=True,
    )
    return {"over": axis, "alone_ms": alone, "together_ms": together, "share": share}


def intervals(path: Path) -> Iterator[tuple[str, str, float, float]]:
    """Yield the kernels of a trace: device, name, begin and end in microseconds."""
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    yield plane.name, event.name, event.start_ns / 1e3, event.end_ns / 1e3


def trace_overlap(options) -> list[dict]:
    """Print and return how much of the exchange other kernels cover, on every device."""
    run = attention_run(Mesh(tuple(range(jax.device_count())), "sequence"), SHAPES[0], True)
    for _ in range(3):
        jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(options.calls):
                out = run()
            jax.block_until_ready(out)
        kernels = [each for path in Path(folder).rglob("*.xplane.pb") for each in intervals(path)]
    rows = []
    for device in sorted({device for device, *_ in kernels}):
        own = [each for each in kernels if each[0] == device]
        moves = [each for each in own if any(word in each[1].lower() for word in EXCHANGE)]
        others = [each for each in own if each not in moves]
        total = sum(end - begin for *_, begin, end in moves)
        covered = sum(_covered(begin, end, others) for *_, begin, end in moves)
        alone = _covered(-np.inf, np.inf, moves) - covered
        rows.append(
            {"work": "exchange", "device": device, "count": len(moves), "total_us": total, "covered_us": covered}
        )
        print(
            f"* {device}: {len(moves)} exchanges of {total / max(len(moves), 1):.1f} us, "
            f"{covered / max(total, 1e-9):.0%} "
            f"of it beside other kernels; alone {alone:.1f} us of {_covered(-np.inf, np.inf, own):.0f}",
            flush=True,
        )
    return rows


def _covered(begin, end, kernels):
    """Return how much of an interval some kernels cover together."""
    total, reached = 0.0, begin
    for *_, first, last in sorted(kernels, key=lambda each: each[2]):
        first, last = max(first, reached, begin), min(last, end)
        if last > first:
            total, reached = total + last - first, last
    return total


def train_largest(options) -> list[dict]:
    """Take steps of one long sequence on all devices, and try the same on one."""
    count, rows = jax.device_count(), []
    for devices in (count, 1):
        mesh = Mesh(tuple(range(devices)), "sequence")
        step = Step(1, options.tokens // devices, dim=1024, depth=options.depth, is_large=True)
        try:
            run = step.start(mesh)
            losses = [float(run()) for _ in range(3)]
            seconds = statistics.median(seconds_a_call(run) for _ in range(3))
            figures = {"losses": losses, "seconds": seconds}
            print(
                f"* {options.tokens:,} tokens on {devices}: losses {losses}, {seconds:.3f} s a step",
                flush=True,
            )
        except Exception as problem:  # not fitting is a result, too
            figures = {"problem": reason(problem)}
            print(f"* {options.tokens:,} tokens on {devices}: {reason(problem)[:300]}", flush=True)
        rows.append({"work": "largest", "tokens": options.tokens, "devices": devices} | figures)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["attention", "step", "trace", "largest"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=5, help="least number of calls timed together")
    parser.add_argument("--seconds", type=float, default=0.3, help="least time of calls that are enqueued together")
    parser.add_argument("--divide", type=int, default=1, help="divide all lengths by this, to try the script")
    parser.add_argument("--tokens", type=int, default=2**21, help="tokens of the largest sequence")
    parser.add_argument("--depth", type=int, default=12, help="layers of the largest model")
    record.add_option(parser)
    options = parser.parse_args()
    facts = describe_machine(jax.default_backend())
    print(bullets(facts))
    rows = trace_overlap(options) if "trace" in options.parts else []
    if {"attention", "step"} & set(options.parts):
        print("\n" + header(COLUMNS), flush=True)
    if "attention" in options.parts:
        for b, h, n, d, keys in SHAPES:
            for kind in ("forward", "gradient"):
                shape = (b, h, n // options.divide, d, keys)
                make = functools.partial(attention_run, shape=shape, with_gradient=kind == "gradient")
                case = {"work": "attention", "shape": shape[:-1], "keys": keys, "step": kind}
                title = f"attention {list(shape[:-1])}, {keys} keys, {kind}"
                rows += [case | compare(title, make, axis, options) for axis in ("sequence", "data")]
    if "step" in options.parts:
        for streams in (1, 4):
            step = Step(1, 2**18 // (options.divide * streams), streams)
            case = {"work": "training step", "tokens": step.b * step.n, "streams": streams}
            rows += [case | compare(f"step of {step}", step.start, axis, options) for axis in ("sequence", "data")]
    if "largest" in options.parts:
        rows += train_largest(options)
    if options.record:
        record.save(options.record, facts, rows)


if __name__ == "__main__":
    main()
