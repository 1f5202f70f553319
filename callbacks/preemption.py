"""SIGTERM, and SLURM's warning before the end of its time, end a run with a checkpoint.

What Lightning 2.6 does by itself, and why it is put aside: its handler of SIGTERM broadcasts from
within whatever the process is doing, a collective of the step included, and then raises, without a
checkpoint. Under srun its handler of SIGUSR1 (`SLURMEnvironment(auto_requeue=True)`, found by
itself) saves in the midst of a forward or backward pass, each rank in its own, to a file of its own
beside the run (`hpc_ckpt_1.ckpt`), which it would prefer to `resume=auto` later; then it requeues.
Lightning registers both right before training starts; `on_train_start` comes after that and takes
the signals over, so that one handler is left: it sets a flag. At the end Lightning restores what
was there before the run.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from typing import ClassVar

import lightning.pytorch as pl

from backtrack.callbacks.interrupt import GracefulInterrupt

log = logging.getLogger(__name__)

REQUEUE_TIMEOUT_S = 30.0


class Preemption(GracefulInterrupt):  # type: ignore[misc]  # mypy finds no backtrack.callbacks
    """On SIGTERM or SIGUSR1 finishes the optimiser step, saves and ends the run.

    The process then ends with 143 or 138 (128 and the signal). Further signals are only noted:
    whoever sends them ends the process by force anyway when its patience is over, and the
    checkpoint is to be whole by then. Before training starts the signals do what they always do:
    there is nothing to save.

    Under SLURM, `#SBATCH --signal=SIGUSR1@120` sends SIGUSR1 two minutes before the end of the
    job's time to the processes that srun started; that must suffice for a step, a validation that
    may be going on, and the save. torchrun hands SIGTERM on; it dies of SIGUSR1 unless it gets
    `--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1`, and waits `--shutdown-timeout`
    seconds (30) before it kills.
    """

    signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, requeue: bool) -> None:
        """Wait for a signal from the start of training on.

        Args:
            requeue: Whether rank zero puts the SLURM job back in the queue after the save; the job
                goes on where it stopped if its command says `resume=auto`. Nothing outside SLURM.
        """
        super().__init__()
        self.requeue = requeue

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over from Lightning."""
        super().on_train_start(trainer, pl_module)
        # Before each micro-batch Lightning broadcasts whether rank zero got a SIGTERM, and waits
        # for the device to read it. Its handler is gone, so the answer would always be no.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def stop(self, trainer: pl.Trainer, number: signal.Signals) -> None:
        """Save and end the run, then requeue its job."""
        super().stop(trainer, number)
        if trainer.is_global_zero and self.requeue:
            requeue_job()

    def _note_again(self, number: int) -> None:
        log.warning("%s again: the run is ending already", signal.Signals(number).name)

    def _notice(self, number: int) -> str:
        return f"{signal.Signals(number).name}: finishing this step, then saving and ending the run"


def requeue_job() -> None:
    """Put the SLURM job of this process back in the queue; a failure is a warning."""
    job = slurm_job()
    if job is None:
        return
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=REQUEUE_TIMEOUT_S, check=False
        )
        reason = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    by_hand = " ".join(command)
    if reason:
        log.warning("the job was not requeued (%s); do it by hand: %s", reason, by_hand)
    else:
        log.warning("requeued: %s", by_hand)


def slurm_job() -> str | None:
    """Return the SLURM job that this process is of, None outside SLURM.

    An element of an array is named as such: the number in SLURM_JOB_ID of its last element is also
    that of the whole array.
    """
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and element:
        return f"{array}_{element}"
    return os.environ.get("SLURM_JOB_ID")
