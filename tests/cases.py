"""Shared by the tests: a list of windows, a list of features, a table of tolerances, and calls drawn from them."""

import dataclasses
import functools
import random
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from flax_local_attention import Rotary, Window, Windowed, local_attention

TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 5e-3}
"""Largest absolute difference by dtype for results of size 1; for larger results it grows in proportion."""

SMALL_BLOCK = 8
"""Queries per block in most tests: short sequences then have several blocks and a ragged last one."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A window, the sequence length and the block size."""

    window: Window
    n: int
    block: int = SMALL_BLOCK

    def __str__(self):
        window = self.window
        words = [f"w{window.window_size}", f"back{window.look_backward}", f"forward{window.look_forward}"]
        words += ["causal"] * window.causal + ["exact"] * window.exact_windowsize + [f"n{self.n}"]
        return "-".join(words)


PLACES = (
    Place(Window(1, causal=True), 11),
    Place(Window(1, causal=True, look_backward=0), 5),
    Place(Window(1), 13),
    Place(Window(1, look_backward=2, look_forward=2, exact_windowsize=True), 11),
    Place(Window(2, causal=True, look_backward=3), 19),
    Place(Window(3, causal=True), 23),
    Place(Window(3, causal=True, exact_windowsize=True), 23),
    Place(Window(3), 23),
    Place(Window(3, exact_windowsize=True), 23),
    Place(Window(4, causal=True, look_backward=3, exact_windowsize=True), 29),
    Place(Window(5, look_backward=0, look_forward=0), 17),
    Place(Window(5, look_backward=0, look_forward=0, exact_windowsize=True), 17),
    Place(Window(5, causal=True, look_backward=0), 17),
    Place(Window(5, look_backward=2, look_forward=0), 31),
    Place(Window(5, look_backward=0, look_forward=2), 31),
    Place(Window(5, look_backward=2, look_forward=1, exact_windowsize=True), 31),
    Place(Window(5, look_backward=3, look_forward=2), 31),
    Place(Window(4), 16),  # whole windows and whole blocks
    Place(Window(7, causal=True), 5),
    Place(Window(7, exact_windowsize=True), 5),
    Place(Window(5), 1),
    Place(Window(5, causal=True, exact_windowsize=True), 1),
    Place(Window(12, causal=True), 41),  # wider than a block, in equal parts
    Place(Window(12, look_backward=2, exact_windowsize=True), 41),
    Place(Window(13, causal=True), 37),  # wider than a block, and prime
    Place(Window(11, look_forward=2, exact_windowsize=True), 37),
    Place(Window.sliding(6), 29),
    Place(Window.between(7, 3), 31),
    Place(Window.chunks(5), 23),
    Place(Window(300, causal=True, exact_windowsize=True), 700, 256),
    Place(Window(512, causal=True), 1100, 256),
    Place(Window(257), 601, 256),
)
"""Every window that tests run over, edge cases included."""

MAIN_PLACE = Place(Window(3, causal=True, exact_windowsize=True), 3 * SMALL_BLOCK)
"""The window tested with every feature one by one; the exhaustive sweep tests all windows with all features."""

FULL_PLACES = (
    Place(Window(5, look_backward=3, look_forward=2), 31),
    Place(Window(12, causal=True), 41),
    Place(Window(4, look_forward=2, exact_windowsize=True), 23),
)
"""Further windows, tested with all features at once."""

CHOICES = (
    ("mask",),
    ("segment_ids", "offset", "traced_offset", "overhang"),
    ("bias", "batch_bias"),
    ("shared_qk",),
    ("rotary", "xpos", "reference_rotary", "interleaved", "part_rotary"),
    ("scale",),
    ("grouped",),
    ("soft_cap",),
    ("sinks",),
    ("wide_values",),
    ("global_keys",),
)
"""Features of a call; a call has at most one of each row."""

SINGLE_FEATURES = tuple((feature,) for row in CHOICES for feature in row)

EVERYTHING = ("mask", "traced_offset", "batch_bias", "shared_qk", "xpos", "scale", "grouped", "soft_cap", "sinks")
EVERYTHING_PACKED = (
    *("mask", "segment_ids", "bias", "rotary", "scale", "grouped", "soft_cap", "sinks"),
    *("wide_values", "global_keys"),
)

FEATURES = ((), *SINGLE_FEATURES, EVERYTHING, EVERYTHING_PACKED)
"""Every set of features with which windows are tested."""


def features_id(features):
    """Name a set of features in a test's id."""
    names = {(): "plain", EVERYTHING: "everything", EVERYTHING_PACKED: "everything_packed"}
    return names.get(features, "+".join(features))


def drawn_features(name, more=0):
    """Draw one feature or none from each row of `CHOICES`, seeded by a name."""
    draw = random.Random(zlib.crc32(name.encode()) + more)
    return tuple(draw.choice(row) for row in CHOICES if draw.random() < 0.5)


def normal(seed, *shape):
    """Draw unit normals, the same on every machine."""
    return jnp.asarray(numpy_normal(seed, *shape))


def numpy_normal(seed, *shape):
    """Draw unit normals as a NumPy array, which multiplies without compiling a program for each shape."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def draw_call(features, window, n, seed=0, d=4):
    """Draw a call of attention with these features.

    Returns:
        The arrays with gradients, the traced arrays without, and the other options.
    """
    has = set(features).__contains__
    b, h = 2, 3
    q_heads = 2 * h if has("grouped") else h
    chunk = has("offset") or has("traced_offset")
    n_queries = (n + 1) // 2 if chunk else n
    arrays = {
        "q": normal(seed, b, q_heads, n_queries, d),
        "k": normal(seed + 1, b, h, n, d),
        "v": normal(seed + 2, b, h, n, 2 * d - 1 if has("wide_values") else d),
    }
    if has("global_keys"):
        arrays["global_keys"] = normal(seed + 7, h, 3, d), normal(seed + 8, h, 3, arrays["v"].shape[-1])
    if has("bias") or has("batch_bias"):
        lead = (b,) if has("batch_bias") else ()
        arrays["attn_bias"] = normal(seed + 3, *lead, q_heads, window.window_size, window.slab)
    if has("sinks"):
        arrays["sinks"] = normal(seed + 4, q_heads)
    traced = {}
    if has("mask"):
        traced["mask"] = normal(seed + 5, b, n) > -0.5
    if has("segment_ids"):
        traced["segment_ids"] = jnp.cumsum(normal(seed + 6, b, n) > 1.2, axis=1)
    if has("traced_offset"):
        traced["q_offset"] = jnp.int32(n // 3)
    options = {
        "shared_qk": has("shared_qk"),
        "scale": 0.7 if has("scale") else None,
        "logits_soft_cap": 1.5 if has("soft_cap") else None,
        "rotary": _draw_rotary(has, window, d),
    }
    if has("offset"):
        options["q_offset"] = n // 3
    if has("overhang"):
        options["q_offset"] = window.window_size // 2 + 2
    return arrays, traced, options


def _draw_rotary(has, window, d):
    if has("xpos"):
        # Scores grow exponentially with xPos towards later keys: let them grow slowly.
        default_base = window.causal and window.span > 1
        return Rotary(d, use_xpos=True, scale_base=None if default_base else float(window.slab))
    if has("interleaved"):
        return Rotary(d, theta=100.0, interleaved=True)
    if has("part_rotary"):
        return Rotary(d // 2, frequencies=tuple(0.3 / (1 + m) for m in range(d // 4)), factor=1.2)
    if has("rotary") or has("reference_rotary"):
        return Rotary(d, theta=100.0, reference=has("reference_rotary"))
    return None


def local(q, k, v, window, **options):
    """Call `local_attention` with a `Window`, at any length."""
    return local_attention(q, k, v, window=window, autopad=True, **options)


IN_BLOCKS = {"implementation": Windowed(SMALL_BLOCK)}
"""Option of functions and modules that makes blocks small."""

in_blocks = functools.partial(local, **IN_BLOCKS)
"""`local` in small blocks."""


@functools.partial(jax.jit, static_argnums=1)
def _definition(arrays, options):
    return local(**arrays, **dict(options), implementation="dense")


def definition(q, k, v, window, **options):
    """Call `local` by the dense implementation, over all keys at once, in one compiled program."""
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array | np.ndarray | tuple)}
    rest = {name: x for name, x in options.items() if name not in arrays}
    return _definition({"q": q, "k": k, "v": v, **arrays}, (("window", window), *sorted(rest.items())))


def draw_cotangent(arrays):
    """Draw a cotangent of the result of a drawn call."""
    return normal(9, *arrays["q"].shape[:-1], arrays["v"].shape[-1])


def value_and_pullback(fn, arrays, cotangent):
    """Return `fn(**arrays)` and the gradient of its product with a cotangent, from one compiled program."""

    @jax.jit
    def both(arrays, cotangent):
        out, pull = jax.vjp(lambda arrays: fn(**arrays), arrays)
        return out, pull(cotangent.astype(out.dtype))[0]

    return both(arrays, cotangent)


def by_loops(q, k, v, window, *, mask=None, bias=None, scale=None, soft_cap=None, sink=None, q_offset=0):
    """Compute attention of one head in NumPy float64, one query and key at a time; `bias(i, j)` is a function."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for row in range(len(q)):
        i = row + q_offset
        seen = [j for j in range(len(k)) if window.start(i) <= j < window.stop(i) and (mask is None or mask[j])]
        logits = np.array([q[row] @ k[j] * scale for j in seen])
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        if bias is not None:
            logits = logits + np.array([bias(i, j) for j in seen])
        weights = np.exp(logits)
        total = weights.sum() + (0.0 if sink is None else np.exp(float(sink)))
        if total:
            out[row] = weights @ v[seen] / total
    return out


def assert_close(actual, expected, dtype="float32", err_msg=""):
    """Compare trees within the table of tolerances: largest difference relative to largest value."""
    tolerance = TOLERANCE[str(jnp.dtype(dtype))]

    def compare(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (path, a.shape, b.shape)
        assert np.isfinite(a).all(), path
        limit = tolerance * max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=f"{err_msg} {jax.tree_util.keystr(path)}")

    jax.tree_util.tree_map_with_path(compare, actual, expected)
