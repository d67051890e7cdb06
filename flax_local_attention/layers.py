"""Linen modules of attention: `LocalAttention` without parameters, and `LocalMHA` with projections around it."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from flax_local_attention.array_checks import check_array, check_floating
from flax_local_attention.attention import attend, check_layout, check_length
from flax_local_attention.cache import KVCache, bound_options, check_heads, check_is_cache, check_of_new
from flax_local_attention.checks import (
    check_flag,
    describe,
    is_integer,
    optional,
)
from flax_local_attention.decoding import cached_attention
from flax_local_attention.fields import CacheShape, MultiHead, Scores, linear_bias_init, resolve_window, window_of
from flax_local_attention.kernels import between_products
from flax_local_attention.linear import Linear
from flax_local_attention.norm import LayerNorm
from flax_local_attention.operands import Operands, silence, token_mask, wide_dtype
from flax_local_attention.options import AttentionOptions
from flax_local_attention.rotary import Rotary
from flax_local_attention.sharding import spread_like
from flax_local_attention.softmax import l2_normalize
from flax_local_attention.window import Window


class LocalAttention(Scores):
    """Local attention of given queries, keys and values: `local_attention` as a module, without parameters.

    Attributes:
        window_size: Tokens in a window; or a `Window`, with which the three fields that count windows must keep their
            defaults. None makes attention global: a query sees every token, or every token up to its own if causal, in
            time O(n^2 d).
        causal: Whether each query sees only keys up to its own.
        look_backward: Windows seen before a query's own.
        look_forward: Windows seen after a query's own. None means 0 if causal, else 1.
        dropout: Share of probabilities to drop, unless `deterministic`.
        shared_qk: Whether queries double as keys, see `local_attention`.
        dim: Head width; setting it turns on rotary position embedding.
        autopad: Accept any length; a `Window` does so without it.
        exact_windowsize: Count distances from the query, not from its window's borders.
        scale: Factor of the scores. None means ``d ** -0.5``.
        use_rotary_pos_emb: Whether to use rotary position embedding if `dim` is given.
        use_xpos: Whether rotary fades with distance (xPos), so that a call may give a larger window.
        xpos_scale_base: Distance over which xPos fades. None means half of `window_size`, or of `Window.span`.

    Examples:
        >>> attention = LocalAttention(window_size=128, causal=True, dim=64)
        >>> q = k = v = jnp.ones((2, 8, 512, 64))
        >>> attention.apply({}, q, k, v).shape
        (2, 8, 512, 64)

    Source: ``LocalAttention`` of ``local-attention`` 1.11.2; ``tests/test_original.py`` compares them.
    """

    window_size: int | Window | None
    causal: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    dropout: float = 0.0
    shared_qk: bool = False
    dim: int | None = None
    autopad: bool = False
    exact_windowsize: bool = False
    scale: float | None = None
    use_rotary_pos_emb: bool = True
    use_xpos: bool = False
    xpos_scale_base: float | None = None
    _: KW_ONLY  # Flax's own `parent` and `name`

    @nn.nowrap
    def check_fields(self):
        """Raise unless every field is valid, and the fields define a window and at most one rotary."""
        super().check_fields()
        window_of(self, self.window_size)
        if self.rotary is not None and self.rotary is not False:
            self._given_rotary()

    @nn.compact
    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None = None,
        attn_bias: jax.Array | None = None,
        window_size: int | Window | None = None,
        deterministic: bool | None = None,
        segment_ids: jax.Array | None = None,
        sinks: jax.Array | None = None,
        cache: KVCache | None = None,
        positions: jax.Array | None = None,
        global_keys: Sequence[Any] | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Attend as `local_attention` does, or with a cache as `cached_attention` does, with the same errors.

        Args:
            q: Queries, ``[..., n, d]``.
            k: Keys, shaped like q, or with fewer heads.
            v: Values, shaped like k, or of another width.
            mask: Keys that may be seen, ``[b, n]`` bool; with a cache, tokens that exist.
            attn_bias: Added to the scores, ``[h, w, s]``.
            window_size: Another window for this call; requires `use_xpos`.
            deterministic: Overrides the module's field.
            segment_ids: Documents that do not see each other, ``[b, n]``.
            sinks: Extra logits with no value behind them, ``[h]``.
            cache: The tokens before q, k and v.
            positions: Positions for rotary, ``[b, n]`` integers. None means indices or, with a cache, the number of
                tokens before each token. Windows do not use them.
            global_keys: Keys that every query sees besides its window, see `local_attention`.

        Returns:
            The output of each query, with q's shape (except for the width, which is v's) and dtype. With a cache, a
            pair of the output and the grown cache.
        """
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_array(name, x)
        optional(check_flag)("deterministic", deterministic)
        deterministic = self.deterministic if deterministic is None else deterministic
        arrays: dict[str, Any] = {
            "mask": mask,
            "segment_ids": segment_ids,
            "attn_bias": attn_bias,
            "sinks": sinks,
            "global_keys": global_keys,
            "dropout_rng": None if deterministic or not self.dropout else self.make_rng("dropout"),
        }
        if cache is not None:
            check_is_cache(cache)
            _check_options(cache, self.options(window_size), k, v, drops=arrays["dropout_rng"] is not None)
            return cached_attention(q, k, v, cache, **arrays, positions=positions, implementation=self.implementation)
        # The heads of `LocalMHA` are right, and a dummy input for initialisation may have one token.
        if not (isinstance(self.parent, LocalMHA) or self.is_initializing()):
            check_layout(q, k)
        options = _as_one_window(self.options(window_size), k.shape[-2])
        operands = Operands.create(q, k, v, options, **arrays)
        size = self.window_size if window_size is None else window_size
        check_length(operands, options, self.autopad or not is_integer(size))
        out, _ = attend(operands, options, positions=positions, implementation=self.implementation)
        return spread_like(out.reshape(*q.shape[:-1], v.shape[-1]), q, q.ndim - 1)

    @nn.nowrap
    def options(self, window_size: int | Window | None = None) -> AttentionOptions:
        """Make the options of a call with this `window_size`; they do not depend on whether dropout acts."""
        size, scale_base = resolve_window(self, self.window_size, window_size)
        window = window_of(self, size)
        rotary = self._rotary(scale_base)
        return self.make(
            AttentionOptions,
            window=window,
            rotary=None if rotary is None else rotary.for_window(window),
            scale=self.scale,
            shared_qk=self.shared_qk,
            dropout_rate=self.dropout,
        )

    @nn.nowrap
    def _rotary(self, scale_base):
        if self.rotary is False:
            return None
        if self.rotary is not None:
            return self._given_rotary()
        if self.dim is None or not self.use_rotary_pos_emb:
            return None
        return Rotary(self.dim, use_xpos=self.use_xpos, scale_base=scale_base, reference=self.reference_rotary)

    @nn.nowrap
    def _given_rotary(self) -> Rotary:
        """Return the field `rotary`; raise if it is not a `Rotary`, or another field describes rotary too."""
        if not isinstance(self.rotary, Rotary):
            raise TypeError(
                f"`rotary` must be a Rotary, False or None, got {describe(self.rotary)}; write for example "
                "`rotary=Rotary(64, theta=1e6)`; only LocalTransformer takes a sequence, one for each layer."
            )
        rules = {
            "use_xpos": self.use_xpos,
            "xpos_scale_base": self.xpos_scale_base is not None,
            "reference_rotary": self.reference_rotary,
            "use_rotary_pos_emb": not self.use_rotary_pos_emb,
        }
        if given := [f"`{name}`" for name, is_given in rules.items() if is_given]:
            raise ValueError(
                f"`rotary` takes the place of {' and '.join(given)}, got both; set the fields of `rotary` instead."
            )
        return self.rotary


def _as_one_window(options, length):
    """Make the window of a global module as long as the sequence, so that its bias is ``[h, n, n]``."""
    if not options.window.is_global:
        return options
    window = Window(max(length, 1), options.window.causal, look_backward=0, look_forward=0)
    return dataclasses.replace(options, window=window)


def _check_options(cache, options, k, v, drops):
    """Raise unless a cache was made for these keys and values and options; dropout rates are compared if `drops`."""
    if cache.is_bounded or options.window.is_global:
        options = bound_options(options, cache.window.capacity)
    if cache.window != options.window:
        raise ValueError(
            f"`cache` must be made for this call's window {options.window}, got one for {cache.window}; make one with "
            "this module's `init_cache`."
        )
    check_heads(cache, k, v)
    made = cache.options if drops else dataclasses.replace(cache.options, dropout_rate=options.dropout_rate)
    if made != options:
        raise ValueError(
            f"`cache` must be made for this module's options {options}, got one for {cache.options}; make one with "
            "this module's `init_cache`."
        )


class LocalMHA(MultiHead[KVCache]):
    """Multi-head local self-attention of a sequence of any length.

    Computes ``to_out(gate * local_attention(q, k, v))`` with ``q, k, v = to_qkv(norm(x))``. The norm, the gate and the
    normalisation of q and k are optional.

    Attributes:
        dim: Model width.
        window_size: Tokens in a window, or a `Window`. None makes it global, as in `LocalAttention`.
        dropout: Share of probabilities to drop, unless `deterministic`.
        causal: Whether each token sees only tokens up to itself.
        prenorm: Whether to normalise the input first.
        use_rotary_pos_emb: Whether to use rotary position embedding.

    Source: ``LocalMHA`` of ``local-attention`` 1.11.2, which ignores `dropout`
    (``tests/test_original.py::test_dropout_drops_probabilities``). Grouped queries: arXiv 2305.13245.
    """

    dim: int
    window_size: int | Window | None
    _: KW_ONLY
    dropout: float = 0.0
    causal: bool = False
    prenorm: bool = False
    use_rotary_pos_emb: bool = True

    @nn.nowrap
    def check_fields(self):
        """Raise unless every field is valid, and the fields define a `LocalAttention`."""
        super().check_fields()
        self._attention(None)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        attn_bias: jax.Array | None = None,
        cache: KVCache | None = None,
        window_size: int | Window | None = None,
        deterministic: bool | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Attend from each token to the tokens that it sees.

        Args:
            x: Tokens, ``[b, n, e]``.
            mask: Tokens that may be seen, ``[b, n]`` bool; with a cache, tokens that exist. What the others hold
                changes nothing, even NaN; see `local_attention`.
            attn_bias: Added to the scores, ``[h, w, s]``.
            cache: The tokens before `x`; `x` is then one token or a chunk of any size.
            window_size: Another window for this call; requires `use_xpos`.
            deterministic: Overrides the module's field.
            segment_ids: Documents that do not see each other, ``[b, n]``.
            positions: Positions for rotary, ``[b, n]`` integers, see `LocalAttention`.

        Returns:
            The output, ``[b, n, e]``. With a cache, a pair of the output and the grown cache.

        Raises:
            TypeError: As in `local_attention` and, with a cache, `cached_attention`.
            ValueError: As in `local_attention` and, with a cache, `cached_attention`.
        """
        self._check(x)
        x = jnp.asarray(x)
        if cache is not None:
            check_of_new(x.shape[1], mask, segment_ids, positions)
        exists = token_mask(mask, (x.shape[0], self.heads), x.shape[1])
        x = x if exists is None else silence(x, exists, self.dtype)
        if self.prenorm:
            x = self.make(LayerNorm, name="norm")(x)
        q, k, v, memory = self._queries_keys_values(x)
        out: Any = self._attention(window_size)(
            q,
            k,
            v,
            mask=mask,
            attn_bias=attn_bias,
            deterministic=deterministic,
            segment_ids=segment_ids,
            sinks=self._sinks(),
            cache=cache,
            positions=positions,
            global_keys=memory,
        )
        out, cache = out if cache is not None else (out, None)
        if self.gate_values_per_head:
            gates = self._linear(self.heads, "to_v_gate", use_bias=True)(x)
            out = _gate(out, rearrange(gates, "b n h -> b h n 1"))
        out = self._linear(self.dim, "to_out", self.use_out_bias)(rearrange(out, "b h n d -> b n (h d)"))
        return out if cache is None else (out, cache)

    @nn.nowrap
    def make_cache(self, shape: CacheShape, window_size: int | Window | None = None) -> KVCache:
        """Make an empty cache, see `init_cache`."""
        options = self._attention(window_size).options()
        dtype = self.dtype or self.param_dtype if shape.dtype is None else shape.dtype
        return KVCache.create(
            options,
            shape.batch,
            self._kv_heads,
            self.dim_head,
            dim_value=self._dim_value,
            dtype=dtype,
            rewind=shape.rewind,
            keep_first=shape.keep_first,
            max_length=shape.max_length,
        )

    @nn.nowrap
    def _attention(self, window_size):
        size, scale_base = resolve_window(self, self.window_size, window_size)
        return self.make(
            LocalAttention,
            window_of(self, size),
            causal=self.causal,
            look_backward=1,
            look_forward=None,
            exact_windowsize=False,
            dropout=self.dropout,
            dim=self.dim_head,
            autopad=True,
            scale=self.qk_scale if self.qk_rmsnorm and self.scale is None else self.scale,
            use_rotary_pos_emb=self.use_rotary_pos_emb,
            xpos_scale_base=scale_base,
            implementation=between_products(self.implementation),
        )

    @property
    def _kv_heads(self):
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _dim_value(self):
        return self.dim_head if self.dim_value is None else self.dim_value

    def _check(self, x):
        check_floating("x", x)
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"`x` must be [b, n, {self.dim}] (`dim`), got shape {x.shape}; project it.")

    @nn.nowrap
    def _linear(self, features, name, use_bias):
        fan_in = self.dim if name != "to_out" else self.heads * self._dim_value
        return self.make(
            Linear,
            fan_in,
            features,
            use_bias=use_bias,
            kernel_init=self.out_kernel_init if name == "to_out" else self.kernel_init,
            bias_init=linear_bias_init(fan_in),
            name=name,
        )

    def _queries_keys_values(self, x):
        heads = self.heads, self._kv_heads, self._kv_heads
        dims = self.dim_head, self.dim_head, self._dim_value
        widths = [count * d for count, d in zip(heads, dims, strict=True)]
        linear = self._linear(sum(widths), "to_qkv", self.use_bias)
        if linear.is_spread:
            # Queries are spread by heads of keys: only where the keys that they share are spread.
            parts = linear.in_parts(x, widths, (self._kv_heads,) * 3)
            q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=h) for part, h in zip(parts, heads, strict=True))
        else:
            q, k, v = _split_heads(linear(x), self.heads, self._kv_heads, self.dim_head, self._dim_value)
        memory = self._memory(q.dtype)
        if self.qk_rmsnorm:
            q_scale, k_scale = (
                self._param(name, nn.initializers.ones_init(), self.dim_head) for name in ("q_scale", "k_scale")
            )
            q, k = _normalize(q, q_scale), _normalize(k, k_scale)
            memory = memory and (_normalize(memory[0], k_scale), memory[1])
        return q, k, v, memory

    def _memory(self, dtype):
        """Return the learned keys and values that every query sees, ``[h, m, d]``; None if there are none."""
        if not self.memory_tokens:
            return None
        widths = {"memory_k": self.dim_head, "memory_v": self._dim_value}
        k, v = (
            self._param(name, nn.initializers.normal(1.0), self._kv_heads, self.memory_tokens, width)
            for name, width in widths.items()
        )
        return k.astype(dtype), v.astype(dtype)

    def _param(self, name, init, *shape):
        return self.param(name, init, shape, self.param_dtype)

    def _sinks(self):
        if not self.attention_sinks:
            return None
        return self._param("sinks", nn.initializers.zeros_init(), self.heads)


def _gate(x, gates):
    """Return ``x * sigmoid(gates)`` in x's dtype, computed in float32 or wider and rounded once."""
    dtype = wide_dtype(x.dtype, gates.dtype)
    return (x.astype(dtype) * nn.sigmoid(gates.astype(dtype))).astype(x.dtype)


def _normalize(x, gain):
    """L2-normalise over the last axis and scale, in float32 or wider, rounded once to x's dtype."""
    dtype = wide_dtype(x.dtype)
    gain = jnp.expand_dims(gain.astype(dtype), range(x.ndim - 1))
    return (l2_normalize(x.astype(dtype)) * gain).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _split_heads(qkv, heads, kv_heads, dim_head, dim_value):
    """Split ``[b, n, (h d)]`` into queries, keys and values, ``[b, h, n, d]``."""
    ends = [heads, heads + kv_heads]
    if dim_value == dim_head:  # first to heads, then cut: the other order costs 5 % of a step on an H100 (jax 0.11)
        return jnp.split(rearrange(qkv, "b n (h d) -> b h n d", d=dim_head), ends, axis=1)
    widths, parts = (dim_head, dim_head, dim_value), jnp.split(qkv, [dim_head * end for end in ends], axis=-1)
    return [rearrange(x, "b n (h d) -> b h n d", d=d) for x, d in zip(parts, widths, strict=True)]
