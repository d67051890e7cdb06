"""Local windowed attention for JAX and Flax, in time and memory linear in the sequence.

Axis letters, the same in every shape, einsum and einops pattern of this package:

| letter     | axis |
| ---------- | ---- |
| ``b``      | batch |
| ``h``      | heads; the heads of keys and values where queries have more |
| ``g``      | query heads that share one head of keys and values: queries have ``h g`` heads |
| ``n``      | sequence, or a chunk of it; keys and queries may differ in length |
| ``d``      | dim_head, the width of one head |
| ``e``      | model width |
| ``w``      | window size: the rows of a bias |
| ``s``      | slots of a slab, ``look_backward + 1 + look_forward`` windows: the columns of a bias |
| ``m``      | keys beside the window: global keys, first tokens that a cache keeps |
| ``r``      | residual streams |
| ``c``      | vocabulary |
| ``i``, ``j`` | position of a query, position of a key |

A slab is all windows that the queries of one window look at. Ranges run from ``start`` to ``stop``, which is exclusive.
A mask is True where a key may be seen.
"""

from flax_local_attention.attention import attend, local_attention, merge_attention
from flax_local_attention.cache import KVCache
from flax_local_attention.convert import from_torch, model_from_torch, to_torch
from flax_local_attention.decoding import attend_cache, cached_attention
from flax_local_attention.feed_forward import FeedForward
from flax_local_attention.flax_attention import attention_fn
from flax_local_attention.generation import generate, stream
from flax_local_attention.head import LossSum
from flax_local_attention.kernels import TPU, Dense, MosaicGPU, Triton, Unsupported, Windowed
from flax_local_attention.layers import LocalAttention, LocalMHA
from flax_local_attention.operands import Operands
from flax_local_attention.options import AttentionOptions
from flax_local_attention.parallel import Halo
from flax_local_attention.partitioning import AXIS_RULES, parameter_axes, parameter_shardings
from flax_local_attention.position_bias import DynamicPositionBias
from flax_local_attention.rotary import Rotary, rotate
from flax_local_attention.softmax import LogSum
from flax_local_attention.stacking import stack_layers, unstack_layers
from flax_local_attention.transformer import LocalTransformer
from flax_local_attention.window import Window

__version__ = "0.2.0"

__all__ = [  # noqa: RUF022 - in the order of characters
    "AXIS_RULES",
    "AttentionOptions",
    "Dense",
    "DynamicPositionBias",
    "FeedForward",
    "Halo",
    "KVCache",
    "LocalAttention",
    "LocalMHA",
    "LocalTransformer",
    "LogSum",
    "LossSum",
    "MosaicGPU",
    "Operands",
    "Rotary",
    "TPU",
    "Triton",
    "Unsupported",
    "Window",
    "Windowed",
    "attend",
    "attend_cache",
    "attention_fn",
    "cached_attention",
    "from_torch",
    "generate",
    "local_attention",
    "merge_attention",
    "model_from_torch",
    "parameter_axes",
    "parameter_shardings",
    "rotate",
    "stack_layers",
    "stream",
    "to_torch",
    "unstack_layers",
]
