"""Supervised fine-tuning on forests: Eq. 1 of Zhang et al. 2025 (arXiv 2409.14586)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from backtrack.losses import weighted_nll
from backtrack.modules.base import ForestModule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from backtrack.data.batching import StepBatch


class SFTModule(ForestModule):
    """Negative log-likelihood of weighted edges, divided by the weight of the whole step."""

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch, scaled for the step."""
        sums = self.loss_sums(batch)
        self.add_to_step(
            {
                name: value / batch.total_weight if name == "loss" else value
                for name, value in sums.items()
            }
        )
        return self.scaled(sums["loss"], batch)

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Add one share of the validation set to `val/loss`."""
        sums = self.loss_sums(batch)
        self.log(
            "val/loss",
            sums["loss"] / batch.total_weight,
            reduce_fx="sum",
            sync_dist=True,
            prog_bar=True,
            on_epoch=True,
            batch_size=1,
        )

    def loss_sums(self, batch: StepBatch) -> dict[str, Tensor]:
        """Return the summed loss of a batch, and the sums that logging needs."""
        forest = batch.forest
        loss, logps = self.forest_loss(
            forest,
            ends=range(1, len(forest.targets) + 1),
            loss=lambda logps, edges: weighted_nll(logps, forest.weights[edges]),
        )
        with torch.no_grad():
            is_reset = forest.targets == self.reset_token_id
            resets = (logps.exp() * is_reset).sum()
        return {
            "loss": loss,
            "reset_probability": resets,
            "num_resets": is_reset.sum().float(),
        }

    def log_step(self, sums: Mapping[str, Tensor]) -> None:
        """Log loss and the mean probability of [RESET] where it is the target."""
        self.log("train/loss", sums["loss"], prog_bar=True)
        self.log("reset/probability", self.ratio(sums, "reset_probability", "num_resets"))
