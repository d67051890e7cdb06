"""The entry points: `local_attention`, `attend` for prepared operands and options, and `merge_attention`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_local_attention.checks import (
    check_flag,
    check_kind,
    describe,
    is_number,
)
from flax_local_attention.kernels import Implementation, choose_implementation
from flax_local_attention.operands import Operands, check_positions, check_turns, fit_window, silence
from flax_local_attention.options import AttentionOptions
from flax_local_attention.parallel import Halo, axis_of_sequence, gather_sequence, is_served, over_shards
from flax_local_attention.rotary import Rotary
from flax_local_attention.sharding import spread_like
from flax_local_attention.softmax import LogSum, merge_parts, turn_before
from flax_local_attention.window import Window

# Turns the dropout seed of a call into another one for its global keys; any number would do.
GLOBAL_SEED = np.uint32(0x85EBCA6B)


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: Window | None = None,
    window_size: int | None = None,
    causal: bool = False,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_windowsize: bool = False,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    attn_bias: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    shared_qk: bool = False,
    rotary: Rotary | None = None,
    q_offset: int | jax.Array = 0,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    autopad: bool = False,
    precision: jax.lax.PrecisionLike = None,
    axis_name: str | None = None,
    implementation: str | Implementation | None = None,
    return_log_sum: bool = False,
    global_keys: Sequence[Any] | None = None,
) -> jax.Array | tuple[jax.Array, LogSum]:
    r"""Attend to the keys of a window around each query.

    ``out[i] = sum_j softmax_j(scale q[i] . k[j] + bias) v[j]``, over the keys that query i sees:
    the keys of its `Window` that are not masked and belong to its segment. No other key has any effect: neither the
    border of the sequence nor the length of a last, ragged window changes the result. A query that sees no key
    gets zeros and no gradient. For a slab of s tokens, time is O(n s d), and memory besides inputs and result is
    O(s^2) to O(s n d / w). Both are linear in n, forward and backward.

    Positions, scores and softmax are float32, or float64 for float64 inputs.

    Args:
        q: Queries, ``[..., n, d]``, usually ``[b, h g, n, d]``. Heads come before tokens, unlike in
            `jax.nn.dot_product_attention`.
        k: Keys, ``[..., n, d]``. Their number of heads may be a divisor of q's: neighbouring heads of queries then
            share a head of keys (grouped queries). Their length may differ from q's, see `q_offset`.
        v: Values, shaped like k, except that their width, which is the output's, may differ.
        window: Which keys a query sees, in place of the next five arguments. Works for any number of keys.
        window_size: Tokens in a window, see `Window` for the four kinds of window.
        causal: Whether each query sees only keys up to its own.
        look_backward: Windows seen before a query's own.
        look_forward: Windows seen after a query's own. None means 0 if causal, else 1.
        exact_windowsize: Count distances from the query, not from its window's borders.
        mask: Which keys may be seen, ``[b, n]`` bool. Its leading axes match q's from the left; size 1
            broadcasts. What a token holds changes nothing if no head may see it, even NaN or infinity. Its own query
            is answered like any other; if it is not finite or exceeds 1e9, its output is arbitrary. All tokens that
            are not masked must be finite, even in other segments and outside the window.
        segment_ids: Which document a token belongs to, ``[b, n]`` integers, with leading axes as in `mask`.
            Documents packed in one sequence never see each other. Windows that are not exact are cut from the start
            of the row, not of the document. Requires `q_offset` 0.
        attn_bias: Added to the scores, ``[h g, w, s]``: one row for each place of a query in its window, one
            column for each slot of the slab, see `Window.bias_row` and `Window.bias_column`. Its leading axes match
            q's from the right, as in NumPy. -inf hides a key; other entries must be finite.
            `Window.relative_positions` gives the distance for every row and column. For a window without a limit,
            the shape follows from ``window.within(n)``, where n is the number of keys, or one more than the position
            of the last query if that is larger.
        scale: Factor of the scores, a number or a scalar array; may be traced. None means ``d ** -0.5``.
        shared_qk: Whether queries double as keys (Reformer). Keys are then L2-normalised, and a token sees itself
            only if it sees nothing else.
        rotary: Rotary position embedding of queries and keys, see `Rotary`. None means none.
        q_offset: Position of the first query among the keys, at least 0, for queries and keys of different lengths.
            May be traced, unless the window has no limit.
        logits_soft_cap: Bound of the scaled scores, ``cap tanh(score / cap)``, before the bias. None means no bound.
        sinks: Extra logits with no value behind them, ``[h g]``, by which a head can attend to nothing. Their
            axes match q's leading axes from the right.
        dropout_rate: Share of probabilities to drop, in ``[0, 1)``.
        dropout_rng: Random key for dropout; required if the rate is not 0.
        autopad: Accept a number of keys that is not a multiple of `window_size`. Exact windows accept any number
            without it, and so does `window`.
        precision: Precision of the two matrix products, as in `jax.numpy.einsum`.
        axis_name: Mesh axis that the sequence is sharded over, for calls inside ``jax.shard_map``. The arrays are
            then one shard's, see `Halo`.
        implementation: ``"triton"`` for fused kernels on NVIDIA GPUs (`Triton`), ``"mosaic"`` for fused kernels on
            Hopper GPUs (`MosaicGPU`), ``"tpu"`` for fused kernels on TPUs (`TPU`), ``"xla"`` for plain JAX in blocks
            (`Windowed`), ``"dense"`` for the definition (`Dense`), or an instance of one of these classes. None takes
            the fastest one that serves the call on the device that the program is lowered for.
        return_log_sum: Also return the log-sum-exp of the softmax, for `merge_attention`.
        global_keys: Further keys that every query sees, in the same softmax: ``(keys, values)``, each ``[h, m, d]``,
            or ``(keys, values, mask)`` with a mask ``[b, m]`` bool. Leading axes of keys and values match k's from
            the right, those of the mask match q's from the left; size 1 broadcasts. Global keys have no position and
            no document: neither rotary nor `attn_bias` affects their scores. Use them for memory tokens, or for
            tokens of the sequence that all others see; hide the latter from the windows by `mask`.

    Returns:
        The output of each query, with q's shape (except for the width, which is v's) and dtype. With
        `return_log_sum`, a pair of the output and a `LogSum` of ``[..., n]``.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, a value or a combination is wrong; the message says what to do.
        Unsupported: The requested implementation cannot serve the call.

    Examples:
        >>> q = k = v = jnp.ones((2, 8, 1024, 64))
        >>> local_attention(q, k, v, window_size=256, causal=True, rotary=Rotary(64)).shape
        (2, 8, 1024, 64)

    Source: ``local-attention`` 1.11.2. Results differ where the original attends to padding, where a query
    sees no key, and where rotary looks forward; ``tests/test_original.py`` shows each difference.
    """
    check_flag("autopad", autopad)
    check_flag("return_log_sum", return_log_sum)
    # A number is an option; an array, which may be traced, is an operand.
    number: Any = scale if is_number(scale) else None
    options = AttentionOptions(
        window=_choose_window(window, window_size, causal, look_backward, look_forward, exact_windowsize),
        rotary=rotary,
        scale=number,
        shared_qk=shared_qk,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=dropout_rate,
        precision=precision,
    )
    if options.dropout_rate and dropout_rng is None:
        raise ValueError(
            f"`dropout_rng` must be given when `dropout_rate` is not 0, got None with a rate of {dropout_rate}; "
            "pass a key such as jax.random.key(0)."
        )
    check_layout(q, k)
    operands = Operands.create(
        q,
        k,
        v,
        options,
        mask=mask,
        segment_ids=segment_ids,
        attn_bias=attn_bias,
        scale=None if number is not None else scale,
        sinks=sinks,
        q_offset=q_offset,
        dropout_rng=dropout_rng,
        global_keys=global_keys,
    )
    check_length(operands, options, autopad or window is not None)
    out, log_sum = attend(operands, options, implementation=implementation, axis_name=axis_name)
    out = spread_like(out.reshape(*q.shape[:-1], v.shape[-1]), q, q.ndim - 1)
    if not return_log_sum:
        return out
    return out, jax.tree.map(lambda x: spread_like(x.reshape(q.shape[:-1]), q, q.ndim - 1), log_sum)


def _choose_window(window, window_size, causal, look_backward, look_forward, exact_windowsize):
    """Return `window`, or make one from the five arguments that it replaces."""
    if window is None:
        if window_size is None:
            raise ValueError(
                "`window_size` or `window` must be given, got neither; write for example `window_size=512` or "
                "`window=Window.sliding(4096)`."
            )
        return Window(window_size, causal, look_backward, look_forward, exact_windowsize)
    flat = {
        "window_size": (window_size, None),
        "causal": (causal, False),
        "look_backward": (look_backward, 1),
        "look_forward": (look_forward, None),
        "exact_windowsize": (exact_windowsize, False),
    }
    given = [f"`{name}` {value!r}" for name, (value, default) in flat.items() if value is not default]
    if given:
        raise ValueError(
            f"`window` takes the place of the five arguments of a window, got {window} and {', '.join(given)}; "
            "give one or the other."
        )
    return window


def check_layout(q: jax.Array, k: jax.Array):
    """Raise for queries and keys that look like ``[b, n, h, d]``, with more than 8 times as many heads as tokens."""
    shapes: list[tuple[int, ...]] = [getattr(x, "shape", ()) for x in (q, k)]
    is_known = all(isinstance(size, int) for shape in shapes for size in shape[-3:-1])
    if is_known and all(len(shape) > 3 and shape[-3] > 8 * shape[-2] > 0 for shape in shapes):
        shape = shapes[0]
        raise ValueError(
            f"`q` must be [b, h, n, d], got {shape}, which is {shape[-3]} heads of {shape[-2]} tokens: if it is "
            "[b, n, h, d], swap axes by jnp.swapaxes(x, -2, -3), there and in the result; if it is right, make "
            f"heads rows of the batch by x.reshape(-1, {shape[-2]}, {shape[-1]})."
        )


def check_length(operands: Operands, options: AttentionOptions, autopad: bool):
    """Raise if the keys must fill whole windows and do not."""
    n_keys, window = operands.k.shape[-2], options.window
    if not (autopad or window.exact_windowsize) and n_keys % window.size != 0:
        raise ValueError(
            f"`k` must have a multiple of `window_size` ({window.size}) tokens, n in [b, h, n, d], got {n_keys}; "
            "pass `autopad=True` to allow any number (padding is never seen)."
        )


def _turn(operands, options, positions):
    """Rotate queries and keys by explicit positions; also return the options without rotary."""
    b, n, n_keys = operands.q.shape[0], operands.q.shape[-2], operands.k.shape[-2]
    if n != n_keys:
        raise ValueError(f"`positions` needs as many queries as keys, got {n} and {n_keys}; leave them out.")
    check_turns(options)
    positions = jnp.asarray(check_positions(positions, b, n))[:, None, None]
    return turn_before(operands, positions, options)


def attend(
    operands: Operands,
    options: AttentionOptions,
    *,
    positions: jax.Array | None = None,
    implementation: str | Implementation | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, LogSum]:
    """Compute `local_attention` from operands and options that are made beforehand.

    Args:
        operands: The arrays of the call, from `Operands.create`.
        options: Everything else.
        positions: Positions for rotary, ``[b, n]`` or ``[1, n]`` integers, for as many queries as keys. None means
            the indices.
        implementation: As in `local_attention`.
        axis_name: As in `local_attention`.

    Returns:
        The output of each query, ``[b, h, g, n, d]`` in q's dtype, and its log-sum-exp, ``[b, h, g, n]``.

    Raises:
        TypeError: Positions are not integers.
        ValueError: The bias or rotary does not fit, because the operands were made with other options; or positions
            have the wrong shape, or are given without rotary or with xPos.
        Unsupported: The requested implementation cannot serve the call.

    Examples:
        >>> options = AttentionOptions(Window.sliding(256), rotary=Rotary(64))
        >>> q = k = v = jnp.ones((2, 8, 1024, 64))
        >>> out, log_sum = attend(Operands.create(q, k, v, options), options)
        >>> out.shape, log_sum.total.shape
        ((2, 8, 1, 1024, 64), (2, 8, 1, 1024))
    """
    check_kind("operands", operands, Operands, "make some by Operands.create(q, k, v, options)")
    check_kind("options", options, AttentionOptions, "write for example `AttentionOptions(Window(512))`")
    chosen = choose_implementation(implementation)
    if axis_name is None and (spread := axis_of_sequence(operands)) is not None:
        if is_served(operands, _fit(options, operands, 1), spread):
            shard = functools.partial(_attend_shard, options, implementation, spread)
            return over_shards(shard, operands, positions, spread)
        operands = gather_sequence(operands)
    halo = None if axis_name is None else Halo(axis_name, implementation)
    options = _fit(options, operands, 1 if halo is None else halo.shards)
    operands.check(options)
    in_window = operands._replace(global_keys=None), options
    if positions is not None:
        in_window = _turn(*in_window, positions)
    result = _attend(halo or chosen, *in_window)
    if operands.global_keys is None:
        return result
    if halo is not None:
        operands = operands._replace(dropout_seed=halo.own_seed(operands.dropout_seed))
    return merge_attention([result, _attend(chosen, *of_global_keys(operands, options))])


def _attend_shard(options, implementation, axis_name, operands, positions):
    """Attend inside ``jax.shard_map``."""
    return attend(operands, options, positions=positions, implementation=implementation, axis_name=axis_name)


def _attend(implementation, operands, options):
    """Call an implementation, unless there are no queries or no keys."""
    if operands.q.size == 0 or operands.k.size == 0:
        out = jnp.zeros((*operands.q.shape[:-1], operands.v.shape[-1]), operands.q.dtype)
        return out, _log_sum_without_keys(operands)
    return implementation(operands, options)


def of_global_keys(operands: Operands, options: AttentionOptions) -> tuple[Operands, AttentionOptions]:
    """Make operands and options for attention to the global keys of a call alone.

    The keys are placed before the first query, in a window that reaches them from the last query. A sink is counted
    with the other keys. Dropout uses a seed of its own: it hashes positions, which differ here. Queries of masked
    tokens are silenced here, because implementations cannot recognise them without `q_mask`.
    """
    assert operands.global_keys is not None
    (k, v, mask), n, seed = operands.global_keys, operands.q.shape[-2], operands.dropout_seed
    m = k.shape[-2]
    operands = operands._replace(
        q=operands.q if operands.q_mask is None else silence(operands.q, operands.q_mask),
        k=k,
        v=v,
        mask=mask,
        q_mask=None,
        q_segments=None,
        k_segments=None,
        bias=None,
        sink=None,
        dropout_seed=None if seed is None else seed ^ GLOBAL_SEED,
        q_offset=m,
        global_keys=None,
    )
    return operands, dataclasses.replace(options, window=Window.sliding(m + n), rotary=None)


def _fit(options, operands, shards):
    """Limit the window to the sequence on all shards: implementations require a window with a limit."""
    n, n_keys = operands.q.shape[-2], operands.k.shape[-2]
    window = fit_window(options, shards * n, shards * n_keys, operands.q_offset, operands.bias is not None)
    return options if window is options.window else dataclasses.replace(options, window=window)


def _log_sum_without_keys(operands):
    """Make the log-sum-exp of queries without keys: -inf, or the sink if there is one."""
    shape, dtype = operands.q.shape[:-1], operands.dtype
    if operands.sink is None:
        return LogSum(jnp.full(shape, jnp.finfo(dtype).min, dtype), jnp.zeros(shape, dtype))
    sink = jnp.broadcast_to(operands.sink[..., None].astype(dtype), shape)
    largest = jax.lax.stop_gradient(sink)
    return LogSum(largest, jnp.exp(sink - largest))


def merge_attention(parts: Sequence[tuple[jax.Array, LogSum]]) -> tuple[jax.Array, LogSum]:
    r"""Merge attention to disjoint sets of keys into attention to all of them.

    ``out = sum_p z_p out_p / sum_p z_p``, where ``z_p`` sums the exponentials of the scores in part p. The parts may
    be computed separately, for example on several devices. The result equals one softmax over all keys, and so do its
    derivatives. Give a sink to one part only: every part that has it counts it.

    Args:
        parts: At least one pair as `attend` and ``local_attention(..., return_log_sum=True)`` return it: an output
            ``[..., n, d]`` and a `LogSum` of ``[..., n]``.

    Returns:
        The pair for all keys, in the dtype of the first part. A query that sees no key in any part gets zeros.

    Raises:
        TypeError: `parts` is not a sequence of such pairs.
        ValueError: There are no parts, or their shapes differ.

    Examples:
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 64, 16))
        >>> everything = Window(64, look_backward=0, look_forward=0)
        >>> whole = local_attention(q, k, v, window=everything)
        >>> parts = [
        ...     local_attention(q, k, v, window=everything, mask=mask, return_log_sum=True)
        ...     for mask in (jnp.arange(64) < 20, jnp.arange(64) >= 20)
        ... ]
        >>> bool(jnp.allclose(merge_attention(parts)[0], whole, atol=1e-5))
        True
    """
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise TypeError(f"`parts` must be a sequence of pairs, got {describe(parts)}; give [(out, log_sum), ...].")
    if not parts:
        raise ValueError("`parts` must have at least one pair of an output and its LogSum, got none; give one.")
    for part in parts:
        _check_part(part)
    shapes = [(out.shape, log_sum.largest.shape, log_sum.total.shape) for out, log_sum in parts]
    if any(shape != (shapes[0][0], shapes[0][0][:-1], shapes[0][0][:-1]) for shape in shapes):
        raise ValueError(
            f"`parts` must all be of one shape, [..., n, d] with sums [..., n], got {shapes}; reshape them."
        )
    if len(parts) == 1:
        return parts[0]
    parts = jax.tree.map(jnp.asarray, list(parts))
    return merge_parts(parts)


def _check_part(part):
    """Raise unless a part is a pair of an output and its `LogSum`."""
    if not (isinstance(part, tuple | list) and len(part) == 2 and isinstance(part[1], LogSum)):
        raise TypeError(
            f"`parts` must be pairs of an output and its LogSum, got {describe(part)}; take them from "
            "`local_attention(..., return_log_sum=True)`."
        )
