"""Ctrl-C ends a run between two steps, with a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl

if TYPE_CHECKING:
    from types import FrameType

log = logging.getLogger(__name__)


class GracefulInterrupt(pl.Callback):
    """On the first SIGINT finishes the step, saves and stops; the second one stops at once.

    The ranks agree after each optimiser step, once for all callbacks of this kind: a signal may
    reach one of them only, or several in different steps.

    Attributes:
        signals: What is waited for.
        was_interrupted: Whether the run ended this way; true on every rank, whichever got the
            signal.
        exit_code: What a process that was ended this way ends with: 128 and the number of the
            signal, as from a shell; 0 before.
    """

    signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGINT,)

    def __init__(self) -> None:
        """Wait for a signal from the start of training on."""
        self.was_interrupted = False
        self.exit_code = 0
        self._noted: set[int] = set()
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over, from Lightning as well; only a main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.signals}

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save and stop, if asked to and if the batch was the last one of its step."""
        is_step_end = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if trainer.should_stop or not is_step_end:
            return
        waiting = _waiting(trainer) or [self]
        if waiting[0] is not self:
            return  # it asks for this one too
        # The signal may reach the ranks in different steps, and a rank that stops alone hangs the
        # others.
        decide = trainer.strategy.reduce_boolean_decision
        if not decide(any(callback.was_interrupted for callback in waiting), all=False):
            return
        pairs = [(callback, number) for callback in waiting for number in callback.signals]
        asked = (pair for pair in pairs[:-1] if decide(pair[1] in pair[0]._noted, all=False))
        callback, number = next(asked, pairs[-1])
        callback.stop(trainer, number)

    def stop(self, trainer: pl.Trainer, number: signal.Signals) -> None:
        """Save and end the run, which signal `number` asked for; on all ranks alike."""
        self.was_interrupted, self.exit_code = True, 128 + number
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder:
            trainer.save_checkpoint(Path(folder) / "last.ckpt", weights_only=False)
        trainer.should_stop = True
        # Lightning validates before it stops early; who presses Ctrl-C does not want to wait.
        trainer.fit_loop.epoch_loop._skip_next_val = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back, unless Lightning has restored what was there before it began."""
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, previous)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.was_interrupted:
            self._note_again(number)
            return
        self.was_interrupted = True
        self._noted.add(number)
        log.warning("%s", self._notice(number))

    def _note_again(self, number: int) -> None:
        raise KeyboardInterrupt

    def _notice(self, number: int) -> str:
        return "interrupted: finishing this step, then saving; again to stop at once"


def _waiting(trainer: pl.Trainer) -> list[GracefulInterrupt]:
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    return [callback for callback in callbacks if isinstance(callback, GracefulInterrupt)]
