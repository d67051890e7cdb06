"""Ring attention: shards attend to all keys of a sequence, which travel around the devices shard by shard."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_local_attention.exchange import AxisName
from flax_local_attention.kernels import Implementation
from flax_local_attention.kernels.borders import part_gradients
from flax_local_attention.kernels.dispatch import Results
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.sharding import vary_like
from flax_local_attention.softmax import LogSum, merge_parts, turn_before
from flax_local_attention.window import Window

# Operands that travel: a shard's keys with their mask and documents.
TRAVELLING = ("k", "v", "mask", "k_segments")
DIFFERENTIABLE = ("q", "k", "v", "scale", "sink")
HOP_SEED = np.uint32(0xC2B2AE3D)  # any odd number would do


class _Ring(NamedTuple):
    """The static part of a call.

    Attributes:
        inner: Implementation of each part.
        options: Options of the call without rotary, and with the window for a shard's own keys.
        axis_name: Mesh axis, or axes, that the sequence is spread over.
    """

    inner: Implementation
    options: AttentionOptions
    axis_name: AxisName


def sees_all(window: Window, n: int) -> bool:
    """Return whether a window with a limit sees a whole sequence of n tokens, or all of it up to each query."""
    reach = n - 1
    ahead = window.causal or window.forward >= reach
    return window.backward >= reach and ahead


def attend_around_ring(
    inner: Implementation, operands: Operands, options: AttentionOptions, axis_name: AxisName
) -> tuple[jax.Array, LogSum]:
    """Attend to the keys of all shards, or all up to a query's own if causal, and merge the parts.

    A device holds the keys of two shards at a time. The gradient sends the keys around once more, together with their
    gradients. For a sequence of n tokens, time is O(n^2 d / shards) per device. Forward-mode differentiation is not
    supported.

    Args:
        inner: Implementation of each part.
        operands: Operands of a shard, without a bias.
        options: Options of the call, without xPos.
        axis_name: Mesh axis, or axes, that the sequence is spread over.

    Source: Ring Attention, arXiv 2310.01889.
    """
    n, window = operands.q.shape[-2], options.window
    if options.rotary is not None:
        positions = lax.axis_index(axis_name) * n + jnp.arange(n, dtype=jnp.int32)
        operands, options = turn_before(operands, positions, options)
    own = Window.between(n - 1, 0 if window.causal else n - 1)
    ring = _Ring(inner, dataclasses.replace(options, window=own), axis_name)
    arrays = {name: x for name, x in operands._asdict().items() if x is not None and name != "q_offset"}
    return _attend(ring, vary_like(arrays, arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, arrays):
    """Attend to a shard's own keys, and to the keys of all other shards as they arrive."""
    shards = lax.axis_size(ring.axis_name)
    arriving = _pass_on(ring, _travelling(arrays))
    result = ring.inner(Operands(**arrays), ring.options)

    def step(carry, hop):
        result, keys = carry
        following = _pass_on(ring, keys)
        return (_attend_further(ring, arrays, keys, hop, result), following), None

    (result, _), _ = lax.scan(step, (result, arriving), jnp.arange(1, shards, dtype=jnp.int32))
    return result


def _attend_forward(ring, arrays):
    result = _attend(ring, arrays)
    return result, (arrays, result)


def _attend_backward(ring, residuals, cotangents):
    """Send keys around again, together with their gradients, which are summed on the way."""
    arrays, (out, log_sum) = residuals
    shards = lax.axis_size(ring.axis_name)
    wanted = {name: arrays[name] for name in DIFFERENTIABLE if name in arrays}
    results = Results(out, log_sum, cotangents[0], cotangents[1].total, tuple(wanted))

    def differentiate(options, arrays):
        chosen = {name: arrays[name] for name in DIFFERENTIABLE if name in arrays}
        found = part_gradients(lambda chosen: ring.inner(Operands(**arrays | chosen), options), chosen, results)
        return {name: x.astype(log_sum.total.dtype) for name, x in found.items()}

    arriving = _pass_on(ring, _travelling(arrays))
    total = differentiate(ring.options, arrays)
    # The gradients of a shard's keys start at home, travel with the keys, and return after one hop per shard.
    home = {name: total.pop(name) for name in ("k", "v")}
    sums = {name: jnp.zeros_like(x) for name, x in home.items()}

    def step(carry, hop):
        total, sums, keys = carry
        options, part = _part(ring, arrays, keys, hop)

        def add():
            found = differentiate(options, part)
            return tuple({name: x + found.get(name, 0) for name, x in of.items()} for of in (total, sums))

        total, sums = lax.cond(_is_seen(ring, hop), add, lambda: (total, sums))
        return (total, _pass_on(ring, sums), _pass_on(ring, keys)), None

    (total, sums, _), _ = lax.scan(
        step, (total, _pass_on(ring, sums), arriving), jnp.arange(1, shards, dtype=jnp.int32)
    )
    gradients = total | {name: x + sums[name] for name, x in home.items()}
    return ({name: gradients[name].astype(x.dtype) if name in gradients else None for name, x in arrays.items()},)


_attend.defvjp(_attend_forward, _attend_backward)


def _travelling(arrays):
    return {name: arrays[name] for name in TRAVELLING if name in arrays}


def _pass_on(ring, tree):
    """Send arrays to the next shard, from the last one to the first."""
    shards = lax.axis_size(ring.axis_name)
    return lax.ppermute(tree, ring.axis_name, [(shard, (shard + 1) % shards) for shard in range(shards)])


def _is_seen(ring, hop):
    """Return whether this shard sees the keys that have travelled `hop` hops."""
    return jnp.logical_not(ring.options.window.causal) | (hop <= lax.axis_index(ring.axis_name))


def _part(ring, arrays, keys, hop) -> tuple[AttentionOptions, dict[str, Any]]:
    """Make options and arrays for attention to all keys of another shard, by placing its keys before the queries."""
    n = arrays["q"].shape[-2]
    arrays = {name: x for name, x in arrays.items() if name != "sink"} | keys | {"q_offset": n}
    if "dropout_seed" in arrays:
        arrays["dropout_seed"] = arrays["dropout_seed"] ^ (hop.astype(jnp.uint32) * HOP_SEED)
    return dataclasses.replace(ring.options, window=Window.between(2 * n - 1)), arrays


def _attend_further(ring, arrays, keys, hop, result):
    """Merge attention to another shard's keys into a result, if they are seen."""
    options, part = _part(ring, arrays, keys, hop)

    def further():
        return merge_parts([result, ring.inner(Operands(**part), options)])

    return lax.cond(_is_seen(ring, hop), further, lambda: result)
