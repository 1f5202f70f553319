"""One side of a comparison: this project trains on triples, by its own modules, data and trainer.

Run by `train_vs_peer.py`; prints its `Outcome` as the last line. Everything is as in
`python -m backtrack.train`, but for three things: prefix lengths are those of the triples, steps
hold the triples in the order of the file, and nothing is logged or saved.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import torch
import transformers
from omegaconf import DictConfig
from work import (
    PAD_ID,
    SETTINGS,
    Outcome,
    TokenCounter,
    Triple,
    load_model,
    no_progress_bars,
    peak_rss_mib,
    read_triples,
    side_arguments,
)

from backtrack.build import make_module, make_recipe, make_trainer
from backtrack.config import compose_config
from backtrack.cpu import tune_for_training
from backtrack.data import examples
from backtrack.data.mixture import Schedule
from backtrack.data.module import BatchSettings, ForestData
from backtrack.data.types import EncodedExample, Turn
from backtrack.modules.base import ForestModule
from backtrack.modules.reference import reference_table


class Job(NamedTuple):
    """A run that is ready to be fitted.

    Attributes:
        trainer: Without loggers, progress bar and checkpoints.
        module: Around the model.
        data: Of one epoch; with the reference's log-probs in DPO.
        reference_seconds: What they took.
        folder: Of the run; the reference's table is read from it.
    """

    trainer: pl.Trainer
    module: ForestModule
    data: ForestData
    reference_seconds: float
    folder: tempfile.TemporaryDirectory[str]


class StepLog(pl.Callback):
    """Keeps loss and gap of each step, and the time at which it was done."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gaps: list[float] = []
        self.times: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the first step."""
        self.times.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Take down what the step logged, after the last of its micro-batches."""
        if trainer.global_step == len(self.losses):
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.times.append(time.perf_counter())
        self.losses.append(logged["train/loss"])
        if "logps/chosen_branch" in logged:
            self.gaps.append(logged["logps/chosen_branch"] - logged["logps/rejected_branch"])

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def compose(objective: str, folder: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the configuration of a run with the settings of `work.SETTINGS`."""
    beta = [f"objective.beta={SETTINGS['beta']}"] if objective == "dpo" else []
    return compose_config(
        "train",
        [
            f"objective={objective}",
            *beta,
            f"optimizer.learning_rate={SETTINGS['learning_rate']}",
            f"optimizer.betas={SETTINGS['betas']}",
            f"optimizer.eps={SETTINGS['eps']}",
            f"optimizer.weight_decay={SETTINGS['weight_decay']}",
            "optimizer.warmup_fraction=0.0",
            f"trainer.gradient_clip_val={SETTINGS['clip']}",
            f"data.batch_size={SETTINGS['triples_per_step']}",
            "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false",
            # One checkpoint callback stays and never saves; without any, Lightning adds its own.
            "trainer.save_every_n_steps=1000000000",
            "callbacks.last_checkpoint.save_on_train_epoch_end=false",
            "~callbacks.best_checkpoint",
            "~callbacks.interrupt",
            "~callbacks.throughput",
            "~callbacks.learning_rate",
            "~callbacks.reset_monitor",
            "~logger.tensorboard",
            "~logger.csv",
            f"paths.run_dir={folder}",
            *overrides,
        ],
    )


def encode(triples: Sequence[Triple]) -> list[EncodedExample]:
    """Return the triples as encoded examples, each with its number as id."""
    return [
        EncodedExample(
            example_id=str(number),
            is_harmful=True,
            turns=(Turn(tuple(triple["prompt"]), is_supervised=False),),
            safe=tuple(triple["safe"]),
            unsafe=tuple(triple["unsafe"]),
        )
        for number, triple in enumerate(triples)
    ]


@contextmanager
def given_cuts(triples: Sequence[Triple]) -> Iterator[None]:
    """Let trees take the prefix lengths of the triples, in place of drawing them."""

    def cut(num_tokens: int, *, seed: int, epoch: int, example_id: str, stream: str) -> int:
        cuts: Mapping[str, Any] = triples[int(example_id)]
        return int(cuts[f"{stream}_cut"])

    with patch.object(examples, "draw_cut", cut):
        yield


def make_data(triples: Sequence[Triple], cfg: DictConfig) -> ForestData:
    """Return the data of one epoch in the order of the triples; to be used under `given_cuts`."""
    count = len(triples)
    largest = max(len(t["prompt"]) + 2 * len(t["safe"] + t["unsafe"]) + 2 for t in triples)
    zeros = np.zeros(count, np.int64)
    return ForestData(
        train=[encode(triples)],
        validation=[],
        schedule=Schedule(source=zeros, index=np.arange(count), epoch=zeros),
        recipe=make_recipe(cfg, reset_id=triples[0]["reset"]),
        settings=BatchSettings(
            batch_size=cfg.data.batch_size,
            max_tokens=max(cfg.data.max_tokens, largest),
            layout=cfg.data.layout,
            pad_id=PAD_ID,
            num_workers=cfg.data.num_workers,
        ),
        num_micro=cfg.trainer.accumulate_grad_batches,
    )


def prepare(
    model: Any, triples: Sequence[Triple], objective: str, overrides: Sequence[str] = ()
) -> Job:
    """Return a run over `triples`; to be called and fitted under `given_cuts`.

    Args:
        model: To be trained.
        triples: Of the run, at least one.
        objective: `sft` or `dpo`.
        overrides: Of the configuration, such as `data.batch_size=8`.
    """
    folder = tempfile.TemporaryDirectory()
    cfg = compose(objective, Path(folder.name), overrides)
    data = make_data(triples, cfg)
    trainer = make_trainer(cfg, num_steps=data.num_steps)
    module = make_module(cfg, model, num_steps=data.num_steps, reset_id=data.recipe.reset_token_id)
    seconds = 0.0
    if objective == "dpo":
        start = time.perf_counter()
        data.reference = reference_table(
            module,
            data.all_trees(),
            cache_dir=Path(folder.name),
            address="benchmark",
            batches=data.settings,
        )
        seconds = time.perf_counter() - start
    return Job(trainer, module, data, seconds, folder)


def quiet() -> None:
    """Silence what Lightning and transformers say about themselves."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    no_progress_bars()


def main() -> None:
    """Train and print the outcome."""
    args = side_arguments(__doc__).parse_args()
    quiet()
    tune_for_training()  # as `backtrack.train` does
    triples = read_triples(args.triples, args.limit)
    with given_cuts(triples):
        job = prepare(load_model(args.model), triples, args.objective)
        counter, log = TokenCounter(job.module.model), StepLog()
        job.trainer.callbacks.append(log)  # type: ignore[attr-defined]
        start = time.perf_counter()
        job.trainer.fit(job.module, datamodule=job.data)
        seconds = time.perf_counter() - start
    outcome = Outcome(
        seconds=seconds,
        reference_seconds=job.reference_seconds,
        tokens=counter.tokens,
        losses=log.losses,
        gaps=log.gaps,
        peak_rss_mib=peak_rss_mib(),
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
