"""Rotary position embedding and xPos, as pure functions of explicit positions."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import flax_local_attention.frequencies as published
from flax_local_attention.array_checks import (
    check_dtype,
    check_floating,
    check_integers,
    check_real,
)
from flax_local_attention.checks import (
    check_count,
    check_finite,
    check_flag,
    check_kind,
    check_number,
    check_positive,
    describe,
    optional,
)
from flax_local_attention.window import Window


@dataclasses.dataclass(frozen=True)
class Rotary:
    r"""Rotary position embedding, optionally with the length extrapolation of xPos.

    The first ``d = dim`` entries of a vector are read as ``d / 2`` complex numbers, the first half as real parts and
    the second half as imaginary parts. Entries after them stay as they are. At position ``t``, number ``m`` is rotated
    by the angle ``t theta^(-2m/d)``, so the product of a query and a key depends on their distance alone. xPos
    multiplies number ``m`` of a query by ``zeta_m^(t / scale_base)`` and divides number ``m`` of a key by the same
    factor, with ``zeta_m = (2m + 0.4 d) / (1.4 d)``: products of distant tokens fade.

    Angles are exact at any int32 position: a full turn is 2^32 steps of integer arithmetic, which wraps as angles do.
    For xPos, count positions from a place near the tokens, so that its scale stays in range.

    Args:
        dim: Rotated entries of a head, an even number: the first ones, or all.
        theta: Base of the wavelengths, positive.
        use_xpos: Whether to apply the scale of xPos.
        scale_base: Distance over which xPos fades by ``zeta``. None means half of `Window.span`: half a window,
            or half the reach of a window of size 1, such as `Window.sliding`. The span must be at least two tokens.
        reference: Reproduce the angles of ``local-attention`` 1.11.2, which places queries in the last window of the
            slab: every distance is off by ``look_forward * window_size``. Only checkpoints that were trained with
            these angles need them. Has no effect for a window without a limit.
        interleaved: Whether entries ``2m`` and ``2m + 1`` form a complex number, instead of one entry of each half.
        frequencies: Radians per token of each complex number, ``dim / 2`` finite numbers, in place of `theta`; 0 means
            no rotation. `linear`, `llama3`, `yarn` and `longrope` make the frequencies of published models.
        factor: Factor of cosines and sines, for queries and for keys.

    Raises:
        TypeError: A field has the wrong type, or is traced.
        ValueError: A field is out of range.

    Examples:
        >>> rotary = Rotary(dim=4)
        >>> x = jnp.ones((3, 4))
        >>> def products(positions):
        ...     return rotate(x, rotary, positions) @ rotate(x, rotary, positions).T
        >>> bool(jnp.allclose(products(jnp.arange(3)), products(jnp.arange(5, 8)), atol=1e-5))
        True

    Source: RoFormer, arXiv 2104.09864, section 3.2; xPos, arXiv 2212.10554, section 2.2. The angles of
    ``local-attention`` differ if ``look_forward > 0``, see
    ``tests/test_original.py::test_rotary_distances_are_right_when_looking_forward``.
    """

    dim: int
    theta: float = 10000.0
    use_xpos: bool = False
    scale_base: float | None = None
    reference: bool = False
    interleaved: bool = False
    frequencies: tuple[float, ...] | None = None
    factor: float = 1.0

    def __post_init__(self):
        _check_dim(self.dim)
        self._set("theta", check_positive("theta", self.theta))
        for name in ("use_xpos", "reference", "interleaved"):
            check_flag(name, getattr(self, name))
        self._set("scale_base", optional(check_positive)("scale_base", self.scale_base))
        self._set("frequencies", optional(self._check_frequencies)("frequencies", self.frequencies))
        self._set("factor", check_positive("factor", self.factor))

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def _check_frequencies(self, name, values):
        """Return frequencies as a tuple of floats."""
        if isinstance(values, jax.Array) and not isinstance(values, Tracer):
            values = np.asarray(values)
        if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
            raise TypeError(
                f"`{name}` must be a sequence of {self.dim // 2} numbers that are known before tracing, got "
                f"{describe(values)}; leave it out to use `theta`."
            )
        if len(values) != self.dim // 2:
            raise ValueError(
                f"`{name}` must be {self.dim // 2} numbers, one for each two of the {self.dim} rotated entries, got "
                f"{len(values)}; make `dim` twice the number of frequencies."
            )
        if self.theta != 10000.0:
            raise ValueError(f"`{name}` take the place of `theta`, got both, `theta` {self.theta}; give one of them.")
        return tuple(check_finite(name, value) for value in values)

    @classmethod
    def linear(cls, dim: int, theta: float = 10000.0, *, factor: float, interleaved: bool = False) -> "Rotary":
        """Make rotary with positions divided by `factor` (position interpolation, arXiv 2306.15595)."""
        _check_published(dim, theta)
        return cls._of(dim, published.plain(dim, theta) / check_positive("factor", factor), 1.0, interleaved)

    @classmethod
    def llama3(
        cls,
        dim: int,
        theta: float = 500000.0,
        *,
        factor: float = 8.0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        original_max_position_embeddings: int = 8192,
        interleaved: bool = False,
    ) -> "Rotary":
        """Make the rotary of Llama 3.1 and later, which stretches long wavelengths and keeps short ones.

        A wavelength longer than ``original_max_position_embeddings / low_freq_factor`` is multiplied by `factor`. One
        shorter than ``original_max_position_embeddings / high_freq_factor`` stays. Frequencies in between are blended.
        The arguments have the names of published configurations.

        Args:
            dim: As in `Rotary`.
            theta: As in `Rotary`.
            factor: Factor of the long wavelengths.
            low_freq_factor: Turns within the original length up to which a wavelength is fully stretched.
            high_freq_factor: Turns within the original length from which a wavelength stays.
            original_max_position_embeddings: Tokens that the model was first trained for.
            interleaved: As in `Rotary`.

        Examples:
            >>> rotary = Rotary.llama3(64)
            >>> rotary.frequencies[0], round(rotary.frequencies[-1] * 8, 9) == round(500000.0 ** (-62 / 64), 9)
            (1.0, True)
        """
        _check_published(dim, theta, original_max_position_embeddings)
        _check_order("high_freq_factor", high_freq_factor, "low_freq_factor", low_freq_factor)
        frequencies = published.llama3(
            dim,
            theta,
            factor=check_positive("factor", factor),
            low_freq_factor=check_positive("low_freq_factor", low_freq_factor),
            high_freq_factor=check_positive("high_freq_factor", high_freq_factor),
            original_length=original_max_position_embeddings,
        )
        return cls._of(dim, frequencies, 1.0, interleaved)

    @classmethod
    def yarn(
        cls,
        dim: int,
        theta: float = 10000.0,
        *,
        factor: float,
        original_max_position_embeddings: int,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        truncate: bool = True,
        interleaved: bool = False,
    ) -> "Rotary":
        """Make the rotary of YaRN (arXiv 2309.00071), which stretches long wavelengths and enlarges the scores a bit.

        A frequency that makes fewer than `beta_slow` turns within the original length is divided by `factor`. One that
        makes more than `beta_fast` turns stays. Frequencies in between are blended. The arguments have the names of
        published configurations.

        Args:
            dim: As in `Rotary`.
            theta: As in `Rotary`.
            factor: Divisor of the low frequencies.
            original_max_position_embeddings: Tokens that the model was first trained for.
            beta_fast: Turns within the original length from which a frequency stays.
            beta_slow: Turns within the original length up to which a frequency is fully divided.
            attention_factor: The `factor` of the `Rotary`. With ``scale(x) = 0.1 x ln(factor) + 1``, None means
                ``scale(mscale) / scale(mscale_all_dim)`` if both are given, else ``scale(1)``.
            mscale: See `attention_factor`. 0 counts as None, as in published configurations.
            mscale_all_dim: See `attention_factor`. 0 counts as None.
            truncate: Whether the borders of the blend are rounded outwards to whole indices.
            interleaved: As in `Rotary`.

        Examples:
            >>> rotary = Rotary.yarn(64, theta=150000.0, factor=32.0, original_max_position_embeddings=4096)
            >>> round(rotary.factor, 4)
            1.3466
        """
        _check_published(dim, theta, original_max_position_embeddings)
        _check_order("theta", theta, "1", 1)
        _check_order("beta_fast", beta_fast, "beta_slow", beta_slow)
        check_flag("truncate", truncate)
        for name, value in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
            optional(check_number)(name, value)
            if value:  # 0 is None in published configurations
                check_positive(name, value)
        frequencies = published.yarn(
            dim,
            theta,
            factor=check_positive("factor", factor),
            original_length=original_max_position_embeddings,
            beta_fast=check_positive("beta_fast", beta_fast),
            beta_slow=check_positive("beta_slow", beta_slow),
            truncate=truncate,
        )
        optional(check_positive)("attention_factor", attention_factor)
        if attention_factor is None:
            attention_factor = published.yarn_factor(factor, mscale, mscale_all_dim)
        return cls._of(dim, frequencies, attention_factor, interleaved)

    @classmethod
    def longrope(
        cls,
        dim: int,
        theta: float = 10000.0,
        *,
        factors: Sequence[float],
        factor: float,
        original_max_position_embeddings: int,
        attention_factor: float | None = None,
        interleaved: bool = False,
    ) -> "Rotary":
        """Make the rotary of LongRoPE (arXiv 2402.13753) as in Phi-3.

        Args:
            dim: As in `Rotary`.
            theta: As in `Rotary`.
            factors: Divisors of the frequencies, ``dim / 2`` positive numbers: a configuration's ``short_factor`` for
                texts up to `original_max_position_embeddings`, its ``long_factor`` for longer ones.
            factor: The ratio ``max_position_embeddings / original_max_position_embeddings``.
            original_max_position_embeddings: Tokens that the model was first trained for.
            attention_factor: The `factor` of the `Rotary`. None means
                ``sqrt(1 + ln(factor) / ln(original_max_position_embeddings))``.
            interleaved: As in `Rotary`.
        """
        _check_published(dim, theta, original_max_position_embeddings, 2)
        if not isinstance(factors, Sequence | np.ndarray) or len(factors) != dim // 2:
            raise ValueError(
                f"`factors` must be a sequence of {dim // 2} numbers, half of `dim`, got {describe(factors)}; take "
                "`short_factor` or `long_factor` of the configuration."
            )
        divisors = [check_positive("factors", value) for value in factors]
        optional(check_positive)("attention_factor", attention_factor)
        if attention_factor is None:
            attention_factor = published.longrope_factor(
                check_positive("factor", factor), original_max_position_embeddings
            )
        return cls._of(dim, published.longrope(dim, theta, divisors), attention_factor, interleaved)

    @classmethod
    def _of(cls, dim, frequencies, factor, interleaved):
        return cls(dim, frequencies=tuple(map(float, frequencies)), factor=factor, interleaved=interleaved)

    def for_window(self, window: Window) -> "Rotary":
        """Return this rotary with the fields that depend on the window filled in.

        With xPos, a `scale_base` of None becomes half of `Window.span`. For a window without a limit, `reference`
        becomes False.

        Args:
            window: The window that queries attend in.

        Raises:
            TypeError: `window` is not a `Window`.
            ValueError: The window is too small for a default `scale_base`, or has no limit and rotary has xPos.
        """
        check_kind("window", window, Window, "write for example `Window(512, causal=True)`")
        if window.is_global:
            if self.use_xpos:
                raise ValueError(
                    f"`use_xpos` needs a window with a limit, got {window}: its scale would leave float32's range; use "
                    "`window.within(n)`, or rotary without xPos."
                )
            return dataclasses.replace(self, reference=False) if self.reference else self
        if not self.use_xpos or self.scale_base is not None:
            return self
        if window.span < 2:
            raise ValueError(
                f"`scale_base` of xPos must be given for {window}, got None: its default, half a window, would be 0; "
                "give one (`xpos_scale_base` in modules)."
            )
        return dataclasses.replace(self, scale_base=float(window.span // 2))

    def query_table(self, positions: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """Make the table by which `turn` rotates queries at these positions.

        Args:
            positions: ``[..., n]`` integers in the range of int32; for xPos, counted from a place nearby. Fractional
                positions, such as those of a subclass that interpolates, are as exact as float32.
            dtype: float32, or float64 if queries and keys are float64.

        Returns:
            Cosines and sines, scaled by xPos, ``[..., n, 2, dim / 2]`` of `dtype`.
        """
        return self._table(positions, 1.0, dtype)

    def key_table(self, positions: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """Make the table by which `turn` rotates keys at these positions; see `query_table`."""
        return self._table(positions, -1.0, dtype)

    def _table(self, positions, sign, dtype):
        check_real("positions", positions, "they count tokens")
        check_dtype("dtype", dtype)
        frequencies = self.frequencies
        frequencies = published.plain(self.dim, self.theta) if frequencies is None else np.array(frequencies)
        before = tuple(range(positions.ndim))  # axes of positions
        angles = _angles(positions[..., None], np.expand_dims(frequencies, before), dtype)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if self.use_xpos:
            assert self.scale_base is not None  # filled in by `for_window`
            m = np.expand_dims(np.arange(0, self.dim, 2) / self.dim, before)
            t = positions[..., None].astype(dtype)
            scale = jnp.asarray((m + 0.4) / 1.4, dtype) ** (sign * t / self.scale_base)
            cos, sin = cos * scale, sin * scale
        table = jnp.stack([cos, sin], -2)
        return table if self.factor == 1 else table * self.factor

    def turn(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Rotate queries or keys by the positions that a table was made for.

        Args:
            x: ``[..., n, d]`` with d at least `dim`.
            table: Table from `query_table` or `key_table`, ``[n, 2, dim / 2]``, or with leading axes that broadcast
                against x's.

        Returns:
            Rotated x, ``[..., n, d]`` in x's dtype; computed in the table's dtype.
        """
        table = jnp.expand_dims(table, tuple(range(x.ndim + 1 - table.ndim)))
        turning, rest = x[..., : self.dim].astype(table.dtype), x[..., self.dim :]
        if self.interleaved:
            pairs = turning.reshape(*turning.shape[:-1], self.dim // 2, 2)
            turned = jnp.stack(_multiply(pairs[..., 0], pairs[..., 1], table), -1).reshape(turning.shape)
        else:
            real, imaginary = jnp.split(turning, 2, axis=-1)
            turned = jnp.concatenate(_multiply(real, imaginary, table), -1)
        turned = turned.astype(x.dtype)
        return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def _check_dim(dim):
    """Raise unless `dim` is a positive even number."""
    check_count("dim", dim, 2)
    if dim % 2:
        raise ValueError(f"`dim` of rotary must be even, got {dim}; use an even `dim_head`, or rotate fewer entries.")


def _check_published(dim, theta, original_length=1, least=1):
    """Raise unless these arguments of the published rotaries are in range."""
    _check_dim(dim)
    check_positive("theta", theta)
    check_count("original_max_position_embeddings", original_length, least)


def _check_order(name, value, other_name, other):
    """Raise unless `value` is larger than `other`, both positive."""
    if not check_positive(name, value) > check_positive(other_name, other):
        raise ValueError(
            f"`{name}` must be larger than `{other_name}`, got {value} and {other}; take both from the configuration."
        )


def _multiply(real, imaginary, table):
    """Multiply complex numbers by the complex numbers of a table; return real and imaginary parts."""
    cos, sin = table[..., 0, :], table[..., 1, :]
    return real * cos - imaginary * sin, imaginary * cos + real * sin


def _angles(positions, frequencies, dtype):
    """Compute ``positions * frequencies`` modulo a turn, within 4e-7 at any int32 position for frequencies up to 1.

    In units of 2^-32 turns this is a product of integers, whose overflow drops whole turns. A second, small product
    adds the part of the frequencies beyond 32 bits. Fractional positions are multiplied in floating point.
    """
    if dtype == jnp.float64 or jnp.issubdtype(positions.dtype, jnp.floating):
        return positions.astype(dtype) * frequencies.astype(dtype)
    steps = frequencies / (2 * np.pi) * 2.0**32
    whole = np.round(steps)
    positions = positions.astype(jnp.int32)
    angles = positions * (whole % 2.0**32).astype(np.uint32).view(np.int32)
    angles += jnp.round(positions.astype(dtype) * (steps - whole).astype(dtype)).astype(jnp.int32)
    return angles.astype(dtype) * np.asarray(2 * np.pi / 2.0**32, dtype)


def rotate(x: jax.Array, rotary: Rotary, positions: jax.Array) -> jax.Array:
    """Rotate queries or keys by their positions.

    Args:
        x: ``[..., n, d]``, usually ``[b, h, n, d]``.
        rotary: The rotary, without xPos, which scales queries and keys differently.
        positions: ``[n]`` integers, or ``[b, n]`` with b the first axis of x, or 1.

    Returns:
        Rotated x, with x's shape and dtype.

    Raises:
        TypeError: `x` is not of a floating dtype, `rotary` is not a `Rotary`, or positions are not integers.
        ValueError: Shapes do not fit together, or rotary has xPos.

    Examples:
        >>> x = jnp.ones((2, 8, 5, 64))
        >>> rotate(x, Rotary(64), jnp.arange(5)).shape, rotate(x, Rotary(64), jnp.zeros((2, 5), int)).shape
        ((2, 8, 5, 64), (2, 8, 5, 64))
    """
    check_floating("x", x)
    check_kind("rotary", rotary, Rotary, "write for example `Rotary(64)`")
    check_integers("positions", positions, "they count tokens")
    if rotary.use_xpos:
        raise ValueError(
            "`rotary` must be without xPos, which scales queries and keys differently, got use_xpos=True; write "
            "rotary.turn(q, rotary.query_table(positions)) and rotary.turn(k, rotary.key_table(positions))."
        )
    if x.ndim < 2 or x.shape[-1] < rotary.dim:
        raise ValueError(
            f"`x` must be [..., n, d] with d at least `rotary.dim` ({rotary.dim}), got shape {x.shape}; reshape it."
        )
    rows = positions.shape[:-1]
    if positions.ndim not in (1, 2) or positions.shape[-1] != x.shape[-2] or rows not in ((), (1,), x.shape[:-2][:1]):
        raise ValueError(
            f"`positions` must be [n] or [b, n] for `x` [b, ..., n, d], got {positions.shape} for {x.shape}; reshape "
            "them."
        )
    x, positions = jnp.asarray(x), jnp.asarray(positions)
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    between = (1,) * (x.ndim - 2 - len(rows))
    return rotary.turn(x, rotary.query_table(positions.reshape(*rows, *between, -1), dtype))
