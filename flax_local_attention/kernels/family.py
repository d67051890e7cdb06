"""What families of fused kernels share: which calls they take, and all that is done around their kernels.

A family has three kernels, and maybe one for a bias. Forward gives O, largest and total. That of dQ runs first of a
gradient, for the delta and log-sum-exp of each query that the kernel of dK and dV reads. JAX's own operations do the
rest before and after: rotation and normalisation of q and k, padding of heads, the gradient of sinks. JAX
differentiates the preparation, `prepare`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Protocol, Self

import jax
import jax.numpy as jnp

from flax_local_attention.kernels.constants import FLOAT32, LEAST, LOG2_E
from flax_local_attention.kernels.contract import Unsupported
from flax_local_attention.kernels.dispatch import Results, attend_by
from flax_local_attention.kernels.primitives import Target
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum, hide_masked, inverse_of, prepare_keys, query_positions
from flax_local_attention.window import Window

# Arrays, and gradients, that may lie in memory token by token.
TOKEN_MAJOR = frozenset({"q", "k", "v", "o", "do", "dq", "dk", "dv"})


class KernelCall(Protocol):
    """All that is static in a call of a family's kernels, and their launches; arrays go by name.

    A family that serves no bias has no `dbias`: it is called for the gradient of one.
    """

    def arrays(self, operands: Operands) -> dict[str, jax.Array]:
        """Return the arrays that the kernels need beside q, k and v."""
        ...

    def forward(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the result ``[b, h, g, n, d]``, and the largest scores and totals of its log-sum-exp."""
        ...

    def dq(self, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the gradient of q, and the arrays that `dkv` needs of each query, delta among them."""
        ...

    def dkv(self, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Return the gradients of k and v, summed over the query heads that share them."""
        ...

    def dbias(self, arrays: Mapping[str, jax.Array], bias: jax.Array, operands: Operands) -> jax.Array:
        """Return the gradient of a bias as it was given."""
        ...


class KernelFamily:
    """A family of fused kernels, such as `Triton`: a subclass says which calls it serves, and launches them."""

    NAME: ClassVar[str]
    NEEDS: ClassVar[str]  # the device, for messages
    DTYPES: ClassVar[tuple]  # what they multiply
    PLACES: ClassVar[str] = "on one device, a mesh or inside shard_map"
    HIDES_MASKED: ClassVar[bool] = True  # whether its kernels leave masked tokens out, whatever these hold
    # The largest soft cap: kernels on GPUs compute tanh within 2e-7, of which a larger one makes more than a rounding.
    MOST_CAP: ClassVar[float] = 1e3
    IS_STABLE: ClassVar[bool] = False  # whether later versions of JAX run them in an exported program
    interpret: bool

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`; derivatives beyond the gradient are the plain path's."""
        self._check(operands, options)
        return attend_by(self, operands, options)

    def _check(self, operands, options):
        """Raise if these kernels cannot serve a call anywhere."""
        if reasons := self.problems(operands, options):
            raise Unsupported(
                f"{self.NAME} kernels cannot serve this call: {'; '.join(reasons)}; leave `implementation` None."
            )

    def choose(self, operands: Operands, options: AttentionOptions, target: Target) -> Self:
        """Return itself, as every `Chooser`, unless it cannot serve a call on the target."""
        self._check(operands, options)
        problem = None if self.interpret else self.problem_of(target)
        if target.partition == "unknown":
            problem = "arrays to be spread over a mesh in a way that is not known when they are compiled"
        if problem is not None:
            raise Unsupported(
                f"{self.NAME} kernels need {self.NEEDS}, {self.PLACES}, got {problem}; "
                f"leave `implementation` None, or use {type(self).__name__}(interpret=True) to try them."
            )
        return self

    def problem_of(self, target: Target) -> str | None:
        """Return why these kernels cannot run on a target; None if they can."""
        raise NotImplementedError

    def problems(self, operands: Operands, options: AttentionOptions) -> list[str]:
        """Return the reasons, by shapes and options, why these kernels cannot serve a call: none if they can."""
        q = operands.q
        if not all(isinstance(size, int) for x in operands[:3] for size in x.shape):
            return [f"sizes must be known, got {q.shape} and {operands.k.shape}"]
        reasons = []
        if type(options.window) is not Window:
            reasons.append(f"blocks are planned by the rule of Window, got a {type(options.window).__name__}")
        if options.rotary is not None and options.rotary.use_xpos:
            reasons.append("xPos is scaled in every block anew")
        if q.dtype not in self.DTYPES or {q.dtype} != {operands.k.dtype, operands.v.dtype}:
            names = " or ".join(jnp.dtype(dtype).name for dtype in self.DTYPES)
            reasons.append(f"q, k and v must be of one dtype, {names}, got {q.dtype}, {operands.k.dtype}")
        if operands.scale is not None or (options.scale is not None and options.scale <= 0):
            reasons.append("`scale` must be a positive number, no array")
        for name in ("mask", "q_mask", "q_segments", "k_segments"):
            x = getattr(operands, name)
            if x is not None and x.shape[2] > 1:
                reasons.append(f"`{name}` must be the same for query heads that share a head of keys")
        if options.logits_soft_cap is not None and options.logits_soft_cap > self.MOST_CAP:
            reasons.append(f"`logits_soft_cap` must be at most {self.MOST_CAP:g}, got {options.logits_soft_cap}")
        if operands.q_segments is not None and operands.q_segments.dtype.itemsize > 4:
            reasons.append(f"`segment_ids` must be of at most 32 bits, got {operands.q_segments.dtype}")
        return reasons + self.own_problems(operands, options)

    def own_problems(self, operands: Operands, options: AttentionOptions) -> list[str]:
        """Return the reasons of this family alone why it cannot serve a call."""
        raise NotImplementedError

    def by_tokens(self) -> Self:
        """Return these kernels for arrays that lie in memory token by token, if they can read them so."""
        return self

    def allows_float32(self, options: AttentionOptions) -> bool:
        """Return whether products in float32 may be what the kernels make of them, by the `precision` of a call."""
        return True

    def widths(self, operands: Operands) -> tuple[int, int]:
        """Return the head sizes in the kernels: of queries and keys, and of values."""
        raise NotImplementedError

    def create_call(self, operands: Operands, options: AttentionOptions) -> KernelCall:
        """Describe a call."""
        raise NotImplementedError

    # Methods that lowering rules of `dispatch` call

    def forward(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`: prepare q, k and v, run the kernel, and cut the padding off."""
        q, k, v = self.prepare(operands.q, operands.k, operands.v, operands, options)
        call = self.create_call(operands, options)
        out, largest, total = call.forward({"q": q, "k": k, "v": v} | call.arrays(operands))
        return out[..., : operands.v.shape[-1]], LogSum(largest, total)

    def backward(self, operands: Operands, options: AttentionOptions, results: Results) -> dict[str, jax.Array]:
        """Return the gradients of the wanted operands, from the results of attention.

        The kernel of dQ runs first, for the delta and log-sum-exp that the others read; those of dK, dV and the bias
        run only if they are wanted. dQ, dK and dV are pulled back through `prepare`. A sink is a key with ``dO v = 0``,
        so that its gradient is ``-sum_i P[i] delta[i]`` with ``P = exp(sink - largest) / total``.

        Args:
            operands: As in `forward`.
            options: Options of the call.
            results: Results of `forward`, their cotangents, and which operands are wanted: q, k, v, bias or sink.
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
            # The largest score has been in base 2 and back: a huge sink may be more than it by a rounding.
            p = jnp.exp(jnp.minimum(over, 0)) * inverse_of(log_sum.total)
            gradients["sink"] = sum_shared(-(p * sums["delta"]).sum(-1), operands.sink)
        return {name: gradients[name] for name in wanted}

    def prepare(
        self, q: jax.Array, k: jax.Array, v: jax.Array, operands: Operands, options: AttentionOptions
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotate, normalise and pad queries and keys for the kernels, in one pass over each.

        Args:
            q, k, v: ``[b, h, g, n, d]``, apart from `operands`, so that a gradient can be taken by them.
            operands: Gives masks, the offset of the queries, and the widths.
            options: Options of the call.

        Returns:
            q, k and v in their dtypes, d widened to `widths`. The kernels multiply by the scale.
        """
        rotary, window = options.rotary, options.window
        if rotary is not None or options.shared_qk or not self.HIDES_MASKED:
            # Kernels leave masked tokens out by themselves, but a rotated or normalised one may be NaN.
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
    """Return the options of a call with the scale filled in, and a dropout rate only where it acts."""
    scale = operands.q.shape[-1] ** -0.5 if options.scale is None else options.scale
    rate = 0.0 if operands.dropout_seed is None else options.dropout_rate
    return dataclasses.replace(options, scale=scale, dropout_rate=rate)


def is_busy(operands: Operands, options: AttentionOptions) -> bool:
    """Return whether a call computes more than scores: a mask, documents, a bias, a soft cap, dropout, shared queries.

    These need registers, and some of them copies of operands.
    """
    given = operands.mask, operands.q_segments, operands.bias, options.logits_soft_cap
    is_dropping = options.dropout_rate and operands.dropout_seed is not None
    return any(x is not None for x in given) or options.shared_qk or bool(is_dropping)


def pad_heads(x: jax.Array, width: int) -> jax.Array:
    """Widen heads with zeros, which change no product."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def sum_shared(x: jax.Array, like: jax.Array) -> jax.Array:
    """Sum a gradient ``[b, h, g, ...]`` over the axes that an operand shares, and cast it to its dtype."""
    axes = tuple(axis for axis in range(3) if like.shape[axis] == 1 < x.shape[axis])
    return x.sum(axes, keepdims=True).astype(like.dtype)


def to_base_2(largest: jax.Array) -> jax.Array:
    """Turn a largest score into an exponent of 2; finite, also for a query that sees no key."""
    return jnp.maximum(largest * LOG2_E, LEAST)


def relative_to_stored(total: jax.Array, largest: jax.Array, stored: jax.Array) -> jax.Array:
    """Return a total that is relative to the largest score in base 2, as relative to that which is stored.

    A gradient's probabilities then add up to 1. The two differ by a rounding, which is kept finite where scores are
    beyond all measure, such as a sink of 1e30.
    """
    return total * jnp.exp2(jnp.minimum(jnp.maximum(largest - to_base_2(stored), -1.0), 1.0))


def log_sum_of(largest: jax.Array, total: jax.Array) -> jax.Array:
    """Return the log-sum-exp in base 2; so large for a query that sees no key that its probabilities are 0."""
    log_sum = to_base_2(largest) + jnp.log(jnp.where(total == 0, 1.0, total)) * LOG2_E
    return jnp.where(total == 0, -LEAST, log_sum)


def sink_in_base_2(sink: jax.Array) -> jax.Array:
    """Turn a sink into an exponent of 2 that is no infinity but -inf, no sink."""
    return jnp.minimum(sink * LOG2_E, -LEAST)


def without(arrays: Mapping[str, jax.Array], *names: str) -> dict[str, jax.Array]:
    """Return the arrays but those of these names."""
    return {name: x for name, x in arrays.items() if name not in names}
