"""How many bundles of instructions the kernels for a TPU v5e have: ours and those of JAX's splash attention.

    python -m benchmarks.schedule
    python -m benchmarks.schedule --blocks 128x128 512x256 --head-sizes 64 128 256 --forms ours

A TPU issues one bundle a cycle, in an order that its compiler fixes, so cycles can be counted without a TPU; waits for
memory are not counted. Columns: bundles of the whole kernel, and of its longest part without a branch, which is what a
step computes for one block of scores. Both forward kernels divide by the total and return a log-sum-exp; both leave
delta to XLA. The window is causal and exact, with 256 keys before a query, and arrays are ``[1, 8, 2048, d]`` in
bfloat16.

Splash attention has square blocks here, and pads heads narrower than 128.
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path

BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LB|PF|PB|LH|LE|CT)?\s*:")
KERNELS = {
    "ours": {"forward": "local_attention", "dq": "local_attention_dq", "dkv": "local_attention_dkv"},
    "splash": {
        "forward": "splash_mha_fwd_residuals",
        "dq": "splash_mha_dq_no_residuals",
        "dkv": "splash_mha_dkv_no_residuals",
    },
}
REACH, HEADS, N = 256, 8, 2048


def count_bundles(text: str) -> tuple[int, int]:
    """Count the bundles of a kernel and of its longest part without a branch in the compiler's final listing."""
    parts = [0]
    for line in text.splitlines():
        if not (found := BUNDLE.match(line)):
            continue
        if found[1]:
            parts.append(0)
        parts[-1] += 1
        if "sbr.rel" in line:
            parts.append(0)
    return sum(parts), max(parts)


def attention_of(form, block):
    """Make the attention of a form; it takes q, k and v ``[1, h, n, d]``, with q scaled."""
    from flax_local_attention import TPU, Window, local_attention
    from flax_local_attention.kernels.pallas_tpu import Block
    from flax_local_attention.kernels.tpu import Tiles

    if form == "ours":
        tile = Block(*block)
        kernels = TPU(Tiles(tile, tile, tile))
        return lambda *qkv: local_attention(*qkv, window=Window.sliding(REACH + 1), implementation=kernels)
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.MultiHeadMask([splash.LocalMask((N, N), (REACH, 0), 0)] * HEADS)
    q, k = block
    sizes = splash.BlockSizes(block_q=q, block_kv=k, block_q_dkv=q, block_kv_dkv=k, block_q_dq=q, block_kv_dq=k)
    attend = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    return lambda q, k, v: attend(q[0], k[0], v[0])[None]


def bundles_of(form: str, block: tuple[int, int], d: int, listings: Path) -> dict[str, tuple[int, int]]:
    """Compile a form's gradient, and count the bundles of each kernel in the compiler's folder `listings`."""
    import jax
    import jax.numpy as jnp

    from benchmarks.jax_forms import with_gradient
    from benchmarks.targets import compile_for

    x = jax.ShapeDtypeStruct((1, HEADS, N, d), jnp.bfloat16)
    for path in listings.iterdir():
        path.unlink()
    compile_for("tpu", with_gradient(attention_of(form, block)), x, x, x, x)

    def count(kernel):
        (path,) = listings.glob(f"*-{kernel}.[0-9]*-final_bundles.txt")
        return count_bundles(path.read_text())

    return {step: count(kernel) for step, kernel in KERNELS[form].items()}


def _block(text):
    rows, _, cols = text.partition("x")
    return int(rows), int(cols or rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=_block, default=[(128, 128), (256, 256), (512, 512)])
    parser.add_argument("--head-sizes", nargs="+", type=int, default=[128])
    parser.add_argument("--forms", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, for a program to read")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # The compiler reads this once, when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        import jax

        from benchmarks.tables import table

        jax.config.update("jax_platforms", "cpu")  # the target is described, not looked for
        figures = [
            {"form": form, "block": f"{block[0]}x{block[1]}", "d": d, **bundles_of(form, block, d, Path(folder))}
            for d in options.head_sizes
            for block in options.blocks
            for form in options.forms
        ]
    if options.json:
        print(json.dumps(figures))
        return
    print(f"jax {jax.__version__}; bundles of a kernel, and of a step\n")
    steps = list(KERNELS["ours"])
    rows = [[str(x["d"]), x["block"], x["form"], *("{}, {}".format(*x[step]) for step in steps)] for x in figures]
    print(table(["head size", "block", "form", *steps], rows))


if __name__ == "__main__":
    main()
