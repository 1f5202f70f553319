"""Which model a tiny run starts from: the one that was left by a demo or a run, or a new one."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from backtrack.config import compose_config
from backtrack.data.world import load_world
from backtrack.launch import agree, launch_of
from backtrack.runs import CONFIG_FILE, MODEL, inner_run, load_config

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_RANKS = ("accelerator", "devices", "num_nodes")


def resolve_start(cfg: DictConfig, train: Callable[[DictConfig], Any]) -> DictConfig:
    """Return `cfg` with `model.path` filled in where `start_from` names an experiment.

    The newest of what the demo and runs of that experiment left is taken, if it was made with the
    same `data.backtrack` and world; otherwise the experiment is run first.

    Args:
        cfg: With `model.path` null and `start_from` an experiment, or anything else (returned as
            it is).
        train: Trains a configuration; returns something with a `model` folder.

    Raises:
        ValueError: If the experiment that has to be run first is interrupted.
    """
    if cfg.model.path is not None or cfg.start_from is None:
        return cfg
    cfg = cfg.copy()
    newest = agree(lambda: _newest(cfg))
    if newest is not None:
        log.info("starting from %s", newest)
        cfg.model.path = newest
        return cfg
    log.info("no %s model was left here; training it first", cfg.start_from)
    first = compose_config("train", _overrides(cfg))
    with inner_run():
        result = train(first)
    if result.model is None:
        raise ValueError(f"start_from: the run of {cfg.start_from} was interrupted")
    cfg.model.path = str(result.model.resolve())  # as `_candidates` names it next time
    return cfg


def _newest(cfg: DictConfig) -> str | None:
    found = [folder for folder in _candidates(cfg) if _fits(folder, cfg)]
    if not found:
        return None
    return str(max(found, key=lambda folder: (folder / "config.json").stat().st_mtime))


def _overrides(cfg: DictConfig) -> list[str]:
    backtrack = bool(cfg.data.backtrack) and cfg.start_from != "tiny_base"
    copied = [f"++model.init.{key}={value}" for key, value in (cfg.model.init or {}).items()]
    if "world" in cfg.data:
        copied += [f"data.world.{key}={value}" for key, value in cfg.data.world.items()]
    if cfg.resume == "auto":
        copied.append("resume=auto")
    if launch_of(os.environ) is not None:  # all ranks are there already, and train this as well
        copied.append(f"strategy={cfg.strategy.name}")
        copied += [f"trainer.{key}={cfg.trainer[key]}" for key in _RANKS]
    return [
        f"+experiment={cfg.start_from}",
        f"seed={cfg.seed}",
        f"data.backtrack={str(backtrack).lower()}",
        f"paths.log_dir={cfg.paths.log_dir}",
        f"paths.cache_dir={cfg.paths.cache_dir}",
        f"trainer.enable_progress_bar={str(cfg.trainer.enable_progress_bar).lower()}",
        *copied,
    ]


def _candidates(cfg: DictConfig) -> list[Path]:
    logs = Path(cfg.paths.log_dir)
    objective = cfg.start_from.removeprefix("tiny_")
    kind = "backtrack" if cfg.data.backtrack else "baseline"
    demo = "base" if objective == "base" else f"{kind}_{objective}"
    folders = [logs / "demo" / "latest" / demo]
    folders += [run / MODEL for run in (logs / "train" / cfg.start_from).glob("*") if run.is_dir()]
    return [folder.resolve() for folder in folders if (folder / "config.json").is_file()]


def _fits(folder: Path, cfg: DictConfig) -> bool:
    """Return whether the model in `folder` was made with the world and the method of `cfg`."""
    if folder.name == MODEL:
        if not (folder.parent / CONFIG_FILE).is_file():
            return False
        saved = load_config(folder.parent)
        same_method = saved.data.backtrack == cfg.data.backtrack or cfg.start_from == "tiny_base"
        same_world = (
            "world" in saved.data
            and "world" in cfg.data
            and (
                OmegaConf.to_container(saved.data.world)
                == OmegaConf.to_container(cfg.data.world, resolve=True)
            )
        )
        same_sizes = saved.model.init == cfg.model.init
        return bool(same_method and same_world and same_sizes and saved.seed == cfg.seed)
    world = load_world(folder)  # of a demo, whose seed is its world's
    return world is not None and (
        "world" not in cfg.data or asdict(world.settings) == dict(cfg.data.world)
    )
