"""The losses of 20 steps of tiny SFT and DPO, written down: guards against silent change.

Where a change is meant, say why in its commit and replace the figures by what the failure prints.
"""

import pytest
import torch

from backtrack.compiled import compile_layers
from backtrack.data.batching import deal, step_weight
from backtrack.data.examples import make_tree
from tests.modules.builders import RECIPE, batch_of, dpo_module, sft_module, some_examples
from tests.modules.test_dpo import table_of
from tests.tiny import tiny_model

NUM_STEPS = 20
GOLDEN = {
    "sft": [
        5.56883,
        5.42971,
        5.30929,
        5.20195,
        5.10367,
        5.01249,
        4.92737,
        4.84759,
        4.77234,
        4.70073,
        4.63198,
        4.56549,
        4.5009,
        4.43808,
        4.37697,
        4.31753,
        4.25961,
        4.20299,
        4.1475,
        4.09301,
    ],
    "sft_backtrack": [
        5.56735,
        5.4469,
        5.31174,
        5.22516,
        5.11327,
        5.02297,
        4.93805,
        4.91007,
        4.84162,
        4.73022,
        4.70924,
        4.63364,
        4.58795,
        4.53632,
        4.46092,
        4.42449,
        4.35782,
        4.29404,
        4.25324,
        4.22066,
    ],
    "dpo": [
        0.64831,
        0.62151,
        0.59718,
        0.57505,
        0.55484,
        0.5363,
        0.5192,
        0.50336,
        0.48861,
        0.47485,
        0.46195,
        0.44984,
        0.43845,
        0.42771,
        0.41757,
        0.40799,
        0.39893,
        0.39035,
        0.38223,
        0.37453,
    ],
    "dpo_backtrack": [
        0.65556,
        0.64642,
        0.60461,
        0.59701,
        0.59335,
        0.56759,
        0.55577,
        0.56198,
        0.53454,
        0.5362,
        0.54495,
        0.50254,
        0.52997,
        0.52925,
        0.47971,
        0.50379,
        0.50436,
        0.46175,
        0.45343,
        0.45767,
    ],
}


def losses(method, prepare=lambda model: None):
    examples, model = some_examples(), tiny_model("llama")
    module = sft_module(model) if method.startswith("sft") else dpo_module(model)
    prepare(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)  # AdamW would amplify rounding
    found = []
    for step in range(NUM_STEPS):
        recipe = RECIPE._replace(method=method)
        trees = [make_tree(example, recipe=recipe, epoch=step) for example in examples]
        (rows,) = deal(trees, max_tokens=64, num_shares=1)
        table = None
        if method.startswith("dpo"):
            table = table_of(tiny_model("llama", seed=1), trees)
        batch = batch_of(rows, total_weight=step_weight(trees), table=table)
        sums = module.loss_sums(batch)
        loss = sums["loss"] / batch.total_weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("method", ["sft", "sft_backtrack", "dpo", "dpo_backtrack"])
def test_losses_of_twenty_steps_are_those_written_down(method):
    found = losses(method)
    assert found == pytest.approx(GOLDEN[method], rel=2e-4), [round(x, 5) for x in found]


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.parametrize("method", ["sft_backtrack", "dpo_backtrack"])
def test_losses_with_compiled_layers_are_those_written_down(method):
    torch.compiler.reset()
    found = losses(method, lambda model: compile_layers(model, has_fixed_shapes=False))
    assert found == pytest.approx(GOLDEN[method], rel=2e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_compile_layers_refuses_what_has_no_known_layers():
    model = tiny_model("llama")
    model._no_split_modules = []
    with pytest.raises(ValueError, match=r"trainer\.compile_layers: the layers of llama"):
        compile_layers(model, has_fixed_shapes=False)
