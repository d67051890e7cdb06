"""Train a byte-level language model with local attention on enwik8.

    python examples/enwik8.py                             a small model on a CPU, the original's on an accelerator
    python examples/enwik8.py --data text.gz --out run    bytes of your own; metrics and checkpoints in run/
    python examples/enwik8.py --out run --resume          go on where run/ stopped, with the same options

A run takes the devices of its host, or of several hosts, each with the same command but for I:

    python examples/enwik8.py --coordinator HOST:PORT --processes N --process I --out run

Every flag of the model and of the optimiser is a field of `Config`; `PRESETS` holds their defaults.
A figure in bits per byte is the mean of `-log2 p(byte | the bytes before it in its sequence)`.
"""

import dataclasses
import functools
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

if not __package__:  # run as a file: the path then has this folder, but not the one above, where `examples` is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.corpus import Corpus, Split, load_corpus, split_corpus
from examples.devices import (
    choose_mesh,
    collect,
    describe_mesh,
    first_process_prints,
    join_processes,
    place_rows,
    place_state,
    prepare_alike,
)
from examples.flags import UsageError, build_parser, choose_config
from examples.runs import Records, keep_compiled, open_run, restore_state
from flax_local_attention import LocalTransformer, generate, parameter_shardings

PROMPT_BYTES = 64
IGNORED = -1  # LocalTransformer's label that is left out of the loss


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is made of. Two runs with equal values, on equal bytes and hardware, are equal."""

    dim: int
    depth: int
    heads: int
    dim_head: int
    window_size: int
    seq_len: int  # predictions per training sequence
    abs_pos_emb: bool  # learned positions beside the rotary ones; they limit every input to seq_len
    residual_streams: int
    dtype: str  # of the computation; parameters and their updates are float32
    batch_size: int  # sequences per microbatch
    accumulate: int  # microbatches per step, averaged
    steps: int
    warmup_steps: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    corpus_bytes: int | None  # use only that many bytes of the corpus; None: all
    log_every: int
    eval_every: int
    sample_bytes: int
    temperature: float
    seed: int = 0


# Values that may differ between the two halves of a resumed run: they change what is shown, not what is learnt.
DISPLAY = {"log_every", "eval_every", "sample_bytes", "temperature"}
ZERO_ALLOWED = {"warmup_steps", "weight_decay", "sample_bytes", "temperature", "seed"}

# On a CPU a small model, short sequences and small batches: they learn most in three minutes of two cores.
# On an accelerator the model and the batch of the original's train.py.
DEFAULTS = {
    "dim": (128, 512),
    "depth": (2, 6),
    "heads": (2, 8),
    "dim_head": (64, 64),
    "window_size": (64, 256),
    "seq_len": (256, 4096),
    "abs_pos_emb": (False, True),
    "residual_streams": (1, 4),
    "dtype": ("float32", "bfloat16"),
    "batch_size": (4, 4),
    "accumulate": (1, 4),
    "steps": (2000, 20_000),
    "warmup_steps": (100, 500),
    "learning_rate": (3e-3, 2e-4),
    "weight_decay": (0.1, 0.1),
    "clip_norm": (1.0, 0.5),
    "corpus_bytes": (4_000_000, None),
    "log_every": (100, 50),
    "eval_every": (500, 1000),
    "sample_bytes": (400, 1024),
    "temperature": (0.7, 0.8),
}
PRESETS = {
    "cpu": Config(**{field: value for field, (value, _) in DEFAULTS.items()}),
    "accelerator": Config(**{field: value for field, (_, value) in DEFAULTS.items()}),
}


class TrainState(struct.PyTreeNode):
    """What a training step takes and gives. `step` counts the steps done; with the seed it also draws the data."""

    step: jax.Array
    params: Any
    opt_state: Any


class Batch(NamedTuple):
    """Tokens and the ones that follow them, both `[..., b, n]`."""

    tokens: jax.Array
    labels: jax.Array


# ---- the model and one step of training


def build_model(config: Config) -> LocalTransformer:
    """Return the language model over bytes."""
    return LocalTransformer(
        num_tokens=256,
        max_seq_len=config.seq_len,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.dim_head,
        causal=True,
        local_attn_window_size=config.window_size,
        use_abs_pos_emb=config.abs_pos_emb,
        num_residual_streams=config.residual_streams,
        ignore_index=IGNORED,
        dtype=jnp.dtype(config.dtype),
    )


def build_optimiser(config: Config) -> optax.GradientTransformation:
    """Return AdamW behind a global-norm clip, with the rate of `learning_rates`; only kernels decay."""

    def is_kernel(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    adamw = optax.adamw(learning_rates(config), b2=0.95, weight_decay=config.weight_decay, mask=is_kernel)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def learning_rates(config: Config) -> optax.Schedule:
    """Return the schedule: up linearly over the warm-up, then down a cosine to a tenth of the peak."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps)
    down = optax.cosine_decay_schedule(peak, max(1, config.steps - warmup), alpha=0.1)
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), down], [warmup])


def build_loss(model: LocalTransformer) -> Callable[[Any, Batch], Any]:
    """Return the function `(params, batch) -> (nats, predictions)`, the sum over the predictions."""

    def loss(params: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch.tokens, labels=batch.labels, method="sum_loss")

    return loss


def initial_state(config: Config) -> TrainState:
    """Draw the parameters and start the optimiser."""
    tokens = jnp.zeros((1, config.seq_len), jnp.int32)
    params = build_model(config).init(jax.random.key(config.seed), tokens)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, build_optimiser(config).init(params))


def build_train_step(loss: Callable, optimiser: optax.GradientTransformation) -> Callable:
    """Return the compiled `(state, microbatches [a, b, n]) -> (state, mean nats)`; the given state is consumed."""

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, microbatches: Batch) -> tuple[TrainState, jax.Array]:
        nats, gradient = accumulate(loss, state.params, microbatches)
        updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), nats

    return train_step


def accumulate(loss: Callable, params: Any, microbatches: Batch) -> tuple[jax.Array, Any]:
    """Return the mean nats of all predictions and its gradient, with one microbatch in memory at a time."""
    differentiate = jax.value_and_grad(loss, has_aux=True)

    def add(sums: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, differentiate(params, batch)), None

    shapes = jax.eval_shape(differentiate, params, jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    ((nats, predictions), gradient), _ = jax.lax.scan(add, zeros, microbatches)
    predictions = predictions.astype(jnp.float32)
    return nats / predictions, jax.tree.map(lambda leaf: leaf / predictions, gradient)


def draw_microbatches(data: np.ndarray, config: Config, step: int, mesh: Mesh) -> Batch:
    """Return the sequences of one step, [a, b, seq_len], from random places.

    The generator is a function of the seed and the step, so a resumed run sees what an uninterrupted one sees.
    """
    generator = np.random.default_rng([config.seed, step])
    starts = generator.integers(0, len(data) - config.seq_len, (config.accumulate, config.batch_size))
    return read_batch(data, starts, config.seq_len, mesh)


def read_batch(data: np.ndarray, starts: np.ndarray, seq_len: int, mesh: Mesh) -> Batch:
    """Return the sequences that begin at `starts`, [..., b], as [..., b, seq_len].

    Past the end of the data stands `IGNORED`.
    """

    def read(offset: int, index: tuple[slice, ...]) -> np.ndarray:
        places = starts[index[:-1]][..., None] + np.arange(seq_len)[index[-1]] + offset
        return np.where(places < len(data), data[np.minimum(places, len(data) - 1)].astype(np.int32), IGNORED)

    return Batch(*(place_rows(functools.partial(read, offset), (*starts.shape, seq_len), mesh) for offset in (0, 1)))


# ---- validation


def bits_per_byte(loss: Callable, params: Any, data: np.ndarray, config: Config, mesh: Mesh) -> float:
    """Return the mean over every byte of `data` but the first, given the bytes before it in its chunk."""
    nats, count = 0.0, 0
    for batch in cut_chunks(data, config.batch_size, config.seq_len, mesh):
        more, predictions = loss(params, batch)
        nats, count = nats + float(more), count + int(predictions)
    return nats / count / math.log(2)


def cut_chunks(data: np.ndarray, batch_size: int, seq_len: int, mesh: Mesh) -> Iterator[Batch]:
    """Yield all of `data` as batches [batch_size, seq_len] of equal shape; each byte but the first is a label once."""
    for first in range(0, len(data) - 1, batch_size * seq_len):
        yield read_batch(data, first + np.arange(batch_size) * seq_len, seq_len, mesh)


# ---- generated text


def sample(
    model: LocalTransformer, params: Any, prompt: np.ndarray, length: int, temperature: float, seed: int
) -> bytes:
    """Return `length` bytes drawn after `prompt`."""
    tokens, _ = generate(
        model,
        {"params": params},
        jnp.asarray(prompt[None], jnp.int32),
        length,
        rng=jax.random.key(seed),
        temperature=temperature,
    )
    return bytes(tokens[0].tolist())


def printable(data: bytes) -> str:
    """Return `data` as text that no terminal takes for commands: control characters are replaced."""
    text = data.decode("utf-8", errors="replace")
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


# ---- the run


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that can start: its options fit one another, its bytes are read, its checkpoint is of this very model."""

    config: Config
    corpus: Corpus
    split: Split
    out: Path | None
    template: TrainState  # the shapes of the state
    restored: TrainState | None  # the state of the checkpoint, if one is resumed, in NumPy
    seconds: float  # that the restored state took
    mesh: Mesh

    def summary(self) -> str:
        """Return what all processes of a run must agree on."""
        return repr((self.config, self.corpus.fingerprint(), self.out is None, self.seconds, self.mesh.shape))


def prepare(options: dict[str, Any]) -> Run:
    """Read what a run needs and check it, before anything is compiled.

    Raises:
      ValueError: a CorpusError, a UsageError, or the library's word on its options.
    """
    data, out, resume, preset = (options.pop(name) for name in ("data", "out", "resume", "preset"))
    parallel = [options.pop(f"{name}_parallel") for name in ("data", "sequence", "tensor")]
    preset = preset or ("cpu" if jax.default_backend() == "cpu" else "accelerator")
    checkpoint = open_run(out, resume, Config)
    config = choose_config(PRESETS[preset], options, checkpoint and checkpoint.config, may_change=DISPLAY)
    check_sample(config)
    mesh = choose_mesh(*parallel, config)
    corpus = load_corpus(data).first(config.corpus_bytes)
    if checkpoint and checkpoint.fingerprint != corpus.fingerprint():
        raise UsageError("--resume needs the bytes that the run began with, got others; give the same --data")
    split = split_corpus(corpus.data, config.seq_len)
    template = jax.eval_shape(functools.partial(initial_state, config))
    restored = restore_state(template, checkpoint.state) if checkpoint else None
    return Run(config, corpus, split, out, template, restored, checkpoint.seconds if checkpoint else 0.0, mesh)


def check_sample(config: Config) -> None:
    """Refuse a sample that is longer than the model's positions."""
    longest = max(config.seq_len - PROMPT_BYTES, 0)
    if config.abs_pos_emb and config.sample_bytes > longest:
        raise UsageError(
            f"--sample-bytes must leave {PROMPT_BYTES} of --seq-len {config.seq_len} with --abs-pos-emb, "
            f"got {config.sample_bytes}; give at most {longest}"
        )


def describe(run: Run) -> None:
    """Print what is trained, on what, where."""
    count = sum(leaf.size for leaf in jax.tree.leaves(run.template.params))
    train, valid, test = (len(part) for part in (run.split.train, run.split.valid, run.split.test))
    parts = f"{train:,} train, {valid:,} validation, {test:,} test"
    print(f"corpus  {run.corpus.name}: {len(run.corpus.data):,} bytes ({parts})")
    print(f"devices {describe_mesh(run.mesh)}")
    print(f"model   {count:,} parameters: {run.config}", flush=True)


def perform(run: Run) -> None:
    """Train from the start, or from the restored state; then show the result and a sample."""
    config, mesh = run.config, run.mesh
    if run.restored:
        state = place_state(run.restored, mesh)
    else:
        draw = functools.partial(initial_state, config)
        state = jax.jit(draw, out_shardings=parameter_shardings(run.template, mesh))()
    records = Records(run.corpus, run.out if jax.process_index() == 0 else None, run.seconds, int(state.step))
    model = build_model(config)
    loss = build_loss(model)
    validate = functools.partial(bits_per_byte, jax.jit(loss), config=config, mesh=mesh)
    if int(state.step) == 0:
        records.add(0, "validation", validate(state.params, run.split.valid))
    train_step = build_train_step(loss, build_optimiser(config))
    train_step = train_step.lower(state, draw_microbatches(run.split.train, config, 0, mesh)).compile()
    print(f"{records.seconds():6.1f} s  compiled", flush=True)
    state = train(state, train_step, validate, run, records)
    summarise(model, state, validate, run, records)


def train(state: TrainState, train_step: Callable, validate: Callable, run: Run, records: Records) -> TrainState:
    """Take the steps that are left, showing, validating and saving on the way."""
    config, split = run.config, run.split
    waiting: list[jax.Array] = []  # losses not fetched yet: fetching waits for the device
    since = time.perf_counter()
    for step in range(int(state.step) + 1, config.steps + 1):
        state, nats = train_step(state, draw_microbatches(split.train, config, step, run.mesh))
        waiting.append(nats)
        last = step == config.steps
        pausing = last or step % config.eval_every == 0
        if pausing or step % config.log_every == 0:
            bits = float(np.mean(jax.device_get(waiting))) / math.log(2)
            rate = len(waiting) * tokens_per_step(config) / (time.perf_counter() - since)
            records.add(step, "train", bits, rate)
            if pausing:
                if not last:  # the summary does it
                    records.add(step, "validation", validate(state.params, split.valid))
                if run.out:
                    records.save(collect(state), config)
            waiting.clear()
            since = time.perf_counter()
    return state


def tokens_per_step(config: Config) -> int:
    """Return how many predictions one step learns from."""
    return config.accumulate * config.batch_size * config.seq_len


def summarise(model: LocalTransformer, state: TrainState, validate: Callable, run: Run, records: Records) -> None:
    """Print the final figures and a text that the model makes up."""
    config, split = run.config, run.split
    steps, seconds = int(state.step), records.seconds()
    print(f"done    {steps:,} steps, {steps * tokens_per_step(config):,} tokens in {seconds:.0f} s")
    records.add(steps, "validation", validate(state.params, split.valid))
    records.add(steps, "test", validate(state.params, split.test))
    if config.sample_bytes:
        prompt, params = split.valid[:PROMPT_BYTES], collect(state.params)
        text = sample(model, params, prompt, config.sample_bytes, config.temperature, config.seed)
        print(f"given   {printable(prompt.tobytes())}\nsample  {printable(text)}")


# ---- the command line


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?"
    options = vars(build_parser(__doc__, PRESETS, ZERO_ALLOWED).parse_args(argv))
    compiled = options.pop("compilation_cache")
    try:
        join_processes(*(options.pop(name) for name in ("distributed", "coordinator", "processes", "process")))
    except UsageError as error:
        complain(str(error))
        return 2
    with first_process_prints():
        return start(options, compiled)


def start(options: dict[str, Any], compiled: Path | None) -> int:
    """Prepare and perform the run of this process and return the exit status."""
    try:
        run = prepare_alike(functools.partial(prepare, options), Run.summary)
    except ValueError as error:
        complain(str(error))
        return 2
    try:
        keep_compiled(compiled)
    except UsageError as error:  # it costs a compilation, not the run
        complain(str(error))
    try:
        describe(run)
        perform(run)
    except KeyboardInterrupt:
        complain("interrupted; with --out, --resume goes on from the last checkpoint")
        return 130
    except jax.errors.JaxRuntimeError:
        if jax.process_count() > 1:
            complain("stopped; if another process has ended, start all again: with --out, --resume goes on")
        raise
    return 0


def complain(message: str) -> None:
    """Print a message where errors go, under the script's name."""
    print(f"enwik8.py: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
