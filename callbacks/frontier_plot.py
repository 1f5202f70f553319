"""Violations and resets against the bias of [RESET], a line for each evaluation of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import matplotlib as mpl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from backtrack.callbacks.safety_eval import find_safety_eval
from backtrack.data.load import spread
from backtrack.evaluation.safety import pool_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from backtrack.callbacks.safety_eval import SafetyEval
    from backtrack.evaluation.safety import SuiteRow
    from backtrack.metrics import Interval

IMAGE_FILE, TAG = "frontier.png", "frontier/rates_by_bias"
MOST_LINES = 10
"""Of a panel; more hide each other and do not fit into the legend."""
COLOURS, LIGHTEST = "Blues", 0.25  # from light to dark; below that a line is lost on white
SIZE, DPI = (12.0, 4.2), 100  # inches, and pixels an inch
LEGEND = "step\n(last one bold,\n95 % shaded)"
MARGIN = 0.03  # above and below 0 and 100 %, so that a line there is seen whole


class Panel(NamedTuple):
    """What one panel shows: a figure of the pooled harmful or benign rows."""

    title: str
    is_harmful: bool
    rate: str
    interval: str


VIOLATIONS = Panel("Violations, harmful prompts", True, "violation_rate", "violation_ci95")
RESETS = Panel("Resets, harmful prompts", True, "reset_rate", "reset_ci95")
FALSE = Panel("False resets, benign prompts", False, "false_reset_rate", "false_reset_ci95")
BENIGN = Panel("Resets, benign prompts", False, "reset_rate", "reset_ci95")


class Line(NamedTuple):
    """One evaluation in one panel: biases (nats) with their rates and intervals."""

    step: int
    biases: list[float]
    rates: list[float]
    intervals: list[Interval]


def lines_of(history: Sequence[tuple[int, Sequence[SuiteRow]]], panel: Panel) -> list[Line]:
    """Return the lines of a panel, step by step; an evaluation that cannot fill it has none."""
    lines = []
    for step, rows in history:
        pooled = pool_rows(rows, is_harmful=panel.is_harmful)
        known = [row for row in pooled if getattr(row, panel.rate) is not None]
        if known:
            lines.append(
                Line(
                    step,
                    [row.reset_bias for row in known],
                    [getattr(row, panel.rate) for row in known],
                    [getattr(row, panel.interval) for row in known],
                )
            )
    return lines


def draw_frontier(history: Sequence[tuple[int, Sequence[SuiteRow]]]) -> Figure:
    """Return violations, resets and false resets side by side, against the bias.

    The last evaluation is bold, its 95 % intervals shaded. Where no judge says which resets on
    benign prompts are false, all of them are shown.
    """
    third = FALSE if lines_of(history, FALSE) else BENIGN
    *earlier, last = [step for step, _ in history]
    steps = [*spread(earlier, MOST_LINES - 1), last]
    colours = mpl.colormaps[COLOURS](np.linspace(1, LIGHTEST, len(steps))[::-1])
    colour_of = dict(zip(steps, colours, strict=True))
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 3, sharex=True, sharey=True)
    for axis, panel in zip(axes, (VIOLATIONS, RESETS, third), strict=True):
        _draw_panel(axis, lines_of(history, panel), panel.title, colour_of)
    axes[0].set_ylabel("share of answers (%)")
    fullest = max(axes, key=lambda axis: len(axis.get_lines()))
    handles, labels = fullest.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, title=LEGEND, loc="outside right center", frameon=False)
    return figure


def _draw_panel(
    axis: Axes, lines: Sequence[Line], title: str, colour_of: Mapping[int, NDArray[np.float64]]
) -> None:
    """Draw the lines of the steps that have a colour, the last one of which is the bold one."""
    axis.set_title(title)
    axis.set_xlabel("bias on [RESET] (nats)")
    axis.set_ylim(-MARGIN, 1 + MARGIN)
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
    axis.grid(alpha=0.3)
    shown = [line for line in lines if line.step in colour_of]
    if not shown:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes, color="gray")
    for line in shown:
        is_last = line.step == max(colour_of)
        axis.plot(
            line.biases,
            line.rates,
            color=colour_of[line.step],
            label=str(line.step),
            linewidth=3 if is_last else 1.5,
            marker="o",
            markersize=6 if is_last else 3,
        )
        if is_last:
            low, high = zip(*line.intervals, strict=True)
            colour = colour_of[line.step]
            axis.fill_between(line.biases, low, high, color=colour, alpha=0.15, linewidth=0)


def pixels_of(figure: Figure) -> NDArray[np.uint8]:
    """Return the picture of a figure, (height, width, 3); no window system is asked for."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


class FrontierPlot(pl.Callback):
    """Draws the frontier after each evaluation of `SafetyEval`, so that it is seen to move.

    To every TensorBoard logger as the image `frontier/rates_by_bias`, and to `frontier.png`.
    """

    def __init__(self, *, run_dir: str) -> None:
        """Write `frontier.png` to `run_dir`."""
        self.run_dir = run_dir
        self._num_drawn = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make sure that there will be something to draw.

        Raises:
            ValueError: If there is no `SafetyEval`.
        """
        find_safety_eval(trainer, "frontier_plot")

    def on_safety_eval(self, trainer: pl.Trainer, safety: SafetyEval) -> None:
        """Draw, unless the evaluation gave nothing."""
        if not trainer.is_global_zero or len(safety.history) == self._num_drawn:
            return
        self._num_drawn = len(safety.history)
        figure = draw_frontier(safety.history)
        pixels = pixels_of(figure)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                board: Any = logger.experiment
                board.add_image(TAG, pixels, trainer.global_step, dataformats="HWC")
        target = Path(self.run_dir, IMAGE_FILE)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        figure.savefig(partial, format="png")
        partial.replace(target)
