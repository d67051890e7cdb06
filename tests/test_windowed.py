"""The windowed path equals the dense one, and costs O(n w)."""

import functools
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import TPU, AttentionOptions, Rotary, Triton, Unsupported, Window, Windowed
from flax_local_attention.kernels import IMPLEMENTATIONS, Tiles, tpu
from flax_local_attention.kernels.pallas_tpu import Block
from flax_local_attention.kernels.pallas_triton import Tile
from flax_local_attention.kernels.windowed import LIMITS, plan_blocks
from tests import cases
from tests.cases import EVERYTHING, EVERYTHING_PACKED, FEATURES, FULL_PLACES, MAIN_PLACE, PLACES, features_id

pytestmark = pytest.mark.usefixtures("quick_compile")

MAIN_PAIRS = [(MAIN_PLACE, features) for features in FEATURES]
MAIN_PAIRS += [(place, features) for place in FULL_PLACES for features in (EVERYTHING, EVERYTHING_PACKED)]
DRAWN_PAIRS = [(place, cases.drawn_features(str(place))) for place in PLACES]
ALL_PAIRS = [(place, features) for place in PLACES for features in FEATURES]
MANY_DRAWN_PAIRS = [(place, cases.drawn_features(str(place), more)) for place in PLACES for more in range(1, 11)]


IMPLEMENTED = pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name not in ("dense", "mosaic")])
"""All implementations but the dense one and `MosaicGPU`, which has no float32; tests/test_mosaic.py tests that."""

WINDOWED = pytest.mark.parametrize("name", ["xla"])
"""Those that are quick everywhere; tests/test_triton.py tests others where they are compiled."""


def in_small_blocks(name, block):
    """Return an implementation with blocks so small that short sequences have several, for any device."""
    tile, step = Tile(16, 16), Block(16, 16)
    return {
        "xla": Windowed(block),
        "triton": Triton(Tiles(tile, tile, tile), interpret=True),
        "tpu": TPU(tpu.Tiles(step, step, step), interpret=True),
    }[name]


def pair_id(value):
    return str(value) if isinstance(value, cases.Place) else features_id(value)


def assert_equals_definition(name, place, features):
    """Compare the results and the gradients of an implementation with the dense one, in one compiled program."""
    arrays, traced, options = cases.draw_call(features, place.window, place.n)
    cotangent = cases.draw_cotangent(arrays)

    @jax.jit
    def both(arrays, traced):
        def of(attention):
            return lambda **arrays: attention(**arrays, **traced, **options, window=place.window)

        ours = functools.partial(cases.local, implementation=in_small_blocks(name, place.block))
        return [cases.value_and_pullback(of(fn), arrays, cotangent) for fn in (ours, cases.definition)]

    w = place.window.window_size
    is_refused = {"triton": "attn_bias" in arrays and w % 16 and 16 % w, "tpu": "attn_bias" in arrays}
    if name in is_refused and (uses_xpos(options) or is_refused[name]):
        with pytest.raises(Unsupported, match=r"xPos|a bias needs|no bias"):
            both(arrays, traced)
        return
    ours, expected = both(arrays, traced)
    cases.assert_close(ours, expected)


def uses_xpos(options):
    return options["rotary"] is not None and options["rotary"].use_xpos


@pytest.mark.slow_but(
    "*-n24-plain-*",
    "*-n24-mask-xla",
    "*-n24-segment_ids-xla",
    "*-n24-bias-xla",
    "*-n24-rotary-xla",
    "*-n24-grouped-xla",
    "*-n24-sinks-xla",
    "*-n24-global_keys-xla",
)
@IMPLEMENTED
@pytest.mark.parametrize(("place", "features"), MAIN_PAIRS, ids=pair_id)
def test_implementations_equal_dense_with_every_feature(name, place, features):
    assert_equals_definition(name, place, features)


@pytest.mark.slow_but("w1-back1-forward0-*", "w3-back1-forward0-causal-exact-*")
@WINDOWED
@pytest.mark.parametrize(("place", "features"), DRAWN_PAIRS, ids=pair_id)
def test_implementations_equal_dense_for_every_window(name, place, features):
    assert_equals_definition(name, place, features)


@pytest.mark.exhaustive
@WINDOWED
@pytest.mark.parametrize(("place", "features"), ALL_PAIRS + MANY_DRAWN_PAIRS, ids=pair_id)
def test_implementations_equal_dense_for_every_window_and_feature(name, place, features):
    assert_equals_definition(name, place, features)


@pytest.mark.slow_but("*-13")
@pytest.mark.parametrize("q_offset", [12, 13, 19])
@pytest.mark.parametrize("is_traced", [False, True], ids=["static", "traced"])
def test_bias_of_queries_past_the_last_key(q_offset, is_traced):
    window = Window(5, causal=True, look_backward=2)
    q, k, v = cases.normal(0, 1, 9, 4), cases.normal(1, 1, 11, 4), cases.normal(2, 1, 11, 4)
    bias = 3 * cases.normal(3, 1, 5, window.slab)
    offset = jnp.int32(q_offset) if is_traced else q_offset
    ours = cases.in_blocks(q, k, v, window, attn_bias=bias, q_offset=offset)
    cases.assert_close(ours, cases.definition(q, k, v, window, attn_bias=bias, q_offset=q_offset))


# Blocks


@pytest.mark.parametrize(
    ("window", "n", "aligned", "fades", "size"),
    [
        (Window(256), 4096, False, False, 256),
        (Window(100), 4096, False, False, 200),
        (Window(100), 150, False, False, 150),
        (Window(300), 4096, False, False, 150),
        (Window(512), 4096, False, False, 256),
        (Window(257), 4096, False, False, 256),
        (Window(257), 4096, True, False, 257),
        (Window(300, exact_windowsize=True), 4096, False, False, 256),
        (Window(300, exact_windowsize=True), 4096, True, False, 150),
        (Window(16), 4096, False, True, 16),
        (Window(512), 4096, False, True, 256),
        (Window(300, exact_windowsize=True), 4096, False, True, 256),
        (Window(16, exact_windowsize=True), 4096, False, True, 16),
        (Window(512), 3, True, True, 3),
    ],
)
def test_block_size(window, n, aligned, fades, size):
    rotary = Rotary(4, use_xpos=True, scale_base=8.0) if fades else None
    plan = plan_blocks(AttentionOptions(window, rotary=rotary), n, n, aligned=aligned, limits=(256, 256))
    assert plan.size == size


@pytest.mark.parametrize(
    ("window", "size"),
    [
        (Window(16, causal=True), 64),
        (Window(128, causal=True), 128),
        (Window(1024, causal=True), 256),
        (Window(16, causal=True, exact_windowsize=True), 64),
        (Window(256, causal=True, exact_windowsize=True), 128),
        (Window.between(101, 50), 76),
        (Window.between(201, 100), 151),
        (Window.between(1000, 1), 256),
    ],
)
def test_a_block_is_as_long_as_a_window_or_half_an_exact_reach_within_limits(window, size):
    assert plan_blocks(AttentionOptions(window), 4096, 4096, limits=(64, 256)).size == size


@pytest.mark.parametrize(("window", "depends"), [(Window.sliding(65), True), (Window.sliding(512), False)])
def test_blocks_are_those_of_the_platform_that_a_program_is_lowered_for(window, depends):
    q = jax.ShapeDtypeStruct((1, 1, 1024, 8), jnp.float32)
    attend = functools.partial(cases.local, window=window, implementation="xla")
    assert ("platform_index" in str(jax.make_jaxpr(attend)(q, q, q))) == depends


@pytest.mark.parametrize("aligned", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("fades", [False, True], ids=["without", "xpos"])
@pytest.mark.parametrize(
    ("window", "on_cpu", "elsewhere"),
    [
        (Window.sliding(65), 64, 64),
        (Window.sliding(256), 127, 255),
        (Window.sliding(512), 255, 256),
        (Window.sliding(4096), 256, 256),
        (Window.between(64, 64), 64, 128),
        (Window.between(101, 50), 75, 151),
    ],
    ids=["sliding65", "sliding256", "sliding512", "sliding4096", "between64", "between101"],
)
def test_blocks_of_a_window_of_size_one_are_no_smaller_with_a_bias_or_xpos(window, on_cpu, elsewhere, fades, aligned):
    """With xPos only the reach bounds a block."""
    options = AttentionOptions(window, rotary=Rotary(64, use_xpos=True) if fades else None)
    for limits, least in ((LIMITS["cpu"], on_cpu), (LIMITS["default"], elsewhere)):
        plan = plan_blocks(options, 16384, 16384, aligned=aligned, limits=limits)
        assert plan.size >= least
        assert plan.size <= (window.backward + window.forward if fades else limits[1])
        assert plan.period == plan.size


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("q_offset", [0, 3, None], ids=["start", "offset", "traced"])
def test_a_plan_covers_every_query_once_and_every_key_that_it_sees(place, q_offset):
    """By brute force: runs are long enough for every block's queries, and no longer than the widest block needs."""
    window, n = place.window, place.n
    offset = jnp.int32(3) if q_offset is None else q_offset
    plan = plan_blocks(AttentionOptions(window), n, n, offset, limits=(place.block, place.block))
    queries, longest = [], []
    for firsts, size, run in plan.parts():
        for first in firsts:
            queries += range(first, first + size)
            i, j = np.arange(first, first + size)[:, None] + (q_offset or 0), np.arange(n)
            seen = np.flatnonzero(window.sees(i, j).any(0))
            longest.append((run, np.ptp(seen) + 1 if seen.size else 1))
    assert queries == list(range(n))
    assert all(run >= needed for run, needed in longest)
    if q_offset == 0:
        assert max(run for run, _ in longest) == max(needed for _, needed in longest)
    assert plan.period == min(max(plan.size, window.window_size), n)


def test_blocks_are_those_of_the_platform_that_a_program_is_compiled_for():
    """One function lowered for three platforms: blocks of 64 queries by 127 keys on a CPU, of 256 by 319 elsewhere."""
    x = jax.ShapeDtypeStruct((1, 1, 512, 8), jnp.float32)
    traced = jax.jit(lambda q: cases.local(q, q, q, Window.between(63))).trace(x)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    assert "64x127xf32" in texts["cpu"]
    assert "256x319xf32" not in texts["cpu"]
    for platform in ("cuda", "tpu"):
        assert "256x319xf32" in texts[platform]
        assert "64x127xf32" not in texts[platform]


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_has_at_least_one_query(block):
    with pytest.raises(ValueError, match="`block` must be at least 1"):
        Windowed(block)


@pytest.mark.parametrize("block", [64.0, True, "64"])
def test_a_block_is_a_count(block):
    with pytest.raises(TypeError, match="`block` must be an int"):
        Windowed(block)


# Cost


def dot_flops(jaxpr):
    """Count the floating-point operations of all matrix products, in a loop once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        assert equation.primitive.name != "while", "a loop of unknown length"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(dot_flops(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


def test_dot_flops_counts_a_loop_as_often_as_it_turns():
    def looped(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=7)[0]

    assert dot_flops(jax.make_jaxpr(jax.jit(looped))(jnp.ones((3, 3)))) == 7 * 2 * 3**3


# Scores computed, as a multiple of the visible ones, at n = 4096 and a block of 128. A block of t
# queries of an exact window computes t - 1 + reach + 1 scores per query, of which reach + 1 are visible, for a reach
# of B w + F w: 2 where t = reach, 1.5 where t is half of it. A plain causal window wastes what is above the diagonal of
# a query's own window and computes 2 w for 1.5 w on average: 1.33. A plain window that looks both ways wastes none. All
# waste a little more at the borders, where a block's run is as long as elsewhere but partly invisible.
FLOPS_FACTORS = [
    (Window(128, causal=True, exact_windowsize=True), 2.1),
    (Window(256, causal=True, exact_windowsize=True), 1.6),
    (Window(512, causal=True, exact_windowsize=True), 1.4),
    (Window(256, causal=True), 1.4),
    (Window(512, causal=True), 1.5),
    (Window(300, causal=True), 1.5),
    (Window(256), 1.1),
    (Window(256, exact_windowsize=True), 1.3),
    (Window(1024, look_backward=0, look_forward=0), 1.0),
]


@pytest.mark.parametrize(("window", "factor"), FLOPS_FACTORS, ids=[str(cases.Place(w, 4096)) for w, _ in FLOPS_FACTORS])
def test_dot_flops_stay_near_the_visible_pairs(window, factor):
    n, d = 4096, 8
    x = jax.ShapeDtypeStruct((1, 1, n, d), jnp.float32)
    needed = 4 * d * window.visible_pairs(n)

    def attention(q, k, v):
        return cases.local(q, k, v, window, implementation=Windowed(128))

    def gradient(q, k, v):
        return jax.vjp(attention, q, k, v)[1](q)

    forward = dot_flops(jax.make_jaxpr(attention)(x, x, x))
    assert needed <= forward <= factor * needed
    # Two products forward; two more recompute them and four make the gradients of q, k, v and the scores.
    assert dot_flops(jax.make_jaxpr(gradient)(x, x, x)) <= 4 * forward


def temporary_bytes(features, n, is_gradient):
    arrays, traced, options = cases.draw_call(features, Window(8, causal=True), n)

    def attention(arrays, traced):
        return cases.in_blocks(**arrays, **traced, **options, window=Window(8, causal=True))

    def gradient(arrays, traced):
        out, pull = jax.vjp(lambda arrays: attention(arrays, traced), arrays)
        return pull(out)

    compiled = jax.jit(gradient if is_gradient else attention).lower(arrays, traced).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def assert_memory_is_linear(features, is_gradient):
    """Assert that each doubling adds at most twice what the last one added; quadratic memory would add four times."""
    sizes = [temporary_bytes(features, n, is_gradient) for n in (4096, 8192, 16384)]
    assert sizes[2] - sizes[1] <= 2.1 * max(sizes[1] - sizes[0], 0) + 2**15, sizes
    assert sizes[2] < 16384**2, "less than one byte for each pair"


KINDS = pytest.mark.parametrize("is_gradient", [False, True], ids=["forward", "gradient"])


@pytest.mark.slow_but("everything-forward")
@KINDS
@pytest.mark.parametrize("features", [EVERYTHING, EVERYTHING_PACKED], ids=features_id)
def test_memory_is_linear_with_everything(features, is_gradient):
    assert_memory_is_linear(features, is_gradient)


@pytest.mark.exhaustive
@KINDS
@pytest.mark.parametrize("features", FEATURES, ids=features_id)
def test_memory_is_linear_with_every_feature(features, is_gradient):
    assert_memory_is_linear(features, is_gradient)
