"""CI's pins satisfy `pyproject.toml`: the oldest equal its lower bounds, the newest are at or above them."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / ".ci/pins"

pytestmark = pytest.mark.skipif(not PINS.exists(), reason="pins are in the repository, not in a release")


def name_of(requirement):
    return re.split(r"[<>=\[]", requirement)[0].lower()


def numbers_of(version):
    return [int(number) for number in version.split(".")]


def bounds():
    """Return the lower bound of each library that users or tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = ("safetensors", "train", "tensorboard", "test")
    listed = [*project["dependencies"], *(line for extra in named for line in extras[extra])]
    return {name_of(line): line.split(">=")[1] for line in listed if not line.startswith("flax-local-attention")}


def pinned(name):
    return dict(line.split("==") for line in (PINS / f"{name}.txt").read_text().splitlines())


def test_the_oldest_pins_are_the_bounds():
    pins = pinned("oldest")
    for name, bound in bounds().items():
        assert f"{pins[name]}.".startswith(f"{bound}."), f"{name}: run .ci/pin, or raise the bound to {pins[name]}"


@pytest.mark.parametrize("python", ["python3.11", "python3.12"])
def test_the_newest_pins_are_admitted_and_not_the_oldest(python):
    newest, oldest = pinned(python), pinned("oldest")
    for name, bound in bounds().items():
        assert numbers_of(newest[name]) >= numbers_of(oldest[name]) >= numbers_of(bound), f"{name}: run .ci/pin"
    assert sum(newest[name] != oldest[name] for name in bounds()) > 5
