"""Appending to the cache apart from attending, first tokens that it keeps, and keys that every query sees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import (
    AttentionOptions,
    KVCache,
    LocalMHA,
    LocalTransformer,
    Rotary,
    Triton,
    Window,
    attend_cache,
    cached_attention,
    local_attention,
    rotate,
)
from tests.cases import assert_close, normal

pytestmark = pytest.mark.usefixtures("quick_compile")

PLAIN, EXACT = Window(3, causal=True), Window(3, causal=True, exact_windowsize=True, look_backward=2)
KINDS = pytest.mark.parametrize("window", [PLAIN, EXACT], ids=["plain", "exact"])
B, HEADS, KV_HEADS, N, D, D_VALUE = 2, 4, 2, 31, 8, 6
ROTARY = Rotary(D, theta=50.0)


def drawn(seed=0, n=N):
    """Draw queries, keys and values."""
    shapes = (B, HEADS, n, D), (B, KV_HEADS, n, D), (B, KV_HEADS, n, D_VALUE)
    return tuple(normal(seed + at, *shape) for at, shape in enumerate(shapes))


def make_cache(options, **sizes):
    return KVCache.create(options, B, KV_HEADS, D, dim_value=D_VALUE, **sizes)


def cut(arrays, first, size):
    return [x[:, :, first : first + size] for x in arrays]


def feed(cache, arrays, sizes, **given):
    """Attend to chunks of these sizes, one after the other."""
    outs, first, step = [], 0, jax.jit(partial(cached_attention, **given))
    for size in sizes:
        out, cache = step(*cut(arrays, first, size), cache)
        outs.append(out)
        first += size
    return jnp.concatenate(outs, 2), cache


# Two steps


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("sinks", [None, normal(7, HEADS)], ids=["plain", "sinks"])
def test_two_steps_are_one(window, sinks):
    arrays, slack = drawn(), 4
    cache = make_cache(AttentionOptions(window, rotary=ROTARY), rewind=slack)
    segment_ids = jnp.arange(N)[None] // 11
    outs, first = [], 0
    for size in (1, 5, 3, 1, 5, 4, 5, 5, 2):
        q, k, v = cut(arrays, first, size)
        ids = segment_ids[:, first : first + size]
        cache = cache.append(k, v, segment_ids=ids)
        outs.append(attend_cache(q, cache, segment_ids=ids, sinks=sinks))
        first += size
    expected = local_attention(
        *arrays, window=window, autopad=True, rotary=ROTARY, segment_ids=segment_ids, sinks=sinks
    )
    assert_close(jnp.concatenate(outs, 2), expected)
    np.testing.assert_array_equal(cache.length, N)


@pytest.mark.slow
@KINDS
def test_both_steps_leave_the_same_cache(window):
    _, k, v = arrays = drawn()
    options = AttentionOptions(window, rotary=ROTARY, shared_qk=True)
    _, by_one = feed(make_cache(options), arrays, [7, N - 7])
    by_two = make_cache(options).append(k[:, :, :7], v[:, :, :7]).append(k[:, :, 7:], v[:, :, 7:])
    assert_close(by_two, by_one)


@pytest.mark.slow
def test_rows_of_unequal_length_and_positions_are_those_of_one_step():
    q, k, v = drawn(n=3)
    mask, positions = jnp.array([[True, True, False], [True, True, True]]), jnp.array([[5, 2, 9], [4, 4, 8]])
    cache = make_cache(AttentionOptions(EXACT, rotary=ROTARY), rewind=2)
    given = {"mask": mask, "positions": positions}
    expected, grown = cached_attention(q, k, v, cache, **given)
    appended = cache.append(k, v, **given)
    out = attend_cache(q, appended, **given)
    assert_close(appended, grown)
    assert_close(jnp.where(mask[:, None, :, None], out, 0), jnp.where(mask[:, None, :, None], expected, 0))


@pytest.mark.slow
def test_drafts_are_checked_without_being_kept():
    q, k, v = arrays = drawn()
    cache = make_cache(AttentionOptions(EXACT, rotary=ROTARY), rewind=3)
    _, cache = feed(cache, arrays, [N - 4])
    drafted = cache.append(k[:, :, -4:], v[:, :, -4:])
    out = attend_cache(q[:, :, -4:], drafted)
    assert_close(out, local_attention(*arrays, window=EXACT, rotary=ROTARY)[:, :, -4:])
    np.testing.assert_array_equal(cache.length, N - 4)


@pytest.mark.slow
def test_a_second_layer_reads_the_keys_of_the_first():
    """A long prompt in one step, whose cache is not used, then token by token."""
    q, k, v = drawn()
    other, options = normal(9, *q.shape), AttentionOptions(EXACT, rotary=ROTARY)
    cache = make_cache(options)
    out, _ = cached_attention(other[:, :, :20], k[:, :, :20], v[:, :, :20], cache)
    outs, cache = [out], cache.append(k[:, :, :20], v[:, :, :20])
    for at in range(20, N):
        cache = cache.append(*cut((k, v), at, 1))
        outs.append(attend_cache(other[:, :, at : at + 1], cache))
    assert_close(jnp.concatenate(outs, 2), local_attention(other, k, v, window=EXACT, rotary=ROTARY))


def test_more_tokens_than_the_ring_keeps_all_keys_of_are_refused():
    q, k, v = drawn()
    cache = make_cache(EXACT, rewind=3).append(k, v)
    with pytest.raises(ValueError, match=r"`q` must be of tokens whose keys .* \[4, 4\] .* `rewind` larger than 3"):
        attend_cache(q[:, :, :5], cache)
    with pytest.raises(ValueError, match=r"at most \[2, 4\]"):
        attend_cache(q[:, :, :3], cache.rewind(jnp.array([2, 0])))
    with pytest.raises(ValueError, match=r"at most \[2, 2\] in its rows, got \[3, 3\]"):
        attend_cache(q[:, :, :3], make_cache(EXACT, rewind=3).append(k[:, :, :2], v[:, :, :2]))


def test_where_lengths_are_traced_such_rows_are_nan():
    q, k, v = drawn()
    cache = make_cache(EXACT, rewind=3).append(k, v).rewind(jnp.array([2, 0]))
    out = jax.jit(attend_cache)(q[:, :, :3], cache)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize(
    ("call", "error", "phrase"),
    [
        (lambda q, k, v, c: attend_cache(q, c, mask=jnp.ones((B, 1), bool)), ValueError, r"`mask` must be \[b, n\]"),
        (lambda q, k, v, c: attend_cache(q, (k, v)), TypeError, "(?s)must be a KVCache, got .* of type tuple"),
        (lambda q, k, v, c: attend_cache(q[..., :5], c), ValueError, "must have the same width d"),
        (lambda q, k, v, c: attend_cache(q[:, :3], c), ValueError, "a divisor of q's"),
        (lambda q, k, v, c: c.append(k, k), ValueError, r"`cache` must have v's batch, heads and width"),
        (lambda q, k, v, c: c.append(k.astype(int), v), TypeError, "`k` must be of a floating dtype, got int32"),
        (lambda q, k, v, c: c.append(k[:1], v[:1]), ValueError, "`cache` must have k's batch"),
        (lambda q, k, v, c: c.append(k, v[:, :, :1]), ValueError, "`k` and `v` must have the same shape but"),
        (lambda q, k, v, c: c.append(k, v, positions=jnp.zeros((B, 2), int)), ValueError, "got options without"),
        (lambda q, k, v, c: make_cache(EXACT, keep_first=-1), ValueError, "`keep_first` must be at least 0"),
        (lambda q, k, v, c: make_cache(EXACT, global_keys=(k, k)), ValueError, r"must have values \[h, m, 6\]"),
    ],
)
def test_wrong_calls_are_refused(call, error, phrase):
    q, k, v = drawn(n=2)
    with pytest.raises(error, match=phrase):
        call(q, k, v, make_cache(EXACT))


# First tokens


def keeping_first(q, k, v, options, m, segment_ids=None):
    """Attend to the window and to the first m tokens, with all scores at once."""
    window, i, j = options.window, np.arange(q.shape[2])[:, None], np.arange(k.shape[2])
    q, k = (x.reshape(B, KV_HEADS, -1, *x.shape[2:]) for x in (q, k))
    places = jnp.arange(i.size)
    near, far = (
        jnp.einsum("bhgid,bhkjd->bhgij", rotate(q, options.rotary, at), rotate(k, options.rotary, places))
        for at in (places, jnp.minimum(places, m + window.capacity - 1))
    )
    is_seen = window.sees(i, j) | ((j < m) & (j < i))
    if segment_ids is not None:
        is_seen = (is_seen & (segment_ids[:, :, None] == segment_ids[:, None]))[:, None, None]
    scores = jnp.where(window.sees(i, j), near, far) * D**-0.5
    p = jax.nn.softmax(jnp.where(is_seen, scores, -jnp.inf), -1)
    return jnp.einsum("bhgij,bhjd->bhgid", p, v).reshape(B, HEADS, -1, D_VALUE)


@pytest.mark.slow_but("steps-4-exact", "at once-4-exact")
@KINDS
@pytest.mark.parametrize("m", [1, 4, 10])
@pytest.mark.parametrize("sizes", [[1] * N, [7, 1, 20, 3], [N]], ids=["steps", "chunks", "at once"])
def test_first_tokens_stay_where_the_window_left_them(window, m, sizes):
    arrays, options = drawn(), AttentionOptions(window, rotary=ROTARY)
    segment_ids = jnp.arange(N)[None] // 23 if m == 4 else None
    cache, outs, first = make_cache(options, keep_first=m), [], 0
    step = jax.jit(cached_attention)
    for size in sizes:
        ids = None if segment_ids is None else segment_ids[:, first : first + size]
        out, cache = step(*cut(arrays, first, size), cache, segment_ids=ids)
        outs.append(out)
        first += size
    assert_close(jnp.concatenate(outs, 2), keeping_first(*arrays, options, m, segment_ids))


@pytest.mark.slow
def test_long_chunks_keep_first_tokens_as_blocks_do():
    """With all scores at once, by interpreted kernels, and block by block."""
    arrays, options = drawn(n=150), AttentionOptions(EXACT, rotary=ROTARY)
    gathered, cache = feed(make_cache(options, keep_first=4), arrays, [70, 80], implementation=Triton(interpret=True))
    expected, plain = feed(make_cache(options, keep_first=4), arrays, [70, 80], implementation="xla")
    assert_close(gathered, expected)
    assert_close(cache, plain)
    assert_close(expected, keeping_first(*arrays, options, 4))


@pytest.mark.slow
def test_rows_that_went_back_into_their_first_tokens_keep_others():
    _, k, v = arrays = drawn()
    options = AttentionOptions(EXACT, rotary=ROTARY)
    wrong = normal(20, B, KV_HEADS, 3, D), normal(21, B, KV_HEADS, 3, D_VALUE)
    cache = make_cache(options, rewind=3, keep_first=4).append(k[:, :, :2], v[:, :, :2]).append(*wrong).rewind(3)
    out, _ = feed(cache, [x[:, :, 2:] for x in arrays], [1] * (N - 2))
    assert_close(out, keeping_first(*arrays, options, 4)[:, :, 2:])


@pytest.mark.slow
def test_decoding_with_first_tokens_does_not_depend_on_age():
    arrays, options = drawn(n=3), AttentionOptions(EXACT, rotary=ROTARY)
    cache = feed(make_cache(options, keep_first=2), drawn(seed=5), [N])[1]
    old = cache.replace(length=cache.length + 7 * 2**20 * cache.size)
    for at in range(3):
        out, cache = cached_attention(*cut(arrays, at, 1), cache)
        out_then, old = cached_attention(*cut(arrays, at, 1), old)
        np.testing.assert_array_equal(out, out_then)


@pytest.mark.slow
def test_a_model_keeps_first_tokens_in_every_layer():
    model = LocalTransformer(
        num_tokens=16, max_seq_len=64, dim=16, depth=2, heads=2, dim_head=8, local_attn_window_size=4
    )
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 16, (B, 24)))
    variables = model.init(jax.random.key(0), tokens)

    @partial(jax.jit, static_argnums=1)
    def last(tokens, m):
        return model.apply(variables, tokens, cache=model.init_cache(B, keep_first=m))[0][:, -1]

    other = tokens.at[:, 0].set((tokens[:, 0] + 1) % 16)
    assert np.abs(last(tokens, 1) - last(other, 1)).max() > 1e-4
    np.testing.assert_array_equal(last(tokens, 0), last(other, 0))
    cache = model.init_cache(B, keep_first=3)
    assert all(layer.attn.first.k.shape == (B, 2, 3, 8) for layer in cache.layers)


# Global keys


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("sizes", [[1] * N, [7, 1, 20, 3]], ids=["steps", "chunks"])
def test_decode_with_the_global_keys_of_a_cache_equals_forward(window, sizes):
    arrays, options = drawn(), AttentionOptions(window, rotary=ROTARY)
    keys, values = normal(5, KV_HEADS, 3, D), normal(6, B, KV_HEADS, 3, D_VALUE)
    global_keys = keys, values, jnp.array([[True, False, True], [True, True, True]])
    cache = make_cache(options, global_keys=global_keys)
    out, _ = feed(cache, arrays, sizes)
    expected = local_attention(*arrays, window=window, autopad=True, rotary=ROTARY, global_keys=global_keys)
    assert_close(out, expected)
    assert_close(feed(make_cache(options), arrays, sizes, global_keys=global_keys)[0], expected)


@pytest.mark.slow
def test_long_chunks_see_global_keys_as_blocks_do():
    arrays, options = drawn(n=150), AttentionOptions(EXACT, rotary=ROTARY)
    global_keys = normal(5, KV_HEADS, 3, D), normal(6, KV_HEADS, 3, D_VALUE)
    cache = make_cache(options, global_keys=global_keys, keep_first=2)
    out, _ = feed(cache, arrays, [70, 80], implementation=Triton(interpret=True))
    assert_close(out, feed(cache, arrays, [70, 80], implementation="xla")[0])


def test_a_cache_keeps_a_copy_of_its_global_keys():
    """The cache may be donated without deleting the caller's arrays."""
    keys, values = normal(5, KV_HEADS, 3, D), normal(6, KV_HEADS, 3, D_VALUE)
    step = jax.jit(cached_attention, donate_argnames="cache")
    step(*drawn(n=1), make_cache(EXACT, global_keys=(keys, values)))
    assert not keys.is_deleted()


@pytest.mark.slow
def test_a_cache_with_all_of_it_can_be_exported():
    cache = make_cache(
        AttentionOptions(EXACT, rotary=ROTARY), keep_first=2, global_keys=(jnp.ones((3, D)), jnp.ones((3, D_VALUE)))
    )
    arrays = drawn(n=1)
    exported = jax.export.export(jax.jit(cached_attention))(*arrays, cache)
    read = jax.export.deserialize(exported.serialize())
    assert_close(read.call(*arrays, cache), cached_attention(*arrays, cache))


@pytest.mark.slow
@pytest.mark.parametrize("qk_rmsnorm", [False, True])
def test_memory_tokens_are_learned_global_keys(qk_rmsnorm):
    """Decoding uses them like the forward, and they have one entry per head of keys and values."""
    module = LocalMHA(
        12,
        5,
        heads=4,
        kv_heads=2,
        dim_head=8,
        dim_value=6,
        causal=True,
        memory_tokens=3,
        qk_rmsnorm=qk_rmsnorm,
        attention_sinks=True,
    )
    x = normal(0, B, 23, 12)
    variables = module.init(jax.random.key(0), x)
    params = variables["params"]
    assert params["memory_k"].shape == (2, 3, 8)
    assert params["memory_v"].shape == (2, 3, 6)
    assert params["to_qkv"]["kernel"].shape == (12, 4 * 8 + 2 * 8 + 2 * 6)
    assert params["to_out"]["kernel"].shape == (4 * 6, 12)
    whole = module.apply(variables, x)
    cache, outs, step = module.init_cache(B), [], jax.jit(lambda x, cache: module.apply(variables, x, cache=cache))
    for at in range(23):
        out, cache = step(x[:, at : at + 1], cache)
        outs.append(out)
    assert_close(jnp.concatenate(outs, 1), whole)
    gradients = jax.grad(lambda variables: (module.apply(variables, x) * x).sum())(variables)["params"]
    assert all(np.abs(gradients[name]).max() > 1e-4 for name in ("memory_k", "memory_v"))
    silent = variables | {"params": params | {"memory_v": params["memory_v"] + 100.0}}
    assert np.abs(module.apply(silent, x) - whole).max() > 1


@pytest.mark.slow
def test_a_model_has_memory_tokens_in_every_layer():
    model = LocalTransformer(
        num_tokens=16,
        max_seq_len=64,
        dim=16,
        depth=2,
        heads=2,
        dim_head=8,
        local_attn_window_size=(4, None),
        memory_tokens=2,
    )
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 16, (B, 24)))
    variables = model.init(jax.random.key(0), tokens)
    assert all(variables["params"][f"layers_{at}"]["attn"]["memory_k"].shape == (2, 2, 8) for at in range(2))
    whole, cache = model.apply(variables, tokens), model.init_cache(B)
    step = jax.jit(lambda token, cache: model.apply(variables, token, cache=cache))
    for at in range(24):
        logits, cache = step(tokens[:, at : at + 1], cache)
        assert_close(logits[:, 0], whole[:, at])


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"dim_value": 0}, "`dim_value` must be at least 1"),
        ({"memory_tokens": -1}, "`memory_tokens` must be at least 0"),
    ],
)
def test_wrong_fields_are_refused(fields, phrase):
    with pytest.raises(ValueError, match=phrase):
        LocalMHA(12, 5, **fields).init(jax.random.key(0), normal(0, 1, 3, 12))
