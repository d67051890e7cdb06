"""The whole model: receptive field, loss, options and errors."""

import json
import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from flax_local_attention import (
    LocalTransformer,
    LossSum,
    Rotary,
    Window,
    residual_streams,
    stack_layers,
    unstack_layers,
)
from flax_local_attention.kernels import windowed
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = {
    "num_tokens": 13,
    "max_seq_len": 32,
    "dim": 8,
    "depth": 1,
    "heads": 3,
    "dim_head": 2,
    "local_attn_window_size": 4,
    "num_residual_streams": 2,
}
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, 11)))
EVERY_OPTION = {
    "use_dynamic_pos_bias": True,
    "qk_rmsnorm": True,
    "gate_values_per_head": True,
    "attention_sinks": True,
    "logits_soft_cap": 5.0,
    "kv_heads": 1,
}


def model(**fields):
    return LocalTransformer(**{**SMALL, **fields})


def random_variables(module, *inputs):
    """Return variables other than zero and one, so that results depend on each."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        tree, [jnp.asarray(np.float32(0.4) * cases.numpy_normal(seed, *leaf.shape)) for seed, leaf in enumerate(leaves)]
    )


def apply(module, variables, x, *args, **options):
    return jax.jit(lambda variables, x: module.apply(variables, x, *args, **options))(variables, x)


def cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, np.asarray(labels)[..., None], -1)[..., 0]


# Receptive field


@pytest.mark.slow_but("causal")
@pytest.mark.parametrize(
    ("window", "depth"),
    [
        (Window(3, causal=True, exact_windowsize=True), 3),
        (Window(2, exact_windowsize=True, look_backward=2), 2),
        (Window(3, causal=True), 2),
    ],
    ids=["causal-exact", "both-exact", "causal"],
)
def test_a_stack_sees_depth_times_as_far(window, depth):
    n, e = 19, 4
    module = LocalTransformer(
        num_tokens=None,
        max_seq_len=0,
        dim=e,
        depth=depth,
        heads=1,
        dim_head=4,
        causal=window.causal,
        local_attn_window_size=window.window_size,
        look_backward=window.look_backward,
        look_forward=window.look_forward,
        exact_windowsize=window.exact_windowsize,
        num_residual_streams=2,
    )
    x = cases.normal(0, 1, n, e)
    variables = random_variables(module, x)

    @jax.jit
    def dependence(x):
        return jnp.abs(jax.jacrev(lambda x: module.apply(variables, x)[0] @ cases.normal(1, e))(x)).max((1, 3))

    once = window.sees(np.arange(n)[:, None], np.arange(n))
    expected = np.linalg.matrix_power(once.astype(int), depth) > 0
    np.testing.assert_array_equal(np.asarray(dependence(x)) != 0, expected)


def test_a_causal_model_ignores_later_tokens():
    module = model()
    variables = random_variables(module, TOKENS)
    changed = TOKENS.at[:, 7:].set((TOKENS[:, 7:] + 5) % 13)
    before, after = apply(module, variables, TOKENS), apply(module, variables, changed)
    np.testing.assert_allclose(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


# Loss


def test_loss_is_the_mean_cross_entropy_of_the_next_token():
    module = model()
    variables = random_variables(module, TOKENS)
    loss = apply(module, variables, TOKENS, return_loss=True)
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    cases.assert_close(loss, cross_entropy(apply(module, variables, TOKENS)[:, :-1], TOKENS[:, 1:]).mean())


@pytest.mark.slow_but("a-token")
@pytest.mark.parametrize("ignore_index", [-1, 3, 99], ids=["negative", "a-token", "beyond-the-vocabulary"])
def test_ignored_labels_do_not_count(ignore_index):
    module = model(ignore_index=ignore_index)
    tokens = TOKENS.at[0, 8:].set(ignore_index).at[1, 2].set(ignore_index)
    variables = random_variables(module, TOKENS)
    loss, logits = apply(module, variables, tokens, return_loss=True), apply(module, variables, tokens)
    labels = np.asarray(tokens)[:, 1:]
    counted = labels != ignore_index
    losses = cross_entropy(logits[:, :-1], np.where(counted, labels, 0))
    cases.assert_close(loss, losses[counted].mean())


@pytest.mark.slow
def test_an_ignored_token_is_embedded_as_zeros():
    module = model(use_abs_pos_emb=False)
    variables = random_variables(module, TOKENS)
    embedding = variables["params"]["token_emb"]["embedding"].at[0].set(0.0)
    with_zeros = {"params": {**variables["params"], "token_emb": {"embedding": embedding}}}
    ignored = apply(module, variables, jnp.where(TOKENS == 0, 1, TOKENS).at[:, 3].set(-1))
    cases.assert_close(ignored, apply(module, with_zeros, jnp.where(TOKENS == 0, 1, TOKENS).at[:, 3].set(0)))


@pytest.mark.slow
def test_a_loss_of_nothing_is_zero():
    module = model()
    variables = random_variables(module, TOKENS)
    loss = jax.jit(
        jax.value_and_grad(lambda variables: module.apply(variables, jnp.full((1, 5), -1), return_loss=True))
    )
    value, gradient = loss(variables)
    assert value == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert module.apply(variables, TOKENS[:, :1], return_loss=True) == 0


def test_mask_affects_attention_and_not_the_loss():
    module = model()
    variables = random_variables(module, TOKENS)
    mask = jnp.ones((2, 11), bool).at[0, 3].set(False)
    masked = apply(module, variables, TOKENS, mask)
    assert np.abs(masked - apply(module, variables, TOKENS))[0, 4:].max() > 1e-4
    expected = cross_entropy(masked[:, :-1], TOKENS[:, 1:]).mean()  # the masked token is a label like any other
    cases.assert_close(apply(module, variables, TOKENS, mask, return_loss=True), expected)


LOSSES = {
    "plain": {},
    "remat": {"depth": 2, "remat": True},
    "loop": {"depth": 2, "scan_layers": True, "remat": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", LOSSES.values(), ids=LOSSES)
def test_gradients_of_unequal_batches_add_up_to_that_of_all_rows(fields):
    """With ignored labels, documents or masks, the rows have 4 and 9 labels."""
    module = model(**fields)
    tokens = TOKENS.at[0, 6:].set(-1).at[1, 9].set(99)
    mask, documents = jnp.ones((2, 11), bool).at[1, 9].set(False), jnp.zeros((2, 11), int).at[0, 3:].set(4)
    variables = random_variables(module, TOKENS)
    arrays = tokens, mask, documents

    def sum_loss(variables, tokens, mask, documents):
        return module.apply(variables, tokens, mask, segment_ids=documents, method="sum_loss")

    differentiate = jax.jit(jax.value_and_grad(sum_loss, has_aux=True))
    first, second = (differentiate(variables, *(x[row : row + 1] for x in arrays)) for row in range(2))
    assert [first[0][1], second[0][1]] == [4, 9]
    (total, count), gradient = jax.tree.map(jnp.add, first, second)

    def mean_loss(variables):
        return module.apply(variables, tokens, mask, segment_ids=documents, return_loss=True)

    expected = jax.jit(jax.value_and_grad(mean_loss))(variables)
    cases.assert_close((total / count, jax.tree.map(lambda x: x / count, gradient)), expected)
    means = [sums.mean for sums in (LossSum(*first[0]), LossSum(*second[0]))]
    assert abs(np.mean(means) - expected[0]) > 1e-3


@pytest.mark.slow
def test_a_sum_of_losses_is_that_of_all_labels_and_its_mean_the_loss():
    module = model(ff_dropout=0.5, use_xpos=True)
    variables = random_variables(module, TOKENS)
    options = {"window_size": 7, "deterministic": False, "rngs": {"dropout": jax.random.key(1)}}
    sums = apply(module, variables, TOKENS, method="sum_loss", **options)
    assert isinstance(sums, LossSum)
    assert (sums.total.dtype, sums.count.dtype) == (jnp.float32, jnp.int32)
    assert sums.count == 20
    np.testing.assert_array_equal(sums.mean, apply(module, variables, TOKENS, return_loss=True, **options))
    plain = apply(module, variables, TOKENS, method="sum_loss")
    losses = cross_entropy(apply(module, variables, TOKENS)[:, :-1], TOKENS[:, 1:])
    cases.assert_close(plain.total, losses.sum())
    assert plain.total != sums.total
    assert apply(module, variables, jnp.full((1, 5), -1), method="sum_loss") == LossSum(0, 0)


@pytest.mark.parametrize(
    ("fields", "x", "phrase"),
    [
        ({"num_tokens": None}, cases.normal(0, 2, 11, 8), "`num_tokens` must be given for the loss, got None"),
        ({"causal": False}, TOKENS, "`causal` must be True for the loss of the next token, got False"),
        ({}, TOKENS[:, :0], "`x` must have at least one token in a row for the loss, got none"),
    ],
)
def test_a_sum_of_losses_that_there_is_not_is_refused(fields, x, phrase):
    with pytest.raises(ValueError, match=phrase):
        jax.eval_shape(lambda: model(**fields).init(jax.random.key(0), x, method="sum_loss"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"mask": np.arange(11) % 4 > 0}, {"positions": np.arange(11)[None] * 2 + [[0], [3]]}],
    ids=["plain", "mask", "positions"],
)
def test_the_loss_of_given_labels_is_that_of_the_row_they_were_cut_from(options):
    module = model(ignore_index=3)
    variables = random_variables(module, TOKENS)
    options = {name: np.broadcast_to(x, TOKENS.shape) for name, x in options.items()}
    expected = apply(module, variables, TOKENS, method="sum_loss", **options)
    cut = {name: x[:, :-1] for name, x in options.items()}
    labelled = apply(module, variables, TOKENS[:, :-1], labels=TOKENS[:, 1:], method="sum_loss", **cut)
    assert labelled == expected
    assert labelled.count == (TOKENS[:, 1:] != 3).sum()


@pytest.mark.slow
def test_labels_count_across_documents_unless_the_caller_ignores_them():
    module = model()
    variables = random_variables(module, TOKENS)
    ids, expected = DOCUMENTS, apply(module, variables, TOKENS, segment_ids=DOCUMENTS, method="sum_loss")
    labels = {"all": TOKENS[:, 1:], "own": jnp.where(ids[:, 1:] == ids[:, :-1], TOKENS[:, 1:], -1)}
    sums = {
        name: apply(module, variables, TOKENS[:, :-1], labels=x, segment_ids=ids[:, :-1], method="sum_loss")
        for name, x in labels.items()
    }
    assert sums["own"] == expected
    assert [sums["own"].count, sums["all"].count] == [17, 20]


def test_given_labels_may_be_of_another_integer_dtype_and_beyond_the_vocabulary_give_nan_under_jit():
    module = model()
    variables = random_variables(module, TOKENS)
    run = jax.jit(partial(module.apply, variables, TOKENS, method="sum_loss"))
    assert run(labels=TOKENS) == run(labels=np.asarray(TOKENS, np.uint8))
    for beyond in (13, -2):
        assert np.isnan(run(labels=TOKENS.at[1, 3].set(beyond)).total)


@pytest.mark.parametrize(
    ("labels", "error", "phrase"),
    [
        (TOKENS * 1.0, TypeError, "`labels` must be integers, got float32; pass the next token"),
        (TOKENS[:, 1:], ValueError, "`labels` must be the next token of each token of x, [2, 11], got shape (2, 10)"),
        (TOKENS.at[1, 3].set(13), ValueError, "`labels` must be in [0, 13) or `ignore_index` (-1), got 13; check"),
        (TOKENS.at[1, 3].set(-2), ValueError, "got -2; check the tokenizer"),
    ],
)
def test_wrong_labels_are_refused(labels, error, phrase):
    with pytest.raises(error, match=re.escape(phrase)):
        model().init(jax.random.key(0), TOKENS, labels=labels, method="sum_loss")


CHUNKED = {
    "positions": {"use_abs_pos_emb": True},
    "layers": {"depth": 2, "local_attn_window_size": (4, 2), "use_abs_pos_emb": False},
    "every option": EVERY_OPTION | {"memory_tokens": 2, "use_xpos": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", CHUNKED.values(), ids=CHUNKED)
def test_the_losses_of_chunks_add_up_to_that_of_the_whole(fields):
    """Ignored labels are at the end of one chunk and at the end of all."""
    module = model(exact_windowsize=True, **fields)
    variables = random_variables(module, TOKENS)
    labels = TOKENS[:, ::-1].at[0, 3].set(-1).at[:, 10].set(-1)
    whole = apply(module, variables, TOKENS, labels=labels, method="sum_loss")
    cache, sums, start = module.init_cache(2), [], 0
    for size in (1, 3, 7):
        part = slice(start, start + size)
        loss, cache = apply(module, variables, TOKENS[:, part], labels=labels[:, part], cache=cache, method="sum_loss")
        assert isinstance(loss, LossSum)
        sums.append(loss)
        start += size
    assert sum(loss.count for loss in sums) == whole.count == 19
    cases.assert_close(sum(loss.total for loss in sums), whole.total)
    _, expected = apply(module, variables, TOKENS, cache=module.init_cache(2))
    jax.tree.map(cases.assert_close, cache.layers, expected.layers)


@pytest.mark.slow
def test_gradients_reach_what_a_chunk_reads_of_itself_alone():
    module = model(exact_windowsize=True)
    variables = random_variables(module, TOKENS)
    _, cache = apply(module, variables, TOKENS[:, :6], cache=module.init_cache(2))

    def nats(variables):
        loss, _ = module.apply(variables, TOKENS[:, 6:], labels=TOKENS[:, 5:-1], cache=cache, method="sum_loss")
        return loss.total

    gradient = flatten_dict(jax.jit(jax.grad(nats))(variables), sep="/")
    embedded = next(leaf for path, leaf in gradient.items() if "token_emb" in path)
    is_read = np.isin(np.arange(13), TOKENS[:, 6:])
    np.testing.assert_array_equal((embedded != 0).any(-1), is_read)


def test_a_loss_with_a_cache_needs_labels():
    module = model()
    variables = random_variables(module, TOKENS)
    phrase = "`labels` must be given with `cache`, got none: the label of a chunk's last token is in the next chunk"
    with pytest.raises(ValueError, match=re.escape(phrase)):
        apply(module, variables, TOKENS, cache=module.init_cache(2), method="sum_loss")


# Packed documents


DOCUMENTS = jnp.array([[5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]])
ENDS = ((0, 8, 11), (0, 3, 10, 11))


@pytest.mark.slow_but("none")
@pytest.mark.parametrize("fields", [{}, {"use_abs_pos_emb": False, "exact_windowsize": True}], ids=["absolute", "none"])
def test_documents_are_read_as_if_each_had_a_row_of_its_own(fields):
    """A run of equal segments is a document: absolute positions restart after each."""
    module = model(**fields)
    variables = random_variables(module, TOKENS)
    packed = apply(module, variables, TOKENS, segment_ids=DOCUMENTS)
    in_jit = jax.jit(lambda ids: module.apply(variables, TOKENS, segment_ids=ids))(DOCUMENTS)
    cases.assert_close(in_jit, packed)
    for row, ends in enumerate(ENDS):
        for start, stop in pairwise(ends[:3]):
            alone = apply(module, variables, TOKENS[row : row + 1, start:stop])
            cases.assert_close(packed[row : row + 1, start:stop], alone)


@pytest.mark.slow
def test_the_loss_of_packed_documents_is_that_of_their_rows():
    module = model()
    variables = random_variables(module, TOKENS)
    documents = DOCUMENTS.at[1, -1].set(0)
    loss = jax.jit(lambda x, ids: module.apply(variables, x, segment_ids=ids, return_loss=True))
    total = count = 0
    for row, ends in enumerate(((0, 8, 11), (0, 3, 11))):
        for start, stop in pairwise(ends):
            logits = apply(module, variables, TOKENS[row : row + 1, start:stop])
            losses = cross_entropy(logits[:, :-1], TOKENS[row : row + 1, start + 1 : stop])
            total, count = total + losses.sum(), count + losses.size
    assert count == TOKENS.size - 4
    cases.assert_close(loss(TOKENS, documents), total / count)
    cases.assert_close(module.apply(variables, TOKENS, segment_ids=documents, return_loss=True), total / count)
    one_each = jnp.broadcast_to(jnp.arange(11), (2, 11))
    assert loss(TOKENS, one_each) == 0


@pytest.mark.slow
def test_a_row_of_documents_may_be_longer_than_any_of_them():
    module = model(max_seq_len=8)
    variables = random_variables(module, TOKENS[:, :8])
    packed = apply(module, variables, TOKENS, segment_ids=DOCUMENTS)
    cases.assert_close(packed[:1, 8:], apply(module, variables, TOKENS[:1, 8:]))
    shorter = module.clone(max_seq_len=7)
    variables["params"]["pos_emb"]["embedding"] = variables["params"]["pos_emb"]["embedding"][:7]
    with pytest.raises(ValueError, match=r"at most `max_seq_len` \(7\) long, got 8 tokens"):
        shorter.apply(variables, TOKENS, segment_ids=DOCUMENTS)
    in_jit = jax.jit(lambda ids: shorter.apply(variables, TOKENS, segment_ids=ids))(DOCUMENTS)
    assert np.isnan(in_jit[0, 7]).any()  # and the tokens that see it
    assert np.isfinite(in_jit[1]).all()


# Positions


@pytest.mark.slow
def test_positions_are_where_tokens_are_embedded():
    module = model(use_dynamic_pos_bias=True)  # no rotary
    variables = random_variables(module, TOKENS)
    positions = jnp.asarray(np.random.RandomState(1).permutation(22).reshape(2, 11))
    out = apply(module, variables, TOKENS, positions=positions)
    table = variables["params"]["pos_emb"]["embedding"]
    for row in range(2):
        moved = {
            "params": variables["params"] | {"pos_emb": {"embedding": jnp.tile(table[positions[row]], (3, 1))[:32]}}
        }
        cases.assert_close(out[row], apply(module, moved, TOKENS[row : row + 1])[0])
    loss = apply(module, variables, TOKENS, positions=positions, return_loss=True)
    cases.assert_close(loss, cross_entropy(out[:, :-1], TOKENS[:, 1:]).mean())


@pytest.mark.slow_but("99")
@pytest.mark.parametrize("token", [-2, 13, 99])
def test_a_masked_token_outside_the_vocabulary_has_finite_logits(token):
    module, mask = model(), jnp.ones((2, 11), bool).at[1, 9].set(False)
    logits = apply(module, random_variables(module, TOKENS), TOKENS.at[1, 9].set(token), mask)
    assert np.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("position", [32, 10**6, -1, -32])
def test_a_position_without_an_embedding_is_an_error_and_nan_under_jit(position):
    module = model()
    variables = random_variables(module, TOKENS)
    positions = jnp.broadcast_to(jnp.arange(11), (2, 11)).at[1, 9].set(position)
    with pytest.raises(ValueError, match=r"at most `max_seq_len` \(32\) long, got"):
        module.apply(variables, TOKENS, positions=positions)
    run = jax.jit(lambda positions, mask: module.apply(variables, TOKENS, mask, positions=positions))
    assert np.isnan(run(positions, None)[1, 9]).any()
    absent = jnp.ones((2, 11), bool).at[1, 9].set(False)
    assert np.isfinite(run(positions, absent)).all()
    assert np.isfinite(jax.jit(lambda mask: module.apply(variables, TOKENS, mask, positions=positions))(absent)).all()
    assert np.isfinite(module.apply(variables, TOKENS, absent, positions=positions)).all()


def test_a_row_beyond_max_seq_len_is_refused_under_jit_whatever_its_mask():
    module = model(max_seq_len=8)
    variables = random_variables(module, TOKENS[:, :8])
    for mask in (None, jnp.ones((2, 11), bool), jnp.arange(11)[None] < 5):
        for run in (module.apply, jax.jit(module.apply)):
            with pytest.raises(ValueError, match=r"at most `max_seq_len` \(8\) long, got 11 tokens"):
                run(variables, TOKENS, mask)


@pytest.mark.slow
def test_tokens_that_do_not_exist_need_no_position():
    """The padding of a chunk may extend beyond `max_seq_len` without making anything NaN."""
    module = model(max_seq_len=13)
    variables = random_variables(module, TOKENS)
    exists = jnp.arange(11) < jnp.array([[2], [5]])
    cache = module.init_cache(2).replace(length=jnp.array([9, 8]))
    with jax.debug_nans(True):
        run = jax.jit(lambda cache, exists: module.apply(variables, TOKENS, exists, cache))
        logits, grown = run(cache, exists)
        module.apply(variables, TOKENS, exists, cache)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(grown.length, [11, 13])
    with pytest.raises(ValueError, match=r"at most `max_seq_len` \(13\) long, got 14"):
        module.apply(variables, TOKENS, jnp.ones((2, 11), bool), module.init_cache(2).replace(length=jnp.array([3, 0])))


# Dtypes of tokens


@pytest.mark.slow
@pytest.mark.parametrize("ignore_index", [-1, 255, 300], ids=["negative", "a-token", "beyond"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "uint32", "int64"])
def test_tokens_of_every_integer_dtype_are_the_numbers_that_they_are(dtype, ignore_index):
    module = model(num_tokens=256, ignore_index=ignore_index)
    tokens = np.random.RandomState(0).randint(250, 256, (2, 11))
    variables = random_variables(module, TOKENS)

    @jax.jit
    def both(tokens):
        return module.apply(variables, tokens), module.apply(variables, tokens, return_loss=True)

    expected = both(tokens.astype(np.int32))
    assert np.isfinite(expected[1])
    jax.tree.map(np.testing.assert_array_equal, both(tokens.astype(dtype)), expected)
    jax.tree.map(
        np.testing.assert_array_equal, module.apply(variables, tokens.astype(dtype)), module.apply(variables, tokens)
    )


@pytest.mark.slow
def test_numbers_beyond_int32_are_no_tokens():
    module = model()
    variables = random_variables(module, TOKENS)
    for token in (2**32 + 3, 2**31, -(2**32) + 3):
        with pytest.raises(ValueError, match=f"got {token}; check the tokenizer"):
            module.apply(variables, np.where(np.arange(11) == 4, np.int64(token), TOKENS))
    wrong = np.where(np.arange(11) == 4, np.int64(2**32 + 3), TOKENS)
    by_mask = jax.jit(lambda mask: module.apply(variables, wrong, mask))
    assert np.isnan(by_mask(jnp.ones((2, 11), bool))[0, 4]).any()  # a traced mask cannot be refused
    unsigned = np.asarray(TOKENS, np.uint32)
    unsigned[0, 4] = 2**32 - 1  # as int32 it would be -1, the `ignore_index`
    assert np.isnan(jax.jit(module.apply)(variables, unsigned)[0, 4]).any()
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(TOKENS, np.int64)).at[0, 4].set(2**32 + 3)
        assert np.isnan(jax.jit(module.apply)(variables, wide)[0, 4]).any()


@pytest.mark.slow_but("13")
@pytest.mark.parametrize("label", [13, 99, -2, -13])
def test_a_label_beyond_the_vocabulary_gives_a_loss_of_nan_under_jit(label):
    """Also the last label, which is not an input; and not the loss of a label counted from the end."""
    module = model()
    variables = random_variables(module, TOKENS)
    loss = jax.jit(lambda tokens: module.apply(variables, tokens, return_loss=True))
    assert np.isfinite(loss(TOKENS))
    assert np.isnan(loss(TOKENS.at[1, -1].set(label)))


@pytest.mark.slow
def test_the_mask_of_a_loss_may_be_one_for_all_rows_or_one_for_each_head():
    module = model()
    variables = random_variables(module, TOKENS)
    mask = jnp.arange(11) != 3
    expected = apply(module, variables, TOKENS, jnp.broadcast_to(mask, (2, 11)), return_loss=True)
    for lead in ((), (1,), (2, 3), (1, 1)):
        same = apply(module, variables, TOKENS, jnp.broadcast_to(mask, (*lead, 11)), return_loss=True)
        cases.assert_close(same, expected)


# Options


def test_continuous_input_has_no_embeddings_and_no_logits():
    module, x = model(num_tokens=None, max_seq_len=0, depth=2, causal=False), cases.normal(0, 2, 41, 8)
    variables = random_variables(module, x)
    assert set(variables["params"]) == {"layers_0", "layers_1"}
    assert apply(module, variables, x).shape == x.shape


@pytest.mark.slow
def test_remat_changes_nothing():
    fields = {"attn_dropout": 0.3, "ff_dropout": 0.3, "deterministic": False, **EVERY_OPTION}
    module = model(**fields)
    variables = random_variables(module.clone(deterministic=True), TOKENS)

    @jax.jit
    def both(variables):
        def loss(module):
            return lambda v: module.apply(v, TOKENS, return_loss=True, rngs={"dropout": jax.random.key(1)})

        return [jax.value_and_grad(loss(m))(variables) for m in (module, module.clone(remat=True))]

    plain, rematted = both(variables)
    cases.assert_close(rematted, plain)


def test_every_parameter_has_a_gradient():
    module = model(**EVERY_OPTION)
    variables = random_variables(module, TOKENS)
    gradient = jax.jit(jax.grad(lambda variables: module.apply(variables, TOKENS, return_loss=True)))(variables)
    for path, x in flatten_dict(gradient["params"], sep="/").items():
        assert np.isfinite(x).all(), path
        assert np.abs(x).max() > 0, path


class GlobalLayer(nn.Module):
    """Adds the mean of all visible tokens, unlike anything local."""

    @nn.compact
    def __call__(self, x, mask=None):
        gain = self.param("gain", nn.initializers.ones_init(), (x.shape[-1],))
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        return gain * jnp.where(mask[..., None], x, 0).mean(1, keepdims=True) * jnp.ones_like(x)


@pytest.mark.slow
def test_global_layers_are_inserted_where_asked():
    numbers = []

    def make(index):
        numbers.append(index)
        return GlobalLayer()

    x = cases.normal(0, 1, 23, 8)
    module = model(num_tokens=None, depth=3, global_attn_layer=make, layers_insert_global_attn=(2,))
    variables = random_variables(module, x)
    assert set(numbers) == {1}
    assert ["global_attn" in variables["params"][f"layers_{i}"] for i in range(3)] == [False, True, False]
    jacobian = jax.jit(jax.jacrev(lambda x: module.apply(variables, x)[0, 0, 0]))(x)
    assert (np.abs(jacobian[0]).max(-1) > 0).all(), "the first token depends on all"
    masked = apply(module, variables, x, jnp.arange(23)[None] < 20)
    assert np.abs(masked - apply(module, variables, x)).max() > 1e-4, "the mask reaches it"


def test_global_layers_are_inserted_everywhere_by_default():
    module = model(num_tokens=None, depth=3, global_attn_layer=lambda index: GlobalLayer())
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 5, 8))))
    assert all({"global_attn", "global_streams"} <= set(shapes["params"][f"layers_{i}"]) for i in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"use_dynamic_pos_bias": True}], ids=["rotary", "dynamic-bias"])
def test_window_override(fields):
    module = model(use_xpos=True, **fields)
    variables = random_variables(module, TOKENS)
    ours = apply(module, variables, TOKENS, window_size=7)
    cases.assert_close(ours, apply(module.clone(local_attn_window_size=7, xpos_scale_base=2.0), variables, TOKENS))
    assert np.abs(ours - apply(module, variables, TOKENS)).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "window", [Window(3), Window(5, look_backward=2, look_forward=0), Window(4, exact_windowsize=True)], ids=str
)
def test_dynamic_bias_serves_every_window(window):
    fields = {"causal": False, "look_backward": window.look_backward, "look_forward": window.look_forward}
    fields |= {"local_attn_window_size": window.window_size, "exact_windowsize": window.exact_windowsize}
    module = model(use_dynamic_pos_bias=True, use_abs_pos_emb=False, **fields)
    variables = random_variables(module, TOKENS)
    out = apply(module, variables, TOKENS)
    moved = jnp.concatenate([TOKENS[:, : window.window_size], TOKENS], axis=1)
    mask = jnp.broadcast_to(jnp.arange(moved.shape[1]) >= window.window_size, moved.shape)
    cases.assert_close(apply(module, variables, moved, mask)[:, window.window_size :], out)


@pytest.mark.slow
def test_dropout_reaches_attention_and_feed_forward():
    for field in ("attn_dropout", "ff_dropout"):
        module = model(**{field: 0.5})
        variables = random_variables(module, TOKENS)
        plain = apply(module, variables, TOKENS)
        dropped = apply(module, variables, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(0)})
        assert np.abs(plain - dropped).max() > 1e-3, field


def test_without_absolute_positions_length_is_unlimited():
    module = model(max_seq_len=4, use_abs_pos_emb=False)
    variables = random_variables(module, TOKENS)
    assert "pos_emb" not in variables["params"]
    assert apply(module, variables, TOKENS).shape == (2, 11, 13)


@pytest.mark.slow
def test_dtype_and_param_dtype():
    variables = jax.jit(model().init)(jax.random.key(0), TOKENS)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    half = apply(model(dtype=jnp.bfloat16), variables, TOKENS)
    assert half.dtype == jnp.bfloat16
    assert apply(model(dtype=jnp.bfloat16), variables, TOKENS, return_loss=True).dtype == jnp.float32
    cases.assert_close(half, apply(model(), variables, TOKENS), "bfloat16")
    stored = jax.eval_shape(lambda: model(param_dtype=jnp.bfloat16, **EVERY_OPTION).init(jax.random.key(0), TOKENS))
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}


def test_a_fresh_model_starts_near_the_entropy_of_its_initialisation():
    module = LocalTransformer(num_tokens=256, max_seq_len=64, dim=64, depth=1, local_attn_window_size=16)
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 256, (4, 64)))
    variables = jax.jit(module.init)(jax.random.key(0), tokens)
    params = variables["params"]
    for name in ("token_emb", "pos_emb"):
        embedding = np.asarray(params[name]["embedding"])
        assert abs(embedding.mean()) < 0.05
        assert abs(embedding.std() - 1) < 0.05
    kernel = np.asarray(params["to_logits"]["kernel"])
    assert 0.95 / 8 < np.abs(kernel).max() <= 1 / 8
    bits = float(apply(module, variables, tokens, return_loss=True)) / np.log(2)
    assert 7.9 < bits < 8.5


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)], ids=str)
def test_empty_input_gives_empty_logits(shape):
    module = model()
    variables = random_variables(module, TOKENS)
    assert module.apply(variables, jnp.zeros(shape, int)).shape == (*shape, 13)


# Errors


@pytest.mark.slow
def test_tokens_beyond_the_vocabulary_give_nan_under_jit():
    module = model()
    variables = random_variables(module, TOKENS)
    for token in (13, 1000, -2, -13):
        assert np.isnan(apply(module, variables, TOKENS.at[0, 4].set(token))[0, 4]).any(), token


FLOATS = jnp.zeros((2, 11, 8))
SCANNED = {"scan_layers": True, "depth": 3, "global_attn_layer": lambda index: nn.Dense(8)}
UNLIKE = {"global_attn_layer": lambda index: nn.Dense(8, use_bias=index < 2)}

ERRORS = [
    (
        {},
        TOKENS.at[0, 0].set(13),
        {},
        ValueError,
        "`x` must be tokens in [0, 13), `ignore_index` (-1) or masked, got 13",
    ),
    ({}, TOKENS.at[0, 0].set(-2), {}, ValueError, "got -2; check the tokenizer"),
    ({}, TOKENS.astype(float), {}, TypeError, "`x` must be integers, got float32; for continuous input"),
    ({}, TOKENS[0], {}, ValueError, "`x` must be tokens [b, n], got shape (11,)"),
    ({}, jnp.zeros((1, 33), int), {}, ValueError, "at most `max_seq_len` (32) long, got 33 tokens; shorten it"),
    ({}, jnp.zeros((1, 34), int), {"return_loss": True}, ValueError, "got 33 tokens"),
    ({}, TOKENS[:, :0], {"return_loss": True}, ValueError, "`x` must have at least one token in a row for the loss"),
    ({}, TOKENS, {"window_size": 8}, ValueError, "A `window_size` in a call requires"),
    ({}, TOKENS, {"mask": jnp.ones((2, 5), bool)}, ValueError, "`mask` must be [b, n] with n = 11"),
    ({}, TOKENS, {"mask": jnp.ones((2, 11))}, TypeError, "`mask` must be bool"),
    (
        {"num_tokens": None},
        FLOATS,
        {"return_loss": True},
        ValueError,
        "`num_tokens` must be given for the loss, got None",
    ),
    ({"num_tokens": None}, TOKENS, {}, TypeError, "`x` must be of a floating dtype when `num_tokens` is None"),
    ({"num_tokens": None}, FLOATS[0], {}, ValueError, "`x` must be [b, n, 8] when `num_tokens` is None"),
    ({"num_tokens": None}, FLOATS[..., :3], {}, ValueError, "`x` must be [b, n, 8]"),
    (
        {"layers_insert_global_attn": (0, 1)},
        TOKENS,
        {},
        ValueError,
        "must be layers from 1 to `depth` (1), got (0, 1)",
    ),
    ({"layers_insert_global_attn": (2,)}, TOKENS, {}, ValueError, "must be layers from 1 to `depth` (1), got (2,)"),
    (
        {"causal": False},
        TOKENS,
        {"return_loss": True},
        ValueError,
        "`causal` must be True for the loss of the next token",
    ),
    (
        {"use_dynamic_pos_bias": True, "rotary": Rotary(4)},
        TOKENS,
        {},
        ValueError,
        "`use_dynamic_pos_bias` takes the place of rotary in local layers, got `rotary` Rotary(dim=4",
    ),
    ({"use_dynamic_pos_bias": True, "rotary": Rotary(4)}, TOKENS, {}, ValueError, "got `rotary` Rotary(dim=4"),
    ({"depth": -1}, TOKENS, {}, ValueError, "`depth` must be at least 0, got -1"),
    ({"depth": 1.0}, TOKENS, {}, TypeError, "`depth` must be an int, got 1.0"),
    ({"attn_dropout": 1.5}, TOKENS, {}, ValueError, "`attn_dropout` must be in [0, 1), got 1.5"),
    ({"attn_dropout": "x"}, TOKENS, {}, TypeError, "`attn_dropout` must be a number, got 'x'"),
    ({"ff_dropout": 2.0}, TOKENS, {}, ValueError, "`ff_dropout` must be in [0, 1), got 2.0"),
    ({"ff_dropout": "x"}, TOKENS, {}, TypeError, "`ff_dropout` must be a number, got 'x'"),
    ({}, TOKENS, {"positions": TOKENS[:, :5]}, ValueError, "`positions` must be [2, 11]"),
    ({}, TOKENS, {"positions": TOKENS * 1.0}, TypeError, "`positions` must be integers, got float32"),
    ({}, TOKENS, {"segment_ids": TOKENS[:, :5]}, ValueError, "`segment_ids` must be [2, 11]"),
    ({}, TOKENS, {"segment_ids": jnp.zeros((2, 3, 11), int)}, ValueError, "`segment_ids` must be [2, 11]"),
    ({}, TOKENS, {"segment_ids": TOKENS * 1.0}, TypeError, "`segment_ids` must be integers"),
    ({}, TOKENS[:, :0], {"mask": jnp.ones((2, 5), bool)}, ValueError, "`mask` must be [b, n] with n = 0"),
    ({}, TOKENS[:, :0], {"segment_ids": TOKENS}, ValueError, "`segment_ids` must be [2, 0]"),
    ({}, TOKENS[:, :0], {"positions": TOKENS}, ValueError, "`positions` must be [2, 0]"),
    ({"num_tokens": None}, FLOATS.astype("complex64"), {}, TypeError, "`x` must be of a floating dtype"),
    ({"num_residual_streams": 0}, TOKENS, {}, ValueError, "`num_residual_streams` must be at least 1, got 0"),
    ({"kv_heads": 2}, TOKENS, {}, ValueError, "`kv_heads` must divide `heads` (3), got 2"),
    ({"look_forward": 1}, TOKENS, {}, ValueError, "`look_forward` must be 0 when `causal=True`"),
    ({"local_attn_window_size": 0}, TOKENS, {}, ValueError, "`local_attn_window_size` must be at least 1"),
    (SCANNED | {"depth": 0}, TOKENS, {}, ValueError, "`depth` at least 1, when `scan_layers=True`, got windows ()"),
    (SCANNED | {"local_attn_window_size": (4, 4, 5)}, TOKENS, {}, ValueError, "got windows (4, 4, 5); set"),
    (SCANNED | {"layers_insert_global_attn": (1, 2)}, TOKENS, {}, ValueError, "in layer 1 and None in layer 3; make"),
    (SCANNED | {"layers_insert_global_attn": (2,)}, TOKENS, {}, ValueError, "got None in layer 1 and Dense("),
    (SCANNED | UNLIKE, TOKENS, {}, ValueError, "`global_attn_layer` must insert equal modules in all layers when"),
]


@pytest.mark.parametrize(("fields", "x", "options", "error", "phrase"), ERRORS, ids=[case[-1][:40] for case in ERRORS])
def test_wrong_calls_are_refused(fields, x, options, error, phrase):
    with pytest.raises(error) as caught:
        model(**fields).init(jax.random.key(0), x, **options)
    assert phrase in str(caught.value)


# A window for each layer, as in configurations


WINDOWS = {
    "tuple": (4, None),
    "list": [4, None],
    "JSON": json.loads("[4, null]"),
    "array": (*np.array([4]), None),
}


@pytest.mark.slow_but("rotary")
@pytest.mark.parametrize("fields", [{}, {"use_dynamic_pos_bias": True}], ids=["rotary", "dynamic-bias"])
def test_layers_take_windows_in_place_of_sizes(fields):
    """Size 4 is an exact window of five keys with a bias of four rows; a window of five keys has a one-row bias."""
    module = model(depth=3, local_attn_window_size=(4, 4, None), **fields)
    variables = random_variables(module, TOKENS)
    windows = [Window.sliding(5), 4, Window.sliding(None)]
    ours = module.clone(local_attn_window_size=windows)
    assert ours.local_attn_window_size == tuple(windows)
    assert jax.tree.map(jnp.shape, random_variables(ours, TOKENS)) == jax.tree.map(jnp.shape, variables)
    cases.assert_close(apply(ours, variables, TOKENS), apply(module, variables, TOKENS))


@pytest.mark.slow
def test_a_window_that_looks_ahead_needs_a_model_that_may():
    with pytest.raises(ValueError, match=r"module with `causal=True` must be causal.*; set `causal=False`"):
        model(local_attn_window_size=Window.between(3, 2)).init(jax.random.key(0), TOKENS)
    module = model(local_attn_window_size=Window.between(4, 4), causal=False)
    variables = random_variables(module, TOKENS)
    cases.assert_close(apply(module, variables, TOKENS), apply(model(causal=False), variables, TOKENS))


@pytest.mark.parametrize("name", ["look_backward", "exact_windowsize"])
def test_a_window_beside_fields_that_count_windows_is_refused_in_a_model(name):
    fields = {"look_backward": 2, "exact_windowsize": False}
    with pytest.raises(
        ValueError, match=f"replaces the fields of a window, got .*`{name}` {fields[name]}; leave them out"
    ):
        model(local_attn_window_size=Window.sliding(5), **{name: fields[name]}).init(jax.random.key(0), TOKENS)


@pytest.mark.slow
def test_layers_in_a_loop_may_have_one_window():
    looped = model(depth=2, local_attn_window_size=Window.sliding(5), scan_layers=True)
    plain = looped.clone(scan_layers=False)
    variables = random_variables(plain, TOKENS)
    cases.assert_close(apply(looped, stack_layers(variables), TOKENS), apply(plain, variables, TOKENS))
    equal = Window(4, causal=True, exact_windowsize=True)
    model(depth=2, local_attn_window_size=(4, equal), scan_layers=True).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="`local_attn_window_size` must be the same in all layers"):
        model(depth=2, local_attn_window_size=(4, Window.sliding(4)), scan_layers=True).init(jax.random.key(0), TOKENS)


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_windows_of_each_layer_are_kept_as_one_hashable_value(windows):
    module = model(depth=2, local_attn_window_size=windows)
    assert module.local_attn_window_size == (4, None)
    assert {type(size) for size in module.local_attn_window_size} == {int, type(None)}
    assert module == model(depth=2, local_attn_window_size=(4, None))
    assert hash(module) == hash(model(depth=2, local_attn_window_size=(4, None)))
    assert module.clone().window_sizes() == (4, None)


@pytest.mark.parametrize("size", [np.int32(4), np.arange(4, 6)[0], np.array(4)], ids=["int32", "arange", "0-d"])
def test_a_window_of_numpy_is_an_int(size):
    module = model(local_attn_window_size=size)
    assert type(module.local_attn_window_size) is int
    assert module == model(local_attn_window_size=4)


def test_an_array_of_windows_is_one_a_layer():
    assert model(depth=2, local_attn_window_size=np.array([4, 5])).window_sizes() == (4, 5)


def test_layers_to_insert_in_are_kept_as_a_tuple():
    module = model(depth=2, global_attn_layer=lambda index: nn.Dense(8), layers_insert_global_attn=[np.int64(2)])
    assert module.layers_insert_global_attn == (2,)
    hash(module)


# Tracing


def traces(depth, monkeypatch, **fields):
    """Count how often tracing and lowering a loss and its gradient traces the softmax and the stream weights."""
    module, counts = model(depth=depth, **fields), {"attend_head": 0, "_weights": 0}
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), TOKENS))
    with monkeypatch.context() as patches:
        for part, name in ((windowed, "attend_head"), (residual_streams, "_weights")):
            plain = getattr(part, name)

            def counted(*args, plain=plain, name=name, **options):
                counts[name] += 1
                return plain(*args, **options)

            patches.setattr(part, name, counted)
        jax.clear_caches()
        loss = jax.jit(jax.grad(lambda variables: module.apply(variables, TOKENS, return_loss=True)))
        loss.trace(variables).lower()  # attention is traced when it is lowered
    return counts


@pytest.mark.slow
def test_layers_that_are_alike_are_traced_once(monkeypatch):
    one = traces(1, monkeypatch)
    assert one["attend_head"] > 0
    assert one["_weights"] > 0
    assert traces(5, monkeypatch) == one
    windows = traces(4, monkeypatch, local_attn_window_size=(4, 5, 4, 5))
    assert windows["attend_head"] == 2 * one["attend_head"]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"num_residual_streams": 1, "remat": True}], ids=str)
def test_a_loop_is_traced_once_whatever_the_depth(monkeypatch, fields):
    assert traces(5, monkeypatch, scan_layers=True, **fields) == traces(1, monkeypatch, scan_layers=True, **fields)

    def sizes(depth):
        module = model(depth=depth, scan_layers=True, **fields)
        variables = jax.eval_shape(lambda: module.init(jax.random.key(0), TOKENS))
        loss = jax.jit(jax.value_and_grad(lambda variables: module.apply(variables, TOKENS, return_loss=True)))
        traced = loss.trace(variables)
        return len(str(traced.jaxpr).splitlines()), len(traced.lower().as_text().splitlines())

    assert sizes(2) == sizes(6)


# Layers in a loop

ONE_STREAM = {"num_residual_streams": 1}
EXISTS = jnp.arange(11) < jnp.array([[9], [11]])
LOOPS = {
    "loss": ({}, {"return_loss": True}),
    "every-option": (EVERY_OPTION, {}),
    "one-stream": (ONE_STREAM | {"depth": 5, "remat": True}, {}),
    "another-window": (ONE_STREAM | {"use_xpos": True}, {"window_size": 7}),
    "packed": (ONE_STREAM, {"mask": EXISTS, "segment_ids": DOCUMENTS, "return_loss": True}),
    "positions": ({"remat": True}, {"positions": jnp.arange(11)[None] * jnp.array([[2], [1]])}),
    "global": (ONE_STREAM | {"local_attn_window_size": None}, {}),
    "inserted": ({"global_attn_layer": lambda index: GlobalLayer()}, {"mask": EXISTS}),
}


@pytest.mark.slow_but("global")
@pytest.mark.parametrize(("fields", "options"), LOOPS.values(), ids=LOOPS)
def test_a_loop_over_layers_equals_one_layer_after_the_other(fields, options):
    module = model(**{"depth": 2, **fields})
    variables = random_variables(module, TOKENS)

    @partial(jax.jit, static_argnums=0)
    def out_and_gradient(module, variables):
        out, pull = jax.vjp(lambda variables: module.apply(variables, TOKENS, **options), variables)
        return out, *pull(cases.normal(0, *out.shape))

    expected, gradient = out_and_gradient(module, variables)
    out, stacked_gradient = out_and_gradient(module.clone(scan_layers=True), stack_layers(variables))
    cases.assert_close(out, expected)
    cases.assert_close(unstack_layers(stacked_gradient), gradient)


@pytest.mark.slow
def test_a_loop_has_forward_derivatives_and_no_need_of_jit():
    module = model(depth=2)
    variables = random_variables(module, TOKENS)
    tangents = jax.tree.map(jnp.cos, variables)
    expected = jax.jvp(lambda variables: apply(module, variables, TOKENS), (variables,), (tangents,))
    looped = module.clone(scan_layers=True)
    ours = jax.jvp(lambda v: looped.apply(v, TOKENS), (stack_layers(variables),), (stack_layers(tangents),))
    cases.assert_close(ours, expected)


@pytest.mark.slow_but("bfloat16-1")
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_loop_computes_in_the_same_dtype(streams, dtype):
    module = model(depth=2, num_tokens=None, max_seq_len=0, num_residual_streams=streams, dtype=dtype)
    x = cases.normal(0, 2, 11, 8).astype("float16")
    variables = random_variables(module, x)
    expected = apply(module, variables, x)
    out = apply(module.clone(scan_layers=True), stack_layers(variables), x)
    assert out.dtype == expected.dtype
    cases.assert_close(out, expected, dtype or "float16")


@pytest.mark.slow
def test_a_loop_starts_from_the_distributions_of_each_layer():
    module = model(depth=2, num_residual_streams=4, global_attn_layer=lambda index: GlobalLayer())
    expected = flatten_dict(jax.jit(module.init)(jax.random.key(0), TOKENS)["params"], sep="/")
    looped = module.clone(scan_layers=True)
    params = unstack_layers(jax.jit(looped.init)(jax.random.key(0), TOKENS)["params"])
    params = flatten_dict(params, sep="/")
    assert {path: x.shape for path, x in params.items()} == {path: x.shape for path, x in expected.items()}
    for path, x in params.items():
        if not path.startswith("layers_") or not path.endswith("kernel"):
            np.testing.assert_array_equal(x, expected[path], err_msg=path)  # constants, and values of other modules
            continue
        bound = x.shape[0] ** -0.5
        assert 0.8 * bound < np.abs(x).max() <= bound
        assert np.abs(x - params["layers_1" + path[8:]]).max() > 0.1 * bound or path.startswith("layers_1")


@pytest.mark.slow
def test_a_loop_has_the_same_parameters_when_it_is_made_with_a_cache():
    module = model(depth=2, scan_layers=True, **ONE_STREAM)
    make = jax.jit(lambda cache: module.init_with_output(jax.random.key(0), TOKENS, cache=cache))
    (logits, cache), variables = make(module.init_cache(2))
    np.testing.assert_array_equal(cache.length, [11, 11])
    expected, same = make(None)
    cases.assert_close(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, variables, same)


@pytest.mark.slow
def test_each_layer_of_a_loop_drops_other_values():
    module = model(depth=3, num_tokens=None, ff_dropout=0.5, scan_layers=True)
    variables = random_variables(module, FLOATS + 1)
    _, seen = module.apply(
        variables,
        FLOATS + 1,
        deterministic=False,
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda part, name: isinstance(part, nn.Dropout),
    )
    (hidden,) = jax.tree.leaves(seen)
    first, second, third = hidden == 0
    assert 0.4 < first.mean() < 0.6
    for one, other in ((first, second), (second, third), (first, third)):
        assert 0.4 < (one == other).mean() < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"use_dynamic_pos_bias": True, "num_residual_streams": 1}], ids=str)
def test_a_model_with_a_loop_decodes_as_it_reads(fields):
    module = model(depth=3, scan_layers=True, **fields)
    variables = random_variables(module, TOKENS)
    expected = apply(module, variables, TOKENS)
    step = jax.jit(lambda x, cache: module.apply(variables, x, cache=cache))
    cache = module.init_cache(2, rewind=2)
    assert jax.tree.structure(cache) == jax.tree.structure(module.clone(scan_layers=False).init_cache(2, rewind=2))
    logits, cache = step(TOKENS[:, :5], cache)
    cases.assert_close(logits, expected[:, :5])
    _, drafted = step(TOKENS[:, :2], cache)
    cache = drafted.rewind(2)
    for at in range(5, 11):
        logits, cache = step(TOKENS[:, at : at + 1], cache)
        cases.assert_close(logits[:, 0], expected[:, at])


@pytest.mark.slow
def test_partitions_of_a_loop_are_those_of_stacked_layers():
    module = model(depth=2, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "heads")))
    shapes, looped = (
        jax.eval_shape(lambda m=m: m.init(jax.random.key(0), TOKENS)) for m in (module, module.clone(scan_layers=True))
    )
    assert looped["params"]["layers"]["attn"]["to_qkv"]["kernel"].names == (None, None, "heads")
    assert jax.tree.structure(jax.eval_shape(unstack_layers, looped)) == jax.tree.structure(shapes)
    variables = module.init(jax.random.key(0), TOKENS)
    module = module.clone(scan_layers=True)
    cases.assert_close(
        module.apply(stack_layers(variables), TOKENS, cache=module.init_cache(2))[0],
        module.apply(stack_layers(nn.unbox(variables)), TOKENS),
    )


class Counting(nn.Module):
    """A global layer with its own variable collection."""

    @nn.compact
    def __call__(self, x, mask=None):
        self.variable("counts", "calls", jnp.zeros, ()).value += 1.0
        return 0 * x


@pytest.mark.slow
def test_other_collections_of_a_loop_are_stacked_too():
    module = model(depth=3, scan_layers=True, global_attn_layer=lambda index: Counting())
    variables = module.init(jax.random.key(0), TOKENS)
    _, counts = module.apply(variables, TOKENS, mutable=["counts"])
    np.testing.assert_array_equal(jax.tree.leaves(counts)[0], [2, 2, 2])


def test_parameters_of_the_other_layout_are_refused():
    module = model(depth=2)
    variables = random_variables(module, TOKENS)
    with pytest.raises(ValueError, match=r"when `scan_layers=True`, got layers_0; pass `stack_layers\(params\)`"):
        module.clone(scan_layers=True).apply(variables, TOKENS)
    with pytest.raises(ValueError, match=r"when `scan_layers=False`, got stacked layers; pass `unstack_layers\("):
        module.apply(stack_layers(variables), TOKENS)


# A rotary for each layer


@pytest.mark.slow
def test_layers_have_rotaries_of_their_own():
    rotaries = [Rotary(16, theta=50.0), None, False]
    module = model(depth=3, rotary=rotaries, local_attn_window_size=(4, 4, None), dim_head=16)
    layers = [module._attention(index, module._windows(None), True) for index in range(3)]
    made = [layer._attention(None).options().rotary for layer in layers]
    assert made == [Rotary(16, theta=50.0), Rotary(16), None]
    variables = random_variables(module, TOKENS)
    expected = apply(module, variables, TOKENS)
    logits, cache = apply(module, variables, TOKENS[:, :5], cache=module.init_cache(2, max_length=16))
    cases.assert_close(logits, expected[:, :5])
    for at in range(5, 11):
        logits, cache = apply(module, variables, TOKENS[:, at : at + 1], cache=cache)
        cases.assert_close(logits[:, 0], expected[:, at])


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"rotary": (Rotary(4),)}, "`rotary` must be one for all layers or one for each of the 2, got 1"),
        ({"rotary": (Rotary(4), Rotary(4, theta=9.0)), "scan_layers": True}, "`rotary` must be the same in all layers"),
    ],
)
def test_rotaries_of_layers_that_do_not_fit_are_refused(fields, phrase):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the phrase is compared below)
        jax.eval_shape(lambda: model(depth=2, **fields).init(jax.random.key(0), TOKENS))
    assert phrase in str(caught.value)


@pytest.mark.slow
def test_a_model_of_one_rotary_may_be_scanned():
    module = model(depth=2, rotary=[Rotary(4, theta=9.0)] * 2, scan_layers=True, dim_head=4)
    variables = random_variables(module, TOKENS)
    single = module.clone(rotary=Rotary(4, theta=9.0))
    np.testing.assert_array_equal(apply(module, variables, TOKENS), apply(single, variables, TOKENS))
