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


# Jitted so that the branches of a model, which are alike, are traced and differentiated once.
@jax.jit
def _read(params, streams):
    """What a branch reads, ``[b, n, e]``; and the mixed streams and beta, which `_write` takes its output to."""
    r, dtype = len(streams), streams[0].dtype
    alpha, beta = _weights(params, streams)
    first, *mixed = (_add(alpha[s][t] * streams[s] for s in range(r)).astype(dtype) for t in range(r + 1))
    return first, mixed, beta


@jax.jit
def _write(mixed, beta, out):
    """The new streams."""
    return tuple(x + (weight * out).astype(x.dtype) for x, weight in zip(mixed, beta, strict=True))


def _weights(params, streams):
    """Weights in float32, alpha[s][t] and beta[s], each spread over a stream, ``[b, n, e]``."""
    r, (b, n, e) = len(streams), streams[0].shape
    p = {name: x.astype(jnp.float32) for name, x in params.items()}
    # One array for all weights, alpha and last beta, split at the end: few operations to compile. Tokens are its last
    # axes, so that a weight of all tokens is one piece of it.
    kernel = jnp.concatenate([p["dynamic_alpha_fn"], p["dynamic_beta_fn"][:, None]], axis=1) * (p["gamma"] + 1)[:, None]
    static = jnp.concatenate([p["static_alpha"], p["static_beta"][:, None]], axis=1)
    scale = jnp.stack([p["dynamic_alpha_scale"]] * (r + 1) + [p["dynamic_beta_scale"]])
    wide = [stream.astype(jnp.float32) for stream in streams]
    products = jnp.stack([jnp.moveaxis(stream @ kernel, -1, 0) for stream in wide])
    squares = jnp.stack([jnp.square(stream).sum(-1) for stream in wide])
    # The norm divides a token's few products instead of its stream.
    normed = products * (jax.lax.rsqrt(jnp.where(squares > 1e-24, squares, 1e-24)) * e**0.5)[:, None]
    weights = jnp.tanh(normed) * scale[:, None, None] + static[:, :, None, None]
    parts = jnp.split(weights.reshape(r * (r + 2), b, n), r * (r + 2))
    parts = [jax.lax.broadcast_in_dim(part.squeeze(0), (b, n, e), (0, 1)) for part in parts]
    rows = [parts[s * (r + 2) : (s + 1) * (r + 2)] for s in range(r)]
    return [row[:-1] for row in rows], [row[-1] for row in rows]


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
        index: Number of the branch in the model; may be traced.
        param_dtype: Of the parameters.

    Source: Hyper-Connections, arXiv 2409.19606, appendix J, algorithm 2, as the package
    ``hyper-connections`` 0.4.11 has it, which draws the stream that is read at random.
    """

    num_streams: int
    dim: int
    index: int | jax.Array = 0
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
        first, mixed, beta = _read(self._parameters(), tuple(streams))
        return first, lambda out: _write(mixed, beta, out)

    def _parameters(self):
        r, e = self.num_streams, self.dim
        zeros, small = nn.initializers.zeros_init(), nn.initializers.constant(0.01)
        inits = {
            "gamma": (zeros, (e,)),
            "static_alpha": (self._initial_alpha, (r, r + 1)),
            "dynamic_alpha_fn": (zeros, (e, r + 1)),
            "dynamic_alpha_scale": (small, ()),
            "static_beta": (nn.initializers.ones_init(), (r,)),
            "dynamic_beta_fn": (zeros, (e,)),
            "dynamic_beta_scale": (small, ()),
        }
        return {name: self.param(name, init, shape, self.param_dtype) for name, (init, shape) in inits.items()}

    def _initial_alpha(self, key, shape, dtype):
        del key
        r = self.num_streams
        read = jax.nn.one_hot(jnp.array([self.index % r]), r, dtype=dtype).T
        return jnp.concatenate([read, jnp.eye(r, dtype=dtype)], axis=1)
