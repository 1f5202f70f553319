"""Log-probs of the frozen reference: one pass before training, cached by content on disk.

With backtracking k moves with the epoch, so the pass covers every (epoch, example) of the run. It
may be killed at any time and goes on where it stopped; processes that make the same pass (the ranks
of one run, say) share it.
"""

from __future__ import annotations

import itertools
import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from backtrack.data.batching import pack
from backtrack.data.forest import PLANTERS, move
from backtrack.logps import path_logps
from backtrack.modules.reference_table import (
    PartialTable,
    ReferenceTable,
    index_trees,
    load_table,
    open_table,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from backtrack.data.module import BatchSettings
    from backtrack.data.types import Tree
    from backtrack.modules.base import ForestModule

__all__ = ["ReferenceTable", "compute_table", "reference_table"]

log = logging.getLogger(__name__)

WINDOW = 128
"""Trees between two writes: what a kill loses at most, and what one process does at a time."""
SECONDS_BETWEEN_LINES = 60
SECONDS_OF_PATIENCE = 30
"""With a file system that shows one rank what another has written."""


class Ranks(NamedTuple):
    """What a rank knows of the others, where a forward takes all of them.

    Attributes:
        rank: Of this process.
        size: Number of processes.
        most: Returns the largest of a number that each rank gives.
        first_says: Returns what the first rank gives.
        barrier: Waits for all.
    """

    rank: int
    size: int
    most: Callable[[int], int]
    first_says: Callable[[Any], Any]
    barrier: Callable[[], None]


def compute_table(
    module: ForestModule,
    trees: Sequence[Tree],
    *,
    layout: str,
    pad_id: int,
    max_tokens: int,
    agree: Callable[[int], int] = int,
) -> dict[tuple[int, str], NDArray[np.float32]]:
    """Return the log-probs of every path of `trees` under the module's model, without gradient.

    Args:
        module: Its model is the reference.
        trees: At least one.
        layout: Of `PLANTERS`.
        pad_id: Fills rows.
        max_tokens: Of a row; one row is a forward.
        agree: Forwards needed -> forwards to make; more are made in vain, for ranks that need them.
    """
    table: dict[tuple[int, str], NDArray[np.float32]] = {}
    was_training = module.training
    module.eval()
    with torch.no_grad():
        rows = pack([tree.num_tokens for tree in trees], max_tokens)
        for row in itertools.islice(itertools.cycle(rows), agree(len(rows))):
            planted = [trees[number] for number in row]
            forest = PLANTERS[layout]([planted], pad_id=pad_id)
            moved = move(forest, module.device)
            logps = path_logps(module.forest_logps(moved), moved.paths, moved.num_paths)
            values = logps.float().cpu().numpy()
            for tree in planted:
                table[tree.epoch, tree.example_id] = values[: len(tree.paths)]
                values = values[len(tree.paths) :]
    module.train(was_training)
    return table


def reference_table(
    module: ForestModule,
    trees: Sequence[Tree],
    *,
    cache_dir: Path,
    address: str,
    batches: BatchSettings,
    show_progress: bool = False,
    ranks: Ranks | None = None,
) -> ReferenceTable:
    """Return the reference's log-probs of `trees`, from the cache where it holds them.

    Args:
        module: Before its first step: its model *is* the reference.
        trees: Every (epoch, example) of the run, validation included; at least one.
        cache_dir: Tables live in its folder `reference`.
        address: `models.model_fingerprint` of the reference, and the precision it is computed in.
        batches: Layout, padding and tokens of a forward pass.
        show_progress: Show a bar where standard error is a terminal; a line a minute is logged
            elsewhere.
        ranks: Given where a forward takes all ranks, which then all call this and keep step; else
            each process computes what no other one does.

    Raises:
        ValueError: If two examples have one id, or a log-prob is not a number.
    """
    dtype = str(next(module.model.parameters()).dtype)
    index = index_trees(trees, fingerprint=address, dtype=dtype)
    folder = cache_dir / "reference" / index.key
    table = open_table(folder, index)
    if ranks is not None:
        table = _as_the_first_rank(table, lambda: open_table(folder, index), ranks)
    if table is not None:
        log.info("reference log-probs of %d trees read from %s", len(table), folder)
        return table
    log.info("computing the reference log-probs of %d trees", len(trees))
    with PartialTable(folder, index) as partial:
        if ranks is None:
            fill_table(partial, module, trees, batches=batches, show_progress=show_progress)
        else:
            _fill_in_step(partial, module, trees, batches, ranks)
        if ranks is None or ranks.rank == 0:
            partial.finish()
    if ranks is not None:
        ranks.barrier()
    table = load_table(folder)
    assert table is not None
    return table


def _as_the_first_rank(
    table: ReferenceTable | None, look_again: Callable[[], ReferenceTable | None], ranks: Ranks
) -> ReferenceTable | None:
    """Return the table where the first rank has it, else None: all compute it, or none does."""
    if not ranks.first_says(table is not None):
        return None
    for _ in range(SECONDS_OF_PATIENCE):  # a shared file system may show it later
        if table is None:
            time.sleep(1)
            table = look_again()
    if table is None:
        raise ValueError(
            "paths.cache_dir: the first rank has a table of reference log-probs there which this "
            "one does not see; expected a folder that all ranks share"
        )
    return table


def fill_table(
    partial: PartialTable,
    module: ForestModule,
    trees: Sequence[Tree],
    *,
    batches: BatchSettings,
    show_progress: bool,
) -> None:
    """Compute what no process has computed or is computing, then wait for what others are."""
    starts = range(0, len(trees), WINDOW)
    windows = [range(first, min(first + WINDOW, len(trees))) for first in starts]
    missing = [window for window in windows if not partial.is_computed(window)]
    for is_waiting in (False, True):
        shown = _reported(missing, total=len(trees), is_shown=show_progress)
        for window in missing if is_waiting else shown:
            with partial.claim(window, is_waiting=is_waiting) as is_mine:
                if is_mine and not partial.is_computed(window):
                    values = _compute(module, [trees[number] for number in window], batches)
                    partial.write(window, values)


def _fill_in_step(
    partial: PartialTable,
    module: ForestModule,
    trees: Sequence[Tree],
    batches: BatchSettings,
    ranks: Ranks,
) -> None:
    """Compute what is missing, window by window and rank by rank, with equally many forwards."""
    starts = range(0, len(trees), WINDOW)
    windows = [range(first, min(first + WINDOW, len(trees))) for first in starts]
    missing = ranks.first_says([window for window in windows if not partial.is_computed(window)])
    for first in range(0, len(missing), ranks.size):
        batch = missing[first : first + ranks.size]
        window = batch[min(ranks.rank, len(batch) - 1)]  # a rank too many does the last one again
        some = [trees[number] for number in window]
        values = _compute(module, some, batches, agree=ranks.most)
        if ranks.rank < len(batch):
            partial.write(window, values)
    ranks.barrier()


def _reported(windows: Sequence[range], *, total: int, is_shown: bool) -> Iterator[range]:
    """Yield `windows`; a bar on a terminal, or a line a minute in the log, says how far it is."""
    left, done = sum(map(len, windows)), 0
    begin = said = time.perf_counter()
    with tqdm(
        total=total,
        initial=total - left,
        desc="reference",
        unit=" trees",
        disable=None if is_shown else True,  # None: where nobody looks
    ) as bar:
        for window in windows:
            yield window
            done += len(window)
            bar.update(len(window))
            now = time.perf_counter()
            if bar.disable and now - said >= SECONDS_BETWEEN_LINES:
                said, rate = now, done / (now - begin)
                log.info(
                    "reference: %d of %d trees, %.1f a second, %.0f s left",
                    total - left + done,
                    total,
                    rate,
                    (left - done) / rate,
                )


def _compute(
    module: ForestModule,
    trees: Sequence[Tree],
    batches: BatchSettings,
    agree: Callable[[int], int] = int,
) -> NDArray[np.float32]:
    table = compute_table(
        module,
        trees,
        layout=batches.layout,
        pad_id=batches.pad_id,
        max_tokens=batches.max_tokens,
        agree=agree,
    )
    found = [table[tree.epoch, tree.example_id] for tree in trees]
    broken = [tree for tree, values in zip(trees, found, strict=True) if np.isnan(values).any()]
    if broken:
        raise ValueError(
            f"model.path: the reference's log-probs of {broken[0].example_id!r} are not numbers; "
            "look for broken weights, or give another trainer.precision"
        )
    return np.concatenate(found)
