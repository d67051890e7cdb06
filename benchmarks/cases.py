"""The cases that are measured: a shape, a dtype and a kind of window."""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.machine import GIB
from benchmarks.tables import Skipped
from flax_local_attention import AttentionOptions, Rotary, Window

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SCORE_BYTES = 12  # per score, which XLA takes for the gradient where all n x n are in memory


@dataclasses.dataclass(frozen=True)
class Case:
    """Causal local attention of ``[b, h, n, d]`` in which each window looks one window back."""

    b: int
    h: int
    n: int
    d: int
    window_size: int
    dtype: str
    exact: bool
    rotary: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.b, self.h, self.n, self.d

    @property
    def window(self) -> Window:
        return Window(self.window_size, causal=True, exact_windowsize=self.exact)

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(self.window, rotary=Rotary(self.d) if self.rotary else None)

    @property
    def array_bytes(self) -> int:
        """Bytes of q; k, v, the result and each gradient have as many."""
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def facts(self) -> dict[str, Any]:
        """The case as a record names it."""
        kind = "exact" if self.exact else "plain"
        sizes = {"b": self.b, "h": self.h, "kv_heads": self.h, "n": self.n, "d": self.d, "window": self.window_size}
        return sizes | {"kind": kind, "dtype": self.dtype, "rotary": self.rotary}

    @property
    def title(self) -> str:
        kind = "exact" if self.exact else "plain"
        rotary = " with rotary" if self.rotary else ""
        return f"{list(self.shape)} {self.dtype}, window {self.window_size}, {kind} causal{rotary}"

    def arrays(self) -> Iterator[np.ndarray]:
        """Draw q, k, v and the cotangent of the result: unit normals in float32, the same on every machine."""
        rng = np.random.Generator(np.random.Philox(0))
        return (rng.standard_normal(self.shape, np.float32) for _ in range(4))


def add_case_options(parser: argparse.ArgumentParser, shapes: list[str], dtypes: list[str]):
    """Add the options that choose cases; `cases_of` reads them."""
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="BxHxNxD:W", help="shapes and window sizes")
    parser.add_argument("--dtype", nargs="+", default=dtypes, choices=list(BYTES))
    parser.add_argument("--kind", nargs="+", default=["exact"], choices=["exact", "plain"], help="kind of window")
    parser.add_argument(
        "--rotary", action="store_true", help="apply rotary positions to queries and keys, in every form"
    )


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return every combination of the shapes, dtypes and kinds in the options."""
    return [
        Case(*_read_shape(shape), dtype, kind == "exact", options.rotary)
        for shape in options.shapes
        for dtype in options.dtype
        for kind in options.kind
    ]


def _read_shape(text):
    try:
        sizes, window_size = text.split(":")
        b, h, n, d = map(int, sizes.split("x"))
        return b, h, n, d, int(window_size)
    except ValueError:
        raise SystemExit(f"A shape must read BxHxNxD:W, got {text!r}; write say 1x8x8192x64:256.") from None


def refuse_scores(count: int, limit_gib: float, score_bytes: int = SCORE_BYTES):
    """Skip a form that computes all n x n scores if they take more than a limit.

    A CPU that runs out of memory ends the process, and a GPU leaves too little for the forms that follow.
    """
    size = score_bytes * count / GIB
    if size > limit_gib:
        raise Skipped(f"n x n takes about {size:.0f} GiB, more than --limit-gib {limit_gib:g}")
