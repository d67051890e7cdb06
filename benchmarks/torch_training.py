"""The original's training step in PyTorch, as its users would speed it up: autocast, TF32, torch.compile."""

import statistics
import time

import torch
from local_attention import LocalTransformer

from benchmarks.training import CLIP_NORM, LEARNING_RATE, Setting


class OriginalTraining:
    """The original in training, with the interface of `Training`.

    Args:
        setting: Model and batches.
        dtype: Of autocast. "float32" means none; products are then in TF32 on a GPU.
        eager: Whether to leave torch.compile out.
        threads: CPUs to run on.
    """

    def __init__(self, setting: Setting, dtype: str, eager: bool, threads: int):
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high")  # allows TF32
        torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = LocalTransformer(**setting.fields).to(self.device)
        self.forward = self.model if eager else torch.compile(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.batch = torch.from_numpy(setting.random_batch()).long().to(self.device)
        self.autocast = {"dtype": getattr(torch, dtype), "enabled": dtype != "float32"}

    def run(self):
        """Take a step; the loss before it, which may not be computed yet."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device, **self.autocast):
            loss = self.forward(self.batch, return_loss=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        return loss.detach()

    def seconds(self, calls: int) -> float:
        """Time one step, of `calls` that are enqueued together."""
        begin = time.perf_counter()
        for _ in range(calls):
            self.run()
        self._wait()
        return (time.perf_counter() - begin) / calls

    def start(self) -> dict[str, float]:
        """Compile and take the first step: seconds of both, and of compiling alone, and the loss."""
        begin = time.perf_counter()
        loss = self.run().item()
        self._wait()
        first = time.perf_counter() - begin
        later = statistics.median(self.seconds(1) for _ in range(3))
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"first": first, "compile": max(first - later, 0), "loss": loss}

    def peak(self) -> int | None:
        """Most bytes allocated at once since the start; None where nobody counts them."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def _wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
