"""Local attention by its definition, over all keys at once."""

import dataclasses

import jax
import jax.numpy as jnp

from flax_local_attention.operands import Operands, over_heads
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum, attend_head, bias_of, query_positions


@dataclasses.dataclass(frozen=True)
class Dense:
    """Local attention by its definition: all n^2 scores at once, in time and memory O(n^2).

    The other implementations are tested against it. Positions count from the first key, so in a long sequence the scale
    of xPos leaves float32's range.

    Examples:
        >>> q = k = v = jnp.ones((2, 16, 64))
        >>> local_attention(q, k, v, window_size=4, implementation=Dense()).shape
        (2, 16, 64)
    """

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`."""
        window, rotary = options.window, options.rotary
        i, j = (
            operands.q_offset + jnp.arange(operands.q.shape[-2], dtype=jnp.int32),
            jnp.arange(operands.k.shape[-2], dtype=jnp.int32),
        )
        q_table = k_table = None
        if rotary is not None:
            q_table = rotary.query_table(query_positions(i, window, rotary), operands.dtype)
            k_table = rotary.key_table(j, operands.dtype)

        def attend_all(head):
            bias = None if head.bias is None else bias_of(window, head.bias, i, j)
            return attend_head(head._replace(bias=bias), i, j, options, q_table, k_table)

        return over_heads(attend_all, operands.widen_scores()._replace(q_offset=None))
