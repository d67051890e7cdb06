"""Baselines for a model's bits per byte: compressors on the same bytes, and published models on enwik8.

A compressor first reads the bytes before the split, as a model does in training; only the split's own bytes count.
"""

import gzip
import lzma
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from examples.corpus import Part

BEFORE_LIMIT = 8 * 2**20  # most bytes that a compressor reads before the split
DATA_LIMIT = 8 * 2**20  # xz would take most of a minute for more

XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 7}]  # a dictionary of 16 MiB, the sum of the two limits


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


# Bits per byte of the original's model and trainer in validation, on the first 4,000,000 bytes of enwik8, with the
# sizes of cpu-demo and trained on as many bytes: `python -m benchmarks.example`.
ORIGINAL_BITS = 3.44


def gzip_best(data: bytes) -> bytes:
    """Compress with `gzip -9`."""
    return gzip.compress(data, 9, mtime=0)


def xz_wide(data: bytes) -> bytes:
    """Compress with `xz -7`; higher presets only help beyond 16 MiB, more than is compressed here."""
    return lzma.compress(data, filters=XZ_FILTERS)


COMPRESSORS = {"gzip": gzip_best, "xz": xz_wide}


def compressed_bits(data: np.ndarray, before: np.ndarray, compress: Callable[[bytes], bytes]) -> float:
    """Return the bits per byte of `data`: what it adds to the compressed size of `before`.

    Args:
      data: the bytes that count, [bytes], uint8.
      before: the bytes that precede them, uint8; only the last `BEFORE_LIMIT` are used.
      compress: function from bytes to compressed bytes.
    """
    context = before[-BEFORE_LIMIT:].tobytes()
    with ThreadPoolExecutor() as pool:  # compressors release Python's global lock
        alone, together = pool.map(lambda packed: len(compress(packed)), (context, context + data.tobytes()))
    return (together - alone) * 8 / len(data)


def compress_all(data: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Return the `compressed_bits` of each compressor by name; empty for more than `DATA_LIMIT` bytes."""
    if len(data) > DATA_LIMIT:
        return {}
    return {name: compressed_bits(data, before, compress) for name, compress in COMPRESSORS.items()}


def describe_score(bits: float, split: str, compressed: Mapping[str, float], part: Part, is_demo: bool = False) -> str:
    """Compare a model's bits per byte with the baselines, on one line of at most 90 columns.

    Args:
      bits: the model's bits per byte.
      split: "train", "validation" or "test".
      compressed: bits per byte of compressors on the same split, from `compress_all`.
      part: how much of enwik8 the corpus is, from `enwik8_part`. The test split of the whole is compared with the
        nearest published model.
      is_demo: whether the run learns like the preset `cpu-demo`. On the start of enwik8 it is compared with the
        original's trainer.
    """
    parts = [f"{split} {bits:.3f}"]
    if compressed:
        baselines = ", ".join(f"{name} {needed:.2f}" for name, needed in compressed.items())
        parts.append(f"{baselines} given earlier bytes")
    if split == "test" and part == "whole":
        nearest = min(PUBLISHED, key=lambda result: abs(result.bits - bits))
        parts.append(f"published: {nearest.model} {nearest.parameters} {nearest.bits:.2f}")
    elif is_demo and part == "start":
        parts.append(f"the original's trainer {ORIGINAL_BITS:.2f}")
    return "; ".join(parts)
