"""Linear layers whose weights may be spread over a mesh."""

from collections.abc import Sequence
from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Initializer, PrecisionLike
from jax import lax
from jax.sharding import PartitionSpec

from flax_local_attention.fields import Dtypes, Products, linear_init
from flax_local_attention.sharding import apart, respread, shards_of, spec_of, spread_by_compiler


class Linear(Dtypes, Products):
    """A linear layer, ``x kernel + bias``: ``nn.Dense`` for weights that may be spread over explicit mesh axes.

    Attributes:
        dim: Width of the input.
        features: Width of the output.
        use_bias: Whether to add a bias.
        kernel_init: Initialiser of the weights.
        bias_init: Initialiser of the bias.
    """

    dim: int
    features: int
    _: KW_ONLY
    use_bias: bool = False
    kernel_init: Initializer = linear_init
    bias_init: Initializer = nn.initializers.zeros_init()

    def setup(self):
        """Make the kernel, ``[dim, features]``, and the bias, ``[features]`` or None."""
        self.kernel = self.param("kernel", self.kernel_init, (self.dim, self.features), self.param_dtype)
        shape = (self.features,)
        self.bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute the output, ``[..., dim]`` to ``[..., features]``."""
        x, kernel, bias = promote_dtype(x, self.kernel, self.bias, dtype=self.dtype)
        return _add(product(x, kernel, self.precision), bias)

    @property
    def is_spread(self) -> bool:
        """Whether features are spread over explicit axes of a mesh."""
        return shards_of(self.kernel)[-1] > 1

    def in_parts(self, x: jax.Array, widths: Sequence[int], units: Sequence[int]) -> list[jax.Array]:
        """Compute the output in parts, each ``[..., width]``, without moving features; see `split_features`."""
        x, kernel, bias = promote_dtype(x, self.kernel, self.bias, dtype=self.dtype)
        kernels = split_features(kernel, widths, units)
        biases = [None] * len(kernels) if bias is None else split_features(bias, widths, units)
        products = [product(x, part, self.precision) for part in kernels]
        return [_add(part, bias) for part, bias in zip(products, biases, strict=True)]


def _add(x, bias):
    """Add a bias, if any, to features."""
    if bias is None:
        return x
    bias = respread(bias, apart(spec_of(bias), tuple(spec_of(x))[:-1]))
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def product(x: jax.Array, kernel: jax.Array, precision: PrecisionLike = None) -> jax.Array:
    """Multiply by a kernel, ``[..., e]`` by ``[e, f]``; over a mesh the kernel may move, but no token does.

    On explicit mesh axes the result is spread like x along its leading axes, and like the kernel along the last one.
    The kernel is gathered over axes that x's tokens are spread over, as in fully sharded data parallelism. If e is
    spread, its devices add their partial sums.
    """

    def multiply(x, kernel):
        return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision)

    *tokens, width = spec_of(x)
    rows, columns = spec_of(kernel)
    kernel = respread(kernel, PartitionSpec(*apart([rows], tokens), *apart([columns], tokens, [width])))
    return spread_by_compiler(multiply, (x, kernel), lambda: PartitionSpec(*tokens, spec_of(kernel)[-1]))


def split_features(
    kernel: jax.Array, widths: Sequence[int], units: Sequence[int], *, extra: int = 0
) -> list[jax.Array]:
    """Split a kernel or a bias along its last axis.

    On explicit mesh axes each part is spread like the whole if its number of units allows. This moves weights, which
    are few, so that features need not move.

    Args:
        kernel: ``[..., f]``.
        widths: Width of each part; they add up to f.
        units: Number of units of each part, such as heads, that must stay whole. A part whose units the devices do not
            divide is replicated.
        extra: Zeros to append to each part.
    """

    def split(kernel):
        parts = jnp.split(kernel, np.cumsum(widths)[:-1], axis=-1)
        return [jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, extra)]) for part in parts]

    def specs():
        *leading, last = spec_of(kernel)
        shards = shards_of(kernel)[-1]
        return [PartitionSpec(*leading, None if unit % shards else last) for unit in units]

    return spread_by_compiler(split, (kernel,), specs)
