"""The original's training step in PyTorch, sped up as its users would: autocast, TF32 and torch.compile."""

import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from local_attention import LocalTransformer

from benchmarks.training import CLIP_NORM, LEARNING_RATE, Setting


def original_model(fields: Mapping[str, Any]) -> LocalTransformer:
    """Return the original's model with the arguments `fields`, and the same weights each time."""
    torch.manual_seed(0)
    random.seed(0)  # hyper-connections draws a branch's first stream from Python's generator
    return LocalTransformer(**fields)


class OriginalTraining:
    """The original in training, with the interface of `Training`.

    Args:
        model: The original's `LocalTransformer`, on its device.
        batch: Tokens ``[b, n + 1]`` that `start` and `seconds` train on.
        dtype: Dtype of autocast; "float32" means none.
        eager: Whether to skip torch.compile.
    """

    def __init__(self, model: Any, batch: np.ndarray, dtype: str = "float32", eager: bool = True):
        self.model, self.device = model, next(model.parameters()).device.type
        self.forward = model if eager else torch.compile(model)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.clip_norm = CLIP_NORM
        self.batch = self.place(batch)
        self.autocast = {"dtype": getattr(torch, dtype), "enabled": dtype != "float32"}
        self.parts = {"loss": torch.no_grad()(self.loss), "gradient": self.gradient, "step": self.run}

    @classmethod
    def fresh(cls, setting: Setting, dtype: str, eager: bool, threads: int) -> "OriginalTraining":
        """Start on random tokens, on a GPU if there is one, where products may use TF32."""
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high")  # allows TF32
        torch.backends.cudnn.allow_tf32 = True
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(original_model(setting.fields).to(device), setting.random_batch(), dtype, eager)

    def place(self, tokens: np.ndarray) -> torch.Tensor:
        """Return a batch as `run` takes it."""
        return torch.from_numpy(tokens).long().to(self.device)

    def loss(self, batch):
        """Return the mean nats of a batch."""
        with torch.autocast(self.device, **self.autocast):
            return self.forward(batch, return_loss=True)

    def gradient(self, batch):
        """Compute the gradients of a batch, which the parameters keep, and return the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def run(self, batch):
        """Take a step; return the loss before it, which may not be computed yet."""
        loss = self.gradient(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss

    def seconds(self, calls: int, part: str = "step") -> float:
        """Time one step or a part of it: the mean over `calls` that are enqueued together."""
        begin = time.perf_counter()
        for _ in range(calls):
            self.parts[part](self.batch)
        self._wait()
        return (time.perf_counter() - begin) / calls

    def start(self) -> dict[str, float]:
        """Compile and take the first step; return the seconds of both, those of compiling alone, and the loss."""
        begin = time.perf_counter()
        loss = self.run(self.batch).item()
        self._wait()
        first = time.perf_counter() - begin
        later = statistics.median(self.seconds(1) for _ in range(3))
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"first": first, "compile": max(first - later, 0), "loss": loss}

    def peak(self) -> int | None:
        """Return the most bytes allocated at once since the start; None where nothing counts them."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def _wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
