"""Implementations of attention: their table, and which one serves a call."""

import dataclasses
from collections.abc import Callable

from flax_local_attention.kernels.contract import Implementation, Unsupported
from flax_local_attention.kernels.dense import Dense
from flax_local_attention.kernels.fastest import Fastest
from flax_local_attention.kernels.fused import RowKernels
from flax_local_attention.kernels.triton import Tiles, Triton
from flax_local_attention.kernels.windowed import Windowed

__all__ = [
    "IMPLEMENTATIONS",
    "Dense",
    "Fastest",
    "Implementation",
    "Tiles",
    "Triton",
    "Unsupported",
    "Windowed",
    "between_products",
    "choose_implementation",
    "row_kernels",
]

IMPLEMENTATIONS: dict[str, Implementation] = {"dense": Dense(), "xla": Windowed(), "triton": Triton()}
"""Every implementation by its name, as it comes."""


def choose_implementation(implementation: str | Implementation | None) -> Implementation:
    """Return the implementation that is meant: of this name, this value, or, for None, the fastest that serves a call.

    Raises:
        ValueError: There is none of this name.
        TypeError: It is neither a name nor an implementation.
    """
    if implementation is None:
        return Fastest()
    if isinstance(implementation, str):
        if implementation not in IMPLEMENTATIONS:
            names = ", ".join(map(repr, IMPLEMENTATIONS))
            raise ValueError(f"`implementation` must be None, one of {names}, or a value, got {implementation!r}.")
        return IMPLEMENTATIONS[implementation]
    if isinstance(implementation, type) or not callable(implementation):
        raise TypeError(
            f"`implementation` must be a name or a value such as Windowed(block=128), got {implementation!r}."
        )
    return implementation


def row_kernels(implementation: str | Implementation | None, kind: Callable[[bool], RowKernels]) -> RowKernels | None:
    """Return the kernels for tokens beside an implementation of attention: some for None and Triton.

    They never refuse: a device or a call that they do not serve has the plain code.
    """
    implementation = choose_implementation(implementation)
    if isinstance(implementation, Triton):
        return kind(implementation.interpret)
    return kind(False) if isinstance(implementation, Fastest) else None


def between_products(implementation: str | Implementation | None) -> Implementation:
    """Return an implementation for queries, keys and values that come from a product of tokens, and go to one."""
    implementation = choose_implementation(implementation)
    if isinstance(implementation, Triton | Fastest):
        return dataclasses.replace(implementation, token_major=True)
    return implementation
