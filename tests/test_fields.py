"""Fields of modules: the original's positional arguments, fields passed on to submodules, and modules as values."""

import copy
import inspect
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_local_attention import (
    AttentionOptions,
    Dense,
    DynamicPositionBias,
    FeedForward,
    KVCache,
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    Rotary,
    Triton,
    Window,
    Windowed,
)
from flax_local_attention.fields import Branch, Fields, resolve_window, window_of
from tests import cases

# The original's positional parameters with values other than the defaults. Its LocalMHA and LocalTransformer have
# none, and its `rel_pos_emb_config`, before `dim`, does not exist here.
PREFIXES = {
    LocalAttention: {
        "window_size": 6,
        "causal": True,
        "look_backward": 2,
        "look_forward": 0,
        "dropout": 0.25,
        "shared_qk": True,
        "dim": 4,
        "autopad": True,
        "exact_windowsize": True,
        "scale": 0.5,
        "use_rotary_pos_emb": False,
        "use_xpos": True,
        "xpos_scale_base": 3.0,
    },
    FeedForward: {"dim": 6, "mult": 2, "dropout": 0.25},
    DynamicPositionBias: {"dim": 5, "heads": 3},
    LocalMHA: {"dim": 6, "window_size": 3},
    LocalTransformer: {
        "num_tokens": 7,
        "max_seq_len": 9,
        "dim": 6,
        "depth": 1,
        "causal": False,
        "local_attn_window_size": 4,
    },
}
TRANSFORMER = {"num_tokens": 7, "max_seq_len": 12, "dim": 6, "depth": 2, "local_attn_window_size": 4}
HEADS = {"dim_head": 4, "heads": 2}


@pytest.mark.parametrize(
    ("kind", "count"), [(kind, count) for kind, values in PREFIXES.items() for count in range(1, len(values) + 1)]
)
def test_every_positional_prefix_sets_the_fields_of_these_names(kind, count):
    prefix = dict(list(PREFIXES[kind].items())[:count])
    required = {
        name: PREFIXES[kind][name]
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is parameter.empty and name not in prefix
    }
    module = kind(*prefix.values(), **required)
    assert {name: getattr(module, name) for name in prefix} == prefix
    assert module == kind(**prefix, **required)


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_positional_argument_more_is_refused(kind):
    with pytest.raises(TypeError, match="positional"):
        kind(*PREFIXES[kind].values(), 8)


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_subclass_may_change_defaults_and_add_fields(kind):
    shared = "precision" if "precision" in inspect.signature(kind).parameters else "dtype"
    namespace = {"__annotations__": {shared: object, "more": int}, "__module__": __name__, shared: "high", "more": 3}
    module = type(kind)("Own", (kind,), namespace)(*PREFIXES[kind].values())
    assert (getattr(module, shared), module.more) == ("high", 3)
    assert {name: getattr(module, name) for name in PREFIXES[kind]} == PREFIXES[kind]


def test_a_subclass_may_change_the_defaults_of_positional_and_of_keyword_only_fields():
    class Own(LocalTransformer):
        causal: bool = False
        scan_layers: bool = True

    model = Own(7, 9, 6, 1)
    assert (model.causal, model.depth, model.scan_layers) == (False, 1, True)


def test_a_docstring_lists_inherited_attributes_once():
    class Own(LocalMHA):
        __doc__ = LocalMHA.__doc__

    assert Own.__doc__ == LocalMHA.__doc__
    assert inspect.getdoc(LocalMHA).count("\n    dim_head: Width of a head.") == 1


def test_a_module_hands_on_what_both_declare_in_a_base_and_nothing_else():
    class Part(Branch):
        dim: int
        heads: int = 3
        causal: bool = False

    model = LocalTransformer(**TRANSFORMER, heads=5, precision="highest", dtype=jnp.bfloat16, name="model", parent=None)
    part = model.make(Part, 2, dtype=jnp.float16)
    assert (part.dim, part.causal) == (2, False)  # fields of the transformer itself
    assert (part.heads, part.precision, part.dtype) == (5, "highest", jnp.float16)
    assert part.name is None
    assert model.make(nn.Dense, 3).precision == "highest"


def test_a_transformer_hands_every_shared_field_to_its_attention():
    values = {
        "kv_heads": 1,
        "qk_rmsnorm": True,
        "qk_scale": 5.0,
        "exact_windowsize": False,
        "gate_values_per_head": True,
        "look_backward": 2,
        "look_forward": 0,
        "shared_qk": True,
        "attention_sinks": True,
        "logits_soft_cap": 7.0,
        "rotary": Rotary(4, theta=50.0),
        "use_bias": True,
        "use_out_bias": True,
        "dim_value": 3,
        "memory_tokens": 2,
        "scale": 0.3,
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.float16,
        "precision": "highest",
        "kernel_init": nn.initializers.ones,
        "out_kernel_init": nn.initializers.zeros,
        "implementation": Dense(),
        **HEADS,
    }
    model = LocalTransformer(**TRANSFORMER, **values)
    attention = model._attention(0, model._windows(None), deterministic=False)
    assert {name: getattr(attention, name) for name in values} == values
    assert not attention.deterministic
    model = LocalTransformer(**TRANSFORMER, reference_rotary=True)
    assert model._attention(0, model._windows(None), deterministic=True).reference_rotary


def test_a_window_of_a_call_keeps_the_distance_over_which_xpos_fades():
    module = LocalMHA(8, 8, use_xpos=True)
    assert resolve_window(module, 8, None) == (8, None)
    assert resolve_window(module, 8, 20) == (20, 4.0)
    assert resolve_window(module, Window.sliding(9), Window.sliding(20)) == (Window.sliding(20), 4.0)
    assert resolve_window(module.clone(xpos_scale_base=5.0), 8, 20) == (20, 5.0)
    for size, use_xpos in ((8, False), (None, True), (Window.everything(), True)):
        with pytest.raises(ValueError, match=r"requires a local module with `use_xpos=True`, got 20"):
            resolve_window(module.clone(use_xpos=use_xpos), size, 20)


@pytest.mark.parametrize("kind", [LocalAttention, partial(LocalMHA, 8)], ids=["attention", "mha"])
def test_a_module_takes_a_window_in_place_of_a_size(kind):
    assert window_of(kind(4, exact_windowsize=False), 4) == Window(4)
    assert window_of(kind(4, causal=True), None) == Window.sliding(None)
    assert window_of(kind(4), None) == Window.everything()
    for window in (Window.sliding(5), Window(4, look_backward=2), Window.everything()):
        assert window_of(kind(window), window) is window
    assert window_of(kind(4, causal=True), Window.chunks(4)) == Window.chunks(4)


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"look_backward": 2}, "replaces the fields of a window, got .* and `look_backward` 2; leave them out"),
        ({"look_forward": 0}, "replaces the fields of a window, got .* and `look_forward` 0"),
        ({"causal": True}, "module with `causal=True` must be causal, got .*; set `causal=False`"),
    ],
)
def test_a_window_that_fields_contradict_is_refused(fields, phrase):
    for module in (LocalAttention(4, **fields), LocalMHA(8, 4, **fields)):
        with pytest.raises(ValueError, match=phrase):
            window_of(module, Window.between(3, 2))
    for make in (LocalAttention, partial(LocalMHA, 8)):
        with pytest.raises(ValueError, match=phrase):
            make(Window.between(3, 2), **fields)


def test_exact_windowsize_beside_a_window_is_refused():
    for module in (LocalAttention(4, exact_windowsize=True), LocalMHA(8, 4, exact_windowsize=False)):
        with pytest.raises(ValueError, match=f"`exact_windowsize` {module.exact_windowsize}; leave them out"):
            window_of(module, Window.sliding(5))


def test_bases_declare_no_field_twice():
    bases = [
        base for base in LocalTransformer.__mro__ if issubclass(base, Fields) and base.__module__ == Fields.__module__
    ]
    names = [name for base in bases for name in inspect.get_annotations(base) if name not in ("parent", "name")]
    assert len(names) == len(set(names)) == 28


VALUES = [
    LocalAttention(4, causal=True, dim=8),
    LocalMHA(6, 4, **HEADS),
    FeedForward(6),
    DynamicPositionBias(4, 2),
    LocalTransformer(**TRANSFORMER),
    LocalTransformer(**TRANSFORMER, implementation=Windowed(block=8), dtype=jnp.bfloat16),
    AttentionOptions(Window.sliding(4), rotary=Rotary(8, use_xpos=True), precision=jax.lax.Precision.HIGHEST),
    LocalTransformer(**TRANSFORMER | {"local_attn_window_size": (Window.sliding(4), None)}),
    Window(4, causal=True),
    Window.everything(),
    Rotary(8),
    Dense(),
    Windowed(block=8),
    Triton(),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_equal_and_hash_alike_after_pickling_and_copying(value):
    for other in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), copy.copy(value)):
        assert other == value
        assert hash(other) == hash(value)


def test_a_cache_survives_pickling():
    cache = LocalTransformer(**TRANSFORMER, **HEADS).init_cache(2, rewind=1)
    again = pickle.loads(pickle.dumps(cache))
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    assert isinstance(again.layers[0].attn, KVCache)
    jax.tree.map(np.testing.assert_array_equal, again, cache)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 3])
def test_intermediates_of_every_module_are_arrays_under_jit(streams):
    model = LocalTransformer(**TRANSFORMER, **HEADS, num_residual_streams=streams)
    tokens = jnp.zeros((1, 5), jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    run = jax.jit(lambda variables: model.apply(variables, tokens, capture_intermediates=True, mutable="intermediates"))
    logits, state = run(variables)
    cases.assert_close(logits, model.apply(variables, tokens))
    seen = state["intermediates"]["layers_1"]
    assert seen["ff"]["__call__"][0].shape == (1, 5, 6)
    assert seen["ff_streams"]["__call__"][0][0].shape == (1, 5, 6)


@pytest.mark.slow
def test_a_model_is_tabulated_with_its_flops():
    model, wide = LocalTransformer(**TRANSFORMER, **HEADS), {"width": 200}
    table = model.tabulate(
        jax.random.key(0), jnp.zeros((1, 5), jnp.int32), compute_flops=True, console_kwargs=wide, depth=2
    )
    assert "layers_1/attn_streams" in table
    assert "flops" in table
