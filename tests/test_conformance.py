"""Drawn calls of every implementation against a float64 definition that is independent of the library.

CI draws a few calls, the same each time. ``HUNT=50 python -m pytest tests/test_conformance.py`` draws 50 times as
many, different ones each time, and may be left running. ``--hypothesis-seed=7`` chooses them, and
``--hypothesis-show-statistics`` counts them. On a GPU kernels are compiled, elsewhere they are interpreted.
"""

import dataclasses
import itertools
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from jax import export, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flax_local_attention import AttentionOptions, KVCache, Rotary, Window, attend_cache, cached_attention
from flax_local_attention.kernels import KernelFamily
from tests import cases, definition
from tests.drawn_calls import (
    IMPLEMENTATIONS,
    ON_GPU,
    POISONS,
    as_array,
    calls,
    is_likely,
    rotaries,
    windows,
)

# Without optimisations, XLA has no matrix product of mixed dtypes on a GPU.
pytestmark = [] if ON_GPU else pytest.mark.usefixtures("quick_compile")

TOLERANCE = cases.TOLERANCE | {"float64": 1e-11}
# Kernels on GPUs multiply float32 as TensorFloat-32.
TF32_TOLERANCE, TF32_EPSILON = 5e-3, 2.0**-11

EVERY = pytest.mark.parametrize("name", IMPLEMENTATIONS)
# Interpreted Mosaic GPU kernels call back into Python, which transformations do not allow.
TRANSFORMED = [name for name in IMPLEMENTATIONS if ON_GPU or name != "mosaic"]

# Number of calls, with equal shapes and options and other values, for each compiled program.
DRAWS = 3 if hypothesis.settings.default.derandomize else 10

_programs = itertools.count(1)


def examples(count):
    """Draw `count` programs in CI and `HUNT` times as many in a hunt."""
    return hypothesis.settings(max_examples=count * hypothesis.settings.default.max_examples)


def compiled(fn):
    """Compile a function, and regularly drop earlier programs: a hunt compiles thousands."""
    if next(_programs) % 300 == 0:
        jax.clear_caches()
    return jax.jit(fn)


def to_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def rounded(arrays, epsilon):
    """Change all numbers by as much as a dtype may round them."""
    draw = np.random.RandomState(0)
    return jax.tree.map(lambda x: x * (1 + epsilon * draw.uniform(-1, 1, x.shape)), arrays)


def assert_equals_definition(call, ours, arrays, evaluate, roundings=8):
    """Compare a tree with the definition, ``evaluate(arrays)``.

    They may differ by a few roundings of the results, and by `roundings` times the effect of rounding the arrays.
    """
    is_tf32 = ON_GPU and call.dtype == "float32" and isinstance(call.kernels(), KernelFamily)
    tolerance = TF32_TOLERANCE if is_tf32 else TOLERANCE[call.dtype]
    epsilon = TF32_EPSILON if is_tf32 else float(jnp.finfo(call.dtype).eps)
    arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)

    def compare(path, ours, expected, moved):
        name = jax.tree_util.keystr(path)
        ours = np.asarray(ours, np.float64)
        assert ours.shape == expected.shape, (name, ours.shape, expected.shape)
        is_finite = np.isfinite(expected)
        np.testing.assert_array_equal(ours[~is_finite], expected[~is_finite], err_msg=name)
        ours, expected, moved = ours[is_finite], expected[is_finite], moved[is_finite]
        assert np.isfinite(ours).all(), name
        by_rounding = np.abs(moved - expected).max(initial=0.0)
        limit = tolerance * max(1.0, np.abs(expected).max(initial=0.0)) + roundings * by_rounding
        np.testing.assert_allclose(ours, expected, rtol=0, atol=limit, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, ours, evaluate(arrays), evaluate(rounded(arrays, epsilon)))


def draw_cotangents(call, seed):
    """Draw cotangents of output and log-sum-exp."""
    shape = call.b, call.heads, call.n
    return as_array(seed + 7001, call.dtype, *shape, call.d_value), as_array(seed + 7002, call.dtype, *shape)


def with_gradients(attend, arrays, d_out, d_sum):
    """Return output, log-sum-exp and the gradients for cotangents of both."""
    (out, log_sum), pull_back = jax.vjp(attend, arrays)
    d_sum = jnp.where(jnp.isfinite(log_sum), d_sum, 0).astype(log_sum.dtype)  # it is -inf where no key is seen
    return out, log_sum, pull_back((d_out, d_sum))[0]


def answer(call, arrays, fixed, d_out, d_sum):
    """Compute what `defined` defines by the implementation of a call."""
    return with_gradients(lambda arrays: call.attend(arrays, fixed), arrays, d_out, d_sum)


def defined(call, fixed, d_out, d_sum):
    """Return the function of arrays that computes output, log-sum-exp and gradients by the definition."""
    rules = call.rules()

    def evaluate(arrays):
        gradients = definition.pull_back(arrays, rules, d_out, d_sum, **fixed)
        return *definition.attend(arrays, rules, **fixed), gradients

    return evaluate


def draws_of(call, count=None):
    """Yield the further arguments of `answer` for several calls of the same shape."""
    for seed in range(call.seed, call.seed + (count or DRAWS)):
        yield *call.arrays(seed), *draw_cotangents(call, seed)


def count(call, more=""):
    """Count a program in hypothesis's statistics."""
    event(f"{call.implementation} {call.dtype} {more}".strip())


# Values and derivatives


@pytest.mark.slow_but("dense", "xla")
@EVERY
@examples(3)
@given(data=st.data())
def test_output_sums_and_gradients_equal_the_definition(name, data):
    call = data.draw(calls(name))
    count(call)
    with jax.enable_x64(call.dtype == "float64"):
        run = compiled(partial(answer, call))
        for arrays, fixed, *cotangents in draws_of(call):
            ours = to_numpy(run(arrays, call.traced(fixed), *cotangents))
            assert ours[0].dtype == jnp.dtype(call.dtype)
            assert_equals_definition(call, ours, arrays, defined(call, fixed, *cotangents))


ORDERS = {
    "forward over reverse": lambda f, along: lambda x: jax.jvp(jax.grad(f), (x,), (along,))[1],
    "reverse over forward": lambda f, along: jax.grad(lambda x: jax.jvp(f, (x,), (along,))[1]),
    "reverse over reverse": lambda f, along: jax.grad(
        lambda x: sum(map(jnp.vdot, jax.tree.leaves(along), jax.tree.leaves(jax.grad(f)(x))))
    ),
}


@pytest.mark.slow_but("dense", "xla")
@pytest.mark.parametrize("name", TRANSFORMED)
@examples(1)
@given(data=st.data())
def test_forward_and_second_derivatives_equal_the_definition(name, data):
    call = data.draw(calls(name, dtypes=("float32", "float64")))
    order = data.draw(st.sampled_from(list(ORDERS)))
    count(call, order)

    def run(arrays, fixed, along, d_out):
        def attend(arrays):
            return call.attend(arrays, fixed)[0]

        second = ORDERS[order](lambda arrays: (attend(arrays) * d_out).sum(), along)
        return jax.jvp(attend, (arrays,), (along,))[1], second(arrays)

    with jax.enable_x64(call.dtype == "float64"):
        run = compiled(run)
        for arrays, fixed, d_out, _ in draws_of(call):
            along = jax.tree.map(lambda x: as_array(x.size, x.dtype.name, *x.shape), arrays)
            ours = to_numpy(run(arrays, call.traced(fixed), along, d_out))

            def evaluate(arrays, along=along, fixed=fixed, d_out=d_out):
                derivative = definition.push_forward(arrays, along, call.rules(), **fixed)
                return derivative, definition.curvature(arrays, along, call.rules(), d_out, **fixed)

            assert_equals_definition(call, ours, arrays, evaluate, roundings=64)


def pairs_seen(call, fixed):
    """Return which queries see which keys, ``[b, h g, n, n_keys]``."""
    i, j = call.offset + np.arange(call.n)[:, None], np.arange(call.n_keys)
    seen = np.broadcast_to(definition.sees(call.window, i, j), (call.b, call.heads, call.n, call.n_keys))
    if "mask" in fixed:
        mask = fixed["mask"]
        seen = seen & (mask[:, None, None] if mask.ndim == 2 else mask[:, :, None])
    if "segment_ids" in fixed:
        ids = fixed["segment_ids"]
        seen = seen & (ids[:, None, :, None] == ids[:, None, None])
    return seen


@pytest.mark.slow_but("dense", "xla")
@EVERY
@examples(2)
@given(data=st.data())
def test_outputs_depend_on_the_keys_of_the_window_and_on_no_others(name, data):
    """With one-hot values the output shows each key's weight; one-hot cotangents do the same for gradients."""
    lengths, without = (64, 40, 13, 1) if ON_GPU else (13, 7, 2, 1), {"shared_qk", "global_keys", "negative_scale"}
    call = data.draw(calls(name, lengths=lengths, without=without))
    count(call)
    width = max(call.d, call.n, call.n_keys)
    call = dataclasses.replace(call, group=1, d=width, d_value=width, rotary=None, shut=0.0, size=0.1)

    def units(n):
        return np.broadcast_to(0.3 * np.eye(n, width), (call.b, call.heads, n, width)).astype(jnp.dtype(call.dtype))

    with jax.enable_x64(call.dtype == "float64"):
        run = compiled(partial(answer, call))
        arrays, fixed = call.arrays()
        d_out, d_sum = draw_cotangents(call, call.seed)
        seen, traced = pairs_seen(call, fixed), call.traced(fixed)

        out, _, gradients = run(arrays | {"v": units(call.n_keys)}, traced, units(call.n), 0 * d_sum)
        np.testing.assert_array_equal(np.asarray(out)[..., : call.n_keys] != 0, seen)
        np.testing.assert_array_equal(np.asarray(gradients["v"]).swapaxes(-1, -2)[..., : call.n, :] != 0, seen)

        of_units = {"q": units(call.n), "k": units(call.n_keys)}
        _, _, gradients = run(arrays | of_units, traced, d_out, 0 * d_sum)
        by_k = np.asarray(gradients["k"]).swapaxes(-1, -2)[..., : call.n, :] != 0
        by_q = np.asarray(gradients["q"])[..., : call.n_keys] != 0
        # The probability of a query's only key is 1, whatever its score.
        is_free = seen & ((seen.sum(-1, keepdims=True) > 1) | call.sinks)
        for by in (by_k, by_q):
            np.testing.assert_array_equal(by & ~seen, False)
            np.testing.assert_array_equal(by & is_free, is_free)


# Invariance


def padded(call, before, after, arrays, fixed, d_out, d_sum, poison):
    """Add masked tokens before and after those of a call, and fill all masked tokens with a poison.

    Return the arguments of `answer`, which tokens exist, and which queries belong to unmasked tokens.
    """
    wide = [(0, 0), (0, 0), (before, after), (0, 0)]
    mask = fixed.get("mask", np.ones((call.b, call.n_keys), bool))
    mask = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(before, after)])
    exists = mask if mask.ndim == 2 else mask.any(1)
    positions = call.offset + np.arange(before + call.n + after)
    own = np.ones((call.b, len(positions)), bool)
    own[:, positions < exists.shape[1]] = exists[:, positions[positions < exists.shape[1]]]
    keep = {"q": own, "k": exists, "v": exists}

    def poisoned(x, keep):
        with np.errstate(over="ignore"):
            return np.where(keep, x, np.asarray(poison).astype(x.dtype)).astype(x.dtype)

    arrays, fixed = dict(arrays), dict(fixed) | {"mask": mask}
    for name, rows in keep.items():
        arrays[name] = poisoned(np.pad(arrays[name], wide), rows[:, None, :, None])
    if "global_mask" in fixed:
        seen = fixed["global_mask"][0, :, None]
        arrays["global_keys"] = tuple(poisoned(x, seen) for x in arrays["global_keys"])
    if "segment_ids" in fixed:
        fixed["segment_ids"] = np.pad(fixed["segment_ids"], [(0, 0), (before, after)])
    is_answered = own[:, None, :, None] & np.pad(np.ones_like(d_out, bool), wide)
    d_out = np.where(is_answered, np.pad(d_out, wide), 0).astype(d_out.dtype)
    d_sum = np.where(is_answered[..., 0], np.pad(d_sum, wide[:-1]), 0).astype(d_sum.dtype)
    return arrays, fixed, d_out, d_sum, keep


@pytest.mark.slow_but("dense", "xla")
@EVERY
@examples(2)
@given(data=st.data())
def test_neither_padding_nor_masked_tokens_nor_a_move_by_whole_windows_changes_anything(name, data):
    call, windows_before = data.draw(calls(name)), data.draw(st.integers(0, 2))
    after, poison = data.draw(st.sampled_from((0, 1, 5))), data.draw(st.sampled_from(POISONS))
    count(call)
    w, multiple = call.window["window_size"], IMPLEMENTATIONS[name].multiple
    before = 0 if w is not None and w > 300 else windows_before * np.lcm(w or 1, multiple)
    after *= multiple
    if w is None and call.bias is not None:  # the bias's shape would depend on the number of keys
        before = after = 0
    longer = dataclasses.replace(call, n=before + call.n + after, n_keys=before + call.n_keys + after)
    rows, keys = slice(before, before + call.n), slice(before, before + call.n_keys)
    with jax.enable_x64(call.dtype == "float64"):
        run = compiled(partial(answer, longer))
        for arrays, fixed, d_out, d_sum in draws_of(call):
            given, given_fixed, *cotangents, keep = padded(call, before, after, arrays, fixed, d_out, d_sum, poison)
            out, log_sum, gradients = to_numpy(run(given, call.traced(given_fixed), *cotangents))
            own = keep["q"][:, None, rows]
            out, log_sum = np.where(own[..., None], out[:, :, rows], 0), np.where(own, log_sum[:, :, rows], 0)
            for of, is_there in keep.items():
                assert not np.where(is_there[:, None, :, None], 0, gradients[of]).any(), of
            gradients |= {"q": gradients["q"][:, :, rows]}
            gradients |= {of: gradients[of][:, :, keys] for of in ("k", "v")}
            of_call = [x[:, :, rows] for x in cotangents]

            def evaluate(arrays, fixed=fixed, own=own, of_call=of_call):
                out, log_sum, gradients = defined(call, fixed, *of_call)(arrays)
                return np.where(own[..., None], out, 0), np.where(own, log_sum, 0), gradients

            assert_equals_definition(call, (out, log_sum, gradients), arrays, evaluate)


# Transformations: functions of a call, the arguments of calls like it, and hypothesis's draw. They return results
# of `answer` and the arguments that belong to them.


def eagerly(call, lanes, draw):
    return [answer(call, *lanes[0])], lanes[:1]


def by_vmap(call, lanes, draw):
    """Map over any axis of each array; leave some arrays unmapped."""
    leaves, trees = zip(*map(jax.tree.flatten, lanes), strict=True)
    axes = [None if is_likely(draw, 4) else draw(st.integers(-x.ndim - 1, x.ndim)) for x in leaves[0]]
    axes[-1] = 0
    stacked = [
        x[0] if axis is None else np.stack(x, axis) for x, axis in zip(zip(*leaves, strict=True), axes, strict=True)
    ]
    outs = compiled(jax.vmap(lambda *leaves: answer(call, *trees[0].unflatten(leaves)), in_axes=axes))(*stacked)
    mapped = [
        [mine if axis is not None else first for mine, first, axis in zip(x, leaves[0], axes, strict=True)]
        for x in leaves
    ]
    return unstacked(outs, len(lanes)), [trees[0].unflatten(x) for x in mapped]


def unstacked(outs, count):
    return [jax.tree.map(lambda x, at=at: x[at], outs) for at in range(count)]


def by_scan(call, lanes, draw):
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *lanes)
    outs = compiled(lambda lanes: lax.map(lambda lane: answer(call, *lane), lanes))(stacked)
    return unstacked(outs, len(lanes)), lanes


def by_remat(call, lanes, draw):
    def run(arrays, fixed, *cotangents):
        return with_gradients(jax.checkpoint(lambda arrays: call.attend(arrays, fixed)), arrays, *cotangents)

    run = compiled(run)
    return [run(*lane) for lane in lanes], lanes


def by_export(call, lanes, draw):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    program = export.export(compiled(partial(answer, call)))(*lanes[0]).serialize()
    return [export.deserialize(program).call(*lane) for lane in lanes], lanes


def over_devices(call, lanes, specs, **options):
    """Attend inside ``jax.shard_map`` on two devices, and differentiate it from outside."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def run(arrays, fixed, *cotangents):
        in_specs = [{name: specs.get(name, P()) for name in of} for of in (arrays, fixed)]
        attend = jax.shard_map(
            partial(call.attend, **options), mesh=mesh, in_specs=tuple(in_specs), out_specs=(specs["q"], specs["q"])
        )
        return with_gradients(lambda arrays: attend(arrays, fixed), arrays, *cotangents)

    run = compiled(run)
    return [run(*lane) for lane in lanes], lanes


def over_rows(call, lanes, draw):
    names = ["q", "k", "v", "mask", "segment_ids", "global_mask", *(["attn_bias"] if call.bias == "rows" else [])]
    return over_devices(call, lanes, dict.fromkeys(names, P("x")))


def over_tokens(call, lanes, draw):
    rows = P(None, None, "x")
    specs = dict.fromkeys(("q", "k", "v"), rows) | {"mask": rows if call.mask == "heads" else P(None, "x")}
    return over_devices(call, lanes, specs | {"segment_ids": P(None, "x")}, axis_name="x")


TRANSFORMATIONS = {
    "none": eagerly,
    "vmap": by_vmap,
    "scan": by_scan,
    "remat": by_remat,
    "export": by_export,
    "shard_map over rows": over_rows,
    "shard_map over tokens": over_tokens,
}


@pytest.mark.parametrize("how", TRANSFORMATIONS)
@examples(1)
@given(data=st.data())
def test_a_transformed_call_equals_the_definition(how, data):
    if "shard_map" in how and len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    # JAX does not guarantee that exported Triton kernels run on another version, and refuses to export them.
    names = [name for name in TRANSFORMED if not (ON_GPU and how == "export" and name == "triton")]

    name = data.draw(st.sampled_from(names))
    call = data.draw(calls(name, without={"offset"} if how == "shard_map over tokens" else ()))
    if how == "shard_map over rows":
        call = dataclasses.replace(call, b=2)
    if how == "shard_map over tokens":  # each device holds whole windows
        w = call.window["window_size"]
        n = 2 * (w if w is not None and w < 300 else 5) * data.draw(st.integers(1, 3))
        n *= IMPLEMENTATIONS[name].multiple
        call = dataclasses.replace(call, n=n, n_keys=n, traced_offset=False)
    count(call, how)
    with jax.enable_x64(call.dtype == "float64"):
        lanes = [(arrays, call.traced(fixed), *rest) for arrays, fixed, *rest in draws_of(call, 3)]
        results, lanes = TRANSFORMATIONS[how](call, lanes, data.draw)
    for ours, (arrays, fixed, *cotangents) in zip(results, lanes, strict=True):
        fixed = {of: x for of, x in fixed.items() if of != "q_offset"}
        assert_equals_definition(call, to_numpy(ours), arrays, defined(call, fixed, *cotangents))


# Decoding


@dataclasses.dataclass
class Row:
    """A cache row as a list: the numbers of its tokens, and the most it has held."""

    tokens: list
    longest: int = 0

    def append(self, numbers):
        tokens = self.tokens + numbers
        return Row(tokens, max(self.longest, len(tokens)))

    def rewind(self, count):
        return Row(self.tokens[: len(self.tokens) - count], self.longest)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A drawn cache and how it is called.

    Attributes:
        window: Fields of its window, bounded by max_length.
        name: Name of a row of `IMPLEMENTATIONS`.
        ids: Whether tokens have documents: "always", "never" or "sometimes".
        positions: Whether rotary uses explicit positions.
    """

    name: str
    window: dict
    max_length: int | None
    rewind: int
    keep_first: int
    b: int
    kv_heads: int
    group: int
    d: int
    d_value: int
    dtype: str
    shared_qk: bool
    soft_cap: float | None
    scale: float | None
    rotary: dict | None
    bias: bool
    sinks: bool
    global_keys: int
    ids: str
    positions: bool

    implementation = "xla"  # selects the tolerances

    @property
    def effective(self):
        """Fields of the window that the cache holds."""
        most = self.max_length
        if most is None or (self.window["window_size"] and definition.capacity(self.window) <= most):
            return self.window
        return {"window_size": 1, "causal": True, "look_backward": most - 1, "exact_windowsize": True}

    def create(self, shared):
        options = AttentionOptions(
            Window(**self.window),
            rotary=None if self.rotary is None else Rotary(**self.rotary),
            scale=self.scale,
            shared_qk=self.shared_qk,
            logits_soft_cap=self.soft_cap,
        )
        return KVCache.create(
            options,
            self.b,
            self.kv_heads,
            self.d,
            dim_value=self.d_value,
            dtype=self.dtype,
            rewind=self.rewind,
            keep_first=self.keep_first,
            max_length=self.max_length,
            global_keys=shared.get("global_keys"),
        )

    def shared(self):
        """Return the arrays that all calls have."""
        shared = {}
        if self.bias:
            shape = definition.bias_shape(self.effective, 0, 0)
            shared["attn_bias"] = as_array(3, self.dtype, self.kv_heads * self.group, *shape)
        if self.sinks:
            shared["sinks"] = as_array(5, "float32", self.kv_heads * self.group)
        if self.global_keys:
            shared["global_keys"] = tuple(
                as_array(6 + part, self.dtype, self.kv_heads, self.global_keys, width)
                for part, width in enumerate((self.d, self.d_value))
            )
        return shared

    def rules(self, before):
        return definition.Rules(
            window=self.effective,
            rotary=self.rotary,
            scale=self.scale,
            soft_cap=self.soft_cap,
            shared_qk=self.shared_qk,
            q_offset=before,
            keep_first=self.keep_first,
        )

    def kernels(self):
        return IMPLEMENTATIONS[self.name].implementation


@st.composite
def decodings(draw):
    name = draw(st.sampled_from([name for name in TRANSFORMED if name != "dense"]))
    served = IMPLEMENTATIONS[name]
    window = draw(windows((3, 1, 2, 5, None))) | {"causal": True}
    if window["window_size"] is not None:
        window["look_forward"] = 0
    max_length = draw(st.sampled_from((4, 1, 9))) if window["window_size"] is None or is_likely(draw, 4) else None
    d, dtype = (
        draw(st.sampled_from(served.widths)),
        draw(st.sampled_from(("float32", "float32", "bfloat16", "float16"))),
    )
    if name == "tpu" or dtype not in served.dtypes:
        dtype = "float32"
    keep_first = draw(st.sampled_from((0, 0, 1, 3)))
    # A cache scales all its slots, and those of the first tokens, by xPos from one origin.
    rotary = draw(rotaries(d, window, {"xpos"} if dtype == "float16" or max_length else set(), True, dtype))
    return Decoding(
        name=name,
        window=window,
        max_length=max_length,
        rewind=draw(st.sampled_from((4, 0, 1, 9))),
        keep_first=keep_first,
        b=draw(st.sampled_from((1, 2))),
        kv_heads=draw(st.sampled_from((1, 2))),
        group=draw(st.sampled_from((1, 2))),
        d=d,
        d_value=draw(st.sampled_from((d, max(d // 2, 1)))),
        dtype=dtype,
        shared_qk=is_likely(draw),
        soft_cap=1.5 if is_likely(draw) else None,
        scale=draw(st.sampled_from((0.7, -0.5))) if is_likely(draw) else None,
        rotary=rotary,
        bias=is_likely(draw),
        sinks=is_likely(draw),
        global_keys=3 if is_likely(draw, 4) else 0,
        ids=draw(st.sampled_from(("never", "always", "sometimes"))),
        positions=rotary is not None and not rotary.get("use_xpos") and is_likely(draw),
    )


CHUNKS = (1, 2, 5, 1, 1, 70)


class Decoder:
    """A cache and the rows that it should hold."""

    def __init__(self, decoding):
        self.decoding, self.shared = decoding, decoding.shared()
        self.cache = decoding.create(self.shared)
        self.rows = [Row([]) for _ in range(decoding.b)]
        self.saved = []
        self.number = 0

    def tokens(self, numbers):
        """Draw the arrays of tokens, ``[h, n, d]`` each, seeded by the numbers of the tokens."""
        of = self.decoding
        heads = of.kv_heads * of.group
        parts = [(heads, of.d), (of.kv_heads, of.d), (of.kv_heads, of.d_value)]
        made = []
        for part, shape in enumerate(parts):
            tokens = [as_array(10 + 3 * number + part, of.dtype, *shape) for number in numbers]
            made.append(np.stack(tokens, 1) if tokens else np.zeros((shape[0], 0, shape[1]), jnp.dtype(of.dtype)))
        return made

    def facts(self, numbers, has_ids):
        """Return the documents and the positions of tokens, seeded by their numbers."""
        ids = np.array([number * 7 // 30 if has_ids(number) else 0 for number in numbers], np.int32)
        return ids, np.array([number * 5 % 97 for number in numbers], np.int32)

    def append(self, n, share, in_two_steps, seed):
        """Feed a chunk of n tokens, of which only a share exists, and compare their outputs with the definition."""
        of, draw = self.decoding, np.random.RandomState(seed)
        exists = draw.rand(of.b, n) < share
        has_ids = {"never": False, "always": True, "sometimes": draw.rand() < 0.5}[of.ids]
        numbers = self.number + np.arange(of.b * n).reshape(of.b, n)
        self.number += of.b * n
        self.known = getattr(self, "known", {}) | {int(x): has_ids for x in numbers.flat}
        q, k, v = (np.stack(x) for x in zip(*map(self.tokens, numbers), strict=True))
        ids, positions = (np.stack(x) for x in zip(*(self.facts(row, self.known.get) for row in numbers), strict=True))
        hidden = ~exists[:, None, :, None]
        q, k, v = (np.where(hidden, np.asarray(np.nan, x.dtype), x) for x in (q, k, v))
        fixed = {} if exists.all() else {"mask": exists}
        fixed |= {"segment_ids": ids} if has_ids else {}
        fixed |= {"positions": positions} if of.positions else {}
        rows = [
            row.append([int(x) for x in mine[there]])
            for row, mine, there in zip(self.rows, numbers, exists, strict=True)
        ]
        shared = {name: x for name, x in self.shared.items() if name != "global_keys"}
        slack = [min(len(row.tokens), of.rewind + 1 - (row.longest - len(row.tokens))) for row in rows]
        if in_two_steps and (exists.sum(1) <= slack).all():
            cache = self.cache.append(k, v, **fixed)
            out = attend_cache(q, cache, **fixed, **shared)
        else:
            out, cache = cached_attention(q, k, v, self.cache, **fixed, **shared, implementation=of.kernels())
        for at, (before, row) in enumerate(zip(self.rows, rows, strict=True)):
            self.compare(np.asarray(out)[at : at + 1, :, exists[at]], len(before.tokens), row.tokens, has_ids)
        self.cache, self.rows = cache, rows
        np.testing.assert_array_equal(cache.length, [len(row.tokens) for row in rows])

    def compare(self, out, before, numbers, has_ids):
        """Compare the outputs of a row's last tokens with the forward of the row."""
        if before == len(numbers):
            return
        q, k, v = (x[None] for x in self.tokens(numbers))
        ids, positions = self.facts(numbers, self.known.get)
        fixed = {"positions": positions} if self.decoding.positions else {}
        if has_ids:
            fixed |= {"segment_ids": ids[None], "q_segments": ids[None, before:]}

        def evaluate(arrays):
            return definition.attend(arrays, self.decoding.rules(before), **fixed)[0]

        arrays = {"q": q[:, :, before:], "k": k, "v": v} | self.shared
        assert_equals_definition(self.decoding, out, arrays, evaluate)

    def rewind(self, shares):
        """Rewind each row by a share of the most it can."""
        slack = self.decoding.rewind
        most = [min(len(row.tokens), len(row.tokens) - row.longest + slack) for row in self.rows]
        counts = [int(most * share) for most, share in zip(most, shares, strict=False)]
        self.cache = self.cache.rewind(np.array(counts, np.int32))
        self.rows = [row.rewind(count) for row, count in zip(self.rows, counts, strict=True)]

    def save(self):
        self.saved.append((self.cache, self.rows))

    def restore(self, at):
        if self.saved:
            self.cache, self.rows = self.saved[at % len(self.saved)]


def commands():
    shares = st.sampled_from((0.0, 0.5, 1.0))
    return st.lists(
        st.one_of(
            st.tuples(
                st.just("append"),
                st.sampled_from(CHUNKS),
                st.sampled_from((1.0, 0.6, 0.0)),
                st.booleans(),
                st.integers(0, 99),
            ),
            st.tuples(st.just("append"), st.just(1), st.just(1.0), st.just(False), st.integers(0, 99)),
            st.tuples(st.just("rewind"), st.tuples(shares, shares)),
            st.tuples(st.just("save")),
            st.tuples(st.just("restore"), st.integers(0, 5)),
        ),
        min_size=3,
        max_size=8,
    )


@examples(3)
@given(decoding=decodings(), commands=commands())
def test_decoding_equals_the_forward_of_the_compacted_row(decoding, commands):
    """Tokens come in chunks with gaps; rows rewind, and earlier caches are continued."""
    event(f"{decoding.name} {decoding.dtype}")
    if next(_programs) % 50 == 0:
        jax.clear_caches()
    decoder = Decoder(decoding)
    for name, *arguments in commands:
        getattr(decoder, name)(*arguments)
