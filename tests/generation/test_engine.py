"""What an engine makes of an answer, with a model that says what its script says."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count

import pytest

from backtrack.data.template import encode_prompt
from backtrack.generation import engine as engine_module
from backtrack.generation.engine import Completion, HFEngine, Request
from backtrack.tokens import encode_text
from tests.generation.scripted import (
    GREEDY,
    A,
    B,
    C,
    D,
    E,
    R,
    ScriptedModel,
    scripted,
    tokenizer_with_reset,
)
from tests.tiny import byte_tokenizer


def answer_of(engine: HFEngine, prompt=(1,), prefill=(), **changes) -> Completion:
    request = Request(prompt, prefill, sampling=replace(GREEDY, **changes))
    return engine.generate([request])[0]


def test_engine_visible_is_what_follows_the_reset():
    engine, model = scripted([(1,), (A, B, R, C, D, E)])
    completion = answer_of(engine)
    assert completion.visible_ids == (C, D)
    assert completion.visible_text == "cd"
    assert completion.discarded == ((A, B),)
    assert completion.discarded_texts == ("ab",)
    assert completion.num_resets == 1
    assert completion.finish_reason == "stop"
    assert (completion.num_generated, completion.num_discarded) == (6, 2)
    # What was taken back stays in the context.
    assert model.texts[-1] == [(1, A, B, R, C, D)]


def test_engine_max_resets_is_honoured():
    dialogues = [(1,), (A, R, B, (R, C), D, E)], [(1, A, R, B, C), (D, E)], [(1,), ((R, B), A, E)]
    engine, _ = scripted(*dialogues[:2])
    assert answer_of(engine, max_resets=1).visible_ids == (B, C, D)
    twice = answer_of(engine, max_resets=2)
    assert (twice.visible_ids, twice.discarded) == ((D,), ((A,), (B,)))
    engine, _ = scripted(dialogues[2], [(1, B), (C, E)])
    assert answer_of(engine, max_resets=1).visible_ids == (A,)
    assert answer_of(engine, max_resets=0) == replace(
        answer_of(engine, reset_bias=-math.inf),
        ttft_s=pytest.approx(0, abs=1),
        seconds=pytest.approx(0, abs=1),
    )
    assert answer_of(engine, max_resets=0).visible_ids == (B, C)


@pytest.mark.parametrize(
    ("max_new_tokens", "visible", "reason"),
    [
        (2, (A, B), "length"),
        (3, (), "length_after_reset"),
        (4, (C,), "length"),
        (5, (C,), "stop"),
    ],
)
def test_engine_budget_never_shows_what_was_taken_back(max_new_tokens, visible, reason):
    engine, _ = scripted([(1,), (A, B, R, C, E)])
    completion = answer_of(engine, max_new_tokens=max_new_tokens)
    assert completion.visible_ids == visible
    assert completion.finish_reason == reason
    assert completion.num_generated == max_new_tokens
    assert (completion.ttft_s is None) == (not visible)


def test_engine_stop_right_after_a_reset_is_an_empty_answer():
    engine, _ = scripted([(1,), (A, R, E)])
    completion = answer_of(engine)
    assert (completion.visible_ids, completion.visible_text) == ((), "")
    assert (completion.finish_reason, completion.ttft_s) == ("stop", None)


def test_engine_prefill_is_part_of_the_answer():
    engine, _ = scripted([(1, A, B), (C, E)], [(1, A, D), (R, B, E)])
    completion = answer_of(engine, prefill=(A, B))
    assert completion.visible_ids == (A, B, C)
    assert completion.num_generated == 2
    taken_back = answer_of(engine, prefill=(A, D))
    assert (taken_back.visible_ids, taken_back.discarded) == ((B,), ((A, D),))
    # The budget is for what is generated.
    assert answer_of(engine, prefill=(A, B), max_new_tokens=1).visible_ids == (A, B, C)


def test_engine_reset_in_the_prefill_counts():
    engine, _ = scripted([(1, A, R), ((R, B), C, E)], [(1, A, R, B), (C, E)])
    completion = answer_of(engine, prefill=(A, R), max_resets=1)
    assert (completion.visible_ids, completion.discarded) == ((B, C), ((A,),))
    assert completion.num_resets == 1
    assert answer_of(engine, prefill=(A, R), max_resets=2).num_resets == 2


def test_engine_literal_reset_is_text():
    tokenizer = tokenizer_with_reset()
    typed = "say [RESET] and go on"
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": typed}])
    assert R not in prompt
    spelled = encode_text(tokenizer, typed)
    engine, _ = scripted([prompt, (*spelled, E)])
    completion = answer_of(engine, prompt, max_new_tokens=50)
    assert (completion.visible_text, completion.num_resets) == (typed, 0)


def test_engine_text_leaves_special_tokens_out():
    engine, _ = scripted([(1,), (A, 257, B, R, 256, C, E)])
    completion = answer_of(engine)
    assert (completion.visible_text, completion.discarded_texts) == ("c", ("ab",))
    assert completion.visible_ids == (256, C)


def test_engine_ended_answers_leave_their_batch():
    engine, model = scripted([(1,), (A, E)], [(2, 3), (A, R, B, C, E)], [(4,), (B, B, B, E)])
    prompts = [(1,), (2, 3), (4,)]
    completions = engine.generate([Request(prompt, sampling=GREEDY) for prompt in prompts])
    assert [c.visible_text for c in completions] == ["a", "bc", "bbb"]
    assert [len(texts) for texts in model.texts] == [3, 3, 2, 2, 1]
    assert [c.num_generated for c in completions] == [2, 5, 4]


def test_engine_budgets_are_of_each_request():
    engine, _ = scripted([(1,), (A,) * 9], [(2,), (B,) * 9])
    short, long = (replace(GREEDY, max_new_tokens=n) for n in (2, 5))
    completions = engine.generate([Request((1,), sampling=short), Request((2,), sampling=long)])
    assert [c.visible_text for c in completions] == ["aa", "bbbbb"]


def test_engine_times_are_of_the_first_visible_and_the_last_token(monkeypatch):
    # The clock ticks once a step: 0 at the start, a at 1, [RESET] at 2, b at 3, c at 4, end at 5.
    engine, _ = scripted([(1,), (A, R, B, C, E)], [(2,), (A, B, E)], [(3, A), (R, C, E)])
    for prompt, prefill, times in (((1,), (), (3, 5)), ((2,), (), (1, 3)), ((3,), (A,), (2, 3))):
        monkeypatch.setattr(engine_module.time, "perf_counter", count().__next__)
        completion = answer_of(engine, prompt, prefill)
        assert (completion.ttft_s, completion.seconds) == times


def test_engine_context_ends_an_answer():
    engine, _ = scripted([(1, 2, 3), (A,) * 9], max_length=5)
    completion = answer_of(engine, (1, 2, 3))
    assert (completion.visible_text, completion.finish_reason) == ("aa", "length")
    with pytest.raises(ValueError, match=r"prompt_ids: request '0' has 5 tokens"):
        answer_of(engine, (1, 2, 3), (4, 5))


def test_engine_refuses_what_it_cannot_decode():
    engine, model = scripted([(1,), (A, E)])
    with pytest.raises(ValueError, match="prompt_ids: request '0' has none"):
        answer_of(engine, ())
    with pytest.raises(ValueError, match="prefill_ids: request '0' holds an end-of-turn"):
        answer_of(engine, (1,), (A, E))
    assert model.texts == []
    assert engine.generate([]) == []
    with pytest.raises(ValueError, match=r"no \[RESET\]"):
        HFEngine(model, byte_tokenizer(), batch_size=1)
    with pytest.raises(ValueError, match="batch_size: 0"):
        HFEngine(model, tokenizer_with_reset(), batch_size=0)
    with pytest.raises(ValueError, match=r"259 rows and none for \[RESET\]"):
        HFEngine(ScriptedModel({}, num_words=259), tokenizer_with_reset(), batch_size=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("max_new_tokens", 0),
        ("max_resets", -1),
        ("reset_bias", math.nan),
    ],
)
def test_sampling_names_the_setting_that_is_wrong(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        replace(GREEDY, **{name: value})


def test_engine_stops_at_the_models_own_end_but_not_at_a_word():
    # Llama's config says eos 2 where none is set: an ordinary word here; 257 is special.
    _, model = scripted([(1,), (2, A, 257, B)])
    model.generation_config.eos_token_id = [2, 257]
    engine = HFEngine(model, tokenizer_with_reset(), batch_size=1)
    engine._make_runner = lambda capacity, num_slots: model
    completion = answer_of(engine)
    assert (completion.visible_ids, completion.finish_reason) == ((2, A), "stop")


def test_engine_restores_the_mode_after_an_error():
    engine, model = scripted([(1,), (A, E)])
    model.train()
    model.step = None
    with pytest.raises(TypeError):
        answer_of(engine)
    assert model.training
