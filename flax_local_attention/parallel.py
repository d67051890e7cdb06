"""Attention over a sequence that is spread over devices: any implementation, after an exchange with the neighbours."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_local_attention.kernels import Implementation, Unsupported, choose_implementation
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.softmax import LogSum


@dataclasses.dataclass(frozen=True)
class Halo:
    """Attention on the shards of a sequence, inside ``jax.shard_map``: each fetches only the keys that its queries see.

    A shard of n tokens fetches the ``B w`` keys before it and, for a window that looks ahead, the ``F w`` after it:
    keys and values in one message from each side, or in several where the halo is longer than a shard. Nothing grows
    with the number of shards. Gradients travel back the same way.

    Args:
        axis_name: Mesh axis that the sequence is spread over, in order and in equal shards.
        inner: Implementation of a shard's attention, as `implementation` of `local_attention`.

    Raises:
        Unsupported: (when called) The shards do not hold as many queries as keys from one position on; or a plain
            window or a bias is given, and shards are not whole windows.

    Example:
        >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("sequence",))
        >>> spec = jax.sharding.PartitionSpec(None, None, "sequence")
        >>> @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec)
        ... def attention(q, k, v):
        ...     return local_attention(q, k, v, window=Window.sliding(16), axis_name="sequence")
        >>> q = jnp.ones((2, 4, 64, 8))
        >>> attention(q, q, q).shape
        (2, 4, 64, 8)
    """

    axis_name: str
    inner: str | Implementation | None = None

    def __call__(self, operands: Operands, options: AttentionOptions) -> tuple[jax.Array, LogSum]:
        """Attend, as every `Implementation`; operands are those of a shard."""
        self._check(operands, options)
        window, n, shards = options.window, operands.k.shape[-2], lax.axis_size(self.axis_name)
        # No more than there is: a window may be longer than the sequence.
        whole = (shards - 1) * n
        w = window.size
        left = min(window.backward, -(-whole // w) * w)
        right = 0 if window.causal else min(window.forward, whole)
        both = self._widen(jnp.concatenate([operands.k, operands.v], -1), -2, left, right)
        keys, values = jnp.split(both, [operands.k.shape[-1]], -1)
        positions = lax.axis_index(self.axis_name) * n - left + jnp.arange(left + n + right, dtype=jnp.int32)
        exists = ((positions >= 0) & (positions < shards * n))[None, None, None]
        mask = self._widen(operands.mask, -1, left, right)
        return choose_implementation(self.inner)(
            operands._replace(
                k=keys,
                v=values,
                mask=exists if mask is None else exists & mask,
                k_segments=self._widen(operands.k_segments, -1, left, right),
                dropout_seed=self.own_seed(operands.dropout_seed),
                q_offset=left,
            ),
            options,
        )

    def _check(self, operands, options):
        """Raise unless shards hold as many queries as keys, and whole windows where these are needed.

        A plain window and a bias go by a token's place in its window, which a shard knows only if it begins with one.
        """
        window, n, n_keys = options.window, operands.q.shape[-2], operands.k.shape[-2]
        reasons = []
        if n != n_keys or not (isinstance(operands.q_offset, int) and operands.q_offset == 0):
            reasons.append(f"a shard must have a query for each key and no `q_offset`, got {n} and {n_keys}")
        if n_keys % window.size and (operands.bias is not None or not window.exact_windowsize):
            reasons.append(
                f"shards must be whole windows for a plain window or a bias, got {n_keys} tokens and windows of "
                f"{window.size}"
            )
        if reasons:
            raise Unsupported(f"`axis_name` {self.axis_name!r}: {'; '.join(reasons)}; change the sharding.")

    def _widen(self, x: Any, axis: int, left: int, right: int) -> Any:
        """Put the last `left` entries of the shards before, and the first `right` of those after, around x.

        A halo longer than a shard takes several hops; each fetches whole shards but the last. Entries beyond the ends
        of the sequence are 0; the caller masks them.

        Args:
            x: Array of a shard, n entries along `axis`, or None.
            axis: Axis of the sequence.
            left, right: Entries to fetch.

        Returns:
            The array, with ``left + n + right`` entries along `axis`.
        """
        if x is None:
            return None
        n = x.shape[axis]
        before = [self._fetch(x, axis, hop, min(n, left - (hop - 1) * n)) for hop in range(1, -(-left // n) + 1)]
        after = [self._fetch(x, axis, -hop, min(n, right - (hop - 1) * n)) for hop in range(1, -(-right // n) + 1)]
        return jnp.concatenate([*before[::-1], x, *after], axis)

    def _fetch(self, x, axis, hop, size):
        """Fetch `size` entries from the shard `hop` before this one (negative: after); zeros if there is none.

        From a shard before these are its last entries, from one after its first. One exchange serves all shards.
        """
        n, shards = x.shape[axis], lax.axis_size(self.axis_name)
        part = lax.slice_in_dim(x, n - size, n, axis=axis) if hop > 0 else lax.slice_in_dim(x, 0, size, axis=axis)
        pairs = [(shard, shard + hop) for shard in range(shards) if 0 <= shard + hop < shards]
        return lax.ppermute(part, self.axis_name, pairs)

    def own_seed(self, seed: jax.Array | None) -> jax.Array | None:
        """Give each shard a seed of its own: positions, which dropout hashes, begin anew in each."""
        if seed is None:
            return None
        return seed ^ (lax.axis_index(self.axis_name).astype(jnp.uint32) * np.uint32(0x9E3779B1))
