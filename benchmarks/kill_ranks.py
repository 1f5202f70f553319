"""What `kill -9` of one rank does: how soon the job ends, and whether its resumed run is the same.

    python benchmarks/kill_ranks.py [--strategies ddp zero2 fsdp2] [--launchers lightning torchrun]
        [--repeats 5] [--steps 60] [--seed 0] [--limit 120] [--key strategy] [--out FILE.json]

For each strategy and launcher a tiny SFT run of two ranks on the CPU is trained once undisturbed.
Then, `--repeats` times: the same run is started, a random one of its ranks is killed once
metrics.csv has reached a random step (both drawn from `--seed`), the seconds are taken until the
last process of the job has gone, and the run goes on with resume=auto. `says so` counts the jobs in
whose log somebody names the loss. The losses compared are those of the last step. A job that is not
over after `--limit` seconds is ended and counted in `hung`. `--key` is the setting that takes the
strategy's name. Prints a Markdown table; about a minute and a half a repeat on two cores.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
SAVE_EVERY = 5
LAUNCHERS = {
    "lightning": ["-m", "backtrack.train"],
    "torchrun": [
        *("-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}", "--standalone"),
        *("-m", "backtrack.train"),
    ],
}
MARK = "KILL_RANKS_JOB"
"""Environment variable by which the processes of a job are known."""

SIGNS = ("another rank has gone", "has gone: this rank ends", "Child process with PID", "SIGKILL")
"""What a log says of a loss: the library, Lightning's launcher, torchrun."""


class Kill(NamedTuple):
    """What one repeat gave."""

    rank: int
    step: int
    seconds: float
    is_hung: bool
    says_so: bool
    loss: float


class Job:
    """A run of two ranks with its log in a file."""

    def __init__(self, arguments: argparse.Namespace, setting: tuple[str, str], home: Path) -> None:
        """Start it, to leave its run below `home`."""
        strategy, launcher = setting
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.mark = f"{os.getpid()} {home} {time.monotonic()}"
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if launcher == "torchrun":
            environment["BACKTRACK_RUN_DIR"] = str(home / "run")
        self.log = home / f"log-{len(list(home.glob('log-*')))}.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    *LAUNCHERS[launcher],
                    *overrides(arguments, strategy, home),
                ],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )

    def ranks(self) -> dict[int, int]:
        """Return the processes by rank."""
        found = {}
        for pid in self.alive():
            rank = environment_of(pid).get("LOCAL_RANK")
            if rank is not None and status_of(pid)[1] == self.process.pid:
                found[int(rank)] = pid
        if found and 0 not in found:
            found[0] = self.process.pid  # Lightning's launcher is a rank itself
        return found

    def alive(self) -> list[int]:
        """Return the processes of the job that have not ended."""
        self.process.poll()
        numbers = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
        # Not those of one session: torchrun gives each rank its own.
        own = (n for n in numbers if environment_of(n).get(MARK) == self.mark)
        return [n for n in own if status_of(n)[0] != "Z"]

    def wait_for_step(self, step: int, *, limit: float = 300) -> None:
        """Return once the run has logged `step`."""
        end = time.monotonic() + limit
        while last_logged(self.home)[0] < step:
            if self.process.poll() is not None or time.monotonic() > end:
                self.end()
                raise SystemExit(f"{self.log}: step {step} did not come\n{self.log.read_text()}")
            time.sleep(0.02)

    def wait(self, *, limit: float) -> bool:
        """Return whether the last process ends within `limit` seconds."""
        end = time.monotonic() + limit
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def end(self) -> None:
        """End whatever is left."""
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def overrides(arguments: argparse.Namespace, strategy: str, home: Path) -> list[str]:
    """Return the settings of the tiny run."""
    return [
        *("+experiment=tiny_sft", "start_from=null", "resume=auto"),
        *(f"{arguments.key}={strategy}", f"trainer.devices={NUM_RANKS}", "trainer.accelerator=cpu"),
        *("model.init.hidden_size=32", "model.init.intermediate_size=64"),
        *("model.init.num_attention_heads=2", "model.init.num_key_value_heads=2"),
        *("data.batch_size=16", f"trainer.max_steps={arguments.steps}"),
        *(f"trainer.save_every_n_steps={SAVE_EVERY}", "trainer.log_every_n_steps=1"),
        *("trainer.val_every_n_steps=1000", "trainer.enable_progress_bar=false"),
        "+logger.csv.flush_logs_every_n_steps=1",
        *(f"paths.log_dir={home / 'logs'}", f"paths.cache_dir={home.parent / 'cache'}"),
        *arguments.more,
    ]


def status_of(pid: int) -> tuple[str, int]:
    """Return state and parent of a process; those of one that has ended are Z and 0."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "Z", 0
    return fields[0], int(fields[1])


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment a process was started with."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def last_logged(home: Path) -> tuple[int, float]:
    """Return the last logged step of the run below `home`, and its loss; -1 where there is none."""
    best = (-1, math.nan)
    for path in home.glob("**/csv/metrics*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("train/loss") and int(row["step"]) > best[0]:
                    best = (int(row["step"]), float(row["train/loss"]))
    return best


def finish(job: Job) -> float:
    """Return the last loss of a run that is left to end by itself."""
    code = job.process.wait()
    if code:
        raise SystemExit(f"{job.log}: ended with {code}\n{job.log.read_text()}")
    return last_logged(job.home)[1]


def kill_once(
    arguments: argparse.Namespace, setting: tuple[str, str], home: Path, draw: random.Random
) -> Kill:
    """Return what happened to a run, one rank of which was killed, and to its resumed one."""
    rank, step = draw.randrange(NUM_RANKS), draw.randrange(2, arguments.steps - 15)
    job = Job(arguments, setting, home)
    job.wait_for_step(step)
    ranks = job.ranks()
    os.kill(ranks[rank], signal.SIGKILL)
    begin = time.monotonic()
    has_ended = job.wait(limit=arguments.limit)
    seconds = time.monotonic() - begin
    job.end()
    log = job.log.read_text(errors="replace")
    loss = finish(Job(arguments, setting, home))
    says_so = any(sign in log for sign in SIGNS)
    return Kill(rank, step, seconds, not has_ended, says_so, loss)


def row(setting: tuple[str, str], whole: float, kills: list[Kill]) -> str:
    """Return the line of the table for one strategy and launcher."""
    seconds = [kill.seconds for kill in kills]
    ranks = ", ".join(f"{kill.rank}@{kill.step}" for kill in kills)
    furthest = max(abs(kill.loss - whole) for kill in kills)
    return (
        f"| {setting[0]} | {setting[1]} | {ranks} | {statistics.median(seconds):.1f} | "
        f"{max(seconds):.1f} | {sum(kill.is_hung for kill in kills)} | "
        f"{sum(kill.says_so for kill in kills)} of {len(kills)} | {whole:.6f} | {furthest:.1e} |"
    )


def main() -> None:
    """Run the settings one after another and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=["ddp"])
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120)
    parser.add_argument("--key", default="strategy")
    parser.add_argument("--out", type=Path, help="keeps the logs beside it; else they are deleted")
    parser.add_argument("--more", nargs="*", default=[], help="further settings of every run")
    arguments = parser.parse_args()
    if arguments.steps < 20:
        parser.error("--steps: expected at least 20")
    lines = [
        "| strategy | launcher | rank@step killed | seconds until the end, median | most | hung | "
        "says so | loss, undisturbed | largest difference after resume |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.out.resolve().with_suffix("") if arguments.out else Path(temporary)
        for setting in itertools.product(arguments.strategies, arguments.launchers):
            home = place / "-".join(setting)
            draw = random.Random(f"{arguments.seed} {setting}")
            whole = finish(Job(arguments, setting, home / "whole"))
            kills = [
                kill_once(arguments, setting, home / f"kill-{number}", draw)
                for number in range(arguments.repeats)
            ]
            lines.append(row(setting, whole, kills))
            figures[" ".join(setting)] = {"whole": whole, "kills": [k._asdict() for k in kills]}
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
