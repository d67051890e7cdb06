"""One layer of the transformer, with its branches on the residual streams."""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from flax_local_attention.cache import LayerCache
from flax_local_attention.feed_forward import FeedForward
from flax_local_attention.fields import Dtypes, Kernels
from flax_local_attention.layers import LocalMHA
from flax_local_attention.residual_streams import HyperConnection, Streams


class LayerInputs(NamedTuple):
    """Masks, bias, documents and positions of a call, for `LocalMHA`.

    Attributes:
        mask: Tokens that may be seen, ``[b, n]`` bool.
        attn_bias: Added to the scores, ``[h, w, s]``.
        segment_ids: Documents, ``[b, n]`` integers.
        positions: Explicit positions for rotary, ``[b, n]`` int32.
    """

    mask: jax.Array | None = None
    attn_bias: jax.Array | None = None
    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None


class TransformerLayer(Dtypes, Kernels):
    """An optional global layer, local attention and feed-forward, each a branch on the residual streams.

    Attributes:
        attn: Local attention, including its pre-norm.
        ff: Feed-forward layer.
        global_attn: Global layer to insert before them, called as ``layer(x, mask=mask)``; None for none.
        num_residual_streams: Residual streams.
    """

    attn: LocalMHA
    ff: FeedForward
    global_attn: Any = None
    num_residual_streams: int = 4

    @nn.compact
    def __call__(
        self, streams: Streams, branch: int | jax.Array, inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[Streams, LayerCache | None]:
        """Run the branches one after the other.

        Args:
            streams: Residual streams.
            branch: Index in the model of the layer's first branch, from 0; may be traced.
            inputs: Masks, bias, documents and positions.
            cache: The earlier tokens.

        Returns:
            The streams after this layer, and the grown cache, None without one.
        """
        if self.global_attn is not None:
            x, streams = self._connection("global_streams", branch)(streams)
            out, cache = self._attend_globally(x, inputs.mask, cache)
            streams, branch = streams.add(out), branch + 1
        x, streams = self._connection("attn_streams", branch)(streams)
        out, cache = self._attend(x, inputs, cache)
        x, streams = self._connection("ff_streams", branch + 1)(streams.add(out))
        return streams.add(self.ff(x)), cache

    def _attend_globally(self, x, mask, cache):
        if cache is None:
            return self.global_attn(x, mask=mask), None
        out, grown = self.global_attn(x, mask=mask, cache=cache.global_attn)
        return out, dataclasses.replace(cache, global_attn=grown)

    def _attend(self, x, inputs, cache):
        out: Any = self.attn(
            x,
            mask=inputs.mask,
            attn_bias=inputs.attn_bias,
            segment_ids=inputs.segment_ids,
            positions=inputs.positions,
            cache=None if cache is None else cache.attn,
        )
        if cache is None:
            return out, None
        out, grown = out
        return out, dataclasses.replace(cache, attn=grown)

    @nn.nowrap
    def _connection(self, name, index):
        return self.make(HyperConnection, self.num_residual_streams, self.attn.dim, index, name=name)
