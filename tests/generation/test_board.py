"""Which texts are read, stepped and copied, with models that keep texts in their slots."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch.testing import assert_close

from backtrack.generation import board as board_module
from backtrack.generation import engine as engine_module
from backtrack.generation.board import Board
from backtrack.generation.reset import keyed_gumbel, noise_key
from backtrack.generation.strands import choose
from backtrack.generation.types import Request
from tests.generation.random_engine import ids_of
from tests.generation.scripted import (
    GREEDY,
    A,
    B,
    BabblingModel,
    C,
    D,
    E,
    R,
    requests_at,
    run_by_itself,
    scripted,
)

INF = float("inf")
# [RESET] has 10 less than the best token, then 3, 1, 10 and 10 less: biases below 1 leave this
# answer as it is, those below 3 reset at its third step, those below 10 at its second.
WAVERING = [
    [(1,), (A, (B, C, D, R), (C, R), D, E)],
    [(1, A, B, R), (D, E)],
    [(1, A, R), (C, E)],
    [(1, R), (B, E)],
]


@pytest.fixture
def no_drafts(monkeypatch):
    """Branches that begin with [RESET] take free slots like all others."""
    monkeypatch.setattr(Board, "_drafts_pay", False)


def random_requests() -> list[Request]:
    """Three prompts, greedy and sampled, at five biases, with budgets and resets of their own."""
    return [
        Request(
            (n, *[9] * n),
            (A,) * (n % 2),
            request_id=str(n),
            sample=sample,
            sampling=replace(
                GREEDY,
                temperature=0.5 * sample,
                reset_bias=bias,
                max_resets=n,
                max_new_tokens=6 + n,
            ),
        )
        for n in (1, 2, 3)
        for sample in (0, 1, 2)
        for bias in (-INF, -1.0, 0.0, 1.0, INF)
    ]


def test_board_samples_of_a_prompt_read_it_once():
    engine, model = scripted([(1, 2, 3), (A, B, R, C, E)])
    asked = [
        Request((1, 2, 3), sample=k, sampling=replace(GREEDY, temperature=0.1)) for k in (0, 1)
    ]
    assert [c.visible_text for c in engine.generate(asked)] == ["c", "c"]
    # The last token of a prompt is read with the first step.
    assert model.read == [(1, 2)]
    assert model.texts[0] == [(1, 2, 3)]
    # As long as samples agree they are one row; they always do at this temperature.
    assert [len(texts) for texts in model.texts] == [1] * 5
    wild = [replace(r, sampling=replace(r.sampling, temperature=9.0)) for r in asked]
    first, second = engine.generate(wild)
    assert first.visible_ids != second.visible_ids
    assert model.read == [(1, 2)] * 2
    assert [len(texts) for texts in model.texts[5:]][:2] == [1, 2]


def test_board_biases_share_every_step_before_the_first_reset(no_drafts):
    engine, model = scripted(*WAVERING)
    biases = (0.0, 0.5, 2.0, -INF, 4.0, 2.5, 11.0)
    completions = engine.generate(requests_at(*biases))
    assert [c.visible_text for c in completions] == ["abcd", "abcd", "d", "abcd", "c", "d", "b"]
    assert model.read == [()]
    assert [sorted(texts) for texts in model.texts] == [
        [(1,)],
        [(1, A), (1, R)],
        [(1, A, B), (1, A, R), (1, R, B)],
        [(1, A, B, C), (1, A, B, R), (1, A, R, C)],
        [(1, A, B, C, D), (1, A, B, R, D)],
    ]


def test_board_branches_are_copied_up_to_the_branch(no_drafts):
    engine, model = scripted(*WAVERING)
    engine.generate(requests_at(0.0, 2.0))
    # (1 A B) is shared, C and R are not in the cache yet.
    assert model.copies == [(0, 1, 3)]


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("draft_tokens", [0, 1, 16])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_board_computes_every_text_once(batch_size, draft_tokens, forgets, monkeypatch):
    monkeypatch.setattr(engine_module, "DRAFT_TOKENS", draft_tokens)
    monkeypatch.setattr(board_module, "MIN_DRAFTED", 1)
    if not draft_tokens:
        monkeypatch.setattr(Board, "_drafts_pay", False)
    model = BabblingModel(seed=0, forgets=forgets)
    completions = run_by_itself(model, batch_size).generate(random_requests())
    prompts = {(*r.prompt_ids, *r.prefill_ids) for r in random_requests()}
    assert sorted(model.read) == sorted(prompt[:-1] for prompt in prompts)
    # What is needed is the beginnings of the answers.
    needed, alone = set(), BabblingModel(seed=0, forgets=forgets)
    for request, completion in zip(random_requests(), completions, strict=True):
        assert ids_of([completion]) == ids_of(run_by_itself(alone, 1).generate([request]))
        needed.update(chain.from_iterable(alone.texts))
        alone.texts.clear()
    assert len({c.visible_ids for c in completions}) > 15
    # A draft that goes wrong for one branch may be what another says.
    may_coincide = [] if draft_tokens and not forgets else model.extended
    computed = Counter([*chain.from_iterable(model.texts), *may_coincide])
    assert set(computed.values()) == {1}
    assert set(chain.from_iterable(model.texts)) | (needed & set(model.extended)) == needed
    # One that does not forget says what nobody said before, more often than not.
    assert bool(model.extended) == (draft_tokens > 0) or not forgets
    assert max(map(len, model.texts)) <= batch_size
    if batch_size == 1:
        # A branch takes over the slot of the row it left.
        assert model.copies == []


def test_board_one_slot_gives_everything(no_drafts):
    engine, model = scripted(*WAVERING, batch_size=1)
    completions = engine.generate(requests_at(0.0, 2.0, 4.0, 11.0))
    assert [c.visible_text for c in completions] == ["abcd", "d", "c", "b"]
    # The trunk first; then the longest branch of those that wait, or its past would be overwritten.
    assert [text for (text,) in model.texts] == [
        (1,),
        (1, A),
        (1, A, B),
        (1, A, B, C),
        (1, A, B, C, D),
        (1, A, B, R),
        (1, A, B, R, D),
        (1, A, R),
        (1, A, R, C),
        (1, R),
        (1, R, B),
    ]


def test_board_holes_are_closed():
    # The first and the third end at once, the fourth a step later: the last row moves to slot 0,
    # and from slot 1 on nothing is left but the second.
    engine, model = scripted(
        [(7, 1, 1, 1), (E,)],
        [(7, 2, 2), (A, B, E)],
        [(7, 3), (E,)],
        [(4,), (C, E)],
        batch_size=4,
    )
    prompts = [(7, 1, 1, 1), (7, 2, 2), (7, 3), (4,)]
    completions = engine.generate([Request(p, sampling=GREEDY) for p in prompts])
    assert [c.visible_text for c in completions] == ["", "ab", "", "c"]
    assert model.texts == [prompts, [(4, C), (7, 2, 2, A)], [(7, 2, 2, A, B)]]
    assert model.copies == [(3, 0, 1), (1, 0, 4)]


def test_board_the_longest_texts_come_first():
    prompts = [(1, 9), (2, 9, 9, 9), (3, 9, 9), (4,)]
    engine, model = scripted(*[[prompt, (A, E)] for prompt in prompts], batch_size=2)
    completions = engine.generate([Request(p, sampling=GREEDY) for p in prompts])
    assert [c.visible_text for c in completions] == ["a"] * 4
    assert model.read == [(2, 9, 9), (3, 9), (1,), ()]
    assert [[text[0] for text in texts] for texts in model.texts] == [[2, 3]] * 2 + [[1, 4]] * 2


def test_board_texts_come_in_when_an_eighth_of_the_slots_is_free():
    # Text n ends after n + 1 steps. Of 16 slots one is free after a step, two after the second.
    prompts = [(n,) for n in range(18)]
    engine, model = scripted(*[[p, (*[A] * p[0], E)] for p in prompts], batch_size=16)
    # Equally long texts: the last asked comes first.
    asked = [Request(p, sampling=replace(GREEDY, max_new_tokens=30)) for p in prompts[::-1]]
    completions = engine.generate(asked)
    assert [len(c.visible_ids) for c in completions] == list(range(18))[::-1]
    assert [len(texts) for texts in model.texts[:4]] == [16, 15, 16, 15]


def test_board_budgets_of_strands_in_one_row_differ():
    engine, model = scripted([(1,), (A,) * 9])
    asked = [r for n in (2, 5, 3) for r in requests_at(0.0, max_new_tokens=n)]
    completions = engine.generate(asked)
    assert [c.visible_text for c in completions] == ["aa", "aaaaa", "aaa"]
    assert [c.finish_reason for c in completions] == ["length"] * 3
    assert [len(texts) for texts in model.texts] == [1] * 5


def test_board_budgets_of_strands_in_one_row_end_within_a_draft():
    # What follows the reset of the one prompt is the draft of the other's, of which one strand has
    # five tokens left and one two.
    after_reset = (B, C, B, C, B, C, E)
    engine, model = scripted(
        [(1,), (R, *after_reset)], [(2,), (A,) * 12 + (R, *after_reset)], batch_size=8
    )
    budgets = (30, 18, 16)
    early = requests_at(0.0, max_new_tokens=30)
    late = [
        replace(request, prompt_ids=(2,))
        for n in budgets
        for request in requests_at(0.0, max_new_tokens=n)
    ]
    completions = engine.generate([*early, *late])
    assert model.extended
    assert [c.visible_text for c in completions] == ["bcbcbc", "bcbcbc", "bcbcb", "bcb"]
    assert [c.num_generated for c in completions] == [8, 20, 18, 16]


def test_board_resets_of_strands_in_one_row_are_counted_each(no_drafts):
    engine, model = scripted([(1,), ((R, A), (R, B), (R, C), E)], [(1, R, R, C), (D, E)])
    asked = [r for n in (3, 0, 2, 1, 2) for r in requests_at(0.0, max_resets=n)]
    completions = engine.generate(asked)
    assert [c.num_resets for c in completions] == [3, 0, 2, 1, 2]
    assert completions[2].visible_text == completions[4].visible_text == "cd"
    assert [len(texts) for texts in model.texts][:3] == [1, 2, 3]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_board_answers_are_not_changed_by_rows_that_go_on(batch_size):
    engine = run_by_itself(BabblingModel(seed=1), batch_size)
    complete, seen = engine._complete, []

    def keep(request, answer):
        seen.append((answer, copy.deepcopy(answer)))
        return complete(request, answer)

    engine._complete = keep
    # Budgets end while others of the same row go on.
    longer = [
        replace(r, sampling=replace(r.sampling, max_new_tokens=n))
        for r in random_requests()
        for n in (2, 5)
    ]
    completions = engine.generate([*random_requests(), *longer])
    assert sum(len(answer.requests) for answer, _ in seen) == len(completions) == 135
    assert all(answer == then for answer, then in seen)
    for answer, _ in seen:
        assert len(answer.tokens) == len(answer.times) == len(answer.margins)
    assert all(len(c.reset_margins) == c.num_generated for c in completions)


@pytest.mark.parametrize(
    ("bias", "closest"),
    [
        # At step two b beats c by 1; [RESET] loses by 1 at step three, at bias 0.25 by 0.75.
        (-INF, 1.0),
        (-1.0, 1.0),
        (0.25, 0.75),
        # It loses by 3 - 2.5 at step two and wins by 2.5 - 1 at step three.
        (2.5, 0.5),
        # It wins by 0.25 at step two.
        (3.25, 0.25),
        (1.0, 0.0),
    ],
)
def test_board_margins_and_closest_choice_by_hand(bias, closest):
    engine, _ = scripted(*WAVERING)
    (completion,) = engine.generate(requests_at(bias))
    # Without bias, whatever the bias. Once [RESET] is banned it has still its margin.
    margins = (-10, -3, -10, -10) if bias == 3.25 else (-10, -3, -1, -10, -10)
    assert completion.reset_margins == margins
    assert completion.closest_choice == closest
    # A tie goes to the lower id, here to c.
    assert completion.num_resets == (bias > 1)


def test_board_margins_of_samples_hold_noise_times_temperature():
    engine, _ = scripted([(1,), (A, E)])
    sampling = replace(GREEDY, temperature=0.5, seed=4)
    request = Request((1,), request_id="x", sample=2, sampling=sampling)
    (completion,) = engine.generate([request])
    assert completion.visible_ids == (A,)
    key = torch.tensor([noise_key(4, "x", 2)])
    for step, best in enumerate((A, E)):
        noise = 0.5 * keyed_gumbel(key, torch.tensor([step]), torch.arange(260))[0]
        margin = noise[R] - (10 + noise[best])
        assert_close(torch.tensor(completion.reset_margins[step]), margin)


@pytest.mark.parametrize("reset_id", [0, 2])
def test_board_ties_are_broken_for_each_strand(reset_id, no_drafts):
    # Of three strands of a voice one loses, one ties, one wins: the lowest id wins a tie.
    board = Board(
        requests_at(0.0, 1.0, 1.5),
        num_slots=3,
        reset_id=reset_id,
        stop_ids={9},
        max_length=INF,
        device=torch.device("cpu"),
        clock=lambda: 0.0,
    )
    board.admit()
    logits = torch.tensor([[0.0, 5.0, 0.0, 2.0]])
    logits[0, reset_id] = 4.0
    board.record(choose(logits, board.voices(), reset_id=reset_id, is_sampled=False))
    board.place_branches()
    found = {
        row.tokens[-1]: [s.reset_bias for voice in row.voices for s in voice.strands]
        for row in board.rows
    }
    assert found == ({1: [0.0], 0: [1.0, 1.5]} if reset_id == 0 else {1: [0.0, 1.0], 2: [1.5]})
