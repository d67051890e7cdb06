"""The layouts of the kernels' arrays in memory."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Layout(NamedTuple):
    """The layout of an array ``[b, h, g, ...]`` in memory: in this order, or ``[b, n, h, d]`` where g is 1.

    Attributes:
        is_token_major: Whether the order is ``[b, n, h, d]``.
    """

    is_token_major: bool

    def outside(self, x: Any) -> Any:
        """Bring an array ``[b, h, g, ...]``, or its type, to its layout in memory."""
        if not self.is_token_major:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            b, h, _, n, d = x.shape
            return x.update(shape=(b, n, h, d))
        return jnp.swapaxes(x[:, :, 0], 1, 2)

    def inside(self, x):
        """Bring an array from its layout in memory back to ``[b, h, g, ...]``."""
        return jnp.swapaxes(x, 1, 2)[:, :, None] if self.is_token_major else x

    def lead(self, shape):
        """Return the sizes b, h and g of a shape in memory."""
        return (shape[0], shape[2], 1) if self.is_token_major else shape[:3]

    def rest(self, shape):
        """Return the other sizes of a shape in memory: n, and d if there is one."""
        return (shape[1], shape[3]) if self.is_token_major else shape[3:]

    def join(self, lead, rest):
        """Put three entries for b, h and g, and the entries for the other axes, in the order of memory."""
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
        kernel: Function of the arrays and the types of the results, both in their layouts; it returns the results.
        arrays: Arrays ``[b, h, g, ...]``.
        results: Types of the results, ``[b, h, g, ...]``.
        layouts: Layouts of the arrays, then of the results.

    Returns:
        The results, ``[b, h, g, ...]``.
    """
    of_results = layouts[len(arrays) :]
    given = [layout.outside(x) for layout, x in zip(layouts, arrays, strict=False)]
    # Inside shard_map, Pallas asks which mesh axes a result varies over: the same as the arguments.
    varying = jax.typeof(given[0]).manual_axis_type
    types = [
        layout.outside(jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying))
        for layout, x in zip(of_results, results, strict=True)
    ]
    return [layout.inside(x) for layout, x in zip(of_results, kernel(given, types), strict=True)]
