"""Hyper-connections: several residual streams, mixed before and after every branch.

Streams are a tuple of arrays, not an axis of one array. Sums over streams are then sums of a few arrays, which XLA
fuses. For a reduction over an axis, XLA:CPU (jaxlib 0.10) writes every product to memory first.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype

from flax_local_attention.fields import Kernels
from flax_local_attention.kernels import row_kernels
from flax_local_attention.kernels.fused import Fused
from flax_local_attention.kernels.rows import StreamKernels
from flax_local_attention.operands import wide_dtype
from flax_local_attention.sharding import vary_alike


class Streams(NamedTuple):
    """Residual streams and the pending output of a branch: stream s is ``mixed[s] + beta[s] out``.

    The next connection adds the output in the same pass in which it reads the streams.

    Attributes:
        mixed: r arrays ``[b, n, e]``.
        beta: r arrays ``[b, n]`` float32; empty for a single stream.
        out: ``[b, n, e]``; None before the branch has run, and for a single stream, which is updated at once.
    """

    mixed: tuple[jax.Array, ...]
    beta: tuple[jax.Array, ...] = ()
    out: jax.Array | None = None

    @classmethod
    def of(cls, streams: Sequence[jax.Array]) -> "Streams":
        """Make streams from r arrays ``[b, n, e]``, with no pending output."""
        x, *_ = streams
        if len(streams) == 1:
            return cls((x,))
        zeros, weights, *streams = vary_alike([jnp.zeros_like(x), jnp.zeros(x.shape[:2], jnp.float32), *streams])
        return cls(tuple(streams), (weights,) * len(streams), zeros)

    def add(self, out: jax.Array) -> "Streams":
        """Return the streams with the output of their branch, ``[b, n, e]``, pending."""
        x = self.mixed[0]
        return self._replace(out=out.astype(x.dtype)) if self.beta else Streams((_add(promote_dtype(x, out)),))

    def write(self) -> tuple[jax.Array, ...]:
        """Add the pending output, and return the streams, r arrays ``[b, n, e]``."""
        if self.out is None:
            return self.mixed
        out = _widen(self.out)
        return tuple(
            x + (weight[..., None].astype(out.dtype) * out).astype(x.dtype)
            for x, weight in zip(self.mixed, self.beta, strict=True)
        )


def expand_streams(x: jax.Array, num_streams: int) -> Streams:
    """Repeat the input, ``[b, n, e]``, for every stream."""
    return Streams.of((x,) * num_streams)


def reduce_streams(streams: Streams) -> jax.Array:
    """Sum the streams, ``[b, n, e]``."""
    return _add(streams.write())


def _widen(x):
    """Cast to float32 or wider, the dtype in which streams and their gradients are mixed and summed."""
    return x.astype(wide_dtype(x.dtype))


def _add(terms):
    """Return the sum of arrays."""
    first, *rest = terms
    return sum(rest, start=first)


def _connect(*arrays):
    """Add the output of a branch to the streams, and mix them for the next branch.

    Args:
        *arrays: The arrays of `Streams` one by one, then ``kernel`` ``[r + 2, e]``, ``static`` ``[r, r + 2]`` and
            ``scale`` ``[r + 2]``, which compute the weights: r + 1 alphas, then beta.

    Returns:
        The input of the next branch, ``[b, n, e]``; the mixed streams and the betas, one by one; and, as a residual,
        the products of each stream with the kernel, and its square, ``[b, r (r + 3), n]``.
    """
    r = (len(arrays) - 4) // 2
    streams = Streams(arrays[:r], arrays[r : 2 * r], arrays[2 * r]).write()
    wide, dtype = [_widen(x) for x in streams], streams[0].dtype
    products, squares = _products(wide, arrays[2 * r + 1])
    weights = _weights(products, squares, wide[0].shape[-1], *arrays[2 * r + 2 :])
    alphas = [
        [jax.lax.broadcast_in_dim(x.astype(wide[0].dtype), wide[0].shape, (0, 1)) for x in row[:-1]] for row in weights
    ]
    mixed = (_add(alphas[s][t] * wide[s] for s in range(r)).astype(dtype) for t in range(r + 1))
    saved = jnp.concatenate([products, squares[:, None]], axis=1)
    saved = jnp.moveaxis(saved.reshape(r * (r + 3), *saved.shape[2:]), 0, 1)
    return *mixed, *(row[-1] for row in weights), saved


connect = Fused("residual_streams", _connect, saved=1)


def _products(streams, kernel):
    """Compute products with the kernel, ``[r, r + 2, b, n]``, and squares, ``[r, b, n]``, in the kernel's dtype."""
    streams = [stream.astype(kernel.dtype) for stream in streams]
    products = jnp.stack([jnp.moveaxis(stream @ kernel.T, -1, 0) for stream in streams])
    return products, jnp.stack([jnp.square(stream).sum(-1) for stream in streams])


def _weights(products, squares, e, static, scale):
    """Compute the weights in float32, ``[s][t]`` arrays ``[b, n]``: r + 1 alphas and beta for each stream.

    ``weight[s, t] = tanh(product[s, t] sqrt(e / square[s])) scale[t] + static[s, t]``, with the square at least 1e-24.

    Args:
        products: ``[r, r + 2, b, n]``.
        squares: ``[r, b, n]``.
        e: Model width.
        static: ``[r, r + 2]``.
        scale: ``[r + 2]``.
    """
    r, count, b, n = products.shape
    # The norm divides a token's few products instead of its stream. All weights are one array until the end, so that
    # few operations are compiled. Tokens are its last axes, so that each weight is contiguous over all tokens.
    normed = products * (jax.lax.rsqrt(jnp.where(squares > 1e-24, squares, 1e-24)) * e**0.5)[:, None]
    weights = jnp.tanh(normed) * scale[None, :, None, None] + static[:, :, None, None]
    parts = [x.squeeze(0) for x in jnp.split(weights.reshape(r * count, b, n), r * count)]
    return [parts[s * count : (s + 1) * count] for s in range(r)]


def _prepare(params):
    """Compute kernel ``[r + 2, e]``, static weights ``[r, r + 2]`` and scale ``[r + 2]`` for `_connect`.

    The factor of the norm, ``gamma + 1``, is multiplied into the kernel, so that it costs nothing per token.
    """
    p = {name: x.astype(jnp.float32) for name, x in params.items()}
    r = p["static_beta"].shape[0]
    kernel = jnp.concatenate([p["dynamic_alpha_fn"].T, p["dynamic_beta_fn"][None]]) * (p["gamma"] + 1)[None]
    static = jnp.concatenate([p["static_alpha"], p["static_beta"][:, None]], axis=1)
    return kernel, static, jnp.stack([p["dynamic_alpha_scale"]] * (r + 1) + [p["dynamic_beta_scale"]])


PREPARED = "prepared_connections"
"""Collection of variables from `prepare_connections`, which `HyperConnection` uses in place of its parameters."""


def prepare_connections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Compute in advance what every call of a `HyperConnection` computes from its parameters, for a loop over tokens.

    Args:
        variables: Variables of a model with unstacked layers (``scan_layers=False``).

    Returns:
        The variables with a further collection, `PREPARED`, which has the results for every connection in the model.
    """

    def visit(tree):
        if {"gamma", "static_alpha", "dynamic_alpha_fn"} <= tree.keys():
            return {"weights": _prepare(tree)}
        found = {name: visit(x) for name, x in tree.items() if isinstance(x, Mapping)}
        return {name: x for name, x in found.items() if x}

    return {**variables, PREPARED: visit(variables.get("params", {}))}


class HyperConnection(Kernels):
    """The connection of one branch to the residual streams: how it reads from them and writes to them.

    With streams ``R[s]`` and their RMS norms ``N[s]``, where t = 0 is the branch's input and t = 1, ..., r are streams:

        alpha[s, t] = tanh(N[s] @ dynamic_alpha_fn)[t] * dynamic_alpha_scale + static_alpha[s, t]
        beta[s]     = tanh(N[s] @ dynamic_beta_fn) * dynamic_beta_scale + static_beta[s]
        M[t]        = sum_s alpha[s, t] R[s]
        R[s]       <- M[1 + s] + beta[s] * branch(M[0])

    A new connection reads stream ``index % num_streams``, adds to all streams and does not mix them. With one
    stream it is the plain residual ``x + branch(x)``, without parameters.

    Attributes:
        num_streams: Residual streams, r.
        dim: Model width, e.
        index: Index of the branch in the model; may be traced.
        param_dtype: Dtype of the parameters; the streams keep their own dtype.

    Source: Hyper-Connections, arXiv 2409.19606, appendix J, algorithm 2, and the package ``hyper-connections`` 0.4.11,
    which chooses the stream to read at random.
    """

    num_streams: int
    dim: int
    index: int | jax.Array = 0
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, streams: Streams | Sequence[jax.Array]) -> tuple[jax.Array, Streams]:
        """Read the branch's input.

        Args:
            streams: `Streams`, or r arrays ``[b, n, e]``.

        Returns:
            The branch's input, ``[b, n, e]``, and the mixed streams; call their `Streams.add` with the branch's output.
        """
        streams = streams if isinstance(streams, Streams) else Streams.of([jnp.asarray(x) for x in streams])
        if self.num_streams == 1:
            return streams.mixed[0], streams
        assert streams.out is not None
        r, kernels = self.num_streams, row_kernels(self.implementation, StreamKernels)
        first, *rest = connect(kernels, *streams.mixed, *streams.beta, streams.out, *self._weights())
        return first, Streams(tuple(rest[:r]), tuple(rest[r:]))

    def _weights(self):
        """Return kernel, static weights and scale, from `prepare_connections` if available."""
        if self.has_variable(PREPARED, "weights"):
            return self.get_variable(PREPARED, "weights")
        return _prepare(self._parameters())

    def _parameters(self):
        """Make the parameters, with the original's names."""
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

    @nn.nowrap
    def _initial_alpha(self, key, shape, dtype):
        """Make alphas ``[r, r + 1]`` that read one stream, ``index % r``, and keep all streams unchanged."""
        del key
        r = self.num_streams
        read = jax.nn.one_hot(jnp.array([self.index % r]), r, dtype=dtype).T
        return jnp.concatenate([read, jnp.eye(r, dtype=dtype)], axis=1)
