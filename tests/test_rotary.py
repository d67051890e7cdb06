"""`Rotary` against its equations in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import AttentionOptions, Operands, Rotary, Window, Windowed, attend, rotate
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")


def by_complex_numbers(x, positions, theta=10000.0, fading=0.0):
    """Rotate in float64: pair m by the angle ``t theta^(-2m/d)``, scaled by ``zeta_m^(fading t)``."""
    d = x.shape[-1]
    out = np.zeros(x.shape)
    for row, t in enumerate(positions):
        for m in range(d // 2):
            zeta = (2 * m + 0.4 * d) / (1.4 * d)
            turned = (
                (x[row, m] + 1j * x[row, m + d // 2]) * np.exp(1j * t * theta ** (-2 * m / d)) * zeta ** (fading * t)
            )
            out[row, m], out[row, m + d // 2] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("theta", [10000.0, 50.0])
def test_rotary_is_its_formula(theta):
    x, positions = np.asarray(cases.normal(0, 7, 6)), np.array([-5, 0, 1, 2, 11, 64, 300])
    expected = by_complex_numbers(x, positions, theta)
    rotary = Rotary(6, theta)
    cases.assert_close(rotary.turn(jnp.asarray(x), rotary.query_table(jnp.asarray(positions))), expected)
    cases.assert_close(rotary.turn(jnp.asarray(x), rotary.key_table(jnp.asarray(positions))), expected)


def test_xpos_is_its_formula():
    x, positions = np.asarray(cases.normal(0, 5, 6)), np.array([-9, -1, 0, 4, 13])
    rotary = Rotary(6, use_xpos=True, scale_base=7.0)
    queries = rotary.turn(jnp.asarray(x), rotary.query_table(jnp.asarray(positions)))
    keys = rotary.turn(jnp.asarray(x), rotary.key_table(jnp.asarray(positions)))
    cases.assert_close(queries, by_complex_numbers(x, positions, fading=1 / 7))
    cases.assert_close(keys, by_complex_numbers(x, positions, fading=-1 / 7))


@pytest.mark.parametrize("rotary", [Rotary(6), Rotary(6, use_xpos=True, scale_base=8.0)], ids=["rotary", "xpos"])
def test_products_depend_on_the_distance_alone(rotary):
    q, k = cases.normal(0, 5, 6), cases.normal(1, 5, 6)
    here, there = jnp.arange(5), jnp.arange(5) + 13

    def products(positions):
        return rotary.turn(q, rotary.query_table(positions)) @ rotary.turn(k, rotary.key_table(positions)).T

    cases.assert_close(products(there), products(here))
    apart = rotary.turn(q, rotary.query_table(there)) @ rotary.turn(k, rotary.key_table(here)).T
    assert np.abs(apart - products(here)).max() > 0.1, "another distance is another product"


def test_xpos_fades_with_distance():
    rotary = Rotary(4, use_xpos=True, scale_base=8.0)
    ones = jnp.ones((1, 4))
    key = rotary.turn(ones, rotary.key_table(jnp.array([0])))
    sizes = [
        jnp.linalg.norm(rotary.turn(ones, rotary.query_table(jnp.array([t])))) * jnp.linalg.norm(key)
        for t in (0, 8, 16)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rotation_keeps_the_dtype_and_computes_in_float32(dtype):
    x = cases.normal(0, 3, 8).astype(dtype)
    positions = jnp.array([4001, 4002, 4003])
    rotated = rotate(x, Rotary(8), positions)
    assert rotated.dtype == dtype
    expected = rotate(x.astype(jnp.float32), Rotary(8), positions)
    np.testing.assert_array_equal(rotated, expected.astype(dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rotary", "is_traced"),
    [(Rotary(4), True), (Rotary(4, use_xpos=True), False)],
    ids=["rotary-traced", "xpos-static"],
)
def test_a_million_positions_change_nothing(rotary, is_traced):
    window, n = Window(5, causal=True), 17
    far = 1_000_000
    q, k, v = (cases.normal(seed, 1, n, 4) for seed in range(3))
    long_k, long_v = (jnp.concatenate([jnp.full((1, far, 4), 50.0), x], axis=1) for x in (k, v))
    blocked = jnp.arange(far + n)[None] >= far

    @jax.jit
    def near_and_far(offset):
        offset = offset if is_traced else far
        near = cases.in_blocks(q, k, v, window, rotary=rotary)
        return near, cases.in_blocks(q, long_k, long_v, window, rotary=rotary, q_offset=offset, mask=blocked)

    near, moved = near_and_far(jnp.int32(far))
    np.testing.assert_allclose(moved, near, rtol=0, atol=1e-6)


def test_scale_base_is_half_the_window():
    assert Rotary(4, use_xpos=True).for_window(Window(9)).scale_base == 4.0
    assert Rotary(4, use_xpos=True, scale_base=3.0).for_window(Window(9)).scale_base == 3.0
    assert Rotary(4).for_window(Window(1)) == Rotary(4)


def test_scale_base_is_half_the_reach_of_a_window_of_size_one():
    rotary = Rotary(4, use_xpos=True)
    assert rotary.for_window(Window.sliding(4097)).scale_base == 2048.0
    assert rotary.for_window(Window.between(64, 64)).scale_base == 64.0
    assert rotary.for_window(Window(1)).scale_base == 1.0


def test_xpos_of_a_window_of_two_keys_needs_a_base():
    window = Window(1, causal=True)
    with pytest.raises(ValueError, match=r"`scale_base` of xPos must be given for Window\(window_size=1"):
        Rotary(4, use_xpos=True).for_window(window)
    x = cases.normal(0, 1, 3, 4)
    with pytest.raises(ValueError, match="give one"):
        cases.local(x, x, x, window, rotary=Rotary(4, use_xpos=True))
    out = cases.local(x, x, x, window, rotary=Rotary(4, use_xpos=True, scale_base=1.0))
    assert np.isfinite(out).all()


@pytest.mark.parametrize("window", [Window.sliding(None), Window.everything()], ids=["causal", "both ways"])
def test_xpos_needs_a_window_with_a_limit(window):
    rotary = Rotary(4, use_xpos=True, scale_base=8.0)
    with pytest.raises(ValueError, match=r"`use_xpos` needs a window with a limit, .* use `window.within\(n\)`"):
        AttentionOptions(window, rotary=rotary)
    assert AttentionOptions(window.within(32), rotary=rotary).rotary == rotary


@pytest.mark.slow_but("causal-bfloat16")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("window", [Window.sliding(81), Window.between(40, 40)], ids=["causal", "both ways"])
def test_blocks_of_a_window_of_size_one_keep_xpos_in_range(window, dtype):
    """With the smallest distance allowed, in blocks as long as the reach, where the scale is largest."""
    most = 12 if dtype == "float16" else 64
    base = 160 / most
    q, k, v = (cases.normal(seed, 1, 400, 4).astype(dtype) for seed in range(3))

    def attend(q, scale_base):
        rotary = Rotary(4, use_xpos=True, scale_base=scale_base)
        return cases.local(q, k, v, window, rotary=rotary, implementation=Windowed(256))

    with jax.debug_nans(True):
        out, pull = jax.vjp(lambda q: attend(q, base), q)
        assert np.isfinite(pull(out)[0]).all()
    with pytest.raises(ValueError, match=f"at least slab / {most}"):
        attend(q, 0.99 * base)


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"dim": 5}, "`dim` of rotary must be even, got 5; use an even `dim_head`"),
        ({"dim": 0}, "`dim` must be at least 2, got 0"),
        ({"dim": -2}, "`dim` must be at least 2"),
        ({"theta": 0.0}, "`theta` must be positive and finite, got 0.0"),
        ({"theta": float("nan")}, "`theta` must be positive"),
        ({"scale_base": 0.0}, "`scale_base` must be positive and finite, got 0.0; leave it out"),
        ({"scale_base": -1.0}, "`scale_base` must be positive"),
    ],
)
def test_wrong_fields_are_refused(fields, phrase):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the phrase is compared below)
        Rotary(**{"dim": 4, **fields})
    assert phrase in str(caught.value)


@pytest.mark.parametrize("theta", [1.0, 1e4, 1e6])
@pytest.mark.parametrize("first", [0, 1000, 10**7, 2**31 - 50, -(10**7)])
def test_angles_are_exact_at_any_position(theta, first):
    positions = np.arange(first, first + 50)
    table = Rotary(64, theta=theta).query_table(jnp.asarray(positions, jnp.int32))
    angles = positions[:, None].astype(np.longdouble) * theta ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(table[:, 0], np.cos(angles), rtol=0, atol=5e-7)
    np.testing.assert_allclose(table[:, 1], np.sin(angles), rtol=0, atol=5e-7)


def test_positions_may_have_fractions():
    """A subclass that interpolates passes them; rows of positions give rows of a table."""
    rotary, halves = Rotary(4), jnp.arange(6).reshape(2, 3) / 2
    angles = np.asarray(halves)[..., None] * 10000.0 ** -np.array([0, 0.5])
    table = rotary.key_table(halves)
    np.testing.assert_allclose(table, np.stack([np.cos(angles), np.sin(angles)], -2), atol=1e-6)


# Partial rotary, other pairs, other frequencies


def turned_by(x, positions, frequencies, factor=1.0, interleaved=False):
    """Rotate the first ``2 len(frequencies)`` entries of rows x at these positions, in float64."""
    out, half = np.array(x, np.float64), len(frequencies)
    for row, t in enumerate(positions):
        for m, frequency in enumerate(frequencies):
            real, imaginary = (2 * m, 2 * m + 1) if interleaved else (m, m + half)
            turned = (x[row, real] + 1j * x[row, imaginary]) * np.exp(1j * t * frequency) * factor
            out[row, real], out[row, imaginary] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 6, 8])
def test_the_first_entries_turn_and_the_rest_pass(dim, interleaved):
    x, positions = np.asarray(cases.normal(0, 5, 8)), np.array([0, 1, 7, 100, -3])
    frequencies = 10000.0 ** -(np.arange(0, dim, 2) / dim)
    found = rotate(jnp.asarray(x), Rotary(dim, interleaved=interleaved), jnp.asarray(positions))
    cases.assert_close(found, turned_by(x, positions, frequencies, interleaved=interleaved))
    np.testing.assert_array_equal(found[:, dim:], x[:, dim:])


def test_frequencies_and_a_factor_are_taken_as_given():
    x, positions, frequencies = np.asarray(cases.normal(0, 4, 6)), np.array([0, 1, 7, 100]), (0.5, 0.0, 2.5)
    rotary = Rotary(6, frequencies=frequencies, factor=1.5)
    cases.assert_close(
        rotate(jnp.asarray(x), rotary, jnp.asarray(positions)), turned_by(x, positions, frequencies, 1.5)
    )
    for given in (np.array(frequencies), jnp.array(frequencies)):
        assert Rotary(6, frequencies=given, factor=1.5) == rotary


@pytest.mark.parametrize("first", [10**7, 2**31 - 50])
def test_angles_of_any_frequency_are_exact_at_any_position(first):
    frequencies = (3.0, 1.0, 0.3, 1e-3, 1e-7, 0.0)
    positions = np.arange(first, first + 50)
    table = Rotary(12, frequencies=frequencies).query_table(jnp.asarray(positions, jnp.int32))
    angles = positions[:, None].astype(np.longdouble) * np.array(frequencies, np.longdouble)
    np.testing.assert_allclose(table[:, 0], np.cos(angles), rtol=0, atol=5e-7)
    np.testing.assert_allclose(table[:, 1], np.sin(angles), rtol=0, atol=5e-7)


def test_rotate_takes_positions_of_each_row():
    x, positions = cases.normal(0, 2, 3, 5, 8), jnp.array([[0, 1, 2, 3, 4], [9, 9, 1, 0, 5]])
    found = rotate(x, Rotary(6), positions)
    for row in range(2):
        np.testing.assert_array_equal(found[row], rotate(x[row], Rotary(6), positions[row]))
    np.testing.assert_array_equal(rotate(x, Rotary(6), positions[:1])[1], rotate(x[1], Rotary(6), positions[0]))


@pytest.mark.parametrize(
    ("x", "rotary", "positions", "phrase"),
    [
        ((5, 4), Rotary(6), (5,), "d at least `rotary.dim` (6)"),
        ((2, 5, 8), Rotary(6), (3, 5), "`positions` must be [n] or [b, n]"),
        ((2, 5, 8), Rotary(6), (4,), "`positions` must be [n] or [b, n]"),
        ((2, 5, 8), Rotary(6, use_xpos=True, scale_base=4.0), (5,), "without xPos"),
    ],
)
def test_wrong_calls_of_rotate_are_refused(x, rotary, positions, phrase):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the phrase is compared below)
        rotate(jnp.ones(x), rotary, jnp.zeros(positions, int))
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "error", "phrase"),
    [
        ({"frequencies": (1.0,)}, ValueError, "must be 2 numbers, one for each two of the 4 rotated entries"),
        ({"frequencies": (1.0, float("inf"))}, ValueError, "`frequencies` must be finite"),
        ({"frequencies": (1.0, "a")}, TypeError, "`frequencies` must be a number"),
        ({"frequencies": 1.0}, TypeError, "`frequencies` must be a sequence of 2 numbers"),
        ({"frequencies": (1.0, 0.5), "theta": 50.0}, ValueError, "`frequencies` take the place of `theta`"),
        ({"factor": 0.0}, ValueError, "`factor` must be positive"),
        ({"interleaved": 1}, TypeError, "`interleaved` must be True or False"),
        ({"theta": "10000"}, TypeError, "`theta` must be a number, got '10000'"),
        ({"dim": 4.0}, TypeError, "`dim` must be an int"),
    ],
)
def test_wrong_new_fields_are_refused(fields, error, phrase):
    with pytest.raises(error) as caught:
        Rotary(**{"dim": 4, **fields})
    assert phrase in str(caught.value)


YARN = {"factor": 2.0, "original_max_position_embeddings": 64}
LONGROPE = {"factors": (1.0,) * 4, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("make", "given", "error", "phrase"),
    [
        (Rotary.linear, {"dim": "8", "factor": 2.0}, TypeError, "`dim` must be an int"),
        (Rotary.linear, {"theta": 0.0, "factor": 2.0}, ValueError, "`theta` must be positive"),
        (Rotary.linear, {"factor": 0.0}, ValueError, "`factor` must be positive"),
        (Rotary.llama3, {"original_max_position_embeddings": 0}, ValueError, "`original_max_position_embeddings` must"),
        (
            Rotary.llama3,
            {"original_max_position_embeddings": None},
            TypeError,
            "`original_max_position_embeddings` must",
        ),
        (
            Rotary.llama3,
            {"low_freq_factor": 4.0},
            ValueError,
            "`high_freq_factor` must be larger than `low_freq_factor`, got 4.0 and 4.0",
        ),
        (Rotary.yarn, YARN | {"dim": 7}, ValueError, "`dim` of rotary must be even"),
        (Rotary.yarn, YARN | {"theta": 1.0}, ValueError, "`theta` must be larger than `1`"),
        (Rotary.yarn, YARN | {"beta_fast": 1.0, "beta_slow": 32.0}, ValueError, "`beta_fast` must be larger than"),
        (Rotary.yarn, YARN | {"truncate": "false"}, TypeError, "`truncate` must be True or False"),
        (Rotary.yarn, YARN | {"mscale": -1.0}, ValueError, "`mscale` must be positive"),
        (Rotary.yarn, YARN | {"original_max_position_embeddings": 0}, ValueError, "`original_max_position_embeddings`"),
        (Rotary.longrope, LONGROPE | {"factors": 5}, ValueError, "`factors` must be a sequence of 4 numbers"),
        (Rotary.longrope, LONGROPE | {"factors": (1.0,)}, ValueError, "`factors` must be a sequence of 4 numbers"),
        (Rotary.longrope, LONGROPE | {"original_max_position_embeddings": 1}, ValueError, "must be at least 2, got 1"),
    ],
)
def test_wrong_configurations_are_refused(make, given, error, phrase):
    with pytest.raises(error) as caught:
        make(**{"dim": 8, **given})
    assert phrase in str(caught.value)


def test_a_traced_theta_says_what_to_do():
    with pytest.raises(TypeError, match=r"`theta` must be a number, got .*; give one that is known before tracing"):
        jax.eval_shape(lambda theta: rotate(jnp.ones((3, 4)), Rotary(4, theta), jnp.arange(3)), 1e4)


# Frequencies of published models, against their equations number by number


def test_llama3_is_its_formula():
    rotary = Rotary.llama3(64, 500000.0, factor=8.0, original_max_position_embeddings=8192)
    for m, found in enumerate(rotary.frequencies):
        frequency = 500000.0 ** (-2 * m / 64)
        wave = 2 * np.pi / frequency
        if wave > 8192 / 1.0:
            expected = frequency / 8
        elif wave < 8192 / 4.0:
            expected = frequency
        else:
            share = (8192 / wave - 1) / (4 - 1)
            expected = (1 - share) * frequency / 8 + share * frequency
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_is_its_formula(truncate):
    dim, theta, factor, length = 64, 150000.0, 32.0, 4096
    rotary = Rotary.yarn(dim, theta, factor=factor, original_max_position_embeddings=length, truncate=truncate)
    index = lambda turns: dim * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta))  # noqa: E731
    low, high = index(32), index(1)
    low, high = (np.floor(low), np.ceil(high)) if truncate else (low, high)
    for m, found in enumerate(rotary.frequencies):
        frequency = theta ** (-2 * m / dim)
        ramp = min(max((m - low) / (high - low), 0), 1)
        assert found == pytest.approx(frequency / factor * ramp + frequency * (1 - ramp), rel=1e-12)
    assert rotary.factor == pytest.approx(0.1 * np.log(factor) + 1)


def test_linear_and_longrope_are_their_formulas():
    frequencies = 1e4 ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(Rotary.linear(8, factor=4.0).frequencies, frequencies / 4)
    factors = [1.0, 1.5, 3.0, 9.0]
    rotary = Rotary.longrope(8, factors=factors, factor=32.0, original_max_position_embeddings=4096)
    np.testing.assert_allclose(rotary.frequencies, frequencies / factors)
    assert rotary.factor == pytest.approx(np.sqrt(1 + np.log(32) / np.log(4096)))
    with pytest.raises(ValueError, match="`factors` must be a sequence of 4 numbers"):
        Rotary.longrope(8, factors=factors[:3], factor=32.0, original_max_position_embeddings=4096)


def test_a_given_attention_factor_is_kept():
    given = {"factor": 40.0, "original_max_position_embeddings": 4096}
    assert Rotary.yarn(8, **given, attention_factor=1.25).factor == 1.25
    assert Rotary.yarn(8, **given, mscale=1.0, mscale_all_dim=1.0).factor == 1.0
    alone = [Rotary.yarn(8, **given, **{name: 0.7}).factor for name in ("mscale", "mscale_all_dim")]
    assert alone == [Rotary.yarn(8, **given).factor] * 2
    assert Rotary.longrope(8, factors=[1.0] * 4, **given, attention_factor=1.19).factor == 1.19


@pytest.mark.slow_but("True-*")
@pytest.mark.parametrize("dim", [6, 4])
@pytest.mark.parametrize("shared_qk", [False, True])
def test_turning_by_explicit_positions_keeps_the_factor(shared_qk, dim):
    """Shared keys are rotated before they are normalised, which would cancel the factor."""
    rotary = Rotary(dim, frequencies=(0.3, 1.0, 0.1)[: dim // 2], factor=1.5)
    options = AttentionOptions(Window.sliding(5), rotary=rotary, shared_qk=shared_qk, scale=2.0)
    q, k, v = (cases.normal(seed, 1, 2, 13, 6) for seed in range(3))
    operands = Operands.create(q, k, v, options)
    ours, _ = attend(operands, options, positions=jnp.arange(13)[None])
    cases.assert_close(ours, attend(operands, options)[0])
