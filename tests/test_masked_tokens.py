"""The contents of masked tokens, NaN and infinity included, change nothing, forward or backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_local_attention import (
    TPU,
    AttentionOptions,
    KVCache,
    LocalMHA,
    LocalTransformer,
    Rotary,
    Triton,
    Window,
    attention_fn,
    cached_attention,
)
from flax_local_attention.kernels import Tiles
from flax_local_attention.kernels.pallas_tpu import Block
from flax_local_attention.kernels.pallas_triton import Tile
from flax_local_attention.kernels.tpu import Tiles as BlocksOnTPU
from flax_local_attention.operands import silence
from tests import cases
from tests.cases import MAIN_PLACE, assert_close, normal
from tests.original import filled_variables

pytestmark = pytest.mark.usefixtures("quick_compile")

KERNELS = {
    "triton": Triton(Tiles(Tile(16, 16), Tile(16, 16), Tile(16, 16)), interpret=True),
    "tpu": TPU(BlocksOnTPU(Block(32, 16), Block(16, 32), Block(16, 16)), interpret=True),
}
POISONS = {"nan": np.nan, "inf": np.inf, "negative-inf": -np.inf, "huge": 3e38}
N = MAIN_PLACE.n
EXISTS = jnp.asarray(np.random.RandomState(0).rand(2, N) > 0.3).at[:, N // 2].set(True)
OPTIONS = {
    "plain": (Window(3, causal=True), ()),
    "both": (Window(4), ("grouped", "bias", "rotary")),
    "everything": (MAIN_PLACE.window, ("shared_qk", "xpos", "batch_bias", "soft_cap", "sinks", "grouped", "scale")),
    "packed": (Window(5, look_forward=2), ("segment_ids", "bias", "sinks")),
    "offset": (Window(4), ("traced_offset", "grouped", "rotary")),
}


def poisoned(x, exists, poison):
    """Replace all numbers of absent tokens in ``[b, h, n, d]`` by a poison."""
    return jnp.where(exists[:, None, :, None], x, poison)


def with_poison(arrays, exists, poison, q_offset=0):
    rows = q_offset + np.arange(arrays["q"].shape[-2])
    own = jnp.where(rows < exists.shape[1], exists[:, np.minimum(rows, exists.shape[1] - 1)], True)
    bad = {name: poisoned(arrays[name], exists, poison) for name in ("k", "v")}
    return arrays | bad | {"q": poisoned(arrays["q"], own, poison)}, own


@pytest.mark.slow_but("plain-*", "everything-dense")
@pytest.mark.parametrize("implementation", ["xla", "dense"])
@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_that_masked_tokens_hold_reaches_another_token(name, implementation):
    window, features = OPTIONS[name]
    arrays, traced, options = cases.draw_call(features, window, N)
    offset = int(traced.get("q_offset", 0))
    _, own = with_poison(arrays, EXISTS, 0.0, offset)
    cotangent = poisoned(cases.draw_cotangent(arrays), own, 0.0)
    attend = partial(cases.local, window=window, mask=EXISTS, implementation=implementation, **traced, **options)

    @jax.jit
    def run(arrays):
        out, gradients = cases.value_and_pullback(attend, arrays, cotangent)
        return poisoned(out, own, 0.0), gradients

    expected = run(arrays)
    for poison in POISONS.values():
        out, gradients = run(with_poison(arrays, EXISTS, poison, offset)[0])
        assert_close((out, gradients), (expected[0], with_poison(expected[1], EXISTS, 0.0, offset)[0]))


@pytest.mark.slow_but("triton-sinks+grouped")
@pytest.mark.parametrize("features", [("sinks", "grouped"), ("bias",), ("global_keys",)], ids="+".join)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_masked_queries_that_are_not_finite_no_gradient(name, features):
    """Nor do they reach the keys that every query sees, which no mask hides."""
    if name == "tpu" and "bias" in features:
        pytest.skip("adds no bias")
    window = Window(2, causal=True)
    arrays, _, _ = cases.draw_call(features, window, N, d=16)
    cotangent = poisoned(cases.draw_cotangent(arrays), EXISTS, 0.0)
    attend = partial(cases.local, window=window, mask=EXISTS, implementation=KERNELS[name])

    @jax.jit
    def gradients(arrays):
        return cases.value_and_pullback(attend, arrays, cotangent)[1]

    expected = gradients(with_poison(arrays, EXISTS, 0.0)[0])
    for poison in (np.nan, np.inf):
        assert_close(gradients(with_poison(arrays, EXISTS, poison)[0]), expected)


@pytest.mark.slow_but("bfloat16-plain")
@pytest.mark.parametrize("rotary", [None, Rotary(4)], ids=["plain", "rotary"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_nothing_reaches_another_token_in_narrow_dtypes(dtype, rotary):
    arrays = {name: normal(seed, 2, 3, N, 4).astype(dtype) for seed, name in enumerate("qkv")}
    cotangent = poisoned(normal(9, 2, 3, N, 4), EXISTS, 0.0)
    attend = partial(cases.local, window=MAIN_PLACE.window, mask=EXISTS, rotary=rotary)
    expected = cases.value_and_pullback(attend, with_poison(arrays, EXISTS, 0.0)[0], cotangent)[1]
    for poison in (np.nan, np.inf, float(jnp.finfo(dtype).max)):
        gradients = cases.value_and_pullback(attend, with_poison(arrays, EXISTS, poison)[0], cotangent)[1]
        assert_close(gradients, expected, dtype)


def test_forward_and_second_derivatives_do_not_see_them_either():
    arrays = {name: normal(seed, 2, 3, N, 4) for seed, name in enumerate("qkv")}
    tangents = {name: normal(seed + 5, 2, 3, N, 4) for seed, name in enumerate("qkv")}

    @jax.jit
    def run(arrays):
        def slope(arrays):
            out = cases.local(**arrays, window=MAIN_PLACE.window, mask=EXISTS)
            return (poisoned(out, EXISTS, 0.0) ** 2).sum()

        return jax.jvp(jax.grad(slope), (arrays,), (tangents,))

    expected = run(with_poison(arrays, EXISTS, 0.0)[0])
    assert_close(run(with_poison(arrays, EXISTS, np.nan)[0]), expected)


def test_masked_queries_are_answered_as_they_are():
    """Only values that are not finite or huge are silenced: the original answers masked queries too."""
    q, k, v = (normal(seed, 2, 3, N, 4) for seed in range(3))
    alone = cases.local(q, *(poisoned(x, EXISTS, 0.0) for x in (k, v)), MAIN_PLACE.window, mask=EXISTS)
    assert_close(cases.local(1e4 * q, k, v, MAIN_PLACE.window, scale=5e-5, mask=EXISTS), alone)
    masked = ~np.asarray(EXISTS)
    assert np.abs(alone - cases.local(-q, k, v, MAIN_PLACE.window, mask=EXISTS)).max((1, 3))[masked].max() > 0.1


def test_a_query_that_is_not_masked_shows_its_nan():
    q, k, v = (normal(seed, 2, 3, N, 4) for seed in range(3))
    at = int(np.argmax(EXISTS[0]))
    out = cases.local(q.at[0, 1, at].set(np.nan), k, v, MAIN_PLACE.window, mask=EXISTS)
    bad = np.zeros((2, 3, N), bool)
    bad[0, 1, at] = True
    np.testing.assert_array_equal(np.isnan(out).any(-1), bad)


def test_a_token_hidden_from_all_heads_that_share_its_keys_is_hidden():
    """Query heads 0 and 1 share the first head of keys, 2 and 3 the second."""
    q, k, v = normal(0, 1, 4, N, 4), normal(1, 1, 2, N, 4), normal(2, 1, 2, N, 4)
    mask = jnp.ones((1, 4, N), bool).at[0, :2, 5].set(False).at[0, 2, 6].set(False)
    attend = partial(cases.local, window=MAIN_PLACE.window, mask=mask)
    hidden = attend(q, k.at[0, 0, 5].set(np.nan), v.at[0, 0, 5].set(np.inf))
    assert_close(hidden, attend(q, k, v))
    seen = attend(q, k, v.at[0, 1, 6].add(1.0))
    np.testing.assert_array_equal(seen[0, :3], attend(q, k, v)[0, :3])
    assert np.abs(seen[0, 3] - attend(q, k, v)[0, 3]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("shared_qk", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_a_bias_of_minus_infinity_hides_a_key(implementation, shared_qk):
    window, n = Window(3), 13
    arrays = {name: normal(seed, 1, 2, n, 4) for seed, name in enumerate("qkv")}
    distance = window.relative_positions()
    hidden = jnp.where((distance == 0) | (distance == -2), -jnp.inf, 0.0)[None]
    shut = jnp.where(distance == -2, -jnp.inf, 0.0).at[1].set(-jnp.inf)[None]  # and all keys of row 1

    def attend(arrays, bias):
        return cases.local(**arrays, window=window, attn_bias=bias, shared_qk=shared_qk, implementation=implementation)

    out, gradients = cases.value_and_pullback(lambda **x: attend(x, hidden), arrays, normal(9, 1, 2, n, 4))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, gradients)))
    jacobian = jax.jacrev(lambda v: attend(arrays | {"v": v}, hidden)[0, 0].sum(-1))(arrays["v"])[:, 0, 0, :, 0]
    i, j = np.arange(n)[:, None], np.arange(n)
    expected = window.sees(i, j) & (i != j) & (j - i != -2)
    np.testing.assert_array_equal(np.asarray(jacobian) != 0, expected)
    np.testing.assert_array_equal(attend(arrays, shut)[:, :, 1::3], 0)


@pytest.mark.parametrize("n", [8, 136, 1000])
def test_silence_finds_tokens_that_are_all_nan(n):
    """XLA's maximum over many numbers on a CPU ignores NaN."""
    x = jnp.full((n, 64), jnp.nan)
    assert not jax.jit(silence)(x, jnp.zeros(n, bool)).any()


def test_silence_touches_masked_tokens_that_are_not_finite_and_no_other():
    x = jnp.array([[1.0, 2.0], [np.nan, 1.0], [np.inf, 0.0], [3e38, 0.0], [1e9, -1e9], [np.nan, 1.0]])
    assert_close(silence(jnp.array([[4e3], [5e3]]), jnp.zeros(2, bool), jnp.float16), jnp.array([[4e3], [0.0]]))
    mask = jnp.array([False, False, False, False, False, True])
    expected = x.at[1:4].set(0.0)
    np.testing.assert_array_equal(silence(x, mask), expected)


# Modules


def assert_module_does_not_see(module, x, mask, poison, gradient_of=("params",)):
    """Compare the outputs of existing tokens, and the gradients of parameters, with those of clean padding."""
    clean = jnp.where(mask[..., None], x, 0.0)
    variables = filled_variables(module, clean)

    @jax.jit
    def run(variables, x):
        def loss(variables, x):
            out = module.apply(variables, x, mask=mask)
            return jnp.where(mask[..., None], jnp.sin(out), 0.0).sum(), jnp.where(mask[..., None], out, 0.0)

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
        return out, gradients

    dirty = jnp.where(mask[..., None], x, poison)
    out, gradients = run(variables, dirty)
    expected = run(variables, clean)
    assert_close(out, expected[0])
    assert_close(gradients[0], expected[1][0])
    assert_close(gradients[1], jnp.where(mask[..., None], expected[1][1], 0.0))


@pytest.mark.slow_but("False-nan")
@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
@pytest.mark.parametrize("prenorm", [False, True])
def test_padding_of_a_module_reaches_no_token_and_no_parameter(prenorm, poison):
    module = LocalMHA(dim=6, window_size=3, heads=2, dim_head=4, prenorm=prenorm, gate_values_per_head=True)
    assert_module_does_not_see(module, normal(0, 2, N, 6), EXISTS, poison)


@pytest.mark.slow
@pytest.mark.parametrize("poison", [1e5, 3e38], ids=["large", "huge"])
def test_padding_that_leaves_the_range_of_a_modules_dtype_reaches_no_parameter(poison):
    x, mask = normal(0, 2, N, 6), EXISTS
    dirty = jnp.where(mask[..., None], x, poison)
    encoder = {"num_tokens": None, "max_seq_len": 0, "causal": False, "local_attn_window_size": 3, "depth": 1}
    small = {"dim": 6, "heads": 2, "dim_head": 4, "dtype": jnp.float16}
    for module in (LocalMHA(window_size=3, **small), LocalTransformer(**encoder, **small)):
        variables = filled_variables(module, x)

        def loss(variables, x, module=module):
            return jnp.where(mask[..., None], module.apply(variables, x, mask=mask), 0).astype(jnp.float32).sum()

        run = jax.jit(jax.grad(loss))
        clean = jnp.where(mask[..., None], x, 0.0)
        assert_close(run(variables, dirty), run(variables, clean), "float16")


@pytest.mark.slow
@pytest.mark.parametrize("poison", [np.nan, 3e38], ids=["nan", "huge"])
def test_padding_frames_of_an_encoder_reach_no_token_and_no_parameter(poison):
    module = LocalTransformer(
        num_tokens=None, max_seq_len=0, dim=6, depth=2, heads=2, dim_head=4, causal=False, local_attn_window_size=3
    )
    assert_module_does_not_see(module, normal(0, 2, N, 6), EXISTS, poison)


@pytest.mark.slow
@pytest.mark.parametrize("use_abs_pos_emb", [False, True])
@pytest.mark.parametrize("padding", [-7, 13, 999])
def test_a_padding_id_outside_the_vocabulary_is_nothing_where_it_is_masked(padding, use_abs_pos_emb):
    model = LocalTransformer(
        num_tokens=13,
        max_seq_len=32,
        dim=6,
        depth=2,
        heads=2,
        dim_head=4,
        local_attn_window_size=3,
        use_abs_pos_emb=use_abs_pos_emb,
        ignore_index=-1,
    )
    lengths = jnp.array([[9], [5]])
    mask = jnp.arange(9) < lengths
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, 9)))
    ignored, padded = (jnp.where(mask, tokens, value) for value in (-1, padding))
    variables = filled_variables(model, ignored)

    def losses(variables, tokens, mask):
        return model.apply(variables, tokens, mask=mask, return_loss=True)

    run = jax.jit(jax.value_and_grad(losses))
    assert_close(run(variables, padded, mask), run(variables, ignored, mask))
    assert_close(losses(variables, padded, mask), losses(variables, ignored, mask))  # eagerly, where tokens are checked
    logits = jax.jit(model.apply)(variables, padded, mask=mask)
    assert np.isfinite(logits).all()
    assert_close(logits[1, :5], model.apply(variables, tokens[1:, :5])[0])
    with pytest.raises(ValueError, match=r"`x` must be tokens in \[0, 13\), `ignore_index` \(-1\) or masked"):
        model.apply(variables, padded)


def test_flax_modules_do_not_see_padding():
    q, k, v = (normal(seed, 2, N, 3, 4) for seed in range(3))
    dirty = (jnp.where(EXISTS[:, :, None, None], x, np.nan) for x in (k, v))
    attend = partial(attention_fn(Window.sliding(4)), q, mask=nn.make_attention_mask(jnp.ones((2, 1)), EXISTS))
    assert_close(attend(*dirty), attend(k, v))


def test_a_cache_keeps_nothing_of_absent_tokens():
    options = AttentionOptions(Window(3, causal=True), rotary=Rotary(4))
    q, k, v = (normal(seed, 2, 3, N, 4) for seed in range(3))
    cache = KVCache.create(options, 2, 3, 4)
    clean = (poisoned(x, EXISTS, 0.0) for x in (q, k, v))
    expected, expected_cache = cached_attention(*clean, cache, mask=EXISTS)
    for poison in POISONS.values():
        out, grown = cached_attention(*(poisoned(x, EXISTS, poison) for x in (q, k, v)), cache, mask=EXISTS)
        assert_close(poisoned(out, EXISTS, 0.0), poisoned(expected, EXISTS, 0.0))
        jax.tree.map(np.testing.assert_array_equal, grown, expected_cache)
