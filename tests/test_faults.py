"""A rank that has lost another one ends, soon, and says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader, Dataset

from backtrack.faults import LAUNCHER_VARIABLE, leave_signals_to_the_trainer, lost_rank
from tests.tiny_runs import checkpoint_of, overrides_of, start_command

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", LAUNCHER_VARIABLE, "SLURM_PROCID")

# Starts itself as its child, which says that it is there; both then wait to be killed.
FAMILY = """
import os, subprocess, sys, time
from backtrack.faults import die_with_parent
if len(sys.argv) == 1:
    with die_with_parent():
        command = [sys.executable, __file__, "child"]
        settings = dict(entry.split("=") for entry in os.environ["CHILD"].split())
        subprocess.Popen(command, env={**os.environ, **settings})
        time.sleep(60)
else:
    if os.environ.get("LATE"):
        print("early", flush=True)
        while os.getppid() == int(os.environ["BACKTRACK_LAUNCHER_PID"]):
            time.sleep(0.02)
    with die_with_parent():
        print("there", os.getpid(), flush=True)
        time.sleep(0 if os.environ.get("DONE") else 8)
    time.sleep(4)
    print("lived on", flush=True)
"""


@pytest.fixture
def family(tmp_path):
    """Kills a parent, and returns what its child printed, and for how many seconds it went on."""
    program = tmp_path / "family.py"
    program.write_text(FAMILY)

    def kill(child):
        clean = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
        settings = {**clean, "CHILD": child, "PYTHONPATH": str(ROOT)}
        parent = subprocess.Popen(
            [sys.executable, str(program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=settings,
        )
        first = parent.stdout.readline()
        parent.kill()
        begin = time.monotonic()
        rest = parent.stdout.read()  # until the child has closed it as well
        seconds = time.monotonic() - begin
        parent.wait()
        parent.stdout.close()
        return first + rest, seconds

    return kill


@pytest.mark.parametrize("child", ["LOCAL_RANK=1", "LOCAL_RANK=0 TORCHELASTIC_RUN_ID=x"])
def test_rank_dies_with_its_launcher_and_says_so(family, child):
    said, seconds = family(child)
    assert said.startswith("there")
    assert "lived on" not in said
    assert f"rank {child[11]}: the process that started it has gone" in said
    assert seconds < 3


def test_rank_that_lost_its_launcher_before_it_looked_ends_at_once(family):
    said, seconds = family("LOCAL_RANK=1 LATE=1")
    assert "the process that started it has gone" in said
    assert "lived on" not in said
    assert seconds < 3


@pytest.mark.slow
@pytest.mark.parametrize("child", ["DONE=1 LOCAL_RANK=1", "LOCAL_RANK=0"])
def test_process_that_is_through_or_has_no_launcher_lives_on(family, child):
    said, _ = family(child)
    assert "has gone" not in said
    assert "lived on" in said


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:31363: Connection reset by peer",
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31363",
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation",
        "Connection was likely closed. Did the remote server shutdown or crash?",
        "NCCL error in: ProcessGroupNCCL.cpp:4171, remote process exited or there was a network "
        "error, NCCL version 2.27.5\nncclRemoteError: A call failed possibly due to a network",
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_lost_rank_is_told_by_the_words_of_gloo_nccl_and_the_store(text, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    said = lost_rank(RuntimeError(text))
    assert said.startswith("rank 3: another rank has gone")
    assert "resume=auto" in said
    assert "\n" not in said


def test_lost_rank_looks_at_the_cause_and_leaves_other_errors_alone():
    error = KeyError("loss")
    error.__cause__ = RuntimeError("Connection closed by peer")
    assert lost_rank(error) is not None
    assert lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_rank(ValueError("Connection closed by peer")) is None


PAIR = """
import datetime, os, signal, sys
import torch, torch.distributed as dist
from backtrack.faults import lost_rank
rank, collective = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
value = torch.ones(8)
calls = {
    "all_reduce": lambda: dist.all_reduce(value),
    "broadcast": lambda: dist.broadcast(value, src=1),
    "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.ones(4), value),
    "all_gather": lambda: dist.all_gather_into_tensor(torch.ones(16), value),
    "objects": lambda: dist.all_gather_object([None, None], "x"),
    "barrier": dist.barrier,
}
for step in range(4):
    if (rank, step) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        calls[collective]()
    except RuntimeError as error:
        sys.exit(f"error: {lost_rank(error)}")
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "collective",
    ["all_reduce", "broadcast", "reduce_scatter", "all_gather", "objects", "barrier"],
)
def test_lost_rank_is_told_in_every_collective_of_gloo(tmp_path, collective, free_port):
    ranks = []
    for rank in range(2):
        settings = {"RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
        settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", PAIR, collective],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **settings},
            )
        )
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert ranks[1].returncode == -signal.SIGKILL
    assert "error: rank 0: another rank has gone" in said[0]


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class KillAt(pl.Callback):
    """`kill -9` of rank `rank` in optimiser step `step`, from 0, before it is done."""

    def __init__(self, *, rank: int, step: int) -> None:
        self.place = (rank, step)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == self.place:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_job_within_a_minute_and_says_so(tmp_path, rank):
    kill = f"+callbacks.kill={{_target_: tests.test_faults.KillAt, rank: {rank}, step: 5}}"
    ranks = ("trainer.devices=2", "strategy=ddp")
    begin = time.monotonic()
    process = start_command("train", overrides_of(tmp_path, kill, *ranks, steps=400))
    _, stderr = process.communicate(timeout=180)  # returns once the last rank has ended
    assert time.monotonic() - begin < 120, "two starts, and at most a minute"
    assert process.returncode != 0
    assert any(
        sign in stderr
        for sign in ("another rank has gone", "has gone: this rank ends", "Child process with PID")
    ), stderr
    assert "Traceback" not in stderr
    (run,) = (p for p in (tmp_path / "logs/train/tiny_sft").iterdir() if not p.is_symlink())
    assert checkpoint_of(run)["global_step"] == 4


class Numbers(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return index, os.getpid()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_to_a_whole_job_leaves_the_workers_of_a_loader_at_work(number):
    loader = DataLoader(
        Numbers(), batch_size=None, num_workers=1, worker_init_fn=leave_signals_to_the_trainer
    )
    seen = []
    for index, worker in loader:
        if index == 2:
            os.kill(int(worker), number)
        seen.append(int(index))
    assert seen == list(range(40))


def test_worker_heeds_the_second_sigterm():
    loader = DataLoader(
        Numbers(), batch_size=None, num_workers=1, worker_init_fn=leave_signals_to_the_trainer
    )
    batches = iter(loader)
    _, worker = next(batches)
    with pytest.raises(RuntimeError, match="killed by signal: Terminated"):  # noqa: PT012
        for _ in range(20):
            os.kill(int(worker), signal.SIGTERM)
            time.sleep(0.3)
