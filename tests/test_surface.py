"""The interface that users and checkpoints rely on: names, defaults, import paths, parameter paths."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

import flax_local_attention
from flax_local_attention import LocalTransformer

PUBLIC = (
    "AXIS_RULES AttentionOptions Dense DynamicPositionBias FeedForward Halo KVCache LocalAttention LocalMHA "
    "LocalTransformer LogSum LossSum MosaicGPU Operands Rotary TPU Triton Unsupported Window Windowed attend "
    "attend_cache attention_fn cached_attention from_torch generate local_attention merge_attention model_from_torch "
    "parameter_axes parameter_shardings rotate stack_layers stream to_torch unstack_layers"
)

PATHS = {
    "flax_local_attention.transformer": "DynamicPositionBias FeedForward LocalMHA LocalTransformer",
    "flax_local_attention.convert": "from_torch model_from_torch to_torch",
}

DEFAULTS = {
    "LocalAttention": {
        "causal": False,
        "look_backward": 1,
        "look_forward": None,
        "dropout": 0.0,
        "shared_qk": False,
        "dim": None,
        "autopad": False,
        "exact_windowsize": False,
        "scale": None,
        "use_rotary_pos_emb": True,
        "use_xpos": False,
        "xpos_scale_base": None,
    },
    "LocalMHA": {
        "dim_head": 64,
        "heads": 8,
        "dropout": 0.0,
        "causal": False,
        "prenorm": False,
        "qk_rmsnorm": False,
        "qk_scale": 8,
        "use_xpos": False,
        "xpos_scale_base": None,
        "exact_windowsize": True,
        "gate_values_per_head": False,
        "look_backward": 1,
        "look_forward": None,
        "shared_qk": False,
        "use_rotary_pos_emb": True,
    },
    "FeedForward": {"mult": 4, "dropout": 0.0},
    "DynamicPositionBias": {},
    "LocalTransformer": {
        "causal": True,
        "local_attn_window_size": 512,
        "dim_head": 64,
        "heads": 8,
        "ff_mult": 4,
        "attn_dropout": 0.0,
        "ff_dropout": 0.0,
        "ignore_index": -1,
        "use_xpos": False,
        "xpos_scale_base": None,
        "use_dynamic_pos_bias": False,
        "global_attn_layer": None,
        "layers_insert_global_attn": None,
        "num_residual_streams": 4,
        "qk_rmsnorm": False,
        "qk_scale": 8,
        "exact_windowsize": True,
        "gate_values_per_head": False,
        "look_backward": 1,
        "look_forward": None,
        "shared_qk": False,
    },
}

REQUIRED = {
    "LocalAttention": ["window_size"],
    "LocalMHA": ["dim", "window_size"],
    "FeedForward": ["dim"],
    "DynamicPositionBias": ["dim", "heads"],
    "LocalTransformer": ["num_tokens", "max_seq_len", "dim", "depth"],
}

HYPER_CONNECTION = {
    "gamma": (6,),
    "static_alpha": (2, 3),
    "dynamic_alpha_fn": (6, 3),
    "dynamic_alpha_scale": (),
    "static_beta": (2,),
    "dynamic_beta_fn": (6,),
    "dynamic_beta_scale": (),
}

PARAMETERS = {
    "token_emb/embedding": (7, 6),
    "pos_emb/embedding": (9, 6),
    "dynamic_pos_bias/dense_0/kernel": (1, 3),
    "dynamic_pos_bias/dense_0/bias": (3,),
    "dynamic_pos_bias/dense_1/kernel": (3, 3),
    "dynamic_pos_bias/dense_1/bias": (3,),
    "dynamic_pos_bias/dense_2/kernel": (3, 3),
    "dynamic_pos_bias/dense_2/bias": (3,),
    **{f"layers_0/attn_streams/{name}": shape for name, shape in HYPER_CONNECTION.items()},
    "layers_0/attn/norm/scale": (6,),
    "layers_0/attn/norm/bias": (6,),
    "layers_0/attn/to_qkv/kernel": (6, 36),
    "layers_0/attn/q_scale": (4,),
    "layers_0/attn/k_scale": (4,),
    "layers_0/attn/sinks": (3,),
    "layers_0/attn/to_v_gate/kernel": (6, 3),
    "layers_0/attn/to_v_gate/bias": (3,),
    "layers_0/attn/to_out/kernel": (12, 6),
    **{f"layers_0/ff_streams/{name}": shape for name, shape in HYPER_CONNECTION.items()},
    "layers_0/ff/norm/scale": (6,),
    "layers_0/ff/norm/bias": (6,),
    "layers_0/ff/to_hidden/kernel": (6, 32),
    "layers_0/ff/to_out/kernel": (16, 6),
    "norm/scale": (6,),
    "norm/bias": (6,),
    "to_logits/kernel": (6, 7),
}


def test_public_names():
    assert flax_local_attention.__all__ == PUBLIC.split()


@pytest.mark.parametrize("path", PATHS)
def test_import_paths(path):
    module = importlib.import_module(path)
    for name in PATHS[path].split():
        assert getattr(module, name) is getattr(flax_local_attention, name)


@pytest.mark.parametrize("name", DEFAULTS)
def test_modules_have_the_names_and_defaults_of_the_original(name):
    parameters = inspect.signature(getattr(flax_local_attention, name)).parameters
    assert {field: parameters[field].default for field in DEFAULTS[name]} == DEFAULTS[name]
    assert [field for field, given in parameters.items() if given.default is given.empty] == REQUIRED[name]


def test_parameters_keep_their_paths_and_shapes():
    model = LocalTransformer(
        num_tokens=7,
        max_seq_len=9,
        dim=6,
        depth=1,
        local_attn_window_size=4,
        dim_head=4,
        heads=3,
        use_dynamic_pos_bias=True,
        num_residual_streams=2,
        qk_rmsnorm=True,
        gate_values_per_head=True,
        attention_sinks=True,
    )
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))["params"]
    assert {path: x.shape for path, x in flatten_dict(params, sep="/").items()} == PARAMETERS
