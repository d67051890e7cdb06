"""The example trains on the bytes it says it does, says so when it cannot, and its figures are right."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from examples import corpus, devices, enwik8, flags, runs

TEXT = b"the quick brown fox jumps over the lazy dog. " * 300
TINY = [
    "--preset=cpu", "--dim=16", "--depth=1", "--heads=2", "--dim-head=8", "--window-size=8", "--seq-len=32",
    "--batch-size=3", "--accumulate=2", "--steps=12", "--warmup-steps=2", "--learning-rate=0.02", "--log-every=4",
    "--eval-every=6", "--sample-bytes=5", "--dtype=float32", "--data-parallel=1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_is_kept():
    """Keep runs out of the user's cache of compiled programs."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


# ---- the scripts

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("script", ["enwik8", "from_torch"])
def test_a_script_runs_as_a_file_from_anywhere_and_as_a_module(script, tmp_path):
    as_file = [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--help"], tmp_path
    as_module = [sys.executable, "-m", f"examples.{script}", "--help"], ROOT
    for command, folder in (as_file, as_module):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: ")


# ---- the corpus


def zipped(members: dict[str, bytes]) -> bytes:
    """Return a zip archive with the given members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def damaged(packed: bytes) -> bytes:
    """Return `packed` with bytes in its middle changed."""
    middle = len(packed) // 2
    return packed[:middle] + bytes(byte ^ 0xFF for byte in packed[middle : middle + 8]) + packed[middle + 8 :]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("raw.txt", TEXT),
        ("text.gz", gzip.compress(TEXT, mtime=0)),
        ("one.zip", zipped({"whatever": TEXT})),
        ("two.zip", zipped({"readme": b"no", "enwik8": TEXT})),
    ],
)
def test_a_raw_gz_or_zip_file_gives_its_bytes_and_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    loaded = corpus.load_corpus(tmp_path / name)
    assert loaded.data.dtype == np.uint8
    assert loaded.data.tobytes() == TEXT
    assert loaded.name == name


def test_the_first_bytes_of_a_corpus_are_named_as_such():
    whole = corpus.Corpus("book", np.arange(50, dtype=np.uint8))
    assert whole.first(None) is whole
    assert whole.first(50) is whole
    assert whole.first(7).name == "the first 7 bytes of book"
    assert whole.first(7).data.tolist() == list(range(7))
    assert whole.first(7).fingerprint() != whole.first(8).fingerprint()


BAD_FILES = {
    "missing.txt": (None, "must name a file"),
    "empty.txt": (b"", "empty"),
    "empty.gz": (gzip.compress(b""), "empty"),
    "truncated.gz": (gzip.compress(TEXT)[:-20], "readable, whole"),
    "damaged.gz": (damaged(gzip.compress(TEXT)), "readable, whole"),
    "not.gz": (TEXT, "readable, whole"),
    "truncated.zip": (zipped({"enwik8": TEXT})[:-30], "readable, whole"),
    "damaged.zip": (damaged(zipped({"enwik8": TEXT})), "readable, whole"),
    "not.zip": (TEXT, "readable, whole"),
    "empty.zip": (b"", "readable, whole"),
    "several.zip": (zipped({"one": TEXT, "two": TEXT}), "2 files"),
    "short.txt": (TEXT[:200], "must hold one sequence"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_data_file_is_one_clear_line_before_anything_is_compiled(tmp_path, name, monkeypatch, capsys):
    content, phrase = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(enwik8, "perform", lambda *_: pytest.fail("the model was built"))
    status = enwik8.main([*TINY, f"--data={tmp_path / name}"])
    error = capsys.readouterr().err
    assert status == 2
    assert phrase in error
    assert [line.startswith("enwik8.py: ") for line in error.splitlines()] == [True]


def test_a_file_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FILE_LIMIT", 1000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(10_000)))
    with pytest.raises(corpus.CorpusError, match="at most 1,000 bytes"):
        corpus.load_corpus(tmp_path / "bomb.gz")


def test_the_split_is_90_5_5_and_loses_nothing():
    data = np.frombuffer(TEXT, np.uint8)[:1007]
    parts = corpus.split_corpus(data, seq_len=13)
    assert [len(parts.train), len(parts.valid), len(parts.test)] == [906, 50, 51]
    assert np.concatenate([parts.train, parts.valid, parts.test]).tobytes() == data.tobytes()


def test_every_part_of_the_split_must_hold_a_sequence():
    data = np.zeros(1007, np.uint8)
    corpus.split_corpus(data, seq_len=49)
    with pytest.raises(corpus.CorpusError, match="smaller --seq-len"):
        corpus.split_corpus(data, seq_len=50)


# ---- the download, from a server on this machine


class OneAnswer(http.server.BaseHTTPRequestHandler):
    """Answers every request with the server's `body`, announcing `announced` bytes."""

    def do_GET(self):
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.announced))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(monkeypatch, body, announced=None, status=200):
    """Serve `body` where the example looks for enwik8."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OneAnswer)
    server.body, server.status = body, status
    server.announced = len(body) if announced is None else announced
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(corpus, "URL", f"http://127.0.0.1:{server.server_port}/enwik8.zip")
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Make TEXT the enwik8 that is expected, in an empty cache; give the path of the cached copy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(corpus, "SIZE", len(TEXT))
    monkeypatch.setattr(corpus, "SHA256", hashlib.sha256(TEXT).hexdigest())
    return tmp_path / "cache" / "flax_local_attention" / "enwik8"


def test_enwik8_is_downloaded_once_and_then_cached(cached, monkeypatch):
    with serving(monkeypatch, zipped({"readme": b"no", "enwik8": TEXT})):
        first = corpus.load_corpus()
    assert first.name == "enwik8"
    assert first.data.tobytes() == TEXT
    assert [path.name for path in cached.parent.iterdir()] == ["enwik8"]
    monkeypatch.setattr(corpus, "download_enwik8", lambda _: pytest.fail("downloaded again"))
    assert corpus.load_corpus().data.tobytes() == TEXT


@pytest.mark.parametrize("terminal", [False, True])
def test_a_download_shows_its_size_its_progress_and_that_it_is_verified(cached, monkeypatch, capsys, terminal):
    body = zipped({"enwik8": TEXT, "padding": np.random.default_rng(2).bytes(400_000)})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(corpus, "SECONDS_SHOWN", 0)
    monkeypatch.setattr(corpus, "CHUNK", 100_000)
    with serving(monkeypatch, body):
        corpus.load_corpus()
    first, *middle, verified, kept = capsys.readouterr().out.splitlines(keepends=True)
    assert first == f"downloading {corpus.URL}\n"
    assert hashlib.sha256(TEXT).hexdigest() in verified
    assert str(cached) in kept
    states = "".join(middle).split("\r" if terminal else "\n")
    shown = [state.split(",")[0].split("MB of")[0].split() for state in states if state.strip()]
    if terminal:
        assert [state[0] for state in shown] == ["24", "49", "74", "99", "100", "100"]
    else:
        assert shown == [["0.4", "MB"], ["100", "%", "0.4"]]
    assert max(map(len, [first, verified, *states])) <= 100


@pytest.mark.parametrize("total", [None, 0, 7, 10**6])
def test_a_transfer_of_any_size_tells_how_far_it_is(total, capsys):
    with corpus.Progress(total) as progress:
        progress.add(12_345_678)
    start, end = capsys.readouterr().out.splitlines()
    assert ("unknown" in start) == (total is None)
    assert "12.3 MB" in end
    assert ("100 %" in end) == bool(total)


def lying_zip() -> bytes:
    """Return an archive that declares the right size for a longer member."""
    packed = zipped({"enwik8": TEXT + b"more"})
    return packed.replace((len(TEXT) + 4).to_bytes(4, "little"), len(TEXT).to_bytes(4, "little"))


BAD_DOWNLOADS = {
    "other bytes": (zipped({"enwik8": TEXT[:-1] + b"?"}), None, "sha256"),
    "a longer member": (zipped({"enwik8": TEXT * 2}), None, "bytes"),
    "a longer member that lies": (lying_zip(), None, "CRC"),
    "no such member": (zipped({"enwik9": TEXT}), None, "KeyError"),
    "no archive": (b"<html>please log in</html>", None, "BadZipFile"),
    "a damaged archive": (damaged(zipped({"enwik8": TEXT})), None, "got another answer"),
    "a truncated archive": (zipped({"enwik8": TEXT})[:-40], None, "BadZipFile"),
    "a broken transfer": (zipped({"enwik8": TEXT})[:-40], 10_000, "broke off"),
}


@pytest.mark.parametrize("case", BAD_DOWNLOADS)
def test_a_wrong_download_is_an_error_and_leaves_nothing(cached, monkeypatch, case):
    body, announced, phrase = BAD_DOWNLOADS[case]
    with serving(monkeypatch, body, announced), pytest.raises(corpus.CorpusError, match=phrase):
        corpus.load_corpus()
    assert list(cached.parent.iterdir()) == []


def test_a_download_is_bounded(cached, monkeypatch):
    monkeypatch.setattr(corpus, "DOWNLOAD_LIMIT", 100)
    with serving(monkeypatch, bytes(2000)), pytest.raises(corpus.CorpusError, match="at most 100 bytes"):
        corpus.load_corpus()
    assert list(cached.parent.iterdir()) == []


def test_a_cached_copy_with_a_wrong_checksum_is_an_error(cached):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(TEXT[::-1])
    with pytest.raises(corpus.CorpusError, match="delete"):
        corpus.load_corpus()


def test_a_cache_that_cannot_be_written_is_an_error(cached):
    cached.parent.parent.write_text("a file where the directory should be")
    with pytest.raises(corpus.CorpusError, match="XDG_CACHE_HOME"):
        corpus.load_corpus()


@pytest.mark.parametrize("status", [None, 403])
def test_offline_pythons_own_sources_are_used_announced_and_named(cached, monkeypatch, capsys, status):
    monkeypatch.setattr(corpus, "PYTHON_SOURCES_LIMIT", 300_000)
    server = serving(monkeypatch, b"no", status=status) if status else contextlib.nullcontext()
    if status is None:
        monkeypatch.setattr(corpus, "URL", "http://127.0.0.1:9/enwik8.zip")  # the discard port: nobody answers
    with server:
        first, second = corpus.load_corpus(), corpus.load_corpus()
    announced = capsys.readouterr().out
    assert "NO ENWIK8" in announced
    assert first.name in announced
    assert "not enwik8" in first.name
    assert len(first.data) == 300_000
    assert first.data.tobytes() == second.data.tobytes()
    assert b"import" in first.data.tobytes()


# ---- training


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A file that is quickly learnt."""
    path = tmp_path_factory.mktemp("data") / "fox.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="module")
def tiny():
    """The tiny configuration, its model and its first state."""
    options = vars(flags.build_parser(None, enwik8.PRESETS, enwik8.ZERO_ALLOWED).parse_args(TINY))
    given = {name: value for name, value in options.items() if name in enwik8.Config.__annotations__}
    config = flags.choose_config(enwik8.PRESETS["cpu"], given, None, enwik8.DISPLAY)
    model = enwik8.build_model(config)
    return config, model, jax.jit(functools.partial(enwik8.initial_state, config))()


@pytest.fixture(scope="module")
def one_device(tiny):
    """The mesh of one device."""
    return devices.choose_mesh(1, 1, 1, tiny[0])


@pytest.fixture(scope="module")
def whole_run(text_file, tmp_path_factory):
    """The directory and the output of an uninterrupted run of the command line."""
    out = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert enwik8.main([*TINY, f"--data={text_file}", f"--out={out}"]) == 0
    return out, printed.getvalue()


def read_metrics(out):
    """Return the figures of a run by step and split."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], line["split"]): line["bits_per_byte"] for line in lines}


def test_a_run_learns(whole_run):
    out, _ = whole_run
    figures = read_metrics(out)
    assert 7.9 < figures[0, "validation"] < 8.4
    assert figures[12, "validation"] < 6
    assert figures[12, "test"] < 6
    assert [step for step, split in figures if split == "train"] == [4, 6, 8, 12]
    assert [step for step, split in figures if split == "validation"] == [0, 6, 12]


def test_every_figure_names_its_corpus_and_a_sample_ends_the_run(whole_run):
    out, printed = whole_run
    lines = [line for line in printed.splitlines() if "bits per byte" in line]
    assert len(lines) == len(read_metrics(out))
    assert all("of fox.txt" in line for line in lines)
    assert "tokens/s" in printed
    assert "\nsample  " in printed


def test_a_resumed_run_equals_an_uninterrupted_one(whole_run, text_file, tmp_path, monkeypatch):
    draw = enwik8.draw_microbatches

    def interrupted(data, config, step, mesh):
        if step == 9:
            raise KeyboardInterrupt
        return draw(data, config, step, mesh)

    files = [f"--data={text_file}", f"--out={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(enwik8, "draw_microbatches", interrupted)
        assert enwik8.main([*TINY, *files]) == 130
    assert (8, "train") in read_metrics(tmp_path)
    may_change = ["--sample-bytes=0", "--data-parallel=1"]  # its other options are the checkpoint's
    assert enwik8.main([*files, "--resume", *may_change]) == 0

    paths = [out / "checkpoint.msgpack" for out in (whole_run[0], tmp_path)]
    whole, resumed = (runs.read_checkpoint(path, enwik8.Config).state for path in paths)
    # A GPU adds up the gradients of an embedding in any order, so that no two runs agree to the last bit.
    tolerance = {"rtol": 0, "atol": 0} if jax.default_backend() == "cpu" else {"rtol": 1e-3, "atol": 1e-6}
    assert_equal = functools.partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(assert_equal, whole, resumed)
    assert int(whole["step"]) == 12
    jax.tree.map(assert_equal, read_metrics(whole_run[0]), read_metrics(tmp_path))


@pytest.fixture
def keeps_compiled(tmp_path, monkeypatch):
    """Let JAX keep compiled programs, in a user's cache of this test's own."""
    names = "compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes"
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    yield tmp_path / "cache" / "flax_local_attention" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


ONE_STEP = [*TINY, "--steps=1", "--sample-bytes=0"]


def test_compiled_programs_are_kept_for_the_next_run(keeps_compiled, text_file):
    kept = []
    for _ in range(2):
        jax.clear_caches()
        assert enwik8.main([*ONE_STEP, f"--data={text_file}"]) == 0
        kept.append(sorted(path.name for path in keeps_compiled.glob("*-cache")))
    assert any("train_step" in name for name in kept[0])
    assert kept[1] == kept[0]


def test_the_flag_is_heard_before_the_environment_and_that_before_the_users_cache(keeps_compiled, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "environment"))  # as JAX_COMPILATION_CACHE_DIR does
    runs.keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "environment")
    runs.keep_compiled(tmp_path / "flag")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "flag")
    assert not keeps_compiled.exists()


def test_a_directory_that_cannot_be_written_does_not_stop_a_run(keeps_compiled, text_file, tmp_path, capsys):
    (tmp_path / "file").write_text("where the directory should be")
    flags = [f"--data={text_file}", f"--compilation-cache={tmp_path / 'file' / 'below'}"]
    assert enwik8.main([*ONE_STEP, *flags]) == 0
    assert "name another --compilation-cache" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir is None


CANNOT_START = {
    "no directory to resume": (["--resume"], "give --out"),
    "nothing to resume": (["--resume", "--out={tmp}/none"], "without --resume"),
    "a broken checkpoint": (["--resume", "--out={tmp}/broken"], "whole checkpoint"),
    "other options": (["--resume", "--out={run}", "--dim=32"], "values for --dim"),
    "other bytes": (["--resume", "--out={run}", "--data={tmp}/other.txt"], "same --data"),
    "a run that is there already": (["--out={run}"], "new directory"),
    "a directory below a file": (["--out={tmp}/other.txt/run"], "can be made"),
    "options that the library refuses": (
        ["--preset=cpu", "--data={tmp}/other.txt", "--seq-len=32", "--dim-head=7"],
        "dim_head",
    ),
    "a sample that is too long": (["--abs-pos-emb", "--sample-bytes=20", "--seq-len=80"], "at most 16"),
}


@pytest.mark.parametrize("case", CANNOT_START)
def test_a_run_that_cannot_start_says_why_on_one_line(whole_run, tmp_path, capsys, case):
    options, phrase = CANNOT_START[case]
    (tmp_path / "other.txt").write_bytes(TEXT[::-1])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "checkpoint.msgpack").write_bytes((whole_run[0] / "checkpoint.msgpack").read_bytes()[:-100])
    assert enwik8.main([option.format(tmp=tmp_path, run=whole_run[0]) for option in options]) == 2
    error = capsys.readouterr().err
    assert phrase in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    [
        "--steps=0",
        "--learning-rate=nan",
        "--dim=-1",
        "--dim=x",
        "--dtype=int8",
        "--seed=-1",
        "--seq-len=1.5",
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


def test_bits_per_byte_are_those_of_every_byte_but_the_first(tiny, one_device):
    config, model, state = tiny
    data = np.random.default_rng(5).integers(0, 256, 3 * 32 * 2 + 32 + 11, dtype=np.uint8)  # 2 batches, 1 chunk, a rest
    apply, variables = jax.jit(model.apply), {"params": state.params}

    def surprise(chunk):
        logits = np.asarray(apply(variables, jnp.asarray(chunk[None, :-1], jnp.int32)))[0].astype(np.float64)
        log_sum = np.log(np.exp(logits).sum(-1))
        return float((log_sum - logits[np.arange(len(chunk) - 1), chunk[1:]]).sum())

    total = sum(surprise(data[start : start + 33]) for start in range(0, len(data) - 1, 32))
    expected = total / (len(data) - 1) / np.log(2)
    got = enwik8.bits_per_byte(jax.jit(enwik8.build_loss(model)), state.params, data, config, one_device)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("length", [2, 32, 33, 34, 96, 97, 98, 150])
def test_chunks_predict_each_byte_once_and_are_equal_in_shape(length, one_device):
    data = np.arange(length, dtype=np.uint8)
    chunks = list(enwik8.cut_chunks(data, 3, 32, one_device))
    assert {chunk.tokens.shape for chunk in chunks} | {chunk.labels.shape for chunk in chunks} == {(3, 32)}
    tokens, labels = (np.concatenate([np.ravel(chunk[part]) for chunk in chunks]) for part in (0, 1))
    counted = labels != enwik8.IGNORED
    assert labels[counted].tolist() == list(range(1, length))
    np.testing.assert_array_equal(tokens[counted] + 1, labels[counted])


def bigram_loss(params, batch):
    """Nats and predictions of a model that is a table: the logits of a byte after each byte."""
    logits, counted = params["kernel"][batch.tokens] * params["scale"], batch.labels != enwik8.IGNORED
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.labels, 0))
    return jnp.where(counted, nats, 0).sum(), counted.sum()


@pytest.fixture
def bigram():
    """The parameters of a bigram model."""
    return {"kernel": jax.random.normal(jax.random.key(2), (256, 256)), "scale": jnp.full((256,), 0.7)}


def test_accumulated_microbatches_equal_one_large_batch(tiny, one_device, bigram):
    drawn = enwik8.draw_microbatches(np.frombuffer(TEXT, np.uint8), tiny[0], 7, one_device)
    assert drawn.tokens.shape == drawn.labels.shape == (2, 3, 32)
    tokens, labels = map(np.array, drawn)
    labels[1, 0, 5:] = enwik8.IGNORED  # so that they have unequally many predictions
    microbatches = enwik8.Batch(jnp.asarray(tokens), jnp.asarray(labels))
    accumulated = enwik8.accumulate(bigram_loss, bigram, microbatches)
    at_once = jax.value_and_grad(lambda params, batch: jnp.divide(*bigram_loss(params, batch)))
    expected = at_once(bigram, jax.tree.map(lambda leaf: leaf.reshape(6, 32), microbatches))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), accumulated, expected)


def test_the_train_step_consumes_its_state_and_decays_only_kernels(tiny, bigram):
    optimiser = enwik8.build_optimiser(tiny[0])
    given = jax.tree.map(jnp.array, bigram)  # a copy, since it is given away
    state = enwik8.TrainState(jnp.zeros((), jnp.int32), given, optimiser.init(given))
    step = enwik8.build_train_step(lambda params, batch: (jnp.zeros(()), 96), optimiser)  # no gradient: decay alone
    after, _ = step(state, enwik8.Batch(*jnp.zeros((2, 2, 3, 32), jnp.int32)))
    assert all(leaf.is_deleted() for leaf in given.values())
    assert int(after.step) == 1
    assert (jnp.abs(after.params["kernel"]) < jnp.abs(bigram["kernel"])).all()
    np.testing.assert_array_equal(after.params["scale"], bigram["scale"])


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(tiny):
    config, *_ = tiny
    rates = np.array([enwik8.learning_rates(config)(step) for step in range(config.steps + 1)])
    assert 0 < rates[0] < rates[1] < rates[2]
    assert np.argmax(rates) == config.warmup_steps
    np.testing.assert_allclose(rates.max(), config.learning_rate, rtol=1e-6)
    np.testing.assert_allclose(rates[-1], config.learning_rate / 10, rtol=1e-5)
    assert (np.diff(rates[2:]) < 0).all()


def test_gradients_are_clipped_by_their_global_norm(tiny, bigram):
    config, *_ = tiny
    optimiser = enwik8.build_optimiser(config)
    state = optimiser.init(bigram)
    clipped = jax.tree.map(lambda leaf: leaf * config.clip_norm / optax.tree.norm(bigram), bigram)
    large, small = (optimiser.update(gradient, state, bigram)[1] for gradient in (bigram, clipped))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), large, small)


def test_a_cold_sample_is_the_likeliest_continuation(tiny):
    _, model, state = tiny
    apply, tokens = jax.jit(model.apply), list(TEXT[:11])
    drawn = enwik8.sample(model, state.params, np.frombuffer(TEXT[:11], np.uint8), 6, temperature=0.0, seed=0)
    for place in range(10, 16):  # behind the place are zeros, that it cannot see
        padded = jnp.asarray([tokens + [0] * (17 - len(tokens))])
        tokens.append(int(apply({"params": state.params}, padded)[0, place].argmax()))
    assert list(drawn) == tokens[11:]


def test_printed_text_holds_no_terminal_commands():
    assert enwik8.printable("é\n".encode() + b"\x1b[2J\x07\xff\xc2\x9b") == "é\n" + "�[2J" + "�" * 3
