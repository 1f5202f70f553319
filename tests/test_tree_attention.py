"""Attention tree by tree: what a dense mask gives, with less work, and no harm to other masks."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from backtrack.backbone import backbone_and_head, tree_attention_mask
from backtrack.data.forest import attention_allowed, plant
from backtrack.tree_attention import attends_by_tree, flatten, use_tree_attention
from tests.modules.builders import some_trees
from tests.tiny import tiny_model

ROWS = ([0, 1], [], [2, 4, 3])
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


def sliding_model(family):
    """With windows of 8 tokens, smaller than the trees; Qwen 3 mixes layers of both kinds."""
    if family == "mistral":
        config = MistralConfig(**SIZES, sliding_window=8)
    else:
        config = Qwen3Config(
            **SIZES,
            head_dim=8,
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "gpt_neox": lambda: tiny_model("gpt_neox"),
    "mistral": lambda: sliding_model("mistral"),
    "qwen3": lambda: sliding_model("qwen3"),
}


def hidden_states(model, forest, *, by_tree):
    backbone, config = backbone_and_head(model).backbone, model.config
    if by_tree:
        flat = flatten(forest, config)
        return backbone(
            input_ids=flat.input_ids,
            position_ids=flat.position_ids,
            attention_mask=flat.masks,
            use_cache=False,
        ).last_hidden_state[0, flat.predictors]
    mask = tree_attention_mask(config, attention_allowed(forest), forest.position_ids)
    return backbone(
        input_ids=forest.input_ids,
        position_ids=forest.position_ids,
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)[forest.predictors]


@pytest.mark.parametrize("method", ["sft", "sft_backtrack", "dpo", "dpo_backtrack"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_by_tree_equals_a_dense_mask(name, method):
    trees = some_trees(method)
    forest = plant([[trees[i] for i in row] for row in ROWS], pad_id=0)
    model = MODELS[name]()
    weights = [
        p for n, p in model.named_parameters() if "lm_head" not in n and "embed_out" not in n
    ]
    dense = hidden_states(model, forest, by_tree=False)
    dense_gradient = torch.autograd.grad(dense.sin().sum(), weights)
    use_tree_attention(model, on_gpu=False)
    assert attends_by_tree(model.config)
    mine = hidden_states(model, forest, by_tree=True)
    assert_close(mine, dense, rtol=0, atol=1e-5)
    gradient = torch.autograd.grad(mine.sin().sum(), weights)
    for found, expected in zip(gradient, dense_gradient, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_blocks_hold_every_token_once_and_see_no_stranger():
    trees = some_trees("dpo_backtrack")
    forest = plant([trees], pad_id=0)
    model = tiny_model("llama")
    use_tree_attention(model, on_gpu=False)
    for tree, span in zip(trees, flatten(forest, model.config).masks.spans, strict=True):
        assert span.size == tree.num_tokens
        assert [block.first for block in span.blocks] == [
            0,
            *(block.last for block in span.blocks[:-1]),
        ]
        assert span.blocks[-1].last == span.size
        assert span.blocks[0].mask is None  # the trunk: plain causal attention
        # And what hangs from it: the reset of pair A, and pair B whole; a benign tree has B alone.
        assert len(span.blocks) == 1 + len(tree.pairs)
        scores = sum((b.last - b.first) * (b.hang + b.last - b.first) for b in span.blocks)
        assert scores < span.size**2


def test_generation_with_a_model_that_attends_by_tree_is_unchanged():
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    seen = (ids > 0).long()
    settings = {"attention_mask": seen, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = tiny_model("llama").generate(ids, **settings)
    model = tiny_model("llama")
    use_tree_attention(model, on_gpu=False)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_saved_models_name_no_attention_of_ours(tmp_path):
    model = tiny_model("llama")
    use_tree_attention(model, on_gpu=False)
    model.save_pretrained(tmp_path)
    assert "sdpa_trees" not in (tmp_path / "config.json").read_text()


def test_the_carrier_of_trees_is_no_mask_to_anyone_else():
    forest = plant([some_trees("dpo")], pad_id=0)
    model = tiny_model("llama")
    use_tree_attention(model, on_gpu=False)
    flat = flatten(forest, model.config)
    other = tiny_model("llama")  # attends by plain sdpa
    with pytest.raises(RuntimeError):
        backbone_and_head(other).backbone(
            input_ids=flat.input_ids, position_ids=flat.position_ids, attention_mask=flat.masks
        )


def test_eager_attention_is_left_alone():
    model = tiny_model("gemma2")
    use_tree_attention(model, on_gpu=False)
    assert not attends_by_tree(model.config)


def test_on_a_gpu_the_model_attends_by_flex_attention_where_there_is_one(caplog):
    model = tiny_model("llama")
    use_tree_attention(model, on_gpu=True)
    assert model.config._attn_implementation == "flex_attention"
    model = tiny_model("llama")
    model._supports_flex_attn = False
    use_tree_attention(model, on_gpu=True)
    assert model.config._attn_implementation == "sdpa"
    (line,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "llama has no FlexAttention" in line
