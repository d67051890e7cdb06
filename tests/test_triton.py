"""Fused kernels for NVIDIA GPUs: compiled in bfloat16 where there is one, else interpreted in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import Triton
from flax_local_attention.kernels import Tiles
from flax_local_attention.kernels.pallas_triton import Tile
from tests import cases
from tests.kernel_calls import CONFORMANCE, ON_GPU, Call, assert_huge_sinks_are_right, assert_right, drawn

SMALL = Tiles(Tile(16, 16), Tile(16, 16), Tile(16, 16))
KERNELS = Triton() if ON_GPU else Triton(SMALL, interpret=True)

if not ON_GPU:
    pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.slow_but("exact")
@pytest.mark.parametrize("name", CONFORMANCE)
def test_kernels_equal_the_definition_and_repeat(name):
    assert_right(KERNELS, CONFORMANCE[name])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 300.0, 3000.0])
def test_large_logits_make_errors_of_their_own_rounding_only(size):
    """For logits up to 2 million, results and gradients of values are right within a rounding of the logits."""
    call = Call(n=37, b=1)
    arrays, _ = call.arrays()
    k = size * jnp.sign(arrays["k"]) * jnp.arange(1, 38)[:, None].astype(call.dtype)
    arrays |= {"q": jnp.sign(arrays["q"]), "k": k}
    (ours, gradients), (expected, right) = (call.run(by, arrays, {}) for by in (KERNELS, "dense"))
    cases.assert_close(ours, expected, call.dtype)
    rounding = 2.0**-22 * 37 * size * call.d**0.5
    tolerance = cases.TOLERANCE[call.dtype] + rounding
    np.testing.assert_allclose(
        gradients["v"].astype(jnp.float32), right["v"].astype(jnp.float32), rtol=tolerance, atol=tolerance
    )
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(gradients))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_drawn_calls_equal_the_definition_and_repeat(seed):
    assert_right(KERNELS, drawn(seed), seed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(6, 1006))
def test_many_drawn_calls_equal_the_definition_and_repeat(seed):
    assert_right(KERNELS, drawn(seed), seed)


@pytest.mark.slow
def test_sinks_may_be_huge():
    assert_huge_sinks_are_right(KERNELS, Call(features=("sinks",)))
