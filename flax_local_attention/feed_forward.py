"""The feed-forward branch of a transformer."""

import functools
from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.sharding import PartitionSpec

from flax_local_attention.array_checks import check_floating
from flax_local_attention.checks import check_flag, optional
from flax_local_attention.fields import Branch
from flax_local_attention.linear import Linear, product, split_features
from flax_local_attention.norm import LayerNorm
from flax_local_attention.operands import wide_dtype
from flax_local_attention.sharding import shards_of, spec_of, spread_by_compiler

# With fewer tokens, reading the weights takes most of the time, and aligning them would read them once more.
FEW_TOKENS = 256


class FeedForward(Branch):
    """Gated feed-forward layer (GEGLU): ``to_out(dropout(a * gelu(b)))`` with ``a, b = to_hidden(norm(x))``.

    Attributes:
        dim: Model width.
        mult: Factor of the hidden width, ``int(dim * mult * 2 / 3)``.
        dropout: Share of hidden values to drop, unless `deterministic`.

    Source: GLU Variants Improve Transformer, arXiv 2002.05202; GELU is exact, not the tanh approximation.
    """

    dim: int
    mult: float = 4
    dropout: float = 0.0
    _: KW_ONLY  # Flax's own `parent` and `name`

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Transform each token by itself, ``[..., e]`` to ``[..., e]``.

        Args:
            x: Tokens, ``[..., e]``.
            deterministic: Overrides the module's field.
        """
        self._check(x)
        optional(check_flag)("deterministic", deterministic)
        deterministic = self.deterministic if deterministic is None else deterministic
        width = self._width
        x = self.make(LayerNorm, name="norm")(x)
        kernel = self.make(Linear, self.dim, 2 * width, name="to_hidden").kernel
        out_kernel = self.make(Linear, width, self.dim, kernel_init=self.out_kernel_init, name="to_out").kernel
        x, kernel, out_kernel = promote_dtype(x, kernel, out_kernel, dtype=self.dtype)
        if isinstance(x.size, int) and x.size < FEW_TOKENS * self.dim and shards_of(kernel)[1] == 1:
            values, gates = jnp.split(product(x, kernel, self.precision), 2, axis=-1)
        else:
            # Two products: the gradient of a single one would first concatenate the gradients of its halves, in a pass
            # over all hidden values.
            padded = aligned(width)
            halves = split_features(kernel, (width, width), (padded, padded), extra=padded - width)
            values, gates = (product(x, half, self.precision) for half in halves)
            out_kernel = _pad_rows(out_kernel, padded)
        hidden = nn.Dropout(self.dropout)(_gate(values, gates), deterministic=deterministic)
        return product(hidden, out_kernel, self.precision)

    @nn.nowrap
    def check_fields(self):
        """Raise unless every field is valid, and the hidden width is at least 1."""
        super().check_fields()
        if self._width < 1:
            raise ValueError(
                f"`mult` must make a hidden width of at least 1, got {self.mult} of `dim` {self.dim}; raise it."
            )

    @property
    def _width(self):
        return int(self.dim * self.mult * 2 / 3)

    def _check(self, x):
        check_floating("x", x)
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"`x` must be [..., {self.dim}] (`dim`), got shape {x.shape}; project it.")


def gelu(x: jax.Array) -> jax.Array:
    """Compute ``x * P(Z <= x)`` for a standard normal Z, elementwise, in float32 or wider.

    It uses ``erf``, a single operation of XLA. The exact `jax.nn.gelu` uses ``erfc``, which expands to about a hundred
    operations and costs a twentieth of a training step on a CPU.
    """
    wide = x.astype(wide_dtype(x.dtype))
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def _pad_rows(kernel, width):
    """Pad a kernel with rows of zeros to ``[width, e]``; rows stay spread if the number of shards divides `width`."""

    def pad(kernel):
        return jnp.pad(kernel, ((0, width - kernel.shape[0]), (0, 0)))

    def spec():
        rows, columns = spec_of(kernel)
        return PartitionSpec(None if width % shards_of(kernel)[0] else rows, columns)

    return spread_by_compiler(pad, (kernel,), spec)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _gate(values, gates):
    """Compute ``values * gelu(gates)``, elementwise, rounded once.

    The gradient stores the arguments only. A loop over layers would otherwise write float32 intermediate values to
    memory, because they cannot be fused across the loop.
    """
    dtype = wide_dtype(values.dtype)
    return (values.astype(dtype) * gelu(gates.astype(dtype))).astype(values.dtype)


def aligned(width: int) -> int:
    """Round a width up to a multiple of the largest power of two, at most 128, that adds at most a sixteenth.

    For an odd width such as ``int(512 * 4 * 2 / 3)``, XLA uses slow matrix products, which take twice as long on an
    H100.
    """
    powers = (128, 64, 32, 16, 8, 4, 2, 1)
    return next(width + extra for extra in (-width % power for power in powers) if 16 * extra <= width)
