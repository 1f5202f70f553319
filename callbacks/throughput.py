"""How fast training goes, and how long it waits for its data."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl

if TYPE_CHECKING:
    from backtrack.data.batching import StepBatch
    from backtrack.data.module import StepLoader


class Throughput(pl.Callback):
    """Logs speed and waiting, both of this rank alone.

    `speed/tokens_per_s`: tokens of its rows, without padding. `data/wait_s`: seconds that a step
    waited for its batches, mean over the steps since the last log; `data.num_workers` lowers it.
    """

    def __init__(self, *, every_n_steps: int) -> None:
        """Log once in `every_n_steps` optimiser steps."""
        self.every_n_steps = every_n_steps
        self._tokens = 0
        self._since: float | None = None
        self._step = 0
        self._waited, self._waited_step = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the waiting from here."""
        self._waited, self._waited_step = 0.0, trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        """Start the clock at the first batch, and after every validation."""
        if self._since is None:
            self._since, self._tokens, self._step = time.perf_counter(), 0, trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Count, and log when enough steps went by. Reads no tensor, so nothing waits."""
        self._tokens += batch.forest.num_tokens
        if self._since is None or trainer.global_step - self._step < self.every_n_steps:
            return
        seconds = time.perf_counter() - self._since
        pl_module.log("speed/tokens_per_s", self._tokens / seconds, prog_bar=True)
        loader = cast("StepLoader", trainer.train_dataloader)
        waited = loader.waited
        num_steps = trainer.global_step - self._waited_step
        pl_module.log("data/wait_s", (waited - self._waited) / num_steps)
        self._waited, self._waited_step = waited, trainer.global_step
        self._since, self._tokens, self._step = time.perf_counter(), 0, trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock: validation is not training."""
        self._since = None
