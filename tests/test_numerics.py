"""Extreme numbers, long sequences and rounding, against the definition in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from flax_local_attention import (
    AttentionOptions,
    KVCache,
    Operands,
    Rotary,
    Window,
    attend,
    cached_attention,
    local_attention,
)
from flax_local_attention.kernels import KernelFamily
from flax_local_attention.kernels.family import to_stored
from tests import definition
from tests.drawn_calls import IMPLEMENTATIONS, NARROW, ON_GPU, Call, as_array, calls
from tests.test_conformance import (
    answer,
    assert_equals_definition,
    compiled,
    defined,
    draw_cotangents,
    draws_of,
    examples,
)

# Without optimisations, XLA has no matrix product of mixed dtypes on a GPU.
pytestmark = [] if ON_GPU else pytest.mark.usefixtures("quick_compile")

# None is the plain path on a CPU; interpreted Mosaic GPU kernels take seconds.
EVERY = pytest.mark.parametrize(
    "name", [name for name in IMPLEMENTATIONS if ON_GPU or name not in ("fastest", "mosaic")]
)
LEAST = float(np.finfo(np.float32).min)
PLAIN = {"window_size": 8, "causal": True, "look_backward": 1, "look_forward": 0, "exact_windowsize": False}
EXACT = PLAIN | {"exact_windowsize": True}


def call_of(name, **fields):
    """Return a call with two rows and heads that an implementation supports."""
    served = IMPLEMENTATIONS[name]
    n = 24 if served.multiple == 1 else 24 // served.multiple * served.multiple
    given = {"window": PLAIN, "n": n, "n_keys": n, "b": 2, "kv_heads": 2, "d": served.widths[0]}
    given |= {"d_value": served.widths[0], "dtype": served.dtypes[0]}
    return Call(name, **given | fields)


def assert_right(call, changes, names=("out", "log_sum", "q", "k", "v"), by_sum=1):
    """Compare results and gradients with the definition; all gradients must be finite.

    Args:
        call: A call.
        changes: Sets of arrays that replace its own.
        names: Names of the results and gradients to compare.
        by_sum: Factor on the cotangent of the log-sum-exp.
    """
    (arrays, fixed), (d_out, d_sum) = call.arrays(), draw_cotangents(call, 0)
    cotangents = d_out, (by_sum * d_sum).astype(d_sum.dtype)
    run = compiled(partial(answer, call))

    def pick(results):
        out, log_sum, gradients = results
        of = {"out": out, "log_sum": log_sum, **gradients}
        return {name: of[name] for name in names}

    for change in changes:
        given = arrays | {of: np.asarray(x).astype(arrays[of].dtype) for of, x in change.items()}
        results = jax.tree.map(np.asarray, run(given, call.traced(fixed), *cotangents))
        for x in jax.tree.leaves((results[0], results[2])):
            assert np.isfinite(np.asarray(x, np.float64)).all()
        assert_equals_definition(call, pick(results), given, lambda x: pick(defined(call, fixed, *cotangents)(x)))


# Scores


@pytest.mark.parametrize("name", [name for name in ("dense", "xla", "tpu") if name in IMPLEMENTATIONS])
def test_the_largest_of_huge_logits_takes_all_the_weight(name):
    """Logits up to 1e37, the query's sign times a number per key; `Triton` and `MosaicGPU` have lower limits."""
    call = call_of(name, scale=1.0)
    arrays, _ = call.arrays()
    order = np.random.RandomState(0).permutation(call.n_keys) / call.n_keys

    def change(size):
        q, k = (np.zeros(arrays[of].shape) for of in "qk")
        q[..., 0], k[..., 0] = np.sign(size) * np.abs(size) ** 0.5, np.abs(size) ** 0.5 * order
        return {"q": q, "k": k}

    assert_right(call, map(change, (1e10, -1e10, 1e37, -1e37)), ("out", "v"))


@pytest.mark.slow_but("dense", "xla")
@EVERY
def test_the_least_bias_shuts_a_key_or_leaves_all_alike(name):
    if "bias" in IMPLEMENTATIONS[name].refuses:
        pytest.skip("adds no bias")
    call = call_of(name, bias="heads")
    arrays, _ = call.arrays()

    def change(size, step):
        bias = np.asarray(arrays["attn_bias"], np.float64)
        bias[:, ::2, ::step] = max(size, float(jnp.finfo(call.dtype).min))
        return {"attn_bias": bias}

    sizes = (-1e4, -1e9, -3e38, LEAST)
    assert_right(call, (change(size, step) for size in sizes for step in (1, 3)), ("out", "v"))


@pytest.mark.slow_but("1e-42-dense", "1e-42-xla")
@EVERY
@pytest.mark.parametrize("cap", [1e-30, 1e-42])
def test_a_soft_cap_near_zero_makes_all_scores_alike(name, cap):
    """Also scores of exactly 0, from keys that are 0."""
    call = call_of(name, soft_cap=cap, mask="rows")
    keys = call.arrays()[0]["k"]
    assert_right(call, [{"k": np.where(np.arange(call.n_keys)[:, None] % 4 == 0, 0, keys)}], ("out", "v"))


@pytest.mark.slow_but("dense", "xla")
@EVERY
def test_a_huge_sink_takes_all_or_nothing(name):
    call = call_of(name, sinks=True, mask="rows")
    changes = [{"sinks": np.array([sink, 0.5])} for sink in (1e30, 3e38, -1e30, -np.inf)]
    assert_right(call, changes, ("out", "q", "k", "v", "sinks"), by_sum=0)


def test_a_total_stays_finite_beside_a_largest_score_of_any_size():
    """Op by op, as on a GPU: XLA on a CPU folds the two constants into one, which rounds nothing."""
    sizes = [1.5, 5e4, 1e30, 2.2e38, LEAST, -1e30]
    stored, factor = zip(*(to_stored(jnp.float32(size)) for size in sizes), strict=True)
    np.testing.assert_allclose(stored, np.array(sizes) * np.log(2), rtol=2e-7)
    assert all(0.5 <= x <= 2 for x in factor)
    assert factor[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow_but("False-dense", "False-xla", "True-triton")
@EVERY
@pytest.mark.parametrize("shared_qk", [False, True])
def test_tiny_queries_and_keys_are_answered(name, shared_qk):
    """Denormal numbers and zeros included."""
    if shared_qk and "shared_qk" in IMPLEMENTATIONS[name].refuses:
        pytest.skip("does not take queries for keys")
    call = call_of(name, shared_qk=shared_qk)
    q, k = (np.asarray(call.arrays()[0][of], np.float64) for of in "qk")
    assert_right(call, ({"q": size * q, "k": size * k} for size in (1e-20, 1e-37, 1e-40, 0)), ("out", "v"))


@EVERY
def test_denormal_values_are_off_by_no_more_than_the_least_normal_number(name):
    call = call_of(name)
    arrays, fixed = call.arrays()
    least = float(jnp.finfo(call.dtype).tiny)
    arrays["v"] = (least / 2 * np.sign(np.asarray(arrays["v"], np.float64))).astype(arrays["v"].dtype)
    out = np.asarray(compiled(call.attend)(arrays, fixed)[0], np.float64)
    assert np.abs(out - definition.attend(arrays, call.rules())[0]).max() <= least


# Positions

LAST = 2**31 - 1
FAR = {
    "sliding": ({"window_size": 1, "causal": True, "look_backward": LAST - 1, "exact_windowsize": True}, False),
    "both ways": ({"window_size": 1, "look_backward": LAST - 9, "look_forward": 5, "exact_windowsize": True}, True),
    "plain": ({"window_size": 1000, "look_backward": LAST // 1000, "look_forward": 1}, False),
    "plain, traced": ({"window_size": 1000, "look_backward": LAST // 1000, "look_forward": 1}, True),
    "without a limit": ({"window_size": None}, False),
    "near": (EXACT, True),
}
"""Windows of queries at the last positions, each with whether the offset is traced."""


@pytest.mark.slow_but("sliding-dense", "sliding-xla", "plain-xla")
@EVERY
@pytest.mark.parametrize("far", FAR)
def test_queries_may_stand_at_the_last_position(name, far):
    (window, traced), served, n = FAR[far], IMPLEMENTATIONS[name], 8
    if traced and "traced_offset" in served.refuses:
        pytest.skip("needs a known offset")
    rotary = {"dim": served.widths[0] // 2 * 2}
    assert_right(
        call_of(name, window=window, n=n, n_keys=16, offset=LAST - n, traced_offset=traced, rotary=rotary), [{}]
    )


@pytest.mark.slow_but("64-*")
@pytest.mark.parametrize("first", [0, LAST - 23, -LAST])
@pytest.mark.parametrize("window_size", [8, 64])
def test_rotary_goes_by_the_last_positions_too(window_size, first):
    window = PLAIN | {"window_size": window_size}
    call = call_of("xla", window=window, rotary={"dim": 4})
    arrays, _ = call.arrays()
    positions = first + np.arange(24)
    options = AttentionOptions(Window(**window), rotary=Rotary(4))
    q, k, v = (jnp.asarray(arrays[of]) for of in "qkv")
    out, _ = attend(Operands.create(q, k, v, options), options, positions=positions[None])
    cache = KVCache.create(options, 2, 2, call.d)
    cached, _ = cached_attention(q, k, v, cache, positions=np.broadcast_to(positions, (2, 24)))
    expected, _ = definition.attend(arrays, call.rules(), positions=positions)
    np.testing.assert_allclose(out[:, :, 0], expected, atol=2e-5)
    np.testing.assert_allclose(cached, expected, atol=2e-5)


@pytest.mark.parametrize("first", [LAST - 22, -LAST - 1])
def test_positions_beyond_the_last_are_refused(first):
    positions = first + np.arange(24, dtype=np.int64)[None]
    options = AttentionOptions(Window(**PLAIN), rotary=Rotary(4))
    q = jnp.ones((1, 1, 24, 4))
    with pytest.raises(ValueError, match=f"`positions` must be at most {LAST}, the last position, got 2147483648"):
        attend(Operands.create(q, q, q, options), options, positions=positions)


# Length


@pytest.mark.slow
def test_a_million_tokens_are_answered_as_the_few_around_them():
    window = PLAIN | {"causal": False, "look_forward": 1}
    n, around, count = 2**20 + 3, 32, 100
    arrays = {of: as_array(seed, "float32", 1, 1, n, 2) for seed, of in enumerate("qkv")}
    cotangent = as_array(9, "float32", 1, 1, n, 2)

    @jax.jit
    def run(arrays):
        attend = partial(local_attention, window=Window(**window), rotary=Rotary(2), implementation="xla")
        out, pull_back = jax.vjp(lambda arrays: attend(**arrays), arrays)
        return out, pull_back(cotangent)[0]

    out, gradients = jax.tree.map(np.asarray, run(arrays))
    rows = [0, 1, n - 2, n - 1, *np.random.RandomState(0).randint(0, n, count)]
    for row in rows:
        first = max(row // 8 * 8 - around, 0)
        near = slice(first, row // 8 * 8 + around + 8)
        part = {of: x[:, :, near] for of, x in arrays.items()}
        rules = definition.Rules(window, rotary={"dim": 2})
        expected, _ = definition.attend(part, rules)
        np.testing.assert_allclose(out[0, 0, row], expected[0, 0, row - first], atol=2e-5)
        expected = definition.pull_back(part, rules, cotangent[:, :, near])
        for of in "qkv":
            np.testing.assert_allclose(gradients[of][0, 0, row], expected[of][0, 0, row - first], atol=1e-4)


# Rounding


def as_a_user_writes_it(call, arrays, fixed):
    """Compute attention as a user would in a narrow dtype: float32 sums and softmax, all else in q's dtype."""
    q, k, v = (jnp.asarray(arrays[of]) for of in "qkv")
    dtype, window = q.dtype, Window(**call.window)
    window = window.fitted(call.n, call.n) if call.bias is None else window.within(call.n)
    i, j = call.offset + jnp.arange(call.n), jnp.arange(call.n_keys)
    if call.rotary is not None:
        rotary = Rotary(**call.rotary)
        q, k = (rotary.turn(x, rotary.query_table(at)) for x, at in ((q, i), (k, j)))
    k, v = (jnp.repeat(x, call.group, axis=1) for x in (k, v))
    scale = call.d**-0.5 if call.scale is None else call.scale
    scores = jnp.einsum("bhid,bhjd->bhij", q, k, preferred_element_type=jnp.float32) * scale
    if call.soft_cap is not None:
        scores = call.soft_cap * jnp.tanh(scores / call.soft_cap)
    if "attn_bias" in arrays:
        rows, columns = window.bias_row(i)[:, None], window.bias_column(i[:, None], j)
        scores = scores + arrays["attn_bias"][..., rows, jnp.clip(columns, 0, window.slab - 1)].astype(jnp.float32)
    seen = jnp.broadcast_to(window.sees(i[:, None], j), scores.shape)
    if "mask" in fixed:
        seen &= fixed["mask"][:, None, None]
    if "segment_ids" in fixed:
        seen &= fixed["segment_ids"][:, None, :, None] == fixed["segment_ids"][:, None, None]
    scores = jnp.where(seen, scores, -1e30)
    if "sinks" in arrays:
        sinks = jnp.broadcast_to(arrays["sinks"][:, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], -1)
    p = jnp.where(seen, jax.nn.softmax(scores)[..., : call.n_keys], 0).astype(dtype)
    return jnp.einsum("bhij,bhjd->bhid", p, v, preferred_element_type=jnp.float32).astype(dtype)


REFUSED = frozenset({"xpos", "reference", "shared_qk", "global_keys", "traced_scale", "head_mask", "offset"})


@pytest.mark.slow
@EVERY
@examples(1)
@given(data=st.data())
def test_errors_in_narrow_dtypes_are_few_times_those_of_plain_code(name, data):
    """At most twice, except gradients of queries, keys and a bias by kernels."""
    served = IMPLEMENTATIONS[name]
    call = data.draw(calls(name, dtypes=NARROW, lengths=(256, 200) if ON_GPU else (64, 40), without=REFUSED))
    call = dataclasses.replace(call, b=2, kv_heads=2, shut=0.0)
    if call.d < 16:
        call = dataclasses.replace(call, d=16, d_value=16, rotary=call.rotary and {"dim": 16})
    event(f"{name} {call.dtype}")
    assert call.dtype in served.dtypes

    def with_gradients(attend):
        def run(arrays, fixed, cotangent):
            out, pull_back = jax.vjp(lambda arrays: attend(arrays, fixed), arrays)
            return {"out": out} | pull_back(cotangent)[0]

        return compiled(run)

    ours = with_gradients(lambda arrays, fixed: call.attend(arrays, fixed)[0])
    peer = with_gradients(partial(as_a_user_writes_it, call))
    squares = {}
    for arrays, fixed, d_out, _ in draws_of(call):
        out, _ = definition.attend(arrays, call.rules(), **fixed)
        exact = {"out": out} | definition.pull_back(arrays, call.rules(), d_out, **fixed)
        results = [run(arrays, fixed, d_out) for run in (ours, peer)]
        for of, right in exact.items():
            found = [np.square(np.asarray(x[of], np.float64) - right).sum() for x in results]
            squares[of] = squares.get(of, 0) + np.array([*found, right.size])
    # Kernels compute gradients of scores from the rounded result, which matters for large logits.
    by_rounded = ("q", "k", "attn_bias") if ON_GPU or isinstance(call.kernels(), KernelFamily) else ()
    least = float(jnp.finfo(call.dtype).eps) / 100  # for a query that sees one key, with probability 1
    for of, (error, allowed, entries) in squares.items():
        times = 8 if of == "sinks" else 4 if of in by_rounded else 2  # sinks have few gradients
        assert error**0.5 <= times * allowed**0.5 + least * entries**0.5, (of, error**0.5, allowed**0.5)
