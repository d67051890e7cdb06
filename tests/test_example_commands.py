"""The commands that read a run: `generate` continues a prompt, `evaluate` scores a split; neither changes it."""

import io
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import enwik8, screen
from examples.checkpoints import Checkpoints
from examples.runs import RunFiles, Settings
from examples.training import build_model
from flax_local_attention import generate
from tests.example_runs import TEXT, read_figures, read_state, start, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def worse_run(compiled_once, text_file, tmp_path_factory):
    """A run whose newest checkpoint is not its best: its parameters are all zero."""
    run = start(tmp_path_factory.mktemp("worse") / "run", f"--data={text_file}", "--steps=18", "--decay-steps=12")
    checkpoints = Checkpoints(run.directory / "checkpoints", pytest.fail)
    about = checkpoints.about(18)
    del about["digests"], about["bits"]
    worse = jax.tree.map(lambda leaf: leaf * 0, read_state(run.directory))
    checkpoints.save(24, worse, about, 8.0)
    checkpoints.close()
    return run.directory


def listing(directory):
    """Return the paths in a directory with their sizes and times."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in [directory, *directory.rglob("*")]}


def read_only(directory, *command):
    """Run a command and assert that it does not change a directory."""
    before = listing(directory)
    status = enwik8.main([*command, f"--run={directory}"])
    assert listing(directory) == before
    return status


# ---- generate


@pytest.mark.slow
def test_generate_prints_its_prompt_and_what_the_model_writes(whole_run, capsys):
    command = ["generate", "--prompt=the quick", "--length=20", "--temperature=0"]
    assert read_only(whole_run.directory, *command) == 0
    printed, told = capsys.readouterr()
    config, state = tiny_config(), read_state(whole_run.directory)
    prompt = jnp.asarray([list(b"the quick")])
    tokens, _ = generate(build_model(config), {"params": state.params}, prompt, 20, temperature=0.0)
    assert printed == screen.printable(b"the quick" + bytes(tokens[0].tolist())) + "\n"
    assert told.startswith(f"{whole_run.directory}, step 12, {read_figures(whole_run.directory)[12, 'validation']:.3f}")
    assert told.count("\n") == 1


def test_generate_prints_each_byte_as_soon_as_it_is_drawn(whole_run, monkeypatch):
    class Printed(io.StringIO):
        """Records the number of bytes sampled before each text is printed."""

        def write(self, text):
            if text:
                order.append(text)
            return super().write(text)

    order = []

    def stream(*_, **__):
        for byte in "né".encode():
            order.append(byte)
            yield np.asarray([byte])

    monkeypatch.setattr(enwik8, "stream", stream)
    monkeypatch.setattr(sys, "stdout", Printed())
    assert enwik8.main(["generate", f"--run={whole_run.directory}", "--prompt=a", "--length=3"]) == 0
    assert order == ["a", ord("n"), "n", 0xC3, 0xA9, "é", "\n"]


def test_an_interrupt_of_generate_ends_it_without_a_word_of_training(whole_run, monkeypatch, capsys):
    def stream(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(enwik8, "stream", stream)
    assert enwik8.main(["generate", f"--run={whole_run.directory}"]) == 130
    assert capsys.readouterr().err.endswith("enwik8.py: interrupted\n")


@pytest.mark.slow
def test_a_seed_draws_the_same_again_and_rules_narrow_what_is_drawn(whole_run, capsys):
    def drawn(*options):
        assert (
            enwik8.main(["generate", f"--run={whole_run.directory}", "--prompt=the brown", "--length=20", *options])
            == 0
        )
        return capsys.readouterr().out

    warm = drawn("--temperature=1", "--seed=3")
    assert drawn("--temperature=1", "--seed=3") == warm
    assert drawn("--temperature=1", "--seed=4") != warm
    cold = drawn("--temperature=0")
    assert [drawn("--temperature=1", rule) for rule in ("--top-k=1", "--top-p=0.0001", "--min-p=1")] == [cold] * 3
    assert drawn("--seed=3") == drawn(f"--temperature={tiny_config().temperature}", "--seed=3")


@pytest.mark.slow
def test_generate_takes_the_newest_run_and_its_best_checkpoint_or_the_newest(worse_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(worse_run, tmp_path / "runs" / "fox")
    monkeypatch.chdir(tmp_path)
    for options, step in (([], 18), (["--checkpoint=best"], 18), (["--checkpoint=newest"], 24)):
        assert enwik8.main(["generate", "--length=1", *options]) == 0
        assert capsys.readouterr().err.startswith(f"runs/fox, step {step}, ")


def test_a_damaged_checkpoint_is_not_generated_from_nor_moved(worse_run, tmp_path, capsys):
    directory = shutil.copytree(worse_run, tmp_path / "run")
    shutil.rmtree(directory / "checkpoints" / "24" / "state")
    assert read_only(directory, "generate", "--length=1", "--checkpoint=newest") == 0
    damaged, used = capsys.readouterr().err.splitlines()
    assert damaged.startswith("enwik8.py: the checkpoint of step 24 is damaged")
    assert ", step 18, " in used


REFUSED = {
    "an empty prompt": (["generate", "--prompt="], "--prompt must have at least one byte"),
    "no run": (["generate", "--run={tmp}/none"], "must name a run"),
    "no newest run": (["evaluate"], "without --run, 'runs' must hold a run, got none"),
    "no checkpoint": (["generate", "--run={tmp}/empty"], "must have an intact checkpoint"),
    "other bytes": (["evaluate", "--data={tmp}/other.txt"], "same --data"),
    "no bytes": (["evaluate", "--data={tmp}/none.txt"], "--data must name a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_said_on_one_line(case, whole_run, tmp_path, monkeypatch, capsys):
    options, phrase = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_bytes(TEXT[::-1])
    (tmp_path / "empty").mkdir()
    shutil.copy(whole_run.directory / "settings.json", tmp_path / "empty")
    named = any("--run" in option for option in options) or case == "no newest run"
    given = [] if named else [f"--run={whole_run.directory}"]
    assert enwik8.main([*(option.format(tmp=tmp_path) for option in options), *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(str(whole_run.directory))]
    assert [phrase in line for line in lines] == [True]


@pytest.mark.slow
def test_text_ends_where_the_positions_of_a_model_end(text_file, tmp_path, capsys):
    config, _, state = tiny_model("--abs-pos-emb", "--sample-bytes=0")
    files = RunFiles(tmp_path / "run")
    settings = Settings(config, text_file, "fingerprint")
    files.directory.mkdir()
    files.save_settings(settings)
    checkpoints = Checkpoints(files.checkpoints, pytest.fail)
    checkpoints.save(1, state, settings.to_json() | {"seconds": 0.0, "losses": []}, None)
    checkpoints.close()
    options = ["generate", f"--run={files.directory}", "--prompt=0123456789"]
    assert enwik8.main([*options, "--length=23"]) == 2
    assert "32 positions, got 10 and 23 bytes; give fewer" in capsys.readouterr().err
    assert enwik8.main([*options, "--length=22"]) == 0


# ---- evaluate


@pytest.mark.slow_but("validation")
@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_scores_a_split_as_the_run_did(split, whole_run, capsys):
    assert read_only(whole_run.directory, "evaluate", f"--split={split}") == 0
    scored, beside = capsys.readouterr().out.split("\ncompared  ")
    bits = read_figures(whole_run.directory)[12, split]
    assert scored.startswith(f"scored    {bits:.4f} bits/byte of 674 bytes of fox.txt, {split}, each predicted from ")
    assert beside.startswith(f"{split} {bits:.3f}; gzip ")


def test_evaluate_scores_the_test_split_with_the_best_model(worse_run, capsys):
    assert read_only(worse_run, "evaluate") == 0
    assert capsys.readouterr().out.startswith(f"scored    {read_figures(worse_run)[18, 'test']:.4f} bits/byte")


def test_printed_text_holds_no_terminal_commands():
    assert screen.printable("é\n".encode() + b"\x1b[2J\x07\xff\xc2\x9b") == "é\n" + "�[2J" + "�" * 3


def test_a_models_text_is_marked_and_fits_a_page():
    lines = screen.quote("word " * 60 + "\n\nend").split("\n")
    assert all(line.startswith("  |") and len(line) <= screen.COLUMNS for line in lines)
    assert lines[-2:] == ["  |", "  | end"]


@pytest.mark.parametrize(("seconds", "expected"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (14706, "4:05:06")])
def test_a_time_is_shown_as_on_a_clock(seconds, expected):
    assert screen.format_duration(seconds) == expected


KINDS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12}


@pytest.mark.parametrize("kind", [*KINDS, "cpu"])
def test_the_peak_of_a_device_is_that_of_its_kind_and_known_for_bfloat16_alone(kind, monkeypatch):
    monkeypatch.setattr(screen.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert screen.peak_flops("bfloat16") == KINDS.get(kind)
    assert screen.peak_flops("float32") is None
