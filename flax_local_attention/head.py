"""The head of a language model: logits, or the cross entropy computed in blocks of tokens."""

from dataclasses import KW_ONLY
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from flax_local_attention.fields import Dtypes, Products, linear_init
from flax_local_attention.linear import product
from flax_local_attention.operands import wide_dtype
from flax_local_attention.sharding import apart, respread, shards_of, spec_of, spread_by_compiler, vary_like

BLOCK_BYTES = 64 * 2**20
"""Bytes of float32 logits that a loss holds at once: enough to occupy an accelerator, but little of its memory.

On explicit mesh axes this is per device, on automatic ones for all devices together.
"""


class LossSum(NamedTuple):
    """A loss as a sum and the number of its terms, so that the sums of unequal batches can be added entry by entry.

    Attributes:
        total: Sum of the losses of all labels that count, ``[]`` float32.
        count: Number of labels that count, ``[]`` int32.

    Examples:
        >>> parts = LossSum(jnp.float32(6.0), jnp.int32(4)), LossSum(jnp.float32(1.0), jnp.int32(1))
        >>> jax.tree.map(lambda *x: sum(x), *parts).mean
        Array(1.4, dtype=float32)
    """

    total: jax.Array
    count: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The mean loss per label, ``[]`` float32; 0 if no label counts."""
        return self.total / jnp.maximum(self.count, 1).astype(self.total.dtype)


class Head(Dtypes, Products):
    """A linear layer without a bias from the model's width to the vocabulary, ``logits = x kernel``.

    Attributes:
        dim: Model width.
        num_tokens: Size of the vocabulary.
        kernel_init: Initialiser of the weights.
    """

    dim: int
    num_tokens: int
    _: KW_ONLY
    kernel_init: Initializer = linear_init

    def setup(self):
        """Make the kernel, ``[e, c]``."""
        self.kernel = self.param("kernel", self.kernel_init, (self.dim, self.num_tokens), self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute logits, ``[b, n, e]`` to ``[b, n, c]`` in the module's dtype."""
        x, kernel = promote_dtype(x, self.kernel, dtype=self.dtype)
        return product(x, kernel, self.precision)

    def cross_entropy(self, x: jax.Array, labels: jax.Array, counted: jax.Array) -> jax.Array:
        """Sum the cross entropy of labels with this head's kernel, see the function `cross_entropy`."""
        return cross_entropy(x, self.kernel, labels, counted, dtype=self.dtype, precision=self.precision)


def cross_entropy(
    x: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    counted: jax.Array,
    *,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    block: int | None = None,
) -> jax.Array:
    """Sum ``log sum_c exp(logit_c) - logit_label`` over the tokens that count, with ``logits = x kernel``.

    Logits are float32, not rounded to `dtype`. Only the logits of one block of tokens are in memory at a time, in
    derivatives too. The gradient computes each block's logits once.

    The rows and the sequence may be spread over a mesh, and so may the kernel's axes: no hidden state or logit moves.
    On explicit axes, each device sums the kernel's gradient over its own tokens, and devices add their sums once, at
    the end.

    Args:
        x: Hidden states, ``[b, n, e]``.
        kernel: Weights, ``[e, c]``. Their gradient is summed over blocks in float32.
        labels: Next tokens, ``[b, n]`` integers, at least 0; one beyond the vocabulary gives NaN.
        counted: Which tokens count, ``[b, n]`` bool.
        dtype: Dtype of the product's factors. None means the dtype that x and kernel promote to.
        precision: Precision of the products.
        block: Most tokens per row in a block, or per device's part of a row if rows are spread over explicit mesh
            axes. None means all tokens if their logits fit `BLOCK_BYTES` or are no wider than x, else as many as fit.
            A block has tokens from every row, spaced evenly along the row.

    Returns:
        The sum, ``[]`` float32.
    """
    dtype = canonicalize_dtype(x, kernel, dtype=dtype)
    (b, n, e), c = x.shape, kernel.shape[1]
    rows, columns, _ = shards_of(x)
    block = _choose_block((b // rows, n // columns, e), c // shards_of(kernel)[1]) if block is None else block
    return _cross_entropy(_Call(dtype, precision, block, (rows, columns)), x.astype(dtype), kernel, labels, counted)


class _Call(NamedTuple):
    """The static part of a call of `cross_entropy`."""

    dtype: Any
    precision: PrecisionLike
    block: int
    shards: tuple[int, int]

    def of_each_device(self, fn, *tokens):
        """Compute a sum over tokens, from arrays ``[b, n, ...]``, separately for each device's tokens.

        The result has two leading axes, the shards of rows and of the sequence; on one device it has neither.
        """
        if self.shards == (1, 1):
            return fn(*tokens)
        rows, columns = self.shards
        parts = (rearrange(x, "(r b) (s n) ... -> r s b n ...", r=rows, s=columns) for x in tokens)
        return jax.vmap(jax.vmap(fn))(*parts)

    def add_devices(self, x):
        """Add the sums of all devices, see `of_each_device`."""
        return x if self.shards == (1, 1) else x.sum((0, 1))


def _choose_block(shape, c):
    """Choose the tokens per row in a block: all if their logits fit or are no wider than x, else a part.

    Logits are float32, ``4 b block c`` bytes. If a number of blocks less than twice the fewest divides n, blocks are
    equal: padded rows would not be spread evenly over automatic mesh axes.
    """
    b, n, e = shape
    if not (isinstance(b, int) and isinstance(n, int)):  # symbolic, in a program to export
        return n
    fitting = BLOCK_BYTES // max(4 * b * c, 1)
    if n <= fitting or c <= e:
        return n
    fewest = -(-n // max(fitting, 1))
    blocks = next((count for count in range(fewest, 2 * fewest) if n % count == 0), fewest)
    return -(-n // blocks)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cross_entropy(call, x, kernel, labels, counted):
    """Sum the cross entropy over blocks, ``[]``; `call` is static, and x has its dtype."""

    def sum_all(x, kernel, *labels):
        def sum_block(x, labels, counted):
            return _losses(call, x, kernel, labels, counted)[0], ()

        return call.add_devices(_sum_over_blocks(sum_block, call, (x, *labels))[0])

    return spread_by_compiler(sum_all, (x, _factor(call, x, kernel), labels, counted), PartitionSpec)


def _factor(call, x, kernel):
    """Return the kernel in the product's dtype, gathered over the devices that tokens are spread over.

    The loop over blocks would gather it for each block.
    """
    return respread(kernel.astype(call.dtype), apart(spec_of(kernel), spec_of(x)))


@partial(_cross_entropy.defjvp, symbolic_zeros=True)
def _cross_entropy_jvp(call, primals, tangents):
    """Differentiate the loss by its gradient, which is computed along with it from the same logits.

    ``errors = softmax(logits) - one_hot(labels)``, ``d_x = errors kernel^T``, and ``d_kernel = sum x^T errors`` over
    tokens. The tangent is the inner product of these with the tangents of x and kernel. It is linear in these tangents,
    so its transpose gives the gradient.

    Differentiating the steps of `_cross_entropy` instead would store all logits or compute them twice, and the
    transposed products would have float32 factors.
    """
    x, kernel, labels, counted = primals
    wide = wide_dtype(call.dtype)
    product = partial(jnp.einsum, precision=call.precision, preferred_element_type=wide)

    # Small errors would underflow in float16 before the caller scales the loss, so they are enlarged here.
    is_short = call.dtype == jnp.float16
    larger = 2.0**15 if is_short else 1.0

    def differentiate(x, kernel, *labels):
        def differentiate_block(x, labels, counted):
            total, errors = _losses(call, x, kernel, labels, counted)
            errors = (errors * larger).astype(call.dtype)
            kernel_gradient = call.of_each_device(partial(product, "bne,bnc->ec"), x, errors) / larger
            x_gradient = product("bnc,ec->bne", errors, kernel) / larger
            return (total, kernel_gradient), x_gradient if is_short else x_gradient.astype(x.dtype)

        sums, x_gradient = _sum_over_blocks(differentiate_block, call, (x, *labels))
        return [call.add_devices(x) for x in sums], x_gradient

    (total, kernel_gradient), x_gradient = spread_by_compiler(
        differentiate,
        (x, _factor(call, x, kernel), labels, counted),
        lambda: ([PartitionSpec(), spec_of(kernel)], spec_of(x)),
    )
    tangent = jnp.zeros_like(total)
    for gradient, direction in zip((x_gradient, kernel_gradient), tangents[:2], strict=True):
        if not isinstance(direction, SymbolicZero):  # a frozen kernel needs no gradient
            tangent += (gradient.astype(wide) * direction.astype(wide)).sum().astype(total.dtype)
    return total, tangent


def _losses(call, x, kernel, labels, counted):
    """Sum the cross entropy, and compute its gradient by the logits, softmax minus one-hot labels, ``[b, n, c]``.

    Logits are float32. Tokens that do not count contribute 0 to both.

    Args:
        call: Static part of the call.
        x: Hidden states of a block, ``[b, n, e]``.
        kernel: Weights in the product's dtype, ``[e, c]``.
        labels: ``[b, n]``, at least 0.
        counted: ``[b, n]`` bool.
    """
    wide = wide_dtype(call.dtype)
    logits = jnp.einsum("bne,ec->bnc", x, kernel, precision=call.precision, preferred_element_type=wide)
    logits, labels = logits.astype(jnp.float32), labels[..., None]
    largest = lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    losses = jnp.log(total) + largest - jnp.take_along_axis(logits, labels, -1)
    errors = weights / total - (labels == jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None]).astype(
        logits.dtype
    )
    counted = counted[..., None]
    return call.of_each_device(jnp.sum, jnp.where(counted, losses, 0)), jnp.where(counted, errors, 0)


def _sum_over_blocks(function, call, tokens):
    """Sum a function over blocks of tokens.

    Token t of a row, or of a device's part of it, is in block ``t % blocks``, so every block is spread over all devices
    that the sequence is spread over. Parts are padded with zeros to a multiple of the number of blocks.

    Args:
        function: Function from a block's arrays to a pair: arrays to sum, and arrays ``[b, n, ...]`` to join.
        call: Static part of the call.
        tokens: Arrays ``[b, n, ...]``.

    Returns:
        The sums and the joined arrays, ``[b, n, ...]``.
    """
    shards = call.shards[1]
    n = tokens[0].shape[1] // shards
    if call.block >= n:
        return function(*tokens)
    count = -(-n // call.block)

    def cut(x):
        x = rearrange(x, "b (s n) ... -> b s n ...", s=shards)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -n % count)] + [(0, 0)] * (x.ndim - 3))
        return rearrange(x, "b s (n blocks) ... -> blocks b (s n) ...", blocks=count)

    def join(x):
        x = rearrange(x, "blocks b (s n) ... -> b s (n blocks) ...", s=shards)
        return rearrange(x[:, :, :n], "b s n ... -> b (s n) ...")

    blocks = [cut(x) for x in tokens]
    function = jax.checkpoint(function, prevent_cse=False)  # for derivatives of the gradient

    def add_block(sums, tokens):
        more, rows = function(*tokens)
        return jax.tree.map(jnp.add, sums, more), rows

    shapes, _ = jax.eval_shape(function, *(x[0] for x in blocks))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, rows = lax.scan(add_block, vary_like(zeros, (tokens, shapes)), blocks)
    return sums, jax.tree.map(join, rows)
