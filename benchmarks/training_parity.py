"""The original and ours, trained side by side: the same losses, and the time a step takes.

    python -m benchmarks.training_parity --data enwik8.gz
    python -m benchmarks.training_parity --steps 0          (only the time)
    python -m benchmarks.training_parity --rounds 0 --float64   (only the losses, and the original's in float64)

Needs torch, local-attention and hyper-connections. First, both start from the original's fresh weights
(`from_torch`) and take the same batches through Adam at 2e-4 behind a clip at norm 0.5: the loss of every step
is printed for both. Then both take turns at a larger model: the loss, the loss with its gradient, and the
whole step, medians, with 1 and with 4 residual streams. Both use the same CPU cores.
Without --data the bytes are the sources of Python's own standard library.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from benchmarks.training import CLIP_NORM, LEARNING_RATE, Setting

GOAL_LOSS, GOAL_SPEED = 1e-5, 2.0
PARTS = ("loss", "gradient", "step")
CURVE = Setting(dim=128, depth=3, window_size=64, tokens=512, batch_size=1, streams=4)
TIMED = [Setting(dim=256, depth=4, window_size=256, tokens=1024, batch_size=4, streams=streams) for streams in (1, 4)]


class Original:
    """The original's model and its training."""

    def __init__(self, setting: Setting):
        import torch
        from local_attention import LocalTransformer

        torch.manual_seed(0)
        self.torch = torch
        self.model = LocalTransformer(**setting.fields)
        self._start()

    def _start(self):
        self.optimiser = self.torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def double(self):
        """Go on in float64, from the weights as they are."""
        self.model.double()
        self._start()
        return self

    def loss(self, tokens: np.ndarray) -> float:
        with self.torch.no_grad():
            return self.model(self.torch.from_numpy(tokens).long(), return_loss=True).item()

    def gradient(self, tokens: np.ndarray) -> float:
        self.optimiser.zero_grad()
        loss = self.model(self.torch.from_numpy(tokens).long(), return_loss=True)
        loss.backward()
        return loss.item()

    def step(self, tokens: np.ndarray) -> float:
        """Train on a batch; the loss before."""
        loss = self.gradient(tokens)
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimiser.step()
        return loss


def adam(rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    """Adam as PyTorch computes it.

    Optax 0.2.8 forms ``1 - b2 ** t`` in float32, where it cancels: its first steps are up to 1e-5 longer or
    shorter, which alone moves the losses apart by more than all rounding in the model.
    """
    import jax
    import jax.numpy as jnp
    import optax

    def init(params):
        mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return jnp.zeros((), jnp.int32), mean, square

    def update(gradient, state, params=None):
        del params
        count, mean, square = state
        count = count + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mean, gradient)
        square = jax.tree.map(lambda s, g: b2 * s + (1 - b2) * g * g, square, gradient)
        c1, c2 = -jnp.expm1(count * math.log(b1)), -jnp.expm1(count * math.log(b2))
        updates = jax.tree.map(lambda m, s: -rate * (m / c1) / (jnp.sqrt(s / c2) + eps), mean, square)
        return updates, (count, mean, square)

    return optax.GradientTransformation(init, update)


class Ours:
    """Our model from the original's weights, and its training."""

    def __init__(self, setting: Setting, state_dict):
        import jax
        import optax

        from flax_local_attention.convert import from_torch, model_from_torch

        model = model_from_torch(state_dict, local_attn_window_size=setting.window_size)
        optimiser = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adam(LEARNING_RATE))

        def loss(params, tokens):
            return model.apply({"params": params}, tokens, return_loss=True)

        def step(params, state, tokens):
            value, gradient = jax.value_and_grad(loss)(params, tokens)
            updates, state = optimiser.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self.jax = jax
        self.params = jax.device_put(from_torch(state_dict, model)["params"])
        self.state = optimiser.init(self.params)
        self._loss = jax.jit(loss)
        self._gradient = jax.jit(jax.value_and_grad(loss))
        self._step = jax.jit(step, donate_argnums=(0, 1))

    def loss(self, tokens: np.ndarray) -> float:
        return float(self._loss(self.params, tokens))

    def gradient(self, tokens: np.ndarray) -> float:
        return float(self.jax.block_until_ready(self._gradient(self.params, tokens))[0])

    def step(self, tokens: np.ndarray) -> float:
        """Train on a batch; the loss before."""
        self.params, self.state, value = self._step(self.params, self.state, tokens)
        self.jax.block_until_ready(self.params)
        return float(value)


def compare_losses(data: np.ndarray, steps: int, float64: bool) -> bool:
    """Print both losses of every step; whether all agree within the goal."""
    theirs = Original(CURVE)
    ours = Ours(CURVE, theirs.model.state_dict())
    exact = Original(CURVE).double() if float64 else None
    print(f"\n{CURVE}; Adam {LEARNING_RATE:g}, clip {CLIP_NORM:g}")
    print(f"step  original      ours  difference{'  original - float64' if exact else ''}")
    differences, errors = [], []
    for step in range(steps):
        tokens = CURVE.batch(data, step)
        a, b = theirs.step(tokens), ours.step(tokens)
        differences.append(abs(b - a))
        line = f"{step:4}  {a:.6f}  {b:.6f}  {b - a:+.1e}"
        if exact:
            errors.append(a - exact.step(tokens))
            line += f"  {errors[-1]:+18.1e}"
        print(line, flush=True)
    print(f"greatest difference {max(differences):.1e} (goal: at most {GOAL_LOSS:g})")
    if errors:
        print(f"the original's own distance from float64 {max(map(abs, errors)):.1e}")
    return max(differences) <= GOAL_LOSS


def compare_times(setting: Setting, data: np.ndarray, rounds: int) -> bool:
    """Print the median seconds of each part of a step; whether ours is as much faster as the goal."""
    theirs = Original(setting)
    sides = {"original": theirs, "ours": Ours(setting, theirs.model.state_dict())}
    tokens = setting.batch(data, 0)
    for side in sides.values():
        for part in PARTS:
            getattr(side, part)(tokens)  # compiles, and warms caches up
    seconds = {(name, part): [] for name in sides for part in PARTS}
    for _ in range(rounds):
        for (name, part), times in seconds.items():
            begin = time.perf_counter()
            getattr(sides[name], part)(tokens)
            times.append(time.perf_counter() - begin)
    print(f"\n{setting}\npart       original      ours   ratio   (medians of {rounds}; least)")
    for part in PARTS:
        (a, least_a), (b, least_b) = (
            (statistics.median(seconds[name, part]), min(seconds[name, part])) for name in sides
        )
        print(f"{part:9} {a:8.3f} s {b:7.3f} s  {a / b:5.2f}x   ({least_a:.3f} s, {least_b:.3f} s)", flush=True)
    return a / b >= GOAL_SPEED


def read_data(path: Path | None) -> tuple[str, np.ndarray]:
    """Name and bytes of the corpus."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import corpus

    read = corpus.read_python_sources() if path is None else corpus.load_corpus(path)
    return read.name, read.data


def use_cores(count: int):
    """Let this process, and so JAX, use the first cores only, and PyTorch as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    import torch

    torch.set_num_threads(count)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw, .gz or .zip file of bytes to train on")
    parser.add_argument("--steps", type=int, default=50, help="steps whose losses are compared; 0: none")
    parser.add_argument("--float64", action="store_true", help="train the original in float64 too")
    parser.add_argument("--rounds", type=int, default=9, help="times that each part of a step is timed; 0: none")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores of both")
    options = parser.parse_args(argv)
    use_cores(options.cores)
    name, data = read_data(options.data)
    packages = ("torch", "local-attention", "hyper-connections", "jax", "flax", "optax")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{p} {metadata.version(p)}" for p in packages))
    print(f"{platform.machine()}, {options.cores} cores; {len(data):,} bytes of {name}")
    reached = []
    if options.steps:
        reached.append(compare_losses(data, options.steps, options.float64))
    if options.rounds:
        reached += [compare_times(setting, data, options.rounds) for setting in TIMED]
    print("\nall goals reached" if all(reached) else "\nNOT ALL GOALS REACHED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
