"""`Rotary` against its formula in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import Rotary, Window
from flax_local_attention.rotary import rotate
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")


def by_complex_numbers(x, positions, theta=10000.0, fading=0.0):
    """The formula in float64: number m turned by ``t theta^(-2m/d)`` and scaled by ``zeta_m^(fading t)``."""
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
    cases.assert_close(rotate(jnp.asarray(x), rotary.query_table(jnp.asarray(positions))), expected)
    cases.assert_close(rotate(jnp.asarray(x), rotary.key_table(jnp.asarray(positions))), expected)


def test_xpos_is_its_formula():
    x, positions = np.asarray(cases.normal(0, 5, 6)), np.array([-9, -1, 0, 4, 13])
    rotary = Rotary(6, use_xpos=True, scale_base=7.0)
    queries = rotate(jnp.asarray(x), rotary.query_table(jnp.asarray(positions)))
    keys = rotate(jnp.asarray(x), rotary.key_table(jnp.asarray(positions)))
    cases.assert_close(queries, by_complex_numbers(x, positions, fading=1 / 7))
    cases.assert_close(keys, by_complex_numbers(x, positions, fading=-1 / 7))


@pytest.mark.parametrize("rotary", [Rotary(6), Rotary(6, use_xpos=True, scale_base=8.0)], ids=["rotary", "xpos"])
def test_products_depend_on_the_distance_alone(rotary):
    q, k = cases.normal(0, 5, 6), cases.normal(1, 5, 6)
    here, there = jnp.arange(5), jnp.arange(5) + 13

    def products(positions):
        return rotate(q, rotary.query_table(positions)) @ rotate(k, rotary.key_table(positions)).T

    cases.assert_close(products(there), products(here))
    apart = rotate(q, rotary.query_table(there)) @ rotate(k, rotary.key_table(here)).T
    assert np.abs(apart - products(here)).max() > 0.1, "another distance is another product"


def test_xpos_fades_with_distance():
    rotary = Rotary(4, use_xpos=True, scale_base=8.0)
    ones = jnp.ones((1, 4))
    key = rotate(ones, rotary.key_table(jnp.array([0])))
    sizes = [
        jnp.linalg.norm(rotate(ones, rotary.query_table(jnp.array([t])))) * jnp.linalg.norm(key) for t in (0, 8, 16)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rotation_keeps_the_dtype_and_computes_in_float32(dtype):
    x = cases.normal(0, 3, 8).astype(dtype)
    positions = jnp.array([4001, 4002, 4003])
    rotated = rotate(x, Rotary(8).query_table(positions))
    assert rotated.dtype == dtype
    expected = rotate(x.astype(jnp.float32), Rotary(8).query_table(positions))
    np.testing.assert_array_equal(rotated, expected.astype(dtype))


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
    assert Rotary(4, use_xpos=True).for_window(9).scale_base == 4.0
    assert Rotary(4, use_xpos=True, scale_base=3.0).for_window(9).scale_base == 3.0
    assert Rotary(4).for_window(1) == Rotary(4)


def test_xpos_of_a_window_of_one_needs_a_base():
    with pytest.raises(ValueError, match="xPos needs `scale_base` with `window_size=1`"):
        Rotary(4, use_xpos=True).for_window(1)
    x = cases.normal(0, 1, 3, 4)
    with pytest.raises(ValueError, match="give `scale_base`"):
        cases.local(x, x, x, Window(1), rotary=Rotary(4, use_xpos=True))
    out = cases.local(x, x, x, Window(1), rotary=Rotary(4, use_xpos=True, scale_base=1.0))
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"dim": 5}, "`dim` of rotary must be even and positive, got 5; use an even `dim_head`"),
        ({"dim": 0}, "`dim` of rotary must be even and positive"),
        ({"dim": -2}, "`dim` of rotary must be even and positive"),
        ({"theta": 0.0}, "`theta` must be positive and finite, got 0.0"),
        ({"theta": float("nan")}, "`theta` must be positive"),
        ({"scale_base": 0.0}, "`scale_base` of xPos must be positive and finite, got 0.0; leave it out"),
        ({"scale_base": -1.0}, "`scale_base` of xPos must be positive"),
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
    """As a subclass that interpolates gives them; rows of positions give rows of a table."""
    rotary, halves = Rotary(4), jnp.arange(6).reshape(2, 3) / 2
    angles = np.asarray(halves)[..., None] * 10000.0 ** -np.array([0, 0.5])
    table = rotary.key_table(halves)
    np.testing.assert_allclose(table, np.stack([np.cos(angles), np.sin(angles)], -2), atol=1e-6)
