"""A training run: what it is prepared with, and the trainer that takes it through its steps."""

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
from examples.screen import Progress, Screen, clock, peak_flops, printable, quote, say, show, tell
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

PROMPT_BYTES = 64  # of a sample
TRACED_CALL = 2  # the first one warms up


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that can start: its options fit one another, its bytes are read, its directory is there.

    Attributes:
      settings: what it learns, from what.
      corpus, split: the bytes.
      files: where it is kept.
      resumed: whether it goes on.
      mesh: the devices.
      template: shapes of the state, with their places on the mesh.
      loggers: where figures go beside the run's own files.
      profile: whether to trace a few steps.
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
        """What it is made of."""
        return self.settings.config

    def summary(self) -> str:
        """Return what all processes of a run must agree on."""
        return repr((self.config, self.settings.fingerprint, self.files.directory, self.resumed, self.mesh.shape))


class DivergedError(Exception):
    """The loss is no number any more."""


class Meter:
    """The losses since the last figure, and the time that they took."""

    def __init__(self, losses: Sequence[float] = ()):
        """Begin with losses of before a run was stopped, whose time is not known."""
        self.losses = list(losses)
        self._untimed = len(self.losses)
        self.restart()

    def restart(self) -> None:
        """Begin to measure time."""
        self._since = time.perf_counter()

    def bits(self) -> float:
        """Return the mean of the losses, in nats, as bits."""
        return float(to_bits(np.mean(self.losses, dtype=np.float64)))

    def steps_per_second(self) -> float:
        """Return the pace of the steps whose time is known."""
        return (len(self.losses) - self._untimed) / (time.perf_counter() - self._since)


class Trainer:
    """A run under way: its state, and what is done with it.

    Attributes:
      run: what was prepared.
      state: of training, on the devices.
      step: steps done, known without waiting for the devices.
      bits: of this step's validation; None if it had none.
      best: the fewest bits of a validation.
    """

    def __init__(self, run: Run, screen: Screen):
        self.run, self.screen, self.config = run, screen, run.config
        self.checkpoints = Checkpoints(run.files.checkpoints, tell)
        self.state, seconds, losses = self._restore() if run.resumed else self._draw()
        self.step, self.bits, self.best = int(self.state.step), None, self.checkpoints.best_bits()
        self.began = time.perf_counter() - seconds
        is_first = jax.process_index() == 0
        self.journal = Journal(run.files.metrics if is_first else None, self.step)
        self.model = build_model(self.config)
        self.evaluate = build_evaluation(self.model, self.config, run.mesh)
        self.flops = flops_per_token(self.config, self.state.params)
        self._meter = Meter(losses)

    def _draw(self) -> tuple[TrainState, float, list[float]]:
        """Return a fresh state; it took no seconds, and has no losses since a figure."""
        places = parameter_shardings(self.run.template, self.run.mesh)
        return jax.jit(functools.partial(initial_state, self.config), out_shardings=places)(), 0.0, []

    def _restore(self) -> tuple[TrainState, float, list[float]]:
        """Return the newest whole state, the seconds of training that it took, and the losses since the last figure.

        A run that was stopped before its first checkpoint begins again.

        Raises:
          UsageError: there is none though there are figures, or it is another run's, or one of more steps.
        """
        if not self.checkpoints.steps() and not self.run.files.metrics.exists():
            say("resuming  from the start: there is no checkpoint yet")
            return self._draw()
        found = self.checkpoints.restore(newest_first, self.run.template, self.run.settings.check_checkpoint)
        if found is None:
            raise UsageError(
                f"--resume needs a whole checkpoint, got none in {str(self.checkpoints.directory)!r}; start a new run"
            )
        if found.step > self.config.steps:
            raise UsageError(f"--steps must be at least the {found.step:,} that are done, got {self.config.steps:,}")
        seconds, devices = found.about["seconds"], found.about.get("devices")
        if devices not in (None, describe_mesh(self.run.mesh)):  # where checkpoints do not say, nobody knows
            say(f"devices   were {devices}; sums in another order may differ in their last bits")
        say(f"resuming  from step {found.step:,} of {self.config.steps:,}, after {clock(seconds)} of training")
        return found.state, seconds, found.about["losses"]

    def seconds(self) -> float:
        """Return the time since the run began, without the pause before a resumption."""
        return time.perf_counter() - self.began

    def train(self, stopping: Stopping) -> None:
        """Take the steps that are left, unless someone asks to stop, and save at the end of them.

        While a call is under way on the devices, the next one is prepared and the losses of the last one are read.
        """
        data = self.run.split.train
        config = dataclasses.replace(self.config, steps_per_call=self.config.steps_in_call)
        self.save()  # so that a run can be resumed from its first moment
        train_steps = build_train_steps(build_loss(self.model), build_optimiser(config))
        batches = draw_steps(data, config, self.step + 1, 0, self.run.mesh)
        train_steps = train_steps.lower(self.state, batches, np.int32(0)).compile()
        say(f"compiled  after {clock(self.seconds())}")
        self.screen.start(Progress(self.step, config.steps))
        self._meter.restart()
        under_way = None
        for call in itertools.count(1):
            if self.step == config.steps or self._asked_to_stop(stopping):
                break
            count = self._steps_in_call()
            batches = draw_steps(data, config, self.step + 1, count, self.run.mesh)
            with self._tracing(is_due=call == TRACED_CALL):
                self.state, nats = train_steps(self.state, batches, np.int32(count))
            self.step, self.bits = self.step + count, None
            self._read(under_way)
            under_way = self.step, count, nats
            if self._is_due(self.step, config.log_every, config.eval_every):
                self._read(under_way)  # at once, so that a figure's time is that of its steps
                under_way = None
            if self._is_due(self.step, config.eval_every):
                self.pause()
        self._read(under_way)
        self.save()
        if self.step < config.steps:
            say(f"stopped   after step {self.step:,} of {config.steps:,}")

    @contextlib.contextmanager
    def _tracing(self, is_due: bool) -> Iterator[None]:
        """Trace what is enqueued here, to its end, if that was asked for and is due."""
        if not (self.run.profile and is_due):
            yield
            return
        with jax.profiler.trace(str(self.run.files.profile)):
            yield
            jax.block_until_ready(self.state)
        say(f"traced    into {self.run.files.profile}; tensorboard --logdir DIR, or ui.perfetto.dev, shows it")

    def _steps_in_call(self) -> int:
        """Return how many steps the next call takes: not past a figure, a validation or the end."""
        config = self.config
        until = [every - self.step % every for every in (config.log_every, config.eval_every)]
        return min(config.steps_per_call, config.steps - self.step, *until)

    def _is_due(self, step: int, *every: int) -> bool:
        """Return whether something is due after a step: at the end, or every so many steps."""
        return step == self.config.steps or any(step % count == 0 for count in every)

    def _asked_to_stop(self, stopping: Stopping) -> bool:
        """Return whether this process, or another one, has been asked to stop; they compare at each figure."""
        if jax.process_count() > 1 and self.step % self.config.log_every:
            return False
        return any_process(stopping.signal is not None)

    def _read(self, call: tuple[int, int, jax.Array] | None) -> None:
        """Fetch the losses of a call, show them, and keep a figure where one is due.

        Raises:
          DivergedError: a loss is no number.
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
            self._keep(step, "train", self._meter.bits(), tokens_per_second=progress.rate, share_of_peak=progress.share)
            self._meter = Meter()

    def _progress(self, step: int) -> Progress:
        """Return how far training is after a step, and how it goes."""
        config, pace = self.config, self._meter.steps_per_second()
        rate, peak = pace * config.tokens_per_step, peak_flops(config.dtype)
        share = None if peak is None else rate * self.flops / (peak * self.run.mesh.size)
        return Progress(step, config.steps, (config.steps - step) / pace, self._meter.bits(), rate, share)

    def _keep(self, step: int, split: str, bits: float, **more: Any) -> None:
        """Keep a figure, and hand it to the other places."""
        entry = {"step": step, "seconds": round(self.seconds(), 2), "split": split, "bits_per_byte": bits}
        entry |= {"corpus": self.run.corpus.name} | more
        self.journal.add(entry)
        for logger in self.run.loggers:
            logger.log(entry)

    def pause(self) -> None:
        """Validate, save, and show what the model writes."""
        self.bits = self.evaluate(self.state.params, self.run.split.valid).bits
        if not math.isfinite(self.bits):  # before such a state is kept
            raise DivergedError(f"the validation is not finite after step {self.step:,}")
        word = "the best so far" if self.bits <= self.best else f"the best was {self.best:.3f}"
        self.best = min(self.bits, self.best)
        say(f"step {self.step:,}  validation {self.bits:.3f} bits/byte, {word}  {clock(self.seconds())}")
        self._keep(self.step, "validation", self.bits)
        self.save()
        self.show_sample()
        self._meter.restart()

    def show_sample(self) -> None:
        """Let the model write on from the beginning of the validation split, show it and keep it."""
        config = self.config
        if not config.sample_bytes:
            return
        prompt = self.run.split.valid[:PROMPT_BYTES]
        params = collect(self.state.params)
        drawn = sample(self.model, params, prompt, config.sample_bytes, config.temperature, config.seed)
        text = printable(prompt.tobytes() + drawn)
        say(quote(text))
        if jax.process_index() == 0:
            self.run.files.keep_sample(self.step, text)

    def save(self) -> None:
        """Begin to write a checkpoint, unless there is one of this step."""
        about = {"config": self.config.to_json(), "fingerprint": self.run.settings.fingerprint}
        about |= {"seconds": self.seconds(), "place": {"seed": self.config.seed, "next_step": self.step + 1}}
        about |= {"losses": self._meter.losses, "devices": describe_mesh(self.run.mesh)}
        self.checkpoints.save(self.step, self.state, about, self.bits)

    def finish(self) -> float:
        """Score the test split; return its bits per byte."""
        steps = self.step
        tokens, took = steps * self.config.tokens_per_step, clock(self.seconds())
        test = self.evaluate(self.state.params, self.run.split.test)
        self._keep(steps, "test", test.bits)
        show("done", f"{steps:,} steps, {tokens:,} tokens in {took}")
        best = self.checkpoints.by_bits(self.checkpoints.steps())[:1]
        if best and best != [steps]:
            where = f"step {best[0]:,}, {self.best:.3f} bits/byte in validation"
            show("best", f"{where}, which generate and evaluate take; the test is of the last step")
        show("test", f"{test.bits:.3f} bits/byte of {test.scored:,} bytes, {describe_context(self.config)}")
        return test.bits


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
    return bytes(np.asarray(tokens)[0].tolist())
