"""Reuse of values, programs and caches: by several threads, as copies, exported, a thousand times, donated."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from flax_local_attention import (
    AttentionOptions,
    DynamicPositionBias,
    FeedForward,
    KVCache,
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    Operands,
    Rotary,
    Window,
    Windowed,
    attend,
    attend_cache,
    cached_attention,
    generate,
    local_attention,
    rotate,
    stream,
)
from tests.cases import assert_close, normal
from tests.example_runs import ROOT

pytestmark = pytest.mark.usefixtures("quick_compile")

WINDOW = Window(5, causal=True, exact_windowsize=True)
FIELDS = {
    "num_tokens": 11,
    "max_seq_len": 64,
    "dim": 8,
    "depth": 1,
    "local_attn_window_size": 3,
    "dim_head": 4,
    "heads": 2,
    "use_abs_pos_emb": False,
    "num_residual_streams": 1,
}
MODEL = LocalTransformer(**FIELDS)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)), jnp.int32)
Q, K, V = (normal(seed, 2, 3, 13, 4) for seed in range(3))


@pytest.fixture(scope="module")
def variables():
    """Parameters of `MODEL`."""
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)


def options():
    """Return equal options, never the same object."""
    return AttentionOptions(Window(5, causal=True, exact_windowsize=True), rotary=Rotary(4, theta=100.0))


def new_cache(**more):
    """Return an empty cache with these options."""
    return KVCache.create(options(), 2, 3, 4, **more)


# Users' calls, each a function of a model's parameters.
CALLS = {
    "local_attention": lambda variables: local_attention(Q, K, V, window=WINDOW, rotary=Rotary(4)),
    "its gradient": lambda variables: jax.grad(lambda q: local_attention(q, K, V, window=WINDOW).sum())(Q),
    "its second derivative": lambda variables: jax.jvp(
        jax.grad(lambda q: local_attention(q, K, V, window=WINDOW).sum()), (Q,), (K,)
    ),
    "attend": lambda variables: attend(Operands.create(Q, K, V, options()), options()),
    "cached_attention": lambda variables: cached_attention(Q, K, V, new_cache()),
    "attend_cache": lambda variables: attend_cache(Q[:, :, :1], new_cache().append(K, V)),
    "rotate": lambda variables: rotate(Q, Rotary(4), jnp.arange(13)),
    "a model": lambda variables: MODEL.apply(variables, TOKENS),
    "a loss": lambda variables: MODEL.apply(variables, TOKENS, return_loss=True),
    "a step": lambda variables: MODEL.apply(variables, TOKENS[:, :1], cache=MODEL.init_cache(2)),
    "generate": lambda variables: generate(MODEL, variables, TOKENS, 6, temperature=0.0),
    "generate with a cache": lambda variables: generate(
        MODEL, variables, TOKENS, 6, rng=jax.random.key(0), cache=MODEL.init_cache(2)
    ),
    "stream": lambda variables: list(stream(MODEL, variables, TOKENS, 6, temperature=0.0)),
    "initialisation": lambda variables: MODEL.init(jax.random.key(0), TOKENS),
}


# ---- threads


@pytest.mark.slow
def test_threads_that_trace_and_run_everything_at_once_compute_what_one_does(variables):
    expected = {name: call(variables) for name, call in CALLS.items()}
    jax.clear_caches()
    found, barrier = {}, threading.Barrier(4)

    def work(number):
        names = list(CALLS)[3 * number :] + list(CALLS)[: 3 * number]  # every call, from another start
        barrier.wait()
        for name in names:
            try:
                found[number, name] = CALLS[name](variables)
            except Exception as error:
                found[number, name] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * len(CALLS)
    for (number, name), value in found.items():
        assert not isinstance(value, Exception), (number, name, value)
        jax.tree.map(assert_close, value, expected[name])


# ---- copies


def copies(value):
    """Return copies of a value by every means that Python has."""
    pickled = [pickle.loads(pickle.dumps(value, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    return [copy.copy(value), copy.deepcopy(value), *pickled]


CACHES = {
    "of attention": lambda: new_cache(rewind=2, keep_first=1).append(K, V),
    "with global keys": lambda: new_cache(global_keys=(normal(5, 3, 2, 4), normal(6, 3, 2, 4))),
    "of a layer": lambda: LocalMHA(8, window_size=3, heads=2, dim_head=4, causal=True).init_cache(2),
    "of a model": lambda: MODEL.init_cache(2, rewind=1),
    "of a model of all kinds": lambda: LocalTransformer(
        **FIELDS | {"depth": 2, "local_attn_window_size": (3, None), "memory_tokens": 2, "attention_sinks": True}
    ).init_cache(2, keep_first=1, max_length=9),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_copied_cache_is_the_same_value_and_shares_no_array_by_a_deep_copy(name):
    cache = CACHES[name]()
    for other in copies(cache):
        assert type(other) is type(cache)
        assert jax.tree.structure(other) == jax.tree.structure(cache)
        jax.tree.map(np.testing.assert_array_equal, other, cache)
    pairs = zip(jax.tree.leaves(copy.deepcopy(cache)), jax.tree.leaves(cache), strict=True)
    assert all(x is not y for x, y in pairs)


def test_a_copied_model_needs_no_new_program(variables):
    apply = jax.jit(lambda model, variables, tokens: model.apply(variables, tokens), static_argnums=0)
    for model in (MODEL, *copies(MODEL), MODEL.clone(), LocalTransformer(**FIELDS)):
        apply(model, variables, TOKENS)
    assert apply._cache_size() == 1


MODULES = {
    "attention": (LocalMHA(8, window_size=3, heads=2, dim_head=4), (normal(0, 2, 7, 8),)),
    "feed-forward": (FeedForward(8), (normal(0, 2, 7, 8),)),
    "position bias": (DynamicPositionBias(4, 2), (3, 5)),
    "attention without parameters": (LocalAttention(3, dim=4, autopad=True), (Q, K, V)),
    "model": (MODEL, (TOKENS,)),
}


@pytest.mark.slow_but("*-copy")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", MODULES)
def test_a_copied_module_computes_the_same_bound_and_unbound(name, copied):
    module, inputs = MODULES[name]
    made = module.init(jax.random.key(0), *inputs)
    expected = module.apply(made, *inputs)
    assert_close(copied(module).apply(made, *inputs), expected)
    if copied is copy.deepcopy:
        assert_close(copied(module.bind(made))(*inputs), expected)


# ---- exported programs


def exported(fn, *arrays):
    """Export a function and read it back."""
    program = export.export(jax.jit(fn))(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays))
    return bytes(program.serialize(vjp_order=1))


EXPORTED = {
    "local_attention": lambda variables: (partial(local_attention, window=WINDOW, rotary=Rotary(4)), (Q, K, V)),
    "a model": lambda variables: (MODEL.apply, (variables, TOKENS)),
    "a loss": lambda variables: (partial(MODEL.apply, return_loss=True), (variables, TOKENS)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_has_its_gradient(name, variables):
    pytest.importorskip("flatbuffers")
    fn, arrays = EXPORTED[name](variables)
    program = export.deserialize(bytearray(exported(fn, *arrays)))
    assert_close(program.call(*arrays), fn(*arrays))
    seen = normal(9, *jax.eval_shape(fn, *arrays).shape)
    gradients = [
        jax.grad(lambda first, f=f: (f(first, *arrays[1:]) * seen).sum())(arrays[0]) for f in (program.call, fn)
    ]
    jax.tree.map(assert_close, *gradients)


RUNS_STEPS = """
import pickle, sys
import jax, numpy as np
from jax import export
import flax_local_attention
program, variables, tokens, cache = pickle.load(open(sys.argv[1], "rb"))
step, logits = export.deserialize(bytearray(program)), []
for token in tokens.T:
    out, cache = step.call(variables, token[:, None], cache)
    logits.append(out)
np.save(sys.argv[2], np.concatenate(logits, 1))
"""


@pytest.mark.slow
def test_a_decoding_step_is_exported_and_run_by_a_fresh_process(variables, tmp_path):
    pytest.importorskip("flatbuffers")
    cache = MODEL.init_cache(2)
    step = lambda variables, tokens, cache: MODEL.apply(variables, tokens, cache=cache)  # noqa: E731
    program = exported(step, variables, TOKENS[:, :1], cache)
    given = jax.device_get((variables, TOKENS, cache))
    (tmp_path / "given").write_bytes(pickle.dumps((program, *given)))
    command = [sys.executable, "-c", RUNS_STEPS, str(tmp_path / "given"), str(tmp_path / "logits.npy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_close(np.load(tmp_path / "logits.npy"), MODEL.apply(variables, TOKENS))


# ---- a thousand calls


def count_compilations(run):
    """Count the programs compiled and the functions traced while `run` runs."""
    counts = {"/jax/core/compile/backend_compile_duration": 0, "/jax/core/compile/jaxpr_trace_duration": 0}

    def listen(event, seconds, **_):
        if event in counts:
            counts[event] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return tuple(counts.values())


def equal_calls():
    """Return public calls, each a function of a number that selects among kinds of equal arguments."""

    def number(index, value):
        return (value, np.int64(value), np.int32(value))[index % 3]

    def window(index):
        return Window(number(index, 5), causal=True, exact_windowsize=True)

    return {
        "local_attention by a window": lambda i, _: local_attention(
            Q, K, V, window=window(i), rotary=Rotary(number(i, 4))
        ),
        "local_attention by numbers": lambda i, _: local_attention(
            Q, K, V, window_size=number(i, 5), causal=True, autopad=True
        ),
        "local_attention by an implementation": lambda i, _: local_attention(
            Q, K, V, window=window(i), implementation=Windowed(block=number(i, 8))
        ),
        "attend": lambda i, _: attend(Operands.create(Q, K, V, options()), options()),
        "cached_attention": lambda i, cache: cached_attention(Q[:, :, :1], K[:, :, :1], V[:, :, :1], cache),
        "append": lambda i, cache: cache.append(K[:, :, :1], V[:, :, :1]),
        "attend_cache": lambda i, cache: attend_cache(Q[:, :, :1], cache),
        "rewind": lambda i, cache: cache.rewind(jnp.asarray([0, 1])),
        "rotate": lambda i, _: rotate(Q, Rotary(number(i, 4)), np.arange(13)),
    }


@pytest.mark.slow_but("rewind")
@pytest.mark.parametrize("name", equal_calls())
def test_a_thousand_equal_calls_compile_one_program(name):
    call, cache = equal_calls()[name], new_cache(rewind=2)
    cache = cache.append(K, V)
    jax.clear_caches()
    first = count_compilations(lambda: [call(index, cache) for index in range(3)])
    assert min(first) > 0
    compiled, traced = count_compilations(lambda: [call(index, cache) for index in range(1000)])
    assert (compiled, traced) == (0, 0)


@pytest.mark.slow_but("generate")
@pytest.mark.parametrize(
    "run", [generate, lambda *args, **more: list(stream(*args, **more))], ids=["generate", "stream"]
)
def test_a_hundred_generations_compile_one_program(run, variables):
    def call(index):
        length, top_k, eos = (
            kind(value) for value, kind in zip((4, 3, 1), [(int, np.int64)[index % 2]] * 3, strict=True)
        )
        model = LocalTransformer(**FIELDS | {"depth": (int, np.int64)[index % 2](1)})
        return run(model, variables, TOKENS, length, rng=jax.random.key(index), top_k=top_k, eos=[eos])

    for index in range(2):
        call(index)
    compiled, _ = count_compilations(lambda: [call(index) for index in range(100)])
    assert compiled == 0


# ---- ten thousand steps


def resident_bytes():
    """Return the resident memory of this process in bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.slow
def test_ten_thousand_decoding_steps_need_no_more_memory_than_five_thousand(variables):
    step = jax.jit(lambda cache, token: MODEL.apply(variables, token, cache=cache), donate_argnums=0)
    cache, token = MODEL.init_cache(2), TOKENS[:, :1]

    def take(count, cache):
        for _ in range(count):
            _, cache = step(cache, token)
        jax.block_until_ready(cache)
        gc.collect()
        return cache, len(jax.live_arrays())

    cache, first = take(5000, cache)
    before = resident_bytes() if sys.platform == "linux" else 0
    cache, second = take(5000, cache)
    after = resident_bytes() if sys.platform == "linux" else 0
    assert step._cache_size() == 1
    assert second == first
    assert after - before < 2**20


@pytest.mark.slow
def test_no_call_leaves_arrays_behind(variables):
    for name, call in CALLS.items():
        call(variables)
        gc.collect()
        before = len(jax.live_arrays())
        for _ in range(3):
            jax.block_until_ready(call(variables))
        gc.collect()
        assert len(jax.live_arrays()) <= before, name


# ---- donated caches


@pytest.mark.parametrize("name", CACHES)
def test_no_two_leaves_of_a_new_cache_are_one_buffer(name):
    at = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(CACHES[name]()) if x.size]
    assert len(set(at)) == len(at)


DECODERS = {
    "a model": (MODEL, {}),
    "a model of all kinds": (
        LocalTransformer(
            **FIELDS | {"depth": 2, "local_attn_window_size": (3, None), "memory_tokens": 2, "attention_sinks": True}
        ),
        {"keep_first": 1, "max_length": 9},
    ),
    "a model with rewinding": (MODEL, {"rewind": 2}),
}


@pytest.mark.slow_but("a model")
@pytest.mark.parametrize("name", DECODERS)
def test_donated_caches_give_the_same_and_every_buffer_is_used_again(name):
    model, more = DECODERS[name]
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    chunk = TOKENS[:, :1]
    step = lambda cache: model.apply(variables, chunk, cache=cache)  # noqa: E731
    plain, donating = jax.jit(step), jax.jit(step, donate_argnums=0)
    expected, cache = model.init_cache(2, **more), model.init_cache(2, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            logits, expected = plain(expected)
            given, at = cache, {x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)}
            found, cache = donating(cache)
            assert all(x.is_deleted() for x in jax.tree.leaves(given))
            assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)} == at
            assert_close(found, logits)
    jax.tree.map(assert_close, cache, expected)
