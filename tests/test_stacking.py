"""The two layouts of layers' parameters: conversion both ways, in every tree that holds them, and errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze

from flax_local_attention import stack_layers, unstack_layers
from tests import cases


def layer(seed, dtype="float32"):
    return {
        "attn": {"kernel": np.asarray(cases.normal(seed, 2, 3)).astype(dtype)},
        "scale": np.asarray(cases.normal(seed + 1)).astype(dtype),
    }


def params(depth=3, dtype="float32"):
    return {"norm": {"scale": np.ones(3, dtype)}} | {f"layers_{i}": layer(10 * i, dtype) for i in range(depth)}


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("depth", [1, 3, 11])
def test_stacked_arrays_have_layers_in_front_in_order(depth):
    given = params(depth)
    stacked = stack_layers(given)
    assert set(stacked) == {"norm", "layers"}
    for i in range(depth):
        np.testing.assert_array_equal(stacked["layers"]["attn"]["kernel"][i], given[f"layers_{i}"]["attn"]["kernel"])
        assert stacked["layers"]["scale"][i] == given[f"layers_{i}"]["scale"]


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_there_and_back_is_bit_equal_in_any_tree(dtype, to_array):
    given = jax.tree.map(to_array, params(dtype=dtype))
    given["norm"]["scale"] = given["norm"]["scale"] * np.nan
    variables = {"params": given}
    for tree in (given, variables, freeze(variables), {"decoder": given, "step": to_array(3)}, (given, [given, None])):
        assert_same(unstack_layers(stack_layers(tree)), tree)
        assert_same(stack_layers(unstack_layers(stack_layers(tree))), stack_layers(tree))


def test_layers_within_a_layer_stay_as_they_are():
    given = {f"layers_{i}": params(2) for i in range(3)}
    stacked = stack_layers(given)
    assert set(stacked["layers"]) == {"norm", "layers_0", "layers_1"}
    assert_same(unstack_layers(stacked), given)


@pytest.mark.parametrize("frozen", ["", "attn"])
def test_an_optimizer_goes_on_from_its_converted_state(frozen):
    def mask(weights):
        return jax.tree.map_with_path(lambda path, _: frozen not in jax.tree_util.keystr(path), weights)

    optimizer = optax.masked(optax.adam(0.1), mask) if frozen else optax.adam(0.1)

    @jax.jit
    def update(weights, state):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, weights), state)
        return optax.apply_updates(weights, updates), state

    weights = {"params": jax.tree.map(jnp.asarray, params())}
    once = update(weights, optimizer.init(weights))
    expected = update(*once)
    cases.assert_close(unstack_layers(update(*stack_layers(once))), expected)


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxes_name_the_new_axis(box):
    given = jax.tree.map(lambda x: box(x, names=("x", None)[: x.ndim]), params())
    stacked = stack_layers(given)
    assert stacked["layers"]["attn"]["kernel"].names == (None, "x", None)
    assert stacked["layers"]["scale"].names == (None,)
    assert stacked["norm"]["scale"].names == ("x",)
    assert_same(unstack_layers(stacked), given)


def test_shapes_are_mapped_without_arrays():
    shapes = jax.eval_shape(stack_layers, params())
    assert shapes["layers"]["attn"]["kernel"].shape == (3, 2, 3)
    assert jax.eval_shape(unstack_layers, shapes) == jax.eval_shape(lambda x: x, params())


def other(**changes):
    return params(2) | {"layers_1": layer(10) | changes}


@pytest.mark.parametrize(
    ("convert", "tree", "phrase"),
    [
        (stack_layers, {"norm": {}}, "under layers_0, layers_1, ..., got none; pass those of a LocalTransformer"),
        (stack_layers, np.ones(3), "got none"),
        (stack_layers, stack_layers(params()), "got none"),
        (unstack_layers, params(), "under layers, got none"),
        (unstack_layers, {"layers": np.ones(3)}, "got none"),
        (stack_layers, {"layers_0": {}, "layers_2": {}}, "all layers from layers_0 on, got ['layers_0', 'layers_2']"),
        (stack_layers, {"layers_1": {}}, "all layers from layers_0 on, got ['layers_1']"),
        (stack_layers, params() | {"layers": {}}, "in one layout, got layers and layers_0"),
        (unstack_layers, stack_layers(params()) | {"layers_0": {}}, "in one layout, got layers and layers_0"),
        (stack_layers, other(scale=np.ones(2, "f")), "got ['scale'] of float32[] in layers_0 and of float32[2] in"),
        (stack_layers, other(scale=np.float64(1)), "got ['scale'] of float32[] in layers_0 and of float64[] in"),
        (stack_layers, other(gate=np.ones(2, "f")), "got ['gate'] of None in layers_0 and of float32[2] in layers_1"),
        (stack_layers, other(attn={"kernel": 1.0}), "got ['attn']['kernel'] of float32[2, 3] in layers_0 and of float"),
        (stack_layers, other(more={}), "the same containers and boxes in all layers, got different ones in layers_0"),
        (unstack_layers, {"layers": {"a": np.ones(2), "b": np.ones(3)}}, "got [2] in ['a'] and [3] in ['b']"),
        (
            unstack_layers,
            {"layers": {"a": np.ones(())}},
            "must have one leading axis of layers in all stacked arrays, got [] in",
        ),
        (unstack_layers, {"layers": {}}, "got no arrays"),
    ],
)
def test_wrong_trees_are_refused(convert, tree, phrase):
    with pytest.raises(ValueError, match=re.escape(phrase)):
        convert(tree)
