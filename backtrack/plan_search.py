"""The smallest change of a step's settings with which it fits into memory.

Settings that change no result of a run but its rounding are all that is tried: forwards a step,
recomputation, shorter rows, smaller chunks, another strategy, more devices, the host's memory.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from backtrack.memory_model import memory
from backtrack.plan_job import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

NODE = 8
"""Devices of a node, when more are suggested."""


class Limits(NamedTuple):
    """What there is: bytes of a device, and of the host of a node."""

    device: float
    host: float

    def holds(self, job: Job) -> bool:
        """Return whether a step of `job` fits."""
        needed = memory(job)
        return needed.total <= self.device and needed.host * job.devices <= self.host


class Change(NamedTuple):
    """One setting that saves memory: how it is written, what it makes of a job, how it is ranked.

    Attributes:
        overrides: For the command line; empty for none.
        values: Fields of the job.
        price: What is changed at the lower price is suggested first.
    """

    overrides: str
    values: dict[str, Any]
    price: float


def changes_of(job: Job, *, largest: int) -> Iterator[tuple[Change, ...]]:
    """Yield sets of changes to `job`, the smallest first: fewer ones, then cheaper ones.

    Args:
        job: That does not fit.
        largest: Tokens of the largest example, which no row may be shorter than.
    """
    none = Change("", {}, 0.0)
    micro = [
        Change(f"trainer.accumulate_grad_batches={n}", {"micro": n}, 1 + math.log2(n) / 100)
        for n in (job.micro * 2**k for k in range(1, 8))
        if n * job.ranks <= job.batch_size
    ]
    shorter = -(-largest // 64) * 64
    rows = [Change(f"data.max_tokens={shorter}", {"max_tokens": shorter}, 2)]
    recompute = [
        Change(f"model.gradient_checkpointing={text}", {"checkpointing": share}, 2 + share)
        for text, share in (("0.5", 0.5), ("true", 1.0))
        if share > job.checkpointing
    ]
    chunk = [Change("objective.chunk_size=256", {"chunk_size": 256}, 2)]
    knobs = [
        [none, *micro],
        [none, *(rows if shorter < job.max_tokens and job.has_fixed_rows else [])],
        [none, *recompute],
        [none, *(chunk if job.chunk_size > 256 else [])],
        [none, *_spreads(job)],
    ]
    found = (tuple(c for c in some if c.overrides) for some in itertools.product(*knobs))
    sets = [some for some in found if some and not _overlap(some)]
    yield from sorted(sets, key=lambda some: (len(some), sum(c.price for c in some)))


def _overlap(some: tuple[Change, ...]) -> bool:
    """Return whether two changes set the same field."""
    fields = [field for change in some for field in change.values]
    return len(set(fields)) < len(fields)


def _spreads(job: Job) -> Iterator[Change]:
    """Yield ways to spread the states: over the same devices, over more, or onto the host."""
    for doubled in range(7):
        ranks = job.ranks * 2**doubled
        devices = min(ranks, max(NODE, job.devices))
        nodes = -(-ranks // devices)
        for name, price in (("zero2", 3.0), ("zero3", 3.5), ("zero3_offload", 10.0)):
            if ranks == 1 and name != "zero3_offload":
                continue
            values = {"strategy": name, "devices": devices, "num_nodes": nodes}
            values["bucket_size"] = job.bucket_size or 200_000_000
            # As many examples a step: where there are more ranks, fewer forwards.
            micro = max(1, job.micro // 2**doubled)
            more = f" trainer.devices={devices} trainer.num_nodes={nodes}" if doubled else ""
            if micro != job.micro:
                values["micro"], more = micro, f"{more} trainer.accumulate_grad_batches={micro}"
            if name != job.strategy or doubled:
                yield Change(f"strategy={name}{more}", values, price + 4 * doubled)


def smallest_change(job: Job, limits: Limits, *, largest: int) -> tuple[str, Job] | None:
    """Return the overrides of the smallest change with which `job` fits, and the job; or None."""
    for some in changes_of(job, largest=largest):
        changed = job
        for change in some:
            changed = changed._replace(**change.values)
        if limits.holds(changed):
            return " ".join(change.overrides for change in some), changed
    return None
