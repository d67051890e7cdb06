"""Attention to keys that lie in parts: a shard's own keys, and those at its borders.

Kernels run once for each part: for all queries and the shard's own keys, then for the queries that look beyond a border
and the keys there. The keys are not joined, so the first run does not wait for a neighbour. The results of a border
are merged into place. The gradients of each part are computed from the merged results.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_local_attention.exchange import AxisName, add_to_slice, fetch
from flax_local_attention.kernels.windowed import Windowed
from flax_local_attention.operands import Border, Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum, inverse_of, merge_parts
from flax_local_attention.window import Window

SIDES = ("before", "after")


def has_borders(operands: Operands) -> bool:
    """Return whether a call has keys at a border."""
    return any(getattr(operands, side) is not None for side in SIDES)


def problems_of_shards(operands: Operands, options: AttentionOptions, shards: int = 1) -> list[str]:
    """Return the reasons why shards of a sequence cannot attend by an exchange of borders; empty if they can.

    A plain window and a bias depend on a token's place in its window, so a shard must begin with a window.

    Args:
        operands: Operands of one shard, or of several together; maybe shapes.
        options: Options of the call, with a window that has a limit.
        shards: How many shards the operands are of.
    """
    window, n, n_keys = options.window, operands.q.shape[-2] // shards, operands.k.shape[-2] // shards
    reasons = []
    if n != n_keys or not (isinstance(operands.q_offset, int) and operands.q_offset == 0):
        reasons.append(f"a shard must have a query for each key and no `q_offset`, got {n} and {n_keys}")
    if n_keys % window.size and (operands.bias is not None or not window.exact_windowsize):
        reasons.append(
            f"shards must be whole windows for a plain window or a bias, got {n_keys} tokens and windows of "
            f"{window.size}"
        )
    return reasons


def fetch_borders(operands: Operands, window: Window, axis_name: AxisName) -> Operands:
    """Fetch the keys that the queries of a shard see in other shards, as the shard's borders.

    Args:
        operands: Operands of a shard.
        window: Window of the call.
        axis_name: Mesh axis, or axes, that the sequence is spread over.
    """
    n, shards = operands.k.shape[-2], lax.axis_size(axis_name)
    # Fetch no more than there is: a window may be longer than the sequence. Each token keeps its place in its window,
    # because shards are whole windows where places matter.
    whole = (shards - 1) * n
    left = min(window.backward, whole)
    right = 0 if window.causal else min(window.forward, whole)
    (k, v), before, after = fetch(
        (operands.k, operands.v), (operands.mask, operands.k_segments), axis_name, left, right
    )
    first = lax.axis_index(axis_name) * n

    def border(fetched, begin):
        if not fetched:
            return None
        k, v, mask, segments = fetched
        positions = first + jnp.arange(begin, begin + k.shape[-2], dtype=jnp.int32)
        exists = ((positions >= 0) & (positions < shards * n))[None, None, None]
        return Border(k, v, exists if mask is None else exists & mask, segments)

    return operands._replace(k=k, v=v, before=border(before, -left), after=border(after, n))


def join_borders(operands: Operands) -> Operands:
    """Return the operands with the keys of the borders joined to the others."""
    before, after = operands.before, operands.after
    if before is None and after is None:
        return operands

    def join(name, axis):
        own = getattr(operands, name)
        parts = [None if border is None else getattr(border, name) for border in (before, after)]
        if name == "mask":  # borders always have one
            own, *parts = _broadcast(_mask_or_true(own, operands.k), *parts)
        kept = [x for x in (parts[0], own, parts[1]) if x is not None]
        return jnp.concatenate(kept, axis) if kept else None

    joined = {name: join(name, axis) for name, axis in (("k", -2), ("v", -2), ("mask", -1), ("k_segments", -1))}
    offset = 0 if before is None else before.k.shape[-2]
    return operands._replace(**joined, q_offset=offset, before=None, after=None)


def _mask_or_true(mask, k):
    return jnp.ones((1, 1, 1, k.shape[-2]), bool) if mask is None else mask


def _broadcast(*masks):
    """Broadcast the leading axes of masks ``[b, h, g, n]`` of any lengths; None stays None."""
    lead = jnp.broadcast_shapes(*(x.shape[:-1] for x in masks if x is not None))
    return [None if x is None else jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in masks]


class Part(NamedTuple):
    """The keys of one part, and the queries that may see them.

    Attributes:
        operands: Operands of these queries and keys.
        side: "before" or "after"; None for a shard's own keys.
        first: Index of the first of these queries in the call.
        filler: Number of hidden keys that were put before the part's own, see `parts_of`.
    """

    operands: Operands
    side: str | None
    first: int
    filler: int

    def cut(self, x: Any, axis: int) -> Any:
        """Slice an array of the call's queries to those of the part."""
        if x is None or self.side is None:
            return x
        return lax.slice_in_dim(x, self.first, self.first + self.operands.q.shape[-2], axis=axis)

    def name(self, of_part: str) -> str:
        """Return the name that an operand of the part has in the call."""
        return f"{self.side}.{of_part}" if self.side is not None and of_part in ("k", "v") else of_part


def parts_of(operands: Operands) -> Iterator[Part]:
    """Yield the parts of a call, the one of the shard's own keys first.

    Positions count from the first key of a part. The queries that look back follow the keys before the shard. The
    queries that look ahead precede the keys after it, so as many hidden keys stand at their positions.
    """
    n = operands.q.shape[-2]
    whole = operands._replace(before=None, after=None)
    yield Part(whole, None, 0, 0)
    if operands.before is not None:
        m = operands.before.k.shape[-2]
        queries = whole.of_queries(0, min(m, n))
        yield Part(queries._replace(**operands.before._asdict(), sink=None, q_offset=m), "before", 0, 0)
    if operands.after is not None:
        m = min(operands.after.k.shape[-2], n)
        queries = whole.of_queries(n - m, m)
        k, v, mask, segments = operands.after
        keys = {
            "k": _fill(k, m, -2),
            "v": _fill(v, m, -2),
            "mask": _fill(mask, m, -1),
            "k_segments": None if segments is None else _fill(segments, m, -1),
        }
        yield Part(queries._replace(**keys, sink=None, q_offset=0), "after", n - m, m)


def _fill(x, count, axis):
    """Put `count` zeros before an array."""
    axis %= x.ndim
    return lax.pad(x, jnp.zeros((), x.dtype), [(count if at == axis else 0, 0, 0) for at in range(x.ndim)])


def part_shapes(operands: Operands) -> list[Operands]:
    """Return the operands of every part as shapes, from operands that are shapes."""
    offsets: list[Any] = []

    def split(operands):
        parts = [part.operands for part in parts_of(operands)]
        offsets.extend(part.q_offset for part in parts)
        return [part._replace(q_offset=None) for part in parts]

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands._replace(q_offset=None))
    found = jax.eval_shape(split, shapes)
    return [
        part._replace(q_offset=0 if offset is None else offset) for part, offset in zip(found, offsets, strict=True)
    ]


def part_gradients(
    attend: Callable[[Any], tuple[jax.Array, LogSum]], chosen: Mapping[str, jax.Array], results: Any
) -> dict[str, jax.Array]:
    """Compute the gradients of a part's operands by any implementation, from the merged results of all parts.

    With ``z_p = exp(largest_p - largest) total_p`` for part p, the merged results are ``total = sum_p z_p`` and
    ``out = sum_p z_p out_p / total``.

    Args:
        attend: Function from the operands to differentiate by to the part's own results.
        chosen: These operands by name.
        results: Merged `Results` of all parts, for the part's queries.
    """
    (out, log_sum), pull_back = jax.vjp(attend, chosen)
    whole, wide = results.log_sum, results.log_sum.total.dtype
    d_out = results.d_out.astype(wide)
    weight = jnp.exp(log_sum.largest - whole.largest)
    inverse = inverse_of(whole.total)
    moved = ((out.astype(wide) - results.out.astype(wide)) * d_out).sum(-1) * inverse
    d_total = weight * (moved if results.d_total is None else moved + results.d_total)
    share = (weight * log_sum.total * inverse)[..., None]
    return pull_back(((share * d_out).astype(out.dtype), LogSum(jnp.zeros_like(d_total), d_total)))[0]


@dataclasses.dataclass(frozen=True)
class PlainPart:
    """The plain path in the place of a part's kernels.

    Attributes:
        platform: Platform that the program is lowered for.
    """

    platform: str

    def forward(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`."""
        return Windowed().on_platform(operands, options, self.platform)

    def backward(self, operands: Operands, options: AttentionOptions, results: Any) -> dict[str, jax.Array]:
        """Return the gradients of the wanted operands, from the merged results of all parts."""
        chosen = {name: getattr(operands, name) for name in results.wanted}
        return part_gradients(lambda chosen: self.forward(operands._replace(**chosen), options), chosen, results)


@dataclasses.dataclass(frozen=True)
class InParts:
    """Kernels of a call whose keys lie in parts.

    Attributes:
        kernels: Kernels of each part, in the order of `parts_of`.
    """

    kernels: tuple[Any, ...]

    def forward(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend to each part, and merge the results of a border into place."""
        own, *others = zip(parts_of(operands), self.kernels, strict=True)
        out, log_sum = own[1].forward(own[0].operands, options)
        for part, kernels in others:
            whole = part.cut(out, -2), LogSum(*(part.cut(x, -1) for x in log_sum))
            merged, sums = merge_parts([whole, kernels.forward(part.operands, options)])
            out = lax.dynamic_update_slice_in_dim(out, merged, part.first, -2)
            log_sum = LogSum(
                *(lax.dynamic_update_slice_in_dim(x, y, part.first, -1) for x, y in zip(log_sum, sums, strict=True))
            )
        return out, log_sum

    def backward(self, operands: Operands, options: AttentionOptions, results: Any) -> dict[str, jax.Array]:
        """Return the gradients of the wanted operands; the gradients of a border's queries are summed into place.

        The borders come first: their gradients travel to the neighbours while the rest is computed.
        """
        pairs = list(zip(parts_of(operands), self.kernels, strict=True))
        found = [_gradients_of(part, kernels, options, results) for part, kernels in reversed(pairs)]
        *borders, total = found
        for (part, _), gradients in zip(reversed(pairs[1:]), borders, strict=True):
            for name, gradient in gradients.items():
                if name not in total:
                    total[name] = gradient
                elif name == "q":
                    total[name] = add_to_slice(total[name], gradient, part.first, -2)
                else:
                    total[name] += gradient
        return total


def _gradients_of(part, kernels, options, results):
    """Compute the gradients of a part's operands, by the names that they have in the call."""
    names = {name: part.name(name) for name in ("q", "k", "v", "bias", "scale", "sink")}
    is_given = {name: getattr(part.operands, name) is not None for name in names}
    wanted = tuple(name for name, whole in names.items() if is_given[name] and whole in results.wanted)
    if not wanted:
        return {}
    of_part = results._replace(
        out=part.cut(results.out, -2),
        log_sum=LogSum(*(part.cut(x, -1) for x in results.log_sum)),
        d_out=part.cut(results.d_out, -2),
        d_total=part.cut(results.d_total, -1),
        wanted=wanted,
    )
    found = kernels.backward(part.operands, options, of_part)
    return {names[name]: x[..., part.filler :, :] if name in ("k", "v") else x for name, x in found.items()}
