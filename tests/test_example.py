"""A run of the example saves all its results, shows its progress, and resumes as if it had never stopped."""

import functools
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from examples import enwik8, evaluation, files, runs, trainer, training
from examples.screen import COLUMNS, print_error, print_line
from tests.example_runs import ROOT, TEXT, TINY, assert_equal, compiled_in, read_figures, read_state, start

pytestmark = pytest.mark.usefixtures("compiled_once")


def command(directory, text_file, *more):
    """Return the flags of a tiny run."""
    return [*TINY, f"--data={text_file}", f"--run={directory}", *more]


def resume(directory, *more):
    """Return the flags that resume a run, on one device as before."""
    return ["--resume", f"--run={directory}", "--data-parallel=1", *more]


@pytest.mark.slow_but("enwik8")
@pytest.mark.parametrize("script", ["enwik8", "from_torch"])
def test_a_script_runs_as_a_file_from_anywhere_and_as_a_module(script, tmp_path):
    as_file = [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--help"], tmp_path
    as_module = [sys.executable, "-m", f"examples.{script}", "--help"], ROOT
    for command, folder in (as_file, as_module):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


# ---- what is saved and shown


def test_a_run_learns(whole_run):
    figures = read_figures(whole_run.directory)
    assert figures[4, "train"] > 7
    assert figures[12, "validation"] < figures[6, "validation"] < 6
    assert figures[12, "test"] < 5
    assert [step for step, split in figures if split == "train"] == [4, 6, 8, 12]
    assert [step for step, split in figures if split == "validation"] == [6, 12]


def test_a_run_shows_its_corpus_its_figures_its_samples_and_its_place_among_compressors(whole_run):
    printed, figures = whole_run.printed, read_figures(whole_run.directory)
    assert "corpus    fox.txt: 12,150 bytes to train on, 675 to validate, 675 to test" in printed
    for (step, split), bits in figures.items():
        shown = {"train": f"step {step:>2} of 12 ", "validation": f"step {step}  validation ", "test": "test      "}
        (line,) = [line for line in printed.splitlines() if line.startswith(shown[split])]
        assert f"{bits:.3f} bits/byte" in line
    assert re.search(r"step  8 of 12   66 %  \d+:\d\d left .* tokens/s", printed)
    assert printed.count("  | the quick brown fox") == 2
    assert re.search(r"^compared  test .* gzip [\d.]+, xz [\d.]+", printed, re.MULTILINE)


def test_every_entry_names_its_corpus_and_the_time(whole_run):
    entries = list(map(json.loads, (whole_run.directory / "metrics.jsonl").read_text().splitlines()))
    assert {entry["corpus"] for entry in entries} == {"fox.txt"}
    seconds = [entry["seconds"] for entry in entries]
    assert seconds == sorted(seconds)
    assert all(("tokens_per_second" in entry) == (entry["split"] == "train") for entry in entries)


def test_samples_are_kept_by_step(whole_run):
    samples = sorted((whole_run.directory / "samples").iterdir())
    assert [path.name for path in samples] == ["0000006.txt", "0000012.txt"]
    begin = TEXT[12_150:][: trainer.PROMPT_BYTES].decode()
    assert all(path.read_text(encoding="utf-8").startswith(begin) for path in samples)


@pytest.fixture(scope="module")
def default_run(compiled_once, text_file, tmp_path_factory):
    """The folder in which a run was started without --run, and its output."""
    folder = tmp_path_factory.mktemp("folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with open("printed", "w") as printed:
            patch.setattr(sys, "stdout", printed)
            assert enwik8.main([*TINY, f"--data={text_file}"]) == 0
    return folder, (folder / "printed").read_text()


def test_a_run_without_a_name_is_kept_in_runs_under_its_preset_and_date_and_says_so(default_run):
    folder, printed = default_run
    (directory,) = (folder / "runs").iterdir()
    assert re.fullmatch(r"cpu-demo-\d{4}-\d\d-\d\d-\d{6}", directory.name)
    name = f"runs/{directory.name}"
    assert printed.startswith(f"run       {name}\n")
    *_, generate, train_on = printed.splitlines()
    kept = " ".join(printed.split("\nsaved")[1].split())
    assert kept.startswith(f"{name} (settings.json, checkpoints, metrics.jsonl, samples")
    assert generate.endswith(f'generate --run {name} --prompt "The "')
    assert train_on.endswith(f"--resume --run {name} --steps 24")
    made = {path.name for path in directory.iterdir()}
    assert made - {"curve.png"} == {"settings.json", "metrics.jsonl", "samples", "checkpoints"}


def test_the_curves_of_a_run_are_drawn(default_run, whole_run):
    pytest.importorskip("matplotlib")
    (directory,) = (default_run[0] / "runs").iterdir()
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "curve.png" in default_run[1].splitlines()[-3]
    assert "train" in whole_run.printed.split("compared")[1]


def test_lines_fit_a_page_but_for_commands_and_paths(whole_run, capsys):
    lines = [line for line in whole_run.printed.splitlines() if str(whole_run.directory) not in line]
    assert len(lines) > 20
    assert max(map(len, lines)) <= COLUMNS
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_terminal_shows_a_bar_with_the_percentage_and_the_time_that_is_left(text_file, tmp_path, compiled_programs):
    program = [sys.executable, "-m", "examples.enwik8", *command(tmp_path / "run", text_file)]
    ours, theirs = pty.openpty()
    names = environment(compiled_programs) | {"TERM": "xterm", "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(program, cwd=ROOT, env=names, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = read_terminal(ours, seconds=120)
        process.kill()
    assert process.returncode == 0, shown
    assert re.search(r"step +\d+ of 12 +\d+ % .*━.* left  [\d.]+ bits/byte", shown), shown
    assert "validation" in shown
    assert str(tmp_path / "run") in shown


def environment(compiled):
    """Return the environment of a process that shares this one's compilation cache."""
    names = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    names |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    names |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | names


def read_terminal(descriptor, seconds):
    """Return everything a process writes to its terminal until it ends."""
    shown, deadline = b"", time.monotonic() + seconds
    while select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
        try:
            part = os.read(descriptor, 4096)
        except OSError:  # Linux signals the end of a terminal so
            break
        if not part:
            break
        shown += part
    os.close(descriptor)
    return shown.decode(errors="replace")


class Refusing(io.StringIO):
    """A stream that fails on every write."""

    def __init__(self, error):
        super().__init__()
        self.error, self.tried = error, 0

    def write(self, _):
        self.tried += 1
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")], ids=["left", "full"])
def test_what_cannot_be_printed_does_not_end_a_run(error, monkeypatch):
    output, errors = Refusing(error), Refusing(error)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    print_line("a figure")
    print_error("a failure")
    assert (output.tried, errors.tried) == (1, 1)
    assert (sys.stdout is output) == (not isinstance(error, BrokenPipeError))


def test_a_run_needs_no_standard_output(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert enwik8.main(command(tmp_path / "run", text_file)) == 0
    assert int(read_state(tmp_path / "run").step) == 12


# ---- stopping and resuming


def when_drawing(monkeypatch, step, act):
    """Call `act()` before the batches of the device call that takes `step` are drawn."""
    draw = training.draw_steps

    def acting(data, config, first, count, mesh):
        if first <= step < first + count:
            act()
        return draw(data, config, first, count, mesh)

    monkeypatch.setattr(trainer, "draw_steps", acting)


STOPPED = {
    "SIGTERM": (signal.SIGTERM, 0, 10, 7, 8),
    "SIGINT": (signal.SIGINT, 130, 10, 7, 8),
    "SIGHUP": (signal.SIGHUP, 0, 10, 7, 8),
    "before a validation": (signal.SIGTERM, 0, 10, 5, 6),
    "at the end": (signal.SIGTERM, 0, 10, 12, 12),
    "before the first figure": (signal.SIGTERM, 0, 1, 2, 2),
    "amid two figures": (signal.SIGINT, 130, 1, 11, 11),
}


@pytest.mark.slow_but("SIGTERM")
@pytest.mark.parametrize("case", STOPPED)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not(
    case, whole_run, text_file, tmp_path, monkeypatch, capsys
):
    number, status, steps_per_call, step, kept = STOPPED[case]
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        when_drawing(patch, step, lambda: os.kill(os.getpid(), number))
        assert enwik8.main(command(directory, text_file, f"--steps-per-call={steps_per_call}")) == status
    printed, error = capsys.readouterr()
    assert error.startswith(f"enwik8.py: {number.name}: saving after the current call")
    assert error.count("\n") == 1
    assert f"--resume --run {directory}" in printed
    assert max(int(path.name) for path in (directory / "checkpoints").iterdir()) == kept
    if kept < 12:
        assert enwik8.main(resume(directory)) == 0
        assert f"resuming  from step {kept} of 12" in capsys.readouterr().out
    assert_equal(read_state(directory), read_state(whole_run.directory))
    assert_equal(read_figures(directory), read_figures(whole_run.directory))


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once_and_the_run_goes_on_from_its_last_checkpoint(
    whole_run, text_file, tmp_path, monkeypatch, capsys
):
    def interrupt_twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        when_drawing(patch, 8, interrupt_twice)
        assert enwik8.main(command(directory, text_file)) == 130
    assert "interrupted; --resume continues" in capsys.readouterr().err
    may_change = ["--sample-bytes=0", "--data-parallel=1", "--log-every=4"]  # these do not affect learning
    assert enwik8.main([f"--run={directory}", f"--data={text_file}", "--resume", *may_change]) == 0
    assert_equal(read_state(directory), read_state(whole_run.directory))
    assert_equal(read_figures(directory), read_figures(whole_run.directory))


KILLED_AT_STEP_10 = """
import os, signal, sys
import pytest
from examples import enwik8
from tests.test_example import when_drawing
when_drawing(pytest.MonkeyPatch(), 10, lambda: os.kill(os.getpid(), signal.SIGKILL))
sys.exit(enwik8.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(whole_run, text_file, tmp_path, compiled_programs, capsys):
    directory = tmp_path / "run"
    names = environment(compiled_programs) | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", KILLED_AT_STEP_10, *command(directory, text_file, "--steps-per-call=1")]
    killed = subprocess.run(program, cwd=ROOT, env=names, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert (8, "train") in read_figures(directory)
    with (directory / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 9, "split"')  # a line that a kill cut short
    (directory / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    assert enwik8.main(resume(directory)) == 0
    assert re.search("resuming  from step [06] of 12", capsys.readouterr().out)
    assert not list((directory / "checkpoints").glob("*tmp*"))
    assert_equal(read_state(directory), read_state(whole_run.directory))
    assert_equal(read_figures(directory), read_figures(whole_run.directory))


@pytest.mark.slow
def test_the_newest_run_is_resumed_and_one_that_is_finished_says_so_and_trains_nothing(
    default_run, tmp_path, monkeypatch, capsys
):
    folder, _ = default_run
    shutil.copytree(folder / "runs", tmp_path / "runs")
    (directory,) = (tmp_path / "runs").iterdir()
    older = tmp_path / "runs" / "zzz-older"
    shutil.copytree(directory, older)
    os.utime(older / "settings.json", (1, 1))
    before = read_figures(directory), (directory / "settings.json").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "build_train_steps", lambda *_: pytest.fail("steps were compiled"))
    for _ in range(2):
        assert enwik8.main(["--resume"]) == 0
        printed, error = capsys.readouterr()
        assert f"run       runs/{directory.name}\n" in printed
        assert "training is already finished at step 12; give a larger --steps to train longer" in printed
        assert error == ""
    assert (read_figures(directory), (directory / "settings.json").read_text()) == before


@pytest.mark.slow
def test_a_finished_run_trains_on_at_a_tenth_of_the_rate(whole_run, text_file, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole_run.directory, directory)
    assert enwik8.main(resume(directory, "--steps=18")) == 0
    config = runs.RunFiles(directory).read_settings().config
    assert (config.steps, config.decay_steps) == (18, 12)
    rates = [training.learning_rates(config)(step) for step in range(12, 18)]
    np.testing.assert_allclose(rates, config.learning_rate / 10, rtol=1e-6)
    once = start(tmp_path / "once", f"--data={text_file}", "--steps=18", "--decay-steps=12")
    assert_equal(read_state(directory), read_state(once.directory))
    assert_equal(read_figures(directory), read_figures(whole_run.directory) | read_figures(once.directory))


def test_settings_that_are_lost_are_given_again(whole_run, text_file, tmp_path, capsys):
    directory, options = tmp_path / "run", [*TINY, f"--data={text_file}", "--resume"]
    shutil.copytree(whole_run.directory, directory)
    (directory / "settings.json").unlink()
    assert enwik8.main([*options, f"--run={directory}", "--dim-head=4"]) == 2
    error = capsys.readouterr().err
    assert "got other values for --dim-head" in error
    assert error.count("\n") == 1
    assert enwik8.main([*options, f"--run={directory}"]) == 0
    settings = [json.loads((run / "settings.json").read_text()) for run in (directory, whole_run.directory)]
    assert settings[0] == settings[1]


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(whole_run, tmp_path, capsys):
    directory = tmp_path / "run"
    directory.mkdir()
    shutil.copy(whole_run.directory / "settings.json", directory)
    assert enwik8.main(resume(directory)) == 0
    assert "resuming  from the start" in capsys.readouterr().out
    assert_equal(read_state(directory), read_state(whole_run.directory))
    assert_equal(read_figures(directory), read_figures(whole_run.directory))


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        '{"step": 4}',
        '{"step": 4, "split": ["train"], "bits_per_byte": 1.0}',
        '{"step": 4, "split": "train", "bits_per_byte": null}',
    ],
)
def test_lines_that_are_no_figures_are_dropped_when_a_run_goes_on(line, whole_run, tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = (whole_run.directory / "metrics.jsonl").read_text()
    path.write_text(f"{line}\n{whole}")
    runs.Journal(path, 12)
    assert path.read_text() == whole


# ---- runs that cannot start or resume

CANNOT_START = {
    "no run to resume": (["--resume"], "give --run DIR"),
    "nothing to resume": (["--resume", "--run={tmp}/none"], "must name a run"),
    "damaged settings": (["--resume", "--run={tmp}/damaged"], "delete it and give the run's options again"),
    "settings of another version": (["--resume", "--run={tmp}/version"], "fields of another version: dim, width"),
    "no checkpoint": (["--resume", "--run={tmp}/empty"], "needs an intact checkpoint"),
    "fewer steps than are done": (
        ["--resume", "--run={run}", "--steps=11"],
        "at least 12, the steps already done",
    ),
    "a directory with other figures": (["--run={tmp}/figures"], "with metrics.jsonl; name another"),
    "a name that is too long": (["--run=" + "x" * 300], "File name too long"),
    "a name with a zero byte": (["--run=a\0b"], "--run must name a directory"),
    "other options": (["--resume", "--run={run}", "--dim=32", "--qk-norm"], "other values for --dim, --qk-norm"),
    "other bytes": (["--resume", "--run={run}", "--data={tmp}/other.txt"], "same --data"),
    "a run that is there already": (["--run={run}"], "add --resume"),
    "a directory below a file": (["--run={tmp}/other.txt/run"], "can be written"),
    "options that the library refuses": (["--run={tmp}/new", "--dim-head=7"], "dim_head"),
    "layers without a width": (["--run={tmp}/new", "--ff-mult=0.001"], "hidden width of at least 1, got 0.001"),
    "a sample that is too long": (["--abs-pos-emb", "--sample-bytes=20", "--seq-len=80"], "at most 16"),
    "a model that no machine holds": (["--dim=1000000"], "at most 68,719,476,736 parameters, got 8,"),
    "a batch that no machine holds": (["--accumulate=1000000000"], "one call must have at most 1,073,741,824 tokens"),
    "windows of too few layers": (
        ["--depth=3", "--windows=8,global"],
        "one per layer with --depth 3, got 8,global",
    ),
    "no module for TensorBoard": (["--run={tmp}/new", "--tensorboard"], "pip install tensorboardX"),
    "no module for Weights & Biases": (["--run={tmp}/new", "--wandb=project"], "pip install wandb"),
}


@pytest.mark.parametrize("case", CANNOT_START)
def test_a_run_that_cannot_start_says_why_on_one_line_and_leaves_nothing(
    case, whole_run, tmp_path, monkeypatch, capsys
):
    options, phrase = CANNOT_START[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "other.txt").write_bytes(TEXT[::-1])
    settings = (whole_run.directory / "settings.json").read_text()
    for name, text in {
        "damaged": settings[:-100],
        "version": settings.replace('"dim":', '"width":'),
        "empty": settings,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(text)
    (tmp_path / "figures").mkdir()
    for name in ("empty", "figures"):
        (tmp_path / name / "metrics.jsonl").write_text("{}\n")
    fresh = [] if "--resume" in options else [*TINY, "--data=other.txt"]
    assert enwik8.main([*fresh, *(option.format(tmp=tmp_path, run=whole_run.directory) for option in options)]) == 2
    error = capsys.readouterr().err
    assert phrase in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "figures" / "metrics.jsonl").read_text() == "{}\n"
    assert (whole_run.directory / "settings.json").read_text() == settings


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (MemoryError("21 PiB"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 TiB"), True),
        (jax.errors.JaxRuntimeError("INTERNAL"), False),
    ],
    ids=["of the host", "of a device", "of another kind"],
)
def test_a_run_without_enough_memory_says_so_and_other_errors_are_not_hidden(
    error, is_told, text_file, tmp_path, monkeypatch, capsys
):
    def fail(run):
        raise error

    monkeypatch.setattr(enwik8, "perform", fail)
    if not is_told:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            enwik8.main(command(tmp_path / "run", text_file))
        return
    assert enwik8.main(command(tmp_path / "run", text_file)) == 1
    assert re.fullmatch(r".*out of memory \(.*\); give a smaller model.*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_a_call_takes_no_more_steps_than_lie_between_figures(text_file, tmp_path):
    assert enwik8.main(command(tmp_path / "run", text_file, f"--steps-per-call={2**31 - 1}")) == 0


@pytest.mark.parametrize("options", [["--resume"], []], ids=["resumed", "new"])
def test_a_directory_that_another_process_trains_in_is_refused(options, whole_run, text_file, tmp_path, capsys):
    pytest.importorskip("fcntl")
    directory = tmp_path / "run"
    if options:
        shutil.copytree(whole_run.directory, directory)
    with runs.RunFiles(directory).claim():
        assert enwik8.main(command(directory, text_file, *options)) == 2
    assert "no other process trains in" in capsys.readouterr().err
    assert (directory / "settings.json").exists() == bool(options)
    if options:
        assert enwik8.main(resume(directory)) == 0


def test_figures_that_cannot_be_read_stop_a_run_that_would_go_on(whole_run, tmp_path, capsys):
    directory = shutil.copytree(whole_run.directory, tmp_path / "run")
    (directory / "metrics.jsonl").unlink()
    (directory / "metrics.jsonl").mkdir()
    assert enwik8.main(resume(directory)) == 2
    assert "metrics.jsonl' must be readable and writable, got Is a directory; move it away" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_diverges_says_so_and_its_last_checkpoint_is_whole(text_file, tmp_path, capsys):
    directory = tmp_path / "run"
    options = ["--learning-rate=1e30", "--warmup-steps=0", "--log-every=1"]
    assert enwik8.main(command(directory, text_file, *options)) == 1
    error = capsys.readouterr().err
    assert re.search(r"the loss is not finite after step \d+; start a new run with a lower --learning-rate", error)
    assert error.count("\n") == 1
    assert int(read_state(directory).step) == 0
    assert all(np.isfinite(list(read_figures(directory).values())))


def test_a_state_whose_validation_is_not_finite_is_not_kept(text_file, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    nothing = evaluation.Score(float("nan"), 1)
    monkeypatch.setattr(trainer, "build_evaluation", lambda *_: lambda *_: nothing)
    assert enwik8.main(command(directory, text_file)) == 1
    assert "the validation loss is not finite after step 6; start a new run" in capsys.readouterr().err
    assert int(read_state(directory).step) == 0


# ---- a temporarily full disk

NO_ROOM = OSError(28, "No space left on device")


def failing(monkeypatch, owner, name, fails):
    """Make calls of a function fail with a full disk if `fails` is true of their number, counted from 0."""
    work, calls = getattr(owner, name), iter(range(1000))

    def attempt(*args, **options):
        if fails(next(calls)):
            raise NO_ROOM
        return work(*args, **options)

    monkeypatch.setattr(owner, name, attempt)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "call"), [("save", 1), ("wait_until_finished", 1)], ids=["at once", "in the background"]
)
def test_training_goes_on_while_nothing_can_be_kept_and_keeps_it_later(
    method, call, whole_run, text_file, tmp_path, monkeypatch, capsys
):
    directory = tmp_path / "run"
    failing(monkeypatch, ocp.CheckpointManager, method, lambda number: number == call)
    failing(monkeypatch, runs, "append", lambda number: number < 3)
    assert enwik8.main(command(directory, text_file)) == 0
    errors = capsys.readouterr().err.splitlines()
    assert sum("a checkpoint could not be written (No space left on device)" in line for line in errors) == 1
    assert sum("metrics cannot be written" in line and "tries again" in line for line in errors) == 1
    assert len(errors) == 2
    figures = read_figures(directory)
    assert list(figures) == list(read_figures(whole_run.directory))
    assert_equal(figures, read_figures(whole_run.directory))
    assert_equal(read_state(directory), read_state(whole_run.directory))


@pytest.mark.slow
def test_a_run_whose_last_state_is_not_kept_says_so_and_fails(text_file, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    failing(monkeypatch, ocp.CheckpointManager, "save", lambda number: number > 1)
    assert enwik8.main(command(directory, text_file)) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert "the state after step 12 could not be saved and the newest checkpoint is of step 6; free disk space" in last
    monkeypatch.undo()
    assert int(read_state(directory).step) == 6


@pytest.mark.slow
def test_a_run_whose_figures_are_not_kept_fails_though_its_state_is(text_file, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    failing(monkeypatch, runs, "append", lambda number: number > 1)
    assert enwik8.main(command(directory, text_file)) == 1
    assert "metrics cannot be written" in capsys.readouterr().err
    assert list(read_figures(directory)) == [(4, "train"), (6, "train")]
    assert int(read_state(directory).step) == 12


@pytest.mark.slow
def test_samples_and_pictures_that_cannot_be_written_do_not_stop_a_run(text_file, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"

    def stand_in_the_way():
        (directory / "curve.png").mkdir()
        (directory / "samples").write_text("a file where the directory should be")

    when_drawing(monkeypatch, 1, stand_in_the_way)
    assert enwik8.main(command(directory, text_file)) == 0
    errors = capsys.readouterr().err
    assert errors.count("could not be saved (File exists)") == 2


@pytest.mark.parametrize("written", range(5))
def test_a_line_is_appended_whole_or_not_at_all(written, tmp_path, monkeypatch):
    path = tmp_path / "lines"
    path.write_bytes(b"first\n")

    class Full(io.FileIO):
        """A file with room for `written` more bytes."""

        left = written

        def write(self, content):
            if not self.left:
                raise NO_ROOM
            count, self.left = super().write(content[: self.left]), 0
            return count

    monkeypatch.setattr(files, "open", lambda path, mode, buffering: Full(path, mode), raising=False)
    with pytest.raises(OSError, match="No space"):
        files.append(path, b"second\n")
    assert path.read_bytes() == b"first\n"


# ---- compiled programs


@pytest.fixture
def users_cache(tmp_path, monkeypatch):
    """A user's cache of this test's own, with JAX's compilation cache on; runs only draw their initial state."""

    def draw(run):
        jax.jit(functools.partial(training.initial_state, run.config))()
        return 0

    with compiled_in(None):
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(enwik8, "keep_compiled", runs.keep_compiled)
        monkeypatch.setattr(enwik8, "perform", draw)
        yield tmp_path / "cache" / "flax_local_attention" / "compiled"


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_run(users_cache, text_file, tmp_path):
    kept = []
    for name in "ab":
        jax.clear_caches()
        assert enwik8.main(command(tmp_path / name, text_file)) == 0
        kept.append(sorted(path.name for path in users_cache.glob("*-cache")))
    assert any("initial_state" in name for name in kept[0])
    assert kept[1] == kept[0]


def test_the_flag_is_heard_before_the_environment_and_that_before_the_users_cache(users_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "environment"))  # as JAX_COMPILATION_CACHE_DIR does
    runs.keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "environment")
    runs.keep_compiled(tmp_path / "flag")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "flag")
    assert not users_cache.exists()


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_does_not_stop_a_run(users_cache, text_file, tmp_path, capsys):
    (tmp_path / "file").write_text("where the directory should be")
    options = command(tmp_path / "run", text_file, f"--compilation-cache={tmp_path / 'file' / 'below'}")
    assert enwik8.main(options) == 0
    assert "name another --compilation-cache" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir is None
