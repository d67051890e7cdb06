"""How many tokens a second: ours beside the original, and the limit of reading the weights once a token.

    python -m benchmarks.generation
    python -m benchmarks.generation --batches 1 16 --new 256 --rounds 5 --json generation.json

Both models have the same sizes; both draw from the likeliest tenth of the tokens, as the original does by
default. Programs are compiled before the first round; then all take turns, so that what disturbs the machine
disturbs them alike. A rate counts the new tokens of all rows, prefill included. Times are medians; beside their
ratio stands that of the fastest rounds, since threads that wait for each other suffer more on a busy machine.

The limit: each step must read every weight but the embeddings' once, whatever the batch; how fast the machine
reads so many bytes again and again is measured in the same rounds.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

from benchmarks.machine import describe_machine, pin_threads, seconds_a_call

NUM_TOKENS = 256
FILTER_THRES = 0.9  # the original's default


class Ours:
    """Our model, in JAX."""

    def __init__(self, options, **fields):
        import jax
        import jax.numpy as jnp

        from flax_local_attention import LocalTransformer

        self.model = LocalTransformer(**sizes(options), **fields)
        self.variables = jax.jit(self.model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        self.rules = {"rng": jax.random.key(1), "top_k": max(1, int((1 - FILTER_THRES) * NUM_TOKENS))}

    def generate(self, prompt, new):
        import numpy as np

        from flax_local_attention import generate

        return np.asarray(generate(self.model, self.variables, prompt, new, **self.rules)[0])

    def stream(self, prompt, new):
        from flax_local_attention import stream

        return stream(self.model, self.variables, prompt, new, **self.rules)

    @property
    def weight_bytes(self):
        """Bytes that a step reads whole: all parameters but the embeddings, of which it takes a row."""
        import jax

        layers = {name: part for name, part in self.variables["params"].items() if not name.endswith("_emb")}
        return sum(x.nbytes for x in jax.tree.leaves(layers))


class Original:
    """The original, in PyTorch, with the defaults of its `generate`."""

    def __init__(self, options):
        import torch
        from local_attention import LocalTransformer

        torch.manual_seed(0)
        self.torch = torch
        self.model = LocalTransformer(**sizes(options)).eval()

    def generate(self, prompt, new):
        return self.model.generate(self.torch.from_numpy(prompt), new).numpy()


class Reading:
    """How fast this machine reads a buffer of some bytes, again and again."""

    CALLS = 30

    def __init__(self, size):
        import jax
        import jax.numpy as jnp

        rows = size // (4 * 1024)
        self.bytes = rows * 4 * 1024
        matrix, vector = jnp.ones((rows, 1024)), jnp.ones(1024)
        self.ways = {
            "sum": (jax.jit(jnp.sum), (matrix,)),
            "matrix times vector": (jax.jit(jnp.matmul), (matrix, vector)),
            "vector times matrix": (jax.jit(lambda x, y: y @ x), (matrix, jnp.ones(rows))),
        }

    def seconds(self):
        """Time of one reading, in the fastest way."""
        return min(seconds_a_call(*way, self.CALLS) for way in self.ways.values())


def sizes(options):
    return {
        "num_tokens": NUM_TOKENS,
        "max_seq_len": options.prompt + options.new,
        "dim": options.dim,
        "depth": options.depth,
        "local_attn_window_size": options.window,
        "num_residual_streams": options.streams,
    }


def prompts(batch, options):
    import numpy as np

    return np.random.RandomState(0).randint(0, NUM_TOKENS, (batch, options.prompt))


def measure(options):
    """Seconds of every round: of each model at each batch, and of reading the weights."""
    models = {"ours": Ours(options)} | ({} if options.alone else {"original": Original(options)})
    reading = Reading(models["ours"].weight_bytes)
    seconds = {(name, batch): [] for batch in options.batches for name in models}
    reads = []
    for name, batch in seconds:  # compile and warm up
        models[name].generate(prompts(batch, options), options.new)
    for _ in range(options.rounds):
        for name, batch in seconds:
            prompt = prompts(batch, options)
            time.sleep(0.05)  # threads of the model before spin a while for more work
            begin = time.perf_counter()
            tokens = models[name].generate(prompt, options.new)
            seconds[name, batch].append(time.perf_counter() - begin)
            assert tokens.shape == (batch, options.new)
        reads.append(reading.seconds())
    return seconds, reads, reading.bytes


def cost_by_length(options):
    """Median seconds of a token at each of `--lengths`, of a model without absolute embedding."""
    ours = Ours(options, use_abs_pos_emb=False)
    prompt, taken = prompts(1, options), 40
    streams = {length: ours.stream(prompt, 10**9) for length in options.lengths}
    for length, tokens in streams.items():
        next(itertools.islice(tokens, length - options.prompt, None))
    times = {length: [] for length in streams}
    for _ in range(max(options.rounds, 9)):  # the streams take turns
        for length, tokens in streams.items():
            begin = time.perf_counter()
            next(itertools.islice(tokens, taken - 1, None))
            times[length].append((time.perf_counter() - begin) / taken)
    return times


def rate_table(seconds, reads, size, options):
    """Markdown table of tokens a second; in brackets the slowest and fastest round."""
    limit = statistics.median(reads)
    lines = [
        "| batch | original, token/s | ours, token/s | ratio, of fastest rounds | ours, ms/step | limit | reached |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for batch in options.batches:
        ours, theirs = seconds["ours", batch], seconds.get(("original", batch))
        median = statistics.median(ours)
        step = median / options.new
        ratios = "-" if theirs is None else f"{statistics.median(theirs) / median:.1f}, {min(theirs) / min(ours):.1f}"
        cells = [str(batch), _rate(theirs, batch, options), _rate(ours, batch, options), ratios]
        cells += [f"{1e3 * step:.3f}", f"{1e3 * limit:.3f}", f"{limit / step:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"\nThe limit is {size / 1e6:.1f} MB of weights read at {size / limit / 1e9:.1f} GB/s.")
    return "\n".join(lines)


def _rate(seconds, batch, options):
    if seconds is None:
        return "-"
    rates = [batch * options.new / s for s in seconds]
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


def length_table(times):
    """Markdown table of the time of a token far into a text."""
    lines = ["| tokens before | ms a token, streamed one by one |", "| --- | --- |"]
    for length, seconds in times.items():
        low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
        lines.append(f"| {length} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join(lines)


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens to begin with")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--streams", type=int, default=4, help="residual streams")
    parser.add_argument("--rounds", type=int, default=5, help="a time is the median over them")
    parser.add_argument("--threads", type=int, default=2, help="CPUs to run on")
    parser.add_argument("--lengths", nargs="*", type=int, default=[1000, 20000], help="where to time one more token")
    parser.add_argument("--alone", action="store_true", help="without the original")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def main():
    options = read_options()
    threads = pin_threads(options.threads)
    facts = describe_machine("cpu", threads)
    for name, fact in facts.items():
        print(f"* {name}: {fact}")
    sizes_text = ", ".join(f"{name} {value}" for name, value in sizes(options).items())
    print(f"\n{sizes_text}; prompt {options.prompt}, {options.new} new tokens, {options.rounds} rounds\n")
    seconds, reads, size = measure(options)
    print(rate_table(seconds, reads, size, options), flush=True)
    times = {}
    if options.lengths:
        times = cost_by_length(options)
        print("\n" + length_table(times))
    if options.json:
        rounds = {f"{name} batch {batch}": values for (name, batch), values in seconds.items()}
        figures = {"machine": facts, "seconds": rounds, "reading": reads, "seconds by length": times}
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
