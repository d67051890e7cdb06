"""Scoring a split: predict each of its bytes but the first once, with the most context the model can use."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from examples.config import Config
from examples.devices import ROWS, place_like_rows, rows_everywhere
from examples.training import Batch, build_loss, read_batch
from flax_local_attention import LocalTransformer, Window


class Score(NamedTuple):
    """The result of scoring a split.

    Attributes:
      bits: bits per byte, the mean of `-log2 p(byte | context)`.
      scored: number of bytes scored.
    """

    bits: float
    scored: int


def receptive_field(config: Config) -> int | None:
    """Return the number of preceding bytes that a prediction depends on; None if only the sequence limits it.

    The windows of the layers add up: a layer sees positions that have seen the windows of the layers below.
    """
    if config.abs_pos_emb or None in config.windows:
        return None
    windows = (Window(window, causal=True, exact_windowsize=True) for window in config.layer_windows)
    return sum(window.capacity - 1 for window in windows) + 1


def describe_context(config: Config) -> str:
    """Describe the context from which each byte is predicted."""
    if limit := receptive_field(config):
        return f"each predicted from the {limit:,} bytes before it"
    return f"each predicted from the {config.seq_len // 2:,} to {config.seq_len:,} bytes before it"


def build_evaluation(model: LocalTransformer, config: Config, mesh: Mesh) -> Callable[[Any, np.ndarray], Score]:
    """Return the function `(params, data) -> Score`.

    A model with a finite receptive field reads the split from start to end and carries its decode cache along. Any
    other model reads sequences that overlap by half and is scored on the second half of each.
    """
    rows = rows_everywhere(config.batch_size, mesh)
    if receptive_field(config) is None:
        return functools.partial(score_overlapping, jax.jit(build_loss(model)), rows=rows, config=config, mesh=mesh)
    return functools.partial(score_carried, build_carried_loss(model), model, rows=rows, config=config, mesh=mesh)


def build_carried_loss(model: LocalTransformer) -> Callable:
    """Compile `(params, cache, batch) -> ((nats, predictions), cache)`; the cache is donated."""

    @functools.partial(jax.jit, donate_argnums=1)
    def loss(params: Any, cache: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch.tokens, labels=batch.labels, cache=cache, method="sum_loss")

    return loss


def score_carried(
    loss: Callable, model: LocalTransformer, params: Any, data: np.ndarray, *, rows: int, config: Config, mesh: Mesh
) -> Score:
    """Score `data` in as many parts as rows, side by side; each row starts early enough to have its full context."""
    cache = jax.jit(functools.partial(model.init_cache, rows))()
    cache = place_like_rows(cache, rows, mesh)
    parts: list[Any] = []
    for batch in cut_carried(data, rows, config.seq_len, receptive_field(config) or 0, mesh):
        part, cache = loss(params, cache, batch)
        jax.block_until_ready(parts[-1:])  # one batch is queued while another runs; more would fill the memory
        parts.append(part)
    return add_up(parts)


def score_overlapping(loss: Callable, params: Any, data: np.ndarray, *, rows: int, config: Config, mesh: Mesh) -> Score:
    """Score `data` in sequences that overlap by half."""
    parts: list[Any] = []
    for batch in cut_overlapping(data, rows, config.seq_len, mesh):
        jax.block_until_ready(parts[-1:])
        parts.append(loss(params, batch))
    return add_up(parts)


def add_up(parts: list[Any]) -> Score:
    """Add up pairs of summed nats and their counts to a score."""
    nats, counts = np.asarray(jax.device_get(parts), np.float64).T
    return Score(float(nats.sum() / counts.sum() / math.log(2)), int(counts.sum()))


def cut_carried(data: np.ndarray, rows: int, chunk: int, context: int, mesh: Mesh) -> Iterator[Batch]:
    """Yield chunks `[rows, chunk]`, consecutive in each row, in which each byte but the first is a label once.

    A row starts `context` bytes before the part on which it is scored; the labels there are ignored.
    """
    length = -(-(len(data) - 1) // rows)  # labels in a row
    part = np.arange(rows)[:, None] * length
    starts = np.maximum(part - context, 0)
    for first in range(0, length + min(context, len(data)), chunk):
        places = starts + first + np.arange(chunk)
        scored = (places >= part) & (places < part + length)
        yield read_batch(data, starts[:, 0] + first, chunk, mesh, ROWS, scored)


def cut_overlapping(data: np.ndarray, rows: int, chunk: int, mesh: Mesh) -> Iterator[Batch]:
    """Yield sequences `[rows, chunk]` that overlap by half, in which each byte but the first is a label once."""
    half = max(chunk // 2, 1)
    starts = np.arange(0, max(len(data) - 1 - chunk, 0) + half, half)
    starts = np.concatenate([starts, np.full(-len(starts) % rows, len(data))])  # empty rows fill the last batch
    for first in range(0, len(starts), rows):
        begin = starts[first : first + rows, None]
        is_new = (np.arange(chunk) >= chunk - half) | (begin == 0)
        yield read_batch(data, begin[:, 0], chunk, mesh, ROWS, is_new)
