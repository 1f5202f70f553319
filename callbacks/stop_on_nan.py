"""A loss or gradient that is not a number ends the run, with the batch that gave it.

What is looked at, and when, by strategy:

* single, ddp, fsdp2: the losses of all micro-batches and the norm of the gradient (fsdp2: of the
  rank's shards) after the last backward pass of a step, before the optimiser gets them.
* DeepSpeed (zero1 to zero3_offload): the same after the engine's step, which has the gradients for
  itself: the norm is the one that it took over all ranks. Where that norm is not finite the engine
  may have left the step out by itself, and would go on so for ever.

In fp16 (precision 16-*) only losses: overflowing gradients are how its scale is found.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from backtrack.data.batching import deal

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from backtrack.data.batching import StepBatch


class NotFiniteError(ValueError):
    """The loss or the gradient of a step is infinite or not a number."""


class Seen(NamedTuple):
    """A micro-batch since the last look.

    Attributes:
        batch: On its device.
        step: Its optimiser step, from 0.
        micro_batch: Its number in the step.
        loss: (), as backward got it: its part of the step's loss, times the ranks.
    """

    batch: StepBatch
    step: int
    micro_batch: int
    loss: Tensor


class StopOnNan(pl.Callback):
    """Ends the run on all ranks with `NotFiniteError`, and keeps the batch.

    Losses and norms stay on the device until they are looked at: one number is read, and agreed on
    by the ranks, once in `every_n_steps` steps, before validation and before each checkpoint (a run
    ends with one). A run that goes on from a checkpoint therefore begins with good weights,
    whatever `every_n_steps` is. The batches since the last look are held meanwhile: about 52 bytes
    a token.

    Each rank with a bad loss, or every rank where only gradients are bad, writes
    `<run>/nan/step=N_rank=R.pt`, to be read by `torch.load(..., weights_only=True)`:

        step, rank         of the first step that was bad, from 0
        micro_batches      those with a bad loss, else all of the step; of each:
            micro_batch, loss, example_ids, batch ({field of StepBatch: value}; the forest is one)
        gradient_norm      None where it was not looked at
        bad_gradients      names of parameters, of the present step only; [] under DeepSpeed
    """

    def __init__(self, *, run_dir: str, every_n_steps: int) -> None:
        """Look once in `every_n_steps` optimiser steps.

        Args:
            run_dir: Folder of the run; gets `nan/`.
            every_n_steps: Optimiser steps between two looks.
        """
        self.folder, self.every_n_steps = Path(run_dir) / "nan", every_n_steps
        self._current: tuple[StepBatch, int, int] | None = None
        self._seen: list[Seen] = []
        self._norms: dict[int, Tensor] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        """Remember what the next loss is of."""
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        self._current = (batch, trainer.global_step, micro_batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss, unread."""
        assert self._current is not None, "a batch comes before its loss"
        self._seen.append(Seen(*self._current, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look before the weights are touched; DeepSpeed, which asks a micro-batch, comes later."""
        if _is_deepspeed(trainer):
            return
        if not _may_overflow(trainer):
            self._norms[trainer.global_step] = gradient_norm(pl_module)
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Look after DeepSpeed's step, at the norm that it has computed as well."""
        if not _is_deepspeed(trainer) or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        engine: Any = trainer.strategy.model
        norm = engine.get_global_grad_norm()
        if norm is not None and not _may_overflow(trainer):
            device = trainer.strategy.root_device
            self._norms[trainer.global_step - 1] = torch.as_tensor(norm, device=device)
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look: nobody is to see the figures of a model that is lost."""
        self._look(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look: a checkpoint that was begun after a bad step is not written."""
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise on all ranks if any of them saw something bad since the last look."""
        if not self._seen and not self._norms:
            return
        device = trainer.strategy.root_device
        values = [*(seen.loss for seen in self._seen), *self._norms.values()]
        values = [value.to(device, torch.float32) for value in values]
        bad = (~torch.stack(values).isfinite()).any().float()
        seen, norms = self._seen, self._norms
        self._seen, self._norms = [], {}
        if float(trainer.strategy.reduce(bad, reduce_op="sum")) == 0:
            return
        own = _finding(seen, norms)
        found = _gathered(own)
        step = min(finding.step for finding in found if finding.step is not None)
        by_loss = [f.rank for f in found if f.step == step and f.micro_batches]
        if own.rank in (by_loss or range(len(found))):
            mine = [s for s in seen if s.step == step]
            wanted = [s for s in mine if s.micro_batch in own.micro_batches] if by_loss else mine
            norm = norms.get(step)
            _write(self._file(step, own.rank), trainer, module, wanted, norm)
        trainer.strategy.barrier("the batch is kept")  # a rank that ends early takes others along
        files = [self._file(step, rank) for rank in by_loss or range(len(found))]
        raise NotFiniteError(_message(step, [f for f in found if f.rank in by_loss], files))

    def _file(self, step: int, rank: int) -> Path:
        return self.folder / f"step={step}_rank={rank}.pt"


class Finding(NamedTuple):
    """What a rank saw: its first bad step (None: all was good) and the bad losses in it."""

    rank: int
    step: int | None
    micro_batches: tuple[int, ...]
    losses: tuple[float, ...]


def _finding(seen: list[Seen], norms: dict[int, Tensor]) -> Finding:
    bad = [(s.step, s.micro_batch, float(s.loss)) for s in seen]
    bad = [entry for entry in bad if not math.isfinite(entry[2])]
    steps = [
        *(entry[0] for entry in bad),
        *(step for step, norm in norms.items() if not math.isfinite(float(norm))),
    ]
    step = min(steps, default=None)
    of_step = [entry for entry in bad if entry[0] == step]
    return Finding(
        rank=dist.get_rank() if dist.is_initialized() else 0,
        step=step,
        micro_batches=tuple(entry[1] for entry in of_step),
        losses=tuple(entry[2] for entry in of_step),
    )


def _gathered(own: Finding) -> list[Finding]:
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def gradient_norm(module: torch.nn.Module) -> Tensor:
    """Return the norm of the gradients that this rank holds: (), unread."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return torch.nn.utils.get_total_norm(local) if local else torch.zeros(())


def bad_gradients(module: torch.nn.Module) -> list[str]:
    """Return the parameters whose gradient on this rank holds something that is not finite."""
    names = []
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.to_local()
        if gradient is not None and not bool(gradient.isfinite().all()):
            names.append(name)
    return names


def _write(
    file: Path,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    seen: list[Seen],
    norm: Tensor | None,
) -> None:
    step = seen[0].step
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "step": step,
            "rank": trainer.global_rank,
            "micro_batches": [
                {
                    "micro_batch": one.micro_batch,
                    "loss": float(one.loss),
                    "example_ids": example_ids(trainer, step, one.micro_batch),
                    "batch": _plain(one.batch),
                }
                for one in seen
            ],
            "gradient_norm": None if norm is None else float(norm),
            # Later the gradients are those of another step.
            "bad_gradients": bad_gradients(module) if step == trainer.global_step else [],
        },
        file,
    )


def example_ids(trainer: pl.Trainer, step: int, micro_batch: int) -> list[str]:
    """Return the examples of this rank's share of a step, planned anew; [] for other data."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "trees_of_step"):
        return []
    num_ranks = trainer.world_size
    shares = deal(
        data.trees_of_step(step),
        max_tokens=data.settings.max_tokens,
        num_shares=trainer.accumulate_grad_batches * num_ranks,
    )
    share = shares[micro_batch * num_ranks + trainer.global_rank]
    return [tree.example_id for row in share for tree in row]


def _plain(value: Any) -> Any:
    """Return a record as a dictionary, and its tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return value


def _message(step: int, by_loss: list[Finding], files: list[Path]) -> str:
    what = "; ".join(
        f"the loss of rank {f.rank} is {loss} in micro-batch {micro}"
        for f in by_loss
        for micro, loss in zip(f.micro_batches, f.losses, strict=True)
    )
    kept = ", ".join(map(str, files[:4])) + (" and more" if len(files) > 4 else "")
    return (
        f"step {step}: {what or 'the losses are finite, but the gradient is not'}. Its batch, with "
        f"the ids of its examples, is kept in {kept}. Look at those rows; try a lower "
        "optimizer.learning_rate or a larger optimizer.warmup_fraction, and "
        "trainer.precision=32-true. No checkpoint was written since: resume=auto goes on from "
        "before this step, and meets it again under the same settings"
    )


def _is_deepspeed(trainer: pl.Trainer) -> bool:
    return hasattr(trainer.strategy.model, "get_global_grad_norm")


def _may_overflow(trainer: pl.Trainer) -> bool:
    """Return whether infinite gradients are part of the plan: fp16 finds its scale by them."""
    return str(trainer.precision).startswith("16")
