"""`Window` against hand-drawn masks."""

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
        ({"window_size": None, "look_backward": 2}, ValueError, "got `look_backward` 2 with it; leave them"),
        ({"window_size": None, "look_forward": 0}, ValueError, "without a limit, got `look_forward` 0"),
        ({"window_size": None, "exact_windowsize": True}, ValueError, "without a limit, got `exact_windowsize` True"),
        ({"window_size": None, "causal": 1}, TypeError, "`causal` must be True or False"),
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
    """The rule of transformers' `sliding_window_causal_mask_function`: `kv > q - sliding_window and kv <= q`."""
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
        (lambda: Window.between(-1, 0), r"`left` must be at least 0, got -1; .*`Window.sliding\(None\)`"),
        (
            lambda: Window.between(3, -1),
            r"`right` must be at least 0, got -1; for no limit .*`Window.everything\(\)`",
        ),
        (lambda: Window.chunks(0), "`size` must be at least 1, got 0"),
        (lambda: Window.sliding(None).within(0), "`length` must be at least 1, got 0"),
        (lambda: Window.sliding(4).within(-1), "`length` must be at least 1, got -1"),
        (lambda: Window.sliding(0), "`keys` must be at least 1, got 0"),
    ],
)
def test_windows_out_of_range_are_refused(make, phrase):
    with pytest.raises(ValueError, match=phrase):
        make()


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda: Window.between(4.0), "`left` must be an int, got 4.0"),
        (lambda: Window.between(4, None), "`right` must be an int, got None"),
        (lambda: Window.chunks(None), "`size` must be an int, got None"),
        (lambda: Window.sliding(True), "`keys` must be an int, got True"),
    ],
)
def test_numbers_of_keys_are_ints(make, phrase):
    with pytest.raises(TypeError, match=phrase):
        make()


@pytest.mark.parametrize("size", [1, 3, 5])
def test_chunks_are_those_of_transformers(size):
    """The rule of transformers' `chunked_causal_mask_function`: `kv // size == q // size and kv <= q`."""
    q, kv = np.arange(13)[:, None], np.arange(13)
    np.testing.assert_array_equal(Window.chunks(size).sees(q, kv), (kv // size == q // size) & (kv <= q))


@pytest.mark.parametrize(
    ("window", "shape"),
    [(Window.sliding(4096), (1, 4096)), (Window.between(64, 64), (1, 129)), (Window.between(101, 50), (1, 152))],
    ids=str,
)
def test_a_bias_of_a_window_by_distance_has_one_row(window, shape):
    assert (window.window_size, window.slab) == shape
    np.testing.assert_array_equal(window.relative_positions(), [np.arange(-window.backward, window.forward + 1)])


# Windows without a limit

CAUSAL, BOTH = Window.sliding(None), Window.everything()
GLOBAL = pytest.mark.parametrize("window", [CAUSAL, BOTH], ids=["causal", "both"])


def test_windows_without_a_limit_are_drawn():
    assert (Window(None, causal=True), Window(None)) == (CAUSAL, BOTH)
    assert CAUSAL.draw(3).split() == ["#..", "##.", "###"]
    assert BOTH.draw(2).split() == ["##", "##"]
    assert (CAUSAL.visible_pairs(5), BOTH.visible_pairs(5)) == (15, 25)


@GLOBAL
def test_windows_without_a_limit_take_ints_arrays_and_traced_values(window):
    i = np.arange(7)
    for seen in (window, window.transposed):
        for method in (seen.start, seen.stop):
            expected = [method(int(x)) for x in i]
            assert all(isinstance(x, int) for x in expected)
            np.testing.assert_array_equal(method(i), expected)
            np.testing.assert_array_equal(jax.jit(method)(jnp.asarray(i)), expected)
    j, far = np.arange(5), 2**31 - 2
    queries = window.transposed
    np.testing.assert_array_equal(
        (queries.start(j) <= i[:, None]) & (i[:, None] < queries.stop(j)), window.sees(i[:, None], j)
    )
    assert window.sees(far, far)
    assert window.sees(far, 0)


@GLOBAL
@pytest.mark.parametrize("length", [1, 2, 9])
def test_within_sees_the_same_in_a_sequence(window, length):
    limited = window.within(length)
    assert limited.window_size == 1
    assert limited.draw(length) == window.draw(length)
    assert limited.within(3) is limited, "it has a limit"


@GLOBAL
@pytest.mark.parametrize("name", ["size", "backward", "forward", "slab", "span", "capacity"])
def test_what_counts_windows_needs_a_limit(window, name):
    with pytest.raises(ValueError, match=r"`window_size` must be a number .*; use `window.within\(n\)`"):
        getattr(window, name)


@GLOBAL
def test_places_of_a_bias_need_a_limit(window):
    for call in (window.relative_positions, lambda: window.bias_row(3), lambda: window.bias_column(3, 2)):
        with pytest.raises(
            ValueError, match=r"`window_size` must be a number for a window to have a size, a slab or a bias"
        ):
            call()


def test_fields_of_a_window_can_be_replaced():
    assert dataclasses.replace(CAUSAL, causal=False) == BOTH
    assert dataclasses.replace(CAUSAL, window_size=4) == Window(4, causal=True)


@pytest.mark.parametrize(
    "window", [Window.sliding(2**31 - 1), Window(2**20, look_backward=2047), Window(2**30, causal=True)], ids=str
)
def test_the_queries_that_see_a_key_are_in_the_range_of_int32(window):
    keys = np.array([0, 1, 1000, 2**30], np.int32)
    stop = window.transposed.stop(keys)
    assert (stop > keys).all()
    assert [window.transposed.stop(int(key)) for key in keys] == stop.tolist()
