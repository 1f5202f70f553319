"""Runners against plain forwards, and which models take slots."""

from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoConfig,
    MambaConfig,
    MistralConfig,
)

from backtrack.generation import runner as runner_module
from backtrack.generation.runner import PlainRunner, SlotRunner, attending_by_sdpa, takes_slots
from backtrack.tree_attention import NAME, use_tree_attention
from tests.generation.random_engine import engine_of, ids_of, random_engine, random_requests
from tests.oracle_decode import naive_decode
from tests.tiny import FAMILIES, SLIDING_WINDOW, tiny_config, tiny_model

VOCAB_SIZE = 320
CAPACITY = 40
RUNNERS = {
    "slots": lambda model: SlotRunner(model, num_slots=4, capacity=CAPACITY),
    "static": lambda model: SlotRunner(model, num_slots=4, capacity=CAPACITY, is_static=True),
    "plain": lambda model: PlainRunner(model, num_slots=4),
}


def model_of(name: str):
    """A family of tests.tiny, or one whose every layer slides and takes the one mask."""
    if name in FAMILIES:
        return tiny_model(name, vocab_size=VOCAB_SIZE)
    assert name == "mistral"
    sizes = tiny_config("llama", VOCAB_SIZE).to_diff_dict()
    kept = {key: sizes[key] for key in sizes if key not in ("model_type", "architectures")}
    return other_model(MistralConfig(**kept, sliding_window=SLIDING_WINDOW))


def other_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def recurrent_model():
    return other_model(
        MambaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            initializer_range=0.1,
        )
    )


def alibi_model():
    return other_model(
        BloomConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1
        )
    )


def local_model():
    """Its local layers count their window in columns of the cache, whatever the mask."""
    return other_model(
        GPTNeoConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=16,
            initializer_range=0.1,
        )
    )


def words(dice: random.Random, count: int) -> list[int]:
    return [dice.randrange(VOCAB_SIZE) for _ in range(count)]


@torch.no_grad()
def plain_logits(model, text: list[int], count: int = 1) -> torch.Tensor:
    """(count, V) logits of what follows the last tokens of a text."""
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -count:]


def check_step(runner, model, texts: list[list[int]], dice: random.Random) -> None:
    """Add a token to each of the first slots and compare with plain forwards."""
    tokens, positions = words(dice, len(texts)), list(map(len, texts))
    logits = runner.step(tokens, positions)
    for text, token in zip(texts, tokens, strict=True):
        text.append(token)
    assert logits.dtype == torch.float32
    expected = torch.cat([plain_logits(model, text) for text in texts])
    assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("name", [*FAMILIES, "mistral"])
@torch.no_grad()
def test_runner_equals_plain_forwards(name, kind):
    # Windows of 8 tokens: the texts are shorter and longer.
    model, dice = model_of(name), random.Random(0)
    runner = RUNNERS[kind](model)
    texts = [words(dice, length) for length in (13, 0, 5, 21)]
    runner.prefill([2, 0, 3, 1], [texts[2], texts[0], texts[3], texts[1]])
    for _ in range(3):
        check_step(runner, model, texts, dice)
    # Slot 3 continues the beginning of slot 0, slot 1 the whole of slot 3 as it was; then all go on
    # differently, slot 0 behind the branch too.
    runner.copy(3, 1, len(texts[3]))
    runner.copy(0, 3, 9)
    texts[1], texts[3] = texts[3].copy(), texts[0][:9]
    for _ in range(3):
        check_step(runner, model, texts, dice)
    # The last slot is left, and a shorter text comes into a used one.
    texts = [texts[0], words(dice, 2), texts[2]]
    runner.prefill([1], [texts[1]])
    for _ in range(3):
        check_step(runner, model, texts, dice)
    # A row goes back: another branch goes on where the slot is not overwritten yet.
    texts[0] = texts[0][:12]
    check_step(runner, model, texts, dice)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("name", [*FAMILIES, "mistral"])
@torch.no_grad()
def test_runner_reads_runs_as_it_reads_tokens(name, kind):
    model, dice = model_of(name), random.Random(1)
    runner = RUNNERS[kind](model)
    # Slot 3 has 5 columns left, fewer than the longest run has tokens.
    texts = [words(dice, length) for length in (13, 4, 6, CAPACITY - 5)]
    runner.prefill(range(4), texts)
    runs = [words(dice, length) for length in (3, 1, 9)]
    logits = runner.extend([3, 0, 2], runs, [CAPACITY - 5, 10, 6])
    assert logits.shape == (3, 9, VOCAB_SIZE)
    assert logits.dtype == torch.float32
    texts[0] = texts[0][:10]
    for row, (slot, run) in enumerate(zip([3, 0, 2], runs, strict=True)):
        texts[slot] = texts[slot] + run
        expected = plain_logits(model, texts[slot], len(run))
        assert_close(logits[row, : len(run)], expected, atol=1e-4, rtol=0)
    for _ in range(2):
        check_step(runner, model, texts, dice)


@pytest.mark.parametrize("kind", ["slots", "static"])
@torch.no_grad()
def test_runner_reads_many_texts_in_groups(kind, monkeypatch):
    monkeypatch.setattr(runner_module, "PREFILL_TOKENS", 10)
    model, dice = model_of("gemma2"), random.Random(2)
    runner, shapes = RUNNERS[kind](model), []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    texts = [words(dice, length) for length in (12, 5, 4, 0)]
    runner.prefill(range(4), texts)
    # One that is longer than the limit alone; then two a time, of 5 columns; nothing for the empty.
    assert shapes == [(1, 12), (2, 5)]
    check_step(runner, model, texts, dice)


@torch.no_grad()
def test_runner_static_steps_have_one_shape():
    model, dice, shapes = model_of("gemma2"), random.Random(3), set()

    def forward(**inputs):
        masks = inputs["attention_mask"].values()
        shapes.add((tuple(inputs["input_ids"].shape), *(tuple(mask.shape) for mask in masks)))
        return model(**inputs)

    runner = SlotRunner(model, num_slots=4, capacity=CAPACITY, is_static=True, forward=forward)
    texts = [words(dice, length) for length in (3, 17)]
    runner.prefill([0, 1], texts)
    check_step(runner, model, texts, dice)
    # Slot 1 is free for a step, in which the first of its columns is overwritten, then taken again.
    check_step(runner, model, texts[:1], dice)
    texts = [texts[0], words(dice, 6), []]
    runner.prefill([1], [texts[1]])
    check_step(runner, model, texts, dice)
    check_step(runner, model, texts, dice)
    assert shapes == {((4, 1), (4, 1, 1, CAPACITY), (4, 1, 1, CAPACITY))}


@pytest.mark.parametrize("name", [*FAMILIES, "mistral"])
@torch.no_grad()
def test_runner_slots_are_taken_by_usual_architectures(name):
    assert takes_slots(model_of(name))


@pytest.mark.parametrize("make", [alibi_model, recurrent_model, local_model])
def test_runner_other_architectures_decode_right_without_slots(make):
    model = make()
    with torch.no_grad():
        assert not takes_slots(model)
    engine, known = engine_of(model)
    requests = [
        request
        for temperature in (0.0, 1.0)
        # Longer than the window of local attention.
        for request in random_requests(temperature, 3, max_new_tokens=8, reset_bias=3.0)
    ]
    completions = engine.generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        naive = naive_decode(model, request, **known)
        assert list(completion.visible_ids) == naive.visible
        assert completion.num_resets == naive.num_resets
    assert sum(completion.num_resets for completion in completions) > 0


def test_runner_slots_are_tried_without_a_trace():
    # Twice the same, and training goes on as if nothing had been tried.
    model = model_of("llama")
    with torch.no_grad():
        assert takes_slots(model)
        assert takes_slots(model)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def attentions(model) -> list[str]:
    """What the model and each of its layers attend by."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return [config._attn_implementation for config in configs if config is not None]


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2"])
def test_runner_attention_is_swapped_and_restored(name):
    model = model_of("llama")
    model.config._attn_implementation = name
    before = attentions(model)
    assert set(before) == {name}
    with attending_by_sdpa(model):
        assert set(attentions(model)) == {"sdpa"}
    assert attentions(model) == before

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), attending_by_sdpa(model):
        fail()
    assert attentions(model) == before
    model._supports_sdpa = False
    with attending_by_sdpa(model):
        assert set(attentions(model)) == {"eager"}


@pytest.mark.parametrize("name", ["sdpa", "eager", NAME])
def test_runner_other_attention_is_left_alone(name):
    model = model_of("llama")
    model.config._attn_implementation = name
    with attending_by_sdpa(model):
        assert set(attentions(model)) == {name}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_runner_tree_attention_decodes_alike(family, temperature):
    requests = random_requests(temperature)
    expected = ids_of(random_engine(family)[0].generate(requests))
    engine, model, _ = random_engine(family)
    use_tree_attention(model, on_gpu=False)
    assert set(attentions(model)) == {NAME}
    assert ids_of(engine.generate(requests)) == expected
    assert engine._takes_slots
    assert set(attentions(model)) == {NAME}


def test_runner_flex_attention_decodes_alike():
    requests = random_requests(1.0)
    expected = ids_of(random_engine()[0].generate(requests))
    engine, model, _ = random_engine()
    model.config._attn_implementation = "flex_attention"
    assert ids_of(engine.generate(requests)) == expected
    assert set(attentions(model)) == {"flex_attention"}
