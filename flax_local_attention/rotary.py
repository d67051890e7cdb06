"""Rotary position embedding and xPos, as pure functions of explicit positions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rotary:
    r"""Rotary position embedding, optionally with the length extrapolation of xPos.

    A vector of width ``d = dim`` is read as ``d / 2`` complex numbers: its first half are the real
    parts, its second half the imaginary parts. At position ``t`` number ``m`` is turned by the angle
    ``t theta^(-2m/d)``, so the product of a query and a key depends on their distance alone. xPos
    multiplies number ``m`` of a query by ``zeta_m^(t / scale_base)`` and divides that of a key by the
    same, with ``zeta_m = (2m + 0.4 d) / (1.4 d)``: products of distant tokens fade.

    Angles are exact at any int32 position: a turn is 2^32 steps of integer arithmetic, which wraps as angles do.
    For xPos, count positions from a place near the tokens: its scale then stays in range.

    Args:
        dim: Width of a head, even.
        theta: Base of the wavelengths, positive.
        use_xpos: Whether to scale as xPos does.
        scale_base: Distance over which xPos fades by ``zeta``. None means half a window, which
            needs a window of two tokens or more.
        reference: Give queries the angles that ``local-attention`` 1.11.2 gives them: those of the
            last window of the slab. Every distance is then off by ``look_forward * window_size``.
            Only checkpoints that were trained with these angles need them.

    Raises:
        ValueError: A field is out of range.

    Example:
        >>> rotary = Rotary(dim=4)
        >>> x = jnp.ones((3, 4))
        >>> def products(positions):
        ...     return rotate(x, rotary.query_table(positions)) @ rotate(x, rotary.key_table(positions)).T
        >>> bool(jnp.allclose(products(jnp.arange(3)), products(jnp.arange(5, 8)), atol=1e-5))
        True

    Source: RoFormer, arXiv 2104.09864, section 3.2; xPos, arXiv 2212.10554, section 2.2. The
    original's angles differ with ``look_forward > 0``, see
    ``tests/test_original.py::test_rotary_distances_are_right_when_looking_forward``.
    """

    dim: int
    theta: float = 10000.0
    use_xpos: bool = False
    scale_base: float | None = None
    reference: bool = False

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"`dim` of rotary must be even and positive, got {self.dim}; use an even `dim_head`.")
        if not 0 < self.theta < math.inf:
            raise ValueError(f"`theta` must be positive and finite, got {self.theta}; 10000.0 is usual.")
        if self.scale_base is not None and not 0 < self.scale_base < math.inf:
            raise ValueError(
                f"`scale_base` of xPos must be positive and finite, got {self.scale_base}; leave it out for w // 2."
            )

    def for_window(self, window_size: int) -> "Rotary":
        """Return this rotary with `scale_base` filled in, half of the window's size, where xPos needs it."""
        if not self.use_xpos or self.scale_base is not None:
            return self
        if window_size < 2:
            raise ValueError(
                f"xPos needs `scale_base` with `window_size={window_size}`: its default, half a window, "
                "would be 0; give `scale_base` (`xpos_scale_base` of the modules)."
            )
        return dataclasses.replace(self, scale_base=float(window_size // 2))

    def query_table(self, positions: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """Make the factors by which `rotate` turns queries at these positions.

        Args:
            positions: ``[..., n]`` integers that int32 can hold; for xPos, counted from a place nearby. Fractions, say
                of a subclass that interpolates, are as exact as float32.
            dtype: float32, or float64 where queries and keys are.

        Returns:
            Cosines and sines, scaled by xPos, ``[..., n, 2, d / 2]`` of `dtype`.
        """
        return self._table(positions, 1.0, dtype)

    def key_table(self, positions: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """Make the factors by which `rotate` turns keys at these positions; see `query_table`."""
        return self._table(positions, -1.0, dtype)

    def _table(self, positions, sign, dtype):
        m = np.arange(0, self.dim, 2) / self.dim
        angles = _angles(positions[..., None], self.theta**-m, dtype)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if self.use_xpos:
            assert self.scale_base is not None  # filled in by `for_window`
            t = positions[..., None].astype(dtype)
            scale = jnp.asarray((m + 0.4) / 1.4, dtype) ** (sign * t / self.scale_base)
            cos, sin = cos * scale, sin * scale
        return jnp.stack([cos, sin], -2)


def _angles(positions, frequencies, dtype):
    """Compute ``positions * frequencies`` less whole turns: within 4e-7 at any int32 position, for frequencies up to 1.

    In units of 2^-32 turns this is a product of integers, whose overflow drops whole turns. A second, small product
    adds the part of the frequencies beyond 32 bits. Positions with fractions are multiplied as they are.
    """
    if dtype == jnp.float64 or jnp.issubdtype(positions.dtype, jnp.floating):
        return positions.astype(dtype) * frequencies.astype(dtype)
    steps = frequencies / (2 * np.pi) * 2.0**32
    whole = np.round(steps)
    positions = positions.astype(jnp.int32)
    angles = positions * (whole % 2.0**32).astype(np.uint32).view(np.int32)
    angles += jnp.round(positions.astype(dtype) * (steps - whole).astype(dtype)).astype(jnp.int32)
    return angles.astype(dtype) * np.asarray(2 * np.pi / 2.0**32, dtype)


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Turn queries or keys by the positions that a table was made for.

    Args:
        x: ``[..., n, d]``.
        table: Factors from `Rotary.query_table` or `Rotary.key_table`, ``[n, 2, d / 2]``, or with leading axes that
            broadcast against x's.

    Returns:
        Turned x, ``[..., n, d]`` in x's dtype; computed in the table's.
    """
    real, imaginary = jnp.split(x.astype(table.dtype), 2, axis=-1)
    cos, sin = table[..., 0, :], table[..., 1, :]
    return jnp.concatenate([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).astype(x.dtype)
