"""A sequence spread over eight devices: the conformance list, and what travels between them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention import TPU, Triton, Window
from flax_local_attention.kernels import Tiles
from flax_local_attention.kernels.pallas_tpu import Block
from flax_local_attention.kernels.pallas_triton import Tile
from flax_local_attention.kernels.tpu import Tiles as BlocksOnTPU
from tests.cases import (
    FEATURES,
    IN_BLOCKS,
    assert_close,
    draw_call,
    draw_cotangent,
    features_id,
    local,
    value_and_pullback,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

MESHES = {"8x1": (8, 1), "2x4": (2, 4), "1x8": (1, 8)}
OFFSETS = {"offset", "traced_offset", "overhang"}
SETS = [features for features in FEATURES if not OFFSETS & set(features)]
IMPLEMENTATIONS = {
    "None": None,
    "blocks": IN_BLOCKS["implementation"],
    "dense": "dense",
    "triton": Triton(Tiles(Tile(16, 16), Tile(16, 16), Tile(16, 16)), interpret=True),
    "tpu": TPU(BlocksOnTPU(Block(32, 16), Block(16, 32), Block(16, 16)), interpret=True),
}
EXACT = Window(3, causal=True, exact_windowsize=True)
# What keys and values are spread by, and other arrays.
SPECS = {
    "q": P("data", None, "sequence"),
    "k": P("data", None, "sequence"),
    "v": P("data", None, "sequence"),
    "mask": P("data", "sequence"),
    "segment_ids": P("data", "sequence"),
    "attn_bias": P(),
    "sinks": P(),
    "global_keys": P(),
}


def mesh_of(kind, sizes):
    if len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 devices")
    devices = jax.devices("cpu")[:8]
    return jax.make_mesh(sizes, ("data", "sequence"), axis_types=(kind, kind), devices=devices)


def repeat_rows(x, name, rows):
    """Give a drawn array as many rows as a mesh needs; parameters have none."""
    is_row = SPECS[name] and SPECS[name][0] == "data"
    return (
        jnp.concatenate([x * (1 if x.dtype != jnp.float32 else 1 + at) for at in range(rows // x.shape[0])])
        if is_row and rows > x.shape[0]
        else x
    )


def draw(features, window, n, rows=2, d=4):
    """Draw a call whose rows a mesh divides."""
    arrays, traced, options = draw_call(features, window, n, d=d)
    if rows > 2:
        batched = {name for name in arrays if name in "qkv"}
        arrays = {name: jnp.tile(x, (rows // 2, 1, 1, 1)) if name in batched else x for name, x in arrays.items()}
        traced = {name: jnp.tile(x, (rows // 2, 1)) for name, x in traced.items()}
        if "attn_bias" in arrays and arrays["attn_bias"].ndim == 4:
            arrays["attn_bias"] = jnp.tile(arrays["attn_bias"], (rows // 2, 1, 1, 1))
    return arrays, traced, options


def place(tree, mesh):
    return {
        name: jax.tree.map(lambda x, name=name: jax.device_put(x, NamedSharding(mesh, SPECS[name])), x)
        for name, x in tree.items()
    }


def both(arrays, traced, cotangent, **options):
    """Result and gradients of a call."""
    return value_and_pullback(partial(local, **traced, **options), arrays, cotangent)


def assert_spread_equals_whole(kind, sizes, features, window, n, implementation, d=4):
    arrays, traced, options = draw(features, window, n, rows=max(sizes[0], 2), d=d)
    cotangent = draw_cotangent(arrays)
    expected = jax.jit(partial(both, window=window, **options))(arrays, traced, cotangent)
    mesh = mesh_of(kind, sizes)
    run = jax.jit(partial(both, window=window, implementation=implementation, **options))
    spread = run(place(arrays, mesh), place(traced, mesh), place({"q": cotangent}, mesh)["q"])
    assert_close(spread, expected)
    return spread


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("features", SETS, ids=features_id)
def test_every_feature_on_explicit_axes(features, sizes):
    out, gradients = assert_spread_equals_whole(AxisType.Explicit, sizes, features, EXACT, 48, None)
    names = ("data", None, "sequence", None)
    assert [tuple(x.sharding.spec) for x in (out, *(gradients[name] for name in "qkv"))] == [names] * 4
