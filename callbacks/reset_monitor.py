"""How likely is [RESET] after an unsafe prefix, and after a safe one, on held-out examples?"""

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
    # fp32 by name: under `trainer.precision=bf16-true` it is not the default.
    found = torch.zeros(len(trees), 2, dtype=torch.float32)
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            for row in pack([tree.num_tokens for tree in trees], settings.max_tokens):
                forest = PLANTERS[settings.layout](
                    [[trees[i] for i in row]], pad_id=settings.pad_id
                )
                forest = move(forest, module.device)
                logps = module.forest_logps(forest).float().cpu()
                sums = torch.zeros(2 * len(row), dtype=torch.float32)
                found[row] = sums.index_add(0, forest.paths.cpu(), logps).view(-1, 2)
    finally:
        for part in training:
            part.training = True
    return found


class ResetMonitor(pl.Callback):
    """Logs, at the start, at each validation and at the end, on held-out harmful examples.

    After prefixes of k tokens, for each k: `reset/probability_after_unsafe/tokens=<k>` and
    `reset/probability_after_safe/tokens=<k>`, mean probabilities. After the longest prefixes:
    `reset/logp_after_unsafe`, `reset/logp_after_safe` (means, nats), `reset/gap` (their difference)
    and `reset/auc` (of telling unsafe from safe prefixes by it). `reset/probability` is the
    module's: of the training examples of each step.

    Every rank asks all examples, so that sharded weights are gathered by all ranks alike.
    """

    def __init__(self, *, prefix_tokens: Sequence[int], max_examples: int) -> None:
        """Probe `max_examples` examples of the validation set after each of the prefix lengths.

        Raises:
            ValueError: If a length or the number of examples is below 1, or no length is given.
        """
        self.prefix_tokens = sorted(prefix_tokens)
        self.max_examples = max_examples
        if not self.prefix_tokens or self.prefix_tokens[0] < 1:
            raise ValueError(
                f"callbacks.reset_monitor.prefix_tokens: {self.prefix_tokens} is not allowed; "
                "expected one or more whole numbers from 1, such as [2, 5, 10]"
            )
        if max_examples < 1:
            raise ValueError(
                f"callbacks.reset_monitor.max_examples: {max_examples} is not allowed; expected a "
                "whole number from 1, or ~callbacks.reset_monitor"
            )
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Ask the model as it comes."""
        self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Ask beside each validation."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Ask what was trained, unless a validation has just done so or Ctrl-C ends the run."""
        if trainer.global_step != self._last_step and not trainer.should_stop:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, module: ForestModule) -> None:
        self._last_step = trainer.global_step
        data: ForestData = trainer.datamodule  # type: ignore[attr-defined]
        harmful = (example for example in data.validation if example.is_harmful)
        examples = list(islice(harmful, self.max_examples))
        if not examples:
            return
        figures: dict[str, float] = {}
        for prefix_tokens in self.prefix_tokens:
            with trainer.precision_plugin.forward_context():
                found = reset_logps(module, examples, prefix_tokens=prefix_tokens, data=data)
            unsafe, safe = found.exp().mean(0).tolist()
            figures[f"reset/probability_after_unsafe/tokens={prefix_tokens}"] = unsafe
            figures[f"reset/probability_after_safe/tokens={prefix_tokens}"] = safe
        figures |= _separation(found)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        trainer.callback_metrics.update({tag: torch.tensor(v) for tag, v in figures.items()})


def _separation(found: Tensor) -> dict[str, float]:
    """Return how far apart unsafe and safe prefixes are, from (N, 2) log-probabilities."""
    unsafe, safe = found[:, 0], found[:, 1]
    return {
        "reset/logp_after_unsafe": unsafe.mean().item(),
        "reset/logp_after_safe": safe.mean().item(),
        "reset/gap": (unsafe - safe).mean().item(),
        "reset/auc": float(auc(unsafe.tolist(), safe.tolist())),
    }
