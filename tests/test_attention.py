"""`local_attention` as users call it: shapes, dtypes, transformations, peers and errors."""

import dataclasses
import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import (
    AttentionOptions,
    Dense,
    LocalAttention,
    LocalMHA,
    Operands,
    Rotary,
    Triton,
    Unsupported,
    Window,
    Windowed,
    attend,
    local_attention,
    rotate,
)
from flax_local_attention.kernels import IMPLEMENTATIONS
from tests import cases
from tests.cases import PLACES

pytestmark = pytest.mark.usefixtures("quick_compile")

CAUSAL = Window(3, causal=True)


def random_qkv(*shape, seed=0):
    return tuple(cases.normal(seed + index, *shape) for index in range(3))


# Who sees whom, by gradient


@pytest.mark.slow_but("w5-back3-*")
@pytest.mark.parametrize("place", [place for place in PLACES if 5 < place.n < 100][::3], ids=str)
def test_receptive_field_is_the_window(place):
    window, n = place.window, place.n
    q, k, v = random_qkv(n, 4)

    @jax.jit
    def dependence(k, v):
        """Return whether query i depends on the value of key j, and on the key itself, ``[i, j]``."""

        def fn(k, v):
            return cases.in_blocks(q, k, v, window) @ jnp.array([1.0, -2.0, 0.5, 3.0])

        by_key, by_value = jax.jacrev(fn, argnums=(0, 1))(k, v)
        return jnp.abs(by_key).max(-1), jnp.abs(by_value).max(-1)

    by_key, by_value = dependence(k, v)
    seen = window.sees(np.arange(n)[:, None], np.arange(n))
    np.testing.assert_array_equal(np.asarray(by_value) != 0, seen)
    several = seen.sum(1) > 1  # the probability of a single key is 1 whatever its score
    np.testing.assert_array_equal((np.asarray(by_key) != 0)[several], seen[several])


@pytest.mark.slow_but("exact-rotary")
@pytest.mark.parametrize("rotary", [None, Rotary(4), Rotary(4, use_xpos=True)], ids=["plain", "rotary", "xpos"])
@pytest.mark.parametrize("window", [CAUSAL, Window(3, causal=True, exact_windowsize=True)], ids=["plain", "exact"])
def test_moving_by_whole_windows_changes_nothing(window, rotary):
    q, k, v = random_qkv(2, 13, 4)
    moved = [jnp.concatenate([jnp.full((2, 9, 4), 7.0), x], axis=1) for x in (q, k, v)]
    mask = jnp.broadcast_to(jnp.arange(22) >= 9, (2, 22))
    here = cases.in_blocks(q, k, v, window, rotary=rotary)
    there = cases.in_blocks(*moved, window, rotary=rotary, mask=mask)[:, 9:]
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-6)


@pytest.mark.slow_but("*causal=True*")
@pytest.mark.parametrize("window", [CAUSAL, Window(3), Window(3, exact_windowsize=True)], ids=str)
def test_padding_changes_nothing(window):
    q, k, v = random_qkv(2, 3, 11, 4)
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=9.0) for x in (q, k, v)]
    mask = jnp.broadcast_to(jnp.arange(15) < 11, (2, 15))
    out = cases.local(*padded, window, mask=mask)[:, :, :11]
    np.testing.assert_allclose(out, cases.local(q, k, v, window), rtol=0, atol=1e-6)


@pytest.mark.slow_but("*causal=True*")
@pytest.mark.parametrize(
    "window",
    [
        Window(13),
        Window(17, causal=True),
        Window(13, exact_windowsize=True),
        Window(19, causal=True, exact_windowsize=True),
    ],
    ids=str,
)
def test_short_sequences_get_full_attention(window):
    q, k, v = random_qkv(2, 13, 3, 4)
    full = jax.nn.dot_product_attention(q, k, v, is_causal=window.causal)
    ours = cases.local(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), window)
    cases.assert_close(jnp.swapaxes(ours, 1, 2), full)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    q, k, v = random_qkv(1, 11, 2)
    mask = jnp.arange(11)[None] > 4  # queries 0 to 4 of a causal window see nothing
    tangents = random_qkv(1, 11, 2, seed=7)
    cotangent = cases.normal(11, 1, 11, 2)

    def attend(q, k, v):
        return cases.in_blocks(q, k, v, CAUSAL, mask=mask, rotary=Rotary(2))

    def gradient(q, k, v):
        return jax.vjp(attend, q, k, v)[1](cotangent)

    @jax.jit
    def everything(q, k, v):
        return jax.jvp(attend, (q, k, v), tangents), jax.jvp(gradient, (q, k, v), tangents)

    (out, moved), (first, second) = everything(q, k, v)
    for x in (out, moved, first[0], second[0]):
        np.testing.assert_array_equal(x[:, :5], 0)
        assert (x[:, 6:] != 0).any()
    assert all(np.isfinite(x).all() for x in (*first, *second))


# Lengths and shapes


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (0, 3, 5, 4), (2, 0, 5, 4), (0, 4)])
def test_empty_inputs_give_empty_results(shape):
    x = jnp.zeros(shape)
    out, pull = jax.vjp(lambda x: cases.local(x, x, x, CAUSAL), x)
    assert out.shape == pull(out)[0].shape == shape


def test_without_keys_a_mask_says_nothing():
    q, k, mask = jnp.ones((2, 3, 5, 4)), jnp.ones((2, 3, 0, 4)), jnp.ones((2, 0), bool)
    np.testing.assert_array_equal(local_attention(q, k, k, window_size=3, causal=True, mask=mask), 0)


def test_without_keys_queries_get_zeros():
    q, k = jnp.ones((2, 5, 4)), jnp.zeros((2, 0, 4))
    np.testing.assert_array_equal(cases.local(q, k, k, CAUSAL), 0)


def test_one_token_gets_its_own_value():
    q, k, v = random_qkv(2, 1, 4)
    cases.assert_close(cases.local(q, k, v, CAUSAL), v)


def test_any_leading_axes():
    q, k, v = random_qkv(2, 3, 5, 11, 4)
    expected = cases.local(q, k, v, CAUSAL)
    for lead in ((30,), (6, 5), (2, 3, 5)):
        ours = cases.local(*(x.reshape(*lead, 11, 4) for x in (q, k, v)), CAUSAL)
        cases.assert_close(ours.reshape(expected.shape), expected)
    cases.assert_close(cases.local(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0], CAUSAL), expected[0, 0, 0])


@pytest.mark.slow
def test_mask_lines_up_from_the_left():
    b, h, n = 2, 3, 11
    q, k, v = random_qkv(b, h, n, 4)
    mask = cases.normal(5, b, n) > 0
    full = jnp.broadcast_to(mask[:, None], (b, h, n))
    expected = jnp.stack([cases.definition(q[i], k[i], v[i], CAUSAL, mask=full[i]) for i in range(b)])
    cases.assert_close(cases.local(q, k, v, CAUSAL, mask=mask), expected)
    cases.assert_close(cases.local(q, k, v, CAUSAL, mask=full), expected)
    shared = cases.local(q, k, v, CAUSAL, mask=mask[:1])
    cases.assert_close(shared, cases.local(q, k, v, CAUSAL, mask=jnp.broadcast_to(mask[:1], (b, n))))
    cases.assert_close(shared, cases.local(q, k, v, CAUSAL, mask=mask[0]))


@pytest.mark.slow_but("(3,)", "(2, 1)")
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 1), (1, 3), (2, 3)], ids=str)
def test_bias_lines_up_from_the_right(lead):
    q, k, v = random_qkv(2, 3, 11, 4)
    bias = cases.normal(5, *lead, 3, CAUSAL.slab)
    full = jnp.broadcast_to(bias, (2, 3, 3, CAUSAL.slab))
    rows = [
        [cases.definition(q[b, h], k[b, h], v[b, h], CAUSAL, attn_bias=full[b, h]) for h in range(3)] for b in range(2)
    ]
    cases.assert_close(cases.local(q, k, v, CAUSAL, attn_bias=bias), jnp.array(rows))


def test_sinks_line_up_with_heads():
    q, k, v = random_qkv(2, 3, 11, 4)
    sinks = jnp.array([-1.0, 0.5, 2.0])
    ours = cases.local(q, k, v, CAUSAL, sinks=sinks)
    for h in range(3):
        cases.assert_close(ours[:, h], cases.local(q[:, h], k[:, h], v[:, h], CAUSAL, sinks=sinks[h]))


def test_grouped_heads_serve_neighbours():
    q, k, v = cases.normal(0, 2, 6, 11, 4), cases.normal(1, 2, 3, 11, 4), cases.normal(2, 2, 3, 11, 4)
    repeated = (jnp.repeat(x, 2, axis=1) for x in (k, v))
    cases.assert_close(cases.local(q, k, v, CAUSAL), cases.local(q, *repeated, CAUSAL))


def test_chunks_of_queries_are_the_rows_of_the_whole():
    q, k, v = random_qkv(2, 23, 4)
    bias = cases.normal(5, 3, CAUSAL.slab)
    whole = cases.in_blocks(q, k, v, CAUSAL, rotary=Rotary(4), attn_bias=bias)

    @jax.jit
    def chunk(q, offset):
        return cases.in_blocks(q, k, v, CAUSAL, rotary=Rotary(4), attn_bias=bias, q_offset=offset)

    for offset in (0, 4, 14):
        cases.assert_close(chunk(q[:, offset : offset + 9], offset), whole[:, offset : offset + 9])


# Dtypes


@pytest.mark.slow_but("plain-*")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("features", [(), cases.EVERYTHING, cases.EVERYTHING_PACKED], ids=cases.features_id)
def test_half_precision_stays_within_the_table(dtype, features):
    window = Window(5, causal=True)
    arrays, traced, options = cases.draw_call(features, window, 23)
    halves = jax.tree.map(lambda x: x.astype(dtype), arrays)
    cotangent = cases.draw_cotangent(arrays)

    @jax.jit
    def both(halves, traced):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), halves)
        ours, definition = (partial(fn, window=window, **traced, **options) for fn in (cases.local, cases.definition))
        return cases.value_and_pullback(ours, halves, cotangent), cases.value_and_pullback(definition, wide, cotangent)

    ours, expected = both(halves, traced)
    assert ours[0].dtype == dtype
    assert {str(x.dtype) for x in jax.tree.leaves(ours[1])} == {dtype}
    cases.assert_close(ours, expected, dtype)


@pytest.mark.slow_but("dtypes1")
@pytest.mark.parametrize(
    "dtypes",
    [("bfloat16", "float32", "float32"), ("float32", "bfloat16", "bfloat16"), ("float16", "float32", "bfloat16")],
)
def test_the_result_has_the_dtype_of_q(dtypes):
    q, k, v = (x.astype(dtype) for x, dtype in zip(random_qkv(2, 11, 4), dtypes, strict=True))
    out = cases.local(q, k, v, CAUSAL, rotary=Rotary(4))
    assert out.dtype == dtypes[0]
    expected = cases.definition(*(x.astype(jnp.float32) for x in (q, k, v)), CAUSAL, rotary=Rotary(4))
    cases.assert_close(out, expected, "bfloat16")


def test_numpy_arrays_serve():
    q, k, v = random_qkv(2, 9, 4)
    mask = np.arange(9)[None] > 2
    ours = cases.local(*map(np.asarray, (q, k, v)), CAUSAL, mask=mask)
    cases.assert_close(ours, cases.local(q, k, v, CAUSAL, mask=jnp.asarray(mask)))


# Transformations


@pytest.mark.slow
def test_second_derivatives_equal_those_of_the_definition():
    x, weights = cases.normal(0, 7, 2), cases.normal(1, 7, 2)

    def loss(attention):
        bias = cases.normal(2, 3, CAUSAL.slab)
        return lambda x: (weights * attention(x, x[::-1], x * x, CAUSAL, attn_bias=bias, rotary=Rotary(2))).sum()

    ours, expected = jax.jit(lambda x: [jax.hessian(loss(fn))(x) for fn in (cases.local, cases.definition)])(x)
    assert np.abs(expected).max() > 0.1
    cases.assert_close(ours, expected)


def test_forward_derivatives_equal_those_of_the_definition():
    primals, tangents = random_qkv(2, 13, 4), random_qkv(2, 13, 4, seed=5)

    @jax.jit
    def both(primals, tangents):
        return [jax.jvp(partial(fn, window=CAUSAL), primals, tangents) for fn in (cases.local, cases.definition)]

    ours, expected = both(primals, tangents)
    cases.assert_close(ours, expected)


@pytest.mark.slow
def test_vmap_is_one_more_axis():
    q, k, v = random_qkv(5, 2, 3, 11, 4)
    mask = cases.normal(7, 5, 2, 11) > 0
    sinks = cases.normal(8, 5, 3)
    ours = jax.vmap(lambda q, k, v, mask, sinks: cases.in_blocks(q, k, v, CAUSAL, mask=mask, sinks=sinks))(
        q, k, v, mask, sinks
    )
    for row in range(5):
        expected = cases.definition(q[row], k[row], v[row], CAUSAL, mask=mask[row], sinks=sinks[row])
        cases.assert_close(ours[row], expected)


# Features of published models, together
PUBLISHED = [
    ("wide_values", "global_keys", "interleaved", "mask"),
    ("wide_values", "global_keys", "part_rotary", "sinks"),
]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", Triton(interpret=True)], ids=["xla", "triton"])
@pytest.mark.parametrize("features", PUBLISHED, ids=cases.features_id)
def test_vmap_and_remat_of_what_published_models_need_change_nothing(features, implementation):
    window = Window.sliding(6)
    draws = [cases.draw_call(features, window, 17, seed) for seed in (0, 20)]
    arrays, traced = (jax.tree.map(lambda *x: jnp.stack(x), *parts) for parts in list(zip(*draws, strict=True))[:2])
    cotangent, options = cases.draw_cotangent(draws[0][0]), draws[0][2]

    @jax.jit
    def both(arrays, traced):
        def of(by, wrap):
            def gradient(arrays, traced):
                fn = wrap(lambda **arrays: by(**arrays, **traced, window=window, **options))
                return cases.value_and_pullback(fn, arrays, cotangent)

            return gradient

        ours = of(partial(cases.local, implementation=implementation), jax.checkpoint)
        row = jax.tree.map(lambda x: x[1], (arrays, traced))
        return jax.tree.map(lambda x: x[1], jax.vmap(ours)(arrays, traced)), of(cases.definition, lambda fn: fn)(*row)

    cases.assert_close(*both(arrays, traced))


@pytest.mark.slow
@pytest.mark.parametrize("features", PUBLISHED, ids=cases.features_id)
def test_second_derivatives_of_what_published_models_need_equal_those_of_the_definition(features):
    arrays, traced, options = cases.draw_call(features, CAUSAL, 11)
    cotangent, along = cases.draw_cotangent(arrays), jax.tree.map(lambda x: cases.normal(3, *x.shape), arrays)

    def again(by):
        def loss(arrays):
            return jnp.vdot(jnp.tanh(by(**arrays, **traced, window=CAUSAL, **options)), cotangent)

        return jax.jvp(jax.grad(loss), (arrays,), (along,))[1]

    cases.assert_close(*jax.jit(lambda: [again(by) for by in (cases.in_blocks, cases.definition)])())


@pytest.mark.slow
def test_vmap_over_offsets():
    q, k, v = cases.normal(0, 3, 5, 4), cases.normal(1, 13, 4), cases.normal(2, 13, 4)
    offsets = jnp.array([0, 4, 8])
    bias = cases.normal(3, 3, CAUSAL.slab)
    ours = jax.vmap(lambda q, offset: cases.local(q, k, v, CAUSAL, q_offset=offset, attn_bias=bias))(q, offsets)
    for row, offset in enumerate((0, 4, 8)):
        cases.assert_close(ours[row], cases.definition(q[row], k, v, CAUSAL, q_offset=offset, attn_bias=bias))


@pytest.mark.slow
def test_remat_and_scan_around_it_change_nothing():
    x, cotangent = cases.normal(0, 2, 11, 4), cases.normal(1, 2, 11, 4)

    def layer(x, scale):
        return x + cases.in_blocks(x, x, x, CAUSAL, rotary=Rotary(4), scale=scale)

    scales = jnp.array([0.3, 0.5, 0.7])

    def scanned(x):
        return jax.lax.scan(lambda x, scale: (jax.checkpoint(layer)(x, scale), None), x, scales)[0]

    def unrolled(x):
        for scale in (0.3, 0.5, 0.7):
            x = layer(x, scale)
        return x

    ours, expected = jax.jit(
        lambda x: [cases.value_and_pullback(fn, {"x": x}, cotangent) for fn in (scanned, unrolled)]
    )(x)
    cases.assert_close(ours, expected)


# Peers


@pytest.mark.slow_but("*causal=True*")
@pytest.mark.parametrize(
    "window", [Window(3, causal=True, exact_windowsize=True), Window(3, exact_windowsize=True)], ids=str
)
def test_agrees_with_jax_nn_on_grouped_heads_and_a_sliding_window(window):
    q, k, v = cases.normal(0, 2, 17, 6, 4), cases.normal(1, 2, 17, 3, 4), cases.normal(2, 2, 17, 3, 4)
    theirs = jax.nn.dot_product_attention(q, k, v, local_window_size=(window.backward, window.forward))
    ours = cases.local(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), window)
    cases.assert_close(jnp.swapaxes(ours, 1, 2), theirs)


def test_agrees_with_jax_nn_on_a_bias_and_a_mask():
    n, window = 11, Window(11, causal=True, look_backward=0)
    q, k, v = random_qkv(2, n, 3, 4)
    bias, mask = cases.normal(3, 3, n, n), cases.normal(4, 2, n) > -1
    mask = mask.at[:, 0].set(True)
    theirs = jax.nn.dot_product_attention(q, k, v, bias=bias[None], mask=mask[:, None, None], is_causal=True)
    ours = cases.local(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), window, attn_bias=bias, mask=mask)
    cases.assert_close(jnp.swapaxes(ours, 1, 2), theirs)


def test_agrees_with_the_window_rule_of_mistral():
    # transformers, masking_utils.sliding_window_overlay: `q_idx - sliding_window < kv_idx`, and causal.
    n, sliding_window = 17, 5
    window = Window(sliding_window - 1, causal=True, exact_windowsize=True)
    i, j = np.arange(n)[:, None], np.arange(n)
    np.testing.assert_array_equal(window.sees(i, j), (j <= i) & (i - sliding_window < j))


def test_soft_cap_and_sinks_are_their_formulas():
    q, k, v = random_qkv(2, 17, 4)
    sinks = jnp.array([0.7, -1.0])
    ours = cases.local(q, k, v, CAUSAL, logits_soft_cap=0.8, sinks=sinks)
    expected = [cases.by_loops(q[h], k[h], v[h], CAUSAL, soft_cap=0.8, sink=sinks[h]) for h in range(2)]
    cases.assert_close(ours, np.stack(expected))


@pytest.mark.parametrize("window", [CAUSAL, Window(3, look_backward=2, look_forward=2)], ids=str)
def test_alibi_from_relative_positions(window):
    q, k, v = random_qkv(2, 17, 4)
    slopes = np.array([0.5, 0.25], np.float32)
    bias = -slopes[:, None, None] * np.abs(window.relative_positions())
    ours = cases.local(q, k, v, window, attn_bias=jnp.asarray(bias))
    for h in range(2):
        expected = cases.by_loops(q[h], k[h], v[h], window, bias=lambda i, j, h=h: -slopes[h] * abs(i - j))
        cases.assert_close(ours[h], expected)


def t5_bucket(distance, buckets=8, most=16):
    """Return the bucket of one signed distance, key minus query (T5, arXiv 1910.10683, bidirectional)."""
    half = buckets // 2
    side, near = half * (distance > 0), half // 2
    distance = abs(distance)
    if distance < near:
        return side + distance
    far = near + int(np.log(distance / near) / np.log(most / near) * (half - near))
    return side + min(far, half - 1)


def test_t5_buckets_from_relative_positions():
    window = Window(5, look_backward=2, look_forward=2)
    q, k, v = random_qkv(1, 23, 4)
    table = cases.normal(4, 8)
    buckets = np.vectorize(t5_bucket)(window.relative_positions())
    ours = cases.local(q, k, v, window, attn_bias=table[buckets])
    expected = cases.by_loops(q[0], k[0], v[0], window, bias=lambda i, j: float(table[t5_bucket(j - i)]))
    cases.assert_close(ours[0], expected)


# Dropout


def dropped_weights(rng, rate, b=2, h=3, n=19, window=CAUSAL, attend=cases.local):
    """Return the probabilities ``[b, h, i, j]``: values are one-hot."""
    q, k = cases.normal(0, b, h, n, n), cases.normal(1, b, h, n, n)
    v = jnp.broadcast_to(jnp.eye(n), (b, h, n, n))
    kept = attend(q, k, v, window)
    return kept, attend(q, k, v, window, dropout_rate=rate, dropout_rng=rng)


def test_dropout_drops_probabilities_or_scales_them_up():
    p, dropped = dropped_weights(jax.random.key(0), 0.4)
    is_kept = np.asarray(dropped) != 0
    cases.assert_close(np.asarray(dropped)[is_kept], np.asarray(p)[is_kept] / 0.6)
    share = 1 - is_kept.sum() / (np.asarray(p) != 0).sum()
    assert 0.33 < share < 0.47


def test_dropout_keeps_the_expectation():
    p, _ = dropped_weights(jax.random.key(0), 0.4, n=11)

    @jax.jit
    def mean(keys):
        return jax.vmap(lambda key: dropped_weights(key, 0.4, n=11)[1])(keys).mean(0)

    np.testing.assert_allclose(mean(jax.random.split(jax.random.key(1), 2000)), p, atol=0.08)


def test_dropout_differs_between_heads_and_blocks_and_repeats_by_key():
    window = Window(cases.SMALL_BLOCK, causal=True, look_backward=0)  # a block is a window
    first, again, other = (
        dropped_weights(jax.random.key(seed), 0.5, n=16, window=window, attend=cases.in_blocks)[1] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    kept = np.asarray(first).reshape(6, 2, 8, 2, 8) != 0
    patterns = {kept[head, block, :, block].tobytes() for head in range(6) for block in range(2)}
    assert len(patterns) == 12


@pytest.mark.slow
def test_dropout_has_the_gradient_of_what_was_kept():
    q, k, v = random_qkv(1, 13, 4)

    def loss(v):
        return cases.in_blocks(q, k, v, CAUSAL, dropout_rate=0.5, dropout_rng=jax.random.key(3)).sum()

    # The result is linear in the values, so a gradient drawn from the same pattern gives the loss back.
    cases.assert_close((jax.grad(loss)(v) * v).sum(), loss(v))


# Errors

X = np.zeros((2, 3, 8, 4), np.float32)
OK = {"q": X, "k": X, "v": X, "window_size": 4, "causal": True}

ERRORS = [
    ({"q": [[0.0]]}, TypeError, "`q` must be an array, got [[0.0]] of type list"),
    ({"k": None}, TypeError, "`k` must be an array, got None"),
    ({"v": X.astype(int)}, TypeError, "`v` must be of a floating dtype"),
    ({"q": X.astype(bool)}, TypeError, "`q` must be of a floating dtype, got bool"),
    ({"q": X[0, 0, 0]}, ValueError, "`q` must be [..., n, d], got shape (4,)"),
    ({"v": X[:, :, :4]}, ValueError, "`k` and `v` must have the same shape"),
    ({"global_keys": X}, TypeError, "`global_keys` must be (keys, values) or (keys, values, mask), got"),
    ({"global_keys": (X,)}, TypeError, "`global_keys` must be (keys, values) or (keys, values, mask), got (array"),
    ({"global_keys": (X, None)}, TypeError, "`global_keys values` must be an array, got None"),
    ({"global_keys": (X[..., :2], X)}, ValueError, "`global_keys` must have keys [h, m, 4]"),
    ({"global_keys": (X, X[:, :2])}, ValueError, "`global_keys` must have values [h, m, 4]"),
    ({"global_keys": (X, X[:, :, :7])}, ValueError, "one value per key, got 8 keys and 7 values"),
    ({"global_keys": (X, X, np.ones((2, 7), bool))}, ValueError, "`global_keys mask` must be [b, n] with n = 8"),
    ({"global_keys": (X, X, np.ones((2, 8)))}, TypeError, "`global_keys mask` must be bool"),
    ({"v": X[..., :0]}, ValueError, "`v` must have a width of at least 1"),
    ({"k": X[..., :2], "v": X[..., :2]}, ValueError, "`q` and `k` must have the same width d"),
    ({"k": X[:, :2], "v": X[:, :2]}, ValueError, "a divisor of q's"),
    ({"k": X[:1], "v": X[:1]}, ValueError, "must have q's leading axes"),
    ({"k": X[0], "v": X[0]}, ValueError, "must have q's leading axes"),
    ({"q": X[:, :1]}, ValueError, "a divisor of q's"),
    (
        {"window_size": 3},
        ValueError,
        "must have a multiple of `window_size` (3) tokens, n in [b, h, n, d], got 8; pass `autopad=True`",
    ),
    ({"window_size": 0}, ValueError, "`window_size` must be at least 1"),
    ({"window_size": 4.0}, TypeError, "`window_size` must be an int"),
    ({"look_forward": 1}, ValueError, "`look_forward` must be 0 when `causal=True`"),
    ({"look_backward": -1}, ValueError, "`look_backward` must be at least 0"),
    ({"causal": 1}, TypeError, "`causal` must be True or False"),
    ({"q_offset": -1}, ValueError, "`q_offset` must be at least 0, got -1"),
    ({"rotary": 4}, TypeError, "got 4 of type int; write for example `rotary=Rotary(4)`"),
    ({"rotary": True}, TypeError, "`rotary` must be a Rotary or None"),
    ({"rotary": Rotary(6)}, ValueError, "`rotary.dim` must be at most the width of a head, got 6"),
    (
        {"rotary": Rotary(4, use_xpos=True), "window_size": 1, "causal": True},
        ValueError,
        "`scale_base` of xPos must be given for Window(window_size=1",
    ),
    ({"logits_soft_cap": 0.0}, ValueError, "`logits_soft_cap` must be positive and finite, got 0.0"),
    ({"logits_soft_cap": -2.0}, ValueError, "`logits_soft_cap` must be positive"),
    ({"dropout_rate": 1.0}, ValueError, "`dropout_rate` must be in [0, 1), got 1.0"),
    ({"dropout_rate": -0.1}, ValueError, "`dropout_rate` must be in [0, 1)"),
    ({"dropout_rate": 0.1}, ValueError, "`dropout_rng` must be given when `dropout_rate` is not 0"),
    ({"mask": np.ones((2, 8))}, TypeError, "`mask` must be bool, True where a key may be seen, got float64"),
    ({"mask": np.ones((2, 7), bool)}, ValueError, "`mask` must be [b, n] with n = 8"),
    ({"mask": np.ones((3, 8), bool)}, ValueError, "`mask` must be [b, n] with n = 8"),
    ({"mask": np.ones((2, 1, 8, 8), bool)}, ValueError, "reshape it to line up from the left"),
    ({"mask": np.ones((), bool)}, ValueError, "`mask` must be [b, n]"),
    ({"segment_ids": np.ones((2, 8))}, TypeError, "`segment_ids` must be integers"),
    ({"segment_ids": np.ones((2, 4), int)}, ValueError, "`segment_ids` must be [b, n] with n = 8"),
    (
        {"q": X[:, :, :4], "segment_ids": np.ones((2, 8), int)},
        ValueError,
        "`segment_ids` requires as many queries as keys",
    ),
    ({"segment_ids": np.arange(16).reshape(2, 8) * 2**32}, ValueError, "`segment_ids` must be from -2147483648 to"),
    ({"segment_ids": np.full((2, 8), 2**63, np.uint64)}, ValueError, "number the documents of a row from 0"),
    ({"attn_bias": np.ones((3, 4, 4))}, ValueError, "`attn_bias` must be [h g, 4, 8]"),
    ({"attn_bias": np.ones((2, 4, 8))}, ValueError, "reshape it to line up from the right"),
    ({"attn_bias": np.ones((2, 1, 3, 4, 8))}, ValueError, "`attn_bias` must be [h g, 4, 8]"),
    ({"attn_bias": np.ones((8,))}, ValueError, "`attn_bias` must be [h g, 4, 8]"),
    ({"sinks": np.ones((2,))}, ValueError, "`sinks` must be [h g]"),
    (
        {"attn_bias": np.ones((3, 4, 8), bool)},
        TypeError,
        "`attn_bias` must be of real numbers, got bool; a mask",
    ),
    ({"attn_bias": np.ones((3, 4, 8), "complex64")}, TypeError, "`attn_bias` must be of real numbers, got complex64"),
    ({"sinks": np.ones((3,), bool)}, TypeError, "`sinks` must be of real numbers, got bool"),
    ({"sinks": np.ones((3,), "complex64")}, TypeError, "`sinks` must be of real numbers, got complex64"),
    ({"k": X.astype("complex64")}, TypeError, "`k` must be of a floating dtype, got complex64"),
    ({"scale": jnp.array(1j)}, TypeError, "`scale` must be of real numbers, got complex64"),
    ({"scale": jnp.array(True)}, TypeError, "`scale` must be of real numbers, got bool"),
    ({"scale": float("inf")}, ValueError, "`scale` must be finite, got inf"),
    ({"scale": float("nan")}, ValueError, "`scale` must be finite, got nan"),
    (
        {"logits_soft_cap": float("inf")},
        ValueError,
        "`logits_soft_cap` must be positive and finite, got inf",
    ),
    ({"logits_soft_cap": np.float32("inf")}, ValueError, "`logits_soft_cap` must be positive and finite"),
    ({"logits_soft_cap": float("nan")}, ValueError, "`logits_soft_cap` must be positive and finite"),
    ({"q_offset": np.int64(-1)}, ValueError, "`q_offset` must be at least 0, got -1"),
    ({"q_offset": np.array(-1)}, ValueError, "`q_offset` must be at least 0, got -1"),
    ({"q_offset": jnp.array(-3)}, ValueError, "`q_offset` must be at least 0, got -3"),
    ({"q_offset": True}, TypeError, "`q_offset` must be an integer, got True"),
    ({"q_offset": np.array(True)}, TypeError, "`q_offset` must be an integer"),
    (
        {"q_offset": 2**31 - 8},
        ValueError,
        "`q_offset` must be at most 2147483647, the last position, got 2147483648; count",
    ),
    ({"q_offset": 2**40}, ValueError, "`q_offset` must be at most 2147483647"),
    # Mistakes that users make:
    ({"mask": [[True] * 8] * 2}, TypeError, "`mask`"),
    ({"attn_bias": [[0.0]]}, TypeError, "`attn_bias`"),
    ({"sinks": [0.0, 0.0, 0.0]}, TypeError, "`sinks`"),
    ({"segment_ids": [[0] * 8] * 2}, TypeError, "`segment_ids`"),
    ({"q_offset": 1.5}, TypeError, "`q_offset`"),
    ({"q_offset": np.array([0, 1])}, ValueError, "`q_offset`"),
    ({"scale": np.ones(3)}, ValueError, "`scale`"),
    ({"dropout_rate": "x"}, TypeError, "`dropout_rate`"),
]


def error_id(value):
    """Name a wrong call in a test's id by what is wrong in it."""
    if not isinstance(value, dict):
        return "-"
    return "+".join(
        f"{name}={type(x).__name__ if isinstance(x, list | np.ndarray) else x}" for name, x in value.items()
    )


@pytest.mark.parametrize(("change", "error", "phrase"), ERRORS, ids=error_id)
def test_wrong_calls_are_refused(change, error, phrase):
    with pytest.raises(error) as caught:
        local_attention(**{**OK, **change})
    assert phrase in str(caught.value)


def test_the_right_call_beside_the_wrong_ones_works():
    np.testing.assert_array_equal(local_attention(**OK), X)


DEPENDS_ON_TOKENS = re.compile("multiple of|2147483648")
OF_NUMBERS = {"look_backward", "window_size", "q_offset", "dropout_rate", "logits_soft_cap", "scale"}


@pytest.mark.parametrize("shape", [(0, 3, 8, 4), (2, 3, 0, 4)], ids=str)
@pytest.mark.parametrize(
    ("change", "error", "phrase"),
    [
        *[row for row in ERRORS if set(row[0]) <= OF_NUMBERS and not DEPENDS_ON_TOKENS.search(row[2])],
        ({"mask": np.ones((3, 7), bool)}, ValueError, "`mask` must be [b, n]"),
        ({"mask": np.ones((2, 8))}, TypeError, "`mask` must be bool"),
        ({"attn_bias": np.ones((3, 4, 4))}, ValueError, "`attn_bias` must be [h g, 4, 8]"),
        ({"sinks": np.ones((2,))}, ValueError, "`sinks` must be [h g]"),
        ({"segment_ids": np.ones((3, 7), int)}, ValueError, "`segment_ids` must be [b, n]"),
        ({"rotary": Rotary(6)}, ValueError, "`rotary.dim` must be at most the width of a head, got 6"),
        ({"implementation": "cudnn"}, ValueError, "one of 'dense', 'xla'"),
    ],
    ids=error_id,
)
def test_wrong_calls_of_nothing_are_refused_alike(shape, change, error, phrase):
    empty = dict.fromkeys("qkv", jnp.zeros(shape))
    with pytest.raises(error) as caught:
        local_attention(**{**OK, **empty, **change})
    assert phrase in str(caught.value)


def test_an_offset_known_to_the_caller_is_checked_under_jit_too():
    offset = jnp.int32(-1)
    with pytest.raises(ValueError, match="`q_offset` must be at least 0, got -1"):
        jax.jit(lambda q: local_attention(**{**OK, "q": q, "q_offset": offset}))(X)


# The other layout


@pytest.mark.parametrize(
    "call",
    [partial(local_attention, window_size=4, autopad=True), partial(LocalAttention(4, autopad=True).apply, {})],
    ids=["function", "module"],
)
def test_tokens_before_heads_are_told_by_their_axes(call):
    q = jnp.ones((2, 65, 8, 4))
    with pytest.raises(ValueError, match=r"must be \[b, h, n, d\], got \(2, 65, 8, 4\), which is 65 heads of 8 tokens"):
        call(q, q, q)
    with pytest.raises(ValueError, match=r"by jnp\.swapaxes\(x, -2, -3\).*rows of the batch by x\.reshape\(-1, 8, 4\)"):
        call(q, q, q)
    assert call(*[q[:, :64]] * 3).shape == (2, 64, 8, 4)
    rows = q.reshape(-1, 8, 4)  # as the message advises
    assert call(rows, rows, rows).shape == rows.shape


def test_one_query_of_many_heads_over_many_keys_is_no_mistake():
    q, k, v = cases.normal(0, 1, 16, 1, 4), cases.normal(1, 1, 16, 64, 4), cases.normal(2, 1, 16, 64, 4)
    window = Window.sliding(5)
    out = local_attention(q, k, v, window=window, q_offset=63)
    cases.assert_close(out, local_attention(q, k[:, :, 59:], v[:, :, 59:], window=window, q_offset=4))


def test_many_heads_of_one_token_are_no_mistake_of_a_module_that_makes_them():
    module = LocalMHA(dim=4, window_size=4, heads=16, dim_head=2)
    out, _ = module.init_with_output(jax.random.key(0), jnp.ones((1, 1, 4)))
    assert out.shape == (1, 1, 4)
    one = jnp.ones((1, 16, 1, 4))
    LocalAttention(4, autopad=True).init(jax.random.key(0), one, one, one)


def test_a_length_that_is_no_multiple_names_its_axis():
    with pytest.raises(ValueError, match=r"must have a multiple of `window_size` \(3\) tokens, n in \[b, h, n, d\]"):
        local_attention(X, X, X, window_size=3)


# A `Window` in place of five numbers, and implementations


@pytest.mark.parametrize(
    "window",
    [Window(4, causal=True), Window(4, look_backward=2, look_forward=0), Window.between(3, 2), Window.sliding(5)],
    ids=str,
)
def test_a_window_stands_for_its_five_numbers(window):
    q, k, v = random_qkv(2, 12, 4)
    flat = local_attention(q, k, v, **dataclasses.asdict(window), autopad=True)
    np.testing.assert_array_equal(local_attention(q, k, v, window=window), flat)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"window_size": None}, "`window_size` or `window` must be given, got neither"),
        ({"window": CAUSAL}, "takes the place of the five arguments of a window"),
        ({"window": CAUSAL, "window_size": None}, "`causal` True"),
        ({"window": CAUSAL, "window_size": None, "causal": False, "look_backward": 2}, "`look_backward` 2"),
        ({"window": CAUSAL, "window_size": None, "causal": False, "look_forward": 0}, "`look_forward` 0"),
        ({"window": CAUSAL, "window_size": None, "causal": False, "exact_windowsize": True}, "`exact_windowsize` True"),
    ],
)
def test_a_window_and_its_numbers_together_or_neither_are_refused(change, phrase):
    with pytest.raises(ValueError, match=phrase):
        local_attention(**{**OK, **change})


def test_a_window_must_be_one():
    with pytest.raises(TypeError, match="`window` must be a Window, got 4"):
        local_attention(X, X, X, window=4)


@pytest.mark.parametrize("window", [Window.sliding(4), Window.chunks(4), Window(4), Window.everything()], ids=str)
def test_windows_take_any_length(window):
    q, k, v = random_qkv(2, 11, 4)
    np.testing.assert_array_equal(
        local_attention(q, k, v, window=window), local_attention(q, k, v, window=window, autopad=True)
    )


# Windows without a limit

GLOBAL = pytest.mark.parametrize("window", [Window.sliding(None), Window.everything()], ids=["causal", "both"])


@pytest.mark.slow_but("*-both")
@GLOBAL
@pytest.mark.parametrize("implementation", ["dense", Windowed(8), None], ids=["dense", "blocks", "default"])
def test_a_window_without_a_limit_is_global_attention(window, implementation):
    q, k, v = random_qkv(2, 3, 29, 4)
    cotangent = cases.normal(9, *q.shape)

    def theirs(q, k, v):
        q, k, v = (jnp.swapaxes(x, -2, -3) for x in (q, k, v))
        return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, is_causal=window.causal), -2, -3)

    ours = partial(local_attention, window=window, implementation=implementation)
    arrays = {"q": q, "k": k, "v": v}
    cases.assert_close(*(cases.value_and_pullback(fn, arrays, cotangent) for fn in (ours, theirs)))


@pytest.mark.slow_but("9-*")
@GLOBAL
@pytest.mark.parametrize("q_offset", [0, 5, 9, 13, np.int64(13), jnp.int32(13)])
def test_queries_beyond_the_last_key_see_all_keys_of_a_window_without_a_limit(window, q_offset):
    """Against loops in NumPy: the window sees everything before a query, however far back."""
    n, n_keys = 4, 9
    q, k, v = cases.normal(0, 1, n, 4), cases.normal(1, 1, n_keys, 4), cases.normal(2, 1, n_keys, 4)
    reach = window.within(max(n_keys, int(q_offset) + n))
    bias = cases.normal(3, 1, 1, reach.slab)
    out = cases.in_blocks(q, k, v, window, attn_bias=bias, q_offset=q_offset)
    expected = cases.by_loops(
        q[0], k[0], v[0], window, q_offset=int(q_offset), bias=lambda i, j: bias[0, 0, reach.bias_column(i, j)]
    )
    cases.assert_close(out[0], expected)


@pytest.mark.slow
@GLOBAL
@pytest.mark.parametrize("features", [cases.EVERYTHING_PACKED, ("mask", "shared_qk", "reference_rotary", "offset")])
def test_a_window_without_a_limit_takes_every_feature(window, features):
    n = 21
    arrays, traced, options = cases.draw_call(features, window.within(n), n)
    as_large = Window(n, window.causal, look_backward=0, look_forward=0)  # the original's angles are right
    bias = arrays.pop("attn_bias", None)
    given = expected = {}
    if bias is not None:  # by distance, in the slab of a one-row window and in one of n rows
        places = as_large.relative_positions() + window.within(n).backward
        given, expected = {"attn_bias": bias}, {"attn_bias": bias[:, 0, places.clip(0, bias.shape[-1] - 1)]}
    call = partial(cases.in_blocks, **arrays, **traced, **options)
    cases.assert_close(call(window=window, **given), call(window=as_large, **expected))


def test_a_bias_of_a_window_without_a_limit_has_one_row():
    q, k, v = random_qkv(2, 11, 4)
    with pytest.raises(ValueError, match=r"`attn_bias` must be \[h g, 1, 11\]"):
        local_attention(q, k, v, window=Window.sliding(None), attn_bias=jnp.zeros((11, 11)))
    with pytest.raises(ValueError, match=r"`attn_bias` must be \[h g, 1, 21\]"):
        local_attention(q, k, v, window=Window.everything(), attn_bias=jnp.zeros((11, 11)))


@GLOBAL
def test_a_traced_offset_and_a_window_without_a_limit_are_refused(window):
    q, k, v = random_qkv(2, 11, 4)

    @partial(jax.jit, static_argnums=1)
    def call(q_offset, window):
        return local_attention(q, k, v, window=window, q_offset=q_offset)

    with pytest.raises(ValueError, match=r"`q_offset` must be known .* `window.within\(n\)` with n the largest number"):
        call(3, window)
    cases.assert_close(call(3, window.within(14)), local_attention(q, k, v, window=window, q_offset=3))


@GLOBAL
def test_no_keys_and_no_queries_in_a_window_without_a_limit(window):
    q, k, v = random_qkv(2, 11, 4)
    np.testing.assert_array_equal(local_attention(q, k[:, :0], v[:, :0], window=window), 0)
    assert local_attention(q[:, :0], k[:, :0], v[:, :0], window=window).shape == (2, 0, 4)


@pytest.mark.slow_but("causal")
@GLOBAL
def test_options_of_a_window_without_a_limit_are_served_by_value(window):
    q, k, v = random_qkv(2, 11, 4)
    options = AttentionOptions(window, rotary=Rotary(4, reference=True))
    assert options == AttentionOptions(window, rotary=Rotary(4)), "there is no window before the last"
    out, _ = attend(Operands.create(q, k, v, options), options)
    cases.assert_close(out.reshape(q.shape), cases.definition(q, k, v, window.within(11), rotary=Rotary(4)))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["dense", "xla"])
def test_a_traced_scale_serves_a_call_and_has_a_gradient(implementation):
    q, k, v = random_qkv(2, 13, 4)
    call = partial(cases.local, q, k, v, CAUSAL, implementation=implementation)

    def loss(scale):
        return (jnp.sin(call(scale=scale)) * cases.normal(5, 2, 13, 4)).sum()

    value, slope = jax.jit(jax.value_and_grad(loss))(jnp.float32(0.7))
    cases.assert_close(value, loss(0.7))
    by_queries = jax.grad(lambda q: (jnp.sin(call_with(q, k, v)) * cases.normal(5, 2, 13, 4)).sum())
    # Scores are linear in scale * q, so the derivatives along both are equal.
    cases.assert_close(0.7 * slope, jnp.vdot(by_queries(q), q))
    scales = jnp.array([0.1, 0.5, 2.0])
    rows = jax.vmap(lambda scale: call(scale=scale))(scales)
    for row, scale in zip(rows, (0.1, 0.5, 2.0), strict=True):
        cases.assert_close(row, call(scale=scale))


def call_with(q, k, v):
    return cases.local(q, k, v, CAUSAL, scale=0.7)


def test_implementations_go_by_name_and_by_value():
    q, k, v = random_qkv(2, 13, 4)
    expected = cases.local(q, k, v, CAUSAL)
    for implementation in ("xla", "dense", Windowed(), Windowed(5), Dense(), IMPLEMENTATIONS["dense"]):
        cases.assert_close(cases.local(q, k, v, CAUSAL, implementation=implementation), expected)


def test_an_implementation_of_ones_own_serves_or_says_why_not():
    def doubled(operands, options):
        if options.rotary is not None:
            raise Unsupported("no rotary; no xPos")
        out, log_sum = Dense()(operands, options)
        return 2 * out, log_sum

    q, k, v = random_qkv(2, 13, 4)
    ours = cases.local(q, k, v, CAUSAL, implementation=doubled)
    cases.assert_close(ours, 2 * cases.local(q, k, v, CAUSAL))
    with pytest.raises(Unsupported, match="no rotary"):
        cases.local(q, k, v, CAUSAL, rotary=Rotary(4), implementation=doubled)
    assert issubclass(Unsupported, NotImplementedError)


@pytest.mark.parametrize(
    ("implementation", "error", "phrase"),
    [
        ("cudnn", ValueError, "one of 'dense', 'xla'"),
        (Windowed, TypeError, "a value such as Windowed"),
        (3, TypeError, "`implementation` must be a name or a value"),
    ],
)
def test_an_unknown_implementation_is_refused(implementation, error, phrase):
    with pytest.raises(error, match=phrase):
        local_attention(**OK, implementation=implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "dense", Triton(interpret=True)], ids=["xla", "dense", "triton"])
def test_global_keys_share_the_softmax_of_the_window(implementation):
    """Against one softmax over all scores in NumPy: the window's keys are rotated, global keys are not."""
    (b, h, n, d), m, window, rotary = (2, 2, 13, 4), 3, Window(5, causal=True), Rotary(4, theta=100.0)
    q, k, v = (cases.normal(seed, b, h, n, d) for seed in range(3))
    keys, values, mask = cases.normal(3, m, d), cases.normal(4, b, h, m, d), np.array([[1, 0, 1], [0, 1, 1]], bool)
    turned_q, turned_k = (np.asarray(rotate(x, rotary, jnp.arange(n))) for x in (q, k))
    near = np.einsum("bhid,bhjd->bhij", turned_q, turned_k)
    near = np.where(window.sees(np.arange(n)[:, None], np.arange(n)), near, -np.inf)
    far = np.where(mask[:, None, None], np.einsum("bhid,md->bhim", q, keys), -np.inf)
    p = np.asarray(jax.nn.softmax(np.concatenate([near, far], -1) / 2, -1))
    expected = np.einsum("bhij,bhjd->bhid", p[..., :n], v) + np.einsum("bhim,bhmd->bhid", p[..., n:], values)
    ours = cases.local(q, k, v, window, rotary=rotary, global_keys=(keys, values, mask), implementation=implementation)
    cases.assert_close(ours, expected)


@pytest.mark.slow
def test_masked_global_keys_may_hold_anything():
    q, k, v = random_qkv(2, 16, 4)
    keys, values = cases.normal(3, 3, 4), cases.normal(4, 3, 4)
    mask = np.array([True, False, True])

    def attend(keys, values):
        return (cases.local(q, k, v, CAUSAL, global_keys=(keys, values, mask[None])) * q).sum()

    poison = jnp.where(mask[:, None], 0, jnp.nan)
    gradients = jax.grad(attend, (0, 1))(keys + poison, values + poison)
    expected = jax.grad(attend, (0, 1))(keys, values)
    cases.assert_close(gradients, expected)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[1], 0)


def test_without_any_global_keys_nothing_changes():
    q, k, v = random_qkv(2, 16, 4)
    none = jnp.zeros((2, 0, 4))
    np.testing.assert_array_equal(cases.local(q, k, v, CAUSAL, global_keys=(none, none)), cases.local(q, k, v, CAUSAL))


@pytest.mark.slow
def test_dropout_of_global_keys_keeps_the_expectation_and_draws_by_itself():
    """A key in the window and the same key as a global key are dropped independently."""
    (b, n), w = (512, 8), Window.sliding(3)
    q, k, v = jnp.zeros((b, n, 4)), jnp.zeros((b, n, 4)), jnp.ones((b, n, 4))
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(3)}
    out = cases.local(q, k, v, w, global_keys=(k[:, :3], v[:, :3]), **options)
    assert abs(float(out.mean()) - 1) < 0.05
    both = cases.local(q, k, jnp.zeros_like(v), w, global_keys=(k[:, :3], v[:, :3]), **options)
    window_alone = out - both
    assert abs(np.corrcoef(window_alone[:, 2:, 0].ravel(), both[:, 2:, 0].ravel())[0, 1]) < 0.05


@pytest.mark.slow
def test_memory_beside_global_keys_is_linear():
    def temporary(n):
        q, key = jnp.zeros((1, n, 16)), jnp.zeros((16, 16))
        compiled = jax.jit(jax.grad(lambda q: cases.local(q, q, q, CAUSAL, global_keys=(key, key)).sum())).lower(q)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    sizes = [temporary(n) for n in (4096, 8192, 16384)]
    assert sizes[2] - sizes[1] <= 2.1 * max(sizes[1] - sizes[0], 0) + 2**15, sizes


def test_attending_by_value_is_the_flat_call():
    arrays, traced, options = cases.draw_call(cases.EVERYTHING, CAUSAL, 23)
    flat = cases.local(**arrays, **traced, **options, window=CAUSAL)
    options = AttentionOptions(CAUSAL, **options)
    operands = Operands.create(**arrays, **traced, options=options)
    out, log_sum = jax.jit(attend, static_argnums=1)(operands, options)
    assert out.shape == (2, 3, 2, 12, 4)
    assert log_sum.largest.shape == log_sum.total.shape == (2, 3, 2, 12)
    np.testing.assert_array_equal(out.reshape(flat.shape), flat)


def test_operands_of_other_options_are_refused():
    q, k, v = random_qkv(2, 16, 4)
    options = AttentionOptions(Window(4, causal=True))
    biased = Operands.create(q, k, v, options, attn_bias=jnp.zeros((2, 4, 8)))
    with pytest.raises(ValueError, match=r"`attn_bias` must be \[8, 16\]"):
        attend(biased, AttentionOptions(Window(8, causal=True)))
    with pytest.raises(ValueError, match=r"`rotary\.dim` must be at most the width of a head"):
        attend(biased, dataclasses.replace(options, rotary=Rotary(6)))
    keyed = Operands.create(q, k, v, options, dropout_rng=jax.random.key(0))
    dropped = attend(keyed, dataclasses.replace(options, dropout_rate=0.5))[0]
    assert np.abs(dropped - attend(keyed, options)[0]).max() > 1e-2


def test_one_program_serves_every_platform():
    x = jax.ShapeDtypeStruct((1, 2, 512, 8), jnp.float32)
    attend_sliding = jax.jit(partial(local_attention, window=Window.sliding(64), rotary=Rotary(8)))
    exported = jax.export.export(attend_sliding, platforms=("cpu", "cuda", "tpu"))(x, x, x)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    q, k, v = random_qkv(1, 2, 512, 8)
    cases.assert_close(exported.call(q, k, v), attend_sliding(q, k, v))
