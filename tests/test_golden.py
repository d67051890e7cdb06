"""Our outputs against stored ones of the original, without torch; `make_golden.py` wrote them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import DynamicPositionBias, FeedForward, LocalAttention, LocalMHA, LocalTransformer
from flax_local_attention.residual_streams import HyperConnection
from tests import make_golden
from tests.cases import IN_BLOCKS
from tests.original import filled_variables, normal

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return {**np.load(make_golden.GOLDEN / "attention.npz"), **np.load(make_golden.GOLDEN / "modules.npz")}


@pytest.mark.parametrize("name", make_golden.ATTENTION)
def test_attention_and_its_gradients_equal_the_originals_stored_ones(golden, name):
    shape, options = make_golden.ATTENTION[name]
    *qkv, cotangent = (normal(seed, *shape) for seed in range(4))

    @jax.jit
    def run(qkv, cotangent):
        out, pull = jax.vjp(lambda q, k, v: LocalAttention(**IN_BLOCKS, **options).apply({}, q, k, v), *qkv)
        return jnp.stack([out, *pull(cotangent)])

    np.testing.assert_allclose(run(qkv, cotangent), golden[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "module", "inputs"),
    [
        ("mha", LocalMHA(**IN_BLOCKS, **make_golden.MHA), [normal(0, 2, 7, 6)]),
        ("feed_forward", FeedForward(**make_golden.FEED_FORWARD), [normal(0, 3, 7)]),
        ("position_bias", DynamicPositionBias(**make_golden.POSITION_BIAS), [3, 6]),
        (
            "logits",
            LocalTransformer(**IN_BLOCKS, **make_golden.TRANSFORMER),
            [make_golden.transformer_tokens()[:, :-1]],
        ),
    ],
)
def test_modules_equal_the_originals_stored_outputs(golden, name, module, inputs):
    out = jax.jit(lambda variables: module.apply(variables, *inputs))(filled_variables(module, *inputs))
    np.testing.assert_allclose(out, golden[name], rtol=0, atol=1e-4 if name == "logits" else 2e-5)


def test_loss_equals_the_originals_stored_one(golden):
    model, tokens = LocalTransformer(**IN_BLOCKS, **make_golden.TRANSFORMER), make_golden.transformer_tokens()
    loss = jax.jit(lambda variables: model.apply(variables, tokens, return_loss=True))(filled_variables(model, tokens))
    np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=1e-5)


def test_residual_streams_equal_the_originals_stored_ones(golden):
    connection = HyperConnection(**make_golden.STREAMS)
    residual = normal(0, make_golden.STREAMS["num_streams"], 2, 4, make_golden.STREAMS["dim"])
    x, mixed = connection.apply(filled_variables(connection, residual), residual)
    np.testing.assert_allclose(mixed.add(jnp.sin(x)).write(), golden["streams"], rtol=0, atol=2e-5)
