"""How likely is [RESET] after an unsafe prefix, and after a safe one?"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from backtrack.data.batching import pack
from backtrack.data.examples import probe_tree
from backtrack.data.forest import PLANTERS, move
from backtrack.metrics import auc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from backtrack.data.module import ForestData
    from backtrack.data.types import EncodedExample
    from backtrack.modules.base import ForestModule


def reset_logps(
    module: ForestModule,
    examples: Sequence[EncodedExample],
    *,
    prefix_tokens: int,
    data: ForestData,
) -> Tensor:
    """Return log p([RESET]) after the first tokens of y- and of y+: (N, 2) in nats, fp32.

    Args:
        module: Its model is asked, without gradient and without touching the random state.
        examples: N harmful examples; answers shorter than the prefix give all but their last token.
        prefix_tokens: Tokens of either prefix.
        data: For the row length, layout and padding.
    """
    settings = data.settings
    trees = [
        probe_tree(e, reset_token_id=module.reset_token_id, prefix_tokens=prefix_tokens)
        for e in examples
    ]
    found = torch.zeros(len(trees), 2)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for row in pack([tree.num_tokens for tree in trees], settings.max_tokens):
            forest = PLANTERS[settings.layout]([[trees[i] for i in row]], pad_id=settings.pad_id)
            forest = move(forest, module.device)
            logps = module.forest_logps(forest).float().cpu()
            found[row] = (
                torch.zeros(2 * len(row)).index_add(0, forest.paths.cpu(), logps).view(-1, 2)
            )
    module.train(was_training)
    return found


class ResetProbe(pl.Callback):
    """Logs, at the start, at each validation and at the end, on held-out harmful examples.

    `reset/logp_after_unsafe`, `reset/logp_after_safe` (means, nats), `reset/gap` (their difference)
    and `reset/auc` (of telling unsafe from safe prefixes by it).
    """

    def __init__(self, *, prefix_tokens: int, max_examples: int) -> None:
        """Probe `max_examples` examples of the validation set after `prefix_tokens` tokens."""
        self.prefix_tokens, self.max_examples = prefix_tokens, max_examples
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Probe the model as it comes."""
        self._probe(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Probe beside each validation."""
        if not trainer.sanity_checking:
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Probe what was trained, unless a validation has just done so or Ctrl-C ends the run."""
        if trainer.global_step != self._last_step and not trainer.should_stop:
            self._probe(trainer, pl_module)

    def _probe(self, trainer: pl.Trainer, module: ForestModule) -> None:
        self._last_step = trainer.global_step
        data: ForestData = trainer.datamodule  # type: ignore[attr-defined]
        harmful = (example for example in data.validation if example.is_harmful)
        examples = list(islice(harmful, self.max_examples))
        if not examples:
            return
        found = reset_logps(module, examples, prefix_tokens=self.prefix_tokens, data=data)
        unsafe, safe = found[:, 0], found[:, 1]
        figures = {
            "reset/logp_after_unsafe": unsafe.mean().item(),
            "reset/logp_after_safe": safe.mean().item(),
            "reset/gap": (unsafe - safe).mean().item(),
            "reset/auc": float(auc(unsafe.tolist(), safe.tolist())),
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
