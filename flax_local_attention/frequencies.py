"""Frequencies of rotary position embedding that published models have: how they stretch the longest wavelengths.

Each function returns radians a token, ``[dim / 2]`` float64, as NumPy computes them.
"""

import math
from collections.abc import Sequence

import numpy as np


def plain(dim: int, theta: float) -> np.ndarray:
    """Return ``theta^(-2m / dim)`` (RoFormer, arXiv 2104.09864, section 3.2.2)."""
    return theta ** -(np.arange(0, dim, 2) / dim)


def llama3(
    dim: int, theta: float, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> np.ndarray:
    """Divide by `factor` where a wave is longer than ``original_length / low_freq_factor``, and blend up to it.

    A wave shorter than ``original_length / high_freq_factor`` stays; between the two the share of the frequency that
    stays grows linearly with the waves in the original length.

    Source: Llama 3.1, section "RoPE scaling" of its reference code (meta-llama/llama-models).
    """
    frequencies = plain(dim, theta)
    waves = original_length * frequencies / (2 * math.pi)
    kept = np.clip((waves - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def yarn(
    dim: int,
    theta: float,
    *,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> np.ndarray:
    """Divide by `factor` where a number turns less than `beta_slow` times in the original length, and blend.

    A number that turns more than `beta_fast` times stays; between the two the share that stays falls linearly with the
    number's index.

    Source: YaRN, arXiv 2309.00071, section 3.2 ("NTK-by-parts"); the borders are indices, rounded outwards under
    `truncate`, as in its reference code.
    """
    low, high = (_index_of(turns, dim, theta, original_length) for turns in (beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high > low else 0.001
    divided = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    return plain(dim, theta) * (1 - divided + divided / factor)


def _index_of(turns, dim, theta, length):
    """Return the index, a fraction, of the number that turns so many times in a length."""
    return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))


def yarn_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Return what cosines and sines are multiplied by: ``0.1 ln(factor) + 1``, or the ratio of two such numbers.

    Source: YaRN, section 3.4; the ratio is that of DeepSeek-V2's code.
    """

    def scale(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def longrope(dim: int, theta: float, factors: Sequence[float]) -> np.ndarray:
    """Divide each frequency by a factor of its own (LongRoPE, arXiv 2402.13753, section 3.1)."""
    return plain(dim, theta) / np.asarray(factors, np.float64)


def longrope_factor(factor: float, original_length: int) -> float:
    """Return what cosines and sines are multiplied by: ``sqrt(1 + ln(factor) / ln(original_length))``.

    Source: Phi-3, arXiv 2404.14219, by its published code.
    """
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
