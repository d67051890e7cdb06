"""The recipes and further models built from their modules, against `transformers`: equal weights, equal results.

Models are tiny and random. Texts are several windows long. Changing a setting must change each result, so
that agreement is evidence for it.
"""

import contextlib
import copy
import functools
import importlib
import re
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import published_models
import pytest

from examples.recipes.gemma3 import Config as Gemma3
from examples.recipes.gemma3 import gemma3
from examples.recipes.gpt_oss import Config as GptOss
from examples.recipes.gpt_oss import gpt_oss
from examples.recipes.longformer import Config as LongformerFields
from examples.recipes.longformer import Longformer, longformer_parameters, places_of
from examples.recipes.mimi import Config as MimiFields
from examples.recipes.mimi import Mimi, mimi_parameters
from examples.recipes.mistral import Config as Mistral
from examples.recipes.mistral import mistral
from examples.recipes.modernbert import Config as ModernBertFields
from examples.recipes.modernbert import ModernBert, modernbert_parameters
from examples.recipes.weights import load, parameters

transformers = pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is needed for published models")
torch = pytest.importorskip("torch", reason="torch is needed to run the published models")
from safetensors.numpy import load_file, save_file  # noqa: E402  # comes with transformers
from transformers.models.mimi.modeling_mimi import MimiTransformerModel  # noqa: E402
from transformers.models.moonshine_streaming.modeling_moonshine_streaming import (  # noqa: E402
    MoonshineStreamingEncoder,
)

torch.set_num_threads(1)  # threads wait for each other longer than so small products take

pytestmark = [pytest.mark.published, pytest.mark.usefixtures("quick_compile")]

TOLERANCE = 1e-4
CHANGED = 1e-3
"""Least difference of results when a setting is changed."""

N = 31
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WITHOUT_TEXT = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


class Pair(NamedTuple):
    """A published model and ours with the same weights.

    Attributes:
        reference: The published model.
        make: Function that builds ours from a configuration.
        config: The configuration.
        variables: The weights.
    """

    reference: Any
    make: Callable[[Any], Any]
    config: Any
    variables: Mapping[str, Any]

    def logits(self, *inputs):
        return jax.jit(self.make(self.config).apply)(self.variables, *inputs)

    def published_logits(self, tokens, mask=None):
        with torch.no_grad():
            mask = None if mask is None else torch.tensor(mask).long()
            return self.reference(torch.tensor(tokens), attention_mask=mask).logits.numpy()

    def difference(self, tokens):
        """Return the largest difference between our logits and the published ones."""
        return np.abs(self.logits(tokens) - self.published_logits(tokens)).max()


def changed(config, fields):
    """Return a configuration with some of its fields replaced."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        assert getattr(config, name) != value
        object.__setattr__(config, name, value)
    return config


def draw(*shape):
    """Draw tokens."""
    return np.random.RandomState(0).randint(0, SIZES["vocab_size"], shape)


def published(kind, config, **fields):
    """Build a small published model with eager attention, and weights large enough to show a fault."""
    return randomise(kind(config(**SIZES | WITHOUT_TEXT | fields, attn_implementation="eager")))


def randomise(reference):
    """Redraw a model's weights, so that each of them matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in reference.eval().named_parameters():
            noise = torch.randn(weight.shape)
            if weight.dim() > 1 and "bias" not in name:
                fan_in = weight.shape[-2 if "experts" in name else -1]
                size = 0.4 if "embed" in name else 1.2  # else greedy decoding with tied weights repeats a token
                weight.copy_(size * noise * fan_in**-0.5)
            else:
                weight.add_(0.3 * noise)
    return reference


def saved(reference):
    """Save a model in the published format, and read the file."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


# The recipes

HEADS = {"head_dim": 16}


def make_mistral():
    reference = published(
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        **HEADS,
        rms_norm_eps=1e-5,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 70.0},
    )
    config = Mistral(**SIZES, **HEADS, sliding_window=5, rope_theta=70.0)
    return Pair(reference, mistral, config, load(mistral(config), parameters(saved(reference))))


def make_gemma3():
    sizes = {"num_hidden_layers": 3, "sliding_window_pattern": 3, "query_pre_attn_scalar": 9}
    reference = published(
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        **HEADS,
        **sizes,
        sliding_window=5,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 90.0},
        },
    )
    rotary = {"rope_local_base_freq": 30.0, "rope_theta": 90.0, "rope_factor": 8.0}
    config = Gemma3(**SIZES | HEADS | sizes | rotary, sliding_window=5)
    variables = load(gemma3(config), parameters(saved(reference), norm_offset=1.0))
    return Pair(reference, gemma3, config, variables)


def make_gpt_oss():
    mixture = {"num_local_experts": 6, "num_experts_per_tok": 2, "swiglu_limit": 1.5}
    reference = published(
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        **HEADS,
        **mixture,
        sliding_window=5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    )
    rotary = {"rope_theta": 150.0, "rope_factor": 4.0, "original_max_position_embeddings": 64}
    config = GptOss(**SIZES, **HEADS, **mixture, **rotary, sliding_window=5)
    return Pair(reference, gpt_oss, config, load(gpt_oss(config), parameters(saved(reference))))


def make_modernbert():
    reference = published(
        transformers.ModernBertForMaskedLM,
        transformers.ModernBertConfig,
        num_hidden_layers=4,
        local_attention=8,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            "full_attention": {"rope_type": "default", "rope_theta": 90.0},
        },
    )
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"} | {"num_hidden_layers": 4}
    config = ModernBertFields(**sizes, local_attention=8, local_rope_theta=30.0, global_rope_theta=90.0)
    variables = load(ModernBert(config), modernbert_parameters(saved(reference)))
    return Pair(reference, ModernBert, config, variables)


# Further models built from the recipes' modules


def make_qwen3():
    reference = published(
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        **HEADS,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 70.0},
    )
    return served(published_models.qwen3, reference, parameters(saved(reference)))


def make_phi3(length):
    reference = published(
        transformers.Phi3ForCausalLM,
        transformers.Phi3Config,
        num_attention_heads=3,
        num_key_value_heads=1,
        sliding_window=5,
        max_position_embeddings=64,
        original_max_position_embeddings=20,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 70.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 20,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
        },
    )
    tensors = saved(reference)
    for name in [name for name in tensors if "gate_up_proj" in name]:
        gate, up = np.split(tensors.pop(name), 2)
        tensors |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
    return served(functools.partial(published_models.phi3, length=length), reference, parameters(tensors))


def make_cohere2():
    reference = published(
        transformers.Cohere2ForCausalLM,
        transformers.Cohere2Config,
        sliding_window=5,
        sliding_window_pattern=2,
        logit_scale=0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 70.0},
    )
    return served(published_models.cohere2, reference, parameters(saved(reference)))


def make_llama4():
    reference = published(
        transformers.Llama4ForCausalLM,
        transformers.Llama4TextConfig,
        **HEADS,
        intermediate_size_mlp=44,
        moe_layers=[],
        no_rope_layer_interval=2,
        attention_chunk_size=7,
        floor_scale=3,
        attn_scale=0.4,
        rope_parameters={"rope_type": "default", "rope_theta": 70.0},
    )
    params = parameters({name.replace("feed_forward", "mlp"): x for name, x in saved(reference).items()})
    for i, kind in enumerate(reference.config.layer_types):
        if kind == "chunked_attention":
            gain = jnp.full(HEADS["head_dim"], HEADS["head_dim"] ** 0.5)
            params[f"layers_{i}"]["self_attn"] |= {"q_scale": gain, "k_scale": gain}
    return served(published_models.llama4, reference, params)


def make_mimo_v2_flash(value_scale):
    """Build MiMo-V2-Flash, which scales values by 0.7, and ours with scaled value weights."""
    reference = published(
        transformers.MiMoV2FlashForCausalLM,
        transformers.MiMoV2FlashConfig,
        head_dim=24,
        v_head_dim=10,
        num_key_value_heads=1,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "dense"],
        attention_value_scale=0.7,
        rope_parameters={
            "full_attention": partly(90.0),
            "sliding_attention": partly(30.0),
        },
    )
    tensors = {name.replace("attention_sink_bias", "sinks"): x for name, x in saved(reference).items()}
    tensors |= {name: value_scale * x for name, x in tensors.items() if "v_proj" in name}
    return served(published_models.mimo_v2_flash, reference, parameters(tensors))


def make_gemma2():
    reference = published(
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        **HEADS,
        sliding_window=5,
        query_pre_attn_scalar=9,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        rope_parameters={"rope_type": "default", "rope_theta": 70.0},
    )
    return served(published_models.gemma2, reference, parameters(saved(reference), norm_offset=1.0))


def served(make, reference, params):
    return Pair(reference, make, reference.config, load(make(reference.config), params))


PAIRS = {
    "mistral": make_mistral,
    "gemma3": make_gemma3,
    "gpt_oss": make_gpt_oss,
    "modernbert": make_modernbert,
    "qwen3": make_qwen3,
    "phi3": functools.partial(make_phi3, length=N),
    "phi3 short": functools.partial(make_phi3, length=20),
    "cohere2": make_cohere2,
    "llama4": make_llama4,
    "mimo_v2_flash": functools.partial(make_mimo_v2_flash, value_scale=0.7),
    "gemma2": make_gemma2,
}


@functools.cache
def pair(name):
    return PAIRS[name]()


@pytest.mark.parametrize("name", PAIRS)
def test_logits_are_those_of_the_published_model(name):
    tokens = draw(2, 20 if name == "phi3 short" else N)
    assert pair(name).difference(tokens) < TOLERANCE


def theta(value):
    return {"rope_type": "default", "rope_theta": value}


def partly(value):
    return theta(value) | {"partial_rotary_factor": 0.334}


CHANGES = [
    ("mistral", {"sliding_window": 6}),
    ("mistral", {"rope_theta": 80.0}),
    ("mistral", {"sliding_window": None}),
    ("gemma3", {"sliding_window": 6}),
    ("gemma3", {"sliding_window_pattern": 2}),
    ("gemma3", {"rope_theta": 80.0}),
    ("gemma3", {"rope_local_base_freq": 80.0}),
    ("gemma3", {"query_pre_attn_scalar": 16}),
    ("gpt_oss", {"sliding_window": 6}),
    ("gpt_oss", {"rope_theta": 160.0}),
    ("gpt_oss", {"rope_factor": 4.4}),
    ("gpt_oss", {"num_experts_per_tok": 1}),
    ("modernbert", {"local_attention": 10}),
    ("modernbert", {"local_rope_theta": 80.0}),
    ("modernbert", {"global_rope_theta": 80.0}),
    ("qwen3", {"sliding_window": 6}),
    ("qwen3", {"rope_parameters": theta(80.0)}),
    ("phi3", {"sliding_window": 6}),
    ("phi3", {"max_position_embeddings": 80}),
    ("cohere2", {"sliding_window": 6}),
    ("cohere2", {"rope_parameters": theta(80.0)}),
    ("llama4", {"attention_chunk_size": 8}),
    ("llama4", {"attn_scale": 0.5}),
    ("mimo_v2_flash", {"sliding_window": 6}),
    ("mimo_v2_flash", {"rope_parameters": {"full_attention": partly(90.0), "sliding_attention": partly(80.0)}}),
    ("mimo_v2_flash", {"rope_parameters": {"full_attention": partly(80.0), "sliding_attention": partly(30.0)}}),
    ("gemma2", {"sliding_window": 6}),
    ("gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma2", {"attn_logit_softcapping": 3.0}),
    ("gemma2", {"final_logit_softcapping": 4.0}),
]


@pytest.mark.parametrize(("name", "changes"), CHANGES)
def test_a_setting_that_is_not_the_published_one_shows(name, changes):
    other = pair(name)
    other = other._replace(config=changed(other.config, changes))
    assert other.difference(draw(2, N)) > CHANGED


def test_short_factors_of_longrope_beyond_their_length_show():
    assert pair("phi3 short").difference(draw(2, N)) > CHANGED


def test_values_that_are_scaled_otherwise_show():
    assert make_mimo_v2_flash(value_scale=0.8).difference(draw(2, N)) > CHANGED


@pytest.mark.parametrize("name", ["gpt_oss", "mimo_v2_flash"])
def test_sinks_that_are_left_out_show(name):
    def without_sinks(path, x):
        return jnp.full_like(x, -1e4) if path[-1].key == "sinks" else x

    other = pair(name)
    other = other._replace(variables=jax.tree_util.tree_map_with_path(without_sinks, other.variables))
    assert other.difference(draw(2, N)) > CHANGED


# The code in the recipes' docstrings, unchanged, on a file with a small model


def run_page(name, config, tensors, **inputs):
    """Run the code in a recipe's docstring on tensors in a file; return all names that it defines."""
    recipe = importlib.import_module(f"examples.recipes.{name}")
    code = "".join(re.findall(r"^    .*\n|^\n", recipe.__doc__, re.MULTILINE))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        save_file(tensors, "model.safetensors")
        with mock.patch.object(recipe, "Config", return_value=config):
            exec(compile(textwrap.dedent(code), name, "exec"), inputs)
    return inputs


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss"])
def test_a_decoders_page_continues_prompts_padded_on_the_left_as_generate_does(name):
    both = pair(name)
    tokens, prompts, mask = draw(2, N), draw(3, 17), np.arange(17) >= np.array([[0], [8], [14]])
    page = run_page(name, both.config, saved(both.reference), tokens=tokens, prompts=prompts, mask=mask)
    theirs = both.reference.generate(
        torch.tensor(prompts),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=100,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    assert len(np.unique(page["new"])) > 10
    np.testing.assert_array_equal(page["new"], theirs[:, 17:].numpy())
    assert np.abs(page["logits"] - both.published_logits(tokens)).max() < TOLERANCE


def test_the_encoders_page_takes_padded_texts_and_packed_ones():
    both = pair("modernbert")
    tokens, mask = draw(2, N), np.arange(N) < np.array([[N], [19]])
    texts = [draw(1, n) for n in (13, 20, 7)]
    inputs = {"packed": np.concatenate(texts, 1), "segment_ids": np.repeat([0, 1, 2], [13, 20, 7])[None]}
    page = run_page("modernbert", both.config, saved(both.reference), tokens=tokens, mask=mask, **inputs)
    assert np.abs(page["logits"] - both.published_logits(tokens, mask))[mask].max() < TOLERANCE
    alone = np.concatenate([both.published_logits(text) for text in texts], 1)
    assert np.abs(page["packed_logits"] - alone).max() < TOLERANCE


@functools.cache
def longformer_pair():
    """Build a published Longformer, our configuration, and tokens with their mask and global mask."""
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    fields = {"max_position_embeddings": 40, "type_vocab_size": 2, "pad_token_id": 1, "layer_norm_eps": 1e-5}
    config = transformers.LongformerConfig(**sizes, **fields, attention_window=[8, 4], attn_implementation="eager")
    reference = randomise(transformers.LongformerForMaskedLM(config))
    mask = np.arange(N) < np.array([[N], [22], [25]])
    tokens = np.where(mask, np.maximum(draw(3, N), 2), 1)
    global_mask = np.zeros((3, N), bool)
    global_mask[[0, 1, 1, 1, 2, 2], [0, 0, 3, 19, 6, 30]] = True  # the last one is padding
    return reference, LongformerFields(**sizes, **fields, attention_window=(8, 4)), tokens, mask, global_mask


def longformer_states(reference, tokens, mask, global_mask):
    """Return the published Longformer's output."""
    tokens, mask, global_mask = (torch.tensor(x).long() for x in (tokens, mask, global_mask))
    with torch.no_grad():
        return reference.longformer(tokens, mask, global_mask).last_hidden_state.numpy()


def test_the_page_of_global_tokens_encodes_as_the_published_model():
    reference, config, tokens, mask, global_mask = longformer_pair()
    inputs = {"tokens": tokens, "mask": mask, "global_mask": global_mask}
    page = run_page("longformer", config, saved(reference), **inputs)
    expected = longformer_states(reference, **inputs)
    assert page["places"].shape == (3, 3)
    assert np.abs(page["states"] - expected)[mask].max() < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [({}, True), ({"attention_window": (10, 4)}, False), ({"attention_window": (8, 6)}, False)],
)
def test_longformer_without_global_tokens_is_the_published_one(changes, is_same):
    reference, config, tokens, mask, global_mask = longformer_pair()
    model = Longformer(changed(config, changes))
    variables = load(model, longformer_parameters(saved(reference)))
    states = jax.jit(model.apply)(variables, tokens, mask)
    difference = np.abs(states - longformer_states(reference, tokens, mask, global_mask & False))[mask].max()
    assert difference < TOLERANCE if is_same else difference > CHANGED


@pytest.mark.parametrize(("row", "place"), [(0, 0), (1, 0), (1, 3), (1, 19), (2, 6)])
def test_a_global_token_that_is_left_out_shows_in_its_row(row, place):
    reference, config, tokens, mask, global_mask = longformer_pair()
    model, fewer = Longformer(config), global_mask.copy()
    fewer[row, place] = False
    variables = load(model, longformer_parameters(saved(reference)))
    states = jax.jit(model.apply)(variables, tokens, mask, places_of(fewer))
    differences = np.abs(states - longformer_states(reference, tokens, mask, global_mask))
    differences = np.where(mask, differences.max(-1), 0)
    assert differences[row][mask[row]].min() > CHANGED
    assert np.delete(differences, row, 0).max() < TOLERANCE


@functools.cache
def mimi_pair():
    """Build a published transformer of Mimi, its output for frames, and our configuration."""
    fields = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "num_key_value_heads")}
    config = transformers.MimiConfig(
        **fields, num_key_value_heads=4, sliding_window=5, rope_parameters=theta(70.0), attn_implementation="eager"
    )
    reference = randomise(MimiTransformerModel(config))
    frames = np.random.RandomState(0).standard_normal((2, N, SIZES["hidden_size"])).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.tensor(frames)).last_hidden_state.numpy()
    tensors = {f"encoder_transformer.{name}": x.numpy() for name, x in reference.state_dict().items()}
    return MimiFields(**fields, sliding_window=5, rope_theta=70.0), tensors, frames, expected


@pytest.mark.parametrize(
    ("changes", "is_same"), [({}, True), ({"sliding_window": 6}, False), ({"rope_theta": 80.0}, False)]
)
def test_frames_are_transformed_as_by_the_published_model(changes, is_same):
    config, tensors, frames, expected = mimi_pair()
    model = Mimi(changed(config, changes))
    variables = load(model, mimi_parameters(tensors, "encoder_transformer."), frames)
    difference = np.abs(jax.jit(model.apply)(variables, frames) - expected).max()
    assert difference < TOLERANCE if is_same else difference > CHANGED


def test_the_page_of_a_stream_gives_for_chunks_of_any_size_what_the_published_model_gives_for_the_whole():
    config, tensors, frames, expected = mimi_pair()
    page = run_page("mimi", config, tensors, chunks=np.split(frames, [1, 2, 16], axis=1))
    assert np.abs(np.concatenate(page["outs"], 1) - expected).max() < TOLERANCE


@pytest.mark.parametrize(("windows", "is_same"), [([[5, 3], [4, 0]], True), ([[5, 4], [4, 0]], False)])
def test_windows_to_both_sides_are_those_of_moonshines_streaming_encoder(windows, is_same):
    fields = {name: SIZES[name] for name in SIZES if name != "vocab_size"}
    config = transformers.MoonshineStreamingEncoderConfig(
        **fields, sliding_windows=[[5, 3], [4, 0]], sample_rate=1000, attn_implementation="eager"
    )
    reference = randomise(MoonshineStreamingEncoder(config))
    sound = torch.tensor(np.random.RandomState(0).standard_normal((2, 600)).astype(np.float32))
    exists = torch.arange(600) < torch.tensor([[600], [410]])
    with torch.no_grad():
        x, mask = reference.embedder(sound, exists)
        expected = reference(sound, exists).last_hidden_state.numpy()
    model = published_models.StreamingEncoder(changed(config, {} if is_same else {"sliding_windows": windows}))
    tensors = {name: weight for name, weight in saved(reference).items() if not name.startswith("embedder.")}
    tensors = {name.replace("gamma", "weight").replace("mlp.", ""): weight for name, weight in tensors.items()}
    variables = load(model, parameters(tensors, norm_offset=1.0), x.numpy())
    ours = jax.jit(model.apply)(variables, x.numpy(), mask.numpy())
    difference = np.abs(ours - expected)[mask.numpy()].max()
    assert difference < TOLERANCE if is_same else difference > CHANGED
