"""The whole model, from tokens to logits or a loss."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Initializer
from jax import lax

from flax_local_attention.array_checks import check_array
from flax_local_attention.cache import LayerCache, TransformerCache, check_of_new, count_in_documents
from flax_local_attention.checks import (
    check_count,
    check_flag,
    check_kind,
    optional,
)
from flax_local_attention.embedding import Embedding
from flax_local_attention.feed_forward import FeedForward
from flax_local_attention.fields import CacheShape, MultiHead, embedding_init, resolve_window, window_of
from flax_local_attention.head import Head, LossSum
from flax_local_attention.layers import LocalMHA
from flax_local_attention.norm import LayerNorm
from flax_local_attention.operands import check_positions, silence, token_mask, token_segments
from flax_local_attention.position_bias import DynamicPositionBias
from flax_local_attention.residual_streams import expand_streams, reduce_streams
from flax_local_attention.stacking import METADATA, unstack_layers
from flax_local_attention.tokens import (
    Tokens,
    check_continuous,
    check_labels,
    check_room,
    check_token_shape,
    check_vocabulary,
    to_int32,
)
from flax_local_attention.transformer_layer import LayerInputs, TransformerLayer
from flax_local_attention.window import Window


class _Call(NamedTuple):
    """What all layers of a call share.

    Attributes:
        tokens: The tokens.
        windows: Each layer's window and xPos distance, see `resolve_window`.
        biases: Dynamic bias of each window.
        deterministic: Whether dropout is off.
    """

    tokens: Tokens
    windows: tuple[tuple[int | Window | None, float | None], ...]
    biases: dict[Window, jax.Array]
    deterministic: bool

    def inputs(self, attn: LocalMHA, cache: LayerCache | None) -> LayerInputs:
        """Return the inputs of the layer with this attention and cache."""
        tokens = self.tokens
        positions = tokens.positions if attn.use_rotary_pos_emb else None
        bias = self.biases.get(_window_of_bias(window_of(attn, attn.window_size), cache))
        return LayerInputs(tokens.mask, bias, tokens.segment_ids, positions)


def _window_of_bias(window, cache):
    """Return the window that determines a bias's shape: the cache's if it remembers fewer tokens than the layer's."""
    return cache.attn.window if cache is not None and cache.attn.is_bounded else window


def _is_narrowed_matrix(primitive, *inputs, **params):
    """Return whether a result is a matrix cast to a narrower dtype: weights that `remat` keeps and does not cast again.

    This is a policy of `jax.checkpoint`.
    """
    is_cast = primitive is lax.convert_element_type_p and inputs[0].ndim == 2
    return is_cast and params["new_dtype"].itemsize < inputs[0].dtype.itemsize


def _to_tuple(values):
    """Turn a sequence or an array into a tuple of Python numbers; leave one value as it is."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence):
        return values
    return tuple(value.item() if isinstance(value, np.generic) else value for value in values)


class LocalTransformer(MultiHead[TransformerCache]):
    """A transformer of local attention, for language or for continuous sequences.

    Attributes:
        num_tokens: Size of the vocabulary. None means continuous input and output of width `dim`, without
            embeddings, final norm, logits or a limit on length.
        max_seq_len: Most tokens in a sequence: the size of the absolute position embedding.
        dim: Model width.
        depth: Layers.
        causal: Whether each token sees only tokens up to itself.
        local_attn_window_size: Tokens in a window, or a `Window`; or a sequence with one of these for each layer, for
            example smaller ones first. A None in the sequence makes its layer global, in time O(n^2). With a `Window`,
            `look_backward`, `look_forward` and `exact_windowsize` must keep their defaults. Sequences are stored as
            tuples.
        ff_mult: Factor of the feed-forward width, see `FeedForward`.
        attn_dropout: Share of attention probabilities to drop.
        ff_dropout: Share of hidden feed-forward values to drop.
        ignore_index: Label that the loss ignores. Input tokens with this number embed as zeros if they are outside the
            vocabulary.
        use_dynamic_pos_bias: Whether all layers use one `DynamicPositionBias`, evaluated for each layer's window,
            in place of rotary. Global layers keep rotary, because their bias would be n x n.
        global_attn_layer: Function from the index of a layer (from 0) to a module that is inserted before it and
            called as ``layer(x, mask=mask)`` on ``[b, n, e]``. To decode with a cache, the module must have
            ``init_cache(batch, dtype)``, take ``cache=`` and then return ``(out, cache)``.
        layers_insert_global_attn: Layers to insert it in, counted from 1. None means all. Stored as a tuple.
        num_residual_streams: Streams of the hyper-connections; 1 means a plain residual.
        use_abs_pos_emb: Whether to embed absolute positions. If not, length is unlimited.
        remat: Whether the gradient recomputes each layer instead of storing its intermediate values.
        scan_layers: Whether layers run in a loop, whose body is traced and compiled once for any depth. All layers
            must have the same window, and `global_attn_layer` must insert equal modules in all of them or in none.
            Parameters are stacked along a leading axis under the name ``layers``; `stack_layers` and `unstack_layers`
            convert between this layout and the ``layers_0``, ``layers_1``, ... of a model without the loop. For the
            same key the two models draw from the same distributions, but not the same initial values and dropout.
            Calls with a cache run layers one after the other. Without `remat=True`, the loop stores more for the
            gradient than separate layers do.
        embedding_init: Initialiser of both embeddings.

    Examples:
        >>> model = LocalTransformer(num_tokens=256, max_seq_len=64, dim=32, depth=1, local_attn_window_size=16)
        >>> tokens = jnp.zeros((1, 40), jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> model.apply(variables, tokens).shape
        (1, 40, 256)
        >>> model.apply(variables, tokens, return_loss=True).shape
        ()

    Source: ``LocalTransformer`` of ``local-attention`` 1.11.2; ``tests/test_original.py`` compares the two.
    """

    num_tokens: int | None
    max_seq_len: int
    dim: int
    depth: int
    causal: bool = True
    local_attn_window_size: int | Window | Sequence[int | Window | None] = 512
    _: KW_ONLY
    ff_mult: float = 4
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    ignore_index: int = -1
    use_dynamic_pos_bias: bool = False
    global_attn_layer: Callable[[int], nn.Module] | None = None
    layers_insert_global_attn: Sequence[int] | None = None
    num_residual_streams: int = 4
    use_abs_pos_emb: bool = True
    remat: bool = False
    scan_layers: bool = False
    embedding_init: Initializer = embedding_init

    def __post_init__(self):
        # A module is a static argument of jitted functions, so lists from a configuration must become hashable.
        for name in ("local_attn_window_size", "layers_insert_global_attn", "rotary"):
            object.__setattr__(self, name, _to_tuple(getattr(self, name)))
        super().__post_init__()

    @nn.nowrap
    def check_fields(self):
        """Raise unless every field is valid, and the fields fit together in every layer."""
        super().check_fields()
        if self.num_tokens is not None and self.use_abs_pos_emb:
            check_count("max_seq_len", self.max_seq_len, 1)
        for size in self.window_sizes():
            if size is not None and not isinstance(size, Window):
                check_count("local_attn_window_size", size, 1)
            window_of(self, size)
        if self.use_dynamic_pos_bias:
            self._check_bias_or_rotary()
        layers = self.layers_insert_global_attn or ()
        if not all(1 <= layer <= self.depth for layer in layers):
            raise ValueError(
                f"`layers_insert_global_attn` must be layers from 1 to `depth` ({self.depth}), got {tuple(layers)}; "
                "count from 1."
            )

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        cache: TransformerCache | None = None,
        return_loss: bool = False,
        window_size: int | Window | None = None,
        deterministic: bool | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, TransformerCache]:
        """Compute the logits of the next token, or the loss.

        Args:
            x: Tokens, ``[b, n]`` of any integer dtype, or ``[b, n, e]`` if `num_tokens` is None. A token outside the
                vocabulary raises an error; under jit, where it cannot, its embedding and its loss as a label are NaN.
            mask: Tokens that may be seen, ``[b, n]`` bool. It affects attention, not the loss. A masked token may be
                outside the vocabulary, and is then not a label. With a cache, tokens that exist: positions
                count existing tokens only, so rows may be padded anywhere.
            cache: The tokens before `x`, from `init_cache` or an earlier call. `x` is then one token or a chunk of any
                size, and the logits equal those of the whole sequence at once.
            return_loss: Return the mean of `sum_loss` (0 if no label counts) instead of the logits.
            window_size: Another window for this call; requires `use_xpos`.
            deterministic: Overrides the module's field.
            segment_ids: Documents that do not see each other, ``[b, n]`` integers. Absolute positions restart at 0 in
                each run of equal ids. Windows that are not exact are cut from the start of the row, not of the
                document.
            positions: Positions for absolute embeddings and rotary, ``[b, n]`` integers. None means indices or, with a
                cache, the number of tokens before each token. Windows do not use them.

        Returns:
            The logits, ``[b, n, c]`` (the output, ``[b, n, e]``, if `num_tokens` is None), or the loss, ``[]`` float32.
            With a cache, a pair of the logits and the grown cache.

        Raises:
            TypeError: The dtype of the input is wrong.
            ValueError: A shape, a field or a token is wrong, or the sequence is longer than `max_seq_len`.
        """
        check_flag("return_loss", return_loss)
        if return_loss:
            if cache is not None:
                raise ValueError("`return_loss` takes a whole sequence, got a cache with it; drop one of them.")
            options = {"window_size": window_size, "deterministic": deterministic}
            loss = self.sum_loss(x, mask, segment_ids=segment_ids, positions=positions, **options)
            assert isinstance(loss, LossSum)  # as there is no cache
            return loss.mean
        tokens = self._read(x, mask, segment_ids, positions, cache)
        x, head, grown = self._hidden(tokens, cache, window_size, deterministic)
        logits = x if head is None else head(x)
        return logits if cache is None else (logits, grown)

    def sum_loss(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        labels: jax.Array | None = None,
        cache: TransformerCache | None = None,
        window_size: int | Window | None = None,
        deterministic: bool | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> LossSum | tuple[LossSum, TransformerCache]:
        """Sum the cross entropy of each token given those before it, and count the labels.

        Call it by ``model.apply(variables, x, method="sum_loss")``. A label counts unless it is `ignore_index` or the
        first token of its document. Sums over unequal batches or devices can be added; their means cannot.

        Args:
            x: Tokens, ``[b, n]`` integers, at least one in a row.
            mask: As in a call.
            labels: The next token of each token, ``[b, n]`` integers: ``x, labels = rows[:, :-1], rows[:, 1:]``. Every
                label except `ignore_index` counts, regardless of `segment_ids` and `mask`: set labels from another
                document to `ignore_index`. None means that each token of `x` is the label of the one before it. The
                model then does not read the last token of a row, unless rows are sharded over an explicit mesh axis,
                which must divide their length.
            cache: The tokens before `x`, as in a call, to score a text of any length in chunks. Requires `labels`.
            window_size: As in a call.
            deterministic: As in a call.
            segment_ids: As in a call.
            positions: As in a call.

        Returns:
            The sum in nats and the number of labels. With a cache, a pair of these and the grown cache.

        Raises:
            TypeError: As in a call.
            ValueError: As in a call; also if the model has no vocabulary or is not causal, `labels` are not tokens of
                x's shape, or there is a cache and no labels.

        Examples:
            >>> model = LocalTransformer(num_tokens=256, max_seq_len=64, dim=32, depth=1, local_attn_window_size=16)
            >>> tokens = jnp.zeros((2, 40), jnp.int32)
            >>> variables = model.init(jax.random.key(0), tokens)
            >>> total, count = model.apply(variables, tokens, method="sum_loss")
            >>> count
            Array(78, dtype=int32)
        """
        tokens = self._read(x, mask, segment_ids, positions, cache)
        self._check_loss(x)
        if labels is None:
            if cache is not None:
                raise ValueError(
                    "`labels` must be given with `cache`, got none: the label of a chunk's last token is in the next "
                    "chunk; pass labels=rows[:, 1:] for x=rows[:, :-1]."
                )
            tokens, following = tokens.with_next(self.ignore_index)
        else:
            assert self.num_tokens is not None
            check_labels(labels, x.shape, self.num_tokens, self.ignore_index)
            following = Tokens(to_int32(labels))
        hidden, head, grown = self._hidden(tokens, cache, window_size, deterministic)
        labels, counted = self._labels(tokens, following, head.num_tokens)
        total = LossSum(head.cross_entropy(hidden, labels, counted), counted.sum(dtype=jnp.int32))
        return total if cache is None else (total, grown)

    @nn.nowrap
    def make_cache(self, shape: CacheShape, window_size: int | Window | None = None) -> TransformerCache:
        """Make an empty cache, see `init_cache`; `max_length` is `max_seq_len` by default if positions are embedded."""
        if shape.max_length is None and self.use_abs_pos_emb and self.num_tokens is not None:
            shape = shape._replace(max_length=self.max_seq_len)
        windows = self._windows(window_size)
        attns = [self._attention(index, windows, True).make_cache(shape) for index in range(self.depth)]
        layers = [LayerCache(attn, self._init_global_cache(index, shape)) for index, attn in enumerate(attns)]
        return TransformerCache.create(layers, shape.batch, shape.rewind)

    @nn.nowrap
    def _init_global_cache(self, index, shape):
        """Make the cache of the module inserted before layer `index`; None if there is none."""
        layer = self._global_attention(index)
        if layer is None:
            return None
        if not hasattr(layer, "init_cache"):
            raise ValueError(
                "A layer of `global_attn_layer` must have `init_cache(batch, dtype)` and take `cache=` to be "
                f"used in decoding, got {type(layer).__name__} without; add them, or decode without a cache."
            )
        return layer.init_cache(shape.batch, shape.dtype)

    def _read(self, x, mask, segment_ids, positions, cache):
        """Check the arguments of a call, and return its tokens."""
        self._check(x, cache)
        b, n = x.shape[:2]
        if cache is not None:
            check_of_new(n, mask, segment_ids, positions)
        tokens = Tokens(
            x,
            mask,
            token_mask(mask, (b, self.heads), n),
            token_segments(segment_ids, b, n),
            self._check_positions(positions, b, n),
        )
        return tokens._replace(x=self._prepare(tokens))

    def _prepare(self, tokens):
        """Check token values, and silence masked continuous tokens so that they cannot affect others."""
        if self.num_tokens is None:
            x = jnp.asarray(tokens.x)
            return x if tokens.exists is None else silence(x, tokens.exists, self.dtype)
        check_vocabulary(tokens.x, tokens.exists, self.num_tokens, self.ignore_index)
        return to_int32(tokens.x)

    @nn.compact
    def _hidden(self, tokens, cache, window_size, deterministic) -> tuple[jax.Array, Any, Any]:
        """Compute the hidden states before the head, ``[b, n, e]``; also return the head and the grown cache.

        Tokens are embedded and repeated for each residual stream. Layers read and write the streams. The sum of the
        streams is normalised. The head is None without a vocabulary, the cache None without one.
        """
        optional(check_flag)("deterministic", deterministic)
        self._check_layout()  # here, where modules may be made
        windows = self._windows(window_size)
        deterministic = self.deterministic if deterministic is None else deterministic
        layers = None if cache is None else cache.layers
        call = _Call(tokens, windows, self._attn_biases(windows, layers), deterministic)
        positions, counted = self._place(tokens, cache)
        streams = expand_streams(self._embed(tokens, positions), self.num_residual_streams)
        if self.scan_layers:
            streams, layers = self._scan_layers(streams, layers, call)
        else:
            streams, layers = self._run_layers(streams, layers, call)
        grown = None if counted is None else counted.with_layers(layers)
        return self._norm(reduce_streams(streams)), self._head(), grown

    def _run_layers(self, streams, caches, call):
        """Run layers one after the other, each with its own parameters and its own cache, if any.

        `branch` counts branches over all layers, two or three per layer: a fresh `HyperConnection` reads stream
        ``branch % r``.

        Returns:
            The streams, and a tuple of the layers' grown caches, each None without a cache.
        """
        layer_class = nn.remat(TransformerLayer, policy=_is_narrowed_matrix) if self.remat else TransformerLayer
        grown, branch = [], 0
        for index in range(self.depth):
            layer = self._layer(layer_class, index, call, f"layers_{index}")
            cache = None if caches is None else caches[index]
            streams, cache = layer(streams, branch, call.inputs(layer.attn, cache), cache)
            grown.append(cache)
            branch += 2 if layer.global_attn is None else 3
        return streams, tuple(grown)

    def _scan_layers(self, streams, caches, call):
        """Run layers in a loop over stacked parameters; with caches, which are not stacked, run them one by one."""
        if caches is not None:
            if self.is_initializing():  # makes the parameters
                self._scan_layers(streams, None, call)
            run = nn.map_variables(LocalTransformer._run_layers, "params", unstack_layers)
            return run(self, streams, caches, call)
        in_axes: Any = (0, nn.broadcast, nn.broadcast)
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
        layer = self._layer(layer_class, 0, call, "layers")
        branches = jnp.arange(self.depth) * (2 if layer.global_attn is None else 3)
        if self.num_residual_streams == 1 and self.dtype is None:  # the loop must start in the dtype of branches
            streams = jax.tree.map(lambda x: x.astype(jnp.result_type(x, self.param_dtype)), streams)
        return layer(streams, branches, call.inputs(layer.attn, None), None)

    @nn.nowrap
    def _layer(self, layer_class, index, call, name):
        """Make layer `index` from a class, which may be wrapped in `nn.remat` or `nn.scan`."""
        return self.make(
            layer_class,
            attn=self._attention(index, call.windows, call.deterministic),
            ff=self.make(
                FeedForward, self.dim, self.ff_mult, self.ff_dropout, deterministic=call.deterministic, parent=None
            ),
            global_attn=self._global_attention(index),
            num_residual_streams=self.num_residual_streams,
            name=name,
        )

    def _place(self, tokens, cache):
        """Find absolute positions, ``[b, n]`` or ``[1, n]``, and the cache that counts the tokens.

        A position is the number of earlier tokens in the same document. Without a cache masked tokens count too.
        """
        b, n = tokens.x.shape[:2]
        ids = tokens.segment_ids if n else None
        if cache is not None:
            return cache.place(jnp.ones((b, n), bool) if tokens.exists is None else tokens.exists, ids)
        indices = (np if isinstance(n, int) else jnp).arange(n, dtype=np.int32)[None]
        if ids is None:
            return indices, None

        return count_in_documents(ids), None

    def _norm(self, x):
        """Normalise hidden states before the head; a model without a vocabulary returns them as they are."""
        if self.num_tokens is None:
            return x
        return self.make(LayerNorm, name="norm")(x)

    @nn.nowrap
    def _head(self):
        """Make the head; None for a model without a vocabulary."""
        if self.num_tokens is None:
            return None
        return self.make(Head, self.dim, self.num_tokens, name="to_logits")

    def _embed(self, tokens, positions):
        """Embed tokens, ``[b, n]`` to ``[b, n, e]``, and add absolute positions; cast continuous tokens.

        Outside the vocabulary, masked tokens and `ignore_index` embed as 0. Other tokens outside it embed as NaN,
        because they cannot raise under jit. A position beyond the table gives NaN too, unless its token is absent.
        """
        x, exists = tokens.x, tokens.exists
        if self.num_tokens is None:
            return x if self.dtype is None else x.astype(self.dtype)
        is_silent = x == self.ignore_index
        is_silent = is_silent if exists is None else is_silent | ~exists
        is_silent &= (x < 0) | (x >= self.num_tokens)
        x = jnp.where(x < 0, self.num_tokens, x)  # a negative index would count from the end; this one gives NaN
        embedded = self._embedding(self.num_tokens, "token_emb")(jnp.where(is_silent, 0, x))
        embedded = jnp.where(is_silent[..., None], 0, embedded)
        if not self.use_abs_pos_emb:
            return embedded
        positions = positions if tokens.positions is None else tokens.positions
        check_room(positions, exists, self.max_seq_len)
        table = self._embedding(self.max_seq_len, "pos_emb")
        if isinstance(positions, np.ndarray):  # the indices 0, 1, ...
            return embedded + table.first(positions.shape[1])[None]
        if exists is not None:  # absent tokens beyond the end do not give NaN
            is_there = exists | ((positions >= 0) & (positions < self.max_seq_len))
            positions = jnp.where(is_there, positions, 0)
        positions = jnp.where(positions < 0, self.max_seq_len, positions)
        return embedded + table(positions)

    @nn.nowrap
    def _embedding(self, size, name):
        return self.make(Embedding, size, self.dim, self.embedding_init, name=name)

    @nn.nowrap
    def window_sizes(self) -> tuple[int | Window | None, ...]:
        """Return the window size or `Window` of every layer, as given; None for a global layer."""
        sizes: Any = self.local_attn_window_size
        if not isinstance(sizes, tuple):
            return (sizes,) * self.depth
        if len(sizes) != self.depth:
            raise ValueError(
                f"`local_attn_window_size` must be one window or one for each of the {self.depth} layers, "
                f"got {len(sizes)}: {sizes}; give {self.depth}."
            )
        return sizes

    @nn.nowrap
    def _is_turned(self, index):
        """Return whether layer `index` uses rotary."""
        has_bias = self.use_dynamic_pos_bias and not window_of(self, self.window_sizes()[index]).is_global
        return not has_bias and self._rotary(index) is not False

    @nn.nowrap
    def _rotary(self, index):
        """Return the rotary of layer `index`."""
        if not isinstance(self.rotary, tuple):
            return self.rotary
        if len(self.rotary) != self.depth:
            raise ValueError(
                f"`rotary` must be one for all layers or one for each of the {self.depth}, got {len(self.rotary)}; "
                f"give {self.depth}."
            )
        return self.rotary[index]

    @nn.nowrap
    def _windows(self, window_size):
        """Find each layer's window and xPos distance in a call, see `resolve_window`."""
        return tuple(resolve_window(self, size, window_size) for size in self.window_sizes())

    def _attn_biases(self, windows, caches):
        """Compute the dynamic bias of each distinct window of the layers; global layers have none."""
        if not self.use_dynamic_pos_bias:
            return {}
        network = self.make(DynamicPositionBias, self.dim // 2, name="dynamic_pos_bias")
        caches = [None] * len(windows) if caches is None else caches
        own = (window_of(self, size) for size, _ in windows)
        local = dict.fromkeys(
            _window_of_bias(window, cache) for window, cache in zip(own, caches, strict=True) if not window.is_global
        )
        return {window: network(window.size, window.slab, window.backward) for window in local}

    @nn.nowrap
    def _attention(self, index, windows, deterministic):
        """Make the attention of layer `index`; a dynamic bias replaces rotary, except in a global layer."""
        window_size, scale_base = windows[index]
        is_turned = self._is_turned(index)
        return self.make(
            LocalMHA,
            self.dim,
            window_size,
            rotary=self._rotary(index) if is_turned else None,
            dropout=self.attn_dropout,
            causal=self.causal,
            prenorm=True,
            xpos_scale_base=scale_base,
            use_rotary_pos_emb=is_turned,
            deterministic=deterministic,
            parent=None,  # the layer that receives it becomes its parent
        )

    @nn.nowrap
    def _global_attention(self, index):
        """Make the module to insert before layer `index`; None if there is none.

        `index` counts from 0, `layers_insert_global_attn` from 1.
        """
        layers = range(1, self.depth + 1) if self.layers_insert_global_attn is None else self.layers_insert_global_attn
        if self.global_attn_layer is None or index + 1 not in layers:
            return None
        return self.global_attn_layer(index).clone(parent=None)

    @nn.nowrap
    def _labels(self, tokens, following, num_tokens):
        """Return the labels of tokens, which are the following tokens, and which labels count, both ``[b, n]``.

        A label must not be `ignore_index`. If documents are given, it must be in the document of its token. If a mask
        is given, it must exist or be in the vocabulary.
        """
        labels = following.x
        counted = labels != self.ignore_index
        if following.segment_ids is not None:
            counted &= following.segment_ids == tokens.segment_ids
        if following.exists is not None:
            counted &= following.exists | ((labels >= 0) & (labels < num_tokens))
        labels = jnp.where(labels < 0, num_tokens, labels)  # as in `_embed`: NaN, not a label from the end
        return jnp.where(counted, labels, 0), counted

    def _check(self, x, cache):
        """Raise unless the input and the cache fit the fields."""
        check_array("x", x)
        if cache is not None:
            check_kind("cache", cache, TransformerCache, "make one with this model's `init_cache`")
        if cache is not None and len(cache.layers) != self.depth:
            raise ValueError(
                f"`cache` must be a TransformerCache for {self.depth} layers, got one for {len(cache.layers)}; "
                "make one with this model's `init_cache`."
            )
        if cache is not None and x.ndim and cache.length.shape[0] != x.shape[0]:
            raise ValueError(
                f"`cache` must have x's number of rows, got a cache of {cache.length.shape[0]} rows for x of "
                f"shape {x.shape}; make one with `init_cache(batch={x.shape[0]})`."
            )
        if self.num_tokens is not None:
            check_token_shape(x)
        else:
            check_continuous(x, self.dim)

    def _check_bias_or_rotary(self):
        """Raise if a layer has both a dynamic bias and a given rotary."""
        for index, size in enumerate(self.window_sizes()):
            if self._rotary(index) not in (None, False) and not window_of(self, size).is_global:
                raise ValueError(
                    "`use_dynamic_pos_bias` takes the place of rotary in local layers, got `rotary` "
                    f"{self._rotary(index)} for layer {index + 1}; give rotary to global layers alone, by a list with "
                    "None for the others."
                )

    def _check_loss(self, x):
        """Raise if the loss of the next token is not defined."""
        if self.num_tokens is None:
            raise ValueError("`num_tokens` must be given for the loss, got None; compute one from the output instead.")
        if not self.causal:
            raise ValueError(
                "`causal` must be True for the loss of the next token, got False: the model sees that token; compute "
                "another loss from the logits, on masked tokens for example, or set `causal=True`."
            )
        if x.shape[1] == 0:
            raise ValueError("`x` must have at least one token in a row for the loss, got none; pass longer rows.")

    def _check_layout(self):
        """Raise if the parameters have the other layout, or the layers to scan differ."""
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
        if len({window_of(self, size) for size in sizes}) != 1:
            raise ValueError(
                "`local_attn_window_size` must be the same in all layers, and `depth` at least 1, when "
                f"`scan_layers=True`, got windows {sizes}; set `scan_layers=False`."
            )
        if isinstance(self.rotary, tuple) and len(set(self.rotary)) != 1:
            raise ValueError(
                f"`rotary` must be the same in all layers when `scan_layers=True`, got {self.rotary}; set "
                "`scan_layers=False`."
            )
        inserted = [self._global_attention(index) for index in range(self.depth)]
        # Flax has numbered the names of modules made within a call.
        first, *others = (None if layer is None else layer.clone(name=None) for layer in inserted)
        for index, other in enumerate(others, 2):
            if other != first:
                got, got_then = (" ".join(repr(layer).split()) for layer in (first, other))
                raise ValueError(
                    "`global_attn_layer` must insert equal modules in all layers when `scan_layers=True`, got "
                    f"{got} in layer 1 and {got_then} in layer {index}; make them equal, or set `scan_layers=False`."
                )

    def _check_positions(self, positions, b, n):
        """Check explicit positions, ``[b, n]``, which require absolute embeddings or rotary in some layer."""
        has_embedding = self.num_tokens is not None and self.use_abs_pos_emb
        has_rotary = any(map(self._is_turned, range(self.depth)))
        if positions is not None and not (has_embedding or has_rotary):
            raise ValueError(
                "`positions` must be None for a model without absolute embeddings or rotary, got some; leave them out."
            )
        return check_positions(positions, b, n)
