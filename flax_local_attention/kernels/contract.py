"""The contract of an implementation of attention, and the error of one that cannot serve a call."""

from typing import Protocol

import jax

from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum


class Implementation(Protocol):
    """A way to compute attention: a value that is called with the operands and the options of a call.

    All implementations agree within rounding, and dropout drops the same probabilities in all of them. `Dense` is the
    definition. Masked tokens change nothing, even if their queries, keys and values are NaN (`Operands.q_mask`).
    """

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend.

        Args:
            operands: With at least one query, key and head.
            options: Options of the call.

        Returns:
            The output, ``[b, h, g, n, d]`` in q's dtype, and the log-sum-exp of each query, ``[b, h, g, n]``.

        Raises:
            Unsupported: This implementation cannot serve the call.
        """
        ...


class Unsupported(NotImplementedError):  # noqa: N818 - named like NotImplementedError
    """The error of a named implementation that cannot serve a call; its message lists every reason."""
