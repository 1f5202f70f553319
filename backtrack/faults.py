"""What a rank does when another one has gone: it ends too, soon, and says why.

Who notices what (measured with `kill -9` of one of two ranks, benchmarks/kill_ranks.py):

* The other ranks, at the next collective, if a connection breaks: gloo raises at once. NCCL between
  the GPUs of one machine has no connection that breaks: it waits until the process group's timeout.
* torchrun, within a second: SIGTERM to the rest, SIGKILL 30 s later.
* Lightning's own launcher, if the lost rank is one that it started: SIGKILL to all within 5 s.
* Nobody, if the lost rank is the launcher itself (rank zero), or if torchrun is killed: the ranks
  it started go on without it. `die_with_parent` ends them.
* srun, if it was given `--kill-on-bad-exit=1`.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

log = logging.getLogger(__name__)

LAUNCHER_VARIABLE = "BACKTRACK_LAUNCHER_PID"
"""Tells the ranks that Lightning starts from this process who their parent is."""

POLL_S = 1.0

_GONE = re.compile(
    "|".join(
        [
            # gloo
            r"Connection closed by peer",
            r"Connection reset by peer",
            r"Connection refused",
            r"Broken pipe",
            r"gloo/transport/.*(Timed out|Socket)",
            r"Timed out waiting \d+ms for (send|recv) operation",
            # the store through which ranks find each other
            r"Connection was likely closed",
            r"Failed to recv, got 0 bytes",
            r"failed to connect to .*TCPStore",
            r"client socket has (failed to connect|timed out)",
            r"wait timeout after \d+ms",
            # NCCL
            r"ncclRemoteError",
            r"remote process exited or there was a network error",
            r"Connection closed by remote peer",
            r"NCCL communicator (was|is) aborted",
            r"Watchdog caught collective operation timeout",
            r"Timed out after \d+ms in ",
        ]
    ),
    re.IGNORECASE,
)


def lost_rank(error: BaseException) -> str | None:
    """Return the one sentence that a failed collective comes to; None for other errors.

    Looks at what the error was raised from as well.
    """
    seen: BaseException | None = error
    while seen is not None:
        found = _GONE.search(str(seen)) if isinstance(seen, RuntimeError) else None
        if found:
            return (
                f"rank {_rank()}: another rank has gone, or waits elsewhere ({found[0]}; see its "
                "own lines above, or its own log); start again with resume=auto"
            )
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def die_with_parent() -> Iterator[None]:
    """Meanwhile let this process end soon after the launcher that started it, if a launcher did.

    A thread looks once in `POLL_S` seconds: it works wherever Python does, and says why, which the
    kernel's own means (prctl on Linux) does not. A process that no launcher started lives on
    without its shell, and is the parent of the ranks that Lightning starts from it.
    """
    done = threading.Event()
    before = os.environ.get(LAUNCHER_VARIABLE)
    if _is_launched():
        # What Lightning started may have lost its launcher while it was importing.
        by_lightning = before is not None and "TORCHELASTIC_RUN_ID" not in os.environ
        parent = int(before) if by_lightning and before else os.getppid()
        threading.Thread(target=_watch, args=(parent, done), daemon=True).start()
    else:
        os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        done.set()  # a launcher whose rank is through may end before the others
        if before is None:
            os.environ.pop(LAUNCHER_VARIABLE, None)
        else:
            os.environ[LAUNCHER_VARIABLE] = before


def _is_launched() -> bool:
    """Return whether torchrun started this process, or a rank zero that is its launcher."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("LOCAL_RANK", "0")) > 0


def _watch(parent: int, done: threading.Event) -> None:
    while os.getppid() == parent:
        if done.wait(POLL_S):
            return
    log.error(
        "rank %s: the process that started it has gone: this rank ends; start again with "
        "resume=auto",
        _rank(),
    )
    os._exit(1)  # a rank in a collective that waits for the lost one could not be asked to end


def _rank() -> str:
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0")


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let a loader's worker live through the signals that end a run only after its step.

    A terminal and SLURM send them to all processes of a job, and the run breaks if it loses a
    worker. The second SIGTERM ends the worker: the training process sends it to one that stays.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _heed_the_next)


def _heed_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
