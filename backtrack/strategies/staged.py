"""Checkpoints of many files that are whole or absent, whichever engine writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from backtrack.checkpoints import (
    check,
    checksums,
    fresh_partial,
    own_files,
    partial_of,
    swap_into_place,
    write_manifest,
)

if TYPE_CHECKING:
    import os


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
            OSError: If a rank could not write; `filepath` still holds what it held before.
        """
        strategy: Any = self
        target = Path(strategy.broadcast(filepath))
        if strategy.is_global_zero:
            fresh_partial(target)
        strategy.barrier("there is room for a checkpoint")
        partial = partial_of(target)
        super().save_checkpoint(checkpoint, partial, storage_options)  # type: ignore[misc]
        strategy.barrier("a checkpoint is written")
        mine = checksums(partial, own_files(partial, rank=strategy.global_rank))
        parts: list[Any] = [mine]
        if strategy.world_size > 1:
            parts = [None] * strategy.world_size
            dist.all_gather_object(parts, mine)
        if strategy.is_global_zero:
            sums = {name: entry for part in parts for name, entry in part.items()}
            kind, world_size = self.checkpoint_kind, strategy.world_size
            write_manifest(partial, sums, kind=kind, world_size=world_size)
            swap_into_place(partial, target)
        strategy.barrier("a checkpoint is in its place")

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
