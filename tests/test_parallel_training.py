"""Training on meshes over data, tensors and the sequence gives the losses of one device."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention import AXIS_RULES, LocalTransformer, parameter_shardings

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS, ROWS, N = 20, 8, 16
MODEL = {
    "num_tokens": 16,
    "max_seq_len": N,
    "dim": 16,
    "depth": 2,
    "heads": 8,
    "kv_heads": 4,
    "dim_head": 2,
    "ff_mult": 3,
    "num_residual_streams": 2,
    "local_attn_window_size": (2, None),
}
FSDP = (*AXIS_RULES[:-1], ("embed", "data"))
TEXT = (np.arange((N + 1) * ROWS * STEPS) ** 2 // 7 % 16).reshape(STEPS, ROWS, N + 1)
OPTIMIZER = optax.adam(1e-2)
MESHES = {
    "data": ((8, 1, 1), AXIS_RULES),
    "tensor": ((1, 1, 4), AXIS_RULES),
    "sequence": ((1, 4, 1), AXIS_RULES),
    "mixed": ((2, 2, 2), AXIS_RULES),
    "fsdp": ((4, 1, 2), FSDP),
}


def train(model, place=lambda x, _: x, shardings=lambda x: None):
    """Train for a few steps; return their losses."""
    inputs, labels = TEXT[..., :-1], TEXT[..., 1:]

    def start(key):
        variables = model.init(key, inputs[0])
        return variables, OPTIMIZER.init(variables)

    key, losses = jax.random.key(0), []
    placed = shardings(jax.eval_shape(start, key))

    @partial(jax.jit, donate_argnums=0, out_shardings=(placed, None))
    def step(state, x, labels):
        variables, memory = state
        loss, gradients = jax.value_and_grad(
            lambda variables: model.apply(variables, x, labels=labels, method="sum_loss").mean
        )(variables)
        updates, memory = OPTIMIZER.update(gradients, memory, variables)
        return (optax.apply_updates(variables, updates), memory), loss

    state = jax.jit(start, out_shardings=placed)(key)
    for x, y in zip(inputs, labels, strict=True):
        state, loss = step(state, place(x, P("data", "sequence")), place(y, P("data", "sequence")))
        losses.append(loss)
    return np.asarray(losses)


@pytest.fixture(scope="module")
def expected():
    """The losses on one device."""
    return train(LocalTransformer(**MODEL))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [(AxisType.Explicit, name) for name in MESHES]
    + [(AxisType.Auto, name) for name in ("data", "tensor", "sequence", "mixed")],
)
def test_a_run_on_a_mesh_has_the_losses_of_one_device(kind, name, expected):
    """The upper of the two layers is global."""
    (sizes, rules), names = MESHES[name], ("data", "sequence", "model")
    devices = jax.devices("cpu")[: np.prod(sizes)]
    if len(devices) < np.prod(sizes):
        pytest.skip(f"needs {np.prod(sizes)} devices")
    mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * 3, devices=devices)
    model = LocalTransformer(**MODEL)
    losses = train(
        model,
        place=lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
        shardings=lambda state: parameter_shardings(state, mesh, rules),
    )
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
