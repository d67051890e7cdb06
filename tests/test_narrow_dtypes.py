"""Rounding of the plain path in bfloat16 and float16, beside the same computation written plainly.

Compiled with all optimisations: without them XLA has no matrix product of two dtypes for a GPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import Rotary, Window
from tests import cases


def plain(q, k, v, window, rotary):
    """Attention as one would write it in a narrow dtype: float32 sums and softmax, everything else as narrow as q."""
    n, wide = q.shape[-2], jnp.promote_types(q.dtype, jnp.float32)
    if rotary is not None:
        table = rotary.query_table(jnp.arange(n))
        q, k = rotary.turn(q, table), rotary.turn(k, table)
    scores = jnp.einsum("hid,hjd->hij", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    visible = window.sees(jnp.arange(n)[:, None], jnp.arange(n))
    p = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("hij,hjd->hid", p, v, preferred_element_type=wide).astype(q.dtype)


@pytest.mark.parametrize("rotates", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("d", [16, 32, 64, 80, 96, 128])
def test_errors_in_narrow_dtypes_are_at_most_twice_those_of_the_plain_computation(d, dtype, rotates):
    """Root mean squares over the result and the gradients, for logits of size 1, 3 and 8, against float64."""
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
    """A rotary whose tables are float64, for `plain`."""

    def __init__(self, rotary):
        self.rotary = rotary

    def query_table(self, positions):
        return self.rotary.query_table(positions, jnp.float64)

    def turn(self, x, table):
        return self.rotary.turn(x, table)


def _in_float64(rotary):
    return None if rotary is None else _Float64Tables(rotary)


@pytest.mark.parametrize(("scale", "size"), [(300.0, 300.0), (1e-6, 1000.0)])
def test_a_scale_does_not_move_narrow_queries_out_of_range(scale, size):
    """300 * 300 is above float16's largest number, 1e-6 * 1e-3 below its least."""
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
