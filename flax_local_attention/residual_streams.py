"""Hyper-connections: several residual streams, mixed before and after every branch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import repeat
from flax import linen as nn
from flax.typing import Dtype

from flax_local_attention.dense import l2_normalize


def expand_streams(x: jax.Array, num_streams: int) -> jax.Array:
    """Repeat the input for every stream, ``[b, n, e]`` to ``[r, b, n, e]``."""
    return repeat(x, "b n e -> r b n e", r=num_streams)


def reduce_streams(streams: jax.Array) -> jax.Array:
    """Add the streams up, ``[r, b, n, e]`` to ``[b, n, e]``."""
    return streams.sum(0)


class HyperConnection(nn.Module):
    """How one branch reads from the residual streams and writes to them.

    With streams ``R[s]``, ``N[s]`` their RMS norm, and t = 0 the branch's input, t = 1.. the streams::

        alpha[s, t] = tanh(N[s] @ dynamic_alpha_fn)[t] * dynamic_alpha_scale + static_alpha[s, t]
        beta[s]     = tanh(N[s] @ dynamic_beta_fn) * dynamic_beta_scale + static_beta[s]
        M[t]        = sum_s alpha[s, t] R[s]
        R[s]       <- M[1 + s] + beta[s] * branch(M[0])

    A fresh connection reads stream ``index % num_streams``, adds to all, and mixes none. With one
    stream it is the plain residual ``x + branch(x)``, without parameters.

    Attributes:
        num_streams: Residual streams, r.
        dim: Model width, e.
        index: Number of the branch in the model.
        param_dtype: Of the parameters.

    Source: Hyper-Connections, arXiv 2409.19606, appendix J, algorithm 2, as the package
    ``hyper-connections`` 0.4.11 has it, which draws the stream that is read at random.
    """

    num_streams: int
    dim: int
    index: int = 0
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, streams: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """Read the branch's input.

        Args:
            streams: ``[r, b, n, e]``.

        Returns:
            The branch's input ``[b, n, e]``, and the function that takes its output to the new streams.
        """
        if self.num_streams == 1:
            return streams[0], lambda out: streams + out
        alpha, beta = self._weights(streams)
        # Sums of products, not matrix products: r is far too small for those.
        mixed = (alpha[..., None] * streams[:, None].astype(jnp.float32)).sum(0).astype(streams.dtype)
        return mixed[0], lambda out: mixed[1:] + (beta[..., None] * out).astype(streams.dtype)

    def _weights(self, streams):
        """Weights alpha ``[s, t, b, n]`` and beta ``[s, b, n]``, in float32."""
        r, e = self.num_streams, self.dim
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        small = nn.initializers.constant(0.01)

        def param(name, init, shape):
            return self.param(name, init, shape, self.param_dtype).astype(jnp.float32)

        gamma = param("gamma", zeros, (e,))
        static_alpha = param("static_alpha", self._initial_alpha, (r, r + 1))
        dynamic_alpha_fn = param("dynamic_alpha_fn", zeros, (e, r + 1))
        dynamic_alpha_scale = param("dynamic_alpha_scale", small, ())
        static_beta = param("static_beta", ones, (r,))
        dynamic_beta_fn = param("dynamic_beta_fn", zeros, (e,))
        dynamic_beta_scale = param("dynamic_beta_scale", small, ())

        normed = l2_normalize(streams.astype(jnp.float32)) * e**0.5 * (gamma + 1)
        weights = normed @ jnp.concatenate([dynamic_alpha_fn, dynamic_beta_fn[:, None]], axis=1)
        alpha = jnp.tanh(weights[..., :-1]) * dynamic_alpha_scale + static_alpha[:, None, None]
        beta = jnp.tanh(weights[..., -1]) * dynamic_beta_scale + static_beta[:, None, None]
        return jnp.moveaxis(alpha, -1, 1), beta

    def _initial_alpha(self, key, shape, dtype):
        del key
        r = self.num_streams
        read = jax.nn.one_hot(jnp.array([self.index % r]), r, dtype=dtype).T
        return jnp.concatenate([read, jnp.eye(r, dtype=dtype)], axis=1)
