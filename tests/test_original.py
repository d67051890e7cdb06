"""Everything against the PyTorch original: equal inputs and weights give equal outputs and gradients.

Where the original is wrong, a test named after the right behaviour shows that it is, and that ours is right.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_local_attention import (
    DynamicPositionBias,
    FeedForward,
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    Rotary,
    Window,
)
from flax_local_attention.residual_streams import HyperConnection

torch = pytest.importorskip("torch", reason="torch is needed to run the original")
original = pytest.importorskip(
    "local_attention", reason="the original (`pip install local-attention`) is not installed"
)

from hyper_connections import HyperConnections  # noqa: E402

from tests.cases import IN_BLOCKS, definition  # noqa: E402
from tests.original import (  # noqa: E402
    by_original_name,
    filled_variables,
    load,
    normal,
    output_and_gradients,
    to_torch,
)

pytestmark = [pytest.mark.original, pytest.mark.usefixtures("quick_compile")]

ATTENTION_TOLERANCE = 2e-5
LOGITS_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
LOSS_GRADIENT_TOLERANCE = 5e-5  # rounding the weights to float32 alone changes these gradients by up to 3e-5


def run(module, variables: dict, *inputs, **options):
    """Apply a Linen module to arrays; the options are not traced."""
    return jax.jit(partial(module.apply, **options))(variables, *inputs)


def run_attention(options: dict, *qkv, **call):
    return run(LocalAttention(**IN_BLOCKS, **options), {}, *qkv, **call)


def ours_and_gradients(call, inputs, cotangent):
    """Return the output and the gradients of a JAX function, as `output_and_gradients` does for torch."""

    @jax.jit
    def run(inputs, cotangent):
        out, pull = jax.vjp(call, *inputs)
        return out, pull(cotangent)

    return run(tuple(inputs), cotangent)


def assert_close(ours, theirs, atol: float, what: str = "") -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol, err_msg=what)


def assert_gradients_close(ours: dict, theirs: dict, tolerance: float = ATTENTION_TOLERANCE) -> None:
    """Compare gradients by the original's names, large ones relative to their size: they are sums over all tokens."""
    assert sorted(ours) == sorted(theirs)
    for name, values in theirs.items():
        assert_close(ours[name], values, tolerance * max(1.0, np.abs(values).max()), name)


# LocalAttention


@dataclass(frozen=True)
class Case:
    """A drawn call of `LocalAttention`: its fields, its shapes, and its optional inputs."""

    options: dict = field(hash=False)
    lead: tuple[int, ...]
    n: int
    d: int
    masked: bool
    biased: bool
    window_size: int | None
    seed: int

    @property
    def window(self) -> Window:
        names = ("causal", "look_backward", "look_forward", "exact_windowsize")
        chosen = {name: self.options[name] for name in names}
        return Window(window_size=self.window_size or self.options["window_size"], **chosen)

    @property
    def rotary(self) -> bool:
        return "dim" in self.options and self.options.get("use_rotary_pos_emb", True)

    @property
    def distances_differ(self) -> bool:
        """Whether the original's distances are off: `test_rotary_distances_are_right_when_looking_forward`."""
        return self.rotary and self.options["look_forward"] > 0

    def draw(self) -> dict:
        random = np.random.RandomState(self.seed)
        qkv = [random.standard_normal((*self.lead, self.n, self.d)).astype(np.float32) for _ in range(4)]
        places = (self.lead[-1], self.window.window_size, self.window.slab)
        bias = random.standard_normal(places).astype(np.float32) if self.biased else None
        mask = random.rand(self.lead[0], self.n) < 0.7 if self.masked else None
        return {"qkv": qkv[:3], "cotangent": qkv[3], "bias": bias, "mask": mask}

    def __str__(self) -> str:
        chosen = [f"{name}={value}" for name, value in self.options.items()]
        inputs = ["mask"] * self.masked + ["bias"] * self.biased + [f"w={self.window_size}"] * bool(self.window_size)
        return ",".join([*chosen, *inputs, str([*self.lead, self.n, self.d])])


def draw_case(seed: int, causal: bool, exact: bool, look_backward: int, look_forward: int) -> Case:
    """Draw all other options for one window."""
    random = np.random.RandomState(seed)
    w = int(random.choice([2, 3, 5, 7]))
    options = {
        "window_size": w,
        "causal": causal,
        "exact_windowsize": exact,
        "look_backward": look_backward,
        "look_forward": look_forward,
        "shared_qk": bool(random.rand() < 0.3),
        "autopad": bool(random.rand() < 0.5),
    }
    d = int(random.choice([4, 6, 10]))
    position = random.choice(["none", "off", "rotary", "xpos", "xpos"])
    if position != "none":
        options["dim"] = d
    if position == "off":
        options["use_rotary_pos_emb"] = False
    if position == "xpos":
        options["use_xpos"] = True
    if position == "xpos" and random.rand() < 0.5:
        options["xpos_scale_base"] = int(random.choice([6, 11]))
    if random.rand() < 0.3:
        options["scale"] = 0.29
    override = position == "xpos" and not exact and random.rand() < 0.6
    window_size = int(random.choice([4, 6])) if override else None
    if override and w < 5:  # xPos would grow by 1,800 over a window of 6, and rounding errors with it
        options.setdefault("xpos_scale_base", 6)
    n = int(random.randint(1, 4 * w + 2)) if options["autopad"] else w * int(random.randint(1, 5))
    if override:
        n = math.lcm(w, window_size)
    lead = [(3,), (2, 3), (3, 2), (2, 1, 3)][random.randint(4)]
    return Case(options, lead, n, d, bool(random.rand() < 0.5), bool(random.rand() < 0.4), window_size, seed)


def all_cases() -> list[Case]:
    """Return each window that the original supports twice, with drawn options."""
    windows = [
        (causal, exact, b, f)
        for causal in (True, False)
        for exact in (True, False)
        for b in range(4)
        for f in range(1 if causal else 3)
    ]
    return [draw_case(seed, *windows[seed % len(windows)]) for seed in range(2 * len(windows))]


CASES = all_cases()


def visible_keys(case: Case, mask) -> np.ndarray:
    """Count the keys that each query may see, `[b, n]`."""
    i, j = np.arange(case.n)[:, None], np.arange(case.n)[None]
    given = np.ones((case.lead[0], case.n), bool) if mask is None else mask
    return (case.window.sees(i, j) & given[:, None]).sum(-1)


def run_ours(case: Case, drawn: dict, **fields):
    """Return the output and the gradients of q, k, v and the bias (None without one)."""
    module = LocalAttention(**IN_BLOCKS, **case.options, **fields)
    call = partial(module.apply, {}, mask=drawn["mask"], window_size=case.window_size)
    inputs = (*drawn["qkv"], drawn["bias"])
    return ours_and_gradients(lambda q, k, v, bias: call(q, k, v, attn_bias=bias), inputs, drawn["cotangent"])


def run_original(case: Case, drawn: dict):
    """Return the same of the original, without the gradients of queries that see no key.

    Padding is hidden from the queries that would see it: those that look ahead in a ragged sequence.
    """
    mask = drawn["mask"]
    if mask is None and case.options["autopad"] and not case.options["causal"]:
        mask = np.ones((case.lead[0], case.n), bool)
    alive = (visible_keys(case, drawn["mask"]) > 0).reshape(case.lead[0], *[1] * (len(case.lead) - 1), case.n, 1)
    module = original.LocalAttention(**case.options)

    def call(q, k, v, bias):
        return module(q, k, v, mask=to_torch(mask), attn_bias=bias, window_size=case.window_size)

    out, gradients, _ = output_and_gradients(call, (*drawn["qkv"], drawn["bias"]), drawn["cotangent"] * alive)
    return out * alive, gradients


def assert_results_close(ours, theirs, by_size: bool = False) -> None:
    names = ("out", "dq", "dk", "dv", "dbias")
    for name, a, b in zip(names, (ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            size = max(1.0, np.abs(b).max()) if by_size else 1.0
            assert_close(a, b, ATTENTION_TOLERANCE * size, name)


def test_the_drawn_cases_cover_every_option():
    assert len(CASES) >= 60
    chosen = {
        name: {case.options.get(name) for case in CASES}
        for name in ("use_xpos", "xpos_scale_base", "use_rotary_pos_emb", "scale", "shared_qk", "autopad", "dim")
    }
    assert all(len(values) >= 2 for values in chosen.values())
    assert {len(case.lead) + 2 for case in CASES} == {3, 4, 5}
    assert {case.masked for case in CASES} == {case.biased for case in CASES} == {True, False}
    assert sum(case.window_size is not None for case in CASES) >= 6
    assert sum(case.distances_differ for case in CASES) >= 8
    assert any(case.n < case.options["window_size"] for case in CASES)
    assert any((visible_keys(case, case.draw()["mask"]) == 0).any() for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_its_gradients_equal_the_original(case):
    drawn = case.draw()
    ours = run_ours(case, drawn, reference_rotary=case.distances_differ)
    assert_results_close(ours, run_original(case, drawn))


@pytest.mark.parametrize("case", [case for case in CASES if case.distances_differ][::2], ids=str)
def test_right_distances_equal_the_dense_definition(case):
    drawn = case.draw()
    options = case.options
    rotary = Rotary(case.d, use_xpos=options.get("use_xpos", False), scale_base=options.get("xpos_scale_base"))
    rotary = rotary.for_window(case.window)
    call = partial(definition, window=case.window, rotary=rotary, mask=drawn["mask"], shared_qk=options["shared_qk"])
    call = partial(call, scale=options.get("scale"))
    inputs = (*drawn["qkv"], drawn["bias"])
    dense = ours_and_gradients(lambda q, k, v, bias: call(q, k, v, attn_bias=bias), inputs, drawn["cotangent"])
    # xPos grows towards later keys, and gradients of q and k with it: compare them relative to their size.
    assert_results_close(run_ours(case, drawn), dense, by_size=True)


# Where the original is wrong: attention


def full_attention(q, k, v, shift: int) -> np.ndarray:
    """Compute full rotary attention in NumPy, with queries `shift` positions too far."""
    n, d = q.shape[-2:]
    angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    turns = np.exp(1j * angles)
    far_turns = turns * np.exp(1j * shift * 10000.0 ** (-np.arange(0, d, 2) / d))

    def as_complex(x):
        return x[..., : d // 2] + 1j * x[..., d // 2 :]

    turned_q, turned_k = as_complex(q) * far_turns, as_complex(k) * turns
    scores = (turned_q @ turned_k.conj().swapaxes(-1, -2)).real * d**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("look_forward", [1, 2])
def test_rotary_distances_are_right_when_looking_forward(look_forward):
    """The original rotates queries as in the slab's last window: distances are off by look_forward windows."""
    w, d = 5, 6
    q, k, v = (normal(seed, 2, 3, w, d) for seed in range(3))
    options = {"window_size": w, "look_backward": 1, "look_forward": look_forward, "dim": d}
    theirs = original.LocalAttention(**options)(*map(to_torch, (q, k, v))).numpy()
    assert_close(theirs, full_attention(q, k, v, shift=look_forward * w), ATTENTION_TOLERANCE)
    assert np.abs(theirs - full_attention(q, k, v, shift=0)).max() > 0.1

    assert_close(run_attention(options, q, k, v), full_attention(q, k, v, shift=0), ATTENTION_TOLERANCE)
    reproduced = run_attention(dict(options, reference_rotary=True), q, k, v)
    assert_close(reproduced, theirs, ATTENTION_TOLERANCE)


def test_padding_is_never_seen():
    """The original without a mask lets the last queries of a ragged sequence attend to its padding, unless causal."""
    q, k, v = (normal(seed, 2, 3, 13, 6) for seed in range(3))
    options = {"window_size": 5, "autopad": True}
    theirs = original.LocalAttention(**options)
    unmasked = theirs(*map(to_torch, (q, k, v))).numpy()
    masked = theirs(*map(to_torch, (q, k, v)), mask=torch.ones(2, 13, dtype=torch.bool)).numpy()
    assert_close(unmasked[..., :5, :], masked[..., :5, :], ATTENTION_TOLERANCE)
    assert np.abs(unmasked - masked)[..., 5:, :].max() > 0.1
    assert_close(run_attention(options, q, k, v), masked, ATTENTION_TOLERANCE)


def test_a_query_that_sees_no_key_gets_zeros_and_no_gradient():
    """The original averages everything in the slab, including the padding of -1 before the sequence."""
    q, k = normal(0, 1, 1, 6, 4), normal(1, 1, 1, 6, 4)
    v = np.full((1, 1, 6, 4), 3.0, np.float32)
    mask = np.array([[False, True, True, True, True, True]])
    cotangent = np.zeros_like(v)
    cotangent[..., 0, :] = normal(2, 4)
    options = {"window_size": 3, "causal": True}

    module = original.LocalAttention(**options)

    def call(q, k, v):
        return module(q, k, v, mask=to_torch(mask))

    theirs, (_, _, their_dv), _ = output_and_gradients(call, (q, k, v), cotangent)
    assert_close(theirs[..., 0, :], np.full((1, 1, 4), (3 * 3.0 + 3 * -1.0) / 6), ATTENTION_TOLERANCE)
    assert np.abs(their_dv).max() > 0.1

    call = partial(LocalAttention(**IN_BLOCKS, **options).apply, {}, mask=mask)
    ours, gradients = ours_and_gradients(call, (q, k, v), cotangent)
    assert not ours[..., 0, :].any()
    assert_close(ours[..., 1:, :], theirs[..., 1:, :], ATTENTION_TOLERANCE)
    assert not any(np.asarray(gradient).any() for gradient in gradients)


def test_a_window_override_moves_exact_windows_too():
    """The original limits an exact window by the constructor's size, whatever size the call gives."""
    q, k, v = (normal(seed, 1, 2, 12, 6) for seed in range(3))
    shared = {"causal": True, "exact_windowsize": True, "use_xpos": True, "dim": 6}
    built_small = original.LocalAttention(window_size=2, **shared)
    named_large = built_small(*map(to_torch, (q, k, v)), window_size=4).numpy()
    built_large = original.LocalAttention(window_size=4, xpos_scale_base=1, **shared)(*map(to_torch, (q, k, v))).numpy()
    assert_close(named_large, built_small(*map(to_torch, (q, k, v))).numpy(), ATTENTION_TOLERANCE)
    assert np.abs(named_large - built_large).max() > 0.1

    ours = run_attention(dict(shared, window_size=2), q, k, v, window_size=4)
    assert_close(ours, built_large, ATTENTION_TOLERANCE)


def test_a_window_override_reaches_every_module():
    """In the original only LocalAttention takes a window size per call; both refuse it without xPos."""
    x = normal(0, 2, 13, 12)
    options = {"dim": 12, "dim_head": 6, "heads": 2, "causal": True, "use_xpos": True}
    with pytest.raises(TypeError, match="window_size"):
        original.LocalMHA(**options, window_size=4)(to_torch(x), window_size=6)
    ours = LocalMHA(**IN_BLOCKS, **options, window_size=4)
    variables = filled_variables(ours, x)
    theirs = load(original.LocalMHA(**options, window_size=6, xpos_scale_base=2), variables["params"], "LocalMHA")
    assert_close(run(ours, variables, x, window_size=6), theirs(to_torch(x)).detach().numpy(), ATTENTION_TOLERANCE)

    tokens = np.random.RandomState(0).randint(0, 11, (2, 13))
    options = {"use_xpos": True, "local_attn_window_size": 4, "depth": 1, "num_residual_streams": 1}
    ours, fixed = both_transformers(options)
    with pytest.raises(TypeError, match="window_size"):
        fixed(to_torch(tokens), window_size=6)
    variables = filled_variables(ours, tokens)
    _, theirs = both_transformers({**options, "local_attn_window_size": 6, "xpos_scale_base": 2})
    load(theirs, variables["params"])
    logits = run(ours, variables, tokens, window_size=6)
    assert_close(logits, theirs(to_torch(tokens)).detach().numpy(), LOGITS_TOLERANCE)

    q = normal(0, 1, 8, 6)
    with pytest.raises(AssertionError):
        original.LocalAttention(window_size=2)(*[to_torch(q)] * 3, window_size=4)
    with pytest.raises(ValueError, match="xpos"):
        run_attention({"window_size": 2}, q, q, q, window_size=4)


def test_positions_stay_exact_in_bfloat16():
    """Cast to bfloat16, the original counts positions in it: neighbours beyond 256 share an angle."""
    w, d = 256, 64
    options = {"window_size": w, "causal": True, "dim": d, "scale": 3 * d**-0.5}
    options |= {"use_xpos": True, "xpos_scale_base": 512}
    half = [torch.tensor(normal(seed, 1, 1, 2 * w, d)).bfloat16() for seed in range(3)]
    theirs = original.LocalAttention(**options)
    exact = theirs(*[x.float() for x in half]).numpy()
    cast = theirs.bfloat16()(*half).float().numpy()
    assert np.abs(cast - exact).max() > 1

    ours = run_attention(options, *[jnp.asarray(x.float().numpy(), jnp.bfloat16) for x in half])
    assert ours.dtype == jnp.bfloat16
    assert_close(ours.astype(jnp.float32), exact, 0.06)


def test_mixed_dtypes_give_the_dtype_of_the_queries():
    """The original crashes on mixed dtypes, and on bfloat16 throughout, because its angles are float32."""
    q, k, v = (normal(seed, 1, 2, 12, 6) for seed in range(3))
    options = {"window_size": 4, "causal": True, "dim": 6}
    theirs = original.LocalAttention(**options)
    for dtypes in ("float32", "bfloat16", "bfloat16"), ("bfloat16",) * 3:
        with pytest.raises(RuntimeError):
            theirs(*[to_torch(x).to(getattr(torch, dtype)) for x, dtype in zip((q, k, v), dtypes, strict=True)])
        out = run_attention(options, *[jnp.asarray(x, dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)])
        assert out.dtype == dtypes[0]
        assert_close(out.astype(jnp.float32), theirs(*map(to_torch, (q, k, v))).numpy(), 0.05)


def test_a_mask_of_another_batch_is_an_error():
    """The original infers heads from a mask's size by division: with axes swapped it silently hides the wrong keys."""
    heads_first = [normal(seed, 2, 4, 6, 4) for seed in range(3)]
    mask = np.ones((4, 6), bool)
    mask[1, 2] = False
    module = original.LocalAttention(window_size=3)
    theirs = module(*map(to_torch, heads_first), mask=to_torch(mask)).numpy()
    batch_first = [to_torch(x.swapaxes(0, 1).copy()) for x in heads_first]
    meant = module(*batch_first, mask=to_torch(mask)).numpy().swapaxes(0, 1)
    assert np.abs(theirs - meant).max() > 0.01

    with pytest.raises(ValueError, match="mask"):
        run_attention({"window_size": 3}, *heads_first, mask=mask)


def test_xpos_without_a_scale_base_refuses_windows_of_one_token():
    """The original divides by a scale base of 1 // 2 = 0 and returns NaN."""
    q = normal(0, 1, 3, 4)
    options = {"window_size": 1, "causal": True, "dim": 4, "use_xpos": True}
    assert original.LocalAttention(**options)(*[to_torch(q)] * 3).isnan().any()
    with pytest.raises(ValueError, match="scale_base"):
        run_attention(options, q, q, q)
    given = dict(options, xpos_scale_base=2)
    theirs = original.LocalAttention(**given)(*[to_torch(q)] * 3).numpy()
    assert_close(run_attention(given, q, q, q), theirs, ATTENTION_TOLERANCE)


@pytest.mark.parametrize(
    ("options", "shapes", "phrase"),
    [
        ({"window_size": 4}, [(1, 7, 4)] * 3, "autopad"),
        ({"window_size": 4, "causal": True, "look_forward": 1}, [(1, 8, 4)] * 3, "look_forward"),
        ({"window_size": 4}, [(1, 8, 4), (1, 8, 6), (1, 8, 4)], "k"),
    ],
)
def test_wrong_use_is_an_error_at_the_door(options, shapes, phrase):
    """The original fails with a bare assertion, or with an error of a matrix product deep inside."""
    inputs = [normal(0, *shape) for shape in shapes]
    with pytest.raises((AssertionError, RuntimeError)):
        original.LocalAttention(**options)(*map(to_torch, inputs))
    with pytest.raises(ValueError, match=phrase):
        run_attention(options, *inputs)


# LocalMHA, FeedForward, DynamicPositionBias

MHA_CASES = [
    {"causal": True},
    {"causal": True, "prenorm": True, "qk_rmsnorm": True, "qk_scale": 5},
    {"causal": True, "prenorm": True, "gate_values_per_head": True, "exact_windowsize": False},
    {"causal": True, "use_xpos": True, "look_backward": 2},
    {"causal": True, "use_xpos": True, "xpos_scale_base": 7, "exact_windowsize": False, "shared_qk": True},
    {"look_forward": 0, "gate_values_per_head": True},
    {"reference_rotary": True, "qk_rmsnorm": True, "exact_windowsize": False},
    {"use_rotary_pos_emb": False, "look_backward": 0, "look_forward": 2, "prenorm": True},
]


@pytest.mark.parametrize("options", MHA_CASES, ids=str)
def test_multi_head_attention_equals_the_original(options):
    x, cotangent = normal(0, 2, 13, 12), normal(1, 2, 13, 12)
    mask = np.ones((2, 13), bool)
    mask[0, 5] = mask[1, [2, 7]] = False
    shape = {"dim": 12, "window_size": 4, "dim_head": 6, "heads": 3}
    ours = LocalMHA(**IN_BLOCKS, **shape, **options)
    window = Window(4, ours.causal, ours.look_backward, ours.look_forward)
    bias = normal(2, 3, 4, window.slab) if not ours.use_rotary_pos_emb or ours.shared_qk else None
    variables = filled_variables(ours, x)

    def call(params, x):
        return ours.apply({"params": params}, x, mask=mask, attn_bias=bias)

    out, (dparams, dx) = ours_and_gradients(call, (variables["params"], x), cotangent)
    theirs = original.LocalMHA(**shape, **{name: options[name] for name in options if name != "reference_rotary"})
    load(theirs, variables["params"], "LocalMHA")

    def call(x):
        return theirs(x, mask=to_torch(mask), attn_bias=to_torch(bias))

    their_out, (their_dx,), their_dparams = output_and_gradients(call, (x,), cotangent, theirs)
    assert_close(out, their_out, ATTENTION_TOLERANCE)
    assert_gradients_close({"x": dx, **by_original_name(dparams, "LocalMHA")}, {"x": their_dx, **their_dparams})


@pytest.mark.parametrize(("dim", "mult"), [(12, 4), (7, 3)])
def test_feed_forward_equals_the_original(dim, mult):
    x, cotangent = normal(0, 2, 5, dim), normal(1, 2, 5, dim)
    ours = FeedForward(dim=dim, mult=mult)
    variables = filled_variables(ours, x)
    theirs = load(original.transformer.FeedForward(dim=dim, mult=mult), variables["params"], "FeedForward")

    def call(params, x):
        return ours.apply({"params": params}, x)

    out, (dparams, dx) = ours_and_gradients(call, (variables["params"], x), cotangent)
    their_out, (their_dx,), their_dparams = output_and_gradients(theirs, (x,), cotangent, theirs)
    assert_close(out, their_out, ATTENTION_TOLERANCE)
    assert_gradients_close({"x": dx, **by_original_name(dparams, "FeedForward")}, {"x": their_dx, **their_dparams})


@pytest.mark.parametrize(("i", "j"), [(4, 8), (5, 5), (3, 10)])
def test_dynamic_position_bias_equals_the_original(i, j):
    cotangent = normal(1, 3, i, j)
    ours = DynamicPositionBias(dim=6, heads=3)
    variables = filled_variables(ours, i, j)
    theirs = load(original.DynamicPositionBias(dim=6, heads=3), variables["params"], "DynamicPositionBias")

    def call(params):
        return ours.apply({"params": params}, i, j)

    out, (dparams,) = ours_and_gradients(call, (variables["params"],), cotangent)
    their_out, _, their_dparams = output_and_gradients(lambda: theirs(i, j), (), cotangent, theirs)
    assert_close(out, their_out, ATTENTION_TOLERANCE)
    assert_gradients_close(by_original_name(dparams, "DynamicPositionBias"), their_dparams)


def test_dropout_drops_probabilities():
    """The original's LocalMHA never passes `dropout` to its attention: `dropout` and `attn_dropout` do nothing."""
    x = normal(0, 32, 9, 8)
    options = {"dim": 8, "window_size": 4, "dim_head": 6, "heads": 1, "causal": True, "dropout": 0.75}
    ours = LocalMHA(**IN_BLOCKS, **options)
    variables = filled_variables(ours, x)
    theirs = load(original.LocalMHA(**options), variables["params"], "LocalMHA")
    kept = theirs.eval()(to_torch(x)).detach().numpy()
    assert_close(theirs.train()(to_torch(x)).detach().numpy(), kept, 0)

    assert_close(run(ours, variables, x), kept, ATTENTION_TOLERANCE)
    dropped = np.asarray(run(ours, variables, x, deterministic=False, rngs={"dropout": jax.random.key(0)}))
    gone = ~dropped[:, 0].any(-1)
    assert 12 <= gone.sum() <= 31
    assert_close(dropped[~gone, 0], kept[~gone, 0] * 4, 10 * ATTENTION_TOLERANCE)

    tokens = np.random.RandomState(0).randint(0, 11, (2, 9))
    ours, theirs = both_transformers({"attn_dropout": 0.75, "depth": 1, "num_residual_streams": 1})
    variables = filled_variables(ours, tokens)
    load(theirs, variables["params"])
    kept = theirs.eval()(to_torch(tokens)).detach().numpy()
    assert_close(theirs.train()(to_torch(tokens)).detach().numpy(), kept, 0)
    dropped = run(ours, variables, tokens, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert np.abs(dropped - kept).max() > 0.1


# Residual streams


@pytest.mark.parametrize("streams", [2, 4])
def test_residual_streams_equal_the_original(streams):
    residual, cotangent = normal(0, streams, 2, 5, 6), normal(1, streams, 2, 5, 6)
    ours = HyperConnection(streams, dim=6, index=1)
    variables = filled_variables(ours, residual)
    theirs = load(HyperConnections(streams, dim=6), variables["params"], "HyperConnection")

    def run_ours(params, residual):
        x, mixed = ours.apply({"params": params}, residual)
        return jnp.stack(mixed.add(jnp.sin(x)).write())

    def run_theirs(residual):
        x, write = theirs(residual.transpose(0, 1).flatten(0, 1))
        return write(x.sin()).unflatten(0, (2, streams)).transpose(0, 1)

    out, (dparams, dresidual) = ours_and_gradients(run_ours, (variables["params"], residual), cotangent)
    their_out, (their_dresidual,), their_dparams = output_and_gradients(run_theirs, (residual,), cotangent, theirs)
    assert_close(out, their_out, ATTENTION_TOLERANCE)
    dparams = by_original_name(dparams, "HyperConnection")
    assert_gradients_close({"streams": dresidual, **dparams}, {"streams": their_dresidual, **their_dparams})


# LocalTransformer


class TheirMixer(torch.nn.Module):
    """A global layer that needs positions and width: the running mean, then a Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.mix = torch.nn.Linear(dim, dim)

    def forward(self, x):
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.mix(x.cumsum(1) / count)


class OurMixer(nn.Module):
    dim: int

    @nn.compact
    def __call__(self, x, mask=None):
        count = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return nn.Dense(self.dim, name="mix")(x.cumsum(1) / count)


BASE = {
    "num_tokens": 17,
    "max_seq_len": 40,
    "dim": 16,
    "depth": 2,
    "local_attn_window_size": 5,
    "dim_head": 4,
    "heads": 3,
}

TRANSFORMER_CASES = [
    (13, {}),
    (23, {"num_residual_streams": 1}),
    (16, {"num_residual_streams": 2, "exact_windowsize": False, "look_backward": 2}),
    (13, {"causal": False, "num_residual_streams": 1, "exact_windowsize": False, "reference_rotary": True}),
    (11, {"causal": False, "look_forward": 0, "look_backward": 2, "num_residual_streams": 2}),
    (13, {"use_dynamic_pos_bias": True}),
    (17, {"use_dynamic_pos_bias": True, "exact_windowsize": False, "num_residual_streams": 1, "qk_rmsnorm": True}),
    (13, {"use_xpos": True, "qk_rmsnorm": True, "qk_scale": 5}),
    (19, {"use_xpos": True, "xpos_scale_base": 7, "look_backward": 2, "num_residual_streams": 1}),
    (7, {"gate_values_per_head": True, "shared_qk": True, "num_residual_streams": 2}),
    (13, {"causal": False, "num_tokens": None, "reference_rotary": True, "gate_values_per_head": True}),
    (12, {"global_attn_layer": True}),
    (14, {"global_attn_layer": True, "layers_insert_global_attn": (2,), "num_residual_streams": 1, "ff_mult": 3}),
    (4, {"qk_rmsnorm": True, "gate_values_per_head": True, "num_residual_streams": 3, "heads": 2, "dim_head": 6}),
]


def both_transformers(options: dict):
    """Return our model and the original with the same arguments, translated where names differ."""
    options = {**BASE, **options}
    theirs = {name: value for name, value in options.items() if name != "reference_rotary"}
    if options.get("global_attn_layer"):
        theirs["global_attn_layer"] = TheirMixer(options["dim"])
        options["global_attn_layer"] = lambda index: OurMixer(options["dim"])
    return LocalTransformer(**IN_BLOCKS, **options), original.LocalTransformer(**theirs)


def draw_tokens(options: dict, n: int) -> np.ndarray:
    if {**BASE, **options}["num_tokens"] is None:
        return normal(0, 2, n, BASE["dim"])
    return np.random.RandomState(0).randint(0, BASE["num_tokens"], (2, n))


@pytest.mark.parametrize(("n", "options"), TRANSFORMER_CASES, ids=str)
def test_transformer_equals_the_original(n, options):
    tokens = draw_tokens(options, n)
    ours, theirs = both_transformers(options)
    variables = filled_variables(ours, tokens)
    load(theirs, variables["params"])
    mask = None if ours.causal else torch.ones(2, n, dtype=torch.bool)
    logits = run(ours, variables, tokens)
    assert_close(logits, theirs(to_torch(tokens), mask=mask).detach().numpy(), LOGITS_TOLERANCE)


@pytest.mark.parametrize(("n", "options"), [TRANSFORMER_CASES[i] for i in (0, 4, 6, 13)], ids=str)
def test_loss_and_its_gradients_equal_the_original(n, options):
    tokens = draw_tokens(options, n)
    tokens[0, -1] = -1  # only a label: the original cannot embed it
    ours, theirs = both_transformers(options)
    variables = filled_variables(ours, tokens)
    load(theirs, variables["params"])

    def call(params):
        if ours.causal:
            return ours.apply({"params": params}, tokens, return_loss=True)
        # This loss is refused, since tokens see their labels; the gradients of the logits are the original's.
        log_p = jax.nn.log_softmax(ours.apply({"params": params}, tokens[:, :-1]))
        counted = tokens[:, 1:] >= 0
        labels = jnp.where(counted, tokens[:, 1:], 0)
        return -jnp.where(counted, jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0], 0).sum() / counted.sum()

    loss, gradients = jax.jit(jax.value_and_grad(call))(variables["params"])
    mask = None if ours.causal else torch.ones(2, n - 1, dtype=torch.bool)
    their_loss = theirs(to_torch(tokens), mask=mask, return_loss=True)
    assert_close(loss, their_loss.item(), LOSS_TOLERANCE)
    their_loss.backward()
    their_gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert_gradients_close(by_original_name(gradients), their_gradients, LOSS_GRADIENT_TOLERANCE)


def test_loss_takes_a_mask_of_any_length():
    """The original trims the tokens but not the mask, and crashes if the result is a whole number of windows."""
    n = 11
    tokens = draw_tokens({}, n)
    mask = np.arange(n) < np.array([[n], [n - 3]])
    ours, theirs = both_transformers({})
    variables = filled_variables(ours, tokens)
    load(theirs, variables["params"])
    with pytest.raises(RuntimeError):
        theirs(to_torch(tokens), mask=to_torch(mask), return_loss=True)
    their_loss = theirs(to_torch(tokens), mask=to_torch(mask[:, :-1]), return_loss=True).item()
    loss = run(ours, variables, tokens, mask=mask, return_loss=True)
    assert_close(loss, their_loss, LOSS_TOLERANCE)


def test_a_loss_of_tokens_that_are_seen_is_refused():
    """Either way a token sees its own label; the original computes a loss nevertheless."""
    n = 12
    tokens = draw_tokens({}, n)
    ours, theirs = both_transformers({"causal": False})
    load(theirs, filled_variables(ours, tokens)["params"])
    mask = torch.ones(2, n, dtype=torch.bool)
    logits, changed = (theirs(to_torch(x), mask=mask).detach() for x in (tokens, (tokens + (np.arange(n) == 5)) % 7))
    assert (logits - changed)[:, 4].abs().max() > 1e-3  # token 4 predicts token 5
    theirs(to_torch(tokens), mask=mask[:, :-1], return_loss=True)
    with pytest.raises(ValueError, match="`causal` must be True for the loss of the next token, got False"):
        ours.init(jax.random.key(0), tokens, return_loss=True)


def test_ignored_tokens_are_embedded_as_zeros():
    """The original embeds ignored tokens, which is an index error."""
    tokens = draw_tokens({}, 13)
    tokens[0, [0, 4, 9]] = -1
    ours, theirs = both_transformers({})
    variables = filled_variables(ours, tokens)
    load(theirs, variables["params"])
    with pytest.raises(IndexError):
        theirs(to_torch(tokens), return_loss=True)

    ignored = to_torch(tokens) < 0
    theirs.token_emb.register_forward_hook(lambda module, inputs, out: out.masked_fill(ignored[:, :-1, None], 0.0))
    logits = theirs(to_torch(tokens).masked_fill(ignored, 0)[:, :-1])
    their_loss = torch.nn.functional.cross_entropy(logits.mT, to_torch(tokens)[:, 1:], ignore_index=-1).item()
    assert_close(run(ours, variables, tokens, return_loss=True), their_loss, LOSS_TOLERANCE)


def test_dynamic_bias_works_for_every_window():
    """The original computes the bias for a slab of two windows whatever the window, and crashes on any other.

    Ours is compared with the original where reach and distances agree: two exact windows of 3 back are one of 6;
    in a sequence of one window, looking forward too changes nothing.
    """
    tokens = draw_tokens({}, 14)
    three, six = ({"local_attn_window_size": w, "look_backward": 6 // w, "use_dynamic_pos_bias": True} for w in (3, 6))
    ours, crashes = both_transformers(three)
    variables = filled_variables(ours, tokens)
    with pytest.raises(RuntimeError):
        load(crashes, variables["params"])(to_torch(tokens))
    theirs = load(both_transformers(six)[1], variables["params"])
    assert_close(run(ours, variables, tokens), theirs(to_torch(tokens)).detach().numpy(), LOGITS_TOLERANCE)

    one_window = {
        "causal": False,
        "exact_windowsize": False,
        "use_dynamic_pos_bias": True,
        "local_attn_window_size": 14,
    }
    ours, crashes = both_transformers({**one_window, "look_forward": 1})
    with pytest.raises(RuntimeError):
        load(crashes, variables["params"])(to_torch(tokens))
    theirs = load(both_transformers({**one_window, "look_forward": 0})[1], variables["params"])
    assert_close(run(ours, variables, tokens), theirs(to_torch(tokens)).detach().numpy(), LOGITS_TOLERANCE)


# Parameters


README_MODEL = {
    "num_tokens": 64,
    "dim": 64,
    "depth": 2,
    "max_seq_len": 128,
    "causal": True,
    "local_attn_window_size": 16,
    "heads": 4,
    "dim_head": 16,
}


def distance_between_samples(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Kolmogorov-Smirnov statistic: the largest gap between two empirical distribution functions."""
    a, b = np.sort(a.ravel()), np.sort(b.ravel())
    points = np.concatenate([a, b])
    return np.abs(np.searchsorted(a, points, "right") / a.size - np.searchsorted(b, points, "right") / b.size).max()


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_rmsnorm": True, "gate_values_per_head": True, "use_dynamic_pos_bias": True, "num_residual_streams": 2}],
    ids=str,
)
def test_fresh_parameters_are_the_originals_one_for_one_and_from_its_distributions(options):
    torch.manual_seed(0)
    theirs = {
        name: p.detach().numpy() for name, p in original.LocalTransformer(**README_MODEL, **options).named_parameters()
    }
    tokens = np.zeros((1, 16), int)
    params = jax.jit(LocalTransformer(**IN_BLOCKS, **README_MODEL, **options).init)(jax.random.key(1), tokens)["params"]
    ours = by_original_name(params)
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    for name, p in theirs.items():
        if name.endswith("static_alpha"):  # its first column is one-hot in a random row; ours cycles through rows
            assert_close(ours[name][:, 1:], p[:, 1:], 0, name)
            assert sorted(ours[name][:, 0]) == sorted(p[:, 0])
        elif p.std() == 0:
            assert_close(ours[name], p, 0, name)
        else:
            sizes = 2 / p.size  # 1 / n + 1 / m
            assert distance_between_samples(ours[name], p) < 1.95 * sizes**0.5, name  # exceeded by chance once in 1,000
            assert abs(ours[name].mean() - p.mean()) < 4 * p.std() * sizes**0.5, name


def test_fresh_uniform_parameters_stay_within_the_originals_bounds():
    tokens = np.zeros((1, 16), int)
    options = {"gate_values_per_head": True, "use_dynamic_pos_bias": True}
    params = jax.jit(LocalTransformer(**IN_BLOCKS, **README_MODEL, **options).init)(jax.random.key(1), tokens)["params"]
    theirs = original.LocalTransformer(**README_MODEL, **options)
    ours = by_original_name(params)
    linears = {name: module for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 14
    for name, module in linears.items():
        bound = module.in_features**-0.5
        for part, parameter in module.named_parameters():
            largest = np.abs(ours[f"{name}.{part}"]).max()
            assert largest <= bound
            if parameter.numel() > 100:
                assert largest > 0.95 * bound


def test_the_one_hot_stream_of_each_branch_goes_by_turns():
    tokens = np.zeros((1, 16), int)
    params = jax.jit(LocalTransformer(**IN_BLOCKS, **README_MODEL).init)(jax.random.key(1), tokens)["params"]
    alphas = [
        params[f"layers_{i}"][f"{part}_streams"]["static_alpha"][:, 0] for i in range(2) for part in ("attn", "ff")
    ]
    assert np.argmax(alphas, -1).tolist() == [0, 1, 2, 3]
