"""Fused kernels for Hopper GPUs: compiled in bfloat16 where there is one, else interpreted in float16.

JAX interprets them from 0.11 on. Interpretation cannot show races that a device may have.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from flax_local_attention import AttentionOptions, MosaicGPU, Operands, Unsupported, Window, local_attention
from flax_local_attention.kernels import pallas_mosaic
from flax_local_attention.kernels.mosaic import Tiles
from flax_local_attention.kernels.pallas_mosaic import Tile, has_interpreter
from flax_local_attention.kernels.primitives import Target
from tests import cases
from tests.cases import normal
from tests.kernel_calls import CONFORMANCE, ON_GPU, assert_huge_sinks_are_right, assert_right, drawn

needs_kernels = pytest.mark.skipif(not (ON_GPU or has_interpreter()), reason="this JAX cannot interpret these kernels")

SMALL = Tile(64, 64, 2, 2)
PERSISTENT = SMALL._replace(stages=3, persistent=True)
KERNELS = (
    {"": MosaicGPU()}
    if ON_GPU
    else {
        "": MosaicGPU(Tiles(SMALL, SMALL, SMALL), interpret=True),
        "persistent": MosaicGPU(Tiles(PERSISTENT, PERSISTENT, PERSISTENT), interpret=True),
    }
)
WIDTHS = (64, 80, 128) if ON_GPU else (64,)
# Calls to interpret, which takes seconds each: every kind of window and every feature.
INTERPRETED = {
    "exact": "persistent",
    "plain": "",
    "plain both, far back": "persistent",
    "segments, mask, grouped": "persistent",
    "sinks, mask, grouped": "",
    "soft cap": "persistent",
    "rotary": "",
}


def adapted(call, d=64):
    """Return the call with sizes that these kernels support, with ragged tiles and blocks."""
    if ON_GPU:
        return dataclasses.replace(call, d=d, n=-(-call.n // 8) * 8)
    return dataclasses.replace(call, d=d, n=200, b=1, dtype="float16")


def serves(call):
    """Return whether the kernels support a call; global keys are excluded: they take a call of their own."""
    arrays, fixed = call.arrays()
    if "global_keys" in arrays:
        return False
    options = {"window": call.window} | dict(call.options)
    given = {"q_offset": options.pop("q_offset")} if "q_offset" in options else {}
    options = AttentionOptions(**options)
    return not MosaicGPU().problems(Operands.create(**arrays, **fixed, **given, options=options), options)


@pytest.mark.slow_but("plain-64")
@needs_kernels
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("name", CONFORMANCE if ON_GPU else INTERPRETED)
def test_kernels_equal_the_definition_and_repeat(name, d):
    call = adapted(CONFORMANCE[name], d)
    if not serves(call):
        pytest.skip("not served")
    assert_right(KERNELS[INTERPRETED.get(name, "") if not ON_GPU else ""], call)


@pytest.mark.slow
@needs_kernels
def test_queries_may_stand_beyond_the_first_key_and_the_last():
    assert_right(KERNELS[""], adapted(dataclasses.replace(CONFORMANCE["both"], options=(("q_offset", 40),))))


@needs_kernels
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(400))
def test_many_drawn_calls_equal_the_definition_and_repeat(seed):
    call = adapted(drawn(seed), 64 if seed % 2 or not ON_GPU else 128)
    if ON_GPU:
        call = dataclasses.replace(call, dtype="float16" if seed % 3 == 0 else "bfloat16")
    if not serves(call):
        pytest.skip("not served")
    assert_right(KERNELS["" if ON_GPU or seed % 2 else "persistent"], call, seed)


@pytest.mark.slow
@needs_kernels
def test_heads_may_lie_token_by_token():
    call = adapted(CONFORMANCE["exact"])
    assert_right(dataclasses.replace(KERNELS[""], token_major=True), call)


@pytest.mark.slow
@needs_kernels
def test_sinks_may_be_huge():
    assert_huge_sinks_are_right(KERNELS[""], adapted(CONFORMANCE["sinks"]))


@pytest.mark.slow
@needs_kernels
def test_nothing_that_masked_tokens_hold_reaches_another_token():
    call = adapted(CONFORMANCE["mask"])
    arrays, fixed = call.arrays()
    hidden = ~fixed["mask"][:, None, :, None]
    cotangent = jnp.where(hidden, 0, cases.draw_cotangent(arrays)).astype(call.dtype)

    @jax.jit
    def run(arrays):
        attend = functools.partial(cases.local, window=call.window, implementation=KERNELS[""], **fixed)
        return cases.value_and_pullback(lambda **arrays: attend(**arrays), arrays, cotangent)

    clean = run({name: jnp.where(hidden, 0, x) for name, x in arrays.items()})
    spoiled = run({name: jnp.where(hidden, jnp.nan, x) for name, x in arrays.items()})
    jax.tree.map(
        lambda a, b: cases.assert_close(jnp.where(hidden, 0, a), jnp.where(hidden, 0, b), call.dtype), spoiled, clean
    )


REFUSED = {
    "float32": ({"dtype": jnp.float32}, {}, "bfloat16 or float16"),
    "wide heads": ({"d": 136}, {}, "at most 128 wide, got 136"),
    "ragged": ({"n": 60}, {}, "multiples of 8, got 60 and 60"),
    "bias": ({}, {"attn_bias": jnp.zeros((2, 16, 48), jnp.bfloat16)}, "no bias"),
    "shared": ({}, {"shared_qk": True}, "shared_qk"),
    "dropout": ({}, {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)}, "no dropout"),
    "scale": ({}, {"scale": -1.0}, "`scale` must be a positive number"),
}


def attend(n=64, d=64, dtype=jnp.bfloat16, implementation="mosaic", **options):
    q, k, v = (normal(seed, 1, 2, n, d).astype(dtype) for seed in range(3))
    return local_attention(q, k, v, window=Window(16), implementation=implementation, autopad=True, **options)


@pytest.mark.parametrize("name", REFUSED)
def test_named_kernels_refuse_what_they_cannot_do(name):
    shape, options, reason = REFUSED[name]
    with pytest.raises(Unsupported, match=reason):
        attend(**shape, **options)


def test_an_offset_must_be_known():
    with pytest.raises(Unsupported, match="`q_offset` must be known"):
        jax.jit(lambda offset: attend(q_offset=offset))(jnp.int32(3))


@pytest.mark.skipif(ON_GPU, reason="the device may run them")
def test_a_device_that_cannot_run_them_is_named():
    with pytest.raises(Unsupported, match=r"compute capability 9.0, on one device, .* got cpu"):
        attend()


@pytest.mark.skipif(has_interpreter(), reason="this JAX interprets them")
def test_a_jax_that_cannot_interpret_them_is_named():
    with pytest.raises(Unsupported, match=r"0\.11 and later can"):
        attend(implementation=MosaicGPU(interpret=True))


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_gpus_of_other_generations_cannot_run_them(capability):
    assert str(capability) in MosaicGPU().problem_of(Target("cuda", capability))


@pytest.mark.parametrize(
    ("runtime", "assembler", "expected"),
    [
        (12060, "12.6.85", None),
        (12080, "12.8.93", "12.8.93"),
        (12090, "12.9.41", "12.9.41"),
        (12090, "12.9.86", None),
        (12090, None, "12.9"),
        (13000, None, None),
    ],
)
def test_versions_of_cuda_that_compile_them_wrong_are_known(runtime, assembler, expected, monkeypatch):
    from jax._src import lib

    def version_of(package):
        if assembler is None:
            raise pallas_mosaic.importlib.metadata.PackageNotFoundError(package)
        return assembler

    class Versions:
        cuda_runtime_get_version = staticmethod(lambda: runtime)

    monkeypatch.setattr(lib, "cuda_versions", Versions)
    monkeypatch.setattr(pallas_mosaic.importlib.metadata, "version", version_of)
    pallas_mosaic.miscompiling_cuda.cache_clear()
    try:
        assert pallas_mosaic.miscompiling_cuda() == expected
        refused = MosaicGPU().problem_of(Target("cuda", (9, 0)))
        assert refused is None if expected is None else expected in refused
    finally:
        pallas_mosaic.miscompiling_cuda.cache_clear()


@pytest.mark.parametrize(("version", "expected"), [((0, 10, 1), True), ((0, 11, 9), True), ((0, 12, 0), False)])
def test_warpgroups_keep_the_registers_they_ask_for_before_jax_0_12(version, expected, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert pallas_mosaic.keeps_registers() == expected
