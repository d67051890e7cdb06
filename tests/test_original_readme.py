"""The examples of the original's README, with only the import and `init` / `apply` changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import LocalAttention, LocalTransformer


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.slow
def test_causal_attention_with_a_window_of_512():
    q, k, v = (normal(seed, 2, 8, 2048, 64) for seed in range(3))

    attn = LocalAttention(
        dim=64,
        window_size=512,
        causal=True,
        look_backward=1,
        look_forward=0,
        dropout=0.1,
        exact_windowsize=False,
    )

    mask = jnp.ones((2, 2048), bool)
    out = attn.apply({}, q, k, v, mask=mask)
    assert out.shape == (2, 8, 2048, 64)
    assert jnp.isfinite(out).all()
    np.testing.assert_array_equal(out, attn.apply({}, q, k, v))

    trained = attn.apply({}, q, k, v, mask=mask, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert jnp.abs(trained - out).max() > 0.1
    np.testing.assert_allclose(trained.mean(), out.mean(), atol=1e-3)


def test_shared_queries_and_keys():
    qk, v = normal(0, 2, 8, 2048, 64), normal(1, 2, 8, 2048, 64)

    attn = LocalAttention(
        dim=64,
        window_size=512,
        shared_qk=True,
        causal=True,
    )

    mask = jnp.ones((2, 2048), bool)
    out = attn.apply({}, qk, qk, v, mask=mask)
    assert out.shape == (2, 8, 2048, 64)
    np.testing.assert_allclose(out[..., :2, :], v[..., [0, 0], :], atol=1e-6)  # the second token sees only the first


def test_autopad_of_a_ragged_length_with_one_mask_for_all():
    q, k, v = (normal(seed, 8, 2057, 64) for seed in range(3))

    attn = LocalAttention(
        window_size=512,
        causal=True,
        autopad=True,
    )

    mask = jnp.ones((1, 2057), bool)
    out = attn.apply({}, q, k, v, mask=mask)
    assert out.shape == (8, 2057, 64)
    even = LocalAttention(window_size=512, causal=True).apply({}, *(x[:, :2048] for x in (q, k, v)))
    np.testing.assert_allclose(out[:, :2048], even, atol=1e-6)


@pytest.mark.slow
def test_transformer_over_8192_tokens():
    model = LocalTransformer(
        num_tokens=256,
        dim=512,
        depth=6,
        max_seq_len=8192,
        causal=True,
        local_attn_window_size=256,
    )

    x = jax.random.randint(jax.random.key(0), (1, 8192), 0, 256)
    variables = jax.jit(model.init)(jax.random.key(1), x[:, :256])

    logits = jax.jit(model.apply)(variables, x)
    assert logits.shape == (1, 8192, 256)

    loss = jax.jit(lambda variables, x: model.apply(variables, x, return_loss=True))(variables, x)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), x[:, 1:, None], -1).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert 7.9 < loss / jnp.log(2) < 8.6  # an untrained model: 8 bits, and a little more for its random confidence
