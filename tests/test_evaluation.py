"""Scoring predicts every byte of a split but the first once, from all that the model can see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import evaluation
from examples.evaluation import build_evaluation, cut_carried, cut_overlapping, describe_context, receptive_field
from examples.training import IGNORED
from tests.example_runs import mesh_of, one_device, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_once")

LENGTHS = (2, 31, 32, 33, 100, 699)
NOISE = np.random.default_rng(5).integers(0, 256, 699, dtype=np.uint8)
OPTIONS = ("--depth=2", "--heads=4", "--kv-heads=2", "--windows=8,5")
UNLIMITED = {
    "global": ("--windows=global",),
    "positions": ("--abs-pos-emb",),
    "mixed": ("--depth=2", "--windows=8,global"),
}


@functools.cache
def loud_model(*options):
    """Return a configuration, a model, and parameters with which predictions depend on the whole context."""
    config, model, state = tiny_model(*options)
    return config, model, jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, state.params)


@functools.cache
def scorer(options, shape):
    config, model, params = loud_model(*options)
    return functools.partial(build_evaluation(model, config, mesh_of(shape, config)), params)


@functools.cache
def bits_of_one_forward():
    """Return the bits of each byte of `NOISE` but the first, from a single forward."""
    _, model, params = loud_model(*OPTIONS)
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(NOISE[None, :-1], jnp.int32))[0]
    return bits_of(np.asarray(logits, np.float64), NOISE[1:])


def bits_of(logits, labels):
    """Return `-log2 p(label)` of each row."""
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return (log_sum - np.take_along_axis(logits, labels[:, None].astype(int), -1)[:, 0]) / np.log(2)


@pytest.mark.slow_but("33")
@pytest.mark.parametrize("length", LENGTHS)
def test_a_carried_score_is_that_of_one_forward_of_all(length):
    bits, scored = scorer(OPTIONS, (1, 1, 1))(NOISE[:length])
    assert scored == length - 1
    np.testing.assert_allclose(bits, bits_of_one_forward()[: length - 1].mean(), rtol=1e-5)


def test_a_carried_score_is_that_of_each_byte_with_its_context_alone():
    config, model, params = loud_model(*OPTIONS)
    context = receptive_field(config)
    assert context == 8 + 5 + 1
    ends = np.arange(context, 120)
    windows = NOISE[ends[:, None] - context + np.arange(context)]  # [bytes, context], without the predicted byte
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(windows, jnp.int32))[:, -1]
    bits = bits_of(np.asarray(logits, np.float64), NOISE[ends])
    np.testing.assert_allclose(bits, bits_of_one_forward()[ends - 1], atol=1e-3)
    shorter = jax.jit(model.apply)({"params": params}, jnp.asarray(windows[:, 1:], jnp.int32))[:, -1]
    assert np.abs(bits_of(np.asarray(shorter, np.float64), NOISE[ends]) - bits).max() > 1e-3  # no shorter one
    _, scored = scorer(OPTIONS, (1, 1, 1))(NOISE[:120])
    assert scored == 119


@pytest.mark.slow_but("overlapping-(1, 2, 1)")
@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 2, 1), (3, 2, 1), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("options", [OPTIONS, ("--heads=2", "--windows=global")], ids=["carried", "overlapping"])
def test_a_score_is_the_same_on_any_mesh(shape, options):
    for length in (33, 699):
        found, expected = scorer(options, shape)(NOISE[:length]), scorer(options, (1, 1, 1))(NOISE[:length])
        assert found.scored == expected.scored == length - 1
        np.testing.assert_allclose(found.bits, expected.bits, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNLIMITED)
def test_a_model_that_sees_without_limit_is_scored_on_sequences_that_overlap(name, monkeypatch):
    config, model, params = loud_model(*UNLIMITED[name])
    assert receptive_field(config) is None
    assert describe_context(config) == "each predicted from the 16 to 32 bytes before it"
    monkeypatch.setattr(evaluation, "score_carried", lambda *_: pytest.fail("a cache was carried"))
    monkeypatch.setattr(evaluation, "build_carried_loss", lambda *_: pytest.fail("a cache was carried"))
    score = build_evaluation(model, config, one_device())
    apply = jax.jit(model.apply)
    for length in LENGTHS:
        data = NOISE[:length]
        bits, scored = score(params, data)
        assert scored == length - 1
        if length > 100:
            continue
        expected, done = [], 0  # number of bytes scored
        for start in range(0, length, 16):
            tokens = data[start : start + 33]
            if start + len(tokens) - 1 <= done:
                break
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(tokens) - 1] = tokens[:-1]
            logits = np.asarray(apply({"params": params}, padded)[0], np.float64)
            new = bits_of(logits[: len(tokens) - 1], tokens[1:])[done - start :]
            expected, done = [*expected, *new], done + len(new)
        assert done == length - 1
        np.testing.assert_allclose(bits, np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("way", ["carried", "overlapping"])
def test_each_byte_but_the_first_is_a_label_once_and_stands_after_its_context(length, rows, way):
    chunk, context = 32, 14
    data = (np.arange(length) % 251).astype(np.uint8)
    places = np.arange(length)
    if way == "carried":
        batches = list(cut_carried(data, rows, chunk, context, one_device()))
    else:
        batches = list(cut_overlapping(data, rows, chunk, one_device()))
    assert {part.shape for batch in batches for part in batch} == {(rows, chunk)}
    tokens, labels = (np.stack([batch[part] for batch in batches]) for part in (0, 1))
    counted = labels != IGNORED
    assert counted.sum() == length - 1
    assert np.bincount(labels[counted], minlength=251).tolist() == np.bincount(data[1:], minlength=251).tolist()
    np.testing.assert_array_equal((tokens[counted] + 1) % 251, labels[counted])
    if way == "carried" and length <= 251:  # each byte equals its index
        for row in range(rows):
            read = tokens[:, row].reshape(-1)
            is_label = counted[:, row].reshape(-1)
            if is_label.any():
                first = read[np.argmax(is_label)]
                before = read[: np.argmax(is_label)]
                np.testing.assert_array_equal(before, places[max(0, first - context) : first])


@pytest.mark.slow_but("1-2")
@pytest.mark.parametrize(
    ("windows", "expected"), [("8", 9), ("8,5", 14), ("1", 2), ("8,global", None), ("global", None)]
)
def test_a_byte_depends_on_as_much_as_the_windows_of_its_layers_reach(windows, expected):
    depth = windows.count(",") + 1
    config, model, params = loud_model(f"--depth={depth}", f"--windows={windows}")
    assert receptive_field(config) == expected
    if expected is not None:
        tokens = NOISE[:40].astype(np.int32)
        other = np.where(np.arange(40) < 40 - expected, 0, tokens)
        further = np.where(np.arange(40) < 41 - expected, 0, tokens)
        apply = jax.jit(model.apply)
        whole, same, differs = (
            apply({"params": params}, jnp.asarray(row[None]))[0, -1] for row in (tokens, other, further)
        )
        np.testing.assert_allclose(same, whole, rtol=1e-5, atol=1e-5)
        assert np.abs(differs - whole).max() > 1e-4
        assert f"the {expected} bytes before it" in describe_context(config)
