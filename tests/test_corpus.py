"""The example trains on the bytes that it names, and says why when it cannot."""

import contextlib
import gzip
import hashlib
import http.server
import io
import sys
import threading
import zipfile

import numpy as np
import pytest

from examples import corpus, enwik8
from tests.example_runs import TEXT, TINY

pytestmark = pytest.mark.usefixtures("compiled_once")

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
    "truncated.gz": (gzip.compress(TEXT)[:-20], "readable, intact"),
    "damaged.gz": (damaged(gzip.compress(TEXT)), "readable, intact"),
    "not.gz": (TEXT, "readable, intact"),
    "truncated.zip": (zipped({"enwik8": TEXT})[:-30], "readable, intact"),
    "damaged.zip": (damaged(zipped({"enwik8": TEXT})), "readable, intact"),
    "not.zip": (TEXT, "readable, intact"),
    "empty.zip": (b"", "readable, intact"),
    "several.zip": (zipped({"one": TEXT, "two": TEXT}), "2 files"),
    "short.txt": (TEXT[:200], "must hold one sequence"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_data_file_is_one_clear_line_before_anything_is_compiled(tmp_path, name, monkeypatch, capsys):
    content, phrase = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(enwik8, "perform", lambda *_: pytest.fail("the model was built"))
    status = enwik8.main([*TINY, f"--run={tmp_path / 'run'}", f"--data={tmp_path / name}"])
    error = capsys.readouterr().err
    assert status == 2
    assert phrase in error
    assert [line.startswith("enwik8.py: ") for line in error.splitlines()] == [True]
    assert not (tmp_path / "run").exists()


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
    for name in ("validation", "test"):
        part, before = parts.with_before(name)
        assert part.tobytes() == parts.part(name).tobytes()
        assert data.tobytes().startswith(before.tobytes() + part.tobytes())


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
    """Make TEXT the expected enwik8, with an empty cache; return the path of the cached copy."""
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
    """Return an archive that declares the right size for a member that is longer."""
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
