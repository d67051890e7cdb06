"""How arrays of kernels lie in memory."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Layout(NamedTuple):
    """The layout of an array ``[b, h, g, ...]`` in memory: as it is, or ``[b, n, h, d]``."""

    is_token_major: bool

    def outside(self, x: Any) -> Any:
        """Return an array, or its type, in the layout of memory."""
        if not self.is_token_major:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            b, h, _, n, d = x.shape
            return x.update(shape=(b, n, h, d))
        return jnp.swapaxes(x[:, :, 0], 1, 2)

    def inside(self, x):
        """Return an array ``[b, h, g, ...]`` from its layout in memory."""
        return jnp.swapaxes(x, 1, 2)[:, :, None] if self.is_token_major else x

    def lead(self, shape):
        """Return the sizes b, h, g from a shape in memory."""
        return (shape[0], shape[2], 1) if self.is_token_major else shape[:3]

    def rest(self, shape):
        """Return the other sizes."""
        return (shape[1], shape[3]) if self.is_token_major else shape[3:]

    def join(self, lead, rest):
        """Join entries for the leading axes and for the others in the order of memory."""
        if not self.is_token_major:
            return (*lead, *rest)
        (b, h, _), (n, d) = lead, rest
        return b, n, h, d


def run_in_memory(
    kernel: Callable[[Sequence[jax.Array], Sequence[jax.ShapeDtypeStruct]], Sequence[jax.Array]],
    arrays: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    layouts: Sequence[Layout],
) -> list[jax.Array]:
    """Run a kernel on arrays as they lie in memory.

    Args:
        kernel: Function of arrays and of types of results, both as they lie in memory; returns the results.
        arrays, results: Arrays ``[b, h, g, ...]``, and types of the results.
        layouts: Their layouts, arrays first.

    Returns:
        The results, ``[b, h, g, ...]``.
    """
    of_results = layouts[len(arrays) :]
    given = [layout.outside(x) for layout, x in zip(layouts, arrays, strict=False)]
    # Inside shard_map Pallas needs the mesh axes that a result varies over: those of the arguments.
    varying = jax.typeof(given[0]).manual_axis_type
    types = [
        layout.outside(jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying))
        for layout, x in zip(of_results, results, strict=True)
    ]
    return [layout.inside(x) for layout, x in zip(of_results, kernel(given, types), strict=True)]
