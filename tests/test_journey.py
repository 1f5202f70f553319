"""One row of a file on its way to a loss, hop by hop, every tensor spelled out.

sources.read -> examples.*_tree -> forest.plant -> batching -> DPOModule.training_step -> losses
"""

import math

import torch
from torch.testing import assert_close

from backtrack.data.batching import deal, make_batch, step_weight
from backtrack.data.encode import Limits, encode_example
from backtrack.data.examples import Recipe, make_tree
from backtrack.data.forest import attention_allowed
from backtrack.data.sources import FileSource
from backtrack.data.types import PreferenceTriple, Segment, Turn
from backtrack.losses import sigmoid_loss
from backtrack.modules.dpo import pair_logps
from backtrack.tokens import add_reset_token
from tests.modules.builders import dpo_module
from tests.tiny import byte_tokenizer, tiny_model

ROW = '{"prompt": "hi", "chosen": "no", "rejected": "oh!"}\n'
# A template short enough to read: every message between START and END, answers open with START.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
# Ids of the byte tokenizer: the printable characters in order, "!" first.
H, I, N, O, BANG = 71, 72, 77, 78, 0  # noqa: E741
START, END, R, PAD = 257, 258, 259, 256
SEED = 1  # draws k = 2 and j = 1 for this row


def model_with_known_probabilities():
    """A Llama whose every hidden state is a vector of ones, and whose head likes [RESET].

    The logit of [RESET] is log 3, of the other 259 tokens 0: p([RESET]) = 3 / 262, else 1 / 262.
    """
    model = tiny_model("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name or "embed_tokens" in name else 0.0)
        model.lm_head.weight[R] = math.log(3) / 32  # hidden size 32
    return model


def test_journey_of_one_row_from_file_to_loss(tmp_path):  # noqa: PLR0915 - read it from top to end
    # 1. sources.read: a line of a file becomes a triple.
    (tmp_path / "tea.jsonl").write_text(ROW)
    source = FileSource(
        name="tea",
        path=str(tmp_path / "tea.jsonl"),
        split=None,
        format="auto",
        languages=None,
        on_bad_row="raise",
        limit=None,
    )
    (triple,) = source.read().examples
    assert triple == PreferenceTriple(
        "tea:1", prompt=({"role": "user", "content": "hi"},), safe="no", unsafe="oh!"
    )

    # ... in tokens, end of turn included.
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert add_reset_token(tokenizer, None) == R
    encoded = encode_example(triple, tokenizer, limits=Limits(8, 8), refusal="Rather not.")
    assert encoded.turns == (Turn((START, H, I, END, START), is_supervised=False),)
    assert encoded.safe == (N, O, END)
    assert encoded.unsafe == (O, H, BANG, END)

    # 2. examples.*_tree: with k = 2 and j = 1, two pairs over one prompt.
    recipe = Recipe("dpo_backtrack", SEED, R, 1.0, 1.0, 1.0, 1.0)
    tree = make_tree(encoded, recipe=recipe, epoch=0)
    assert tree.segments == (
        Segment((START, H, I, END, START), -1, 0.0),  # 0 prompt
        Segment((O, H), 0, 0.0),  # 1 unsafe[:k]
        Segment((R, N, O, END), 1, 0.0),  # 2 elicit: chosen
        Segment((BANG, END), 1, 0.0),  # 3 over rejected
        Segment((N,), 0, 0.0),  # 4 safe[:j]
        Segment((O, END), 4, 0.0),  # 5 discourage: chosen
        Segment((R, O, H, BANG, END), 4, 0.0),  # 6 over rejected
    )
    assert tree.paths == ((0, 1, 2), (0, 1, 3), (0, 4, 5), (0, 4, 6))
    assert tree.pairs == ((0, 1, 1.0), (2, 3, 1.0))

    # 3. forest.plant and 4. batching: one row of 21 tokens, padded to 24.
    ((rows),) = deal([tree], max_tokens=32, num_shares=1)
    assert rows == [[tree]]
    log_260 = math.log(260)  # the reference: all 260 tokens alike, so a sum is - edges * log 260
    batch = make_batch(
        rows,
        layout="forest",
        pad_id=PAD,
        total_weight=step_weight([tree]),
        num_shares=1,
        step=0,
        reference_logps=torch.tensor([-4.0, -2.0, -2.0, -5.0]) * log_260,
    )
    forest = batch.forest
    assert forest.input_ids.tolist() == [
        [START, H, I, END, START]  # columns 0-4
        + [O, H]  # 5-6
        + [R, N, O, END]  # 7-10
        + [BANG, END]  # 11-12
        + [N]  # 13
        + [O, END]  # 14-15
        + [R, O, H, BANG, END]  # 16-20
        + [PAD] * 3
    ]
    assert forest.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 7, 8, 5, 6, 7, 6, 7, 8, 9, 10, 0, 0, 0]
    ]
    assert forest.segment_ids.tolist() == [
        [0] * 5 + [1] * 2 + [2] * 4 + [3] * 2 + [4] + [5] * 2 + [6] * 5 + [-1] * 3
    ]
    assert forest.ancestors.int().tolist() == [
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 0, 1, 0, 0, 0],
            [1, 0, 0, 0, 1, 0, 0],
            [1, 0, 0, 0, 1, 1, 0],
            [1, 0, 0, 0, 1, 0, 1],
        ]
    ]
    # Column 6 (the end of unsafe[:k]) predicts both R and "!", column 13 both "o" and R.
    assert forest.predictors.tolist() == [6, 7, 8, 9, 6, 11, 13, 14, 13, 16, 17, 18, 19]
    assert forest.targets.tolist() == [R, N, O, END, BANG, END, O, END, R, O, H, BANG, END]
    assert forest.paths.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert forest.weights.tolist() == [1.0] * 13
    assert forest.pairs.tolist() == [[0, 1], [2, 3]]
    assert forest.pair_weights.tolist() == [1.0, 1.0]
    assert (forest.num_paths, forest.num_tokens, batch.total_weight) == (4, 21, 2.0)
    allowed = attention_allowed(forest)[0].int()
    assert allowed[12].tolist() == [1] * 7 + [0] * 4 + [1] * 2 + [0] * 11  # "!" END sees o h, not R
    assert allowed[16].tolist() == [1] * 5 + [0] * 8 + [1] + [0] * 2 + [1] + [0] * 7
    assert allowed[21].tolist() == [0] * 21 + [1, 0, 0]

    # 5. DPOModule.training_step: log-probs of the branches.
    module = dpo_module(model_with_known_probabilities(), beta=0.5)
    edges = module.forest_logps(forest)
    pairs = pair_logps(forest, edges, module.reference_logps(batch))
    log_262, log_3 = math.log(262), math.log(3)
    expected = torch.full((13,), -log_262)
    expected[[0, 8]] += log_3
    assert_close(edges, expected)
    assert_close(pairs.policy_chosen, torch.tensor([log_3 - 4 * log_262, -2 * log_262]))
    assert_close(pairs.policy_rejected, torch.tensor([-2 * log_262, log_3 - 5 * log_262]))
    assert_close(pairs.reference_chosen, torch.tensor([-4 * log_260, -2 * log_260]))
    assert_close(pairs.reference_rejected, torch.tensor([-2 * log_260, -5 * log_260]))

    # 6. losses: with d = log(262 / 260) = 0.007663, m = log 3 - 2 d = 1.083286 and 3 d - log 3 =
    # -1.075624; times beta 0.541643 and -0.537812; log(1 + e^-0.541643) = 0.458558 and
    # log(1 + e^0.537812) = 0.997781. Their mean is 0.728169.
    losses = sigmoid_loss(pairs, beta=0.5, label_smoothing=0.0)
    assert_close(losses, torch.tensor([0.458558, 0.997781]), rtol=0, atol=1e-5)
    assert_close(module.training_step(batch, 0), torch.tensor(0.728169), rtol=0, atol=1e-5)
