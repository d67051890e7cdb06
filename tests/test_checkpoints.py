"""A checkpoint is what was saved or is not used, whatever happens to its files; and the right ones are kept."""

import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples import enwik8
from examples.checkpoints import Checkpoints, DamagedError, digest_arrays, newest_first, reason
from tests.example_runs import ROOT, assert_equal, read_figures, read_state

pytestmark = pytest.mark.usefixtures("compiled_once")

STATE = {"kernel": jax.random.normal(jax.random.key(0), (50, 30)), "step": jnp.asarray(7)}
TEMPLATE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE)


def state_of(step):
    """Return a state whose values tell its step."""
    return STATE | {"step": jnp.asarray(step), "kernel": STATE["kernel"] * step}


def anything(about):
    """Accept any metadata."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory, pytest.fail)
    for step in (1, 2):
        checkpoints.save(step, state_of(step), {"word": f"of step {step}"}, bits=float(step))
    checkpoints.close()
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of `saved` for a test to damage."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


# ---- which checkpoints are kept

KEPT = {
    "the best is old": ([3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5]),
    "the best is new": ([3.0, 2.0, 1.0], [2, 3]),
    "some are not scored": ([None, 2.0, None, None, None], [2, 4, 5]),
    "none is scored": ([None] * 4, [3, 4]),
}


@pytest.mark.slow_but("the best is old")
@pytest.mark.parametrize("case", KEPT)
def test_the_newest_two_and_the_best_are_kept_also_when_a_run_goes_on(case, tmp_path):
    bits, expected = KEPT[case]
    for reopened in (False, True):
        directory = tmp_path / str(reopened)
        checkpoints = Checkpoints(directory, pytest.fail)
        for step, figure in enumerate(bits, start=1):
            checkpoints.save(step, STATE, {}, figure)
            if reopened:
                checkpoints.close()
                checkpoints = Checkpoints(directory, pytest.fail)
        assert checkpoints.finish()
        assert checkpoints.steps() == expected
        assert checkpoints.newest_saved == len(bits)
        assert checkpoints.best_bits() == min(filter(None, bits), default=np.inf)
        checkpoints.close()
        assert sorted(path.name for path in directory.iterdir()) == list(map(str, expected))


def test_a_step_that_is_there_is_not_saved_again(copied):
    checkpoints = Checkpoints(copied, pytest.fail)
    checkpoints.save(2, state_of(9), {"word": "another"}, None)
    checkpoints.close()
    found = Checkpoints(copied, pytest.fail).restore(newest_first, TEMPLATE, anything)
    assert (found.step, found.about["word"]) == (2, "of step 2")
    assert_equal(found.state, state_of(2))


def test_a_part_of_a_state_is_restored_and_verified_alone(copied):
    checkpoints = Checkpoints(copied, pytest.fail, read_only=True)
    found = checkpoints.restore(checkpoints.best_first, {"kernel": TEMPLATE["kernel"]}, anything)
    assert found.step == 1
    assert_equal(found.state, {"kernel": state_of(1)["kernel"]})


def test_what_is_kept_beside_a_state_is_checked_before_it_is_used(copied):
    def refuse(about):
        raise ValueError(about["word"])

    with pytest.raises(ValueError, match="of step 2"):
        Checkpoints(copied, pytest.fail).restore(newest_first, TEMPLATE, refuse)


def test_what_a_killed_save_left_is_removed_unless_the_directory_is_only_read(copied):
    left = copied / "3.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    Checkpoints(copied, pytest.fail, read_only=True)
    assert left.exists()
    assert Checkpoints(copied, pytest.fail).steps() == [1, 2]
    assert not left.exists()


# ---- damage


def zero(path):
    """Write zeros over 16 bytes in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(max(path.stat().st_size // 2 - 8, 0))
        file.write(bytes(16))


def cut(path):
    """Truncate a file in its middle."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def delete(path):
    """Delete a file or a directory with its contents."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def array_files(directory):
    """Return the directory of the arrays."""
    return largest_file(directory).parent


DAMAGE = {
    "16 bytes are zero": (zero, largest_file),
    "a file is cut off": (cut, largest_file),
    "a bit is flipped": (flip, largest_file),
    "a file is deleted": (delete, largest_file),
    "a directory is deleted": (delete, array_files),
    "the state is deleted": (delete, lambda directory: directory / "state"),
    "what is beside it is cut off": (cut, lambda directory: directory / "about" / "metadata"),
    "what is beside it is deleted": (delete, lambda directory: directory / "about"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_announced_and_put_aside_and_the_one_before_is_used(case, copied):
    damage, choose = DAMAGE[case]
    damage(choose(copied / "2"))
    told = []
    checkpoints = Checkpoints(copied, told.append)
    found = checkpoints.restore(newest_first, TEMPLATE, anything)
    assert (found.step, found.about["word"], checkpoints.newest_saved) == (1, "of step 1", 1)
    assert_equal(found.state, state_of(1))
    (sentence,) = told
    assert sentence.startswith("the checkpoint of step 2 is damaged (")
    assert len(sentence) < 120
    assert not re.search("slice|Exception|KeyError", sentence)
    assert (copied.parent / "damaged" / "2-1").is_dir()
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state_of(2), {"word": "anew"}, None)
    checkpoints.close()
    assert Checkpoints(copied, pytest.fail).restore(newest_first, TEMPLATE, anything).about["word"] == "anew"


@pytest.mark.slow_but("flip")
@pytest.mark.parametrize("damage", [zero, cut, flip, delete])
def test_whatever_file_is_damaged_a_state_is_the_one_that_was_saved(damage, saved, tmp_path):
    """Some files are not needed; orbax may read the state without them."""
    names = sorted(path.relative_to(saved) for path in (saved / "2").rglob("*") if path.is_file())
    assert len(names) > 8
    for index, name in enumerate(names):
        directory = shutil.copytree(saved, tmp_path / str(index) / "checkpoints")
        damage(directory / name)
        told = []
        found = Checkpoints(directory, told.append).restore(newest_first, TEMPLATE, anything)
        assert found.step == 2 - len(told), name
        assert_equal(found.state, state_of(found.step))


@pytest.mark.slow_but("1")
@pytest.mark.parametrize("mask", [1, 8])
def test_what_is_kept_beside_a_state_is_what_was_saved(mask, saved, copied):
    path = copied / "2" / "about" / "metadata"
    content, expected = path.read_bytes(), Checkpoints(saved, pytest.fail).about(2)
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
        try:
            assert Checkpoints(copied, pytest.fail, read_only=True).about(2) == expected
        except DamagedError:
            continue


def test_nothing_is_moved_if_none_is_whole(copied):
    for step in ("1", "2"):
        flip(largest_file(copied / step))
    told = []
    assert Checkpoints(copied, told.append).restore(newest_first, TEMPLATE, anything) is None
    assert [sentence.split(" is ")[0] for sentence in told] == ["the checkpoint of step 2", "the checkpoint of step 1"]
    assert [path.name for path in copied.parent.iterdir()] == ["checkpoints"]


def test_a_checkpoint_that_a_run_under_way_replaces_is_not_called_damaged(copied):
    told = []
    checkpoints = Checkpoints(copied, told.append, read_only=True)
    (copied / "2").rename(copied / "3")
    found = checkpoints.restore(newest_first, TEMPLATE, anything)
    assert found is not None
    assert (found.step, told) == (3, [])


@pytest.mark.parametrize("read_only", [True, False])
def test_a_checkpoint_may_vanish_while_a_directory_is_opened_that_is_only_read(read_only, copied, monkeypatch):
    opened = ocp.CheckpointManager
    calls = iter([FileNotFoundError("2"), None, None])

    def vanishing(*arguments, **options):
        if error := next(calls):
            raise error
        return opened(*arguments, **options)

    monkeypatch.setattr(ocp, "CheckpointManager", vanishing)
    if read_only:
        assert Checkpoints(copied, pytest.fail, read_only=True).steps() == [1, 2]
    else:
        with pytest.raises(FileNotFoundError):
            Checkpoints(copied, pytest.fail)


def test_nothing_is_moved_where_it_is_only_read(copied):
    flip(largest_file(copied / "2"))
    checkpoints = Checkpoints(copied, [].append, read_only=True)
    assert checkpoints.restore(newest_first, TEMPLATE, anything).step == 1
    assert [path.name for path in copied.parent.iterdir()] == ["checkpoints"]


def test_checkpoints_of_one_step_that_are_damaged_again_lie_side_by_side(copied):
    for count in (1, 2):
        flip(largest_file(copied / "2"))
        checkpoints = Checkpoints(copied, [].append)
        checkpoints.restore(newest_first, TEMPLATE, anything)
        checkpoints.save(2, state_of(2), {"word": "anew"}, None)
        checkpoints.close()
        assert len(list((copied.parent / "damaged").iterdir())) == count


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole_run, tmp_path, capsys):
    directory = shutil.copytree(whole_run.directory, tmp_path / "run")
    flip(largest_file(directory / "checkpoints" / "12"))
    assert enwik8.main(["--resume", f"--run={directory}", "--data-parallel=1"]) == 0
    printed, error = capsys.readouterr()
    assert error.startswith("enwik8.py: the checkpoint of step 12 is damaged (")
    assert error.count("\n") == 1
    assert "resuming  from step 6 of 12" in printed
    assert (directory / "damaged" / "12-1").is_dir()
    assert_equal(read_state(directory), read_state(whole_run.directory))
    assert_equal(read_figures(directory), read_figures(whole_run.directory))


def test_a_damaged_checkpoint_that_cannot_be_moved_stops_a_run(whole_run, tmp_path, capsys):
    directory = shutil.copytree(whole_run.directory, tmp_path / "run")
    flip(largest_file(directory / "checkpoints" / "12"))
    (directory / "damaged").write_text("a file where the directory should be")
    assert enwik8.main(["--resume", f"--run={directory}", "--data-parallel=1"]) == 2
    _, last = capsys.readouterr().err.splitlines()
    assert "damaged checkpoints must be moved to" in last
    assert "File exists" in last


def test_a_run_without_a_whole_checkpoint_is_not_resumed_nor_changed(whole_run, tmp_path, capsys):
    directory = shutil.copytree(whole_run.directory, tmp_path / "run")
    for path in (directory / "checkpoints").iterdir():
        cut(largest_file(path))
    before = sorted(path for path in directory.rglob("*"))
    assert enwik8.main(["--resume", f"--run={directory}", "--data-parallel=1"]) == 2
    *damaged, last = capsys.readouterr().err.splitlines()
    assert ["is damaged" in line for line in damaged] == [True, True]
    assert "needs an intact checkpoint, got none" in last
    assert sorted(path for path in directory.rglob("*")) == before
    assert read_figures(directory) == read_figures(whole_run.directory)


RESTORES = """
import pathlib, sys
from tests.test_checkpoints import TEMPLATE, Checkpoints, anything, newest_first
told = lambda sentence: print(sentence, file=sys.stderr)
assert Checkpoints(pathlib.Path(sys.argv[1]), told).restore(newest_first, TEMPLATE, anything).step == 1
"""


@pytest.mark.slow
def test_a_damaged_checkpoint_is_a_sentence_and_not_what_orbax_says_of_each_array(copied):
    delete(largest_file(copied / "2"))
    command = [sys.executable, "-c", RESTORES, str(copied)]
    names = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=names, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint of step 2 is damaged (a file is missing or cut off)" in done.stderr.splitlines()
    assert "Encountered error" not in done.stderr
    assert "never awaited" not in done.stderr


# ---- saves that fail


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_save_that_fails_is_told_of_and_the_next_one_succeeds(method, copied, monkeypatch):
    told = []
    checkpoints = Checkpoints(copied, told.append)

    def fail(*args, **options):
        (copied / "3.orbax-checkpoint-tmp").mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, method, fail)
        if method == "save":
            checkpoints.save(3, state_of(3), {}, None)
        else:
            assert not checkpoints.finish()
    assert told == ["a checkpoint could not be written (No space left on device); the next validation tries again"]
    assert checkpoints.newest_saved == 2
    assert not (copied / "3.orbax-checkpoint-tmp").exists()
    checkpoints.save(4, state_of(4), {}, None)
    assert checkpoints.finish()
    assert checkpoints.newest_saved == 4


def test_what_went_wrong_is_told_in_a_few_words():
    assert reason(OSError(30, "Read-only file system")) == "Read-only file system"
    assert reason(ValueError("a [b]: Disk quota exceeded [os_error_code='EDQUOT'] c")) == "Disk quota exceeded"
    assert reason(ValueError("x DATA_LOSS: y")) == "a file has changed"
    assert reason(KeyError("two\nlines")) == r"KeyError: 'two\nlines'"
    assert len(reason(ValueError("long " * 100))) == 100
    assert isinstance(DamagedError(reason(ValueError())), Exception)


# ---- digests

DTYPES = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_, jnp.uint8]


def random_array(dtype, *shape):
    """Return an array of random bits without equal elements, if its dtype has enough values."""
    values = np.random.default_rng(3).permutation(256)[: np.prod(shape)].reshape(shape)
    return jnp.asarray(values % 2 == 1 if dtype == jnp.bool_ else values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_changes_with_any_bit(dtype):
    array = np.asarray(random_array(dtype, 3, 5))
    bits = array.view(np.uint8).reshape(-1)
    flips = [1] if dtype == jnp.bool_ else [1 << bit for bit in range(8)]
    flipped = [np.where(np.arange(bits.size) == place, bits ^ bit, bits) for place in range(bits.size) for bit in flips]
    variants = [array, *(changed.astype(np.uint8).view(array.dtype).reshape(3, 5) for changed in flipped)]
    digests = [int(digest_arrays(variant)) for variant in variants]
    assert len(set(digests)) == len(digests) == 1 + bits.size * len(flips)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_changes_with_the_order_of_elements(dtype):
    array = random_array(dtype, 4, 6)
    others = array[::-1], array[:, ::-1], jnp.roll(array, 1, 0), jnp.roll(array, 1, 1), array.T.reshape(4, 6)
    digests = [int(digest_arrays(variant)) for variant in (array, *others)]
    assert len(set(digests)) == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("model", "data")], ids=str)
def test_a_digest_is_the_same_on_any_mesh(dtype, spec):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    array = random_array(dtype, 4, 6)
    spread = jax.device_put(array, NamedSharding(mesh, spec))
    assert int(digest_arrays(spread)) == int(digest_arrays(array))


def test_digests_of_a_tree_are_its_arrays_own():
    digests = digest_arrays({"a": STATE["kernel"], "b": jnp.zeros(()), "c": jnp.zeros(2)})
    assert int(digests["a"]) == int(digest_arrays(STATE["kernel"]))
    assert len({int(digest) for digest in digests.values()}) == 3
