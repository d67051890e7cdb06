"""Embeddings of tokens and positions."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.sharding import PartitionSpec

from flax_local_attention.fields import Dtypes, Kernels
from flax_local_attention.kernels import row_kernels
from flax_local_attention.kernels.devices import Labels, label
from flax_local_attention.kernels.fused import Fused, GradientCall
from flax_local_attention.sharding import apart, respread, spec_of, spread_by_compiler

# Most rows of a table whose gradient is a matrix product on a GPU: additions of many tokens to few rows would wait for
# each other.
MOST_ROWS = 2048


class Embedding(Dtypes, Kernels):
    """A table of vectors: ``nn.Embed`` with a gradient that is exact in narrow dtypes and fast on a GPU.

    Gradients of the rows are summed in the dtype of the parameters, not in the dtype of the computation.

    Attributes:
        size: Rows of the table.
        dim: Width of a row.
        embedding_init: Initialiser of the table.
    """

    size: int
    dim: int
    embedding_init: Initializer

    def setup(self):
        """Make the table, ``[size, dim]``."""
        self.embedding = self.param("embedding", self.embedding_init, (self.size, self.dim), self.param_dtype)

    def __call__(self, index: jax.Array) -> jax.Array:
        """Look up rows by index, ``[b, n]`` integers to ``[b, n, e]``; NaN for indices beyond the table."""
        kernels = row_kernels(self.implementation, functools.partial(LookupKernels, self._dtype))
        return _look_up(self._dtype)(kernels, self.embedding, index)[0]

    def first(self, n: int) -> jax.Array:
        """Return the first n rows, ``[n, e]``, replicated on a mesh with explicit axes."""
        return respread(self.embedding, PartitionSpec(None, None))[:n].astype(self._dtype)

    @property
    def _dtype(self):
        return jax.dtypes.canonicalize_dtype(self.embedding.dtype if self.dtype is None else self.dtype)


@functools.cache
def _look_up(dtype):
    def look_up(table, index):
        table = respread(table, apart(spec_of(table), spec_of(index)))
        rows = spread_by_compiler(
            lambda table, index: jnp.take(table, index, axis=0),
            (table, index),
            lambda: PartitionSpec(*spec_of(index), *tuple(spec_of(table))[1:]),
        )
        return (rows.astype(dtype),)

    return Fused("embedding", look_up)


@dataclasses.dataclass(frozen=True)
class LookupKernels:
    """The gradient of a small `Embedding` as a matrix product, where a GPU would add tokens one by one.

    Attributes:
        dtype: Dtype of the result of the lookup.
        interpret: Whether to run on any device, for tests.
    """

    dtype: Any
    interpret: bool = False

    def problems(self, arrays: Sequence[Any]) -> list[str]:
        """Return the reasons why the product cannot serve a call with these shapes and dtypes."""
        rows, reasons = arrays[0].shape[0], []
        if rows > MOST_ROWS:
            reasons.append(f"at most {MOST_ROWS} rows, got {rows}")
        if self.dtype.itemsize > 2:
            reasons.append(f"exact products of {self.dtype} are slower than additions one by one")
        return reasons

    def axes(self, arrays: Sequence[Any], results: Sequence[Any]) -> tuple[list[Labels], list[Labels]]:
        """Label rows and tokens, which can be spread; the table is replicated."""
        table, index = arrays
        return [label(table), label(index, "b", "n")], [label(rows, "b", "n") for rows in results]

    def forward(self, arrays: Sequence[jax.Array]) -> None:
        """Leave the value to plain code."""
        return None

    def backward(self, call: GradientCall) -> Sequence[jax.Array]:
        """Compute the gradient of the table."""
        (table, index), (d_rows,) = call.arrays, call.cotangents
        chosen = jax.nn.one_hot(index, table.shape[0], dtype=d_rows.dtype)
        axes = tuple(range(index.ndim))
        product = jnp.tensordot(chosen, d_rows, (axes, axes), precision="highest", preferred_element_type=jnp.float32)
        return [product.astype(table.dtype)]
