"""`AttentionOptions`: one checked, hashable value."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import AttentionOptions, Rotary, Window
from flax_local_attention.options import options_from_json, options_to_json
from tests import cases

WINDOW = Window(4, causal=True)
FULL = AttentionOptions(
    Window(6, look_backward=2, look_forward=0, exact_windowsize=True),
    rotary=Rotary(8, theta=500.0, use_xpos=True, scale_base=7.0, reference=True),
    scale=0.25,
    shared_qk=True,
    logits_soft_cap=30,
    dropout_rate=0.1,
    precision=("high", "default"),
)


def test_equal_options_are_one_key():
    same = dataclasses.replace(FULL, logits_soft_cap=np.float32(30), scale=1 / 4)
    assert same == FULL
    assert {FULL: 1}[same] == 1
    assert dataclasses.replace(FULL, scale=0.5) != FULL


@pytest.mark.parametrize("window", [Window.sliding(None), Window.everything(), Window.sliding(7)], ids=str)
def test_options_of_every_window_survive_json(window):
    options = AttentionOptions(window, rotary=Rotary(4))
    assert options_from_json(options_to_json(options)) == options


def test_arrays_of_one_number_are_numbers():
    options = AttentionOptions(WINDOW, scale=jnp.float32(0.5), logits_soft_cap=np.array(30.0))
    assert options == AttentionOptions(WINDOW, scale=0.5, logits_soft_cap=30.0)


def test_the_scale_base_of_xpos_is_filled_in_from_the_window():
    options = AttentionOptions(Window(8), rotary=Rotary(4, use_xpos=True))
    assert options.rotary == Rotary(4, use_xpos=True, scale_base=4.0)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (jax.lax.Precision.HIGHEST, "highest"),
        ("highest", "highest"),
        (["high", jax.lax.Precision.DEFAULT], ("high", "default")),
        (jax.lax.DotAlgorithmPreset.F32_F32_F32, "F32_F32_F32"),
        (None, None),
    ],
)
def test_precision_is_kept_as_words_that_jax_takes(given, kept):
    options = AttentionOptions(WINDOW, precision=given)
    assert options.precision == kept
    hash(options)
    jax.make_jaxpr(lambda x: jnp.einsum("i,i->", x, x, precision=options.precision))(jnp.ones(3))


@pytest.mark.parametrize("options", [FULL, AttentionOptions(WINDOW), AttentionOptions(Window(np.int64(3)))], ids=str)
def test_options_survive_json(options):
    text = options_to_json(options)
    json.loads(text)
    assert options_from_json(text) == options


def test_a_window_stands_for_options_with_all_else_at_its_default():
    assert AttentionOptions.of(WINDOW) == AttentionOptions(WINDOW)
    assert AttentionOptions.of(FULL) is FULL


ERRORS = [
    ({"window": 4}, TypeError, "`window` must be a Window, got 4 of type int"),
    ({"window": None}, TypeError, "`window` must be a Window"),
    ({"rotary": "yes"}, TypeError, "`rotary` must be a Rotary or None"),
    ({"scale": jnp.ones(3)}, TypeError, "`scale` of options must be a number"),
    ({"scale": "0.5"}, TypeError, "`scale` of options must be a number"),
    ({"scale": True}, TypeError, "`scale` of options must be a number"),
    ({"shared_qk": 1}, TypeError, "`shared_qk` must be True or False"),
    ({"logits_soft_cap": "30"}, TypeError, "`logits_soft_cap` must be a number"),
    ({"logits_soft_cap": 0}, ValueError, "`logits_soft_cap` must be positive"),
    ({"logits_soft_cap": float("nan")}, ValueError, "`logits_soft_cap` must be positive"),
    ({"dropout_rate": None}, TypeError, "`dropout_rate` must be a number"),
    ({"dropout_rate": 1}, ValueError, "`dropout_rate` must be in [0, 1)"),
]


@pytest.mark.parametrize(("change", "error", "phrase"), ERRORS, ids=[f"{c}" for c, _, _ in ERRORS])
def test_wrong_options_are_refused_when_they_are_made(change, error, phrase):
    with pytest.raises(error) as caught:
        AttentionOptions(**{"window": WINDOW, **change})
    assert phrase in str(caught.value)


def test_a_traced_scale_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match="multiply q by it"):
        jax.eval_shape(lambda scale: AttentionOptions(WINDOW, scale=scale).scale, 0.5)


# Users' subclasses


class Slowed(Rotary):
    """A plain subclass of `Rotary` with an attribute that equality ignores."""

    def __init__(self, dim, by):
        super().__init__(dim)
        object.__setattr__(self, "by", by)

    def query_table(self, positions, dtype=jnp.float32):
        return Rotary.query_table(self, positions * self.by, dtype)

    def key_table(self, positions, dtype=jnp.float32):
        return Rotary.key_table(self, positions * self.by, dtype)


@dataclasses.dataclass(frozen=True)
class SlowedByField(Rotary):
    """The same with a dataclass field."""

    by: int = 1
    query_table, key_table = Slowed.query_table, Slowed.key_table

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "made_of_fields", self.by + 1)


class Ahead(Window):
    """A plain subclass of `Window` that adds only a method."""

    def start(self, i):
        return super().start(i) + 1


def test_a_subclass_whose_equality_does_not_know_its_attributes_is_refused():
    """Two of them would be equal, and the second would reuse the compiled angles of the first."""
    assert Slowed(4, 1) == Slowed(4, 2)
    for attribute in (Slowed(4, 1), Slowed(4, 2)):
        with pytest.raises(TypeError, match="`rotary` must compare all its attributes, got a Slowed that ignores by"):
            AttentionOptions(Window(4), rotary=attribute)
    window = Ahead(4)
    object.__setattr__(window, "by", 1)
    with pytest.raises(TypeError, match="`window` must compare all its attributes, got a Ahead that ignores by"):
        AttentionOptions(window)


@pytest.mark.slow
def test_a_subclass_that_is_a_value_has_its_own_angles():
    q, k, v = (cases.normal(seed, 2, 12, 4) for seed in range(3))
    plain = cases.local(q, k, v, Window(4), rotary=Rotary(4))
    outs = [cases.local(q, k, v, Window(4), rotary=SlowedByField(4, by=by)) for by in (1, 2, 1)]
    cases.assert_close(outs[0], plain)
    assert np.abs(outs[1] - plain).max() > 1e-3
    np.testing.assert_array_equal(outs[2], outs[0])
    assert (
        np.abs(cases.local(q, k, v, Ahead(4, causal=True)) - cases.local(q, k, v, Window(4, causal=True))).max() > 1e-3
    )


@pytest.mark.parametrize("options", [AttentionOptions(Window(4), SlowedByField(4)), AttentionOptions(Ahead(4))])
def test_a_subclass_is_not_serialised_as_the_plain_class(options):
    with pytest.raises(TypeError, match=r"must be a (Rotary|Window) itself to be serialised, got"):
        options_to_json(options)
