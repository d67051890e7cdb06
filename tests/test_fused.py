"""Fused operations on tokens: interpreted kernels equal plain code under every transformation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention import LocalTransformer, Triton, generate
from flax_local_attention.embedding import Embedding, LookupKernels, _look_up
from flax_local_attention.kernels import Windowed, row_kernels
from flax_local_attention.kernels.fused import GradientCall
from flax_local_attention.kernels.rows import MOST_STREAMS, NormKernels, StreamKernels
from flax_local_attention.norm import _layer_norm
from flax_local_attention.residual_streams import connect
from tests import cases

pytestmark = pytest.mark.usefixtures("quick_compile")

B, N, E = 2, 5, 24


def stream_arrays(r=3, b=B, n=N, e=E, dtype=jnp.float32):
    tokens = [cases.normal(s, b, n, e).astype(dtype) for s in range(r + 1)]
    beta = [cases.normal(10 + s, b, n) for s in range(r)]
    parameters = cases.normal(20, r + 2, e) * 0.3, cases.normal(21, r, r + 2), cases.normal(22, r + 2)
    return [*tokens[:r], *beta, tokens[r], *parameters]


def norm_arrays(b=B, n=N, e=E, dtype=jnp.float32):
    return [3 + cases.normal(0, b, n, e).astype(dtype), cases.normal(1, e), cases.normal(2, e)]


def lookup_arrays(b=B, n=N, e=E, dtype=jnp.float32):
    return [cases.normal(0, 7, e).astype(dtype), jnp.asarray(np.random.default_rng(0).integers(0, 7, (b, n)))]


norm = _layer_norm(jnp.dtype(jnp.float32))
look_up = _look_up(jnp.dtype(jnp.float32))
OPERATIONS = {
    "streams": (connect, StreamKernels(True), stream_arrays()),
    "norm": (norm, NormKernels(jnp.dtype(jnp.float32), True), norm_arrays()),
    "lookup": (look_up, LookupKernels(jnp.dtype(jnp.float32), True), lookup_arrays()),
}
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def loss_of(name, kernels):
    """Return a scalar function of an operation's floating arrays, with random weights, and these arrays."""
    operation, _, arrays = OPERATIONS[name]
    moving = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    rest = arrays[len(moving) :]

    def loss(*values):
        results = operation(kernels, *values, *rest)
        return sum((cases.normal(40 + k, *x.shape).astype(x.dtype) * jnp.sin(x)).sum() for k, x in enumerate(results))

    return loss, moving


def both(name, transform):
    """Apply a transformation to the loss by kernels and by plain code; return both results."""
    kernels = OPERATIONS[name][1]
    results = []
    for asked in (kernels, None):
        loss, arrays = loss_of(name, asked)
        results.append(jax.jit(transform(loss))(*arrays))
    return results


def everything(loss):
    """Return the gradients of all arguments."""
    return lambda *arrays: jax.grad(loss, tuple(range(len(arrays))))(*arrays)


TRANSFORMS = {
    "value": lambda loss: loss,
    "gradient": everything,
    "remat": lambda loss: everything(jax.checkpoint(loss)),
    "jvp": lambda loss: lambda *arrays: jax.jvp(loss, arrays, arrays)[1],
    "forward over reverse": lambda loss: lambda *arrays: jax.jvp(everything(loss), arrays, arrays)[1],
    "reverse over reverse": lambda loss: everything(
        lambda *arrays: sum(jnp.square(x).sum() for x in everything(loss)(*arrays))
    ),
    "vmap": lambda loss: (
        lambda *arrays: jax.vmap(everything(loss), (0, *[None] * (len(arrays) - 1)))(
            jnp.stack([arrays[0], 2 * arrays[0]]), *arrays[1:]
        )
    ),
    "scan": lambda loss: everything(
        lambda *arrays: jax.lax.scan(
            lambda total, scale: (total + loss(scale * arrays[0], *arrays[1:]), None), 0.0, jnp.array([1.0, 2.0])
        )[0]
    ),
}


@pytest.mark.slow_but("norm-value", "norm-gradient", "lookup-*", "streams-value")
@pytest.mark.parametrize("transform", TRANSFORMS)
@each_operation
def test_kernels_are_their_definition_under(name, transform):
    ours, plain = both(name, TRANSFORMS[transform])
    cases.assert_close(ours, plain)


@pytest.mark.slow_but("norm", "lookup")
@each_operation
def test_gradients_are_those_of_small_steps(name):
    loss, arrays = loss_of(name, OPERATIONS[name][1])
    step = [cases.normal(60 + k, *x.shape) for k, x in enumerate(arrays)]
    along = sum((g * d).sum() for g, d in zip(everything(loss)(*arrays), step, strict=True))
    with jax.enable_x64(True):
        wide, arrays = loss_of(name, None)
        at = lambda t: wide(*(x.astype(float) + t * d.astype(float) for x, d in zip(arrays, step, strict=True)))  # noqa: E731
        cases.assert_close(along, (at(1e-4) - at(-1e-4)) / 2e-4, "bfloat16")


@pytest.mark.slow
def test_frozen_parameters_have_no_part_in_the_gradient():
    arrays = stream_arrays()

    def gradient(kernels):
        loss = lambda *tokens: connect(kernels, *tokens, *arrays[len(tokens) :])[0].sum()  # noqa: E731
        return jax.grad(loss, (0, 3, 6))(*arrays[:7])

    cases.assert_close(gradient(StreamKernels(True)), gradient(None))


@pytest.mark.slow
@pytest.mark.parametrize("few", [0, 256])
@pytest.mark.parametrize(("r", "b", "n", "e"), [(2, 1, 1, 1), (4, 3, 37, 33), (2, 2, 40, 256), (6, 1, 2, 40)])
def test_streams_of_other_sizes(r, b, n, e, few, monkeypatch):
    monkeypatch.setattr("flax_local_attention.kernels.rows.FEW_TOKENS", few)  # all tokens at once, or one by one
    jax.clear_caches()
    monkeypatch.setattr("flax_local_attention.kernels.rows.PROGRAMS", 16)  # several tokens per program
    arrays = stream_arrays(r, b, n, e)

    def run(kernels):
        results, pull_back = jax.vjp(functools.partial(connect, kernels), *arrays)
        return results, pull_back(tuple(cases.normal(50 + k, *x.shape) for k, x in enumerate(results)))

    cases.assert_close(run(StreamKernels(True)), run(None))


@pytest.mark.slow
@pytest.mark.parametrize("few", [0, 256])
def test_narrow_streams_are_rounded_as_plain_code_rounds_them(few, monkeypatch):
    monkeypatch.setattr("flax_local_attention.kernels.rows.FEW_TOKENS", few)
    jax.clear_caches()
    arrays = stream_arrays(dtype=jnp.bfloat16)
    ours, plain = connect(StreamKernels(True), *arrays), connect(None, *arrays)
    for x, y in zip(ours, plain, strict=True):
        assert x.dtype == y.dtype
        cases.assert_close(x.astype(jnp.float32), y.astype(jnp.float32), "bfloat16")


@pytest.mark.slow
def test_a_token_of_zeros_has_a_finite_gradient():
    arrays = stream_arrays()
    arrays = [x.at[:, 1].set(0) if x.ndim == 3 else x for x in arrays]
    gradients = jax.grad(lambda *x: connect(StreamKernels(True), *x)[0].sum(), tuple(range(len(arrays))))(*arrays)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.slow_but("norm-AxisType.Explicit", "lookup-*")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@each_operation
def test_on_a_mesh(name, axis_type):
    loss, arrays = loss_of(name, OPERATIONS[name][1])
    expected = everything(loss)(*arrays)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        spread = [jax.device_put(x, NamedSharding(mesh, P("data") if x.shape[0] == B else P())) for x in arrays]
        found = jax.jit(everything(loss))(*spread)
    cases.assert_close(found, expected)


@pytest.mark.slow_but("norm")
@each_operation
def test_inside_shard_map(name):
    _, arrays = loss_of(name, OPERATIONS[name][1])
    if name == "lookup":
        pytest.skip("its numbers are closed over")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    specs = tuple(P("data") if x.shape[0] == B else P() for x in arrays)

    def local(*values):
        operation, kernels, _ = OPERATIONS[name]
        return jax.lax.psum(sum(jnp.sin(x).sum() for x in operation(kernels, *values)), "data")

    spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    whole = lambda *values: sum(jnp.sin(x).sum() for x in OPERATIONS[name][0](None, *values))  # noqa: E731
    cases.assert_close(
        jax.jit(everything(spread))(*arrays),
        everything(whole)(*arrays),
    )


def test_which_implementations_have_kernels():
    assert row_kernels(None, StreamKernels) == row_kernels("triton", StreamKernels) == StreamKernels(False)
    assert row_kernels(Triton(interpret=True), StreamKernels) == StreamKernels(True)
    for other in ("xla", "dense", Windowed(block=8)):
        assert row_kernels(other, StreamKernels) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "param_dtype", "reason"),
    [
        ((2, 5, 8200), "float32", "float32", "at most 8192 wide"),
        ((5, 24), "float32", "float32", r"must be \[b, n, e\]"),
        ((2, 0, 24), "float32", "float32", r"must be \[b, n, e\]"),
        ((2, 5, 24), "float64", "float32", "up to float32"),
        ((2, 5, 24), "bfloat16", "bfloat16", "must be float32"),
    ],
)
def test_what_kernels_do_not_serve(shape, dtype, param_dtype, reason):
    with jax.enable_x64(True):
        scale = jax.ShapeDtypeStruct(shape[-1:], param_dtype)
        arrays = [jax.ShapeDtypeStruct(shape, dtype), scale, scale]
        (found,) = NormKernels(jnp.dtype(dtype), True).problems(arrays)
    assert re.search(reason, found)


@pytest.mark.parametrize("r", [MOST_STREAMS, MOST_STREAMS + 1])
def test_kernels_serve_so_many_streams(r):
    reasons = StreamKernels(True).problems(stream_arrays(r, e=8))
    assert reasons == ([] if r == MOST_STREAMS else [f"at most {MOST_STREAMS} streams, got {r}"])


@each_operation
def test_lowering_rules_know_the_devices_where_there_are_several(name):
    dispatch = pytest.importorskip("jax._src.dispatch")
    operation, kernels, arrays = OPERATIONS[name]
    dispatch.prim_requires_devices_during_lowering -= set(operation._primitives)
    assert len(jax.devices()) > 1
    operation(kernels, *arrays)
    assert set(operation._primitives) <= dispatch.prim_requires_devices_during_lowering


def test_a_call_that_kernels_do_not_serve_is_plain_code():
    x, *parameters = norm_arrays(e=8200)
    kernels = NormKernels(jnp.dtype(jnp.float32), True)
    np.testing.assert_array_equal(norm(kernels, x, *parameters)[0], norm(None, x, *parameters)[0])


@pytest.mark.parametrize("n", [3, 300])
def test_norms_of_few_and_of_many_tokens(n):
    arrays = norm_arrays(1, n, 33, jnp.bfloat16)
    kernels = NormKernels(jnp.dtype(jnp.float32), True)
    cases.assert_close(norm(kernels, *arrays), norm(None, *arrays))


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 4])
def test_a_model_by_kernels_is_the_model(streams):
    fields = {"num_tokens": 16, "max_seq_len": 48, "dim": 32, "depth": 2, "local_attn_window_size": 16, "heads": 2}
    fields |= {"dim_head": 16, "num_residual_streams": streams}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 33)))
    plain = LocalTransformer(**fields, implementation="xla")
    ours = LocalTransformer(**fields, implementation=Triton(interpret=True))
    variables = plain.init(jax.random.key(0), tokens)
    run = lambda model: jax.value_and_grad(lambda v: model.apply(v, tokens, return_loss=True))(variables)  # noqa: E731
    cases.assert_close(run(ours), run(plain))


def test_gradients_of_an_embedding_are_summed_in_its_own_dtype():
    table = Embedding(3, 4, jax.nn.initializers.normal(), dtype=jnp.bfloat16)
    index = jnp.zeros((1, 4096), int)
    variables = table.init(jax.random.key(0), index)
    gradient = jax.grad(lambda v: table.apply(v, index).astype(jnp.float32).sum())(variables)
    np.testing.assert_array_equal(gradient["params"]["embedding"][0], 4096)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_gradient_of_a_table_by_a_product_is_the_sum_of_its_rows(dtype):
    table, index = lookup_arrays(n=50)
    d_rows = cases.normal(3, B, 50, E).astype(dtype)

    def gradient(kernels):
        return jax.vjp(lambda table: _look_up(jnp.dtype(dtype))(kernels, table, index)[0], table)[1](d_rows)

    cases.assert_close(gradient(LookupKernels(jnp.dtype(dtype), True)), gradient(None))


def test_the_gradient_of_a_table_by_a_product_is_not_rounded_to_the_precision_of_products():
    table, index = lookup_arrays()
    kernels, d_rows = LookupKernels(jnp.dtype(jnp.float32), True), jnp.ones((B, N, E))
    with jax.default_matmul_precision("bfloat16"):
        product = jax.make_jaxpr(lambda d_rows: kernels.backward(GradientCall((table, index), (), (d_rows,), (0,))))(
            d_rows
        )
    assert "HIGHEST" in str(product)


def test_an_embedding_outside_its_table_is_nan():
    table = Embedding(3, 4, jax.nn.initializers.normal())
    variables = table.init(jax.random.key(0), jnp.zeros((1, 1), int))
    np.testing.assert_array_equal(np.isnan(table.apply(variables, jnp.array([[2, 3]]))).all(-1), [[False, True]])
    np.testing.assert_array_equal(
        table.apply(variables, 2, method=Embedding.first), variables["params"]["embedding"][:2]
    )


@pytest.mark.slow
def test_generation_by_kernels_gives_the_same_tokens():
    fields = {"num_tokens": 16, "max_seq_len": 64, "dim": 32, "depth": 1, "local_attn_window_size": 8}
    plain = LocalTransformer(**fields, implementation="xla")
    variables = plain.init(jax.random.key(0), jnp.zeros((1, 1), int))
    prompt = jnp.array([[1, 2, 3]])
    tokens = [generate(plain.clone(implementation=x), variables, prompt, 6, temperature=0.0)[0] for x in ("xla", None)]
    np.testing.assert_array_equal(*tokens)
