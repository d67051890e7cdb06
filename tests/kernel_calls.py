"""Calls with which every family of fused kernels is tested: compiled where there is a device, else interpreted.

Interpreted kernels do not test the compiler, whose mistakes show only on a device.
"""

import dataclasses
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flax_local_attention import Rotary, Window
from tests import cases
from tests.cases import normal

ON_GPU = jax.default_backend() == "gpu"
DTYPE = "bfloat16" if ON_GPU else "float32"
D = 64 if ON_GPU else 16

EXACT = Window(32, causal=True, exact_windowsize=True)
BOTH = Window(20, look_forward=1, exact_windowsize=True)
PLAIN = Window(24, causal=True)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of attention: sizes, window and features."""

    window: Window = EXACT
    n: int = 1021 if ON_GPU else 53
    d: int = D
    heads: int = 2
    kv_heads: int = 2
    b: int = 2
    features: tuple[str, ...] = ()
    options: tuple[tuple[str, object], ...] = ()
    dtype: str = DTYPE
    size: float = 1.0

    def arrays(self, seed=0):
        """Return the arrays with gradients and those without."""
        q = (self.b, self.heads, self.n, self.d)
        k = (self.b, self.kv_heads, self.n, self.d)
        w, has = self.window, set(self.features).__contains__
        arrays = {"q": self.size * normal(seed, *q), "k": normal(seed + 1, *k), "v": normal(seed + 2, *k)}
        if has("wide_values"):
            arrays["v"] = normal(seed + 2, *k[:-1], self.d + 8)
        if has("global_keys"):
            arrays["global_keys"] = (
                normal(seed + 7, *k[:2], 5, self.d),
                normal(seed + 8, *k[:2], 5, arrays["v"].shape[-1]),
            )
        if has("bias"):
            arrays["attn_bias"] = normal(seed + 3, self.heads, w.window_size, w.slab)
        if has("batch_bias"):
            arrays["attn_bias"] = normal(seed + 3, self.b, self.heads, w.window_size, w.slab)
        if has("shared_bias"):
            arrays["attn_bias"] = normal(seed + 3, 1, w.window_size, w.slab)
        arrays = jax.tree.map(lambda x: x.astype(self.dtype), arrays)
        if has("sinks"):
            arrays["sinks"] = normal(seed + 4, self.heads)
        fixed = {}
        if has("mask"):
            fixed["mask"] = normal(seed + 5, self.b, self.n) > -0.5
        if has("head_mask"):
            fixed["mask"] = normal(seed + 5, self.b, self.heads, self.n) > -0.5
        if has("segment_ids"):
            fixed["segment_ids"] = jnp.cumsum(normal(seed + 6, self.b, self.n) > 1.5, axis=1)
        if has("offset"):
            fixed["q_offset"] = jnp.int32(self.n // 3)
            arrays["q"] = arrays["q"][:, :, : (self.n + 1) // 2]
        if has("dropout"):
            fixed["dropout_rng"] = jax.random.key(seed)
        return arrays, fixed

    def run(self, implementation, arrays, fixed):
        """Compute the result and the gradients for a random cotangent, in one compiled program."""
        cotangent = cases.draw_cotangent(arrays).astype(self.dtype)
        options = {"window": self.window, "implementation": implementation, **dict(self.options)}

        @jax.jit
        def run(arrays, fixed, cotangent):
            return cases.value_and_pullback(
                lambda **arrays: cases.local(**arrays, **fixed, **options), arrays, cotangent
            )

        return run(arrays, fixed, cotangent)


def in_float64(call, arrays, fixed):
    """Compute the result and the gradients by the definition in float64, as NumPy arrays."""
    arrays, fixed = jax.tree.map(np.asarray, (arrays, {k: v for k, v in fixed.items() if k != "dropout_rng"})), fixed
    arrays, plain = arrays
    rng = {"dropout_rng": fixed["dropout_rng"]} if "dropout_rng" in fixed else {}
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        exact = dataclasses.replace(call, dtype="float64")
        return jax.tree.map(np.asarray, exact.run("dense", wide, jax.tree.map(jnp.asarray, plain) | rng))


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def assert_right(kernels, call, seed=0):
    """Assert errors at most twice those of the definition in the same dtype, and results that repeat bit for bit."""
    arrays, fixed = call.arrays(seed)
    run = partial(call.run, kernels, arrays, fixed)
    ours, again = run(), run()
    jax.tree.map(np.testing.assert_array_equal, ours, again)
    narrow, exact = call.run("dense", arrays, fixed), in_float64(call, arrays, fixed)
    epsilon = {"float32": 2.5e-3 if ON_GPU else 3e-6, "bfloat16": 8e-3, "float16": 1e-3}[call.dtype]
    most = max(map(rms, jax.tree.leaves(exact)))

    def compare(path, ours, narrow, exact):
        assert np.isfinite(np.asarray(ours, np.float32)).all(), path
        error, allowed = rms(np.asarray(ours, np.float64) - exact), rms(np.asarray(narrow, np.float64) - exact)
        # A gradient of a score is the difference of two products, one with the rounded result: small gradients are
        # off by that rounding.
        name = jax.tree_util.keystr(path)
        is_sum = name == "[0]" or "v" in name
        # The gradient of a sink sums the rounding errors of all queries.
        least = epsilon * most * (0.1 if is_sum and call.dtype != "float32" else 2 if "sink" in name else 1)
        assert error <= 2 * allowed + least, (name, error, allowed, least)

    jax.tree_util.tree_map_with_path(compare, ours, narrow, exact)


CONFORMANCE = {
    "exact": Call(),
    "plain": Call(PLAIN),
    "both": Call(BOTH),
    "plain both, far back": Call(Window(16, look_backward=2)),
    "itself alone": Call(Window(1, causal=True, look_backward=0)),
    "one window": Call(Window(24, look_backward=0, look_forward=0)),
    "longer than the sequence": Call(Window(300, causal=True, exact_windowsize=True)),
    "whole blocks": Call(n=1024 if ON_GPU else 64),
    "one token": Call(n=1),
    "fewer than a block": Call(n=13),
    "grouped": Call(heads=4, kv_heads=2),
    "one head of keys": Call(PLAIN, heads=3, kv_heads=1),
    "mask": Call(features=("mask",)),
    "mask of each head": Call(features=("head_mask",)),
    "segments": Call(features=("segment_ids",)),
    "segments, mask, grouped": Call(PLAIN, features=("segment_ids", "mask"), heads=6, kv_heads=2),
    "offset": Call(features=("offset",)),
    "offset both ways": Call(BOTH, features=("offset", "mask")),
    "sinks": Call(features=("sinks",)),
    "sinks, mask, grouped": Call(features=("sinks", "mask"), heads=4, kv_heads=2),
    "soft cap": Call(options=(("logits_soft_cap", 1.5),)),
    "shared": Call(options=(("shared_qk", True),), features=("mask",)),
    "shared, rotary": Call(BOTH, options=(("shared_qk", True), ("rotary", Rotary(D)))),
    "rotary": Call(options=(("rotary", Rotary(D)),), features=("mask",)),
    "rotary of pairs, of part of a head": Call(
        options=(("rotary", Rotary(D // 2, interleaved=True, frequencies=(0.3,) * (D // 4), factor=1.2)),)
    ),
    "scale": Call(options=(("scale", 0.7),)),
    "dropout": Call(features=("dropout",), options=(("dropout_rate", 0.25),)),
    "dropout, grouped": Call(features=("dropout", "mask"), options=(("dropout_rate", 0.5),), heads=6, kv_heads=2),
    "bias": Call(features=("bias",)),
    "bias, batch": Call(features=("batch_bias",)),
    "bias, shared by heads": Call(Window(16), features=("shared_bias",), kv_heads=1),
    "bias, windows of 48": Call(Window(48, causal=True), features=("bias",), n=161),
    "bias by distance": Call(Window(1, causal=True, look_backward=40, exact_windowsize=True), features=("bias",)),
    "bias, offset": Call(features=("bias", "offset", "mask")),
    "bias and everything": Call(
        Window(16, exact_windowsize=True),
        features=("bias", "mask", "segment_ids", "sinks", "dropout"),
        options=(("logits_soft_cap", 2.0), ("dropout_rate", 0.2)),
        kv_heads=1,
    ),
    "head size 24": Call(d=24),
    "wider values": Call(features=("wide_values", "mask")),
    "global keys, sinks, grouped": Call(
        features=("global_keys", "sinks"), options=(("rotary", Rotary(D)),), heads=4, kv_heads=2
    ),
    "global keys, wider values, shared": Call(
        BOTH, features=("global_keys", "wide_values"), options=(("shared_qk", True),)
    ),
    "head size 96": Call(d=96, n=70),
    "large logits": Call(size=10.0),
    "tiny logits": Call(size=1e-4),
}
ON_GPU_TOO = {
    f"head size {d}, {name}": dataclasses.replace(CONFORMANCE[name], d=d, n=517)
    for d in (32, 64, 80, 128, 256)
    for name in (
        "exact",
        "plain",
        "grouped",
        "segments, mask, grouped",
        "bias",
        "soft cap",
        "dropout, grouped",
        "shared",
    )
} | {
    f"{dtype}, head size {d}": Call(d=d, n=517, dtype=dtype) for dtype in ("float16", "float32") for d in (32, 64, 128)
}
if ON_GPU:
    CONFORMANCE |= ON_GPU_TOO


def drawn(seed):
    """Draw a call with any window and any combination of features."""
    draw = random.Random(seed)
    most = 300 if ON_GPU else 40
    sizes = (1, 2, 3, 7, 16, 24, 32, 48, 64, 100, 128, 256)
    w = draw.choice([size for size in sizes if size <= most])
    causal = draw.random() < 0.6
    window = Window(
        w, causal, draw.randint(0, 3), None if causal else draw.randint(0, 2), exact_windowsize=draw.random() < 0.5
    )
    kv_heads, group = draw.choice((1, 2, 3)), draw.choice((1, 1, 2, 4))
    d = draw.choice((16, 32, 64, 128, 80, 256) if ON_GPU else (16, 24))
    dtype = draw.choice(("bfloat16", "bfloat16", "float16", "float32") if ON_GPU else ("float32",))
    d = min(d, 128) if dtype == "float32" else d
    options, features = {}, []
    if draw.random() < 0.3:
        features.append("mask")
    features += [name for name in ("sinks",) if draw.random() < 0.2]
    features += [draw.choice(("segment_ids", "offset"))] if draw.random() < 0.3 else []
    if draw.random() < 0.25 and (w in (1, 2) or w % 16 == 0):
        features.append(draw.choice(("bias", "batch_bias", "shared_bias")))
    if draw.random() < 0.2:
        features.append("dropout")
        options["dropout_rate"] = draw.choice((0.1, 0.5))
    if draw.random() < 0.2:
        options["logits_soft_cap"] = draw.choice((0.5, 20.0))
    if draw.random() < 0.15:
        options["shared_qk"] = True
    if draw.random() < 0.3:
        options["rotary"] = Rotary(d)
    return Call(
        window,
        draw.randint(1, 700 if ON_GPU else 90),
        d,
        kv_heads * group,
        kv_heads,
        draw.choice((1, 2, 3)),
        tuple(features),
        tuple(options.items()),
        dtype,
        draw.choice((1.0, 1.0, 5.0)),
    )


def assert_huge_sinks_are_right(kernels, call):
    """Assert that a sink near float32's largest number takes all probability, and one of -inf none."""
    arrays, fixed = call.arrays()
    arrays["sinks"] = jnp.array([3e38, -jnp.inf])
    (ours, gradients), (expected, right) = (call.run(by, arrays, fixed) for by in (kernels, "dense"))
    cases.assert_close(ours, expected, call.dtype)
    assert not ours[:, 0].any()
    for name in "qkv":
        cases.assert_close(gradients[name], right[name], call.dtype)
