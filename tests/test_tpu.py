"""Fused kernels for TPUs, interpreted on a CPU in float32; `test_aot` compiles them for an absent TPU."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention import TPU, LocalMHA, Rotary, Unsupported, Window, cached_attention
from flax_local_attention.cache import KVCache
from flax_local_attention.kernels.pallas_tpu import Block, Walk
from flax_local_attention.kernels.tpu import Tiles
from tests import cases
from tests.cases import assert_close, normal
from tests.kernel_calls import BOTH, CONFORMANCE, EXACT, PLAIN, Call, assert_huge_sinks_are_right, assert_right, drawn

KERNELS = TPU(Tiles(Block(32, 16), Block(16, 32), Block(16, 16)), interpret=True)

pytestmark = pytest.mark.usefixtures("quick_compile")

EVERYTHING = Call(
    PLAIN,
    n=37,
    heads=4,
    kv_heads=2,
    features=("mask", "segment_ids", "sinks", "dropout"),
    options=(("logits_soft_cap", 2.0), ("dropout_rate", 0.2)),
)
CALLS = {
    name: CONFORMANCE[name]
    for name in ("plain both, far back", "one token", "offset both ways", "global keys, wider values, shared")
} | {
    "everything": EVERYTHING,
    "everything, rows of 128 features": dataclasses.replace(EVERYTHING, d=128),
    "whole blocks, rows of 128 features": Call(BOTH, d=128, n=32, b=1),
}
REST = {name: call for name, call in CONFORMANCE.items() if "bias" not in name and name not in CALLS}


@pytest.mark.slow_but("plain both, far back")
@pytest.mark.parametrize("name", CALLS)
def test_kernels_equal_the_definition_and_repeat(name):
    assert_right(KERNELS, CALLS[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", REST)
def test_kernels_equal_the_definition_and_repeat_for_the_rest(name):
    assert_right(KERNELS, REST[name])


def drawn_without_bias(seed):
    call = drawn(seed)
    return dataclasses.replace(call, features=tuple(x for x in call.features if "bias" not in x))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_drawn_calls_equal_the_definition_and_repeat(seed):
    assert_right(KERNELS, drawn_without_bias(seed), seed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(2, 502))
def test_many_drawn_calls_equal_the_definition_and_repeat(seed):
    assert_right(KERNELS, drawn_without_bias(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("d", [16, 128])
def test_nothing_that_masked_tokens_hold_reaches_another_token(d):
    call = Call(EXACT, n=45, d=d, b=1, features=("mask",))
    arrays, fixed = call.arrays()
    hidden = ~fixed["mask"][:, None, :, None]
    cotangent = jnp.where(hidden, 0, cases.draw_cotangent(arrays))

    @jax.jit
    def run(arrays):
        attend = partial(cases.local, window=EXACT, implementation=KERNELS, **fixed)
        return cases.value_and_pullback(lambda **arrays: attend(**arrays), arrays, cotangent)

    clean = run({name: jnp.where(hidden, 0, x) for name, x in arrays.items()})
    spoiled = run({name: jnp.where(hidden, jnp.nan, x) for name, x in arrays.items()})
    jax.tree.map(lambda a, b: assert_close(jnp.where(hidden, 0, a), jnp.where(hidden, 0, b)), spoiled, clean)


REFUSED = {
    "bias": ({"attn_bias": jnp.ones((2, 8, 16))}, "they add no bias"),
    "xPos": ({"rotary": Rotary(16, use_xpos=True)}, "xPos"),
    "traced scale": ({"scale": jnp.float32(2.0)}, "`scale` must be a positive number"),
    "float16": ({}, "one dtype, bfloat16 or float32, got float16"),
    "wide heads": ({}, "at most 256 wide, got 272"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_kernels_refuse_what_they_cannot_do(name):
    options, phrase = REFUSED[name]
    d, dtype = (272 if name == "wide heads" else 16), (jnp.float16 if name == "float16" else jnp.float32)
    q = jnp.ones((1, 2, 21, d), dtype)
    with pytest.raises(Unsupported, match=phrase):
        cases.local(q, q, q, Window(8, causal=True), implementation=KERNELS, **options)


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="needs a device without these kernels")
def test_kernels_are_refused_on_a_device_without_them():
    q = jnp.ones((1, 2, 21, 16))
    with pytest.raises(Unsupported, match=r"TPU kernels needs a TPU.* got cpu"):
        cases.local(q, q, q, Window(8, causal=True), implementation="tpu")


@pytest.mark.slow_but("0-block0-window0", "None-block1-window2")
@pytest.mark.parametrize("window", [PLAIN, BOTH, Window(5, look_backward=2, look_forward=3)])
@pytest.mark.parametrize("block", [Block(16, 32), Block(8, 8)])
@pytest.mark.parametrize("offset", [0, None])
def test_a_walk_visits_the_blocks_of_its_window_and_copies_no_others(window, block, offset):
    """Also with a traced offset, for which the grid has enough steps for any value."""
    assert_visits(window, block, offset, 75, 131)


@pytest.mark.slow_but("3-51")
@pytest.mark.parametrize("w", [7, 51, 67])
@pytest.mark.parametrize("look_backward", [0, 3])
def test_a_walk_with_a_traced_offset_has_steps_enough_for_keys_of_any_window(w, look_backward):
    assert_visits(Window(w, causal=True, look_backward=look_backward), Block(32, 16), None, 300, 300)


def assert_visits(window, block, offset, n, n_keys):
    """Assert that a walk visits exactly the blocks with visible keys, once each."""
    for side in (window, window.transposed):
        walk = Walk(side, block, n, n_keys, offset, group=1)
        for origin in (0, 1, 37) if offset is None else (offset,):
            sees = window.sees(origin + np.arange(n)[:, None], np.arange(n_keys)[None])
            sees = sees.T if walk.by_keys else sees
            programs = jnp.repeat(jnp.arange(walk.programs), walk.steps)
            steps = jnp.tile(jnp.arange(walk.steps), walk.programs)
            place = jax.vmap(lambda program, step, walk=walk, origin=origin: walk.place(program, step, origin))(
                programs, steps
            )
            columns = np.asarray(place.q_block if walk.by_keys else place.k_block)
            rows, cols = block
            visited = np.asarray(place.is_visited)
            pairs = list(zip(np.asarray(programs)[visited].tolist(), columns[visited].tolist(), strict=True))
            assert len(set(pairs)) == len(pairs)
            wanted = {(i // rows, j // cols) for i, j in zip(*np.nonzero(sees), strict=True)}
            alone = {pair for pair in pairs if not sees[pair[0] * rows : (pair[0] + 1) * rows].any()}
            assert set(pairs) - alone == wanted
            assert 0 <= columns.min() <= columns.max() < -(-sees.shape[1] // cols)


@pytest.mark.slow
def test_rows_that_see_nothing_get_zeros_and_no_gradient():
    """Queries far beyond the last key."""
    q, k = normal(0, 1, 2, 20, 16), normal(1, 1, 2, 30, 16)
    attend = partial(cases.local, window=EXACT, q_offset=200, implementation=KERNELS)
    out, gradients = cases.value_and_pullback(lambda q, k, v: attend(q, k, v), {"q": q, "k": k, "v": k}, q)
    assert not any(np.any(x) for x in jax.tree.leaves((out, gradients)))


@pytest.mark.slow
def test_the_gradient_of_a_log_sum_exp():
    call = Call(EXACT, n=37, b=1)
    arrays, _ = call.arrays()

    def loss(implementation, arrays):
        out, log_sum = cases.local(**arrays, window=EXACT, implementation=implementation, return_log_sum=True)
        return jnp.sin(out).sum() + jnp.cos(log_sum.log_sum_exp()).sum()

    ours, expected = (jax.jit(jax.grad(partial(loss, x)))(arrays) for x in (KERNELS, "dense"))
    jax.tree.map(assert_close, ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["batch", "heads"])
def test_a_program_on_a_mesh_is_partitioned_without_gathering(spec, spread_kernels):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(AxisType.Auto,))
    arrays = {name: normal(at, 2, 2, 21, 16) for at, name in enumerate("qkv")}
    sharded = {name: jax.device_put(x, NamedSharding(mesh, spec)) for name, x in arrays.items()}

    def gradient(implementation, arrays):
        attend = partial(cases.local, window=EXACT, implementation=implementation)
        return jax.value_and_grad(lambda arrays: jnp.sin(attend(**arrays)).sum())(arrays)

    compiled = jax.jit(partial(gradient, KERNELS)).lower(sharded).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    jax.tree.map(assert_close, compiled(sharded), jax.jit(partial(gradient, "dense"))(arrays))


@pytest.mark.slow
def test_inside_shard_map():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    q = normal(0, 2, 1, 21, 16)

    def loss(implementation, q):
        attend = partial(cases.local, window=EXACT, implementation=implementation)
        if implementation != "dense":
            attend = jax.shard_map(attend, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        return jnp.sin(attend(q, q, q)).sum()

    ours, expected = (jax.jit(jax.value_and_grad(partial(loss, x)))(q) for x in (KERNELS, "dense"))
    jax.tree.map(assert_close, ours, expected)


@pytest.mark.slow
def test_a_module_and_its_cache():
    fields = {"dim": 24, "window_size": 16, "causal": True, "dim_head": 16, "heads": 2, "exact_windowsize": True}
    x = normal(0, 1, 70, 24)
    variables = LocalMHA(**fields).init(jax.random.key(0), x)
    ours, plain = (LocalMHA(**fields, implementation=by).apply(variables, x) for by in (KERNELS, "xla"))
    assert_close(ours, plain)
    q = normal(0, 1, 2, 70, 16)
    ours, plain = (
        cached_attention(q, q, q, KVCache.create(EXACT, 1, 2, 16), implementation=by)[0] for by in (KERNELS, "xla")
    )
    assert_close(ours, plain)


@pytest.mark.slow
@pytest.mark.parametrize("segmented", [False, True])
def test_kernels_equal_splash_attention(segmented):
    """JAX's own TPU kernels, also interpreted, with causal windows and packed documents."""
    splash = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention")
    n, d = 256, 128
    q, k, v = (normal(seed, 2, n, d) for seed in range(3))
    ids = jnp.arange(n) // 100 if segmented else None
    mask = splash.MultiHeadMask([splash.LocalMask((n, n), (40, 0), 0)] * 2)
    sizes = splash.BlockSizes(*[128] * 8)
    theirs = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=True)
    segments = None if ids is None else splash.SegmentIds(ids, ids)
    expected = theirs(q * d**-0.5, k, v, segments)
    window = Window.sliding(41)
    ours = cases.local(q[None], k[None], v[None], window, implementation=KERNELS, segment_ids=ids)
    assert_close(ours[0], expected)


@pytest.mark.slow
def test_sinks_may_be_huge():
    assert_huge_sinks_are_right(KERNELS, Call(features=("sinks",)))
