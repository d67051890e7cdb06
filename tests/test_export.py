"""Programs for any batch size, by `jax.export` with symbolic dimensions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from flax_local_attention import (
    AttentionOptions,
    KVCache,
    LocalTransformer,
    Rotary,
    Window,
    attend_cache,
    cached_attention,
    generate,
    local_attention,
)
from tests.cases import assert_close, normal

pytestmark = pytest.mark.usefixtures("quick_compile")

pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")

WINDOW = Window(8, causal=True)
OPTIONS = AttentionOptions(WINDOW, rotary=Rotary(8))
MASK = np.arange(24) < np.array([[24], [9], [20]])


def assert_serves_any_batch(fn, *arrays):
    """Export a function with a symbolic first axis of all arrays, read it back, and call it with two batch sizes."""
    (b,) = export.symbolic_shape("b")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), arrays)
    program = export.deserialize(export.export(jax.jit(fn))(*shapes).serialize())
    for rows in (1, 3):
        given = jax.tree.map(lambda x, rows=rows: x[:rows], arrays)
        assert_close(program.call(*given), fn(*given))


ATTENTION = {
    "rotary and groups": lambda q, k: local_attention(q, k, k, window=WINDOW, rotary=Rotary(8)),
    "gradient": jax.grad(lambda q, k: local_attention(q, k, k, window=WINDOW).sum(), (0, 1)),
    "dense": lambda q, k: local_attention(q, k, k, window=WINDOW, implementation="dense"),
    "global keys": lambda q, k: local_attention(q, k, k, window=WINDOW, global_keys=(k[0, :, :2], k[0, :, :2])),
}


@pytest.mark.slow_but("gradient")
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_a_symbolic_batch(name):
    assert_serves_any_batch(ATTENTION[name], normal(0, 3, 4, 24, 8), normal(1, 3, 2, 24, 8))


@pytest.mark.slow
def test_attention_of_a_symbolic_batch_with_masks_and_documents():
    bias, sinks = normal(2, 4, 8, 16), normal(3, 4)

    def attend(q, mask, ids):
        return local_attention(q, q, q, window=WINDOW, mask=mask, segment_ids=ids, attn_bias=bias, sinks=sinks)

    assert_serves_any_batch(attend, normal(0, 3, 4, 24, 8), MASK, np.arange(24) // 9 + np.zeros((3, 1), np.int32))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 5, 300])
def test_a_cached_call_of_a_symbolic_batch(n):
    cache = KVCache.create(OPTIONS, 3, 2, 8, keep_first=1)
    assert_serves_any_batch(
        cached_attention, normal(0, 3, 4, n, 8), normal(1, 3, 2, n, 8), normal(2, 3, 2, n, 8), cache
    )


@pytest.mark.slow
def test_a_cache_is_made_inside_for_a_symbolic_batch():
    def decode(q):
        cache = KVCache.create(OPTIONS, q.shape[0], 4, 8, rewind=1)
        return attend_cache(q, cache.append(q, q))

    assert_serves_any_batch(decode, normal(0, 3, 4, 2, 8))


@pytest.mark.slow
def test_a_model_its_step_and_its_generation_of_a_symbolic_batch():
    model = LocalTransformer(16, 64, 16, 2, heads=2, dim_head=8, local_attn_window_size=(4, None))
    tokens = np.random.RandomState(0).randint(0, 16, (3, 24)).astype(np.int32)
    variables = model.init(jax.random.key(0), tokens)
    ids = np.arange(24) // 7 + np.zeros((3, 1), np.int32)

    def run(tokens, mask, ids, cache):
        logits = model.apply(variables, tokens, mask, segment_ids=ids)
        loss = model.apply(variables, tokens, return_loss=True)
        return logits, loss, model.apply(variables, tokens[:, :1], cache=cache)

    assert_serves_any_batch(run, tokens, MASK, ids, model.init_cache(3))
    assert_serves_any_batch(lambda prompt: generate(model, variables, prompt, 5, temperature=0.0), tokens)


@pytest.mark.slow
def test_a_symbolic_length_is_served_by_the_definition_alone_and_others_say_which_to_fix():
    (n,) = export.symbolic_shape("8*m")
    x = jax.ShapeDtypeStruct((2, 2, n, 8), jnp.float32)
    dense = export.export(jax.jit(lambda q: local_attention(q, q, q, window=WINDOW, implementation="dense")))(x)
    q = normal(0, 2, 2, 32, 8)
    assert_close(dense.call(q), local_attention(q, q, q, window=WINDOW))
    for implementation in (None, "xla"):
        attend = partial(local_attention, window=WINDOW, implementation=implementation)
        with pytest.raises(ValueError, match=r"`q` must have a number of tokens, .*, got 8\*m; fix that dimension"):
            export.export(jax.jit(lambda q, attend=attend: attend(q, q, q)))(x)
    with pytest.raises(ValueError, match="number of tokens when the window has no limit"):
        export.export(jax.jit(lambda q: local_attention(q, q, q, window=Window.sliding(None))))(x)
    model = LocalTransformer(16, 64, 16, 1, heads=2, dim_head=8, local_attn_window_size=4)
    variables = model.init(jax.random.key(0), jnp.ones((1, 1), jnp.int32))
    tokens = jax.ShapeDtypeStruct((2, n), jnp.int32)
    with pytest.raises(ValueError, match="fix that dimension"):
        export.export(jax.jit(partial(model.apply, variables)))(tokens)
    with pytest.raises(ValueError, match="`prompt` must have a known number of tokens"):
        export.export(jax.jit(lambda prompt: generate(model, variables, prompt, 3, temperature=0.0)))(tokens)
