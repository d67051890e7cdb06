"""The whole model: tokens to logits."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import lax
from jax.core import Tracer

from flax_local_attention.cache import KVCache, count_before, make_exportable, ring_slots
from flax_local_attention.checks import check_count
from flax_local_attention.embedding import Embedding
from flax_local_attention.head import Head
from flax_local_attention.kernels import Implementation
from flax_local_attention.layers import (
    DynamicPositionBias,
    FeedForward,
    LayerNorm,
    LocalMHA,
    linear_init,
)
from flax_local_attention.operands import check_positions, silence, token_mask, token_segments
from flax_local_attention.residual_streams import HyperConnection, Streams, expand_streams, reduce_streams
from flax_local_attention.stacking import METADATA, unstack_layers
from flax_local_attention.window import Window


@struct.dataclass
class LayerCache:
    """What a layer remembers: its attention's cache and, if one is inserted, its global layer's."""

    attn: KVCache
    global_attn: Any = None

    def rewind(self, count: int | jax.Array) -> "LayerCache":
        """Forget the last tokens, see `KVCache.rewind`; an inserted layer's cache must offer the same."""
        if self.global_attn is not None and not hasattr(self.global_attn, "rewind"):
            raise ValueError(
                "The cache of a layer of `global_attn_layer` must offer `rewind(count)` to go back, got "
                f"{type(self.global_attn).__name__} without; add it, or keep the cache from before."
            )
        global_attn = None if self.global_attn is None else self.global_attn.rewind(count)
        return LayerCache(self.attn.rewind(count), global_attn)


@struct.dataclass
class TransformerCache:
    """What a `LocalTransformer` remembers.

    Attributes:
        layers: One cache a layer.
        length: Tokens so far, ``[b]`` int32.
        segment_ids: Documents of the last tokens, ``[b, rewind + 1]`` int32: that of the token at place p in slot
            ``p % (rewind + 1)``.
        segment_starts: Places at which these documents begin, likewise: absolute positions count from there.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array
    segment_ids: jax.Array
    segment_starts: jax.Array

    def last_document(self) -> tuple[jax.Array, jax.Array]:
        """Return the document of the last token, and the place at which it begins, both ``[b]``."""
        slot = (self.length[:, None] - 1) % self.segment_ids.shape[1]
        last = (jnp.take_along_axis(x, slot, axis=1)[:, 0] for x in (self.segment_ids, self.segment_starts))
        return next(last), next(last)

    def rewind(self, count: int | jax.Array) -> "TransformerCache":
        """Forget the last tokens of each row; arguments and errors are those of `KVCache.rewind`."""
        layers = tuple(layer.rewind(count) for layer in self.layers)
        length = jnp.maximum(self.length - jnp.asarray(count, jnp.int32), 0)
        return dataclasses.replace(self, layers=layers, length=length)


for _cache in (LayerCache, TransformerCache):
    make_exportable(_cache, lambda _: b"", lambda _: ())


class TransformerLayer(nn.Module):
    """An optional inserted global layer, local attention and feed-forward, each on the residual streams.

    Attributes:
        attn: Attention, with the pre-norm in it.
        ff: Feed-forward.
        global_attn: Layer to insert before them, called as ``layer(x, mask=mask)``.
        num_residual_streams: Residual streams.
        window_size: The call's window, if it is not the module's.
    """

    attn: LocalMHA
    ff: FeedForward
    global_attn: Any = None
    num_residual_streams: int = 4
    window_size: int | None = None

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        branch: int | jax.Array,
        mask: jax.Array | None,
        attn_bias: jax.Array | None,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        cache: LayerCache | None,
    ) -> tuple[Streams, LayerCache | None]:
        """Streams, r of ``[b, n, e]``, and cache to streams and cache; `branch` numbers the first branch, from 0."""
        if self.global_attn is not None:
            x, write = self._connection("global_streams", branch)(streams)
            out, cache = self._global(x, mask, cache)
            streams, branch = write(out), branch + 1
        x, write = self._connection("attn_streams", branch)(streams)
        attn_cache = None if cache is None else cache.attn
        out: Any = self.attn(x, mask, attn_bias, attn_cache, self.window_size, None, segment_ids, positions)
        if cache is not None:
            out, attn_cache = out
            cache = dataclasses.replace(cache, attn=attn_cache)
        streams = write(out)
        x, write = self._connection("ff_streams", branch + 1)(streams)
        return write(self.ff(x)), cache

    def _global(self, x, mask, cache):
        if cache is None:
            return self.global_attn(x, mask=mask), None
        out, global_cache = self.global_attn(x, mask=mask, cache=cache.global_attn)
        return out, dataclasses.replace(cache, global_attn=global_cache)

    def _connection(self, name, index):
        streams = self.num_residual_streams
        return HyperConnection(
            streams,
            self.attn.dim,
            index,
            param_dtype=self.attn.param_dtype,
            implementation=self.attn.implementation,
            name=name,
        )


class _Tokens(NamedTuple):
    """The tokens of a call, checked, and what is said of each of them.

    Attributes:
        x: Tokens ``[b, n]`` int32, or continuous ones ``[b, n, e]``.
        mask: As it was given, maybe one for each head.
        exists: Which tokens any head sees, ``[b, n]`` bool.
        segment_ids: Documents, ``[b, n]`` integers.
        positions: Explicit ones, ``[b, n]`` int32.
    """

    x: jax.Array
    mask: jax.Array | None
    exists: jax.Array | None
    segment_ids: jax.Array | None
    positions: jax.Array | None

    def without_last(self) -> "_Tokens":
        """All but the last token of each row, of which the loss asks nothing."""
        return jax.tree.map(lambda x: x[..., :-1], self)


def _begin_documents(places, exists, segment_ids, last_id, start):
    """Find the place at which the document of each token begins, ``[b, n]``: a document is a run of equal segments.

    Args:
        places: Tokens before each, ``[b, n]``.
        exists: Which of them exist, ``[b, n]`` bool.
        segment_ids: ``[b, n]``, n at least 1.
        last_id: Segment of the token before the first, ``[b]``.
        start: Place at which its document begins, ``[b]``.
    """
    newest = lax.cummax(jnp.where(exists, jnp.arange(places.shape[1]), -1), axis=1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(newest, 0), axis=1)
    ids = jnp.where(newest < 0, last_id[:, None], ids)  # of the newest token up to each
    ids_before = jnp.concatenate([last_id[:, None], ids[:, :-1]], axis=1)
    begins = jnp.where(exists & (segment_ids != ids_before), places, 0)
    return jnp.maximum(lax.cummax(begins, axis=1), start[:, None])


def _layer_inputs(layer, tokens, biases):
    """Mask, bias, documents and positions, as a layer takes them."""
    turned = tokens.positions if layer.attn.use_rotary_pos_emb else None
    return tokens.mask, biases.get(layer.attn.window_size), tokens.segment_ids, turned


def _to_int32(x):
    """Make tokens int32; those that it cannot hold become its largest or least, which are outside any vocabulary."""
    limits, own = jnp.iinfo(jnp.int32), jnp.iinfo(x.dtype)
    if own.max > limits.max:  # of NumPy by NumPy: JAX would first cut an int64 to its lower half
        clip = np.clip if isinstance(x, np.ndarray) else jnp.clip
        x = clip(x, max(limits.min, own.min), limits.max)
    return jnp.asarray(x).astype(jnp.int32)


def _is_narrowed_matrix(primitive, *inputs, **params):
    """Whether a result is a matrix in a narrower dtype: weights, which `remat` keeps instead of casting them again."""
    is_cast = primitive is lax.convert_element_type_p and inputs[0].ndim == 2
    return is_cast and params["new_dtype"].itemsize < inputs[0].dtype.itemsize


def _to_tuple(values):
    """Turn a sequence or an array into a tuple of Python numbers; leave one value as it is."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence):
        return values
    return tuple(value.item() if isinstance(value, np.generic) else value for value in values)


class LocalTransformer(nn.Module):
    """A transformer of local attention, for language or for continuous sequences.

    Attributes:
        num_tokens: Size of the vocabulary. None means continuous input and output of width `dim`: no
            embeddings, no limit of length, no final norm and no logits.
        max_seq_len: Most tokens, the size of the absolute position embedding.
        dim: Model width.
        depth: Layers.
        causal: Whether no token sees a later one.
        local_attn_window_size: Tokens in a window; or a sequence of one number a layer, small below and large above,
            say. None among them makes a layer global, in time O(n^2): local below, a few global ones on top. Kept as
            an int, None, or a tuple of these.
        dim_head: Width of a head.
        heads: Heads.
        kv_heads: Heads of keys and values, a divisor of `heads`. None means as many.
        ff_mult: Width of the feed-forward layers, see `FeedForward`.
        attn_dropout: Share of attention probabilities to drop.
        ff_dropout: Share of hidden values to drop.
        ignore_index: Label that the loss leaves out. Where it is no token, it is embedded as zeros.
        use_xpos: Whether rotary fades with distance, so that a call may give a larger window.
        xpos_scale_base: Distance of that fading. None means half a window.
        use_dynamic_pos_bias: Whether one `DynamicPositionBias` serves all layers, evaluated for each one's window,
            in place of rotary. Global layers keep rotary: a bias of theirs would be n x n.
        global_attn_layer: Function from the number of a layer (from 0) to a module that is inserted
            before it and called as ``layer(x, mask=mask)`` on ``[b, n, e]``. To decode with a cache it must offer
            ``init_cache(batch, dtype)`` and take ``cache=``, and then return ``(out, cache)``.
        layers_insert_global_attn: Layers to insert it in, counted from 1. None means all. Kept as a tuple.
        num_residual_streams: Streams of the hyper-connections; 1 is a plain residual.
        qk_rmsnorm, qk_scale, exact_windowsize, gate_values_per_head, look_backward, look_forward, shared_qk,
            reference_rotary, logits_soft_cap, attention_sinks: As in `LocalMHA`.
        use_abs_pos_emb: Whether positions are embedded. If not, length is unlimited.
        remat: Whether a gradient recomputes layers instead of keeping what they computed.
        scan_layers: Whether layers run in a loop, which is traced and compiled once whatever the depth. They must be
            alike: one window, and equal modules of `global_attn_layer` in all or none. Their parameters are stacked
            along a leading axis under the name ``layers``; `stack_layers` and `unstack_layers` map between this layout
            and ``layers_0``, ``layers_1``, ... of a model without. For one key both start from the same distributions,
            not from the same numbers, and drop other values. Calls with a cache run layers one after the other. A
            loop keeps more for the gradient than layers in a row, unless `remat=True`.
        dtype, param_dtype, precision, deterministic, kernel_init, out_kernel_init: As in `LocalMHA`.
        embedding_init: Initialiser of both embeddings.
        implementation: How attention is computed, see `local_attention`.

    Example:
        >>> model = LocalTransformer(num_tokens=256, max_seq_len=64, dim=32, depth=1, local_attn_window_size=16)
        >>> tokens = jnp.zeros((1, 40), jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> model.apply(variables, tokens).shape
        (1, 40, 256)
        >>> model.apply(variables, tokens, return_loss=True).shape
        ()

    Source: ``LocalTransformer`` of ``local-attention`` 1.11.2; ``tests/test_original.py`` compares them.
    """

    num_tokens: int | None
    max_seq_len: int
    dim: int
    depth: int
    causal: bool = True
    local_attn_window_size: int | Sequence[int | None] = 512
    dim_head: int = 64
    heads: int = 8
    kv_heads: int | None = None
    ff_mult: float = 4
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    ignore_index: int = -1
    use_xpos: bool = False
    xpos_scale_base: float | None = None
    use_dynamic_pos_bias: bool = False
    global_attn_layer: Callable[[int], nn.Module] | None = None
    layers_insert_global_attn: Sequence[int] | None = None
    num_residual_streams: int = 4
    qk_rmsnorm: bool = False
    qk_scale: float = 8
    exact_windowsize: bool = True
    gate_values_per_head: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    shared_qk: bool = False
    reference_rotary: bool = False
    logits_soft_cap: float | None = None
    attention_sinks: bool = False
    use_abs_pos_emb: bool = True
    remat: bool = False
    scan_layers: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    deterministic: bool = True
    kernel_init: Initializer = linear_init
    out_kernel_init: Initializer = linear_init
    embedding_init: Initializer = nn.initializers.normal(1.0)
    implementation: str | Implementation | None = None

    def __post_init__(self):
        # A module is a static argument of jitted functions, so what is a list in a configuration must be hashable.
        for name in ("local_attn_window_size", "layers_insert_global_attn"):
            object.__setattr__(self, name, _to_tuple(getattr(self, name)))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        cache: TransformerCache | None = None,
        return_loss: bool = False,
        window_size: int | None = None,
        deterministic: bool | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, TransformerCache]:
        """Logits of the next token, or the loss.

        Args:
            x: Tokens, ``[b, n]`` integers of any size, or ``[b, n, e]`` if `num_tokens` is None. Under jit a token
                outside the vocabulary cannot be refused: its embedding, and its loss as a label, is NaN.
            mask: Tokens that may be seen, ``[b, n]`` bool. It affects attention alone, not the loss; a token that is
                masked may be outside the vocabulary, and is then no label. With a cache, tokens that exist: their
                positions are counted as if the others were not there, so rows may be padded anywhere.
            cache: What came before `x`, from `init_cache` or an earlier call; then `x` may be one token or a
                chunk of any size, and the logits equal those of the whole sequence at once.
            return_loss: Return the mean cross entropy of each token given those before it, in nats, over the
                labels that are not `ignore_index` nor the first of their document (0 if there is none), instead of
                the logits.
            window_size: Another window for this call, with `use_xpos` only.
            deterministic: Overrides the module's.
            segment_ids: Documents that do not see each other, ``[b, n]`` integers. Absolute positions begin at 0 in
                each run of equal ones; windows that are not exact are cut by the row, not by the document.
            positions: Where tokens are, ``[b, n]`` integers, for absolute embeddings and rotary, in place of their
                index or, with a cache, of the number of tokens before them. Windows do not go by them.

        Returns:
            Logits ``[b, n, c]`` (``[b, n, e]`` if `num_tokens` is None), or the loss, ``[]`` float32. With a
            cache, the logits and the grown cache.

        Raises:
            TypeError: The input's dtype is wrong.
            ValueError: A shape, a field or a token is wrong, or the sequence is longer than `max_seq_len`.
        """
        self._check(x, return_loss, cache)
        b, n = x.shape[:2]
        tokens = _Tokens(
            x,
            mask,
            token_mask(mask, (b, self.heads), n),
            token_segments(segment_ids, b, n),
            self._check_positions(positions, b, n),
        )
        tokens = tokens._replace(x=self._prepare(tokens))
        if not return_loss:
            x, cache = self._hidden(tokens, cache, window_size, deterministic)
            logits = x if self.num_tokens is None else self._head()(x)
            return logits if cache is None else (logits, cache)
        x, _ = self._hidden(tokens.without_last(), None, window_size, deterministic)
        return self._loss(x, tokens)

    @nn.nowrap
    def init_cache(
        self,
        batch: int,
        dtype: Dtype | None = None,
        max_length: int | None = None,
        window_size: int | None = None,
        rewind: int = 0,
    ) -> TransformerCache:
        """Make an empty cache; needs no parameters, and may be called on an unbound module.

        Args:
            batch: Rows.
            dtype: Of keys and values, floating. None means the module's `dtype`, or `param_dtype`.
            max_length: Tokens that a global layer (a window of None) remembers, the last ones. None means
                `max_seq_len`. Local layers remember their windows, whatever the length.
            window_size: The window of the calls, if they give one.
            rewind: Tokens that `TransformerCache.rewind` may go back.

        Raises:
            TypeError: A size is no int, or `dtype` is not floating.
            ValueError: A size is out of range, the model is not causal, or an inserted global layer offers no
                `init_cache`.
        """
        if max_length is not None:
            check_count("max_length", max_length, 1)
        elif self.use_abs_pos_emb and self.num_tokens is not None:
            max_length = self.max_seq_len
        layers = []
        for index in range(self.depth):
            attn = self._attention(index, True).init_cache(
                batch, dtype, max_length, None if self.window_sizes()[index] is None else window_size, rewind
            )
            layer = self._global_attention(index)
            if layer is not None and not hasattr(layer, "init_cache"):
                raise ValueError(
                    "A layer of `global_attn_layer` must offer `init_cache(batch, dtype)` and take `cache=` to be "
                    f"used in decoding, got {type(layer).__name__} without; add them, or decode without a cache."
                )
            layers.append(LayerCache(attn, None if layer is None else layer.init_cache(batch, dtype)))
        # Arrays of their own: a cache may be donated.
        length, starts = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, rewind + 1), jnp.int32)
        return TransformerCache(tuple(layers), length, jnp.zeros((batch, rewind + 1), int), starts)

    def _prepare(self, tokens):
        """Check what tokens are, and let nothing that a masked one holds reach another."""
        if self.num_tokens is None:
            return tokens.x if tokens.exists is None else silence(tokens.x, tokens.exists, self.dtype)
        self._check_tokens(tokens.x, tokens.exists)
        return _to_int32(tokens.x)

    def _hidden(self, tokens, cache, window_size, deterministic):
        deterministic = self.deterministic if deterministic is None else deterministic
        biases = self._attn_biases(window_size)
        positions, state = self._place(tokens, cache)
        streams = expand_streams(self._embed(tokens, positions), self.num_residual_streams)
        caches: Any = None if cache is None else cache.layers
        run: Any = self._scan_layers if self.scan_layers else self._run_layers
        streams, caches = run(streams, caches, tokens, biases, window_size, deterministic)
        if state is not None:
            cache = TransformerCache(caches, *state)
        return self._norm(reduce_streams(streams)), cache

    def _run_layers(self, streams, caches, tokens, biases, window_size, deterministic):
        """Run layers one after the other, each with its own parameters and, if there are any, its own cache."""
        layer_class = nn.remat(TransformerLayer, policy=_is_narrowed_matrix) if self.remat else TransformerLayer
        grown, branch = [], 0
        for index in range(self.depth):
            layer = self._layer(layer_class, index, window_size, deterministic, f"layers_{index}")
            cache = None if caches is None else caches[index]
            streams, cache = layer(streams, branch, *_layer_inputs(layer, tokens, biases), cache)
            grown.append(cache)
            branch += 2 if layer.global_attn is None else 3
        return streams, tuple(grown)

    def _scan_layers(self, streams, caches, tokens, biases, window_size, deterministic):
        """Run layers in a loop over stacked parameters; with caches, which are not stacked, one after the other."""
        if caches is not None:
            if self.is_initializing():  # makes the parameters
                self._scan_layers(streams, None, tokens, biases, window_size, deterministic)
            run = nn.map_variables(LocalTransformer._run_layers, "params", unstack_layers)
            return run(self, streams, caches, tokens, biases, window_size, deterministic)
        in_axes: Any = (0, *[nn.broadcast] * 5)
        layer_class: Any = TransformerLayer
        if self.remat:
            layer_class = nn.remat(layer_class, prevent_cse=False, policy=_is_narrowed_matrix)
        layer_class = nn.scan(
            layer_class,
            variable_axes={True: 0},
            split_rngs={True: True},
            in_axes=in_axes,
            length=self.depth,
            metadata_params=METADATA,
            check_constancy_invariants=False,  # would trace a layer twice
        )
        layer = self._layer(layer_class, 0, window_size, deterministic, "layers")
        branches = jnp.arange(self.depth) * (2 if layer.global_attn is None else 3)
        if self.num_residual_streams == 1 and self.dtype is None:  # what branches return, and a loop must begin with
            streams = jax.tree.map(lambda x: x.astype(jnp.result_type(x, self.param_dtype)), streams)
        return layer(streams, branches, *_layer_inputs(layer, tokens, biases), None)

    def _layer(self, layer_class, index, window_size, deterministic, name):
        return layer_class(
            attn=self._attention(index, deterministic),
            ff=self._feed_forward(deterministic),
            global_attn=self._global_attention(index),
            num_residual_streams=self.num_residual_streams,
            window_size=window_size,
            name=name,
        )

    def _place(self, tokens, cache):
        """Absolute positions, ``[b, n]`` or ``[1, n]``, and what a cache keeps of its tokens.

        They count the tokens of its document before each. Without a cache masked tokens count too.
        """
        b, n = tokens.x.shape[:2]
        ids = tokens.segment_ids if n else None
        if cache is None:
            places = np.arange(n, dtype=np.int32)[None]
            if ids is not None:
                all_places, exist = jnp.broadcast_to(places, (b, n)), jnp.ones((b, n), bool)
                places = all_places - _begin_documents(all_places, exist, ids, ids[:, 0], jnp.zeros((b,), jnp.int32))
            return places, None
        exists = jnp.ones((b, n), bool) if tokens.exists is None else tokens.exists
        places = cache.length[:, None] + count_before(exists)
        last_id, start = cache.last_document()
        length = cache.length + exists.sum(1, dtype=jnp.int32)
        rings = cache.segment_ids, cache.segment_starts
        if ids is None:
            starts, ids = start[:, None], last_id[:, None]
            if rings[0].shape[1] == 1:  # the last token's document goes on
                return places - starts, (length, *rings)
        else:
            ids = ids.astype(last_id.dtype)
            starts = _begin_documents(places, exists, ids, last_id, start)
        slots = ring_slots(places, exists, length, rings[0].shape[1])
        rows = jnp.arange(b)[:, None]
        kept = (ring.at[rows, slots].set(new, mode="drop") for ring, new in zip(rings, (ids, starts), strict=True))
        return places - starts, (length, *kept)

    def _norm(self, x):
        if self.num_tokens is None:
            return x
        return LayerNorm(self.dtype, self.param_dtype, self.implementation, name="norm")(x)

    def _head(self):
        assert self.num_tokens is not None
        return Head(
            self.dim,
            self.num_tokens,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.kernel_init,
            name="to_logits",
        )

    def _embed(self, tokens, positions):
        x, exists = tokens.x, tokens.exists
        if self.num_tokens is None:
            return x if self.dtype is None else x.astype(self.dtype)
        is_silent = x == self.ignore_index
        is_silent = is_silent if exists is None else is_silent | ~exists
        is_silent &= (x < 0) | (x >= self.num_tokens)
        x = jnp.where(x < 0, self.num_tokens, x)  # a negative index would count from the end, this gives NaN
        embedded = self._embedding(self.num_tokens, "token_emb")(jnp.where(is_silent, 0, x))
        embedded = jnp.where(is_silent[..., None], 0, embedded)
        if not self.use_abs_pos_emb:
            return embedded
        positions = positions if tokens.positions is None else tokens.positions
        self._check_room(positions, exists)
        table = self._embedding(self.max_seq_len, "pos_emb")
        if isinstance(positions, np.ndarray):  # the indices of a sequence
            return embedded + table.first(positions.shape[1])
        if exists is not None:  # absent tokens beyond the end are no reason for NaN
            is_there = exists | ((positions >= 0) & (positions < self.max_seq_len))
            positions = jnp.where(is_there, positions, 0)
        positions = jnp.where(positions < 0, self.max_seq_len, positions)
        return embedded + table(positions)

    def _embedding(self, size, name):
        return Embedding(
            size,
            self.dim,
            self.embedding_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
            name=name,
        )

    @nn.nowrap
    def window_sizes(self) -> tuple[int | None, ...]:
        """Return the window of every layer, None where it is global."""
        check_count("depth", self.depth, 0)
        sizes: Any = self.local_attn_window_size
        if not isinstance(sizes, tuple):
            return (sizes,) * self.depth
        if len(sizes) != self.depth:
            raise ValueError(
                f"`local_attn_window_size` must be one window or one for each of the {self.depth} layers, "
                f"got {len(sizes)}: {sizes}."
            )
        return sizes

    def _attn_biases(self, window_size):
        """The dynamic bias of each window among the layers', by its size."""
        if not self.use_dynamic_pos_bias:
            return {}
        network = DynamicPositionBias(
            self.dim // 2,
            self.heads,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name="dynamic_pos_bias",
        )
        biases = {}
        for size in sorted({size for size in self.window_sizes() if size is not None}):
            effective = size if window_size is None else window_size
            window = Window(effective, self.causal, self.look_backward, self.look_forward, self.exact_windowsize)
            biases[size] = network(window.window_size, window.slab, window.backward)
        return biases

    @nn.nowrap
    def _attention(self, index, deterministic):
        window_size = self.window_sizes()[index]
        return LocalMHA(
            dim=self.dim,
            window_size=window_size,
            dim_head=self.dim_head,
            heads=self.heads,
            kv_heads=self.kv_heads,
            dropout=self.attn_dropout,
            causal=self.causal,
            prenorm=True,
            qk_rmsnorm=self.qk_rmsnorm,
            qk_scale=self.qk_scale,
            use_xpos=self.use_xpos,
            xpos_scale_base=self.xpos_scale_base,
            exact_windowsize=self.exact_windowsize,
            gate_values_per_head=self.gate_values_per_head,
            look_backward=self.look_backward,
            look_forward=self.look_forward,
            shared_qk=self.shared_qk,
            use_rotary_pos_emb=not self.use_dynamic_pos_bias or window_size is None,
            reference_rotary=self.reference_rotary,
            logits_soft_cap=self.logits_soft_cap,
            attention_sinks=self.attention_sinks,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            deterministic=deterministic,
            kernel_init=self.kernel_init,
            out_kernel_init=self.out_kernel_init,
            implementation=self.implementation,
            parent=None,  # the layer that it is given to adopts it
        )

    def _feed_forward(self, deterministic):
        return FeedForward(
            self.dim,
            self.ff_mult,
            self.ff_dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            deterministic=deterministic,
            kernel_init=self.kernel_init,
            out_kernel_init=self.out_kernel_init,
            implementation=self.implementation,
            parent=None,
        )

    @nn.nowrap
    def _global_attention(self, index):
        layers = range(1, self.depth + 1) if self.layers_insert_global_attn is None else self.layers_insert_global_attn
        if self.global_attn_layer is None or index + 1 not in layers:
            return None
        return self.global_attn_layer(index).clone(parent=None)

    def _loss(self, x, tokens):
        """Mean over the labels that count: those that are said to exist, of the document of the token before."""
        labels = tokens.x[:, 1:]
        counted = labels != self.ignore_index
        if tokens.segment_ids is not None:
            counted &= tokens.segment_ids[:, 1:] == tokens.segment_ids[:, :-1]
        if tokens.exists is not None:
            counted &= tokens.exists[:, 1:] | ((labels >= 0) & (labels < self.num_tokens))
        head = self._head()
        labels = jnp.where(labels < 0, head.num_tokens, labels)  # as in `_embed`: NaN, not a label from the end
        total = head.cross_entropy(x, jnp.where(counted, labels, 0), counted)
        return total / jnp.maximum(counted.sum(), 1)

    def _check(self, x, return_loss, cache):
        layers = self.layers_insert_global_attn or ()
        if not all(1 <= layer <= self.depth for layer in layers):
            raise ValueError(
                f"`layers_insert_global_attn` counts layers from 1 to `depth` ({self.depth}), got {tuple(layers)}."
            )
        self._check_layout()
        if self.num_residual_streams < 1:
            raise ValueError(f"`num_residual_streams` must be at least 1, got {self.num_residual_streams}.")
        if return_loss and not self.causal:
            raise ValueError(
                "`return_loss` is of the next token, which a model with `causal=False` sees; compute a loss from the "
                "logits, of masked tokens say, or set `causal=True`."
            )
        if cache is not None and return_loss:
            raise ValueError("`return_loss` takes a whole sequence, got a cache with it; drop one of them.")
        if cache is not None and not (isinstance(cache, TransformerCache) and len(cache.layers) == self.depth):
            raise ValueError(
                f"`cache` must be a TransformerCache of {self.depth} layers, got {type(cache).__name__}; "
                "make one with this model's `init_cache`."
            )
        if cache is not None and x.ndim and cache.length.shape[0] != x.shape[0]:
            raise ValueError(
                f"`cache` must have x's batch, heads and width, got a cache of {cache.length.shape[0]} rows for x of "
                f"shape {x.shape}; make one with `init_cache(batch={x.shape[0]})`."
            )
        if self.num_tokens is None:
            self._check_continuous(x, return_loss)
        else:
            self._check_shape(x, return_loss)

    def _check_layout(self):
        """Raise if parameters have the other layout, or layers that shall be scanned are not alike."""
        sizes = self.window_sizes()
        if not self.scan_layers:
            if self.has_variable("params", "layers"):
                raise ValueError(
                    "`params` must have layers_0, layers_1, ... when `scan_layers=False`, got stacked layers; pass "
                    "`unstack_layers(params)`, or set `scan_layers=True`."
                )
            return
        if self.has_variable("params", "layers_0"):
            raise ValueError(
                "`params` must have stacked layers when `scan_layers=True`, got layers_0; pass `stack_layers(params)`, "
                "or set `scan_layers=False`."
            )
        if len(set(sizes)) != 1:
            raise ValueError(
                "`local_attn_window_size` must be the same in all layers, and `depth` at least 1, when "
                f"`scan_layers=True`, got windows {sizes}; set `scan_layers=False`."
            )
        inserted = [self._global_attention(index) for index in range(self.depth)]
        # Made in a module's call, they have been given names with numbers.
        first, *others = (None if layer is None else layer.clone(name=None) for layer in inserted)
        for index, other in enumerate(others, 2):
            if other != first:
                got, got_then = (" ".join(repr(layer).split()) for layer in (first, other))
                raise ValueError(
                    "`global_attn_layer` must insert equal modules in all layers when `scan_layers=True`, got "
                    f"{got} in layer 1 and {got_then} in layer {index}; make them equal, or set `scan_layers=False`."
                )

    def _check_continuous(self, x, return_loss):
        if return_loss:
            raise ValueError("`return_loss` needs `num_tokens`, got None; compute a loss from the output instead.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"`x` must be of a floating dtype when `num_tokens` is None, got {x.dtype}.")
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"`x` must be [b, n, {self.dim}] when `num_tokens` is None, got shape {x.shape}.")

    def _check_shape(self, x, return_loss):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"`x` must be integer tokens, got {x.dtype}; for continuous input set `num_tokens=None`.")
        if x.ndim != 2:
            raise ValueError(f"`x` must be tokens [b, n], got shape {x.shape}.")
        if x.shape[1] < return_loss:
            raise ValueError("`return_loss` needs a sequence of at least one token, got none; pass longer rows.")

    def _check_tokens(self, x, exists):
        if isinstance(x, Tracer) or isinstance(exists, Tracer) or x.size == 0:
            return
        tokens = np.asarray(x)
        is_wrong = ((tokens < 0) | (tokens >= self.num_tokens)) & (tokens != self.ignore_index)
        wrong = tokens[is_wrong if exists is None else is_wrong & np.asarray(exists)]
        if wrong.size:
            raise ValueError(
                f"Tokens must be in [0, {self.num_tokens}), `ignore_index` ({self.ignore_index}) or masked, "
                f"got {wrong[0]}; check the tokenizer against `num_tokens`."
            )

    def _check_positions(self, positions, b, n):
        has_embedding = self.num_tokens is not None and self.use_abs_pos_emb
        has_rotary = not self.use_dynamic_pos_bias or None in self.window_sizes()
        if positions is not None and not (has_embedding or has_rotary):
            raise ValueError(
                "`positions` are for absolute embeddings and rotary, of which this model has neither; leave them out."
            )
        return check_positions(positions, b, n)

    def _check_room(self, positions, exists):
        """Raise if positions run out, the indices of a sequence or what is known of others; the rest embed as NaN."""
        there = positions
        if not isinstance(positions, np.ndarray):
            if isinstance(positions, Tracer) or isinstance(exists, Tracer):
                return
            there = np.asarray(positions)
            there = there if exists is None else there[np.asarray(exists)]
        if there.size and (there.max() >= self.max_seq_len or there.min() < 0):
            wrong = f"{there.max() + 1} tokens" if there.min() >= 0 else f"position {there.min()}"
            raise ValueError(
                f"The sequence must be at most `max_seq_len` ({self.max_seq_len}) long, got {wrong}; "
                "shorten it, or set `use_abs_pos_emb=False` for unlimited length."
            )
