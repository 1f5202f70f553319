"""Decoding with the model that is being trained, whole or spread over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backtrack.generation.engine import HFEngine, decoding
from backtrack.lockstep import Lockstep
from backtrack.sharding import is_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from backtrack.data.module import ForestData
    from backtrack.modules.base import ForestModule


def lockstep_of(module: ForestModule) -> Lockstep | None:
    """Return what keeps ranks in step where they share weights; None where each has them whole."""
    if not is_sharded(module.model):
        return None
    return Lockstep(module.logits_of, module.device, lambda: decoding(module.model))


def engine_of(
    trainer: pl.Trainer, module: ForestModule, batch_size: int, lockstep: Lockstep | None
) -> HFEngine:
    """Return an engine on the model of `module`.

    Raises:
        ValueError: If the data has no tokenizer to decode with.
    """
    data: ForestData = trainer.datamodule  # type: ignore[attr-defined]
    if data.tokenizer is None:
        raise ValueError("the data module has no tokenizer to decode with")
    return HFEngine(module.model, data.tokenizer, batch_size=batch_size, forward=lockstep)
