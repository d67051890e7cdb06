"""Weights of the original: round trips, errors, and equal outputs from equal weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import examples.from_torch
from flax_local_attention import (
    DynamicPositionBias,
    FeedForward,
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    Rotary,
    stack_layers,
)
from flax_local_attention.convert import from_torch, inverse_frequencies, model_from_torch, to_torch
from tests.original import by_original_name, filled_variables, normal

pytestmark = pytest.mark.usefixtures("quick_compile")

LOGITS_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5

SIZES = {"num_tokens": 11, "max_seq_len": 13, "dim": 12, "depth": 2, "dim_head": 4, "heads": 2}
SMALL = SIZES | {"local_attn_window_size": 3}
TOKENS = jnp.zeros((1, 5), jnp.int32)

MODULES = {
    "transformer": (LocalTransformer(**SMALL, num_residual_streams=1), TOKENS),
    "streams": (LocalTransformer(**SMALL, num_residual_streams=3), TOKENS),
    "gates": (LocalTransformer(**SMALL, gate_values_per_head=True, qk_rmsnorm=True), TOKENS),
    "dynamic bias": (LocalTransformer(**SMALL, use_dynamic_pos_bias=True, num_residual_streams=2), TOKENS),
    "bidirectional": (LocalTransformer(**SMALL, causal=False, reference_rotary=True), TOKENS),
    "continuous": (LocalTransformer(**(SMALL | {"num_tokens": None})), jnp.zeros((1, 5, 12))),
    "attention": (LocalMHA(dim=6, window_size=3, dim_head=4, heads=3, causal=True), jnp.zeros((1, 5, 6))),
    "attention with all": (
        LocalMHA(6, 3, dim_head=4, heads=3, causal=True, prenorm=True, qk_rmsnorm=True, gate_values_per_head=True),
        jnp.zeros((1, 5, 6)),
    ),
    "attention without rotary": (LocalMHA(6, 3, dim_head=4, heads=3, use_rotary_pos_emb=False), jnp.zeros((1, 5, 6))),
    "feed-forward": (FeedForward(6, mult=2.5), jnp.zeros((1, 5, 6))),
    "position bias": (DynamicPositionBias(5, 3), 2, 4),
}


def assert_same_bits(ours, theirs) -> None:
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert sorted(ours) == sorted(theirs)
    for name, x in ours.items():
        x, y = np.asarray(x), np.asarray(theirs[name])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


def variables_of(name: str, dtype=np.float32):
    module, *inputs = MODULES[name]
    return module, jax.tree.map(lambda x: np.asarray(x).astype(dtype), filled_variables(module, *inputs))


# Round trips


@pytest.mark.slow_but("*-float32")
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("name", MODULES)
def test_there_and_back_is_bit_equal(name, dtype):
    module, variables = variables_of(name, dtype)
    assert_same_bits(variables, from_torch(to_torch(variables, module), module))
    assert_same_bits(variables, from_torch(to_torch(variables)))


@pytest.mark.parametrize("name", MODULES)
def test_names_and_layouts_are_those_of_a_second_list(name):
    module, variables = variables_of(name)
    assert_same_bits(by_original_name(variables["params"], type(module).__name__), to_torch(variables))


@pytest.mark.slow_but("transformer", "streams")
@pytest.mark.parametrize("name", ["transformer", "streams", "gates", "dynamic bias", "bidirectional", "continuous"])
def test_stacked_layers_go_there_and_back(name):
    module, variables = variables_of(name)
    looped, stacked = module.clone(scan_layers=True), stack_layers(variables)
    state_dict = to_torch(stacked, looped)
    assert_same_bits(to_torch(variables, module), state_dict)
    assert_same_bits(to_torch(variables), to_torch(stacked))
    assert_same_bits(stacked, from_torch(state_dict, looped))
    assert_same_bits(variables, from_torch(state_dict))
    with pytest.raises(ValueError, match=r"argument: `depth` is 2 by the weights, 3 in the module"):
        from_torch(state_dict, looped.clone(depth=3))


def test_stacked_layers_with_inserted_ones_go_there_and_back():
    module = LocalTransformer(**SMALL, num_residual_streams=1, global_attn_layer=lambda layer: Mixer())
    variables = filled_variables(module, TOKENS)
    stacked = stack_layers(variables)
    to_ours = {"global_branch": lambda layer, weights: unflatten_dict(weights, sep=".")}
    to_theirs = {"global_branch": lambda layer, params: flatten_dict(params, sep=".")}
    state_dict = to_torch(stacked, module.clone(scan_layers=True), **to_theirs)
    assert_same_bits(to_torch(variables, module, **to_theirs), state_dict)
    assert_same_bits(stacked, from_torch(state_dict, module.clone(scan_layers=True), **to_ours))


def test_jax_arrays_are_taken_as_they_are():
    module, variables = variables_of("streams")
    on_device = {name: jnp.asarray(x) for name, x in to_torch(variables).items()}
    assert_same_bits(variables, from_torch(on_device, module))


def test_what_is_returned_owns_its_memory():
    module, variables = variables_of("feed-forward")
    state_dict = to_torch(variables)
    converted = from_torch(state_dict, module)
    for x in state_dict.values():
        assert x.flags.c_contiguous
        x[...] = 0
    assert_same_bits(variables, converted)


def test_prefix_takes_a_part_of_a_larger_state_dict():
    module, variables = variables_of("attention")
    part = to_torch(variables, module, prefix="encoder.attn.")
    assert all(name.startswith("encoder.attn.") for name in part)
    whole = part | {"encoder.attn_norm.weight": np.ones(3)}
    assert_same_bits(variables, from_torch(whole, module, prefix="encoder.attn."))


def test_float64_is_kept():
    _, variables = variables_of("feed-forward", np.float64)
    assert all(x.dtype == np.float64 for x in to_torch(variables).values())


class Tensor:
    """A stand-in for a PyTorch tensor: NumPy can read it only through its methods."""

    def __init__(self, values, dtype):
        self.values, self.dtype = values, dtype

    def detach(self):
        return self

    def cpu(self):
        return self

    def float(self):
        return Tensor(self.values.astype(np.float32), "torch.float32")

    def numpy(self):
        if self.dtype in ("torch.bfloat16", "torch.qint8"):
            raise TypeError(f"Got unsupported ScalarType of {self.dtype}")
        return self.values

    def __array__(self, *args, **kwargs):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_tensors_are_read_by_their_own_methods(dtype):
    module, variables = variables_of("feed-forward", dtype)
    tensors = {name: Tensor(x, f"torch.{x.dtype}") for name, x in to_torch(variables).items()}
    assert_same_bits(variables, from_torch(tensors, module))


def test_a_safetensors_file_is_read_as_it_is(tmp_path):
    files = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    module, variables = variables_of("streams")
    path = tmp_path / "weights.safetensors"
    files.save_file(to_torch(variables, module), path)
    assert_same_bits(variables, from_torch(files.load_file(path), module))


@pytest.mark.slow
def test_the_example_loads_a_file_and_goes_on_from_a_prompt(tmp_path, capsys):
    files = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    model = LocalTransformer(**(SMALL | {"num_tokens": 256, "max_seq_len": 24}), num_residual_streams=2)
    files.save_file(to_torch(filled_variables(model, TOKENS), model), tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    assert examples.from_torch.main([path, "--window-size", "3", "--prompt", "Once", "--length", "5"]) == 0
    printed = capsys.readouterr().out
    assert "dim 12, depth 2, 2 heads of 4, 2 residual streams, 256 tokens" in printed
    assert "\nOnce" in printed
    assert examples.from_torch.main([path, "--window-size", "3", "--heads", "3"]) == 2
    assert "`heads` must be that of the weights, 2, got 3" in capsys.readouterr().err


# The buffers of rotary


def test_buffers_are_written_when_the_module_is_given():
    module, variables = variables_of("streams")
    buffers = {name: x for name, x in to_torch(variables, module).items() if name.endswith("inv_freq")}
    assert sorted(buffers) == [f"layers.{layer}.0.branch.attn_fn.rel_pos.inv_freq" for layer in (0, 1)]
    for x in buffers.values():
        np.testing.assert_allclose(x, [1, 0.01], rtol=1e-6)
    assert not any(name.endswith("inv_freq") for name in to_torch(variables))


@pytest.mark.parametrize("name", ["dynamic bias", "attention without rotary", "feed-forward"])
def test_no_buffers_are_written_without_rotary(name):
    module, variables = variables_of(name)
    assert not any(name.endswith("inv_freq") for name in to_torch(variables, module))


@pytest.mark.parametrize("fields", [{"rotary": Rotary(4)}, {"rotary": False}, {"scale": 0.5}], ids=str)
def test_what_the_original_cannot_have_is_refused(fields):
    module = LocalMHA(6, 4, heads=2, dim_head=4)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 6)))
    (name,) = fields
    with pytest.raises(ValueError, match=f"`module` must have `{name}=None`, got .* which the original cannot have"):
        to_torch(variables, module.clone(**fields))


def test_buffers_of_another_theta_are_refused():
    module, variables = variables_of("streams")
    state_dict = to_torch(variables, module)
    name = "layers.1.0.branch.attn_fn.rel_pos.inv_freq"
    with pytest.raises(ValueError, match=f"not of theta 10000: {name}"):
        from_torch(state_dict | {name: np.array([1, 0.02], np.float32)}, module)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("dim_head", [2, 4, 64, 256])
def test_buffers_are_compared_within_their_precision(dim_head, dtype):
    module = LocalMHA(6, 3, dim_head=dim_head, heads=2, causal=True)
    variables = filled_variables(module, jnp.zeros((1, 5, 6)))
    buffer = inverse_frequencies(dim_head).astype(dtype)
    from_torch(to_torch(variables) | {"attn_fn.rel_pos.inv_freq": buffer}, module)


@pytest.mark.parametrize("name", ["dynamic bias", "attention without rotary"])
def test_buffers_are_refused_without_rotary(name):
    module, variables = variables_of(name)
    prefix = "layers.1.0.branch." if name == "dynamic bias" else ""
    buffer = {f"{prefix}attn_fn.rel_pos.inv_freq": inverse_frequencies(4)}
    with pytest.raises(ValueError, match="inv_freq"):
        from_torch(to_torch(variables, module) | buffer, module)


# What is refused


def test_one_error_lists_everything_missing_surplus_and_misshapen():
    module, variables = variables_of("streams")
    state_dict = to_torch(variables, module)
    del state_dict["layers.0.0.branch.to_qkv.weight"], state_dict["layers.1.1.static_beta"]
    state_dict |= {"extra": np.ones(2), "layers.7.1.branch.0.bias": np.ones(12)}
    state_dict["token_emb.weight"] = np.ones((11, 5))
    for given in (None, module):
        with pytest.raises(ValueError, match="must have all entries") as caught:
            from_torch(state_dict, given)
        for line in (
            "missing: layers.0.0.branch.to_qkv.weight [24, 12]",
            "missing: layers.1.1.static_beta [3]",
            "surplus: extra [2]",
            "surplus: layers.7.1.branch.0.bias [12]",
            "misshapen: token_emb.weight [11, 5], not [11, 12]",
        ):
            assert line in str(caught.value)


def test_the_way_back_lists_our_own_names():
    module, variables = variables_of("streams")
    params = flatten_dict(variables["params"], sep="/")
    params["layers_0/attn/to_qkv/kernel"] = np.ones((12, 18), np.float32)
    with pytest.raises(ValueError, match=r"misshapen: layers_0/attn/to_qkv/kernel \[12, 18\], not \[12, 24\]"):
        to_torch({"params": nest(params)}, module)


def nest(flat):
    tree: dict = {}
    for path, x in flat.items():
        *parents, leaf = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = x
    return tree


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"dim": 16}, "`dim` is 12 by the weights, 16 in the module"),
        ({"depth": 3}, "`depth` is 2 by the weights, 3 in the module"),
        ({"num_tokens": 12}, "`num_tokens` is 11 by the weights, 12 in the module"),
        ({"max_seq_len": 7}, "`max_seq_len` is 13 by the weights, 7 in the module"),
        ({"heads": 4, "dim_head": 2}, "`dim_head` is 4 by the weights, 2 in the module"),
        ({"num_residual_streams": 1}, "`num_residual_streams` is 3 by the weights, 1 in the module"),
        ({"qk_rmsnorm": True}, "`qk_rmsnorm` is False by the weights, True in the module"),
        ({"gate_values_per_head": True}, "`gate_values_per_head` is False by the weights, True in the module"),
        ({"use_dynamic_pos_bias": True}, "`use_dynamic_pos_bias` is False by the weights, True in the module"),
        ({"ff_mult": 3}, "misshapen: layers.0.1.branch.1.weight"),
        ({"kv_heads": 1}, "misshapen: layers.0.0.branch.to_qkv.weight"),
        ({"attention_sinks": True}, "without a counterpart: layers_0/attn/sinks"),
        ({"use_abs_pos_emb": False}, "surplus: pos_emb.weight"),
    ],
)
def test_the_module_must_be_that_of_the_weights(change, line):
    module, variables = variables_of("streams")
    with pytest.raises(ValueError, match="with the module's arguments") as caught:
        from_torch(to_torch(variables, module), module.clone(**change))
    assert line in str(caught.value)


@pytest.mark.parametrize("change", [{"kv_heads": 1}, {"attention_sinks": True}, {"use_abs_pos_emb": False}])
@pytest.mark.parametrize("with_module", [True, False])
def test_parameters_that_the_original_cannot_have_are_refused(change, with_module):
    module = LocalTransformer(**SMALL, **change)
    variables = filled_variables(module, TOKENS)
    with pytest.raises(ValueError, match="of the original"):
        to_torch(variables, module if with_module else None)


def test_a_signed_position_bias_is_refused():
    module = DynamicPositionBias(5, 3, signed=True)
    variables = filled_variables(module, 2, 4)
    with pytest.raises(ValueError, match="`signed` is False by the weights, True in the module"):
        to_torch(variables, module)


@pytest.mark.parametrize(
    "module",
    [
        LocalTransformer(**SMALL, causal=False),
        LocalMHA(12, 3, dim_head=4, heads=2),
        LocalMHA(12, 3, dim_head=4, heads=2, look_backward=0, look_forward=2),
    ],
)
def test_a_bidirectional_rotary_module_needs_the_angles_of_the_original(module):
    inputs = TOKENS if isinstance(module, LocalTransformer) else jnp.zeros((1, 5, 12))
    variables = filled_variables(module, inputs)
    state_dict = to_torch(variables, module)
    with pytest.raises(ValueError, match="`reference_rotary=True`"):
        from_torch(state_dict, module)
    assert_same_bits(variables, from_torch(state_dict, module.clone(reference_rotary=True)))


@pytest.mark.parametrize("change", [{"look_forward": 0}, {"use_dynamic_pos_bias": True}])
def test_a_bidirectional_module_that_turns_no_query_wrongly_is_taken(change):
    module = LocalTransformer(**SMALL, causal=False, **change)
    from_torch(to_torch(filled_variables(module, TOKENS)), module)


def test_a_forgotten_prefix_is_named():
    _, variables = variables_of("streams")
    with pytest.raises(ValueError, match=r"pass `prefix='module\.'`"):
        from_torch(to_torch(variables, prefix="module."))
    module, variables = variables_of("feed-forward")
    with pytest.raises(ValueError, match=r"pass `prefix='layers\.0\.1\.branch\.'`"):
        from_torch(to_torch(variables, prefix="layers.0.1.branch."), module)


@pytest.mark.parametrize(
    ("state_dict", "phrase"),
    [
        ([("0.weight", np.ones(3))], "must map names to arrays"),
        ({"0.weight": {"1.weight": np.ones(3)}}, "must be an array, got dict"),
        ({"model": {"0.weight": np.ones(3)}, "step": 3}, "`model` must be an array, got dict"),
        ({"0.weight": None}, "must be an array, got NoneType"),
        ({"0.weight": [1.0, 2.0]}, "must be an array, got list"),
        ({"0.weight": np.ones(3, np.int8)}, "floating dtype, got int8; undo its quantisation"),
        ({"0.weight": np.ones(3, bool)}, "floating dtype, got bool"),
        ({"0.weight": Tensor(np.ones(3), "torch.qint8")}, "`0.weight` must be dense and of a .* got torch.qint8: Got "),
    ],
)
def test_what_is_no_state_dict_of_floats_is_a_type_error(state_dict, phrase):
    with pytest.raises(TypeError, match=phrase):
        from_torch(state_dict)


NO_WEIGHTS = {
    "position_ids": (np.arange(13)[None], "[1, 13]"),
    "layers.0.0.branch.norm.num_batches_tracked": (np.array(7), "[]"),
    "mask": (np.ones((2, 2), bool), "[2, 2]"),
    "loss": (np.array([0.5], np.float32), "[1]"),
    "step": (3, "[]"),
    "extra_state": (None, "[]"),
}


@pytest.mark.slow_but("asarray0-*")
@pytest.mark.parametrize("name", NO_WEIGHTS)
@pytest.mark.parametrize("read", [np.asarray, jnp.asarray, lambda x: Tensor(x, f"torch.{x.dtype}")])
def test_what_is_no_weight_is_surplus_whatever_it_holds(name, read):
    module, variables = variables_of("streams")
    x, shape = NO_WEIGHTS[name]
    state_dict = to_torch(variables, module) | {name: read(x) if isinstance(x, np.ndarray) else x}
    calls = (
        lambda: from_torch(state_dict),
        lambda: from_torch(state_dict, module),
        lambda: model_from_torch(state_dict, local_attn_window_size=3),
    )
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(f"got\n  surplus: {name} {shape}\n")):
            call()


@pytest.mark.parametrize("name", ["attention", "feed-forward", "position bias"])
def test_an_integer_is_surplus_in_single_modules_too_and_on_the_way_back(name):
    module, variables = variables_of(name)
    step = np.array(3)
    for given in (module, None):
        with pytest.raises(ValueError, match=r"surplus: step \[\]"):
            from_torch(to_torch(variables) | {"step": step}, given)
        with pytest.raises(ValueError, match=r"surplus: step \[\]"):
            to_torch({"params": variables["params"] | {"step": step}}, given)


def test_integers_of_an_inserted_layer_are_its_converters():
    module = LocalTransformer(**SMALL, **GLOBAL)
    variables = filled_variables(module, TOKENS)
    state_dict = to_torch(variables, module, global_branch=mixer_to_theirs)
    state_dict["global_layers.1.branch.num_batches_tracked"] = np.array(7)
    assert_same_bits(variables, from_torch(state_dict, module, global_branch=mixer_to_ours))
    with pytest.raises(TypeError, match="`layers_1/global_attn/count` must be of a floating dtype, got int64"):
        from_torch(state_dict, module, global_branch=lambda layer, weights: {"count": np.array(7)})


def test_other_modules_and_bare_parameters_are_type_errors():
    module, variables = variables_of("feed-forward")
    with pytest.raises(TypeError, match=r"must be one of LocalTransformer, .* got LocalAttention"):
        from_torch({}, LocalAttention(3))
    with pytest.raises(TypeError, match="'params' in it"):
        to_torch(variables["params"], module)


def test_a_layer_of_an_absurd_number_is_named_at_once():
    _, variables = variables_of("streams")
    with pytest.raises(ValueError, match=r"surplus: layers\.999999999\.0\.branch\.norm\.bias"):
        from_torch(to_torch(variables) | {"layers.999999999.0.branch.norm.bias": np.ones(12)})


# Inferring the model from the weights


@pytest.mark.slow_but("{}", "{'num_tokens'*")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_residual_streams": 1, "ff_mult": 2.5},
        {"num_residual_streams": 3, "use_dynamic_pos_bias": True},
        {"qk_rmsnorm": True, "gate_values_per_head": True, "ff_mult": 3},
        {"causal": False, "reference_rotary": True, "look_backward": 2},
        {"num_tokens": None, "max_seq_len": 0},
    ],
    ids=str,
)
def test_model_from_torch_infers_the_arguments(options):
    module = LocalTransformer(**(SMALL | options))
    x = TOKENS if module.num_tokens else jnp.zeros((1, 5, 12))
    variables = filled_variables(module, x)
    hidden = {name: options[name] for name in ("causal", "look_backward") if name in options}
    inferred = model_from_torch(to_torch(variables, module), local_attn_window_size=3, **hidden)
    if "use_dynamic_pos_bias" not in options:  # only the dynamic bias shows heads; rotary shows dim_head
        assert (inferred.heads, inferred.dim_head) == (2, 4)
    names = [*SMALL, *options, "reference_rotary", "qk_rmsnorm", "gate_values_per_head", "use_dynamic_pos_bias"]
    assert [getattr(inferred, name) for name in names if name != "ff_mult"] == [
        getattr(module, name) for name in names if name != "ff_mult"
    ]
    assert int(12 * inferred.ff_mult * 2 / 3) == int(12 * module.ff_mult * 2 / 3)
    assert_same_bits(variables, from_torch(to_torch(variables, module), inferred))


def test_model_from_torch_refuses_weights_without_a_layer():
    with pytest.raises(ValueError, match=r"missing: layers\.0\.0\.branch\.to_qkv\.weight"):
        model_from_torch({}, local_attn_window_size=3, heads=2)


def test_model_from_torch_asks_for_what_the_weights_do_not_show():
    _, variables = variables_of("streams")
    state_dict = to_torch(variables)  # no buffers, so nothing shows the heads
    with pytest.raises(ValueError, match="no `local_attn_window_size` and no `heads` or `dim_head`"):
        model_from_torch(state_dict)
    inferred = model_from_torch(state_dict, local_attn_window_size=3, dim_head=4)
    assert (inferred.heads, inferred.dim_head) == (2, 4)


@pytest.mark.parametrize(
    ("given", "phrase"),
    [
        ({"heads": 4}, "`heads` must be that of the weights, 2, got 4"),
        ({"dim_head": 8}, "`dim_head` must be that of the weights, 4, got 8"),
        ({"heads": 0}, "`heads` must be that of the weights, 2, got 0"),
        ({"num_tokens": 12}, "`num_tokens` must be that of the weights, 11, got 12"),
        ({"kv_heads": 1}, r"misshapen: layers\.0\.0\.branch\.to_qkv\.weight \[24, 12\], not \[16, 12\]"),
        ({"global_attn_layer": lambda layer: Mixer()}, "`global_attn_layer` needs weights of inserted layers"),
    ],
)
def test_model_from_torch_refuses_what_the_weights_contradict(given, phrase):
    module, variables = variables_of("streams")
    with pytest.raises(ValueError, match=phrase):
        model_from_torch(to_torch(variables, module), local_attn_window_size=3, **given)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_weights_do_not_show_must_divide_their_width(heads):
    _, variables = variables_of("streams")
    with pytest.raises(ValueError, match=rf"`heads` must divide `heads \* dim_head`, 8 by the weights, got {heads}"):
        model_from_torch(to_torch(variables), local_attn_window_size=3, heads=heads)


@pytest.mark.parametrize("names", [(), ("weight", "encoder.bias")])
def test_names_of_no_kind_are_refused(names):
    with pytest.raises(ValueError, match="must have the names of LocalTransformer, LocalMHA, FeedForward, Dynamic"):
        from_torch({name: np.ones(3, np.float32) for name in names})


def test_model_from_torch_takes_every_field():
    module, variables = variables_of("streams")
    state_dict = to_torch(variables, module)
    chosen = {"attn_dropout": 0.1, "scan_layers": True, "dtype": jnp.bfloat16, "qk_scale": 4}
    model = model_from_torch(state_dict, **SMALL, **chosen)
    assert model == module.clone(**chosen, ff_mult=model.ff_mult)
    assert_same_bits(stack_layers(variables), from_torch(state_dict, model))
    assert model_from_torch(state_dict, **SMALL) == module.clone(ff_mult=model.ff_mult)
    with pytest.raises(TypeError, match="'window_size'"):
        model_from_torch(state_dict, local_attn_window_size=3, window_size=3)


def test_model_from_torch_finds_a_multiplier_for_every_width():
    for dim in (3, 7, 64, 512):
        for width in (1, 2, dim // 2, dim, 3 * dim - 1):
            inferred = model_from_torch(one_layer(dim, width), local_attn_window_size=3, heads=1)
            assert int(dim * inferred.ff_mult * 2 / 3) == width
    assert model_from_torch(one_layer(512, 1365), local_attn_window_size=3, heads=1).ff_mult == 4


def one_layer(dim, width):
    attention = {"norm.weight": (dim,), "norm.bias": (dim,), "to_qkv.weight": (6, dim), "to_out.weight": (dim, 2)}
    feed_forward = {"0.weight": (dim,), "0.bias": (dim,), "1.weight": (2 * width, dim), "4.weight": (dim, width)}
    shapes = {f"layers.0.0.branch.{name}": shape for name, shape in attention.items()}
    shapes |= {f"layers.0.1.branch.{name}": shape for name, shape in feed_forward.items()}
    return {name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes.items()}


# Weights of older versions, without residual streams


def rename_older(state_dict):
    """Give a state dict of one residual stream the names of local-attention 1.10 and older."""
    return {name.replace(".branch.", "."): x for name, x in state_dict.items()}


OLDER = {
    "plain": {},
    "gates": {"gate_values_per_head": True, "qk_rmsnorm": True},
    "dynamic bias": {"use_dynamic_pos_bias": True},
    "bidirectional": {"causal": False, "reference_rotary": True},
    "stacked": {"scan_layers": True},
}


def older_weights(**options):
    module = LocalTransformer(**SMALL, num_residual_streams=1, **options)
    variables = filled_variables(module, TOKENS)
    return module, variables, rename_older(to_torch(variables, module))


@pytest.mark.slow_but("plain")
@pytest.mark.parametrize("options", OLDER.values(), ids=OLDER)
def test_weights_of_older_versions_are_those_of_one_residual_stream(options):
    module, variables, state_dict = older_weights(**options)
    assert not any("branch" in name for name in state_dict)
    assert_same_bits(variables, from_torch(state_dict, module))
    assert_same_bits(from_torch(to_torch(variables)), from_torch(state_dict))
    hidden = {name: options[name] for name in ("causal", "scan_layers") if name in options}
    inferred = model_from_torch(state_dict, local_attn_window_size=3, heads=2, **hidden)
    assert inferred == module.clone(ff_mult=inferred.ff_mult)
    written = to_torch(from_torch(state_dict, inferred), inferred)
    assert_same_bits(to_torch(variables, module), written)


def test_a_part_of_older_weights_is_taken_by_its_prefix():
    module, variables, state_dict = older_weights()
    named = {f"module.{name}": x for name, x in state_dict.items()}
    assert_same_bits(variables, from_torch(named, module, prefix="module."))
    attention = LocalMHA(12, 3, dim_head=4, heads=2, causal=True, prenorm=True)
    converted = from_torch(named, attention, prefix="module.layers.1.0.")
    assert_same_bits(variables["params"]["layers_1"]["attn"], converted["params"])
    for given in (module, None):
        with pytest.raises(ValueError, match=r"pass `prefix='module\.'`"):
            from_torch(named, given)


@pytest.mark.parametrize("streams", [2, 4])
def test_older_weights_do_not_serve_several_residual_streams(streams):
    module, _, state_dict = older_weights()
    with pytest.raises(ValueError, match=f"`num_residual_streams` is 1 by the weights, {streams} in") as caught:
        from_torch(state_dict, module.clone(num_residual_streams=streams))
    assert "missing" not in str(caught.value)
    assert "those of local-attention 1.10 and older: `num_residual_streams` is 1" in str(caught.value)
    with pytest.raises(ValueError, match=f"`num_residual_streams` must be that of the weights, 1, got {streams}"):
        model_from_torch(state_dict, local_attn_window_size=3, num_residual_streams=streams)


def test_what_is_wrong_with_older_weights_is_said_by_their_names():
    module, _, state_dict = older_weights()
    del state_dict["layers.1.0.norm.weight"]
    state_dict["layers.0.1.1.weight"] = np.ones((3, 12), np.float32)
    state_dict["layers.0.0.attn_fn.rel_pos.inv_freq"] = np.array([1, 0.02], np.float32)
    with pytest.raises(ValueError, match="must have all entries") as caught:
        from_torch(state_dict, module)
    for line in (
        "missing: layers.1.0.norm.weight [12]",
        "misshapen: layers.0.1.1.weight [3, 12], not [64, 12]",
        "not of theta 10000: layers.0.0.attn_fn.rel_pos.inv_freq",
    ):
        assert line in str(caught.value)
    with pytest.raises(TypeError, match=r"`layers\.0\.0\.to_qkv\.weight` must be of a floating dtype, got int8"):
        from_torch(state_dict | {"layers.0.0.to_qkv.weight": np.ones((24, 12), np.int8)}, module)


def test_a_weight_under_both_of_its_names_is_surplus():
    module, variables, older = older_weights()
    newer = to_torch(variables, module)
    name = "layers.0.0.branch.to_qkv.weight"
    for state_dict, surplus in ((older, name), (newer, "layers.0.0.to_qkv.weight")):
        with pytest.raises(ValueError, match=re.escape(f"got\n  surplus: {surplus} [24, 12]\n")):
            from_torch(state_dict | {surplus: newer[name]}, module)


# Inserted global layers


class Mixer(nn.Module):
    """A global layer with weights: adds a linear map of the mean token."""

    dim: int = 12

    @nn.compact
    def __call__(self, x, mask=None):
        return x + nn.Dense(self.dim, name="mix")(x.mean(1, keepdims=True))


def mixer_to_ours(layer, weights):
    assert layer == 1
    return {"mix": {"kernel": weights["linear.weight"].T, "bias": weights["linear.bias"]}}


def mixer_to_theirs(layer, params):
    assert layer == 1
    return {"linear.weight": params["mix"]["kernel"].T, "linear.bias": params["mix"]["bias"]}


GLOBAL = {"global_attn_layer": lambda layer: Mixer(), "layers_insert_global_attn": (2,)}


@pytest.mark.parametrize("streams", [1, 3])
def test_global_layers_convert_by_the_given_function(streams):
    module = LocalTransformer(**SMALL, **GLOBAL, num_residual_streams=streams)
    variables = filled_variables(module, TOKENS)
    state_dict = to_torch(variables, module, global_branch=mixer_to_theirs)
    names = {name for name in state_dict if name.startswith("global_layers.")}
    assert {"global_layers.1.branch.linear.weight", "global_layers.1.branch.linear.bias"} <= names
    assert ("global_layers.1.norm.gamma" in names) == (streams > 1)
    for given in (module, None):
        assert_same_bits(variables, from_torch(state_dict, given, global_branch=mixer_to_ours))
    inferred = model_from_torch(state_dict, local_attn_window_size=3, global_attn_layer=GLOBAL["global_attn_layer"])
    assert inferred.layers_insert_global_attn == (2,)


def test_global_layers_of_older_versions_convert_too():
    module = LocalTransformer(**SMALL, **GLOBAL, num_residual_streams=1)
    variables = filled_variables(module, TOKENS)
    state_dict = rename_older(to_torch(variables, module, global_branch=mixer_to_theirs))
    assert "global_layers.1.linear.weight" in state_dict
    for given in (module, None):
        assert_same_bits(variables, from_torch(state_dict, given, global_branch=mixer_to_ours))
    with pytest.raises(ValueError, match="with the module's arguments") as caught:
        from_torch(state_dict, module.clone(layers_insert_global_attn=(1,)), global_branch=mixer_to_ours)
    assert "missing: global_layers.0.*" in str(caught.value)
    assert "surplus: global_layers.1.*" in str(caught.value)


@pytest.mark.parametrize("streams", [1, 3])
def test_global_layers_in_the_wrong_place_are_listed(streams):
    module = LocalTransformer(**SMALL, **GLOBAL, num_residual_streams=streams)
    state_dict = to_torch(filled_variables(module, TOKENS), module, global_branch=mixer_to_theirs)
    with pytest.raises(ValueError, match="with the module's arguments") as caught:
        from_torch(state_dict, module.clone(layers_insert_global_attn=(1,)), global_branch=mixer_to_ours)
    assert r"missing: global_layers.0.branch.*" in str(caught.value)
    assert r"surplus: global_layers.1.branch.*" in str(caught.value)


def test_global_layers_need_the_function_and_the_layer():
    module = LocalTransformer(**SMALL, **GLOBAL)
    variables = filled_variables(module, TOKENS)
    with pytest.raises(ValueError, match="`global_branch` must be given"):
        to_torch(variables, module)
    state_dict = to_torch(variables, module, global_branch=mixer_to_theirs)
    with pytest.raises(ValueError, match="`global_branch` must be given"):
        from_torch(state_dict, module)
    with pytest.raises(ValueError, match="no `global_attn_layer`"):
        model_from_torch(state_dict, local_attn_window_size=3)


# Against the live original


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is needed to run the original")


@pytest.fixture
def original(torch):
    pytest.importorskip("hyper_connections", reason="hyper-connections, which the original needs, is not installed")
    return pytest.importorskip("local_attention", reason="the original is not installed")


def draw_options(seed: int) -> dict:
    """Draw options of a transformer that both sides can run, different for each seed."""
    random = np.random.RandomState(seed)

    def flip():
        return bool(random.rand() < 0.5)

    causal = seed % 3 != 0
    heads, dim_head = int(random.choice([1, 2, 3])), int(random.choice([4, 6]))
    options = {
        "num_tokens": int(random.choice([7, 11, 13])),
        "max_seq_len": 23,
        "dim": int(random.choice([10, 12, 17])),
        "depth": int(random.choice([1, 2])),
        "heads": heads,
        "dim_head": dim_head,
        "causal": causal,
        "local_attn_window_size": int(random.choice([2, 3, 5])),
        "ff_mult": float(random.choice([1.5, 3, 4])),
        "num_residual_streams": (1, 2, 4)[seed // 3 % 3],
        "qk_rmsnorm": flip(),
        "gate_values_per_head": flip(),
        "exact_windowsize": flip(),
        "look_backward": 1 + flip(),
        "shared_qk": random.rand() < 0.2,
    }
    if seed % 4 == 1:  # the original computes this bias for slabs of two windows only
        return options | {"use_dynamic_pos_bias": True, "look_backward": 1, "look_forward": 0}
    return options | {"use_xpos": flip()}


@pytest.mark.original
@pytest.mark.parametrize("seed", range(16))
def test_the_same_logits_and_loss_from_the_same_weights(seed, torch, original):
    options = draw_options(seed)
    theirs = perturbed(torch, original.LocalTransformer(**options), seed)
    hidden = {"local_attn_window_size", "causal", "look_backward", "look_forward", "exact_windowsize", "use_xpos"}
    hidden |= {"shared_qk", "dim_head"}  # what weights never show, or not always
    model = model_from_torch(theirs.state_dict(), **{name: x for name, x in options.items() if name in hidden})
    variables = from_torch(theirs.state_dict(), model)

    tokens = np.random.RandomState(seed).randint(0, options["num_tokens"], (2, 17))
    mask = None if options["causal"] else torch.ones((2, 16), dtype=torch.bool)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens[:, :-1]), mask=mask)
        loss = theirs(torch.tensor(tokens), return_loss=True) if options["causal"] else None

    @jax.jit
    def ours(variables, tokens):
        loss = model.apply(variables, tokens, return_loss=True) if model.causal else None
        return model.apply(variables, tokens[:, :-1]), loss

    our_logits, our_loss = ours(variables, tokens)
    np.testing.assert_allclose(our_logits, logits.numpy(), rtol=0, atol=LOGITS_TOLERANCE)
    assert loss is None or abs(our_loss - loss.item()) <= LOSS_TOLERANCE
    assert_strict_way_back(torch, theirs, variables, model)


def perturbed(torch, module, seed):
    """Change every parameter, also those that start at zero or one, so that a swap makes a test fail."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(torch.tensor(0.2 * normal(1000 * seed + index, *parameter.shape)))
    return module.eval()


def assert_strict_way_back(torch, theirs, variables, module, **converters):
    """Assert that our variables load strictly into the original's module and change no bit of its parameters."""
    before = {name: x.clone() for name, x in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    back = {name: torch.from_numpy(x) for name, x in to_torch(variables, module, **converters).items()}
    theirs.load_state_dict(back, strict=True)
    assert all(torch.equal(x, before[name]) for name, x in theirs.named_parameters())


@pytest.mark.original
@pytest.mark.parametrize(
    "name", ["attention", "attention with all", "attention without rotary", "feed-forward", "position bias"]
)
def test_single_modules_go_there_and_back(name, torch, original):
    module, *_ = MODULES[name]
    fields = ["dim", "window_size", "dim_head", "heads", "prenorm", "qk_rmsnorm", "gate_values_per_head", "causal"]
    options = {field: getattr(module, field) for field in fields if hasattr(module, field)}
    if isinstance(module, FeedForward):
        make, options["mult"] = original.transformer.FeedForward, module.mult
    elif isinstance(module, DynamicPositionBias):
        make = original.DynamicPositionBias
    else:
        make = original.LocalMHA
        options["use_rotary_pos_emb"] = module.use_rotary_pos_emb
    theirs = perturbed(torch, make(**options), 0)
    if name == "attention without rotary":
        module = module.clone(look_forward=0)
    assert_strict_way_back(torch, theirs, from_torch(theirs.state_dict(), module), module)


@pytest.mark.original
def test_bfloat16_goes_there_and_back_bit_equal(torch, original):
    theirs = perturbed(torch, original.LocalTransformer(**SMALL, num_residual_streams=2), 0).bfloat16()
    state_dict = theirs.state_dict()
    model = model_from_torch(state_dict, local_attn_window_size=3)
    back = to_torch(from_torch(state_dict, model), model)
    assert sorted(back) == sorted(state_dict)
    for name, x in back.items():
        assert x.dtype == (np.float32 if name.endswith("inv_freq") else jnp.bfloat16)
        assert torch.equal(torch.from_numpy(x.astype(np.float32)).bfloat16(), state_dict[name]), name


@pytest.mark.original
@pytest.mark.parametrize("streams", [1, 2])
def test_a_model_with_a_global_layer_computes_the_same(streams, torch, original):
    class TheirMixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(12, 12)

        def forward(self, x):
            return x + self.linear(x.mean(1, keepdim=True))

    placed = {"global_attn_layer": TheirMixer(), "layers_insert_global_attn": (2,)}
    theirs = perturbed(torch, original.LocalTransformer(**SMALL, **placed, num_residual_streams=streams), 0)
    model = LocalTransformer(**SMALL, **GLOBAL, num_residual_streams=streams)
    variables = from_torch(theirs.state_dict(), model, global_branch=mixer_to_ours)
    tokens = np.random.RandomState(0).randint(0, 11, (2, 13))
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(variables, tokens), logits, rtol=0, atol=LOGITS_TOLERANCE)
    assert_strict_way_back(torch, theirs, variables, model, global_branch=mixer_to_theirs)


# A window for each layer; the weights do not depend on it


@pytest.mark.slow_but("(3, None)-False")
@pytest.mark.parametrize(
    ("windows", "bias"),
    [((3, 3), False), ([2, 5], False), ((3, None), False), ((None, None), False), ([2, 5], True), ((3, None), True)],
    ids=str,
)
def test_weights_serve_windows_of_each_layer_there_and_back(windows, bias):
    one = LocalTransformer(**SMALL, use_dynamic_pos_bias=bias)
    several = one.clone(local_attn_window_size=windows)
    variables = filled_variables(one, TOKENS)
    state_dict = to_torch(variables, one)
    back = to_torch(variables, several)
    assert sorted(back) == sorted(state_dict)
    assert_same_bits(from_torch(state_dict, several)["params"], variables["params"])
    inferred = model_from_torch(back, local_attn_window_size=windows, heads=2)
    assert inferred.window_sizes() == tuple(windows)
    np.testing.assert_allclose(inferred.apply(variables, TOKENS), several.apply(variables, TOKENS), rtol=0, atol=1e-6)


def test_one_of_several_windows_that_looks_forward_needs_the_originals_angles():
    fields = SMALL | {"causal": False, "local_attn_window_size": (None, 3)}
    variables = filled_variables(LocalTransformer(**fields), TOKENS)
    state_dict = to_torch(variables, LocalTransformer(**fields))
    with pytest.raises(ValueError, match="must have `reference_rotary=True`"):
        from_torch(state_dict, LocalTransformer(**fields))
    from_torch(state_dict, LocalTransformer(**fields | {"local_attn_window_size": (None, None)}))
    windows = {"local_attn_window_size": (None, 3), "causal": False}
    assert model_from_torch(state_dict, **windows, heads=2).reference_rotary
    assert not model_from_torch(
        state_dict, **windows | {"local_attn_window_size": (None, None)}, heads=2
    ).reference_rotary
