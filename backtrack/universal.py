"""A DeepSpeed checkpoint for another number of ranks: converted once, loaded by any number.

DeepSpeed's own converter and reader do the work. What they lack is mended here (0.19.8):
under ZeRO-3 the reader gives every parameter group the settings of the first one and all parts of
the optimiser one step counter, which each of them advances; under ZeRO-1 and 2 it fails on a rank
that holds nothing but padding of a group, which the single row of [RESET] leaves on many ranks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backtrack.checkpoints import (
    all_files,
    checksums,
    fresh_partial,
    swap_into_place,
    write_manifest,
)
from backtrack.consolidate import LATEST, deepspeed_module

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPTIMIZER = Path("zero", "optimizer_state.pt")
_LATEST_UNIVERSAL = "latest_universal"


def to_universal(folder: Path, out: Path) -> Path:
    """Convert a DeepSpeed checkpoint into one that any number of ranks loads, and return it.

    Takes another process, which needs no device. Disk: 12 bytes for each trained weight in `out`,
    as much again while it works; memory: about 24 bytes for each weight of a rank's share.

    Args:
        folder: As Lightning's DeepSpeedStrategy wrote it (ZeRO-1, 2 or 3).
        out: Where to put it; what is there is replaced once the new one is complete.

    Raises:
        ValueError: If `folder` is not one, or DeepSpeed is missing or refuses it.
    """
    deepspeed_module("deepspeed")
    if not (folder / LATEST).is_file():
        raise ValueError(f"resume: {folder} is no checkpoint of DeepSpeed; name one of a run")
    tag = (folder / LATEST).read_text(encoding="utf-8").strip()
    partial = fresh_partial(out)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"),
            *("--input_folder", str(folder / tag), "--output_folder", str(partial / tag)),
            "--inject_missing_state",
        ],
        # By fork, its workers must not inherit a device; this process may hold one.
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not (partial / _LATEST_UNIVERSAL).is_file():
        shutil.rmtree(partial)
        raise ValueError(
            f"resume: DeepSpeed could not convert {folder} for another number of ranks "
            f"({' '.join(done.stderr.split())[-500:]}); resume on as many ranks as wrote it"
        )
    _slim(partial / tag / _OPTIMIZER)
    sums = checksums(partial, all_files(partial))
    write_manifest(partial, sums, kind="universal", world_size=1)
    swap_into_place(partial, out)
    return out


@contextmanager
def loading_universal(engine: Any, folder: Path) -> Iterator[None]:
    """Let `engine.load_checkpoint(folder)` inside read what `to_universal` wrote, and mend it.

    The engine may have any number of ranks, and need not be configured for it
    (`checkpoint.load_universal`). Its parameters go by their names, its groups by their order.

    Args:
        engine: A DeepSpeedEngine with an optimiser, of the stage that wrote the checkpoint.
        folder: Whole, see `checkpoints.is_complete`.

    Raises:
        ValueError: If it was another stage, or another number of parameter groups.
    """
    config, zero = engine._config, engine.optimizer
    tag = (folder / _LATEST_UNIVERSAL).read_text(encoding="utf-8").strip()
    state = torch.load(folder / tag / _OPTIMIZER, map_location="cpu", weights_only=False)
    if (state["zero_stage"] == 3) != (engine.zero_optimization_stage() == 3):
        raise ValueError(
            f"resume: {folder} was written by ZeRO-{int(state['zero_stage'])}; only ZeRO-1 and 2 "
            "read each other's checkpoints: give the strategy of that run"
        )
    groups = zero.optimizer.param_groups
    if len(groups) != len(state["param_groups"]):
        raise ValueError(
            f"resume: {folder} was saved with {len(state['param_groups'])} groups of parameters, "
            f"the optimiser has {len(groups)} here; give the configuration of that run"
        )
    before = config.load_universal_checkpoint
    config.load_universal_checkpoint = True
    try:
        with _without_padding(zero):
            yield
    finally:
        config.load_universal_checkpoint = before
    _restore_settings(zero.optimizer, state["param_groups"])


@contextmanager
def _without_padding(zero: Any) -> Iterator[None]:
    """Let ZeRO-1 and 2 read no group of which this rank holds nothing but padding."""
    name = "load_hp_checkpoint_state_from_checkpoint_dir"
    original = getattr(zero, name, None)
    if original is None:  # ZeRO-3 has a reader of its own, which minds it
        yield
        return

    def read(weights_name: str, checkpoint_dir: str) -> None:
        groups, weights = zero.optimizer.param_groups, getattr(zero, weights_name)
        held = [i for i, g in enumerate(weights) if any(p._hp_mapping is not None for p in g)]
        zero.optimizer.param_groups = [groups[i] for i in held]
        setattr(zero, weights_name, [weights[i] for i in held])
        try:
            original(weights_name, checkpoint_dir)
        finally:
            zero.optimizer.param_groups = groups
            setattr(zero, weights_name, weights)

    setattr(zero, name, read)
    try:
        yield
    finally:
        delattr(zero, name)


def _restore_settings(optimizer: Any, saved: list[dict[str, Any]]) -> None:
    """Give each group its own settings, and each part of the optimiser its own step counter."""
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    is_on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    for weight, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            step = state["step"].clone()
            state["step"] = step.to(weight.device) if is_on_device else step


def _slim(path: Path) -> None:
    """Keep of ZeRO-3's common state what is common: the rest is the share of rank 0.

    Every rank would load it, and set all groups as the first one is.
    """
    state = torch.load(path, map_location="cpu", weights_only=False)
    share = state.get("optimizer_state_dict")
    if share is None:
        return
    state.pop("fp32_flat_groups")
    state["optimizer_state_dict"] = {
        "state": {0: {"step": share["state"][0]["step"]}},
        "param_groups": [{"params": []}],
    }
    torch.save(state, path)
