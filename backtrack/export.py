"""A run's checkpoint as a plain folder: `python -m backtrack.export checkpoint=DIR out=DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from backtrack import CONF_DIR, runs
from backtrack.build import make_tokenizer, untrained_model
from backtrack.card import about_run
from backtrack.checkpoints import newest_complete
from backtrack.config import ConfigError, check_command_line
from backtrack.consolidate import consolidated
from backtrack.data.world import make_world, save_world
from backtrack.models import push_folder
from backtrack.modules.base import check_identity
from backtrack.saving import check_free, export_state


def export(cfg: DictConfig) -> Path:
    """Write what `cfg.checkpoint` holds as a Hugging Face folder to `cfg.out`, and return it.

    LoRA is merged. With `cfg.push_to_hub` the folder goes to that repository as well. The
    model a LoRA run started from must still be where the run found it.

    Raises:
        ConfigError: With every problem of the configuration.
        ValueError: If there is no checkpoint, or it is of another model.
    """
    expected = {"checkpoint": "the folder of a run", "out": "a new folder"}
    problems = [f"{k}: not given; expected {what}" for k, what in expected.items() if not cfg[k]]
    if problems:
        raise ConfigError(problems)
    check_free(cfg.out)
    folder, path = find_checkpoint(Path(cfg.checkpoint).expanduser())
    run = runs.load_config(folder)
    tokenizer = make_tokenizer(run)
    model = untrained_model(run, tokenizer)
    checkpoint = consolidated(path)
    check_identity(checkpoint.extra, model)
    about = about_run(run, runs.last_metrics(folder))
    out = export_state(model, tokenizer, checkpoint.model_weights, cfg.out, about=about)
    if "world" in run.data:
        save_world(make_world(**run.data.world), out)
    if cfg.push_to_hub:
        push_folder(out, cfg.push_to_hub)
    return out


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Return the run folder and the checkpoint that is named by either.

    Raises:
        ValueError: If it is neither.
    """
    if path.suffix == ".ckpt" and path.exists():
        return path.parent.parent, path
    newest = newest_complete(path / runs.CHECKPOINT.parent, runs.CHECKPOINT.name)
    if newest is not None:
        return path, newest
    if (path / "config.json").is_file():
        raise ValueError(f"checkpoint: {path} is a Hugging Face folder already; use it as it is")
    raise ValueError(
        f"checkpoint: {path} has no {runs.CHECKPOINT}; give the folder of a run "
        "(logs/<task>/<experiment>/<time>) or what lies in its checkpoints folder"
    )


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="export")
def _main(cfg: DictConfig) -> None:
    try:
        print(f"model: {export(cfg)}")
    except (ValueError, OSError) as error:
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
