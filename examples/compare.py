"""A figure in its place: what compressors need for the same bytes, and what published models need for enwik8.

A compressor gets the bytes before those that count, as a model gets them in training, and pays only for what follows.
"""

import gzip
import lzma
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from examples.corpus import Part

BEFORE_LIMIT = 8 * 2**20  # bytes that a compressor sees before those that count
DATA_LIMIT = 8 * 2**20  # more bytes would take xz the better part of a minute

XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 7}]  # its dictionary of 16 MiB holds the limits together


class Published(NamedTuple):
    """A published result on the test part of enwik8, in bits per byte."""

    model: str
    parameters: str
    bits: float
    source: str


PUBLISHED = (
    Published("Transformer", "44M", 1.11, "Al-Rfou et al. 2018, arXiv:1808.04444, 12 layers"),
    Published("Transformer-XL", "41M", 1.06, "Dai et al. 2019, arXiv:1901.02860, 12 layers"),
    Published("Transformer", "235M", 1.06, "Al-Rfou et al. 2018, arXiv:1808.04444, 64 layers"),
    Published("Transformer-XL", "88M", 1.03, "Dai et al. 2019, arXiv:1901.02860, 18 layers"),
    Published("Longformer", "41M", 1.00, "Beltagy et al. 2020, arXiv:2004.05150, 12 layers"),
    Published("Longformer", "102M", 0.99, "Beltagy et al. 2020, arXiv:2004.05150, 30 layers"),
    Published("Transformer-XL", "277M", 0.99, "Dai et al. 2019, arXiv:1901.02860, 24 layers"),
    Published("Adaptive span", "209M", 0.98, "Sukhbaatar et al. 2019, arXiv:1905.07799, 24 layers"),
)


# The original's model and trainer in validation, on the first 4,000,000 bytes of enwik8, with the sizes of cpu-demo and
# after as many bytes: `python -m benchmarks.example`.
ORIGINAL_BITS = 3.44


def gzip_best(data: bytes) -> bytes:
    """Compress with `gzip -9`."""
    return gzip.compress(data, 9, mtime=0)


def xz_wide(data: bytes) -> bytes:
    """Compress with `xz -7`; higher presets differ from it only for more bytes than are compressed here."""
    return lzma.compress(data, filters=XZ_FILTERS)


COMPRESSORS = {"gzip": gzip_best, "xz": xz_wide}


def compressed_bits(data: np.ndarray, before: np.ndarray, compress: Callable[[bytes], bytes]) -> float:
    """Return the bits per byte of `data` that `compress` adds to what it needs for `before`.

    Args:
      data: the bytes that count, [bytes], uint8.
      before: the bytes that precede them, uint8; only the last `BEFORE_LIMIT` are used.
      compress: from bytes to fewer.
    """
    context = before[-BEFORE_LIMIT:].tobytes()
    with ThreadPoolExecutor() as pool:  # compressors let go of Python's lock
        alone, together = pool.map(lambda packed: len(compress(packed)), (context, context + data.tobytes()))
    return (together - alone) * 8 / len(data)


def compress_all(data: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Return `compressed_bits` of every compressor by its name; {} for more than `DATA_LIMIT` bytes."""
    if len(data) > DATA_LIMIT:
        return {}
    return {name: compressed_bits(data, before, compress) for name, compress in COMPRESSORS.items()}


def place(bits: float, split: str, compressed: Mapping[str, float], part: Part, is_demo: bool = False) -> str:
    """Return one line of at most 90 columns that sets a model's figure beside others, in bits per byte.

    Args:
      bits: what the model needs per byte.
      split: "train", "validation" or "test", whose bytes these are.
      compressed: what compressors need for the same bytes, as of `compress_all`.
      part: how much of enwik8 the corpus is, as of `enwik8_part`. With all of it, a figure of the test is set
        beside the nearest published one; published ones say nothing of a part.
      is_demo: whether the model and its training are those of the preset `cpu-demo`, for which the original's trainer
        was measured on the start of enwik8.
    """
    parts = [f"{split} {bits:.3f}"]
    if compressed:
        figures = ", ".join(f"{name} {needed:.2f}" for name, needed in compressed.items())
        parts.append(f"{figures} given bytes before")
    if split == "test" and part == "whole":
        nearest = min(PUBLISHED, key=lambda result: abs(result.bits - bits))
        parts.append(f"published: {nearest.model} {nearest.parameters} {nearest.bits:.2f}")
    elif is_demo and part == "start":
        parts.append(f"the original's trainer {ORIGINAL_BITS:.2f}")
    return "; ".join(parts)
