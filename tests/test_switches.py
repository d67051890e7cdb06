"""Correct calls under JAX's strict settings: every public function and method under each of them.

Calls are traced and lowered, not compiled: JAX refuses promotion while a program is traced, and our plain code is
traced when a program is lowered.
"""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import checkify
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from examples import training
from examples.config import CPU_DEMO
from examples.recipes import gemma3, gpt_oss, longformer, mimi, mistral, modernbert
from flax_local_attention import (
    AttentionOptions,
    DynamicPositionBias,
    FeedForward,
    KVCache,
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    LogSum,
    Operands,
    Rotary,
    Triton,
    Window,
    attend,
    attend_cache,
    attention_fn,
    cached_attention,
    from_torch,
    generate,
    local_attention,
    merge_attention,
    model_from_torch,
    rotate,
    stream,
    to_torch,
)
from flax_local_attention.sampling import Sampling, apply_rules
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")

B, H, N, D, E, C = 2, 2, 12, 4, 8, 16
WINDOW = Window(4, causal=True)
BLOCKS, BY_KERNELS = cases.IN_BLOCKS, {"implementation": Triton(interpret=True)}

ARRAYS = {
    "q": cases.normal(0, B, 2 * H, N, D),
    "k": cases.normal(1, B, H, N, D),
    "v": cases.normal(2, B, H, N, D),
    "x": cases.normal(3, B, N, E),
    "attn_bias": cases.normal(4, 2 * H, 4, 8),
    "sinks": cases.normal(5, 2 * H),
    "scale": jnp.float32(0.5),
    "global_keys": (cases.normal(6, H, 3, D), cases.normal(7, H, 3, D)),
    "mask": cases.normal(8, B, N) > -1,
    "segment_ids": jnp.cumsum(cases.normal(9, B, N) > 1, axis=1),
    "positions": jnp.arange(N)[None] + jnp.array([[0], [3]]),
    "tokens": jnp.arange(B * N).reshape(B, N) % C,
    "places": jnp.array([[0], [5]]),
}


def take(arrays, names):
    """Return arrays of one call by name."""
    return {name: arrays[name] for name in names.split()}


def attention(names="q k v", **options):
    """Return a call of `local_attention` with these arrays."""
    return lambda arrays: local_attention(**take(arrays, names), window=WINDOW, **BLOCKS | options)


def differentiated(names, **options):
    """Return a call of its gradient with respect to all differentiable arrays."""

    def door(arrays):
        arrays = take(arrays, names)
        fixed = {name: arrays.pop(name) for name in ("mask", "segment_ids") if name in arrays}
        arrays = jax.tree.map(jnp.asarray, arrays)
        return jax.grad(lambda arrays: local_attention(**arrays, **fixed, window=WINDOW, **BLOCKS | options).sum())(
            arrays
        )

    return door


def with_cache(names="q k v", n=1, repeats=1, options=WINDOW, implementation=None, **sizes):
    """Return a call of `cached_attention` on n tokens."""

    def door(arrays):
        given, numpy = take(arrays, names), np if isinstance(arrays["x"], np.ndarray) else jnp
        for name in ("q", "k", "v"):
            given[name] = numpy.tile(given[name], (repeats, 1))[..., :n, :] if n > N else given[name][..., :n, :]
        for name in {"mask", "segment_ids", "positions"} & given.keys():
            given[name] = given[name][..., :n]
        cache = made(arrays, lambda: KVCache.create(options, B, H, D, **sizes))
        out, cache = cached_attention(**given, cache=cache, implementation=implementation)
        return out, cached_attention(**given, cache=cache, implementation=implementation)

    return door


def in_two_steps(arrays):
    (q, k, v), mask = (arrays[name][..., :3, :] for name in "qkv"), arrays["mask"][:, :3]
    cache = made(arrays, lambda: KVCache.create(WINDOW, B, H, D, rewind=3))
    cache = cache.rewind(0).append(k, v, mask=mask)
    return attend_cache(q, cache, mask=mask), cache.rewind(2)


def merged(arrays):
    parts = [attention("q k v mask", return_log_sum=True)(arrays), attention(return_log_sum=True)(arrays)]
    given = arrays["q"], LogSum(arrays["q"][..., 0], arrays["q"][..., 0] ** 2)
    return merge_attention(parts), merge_attention([given, given])


def by_value(arrays):
    options = AttentionOptions(WINDOW, rotary=Rotary(D))
    operands = Operands.create(**take(arrays, "q k v mask"), options=options)
    return attend(operands, options, positions=arrays["positions"], implementation=BLOCKS["implementation"])


def weights_of(module, arrays, *given):
    """Return weights for a module: NumPy float64 if the arrays are, else as it initialises them."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = {"params": jax.eval_shape(module.init, keys, *given).get("params", {})}
    is_wide = arrays["x"].dtype == np.float64

    def make(x):
        return np.full(x.shape, 0.1) if is_wide and x.dtype == np.float32 else jnp.full(x.shape, 0.1, x.dtype)

    return jax.tree.map(make, shapes)


def made(arrays, create):
    """Return a cache with NumPy leaves if the arrays are NumPy's, else JAX's; concrete also while tracing."""
    with jax.ensure_compile_time_eval():
        cache = create()
    return jax.device_get(cache) if isinstance(arrays["x"], np.ndarray) else cache


def in_flax_module(arrays):
    module = nn.MultiHeadDotProductAttention(num_heads=H, attention_fn=attention_fn(WINDOW))
    mask = nn.make_attention_mask(np.ones((B, 1), bool), arrays["mask"])
    return module.apply(weights_of(module, arrays, arrays["x"]), arrays["x"], mask=mask)


def through(module, names, **options):
    """Return a call that initialises and applies a module to these arrays."""

    def door(arrays):
        given = list(take(arrays, names).values())
        return module.apply(weights_of(module, arrays, *given), *given, **options, rngs={"dropout": jax.random.key(1)})

    return door


def model(**options):
    fields = {"num_tokens": C, "max_seq_len": 32, "dim": E, "depth": 2, "heads": H, "dim_head": D, "ff_mult": 1}
    return LocalTransformer(**fields | {"local_attn_window_size": 4} | BLOCKS | options)


def differentiated_model(names="tokens", num_tokens=C, **options):
    """Return a call of a model's loss and its gradient with respect to all parameters."""

    def door(arrays):
        transformer = model(num_tokens=num_tokens, **options)
        given = take(arrays, names)
        x = given.pop("tokens", None)
        x = given.pop("x") if x is None else x
        rngs, variables = {"dropout": jax.random.key(1)}, weights_of(transformer, arrays, x)

        def loss(variables):
            if num_tokens is None:
                return transformer.apply(variables, x, **given).astype(jnp.float32).sum()
            return transformer.apply(variables, x, **given, return_loss=True, rngs=rngs)

        return jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, variables)), transformer.apply(
            variables, x, **given, rngs=rngs
        )

    return door


def decoding_model(arrays, **options):
    """Feed a chunk and a token to a model with a cache, and rewind it."""
    transformer, tokens, mask = model(**options), arrays["tokens"], arrays["mask"]
    variables = weights_of(transformer, arrays, tokens)
    cache = made(arrays, lambda: transformer.init_cache(B, rewind=2))
    segments = arrays["segment_ids"]
    _, cache = transformer.apply(variables, tokens, mask=mask, segment_ids=segments, cache=cache)
    logits, cache = transformer.apply(variables, tokens[:, :1], cache=cache)
    return logits, cache.rewind(1)


def spread(arrays):
    """Attend with the sequence sharded over two devices."""
    mesh, spec = Mesh(np.array(jax.devices()[:2]), ("x",)), P(None, None, "x")

    def attend(q, k, v):
        return local_attention(q, k, v, window=Window.sliding(4), rotary=Rotary(D), axis_name="x", **BLOCKS)

    return jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)(*take(arrays, "q k v").values())


def converted(arrays):
    """Convert weights to the original's names and back, and apply them."""
    transformer, tokens = model(), np.zeros((1, N), np.int32)
    fields = {"max_seq_len": 32, "local_attn_window_size": 4, "heads": H, "dim_head": D}
    shapes = jax.eval_shape(transformer.init, jax.random.key(0), tokens)
    state = to_torch(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes), transformer)
    return model_from_torch(state, **fields).apply(from_torch(state, transformer), arrays["tokens"])


def trained(arrays):
    """Compute the gradient of the example's loss, without a step of optax, which promotes dtypes."""
    sizes = {"dim": E, "depth": 1, "heads": H, "dim_head": D, "seq_len": N - 1, "windows": (4,)}
    config = dataclasses.replace(CPU_DEMO, **sizes)
    loss, params = training.build_loss(training.build_model(config)), training.initial_state(config).params
    tokens = arrays["tokens"][None]
    return training.accumulate(loss, params, training.Batch(tokens[..., :-1], tokens[..., 1:]))


def of_recipe(recipe, *names, **fields):
    """Return a call of a recipe with this configuration."""

    def door(arrays):
        sizes = {"hidden_size": E, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": H}
        module = recipe(**sizes, **fields)
        given = [arrays[name] for name in names]
        variables, x = weights_of(module, arrays, *given), given[0]
        if not hasattr(module, "init_cache"):
            return module.apply(variables, *given)
        length = {} if recipe is mimi_of else {"max_length": N}
        _, caches = module.apply(variables, x, caches=made(arrays, lambda: module.init_cache(batch=B, **length)))
        return module.apply(variables, x[:, :1], caches=caches)

    return door


def mimi_of(**sizes):
    return mimi.Mimi(mimi.Config(**sizes))


XPOS = Rotary(D, use_xpos=True)

FUNCTIONS = {
    "local_attention": attention(),
    "masked_documents": attention("q k v mask segment_ids", rotary=Rotary(D)),
    "bias_sinks": attention("q k v attn_bias sinks scale"),
    "global_keys": attention("q k v mask global_keys", logits_soft_cap=2.0),
    "xpos_shared": attention("q k v", rotary=XPOS, shared_qk=True),
    "published_rotary": attention("q k v", rotary=Rotary.yarn(D, factor=2.0, original_max_position_embeddings=8)),
    "dropout": attention("q k v", dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "offset": attention("q k v mask", q_offset=2),
    "dense": attention("q k v mask attn_bias sinks", implementation="dense", rotary=Rotary(D, interleaved=True)),
    "default": attention("q k v", implementation=None),
    "gradient": differentiated("q k v mask segment_ids attn_bias sinks scale global_keys", rotary=Rotary(D)),
    "gradient_with_xpos": differentiated("q k v", rotary=XPOS, dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "kernels": differentiated("q k v mask segment_ids attn_bias sinks", rotary=Rotary(D), **BY_KERNELS),
    "kernels_with_dropout": differentiated("q k v", dropout_rate=0.5, dropout_rng=jax.random.key(0), **BY_KERNELS),
    "attend": by_value,
    "merge_attention": merged,
    "sampling": lambda arrays: apply_rules(arrays["x"][0], Sampling.create(0.5, 3, 0.9, 0.1)),
    "rotate": lambda arrays: rotate(arrays["x"], Rotary(D), arrays["positions"]),
    "cache_of_a_token": with_cache(options=AttentionOptions(WINDOW, rotary=Rotary(D))),
    "cache_of_a_chunk": with_cache("q k v mask segment_ids attn_bias sinks", n=5),
    "cache_by_positions": with_cache("q k v positions", n=5, options=AttentionOptions(WINDOW, rotary=Rotary(D))),
    "cache_of_first_tokens": with_cache(n=5, keep_first=2, options=AttentionOptions(WINDOW, rotary=Rotary(D))),
    "cache_of_global_keys": with_cache("q k v global_keys", n=5, options=AttentionOptions(WINDOW, shared_qk=True)),
    "cache_of_a_long_chunk": with_cache(n=300, repeats=25),
    "cache_by_kernels": with_cache(options=AttentionOptions(WINDOW, rotary=Rotary(D)), **BY_KERNELS),
    "cache_in_two_steps": in_two_steps,
    "attention_fn": in_flax_module,
    "Halo": spread,
}

MODULES = {
    "LocalAttention": through(LocalAttention(4, causal=True, dim=D, use_xpos=True), "q k v mask"),
    "LocalMHA": through(LocalMHA(E, 4, heads=H, dim_head=D, causal=True), "x mask"),
    "LocalMHA_with_everything": through(
        LocalMHA(
            *(E, 4),
            heads=2 * H,
            kv_heads=H,
            dim_head=D,
            causal=True,
            prenorm=True,
            qk_rmsnorm=True,
            gate_values_per_head=True,
            attention_sinks=True,
            memory_tokens=2,
            dropout=0.5,
            deterministic=False,
            use_bias=True,
        ),
        "x mask",
    ),
    "FeedForward": through(FeedForward(E, dropout=0.5, deterministic=False), "x"),
    "DynamicPositionBias": lambda arrays: DynamicPositionBias(E, H).init_with_output(jax.random.key(0), 4, 8),
    "transformer": differentiated_model("tokens mask segment_ids positions", depth=1),
    "transformer_in_bfloat16": differentiated_model("tokens mask", dtype=jnp.bfloat16, memory_tokens=1, depth=1),
    "transformer_of_narrow_weights": differentiated_model(param_dtype=jnp.bfloat16, use_bias=True, depth=1),
    "transformer_of_one_stream": differentiated_model(num_residual_streams=1, dtype=jnp.bfloat16, scan_layers=True),
    "transformer_in_a_loop": differentiated_model(scan_layers=True, remat=True, dtype=jnp.bfloat16),
    "transformer_with_bias": differentiated_model(use_dynamic_pos_bias=True, dtype=jnp.bfloat16, depth=1),
    "transformer_with_xpos": differentiated_model(use_xpos=True, qk_rmsnorm=True, attn_dropout=0.1, depth=1),
    "transformer_with_dropout": differentiated_model(ff_dropout=0.1, attn_dropout=0.1, deterministic=False, depth=1),
    "transformer_of_vectors": differentiated_model("x mask", num_tokens=None, dtype=jnp.bfloat16, depth=1),
    "transformer_by_kernels": differentiated_model(depth=1, num_residual_streams=2, **BY_KERNELS),
    "transformer_with_a_cache": decoding_model,
    "transformer_without_layers": partial(decoding_model, depth=0),
    "transformer_in_bfloat16_with_a_cache": partial(decoding_model, dtype=jnp.bfloat16, num_residual_streams=1),
}

TEXT = {"vocab_size": C, "head_dim": D, "num_key_value_heads": 1, "sliding_window": 4}
EXAMPLES = {
    "converters": converted,
    "training": trained,
    "mistral": of_recipe(lambda **sizes: mistral.mistral(mistral.Config(**sizes)), "tokens", "mask", **TEXT),
    "gemma3": of_recipe(lambda **sizes: gemma3.gemma3(gemma3.Config(**sizes)), "tokens", "mask", **TEXT),
    "gpt_oss": of_recipe(
        lambda **sizes: gpt_oss.gpt_oss(gpt_oss.Config(**sizes)),
        *("tokens", "mask"),
        **TEXT,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
    "mimi": of_recipe(mimi_of, "x", "mask", sliding_window=4),
    "modernbert": of_recipe(
        lambda **sizes: modernbert.ModernBert(modernbert.Config(**sizes)), "tokens", "mask", vocab_size=C
    ),
    "longformer": of_recipe(
        lambda **sizes: longformer.Longformer(longformer.Config(**sizes)),
        *("tokens", "mask", "places"),
        vocab_size=C,
        attention_window=(4, 4),
    ),
}

DOORS = FUNCTIONS | MODULES | EXAMPLES


@pytest.mark.slow_but("local_attention", "bias_sinks", "global_keys", "cache_of_a_token", "LocalMHA", "transformer")
@pytest.mark.parametrize("name", DOORS)
def test_doors_promote_nothing_by_themselves(name):
    """`jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"`, and no warning."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(DOORS[name]).lower(ARRAYS)


COUNTING = (
    *("offset", "gradient", "dense", "cache_of_a_token", "cache_of_a_chunk", "cache_of_first_tokens"),
    *(
        "cache_in_two_steps",
        "Halo",
        "transformer_of_one_stream",
        "transformer_with_a_cache",
        "transformer_without_layers",
    ),
)


@pytest.mark.slow_but("offset", "gradient", "cache_of_a_token")
@pytest.mark.parametrize("name", COUNTING)
def test_doors_promote_nothing_where_integers_are_int64_by_default(name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        jax.jit(DOORS[name]).lower(ARRAYS)


def widened(tree):
    """Convert arrays to NumPy's default dtypes, float64 and int64."""
    dtypes = {"f": np.float64, "i": np.int64, "b": np.bool_}
    return jax.tree.map(lambda x: np.asarray(x, dtypes[x.dtype.kind]), tree)


@pytest.mark.slow_but("local_attention", "bias_sinks", "cache_of_a_token", "LocalMHA")
@pytest.mark.parametrize("name", [name for name in DOORS if "kernels" not in name])
def test_doors_take_constants_of_numpy_in_its_own_dtypes_as_those_of_jax(name):
    """NumPy's float64 arrays, int64 tokens, caches and weights as constants: no warning, and float32 results."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constants = widened(ARRAYS)
        types = [jax.eval_shape(lambda arrays=arrays: DOORS[name](arrays)) for arrays in (constants, ARRAYS)]
    assert jax.tree.leaves(types[0]) == jax.tree.leaves(types[1])


# Checks of concrete values, also inside a jitted function

CACHE = KVCache.create(WINDOW, B, H, D, rewind=2).append(ARRAYS["k"][..., :3, :], ARRAYS["v"][..., :3, :])
REFUSED = {
    "rewind": (lambda cache: cache.rewind(3), "2 tokens that rows can forget|rows can forget, got 3"),
    "rewind_of_rows": (lambda cache: cache.rewind(np.array([1, 4])), "rows can forget"),
    "attend_cache": (lambda cache: attend_cache(ARRAYS["q"], cache), "keys the ring still has"),
    "attend_cache_with_a_mask": (
        lambda cache: attend_cache(ARRAYS["q"], cache, mask=ARRAYS["mask"]),
        "keys the ring still has",
    ),
    "positions": (
        lambda cache: with_cache("q k v positions")({**ARRAYS, "positions": np.full((B, N), 2**40)}),
        "`positions` must be at most",
    ),
    "last_position": (
        lambda cache: cached_attention(
            *(ARRAYS[name] for name in "qkv"), dataclasses.replace(cache, length=np.full(B, 2**31 - 2, np.int32))
        ),
        "begin a new cache",
    ),
    "tokens": (lambda cache: model().apply({}, np.full((B, N), C)), "`x` must be tokens in"),
    "offset": (lambda cache: attention(q_offset=np.array(-1))(ARRAYS), "`q_offset` must be at least 0"),
}


@pytest.mark.parametrize("leaves", ["jax", "numpy"])
@pytest.mark.parametrize("name", REFUSED)
def test_known_values_are_checked_inside_a_jitted_function_too(name, leaves):
    door, message = REFUSED[name]
    cache = jax.device_get(CACHE) if leaves == "numpy" else CACHE
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda: door(cache)).lower()


@pytest.mark.parametrize("offset", [np.array(4), jnp.array(4)], ids=["numpy", "jax"])
def test_a_known_offset_gives_a_window_without_a_limit_its_length_inside_a_jitted_function_too(offset):
    def attend():
        q, k, v = (ARRAYS[name] for name in "qkv")
        return local_attention(q[..., :3, :], k, v, window=Window.sliding(None), q_offset=offset)

    cases.assert_close(jax.jit(attend)(), attend())


RULES = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "rng": jax.random.key(1)}


@pytest.mark.slow
def test_generation_promotes_nothing_by_itself_and_takes_weights_and_caches_of_numpy():
    transformer, prompt = (
        model(num_tokens=600, depth=1, dtype=jnp.bfloat16, num_residual_streams=2),
        np.ones((2, 4), int),
    )
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), warnings.catch_warnings():
        warnings.simplefilter("error")
        variables = weights_of(transformer, widened(ARRAYS), prompt)
        cache = jax.device_get(transformer.init_cache(B))
        options = {**RULES, "eos": (1, 2), "prompt_lengths": np.array([4, 2])}
        *_, cache = generate(transformer, variables, prompt, 2, **options, cache=cache, return_log_probs=True)
        tokens = next(stream(transformer, variables, prompt, 2, **options, cache=jax.device_get(cache)))
    assert tokens.shape == (2,)


DEFAULT = {"implementation": None}
CHECKED = {
    "local_attention": attention("q k v mask segment_ids", rotary=Rotary(D), **DEFAULT),
    "offset": attention("q k v mask", q_offset=2, **DEFAULT),
    "dense": attention("q k v mask attn_bias sinks", implementation="dense"),
    "gradient": differentiated("q k v mask attn_bias sinks", **DEFAULT),
    "cache_of_a_token": with_cache("q k v attn_bias"),
    "cache_of_a_chunk": with_cache("q k v mask segment_ids", n=5, keep_first=2),
    "cache_of_a_long_chunk": with_cache(n=300, repeats=25),
    "cache_in_two_steps": in_two_steps,
    "transformer": differentiated_model(
        "tokens mask segment_ids", depth=1, remat=True, num_residual_streams=2, **DEFAULT
    ),
    "transformer_with_a_cache": partial(decoding_model, depth=1, num_residual_streams=1, **DEFAULT),
    "generate": lambda arrays: generate(
        MODEL, weights_of(MODEL, arrays, arrays["tokens"]), arrays["tokens"], 3, **RULES, eos=1
    ),
}
MODEL = model(depth=1, num_residual_streams=1, **DEFAULT)


@pytest.mark.slow_but("local_attention")
@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("name", CHECKED)
def test_checkify_finds_no_error_where_there_is_none(name):
    """All kinds of checks: indices, NaN and division by zero, in intermediate results too.

    `implementation="xla"` is left out: jax 0.10 to 0.12 cannot check an index inside `jax.checkpoint`, with which a
    gradient recomputes blocks.
    """
    error, _ = checkify.checkify(jax.jit(CHECKED[name]), errors=checkify.all_checks)(ARRAYS)
    error.throw()
