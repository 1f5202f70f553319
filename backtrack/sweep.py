"""Search settings with few violations: `python -m backtrack.sweep +experiment=tiny_dpo`.

Each trial is a training of its own process with values that Optuna draws, so it may use as many
devices as a training does. Its figures are those that `callbacks.safety_eval` measures at the last
step. The best trial has the lowest violation rate on harmful prompts at a bias of [RESET] that
keeps false resets on benign prompts under the cap. Prompts that settings were chosen by flatter
them: the last word has an evaluation on others.

    logs/sweep/<name>/<time>/   study.db (Optuna's), sweep.json (all trials, the best one first),
                                trial-<n>/ (a run folder, and train.log)
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from backtrack import CONF_DIR, runs
from backtrack.checks import check_values
from backtrack.config import ConfigError, check_command_line
from backtrack.start import resolve_start
from backtrack.study import (
    STUDY_FILE,
    Outcome,
    TrialError,
    best_outcome,
    describe,
    draw,
    finished,
    open_study,
    tell,
    tell_failure,
    write_result,
)
from backtrack.train import train

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optuna

log = logging.getLogger(__name__)

TRIAL_LOG = "train.log"
INTERRUPTED = 130
"""What a training that Ctrl-C ended exits with."""
SAFETY_FILE = "safety.jsonl"
"""What `callbacks.safety_eval` leaves in a run folder."""
NUM_LINES = 5
"""Of a failed trial's log that the error repeats."""


def sweep(cfg: DictConfig, overrides: Sequence[str]) -> Path:
    """Run the trials that are missing, and return the folder of the sweep.

    Args:
        cfg: Of conf/sweep.yaml.
        overrides: Those of the command line that led to it; trainings get them as well.

    Raises:
        ConfigError: With every problem of the configuration.
        ValueError: If trials fail one after another.
    """
    problems = settings_problems(cfg)
    if problems:
        raise ConfigError(problems)
    start = resolve_start(cfg.copy(), train)
    folder = _open_folder(cfg)
    kept = [word for word in overrides if not word.lstrip("+~").startswith(("sweep=", "sweep."))]
    if start.model.path != cfg.model.path:  # found, or trained, once for all trials
        kept.append(f"model.path={start.model.path}")
    if not any(word.startswith("callbacks=") for word in kept):
        kept.append("callbacks=watch")
    study = open_study(
        folder,
        name=cfg.name,
        seed=cfg.sweep.seed,
        num_random_trials=cfg.sweep.num_random_trials,
    )
    cap, num_failures = cfg.sweep.max_false_reset, 0
    while len(finished(study)) < cfg.sweep.num_trials:
        trial = study.ask()
        try:
            outcome = run_trial(trial, [*kept, *draw(trial, cfg.sweep.space)], folder, cfg)
        except TrialError as error:
            log.warning("trial %d failed: %s", trial.number, error)
            tell_failure(study, trial)
            num_failures += 1
            if num_failures >= cfg.sweep.max_failures:
                raise ValueError(f"{num_failures} trials in a row failed: {error}") from error
            continue
        num_failures = 0
        log.info("trial %d: %s, %s", trial.number, trial.params, outcome)
        tell(study, trial, outcome, cap=cap)
        write_result(study, folder, cap=cap)
    write_result(study, folder, cap=cap)
    runs.point_latest(folder)
    return folder


def settings_problems(cfg: DictConfig) -> list[str]:
    """Return everything that is wrong with the settings, the ends of the space included."""
    section = cfg.sweep
    problems = check_values(cfg)
    if find_spec("optuna") is None:
        problems.append("optuna: not installed; expected `pip install backtrack-lm[sweep]`")
    for key in ("num_trials", "num_random_trials", "max_failures"):
        if not isinstance(section.get(key), int) or section[key] < 1:
            problems.append(f"sweep.{key}: {section.get(key)!r}; expected a whole number from 1")
    cap = section.get("max_false_reset")
    if not isinstance(cap, int | float) or not 0 <= cap <= 1:
        problems.append(f"sweep.max_false_reset: {cap!r}; expected a number from 0 to 1")
    if OmegaConf.select(cfg, "callbacks.safety_eval") is None:
        problems.append("callbacks: no safety_eval gives figures; expected callbacks=watch")
    if cfg.resume is not None:
        problems.append("resume: of one run; a sweep goes on with sweep.folder=DIR")
    folder = section.get("folder")
    if folder is not None and not Path(folder, STUDY_FILE).is_file():
        problems.append(f"sweep.folder: {folder} has no {STUDY_FILE}; expected that of a sweep")
    if not section.get("space"):
        problems.append(
            "sweep.space: nothing is varied; expected sweep=study (grids are for "
            "`python -m backtrack.train -m +sweep=betas`)"
        )
    for name, item in (section.get("space") or {}).items():
        problems += _space_problems(cfg, f"sweep.space.{name}", item)
    return problems


def _space_problems(cfg: DictConfig, name: str, item: Any) -> list[str]:
    if not OmegaConf.is_dict(item) or set(item) not in _SPACE_KEYS:
        return [f"{name}: expected key, low, high and maybe log, or key and choices"]
    values = list(item.choices) if "choices" in item else [item.low, item.high]
    if OmegaConf.select(cfg, item.key, default=None) is None:
        return [f"{name}: there is no {item.key} in this experiment; leave it out: ~{name}"]
    if not values or ("low" in item and not 0 <= item.low < item.high):
        return [f"{name}: {values} is not allowed; expected 0 <= low < high, or choices"]
    if item.get("log") and item.low <= 0:
        return [f"{name}: a range from 0 has no logarithm; expected low above 0, or no log"]
    found: dict[str, None] = {}
    for value in values:
        tried = cfg.copy()
        OmegaConf.update(tried, item.key, value)
        found |= dict.fromkeys(check_values(tried))
    return [f"{name}: {problem}" for problem in found]


_SPACE_KEYS = ({"key", "low", "high"}, {"key", "low", "high", "log"}, {"key", "choices"})


def run_trial(
    trial: optuna.Trial, overrides: Sequence[str], folder: Path, cfg: DictConfig
) -> Outcome:
    """Train in a process of its own, and return what it is worth.

    Raises:
        TrialError: If it failed, or measured nothing.
    """
    own = folder / f"trial-{trial.number:03d}"
    own.mkdir()
    trial.set_user_attr("overrides", list(overrides))
    with (own / TRIAL_LOG).open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, "-m", "backtrack.train", *overrides],
            env={**os.environ, runs.RUN_DIR_VARIABLE: str(own.resolve())},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        lines = (own / TRIAL_LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        raise TrialError("\n".join([f"see {own / TRIAL_LOG}", *lines[-NUM_LINES:]]))
    path = own / SAFETY_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    return best_outcome(rows, cap=cfg.sweep.max_false_reset)


def _open_folder(cfg: DictConfig) -> Path:
    if cfg.sweep.folder is not None:
        return Path(cfg.sweep.folder)
    return runs.new_folder(Path(cfg.paths.log_dir, "sweep", cfg.name))


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="sweep")
def _main(cfg: DictConfig) -> None:
    try:
        print(describe(sweep(cfg, HydraConfig.get().overrides.task)))
    except (ValueError, OSError) as error:  # here: Hydra would print a traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    """Check the command line, then sweep; a problem ends in one clear message."""
    try:
        check_command_line("sweep", sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    _main()


if __name__ == "__main__":
    main()
