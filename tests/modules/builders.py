"""Examples, recipes and modules that the tests of models and modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backtrack.data.batching import StepBatch, make_batch, step_weight
from backtrack.data.examples import Recipe, draw_cut, make_tree
from backtrack.data.types import EncodedExample, Tree, Turn
from backtrack.modules.base import OptimizerSettings
from backtrack.modules.dpo import DPOModule, DPOSettings
from backtrack.modules.reference import ReferenceTable
from backtrack.modules.sft import SFTModule
from backtrack.tree_attention import use_tree_attention

RESET, PAD = 259, 256
OPTIMIZER = OptimizerSettings(
    learning_rate=1e-3,
    betas=(0.9, 0.98),
    eps=1e-8,
    weight_decay=0.1,
    warmup_fraction=0.1,
    reset_row_learning_rate=None,
)
RECIPE = Recipe(
    method="dpo_backtrack",
    seed=0,
    reset_token_id=RESET,
    safe_weight=1.0,
    backtrack_weight=1.0,
    elicit_weight=1.0,
    discourage_weight=1.0,
)


def some_ids(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())


def some_examples(number: int = 5) -> list[EncodedExample]:
    """Harmful and benign ones in turn, of different lengths; benign ones have an earlier answer."""
    examples = []
    for i in range(number):
        sizes = (3 + i, 4 + 2 * i % 7, 2 + 3 * i % 8)
        prompt, safe, unsafe = (some_ids(10 * i + j, size) for j, size in enumerate(sizes))
        turns: tuple[Turn, ...] = (Turn(prompt, is_supervised=False),)
        if i % 2:
            turns += (Turn(some_ids(10 * i + 5, 3), True), Turn(some_ids(10 * i + 6, 2), False))
        examples.append(EncodedExample(f"kettles:{i}", not i % 2, turns, safe, unsafe))
    return examples


def some_trees(method: str, examples: Sequence[EncodedExample] | None = None) -> list[Tree]:
    recipe = RECIPE._replace(method=method)
    return [make_tree(e, recipe=recipe, epoch=0) for e in examples or some_examples()]


def cuts_of(example: EncodedExample) -> tuple[int, int]:
    """(k, j) as `RECIPE` draws them in epoch 0."""
    keys = {"seed": 0, "epoch": 0, "example_id": example.example_id}
    k = draw_cut(len(example.unsafe), **keys, stream="unsafe")
    return k, draw_cut(len(example.safe), **keys, stream="safe")


def sft_module(model: Any, chunk_size: int = 7) -> SFTModule:
    use_tree_attention(model, on_gpu=False)  # as training does
    return SFTModule(
        model, optimizer=OPTIMIZER, num_steps=10, chunk_size=chunk_size, reset_token_id=RESET
    )


def dpo_module(
    model: Any, loss: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0
) -> DPOModule:
    use_tree_attention(model, on_gpu=False)
    return DPOModule(
        model,
        settings=DPOSettings(loss, beta, label_smoothing),
        optimizer=OPTIMIZER,
        num_steps=10,
        chunk_size=7,
        reset_token_id=RESET,
    )


def batch_of(
    rows: Sequence[Sequence[Tree]],
    *,
    layout: str = "forest",
    num_shares: int = 1,
    total_weight: float | None = None,
    table: ReferenceTable | None = None,
) -> StepBatch:
    trees = [tree for row in rows for tree in row]
    reference: Tensor | None = None
    if table is not None:
        found = [torch.from_numpy(table[tree.epoch, tree.example_id]) for tree in trees]
        reference = torch.cat([*found, torch.zeros(0)])
    return make_batch(
        rows,
        layout=layout,
        pad_id=PAD,
        total_weight=step_weight(trees) if total_weight is None else total_weight,
        num_shares=num_shares,
        step=0,
        reference_logps=reference,
    )
