"""A run's checkpoint as a plain folder: `python -m backtrack.export checkpoint=DIR out=DIR`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from backtrack import CONF_DIR, runs
from backtrack.adapters import add_lora
from backtrack.build import make_tokenizer, model_spec
from backtrack.config import ConfigError, check_command_line
from backtrack.data.world import make_world, save_world
from backtrack.models import load_model
from backtrack.modules.base import check_identity
from backtrack.saving import check_free, export_state
from backtrack.tokens import reset_token_id

PREFIX = "model."  # ForestModule keeps the model under this name


def export(cfg: DictConfig) -> Path:
    """Write what `cfg.checkpoint` holds as a Hugging Face folder to `cfg.out`, and return it.

    LoRA is merged. The model a LoRA run started from must still be where the run found it.

    Raises:
        ConfigError: With every problem of the configuration.
        ValueError: If there is no checkpoint, or it is of another model.
    """
    expected = {"checkpoint": "the folder of a run", "out": "a new folder"}
    problems = [f"{k}: not given; expected {what}" for k, what in expected.items() if not cfg[k]]
    if problems:
        raise ConfigError(problems)
    check_free(cfg.out)
    folder, file = find_checkpoint(Path(cfg.checkpoint).expanduser())
    run = runs.load_config(folder)
    tokenizer = make_tokenizer(run)
    model: Any = load_model(model_spec(run), tokenizer, seed=run.seed)
    if run.model.lora:
        model = add_lora(model, **run.model.lora, reset_token_id=reset_token_id(tokenizer))
    checkpoint = load_checkpoint(file)
    check_identity(checkpoint, model)
    state = {
        name.removeprefix(PREFIX): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith(PREFIX)
    }
    out = export_state(model, tokenizer, state, cfg.out)
    if "world" in run.data:
        save_world(make_world(**run.data.world), out)
    return out


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Return the run folder and the file of a checkpoint named by either.

    Raises:
        ValueError: If it is neither.
    """
    if path.suffix == ".ckpt" and path.is_file():
        return path.parent.parent, path
    if (path / runs.CHECKPOINT).is_file():
        return path, path / runs.CHECKPOINT
    if (path / "config.json").is_file():
        raise ValueError(f"checkpoint: {path} is a Hugging Face folder already; use it as it is")
    raise ValueError(
        f"checkpoint: {path} has no {runs.CHECKPOINT}; give the folder of a run "
        "(logs/<task>/<experiment>/<time>) or a file in its checkpoints folder"
    )


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Return a checkpoint of `ForestModule`, on the CPU.

    Raises:
        ValueError: If the file is damaged or was not written by a run.
    """
    try:
        # Holds the random state of Python and numpy, which the weights-only reader does not take;
        # like any run folder, it must come from someone you trust.
        checkpoint = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # pickle raises whatever it stumbles over
        raise ValueError(
            f"checkpoint: {file} cannot be read ({error}); name another one"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"checkpoint: {file} holds no trained weights; name one of a run")
    return checkpoint


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="export")
def _main(cfg: DictConfig) -> None:
    try:
        print(f"model: {export(cfg)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Check the command line, then export; a problem ends in one clear message."""
    try:
        check_command_line("export", sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    _main()


if __name__ == "__main__":
    main()
