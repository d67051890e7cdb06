"""Hyper-connections against their equations in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention.residual_streams import (
    PREPARED,
    HyperConnection,
    expand_streams,
    prepare_connections,
    reduce_streams,
)
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")

R, B, N, E = 3, 2, 5, 7


def random_parameters(r=R, e=E):
    shapes = {
        "gamma": (e,),
        "static_alpha": (r, r + 1),
        "dynamic_alpha_fn": (e, r + 1),
        "dynamic_alpha_scale": (),
        "static_beta": (r,),
        "dynamic_beta_fn": (e,),
        "dynamic_beta_scale": (),
    }
    return {name: cases.normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}


def connect(params, streams, branch, num_streams=R, **fields):
    def apply(module, streams):
        x, streams = module(streams)
        return jnp.stack(streams.add(branch(x)).write())

    module = HyperConnection(num_streams, streams.shape[-1], **fields)
    return module.apply({"params": params}, streams, method=apply)


def by_formula(params, streams, branch):
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    streams = np.asarray(streams, np.float64)
    r, e = len(streams), streams.shape[-1]
    out = np.zeros_like(streams)
    for token in np.ndindex(streams.shape[1:-1]):
        at = (slice(None), *token)
        x = streams[at]
        normed = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) * np.sqrt(e) * (p["gamma"] + 1)
        alpha = np.tanh(normed @ p["dynamic_alpha_fn"]) * p["dynamic_alpha_scale"] + p["static_alpha"]
        beta = np.tanh(normed @ p["dynamic_beta_fn"]) * p["dynamic_beta_scale"] + p["static_beta"]
        mixed = [sum(alpha[s, t] * x[s] for s in range(r)) for t in range(r + 1)]
        for s in range(r):
            out[(s, *token)] = mixed[1 + s] + beta[s] * branch(mixed[0])
    return out


def test_hyper_connection_is_its_formula():
    params, streams = random_parameters(), cases.normal(11, R, B, N, E)
    branch = lambda x: 3 * x - x**2  # noqa: E731
    cases.assert_close(connect(params, streams, branch), by_formula(params, streams, branch))


def test_gradient_reaches_every_parameter_and_is_finite_at_zero():
    streams = cases.normal(11, R, B, N, E).at[:, 0, 0].set(0.0)
    cotangent = cases.normal(12, R, B, N, E)
    gradients = jax.grad(lambda params: (cotangent * connect(params, streams, jnp.tanh)).sum())(random_parameters())
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 1e-4, name


@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_a_fresh_connection_reads_one_stream_and_adds_to_all(index):
    streams = cases.normal(0, R, B, N, E)
    variables = HyperConnection(R, E, index).init(jax.random.key(0), streams)
    cases.assert_close(
        connect(variables["params"], streams, jnp.sin, index=index), streams + jnp.sin(streams[index % R])
    )


def test_parameters_have_their_shapes_and_starts():
    params = HyperConnection(R, E, 1).init(jax.random.key(0), jnp.zeros((R, B, N, E)))["params"]
    assert {name: x.shape for name, x in params.items()} == {name: x.shape for name, x in random_parameters().items()}
    np.testing.assert_array_equal(params["static_alpha"], [[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(params["static_beta"], 1)
    for name in ("gamma", "dynamic_alpha_fn", "dynamic_beta_fn"):
        np.testing.assert_array_equal(params[name], 0)
    for name in ("dynamic_alpha_scale", "dynamic_beta_scale"):
        np.testing.assert_allclose(params[name], 0.01)


def test_one_stream_is_the_plain_residual():
    streams = cases.normal(0, 1, B, N, E)
    assert not HyperConnection(1, E).init(jax.random.key(0), streams)
    np.testing.assert_array_equal(connect({}, streams, jnp.sin, num_streams=1), streams + jnp.sin(streams))


def test_prepared_connections_give_the_same_and_are_not_computed_again():
    streams, params = cases.normal(0, R, B, N, E), random_parameters()
    module, variables = HyperConnection(R, E), {"params": params}
    prepared = prepare_connections(variables)
    assert prepared["params"] is params
    for x, other in zip(*(jax.tree.leaves(module.apply(v, streams)) for v in (variables, prepared)), strict=True):
        np.testing.assert_array_equal(x, other)
    nothing = jax.tree.map(jnp.zeros_like, params)
    cases.assert_close(module.apply({**prepared, "params": nothing}, streams)[0], module.apply(variables, streams)[0])


def test_connections_are_prepared_wherever_they_stand_in_a_model():
    params = random_parameters()
    tree = {"params": {"layers_0": {"ff_streams": params, "ff": {"to_out": {"kernel": jnp.ones(2)}}}, "norm": {}}}
    prepared = prepare_connections(tree)[PREPARED]
    assert list(prepared) == ["layers_0"]
    assert list(prepared["layers_0"]) == ["ff_streams"]


def test_streams_keep_their_dtype():
    out = connect(random_parameters(), cases.normal(0, R, B, N, E).astype(jnp.bfloat16), jnp.sin)
    assert out.dtype == jnp.bfloat16


def test_expand_and_reduce():
    x = cases.normal(0, B, N, E)
    streams = expand_streams(x, R)
    assert [stream.shape for stream in streams.write()] == [(B, N, E)] * R
    cases.assert_close(reduce_streams(streams), R * np.asarray(x))
