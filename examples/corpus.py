"""The corpus of the example: bytes to train on, validate and test.

It is the user's file, or enwik8 (cached, else downloaded and verified), or, without a network, the source code of
Python's standard library.
"""

import dataclasses
import gzip
import hashlib
import http.client
import os
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import numpy as np

from examples.files import read_bounded

URL = "http://mattmahoney.net/dc/enwik8.zip"
SIZE = 100_000_000
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
MEMBER = "enwik8"
START_SIZE = 1_000_000
START_SHA256 = "369b688978f649681136198fb96db14c1616756260c55fb4b65e9bc049552cad"  # of enwik8's first START_SIZE bytes

Part = Literal["whole", "start"] | None
"""How much of enwik8 a corpus holds: all, a start of at least START_SIZE bytes, or another text."""

TIMEOUT_SECONDS = 10.0
DOWNLOAD_LIMIT = 64 * 2**20  # the archive has 36 MB
FILE_LIMIT = 2 * 2**30  # most bytes of a user's file, decompressed
CHUNK = 2**16  # bytes read at a time
SECONDS_SHOWN = 0.1  # seconds between two updates of the download's progress
LINE_WIDTH = 60  # padding that overwrites a longer line before
PYTHON_SOURCES_LIMIT = 8_000_000

# Raised by Python's gzip and zip readers for a file that is damaged, encrypted or of an unsupported kind.
BROKEN_FILE = (
    OSError,
    EOFError,
    zlib.error,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
)


class CorpusError(ValueError):
    """The corpus is unusable; the message says why and what to do."""


class UnreachableError(Exception):
    """The server of enwik8 does not answer, as on a machine without a network."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes and the name that is printed with their metrics."""

    name: str
    data: np.ndarray  # [bytes], uint8

    def first(self, count: int | None) -> "Corpus":
        """Return the first `count` bytes (None: all), named accordingly."""
        if count is None or count >= len(self.data):
            return self
        return Corpus(f"the first {count:,} bytes of {self.name}", self.data[:count])

    def fingerprint(self) -> str:
        """Return the length and the CRC-32 of the bytes."""
        return f"{len(self.data)}:{zlib.crc32(self.data):08x}"


@dataclasses.dataclass(frozen=True)
class Split:
    """The standard split of enwik8: the first 90 % to train, the next 5 % to validate, the last 5 % to test."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def part(self, name: str) -> np.ndarray:
        """Return the split named "validation" or "test"."""
        return {"validation": self.valid, "test": self.test}[name]

    def with_before(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a split and all bytes of the corpus before it."""
        before = {"validation": [self.train], "test": [self.train, self.valid]}[name]
        return self.part(name), np.concatenate(before)


def split_corpus(data: np.ndarray, seq_len: int) -> Split:
    """Split `data` 90/5/5.

    Args:
      data: the corpus, [bytes], uint8.
      seq_len: tokens in a training sequence; with its last label it takes `seq_len + 1` bytes.

    Raises:
      CorpusError: a split is shorter than one sequence.
    """
    first, second = len(data) * 90 // 100, len(data) * 95 // 100
    parts = Split(data[:first], data[first:second], data[second:])
    shortest = min(len(parts.valid), len(parts.test))
    if shortest <= seq_len:
        raise CorpusError(
            f"5 % of the data must hold one sequence of {seq_len + 1:,} bytes, got {shortest:,} of "
            f"{len(data):,} bytes; give at least {20 * (seq_len + 1):,} bytes or a smaller --seq-len"
        )
    return parts


def enwik8_part(data: np.ndarray) -> Part:
    """Return "whole" for enwik8, "start" for a shorter corpus with the same first `START_SIZE` bytes, else None."""
    if len(data) == SIZE and hashlib.sha256(data.tobytes()).hexdigest() == SHA256:
        return "whole"
    if START_SIZE <= len(data) < SIZE and hashlib.sha256(data[:START_SIZE].tobytes()).hexdigest() == START_SHA256:
        return "start"
    return None


def load_corpus(path: Path | None = None, count: int | None = None) -> Corpus:
    """Read the file at `path`, or enwik8 if None.

    Args:
      path: the user's file.
      count: use the first `count` bytes only, and decompress little more of a file. None: all.

    Raises:
      CorpusError: the file is missing, empty or damaged, or the download is not enwik8.
    """
    if path is not None:
        name = path.name if path.name.isprintable() else ascii(path.name)
        return Corpus(name, read_file(path, count)).first(count)
    return load_enwik8().first(count)


def load_enwik8() -> Corpus:
    """Return enwik8, cached or downloaded; without a network, the sources of Python's standard library.

    Raises:
      CorpusError: the download or the cached copy is not enwik8, or the cache is not readable and writable.
    """
    cached = cache_dir() / MEMBER
    try:
        if not cached.exists():
            print(f"downloading {URL}", flush=True)
            download_enwik8(cached)
            print(f"  verified: sha256 {SHA256}")
            print(f"  cached for later runs: {cached}", flush=True)
        return Corpus(MEMBER, read_cached(cached))
    except UnreachableError as error:
        sources = read_python_sources()
        print(f"NO ENWIK8: {URL} cannot be reached")
        print(f"  {error}"[:100])
        print(f"USING {sources.name} INSTEAD")
        print("  give --data FILE to use your own", flush=True)
        return sources
    except OSError as error:
        raise CorpusError(
            f"the cache of enwik8, {str(cached)!r}, must be readable and writable, got {error}; delete it, "
            "set XDG_CACHE_HOME to another directory, or give --data FILE"
        ) from error


def cache_dir() -> Path:
    """Return this library's directory in the user's cache (XDG_CACHE_HOME, if absolute, else ~/.cache)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~/.cache"))
    return root / "flax_local_attention"


def read_file(path: Path, count: int | None) -> np.ndarray:
    """Read a raw, .gz or .zip file as uint8; of a .zip, its member `enwik8`, else its only one.

    Reading stops soon after `count` bytes, so damage behind them goes unnoticed.
    """
    if not is_file(path):
        raise CorpusError(f"--data must name a file, got {str(path)!r}, which is not one; check the path")
    openers = {".gz": gzip.open, ".zip": open_zip_member}
    data = bytearray()
    try:
        with openers.get(path.suffix.lower(), open_raw)(path) as source:
            for chunk in bounded_chunks(source, FILE_LIMIT, str(path)):
                data += chunk
                if count is not None and len(data) > count:
                    break
    except BROKEN_FILE as error:
        raise CorpusError(
            f"--data must name a readable, intact raw, .gz or .zip file, got {str(path)!r} "
            f"({describe_error(error)}); download or compress it again"
        ) from error
    if not data:
        raise CorpusError(f"--data must name a file with bytes in it, got an empty one, {str(path)!r}; give another")
    return np.frombuffer(memoryview(data).toreadonly(), np.uint8)


def is_file(path: Path) -> bool:
    """Return whether a path names a regular file; False also for a path that is too long for the file system."""
    try:
        return path.is_file()
    except OSError:
        return False


def open_raw(path: Path) -> IO[bytes]:
    """Open a file without decompressing it."""
    return path.open("rb")


@contextmanager
def open_zip_member(path: Path) -> Iterator[IO[bytes]]:
    """Open the member `enwik8` of an archive, else its only member."""
    with zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if MEMBER not in names and len(names) != 1:
            raise zipfile.BadZipFile(f"{len(names)} files, none of them {MEMBER!r}")
        info = archive.getinfo(MEMBER if MEMBER in names else names[0])
        check_method(info)
        with archive.open(info) as member:
            yield member


def check_method(info: zipfile.ZipInfo) -> None:
    """Refuse a compression method whose members Python may decompress at once, whatever their size.

    Raises:
      NotImplementedError: the member is neither stored nor compressed by Deflate.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NotImplementedError(f"compressed by method {info.compress_type}, not by Deflate")


def bounded_chunks(source: IO[bytes], limit: int, name: str) -> Iterator[bytes]:
    """Yield the bytes of `source` in chunks.

    Raises:
      CorpusError: there are more than `limit` bytes.
    """
    total = 0
    while chunk := source.read(CHUNK):
        total += len(chunk)
        if total > limit:
            raise CorpusError(f"{name!r} must have at most {limit:,} bytes, got more; give a smaller file with --data")
        yield chunk


def read_cached(path: Path) -> np.ndarray:
    """Read and verify the cached enwik8.

    Raises:
      CorpusError: the size or the checksum is not enwik8's.
    """
    data = read_bounded(path, SIZE)
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != SIZE or digest != SHA256:
        raise CorpusError(
            f"the cached enwik8 must have {SIZE:,} bytes with sha256 {SHA256}, got {len(data):,} with {digest}; "
            f"delete {str(path)!r} and run again"
        )
    return np.frombuffer(data, np.uint8)


def download_enwik8(target: Path) -> None:
    """Download, decompress and verify enwik8; `target` is created only if all succeeds.

    Raises:
      UnreachableError: the server does not answer.
      CorpusError: the answer is not enwik8.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive, unpacked = Path(scratch, "archive.zip"), Path(scratch, MEMBER)
        fetch_archive(archive)
        try:
            extract_verified(archive, unpacked)
        except (*BROKEN_FILE, KeyError) as error:
            raise not_enwik8(describe_error(error)) from error
        os.replace(unpacked, target)


def fetch_archive(target: Path) -> None:
    """Download `URL` to a file of at most `DOWNLOAD_LIMIT` bytes."""
    try:
        response = urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(describe_error(error)) from error
    with response, open(target, "wb") as sink:
        announced = response.headers.get("Content-Length")
        try:
            with Progress(response.length if 0 < (response.length or 0) <= DOWNLOAD_LIMIT else None) as progress:
                for chunk in bounded_chunks(response, DOWNLOAD_LIMIT, URL):
                    sink.write(chunk)
                    progress.add(len(chunk))
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise not_enwik8(f"the transfer broke off: {describe_error(error)}") from error
        if announced is not None and announced != str(sink.tell()):
            raise not_enwik8(f"the transfer broke off after {sink.tell():,} of {announced} bytes")


class Progress:
    """Prints the progress of a download: on a terminal in one updated line, elsewhere at the start and the end."""

    def __init__(self, total: int | None):
        """Start a download of `total` bytes (None: unknown)."""
        self.total, self.done = total, 0
        self.on_terminal = sys.stdout.isatty()

    def __enter__(self) -> "Progress":
        self.began = self.shown = time.monotonic()
        if not self.on_terminal:
            print(f"  {'unknown size' if self.total is None else megabytes(self.total)}", flush=True)
        return self

    def add(self, count: int) -> None:
        """Count `count` more bytes."""
        self.done += count
        now = time.monotonic()
        if self.on_terminal and now - self.shown >= SECONDS_SHOWN:
            self.shown = now
            print(f"\r{self.line():{LINE_WIDTH}}", end="", flush=True)

    def __exit__(self, *_: object) -> None:
        begin, width = ("\r", LINE_WIDTH) if self.on_terminal else ("", 0)
        print(f"{begin}{self.line():{width}}", flush=True)

    def line(self) -> str:
        """Return the bytes received and their rate, on one line."""
        rate = megabytes(self.done / max(time.monotonic() - self.began, 1e-3))
        if not self.total:
            return f"  {megabytes(self.done)}, {rate}/s"
        share = min(self.done * 100 // self.total, 100)
        return f"  {share:3} %  {megabytes(self.done)} of {megabytes(self.total)}, {rate}/s"


def megabytes(count: float) -> str:
    """Format a number of bytes in MB."""
    return f"{count / 1e6:.1f} MB"


def extract_verified(archive: Path, target: Path) -> None:
    """Extract the member `enwik8` to `target` and verify its size and checksum."""
    with zipfile.ZipFile(archive) as opened:
        info = opened.getinfo(MEMBER)
        check_method(info)
        if info.file_size != SIZE:
            raise not_enwik8(f"its member has {info.file_size:,} bytes")
        digest = hashlib.sha256()
        with opened.open(info) as source, open(target, "wb") as sink:
            for chunk in bounded_chunks(source, SIZE, MEMBER):
                digest.update(chunk)
                sink.write(chunk)
    if digest.hexdigest() != SHA256:
        raise not_enwik8(f"its member has sha256 {digest.hexdigest()}")


def not_enwik8(reason: str) -> CorpusError:
    """Return the error for a download that is not enwik8."""
    return CorpusError(
        f"{URL} must be a zip archive whose member {MEMBER!r} has {SIZE:,} bytes with sha256 {SHA256}, "
        f"got another answer ({reason}); run again, or give --data FILE"
    )


def read_python_sources() -> Corpus:
    """Join the standard library's .py files up to `PYTHON_SOURCES_LIMIT` bytes, without tests and tables.

    Files are sorted by a hash of their paths: the order is the same on every machine, and the splits are alike.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    names = [path.as_posix() for path in paths if not left_out & set(path.parts)]
    kept = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    joined = bytearray()
    for name in kept:
        if len(joined) >= PYTHON_SOURCES_LIMIT:
            break
        joined += (root / name).read_bytes()
    if not joined:
        raise CorpusError(
            f"without enwik8, Python's sources must be in {str(root)!r}, got no .py file; give --data FILE"
        )
    version = ".".join(map(str, sys.version_info[:3]))
    data = np.frombuffer(bytes(joined[:PYTHON_SOURCES_LIMIT]), np.uint8)
    return Corpus(f"Python {version}'s standard library (not enwik8)", data)


def describe_error(error: BaseException) -> str:
    """Return the type and the message of an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
