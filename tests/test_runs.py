"""Run folders: names, which one a resume takes, what ranks share."""

from __future__ import annotations

import os

import pytest
from omegaconf import OmegaConf

from backtrack import runs


def config(tmp_path, **more):
    base = {
        "task": "train",
        "name": "kettles",
        "seed": 0,
        "resume": None,
        "paths": {"log_dir": str(tmp_path / "logs"), "run_dir": None},
        "trainer": {"max_steps": 4, "val_every_n_steps": 2},
        "callbacks": {"probe": {"max_examples": 4}},
    }
    return OmegaConf.merge(OmegaConf.create(base), OmegaConf.create(more))


def make_run(tmp_path, name, *, is_complete=False, checkpoint=True, **more):
    folder = tmp_path / "logs/train/kettles" / name
    (folder / "checkpoints").mkdir(parents=True)
    runs.save_config(folder, config(tmp_path, **more))
    if checkpoint:
        (folder / runs.CHECKPOINT).write_bytes(b"weights")
    if is_complete:
        (folder / runs.MODEL).mkdir()
    return folder


def test_runs_new_folders_of_one_second_differ(tmp_path):
    folders = [runs.new_folder(tmp_path) for _ in range(3)]
    assert len(set(folders)) == 3
    assert not [folder for folder in folders if "=" in folder.name]


def test_runs_without_resume_begin_anew(tmp_path):
    made = make_run(tmp_path, "2025-01-01_00-00-00")
    run = runs.open_run(config(tmp_path))
    assert run.folder != made
    assert run.checkpoint is None


def test_runs_resume_auto_takes_the_newest_that_agrees(tmp_path):
    make_run(tmp_path, "2025-01-01_00-00-00")
    wanted = make_run(tmp_path, "2025-01-02_00-00-00")
    make_run(tmp_path, "2025-01-03_00-00-00", seed=1)
    make_run(tmp_path, "2025-01-04_00-00-00", checkpoint=False)
    run = runs.open_run(config(tmp_path, resume="auto"))
    assert run == (wanted, wanted / runs.CHECKPOINT, False)
    assert runs.open_run(config(tmp_path, resume="auto", seed=2)).checkpoint is None


def test_runs_of_one_second_are_ordered_by_number_not_by_letter(tmp_path):
    for number in ("", "-2", "-9"):
        make_run(tmp_path, f"2025-01-01_00-00-00{number}")
    newest = make_run(tmp_path, "2025-01-01_00-00-00-10")
    assert runs.open_run(config(tmp_path, resume="auto")).folder == newest


def test_runs_resume_auto_recognises_a_complete_run(tmp_path):
    make_run(tmp_path, "2025-01-01_00-00-00", is_complete=True)
    assert runs.open_run(config(tmp_path, resume="auto")).is_complete


def test_runs_that_were_named_by_hand_are_as_old_as_their_configuration(tmp_path):
    named = make_run(tmp_path, "job-481234")
    os.utime(named / runs.CONFIG_FILE, (0, 0))
    stamped = make_run(tmp_path, "2025-01-01_00-00-00")
    assert runs.open_run(config(tmp_path, resume="auto")).folder == stamped
    os.utime(named / runs.CONFIG_FILE)
    assert runs.open_run(config(tmp_path, resume="auto")).folder == named


def test_runs_agree_whatever_is_logged_and_when_it_is_validated(tmp_path):
    made = make_run(tmp_path, "2025-01-01_00-00-00")
    cfg = config(
        tmp_path, resume="auto", trainer={"val_every_n_steps": 9}, callbacks={"probe": None}
    )
    assert runs.open_run(cfg).folder == made


def test_runs_resume_of_another_configuration_names_its_keys(tmp_path):
    made = make_run(tmp_path, "2025-01-01_00-00-00")
    cfg = config(tmp_path, resume=str(made), seed=3, trainer={"max_steps": 9})
    with pytest.raises(ValueError, match=r"resume: .*\(seed, trainer\.max_steps\)"):
        runs.open_run(cfg)
    assert runs.open_run(config(tmp_path, resume=str(made))).checkpoint == made / runs.CHECKPOINT


def test_runs_resume_of_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"resume: .* has no checkpoints/last\.ckpt"):
        runs.open_run(config(tmp_path, resume=str(tmp_path)))
    damaged = make_run(tmp_path, "2025-01-01_00-00-00")
    (damaged / runs.CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=r"no readable config\.yaml"):
        runs.open_run(config(tmp_path, resume=str(damaged)))


def test_runs_share_their_folder_with_ranks_only_meanwhile(tmp_path, monkeypatch):
    monkeypatch.delenv(runs.RUN_DIR_VARIABLE, raising=False)
    folder = runs.new_folder(tmp_path)
    with runs.shared_with_ranks(folder):
        assert runs.open_run(config(tmp_path)) == (folder, None, False)
        assert runs.open_run(config(tmp_path, resume="auto")) == (folder, None, False)
    assert runs.RUN_DIR_VARIABLE not in os.environ
    assert runs.open_run(config(tmp_path)).folder != folder


def test_runs_ranks_of_a_resumed_run_take_its_checkpoint(tmp_path):
    made = make_run(tmp_path, "2025-01-01_00-00-00")
    with runs.shared_with_ranks(made):
        assert runs.open_run(config(tmp_path, resume="auto")).checkpoint == made / runs.CHECKPOINT
        assert runs.open_run(config(tmp_path)).checkpoint is None


def test_runs_of_processes_started_by_hand_must_be_told_their_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"WORLD_SIZE: 4 processes .* BACKTRACK_RUN_DIR"):
        runs.open_run(config(tmp_path))
    monkeypatch.setenv(runs.RUN_DIR_VARIABLE, str(tmp_path / "new"))
    assert runs.open_run(config(tmp_path)).folder.is_dir()


def test_runs_latest_leads_to_the_newest_and_can_be_moved(tmp_path):
    for _ in range(2):
        folder = runs.new_folder(tmp_path)
        runs.point_latest(folder)
        assert (tmp_path / "latest").resolve() == folder
    assert len(list(tmp_path.iterdir())) == 3


def test_runs_keep_every_log_of_a_run_that_goes_on_twice(tmp_path):
    (tmp_path / "csv").mkdir()
    for text in ("one", "two"):
        (tmp_path / "csv/metrics.csv").write_text(text)
        runs.keep_log(tmp_path)
    texts = sorted(path.read_text() for path in (tmp_path / "csv").iterdir())
    assert texts == ["one", "two"]
