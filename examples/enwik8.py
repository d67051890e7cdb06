"""Train a byte-level language model with local attention on enwik8.

    python examples/enwik8.py                             a small model on a CPU, the original's on an accelerator
    python examples/enwik8.py --data text.gz --out run    bytes of your own; metrics and checkpoints in run/
    python examples/enwik8.py --out run --resume          go on where run/ stopped, with the same options

Every flag of the model and of the optimiser is a field of `Config`; `PRESETS` holds their defaults.
A figure in bits per byte is the mean of `-log2 p(byte | the bytes before it in its sequence)`.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from corpus import Corpus, Split, cache_dir, load_corpus, split_corpus
from flax import serialization, struct

from flax_local_attention import LocalTransformer, generate

CHECKPOINT = "checkpoint.msgpack"
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

PRESETS = {
    # A small model, short sequences and small batches learn most in three minutes of two cores.
    "cpu": Config(
        dim=128,
        depth=2,
        heads=2,
        dim_head=64,
        window_size=64,
        seq_len=256,
        abs_pos_emb=False,
        residual_streams=1,
        dtype="float32",
        batch_size=4,
        accumulate=1,
        steps=2000,
        warmup_steps=100,
        learning_rate=3e-3,
        weight_decay=0.1,
        clip_norm=1.0,
        corpus_bytes=4_000_000,
        log_every=100,
        eval_every=500,
        sample_bytes=400,
        temperature=0.7,
    ),
    # The model and the batch of the original's train.py.
    "accelerator": Config(
        dim=512,
        depth=6,
        heads=8,
        dim_head=64,
        window_size=256,
        seq_len=4096,
        abs_pos_emb=True,
        residual_streams=4,
        dtype="bfloat16",
        batch_size=4,
        accumulate=4,
        steps=20_000,
        warmup_steps=500,
        learning_rate=2e-4,
        weight_decay=0.1,
        clip_norm=0.5,
        corpus_bytes=None,
        log_every=50,
        eval_every=1000,
        sample_bytes=1024,
        temperature=0.8,
    ),
}


class UsageError(ValueError):
    """The options cannot be served; the message says why and what to do."""


class TrainState(struct.PyTreeNode):
    """What a training step takes and gives. `step` counts the steps done; with the seed it also draws the data."""

    step: jax.Array
    params: Any
    opt_state: Any


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


def build_loss(model: LocalTransformer) -> Callable[[Any, jax.Array], Any]:
    """Return the function `(params, tokens [b, n + 1]) -> mean nats` over the n next-byte predictions."""

    def loss(params: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": params}, tokens, return_loss=True)

    return loss


def initial_state(config: Config) -> TrainState:
    """Draw the parameters and start the optimiser."""
    tokens = jnp.zeros((1, config.seq_len), jnp.int32)
    params = build_model(config).init(jax.random.key(config.seed), tokens)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, build_optimiser(config).init(params))


def build_train_step(loss: Callable, optimiser: optax.GradientTransformation) -> Callable:
    """Return the compiled `(state, microbatches [a, b, n + 1]) -> (state, mean nats)`; the given state is consumed."""

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, microbatches: jax.Array) -> tuple[TrainState, jax.Array]:
        nats, gradient = accumulate(jax.value_and_grad(loss), state.params, microbatches)
        updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), nats

    return train_step


def accumulate(function: Callable, params: Any, microbatches: jax.Array) -> Any:
    """Return the mean of `function(params, microbatch)`, one microbatch in memory at a time.

    The microbatches are equally long, so a mean of their means is the mean over all of them.
    """

    def add(total: Any, tokens: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(params, tokens)), None

    shapes = jax.eval_shape(function, params, microbatches[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda leaf: leaf / len(microbatches), total)


def draw_microbatches(data: np.ndarray, config: Config, step: int) -> np.ndarray:
    """Return the sequences of one step, [a, b, seq_len + 1], from random places.

    The generator is a function of the seed and the step, so a resumed run sees what an uninterrupted one sees.
    """
    generator = np.random.default_rng([config.seed, step])
    starts = generator.integers(0, len(data) - config.seq_len, (config.accumulate, config.batch_size, 1))
    return data[starts + np.arange(config.seq_len + 1)].astype(np.int32)


# ---- validation


def bits_per_byte(loss: Callable, params: Any, data: np.ndarray, config: Config) -> float:
    """Return the mean over every byte of `data` but the first, given the bytes before it in its chunk."""
    nats, count = 0.0, 0
    for tokens in cut_chunks(data, config.batch_size, config.seq_len):
        predictions = int((tokens[:, 1:] != IGNORED).sum())
        nats += float(loss(params, tokens)) * predictions
        count += predictions
    return nats / count / math.log(2)


def cut_chunks(data: np.ndarray, batch_size: int, seq_len: int) -> Iterator[np.ndarray]:
    """Yield all of `data` as batches [batch_size, seq_len + 1] of equal shape.

    A chunk begins with the last byte of the one before, so that each byte but the first is predicted once.
    Past the end of the data stands `IGNORED`.
    """
    rows = -(-(len(data) - 1) // seq_len)
    for first in range(0, rows, batch_size):
        places = (first + np.arange(batch_size))[:, None] * seq_len + np.arange(seq_len + 1)
        tokens = data[np.minimum(places, len(data) - 1)].astype(np.int32)
        yield np.where(places < len(data), tokens, IGNORED)


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


# ---- what a run leaves behind


class Records:
    """The figures of a run: printed, and with a directory also kept as `metrics.jsonl`."""

    def __init__(self, corpus: Corpus, directory: Path | None, seconds: float, done: int):
        """Go on after `done` steps that took `seconds`, dropping the lines of later ones."""
        self.corpus = corpus.name
        self.path = directory / "metrics.jsonl" if directory else None
        self.began = time.perf_counter() - seconds
        if self.path:
            kept = read_lines(self.path, done)
            write_atomically(self.path, "".join(kept).encode())

    def seconds(self) -> float:
        """Return the time since the run began, without the pause before a resumption."""
        return time.perf_counter() - self.began

    def add(self, step: int, split: str, bits: float, rate: float | None = None) -> None:
        """Print one figure and keep it."""
        seconds = self.seconds()
        pace = f"  {rate:,.0f} tokens/s" if rate is not None else ""
        figure = f"{split:10}  {bits:.3f} bits per byte of {self.corpus}"
        print(f"{seconds:6.1f} s  step {step:6,}  {figure}{pace}", flush=True)
        if self.path:
            entry = {"step": step, "seconds": round(seconds, 2), "split": split, "bits_per_byte": bits}
            entry |= {"tokens_per_second": rate, "corpus": self.corpus}
            with open(self.path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")


def read_lines(path: Path, last_step: int) -> list[str]:
    """Return the whole lines of a metrics file that are not later than `last_step`."""
    if not path.exists() or last_step == 0:
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= last_step]


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`; whoever reads it sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as sink:
        sink.write(content)
        sink.flush()
        os.fsync(sink.fileno())
    os.replace(partial, path)


def save_checkpoint(path: Path, state: TrainState, config: Config, fingerprint: str, seconds: float) -> None:
    """Write all that a resumed run needs; the generator of the data is the seed (in `config`) and the step."""
    content = {
        "state": serialization.to_state_dict(state),
        "config": json.dumps(dataclasses.asdict(config)),
        "fingerprint": fingerprint,
        "seconds": seconds,
    }
    write_atomically(path, serialization.msgpack_serialize(jax.device_get(content)))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote, `config` as a `Config` and `state` as nested dictionaries.

    Raises:
      UsageError: there is no such file, or it is not whole.
    """
    try:
        content = serialization.msgpack_restore(path.read_bytes())
        saved = {name: content[name] for name in ("state", "fingerprint", "seconds")}
        return saved | {"config": Config(**json.loads(str(content["config"])))}
    except FileNotFoundError as error:
        raise UsageError(f"--resume needs a checkpoint, got no {str(path)!r}; start without --resume") from error
    except Exception as error:  # whatever msgpack, json and Config make of damaged bytes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"--resume needs a whole checkpoint, got {str(path)!r} ({reason}); start a new run") from error


def restore_state(template: TrainState, saved: dict[str, Any]) -> TrainState:
    """Return the saved state in the form of `template`, whose shapes suffice.

    Raises:
      UsageError: it is another model's.
    """
    try:
        restored = serialization.from_state_dict(template, saved)
        chex.assert_trees_all_equal_shapes_and_dtypes(restored, template)
    except (AssertionError, ValueError) as error:
        raise UsageError("--resume needs the state of this very model, got another's; start a new run") from error
    return jax.tree.map(jnp.array, restored)


# ---- the run


def train(
    state: TrainState, train_step: Callable, validate: Callable, split: Split, config: Config,
    records: Records, save: Callable[[TrainState], None],
) -> TrainState:  # fmt: skip
    """Take the steps that are left, showing, validating and saving on the way."""
    waiting: list[jax.Array] = []  # losses not fetched yet: fetching waits for the device
    since = time.perf_counter()
    for step in range(int(state.step) + 1, config.steps + 1):
        state, nats = train_step(state, draw_microbatches(split.train, config, step))
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
                save(state)
            waiting.clear()
            since = time.perf_counter()
    return state


def tokens_per_step(config: Config) -> int:
    """Return how many predictions one step learns from."""
    return config.accumulate * config.batch_size * config.seq_len


def run(
    config: Config, corpus: Corpus, split: Split, out: Path | None, restored: TrainState | None, seconds: float
) -> None:
    """Train from the start, or from `restored`, reached after `seconds`; then show the result and a sample."""
    state: TrainState = restored or jax.jit(functools.partial(initial_state, config))()
    records = Records(corpus, out, seconds, int(state.step))
    model = build_model(config)
    loss = build_loss(model)
    compiled_loss = jax.jit(loss)

    def validate(params: Any, data: np.ndarray) -> float:
        return bits_per_byte(compiled_loss, params, data, config)

    def save(state: TrainState) -> None:
        if out:
            save_checkpoint(out / CHECKPOINT, state, config, corpus.fingerprint(), records.seconds())

    if int(state.step) == 0:
        records.add(0, "validation", validate(state.params, split.valid))
    train_step = build_train_step(loss, build_optimiser(config))
    train_step = train_step.lower(state, draw_microbatches(split.train, config, 0)).compile()
    print(f"{records.seconds():6.1f} s  compiled", flush=True)
    state = train(state, train_step, validate, split, config, records, save)
    summarise(model, state, validate, split, config, records)


def describe_run(config: Config, corpus: Corpus, split: Split, template: TrainState) -> None:
    """Print what is trained, on what, where."""
    count = sum(leaf.size for leaf in jax.tree.leaves(template.params))
    parts = f"{len(split.train):,} train, {len(split.valid):,} validation, {len(split.test):,} test"
    print(f"corpus  {corpus.name}: {len(corpus.data):,} bytes ({parts})")
    print(f"model   {count:,} parameters on {jax.default_backend()}: {config}", flush=True)


def summarise(
    model: LocalTransformer, state: TrainState, validate: Callable, split: Split, config: Config, records: Records
) -> None:
    """Print the final figures and a text that the model makes up."""
    steps, seconds = int(state.step), records.seconds()
    print(f"done    {steps:,} steps, {steps * tokens_per_step(config):,} tokens in {seconds:.0f} s")
    records.add(steps, "validation", validate(state.params, split.valid))
    records.add(steps, "test", validate(state.params, split.test))
    if config.sample_bytes:
        prompt = split.valid[:PROMPT_BYTES]
        text = sample(model, state.params, prompt, config.sample_bytes, config.temperature, config.seed)
        print(f"given   {printable(prompt.tobytes())}\nsample  {printable(text)}")


# ---- the command line


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?"
    options = vars(build_parser().parse_args(argv))
    data, out, resume, compiled = (options.pop(name) for name in ("data", "out", "resume", "compilation_cache"))
    preset = options.pop("preset") or ("cpu" if jax.default_backend() == "cpu" else "accelerator")
    try:
        checkpoint = open_run(out, resume)
        config = choose_config(PRESETS[preset], options, checkpoint)
        corpus = load_corpus(data).first(config.corpus_bytes)
        if checkpoint and checkpoint["fingerprint"] != corpus.fingerprint():
            raise UsageError("--resume needs the bytes that the run began with, got others; give the same --data")
        split = split_corpus(corpus.data, config.seq_len)
        template = jax.eval_shape(functools.partial(initial_state, config))
        restored = restore_state(template, checkpoint["state"]) if checkpoint else None
    except ValueError as error:  # a CorpusError, a UsageError, or the library's word on its options
        print(f"enwik8.py: {error}", file=sys.stderr)
        return 2
    keep_compiled(compiled)
    try:
        describe_run(config, corpus, split, template)
        run(config, corpus, split, out, restored, checkpoint["seconds"] if checkpoint else 0.0)
    except KeyboardInterrupt:
        print("enwik8.py: interrupted; with --out, --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def keep_compiled(directory: Path | None) -> None:
    """Let JAX keep compiled programs in `directory` (None: JAX's own choice, else the user's cache) for later runs.

    A directory that cannot be written costs a compilation, not the run.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    directory = directory or Path(jax.config.jax_compilation_cache_dir or cache_dir() / "compiled")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        print(
            f"enwik8.py: compiled programs are not kept, got {error}; name another --compilation-cache", file=sys.stderr
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # below, a file saves nothing
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def open_run(out: Path | None, resume: bool) -> dict[str, Any] | None:
    """Make the output directory and return the checkpoint that is to be resumed, if any.

    Raises:
      UsageError: there is nothing to resume, or a checkpoint would be overwritten.
    """
    if out is None:
        if resume:
            raise UsageError("--resume needs the directory of a run, got none; give --out DIR")
        return None
    path = out / CHECKPOINT
    if resume:
        return read_checkpoint(path)
    if path.exists():
        raise UsageError(f"--out must name a new directory, got {str(out)!r} with a checkpoint; add --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out must name a directory that can be made, got {error}; name another") from error
    return None


def choose_config(preset: Config, given: dict[str, Any], checkpoint: dict[str, Any] | None) -> Config:
    """Return the preset, or the checkpoint's configuration, with the given options in place.

    Raises:
      UsageError: the options do not fit one another or the checkpoint.
    """
    base = checkpoint["config"] if checkpoint else preset
    config = dataclasses.replace(base, **given)
    changed = [name for name in given if name not in DISPLAY and getattr(config, name) != getattr(base, name)]
    if checkpoint and changed:
        flags = ", ".join(flag(name) for name in changed)
        raise UsageError(f"--resume keeps the run's options, got other values for {flags}; leave them out")
    longest = config.seq_len - PROMPT_BYTES
    if config.abs_pos_emb and config.sample_bytes > max(longest, 0):
        raise UsageError(
            f"--sample-bytes must leave {PROMPT_BYTES} of --seq-len {config.seq_len} with --abs-pos-emb, "
            f"got {config.sample_bytes}; give at most {max(longest, 0)}"
        )
    return config


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: a flag for every field of `Config`, absent from the result unless given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw, .gz or .zip file to train on (default: enwik8)")
    parser.add_argument("--out", type=Path, help="directory for metrics.jsonl and checkpoint.msgpack")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--compilation-cache",
        type=Path,
        metavar="DIR",
        help="directory of compiled programs, kept for later runs (default: JAX_COMPILATION_CACHE_DIR, else the user's "
        "cache; JAX_ENABLE_COMPILATION_CACHE=false keeps none)",
    )
    parser.add_argument("--preset", choices=PRESETS, help="defaults of what follows (default: by JAX's backend)")
    for field in dataclasses.fields(Config):
        defaults = ", ".join(f"{name}: {getattr(preset, field.name)}" for name, preset in PRESETS.items())
        reading: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if field.type is bool
            else {"type": value_reader(field.type, field.name)}
        )
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=f"({defaults})", **reading)
    return parser


def flag(name: str) -> str:
    """Return the flag of a field of `Config`."""
    return "--" + name.replace("_", "-")


def value_reader(kind: Any, name: str) -> Callable[[str], Any]:
    """Return the function that reads a field of type `kind` and refuses what the field cannot be."""
    if kind is str:
        return dtype_name
    number = float if kind is float else int
    zero_allowed = name in ZERO_ALLOWED

    def read(text: str) -> int | float | None:
        if text == "all" and kind == int | None:
            return None
        value = number(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            raise argparse.ArgumentTypeError(f"must be {'at least' if zero_allowed else 'greater than'} 0, got {text}")
        return value

    read.__name__ = number.__name__  # argparse names it when the text is no number at all
    return read


def dtype_name(text: str) -> str:
    """Return `text` if it names a dtype that the model computes in."""
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"must be float32 or bfloat16, got {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
