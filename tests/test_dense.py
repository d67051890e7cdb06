"""The dense implementation against plain NumPy, one query and key at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import Window
from flax_local_attention.operands import Operands, over_heads
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import attend_scores, keeps, l2_normalize
from tests import cases
from tests.cases import PLACES

pytestmark = pytest.mark.usefixtures("quick_compile")

EVERYTHING = AttentionOptions(Window(8, look_backward=0, look_forward=0))
"""Options with which each of a few queries sees all of a few keys."""


def attend_logits(logits, v, options=EVERYTHING, sink=None, seed=None):
    """Compute the softmax on its own: the output for these logits and v, and its sums."""
    head = Operands(jnp.zeros(logits.shape[:1] + v.shape[1:], v.dtype), v, v, sink=sink, dropout_seed=seed)
    return _attend_scores(logits, head, options)


@functools.partial(jax.jit, static_argnums=2)
def _attend_scores(logits, head, options):
    return attend_scores(logits, head, jnp.arange(logits.shape[0]), jnp.arange(logits.shape[1]), options)


def bias_of_pairs(window, bias):
    """Return a head's bias ``[w, s]`` as a function of the positions of a query and a key."""
    w, bias = window.window_size, np.asarray(bias)
    return lambda i, j: bias[i % w, j - (i // w - window.look_backward) * w]


SMALL_PLACES = tuple(place for place in PLACES if place.n < 100)


@pytest.mark.parametrize("place", SMALL_PLACES, ids=str)
def test_dense_equals_loops_for_every_window(place):
    window, n, d = place.window, place.n, 3
    q, k, v = (cases.normal(seed, 1, n, d) for seed in range(3))
    bias = cases.normal(3, 1, window.window_size, window.slab)
    mask, sink = cases.normal(4, 1, n) > -0.5, cases.normal(5, 1)
    options = {"attn_bias": bias, "mask": mask, "sinks": sink, "scale": 0.9, "logits_soft_cap": 2.0}
    ours = cases.definition(q, k, v, window, **options)[0]
    pair_bias = bias_of_pairs(window, bias[0])
    expected = cases.by_loops(
        q[0], k[0], v[0], window, mask=np.asarray(mask[0]), bias=pair_bias, scale=0.9, soft_cap=2.0, sink=sink[0]
    )
    cases.assert_close(ours, expected)


@pytest.mark.parametrize("kv_heads", [2, 3])
def test_every_query_head_of_a_group_has_a_mask_a_bias_and_a_sink_of_its_own(kv_heads):
    window, h, n, d = Window(3, look_backward=2), 6, 11, 4
    q, k, v = cases.normal(0, h, n, d), cases.normal(1, kv_heads, n, d), cases.normal(2, kv_heads, n, d)
    mask, sinks = cases.normal(3, h, n) > -0.5, cases.normal(4, h)
    bias = cases.normal(5, h, window.window_size, window.slab)
    ours = jax.jit(lambda: cases.definition(q, k, v, window, mask=mask, attn_bias=bias, sinks=sinks))()
    for head in range(h):
        shared = head // (h // kv_heads)  # neighbouring heads share keys
        options = {"mask": np.asarray(mask[head]), "bias": bias_of_pairs(window, bias[head]), "sink": sinks[head]}
        expected = cases.by_loops(q[head], k[shared], v[shared], window, **options)
        cases.assert_close(ours[head], expected, err_msg=f"head {head}")


@pytest.mark.parametrize("q_offset", [0, 4, 15])
def test_dense_equals_loops_with_an_offset(q_offset):
    window = Window(5, look_backward=2, look_forward=1)
    q, k, v = cases.normal(0, 1, 6, 3), cases.normal(1, 1, 13, 3), cases.normal(2, 1, 13, 3)
    ours = cases.definition(q, k, v, window, q_offset=q_offset)[0]
    cases.assert_close(ours, cases.by_loops(q[0], k[0], v[0], window, q_offset=q_offset))


def test_shared_qk_sees_itself_only_where_it_sees_nothing_else():
    window, n = Window(3, causal=True), 7
    q, v = cases.normal(0, 1, n, 4), cases.normal(1, 1, n, 4)
    out = cases.definition(q, q, v, window, shared_qk=True)[0]
    np.testing.assert_array_equal(out[0], v[0, 0])
    unit = np.asarray(q[0]) / np.linalg.norm(np.asarray(q[0]), axis=-1, keepdims=True)
    expected = cases.by_loops(q[0], unit, v[0], window, bias=lambda i, j: -np.inf if i == j else 0.0)
    cases.assert_close(out[1:], expected[1:])


def test_segments_are_as_many_sequences():
    q, k, v = (cases.normal(seed, 1, 11, 3) for seed in range(3))
    window = Window(20, causal=True)
    ours = cases.definition(q, k, v, window, segment_ids=jnp.array([[4] * 5 + [2] * 6]))
    alone = [cases.definition(q[:, part], k[:, part], v[:, part], window) for part in (slice(0, 5), slice(5, 11))]
    cases.assert_close(ours, jnp.concatenate(alone, axis=1))


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    products, v = cases.normal(0, 3, 5), cases.normal(1, 5, 2)
    unseen = jnp.zeros((3, 5), jnp.float32).at[1].set(-jnp.inf)

    def fn(products, v):
        return attend_logits(products + unseen, v)[0]

    out, pull = jax.vjp(fn, products, v)
    d_products, d_v = pull(cases.normal(2, 3, 2))
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(d_products[1], 0)
    assert all(np.isfinite(x).all() for x in (out, d_products, d_v))
    assert (np.abs(d_products[0]) > 0).all()


@pytest.mark.parametrize("dropout_rate", [0.0, 0.4], ids=["whole", "dropped"])
@pytest.mark.parametrize("has_sink", [False, True], ids=["no_sink", "sink"])
def test_derivatives_are_those_of_the_softmax_written_out(has_sink, dropout_rate):
    """First and second order, forward and reverse: the derivative is a custom rule, so nothing else checks it."""
    n, n_keys, d = 3, 5, 2
    hidden = jnp.zeros((n, n_keys)).at[1].set(-jnp.inf).at[0, 2].set(-jnp.inf)
    options, seed = AttentionOptions(EVERYTHING.window, dropout_rate=dropout_rate), jnp.uint32(7)
    i, j = jnp.arange(hidden.shape[0])[:, None], jnp.arange(hidden.shape[1])[None]
    keep = keeps(seed, i, j, dropout_rate).astype(jnp.float32) / (1 - dropout_rate)
    args = [3 * cases.normal(0, n, n_keys), cases.normal(1, n_keys, d), cases.normal(2)]
    tangents = [cases.normal(3, n, n_keys), cases.normal(4, n_keys, d), cases.normal(5)]

    def ours(logits, v, sink):
        return attend_logits(logits + hidden, v, options, sink if has_sink else None, seed)[0]

    def written_out(logits, v, sink):
        nobody = jnp.full((n, 1), sink if has_sink else -jnp.inf)
        seen = (hidden == 0).any(1, keepdims=True) | has_sink
        rows = jnp.where(seen, jnp.concatenate([logits + hidden, nobody], 1), 0)
        return jnp.where(seen, (jax.nn.softmax(rows)[:, :-1] * keep) @ v, 0)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(fn):
        gradient = jax.grad(lambda args: (jnp.sin(fn(*args)) * cases.normal(6, n, d)).sum())

        def slope(args):
            return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, gradient(args), tangents))

        return jax.jvp(fn, args, tangents), jax.jvp(gradient, (args,), (tangents,)), jax.grad(slope)(args)

    jax.tree.map(cases.assert_close, derivatives(ours), derivatives(written_out))


def test_a_bias_of_minus_infinity_hides_a_key():
    q, k, v = (cases.normal(seed, 3, 2) for seed in range(3))
    hidden = jnp.array([[0.0, 0.0, -jnp.inf], [-jnp.inf] * 3, [0.0] * 3])

    def fn(q, k, v):
        return cases.definition(q, k, v, Window(3, look_backward=0, look_forward=0), attn_bias=hidden)

    out, pull = jax.vjp(fn, q, k, v)
    weights = np.exp(np.asarray(q[0] @ k[:2].T) / 2**0.5)
    cases.assert_close(out[0], weights @ np.asarray(v[:2]) / weights.sum())
    np.testing.assert_array_equal(out[1], 0)
    assert all(np.isfinite(x).all() for x in pull(jnp.ones_like(out)))


def test_large_scores_do_not_overflow():
    out, _ = attend_logits(jnp.array([[3e4, 3e4 - 1.0, -3e4]]), jnp.eye(3))
    cases.assert_close(out[0], np.array([1, np.exp(-1), 0]) / (1 + np.exp(-1)))


def test_l2_normalize_is_finite_at_zero():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]])
    out, pull = jax.vjp(l2_normalize, x)
    cases.assert_close(out[:2], np.array([[0.6, 0.8], [0, 0]]))
    assert np.isfinite(pull(jnp.ones_like(x))[0]).all()
    assert l2_normalize(x.astype(jnp.float16)).dtype == jnp.float16


def test_over_heads_shares_axes_of_size_one():
    q, k = cases.normal(0, 2, 3, 5, 7, 4), cases.normal(1, 2, 3, 1, 7, 4)
    v = cases.normal(2, 1, 3, 1, 7, 4)
    out = over_heads(lambda head: head.q * head.k + head.v, Operands(q, k, v, q_offset=None))
    cases.assert_close(out, np.asarray(q) * np.asarray(k) + np.asarray(v))
