"""The implementation is chosen when a call is lowered, and all transformations of JAX work with any of them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_local_attention import TPU, AttentionOptions, Operands, Rotary, Triton, Unsupported, Window, attend, kernels
from flax_local_attention.kernels import Fastest, Tiles
from flax_local_attention.kernels.dispatch import RESULT
from flax_local_attention.kernels.family import is_busy
from flax_local_attention.kernels.pallas_mosaic import keeps_registers
from flax_local_attention.kernels.pallas_triton import Tile
from flax_local_attention.kernels.primitives import Target
from flax_local_attention.softmax import LOG_SUM
from tests import cases
from tests.cases import assert_close, normal

pytestmark = pytest.mark.usefixtures("quick_compile")

TILE = Tile(16, 16)
KERNELS = Triton(Tiles(TILE, TILE, TILE), interpret=True)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [None, KERNELS], ids=["fastest", "triton"])
WINDOW = Window(8, causal=True, exact_windowsize=True)
GPU = Target("cuda", (9, 0))


@pytest.fixture
def arrays():
    return {name: normal(seed, 2, 2, 21, 16) for seed, name in enumerate("qkv")} | {"sinks": normal(3, 2)}


def attention(implementation, **options):
    """Compute a function of arrays that contains attention and more."""
    fixed = {"window": WINDOW, "rotary": Rotary(16), "implementation": implementation} | options
    return lambda arrays: jnp.tanh(cases.local(**arrays, **fixed))


def scalar(implementation, **options):
    attend = attention(implementation, **options)
    weights = normal(7, 2, 2, 21, 16)
    return lambda arrays: (weights * attend(arrays)).sum()


# Derivatives


@pytest.mark.slow
@IMPLEMENTATIONS
def test_forward_mode_equals_the_definition(implementation, arrays):
    tangents = {name: normal(10 + seed, *x.shape) for seed, (name, x) in enumerate(arrays.items())}
    ours, expected = (
        jax.jit(partial(jax.jvp, attention(by)))((arrays,), (tangents,)) for by in (implementation, "dense")
    )
    assert_close(ours, expected)


@pytest.mark.slow_but("forward over reverse-fastest")
@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "again",
    [
        lambda f, d: lambda x: jax.jvp(jax.grad(f), (x,), (d,))[1],
        lambda f, d: jax.grad(lambda x: jax.jvp(f, (x,), (d,))[1]),
        lambda f, d: jax.grad(lambda x: sum(jnp.vdot(d[k], g) for k, g in jax.grad(f)(x).items())),
    ],
    ids=["forward over reverse", "reverse over forward", "reverse over reverse"],
)
def test_second_derivatives_equal_the_definition(implementation, again, arrays):
    along = {name: normal(10 + seed, *x.shape) for seed, (name, x) in enumerate(arrays.items())}
    ours, expected = (jax.jit(again(scalar(by), along))(arrays) for by in (implementation, "dense"))
    assert_close(ours, expected)


@pytest.mark.slow
@IMPLEMENTATIONS
def test_a_third_derivative(implementation, arrays):
    def along_a_line(f):
        return lambda t: f(arrays | {"q": arrays["q"] * t})

    def third(f):
        return jax.grad(jax.grad(jax.grad(along_a_line(f))))

    ours, expected = (jax.jit(third(scalar(by)))(1.0) for by in (implementation, "dense"))
    assert_close(ours, expected)


@pytest.mark.slow_but("fastest")
@IMPLEMENTATIONS
def test_the_gradient_of_the_sums(implementation, arrays):
    """As in merged attention, where output and log-sum-exp both have cotangents."""

    def loss(by):
        def fn(arrays):
            out, log_sum = cases.local(**arrays, window=WINDOW, implementation=by, return_log_sum=True)
            return (out * normal(8, *out.shape)).sum() + (log_sum.log_sum_exp() * normal(9, 2, 2, 21)).sum()

        return jax.jit(jax.value_and_grad(fn))

    assert_close(loss(implementation)(arrays), loss("dense")(arrays))


@pytest.mark.slow
def test_gradients_with_respect_to_some_arrays_only(arrays):
    for names in (["q"], ["v"], ["sinks"], ["k", "sinks"]):

        def loss(chosen, by):
            return scalar(by)(arrays | chosen)

        chosen = {name: arrays[name] for name in names}
        ours, expected = (jax.jit(jax.grad(partial(loss, by=by)))(chosen) for by in (KERNELS, "dense"))
        assert_close(ours, expected)


# Transformations


@pytest.mark.slow_but("(2, 1, 0)-fastest")
@IMPLEMENTATIONS
@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, None), (2, 1, 0), (0, None, None)], ids=str)
def test_vmap_of_a_gradient_is_that_of_each(implementation, axes):
    q, k, v = (normal(seed, 3, 2, 2, 13, 16) for seed in range(3))
    bias = normal(4, 2, 8, 16)
    whole = [x[0] if axis is None else jnp.moveaxis(x, 0, axis) for x, axis in zip((q, k, v), axes, strict=True)]

    def gradient(q, k, v):
        return jax.grad(
            lambda *x: jnp.sin(cases.local(*x[:3], WINDOW, attn_bias=x[3], implementation=implementation)).sum(),
            (0, 1, 2, 3),
        )(q, k, v, bias)

    mapped = jax.jit(jax.vmap(gradient, axes))(*whole)
    each = [
        jax.jit(gradient)(*(x if axis is None else jnp.take(x, i, axis) for x, axis in zip(whole, axes, strict=True)))
        for i in range(3)
    ]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *each))


@pytest.mark.slow
def test_vmap_over_offsets():
    q, k = normal(0, 1, 2, 5, 16), normal(1, 1, 2, 21, 16)
    offsets = jnp.array([0, 3, 16])
    mapped = jax.vmap(lambda offset: cases.local(q, k, k, WINDOW, q_offset=offset, implementation=KERNELS))(offsets)
    each = [cases.local(q, k, k, WINDOW, q_offset=int(offset), implementation="dense") for offset in offsets]
    assert_close(mapped, jnp.stack(each))


@pytest.mark.slow_but("fastest")
@IMPLEMENTATIONS
def test_scan_and_remat_of_layers(implementation, arrays):
    def loss(by):
        @jax.checkpoint
        def layer(x, scale):
            return x + cases.local(x * scale, x, x, WINDOW, implementation=by), None

        return lambda x: jnp.square(jax.lax.scan(layer, x, jnp.array([1.0, 0.5, 2.0]))[0]).sum()

    ours, expected = (jax.jit(jax.grad(loss(by)))(arrays["q"]) for by in (implementation, "dense"))
    assert_close(ours, expected)


def kernels_run(fn, *args):
    """Count the forward passes of attention in the program of a function."""
    return str(jax.make_jaxpr(fn)(*args)).count("local_attention[")


def test_a_checkpoint_policy_saves_what_a_gradient_needs(arrays):
    def loss(q, policy):
        layer = jax.checkpoint(lambda q: jnp.sin(attention(None)(arrays | {"q": q})), policy=policy)
        return layer(q).sum()

    saved = jax.checkpoint_policies.save_only_these_names(RESULT, LOG_SUM)
    assert kernels_run(jax.grad(partial(loss, policy=saved)), arrays["q"]) == 1
    assert kernels_run(jax.grad(partial(loss, policy=None)), arrays["q"]) == 2


# The choice


def operands_of(q=(2, 4, 2, 128, 64), dtype=jnp.bfloat16, options=None, **fields):
    options = options or AttentionOptions(WINDOW)
    x = jax.ShapeDtypeStruct(q, dtype)
    k = jax.ShapeDtypeStruct((*q[:2], 1, *q[3:]), dtype)
    return Operands(x, k, k)._replace(**fields), options


CHOSEN = {
    "a GPU": (operands_of(), GPU),
    "a mesh": (operands_of(), GPU._replace(partition="known")),
    "head size 96": (operands_of((2, 4, 2, 128, 96)), GPU),
    "TF32 allowed": (operands_of(dtype=jnp.float32, options=AttentionOptions(WINDOW, precision="tensorfloat32")), GPU),
}
NOT_CHOSEN = {
    "a CPU": (operands_of(), Target("cpu")),
    "ROCm": (operands_of(), Target("rocm")),
    "a TPU that is nowhere": (operands_of(), Target("tpu", is_known=False)),
    "an old GPU": (operands_of(), Target("cuda", (7, 5))),
    "an unknown GPU": (operands_of(), Target("cuda")),
    "an export": (operands_of(), GPU._replace(is_export=True)),
    "an unknown mesh": (operands_of(), GPU._replace(partition="unknown")),
    "float32": (operands_of(dtype=jnp.float32), GPU),
    "a window of one's own": (operands_of(options=AttentionOptions(type("Own", (Window,), {})(8, causal=True))), GPU),
    "float32, exact": (operands_of(dtype=jnp.float32, options=AttentionOptions(WINDOW, precision="highest")), GPU),
    "float64": (operands_of(dtype=jnp.float64), GPU),
    "wide heads": (operands_of((2, 4, 2, 128, 512)), GPU),
    "few tokens": (operands_of((2, 4, 2, 32, 64)), GPU),
    "xPos": (operands_of(options=AttentionOptions(WINDOW, rotary=Rotary(64, use_xpos=True))), GPU),
    "a traced scale": (operands_of(scale=jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)), GPU),
    "scale 0": (operands_of(options=AttentionOptions(WINDOW, scale=0.0)), GPU),
    "a bias of windows of 12": (
        operands_of(options=AttentionOptions(Window(12)), bias=jax.ShapeDtypeStruct((1, 4, 2, 12, 36), jnp.bfloat16)),
        GPU,
    ),
}


ON_TPU = Target("tpu")
CHOSEN_ON_TPU = {
    "a TPU": (operands_of(), ON_TPU),
    "float32": (operands_of(dtype=jnp.float32), ON_TPU),
    "a traced offset": (operands_of(q_offset=jax.ShapeDtypeStruct((), jnp.int32)), ON_TPU),
}
NOT_CHOSEN |= {
    f"{name}, on a TPU": (call, ON_TPU)
    for name, (call, target) in NOT_CHOSEN.items()
    if target == GPU and not name.startswith("float32")
} | {
    "float16, on a TPU": (operands_of(dtype=jnp.float16), ON_TPU),
    "less than a block, on a TPU": (operands_of((2, 4, 2, 127, 64)), ON_TPU),
    "a bias, on a TPU": (operands_of(bias=jax.ShapeDtypeStruct((1, 4, 2, 8, 16), jnp.bfloat16)), ON_TPU),
    "an export, on a TPU": (operands_of(), ON_TPU._replace(is_export=True)),
    "a mesh of TPUs": (operands_of(), ON_TPU._replace(partition="known")),
    "an unknown mesh, on a TPU": (operands_of(), ON_TPU._replace(partition="unknown")),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_kernels_are_chosen_for(name):
    call, target = CHOSEN[name]
    assert isinstance(Fastest().choose(*call, target), Triton | kernels.MosaicGPU)


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("name", CHOSEN_ON_TPU)
def test_kernels_for_tpus_are_chosen_for(name, token_major):
    call, target = CHOSEN_ON_TPU[name]
    assert isinstance(Fastest(token_major).choose(*call, target), TPU)


@pytest.mark.parametrize("name", NOT_CHOSEN)
def test_the_plain_path_is_chosen_for(name):
    call, target = NOT_CHOSEN[name]
    assert Fastest().choose(*call, target) is None


FAR = AttentionOptions(Window.sliding(1000))
WIDE = (2, 4, 2, 1024, 128)
MASKED = {"mask": jax.ShapeDtypeStruct((2, 1, 1, 1024), jnp.bool_)}
# The call, the target, and the family chosen with Triton and without.
FAMILIES = {
    "d 128, far": (operands_of(WIDE, options=FAR), GPU, "mosaic", "mosaic"),
    "d 96, far": (operands_of((2, 4, 2, 1024, 96), options=FAR), GPU, "mosaic", "mosaic"),
    "d 128, near": (operands_of(WIDE), GPU, "mosaic", "mosaic"),
    "d 64": (operands_of((2, 4, 2, 1024, 64), options=FAR), GPU, "triton", "mosaic"),
    "d 128, far, mask": (operands_of(WIDE, options=FAR, **MASKED), GPU, "mosaic", "mosaic"),
    "d 128, near, mask": (operands_of(WIDE, **MASKED), GPU, "triton", "mosaic"),
    "d 128, shared": (
        operands_of(WIDE, options=dataclasses.replace(FAR, shared_qk=True)),
        GPU,
        "triton",
        None,
    ),
    "d 128, ragged": (operands_of((2, 4, 2, 1021, 128), options=FAR), GPU, "triton", None),
    "d 256": (operands_of((2, 4, 2, 1024, 256), options=FAR), GPU, "triton", None),
    "d 128, Ampere": (operands_of(WIDE, options=FAR), Target("cuda", (8, 0)), "triton", None),
    "d 128, Blackwell": (operands_of(WIDE, options=FAR), Target("cuda", (10, 0)), "triton", None),
    "an export": (operands_of(WIDE, options=FAR), GPU._replace(is_export=True), None, None),
    "an export for a described GPU": (
        operands_of((2, 4, 2, 1024, 64), options=FAR),
        GPU._replace(is_export=True, is_described=True),
        "mosaic",
        "mosaic",
    ),
}


@pytest.mark.parametrize("has_triton", [True, False], ids=["with Triton", "without Triton"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_that_is_chosen(name, has_triton, monkeypatch):
    call, target, *families = FAMILIES[name]
    if not has_triton:
        monkeypatch.setattr("flax_local_attention.kernels.triton.is_available", lambda: False)
    expected = families[not has_triton]
    if expected == "mosaic" and has_triton and not (keeps_registers() or target.is_export):
        expected = "triton"
    assert Fastest().choose(*call, target) == (expected and kernels.IMPLEMENTATIONS[expected])


BUSY = {
    "mask": ({"mask": jnp.ones((2, 21), bool)}, {}),
    "documents": ({"segment_ids": jnp.zeros((2, 21), int)}, {}),
    "bias": ({"attn_bias": normal(5, 2, 8, 16)}, {}),
    "soft cap": ({}, {"logits_soft_cap": 2.0}),
    "dropout": ({"dropout_rng": jax.random.key(0)}, {"dropout_rate": 0.5}),
    "shared queries": ({}, {"shared_qk": True}),
}


@pytest.mark.parametrize("name", BUSY)
def test_a_call_is_busy_by_any_one_of(name, arrays):
    given, fields = BUSY[name]
    plain, options = AttentionOptions(WINDOW), AttentionOptions(WINDOW, **fields)
    assert is_busy(Operands.create(**arrays, **given, options=options), options)
    assert not is_busy(Operands.create(**arrays, options=plain), plain)


@pytest.mark.parametrize("reach", [8, 1024])
@pytest.mark.parametrize("is_masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    ("d", "dtype"), [*((d, "bfloat16") for d in (16, 64, 128, 256)), (16, "float32"), (128, "float32")]
)
def test_every_call_that_kernels_serve_has_tiles(d, dtype, is_masked, reach):
    q = jax.ShapeDtypeStruct((1, 2, 2048, d), dtype)
    options = AttentionOptions(Window.sliding(reach))
    mask = jnp.ones((1, 2048), bool) if is_masked else None
    operands = jax.eval_shape(lambda q: Operands.create(q, q, q, options, mask=mask), q)
    for kind in (Triton, TPU):
        assert not kind().problems(operands, options)
        assert kind().choose_tiles(operands, options)


def test_modules_hand_operands_on_by_tokens():
    assert kernels.between_products(None) == Fastest(token_major=True)
    assert kernels.between_products("triton") == Triton(token_major=True)
    assert kernels.between_products("dense") == kernels.Dense()


def test_without_the_backend_named_kernels_are_refused(monkeypatch):
    monkeypatch.setattr("flax_local_attention.kernels.triton.is_available", lambda: False)
    q = jnp.ones((1, 64, 16))
    with pytest.raises(Unsupported, match="no Triton backend"):
        cases.local(q, q, q, WINDOW, implementation="triton")


REFUSED = {
    "xpos": ({"rotary": Rotary(16, use_xpos=True)}, "xPos"),
    "traced scale": ({"scale": jnp.float32(2.0)}, "`scale` must be a positive number"),
    "float64": ({}, "one dtype, bfloat16"),
    "mask of each head": ({"mask": jnp.ones((2, 4, 21), bool)}, "`mask` must be the same"),
    "large soft cap": ({"logits_soft_cap": 1e4}, "`logits_soft_cap` must be at most 1000, got 10000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_named_kernels_refuse_what_they_cannot_do(name):
    options, phrase = REFUSED[name]
    with jax.enable_x64(name == "float64"):
        q = jnp.ones((2, 4, 21, 16), jnp.float64 if name == "float64" else jnp.float32)
        k = q[:, :2]
        with pytest.raises(Unsupported, match=phrase):
            cases.local(q, k, k, WINDOW, implementation="triton", **options)


@pytest.mark.parametrize("name", ["triton", "mosaic", "tpu"])
def test_named_kernels_refuse_symbolic_sizes(name):
    (b,) = jax.export.symbolic_shape("b")
    q = jax.ShapeDtypeStruct((b, 2, 64, 64), jnp.bfloat16)
    with pytest.raises(Unsupported, match="sizes must be known"):
        jax.export.export(jax.jit(lambda q: cases.local(q, q, q, WINDOW, implementation=name)))(q)


@pytest.mark.parametrize("name", ["triton", "mosaic", "tpu"])
def test_named_kernels_refuse_documents_of_64_bits(name):
    """Truncated to 32 bits, two documents could become one."""
    with jax.enable_x64(True):
        q, ids = jnp.ones((1, 2, 64, 64), jnp.bfloat16), jnp.zeros((1, 64), jnp.int64)
        with pytest.raises(Unsupported, match="at most 32 bits, got int64"):
            cases.local(q, q, q, WINDOW, segment_ids=ids, implementation=name)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs a device without these kernels")
def test_named_kernels_are_refused_on_a_device_without_them(arrays):
    with pytest.raises(Unsupported, match=r"needs an NVIDIA GPU of compute capability 8\.0 or more.* got cpu"):
        attention("triton")(arrays)


@pytest.mark.slow
def test_an_export_for_several_platforms_has_no_kernels(arrays):
    exported = jax.export.export(jax.jit(attention(None)), platforms=["cpu", "cuda", "tpu"])(arrays)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(arrays), attention("dense")(arrays))


def test_an_exported_gradient(arrays):
    gradient = jax.jit(jax.grad(scalar(None)))
    exported = jax.export.export(gradient, platforms=["cpu", "cuda"])(arrays)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(arrays), gradient(arrays))


# Everything a plain function supports


def test_precision_is_that_where_a_call_is_traced():
    q = normal(0, 1, 21, 16)

    def attend(q):
        with jax.default_matmul_precision("high"):
            return cases.local(q, q, q, WINDOW)

    with jax.default_matmul_precision("highest"):
        traced = jax.jit(attend).trace(q)
    text = traced.lower().as_text()
    assert "HIGHEST" not in text
    assert "HIGH" in text


@pytest.mark.slow_but("fastest")
@IMPLEMENTATIONS
def test_without_jit(implementation, arrays):
    with jax.disable_jit():
        out = cases.local(*(arrays[name][:1, :1, :5] for name in "qkv"), WINDOW, implementation=implementation)
    assert_close(out, cases.local(*(arrays[name][:1, :1, :5] for name in "qkv"), WINDOW, implementation="dense"))


def test_vmap_over_nothing(arrays):
    x = jnp.zeros((0, 2, 13, 16))
    out, pull_back = jax.vjp(jax.vmap(lambda x: cases.local(x, x, x, WINDOW)), x)
    assert pull_back(out)[0].shape == out.shape == x.shape


def test_vmap_of_a_symbolic_size_is_exported():
    (size,) = jax.export.symbolic_shape("size")
    mapped = jax.jit(jax.vmap(lambda q: cases.local(q, q, q, WINDOW)))
    exported = jax.export.export(mapped)(jax.ShapeDtypeStruct((size, 2, 13, 16), jnp.float32))
    q = normal(0, 3, 2, 13, 16)
    assert_close(exported.call(q), mapped(q))


@pytest.mark.slow
def test_the_transpose_in_the_values(arrays):
    q, k, v = (arrays[name] for name in "qkv")
    cotangent = normal(5, *q.shape)
    (ours,) = jax.linear_transpose(lambda v: cases.local(q, k, v, WINDOW), v)(cotangent)
    assert_close(ours, jax.vjp(lambda v: cases.local(q, k, v, WINDOW, implementation="dense"), v)[1](cotangent)[0])


@pytest.mark.parametrize("platform", ["rocm", "tpu", "cuda"])
def test_a_device_that_is_neither_here_nor_described_takes_the_plain_path(platform):
    q = jax.ShapeDtypeStruct((1, 2, 2048, 64), jnp.bfloat16)
    gradient = jax.grad(lambda q: cases.local(q, q, q, WINDOW).astype(jnp.float32).sum())
    text = jax.jit(gradient).trace(q).lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in text
    assert "custom_call @" not in text


def test_a_window_of_ones_own_is_refused_by_kernels():
    class Back(Window):
        def start(self, i):
            return i - 3

    call, target = operands_of(options=AttentionOptions(Back(8, causal=True))), GPU
    assert Fastest().choose(*call, target) is None


@pytest.mark.slow
def test_sinks_beside_a_masked_query_that_is_no_number(arrays):
    mask = jnp.arange(21) != 5
    arrays |= {"q": arrays["q"].at[:, :, 5].set(jnp.nan)}

    def loss(by):
        def fn(arrays):
            out = cases.local(**arrays, window=WINDOW, mask=mask[None], implementation=by)
            return jnp.where(mask[:, None], out, 0).sum()

        return jax.jit(jax.grad(fn))

    ours, expected = loss(KERNELS)(arrays), loss("dense")(arrays)
    assert_close(
        {name: ours[name] for name in ("k", "v", "sinks")}, {name: expected[name] for name in ("k", "v", "sinks")}
    )


# Several devices


@pytest.fixture
def devices():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    return np.array(jax.devices()[:2])


@pytest.mark.slow_but("fastest")
@IMPLEMENTATIONS
def test_kernels_inside_shard_map_and_their_gradient(implementation, arrays, devices):
    """With JAX's checks, and k and v replicated over the mesh: their gradients are summed over it."""
    mesh = Mesh(devices, ("x",))
    specs = {"q": P("x"), "k": P(), "v": P(), "sinks": P()}
    arrays |= {name: arrays[name][:1] for name in "kv"}

    def fn(by):
        def local(arrays):
            return attention(by)(arrays)

        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P("x"))

    def whole(arrays):
        arrays = arrays | {name: jnp.repeat(arrays[name], 2, 0) for name in "kv"}
        return attention("dense")(arrays)

    ours, expected = (
        jax.jit(jax.value_and_grad(lambda arrays, fn=fn: jnp.sin(fn(arrays)).sum()))(arrays)
        for fn in (fn(implementation), whole)
    )
    assert_close(ours, expected)


@pytest.mark.slow_but("batch")
@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["batch", "heads"])
def test_a_program_on_a_mesh_is_partitioned_without_gathering(spec, arrays, devices):
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    sharded = {name: jax.device_put(arrays[name], NamedSharding(mesh, spec)) for name in "qkv"}

    def gradient(arrays):
        return jax.value_and_grad(lambda arrays: jnp.sin(cases.local(**arrays, window=WINDOW)).sum())(arrays)

    compiled = jax.jit(gradient).lower(sharded).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    expected = jax.jit(gradient)({name: arrays[name] for name in "qkv"})
    assert_close(compiled(sharded), expected)


def test_sums_and_results_have_the_types_of_operands():
    options = AttentionOptions(WINDOW)
    q = normal(0, 2, 4, 21, 16).astype(jnp.bfloat16)
    out, log_sum = attend(Operands.create(q, q[:, :2], q[:, :2], options), options, implementation=KERNELS)
    assert (out.shape, out.dtype) == ((2, 2, 2, 21, 16), jnp.bfloat16)
    assert [x.dtype for x in log_sum] == [jnp.float32] * 2
    assert [x.shape for x in log_sum] == [(2, 2, 2, 21)] * 2
