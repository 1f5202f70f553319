"""What SFT and DPO share: the forward pass over a forest, the optimiser, the checkpoint.

Legend: B rows, T tokens, E edges, P paths.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import lightning.pytorch as pl
import numpy as np
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import get_cosine_schedule_with_warmup

from backtrack.backbone import backbone_and_head, tree_attention_mask
from backtrack.data.forest import Forest, attention_allowed, is_causal
from backtrack.flex import flex_masks
from backtrack.head_loss import ChunkedHead
from backtrack.models import model_identity
from backtrack.sharding import is_sharded, register_foreign_weights, whole_shape
from backtrack.tree_attention import attends_by_tree, flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from backtrack.data.batching import StepBatch
    from backtrack.head_loss import GroupLoss


RESET_ROW = "trainable_tokens_delta"
"""In the name of a parameter that holds the row of [RESET] alone (peft)."""


ENTRIES = ("training_step", "validation_step", "forest_logps", "logits_of")
"""Methods that use weights and are called from outside; none of them calls another."""


class Assembly(NamedTuple):
    """What is done to a module once its ranks know each other.

    Attributes:
        make: Returns the model, where it was not given.
        shard: Spreads the weights of the module.
        on_start: Called before training, and before a checkpoint is read, on every rank.
        whole: Returns a whole model like the one that is trained, as the run began, in host memory.
    """

    whole: Callable[[], PreTrainedModel]
    make: Callable[[], PreTrainedModel] | None = None
    shard: Callable[[ForestModule], None] | None = None
    on_start: Callable[[ForestModule], None] | None = None


class OptimizerSettings(NamedTuple):
    """AdamW and its schedule, from `conf/optimizer`.

    Attributes:
        learning_rate: Peak.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of matrices; vectors (norms, biases) are not decayed.
        warmup_fraction: Share of the steps over which the rate rises from 0.
        reset_row_learning_rate: Peak for the row of [RESET] under LoRA, where it is a parameter of
            its own; None takes `learning_rate`. The row starts as the mean of all others, far from
            where any token is predicted, so it has a longer way to go than an adapter.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_fraction: float
    reset_row_learning_rate: float | None


class ForestModule(pl.LightningModule):
    """A causal language model that is trained on forests.

    Subclasses add the loss of a batch; everything that a step of either objective needs is here.
    """

    model: PreTrainedModel
    head: ChunkedHead

    def __init__(
        self,
        model: PreTrainedModel | None,
        *,
        optimizer: OptimizerSettings,
        num_steps: int,
        chunk_size: int,
        reset_token_id: int,
        seed: int = 0,
        assembly: Assembly | None = None,
    ) -> None:
        """Wrap `model`.

        Args:
            model: A causal language model whose vocabulary has [RESET]; may carry LoRA. None: it
                is made once the ranks know each other, by `assembly`.
            optimizer: See `OptimizerSettings`.
            num_steps: Optimiser steps of the run (the schedule ends there).
            chunk_size: Edges per pass through the output head.
            reset_token_id: Id of [RESET], for logging.
            seed: Of what is random in a step (dropout).
            assembly: How the model is made and cut where its weights are spread over ranks.
        """
        super().__init__()
        self.assembly = assembly
        if model is not None:
            self._adopt(model)
        self.optimizer_settings = optimizer
        self.num_steps = num_steps
        self.chunk_size = chunk_size
        self.reset_token_id = reset_token_id
        self.seed = seed
        self.strict_loading = False  # frozen weights are in no checkpoint, see on_save_checkpoint
        self._sums: dict[str, Tensor] = {}
        self._is_last_micro = True

    def _adopt(self, model: PreTrainedModel) -> None:
        self.model = model
        self.head = ChunkedHead(backbone_and_head(model).head)

    def configure_model(self) -> None:
        """Make the model, or spread its weights, where that takes all ranks. Idempotent."""
        if self.assembly is None:
            return
        if self.assembly.make is not None and getattr(self, "model", None) is None:
            self.make_parts(self.assembly.make)
        if self.assembly.shard is not None and not is_sharded(self.model):
            self.assembly.shard(self)

    def make_parts(self, make: Callable[[], PreTrainedModel]) -> None:
        """Make the model by `make`, which gives another one like it at each call."""
        self._adopt(make())

    def on_fit_start(self) -> None:
        """Tell ZeRO-3 who uses whose weights, then let `assembly` do what comes first."""
        for module in self.modules():
            if isinstance(module, ChunkedHead):
                register_foreign_weights(module, module.head.parameters())
            if isinstance(module, TrainableTokensLayer):  # its rows lie in a ParameterDict
                register_foreign_weights(module, module.trainable_tokens_delta.parameters())
        if self.assembly is not None and self.assembly.on_start is not None:
            self.assembly.on_start(self)

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        """Let what is random follow from seed, step, micro-batch and rank alone.

        So a resumed run draws as an undisturbed one, without any state in a checkpoint.
        """
        num_micro = self.trainer.accumulate_grad_batches
        micro = batch_idx % num_micro
        self._is_last_micro = micro == num_micro - 1
        words = (self.seed, batch.step, micro, self.trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))

    def hidden_states(self, forest: Forest, model: PreTrainedModel) -> Tensor:
        """Return the hidden states of the edges' predictors under `model`: (E, D)."""
        backbone, config = backbone_and_head(model).backbone, model.config
        if attends_by_tree(config) and not is_causal(forest):
            flat = flatten(forest, config)
            output = backbone(
                input_ids=flat.input_ids,
                position_ids=flat.position_ids,
                attention_mask=flat.masks,
                use_cache=False,
            )
            return cast("Tensor", output.last_hidden_state)[0, flat.predictors]
        mask: Any
        if is_causal(forest):
            mask = (forest.segment_ids >= 0).long()
            mask[:, 0] = 1  # rows of an empty share are all padding, but must attend to something
        elif config._attn_implementation == "flex_attention":
            mask = flex_masks(forest, config)
        else:
            mask = tree_attention_mask(config, attention_allowed(forest), forest.position_ids)
        output = backbone(
            input_ids=forest.input_ids,
            position_ids=forest.position_ids,
            attention_mask=mask,
            use_cache=False,
        )
        return cast("Tensor", output.last_hidden_state).flatten(0, 1)[forest.predictors]

    def forest_logps(self, forest: Forest) -> Tensor:
        """Return the log-probability of each edge of a forest: (E,) in nats, fp32.

        For callers from outside; steps of this module go by `logps_of` (see `ENTRIES`).
        """
        return self.logps_of(forest)

    def logits_of(self, **inputs: Any) -> Any:
        """Return what the model says to `inputs`, for callers from outside that decode."""
        return self.model(**inputs)

    def logps_of(
        self,
        forest: Forest,
        model: PreTrainedModel | None = None,
        head: ChunkedHead | None = None,
    ) -> Tensor:
        """Return what `forest_logps` does, within a step; of another model where it is given."""
        model, head = model or self.model, head or self.head
        states, softcap = self.hidden_states(forest, model), backbone_and_head(model).softcap
        _, logps = head(states, forest.targets, softcap=softcap, chunk_size=self.chunk_size)
        return cast("Tensor", logps)

    def forest_loss(
        self, forest: Forest, *, ends: Sequence[int], loss: GroupLoss
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss over groups of edges, and the log-probs without gradient: (E,).

        Args:
            forest: Of one micro-batch.
            ends: End of each group of edges, see `head_loss`.
            loss: Of some consecutive groups.
        """
        if not torch.is_grad_enabled():
            logps = self.logps_of(forest)
            return loss(logps, slice(0, len(logps))), logps
        softcap = backbone_and_head(self.model).softcap
        found = self.head(
            self.hidden_states(forest, self.model),
            forest.targets,
            softcap=softcap,
            ends=ends,
            chunk_size=self.chunk_size,
            loss=loss,
        )
        return cast("tuple[Tensor, Tensor]", found)

    def scaled(self, loss_sum: Tensor, batch: StepBatch) -> Tensor:
        """Return what to call backward on, so that the step's gradient is that of sum / total.

        Lightning divides by the micro-batches of a step and DDP by the ranks; `num_shares` undoes
        both.
        """
        return loss_sum * (batch.num_shares / batch.total_weight)

    def add_to_step(self, sums: Mapping[str, Tensor]) -> None:
        """Add detached sums of a micro-batch to what the step will log. No synchronisation."""
        for name, value in sums.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    @abstractmethod
    def log_step(self, sums: Mapping[str, Tensor]) -> None:
        """Log the finished step from its summed parts; subclasses give the names."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log once a step, after its last micro-batch; under DeepSpeed this comes after each."""
        if not self._is_last_micro:
            return
        sums, self._sums = self._sums, {}
        if self.trainer.world_size > 1:
            sums = {
                name: self.trainer.strategy.reduce(v, reduce_op="sum") for name, v in sums.items()
            }
        self.log_step(sums)

    def ratio(self, sums: Mapping[str, Tensor], part: str, whole: str) -> Tensor:
        """Return `part / whole`, 0 where nothing was counted."""
        return sums[part] / sums[whole].clamp(min=1e-12)

    def configure_optimizers(self) -> Any:
        """Return AdamW over what is trainable, with linear warm-up and cosine decay to zero."""
        settings = self.optimizer_settings
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        rows = [p for name, p in named if RESET_ROW in name]
        trainable = [p for name, p in named if RESET_ROW not in name]
        row_rate = settings.reset_row_learning_rate or settings.learning_rate
        groups: list[dict[str, Any]] = [
            {"params": rows, "weight_decay": 0.0, "lr": row_rate},
            {
                # Under ZeRO-3 a weight itself is flat.
                "params": [p for p in trainable if len(whole_shape(p)) >= 2],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in trainable if len(whole_shape(p)) < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        # Nothing is scaled in bf16; by this mark Lightning would refuse to clip under autocast.
        optimizer._step_supports_amp_scaling = False
        schedule = get_cosine_schedule_with_warmup(
            optimizer, round(settings.warmup_fraction * self.num_steps), self.num_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, and which model it belongs to.

        Frozen weights (the base under LoRA) come back from the model folder and are left out.
        """
        trained = {
            name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad
        }
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in trained
        }
        checkpoint["model_identity"] = model_identity(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make sure that the checkpoint is of this model.

        Raises:
            ValueError: If it was saved from another model.
        """
        check_identity(checkpoint, self.model)


def check_identity(checkpoint: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Raise unless `checkpoint` was saved from a model like `model`.

    Raises:
        ValueError: With what differs.
    """
    saved, here = checkpoint.get("model_identity"), model_identity(model)
    if saved == here:
        return
    keys = sorted({*here, *(saved or {})})
    # Weights that are spread over ranks are not read for a hash: then that is not compared.
    if saved is not None and None in (saved.get("frozen_weights"), here["frozen_weights"]):
        saved, here = ({**identity, "frozen_weights": None} for identity in (saved, here))
    if saved == here:
        return
    differs = [f"{k}: {(saved or {}).get(k)} there, {here.get(k)} here" for k in keys]
    differs = [
        line for line, k in zip(differs, keys, strict=True) if (saved or {}).get(k) != here.get(k)
    ]
    raise ValueError(
        "resume: this checkpoint is from another model ("
        + "; ".join(differs)
        + "); name the run that was made with this model, or resume=null to start anew"
    )
