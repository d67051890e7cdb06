"""The recipes use only public names, have the published sizes, and give the same results in chunks as at once.

`tests/test_published.py` compares them with the published models, where `transformers` is installed.
"""

import ast
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_local_attention
from examples.recipes import gemma3, gpt_oss, longformer, mimi, mistral, modernbert
from examples.recipes.parts import greedy
from examples.recipes.weights import load, parameters

pytestmark = pytest.mark.usefixtures("quick_compile")

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"vocab_size": 31, "num_key_value_heads": 2, "head_dim": 6, "sliding_window": 4}
DECODERS = {
    "mistral": mistral.mistral(mistral.Config(**GROUPED)),
    "gemma3": gemma3.gemma3(gemma3.Config(**GROUPED, sliding_window_pattern=2)),
    "gpt_oss": gpt_oss.gpt_oss(gpt_oss.Config(**GROUPED, num_local_experts=5, num_experts_per_tok=2)),
}


def draw(*shape):
    """Draw tokens."""
    return np.random.RandomState(0).randint(0, 31, shape)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_takes_public_names_alone(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module.startswith("flax_local_attention")]
    assert {node.module for node in ours} <= {"flax_local_attention"}
    assert {alias.name for node in ours for alias in node.names} <= set(flax_local_attention.__all__)


@pytest.mark.parametrize(
    ("model", "shape", "size"),
    [
        (mistral.mistral(mistral.Config()), (1, 1), 7_241_732_096),
        (gemma3.gemma3(gemma3.Config()), (1, 1), 999_885_952),
        (gpt_oss.gpt_oss(gpt_oss.Config()), (1, 1), 20_914_757_184),
        (modernbert.ModernBert(modernbert.Config()), (1, 1), 149_655_232),
        (longformer.Longformer(longformer.Config()), (1, 1), 148_068_864),
        (mimi.Mimi(mimi.Config()), (1, 1, 512), 25_190_400),
    ],
    ids=["mistral", "gemma3", "gpt_oss", "modernbert", "longformer", "mimi"],
)
def test_the_default_configuration_has_as_many_parameters_as_the_published_model(model, shape, size):
    x = jnp.zeros(shape, int if len(shape) == 2 else jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == size


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_in_chunks_gives_the_logits_of_the_whole(name):
    model, tokens = DECODERS[name], draw(2, 19)
    exists = np.arange(19) >= np.array([[0], [5]])
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    whole = jax.jit(model.apply)(variables, tokens, exists)
    caches, outs = model.init_cache(batch=2, max_length=19), []
    for chunk, mask in zip(np.split(tokens, [12], 1), np.split(exists, [12], 1), strict=True):
        logits, caches = jax.jit(model.apply)(variables, chunk, mask, caches)
        outs.append(logits)
    np.testing.assert_allclose(np.concatenate(outs, 1)[exists], whole[exists], atol=2e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_a_model_with_narrow_parameters_computes_in_their_dtype(name):
    def logits(key, tokens):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(key, tokens))
        return model.apply(params, tokens)

    model = DECODERS[name]
    assert jax.eval_shape(logits, jax.random.key(0), draw(1, 5)).dtype == jnp.bfloat16


@pytest.mark.slow
def test_greedy_decoding_takes_the_likeliest_token_at_each_step():
    model, prompts = DECODERS["mistral"], draw(2, 9)
    mask = np.arange(9) >= np.array([[0], [4]])
    variables = jax.jit(model.init)(jax.random.key(0), prompts)
    new = greedy(model, variables, prompts, mask, length=6)
    text = np.concatenate([prompts, new], 1)
    exists = np.concatenate([mask, np.ones_like(new, bool)], 1)
    logits = jax.jit(model.apply)(variables, text, exists)
    np.testing.assert_array_equal(new, np.argmax(logits, -1)[:, 8:-1])


@pytest.mark.slow
def test_texts_packed_in_a_row_are_encoded_as_each_by_itself():
    model = modernbert.ModernBert(modernbert.Config(**SIZES, vocab_size=31, local_attention=4))
    texts = [draw(1, 8), draw(1, 11)]
    packed, segment_ids = np.concatenate(texts, 1), np.repeat([0, 1], [8, 11])[None]
    variables = jax.jit(model.init)(jax.random.key(0), packed)
    alone = np.concatenate([jax.jit(model.apply)(variables, text) for text in texts], 1)
    logits = jax.jit(model.apply)(variables, packed, segment_ids=segment_ids)
    np.testing.assert_allclose(logits, alone, atol=2e-5)


@pytest.mark.slow
def test_a_global_token_is_seen_by_all_and_sees_all():
    config = longformer.Config(**SIZES | {"num_hidden_layers": 1}, vocab_size=31, attention_window=(4,))
    model, tokens, n = longformer.Longformer(config), draw(1, 17), 17
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    places = longformer.places_of(np.arange(n)[None] == 3)

    def reached(token):
        """Return the positions whose results change with the token at this position."""
        others = np.where(np.arange(n) == token, (tokens + 1) % 31, tokens)
        before, after = (jax.jit(model.apply)(variables, x, None, places) for x in (tokens, others))
        return set(np.flatnonzero(np.any(before != after, -1)[0]))

    assert reached(3) == set(range(n))
    assert reached(12) == {3, *range(10, 15)}


def test_places_are_those_of_global_tokens_and_the_length_fills_shorter_rows():
    global_mask = np.array([[True, False, False, True, True], [False, True, False, False, False], [False] * 5])
    np.testing.assert_array_equal(longformer.places_of(global_mask), [[0, 3, 4], [1, 5, 5], [5, 5, 5]])


@pytest.mark.slow
def test_places_that_mean_no_token_change_nothing():
    config = longformer.Config(**SIZES, vocab_size=31, attention_window=(4, 2))
    model, tokens = longformer.Longformer(config), draw(2, 11)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    states, padded = (
        jax.jit(model.apply)(variables, tokens, None, np.array(places))
        for places in ([[2, 7], [5, 11]], [[2, 7, 11, 11], [5, 11, 11, 11]])
    )
    np.testing.assert_allclose(padded, states, atol=1e-5)


@pytest.mark.slow
def test_a_stream_in_chunks_is_transformed_as_the_whole():
    model = mimi.Mimi(mimi.Config(**SIZES, sliding_window=4, layer_scale_initial_scale=1.0))
    frames = np.random.RandomState(0).standard_normal((2, 17, 24)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), frames)
    caches, outs = model.init_cache(batch=2), []
    for chunk in np.split(frames, [10], axis=1):
        out, caches = jax.jit(model.apply)(variables, chunk, caches=caches)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, 1), jax.jit(model.apply)(variables, frames), atol=2e-5)


def test_published_names_become_those_of_our_modules():
    q, k, v, o = (np.arange(6.0).reshape(shape) + 10 * i for i, shape in enumerate([(3, 2), (3, 2), (3, 2), (2, 3)]))
    tensors = {f"model.layers.7.self_attn.{name}_proj.weight": x for name, x in zip("qkvo", (q, k, v, o), strict=True)}
    tensors |= {
        "model.embed_tokens.weight": np.ones((5, 2)),
        "model.layers.7.self_attn.q_norm.weight": np.array([1.0, 2, 3, 4]),
        "model.layers.7.self_attn.k_norm.weight": np.zeros(4),
        "model.layers.7.self_attn.sinks": np.ones(1),
        "model.layers.7.mlp.up_proj.weight": np.arange(6.0).reshape(3, 2),
        "model.norm.weight": np.ones(2),
    }
    params = parameters(tensors, norm_offset=1.0, dtype=jnp.bfloat16)
    assert set(params) == {"embed_tokens", "layers_7", "norm"}
    attention = params["layers_7"]["self_attn"]
    np.testing.assert_array_equal(attention["to_qkv"]["kernel"], np.concatenate([q, k, v]).T)
    np.testing.assert_array_equal(attention["to_out"]["kernel"], o.T)
    np.testing.assert_array_equal(attention["q_scale"], [4, 6, 8, 10])  # (1 + weight) * dim_head ** 0.5
    np.testing.assert_array_equal(attention["k_scale"], [2, 2, 2, 2])
    np.testing.assert_array_equal(attention["sinks"], [1])
    np.testing.assert_array_equal(params["layers_7"]["mlp"]["up_proj"]["kernel"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(params["norm"]["scale"], [2, 2])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_weights_of_another_configuration_are_refused():
    model, wider = (mistral.mistral(mistral.Config(**GROUPED | {"hidden_size": e})) for e in (24, 28))
    params = jax.eval_shape(wider.init, jax.random.key(0), draw(1, 1))["params"]
    with pytest.raises(
        ValueError, match=r"`params` must have the model's names and shapes, got 17 that differ: embed_tokens/embed"
    ):
        load(model, params)
    params = jax.eval_shape(model.init, jax.random.key(0), draw(1, 1))["params"]
    del params["lm_head"]
    with pytest.raises(
        ValueError, match=r"got 1 that differ: lm_head/kernel None in place of \(24, 31\); build the model"
    ):
        load(model, params)
