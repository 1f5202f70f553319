"""How TensorBoard shows a run: which curves stand together, and its row among the runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams import plugin_data_pb2  # type: ignore[import-untyped]
from torch.utils.tensorboard.summary import hparams as hparams_summaries

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from backtrack.modules.base import ForestModule

Value = str | int | float | None


class Board(pl.Callback):
    """Lays out the CUSTOM SCALARS tab and gives the run a row in the HPARAMS tab.

    Everything is written into the log of the run itself, not into a sub-folder of it, so that a
    run is one row. What the row shows of a metric is the last value logged under its tag.
    """

    def __init__(
        self,
        *,
        layout: Mapping[str, Mapping[str, Sequence[str]]],
        hparams: Mapping[str, Any],
        metrics: Sequence[str],
    ) -> None:
        """Keep what is to be written.

        Args:
            layout: Category to chart to tags; tags are regular expressions.
            hparams: Value by name. One that is null here (beta in SFT) may be set in other runs.
            metrics: Tags of the columns; regular expressions, which all of a tag must match. Plain
                ones get a column even where this run has no such value: TensorBoard takes the
                columns of whichever run it reads first.

        Raises:
            ValueError: If a metric is no regular expression.
        """
        self.layout = {
            category: {chart: ["Multiline", list(tags)] for chart, tags in charts.items()}
            for category, charts in layout.items()
        }
        self.hparams = {name: _plain(value) for name, value in hparams.items()}
        self.metrics = list(metrics)
        for pattern in self.metrics:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"callbacks.board.metrics: {pattern!r} is no regular expression ({error}); "
                    "give a tag, or quote what is special in it"
                ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the layout and the values of the hyper-parameters."""
        for writer in _writers(trainer):
            writer.add_custom_scalars(self.layout)
            start = session_start(self.hparams, Path(writer.log_dir))
            writer._get_file_writer().add_summary(start)

    def on_train_end(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Write the columns; a run that has taken all its steps is marked as complete.

        Columns only now, since only now it is known what was logged. A run that stopped early may
        go on, so it stays open.
        """
        columns = select_tags(self.metrics, trainer.callback_metrics)
        # A number for what is null, or TensorBoard would have no column for it in other runs.
        known = {name: 0.0 if value is None else value for name, value in self.hparams.items()}
        experiment, _, end = hparams_summaries(known, dict.fromkeys(columns, 0.0))  # type: ignore[no-untyped-call]
        for writer in _writers(trainer):
            writer._get_file_writer().add_summary(experiment)
            if trainer.global_step >= pl_module.num_steps:
                writer._get_file_writer().add_summary(end)


def session_start(hparams: Mapping[str, Value], folder: Path) -> Any:
    """Return the summary with the hyper-parameters of the run in `folder`.

    TensorBoard follows `latest` and finds the newest run of an experiment twice. Sessions of one
    group are one row, so the group is the run.
    """
    _, start, _ = hparams_summaries(dict(hparams), {})  # type: ignore[no-untyped-call]
    plugin_data = start.value[0].metadata.plugin_data
    content = plugin_data_pb2.HParamsPluginData.FromString(plugin_data.content)
    content.session_start_info.group_name = "/".join(folder.resolve().parts[-3:])
    plugin_data.content = content.SerializeToString()
    return start


def select_tags(patterns: Sequence[str], tags: Iterable[str]) -> list[str]:
    """Return the tags that match, in the order of the patterns, and patterns that are plain tags.

    >>> select_tags(["val/loss", "safety/.*"], ["safety/b", "safety/a", "train/loss"])
    ['val/loss', 'safety/a', 'safety/b']
    """
    known = sorted(tags)
    found: list[str] = []
    for pattern in patterns:
        found += [tag for tag in known if re.fullmatch(pattern, tag)]
        if not re.search(r"[*+?^$|()\[\]{}\\]", pattern):
            found.append(pattern)
    return list(dict.fromkeys(found))


def _writers(trainer: pl.Trainer) -> list[Any]:
    """Return the TensorBoard writers; none beyond rank zero."""
    if not trainer.is_global_zero:
        return []
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [board.experiment for board in boards]


def _plain(value: Any) -> Value:
    """Return a value as a cell shows it: numbers and text as they are, all else as text."""
    if isinstance(value, bool):
        return str(value).lower()  # torch would write a number
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "items"):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    return str(value)
