"""Sampling rules on hand-made distributions, and the value that holds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention.sampling import Sampling, apply_rules, draw_tokens, keep_min_p, keep_top_k, keep_top_p

PROBABILITIES = [0.1, 0.4, 0.05, 0.25, 0.2]
NONE = -jnp.inf


def kept(rule, probabilities, *arguments):
    """Return which tokens a rule keeps; these keep their logits, the others get -inf."""
    logits = jnp.log(jnp.array(probabilities))
    ruled = np.asarray(rule(logits, *arguments))
    keeps = np.flatnonzero(ruled > -np.inf)
    np.testing.assert_array_equal(ruled[keeps], logits[keeps])
    return keeps.tolist()


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_likeliest(k, expected):
    assert kept(keep_top_k, PROBABILITIES, k) == expected


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert kept(keep_top_k, PROBABILITIES, 9) == [0, 1, 2, 3, 4]


def test_top_k_of_a_small_vocabulary_keeps_one_token():
    """The original keeps (1 - 0.9) c tokens, which rounds to none."""
    for c in (1, 2, 5):
        assert kept(keep_top_k, [1 / c] * (c - 1) + [1.0], max(1, int((1 - 0.9) * c)))[-1] == c - 1


def test_top_k_keeps_all_that_equal_the_kth():
    assert kept(keep_top_k, [0.4, 0.2, 0.2, 0.2], 2) == [0, 1, 2, 3]
    assert kept(keep_top_k, [0.3, 0.3, 0.2, 0.2], 2) == [0, 1]


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1e-6, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.94, [0, 1, 3, 4])],
)
def test_top_p_keeps_the_fewest_likeliest_that_reach_p(p, expected):
    assert kept(keep_top_p, PROBABILITIES, p) == expected


def test_top_p_reached_exactly_keeps_no_token_more():
    probabilities = [0.5, 0.25, 0.125, 0.125]
    exact = jax.nn.softmax(jnp.log(jnp.array(probabilities)))
    assert (jnp.cumsum(exact) - exact).tolist() == [0.0, 0.5, 0.75, 0.875]  # the sums before each token are exact
    assert kept(keep_top_p, probabilities, 0.5) == [0]
    assert kept(keep_top_p, probabilities, 0.75) == [0, 1]


def test_top_p_of_one_keeps_all_however_unlikely():
    assert kept(keep_top_p, PROBABILITIES, 1.0) == [0, 1, 2, 3, 4]
    assert kept(keep_top_p, [1.0, 1e-12, 1e-30], 1.0) == [0, 1, 2]


def test_top_p_never_keeps_none():
    assert kept(keep_top_p, [1.0], 1e-9) == [0]
    assert kept(keep_top_p, [0.25] * 4, 1e-9)  # equal tokens are kept together


@pytest.mark.parametrize(("p", "expected"), [(0.0, [0, 1, 2, 3, 4]), (0.2, [0, 1, 3, 4]), (0.6, [1, 3]), (1.0, [1])])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(p, expected):
    assert kept(keep_min_p, PROBABILITIES, p) == expected


def test_min_p_of_one_keeps_all_that_are_likeliest():
    assert kept(keep_min_p, [0.4, 0.2, 0.4], 1.0) == [0, 2]


def test_rules_work_on_every_row_by_itself_and_after_each_other():
    logits = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]]))
    for rule, argument in ((keep_top_k, 3), (keep_top_p, 0.7), (keep_min_p, 0.3)):
        rows = rule(logits, argument)
        np.testing.assert_array_equal(rows[1], rows[0][::-1])
    ruled = keep_min_p(keep_top_p(keep_top_k(logits[0], 4), 0.9), 0.3)  # of 0.4, 0.25, 0.2, 0.1
    np.testing.assert_array_equal(np.flatnonzero(ruled > NONE), [1, 3, 4])


# The value


def test_rules_of_a_value_apply_in_order():
    logits = jnp.log(jnp.array(PROBABILITIES))
    sampling = Sampling.create(0.5, top_k=4, top_p=0.9, min_p=0.3)
    expected = keep_min_p(keep_top_p(keep_top_k(logits / 0.5, 4), 0.9), 0.3)
    np.testing.assert_array_equal(apply_rules(logits, sampling), expected)
    np.testing.assert_array_equal(np.flatnonzero(expected > NONE), [1, 3])


@pytest.mark.slow
def test_another_rate_compiles_nothing_and_another_option_does():
    traces = 0

    @jax.jit
    def draw(logits, sampling):
        nonlocal traces
        traces += 1
        return draw_tokens(logits, sampling, jax.random.key(0), 0)

    def traces_of(**options):
        before = traces
        with jax.disable_jit(False):
            draw(jnp.zeros((2, 7)), Sampling.create(**options))
        return traces - before

    rates = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.1}
    assert traces_of(**rates) == 1
    for same in ({"temperature": 1}, {"temperature": jnp.float32(0.5)}, {"top_p": np.float64(0.8)}, {"min_p": 0}):
        assert traces_of(**rates | same) == 0
    for other in ({"temperature": 0}, {"top_p": None}, {"min_p": None}, {"top_k": 3}, {"eos": 2}):
        assert traces_of(**rates | other) == 1
    assert traces_of(**rates, top_k=np.int64(3)) == 0


def test_equal_values_are_one_key_of_a_dictionary():
    assert len({Sampling.create(0.5, 3, 0.9), Sampling.create(np.float64(0.5), np.int32(3), 0.9)}) == 1
    assert Sampling.create() == Sampling()


def test_temperature_zero_takes_the_likeliest_whatever_the_rules():
    logits = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]]))
    for options in ({}, {"top_k": 2}, {"top_p": 0.5, "min_p": 0.2}):
        tokens = draw_tokens(logits, Sampling.create(0, **options), None, 0)
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, [1, 3])
