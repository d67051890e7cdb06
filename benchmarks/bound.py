"""A lower bound on a training step's time: its FLOPs and the bytes it must move, at the machine's rates.

Products are limited by FLOPs and elementwise stages by bytes. Their kernels run one after another, so times add up.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import jaxprs_in_params

from benchmarks.training import NUM_TOKENS, Setting
from flax_local_attention import Window

HEADS, DIM_HEAD, FF_MULT = 8, 64, 4
BLOCK = 64  # rows and columns of the tiles that the fused kernels visit
BACKWARD_PRODUCTS = 2.5  # attention has five products backward for two forward


class Bound(NamedTuple):
    """The work that a step cannot avoid.

    Attributes:
        product_flops: FLOPs of products outside attention, forward and backward.
        attention_flops: FLOPs of attention in the blocks that its window visits, forward and backward.
        state_bytes: Bytes of parameters, gradients and Adam's state.
        activation_bytes: Bytes of the elementwise stages' inputs and results.
    """

    product_flops: float
    attention_flops: float
    state_bytes: float
    activation_bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the least time of a step at these rates."""
        flops, moved = self.product_flops + self.attention_flops, self.state_bytes + self.activation_bytes
        return flops / flops_per_second + moved / bytes_per_second


def bound_of(setting: Setting, jaxpr: Any, parameters: int, itemsize: int) -> Bound:
    """Count the work of a step.

    Args:
        setting: Model and batches.
        jaxpr: Closed jaxpr of the whole step.
        parameters: Number of parameters, in float32.
        itemsize: Bytes of an activation.
    """
    attention = attention_flops(setting)
    return Bound(product_flops(jaxpr.jaxpr), attention, state_bytes(parameters), activation_bytes(setting, itemsize))


def product_flops(jaxpr: Any) -> float:
    """Count the FLOPs of all products outside attention; a loop counts by its length, a kernel by its grid."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if "LocalAttention" in str(eqn.source_info.name_stack):
            continue
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif eqn.primitive.name == "cond":
            total += max(product_flops(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else _grid_of(eqn)
            total += times * sum(map(product_flops, jaxprs_in_params(eqn.params)))
    return total


def _grid_of(eqn):
    return math.prod(eqn.params["grid_mapping"].grid) if eqn.primitive.name == "pallas_call" else 1


def attention_flops(setting: Setting) -> float:
    """Count the FLOPs of attention: 4 d per pair and head forward, 2.5 times as many backward."""
    window = Window(setting.window_size, causal=True, exact_windowsize=True)
    rows = np.arange(0, setting.tokens, BLOCK)
    start = np.maximum(window.start(rows), 0) // BLOCK
    stop = -(-np.minimum(window.stop(rows + BLOCK - 1), setting.tokens) // BLOCK)
    pairs = int((stop - start).sum()) * BLOCK**2
    heads = setting.batch_size * setting.depth * HEADS
    return (1 + BACKWARD_PRODUCTS) * heads * pairs * 4 * DIM_HEAD


def state_bytes(parameters: int) -> float:
    """Count the bytes that a step moves for its parameters, in float32.

    Parameters are read forward and backward; gradients are written, and read for their norm; Adam reads parameters,
    gradients and two moments, and writes all but the gradients.
    """
    return 4 * parameters * (2 + 2 + 4 + 3)


def activation_bytes(setting: Setting, itemsize: int) -> float:
    """Count the bytes that elementwise stages read and write, each input and each result once; products not included.

    A branch of r streams reads them and writes its normed input, then reads them and its output, and writes them:
    3 r + 2 widths forward. Backward it reads the streams' gradient and writes the output's, then reads that gradient,
    the streams, the output and the gradient of its input, and writes the streams': 4 r + 3 widths. GEGLU moves 3
    hidden widths forward and 5 backward. The embedding writes one width, from which all streams start; the last norm
    reads the streams and writes one width; the same backward. The loss reads logits twice and writes their gradient,
    in float32.
    """
    r, e, hidden = setting.streams, setting.dim, int(setting.dim * FF_MULT * 2 / 3)
    layer = 2 * ((3 * r + 2) + (4 * r + 3)) * e + (3 + 5) * hidden
    ends = 2 * (1 + r + 1) * e
    values = setting.depth * layer + ends
    return setting.batch_size * setting.tokens * (values * itemsize + 3 * 4 * NUM_TOKENS)
