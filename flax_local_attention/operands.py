"""The arrays of a call: checked at the door, and brought to one shape."""

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

# The farthest that positions, which are int32, can be.
LAST_POSITION = 2**31 - 1


# Axes of operands that are of tokens.
OF_TOKENS = {"q": -2, "k": -2, "v": -2, "mask": -1, "q_mask": -1, "q_segments": -1, "k_segments": -1}


class GlobalKeys(NamedTuple):
    """Keys that every query sees beside those of its window, before and after it.

    They have no position: rotary turns neither them nor, for their scores, the queries. Nor have they a bias or a
    document.

    Attributes:
        k: Keys, ``[m, d]``, with the leading axes of other keys.
        v: Their values, ``[m, d]``.
        mask: Which of them may be seen, ``[m]`` bool; None means all.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array | None = None


class Border(NamedTuple):
    """Keys that stand right before the others, or right after them, and lie apart: from a neighbour, see `Halo`.

    Attributes:
        k: Keys, ``[m, d]``, with the leading axes of other keys.
        v: Their values, ``[m, d]``.
        mask: Whether they may be seen, ``[m]`` bool; False where a neighbour is missing.
        k_segments: Their documents, ``[m]`` integers.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    k_segments: jax.Array | None = None


class Operands(NamedTuple):
    """The arrays of a call of attention; None for those not given. `Operands.create` makes them.

    All but `q_offset` have three leading axes ``[b, h, g]``: rows, heads of keys, and the query heads that share one
    head of keys. An axis has size 1 where its values are shared. `over_heads` maps a function over these axes; the
    function sees one head, with the shapes below.

    Attributes:
        q: Queries, ``[n, d]``.
        k: Keys, ``[n, d]``; maybe of another length than q.
        v: Values, as k, or of another width.
        mask: Whether a key may be seen, ``[n]`` bool.
        q_mask: Whether a query's own token may be seen, ``[n]`` bool; queries of masked tokens are answered too.
        q_segments, k_segments: Documents of queries and keys, ``[n]`` integers.
        bias: Added to the scores, ``[w, s]``, see `Window.bias_row` and `Window.bias_column`.
        scale: Factor of the scores, ``[]``, in place of the options'.
        sink: Extra logit with no value behind it, ``[]``.
        dropout_seed: Seed of dropout, ``[]`` uint32, see `keeps`.
        q_offset: Position of the first query among the keys, ``[]``, for all heads; a Python int where it is
            known. None in a part of the operands, whose positions the caller knows.
        global_keys: Keys that every query sees. `attend` takes them apart: implementations never get any.
        before, after: Keys at the borders of a shard, without an offset of queries. Implementations by kernels, and
            None, take them as they are; `Halo` joins them with the others for the rest.
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
        """Check the arrays of a call against each other and its options, and give them their axes.

        Args:
            q, k, v, mask, segment_ids, attn_bias, scale, sinks, q_offset, dropout_rng, global_keys: As in
                `local_attention`.
            options: Options of the call. A `dropout_rng` acts only where their `dropout_rate` is not 0.

        Raises:
            TypeError: An array is of the wrong type or dtype.
            ValueError: Shapes do not fit together, rotary does not fit q, or positions go beyond int32.

        Example:
            >>> options = AttentionOptions(Window.sliding(4))
            >>> q, k = jnp.ones((2, 8, 16, 64)), jnp.ones((2, 4, 16, 64))
            >>> operands = Operands.create(q, k, k, options)
            >>> operands.q.shape, operands.k.shape
            ((2, 4, 2, 16, 64), (2, 4, 1, 16, 64))
        """
        check_kind("options", options, AttentionOptions, "write `AttentionOptions(Window(512, causal=True))`, say")
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
        """Raise unless rotary and the bias fit these options."""
        window = fit_window(options, self.q.shape[-2], self.k.shape[-2], self.q_offset, self.bias is not None)
        _check_rotary(dataclasses.replace(options, window=window), self.q)
        if self.bias is not None and self.bias.shape[-2:] != (window.size, window.slab):
            raise ValueError(
                f"`attn_bias` must be [{window.size}, {window.slab}] for {window}, got "
                f"{list(self.bias.shape[-2:])}; make operands with the options they are used with."
            )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of positions, scores and softmax: float32, or float64 where an operand is."""
        return wide_dtype(self.q.dtype, self.k.dtype, self.v.dtype)

    def widen_scores(self) -> "Operands":
        """Cast what is added to scores, or multiplies them, to their dtype.

        Its gradients, sums over rows and blocks, are then rounded once.
        """
        wide = {name: getattr(self, name) for name in ("bias", "scale", "sink")}
        return self._replace(**{name: x.astype(self.dtype) for name, x in wide.items() if x is not None})

    def fold_groups(self) -> "Operands":
        """Give q, k and v one axis of heads, ``[b, h g, n, d]``; `split_groups` undoes it.

        A loop that cuts them needs it: XLA:CPU (jaxlib 0.10) copies an argument with one more axis.
        """
        q, k, v = (x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]) for x in self[:3])
        return self._replace(q=q, k=k, v=v)

    def split_groups(self, sizes: tuple[int, int, int]) -> "Operands":
        """Split the heads of q, k and v into axes ``[b, h, g]`` of these sizes."""
        q, k, v = self[:3]
        k, v = (x.reshape(*sizes[:2], 1, *x.shape[-2:]) for x in (k, v))
        return self._replace(q=q.reshape(*sizes, *q.shape[-2:]), k=k, v=v)

    def of_queries(self, first: int | jax.Array, size: int) -> "Operands":
        """Keep `size` queries from `first` on, without their offset: the caller knows their positions."""
        return self._replace(
            q=_cut(self.q, first, size, -2),
            q_mask=_cut(self.q_mask, first, size, -1),
            q_segments=_cut(self.q_segments, first, size, -1),
            q_offset=None,
        )

    def of_keys(self, first: int | jax.Array, size: int) -> "Operands":
        """Keep `size` keys from `first` on, without the queries' offset: the caller knows all positions."""
        return self._replace(
            k=_cut(self.k, first, size, -2),
            v=_cut(self.v, first, size, -2),
            mask=_cut(self.mask, first, size, -1),
            k_segments=_cut(self.k_segments, first, size, -1),
            q_offset=None,
        )


def fit_window(options: AttentionOptions, n: int, n_keys: int, q_offset: int | jax.Array, has_bias: bool) -> Window:
    """Return the window of a call, which sees what that of the options sees, and reaches no farther than there is text.

    Queries may stand beyond the last key, and then reach farther back than there are keys. A window that has a limit
    stays as it is where more than who sees whom goes by it: a bias, or rotary that is that of the original.

    Args:
        options: Options of the call.
        n: Queries.
        n_keys: Keys.
        q_offset: Position of the first query among the keys.
        has_bias: Whether the scores have a bias.

    Raises:
        ValueError: The window has no limit, and the offset is traced.
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
            "`window.within(n)` with the most positions that queries and keys may have."
        )
    return fitted


def _refuse_global(window, n, n_keys):
    """Return the window of a text whose length is symbolic, or raise if it has no limit."""
    if window.is_global:
        raise ValueError(
            f"`q` and `k` must have a number of tokens when the window has no limit, got {n} and {n_keys}; fix that "
            "dimension of their shapes, or use `window.within(n)` with the most tokens that there may be."
        )
    return window


def _mask_of_queries(mask, q_offset, n):
    """Take the entries of a mask of keys at the positions of n queries; True beyond the keys.

    ``[b, h, g, n_keys]`` to ``[b, h, g, n]``. Query i stands at position ``q_offset + i`` among the keys.
    """
    if mask is None or (n == mask.shape[-1] and isinstance(q_offset, int) and q_offset == 0):
        return mask
    if not mask.shape[-1]:
        return jnp.ones((*mask.shape[:-1], n), bool)
    at, last = q_offset + jnp.arange(n, dtype=jnp.int32), mask.shape[-1] - 1
    beyond = jnp.expand_dims(at > last, range(mask.ndim - 1))
    return jnp.take(mask, jnp.minimum(at, last), axis=-1) | beyond


def silence(x: jax.Array, mask: jax.Array, dtype: Dtype | None = None) -> jax.Array:
    """Zero masked tokens that are not finite, or so large that results computed from them may not be.

    They would reach other tokens through a gradient: 0 times NaN is NaN. All other tokens stay as they are.

    Args:
        x: ``[..., n, d]``.
        mask: ``[..., n]`` bool, with leading axes that broadcast against x's; False where a token is masked.
        dtype: Dtype that x will be cast to. None means its own.

    Returns:
        x, with zeros in place of such tokens.
    """
    wide = wide_dtype(x.dtype)
    most = min(largest_harmless(x.dtype), largest_harmless(x.dtype if dtype is None else dtype))
    # A maximum would not do: that of XLA on a CPU leaves NaN out where there are many numbers.
    is_harmless = (jnp.abs(x.astype(wide)) <= most).all(-1)
    return jnp.where((mask | is_harmless)[..., None], x, 0)


def largest_harmless(dtype: Dtype) -> float:
    """Return the size up to which sums and rotations of numbers fit a dtype, and sums of squares its `wide_dtype`."""
    return min(float(jnp.finfo(dtype).max) / 16, float(jnp.finfo(wide_dtype(jnp.dtype(dtype))).max) ** 0.25)


def token_mask(mask: jax.Array | None, lead: tuple[int, ...], n: int) -> jax.Array | None:
    """Check a mask for q's leading axes ``(b, ..., h)``, and return which tokens any head sees, ``[b, n]`` bool."""
    if mask is None:
        return None
    by_heads = jnp.asarray(_mask_from_left("mask", mask, n, lead, lead[-1]))
    return jnp.broadcast_to(by_heads.any((1, 2)), (math.prod(lead[:-1]), n))


def token_segments(segment_ids: jax.Array | None, b: int, n: int) -> jax.Array | None:
    """Check the documents of tokens, and return them as ``[b, n]`` integers."""
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
    """Raise unless rotary can turn by explicit positions."""
    if options.rotary is None:
        raise ValueError("`positions` turn queries and keys by rotary, got options without; leave them out.")
    if options.rotary.use_xpos:
        raise ValueError(
            "`positions` cannot be given with xPos, whose scale leaves its range far from 0, got both; leave them out, "
            "or set `use_xpos=False`."
        )


def check_last_position(name: str, position: int, remedy: str = "count from a place nearby"):
    """Raise if a position is beyond int32."""
    if isinstance(position, int) and position > LAST_POSITION:
        raise ValueError(f"`{name}` must be at most {LAST_POSITION}, the last position, got {position}; {remedy}.")


def wide_dtype(*dtypes: jnp.dtype) -> jnp.dtype:
    """Return the dtype to compute in: float64 if any of these is float64, else float32."""
    return jnp.dtype(jnp.float64 if any(dtype == jnp.float64 for dtype in dtypes) else jnp.float32)


def _cut(x, first, size, axis):
    """Slice an operand that may be None."""
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def over_heads(fn: Callable[[Any], Any], operands: Any, depth: int = 3) -> Any:
    """Map `fn` by vmap over the leading axes ``[b, h, g]`` of a tree of operands; an axis of size 1 is shared."""
    if depth == 0:
        return fn(operands)
    size = next((x.shape[0] for x in jax.tree.leaves(operands) if x.shape[0] != 1), 1)
    shared = jax.tree.map(lambda x: x.squeeze(0) if x.shape[0] == 1 else x, operands)
    if size == 1:  # one head is not mapped over: each level of vmap is traced anew
        return jax.tree.map(lambda x: x[None], over_heads(fn, shared, depth - 1))
    axes = jax.tree.map(lambda x: 0 if x.shape[0] == size else None, operands)
    return jax.vmap(lambda mapped: over_heads(fn, mapped, depth - 1), in_axes=(axes,))(shared)


def _check_qkv(q, k, v):
    """Check that q, k and v are float arrays whose shapes fit together, and return them as JAX's."""
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
        raise ValueError(f"`v` must be at least 1 wide, got shape {v.shape}; there is nothing to gather.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"`q` and `k` must have the same width d, got q {q.shape} and k {k.shape}; project both to one width."
        )
    q_lead, k_lead = q.shape[:-2], k.shape[:-2]
    if q_lead != k_lead and not _are_groups(q_lead, k_lead):
        raise ValueError(
            "`k` and `v` must have q's leading axes, or fewer heads in the last of them, a divisor of q's: "
            f"got q {q.shape} and k {k.shape}; reshape or repeat them."
        )
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def _with_whole_groups(q, kv_heads):
    """Put the heads of queries on each device where explicit axes of a mesh do not divide those of the keys."""
    if q.ndim < 3 or not isinstance(kv_heads, int) or kv_heads % shards_of(q)[-3] == 0:
        return q
    spec = list(spec_of(q))
    spec[-3] = None
    return respread(q, PartitionSpec(*spec))


def _are_groups(q_lead, k_lead):
    """Return whether queries have a multiple of the keys' heads, and are as many else."""
    is_alike = len(q_lead) == len(k_lead) > 0 and q_lead[:-1] == k_lead[:-1]
    return is_alike and 0 < k_lead[-1] <= q_lead[-1] and q_lead[-1] % k_lead[-1] == 0


def check_global_keys(
    given: Sequence[Any] | None, k: jax.Array, v: jax.Array, lead: tuple[int, ...], kv_heads: int
) -> GlobalKeys | None:
    """Check global keys, see `local_attention`, and give them the axes of operands; those that are shared are repeated.

    Args:
        given: Keys, values and maybe a mask, or None.
        k, v: Keys and values of the sequence, or their shapes.
        lead: Leading axes of the queries, ``(*batch, h g)``.
        kv_heads: Heads of keys, h.

    Returns:
        The global keys; None without any.

    Raises:
        TypeError, ValueError: They are no such sequence, or their shapes do not fit k and v.
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
            f"`global_keys` must have a value for each key, got {m} keys and {values.shape[-2]} values; give as many."
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
    """Check an offset: one integer, not negative, whose last query stays in int32; 0 where documents are given.

    Args:
        q_offset: The offset. A traced one is not checked.
        n: Queries.
        segment_ids: Documents, or None.

    Returns:
        An int as an int, so that plans of blocks can count on it; an array as int32, of NumPy if it is known.
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
        raise ValueError(f"`segment_ids` needs queries from the first key on, got `q_offset` {q_offset}; use `mask`.")
    if is_known:
        return int(q_offset)
    return jnp.asarray(q_offset, jnp.int32) if offset is None else offset.astype(np.int32)


def _check_rotary(options, q):
    """Raise unless rotary has q's width, and the scale of xPos stays in q's range within a slab."""
    rotary = options.rotary
    if rotary is None:
        return
    if rotary.dim > q.shape[-1]:
        raise ValueError(
            f"`rotary.dim` must be at most the width of a head, got {rotary.dim} for heads of {q.shape[-1]}; "
            f"use Rotary({q.shape[-1]})."
        )
    if rotary.use_xpos:  # a block's run of keys is no longer
        window = options.window
        check_fading(options, window.backward + window.span + window.forward, q.dtype)


def check_fading(options: AttentionOptions, reach: int, dtype: Dtype):
    """Raise if the scale of xPos leaves a dtype's range within `reach` tokens."""
    rotary = options.rotary
    if rotary is None or not rotary.use_xpos:
        return
    assert rotary.scale_base is not None  # filled in by the options
    most = 64 if float(jnp.finfo(dtype).max) > 1e9 else 12
    if reach > most * rotary.scale_base:
        raise ValueError(
            f"`scale_base` of xPos must be at least a slab / {most} in {jnp.dtype(dtype)}, got {rotary.scale_base} for "
            f"a slab of {reach} tokens: its scale would leave the range; give a larger one, or a smaller window."
        )


def _check_segments(segment_ids, n, n_keys):
    """Check that documents are integers that JAX's dtype can hold, and that there are as many queries as keys.

    JAX would cut a NumPy int64 to int32 without a word, and two documents could become one.
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
        raise ValueError(f"`segment_ids` needs as many queries as keys, got {n} and {n_keys}; use `mask` instead.")
    return segment_ids


def _check_scale(scale):
    """Check a scale, one number for all heads, and give it the axes of operands."""
    if scale is None:
        return None
    if not is_number(scale):
        if not is_array(scale):
            raise TypeError(f"`scale` must be a number or an array of one, got {describe(scale)}; None is d ** -0.5.")
        check_real("scale", scale, "cast it, say to float32")
    else:
        check_finite("scale", scale)
    if jnp.ndim(scale):
        raise ValueError(f"`scale` must be one number, got shape {jnp.shape(scale)}; multiply q by it instead.")
    return jnp.asarray(scale).reshape(1, 1, 1)


def _mask_from_left(name, mask, length, lead, kv_heads):
    """Check a mask, and give it the axes of operands, see `_from_left`."""
    if mask is not None:
        check_mask(name, mask)
    return _from_left(name, mask, length, lead, kv_heads)


def _from_left(name, x, length, lead, kv_heads):
    """Check an array ``[b, n]``, whose leading axes are the first of `lead`, and give it the axes of operands.

    Args:
        name: Name of the argument, for messages.
        x: The array, or None.
        length: Size that its last axis must have.
        lead: q's leading axes, ``(*batch, h g)``.
        kv_heads: Heads of keys, h.

    Returns:
        ``[b, h, g, n]``, with axes of size 1 where values are shared.
    """
    if x is None:
        return None
    axes = x.shape[:-1]
    if x.ndim < 1 or x.shape[-1] != length or not _broadcasts(axes, lead):
        raise ValueError(
            f"`{name}` must be [b, n] with n = {length} and, before it, the first of q's leading axes {lead} "
            f"(or 1), got {x.shape}; reshape it to line up from the left."
        )
    return _split_lead(x, axes + (1,) * (len(lead) - len(axes)), 1, lead, kv_heads)


def _from_right(name, x, shape, lead, kv_heads):
    """Check an array ``[h g, *shape]``, whose leading axes are the last of `lead`, and give it the axes of operands.

    Arguments are as in `_from_left`; `shape` has the last axes, ``(w, s)`` for a bias and none for sinks.

    Returns:
        ``[b, h, g, *shape]``, with axes of size 1 where values are shared.
    """
    if x is None:
        return None
    check_real(name, x, "a mask goes to `mask`, or is added as jnp.where(mask, 0, -jnp.inf)")
    axes = x.shape[: max(x.ndim - len(shape), 0)]
    if x.shape[len(axes) :] != shape or not _broadcasts(axes[::-1], lead[::-1]):
        wanted = ", ".join(("h g", *map(str, shape)))
        raise ValueError(
            f"`{name}` must be [{wanted}] with, before the last {len(shape)} axes, the last of q's leading axes "
            f"{lead} (or 1), got {x.shape}; reshape it to line up from the right."
        )
    return _split_lead(x, (1,) * (len(lead) - len(axes)) + axes, len(shape), lead, kv_heads)


def _broadcasts(axes, lead):
    """Return whether axes are the first of `lead`, or 1 in their place."""
    return len(axes) <= len(lead) and all(a in (1, size) for a, size in zip(axes, lead, strict=False))


def _group(lead, kv_heads):
    """Return how many heads of queries share one head of keys."""
    return 1 if kv_heads == lead[-1] else lead[-1] // max(kv_heads, 1)


def _split_lead(x, axes, rank, lead, kv_heads):
    """Reshape leading axes ``[*batch, h g]``, some of size 1, to ``[b, h, g]``; the last `rank` axes stay.

    If all batch axes are 1, b is 1. If only some are, they are broadcast first: one axis b cannot be shared in part.
    """
    rest = x.shape[x.ndim - rank :]
    *batch, last = axes
    x = jnp.asarray(x).reshape(*axes, *rest)
    if any(size != 1 for size in batch):
        batch = lead[:-1]
        x = jnp.broadcast_to(x, (*batch, last, *rest))
    heads = (1, 1) if last == 1 else (kv_heads, _group(lead, kv_heads))
    return x.reshape(math.prod(batch), *heads, *rest)
