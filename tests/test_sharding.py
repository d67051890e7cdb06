"""Local attention under shard_map: batch, heads and the sequence sharded over devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flax_local_attention import AttentionOptions, KVCache, Rotary, Unsupported, Window, cached_attention
from tests.cases import assert_close, draw_call, draw_cotangent, in_blocks, local, value_and_pullback

pytestmark = pytest.mark.usefixtures("quick_compile")

OPTIONS = AttentionOptions(Window(5, causal=True), rotary=Rotary(6))


@pytest.fixture
def mesh():
    devices = jax.devices("cpu")
    if len(devices) < 2:
        pytest.skip("needs two devices")
    return Mesh(np.array(devices[:2]), ("x",))


@pytest.mark.slow
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


# A sequence sharded over devices


CAUSAL = Window(4, causal=True)
SPREAD = {
    "causal": (CAUSAL, (), 16),
    "exact, any length": (Window.sliding(6), ("rotary",), 14),
    "both ways": (Window(4, look_backward=2), ("mask",), 16),
    "exact both ways": (Window.between(7, 3), ("xpos",), 20),
    "documents": (CAUSAL, ("segment_ids", "rotary", "sinks"), 24),
    "bias and groups": (Window(4, exact_windowsize=True), ("bias", "grouped", "soft_cap"), 24),
    "longer than a shard": (Window(4, causal=True, look_backward=3), ("rotary", "mask"), 16),
    "longer than the sequence": (Window(2, look_backward=40, look_forward=40), (), 16),
    "longer than the sequence, exact": (Window.between(100, 50), ("rotary",), 16),
    "without a limit": (Window.everything(), ("rotary",), 16),
}


def spread(devices, name, attention):
    """Return attention over shards of a drawn sequence with its gradients, and the draw."""
    window, features, n = SPREAD[name]
    n *= devices // 2
    arrays, traced, options = draw_call(features, window, n)
    mesh = Mesh(np.array(jax.devices("cpu")[:devices]), ("sequence",))
    specs = {name: P(None, None, "sequence") if name in "qkv" else P() for name in arrays}
    in_specs = (specs, dict.fromkeys(traced, P(None, "sequence")))

    def attend(arrays, traced):
        return attention(**arrays, **traced, **options, window=window, axis_name="sequence")

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=P(None, None, "sequence"))
    cotangent = draw_cotangent(arrays)

    @jax.jit
    def both(arrays, traced):
        ours = value_and_pullback(lambda **arrays: sharded(arrays, traced), arrays, cotangent)
        return ours, value_and_pullback(partial(local, window=window, **traced, **options), arrays, cotangent)

    return both(arrays, traced)


@pytest.mark.slow_but("causal-4", "without a limit-2")
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", SPREAD)
def test_a_spread_sequence_and_its_gradients_equal_the_whole(name, devices):
    if len(jax.devices("cpu")) < devices:
        pytest.skip(f"needs {devices} devices")
    assert_close(*spread(devices, name, in_blocks))


def test_a_causal_shard_asks_its_left_neighbour_once(mesh):
    x = jax.ShapeDtypeStruct((1, 2, 64, 8), jnp.float32)
    spec = P(None, None, "x")
    attend = partial(local, window=Window.sliding(9), axis_name="x")
    sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec))
    compiled = sharded.lower(x, x, x).compile().as_text()
    assert len(re.findall(r" collective-permute(?:-start)?\(", compiled)) == 1
    assert "f32[1,2,1,8,16]" in re.search(r"= (\S+?) collective-permute", compiled)[1]
    assert "all-gather" not in compiled


@pytest.mark.slow
def test_shards_drop_differently(mesh):
    q = jnp.ones((1, 1, 32, 4))
    spec = P(None, None, "x")
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "axis_name": "x"}
    attend = partial(local, window=Window(8, look_backward=0, look_forward=0), **options)
    out = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)(q, q, q)
    assert (out[:, :, :16] != out[:, :, 16:]).any()


@pytest.mark.slow
def test_keys_that_travel_around_the_ring_are_dropped_differently_from_shard_to_shard():
    if len(jax.devices("cpu")) < 3:
        pytest.skip("needs three devices")
    mesh, spec, n = Mesh(np.array(jax.devices("cpu")[:3]), ("x",)), P(None, None, "x"), 5
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "axis_name": "x"}
    attend = partial(local, window=Window.everything(), **options)
    q, v = jnp.ones((1, 1, 3 * n, 4)), jnp.eye(3 * n)[None, None]
    weights = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)(q, q, v)[0, 0]
    kept = (weights > 0).reshape(3, n, 3, n).transpose(0, 2, 1, 3)  # by the shards of the query and the key
    for one, two, three in kept:
        assert (one != two).any()
        assert (two != three).any()
        assert (three != one).any()


@pytest.mark.parametrize(
    ("window", "options", "phrase"),
    [
        (Window(5, causal=True), {}, "shards must be whole windows for a plain window"),
        (Window(5, causal=True, exact_windowsize=True), {"attn_bias": jnp.ones((1, 5, 10))}, "or a bias"),
        (CAUSAL, {"q_offset": 3}, "no `q_offset`"),
    ],
)
def test_shards_that_cannot_be_served_are_refused(mesh, window, options, phrase):
    spec = P(None, None, "x")
    attend = partial(local, window=window, axis_name="x", **options)
    with pytest.raises(Unsupported, match=phrase):
        jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)(*[jnp.ones((1, 1, 32, 4))] * 3)
