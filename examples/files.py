"""Files of a run: read within bounds, written whole or not at all, never through a link, and its figures.

A run's figures are `metrics.jsonl`, one JSON object a line. Nothing here needs JAX.
"""

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS_LIMIT = 2**20  # bytes of a run's settings, at most
METRICS_LIMIT = 2**28  # and of its figures


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes.

    Raises:
      OSError: it is a device, a pipe or a directory, it has more bytes, or it cannot be read.
    """
    check_regular(path)
    with open(path, "rb") as source:
        content = source.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(path))
    return content


def check_regular(path: Path) -> None:
    """Refuse what is no regular file: a pipe may have no end, or no beginning.

    Raises:
      OSError: it is something else, or not there.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`; whoever reads it sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with open(partial, "xb") as sink:  # "x" follows no link
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append(path: Path, content: bytes) -> None:
    """Add `content` to a file, all of it or nothing."""
    with open(path, "ab", buffering=0) as sink:
        before = sink.tell()
        try:
            while content:
                content = content[sink.write(content) :]
        except OSError:
            sink.truncate(before)
            raise


def find_link_out(directory: Path, parts: Iterable[Path]) -> Path | None:
    """Return a link among parts of a directory, or in them, that leads out of it; None if there is none."""
    root = os.path.realpath(directory)
    for part in parts:
        for path in (part, *part.rglob("*")):
            if path.is_symlink() and os.path.commonpath([root, os.path.realpath(path)]) != root:
                return path
    return None


# ---- figures


def read_lines(metrics: Path) -> list[str]:
    """Return the lines of a metrics file that are whole figures; a run may write while one looks."""
    lines = read_bounded(metrics, METRICS_LIMIT).decode("utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if is_figure(line)]


def is_figure(line: str) -> bool:
    """Return whether a line is a whole figure."""
    try:
        entry = json.loads(line)
        (step, split), bits = name_figure(entry), entry["bits_per_byte"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    is_count = type(step) is int and 0 <= step < 2**63
    return line.endswith("\n") and is_count and isinstance(split, str) and isinstance(bits, float)


def name_figure(entry: dict[str, Any]) -> tuple[int, str]:
    """Return what no two figures have in common."""
    return entry["step"], entry["split"]
