"""Kernels of operations on tokens one by one, for NVIDIA GPUs: residual streams, and the gradient of a layer norm.

A program goes through a few tokens, each a row that its threads share. What it sums over tokens, the gradients of
parameters, it keeps until its end; programs' sums are added up outside, so repeats are equal bit by bit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_local_attention.kernels.pallas_triton import MOST_PROGRAMS, Launch, Tile, load_row, store_row

FLOAT32 = jnp.float32

# Wider rows do not fit the registers of a program.
WIDEST = 8192

# Values of a row that a thread holds: fewer registers, and more threads that exchange sums.
FORWARD_VALUES, GRADIENT_VALUES, NORM_VALUES = 16, 8, 16

# Programs to spread tokens over, and the most tokens that one takes.
PROGRAMS, MOST_TOKENS = 2048, 16


def problems_of(tokens: Any, parameters: Sequence[Any]) -> list[str]:
    """Return why these kernels cannot serve tokens ``[b, n, e]`` with parameters: nothing if they can."""
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
    """How tokens ``[b, n, e]`` are spread over programs."""

    b: int
    n: int
    e: int
    values: int  # of a row, that a thread holds
    interpret: bool
    partitioned: bool

    @property
    def size(self) -> int:
        """Width of a row as programs hold it, a power of two."""
        return 1 << (self.e - 1).bit_length()

    @property
    def tokens(self) -> int:
        """Tokens of a program."""
        return max(1, min(MOST_TOKENS, self.b * self.n // PROGRAMS))

    @property
    def blocks(self) -> int:
        """Programs of a row of the batch."""
        return -(-self.n // self.tokens)

    def launch(self, name, program, arrays, results):
        """Run a program for all blocks; arrays and results are ``[b, ...]``, or of size 1 where they are shared."""
        warps = max(1, min(16, self.size // (32 * self.values)))
        launch = Launch(Tile(1, self.size, warps, 1), None, self.interpret, self.partitioned)
        arrays = {key: x.reshape(x.shape[0], 1, 1, *x.shape[1:]) for key, x in arrays.items()}
        results = {str(k): jax.ShapeDtypeStruct((x.shape[0], 1, 1, *x.shape[1:]), x.dtype) for k, x in enumerate(results)}
        return [x.reshape(x.shape[0], *x.shape[3:]) for x in launch(name, program, arrays, results, self.blocks)]

    def each_token(self, block, body, start):
        """Fold ``body(token, counts, sums)`` over the tokens of a block; one that is not there is the last, uncounted."""

        def step(k, sums):
            token = block * self.tokens + k
            return body(jnp.minimum(token, self.n - 1), (token < self.n).astype(FLOAT32), sums)

        return lax.fori_loop(0, self.tokens, step, start)


# Residual streams. With streams R, R' = M + beta out what was written before, this reads M' and beta' from R'.


@dataclasses.dataclass(frozen=True)
class StreamKernels:
    """The kernel pair of `residual_streams.connect`: one pass over the streams forward, one in the gradient.

    Attributes:
        interpret: Run on any device, slowly: for tests.
    """

    interpret: bool = False

    def problems(self, arrays: Sequence[Any]) -> list[str]:
        """Return why they cannot serve a call, by its shapes and dtypes."""
        parts = _Parts.of(arrays)
        return problems_of(parts.out, (*parts.beta, parts.kernel, parts.static, parts.scale))

    def forward(self, arrays: Sequence[jax.Array], partitioned: bool) -> Sequence[jax.Array]:
        """Return what the branch reads, the mixed streams and beta, and what is saved."""
        parts = _Parts.of(arrays)
        r, plan = parts.streams, parts.plan(self.interpret, partitioned, FORWARD_VALUES)

        def program(block, refs, first, *results):
            mixed, beta, saved = results[:r], results[r : 2 * r], results[-1]

            def one(token, counts, sums):
                out = load_row(refs["out"], (token,), plan.size)
                streams = [_written(refs, s, token, out) for s in range(r)]
                products = [[] for _ in streams]
                for row in _kernel_rows(refs, plan.size):
                    for s, x in enumerate(streams):
                        products[s].append(jnp.sum(x * row))
                alphas = []
                for s, x in enumerate(streams):
                    numbers = [*products[s], jnp.sum(x * x)]
                    for k, number in enumerate(numbers):
                        saved[s * (r + 3) + k, token] = number
                    *alpha, beta[s][token] = _Weights(numbers, refs, s, plan.e).values()
                    alphas.append(alpha)
                for t, target in enumerate((first, *mixed)):
                    store_row(target, (token,), _weighted(streams, [alpha[t] for alpha in alphas]))
                return sums

            plan.each_token(block, one, 0)

        tokens = jax.ShapeDtypeStruct(parts.out.shape, parts.out.dtype)
        weights = jax.ShapeDtypeStruct(parts.out.shape[:2], FLOAT32)
        saved = jax.ShapeDtypeStruct((plan.b, r * (r + 3), plan.n), FLOAT32)
        results = [tokens] * (r + 1) + [weights] * r + [saved]
        return plan.launch("residual_streams", program, parts.named(), results)

    def backward(
        self,
        arrays: Sequence[jax.Array],
        saved: Sequence[jax.Array],
        cotangents: Sequence[jax.Array],
        partitioned: bool,
        wanted: Sequence[int],
    ) -> Sequence[jax.Array]:
        """Return the gradients of the arguments that are wanted."""
        parts = _Parts.of(arrays)
        r, plan = parts.streams, parts.plan(self.interpret, partitioned, GRADIENT_VALUES)
        with_parameters = max(wanted) > 2 * r
        given = {f"d{k}": x for k, x in enumerate(cotangents)} | {"saved": saved[0]}

        def program(block, refs, *results):
            d_mixed, d_beta, d_out, of_parameters = results[:r], results[r : 2 * r], results[2 * r], results[2 * r + 1 :]
            kernel = list(_kernel_rows(refs, plan.size))

            def one(token, counts, sums):
                out = load_row(refs["out"], (token,), plan.size)
                along = [load_row(refs[f"d{t}"], (token,), plan.size) for t in range(r + 1)]
                total = jnp.zeros_like(out)
                for s in range(r):
                    x = _written(refs, s, token, out)
                    weights = _Weights([refs["saved"][s * (r + 3) + k, token] for k in range(r + 3)], refs, s, plan.e)
                    d_weights = [*(jnp.sum(d * x) for d in along), refs[f"d{r + 1 + s}"][token]]
                    d_products, d_square = weights.pull_back(d_weights)
                    *alpha, _ = weights.values()
                    d_x = _weighted(along, alpha) + _weighted(kernel, d_products) + (2 * d_square) * x
                    store_row(d_mixed[s], (token,), d_x)
                    d_beta[s][token] = jnp.sum(d_x * out)
                    total += refs[f"beta{s}"][token] * d_x
                    if with_parameters:
                        for t, d in enumerate(d_weights):
                            of_parameters[1][s * (r + 2) + t, token] = d
                        sums = [row + (counts * d) * x for row, d in zip(sums, d_products, strict=True)]
                store_row(d_out, (token,), total)
                return sums

            sums = plan.each_token(block, one, [jnp.zeros((plan.size,), FLOAT32)] * (r + 2) if with_parameters else 0)
            if with_parameters:
                for t, row in enumerate(sums):
                    store_row(of_parameters[0], (block, t), row)

        b, tokens = plan.b, jax.ShapeDtypeStruct(parts.out.shape, parts.out.dtype)
        results = [tokens] * r + [jax.ShapeDtypeStruct(parts.out.shape[:2], FLOAT32)] * r + [tokens]
        if with_parameters:
            sizes = (plan.blocks, r + 2, plan.e), (r * (r + 2), plan.n)
            results += [jax.ShapeDtypeStruct((b, *size), FLOAT32) for size in sizes]
        found = plan.launch("residual_streams_gradient", program, parts.named() | given, results)
        if with_parameters:
            *found, kernels, d_weights = found
            found += [kernels.sum((0, 1)), *_static_and_scale(d_weights, saved[0], r, plan.e)]
        return [found[at] for at in wanted]


def _static_and_scale(d_weights, saved, r, e):
    """Gradients of `static` and `scale` from those of each token's weights, ``[b, r (r + 2), n]``."""
    d_weights = d_weights.reshape(-1, r, r + 2, d_weights.shape[-1])
    saved = saved.reshape(-1, r, r + 3, saved.shape[-1])
    products, squares = saved[:, :, :-1], saved[:, :, -1:]
    bent = jnp.tanh(products * (lax.rsqrt(jnp.maximum(squares, 1e-24)) * e**0.5))
    return d_weights.sum((0, 3)), (d_weights * bent).sum((0, 1, 3))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The arguments of `residual_streams.connect`, cut apart."""

    mixed: Sequence[Any]
    beta: Sequence[Any]
    out: Any
    kernel: Any
    static: Any
    scale: Any

    @classmethod
    def of(cls, arrays: Sequence[Any]) -> "_Parts":
        r = (len(arrays) - 4) // 2
        return cls(arrays[:r], arrays[r : 2 * r], *arrays[2 * r :])

    @property
    def streams(self) -> int:
        return len(self.mixed)

    def plan(self, interpret, partitioned, values):
        return _Plan(*self.out.shape, values, interpret, partitioned)

    def named(self):
        tokens = {"out": self.out} | {f"mixed{s}": x for s, x in enumerate(self.mixed)}
        shared = {"kernel": self.kernel[None], "static": self.static[None], "scale": self.scale[None]}
        return tokens | {f"beta{s}": x for s, x in enumerate(self.beta)} | shared


def _written(refs, s, token, out):
    """Stream s of a token after what was written last, rounded as streams are."""
    row = load_row(refs[f"mixed{s}"], (token,), out.shape[0]) + refs[f"beta{s}"][token] * out
    return row.astype(refs["out"].dtype).astype(FLOAT32)


def _kernel_rows(refs, size):
    return (load_row(refs["kernel"], (t,), size) for t in range(refs["kernel"].shape[0]))


def _weighted(rows, weights):
    first, *rest = (weight * row for weight, row in zip(weights, rows, strict=True))
    return sum(rest, start=first)


class _Weights:
    """The weights of one stream of a token, and their gradient.

    Attributes:
        products: Of the stream with the kernel, r + 2.
        square: Of the stream.
    """

    def __init__(self, numbers, refs, s, e):
        *self.products, self.square = numbers
        self.inverse = lax.rsqrt(jnp.maximum(self.square, 1e-24)) * e**0.5
        self.bent = [1 - 2 / (1 + jnp.exp(2 * self.inverse * x)) for x in self.products]  # tanh
        self.scale = [refs["scale"][t] for t in range(len(self.products))]
        self.static = [refs["static"][s, t] for t in range(len(self.products))]

    def values(self):
        """Alphas, r + 1, and beta."""
        return [x * scale + static for x, scale, static in zip(self.bent, self.scale, self.static, strict=True)]

    def pull_back(self, d_weights):
        """Gradients of the products and the square."""
        d_normed = [d * scale * (1 - x * x) for d, scale, x in zip(d_weights, self.scale, self.bent, strict=True)]
        d_inverse = sum(d * x for d, x in zip(d_normed, self.products, strict=True))
        d_square = -0.5 * d_inverse * self.inverse / jnp.maximum(self.square, 1e-24)
        return [d * self.inverse for d in d_normed], jnp.where(self.square > 1e-24, d_square, 0.0)


# Layer norm


@dataclasses.dataclass(frozen=True)
class NormKernels:
    """The kernel of the gradient of `layers.normalize_layer`; its value XLA computes in one pass by itself.

    Attributes:
        interpret: Run on any device, slowly: for tests.
    """

    interpret: bool = False

    def problems(self, arrays: Sequence[Any]) -> list[str]:
        """Return why they cannot serve a call, by its shapes and dtypes."""
        return problems_of(arrays[0], arrays[1:])

    def forward(self, arrays: Sequence[jax.Array], partitioned: bool) -> None:
        """Leave the value to plain code."""
        return None

    def backward(
        self,
        arrays: Sequence[jax.Array],
        saved: Sequence[jax.Array],
        cotangents: Sequence[jax.Array],
        partitioned: bool,
        wanted: Sequence[int],
    ) -> Sequence[jax.Array]:
        """Return the gradients of the arguments that are wanted."""
        del saved
        (x, scale, _), (dy,) = arrays, cotangents
        plan = _Plan(*x.shape, NORM_VALUES, self.interpret, partitioned)

        def program(block, refs, d_x, d_scale, d_bias):
            scale = load_row(refs["scale"], (), plan.size)
            is_there = (lax.iota(jnp.int32, plan.size) < plan.e).astype(FLOAT32)

            def one(token, counts, sums):
                x, dy = (load_row(refs[name], (token,), plan.size) for name in ("x", "dy"))
                centred = (x - jnp.sum(x) / plan.e) * is_there
                inverse = lax.rsqrt(jnp.sum(centred * centred) / plan.e + 1e-5)
                normed, d_normed = centred * inverse, dy * scale
                along = jnp.sum(d_normed * normed) / plan.e
                store_row(d_x, (token,), inverse * (d_normed - jnp.sum(d_normed) / plan.e - normed * along))
                return sums[0] + counts * dy * normed, sums[1] + counts * dy

            zeros = jnp.zeros((plan.size,), FLOAT32)
            sums = plan.each_token(block, one, (zeros, zeros))
            store_row(d_scale, (block,), sums[0])
            store_row(d_bias, (block,), sums[1])

        sums = jax.ShapeDtypeStruct((plan.b, plan.blocks, plan.e), FLOAT32)
        given = {"x": x, "dy": dy, "scale": scale[None]}
        d_x, *sums = plan.launch(
            "layer_norm_gradient", program, given, [jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums]
        )
        gradients = [d_x, *(x.sum((0, 1)) for x in sums)]
        return [gradients[at] for at in wanted]
