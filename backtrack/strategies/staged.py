"""Checkpoints of many files that are whole or absent, whichever engine writes them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from backtrack.checkpoints import (
    all_files,
    check,
    checksums,
    fresh_partial,
    own_files,
    partial_of,
    swap_into_place,
    write_manifest,
)

SECONDS_OF_PATIENCE = 30
UNTOUCHED = (
    "the one saved before is untouched. Look for free space and permissions, then start again with "
    "resume=auto"
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable


def _wait_for_files(folder: Path, names: set[str]) -> None:
    """Wait until what other ranks wrote is seen here, as a shared file system may show it later."""
    for _ in range(SECONDS_OF_PATIENCE):
        if names <= {path.relative_to(folder).as_posix() for path in all_files(folder)}:
            return
        time.sleep(1)


def on_first_rank(strategy: Any, action: Callable[[], Any], *, remedy: str) -> None:
    """Do something on rank zero while the others wait; what it raises is raised by all of them.

    Args:
        strategy: Of Lightning.
        action: What rank zero does.
        remedy: What to do where it fails.

    Raises:
        OSError: If `action` raised any error: the others must not wait for a rank that has gone.
    """
    problem = None
    if strategy.is_global_zero:
        try:
            action()
        except Exception as error:  # whatever it is, the others have to know
            problem = f"{type(error).__name__}: {error}"
    problem = strategy.broadcast(problem)
    if problem is not None:
        raise OSError(f"checkpoint: rank 0 could not do its part ({problem}); {remedy}")


class StagedSaving:
    """A checkpoint folder is written beside its place and moved there once it is whole.

    For strategies whose ranks write the files of one folder together: a kill while they do leaves
    the checkpoint before as it was (`checkpoints.newest_complete`). To be named before the strategy
    among the bases of a class.
    """

    checkpoint_kind: str

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | os.PathLike[str],
        storage_options: Any = None,
    ) -> None:
        """Write `checkpoint` to the folder `filepath`; every rank must come here.

        Raises:
            OSError: If this rank could not write, or the first one not finish; `filepath` still
                holds what it held before.
        """
        strategy: Any = self
        target = Path(strategy.broadcast(filepath))
        on_first_rank(strategy, lambda: fresh_partial(target), remedy=UNTOUCHED)
        partial = partial_of(target)
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)  # type: ignore[misc]
        except RuntimeError as error:  # torch words a full disk so
            raise OSError(
                f"could not write the checkpoint {partial} ({error}); the one saved before is "
                "untouched. Free some space, then start again with resume=auto"
            ) from error
        strategy.barrier("a checkpoint is written")
        mine = checksums(partial, own_files(partial, rank=strategy.global_rank))
        parts: list[Any] = [mine]
        if strategy.world_size > 1:
            parts = [None] * strategy.world_size
            dist.all_gather_object(parts, mine)
        sums = {name: entry for part in parts for name, entry in part.items()}

        def seal() -> None:
            _wait_for_files(partial, set(sums))
            write_manifest(partial, sums, kind=self.checkpoint_kind, world_size=strategy.world_size)
            swap_into_place(partial, target)

        on_first_rank(strategy, seal, remedy=UNTOUCHED)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, after making sure that it is what was written; all ranks take part.

        Raises:
            ValueError: With the first file that is missing or changed.
        """
        strategy: Any = self
        path = Path(strategy.broadcast(checkpoint_path))
        check(path, rank=strategy.global_rank, num_ranks=strategy.world_size)
        state: dict[str, Any] = super().load_checkpoint(path, weights_only)  # type: ignore[misc]
        return state
