"""Kernels of token-wise operations for NVIDIA GPUs: the residual streams and the layer norm.

The grid is ``(blocks, 1, b)``. A program loops over a few tokens of a row of the batch. A token is a row of width e,
padded with zeros to a power of two, in the registers of all threads of the program. Gradients of parameters are summed
over a program's tokens in registers and over programs in plain JAX, so results repeat bitwise. All arithmetic is
float32. Backward kernels recompute the layer norm from its input; for the streams the forward kernel saves the sums
over e.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flax_local_attention.kernels.constants import FLOAT32
from flax_local_attention.kernels.devices import Labels, label
from flax_local_attention.kernels.fused import GradientCall
from flax_local_attention.kernels.pallas_triton import (
    MOST_PROGRAMS,
    Launch,
    Tile,
    load_row,
    load_tile,
    store_row,
    store_where,
)

# The widest row and the most streams that fit the registers of a program.
WIDEST, MOST_STREAMS = 8192, 8

# Values of a row that a thread holds. A kernel that sums over rows should keep a row within one warp: at rows of 512,
# sums across warps made the forward kernel take twice as long.
VALUES, COMBINE_VALUES = 16, 8

# The same for few tokens, where more warps are faster: at rows of 512 and 4 streams a kernel takes 3.6 us, with 16
# values 5.7.
FEW_VALUES = 4

# The most tokens that are few: their norm has a forward kernel, and their streams are mixed at once.
FEW_TOKENS = 256

# The most numbers of a connection's parameter `kernel` that a program holds at once.
LARGEST_TILE = 2**14

# The number of programs to spread tokens over, and the most tokens of a program.
PROGRAMS, MOST_TOKENS = 2048, 16


def problems_of(tokens: Any, parameters: Sequence[Any]) -> list[str]:
    """Return the reasons why these kernels cannot serve tokens ``[b, n, e]`` with parameters; empty if they can."""
    reasons = []
    if tokens.ndim != 3 or 0 in tokens.shape:
        reasons.append(f"tokens must be [b, n, e], got {tokens.shape}")
    elif tokens.shape[-1] > WIDEST or tokens.shape[0] > MOST_PROGRAMS:
        reasons.append(f"at most {WIDEST} wide and {MOST_PROGRAMS} rows, got {tokens.shape}")
    if tokens.dtype not in (jnp.bfloat16, jnp.float16, FLOAT32):
        reasons.append(f"tokens must be of a dtype up to float32, got {tokens.dtype}")
    if any(x.dtype != FLOAT32 for x in parameters):
        reasons.append("parameters must be float32")
    return reasons


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The programs that tokens ``[b, n, e]`` are spread over: `blocks` a row of the batch, with `tokens` tokens each.

    Attributes:
        b: Rows of the batch.
        n: Tokens of a row.
        e: Width of a token.
        values: Values of a token that a thread holds.
        interpret: Whether to interpret the kernels on any device; slow, for tests.
    """

    b: int
    n: int
    e: int
    values: int
    interpret: bool

    @classmethod
    def of(cls, tokens: jax.Array, values: int, interpret: bool) -> "_Plan":
        """Plan for tokens ``[b, n, e]``, with `values` of a token in each thread."""
        b, n, e = tokens.shape
        return cls(b, n, e, values, interpret)

    @property
    def size(self) -> int:
        """The padded width of a token in a program, a power of two."""
        return 1 << (self.e - 1).bit_length()

    @property
    def tokens(self) -> int:
        """The number of tokens of a program."""
        return max(1, min(MOST_TOKENS, self.b * self.n // PROGRAMS))

    @property
    def blocks(self) -> int:
        """The number of programs of a row of the batch."""
        return -(-self.n // self.tokens)

    def launch(self, name, program, arrays, results):
        """Launch a program for all blocks, on arrays ``[b, ...]``, or ``[1, ...]`` where rows share them."""
        warps = max(1, min(16, self.size // (32 * self.values)))
        launch = Launch(Tile(1, self.size, warps, 1), None, self.interpret)
        arrays = {key: x.reshape(x.shape[0], 1, 1, *x.shape[1:]) for key, x in arrays.items()}
        results = {
            str(at): jax.ShapeDtypeStruct((x.shape[0], 1, 1, *x.shape[1:]), x.dtype) for at, x in enumerate(results)
        }
        return [x.reshape(x.shape[0], *x.shape[3:]) for x in launch(name, program, arrays, results, self.blocks)]

    def each_token(self, block, read, body, start, ahead=False):
        """Fold ``sums = body(token, read(token), exists, sums)`` over the tokens of a block.

        Beyond the last token the last one is repeated with an `exists` of 0; else it is 1. With `ahead`, a token is
        read while the one before it is computed: for kernels that have registers left.
        """

        def token_at(turn):
            return jnp.minimum(block * self.tokens + turn, self.n - 1)

        def step(turn, carry):
            rows, sums = carry if ahead else (read(token_at(turn)), carry)
            following = read(token_at(turn + 1)) if ahead else None
            sums = body(token_at(turn), rows, (block * self.tokens + turn < self.n).astype(FLOAT32), sums)
            return (following, sums) if ahead else sums

        carry = lax.fori_loop(0, self.tokens, step, (read(token_at(0)), start) if ahead else start)
        return carry[1] if ahead else carry

    def rows(self, refs, names):
        """Return the function that loads a token's rows of the named arrays."""
        return lambda token: {name: load_row(refs[name], (token,), self.size) for name in names}


# Residual streams. A connection first adds the output of the last branch to the streams, R' = M + beta out. Then it
# computes the mixed streams M' and beta' from R'.


@dataclasses.dataclass(frozen=True)
class StreamKernels:
    """The kernels of `residual_streams.connect`: one pass over the streams forward, two backward.

    Attributes:
        interpret: Whether to interpret the kernels on any device; slow, for tests.
    """

    interpret: bool = False

    def problems(self, arrays: Sequence[Any]) -> list[str]:
        """Return the reasons why they cannot serve a call of these shapes and dtypes; empty if they can."""
        connection = _Connection.of(arrays)
        reasons = problems_of(
            connection.out, (*connection.beta, connection.kernel, connection.static, connection.scale)
        )
        if connection.streams > MOST_STREAMS:
            reasons.append(f"at most {MOST_STREAMS} streams, got {connection.streams}")
        return reasons

    def axes(self, arrays: Sequence[Any], results: Sequence[Any]) -> tuple[list[Labels], list[Labels]]:
        """Label rows and tokens; parameters are replicated. The saved products are ``[b, r (r + 3), n]``."""
        *tokens, saved = results
        of_arrays = [*(label(x, "b", "n") for x in arrays[:-3]), *map(label, arrays[-3:])]
        return of_arrays, [*(label(x, "b", "n") for x in tokens), label(saved, "b", None, "n")]

    def forward(self, arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """Return the input of the branch, the mixed streams, beta, and the saved products.

        With K the r + 2 rows of the parameter `kernel`, and R' the streams with the last output added, a program
        computes for each token the products ``R'[s] K[t]`` and the squares ``|R'[s]|^2``, from these the weights, and
        from the weights the sums ``sum_s alpha[s, t] R'[s]``. It saves products and squares, r (r + 3) numbers a token,
        so that the backward kernels recompute the weights without sums over e.
        """
        connection = _Connection.of(arrays)
        r, plan = connection.streams, connection.plan(self.interpret, FEW_VALUES)
        if plan.b * plan.n <= FEW_TOKENS and _weight_rows(r) * plan.size <= LARGEST_TILE:
            program = self._mix_at_once(plan, r)
        else:
            plan = connection.plan(self.interpret, VALUES)
            program = self._mix(plan, r)
        tokens = jax.ShapeDtypeStruct(connection.out.shape, connection.out.dtype)
        weights = jax.ShapeDtypeStruct(connection.out.shape[:2], FLOAT32)
        saved = jax.ShapeDtypeStruct((plan.b, r * (r + 3), plan.n), FLOAT32)
        results = [tokens] * (r + 1) + [weights] * r + [saved]
        return plan.launch("residual_streams", program, connection.named(), results)

    def _mix(self, plan, r):
        """Make the program of `forward` for many tokens: a warp has a token, and computes the products one by one."""

        def program(block, refs, first, *results):
            mixed, beta, saved = results[:r], results[r : 2 * r], results[-1]
            scales = _Scales(refs)

            def one(token, rows, exists, sums):
                streams = _written(rows, refs, token)
                products = [[] for _ in streams]
                for row in _kernel_rows(refs, plan.size):
                    for stream, x in enumerate(streams):
                        products[stream].append(jnp.sum(x * row))
                alphas = []
                for stream, x in enumerate(streams):
                    numbers = [*products[stream], jnp.sum(x * x)]
                    for at, number in enumerate(numbers):
                        saved[stream * (r + 3) + at, token] = number
                    *alpha, beta[stream][token] = _Weights(numbers, scales, stream, plan.e).values()
                    alphas.append(alpha)
                for at, target in enumerate((first, *mixed)):
                    store_row(target, (token,), _weighted(streams, [alpha[at] for alpha in alphas]))
                return sums

            plan.each_token(block, plan.rows(refs, _stream_names(r)), one, 0, ahead=True)

        return program

    def _mix_at_once(self, plan, r):
        """Make the program of `forward` for few tokens, where latency counts: a stream's products take one sum."""
        size = _weight_rows(r)

        def program(block, refs, first, *results):
            mixed, beta, saved = results[:r], results[r : 2 * r], results[-1]
            at = lax.iota(jnp.int32, size)
            kernel, scale = load_tile(refs["kernel"], size, plan.size), load_row(refs["scale"], (), size)
            static = [load_row(refs["static"], (stream,), size) for stream in range(r)]

            def one(token, rows, exists, sums):
                streams = _written(rows, refs, token)
                total = jnp.zeros((size, plan.size), FLOAT32)
                for stream, x in enumerate(streams):
                    products, square = jnp.sum(kernel * x[None], axis=1), jnp.sum(x * x)
                    store_where(saved, (pl.ds(jnp.int32(stream * (r + 3)), size), token), products, at < r + 2)
                    saved[stream * (r + 3) + r + 2, token] = square
                    weights = _tanh(products * _inverse(square, plan.e)) * scale + static[stream]
                    beta[stream][token] = jnp.sum(jnp.where(at == r + 1, weights, 0))
                    total += weights[:, None] * x[None]
                for row, target in enumerate((first, *mixed)):
                    store_row(target, (token,), jnp.sum(jnp.where((at == row)[:, None], total, 0), axis=0))
                return sums

            plan.each_token(block, plan.rows(refs, _stream_names(r)), one, 0)

        return program

    def backward(self, call: GradientCall) -> Sequence[jax.Array]:
        """Return the gradients of the wanted arguments.

        With cotangents dM[t] of the branch's input and of the mixed streams, and R' as in `forward`:

            d_alpha[s, t] = dM[t] R'[s]
            dR'[s] = sum_t alpha[s, t] dM[t] + sum_t d_product[s, t] K[t] + 2 d_square[s] R'[s]
            dM_before[s] = dR'[s]    d_beta_before[s] = dR'[s] out    d_out = sum_s beta[s] dR'[s]

        `_coefficients` computes the gradients of the weights, `_combine` the rest. The gradient of K is computed only
        if a parameter is wanted.
        """
        connection, (saved,) = _Connection.of(call.arrays), call.saved
        given = connection.named() | {f"d{at}": x for at, x in enumerate(call.cotangents)}
        r, plan = connection.streams, connection.plan(self.interpret, VALUES)
        coefficients, d_weights = self._coefficients(plan, r, given | {"saved": saved})
        with_parameters = max(call.wanted) > 2 * r
        plan = connection.plan(self.interpret, COMBINE_VALUES)
        found = self._combine(plan, r, given | {"coefficients": coefficients}, with_parameters, connection.out)
        if with_parameters:
            found[-1] = found[-1].sum((0, 1))
            found += _static_and_scale(d_weights, saved, r, plan.e)
        return [found[at] for at in call.wanted]

    def _coefficients(self, plan, r, given):
        """Compute the coefficients of each stream's gradient, ``[b, n, r (2 r + 4)]``, and the gradient of its weights.

        A stream's coefficients are its alphas, the gradients of its products, and twice the gradient of its square.
        This is a separate pass that keeps a token within one warp where it fits: it sums over e, and sums across warps
        would cost twice as much as all the rest.

        Args:
            plan: Programs of this pass.
            r: Residual streams.
            given: Arguments, cotangents ``d0``, ``d1``, ... and `saved`, by name.

        Returns:
            The coefficients, and the gradients of alphas and betas, ``[b, r (r + 2), n]``.
        """

        def program(block, refs, coefficients, d_weights):
            scales = _Scales(refs)

            def one(token, rows, exists, sums):
                streams = _written(rows, refs, token)
                for stream, x in enumerate(streams):
                    along = (jnp.sum(rows[f"d{at}"].astype(FLOAT32) * x) for at in range(r + 1))
                    d_own = [*along, refs[f"d{r + 1 + stream}"][token]]
                    saved = [refs["saved"][stream * (r + 3) + at, token] for at in range(r + 3)]
                    weights = _Weights(saved, scales, stream, plan.e)
                    d_products, d_square = weights.pull_back(d_own)
                    for at, number in enumerate([*weights.values()[:-1], *d_products, 2 * d_square]):
                        coefficients[token, stream * (2 * r + 4) + at] = number
                    for at, number in enumerate(d_own):
                        d_weights[stream * (r + 2) + at, token] = number
                return sums

            plan.each_token(block, plan.rows(refs, _stream_names(r, r + 1)), one, 0)

        sizes = (plan.n, r * (2 * r + 4)), (r * (r + 2), plan.n)
        results = [jax.ShapeDtypeStruct((plan.b, *size), FLOAT32) for size in sizes]
        return plan.launch("residual_streams_weights", program, given, results)

    def _combine(self, plan, r, given, with_parameters, out):
        """Compute the gradients of streams, beta and `out`, and each program's part of the gradient of `kernel`.

        Args:
            plan: Programs of this pass.
            r: Residual streams.
            given: Arguments, cotangents and the coefficients of `_coefficients`, by name.
            with_parameters: Whether to compute the gradient of `kernel`, ``sum d_product[s, t] R'[s]`` over streams and
                tokens.
            out: An array of the type of tokens.

        Returns:
            r arrays ``[b, n, e]``, r of ``[b, n]``, one ``[b, n, e]`` and, with parameters, ``[b, blocks, r + 2, e]``.
        """

        def program(block, refs, *results):
            d_mixed, d_beta, d_out = results[:r], results[r : 2 * r], results[2 * r]
            kernel = list(_kernel_rows(refs, plan.size))

            def one(token, rows, exists, sums):
                coefficients = [refs["coefficients"][token, at] for at in range(r * (2 * r + 4))]
                streams, out = _written(rows, refs, token), rows["out"].astype(FLOAT32)
                along = [rows[f"d{at}"].astype(FLOAT32) for at in range(r + 1)]
                total = jnp.zeros_like(out)
                for stream, x in enumerate(streams):
                    own = coefficients[stream * (2 * r + 4) : (stream + 1) * (2 * r + 4)]
                    alpha, d_products, d_square = own[: r + 1], own[r + 1 : -1], own[-1]
                    d_x = _weighted(along, alpha) + _weighted(kernel, d_products) + d_square * x
                    store_row(d_mixed[stream], (token,), d_x)
                    d_beta[stream][token] = jnp.sum(d_x * out)
                    total += refs[f"beta{stream}"][token] * d_x
                    if with_parameters:
                        sums = [row + (exists * gradient) * x for row, gradient in zip(sums, d_products, strict=True)]
                store_row(d_out, (token,), total)
                return sums

            start = [jnp.zeros((plan.size,), FLOAT32)] * (r + 2) if with_parameters else 0
            sums = plan.each_token(block, plan.rows(refs, _stream_names(r, r + 1)), one, start)
            if with_parameters:
                for at, row in enumerate(sums):
                    store_row(results[-1], (block, at), row)

        tokens = jax.ShapeDtypeStruct(out.shape, out.dtype)
        results = [tokens] * r + [jax.ShapeDtypeStruct(out.shape[:2], FLOAT32)] * r + [tokens]
        if with_parameters:
            results.append(jax.ShapeDtypeStruct((plan.b, plan.blocks, r + 2, plan.e), FLOAT32))
        return plan.launch("residual_streams_gradient", program, given, results)


def _stream_names(r, cotangents=0):
    """Return the names of the rows that a program loads: the last output, r streams, and some cotangents."""
    return ["out", *(f"mixed{stream}" for stream in range(r)), *(f"d{at}" for at in range(cotangents))]


def _static_and_scale(d_weights, saved, r, e):
    """Compute the gradients of `static` and `scale` from the gradients of the weights, ``[b, r (r + 2), n]``.

    As ``weight = tanh scale + static``, these are ``sum d_weight`` over tokens, ``[r, r + 2]``, and ``sum d_weight
    tanh`` over tokens and streams, ``[r + 2]``.
    """
    d_weights = d_weights.reshape(-1, r, r + 2, d_weights.shape[-1])
    saved = saved.reshape(-1, r, r + 3, saved.shape[-1])
    tanh = jnp.tanh(saved[:, :, :-1] * (lax.rsqrt(jnp.maximum(saved[:, :, -1:], 1e-24)) * e**0.5))
    return [d_weights.sum((0, 3)), (d_weights * tanh).sum((0, 1, 3))]


@dataclasses.dataclass(frozen=True)
class _Connection:
    """The arguments of `residual_streams.connect`, by name."""

    mixed: Sequence[Any]
    beta: Sequence[Any]
    out: Any
    kernel: Any
    static: Any
    scale: Any

    @classmethod
    def of(cls, arrays: Sequence[Any]) -> "_Connection":
        """Name the arguments, in the order of `connect`: r streams, r betas, `out`, and three parameters."""
        r = (len(arrays) - 4) // 2
        return cls(arrays[:r], arrays[r : 2 * r], *arrays[2 * r :])

    @property
    def streams(self) -> int:
        return len(self.mixed)

    def plan(self, interpret, values):
        return _Plan.of(self.out, values, interpret)

    def named(self):
        """Return the arrays by their names in programs; parameters get an axis b of size 1."""
        tokens = {"out": self.out} | {f"mixed{stream}": x for stream, x in enumerate(self.mixed)}
        shared = {"kernel": self.kernel[None], "static": self.static[None], "scale": self.scale[None]}
        return tokens | {f"beta{stream}": x for stream, x in enumerate(self.beta)} | shared


def _written(rows, refs, token):
    """Add the last output to the streams of a token, and round them to their dtype.

    Returns:
        ``R'[s] = M[s] + beta[s] out``, r arrays ``[size]`` in float32.
    """
    out, dtype = rows["out"].astype(FLOAT32), refs["out"].dtype
    count = sum(name.startswith("mixed") for name in rows)
    written = (rows[f"mixed{stream}"].astype(FLOAT32) + refs[f"beta{stream}"][token] * out for stream in range(count))
    return [row.astype(dtype).astype(FLOAT32) for row in written]


def _kernel_rows(refs, size):
    """Load the r + 2 rows of the parameter `kernel`, ``[size]``, one by one."""
    return (load_row(refs["kernel"], (at,), size) for at in range(refs["kernel"].shape[0]))


def _weighted(rows, weights):
    """Return ``sum_t weights[t] rows[t]``, the sum of rows times one number each."""
    first, *rest = (weight * row for weight, row in zip(weights, rows, strict=True))
    return sum(rest, start=first)


class _Scales:
    """The small parameters of a connection, which a program loads once."""

    def __init__(self, refs):
        r, count = refs["static"].shape
        self.scale = [refs["scale"][at] for at in range(count)]
        self.static = [[refs["static"][stream, at] for at in range(count)] for stream in range(r)]


class _Weights:
    """The weights of one stream of a token, and their gradient.

    ``weight[t] = tanh(product[t] inverse) scale[t] + static[t]`` with ``inverse = sqrt(e / square)``: the argument of
    tanh is the product of a row of `kernel` with the normalised stream.

    Attributes:
        products: Products of the stream with the rows of `kernel`, r + 2 numbers.
        square: Sum of the stream's squares.
    """

    def __init__(self, numbers, scales, stream, e):
        *self.products, self.square = numbers
        self.inverse = _inverse(self.square, e)
        self.tanh = [_tanh(self.inverse * x) for x in self.products]
        self.scale, self.static = scales.scale, scales.static[stream]

    def values(self):
        """Return the alphas, r + 1 numbers, and beta."""
        return [x * scale + static for x, scale, static in zip(self.tanh, self.scale, self.static, strict=True)]

    def pull_back(self, d_weights):
        """Return the gradients of the products and of the square.

        These are ``d_product = d_normed inverse`` and ``d_square = -inverse / (2 square) sum_t d_normed[t] product[t]``
        with ``d_normed = d_weight scale (1 - tanh^2)``. Where the square is at its floor, its gradient is 0.
        """
        factors = zip(d_weights, self.scale, self.tanh, strict=True)
        d_normed = [gradient * scale * (1 - tanh * tanh) for gradient, scale, tanh in factors]
        d_inverse = sum(gradient * x for gradient, x in zip(d_normed, self.products, strict=True))
        d_square = -0.5 * d_inverse * self.inverse / jnp.maximum(self.square, 1e-24)
        return [gradient * self.inverse for gradient in d_normed], jnp.where(self.square > 1e-24, d_square, 0.0)


def _weight_rows(r):
    """Return the number of weights of a stream, r + 2, padded to a power of two."""
    return 1 << (r + 1).bit_length()


def _inverse(square, e):
    """Return the inverse of a stream's root mean square from the sum of its squares."""
    return lax.rsqrt(jnp.maximum(square, 1e-24)) * e**0.5


def _tanh(x):
    """Return tanh(x) by one exponential."""
    return 1 - 2 / (1 + jnp.exp(2 * x))


# Layer norm


@dataclasses.dataclass(frozen=True)
class NormKernels:
    """The kernels of `norm.LayerNorm`: for its gradient, and for its value where tokens are few.

    XLA computes the value in one pass over many tokens, but in four passes over few, and each pass adds latency to a
    generated token.

    Attributes:
        dtype: Dtype of the value.
        interpret: Whether to interpret the kernels on any device; slow, for tests.
    """

    dtype: Any
    interpret: bool = False

    def problems(self, arrays: Sequence[Any]) -> list[str]:
        """Return the reasons why they cannot serve a call of these shapes and dtypes; empty if they can."""
        return problems_of(arrays[0], arrays[1:])

    def axes(self, arrays: Sequence[Any], results: Sequence[Any]) -> tuple[list[Labels], list[Labels]]:
        """Label rows and tokens; parameters are replicated."""
        x, scale, bias = arrays
        return [label(x, "b", "n"), label(scale), label(bias)], [label(y, "b", "n") for y in results]

    def forward(self, arrays: Sequence[jax.Array]) -> Sequence[jax.Array] | None:
        """Compute the value of few tokens; leave many to plain code."""
        x, scale, bias = arrays
        plan = _Plan.of(x, VALUES, self.interpret)
        if plan.b * plan.n > FEW_TOKENS:
            return None

        def program(block, refs, y):
            scale, bias = (load_row(refs[name], (), plan.size) for name in ("scale", "bias"))

            def one(token, rows, exists, sums):
                centred, inverse = _normalize(rows["x"], plan)
                store_row(y, (token,), centred * (inverse * scale) + bias)
                return sums

            plan.each_token(block, plan.rows(refs, ("x",)), one, 0)

        given = {"x": x, "scale": scale[None], "bias": bias[None]}
        return plan.launch("layer_norm", program, given, [jax.ShapeDtypeStruct(x.shape, self.dtype)])

    def backward(self, call: GradientCall) -> Sequence[jax.Array]:
        """Return the gradients of the wanted arguments.

        With ``y = normed scale + bias``, ``normed = (x - mean) inverse`` and means over e:

            d_normed = dy scale
            d_x = inverse (d_normed - mean(d_normed) - normed mean(d_normed normed))
            d_scale = sum dy normed        d_bias = sum dy

        A program recomputes mean and inverse from x, so nothing is saved. It sums `d_scale` and `d_bias` over its
        tokens in registers; plain JAX sums them over programs.
        """
        (x, scale, _), (dy,) = call.arrays, call.cotangents
        plan = _Plan.of(x, VALUES, self.interpret)

        def program(block, refs, d_x, d_scale, d_bias):
            scale = load_row(refs["scale"], (), plan.size)

            def one(token, rows, exists, sums):
                centred, inverse = _normalize(rows["x"], plan)
                dy = rows["dy"].astype(FLOAT32)
                normed, d_normed = centred * inverse, dy * scale
                along = jnp.sum(d_normed * normed) / plan.e
                store_row(d_x, (token,), inverse * (d_normed - jnp.sum(d_normed) / plan.e - normed * along))
                return sums[0] + exists * dy * normed, sums[1] + exists * dy

            zeros = jnp.zeros((plan.size,), FLOAT32)
            sums = plan.each_token(block, plan.rows(refs, ("x", "dy")), one, (zeros, zeros), ahead=True)
            store_row(d_scale, (block,), sums[0])
            store_row(d_bias, (block,), sums[1])

        sums = jax.ShapeDtypeStruct((plan.b, plan.blocks, plan.e), FLOAT32)
        given = {"x": x, "dy": dy, "scale": scale[None]}
        d_x, *sums = plan.launch(
            "layer_norm_gradient", program, given, [jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums]
        )
        gradients = [d_x, *(x.sum((0, 1)) for x in sums)]
        return [gradients[at] for at in call.wanted]


def _normalize(row, plan):
    """Return a row minus its mean, and ``1 / sqrt(variance + 1e-5)``; entries beyond e stay 0."""
    x, is_there = row.astype(FLOAT32), lax.iota(jnp.int32, plan.size) < plan.e
    centred = jnp.where(is_there, x - jnp.sum(x) / plan.e, 0)
    return centred, lax.rsqrt(jnp.sum(centred * centred) / plan.e + 1e-5)
