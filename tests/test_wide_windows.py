"""Windows wider than the sequence: they cost what the sequence costs, and see what they should."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import (
    AttentionOptions,
    KVCache,
    LocalMHA,
    LocalTransformer,
    Rotary,
    Window,
    generate,
    generation,
    local_attention,
)
from tests.cases import assert_close, normal
from tests.original import filled_variables

pytestmark = pytest.mark.usefixtures("quick_compile")

WIDE = {
    "exact": Window(10**9, causal=True, exact_windowsize=True),
    "plain": Window(10**9),
    "many windows": Window(4, look_backward=10**8, look_forward=10**8),
    "one side": Window.between(2**31, 3),
    "beyond int32": Window.sliding(2**40),
    "ahead beyond int32": Window.between(5, 2**31 - 2),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("is_exact", [False, True])
def test_a_fitted_window_sees_the_same_of_the_text(causal, is_exact):
    drawn = itertools.product((1, 2, 3, 7, 50), (0, 1, 2, 9), (0,) if causal else (0, 1, 5), (1, 4, 13), (1, 6, 20))
    for w, backward, forward, queries, keys in drawn:
        window = Window(w, causal, backward, forward, is_exact)
        fitted = window.fitted(queries, keys)
        i, j = np.arange(queries)[:, None], np.arange(keys)
        np.testing.assert_array_equal(fitted.sees(i, j), window.sees(i, j), err_msg=f"{window} {queries} {keys}")
        assert fitted.backward < queries + fitted.size
        assert fitted.forward < keys + fitted.size
        assert is_exact or fitted.size <= max(queries, keys)
        assert fitted.fitted(queries, keys) == fitted


@pytest.mark.slow
@pytest.mark.parametrize("offset", ["known", "traced"])
@pytest.mark.parametrize("name", WIDE)
def test_a_window_wider_than_the_text_attends_as_its_definition(name, offset):
    q, k, v = (normal(seed, 1, 2, 24, 8) for seed in range(3))
    window, rotary = WIDE[name], Rotary(8)
    right = window.fitted(24, 24)

    @jax.jit
    def attend(q, k, v, at):
        at = at if offset == "traced" else 3
        return local_attention(q[:, :, 3:], k, v, window=window, rotary=rotary, q_offset=at)

    expected = local_attention(q[:, :, 3:], k, v, window=right, rotary=rotary, q_offset=3, implementation="dense")
    assert_close(attend(q, k, v, jnp.int32(3)), expected)
    compiled = attend.lower(q, k, v, jnp.int32(3)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**17


def test_a_window_of_ones_own_without_a_limit_gets_one_of_its_kind():
    class Own(Window):
        pass

    q = normal(0, 1, 2, 12, 8)
    assert Own(None).fitted(3, 12) == Own.between(11, 11)
    assert Own(None).fitted(12, 3) == Own.between(11, 11)
    assert_close(local_attention(q, q, q, window=Own(None)), local_attention(q, q, q, window=Window.everything()))


@pytest.mark.slow
def test_rotary_of_the_original_and_a_bias_keep_the_window_they_go_by():
    q, k, v = (normal(seed, 1, 2, 24, 8) for seed in range(3))
    for options in ({"rotary": Rotary(8, reference=True)}, {"attn_bias": normal(3, 2, 40, 120)}):
        by = {by: local_attention(q, k, v, window=Window(40), **options, implementation=by) for by in ("xla", "dense")}
        assert_close(by["xla"], by["dense"])


# Rings


MODULES = {
    "exact": {"window_size": 40},
    "plain": {"window_size": 16, "exact_windowsize": False},
    "sliding": {"window_size": Window.sliding(50)},
    "xpos": {"window_size": 40, "use_xpos": True},
    "global": {"window_size": None},
}


@pytest.mark.slow_but("sliding")
@pytest.mark.parametrize("name", MODULES)
def test_max_length_bounds_a_ring_and_changes_nothing_up_to_it(name):
    module = LocalMHA(12, heads=2, dim_head=4, causal=True, **MODULES[name])
    x = normal(0, 2, 20, 12)
    variables = filled_variables(module, x)
    cache = module.init_cache(2, max_length=20)
    assert cache.size == 20
    step = jax.jit(lambda x, cache: module.apply(variables, x, cache=cache))
    outs = []
    for chunk in jnp.split(x, [7, 8, 9], axis=1):
        out, cache = step(chunk, cache)
        outs.append(out)
    assert_close(jnp.concatenate(outs, 1), module.apply(variables, x))


def test_a_bounded_ring_forgets_the_oldest_tokens():
    options = AttentionOptions(Window(16, causal=True), rotary=Rotary(4))
    assert KVCache.create(options, 1, 1, 4, max_length=99).options == options
    cache = KVCache.create(options, 1, 1, 4, max_length=5, rewind=2)
    assert (cache.window, cache.size, cache.slack) == (Window.sliding(5), 7, 2)
    with pytest.raises(ValueError, match="`max_length` must be at least 1"):
        KVCache.create(options, 1, 1, 4, max_length=0)
    with pytest.raises(ValueError, match="must have a causal window"):
        KVCache.create(Window(4), 1, 1, 4, max_length=2)


def test_a_bounded_cache_is_not_one_of_another_window():
    module = LocalMHA(12, Window.sliding(9), heads=2, dim_head=4, causal=True)
    x = normal(0, 1, 3, 12)
    variables = filled_variables(module, x)
    module.apply(variables, x, cache=module.init_cache(1, max_length=5))
    other = KVCache.create(AttentionOptions(Window.sliding(5), rotary=Rotary(4)), 1, 2, 4)
    with pytest.raises(ValueError, match="made for this call's window"):
        module.apply(variables, x, cache=other)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_dynamic_pos_bias": True, "local_attn_window_size": (64, None)}])
def test_a_model_with_absolute_positions_has_rings_of_its_longest_text(options):
    model = LocalTransformer(
        **{"num_tokens": 13, "max_seq_len": 21, "dim": 12, "depth": 2, "heads": 2, "dim_head": 4} | options
    )
    tokens = np.random.RandomState(0).randint(0, 13, (2, 21))
    variables = filled_variables(model, tokens)
    cache = model.init_cache(2)
    assert [layer.attn.size for layer in cache.layers] == [21, 21]
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache=cache))
    first, cache = step(tokens[:, :13], cache)
    rest, cache = step(tokens[:, 13:], cache)
    assert_close(jnp.concatenate([first, rest], 1), model.apply(variables, tokens))


@pytest.mark.slow
def test_generation_of_a_short_text_has_short_rings():
    model = LocalTransformer(
        13, 64, 12, 2, heads=2, dim_head=4, local_attn_window_size=(8192, None), use_abs_pos_emb=False
    )
    prompt = np.random.RandomState(0).randint(0, 13, (2, 5))
    variables = filled_variables(model, prompt)
    prefilled = jax.eval_shape(
        lambda v, p: generation._prefill(model, v, generation._Prompt(p, jnp.full(2, 5)), generation._room(12), None),
        variables,
        jnp.asarray(prompt),
    )
    assert [layer.attn.size for layer in prefilled[1].layers] == [64, 64]
    uncached = prompt
    for _ in range(7):
        uncached = np.concatenate([uncached, model.apply(variables, uncached)[:, -1:].argmax(-1)], 1)
    np.testing.assert_array_equal(generate(model, variables, prompt, 7, temperature=0.0)[0], uncached[:, 5:])


@pytest.mark.parametrize("tokens", [1, 64, 65, 511, 512, 513, 100_000])
def test_room_for_tokens_is_64_or_a_quarter_more_at_most(tokens):
    room = generation._room(tokens)
    assert tokens <= room < tokens + max(64, tokens / 4)
    assert len({generation._room(n) for n in range(1, tokens + 1, 64)}) <= 4 * tokens.bit_length()
