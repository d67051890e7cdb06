"""The modules: shapes, parameters, options, and what each adds to `local_attention`."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from flax_local_attention import (
    Dense,
    DynamicPositionBias,
    FeedForward,
    LocalAttention,
    LocalMHA,
    Rotary,
    Window,
    local_attention,
)
from flax_local_attention.feed_forward import gelu
from flax_local_attention.fields import linear_bias_init, linear_init
from flax_local_attention.norm import LayerNorm
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")

E = 10
SMALL = {"dim": E, "window_size": 4, "dim_head": 6, "heads": 3}
X = cases.normal(0, 2, 11, E)


def shapes_of(module, *inputs):
    variables = jax.eval_shape(lambda: init(module, *inputs))
    return {path: x.shape for path, x in flatten_dict(variables.get("params", {}), sep="/").items()}


def random_variables(module, *inputs):
    """Return variables other than zero and one, so that results depend on each."""
    shapes = jax.eval_shape(lambda: init(module, *inputs))
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        tree, [jnp.asarray(np.float32(0.4) * cases.numpy_normal(seed, *leaf.shape)) for seed, leaf in enumerate(leaves)]
    )


def apply(module, variables, *inputs, **options):
    """Apply a module in one compiled program."""
    return jax.jit(lambda variables: module.apply(variables, *inputs, **options))(variables)


def init(module, *inputs, **options):
    """Initialise a module in one compiled program."""
    return jax.jit(lambda key: module.init(key, *inputs, **options))(jax.random.key(0))


# LocalAttention


def test_local_attention_is_the_function():
    q, k, v = (cases.normal(seed, 2, 3, 11, 6) for seed in range(3))
    mask, bias = cases.normal(3, 2, 11) > -1, cases.normal(4, 3, 4, 12)
    segment_ids, sinks = jnp.arange(11)[None] // 7, cases.normal(5, 3)
    module = LocalAttention(4, dim=6, autopad=True, scale=0.3, shared_qk=True, logits_soft_cap=2.0, look_backward=1)
    ours = apply(module, {}, q, k, v, mask, bias, segment_ids=segment_ids, sinks=sinks)
    expected = local_attention(
        q,
        k,
        v,
        window_size=4,
        autopad=True,
        scale=0.3,
        shared_qk=True,
        logits_soft_cap=2.0,
        rotary=Rotary(6),
        mask=mask,
        attn_bias=bias,
        segment_ids=segment_ids,
        sinks=sinks,
    )
    cases.assert_close(ours, expected)


@pytest.mark.parametrize("fields", [{}, {"dim": 6, "use_rotary_pos_emb": False}], ids=str)
def test_rotary_needs_a_dim_and_the_option(fields):
    q, k, v = (cases.normal(seed, 2, 8, 6) for seed in range(3))
    ours = apply(LocalAttention(4, causal=True, **fields), {}, q, k, v)
    cases.assert_close(ours, local_attention(q, k, v, window_size=4, causal=True))


@pytest.mark.slow
def test_modules_attend_by_their_implementation():
    class Recorded(Dense):
        def __call__(self, operands, options):
            shapes.append(operands.q.shape)
            return super().__call__(operands, options)

    shapes, q = [], cases.normal(0, 2, 3, 5, 6)
    mha = LocalMHA(**SMALL | {"window_size": Window.sliding(4)}, implementation=Recorded())
    attention = LocalAttention(Window.sliding(4), implementation=Recorded())
    for module, given in ((mha, (X[:, :5],)), (attention, (q, q, q))):
        variables = module.init(jax.random.key(0), *given)
        shapes.clear()
        module.apply(variables, *given)
        assert shapes


def test_window_override_keeps_the_scale_base_of_the_module():
    q, k, v = (cases.normal(seed, 2, 16, 6) for seed in range(3))
    module = LocalAttention(4, causal=True, dim=6, use_xpos=True)
    ours = apply(module, {}, q, k, v, window_size=8)
    cases.assert_close(ours, apply(module.clone(window_size=8, xpos_scale_base=2.0), {}, q, k, v))
    assert np.abs(ours - apply(module.clone(window_size=8), {}, q, k, v)).max() > 1e-3, "another base differs"


OF_ANY_KIND = (
    Window.sliding(5),
    Window.between(3, 2),
    Window.chunks(4),
    Window(4, look_backward=2),
    Window.everything(),
)
WINDOWS = pytest.mark.parametrize("window", OF_ANY_KIND, ids=["sliding", "between", "chunks", "plain", "everything"])


@WINDOWS
def test_local_attention_takes_a_window_at_any_length(window):
    q, k, v = (cases.normal(seed, 2, 3, 11, 6) for seed in range(3))
    ours = apply(LocalAttention(window, dim=6), {}, q, k, v)
    cases.assert_close(ours, local_attention(q, k, v, window=window, rotary=Rotary(6)))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_a_window_without_a_limit_is_a_window_of_none(causal):
    window = Window.sliding(None) if causal else Window.everything()
    q, k, v = (cases.normal(seed, 2, 3, 11, 6) for seed in range(3))
    bias = cases.normal(3, 3, 11, 11)
    for fields in ({}, {"reference_rotary": True}):
        none, ours = (LocalAttention(size, causal, dim=6, **fields) for size in (None, window))
        np.testing.assert_array_equal(
            apply(ours, {}, q, k, v, attn_bias=bias), apply(none, {}, q, k, v, attn_bias=bias)
        )
    for made in (ours, none):
        with pytest.raises(ValueError, match=r"`use_xpos` needs a window with a limit"):
            made.clone(use_xpos=True, reference_rotary=False).apply({}, q, k, v)
    none, ours = (LocalMHA(**{**SMALL, "window_size": size}, causal=causal) for size in (None, window))
    variables = random_variables(none, X)
    np.testing.assert_array_equal(apply(ours, variables, X), apply(none, variables, X))


def test_a_window_of_a_call_keeps_the_scale_base_of_the_module():
    q, k, v = (cases.normal(seed, 2, 16, 6) for seed in range(3))
    module = LocalAttention(Window.sliding(5), dim=6, use_xpos=True)
    ours = apply(module, {}, q, k, v, window_size=Window.sliding(9))
    rotary = Rotary(6, use_xpos=True, scale_base=2.0)
    cases.assert_close(ours, local_attention(q, k, v, window=Window.sliding(9), rotary=rotary))
    with pytest.raises(ValueError, match="requires a local module with `use_xpos=True`"):
        module.clone(use_xpos=False).apply({}, q, k, v, window_size=Window.sliding(9))


# LocalMHA


@WINDOWS
def test_mha_takes_a_window(window):
    module = LocalMHA(**{**SMALL, "window_size": window})
    variables = random_variables(module, X)
    kernels = variables["params"]["to_qkv"]["kernel"], variables["params"]["to_out"]["kernel"]
    q, k, v = (x.reshape(2, 11, 3, 6).swapaxes(1, 2) for x in jnp.split(X @ kernels[0], 3, axis=-1))
    out = local_attention(q, k, v, window=window, rotary=Rotary(6))
    cases.assert_close(apply(module, variables, X), out.swapaxes(1, 2).reshape(2, 11, 18) @ kernels[1])


def test_mha_is_its_equation():
    module = LocalMHA(
        **SMALL, causal=True, prenorm=True, gate_values_per_head=True, qk_rmsnorm=True, attention_sinks=True
    )
    variables = random_variables(module, X)
    p = jax.tree.map(np.asarray, variables["params"])
    x = np.asarray(X)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["norm"]["scale"] + p["norm"][
        "bias"
    ]
    q, k, v = np.split(x @ p["to_qkv"]["kernel"], 3, axis=-1)
    q, k, v = (y.reshape(2, 11, 3, 6).swapaxes(1, 2) for y in (q, k, v))
    q = q / np.linalg.norm(q, axis=-1, keepdims=True) * p["q_scale"]
    k = k / np.linalg.norm(k, axis=-1, keepdims=True) * p["k_scale"]
    window = Window(4, causal=True, exact_windowsize=True)
    out = cases.definition(*map(jnp.asarray, (q, k, v)), window, rotary=Rotary(6), scale=8, sinks=p["sinks"])
    gates = 1 / (1 + np.exp(-(x @ p["to_v_gate"]["kernel"] + p["to_v_gate"]["bias"])))
    out = np.asarray(out) * gates.swapaxes(1, 2)[..., None]
    cases.assert_close(apply(module, variables, X), out.swapaxes(1, 2).reshape(2, 11, 18) @ p["to_out"]["kernel"])


def test_mha_parameters():
    every = {"prenorm": True, "qk_rmsnorm": True, "gate_values_per_head": True, "attention_sinks": True}
    assert shapes_of(LocalMHA(**SMALL), X) == {"to_qkv/kernel": (E, 54), "to_out/kernel": (18, E)}
    assert shapes_of(LocalMHA(**SMALL, **every, kv_heads=1), X) == {
        "norm/scale": (E,),
        "norm/bias": (E,),
        "to_qkv/kernel": (E, (3 + 2) * 6),
        "q_scale": (6,),
        "k_scale": (6,),
        "sinks": (3,),
        "to_v_gate/kernel": (E, 3),
        "to_v_gate/bias": (3,),
        "to_out/kernel": (18, E),
    }


def test_grouped_heads_equal_repeated_ones():
    grouped = LocalMHA(**{**SMALL, "heads": 6}, kv_heads=2)
    params = random_variables(grouped, X)["params"]
    q, k, v = jnp.split(params["to_qkv"]["kernel"], [36, 48], axis=1)
    k, v = (jnp.repeat(y.reshape(E, 2, 6), 3, axis=1).reshape(E, 36) for y in (k, v))
    repeated = {**params, "to_qkv": {"kernel": jnp.concatenate([q, k, v], axis=1)}}
    ours = apply(grouped, {"params": params}, X)
    cases.assert_close(ours, apply(LocalMHA(**{**SMALL, "heads": 6}), {"params": repeated}, X))


@pytest.mark.slow
def test_mha_window_override():
    module = LocalMHA(**SMALL, causal=True, use_xpos=True)
    variables = random_variables(module, X)
    ours = apply(module, variables, X, window_size=7)
    cases.assert_close(ours, apply(module.clone(window_size=7, xpos_scale_base=2.0), variables, X))
    assert np.abs(ours - apply(module, variables, X)).max() > 1e-3


def test_mha_mask_bias_and_segments_reach_attention():
    module = LocalMHA(**SMALL)
    variables = random_variables(module, X)
    plain = apply(module, variables, X)
    for options in (
        {"mask": jnp.arange(11)[None] < 8},
        {"attn_bias": cases.normal(3, 3, 4, 12)},
        {"segment_ids": jnp.arange(11)[None] // 3},
    ):
        assert np.abs(apply(module, variables, X, **options) - plain).max() > 1e-3, options
    padded = jnp.pad(X, ((0, 0), (0, 3), (0, 0)), constant_values=5.0)
    mask = jnp.broadcast_to(jnp.arange(14) < 11, (2, 14))
    cases.assert_close(apply(module, variables, padded, mask)[:, :11], plain)


@pytest.mark.slow_but("LocalMHA")
@pytest.mark.parametrize(
    ("kind", "fields"), [(LocalMHA, SMALL), (FeedForward, {"dim": E})], ids=["LocalMHA", "FeedForward"]
)
def test_remat_changes_nothing(kind, fields):
    module, again = kind(**fields), nn.remat(kind)(**fields)
    variables = random_variables(module, X)
    cotangent = cases.normal(9, *X.shape)

    @jax.jit
    def both(variables):
        fns = (lambda variables: apply(module, variables, X)), (lambda variables: again.apply(variables, X))
        return [cases.value_and_pullback(fn, {"variables": variables}, cotangent) for fn in fns]

    ours, expected = both(variables)
    cases.assert_close(ours, expected)


# Dropout

DROPPING = [
    LocalMHA(**SMALL, dropout=0.5),
    FeedForward(E, dropout=0.5),
]


@pytest.mark.slow_but("FeedForward")
@pytest.mark.parametrize("module", DROPPING, ids=lambda module: type(module).__name__)
def test_dropout_needs_deterministic_false_and_an_rng(module):
    variables = random_variables(module, X)
    plain = apply(module, variables, X)
    np.testing.assert_array_equal(apply(module.clone(dropout=0.0), variables, X), plain)
    rngs = {"dropout": jax.random.key(1)}
    first = apply(module, variables, X, deterministic=False, rngs=rngs)
    assert np.abs(first - plain).max() > 1e-3
    np.testing.assert_array_equal(first, apply(module.clone(deterministic=False), variables, X, rngs=rngs))
    np.testing.assert_array_equal(
        plain,
        apply(module.clone(deterministic=False), variables, X, deterministic=True),
        "the call overrides the field",
    )
    other = apply(module, variables, X, deterministic=False, rngs={"dropout": jax.random.key(2)})
    assert np.abs(first - other).max() > 1e-3
    with pytest.raises(Exception, match="dropout") as caught:
        apply(module, variables, X, deterministic=False)
    assert type(caught.value).__name__ == "InvalidRngError"


# Dtypes and initialisers


@pytest.mark.slow_but("LocalMHA")
@pytest.mark.parametrize("module", [LocalMHA(**SMALL, prenorm=True), FeedForward(E)], ids=lambda m: type(m).__name__)
def test_dtype_and_param_dtype(module):
    half = module.clone(dtype=jnp.bfloat16)
    variables = init(half, X)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out = apply(half, variables, X)
    assert out.dtype == jnp.bfloat16
    cases.assert_close(out, apply(module, variables, X), "bfloat16")
    stored = init(module.clone(param_dtype=jnp.bfloat16), X)
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("fan_in", [7, 300])
def test_linear_layers_start_uniform_by_their_inputs(fan_in):
    bound = fan_in**-0.5
    kernel = linear_init(jax.random.key(0), (fan_in, 2000))
    bias = linear_bias_init(fan_in)(jax.random.key(1), (20000,))
    for x in (kernel, bias):
        x = np.asarray(x).ravel()
        assert np.abs(x).max() <= bound
        quartiles = np.quantile(x, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(quartiles / bound, [-1, -0.5, 0, 0.5, 1], atol=0.03)


def test_modules_start_from_these_distributions():
    module = LocalMHA(
        dim=64, window_size=4, prenorm=True, qk_rmsnorm=True, gate_values_per_head=True, attention_sinks=True
    )
    params = init(module, jnp.zeros((1, 3, 64)))["params"]
    for kernel in (params["to_qkv"]["kernel"], params["to_v_gate"]["kernel"], params["to_out"]["kernel"]):
        bound = kernel.shape[0] ** -0.5
        assert 0.95 * bound < np.abs(kernel).max() <= bound
    assert 0.0 < np.abs(params["to_v_gate"]["bias"]).max() <= 64**-0.5
    for name in ("q_scale", "k_scale"):
        np.testing.assert_array_equal(params[name], 1)
    np.testing.assert_array_equal(params["norm"]["scale"], 1)
    np.testing.assert_array_equal(params["sinks"], 0)
    bias = init(DynamicPositionBias(64, 3), 2, 4)["params"]
    assert 0.7 < np.abs(bias["dense_0"]["bias"]).max() <= 1.0, "one input: within 1"
    assert np.abs(bias["dense_1"]["bias"]).max() <= 64**-0.5


@pytest.mark.parametrize("module", [LocalMHA(**SMALL), FeedForward(E)], ids=lambda module: type(module).__name__)
def test_initialisers_may_carry_partitions(module):
    module = module.clone(
        kernel_init=nn.with_partitioning(linear_init, (None, "model")),
        out_kernel_init=nn.with_partitioning(linear_init, ("model", None)),
    )
    specs = nn.get_partition_spec(jax.eval_shape(lambda: init(module, X)))["params"]
    widening = "to_qkv" if isinstance(module, LocalMHA) else "to_hidden"
    assert specs[widening]["kernel"] == PartitionSpec(None, "model")
    assert specs["to_out"]["kernel"] == PartitionSpec("model", None)
    variables = init(module, X)
    assert apply(module, variables, X).shape == X.shape


# FeedForward


def test_feed_forward_is_its_equation():
    module = FeedForward(E, mult=2)
    variables = random_variables(module, X)
    p = jax.tree.map(np.asarray, variables["params"])
    x = np.asarray(X)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["norm"]["scale"] + p["norm"][
        "bias"
    ]
    values, gates = np.split(x @ p["to_hidden"]["kernel"], 2, axis=-1)
    assert values.shape[-1] == int(E * 2 * 2 / 3)
    gelu = np.asarray(jax.scipy.stats.norm.cdf(gates)) * gates
    cases.assert_close(apply(module, variables, X), (values * gelu) @ p["to_out"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gelu_rounds_once(dtype):
    x = jnp.linspace(-9, 9, 301, dtype=dtype)
    exact = [float(value) * 0.5 * math.erfc(-float(value) / 2**0.5) for value in x]
    ours = gelu(x)
    assert ours.dtype == dtype
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-6)
    wide = x.astype(jnp.float32)
    expected = jax.vmap(jax.grad(lambda x: x * jax.scipy.stats.norm.cdf(x)))(wide)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(wide), expected, atol=2e-6)


# DynamicPositionBias


def bias_by_formula(params, distances):
    x = np.asarray(distances, np.float64)[..., None]
    for index in range(3):
        layer = params[f"dense_{index}"]
        x = x / (1 + np.exp(-x)) if index else x
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    return np.moveaxis(x, -1, 0)


DYNAMIC_WINDOWS = [place.window for place in cases.PLACES if place.window.window_size < 20][::3]


@pytest.mark.slow_but("unsigned")
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_dynamic_bias_is_the_network_of_the_distance(signed):
    module = DynamicPositionBias(5, 3, signed=signed)
    variables = random_variables(module, 2, 4)
    for window in set(DYNAMIC_WINDOWS):
        ours = apply(module, variables, window.window_size, window.slab, window.backward)
        distances = window.relative_positions()
        expected = bias_by_formula(variables["params"], distances if signed else np.abs(distances))
        assert ours.shape == (3, window.window_size, window.slab)
        cases.assert_close(ours, expected, err_msg=str(window))


def test_dynamic_bias_takes_the_queries_to_be_the_last_keys():
    module = DynamicPositionBias(5, 3)
    variables = random_variables(module, 2, 4)
    np.testing.assert_array_equal(apply(module, variables, 3, 7), apply(module, variables, 3, 7, 4))


# Errors


@pytest.mark.parametrize(
    ("call", "phrase"),
    [
        (lambda: init(LocalMHA(**SMALL, kv_heads=2), X), "`kv_heads` must divide `heads` (3), got 2"),
        (lambda: init(LocalMHA(**SMALL, kv_heads=0), X), "`kv_heads` must be at least 1, got 0"),
        (
            lambda: init(LocalMHA(**SMALL), X[0]),
            f"`x` must be [b, n, {E}] (`dim`), got shape (11, {E})",
        ),
        (lambda: init(LocalMHA(**SMALL), X[..., :4]), f"`x` must be [b, n, {E}]"),
        (
            lambda: init(LocalMHA(**SMALL), X, window_size=8),
            "A `window_size` in a call requires",
        ),
        (
            lambda: LocalAttention(4).apply({}, X[:, :8], X[:, :8], X[:, :8], window_size=2),
            "A `window_size` in a call requires",
        ),
        (lambda: LocalAttention(4).apply({}, X, X, X), "`k` must have a multiple of `window_size` (4) tokens, n in"),
        (lambda: init(LocalMHA(**{**SMALL, "dim_head": 5}), X), "`dim` of rotary must be even"),
        (
            lambda: init(LocalMHA(**{**SMALL, "window_size": 1}, causal=True, use_xpos=True), X),
            "`xpos_scale_base` in modules",
        ),
        (lambda: init(LocalMHA(**SMALL, causal=True, look_forward=1), X), "`look_forward` must be 0"),
        (
            lambda: init(LocalMHA(**SMALL), X, jnp.ones((2, 5), bool)),
            "`mask` must be [b, n] with n = 11",
        ),
        (
            lambda: init(LocalMHA(**SMALL, dropout=1.5, deterministic=False), X),
            "`dropout` must be",
        ),
        (
            lambda: DynamicPositionBias(5, 3).init(jax.random.key(0), 4, 2),
            "`j` must be at least `i` without an `offset`",
        ),
    ],
)
def test_wrong_calls_are_refused(call, phrase):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the phrase is compared below)
        call()
    assert phrase in str(caught.value)


@pytest.mark.slow
def test_the_norm_is_flaxs_and_keeps_nothing_of_an_interceptor():
    module, x = FeedForward(dim=6), cases.normal(0, 2, 5, 6)
    variables = module.init(jax.random.key(0), x)
    norm = {"params": {"scale": cases.normal(1, 6), "bias": cases.normal(2, 6)}}
    for dtype in (None, jnp.bfloat16):
        ours = LayerNorm(dtype=dtype).apply(norm, x)
        theirs = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype).apply(norm, x)
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), atol=1e-6)

    def shut(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        return 0 * out if isinstance(context.module, LayerNorm) else out

    with nn.intercept_methods(shut):
        module.apply(variables, x)
    assert jnp.abs(module.apply(variables, x)).max() > 0


@pytest.mark.parametrize(
    ("module", "x", "error", "phrase"),
    [
        (partial(FeedForward, 4, dropout=1.5), jnp.ones((2, 4)), ValueError, r"`dropout` must be in \[0, 1\), got 1.5"),
        (partial(FeedForward, 4, dropout=2.0), jnp.ones((2, 4)), ValueError, r"`dropout` must be in \[0, 1\), got 2.0"),
        (partial(FeedForward, 4, dropout="x"), jnp.ones((2, 4)), TypeError, "`dropout` must be a number, got 'x'"),
        (
            partial(FeedForward, 4),
            jnp.ones((2, 4), "complex64"),
            TypeError,
            "`x` must be of a floating dtype, got complex64",
        ),
        (partial(FeedForward, 4), jnp.ones((2, 4), bool), TypeError, "`x` must be of a floating dtype, got bool"),
        (
            partial(LocalMHA, 4, 3),
            jnp.ones((1, 2, 4), "complex64"),
            TypeError,
            "`x` must be of a floating dtype, got complex64",
        ),
        (partial(LocalMHA, 4, 3, dropout=1.5), jnp.ones((1, 2, 4)), ValueError, r"must be in \[0, 1\), got 1.5"),
        (partial(LocalMHA, 4, 3, dropout="x"), jnp.ones((1, 2, 4)), TypeError, "must be a number, got 'x'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_before_training(module, x, error, phrase):
    with pytest.raises(error, match=phrase):
        module().init(jax.random.key(0), x)


# Rotary and biases of published models


def test_biases_are_added_to_queries_keys_values_and_the_result():
    module = LocalMHA(**SMALL, use_bias=True, use_out_bias=True, kv_heads=1)
    shapes = shapes_of(module, X)
    assert (shapes["to_qkv/bias"], shapes["to_out/bias"]) == ((30,), (E,))
    variables = random_variables(module, X)
    (qkv, out), params = ((variables["params"][name] for name in ("to_qkv", "to_out")), variables["params"])
    x = X @ qkv["kernel"] + qkv["bias"]
    q, k, v = (part.reshape(2, 11, -1, 6).swapaxes(1, 2) for part in jnp.split(x, [18, 24], axis=-1))
    options = {"window_size": 4, "exact_windowsize": True, "rotary": Rotary(6)}
    attended = local_attention(q, k, v, **options).swapaxes(1, 2).reshape(2, 11, 18)
    cases.assert_close(apply(module, variables, X), attended @ out["kernel"] + out["bias"])
    assert set(params) == {"to_qkv", "to_out"}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"qk_rmsnorm": True}], ids=str)
def test_a_scale_takes_the_place_of_every_other(fields):
    module = LocalMHA(**SMALL, scale=0.7, **fields)
    variables = random_variables(module, X)
    params = variables["params"]
    doubled = jnp.concatenate([2 * params["to_qkv"]["kernel"][:, :18], params["to_qkv"]["kernel"][:, 18:]], 1)
    weights = {"q_scale": 2 * params["q_scale"]} if fields else {"to_qkv": {"kernel": doubled}}
    ours = apply(module, variables, X)
    cases.assert_close(apply(module.clone(scale=0.35), {"params": params | weights}, X), ours)
    assert np.abs(apply(module.clone(scale=None), variables, X) - ours).max() > 1e-3


def test_fresh_biases_lie_within_the_bound_of_the_fan_in():
    params = init(LocalMHA(64, 4, use_bias=True, use_out_bias=True, heads=4), jnp.ones((1, 5, 64)))["params"]
    for name, fan_in in (("to_qkv", 64), ("to_out", 256)):
        bias = np.abs(params[name]["bias"])
        assert 0.5 * fan_in**-0.5 < bias.max() <= fan_in**-0.5


ROTARIES = {
    "theta": Rotary(6, theta=50.0),
    "part of a head": Rotary(4, theta=50.0),
    "pairs": Rotary(6, interleaved=True),
    "yarn": Rotary.yarn(6, theta=150.0, factor=4.0, original_max_position_embeddings=8),
    "none": False,
}


@pytest.mark.parametrize("name", ROTARIES)
def test_a_rotary_that_is_given_turns_queries_and_keys(name):
    rotary = ROTARIES[name]
    module = LocalAttention(4, causal=True, dim=6, autopad=True, rotary=rotary)
    q, k, v = (cases.normal(seed, 2, 3, 11, 6) for seed in range(3))
    expected = local_attention(q, k, v, window_size=4, causal=True, autopad=True, rotary=rotary or None)
    cases.assert_close(module.apply({}, q, k, v), expected)
    inside = LocalMHA(**SMALL, causal=True, rotary=rotary)
    assert inside._attention(None).options().rotary == (rotary or None)


@pytest.mark.parametrize(
    ("fields", "error", "phrase"),
    [
        ({"rotary": 6}, TypeError, "`rotary` must be a Rotary, False or None, got 6"),
        ({"rotary": (Rotary(6),)}, TypeError, "only LocalTransformer takes a sequence, one for each layer"),
        ({"rotary": Rotary(8)}, ValueError, "`rotary.dim` must be at most the width of a head, got 8"),
        ({"rotary": Rotary(6), "use_xpos": True}, ValueError, "`rotary` takes the place of `use_xpos`, got both"),
        ({"rotary": Rotary(6), "reference_rotary": True}, ValueError, "takes the place of `reference_rotary`"),
        ({"rotary": Rotary(6), "use_rotary_pos_emb": False}, ValueError, "takes the place of `use_rotary_pos_emb`"),
    ],
)
def test_a_rotary_that_does_not_fit_is_refused(fields, error, phrase):
    with pytest.raises(error) as caught:
        init(LocalMHA(**SMALL, **fields), X)
    assert phrase in str(caught.value)
