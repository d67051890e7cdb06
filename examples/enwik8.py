"""Train a byte-level language model with local attention on enwik8 and sample from it.

    python examples/enwik8.py                            train: a small model on a CPU, the original's on a GPU or TPU
    python examples/enwik8.py --data text.gz --run DIR   train on your own file, save the run in DIR
    python examples/enwik8.py --resume                   resume the newest run; add --steps N to train longer
    python examples/enwik8.py generate --prompt "The "   continue a prompt with the best model of a run
    python examples/enwik8.py evaluate --split test      score every byte of a split

A run uses the devices of its host. To use several hosts, start the same command on each; only I differs:

    python examples/enwik8.py --coordinator HOST:PORT --processes N --process I --run DIR

The metric is bits per byte: the mean of `-log2 p(byte | preceding bytes)`.
"""

import codecs
import contextlib
import functools
import io
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

if not __package__:  # run as a file: sys.path then holds this folder, but `examples` is in the one above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.charts import MissingPackage, draw, read_curves, save_png
from examples.checkpoints import Checkpoints, newest_first, reason
from examples.compare import compress_all, describe_score
from examples.config import MODEL, PRESETS, TRAINING, Config
from examples.corpus import Corpus, CorpusError, Split, describe_error, enwik8_part, load_corpus, split_corpus
from examples.devices import (
    broadcast_from_first,
    choose_mesh,
    describe_mesh,
    first_process_prints,
    in_first_process,
    join_processes,
    prepare_identically,
    with_shardings,
)
from examples.evaluation import build_evaluation, describe_context
from examples.flags import UsageError, as_usage_error, choose_config, evaluate_parser, generate_parser, train_parser
from examples.loggers import Logger, forgiving, tensorboard_logger, wandb_logger
from examples.runs import RunFiles, Settings, keep_compiled, new_directory, newest_directory
from examples.screen import (
    Screen,
    can_print_braille,
    keep_printable,
    print_error,
    print_field,
    print_line,
    print_nothing,
    this_command,
)
from examples.stopping import INTERRUPTED, Stopping
from examples.trainer import PROMPT_BYTES, DivergedError, Run, Trainer
from examples.training import TrainState, build_model, initial_state
from flax_local_attention import LocalTransformer, stream

PARAMETERS_LIMIT = 2**36  # a model beyond any machine's memory is a mistake
TOKENS_LIMIT = 2**30  # so is a device call on that many tokens

# ---- training: prepare a run, then perform it


def prepare(options: dict[str, Any]) -> Run:
    """Read and check everything a run needs, before anything is compiled.

    Raises:
      ValueError: a CorpusError or a UsageError.
    """
    data, directory, resumed, preset = (options.pop(name) for name in ("data", "run", "resume", "preset"))
    parallel = [options.pop(f"{name}_parallel") for name in ("data", "sequence", "tensor")]
    logging = {name: options.pop(name) for name in ("tensorboard", "wandb", "profile")}
    preset = preset or ("cpu-demo" if jax.default_backend() == "cpu" else "original")
    if directory is None:
        now = broadcast_from_first(int(time.time()))
        directory = newest_directory() if resumed else new_directory(preset, now)
    files = RunFiles(directory)
    saved = files.settings_to_resume(bool(options)) if resumed else files.check_new()
    config = choose_config(PRESETS[preset], options, saved and saved.config)
    check_sample(config)
    check_batch(config)
    mesh = choose_mesh(*parallel, config)
    data = data or (saved and saved.data)
    corpus = load_corpus(data, config.corpus_bytes)
    settings = Settings(config, data, corpus.fingerprint())
    if saved:
        saved.check_corpus(corpus)
    split = split_corpus(corpus.data, config.seq_len)
    template = template_of(config, mesh)
    loggers = open_loggers(logging, files, config)
    return Run(settings, corpus, split, files, resumed, mesh, template, loggers, logging["profile"])


def template_of(config: Config, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of a training state.

    Raises:
      UsageError: the library refuses the configuration, or the model fits no machine.
    """
    with as_usage_error():
        state = jax.eval_shape(functools.partial(initial_state, config))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    if count > PARAMETERS_LIMIT:
        raise UsageError(
            f"a model must have at most {PARAMETERS_LIMIT:,} parameters, got {count:,}; give a smaller --dim, --depth, "
            "--heads, --dim-head, --ff-mult or --memory-tokens"
        )
    return with_shardings(state, mesh)


def begin(run: Run, claims: contextlib.ExitStack) -> None:
    """Create and lock the directory of a run; closing `claims` unlocks it.

    Raises:
      UsageError: the directory cannot be created or written, or another process trains in it.
    """
    claims.enter_context(run.files.claim())
    if not run.resumed:
        run.files.save_settings(run.settings)


def open_loggers(logging: dict[str, Any], files: RunFiles, config: Config) -> list[Logger]:
    """Open the loggers that get metrics besides `metrics.jsonl`; only process 0 has any."""
    if jax.process_index() > 0:
        return []
    loggers = []
    if logging["tensorboard"]:
        loggers.append(forgiving(tensorboard_logger(files.events), "TensorBoard"))
    if logging["wandb"]:
        loggers.append(forgiving(wandb_logger(logging["wandb"], files.directory, config.to_json()), "wandb"))
    return loggers


def check_sample(config: Config) -> None:
    """Refuse a sample that does not fit into a model's learned positions."""
    longest = max(config.seq_len - PROMPT_BYTES, 0)
    if config.abs_pos_emb and config.sample_bytes > longest:
        raise UsageError(
            f"--sample-bytes must leave room for a prompt of {PROMPT_BYTES} bytes in --seq-len {config.seq_len} with "
            f"--abs-pos-emb, got {config.sample_bytes}; give at most {longest}"
        )


def check_batch(config: Config) -> None:
    """Refuse more tokens in one device call than any memory holds."""
    count = config.steps_in_call * config.tokens_per_step
    if count > TOKENS_LIMIT:
        raise UsageError(
            f"one call must have at most {TOKENS_LIMIT:,} tokens, got {count:,}; give a smaller --steps-per-call, "
            "--accumulate, --batch-size or --seq-len"
        )


def describe_run(run: Run) -> None:
    """Print the directory, the corpus, the devices, the model and the hyperparameters of a run."""
    count = sum(leaf.size for leaf in jax.tree.leaves(run.template.params))
    train, valid, test = (len(part) for part in (run.split.train, run.split.valid, run.split.test))
    print_field("run", str(run.files.directory))
    print_field("corpus", f"{run.corpus.name}: {train:,} bytes to train on, {valid:,} to validate, {test:,} to test")
    print_field("devices", describe_mesh(run.mesh))
    print_field("model", f"{count:,} parameters: {run.config.describe(MODEL)}")
    print_field("training", run.config.describe(TRAINING))


def perform(run: Run) -> int:
    """Train to the last step or until asked to stop, print the result, and return the exit status."""
    with Stopping() as stopping, Screen() as screen:
        trainer = Trainer(run, screen)
        if run.resumed:  # restoring has just checked the settings against the checkpoint
            in_first_process(functools.partial(run.files.save_settings, run.settings))
        if trainer.step >= run.config.steps:
            print_line(f"training is already finished at step {trainer.step:,}; give a larger --steps to train longer")
        else:
            trainer.train(stopping)
        trainer.checkpoints.close()
        screen.close()  # removes the progress bar before the next lines
        if trainer.step >= run.config.steps:
            print_field("compared", compare_score(trainer.finish(), "test", run.corpus, run.split, run.config))
            draw_curves(run.files, f"{run.corpus.name}, {run.files.directory.name}")
    is_saved = print_next_steps(run, trainer)
    return stopping.status if is_saved else 1


def print_next_steps(run: Run, trainer: Trainer) -> bool:
    """Print where the run is saved and the commands to continue it; return whether everything was saved."""
    saved, step = trainer.checkpoints.newest_saved, trainer.step
    if saved != step:
        last = "there is no checkpoint" if saved is None else f"the newest checkpoint is of step {saved:,}"
        print_error(f"the state after step {step:,} could not be saved and {last}; free disk space, then --resume")
    print_field("saved", f"{run.files.directory} ({run.files.list_parts()})")
    command, where = this_command(), shlex.quote(str(run.files.directory))
    if saved == step >= run.config.steps:
        print_line(f'generate  {command} generate --run {where} --prompt "The "')
        print_line(f"extend    {command} --resume --run {where} --steps {2 * run.config.steps}")
    else:
        print_line(f"resume    {command} --resume --run {where}")
    return saved == step and not trainer.journal.unwritten


def compare_score(bits: float, name: str, corpus: Corpus, split: Split, config: Config) -> str:
    """Compare the bits per byte of a split with compressors and published models, on one line."""
    data, before = split.with_before(name)
    is_demo = config.learns_like(PRESETS["cpu-demo"])
    return describe_score(bits, name, compress_all(data, before), enwik8_part(corpus.data), is_demo)


def draw_curves(files: RunFiles, title: str) -> None:
    """Plot the curves of a run in the terminal and in `curve.png`; only process 0 does."""
    if jax.process_index() > 0:
        return
    try:
        curves = read_curves(files.metrics)
        print_line(draw(curves, unicode=can_print_braille()))
        save_png(curves, files.curve, title)
    except MissingPackage as error:
        print_line(f"no curve.png: {error}")
    except OSError as error:
        print_error(f"the curves could not be saved ({reason(error)})")


# ---- using a trained model: generate and evaluate


def generate_command(options: dict[str, Any]) -> int:
    """Continue a prompt and print each byte as soon as it is sampled."""
    trained = read_trained(options)
    prompt = np.frombuffer(options["prompt"].encode("utf-8", "surrogateescape"), np.uint8)
    config, length = trained.settings.config, options["length"]
    if not len(prompt):
        raise UsageError("--prompt must have at least one byte, got none; give some text")
    if config.abs_pos_emb and len(prompt) + length > config.seq_len:
        raise UsageError(
            f"--prompt and --length must fit into the model's {config.seq_len:,} positions, got {len(prompt):,} and "
            f"{length:,} bytes; give fewer bytes"
        )
    temperature = config.temperature if options["temperature"] is None else options["temperature"]
    rules = {name: options[name] for name in ("top_k", "top_p", "min_p")}
    with as_usage_error():  # `stream` checks its arguments before the first token
        tokens = stream(
            trained.model,
            {"params": trained.params},
            jnp.asarray(prompt[None], jnp.int32),
            length,
            rng=jax.random.key(options["seed"]),
            temperature=temperature,
            **rules,
        )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(keep_printable(decoder.decode(prompt.tobytes())), end="", flush=True)
    for token in tokens:
        print(keep_printable(decoder.decode(bytes([int(token[0])]))), end="", flush=True)
    print(keep_printable(decoder.decode(b"", final=True)))
    return 0


def evaluate_command(options: dict[str, Any]) -> int:
    """Score a split and compare its bits per byte with compressors and published models."""
    trained = read_trained(options)
    settings, name = trained.settings, options["split"]
    config, data = settings.config, options["data"] or settings.data
    corpus = load_corpus(data, config.corpus_bytes)
    settings.check_corpus(corpus)
    split = split_corpus(corpus.data, config.seq_len)
    score = build_evaluation(trained.model, config, choose_mesh(1, 1, 1, config))(trained.params, split.part(name))
    scored = f"{score.scored:,} bytes of {corpus.name}, {name}"
    print_field("scored", f"{score.bits:.4f} bits/byte of {scored}, {describe_context(config)}")
    print_field("compared", compare_score(score.bits, name, corpus, split, config))
    return 0


class Trained(NamedTuple):
    """The model of a checkpoint, with its parameters and the settings of its run."""

    settings: Settings
    model: LocalTransformer
    params: Any


def read_trained(options: dict[str, Any]) -> Trained:
    """Restore the model of a run's best or newest checkpoint, and print which one on stderr.

    Raises:
      UsageError: there is no run, or it has no intact checkpoint.
    """
    files = RunFiles(options["run"] or newest_directory())
    settings = files.read_settings()
    config = settings.config
    template = template_of(config, choose_mesh(1, 1, 1, config))
    checkpoints = Checkpoints(files.checkpoints, print_error, read_only=True)
    order = checkpoints.best_first if options["checkpoint"] == "best" else newest_first
    found = checkpoints.restore(order, {"params": template.params}, settings.check_checkpoint)
    if found is None:
        raise UsageError(f"--run must have an intact checkpoint, got none in {str(files.checkpoints)!r}; train first")
    bits = found.about["bits"]
    scored = "" if bits is None else f", {bits:.3f} bits/byte in validation"
    print(f"{files.directory}, step {found.step:,}{scored}", file=sys.stderr)
    return Trained(settings, build_model(config), found.state["params"])


# ---- the command line


def train_command(options: dict[str, Any]) -> int:
    """Train, together with the other processes of the run if there are any."""
    join_processes(*(options.pop(name) for name in ("distributed", "coordinator", "processes", "process")))
    with first_process_prints(), contextlib.ExitStack() as claims:
        run = prepare_identically(functools.partial(prepare, options), Run.summary)
        in_first_process(functools.partial(begin, run, claims))  # every process has agreed on the run
        for logger in run.loggers:
            claims.callback(logger.close)
        describe_run(run)
        try:
            return perform(run)
        except DivergedError as error:
            print_error(f"{error}; start a new run with a lower --learning-rate: resuming this one would diverge again")
            return 1
        except KeyboardInterrupt:
            print_error("interrupted; --resume continues from the newest checkpoint")
            return INTERRUPTED
        except jax.errors.JaxRuntimeError:
            if jax.process_count() > 1:
                print_error("stopped; if another process has ended, restart all of them with --resume")
            raise


COMMANDS = {
    "train": (train_parser, train_command),
    "generate": (generate_parser, generate_command),
    "evaluate": (evaluate_parser, evaluate_command),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: `sys.argv`) and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is None:  # the program was started with standard output closed
        print_nothing()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?"
    name = argv.pop(0) if argv and argv[0] in COMMANDS else "train"
    make_parser, command = COMMANDS[name]
    options = vars(make_parser(this_command(), __doc__).parse_args(argv))
    try:
        keep_compiled(options.pop("compilation_cache"))
    except UsageError as error:  # without a cache the run only compiles again
        print_error(str(error))
    try:
        return command(options)
    except (UsageError, CorpusError) as error:
        print_error(str(error))
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print_error(f"out of memory ({describe_error(error)[:100]}); give a smaller model, --batch-size or --seq-len")
        return 1
    except BrokenPipeError:  # the reader of the pipe has exited, such as `head`
        print_nothing()
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
