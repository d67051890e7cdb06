"""The model, the optimiser, the training steps and the batches, as functions of arrays.

A run uses them in this order: `initial_state` draws the parameters, `build_train_steps` compiles the steps,
`draw_steps` reads their batches. `examples.trainer` adds checkpoints, validation and logging.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples.config import Config
from examples.devices import ROWS_AND_TOKENS, place_rows
from flax_local_attention import LocalTransformer, Window

IGNORED = -1  # label of a token that does not count in the loss
MUON_RMS = 0.2  # RMS of Muon's updates, typical of AdamW's, so one learning rate serves both (arXiv 2502.16982)


class TrainState(struct.PyTreeNode):
    """The state that a training step updates.

    Attributes:
      step: number of steps done; with the seed, it determines the next step's batch.
      params: parameters of the model.
      opt_state: state of the optimiser.
    """

    step: jax.Array
    params: Any
    opt_state: Any


class Batch(NamedTuple):
    """Tokens and their labels, the next tokens, both `[..., b, n]`."""

    tokens: jax.Array
    labels: jax.Array


# ---- the model


def build_model(config: Config) -> LocalTransformer:
    """Return the byte-level language model of a configuration."""
    return LocalTransformer(
        num_tokens=256,
        max_seq_len=config.seq_len,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        kv_heads=config.kv_heads,
        dim_head=config.dim_head,
        causal=True,
        local_attn_window_size=config.layer_windows,
        ff_mult=config.ff_mult,
        use_abs_pos_emb=config.abs_pos_emb,
        num_residual_streams=config.residual_streams,
        qk_rmsnorm=config.qk_norm,
        gate_values_per_head=config.gates,
        attention_sinks=config.sinks,
        memory_tokens=config.memory_tokens,
        ignore_index=IGNORED,
        dtype=jnp.dtype(config.dtype),
    )


def initial_state(config: Config) -> TrainState:
    """Draw the parameters from the seed and initialise the optimiser."""
    tokens = jnp.zeros((1, config.seq_len), jnp.int32)
    params = build_model(config).init(jax.random.key(config.seed), tokens)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, build_optimiser(config).init(params))


def flops_per_token(config: Config, params: Any) -> float:
    """Count the floating-point operations of the matrix products that train on one token.

    A dense layer costs 2 per weight forward and 4 backward. Attention costs `4 d` per head and visible pair of query
    and key forward, and twice that backward.
    """
    weights = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_kernel(path))
    windows = (Window(window, causal=True, exact_windowsize=window is not None) for window in config.layer_windows)
    pairs = sum(window.visible_pairs(config.seq_len) for window in windows) / config.seq_len
    return 6 * weights + 12 * config.heads * config.dim_head * (pairs + config.depth * config.memory_tokens)


# ---- the optimiser


def build_optimiser(config: Config) -> optax.GradientTransformation:
    """Return global-norm clipping followed by AdamW, or by Muon with AdamW for what is not a layer's matrix."""
    rates = learning_rates(config)
    if config.optimizer == "muon":
        muon = optax.contrib.muon(
            rates,
            weight_decay=config.weight_decay,
            adam_b2=0.95,
            muon_weight_dimension_numbers=muon_matrices,
            consistent_rms=MUON_RMS,
        )
        update = spread_by_compiler(muon)
    else:
        update = optax.adamw(rates, b2=0.95, weight_decay=config.weight_decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def spread_by_compiler(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let the compiler choose the shardings inside a transformation; results keep the shardings of its arguments.

    Muon multiplies a matrix by its own transpose, which JAX refuses when the matrix is sharded over explicit mesh axes.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        mesh = next((sharding.mesh for sharding in jax.tree.leaves(shardings) if not sharding.mesh.empty), None)
        if mesh is None:
            return transformation.update(updates, state, params)
        shardings = jax.tree.map(lambda sharding: NamedSharding(mesh, sharding.spec), shardings)
        return jax.sharding.auto_axes(transformation.update, out_sharding=shardings)(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)


def learning_rates(config: Config) -> optax.Schedule:
    """Return the schedule: a linear warm-up, a cosine decay to a tenth of the peak, then constant."""
    decay_steps = config.decay_steps or config.steps
    peak, warmup = config.learning_rate, min(config.warmup_steps, decay_steps)
    down = optax.cosine_decay_schedule(peak, max(1, decay_steps - warmup), alpha=0.1)
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), down], [warmup])


def is_kernel(path: Any) -> bool:
    """Return whether a parameter is a matrix that multiplies activations."""
    return path[-1].key == "kernel"


def kernels(params: Any) -> Any:
    """Return True for the parameters to which AdamW applies weight decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)


def muon_matrices(params: Any) -> Any:
    """Return the axes of the layers' matrices, which Muon updates; None for every other parameter."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def label(path: Any, _: Any) -> Any:
        return matrix if is_kernel(path) and path[0].key.startswith("layers") else None

    return jax.tree_util.tree_map_with_path(label, params)


# ---- steps


def build_loss(model: LocalTransformer) -> Callable[[Any, Batch], Any]:
    """Return the function `(params, batch) -> (nats, predictions)`: the summed loss and the count of its terms."""

    def loss(params: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch.tokens, labels=batch.labels, method="sum_loss")

    return loss


def build_train_steps(loss: Callable, optimiser: optax.GradientTransformation) -> Callable:
    """Compile `(state, steps, count) -> (state, nats)`, which takes several training steps in one call.

    `steps` holds the microbatches of k steps, `[k, a, b, n]`, of which the first `count` are taken. The state is
    donated. `nats`, `[k]`, is the mean loss of each step, NaN for steps not taken. The result does not depend on how
    steps are divided among calls.
    """

    def train_step(state: TrainState, microbatches: Batch) -> tuple[TrainState, jax.Array]:
        nats, gradient = accumulate(loss, state.params, microbatches)
        updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), nats

    @functools.partial(jax.jit, donate_argnums=0)
    def train_steps(state: TrainState, steps: Batch, count: jax.Array) -> tuple[TrainState, jax.Array]:
        def take(index: jax.Array, carry: Any) -> Any:
            state, losses = carry
            state, nats = train_step(state, jax.tree.map(lambda rows: rows[index], steps))
            return state, losses.at[index].set(nats)

        return lax.fori_loop(0, count, take, (state, jnp.full(len(steps.tokens), jnp.nan)))

    return train_steps


def accumulate(loss: Callable, params: Any, microbatches: Batch) -> tuple[jax.Array, Any]:
    """Return the mean loss in nats over all microbatches and its gradient, one microbatch in memory at a time."""
    differentiate = jax.value_and_grad(loss, has_aux=True)

    def add(sums: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, differentiate(params, batch)), None

    shapes = jax.eval_shape(differentiate, params, jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    ((nats, predictions), gradient), _ = lax.scan(add, zeros, microbatches)
    predictions = predictions.astype(jnp.float32)
    return nats / predictions, jax.tree.map(lambda leaf: leaf / predictions, gradient)


# ---- batches


def draw_steps(data: np.ndarray, config: Config, first: int, count: int, mesh: Mesh) -> Batch:
    """Return the batches of the steps `first` to `first + count - 1`, `[k, a, b, n]` with k = `steps_per_call`.

    The other k - count steps are padding and never taken. A step's sequences depend only on the seed and the step's
    number, so a resumed run reads what an uninterrupted one reads.
    """
    shape = config.accumulate, config.batch_size
    starts = np.zeros((config.steps_per_call, *shape), np.int64)
    for index in range(count):
        generator = np.random.default_rng([config.seed, first + index])
        starts[index] = generator.integers(0, len(data) - config.seq_len, shape)
    return read_batch(data, starts, config.seq_len, mesh)


def read_batch(
    data: np.ndarray,
    starts: np.ndarray,
    seq_len: int,
    mesh: Mesh,
    spec: PartitionSpec = ROWS_AND_TOKENS,
    scored: np.ndarray | None = None,
) -> Batch:
    """Read the sequences that begin at `starts`.

    Args:
      data: the bytes, `[bytes]`.
      starts: index of each sequence's first byte, `[..., b]`.
      seq_len: tokens in a sequence, n.
      mesh: devices that hold the batch.
      spec: sharding of the last two axes.
      scored: which labels count, `[..., b, n]` bool; None: all.

    Returns:
      The batch, `[..., b, n]`. Labels past the end of the data, and those not `scored`, are `IGNORED`.
    """

    def read(offset: int, index: tuple[slice, ...]) -> np.ndarray:
        places = starts[index[:-1]][..., None] + np.arange(seq_len)[index[-1]] + offset
        return np.where(places < len(data), data[np.minimum(places, len(data) - 1)].astype(np.int32), IGNORED)

    def read_labels(index: tuple[slice, ...]) -> np.ndarray:
        return read(1, index) if scored is None else np.where(scored[index], read(1, index), IGNORED)

    shape = *starts.shape, seq_len
    return Batch(*(place_rows(part, shape, mesh, spec) for part in (functools.partial(read, 0), read_labels)))


def to_bits(nats: Any) -> Any:
    """Convert nats to bits."""
    return nats / math.log(2)
