"""A sequence sharded over eight devices: the conformance list, and the data exchanged between them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention import TPU, Rotary, Triton, Window, local_attention
from flax_local_attention.cache import count_in_documents
from flax_local_attention.kernels import Tiles
from flax_local_attention.kernels.pallas_tpu import Block
from flax_local_attention.kernels.pallas_triton import Tile
from flax_local_attention.kernels.tpu import Tiles as BlocksOnTPU
from tests.cases import (
    EVERYTHING_PACKED,
    FEATURES,
    IN_BLOCKS,
    PLACES,
    assert_close,
    draw_call,
    draw_cotangent,
    drawn_features,
    features_id,
    local,
    normal,
    value_and_pullback,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
MESHES = {"8x1": (8, 1), "2x4": (2, 4), "1x8": (1, 8)}
OFFSETS = {"offset", "traced_offset", "overhang"}
SETS = [features for features in FEATURES if not OFFSETS & set(features)]
FEW_SETS = [(), ("segment_ids", "mask", "rotary"), ("bias", "grouped"), EVERYTHING_PACKED]
IMPLEMENTATIONS = {
    "blocks": IN_BLOCKS["implementation"],
    "dense": "dense",
    "triton": Triton(Tiles(Tile(16, 16), Tile(16, 16), Tile(16, 16)), interpret=True),
    "tpu": TPU(BlocksOnTPU(Block(32, 16), Block(16, 32), Block(16, 16)), interpret=True),
}
EXACT = Window(3, causal=True, exact_windowsize=True)
ROWS, TOKENS, WHOLE = P("data", None, "sequence"), P("data", "sequence"), P()
SPECS = {"q": ROWS, "k": ROWS, "v": ROWS, "mask": TOKENS, "segment_ids": TOKENS}


def mesh_of(kind, sizes):
    if len(jax.devices("cpu")) < np.prod(sizes):
        pytest.skip(f"needs {np.prod(sizes)} devices")
    devices = jax.devices("cpu")[: np.prod(sizes)]
    return jax.make_mesh(sizes, ("data", "sequence"), axis_types=(kind, kind), devices=devices)


def draw(features, window, n, rows, d=4):
    """Draw a call with this many rows."""
    arrays, traced, options = draw_call(features, window, n, d=d)

    def repeat(name, x):
        is_by_row = name in SPECS or (name == "attn_bias" and x.ndim == 4)
        return jnp.tile(x, (rows // 2, *[1] * (x.ndim - 1))) if is_by_row and rows > 2 else x

    return *(
        {name: x if isinstance(x, tuple) else repeat(name, x) for name, x in of.items()} for of in (arrays, traced)
    ), options


def place(tree, mesh):
    def put(name, x):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, SPECS.get(name, WHOLE))), x)

    return {name: put(name, x) for name, x in tree.items()}


def both(arrays, traced, cotangent, **options):
    """Compute the result and the gradients of a call."""
    return value_and_pullback(partial(local, **traced, **options), arrays, cotangent)


def assert_spread_equals_whole(kind, sizes, features, window, n, implementation=None, d=4):
    """Compare a call on a mesh with one device; return its result and gradients."""
    mesh = mesh_of(kind, sizes)
    arrays, traced, options = draw(features, window, n, max(sizes[0], 2), d)
    cotangent = draw_cotangent(arrays)
    expected = jax.jit(partial(both, window=window, **options))(arrays, traced, cotangent)
    run = jax.jit(partial(both, window=window, implementation=implementation, **options))
    spread = run(place(arrays, mesh), place(traced, mesh), *place({"q": cotangent}, mesh).values())
    assert_close(spread, expected)
    return spread


@pytest.mark.slow_but("rotary-2x4")
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("features", SETS, ids=features_id)
def test_every_feature_on_explicit_axes(features, sizes):
    out, gradients = assert_spread_equals_whole(EXPLICIT, sizes, features, EXACT, 48)
    assert [tuple(x.sharding.spec) for x in (out, *(gradients[name] for name in "qkv"))] == [(*ROWS, None)] * 4


@pytest.mark.slow_but("plain-1x8")
@pytest.mark.parametrize("sizes", [(2, 4), (1, 8)], ids=["2x4", "1x8"])
@pytest.mark.parametrize("features", FEW_SETS, ids=features_id)
def test_features_on_automatic_axes(features, sizes):
    assert_spread_equals_whole(AUTO, sizes, features, EXACT, 48)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("features", SETS, ids=features_id)
def test_every_feature_on_automatic_axes(features, sizes):
    assert_spread_equals_whole(AUTO, sizes, features, EXACT, 48)


@pytest.mark.slow_but("w1-back1-forward0-*")
@pytest.mark.parametrize("place", [place for place in PLACES if place.n < 100], ids=str)
def test_every_window_on_explicit_axes(place):
    """Shards are whole windows, and a query may see several shards; exact windows may be cut anywhere."""
    window = place.window
    n = 8 * (5 if window.exact_windowsize else window.size)
    features = tuple(name for name in drawn_features(str(place)) if name not in OFFSETS)
    whole_windows = n // 8 % window.size == 0
    features = tuple(name for name in features if whole_windows or "bias" not in name)
    assert_spread_equals_whole(EXPLICIT, (1, 8), features, window, n)


@pytest.mark.slow
@pytest.mark.parametrize("window", [Window(8, causal=True), Window.between(7, 9), Window.sliding(None)], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation(name, window):
    features = ("mask", "segment_ids", "rotary", "grouped", "soft_cap", "sinks")
    assert_spread_equals_whole(EXPLICIT, (2, 4), features, window, 64, IMPLEMENTATIONS[name], d=16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
@pytest.mark.parametrize(
    "window", [Window.sliding(None), Window.everything(), Window(5)], ids=["causal", "all", "uneven"]
)
def test_windows_that_are_wider_than_shards_or_do_not_fill_them(window, kind):
    """A window without a limit goes around the ring; shards of partial windows are gathered."""
    n = 40 if window.is_global else 80
    assert_spread_equals_whole(kind, (1, 8), ("mask", "segment_ids", "rotary", "grouped"), window, n)


def test_no_more_is_fetched_than_there_is():
    """The original's rotary keeps a window from being narrowed, and no ring serves one that only looks back."""
    q, window = normal(0, 1, 2, 16, 8), Window(1000, look_backward=1, look_forward=0, exact_windowsize=True)
    attend = jax.jit(partial(local_attention, window=window, rotary=Rotary(8, reference=True)))
    placed = place({"q": q}, mesh_of(EXPLICIT, (1, 8)))["q"]
    assert_close(attend(placed, placed, placed), attend(q, q, q))
    text = attend.trace(placed, placed, placed).lower().as_text()
    assert text.count("collective_permute") <= 7, "one message from each shard before"


@pytest.mark.slow
@pytest.mark.parametrize("dim", [8, 4])
def test_shared_keys_keep_the_factor_of_rotary_around_the_ring(dim):
    """They are rotated before they are normalised, which would cancel the factor."""
    q, v = normal(0, 1, 2, 40, 8), normal(1, 1, 2, 40, 8)
    rotary = Rotary(dim, frequencies=(0.3, 1.0, 0.1, 0.0)[: dim // 2], factor=1.5)
    attend = jax.jit(partial(local_attention, window=Window.sliding(None), shared_qk=True, rotary=rotary, scale=2.0))
    placed = place({"q": q, "v": v}, mesh_of(EXPLICIT, (1, 8)))
    assert_close(attend(placed["q"], placed["q"], placed["v"]), attend(q, q, v))


@pytest.mark.slow
def test_narrow_keys_carry_documents_of_any_number():
    ids = jnp.array([2**31 - 1, -(2**31), 2**31 - 2, 7, 2**23 + 1, 2**23])[jnp.arange(64) // 11][None]
    q = normal(0, 1, 2, 64, 8).astype(jnp.bfloat16)
    attend = jax.jit(partial(local_attention, window=Window.sliding(20)))
    mesh = mesh_of(EXPLICIT, (1, 8))
    placed = place({"q": q, "segment_ids": ids, "mask": ids != 7}, mesh)
    spread = attend(*[placed["q"]] * 3, segment_ids=placed["segment_ids"], mask=placed["mask"])
    assert_close(spread, attend(q, q, q, segment_ids=ids, mask=ids != 7), "bfloat16")


@pytest.mark.slow_but("halo-('sequence', 'data')-AxisType.Explicit", "ring-('data', 'sequence')-AxisType.Auto")
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
@pytest.mark.parametrize("axes", [("data", "sequence"), ("sequence", "data")], ids=str)
@pytest.mark.parametrize("window", [Window.between(3, 2), Window.sliding(None)], ids=["halo", "ring"])
def test_a_sequence_may_be_spread_over_two_axes_in_any_order(window, axes, kind):
    q = normal(0, 1, 2, 16, 4)
    attend = jax.jit(lambda q: local_attention(q, q, q, window=window))
    spread = attend(jax.device_put(q, NamedSharding(mesh_of(kind, (2, 4)), P(None, None, axes))))
    assert_close(spread, attend(q))


@pytest.mark.slow_but("sequence")
@pytest.mark.parametrize("axes", ["sequence", ("data", "sequence"), ("sequence", "data")], ids=str)
def test_documents_are_counted_on_a_sequence_over_axes_in_any_order(axes):
    ids = jnp.array([[0] * 5 + [1] * 2 + [2] * 9, [3] * 12 + [4] * 3 + [3]])
    spread = jax.device_put(ids, NamedSharding(mesh_of(EXPLICIT, (2, 4)), P(None, axes)))
    np.testing.assert_array_equal(jax.jit(count_in_documents)(spread), count_in_documents(ids))


@pytest.mark.slow_but("q_spec0-k_spec0")
@pytest.mark.parametrize(
    ("q_spec", "k_spec"), [(P("sequence"), ROWS), (None, P(None, None, "sequence")), (P(None, None, "sequence"), P())]
)
def test_queries_and_keys_may_be_spread_in_different_ways(q_spec, k_spec):
    mesh, (q, k) = mesh_of(EXPLICIT, (1, 8)), (normal(seed, 8, 2, 16, 4) for seed in range(2))
    attend = jax.jit(lambda q, k: local_attention(q, k, k, window=Window.between(3, 2)))
    placed = (
        x if spec is None else jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((q, q_spec), (k, k_spec))
    )
    assert_close(attend(*placed), attend(q, k))


@pytest.mark.slow
def test_a_ring_promotes_nothing_under_x64():
    q = normal(0, 1, 2, 16, 4)
    attend = partial(local_attention, window=Window.sliding(None))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        spread = jax.jit(attend)(*[place({"q": q}, mesh_of(EXPLICIT, (1, 8)))["q"]] * 3)
    assert_close(spread, attend(q, q, q))


@pytest.mark.slow
def test_documents_travel_without_a_nan():
    mesh, ids = mesh_of(AUTO, (1, 8)), np.full((1, 16), -1, np.int32)  # the bits of a NaN
    attend = partial(local_attention, window=EXACT, axis_name="sequence")
    spec = P(None, None, "sequence")
    with jax.debug_nans(True):
        spread = jax.shard_map(
            lambda q, ids: attend(q, q, q, segment_ids=ids),
            mesh=mesh,
            in_specs=(spec, P(None, "sequence")),
            out_specs=spec,
        )
        out = spread(normal(0, 1, 2, 16, 4), ids)
    assert jnp.isfinite(out).all()


def test_a_single_row_stays_spread_as_it_was():
    q = place({"q": normal(0, 1, 2, 16, 4)}, mesh_of(EXPLICIT, (1, 8)))["q"]
    out, log_sum = jax.jit(partial(local_attention, window=EXACT, return_log_sum=True))(q, q, q)
    assert [tuple(x.sharding.spec) for x in (out, log_sum.total)] == [(*ROWS, None), tuple(ROWS)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_derivatives_beyond_a_gradient(kind):
    arrays = {name: normal(seed, 2, 2, 16, 4) for seed, name in enumerate("qkv")}

    def along(q, k, v):
        def gradient(q, k):
            return jax.grad(lambda q: (local_attention(q, k, v, window=EXACT, rotary=Rotary(4)) ** 2).sum())(q)

        return jax.jvp(gradient, (q, k), (k, q))

    assert_close(jax.jit(along)(**place(arrays, mesh_of(kind, (2, 4)))), jax.jit(along)(**arrays))


@pytest.mark.slow
def test_a_mapped_call_inside_shard_map():
    arrays = {name: normal(seed, 3, 2, 2, 16, 4) for seed, name in enumerate("qkv")}
    mask = normal(3, 3, 2, 16) > -0.5

    def gradient(q, k, v, mask, axis_name=None):
        attend = partial(local_attention, window=EXACT, mask=mask, axis_name=axis_name)
        return jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), (0, 1, 2))(q, k, v)

    mapped = jax.vmap(partial(gradient, axis_name="sequence"))
    specs = [P(None, None, None, "sequence")] * 3 + [P(None, None, "sequence")]
    spread = jax.shard_map(mapped, mesh=mesh_of(AUTO, (1, 4)), in_specs=tuple(specs), out_specs=tuple(specs[:3]))
    assert_close(jax.jit(spread)(*arrays.values(), mask), jax.vmap(gradient)(*arrays.values(), mask))


@pytest.mark.slow_but("AxisType.Explicit")
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_heads_that_a_mesh_does_not_divide_stay_whole(kind):
    q, k = normal(0, 2, 4, 16, 4), normal(1, 2, 2, 16, 4)
    mesh = mesh_of(kind, (2, 4))
    spread = [jax.device_put(x, NamedSharding(mesh, P("data", "sequence" if x is q else None))) for x in (q, k)]
    attend = jax.jit(partial(local_attention, window=EXACT))
    assert_close(attend(spread[0], spread[1], spread[1]), attend(q, k, k))


@pytest.mark.slow
def test_dropout_on_automatic_axes_is_that_of_one_device():
    q = normal(0, 2, 2, 32, 4)
    options = {"window": EXACT, "dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    gradient = jax.jit(jax.grad(lambda q: (local_attention(q, q, q, **options) ** 2).sum()))
    assert_close(gradient(place({"q": q}, mesh_of(AUTO, (2, 4)))["q"]), gradient(q))


# Communication


def exchanges(kind, window, n, with_gradient, sizes=(1, 8), said=("mask", "segment_ids"), **options):
    """Return the types of a compiled call's collective-permutes, and the names of all other collectives."""
    mesh = mesh_of(kind, sizes)
    types = {name: jax.ShapeDtypeStruct((2, 4, n, 8), jnp.float32) for name in "qkv"}
    types |= {"mask": jax.ShapeDtypeStruct((2, n), bool), "segment_ids": jax.ShapeDtypeStruct((2, n), jnp.int32)}
    placed = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, SPECS[name]))
        for name, x in types.items()
        if name in "qkv" or name in said
    }

    def run(q, k, v, **said):
        attend = partial(local_attention, window=window, **said, **options)
        if not with_gradient:
            return attend(q, k, v)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(jnp.cos(out))

    text = jax.jit(run).lower(**placed).compile().as_text()
    others = {name for name in ("all-gather", "all-to-all", "all-reduce", "reduce-scatter") if f" {name}(" in text}
    return re.findall(r"= \(?(\w+\[[\d,]+\])\S* collective-permute(?:-start)?\(", text), others


WORDS, FLOATS = "u32[2,4,1,{},18]", "f32[2,4,1,{},16]"


@pytest.mark.slow_but("both sides")
@pytest.mark.parametrize(
    ("window", "sides", "fetched"),
    [(Window.sliding(9), 1, (8,)), (Window.between(8, 8), 2, (8,)), (Window.sliding(21), 1, (16, 4))],
    ids=["causal", "both sides", "two hops"],
)
def test_one_exchange_a_side_and_hop_and_one_more_with_the_gradient(window, sides, fetched):
    """Masks and documents share the message of keys and values; a hop fetches no more than the window sees."""
    sent, back = ([text.format(size) for size in fetched] * sides for text in (WORDS, FLOATS))
    forward, others = exchanges(EXPLICIT, window, 128, False)
    assert (sorted(forward), others) == (sorted(sent), set())
    both, others = exchanges(EXPLICIT, window, 128, True)
    assert (sorted(both), others) == (sorted(sent + back), set())


@pytest.mark.slow
def test_the_exchange_does_not_grow_with_the_sequence():
    window = Window.sliding(9)
    assert exchanges(EXPLICIT, window, 4096, True) == exchanges(EXPLICIT, window, 128, True)


def test_keys_alone_travel_as_they_are():
    assert exchanges(EXPLICIT, Window.sliding(9), 128, False, said=()) == (["f32[2,4,1,8,16]"], set())


@pytest.mark.slow_but("1x8")
@pytest.mark.parametrize("sizes", [(2, 4), (1, 8)], ids=["2x4", "1x8"])
def test_automatic_axes_exchange_halos_alone(sizes):
    """A gradient fetches keys again: code that the compiler partitions does not keep a neighbour's."""
    sent, others = exchanges(AUTO, Window.sliding(9), 128, True, sizes)
    rows = 2 // sizes[0]
    assert sorted(sent) == sorted([f"u32[{rows},4,1,8,18]"] * 2 + [f"f32[{rows},4,1,8,16]"])
    assert not others


@pytest.mark.slow
@pytest.mark.parametrize("window", [Window.sliding(None), Window.everything()], ids=["causal", "all"])
def test_keys_of_global_layers_travel_around_the_ring_in_constant_memory(window):
    def temporary(shards):
        mesh = mesh_of(EXPLICIT, (1, shards))
        q = jax.ShapeDtypeStruct((1, 2, 256 * shards, 8), jnp.float32, sharding=NamedSharding(mesh, ROWS))
        gradient = jax.grad(lambda *x: local_attention(*x, window=window, rotary=Rotary(8)).sum(), (0, 1, 2))
        compiled = jax.jit(gradient).lower(q, q, q).compile()
        assert "all-gather" not in compiled.as_text()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) <= 1.1 * temporary(2)
