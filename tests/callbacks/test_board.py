"""TensorBoard's own readers see one row a run, its columns, and a layout with curves in it."""

from __future__ import annotations

import re

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from backtrack.callbacks.board import Board, select_tags
from backtrack.config import compose_config
from backtrack.train import train
from tests.tiny_runs import CrashError, config_of, stop_at

CTX = RequestContext()
STATUSES = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING, api_pb2.STATUS_UNKNOWN]
# Callbacks that are not looked at here.
LESS = ("~callbacks.best_checkpoint", "~callbacks.learning_rate", "trainer.val_every_n_steps=4")


class Reader:
    """What the HPARAMS tab asks of a folder of runs."""

    def __init__(self, folder):
        self.runs = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
        provider = MultiplexerDataProvider(self.runs, str(folder))
        self.context = Context(TBContext(data_provider=provider))

    def experiment(self):
        contents = self.context.hparams_metadata(CTX, "")
        known = self.context.hparams_from_data_provider(CTX, "", limit=0)
        return self.context.experiment_from_metadata(CTX, "", True, contents, known)

    def columns(self):
        return [info.name.tag for info in self.experiment().metric_infos]

    def rows(self):
        columns = self.experiment().metric_infos
        request = api_pb2.ListSessionGroupsRequest(
            start_index=0,
            slice_size=100,
            allowed_statuses=STATUSES,
            col_params=[api_pb2.ColParams(metric=info.name) for info in columns],
        )
        return list(Handler(CTX, self.context, "", request).run().session_groups)


def value_of(row, tag):
    return next(m.value for m in row.metric_values if m.name.tag == tag)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(log folder, results): an SFT run, then two of a sweep over beta, one with accumulation."""
    folder = tmp_path_factory.mktemp("sweep")
    results = [train(config_of(folder, *LESS, steps=2))]
    for beta, num_micro in ((0.05, 1), (0.2, 2)):
        more = (f"objective.beta={beta}", f"trainer.accumulate_grad_batches={num_micro}")
        results.append(train(config_of(folder, *LESS, *more, experiment="tiny_dpo", steps=2)))
    return folder / "logs", results


def test_each_run_is_one_row_though_latest_leads_to_it_again(sweep):
    logs, results = sweep
    rows = Reader(logs).rows()
    assert sorted(row.name for row in rows) == sorted(
        "/".join(result.folder.parts[-3:]) for result in results
    )


def test_rows_hold_hyperparameters_and_the_last_value_of_each_metric(sweep):
    logs, results = sweep
    rows = {row.name: row for row in Reader(logs).rows()}
    sft, *dpo = ("/".join(result.folder.parts[-3:]) for result in results)
    assert [rows[name].hparams["beta"].number_value for name in dpo] == [0.05, 0.2]
    assert "beta" not in rows[sft].hparams  # empty in the table
    assert rows[sft].hparams["safe_weight"].number_value == 1.0
    for name, result in zip((sft, *dpo), results, strict=True):
        assert rows[name].hparams["backtrack"].string_value == "true"
        assert rows[name].hparams["objective"].string_value == name.split("_")[1].split("/")[0]
        assert {session.status for session in rows[name].sessions} == {api_pb2.STATUS_SUCCESS}
        for tag in ("val/loss", "reset/auc", "reset/gap"):
            assert value_of(rows[name], tag) == pytest.approx(result.metrics[tag], rel=1e-5)


def test_columns_are_all_of_the_configured_ones_even_where_an_sft_run_is_read_first(sweep):
    logs, _ = sweep
    columns = Reader(logs / "train" / "tiny_sft").columns()
    assert {"val/loss", "rewards/accuracies", "reset/auc", "reset/gap"} <= set(columns)
    names = {info.name: info.type for info in Reader(logs).experiment().hparam_infos}
    assert names["beta"] == api_pb2.DATA_TYPE_FLOAT64
    assert set(names) == set(compose_config("train", []).callbacks.board.hparams)


def test_layout_names_tags_that_runs_log(sweep):
    logs, results = sweep
    reader = Reader(logs)
    known = {tag for tags in reader.runs.Runs().values() for tag in tags["tensors"]}
    run = str(results[1].folder.relative_to(logs))
    (event,) = reader.runs.Tensors(run, "custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [
        "Safety",
        "Reset",
        "Loss",
        "Rewards",
        "Speed",
    ]
    lacking = {"speed/mfu", "safety/share_of_time"}  # no known peak, no safety_eval
    for category in layout.category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                if category.title != "Safety" and pattern not in lacking:
                    assert matches(pattern, known), pattern
    safety = ["safety/hazards/violation_rate/bias=-2", "benign/crafts/false_reset_rate/bias=0"]
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert matches(charts["violation rate"][0], safety) == safety[:1]
    assert matches(charts["false reset rate, benign"][0], safety) == safety[1:]


def matches(pattern, tags):
    """Tags that the CUSTOM SCALARS tab takes for a pattern (custom_scalars_plugin.py)."""
    return [tag for tag in tags if re.compile(pattern).match(tag)]


def test_a_run_that_crashed_has_a_row_and_is_not_complete(tmp_path):
    with pytest.raises(CrashError):
        train(config_of(tmp_path, *LESS, *stop_at(3, "crash"), steps=3))
    (row,) = Reader(tmp_path / "logs").rows()
    assert [session.status for session in row.sessions] == [api_pb2.STATUS_UNKNOWN]


def test_nothing_is_logged_into_a_folder_of_its_own(sweep):
    _, results = sweep
    for result in results:
        files = list(result.folder.rglob("events.out.tfevents.*"))
        assert [path.parent for path in files] == [result.folder]


def test_metrics_select_tags_in_their_order_and_plain_ones_always():
    tags = {"val/loss": 1.0, "safety/b/violation_rate/bias=0": 0.5, "train/loss": 2.0}
    patterns = ["reset/auc", "safety/.*/violation_rate/bias=.*", "val/loss"]
    assert select_tags(patterns, tags) == [
        "reset/auc",
        "safety/b/violation_rate/bias=0",
        "val/loss",
    ]
    assert select_tags(["loss"], tags) == ["loss"]  # all of a tag must match
    assert select_tags(["a/b-c=0.5"], []) == ["a/b-c=0.5"]


def test_values_that_a_cell_cannot_hold_are_written_as_text():
    board = Board(
        layout={},
        hparams={"none": None, "flag": False, "rate": 1e-3, "part": {"a": 1, "b": 0.5}, "l": [1]},
        metrics=[],
    )
    assert board.hparams == {
        "none": None,
        "flag": "false",
        "rate": 1e-3,
        "part": "a=1, b=0.5",
        "l": "[1]",
    }


def test_a_metric_that_is_no_regular_expression_is_named():
    with pytest.raises(ValueError, match=r"callbacks\.board\.metrics: 'a\(' is no regular"):
        Board(layout={}, hparams={}, metrics=["a("])
