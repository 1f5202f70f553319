"""What decoding in a batch must not change, with random models of several families."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.generation.random_engine import ids_of, random_engine, random_requests
from tests.oracle_decode import naive_decode
from tests.tiny import FAMILIES


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_equals_naive_loop(family, temperature):
    engine, model, known = random_engine(family)
    requests = random_requests(temperature)
    completions = engine.generate(requests)
    num_resets = sum(c.num_resets for c in completions)
    reasons = {c.finish_reason for c in completions}
    assert num_resets > 0
    assert len(reasons) > 1 or temperature == 0
    for request, completion in zip(requests, completions, strict=True):
        naive = naive_decode(model, request, **known)
        assert list(completion.visible_ids) == naive.visible
        assert completion.num_resets == naive.num_resets
        assert completion.num_generated == len(naive.answer) - len(request.prefill_ids)
        assert max(naive.answer) < known["num_tokens"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_answer_does_not_depend_on_its_batch(family, temperature):
    requests = random_requests(temperature)
    whole = ids_of(random_engine(family, batch_size=16)[0].generate(requests))
    assert whole == ids_of(random_engine(family, batch_size=3)[0].generate(requests))
    single = random_engine(family, batch_size=1)[0]
    assert whole == [ids_of(single.generate([request]))[0] for request in requests]
    assert whole[::-1] == ids_of(random_engine(family)[0].generate(requests[::-1]))


def test_engine_mixed_settings_share_a_batch():
    requests = [
        replace(request, sampling=replace(request.sampling, **changes))
        for request, changes in zip(
            random_requests(1.0, num=4),
            [{"temperature": 0}, {"reset_bias": 9.0, "max_resets": 2}, {"max_resets": 0}, {}],
            strict=True,
        )
    ]
    engine, _, _ = random_engine()
    together = engine.generate(requests)
    assert ids_of(together) == [ids_of(engine.generate([request]))[0] for request in requests]
    assert together[1].num_resets == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_engine_infinite_negative_bias_is_a_ban(temperature):
    engine, _, _ = random_engine()
    biased = ids_of(engine.generate(random_requests(temperature, reset_bias=-math.inf)))
    banned = ids_of(engine.generate(random_requests(temperature, max_resets=0)))
    assert biased == banned
    assert not any(discarded for _, discarded, _, _ in banned)
    assert banned != ids_of(engine.generate(random_requests(temperature)))


def test_engine_bias_changes_nothing_before_the_first_reset():
    # The same noise at any bias: answers agree up to the step of the first reset.
    engine, _, _ = random_engine()
    plain = engine.generate(random_requests(1.0, max_resets=0))
    biased = engine.generate(random_requests(1.0))
    assert any(completion.num_resets for completion in biased)
    for free, other in zip(plain, biased, strict=True):
        before = other.discarded[0] if other.num_resets else other.visible_ids
        assert free.visible_ids[: len(before)] == before


def test_engine_samples_differ_and_seeds_too():
    engine, _, _ = random_engine()
    request = random_requests(1.0, num=1)[0]
    samples = [replace(request, sample=k) for k in range(4)]
    other_seed = replace(request, sampling=replace(request.sampling, seed=6))
    answers = ids_of(engine.generate([*samples, other_seed]))
    assert len(set(answers)) == 5


def test_engine_prefilled_with_its_own_beginning_goes_on_alike():
    engine, _, _ = random_engine()
    requests = [replace(r, prefill_ids=()) for r in random_requests(1.0, max_resets=0)]
    answers = [completion.visible_ids for completion in engine.generate(requests)]
    assert max(map(len, answers)) > 8
    for cut in (1, 5):
        resumed = [replace(r, prefill_ids=a[:cut]) for r, a in zip(requests, answers, strict=True)]
        for whole, completion in zip(answers, engine.generate(resumed), strict=True):
            assert completion.visible_ids[: len(whole)] == whole


def test_engine_leaves_mode_and_random_state_as_they_were():
    engine, model, _ = random_engine()
    reference = ids_of(engine.generate(random_requests(1.0, num=3)))
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert ids_of(engine.generate(random_requests(1.0, num=3))) == reference
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())


def test_engine_leaves_the_model_trainable():
    engine, model, _ = random_engine()
    engine.generate(random_requests(0.0, num=2))
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
