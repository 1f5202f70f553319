"""The reference pass: what it computes."""

from __future__ import annotations

import pytest
import torch
from numpy.testing import assert_allclose

from backtrack.modules.reference import compute_table
from tests import oracle
from tests.modules.builders import PAD, sft_module, some_examples, some_trees
from tests.tiny import tiny_model


def compute(module, trees, layout="forest", max_tokens=100):
    return compute_table(module, trees, layout=layout, pad_id=PAD, max_tokens=max_tokens)


def test_reference_logps_equal_the_naive_loop():
    model, examples = tiny_model("llama"), some_examples()
    table = compute(sft_module(model), some_trees("dpo", examples))
    assert len(table) == len(examples)
    for example in examples:
        prompt = oracle.prompt_of(example)
        with torch.no_grad():
            expected = [
                oracle.response_logp(model, prompt, response)
                for response in (example.safe, example.unsafe)
            ]
        assert_allclose(table[0, example.example_id], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["forest", "paths"])
@pytest.mark.parametrize("max_tokens", [60, 10_000])
def test_reference_logps_do_not_depend_on_layout_or_packing(layout, max_tokens):
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo_backtrack")
    expected = compute(module, trees)
    found = compute(module, trees[::-1], layout, max_tokens)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert_allclose(found[key], values, rtol=0, atol=1e-4)


def test_reference_pass_leaves_no_gradient_and_the_training_mode():
    module = sft_module(tiny_model("llama"))
    modes = []
    module.model.model.register_forward_hook(lambda *_: modes.append(module.model.training))
    module.train()
    compute(module, some_trees("dpo"))
    assert modes
    assert not any(modes)  # dropout would make the reference random
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    compute(module.eval(), some_trees("dpo"))
    assert not module.training
