"""Where the original's decoding is wrong: each test shows that it is, and that ours is not.

Both have the same forward (`tests/test_original.py`), with which decoding is compared.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_local_attention import LocalMHA, LocalTransformer, generate
from flax_local_attention.sampling import keep_top_k

torch = pytest.importorskip("torch", reason="torch is needed to run the original")
original = pytest.importorskip(
    "local_attention", reason="the original (`pip install local-attention`) is not installed"
)

from local_attention import transformer as theirs  # noqa: E402

from tests.original import filled_variables, load, normal, to_torch  # noqa: E402

pytestmark = pytest.mark.original

WRONG, RIGHT = 1e-2, 1e-4
"""Limits on errors of logits of size 1: wrong is far above right."""

# Compilation dominates the time of these tests: many small programs, each run a few times.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FIELDS = {"dim": 8, "depth": 1, "dim_head": 4, "heads": 2, "local_attn_window_size": 3}
TOKENS = {"num_tokens": 11, "max_seq_len": 32}


def both_models(options, x, original_options=None):
    """Return our model, its parameters, and the original with the same parameters."""
    ours = LocalTransformer(**TOKENS | FIELDS | options)
    variables = filled_variables(ours, x[:, :1])
    return (
        ours,
        variables,
        load(theirs.LocalTransformer(**TOKENS | FIELDS | (original_options or options)), variables["params"]),
    )


def step_errors(options, prefill=4, steps=9, original_options=None):
    """Return the largest error of each cached step against the forward, for the original, and of all our steps."""
    x = np.random.RandomState(0).randint(0, 11, (2, prefill + steps))
    ours, variables, model = both_models(options, x, original_options)
    with torch.no_grad():
        expected = model(to_torch(x)).numpy()
        logits, cache = model(to_torch(x[:, :prefill]), return_cache=True)
        errors = []
        for at in range(prefill, x.shape[1]):
            logits, cache = model(to_torch(x[:, : at + 1]), cache=cache, return_cache=True)
            errors.append(np.abs(logits[:, -1].numpy() - expected[:, at]).max())
    feed = compiled(lambda tokens, cache: ours.apply(variables, tokens, cache=cache))
    logits, cache = feed(x[:, :prefill], ours.init_cache(2))
    ours_errors = []
    for at in range(prefill, x.shape[1]):
        logits, cache = feed(x[:, at : at + 1], cache)
        ours_errors.append(np.abs(np.asarray(logits[:, -1]) - expected[:, at]).max())
    assert max(ours_errors) < RIGHT
    return np.array(errors)


def test_keys_are_rotated_once():
    """Row 1: with its defaults, the original is right in the first cached step and wrong from the second on."""
    errors = step_errors({})
    assert errors[0] < RIGHT
    assert errors[1:].min() > WRONG


NO_ROTARY = {"use_dynamic_pos_bias": True}


def test_without_rotary_the_original_decodes_right():
    """So the errors in the tests below come only from what they change."""
    assert step_errors(NO_ROTARY | {"exact_windowsize": True}).max() < RIGHT


def test_qk_scale_is_the_forwards():
    """Row 2."""
    assert step_errors(NO_ROTARY | {"qk_rmsnorm": True}).min() > WRONG


def test_the_last_query_of_a_plain_window_sees_two_windows():
    """Row 3: the original caches only one window there, and is right elsewhere."""
    ours = LocalMHA(8, 3, dim_head=4, heads=2, causal=True, exact_windowsize=False, use_rotary_pos_emb=False)
    x = normal(0, 2, 12, 8)
    variables = filled_variables(ours, x)
    model = load(
        theirs.LocalMHA(
            dim=8, window_size=3, dim_head=4, heads=2, causal=True, exact_windowsize=False, use_rotary_pos_emb=False
        ),
        variables["params"],
        "LocalMHA",
    )
    with torch.no_grad():
        expected = model(to_torch(x)).numpy()
        _, kv = model(to_torch(x[:, :3]), return_cache=True)
        wrong, right = [], []
        for at in range(3, 12):
            # It gets all keys so far, so what it keeps is its own choice.
            out, _ = model(to_torch(x[:, at : at + 1]), cache=kv, return_cache=True)
            _, kv = model(to_torch(x[:, : at + 1]), return_cache=True)
            error = np.abs(out[:, 0].numpy() - expected[:, at]).max()
            (wrong if at % 3 == 2 else right).append(error)
    assert min(wrong) > WRONG
    assert max(right) < RIGHT
    cache = ours.init_cache(2)
    step = compiled(lambda x, cache: ours.apply(variables, x, cache=cache))
    for at in range(12):
        out, cache = step(x[:, at : at + 1], cache)
        assert np.abs(out[:, 0] - expected[:, at]).max() < RIGHT


class TorchMean(torch.nn.Module):
    """A global layer: the mean of all tokens so far."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Mean(nn.Module):
    """The same with a cache of its own."""

    @nn.compact
    def __call__(self, x, mask=None, cache=None):
        total, count = (0, 0) if cache is None else cache
        totals = total + jnp.cumsum(x, axis=1)
        counts = count + jnp.arange(1, x.shape[1] + 1)
        out = totals / counts[:, None]
        return out if cache is None else (out, (totals[:, -1:], counts[-1:]))

    @nn.nowrap
    def init_cache(self, batch, dtype=None):
        return jnp.zeros((batch, 1, 8), dtype or jnp.float32), jnp.zeros(1, jnp.int32)


def mean_layer(index):
    del index
    return Mean()


def test_an_inserted_global_layer_sees_all_tokens():
    """Row 4: the original's sees only the newest."""
    options = NO_ROTARY | {"exact_windowsize": True, "num_residual_streams": 1}
    errors = step_errors(
        options | {"global_attn_layer": mean_layer}, original_options=options | {"global_attn_layer": TorchMean()}
    )
    assert errors.min() > WRONG


def test_beyond_max_seq_len_the_original_reuses_the_last_position_and_ours_refuses():
    """Row 5: neither part of the original's result depends on the tokens that it drops."""
    prompt = np.random.RandomState(0).randint(0, 11, (1, 40))
    ours, variables, model = both_models({}, prompt)
    first, second = (to_torch(x) for x in (prompt, np.concatenate([(prompt[:, :8] + 1) % 11, prompt[:, 8:]], axis=1)))
    tokens = [model.generate(x, 3, temperature=0.0, filter_thres=0.5, use_kv_cache=False) for x in (first, second)]
    assert tokens[0].shape == (1, 3)
    assert (tokens[0] == tokens[1]).all()
    with pytest.raises(ValueError, match="must fit `max_seq_len`"):
        generate(ours, variables, prompt, 3, temperature=0.0)
    with torch.no_grad():
        _, cache = model(first[:, :31], return_cache=True)
        positions = []
        model.pos_emb.register_forward_hook(lambda module, inputs, out: positions.append(inputs[0]))
        model(first[:, 3:35], cache=cache, return_cache=True)  # its `generate` crops 35 tokens so
    assert positions[0][-1] == 31


def test_every_new_token_is_answered_and_masks_are_taken():
    """Row 6: of several new tokens the original drops all but the last."""
    x = np.random.RandomState(0).randint(0, 11, (2, 9))
    ours, variables, model = both_models(NO_ROTARY, x)
    with torch.no_grad():
        expected = model(to_torch(x)).numpy()
        _, cache = model(to_torch(x[:, :4]), return_cache=True)
        logits, _ = model(to_torch(x), cache=cache, return_cache=True)
        assert logits.shape[1] == 1
        assert np.abs(logits[:, -1].numpy() - expected[:, -1]).max() > WRONG
        with pytest.raises(AssertionError, match="only allow caching"):
            model(to_torch(x), cache=cache, mask=torch.ones(2, 9, dtype=torch.bool))
    exists = np.ones((2, 5), bool)
    feed = compiled(lambda x, cache, mask: ours.apply(variables, x, cache=cache, mask=mask))
    _, cache = feed(x[:, :4], ours.init_cache(2), exists[:, :4])
    logits, _ = feed(x[:, 4:], cache, exists)
    np.testing.assert_allclose(logits, expected[:, 4:], rtol=0, atol=RIGHT)


def test_top_k_keeps_at_least_one_token():
    """Row 14: of 5 tokens the original keeps a tenth, rounded down to none."""
    logits = normal(0, 1, 5)
    assert torch.isinf(theirs.top_k(to_torch(logits), thres=0.9)).all()
    assert np.isfinite(keep_top_k(jnp.asarray(logits), max(1, int((1 - 0.9) * 5)))).sum() == 1


@pytest.mark.parametrize(("c", "thres"), [(256, 0.9), (50, 0.5), (1000, 0.99)])
def test_top_k_has_the_equivalent_of_filter_thres(c, thres):
    logits = normal(0, 3, c)
    expected = theirs.top_k(to_torch(logits), thres=thres).numpy()
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(logits), max(1, int((1 - thres) * c))), expected)


def test_shared_keys_are_normalised_in_decoding_too():
    """Row 18."""
    assert step_errors(NO_ROTARY | {"shared_qk": True}).min() > WRONG


def test_greedy_generation_with_a_cache_is_that_without():
    """The effect of rows 1 to 3: with defaults, the original's cache changes the text; ours does not."""
    prompt = np.random.RandomState(0).randint(0, 11, (4, 6))
    ours, variables, model = both_models({"depth": 2}, prompt)
    expected = model.generate(to_torch(prompt), 20, temperature=0.0, filter_thres=0.5, use_kv_cache=False).numpy()
    cached = model.generate(to_torch(prompt), 20, temperature=0.0, filter_thres=0.5).numpy()
    assert (cached != expected).any()
    tokens, _ = generate(ours, variables, prompt, 20, temperature=0.0)
    np.testing.assert_array_equal(tokens, expected)
