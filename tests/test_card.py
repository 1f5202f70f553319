"""A model card tells how the model was made, and nothing of the machine it was made on."""

from __future__ import annotations

from backtrack import runs
from backtrack.card import about_run
from backtrack.config import compose_config


def test_card_has_recipe_data_and_metrics(tmp_path):
    cfg = compose_config("train", ["+experiment=tiny_dpo", "start_from=null", "seed=7"])
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/metrics-1.csv").write_text("step,val/loss,speed/mfu\n1,0.5,0.9\n")
    (tmp_path / "csv/metrics.csv").write_text("step,val/loss,reset/auc\n3,0.25,\n4,,0.875\n")
    text = about_run(cfg, runs.last_metrics(tmp_path))
    lines = text.splitlines()
    for line in (
        "| started from | random weights |",
        "| method | dpo_backtrack |",
        "| beta | 0.1 |",
        "| seed | 7 |",
        "| val/loss | 0.25 |",
        "| reset/auc | 0.875 |",
        "* safety, weight 0.333",
    ):
        assert line in lines
    assert "speed/mfu" not in text, "not of the model"


def test_card_names_no_folder_of_the_machine():
    paths = ("model.path=/home/someone/models/base", "data.path=/data/secret/pairs.jsonl")
    cfg = compose_config("train", ["+experiment=smollm2_sft", *paths])
    text = about_run(cfg, {})
    assert "someone" not in text
    assert "secret" not in text
    assert "| started from | base |" in text.splitlines()
    assert "`pairs.jsonl`" in text
    cfg = compose_config("train", ["+experiment=llama3_sft"])
    assert "| started from | meta-llama/Meta-Llama-3-8B |" in about_run(cfg, {}).splitlines()
