"""Killed and resumed equals uninterrupted, bit for bit on the CPU."""

from __future__ import annotations

import os
import signal

import pytest

from backtrack.train import train
from tests.tiny_runs import (
    LORA,
    CrashError,
    Recorder,
    assert_same_end,
    checkpoint_of,
    config_of,
    overrides_of,
    record,
    start_command,
    stop_at,
)

SETTINGS = {
    "sft": ("tiny_sft",),
    "sft-lora": ("tiny_sft", LORA),
    "dpo": ("tiny_dpo",),
    "dpo-lora-adapter": ("tiny_dpo", LORA, "objective.reference=adapter"),
    "dpo-lora-precomputed": ("tiny_dpo", LORA),
}
STEPS = 5
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "how", "accumulate"),
    [
        ("sft-lora", "crash", 2),
        ("dpo", "interrupt", 2),
        pytest.param("sft", "crash", 1, marks=SLOW),
        pytest.param("sft", "interrupt", 2, marks=SLOW),
        pytest.param("dpo", "crash", 2, marks=SLOW),
        pytest.param("dpo-lora-adapter", "interrupt", 2, marks=SLOW),
        pytest.param("dpo-lora-adapter", "crash", 1, marks=SLOW),
        pytest.param("dpo-lora-precomputed", "crash", 2, marks=SLOW),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, name, how, accumulate):
    experiment, *more = SETTINGS[name]
    more.append(f"trainer.accumulate_grad_batches={accumulate}")

    def run(*rest):
        cfg = config_of(tmp_path, *more, *rest, experiment=experiment, steps=STEPS)
        return train(cfg)

    whole = run(*record("whole"), f"paths.log_dir={tmp_path / 'whole'}")
    if how == "crash":
        with pytest.raises(CrashError):
            run(*stop_at(3, how))
    else:
        stopped = run(*stop_at(3, how))
        assert stopped.was_interrupted
        assert stopped.model is None
        assert checkpoint_of(stopped.folder)["global_step"] == 3
    resumed = run("resume=auto", *record("resumed"))
    begin = 2 if how == "crash" else 3  # last.ckpt is of every second step; Ctrl-C saves the third
    batches = [item for item in Recorder.seen.pop("whole") if item[0] == "batch"]
    rest = [item for item in Recorder.seen.pop("resumed") if item[0] == "batch"]
    assert len(batches) == STEPS * accumulate
    assert rest == batches[begin * accumulate :]
    assert_same_end(whole.folder, resumed.folder)
    assert [p.name for p in (tmp_path / "logs/train" / experiment).iterdir()] != []
    again = run("resume=auto")
    assert again.folder == resumed.folder, "a complete run is recognised"
    assert "recorded" not in Recorder.seen


def test_resume_after_the_last_step_only_writes_the_model(tmp_path):
    crash = "+callbacks.stop._target_=tests.tiny_runs.StopAfterValidation"
    with pytest.raises(CrashError):
        train(config_of(tmp_path, crash))
    whole = train(config_of(tmp_path, f"paths.log_dir={tmp_path / 'whole'}"))
    resumed = train(config_of(tmp_path, "resume=auto", *record("end")))
    assert Recorder.seen.pop("end") == []
    assert_same_end(whole.folder, resumed.folder)


def test_checkpoint_at_the_end_holds_the_last_step(tmp_path):
    result = train(config_of(tmp_path, "trainer.save_every_n_steps=100", steps=3))
    assert checkpoint_of(result.folder)["global_step"] == 3


def test_validation_and_probe_leave_the_training_random_state_alone(tmp_path):
    often = train(
        config_of(tmp_path, LORA, "trainer.val_every_n_steps=1", *record("often"), steps=3)
    )
    never = train(
        config_of(
            tmp_path,
            LORA,
            "~callbacks.reset_monitor",
            "data.validation_sources={}",
            "~callbacks.best_checkpoint",
            steps=3,
        )
    )
    seen = [item for item in Recorder.seen.pop("often") if item[0] != "batch"]
    assert [item[0] for item in seen] == ["before", "after"] * 3
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        assert before[1] == after[1]
    assert_same_end(often.folder, never.folder)


def wait_for(process, path, seconds=120):
    import time

    end = time.monotonic() + seconds
    while not path():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl_c"])
def test_run_that_a_signal_ends_goes_on_and_equals_the_uninterrupted_one(tmp_path, number):
    steps = 40
    more = (LORA, "trainer.accumulate_grad_batches=2", "trainer.val_every_n_steps=5")
    command = overrides_of(tmp_path, *more, steps=steps)
    process = start_command("train", command)
    home = tmp_path / "logs/train/tiny_sft"
    wait_for(process, lambda: any(home.glob("*/checkpoints/last.ckpt")))
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    second = start_command("train", [*command, "resume=auto"])
    stdout, stderr = second.communicate(timeout=240)
    assert second.returncode == 0, stderr
    folders = [path for path in home.iterdir() if not path.is_symlink()]
    assert len(folders) == 1
    assert f"model: {folders[0] / 'model'}" in stdout
    assert checkpoint_of(folders[0])["global_step"] == steps
    whole = train(config_of(tmp_path, *more, f"paths.log_dir={tmp_path / 'whole'}", steps=steps))
    assert_same_end(whole.folder, folders[0])


@pytest.mark.slow
def test_ctrl_c_that_reaches_the_workers_ends_a_run_after_its_step(tmp_path):
    # A terminal sends it to every process of the run.
    # The batches that the workers have ready are fewer than a step takes.
    more = ("data.num_workers=2", "trainer.accumulate_grad_batches=16")
    command = overrides_of(tmp_path, *more, steps=400)
    process = start_command("train", command, start_new_session=True)
    home = tmp_path / "logs/train/tiny_sft"
    wait_for(process, lambda: any(home.glob("*/checkpoints/last.ckpt")))
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)  # returns once the last process has ended
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    (run,) = (path for path in home.iterdir() if not path.is_symlink())
    assert 2 <= checkpoint_of(run)["global_step"] < 400


def test_config_of_a_run_is_saved_with_its_folder(tmp_path):
    cfg = config_of(tmp_path, steps=1)
    result = train(cfg)
    assert f"run_dir: {result.folder}" in (result.folder / "config.yaml").read_text()
    assert cfg.paths.run_dir is None, "the caller's configuration is not edited"
