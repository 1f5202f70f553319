"""The BlockMask of a forest allows the pairs of the dense mask, windows and padding included."""

import pytest
import torch
from transformers import MistralConfig

from backtrack.data.forest import attention_allowed, plant
from backtrack.flex import flex_masks
from tests.modules.builders import some_trees
from tests.tiny import SLIDING_WINDOW, tiny_config


def pairs_of(mask, forest):
    rows, tokens = forest.input_ids.shape
    places = torch.meshgrid(
        torch.arange(rows), torch.arange(tokens), torch.arange(tokens), indexing="ij"
    )
    row, query, key = places
    assert mask.shape == (rows, 1, tokens, tokens)
    return mask.mask_mod(row, torch.zeros_like(row), query, key)


@pytest.mark.parametrize("method", ["sft_backtrack", "dpo_backtrack"])
def test_flex_attention_gets_the_pairs_of_the_dense_mask(method):
    trees = some_trees(method)
    forest = plant([trees[:2], [], trees[2:]], pad_id=0)
    allowed = attention_allowed(forest)
    depth = forest.position_ids
    near = allowed & (depth[:, :, None] - depth[:, None, :] < SLIDING_WINDOW)
    masks = flex_masks(forest, tiny_config("gemma2"))
    assert torch.equal(pairs_of(masks["full_attention"], forest), allowed)
    assert torch.equal(pairs_of(masks["sliding_attention"], forest), near)
    assert not torch.equal(near, allowed)
    assert torch.equal(pairs_of(flex_masks(forest, tiny_config("llama")), forest), allowed)
    alike = MistralConfig(sliding_window=SLIDING_WINDOW)
    assert torch.equal(pairs_of(flex_masks(forest, alike), forest), near)


def test_flex_masks_skip_blocks_of_other_trees():
    trees = some_trees("dpo_backtrack") * 40
    forest = plant([trees], pad_id=0)
    mask = flex_masks(forest, tiny_config("llama"))
    assert forest.input_ids.shape[1] > 8 * 128
    assert mask.sparsity() > 50  # percent of the blocks of 128 x 128
