"""`Window`, which decides the keys that each query sees; everything else in the package derives from it."""

import dataclasses

import numpy as np

from flax_local_attention.checks import check_count, check_flag, check_integer

# One past the last key of a window without a limit. Positions are int32, so none is beyond it.
NO_LIMIT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Window:
    """The run of keys ``start(i) <= j < stop(i)`` that query ``i`` sees.

    The sequence is cut into windows of ``w = window_size`` tokens. With ``B = look_backward`` and
    ``F = look_forward`` (0 if causal, else 1, by default):

    | window               | start(i)           | stop(i)                |
    | -------------------- | ------------------ | ---------------------- |
    | plain                | ``(i // w - B) w`` | ``(i // w + F + 1) w`` |
    | ``exact_windowsize`` | ``i - B w``        | ``i + F w + 1``        |
    | ``window_size=None`` | ``0``              | no limit               |
    | causal               | as above           | ``i + 1``              |

    `sliding`, `between`, `chunks` and `everything` make the windows of other libraries and published models.
    Keys outside the sequence do not exist, so the first queries of a sequence see fewer keys. Windows
    of ``w = 3``, drawn by `draw` with one row per query:

        causal       causal exact   both         both exact
        #........    #........      ######...    ####.....
        ##.......    ##.......      ######...    #####....
        ###......    ###......      ######...    ######...
        ####.....    ####.....      #########    #######..
        #####....    .####....      #########    .#######.
        ######...    ..####...      #########    ..#######
        ...####..    ...####..      ...######    ...######
        ...#####.    ....####.      ...######    ....#####
        ...######    .....####      ...######    .....####

    A window holds no arrays. Its methods take Python ints, NumPy arrays and traced values.
    ``start`` and ``stop`` never decrease with ``i``, so a block of queries sees the keys from its
    first query's start to its last query's stop.

    Args:
        window_size: Tokens in a window, at least 1. None means no limit: a query sees all keys, or all up to its own
            if causal, in time O(n^2 d). The three fields below must then keep their defaults, and everything that
            needs a size raises a ValueError; see `within`.
        causal: Whether each query sees only keys up to its own.
        look_backward: Windows seen before the query's own, at least 0.
        look_forward: Windows seen after the query's own. None means 0 if causal, else 1.
        exact_windowsize: Count distances from the query instead of from its window's borders, so
            that every query sees equally far: ``B w + F w + 1`` keys.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field is out of range, ``look_forward`` is given for a causal window, or a field that counts
            windows is given for a window without a limit.

    Examples:
        >>> window = Window(3, causal=True)
        >>> window.start(7), window.stop(7)
        (3, 8)
        >>> print(Window(2, causal=True, exact_windowsize=True).draw(5))
        #....
        ##...
        ###..
        .###.
        ..###

    Source: ``local-attention`` 1.11.2; ``tests/test_original.py`` compares the two.
    """

    window_size: int | None
    causal: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    exact_windowsize: bool = False

    def __post_init__(self):
        check_flag("causal", self.causal)
        if self.window_size is None:
            self._check_global()
            return
        check_count("window_size", self.window_size, 1)
        check_count("look_backward", self.look_backward, 0)
        check_flag("exact_windowsize", self.exact_windowsize)
        if self.look_forward is None:
            object.__setattr__(self, "look_forward", 0 if self.causal else 1)
        check_count("look_forward", self.look_forward, 0)
        if self.causal and self.look_forward:
            raise ValueError(
                f"`look_forward` must be 0 when `causal=True`, got {self.look_forward}; drop `causal` to look ahead."
            )

    def _check_global(self):
        """Raise if a field that counts windows is given for a window without a limit."""
        fields = {"look_backward": 1, "look_forward": None, "exact_windowsize": False}
        given = [f"`{name}` {getattr(self, name)!r}" for name in fields if getattr(self, name) != fields[name]]
        if given:
            raise ValueError(
                f"`window_size=None` makes a window without a limit, got {' and '.join(given)} with it; leave "
                "them out, or give a `window_size`."
            )

    @classmethod
    def between(cls, left: int, right: int = 0) -> "Window":
        """Make the exact window of `left` keys before the query, its own key, and `right` keys after.

        The arguments are the same as in ``jax.nn.dot_product_attention(local_window_size=(left, right))`` and in
        flash-attn's ``window_size=(left, right)``. With ``right=0`` the window is causal. The window size is 1, so a
        bias, ``[h, 1, left + 1 + right]``, has one row and depends on the distance alone.

        Args:
            left: Keys before the query, at least 0.
            right: Keys after the query, at least 0.

        Raises:
            TypeError: A number is not an int.
            ValueError: A number is negative. Those libraries take -1 for no limit. Here, use `everything` for no limit
                on both sides, ``sliding(None)`` for none on the left and ``right=0``, and otherwise a number as large
                as the sequence.

        Examples:
            >>> Window.between(6, 4)
            Window(window_size=1, causal=False, look_backward=6, look_forward=4, exact_windowsize=True)
        """
        for name, value in (("left", left), ("right", right)):
            check_integer(name, value)
            if value < 0:
                raise ValueError(
                    f"`{name}` must be at least 0, got {value}; for no limit use `Window.everything()`, "
                    "`Window.sliding(None)` if no later key is seen, or a number as large as the sequence."
                )
        return cls(1, right == 0, left, right, exact_windowsize=True)

    @classmethod
    def sliding(cls, keys: int | None) -> "Window":
        """Make the causal window of the last `keys` keys, the query's own included.

        The argument is called ``sliding_window`` in Mistral, Gemma and Hugging Face's transformers.

        Args:
            keys: Keys that a query sees, at least 1. None means all keys up to its own, like null in published
                configurations.

        Raises:
            TypeError: The number is not an int.
            ValueError: The number is less than 1.

        Examples:
            >>> Window.sliding(4096).capacity
            4096
            >>> print(Window.sliding(None).draw(3))
            #..
            ##.
            ###
        """
        if keys is None:
            return cls(None, causal=True)
        check_count("keys", keys, 1)
        return cls.between(keys - 1, 0)

    @classmethod
    def chunks(cls, size: int) -> "Window":
        """Make the causal window of chunks that do not see each other (Llama 4's ``attention_chunk_size``).

        Args:
            size: Tokens in a chunk, at least 1.

        Examples:
            >>> print(Window.chunks(2).draw(4))
            #...
            ##..
            ..#.
            ..##
        """
        check_count("size", size, 1)
        return cls(size, causal=True, look_backward=0)

    @classmethod
    def everything(cls) -> "Window":
        """Make the window of all keys, earlier and later: global attention."""
        return cls(None)

    @property
    def is_global(self) -> bool:
        """Whether the window has no limit."""
        return self.window_size is None

    def within(self, length: int) -> "Window":
        """Return a window with a limit that sees the same keys in a sequence of `length` tokens.

        A window that has a limit already is returned unchanged.

        Args:
            length: Tokens in the sequence, at least 1.

        Examples:
            >>> Window.sliding(None).within(512) == Window.sliding(512)
            True
            >>> Window.everything().within(512) == Window.between(511, 511)
            True
        """
        check_count("length", length, 1)
        if not self.is_global:
            return self
        return type(self).between(length - 1, 0 if self.causal else length - 1)

    def fitted(self, queries: int, keys: int) -> "Window":
        """Return a window that sees the same keys of a sequence and does not reach beyond the sequence.

        Args:
            queries: One more than the position of the last query, at least 1.
            keys: Keys in the sequence, at least 1.

        Examples:
            >>> Window(10**9, causal=True).fitted(64, 64)
            Window(window_size=1, causal=True, look_backward=63, look_forward=0, exact_windowsize=True)
            >>> Window(16, look_backward=1000).fitted(64, 64)
            Window(window_size=16, causal=False, look_backward=3, look_forward=1, exact_windowsize=False)
        """
        if type(self) is not Window:  # a subclass may define another `start` and `stop`
            return self.within(max(queries, keys))
        left, right = queries - 1, 0 if self.causal else keys - 1
        if self.is_global or (self.size >= max(queries, keys) and not self.exact_windowsize):
            return Window(1, self.causal, left, right, exact_windowsize=True)
        if self.exact_windowsize:
            if self.backward <= left and self.forward <= right:
                return self
            return Window(1, self.causal, min(self.backward, left), min(self.forward, right), exact_windowsize=True)
        backward, forward = min(self.look_backward, left // self.size), min(self.look_forward or 0, right // self.size)
        return dataclasses.replace(self, look_backward=backward, look_forward=forward)

    @property
    def size(self) -> int:
        """The `window_size` of a window with a limit.

        Raises:
            ValueError: The window has no limit. Everything that is counted in windows raises this.
        """
        if self.window_size is None:
            raise ValueError(
                f"`window_size` must be a number for a window to have a size, a slab or a bias, got {self}; use "
                "`window.within(n)`, which sees the same keys in n tokens."
            )
        return self.window_size

    @property
    def backward(self) -> int:
        """Tokens in the windows before a query's own."""
        return self.look_backward * self.size

    @property
    def forward(self) -> int:
        """Tokens in the windows after a query's own."""
        return (self.look_forward or 0) * self.size

    @property
    def slab(self) -> int:
        """Tokens in all windows that the queries of one window look at: the columns of a bias."""
        return self.backward + self.size + self.forward

    @property
    def span(self) -> int:
        """Tokens that xPos counts as one window: `window_size`, or the reach to both sides if that is 1."""
        return self.size if self.size > 1 else max(self.backward + self.forward, 1)

    @property
    def capacity(self) -> int:
        """The most keys that a query of a causal window sees, its own included: the size of a cache."""
        return self.backward + (1 if self.exact_windowsize else self.size)

    def start(self, i):
        """Return the first key that query ``i`` sees; negative where the sequence begins later."""
        if self.is_global:
            return 0 * i
        if self.exact_windowsize:
            return i - self.backward
        return i // self.size * self.size - self.backward

    def stop(self, i):
        """Return one past the last key that query ``i`` sees; the sequence may end earlier."""
        if self.causal:
            return i + 1
        if self.is_global:
            return 0 * i + NO_LIMIT
        if self.exact_windowsize:
            return i + 1 + _at_most(NO_LIMIT - 1 - i, self.forward)
        first = i // self.size * self.size
        return first + _at_most(NO_LIMIT - first, self.size + self.forward)

    def sees(self, i, j):
        """Return whether query ``i`` sees key ``j``, elementwise over arrays that broadcast."""
        return (self.start(i) <= j) & (j < self.stop(i))

    def bias_row(self, i):
        """Return the row of a bias for query ``i``: its place in its window, in ``[0, w)``."""
        return i % self.size

    def bias_column(self, i, j):
        """Return the column of a bias for key ``j``: its slot in query ``i``'s slab, in ``[0, slab)`` if seen."""
        return j - (i // self.size * self.size - self.backward)

    @property
    def transposed(self) -> "TransposedWindow":
        """The queries that see each key."""
        return TransposedWindow(self)

    def relative_positions(self) -> np.ndarray:
        """Return key position minus query position for every row and column of a bias.

        Every relative bias is a function of these distances: ``attn_bias = f(window.relative_positions())``.

        Returns:
            Signed distances, ``[w, s]`` int32; negative where the key comes first.
        """
        rows = np.arange(self.size, dtype=np.int32)[:, None]
        columns = np.arange(self.slab, dtype=np.int32)
        return columns - rows - np.int32(self.backward)

    def visible_pairs(self, n: int) -> int:
        """Count the pairs of a query and a key that it sees in a sequence of ``n`` tokens.

        The scores cost ``2 d`` floating-point operations per pair, and the product with the values as many again.
        """
        check_count("n", n, 0)
        return sum(min(self.stop(i), n) - max(self.start(i), 0) for i in range(n))

    def draw(self, n: int) -> str:
        """Draw the window: one row per query, one column per key, ``#`` where the query sees the key."""
        check_count("n", n, 0)
        return "\n".join("".join("#" if self.sees(i, j) else "." for j in range(n)) for i in range(n))


@dataclasses.dataclass(frozen=True)
class TransposedWindow:
    """The run of queries ``start(j) <= i < stop(j)`` that see key ``j``: the columns of a drawn `Window`.

    Its methods take the same types as those of `Window`, and never decrease with ``j``. Queries outside the sequence do
    not exist.

    Args:
        window: Which keys a query sees.

    Examples:
        >>> queries = Window(3, causal=True).transposed
        >>> queries.start(4), queries.stop(4)
        (4, 9)
    """

    window: Window

    def start(self, j):
        """Return the first query that sees key ``j``; negative where the sequence begins later."""
        window = self.window
        if window.causal:
            return j
        if window.is_global:
            return 0 * j
        if window.exact_windowsize:
            return j - window.forward
        return j // window.size * window.size - window.forward

    def stop(self, j):
        """Return one past the last query that sees key ``j``; the sequence may end earlier."""
        window = self.window
        if window.is_global:
            return 0 * j + NO_LIMIT
        if window.exact_windowsize:
            return j + 1 + _at_most(NO_LIMIT - 1 - j, window.backward)
        first = j // window.size * window.size
        return first + _at_most(NO_LIMIT - first, window.size + window.backward)


def _at_most(x, most):
    """Return ``min(x, most)`` for Python ints, and for arrays of int32, which `most` may exceed."""
    return min(x, most) if isinstance(x, int) else x.clip(max=min(most, NO_LIMIT))
