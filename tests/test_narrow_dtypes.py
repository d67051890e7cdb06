"""Rounding errors of the plain path in bfloat16 and float16, against the same computation written plainly.

Compiled with all optimisations: without them XLA has no matrix product of mixed dtypes on a GPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import DynamicPositionBias, LocalMHA, Rotary, Window
from flax_local_attention.feed_forward import _gate
from flax_local_attention.head import cross_entropy
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")


def plain(q, k, v, window, rotary):
    """Compute attention as a user would in a narrow dtype: float32 sums and softmax, all else in q's dtype."""
    n, wide = q.shape[-2], jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    if rotary is not None:
        table = rotary.query_table(jnp.arange(n))
        q, k = rotary.turn(q, table), rotary.turn(k, table)
    scores = jnp.einsum("hid,hjd->hij", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    visible = window.sees(jnp.arange(n)[:, None], jnp.arange(n)[None])[None]
    p = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("hij,hjd->hid", p, v, preferred_element_type=wide).astype(q.dtype)


@pytest.mark.slow_but("16-float16-rotary")
@pytest.mark.parametrize("rotates", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("d", [16, 32, 64, 80, 96, 128])
def test_errors_in_narrow_dtypes_are_at_most_twice_those_of_the_plain_computation(d, dtype, rotates):
    """Root mean square errors of the result and the gradients against float64, for logits of size 1, 3 and 8."""
    n, window = 160, Window(48, causal=True, exact_windowsize=True)
    rotary = Rotary(d) if rotates else None

    def with_gradients(fn, **options):
        def run(q, k, v, cotangent):
            out, pull_back = jax.vjp(partial(fn, window=window, **options), q, k, v)
            return out, *pull_back(cotangent)

        return jax.jit(run)

    ours = with_gradients(cases.local, rotary=rotary, implementation="xla")
    peer = with_gradients(plain, rotary=rotary)
    right = with_gradients(plain, rotary=_in_float64(rotary))
    unit = [cases.normal(d + part, 2, n, d) for part in range(4)]
    for size in (1, 3, 8):
        narrow = [(scale * x).astype(dtype) for scale, x in zip((size, 1, 1, 1), unit, strict=True)]
        results, allowed = ours(*narrow), peer(*narrow)
        with jax.enable_x64(True):
            exact = jax.tree.map(np.asarray, right(*(jnp.asarray(np.asarray(x, np.float64)) for x in narrow)))
        for name, result, other, true in zip(("out", "q", "k", "v"), results, allowed, exact, strict=True):
            error, limit = (root_mean_square(np.asarray(x, np.float64) - true) for x in (result, other))
            assert error <= 2 * limit, (name, size, error / limit)


def root_mean_square(x):
    return np.sqrt(np.mean(np.square(x)))


class _Float64Tables:
    """A rotary with float64 tables, for `plain`."""

    def __init__(self, rotary):
        self.rotary = rotary

    def query_table(self, positions):
        return self.rotary.query_table(positions, jnp.float64)

    def turn(self, x, table):
        return self.rotary.turn(x, table)


def _in_float64(rotary):
    return None if rotary is None else _Float64Tables(rotary)


@pytest.mark.slow_but("300.0-300.0")
@pytest.mark.parametrize(("scale", "size"), [(300.0, 300.0), (1e-6, 1000.0)])
def test_a_scale_does_not_move_narrow_queries_out_of_range(scale, size):
    """300 * 300 overflows float16, 1e-6 * 1e-3 underflows."""
    q, k, v = (cases.normal(part, 1, 19, 4) for part in range(3))
    window = Window(8, causal=True)
    q = (q * size).astype(jnp.float16) if scale > 1 else q.astype(jnp.float16)
    k = (k * 1e-3 if scale > 1 else k * size).astype(jnp.float16)
    ours = cases.local(q, k, v, window, scale=scale)
    expected = cases.local(q.astype(jnp.float32), k.astype(jnp.float32), v, window, scale=scale)
    assert ours.dtype == jnp.float16
    cases.assert_close(ours, expected, "float16")
    constant = cases.local(0 * q, k, v, window)
    assert np.abs(np.asarray(ours - constant, np.float32)).max() > 1e-4, "scores count"


LOSS_SCALE = 2.0**14

# The largest gradient that must be kept: a rotation or a sum of two heads may double it, to float16's largest number.
HELD = 32_000


def assert_keeps_gradients(fn, arrays, factor=LOSS_SCALE):
    """Compare float16 gradients of a loss scaled by `factor` with float32 gradients of the same numbers."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.float16), arrays)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    cotangent = factor * cases.normal(99, *jax.eval_shape(lambda arrays: fn(**arrays), wide).shape)

    def gradients(arrays):
        return jax.grad(lambda arrays: (fn(**arrays).astype(jnp.float32) * cotangent).sum())(arrays)

    def compare(path, ours, right):
        name, is_held = jax.tree_util.keystr(path), np.abs(right) < HELD
        ours, right = np.asarray(ours, np.float64)[is_held], np.asarray(right)[is_held]
        assert np.abs(right).max() > 0.1, name
        assert np.isfinite(ours).all(), (name, np.isfinite(ours).mean())
        assert np.abs(ours - right).max() < 0.02 * np.abs(right).max(), (name, np.abs(ours - right).max())

    jax.tree_util.tree_map_with_path(compare, gradients(narrow), gradients(wide))


@pytest.mark.slow_but("-xla")
@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize(
    "features", [(), ("bias", "sinks", "global_keys", "grouped"), ("rotary", "mask", "soft_cap")], ids="+".join
)
def test_gradients_of_a_scaled_loss_are_kept_in_float16(features, implementation):
    """Values times a cotangent of 16,384 overflow float16; gradients of queries and keys do not."""
    window = Window(8, causal=True)
    arrays, traced, options = cases.draw_call(features, window, 32, d=16)
    arrays |= {"q": arrays["q"] * 0.1, "k": arrays["k"] * 0.1, "v": arrays["v"] * 4}
    call = partial(cases.local, window=window, implementation=implementation, **traced, **options)
    assert_keeps_gradients(call, arrays)


@pytest.mark.slow
def test_the_gradient_of_a_loss_keeps_small_probabilities_in_float16():
    """Errors of 1e-9 underflow float16; in the scaled loss they are 2e-5."""
    x, labels = cases.normal(0, 1, 5, 8), jnp.arange(5)[None]
    kernel = cases.normal(1, 8, 7).at[:, 5:].set(0)
    x, kernel = x.at[..., 0].set(4), kernel.at[0, 5:].set(-3.5)

    def gradients(x, dtype):
        def loss(x, kernel):
            return LOSS_SCALE * cross_entropy(x, kernel, labels, labels >= 0, dtype=dtype)

        return jax.grad(loss, (0, 1))(x, kernel.astype(jnp.float16).astype(jnp.float32))

    (_, ours), (_, right) = gradients(x.astype(jnp.float16), jnp.float16), gradients(x, jnp.float32)
    assert 1e-6 < np.abs(right[:, 5:]).max() < 1e-2
    np.testing.assert_allclose(ours[:, 5:], right[:, 5:], rtol=0.05)


def test_gradients_of_hidden_states_are_not_rounded_before_the_loss_is_scaled():
    x, kernel, labels = 1e-3 * cases.normal(0, 1, 5, 8), 1e-6 * cases.normal(1, 8, 7), jnp.arange(5)[None]

    def gradient(dtype):
        def loss(x):
            return LOSS_SCALE * cross_entropy(x, kernel, labels, labels >= 0, dtype=dtype)

        return jax.grad(loss)(x.astype(dtype))

    ours, right = gradient(jnp.float16), gradient(jnp.float32)
    np.testing.assert_allclose(ours, right, rtol=0.3, atol=0.1 * np.abs(right).max())


def test_the_gradient_of_a_gate_is_kept_in_float16():
    """A cotangent times the values overflows float16; times the derivative of the GELU it does not."""
    assert_keeps_gradients(_gate, {"values": jnp.full(5, 90.0), "gates": jnp.array([-3.0, -2.5, -2, -0.75, -4])}, 4000)


@pytest.mark.slow
@pytest.mark.parametrize("signed", [False, True])
def test_the_gradient_of_a_position_bias_is_summed_in_float32(signed):
    """Distance 0 occurs 400 times; a bfloat16 sum of ones stops at 256."""
    module = DynamicPositionBias(4, 1, signed=signed, dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), 400, 400)
    gradient = jax.grad(lambda params: (module.apply(params, 400, 400)[0] * jnp.eye(400, dtype=jnp.bfloat16)).sum())(
        params
    )
    np.testing.assert_allclose(gradient["params"]["dense_2"]["bias"], 400, rtol=0.01)


@pytest.mark.slow
def test_gradients_of_gated_attention_are_kept_in_float16():
    x = cases.normal(0, 2, 16, 8)
    module = LocalMHA(8, 4, dim_head=16, heads=2, causal=True, gate_values_per_head=True)
    params = module.init(jax.random.key(0), x)["params"]
    params["to_out"]["kernel"] *= 0.5

    def attend(x, gates):
        module = LocalMHA(8, 4, dim_head=16, heads=2, causal=True, gate_values_per_head=True, dtype=x.dtype)
        return module.apply({"params": params | {"to_v_gate": gates}}, x)

    gates = {"kernel": jnp.zeros((8, 2)), "bias": jnp.full(2, 6.0)}
    assert_keeps_gradients(attend, {"x": 6 * x, "gates": gates})
