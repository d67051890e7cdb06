"""`Window` against pictures typed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import Window
from tests.cases import PLACES

PICTURES = {
    Window(3, causal=True): """
        #........
        ##.......
        ###......
        ####.....
        #####....
        ######...
        ...####..
        ...#####.
        ...######""",
    Window(3, causal=True, exact_windowsize=True): """
        #........
        ##.......
        ###......
        ####.....
        .####....
        ..####...
        ...####..
        ....####.
        .....####""",
    Window(3): """
        ######...
        ######...
        ######...
        #########
        #########
        #########
        ...######
        ...######
        ...######""",
    Window(3, exact_windowsize=True): """
        ####.....
        #####....
        ######...
        #######..
        .#######.
        ..#######
        ...######
        ....#####
        .....####""",
    Window(2, causal=True, look_backward=0): """
        #......
        ##.....
        ..#....
        ..##...
        ....#..
        ....##.
        ......#""",
    Window(2, causal=True, look_backward=2): """
        #......
        ##.....
        ###....
        ####...
        #####..
        ######.
        ..#####""",
    Window(2, look_backward=0, look_forward=2): """
        ######.
        ######.
        ..#####
        ..#####
        ....###
        ....###
        ......#""",
    Window(2, look_backward=0, look_forward=2, exact_windowsize=True): """
        #####..
        .#####.
        ..#####
        ...####
        ....###
        .....##
        ......#""",
    Window(1): """
        ##...
        ###..
        .###.
        ..###
        ...##""",
    Window(1, causal=True, look_backward=0): """
        #..
        .#.
        ..#""",
    Window(7): """
        ###
        ###
        ###""",
}


def typed(picture):
    return [line.strip() for line in picture.split()]


@pytest.mark.parametrize(("window", "picture"), PICTURES.items(), ids=str)
def test_window_sees_what_is_drawn(window, picture):
    rows = typed(picture)
    n = len(rows)
    seen = window.sees(np.arange(n)[:, None], np.arange(n))
    np.testing.assert_array_equal(seen, [[mark == "#" for mark in row] for row in rows])
    assert window.draw(n).split("\n") == rows


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_start_and_stop_never_decrease_and_bound_what_is_seen(place):
    window, i = place.window, np.arange(-3, place.n)
    start, stop = window.start(i), window.stop(i)
    assert (np.diff(start) >= 0).all()
    assert (np.diff(stop) >= 0).all()
    assert ((start <= i) & (i < stop)).all(), "a query sees itself"
    assert (stop - start <= window.slab + (window.exact_windowsize and not window.causal)).all()
    j = np.arange(place.n)
    np.testing.assert_array_equal(window.sees(i[:, None], j), (j >= start[:, None]) & (j < stop[:, None]))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_visible_pairs_counts_the_pairs_that_see_each_other(place):
    i = np.arange(place.n)
    assert place.window.visible_pairs(place.n) == place.window.sees(i[:, None], i).sum()


def test_visible_pairs_of_nothing():
    assert Window(3).visible_pairs(0) == 0


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_relative_positions_are_those_of_rows_and_columns_of_a_bias(place):
    window = place.window
    table = window.relative_positions()
    assert table.shape == (window.window_size, window.slab)
    i = np.arange(window.slab, window.slab + 2 * window.window_size)[:, None]
    j = np.arange(3 * window.slab + 2 * window.window_size)
    i, j = np.nonzero(window.sees(i, j))
    i += window.slab
    assert ((window.bias_column(i, j) >= 0) & (window.bias_row(i) < window.window_size)).all()
    inside = window.bias_column(i, j) < window.slab
    i, j = i[inside], j[inside]
    np.testing.assert_array_equal(table[window.bias_row(i), window.bias_column(i, j)], j - i)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_seen_key_has_a_column_of_the_bias(place):
    window, n = place.window, place.n
    i, j = np.nonzero(window.sees(np.arange(n)[:, None], np.arange(n)))
    columns = window.bias_column(i, j)
    assert (columns >= 0).all()
    assert (columns < window.slab).all()


def test_look_forward_is_filled_in():
    assert Window(5).look_forward == 1
    assert Window(5, causal=True).look_forward == 0
    assert Window(5) == Window(5, look_forward=1)
    assert dataclasses.replace(Window(5, look_backward=3), causal=True, look_forward=None).look_forward == 0


def test_reach_and_slab():
    window = Window(5, look_backward=3, look_forward=2)
    assert (window.backward, window.forward, window.slab) == (15, 10, 30)


def test_equal_windows_are_one_key():
    assert len({Window(5), Window(5, False, 1, 1, False), Window(6)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window(5).window_size = 6


@pytest.mark.parametrize("window", [Window(3, causal=True), Window(3, exact_windowsize=True)], ids=str)
def test_methods_take_ints_arrays_and_traced_values(window):
    i = np.arange(7)
    for method in (window.start, window.stop, window.bias_row):
        expected = [method(int(x)) for x in i]
        assert all(isinstance(x, int) for x in expected)
        np.testing.assert_array_equal(method(i), expected)
        np.testing.assert_array_equal(jax.jit(method)(jnp.asarray(i)), expected)


@pytest.mark.parametrize(
    ("fields", "error", "phrase"),
    [
        ({"window_size": 0}, ValueError, "`window_size` must be at least 1, got 0"),
        ({"window_size": -4}, ValueError, "`window_size` must be at least 1"),
        ({"window_size": 2.0}, TypeError, "`window_size` must be an int, got 2.0 of type float"),
        ({"window_size": "2"}, TypeError, "`window_size` must be an int"),
        ({"window_size": True}, TypeError, "`window_size` must be an int"),
        ({"window_size": None}, TypeError, "`window_size` must be an int"),
        ({"causal": 1}, TypeError, "`causal` must be True or False"),
        ({"causal": None}, TypeError, "`causal` must be True or False"),
        ({"exact_windowsize": "yes"}, TypeError, "`exact_windowsize` must be True or False"),
        ({"look_backward": -1}, ValueError, "`look_backward` must be at least 0"),
        ({"look_backward": None}, TypeError, "`look_backward` must be an int"),
        ({"look_backward": 1.5}, TypeError, "`look_backward` must be an int"),
        ({"look_forward": -1}, ValueError, "`look_forward` must be at least 0"),
        ({"look_forward": 0.5}, TypeError, "`look_forward` must be an int"),
        ({"causal": True, "look_forward": 1}, ValueError, "`look_forward` must be 0 when `causal=True`, got 1; drop"),
    ],
)
def test_wrong_fields_are_refused(fields, error, phrase):
    with pytest.raises(error) as caught:
        Window(**{"window_size": 4, **fields})
    assert phrase in str(caught.value)


@pytest.mark.parametrize("keys", [1, 2, 5, 8])
def test_sliding_windows_are_those_of_transformers(keys):
    """The rule of Hugging Face's `sliding_window_causal_mask_function`: `kv > q - sliding_window and kv <= q`."""
    q, kv = np.arange(13)[:, None], np.arange(13)
    np.testing.assert_array_equal(Window.sliding(keys).sees(q, kv), (kv > q - keys) & (kv <= q))


@pytest.mark.parametrize(("left", "right"), [(0, 0), (4, 0), (0, 3), (6, 4), (5, 3), (1, 12)])
def test_windows_between_are_those_of_flash_attention(left, right):
    """The rule of flash-attn's `window_size=(left, right)`: `q - left <= kv <= q + right`."""
    q, kv = np.arange(13)[:, None], np.arange(13)
    np.testing.assert_array_equal(Window.between(left, right).sees(q, kv), (kv >= q - left) & (kv <= q + right))


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda: Window.between(-1, 0), "`left` must be at least 0, got -1"),
        (lambda: Window.between(3, -1), "`right` must be at least 0, got -1"),
        (lambda: Window.sliding(0), "`keys` must be at least 1, got 0"),
    ],
)
def test_windows_without_a_limit_are_refused(make, phrase):
    with pytest.raises(ValueError, match=phrase):
        make()
