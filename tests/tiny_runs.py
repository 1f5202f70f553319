"""Configurations of runs that take a second: a small embedded world, a model of hidden size 32."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from omegaconf import DictConfig

from backtrack.config import compose_config

ROOT = Path(__file__).resolve().parents[1]
LORA = "model.lora={r: 2, alpha: 4, dropout: 0.2, target_modules: all-linear}"
SMALL_MODEL = (
    "model.init.hidden_size=32",
    "model.init.intermediate_size=64",
    "model.init.num_attention_heads=2",
    "model.init.num_key_value_heads=2",
)
SMALL_WORLD = (
    "data.world.num_items=24",
    "data.world.num_train_phrasings=12",
    "data.world.num_held_out_phrasings=1",
    "data.limit.validation=4",
)
QUIET = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu")


def overrides_of(
    tmp_path: Path, *more: str, experiment: str = "tiny_sft", steps: int = 4
) -> list[str]:
    """Command line of a run of `steps` steps that validates and saves after every second one."""
    return [
        f"+experiment={experiment}",
        "start_from=null",
        *SMALL_MODEL,
        *SMALL_WORLD,
        *QUIET,
        "data.batch_size=4",
        "data.max_tokens=384",
        f"trainer.max_steps={steps}",
        "trainer.val_every_n_steps=2",
        "trainer.save_every_n_steps=2",
        "trainer.log_every_n_steps=1",
        f"paths.log_dir={tmp_path / 'logs'}",
        f"paths.cache_dir={tmp_path / 'cache'}",
        *more,
    ]


def config_of(
    tmp_path: Path, *more: str, experiment: str = "tiny_sft", steps: int = 4
) -> DictConfig:
    return compose_config(
        "train", overrides_of(tmp_path, *more, experiment=experiment, steps=steps)
    )


class CrashError(Exception):
    """What `StopAt` raises in place of a crash."""


class StopAt(pl.Callback):
    """In optimiser step `step`, before it is done: a crash, or what Ctrl-C does."""

    def __init__(self, *, step: int, how: str) -> None:
        self.step, self.how, self.is_done = step, how, False

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step != self.step - 1 or self.is_done:
            return
        self.is_done = True
        if self.how == "crash":
            raise CrashError
        if self.how == "interrupt_first" and trainer.global_rank:
            return
        if self.how == "kill_last" and trainer.global_rank < trainer.world_size - 1:
            return
        if self.how.startswith("interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
            return
        os.kill(os.getpid(), signal.SIGKILL)


class StopAfterValidation(pl.Callback):
    """A crash after the last step, when nothing is left but to write the model."""

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        raise CrashError


class Recorder(pl.Callback):
    """Keeps, in `seen` by name: token ids of each micro-batch, random states around validation."""

    seen: ClassVar[dict[str, list[Any]]] = {}

    def __init__(self, *, name: str) -> None:
        self.kept = self.seen.setdefault(name, [])

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, i: int) -> None:
        self.kept.append(("batch", i, batch.forest.input_ids.tolist()))

    def on_validation_start(self, *args: Any) -> None:
        self.kept.append(("before", random_states()))

    def on_validation_end(self, *args: Any) -> None:
        self.kept.append(("after", random_states()))


def random_states() -> tuple[str, str, str]:
    states = torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()  # noqa: NPY002
    return tuple(repr(state) for state in states)  # type: ignore[return-value]


def stop_at(step: int, how: str) -> tuple[str, ...]:
    """Overrides: Hydra adds the callback; `callbacks` does not tell two runs apart."""
    target = "+callbacks.stop._target_=tests.tiny_runs.StopAt"
    return target, f"+callbacks.stop.step={step}", f"+callbacks.stop.how={how}"


def record(name: str) -> tuple[str, ...]:
    target = "+callbacks.recorder._target_=tests.tiny_runs.Recorder"
    return target, f"+callbacks.recorder.name={name}"


def checkpoint_of(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / name, weights_only=False)


def assert_same_end(left: Path, right: Path) -> None:
    """Two run folders ended bit for bit alike: weights, optimiser, schedule."""
    ours, theirs = checkpoint_of(left), checkpoint_of(right)
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_identical(ours[key], theirs[key], key)
    name = Path("model", "model.safetensors")
    assert (left / name).read_bytes() == (right / name).read_bytes()


def assert_identical(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(ours, torch.Tensor | np.ndarray):
        assert (ours == theirs).all(), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_identical(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, value in enumerate(ours):
            assert_identical(value, theirs[number], f"{where}.{number}")
    else:
        assert ours == theirs, where


def start_command(module: str, overrides: Sequence[str], **settings: Any) -> subprocess.Popen[str]:
    """Start `python -m backtrack.MODULE` as a user would, from the root of the checkout."""
    return subprocess.Popen(
        [sys.executable, "-m", f"backtrack.{module}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **settings,
    )
