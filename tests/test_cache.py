"""The cache and attention over it: a sequence fed in any chunks gives the same results as in one call."""

import dataclasses
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export, lax

from flax_local_attention import (
    AttentionOptions,
    KVCache,
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    Rotary,
    Window,
    attend_cache,
    cached_attention,
    decoding,
    local_attention,
)
from tests.cases import CHOICES, PLACES, assert_close, draw_call, local, normal
from tests.original import filled_variables

pytestmark = pytest.mark.usefixtures("quick_compile")

NOT_OF_DECODING = {"mask", "offset", "traced_offset", "overhang"}
OPTIONS = tuple(option for row in CHOICES for option in row if option not in NOT_OF_DECODING)
"""Features of a call that decoding supports; masks are tested with rows of unequal length."""

ALL_ON = ("batch_bias", "shared_qk", "xpos", "scale", "grouped", "soft_cap", "sinks")
ALL_ON_PACKED = (
    *("segment_ids", "bias", "rotary", "scale", "grouped", "soft_cap", "sinks"),
    *("wide_values", "global_keys"),
)

WINDOWS = tuple(
    dict.fromkeys(
        [place.window for place in PLACES if place.window.causal]
        + [Window(5, causal=True, look_backward=2), Window(5, causal=True, exact_windowsize=True, look_backward=0)]
    )
)
SMALL = tuple(window for window in WINDOWS if window.window_size <= 13)
PLAIN, EXACT = Window(3, causal=True), Window(3, causal=True, exact_windowsize=True)

# Compilation dominates the time of these tests: many small programs, each run once.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def window_id(window):
    kind = "exact" if window.exact_windowsize else "plain"
    return f"w{window.window_size}-back{window.look_backward}-{kind}"


def features_id(features):
    return {ALL_ON: "all_on", ALL_ON_PACKED: "all_on_packed"}.get(features, "+".join(features) or "none")


def over_three_laps(window):
    """Return a length that goes round the ring a little more than three times."""
    return 3 * window.capacity + 2


def new_cache(window, arrays, options=None, **sizes):
    """Return an empty cache for a drawn call, with its options but the implementation."""
    b, kv_heads, _, d = arrays["k"].shape
    options = AttentionOptions(window, **(options or {}))
    return KVCache.create(options, b, kv_heads, d, dim_value=arrays["v"].shape[-1], dtype=arrays["k"].dtype, **sizes)


def sliced(arrays, traced, first, size):
    """Slice the arrays of a call along its tokens; a bias and sinks stay whole."""
    part = {name: lax.dynamic_slice_in_dim(x, first, size, -2) for name, x in arrays.items() if name in "qkv"}
    rest = {name: x for name, x in arrays.items() if name not in "qkv"}
    segments = {name: lax.dynamic_slice_in_dim(x, first, size, -1) for name, x in traced.items()}
    return part | rest | segments


def steps(cache, arrays, traced, first, count, size=1):
    """Feed `count` chunks of `size` tokens one after the other; return the joined outputs."""

    def step(cache, at):
        out, cache = cached_attention(cache=cache, **sliced(arrays, traced, at, size))
        return cache, out

    cache, outs = lax.scan(step, cache, first + size * jnp.arange(count))
    outs = jnp.moveaxis(outs, 0, -3)
    return outs.reshape(*outs.shape[:-3], count * size, outs.shape[-1]), cache


def chunks(cache, arrays, traced, sizes):
    """Feed chunks of these sizes; return the joined outputs and the cache."""
    outs, first = [], 0
    for size in sizes:
        out, cache = cached_attention(cache=cache, **sliced(arrays, traced, first, size))
        outs.append(out)
        first += size
    return jnp.concatenate(outs, axis=-2), cache


def assert_decode_equals_forward(feed, features, window, n, dtype="float32", d=4):
    """Compare ``feed(cache, arrays, traced)`` with the forward on the same arrays."""
    arrays, traced, options = draw_call(features, window, n, d=d)
    arrays = jax.tree.map(lambda x: x.astype(dtype), arrays)

    @compiled
    def both(arrays, traced):
        out, cache = feed(new_cache(window, arrays, options), arrays, traced)
        return out, cache.length, local(**arrays, **traced, window=window, **options)

    out, length, expected = both(arrays, traced)
    assert out.dtype == dtype
    assert_close(out, expected, dtype)
    np.testing.assert_array_equal(length, n)


def assert_steps_equal_forward(features, window, dtype="float32", d=4):
    n = over_three_laps(window)

    def feed(cache, arrays, traced):
        return steps(cache, arrays, traced, 0, n)

    assert_decode_equals_forward(feed, features, window, n, dtype, d)


# Functions


@pytest.mark.slow_but("w3-back1-exact")
@pytest.mark.parametrize("window", [*SMALL, Window(300, causal=True, exact_windowsize=True)], ids=window_id)
def test_decode_with_all_options_equals_forward_at_every_position(window):
    assert_steps_equal_forward(ALL_ON if WINDOWS.index(window) % 2 else ALL_ON_PACKED, window)


@pytest.mark.slow_but("rotary", "bias", "segment_ids")
@pytest.mark.parametrize("option", OPTIONS)
def test_decode_equals_forward_at_every_position(option):
    assert_steps_equal_forward((option,), PLAIN if OPTIONS.index(option) % 2 else EXACT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("features", [ALL_ON, ALL_ON_PACKED, *[(option,) for option in OPTIONS]], ids=features_id)
@pytest.mark.parametrize("window", WINDOWS, ids=window_id)
def test_decode_with_every_option_equals_forward_for_every_window(window, features):
    assert_steps_equal_forward(features, window)


@pytest.mark.slow
@pytest.mark.parametrize("window", [EXACT, Window(12, causal=True)], ids=window_id)
def test_decode_in_bfloat16_equals_forward_within_its_tolerance(window):
    assert_steps_equal_forward(("xpos", "grouped", "sinks"), window, "bfloat16", d=16)


def assert_chunkings_equal_forward(features, window, n, chunkings):
    """Compare several divisions of n tokens into chunks with the forward; every size is compiled once."""
    arrays, traced, options = draw_call(features, window, n)
    expected = compiled(lambda: local(**arrays, **traced, window=window, **options))()

    @partial(compiled, static_argnums=2)
    def chunk(cache, first, size):
        return cached_attention(cache=cache, **sliced(arrays, traced, first, size))

    for sizes in chunkings:
        outs, cache, first = [], new_cache(window, arrays, options), 0
        for size in sizes:
            out, cache = chunk(cache, first, size)
            outs.append(out)
            first += size
        assert first == n
        assert_close(jnp.concatenate(outs, axis=-2), expected, err_msg=str(sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "window", [Window(2, causal=True), Window(2, causal=True, exact_windowsize=True)], ids=window_id
)
def test_prefill_at_every_split_point_then_steps_equal_forward(window):
    n = over_three_laps(window)
    assert_chunkings_equal_forward(ALL_ON, window, n, [[split] + [1] * (n - split) for split in range(1, n + 1)])


def drawn_sizes(window, n, seed):
    """Draw chunk sizes that add up to n from 1, 2, 5 and w + 1, each at least once."""
    draw = random.Random(seed)
    sizes = draw.sample(wanted := [1, 2, 5, window.window_size + 1], 4)
    while sum(sizes) < n:
        sizes.append(draw.choice([size for size in wanted if sum(sizes) + size <= n]))
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("window", SMALL[::2], ids=window_id)
def test_drawn_chunks_equal_forward(window):
    n, seed = over_three_laps(window) + 12, WINDOWS.index(window)
    chunkings = [drawn_sizes(window, n, seed + more) for more in range(0, 100, 20)]
    assert_chunkings_equal_forward(ALL_ON_PACKED if seed % 4 else ALL_ON, window, n, chunkings)


@pytest.mark.exhaustive
@pytest.mark.parametrize("features", [(), ALL_ON, ALL_ON_PACKED], ids=features_id)
@pytest.mark.parametrize("window", SMALL, ids=window_id)
def test_chunks_of_every_size_equal_forward(window, features):
    n = over_three_laps(window)
    every = [[size] * (n // size) + [n % size] * bool(n % size) for size in range(1, n + 1)]
    split = [[split] + [1] * (n - split) for split in range(1, n + 1)]
    assert_chunkings_equal_forward(features, window, n, every + split)


@pytest.mark.slow
@pytest.mark.parametrize("window", [PLAIN, Window(1, causal=True, look_backward=0)], ids=window_id)
def test_chunk_longer_than_the_ring_equals_forward(window):
    sizes = [2, 3 * window.capacity + 1, 1, 2 * window.capacity]
    features = ("rotary", "bias", "segment_ids", "grouped")
    assert_chunkings_equal_forward(features, window, sum(sizes), [sizes])


@pytest.mark.slow
@pytest.mark.parametrize("window", [PLAIN, Window(7, causal=True, exact_windowsize=True)], ids=window_id)
def test_chunk_longer_than_a_block_equals_forward(monkeypatch, window):
    monkeypatch.setattr(decoding, "BLOCK", 4)
    assert_chunkings_equal_forward(ALL_ON_PACKED, window, 19, [[1, 17, 1], [19]])


@pytest.mark.slow_but("exact")
@pytest.mark.parametrize(
    ("window", "features", "block"),
    [(PLAIN, ALL_ON_PACKED, 256), (EXACT, ALL_ON, 256), (PLAIN, ALL_ON, 3)],
    ids=["plain-packed", "exact", "plain-in_blocks"],
)
def test_rows_of_unequal_length_equal_each_row_alone(monkeypatch, window, features, block):
    monkeypatch.setattr(decoding, "BLOCK", block)
    n, size = over_three_laps(window) + 8, 5
    arrays, traced, options = draw_call(features, window, n)
    counts = np.random.RandomState(0).randint(0, size + 1, (40, 2))
    counts[:3] = [[0, 4], [5, 0], [1, 5]]

    @compiled
    def feed(arrays, traced, counts):
        def step(carry, count):
            cache, first = carry
            rows = [
                sliced(
                    {name: x[row : row + 1] if name in "qkv" else x for name, x in arrays.items()},
                    {name: x[row : row + 1] for name, x in traced.items()},
                    first[row],
                    size,
                )
                for row in range(2)
            ]
            call = {
                name: rows[0][name]
                if name in ("attn_bias", "sinks", "global_keys")
                else jnp.concatenate([row[name] for row in rows])
                for name in rows[0]
            }
            # The contents of absent tokens must not matter.
            exists = jnp.arange(size) < count[:, None]
            call |= {name: jnp.where(exists[:, None, :, None], call[name], 1e4) for name in "qkv"}
            out, cache = cached_attention(cache=cache, **call, mask=exists)
            return (cache, first + count), out

        (cache, _), outs = lax.scan(step, (new_cache(window, arrays, options), jnp.zeros(2, jnp.int32)), counts)
        return outs, cache.length, local(**arrays, **traced, window=window, **options)

    counts = counts[(counts.cumsum(0) <= n - size).all(1)]
    outs, length, expected = feed(arrays, traced, counts)
    np.testing.assert_array_equal(length, counts.sum(0))
    assert length[0] != length[1]
    assert length.min() > 2 * window.capacity
    for row in range(2):
        got = np.concatenate([out[row, :, : count[row]] for out, count in zip(outs, counts, strict=True)], axis=1)
        assert_close(got, expected[row, :, : length[row]])


def scattered(arrays, traced, places, m, poison=np.nan):
    """Scatter tokens over rows of m places, and fill the gaps with a poison."""
    rows = np.arange(len(places))[:, None]

    def spread(name, x):
        if name in ("q", "k", "v"):
            full = jnp.full((*x.shape[:2], m, x.shape[-1]), poison, x.dtype)
            return full.at[rows, :, places].set(jnp.moveaxis(x, 2, 1))
        return jnp.full((len(places), m), 7, x.dtype).at[rows, places].set(x) if name == "segment_ids" else x

    spread_arrays, spread_traced = ({name: spread(name, x) for name, x in tree.items()} for tree in (arrays, traced))
    return spread_arrays, spread_traced, jnp.zeros((len(places), m), bool).at[rows, places].set(True)


def drawn_places(n, m, left=False):
    """Draw the places of n tokens among m in two rows; or take the last ones of a row, as tokenizers pad."""
    draw = np.random.RandomState(n)
    rows = [np.sort(draw.choice(m, n, replace=False)) for _ in range(2)]
    return np.stack([np.arange(m - n, m) if left else rows[0], rows[1]])


@pytest.mark.slow
@pytest.mark.parametrize("left", [True, False], ids=["left", "holes"])
@pytest.mark.parametrize(
    ("window", "features", "block"),
    [(PLAIN, ALL_ON_PACKED, 256), (EXACT, ALL_ON, 3)],
    ids=["plain-packed", "exact-in_blocks"],
)
def test_rows_padded_anywhere_decode_as_they_do_without_padding(monkeypatch, window, features, block, left):
    monkeypatch.setattr(decoding, "BLOCK", block)
    n, sizes = 23, [6, 1, 17, 1, 10]
    m = sum(sizes)
    arrays, traced, options = draw_call(features, window, n)
    places = drawn_places(n, m, left)

    @compiled
    def both(arrays, traced):
        spread, spread_traced, exists = scattered(arrays, traced, places, m)
        out, cache = chunks(new_cache(window, arrays, options), spread, spread_traced | {"mask": exists}, sizes)
        return out, cache.length, local(**arrays, **traced, window=window, **options)

    out, length, expected = both(arrays, traced)
    np.testing.assert_array_equal(length, n)
    for row in range(2):
        assert_close(out[row][:, places[row]], expected[row])


@pytest.mark.slow
def test_one_mask_for_all_rows_may_have_holes_too():
    arrays, traced, options = draw_call(("rotary",), PLAIN, 9)
    places = np.array([0, 2, 3, 5, 8, 9, 10, 13, 14])
    spread, _, exists = scattered(arrays, traced, np.stack([places] * 2), 15)
    cache = new_cache(PLAIN, arrays, options)
    feed = compiled(lambda masks: [cached_attention(cache=cache, **spread, mask=mask)[0] for mask in masks])
    expected = local(**arrays, window=PLAIN, **options)
    for out in feed([exists, exists[:1], exists[0]]):
        assert_close(out[:, :, places], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "size"), [(PLAIN, 2), (EXACT, 1)])
def test_decode_after_a_million_positions_equals_decode_near_zero(window, size):
    """Bit for bit: neither angles nor slots depend on the number of tokens so far."""
    lap = window.capacity * window.window_size  # slots repeat after this many tokens
    before, after = over_three_laps(window), 4 * lap
    arrays, traced, options = draw_call(ALL_ON, window, before + after)
    far = 2**20 // lap * lap - lap  # 2^20 is passed on the way

    @compiled
    def run(arrays, traced, offset):
        _, cache = chunks(new_cache(window, arrays, options), arrays, traced, [before])
        cache = cache.replace(length=cache.length + offset)
        return steps(cache, arrays, traced, before, after // size, size)

    near, near_cache = run(arrays, traced, 0)
    out, cache = run(arrays, traced, far)
    assert near_cache.length[0] < 2**20 < cache.length[0]
    np.testing.assert_array_equal(out, near)
    np.testing.assert_array_equal(cache.k, near_cache.k)
    assert_close(near[..., :after, :], local(**arrays, **traced, window=window, **options)[..., before:, :])


@pytest.mark.parametrize("window", WINDOWS, ids=window_id)
def test_cache_holds_exactly_the_keys_that_a_next_query_can_see(window):
    b, w = window.look_backward, window.window_size
    cache = KVCache.create(window, batch=2, kv_heads=3, dim_head=4, dtype=jnp.bfloat16)
    assert cache.size == (b * w + 1 if window.exact_windowsize else (b + 1) * w)
    assert cache.size == max(window.stop(i) - window.start(i) for i in range(3 * w))
    assert cache.k.shape == cache.v.shape == (2, 3, cache.size, 4)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16


def test_positions_are_those_of_the_last_keys_and_negative_where_there_are_none():
    cache = KVCache.create(PLAIN, batch=3, kv_heads=1, dim_head=2).replace(length=jnp.array([0, 4, 20]))
    expected = [[-6, -5, -4, -3, -2, -1], [0, 1, 2, 3, -2, -1], [18, 19, 14, 15, 16, 17]]
    np.testing.assert_array_equal(cache.positions(), expected)


def test_cache_is_a_pytree_that_keeps_its_size():
    arrays, traced, _ = draw_call((), PLAIN, 7)
    cache = new_cache(PLAIN, arrays)
    _, grown = chunks(cache, arrays, traced, [5, 1, 1])
    assert jax.tree.structure(grown) == jax.tree.structure(cache)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grown) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


def test_an_empty_chunk_leaves_the_cache_alone():
    arrays, traced, _ = draw_call((), PLAIN, 7)
    _, cache = chunks(new_cache(PLAIN, arrays), arrays, traced, [5])
    out, same = chunks(cache, arrays, traced, [0])
    assert out.shape[-2] == 0
    jax.tree.map(np.testing.assert_array_equal, same, cache)


def test_a_donated_cache_is_written_in_place():
    arrays, traced, options = draw_call(("rotary",), PLAIN, 1)

    @partial(jax.jit, donate_argnums=0)
    def step(cache, arrays):
        return cached_attention(cache=cache, **arrays, **traced)

    cache = new_cache(PLAIN, arrays, options)
    at = [x.unsafe_buffer_pointer() for x in (cache.k, cache.v)]
    _, grown = step(cache, arrays)
    assert cache.k.is_deleted()
    assert cache.v.is_deleted()
    assert [x.unsafe_buffer_pointer() for x in (grown.k, grown.v)] == at


def test_a_new_cache_of_a_model_can_be_donated():
    model = LocalTransformer(**TRANSFORMER | {"depth": 1}, num_residual_streams=1)
    tokens, cache = jnp.zeros((1, 2), jnp.int32), model.init_cache(1, rewind=1)
    variables = filled_variables(model, tokens)
    step = jax.jit(lambda cache: model.apply(variables, tokens, cache=cache)[1].rewind(1), donate_argnums=0)
    grown = step(step(cache))
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))
    np.testing.assert_array_equal(grown.length, 2)


# Transformations of the cache


ROTARY = AttentionOptions(EXACT, rotary=Rotary(4), logits_soft_cap=5.0, precision="highest")


def filled_cache(options=ROTARY, batch=2, n=6, **fields):
    q, k, v = (normal(seed, batch, 2, n, 4) for seed in range(3))
    cache = KVCache.create(options, batch, 2, 4, **fields)
    return compiled(lambda cache: cached_attention(q, k, v, cache)[1])(cache)


def test_two_calls_cannot_differ_in_their_options():
    """Options are part of the cache: calls have no argument for them, and other options make another pytree."""
    cache = filled_cache()
    assert cache.options == ROTARY
    other = filled_cache(AttentionOptions(EXACT, rotary=Rotary(4, theta=100.0), logits_soft_cap=5.0))
    assert jax.tree.structure(cache) != jax.tree.structure(other)
    new = Q[:, :2], Q[:, :2], Q[:, :2]
    with pytest.raises(ValueError, match=r"`options` must equal the cache's, got `rotary` Rotary\(dim=4, theta=100\.0"):
        cached_attention(*new, cache, rotary=Rotary(4, theta=100.0))
    again = {"window": EXACT, "window_size": EXACT.size, "causal": True, "rotary": Rotary(4), "scale": None}
    np.testing.assert_array_equal(cached_attention(*new, cache, **again)[0], cached_attention(*new, cache)[0])


@pytest.mark.slow
def test_dropout_is_in_the_options_and_acts_with_a_key_only():
    options = AttentionOptions(EXACT, dropout_rate=0.5)
    q, k, v = (normal(seed, 1, 2, 9, 4) for seed in range(3))
    plain, cache = cached_attention(q, k, v, KVCache.create(EXACT, 1, 2, 4))
    same, _ = cached_attention(q, k, v, KVCache.create(options, 1, 2, 4))
    np.testing.assert_array_equal(same, plain)
    dropped, grown = cached_attention(q, k, v, KVCache.create(options, 1, 2, 4), dropout_rng=jax.random.key(0))
    assert np.abs(dropped - plain).max() > 1e-2
    np.testing.assert_array_equal(grown.k, cache.k)


@pytest.mark.slow_but("chunks")
@pytest.mark.parametrize("size", [1, 8, 24], ids=["tokens", "chunks", "blocks"])
def test_dropout_with_one_key_differs_between_the_chunks_and_the_blocks_of_a_chunk(size, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK", 8)
    w, n = 8, 24
    options = AttentionOptions(Window(w, causal=True, look_backward=0), dropout_rate=0.5)
    q, v = jnp.zeros((1, 1, n, w)), jnp.tile(jnp.eye(w), (1, 1, n // w, 1))  # the output shows which keys are kept
    arrays = {"q": q, "k": q, "v": v, "dropout_rng": jax.random.key(0)}
    cache = KVCache.create(options, batch=1, kv_heads=1, dim_head=w)
    out, _ = compiled(lambda cache: steps(cache, arrays, {}, 0, n // size, size))(cache)
    kept = np.asarray(out).reshape(n // w, w, w) != 0
    assert 0.3 < kept[:, *np.tril_indices(w)].mean() < 0.7
    assert len(np.unique(kept, axis=0)) == n // w


@pytest.mark.slow
def test_a_vmapped_cache_is_as_many_caches():
    caches = [filled_cache(batch=1), filled_cache(batch=1, n=3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    q = normal(7, 2, 1, 2, 3, 4)
    outs, grown = jax.vmap(lambda q, cache: cached_attention(q, q, q, cache))(q, stacked)
    assert grown.options == ROTARY
    for row, cache in enumerate(caches):
        out, alone = cached_attention(q[row], q[row], q[row], cache)
        np.testing.assert_allclose(outs[row], out, atol=1e-6)
        np.testing.assert_array_equal(grown.length[row], alone.length)


@pytest.mark.slow
def test_a_decode_step_is_exported_with_its_options():
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    cache, q = filled_cache(), normal(7, 2, 2, 1, 4)
    step = jax.jit(lambda q, cache: cached_attention(q, q, q, cache))
    program = export.deserialize(export.export(step, platforms=("cpu", "cuda", "tpu"))(q, cache).serialize())
    out, grown = program.call(q, cache)
    expected, expected_cache = step(q, cache)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert jax.tree.structure(grown) == jax.tree.structure(expected_cache)
    jax.tree.map(np.testing.assert_array_equal, grown, expected_cache)
    with pytest.raises(ValueError, match="pytree structure"):
        program.call(q, filled_cache(AttentionOptions(EXACT, rotary=Rotary(4, theta=100.0))))


@pytest.mark.slow
def test_a_step_of_a_model_is_exported_with_its_cache():
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    model = LocalTransformer(**TRANSFORMER)
    tokens = jnp.ones((1, 1), jnp.int32)
    variables, cache = filled_variables(model, tokens), model.init_cache(1)
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache=cache))
    program = export.deserialize(export.export(step)(tokens, cache).serialize())
    logits, grown = program.call(tokens, cache)
    np.testing.assert_allclose(logits, step(tokens, cache)[0], atol=1e-5)
    assert jax.tree.structure(grown) == jax.tree.structure(cache)


def test_orbax_keeps_a_cache(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    cache = filled_cache()
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", cache)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "cache", jax.eval_shape(lambda: cache))
    assert restored.options == ROTARY
    assert jax.tree.structure(restored) == jax.tree.structure(cache)
    jax.tree.map(np.testing.assert_array_equal, restored, cache)


# Where the original goes wrong (`tests/test_original_decoding.py` shows that it does)


def test_decode_rotates_each_key_once():
    """Later calls do not rotate cached keys again, and distances stay right round the ring."""
    q = k = jnp.ones((1, 1, 1, 4))
    options = AttentionOptions(EXACT, rotary=Rotary(4, theta=100.0))
    _, cache = cached_attention(q, k, k, KVCache.create(options, batch=1, kv_heads=1, dim_head=4))
    first = cache.k[:, :, 0]
    for _ in range(cache.size - 1):
        _, cache = cached_attention(q, k, k, cache)
        np.testing.assert_array_equal(cache.k[:, :, 0], first)
    _, cache = cached_attention(q, k, k, cache)
    np.testing.assert_array_equal(cache.k[:, :, 0], first)  # the key one lap later is in the same slot


def keys_seen(window, n):
    """Return which of n keys, fed one at a time, the last query sees."""
    cache = KVCache.create(window, batch=1, kv_heads=1, dim_head=n)
    keys, values = jnp.zeros((1, 1, 1, n)), jnp.eye(n)
    for position in range(n):
        out, cache = cached_attention(keys, keys, values[None, None, position, None], cache)
    return np.flatnonzero(out[0, 0, 0])


def test_last_query_of_a_plain_window_sees_the_whole_window_before():
    np.testing.assert_array_equal(keys_seen(PLAIN, 9), [3, 4, 5, 6, 7, 8])


@pytest.mark.slow
@pytest.mark.parametrize("window", [PLAIN, EXACT], ids=window_id)
def test_every_query_sees_the_keys_that_its_window_says(window):
    for n in (1, 3, 4, 6, 7, 9):
        expected = range(max(int(window.start(n - 1)), 0), n)
        np.testing.assert_array_equal(keys_seen(window, n), expected)


def test_decode_normalises_shared_keys_and_looks_at_itself_where_there_is_nothing_else():
    alone = Window(1, causal=True, look_backward=0)
    q, v = normal(0, 1, 1, 1, 4), normal(1, 1, 1, 1, 4)
    cache = KVCache.create(AttentionOptions(alone, shared_qk=True), batch=1, kv_heads=1, dim_head=4)
    out, _ = cached_attention(q, q, v, cache)
    np.testing.assert_allclose(out, v, rtol=1e-6)


def test_every_token_of_a_chunk_is_kept_and_answered():
    arrays = draw_call((), EXACT, 7)[0]
    out, cache = cached_attention(cache=new_cache(EXACT, arrays), **arrays)
    assert out.shape == arrays["q"].shape
    np.testing.assert_array_equal(cache.length, 7)
    slots = cache.positions()[0]
    np.testing.assert_array_equal(sorted(slots), [3, 4, 5, 6])
    np.testing.assert_array_equal(cache.v, arrays["v"][:, :, slots])


# Modules

MHA = {"dim": 12, "window_size": 3, "dim_head": 4, "heads": 2, "causal": True}
TRANSFORMER = {
    "num_tokens": 13,
    "max_seq_len": 64,
    "dim": 12,
    "depth": 2,
    "local_attn_window_size": 3,
    "dim_head": 4,
    "heads": 2,
}


class RunningMean(nn.Module):
    """A global layer that decodes: a projection of the mean of all tokens so far."""

    dim: int

    @nn.compact
    def __call__(self, x, mask=None, cache=None):
        exists = jnp.ones(x.shape[:2], bool) if mask is None else mask
        total, count = (0, 0) if cache is None else (cache["total"][:, None], cache["count"][:, None])
        totals = total + jnp.cumsum(jnp.where(exists[..., None], x, 0), axis=1)
        counts = count + jnp.cumsum(exists, axis=1)
        out = nn.Dense(self.dim, use_bias=False, name="mix")(totals / jnp.maximum(counts, 1)[..., None])
        return out if cache is None else (out, {"total": totals[:, -1], "count": counts[:, -1]})

    @nn.nowrap
    def init_cache(self, batch, dtype=None):
        return {"total": jnp.zeros((batch, self.dim), dtype or jnp.float32), "count": jnp.zeros((batch,), jnp.int32)}


def global_layer(index):
    del index
    return RunningMean(12)


def module_steps(module, variables, x, cache, first=0, size=1, **options):
    """Feed a module the chunks of x from `first` on; return the joined outputs and the cache."""

    def step(cache, at):
        part = lax.dynamic_slice_in_dim(x, at, size, 1)
        sliced = {name: lax.dynamic_slice_in_dim(option, at, size, 1) for name, option in options.items()}
        out, cache = module.apply(variables, part, cache=cache, **sliced)
        return cache, out

    count = (x.shape[1] - first) // size
    cache, outs = lax.scan(step, cache, first + size * jnp.arange(count))
    outs = jnp.moveaxis(outs, 0, 1)
    return outs.reshape(x.shape[0], count * size, -1), cache


def assert_module_decodes(module, x, dtype="float32", max_length=None, prefill=5, **options):
    """Compare a prefill followed by single steps with the forward."""
    variables = filled_variables(module, x[:, :1])

    @compiled
    def both(variables, x, options):
        cache = module.init_cache(x.shape[0], max_length=max_length)
        first, cache = module.apply(
            variables, x[:, :prefill], cache=cache, **{name: option[:, :prefill] for name, option in options.items()}
        )
        rest, _ = module_steps(module, variables, x, cache, prefill, **options)
        return jnp.concatenate([first, rest], axis=1), module.apply(variables, x, **options)

    out, expected = both(variables, x, options)
    assert_close(out, expected, dtype)


def each(options, daily):
    """Return test parameters for the names of options; less common ones are marked exhaustive."""
    return [name if name in daily else pytest.param(name, marks=pytest.mark.exhaustive) for name in options]


MHA_OPTIONS = {
    "defaults": {},
    "plain": {"exact_windowsize": False},
    "wide": {"look_backward": 2, "window_size": 2},
    "prenorm": {"prenorm": True},
    "qk_rmsnorm": {"qk_rmsnorm": True, "qk_scale": 3.0},
    "gates": {"gate_values_per_head": True},
    "xpos": {"use_xpos": True, "xpos_scale_base": 5.0},
    "no_rotary": {"use_rotary_pos_emb": False},
    "shared_qk": {"shared_qk": True},
    "grouped": {"heads": 4, "kv_heads": 2},
    "soft_cap": {"logits_soft_cap": 2.0},
    "sinks": {"attention_sinks": True},
    "sliding": {"window_size": Window.sliding(5), "causal": False, "use_xpos": True},
    "chunks": {"window_size": Window.chunks(5)},
    "no_rotary_plain_shared_qk": {"use_rotary_pos_emb": False, "exact_windowsize": False, "shared_qk": True},
    "qk_rmsnorm_gates_grouped_sinks": {
        "qk_rmsnorm": True,
        "gate_values_per_head": True,
        "heads": 4,
        "kv_heads": 2,
        "attention_sinks": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", each(MHA_OPTIONS, ["sliding", "chunks", "no_rotary_plain_shared_qk", "qk_rmsnorm_gates_grouped_sinks"])
)
def test_multi_head_attention_decodes_as_it_attends(name):
    module = LocalMHA(**MHA | MHA_OPTIONS[name])
    assert_module_decodes(module, normal(0, 2, 23, 12))


TRANSFORMER_OPTIONS = {
    "defaults": {},
    "plain": {"exact_windowsize": False},
    "no_absolute_embedding": {"use_abs_pos_emb": False, "num_residual_streams": 1},
    "dynamic_bias": {"use_dynamic_pos_bias": True},
    "dynamic_bias_of_plain_windows": {"use_dynamic_pos_bias": True, "exact_windowsize": False, "look_backward": 2},
    "one_stream": {"num_residual_streams": 1},
    "two_streams": {"num_residual_streams": 2},
    "global_layers": {"global_attn_layer": global_layer, "layers_insert_global_attn": (2,)},
    "windows_by_layer": {"local_attn_window_size": (2, 5)},
    "a_layer_that_sees_all": {"local_attn_window_size": (3, None)},
    "a_layer_that_sees_all_and_a_bias": {"local_attn_window_size": (None, 3), "use_dynamic_pos_bias": True},
    "two_streams_a_bias_and_a_layer_that_sees_all": {
        "num_residual_streams": 2,
        "use_dynamic_pos_bias": True,
        "exact_windowsize": False,
        "look_backward": 2,
        "local_attn_window_size": (2, None),
    },
    "windows_and_a_bias": {
        "local_attn_window_size": (Window.sliding(4), Window.sliding(None)),
        "use_dynamic_pos_bias": True,
    },
    "everything": {
        "use_xpos": True,
        "qk_rmsnorm": True,
        "qk_scale": 3.0,
        "gate_values_per_head": True,
        "shared_qk": True,
        "heads": 4,
        "kv_heads": 2,
        "logits_soft_cap": 2.0,
        "attention_sinks": True,
        "global_attn_layer": global_layer,
        "look_backward": 2,
    },
}


DAILY = (
    "defaults",
    "no_absolute_embedding",
    "windows_by_layer",
    "two_streams_a_bias_and_a_layer_that_sees_all",
    "windows_and_a_bias",
    "everything",
)


@pytest.mark.slow_but("defaults")
@pytest.mark.parametrize("name", each(TRANSFORMER_OPTIONS, DAILY))
def test_transformer_decodes_as_it_reads(name):
    model = LocalTransformer(**TRANSFORMER | TRANSFORMER_OPTIONS[name])
    tokens = np.random.RandomState(0).randint(0, 13, (2, 23))
    assert_module_decodes(model, jnp.asarray(tokens), max_length=23)


@pytest.mark.slow
def test_transformer_decodes_documents_apart():
    model = LocalTransformer(**TRANSFORMER)
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, 23)))
    segment_ids = jnp.cumsum(normal(1, 2, 23) > 1.0, axis=1)
    assert len(np.unique(segment_ids)) > 2
    assert_module_decodes(model, tokens, segment_ids=segment_ids)


@pytest.mark.slow
def test_a_model_decodes_padded_documents_as_the_row_without_padding():
    """Absolute positions restart in every document and continue across chunks and gaps."""
    model = LocalTransformer(**TRANSFORMER | {"local_attn_window_size": (3, None)}, num_residual_streams=1)
    n, m = 23, 35
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, n)))
    documents = jnp.cumsum(normal(1, 2, n) > 1.0, axis=1)
    places = drawn_places(n, m)
    rows = np.arange(2)[:, None]
    spread = jnp.full((2, m), 12).at[rows, places].set(tokens)
    exists = jnp.zeros((2, m), bool).at[rows, places].set(True)
    ids = jnp.full((2, m), 9).at[rows, places].set(documents)
    variables = filled_variables(model, tokens)

    @compiled
    def both(tokens, spread, exists, ids):
        cache, outs = model.init_cache(2, max_length=n), []
        for first, size in ((0, 6), (6, 1), (7, 28)):
            part = (x[:, first : first + size] for x in (spread, exists, ids))
            out, cache = model.apply(variables, next(part), mask=next(part), segment_ids=next(part), cache=cache)
            outs.append(out)
        return jnp.concatenate(outs, 1), model.apply(variables, tokens, segment_ids=documents)

    out, expected = both(tokens, spread, exists, ids)
    for row in range(2):
        assert_close(out[row, places[row]], expected[row])


@pytest.mark.slow
def test_a_full_global_cache_slides():
    """It keeps the last `max_length` tokens, like an exact window with as many keys."""
    module = LocalMHA(**MHA | {"window_size": None})
    sliding = LocalMHA(**MHA | {"window_size": 4})  # the four keys before a query, and its own
    x = normal(0, 2, 17, 12)
    variables = filled_variables(module, x)
    out, cache = compiled(partial(module_steps, module))(variables, x, module.init_cache(2, max_length=5))
    assert cache.size == 5
    assert_close(out, sliding.apply(variables, x))
    with pytest.raises(ValueError, match="made for this call's window"):
        module.apply(variables, x, cache=sliding.init_cache(2))


@pytest.mark.slow
def test_transformer_in_bfloat16_decodes_as_it_reads_within_its_tolerance():
    model = LocalTransformer(**TRANSFORMER, dtype=jnp.bfloat16)
    tokens = np.random.RandomState(0).randint(0, 13, (2, 17))
    assert model.init_cache(2).layers[0].attn.k.dtype == jnp.bfloat16
    assert_module_decodes(model, jnp.asarray(tokens), "bfloat16")


@pytest.mark.slow
def test_continuous_transformer_decodes_as_it_reads():
    model = LocalTransformer(**TRANSFORMER | {"num_tokens": None})
    assert_module_decodes(model, normal(0, 2, 17, 12))


@pytest.mark.slow
def test_transformer_rows_of_unequal_length_equal_each_row_alone():
    model = LocalTransformer(**TRANSFORMER, global_attn_layer=global_layer)
    lengths, tokens = np.array([5, 11]), jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, 20)))
    variables = filled_variables(model, tokens[:, :1])

    @compiled
    def decode(variables, tokens):
        exists = jnp.arange(11) < lengths[:, None]
        first, cache = model.apply(variables, tokens[:, :11], mask=exists, cache=model.init_cache(2))
        # Row 0 continues with its token 5, row 1 with its token 11.
        rest = jnp.stack([tokens[0, 5:14], tokens[1, 11:20]])
        after, _ = module_steps(model, variables, rest, cache)
        return first, after, model.apply(variables, tokens)

    first, after, expected = decode(variables, tokens)
    for row, length in enumerate(lengths):
        got = np.concatenate([first[row, :length], after[row]])
        assert_close(got, expected[row, : length + 9])


@pytest.mark.slow
def test_inserted_global_layer_sees_all_tokens_so_far_when_decoding():
    """It sees all tokens, not only the newest, and absent tokens of a chunk do not count."""
    model = LocalTransformer(**TRANSFORMER, global_attn_layer=global_layer, layers_insert_global_attn=(1,))
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 13, (1, 9)))
    variables = filled_variables(model, tokens)
    feed = compiled(lambda tokens, mask, cache: model.apply(variables, tokens, mask=mask, cache=cache)[1])
    cache = feed(tokens[:, :8], jnp.ones((1, 8), bool), model.init_cache(1))
    for exists in (True, False):
        cache = feed(tokens[:, 8:], jnp.full((1, 1), exists), cache)
        assert cache.layers[0].global_attn["count"] == 9
    assert cache.layers[1].global_attn is None


def test_decode_scales_by_qk_scale_under_qk_rmsnorm():
    """With a scale of 0 all visible keys count equally; with the default d ** -0.5 they would not."""
    module = LocalMHA(**MHA | {"qk_rmsnorm": True, "qk_scale": 0.0, "use_rotary_pos_emb": False})
    x = normal(0, 1, 4, 12)
    variables = filled_variables(module, x)
    values = x @ variables["params"]["to_qkv"]["kernel"][:, 16:]
    out, _ = compiled(partial(module_steps, module))(variables, x, module.init_cache(1))
    expected = values.mean(1) @ variables["params"]["to_out"]["kernel"]
    np.testing.assert_allclose(out[:, -1], expected, rtol=1e-4, atol=1e-5)


def test_every_new_token_with_a_cache_has_logits():
    model = LocalTransformer(**TRANSFORMER)
    tokens = jnp.zeros((2, 7), jnp.int32)
    variables = filled_variables(model, tokens)
    logits, _ = jax.eval_shape(lambda cache: model.apply(variables, tokens, cache=cache), model.init_cache(2))
    assert logits.shape == (2, 7, 13)


def test_init_cache_needs_no_parameters_and_depends_on_the_window_alone():
    model = LocalTransformer(**TRANSFORMER | {"local_attn_window_size": (2, 5), "max_seq_len": 2**20})
    cache = model.init_cache(3, jnp.bfloat16)
    assert [layer.attn.k.shape for layer in cache.layers] == [(3, 2, 3, 4), (3, 2, 6, 4)]
    assert {layer.attn.k.dtype for layer in cache.layers} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(cache.length, 0)
    half = LocalTransformer(**TRANSFORMER, param_dtype=jnp.float16)
    assert half.init_cache(1).layers[0].attn.k.dtype == jnp.float16
    seeing_all = LocalTransformer(**TRANSFORMER | {"local_attn_window_size": (3, None)})
    assert [layer.attn.size for layer in seeing_all.init_cache(1).layers] == [4, 64]
    assert [layer.attn.size for layer in seeing_all.init_cache(1, max_length=9).layers] == [4, 9]


@pytest.mark.slow
def test_a_window_of_the_call_decodes_as_it_reads():
    model = LocalTransformer(**TRANSFORMER, use_xpos=True)
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, 23)))
    variables = filled_variables(model, tokens[:, :1])
    wide = partial(model.apply, variables, window_size=5)

    @compiled
    def both(tokens):
        first, cache = wide(tokens[:, :7], cache=model.init_cache(2, window_size=5))
        rest, _ = wide(tokens[:, 7:], cache=cache)
        return jnp.concatenate([first, rest], axis=1), wide(tokens)

    assert_close(*both(tokens))


# Rewinding

REWOUND = (PLAIN, EXACT, Window(1, causal=True, look_backward=0), Window(4, causal=True, look_backward=2))


@pytest.mark.slow_but("packed-w3-back1-exact")
@pytest.mark.parametrize("window", REWOUND, ids=window_id)
@pytest.mark.parametrize("features", [ALL_ON_PACKED, ("bias", "rotary", "shared_qk")], ids=["packed", "shared"])
def test_tokens_after_a_rewind_are_answered_as_if_there_had_been_no_drafts(window, features):
    """Before and after the ring wraps; drafts in one chunk and one by one; rows that rewind by different numbers."""
    n, drafts = over_three_laps(window) + 6, 3
    arrays, traced, options = draw_call(features, window, n)
    options = {name: value for name, value in options.items() if window.window_size > 1 or name != "rotary"}

    @compiled
    def feed(arrays, traced):
        cache = new_cache(window, arrays, options, rewind=drafts)

        def step(cache, at):
            kept = sliced(arrays, traced, at, 1)
            wrong = {name: kept[name][:, :, :1] + 9.0 for name in "qkv"}
            drafted = {name: jnp.concatenate([kept[name], *[wrong[name]] * 2], 2) for name in "qkv"}
            chunk = kept | drafted
            if "segment_ids" in kept:
                chunk["segment_ids"] = jnp.repeat(kept["segment_ids"], 3, axis=1)
            out, grown = cached_attention(cache=cache, **chunk)  # the right token and two wrong drafts
            one, back = cached_attention(cache=grown.rewind(jnp.array([3, 2])), **kept)  # row 1 kept the right one
            return back.rewind(jnp.array([0, 1])), (out[:, :, :1], one)

        cache, (first, again) = lax.scan(step, cache, jnp.arange(n))
        first, again = (jnp.moveaxis(x, 0, -3)[..., 0, :] for x in (first, again))
        return first, again, cache.length, local(**arrays, **traced, window=window, **options)

    first, again, length, expected = feed(arrays, traced)
    np.testing.assert_array_equal(length, n)
    assert_close(first, expected)
    assert_close(again[0], expected[0])  # row 0 only: row 1 has answered a token twice


def test_a_rewind_goes_back_as_far_as_was_asked_for_and_no_farther():
    cache = filled_cache(n=9, rewind=3)
    assert cache.size == EXACT.capacity + 3
    np.testing.assert_array_equal(cache.rewind(0).k, cache.k)
    back = cache.rewind(jnp.array([1, 3]))
    np.testing.assert_array_equal(back.length, [8, 6])
    with pytest.raises(ValueError, match=r"`count` must be from 0 to the \[2, 0\] tokens that rows can forget, got 1"):
        back.rewind(1)
    np.testing.assert_array_equal(back.rewind(jnp.array([2, 0])).length, [6, 6])
    for count in (4, jnp.array([0, 4]), 2**31 - 2):
        with pytest.raises(ValueError, match=r"make the cache with a larger `rewind` than 3"):
            cache.rewind(count)
    with pytest.raises(ValueError, match=r"0 to the \[2, 2\] tokens"):
        filled_cache(n=2, rewind=5).rewind(3)
    for count in (-1, np.array([-1, 2]), 2**32 + 1, np.int64(2**32)):
        with pytest.raises(ValueError, match="`count` must be from 0 to the number of tokens in a row"):
            cache.rewind(count)
    for count in (jnp.array([[1], [2]]), jnp.array([1]), jnp.array([1, 1, 1])):
        with pytest.raises(ValueError, match=r"`count` must be one number or \[2\], one for each row"):
            cache.rewind(count)
    for count in (1.0, True, jnp.array([True, False]), "x", None):
        with pytest.raises(TypeError, match=r"`count` must be (an int or an array of )?integers"):
            cache.rewind(count)


def test_a_cache_made_without_room_does_not_go_back():
    cache = filled_cache()
    np.testing.assert_array_equal(cache.rewind(0).length, cache.length)
    with pytest.raises(ValueError, match="a larger `rewind` than 0"):
        cache.rewind(1)
    with pytest.raises(ValueError, match="must be known for a cache with `rewind=0`"):
        jax.jit(lambda cache, count: cache.rewind(count))(cache, 0)


@pytest.mark.slow_but("float32-4-steps")
@pytest.mark.parametrize("size", [1, 3], ids=["steps", "chunks"])
@pytest.mark.parametrize(("dtype", "count"), [("float32", 4), ("bfloat16", -1), ("float8_e4m3fn", 9)])
def test_a_traced_rewind_that_is_too_far_is_nan_for_good(dtype, count, size):
    """Also after new tokens have filled every slot, and after another rewind."""
    arrays = {name: normal(seed, 2, 2, 30, 4) for seed, name in enumerate("qkv")}

    @compiled
    def run(cache, count):
        first, cache = steps(cache.rewind(count), arrays, {}, 0, 15 // size, size)
        second, _ = steps(cache.rewind(jnp.array([1, 1])), arrays, {}, 15, 15 // size, size)
        return first, second

    for out in run(filled_cache(n=9, rewind=3, dtype=dtype), jnp.array([2, count])):
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()


@pytest.mark.slow
def test_a_model_goes_back_over_the_ends_of_documents():
    """A document that a rejected token began is forgotten: the document before continues."""
    model = LocalTransformer(**TRANSFORMER | {"local_attn_window_size": (3, None)}, num_residual_streams=1)
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, 14)))
    documents = jnp.broadcast_to(jnp.arange(14) // 9, (2, 14))  # the second begins at 9
    variables = filled_variables(model, tokens)

    @compiled
    def run(tokens, counts):
        feed = partial(model.apply, variables)
        outs = []
        for first in (8, 9, 10, 12):
            cache = model.init_cache(2, max_length=14, rewind=3)
            _, cache = feed(tokens[:, :first], segment_ids=documents[:, :first], cache=cache)
            drafts = jnp.array([[7, 7, 8], [documents[1, first - 1], 9, 9]])
            _, drafted = feed((tokens[:, :3] + 5) % 13, segment_ids=drafts, cache=cache)
            back = drafted.rewind(jnp.array([2, 1])).rewind(counts)
            outs.append(feed(tokens[:, first:], segment_ids=documents[:, first:], cache=back)[0])
        return outs, feed(tokens, segment_ids=documents)

    outs, expected = run(tokens, jnp.array([1, 2]))
    for first, out in zip((8, 9, 10, 12), outs, strict=True):
        assert_close(out, expected[:, first:])


def test_a_layers_own_cache_must_go_back_too():
    model = LocalTransformer(**TRANSFORMER, global_attn_layer=global_layer)
    with pytest.raises(ValueError, match=r"must have `rewind\(count\)` to forget tokens, got dict"):
        model.init_cache(2, rewind=3).rewind(0)


@pytest.mark.parametrize(
    ("count", "error", "phrase"),
    [
        (np.array([1, 2, 3]), ValueError, r"`count` must be one number or \[2\]"),
        (2**40, ValueError, "`count` must be from 0 to the number of tokens in a row"),
        (0.5, TypeError, "`count` must be an int or an array of integers"),
        (1, ValueError, "make the cache with a larger `rewind` than 3"),
    ],
)
def test_a_models_cache_refuses_to_go_back_as_its_layers_do(count, error, phrase):
    cache = LocalTransformer(**TRANSFORMER).init_cache(2, rewind=3)
    with pytest.raises(error, match=phrase):
        cache.rewind(count)


# Explicit positions


def at_positions(x, positions, theta):
    """Rotate ``[b, h, n, d]`` by the positions ``[b, n]``, in NumPy float64."""
    half = x.shape[-1] // 2
    angles = np.asarray(positions, np.float64)[:, None, :, None] * theta ** (-np.arange(half) / half)
    real, imaginary = np.split(np.asarray(x, np.float64), 2, -1)
    turned = (real + 1j * imaginary) * np.exp(1j * angles)
    return jnp.asarray(np.concatenate([turned.real, turned.imag], -1), x.dtype)


GAPS = np.cumsum(np.random.RandomState(3).randint(-2, 9, (2, 23)), axis=1).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "shared_qk"), [(PLAIN, False), (EXACT, True)], ids=["plain", "exact-shared"])
def test_positions_turn_queries_and_keys_with_and_without_a_cache(window, shared_qk):
    """At any position: differences of angles are exact even at position ten million."""
    arrays = {name: normal(seed, 2, 3, 23, 4) for seed, name in enumerate("qkv")}
    module = LocalAttention(**dataclasses.asdict(window), shared_qk=shared_qk, dim=4, autopad=True)

    @compiled
    def both(arrays, positions):
        cache = KVCache.create(module.options(), batch=2, kv_heads=3, dim_head=4)
        out, _ = chunks(cache, arrays, {"positions": positions}, [5, 1, 17])
        return out, module.apply({}, **arrays, positions=positions)

    by_hand = {name: at_positions(arrays[name], GAPS, theta=10000.0) for name in "qk"} | {"v": arrays["v"]}
    expected = local(**by_hand, window=window, shared_qk=shared_qk)
    for far in (0, 10**7, -(10**7)):
        for out in both(arrays, jnp.asarray(GAPS + far)):
            assert_close(out, expected)


@pytest.mark.slow
def test_positions_reach_the_layers_of_a_model_and_its_embedding():
    model = LocalTransformer(**TRANSFORMER | {"use_abs_pos_emb": False, "num_residual_streams": 1})
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, 23)))
    variables = filled_variables(model, tokens)
    read = compiled(lambda positions: model.apply(variables, tokens, positions=positions))
    plain = read(jnp.arange(23)[None])
    assert_close(plain, compiled(model.apply)(variables, tokens))
    assert_close(read(jnp.arange(23)[None] + 10**6), plain)
    assert np.abs(read(3 * jnp.arange(23)[None]) - plain).max() > 1e-3
    positions = jnp.asarray(np.abs(GAPS) % 64)
    for options in ({}, {"use_dynamic_pos_bias": True}):
        model = LocalTransformer(**TRANSFORMER, num_residual_streams=1, **options)
        assert_module_decodes(model, tokens, positions=positions)


@pytest.mark.slow
def test_left_padded_rows_read_as_they_decode_where_positions_say_so():
    model = LocalTransformer(**TRANSFORMER, num_residual_streams=1)
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, 11)))
    mask = jnp.arange(11) >= jnp.array([[4], [0]])
    variables = filled_variables(model, tokens)
    apply = compiled(model.apply)
    read = apply(variables, tokens, mask=mask, positions=jnp.cumsum(mask, 1) - 1)
    decoded, cache = apply(variables, tokens, mask=mask, cache=model.init_cache(2))
    alone = apply(variables, tokens[:1, 4:])
    np.testing.assert_array_equal(cache.length, [7, 11])
    assert_close(read[:1, 4:], alone)
    assert_close(decoded[:1, 4:], alone)
    assert_close(read[1], decoded[1])


# Bad input

Q = jnp.ones((2, 3, 5, 4))
ROTATED = AttentionOptions(EXACT, rotary=Rotary(4))
CACHE = KVCache.create(EXACT, batch=2, kv_heads=3, dim_head=4)


@pytest.mark.parametrize(
    ("error", "phrase", "call"),
    [
        (ValueError, "batch, heads and width", lambda: cached_attention(Q[:1], Q[:1], Q[:1], CACHE)),
        (ValueError, "batch, heads and width", lambda: cached_attention(Q, Q[:, :1], Q[:, :1], CACHE)),
        (ValueError, "batch, heads and width", lambda: cached_attention(*[Q[..., :2]] * 3, CACHE)),
        (ValueError, "batch, heads and width", lambda: cached_attention(Q[0], Q[0], Q[0], CACHE)),
        (TypeError, "must be a KVCache", lambda: cached_attention(Q, Q, Q, (Q, Q))),
        (TypeError, "`mask` must be bool", lambda: cached_attention(Q, Q, Q, CACHE, mask=HOLES * 1)),
        (ValueError, r"`mask` must be \[b, n\]", lambda: cached_attention(Q, Q, Q, CACHE, mask=HOLES[1:, :4])),
        (TypeError, "floating dtype", lambda: cached_attention(Q > 0, Q, Q, CACHE)),
        (ValueError, "must have a causal window", lambda: KVCache.create(Window(3), 1, 1, 4)),
        (ValueError, "`batch` must be at least 1", lambda: KVCache.create(EXACT, 0, 1, 4)),
        (ValueError, "`kv_heads` must be at least 1", lambda: KVCache.create(EXACT, 1, 0, 4)),
        (ValueError, "`dim_head` must be at least 1", lambda: KVCache.create(EXACT, 1, 1, 0)),
        (ValueError, "`rotary.dim` must be at most `dim_head`", lambda: KVCache.create(ROTATED, 1, 1, 2)),
        (TypeError, "must be AttentionOptions or a Window", lambda: KVCache.create(3, 1, 1, 4)),
        (ValueError, "cache's, got `window_size` 99 with", lambda: cached_attention(Q, Q, Q, CACHE, window_size=99)),
        (ValueError, r"or make the cache by KVCache\.create", lambda: cached_attention(Q, Q, Q, CACHE, causal=False)),
        (ValueError, "got `rotary` 7, `scale` 1.0", lambda: cached_attention(Q, Q, Q, CACHE, rotary=7, scale=1.0)),
        (
            TypeError,
            "must be fields of AttentionOptions or Window, got `windows`",
            lambda: cached_attention(Q, Q, Q, CACHE, windows=3),
        ),
    ],
)
def test_bad_input_of_cached_attention_is_refused_with_what_to_do(error, phrase, call):
    with pytest.raises(error, match=phrase):
        call()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "complex64"])
def test_a_cache_that_would_cut_keys_to_whole_numbers_is_refused(dtype):
    for make in (
        lambda: KVCache.create(EXACT, 1, 1, 4, dtype=dtype),
        lambda: LocalMHA(**MHA).init_cache(1, dtype),
        lambda: LocalTransformer(**TRANSFORMER).init_cache(1, dtype),
    ):
        with pytest.raises(TypeError, match="`dtype` must be a floating dtype, got"):
            make()


@pytest.mark.parametrize(
    ("error", "phrase", "options"),
    [
        (ValueError, r"`mask` must be \[b, n\] with a cache", {"mask": jnp.ones((2, 3, 5), bool)}),
        (ValueError, r"`segment_ids` must be \[b, n\] with a cache", {"segment_ids": jnp.ones((2, 3, 5), int)}),
        (ValueError, "as many as `q`, got 5 and 4", {"q": jnp.ones((2, 3, 4, 4))}),
        (ValueError, "as many as `q`, got 4 and 5", dict.fromkeys("kv", jnp.ones((2, 3, 4, 4)))),
        (ValueError, "as many as `q`, got 5 and 0", {"q": jnp.ones((2, 3, 0, 4))}),
        (ValueError, "`positions` are for rotary", {"positions": jnp.ones((2, 5), int)}),
        (TypeError, "`positions` must be integers, got float32", {"positions": jnp.ones((2, 5))}),
        (ValueError, r"`positions` must be \[2, 5\]", {"positions": jnp.ones((2, 4), int)}),
        (ValueError, r"`positions` must be \[2, 5\]", {"positions": jnp.ones((5,), int)}),
        (ValueError, "`positions` must be at most 2147483647", {"positions": np.full((2, 5), 2**31)}),
        (
            ValueError,
            "`cache.length` must be at most 2147483647, the last position, got 2147483649; begin a new cache",
            {"cache": CACHE.replace(length=jnp.array([3, 2**31 - 4]))},
        ),
    ],
)
def test_wrong_tokens_for_a_cache_are_refused(error, phrase, options):
    with pytest.raises(error, match=phrase):
        cached_attention(**{"q": Q, "k": Q, "v": Q, "cache": CACHE} | options)


def of_module(module, x, **said):
    return module.apply(filled_variables(module, x), x, cache=module.init_cache(2), **said)


DOORS = {
    "cached_attention": lambda n, **said: cached_attention(*[Q[:, :, :n]] * 3, CACHE, **said),
    "append": lambda n, **said: CACHE.append(*[Q[:, :, :n]] * 2, **said),
    "attend_cache": lambda n, **said: attend_cache(Q[:, :, :n], CACHE.append(Q, Q), **said),
    "LocalAttention": lambda n, **said: LocalAttention(3, causal=True, exact_windowsize=True).apply(
        {}, *[Q[:, :, :n]] * 3, cache=CACHE, **said
    ),
    "LocalMHA": lambda n, **said: of_module(LocalMHA(**MHA), jnp.ones((2, n, MHA["dim"])), **said),
    "LocalTransformer": lambda n, **said: of_module(LocalTransformer(**TRANSFORMER), jnp.ones((2, n), int), **said),
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("name", "dtype", "meaning"),
    [
        ("mask", bool, "which of the new tokens exist"),
        ("segment_ids", int, "which documents the new tokens belong to"),
        ("positions", int, "where the new tokens are"),
    ],
    ids=["mask", "segment_ids", "positions"],
)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_said_of_the_whole_text_is_refused_in_a_step(door, name, dtype, meaning, n):
    phrase = rf"With a cache `{name}` must say {meaning}, \[b, {n}\], got \(2, 21\); .* `{name}\[\.\.\., -{n}:\]`"
    with pytest.raises(ValueError, match=phrase):
        DOORS[door](n, **{name: jnp.ones((2, 21), dtype)})


def test_positions_are_refused_with_xpos_and_where_nothing_takes_them():
    rotary = Rotary(4, use_xpos=True)
    with pytest.raises(ValueError, match="`positions` must not be given with xPos"):
        cached_attention(
            Q, Q, Q, KVCache.create(AttentionOptions(EXACT, rotary), 2, 3, 4), positions=jnp.ones((2, 5), int)
        )
    with pytest.raises(ValueError, match="`positions` are for rotary"):
        LocalAttention(3).apply({}, Q[:, :, :3], Q[:, :, :3], Q[:, :, :3], positions=jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match="`positions` needs as many queries as keys"):
        LocalAttention(5, dim=4).apply({}, Q[:, :, :3], Q, Q, positions=jnp.ones((2, 3), int))
    model, x = LocalTransformer(**TRANSFORMER, use_dynamic_pos_bias=True, use_abs_pos_emb=False), jnp.zeros((2, 5), int)
    with pytest.raises(ValueError, match="for a model without absolute embeddings or rotary"):
        model.init(jax.random.key(0), x, positions=x)


def test_a_cache_needs_a_window_with_a_limit():
    with pytest.raises(
        ValueError, match=r"`max_length`, the tokens to remember, must be given for a window without a limit, got"
    ):
        KVCache.create(Window.sliding(None), 1, 1, 4)
    assert KVCache.create(Window.sliding(None).within(7), 1, 1, 4).size == 7
    module = LocalMHA(12, Window.sliding(None), dim_head=4, heads=2)
    with pytest.raises(ValueError, match="`max_length`, the tokens to remember, must be given"):
        module.init_cache(1)
    assert module.init_cache(1, max_length=9).window == Window.sliding(9)
    with pytest.raises(ValueError, match="must have a causal window"):
        module.clone(window_size=Window.everything()).init_cache(1, max_length=9)


def test_a_ring_in_which_xpos_would_leave_its_range_is_refused():
    options = AttentionOptions(Window(4, causal=True), rotary=Rotary(4, use_xpos=True))
    KVCache.create(options, 1, 1, 4, rewind=100)
    for rewind, dtype in ((300, "float32"), (60, "float16")):
        with pytest.raises(ValueError, match="its scale would overflow"):
            KVCache.create(options, 1, 1, 4, rewind=rewind, dtype=dtype)


@pytest.mark.parametrize(("value", "error"), [(-5, ValueError), (0, ValueError), (2.0, TypeError), (True, TypeError)])
@pytest.mark.parametrize("name", ["batch", "max_length", "rewind"])
def test_sizes_of_a_cache_are_counts(name, value, error):
    if (name, value) == ("rewind", 0):
        pytest.skip("none is right")
    for module in (LocalMHA(**MHA), LocalTransformer(**TRANSFORMER)):
        with pytest.raises(error, match=f"`{name}` must be"):
            module.init_cache(**{"batch": 1} | {name: value})


HOLES = jnp.array([[True, False, True, False, False], [True, True, True, True, True]])


class Opaque(nn.Module):
    """A global layer that cannot decode."""

    @nn.compact
    def __call__(self, x, mask=None):
        return x


def opaque_layer(index):
    del index
    return Opaque()


def of_transformer(other=None, batch=2, tokens=4, mask=None, length=None, **options):
    """Call a tiny model with a cache, optionally of another model or batch, or with `length` tokens in it."""
    model = LocalTransformer(**TRANSFORMER | options)
    cache = (model if other is None else LocalTransformer(**TRANSFORMER | other)).init_cache(batch)
    if length is not None:
        cache = cache.replace(length=jnp.array(length))
    x = jnp.full((2, tokens), 1)
    return model.apply(filled_variables(model, x[:, :1]), x, cache=cache, mask=mask)


@pytest.mark.parametrize(
    ("error", "phrase", "call"),
    [
        (ValueError, "TransformerCache for 2 layers", lambda: of_transformer({"depth": 1})),
        (ValueError, "made for this call's window", lambda: of_transformer({"local_attn_window_size": 4})),
        (ValueError, "made for this call's window", lambda: of_transformer({"exact_windowsize": False})),
        (ValueError, "batch, heads and width", lambda: of_transformer({"heads": 3})),
        (ValueError, "batch, heads and width", lambda: of_transformer({"dim_head": 8})),
        (ValueError, "must have x's number of rows", lambda: of_transformer(batch=3)),
        (ValueError, "must have `init_cache", lambda: of_transformer(global_attn_layer=opaque_layer)),
        (ValueError, "must have a causal window", lambda: of_transformer(causal=False)),
        (
            ValueError,
            "`max_length`, the tokens to remember, must be given",
            lambda: of_transformer(local_attn_window_size=None, use_abs_pos_emb=False),
        ),
    ],
)
def test_bad_input_of_a_transformer_with_a_cache_is_refused_with_what_to_do(error, phrase, call):
    with pytest.raises(error, match=phrase):
        call()


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"qk_rmsnorm": True, "qk_scale": 3.0}, "scale=3.0"),
        ({"shared_qk": True}, "shared_qk=True"),
        ({"logits_soft_cap": 2.0}, "logits_soft_cap=2.0"),
        ({"use_xpos": True}, "use_xpos=True"),
    ],
)
def test_a_cache_of_other_options_is_refused_by_a_module(fields, phrase):
    """Functions cannot mix them up: they take the options from the cache."""
    with pytest.raises(ValueError, match=f"`cache` must be made for this module's options.*{phrase}"):
        of_transformer(fields)


@pytest.mark.slow
def test_a_model_without_dropout_takes_the_cache_of_one_with_it():
    logits, _ = of_transformer({"attn_dropout": 0.5})
    np.testing.assert_array_equal(logits, of_transformer()[0])


def test_a_token_beyond_max_seq_len_is_refused_not_placed_at_the_end():
    of_transformer(length=[60, 3])
    with pytest.raises(ValueError, match=r"at most `max_seq_len` \(64\) long, got 65"):
        of_transformer(length=[61, 3])
    of_transformer(length=[61, 3], use_abs_pos_emb=False)


def test_a_loss_with_a_cache_is_refused():
    model, tokens = LocalTransformer(**TRANSFORMER), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="`return_loss` takes a whole sequence"):
        model.apply(filled_variables(model, tokens), tokens, cache=model.init_cache(1), return_loss=True)


def test_attention_of_the_whole_sequence_is_what_decoding_is_compared_with():
    """If both were wrong in the same way, no test above would fail: one case is compared with NumPy."""
    q, k, v = (np.asarray(normal(seed, 1, 1, 14, 4), np.float64) for seed in range(3))
    expected = np.zeros((14, 4))
    for i in range(14):
        seen = slice(max(int(PLAIN.start(i)), 0), i + 1)
        weights = np.exp(q[0, 0, i] @ k[0, 0, seen].T / 2)
        expected[i] = weights @ v[0, 0, seen] / weights.sum()
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in zip("qkv", (q, k, v), strict=True)}
    out, _ = compiled(lambda arrays: chunks(new_cache(PLAIN, arrays), arrays, {}, [4, 1, 9]))(arrays)
    np.testing.assert_allclose(out[0, 0], expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(
        local_attention(**arrays, window_size=3, causal=True, autopad=True)[0, 0], expected, rtol=0, atol=2e-5
    )
