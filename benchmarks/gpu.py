"""Fused kernels on an NVIDIA GPU, beside cuDNN and FlexAttention.

    python -m benchmarks.gpu                                  (the eight shapes, causal exact)
    python -m benchmarks.gpu --kind plain both segments --shapes 8x8/8x2048x64:256
    python -m benchmarks.gpu --kind exact sliding bias global wide --forms triton --flex-seconds 0
    python -m benchmarks.gpu --kind segments mask cap --shapes 2x16/16x16384x128:1024 --forms triton mosaic
    python -m benchmarks.gpu --tiles 64x64/4/3,64x64/4/2,64x32/4/3 --forms triton

Times are medians of batches of calls, forward / forward and gradient, in ms. A call is a chain of dependent ones inside
one program, so that launching it does not count; cuDNN gets its own layout, and FlexAttention, in a process of its own,
the least of a CUDA graph's time and the sum of its kernels'. Ratios are the fastest peer's time over ours: over what
is chosen by itself ("None"), or the faster of our kernels where that was not asked for.

Windows of one token, w of them, are `sliding`; `bias` adds one by distance, `global` 16 keys that every query sees, and
`wide` has values twice as wide as keys. `mask` hides a tenth of the tokens, and `cap` bounds scores by 30.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import device_and_date, seconds_a_call
from benchmarks.tables import Skipped, header, reason, row
from flax_local_attention import MosaicGPU, Triton, Window, Windowed, local_attention
from flax_local_attention.kernels import Tiles
from flax_local_attention.kernels.pallas_triton import Tile

SHAPES = [
    "8x8/8x2048x64:256",
    "4x8/8x8192x64:128",
    "4x8/8x8192x64:512",
    "2x16/16x16384x128:256",
    "2x16/16x16384x128:1024",
    "1x8/8x131072x64:512",
    "4x32/8x8192x128:1024",
    "4x32/8x8192x64:128",
]
OF_ONE_TOKEN = ["sliding", "bias", "global", "wide"]
KINDS = ["exact", "plain", "both", "segments", "mask", "cap", *OF_ONE_TOKEN]
FORMS = ["None", "triton", "mosaic", "xla", "cudnn"]
REPEATS = 4  # calls in a chain


class Case(NamedTuple):
    """A shape of q, ``[b, h, n, d]``, fewer heads of keys, and a window."""

    b: int
    h: int
    kv_heads: int
    n: int
    d: int
    w: int
    kind: str
    dtype: str

    @property
    def window(self) -> Window:
        if self.kind in OF_ONE_TOKEN:
            return Window.sliding(self.w)
        both = self.kind == "both"
        return Window(self.w, causal=not both, exact_windowsize=self.kind != "plain")

    @property
    def title(self) -> str:
        heads = self.h if self.h == self.kv_heads else f"{self.h}/{self.kv_heads}"
        return f"{self.b}, {heads}, {self.n}, {self.d}, w {self.w}, {self.kind}, {self.dtype}"

    def arrays(self):
        """q, k, v and a cotangent of what has q's shape."""
        draw = np.random.default_rng(0).standard_normal
        widths = [self.d, self.d, 2 * self.d if self.kind == "wide" else self.d, self.d]
        heads = self.h, self.kv_heads, self.kv_heads, self.h
        shapes = [(self.b, h, self.n, d) for h, d in zip(heads, widths, strict=True)]
        return [jnp.asarray(draw(shape, np.float32), self.dtype) for shape in shapes]

    def options(self):
        """What the kind has: documents of a quarter of the row, a bias, keys that every query sees, a mask, a cap."""
        if self.kind == "bias":
            return {"attn_bias": jnp.ones((self.h, 1, self.w), self.dtype)}
        if self.kind == "global":
            return {"global_keys": 2 * (jnp.ones((self.kv_heads, 16, self.d), self.dtype),)}
        if self.kind == "mask":
            return {"mask": jnp.arange(self.n)[None] % 10 > 0}
        if self.kind == "cap":
            return {"logits_soft_cap": 30.0}
        if self.kind != "segments":
            return {}
        return {"segment_ids": jnp.broadcast_to(jnp.arange(self.n, dtype=jnp.int32) * 4 // self.n, (self.b, self.n))}


def ours(case, implementation):
    """Attention of ``[b, h, n, d]``."""
    options = case.options()
    return lambda q, k, v: local_attention(
        q, k, v, window=case.window, autopad=True, implementation=implementation, **options
    )[..., : case.d]


def cudnn(case):
    """Attention of ``[b, n, h, d]`` by cuDNN, which has causal exact windows alone."""
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(case.w, 0), implementation="cudnn"
    )


def forward_chain(attend):
    """Calls that depend on each other; what is fed on is what has q's shape."""

    def run(q, k, v, _):
        for _ in range(REPEATS):
            q = attend(q, k, v)
        return q

    return run


def gradient_chain(attend):
    """The same with the gradients of q, k and v."""

    def run(q, k, v, cotangent):
        for _ in range(REPEATS):
            out, pull_back = jax.vjp(attend, q, k, v)
            q, k, v = pull_back(cotangent)
            cotangent = out
        return q, k, v, cotangent

    return run


def milliseconds(fn, arrays, budget_ms=40.0):
    """Median time of one of the calls that a chain has."""
    compiled = jax.jit(fn).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    calls = int(np.clip(budget_ms / 1e3 / seconds_a_call(compiled, arrays), 2, 60))
    return statistics.median(seconds_a_call(compiled, arrays, calls) * 1e3 / REPEATS for _ in range(9))


def measure(form, case, tiles):
    """Times forward and with gradient; raises what the form raises."""
    arrays = case.arrays()
    if form == "cudnn":
        if case.kind != "exact":
            raise Skipped("cuDNN has causal exact windows alone")
        attend, arrays = cudnn(case), [x.swapaxes(1, 2) for x in arrays]
    else:
        attend = ours(case, {"triton": Triton(tiles), "mosaic": MosaicGPU(), "xla": Windowed(), "None": None}[form])
    return [milliseconds(chain(attend), arrays) for chain in (forward_chain, gradient_chain)]


def flex_times(cases, seconds):
    """Times of FlexAttention by case, from a process of its own; why not, where there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flex.jsonl"
        cases = [case._asdict() for case in cases]
        try:
            command = [sys.executable, "-m", "benchmarks.flex_attention", str(path), json.dumps(cases)]
            subprocess.run(
                command, cwd=Path(__file__).parents[1], timeout=seconds, check=True, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            pass
        except subprocess.CalledProcessError as problem:
            return {}, (problem.stderr.strip().splitlines() or ["failed"])[-1]
        lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Case(**row["case"]): row for row in rows}, "no time"


def cells_of(case, forms, tiles, flex, flex_problem):
    """Return the cells of a case's row, and what could not be measured."""
    times, problems = {}, []
    for form in forms:
        try:
            times[form] = measure(form, case, tiles)
        except Exception as problem:  # a form that fails is named, and the others go on
            problems.append(f"{form}: {reason(problem)}")
    if "milliseconds" in flex.get(case, {}):
        times["flex"] = flex[case]["milliseconds"]
    elif flex is not None and flex_problem:
        problems.append(f"flex: {flex.get(case, {}).get('problem', flex_problem)}")
    peers = [times[name] for name in ("cudnn", "flex") if name in times]
    own = [times["None"]] if "None" in times else [times[name] for name in ("triton", "mosaic") if name in times]
    ratios = [min(x[step] for x in peers) / min(x[step] for x in own) for step in (0, 1)] if peers and own else []
    pairs = [f"{times[name][0]:.3f} / {times[name][1]:.3f}" if name in times else "-" for name in (*forms, "flex")]
    return [case.title, *pairs, " / ".join(f"{ratio:.2f}" for ratio in ratios) or "-"], problems


def read_tiles(text):
    """Tiles of forward, dq, dk and dv, from ``rows x columns / warps / stages`` three times."""
    tiles = []
    for part in text.split(","):
        size, warps, stages = part.split("/")
        tiles.append(Tile(*map(int, size.split("x")), int(warps), int(stages)))
    return Tiles(*tiles)


def read_shape(text, kind, dtype):
    sizes, w = text.split(":")
    b, heads, n, d = sizes.split("x")
    h, kv_heads = heads.split("/")
    return Case(int(b), int(h), int(kv_heads), int(n), int(d), int(w), kind, dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxH/KVxNxD:W")
    parser.add_argument("--kind", nargs="+", default=["exact"], choices=KINDS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument(
        "--forms", nargs="+", default=["None", "cudnn"], choices=["None", "triton", "mosaic", "xla", "cudnn"]
    )
    parser.add_argument("--tiles", type=read_tiles, help="forward,dq,dkv as 64x64/4/3: rows x columns / warps / stages")
    parser.add_argument("--flex-seconds", type=float, default=240.0, help="0 leaves FlexAttention out")
    options = parser.parse_args()
    cases = [
        read_shape(text, kind, dtype) for dtype in options.dtype for kind in options.kind for text in options.shapes
    ]
    print(f"{device_and_date()}\n")
    flex, why = flex_times(cases, options.flex_seconds) if options.flex_seconds else ({}, "")
    print(header(["b, h, n, d, window", *options.forms, "flex", "ratio"]))
    problems = []
    for case in cases:
        cells, failed = cells_of(case, options.forms, options.tiles, flex, why)
        print(row(cells), flush=True)
        problems += [f"{case.title}: {problem}" for problem in failed]
    print("\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
