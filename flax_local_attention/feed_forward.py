"""The feed-forward branch of a transformer."""

import functools
from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer

from flax_local_attention.checks import check_rate
from flax_local_attention.fields import Branch
from flax_local_attention.norm import LayerNorm
from flax_local_attention.operands import check_floating, wide_dtype

# Fewer tokens than these are bound by reading the weights, which aligning them would do once more.
FEW_TOKENS = 256


class FeedForward(Branch):
    """Normalise, widen, gate by GELU, drop, narrow: ``to_out(a * gelu(b))`` with ``a, b = to_hidden(norm(x))``.

    Attributes:
        dim: Model width.
        mult: The hidden width is ``int(dim * mult * 2 / 3)``.
        dropout: Share of hidden values to drop, unless `deterministic`.

    Source: GLU Variants Improve Transformer, arXiv 2002.05202 (GEGLU); GELU by the error function.
    """

    dim: int
    mult: float = 4
    dropout: float = 0.0
    _: KW_ONLY  # Flax's own `parent` and `name`

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Transform each token by itself, ``[..., e]`` to ``[..., e]``."""
        check_floating("x", x)
        check_rate("dropout", self.dropout)
        deterministic = self.deterministic if deterministic is None else deterministic
        width = int(self.dim * self.mult * 2 / 3)
        x = self.make(LayerNorm, name="norm")(x)
        kernel = Kernel((self.dim, 2 * width), self.kernel_init, self.param_dtype, name="to_hidden")()
        out_kernel = Kernel((width, self.dim), self.out_kernel_init, self.param_dtype, name="to_out")()
        x, kernel, out_kernel = promote_dtype(x, kernel, out_kernel, dtype=self.dtype)
        product = functools.partial(jnp.matmul, precision=self.precision)
        if isinstance(x.size, int) and x.size < FEW_TOKENS * self.dim:
            values, gates = jnp.split(product(x, kernel), 2, axis=-1)
        else:
            # Two products: the gradient of one would first join those of its halves, in a pass over all hidden values.
            extra = aligned(width) - width
            halves = (jnp.pad(half, ((0, 0), (0, extra))) for half in jnp.split(kernel, 2, axis=1))
            values, gates = (product(x, half) for half in halves)
            out_kernel = jnp.pad(out_kernel, ((0, extra), (0, 0)))
        hidden = nn.Dropout(self.dropout)(_gate(values, gates), deterministic=deterministic)
        return product(hidden, out_kernel)


def gelu(x: jax.Array) -> jax.Array:
    """``x * P(Z <= x)`` for a standard normal Z, elementwise, computed in float32 or wider.

    By ``erf``, one operation of XLA. `jax.nn.gelu` is exact by ``erfc``, which becomes a hundred: on a CPU that costs a
    twentieth of a training step.
    """
    wide = x.astype(wide_dtype(x.dtype))
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _gate(values, gates):
    """Return ``values gelu(gates)`` (GEGLU), elementwise, rounded once.

    A gradient keeps the arguments alone. What is computed in float32 in between would be written to memory, in a loop
    over layers, which cannot fuse it away.
    """
    dtype = wide_dtype(values.dtype)
    return (values.astype(dtype) * gelu(gates.astype(dtype))).astype(values.dtype)


def aligned(width: int) -> int:
    """Width to compute a product in: the multiple of the largest power of two up to 128 that adds at most a sixteenth.

    An odd width, `int(512 * 4 * 2 / 3)` say, has XLA take products in slow forms: on an H100 for twice the time.
    """
    powers = (128, 64, 32, 16, 8, 4, 2, 1)
    return next(width + extra for extra in (-width % power for power in powers) if 16 * extra <= width)


class Kernel(nn.Module):
    """The weights of a linear layer, where ``nn.Dense`` has them, for products of one's own.

    Attributes:
        shape: Of the weights.
        kernel_init: Their initialiser.
        param_dtype: Their dtype.
    """

    shape: tuple[int, ...]
    kernel_init: Initializer
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        """Return the weights."""
        return self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
