"""Damaged or hostile files, and what is not a file: one line says so, little is read, and nothing is lost."""

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest

import examples.from_torch
from examples import charts, corpus, enwik8, files, runs
from examples.checkpoints import Checkpoints, checksum
from examples.config import CPU_DEMO, Config
from examples.flags import UsageError
from flax_local_attention import LocalTransformer
from flax_local_attention.convert import from_torch, to_torch
from tests.example_runs import TEXT, TINY, tiny_config

pytestmark = pytest.mark.usefixtures("compiled_once")


def stand_in(kind, path):
    """Create something at a path that is not a regular file."""
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    else:
        path.symlink_to({"a device": "/dev/zero", "a link to nothing": "nothing", "a loop": path.name}[kind])


NO_FILES = ["a pipe", "a directory", "a device", "a link to nothing", "a loop"]


def peak_memory(run):
    """Return Python's peak memory in bytes while `run` runs."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- the corpus


def zipped(name="member", method=zipfile.ZIP_DEFLATED, content=TEXT):
    """Return a zip archive of one member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def with_header(**changes):
    """Return an archive of one member with bytes replaced in both headers, at an offset in the local one."""
    packed = bytearray(zipped())
    central = packed.rindex(b"PK\1\2") + 2  # the replaced fields are two bytes later there
    for offset, value in changes.items():
        for start in (0, central):
            packed[start + int(offset[2:])] = value
    return bytes(packed)


WHOLE = {
    "two members.gz": (gzip.compress(TEXT) + gzip.compress(TEXT), TEXT * 2),
    "zeros behind it.gz": (gzip.compress(TEXT) + bytes(100), TEXT),
    "a name with dots.zip": (zipped("../../outside"), TEXT),
    "a name from the root.zip": (zipped("/outside"), TEXT),
    "not packed.zip": (zipped(method=zipfile.ZIP_STORED), TEXT),
    "not UTF-8 \udcff.txt": (b"\xff\xfe" + TEXT, b"\xff\xfe" + TEXT),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_unusual_file_gives_its_bytes_and_writes_nothing(name, tmp_path, monkeypatch):
    content, expected = WHOLE[name]
    (tmp_path / "below").mkdir()
    path = tmp_path / "below" / name
    try:
        path.write_bytes(content)
    except OSError:
        pytest.skip("the file system has no such names")
    monkeypatch.chdir(tmp_path / "below")
    loaded = corpus.load_corpus(path)
    assert loaded.data.tobytes() == expected
    assert loaded.name.isprintable()
    assert [found.name for found in tmp_path.rglob("*")] == ["below", name]


BROKEN = {
    "garbage behind it.gz": (gzip.compress(TEXT) + b"garbage", "Not a gzipped file"),
    "a second member cut off.gz": (gzip.compress(TEXT) + gzip.compress(TEXT)[:-9], "ended before"),
    "a header alone.gz": (gzip.compress(TEXT)[:5], "ended before"),
    "encrypted.zip": (with_header(at6=1), "encrypted"),
    "of an unknown method.zip": (with_header(at8=97), "method 97"),
    "with a wrong checksum.zip": (with_header(at14=0, at15=0), "CRC"),
    "shorter than it says.zip": (with_header(at22=5, at23=0), "CRC"),
    "bzip2.zip": (zipped(method=zipfile.ZIP_BZIP2), "compressed by method 12, not by Deflate"),
    "LZMA.zip": (zipped(method=zipfile.ZIP_LZMA), "compressed by method 14, not by Deflate"),
    "directories alone.zip": (zipped("directory/", content=b""), "0 files"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_the_reason(name, tmp_path):
    content, phrase = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        corpus.CorpusError, match=f"(?s)readable, intact raw, .*{phrase}.*; download or compress it again"
    ) as caught:
        corpus.load_corpus(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zip"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_no_corpus(kind, suffix, tmp_path):
    stand_in(kind, tmp_path / f"data{suffix}")
    with pytest.raises(corpus.CorpusError, match=r"must name a file, got .*, which is not one"):
        corpus.load_corpus(tmp_path / f"data{suffix}")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "../" * 2000 + "x"], ids=["long", "zero byte", "many dots"])
def test_a_name_that_no_file_can_have_is_no_corpus(name, tmp_path):
    with pytest.raises(corpus.CorpusError, match=r"must name a file, got .*, which is not one"):
        corpus.load_corpus(tmp_path / name)


BOMB = bytes(2**25)  # 32 MiB
BOMBS = {
    "raw.txt": BOMB,
    "deflated.gz": gzip.compress(BOMB),
    "deflated.zip": zipped(content=BOMB),
    "bzip2.zip": zipped(method=zipfile.ZIP_BZIP2, content=BOMB),
    "LZMA.zip": zipped(method=zipfile.ZIP_LZMA, content=BOMB),
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_more_is_unpacked_than_is_wanted(name, tmp_path):
    (tmp_path / name).write_bytes(BOMBS[name])

    def load():
        with contextlib.nullcontext() if "flate" in name or name == "raw.txt" else pytest.raises(corpus.CorpusError):
            assert len(corpus.load_corpus(tmp_path / name, 1000).data) == 1000

    assert peak_memory(load) < 2**20


def test_a_corpus_of_which_a_part_is_wanted_is_named_so_only_if_there_is_more(tmp_path):
    (tmp_path / "fox.txt").write_bytes(TEXT)
    assert corpus.load_corpus(tmp_path / "fox.txt", 100).name == "the first 100 bytes of fox.txt"
    assert corpus.load_corpus(tmp_path / "fox.txt", len(TEXT)).name == "fox.txt"
    assert corpus.load_corpus(tmp_path / "fox.txt", 100).data.tobytes() == TEXT[:100]


@pytest.mark.parametrize("kind", ["a pipe", "a directory", "a device", "a larger file"])
def test_a_cached_corpus_that_is_none_is_refused_at_once(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(corpus, "SIZE", 1000)
    cached = tmp_path / "flax_local_attention" / "enwik8"
    cached.parent.mkdir()
    if kind == "a larger file":
        cached.write_bytes(BOMB)
    else:
        stand_in(kind, cached)

    def load():
        with pytest.raises(corpus.CorpusError, match=f"(?s){re.escape(str(cached))}.*; delete it"):
            corpus.load_corpus()

    assert peak_memory(load) < 2**20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_download_that_would_be_unpacked_at_once_is_refused(method, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SIZE", len(BOMB))
    (tmp_path / "archive").write_bytes(zipped(corpus.MEMBER, method, BOMB))

    def unpack():
        with pytest.raises(NotImplementedError, match="not by Deflate"):
            corpus.extract_verified(tmp_path / "archive", tmp_path / "enwik8")

    assert peak_memory(unpack) < 2**20


# ---- weights from PyTorch

MODEL = LocalTransformer(256, 16, 12, 1, heads=2, dim_head=4, local_attn_window_size=4)


@pytest.fixture(scope="module")
def state_dict():
    """The weights of a model, under the original's names."""
    variables = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 2), np.int32))
    return to_torch(variables, MODEL)


def safetensors_file(header, body, length=None):
    """Return a safetensors file that declares a header of `length` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


NAME = "layers.0.0.branch.to_out.weight"
LIES = {
    "empty": lambda header, body: b"",
    "a header of 2^62 bytes": lambda header, body: safetensors_file(header, body, 2**62),
    "a header beyond the file": lambda header, body: safetensors_file(header, body, 10**6),
    "no header": lambda header, body: safetensors_file(b"", b""),
    "not JSON": lambda header, body: safetensors_file(b"{nope", body),
    "JSON of another kind": lambda header, body: safetensors_file([1], body),
    "deep JSON": lambda header, body: safetensors_file(b"[" * 10**5, body),
    "not UTF-8": lambda header, body: safetensors_file(b'{"\xff":1}', body),
    "cut off": lambda header, body: safetensors_file(header, body[:-1]),
    "bytes behind it": lambda header, body: safetensors_file(header, body + b"x"),
    "a pickle": lambda header, body: pickle.dumps({NAME: body}),
    "a dtype that is none": lambda header, body: safetensors_file(changed(header, dtype="F7"), body),
    "a dtype of another size": lambda header, body: safetensors_file(changed(header, dtype="F64"), body),
    "offsets outside": lambda header, body: safetensors_file(changed(header, data_offsets=[0, 10**12]), body),
    "offsets below 0": lambda header, body: safetensors_file(changed(header, data_offsets=[-4, 0]), body),
    "offsets that overlap": lambda header, body: safetensors_file(changed(header, data_offsets=[0, 384]), body),
    "a shape that overflows": lambda header, body: safetensors_file(changed(header, shape=[2**40, 2**40]), body),
    "a shape below 0": lambda header, body: safetensors_file(changed(header, shape=[-1]), body),
    "a field is missing": lambda header, body: safetensors_file(header | {NAME: {"dtype": "F32"}}, body),
}


def changed(header, **fields):
    """Return a header with some fields of one array replaced."""
    return header | {NAME: header[NAME] | fields}


def refused(path, capsys):
    """Run the example on weights that it must refuse; return the error."""
    assert examples.from_torch.main([str(path), "--window-size=4", "--heads=2"]) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", LIES)
def test_a_safetensors_file_that_lies_is_one_line(name, state_dict, tmp_path, capsys):
    packed = pytest.importorskip("safetensors.numpy").save(state_dict)
    stop = 8 + struct.unpack("<Q", packed[:8])[0]
    (tmp_path / "lies.safetensors").write_bytes(LIES[name](json.loads(packed[8:stop]), packed[stop:]))
    assert "must be an intact .safetensors file" in refused(tmp_path / "lies.safetensors", capsys)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_holds_no_weights(kind, suffix, tmp_path, capsys):
    stand_in(kind, tmp_path / f"weights{suffix}")
    refused(tmp_path / f"weights{suffix}", capsys)


class Hostile:
    """An object that creates a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_pickled(name, state_dict, path, torch):
    """Write a file that is not a state dict saved by `torch.save`."""
    tensors, made = {name: torch.from_numpy(x) for name, x in state_dict.items()}, path.with_name("made")
    saved = {
        "a hostile pickle": {"weight": Hostile(made)},
        "a module": torch.nn.Linear(2, 2),
        "names that are numbers": {1: torch.ones(3)},
        "a nested checkpoint": {"model": tensors, "step": 3},
        "a list": [1, 2],
        "a tensor": torch.ones(3),
        "no numbers": {name: x.to("meta") for name, x in tensors.items()},
    }
    if name in saved:
        torch.save(saved[name], path)
    elif name == "a hostile pickle of old":
        torch.save({"weight": Hostile(made)}, path, _use_new_zipfile_serialization=False)
    elif name == "a bare hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(made)))
    elif name == "a bomb":
        path.write_bytes(zipped("archive/data.pkl", content=BOMB))
    elif name == "another archive":
        path.write_bytes(zipped("file", zipfile.ZIP_STORED))
    elif name == "text":
        path.write_bytes(TEXT)
    elif name == "cut off":
        torch.save(tensors, path)
        os.truncate(path, path.stat().st_size - 50)
    else:
        path.write_bytes(b"")


PICKLED = [
    "a hostile pickle", "a hostile pickle of old", "a bare hostile pickle", "a module", "names that are numbers",
    "a nested checkpoint", "a list", "a tensor", "no numbers", "a bomb", "another archive", "text", "cut off", "empty",
]  # fmt: skip


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickle_is_arrays_or_one_line_and_runs_nothing(name, state_dict, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    write_pickled(name, state_dict, tmp_path / "weights.pt", torch)
    assert peak_memory(lambda: refused(tmp_path / "weights.pt", capsys)) < 2**24
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_a_name_with_commands_of_a_terminal_is_shown_without_them(tmp_path, capsys):
    packed = pytest.importorskip("safetensors.numpy").save({"\x1b[2J": np.ones(3, np.float32)})
    (tmp_path / "weights.safetensors").write_bytes(packed)
    assert examples.from_torch.main([str(tmp_path / "weights.safetensors"), "--window-size=4"]) == 2
    error = capsys.readouterr().err
    assert "\N{REPLACEMENT CHARACTER}[2J" in error
    assert "\x1b" not in error


def test_a_package_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "; install it with `pip install safetensors" in refused(tmp_path / "weights.safetensors", capsys)


class MetaTensor:
    """A stand-in for a PyTorch tensor with a shape and no data."""

    is_meta = True

    def detach(self):
        return self

    def numpy(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("entries", "phrase"), [({1: np.ones(3)}, "must have names of type str, got 1"), ({"a": MetaTensor()}, "meta")]
)
def test_entries_without_a_name_or_numbers_are_type_errors(entries, phrase):
    with pytest.raises(TypeError, match=phrase):
        from_torch(entries)


# ---- settings


def settings_with(**config):
    """Return the settings of a run with some values of its configuration replaced."""
    settings = runs.Settings(tiny_config(), None, "fingerprint").to_json()
    return json.dumps(settings | {"config": settings["config"] | config}).encode()


BAD_SETTINGS = {
    "empty": b"",
    "not UTF-8": b'{"config": "\xff"}',
    "deep": b"[" * 10**5,
    "a list": b"[]",
    "no fingerprint": b'{"config": {}, "data": null}',
    "a field is missing": json.dumps({"config": {"dim": 3}, "data": None, "fingerprint": "1"}).encode(),
    "a field is unknown": settings_with(width=3),
    "too many bytes": b" " * files.SETTINGS_LIMIT + settings_with(),
    "another optimizer": settings_with(optimizer="sgd"),
    "another dtype": settings_with(dtype="int8"),
    "no step between figures": settings_with(log_every=0),
    "no sequence": settings_with(batch_size=0),
    "a width below 0": settings_with(dim=-1),
    "too many layers": settings_with(depth=10**9),
    "a rate that is no number": settings_with(learning_rate=float("nan")),
    "an infinite multiplier": settings_with(ff_mult=float("inf")),
    "a seed that is too large": settings_with(seed=2**63),
    "a truth for a count": settings_with(depth=True),
    "a window of nothing": settings_with(windows="0"),
}


def assert_settings_are_refused(directory, capsys):
    for command in (["--resume"], ["generate"]):
        assert enwik8.main([*command, f"--run={directory}"]) == 2
        error = capsys.readouterr().err
        assert re.search(
            "settings.json' must be readable and intact, got .*; delete it and give the run's options", error
        )
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_are_damaged_or_of_another_version_are_one_line(name, tmp_path, capsys):
    (tmp_path / "settings.json").write_bytes(BAD_SETTINGS[name])
    assert_settings_are_refused(tmp_path, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("kind", ["a pipe", "a directory", "a device"])
def test_settings_that_are_no_file_are_one_line(kind, tmp_path, capsys):
    stand_in(kind, tmp_path / "settings.json")
    assert peak_memory(lambda: assert_settings_are_refused(tmp_path, capsys)) < 2**23


def test_settings_have_what_their_flags_would_take():
    for field, value in {"temperature": 0.0, "seed": 2**63 - 1, "corpus_bytes": 2**40, "sample_bytes": 0}.items():
        assert getattr(Config.from_json(CPU_DEMO.to_json() | {field: value}), field) == value


# ---- metrics

FIGURE = '{"step": 4, "split": "train", "bits_per_byte": 2.5}\n'
BAD_LINES = {
    "not JSON": "nope",
    "not UTF-8": "\udcff\udcfe",
    "deep": "[" * 10**5,
    "another kind": "[]",
    "a field is missing": '{"step": 4, "split": "train"}',
    "a step below 0": FIGURE.strip().replace("4", "-4"),
    "a step of 400 digits": FIGURE.strip().replace("4", "4" * 400),
    "a step of 9,000 digits": FIGURE.strip().replace("4", "4" * 9000),
    "a step that is a truth": FIGURE.strip().replace("4", "true"),
    "bits in words": FIGURE.strip().replace("2.5", '"few"'),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_lines_that_are_no_figures_are_left_out_of_charts_and_of_a_run_that_goes_on(name, tmp_path):
    path = tmp_path / "metrics.jsonl"
    content = (FIGURE + BAD_LINES[name] + "\n" + FIGURE.replace("4", "8")).encode("utf-8", "surrogateescape")
    path.write_bytes(content)
    curves = charts.read_curves(path)
    assert curves == [charts.Curve("train", (4, 8), (2.5, 2.5))]
    assert charts.draw(curves)
    assert path.read_bytes() == content
    runs.Journal(path, 8)
    assert path.read_text() == FIGURE + FIGURE.replace("4", "8")


@pytest.mark.parametrize("kind", ["a pipe", "a directory", "a device", "a larger file"])
def test_figures_that_are_no_file_are_an_error_of_the_system(kind, tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    if kind == "a larger file":
        monkeypatch.setattr(files, "METRICS_LIMIT", 1000)
        path.write_bytes(FIGURE.encode() * 100)
    else:
        stand_in(kind, path)
    with pytest.raises(OSError, match=r"directory|regular|more than"):
        charts.read_curves(path)
    with pytest.raises(UsageError, match="must be readable and writable, got"):
        runs.Journal(path, 8)


# ---- links


@pytest.mark.parametrize(
    "part", ["settings.json", "checkpoints", "metrics.jsonl", "samples", "tensorboard", "profile", "damaged"]
)
def test_a_run_is_not_led_out_of_its_directory(part, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(enwik8, "perform", lambda run: pytest.fail("it began"))
    directory, outside = tmp_path / "run", tmp_path / "outside"
    directory.mkdir()
    (directory / part).symlink_to(outside)
    options = [*TINY, f"--data={text_file}", f"--run={directory}"]
    assert enwik8.main(options) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not outside.exists()


def test_a_run_may_be_a_link_and_have_links_that_stay_in_it(tmp_path):
    (tmp_path / "there" / "samples").mkdir(parents=True)
    (tmp_path / "there" / "samples" / "newest.txt").symlink_to("1.txt")
    (tmp_path / "run").symlink_to("there")
    with runs.RunFiles(tmp_path / "run").claim():
        pass
    (tmp_path / "there" / "samples" / "2.txt").symlink_to(tmp_path / "elsewhere")
    refused = pytest.raises(UsageError, match=r"lead out of it, got '.*2\.txt', a link to '.*elsewhere'")
    with refused, runs.RunFiles(tmp_path / "run").claim():
        pass


@pytest.mark.parametrize("name", ["file", "file.partial"])
def test_a_file_is_replaced_and_not_written_through_a_link(name, tmp_path):
    (tmp_path / "outside").write_text("theirs")
    (tmp_path / name).symlink_to("outside")
    files.write_atomically(tmp_path / "file", b"ours")
    assert (tmp_path / "file").read_text() == "ours"
    assert (tmp_path / "outside").read_text() == "theirs"
    assert not (tmp_path / "file").is_symlink()


# ---- a full disk


@contextlib.contextmanager
def small_files():
    """Make the system refuse to write more than 100 bytes to a file, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_be_replaced_stays_and_leaves_no_part(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(OSError, match="large"), small_files():
        files.write_atomically(tmp_path / "file", bytes(1000))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"before")]


def test_a_figure_that_cannot_be_appended_leaves_those_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(FIGURE)
    with pytest.raises(OSError, match="large"), small_files():
        files.append(path, FIGURE.encode() * 2)
    assert path.read_text() == FIGURE


def test_a_download_that_finds_no_room_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    content = np.random.default_rng(0).bytes(1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(corpus, "SIZE", len(content))
    monkeypatch.setattr(corpus, "fetch_archive", lambda target: None)
    monkeypatch.setattr(corpus, "extract_verified", lambda _, target: target.write_bytes(content))
    with pytest.raises(corpus.CorpusError, match="File too large"), small_files():
        corpus.load_corpus()
    assert list((tmp_path / "flax_local_attention").iterdir()) == []


# ---- checkpoints of other versions

FOREIGN = {
    "no figures": lambda about: about.pop("bits"),
    "figures in words": lambda about: about.update(bits="few"),
    "no digests": lambda about: about.pop("digests"),
    "digests of another kind": lambda about: about.update(digests=[1]),
    "no configuration": lambda about: about.pop("config"),
    "a configuration of another kind": lambda about: about.update(config=[1]),
    "no losses": lambda about: about.pop("losses"),
    "no time": lambda about: about.pop("seconds"),
    "a field of the model more": lambda about: about["config"].update(width=3),
    "a field of the model less": lambda about: about["config"].pop("ff_mult"),
    "no fingerprint": lambda about: about.pop("fingerprint"),
}


@pytest.mark.slow_but("no*-generate")
@pytest.mark.parametrize("command", [["--resume", "--data-parallel=1"], ["generate"]], ids=["resume", "generate"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_of_another_version_is_not_used(name, command, whole_run, tmp_path, capsys):
    directory = shutil.copytree(whole_run.directory, tmp_path / "run")
    for path in directory.glob("checkpoints/*/about/metadata"):
        about = json.loads(path.read_text())
        del about["checksum"]
        FOREIGN[name](about)
        path.write_text(json.dumps(about | {"checksum": checksum(about)}))
    before = sorted(directory.rglob("*"))
    assert enwik8.main([*command, f"--run={directory}"]) == 2
    assert re.search("another version saved it|of this version|other values for", capsys.readouterr().err)
    assert sorted(directory.rglob("*")) == before


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_says_where_it_was(whole_run, tmp_path, capsys):
    if jax.device_count() < 3:
        pytest.skip("needs 3 devices")
    directory = shutil.copytree(whole_run.directory, tmp_path / "run")
    for devices, is_said in (("--data-parallel=1", False), ("--data-parallel=3", True)):
        assert enwik8.main(["--resume", f"--run={directory}", devices]) == 0
        printed = capsys.readouterr().out
        assert ("devices   were 1 " in printed) == is_said
        assert ("; results may differ by rounding" in printed) == is_said
    assert Checkpoints(directory / "checkpoints", pytest.fail, read_only=True).about(12)["devices"].startswith("1 ")
