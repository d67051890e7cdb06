"""Arrays on meshes with explicit axes, the default of `jax.make_mesh`, and with automatic ones."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention import (
    AttentionOptions,
    FeedForward,
    KVCache,
    LocalMHA,
    LocalTransformer,
    Rotary,
    Window,
    attend_cache,
    cached_attention,
    generate,
    local_attention,
    stream,
)
from tests.cases import assert_close, normal

pytestmark = pytest.mark.usefixtures("quick_compile")

WINDOW = Window(4, causal=True)
OPTIONS = AttentionOptions(WINDOW, rotary=Rotary(8))
SPECS = {"batch": P("data"), "heads": P(None, "model"), "both": P("data", "model")}
MODEL = {
    "num_tokens": 16,
    "max_seq_len": 32,
    "dim": 16,
    "depth": 1,
    "heads": 4,
    "dim_head": 4,
    "local_attn_window_size": 4,
}
TOKENS = np.random.RandomState(0).randint(0, 16, (8, 12))


def mesh_of(kind, shape=(2, 2), names=("data", "model")):
    if len(jax.devices("cpu")) < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} devices")
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=jax.devices("cpu")[: np.prod(shape)])


def spread(x, mesh, spec=()):
    """Put a tree of arrays on a mesh, each sharded over as many of these axes as it has."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim]))), x)


def spec_of(x):
    return tuple(x.sharding.spec)


def heads(seed, n=12):
    return normal(seed, 4, 4, n, 8)


@pytest.fixture(params=SPECS)
def spec(request):
    return SPECS[request.param]


@pytest.fixture
def mesh():
    return mesh_of(AxisType.Explicit)


# Functions


EXTRAS = {
    "mask": (np.arange(12) < np.array([[12], [7], [12], [3]]), lambda spec: spec[:1]),
    "segment_ids": (np.arange(12)[None] // 5 + np.zeros((4, 1), int), lambda spec: spec[:1]),
    "attn_bias": (normal(5, 4, 4, 8), lambda spec: spec[1:]),
    "sinks": (normal(6, 4), lambda spec: spec[1:]),
    "global_keys": ((normal(7, 2, 2, 8), normal(8, 2, 2, 8)), lambda spec: spec[1:]),
}


@pytest.mark.slow_but("both-whole")
@pytest.mark.parametrize("is_spread", [True, False], ids=["spread", "whole"])
def test_attention_and_its_gradients_keep_the_sharding_of_q(mesh, spec, is_spread):
    arrays = heads(0), normal(1, 4, 2, 12, 8), normal(2, 4, 2, 12, 8)
    extras = {name: x for name, (x, _) in EXTRAS.items()}

    @jax.jit
    def both(arrays, extras):
        def attend(*arrays):
            return local_attention(*arrays, window=WINDOW, rotary=Rotary(8), **extras)

        out, pull_back = jax.vjp(attend, *arrays)
        return out, pull_back(jnp.cos(out))

    expected = both(arrays, extras)
    placed = {name: spread(x, mesh, of(spec) if is_spread else P()) for name, (x, of) in EXTRAS.items()}
    out, gradients = both(spread(arrays, mesh, spec), placed)
    assert_close((out, gradients), expected)
    padded = tuple(spec) + (None,) * (4 - len(spec))
    assert [spec_of(x) for x in (out, *gradients)] == [padded] * 4


@pytest.mark.slow_but("both")
def test_second_derivatives_on_explicit_axes(mesh, spec):
    q, k, v = heads(0), heads(1), heads(2)

    @jax.jit
    def along(q):
        def gradient(q):
            return jax.grad(lambda q: (local_attention(q, k, v, window=WINDOW) ** 2).sum())(q)

        return jax.jvp(gradient, (q,), (q,))[1]

    second = along(spread(q, mesh, spec))
    assert_close(second, along(q))
    assert spec_of(second)[: len(spec)] == tuple(spec)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 12, 300])
def test_a_cache_on_explicit_axes_keeps_its_sharding_or_takes_that_of_the_tokens(mesh, spec, n):
    q, k, v = heads(0, n), heads(1, n), heads(2, n)
    cache = KVCache.create(OPTIONS, 4, 4, 8, keep_first=1)
    attend = jax.jit(cached_attention)
    expected = attend(q, k, v, cache)
    new = spread((q, k, v), mesh, spec)
    rows = tuple(spec)[:1]
    for held in (cache, jax.tree.map(lambda x: spread(x, mesh, spec if x.ndim == 4 else spec[:1]), cache)):
        out, grown = attend(*new, held)
        assert_close((out, grown), expected)
        assert all(spec_of(x)[: len(spec)] == tuple(spec) for x in (out, grown.k, grown.v))
        assert spec_of(grown.length)[:1] == rows


@pytest.mark.slow_but("heads")
def test_a_cache_in_two_steps_and_back_on_explicit_axes(mesh, spec):
    q, k, v = heads(0, 2), heads(1, 2), heads(2, 2)
    mask, ids = np.array([[True, True], [True, False]] * 2), np.array([[0, 1]] * 4)

    @jax.jit
    def steps(q, k, v, mask, ids):
        cache = KVCache.create(OPTIONS, 4, 4, 8, rewind=3).append(k, v, mask=mask, segment_ids=ids)
        out = attend_cache(q, cache, mask=mask, segment_ids=ids)
        return jnp.where(mask[:, None, :, None], out, 0), cache.rewind(1)

    expected = steps(q, k, v, mask, ids)
    assert_close(steps(*spread((q, k, v), mesh, spec), *spread((mask, ids), mesh, spec[:1])), expected)


# Modules


MODELS = {
    "defaults": {},
    "scan": {"depth": 2, "scan_layers": True, "remat": True, "use_abs_pos_emb": False, "num_residual_streams": 1},
    "everything": {
        "depth": 2,
        "local_attn_window_size": (4, None),
        "use_dynamic_pos_bias": True,
        "qk_rmsnorm": True,
        "kv_heads": 2,
        "attention_sinks": True,
        "memory_tokens": 2,
    },
}


@pytest.fixture(params=MODELS)
def model(request):
    return LocalTransformer(**MODEL | MODELS[request.param])


@pytest.mark.slow
def test_a_model_on_explicit_axes_is_the_model(mesh, model):
    variables = model.init(jax.random.key(0), TOKENS)
    ids = np.arange(12) // 5 + np.zeros((8, 1), int)

    @jax.jit
    def everything(variables, tokens, ids):
        loss, gradients = jax.value_and_grad(lambda v: model.apply(v, tokens, return_loss=True))(variables)
        decoded, cache = model.apply(variables, tokens[:, :5], cache=model.init_cache(8))
        after = model.apply(variables, tokens[:, 5:6], cache=cache, segment_ids=ids[:, 5:6])[0]
        return model.apply(variables, tokens, segment_ids=ids), decoded, after, loss, gradients

    expected = everything(variables, TOKENS, ids)
    whole, rows = spread(variables, mesh), P("data")
    results = everything(whole, *spread((TOKENS, ids), mesh, rows))
    assert_close(results, expected)
    assert [spec_of(x)[:1] for x in results[:3]] == [("data",)] * 3
    assert all(not any(spec_of(x)) for x in jax.tree.leaves(results[3:]))


@pytest.mark.slow
def test_a_head_may_be_spread_over_the_vocabulary(mesh):
    model = LocalTransformer(**MODEL | {"depth": 0})
    variables = model.init(jax.random.key(0), TOKENS)
    expected = model.apply(variables, TOKENS, return_loss=True)
    with jax.set_mesh(mesh):
        placed = spread(variables, mesh)
        placed["params"]["to_logits"]["kernel"] = spread(
            variables["params"]["to_logits"]["kernel"], mesh, P(None, "model")
        )
        loss = jax.jit(partial(model.apply, return_loss=True))(placed, spread(TOKENS, mesh, P("data")))
    assert_close(loss, expected)


@pytest.mark.slow_but("mha")
@pytest.mark.parametrize(
    "module", [LocalMHA(16, 4, heads=2, dim_head=8, causal=True, qk_rmsnorm=True), FeedForward(16)], ids=["mha", "ff"]
)
def test_modules_on_explicit_axes(mesh, module):
    x = normal(0, 4, 12, 16)
    variables = module.init(jax.random.key(0), x)
    out = jax.jit(module.apply)(spread(variables, mesh), spread(x, mesh, P("data")))
    assert_close(out, module.apply(variables, x))
    assert spec_of(out)[:1] == ("data",)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "model"])
def test_parameters_of_heads_may_be_spread_where_heads_are_whole(axis, mesh):
    x = normal(0, 4, 12, 16)
    module = LocalMHA(16, 4, heads=2, dim_head=8, causal=True, attention_sinks=True, memory_tokens=3)
    params = module.init(jax.random.key(0), x)["params"]
    placed = {name: spread(p, mesh, () if isinstance(p, dict) else (axis,)) for name, p in params.items()}
    assert sum(any(spec_of(p)) for p in jax.tree.leaves(placed)) == 3  # sinks, keys and values of the memory

    @jax.jit
    def run(params, x):
        out = lambda params: module.apply({"params": params}, x)  # noqa: E731
        return out(params), jax.grad(lambda params: jnp.sin(out(params)).sum())(params)

    assert_close(run(placed, spread(x, mesh, P("data"))), run(params, x))
    cached = jax.jit(lambda params, x: module.apply({"params": params}, x, cache=module.init_cache(4))[0])
    for n in (1, 5):
        assert_close(cached(placed, spread(x[:, :n], mesh, P("data"))), cached(params, x[:, :n]))


# A sequence sharded over devices


def collectives(compiled):
    """Return the results of a program's collectives, gathers first."""
    kinds = "all-gather|all-to-all|collective-permute|reduce-scatter"
    return sorted(f"{kind} {shape}" for shape, kind in re.findall(rf"= (\S+) ({kinds})(?:-start)?\(", compiled))


@pytest.mark.slow_but("plain")
@pytest.mark.parametrize(
    "options",
    [{}, {"segment_ids": np.arange(12) // 5 + np.zeros((8, 1), int)}, {"mask": np.arange(12) < np.full((8, 1), 7)}],
    ids=["plain", "documents", "mask"],
)
def test_labels_cross_the_borders_of_a_spread_sequence(options):
    """Each device fetches one token per row from its neighbour; the last token of a row has no label."""
    mesh = mesh_of(AxisType.Explicit, (2, 4), ("data", "sequence"))
    model = LocalTransformer(**MODEL | {"depth": 0, "use_abs_pos_emb": False, "ignore_index": 3})
    variables = model.init(jax.random.key(0), TOKENS)
    tokens = np.where(np.arange(12) == 9, 99, TOKENS) if "mask" in options else TOKENS
    expected = model.apply(variables, tokens, **options, method="sum_loss")

    @jax.jit
    def sum_loss(variables, tokens, options):
        return model.apply(variables, tokens, **options, method="sum_loss")

    both = P("data", "sequence")
    arguments = spread(variables, mesh), spread(tokens, mesh, both)
    assert_close(sum_loss(*arguments, spread(options, mesh, both)), expected)
    assert_close(sum_loss(*arguments, options), expected)  # options replicated on every device
    jax.config.update("jax_disable_most_optimizations", False)  # `quick_compile` sets it for the next test again
    compiled = sum_loss.lower(*arguments, spread(options, mesh, both)).compile().as_text()
    found = collectives(compiled)
    assert found
    assert all(re.match(r"collective-permute \w+\[4,1\]", name) for name in found)


ALONG = np.arange(12) + np.zeros((8, 1), int)
SPREAD = {
    "plain": ({}, {}),
    "documents in a loop": ({"scan_layers": True, "remat": True, "depth": 2}, {"segment_ids": ALONG // 5}),
    "positions": ({"num_residual_streams": 1}, {"positions": 2 * ALONG + 3}),
    "dynamic bias": ({"use_dynamic_pos_bias": True, "local_attn_window_size": 3}, {}),
    "global": ({"local_attn_window_size": None, "use_abs_pos_emb": False}, {}),
    "everything": (
        {
            "kv_heads": 2,
            "dim_value": 6,
            "attention_sinks": True,
            "memory_tokens": 2,
            "qk_rmsnorm": True,
            "gate_values_per_head": True,
            "use_bias": True,
            "use_out_bias": True,
            "use_xpos": True,
        },
        {"mask": ALONG != 7, "segment_ids": ALONG // 5},
    ),
}


@pytest.mark.slow_but("positions")
@pytest.mark.parametrize("name", SPREAD)
def test_a_model_on_a_spread_sequence_is_the_model(name):
    fields, options = SPREAD[name]
    mesh, both = mesh_of(AxisType.Explicit, (2, 4), ("data", "sequence")), P("data", "sequence")
    model = LocalTransformer(**MODEL | fields)
    variables = model.init(jax.random.key(0), TOKENS)

    @jax.jit
    def everything(variables, tokens, options):
        def loss(variables):
            return model.apply(variables, tokens, **options, labels=tokens, method="sum_loss").mean

        return model.apply(variables, tokens, **options), jax.value_and_grad(loss)(variables)

    placed = spread(variables, mesh), spread(TOKENS, mesh, both), spread(options, mesh, both)
    results, expected = everything(*placed), everything(variables, TOKENS, options)
    exists = options.get("mask", np.ones(TOKENS.shape, bool))[..., None]
    assert_close(np.where(exists, results[0], 0), np.where(exists, expected[0], 0))
    assert_close(results[1], expected[1])
    assert spec_of(results[0]) == ("data", "sequence", None)


# Generation


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_prompts_that_are_spread_stay_spread(kind):
    mesh, model = mesh_of(kind), LocalTransformer(**MODEL)
    variables = model.init(jax.random.key(0), TOKENS)
    lengths, mask = np.arange(5, 13), np.arange(12) >= np.arange(8)[:, None]
    rows = partial(spread, mesh=mesh, spec=P("data"))
    placed, options = spread(variables, mesh), {"rng": jax.random.key(1), "eos": 3}
    for of in ({"prompt_lengths": lengths}, {"prompt_mask": mask}):
        expected = generate(model, variables, TOKENS, 6, **options, **of, return_log_probs=True)
        results = generate(model, placed, rows(TOKENS), 6, **options, **rows(of), return_log_probs=True)
        assert_close(results, expected)
        assert all({shard.data.shape[0] for shard in x.addressable_shards} == {4} for x in results)
    steps = stream(model, placed, rows(TOKENS), 6, **options)
    np.testing.assert_array_equal(np.stack(list(steps), 1), generate(model, variables, TOKENS, 6, **options)[0])


@pytest.mark.slow
def test_two_turns_on_explicit_axes(mesh):
    model = LocalTransformer(**MODEL)
    variables = model.init(jax.random.key(0), TOKENS)

    def turns(variables, tokens, cache):
        _, _, cache = generate(model, variables, tokens[:, :5], 4, temperature=0.0, cache=cache)
        return generate(model, variables, tokens[:, 5:], 4, temperature=0.0, cache=cache)

    expected = turns(variables, TOKENS, model.init_cache(8))
    results = turns(spread(variables, mesh), spread(jnp.asarray(TOKENS), mesh, P("data")), model.init_cache(8))
    assert_close(results, expected)
    assert spec_of(results[0])[:1] == ("data",)


# A training step


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_step_of_eight_devices_is_that_of_one_and_gathers_no_activations(kind):
    mesh = mesh_of(kind, (8,), ("data",))
    model, optimizer = LocalTransformer(**MODEL), optax.sgd(1.0, momentum=0.9)
    variables = model.init(jax.random.key(0), TOKENS)
    state = variables, optimizer.init(variables)

    @jax.jit
    def step(state, tokens):
        variables, memory = state
        loss, gradients = jax.value_and_grad(lambda v: model.apply(v, tokens, return_loss=True))(variables)
        updates, memory = optimizer.update(gradients, memory, variables)
        return (optax.apply_updates(variables, updates), memory), loss

    jax.config.update("jax_disable_most_optimizations", False)  # `quick_compile` sets it for the next test again
    arguments = spread(state, mesh), spread(TOKENS, mesh, P("data"))
    compiled = step.lower(*arguments).compile()
    collectives = {name for name in ("all-gather", "all-to-all", "collective-permute") if name in compiled.as_text()}
    assert not collectives
    assert "all-reduce" in compiled.as_text()  # of gradients
    (moved, _), loss = step(*arguments)
    (expected, _), expected_loss = step(state, TOKENS)
    assert_close(loss, expected_loss)
    assert_close(moved, expected)


# Inside shard_map


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("implementation", [None, "xla", "dense"])
def test_one_array_may_vary_alone_inside_shard_map(kind, implementation):
    mesh, (q, k, v) = mesh_of(kind, (2,), ("x",)), (normal(seed, 1, 2, 70, 8) for seed in range(3))
    attend = partial(local_attention, q, k, v, window=WINDOW, rotary=Rotary(8), implementation=implementation)
    calls = {
        "q_offset": (lambda x: attend(q_offset=x[0]), np.array([0, 3])),
        "scale": (lambda x: attend(scale=x[0]), np.array([0.1, 0.2], np.float32)),
        "scale's gradient": (jax.grad(lambda x: attend(scale=x[0]).sum()), np.array([0.1, 0.2], np.float32)),
        "mask": (lambda x: attend(mask=x), np.arange(140).reshape(2, 70) % 3 > 0),
    }
    for name, (call, varying) in calls.items():
        mapped = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
        expected = jnp.concatenate([call(jnp.asarray(varying[:1])), call(jnp.asarray(varying[1:]))])
        np.testing.assert_allclose(mapped(spread(varying, mesh, P("x"))), expected, rtol=1e-5, atol=2e-5, err_msg=name)


@pytest.mark.slow_but("12")
@pytest.mark.parametrize("n", [1, 12, 300])
def test_a_cache_may_be_made_inside_shard_map(n):
    mesh, (q, k, v) = mesh_of(AxisType.Explicit, (2,), ("x",)), (heads(seed, n) for seed in range(3))

    def decode(q, k, v):
        return cached_attention(q, k, v, KVCache.create(OPTIONS, len(q), 4, 8, keep_first=2))

    mapped = jax.jit(jax.shard_map(decode, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    assert_close(mapped(*spread((q, k, v), mesh, P("x"))), decode(q, k, v))


@pytest.mark.slow
def test_generation_inside_shard_map():
    mesh, model = mesh_of(AxisType.Explicit, (2,), ("x",)), LocalTransformer(**MODEL)
    variables = model.init(jax.random.key(0), TOKENS)

    def answer(tokens):
        return generate(model, variables, tokens, 12, temperature=0.0, eos=3)

    mapped = jax.jit(jax.shard_map(answer, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    assert_close(mapped(spread(TOKENS, mesh, P("x"))), answer(TOKENS))
