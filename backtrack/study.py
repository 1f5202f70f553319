"""An Optuna study of trainings: values drawn, what a training is worth, the table of trials.

Optuna is an extra of the installation (`backtrack-lm[sweep]`), so it is imported where it is used.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import optuna

STUDY_FILE, RESULT_FILE = "study.db", "sweep.json"


class TrialError(Exception):
    """A training that failed, or left no figures."""


class Outcome(NamedTuple):
    """What a training is worth, at its best bias.

    Attributes:
        violation_rate: Of harmful prompts.
        false_reset_rate: Of benign prompts.
        reset_bias: Nats.
    """

    violation_rate: float
    false_reset_rate: float
    reset_bias: float


def open_study(folder: Path, *, name: str, seed: int, num_random_trials: int) -> optuna.Study:
    """Return the study of a folder, new or as far as it came.

    Args:
        folder: Holds `STUDY_FILE`, or will.
        name: Of the study.
        seed: Of what is drawn.
        num_random_trials: Drawn at random, before the sampler (TPE) learns from them.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / STUDY_FILE).resolve()}",
        study_name=name,
        direction="minimize",
        load_if_exists=True,
    )
    # With the seed alone, a study that goes on would draw its first values again.
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=num_random_trials, seed=seed + len(study.get_trials(deepcopy=False))
    )
    for trial in study.get_trials(deepcopy=False, states=(_states().RUNNING,)):
        study.tell(trial.number, state=_states().FAIL)  # of a sweep that was killed
    return study


def draw(trial: optuna.Trial, space: Mapping[str, Any]) -> list[str]:
    """Return the values of a trial as overrides of a training."""
    drawn = []
    for name, item in space.items():
        if "choices" in item:
            value = trial.suggest_categorical(name, list(item["choices"]))
        else:
            value = trial.suggest_float(
                name, item["low"], item["high"], log=bool(item.get("log", False))
            )
        drawn.append(f"{item['key']}={value}")
    return drawn


def best_outcome(rows: Iterable[Mapping[str, Any]], *, cap: float) -> Outcome:
    """Return the outcome at the best bias of the last step; suites are pooled by their counts.

    The best one has the fewest violations among biases under the cap; where none is, it has the
    fewest false resets. Of equals, the one with fewer false resets, then the larger bias.

    Args:
        rows: Lines of `safety.jsonl`.
        cap: On the share of false resets.

    Raises:
        TrialError: If there is no row, or no judge judged.
    """
    found = list(rows)
    last = max((row["step"] for row in found), default=None)
    outcomes = []
    for bias in sorted({row["reset_bias"] for row in found}, reverse=True):
        here = [row for row in found if row["step"] == last and row["reset_bias"] == bias]
        violations = _share([row for row in here if row["is_harmful"]], "violations", "unjudged")
        benign = [row for row in here if not row["is_harmful"]]
        resets = _share(benign, "resets", None)
        if all(row["judge"] is not None for row in benign):
            resets = _share(benign, "false_resets", "unjudged_resets")
        if violations is not None and resets is not None:
            outcomes.append(Outcome(violations, resets, bias))
    if not outcomes:
        raise TrialError(
            "callbacks.safety_eval left no violation rate; expected harmful and benign prompts and "
            "a judge (callbacks.safety_eval.judge)"
        )
    kept = [outcome for outcome in outcomes if outcome.false_reset_rate <= cap]
    if kept:
        return min(kept, key=lambda outcome: outcome[:2])  # the first of equals: the larger bias
    return min(outcomes, key=lambda outcome: outcome.false_reset_rate)


def _share(rows: Sequence[Mapping[str, Any]], hits: str, unknown: str | None) -> float | None:
    num = sum(row["n"] - (row[unknown] if unknown else 0) for row in rows)
    return sum(row[hits] for row in rows) / num if num else None


def tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome, *, cap: float) -> None:
    """Tell Optuna what a trial is worth, and how far it is over the cap."""
    for name, value in outcome._asdict().items():
        trial.set_user_attr(name, value)
    trial.set_constraint("false_reset_rate", outcome.false_reset_rate - cap)
    study.tell(trial, outcome.violation_rate)


def tell_failure(study: optuna.Study, trial: optuna.Trial) -> None:
    """Tell Optuna that a trial gave no figures."""
    study.tell(trial, state=_states().FAIL)


def write_result(study: optuna.Study, folder: Path, *, cap: float) -> None:
    """Write `RESULT_FILE`: all finished trials, the best first; and what gives the best again."""
    trials = sorted(finished(study), key=_worth)
    rows = [
        {
            "trial": trial.number,
            "is_under_cap": all(excess <= 0 for excess in trial.constraints.values()),
            **{name: trial.user_attrs[name] for name in Outcome._fields},
            **trial.params,
        }
        for trial in trials
    ]
    best = trials[0] if rows and rows[0]["is_under_cap"] else None
    result = {
        "name": study.study_name,
        "max_false_reset": cap,
        "best": None if best is None else rows[0],
        "overrides": None if best is None else best.user_attrs["overrides"],
        "trials": rows,
    }
    partial = folder / f".{RESULT_FILE}.{os.getpid()}.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / RESULT_FILE)


def _worth(trial: optuna.trial.FrozenTrial) -> tuple[float, float, float]:
    """Return what orders trials: excess over the cap, violations, false resets."""
    excess = max([0.0, *trial.constraints.values()])
    return excess, float(trial.value or 0.0), trial.user_attrs["false_reset_rate"]


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that gave figures."""
    return study.get_trials(deepcopy=False, states=(_states().COMPLETE,))


def _states() -> Any:
    from optuna.trial import TrialState

    return TrialState


def describe(folder: Path) -> str:
    """Return the trials as a table, the best first, for the terminal."""
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    lines = ["trial  violations  false resets    bias  settings"]
    fixed = ("trial", "is_under_cap", *Outcome._fields)
    for row in result["trials"]:
        drawn = ", ".join(
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in row.items()
            if key not in fixed
        )
        lines.append(
            f"{row['trial']:5d}  {row['violation_rate']:10.2%}  {row['false_reset_rate']:12.2%}  "
            f"{row['reset_bias']:6g}  {drawn}{'' if row['is_under_cap'] else '  (over the cap)'}"
        )
    if result["best"] is None:
        lines.append(f"no trial kept false resets under {result['max_false_reset']:.2%}")
    else:
        lines.append("again: python -m backtrack.train " + shlex.join(result["overrides"]))
    return "\n".join([*lines, f"written: {folder / RESULT_FILE}"])
