"""Training steps are correct however they are divided among calls, and every option reaches the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from examples import trainer, training
from examples.training import IGNORED, Batch
from tests.example_runs import DATA, TEXT, assert_equal, one_device, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_once")


def bigram_loss(params, batch):
    """Return the nats and the predictions of a bigram model, a table of logits."""
    logits, counted = params["kernel"][batch.tokens] * params["scale"], batch.labels != IGNORED
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.labels, 0))
    return jnp.where(counted, nats, 0).sum(), counted.sum()


@pytest.fixture
def bigram():
    """The parameters of a bigram model."""
    return {"kernel": jax.random.normal(jax.random.key(2), (256, 256)), "scale": jnp.full((256,), 0.7)}


# ---- steps


@pytest.mark.slow
def test_accumulated_microbatches_equal_one_large_batch(bigram):
    drawn = jax.tree.map(lambda rows: rows[0], training.draw_steps(DATA, tiny_config(), 7, 1, one_device()))
    assert drawn.tokens.shape == drawn.labels.shape == (2, 3, 32)
    tokens, labels = map(np.array, drawn)
    labels[1, 0, 5:] = IGNORED  # so that microbatches have different numbers of predictions
    microbatches = Batch(jnp.asarray(tokens), jnp.asarray(labels))
    accumulated = training.accumulate(bigram_loss, bigram, microbatches)
    at_once = jax.value_and_grad(lambda params, batch: jnp.divide(*bigram_loss(params, batch)))
    expected = at_once(bigram, jax.tree.map(lambda leaf: leaf.reshape(6, 32), microbatches))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), accumulated, expected)


def test_steps_consume_their_state_decay_only_kernels_and_end_at_their_count(bigram):
    optimiser = training.build_optimiser(tiny_config())
    given = jax.tree.map(jnp.array, bigram)  # a copy, since the call donates it
    state = training.TrainState(jnp.zeros((), jnp.int32), given, optimiser.init(given))
    steps = training.build_train_steps(lambda params, batch: (jnp.zeros(()), 96), optimiser)  # no gradient, only decay
    after, nats = steps(state, Batch(*jnp.zeros((2, 4, 2, 3, 32), jnp.int32)), np.int32(3))
    assert all(leaf.is_deleted() for leaf in given.values())
    assert int(after.step) == 3
    assert np.isnan(nats).tolist() == [False, False, False, True]
    assert (jnp.abs(after.params["kernel"]) < jnp.abs(bigram["kernel"])).all()
    np.testing.assert_array_equal(after.params["scale"], bigram["scale"])


@pytest.mark.slow
@pytest.mark.parametrize("calls", [(3, 3, 1), (1,) * 7, (2, 5)], ids=str)
def test_steps_compute_the_same_however_they_are_divided_among_calls(calls):
    once, nats = take_steps((7,))
    state, parts = take_steps(calls)
    assert_equal(state, once)
    assert_equal(parts, nats)
    assert int(state.step) == 7
    assert nats[-1] < nats[0] - 1


@functools.cache
def take_steps(calls):
    """Return the state after calls of these numbers of steps, and the nats of all steps."""
    config, first, train_steps = steps_of_at_most(3 if max(calls) <= 3 else 7)
    state, losses, done = jax.tree.map(jnp.array, first), [], 0
    for count in calls:
        batches = training.draw_steps(DATA, config, done + 1, count, one_device())
        state, nats = train_steps(state, batches, np.int32(count))
        losses += np.asarray(nats)[:count].tolist()
        done += count
    return state, losses


@functools.cache
def steps_of_at_most(steps_per_call):
    """Return a configuration, its initial state and its compiled steps."""
    config = tiny_config(f"--steps-per-call={steps_per_call}")
    _, model, first = tiny_model()
    return config, first, training.build_train_steps(training.build_loss(model), training.build_optimiser(config))


# ---- batches


@pytest.mark.parametrize(("first", "count"), [(1, 4), (5, 3), (9, 1)])
def test_a_steps_sequences_depend_on_the_seed_and_its_number_alone(first, count):
    config = tiny_config("--steps-per-call=4")
    drawn = training.draw_steps(DATA, config, first, count, one_device())
    assert drawn.tokens.shape == (4, 2, 3, 32)
    for index in range(count):
        alone = training.draw_steps(DATA, config, first + index, 1, one_device())
        np.testing.assert_array_equal(drawn.tokens[index], alone.tokens[0])
    np.testing.assert_array_equal(drawn.tokens[:count, ..., 1:], drawn.labels[:count, ..., :-1])
    other = training.draw_steps(DATA, dataclasses.replace(config, seed=1), first, count, one_device())
    assert (other.tokens[:count] != drawn.tokens[:count]).any()


def test_every_place_of_the_data_may_be_drawn_and_none_beyond():
    data = np.arange(36, dtype=np.uint8)
    config = tiny_config("--steps-per-call=40")
    drawn = training.draw_steps(data, config, 1, 40, one_device())
    assert set(np.unique(drawn.tokens[..., 0])) == {0, 1, 2, 3}
    assert (drawn.labels == drawn.tokens + 1).all()


# ---- the optimiser


def test_the_learning_rate_warms_up_falls_to_a_tenth_and_stays_there():
    config = tiny_config()
    rates = np.array([training.learning_rates(config)(step) for step in range(config.steps + 4)])
    assert 0 < rates[0] < rates[1] < rates[2]
    assert np.argmax(rates) == config.warmup_steps
    np.testing.assert_allclose(rates.max(), config.learning_rate, rtol=1e-6)
    np.testing.assert_allclose(rates[12:], config.learning_rate / 10, rtol=1e-5)
    assert (np.diff(rates[2:13]) < 0).all()


@pytest.mark.parametrize(
    ("steps", "decay_steps", "warmup_steps"), [(1, 1, 0), (1, 1, 100), (5, 5, 5), (9, 3, 2), (3, 9, 2)]
)
def test_a_rate_is_between_nothing_and_its_peak(steps, decay_steps, warmup_steps):
    config = dataclasses.replace(tiny_config(), steps=steps, decay_steps=decay_steps, warmup_steps=warmup_steps)
    rates = np.array([training.learning_rates(config)(step) for step in range(12)])
    assert ((rates > 0) & (rates <= config.learning_rate * (1 + 1e-6))).all()
    if decay_steps == 9:
        longer = training.learning_rates(dataclasses.replace(config, steps=9))
        assert rates.tolist() == [longer(step) for step in range(12)]


def test_gradients_are_clipped_by_their_global_norm(bigram):
    config = tiny_config()
    optimiser = training.build_optimiser(config)
    state = optimiser.init(bigram)
    clipped = jax.tree.map(lambda leaf: leaf * config.clip_norm / optax.tree.norm(bigram), bigram)
    large, small = (optimiser.update(gradient, state, bigram)[1] for gradient in (bigram, clipped))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), large, small)


EVERY_OPTION = (
    "--depth=2", "--windows=5,global", "--heads=4", "--kv-heads=2", "--qk-norm", "--gates", "--sinks",
    "--memory-tokens=3", "--abs-pos-emb", "--residual-streams=2", "--ff-mult=2",
)  # fmt: skip


def parameters(*options):
    """Return the shapes of the parameters of a tiny model by their paths."""
    shapes = jax.eval_shape(functools.partial(training.initial_state, tiny_config(*options))).params
    return {"/".join(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}


def test_muon_takes_the_matrices_of_layers_alone():
    shapes = jax.eval_shape(functools.partial(training.initial_state, tiny_config(*EVERY_OPTION))).params
    labels = {"/".join(path): label for path, label in flatten_dict(training.muon_matrices(shapes)).items()}
    taken = {path for path, label in labels.items() if label is not None}
    assert taken == {path for path in labels if path.startswith("layers") and path.endswith("kernel")}
    matrices = {path for path, shape in parameters(*EVERY_OPTION).items() if path in taken and len(shape) == 2}
    assert matrices == taken
    others = "to_logits", "token_emb", "pos_emb", "norm", "sinks", "memory", "scale"
    assert not [path for path in taken if any(word in path.lower() for word in others)]
    assert len(taken) == 2 * 5  # per layer: qkv, gates, output, and two of the feed-forward


@pytest.mark.slow
def test_muon_changes_a_matrix_by_much_the_same_in_all_directions_and_the_rest_as_adamw():
    config = tiny_config("--learning-rate=0.01", "--warmup-steps=0", "--weight-decay=0", "--clip-norm=1e9")
    shapes = {"layers_0": {"kernel": (24, 10), "bias": (10,)}, "to_logits": {"kernel": (10, 24)}}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    leaves, tree = jax.tree.flatten(params)
    gradient = jax.tree.unflatten(tree, [random_like(leaf, seed) for seed, leaf in enumerate(leaves)])
    muon = training.build_optimiser(dataclasses.replace(config, optimizer="muon"))
    adamw = optax.adamw(training.learning_rates(config), b2=0.95, weight_decay=0.0, nesterov=True)
    update, expected = (optimiser.update(gradient, optimiser.init(params), params)[0] for optimiser in (muon, adamw))
    matrix = update["layers_0"].pop("kernel")
    values = np.linalg.svd(matrix, compute_uv=False)
    assert values.max() < 1.8 * values.min()
    given = np.linalg.svd(gradient["layers_0"]["kernel"], compute_uv=False)
    assert given.max() > 2 * given.min()
    np.testing.assert_allclose(np.sqrt(np.square(matrix).mean()), training.MUON_RMS * 0.01, rtol=0.3)
    expected["layers_0"].pop("kernel")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), update, expected)


@pytest.mark.slow
def test_muon_takes_each_of_matrices_that_are_stacked():
    optimiser = training.build_optimiser(tiny_config("--optimizer=muon"))
    gradient = {"layers": {"kernel": random_like(jnp.zeros((3, 12, 5)), 0)}}
    stacked, _ = optimiser.update(gradient, optimiser.init(gradient), gradient)
    apart = {f"layers_{index}": {"kernel": kernel} for index, kernel in enumerate(gradient["layers"]["kernel"])}
    update, _ = optimiser.update(apart, optimiser.init(apart), apart)
    for index in range(3):
        expected = update[f"layers_{index}"]["kernel"]
        np.testing.assert_allclose(stacked["layers"]["kernel"][index], expected, rtol=1e-3, atol=1e-6)


def random_like(leaf, seed):
    return jax.random.normal(jax.random.key(seed), leaf.shape)


@pytest.mark.slow
def test_muon_learns_with_every_option_of_the_model():
    config, model, state = tiny_model(
        *EVERY_OPTION, "--depth=1", "--windows=5", "--optimizer=muon", "--steps-per-call=8", "--accumulate=1"
    )
    train_steps = training.build_train_steps(training.build_loss(model), training.build_optimiser(config))
    given = jax.tree.map(jnp.array, state)
    after, nats = train_steps(given, training.draw_steps(DATA, config, 1, 8, one_device()), np.int32(8))
    assert nats[-1] < nats[0] - 1
    changed = jax.tree.map(lambda old, new: bool((old != new).any()), state.params, after.params)
    assert not [path for path, leaf in flatten_dict(changed).items() if not leaf]


# ---- the model


def test_every_option_reaches_the_model():
    model = training.build_model(tiny_config(*EVERY_OPTION))
    expected = {
        "depth": 2, "local_attn_window_size": (5, None), "heads": 4, "kv_heads": 2, "qk_rmsnorm": True,
        "gate_values_per_head": True, "attention_sinks": True, "memory_tokens": 3, "use_abs_pos_emb": True,
        "num_residual_streams": 2, "ff_mult": 2.0, "max_seq_len": 32, "causal": True,
    }  # fmt: skip
    assert {name: getattr(model, name) for name in expected} == expected
    bare = training.build_model(tiny_config("--dtype=bfloat16"))
    expected = {
        "depth": 1, "local_attn_window_size": (8,), "kv_heads": None, "qk_rmsnorm": False, "attention_sinks": False,
        "gate_values_per_head": False, "memory_tokens": 0, "use_abs_pos_emb": False, "num_residual_streams": 1,
        "dtype": jnp.bfloat16,
    }  # fmt: skip
    assert {name: getattr(bare, name) for name in expected} == expected


@pytest.mark.parametrize("option", ["--qk-norm", "--gates", "--sinks", "--memory-tokens=3", "--abs-pos-emb"])
def test_an_option_of_the_model_has_parameters_that_no_other_model_has(option):
    plain, more = parameters(), parameters(option)
    assert set(plain) < set(more)
    assert {path: more[path] for path in plain} == plain


def test_heads_of_keys_and_values_make_their_matrix_smaller():
    plain, fewer = parameters("--heads=4"), parameters("--heads=4", "--kv-heads=2")
    assert [fewer[path] for path in plain if plain[path] != fewer[path]] == [(16, (4 + 2 + 2) * 8)]


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("windows", ["8", "8,4", "8,global"])
def test_operations_are_those_of_the_weights_and_of_the_visible_pairs(windows, memory):
    config = tiny_config("--depth=2", f"--windows={windows}", f"--memory-tokens={memory}")
    shapes = jax.eval_shape(functools.partial(training.initial_state, config)).params
    weights = sum(np.prod(shape) for path, shape in parameters("--depth=2").items() if path.endswith("kernel"))
    sizes = [32 if size is None else size for size in config.layer_windows]
    pairs = sum(min(i + 1, size + 1) + memory for size in sizes for i in range(32))
    assert training.flops_per_token(config, shapes) == 6 * weights + 12 * 2 * 8 * pairs / 32


@pytest.mark.slow
def test_a_cold_sample_is_the_likeliest_continuation():
    _, model, state = tiny_model()
    apply, tokens = jax.jit(model.apply), list(TEXT[:11])
    drawn = trainer.sample(model, state.params, np.frombuffer(TEXT[:11], np.uint8), 6, temperature=0.0, seed=0)
    for place in range(10, 16):  # later tokens are zeros, which it cannot see
        padded = jnp.asarray([tokens + [0] * (17 - len(tokens))])
        tokens.append(int(apply({"params": state.params}, padded)[0, place].argmax()))
    assert list(drawn) == tokens[11:]
