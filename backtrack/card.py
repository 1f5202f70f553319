"""What a model card says of the run that made the model: recipe, data, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from backtrack import __version__
from backtrack.checks import method_of

if TYPE_CHECKING:
    from collections.abc import Mapping

SHOWN = ("train/loss", "val/", "rewards/", "reset/", "safety/", "benign/")
"""Beginnings of the names of metrics that are of interest once a run has ended."""
HIDDEN = ("safety/seconds", "safety/share_of_time")
LIMIT = 40
"""Metrics that are shown at most."""


def about_run(cfg: DictConfig, metrics: Mapping[str, float]) -> str:
    """Return the section of a model card on the run of `cfg`, in Markdown.

    Args:
        cfg: Resolved.
        metrics: Last logged value by name; may be empty.
    """
    parts = ["## How it was made", _table(_recipe(cfg)), "### Data", _data(cfg)]
    shown = {
        name: value
        for name, value in sorted(metrics.items())
        if name.startswith(SHOWN) and name not in HIDDEN
    }
    if shown:
        few = dict(list(shown.items())[:LIMIT])
        parts += ["### Metrics", _table({name: f"{value:.4g}" for name, value in few.items()})]
        if len(shown) > LIMIT:
            parts.append(f"{len(shown) - LIMIT} more are in the log of the run.")
        parts.append("Last logged values of the training run, on its own validation data.")
    return "\n\n".join(parts) + "\n"


def _recipe(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that decide what was learned."""
    trainer, optimizer = cfg.trainer, cfg.optimizer
    names = ("loss", "beta", "label_smoothing", "reference", "safe_weight")
    weights = ("backtrack_weight", "elicit_weight", "discourage_weight")
    settings = {name: cfg.objective.get(name) for name in (*names, *weights)}
    return {
        "made with": f"backtrack-lm {__version__}, `+experiment` settings of `{cfg.name}`",
        "started from": _name(cfg.model.path) if cfg.model.path else "random weights",
        "revision": cfg.model.revision,
        "method": method_of(cfg),
        **settings,
        "LoRA": OmegaConf.to_container(cfg.model.lora) if cfg.model.lora else "none: all weights",
        "learning rate": f"{optimizer.learning_rate:g}",
        "examples a step": cfg.data.batch_size,
        "steps": trainer.max_steps or f"{cfg.data.epochs:g} epochs",
        "precision": trainer.precision,
        "seed": cfg.seed,
    }


def _data(cfg: DictConfig) -> str:
    if cfg.data.path is not None:
        return f"`{_name(cfg.data.path)}`"
    weights = cfg.data.weights or {}
    lines = [
        f"* {name}{f', weight {weights[name]:g}' if name in weights else ''}"
        + (f": `{_name(section.path)}`" if section.get("path") else "")
        for name, section in cfg.data.sources.items()
        if section is not None
    ]
    return "\n".join(lines)


def _name(path: str) -> str:
    """Return a hub id as it is, and of a path its end: a card is public, folders are not."""
    parts = str(path).split("/")
    return str(path) if len(parts) == 2 and parts[0] not in ("", ".", "..", "~") else parts[-1]


def _table(rows: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(lines)
