"""The model, the optimiser, the batches and the steps of training: all that is compiled, as functions of arrays."""

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

IGNORED = -1  # LocalTransformer's label that is left out of the loss
MUON_RMS = 0.2  # of Muon's updates, AdamW's typical one, so that both learn at one rate (arXiv 2502.16982)


class TrainState(struct.PyTreeNode):
    """What a training step takes and gives. `step` counts the steps done; with the seed it also draws the data."""

    step: jax.Array
    params: Any
    opt_state: Any


class Batch(NamedTuple):
    """Tokens and the ones that follow them, both `[..., b, n]`."""

    tokens: jax.Array
    labels: jax.Array


# ---- the model


def build_model(config: Config) -> LocalTransformer:
    """Return the language model over bytes."""
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
    """Draw the parameters and start the optimiser."""
    tokens = jnp.zeros((1, config.seq_len), jnp.int32)
    params = build_model(config).init(jax.random.key(config.seed), tokens)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, build_optimiser(config).init(params))


def flops_per_token(config: Config, params: Any) -> float:
    """Count the floating-point operations that training on one token needs, of products alone.

    A product with a matrix costs 2 for each of its weights, and 4 more for its gradients; attention costs `4 d` for
    each head and pair of a query and a key that it sees, and twice that for the gradients.
    """
    weights = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_kernel(path))
    windows = (Window(window, causal=True, exact_windowsize=window is not None) for window in config.layer_windows)
    pairs = sum(window.visible_pairs(config.seq_len) for window in windows) / config.seq_len
    return 6 * weights + 12 * config.heads * config.dim_head * (pairs + config.depth * config.memory_tokens)


# ---- the optimiser


def build_optimiser(config: Config) -> optax.GradientTransformation:
    """Return AdamW, or Muon beside it, behind a global-norm clip, with the rate of `learning_rates`."""
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
    """Let the compiler spread what a transformation computes; its results lie where their arguments did.

    Muon multiplies matrices with themselves, which JAX refuses where they are spread over explicit axes of a mesh.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        places = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        mesh = next((place.mesh for place in jax.tree.leaves(places) if not place.mesh.empty), None)
        if mesh is None:
            return transformation.update(updates, state, params)
        places = jax.tree.map(lambda place: NamedSharding(mesh, place.spec), places)
        return jax.sharding.auto_axes(transformation.update, out_sharding=places)(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)


def learning_rates(config: Config) -> optax.Schedule:
    """Return the schedule: up linearly over the warm-up, down a cosine to a tenth of the peak, and then as it is."""
    decay_steps = config.decay_steps or config.steps
    peak, warmup = config.learning_rate, min(config.warmup_steps, decay_steps)
    down = optax.cosine_decay_schedule(peak, max(1, decay_steps - warmup), alpha=0.1)
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), down], [warmup])


def is_kernel(path: Any) -> bool:
    """Return whether a parameter is a matrix that multiplies activations."""
    return path[-1].key == "kernel"


def kernels(params: Any) -> Any:
    """Return which parameters decay under AdamW."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)


def muon_matrices(params: Any) -> Any:
    """Return which axes of which parameters Muon takes: the matrices of layers, but not of the head; None elsewhere."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def label(path: Any, _: Any) -> Any:
        return matrix if is_kernel(path) and path[0].key.startswith("layers") else None

    return jax.tree_util.tree_map_with_path(label, params)


# ---- steps


def build_loss(model: LocalTransformer) -> Callable[[Any, Batch], Any]:
    """Return the function `(params, batch) -> (nats, predictions)`, the sum over the predictions."""

    def loss(params: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch.tokens, labels=batch.labels, method="sum_loss")

    return loss


def build_train_steps(loss: Callable, optimiser: optax.GradientTransformation) -> Callable:
    """Return the compiled `(state, steps of microbatches [k, a, b, n], count) -> (state, mean nats of each [k])`.

    It takes the first `count` of the k steps, in one call, and computes the same however they are divided among calls.
    The given state is consumed. The nats of steps that are not taken are NaN.
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
    """Return the mean nats of all predictions and its gradient, with one microbatch in memory at a time."""
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
    """Return the sequences of `count` steps from step `first` on, `[k, a, b, n]`, with zeros for the k - count others.

    The sequences of a step are a function of the seed and its number alone, so a resumed run sees what an
    uninterrupted one sees.
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
    """Return the sequences that begin at `starts`, `[..., b]`, as `[..., b, n]`.

    Labels past the data, and those that are not `scored`, `[..., b, n]`, are `IGNORED`.
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
