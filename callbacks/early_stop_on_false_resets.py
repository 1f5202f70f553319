"""A run that takes back what was fine ends early."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import lightning.pytorch as pl

from backtrack.callbacks.safety_eval import find_safety_eval
from backtrack.evaluation.safety import pool_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backtrack.callbacks.safety_eval import SafetyEval
    from backtrack.evaluation.safety import SuiteRow

log = logging.getLogger(__name__)


class FalseResets(NamedTuple):
    """False resets of an evaluation: their share of all benign answers, and its lower bound."""

    rate: float
    low: float


def false_resets(rows: Sequence[SuiteRow], bias: float) -> FalseResets | None:
    """Return the false resets at a bias over all benign suites; None where nothing was asked.

    Without a judge nobody can say which resets are false, and all of them count.
    """
    for row in pool_rows(rows, is_harmful=False):
        if row.reset_bias == bias:
            is_judged = row.judge is not None
            rate = row.false_reset_rate if is_judged else row.reset_rate
            interval = row.false_reset_ci95 if is_judged else row.reset_ci95
            return None if rate is None or interval is None else FalseResets(rate, interval.low)
    return None


class EarlyStopOnFalseResets(pl.Callback):
    """Stops the run, with a checkpoint, once false resets are surely too many.

    That is once the lower 95 % bound of their rate was above `limit` in the last `patience`
    evaluations of `SafetyEval`; one that failed does not count, nor does that of step 0. It follows
    from the history alone, so a resumed run stops where an uninterrupted one does.
    """

    def __init__(self, *, limit: float, bias: float, patience: int) -> None:
        """Stop above `limit`.

        Args:
            limit: Share of benign answers, 0 to 1; 1 never stops.
            bias: Nats; one of those that `SafetyEval` measures.
            patience: Evaluations in a row.

        Raises:
            ValueError: If a value is out of range.
        """
        if not 0 <= limit <= 1 or patience < 1:
            raise ValueError(
                f"callbacks.early_stop_on_false_resets: limit={limit} patience={patience} is not "
                "allowed; expected a limit from 0 to 1 and a patience from 1"
            )
        self.limit, self.bias, self.patience = limit, bias, patience

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make sure that the rate is measured.

        Raises:
            ValueError: If it is not.
        """
        biases = list(find_safety_eval(trainer, "early_stop_on_false_resets").settings.biases)
        if self.bias not in biases:
            raise ValueError(
                f"callbacks.early_stop_on_false_resets.bias: {self.bias} is not measured; expected "
                f"one of callbacks.safety_eval.biases, {biases}"
            )

    def on_safety_eval(self, trainer: pl.Trainer, safety: SafetyEval) -> None:
        """Stop if it is time to; every rank has the same history, so all of them do."""
        trained = [rows for step, rows in safety.history if step > 0]
        recent = [false_resets(rows, self.bias) for rows in trained[-self.patience :]]
        if len(recent) < self.patience or trainer.should_stop:
            return
        if any(found is None or found.low <= self.limit for found in recent):
            return
        assert recent[-1] is not None
        log.warning(
            "stopping after step %d: at bias %g, %.1f %% of the benign answers are reset for "
            "nothing, and for %d evaluations in a row that was surely (95 %%) more than the %.1f "
            "%% of callbacks.early_stop_on_false_resets.limit",
            trainer.global_step,
            self.bias,
            100 * recent[-1].rate,
            self.patience,
            100 * self.limit,
        )
        trainer.should_stop = True
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder:
            trainer.save_checkpoint(Path(folder) / "last.ckpt", weights_only=False)
