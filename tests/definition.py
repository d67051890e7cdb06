"""Attention in NumPy float64, written from the definition and independent of the library.

It imports nothing that it checks. Every function is analytic in its arrays: for ``x + 1e-30j t``, the imaginary
part of a result over 1e-30 is the exact derivative along t. `push_forward` differentiates the output so, and
`curvature` the gradient, which `pull_back` computes by hand-written rules.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

STEP = 1e-30
SELF_SCORE = -5e4


@dataclasses.dataclass(frozen=True)
class Rules:
    """Everything in a call that is not an array.

    Attributes:
        window: `window_size`, `causal`, `look_backward`, `look_forward`, `exact_windowsize` by name.
        rotary: `dim`, `theta`, `use_xpos`, `scale_base`, `reference`, `interleaved`, `frequencies`, `factor` by name;
            those left out are plain.
        scale, soft_cap, shared_qk: Options of the scores.
        q_offset: Position of the first query.
        keep_first: Number of first keys that every later query sees, at the distance at which they left its window.
    """

    window: Mapping[str, Any]
    rotary: Mapping[str, Any] | None = None
    scale: float | None = None
    soft_cap: float | None = None
    shared_qk: bool = False
    q_offset: int = 0
    keep_first: int = 0


def reach(window):
    """Return the window size and the numbers of tokens in the windows before and after a query's own."""
    w = window["window_size"]
    forward = window.get("look_forward")
    forward = (0 if window.get("causal") else 1) if forward is None else forward
    return w, window.get("look_backward", 1) * w, forward * w


def sees(window, i, j):
    """Return whether query i sees key j; i and j broadcast."""
    causal = window.get("causal", False)
    if window["window_size"] is None:
        return (j <= i) if causal else (i == i) & (j == j)
    w, backward, forward = reach(window)
    if window.get("exact_windowsize"):
        start, stop = i - backward, i + forward + 1
    else:
        start, stop = i // w * w - backward, (i // w + 1) * w + forward
    return (start <= j) & (j < (i + 1 if causal else stop))


def default_scale_base(window):
    """Return the distance over which xPos fades: half a window, or half the reach of a window of one token."""
    w, backward, forward = reach(window)
    return (w if w > 1 else max(backward + forward, 1)) // 2


def capacity(window):
    """Return the largest number of keys that a query of a causal window sees."""
    w, backward, _ = reach(window)
    return backward + (1 if window.get("exact_windowsize") else w)


def bias_shape(window, n, n_keys, q_offset=0):
    """Return the numbers of rows and columns of a bias."""
    if window["window_size"] is None:
        most = max(q_offset + n, n_keys, 1)
        return 1, most if window.get("causal") else 2 * most - 1
    w, backward, forward = reach(window)
    return w, backward + w + forward


def _bias_places(rules, i, j, columns):
    """Return the row and column of a bias for queries i and keys j; arbitrary columns for keys that are not seen."""
    if rules.window["window_size"] is None:
        w, backward = 1, columns - 1 if rules.window.get("causal") else columns // 2
    else:
        w, backward, _ = reach(rules.window)
    return (i % w)[:, None], np.clip(j - (i // w * w - backward)[:, None], 0, columns - 1)


# Rotary


def _factors(rules, positions, sign):
    """Return the scaled cosines and sines of angles, ``[n, dim / 2]``; ``sign`` is -1 for the xPos scale of keys."""
    rotary = rules.rotary
    dim, m = rotary["dim"], np.arange(rotary["dim"] // 2)
    frequencies = rotary.get("frequencies")
    if frequencies is None:
        frequencies = rotary.get("theta", 1e4) ** (-2 * m / dim)
    angles = np.asarray(positions, np.float64)[:, None] * np.asarray(frequencies)
    size = rotary.get("factor", 1.0)
    if rotary.get("use_xpos"):
        base = rotary.get("scale_base") or default_scale_base(rules.window)
        zeta = (2 * m + 0.4 * dim) / (1.4 * dim)
        size = size * zeta ** (sign * np.asarray(positions, np.float64)[:, None] / base)
    return np.cos(angles) * size, np.sin(angles) * size


def _turn(x, rotary, factors):
    """Rotate x: multiply its pairs, as complex numbers, by factors."""
    if factors is None:
        return x
    (cos, sin), dim = factors, rotary["dim"]
    pairs = (slice(0, dim, 2), slice(1, dim, 2))
    real, imaginary = pairs if rotary.get("interleaved") else (slice(0, dim // 2), slice(dim // 2, dim))
    turned = x.copy()
    turned[..., real] = x[..., real] * cos - x[..., imaginary] * sin
    turned[..., imaginary] = x[..., imaginary] * cos + x[..., real] * sin
    return turned


def _turn_back(x, rotary, factors):
    """Apply the transpose of `_turn`."""
    return x if factors is None else _turn(x, rotary, (factors[0], -factors[1]))


# Shared queries and keys


def _norm(x):
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    return np.where(norm.real > 1e-12, norm, 1e-12), norm.real > 1e-12


def _normalize_back(x, cotangent):
    """Pull back a cotangent through ``x / max(|x|, 1e-12)``."""
    norm, is_long = _norm(x)
    along = ((x / norm) * cotangent).sum(-1, keepdims=True)
    return (cotangent - np.where(is_long, x / norm * along, 0)) / norm


# The call


class Keys(NamedTuple):
    """A group of keys: those of the sequence, the first ones that are kept, or global ones."""

    q_factors: Any
    k_factors: Any
    k: np.ndarray
    v: np.ndarray
    visible: np.ndarray
    bias: Any
    is_self: Any


class Attended(NamedTuple):
    """What the forward computes for each group of keys, and the probability of a sink."""

    groups: list
    weights: list
    products: list
    scores: list
    p_sink: Any
    out: np.ndarray
    log_sum: np.ndarray


def _wide(x):
    x = np.asarray(x)
    return x if np.iscomplexobj(x) else x.astype(np.float64)


def _spread(arrays):
    """Broadcast all arrays to the axes ``[b, h g]``."""
    q, k = _wide(arrays["q"]), arrays["k"]
    lead, group = q.shape[:2], q.shape[1] // max(k.shape[1], 1)

    def heads(x):
        return np.repeat(np.broadcast_to(_wide(x), (*k.shape[:2], *np.shape(x)[-2:])), group, axis=1)

    spread = {"q": q, "k": heads(k), "v": heads(arrays["v"])}
    if "global_keys" in arrays:
        spread["global_k"], spread["global_v"] = map(heads, arrays["global_keys"])
    if "attn_bias" in arrays:
        bias = _wide(arrays["attn_bias"])
        spread["attn_bias"] = np.broadcast_to(bias, (*lead, *bias.shape[-2:]))
    if "sinks" in arrays:
        spread["sinks"] = np.broadcast_to(_wide(arrays["sinks"]), lead)
    if "scale" in arrays:
        spread["scale"] = _wide(arrays["scale"])
    return spread


def _gather(spread, arrays):
    """Sum gradients over the axes that were broadcast."""

    def sum_to(x, shape):
        shape = np.shape(shape)
        group = x.shape[1] // max(shape[-3], 1) if x.ndim > 2 and len(shape) > 2 else 1
        if group > 1 and shape[-3] not in (1, x.shape[1]):
            x = x.reshape(x.shape[0], shape[-3], group, *x.shape[2:]).sum(2)
        x = x.sum(tuple(range(x.ndim - len(shape))))
        shared = tuple(axis for axis, (own, size) in enumerate(zip(shape, x.shape, strict=True)) if own < size)
        return x.sum(shared, keepdims=True)

    gathered = {name: sum_to(spread[name], arrays[name]) for name in arrays if name != "global_keys"}
    if "global_keys" in arrays:
        gathered["global_keys"] = tuple(
            sum_to(spread[name], x) for name, x in zip(("global_k", "global_v"), arrays["global_keys"], strict=True)
        )
    return gathered


def _groups(x, rules, mask, segment_ids, q_segments, global_mask, positions):
    """Return the groups of keys of a call."""
    n, n_keys = x["q"].shape[-2], x["k"].shape[-2]
    i, j = rules.q_offset + np.arange(n), np.arange(n_keys)
    rotary, window = rules.rotary, rules.window
    visible = sees(window, i[:, None], j)
    allowed = np.ones((1, 1, n, n_keys), bool)
    if mask is not None:
        mask = np.asarray(mask)
        allowed = allowed & (mask[:, None, None] if mask.ndim == 2 else mask[:, :, None])
    if segment_ids is not None:
        of_queries = segment_ids if q_segments is None else q_segments
        allowed = allowed & (of_queries[:, None, :, None] == segment_ids[:, None, None])
    shift = reach(window)[2] if rotary and rotary.get("reference") and window["window_size"] else 0
    # Positions count from the first query, where xPos is 1; explicit positions are the keys'.
    turned_q, turned_k = i - rules.q_offset + shift, j - rules.q_offset
    if positions is not None:
        turned_q, turned_k = positions[i], positions[j]
    q_factors, k_factors = (
        (None, None) if rotary is None else (_factors(rules, turned_q, 1), _factors(rules, turned_k, -1))
    )
    is_self, bias = (i[:, None] == j) if rules.shared_qk else None, 0.0
    if "attn_bias" in x:
        bias = x["attn_bias"][(..., *_bias_places(rules, i, j, x["attn_bias"].shape[-1]))]
        allowed = allowed & (bias.real > -np.inf)
        bias = np.where(bias.real > -np.inf, bias, 0)
    groups = [Keys(q_factors, k_factors, x["k"], x["v"], visible & allowed, bias, is_self)]
    if rules.keep_first:
        m = min(rules.keep_first, n_keys)
        if rotary is not None:
            at = np.minimum(i, rules.keep_first + capacity(window) - 1)
            q_factors = _factors(rules, turned_q + at - i, 1)
            k_factors = tuple(factor[:m] for factor in k_factors)
        left = (j[:m] <= i[:, None]) & ~visible[:, :m]
        if segment_ids is not None:
            left = left & (of_queries[:, None, :, None] == segment_ids[:, None, None, :m])
        groups.append(Keys(q_factors, k_factors, x["k"][..., :m, :], x["v"][..., :m, :], left, 0.0, None))
    if "global_k" in x:
        seen = np.ones((1, 1, 1, 1), bool) if global_mask is None else np.asarray(global_mask)[:, None, None]
        groups.append(Keys(None, None, x["global_k"], x["global_v"], seen, 0.0, None))
    return groups


def _attend(x, rules, groups):
    """Compute a call whose arrays are broadcast."""
    q, d = x["q"], x["q"].shape[-1]
    scale = x.get("scale", d**-0.5 if rules.scale is None else rules.scale)
    all_products, all_scores, all_logits, all_visible = [], [], [], []
    for keys in groups:
        k = keys.k / _norm(keys.k)[0] if rules.shared_qk else keys.k
        k = _turn(k, rules.rotary, keys.k_factors)
        products = _turn(q, rules.rotary, keys.q_factors) @ k.swapaxes(-1, -2)
        scores = scale * products
        logits = scores if rules.soft_cap is None else rules.soft_cap * np.tanh(scores / rules.soft_cap)
        logits = logits + keys.bias
        if keys.is_self is not None:
            logits = np.where(keys.is_self, SELF_SCORE, logits)
        all_products.append(products)
        all_scores.append(scores)
        all_logits.append(logits)
        all_visible.append(np.broadcast_to(keys.visible, logits.shape))
    tops = [np.where(v, s.real, -np.inf).max(-1, initial=-np.inf) for v, s in zip(all_visible, all_logits, strict=True)]
    if "sinks" in x:
        tops.append(np.broadcast_to(x["sinks"].real[..., None], tops[0].shape))
    largest = np.max(tops, axis=0)
    largest = np.where(largest == -np.inf, 0, largest)[..., None]
    weights = [
        np.where(visible, np.exp(np.where(visible, logits - largest, 0)), 0)
        for visible, logits in zip(all_visible, all_logits, strict=True)
    ]
    sink = np.exp(x["sinks"][..., None, None] - largest) if "sinks" in x else np.zeros_like(largest)
    total = sum(w.sum(-1, keepdims=True) for w in weights) + sink
    is_empty = total.real == 0
    over = np.where(is_empty, 1, total)
    weights = [w / over for w in weights]
    out = sum(w @ keys.v for w, keys in zip(weights, groups, strict=True))
    log_sum = np.where(is_empty, -np.inf, largest + np.log(over))[..., 0]
    return Attended(groups, weights, all_products, all_scores, sink / over, out, log_sum)


def attend(arrays, rules, **fixed):
    """Compute attention.

    Args:
        arrays: q ``[b, h g, n, d]``, k and v ``[b, h, n, d]``, optionally attn_bias ``[.., w, s]``, sinks ``[h g]``,
            scale ``[]`` and global_keys, a pair of ``[.., h, m, d]``.
        rules: Everything that is not an array.
        **fixed: mask ``[b, n]`` or ``[b, h g, n]``, segment_ids ``[b, n]``, q_segments if queries are not all keys,
            global_mask ``[b, m]``, positions ``[n]`` by which rotary turns keys and their queries.

    Returns:
        The output ``[b, h g, n, d]`` and its log-sum-exp ``[b, h g, n]``, -inf for a query that sees no key.
    """
    x = _spread(arrays)
    done = _attend(x, rules, _all_groups(x, rules, fixed))
    return done.out, done.log_sum


def _all_groups(x, rules, fixed):
    names = ("mask", "segment_ids", "q_segments", "global_mask", "positions")
    assert not fixed.keys() - set(names), fixed.keys()
    return _groups(x, rules, *(fixed.get(name) for name in names))


def pull_back(arrays, rules, d_out, d_log_sum=None, **fixed):
    """Return the gradients of ``sum(out d_out) + sum(log_sum d_log_sum)`` for all arrays, as a tree like them."""
    x = _spread(arrays)
    done = _attend(x, rules, _all_groups(x, rules, fixed))
    scale = x.get("scale", x["q"].shape[-1] ** -0.5 if rules.scale is None else rules.scale)
    kind = np.result_type(*(value.dtype for value in x.values()), np.float64)
    grads = {name: np.zeros(value.shape, kind) for name, value in x.items()}
    d_out = np.asarray(d_out, np.float64)
    d_p = [d_out @ keys.v.swapaxes(-1, -2) for keys in done.groups]
    mean = sum((p * d).sum(-1, keepdims=True) for p, d in zip(done.weights, d_p, strict=True))
    if d_log_sum is not None:
        mean = mean - np.where(np.isfinite(done.log_sum.real), d_log_sum, 0)[..., None]
    for number, keys in enumerate(done.groups):
        p, products = done.weights[number], done.products[number]
        d_logits = p * (d_p[number] - mean)
        if keys.is_self is not None:
            d_logits = np.where(keys.is_self, 0, d_logits)
        if number == 0 and "attn_bias" in x:
            n, n_keys = d_logits.shape[-2:]
            places = _bias_places(rules, rules.q_offset + np.arange(n), np.arange(n_keys), x["attn_bias"].shape[-1])
            np.add.at(grads["attn_bias"], (..., *places), d_logits)
        d_scores = d_logits
        if rules.soft_cap is not None:
            d_scores = d_logits * (1 - np.tanh(done.scores[number] / rules.soft_cap) ** 2)
        if "scale" in x:
            grads["scale"] += (d_scores * products).sum()
        d_products = scale * d_scores
        unit = keys.k / _norm(keys.k)[0] if rules.shared_qk else keys.k
        q = _turn(x["q"], rules.rotary, keys.q_factors)
        k = _turn(unit, rules.rotary, keys.k_factors)
        d_k = _turn_back(d_products.swapaxes(-1, -2) @ q, rules.rotary, keys.k_factors)
        d_k = _normalize_back(keys.k, d_k) if rules.shared_qk else d_k
        is_global = "global_k" in x and number == len(done.groups) - 1
        of_k, of_v = ("global_k", "global_v") if is_global else ("k", "v")
        grads["q"] += _turn_back(d_products @ k, rules.rotary, keys.q_factors)
        grads[of_k][..., : d_k.shape[-2], :] += d_k
        grads[of_v][..., : d_k.shape[-2], :] += p.swapaxes(-1, -2) @ d_out
    if "sinks" in x:
        grads["sinks"] += -(done.p_sink * mean).sum((-1, -2))
    return _gather(grads, arrays)


def _map(fn, *trees):
    """Map over dicts of arrays and pairs of arrays."""
    return {
        name: tuple(fn(*parts) for parts in zip(*(tree[name] for tree in trees), strict=True))
        if isinstance(trees[0][name], tuple)
        else fn(*(tree[name] for tree in trees))
        for name in trees[0]
    }


def _along(arrays, tangents):
    return _map(lambda x, t: np.asarray(x, np.float64) + 1j * STEP * np.asarray(t, np.float64), arrays, tangents)


def push_forward(arrays, tangents, rules, **fixed):
    """Return the directional derivative of the output along tangents."""
    return attend(_along(arrays, tangents), rules, **fixed)[0].imag / STEP


def curvature(arrays, tangents, rules, d_out, **fixed):
    """Return the directional derivative of the gradients along tangents: the Hessian-vector product."""
    grads = pull_back(_along(arrays, tangents), rules, d_out, **fixed)
    return _map(lambda x: x.imag / STEP, grads)
