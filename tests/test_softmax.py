"""The softmax at its extremes: large logits, rows that see nothing, separate sums, float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import (
    AttentionOptions,
    KVCache,
    Rotary,
    Window,
    Windowed,
    cached_attention,
    local_attention,
    merge_attention,
)
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")

N, D, WINDOW = 19, 4, Window(8, causal=True)
LEAST = float(np.finfo(np.float32).min)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["dense", Windowed(8)], ids=["dense", "windowed"])


def qkv(*lead, n=N, d=D, seed=0):
    return tuple(cases.normal(seed + index, *lead, n, d) for index in range(3))


def summed_weights(attend, v):
    """Return the mean sum of a query's probabilities as the gradient recomputes them: its cotangents are ones."""
    out, pull_back = jax.vjp(attend, v)
    return float(pull_back(jnp.ones_like(out))[0].sum()) / out.size


# Probabilities recomputed in a derivative


@pytest.mark.slow_but("-10000.0-windowed")
@IMPLEMENTATIONS
@pytest.mark.parametrize("shut", [-1e4, -1e9, -3e38, LEAST])
def test_weights_of_a_row_shut_by_a_bias_add_up_to_one_in_the_gradient(shut, implementation):
    q, k, v = qkv(1)
    bias = jnp.full((1, WINDOW.window_size, WINDOW.slab), shut)
    attend = partial(cases.local, q, k, window=WINDOW, attn_bias=bias, implementation=implementation)
    assert abs(summed_weights(lambda v: attend(v), v) - 1) < 1e-5


@pytest.mark.slow_but("100.0-windowed")
@IMPLEMENTATIONS
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e12, 1e30])
def test_weights_of_large_scores_add_up_to_one_in_the_gradient(size, implementation):
    _, _, v = qkv(1)
    q = jnp.full((1, N, D), size**0.5)  # equal scores: every key counts, whatever their size
    attend = partial(cases.local, q, q, window=WINDOW, implementation=implementation)
    assert abs(summed_weights(lambda v: attend(v), v) - 1) < 1e-5


@pytest.mark.slow
@IMPLEMENTATIONS
@pytest.mark.parametrize("shift", [1e5, -1e5, 3e6])
def test_derivatives_do_not_depend_on_a_shift_of_all_logits(shift, implementation):
    """Forward, reverse and second derivatives; logits are integers, so that float32 represents them with a shift."""
    n, window = 11, Window(11, look_backward=0, look_forward=0)
    q, v = cases.normal(0, n, D), cases.normal(1, n, D)
    bias = jnp.asarray(np.random.RandomState(2).randint(-4, 4, (n, n)), jnp.float32)
    d_bias, weights = cases.normal(3, n, n), cases.normal(4, n, D)

    def derivatives(shift):
        def attend(bias):
            # With zero queries the logits are the bias.
            return cases.local(0 * q, q, v, window, attn_bias=bias + shift, implementation=implementation)

        gradient = jax.grad(lambda bias: (jnp.sin(attend(bias)) * weights).sum())
        return attend(bias), jax.jvp(attend, (bias,), (d_bias,))[1], jax.jvp(gradient, (bias,), (d_bias,))

    ours, expected = jax.jit(lambda: (derivatives(shift), derivatives(0.0)))()
    assert np.abs(expected[2][1]).max() > 1e-2
    cases.assert_close(ours, expected)


@pytest.mark.slow_but("dense")
@IMPLEMENTATIONS
def test_a_sink_far_above_all_logits_takes_all_the_weight_in_both_passes(implementation):
    q, k, v = qkv(1)
    sinks = jnp.full(1, 1e6)
    attend = partial(cases.local, q, k, window=WINDOW, sinks=sinks, implementation=implementation)
    np.testing.assert_array_equal(attend(v), 0)
    assert summed_weights(lambda v: attend(v), v) == 0


def test_the_cache_shares_the_step():
    q, k, v = qkv(1, 1)
    bias = jnp.full((1, WINDOW.window_size, WINDOW.slab), -1e9)
    cache = KVCache.create(WINDOW, 1, 1, D)
    assert abs(summed_weights(lambda v: cached_attention(q, k, v, cache, attn_bias=bias)[0], v) - 1) < 1e-5


# Sums


@pytest.mark.slow_but("features0-*")
@IMPLEMENTATIONS
@pytest.mark.parametrize("features", [(), ("mask", "rotary", "soft_cap", "sinks", "grouped"), ("segment_ids", "bias")])
def test_sums_are_those_of_the_softmax(features, implementation):
    """With values of one, the output is the share of the total probability that keys have."""
    window = Window(5, look_backward=2, look_forward=1)
    arrays, traced, options = cases.draw_call(features, window, 23)
    arrays["v"] = jnp.ones_like(arrays["v"])
    call = partial(local_attention, window=window, autopad=True, implementation=implementation, **traced, **options)
    out, log_sum = call(**arrays, return_log_sum=True)
    assert log_sum.largest.shape == log_sum.total.shape == out.shape[:-1]
    sinks = arrays.pop("sinks", None)
    if sinks is not None:  # the sum includes the sink, the output does not
        _, without = call(**arrays, return_log_sum=True)
        share = np.exp(without.log_sum_exp() - log_sum.log_sum_exp())
        cases.assert_close(out[..., 0], share)
        both = jnp.logaddexp(without.log_sum_exp(), sinks[None, :, None])
        cases.assert_close(log_sum.log_sum_exp(), both)
    shifted = call(**arrays | {"q": 0 * arrays["q"]}, return_log_sum=True)[1] if not features else None
    if shifted is not None:  # with logits 0 the sum counts the visible keys
        i = np.arange(23)
        counts = np.minimum(window.stop(i), 23) - np.maximum(window.start(i), 0)
        cases.assert_close(jnp.exp(shifted.log_sum_exp()), np.broadcast_to(counts, out.shape[:-1]))


@IMPLEMENTATIONS
def test_the_sum_of_a_query_that_sees_nothing_is_zero(implementation):
    q, k, v = qkv()
    mask = jnp.arange(N) > 4
    out, log_sum = cases.local(q, k, v, WINDOW, mask=mask, implementation=implementation, return_log_sum=True)
    np.testing.assert_array_equal(log_sum.total[:5], 0)
    np.testing.assert_array_equal(log_sum.log_sum_exp()[:5], -np.inf)
    assert np.isfinite(log_sum.largest).all()
    assert (log_sum.total[5:] > 0).all()
    np.testing.assert_array_equal(out[:5], 0)


def test_without_keys_sums_are_zero():
    _, log_sum = cases.local(*(jnp.ones((2, n, 4)) for n in (5, 0, 0)), WINDOW, return_log_sum=True)
    np.testing.assert_array_equal(log_sum.total, np.zeros((2, 5)))


def test_without_keys_sums_are_those_of_the_sinks():
    q, k, sinks = jnp.ones((2, 5, 4)), jnp.ones((2, 0, 4)), jnp.array([3.0, -1.0])

    def sums(sinks):
        return cases.local(q, k, k, WINDOW, sinks=sinks, return_log_sum=True)[1].log_sum_exp()

    cases.assert_close(sums(sinks), np.repeat(sinks[:, None], 5, 1))
    cases.assert_close(jax.grad(lambda sinks: sums(sinks).sum())(sinks), np.full(2, 5.0))


@pytest.mark.slow
@IMPLEMENTATIONS
def test_the_gradient_of_the_log_sum_is_the_softmax(implementation):
    q, k, v = qkv()
    weights = cases.normal(5, N)

    def loss(q):
        log_sum = cases.local(q, k, v, WINDOW, implementation=implementation, return_log_sum=True)[1]
        return (weights * log_sum.log_sum_exp()).sum()

    def written_out(q):
        visible = WINDOW.sees(jnp.arange(N)[:, None], jnp.arange(N)[None])
        logits = jnp.where(visible, q @ k.T / D**0.5, -jnp.inf)
        return (weights * jax.nn.logsumexp(logits, axis=1)).sum()

    cases.assert_close(jax.value_and_grad(loss)(q), jax.value_and_grad(written_out)(q))
    cases.assert_close(jax.hessian(loss)(q), jax.hessian(written_out)(q))


def halves(q, k, v, **options):
    """Attend to the keys at even and at odd positions separately."""
    even = jnp.arange(k.shape[-2]) % 2 == 0
    return [cases.in_blocks(q, k, v, WINDOW, mask=mask, return_log_sum=True, **options) for mask in (even, ~even)]


def test_merged_parts_are_the_whole_with_their_derivatives():
    arrays = dict(zip("qkv", qkv(2, 3), strict=True))
    cotangent = cases.normal(7, 2, 3, N, D)
    tangents = dict(zip("qkv", qkv(2, 3, seed=11), strict=True))

    def whole(q, k, v):
        return cases.in_blocks(q, k, v, WINDOW)

    def merged(q, k, v):
        return merge_attention(halves(q, k, v))[0]

    @jax.jit
    def both(arrays, tangents):
        def everything(fn):
            def gradient(arrays):
                return cases.value_and_pullback(fn, arrays, cotangent)

            return jax.jvp(gradient, (arrays,), (tangents,))

        return everything(merged), everything(whole)

    cases.assert_close(*both(arrays, tangents))


def test_merging_is_associative_and_one_part_is_itself():
    q, k, v = qkv(2)
    thirds = [cases.local(q, k, v, WINDOW, mask=jnp.arange(N) % 3 == part, return_log_sum=True) for part in range(3)]
    cases.assert_close(merge_attention([merge_attention(thirds[:2]), thirds[2]])[0], cases.local(q, k, v, WINDOW))
    out, log_sum = merge_attention(thirds[:1])
    cases.assert_close(out, thirds[0][0])
    cases.assert_close(log_sum.log_sum_exp()[:, 3:], thirds[0][1].log_sum_exp()[:, 3:])


def test_merged_parts_far_apart_do_not_overflow():
    q, k, v = qkv(1)
    bias = jnp.full((1, WINDOW.window_size, WINDOW.slab), 1e6)
    near = cases.local(q, k, v, WINDOW, return_log_sum=True)
    far = cases.local(q, k, 2 * v, WINDOW, attn_bias=bias, return_log_sum=True)
    cases.assert_close(merge_attention([near, far])[0], far[0])


def test_parts_that_see_nothing_merge_to_zeros_without_gradient():
    q, k, v = qkv(1)

    def loss(v):
        parts = [cases.local(q, k, v, WINDOW, mask=jnp.zeros((1, N), bool), return_log_sum=True) for _ in range(2)]
        return merge_attention(parts)[0]

    out, pull_back = jax.vjp(loss, v)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(pull_back(jnp.ones_like(out))[0], 0)


@pytest.mark.parametrize(
    ("parts", "phrase"),
    [([], "at least one pair"), ([(0, 0), (0, 1)], "must all be of one shape"), ([(1, 0)], "must all be of one shape")],
)
def test_parts_that_do_not_fit_are_refused(parts, phrase):
    made = [cases.local(*qkv(2), WINDOW, return_log_sum=True), cases.local(*qkv(3), WINDOW, return_log_sum=True)]
    with pytest.raises(ValueError, match=phrase):
        merge_attention([(made[out][0], made[log_sum][1]) for out, log_sum in parts])


# float64


@pytest.mark.slow
@pytest.mark.parametrize("features", [(), cases.EVERYTHING, cases.EVERYTHING_PACKED], ids=cases.features_id)
def test_gradients_pass_checks_in_float64(features):
    """Central differences in float64 are accurate to about 1e-9; float32 anywhere inside would leave 1e-5."""
    with jax.enable_x64(True):
        window = Window(5, causal=True, look_backward=2)
        arrays, traced, options = cases.draw_call(features, window, 23)
        arrays = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
        tangents = jax.tree.map(lambda x: jnp.asarray(np.random.RandomState(3).standard_normal(x.shape)), arrays)
        cotangent = jnp.asarray(np.asarray(cases.draw_cotangent(arrays), np.float64))

        def attend(arrays):
            return cases.in_blocks(**arrays, **traced, **options, window=window)

        def loss(arrays, step):
            moved = jax.tree.map(lambda x, t: x + step * t, arrays, tangents)
            return jnp.vdot(attend(moved), cotangent)

        step = 1e-4
        near, far = ((loss(arrays, s) - loss(arrays, -s)) / (2 * s) for s in (step, 2 * step))
        numerical = (4 * near - far) / 3  # Richardson extrapolation: a fourth-order error
        slope = jax.jvp(attend, (arrays,), (tangents,))[1]
        gradient = jax.vjp(attend, arrays)[1](cotangent)[0]
        reverse = sum(map(jnp.vdot, jax.tree.leaves(gradient), jax.tree.leaves(tangents)))
        forward = jnp.vdot(slope, cotangent)
        assert attend(arrays).dtype == slope.dtype == jnp.float64
        np.testing.assert_allclose(forward, reverse, rtol=1e-12)
        np.testing.assert_allclose(reverse, numerical, rtol=1e-9, atol=1e-9)


@pytest.mark.slow_but("dense")
@pytest.mark.parametrize("implementation", ["dense", None, Windowed(8)], ids=str)
def test_float64_is_computed_in_float64(implementation):
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.random.RandomState(seed).standard_normal((2, N, D))) for seed in range(3))
        out = cases.local(q, k, v, WINDOW, implementation=implementation)
        assert out.dtype == jnp.float64
        for head in range(2):
            np.testing.assert_allclose(out[head], cases.by_loops(q[head], k[head], v[head], WINDOW), atol=1e-14)


@pytest.mark.slow
def test_decoding_is_float64_with_a_cache_of_float64():
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.random.RandomState(seed).standard_normal((1, 2, N, D))) for seed in range(3))
        options = AttentionOptions(WINDOW, rotary=Rotary(D))
        out, cache = cached_attention(q, k, v, KVCache.create(options, 1, 2, D, dtype=jnp.float64))
        assert out.dtype == cache.k.dtype == jnp.float64
        np.testing.assert_allclose(out, cases.local(q, k, v, WINDOW, rotary=options.rotary), atol=1e-13)


def test_float64_of_numpy_is_float32_without_x64_and_without_a_warning(recwarn):
    x = np.random.RandomState(0).standard_normal((1, 16, 4))
    with jax.enable_x64(False):
        assert local_attention(x, x, x, window_size=8).dtype == jnp.float32
    assert not recwarn.list
