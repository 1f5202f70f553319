"""DPO on branches equals DPO on whole responses: loss, rewards' margins, gradients, references."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from backtrack.data.batching import deal, step_weight
from backtrack.data.examples import make_tree
from backtrack.modules.dpo import DPOModule, DPOSettings, pair_logps
from backtrack.modules.reference import compute_table
from tests import oracle
from tests.modules.builders import (
    OPTIMIZER,
    PAD,
    RECIPE,
    RESET,
    batch_of,
    cuts_of,
    dpo_module,
    sft_module,
    some_examples,
    some_trees,
)
from tests.modules.test_sft import _OneRank, assert_same_gradients
from tests.tiny import FAMILIES, tiny_model

METHODS = ("dpo", "dpo_backtrack")
ORDER = ([0, 1], [], [2, 4, 3])
BETA = 0.1


def pairs_now(module, batch):
    logps = module.forest_logps(batch.forest)
    return pair_logps(batch.forest, logps, module.reference_logps(batch))


def rows_of(trees):
    return [[trees[i] for i in row] for row in ORDER]


def pairs_of(examples, method, **weights):
    """The pairs of the oracle, in the order of the batch."""
    return [
        pair
        for i in (i for row in ORDER for i in row)
        for pair in oracle.dpo_pairs(
            examples[i],
            cuts=cuts_of(examples[i]) if method == "dpo_backtrack" else None,
            reset=RESET,
            **weights,
        )
    ]


def table_of(model, trees, layout="forest"):
    return compute_table(sft_module(model), trees, layout=layout, pad_id=PAD, max_tokens=100)


@pytest.mark.parametrize("layout", ["forest", "paths"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_loss_margins_and_gradients_equal_the_naive_loop(family, method, layout):
    policy, reference = tiny_model(family, seed=0), tiny_model(family, seed=1)
    examples = some_examples()
    trees = some_trees(method, examples)
    batch = batch_of(rows_of(trees), layout=layout, table=table_of(reference, trees, layout))
    module, pairs = dpo_module(policy, beta=BETA), pairs_of(examples, method)

    def expected_loss():
        scores = oracle.dpo_scores(policy, reference, pairs, beta=BETA)
        return oracle.weighted_mean(scores.losses, pairs)

    with torch.no_grad():
        scores = oracle.dpo_scores(policy, reference, pairs, beta=BETA)
        logps = pairs_now(module, batch)
        margins = BETA * (
            (logps.policy_chosen - logps.policy_rejected)
            - (logps.reference_chosen - logps.reference_rejected)
        )
        expected = scores.chosen_rewards - scores.rejected_rewards
        assert expected.abs().min() > 1e-3  # policy and reference differ
        assert_close(margins, expected, rtol=1e-4, atol=1e-5)
        assert_close(module.training_step(batch, 0), expected_loss(), rtol=1e-5, atol=1e-5)
        sums = module.loss_sums(batch)
        assert sums["accuracies"].item() == (expected > 0).sum().item()
    assert_same_gradients(
        oracle.gradients(policy, lambda: module.training_step(batch, 0)),
        oracle.gradients(policy, expected_loss),
    )


def test_dpo_pair_weights_equal_the_naive_loop():
    policy, reference = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    examples, weights = some_examples(), {"elicit_weight": 0.5, "discourage_weight": 2.0}
    recipe = RECIPE._replace(**weights)
    trees = [make_tree(example, recipe=recipe, epoch=0) for example in examples]
    batch = batch_of(rows_of(trees), table=table_of(reference, trees))
    pairs = pairs_of(examples, "dpo_backtrack", **weights)
    with torch.no_grad():
        loss = dpo_module(policy, beta=BETA).training_step(batch, 0)
        scores = oracle.dpo_scores(policy, reference, pairs, beta=BETA)
    assert batch.total_weight == sum(pair.weight for pair in pairs)
    assert_close(loss, oracle.weighted_mean(scores.losses, pairs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("loss", "label_smoothing"), [("ipo", 0.0), ("sigmoid", 0.2)])
def test_other_losses_are_taken_on_whole_responses_too(loss, label_smoothing):
    policy, reference = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    examples = some_examples()
    trees = some_trees("dpo_backtrack", examples)
    batch = batch_of(rows_of(trees), table=table_of(reference, trees))
    pairs = pairs_of(examples, "dpo_backtrack")
    with torch.no_grad():
        found = dpo_module(policy, loss, BETA, label_smoothing).training_step(batch, 0)
        scores = oracle.dpo_scores(policy, reference, pairs, beta=BETA)
    margin = scores.chosen_rewards - scores.rejected_rewards
    if loss == "ipo":  # (m - 1 / (2 beta))^2, m without beta
        expected = (margin / BETA - 1 / (2 * BETA)) ** 2
    else:
        expected = 0.8 * torch.log(1 + torch.exp(-margin)) + 0.2 * torch.log(1 + torch.exp(margin))
    assert_close(found, expected.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["forest", "paths"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_policy_equal_to_reference_gives_log_2_and_zero_margins(family, method, layout):
    model, trees = tiny_model(family), some_trees(method)
    batch = batch_of(rows_of(trees), layout=layout, table=table_of(model, trees, layout))
    with torch.no_grad():
        sums = dpo_module(model, beta=5.0).loss_sums(batch)
    assert_close(sums["loss"] / batch.total_weight, torch.tensor(math.log(2)), rtol=0, atol=1e-4)
    assert_close(sums["chosen_rewards"], torch.tensor(0.0), rtol=0, atol=1e-3)
    assert_close(sums["rejected_rewards"], torch.tensor(0.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_shares", [2, 4, 8])
def test_dpo_micro_batches_give_the_gradient_of_the_whole_step(num_shares):
    policy, trees = tiny_model("llama", seed=0), some_trees("dpo_backtrack")
    module, table = dpo_module(policy), table_of(tiny_model("llama", seed=1), trees)

    def step(num_shares):
        losses = [
            module.training_step(
                batch_of(rows, num_shares=num_shares, total_weight=step_weight(trees), table=table),
                0,
            )
            for rows in deal(trees, max_tokens=80, num_shares=num_shares)
        ]
        return torch.stack(losses).sum() / num_shares

    assert_close(step(num_shares), step(1), rtol=1e-5, atol=1e-5)
    assert_same_gradients(
        oracle.gradients(policy, lambda: step(num_shares)),
        oracle.gradients(policy, lambda: step(1)),
    )


@pytest.mark.parametrize("layout", ["forest", "paths"])
def test_empty_share_gives_a_loss_of_zero_with_gradients(layout):
    model = tiny_model("llama")
    batch = batch_of([[]], layout=layout, num_shares=4, total_weight=3.0, table={})
    module = dpo_module(model)
    assert module.training_step(batch, 0).item() == 0.0
    gradients = oracle.gradients(model, lambda: module.training_step(batch, 0))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())


def with_lora(model):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(model, config)


def test_reference_gets_no_gradient_and_is_the_model_without_its_adapter():
    base, policy = tiny_model("llama"), with_lora(tiny_model("llama"))
    examples = some_examples()
    trees = some_trees("dpo_backtrack", examples)
    module, pairs = dpo_module(policy), pairs_of(examples, "dpo_backtrack")
    from_adapter, from_table = (
        batch_of(rows_of(trees), table=table) for table in (None, table_of(base, trees))
    )
    logps = pairs_now(module, from_adapter)
    assert not logps.reference_chosen.requires_grad
    assert logps.policy_chosen.requires_grad
    with torch.no_grad():
        expected = oracle.dpo_scores(policy, base, pairs, beta=BETA)
    loss = module.training_step(from_adapter, 0)
    assert_close(loss, oracle.weighted_mean(expected.losses, pairs), rtol=1e-5, atol=1e-5)
    gradients = oracle.gradients(policy, lambda: module.training_step(from_adapter, 0))
    assert gradients
    assert all("lora" in name for name in gradients)
    assert_same_gradients(
        gradients, oracle.gradients(policy, lambda: module.training_step(from_table, 0))
    )


def test_reference_without_its_adapter_has_no_dropout_and_leaves_the_training_mode():
    policy, trees = with_lora(tiny_model("llama")), some_trees("dpo")
    for layer in policy.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.get_base_model().model.norm.weight.requires_grad_()  # as under a partly trained base
    module, batch = dpo_module(policy).train(), batch_of([trees])
    first, second = (pairs_now(module, batch) for _ in range(2))
    assert_close(first.reference_chosen, second.reference_chosen, rtol=0, atol=0)
    assert not torch.equal(first.policy_chosen, second.policy_chosen)
    assert not first.reference_chosen.requires_grad
    assert module.training


def test_precomputed_reference_gets_no_gradient():
    trees = some_trees("dpo")
    batch = batch_of([trees], table=table_of(tiny_model("llama"), trees))
    assert not batch.reference_logps.requires_grad


def test_dpo_logs_the_means_of_the_step(monkeypatch):
    policy, reference = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    examples = some_examples()
    trees, module = some_trees("dpo_backtrack", examples), dpo_module(policy, beta=BETA)
    table, logged = table_of(reference, trees), {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(type(module), "trainer", _OneRank(), raising=False)
    for part in ([0, 1], [], [2, 4, 3]):
        rows, total = [[trees[i] for i in part]], step_weight(trees)
        with torch.no_grad():
            module.training_step(batch_of(rows, num_shares=3, total_weight=total, table=table), 0)
    module.on_before_optimizer_step(None)
    with torch.no_grad():
        pairs = pairs_of(examples, "dpo_backtrack")
        scores = oracle.dpo_scores(policy, reference, pairs, beta=BETA)
        resets = []
        for example in examples[::2]:  # elicited after unsafe prefixes only
            context = oracle.prompt_of(example) + list(example.unsafe[: cuts_of(example)[0]])
            resets.append(oracle.response_logp(policy, context, [RESET]).exp())
    margins = scores.chosen_rewards - scores.rejected_rewards
    assert_close(logged["train/loss"], scores.losses.mean(), rtol=1e-5, atol=1e-5)
    assert_close(logged["rewards/margins"], margins.mean(), rtol=1e-4, atol=1e-5)
    assert_close(logged["rewards/accuracies"], (margins > 0).float().mean())
    assert_close(
        logged["rewards/chosen"] - logged["rewards/rejected"], margins.mean(), rtol=1e-4, atol=1e-5
    )
    assert_close(logged["reset/probability"], torch.stack(resets).mean(), rtol=1e-4, atol=1e-8)


def test_dpo_logs_of_a_step_without_pairs_are_finite(monkeypatch):
    # Benign examples only, and their one pair has weight zero.
    recipe = RECIPE._replace(discourage_weight=0.0)
    trees = [make_tree(example, recipe=recipe, epoch=0) for example in some_examples()[1::2]]
    module, logged = dpo_module(tiny_model("llama")), {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(type(module), "trainer", _OneRank(), raising=False)
    loss = module.training_step(
        batch_of([trees], table={(0, t.example_id): _none() for t in trees}), 0
    )
    loss.backward()
    module.on_before_optimizer_step(None)
    assert loss.item() == 0.0
    assert len(logged) == 8
    assert all(math.isfinite(value) for value in logged.values())


def _none():
    return torch.zeros(0).numpy()


def test_dpo_validation_shares_add_up_to_the_loss_of_the_whole_set(monkeypatch):
    policy, reference = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    examples = some_examples()
    trees, module = some_trees("dpo", examples), dpo_module(policy, beta=BETA)
    table, sums = table_of(reference, trees), {}
    monkeypatch.setattr(
        module, "log", lambda name, value, **_: sums.update({name: sums.get(name, 0) + value})
    )
    for part in (trees[:3], [], trees[3:]):
        with torch.no_grad():
            total = step_weight(trees)
            module.validation_step(batch_of([part], total_weight=total, table=table), 0)
    with torch.no_grad():
        scores = oracle.dpo_scores(policy, reference, pairs_of(examples, "dpo"), beta=BETA)
    assert_close(sums["val/loss"], scores.losses.mean(), rtol=1e-5, atol=1e-5)
    is_right = scores.chosen_rewards > scores.rejected_rewards
    assert_close(sums["val/accuracies"], is_right.float().mean())


def test_a_frozen_copy_of_the_model_is_the_reference_that_its_log_probs_are():
    model, trees = tiny_model(), some_trees("dpo_backtrack")
    table = table_of(model, trees)
    module = DPOModule(
        model,
        settings=DPOSettings("sigmoid", BETA, 0.0, keeps_reference=True),
        optimizer=OPTIMIZER,
        num_steps=10,
        chunk_size=7,
        reset_token_id=RESET,
    )
    with torch.no_grad():
        for weight in module.model.parameters():
            weight += 0.05  # the copy stays behind
    read = module.loss_sums(batch_of(rows_of(trees), table=table))
    kept = module.loss_sums(batch_of(rows_of(trees)))
    assert read.keys() == kept.keys()
    for name, value in read.items():
        assert_close(kept[name], value)
    kept["loss"].backward()
    assert all(weight.grad is None for weight in module.reference.parameters())
    assert all(weight.grad is not None for weight in module.model.parameters())


def test_the_loss_is_fp32_whatever_the_default_is():
    model, trees = tiny_model(), some_trees("dpo_backtrack")
    batch = batch_of(rows_of(trees), table=table_of(model, trees))
    module = dpo_module(model)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as under `bf16-true`
    try:
        sums = module.loss_sums(batch)
    finally:
        torch.set_default_dtype(default)
    assert sums["loss"].dtype == torch.float32
    assert float(sums["loss"]) == pytest.approx(math.log(2) * batch.total_weight, rel=1e-5)
