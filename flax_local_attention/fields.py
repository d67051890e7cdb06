"""Fields that several modules share, declared and documented once, and how a module passes them on to its parts.

All of them are keyword-only. A module declares only its own fields, the original's positional ones first.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike

from flax_local_attention.checks import check_count
from flax_local_attention.field_checks import check_fields
from flax_local_attention.kernels import Implementation
from flax_local_attention.rotary import Rotary
from flax_local_attention.window import Window

Made = TypeVar("Made")
Cache = TypeVar("Cache")

# Heading of inherited attributes in the docstring of a module.
MORE_ATTRIBUTES = "Attributes: Keyword-only, shared with other modules"


def linear_init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
    """Draw the weights of a linear layer, ``[fan_in, features]``, uniform within ``+-fan_in^(-1/2)``, like PyTorch."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def embedding_init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
    """Draw embeddings from a standard normal distribution, like PyTorch."""
    return nn.initializers.normal(1.0)(key, shape, dtype)


def linear_bias_init(fan_in: int) -> Initializer:
    """Make the initialiser of a linear layer's bias, uniform within ``+-fan_in^(-1/2)``."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def window_of(module: Any, size: int | Window | None) -> Window:
    """Return `size` if it is a window; else make one of that size from the fields of a module.

    Args:
        module: Module with the fields `causal`, `look_backward`, `look_forward` and `exact_windowsize`.
        size: Tokens in a window, None for no limit, or a window.

    Raises:
        TypeError: `size` is none of these.
        ValueError: A size is out of range; or a window is given, and a field that counts windows is not at its default
            or the module is causal and the window is not.
    """
    if size is None:
        return Window(None, module.causal)
    if not isinstance(size, Window):
        return Window(size, module.causal, module.look_backward, module.look_forward, module.exact_windowsize)
    fields = {name: getattr(module, name) for name in ("look_backward", "look_forward", "exact_windowsize")}
    given = [f"`{name}` {value}" for name, value in fields.items() if value != getattr(type(module), name)]
    if given:
        raise ValueError(
            f"`window_size` as a Window replaces the fields of a window, got {size} and {' and '.join(given)}; leave "
            "them out."
        )
    if module.causal and not size.causal:
        raise ValueError(
            f"The Window of a module with `causal=True` must be causal, got {size}; set `causal=False` to look ahead."
        )
    return size


def resolve_window(
    module: Any, size: int | Window | None, given: int | Window | None
) -> tuple[int | Window | None, float | None]:
    """Find the window of a call, and the distance over which xPos fades in it.

    Args:
        module: Module with the fields `use_xpos`, `xpos_scale_base` and those of `window_of`.
        size: Window of the module, or of one of its layers, as in `window_of`.
        given: Another window for this call. None means `size`.

    Returns:
        A `size` for `window_of`, and the distance. The distance always follows from the module's own window:
        extrapolation to another window relies on it.

    Raises:
        ValueError: A window is given for a module that is global or has no xPos.
    """
    if given is None:
        return size, module.xpos_scale_base
    own = window_of(module, size)
    if own.is_global or not module.use_xpos:
        raise ValueError(
            f"A `window_size` in a call requires a local module with `use_xpos=True`, got {given} without; "
            "only xPos extrapolates to other windows: set it, or make a module with that window."
        )
    return given, Rotary(2, use_xpos=True, scale_base=module.xpos_scale_base).for_window(own).scale_base


class CacheShape(NamedTuple):
    """Arguments of `MultiHead.init_cache` that all layers share."""

    batch: int
    dtype: Dtype | None
    max_length: int | None
    rewind: int
    keep_first: int


class Fields(nn.Module):
    """Base of modules that share fields: `make` passes them on, and docstrings list the fields of all bases."""

    _shared = frozenset()  # names of the fields of this file that a module has

    def __init_subclass__(cls, **options: Any):
        """Keep redeclared fields keyword-only, and list inherited attributes in the docstring."""
        _keep_keyword_only(cls)
        super().__init_subclass__(**options)
        bases = [base for base in cls.__mro__ if base.__module__ == __name__]
        names = {name for base in bases for name in inspect.get_annotations(base)}
        cls._shared = frozenset(names - {"parent", "name"})  # without Flax's own
        if cls.__module__ != __name__ and cls.__doc__ and MORE_ATTRIBUTES not in cls.__doc__:
            inherited = "\n".join(filter(None, map(_attributes, bases)))
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{MORE_ATTRIBUTES}\n{inherited}\n"

    def __post_init__(self):
        self.check_fields()
        super().__post_init__()

    @nn.nowrap
    def check_fields(self):
        """Raise unless every field is valid by itself; subclasses also check that fields fit together."""
        check_fields(self)

    @nn.nowrap
    def make(self, kind: type[Made], *args: Any, **own: Any) -> Made:
        """Make a module or options; fields of this file that `kind` and this module share get this module's values.

        Args:
            kind: Class to make an instance of, a dataclass.
            *args: Further fields, by position.
            **own: Further fields, and shared fields with other values.
        """
        fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]  # a module is a dataclass
        handed = {field.name: getattr(self, field.name) for field in fields if field.name in self._shared}
        return kind(*args, **(handed | own))


def _keep_keyword_only(cls):
    """Mark inherited fields that a subclass redeclares, with another default for example, as keyword-only.

    Otherwise a redeclared field would become positional and come before all others.
    """
    bases = [base for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base) if field.kw_only}
    for name in inherited.intersection(inspect.get_annotations(cls)):
        default = getattr(cls, name)
        if not isinstance(default, dataclasses.Field):
            setattr(cls, name, dataclasses.field(default=default, kw_only=True))


def _attributes(base):
    """Return the lines of a base's docstring that document its attributes."""
    lines = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
    return lines.rstrip()


class Dtypes(Fields, kw_only=True):
    """Fields of modules with parameters.

    Attributes:
        dtype: Dtype of the computation. None means the dtype that input and parameters promote to.
        param_dtype: Dtype of the parameters.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32


class Products(Fields, kw_only=True):
    """Field of modules with matrix products.

    Attributes:
        precision: Precision of the matrix products, as in `jax.numpy.einsum`.
    """

    precision: PrecisionLike = None


class Kernels(Fields, kw_only=True):
    """Field of modules that fused kernels may serve.

    Attributes:
        implementation: Implementation of attention, see `local_attention`. Under "triton" and None, norms, embeddings
            and residual streams run in kernels too, on the devices and shapes that these serve.
    """

    implementation: str | Implementation | None = None


class Dropping(Fields, kw_only=True):
    """Field of modules with dropout.

    Attributes:
        deterministic: Whether to turn dropout off; a call may override it. Dropout requires an rng named ``dropout``.
    """

    deterministic: bool = True


class Branch(Dtypes, Products, Kernels, Dropping, kw_only=True):
    """Fields of a branch of the transformer: attention, feed-forward, or both.

    Attributes:
        kernel_init: Initialiser of the projections from the model's width. Wrap it in ``nn.with_partitioning`` to shard
            their weights.
        out_kernel_init: Initialiser of the projections back to the model's width.
    """

    kernel_init: Initializer = linear_init
    out_kernel_init: Initializer = linear_init


class Scores(Products, Kernels, Dropping, kw_only=True):
    """Fields of every module with local attention that the original lacks, or takes by keyword only.

    Attributes:
        reference_rotary: Whether to reproduce the original's angles, see `reference` of `Rotary`.
        logits_soft_cap: Bound of the scaled scores, ``cap tanh(score / cap)``, before the bias. None means no bound.
        rotary: Rotary position embedding of queries and keys, in place of `use_xpos`, `xpos_scale_base` and
            `reference_rotary`. False means none; None means the one that those fields define. A `LocalTransformer` also
            takes a sequence, one for each layer.
    """

    reference_rotary: bool = False
    logits_soft_cap: float | None = None
    rotary: Rotary | bool | Sequence[Rotary | bool | None] | None = None


class MultiHead(Branch, Scores, Generic[Cache], kw_only=True):
    """Fields of multi-head local attention, alone and in a transformer, and how both make their caches.

    Attributes:
        dim_head: Width of a head.
        heads: Heads of queries.
        kv_heads: Heads of keys and values, a divisor of `heads`. None means as many as `heads`.
        qk_rmsnorm: Whether q and k are L2-normalised, each with a learned gain.
        qk_scale: Factor of the scores under `qk_rmsnorm`.
        scale: Factor of the scores in any case. None means `qk_scale` under `qk_rmsnorm`, else ``dim_head ** -0.5``.
        use_xpos: Whether rotary fades with distance (xPos), so that a call may give a larger window.
        xpos_scale_base: Distance over which xPos fades. None means half a window.
        exact_windowsize: Count distances from the query, not from its window's borders.
        gate_values_per_head: Whether to scale each head's output by a learned sigmoid gate.
        look_backward: Windows seen before a query's own.
        look_forward: Windows seen after a query's own. None means 0 if causal, else 1.
        shared_qk: Whether queries double as keys, see `local_attention`.
        attention_sinks: Whether each head has a learned logit for attending to nothing.
        use_bias: Whether the projection to q, k and v adds a bias.
        use_out_bias: Whether the projection back to the model's width adds a bias.
        dim_value: Width of a head's values. None means `dim_head`.
        memory_tokens: Number of learned keys and values that every query sees besides its window, in each layer and
            head of keys. They have no position (persistent memory, arXiv 1907.01470).
    """

    dim_head: int = 64
    heads: int = 8
    kv_heads: int | None = None
    qk_rmsnorm: bool = False
    qk_scale: float = 8
    use_xpos: bool = False
    xpos_scale_base: float | None = None
    exact_windowsize: bool = True
    gate_values_per_head: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    shared_qk: bool = False
    attention_sinks: bool = False
    use_bias: bool = False
    use_out_bias: bool = False
    dim_value: int | None = None
    memory_tokens: int = 0
    scale: float | None = None

    @nn.nowrap
    def check_fields(self):
        """Raise unless every field is valid, and `kv_heads` divides `heads`."""
        super().check_fields()
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"`kv_heads` must divide `heads` ({self.heads}), got {self.kv_heads}; choose a divisor.")

    @nn.nowrap
    def init_cache(
        self,
        batch: int,
        dtype: Dtype | None = None,
        max_length: int | None = None,
        window_size: int | Window | None = None,
        rewind: int = 0,
        keep_first: int = 0,
    ) -> Cache:
        """Make an empty cache. This requires no parameters and works on an unbound module.

        Args:
            batch: Rows.
            dtype: Floating dtype of keys and values. None means the module's `dtype`, or `param_dtype` without one.
            max_length: Most tokens that a layer remembers, the last ones, for windows that are longer or have no limit.
                None means `max_seq_len` in a transformer with absolute embeddings, and otherwise the whole window; a
                global layer then requires a number.
            window_size: The window of the calls, if they give one.
            rewind: Most tokens that the cache's `rewind` may forget.
            keep_first: Tokens at the beginning of each row that all later tokens see, see `KVCache.create`.

        Returns:
            A `KVCache` for attention alone, a `TransformerCache` for a transformer.

        Raises:
            TypeError: A size is not an int, or `dtype` is not floating.
            ValueError: A size is out of range, the module is not causal, or an inserted global layer has no
                `init_cache`.
        """
        if max_length is not None:
            check_count("max_length", max_length, 1)
        return self.make_cache(CacheShape(batch, dtype, max_length, rewind, keep_first), window_size)

    @nn.nowrap
    def make_cache(self, shape: CacheShape, window_size: int | Window | None = None) -> Cache:
        """Make the module's empty cache from checked sizes."""
        raise NotImplementedError
