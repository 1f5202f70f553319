"""SIGTERM and SIGUSR1 end a run after its step, with a checkpoint, and may requeue its job."""

from __future__ import annotations

import os
import signal
import stat
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from backtrack.callbacks.interrupt import GracefulInterrupt
from backtrack.callbacks.preemption import Preemption, slurm_job
from backtrack.train import train
from tests.tiny_runs import assert_same_end, checkpoint_of, config_of, overrides_of, start_command

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")


class Trainer(SimpleNamespace):
    """One rank; `others` holds what the other ranks would answer to each question, in order."""

    def __init__(self, *callbacks, others=(), rank=0):
        super().__init__(
            accumulate_grad_batches=2,
            should_stop=False,
            callbacks=list(callbacks),
            checkpoint_callback=SimpleNamespace(dirpath="checkpoints"),
            strategy=SimpleNamespace(reduce_boolean_decision=self.decide),
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_skip_next_val=False)),
            is_global_zero=rank == 0,
            saved=[],
            asked=0,
            others=list(others),
        )

    def decide(self, mine, all):
        assert not all
        self.asked += 1
        return mine or bool(self.others and self.others.pop(0))

    def save_checkpoint(self, path, weights_only):
        assert not weights_only
        self.saved.append(str(path))

    def end_batch(self, number):
        for callback in self.callbacks:
            callback.on_train_batch_end(self, None, None, None, number)


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(request):
    """Starts callbacks on a trainer, and gives the signals back at the end."""
    before = {number: signal.getsignal(number) for number in (TERM, USR1, INT)}
    made = []

    def start(*callbacks, **settings):
        made.extend(callbacks)
        trainer = Trainer(*callbacks, **settings)
        for callback in callbacks:
            callback.on_train_start(trainer, None)
        return trainer

    yield start
    for callback in made:
        callback.teardown(None, None, "fit")
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in for SLURM's command: notes how it was called, and ends as `code` says."""
    (tmp_path / "code").write_text("0")
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit $(cat {tmp_path}/code)\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def calls_of(folder):
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (USR1, 138)])
def test_preemption_waits_for_the_last_micro_batch_of_the_step(started, number, code):
    callback = Preemption(requeue=False)
    trainer = started(callback)
    trainer.end_batch(1)
    os.kill(os.getpid(), number)
    trainer.end_batch(2)
    assert (trainer.saved, trainer.should_stop, callback.exit_code) == ([], False, 0)
    trainer.end_batch(3)
    assert (trainer.saved, trainer.should_stop) == (["checkpoints/last.ckpt"], True)
    assert (callback.was_interrupted, callback.exit_code) == (True, code)
    trainer.end_batch(5)
    assert len(trainer.saved) == 1


def test_preemption_of_another_rank_stops_this_one_with_the_same_code(started):
    interrupt, preemption = GracefulInterrupt(), Preemption(requeue=False)
    # Any signal? Yes. SIGINT? No. SIGTERM? No. So it was SIGUSR1.
    trainer = started(interrupt, preemption, others=[True, False, False])
    trainer.end_batch(1)
    assert trainer.saved
    assert (interrupt.was_interrupted, preemption.was_interrupted) == (False, True)
    assert preemption.exit_code == 138


def test_preemption_and_ctrl_c_agree_once_a_step(started):
    trainer = started(GracefulInterrupt(), Preemption(requeue=False))
    for number in range(6):
        trainer.end_batch(number)
    assert trainer.asked == 3


def test_preemption_while_saving_is_only_noted(started, caplog):
    callback = Preemption(requeue=False)
    trainer = started(callback)

    def save(path, weights_only):
        for number in (TERM, USR1, TERM):
            os.kill(os.getpid(), number)
        trainer.saved.append(path)

    trainer.save_checkpoint = save
    os.kill(os.getpid(), USR1)
    trainer.end_batch(1)
    assert len(trainer.saved) == 1
    assert callback.exit_code == 138
    assert "SIGTERM again: the run is ending already" in caplog.text


def test_preemption_requeues_after_the_save_on_rank_zero_alone(started, scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for rank, requeue, expected in [(0, True, ["requeue 77"]), (1, True, []), (0, False, [])]:
        callback = Preemption(requeue=requeue)
        trainer = started(callback, rank=rank)
        saved_first = []
        trainer.save_checkpoint = lambda path, weights_only, seen=saved_first: seen.append(
            calls_of(scontrol)
        )
        os.kill(os.getpid(), USR1)
        trainer.end_batch(1)
        assert saved_first == [[]], "the checkpoint is whole before the job is requeued"
        assert calls_of(scontrol) == expected
        callback.teardown(None, None, "fit")
        (scontrol / "calls").unlink(missing_ok=True)


def test_preemption_outside_slurm_requeues_nothing(started, scontrol):
    trainer = started(Preemption(requeue=True))
    os.kill(os.getpid(), TERM)
    trainer.end_batch(1)
    assert trainer.saved
    assert calls_of(scontrol) == []


@pytest.mark.parametrize("failure", ["code", "absent"])
def test_preemption_that_cannot_requeue_says_how_to_do_it_by_hand(
    started, scontrol, monkeypatch, caplog, failure
):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    if failure == "code":
        (scontrol / "code").write_text("3")
    else:
        monkeypatch.setenv("PATH", str(scontrol / "nothing"))
    trainer = started(Preemption(requeue=True))
    os.kill(os.getpid(), TERM)
    trainer.end_batch(1)
    assert trainer.should_stop
    assert "by hand: scontrol requeue 77" in caplog.text


def test_preemption_names_an_element_of_an_array_as_such(monkeypatch):
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "80")
    assert slurm_job() == "80"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "80")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert slurm_job() == "80_4"


class SignalAt(pl.Callback):
    """Sends rank `rank` a signal in optimiser step `step`, counted from 1."""

    def __init__(self, *, step: int, name: str, rank: int) -> None:
        self.place, self.number = (step - 1, rank), signal.Signals[name]

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.number and (trainer.global_step, trainer.global_rank) == self.place:
            os.kill(os.getpid(), self.number)
            self.number = None


def signal_at(step, name, *, rank=0):
    """Overrides; `callbacks` does not tell two runs apart."""
    target = "_target_: tests.callbacks.test_preemption.SignalAt"
    return (
        "++callbacks.preemption={_target_: backtrack.callbacks.preemption.Preemption, "
        "requeue: false}",
        f"+callbacks.signal={{{target}, step: {step}, name: {name}, rank: {rank}}}",
    )


def test_preempted_run_goes_on_and_equals_the_uninterrupted_one(tmp_path):
    more = ("trainer.accumulate_grad_batches=2",)
    before = {number: signal.getsignal(number) for number in (TERM, USR1, INT)}
    whole = train(config_of(tmp_path, *more, f"paths.log_dir={tmp_path / 'whole'}"))
    stopped = train(config_of(tmp_path, *more, *signal_at(3, "SIGUSR1")))
    assert {number: signal.getsignal(number) for number in before} == before
    assert stopped.was_interrupted
    assert stopped.model is None
    assert checkpoint_of(stopped.folder)["global_step"] == 3
    resumed = train(config_of(tmp_path, *more, "resume=auto"))
    assert resumed.folder == stopped.folder
    assert_same_end(whole.folder, resumed.folder)


def test_preemption_takes_the_signals_from_lightning_under_slurm(tmp_path, monkeypatch):
    # One task of srun, by which Lightning finds SLURM and turns its own requeueing on.
    monkeypatch.setattr(SLURMEnvironment, "detect", staticmethod(lambda: True))
    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    mine = []
    monkeypatch.setattr(
        _SignalConnector, "_slurm_sigusr_handler_fn", lambda *args: mine.append("SIGUSR1")
    )
    monkeypatch.setattr(
        _SignalConnector, "_sigterm_notifier_fn", lambda *args: mine.append("SIGTERM")
    )
    for name in ("SIGUSR1", "SIGTERM"):
        stopped = train(config_of(tmp_path, *signal_at(1, name)))
        assert checkpoint_of(stopped.folder)["global_step"] == 1
    assert mine == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_preemption_of_one_rank_ends_the_job_with_its_code(tmp_path, rank):
    ranks = ("trainer.devices=2", "strategy=ddp", "trainer.accumulate_grad_batches=2")
    command = overrides_of(tmp_path, *ranks, *signal_at(2, "SIGTERM", rank=rank))
    process = start_command("train", command)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    (run,) = (p for p in (tmp_path / "logs/train/tiny_sft").iterdir() if not p.is_symlink())
    assert checkpoint_of(run)["global_step"] == 2
    assert not (run / "model").exists()
