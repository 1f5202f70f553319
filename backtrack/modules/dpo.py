"""Direct preference optimisation on forests, with and without backtracking pairs."""

from __future__ import annotations

import copy
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from backtrack.backbone import backbone_and_head
from backtrack.head_loss import ChunkedHead
from backtrack.logps import path_logps
from backtrack.losses import PREFERENCE_LOSSES, PairLogps, rewards
from backtrack.modules.base import ForestModule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from backtrack.data.batching import StepBatch
    from backtrack.data.forest import Forest


class DPOSettings(NamedTuple):
    """The loss, from `conf/objective/dpo.yaml`: a key of `PREFERENCE_LOSSES` and its parameters."""

    loss: str
    beta: float
    label_smoothing: float
    keeps_reference: bool = False
    """Whether the reference is a frozen model beside the trained one."""


EVERY = slice(None)


def pair_logps(
    forest: Forest, logps: Tensor, reference: Tensor, *, edges: slice = EVERY, some: slice = EVERY
) -> PairLogps:
    """Return the branch log-probs of some pairs of a forest, (N,) each.

    Args:
        forest: With pairs.
        logps: Of the edges `edges`, which hold all edges of the pairs `some`.
        reference: (P,) branch log-probs of the reference.
        edges: All, unless given.
        some: All, unless given.
    """
    policy = path_logps(logps, forest.paths[edges], forest.num_paths)
    chosen, rejected = forest.pairs[some].unbind(1)
    return PairLogps(policy[chosen], policy[rejected], reference[chosen], reference[rejected])


class DPOModule(ForestModule):
    """DPO over pairs of branches (Rafailov et al. 2023; pairs: docs/paper_map.md).

    The reference's log-probs come with the batch (`objective.reference=precomputed`), from a frozen
    copy of the model (`model`; spread over the ranks where the model is), or else from the same
    model with its LoRA adapter disabled (`adapter`).
    """

    reference: PreTrainedModel
    reference_head: ChunkedHead

    def __init__(self, model: Any, *, settings: DPOSettings, **shared: Any) -> None:
        """Wrap `model`; `shared` is what `ForestModule` takes."""
        super().__init__(model, **shared)
        self.settings = settings
        if model is not None and settings.keeps_reference:
            self._keep_reference(copy.deepcopy(model))

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch, scaled for the step."""
        sums = self.loss_sums(batch)
        self.add_to_step({**sums, "loss": sums["loss"] / batch.total_weight})
        return self.scaled(sums["loss"], batch)

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Add one share of the validation set to `val/loss` and `val/accuracies`."""
        sums = self.loss_sums(batch)
        for name, value in (("val/loss", sums["loss"]), ("val/accuracies", sums["accuracies"])):
            self.log(
                name,
                value / batch.total_weight,
                reduce_fx="sum",
                sync_dist=True,
                prog_bar=True,
                on_epoch=True,
                batch_size=1,
            )

    def reference_logps(self, batch: StepBatch) -> Tensor:
        """Return the branch log-probs of the reference: (P,) in nats."""
        if batch.reference_logps is not None:
            return batch.reference_logps
        if self.settings.keeps_reference:
            return self.frozen_logps(batch)
        return self.adapterless_logps(batch)

    def make_parts(self, make: Callable[[], PreTrainedModel]) -> None:
        """Make the model, and the reference where it is one of its own."""
        super().make_parts(make)
        if self.settings.keeps_reference:
            self._keep_reference(make())

    def _keep_reference(self, model: PreTrainedModel) -> None:
        self.reference = model.requires_grad_(False)
        self.reference_head = ChunkedHead(backbone_and_head(model).head)

    def frozen_logps(self, batch: StepBatch) -> Tensor:
        """Return the branch log-probs of the frozen reference: (P,), no gradient, no dropout."""
        forest = batch.forest
        was_training = self.reference.training
        self.reference.train(False)
        with torch.no_grad():
            logps = self.logps_of(forest, self.reference, self.reference_head)
        self.reference.train(was_training)
        return path_logps(logps, forest.paths, forest.num_paths)

    def adapterless_logps(self, batch: StepBatch) -> Tensor:
        """Return the branch log-probs with the LoRA adapter off: (P,), no gradient, no dropout."""
        forest, model = batch.forest, cast("PeftModel", self.model)
        was_training = self.training
        self.eval()
        with torch.no_grad(), model.disable_adapter():
            logps = path_logps(self.logps_of(forest), forest.paths, forest.num_paths)
        self.train(was_training)
        return logps

    def loss_sums(self, batch: StepBatch) -> dict[str, Tensor]:
        """Return the summed loss of a batch, and the weighted sums that logging needs."""
        forest, reference = batch.forest, self.reference_logps(batch)
        weights, beta = forest.pair_weights, self.settings.beta

        def loss_of(logps: Tensor, edges: slice) -> Tensor:
            some = slice(
                *(bisect_right(forest.pair_ends, end) for end in (edges.start, edges.stop))
            )
            pairs = pair_logps(forest, logps, reference, edges=edges, some=some)
            losses = PREFERENCE_LOSSES[self.settings.loss](
                pairs, beta=beta, label_smoothing=self.settings.label_smoothing
            )
            return (losses * weights[some]).sum()

        loss, edges = self.forest_loss(forest, ends=forest.pair_ends, loss=loss_of)
        pairs = pair_logps(forest, edges, reference)
        with torch.no_grad():
            reward = rewards(pairs, beta=beta)
            # [RESET] where it is chosen: after unsafe prefixes (`reset_monitor` has safe ones too).
            is_chosen = torch.isin(forest.paths, forest.pairs[:, 0])
            elicited = (forest.targets == self.reset_token_id) & is_chosen
        return {
            "loss": loss,
            "weight": weights.sum(),
            "chosen_rewards": (reward.chosen * weights).sum(),
            "rejected_rewards": (reward.rejected * weights).sum(),
            "accuracies": ((reward.chosen > reward.rejected) * weights).sum(),
            "chosen_logps": (pairs.policy_chosen * weights).sum(),
            "rejected_logps": (pairs.policy_rejected * weights).sum(),
            "reset_probability": (edges.exp() * elicited).sum(),
            "num_resets": elicited.sum().float(),
        }

    def log_step(self, sums: Mapping[str, Tensor]) -> None:
        """Log loss, rewards, margins, branch log-probs, and [RESET] where it should be elicited."""
        self.log("train/loss", sums["loss"], prog_bar=True)
        for name in ("chosen", "rejected"):
            self.log(f"rewards/{name}", self.ratio(sums, f"{name}_rewards", "weight"))
            self.log(f"logps/{name}_branch", self.ratio(sums, f"{name}_logps", "weight"))
        margin = {**sums, "margin": sums["chosen_rewards"] - sums["rejected_rewards"]}
        self.log("rewards/margins", self.ratio(margin, "margin", "weight"), prog_bar=True)
        self.log("rewards/accuracies", self.ratio(sums, "accuracies", "weight"), prog_bar=True)
        self.log("reset/probability", self.ratio(sums, "reset_probability", "num_resets"))
