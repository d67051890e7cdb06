"""The training step of these benchmarks: sizes, batches, and Adam behind a clip."""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np

from benchmarks.machine import seconds_a_call

NUM_TOKENS = 256
LEARNING_RATE = 2e-4
CLIP_NORM = 0.5


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of a model and its batches; the rest is the original's default (8 heads of 64, exact causal windows)."""

    dim: int
    depth: int
    window_size: int
    tokens: int
    batch_size: int
    streams: int

    def __str__(self):
        return f"{self.sizes}, {self.streams} residual stream{'s' if self.streams > 1 else ''}"

    @property
    def sizes(self) -> str:
        """Sizes without the streams, in words."""
        return (
            f"dim {self.dim}, depth {self.depth}, window {self.window_size}, {self.batch_size} x {self.tokens} tokens"
        )

    @property
    def fields(self) -> dict[str, Any]:
        """Arguments of a `LocalTransformer`, the original's or ours."""
        return {
            "num_tokens": NUM_TOKENS,
            "max_seq_len": self.tokens,
            "dim": self.dim,
            "depth": self.depth,
            "local_attn_window_size": self.window_size,
            "num_residual_streams": self.streams,
        }

    def batch(self, data: np.ndarray, step: int) -> np.ndarray:
        """Draw the tokens of one step from data, ``[b, n + 1]``."""
        starts = np.random.default_rng([0, step]).integers(0, len(data) - self.tokens, (self.batch_size, 1))
        return data[starts + np.arange(self.tokens + 1)].astype(np.int32)

    def random_batch(self) -> np.ndarray:
        """Draw random tokens, ``[b, n + 1]``, the same in every process."""
        size = self.batch_size, self.tokens + 1
        return np.random.default_rng(0).integers(0, NUM_TOKENS, size).astype(np.int32)


def add_setting_options(parser: argparse.ArgumentParser):
    """Add the options that choose a `Setting` and a model; `setting_of` and `fields_of` read them."""
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--scan-layers", action="store_true", help="run our layers in one loop, if this version can")


def setting_of(options: argparse.Namespace, streams: int) -> Setting:
    return Setting(options.dim, options.depth, options.window, options.tokens, options.batch, streams)


def fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return more fields of our model; end the program if this version has no such field."""
    from flax_local_attention import LocalTransformer

    fields = {"scan_layers": True} if options.scan_layers else {}
    unknown = fields.keys() - {field.name for field in dataclasses.fields(LocalTransformer)}
    if unknown:
        raise SystemExit(f"This version's LocalTransformer has no field {', '.join(unknown)}; leave the option out.")
    return fields


def build_model(setting: Setting, dtype: str, fields: dict[str, Any]):
    """Return our model.

    Args:
        setting: Its sizes.
        dtype: Dtype of activations; parameters are float32. "float32" leaves products to the backend's default
            precision.
        fields: More of the model's fields.
    """
    import jax.numpy as jnp

    from flax_local_attention import LocalTransformer

    return LocalTransformer(**setting.fields, dtype=None if dtype == "float32" else jnp.dtype(dtype), **fields)


class Training:
    """Our model in training, with forward, backward, clip and update in one program.

    Args:
        model: A `LocalTransformer`.
        params: Its parameters, in float32.
        batch: Tokens ``[b, n + 1]`` whose shape is compiled for, and that `start` and `seconds` train on.
        adam: Optimizer behind the clip.
    """

    def __init__(self, model: Any, params: Any, batch: np.ndarray, adam: Any):
        import jax
        import optax

        self.model, self.batch = model, self.place(batch)
        self.optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adam)
        self.state = params, jax.jit(self.optimizer.init)(params)
        self.compiled: Any = None
        forward, gradient = jax.jit(self.loss), jax.jit(jax.value_and_grad(self.loss))
        self.parts = {
            "loss": lambda batch: forward(self.state[0], batch),
            "gradient": lambda batch: gradient(self.state[0], batch),
            "step": self.run,
        }

    @classmethod
    def fresh(cls, setting: Setting, dtype: str, fields: dict[str, Any]) -> "Training":
        """Start with random parameters on random tokens."""
        import jax
        import optax

        model, batch = build_model(setting, dtype, fields), setting.random_batch()
        params = jax.jit(model.init)(jax.random.key(0), batch[:1, : setting.window_size])["params"]
        return cls(model, params, batch, optax.adam(LEARNING_RATE))

    def place(self, tokens: np.ndarray):
        """Return a batch as `run` takes it."""
        import jax.numpy as jnp

        return jnp.asarray(tokens)

    def loss(self, params, batch):
        """Return the mean nats of a batch."""
        return self.model.apply({"params": params}, batch, return_loss=True)

    def step(self, state, batch):
        """Train on a batch; return the new state and the loss before it."""
        import jax
        import optax

        params, moments = state
        loss, gradient = jax.value_and_grad(self.loss)(params, batch)
        with jax.named_scope("optimizer"):
            updates, moments = self.optimizer.update(gradient, moments, params)
            params = optax.apply_updates(params, updates)
        return (params, moments), loss

    def compile(self):
        """Compile the step that `run` takes."""
        import jax

        self.compiled = jax.jit(self.step, donate_argnums=0).lower(self.state, self.batch).compile()
        return self.compiled

    def run(self, batch):
        """Take a step; return the loss before it, which may not be computed yet."""
        self.state, loss = self.compiled(self.state, batch)
        return loss

    def seconds(self, calls: int, part: str = "step") -> float:
        """Time one step or a part of it: the mean over `calls` that are enqueued together."""
        return seconds_a_call(self.parts[part], (self.batch,), calls)

    def start(self) -> dict[str, float]:
        """Compile and take the first step; return the seconds of both, those of compiling alone, and the loss."""
        begin = time.perf_counter()
        self.compile()
        compiled = time.perf_counter() - begin
        loss = float(self.run(self.batch))
        return {"first": time.perf_counter() - begin, "compile": compiled, "loss": loss}

    def peak(self) -> int | None:
        """Return the most bytes allocated at once since the process started; None where nothing counts them."""
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def reserved(self) -> int:
        """Return the bytes that XLA reserves for a step, arguments included."""
        memory = self.compiled.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes  # donated arguments count once
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + results
