"""A training step of one sequence spread over a whole slice of TPUs, as compiled; no TPU is needed.

    python -m benchmarks.slice                                        (the table in RESULTS.md, a minute a row)
    python -m benchmarks.slice --cases v5p:8x8x8/16777216 --fsdp      (a slice and the tokens of a sequence)

The step is forward, backward and Adam, as every chip of the slice would run it. Nothing is run, so nothing is timed.
The compiler refuses a step that does not fit a chip.

Columns: tokens of the sequence, and per chip; a chip's memory for parameters, optimizer and tokens (results take their
place), its temporary memory, and both with the program's code; the collective-permutes that a chip takes part in, how
many of them run beside other work, and the MiB it receives by them; the MiB of the results of all-reduces and
reduce-scatters, which sum gradients, and of all-gathers and all-to-alls. What is in the body of a loop counts once per
run of the body.
"""

import argparse
import collections
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.compile_for import SIZES
from benchmarks.machine import GIB, MIB
from benchmarks.scaling import AXES, training
from benchmarks.tables import header, reason, row
from benchmarks.targets import tpu_slice
from flax_local_attention import AXIS_RULES, LocalTransformer, Window, parameter_shardings

CASES = [
    # 65,536 tokens a chip, and twice as many
    *(f"{name}/{chips * 2**16}" for name, chips in (("v5e:2x2", 4), ("v5e:4x4", 16), ("v5e:8x8", 64))),
    *(f"v5e:16x16/{2**k}" for k in (24, 25)),
    *(f"{name}/{chips * 2**16}" for name, chips in (("v5p:2x2x2", 8), ("v5p:4x4x4", 64), ("v5p:8x8x8", 512))),
    # one length on slices of several sizes
    *(f"{name}/{2**20}" for name in ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")),
    *(f"{name}/{2**24}" for name in ("v5p:4x4x4", "v5p:8x8x8")),
    f"v5p:8x8x8/{2**28}",
]
COLUMNS = ["slice", "chips", "tokens", "a chip", "arguments GiB", "temporary GiB", "together GiB", "permutes", "beside"]
COLUMNS += ["received MiB", "summed MiB", "gathered MiB", "compile s"]
KINDS = "collective-permute", "all-reduce", "reduce-scatter", "all-gather", "all-to-all"
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start|-done)?\(")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
LOOP = re.compile(r"condition=%?([\w.\-]+)")
REFUSAL = re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)|Used ([\d.]+)G of ([\d.]+)G hbm")


class Sizes(NamedTuple):
    """A model, and how its gradient is computed.

    Attributes:
        depth, dim, vocabulary: Layers, width and different tokens.
        keys: Keys that a query sees.
        remat: Whether the gradient recomputes layers. They are scanned in any case.
    """

    depth: int = 12
    dim: int = 1024
    vocabulary: int = 2**15
    keys: int = 1024
    remat: bool = True

    def model(self, n: int) -> LocalTransformer:
        """Make the model, with heads of 128."""
        return LocalTransformer(
            num_tokens=self.vocabulary,
            max_seq_len=n,
            dim=self.dim,
            depth=self.depth,
            heads=max(self.dim // 128, 1),
            dim_head=128,
            local_attn_window_size=Window.sliding(self.keys),
            use_abs_pos_emb=False,
            num_residual_streams=1,
            remat=self.remat,
            scan_layers=True,
            dtype=jnp.bfloat16,
        )


class Collective(NamedTuple):
    """A collective operation of a program.

    Attributes:
        kind: One of `KINDS`.
        size: Bytes of its results on one chip.
        times: How often the program runs it.
        is_beside: Whether other operations may run between its start and its end.
    """

    kind: str
    size: int
    times: int
    is_beside: bool


def in_a_path(devices: Sequence[Any]) -> list[Any]:
    """Order the chips of a slice so that each is next to the one before: row after row, there and back.

    ``jax.make_mesh`` of JAX 0.10 starts all rows of 8 or 16 chips at the same end. At the end of a row a shard's
    neighbour is then several chips away, and XLA makes all exchanges wait.
    """
    sizes = [max(device.coords[axis] for device in devices) + 1 for axis in range(len(devices[0].coords))]

    def place(device):
        at = 0
        for index, size in zip(reversed(device.coords), reversed(sizes), strict=True):
            at = at * size + (size - 1 - index if at % 2 else index)
        return at

    return sorted(devices, key=place)


def compile_step(
    topology: str,
    n: int,
    sizes: Sizes,
    *,
    is_sharded: bool = False,
    by_jax: bool = False,
    options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compile a training step of one sequence for a slice.

    Args:
        topology: The slice.
        n: Tokens of the sequence.
        sizes: The model.
        is_sharded: Whether each chip holds only its part of parameters and optimizer.
        by_jax: Whether to order the chips as ``jax.make_mesh`` does.
        options: Options of the compiler.
    """
    devices = tpu_slice(topology)
    if by_jax:
        mesh = jax.make_mesh((1, len(devices)), AXES, devices=devices)
    else:
        mesh = Mesh(np.array(in_a_path(devices))[None], AXES, axis_types=(AxisType.Explicit,) * 2)
    start, step = training(sizes.model(n))
    rules = (("embed", "sequence" if is_sharded else None), *AXIS_RULES)
    shapes = jax.eval_shape(start)
    shardings = parameter_shardings(shapes, mesh, rules)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )
    tokens = jax.ShapeDtypeStruct((1, n), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(*AXES)))
    # The abstract mesh tells JAX, and the choice of kernels, which device to compile for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).trace(state, tokens, tokens)
        return traced.lower(lowering_platforms=("tpu",)).compile(compiler_options=options)


def collectives(hlo: str) -> list[Collective]:
    """List the collective operations of an optimized program."""
    bodies = _computations(hlo)
    times: dict[str, int] = collections.defaultdict(int)
    entry = next(name for name, (is_entry, _) in bodies.items() if is_entry)

    def visit(name, count):
        times[name] += count
        for line in bodies[name][1]:
            if re.search(r" async-(?:update|done)\(", line):  # the async-start before it calls the same computation
                continue
            loop = LOOP.search(line)
            for called in CALLED.findall(line):
                visit(called, count * (_trips(bodies[loop[1]][1]) if loop else 1))

    visit(entry, 1)
    found: dict[str, Collective] = {}
    for name, (_, lines) in bodies.items():
        for line in lines:
            match = COLLECTIVE.search(line)
            if not match or match[3] == "-start" or not times[name]:  # the -done alone has the result
                continue
            one = Collective(match[2], _bytes(match[1]), times[name], match[3] == "-done")
            # Collectives of one ``shard_map`` share a channel, and so do parts of one operation fused with others.
            is_part = "async_collective_fusion_config" in line
            key = re.search(r"channel_id=\d+", line)[0] if is_part else line
            if key in found:
                one = one._replace(times=min(one.times, found[key].times), is_beside=True)
            found[key] = one
    return list(found.values())


def _computations(hlo):
    """Map the name of each computation of a program to whether it is the entry, and its lines."""
    found, lines = {}, []
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = []
            found[match[2]] = bool(match[1]), lines
        else:
            lines.append(line)
    return found


def _trips(condition):
    """Return how often a loop runs whose condition is that a counter, starting at 0, is below a constant."""
    text = "\n".join(condition)
    bounds = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", text)
    if len(bounds) != 1 or "direction=LT" not in text:
        raise ValueError(f"A loop's condition must be `counter < constant`, got {text}; count its trips otherwise.")
    return int(bounds[0])


def _bytes(type_text):
    """Return the bytes of the arrays in the text of a type."""
    return sum(
        SIZES.get(kind, 4) * math.prod(int(size) for size in axes.split(",") if size)
        for kind, axes in ARRAY.findall(type_text)
    )


def received(found: Sequence[Collective], *kinds: str) -> int:
    """Return the bytes of the results of some kinds of collectives on one chip."""
    return sum(each.size * each.times for each in found if each.kind in kinds)


def cells_of(topology: str, n: int, sizes: Sizes, options) -> list[str]:
    """Compile a step and return the cells of its row."""
    chips = len(tpu_slice(topology))
    cells = [topology, f"{chips}", f"{n:,}", f"{n // chips:,}"]
    begin = time.perf_counter()
    try:
        compiled = compile_step(topology, n, sizes, is_sharded=options.fsdp, by_jax=options.jax_order)
    except jax.errors.JaxRuntimeError as problem:
        refused = REFUSAL.search(str(problem))
        if refused is None:
            cells += ["-", "-", reason(problem)]
        else:
            used, present = [figure for figure in refused.groups() if figure]
            cells += ["-", used, f"does not fit {present}"]
        return cells + ["-"] * (len(COLUMNS) - len(cells))
    seconds = time.perf_counter() - begin
    memory, found = compiled.memory_analysis(), collectives(compiled.as_text())
    together = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    together += memory.output_size_in_bytes - memory.alias_size_in_bytes
    permutes = [each for each in found if each.kind == "collective-permute"]
    return [
        *cells,
        f"{memory.argument_size_in_bytes / GIB:.2f}",
        f"{memory.temp_size_in_bytes / GIB:.2f}",
        f"{together / GIB:.2f}",
        f"{sum(each.times for each in permutes)}",
        f"{sum(each.times for each in permutes if each.is_beside)}",
        f"{received(found, 'collective-permute') / MIB:.1f}",
        f"{received(found, 'all-reduce', 'reduce-scatter') / MIB:.1f}",
        f"{received(found, 'all-gather', 'all-to-all') / MIB:.1f}",
        f"{seconds:.0f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="slice/tokens, such as v5e:16x16/16777216")
    for name, size in Sizes._field_defaults.items():
        if name != "remat":
            parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--no-remat", action="store_true", help="keep the layers' activations for the gradient")
    parser.add_argument("--fsdp", action="store_true", help="spread parameters and optimizer over all chips")
    parser.add_argument("--jax-order", action="store_true", help="order the chips as jax.make_mesh does")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the slice is described, not looked for
    sizes = Sizes(options.depth, options.dim, options.vocabulary, options.keys, not options.no_remat)
    print(f"jax {jax.__version__}, {time.strftime('%Y-%m-%d')}; {sizes}\n")
    print(header(COLUMNS), flush=True)
    for case in options.cases:
        topology, n = case.split("/")
        print(row(cells_of(topology, int(n), sizes, options)), flush=True)


if __name__ == "__main__":
    main()
