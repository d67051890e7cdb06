"""The blocks that kernels visit, checked against every pair of query and key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_local_attention import Window
from flax_local_attention.kernels.plan import visited_blocks
from tests.cases import PLACES


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_transposed_window_has_the_queries_that_see_a_key(place):
    i, j = np.arange(-5, 90)[:, None], np.arange(60)
    sees, queries = place.window.sees(i, j), place.window.transposed
    np.testing.assert_array_equal((queries.start(j) <= i) & (i < queries.stop(j)), sees)


@pytest.mark.parametrize("rows_of", ["queries", "keys"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_blocks_visited_and_seen_whole_are_those_of_brute_force(place, rows_of):
    window, n = place.window, min(place.n, 60)
    for n_keys, offset in ((n, 0), (n + 7, 5), (n, 3 + n // 2)):
        i, j = offset + np.arange(n)[:, None], np.arange(n_keys)
        sees = window.sees(i, j) if rows_of == "queries" else window.sees(i, j).T
        seen_by, base, origin = (window, offset, 0) if rows_of == "queries" else (window.transposed, 0, offset)
        rows, columns = sees.shape
        for block, size in ((4, 4), (8, 4), (4, 8), (16, 16)):
            for first in range(0, rows, block):
                last = min(first + block, rows) - 1
                visited = visited_blocks(seen_by, base + first, base + last, size, columns, origin)
                tiles = [sees[first : last + 1, begin : begin + size] for begin in range(0, columns, size)]
                assert [k for k, tile in enumerate(tiles) if tile.any()] == list(range(*visited[:2]))
                whole = [k for k, tile in enumerate(tiles) if tile.all() and tile.shape[1] == size]
                assert whole == list(range(*visited[2:]))
                assert [k for k in range(*visited[:2]) if not visited.has_edge(k)] == whole


def test_numbers_arrays_and_traced_values_give_the_same_blocks():
    window = Window(5, look_backward=2)
    firsts = np.arange(0, 64, 8)
    by_number = np.array([visited_blocks(window, int(first), int(first) + 7, 4, 64) for first in firsts])
    np.testing.assert_array_equal(np.stack(visited_blocks(window, firsts, firsts + 7, 4, 64), 1), by_number)
    traced = jax.jit(lambda first: jnp.stack(visited_blocks(window, first, first + 7, 4, 64), 1))(firsts)
    np.testing.assert_array_equal(traced, by_number)
