"""The training loop: steps on the devices, log lines, validations, samples and checkpoints."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from examples.checkpoints import Checkpoints, newest_first
from examples.config import Config
from examples.corpus import Corpus, Split
from examples.devices import any_process, collect, describe_mesh
from examples.evaluation import build_evaluation, describe_context
from examples.flags import UsageError
from examples.loggers import Logger
from examples.runs import Journal, RunFiles, Settings
from examples.screen import (
    Progress,
    Screen,
    format_duration,
    peak_flops,
    print_error,
    print_field,
    print_line,
    printable,
    quote,
)
from examples.stopping import Stopping
from examples.training import (
    TrainState,
    build_loss,
    build_model,
    build_optimiser,
    build_train_steps,
    draw_steps,
    flops_per_token,
    initial_state,
    to_bits,
)
from flax_local_attention import LocalTransformer, generate, parameter_shardings

PROMPT_BYTES = 64  # bytes of the validation split before a sample
TRACED_CALL = 2  # number of the device call that --profile records; the first warms up


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready to start: its options are checked and its corpus is read.

    Attributes:
      settings: hyperparameters and corpus, as saved in settings.json.
      corpus, split: the bytes and their division.
      files: directory of the run.
      resumed: whether to continue from a checkpoint.
      mesh: mesh of the devices.
      template: shapes, dtypes and shardings of the state.
      loggers: destinations of metrics besides `metrics.jsonl`.
      profile: whether to record a profile.
    """

    settings: Settings
    corpus: Corpus
    split: Split
    files: RunFiles
    resumed: bool
    mesh: Mesh
    template: TrainState
    loggers: list[Logger]
    profile: bool

    @property
    def config(self) -> Config:
        """The hyperparameters."""
        return self.settings.config

    def summary(self) -> str:
        """Return a string that is equal in all processes if they prepared the same run."""
        return repr((self.config, self.settings.fingerprint, self.files.directory, self.resumed, self.mesh.shape))


class DivergedError(Exception):
    """The loss is NaN or infinite."""


class Meter:
    """The mean loss and the speed since the last log line.

    Attributes:
      losses: loss of each step, in nats.
    """

    def __init__(self, losses: Sequence[float] = ()):
        """Start with the losses of a stopped run since its last log line; their time is unknown."""
        self.losses = list(losses)
        self._untimed = len(self.losses)
        self.restart()

    def restart(self) -> None:
        """Restart the clock."""
        self._since = time.perf_counter()

    def bits(self) -> float:
        """Return the mean loss in bits."""
        return float(to_bits(np.mean(self.losses, dtype=np.float64)))

    def steps_per_second(self) -> float:
        """Return the speed of the steps whose time is known."""
        return (len(self.losses) - self._untimed) / (time.perf_counter() - self._since)


class Trainer:
    """A run in progress.

    Attributes:
      run: the run as prepared.
      state: training state, on the devices.
      step: number of steps done, equal to `state.step` but known without waiting for the devices.
      bits: bits per byte of the validation at this step; None without one.
      best: fewest bits per byte of all validations.
    """

    def __init__(self, run: Run, screen: Screen):
        self.run, self.screen, self.config = run, screen, run.config
        self.checkpoints = Checkpoints(run.files.checkpoints, print_error)
        self.state, seconds, losses = self._restore() if run.resumed else self._start_fresh()
        self.step, self.bits, self.best = int(self.state.step), None, self.checkpoints.best_bits()
        self.began = time.perf_counter() - seconds
        is_first = jax.process_index() == 0
        self.journal = Journal(run.files.metrics if is_first else None, self.step)
        self.model = build_model(self.config)
        self.evaluate = build_evaluation(self.model, self.config, run.mesh)
        self.flops = flops_per_token(self.config, self.state.params)
        self._meter = Meter(losses)

    def _start_fresh(self) -> tuple[TrainState, float, list[float]]:
        """Return an initial state, 0 seconds of training and no losses."""
        shardings = parameter_shardings(self.run.template, self.run.mesh)
        return jax.jit(functools.partial(initial_state, self.config), out_shardings=shardings)(), 0.0, []

    def _restore(self) -> tuple[TrainState, float, list[float]]:
        """Return the newest intact state, its seconds of training and the losses since its last log line.

        A run that was stopped before its first checkpoint starts fresh.

        Raises:
          UsageError: there are metrics but no intact checkpoint, or it belongs to another run or is past `--steps`.
        """
        if not self.checkpoints.steps() and not self.run.files.metrics.exists():
            print_line("resuming  from the start: there is no checkpoint yet")
            return self._start_fresh()
        found = self.checkpoints.restore(newest_first, self.run.template, self.run.settings.check_checkpoint)
        if found is None:
            raise UsageError(
                f"--resume needs an intact checkpoint, got none in {str(self.checkpoints.directory)!r}; start a new run"
            )
        if found.step > self.config.steps:
            raise UsageError(
                f"--steps must be at least {found.step:,}, the steps already done, got {self.config.steps:,}; give more"
            )
        seconds, devices = found.about["seconds"], found.about.get("devices")
        if devices not in (None, describe_mesh(self.run.mesh)):  # None: the checkpoint does not record them
            print_line(f"devices   were {devices}; results may differ by rounding")
        print_line(
            f"resuming  from step {found.step:,} of {self.config.steps:,}, after {format_duration(seconds)} of training"
        )
        return found.state, seconds, found.about["losses"]

    def seconds(self) -> float:
        """Return the seconds of training, without the pauses between a stop and a resume."""
        return time.perf_counter() - self.began

    def train(self, stopping: Stopping) -> None:
        """Take the remaining steps, or fewer if asked to stop, then save a checkpoint.

        While the devices run one call, the host prepares the next batches and reads the losses of the previous call.
        """
        data = self.run.split.train
        config = dataclasses.replace(self.config, steps_per_call=self.config.steps_in_call)
        self.save()  # the run can be resumed from the start
        train_steps = build_train_steps(build_loss(self.model), build_optimiser(config))
        batches = draw_steps(data, config, self.step + 1, 0, self.run.mesh)
        train_steps = train_steps.lower(self.state, batches, np.int32(0)).compile()
        print_line(f"compiled  after {format_duration(self.seconds())}")
        self.screen.start(Progress(self.step, config.steps))
        self._meter.restart()
        pending = None
        for call in itertools.count(1):
            if self.step == config.steps or self._asked_to_stop(stopping):
                break
            count = self._steps_in_call()
            batches = draw_steps(data, config, self.step + 1, count, self.run.mesh)
            with self._tracing(is_due=call == TRACED_CALL):
                self.state, nats = train_steps(self.state, batches, np.int32(count))
            self.step, self.bits = self.step + count, None
            self._log(pending)
            pending = self.step, count, nats
            if self._is_due(self.step, config.log_every, config.eval_every):
                self._log(pending)  # waits for the devices, so the log line's time is exact
                pending = None
            if self._is_due(self.step, config.eval_every):
                self.validate()
        self._log(pending)
        self.save()
        if self.step < config.steps:
            print_line(f"stopped   after step {self.step:,} of {config.steps:,}")

    @contextlib.contextmanager
    def _tracing(self, is_due: bool) -> Iterator[None]:
        """Profile the calls enqueued in this context until they finish, if `is_due` and `--profile` was given."""
        if not (self.run.profile and is_due):
            yield
            return
        with jax.profiler.trace(str(self.run.files.profile)):
            yield
            jax.block_until_ready(self.state)
        print_line(f"profile   {self.run.files.profile}; open it with tensorboard --logdir DIR or ui.perfetto.dev")

    def _steps_in_call(self) -> int:
        """Return how many steps the next call takes: up to the next log line, validation or the end."""
        config = self.config
        until = [every - self.step % every for every in (config.log_every, config.eval_every)]
        return min(config.steps_per_call, config.steps - self.step, *until)

    def _is_due(self, step: int, *every: int) -> bool:
        """Return whether a step is the last one or a multiple of a number in `every`."""
        return step == self.config.steps or any(step % count == 0 for count in every)

    def _asked_to_stop(self, stopping: Stopping) -> bool:
        """Return whether any process has been asked to stop; several processes compare at each log line only."""
        if jax.process_count() > 1 and self.step % self.config.log_every:
            return False
        return any_process(stopping.signal is not None)

    def _log(self, call: tuple[int, int, jax.Array] | None) -> None:
        """Read the losses of a call, (last step, number of steps, nats), and print and record metrics if due.

        Raises:
          DivergedError: a loss is not finite.
        """
        if call is None:
            return
        step, count, nats = call
        losses = np.asarray(jax.device_get(nats))[:count]
        if not np.isfinite(losses).all():
            raise DivergedError(
                f"the loss is not finite after step {step - count + int(np.isfinite(losses).argmin()):,}"
            )
        self._meter.losses += losses.tolist()
        progress = self._progress(step)
        self.screen.move(progress)
        if self._is_due(step, self.config.log_every, self.config.eval_every):
            self.screen.log(progress)
            self._record(
                step, "train", self._meter.bits(), tokens_per_second=progress.rate, share_of_peak=progress.share
            )
            self._meter = Meter()

    def _progress(self, step: int) -> Progress:
        """Return the progress and the metrics of training after a step."""
        config, speed = self.config, self._meter.steps_per_second()
        rate, peak = speed * config.tokens_per_step, peak_flops(config.dtype)
        share = None if peak is None else rate * self.flops / (peak * self.run.mesh.size)
        return Progress(step, config.steps, (config.steps - step) / speed, self._meter.bits(), rate, share)

    def _record(self, step: int, split: str, bits: float, **more: Any) -> None:
        """Write an entry to `metrics.jsonl` and to the other loggers."""
        entry = {"step": step, "seconds": round(self.seconds(), 2), "split": split, "bits_per_byte": bits}
        entry |= {"corpus": self.run.corpus.name} | more
        self.journal.add(entry)
        for logger in self.run.loggers:
            logger.log(entry)

    def validate(self) -> None:
        """Score the validation split, save a checkpoint and print a sample.

        Raises:
          DivergedError: the score is not finite; nothing is saved.
        """
        self.bits = self.evaluate(self.state.params, self.run.split.valid).bits
        if not math.isfinite(self.bits):
            raise DivergedError(f"the validation loss is not finite after step {self.step:,}")
        word = "the best so far" if self.bits <= self.best else f"the best was {self.best:.3f}"
        self.best = min(self.bits, self.best)
        print_line(
            f"step {self.step:,}  validation {self.bits:.3f} bits/byte, {word}  {format_duration(self.seconds())}"
        )
        self._record(self.step, "validation", self.bits)
        self.save()
        self.show_sample()
        self._meter.restart()

    def show_sample(self) -> None:
        """Continue the first bytes of the validation split, and print and save the text."""
        config = self.config
        if not config.sample_bytes:
            return
        prompt = self.run.split.valid[:PROMPT_BYTES]
        params = collect(self.state.params)
        drawn = sample(self.model, params, prompt, config.sample_bytes, config.temperature, config.seed)
        text = printable(prompt.tobytes() + drawn)
        print_line(quote(text))
        if jax.process_index() == 0:
            self.run.files.save_sample(self.step, text)

    def save(self) -> None:
        """Start writing a checkpoint in the background, unless this step has one."""
        about = {"config": self.config.to_json(), "fingerprint": self.run.settings.fingerprint}
        about |= {"seconds": self.seconds(), "place": {"seed": self.config.seed, "next_step": self.step + 1}}
        about |= {"losses": self._meter.losses, "devices": describe_mesh(self.run.mesh)}
        self.checkpoints.save(self.step, self.state, about, self.bits)

    def finish(self) -> float:
        """Score the test split, print the result, and return its bits per byte."""
        steps = self.step
        tokens, took = steps * self.config.tokens_per_step, format_duration(self.seconds())
        test = self.evaluate(self.state.params, self.run.split.test)
        self._record(steps, "test", test.bits)
        print_field("done", f"{steps:,} steps, {tokens:,} tokens in {took}")
        best = self.checkpoints.best_first(self.checkpoints.steps())[:1]
        if best and best != [steps]:
            where = f"step {best[0]:,}, {self.best:.3f} bits/byte in validation"
            print_field("best", f"{where}; generate and evaluate use it, the next line scores the last step")
        print_field("test", f"{test.bits:.3f} bits/byte of {test.scored:,} bytes, {describe_context(self.config)}")
        return test.bits


def sample(
    model: LocalTransformer, params: Any, prompt: np.ndarray, length: int, temperature: float, seed: int
) -> bytes:
    """Sample `length` bytes after `prompt`."""
    tokens, _ = generate(
        model,
        {"params": params},
        jnp.asarray(prompt[None], jnp.int32),
        length,
        rng=jax.random.key(seed),
        temperature=temperature,
    )
    return bytes(np.asarray(tokens)[0].tolist())
