"""The Lightning shell around the step planner: which share of which step a rank gets when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, overload

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from backtrack.data.batching import StepBatch, deal, make_batch, step_weight
from backtrack.data.examples import Recipe, make_tree
from backtrack.faults import leave_signals_to_the_trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from backtrack.data.mixture import Schedule
    from backtrack.data.types import EncodedExample, Tree


class BatchSettings(NamedTuple):
    """How a step's examples become tensors, from `conf/data`.

    Attributes:
        batch_size: Examples of an optimiser step, over all ranks and micro-batches.
        max_tokens: Of a row.
        layout: `forest` or `paths`.
        pad_id: Fills rows.
        num_workers: Processes that plan steps; 0 plans in the training process.
    """

    batch_size: int
    max_tokens: int
    layout: str
    pad_id: int
    num_workers: int


class Reference(Protocol):
    """Log-probs of the frozen reference (`modules/reference.py`)."""

    def __getitem__(self, key: tuple[int, str], /) -> np.ndarray:
        """Return those of the paths of (epoch, example id): float32, nats."""


class StepSampler(Sampler[int]):
    """Numbers of micro-batches from `first` on, with the length of the whole run."""

    def __init__(self, *, first: int, total: int) -> None:
        """Count from `first` to `total - 1`."""
        self.first, self.total = first, total

    def __len__(self) -> int:
        """Return the micro-batches of the whole run."""
        return self.total

    def __iter__(self) -> Iterator[int]:
        """Yield the micro-batches that are left."""
        return iter(range(self.first, self.total))


class StepDataset(Dataset[StepBatch]):
    """Micro-batch m of step t for one rank, at index `t * num_micro + m`."""

    def __init__(self, data: ForestData, *, num_micro: int, rank: int, num_ranks: int) -> None:
        """Serve the shares of `rank`."""
        self.data, self.num_micro = data, num_micro
        self.rank, self.num_ranks = rank, num_ranks
        self._planned: tuple[int, list[list[list[Tree]]], float] | None = None

    def __len__(self) -> int:
        """Return the micro-batches of the run."""
        return self.data.num_steps * self.num_micro

    def __getitem__(self, index: int) -> StepBatch:
        """Return one share; the plan of its step is kept for the step's other shares."""
        step, micro = divmod(index, self.num_micro)
        num_shares = self.num_micro * self.num_ranks
        if self._planned is None or self._planned[0] != step:
            trees = self.data.trees_of_step(step)
            shares = deal(trees, max_tokens=self.data.settings.max_tokens, num_shares=num_shares)
            self._planned = (step, shares, step_weight(trees))
        _, shares, total = self._planned
        return self.data.batch(
            shares[micro * self.num_ranks + self.rank], total, num_shares=num_shares, step=step
        )


class ValidationDataset(Dataset[StepBatch]):
    """Shares of the validation set for one rank, `batch_size` examples at a time."""

    def __init__(self, data: ForestData, *, rank: int, num_ranks: int) -> None:
        """Serve the shares of `rank`."""
        self.data, self.rank, self.num_ranks = data, rank, num_ranks
        self.trees = data.trees_of_validation()
        self.total = step_weight(self.trees)

    def __len__(self) -> int:
        """Return the shares of a rank."""
        return -(-len(self.trees) // self.data.settings.batch_size) * self.data.num_micro

    def __getitem__(self, index: int) -> StepBatch:
        """Return one share; all have the denominator of the whole set."""
        step, micro = divmod(index, self.data.num_micro)
        size = self.data.settings.batch_size
        shares = deal(
            [*self.trees[step * size : (step + 1) * size]],
            max_tokens=self.data.settings.max_tokens,
            num_shares=self.num_ranks * self.data.num_micro,
        )
        mine = shares[micro * self.num_ranks + self.rank]
        return self.data.batch(mine, self.total, num_shares=1, step=step)


class StepLoader(DataLoader[StepBatch]):
    """A loader that adds up in `waited` how long its reader waited for batches, in seconds."""

    waited = 0.0

    def __iter__(self) -> Iterator[StepBatch]:  # type: ignore[override]
        """Yield the batches; time spent by the reader does not count."""
        batches = super().__iter__()
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch


class Trees(Sequence["Tree"]):
    """Some trees of a run, each made when it is asked for."""

    def __init__(self, data: ForestData, numbers: range) -> None:
        """Serve the trees `numbers` of `data`."""
        self._data, self._numbers = data, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> Trees: ...
    def __getitem__(self, index: int | slice) -> Tree | Trees:
        if isinstance(index, slice):
            return Trees(self._data, self._numbers[index])
        return self._data.tree(self._numbers[index])


class ForestData(pl.LightningDataModule):
    """Encoded examples and the schedule of a run, as loaders of `StepBatch`."""

    def __init__(
        self,
        *,
        train: Sequence[Sequence[EncodedExample]],
        validation: Sequence[EncodedExample],
        schedule: Schedule,
        recipe: Recipe,
        settings: BatchSettings,
        num_micro: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Hold a run's data.

        Args:
            train: Training examples of each source.
            validation: Held-out examples; may be empty.
            schedule: Source, example and epoch of every slot of the run.
            recipe: How an example becomes a tree.
            settings: See `BatchSettings`.
            num_micro: Micro-batches of a step (`trainer.accumulate_grad_batches`).
            tokenizer: That encoded the examples; callbacks that decode need it.
        """
        super().__init__()
        self.train, self.validation = train, validation
        self.schedule, self.recipe, self.settings = schedule, recipe, settings
        self.num_micro, self.tokenizer = num_micro, tokenizer
        self.reference: Reference | None = None

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the run; the last one may be short."""
        return -(-len(self.schedule.index) // self.settings.batch_size)

    def tree(self, number: int) -> Tree:
        """Return tree `number` of the run: its slots in order, then the validation examples.

        The draws of validation trees do not move with the epoch.
        """
        if number >= len(self.schedule.index):
            example = self.validation[number - len(self.schedule.index)]
            return make_tree(example, recipe=self.recipe, epoch=0)
        source, index = int(self.schedule.source[number]), int(self.schedule.index[number])
        epoch = int(self.schedule.epoch[number])
        return make_tree(self.train[source][index], recipe=self.recipe, epoch=epoch)

    def all_trees(self) -> Sequence[Tree]:
        """Return every tree of the run, validation included: what a reference pass covers."""
        return Trees(self, range(len(self.schedule.index) + len(self.validation)))

    def trees_of_step(self, step: int) -> list[Tree]:
        """Return the trees of optimiser step `step`: a function of seed and step alone."""
        first, size = step * self.settings.batch_size, self.settings.batch_size
        return [self.tree(n) for n in range(first, min(first + size, len(self.schedule.index)))]

    def trees_of_validation(self) -> Sequence[Tree]:
        """Return the validation trees."""
        return self.all_trees()[len(self.schedule.index) :]

    def batch(
        self, rows: Sequence[Sequence[Tree]], total: float, *, num_shares: int, step: int
    ) -> StepBatch:
        """Return the tensors of one share."""
        return make_batch(
            rows,
            layout=self.settings.layout,
            pad_id=self.settings.pad_id,
            total_weight=total,
            num_shares=num_shares,
            step=step,
            reference_logps=self.reference_of(rows),
            row_multiple=self.settings.max_tokens if self._has_fixed_rows() else 8,
        )

    def reference_of(self, rows: Sequence[Sequence[Tree]]) -> Tensor | None:
        """Return the reference's log-prob of each path of `rows`, (P,), or None without a table."""
        if self.reference is None:
            return None
        found = [self.reference[tree.epoch, tree.example_id] for row in rows for tree in row]
        return torch.from_numpy(np.concatenate([*found, np.zeros(0, np.float32)]))

    def train_dataloader(self) -> StepLoader:
        """Return the micro-batches of this rank, from the step the trainer has reached."""
        trainer = self._trainer()
        dataset = StepDataset(
            self,
            num_micro=self.num_micro,
            rank=trainer.global_rank,
            num_ranks=trainer.world_size,
        )
        sampler = StepSampler(first=trainer.global_step * self.num_micro, total=len(dataset))
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> Any:
        """Return the validation set in rows of `max_tokens`, equally many for every rank."""
        if not len(self.validation):
            return []
        trainer = self._trainer()
        dataset = ValidationDataset(self, rank=trainer.global_rank, num_ranks=trainer.world_size)
        return DataLoader(dataset, batch_size=None, generator=torch.Generator())

    def _loader(self, dataset: StepDataset, sampler: StepSampler) -> StepLoader:
        return StepLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.settings.num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            generator=torch.Generator(),  # or each new iterator would draw from the global state
            pin_memory=torch.cuda.is_available(),
        )

    def _has_fixed_rows(self) -> bool:
        """Return whether all rows have `max_tokens`: each new shape would compile a GPU kernel."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return on_gpu and self.settings.layout == "forest"

    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None, "loaders are made by a trainer"
        return self.trainer
