"""Calls of attention drawn by hypothesis: any window, length, dtype and options that an implementation supports.

A `Call` prints all of its fields, so that a failure can be reproduced from its message.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from flax_local_attention import TPU, MosaicGPU, Rotary, Triton, Window, Windowed, local_attention
from flax_local_attention.kernels.mosaic import Tiles as MosaicTiles
from flax_local_attention.kernels.pallas_mosaic import Tile as MosaicTile
from flax_local_attention.kernels.pallas_mosaic import has_interpreter
from flax_local_attention.kernels.pallas_tpu import Block
from flax_local_attention.kernels.pallas_triton import Tile as TritonTile
from flax_local_attention.kernels.primitives import Target
from flax_local_attention.kernels.tpu import Tiles as TPUTiles
from flax_local_attention.kernels.triton import Tiles as TritonTiles
from tests import definition

ON_GPU = jax.default_backend() == "gpu"

POISONS = (0.0, np.nan, np.inf, -np.inf, 1e30)
"""Values of masked tokens; 1e30 is infinity in float16."""


class Served(NamedTuple):
    """An implementation to test and what it supports; its own list of problems must agree.

    Attributes:
        implementation: Name or value; a number stands for `Windowed` with a drawn block size.
        dtypes: Dtypes of q, k and v.
        widths: Head sizes.
        multiple: Lengths are multiples of it.
        refuses: Features that it does not support.
    """

    implementation: Any
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")
    widths: tuple[int, ...] = (64, 32, 80) if ON_GPU else (4, 2, 5, 16)
    multiple: int = 1
    refuses: frozenset[str] = frozenset()


BY_KERNELS = frozenset({"xpos", "traced_scale", "negative_scale", "head_mask_of_groups"})
NARROW = ("bfloat16", "float16")
_TRITON, _MOSAIC = TritonTile(16, 16), MosaicTile(64, 64, 2, 2)

# Dense counts positions from the first key, so the scale of xPos overflows sooner.
IMPLEMENTATIONS = {"dense": Served("dense"), "xla": Served("xla"), "fastest": Served(None)}
if ON_GPU:
    IMPLEMENTATIONS["triton"] = Served(
        Triton(), ("bfloat16", "float16", "float32"), (64, 32, 128, 80), 1, BY_KERNELS | {"odd_bias"}
    )
    _capability = tuple(map(int, jax.devices()[0].compute_capability.split(".")))
    if MosaicGPU().problem_of(Target("cuda", _capability)) is None:
        IMPLEMENTATIONS["mosaic"] = Served(
            MosaicGPU(), NARROW, (64, 128, 80), 8, BY_KERNELS | {"bias", "shared_qk", "traced_offset"}
        )
else:
    IMPLEMENTATIONS["triton"] = Served(
        Triton(TritonTiles(_TRITON, _TRITON, _TRITON), interpret=True),
        ("float32", "bfloat16", "float16"),
        (16, 4, 5),
        1,
        BY_KERNELS | {"odd_bias"},
    )
    IMPLEMENTATIONS["tpu"] = Served(
        TPU(TPUTiles(Block(32, 16), Block(16, 32), Block(16, 16)), interpret=True),
        ("float32", "bfloat16"),
        (16, 4, 5),
        1,
        BY_KERNELS | {"bias"},
    )
    # Interpreted kernels of Mosaic GPU take seconds: CI leaves them to their own tests.
    if has_interpreter() and not settings.default.derandomize:
        IMPLEMENTATIONS["mosaic"] = Served(
            MosaicGPU(MosaicTiles(_MOSAIC, _MOSAIC, _MOSAIC), interpret=True),
            NARROW,
            (64,),
            8,
            BY_KERNELS | {"bias", "shared_qk", "traced_offset"},
        )

SIZES = (3, 1, 2, 5, 8, 16, *((64, 100, 256) if ON_GPU else ()), 10**9, None)
LENGTHS = (13, 7, 1, 2, 24, 40, 0, *((65, 200, 519) if ON_GPU else ()))


def as_array(seed, dtype, *shape, size=1.0):
    """Draw unit normals times a size as a NumPy array of a dtype, which both sides receive."""
    wide = size * np.random.RandomState(seed).standard_normal(shape)
    return wide if dtype == "float64" else np.asarray(wide, np.float32).astype(jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of attention; a feature at its default is left out.

    Attributes:
        implementation: Name of a row of `IMPLEMENTATIONS`.
        window: Fields of a `Window`.
        n, n_keys, offset: Queries, keys, and the position of the first query.
        b, kv_heads, group, d, d_value: Sizes.
        dtype: Dtype of q, k, v and a bias.
        size: Factor on the queries, and so on the logits.
        seed: Seed of all arrays.
        block: Block size of `Windowed`, in place of "xla".
        traced_offset: Whether the offset is an array.
        mask: "rows", "heads" or None: the axes of a mask before the tokens.
        segments: Whether documents are packed.
        bias: "heads", "rows" or "shared": the axes of a bias; None for none.
        shut: Share of the bias's entries that are -inf.
        sinks, shared_qk, soft_cap: Options.
        global_keys: Number of global keys. Every third is masked if `mask` is given.
        scale: A number, or None.
        traced_scale: Whether the scale is an array, with a gradient.
        rotary: Fields of a `Rotary`, or None.
    """

    implementation: str
    window: dict
    n: int
    n_keys: int
    offset: int = 0
    b: int = 1
    kv_heads: int = 1
    group: int = 1
    d: int = 4
    d_value: int = 4
    dtype: str = "float32"
    size: float = 1.0
    seed: int = 0
    block: int | None = None
    traced_offset: bool = False
    mask: str | None = None
    segments: bool = False
    bias: str | None = None
    shut: float = 0.0
    sinks: bool = False
    shared_qk: bool = False
    soft_cap: float | None = None
    global_keys: int = 0
    scale: float | None = None
    traced_scale: bool = False
    rotary: dict | None = None

    @property
    def heads(self):
        return self.kv_heads * self.group

    def arrays(self, seed=None):
        """Return the arrays with gradients, by name, and those without, as NumPy arrays."""
        seed = self.seed if seed is None else seed

        def make(number, *shape, dtype=self.dtype, size=1.0):
            return as_array(12 * seed + number, dtype, *shape, size=size)

        b, h = self.b, self.kv_heads
        arrays = {
            "q": make(0, b, self.heads, self.n, self.d, size=self.size),
            "k": make(1, b, h, self.n_keys, self.d),
            "v": make(2, b, h, self.n_keys, self.d_value),
        }
        if self.bias is not None:
            lead = {"heads": (self.heads,), "rows": (b, self.heads), "shared": (1,)}[self.bias]
            bias = make(3, *lead, *definition.bias_shape(self.window, self.n, self.n_keys, self.offset))
            shut = np.random.RandomState(12 * seed + 4).rand(*bias.shape) < self.shut
            arrays["attn_bias"] = np.where(shut, -np.inf, bias).astype(bias.dtype)
        if self.sinks:
            arrays["sinks"] = make(5, self.heads, dtype="float64" if self.dtype == "float64" else "float32")
        if self.traced_scale:
            arrays["scale"] = np.asarray(self.scale, np.float64 if self.dtype == "float64" else np.float32)
        if self.global_keys:
            arrays["global_keys"] = (
                make(6, h, self.global_keys, self.d),
                make(7, h, self.global_keys, self.d_value),
            )
        fixed, draw = {}, np.random.RandomState(12 * seed + 8)
        if self.mask is not None:
            lead = (b,) if self.mask == "rows" else (b, self.heads)
            fixed["mask"] = draw.rand(*lead, self.n_keys) > 0.3
            if self.global_keys:
                fixed["global_mask"] = np.broadcast_to(np.arange(self.global_keys) % 3 > 0, (b, self.global_keys))
        if self.segments:
            fixed["segment_ids"] = np.cumsum(draw.rand(b, self.n_keys) < 0.2, axis=1).astype(np.int32) * 7 - 9
        return arrays, fixed

    def rules(self):
        """Return everything that is not an array, for the definition."""
        return definition.Rules(
            window=self.window,
            rotary=self.rotary,
            scale=None if self.traced_scale else self.scale,
            soft_cap=self.soft_cap,
            shared_qk=self.shared_qk,
            q_offset=self.offset,
        )

    def kernels(self):
        """Return the implementation."""
        named = IMPLEMENTATIONS[self.implementation].implementation
        return Windowed(self.block) if named == "xla" and self.block else named

    def attend(self, arrays, fixed, **more):
        """Call `local_attention`; return its output and log-sum-exp."""
        arrays, fixed = dict(arrays), dict(fixed)
        if "global_keys" in arrays:
            global_mask = fixed.pop("global_mask", None)
            arrays["global_keys"] = (*arrays["global_keys"], *([] if global_mask is None else [global_mask]))
        options = {"q_offset": self.offset} | fixed
        if not self.traced_scale:
            options["scale"] = self.scale
        out, log_sum = local_attention(
            **arrays,
            **options | more,
            window=Window(**self.window),
            rotary=None if self.rotary is None else Rotary(**self.rotary),
            shared_qk=self.shared_qk,
            logits_soft_cap=self.soft_cap,
            implementation=self.kernels(),
            return_log_sum=True,
        )
        return out, log_sum.log_sum_exp()

    def traced(self, fixed):
        """Add the offset to the arrays without gradients if it is traced."""
        return fixed | {"q_offset": np.int32(self.offset)} if self.traced_offset else fixed


@st.composite
def windows(draw, sizes=SIZES):
    """Draw the fields of a window."""
    size, causal = draw(st.sampled_from(sizes)), draw(st.booleans())
    if size is None:
        return {"window_size": None, "causal": causal}
    return {
        "window_size": size,
        "causal": causal,
        "look_backward": draw(st.integers(0, 3)),
        "look_forward": 0 if causal else draw(st.integers(0, 2)),
        "exact_windowsize": draw(st.booleans()),
    }


def is_likely(draw, share=3):
    """Draw whether a call has a feature, with probability 1 / `share`."""
    return draw(st.integers(0, share - 1)) == share - 1


@st.composite
def rotaries(draw, d, window, refuses, is_dense, dtype):
    """Draw the fields of a rotary, or None."""
    if d < 2 or not is_likely(draw, 2):
        return None
    widest = d // 2 * 2
    dim = draw(st.sampled_from(sorted({widest, 2 if d < 16 else widest // 2}, reverse=True)))
    fields = {"dim": dim, "interleaved": draw(st.booleans())}
    kinds = ("theta", "frequencies", "xpos", "reference")
    kind = draw(st.sampled_from([kind for kind in kinds if kind not in refuses]))
    if kind == "frequencies":
        numbers = st.sampled_from((0.3, 1.0, 0.0, -0.1, 7.0))
        return fields | {"frequencies": tuple(draw(numbers) for _ in range(dim // 2)), "factor": 1.2}
    fields["theta"] = draw(st.sampled_from((1e4, 50.0)))
    is_limited = window["window_size"] is not None
    if kind == "reference":
        return fields | {"reference": True}
    may_fade = is_limited and window["window_size"] < 100
    if kind == "xpos" and may_fade and (not is_dense or dtype in ("float32", "float64")):
        w, backward, forward = definition.reach(window)
        bases = [float(backward + w + forward)]
        if window["causal"] and definition.default_scale_base(window) >= 1:
            bases.append(None)
        fields |= {"use_xpos": True, "scale_base": 64.0 if is_dense else draw(st.sampled_from(bases))}
    return fields


@st.composite
def calls(draw, name, dtypes=None, lengths=LENGTHS, without=frozenset()):
    """Draw a call that an implementation supports.

    Args:
        draw: Function of hypothesis that draws from a strategy.
        name: Row of `IMPLEMENTATIONS`.
        dtypes: Dtypes to draw from; None means all that are supported.
        lengths: Sequence lengths to draw from.
        without: Features to leave out.
    """
    served = IMPLEMENTATIONS[name]
    refuses = served.refuses | set(without)
    dtype = draw(st.sampled_from([x for x in served.dtypes if dtypes is None or x in dtypes]))
    window = draw(windows())
    lengths = st.sampled_from(lengths).map(lambda n: -(-n // served.multiple) * served.multiple)
    n, n_keys = draw(lengths), None
    segments = "segments" not in refuses and is_likely(draw)
    offset = 0
    if segments or "offset" in refuses or is_likely(draw, 2):
        n_keys = n
    else:
        n_keys = draw(lengths)
        offset = draw(st.sampled_from((0, 1, 4, 17)))
    d = draw(st.sampled_from(served.widths))
    call = Call(
        implementation=name,
        window=window,
        n=n,
        n_keys=n_keys,
        offset=offset,
        b=draw(st.sampled_from((1, 2))),
        kv_heads=draw(st.sampled_from((1, 2))),
        group=draw(st.sampled_from((1, 2, 3))),
        d=d,
        d_value=draw(st.sampled_from((d, d - 1 if d == 5 else d // 2, d))),
        dtype=dtype,
        size=draw(st.sampled_from((1.0, 4.0, 0.01))),
        seed=draw(st.integers(0, 99)),
        block=draw(st.sampled_from((8, None, 1, 3))) if name == "xla" else None,
        segments=segments,
        rotary=draw(rotaries(d, window, refuses, name in ("dense", "fastest"), dtype)),
    )
    features: dict[str, Any] = {}
    if "mask" not in refuses and is_likely(draw):
        has_heads = not ("head_mask" in refuses or ("head_mask_of_groups" in refuses and call.group > 1))
        features["mask"] = draw(st.sampled_from(("rows", "heads") if has_heads else ("rows",)))
    if _takes_bias(refuses, window) and is_likely(draw):
        features |= {
            "bias": draw(st.sampled_from(("heads", "rows", "shared"))),
            "shut": draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        }
    for feature in ("sinks", "shared_qk"):
        features[feature] = feature not in refuses and is_likely(draw)
    if is_likely(draw):
        features["soft_cap"] = draw(st.sampled_from((1.5, 0.1, 50.0)))
    if "global_keys" not in refuses and is_likely(draw, 4):
        features["global_keys"] = 8 if served.multiple > 1 else 3
    if is_likely(draw):
        features["scale"] = draw(st.sampled_from((0.7, 2.0, *([] if "negative_scale" in refuses else [-0.5, 0.0]))))
        features["traced_scale"] = "traced_scale" not in refuses and is_likely(draw, 2)
    may_be_traced = window["window_size"] is not None and not segments and "traced_offset" not in refuses
    features["traced_offset"] = may_be_traced and is_likely(draw)
    return dataclasses.replace(call, **features)


def _takes_bias(refuses, window):
    """Return whether the implementation supports a bias of this window, and the bias fits in memory."""
    size = window["window_size"]
    if "bias" in refuses or (size is not None and size > 256):
        return False
    return "odd_bias" not in refuses or size in (1, 2, 8, 16, 64, 256)
