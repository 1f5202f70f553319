"""How this process was started: alone, or as one of many ranks that have to agree on something.

torchrun and SLURM start one process a device; each finds its number in the environment. Before
Lightning joins them they share nothing but a key-value store, which is enough to let the first rank
decide and the others follow: on a run folder above all, whose name is a time.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from omegaconf import DictConfig
    from torch.distributed.distributed_c10d import Store

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for the slowest to import its libraries and come to the first decision."""

_INTERACTIVE = ("bash", "interactive")
"""Names of jobs that Lightning takes for a user at a shell: it does not look for ranks there."""


class Launch(NamedTuple):
    """One rank of several that were started from outside.

    Attributes:
        launcher: `torchrun` or `SLURM`.
        rank: Of this process over all nodes, from 0.
        num_ranks: Over all nodes.
        attempt: How often the ranks were restarted while the launcher's own store lived on.
    """

    launcher: str
    rank: int
    num_ranks: int
    attempt: int = 0


def launch_of(environ: Mapping[str, str]) -> Launch | None:
    """Return this process's place among those of a launcher; None if no launcher started it.

    As Lightning does, takes torchrun inside a SLURM job for torchrun. Ranks that Lightning itself
    starts are none of a launcher: they inherit what they need.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return Launch(
            "torchrun",
            rank=int(environ["RANK"]),
            num_ranks=int(environ["WORLD_SIZE"]),
            attempt=int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )
    if "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in _INTERACTIVE:
        return Launch(
            "SLURM",
            rank=int(environ.get("SLURM_PROCID", 0)),
            num_ranks=int(environ["SLURM_NTASKS"]),
        )
    return None


def rank_of(environ: Mapping[str, str]) -> int:
    """Return the number of this process among the ranks of its run, as Lightning reads it."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((int(environ[name]) for name in names if name in environ), 0)


def agree(decide: Callable[[], Any]) -> Any:
    """Return what `decide` returns on the first rank; the other ranks do not call it.

    A process that no launcher started just decides. All ranks must call this equally often.

    Args:
        decide: Returns what JSON can hold.

    Raises:
        ValueError: On the other ranks, if the first one's `decide` raised; on all that come, if
            not all do within `JOIN_TIMEOUT`.
    """
    launch = launch_of(os.environ)
    if launch is None or launch.num_ranks == 1:
        return decide()
    return follow_first(_join(launch), launch.rank, decide)


def follow_first(store: Store, rank: int, decide: Callable[[], Any]) -> Any:
    """Return what `decide` returns on rank 0, through `store`; see `agree`."""
    count = store.add(f"asked by {rank}", 1)  # the n-th question of each rank is the same one
    key = f"decision {count}"
    if rank == 0:
        try:
            decision = decide()
        except BaseException:
            store.set(key, json.dumps({"failed": True}))
            raise
        store.set(key, json.dumps({"decision": decision}))
        return decision
    try:
        said = json.loads(store.get(key))
    except RuntimeError:  # gone, with the store that it served
        said = {"failed": True}
    if "failed" in said:
        raise ValueError("the first rank of this run ended with an error; see its message")
    return said["decision"]


@cache  # for as long as the process lives: under SLURM the first rank's serves all others
def _join(launch: Launch) -> Store:
    """Return a store that all ranks of `launch` share: the one that Lightning will join them by."""
    if launch.launcher == "SLURM":
        lightning = SLURMEnvironment()  # knows them by the names of nodes and job
        os.environ["MASTER_ADDR"] = lightning.main_address
        os.environ["MASTER_PORT"] = str(lightning.main_port)
    try:
        found = rendezvous("env://", launch.rank, launch.num_ranks, timeout=JOIN_TIMEOUT)
        store, _, _ = next(found)
    except RuntimeError as error:
        raise ValueError(
            f"MASTER_ADDR, MASTER_PORT: rank {launch.rank} of {launch.num_ranks} does not meet the "
            f"others there ({str(error).splitlines()[0]}); see what became of them, or whether "
            "another run uses the port"
        ) from error
    return PrefixStore(f"backtrack/{launch.attempt}", store)


def launch_problems(cfg: DictConfig, environ: Mapping[str, str]) -> list[str]:
    """Return in what a training configuration and the way it was started contradict each other.

    Args:
        cfg: Of conf/train.yaml.
        environ: Of this process.
    """
    name = cfg.strategy.name
    if name.startswith("zero") and find_spec("deepspeed") is None:
        return [
            f"strategy: {name} needs DeepSpeed, which is not installed; "
            "`pip install 'backtrack-lm[deepspeed]'`, or take fsdp2 or ddp"
        ]
    launch = launch_of(environ)
    if launch is None:
        return _shell_problems(cfg.trainer.num_nodes, environ)
    problems = _slurm_problems(launch, environ) if launch.launcher == "SLURM" else []
    if problems:
        return problems
    devices, num_nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    count = f"{launch.num_ranks} process{'' if launch.num_ranks == 1 else 'es'}"
    if launch.num_ranks > 1 and cfg.strategy.name == "single":
        return [
            f"strategy: single, but {launch.launcher} started {count} for one run; expected ddp, "
            "zero1, zero2, zero3 or fsdp2"
        ]
    if devices != "auto" and devices * num_nodes != launch.num_ranks:
        return [
            f"trainer.devices: {devices} times trainer.num_nodes={num_nodes} is not what "
            f"{launch.launcher} started, {count}; expected trainer=many_nodes, which reads both "
            "from the launcher, or one process a device"
        ]
    return []


def _slurm_problems(launch: Launch, environ: Mapping[str, str]) -> list[str]:
    """Return what would let ranks wait for each other in vain."""
    if launch.num_ranks == 1:
        return []
    if "SLURM_STEP_ID" not in environ:  # only srun sets it
        return [
            f"SLURM_NTASKS: the job has {launch.num_ranks} tasks, and this is none of them but the "
            "script; expected `srun python -m backtrack.train ...`"
        ]
    if "SLURM_NTASKS_PER_NODE" not in environ:  # Lightning insists on it
        return [
            f"SLURM_NTASKS_PER_NODE: not set for {launch.num_ranks} tasks; expected "
            "--ntasks-per-node, with the devices of a node, in place of --ntasks"
        ]
    return []


def _shell_problems(num_nodes: int, environ: Mapping[str, str]) -> list[str]:
    """Return what is wrong where no launcher is seen."""
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if num_tasks > 1 and "LOCAL_RANK" not in environ:
        return [
            f"SLURM_JOB_NAME: under the name {environ.get('SLURM_JOB_NAME')} each of {num_tasks} "
            "tasks would be a run of its own; expected `srun --job-name=train ...`"
        ]
    if num_nodes != 1:
        return [
            f"trainer.num_nodes: {num_nodes}, but no launcher started this process; expected 1, or "
            "torchrun or srun on all nodes"
        ]
    return []


def multirun_problem(cfg: DictConfig, environ: Mapping[str, str]) -> str | None:
    """Return why a job of a `--multirun` must not start its ranks itself; None if it does not.

    Lightning starts them with this command line: each would begin the whole sweep.

    Args:
        cfg: Of one job.
        environ: Of this process.
    """
    devices, num_nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    is_one = devices == 1 or (devices == "auto" and cfg.trainer.accelerator == "cpu")
    if launch_of(environ) or cfg.strategy.name == "single" or (is_one and num_nodes == 1):
        return None
    return (
        f"trainer.devices: {devices} with strategy={cfg.strategy.name} start processes by this "
        "command line, and each would begin the whole sweep; use one device a job, or start the "
        "sweep under an outer launcher (torchrun, SLURM)"
    )


class RankFilter(logging.Filter):
    """Lets the first rank log all, and the others warnings and errors, which say whose they are.

    Gives each record `rank`: empty on the first rank, `rank 3: ` on another.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is to be shown."""
        rank = rank_of(os.environ)
        record.rank = f"rank {rank}: " if rank else ""
        return not rank or record.levelno >= logging.WARNING


def error_line(error: BaseException, environ: Mapping[str, str]) -> str:
    """Return an error as a command ends with it, with the rank if it is not the first one."""
    rank = rank_of(environ)
    return f"{f'rank {rank}: ' if rank else ''}error: {error}"
