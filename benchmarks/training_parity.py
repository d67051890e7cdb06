"""The original and ours, trained side by side: whether losses agree, and the time of a step.

    python -m benchmarks.training_parity --data enwik8.gz
    python -m benchmarks.training_parity --steps 0          (only the time)
    python -m benchmarks.training_parity --rounds 0 --float64   (only the losses, also the original's in float64)

Needs torch, local-attention and hyper-connections. First, both models start from the original's fresh weights
(`from_torch`) and train on the same batches with Adam at 2e-4 behind a clip at norm 0.5; the loss of every step is
printed for both. Then both take turns on a larger model: the loss, the loss with its gradient, and the whole step,
medians, with 1 and with 4 residual streams. Both use the same CPU cores. Without --data the bytes are the sources of
Python's standard library.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import numpy as np

from benchmarks.machine import describe_machine, pin_threads
from benchmarks.tables import bullets, header, row, spread
from benchmarks.training import CLIP_NORM, LEARNING_RATE, Setting, Training
from examples.corpus import load_corpus, read_python_sources

GOAL_LOSS, GOAL_SPEED = 1e-5, 2.0
PARTS = ("loss", "gradient", "step")
CURVE = Setting(dim=128, depth=3, window_size=64, tokens=512, batch_size=1, streams=4)
TIMED = [Setting(dim=256, depth=4, window_size=256, tokens=1024, batch_size=4, streams=streams) for streams in (1, 4)]


def adam(rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    """Adam as PyTorch computes it.

    Optax 0.2.8 computes ``1 - b2 ** t`` in float32, where it cancels: its first steps are up to 1e-5 longer or shorter,
    which moves the losses apart by more than all rounding in the model.
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


def begin_both(setting: Setting, batch: np.ndarray):
    """Start the training of the original and of ours, compiled, with the same weights."""
    from benchmarks.torch_training import OriginalTraining, original_model

    theirs = OriginalTraining(original_model(setting.fields), batch)
    ours = training_of(setting, theirs.model.state_dict(), batch)
    ours.compile()
    return theirs, ours


def training_of(setting: Setting, state_dict, batch: np.ndarray) -> Training:
    """Start the training of our model with the original's weights."""
    import jax

    from flax_local_attention.convert import from_torch, model_from_torch

    model = model_from_torch(state_dict, local_attn_window_size=setting.window_size)
    params = jax.device_put(from_torch(state_dict, model)["params"])
    return Training(model, params, batch, adam(LEARNING_RATE))


def train_in_float64(data: np.ndarray, steps: int) -> list[float]:
    """Train the original in float64 from the same weights, and return its losses."""
    from benchmarks.torch_training import OriginalTraining, original_model

    exact = OriginalTraining(original_model(CURVE.fields).double(), CURVE.batch(data, 0))
    return [float(exact.run(exact.place(CURVE.batch(data, step)))) for step in range(steps)]


def compare_losses(data: np.ndarray, steps: int, float64: bool) -> bool:
    """Print both losses of every step; return whether all agree within the goal."""
    theirs, ours = begin_both(CURVE, CURVE.batch(data, 0))
    exact = train_in_float64(data, steps) if float64 else []
    print(f"\n{CURVE}; Adam {LEARNING_RATE:g}, clip {CLIP_NORM:g}\n")
    print(header(["step", "original", "ours", "difference", *(["original - float64"] if exact else [])]))
    differences, errors = [], []
    for step in range(steps):
        tokens = CURVE.batch(data, step)
        a, b = (float(side.run(side.place(tokens))) for side in (theirs, ours))
        differences.append(b - a)
        errors += [a - loss for loss in exact[step : step + 1]]
        print(row([str(step), f"{a:.6f}", f"{b:.6f}", *(f"{x:+.1e}" for x in (b - a, *errors[step:]))]), flush=True)
    greatest = max(map(abs, differences))
    print(f"\ngreatest difference {greatest:.1e} (goal: at most {GOAL_LOSS:g})")
    if errors:
        print(f"the original's own distance from float64 {max(map(abs, errors)):.1e}")
    return greatest <= GOAL_LOSS


def compare_times(setting: Setting, data: np.ndarray, rounds: int) -> bool:
    """Print the median seconds of each part of a step; return whether the speed-up reaches the goal."""
    sides = begin_both(setting, setting.batch(data, 0))
    for side in sides:
        for part in PARTS:
            side.seconds(1, part)  # compiles and warms up
    seconds = {(side, part): [] for side in sides for part in PARTS}
    for _ in range(rounds):
        for (side, part), times in seconds.items():
            times.append(side.seconds(1, part))
    print(f"\n{setting}; seconds\n\n{header(['part', 'original', 'ours', 'ratio'])}")
    ratios = {}
    for part in PARTS:
        both = [seconds[side, part] for side in sides]
        ratios[part] = statistics.median(both[0]) / statistics.median(both[1])
        print(row([part, *(spread(times, 3) for times in both), f"{ratios[part]:.2f}"]), flush=True)
    return ratios["step"] >= GOAL_SPEED


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw, .gz or .zip file to train on")
    parser.add_argument("--steps", type=int, default=50, help="steps whose losses are compared; 0 for none")
    parser.add_argument("--float64", action="store_true", help="also train the original in float64")
    parser.add_argument(
        "--rounds", type=int, default=9, help="rounds in which each part of a step is timed; 0 for none"
    )
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that both use")
    options = parser.parse_args(argv)
    threads = pin_threads(options.cores)
    corpus = load_corpus(options.data) if options.data else read_python_sources()
    print(bullets(describe_machine("cpu", threads) | {"corpus": f"{len(corpus.data):,} bytes of {corpus.name}"}))
    reached = []
    if options.steps:
        reached.append(compare_losses(corpus.data, options.steps, options.float64))
    if options.rounds:
        reached += [compare_times(setting, corpus.data, options.rounds) for setting in TIMED]
    print("\nall goals reached" if all(reached) else "\nNOT ALL GOALS REACHED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
