"""The arrays of a call, checked and brought to common axes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import PartitionSpec

from flax_local_attention.array_checks import (
    check_floating,
    check_integers,
    check_key,
    check_mask,
    check_real,
    is_array,
)
from flax_local_attention.checks import (
    check_finite,
    check_kind,
    describe,
    is_integer,
    is_number,
)
from flax_local_attention.options import AttentionOptions
from flax_local_attention.sharding import read_known, respread, shards_of, spec_of
from flax_local_attention.window import Window

# The largest position: positions are int32.
LAST_POSITION = 2**31 - 1


# The axis of tokens in each operand that has one.
OF_TOKENS = {"q": -2, "k": -2, "v": -2, "mask": -1, "q_mask": -1, "q_segments": -1, "k_segments": -1}


class GlobalKeys(NamedTuple):
    """Keys that every query sees besides those of its window.

    They have no position, bias or document. For their scores, neither they nor the queries are rotated.

    Attributes:
        k: Keys, ``[m, d]``, with the leading axes of other keys.
        v: Values, ``[m, d]``.
        mask: Which of the keys may be seen, ``[m]`` bool; None means all.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array | None = None


class Border(NamedTuple):
    """Keys of a neighbouring shard, right before or right after a shard's own keys, in separate arrays; see `Halo`.

    Attributes:
        k: Keys, ``[m, d]``, with the leading axes of other keys.
        v: Values, ``[m, d]``.
        mask: Which of the keys may be seen, ``[m]`` bool; False if the neighbour does not exist.
        k_segments: Documents of the keys, ``[m]`` integers.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    k_segments: jax.Array | None = None


class Operands(NamedTuple):
    """The arrays of a call of attention, made by `Operands.create`; None for arrays that are not given.

    All but `q_offset` have three leading axes ``[b, h, g]``: rows, heads of keys, and the query heads that share one
    head of keys. An axis has size 1 if its values are shared. `over_heads` maps a function over these axes; the
    function sees one head, with the shapes below.

    Attributes:
        q: Queries, ``[n, d]``.
        k: Keys, ``[n, d]``; their length may differ from q's.
        v: Values, shaped like k, except that their width may differ.
        mask: Which keys may be seen, ``[n]`` bool.
        q_mask: Which queries belong to tokens that may be seen, ``[n]`` bool. The others get outputs too.
        q_segments: Documents of queries, ``[n]`` integers.
        k_segments: Documents of keys, ``[n]`` integers.
        bias: Added to the scores, ``[w, s]``, see `Window.bias_row` and `Window.bias_column`.
        scale: Factor of the scores, ``[]``, in place of the options'.
        sink: Extra logit with no value behind it, ``[]``.
        dropout_seed: Seed of dropout, ``[]`` uint32, see `softmax.keeps`.
        q_offset: Position of the first query among the keys, ``[]``, for all heads; a Python int if it is known.
            None in slices of operands, for which the caller keeps track of positions.
        global_keys: Keys that every query sees. `attend` handles them; implementations never receive any.
        before: Keys right before a shard's own. Kernels, and the default implementation, take them separately; for
            other implementations `Halo` joins them with `k`. `q_offset` is then 0.
        after: Keys right after a shard's own, likewise.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: jax.Array | None = None
    q_mask: jax.Array | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    bias: jax.Array | None = None
    scale: jax.Array | None = None
    sink: jax.Array | None = None
    dropout_seed: jax.Array | None = None
    q_offset: int | jax.Array = 0
    global_keys: GlobalKeys | None = None
    before: Border | None = None
    after: Border | None = None

    @classmethod
    def create(
        cls,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        options: AttentionOptions,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        attn_bias: jax.Array | None = None,
        scale: float | jax.Array | None = None,
        sinks: jax.Array | None = None,
        q_offset: int | jax.Array = 0,
        dropout_rng: jax.Array | None = None,
        global_keys: Sequence[Any] | None = None,
    ) -> "Operands":
        """Check the arrays of a call against each other and its options, and give them common axes.

        Args:
            q: Queries. This and all other arrays are as in `local_attention`.
            k: Keys.
            v: Values.
            options: Options of the call.
            mask: Which keys may be seen.
            segment_ids: Documents of the tokens.
            attn_bias: Added to the scores.
            scale: Factor of the scores, in place of the options'.
            sinks: Extra logits with no value behind them.
            q_offset: Position of the first query among the keys.
            dropout_rng: Random key for dropout; has no effect if the options' `dropout_rate` is 0.
            global_keys: Further keys that every query sees.

        Raises:
            TypeError: An array has the wrong type or dtype.
            ValueError: Shapes do not fit together, rotary does not fit q, or positions exceed int32.

        Examples:
            >>> options = AttentionOptions(Window.sliding(4))
            >>> q, k = jnp.ones((2, 8, 16, 64)), jnp.ones((2, 4, 16, 64))
            >>> operands = Operands.create(q, k, k, options)
            >>> operands.q.shape, operands.k.shape
            ((2, 4, 2, 16, 64), (2, 4, 1, 16, 64))
        """
        check_kind("options", options, AttentionOptions, "write for example `AttentionOptions(Window(512))`")
        q, k, v = _check_qkv(q, k, v)
        q_offset = check_offset(q_offset, q.shape[-2], segment_ids)
        lead, kv_heads = q.shape[:-2] or (1,), k.shape[-3] if k.ndim > 2 else 1
        sizes = math.prod(lead[:-1]), kv_heads, _group(lead, kv_heads)
        q = _with_whole_groups(q, kv_heads)
        n, n_keys = q.shape[-2], k.shape[-2]
        window = fit_window(options, n, n_keys, q_offset, attn_bias is not None)
        if dropout_rng is not None:
            check_key("dropout_rng", dropout_rng)
        seed = None if dropout_rng is None else jax.random.bits(dropout_rng, sizes, jnp.uint32)
        segments = _from_left("segment_ids", _check_segments(segment_ids, n, n_keys), n_keys, lead, kv_heads)
        mask = _mask_from_left("mask", mask, n_keys, lead, kv_heads)
        operands = cls(
            q=q.reshape(*sizes, *q.shape[-2:]),
            k=k.reshape(*sizes[:2], 1, *k.shape[-2:]),
            v=v.reshape(*sizes[:2], 1, *v.shape[-2:]),
            mask=mask,
            q_mask=_mask_of_queries(mask, q_offset, n),
            q_segments=segments,
            k_segments=segments,
            bias=_from_right("attn_bias", attn_bias, (window.size, window.slab), lead, kv_heads),
            scale=_check_scale(scale),
            sink=_from_right("sinks", sinks, (), lead, kv_heads),
            dropout_seed=seed,
            q_offset=q_offset,
            global_keys=check_global_keys(global_keys, k, v, lead, kv_heads),
        )
        operands.check(options)
        return operands

    def check(self, options: AttentionOptions):
        """Raise unless rotary fits the queries, and the bias fits the window of these options."""
        window = fit_window(options, self.q.shape[-2], self.k.shape[-2], self.q_offset, self.bias is not None)
        _check_rotary(dataclasses.replace(options, window=window), self.q)
        if self.bias is not None and self.bias.shape[-2:] != (window.size, window.slab):
            raise ValueError(
                f"`attn_bias` must be [{window.size}, {window.slab}] for {window}, got "
                f"{list(self.bias.shape[-2:])}; make the operands with the same options."
            )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of positions, scores and softmax: float64 if q, k or v is, else float32."""
        return wide_dtype(self.q.dtype, self.k.dtype, self.v.dtype)

    def widen_scores(self) -> "Operands":
        """Cast bias, scale and sink to the dtype of scores.

        Their gradients, which are sums over rows and blocks, are then rounded only once.
        """
        wide = {name: getattr(self, name) for name in ("bias", "scale", "sink")}
        return self._replace(**{name: x.astype(self.dtype) for name, x in wide.items() if x is not None})

    def fold_groups(self) -> "Operands":
        """Merge the axes h and g of q, k and v into one axis of heads, ``[b, h g, n, d]``; `split_groups` undoes it.

        This is for loops that slice them: with one more axis, XLA:CPU (jaxlib 0.10) copies the whole argument.
        """
        q, k, v = (x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]) for x in self[:3])
        return self._replace(q=q, k=k, v=v)

    def split_groups(self, sizes: tuple[int, int, int]) -> "Operands":
        """Split the heads of q, k and v into axes ``[b, h, g]`` of these sizes."""
        q, k, v = self[:3]
        k, v = (x.reshape(*sizes[:2], 1, *x.shape[-2:]) for x in (k, v))
        return self._replace(q=q.reshape(*sizes, *q.shape[-2:]), k=k, v=v)

    def of_queries(self, first: int | jax.Array, size: int) -> "Operands":
        """Keep `size` queries from `first` on; the caller keeps track of their positions."""
        return self._replace(
            q=_cut(self.q, first, size, -2),
            q_mask=_cut(self.q_mask, first, size, -1),
            q_segments=_cut(self.q_segments, first, size, -1),
            q_offset=None,
        )

    def of_keys(self, first: int | jax.Array, size: int) -> "Operands":
        """Keep `size` keys from `first` on; the caller keeps track of all positions."""
        return self._replace(
            k=_cut(self.k, first, size, -2),
            v=_cut(self.v, first, size, -2),
            mask=_cut(self.mask, first, size, -1),
            k_segments=_cut(self.k_segments, first, size, -1),
            q_offset=None,
        )


def fit_window(options: AttentionOptions, n: int, n_keys: int, q_offset: int | jax.Array, has_bias: bool) -> Window:
    """Return a window that sees the same keys as the options' window and does not reach beyond the sequence.

    Queries may be placed after the last key, and their window must then reach farther back than the number of keys. A
    window with a limit is returned unchanged if a bias or `Rotary.reference` depends on it too.

    Args:
        options: Options of the call.
        n: Queries.
        n_keys: Keys.
        q_offset: Position of the first query among the keys.
        has_bias: Whether the scores have a bias.

    Raises:
        ValueError: The window has no limit, and the offset is traced or a length is symbolic.
    """
    window, offset = options.window, read_known(q_offset)
    if not (isinstance(n, int) and isinstance(n_keys, int)):
        return _refuse_global(window, n, n_keys)
    queries = max(LAST_POSITION if offset is None else int(offset) + n, 1)
    if has_bias or (options.rotary is not None and options.rotary.reference):
        fitted = window.within(max(queries, n_keys))
    else:
        fitted = window.fitted(queries, max(n_keys, 1))
    if window.is_global and offset is None:
        raise ValueError(
            f"`q_offset` must be known when the window has no limit, got a traced one for {window}; use "
            "`window.within(n)` with n the largest number of positions of queries and keys."
        )
    return fitted


def _refuse_global(window, n, n_keys):
    """Return the window for a sequence of symbolic length; raise if it has no limit."""
    if window.is_global:
        raise ValueError(
            f"`q` and `k` must have a known number of tokens when the window has no limit, got {n} and {n_keys}; fix "
            "that dimension of their shapes, or use `window.within(n)` with n the largest number of tokens."
        )
    return window


def _mask_of_queries(mask, q_offset, n):
    """Take the entries of a mask of keys at the positions of n queries, ``[b, h, g, n]``; True beyond the last key.

    The mask is ``[b, h, g, n_keys]``. Query i is at position ``q_offset + i`` among the keys.
    """
    if mask is None or (n == mask.shape[-1] and isinstance(q_offset, int) and q_offset == 0):
        return mask
    if not mask.shape[-1]:
        return jnp.ones((*mask.shape[:-1], n), bool)
    at, last = q_offset + jnp.arange(n, dtype=jnp.int32), mask.shape[-1] - 1
    beyond = jnp.expand_dims(at > last, range(mask.ndim - 1))
    return jnp.take(mask, jnp.minimum(at, last), axis=-1) | beyond


def silence(x: jax.Array, mask: jax.Array, dtype: Dtype | None = None) -> jax.Array:
    """Zero masked tokens that are not finite, or so large that results computed from them may not be finite.

    They would affect other tokens through the gradient, because 0 times NaN is NaN. All other tokens stay as they are.

    Args:
        x: Tokens, ``[..., n, d]``.
        mask: ``[..., n]`` bool, with leading axes that broadcast against x's; False where a token is masked.
        dtype: Dtype that x will be cast to. None means its own.

    Returns:
        x with zeros in place of such tokens.
    """
    wide = wide_dtype(x.dtype)
    most = min(largest_harmless(x.dtype), largest_harmless(x.dtype if dtype is None else dtype))
    # Not by a maximum: on a CPU XLA's maximum of many numbers ignores NaN.
    is_harmless = (jnp.abs(x.astype(wide)) <= most).all(-1)
    return jnp.where((mask | is_harmless)[..., None], x, 0)


def largest_harmless(dtype: Dtype) -> float:
    """Return the largest size of numbers whose sums and rotations fit a dtype, and sums of squares its `wide_dtype`."""
    return min(float(jnp.finfo(dtype).max) / 16, float(jnp.finfo(wide_dtype(jnp.dtype(dtype))).max) ** 0.25)


def token_mask(mask: jax.Array | None, lead: tuple[int, ...], n: int) -> jax.Array | None:
    """Check a mask against q's leading axes ``(b, ..., h)``; return which tokens any head may see, ``[b, n]`` bool."""
    if mask is None:
        return None
    by_heads = jnp.asarray(_mask_from_left("mask", mask, n, lead, lead[-1]))
    return jnp.broadcast_to(by_heads.any((1, 2)), (math.prod(lead[:-1]), n))


def token_segments(segment_ids: jax.Array | None, b: int, n: int) -> jax.Array | None:
    """Check the documents of tokens, and broadcast them to ``[b, n]``."""
    if segment_ids is None:
        return None
    _check_segments(segment_ids, n, n)
    if segment_ids.ndim not in (1, 2) or segment_ids.shape[-1] != n or segment_ids.shape[:-1] not in ((), (1,), (b,)):
        raise ValueError(
            f"`segment_ids` must be [{b}, {n}], one for each token, got {segment_ids.shape}; reshape them."
        )
    return jnp.broadcast_to(segment_ids, (b, n))


def check_positions(positions: jax.Array | None, b: int, n: int) -> jax.Array | None:
    """Check the positions of tokens, ``[b, n]`` or ``[1, n]`` integers, and return them as ``[b, n]`` int32."""
    if positions is None:
        return None
    check_integers("positions", positions, "they count tokens")
    if positions.ndim != 2 or positions.shape[0] not in (1, b) or positions.shape[1] != n:
        raise ValueError(
            f"`positions` must be [{b}, {n}], one for each token, or [1, {n}], got {positions.shape}; reshape them."
        )
    if positions.size and (numbers := read_known(positions)) is not None:
        check_last_position("positions", int(np.abs(numbers.astype(np.float64)).max()))
    return jnp.broadcast_to(jnp.asarray(positions).astype(jnp.int32), (b, n))


def check_turns(options: AttentionOptions):
    """Raise unless rotary can use explicit positions."""
    if options.rotary is None:
        raise ValueError("`positions` are for rotary, got options without it; leave them out.")
    if options.rotary.use_xpos:
        raise ValueError(
            "`positions` must not be given with xPos, whose scale overflows far from 0, got both; leave them out, "
            "or set `use_xpos=False`."
        )


def check_last_position(name: str, position: int, remedy: str = "count from a place nearby"):
    """Raise if a position exceeds int32."""
    if isinstance(position, int) and position > LAST_POSITION:
        raise ValueError(f"`{name}` must be at most {LAST_POSITION}, the last position, got {position}; {remedy}.")


def wide_dtype(*dtypes: jnp.dtype) -> jnp.dtype:
    """Return the dtype to compute in: float64 if any of these is float64, else float32."""
    return jnp.dtype(jnp.float64 if any(dtype == jnp.float64 for dtype in dtypes) else jnp.float32)


def _cut(x, first, size, axis):
    """Slice an operand that may be None."""
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def over_heads(fn: Callable[[Any], Any], operands: Any, depth: int = 3) -> Any:
    """Map `fn` by vmap over the leading axes ``[b, h, g]`` of a tree of operands; axes of size 1 are shared."""
    if depth == 0:
        return fn(operands)
    size = next((x.shape[0] for x in jax.tree.leaves(operands) if x.shape[0] != 1), 1)
    shared = jax.tree.map(lambda x: x.squeeze(0) if x.shape[0] == 1 else x, operands)
    if size == 1:  # no vmap over a single head: each level of vmap traces `fn` again
        return jax.tree.map(lambda x: x[None], over_heads(fn, shared, depth - 1))
    axes = jax.tree.map(lambda x: 0 if x.shape[0] == size else None, operands)
    return jax.vmap(lambda mapped: over_heads(fn, mapped, depth - 1), in_axes=(axes,))(shared)


def _check_qkv(q, k, v):
    """Check that q, k and v are floating arrays whose shapes fit together, and return them as JAX arrays."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
        if x.ndim < 2:
            raise ValueError(f"`{name}` must be [..., n, d], got shape {x.shape}; add the missing axes.")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"`k` and `v` must have the same shape but for their last axis, got {k.shape} and {v.shape}; give each "
            "key its value."
        )
    if v.shape[-1] == 0:
        raise ValueError(f"`v` must have a width of at least 1, got shape {v.shape}; give values to average.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"`q` and `k` must have the same width d, got q {q.shape} and k {k.shape}; project both to one width."
        )
    q_lead, k_lead = q.shape[:-2], k.shape[:-2]
    if q_lead != k_lead and not _are_groups(q_lead, k_lead):
        raise ValueError(
            "`k` and `v` must have q's leading axes, except that their heads, the last of these axes, may be a divisor "
            f"of q's, got q {q.shape} and k {k.shape}; reshape or repeat them."
        )
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def _with_whole_groups(q, kv_heads):
    """Gather the heads of queries on each device if their explicit mesh axes do not divide the heads of keys."""
    if q.ndim < 3 or not isinstance(kv_heads, int) or kv_heads % shards_of(q)[-3] == 0:
        return q
    spec = list(spec_of(q))
    spec[-3] = None
    return respread(q, PartitionSpec(*spec))


def _are_groups(q_lead, k_lead):
    """Return whether queries have a multiple of the keys' heads, and the same other leading axes."""
    is_alike = len(q_lead) == len(k_lead) > 0 and q_lead[:-1] == k_lead[:-1]
    return is_alike and 0 < k_lead[-1] <= q_lead[-1] and q_lead[-1] % k_lead[-1] == 0


def check_global_keys(
    given: Sequence[Any] | None, k: jax.Array, v: jax.Array, lead: tuple[int, ...], kv_heads: int
) -> GlobalKeys | None:
    """Check global keys, see `local_attention`, and broadcast them to the axes of operands.

    Args:
        given: Keys, values and possibly a mask, or None.
        k: Keys of the sequence, or their shape.
        v: Values of the sequence, or their shape.
        lead: Leading axes of the queries, ``(*batch, h g)``.
        kv_heads: Heads of keys, h.

    Returns:
        The global keys; None if there are none.

    Raises:
        TypeError: `given` is not such a sequence, or a dtype is wrong.
        ValueError: Shapes do not fit k and v.
    """
    if given is None:
        return None
    if not isinstance(given, Sequence) or len(given) not in (2, 3):
        raise TypeError(
            f"`global_keys` must be (keys, values) or (keys, values, mask), got {describe(given)}; pair them."
        )
    keys, values, mask = GlobalKeys(*given)
    for name, x, like in (("keys", keys, k), ("values", values, v)):
        check_floating(f"global_keys {name}", x)
        d, axes = like.shape[-1], like.shape[:-2]
        if x.ndim < 2 or x.shape[-1] != d or not _broadcasts(x.shape[-3::-1], axes[::-1]):
            raise ValueError(
                f"`global_keys` must have {name} [h, m, {d}] with, before the last 2 axes, the last of k's leading "
                f"axes {axes} (or 1), got {x.shape}; reshape them to line up from the right."
            )
    m = keys.shape[-2]
    if values.shape[-2] != m:
        raise ValueError(
            f"`global_keys` must have one value per key, got {m} keys and {values.shape[-2]} values; pair them."
        )
    if m == 0:
        return None
    sizes = math.prod(lead[:-1]), kv_heads, 1
    keys, values = (
        jnp.broadcast_to(x, (*like.shape[:-2], *x.shape[-2:])).reshape(*sizes, *x.shape[-2:])
        for x, like in ((keys, k), (values, v))
    )
    return GlobalKeys(keys, values, _mask_from_left("global_keys mask", mask, m, lead, kv_heads))


def check_offset(q_offset: Any, n: int = 0, segment_ids: jax.Array | None = None) -> Any:
    """Check an offset: one integer, at least 0, with the last query within int32, and 0 if documents are given.

    Args:
        q_offset: The offset. The value of a traced one is not checked.
        n: Queries.
        segment_ids: Documents, or None.

    Returns:
        An int for an int, so that blocks can be planned for it; an int32 array for an array, NumPy's if it is known.
    """
    is_known = is_integer(q_offset)
    is_whole = is_known or (is_array(q_offset) and jnp.issubdtype(q_offset.dtype, jnp.integer))
    if not is_whole:
        raise TypeError(f"`q_offset` must be an integer, got {describe(q_offset)}; it counts tokens.")
    if jnp.ndim(q_offset):
        raise ValueError(f"`q_offset` must be one number for all rows, got shape {jnp.shape(q_offset)}; map over rows.")
    if (offset := read_known(q_offset)) is not None:
        if offset < 0:
            raise ValueError(
                f"`q_offset` must be at least 0, got {q_offset}; it is the first query's position among the keys."
            )
        check_last_position("q_offset", int(offset) + n)
    if segment_ids is not None and not (is_known and q_offset == 0):
        raise ValueError(f"`segment_ids` requires `q_offset` 0, got {q_offset}; use `mask` instead.")
    if is_known:
        return int(q_offset)
    return jnp.asarray(q_offset, jnp.int32) if offset is None else offset.astype(np.int32)


def _check_rotary(options, q):
    """Raise if rotary is wider than q, or the scale of xPos leaves the range of q's dtype within a slab."""
    rotary = options.rotary
    if rotary is None:
        return
    if rotary.dim > q.shape[-1]:
        raise ValueError(
            f"`rotary.dim` must be at most the width of a head, got {rotary.dim} for heads of width {q.shape[-1]}; "
            f"use Rotary({q.shape[-1]})."
        )
    if rotary.use_xpos:  # the keys of a block span at most a slab
        window = options.window
        check_fading(options, window.backward + window.span + window.forward, q.dtype)


def check_fading(options: AttentionOptions, reach: int, dtype: Dtype):
    """Raise if the scale of xPos leaves the range of a dtype within `reach` tokens."""
    rotary = options.rotary
    if rotary is None or not rotary.use_xpos:
        return
    assert rotary.scale_base is not None  # filled in by the options
    most = 64 if float(jnp.finfo(dtype).max) > 1e9 else 12
    if reach > most * rotary.scale_base:
        raise ValueError(
            f"`scale_base` of xPos must be at least slab / {most} in {jnp.dtype(dtype)}, got {rotary.scale_base} for "
            f"a slab of {reach} tokens: its scale would overflow; give a larger one, or a smaller window."
        )


def _check_segments(segment_ids, n, n_keys):
    """Check that documents are integers in the range of JAX's dtype, and that there are as many queries as keys.

    JAX silently truncates NumPy's int64 to int32, so two documents could become one.
    """
    if segment_ids is None:
        return None
    check_integers("segment_ids", segment_ids, "number the documents")
    dtype = jax.dtypes.canonicalize_dtype(segment_ids.dtype)
    if isinstance(segment_ids, np.ndarray) and segment_ids.size and dtype != segment_ids.dtype:
        limits = jnp.iinfo(dtype)
        if segment_ids.min() < limits.min or segment_ids.max() > limits.max:
            raise ValueError(
                f"`segment_ids` must be from {limits.min} to {limits.max}, got {segment_ids.min()} to "
                f"{segment_ids.max()}; number the documents of a row from 0."
            )
    if n != n_keys:
        raise ValueError(f"`segment_ids` requires as many queries as keys, got {n} and {n_keys}; use `mask` instead.")
    return segment_ids


def _check_scale(scale):
    """Check a scale, one number for all heads, and give it the axes of operands."""
    if scale is None:
        return None
    if not is_number(scale):
        if not is_array(scale):
            raise TypeError(f"`scale` must be a number or a scalar array, got {describe(scale)}; None is d ** -0.5.")
        check_real("scale", scale, "cast it, for example to float32")
    else:
        check_finite("scale", scale)
    if jnp.ndim(scale):
        raise ValueError(f"`scale` must be one number, got shape {jnp.shape(scale)}; multiply q by it instead.")
    return jnp.asarray(scale).reshape(1, 1, 1)


def _mask_from_left(name, mask, length, lead, kv_heads):
    """Check a mask and give it the axes of operands, see `_from_left`."""
    if mask is not None:
        check_mask(name, mask)
    return _from_left(name, mask, length, lead, kv_heads)


def _from_left(name, x, length, lead, kv_heads):
    """Check an array ``[b, n]`` and give it the axes of operands; its leading axes match `lead` from the left.

    Args:
        name: Name of the argument, for messages.
        x: The array, or None.
        length: Required size of its last axis.
        lead: q's leading axes, ``(*batch, h g)``.
        kv_heads: Heads of keys, h.

    Returns:
        ``[b, h, g, n]``, with axes of size 1 if values are shared.
    """
    if x is None:
        return None
    axes = x.shape[:-1]
    if x.ndim < 1 or x.shape[-1] != length or not _broadcasts(axes, lead):
        raise ValueError(
            f"`{name}` must be [b, n] with n = {length}, and its leading axes must match q's, {lead}, from the left "
            f"(or be 1), got {x.shape}; reshape it to line up from the left."
        )
    return _split_lead(x, axes + (1,) * (len(lead) - len(axes)), 1, lead, kv_heads)


def _from_right(name, x, shape, lead, kv_heads):
    """Check an array ``[h g, *shape]`` and give it the axes of operands; its leading axes match `lead` from the right.

    `shape` is ``(w, s)`` for a bias and empty for sinks. The other arguments are as in `_from_left`.

    Returns:
        ``[b, h, g, *shape]``, with axes of size 1 if values are shared.
    """
    if x is None:
        return None
    check_real(name, x, "a mask goes to `mask`, or is added as jnp.where(mask, 0, -jnp.inf)")
    axes = x.shape[: max(x.ndim - len(shape), 0)]
    if x.shape[len(axes) :] != shape or not _broadcasts(axes[::-1], lead[::-1]):
        wanted = ", ".join(("h g", *map(str, shape)))
        raise ValueError(
            f"`{name}` must be [{wanted}], and its leading axes must match q's, {lead}, from the right (or be 1), got "
            f"{x.shape}; reshape it to line up from the right."
        )
    return _split_lead(x, (1,) * (len(lead) - len(axes)) + axes, len(shape), lead, kv_heads)


def _broadcasts(axes, lead):
    """Return whether axes equal the first ones of `lead`, or are 1."""
    return len(axes) <= len(lead) and all(a in (1, size) for a, size in zip(axes, lead, strict=False))


def _group(lead, kv_heads):
    """Return the number of query heads that share one head of keys."""
    return 1 if kv_heads == lead[-1] else lead[-1] // max(kv_heads, 1)


def _split_lead(x, axes, rank, lead, kv_heads):
    """Reshape leading axes ``[*batch, h g]``, of which any may be 1, to ``[b, h, g]``; the last `rank` axes stay.

    If all batch axes are 1, b is 1. If only some are, they are broadcast first, because one axis b is either shared or
    not.
    """
    rest = x.shape[x.ndim - rank :]
    *batch, last = axes
    x = jnp.asarray(x).reshape(*axes, *rest)
    if any(size != 1 for size in batch):
        batch = lead[:-1]
        x = jnp.broadcast_to(x, (*batch, last, *rest))
    heads = (1, 1) if last == 1 else (kv_heads, _group(lead, kv_heads))
    return x.reshape(math.prod(batch), *heads, *rest)
