"""The picture shows the pooled rates of every step, the last one bold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from backtrack.callbacks.frontier_plot import (
    BENIGN,
    FALSE,
    MOST_LINES,
    RESETS,
    TAG,
    VIOLATIONS,
    FrontierPlot,
    draw_frontier,
    lines_of,
    pixels_of,
)
from backtrack.evaluation.safety import Counts, SuiteRow
from backtrack.metrics import wilson_interval


def rows_of(step, judge="j"):
    """Two harmful suites and a benign one, at two biases given in falling order."""
    rows = []
    for bias in (2.0, -2.0):
        unsafe = max(0, 8 - step - int(bias)) // 2
        unjudged = 0 if judge else 10
        harmful = Counts(n=10, violations=unsafe, unjudged=unjudged, resets=step)
        benign = Counts(n=20, resets=4, false_resets=step % 3, unjudged_resets=0)
        rows += [SuiteRow(name, True, bias, judge, harmful) for name in ("a", "b")]
        rows.append(SuiteRow("c", False, bias, judge, benign))
    return rows


HISTORY = [(step, rows_of(step)) for step in (0, 2, 4)]


def test_lines_are_the_pooled_rates_by_rising_bias():
    first, *_, last = lines_of(HISTORY, VIOLATIONS)
    assert (first.step, first.biases, first.rates) == (0, [-2.0, 2.0], [10 / 20, 6 / 20])
    assert (last.step, last.rates) == (4, [6 / 20, 2 / 20])
    assert last.intervals == [wilson_interval(6, 20), wilson_interval(2, 20)]
    assert [line.rates for line in lines_of(HISTORY, RESETS)] == [[0, 0], [0.2, 0.2], [0.4, 0.4]]
    assert [line.rates[0] for line in lines_of(HISTORY, FALSE)] == [0, 2 / 20, 1 / 20]


def test_step_that_was_not_judged_is_missing_where_verdicts_are_shown():
    history = [HISTORY[0], (2, rows_of(2, judge=None)), HISTORY[2]]
    assert [line.step for line in lines_of(history, VIOLATIONS)] == [0, 4]
    assert [line.step for line in lines_of(history, FALSE)] == [0, 4]
    assert [line.step for line in lines_of(history, RESETS)] == [0, 2, 4]
    assert [line.step for line in lines_of(history, BENIGN)] == [0, 2, 4]


def brightness(line):
    return sum(line.get_color()[:3])


def test_lines_run_from_light_to_dark_and_the_last_is_bold_and_shaded():
    figure = draw_frontier(HISTORY)
    assert len(figure.axes) == 3
    for axis in figure.axes:
        lines = axis.get_lines()
        assert [line.get_label() for line in lines] == ["0", "2", "4"]
        shades = [brightness(line) for line in lines]
        assert shades == sorted(shades, reverse=True)
        assert len(set(shades)) == 3
        widths = [line.get_linewidth() for line in lines]
        assert widths[0] == widths[1] < widths[2]
        assert len(axis.collections) == 1  # the interval of the last step
        assert "nats" in axis.get_xlabel()
    assert "%" in figure.axes[0].get_ylabel()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["0", "2", "4"]


def test_step_has_one_colour_in_all_panels_and_only_the_last_is_bold():
    history = [*HISTORY[:2], (4, rows_of(4, judge=None))]
    violations, resets, _ = draw_frontier(history).axes
    ours, theirs = violations.get_lines(), resets.get_lines()
    assert [line.get_label() for line in ours] == ["0", "2"]
    assert [brightness(line) for line in ours] == [brightness(line) for line in theirs[:2]]
    assert {line.get_linewidth() for line in ours} == {theirs[0].get_linewidth()}
    assert not violations.collections


def test_panel_without_a_judge_says_so_and_shows_all_benign_resets():
    history = [(step, rows_of(step, judge=None)) for step in (0, 2)]
    violations, resets, benign = draw_frontier(history).axes
    assert [text.get_text() for text in violations.texts] == ["not measured"]
    assert len(resets.get_lines()) == 2
    assert benign.get_title() == "Resets, benign prompts"
    assert list(benign.get_lines()[0].get_ydata()) == [4 / 20, 4 / 20]


def test_long_run_shows_a_few_lines_spread_over_it():
    figure = draw_frontier([(step, rows_of(step % 5)) for step in range(100)])
    steps = [int(line.get_label()) for line in figure.axes[0].get_lines()]
    assert len(steps) == MOST_LINES
    assert (steps[0], steps[-1]) == (0, 99)
    gaps = np.diff(steps)
    assert gaps.max() <= 2 * gaps.min()


def test_picture_goes_to_the_board_and_to_a_file_after_each_new_evaluation(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = FrontierPlot(run_dir=str(tmp_path))
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger, object()], global_step=2)
    safety = SimpleNamespace(history=HISTORY[:2])
    callback.on_safety_eval(trainer, safety)
    trainer.global_step = 3  # an evaluation that failed: the history is as it was
    callback.on_safety_eval(trainer, safety)
    trainer.global_step, safety.history = 4, HISTORY
    callback.on_safety_eval(trainer, safety)
    logger.experiment.flush()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in board.Images(TAG)] == [2, 4]
    with Image.open(tmp_path / "frontier.png") as image:
        shown = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(shown, pixels_of(draw_frontier(HISTORY)))
    assert not list(tmp_path.glob(".*partial"))


def test_other_ranks_draw_nothing(tmp_path):
    trainer = SimpleNamespace(is_global_zero=False, loggers=[], global_step=2)
    FrontierPlot(run_dir=str(tmp_path)).on_safety_eval(trainer, SimpleNamespace(history=HISTORY))
    assert not list(tmp_path.iterdir())


def test_plot_without_safety_eval_is_an_error_at_setup(tmp_path):
    trainer = SimpleNamespace(callbacks=[])
    with pytest.raises(ValueError, match=r"callbacks\.frontier_plot: .*callbacks\.safety_eval"):
        FrontierPlot(run_dir=str(tmp_path)).setup(trainer, None, "fit")
