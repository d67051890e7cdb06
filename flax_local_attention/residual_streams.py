"""Hyper-connections: several residual streams, mixed before and after every branch.

Streams are a tuple of arrays, not an axis of one: sums over them are then sums of a few arrays, which XLA fuses, while
XLA:CPU (jaxlib 0.10) writes every product of a reduction over such an axis to memory first.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

Streams = tuple[jax.Array, ...]


def expand_streams(x: jax.Array, num_streams: int) -> Streams:
    """Repeat the input for every stream, ``[b, n, e]`` to r of ``[b, n, e]``."""
    return (x,) * num_streams


def reduce_streams(streams: Sequence[jax.Array]) -> jax.Array:
    """Add the streams up, r of ``[b, n, e]`` to ``[b, n, e]``."""
    return _add(streams)


def _add(terms):
    first, *rest = terms
    return sum(rest, start=first)


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
    def __call__(self, streams: Sequence[jax.Array]) -> tuple[jax.Array, Callable[[jax.Array], Streams]]:
        """Read the branch's input.

        Args:
            streams: r of ``[b, n, e]``.

        Returns:
            The branch's input ``[b, n, e]``, and the function that takes its output to the new streams.
        """
        if self.num_streams == 1:
            return streams[0], lambda out: (streams[0] + out,)
        r, dtype = self.num_streams, streams[0].dtype
        alpha, beta = self._weights(streams)
        first, *mixed = (_add(alpha[s][t] * streams[s] for s in range(r)).astype(dtype) for t in range(r + 1))

        def write(out):
            return tuple(mixed[s] + (beta[s] * out).astype(dtype) for s in range(r))

        return first, write

    def _weights(self, streams):
        """Weights in float32: alpha[s][t] and beta[s], each ``[b, n, 1]``."""
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

        # One array for all weights of a token, alpha and last beta, split at the end: few operations to compile.
        kernel = jnp.concatenate([dynamic_alpha_fn, dynamic_beta_fn[:, None]], axis=1) * (gamma + 1)[:, None]
        static = jnp.concatenate([static_alpha, static_beta[:, None]], axis=1)
        scale = jnp.stack([dynamic_alpha_scale] * (r + 1) + [dynamic_beta_scale])
        wide = [stream.astype(jnp.float32) for stream in streams]
        products = jnp.stack([stream @ kernel for stream in wide], axis=2)
        squares = jnp.stack([jnp.square(stream).sum(-1) for stream in wide], axis=2)
        # The norm divides a token's few products instead of its stream.
        normed = products * (jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) * e**0.5)[..., None]
        weights = jnp.tanh(normed) * scale + static
        parts = jnp.split(weights.reshape(*weights.shape[:2], r * (r + 2)), r * (r + 2), axis=-1)
        rows = [parts[s * (r + 2) : (s + 1) * (r + 2)] for s in range(r)]
        return [row[:-1] for row in rows], [row[-1] for row in rows]

    def _initial_alpha(self, key, shape, dtype):
        del key
        r = self.num_streams
        read = jax.nn.one_hot(jnp.array([self.index % r]), r, dtype=dtype).T
        return jnp.concatenate([read, jnp.eye(r, dtype=dtype)], axis=1)
