"""A run stops when false resets are surely too many, time after time, and not before."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from backtrack.callbacks.early_stop_on_false_resets import EarlyStopOnFalseResets, false_resets
from backtrack.callbacks.safety_eval import SafetyEval
from backtrack.evaluation.safety import Counts, SuiteRow
from backtrack.metrics import wilson_interval
from backtrack.train import train
from tests.callbacks.test_safety_eval import SETTINGS
from tests.tiny_runs import checkpoint_of, config_of


def rows_of(num_false, judge="j", n=50):
    """Two benign suites of n answers; `num_false` resets for nothing and two more in the first."""
    counts = Counts(n=n, resets=num_false + 2, false_resets=num_false if judge else 0)
    return [
        SuiteRow("h", True, 0.0, judge, Counts(n=n, resets=n)),
        SuiteRow("b", False, 0.0, judge, counts),
        SuiteRow("c", False, 0.0, judge, Counts(n=n)),
        SuiteRow("b", False, 2.0, judge, Counts(n=n, resets=n, false_resets=n)),
    ]


class Run:
    def __init__(self, tmp_path, **settings):
        self.callback = EarlyStopOnFalseResets(
            **{"limit": 0.1, "bias": 0.0, "patience": 2, **settings}
        )
        self.saved = []
        self.trainer = SimpleNamespace(
            global_step=0,
            should_stop=False,
            checkpoint_callback=SimpleNamespace(dirpath=str(tmp_path)),
            save_checkpoint=lambda path, weights_only: self.saved.append((path.name, weights_only)),
        )
        self.safety = SimpleNamespace(history=[])

    def evaluate(self, *rates, **kinds):
        """Return, for each evaluation, whether the run has stopped after it."""
        found = []
        for num_false in rates:
            self.trainer.global_step += 10
            if num_false is not None:
                rows = rows_of(num_false, **kinds)
                self.safety.history.append((self.trainer.global_step, rows))
            self.callback.on_safety_eval(self.trainer, self.safety)
            found.append(self.trainer.should_stop)
        return found


def test_rate_is_over_all_benign_suites_at_the_bias():
    found = false_resets(rows_of(20), 0.0)
    assert found.rate == 20 / 100
    assert found.low == wilson_interval(20, 100).low
    assert false_resets(rows_of(20), 2.0).rate == 1.0
    assert false_resets(rows_of(20)[:1], 0.0) is None


def test_without_a_judge_every_benign_reset_counts():
    assert false_resets(rows_of(20, judge=None), 0.0).rate == 22 / 100


def test_run_stops_after_patience_evaluations_above_the_limit(tmp_path, caplog):
    run = Run(tmp_path)
    assert run.evaluate(30, 0, 30, 30) == [False, False, False, True]
    assert run.saved == [("last.ckpt", False)]
    (message,) = [r.getMessage() for r in caplog.records]
    assert message == (
        "stopping after step 40: at bias 0, 30.0 % of the benign answers are reset for nothing, "
        "and for 2 evaluations in a row that was surely (95 %) more than the 10.0 % of "
        "callbacks.early_stop_on_false_resets.limit"
    )


def test_lower_bound_decides_not_the_rate(tmp_path):
    # Of 100 answers: the lower bound of 16 is 10.1 %, that of 15 is 9.3 %.
    assert wilson_interval(15, 100).low < 0.1 < wilson_interval(16, 100).low
    assert Run(tmp_path).evaluate(15, 15, 15) == [False] * 3
    assert Run(tmp_path).evaluate(16, 16) == [False, True]


def test_failed_evaluation_neither_counts_nor_forgives(tmp_path):
    assert Run(tmp_path).evaluate(30, None, None, 30) == [False, False, False, True]


def test_model_as_it_came_does_not_count(tmp_path):
    run = Run(tmp_path, patience=1)
    run.safety.history.append((0, rows_of(50)))
    run.callback.on_safety_eval(run.trainer, run.safety)
    assert not run.trainer.should_stop
    assert run.evaluate(30) == [True]


def test_limit_of_one_never_stops(tmp_path):
    assert Run(tmp_path, limit=1.0).evaluate(50, 50, 50) == [False] * 3


def test_run_that_was_stopped_is_left_alone(tmp_path, caplog):
    run = Run(tmp_path)
    run.evaluate(30, 30, 30)
    assert len(run.saved) == len(caplog.records) == 1


def test_values_out_of_range_are_refused():
    for wrong in ({"limit": 1.5}, {"limit": -0.1}, {"patience": 0}):
        with pytest.raises(ValueError, match=r"early_stop_on_false_resets: .*expected a limit"):
            EarlyStopOnFalseResets(**{"limit": 0.1, "bias": 0.0, "patience": 2, **wrong})


def test_bias_must_be_one_that_is_measured():
    trainer = SimpleNamespace(callbacks=[SafetyEval(**SETTINGS)])  # 0 and 40
    EarlyStopOnFalseResets(limit=0.1, bias=40.0, patience=1).setup(trainer, None, "fit")
    with pytest.raises(ValueError, match=r"bias: 1\.0 is not measured; .*\[0\.0, 40\.0\]"):
        EarlyStopOnFalseResets(limit=0.1, bias=1.0, patience=1).setup(trainer, None, "fit")
    with pytest.raises(ValueError, match="which is left out"):
        EarlyStopOnFalseResets(limit=0.1, bias=0.0, patience=1).setup(
            SimpleNamespace(callbacks=[]), None, "fit"
        )


@pytest.mark.slow
def test_training_ends_at_the_evaluation_that_says_so(tmp_path, caplog):
    more = (
        "callbacks=watch",
        "callbacks.safety_eval.biases=[0,40]",
        "callbacks.safety_eval.every_n_steps=1",
        "callbacks.safety_eval.max_new_tokens=2",
        "callbacks.early_stop_on_false_resets.limit=0.05",
        "callbacks.early_stop_on_false_resets.bias=40",
    )
    with caplog.at_level(logging.WARNING):
        result = train(config_of(tmp_path, *more, steps=6))
    assert checkpoint_of(result.folder)["global_step"] == 2
    state = checkpoint_of(result.folder)["callbacks"]["SafetyEval"]
    assert [step for step, _ in state["history"]] == [0, 1, 2]
    assert "stopping after step 2: at bias 40, 100.0 %" in caplog.text
