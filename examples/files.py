"""Safe reading and writing of a run's files: bounded reads, atomic writes, no links followed out of the run.

`metrics.jsonl` holds one JSON object per line. Nothing here needs JAX.
"""

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS_LIMIT = 2**20  # most bytes of settings.json
METRICS_LIMIT = 2**28  # most bytes of metrics.jsonl


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
      OSError: it is not a regular file, it is larger, or it cannot be read.
    """
    check_regular(path)
    with open(path, "rb") as source:
        content = source.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(path))
    return content


def check_regular(path: Path) -> None:
    """Refuse everything but a regular file: reading a pipe or a device may never end.

    Raises:
      OSError: it is not a regular file, or does not exist.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with open(partial, "xb") as sink:  # "x" does not follow a link
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append(path: Path, content: bytes) -> None:
    """Append `content` to a file, all of it or nothing."""
    with open(path, "ab", buffering=0) as sink:
        before = sink.tell()
        try:
            while content:
                content = content[sink.write(content) :]
        except OSError:
            sink.truncate(before)
            raise


def find_link_out(directory: Path, parts: Iterable[Path]) -> Path | None:
    """Return a symbolic link, in `parts` of a directory or below them, that leads out of it; None without one."""
    root = os.path.realpath(directory)
    for part in parts:
        for path in (part, *part.rglob("*")):
            if path.is_symlink() and os.path.commonpath([root, os.path.realpath(path)]) != root:
                return path
    return None


# ---- metrics.jsonl


def read_lines(metrics: Path) -> list[str]:
    """Return the complete lines of a metrics file; the last may be cut short while a run writes it."""
    lines = read_bounded(metrics, METRICS_LIMIT).decode("utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if is_entry(line)]


def is_entry(line: str) -> bool:
    """Return whether a line is a complete metrics entry."""
    try:
        entry = json.loads(line)
        (step, split), bits = entry_key(entry), entry["bits_per_byte"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    is_count = type(step) is int and 0 <= step < 2**63
    return line.endswith("\n") and is_count and isinstance(split, str) and isinstance(bits, float)


def entry_key(entry: dict[str, Any]) -> tuple[int, str]:
    """Return the step and the split of an entry, which no two entries share."""
    return entry["step"], entry["split"]
