"""Frequencies of rotary position embedding in published models, which stretch the longest wavelengths.

Each function that makes frequencies returns radians per token, a NumPy array of ``[dim / 2]`` float64.
"""

import math
from collections.abc import Sequence

import numpy as np


def plain(dim: int, theta: float) -> np.ndarray:
    """Compute ``theta^(-2m / dim)`` (RoFormer, arXiv 2104.09864, section 3.2.2)."""
    return theta ** -(np.arange(0, dim, 2) / dim)


def llama3(
    dim: int, theta: float, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> np.ndarray:
    """Divide frequencies with a wavelength above ``original_length / low_freq_factor`` by `factor`, and blend.

    Frequencies with a wavelength below ``original_length / high_freq_factor`` stay. In between, the share that stays
    grows linearly with the number of waves in the original length.

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
    """Divide frequencies that make fewer than `beta_slow` turns in the original length by `factor`, and blend.

    Frequencies that make more than `beta_fast` turns stay. In between, the share that stays falls linearly with the
    index.

    Source: YaRN, arXiv 2309.00071, section 3.2 ("NTK-by-parts"). As in its reference code, the borders are indices,
    rounded outwards under `truncate`.
    """
    low, high = (_index_of(turns, dim, theta, original_length) for turns in (beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high > low else 0.001
    divided = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    return plain(dim, theta) * (1 - divided + divided / factor)


def _index_of(turns, dim, theta, length):
    """Return the index, which may be fractional, of the frequency that makes so many turns in a length."""
    return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))


def yarn_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Compute the factor of cosines and sines, ``scale(mscale) / scale(mscale_all_dim)`` or else ``scale(1)``.

    ``scale(x)`` is ``0.1 x ln(factor) + 1``, or 1 if `factor` is at most 1.

    Source: YaRN, section 3.4; the ratio is from DeepSeek-V2's code.
    """

    def scale(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def longrope(dim: int, theta: float, factors: Sequence[float]) -> np.ndarray:
    """Divide each frequency by a factor of its own (LongRoPE, arXiv 2402.13753, section 3.1)."""
    return plain(dim, theta) / np.asarray(factors, np.float64)


def longrope_factor(factor: float, original_length: int) -> float:
    """Compute the factor of cosines and sines, ``sqrt(1 + ln(factor) / ln(original_length))``.

    Source: Phi-3, arXiv 2404.14219, and its published code.
    """
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
