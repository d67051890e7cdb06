"""Axis names of parameters, and their shardings over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from flax_local_attention import AXIS_RULES, LocalTransformer, parameter_axes, parameter_shardings

FIELDS = {
    "num_tokens": 32,
    "max_seq_len": 64,
    "dim": 16,
    "depth": 2,
    "heads": 4,
    "dim_head": 4,
    "local_attn_window_size": 4,
    "kv_heads": 2,
    "dim_value": 6,
    "ff_mult": 3,
    "attention_sinks": True,
    "memory_tokens": 3,
    "qk_rmsnorm": True,
    "gate_values_per_head": True,
    "use_bias": True,
    "use_out_bias": True,
    "use_dynamic_pos_bias": True,
}
AXES = {
    "token_emb/embedding": P("vocab", "embed"),
    "pos_emb/embedding": P(None, "embed"),
    "to_logits/kernel": P("embed", "vocab"),
    "attn/to_qkv/kernel": P("embed", "heads"),
    "attn/to_qkv/bias": P("heads"),
    "attn/to_v_gate/kernel": P("embed", "heads"),
    "attn/to_v_gate/bias": P("heads"),
    "attn/to_out/kernel": P("heads", "embed"),
    "attn/sinks": P("heads"),
    "attn/memory_k": P("heads", None, None),
    "attn/memory_v": P("heads", None, None),
    "ff/to_hidden/kernel": P("embed", "mlp"),
    "ff/to_out/kernel": P("mlp", "embed"),
}
FSDP = (*AXIS_RULES[:-1], ("embed", "data"))


def shapes_of(**fields):
    return jax.eval_shape(LocalTransformer(**FIELDS | fields).init, jax.random.key(0), jnp.zeros((1, 8), int))


def by_path(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path if hasattr(key, "key")): x for path, x in leaves}


def expected_of(path, rank):
    found = [spec for name, spec in AXES.items() if path.endswith(name)]
    assert len(found) <= 1
    spec = found[0] if found else P(*(None,) * rank)
    return P(None, *spec) if found and "layers/" in path else spec


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_parameter_has_axes(scan_layers):
    shapes = shapes_of(scan_layers=scan_layers)
    axes, ranks = by_path(parameter_axes(shapes)), by_path(shapes)
    assert axes == {path: expected_of(path, x.ndim) for path, x in ranks.items()}
    found = {name for name in AXES for path in axes if path.endswith(name)}
    assert found == set(AXES)
    large = {path for path, x in ranks.items() if x.size >= 16 * 16 * (2 if "layers/" in path else 1)}
    assert all(any(axes[path]) for path in large)


def test_optimizers_and_boxes_have_the_axes_of_their_parameters():
    shapes = shapes_of()
    state = jax.eval_shape(optax.adam(1.0).init, shapes)
    axes = parameter_axes(state)[0]
    assert axes.mu == axes.nu == parameter_axes(shapes)
    assert axes.count == P()
    boxed = {"to_logits": {"kernel": nn.Partitioned(np.zeros((8, 16)), (None, None))}}
    assert jax.tree.leaves(parameter_axes(boxed)) == [P("embed", "vocab")]
    factors = jax.eval_shape(optax.adafactor(1.0, min_dim_size_to_factor=1).init, shapes)
    shardings = parameter_shardings(factors, AbstractMesh((2, 2), ("data", "model")), FSDP)
    jax.tree.map(lambda x, sharding: sharding.shard_shape(x.shape), factors, shardings)


@pytest.mark.parametrize(
    ("sizes", "names", "rules", "expected"),
    [
        ((8,), ("data",), AXIS_RULES, {}),
        ((8,), ("data",), FSDP, {"to_logits/kernel": P("data", None), "ff/to_out/kernel": P(None, "data")}),
        (
            (2, 4),
            ("data", "model"),
            AXIS_RULES,
            {
                "to_logits/kernel": P(None, "model"),
                "to_qkv/kernel": P(None, "model"),
                "to_v_gate/bias": P("model"),
                "memory_k": P(None, None, None),  # 2 heads do not divide
                "ff/to_hidden/kernel": P(None, "model"),
            },
        ),
        (
            (2, 2, 2),
            ("data", "sequence", "model"),
            FSDP,
            {
                "token_emb/embedding": P("model", "data"),
                "pos_emb/embedding": P(None, "data"),
                "attn/to_out/kernel": P("model", "data"),
                "ff/to_hidden/kernel": P("data", "model"),
                "memory_k": P("model", None, None),
                "norm/scale": P(None),
            },
        ),
        ((2, 2), ("data", "model"), [("vocab", ("data", "model"))], {"to_logits/kernel": P(None, ("data", "model"))}),
        ((3,), ("model",), AXIS_RULES, {"to_logits/kernel": P(None, None), "to_qkv/kernel": P(None, "model")}),
        ((2,), ("x",), [("embed", "x"), ("vocab", "x")], {"token_emb/embedding": P("x", None)}),
    ],
)
def test_parameters_are_spread_over_what_divides_them(sizes, names, rules, expected):
    shardings = by_path(parameter_shardings(shapes_of(), AbstractMesh(sizes, names), rules))
    for name, spec in expected.items():
        found = {sharding.spec for path, sharding in shardings.items() if path.endswith(name)}
        assert found == {spec}, name
    assert expected or all(not any(sharding.spec) for sharding in shardings.values())


def test_axes_are_what_flax_takes():
    shapes, mesh = shapes_of(), jax.make_mesh((1, 1, 1), ("data", "sequence", "model"), devices=jax.devices()[:1])
    theirs = nn.logical_to_mesh_sharding(parameter_axes(shapes), mesh, AXIS_RULES)
    assert theirs == parameter_shardings(shapes, mesh)
