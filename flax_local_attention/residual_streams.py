"""Hyper-connections: several residual streams, mixed before and after every branch.

Streams are a tuple of arrays, not an axis of one: sums over them are then sums of a few arrays, which XLA fuses, while
XLA:CPU (jaxlib 0.10) writes every product of a reduction over such an axis to memory first.
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
    """Residual streams, and what a branch gave that is yet to be added: stream s is ``mixed[s] + beta[s] out``.

    The next connection adds it in the pass in which it reads.

    Attributes:
        mixed: r of ``[b, n, e]``.
        beta: r of ``[b, n]`` float32; empty for a single stream.
        out: ``[b, n, e]``; None before the branch has run, and for a single stream, to which it is added at once.
    """

    mixed: tuple[jax.Array, ...]
    beta: tuple[jax.Array, ...] = ()
    out: jax.Array | None = None

    @classmethod
    def of(cls, streams: Sequence[jax.Array]) -> "Streams":
        """Make them of r arrays ``[b, n, e]`` that wait for nothing."""
        x, *_ = streams
        if len(streams) == 1:
            return cls((x,))
        zeros, weights, *streams = vary_alike([jnp.zeros_like(x), jnp.zeros(x.shape[:2], jnp.float32), *streams])
        return cls(tuple(streams), (weights,) * len(streams), zeros)

    def add(self, out: jax.Array) -> "Streams":
        """Return the streams with what their branch gave, ``[b, n, e]``, yet to be added."""
        x = self.mixed[0]
        return self._replace(out=out.astype(x.dtype)) if self.beta else Streams((_add(promote_dtype(x, out)),))

    def write(self) -> tuple[jax.Array, ...]:
        """Return the streams, r of ``[b, n, e]``."""
        if self.out is None:
            return self.mixed
        out = _widen(self.out)
        return tuple(
            x + (weight[..., None].astype(out.dtype) * out).astype(x.dtype)
            for x, weight in zip(self.mixed, self.beta, strict=True)
        )


def expand_streams(x: jax.Array, num_streams: int) -> Streams:
    """Repeat the input for every stream, ``[b, n, e]``."""
    return Streams.of((x,) * num_streams)


def reduce_streams(streams: Streams) -> jax.Array:
    """Add the streams up, to ``[b, n, e]``."""
    return _add(streams.write())


def _widen(x):
    """Return x in float32 or wider, in which streams are mixed and summed, and their gradients too."""
    return x.astype(wide_dtype(x.dtype))


def _add(terms):
    """Return the sum of arrays."""
    first, *rest = terms
    return sum(rest, start=first)


def _connect(*arrays):
    """Write to the streams what a branch gave, and read what the next one reads.

    Args:
        *arrays: Fields of `Streams` one by one, then ``kernel`` ``[r + 2, e]``, ``static`` ``[r, r + 2]`` and ``scale``
            ``[r + 2]``: of the weights alpha and, last, beta.

    Returns:
        What the next branch reads, ``[b, n, e]``; then the mixed streams and beta, one by one; and, saved, what weights
        are computed from, ``[b, r (r + 3), n]``: of each stream its products with the kernel, and its square.
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
    """Return the streams' products with the kernel, ``[r, r + 2, b, n]``, and squares, ``[r, b, n]``, in float32."""
    streams = [stream.astype(jnp.float32) for stream in streams]
    products = jnp.stack([jnp.moveaxis(stream @ kernel.T, -1, 0) for stream in streams])
    return products, jnp.stack([jnp.square(stream).sum(-1) for stream in streams])


def _weights(products, squares, e, static, scale):
    """Return weights in float32, ``[s][t]`` of ``[b, n]``: r + 1 alphas and beta of each stream.

    ``weight[s, t] = tanh(product[s, t] sqrt(e / square[s])) scale[t] + static[s, t]``, with the square at least 1e-24.

    Args:
        products: ``[r, r + 2, b, n]``.
        squares: ``[r, b, n]``.
        e: Model width.
        static: ``[r, r + 2]``.
        scale: ``[r + 2]``.
    """
    r, count, b, n = products.shape
    # The norm divides a token's few products instead of its stream. One array for all weights, split at the end: few
    # operations to compile. Tokens are its last axes, so that a weight of all tokens is one piece of it.
    normed = products * (jax.lax.rsqrt(jnp.where(squares > 1e-24, squares, 1e-24)) * e**0.5)[:, None]
    weights = jnp.tanh(normed) * scale[None, :, None, None] + static[:, :, None, None]
    parts = [x.squeeze(0) for x in jnp.split(weights.reshape(r * count, b, n), r * count)]
    return [parts[s * count : (s + 1) * count] for s in range(r)]


def _prepare(params):
    """Return kernel ``[r + 2, e]``, static weights ``[r, r + 2]`` and scale ``[r + 2]`` of `_connect` from parameters.

    The norm's factor, ``gamma + 1``, is multiplied into the kernel: it then costs nothing a token.
    """
    p = {name: x.astype(jnp.float32) for name, x in params.items()}
    r = p["static_beta"].shape[0]
    kernel = jnp.concatenate([p["dynamic_alpha_fn"].T, p["dynamic_beta_fn"][None]]) * (p["gamma"] + 1)[None]
    static = jnp.concatenate([p["static_alpha"], p["static_beta"][:, None]], axis=1)
    return kernel, static, jnp.stack([p["dynamic_alpha_scale"]] * (r + 1) + [p["dynamic_beta_scale"]])


PREPARED = "prepared_connections"
"""Collection of variables in which a `HyperConnection` finds what it computes from its parameters alone."""


def prepare_connections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Compute once what every call of a `HyperConnection` computes from its parameters: for a loop over tokens.

    Args:
        variables: Of a model, with the parameters of each layer apart, as ``scan_layers=False`` has them.

    Returns:
        The same, and a collection `PREPARED` with the results for every connection in the model.
    """

    def visit(tree):
        if {"gamma", "static_alpha", "dynamic_alpha_fn"} <= tree.keys():
            return {"weights": _prepare(tree)}
        found = {name: visit(x) for name, x in tree.items() if isinstance(x, Mapping)}
        return {name: x for name, x in found.items() if x}

    return {**variables, PREPARED: visit(variables.get("params", {}))}


class HyperConnection(Kernels):
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
        param_dtype: Of the parameters; the streams keep their own dtype.

    Source: Hyper-Connections, arXiv 2409.19606, appendix J, algorithm 2, as the package
    ``hyper-connections`` 0.4.11 has it, which draws the stream that is read at random.
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
            The branch's input ``[b, n, e]``, and the mixed streams, to which the branch's output is added by
            `Streams.add`.
        """
        streams = streams if isinstance(streams, Streams) else Streams.of([jnp.asarray(x) for x in streams])
        if self.num_streams == 1:
            return streams.mixed[0], streams
        assert streams.out is not None
        r, kernels = self.num_streams, row_kernels(self.implementation, StreamKernels)
        first, *rest = connect(kernels, *streams.mixed, *streams.beta, streams.out, *self._weights())
        return first, Streams(tuple(rest[:r]), tuple(rest[r:]))

    def _weights(self):
        """Return kernel, static weights and scale, prepared if they are, see `prepare_connections`."""
        if self.has_variable(PREPARED, "weights"):
            return self.get_variable(PREPARED, "weights")
        return _prepare(self._parameters())

    def _parameters(self):
        """Make the parameters, by their names in the original."""
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
        """Return alphas ``[r, r + 1]`` that read one stream, ``index % r``, and keep each stream as it is."""
        del key
        r = self.num_streams
        read = jax.nn.one_hot(jnp.array([self.index % r]), r, dtype=dtype).T
        return jnp.concatenate([read, jnp.eye(r, dtype=dtype)], axis=1)
