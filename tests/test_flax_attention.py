"""Local attention inside Flax's multi-head attention modules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from flax_local_attention import AttentionOptions, Rotary, Window, attention_fn
from tests.cases import local

pytestmark = pytest.mark.usefixtures("quick_compile")

WINDOW = Window(3, causal=True)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def by_hand(query, key, value, **options):
    """Compute what the function must return, on ``[b, n, h, d]``."""
    out = local(*(jnp.swapaxes(x, 1, 2) for x in (query, key, value)), WINDOW, **options)
    return jnp.swapaxes(out, 1, 2)


def linen_and_variables(**options):
    module = nn.MultiHeadDotProductAttention(num_heads=2, **options)
    x = normal(0, 2, 11, 10)
    return module, module.init(jax.random.key(1), x, deterministic=True), x


def test_the_function_is_local_attention_with_heads_after_tokens():
    q, k, v = (normal(seed, 2, 11, 4, 6) for seed in range(3))
    rotary = Rotary(6)
    attend = attention_fn(AttentionOptions(WINDOW, rotary=rotary, logits_soft_cap=2.0), autopad=True)
    expected = by_hand(q, k, v, rotary=rotary, logits_soft_cap=2.0)
    np.testing.assert_allclose(attend(q, k, v), expected, atol=1e-6)


def test_linen_sees_the_window_and_the_mask_of_keys():
    masked, variables, x = linen_and_variables(attention_fn=attention_fn(WINDOW))
    full = nn.MultiHeadDotProductAttention(num_heads=2)
    exists = jnp.arange(11) < jnp.array([[11], [7]])
    seen = Window(3, causal=True).sees(jnp.arange(11)[:, None], jnp.arange(11))
    mask = nn.make_attention_mask(jnp.ones((2, 1)), exists)
    expected = full.apply(variables, x, mask=(mask * seen).astype(bool))
    out = masked.apply(variables, x, mask=mask)
    np.testing.assert_allclose(out[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(out[1, :7], expected[1, :7], atol=1e-5)


def test_nnx_sees_the_window_and_the_mask_of_keys():
    options = {"num_heads": 2, "in_features": 10, "decode": False}
    local = nnx.MultiHeadAttention(**options, attention_fn=attention_fn(WINDOW), rngs=nnx.Rngs(0))
    full = nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0))
    x = normal(0, 2, 11, 10)
    exists = jnp.arange(11) < jnp.array([[11], [7]])
    seen = Window(3, causal=True).sees(jnp.arange(11)[:, None], jnp.arange(11))
    mask = nn.make_attention_mask(jnp.ones((2, 1)), exists)
    out, expected = local(x, mask=mask), full(x, mask=(mask * seen).astype(bool))
    np.testing.assert_allclose(out[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(out[1, :7], expected[1, :7], atol=1e-5)


def test_nnx_groups_its_queries():
    attend = attention_fn(WINDOW)
    layer = nnx.MultiHeadAttention(4, 8, num_kv_heads=2, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    x = normal(0, 2, 11, 8)
    expected = layer.out(by_hand(layer.query(x), layer.key(x), layer.value(x)))
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_dropout_is_not_lost(kind):
    attend = attention_fn(WINDOW)
    if kind == "linen":
        module, variables, x = linen_and_variables(attention_fn=attend, dropout_rate=0.5)

        def run(seed, deterministic):
            rngs = {"dropout": jax.random.key(seed)}
            return module.apply(variables, x, deterministic=deterministic, rngs=rngs)
    else:
        options = {"num_heads": 2, "in_features": 10, "dropout_rate": 0.5, "decode": False}
        layer, x = nnx.MultiHeadAttention(**options, attention_fn=attend, rngs=nnx.Rngs(0)), normal(0, 2, 11, 10)

        def run(seed, deterministic):
            return layer(x, deterministic=deterministic, rngs=nnx.Rngs(dropout=seed))

    np.testing.assert_array_equal(run(0, False), run(0, False))
    assert jnp.abs(run(0, False) - run(1, False)).max() > 1e-2
    assert jnp.abs(run(0, False) - run(0, True)).max() > 1e-2
    np.testing.assert_array_equal(run(0, True), run(1, True))


def test_dtype_is_that_of_the_module():
    module, variables, x = linen_and_variables(attention_fn=attention_fn(WINDOW), dtype=jnp.bfloat16)
    assert module.apply(variables, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("window", [WINDOW, Window.chunks(4), Window.sliding(None), Window.everything()], ids=str)
def test_a_window_of_any_kind_takes_any_length(window):
    q, k, v = (normal(seed, 2, 11, 4, 6) for seed in range(3))
    seen = window.sees(jnp.arange(11)[:, None], jnp.arange(11))
    expected = nn.dot_product_attention(q, k, v, mask=seen)
    np.testing.assert_allclose(attention_fn(window)(q, k, v), expected, atol=1e-6)


@pytest.mark.slow
def test_a_sliding_window_is_one_line():
    q, k, v = (normal(seed, 1, 9, 2, 4) for seed in range(3))
    attend = attention_fn(Window.sliding(4))
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(3, 0))
    np.testing.assert_allclose(attend(q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"mask": jnp.ones((1, 1, 6, 6), bool)}, r"`mask` must be of keys alone"),
        ({"mask": jnp.ones((1, 2, 1, 6), bool)}, r"`mask` must be of keys alone"),
        ({"mask": jnp.ones((1, 1, 1, 5), bool)}, r"`mask` must be \[b, n\] with n = 6"),
        ({"bias": jnp.ones((2, 6, 6))}, r"`bias` must be None, got .*: it is n x n"),
        ({"module": object()}, r"`sow_weights`"),
        ({"qk_attn_weights_einsum": object()}, r"custom einsums cannot be applied"),
        ({"attn_weights_value_einsum": object()}, r"custom einsums cannot be applied"),
        ({"dropout_rate": 0.5}, r"`dropout_rng` must be given"),
    ],
)
def test_what_cannot_be_heeded_is_refused(options, phrase):
    q = normal(0, 1, 6, 2, 4)
    with pytest.raises(ValueError, match=phrase):
        attention_fn(WINDOW)(q, q, q, **options)


def test_einsums_of_a_linen_module_are_refused_not_lost():
    """Linen passes only the keywords that a signature names."""
    attend = attention_fn(WINDOW)
    einsums = {"qk_attn_weights_einsum_cls": lambda: jnp.einsum, "attn_weights_value_einsum_cls": lambda: jnp.einsum}
    with pytest.raises(ValueError, match="custom einsums cannot be applied"):
        linen_and_variables(attention_fn=attend, **einsums)


@pytest.mark.slow_but("linen")
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_weights_are_never_sown(kind):
    attend = attention_fn(WINDOW)
    if kind == "linen":
        module, variables, x = linen_and_variables(attention_fn=attend)
        call = partial(module.apply, variables)
    else:
        x = normal(0, 2, 11, 10)
        call = nnx.MultiHeadAttention(2, 10, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`sow_weights` needs n x n probabilities"):
        call(x, sow_weights=True)


def test_a_keyword_that_is_not_known_is_refused_by_its_name():
    q = normal(0, 1, 6, 2, 4)
    with pytest.raises(TypeError, match="must be known to `attention_fn`, got `input_positions`; leave out"):
        attention_fn(WINDOW)(q, q, q, input_positions=jnp.arange(6))


def test_keywords_that_change_nothing_pass():
    q = normal(0, 1, 6, 2, 4)
    attend = attention_fn(WINDOW)
    flags = {"broadcast_dropout": False, "force_fp32_for_softmax": True, "module": None, "bias": None}
    np.testing.assert_array_equal(attend(q, q, q, **flags), attend(q, q, q))


ADDITIVE = np.where(np.arange(6) < 4, 0.0, -1e9)[None, None, None].astype(np.float32)


@pytest.mark.slow
def test_a_mask_of_numbers_is_one_of_ones_and_zeros():
    """Flax makes such masks; an additive mask would mean the opposite."""
    q, k, v = (normal(seed, 1, 6, 2, 4) for seed in range(3))
    attend = attention_fn(WINDOW)
    expected = attend(q, k, v, mask=jnp.asarray(ADDITIVE == 0))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8):
        mask = jnp.asarray(ADDITIVE == 0, dtype)
        np.testing.assert_array_equal(attend(q, k, v, mask=mask), expected)
        np.testing.assert_array_equal(jax.jit(lambda mask: attend(q, k, v, mask=mask))(mask), expected)
    for wrong in (ADDITIVE, jnp.asarray(ADDITIVE), np.where(ADDITIVE == 0, 0.0, -np.inf), ADDITIVE * np.nan):
        with pytest.raises(ValueError, match=r"convert a mask that is added to scores, by `mask > -1`"):
            attend(q, k, v, mask=wrong)
        assert np.isnan(jax.jit(lambda mask: attend(q, k, v, mask=mask))(wrong)).all()
    np.testing.assert_array_equal(attend(q, k, v, mask=jnp.asarray(ADDITIVE > -1)), expected)


def test_is_causal_must_be_the_windows():
    q = normal(0, 1, 6, 2, 4)
    with pytest.raises(ValueError, match="`is_causal` must be the window's"):
        attention_fn(Window(3))(q, q, q, is_causal=True)
    np.testing.assert_array_equal(
        attention_fn(WINDOW)(q, q, q, is_causal=True),
        attention_fn(WINDOW)(q, q, q, is_causal=False),
    )


def test_decoding_by_the_modules_own_cache_is_refused():
    module, variables, x = linen_and_variables(attention_fn=attention_fn(WINDOW), decode=True)
    with pytest.raises(ValueError, match="decode with LocalMHA"):
        module.apply(variables, x[:, :1], mutable=["cache"])


@pytest.mark.parametrize(
    ("error", "phrase", "call"),
    [
        (
            TypeError,
            "one AttentionOptions, got `window_size`, `causal`; write attention_fn",
            {"window_size": 3, "causal": True},
        ),
        (TypeError, "one AttentionOptions, got `rotary`", {"options": WINDOW, "rotary": Rotary(4)}),
        (TypeError, "must be AttentionOptions or a Window, got None", {}),
        (TypeError, "must be AttentionOptions or a Window, got 3", {"options": 3}),
        (ValueError, "`dropout_rate` must be the module's", {"options": AttentionOptions(WINDOW, dropout_rate=0.5)}),
    ],
)
def test_wrong_options_are_refused_when_the_function_is_made(error, phrase, call):
    with pytest.raises(error, match=phrase):
        attention_fn(**call)


def test_the_modules_precision_takes_the_place_of_the_options():
    q = jax.ShapeDtypeStruct((1, 6, 2, 4), jnp.float32)
    attend = attention_fn(AttentionOptions(WINDOW, precision="high"))

    def precisions(**call):
        text = jax.jit(lambda q: attend(q, q, q, **call)).lower(q).as_text()
        return {word for word in ("HIGHEST", "HIGH,", "DEFAULT") if f"[{word}" in text}

    assert precisions() == {"HIGH,"}
    assert precisions(precision="highest") == {"HIGHEST"}
