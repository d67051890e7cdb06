"""Local attention under shard_map: batch and heads spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flax_local_attention import AttentionOptions, KVCache, Rotary, Window, cached_attention
from tests.cases import in_blocks, local

OPTIONS = AttentionOptions(Window(5, causal=True), rotary=Rotary(6))


@pytest.fixture
def mesh():
    devices = jax.devices("cpu")
    if len(devices) < 2:
        pytest.skip("needs two devices")
    return Mesh(np.array(devices[:2]), ("x",))


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["batch", "heads"])
def test_a_sharded_call_and_its_gradients_equal_the_whole(mesh, spec):
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, 4, 37, 6))

    def attend(q, k, v):
        return in_blocks(q, k, v, OPTIONS.window, rotary=OPTIONS.rotary)

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    out, pull_back = jax.vjp(jax.jit(attend), q, k, v)
    sharded_out, sharded_pull_back = jax.vjp(jax.jit(sharded), q, k, v)
    np.testing.assert_allclose(sharded_out, out, atol=1e-6)
    for ours, expected in zip(sharded_pull_back(cotangent), pull_back(cotangent), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_a_sharded_cache_decodes_as_the_whole(mesh):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 13, 6))
    cache = KVCache.create(OPTIONS, 2, 4, 6)

    def decode(q, k, v, cache):
        return cached_attention(q, k, v, cache)[0]

    sharded = jax.jit(jax.shard_map(decode, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    expected = local(q, k, v, OPTIONS.window, rotary=OPTIONS.rotary)
    np.testing.assert_allclose(sharded(q, k, v, cache), expected, atol=1e-5)
    assert jnp.isfinite(expected).all()
