"""The blocks that a kernel visits: the bounds of its loop, computed from the window alone."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_local_attention.window import TransposedWindow, Window


class VisitedBlocks(NamedTuple):
    """The blocks of columns that a block of rows visits: ints, NumPy arrays or traced values.

    A row sees some column in the blocks ``start <= block < stop``. In ``whole_start <= block < whole_stop`` every row
    sees every column, so they need no mask; the others hold an edge of the window or the end of the sequence.

    Attributes:
        start: First block to visit.
        stop: Block after the last one to visit.
        whole_start: First block without an edge.
        whole_stop: Block after the last one without an edge.
    """

    start: Any
    stop: Any
    whole_start: Any
    whole_stop: Any

    def has_edge(self, block: Any) -> Any:
        """Return whether a visited block needs a mask: some row does not see all of its columns."""
        return (block < self.whole_start) | (block >= self.whole_stop)


def visited_blocks(
    window: Window | TransposedWindow, first: Any, last: Any, size: int, n: int, origin: Any = 0
) -> VisitedBlocks:
    """Find the blocks of columns that a block of rows visits.

    Rows are queries and columns are keys; for a transposed window, rows are keys and columns are queries.

    Args:
        window: Which columns a row sees.
        first: Position of the block's first row.
        last: Position of its last row.
        size: Columns in a block.
        n: Columns in the sequence.
        origin: Position of the first column.

    Examples:
        >>> visited_blocks(Window(4, causal=True), first=8, last=15, size=4, n=32)
        VisitedBlocks(start=1, stop=4, whole_start=2, whole_stop=2)
    """
    is_known = all(isinstance(position, int | np.integer | np.ndarray) for position in (first, last, origin))
    xp = np if is_known else jnp

    def among_columns(position):
        return xp.clip(position, origin, origin + n) - origin  # subtracting first could overflow int32

    def blocks_of(columns):
        # Kernels compute this in every step, and a shift is cheaper than a traced floor division, which also compares
        # the signs.
        is_power = size & (size - 1) == 0
        return columns >> (size.bit_length() - 1) if is_power and not is_known else columns // size

    start, stop = among_columns(window.start(first)), among_columns(window.stop(last))
    begin = blocks_of(start)
    end = xp.where(stop > start, blocks_of(stop + size - 1), begin)
    whole_begin = xp.clip(blocks_of(among_columns(window.start(last)) + size - 1), begin, end)
    whole_end = xp.clip(blocks_of(among_columns(window.stop(first))), whole_begin, end)
    blocks = VisitedBlocks(begin, end, whole_begin, whole_end)
    return VisitedBlocks(*map(int, blocks)) if is_known and np.ndim(end) == 0 else blocks
