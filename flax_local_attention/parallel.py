"""Attention over a sequence that is spread over devices: an exchange with neighbours, then any implementation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, reshard

from flax_local_attention.checks import describe
from flax_local_attention.exchange import AxisName
from flax_local_attention.kernels import Fastest, Implementation, KernelFamily, Unsupported, choose_implementation
from flax_local_attention.kernels.borders import fetch_borders, join_borders, problems_of_shards
from flax_local_attention.operands import OF_TOKENS, Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.ring_attention import attend_around_ring, sees_all
from flax_local_attention.sharding import apart, count_shards, explicit_mesh, is_in_order, respread, spec_of
from flax_local_attention.softmax import LogSum


@dataclasses.dataclass(frozen=True)
class Halo:
    """Attention on the shards of a sequence, inside ``jax.shard_map``, which fetches only the keys that queries see.

    A shard of n tokens fetches the ``B w`` keys before it and, for a window that looks ahead, the ``F w`` keys after
    it. Keys and values travel in one message from each side, or in several if the halo is longer than a shard. The cost
    does not grow with the number of shards. Gradients travel back the same way.

    A window that sees the whole sequence, or all earlier tokens, uses ring attention instead.

    Args:
        axis_name: Mesh axis, or axes, that the sequence is spread over, in order and in equal shards.
        inner: Implementation of a shard's attention, like `implementation` of `local_attention`.

    Raises:
        TypeError: `axis_name` is not a name or a tuple of names.
        Unsupported: On a call, if shards do not hold as many queries as keys from the same position on; or if there is
            a plain window or a bias, and a shard is not a whole number of windows.

    Examples:
        >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("sequence",))
        >>> spec = jax.sharding.PartitionSpec(None, None, "sequence")
        >>> @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec)
        ... def attention(q, k, v):
        ...     return local_attention(q, k, v, window=Window.sliding(16), axis_name="sequence")
        >>> q = jnp.ones((2, 4, 64, 8))
        >>> attention(q, q, q).shape
        (2, 4, 64, 8)
    """

    axis_name: AxisName
    inner: str | Implementation | None = None

    def __post_init__(self):
        names = self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)
        if not (names and all(isinstance(name, str) for name in names)):
            raise TypeError(
                f"`axis_name` must be the name of a mesh axis, or a tuple of names, got {describe(self.axis_name)}; "
                "take it from the mesh."
            )
        choose_implementation(self.inner, "inner")

    @property
    def shards(self) -> int:
        """Number of shards of the sequence.

        Raises:
            ValueError: The call is not inside a `jax.shard_map` with this axis.
        """
        try:
            return lax.axis_size(self.axis_name)
        except NameError:
            raise ValueError(
                f"`axis_name` must be an axis of the mesh of `jax.shard_map`, got {self.axis_name!r} outside of such a "
                "mesh; call from inside, or leave it out."
            ) from None

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend with the operands of a shard, as every `Implementation`."""
        names = jax.sharding.get_abstract_mesh().axis_names
        reasons = problems_of_shards(operands, options)
        if names and not is_in_order(self.axis_name, names):
            reasons.append(f"mesh axes must be in the order of the mesh, {names}")
        if reasons:
            raise Unsupported(
                f"`axis_name` must be an axis over which shards can attend, got {self.axis_name!r}: "
                f"{'; '.join(reasons)}; change the sharding."
            )
        inner = choose_implementation(self.inner)
        if self._is_for_ring(operands, options):
            return attend_around_ring(
                inner,
                operands._replace(dropout_seed=self.own_seed(operands.dropout_seed)),
                options,
                self.axis_name,
            )
        operands = fetch_borders(operands, options.window, self.axis_name)
        operands = operands._replace(dropout_seed=self.own_seed(operands.dropout_seed))
        # Dropout hashes positions: implementations drop the same probabilities only if they count from the same key.
        takes_borders = isinstance(inner, Fastest | KernelFamily) and operands.dropout_seed is None
        return inner(operands if takes_borders else join_borders(operands), options)

    def _is_for_ring(self, operands, options):
        """Return whether `attend_around_ring` serves the call: all keys are seen, without bias and xPos."""
        fades = options.rotary is not None and options.rotary.use_xpos
        is_plain = operands.bias is None and not fades and self.shards > 1
        return is_plain and sees_all(options.window, self.shards * operands.q.shape[-2])

    def own_seed(self, seed: jax.Array | None) -> jax.Array | None:
        """Make a dropout seed for each shard, because the positions that dropout hashes restart in each.

        Args:
            seed: The seed of the call, or None.
        """
        if seed is None:
            return None
        return seed ^ (lax.axis_index(self.axis_name).astype(jnp.uint32) * np.uint32(0x9E3779B1))


def axis_of_sequence(operands: Operands) -> AxisName | None:
    """Return the explicit mesh axes that the sequence is spread over; None if there are none, or inside shard_map."""
    specs = [spec_of(x) for x in (operands.q, operands.k)]
    return next((spec[-2] for spec in specs if spec[-2] is not None), None)


def is_served(operands: Operands, options: AttentionOptions, axis_name: AxisName) -> bool:
    """Return whether `Halo` serves operands whose sequence is spread over explicit mesh axes."""
    mesh = explicit_mesh(operands[:3])
    is_free = tuple(apart([axis_name], spec_of(operands.q)[:-2])) == (axis_name,)
    if not (is_free and is_in_order(axis_name, mesh.axis_names)):
        return False
    return not problems_of_shards(operands, options, count_shards(mesh, axis_name))


def gather_sequence(operands: Operands) -> Operands:
    """Gather the tokens of operands on each device if they are spread over explicit mesh axes."""

    def gather(name, x):
        spec = list(spec_of(x))
        spec[OF_TOKENS[name]] = None
        return respread(x, PartitionSpec(*spec))

    given = {name: getattr(operands, name) for name in OF_TOKENS}
    return operands._replace(**{name: gather(name, x) for name, x in given.items() if x is not None})


def over_shards(
    attend: Callable[[Operands, jax.Array | None], tuple[jax.Array, LogSum]],
    operands: Operands,
    positions: jax.Array | None,
    axis_name: AxisName,
) -> tuple[jax.Array, LogSum]:
    """Call a function of attention inside ``jax.shard_map``, with rows, heads and tokens sharded like q.

    Args:
        attend: Function of a shard's operands and positions.
        operands: Operands on a mesh with explicit axes.
        positions: ``[b, n]`` or ``[1, n]`` integers, or None.
        axis_name: Mesh axes that the sequence is spread over.

    Returns:
        The output and its log-sum-exp, sharded like q.
    """
    mesh, lead = explicit_mesh(operands[:3]), tuple(spec_of(operands.q))[:3]
    offset, arrays = operands.q_offset, operands._asdict() | {"q_offset": None, "positions": positions}

    def spec_of_operand(path, x):
        name = path[0].key
        sizes = zip(lead, x.shape, operands.q.shape[:3], strict=False)
        own: list[Any] = [axis if size == whole else None for axis, size, whole in sizes]
        if name == "positions":
            return PartitionSpec(own[0], axis_name)
        own += [None] * (x.ndim - len(own))
        if name in OF_TOKENS:
            own[OF_TOKENS[name]] = axis_name
        return PartitionSpec(*own)

    specs = jax.tree_util.tree_map_with_path(spec_of_operand, arrays)
    rows: Any = PartitionSpec(*lead, axis_name)

    @jax.jit
    def run(arrays):
        def on_shards(arrays):
            positions = arrays.pop("positions")
            return attend(Operands(**arrays | {"q_offset": offset}), positions)

        out_specs = PartitionSpec(*rows, None), LogSum(rows, rows)
        names = set(mesh.explicit_axes)
        spread = jax.shard_map(on_shards, mesh=mesh, in_specs=(specs,), out_specs=out_specs, axis_names=names)
        return spread(jax.tree.map(lambda x, spec: reshard(jnp.asarray(x), NamedSharding(mesh, spec)), arrays, specs))

    return run(arrays)
