"""Scoring a split: every byte of it but the first, once, each given as much of what comes before as can be had."""

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
    """How well a split is predicted.

    Attributes:
      bits: per byte, the mean of `-log2 p(byte | context)`.
      scored: bytes that it is the mean of.
    """

    bits: float
    scored: int


def reach(config: Config) -> int | None:
    """Return how many bytes before a byte its prediction depends on; None if there is no limit but the sequence.

    A layer sees as far as its window, and what it sees has seen as far as the windows of the layers below.
    """
    if config.abs_pos_emb or None in config.windows:
        return None
    windows = (Window(window, causal=True, exact_windowsize=True) for window in config.layer_windows)
    return sum(window.capacity - 1 for window in windows) + 1


def describe_context(config: Config) -> str:
    """Return in words what each byte is predicted from."""
    if limit := reach(config):
        return f"each byte given all that it can see, the {limit:,} before it"
    return f"each byte given the {config.seq_len // 2:,} to {config.seq_len:,} before it"


def build_evaluation(model: LocalTransformer, config: Config, mesh: Mesh) -> Callable[[Any, np.ndarray], Score]:
    """Return the function `(params, data) -> Score`.

    A model that sees a limited number of bytes reads the split from end to end, with its decode cache carried along.
    Others read overlapping sequences and are scored on the second half of each.
    """
    rows = rows_everywhere(config.batch_size, mesh)
    if reach(config) is None:
        return functools.partial(score_overlapping, jax.jit(build_loss(model)), rows=rows, config=config, mesh=mesh)
    return functools.partial(score_carried, build_carried_loss(model), model, rows=rows, config=config, mesh=mesh)


def build_carried_loss(model: LocalTransformer) -> Callable:
    """Return the compiled `(params, cache, batch) -> ((nats, predictions), cache)`; the given cache is consumed."""

    @functools.partial(jax.jit, donate_argnums=1)
    def loss(params: Any, cache: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch.tokens, labels=batch.labels, cache=cache, method="sum_loss")

    return loss


def score_carried(
    loss: Callable, model: LocalTransformer, params: Any, data: np.ndarray, *, rows: int, config: Config, mesh: Mesh
) -> Score:
    """Read `data` in as many parts as rows, side by side, each from far enough before it to have its full context."""
    cache = jax.jit(functools.partial(model.init_cache, rows))()
    cache = place_like_rows(cache, rows, mesh)
    parts: list[Any] = []
    for batch in cut_carried(data, rows, config.seq_len, reach(config) or 0, mesh):
        part, cache = loss(params, cache, batch)
        jax.block_until_ready(parts[-1:])  # so that the device has work, and batches do not pile up
        parts.append(part)
    return add_up(parts)


def score_overlapping(loss: Callable, params: Any, data: np.ndarray, *, rows: int, config: Config, mesh: Mesh) -> Score:
    """Read `data` in sequences that begin half a sequence apart."""
    parts: list[Any] = []
    for batch in cut_overlapping(data, rows, config.seq_len, mesh):
        jax.block_until_ready(parts[-1:])
        parts.append(loss(params, batch))
    return add_up(parts)


def add_up(parts: list[Any]) -> Score:
    """Return the score of sums of nats and their counts."""
    nats, counts = np.asarray(jax.device_get(parts), np.float64).T
    return Score(float(nats.sum() / counts.sum() / math.log(2)), int(counts.sum()))


def cut_carried(data: np.ndarray, rows: int, chunk: int, context: int, mesh: Mesh) -> Iterator[Batch]:
    """Yield chunks `[rows, chunk]` that follow each other in each row; each byte but the first is a label once.

    A row begins `context` bytes before the part that it is scored on, and what it reads there are no labels.
    """
    length = -(-(len(data) - 1) // rows)  # labels in a row
    part = np.arange(rows)[:, None] * length
    starts = np.maximum(part - context, 0)
    for first in range(0, length + min(context, len(data)), chunk):
        places = starts + first + np.arange(chunk)
        scored = (places >= part) & (places < part + length)
        yield read_batch(data, starts[:, 0] + first, chunk, mesh, ROWS, scored)


def cut_overlapping(data: np.ndarray, rows: int, chunk: int, mesh: Mesh) -> Iterator[Batch]:
    """Yield sequences `[rows, chunk]`, each half new; each byte but the first is a label once."""
    half = max(chunk // 2, 1)
    starts = np.arange(0, max(len(data) - 1 - chunk, 0) + half, half)
    starts = np.concatenate([starts, np.full(-len(starts) % rows, len(data))])  # rows of nothing fill the last batch
    for first in range(0, len(starts), rows):
        begin = starts[first : first + rows, None]
        is_new = (np.arange(chunk) >= chunk - half) | (begin == 0)
        yield read_batch(data, begin[:, 0], chunk, mesh, ROWS, is_new)
