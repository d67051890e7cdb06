"""Exchange of tokens between neighbouring shards of a sequence, inside ``jax.shard_map``."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec, reshard

from flax_local_attention.sharding import is_in_order

AxisName = str | tuple[str, ...]


def fetch(
    x: tuple[jax.Array, jax.Array], labels: Sequence[jax.Array | None], axis_name: AxisName, left: int, right: int
) -> tuple[tuple[jax.Array, jax.Array], list, list]:
    """Fetch the last `left` tokens of the shards before this one, and the first `right` tokens of the shards after it.

    More tokens than a shard has take several hops, each of whole shards except the last. Each hop is one message per
    side. Tokens beyond the ends of the sequence are 0.

    Args:
        x: Keys and values of a shard, each ``[b, h, g, n, d]``, which are differentiated.
        labels: Masks or documents of the keys, each ``[b, h, g, n]`` bool or integers with axes that broadcast, or
            None. They travel in the same messages.
        axis_name: Mesh axis, or axes, that the sequence is spread over.
        left: Tokens to fetch from before.
        right: Tokens to fetch from after.

    Returns:
        Keys and values to use instead of x, so that gradients of the fetched tokens are added in place; the tokens
        fetched from before, as a list of keys, values and labels; and the same from after.
    """
    n = x[0].shape[-2]
    hops = [(hop, min(n, left - (hop - 1) * n)) for hop in range(1, -(-left // n) + 1)]
    hops += [(-hop, min(n, right - (hop - 1) * n)) for hop in range(1, -(-right // n) + 1)]
    ends = tuple(size if hop > 0 else -size for hop, size in hops)
    (k, *k_ends), (v, *v_ends) = (ends_p.bind(y, ends=ends) for y in x)
    parts: dict[int, list] = {1: [], -1: []}
    for (hop, size), *pair in zip(hops, k_ends, v_ends, strict=True):
        of_part = [None if y is None else _end(y, size if hop > 0 else -size, -1) for y in labels]
        parts[1 if hop > 0 else -1].append(_send(axis_name, hop, tuple(pair), tuple(of_part)))
    return (k, v), _join(parts[1][::-1]), _join(parts[-1])


def _join(fetched):
    """Concatenate the keys, values and labels of several hops along the tokens."""
    columns = zip(*([*floats, *labels] for floats, labels in fetched), strict=True)
    return [
        None if x[0] is None else x[0] if len(x) == 1 else jnp.concatenate(x, -2 if at < 2 else -1)
        for at, x in enumerate(columns)
    ]


def _end(x, size, axis):
    """Return the last `size` entries along an axis, or the first ``-size`` if it is negative."""
    n = x.shape[axis]
    return lax.slice_in_dim(x, n - size, n, axis=axis) if size > 0 else lax.slice_in_dim(x, 0, -size, axis=axis)


def shift(x, axis_name: AxisName, hop: int) -> jax.Array:
    """Return the array of the shard `hop` places before this one (after, if negative); zeros if there is none."""
    shards = lax.axis_size(axis_name)
    pairs = [(shard, shard + hop) for shard in range(shards) if 0 <= shard + hop < shards]
    return lax.ppermute(x, axis_name, pairs)


def next_of_spread(x: Any, like: Any, end: Any) -> jax.Array:
    """Shift an array by one along its last axis, with `end` as the last entry; each device fetches one entry.

    Args:
        x: Array, ``[..., n]``.
        like: Array of x's shape whose last axis is spread over explicit mesh axes; the result is spread like it.
        end: Entry after the last one.
    """
    spec, mesh = jax.typeof(like).sharding.spec, jax.typeof(like).sharding.mesh
    name = spec[-1]
    if not is_in_order(name, mesh.axis_names):
        whole = reshard(jnp.asarray(x), NamedSharding(mesh, PartitionSpec(*spec[:-1], None)))
        last = jnp.full_like(whole[..., :1], end)
        return reshard(jnp.concatenate([whole[..., 1:], last], -1), NamedSharding(mesh, spec))

    # All explicit axes are manual: JAX 0.10 gathers the results over axes that are left to the compiler.
    @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec, axis_names=set(mesh.explicit_axes))
    def next_of_shard(x):
        is_last = lax.axis_index(name) == lax.axis_size(name) - 1
        first = jnp.where(is_last, jnp.asarray(end, x.dtype), shift(x[..., :1], name, -1))
        return jnp.concatenate([x[..., 1:], first], axis=-1)

    return next_of_shard(reshard(jnp.asarray(x), NamedSharding(mesh, spec)))


def _send(axis_name, hop, floats, labels):
    """Shift two arrays ``[b, h, 1, n, d]`` and their labels in one message."""
    given = [x for x in labels if x is not None]
    if not given:
        return _send_floats(axis_name, hop, floats), labels
    dtype = jnp.promote_types(*(x.dtype for x in floats))
    word = jnp.dtype(f"uint{8 * dtype.itemsize}")
    columns = [_to_words(x, word, floats[0].shape) for x in given]
    fetched, octets = _send_all(axis_name, hop, floats, jnp.concatenate(columns, -1))
    words = lax.bitcast_convert_type(octets.astype(jnp.uint8), word)
    parts = iter(jnp.split(words, np.cumsum([x.shape[-1] for x in columns])[:-1], -1))
    return fetched, tuple(None if x is None else _from_words(next(parts), x) for x in labels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _send_all(axis_name, hop, floats, words):
    """Shift arrays, and words of the same width, in one message; return the words as bytes, one byte per float.

    The words are not returned as integers: these would have tangents of dtype float0, whose varying axes inside
    shard_map are wrong.
    """
    dtype = jnp.promote_types(*(x.dtype for x in floats))
    columns = [lax.bitcast_convert_type(x.astype(dtype), words.dtype) for x in floats] + [words]
    message = shift(jnp.concatenate(columns, -1), axis_name, hop)
    *parts, words = jnp.split(message, np.cumsum([x.shape[-1] for x in floats]), -1)
    fetched = (lax.bitcast_convert_type(part, dtype).astype(x.dtype) for part, x in zip(parts, floats, strict=True))
    return tuple(fetched), lax.bitcast_convert_type(words, jnp.uint8).astype(dtype)


@_send_all.defjvp
def _send_all_jvp(axis_name, hop, primals, tangents):
    """Send the tangents of the floats; words have none."""
    results = _send_all(axis_name, hop, *primals)
    return results, (_send_floats(axis_name, hop, tangents[0]), jnp.zeros_like(results[1]))


def _send_floats(axis_name, hop, floats):
    dtype = jnp.promote_types(*(x.dtype for x in floats))
    message = shift(jnp.concatenate([x.astype(dtype) for x in floats], -1), axis_name, hop)
    parts = jnp.split(message, [floats[0].shape[-1]], -1)
    return tuple(part.astype(x.dtype) for part, x in zip(parts, floats, strict=True))


def _to_words(x, word, shape):
    """Write labels ``[b, h, g, n]`` as columns of words next to keys of a shape, ``[b, h, 1, n, columns]``."""
    x = jnp.broadcast_to(x, (*shape[:2], *x.shape[2:]))
    if x.dtype == jnp.bool_:
        words = x[..., None].astype(word)
    elif x.dtype.itemsize < word.itemsize:
        words = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))[..., None].astype(word)
    else:
        words = lax.bitcast_convert_type(x, word).reshape(*x.shape, -1)
    return jnp.moveaxis(words, 2, -1).reshape(*shape[:2], 1, shape[-2], -1)


def _from_words(words, like):
    """Read labels from the columns of `_to_words`, with the shared axes and dtype of `like`."""
    count = max(like.dtype.itemsize // words.dtype.itemsize, 1)
    words = jnp.moveaxis(words[:, :, 0].reshape(*words.shape[:2], -1, count, like.shape[2]), -1, 2)
    words = words[: like.shape[0], : like.shape[1]]
    if like.dtype == jnp.bool_:
        return words[..., 0] != 0
    if like.dtype.itemsize < words.dtype.itemsize:
        return lax.bitcast_convert_type(words[..., 0].astype(f"uint{8 * like.dtype.itemsize}"), like.dtype)
    return lax.bitcast_convert_type(words if count > 1 else words[..., 0], like.dtype)


# The ends of a shard, as a linear function whose transpose adds to the ends in place. The transpose of a slice would
# add zeros to all other tokens, which on a GPU takes a tenth of the time of attention.

ends_p = Primitive("ends")
ends_p.multiple_results = True
add_ends_p = Primitive("add_ends")


def _take_ends(x, *, ends):
    """Return x, ``[..., n, d]``, and for each number in `ends` as many last tokens, or first tokens if negative."""
    return [x, *(_end(x, size, -2) for size in ends)]


def _add_ends(x, *parts, ends):
    """Add parts to the ends of x."""
    for part, size in zip(parts, ends, strict=True):
        x = add_to_slice(x, part, x.shape[-2] - size if size > 0 else 0, -2)
    return x


def add_to_slice(x: jax.Array, part: jax.Array, first: int, axis: int) -> jax.Array:
    """Add an array to a slice of x that starts at `first`, in place."""
    old = lax.slice_in_dim(x, first, first + part.shape[axis], axis=axis)
    return lax.dynamic_update_slice_in_dim(x, old + part, first, axis)


def _transpose_ends(cotangents, x, *, ends):
    """Add the cotangents of the ends to the cotangent of the whole."""
    whole, *parts = cotangents
    kept = [(part, size) for part, size in zip(parts, ends, strict=True) if type(part) is not ad.Zero]
    if not kept:
        return [whole]
    parts, ends = zip(*kept, strict=True)
    return [add_ends_p.bind(ad.instantiate_zeros(whole), *parts, ends=ends)]


def _transpose_add_ends(cotangent, *arguments, ends):
    """Take the ends of a cotangent."""
    found = ends_p.bind(ad.instantiate_zeros(cotangent), ends=ends)
    return [y if ad.is_undefined_primal(x) else None for x, y in zip(arguments, found, strict=True)]


def _map(primitive, arguments, axes, *, ends):
    """Batch a primitive along a leading axis, which all arguments get."""
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
    moved = [batching.bdim_at_front(x, axis, size) for x, axis in zip(arguments, axes, strict=True)]
    results = primitive.bind(*moved, ends=ends)
    return results, ([0] * len(results) if primitive.multiple_results else 0)


for _primitive, _fn in ((ends_p, _take_ends), (add_ends_p, _add_ends)):
    _primitive.def_impl(_fn)
    batching.primitive_batchers[_primitive] = functools.partial(_map, _primitive)
    mlir.register_lowering(_primitive, mlir.lower_fun(_fn, multiple_results=_primitive.multiple_results))
ends_p.def_abstract_eval(
    lambda x, ends: [x, *(x.update(shape=(*x.shape[:-2], abs(size), x.shape[-1])) for size in ends)]
)
add_ends_p.def_abstract_eval(lambda x, *parts, ends: x)
ad.deflinear2(ends_p, _transpose_ends)
ad.deflinear2(add_ends_p, _transpose_add_ends)
