"""The best checkpoint of a run as a plain Hugging Face folder beside its last model."""

from __future__ import annotations

import logging
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from backtrack.callbacks.interrupt import GracefulInterrupt
from backtrack.checkpoints import is_complete
from backtrack.consolidate import consolidated
from backtrack.data.world import make_world, save_world
from backtrack.saving import export_state

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from backtrack.data.module import ForestData
    from backtrack.modules.base import ForestModule

log = logging.getLogger(__name__)


class HFExport(pl.Callback):
    """Writes the weights of `best_checkpoint` to a folder when training ends, LoRA merged.

    The trained weights are put aside meanwhile and come back bit for bit. A folder that an earlier
    part of a resumed run left is replaced, once the new one is whole. Rank zero writes; an error
    makes a warning, the run ends as it would have.
    """

    def __init__(self, *, folder: str, world: Mapping[str, Any] | None) -> None:
        """Write to `folder`.

        Args:
            folder: Of the exported model.
            world: Settings of the embedded world that the run is of, saved beside its model; None
                for other data.
        """
        self.folder, self.world = Path(folder), world

    def on_train_end(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Export, on rank zero; the others wait."""
        if trainer.is_global_zero:
            try:
                self._export(trainer, pl_module)
            except Exception as error:  # the last model is still to be written
                log.warning(
                    "hf_export: %s was not written (%s: %s); `python -m backtrack.export "
                    "checkpoint=FILE.ckpt` does it by hand",
                    self.folder,
                    type(error).__name__,
                    error,
                )
        trainer.strategy.barrier("the best model is exported")

    def _export(self, trainer: pl.Trainer, module: ForestModule) -> None:
        found, reason = _best_file(trainer, module)
        if found is None:
            log.warning("hf_export: %s; %s is not written", reason, self.folder)
            return
        checkpoint = consolidated(found)
        state = checkpoint.model_weights
        data: ForestData = trainer.datamodule  # type: ignore[attr-defined]
        assert data.tokenizer is not None, "runs keep the tokenizer with their data"
        partial = self.folder.with_name(f".{self.folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # by a kill while exporting
        try:
            with _lent_model(module, state) as model:
                export_state(model, data.tokenizer, state, partial)
            if self.world is not None:
                save_world(make_world(**self.world), partial)
        except BaseException:  # Ctrl-C as well: nothing half-written stays
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _put_in_place(partial, self.folder)
        step = checkpoint.extra["global_step"]
        log.info("hf_export: %s holds the model of step %d", self.folder, step)


@contextmanager
def _lent_model(module: ForestModule, state: Mapping[str, Tensor]) -> Iterator[Any]:
    """Lend a whole model whose weights `state` may replace: the trained one, or one like it."""
    model: Any = module.model
    if module.assembly is not None:  # an engine spreads its weights, or rounds them
        yield module.assembly.whole()
        return
    own = {
        name: weight.to("cpu", copy=True)
        for name, weight in model.state_dict().items()
        if name in state
    }
    try:
        yield model
    finally:
        model.load_state_dict(own, strict=False)


def _best_file(trainer: pl.Trainer, module: ForestModule) -> tuple[Path | None, str]:
    """Return the best checkpoint, or None and why there is none to export."""
    if any(isinstance(c, GracefulInterrupt) and c.was_interrupted for c in trainer.callbacks):  # type: ignore[attr-defined]
        return None, "the run was interrupted"
    watching = [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None
    ]
    if not watching:
        return None, "no checkpoint watches a metric (callbacks.best_checkpoint was left out)"
    path = watching[0].best_model_path
    if not path or not is_complete(Path(path)):
        return None, f"{watching[0].monitor} was never measured"
    return Path(path), ""


def _put_in_place(partial: Path, folder: Path) -> None:
    """Let `folder` be what `partial` is; a folder cannot be replaced in one step, as a file can."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
