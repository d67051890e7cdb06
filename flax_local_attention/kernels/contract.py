"""The contract of an implementation of attention."""

from typing import Protocol

import jax

from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum


class Implementation(Protocol):
    """A way to compute attention: a value, called with the operands and the options of a call.

    All implementations give the same numbers, within rounding, and drop the same probabilities; `Dense` is the
    definition. Masked tokens change nothing, whatever their keys, values and queries hold, NaN among it
    (`Operands.q_mask`).
    """

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend.

        Args:
            operands: With at least one query, key and head.
            options: Options of the call.

        Returns:
            The output of each query, ``[b, h, g, n, d]`` in q's dtype, and its log-sum-exp, ``[b, h, g, n]``.

        Raises:
            Unsupported: This implementation cannot serve the call.
        """
        ...


class Unsupported(NotImplementedError):  # noqa: N818 - names a call, as NotImplementedError does
    """The error of a named implementation that cannot serve a call; the message has every reason."""
