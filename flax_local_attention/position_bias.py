"""`DynamicPositionBias`, a learned bias for every distance between a query and a key."""

from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from flax_local_attention.checks import check_count, check_integer, optional
from flax_local_attention.fields import Dtypes, Products, linear_bias_init
from flax_local_attention.linear import Linear
from flax_local_attention.operands import wide_dtype


class DynamicPositionBias(Dtypes, Products):
    """A bias for every distance, computed from the distance by a small network.

    Attributes:
        dim: Hidden width.
        heads: Number of heads: biases per distance.
        signed: Whether the network sees the sign of a distance, not only its size. This matters only for windows that
            look forward.

    Source: ``DynamicPositionBias`` of ``local-attention`` 1.11.2, which supports slabs of two windows only
    (``tests/test_original.py::test_dynamic_bias_works_for_every_window``).
    """

    dim: int
    heads: int
    _: KW_ONLY
    signed: bool = False

    @nn.compact
    def __call__(self, i: int, j: int, offset: int | None = None) -> jax.Array:
        """Compute the biases of `i` queries and `j` keys.

        For a `Window`, call ``bias(window.size, window.slab, window.backward)``.

        Args:
            i: Number of queries.
            j: Number of keys.
            offset: Position of the first query among the keys. None means ``j - i``, as in a causal slab.

        Returns:
            ``[heads, i, j]``: the network's output for ``|column - row - offset|``, or for ``column - row - offset`` if
            `signed`.

        Raises:
            ValueError: There are fewer keys than queries, and no offset.
        """
        check_count("i", i, 1)
        check_count("j", j, 1)
        optional(check_integer)("offset", offset)
        if offset is None and j < i:
            raise ValueError(f"`j` must be at least `i` without an `offset`, got {j} keys for {i} queries; give one.")
        offset = j - i if offset is None else offset
        # Each distance once, from column 0 of row i - 1 to column j - 1 of row 0.
        first = -(i - 1) - offset
        distances = jnp.arange(first, j - offset, dtype=jnp.float32)
        biases = self._network((distances if self.signed else jnp.abs(distances))[:, None])
        dtype = biases.dtype
        biases = biases.astype(wide_dtype(dtype))  # the gradient sums all entries of a distance
        index = jnp.arange(j)[None] - jnp.arange(i)[:, None] + (i - 1)
        return rearrange(biases[index], "i j h -> h i j").astype(dtype)

    def _network(self, x):
        for index, (fan_in, features) in enumerate(((1, self.dim), (self.dim, self.dim), (self.dim, self.heads))):
            bias_init, name = linear_bias_init(fan_in), f"dense_{index}"
            linear = self.make(Linear, fan_in, features, use_bias=True, bias_init=bias_init, name=name)
            x = linear(nn.silu(x) if index else x)
        return x
