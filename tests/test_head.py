"""The head's cross entropy, at once and in blocks of tokens, against the plain computation."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention import LocalTransformer, head
from flax_local_attention.head import Head, cross_entropy
from tests.cases import assert_close, normal

pytestmark = pytest.mark.usefixtures("quick_compile")

B, N, E, C = 2, 17, 5, 29
X, KERNEL = normal(0, B, N, E), normal(1, E, C)
LABELS = jnp.asarray(np.random.RandomState(2).randint(0, C, (B, N)))
COUNTED = normal(3, B, N) > -0.7
BLOCKS = [1, 4, 16, 17, 20]


def plain(x, kernel, labels=LABELS, counted=COUNTED):
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.einsum("bne,ec->bnc", x, kernel), labels)
    return jnp.where(counted, losses, 0).sum()


def in_blocks(block, **options):
    return partial(cross_entropy, labels=LABELS, counted=COUNTED, block=block, **options)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_loss_and_its_gradients_equal_the_plain_computation(block):
    ours, expected = (jax.jit(jax.value_and_grad(fn, (0, 1)))(X, KERNEL) for fn in (in_blocks(block), plain))
    assert_close(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_forward_and_second_derivatives_equal_the_plain_computation(block):
    directions = normal(4, B, N, E), normal(5, E, C)

    @partial(jax.jit, static_argnums=0)
    def derivatives(fn):
        def slope(x, kernel):
            return sum((g * d).sum() for g, d in zip(jax.grad(fn, (0, 1))(x, kernel), directions, strict=True))

        forward = jax.jvp(fn, (X, KERNEL), directions)
        forward_over_reverse = jax.jvp(jax.grad(fn, (0, 1)), (X, KERNEL), directions)
        reverse_over_reverse = jax.grad(slope, (0, 1))(X, KERNEL)
        return forward, forward_over_reverse, reverse_over_reverse, jax.grad(jax.checkpoint(fn))(X, KERNEL)

    assert_close(derivatives(in_blocks(block)), derivatives(plain))


@pytest.mark.slow
@pytest.mark.parametrize("block", [4, N])
def test_a_map_over_losses_equals_each(block):
    xs = normal(6, 3, B, N, E)
    gradients = jax.vmap(jax.grad(in_blocks(block), 1), (0, None))(xs, KERNEL)
    assert_close(gradients, jnp.stack([jax.grad(plain, 1)(x, KERNEL) for x in xs]))


@pytest.mark.parametrize("block", [4, N])
def test_labels_that_do_not_count_may_be_anything_and_others_beyond_the_vocabulary_give_nan(block):
    loss = jax.jit(lambda labels: cross_entropy(X, KERNEL, labels, COUNTED, block=block))
    beyond = jnp.where(COUNTED, LABELS, C)
    assert_close(loss(beyond), plain(X, KERNEL))
    assert np.isnan(loss(jnp.full_like(LABELS, C)))


@pytest.mark.slow
@pytest.mark.parametrize("block", [8, 64])
def test_narrow_factors_give_float32_logits_and_a_gradient_summed_in_float32(block):
    x, kernel = 3 * normal(0, 4, 64, 64), normal(1, 64, C)
    labels = jnp.asarray(np.random.RandomState(2).randint(0, C, (4, 64)))
    counted = jnp.ones_like(labels, bool)
    narrow = x.astype(jnp.bfloat16)
    options = {"labels": labels, "counted": counted, "dtype": jnp.bfloat16, "block": block}
    loss, gradient = jax.value_and_grad(partial(cross_entropy, **options), 1)(narrow, kernel)
    rounded = (y.astype(jnp.bfloat16).astype(jnp.float32) for y in (x, kernel))
    expected, expected_gradient = jax.value_and_grad(partial(plain, labels=labels, counted=counted), 1)(*rounded)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert gradient.dtype == jnp.float32
    assert np.abs(gradient - expected_gradient).max() < 2e-3 * np.abs(expected_gradient).max()


def test_blocks_are_of_tokens_whose_logits_fit(monkeypatch):
    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * B * C * 5)
    for n, e, expected in [(5, E, 5), (6, E, 3), (17, E, 5), (21, E, 3), (17, C, 17)]:
        shapes = (jax.ShapeDtypeStruct(s, d) for s, d in [((B, n, e), float), ((e, C), float), ((B, n), int)])
        x, kernel, labels = shapes
        jaxpr = str(jax.make_jaxpr(cross_entropy)(x, kernel, labels, jax.ShapeDtypeStruct((B, n), bool)))
        assert f"f32[{B},{expected},{C}]" in jaxpr, n
        assert ("scan" in jaxpr) == (expected < n)


def test_rows_that_are_spread_over_devices_stay_there():
    devices = jax.devices("cpu")[:2]
    if len(devices) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(devices), ("data",))
    spread, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    run = jax.jit(
        lambda x, kernel, labels, counted: jax.value_and_grad(cross_entropy, (0, 1))(
            x, kernel, labels, counted, block=4
        ),
        in_shardings=(spread, whole, spread, spread),
        out_shardings=(whole, (spread, whole)),
    )
    arguments = X, KERNEL, LABELS, COUNTED
    text = run.lower(*arguments).compile().as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    assert f"f32[{B},4,{C}]" not in text
    assert_close(run(*arguments), jax.value_and_grad(plain, (0, 1))(X, KERNEL))


@pytest.mark.slow_but("columns-explicit-even")
@pytest.mark.parametrize(
    ("kind", "n", "block"),
    [(AxisType.Explicit, 40, 3), (AxisType.Explicit, 40, 10), (AxisType.Auto, 40, 8)],
    ids=["explicit", "explicit-even", "automatic"],
)
@pytest.mark.parametrize("kernel_spec", [P(), P(None, "model"), P("data", "model")], ids=["whole", "columns", "both"])
def test_tokens_and_logits_that_are_spread_over_devices_stay_there(kind, n, block, kernel_spec):
    """On explicit axes the gradient of the kernel is summed over devices once, not for each block."""
    devices = jax.devices("cpu")[:8]
    if len(devices) < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "model"), axis_types=(kind,) * 3, devices=devices)
    labels = jnp.asarray(np.random.RandomState(2).randint(0, 30, (2, n)))
    x, kernel, counted = normal(0, 2, n, 6), normal(1, 6, 30), normal(3, 2, n) > -0.7
    tokens = P("data", "sequence")
    specs = tokens, kernel_spec, tokens, tokens
    arguments = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip((x, kernel, labels, counted), specs, strict=True)
    ]
    run = jax.jit(jax.value_and_grad(partial(cross_entropy, block=block), (0, 1)))
    assert_close(run(*arguments), jax.value_and_grad(plain, (0, 1))(x, kernel, labels, counted))
    jax.config.update("jax_disable_most_optimizations", False)  # `quick_compile` sets it for the next test again
    text = run.lower(*arguments).compile().as_text()
    moved = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    columns = 15 if "model" in kernel_spec else 30
    assert {x.partition("{")[0] for x in moved} <= ({f"f32[6,{columns}]"} if "data" in kernel_spec else set())
    in_loop = re.search(rf"f32\[6,{columns}\].* all-reduce", text.partition("\nENTRY")[0])
    assert (in_loop is None) == (kind == AxisType.Explicit)


@pytest.mark.slow_but("varying")
@pytest.mark.parametrize("is_replicated", [True, False], ids=["replicated", "varying"])
def test_a_shard_of_rows_sums_its_own(is_replicated):
    devices = jax.devices("cpu")[:2]
    if len(devices) < 2:
        pytest.skip("needs two devices")

    def own(x, kernel, labels, counted):
        kernel = kernel if is_replicated else jax.lax.pcast(kernel, "data", to="varying")
        loss, (dx, dkernel) = jax.value_and_grad(cross_entropy, (0, 1))(x, kernel, labels, counted, block=4)
        return jax.lax.psum(loss, "data"), (dx, dkernel if is_replicated else jax.lax.psum(dkernel, "data"))

    mesh = Mesh(np.array(devices), ("data",))
    specs = P("data"), P(), P("data"), P("data")
    run = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=(P(), (P("data"), P()))))
    assert_close(run(X, KERNEL, LABELS, COUNTED), jax.value_and_grad(plain, (0, 1))(X, KERNEL))


def test_a_kernel_that_is_not_trained_costs_no_product():
    def products(argnums):
        fn = jax.jit(jax.grad(in_blocks(4), argnums))
        return fn.lower(X, KERNEL).compile().as_text().count(" dot(")

    assert products(0) < products((0, 1))


# In a model


def model(**fields):
    sizes = {"num_tokens": C, "max_seq_len": 64, "dim": 8, "depth": 1, "heads": 2, "dim_head": 4}
    return LocalTransformer(**sizes | {"local_attn_window_size": 4, "num_residual_streams": 1} | fields)


TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, C, (2, 20)))
CALLS = {
    "plain": (TOKENS, {}),
    "ignored": (TOKENS.at[0, 5].set(-1).at[1, 13:].set(-1), {}),
    "documents": (TOKENS, {"segment_ids": jnp.arange(20) // jnp.array([[7], [3]])}),
    "masked": (TOKENS.at[1, 15:].set(99), {"mask": jnp.arange(20) < jnp.array([[20], [15]])}),
    "beyond": (TOKENS.at[1, 19].set(C), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_models_loss_in_blocks_equals_the_one_in_one_piece(name, monkeypatch):
    tokens, options = CALLS[name]
    module = model()
    variables = jax.jit(module.init)(jax.random.key(0), TOKENS)

    def run():
        loss = jax.value_and_grad(lambda v, tokens: module.apply(v, tokens, return_loss=True, **options))
        return jax.jit(loss)(variables, tokens)

    whole = run()
    assert np.isnan(whole[0]) == (name == "beyond")
    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * 2 * C * 6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), run(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_loss_of_a_large_vocabulary_needs_less_memory_than_its_logits(dtype):
    b, n, c = 2, 1024, 32768
    module = model(num_tokens=c, max_seq_len=n, dtype=dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    loss = jax.value_and_grad(lambda variables, tokens: module.apply(variables, tokens, return_loss=True))
    compiled = jax.jit(loss).lower(variables, jax.ShapeDtypeStruct((b, n + 1), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * b * n * c


@pytest.mark.slow
def test_a_bfloat16_loss_is_not_rounded_with_its_logits():
    module = Head(64, 64, dtype=jnp.bfloat16)
    x = 8 * normal(0, 1, 8, 64)
    x = x.astype(jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    labels, counted = jnp.arange(8)[None], jnp.arange(8)[None] == 0
    ours = module.apply(variables, x, labels, counted, method="cross_entropy")
    kernel = variables["params"]["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    expected = plain(x.astype(jnp.float32), kernel, labels, counted)
    rounded = optax.softmax_cross_entropy_with_integer_labels(module.apply(variables, x).astype(jnp.float32), labels)
    assert abs(ours - expected) < 1e-3
    assert abs(rounded[0, 0] - expected) > 4e-3


@pytest.mark.slow
def test_logits_keep_the_dtype_of_the_computation_and_the_path_of_their_kernel():
    module = model(dtype=jnp.bfloat16, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "heads")))
    variables = module.init(jax.random.key(0), TOKENS, return_loss=True)
    assert variables["params"]["to_logits"]["kernel"].names == (None, "heads")
    assert module.apply(variables, TOKENS).dtype == jnp.bfloat16
    assert np.isfinite(module.apply(variables, TOKENS, return_loss=True))


@pytest.mark.parametrize("remat", [False, True])
def test_a_bfloat16_step_casts_each_matrix_once(remat):
    """Counted before XLA merges casts: on a GPU a cast that `remat` traces again is computed again."""
    module = model(dim=12, heads=1, dim_head=10, num_tokens=37, max_seq_len=61, dtype=jnp.bfloat16, remat=remat)
    variables = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    loss = jax.value_and_grad(lambda variables: module.apply(variables, TOKENS, return_loss=True))
    text = jax.jit(loss).lower(variables).as_text()
    matrices = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(variables) if x.ndim == 2}
    assert len(set(matrices.values())) == len(matrices) == 7
    for path, (rows, columns) in matrices.items():
        cast = f"(tensor<{rows}x{columns}xf32>) -> tensor<{rows}x{columns}xbf16>"
        assert text.count(cast) == ("kernel" in path), path  # only looked-up rows of an embedding are cast
