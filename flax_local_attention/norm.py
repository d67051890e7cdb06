"""Layer normalisation."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_local_attention.fields import Dtypes, Kernels
from flax_local_attention.kernels import row_kernels
from flax_local_attention.kernels.fused import Fused
from flax_local_attention.kernels.rows import NormKernels
from flax_local_attention.operands import wide_dtype


class LayerNorm(Dtypes, Kernels):
    """Layer normalisation: ``nn.LayerNorm`` with the variance computed from centred values."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise each token by itself, ``[..., e]`` to ``[..., e]``."""
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:], self.param_dtype)
        dtype = jnp.dtype(jnp.result_type(x, scale, bias) if self.dtype is None else self.dtype)
        kernels = row_kernels(self.implementation, functools.partial(NormKernels, dtype))
        return _layer_norm(dtype)(kernels, x, scale, bias)[0]


@functools.cache
def _layer_norm(dtype):
    """Make the operation for a dtype of results; cached, because its primitives are registered with JAX."""
    return Fused("layer_norm", functools.partial(_normalize_layer, dtype))


def _normalize_layer(dtype, x, scale, bias):
    """Compute ``(x - mean) / sqrt(variance + 1e-5) * scale + bias`` over the last axis; return a tuple of one array.

    It is computed in float32 or wider and cast to `dtype`. The variance is the mean square of ``x - mean``: the mean of
    squares minus the square of the mean would lose digits if the mean is far from 0.
    """
    wide = x.astype(wide_dtype(x.dtype))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    scale, bias = (jnp.expand_dims(p.astype(wide.dtype), range(x.ndim - 1)) for p in (scale, bias))
    return ((centred * (jax.lax.rsqrt(variance + 1e-5) * scale) + bias).astype(dtype),)
