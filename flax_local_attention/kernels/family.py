"""What the families of fused kernels share: the calls that they serve, and the work around the kernels.

A family has three kernels, and Triton has a fourth for the gradient of a bias. The forward kernel writes O, largest and
total. In a gradient the dQ kernel runs first, because the dK and dV kernel needs the delta and the log-sum-exp of each
query. Only O, largest and total are kept for the gradient: its kernels recompute the scores and probabilities.

Plain JAX does the rest: it rotates and normalises q and k, pads heads (`prepare`, which JAX differentiates), and
computes the gradient of sinks.
"""

import dataclasses
from collections.abc import Container, Mapping
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp

from flax_local_attention.checks import check_flag, check_kind
from flax_local_attention.kernels.constants import FLOAT32, LEAST, LN_2, LOG2_E
from flax_local_attention.kernels.contract import Unsupported
from flax_local_attention.kernels.dispatch import Results, attend_by
from flax_local_attention.kernels.primitives import Target
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum, hide_masked, inverse_of, prepare_keys, query_positions
from flax_local_attention.window import Window

# Names of the arrays and gradients that may lie in memory as ``[b, n, h, d]``.
TOKEN_MAJOR = frozenset({"q", "k", "v", "o", "do", "dq", "dk", "dv"})


class KernelCall(Protocol):
    """The static part of a call of a family's kernels, and their launches; arrays go by name.

    Only a family that serves a bias needs `dbias`.
    """

    def arrays(self, operands: Operands) -> dict[str, jax.Array]:
        """Return the arrays that the kernels need beside q, k and v."""
        ...

    def forward(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the output, ``[b, h, g, n, d]``, and the largest score and total of each query's log-sum-exp."""
        ...

    def dq(self, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the gradient of q, and the numbers of each query that `dkv` needs, delta among them."""
        ...

    def dkv(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the gradients of k and v, summed over the query heads that share them."""
        ...

    def dbias(self, arrays: Mapping[str, jax.Array], bias: jax.Array, operands: Operands) -> jax.Array:
        """Return the gradient of a bias, in the bias's own shape."""
        ...


class KernelFamily:
    """A family of fused kernels, such as `Triton`: a subclass says which calls it serves, and launches the kernels."""

    NAME: ClassVar[str]
    NEEDS: ClassVar[str]  # the device, for error messages
    DTYPES: ClassVar[tuple]  # dtypes of q, k and v
    PLACES: ClassVar[str] = "on one device, a mesh or inside shard_map"  # for error messages
    HIDES_MASKED: ClassVar[bool] = True  # whether the kernels hide masked tokens themselves, even NaN
    # The largest soft cap. Kernels on GPUs compute tanh within 2e-7: a larger cap makes that more than a rounding.
    LARGEST_CAP: ClassVar[float] = 1e3
    IS_STABLE: ClassVar[bool] = False  # whether JAX promises to run them in programs exported by an older version
    TILES: ClassVar[type]  # type of the field `tiles`
    interpret: bool

    def __post_init__(self):
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]  # a subclass is a dataclass
        for field in fields:
            value = getattr(self, field.name)
            if field.name != "tiles":
                check_flag(field.name, value)
            elif value is not None:
                check_kind("tiles", value, self.TILES, "leave them out for the best that are known")

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`; the plain path computes derivatives beyond the gradient."""
        self._check(operands, options)
        return attend_by(self, operands, options)

    def _check(self, operands, options):
        """Raise unless these kernels can serve a call on the device that they need."""
        if reasons := self.problems(operands, options):
            raise Unsupported(
                f"`implementation` must serve the call, got {self.NAME} kernels, which cannot: {'; '.join(reasons)}; "
                "leave it out."
            )

    def choose(self, operands: Operands, options: AttentionOptions, target: Target) -> Self:
        """Return these kernels, as every `Chooser`; raise if they cannot serve a call on the target."""
        self._check(operands, options)
        problem = None if self.interpret else self.problem_of(target)
        if target.partition == "unknown":
            problem = "arrays that are spread over a mesh in a way that is unknown when the program is lowered"
        if problem is not None:
            raise Unsupported(
                f"`implementation` by {self.NAME} kernels needs {self.NEEDS}, {self.PLACES}, got {problem}; "
                f"leave it out, or use {type(self).__name__}(interpret=True) to try them."
            )
        return self

    def problem_of(self, target: Target) -> str | None:
        """Return why these kernels cannot run on a target; None if they can."""
        raise NotImplementedError

    def problems(self, operands: Operands, options: AttentionOptions) -> list[str]:
        """Return the reasons why these kernels cannot serve a call of these shapes and options; empty if they can."""
        q = operands.q
        if not all(isinstance(size, int) for x in operands[:3] for size in x.shape):
            return [f"sizes must be known, got {q.shape} and {operands.k.shape}"]
        reasons = []
        if type(options.window) is not Window:
            reasons.append(f"`window` must be a Window, not a subclass, got {type(options.window).__name__}")
        if options.rotary is not None and options.rotary.use_xpos:
            reasons.append("they do not serve xPos, whose scale is computed anew in every block")
        if q.dtype not in self.DTYPES or {q.dtype} != {operands.k.dtype, operands.v.dtype}:
            names = " or ".join(jnp.dtype(dtype).name for dtype in self.DTYPES)
            reasons.append(f"q, k and v must be of one dtype, {names}, got {q.dtype}, {operands.k.dtype}")
        if operands.scale is not None or (options.scale is not None and options.scale <= 0):
            reasons.append("`scale` must be a positive number, not an array")
        for name in ("mask", "q_mask", "q_segments", "k_segments"):
            x = getattr(operands, name)
            if x is not None and x.shape[2] > 1:
                reasons.append(f"`{name}` must be the same for query heads that share a head of keys")
        if options.logits_soft_cap is not None and options.logits_soft_cap > self.LARGEST_CAP:
            reasons.append(f"`logits_soft_cap` must be at most {self.LARGEST_CAP:g}, got {options.logits_soft_cap}")
        if operands.q_segments is not None and operands.q_segments.dtype.itemsize > 4:
            reasons.append(f"`segment_ids` must be of at most 32 bits, got {operands.q_segments.dtype}")
        return reasons + self.own_problems(operands, options)

    def own_problems(self, operands: Operands, options: AttentionOptions) -> list[str]:
        """Return the further reasons why this family cannot serve a call; empty if it can."""
        raise NotImplementedError

    def by_tokens(self) -> Self:
        """Return these kernels for arrays that lie in memory as ``[b, n, h, d]``, if they can read that layout."""
        return self

    def allows_float32(self, options: AttentionOptions) -> bool:
        """Return whether the `precision` of a call allows the products that these kernels compute in float32."""
        return True

    def widths(self, operands: Operands) -> tuple[int, int]:
        """Return the padded head sizes in the kernels: of queries and keys, and of values."""
        raise NotImplementedError

    def create_call(self, operands: Operands, options: AttentionOptions) -> KernelCall:
        """Make the static part of a call."""
        raise NotImplementedError

    # Called by the lowering rules of `dispatch`

    def forward(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`: prepare q, k and v, run the kernel, and drop the padding."""
        q, k, v = self.prepare(operands.q, operands.k, operands.v, operands, options)
        call = self.create_call(operands, options)
        out, largest, total = call.forward({"q": q, "k": k, "v": v} | call.arrays(operands))
        return out[..., : operands.v.shape[-1]], LogSum(largest, total)

    def backward(self, operands: Operands, options: AttentionOptions, results: Results) -> dict[str, jax.Array]:
        """Return the gradients of the wanted operands, from the results of attention.

        The dQ kernel always runs, and first: the other kernels read the delta and log-sum-exp that it returns. They run
        only if their gradients are wanted. `prepare` is differentiated by JAX. A sink is a score with no value, so
        ``dP = 0`` there, and its gradient is ``-sum_i P[i] delta[i]`` with ``P = exp(sink - largest) / total``.

        Args:
            operands: As in `forward`.
            options: Options of the call.
            results: Results of `forward`, their cotangents, and the names of the wanted operands: q, k, v, bias or
                sink.
        """
        out, log_sum, d_out, d_total, wanted = results
        (q, k, v), pull_back = jax.vjp(
            lambda q, k, v: self.prepare(q, k, v, operands, options), operands.q, operands.k, operands.v
        )
        call = self.create_call(operands, options)
        do, o = (pad_heads(x, v.shape[-1]) for x in (d_out.astype(q.dtype), out))
        arrays = {"q": q, "k": k, "v": v, "do": do, "largest": log_sum.largest}
        arrays |= call.arrays(operands) | {"total": log_sum.total, "o": o}
        if d_total is not None:
            arrays["shift"] = log_sum.total * d_total
        dq, sums = call.dq(arrays)
        arrays |= sums
        gradients = {}
        if set(wanted) & {"q", "k", "v"}:
            gradients = dict(zip("qkv", pull_back((dq, *call.dkv(arrays))), strict=True))
        if "bias" in wanted and operands.bias is not None:
            gradients["bias"] = call.dbias(arrays, operands.bias, operands)
        if "sink" in wanted and operands.sink is not None:
            over = jnp.where(log_sum.total == 0, -jnp.inf, operands.sink[..., None].astype(FLOAT32) - log_sum.largest)
            # `largest` was converted to base 2 and back: a huge sink may exceed it by a rounding.
            p = jnp.exp(jnp.minimum(over, 0)) * inverse_of(log_sum.total)
            gradients["sink"] = sum_shared(-(p * sums["delta"]).sum(-1), operands.sink)
        return {name: gradients[name] for name in wanted}

    def prepare(
        self, q: jax.Array, k: jax.Array, v: jax.Array, operands: Operands, options: AttentionOptions
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotate, normalise and pad queries and keys for the kernels, in one pass over each.

        Args:
            q: Queries, ``[b, h, g, n, d]``; given beside `operands`, as k and v, so that JAX can differentiate by them.
            k: Keys, likewise.
            v: Values, likewise.
            operands: Masks, the offset of the queries, and the widths are read from here.
            options: Options of the call.

        Returns:
            q, k and v in their dtypes, with d padded to `widths`. They are not scaled: the kernels multiply by the
            scale.
        """
        rotary, window = options.rotary, options.window
        if rotary is not None or options.shared_qk or not self.HIDES_MASKED:
            # Rotating or normalising a masked token may make a NaN, and only some kernels hide masked tokens.
            q, k, masked_v, *_ = hide_masked(operands._replace(q=q, k=k, v=v))
            v = v if self.HIDES_MASKED else masked_v
        q_table = k_table = None
        if rotary is not None:
            i, j = operands.q_offset + jnp.arange(q.shape[-2]), jnp.arange(k.shape[-2])
            q_table = rotary.query_table(query_positions(i, window, rotary), FLOAT32)
            k_table = rotary.key_table(j, FLOAT32)
            q = rotary.turn(q, q_table)
        k = prepare_keys(k, options, k_table)
        width, value_width = self.widths(operands)
        return pad_heads(q, width), pad_heads(k, width), pad_heads(v, value_width)


def fill_options(operands: Operands, options: AttentionOptions) -> AttentionOptions:
    """Return the options of a call with the scale filled in, and the dropout rate set to 0 where there is no seed."""
    scale = operands.q.shape[-1] ** -0.5 if options.scale is None else options.scale
    rate = 0.0 if operands.dropout_seed is None else options.dropout_rate
    return dataclasses.replace(options, scale=scale, dropout_rate=rate)


def is_busy(operands: Operands, options: AttentionOptions) -> bool:
    """Return whether a call has a mask, segments, a bias, a soft cap, dropout or `shared_qk`.

    These need registers, and some of them copies of operands.
    """
    given = operands.mask, operands.q_segments, operands.bias, options.logits_soft_cap
    is_dropping = options.dropout_rate and operands.dropout_seed is not None
    return any(x is not None for x in given) or options.shared_qk or bool(is_dropping)


def has_precision_in(options: AttentionOptions, words: Container[Any]) -> bool:
    """Return whether the `precision` of a call, one word or a pair of them, is among these words."""
    precision = options.precision
    return all(word in words for word in (precision if isinstance(precision, tuple) else (precision,)))


def pad_heads(x: jax.Array, width: int) -> jax.Array:
    """Pad heads with zeros to a width; zeros change no product."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def sum_shared(x: jax.Array, like: jax.Array) -> jax.Array:
    """Sum a gradient ``[b, h, g, ...]`` over the axes of size 1 in an operand, and cast it to the operand's dtype."""
    axes = tuple(axis for axis in range(3) if like.shape[axis] == 1 < x.shape[axis])
    return x.sum(axes, keepdims=True).astype(like.dtype)


def to_base_2(largest: jax.Array) -> jax.Array:
    """Convert a largest score to an exponent of 2; finite, also for a query that sees no key."""
    return jnp.maximum(largest * LOG2_E, LEAST)


def to_stored(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Convert a largest score from base 2 to the stored one; return it and the factor that the total is multiplied by.

    The factor makes up for the rounding of the conversion, so that a gradient's probabilities add up to 1. A huge sink
    is rounded by more than any score: its factor is limited to 2, less than a rounding of its log-sum-exp.
    """
    stored = largest * LN_2
    lost = jnp.minimum(jnp.maximum(largest - to_base_2(stored), -1.0), 1.0)
    return stored, jnp.exp2(lost)


def log_sum_of(largest: jax.Array, total: jax.Array) -> jax.Array:
    """Return the log-sum-exp in base 2; for a query that sees no key it is the largest float32: probabilities are 0."""
    log_sum = to_base_2(largest) + jnp.log(jnp.where(total == 0, 1.0, total)) * LOG2_E
    return jnp.where(total == 0, -LEAST, log_sum)


def sink_in_base_2(sink: jax.Array) -> jax.Array:
    """Convert a sink to an exponent of 2; +inf becomes the largest float32, and -inf still means no sink."""
    return jnp.minimum(sink * LOG2_E, -LEAST)


def without(arrays: Mapping[str, jax.Array], *names: str) -> dict[str, jax.Array]:
    """Return the arrays without those of these names."""
    return {name: x for name, x in arrays.items() if name not in names}
