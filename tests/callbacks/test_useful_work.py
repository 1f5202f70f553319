"""The useful arithmetic of a step, worked out by hand."""

from __future__ import annotations

import pytest

from backtrack.adapters import add_lora
from backtrack.callbacks.useful_work import Rates, operation_rates, useful_work
from backtrack.data.examples import make_tree
from backtrack.data.forest import plant, plant_paths
from backtrack.data.types import EncodedExample, Turn
from tests.modules.builders import PAD, RECIPE, RESET, cuts_of
from tests.tiny import tiny_model

# Llama of tests/tiny.py: hidden 32, 2 layers, 4 heads of 8, 2 of them keys', width 64, 260 tokens.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
EXAMPLE = EncodedExample(
    "kettles", True, (Turn((1, 2), False),), safe=(8, 9, 3), unsafe=(5, 6, 7, 3)
)


def pairs_of(*spans):
    """Of stretches of tokens: (tokens before the stretch, its tokens)."""
    return sum(above + i + 1 for above, count in spans for i in range(count))


def test_useful_work_of_a_backtracking_sft_tree_is_what_is_counted_by_hand():
    tree = make_tree(EXAMPLE, recipe=RECIPE._replace(method="sft_backtrack"), epoch=0)
    k, _ = cuts_of(EXAMPLE)
    work = useful_work(plant([[tree]], pad_id=PAD))
    # 1 2, two of three of 8 9 3, the prefix, and all but the last of R 8 9 3.
    assert work.tokens == 2 + 2 + k + 3
    # 2 -> 8, 8 -> 9, 9 -> 3; the end of the prefix -> R, R -> 8, 8 -> 9, 9 -> 3.
    assert work.predictors.item() == 7
    assert work.pairs.item() == pairs_of((0, 2), (2, 2), (2, k), (2 + k, 3))


def test_useful_work_of_a_backtracking_dpo_tree_is_what_is_counted_by_hand():
    tree = make_tree(EXAMPLE, recipe=RECIPE, epoch=0)
    k, j = cuts_of(EXAMPLE)
    work = useful_work(plant([[tree]], pad_id=PAD))
    # The prompt; 5.. | R 8 9 (3) and | ..7 (3); 8.. | 9.. (3) and | R 5 6 7 (3).
    spans = [(0, 2), (2, k), (2 + k, 3), (2 + k, 3 - k), (2, j), (2 + j, 2 - j), (2 + j, 4)]
    assert work.tokens == sum(count for _, count in spans)
    # At either branch one state predicts two tokens.
    assert work.predictors.item() == (1 + 3 + 3 - k) + (1 + 2 - j + 4)
    assert work.pairs.item() == pairs_of(*spans)


def test_useful_work_is_the_sum_over_trees_however_they_are_packed():
    tree = make_tree(EXAMPLE, recipe=RECIPE, epoch=0)
    alone = useful_work(plant([[tree]], pad_id=PAD))
    for rows in ([[tree, tree, tree]], [[tree], [], [tree, tree]]):
        together = useful_work(plant(rows, pad_id=PAD, multiple=64))
        assert together.tokens == 3 * alone.tokens
        assert together.predictors.item() == 3 * alone.predictors.item()
        assert together.pairs.item() == 3 * alone.pairs.item()


def test_useful_work_of_unrolled_paths_counts_what_is_computed():
    tree = make_tree(EXAMPLE, recipe=RECIPE._replace(method="dpo"), epoch=0)
    work = useful_work(plant_paths([[tree]], pad_id=PAD))
    assert work.tokens == (2 + 2) + (2 + 3)  # 1 2 8 9 (3) and 1 2 5 6 7 (3)
    assert work.predictors.item() == 3 + 4
    assert work.pairs.item() == pairs_of((0, 4), (0, 5))


def test_useful_work_of_nothing_is_nothing():
    work = useful_work(plant([[]], pad_id=PAD))
    assert (work.tokens, work.predictors.item(), work.pairs.item()) == (0, 0, 0)


def test_operation_rates_are_six_a_trained_weight():
    rates = operation_rates(tiny_model())
    assert rates == Rates(6.0 * 2 * LAYER, 6.0 * 32 * 260, 12.0 * 32 * 2)
    work = useful_work(plant([[make_tree(EXAMPLE, recipe=RECIPE, epoch=0)]], pad_id=PAD))
    wanted = 6 * 2 * LAYER * work.tokens + 6 * 32 * 260 * int(work.predictors)
    wanted += 12 * 32 * 2 * int(work.pairs)
    assert rates.operations(work).item() == pytest.approx(wanted, rel=1e-6)


def test_operation_rates_under_lora_are_four_a_frozen_weight():
    model = add_lora(
        tiny_model(),
        r=2,
        alpha=4,
        dropout=0.0,
        target_modules=["q_proj", "down_proj"],
        reset_token_id=RESET,
    )
    # Each adapter: (in + out) x 2; q is 32 x 32, down is 64 -> 32.
    adapters = 2 * (2 * 64 + 2 * 96)
    rates = operation_rates(model)
    assert rates.per_token == 4.0 * 2 * LAYER + 6.0 * adapters
    assert rates.per_predictor == 4.0 * 32 * 260


def test_operation_rates_take_the_width_of_attention_not_of_the_states():
    model = tiny_model("gemma2")
    model.config.hidden_size = 33  # 4 heads of 8 stay 32 wide
    assert operation_rates(model).per_pair == 12.0 * 32 * 2
