"""Linen modules around `local_attention`: attention, multi-head attention, feed-forward, position bias."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike

from flax_local_attention.attention import attend, check_layout, check_length, turn
from flax_local_attention.cache import KVCache, cached_attention, check_heads, check_is_cache
from flax_local_attention.checks import check_count, check_rate
from flax_local_attention.kernels import Implementation, between_products, row_kernels
from flax_local_attention.kernels.fused import Fused
from flax_local_attention.kernels.rows import NormKernels
from flax_local_attention.operands import Operands, check_floating, silence, token_mask, wide_dtype
from flax_local_attention.options import AttentionOptions
from flax_local_attention.rotary import Rotary
from flax_local_attention.softmax import l2_normalize
from flax_local_attention.window import Window

# A linear layer starts uniform in +-fan_in^(-1/2), weights and biases, as in PyTorch.
linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def linear_bias_init(fan_in: int) -> Initializer:
    """Initialiser of the bias of a linear layer with `fan_in` inputs: uniform in +-fan_in^(-1/2)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


class LayerNorm(nn.Module):
    """Layer normalisation as everywhere in this package: ``nn.LayerNorm`` with the variance of centred values.

    Attributes:
        dtype, param_dtype: As in `LocalMHA`.
        implementation: None takes kernels where they serve, see `HyperConnection`.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    implementation: str | Implementation | None = None

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
    return Fused("layer_norm", functools.partial(_normalize_layer, dtype))


def _normalize_layer(dtype, x, scale, bias):
    """``(x - mean) / sqrt(variance + 1e-5) * scale + bias`` over the last axis, in float32 or wider; then `dtype`."""
    wide = x.astype(wide_dtype(x.dtype))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return ((centred * (jax.lax.rsqrt(variance + 1e-5) * scale) + bias).astype(dtype),)


def gelu(x: jax.Array) -> jax.Array:
    """``x * P(Z <= x)`` for a standard normal Z, elementwise, computed in float32 or wider.

    By ``erf``, one operation of XLA. `jax.nn.gelu` is exact by ``erfc``, which becomes a hundred: on a CPU that costs a
    twentieth of a training step.
    """
    wide = x.astype(wide_dtype(x.dtype))
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _gate(values, gates):
    """GEGLU; a gradient keeps its arguments, not what it computes in float32 between, which a loop could not fuse."""
    return values * gelu(gates)


def aligned(width: int) -> int:
    """Width to compute a product in: the multiple of the largest power of two up to 128 that adds at most a sixteenth.

    An odd width, `int(512 * 4 * 2 / 3)` say, has XLA take products in slow forms: on an H100 for twice the time.
    """
    powers = (128, 64, 32, 16, 8, 4, 2, 1)
    return next(width + extra for extra in (-width % power for power in powers) if 16 * extra <= width)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _split_heads(qkv, dim_head, heads, kv_heads):
    """``[b, n, (h d)]`` to queries, keys and values, ``[b, h, n, d]``."""
    qkv = rearrange(qkv, "b n (h d) -> b h n d", d=dim_head)
    return jnp.split(qkv, [heads, heads + kv_heads], axis=1)


# Fewer tokens than these are bound by reading the weights, which aligning them would do once more.
FEW_TOKENS = 256


class Kernel(nn.Module):
    """The weights of a linear layer, where ``nn.Dense`` has them, for products of one's own.

    Attributes:
        shape: Of the weights.
        kernel_init: Their initialiser.
        param_dtype: Their dtype.
    """

    shape: tuple[int, ...]
    kernel_init: Initializer
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        """Return the weights."""
        return self.param("kernel", self.kernel_init, self.shape, self.param_dtype)


class LocalAttention(nn.Module):
    """Local attention of given queries, keys and values: `local_attention` as a module, without parameters.

    Attributes:
        window_size: Tokens in a window. None makes it global: every token is seen, and time is O(n^2 d).
        causal: Whether no query sees a key after itself.
        look_backward: Windows seen before a query's own.
        look_forward: Windows seen after it. None means 0 if causal, else 1.
        dropout: Share of probabilities to drop; needs an rng named ``dropout`` and ``deterministic=False``.
        shared_qk: Keys are queries, see `local_attention`.
        dim: Width of a head; rotary position embedding is used only if it is given.
        autopad: Allow any length.
        exact_windowsize: Count distances from the query, not from its window's borders.
        scale: Factor of the scores. None means ``d ** -0.5``.
        use_rotary_pos_emb: Whether to use rotary position embedding where `dim` is given.
        use_xpos: Whether rotary fades with distance, so that a call may give a larger window.
        xpos_scale_base: Distance of that fading. None means half of `window_size`.
        reference_rotary: Give queries the original's angles, see `Rotary.reference`.
        logits_soft_cap: Bound of the scaled scores.
        precision: Of the matrix products.
        deterministic: Whether to drop nothing; a call may say otherwise.
        implementation: How attention is computed, see `local_attention`.

    Example:
        >>> attention = LocalAttention(window_size=128, causal=True, dim=64)
        >>> q = k = v = jnp.ones((2, 8, 512, 64))
        >>> attention.apply({}, q, k, v).shape
        (2, 8, 512, 64)

    Source: ``LocalAttention`` of ``local-attention`` 1.11.2; ``tests/test_original.py`` compares them.
    """

    window_size: int | None
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
    reference_rotary: bool = False
    logits_soft_cap: float | None = None
    precision: PrecisionLike = None
    deterministic: bool = True
    implementation: str | Implementation | None = None

    @nn.compact
    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None = None,
        attn_bias: jax.Array | None = None,
        window_size: int | None = None,
        deterministic: bool | None = None,
        segment_ids: jax.Array | None = None,
        sinks: jax.Array | None = None,
        cache: KVCache | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Attend; shapes, result and errors as in `local_attention` and, with a cache, `cached_attention`.

        Args:
            q: Queries, ``[..., n, d]``.
            k: Keys, as q, or with fewer heads.
            v: Values, as k.
            mask: Keys that may be seen, ``[b, n]`` bool; with a cache, tokens that exist.
            attn_bias: Added to the scores, ``[h, w, s]``.
            window_size: Another window for this call, with `use_xpos` only.
            deterministic: Overrides the module's.
            segment_ids: Documents that do not see each other, ``[b, n]``.
            sinks: Extra logits with no value behind them, ``[h]``.
            cache: What came before q, k and v.
            positions: Where rotary takes tokens to be, ``[b, n]`` integers, in place of their index or, with a cache,
                of the number of tokens before them. Windows do not go by them.

        Returns:
            What each query gathered, of q's shape and dtype; with a cache, that and the grown cache.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        arrays: dict[str, Any] = {
            "mask": mask,
            "segment_ids": segment_ids,
            "attn_bias": attn_bias,
            "sinks": sinks,
            "dropout_rng": None if deterministic or not self.dropout else self.make_rng("dropout"),
        }
        if cache is not None:
            check_is_cache(cache)
            options = self.options(window_size, cache.window.capacity, is_cached=True)
            _check_options(cache, options, k, drops=arrays["dropout_rng"] is not None)
            return cached_attention(q, k, v, cache, **arrays, positions=positions)
        # `LocalMHA` makes its heads itself, and a dummy to initialise with may be of one token.
        if not (isinstance(self.parent, LocalMHA) or self.is_initializing()):
            check_layout(q, k)
        options = self.options(window_size, k.shape[-2])
        operands = Operands.create(q, k, v, options, **arrays)
        check_length(operands, options, self.autopad or self.window_size is None)
        if positions is not None:
            operands, options = turn(operands, options, positions)
        return attend(operands, options, implementation=self.implementation)[0].reshape(q.shape)

    @nn.nowrap
    def options(
        self, window_size: int | None = None, length: int | None = None, *, is_cached: bool = False
    ) -> AttentionOptions:
        """Make the options of a call that gives `window_size`, or of a global module on a sequence of `length`.

        They are the same whether or not dropout acts and, but for the window of a global module, with and without a
        cache: the cache remembers the last `length` tokens.
        """
        return AttentionOptions(
            window=self._window(window_size, length, is_cached),
            rotary=self._rotary(),
            scale=self.scale,
            shared_qk=self.shared_qk,
            logits_soft_cap=self.logits_soft_cap,
            dropout_rate=self.dropout,
            precision=self.precision,
        )

    @nn.nowrap
    def _window(self, window_size, length, is_cached):
        if window_size is not None and (self.window_size is None or not self.use_xpos):
            raise ValueError(
                f"A `window_size` at call time needs a local module with `use_xpos=True`, got {window_size} without; "
                "only xPos extrapolates to other windows: set it, or make a module of that window."
            )
        if self.window_size is None:
            if length is None:
                raise ValueError("The cache of a global module needs a `max_length`, got None; say how many tokens.")
            if is_cached and self.causal:
                return Window(1, causal=True, look_backward=length - 1, exact_windowsize=True)
            return Window(max(length, 1), self.causal, look_backward=0, look_forward=0)
        size = self.window_size if window_size is None else window_size
        return Window(size, self.causal, self.look_backward, self.look_forward, self.exact_windowsize)

    @nn.nowrap
    def _rotary(self):
        if self.dim is None or not self.use_rotary_pos_emb:
            return None
        rotary = Rotary(
            self.dim,
            use_xpos=self.use_xpos,
            scale_base=self.xpos_scale_base,
            reference=self.reference_rotary,
        )
        if self.window_size is None:
            if self.use_xpos:
                raise ValueError(
                    "`use_xpos` needs a window, got `window_size=None`; its scale would leave float32's range."
                )
            return rotary
        return rotary.for_window(self.window_size)  # also under another window at call time


def _check_options(cache, options, k, drops):
    """Raise unless a cache was made for keys such as k with a module's options; the rate counts only if it acts."""
    if cache.window != options.window:
        raise ValueError(
            f"`cache` must be made for this call's window {options.window}, got one for {cache.window}; make one with "
            "this module's `init_cache`."
        )
    check_heads(cache, k)
    made = cache.options if drops else dataclasses.replace(cache.options, dropout_rate=options.dropout_rate)
    if made != options:
        raise ValueError(
            f"`cache` must be made for this module's options {options}, got one for {cache.options}; make one with "
            "this module's `init_cache`."
        )


class LocalMHA(nn.Module):
    """Multi-head local attention of a sequence over itself; any length.

    ``to_out(gate * local_attention(q, k, v))`` with ``q, k, v = to_qkv(norm(x))``; the norm, the gate,
    and the normalisation of q and k are optional.

    Attributes:
        dim: Model width.
        window_size: Tokens in a window. None makes it global, as in `LocalAttention`.
        dim_head: Width of a head.
        heads: Heads of queries.
        kv_heads: Heads of keys and values, a divisor of `heads`. None means as many.
        dropout: Share of probabilities to drop.
        causal: Whether no token sees a later one.
        prenorm: Whether to normalise the input first.
        qk_rmsnorm: Whether q and k are L2-normalised, each with a learned gain.
        qk_scale: Factor of the scores under `qk_rmsnorm`.
        use_xpos, xpos_scale_base, exact_windowsize, look_backward, look_forward, shared_qk,
            use_rotary_pos_emb, reference_rotary, logits_soft_cap: As in `LocalAttention`; windows are exact by
            default.
        gate_values_per_head: Whether a sigmoid gate per head scales what was attended to.
        attention_sinks: Whether each head has a learned logit for attending to nothing.
        dtype: Of the computation. None means that of input and parameters.
        param_dtype: Of the parameters.
        precision: Of the matrix products.
        deterministic: Whether to drop nothing; a call may say otherwise.
        kernel_init: Initialiser of the weights that widen. Wrap it in ``nn.with_partitioning`` to shard them.
        out_kernel_init: Initialiser of the weights that lead back to the model's width.
        implementation: How attention is computed, see `local_attention`.

    Source: ``LocalMHA`` of ``local-attention`` 1.11.2, which drops no probabilities whatever `dropout` is
    (``tests/test_original.py::test_dropout_drops_probabilities``). Grouped queries: arXiv 2305.13245.
    """

    dim: int
    window_size: int | None
    dim_head: int = 64
    heads: int = 8
    kv_heads: int | None = None
    dropout: float = 0.0
    causal: bool = False
    prenorm: bool = False
    qk_rmsnorm: bool = False
    qk_scale: float = 8
    use_xpos: bool = False
    xpos_scale_base: float | None = None
    exact_windowsize: bool = True
    gate_values_per_head: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    shared_qk: bool = False
    use_rotary_pos_emb: bool = True
    reference_rotary: bool = False
    logits_soft_cap: float | None = None
    attention_sinks: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    deterministic: bool = True
    kernel_init: Initializer = linear_init
    out_kernel_init: Initializer = linear_init
    implementation: str | Implementation | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        attn_bias: jax.Array | None = None,
        cache: KVCache | None = None,
        window_size: int | None = None,
        deterministic: bool | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Attend.

        Args:
            x: Tokens, ``[b, n, e]``.
            mask: Tokens that may be seen, ``[b, n]`` bool; with a cache, those that exist. What the others hold
                changes nothing, NaN among it; see `local_attention`.
            attn_bias: Added to the scores, ``[h, w, s]``.
            cache: What came before `x`; then `x` may be one token or a chunk of any size.
            window_size: Another window for this call, with `use_xpos` only.
            deterministic: Overrides the module's.
            segment_ids: Documents that do not see each other, ``[b, n]``.
            positions: Where rotary takes tokens to be, ``[b, n]`` integers, see `LocalAttention`.

        Returns:
            ``[b, n, e]``; with a cache, that and the grown cache.

        Raises:
            TypeError, ValueError: As `local_attention` and, with a cache, `cached_attention`.
        """
        self._check(x)
        exists = token_mask(mask, (x.shape[0], self.heads), x.shape[1])
        x = x if exists is None else silence(x, exists, self.dtype)
        if self.prenorm:
            x = LayerNorm(self.dtype, self.param_dtype, self.implementation, name="norm")(x)
        q, k, v = self._queries_keys_values(x)
        attention = self._attention()
        out = attention(
            q, k, v, mask, attn_bias, window_size, deterministic, segment_ids, self._sinks(), cache, positions
        )
        out, cache = out if cache is not None else (out, None)
        if self.gate_values_per_head:
            gates = self._dense(self.heads, "to_v_gate", bias_init=linear_bias_init(self.dim))(x)
            out *= rearrange(nn.sigmoid(gates), "b n h -> b h n 1")
        out = self._dense(self.dim, "to_out")(rearrange(out, "b h n d -> b n (h d)"))
        return out if cache is None else (out, cache)

    @nn.nowrap
    def init_cache(
        self,
        batch: int,
        dtype: Dtype | None = None,
        max_length: int | None = None,
        window_size: int | None = None,
        rewind: int = 0,
    ) -> KVCache:
        """Make an empty cache; needs no parameters.

        Args:
            batch: Rows.
            dtype: Of keys and values, floating. None means the module's `dtype`, or `param_dtype`.
            max_length: Tokens that a global module remembers, the last ones; the others remember a window.
            window_size: The window of the calls, if they give one.
            rewind: Tokens that `KVCache.rewind` may go back.

        Raises:
            TypeError, ValueError: A size is no int or out of range, or `dtype` is not floating.
        """
        if max_length is not None:
            check_count("max_length", max_length, 1)
        options = self._attention().options(window_size, max_length, is_cached=True)
        dtype = self.dtype or self.param_dtype if dtype is None else dtype
        return KVCache.create(options, batch, self._kv_heads, self.dim_head, dtype=dtype, rewind=rewind)

    @nn.nowrap
    def _attention(self):
        return LocalAttention(
            window_size=self.window_size,
            causal=self.causal,
            look_backward=self.look_backward,
            look_forward=self.look_forward,
            dropout=self.dropout,
            shared_qk=self.shared_qk,
            dim=self.dim_head,
            autopad=True,
            exact_windowsize=self.exact_windowsize,
            scale=self.qk_scale if self.qk_rmsnorm else None,
            use_rotary_pos_emb=self.use_rotary_pos_emb,
            use_xpos=self.use_xpos,
            xpos_scale_base=self.xpos_scale_base,
            reference_rotary=self.reference_rotary,
            logits_soft_cap=self.logits_soft_cap,
            precision=self.precision,
            deterministic=self.deterministic,
            implementation=between_products(self.implementation),
        )

    @property
    def _kv_heads(self):
        return self.heads if self.kv_heads is None else self.kv_heads

    def _check(self, x):
        if self._kv_heads < 1 or self.heads % self._kv_heads:
            raise ValueError(f"`kv_heads` must divide `heads` ({self.heads}), got {self._kv_heads}; choose a divisor.")
        check_floating("x", x)
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"`x` must be [b, n, {self.dim}] (`dim`), got shape {x.shape}.")

    def _dense(self, features, name, bias_init=None):
        return nn.Dense(
            features,
            use_bias=bias_init is not None,
            kernel_init=self.out_kernel_init if name == "to_out" else self.kernel_init,
            bias_init=bias_init or nn.initializers.zeros_init(),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name=name,
        )

    def _queries_keys_values(self, x):
        kv_heads = self._kv_heads
        qkv = self._dense((self.heads + 2 * kv_heads) * self.dim_head, "to_qkv")(x)
        q, k, v = _split_heads(qkv, self.dim_head, self.heads, kv_heads)
        if self.qk_rmsnorm:
            q_scale = self.param("q_scale", nn.initializers.ones_init(), (self.dim_head,), self.param_dtype)
            k_scale = self.param("k_scale", nn.initializers.ones_init(), (self.dim_head,), self.param_dtype)
            q, k = (_normalize(x, gain) for x, gain in ((q, q_scale), (k, k_scale)))
        return q, k, v

    def _sinks(self):
        if not self.attention_sinks:
            return None
        return self.param("sinks", nn.initializers.zeros_init(), (self.heads,), self.param_dtype)


def _normalize(x, gain):
    """L2-normalise over the last axis and scale, in float32 or wider, rounded once to x's dtype."""
    dtype = wide_dtype(x.dtype)
    return (l2_normalize(x.astype(dtype)) * gain.astype(dtype)).astype(x.dtype)


class FeedForward(nn.Module):
    """Normalise, widen, gate by GELU, drop, narrow: ``to_out(a * gelu(b))`` with ``a, b = to_hidden(norm(x))``.

    Attributes:
        dim: Model width.
        mult: The hidden width is ``int(dim * mult * 2 / 3)``.
        dropout: Share of hidden values to drop; needs an rng named ``dropout`` and ``deterministic=False``.
        dtype, param_dtype, precision, deterministic, kernel_init, out_kernel_init: As in `LocalMHA`.
        implementation: None takes kernels where they serve, as in `LayerNorm`.

    Source: GLU Variants Improve Transformer, arXiv 2002.05202 (GEGLU); GELU by the error function.
    """

    dim: int
    mult: float = 4
    dropout: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    deterministic: bool = True
    kernel_init: Initializer = linear_init
    out_kernel_init: Initializer = linear_init
    implementation: str | Implementation | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Transform each token by itself, ``[..., e]`` to ``[..., e]``."""
        check_floating("x", x)
        check_rate("dropout", self.dropout)
        deterministic = self.deterministic if deterministic is None else deterministic
        width = int(self.dim * self.mult * 2 / 3)
        x = LayerNorm(self.dtype, self.param_dtype, self.implementation, name="norm")(x)
        kernel = Kernel((self.dim, 2 * width), self.kernel_init, self.param_dtype, name="to_hidden")()
        out_kernel = Kernel((width, self.dim), self.out_kernel_init, self.param_dtype, name="to_out")()
        x, kernel, out_kernel = promote_dtype(x, kernel, out_kernel, dtype=self.dtype)
        product = functools.partial(jnp.matmul, precision=self.precision)
        if x.size < FEW_TOKENS * self.dim:
            values, gates = jnp.split(product(x, kernel), 2, axis=-1)
        else:
            # Two products: the gradient of one would first join those of its halves, in a pass over all hidden values.
            extra = aligned(width) - width
            halves = (jnp.pad(half, ((0, 0), (0, extra))) for half in jnp.split(kernel, 2, axis=1))
            values, gates = (product(x, half) for half in halves)
            out_kernel = jnp.pad(out_kernel, ((0, extra), (0, 0)))
        hidden = nn.Dropout(self.dropout)(_gate(values, gates), deterministic=deterministic)
        return product(hidden, out_kernel)


class DynamicPositionBias(nn.Module):
    """A bias for every distance, computed by a small network from the distance itself.

    Attributes:
        dim: Hidden width.
        heads: Heads, the number of biases of a distance.
        signed: Whether the network sees on which side a key is, not only how far. Matters only to
            windows that look forward.
        dtype, param_dtype, precision: As in `LocalMHA`.

    Source: ``DynamicPositionBias`` of ``local-attention`` 1.11.2, there for slabs of two windows only
    (``tests/test_original.py::test_dynamic_bias_works_for_every_window``).
    """

    dim: int
    heads: int
    signed: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, i: int, j: int, offset: int | None = None) -> jax.Array:
        """Biases of `i` queries and `j` keys.

        Args:
            i: Number of queries.
            j: Number of keys.
            offset: Position of the first query among the keys. None means ``j - i``, as for a causal
                slab; for any `Window`: ``bias(w, window.slab, window.backward)``.

        Returns:
            ``[heads, i, j]``: the network's output for ``|row + offset - column|`` (signed: for the
            column less the row and offset).

        Raises:
            ValueError: There are fewer keys than queries and no offset.
        """
        if offset is None and j < i:
            raise ValueError(f"`j` must be at least `i` without an `offset`, got {j} keys for {i} queries; give one.")
        offset = j - i if offset is None else offset
        # Every distance once: row i - 1 less column 0 at the one end, row 0 less column j - 1 at the other.
        first = -(i - 1) - offset
        distances = jnp.arange(first, j - offset, dtype=jnp.float32)
        biases = self._network((distances if self.signed else jnp.abs(distances))[:, None])
        index = jnp.arange(j) - jnp.arange(i)[:, None] + (i - 1)
        return rearrange(biases[index], "i j h -> h i j")

    def _network(self, x):
        for index, (fan_in, features) in enumerate(((1, self.dim), (self.dim, self.dim), (self.dim, self.heads))):
            x = nn.Dense(
                features,
                kernel_init=linear_init,
                bias_init=linear_bias_init(fan_in),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                precision=self.precision,
                name=f"dense_{index}",
            )(nn.silu(x) if index else x)
        return x
