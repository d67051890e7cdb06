"""The example learns the same on any mesh and in any number of processes, and survives the death of one."""

import dataclasses
import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from examples import devices, enwik8, flags, training
from examples.checkpoints import Checkpoints, digest_arrays, newest_first
from examples.config import CPU_DEMO, format_value
from flax_local_attention import parameter_shardings
from tests.example_runs import DATA, ROOT, TEXT, mesh_of, read_figures, state_template

CONFIG = dataclasses.replace(
    CPU_DEMO, dim=16, depth=1, heads=4, dim_head=4, windows=(4,), seq_len=32, batch_size=4, accumulate=2,
    steps=20, decay_steps=20, warmup_steps=2, learning_rate=0.02, log_every=4, eval_every=5, sample_bytes=5,
    steps_per_call=5, optimizer="adamw",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("compiled_once")


# ---- the devices of one process


@functools.cache
def compiled_for(mesh, optimizer):
    """Return the initial state of a run on a mesh, as whole NumPy arrays, and the compiled steps."""
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    draw = functools.partial(training.initial_state, config)
    state = jax.jit(draw, out_shardings=parameter_shardings(jax.eval_shape(draw), mesh))()
    loss, optimiser = training.build_loss(training.build_model(config)), training.build_optimiser(config)
    batches = training.draw_steps(DATA, CONFIG, 1, 0, mesh)
    return devices.collect(state), training.build_train_steps(loss, optimiser).lower(state, batches, 0).compile()


def train_on(mesh, steps, state=None, optimizer="adamw"):
    """Return the losses of the next steps and the state after them."""
    first, train_steps = compiled_for(mesh, optimizer)
    if state is None:
        state = jax.device_put(first, parameter_shardings(first, mesh))
    losses = []
    for step in range(int(state.step) + 1, int(state.step) + 1 + steps, CONFIG.steps_per_call):
        batches = training.draw_steps(DATA, CONFIG, step, CONFIG.steps_per_call, mesh)
        state, nats = train_steps(state, batches, np.int32(CONFIG.steps_per_call))
        losses += np.asarray(nats).tolist()
    return losses, state


@pytest.fixture
def alone():
    """The losses of one device."""
    losses, _ = train_on(mesh_of((1, 1, 1), CONFIG), CONFIG.steps)
    assert losses[-1] < losses[0] - 1
    return losses


MESHES = {"data": (4, 1, 1), "sequence": (1, 4, 1), "tensor": (1, 1, 2), "mixed": (2, 2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_a_mesh_learns_what_one_device_learns_and_its_state_stays_in_place(shape, alone):
    mesh = mesh_of(shape, CONFIG)
    losses, state = train_on(mesh, CONFIG.steps)
    np.testing.assert_allclose(losses, alone, atol=1e-4)
    places = jax.tree.leaves(parameter_shardings(state, mesh))
    leaves = jax.tree.leaves(state)
    assert all(leaf.sharding.is_equivalent_to(place, leaf.ndim) for leaf, place in zip(leaves, places, strict=True))


@pytest.mark.slow
def test_muon_learns_on_a_mesh_what_it_learns_on_one_device():
    alone, spread = (train_on(mesh_of(shape, CONFIG), 10, optimizer="muon")[0] for shape in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_allclose(spread, alone, atol=1e-3)
    assert alone[-1] < alone[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("after", [(1, 1, 1), (4, 1, 1)])
def test_a_checkpoint_goes_on_on_another_mesh_and_its_digests_are_the_same_there(after, alone, tmp_path):
    losses, state = train_on(mesh_of((2, 2, 2), CONFIG), 10)
    checkpoints = Checkpoints(tmp_path / "checkpoints", pytest.fail)
    checkpoints.save(10, state, {}, None)
    checkpoints.close()
    mesh = mesh_of(after, CONFIG)
    found = Checkpoints(tmp_path / "checkpoints", pytest.fail).restore(
        newest_first, state_template(CONFIG, mesh), lambda _: None
    )
    saved, restored = (jax.device_get(digest_arrays(tree)) for tree in (state, found.state))
    assert jax.tree.map(int, restored) == jax.tree.map(int, saved)
    more, _ = train_on(mesh, 10, found.state)
    np.testing.assert_allclose(losses + more, alone, atol=1e-4)


def test_each_device_holds_its_part_of_a_batch_and_reads_no_other():
    mesh = mesh_of((2, 2, 1), CONFIG)
    asked = []

    def read(index):
        asked.append(index)
        return np.zeros((4, 32))[index]

    rows = devices.place_rows(read, (4, 32), mesh, devices.ROWS_AND_TOKENS)
    assert rows.sharding.shard_shape(rows.shape) == (2, 16)
    assert {(row.start, column.start) for row, column in asked} == set(itertools.product((0, 2), (0, 16)))
    asked.clear()
    whole = devices.place_rows(read, (4, 32), mesh, devices.ROWS)  # as in evaluation
    assert whole.sharding.shard_shape(whole.shape) == (1, 32)
    assert {row.start for row, _ in asked} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("batch_size", "given", "expected"),
    [(4, (None, 1, 1), 4), (4, (None, 2, 2), 2), (6, (None, 1, 1), 6), (7, (None, 2, 1), 1), (4, (2, 1, 1), 2)],
)
def test_a_batch_is_spread_over_as_many_devices_as_divide_it(batch_size, given, expected):
    mesh_of((2, 2, 2), CONFIG)
    mesh = devices.choose_mesh(*given, dataclasses.replace(CONFIG, batch_size=batch_size))
    assert tuple(mesh.shape.values()) == (expected, *given[1:])


DO_NOT_FIT = {
    "batch": (["--data-parallel=3"], "--batch-size must be a multiple of --data-parallel, got 4 and 3"),
    "sequence": (["--sequence-parallel=3"], "--seq-len must be a multiple of --sequence-parallel"),
    "heads": (["--tensor-parallel=8"], "--heads must be a multiple of --tensor-parallel"),
    "too few devices": (["--data-parallel=4", "--tensor-parallel=4"], "must be at most 8"),
    "too few devices for the default": (["--sequence-parallel=16"], "must be at most 8"),
}


def command(*options):
    """Return the flags of a run with `CONFIG`."""
    fields = dataclasses.asdict(CONFIG)
    switches = [flags.flag(name) for name, value in fields.items() if value is True]
    values = [
        f"{flags.flag(name)}={format_value(value)}" for name, value in fields.items() if value not in (True, False)
    ]
    return [*switches, *values, *options]


@pytest.mark.parametrize("case", DO_NOT_FIT)
def test_parts_that_do_not_fit_are_one_clear_line_before_anything_is_compiled(case, tmp_path, monkeypatch, capsys):
    mesh_of((2, 2, 2), CONFIG)
    options, phrase = DO_NOT_FIT[case]
    (tmp_path / "fox.txt").write_bytes(TEXT)
    monkeypatch.setattr(enwik8, "perform", lambda *_: pytest.fail("the model was built"))
    files = f"--data={tmp_path / 'fox.txt'}", f"--run={tmp_path / 'run'}"
    assert enwik8.main(command(*files, *options)) == 2
    error = capsys.readouterr().err
    assert phrase in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ---- several processes

JOIN = {
    "nothing given": ([], None),
    "all given": (["--coordinator=host:80", "--processes=2", "--process=1"], ("host:80", 2, 1)),
    "all asked of the cluster": (["--distributed"], (None, None, None)),
    "the address in the environment": (["--processes=2", "--process=0"], (None, 2, 0)),
}


@pytest.mark.parametrize("case", JOIN)
def test_processes_are_joined_by_what_is_given_and_what_jax_finds(case, tmp_path, monkeypatch, capsys):
    options, expected = JOIN[case]
    called = []

    def initialize(*args, **_):
        called.append(args)
        raise ValueError("no such\ncluster")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.chdir(tmp_path)
    assert enwik8.main([*options, "--data=/nowhere"]) == 2
    assert called == ([expected] if expected else [])
    assert ("(no such cluster); give --coordinator" in capsys.readouterr().err) == bool(expected)


GETS_A_SIGNAL_AT_STEP_13 = """
import os, sys
from examples import enwik8, trainer
draw, number = trainer.draw_steps, int(sys.argv.pop(1))
def draw_or_end(data, config, first, count, mesh):
    if first <= 13 < first + count: os.kill(os.getpid(), number)
    return draw(data, config, first, count, mesh)
trainer.draw_steps = draw_or_end
sys.exit(enwik8.main(sys.argv[1:]))
"""


class Processes:
    """Processes on this host with one device each, and their output."""

    def __init__(self, folder, *commands):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        names = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        self.paths = [folder / f"{index}.printed" for index in range(len(commands))]
        self.started = []
        for index, (path, given) in enumerate(zip(self.paths, commands, strict=True)):
            place = [f"--coordinator=127.0.0.1:{port}", f"--processes={len(commands)}", f"--process={index}"]
            with path.open("w") as printed:
                self.started.append(
                    subprocess.Popen(
                        [sys.executable, *given, *place],
                        cwd=ROOT,
                        env=os.environ | names,
                        stdout=printed,
                        stderr=printed,
                    )
                )

    def wait(self, seconds):
        """Wait for all processes and return their exit statuses."""
        try:
            deadline = time.monotonic() + seconds
            return [process.wait(max(0, deadline - time.monotonic())) for process in self.started]
        finally:
            for process in self.started:
                process.kill()

    def printed(self):
        return [path.read_text(errors="replace") for path in self.paths]


@pytest.fixture(scope="module")
def files(compiled_once, tmp_path_factory):
    """A folder with a corpus and a one-process run, and the flags that name the corpus and a compilation cache."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "fox.txt").write_bytes(TEXT)
    flags = command(f"--data={folder / 'fox.txt'}", f"--compilation-cache={folder / 'compiled'}")
    assert enwik8.main([*flags, f"--run={folder / 'alone'}", "--data-parallel=1"]) == 0
    return folder, ["-m", "examples.enwik8", *flags]


def assert_learnt_as_alone(folder, directory):
    """Assert that a run's metrics are those of one process."""
    alone = read_figures(folder / "alone")
    assert read_figures(directory) == {key: pytest.approx(value, abs=1e-4) for key, value in alone.items()}


@pytest.mark.processes
def test_four_processes_learn_what_one_learns_and_the_first_alone_prints_and_writes(files, tmp_path):
    folder, run = files
    directory = tmp_path / "run"
    processes = Processes(tmp_path, *[[*run, f"--run={directory}", "--sequence-parallel=2"]] * 4)
    assert processes.wait(300) == [0] * 4, processes.printed()
    first, *others = processes.printed()
    assert [text.count("bits/byte") for text in others] == [0] * 3
    assert "devices   4 cpu of 4 processes (data 2, sequence 2, model 1)" in first
    assert "\n  | the quick" in first
    assert_learnt_as_alone(folder, directory)
    assert len(list((directory / "samples").iterdir())) == 4
    assert len({path.name for path in (directory / "checkpoints").iterdir()} - {"20", "15"}) <= 1


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_a_process_is_ended_the_other_ends_and_both_go_on_from_the_checkpoint(number, files, tmp_path):
    folder, run = files
    directory = tmp_path / "run"
    run = [*run, f"--run={directory}"]
    processes = Processes(tmp_path, run, ["-c", GETS_A_SIGNAL_AT_STEP_13, str(int(number)), *run[2:]])
    processes.started[1].wait(300)
    statuses = processes.wait(60)
    first, _ = processes.printed()
    assert "--resume" in first
    if number == signal.SIGTERM:
        assert statuses == [0, 0], processes.printed()
        assert sorted(int(path.name) for path in (directory / "checkpoints").iterdir())[-1] == 16
    else:
        assert statuses[0] != 0, processes.printed()
        assert max(step for step, _ in read_figures(directory)) <= 12

    processes = Processes(tmp_path, *[[*run, "--resume"]] * 2)
    assert processes.wait(300) == [0, 0], processes.printed()
    resumed = re.search(r"resuming  from step (\d+) of 20", processes.printed()[0])
    assert int(resumed[1]) in ([16] if number == signal.SIGTERM else [5, 10])
    assert_learnt_as_alone(folder, directory)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("other", "phrase"),
    [
        ("--seed=1", "the same options, corpus and checkpoint, got different ones in process 1"),
        ("--data=/nowhere", "must name a file"),
    ],
)
def test_processes_that_would_not_do_the_same_do_nothing(files, tmp_path, other, phrase):
    _, run = files
    run = [*run, f"--run={tmp_path / 'run'}"]
    processes = Processes(tmp_path, run, [*run, other])
    assert processes.wait(120) == [2, 2], processes.printed()
    first, second = processes.printed()
    assert "got different ones in process 1" in first
    assert phrase in second
    assert "compiled" not in first
    assert not (tmp_path / "run").exists()
