"""The original's trainer beside the example's: bits per byte after equal bytes, and the time of a step.

    python -m benchmarks.example --data enwik8.gz
    python -m benchmarks.example --steps 0                     (only the time)
    python -m benchmarks.example --rounds 0 --skip-recipe      (only the bits, without the second side)

Needs torch, local-attention and hyper-connections. All sides have the sizes of the example's `cpu-demo` preset, train
on the same batches in the same order, compute in float32 and use the same CPU cores:

* the original's trainer: its model under Adam at 2e-4 behind a clip at norm 0.5, as in its train.py;
* the original's model with the example's recipe: AdamW with the preset's rates, weight decay and clip, to separate the
  effect of the recipe from that of the library;
* the example, as the preset trains it.

The original's model always learns absolute positions beside rotary ones, and has no other additional parameters: its
matrices have the shapes of the example's. A step has one microbatch, so accumulation of gradients does not matter.

Each byte of the validation split but the first is scored once. The original reads sequences that overlap by half, and
the second half of each is scored. The example is scored in the same way, and in its own: reading the split from end to
end. Then all sides take turns at ten more steps, and the time of a step is the median over the rounds. Without --data
the bytes are the sources of Python's standard library.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import Mesh

from benchmarks.machine import describe_machine, pin_threads, seconds_a_call
from benchmarks.tables import bullets, header, row, spread, table
from benchmarks.torch_training import OriginalTraining, original_model
from benchmarks.training import CLIP_NORM, LEARNING_RATE, NUM_TOKENS
from examples.config import MODEL, PRESETS, TRAINING, Config
from examples.corpus import Split, load_corpus, read_python_sources, split_corpus
from examples.devices import choose_mesh
from examples.evaluation import build_evaluation, score_overlapping
from examples.training import (
    IGNORED,
    Batch,
    build_loss,
    build_model,
    build_optimiser,
    build_train_steps,
    draw_steps,
    initial_state,
    learning_rates,
)
from flax_local_attention import parameter_shardings

PRESET = "cpu-demo"
PARTS = 4  # of the training, each followed by a validation
PAUSE_SECONDS = 0.05  # the previous side's threads spin for a while, waiting for work


class Original(OriginalTraining):
    """The original's model, trained as in its train.py."""

    name = "the original's trainer"

    def __init__(self, config: Config, mesh: Mesh, steps: Batch):
        super().__init__(original_model(original_fields(config)), sequences(steps)[0])
        score = functools.partial(score_overlapping, self.sum_loss, None, rows=config.batch_size)
        self.scores = {self.name: functools.partial(score, config=config, mesh=mesh)}

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(weight.numel() for weight in self.model.parameters())

    def take(self, steps: Batch, count: int) -> None:
        """Train on the first `count` of the given steps."""
        for tokens in sequences(steps)[:count]:
            self.run(self.place(tokens))

    @torch.no_grad()
    def sum_loss(self, _: None, batch: Batch) -> tuple[float, int]:
        """Return the nats of a batch's labels and the number of labels that count, as `examples.evaluation` expects."""
        tokens, labels = (self.place(np.array(part)) for part in batch)
        logits = self.model(tokens.clamp(min=0))  # past the end of the data, tokens are IGNORED too
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return float(nats), int((labels != IGNORED).sum())


class OriginalWithRecipe(Original):
    """The original's model, trained by the example's recipe with AdamW."""

    name = "the original's model, the example's recipe"

    def __init__(self, config: Config, mesh: Mesh, steps: Batch):
        super().__init__(config, mesh, steps)
        matrices = {module.weight for module in self.model.modules() if isinstance(module, torch.nn.Linear)}
        others = [weight for weight in self.model.parameters() if weight not in matrices]
        groups = [{"params": list(matrices), "weight_decay": config.weight_decay}, {"params": others}]
        rates = np.asarray(learning_rates(config)(np.arange(config.steps + 1)))
        self.clip_norm = config.clip_norm
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rates[min(step, config.steps)])

    def run(self, batch: torch.Tensor) -> Any:
        """Take a step and advance the learning rate; return the loss before it."""
        loss = super().run(batch)
        self.rates.step()
        return loss


class Example:
    """The example's model and training, unchanged."""

    name = "the example"

    def __init__(self, config: Config, mesh: Mesh, _: Batch):
        start = functools.partial(initial_state, config)
        self.state = jax.jit(start, out_shardings=parameter_shardings(jax.eval_shape(start), mesh))()
        model = build_model(config)
        self.train_steps = build_train_steps(build_loss(model), build_optimiser(config))
        loss, evaluate = jax.jit(build_loss(model)), build_evaluation(model, config, mesh)
        self.scores = {
            self.name: lambda data: score_overlapping(
                loss, self.state.params, data, rows=config.batch_size, config=config, mesh=mesh
            ),
            f"{self.name}, end to end": lambda data: evaluate(self.state.params, data),
        }

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def take(self, steps: Batch, count: int) -> None:
        """Train on the first `count` of the given steps."""
        self.state, _ = jax.block_until_ready(self.train_steps(self.state, steps, np.int32(count)))


def original_fields(config: Config) -> dict[str, Any]:
    """Return the arguments that give the original's model the sizes of the example's."""
    return {
        "num_tokens": NUM_TOKENS,
        "max_seq_len": config.seq_len,
        "dim": config.dim,
        "depth": config.depth,
        "heads": config.heads,
        "dim_head": config.dim_head,
        "local_attn_window_size": max(window or config.seq_len for window in config.windows),
        "ff_mult": config.ff_mult,
        "num_residual_streams": config.residual_streams,
        "qk_rmsnorm": config.qk_norm,
        "gate_values_per_head": config.gates,
    }


def sequences(steps: Batch) -> np.ndarray:
    """Return the tokens of steps and the last label of each row, `[k, b, n + 1]`; a step's microbatches are joined."""
    tokens, labels = map(np.asarray, steps)
    joined = np.concatenate([tokens, labels[..., -1:]], axis=-1)
    return joined.reshape(len(joined), -1, joined.shape[-1])


def compare_bits(sides: list[Any], split: Split, config: Config, mesh: Mesh, steps: int) -> None:
    """Train all sides, and print their bits per byte after each part of the training."""
    names = [name for side in sides for name in side.scores]
    print(f"\nbits per byte of {len(split.valid) - 1:,} bytes of validation\n")
    print(header(["step", "bytes seen", *names]), flush=True)
    done = 0
    for until in sorted({steps * part // PARTS for part in range(1, PARTS + 1)} - {0}):
        for side in sides:
            train(side, split.train, config, mesh, done, until)
        done = until
        bits = [score(split.valid).bits for side in sides for score in side.scores.values()]
        print(row([f"{done:,}", f"{done * config.tokens_per_step:,}", *(f"{x:.4f}" for x in bits)]), flush=True)


def train(side: Any, data: np.ndarray, config: Config, mesh: Mesh, done: int, until: int) -> None:
    """Train on the steps after `done` up to `until`; the example counts steps from 1."""
    for first in range(done + 1, until + 1, config.steps_per_call):
        count = min(config.steps_per_call, until + 1 - first)
        side.take(draw_steps(data, config, first, count, mesh), count)


def compare_times(sides: list[Any], steps: Batch, rounds: int) -> None:
    """Print each side's median milliseconds a step, and the ratio to the example's."""
    count = len(steps.tokens)
    seconds: dict[Any, list[float]] = {side: [] for side in sides}
    for side in sides:
        side.take(steps, count)  # compiles and warms up
    for _ in range(rounds):
        for side, times in seconds.items():
            time.sleep(PAUSE_SECONDS)
            times.append(seconds_a_call(side.take, (steps, count)) / count)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    rows = [
        [side.name, spread([1e3 * s for s in times], 2), f"{medians[side] / medians[sides[-1]]:.2f}"]
        for side, times in seconds.items()
    ]
    print(f"\n{rounds} rounds of {count} steps\n\n{table(['', 'ms a step', 'times the example'], rows)}", flush=True)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    preset = PRESETS[PRESET]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw, .gz or .zip file to train on")
    parser.add_argument("--steps", type=int, default=preset.steps, help="training steps; 0 for none")
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default=preset.optimizer, help="the example's optimizer"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which ten steps are timed; 0 for none")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that all sides use")
    parser.add_argument("--skip-recipe", action="store_true", help="skip the original with the example's recipe")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    threads = pin_threads(options.cores)
    preset = PRESETS[PRESET]
    config = dataclasses.replace(preset, steps=options.steps or preset.steps, optimizer=options.optimizer)
    corpus = load_corpus(options.data) if options.data else read_python_sources()
    corpus = corpus.first(config.corpus_bytes)
    split, mesh = split_corpus(corpus.data, config.seq_len), choose_mesh(1, 1, 1, config)
    corpus_text = f"{corpus.name}: {len(split.train):,} bytes to train on, {len(split.valid):,} to validate"
    facts = describe_machine("cpu", threads) | {"corpus": corpus_text}
    steps = draw_steps(split.train, config, 1, config.steps_per_call, mesh)
    kinds = [Original, *([] if options.skip_recipe else [OriginalWithRecipe]), Example]
    sides = [kind(config, mesh, steps) for kind in kinds]
    facts |= {"model": config.describe(MODEL), "the example's training": config.describe(TRAINING)}
    facts |= {"the original's training": f"Adam {LEARNING_RATE:g}, clip {CLIP_NORM:g}"}
    facts |= {f"parameters of {side.name}": f"{side.parameters:,}" for side in sides}
    print(bullets(facts))
    if options.steps:
        compare_bits(sides, split, config, mesh, options.steps)
    if options.rounds:
        compare_times(sides, steps, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
