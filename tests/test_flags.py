"""Every field of a configuration is a flag with a help text, and values out of range are refused."""

import dataclasses
import json
import re
import sys
import types

import pytest

from examples import config, enwik8, flags, loggers
from examples.config import CPU_DEMO, PRESETS, Config
from examples.flags import UsageError, choose_config
from tests.example_runs import TINY, read_figures, tiny_config

PARSERS = {"train": flags.train_parser, "generate": flags.generate_parser, "evaluate": flags.evaluate_parser}
FIELDS = dataclasses.fields(Config)


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_has_a_help_that_fits_a_page(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    parser = PARSERS[name]("python -m examples.enwik8", enwik8.__doc__)
    assert all(action.help for action in parser._actions)
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 120
    assert all(option in text for action in parser._actions for option in action.option_strings)


@pytest.mark.parametrize("command", ["--help", "train --help", "generate --help", "evaluate --help"])
def test_help_is_shown_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        enwik8.main(command.split())
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ")
    assert ("enwik8.py --resume" in printed) == (command in ("--help", "train --help"))


OTHER_VALUES = {"windows": "8,global", "dtype": "bfloat16", "optimizer": "muon"}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_is_a_flag_whose_help_has_its_values_in_the_presets(field):
    parser = flags.train_parser("", None)
    (action,) = [action for action in parser._actions if action.dest == field.name]
    assert field.metadata["meaning"] in action.help
    for preset in PRESETS.values():
        assert config.format_value(getattr(preset, field.name)) in action.help
    name = flags.flag(field.name)
    given = [name] if field.type is bool else [f"{name}={OTHER_VALUES.get(field.name, 7)}"]
    options = vars(parser.parse_args(given))
    assert {option for option in options if option in Config.__dataclass_fields__} == {field.name}
    before = dataclasses.replace(CPU_DEMO, depth=2, windows=(9,), optimizer="adamw")
    after = choose_config(before, {field.name: options[field.name]}, None)
    assert getattr(after, field.name) != getattr(before, field.name)


def test_fields_that_are_switched_on_may_be_switched_off():
    options = vars(flags.train_parser("", None).parse_args(["--no-abs-pos-emb"]))
    assert choose_config(PRESETS["original"], {"abs_pos_emb": options["abs_pos_emb"]}, None).abs_pos_emb is False


def test_a_configuration_learns_like_a_preset_whatever_it_shows():
    demo = PRESETS["cpu-demo"]
    begun = dataclasses.replace(demo, decay_steps=demo.steps)
    assert begun.learns_like(demo)
    assert dataclasses.replace(begun, log_every=7, sample_bytes=0).learns_like(demo)
    for change in ({"steps": demo.steps + 1}, {"dim": 2 * demo.dim}, {"decay_steps": 5}, {"seed": 1}):
        assert not dataclasses.replace(begun, **change).learns_like(demo)


@pytest.mark.parametrize("name", [field.name for field in FIELDS if field.metadata.get("all")])
def test_all_is_a_value_of_fields_without_a_limit(name):
    options = vars(flags.train_parser("", None).parse_args([f"{flags.flag(name)}=all"]))
    assert options[name] is None


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_configuration_is_read_as_it_was_written(preset):
    mixed = dataclasses.replace(preset, depth=3, windows=(64, None, 7), kv_heads=1)
    for value in (preset, mixed):
        assert Config.from_json(json.loads(json.dumps(value.to_json()))) == value
    assert mixed.to_json()["windows"] == "64,global,7"
    assert mixed.layer_windows == (64, None, 7)
    alike = dataclasses.replace(preset, depth=3, windows=(64,))
    assert alike.layer_windows == (64, 64, 64)


@pytest.mark.parametrize(("name", "value"), [("dim", "16"), ("learning_rate", 1), ("windows", 8), ("kv_heads", 1.5)])
def test_a_configuration_with_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(ValueError, match=f"values of the wrong type: {name}"):
        Config.from_json(CPU_DEMO.to_json() | {name: value})


@pytest.mark.parametrize(
    "option",
    [
        "--steps=0",
        "--run=",
        "--learning-rate=nan",
        "--dim=-1",
        "--dim=x",
        "--dim=all",
        "--dtype=int8",
        "--optimizer=sgd",
        "--seed=-1",
        f"--seed={2**63}",
        f"--steps={10**14}",
        "--depth=1001",
        f"--windows=8,{2**31}",
        f"--sample-bytes={10**9}",
        "--ff-mult=1e30",
        "--learning-rate=inf",
        "--seq-len=1.5",
        "--windows=0",
        "--windows=8,,8",
        "--windows=all",
        "--window-size=8",
        "--preset=cpu",
        "--tensor-parallel=0",
        "--process=-1",
        "--coordinator=host",
        "--coordinator=:80",
    ],
)
def test_an_option_out_of_range_is_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        enwik8.main([option])
    assert stopped.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--length=0", "--temperature=-1", "--top-k=0", "--top-p=0", "--checkpoint=worst"])
def test_an_option_of_generate_out_of_range_is_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        enwik8.main(["generate", option])
    assert stopped.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_resumed_run_may_change_what_is_shown_and_how_long_it_trains_alone():
    saved = tiny_config()
    shown = {"steps": 40, "log_every": 1, "eval_every": 2, "sample_bytes": 0, "temperature": 0.0, "steps_per_call": 3}
    assert choose_config(CPU_DEMO, shown, saved) == dataclasses.replace(saved, **shown)
    with pytest.raises(UsageError, match=re.escape("other values for --decay-steps, --seed; leave them out")):
        choose_config(CPU_DEMO, {"decay_steps": 40, "seed": 1, "dim": 16}, saved)
    assert set(config.MAY_CHANGE) == set(shown)


def test_the_decay_of_a_resumed_run_is_all_the_steps_that_it_was_first_given():
    begun = choose_config(CPU_DEMO, {"steps": 12, "decay_steps": None}, None)
    longer = choose_config(CPU_DEMO, {"steps": 40}, begun)
    assert longer.decay_steps == 12
    assert choose_config(CPU_DEMO, {"decay_steps": None}, longer) == longer


# ---- loggers


class FakeWriter:
    """A stand-in for TensorBoard's writer and for a run of Weights & Biases."""

    def __init__(self, directory=None):
        self.directory, self.scalars, self.flushed, self.is_closed = directory, [], 0, False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        self.flushed = len(self.scalars)

    def close(self):
        self.is_closed = True

    finish = close

    def log(self, scalars):
        self.scalars += [(name, value, scalars["step"]) for name, value in scalars.items() if name != "step"]


ENTRIES = [
    {"step": 4, "split": "train", "bits_per_byte": 5.5, "tokens_per_second": 90.0, "share_of_peak": None},
    {"step": 6, "split": "validation", "bits_per_byte": 5.0},
]
SCALARS = [("bits_per_byte/train", 5.5, 4), ("tokens_per_second", 90.0, 4), ("bits_per_byte/validation", 5.0, 6)]


def test_tensorboard_is_given_every_figure_at_once(tmp_path, monkeypatch):
    writers = []

    def make(directory):
        writers.append(FakeWriter(directory))
        return writers[-1]

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=make))
    logger = loggers.tensorboard_logger(tmp_path)
    for entry in ENTRIES:
        logger.log(entry)
    (writer,) = writers
    assert (writer.directory, writer.scalars, writer.flushed) == (str(tmp_path), SCALARS, 3)
    assert not writer.is_closed
    logger.close()
    assert writer.is_closed


def test_a_place_that_takes_no_figures_is_told_of_once_and_costs_no_run(capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    logger = loggers.forgiving(loggers.Logger(full, full), "TensorBoard")
    logger.log({"step": 10})
    logger.log({"step": 20})
    logger.close()
    expected = "enwik8.py: TensorBoard did not log all metrics (No space left on device)\n"
    assert capsys.readouterr().err == expected


def test_weights_and_biases_go_on_with_the_run_of_the_directory(tmp_path, monkeypatch):
    run, given = FakeWriter(), []

    def init(**options):
        given.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    logger = loggers.wandb_logger("fox", tmp_path / "run-1", {"dim": 3})
    for entry in ENTRIES:
        logger.log(entry)
    logger.close()
    assert run.is_closed
    assert run.scalars == SCALARS
    (options,) = given
    assert options["project"] == "fox"
    assert options["id"] == "run-1"
    assert options["resume"] == "allow"
    assert options["config"] == {"dim": 3}


def test_a_run_that_weights_and_biases_refuse_is_one_line(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("no\nkey")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UsageError, match="got no key; log in, or set WANDB_MODE=offline"):
        loggers.wandb_logger("fox", tmp_path, {})


def test_events_of_a_run_are_written_beside_it(compiled_once, text_file, tmp_path):
    pytest.importorskip("tensorboardX")
    directory = tmp_path / "run"
    assert enwik8.main([*TINY, f"--data={text_file}", f"--run={directory}", "--tensorboard"]) == 0
    (events,) = (directory / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(f"bits_per_byte/{split}".encode() in content for _, split in read_figures(directory))
