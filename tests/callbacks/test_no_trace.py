"""Callbacks that watch leave a run as it would be without them, on one rank and on two."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from backtrack.train import train
from tests.tiny_runs import (
    LORA,
    assert_same_end,
    checkpoint_of,
    config_of,
    overrides_of,
    start_command,
)

SAMPLES = "backtrack.callbacks.sample_logger.SampleLogger"
WATCHED = (
    f"+callbacks.sample_logger={{_target_: {SAMPLES}, every_n_steps: 1, num_prompts: 2, "
    "reset_bias: 2.0, max_resets: 1, max_new_tokens: 8, batch_size: 2}",
    "+callbacks.hf_export={_target_: backtrack.callbacks.hf_export.HFExport, "
    "folder: '${paths.run_dir}/best', world: null}",
    "callbacks.throughput.peak_flops_per_s=1.0e12",
)
SLOW = pytest.mark.slow
BARE = ("~callbacks.reset_monitor", "~callbacks.board", "~callbacks.throughput")


def board_of(folder):
    return EventAccumulator(str(folder)).Reload()


@pytest.mark.parametrize("experiment", [pytest.param("tiny_sft", marks=SLOW), "tiny_dpo"])
def test_watching_leaves_losses_and_weights_as_they_are(tmp_path, experiment):
    # LoRA's dropout draws from the global random state; two micro-batches make a step.
    shared = (LORA, "trainer.accumulate_grad_batches=2", f"paths.cache_dir={tmp_path / 'cache'}")
    runs = [
        train(config_of(tmp_path / name, *shared, *more, experiment=experiment))
        for name, more in (("watched", WATCHED), ("bare", BARE))
    ]
    watched, bare = (result.folder for result in runs)
    assert_same_end(watched, bare)
    for tag in ("train/loss", "val/loss"):
        curves = [[(e.step, e.value) for e in board_of(f).Scalars(tag)] for f in (watched, bare)]
        assert curves[0] == curves[1]
    assert (watched / "best" / "config.json").is_file()


def test_watching_logs_once_a_step_under_accumulation(tmp_path):
    cut = "trainer.accumulate_grad_batches=4"
    board = board_of(train(config_of(tmp_path, *WATCHED, cut, steps=2)).folder)
    for tag in ("speed/tokens_per_s", "speed/mfu", "memory/peak_gib", "data/wait_s"):
        assert len(board.Scalars(tag)) == 2, tag
    assert [event.step for event in board.Scalars("reset/auc")] == [0, 2]
    assert [event.step for event in board.Tensors("samples/0/text_summary")] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.distributed
def test_watching_on_two_ranks_ends_as_on_one(tmp_path):
    ranks = ("trainer.devices=2", "strategy=ddp", f"paths.log_dir={tmp_path / 'two'}")
    process = start_command("train", overrides_of(tmp_path, *WATCHED, *ranks))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    (two,) = [p for p in (tmp_path / "two/train/tiny_sft").iterdir() if not p.is_symlink()]
    one = train(config_of(tmp_path, *WATCHED)).folder
    assert checkpoint_of(two)["global_step"] == checkpoint_of(one)["global_step"]
    assert (two / "best" / "model.safetensors").is_file()
    boards = [board_of(folder) for folder in (one, two)]
    for tag in boards[0].Tags()["scalars"]:
        if tag.startswith("reset/"):
            curves = [[event.value for event in board.Scalars(tag)] for board in boards]
            assert curves[0] == pytest.approx(curves[1], abs=1e-3), tag
    assert {"samples/0/text_summary", "samples/1/text_summary"} <= set(boards[1].Tags()["tensors"])
