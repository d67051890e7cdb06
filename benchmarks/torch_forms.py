"""Forms of local attention in PyTorch: the original package, and what PyTorch itself has."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import Case
from benchmarks.tables import Skipped

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def original(case: Case, device: str) -> Attention:
    """Return the attention of `local-attention`, the original of this library."""
    try:
        from local_attention import LocalAttention
    except ImportError:
        raise Skipped("`local-attention` is not installed") from None
    return LocalAttention(
        window_size=case.window_size,
        causal=True,
        exact_windowsize=case.exact,
        dim=case.d if case.rotary else None,
        autopad=True,
    ).to(device)


def masked(case: Case, device: str) -> Attention:
    """Return `scaled_dot_product_attention` with the window as a boolean mask of n x n."""
    i = torch.arange(case.n, device=device)
    visible = case.window.sees(i[:, None], i)
    rotate = _rotation(case, device)
    return lambda q, k, v: scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=visible)


def flex(case: Case, device: str) -> Attention:
    """Return `flex_attention`, compiled, with the window as a block mask."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        raise Skipped(f"torch {torch.__version__} has no `flex_attention`") from None

    def sees(b, h, i, j):
        return case.window.sees(i, j)

    blocks = create_block_mask(sees, None, None, case.n, case.n, device=device, _compile=device == "cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    rotate = _rotation(case, device)
    return lambda q, k, v: compiled(rotate(q), rotate(k), v, block_mask=blocks)


def _rotation(case, device):
    if not case.rotary:
        return lambda x: x
    frequency = 10000.0 ** -(np.arange(0, case.d, 2) / case.d)
    angles = torch.from_numpy(np.tile(np.arange(case.n)[:, None] * frequency, 2)).float().to(device)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x):
        real, imaginary = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-imaginary, real], dim=-1) * sin).to(x.dtype)

    return rotate


FORMS: dict[str, Callable[[Case, str], Attention]] = {
    "torch original": original,
    "torch SDPA with a mask": masked,
    "torch FlexAttention": flex,
}


@functools.lru_cache(maxsize=1)
def inputs(case: Case, device: str) -> list[torch.Tensor]:
    """Return q, k, v and the cotangent of the result, which all forms share."""
    return [torch.from_numpy(x).to(device, getattr(torch, case.dtype)) for x in case.arrays()]


def form(name: str, case: Case, device: str) -> Attention:
    """Return the attention called `name` for a case; raise `Skipped` if it cannot serve the case."""
    if name not in FORMS:
        raise SystemExit(f"There is no form {name!r} in PyTorch; there are {list(FORMS)}.")
    return FORMS[name](case, device)
