"""Memory of compiled programs on devices that are not here: next to none beside arguments and results."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.targets import compile_for, missing
from flax_local_attention import Rotary, local_attention

pytestmark = pytest.mark.aot

MIB = 2**20
HEADS, N, D, WINDOW = 8, 65536, 64, 256
SLAB = 2 * WINDOW
Q_MIB = HEADS * N * D * 2 / MIB
EXACT = {"window_size": WINDOW, "causal": True, "exact_windowsize": True}

# Options, and the shapes and dtypes of the arrays they need.
OPTIONS = {
    "plain windows": ({"exact_windowsize": False}, {}),
    "windows both ways": ({"causal": False}, {}),
    "xpos": ({"rotary": Rotary(D, use_xpos=True)}, {}),
    "mask and segments": ({}, {"mask": ((1, N), jnp.bool_), "segment_ids": ((1, N), jnp.int32)}),
    "sinks": ({}, {"sinks": ((HEADS,), jnp.float32)}),
    "soft cap": ({"logits_soft_cap": 30.0}, {}),
    "bias": ({}, {"attn_bias": ((HEADS, WINDOW, SLAB), jnp.float32)}),
}


def gradient_memory(target, arrays=None, kv_heads=HEADS, n=N, **options):
    """Temporary MiB of a bfloat16 result and the gradients of q, k and v, compiled for a target."""
    if (reason := missing(target)) is not None:
        pytest.skip(reason)
    q = jax.ShapeDtypeStruct((1, HEADS, n, D), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, kv_heads, n, D), jnp.bfloat16)
    arrays = {name: jax.ShapeDtypeStruct(*spec) for name, spec in (arrays or {}).items()}

    def with_gradient(q, k, v, cotangent, *values):
        given = dict(zip(arrays, values, strict=True))
        out, pull_back = jax.vjp(lambda q, k, v: local_attention(q, k, v, **EXACT | options, **given), q, k, v)
        return out, pull_back(cotangent)

    compiled = compile_for(target, with_gradient, q, k, k, q, *arrays.values())
    return compiled.memory_analysis().temp_size_in_bytes / MIB


def test_gradient_on_a_tpu_needs_next_to_no_memory():
    assert gradient_memory("tpu") <= 16


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_on_a_tpu_needs_next_to_no_memory_with(name):
    options, arrays = OPTIONS[name]
    assert gradient_memory("tpu", arrays, **options) <= 16


def test_gradient_on_a_tpu_needs_next_to_no_memory_with_grouped_queries():
    assert gradient_memory("tpu", kv_heads=2) <= 16


def test_gradient_on_a_tpu_needs_no_more_memory_for_four_times_the_tokens():
    """Of which no array fits on the chip, whose memory is not counted."""
    assert gradient_memory("tpu", n=4 * N) <= 16


def test_gradient_on_an_h100_needs_little_more_than_a_copy_of_the_queries():
    assert gradient_memory("h100") <= 1.25 * Q_MIB
