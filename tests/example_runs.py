"""Runs of the example that several test files use, and readers of their files."""

import contextlib
import functools
import io
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from examples import devices, enwik8, training
from examples.checkpoints import Checkpoints, newest_first
from examples.config import CPU_DEMO, Config
from examples.flags import choose_config, train_parser
from examples.runs import RunFiles

ROOT = Path(__file__).resolve().parents[1]
TEXT = b"the quick brown fox jumps over the lazy dog. " * 300
DATA = np.frombuffer(TEXT, np.uint8)
TINY = [
    "--preset=cpu-demo", "--dim=16", "--depth=1", "--heads=2", "--dim-head=8", "--windows=8", "--seq-len=32",
    "--batch-size=3", "--accumulate=2", "--steps=12", "--warmup-steps=2", "--learning-rate=0.02", "--log-every=4",
    "--eval-every=6", "--sample-bytes=5", "--optimizer=adamw", "--data-parallel=1",
]  # fmt: skip


class WholeRun(NamedTuple):
    """The directory and the output of an uninterrupted run; no test may change it."""

    directory: Path
    printed: str


def tiny_config(*more: str) -> Config:
    """Return the configuration of `TINY` with more flags."""
    options = vars(train_parser("", None).parse_args([*TINY, *more]))
    given = {name: value for name, value in options.items() if name in Config.__dataclass_fields__}
    return choose_config(CPU_DEMO, given, None)


@functools.cache
def tiny_model(*more: str):
    """Return a configuration, its model and its initial state."""
    config = tiny_config(*more)
    state = jax.jit(functools.partial(training.initial_state, config))()
    return config, training.build_model(config), state


def one_device():
    """Return a mesh of one device."""
    return devices.choose_mesh(1, 1, 1, tiny_config())


def mesh_of(shape, config):
    """Return a mesh of a shape, or skip the test if there are too few devices."""
    if jax.device_count() < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} devices")
    return devices.choose_mesh(*shape, config)


def start(directory: Path, *options: str) -> WholeRun:
    """Train `TINY` to its last step."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert enwik8.main([*TINY, f"--run={directory}", *options]) == 0
    return WholeRun(directory, printed.getvalue())


def read_figures(directory: Path) -> dict[tuple[int, str], float]:
    """Return the bits per byte of a run by step and split; no pair occurs twice."""
    entries = list(map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()))
    found = {(entry["step"], entry["split"]): entry["bits_per_byte"] for entry in entries}
    assert len(found) == len(entries)
    return found


def state_template(config: Config, mesh=None):
    """Return the shapes, dtypes and shardings of a state."""
    shapes = jax.eval_shape(functools.partial(training.initial_state, config))
    return devices.with_shardings(shapes, mesh or one_device())


def read_state(directory: Path):
    """Return the newest state of a run."""
    files = RunFiles(directory)
    checkpoints = Checkpoints(files.checkpoints, pytest.fail, read_only=True)
    return checkpoints.restore(newest_first, state_template(files.read_settings().config), lambda _: None).state


def assert_equal(found, expected):
    """Assert that trees are equal: to the last bit on a CPU, closely on a GPU, which adds in any order."""
    close = {"rtol": 0, "atol": 0} if jax.default_backend() == "cpu" else {"rtol": 1e-3, "atol": 1e-6}
    jax.tree.map(functools.partial(np.testing.assert_allclose, **close), found, expected)


@contextlib.contextmanager
def compiled_in(directory: Path | None):
    """Compile quickly, and keep programs in a directory of the tests' own; None keeps none."""
    settings = {
        "jax_enable_compilation_cache": directory is not None,
        "jax_compilation_cache_dir": None if directory is None else str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    quick = "jax_disable_most_optimizations"
    before[quick], settings[quick] = jax.config.read(quick), True
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enwik8, "keep_compiled", lambda _: None)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
