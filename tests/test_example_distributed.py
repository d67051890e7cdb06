"""The example learns the same on any mesh and in any number of processes, and outlives one that is killed."""

import dataclasses
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from examples import devices, enwik8, flags, runs
from flax_local_attention import parameter_shardings

ROOT = Path(__file__).resolve().parents[1]
TEXT = b"the quick brown fox jumps over the lazy dog. " * 300
DATA = np.frombuffer(TEXT, np.uint8)
CONFIG = dataclasses.replace(
    enwik8.PRESETS["cpu"], dim=16, depth=1, heads=4, dim_head=4, window_size=4, seq_len=32, batch_size=4, accumulate=2,
    steps=20, warmup_steps=2, learning_rate=0.02, log_every=4, eval_every=5, sample_bytes=5,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_is_kept():
    """Keep runs out of the user's cache of compiled programs."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


# ---- the devices of one process


def mesh_of(shape):
    if jax.device_count() < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} devices")
    return devices.choose_mesh(*shape, CONFIG)


@functools.cache
def compiled_for(mesh):
    """The first state of a run on a mesh, whole and in NumPy, and the compiled step."""
    draw = functools.partial(enwik8.initial_state, CONFIG)
    state = jax.jit(draw, out_shardings=parameter_shardings(jax.eval_shape(draw), mesh))()
    train_step = enwik8.build_train_step(enwik8.build_loss(enwik8.build_model(CONFIG)), enwik8.build_optimiser(CONFIG))
    return devices.collect(state), train_step.lower(state, enwik8.draw_microbatches(DATA, CONFIG, 0, mesh)).compile()


def train_on(mesh, steps, state=None):
    """The losses of the next steps, and the state after them."""
    first, train_step = compiled_for(mesh)
    state = devices.place_state(state or first, mesh)
    losses, done = [], int(state.step)
    for step in range(done + 1, done + 1 + steps):
        state, nats = train_step(state, enwik8.draw_microbatches(DATA, CONFIG, step, mesh))
        losses.append(float(nats))
    return losses, state


@pytest.fixture
def alone(quick_compile):
    """The losses of one device."""
    losses, _ = train_on(mesh_of((1, 1, 1)), CONFIG.steps)
    assert losses[-1] < losses[0] - 1
    return losses


MESHES = {"data": (4, 1, 1), "sequence": (1, 4, 1), "tensor": (1, 1, 2), "mixed": (2, 2, 2)}


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_a_mesh_learns_what_one_device_learns_and_its_state_stays_in_place(shape, alone):
    mesh = mesh_of(shape)
    losses, state = train_on(mesh, CONFIG.steps)
    np.testing.assert_allclose(losses, alone, atol=1e-4)
    places = jax.tree.leaves(parameter_shardings(state, mesh))
    leaves = jax.tree.leaves(state)
    assert all(leaf.sharding.is_equivalent_to(place, leaf.ndim) for leaf, place in zip(leaves, places, strict=True))


@pytest.mark.parametrize("after", [(1, 1, 1), (4, 1, 1)])
def test_a_checkpoint_goes_on_on_another_mesh(after, alone, tmp_path):
    losses, state = train_on(mesh_of((2, 2, 2)), 10)
    runs.save_checkpoint(tmp_path / "saved", runs.Checkpoint(devices.collect(state), CONFIG, "", 0.0))
    saved = runs.read_checkpoint(tmp_path / "saved", enwik8.Config).state
    more, _ = train_on(mesh_of(after), 10, runs.restore_state(state, saved))
    np.testing.assert_allclose(losses + more, alone, atol=1e-4)


def test_each_device_holds_its_part_of_a_batch_and_reads_no_other():
    mesh = mesh_of((2, 2, 1))
    asked = []

    def read(index):
        asked.append(index)
        return np.zeros((4, 32))[index]

    rows = devices.place_rows(read, (4, 32), mesh)
    assert rows.sharding.shard_shape(rows.shape) == (2, 16)
    assert {(row.start, column.start) for row, column in asked} == set(itertools.product((0, 2), (0, 16)))


@pytest.mark.parametrize(
    ("batch_size", "given", "expected"),
    [(4, (None, 1, 1), 4), (4, (None, 2, 2), 2), (6, (None, 1, 1), 6), (7, (None, 2, 1), 1), (4, (2, 1, 1), 2)],
)
def test_a_batch_is_spread_over_as_many_devices_as_divide_it(batch_size, given, expected):
    mesh_of((2, 2, 2))
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
    """Flags of a run with `CONFIG`."""
    fields = dataclasses.asdict(CONFIG)
    switches = [flags.flag(name) for name, value in fields.items() if value is True]
    values = [f"{flags.flag(name)}={value}" for name, value in fields.items() if not isinstance(value, bool)]
    return [*switches, *values, *options]


@pytest.mark.parametrize("case", DO_NOT_FIT)
def test_parts_that_do_not_fit_are_one_clear_line_before_anything_is_compiled(case, tmp_path, monkeypatch, capsys):
    mesh_of((2, 2, 2))
    options, phrase = DO_NOT_FIT[case]
    (tmp_path / "fox.txt").write_bytes(TEXT)
    monkeypatch.setattr(enwik8, "perform", lambda *_: pytest.fail("the model was built"))
    assert enwik8.main(command(f"--data={tmp_path / 'fox.txt'}", *options)) == 2
    error = capsys.readouterr().err
    assert phrase in error
    assert error.count("\n") == 1


# ---- several processes

JOIN = {
    "nothing given": ([], None),
    "all given": (["--coordinator=host:80", "--processes=2", "--process=1"], ("host:80", 2, 1)),
    "all asked of the cluster": (["--distributed"], (None, None, None)),
    "the address in the environment": (["--processes=2", "--process=0"], (None, 2, 0)),
}


@pytest.mark.parametrize("case", JOIN)
def test_processes_are_joined_by_what_is_given_and_what_jax_finds(case, monkeypatch, capsys):
    options, expected = JOIN[case]
    called = []

    def initialize(*args, **_):
        called.append(args)
        raise ValueError("no such\ncluster")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert enwik8.main([*options, "--data=/nowhere"]) == 2
    assert called == ([expected] if expected else [])
    assert ("(no such cluster); give --coordinator" in capsys.readouterr().err) == bool(expected)


DIES_AT_STEP_13 = """
import os, signal, sys
from examples import enwik8
draw = enwik8.draw_microbatches
def die(data, config, step, mesh):
    if step == 13: os.kill(os.getpid(), signal.SIGKILL)
    return draw(data, config, step, mesh)
enwik8.draw_microbatches = die
sys.exit(enwik8.main(sys.argv[1:]))
"""


class Processes:
    """Processes of one device each on this host, and what they print."""

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
        """Return the exit status of each, which all have by then."""
        try:
            deadline = time.monotonic() + seconds
            return [process.wait(max(0, deadline - time.monotonic())) for process in self.started]
        finally:
            for process in self.started:
                process.kill()

    def printed(self):
        return [path.read_text(errors="replace") for path in self.paths]


def figures(out):
    """The figures of a run by step and split."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], line["split"]): line["bits_per_byte"] for line in lines}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the corpus and a run of one process, and the flags that name the corpus and a cache."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "fox.txt").write_bytes(TEXT)
    flags = command(f"--data={folder / 'fox.txt'}", f"--compilation-cache={folder / 'compiled'}")
    jax.config.update("jax_disable_most_optimizations", True)
    assert enwik8.main([*flags, f"--out={folder / 'alone'}", "--data-parallel=1"]) == 0
    jax.config.update("jax_disable_most_optimizations", False)
    return folder, ["-m", "examples.enwik8", *flags]


@pytest.mark.processes
def test_four_processes_learn_what_one_learns_and_the_first_alone_prints_and_writes(files, tmp_path):
    folder, run = files
    out = tmp_path / "run"
    processes = Processes(tmp_path, *[[*run, f"--out={out}", "--sequence-parallel=2"]] * 4)
    assert processes.wait(300) == [0] * 4, processes.printed()
    assert [sum("bits per byte" in line for line in text.splitlines()) for text in processes.printed()][1:] == [0] * 3
    assert "devices 4 cpu of 4 processes (data 2, sequence 2, model 1)" in processes.printed()[0]
    assert "\nsample  " in processes.printed()[0]
    alone = figures(folder / "alone")
    assert figures(out) == {key: pytest.approx(value, abs=1e-4) for key, value in alone.items()}


@pytest.mark.processes
def test_when_a_process_is_killed_the_other_ends_and_both_go_on_from_the_checkpoint(files, tmp_path):
    folder, run = files
    run = [*run, f"--out={tmp_path / 'run'}"]
    processes = Processes(tmp_path, run, ["-c", DIES_AT_STEP_13, *run[2:]])
    processes.started[1].wait(300)
    began = time.monotonic()
    statuses = processes.wait(60)
    assert statuses[0] != 0, processes.printed()
    assert time.monotonic() - began < 60
    assert "--resume" in processes.printed()[0]
    assert max(step for step, _ in figures(tmp_path / "run")) <= 12

    processes = Processes(tmp_path, *[[*run, "--resume"]] * 2)
    assert processes.wait(300) == [0, 0], processes.printed()
    assert " step     15 " in processes.printed()[0]
    assert " step      8 " not in processes.printed()[0]
    alone = figures(folder / "alone")
    assert figures(tmp_path / "run") == {key: pytest.approx(value, abs=1e-4) for key, value in alone.items()}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("other", "phrase"),
    [
        ("--seed=1", "the same options, bytes and checkpoint, got others in process 1"),
        ("--data=/nowhere", "must name a file"),
    ],
)
def test_processes_that_would_not_do_the_same_do_nothing(files, tmp_path, other, phrase):
    _, run = files
    processes = Processes(tmp_path, run, [*run, other])
    assert processes.wait(120) == [2, 2], processes.printed()
    first, second = processes.printed()
    assert "got others in process 1" in first
    assert phrase in second
    assert "compiled" not in first
