"""How fast training goes, how much of the hardware that is, and how long it waits for its data."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch

from backtrack.callbacks.useful_work import Rates, operation_rates, useful_work

if TYPE_CHECKING:
    from torch import Tensor

    from backtrack.data.batching import StepBatch
    from backtrack.data.module import StepLoader
    from backtrack.modules.base import ForestModule

PEAK_FLOPS_PER_S = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
"""Dense bf16 by a part of the device's name, special names first (NVIDIA's data sheets)."""


class Throughput(pl.Callback):
    """Logs speed, memory and waiting, all of this rank alone. Reads no tensor, so nothing waits.

    `speed/tokens_per_s`: tokens of its rows, without padding. `speed/mfu`: useful operations
    (`useful_work`) over what the device could do in that time; absent where its peak is not known.
    `memory/peak_gib`: most memory held so far, of the GPU's tensors or of the process.
    `data/wait_s`: seconds that a step waited for its batches, mean over the steps since the last
    log; `data.num_workers` lowers it.
    """

    def __init__(self, *, every_n_steps: int, peak_flops_per_s: float | None) -> None:
        """Log once in `every_n_steps` optimiser steps.

        Args:
            every_n_steps: Optimiser steps between two logs.
            peak_flops_per_s: Operations a second that one device could do in the run's precision;
                None takes bf16 of a known GPU, and logs no MFU elsewhere.
        """
        self.every_n_steps, self.peak_flops_per_s = every_n_steps, peak_flops_per_s
        self._rates: Rates | None = None
        self._peak: float | None = None
        self._tokens = 0
        self._operations: Tensor | float = 0.0
        self._since: float | None = None
        self._step = 0
        self._waited, self._waited_step = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Count the waiting from here, and learn what a token costs."""
        self._waited, self._waited_step = 0.0, trainer.global_step
        self._peak = self.peak_flops_per_s or known_peak(trainer.strategy.root_device)
        self._rates = operation_rates(pl_module.model) if self._peak else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        """Start the clock at the first batch, and after every validation."""
        if self._since is None:
            self._start(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Count, and log when enough steps went by."""
        self._tokens += batch.forest.num_tokens
        if self._rates is not None:
            self._operations = self._operations + self._rates.operations(useful_work(batch.forest))
        if self._since is None or trainer.global_step - self._step < self.every_n_steps:
            return
        seconds = time.perf_counter() - self._since
        pl_module.log("speed/tokens_per_s", self._tokens / seconds, prog_bar=True)
        if self._peak is not None:
            pl_module.log("speed/mfu", self._operations / (seconds * self._peak))
        pl_module.log("memory/peak_gib", peak_gib(trainer.strategy.root_device))
        loader = cast("StepLoader", trainer.train_dataloader)
        num_steps = trainer.global_step - self._waited_step
        pl_module.log("data/wait_s", (loader.waited - self._waited) / num_steps)
        self._waited, self._waited_step = loader.waited, trainer.global_step
        self._start(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock: validation is not training."""
        self._since = None

    def on_safety_eval(self, trainer: pl.Trainer, safety: Any) -> None:
        """Stop the clock: nor is that."""
        self._since = None

    def _start(self, trainer: pl.Trainer) -> None:
        self._tokens, self._operations = 0, 0.0
        self._since, self._step = time.perf_counter(), trainer.global_step


def known_peak(device: torch.device) -> float | None:
    """Return the dense bf16 operations a second of a GPU in `PEAK_FLOPS_PER_S`; None elsewhere."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS_PER_S.items() if part in name), None)


def peak_gib(device: torch.device) -> float:
    """Return the most memory that tensors on a GPU have held, or else this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        # `ru_maxrss` of a rank would start from what the first rank held when it started the rank.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
