"""Wrong calls of every public function and method: the error names the argument, what was given, and what to do.

The calls are generated from the signatures, see `wrong_calls`, with concrete and traced arguments.
"""

import ast
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_local_attention
from flax_local_attention import (
    TPU,
    AttentionOptions,
    DynamicPositionBias,
    FeedForward,
    Halo,
    KVCache,
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    LogSum,
    MosaicGPU,
    Operands,
    Rotary,
    Triton,
    Window,
    Windowed,
    attend,
    attend_cache,
    attention_fn,
    cached_attention,
    from_torch,
    generate,
    local_attention,
    merge_attention,
    model_from_torch,
    parameter_axes,
    parameter_shardings,
    rotate,
    stack_layers,
    stream,
    to_torch,
    unstack_layers,
)
from tests import cases, wrong_calls
from tests.wrong_calls import Door, calls_of, what_is_unclear

pytestmark = pytest.mark.usefixtures("quick_compile")


def made(module, **right):
    """Make variables of the right shapes, all of them zeros: no call is compiled before the first test."""
    shapes = jax.eval_shape(partial(module.init, **right), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)


B, H, N, D, E, C = 2, 2, 6, 4, 6, 7
WINDOW = Window(3, causal=True)
OPTIONS = AttentionOptions(WINDOW, rotary=Rotary(D))

Q = {"q": cases.normal(0, B, 2 * H, N, D), "k": cases.normal(1, B, H, N, D), "v": cases.normal(2, B, H, N, D)}
MASK = {"mask": cases.normal(3, B, N) > -2, "segment_ids": jnp.zeros((B, N), jnp.int32)}
SCORES = {"attn_bias": cases.normal(4, 2 * H, 3, 6), "sinks": cases.normal(5, 2 * H)}
KEYS = {"global_keys": (cases.normal(6, H, 3, D), cases.normal(7, H, 3, D))}
POSITIONS = {"positions": jnp.arange(N)[None] + jnp.zeros((B, 1), jnp.int32)}
RNG = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
TOKENS = jnp.arange(B * N).reshape(B, N) % C
X = cases.normal(8, B, N, E)

PLAIN = {"dim_head": D, "heads": H}
FIELDS = {"num_tokens": C, "max_seq_len": 16, "dim": E, "depth": 2, "local_attn_window_size": 3, **PLAIN}
MHA = LocalMHA(E, 3, causal=True, **PLAIN)
MODEL = LocalTransformer(**FIELDS)
VARIABLES = made(MODEL, x=TOKENS)
CACHE = KVCache.create(OPTIONS, B, H, D, rewind=3)
FULL = CACHE.append(Q["k"], Q["v"])
STATE = to_torch(VARIABLES, MODEL)

FREE = {
    **dict.fromkeys(("look_backward", "look_forward", "rewind", "keep_first", "memory_tokens", "q_offset"), "zero"),
    **dict.fromkeys(("dropout", "dropout_rate", "attn_dropout", "ff_dropout", "left", "right"), "zero"),
    **dict.fromkeys(("scale", "qk_scale", "ignore_index"), "zero minus"),
    **dict.fromkeys(("temperature", "min_p", "eos", "depth", "count", "max_seq_len"), "zero"),
    **dict.fromkeys(("mask", "segment_ids"), "fewer_axes"),  # shared by all rows
    **dict.fromkeys(("attn_bias", "sinks"), "fewer_axes integers"),
    **dict.fromkeys(("prompt", "prompt_lengths", "prompt_mask"), "lists"),
    **dict.fromkeys(("v", "value"), "longer"),
    "local_attn_window_size": "none",
}
"""Values that arguments of these names take in every call."""


def door(name, call, right, takes=None, **more):
    """Return a `Door` whose arguments take the values in `FREE`."""
    return Door(name, call, right, FREE | (takes or {}), **more)


def called(module, right, method="__call__", variables=None, **more):
    """Return the `Door` of a module's method; the right call makes its variables, if it needs any."""
    if variables is None:
        variables = made(module, **right)
    kind = type(module).__name__
    name = kind if method == "__call__" else f"{kind}.{method}"
    return door(name, partial(module.apply, variables, method=method), right, of=getattr(type(module), method), **more)


LEAVES = {"layers_0": {"bias": jnp.ones(2)}, "layers_1": {"bias": jnp.ones(2)}}
MESH = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
REQUEST = {"model": MODEL, "variables": VARIABLES, "prompt": TOKENS, "length": 2, "temperature": 0.0}
HEADS_LAST = {"query": X[:, :, None], "key": X[:, :, None], "value": X[:, :, None]}
ANYTHING = " ".join(wrong_calls.VALUES)
MORE_AXES = "more_axes fewer_axes longer more_rows"

FUNCTIONS = [
    door("local_attention", local_attention, {**Q, **MASK, **SCORES, **RNG, "window_size": 3, "causal": True}),
    door("local_attention_by_window", local_attention, {**Q, "window": WINDOW}),
    door("attend", attend, {"operands": Operands.create(**Q, options=OPTIONS), "options": OPTIONS, **POSITIONS}),
    door("merge_attention", merge_attention, {"parts": [(Q["q"], LogSum(Q["q"][..., 0], Q["q"][..., 0] ** 2))]}),
    door("rotate", rotate, {"x": Q["q"], "rotary": Rotary(D), **POSITIONS}, {"x": "longer", "positions": "fewer_axes"}),
    door("attention_fn", attention_fn, {"options": OPTIONS}),
    door(
        "attention_fn()",
        attention_fn(WINDOW),
        HEADS_LAST,
        says={"query": "query|q", "key": "key|k", "value": "value|v"},
    ),
    door("cached_attention", cached_attention, {**Q, **MASK, **SCORES, **POSITIONS, "cache": CACHE}),
    door("attend_cache", attend_cache, {"q": Q["q"][:, :, -2:], "cache": FULL, **SCORES}),
    door(
        "generate",
        generate,
        {**REQUEST, "rng": jax.random.key(0), "prompt_lengths": jnp.array([3, 4])},
        {"prompt": "lists longer"},
        says={"prompt": "prompt|prompt_lengths"},
    ),
    door(
        "generate_by_mask",
        generate,
        {**REQUEST, "prompt_mask": MASK["mask"], "top_k": 2, "top_p": 0.5},
        says={"prompt": "prompt|prompt_mask"},
    ),
    door("stream", lambda **given: next(stream(**given)), REQUEST, {"prompt": "lists more_rows"}, of=stream),
    door("from_torch", from_torch, {"state_dict": STATE, "module": MODEL}),
    door("to_torch", to_torch, {"variables": VARIABLES, "module": MODEL}),
    door("model_from_torch", model_from_torch, {"state_dict": STATE, "local_attn_window_size": 3, "heads": H}),
    door("parameter_axes", parameter_axes, {"tree": VARIABLES}, {"tree": ANYTHING}),
    door("parameter_shardings", parameter_shardings, {"tree": VARIABLES, "mesh": MESH}, {"tree": ANYTHING}),
    door("stack_layers", stack_layers, {"tree": LEAVES}),
    door("unstack_layers", unstack_layers, {"tree": stack_layers(LEAVES)}),
]

VALUES = [
    door("Window", Window, {"window_size": 3}),
    door("Window.sliding", Window.sliding, {"keys": 3}),
    door("Window.between", Window.between, {"left": 3, "right": 2}),
    door("Window.chunks", Window.chunks, {"size": 3}),
    door("Window.everything", Window.everything, {}),
    door("Window.within", WINDOW.within, {"length": 5}),
    door("Window.visible_pairs", WINDOW.visible_pairs, {"n": 5}, {"n": "zero"}),
    door("Window.draw", WINDOW.draw, {"n": 5}, {"n": "zero"}),
    door("AttentionOptions", AttentionOptions, {"window": WINDOW}),
    door("AttentionOptions.of", AttentionOptions.of, {"options": WINDOW}),
    door("Rotary", Rotary, {"dim": 4}),
    door("Rotary.linear", Rotary.linear, {"dim": 4, "factor": 2.0}),
    door("Rotary.llama3", Rotary.llama3, {"dim": 4}),
    door(
        "Rotary.yarn",
        Rotary.yarn,
        {"dim": 4, "factor": 2.0, "original_max_position_embeddings": 8},
        {"mscale": "zero", "mscale_all_dim": "zero"},
    ),
    door(
        "Rotary.longrope",
        Rotary.longrope,
        {"dim": 4, "factors": [1.0, 2.0], "factor": 2.0, "original_max_position_embeddings": 8},
    ),
    door("Rotary.for_window", Rotary(4).for_window, {"window": WINDOW}),
    door(
        "Rotary.query_table", Rotary(4).query_table, {"positions": jnp.arange(3)}, {"positions": f"floats {MORE_AXES}"}
    ),
    door("Windowed", Windowed, {}),
    door("Triton", Triton, {}),
    door("MosaicGPU", MosaicGPU, {}),
    door("TPU", TPU, {}),
    door("Halo", Halo, {"axis_name": "x"}),
    door("Operands.create", Operands.create, {**Q, **MASK, **SCORES, **KEYS, "options": OPTIONS}),
    door("KVCache.create", KVCache.create, {"options": OPTIONS, "batch": B, "kv_heads": H, "dim_head": D}),
    door("KVCache.append", CACHE.append, {"k": Q["k"], "v": Q["v"], **MASK, **POSITIONS}),
    door("KVCache.rewind", FULL.rewind, {"count": 1}),
    door("TransformerCache.rewind", MODEL.init_cache(B, rewind=2).rewind, {"count": 0}),
]

OR_MASK = {"x": "x|mask"}

MODULES = [
    door("LocalAttention_fields", LocalAttention, {"window_size": 3}),
    door("LocalMHA_fields", LocalMHA, {"dim": E, "window_size": 3}),
    door("FeedForward_fields", FeedForward, {"dim": E}),
    door("DynamicPositionBias_fields", DynamicPositionBias, {"dim": E, "heads": H}),
    door("LocalTransformer_fields", LocalTransformer, FIELDS),
    called(LocalAttention(3, causal=True), {**Q, **MASK, **SCORES}, variables={}),
    called(LocalAttention(3, causal=True, dim=D), {**Q, "cache": CACHE, **POSITIONS}, variables={}),
    called(
        LocalMHA(E, 3, causal=True, **PLAIN),
        {"x": X, **MASK, **POSITIONS, "attn_bias": SCORES["attn_bias"][:2]},
        says=OR_MASK,
    ),
    called(FeedForward(E), {"x": X}, takes={"x": MORE_AXES.replace("longer", "")}),
    called(DynamicPositionBias(E, H), {"i": 3, "j": 6}, takes={"offset": "zero minus"}),
    called(MODEL, {"x": TOKENS, **MASK, **POSITIONS}, variables=VARIABLES, says=OR_MASK),
    called(MODEL, {"x": TOKENS, **MASK, **POSITIONS, "labels": TOKENS}, "sum_loss", variables=VARIABLES, says=OR_MASK),
    called(MODEL, {"x": TOKENS, "cache": MODEL.init_cache(B)}, variables=VARIABLES, takes={"x": "longer"}),
    called(MODEL.clone(num_tokens=None), {"x": X, **MASK}, says=OR_MASK),
    door("LocalMHA.init_cache", MHA.init_cache, {"batch": B}),
    door("LocalTransformer.init_cache", MODEL.init_cache, {"batch": B}),
]

DOORS = FUNCTIONS + VALUES + MODULES
ARGUMENTS = [(door, parameter) for door in DOORS for parameter in door.arguments()]


@pytest.mark.parametrize("door", DOORS, ids=str)
def test_the_right_call_is_right(door):
    door.call(**door.right)


@pytest.mark.parametrize(("door", "parameter"), ARGUMENTS, ids=lambda x: getattr(x, "name", str(x)))
def test_every_wrong_call_says_the_rule_what_was_given_and_what_to_do(door, parameter):
    unclear = {name: what_is_unclear(door, parameter.name, call) for name, call in calls_of(door, parameter)}
    assert not {name: problem for name, problem in unclear.items() if problem}


def test_there_are_many_wrong_calls_of_every_public_name():
    calls = [call for door, parameter in ARGUMENTS for call in calls_of(door, parameter)]
    assert len(calls) >= 800
    names = {door.name.partition(".")[0].partition("_fields")[0] for door in DOORS}
    plain = {"AXIS_RULES", "Dense", "LogSum", "LossSum", "Unsupported"}  # these have no arguments to check
    assert names >= set(flax_local_attention.__all__) - plain


def test_a_wrong_call_is_made_of_the_signature():
    def function(count: int, flag: bool = False, *, mask: jax.Array | None = None):
        """Take all."""

    given = Door("function", function, {"count": 1, "mask": MASK["mask"]}, {"count": "zero"})
    wrong = {parameter.name: set(given.wrong(parameter)) for parameter in given.arguments()}
    assert {"none", "true", "minus", "fraction"} < wrong["count"]
    assert "zero" not in wrong["count"]
    assert "true" not in wrong["flag"]
    assert "none" not in wrong["mask"]
    assert {"floats", "fewer_axes", "lists"} < wrong["mask"]
    (parameter, *_) = given.arguments()
    assert what_is_unclear(given, "count", dict(calls_of(given, parameter))["fraction"]) == "accepted"


def raised(path):
    """Yield the line and the message of each error that a file raises, with the source of interpolated parts."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = ast.unparse(node.exc.args[0])
            yield node.lineno, text[2:-1] if text.startswith(("f'", 'f"')) else text.strip("'\"")


def test_every_error_of_the_package_has_the_three_parts():
    package = pathlib.Path(flax_local_attention.__file__).parent
    texts = [(path.name, *error) for path in package.rglob("*.py") for error in raised(path)]
    assert len(texts) > 100
    assert [text for text in texts if not wrong_calls.CLEAR.search(text[-1])] == []
