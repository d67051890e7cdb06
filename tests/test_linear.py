"""Linear layers equal Flax's, on one device and on meshes with explicit axes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention.fields import linear_init
from flax_local_attention.linear import Linear, product, split_features
from tests.cases import assert_close, normal

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def mesh():
    devices = jax.devices("cpu")[:8]
    if len(devices) < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh((2, 2, 2), ("data", "sequence", "model"), axis_types=(AxisType.Explicit,) * 3, devices=devices)


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_on_one_device_it_is_flaxs(dtype):
    x, init = normal(0, 2, 5, 3), nn.initializers.normal()
    options = {"use_bias": True, "kernel_init": linear_init, "bias_init": init, "dtype": dtype}
    ours, theirs = Linear(3, 7, **options), nn.Dense(7, **options)
    variables = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), x))
    np.testing.assert_array_equal(ours.apply(variables, x), theirs.apply(variables, x))
    parts = ours.apply(variables, x, (2, 5), (1, 1), method="in_parts")
    assert_close(jnp.concatenate(parts, -1).astype(jnp.float32), ours.apply(variables, x).astype(jnp.float32))


@pytest.mark.parametrize(
    ("tokens", "kernel", "expected"),
    [
        (P("data", "sequence"), P(), P("data", "sequence", None)),
        (P("data", "sequence"), P(None, "model"), P("data", "sequence", "model")),
        (P("data", "sequence", "model"), P("model", None), P("data", "sequence", None)),
        (P("data", "sequence"), P("data", "model"), P("data", "sequence", "model")),
        (P("data", "sequence", "model"), P("model", "data"), P("data", "sequence", None)),
        (P(("data", "sequence")), P("data", ("sequence", "model")), P(("data", "sequence"), None, "model")),
        (P(None, "sequence", "model"), P(None, "model"), P(None, "sequence", None)),
        (P("data"), P("model", None), P("data", None, None)),
    ],
)
def test_a_product_and_its_gradients_are_spread_by_tokens_and_features(mesh, tokens, kernel, expected):
    x, weights, cotangent = normal(0, 4, 6, 8), normal(1, 8, 12), normal(2, 4, 6, 12)

    @jax.jit
    def both(x, kernel):
        out, pull_back = jax.vjp(product, x, kernel)
        return out, *pull_back(cotangent + jnp.zeros_like(out))

    arguments = put(x, mesh, *tokens), put(weights, mesh, *kernel)
    results = both(*arguments)
    assert_close(results, both(x, weights))
    assert results[0].sharding.spec == expected
    assert all(
        ours.sharding.is_equivalent_to(x.sharding, x.ndim) for ours, x in zip(results[1:], arguments, strict=True)
    )


def test_features_are_cut_with_their_weights(mesh):
    kernel, bias = normal(0, 8, 12), normal(1, 12)
    for whole, spec in ((kernel, ("data", "model")), (bias, ("model",))):
        parts = jax.jit(partial(split_features, widths=(6, 4, 2), units=(8, 6, 1), extra=2))(put(whole, mesh, *spec))
        expected = split_features(whole, (6, 4, 2), (8, 6, 1), extra=2)
        jax.tree.map(np.testing.assert_array_equal, parts, expected)
        assert [part.shape[-1] for part in parts] == [8, 6, 4]


def test_parts_of_a_layer_are_spread_where_units_divide(mesh):
    module, x = Linear(8, 12, use_bias=True, bias_init=nn.initializers.normal()), normal(0, 4, 6, 8)
    variables = module.init(jax.random.key(0), x)
    spread = {"params": {"kernel": ("data", "model"), "bias": ("model",)}}
    placed = jax.tree.map(lambda x, spec: put(x, mesh, *spec), variables, spread)
    split = jax.jit(lambda variables, x: module.apply(variables, x, (8, 4), (4, 1), method="in_parts"))
    parts = split(placed, put(x, mesh, "data", "sequence"))
    assert_close(parts, split(variables, x))
    assert [part.sharding.spec for part in parts] == [P("data", "sequence", "model"), P("data", "sequence", None)]
