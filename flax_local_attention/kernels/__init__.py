"""Implementations of attention: the table of their names, and the choice of one for a call."""

import dataclasses
from collections.abc import Callable

from flax_local_attention.checks import describe
from flax_local_attention.kernels.contract import Implementation, Unsupported
from flax_local_attention.kernels.dense import Dense
from flax_local_attention.kernels.family import KernelFamily
from flax_local_attention.kernels.fastest import Fastest
from flax_local_attention.kernels.fused import RowKernels
from flax_local_attention.kernels.mosaic import MosaicGPU
from flax_local_attention.kernels.tpu import TPU
from flax_local_attention.kernels.triton import Tiles, Triton
from flax_local_attention.kernels.windowed import Windowed

__all__ = [
    "IMPLEMENTATIONS",
    "TPU",
    "Dense",
    "Fastest",
    "Implementation",
    "KernelFamily",
    "MosaicGPU",
    "Tiles",
    "Triton",
    "Unsupported",
    "Windowed",
    "between_products",
    "choose_implementation",
    "row_kernels",
]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "dense": Dense(),
    "xla": Windowed(),
    "triton": Triton(),
    "mosaic": MosaicGPU(),
    "tpu": TPU(),
}
"""Every implementation by name, with default fields."""


def choose_implementation(
    implementation: str | Implementation | None, argument: str = "implementation"
) -> Implementation:
    """Return the implementation of a name, a given implementation unchanged, or for None the fastest for each call.

    Args:
        implementation: A name in `IMPLEMENTATIONS`, an implementation, or None.
        argument: Name of the caller's argument, for error messages.

    Raises:
        ValueError: No implementation has this name.
        TypeError: The argument is neither None, a name nor an implementation.
    """
    if implementation is None:
        return Fastest()
    if isinstance(implementation, str):
        if implementation not in IMPLEMENTATIONS:
            names = ", ".join(map(repr, IMPLEMENTATIONS))
            raise ValueError(
                f"`{argument}` must be None, one of {names}, or a value, got {implementation!r}; choose one, or "
                "leave it out."
            )
        return IMPLEMENTATIONS[implementation]
    if isinstance(implementation, type) or not callable(implementation):
        raise TypeError(
            f"`{argument}` must be a name or a value such as Windowed(block=128), got {describe(implementation)}; "
            "leave it out for the fastest."
        )
    return implementation


def row_kernels(implementation: str | Implementation | None, kind: Callable[[bool], RowKernels]) -> RowKernels | None:
    """Return the kernels of a token-wise operation to use beside an implementation: `kind` for None and Triton.

    For other implementations it is None, which means plain JAX. The kernels never refuse: plain JAX computes the calls
    that they do not serve.
    """
    implementation = choose_implementation(implementation)
    if isinstance(implementation, Triton):
        return kind(implementation.interpret)
    return kind(False) if isinstance(implementation, Fastest) else None


def between_products(implementation: str | Implementation | None) -> Implementation:
    """Return the implementation to use between the projections of a layer, where arrays lie as ``[b, n, h, d]``."""
    implementation = choose_implementation(implementation)
    if isinstance(implementation, KernelFamily):
        return implementation.by_tokens()
    if isinstance(implementation, Fastest):
        return dataclasses.replace(implementation, token_major=True)
    return implementation
