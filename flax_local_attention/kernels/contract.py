"""What an implementation of attention is."""

from typing import Protocol

import jax

from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum


class Implementation(Protocol):
    """A way to compute attention: a value, called with the operands and the options of a call.

    All implementations give the same numbers, within rounding, and drop the same probabilities; `Dense` is the
    definition. What masked tokens hold, NaN among it, changes nothing; queries of such tokens may hold it too
    (`Operands.q_mask`).
    """

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend.

        Args:
            operands: With at least one query, key and head.
            options: Of the call.

        Returns:
            What each query gathered, ``[b, h, g, n, d]`` in q's dtype; the sums of their softmax, ``[b, h, g, n]``.

        Raises:
            Unsupported: The call has what this implementation cannot do.
        """
        ...


class Unsupported(NotImplementedError):  # noqa: N818 - names a call, as NotImplementedError does
    """An implementation that was asked for by name cannot serve a call; the message has every reason."""
