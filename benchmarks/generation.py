r"""How many tokens a second: ours beside the original, and the limit set by reading the weights once a token.

    python -m benchmarks.generation
    python -m benchmarks.generation --batches 1 16 --new 256 --rounds 5 --record generation.json
    python -m benchmarks.generation --batches 1 --new 64 256 1024 4096 --lengths
    python -m benchmarks.generation --dtype bfloat16 --dim 512 --depth 6 --window 256 --batches 1 16 128 --new 128 \
        --original-new 32 --rounds 3 --lengths 1000 100000 --threads 16        (on a GPU)

Runs on the CPU or on a GPU, whichever JAX finds. Both models have the same sizes; both sample from the likeliest tenth
of the tokens, the original's default. With `--dtype bfloat16` ours computes in bfloat16 from float32 parameters, and
the original runs under autocast. Programs are compiled before the first round; then both models take turns, so that
what disturbs the machine disturbs both. A rate counts the new tokens of all rows and includes the prompt in its time.
Times are medians; next to the ratio of medians is the ratio of the fastest rounds, since a busy machine slows threads
that wait for each other more. A model that has taken `--seconds` at a setting runs no further round of it.

The limit: each step must read every weight but the embeddings' once, in `--dtype`, whatever the batch. How fast the
machine reads so many bytes again and again is measured in the same rounds. The time of a token at each of `--lengths`
is measured in a compiled loop that continues from a cache after reading a text of that length.
"""

import argparse
import itertools
import os
import statistics
import time

from benchmarks import record
from benchmarks.machine import describe_machine, pin_threads, seconds_a_call
from benchmarks.tables import bullets, spread, table

RATE_COLUMNS = ["batch", "new tokens", "original, token/s", "ours, token/s", "ratio, of fastest rounds"]
RATE_COLUMNS += ["ours, ms/step", "limit", "reached"]
NUM_TOKENS = 256
FILTER_THRES = 0.9  # the original's default


class Ours:
    """Our model, in JAX."""

    def __init__(self, options, **fields):
        import jax
        import jax.numpy as jnp

        from flax_local_attention import LocalTransformer

        self.itemsize = jnp.dtype(options.dtype).itemsize
        dtype = None if options.dtype == "float32" else jnp.dtype(options.dtype)
        self.model = LocalTransformer(**sizes(options), dtype=dtype, **fields)
        self.variables = jax.jit(self.model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        self.rules = {"rng": jax.random.key(1), "top_k": max(1, int((1 - FILTER_THRES) * NUM_TOKENS))}

    def generate(self, prompt, new):
        import numpy as np

        from flax_local_attention import generate

        return np.asarray(generate(self.model, self.variables, prompt, new, **self.rules)[0])

    @property
    def weight_bytes(self):
        """Bytes that a step must read: all parameters but the embeddings, of which it reads one row."""
        import jax

        layers = {name: part for name, part in self.variables["params"].items() if not name.endswith("_emb")}
        return sum(x.size for x in jax.tree.leaves(layers)) * self.itemsize


class Decoding:
    """Our model in the middle of a text of one row, decoding greedily."""

    CHUNK, TAKEN = 500, 64

    def __init__(self, ours, text):
        import jax
        import jax.numpy as jnp

        def read(variables, cache, tokens):
            return ours.model.apply(variables, tokens, cache=cache)[1]

        def advance(variables, cache, token):
            def step(state, _):
                cache, token = state
                logits, cache = ours.model.apply(variables, token[:, None], cache=cache)
                return (cache, jnp.argmax(logits[:, 0], axis=-1)), None

            return jax.lax.scan(step, (cache, token), length=self.TAKEN)[0]

        self.variables = ours.variables
        self.advance = jax.jit(advance, donate_argnums=1)
        read, cache = jax.jit(read, donate_argnums=1), ours.model.init_cache(1)
        for start in range(0, text.shape[1], self.CHUNK):
            cache = read(self.variables, cache, text[:, start : start + self.CHUNK])
        self.state = cache, jnp.asarray(text[:, -1])
        self.seconds()  # compiles

    def seconds(self):
        """Time of one token, the mean over the next `TAKEN`."""
        import jax

        begin = time.perf_counter()
        self.state = jax.block_until_ready(self.advance(self.variables, *self.state))
        return (time.perf_counter() - begin) / self.TAKEN


class Original:
    """The original, in PyTorch, with the defaults of its `generate`, on a GPU if there is one."""

    def __init__(self, options):
        import torch
        from local_attention import LocalTransformer

        torch.manual_seed(0)
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = LocalTransformer(**sizes(options)).eval().to(self.device)
        self.autocast = {"dtype": getattr(torch, options.dtype), "enabled": options.dtype != "float32"}

    def generate(self, prompt, new):
        with self.torch.autocast(self.device, **self.autocast):
            return self.model.generate(self.torch.from_numpy(prompt).to(self.device), new).cpu().numpy()


class Reading:
    """How fast this machine reads a buffer again and again."""

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
        """Time of one reading, by the fastest way."""
        return min(seconds_a_call(run, inputs, self.CALLS) for run, inputs in self.ways.values())


def sizes(options):
    return {
        "num_tokens": NUM_TOKENS,
        "max_seq_len": options.prompt + max(options.new),
        "dim": options.dim,
        "depth": options.depth,
        "local_attn_window_size": options.window,
        "num_residual_streams": options.streams,
    }


def prompts(batch, length):
    import numpy as np

    return np.random.RandomState(0).randint(0, NUM_TOKENS, (batch, length))


def tokens_of(name, new, options):
    """Return how many tokens a model generates where `new` are asked for."""
    return options.original_new if name == "original" and options.original_new else new


def measure(options):
    """Return each round's seconds by model, batch and new tokens; those of reading the weights; and their bytes."""
    ours = Ours(options)
    models = {"ours": ours} | ({} if options.alone else {"original": Original(options)})
    reading = Reading(ours.weight_bytes)
    seconds = {(name, batch, new): [] for batch in options.batches for new in options.new for name in models}
    reads = []
    for name, batch, new in seconds:
        warm_up = new if name == "ours" else min(new, 8)  # ours compiles for the number of tokens
        models[name].generate(prompts(batch, options.prompt), warm_up)
    for _ in range(options.rounds):
        for (name, batch, new), times in seconds.items():
            if sum(times) > options.seconds:
                continue
            prompt, count = prompts(batch, options.prompt), tokens_of(name, new, options)
            time.sleep(0.05)  # the previous model's threads spin for a while, waiting for work
            begin = time.perf_counter()
            tokens = models[name].generate(prompt, count)
            times.append(time.perf_counter() - begin)
            assert tokens.shape == (batch, count)
        reads.append(reading.seconds())
    return seconds, reads, reading.bytes


def cost_by_length(options):
    """Seconds of a token after each of `--lengths`, per round, for a model without absolute position embeddings."""
    ours = Ours(options, use_abs_pos_emb=False)
    decodings = {length: Decoding(ours, prompts(1, length)) for length in options.lengths}
    times = {length: [] for length in decodings}
    for _ in range(max(options.rounds, 9)):  # the lengths take turns
        for length, decoding in decodings.items():
            times[length].append(decoding.seconds())
    return times


def rate_table(seconds, reads, size, options):
    """Return the table of tokens a second, with the slowest and fastest round in brackets."""
    limit = statistics.median(reads)
    rows = []
    for batch, new in itertools.product(options.batches, options.new):
        ours, theirs = seconds["ours", batch, new], seconds.get(("original", batch, new))
        median, count = statistics.median(ours), tokens_of("original", new, options)
        ratios = [] if theirs is None else [statistics.median(theirs) / median, min(theirs) / min(ours)]
        cells = [str(batch), f"{new:,}", _rate(theirs, batch * count), _rate(ours, batch * new)]
        cells += [", ".join(f"{new / count * ratio:.1f}" for ratio in ratios) or "-"]
        rows.append([*cells, f"{1e3 * median / new:.3f}", f"{1e3 * limit:.3f}", f"{limit / median * new:.0%}"])
    read = f"The limit is {size / 1e6:.1f} MB of weights read at {size / limit / 1e9:.1f} GB/s."
    return f"{table(RATE_COLUMNS, rows)}\n\n{read}"


def rows_of(seconds, times, options):
    """Yield the rows as they are recorded: tokens a second, and the time of a token far into a text."""
    for (name, batch, new), values in seconds.items():
        count = tokens_of(name, new, options)
        rates = [batch * count / s for s in values]
        yield {"form": name, "batch": batch, "prompt": options.prompt, "new": count, "tokens_per_second": rates}
    for length, values in times.items():
        yield {"form": "ours", "batch": 1, "tokens_before": length, "token_ms": [1e3 * s for s in values]}


def _rate(seconds, tokens):
    return "-" if seconds is None else spread([tokens / s for s in seconds], 0)


def length_table(times):
    """Return the table of the time of a token far into a text."""
    rows = [[str(length), spread([1e3 * s for s in seconds], 3)] for length, seconds in times.items()]
    return table(["tokens before", "ms a token, batch 1"], rows)


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", nargs="+", type=int, default=[256], help="tokens to generate")
    parser.add_argument("--original-new", type=int, help="tokens that the original generates, to spend less time on it")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of activations")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--streams", type=int, default=4, help="residual streams")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which times are medians")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="no further round of a model and setting after these"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPUs to run on")
    parser.add_argument(
        "--lengths", nargs="*", type=int, default=[1000, 20000], help="lengths of text after which to time a token"
    )
    parser.add_argument("--alone", action="store_true", help="skip the original")
    record.add_option(parser)
    return parser.parse_args()


def main():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of a GPU's memory too
    options = read_options()
    threads = pin_threads(options.threads)
    import jax

    facts = describe_machine(jax.default_backend(), threads)
    print(bullets(facts))
    sizes_text = ", ".join(f"{name} {value}" for name, value in sizes(options).items())
    print(f"\n{sizes_text}; {options.dtype}")
    print(f"prompt {options.prompt}, {options.rounds} rounds\n")
    seconds, reads, size = measure(options)
    print(rate_table(seconds, reads, size, options), flush=True)
    times = {}
    if options.lengths:
        times = cost_by_length(options)
        print("\n" + length_table(times))
    if options.record:
        facts |= {"model": f"{sizes_text}; {options.dtype}", "reading_weights_ms": 1e3 * statistics.median(reads)}
        record.save(options.record, facts, list(rows_of(seconds, times, options)))


if __name__ == "__main__":
    main()
