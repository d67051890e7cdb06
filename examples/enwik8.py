"""Train a byte-level language model with local attention on enwik8, and see what it writes.

    python examples/enwik8.py                                a small model on a CPU, the original's on an accelerator
    python examples/enwik8.py --data text.gz --run DIR       bytes of your own, kept where you say
    python examples/enwik8.py --resume                       go on with the newest run; --steps N trains longer
    python examples/enwik8.py generate --prompt "The "       write on from a prompt, with the best model of a run
    python examples/enwik8.py evaluate --split test          score each byte of a split

A run takes the devices of its host, or of several hosts, each with the same command but for I:

    python examples/enwik8.py --coordinator HOST:PORT --processes N --process I --run DIR

A figure in bits per byte is the mean of `-log2 p(byte | the bytes before it)`.
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

if not __package__:  # run as a file: the path then has this folder, but not the one above, where `examples` is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.charts import MissingPackage, draw, read_curves, save_png
from examples.checkpoints import Checkpoints, newest_first, reason
from examples.compare import compress_all, place
from examples.config import MODEL, PRESETS, TRAINING, Config
from examples.corpus import Corpus, CorpusError, Split, describe, enwik8_part, load_corpus, split_corpus
from examples.devices import (
    choose_mesh,
    describe_mesh,
    first_of_processes,
    first_process_prints,
    in_first_process,
    join_processes,
    placed,
    prepare_alike,
)
from examples.evaluation import build_evaluation, describe_context
from examples.flags import UsageError, as_usage, choose_config, evaluate_parser, generate_parser, train_parser
from examples.loggers import Logger, forgiving, tensorboard_logger, wandb_logger
from examples.runs import RunFiles, Settings, keep_compiled, new_directory, newest_directory
from examples.screen import Screen, keep_printable, print_nothing, say, show, speaks_unicode, tell, this_command
from examples.stopping import INTERRUPTED, Stopping
from examples.trainer import PROMPT_BYTES, DivergedError, Run, Trainer
from examples.training import TrainState, build_model, initial_state
from flax_local_attention import LocalTransformer, stream

PARAMETERS_LIMIT, TOKENS_LIMIT = 2**36, 2**30  # of a model, and of one call; more than any machine holds is a mistake

# ---- a run that can start


def prepare(options: dict[str, Any]) -> Run:
    """Read what a run needs and check it, before anything is compiled.

    Raises:
      ValueError: a CorpusError or a UsageError.
    """
    data, directory, resumed, preset = (options.pop(name) for name in ("data", "run", "resume", "preset"))
    parallel = [options.pop(f"{name}_parallel") for name in ("data", "sequence", "tensor")]
    watching = {name: options.pop(name) for name in ("tensorboard", "wandb", "profile")}
    preset = preset or ("cpu-demo" if jax.default_backend() == "cpu" else "original")
    if directory is None:
        now = first_of_processes(int(time.time()))
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
    loggers = open_loggers(watching, files, config)
    return Run(settings, corpus, split, files, resumed, mesh, template, loggers, watching["profile"])


def template_of(config: Config, mesh: Mesh) -> TrainState:
    """Return the shapes of a state, with their places on the mesh.

    Raises:
      UsageError: the library refuses such a model, or no machine can hold it.
    """
    with as_usage():
        state = jax.eval_shape(functools.partial(initial_state, config))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    if count > PARAMETERS_LIMIT:
        raise UsageError(
            f"a model must have at most {PARAMETERS_LIMIT:,} parameters, got {count:,}; give a smaller --dim, --depth, "
            "--heads, --dim-head, --ff-mult or --memory-tokens"
        )
    return placed(state, mesh)


def begin(run: Run, claims: contextlib.ExitStack) -> None:
    """Make and claim the directory of a run, until `claims` are given up.

    Raises:
      UsageError: it cannot be made or written, or another process trains in it.
    """
    claims.enter_context(run.files.claim())
    if not run.resumed:
        run.files.keep_settings(run.settings)


def open_loggers(watching: dict[str, Any], files: RunFiles, config: Config) -> list[Logger]:
    """Return where figures go beside the run's own files, in process 0."""
    if jax.process_index() > 0:
        return []
    loggers = []
    if watching["tensorboard"]:
        loggers.append(forgiving(tensorboard_logger(files.events), "TensorBoard"))
    if watching["wandb"]:
        loggers.append(forgiving(wandb_logger(watching["wandb"], files.directory, config.to_json()), "wandb"))
    return loggers


def check_sample(config: Config) -> None:
    """Refuse a sample that is longer than the model's positions."""
    longest = max(config.seq_len - PROMPT_BYTES, 0)
    if config.abs_pos_emb and config.sample_bytes > longest:
        raise UsageError(
            f"--sample-bytes must leave {PROMPT_BYTES} of --seq-len {config.seq_len} with --abs-pos-emb, "
            f"got {config.sample_bytes}; give at most {longest}"
        )


def check_batch(config: Config) -> None:
    """Refuse more tokens in one call of the device than memory holds."""
    count = config.steps_in_call * config.tokens_per_step
    if count > TOKENS_LIMIT:
        raise UsageError(
            f"one call must have at most {TOKENS_LIMIT:,} tokens, got {count:,}; give a smaller --steps-per-call, "
            "--accumulate, --batch-size or --seq-len"
        )


def describe_run(run: Run) -> None:
    """Print what is trained, on what, and where it is kept."""
    count = sum(leaf.size for leaf in jax.tree.leaves(run.template.params))
    train, valid, test = (len(part) for part in (run.split.train, run.split.valid, run.split.test))
    show("run", str(run.files.directory))
    show("corpus", f"{run.corpus.name}: {train:,} bytes to train on, {valid:,} to validate, {test:,} to test")
    show("devices", describe_mesh(run.mesh))
    show("model", f"{count:,} parameters: {run.config.describe(MODEL)}")
    show("training", run.config.describe(TRAINING))


def perform(run: Run) -> int:
    """Train from the start, or go on; show the result, or how to go on. Return the exit status."""
    with Stopping() as stopping, Screen() as screen:
        trainer = Trainer(run, screen)
        if run.resumed:  # only now are they known to be those of its checkpoints
            in_first_process(functools.partial(run.files.keep_settings, run.settings))
        if trainer.step >= run.config.steps:
            say(f"finished at step {trainer.step:,} already; --resume --steps N with a larger N trains on")
        else:
            trainer.train(stopping)
        trainer.checkpoints.close()
        screen.close()  # no bar moves below what follows
        if trainer.step >= run.config.steps:
            show("beside", place_figure(trainer.finish(), "test", run.corpus, run.split, run.config))
            draw_curves(run.files, f"{run.corpus.name}, {run.files.directory.name}")
    is_kept = show_what_is_kept(run, trainer)
    return stopping.status if is_kept else 1


def show_what_is_kept(run: Run, trainer: Trainer) -> bool:
    """Print where the run is and what can be done with it; return whether all of it is kept."""
    kept, step = trainer.checkpoints.kept, trainer.step
    if kept != step:
        last = "there is no checkpoint" if kept is None else f"the newest checkpoint is of step {kept:,}"
        tell(f"the state after step {step:,} could not be kept and {last}; make room and go on with --resume")
    show("kept", f"{run.files.directory} ({run.files.list_parts()})")
    command, where = this_command(), shlex.quote(str(run.files.directory))
    if kept == step >= run.config.steps:
        say(f'generate  {command} generate --run {where} --prompt "The "')
        say(f"train on  {command} --resume --run {where} --steps {2 * run.config.steps}")
    else:
        say(f"go on     {command} --resume --run {where}")
    return kept == step and not trainer.journal.waiting


def place_figure(bits: float, name: str, corpus: Corpus, split: Split, config: Config) -> str:
    """Return a line that puts a split's figure in its place: what compressors and other models need."""
    data, before = split.with_before(name)
    is_demo = config.learns_like(PRESETS["cpu-demo"])
    return place(bits, name, compress_all(data, before), enwik8_part(corpus.data), is_demo)


def draw_curves(files: RunFiles, title: str) -> None:
    """Print the curves of a run, and draw them into a file; of several processes the first does."""
    if jax.process_index() > 0:
        return
    try:
        curves = read_curves(files.metrics)
        say(draw(curves, unicode=speaks_unicode()))
        save_png(curves, files.curve, title)
    except MissingPackage as error:
        say(f"no picture of the curves: {error}")
    except OSError as error:
        tell(f"the curves could not be drawn ({reason(error)})")


# ---- generated text


def generate_command(options: dict[str, Any]) -> int:
    """Write on from a prompt, each byte as soon as it is drawn."""
    trained = read_trained(options)
    prompt = np.frombuffer(options["prompt"].encode("utf-8", "surrogateescape"), np.uint8)
    config, length = trained.settings.config, options["length"]
    if not len(prompt):
        raise UsageError("--prompt must have a byte to write on from, got none; give some text")
    if config.abs_pos_emb and len(prompt) + length > config.seq_len:
        raise UsageError(
            f"--prompt and --length must fit into the model's {config.seq_len:,} positions, got {len(prompt):,} and "
            f"{length:,} bytes; give less"
        )
    temperature = config.temperature if options["temperature"] is None else options["temperature"]
    rules = {name: options[name] for name in ("top_k", "top_p", "min_p")}
    with as_usage():  # a stream checks its options at once
        drawn = stream(
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
    for token in drawn:
        print(keep_printable(decoder.decode(bytes([int(token[0])]))), end="", flush=True)
    print(keep_printable(decoder.decode(b"", final=True)))
    return 0


def evaluate_command(options: dict[str, Any]) -> int:
    """Score a split, and put the figure in its place."""
    trained = read_trained(options)
    settings, name = trained.settings, options["split"]
    config, data = settings.config, options["data"] or settings.data
    corpus = load_corpus(data, config.corpus_bytes)
    settings.check_corpus(corpus)
    split = split_corpus(corpus.data, config.seq_len)
    score = build_evaluation(trained.model, config, choose_mesh(1, 1, 1, config))(trained.params, split.part(name))
    scored = f"{score.scored:,} bytes of {corpus.name}, {name}"
    show("scored", f"{score.bits:.4f} bits/byte of {scored}, {describe_context(config)}")
    show("beside", place_figure(score.bits, name, corpus, split, config))
    return 0


class Trained(NamedTuple):
    """A model out of a run."""

    settings: Settings
    model: LocalTransformer
    params: Any


def read_trained(options: dict[str, Any]) -> Trained:
    """Read the model of a run's best or newest checkpoint, and say which it is.

    Raises:
      UsageError: there is no run, or no whole checkpoint in it.
    """
    files = RunFiles(options["run"] or newest_directory())
    settings = files.read_settings()
    config = settings.config
    template = template_of(config, choose_mesh(1, 1, 1, config))
    checkpoints = Checkpoints(files.checkpoints, tell, read_only=True)
    order = checkpoints.by_bits if options["checkpoint"] == "best" else newest_first
    found = checkpoints.restore(order, {"params": template.params}, settings.check_checkpoint)
    if found is None:
        raise UsageError(f"--run must have a whole checkpoint, got none in {str(files.checkpoints)!r}; train first")
    bits = found.about["bits"]
    scored = "" if bits is None else f", {bits:.3f} bits/byte in validation"
    print(f"{files.directory}, step {found.step:,}{scored}", file=sys.stderr)
    return Trained(settings, build_model(config), found.state["params"])


# ---- the command line


def train_command(options: dict[str, Any]) -> int:
    """Train: with other processes, if there are any."""
    join_processes(*(options.pop(name) for name in ("distributed", "coordinator", "processes", "process")))
    with first_process_prints(), contextlib.ExitStack() as claims:
        run = prepare_alike(functools.partial(prepare, options), Run.summary)
        in_first_process(functools.partial(begin, run, claims))  # now that all agree on what is to begin
        for logger in run.loggers:
            claims.callback(logger.close)
        describe_run(run)
        try:
            return perform(run)
        except DivergedError as error:
            tell(f"{error}; start a new run with a lower --learning-rate, as this one would fail again")
            return 1
        except KeyboardInterrupt:
            tell("interrupted; --resume goes on from the last checkpoint")
            return INTERRUPTED
        except jax.errors.JaxRuntimeError:
            if jax.process_count() > 1:
                tell("stopped; if another process has ended, start all again with --resume")
            raise


COMMANDS = {
    "train": (train_parser, train_command),
    "generate": (generate_parser, generate_command),
    "evaluate": (evaluate_parser, evaluate_command),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is None:  # closed by whoever started the program
        print_nothing()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?"
    name = argv.pop(0) if argv and argv[0] in COMMANDS else "train"
    make_parser, command = COMMANDS[name]
    options = vars(make_parser(this_command(), __doc__).parse_args(argv))
    try:
        keep_compiled(options.pop("compilation_cache"))
    except UsageError as error:  # it costs a compilation, not the run
        tell(str(error))
    try:
        return command(options)
    except (UsageError, CorpusError) as error:
        tell(str(error))
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        tell(f"the memory does not suffice ({describe(error)[:100]}); give a smaller model, --batch-size or --seq-len")
        return 1
    except BrokenPipeError:  # the reader of generated text has left
        print_nothing()
        return 1
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
