r"""Time the fused kernels on an NVIDIA GPU, beside cuDNN, FlexAttention, the original and plain XLA.

    python -m benchmarks.gpu                                  (eight shapes, causal exact windows)
    python -m benchmarks.gpu --kind plain both segments --shapes 8x8/8x2048x64:256
    python -m benchmarks.gpu --kind exact sliding bias global wide --forms triton
    python -m benchmarks.gpu --kind segments mask cap --shapes 2x16/16x16384x128:1024 --forms triton mosaic
    python -m benchmarks.gpu --tiles 64x64/4/3,64x64/4/2,64x32/4/3 --forms triton
    python -m benchmarks.gpu --shapes 1x8/8x{1024,4096,16384,65536,262144}x64:256 --memory --record growth-h100.json \
        --forms None xla cudnn dot_product original original-compiled flex

Times are medians over rounds, forward / forward and gradient, in ms. A call in JAX is one of a chain of dependent calls
in one program, so launching it does not count; cuDNN gets its own layout. PyTorch's forms run in a process of their
own, and their time is the least of three: by CUDA events, by a CUDA graph, and the sum of their kernels. The ratio is
the fastest peer's time over ours. Ours is the default choice ("None"), or else the faster of our kernels.

`--memory` reports what a call takes beside its inputs: for JAX, temporary arrays and results as XLA compiled them; for
PyTorch, the most that its allocator held.

Kinds: `exact`, `plain` and `both` (two-sided) are windows of w tokens, each looking one window back. `segments` packs
four documents, `mask` hides a tenth of the tokens, `cap` bounds the logits by 30. `sliding` has windows of one token
that see w keys; `bias` adds a bias by distance to it, `global` 16 keys that every query sees, and `wide` has values
twice as wide as keys.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.cases import refuse_scores
from benchmarks.jax_forms import with_gradient
from benchmarks.machine import MIB, describe_machine, seconds_a_call
from benchmarks.tables import Skipped, bullets, header, reason, row, table
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
TORCH_FORMS = ["flex", "original", "original-compiled"]
STEPS = "forward", "gradient"
REPEATS = 4  # calls in a chain
ROUNDS = 9


class Case(NamedTuple):
    """A shape of q, ``[b, h, n, d]``, the number of key heads, and a window."""

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

    @property
    def facts(self) -> dict[str, Any]:
        """The case as a record names it."""
        return {("window" if name == "w" else name): value for name, value in self._asdict().items()}

    def arrays(self):
        """Draw q, k, v and the cotangent of the result."""
        draw = np.random.default_rng(0).standard_normal
        widths = [self.d, self.d, 2 * self.d if self.kind == "wide" else self.d, self.d]
        heads = self.h, self.kv_heads, self.kv_heads, self.h
        shapes = [(self.b, h, self.n, d) for h, d in zip(heads, widths, strict=True)]
        return [jnp.asarray(draw(shape, np.float32), self.dtype) for shape in shapes]

    def options(self):
        """Return the options of the kind: documents of a quarter of the row, a bias, global keys, a mask or a cap."""
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
    """Return our attention of ``[b, h, n, d]``."""
    options = case.options()
    return lambda q, k, v: local_attention(
        q, k, v, window=case.window, autopad=True, implementation=implementation, **options
    )[..., : case.d]


def dot_product_attention(case, implementation):
    """Return JAX's own attention of ``[b, n, h, d]``, which has causal exact windows alone."""
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(case.w, 0), implementation=implementation
    )


PEERS = {
    "cudnn": lambda case: dot_product_attention(case, "cudnn"),
    "dot_product": lambda case: dot_product_attention(case, "xla"),
}
FORMS = ["None", "triton", "mosaic", "xla", *PEERS, *TORCH_FORMS]


def forward_chain(attend):
    """Chain calls: each result is the next call's q."""

    def run(q, k, v, _):
        for _ in range(REPEATS):
            q = attend(q, k, v)
        return q

    return run


def gradient_chain(attend):
    """Chain calls with gradients: each call's gradients are the next one's q, k and v."""

    def run(q, k, v, cotangent):
        for _ in range(REPEATS):
            out, pull_back = jax.vjp(attend, q, k, v)
            q, k, v = pull_back(cotangent)
            cotangent = out
        return q, k, v, cotangent

    return run


def milliseconds(fn, arrays, budget_ms=40.0):
    """Time one of the calls that a chain has, once a round."""
    compiled = jax.jit(fn).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    calls = int(np.clip(budget_ms / 1e3 / seconds_a_call(compiled, arrays), 2, 60))
    return [seconds_a_call(compiled, arrays, calls) * 1e3 / REPEATS for _ in range(ROUNDS)]


def peak_mib(fn, arrays):
    """Return the memory that one call takes beside its inputs as compiled: temporary arrays and results."""
    memory = jax.jit(fn).lower(*arrays).compile().memory_analysis()
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / MIB


def measure(form, case, options):
    """Measure one of JAX's forms on a case; raises what the form raises."""
    arrays = case.arrays()
    if form in PEERS:
        if case.kind != "exact":
            raise Skipped("`jax.nn.dot_product_attention` has causal exact windows alone")
        if form == "dot_product":
            refuse_scores(case.b * case.h * case.n**2, options.limit_gib)
        attend, arrays = PEERS[form](case), [x.swapaxes(1, 2) for x in arrays]
    else:
        own = {"triton": Triton(options.tiles), "mosaic": MosaicGPU(), "xla": Windowed(), "None": None}
        attend = ours(case, own[form])
    row = {}
    if options.memory:
        row["forward_peak_mib"] = peak_mib(attend, arrays[:3])
        row["gradient_peak_mib"] = peak_mib(with_gradient(attend), arrays)
    row["forward_ms"] = milliseconds(forward_chain(attend), arrays)
    row["gradient_ms"] = milliseconds(gradient_chain(attend), arrays)
    return row


def torch_rows(cases, forms, seconds):
    """Measure PyTorch's forms in a process of its own; return rows by case and form, and why others are missing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "torch.jsonl"
        described = json.dumps([case._asdict() for case in cases])
        command = [sys.executable, "-m", "benchmarks.gpu_torch", str(path), described, str(seconds), *forms]
        why = "no time"
        try:
            # A form that has begun gets a minute more, so that what was measured is not lost.
            subprocess.run(
                command,
                cwd=Path(__file__).parents[1],
                timeout=seconds + 60,
                check=True,
                stderr=subprocess.PIPE,
                text=True,
            )
        except subprocess.TimeoutExpired:
            pass
        except subprocess.CalledProcessError as problem:
            why = (problem.stderr.strip().splitlines() or ["failed"])[-1]
        lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(Case(**row.pop("case")), row.pop("form")): row for row in rows}, why


def measure_case(case, options, found, why):
    """Return the rows of a case by form, and the reason for each form that has none."""
    rows, problems = {}, {}
    for form in options.forms:
        try:
            if form in TORCH_FORMS:
                rows[form] = found.get((case, form), {"problem": why})
            else:
                rows[form] = measure(form, case, options)
        except Exception as problem:  # a form that fails is named, and the others go on
            rows[form] = {"problem": reason(problem)}
        if "problem" in rows[form]:
            problems[form] = rows.pop(form)["problem"]
    return rows, problems


def cells_of(case, forms, rows):
    """Return the cells of a case's row: times, and the fastest peer's over ours."""
    times = {form: [statistics.median(row[f"{step}_ms"]) for step in STEPS] for form, row in rows.items()}
    peers = [times[form] for form in times if form in PEERS or form in TORCH_FORMS]
    own = [times["None"]] if "None" in times else [times[form] for form in ("triton", "mosaic") if form in times]
    ratios = [min(x[step] for x in peers) / min(x[step] for x in own) for step in (0, 1)] if peers and own else []
    pairs = ["{:.3f} / {:.3f}".format(*times[form]) if form in times else "-" for form in forms]
    return [case.title, *pairs, " / ".join(f"{ratio:.2f}" for ratio in ratios) or "-"]


def memory_cells(case, forms, rows):
    """Return the cells of a case's row in the table of memory."""
    sizes = {form: [row[f"{step}_peak_mib"] for step in STEPS] for form, row in rows.items()}
    return [case.title, *("{:.1f} / {:.1f}".format(*sizes[form]) if form in sizes else "-" for form in forms)]


def read_tiles(text):
    """Read the tiles of forward, dq and dkv, each as ``rows x columns / warps / stages``."""
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


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxH/KVxNxD:W")
    parser.add_argument("--kind", nargs="+", default=["exact"], choices=KINDS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--forms", nargs="+", default=["None", "cudnn", "flex"], choices=FORMS)
    parser.add_argument("--tiles", type=read_tiles, help="forward,dq,dkv as 64x64/4/3: rows x columns / warps / stages")
    parser.add_argument("--memory", action="store_true", help="also report the memory of a call beside its inputs")
    parser.add_argument("--torch-seconds", type=float, default=240.0, help="begin no PyTorch form after this time")
    parser.add_argument("--limit-gib", type=float, default=40.0, help="skip `dot_product` where its scores take more")
    record.add_option(parser)
    return parser.parse_args()


def main():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the memory too
    options = read_options()
    cases = [
        read_shape(text, kind, dtype) for dtype in options.dtype for kind in options.kind for text in options.shapes
    ]
    facts = describe_machine("gpu")
    print(f"{bullets(facts)}\n")
    torch_forms = [form for form in options.forms if form in TORCH_FORMS]
    found, why = torch_rows(cases, torch_forms, options.torch_seconds) if torch_forms else ({}, "")
    print(header(["b, h, n, d, window", *options.forms, "ratio"]))
    recorded, problems, memory = [], [], []
    for case in cases:
        rows, missing = measure_case(case, options, found, why)
        print(row(cells_of(case, options.forms, rows)), flush=True)
        memory.append(memory_cells(case, options.forms, rows) if options.memory else [])
        problems += [f"{case.title}: {form}: {problem}" for form, problem in missing.items()]
        recorded += [{"form": form} | case.facts | figures for form, figures in rows.items()]
        if options.record:
            record.save(options.record, facts, recorded)
    if options.memory:
        print(f"\nMiB beside the inputs\n\n{table(['b, h, n, d, window', *options.forms], memory)}")
    print("\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
