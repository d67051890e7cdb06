"""Decoding by interpreted kernels equals plain code token by token, for all options and positions in the ring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention import (
    AttentionOptions,
    KVCache,
    LocalTransformer,
    Rotary,
    Triton,
    Window,
    cached_attention,
    decoding,
)
from flax_local_attention.kernels import ring
from flax_local_attention.operands import Operands
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")

EXACT, PLAIN = Window(8, causal=True, exact_windowsize=True), Window(4, causal=True)
KERNELS = Triton(interpret=True)
B, H, D = 2, 3, 16

CASES = {
    "exact": {},
    "plain windows": {"window": PLAIN},
    "one head for two, sinks": {"g": 2, "sinks": True},
    "documents and tokens that do not exist": {"segment_ids": True, "mask": True},
    "explicit positions": {"positions": True, "mask": True},
    "soft cap and scale": {"options": {"logits_soft_cap": 5.0, "scale": 0.3}},
    "no rotary": {"rotary": None},
    "xpos": {"rotary": Rotary(D, use_xpos=True)},
    "rotary of pairs, of part of a head": {"rotary": Rotary(D // 2, interleaved=True, factor=1.2)},
    "rewind": {"rewind": 5, "segment_ids": True},
    "bfloat16": {"dtype": jnp.bfloat16},
    "bfloat16 beside a float32 ring": {"dtype": jnp.bfloat16, "cache_dtype": jnp.float32},
    "a wide head": {"d": 64},
}


def draw(n, g=1, d=D, dtype=jnp.float32, **given):
    """Draw n tokens for each row, one at a time, as arrays ``[n, ...]``, with the optional arrays requested."""
    random = np.random.default_rng(0)
    shapes = {"q": (n, B, H * g, 1, d), "k": (n, B, H, 1, d), "v": (n, B, H, 1, d)}
    arrays = {name: cases.normal(seed, *shape).astype(dtype) for seed, (name, shape) in enumerate(shapes.items())}
    optional = {
        "segment_ids": np.sort(random.integers(0, 3, (n, B, 1)), axis=0),
        "mask": random.random((n, B, 1)) < 0.7,
        "positions": random.integers(0, 1000, (n, B, 1)),
        "sinks": np.broadcast_to(random.normal(size=H * g).astype(np.float32), (n, H * g)),
    }
    return arrays | {name: jnp.asarray(x) for name, x in optional.items() if given.get(name)}


def empty_cache(window=EXACT, rotary=Rotary(D), options=None, d=D, dtype=jnp.float32, cache_dtype=None, rewind=0):  # noqa: B008
    rotary = Rotary(d) if rotary == Rotary(D) else rotary
    options = AttentionOptions(window, rotary=rotary, **(options or {}))
    return KVCache.create(options, B, H, d, dtype=cache_dtype or dtype, rewind=rewind)


def decode(cache, tokens, implementation):
    """Decode token by token; return the outputs, ``[n, ...]``, and the cache."""

    def step(cache, token):
        out, cache = cached_attention(cache=cache, **token, implementation=implementation)
        return cache, out

    cache, outs = jax.jit(lambda cache, tokens: jax.lax.scan(step, cache, tokens))(cache, tokens)
    return outs, cache


def split(case):
    """Split a case into arguments of `empty_cache` and of `draw`."""
    of_cache = {name: x for name, x in case.items() if name in ("window", "rotary", "options", "cache_dtype", "rewind")}
    of_draw = {name: x for name, x in case.items() if name not in of_cache}
    both = {name: case[name] for name in ("d", "dtype") if name in case}
    return of_cache | both, of_draw


def assert_kernels_decode(n, case, tolerance="float32"):
    """Decode n tokens both ways; compare the outputs of existing tokens and the whole caches."""
    of_cache, of_draw = split(case)
    cache, tokens = empty_cache(**of_cache), draw(n, **of_draw)
    (ours, our_cache), (plain, plain_cache) = (decode(cache, tokens, x) for x in (KERNELS, "xla"))
    if "mask" in tokens:
        exists = tokens["mask"][:, :, None, :, None]
        ours, plain = jnp.where(exists, ours, 0), jnp.where(exists, plain, 0)
    widen = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    cases.assert_close(widen(ours), widen(plain), tolerance)
    cases.assert_close(widen(our_cache), widen(plain_cache), tolerance)


@pytest.mark.slow_but("exact", "rewind")
@pytest.mark.parametrize("name", CASES)
def test_kernels_decode_as_plain_code(name):
    case = CASES[name]
    assert_kernels_decode(30, case, "bfloat16" if case.get("dtype") == jnp.bfloat16 else "float32")


def decode_chunks(cache, tokens, sizes, implementation):
    """Decode chunks of these sizes; return the joined outputs and the cache."""

    @jax.jit
    def run(cache, tokens):
        outs, first = [], 0
        for size in sizes:
            part = {name: chunk_of(name, x, first, size) for name, x in tokens.items()}
            out, cache = cached_attention(cache=cache, **part, implementation=implementation)
            outs.append(out)
            first += size
        return jnp.concatenate(outs, -2), cache

    return run(cache, tokens)


def chunk_of(name, x, first, size):
    """Join the arrays of single tokens into one of a chunk."""
    if name == "sinks":
        return x[0]
    axis = -2 if name in "qkv" else -1
    return jnp.concatenate(list(x[first : first + size]), axis)


CHUNKS = {name: case for name, case in CASES.items() if name not in ("plain windows", "a wide head")} | {
    "documents": {"segment_ids": True},
    "explicit positions of all": {"positions": True},
    "tokens at the left": {"mask": True, "segment_ids": True, "is_left": True},
    "tokens at the left, explicit positions": {"mask": True, "positions": True, "is_left": True},
    "queries and keys are one": {"options": {"shared_qk": True}},
}


@pytest.fixture
def taken_at_once(monkeypatch):
    """The numbers of tokens attended to at once when programs run, chunk by chunk, in blocks of 4."""
    monkeypatch.setattr(decoding, "LEAST_FOR_KERNELS", 5)
    monkeypatch.setattr(decoding, "BLOCK", 4)
    sizes, attend = [], decoding._attend_at_once

    def note_and_attend(cache, new, exists, *rest):
        jax.debug.callback(lambda x: sizes.append(x.shape[1]), exists)
        return attend(cache, new, exists, *rest)

    monkeypatch.setattr(decoding, "_attend_at_once", note_and_attend)
    jax.clear_caches()
    yield sizes
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("name", CHUNKS)
def test_kernels_take_chunks_at_once_as_plain_code_takes_them(name, taken_at_once):
    case = dict(CHUNKS[name])
    is_left = case.pop("is_left", False)
    of_cache, of_draw = split(case)
    sizes = [13, 1, 5, 3, 11]
    cache, tokens = empty_cache(**of_cache), draw(sum(sizes), **of_draw)
    if is_left:
        exists = [np.arange(size)[:, None] < [size, size - 2 * (size > 3)] for size in sizes]
        tokens["mask"] = jnp.asarray(np.concatenate(exists))[..., None]
    (ours, our_cache), (plain, plain_cache) = (decode_chunks(cache, tokens, sizes, x) for x in (KERNELS, "xla"))
    jax.effects_barrier()
    has_gaps = "mask" in tokens and not is_left
    assert sorted(taken_at_once) == ([] if has_gaps else [5, 11, 13])
    exists = tokens["mask"][:, :, 0].T[:, None, :, None] if "mask" in tokens else True
    tolerance = "bfloat16" if case.get("dtype") == jnp.bfloat16 else "float32"
    widen = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    cases.assert_close(jnp.where(exists, widen(ours), 0), jnp.where(exists, widen(plain), 0), tolerance)
    cases.assert_close(widen(our_cache), widen(plain_cache), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [1, 11, 40])
def test_chunks_under_windows_shorter_and_longer_than_they(keys, taken_at_once):
    window, sizes = Window.sliding(keys), [13, 5, 11]
    cache, tokens = empty_cache(window), draw(sum(sizes))
    ours, plain = (decode_chunks(cache, tokens, sizes, x) for x in (KERNELS, "xla"))
    jax.effects_barrier()
    assert sorted(taken_at_once) == ([] if window.capacity == 1 else [5, 11, 13])
    cases.assert_close(ours, plain)


@pytest.mark.slow
def test_a_chunk_after_a_rewind_sees_what_it_would_have_seen(taken_at_once):
    tokens = draw(30)
    chunk = lambda first, size: {name: chunk_of(name, x, first, size) for name, x in tokens.items()}  # noqa: E731
    _, whole = cached_attention(**chunk(0, 12), cache=empty_cache(rewind=7), implementation=KERNELS)
    _, drafted = cached_attention(**chunk(20, 6), cache=whole, implementation=KERNELS)
    out, _ = cached_attention(**chunk(12, 9), cache=drafted.rewind(6), implementation=KERNELS)
    expected, _ = cached_attention(**chunk(12, 9), cache=whole, implementation="xla")
    jax.effects_barrier()
    assert taken_at_once == [12, 6, 9]
    cases.assert_close(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 64])
def test_named_kernels_leave_what_they_cannot_serve_to_plain_code(n):
    q = cases.normal(0, B, H, n, D)
    named, plain = (cached_attention(q, q, q, empty_cache(), implementation=x) for x in ("triton", "xla"))
    cases.assert_close(named, plain)


@pytest.mark.parametrize(("implementation", "is_by_platform"), [("triton", True), (None, True), (KERNELS, False)])
def test_a_chunk_is_taken_at_once_where_there_are_kernels(implementation, is_by_platform):
    """Which depends on the platform that a program is lowered for; interpreted kernels exist on all."""
    q, cache = cases.normal(0, B, H, 64, D), empty_cache()
    program = jax.make_jaxpr(lambda q: cached_attention(q, q, q, cache, implementation=implementation))(q)
    assert ("platform_index" in str(program)) == is_by_platform


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 64])
def test_kernels_compute_float32_in_float32_under_x64(n):
    with jax.enable_x64(True):
        q = cases.normal(0, B, H, n, D)
        ours, plain = (cached_attention(q, q, q, empty_cache(), implementation=x) for x in (KERNELS, "xla"))
        assert ours[0].dtype == jnp.float32
        cases.assert_close(ours, plain)


@pytest.mark.parametrize(("given", "error"), [("tritn", ValueError), (["xla"], TypeError), (Triton, TypeError)])
def test_an_implementation_that_is_none_is_refused(given, error):
    q = jnp.ones((B, H, 1, D))
    with pytest.raises(error, match="`implementation` must be"):
        cached_attention(q, q, q, empty_cache(), implementation=given)


@pytest.mark.slow
def test_eager_chunks_are_traced_once(monkeypatch):
    q, exists = cases.normal(0, B, H, 64, D), jnp.ones((B, 64), bool)
    for _ in range(2):  # the first trace imports parts of JAX, so the second traces again
        cached_attention(q, q, q, empty_cache(), mask=exists, implementation=KERNELS)
    monkeypatch.setattr(decoding, "_attend_at_once", None)  # a trace would call it
    cached_attention(q, q, q, empty_cache(), mask=exists, implementation=KERNELS)


@pytest.mark.parametrize(("window", "n", "is_at_once"), [(EXACT, 64, True), (EXACT, 63, False), (PLAIN, 64, False)])
def test_which_chunks_kernels_take_at_once(window, n, is_at_once):
    q = jnp.ones((B, H, n, D))
    cache = empty_cache(window)
    assert decoding._can_attend_at_once(cache, Operands.create(q, q, q, cache.options)) == is_at_once


@pytest.mark.slow
def test_gradients_through_a_chunk_are_those_of_plain_code():
    cache, tokens = empty_cache(), draw(70)
    weights = cases.normal(9, B, H, 70, D)

    def gradient(implementation):
        loss = lambda tokens: (weights * decode_chunks(cache, tokens, [70], implementation)[0]).sum()  # noqa: E731
        return jax.grad(loss)(tokens)

    cases.assert_close(gradient(KERNELS), gradient("xla"))


@pytest.mark.slow_but("3")
@pytest.mark.parametrize("spans", [1, 3])
def test_spans_of_a_ring_are_merged(spans, monkeypatch):
    monkeypatch.setattr(ring, "SHORTEST", 16)
    monkeypatch.setattr(ring, "COLS", 4)
    monkeypatch.setattr(ring, "PROGRAMS", 1 if spans == 1 else 64)
    window = Window(20, causal=True)
    assert -(-window.capacity // ring.choose_span(B * H, window.capacity)) == spans
    assert_kernels_decode(90, {"window": window, "sinks": True, "mask": True, "rotary": None})


@pytest.mark.parametrize(
    ("heads", "size", "span"), [(8, 257, 64), (128, 257, 64), (128, 2049, 512), (1024, 257, 512), (8, 10**6, 512)]
)
def test_spans_are_short_where_few_programs_would_run(heads, size, span):
    assert ring.choose_span(heads, size) == span


@pytest.mark.slow
def test_gradients_through_decoding_are_those_of_plain_code():
    cache, tokens = empty_cache(), draw(5)
    weights = cases.normal(9, *tokens["q"].shape)

    def gradient(implementation):
        return jax.grad(lambda tokens: (weights * decode(cache, tokens, implementation)[0]).sum())(tokens)

    cases.assert_close(gradient(KERNELS), gradient("xla"))


@pytest.mark.slow
def test_nan_in_a_slot_that_is_not_seen_reaches_no_one():
    window = Window(4, causal=True, exact_windowsize=True)
    tokens = draw(12)
    tokens["v"] = tokens["v"].at[0].set(jnp.nan)
    out, _ = decode(empty_cache(window, rewind=3), tokens, KERNELS)
    assert not np.isfinite(out[:5]).any()
    assert np.isfinite(out[5:]).all()


@pytest.mark.slow
def test_mapped_calls_are_plain_code(monkeypatch):
    cache, tokens = empty_cache(), jax.tree.map(lambda x: x[0], draw(1))
    out, grown = cached_attention(cache=cache, **tokens, implementation=KERNELS)
    monkeypatch.setattr(decoding.TokenKernels, "forward", None)  # would be called
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)  # noqa: E731
    mapped = jax.vmap(lambda cache, tokens: cached_attention(cache=cache, **tokens, implementation=KERNELS))
    outs, caches = mapped(stack(cache), stack(tokens))
    cases.assert_close(outs[1], out)
    cases.assert_close(jax.tree.map(lambda x: x[1], caches), grown)


@pytest.mark.slow
def test_a_batch_over_devices_stays_spread():
    cache, tokens = empty_cache(), draw(20, segment_ids=True)
    expected, _ = decode(cache, tokens, "xla")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        cache = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), cache)
        tokens = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "data"))), tokens)
        outs, grown = decode(cache, tokens, KERNELS)
    cases.assert_close(outs, expected)
    assert grown.k.sharding.spec[0] == "data"


@pytest.mark.parametrize(
    ("d", "dtype", "options", "reason"),
    [
        (24, "float32", {}, "a power of two wide"),
        (8, "float32", {}, "a power of two wide"),
        (16, "float64", {}, "up to float32"),
        (16, "float32", {"shared_qk": True}, "not normalised"),
    ],
)
def test_what_kernels_do_not_serve(d, dtype, options, reason):
    with jax.enable_x64(dtype == "float64"):
        cache = empty_cache(d=d, dtype=dtype, rotary=None, options=options)
        tokens = draw(20, d=d, dtype=dtype)
        new = Operands.create(*(tokens[name][0] for name in "qkv"), cache.options)
        (found,) = ring.ring_problems(new, cache.k, cache.v, cache.options)
        assert reason in found
        cases.assert_close(decode(cache, tokens, KERNELS)[0], decode(cache, tokens, "xla")[0])


@pytest.mark.slow
def test_a_model_decodes_by_kernels_as_it_reads():
    fields = {"num_tokens": 16, "max_seq_len": 48, "dim": 32, "depth": 2, "local_attn_window_size": 8, "heads": 2}
    model = LocalTransformer(**fields, dim_head=16, implementation=KERNELS)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 30)))
    variables = model.init(jax.random.key(0), tokens)

    def step(cache, token):
        logits, cache = model.apply(variables, token[:, None], cache=cache)
        return cache, logits[:, 0]

    _, logits = jax.jit(lambda cache, tokens: jax.lax.scan(step, cache, tokens))(model.init_cache(2), tokens.T)
    cases.assert_close(jnp.swapaxes(logits, 0, 1), model.clone(implementation="xla").apply(variables, tokens))
