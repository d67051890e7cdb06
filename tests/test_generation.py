"""Generation against the forward, and the frequencies of sampled tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from flax_local_attention import LocalTransformer, Window, generate, generation, stack_layers, stream
from flax_local_attention.sampling import Sampling
from tests.cases import assert_close
from tests.original import filled_variables

TINY = {
    "num_tokens": 11,
    "max_seq_len": 64,
    "dim": 8,
    "depth": 2,
    "local_attn_window_size": 3,
    "dim_head": 4,
    "heads": 2,
    "num_residual_streams": 1,
}


def tiny(**options):
    """Return a tiny model and random parameters."""
    model = LocalTransformer(**TINY | options)
    return model, filled_variables(model, jnp.zeros((1, 1), jnp.int32))


@pytest.fixture(scope="module")
def small():
    """The model of most tests, shared so that equal shapes compile once."""
    return tiny()


PROMPT = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
MASK = jnp.array([[0, 1, 1, 1, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], bool)
RNG = jax.random.key(7)


# Sampling


class Bigram(nn.Module):
    """A stand-in for a model: the logits of the next token depend only on the last one."""

    logits: tuple
    num_tokens: int = 3
    causal: bool = True
    use_abs_pos_emb: bool = False

    @nn.compact
    def __call__(self, x, mask=None, cache=None, deterministic=True, segment_ids=None):
        return jnp.array(self.logits)[x], cache

    @nn.nowrap
    def init_cache(self, batch, dtype=None, max_length=None):
        return jnp.zeros(batch)


def frequencies(probabilities, **options):
    """Return the frequency of each token, sampled from one distribution in many rows."""
    model = Bigram(logits=(tuple(float(x) for x in np.log(probabilities)),) * 3)
    tokens, _ = generate(model, {}, np.zeros((4000, 1), np.int32), 5, rng=RNG, **options)
    return np.bincount(np.asarray(tokens).ravel(), minlength=3) / tokens.size


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.2]),
        ({"temperature": 0.5}, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        ({"top_k": 2}, [0.625, 0.375, 0]),
        ({"top_p": 0.4}, [1, 0, 0]),
        ({"min_p": 0.5}, [0.625, 0.375, 0]),
        ({"temperature": 0.5, "min_p": 0.5}, [1, 0, 0]),  # temperature comes first
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_the_rules_say(options, expected):
    """20,000 samples: four standard deviations are at most 0.014."""
    np.testing.assert_allclose(frequencies([0.5, 0.3, 0.2], **options), expected, atol=0.015)


# Generation against the forward


def uncached_greedy(model, variables, prompt, length):
    """Continue greedily by a forward over all tokens so far, padded to one shape: later tokens change nothing."""
    b, n = prompt.shape
    tokens = jnp.zeros((b, n + length), jnp.int32).at[:, :n].set(prompt)

    @jax.jit
    def run(tokens):
        def advance(at, tokens):
            newest = model.apply(variables, tokens[:, :-1])[:, at - 1]
            return tokens.at[:, at].set(jnp.argmax(newest, axis=-1))

        return lax.fori_loop(n, n + length, advance, tokens)

    return run(tokens)[:, n:]


@pytest.mark.slow_but("defaults")
@pytest.mark.parametrize(
    "options",
    [
        {"num_residual_streams": 4},
        pytest.param({"use_dynamic_pos_bias": True, "exact_windowsize": False}, marks=pytest.mark.exhaustive),
        {
            "use_abs_pos_emb": False,
            "use_xpos": True,
            "qk_rmsnorm": True,
            "gate_values_per_head": True,
            "shared_qk": True,
            "num_residual_streams": 2,
        },
    ],
    ids=["defaults", "dynamic_bias_plain", "many_options"],
)
def test_cached_greedy_generation_equals_uncached(options):
    model, variables = tiny(**options)
    tokens, lengths = generate(model, variables, PROMPT, 12, temperature=0.0)
    np.testing.assert_array_equal(tokens, uncached_greedy(model, variables, PROMPT, 12))
    np.testing.assert_array_equal(lengths, 12)
    assert len(np.unique(tokens)) > 3


@pytest.mark.slow
def test_cached_greedy_generation_equals_uncached_on_a_trained_model():
    model = LocalTransformer(**TINY | {"depth": 1})
    batch = (jnp.arange(32) + jnp.arange(8)[:, None]) ** 2 % 11
    variables = jax.jit(model.init)(jax.random.key(0), batch[:, :1])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(variables):
        def step(state, _):
            variables, moments = state
            loss, gradient = jax.value_and_grad(model.apply)(variables, batch, return_loss=True)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(variables, updates), moments), loss

        return lax.scan(step, (variables, optimizer.init(variables)), length=30)

    (variables, _), losses = train(variables)
    assert losses[-1] < losses[0] / 2
    prompt = batch[:3, :5]
    tokens, _ = generate(model, variables, prompt, 12, temperature=0.0)
    np.testing.assert_array_equal(tokens, uncached_greedy(model, variables, prompt, 12))


@pytest.mark.slow
def test_a_prompt_longer_than_a_chunk_of_prefill_continues_as_if_taken_at_once(monkeypatch):
    model, variables = tiny(use_abs_pos_emb=False, depth=1)
    prompt = jnp.asarray(np.random.RandomState(0).randint(0, 11, (2, 17)))
    lengths = [17, 3]
    whole, _ = generate(model, variables, prompt, 6, temperature=0.0, prompt_lengths=lengths)
    monkeypatch.setattr(generation, "PREFILL_CHUNKS", (5, 5))
    jax.clear_caches()
    chunked, _ = generate(model, variables, prompt, 6, temperature=0.0, prompt_lengths=lengths)
    jax.clear_caches()
    np.testing.assert_array_equal(chunked, whole)
    np.testing.assert_array_equal(whole[:1], uncached_greedy(model, variables, prompt[:1], 6))


@pytest.mark.parametrize(
    ("b", "n", "num_tokens", "chunk"),
    [(1, 3, 256, 3), (1, 4096, 256, 4096), (1, 4097, 256, 2112), (4, 4200, 256, 2112), (1, 2000, 32000, 512)],
)
def test_long_prompts_are_taken_in_even_parts(b, n, num_tokens, chunk):
    assert generation._prefill_chunk(b, n, num_tokens) == chunk


@pytest.mark.slow
def test_a_model_whose_layer_sees_all_generates_as_it_reads():
    model, variables = tiny(local_attn_window_size=(None,), depth=1, use_abs_pos_emb=False)
    tokens, _ = generate(model, variables, PROMPT, 12, temperature=0.0)
    np.testing.assert_array_equal(tokens, uncached_greedy(model, variables, PROMPT, 12))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_model_inside_nnx_generates_by_its_parameters_as_a_plain_tree():
    model, _ = tiny(depth=1)
    module = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(PROMPT)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    tokens, _ = generate(module.to_nnx__module, {"params": params}, PROMPT, 5, temperature=0.0)
    everything = jnp.concatenate([PROMPT, tokens], axis=1)
    np.testing.assert_array_equal(tokens, module(everything)[:, 4:-1].argmax(-1))


# Rows, seeds and ends


@pytest.mark.slow
def test_prompts_of_unequal_length_continue_as_each_alone(small):
    model, variables = small
    lengths = [2, 5, 1]
    tokens, _ = generate(model, variables, PROMPT, 12, temperature=0.0, prompt_lengths=lengths)
    for row, length in enumerate(lengths):
        alone, _ = generate(model, variables, PROMPT[row : row + 1, :length], 12, temperature=0.0)
        np.testing.assert_array_equal(tokens[row], alone[0])


@pytest.mark.slow
def test_what_stands_behind_a_short_prompt_does_not_matter(small):
    model, variables = small
    dirty = PROMPT.at[0, 2:].set(99).at[2, 1:].set(-1)
    expected, _ = generate(model, variables, PROMPT, 12, rng=RNG, prompt_lengths=[2, 5, 1])
    tokens, _ = generate(model, variables, dirty, 12, rng=RNG, prompt_lengths=jnp.array([2, 5, 1]))
    np.testing.assert_array_equal(tokens, expected)


MASKS = {
    "left": jnp.array([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], bool),
    "holes": jnp.array([[0, 1, 0, 1, 0], [1, 0, 0, 1, 1], [1, 0, 0, 0, 0]], bool),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", [generate, lambda *args, **options: (jnp.stack(list(stream(*args, **options)), 1),)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_prompts_padded_anywhere_continue_as_each_alone(small, mask, run):
    model, variables = small
    dirty = jnp.where(mask, PROMPT, 99)
    tokens = run(model, variables, dirty, 12, temperature=0.0, prompt_mask=mask)[0]
    for row in range(3):
        alone, _ = generate(model, variables, PROMPT[row : row + 1, mask[row]], 12, temperature=0.0)
        np.testing.assert_array_equal(tokens[row], alone[0])


def test_tokens_of_a_long_prompt_with_holes_keep_their_order():
    prompt = np.random.RandomState(0).randint(0, 11, (2, 50))
    mask = np.random.RandomState(1).rand(2, 50) > 0.4
    taken, lengths = generation._move_left(prompt, None, mask)
    for row in range(2):
        np.testing.assert_array_equal(taken[row, : lengths[row]], prompt[row, mask[row]])


@pytest.mark.slow
def test_generation_inside_jit_and_vmap_is_that_outside(small):
    model, variables = small
    lengths = jnp.array([5, 2, 4])

    def answer(prompt, lengths, cache):
        return generate(model, variables, prompt, 6, rng=RNG, eos=3, prompt_lengths=lengths, cache=cache)

    expected = answer(PROMPT, lengths, model.init_cache(3))
    assert_close(jax.jit(answer)(PROMPT, lengths, model.init_cache(3)), expected)
    greedy = partial(generate, model, variables, length=6, temperature=0.0)
    mapped = jax.vmap(lambda prompt, mask: greedy(prompt, prompt_mask=mask))(PROMPT[:, None], MASK[:, None])
    np.testing.assert_array_equal(mapped[0][:, 0], greedy(PROMPT, prompt_mask=MASK)[0])


def test_traced_prompts_of_wrong_shape_or_dtype_are_refused_and_no_stream_takes_one(small):
    model, variables = small
    for phrase, prompt in (("must be integers", PROMPT * 1.0), (r"\[b, n\]", PROMPT[0]), ("fit `max_seq_len`", PROMPT)):
        with pytest.raises((TypeError, ValueError), match=phrase):
            jax.jit(lambda prompt: generate(model, variables, prompt, 10**4, temperature=0.0))(prompt)
    with pytest.raises(TypeError, match="in a compiled function call `generate`"):
        jax.jit(lambda prompt: next(stream(model, variables, prompt, 2, temperature=0.0)))(PROMPT)


def test_prompts_of_one_shape_take_one_program_whatever_their_longest(small):
    model, variables = small
    greedy = partial(generate, model, variables, PROMPT, 4, temperature=0.0)
    greedy(prompt_lengths=np.array([1, 2, 2]))
    programs = [generation._prefill, generation._decode, generation._move_left]
    counts = [program._cache_size() for program in programs]
    for longest in (3, 4, 5):
        greedy(prompt_lengths=np.array([1, longest, 2]))
    assert [program._cache_size() for program in programs] == counts


@pytest.mark.slow
def test_a_prompt_of_bytes_continues_as_the_numbers_that_they_are():
    model, variables = tiny(num_tokens=256, depth=1)
    narrow = np.array([[255, 3, 255, 255, 0], [255, 254, 255, 1, 255]], np.uint8)
    expected, _ = generate(model, variables, narrow.astype(np.int32), 12, temperature=0.0)
    tokens, _ = generate(model, variables, narrow, 12, temperature=0.0)
    assert tokens.dtype == jnp.uint8
    np.testing.assert_array_equal(tokens.astype(int), expected)
    streamed = np.stack(list(stream(model, variables, narrow, 12, temperature=0.0, eos=255)), axis=1)
    ended = np.asarray(generate(model, variables, narrow, 12, temperature=0.0, eos=255)[0])
    np.testing.assert_array_equal(streamed, ended[:, : streamed.shape[1]])


@pytest.mark.slow
def test_a_prompt_whose_last_chunk_reaches_beyond_max_seq_len_has_no_nan():
    """With 600 tokens the second chunk of 512 ends at 1,024, beyond all positions: its padding needs none."""
    model, variables = tiny(max_seq_len=620, depth=1)
    prompt = jnp.asarray(np.random.RandomState(0).randint(0, 11, (1, 600)))
    with jax.debug_nans(True):
        tokens, _ = generate(model, variables, prompt, 20, temperature=0.0)
    np.testing.assert_array_equal(tokens[:, :4], uncached_greedy(model, variables, prompt, 4))


def test_seeds_reproduce_and_differ(small):
    model, variables = small
    tokens = [np.asarray(generate(model, variables, PROMPT, 12, rng=jax.random.key(seed))[0]) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert (tokens[0] != tokens[2]).any()


def test_equal_prompts_are_continued_in_different_ways(small):
    model, variables = small
    tokens, _ = generate(model, variables, jnp.tile(PROMPT[:1], (3, 1)), 12, rng=RNG)
    assert len(np.unique(np.asarray(tokens), axis=0)) == 3


@pytest.mark.slow
def test_a_row_is_drawn_alike_whatever_stands_beside_it(small):
    model, variables = small
    three, _ = generate(model, variables, PROMPT, 12, rng=RNG)
    other, _ = generate(model, variables, PROMPT.at[2].set(0), 12, rng=RNG)
    np.testing.assert_array_equal(three[:2], other[:2])
    one, _ = generate(model, variables, PROMPT[:1], 12, rng=RNG)
    np.testing.assert_array_equal(three[:1], one)


@pytest.mark.slow
def test_temperature_zero_takes_the_likeliest_and_needs_no_key(small):
    model, variables = small
    greedy, _ = generate(model, variables, PROMPT, 12, temperature=0.0)
    logits = model.apply(variables, PROMPT)
    np.testing.assert_array_equal(greedy[:, 0], logits[:, -1].argmax(-1))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        nearly, _ = generate(model, variables, PROMPT, 12, rng=RNG, **options)
        np.testing.assert_array_equal(nearly, greedy)


COUNTING = Bigram(logits=((0.0, 9.0, 0.0), (0.0, 0.0, 9.0), (9.0, 0.0, 0.0)))  # 0, 1, 2, 0, 1, 2, ...


def test_rows_stop_at_eos_and_hold_it_from_there_on():
    tokens, lengths = generate(COUNTING, {}, np.array([[1], [0], [2]]), 5, temperature=0.0, eos=2)
    np.testing.assert_array_equal(tokens, [[2, 2, 2, 2, 2], [1, 2, 2, 2, 2], [0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(lengths, [1, 2, 3])


def test_an_eos_in_the_prompt_ends_nothing_and_without_eos_none_ends():
    tokens, lengths = generate(COUNTING, {}, np.array([[2]]), 2, temperature=0.0, eos=2)
    np.testing.assert_array_equal(tokens, [[0, 1]])
    np.testing.assert_array_equal(lengths, [2])
    tokens, lengths = generate(COUNTING, {}, np.array([[0]]), 5, temperature=0.0)
    np.testing.assert_array_equal(tokens, [[1, 2, 0, 1, 2]])
    np.testing.assert_array_equal(lengths, [5])


def test_each_of_several_tokens_ends_a_row_and_the_first_fills_it():
    tokens, lengths = generate(COUNTING, {}, np.array([[1], [0], [2]]), 4, temperature=0.0, eos=[2, 1])
    np.testing.assert_array_equal(tokens, [[2, 2, 2, 2], [1, 2, 2, 2], [0, 1, 2, 2]])
    np.testing.assert_array_equal(lengths, [1, 1, 2])
    for eos in ((2, 1), np.array([2, 1]), jnp.array([2, 1])):
        same = list(stream(COUNTING, {}, np.array([[1], [0], [2]]), 4, temperature=0.0, eos=eos))
        np.testing.assert_array_equal(np.stack(same, axis=1), tokens[:, :2])
    assert Sampling.create(eos=[2]) == Sampling.create(eos=2)
    assert Sampling.create(eos=[]) == Sampling.create()


def test_stream_yields_the_tokens_of_generate(small):
    model, variables = small
    options = {"rng": RNG, "top_k": 5, "top_p": 0.9, "prompt_lengths": [2, 5, 1]}
    expected, _ = generate(model, variables, PROMPT, 12, **options)
    tokens = list(stream(model, variables, PROMPT, 12, **options))
    assert len(tokens) == 12
    np.testing.assert_array_equal(np.stack(tokens, axis=1), expected)


def test_stream_ends_when_all_rows_have():
    tokens = list(stream(COUNTING, {}, np.array([[1], [0]]), 9, temperature=0.0, eos=2))
    np.testing.assert_array_equal(np.stack(tokens, axis=1), [[2, 2], [1, 2]])


def test_tokens_have_the_dtype_of_the_prompt(small):
    model, variables = small
    for dtype in (np.uint8, np.int32):
        tokens, lengths = generate(model, variables, np.asarray(PROMPT, dtype), 12, temperature=0.0)
        assert tokens.dtype == dtype
        assert lengths.dtype == jnp.int32
        assert next(stream(model, variables, np.asarray(PROMPT, dtype), 12, temperature=0.0)).dtype == dtype


@pytest.mark.slow
def test_a_model_with_a_loop_over_layers_generates_the_same_tokens(small):
    model, variables = small
    options = {"rng": RNG, "top_k": 5, "prompt_lengths": [2, 5, 1]}
    expected, _ = generate(model, variables, PROMPT, 12, **options)
    looped, stacked = model.clone(scan_layers=True), stack_layers(variables)
    tokens, _ = generate(looped, stacked, PROMPT, 12, **options)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(np.stack(list(stream(looped, stacked, PROMPT, 12, **options)), axis=1), expected)
    again = jax.tree.map(jnp.array, stacked)
    assert compilations(lambda: generate(looped.clone(), again, PROMPT, 12, **options)) == 0


@pytest.mark.parametrize("eos", [4, np.int64(4), np.uint8(4)], ids=lambda eos: type(eos).__name__)
def test_tokens_are_int32_whatever_type_eos_is_of(eos):
    with jax.enable_x64(True):
        logits, done = jnp.zeros((3, 5)), jnp.array([True, False, False])
        token, _ = generation._draw_and_end(logits, done, Sampling.create(0.0, eos=eos), None, 0)
    assert token.dtype == jnp.int32
    np.testing.assert_array_equal(token, [4, 0, 0])


# Log-probabilities


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"rng": RNG, "temperature": 0.7, "top_k": 3}], ids=str)
@pytest.mark.usefixtures("quick_compile")
def test_log_probabilities_are_those_of_the_models_own_distribution(small, options):
    """With any sampling rules, and 0 after the end of a row."""
    model, variables = small
    starts = np.array([2, 5, 1])
    options = options | {"prompt_lengths": starts, "eos": (4, 0)}
    tokens, lengths, log_probs = generate(model, variables, PROMPT, 12, return_log_probs=True, **options)
    expected, same = generate(model, variables, PROMPT, 12, **options)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(lengths, same)
    assert len(set(lengths.tolist())) > 1
    assert log_probs.dtype == jnp.float32
    whole, _ = joined((PROMPT, starts), (tokens, lengths))
    log_p = jax.nn.log_softmax(jax.jit(model.apply)(variables, whole))
    for row, (start, own) in enumerate(zip(starts, lengths, strict=True)):
        labels = whole[row, start : start + own]
        assert_close(log_probs[row, :own], log_p[row, np.arange(start - 1, start + own - 1), labels])
        np.testing.assert_array_equal(log_probs[row, own:], 0)


# Continuing a cache


NEXT = PROMPT[::-1, :4]
TURNS = {
    "absolute": {"depth": 1},
    "unlimited": {"use_abs_pos_emb": False, "max_seq_len": 1, "use_xpos": True, "exact_windowsize": False},
}


def joined(*parts):
    """Join the first tokens of each row from pairs (tokens ``[b, n]``, counts); also return the total counts."""
    rows = [np.concatenate([tokens[row, : count[row]] for tokens, count in parts]) for row in range(3)]
    lengths = np.array([len(row) for row in rows])
    return np.stack([np.pad(row, (0, lengths.max() - len(row))) for row in rows]), lengths


@pytest.mark.slow
@pytest.mark.parametrize("fields", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"rng": RNG}], ids=["greedy", "sampled"])
@pytest.mark.usefixtures("quick_compile")
def test_two_turns_equal_one_call_on_all_tokens(fields, options):
    """Rows end at different places and have prompts of different lengths."""
    model, variables = tiny(**fields)
    options = options | {"eos": (4, 0, 10), "return_log_probs": True}
    first, second = np.array([2, 5, 1]), np.array([3, 1, 4])
    tokens, lengths, _, cache = generate(
        model, variables, PROMPT, 8, prompt_lengths=first, cache=model.init_cache(3), **options
    )
    assert len(set(lengths.tolist())) > 1
    np.testing.assert_array_equal(cache.length, lengths + first)

    *results, grown = generate(model, variables, NEXT, 6, prompt_lengths=second, cache=cache, **options)
    prompt, counts = joined((PROMPT, first), (tokens, lengths), (NEXT, second))
    at_once = generate(model, variables, prompt, 6, prompt_lengths=counts, **options)
    np.testing.assert_array_equal(results[0], at_once[0])
    np.testing.assert_array_equal(results[1], at_once[1])
    assert_close(results[2], at_once[2])
    np.testing.assert_array_equal(grown.length, counts + results[1])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_grown_cache_equals_that_of_all_tokens_read_at_once(small):
    """It holds the last new token and no filler."""
    model, variables = small
    tokens, lengths, cache = generate(
        model, variables, PROMPT, 9, rng=RNG, eos=[4, 0], cache=model.init_cache(3, rewind=2)
    )
    assert len(set(lengths.tolist())) > 1
    everything, counts = joined((PROMPT, [5] * 3), (tokens, lengths))
    mask = np.arange(everything.shape[1]) < counts[:, None]
    _, expected = model.apply(variables, everything, mask=mask, cache=model.init_cache(3, rewind=2))
    assert jax.tree.structure(cache) == jax.tree.structure(expected)
    assert_close(cache, expected)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"use_abs_pos_emb": False}], ids=["absolute", "unlimited"])
@pytest.mark.usefixtures("quick_compile")
def test_a_cache_of_documents_goes_on_with_the_last(fields):
    model, variables = tiny(depth=1, **fields)
    documents = jnp.array([[0, 0, 0, 7, 7], [5, 5, 5, 5, 5], [1, 1, 1, 1, 0]])
    _, cache = model.apply(variables, PROMPT, segment_ids=documents, cache=model.init_cache(3))
    tokens, _, grown = generate(model, variables, NEXT, 6, temperature=0.0, cache=cache)
    again, _, _ = generate(model, variables, NEXT, 6, temperature=0.0, cache=grown)
    streamed = list(stream(model, variables, NEXT, 6, temperature=0.0, cache=cache))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), tokens)
    last = np.stack([np.roll(row, -start) for row, start in zip(PROMPT, [3, 0, 4], strict=True)])
    parts = [(last, [2, 5, 1]), (NEXT, [4] * 3)]
    for new in (tokens, again):
        alone, counts = joined(*parts)
        expected, _ = generate(model, variables, alone, 6, temperature=0.0, prompt_lengths=counts)
        np.testing.assert_array_equal(new, expected)
        parts += [(new, [6] * 3), (NEXT, [4] * 3)]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_given_cache_stays_so_that_a_conversation_may_branch(small):
    model, variables = small
    *_, cache = generate(model, variables, PROMPT, 3, temperature=0.0, cache=model.init_cache(3))
    before = jax.tree.map(np.array, cache)
    once, _, _ = generate(model, variables, NEXT, 6, rng=RNG, cache=cache)
    list(stream(model, variables, NEXT, 6, rng=RNG, cache=cache))
    other, _, _ = generate(model, variables, PROMPT, 6, rng=RNG, cache=cache)
    assert not any(x.is_deleted() for x in jax.tree.leaves(cache))
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    again, _, _ = generate(model, variables, NEXT, 6, rng=RNG, cache=cache)
    np.testing.assert_array_equal(again, once)
    assert (other != once).any()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_model_with_a_loop_over_layers_goes_on_from_a_cache(small):
    model, variables = small
    looped, stacked = model.clone(scan_layers=True), stack_layers(variables)
    *_, cache = generate(looped, stacked, PROMPT, 3, temperature=0.0, cache=looped.init_cache(3))
    tokens, _, _ = generate(looped, stacked, NEXT, 6, temperature=0.0, cache=cache)
    *_, cache = generate(model, variables, PROMPT, 3, temperature=0.0, cache=model.init_cache(3))
    expected, _, _ = generate(model, variables, NEXT, 6, temperature=0.0, cache=cache)
    np.testing.assert_array_equal(tokens, expected)


# Cost


def compilations(run):
    """Count the programs that are compiled while `run` runs."""
    count = 0

    def listen(event, seconds, **_):
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(run())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [generate, lambda *args, **options: list(stream(*args, **options))], ids=["generate", "stream"]
)
def test_the_second_call_with_the_same_shapes_compiles_nothing(small, run):
    model, variables = small
    jax.clear_caches()
    options = {"top_k": 3, "eos": 4}
    first = compilations(
        lambda: run(
            model, variables, PROMPT, 12, rng=RNG, temperature=0.9, top_p=0.9, prompt_lengths=[5, 5, 2], **options
        )
    )
    assert first > 0
    other_prompt, other_rng = (PROMPT + 1) % 11, jax.random.key(8)
    prompt_lengths = [1, 5, 4]
    same_fields = LocalTransformer(**TINY)  # equal, not the same object
    second = compilations(
        lambda: run(
            same_fields,
            variables,
            other_prompt,
            12,
            rng=other_rng,
            temperature=0.7,
            top_p=0.8,
            prompt_lengths=prompt_lengths,
            **options,
        )
    )
    # Making arguments above (a key, an addition) may compile; the package must not.
    assert second == 0


@pytest.mark.slow
@pytest.mark.parametrize("run", [generate, lambda *args, **options: list(stream(*args, **options))])
def test_a_further_turn_with_the_same_shapes_compiles_nothing(small, run):
    model, variables = small
    options = {"rng": RNG, "eos": 4}
    *_, cache = generate(model, variables, PROMPT, 7, cache=model.init_cache(3), **options)
    assert compilations(lambda: run(model, variables, PROMPT, 7, cache=cache, **options)) == 0 or run is not generate
    assert compilations(lambda: run(model, variables, PROMPT, 7, cache=cache, **options)) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_only_a_cache_that_is_wanted_takes_the_last_token(small):
    """Without a cache to return, no step is taken for it."""
    model, variables = small
    greedy = Sampling.create(temperature=0.0)
    for wanted, length in ((generation._Wanted(12), 16), (generation._Wanted(12, cache=True), 17)):
        logits, cache = prefilled(model, variables, 17)
        new = generation._decode(model, variables, logits, cache, greedy, None, wanted)
        np.testing.assert_array_equal(new.cache.length, length)


def cache_bytes(cache):
    return sum(x.nbytes for x in jax.tree.leaves(cache))


def prefilled(model, variables, max_length, prompt=PROMPT):
    lengths = jnp.full(prompt.shape[0], prompt.shape[1])
    return generation._prefill(model, variables, generation._Prompt(prompt, lengths), max_length, None)


@pytest.mark.slow
def test_cache_bytes_do_not_depend_on_the_length():
    model, variables = tiny(use_abs_pos_emb=False)
    sizes = {cache_bytes(prefilled(model, variables, max_length)[1]) for max_length in (6, 10**6)}
    logits, cache = prefilled(model, variables, 6)
    for length in (3, 40):
        greedy = Sampling.create(temperature=0.0)
        cache = generation._decode(model, variables, logits, cache, greedy, None, generation._Wanted(length)).cache
        sizes.add(cache_bytes(cache))
    # Per layer k, v and a segment for each of the 4 slots of an exact window of 3; once, two lengths per row,
    # and the last token's segment and its start.
    heads, d, depth, slots, rows = 2, 4, 2, 4, 3
    assert sizes == {4 * rows * (depth * (2 * heads * slots * d + slots) + 4)}


def test_generation_donates_its_cache(small, monkeypatch):
    model, variables = small
    caches, prefill = [], generation._prefill

    def spy(*args):
        logits, cache = prefill(*args)
        caches.append(cache)
        return logits, cache

    monkeypatch.setattr(generation, "_prefill", spy)
    generate(model, variables, PROMPT, 12, temperature=0.0)
    rest = stream(model, variables, PROMPT, 12, temperature=0.0)
    next(rest)
    next(rest)
    assert len(caches) == 2
    assert all(x.is_deleted() for x in jax.tree.leaves(caches))
    assert not any(x.is_deleted() for x in jax.tree.leaves((variables, PROMPT)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "plain"])
def test_a_million_tokens_end_as_a_fresh_forward_over_the_last_ones(exact):
    """Sampled, because a tiny greedy model soon repeats itself."""
    depth, w = 2, 4
    model, variables = tiny(
        use_abs_pos_emb=False, exact_windowsize=exact, local_attn_window_size=w, depth=depth, use_xpos=True
    )
    prompt, length = PROMPT[:1], 10**6
    logits, cache = prefilled(model, variables, prompt.shape[1] + length, prompt)
    before = cache_bytes(cache)
    wanted = generation._Wanted(length)
    tokens, lengths, cache, _ = generation._decode(model, variables, logits, cache, Sampling.create(), RNG, wanted)
    assert lengths[0] == length
    assert cache_bytes(cache) == before
    assert len(np.unique(tokens[0, -100:])) > 3
    logits, cache = generation._step(model, variables, tokens[:, -1], cache)
    everything = jnp.concatenate([prompt, tokens], axis=1)
    last = everything.shape[1] - 1
    assert cache.length[0] == last + 1
    window = Window(w, causal=True, exact_windowsize=exact)
    first = last
    for _ in range(depth):
        first = window.start(first)
    seen = depth * w + 1 if exact else last % w + 1 + depth * w
    assert last + 1 - first == seen
    fresh = jax.jit(partial(model.apply, variables))(everything[:, first:])
    assert_close(logits, fresh[:, -1])


# Bad input


def asked(prompt=PROMPT, length=3, options=None, variables=None, **fields):
    """Ask a tiny model to generate without variables, so that running it at all fails."""
    model = LocalTransformer(**TINY | fields)
    return model, variables, prompt, length, {"temperature": 0.0} | (options or {})


def empty(batch, **fields):
    """Return an empty cache of the tiny model or of another."""
    return LocalTransformer(**TINY | fields).init_cache(batch)


FULL = dataclasses.replace(empty(3), length=jnp.array([20, 7, 1]))

BAD_CALLS = [
    (ValueError, r"`prompt` must be \[b, n\] with at least one token", asked(PROMPT[:, :0])),
    (ValueError, r"`prompt` must be \[b, n\] with at least one token", asked(PROMPT[:0])),
    (ValueError, r"`prompt` must be \[b, n\] with at least one token", asked(PROMPT[0])),
    (TypeError, "`prompt` must be integers, got float32", asked(PROMPT * 1.0)),
    (ValueError, r"tokens in \[0, 11\), got 11", asked(PROMPT.at[1, 2].set(11))),
    (ValueError, r"tokens in \[0, 11\), got -1", asked(PROMPT.at[1, 2].set(-1))),
    (ValueError, "`length` must be at least 1, got 0", asked(length=0)),
    (ValueError, "`length` must be at least 1, got -2", asked(length=-2)),
    (TypeError, "`length` must be an int, got 2.0", asked(length=2.0)),
    (TypeError, "`length` must be an int, got True", asked(length=True)),
    (ValueError, "must fit `max_seq_len` .64., got 5 and 61", asked(length=61)),
    (ValueError, "must fit `max_seq_len` .64., got 65 and 1", asked(np.zeros((1, 65), int), 1)),
    (ValueError, "`model` must be causal and have a vocabulary", asked(causal=False)),
    (ValueError, "`model` must be causal and have a vocabulary", asked(num_tokens=None)),
    (ValueError, "`prompt_lengths` must be .3., each from 1 to 5", asked(options={"prompt_lengths": [1, 0, 2]})),
    (ValueError, "`prompt_lengths` must be .3., each from 1 to 5", asked(options={"prompt_lengths": [1, 6, 2]})),
    (ValueError, "`prompt_lengths` must be .3., each from 1 to 5", asked(options={"prompt_lengths": [1, 2]})),
    (TypeError, "`prompt_lengths` must be integers, got float", asked(options={"prompt_lengths": [1.0, 2.0, 3.0]})),
    (TypeError, "`prompt_lengths` must be integers, got bool", asked(options={"prompt_lengths": [True] * 3})),
    (TypeError, "`prompt_mask` must be bool", asked(options={"prompt_mask": PROMPT})),
    (ValueError, r"`prompt_mask` must be \[3, 5\]", asked(options={"prompt_mask": PROMPT[:2] > 0})),
    (ValueError, "with a True in each row", asked(options={"prompt_mask": MASKS["left"] & False})),
    (ValueError, "got both", asked(options={"prompt_mask": PROMPT > 0, "prompt_lengths": [1, 2, 3]})),
    (ValueError, "`temperature` must be at least 0, got -0.5", asked(options={"temperature": -0.5})),
    (ValueError, "`temperature` must be at least 0, got nan", asked(options={"temperature": float("nan")})),
    (ValueError, "`rng` must be given to sample", asked(options={"temperature": 1.0})),
    (ValueError, "`top_k` must be at least 1, got 0", asked(options={"top_k": 0})),
    (TypeError, "`top_k` must be an int, got 0.9", asked(options={"top_k": 0.9})),
    (ValueError, r"`top_p` must be in \(0, 1\], got 0.0", asked(options={"top_p": 0.0})),
    (ValueError, r"`top_p` must be in \(0, 1\], got 1.1", asked(options={"top_p": 1.1})),
    (ValueError, r"`top_p` must be in \(0, 1\], got nan", asked(options={"top_p": float("nan")})),
    (ValueError, r"`min_p` must be in \[0, 1\], got -0.1", asked(options={"min_p": -0.1})),
    (ValueError, r"`min_p` must be in \[0, 1\], got 1.5", asked(options={"min_p": 1.5})),
    (ValueError, r"`eos` must be a token in \[0, 11\), got 11", asked(options={"eos": 11})),
    (ValueError, r"`eos` must be a token in \[0, 11\), got -1", asked(options={"eos": -1})),
    (TypeError, "`eos` must be an integer or several, got True", asked(options={"eos": True})),
    (TypeError, "`eos` must be an integer or several, got 2.0", asked(options={"eos": 2.0})),
    (ValueError, r"`eos` must be a token in \[0, 11\), got 12", asked(options={"eos": [3, 12]})),
    (TypeError, "`cache` must be a TransformerCache, got an array", asked(options={"cache": PROMPT})),
    (TypeError, "`cache` must be a TransformerCache, got KVCache", asked(options={"cache": FULL.layers[0].attn})),
    (ValueError, "`cache` must have a row for each of the 3 prompts, got 2", asked(options={"cache": empty(2)})),
    (
        ValueError,
        "`cache_dtype` is for a cache that the call makes",
        asked(options={"cache": empty(3), "cache_dtype": jnp.float32}),
    ),
    (
        ValueError,
        "must fit `max_seq_len` .64., got 5 and 40 after up to 20 tokens in the cache; generate fewer",
        asked(length=40, options={"cache": FULL}),
    ),
    (
        TypeError,
        "`cache_dtype` must be a floating dtype, got .*int8",
        asked(options={"cache_dtype": jnp.int8}, variables={}),
    ),
]


@pytest.mark.parametrize(("error", "phrase", "call"), BAD_CALLS, ids=[phrase[:50] for _, phrase, _ in BAD_CALLS])
@pytest.mark.parametrize("run", [generate, stream])
def test_bad_input_is_refused_before_anything_runs(run, error, phrase, call):
    """By the stream too: at the call, not at the first token."""
    model, variables, prompt, length, options = call
    with pytest.raises(error, match=phrase):
        run(model, variables, prompt, length, **options)


class Holder(nnx.Module):
    """An NNX model that contains a transformer."""

    def __init__(self):
        self.wrapped = nnx.bridge.ToNNX(LocalTransformer(**TINY))


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda: Holder().wrapped, r"got ToNNX; .* `model\.to_nnx__module` and {'params': nnx\.to_pure_dict"),
        (Holder, r"got Holder; .* `model\.to_nnx__module` and {'params': nnx\.to_pure_dict"),
        (lambda: LocalTransformer, "got the class LocalTransformer"),
        (lambda: nn.Dense(3), "got Dense"),
        (object, "got object"),
        (lambda: None, "got NoneType"),
        (lambda: LocalTransformer(**TINY).apply, "got method|got function"),
        (lambda: LocalTransformer(**TINY).bind({}), r"not be bound .* `model, variables = model\.unbind\(\)`"),
    ],
    ids=["ToNNX", "NNX", "class", "Linen", "other", "None", "function", "bound"],
)
@pytest.mark.parametrize("run", [generate, stream])
def test_what_is_no_model_is_a_type_error_that_says_how_to_get_one(run, make, phrase):
    with pytest.raises(TypeError, match=f"^`model` must .*{phrase}"):
        run(make(), {}, PROMPT, 3, temperature=0.0)


@pytest.mark.slow
def test_a_bound_model_generates_once_it_is_unbound(small):
    bound = small[0].bind(small[1])
    model, variables = bound.unbind()
    expected, _ = generate(*small, PROMPT, 3, temperature=0.0)
    np.testing.assert_array_equal(generate(model, variables, PROMPT, 3, temperature=0.0)[0], expected)


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"depth": 3}, "`cache` must be a TransformerCache for 2 layers"),
        ({"local_attn_window_size": 5}, "`cache` must be made for this call's window"),
        ({"heads": 4}, "`cache` must have k's batch, heads and width"),
        ({"rotary": False}, "`cache` must be made for this module's options"),
    ],
    ids=str,
)
@pytest.mark.parametrize("run", [generate, stream])
def test_a_cache_of_another_model_is_refused_at_the_call(small, run, fields, phrase):
    model, variables = small
    with pytest.raises(ValueError, match=phrase):
        run(model, variables, PROMPT, 3, temperature=0.0, cache=empty(3, **fields))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_all_tokens_of_a_grown_cache_may_fill_max_seq_len(small):
    model, variables = small
    *_, cache = generate(model, variables, PROMPT, 50, temperature=0.0, cache=model.init_cache(3))
    *_, cache = generate(model, variables, NEXT, 5, temperature=0.0, cache=cache)
    np.testing.assert_array_equal(cache.length, 64)
    with pytest.raises(ValueError, match="got 1 and 1 after up to 64 tokens in the cache"):
        generate(model, variables, NEXT[:, :1], 1, temperature=0.0, cache=cache)


@pytest.mark.slow
def test_prompt_and_new_tokens_may_fill_max_seq_len(small):
    """The last token is never fed back, so it needs no position."""
    model, variables = small
    tokens, _ = generate(model, variables, PROMPT, 60, temperature=0.0)
    np.testing.assert_array_equal(tokens, uncached_greedy(model, variables, PROMPT, 60))


@pytest.mark.slow
def test_without_absolute_embeddings_there_is_no_limit():
    model, variables = tiny(use_abs_pos_emb=False, max_seq_len=8)
    tokens, _ = generate(model, variables, PROMPT, 12, temperature=0.0)
    assert tokens.shape == (3, 12)


class Opaque(nn.Module):
    """A global layer that cannot decode."""

    @nn.compact
    def __call__(self, x, mask=None):
        return x


def opaque_layer(index):
    del index
    return Opaque()


def test_a_global_layer_that_cannot_decode_is_refused():
    model, variables = tiny(global_attn_layer=opaque_layer)
    with pytest.raises(ValueError, match=r"must have `init_cache\(batch, dtype\)` .* got Opaque without"):
        generate(model, variables, PROMPT, 3, temperature=0.0)


@pytest.mark.slow
def test_windows_of_a_list_generate_as_those_of_a_tuple():
    (ours, variables), (expected, _) = (
        tiny(depth=2, local_attn_window_size=windows) for windows in ([3, None], (3, None))
    )
    prompt = jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(
        generate(ours, variables, prompt, 4, temperature=0.0)[0],
        generate(expected, variables, prompt, 4, temperature=0.0)[0],
    )
