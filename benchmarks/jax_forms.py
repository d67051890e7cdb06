"""Forms of local attention in JAX: ours, and what one would write or call without it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.cases import Case
from benchmarks.tables import Skipped
from flax_local_attention import Rotary, Windowed, local_attention

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def ours(case: Case, implementation: Windowed | None = None) -> Attention:
    """Return `local_attention`, by its default choice or by an implementation."""

    def attend(q, k, v):
        options = {"window": case.window, "rotary": case.options.rotary, "autopad": True}
        return local_attention(q, k, v, **options, implementation=implementation)

    return attend


def all_windows(case: Case) -> Attention:
    """Return attention that computes all windows' scores in one array, the plain way to write it."""
    w = case.window_size
    if case.n % w:
        raise Skipped(f"the length must be a multiple of the window, got {case.n} tokens for windows of {w}")
    m = case.n // w
    i = jnp.arange(case.n).reshape(m, w, 1)
    j = ((jnp.arange(m)[:, None] - 1) * w + jnp.arange(2 * w)).reshape(m, 1, 2 * w)
    visible = case.window.sees(i, j) & (j >= 0)

    def slabs(x):
        x = x.reshape(*x.shape[:2], m, w, case.d)
        before = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))[:, :, :-1]
        return jnp.concatenate([before, x], axis=3)

    def attend(q, k, v):
        q, k = _rotated(case, q, k)
        windows = q.reshape(*q.shape[:2], m, w, case.d) * case.d**-0.5
        scores = jnp.einsum("bhmid,bhmjd->bhmij", windows, slabs(k), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
        return jnp.einsum("bhmij,bhmjd->bhmid", weights, slabs(v)).reshape(q.shape)

    return attend


def dot_product_attention(case: Case, implementation: str) -> Attention:
    """Return `jax.nn.dot_product_attention(local_window_size=)`, which has exact windows only."""
    if not case.exact:
        raise Skipped("`local_window_size` counts from the query, so there is no plain window")

    def attend(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (*_rotated(case, q, k), v))
        size = (case.window_size, 0)
        return jax.nn.dot_product_attention(
            q, k, v, local_window_size=size, is_causal=True, implementation=implementation
        ).swapaxes(1, 2)

    return attend


def _rotated(case, q, k):
    if not case.rotary:
        return q, k
    rotary, positions = Rotary(case.d), jnp.arange(case.n)
    return rotary.turn(q, rotary.query_table(positions)), rotary.turn(k, rotary.key_table(positions))


FORMS: dict[str, Callable[[Case], Attention]] = {
    "ours": ours,
    "ours xla": lambda case: ours(case, Windowed()),
    "jax all windows at once": all_windows,
    "jax dot_product_attention xla": lambda case: dot_product_attention(case, "xla"),
    "jax dot_product_attention cudnn": lambda case: dot_product_attention(case, "cudnn"),
}
"""What makes a case's attention, by name; `form` makes "ours block N"."""


def form(name: str, case: Case) -> Attention:
    """Return the attention called `name` for a case; raise `Skipped` if it cannot serve the case."""
    if name.startswith("ours block "):
        return ours(case, Windowed(int(name.removeprefix("ours block "))))
    if name not in FORMS:
        raise SystemExit(f"There is no form {name!r} in JAX; there are 'ours block N' and {list(FORMS)}.")
    return FORMS[name](case)


def with_gradient(attend: Attention) -> Callable[..., tuple]:
    """Return the function that computes the result and the gradients of q, k and v from a cotangent of the result."""

    def run(q, k, v, cotangent):
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent)

    return run


@functools.lru_cache(maxsize=1)
def inputs(case: Case) -> list[jax.Array]:
    """Return q, k, v and the cotangent of the result, which all forms share."""
    return [jnp.asarray(x, case.dtype) for x in case.arrays()]
