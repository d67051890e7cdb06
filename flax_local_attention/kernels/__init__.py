"""Implementations of attention: their table, and which one serves a call."""

from flax_local_attention.kernels.contract import Implementation, Unsupported
from flax_local_attention.kernels.dense import Dense
from flax_local_attention.kernels.fastest import Fastest
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
    "choose_implementation",
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
