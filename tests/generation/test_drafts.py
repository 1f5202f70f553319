"""Drafts: what one branch said is read ahead for the next, and kept as far as it comes true."""

from __future__ import annotations

import pytest

from backtrack.generation import board as board_module
from backtrack.generation import engine as engine_module
from tests.generation.scripted import A, B, C, D, E, R, requests_at, scripted


def test_draft_that_comes_true_takes_one_forward():
    # After [RESET] it says what it said at first, which begins alike and so is the draft.
    engine, model = scripted([(1,), (A, (B, R), C, D, E)], [(1, A, R), (A, B, C, D, E)])
    trunk, branch = engine.generate(requests_at(0.0, 2.0))
    assert (trunk.visible_text, branch.visible_text) == ("abcd", "abcd")
    assert branch.discarded == ((A,),)
    assert [len(texts) for texts in model.texts] == [1] * 6
    assert model.texts[5] == [(1, A, R)]
    draft = (A, B, C, D, E)
    assert model.extended == [(1, A, R, *draft[:n]) for n in range(1, 6)]
    # Margins and the closest choice are those that steps would have found.
    (alone,) = engine.generate(requests_at(2.0))
    assert branch.reset_margins == alone.reset_margins == (-10, -1, *[-10] * 5)
    assert branch.closest_choice == alone.closest_choice == 1.0


def test_draft_that_goes_wrong_changes_nothing():
    # The draft is b c d; the branch says b, then d d c.
    engine, model = scripted([(1,), (A, (B, R), C, D, E)], [(1, A, R), (A, B, D, D, C, E)])
    trunk, branch = engine.generate(requests_at(0.0, 2.0))
    assert (trunk.visible_text, branch.visible_text) == ("abcd", "abddc")
    # Up to the wrong token the draft has saved forwards; it is read in the draft's place.
    assert [texts[0][3:] for texts in model.texts[6:]] == [(A, B, D), (A, B, D, D), (A, B, D, D, C)]


def test_draft_of_a_row_that_branches_goes_on():
    # Two strands share the reset row. One has a second reset and takes it at the first place of the
    # draft; the other has none left, though [RESET] would still win at the bias of the first.
    engine, model = scripted(
        [(1,), (A, (B, C, D, R), C, E)],
        [(1, A, R), (A, (B, C, D, R), (C, A, D, R), E)],
        [(1, A, R, A, R), (D, E)],
    )
    asked = [*requests_at(0.0), *requests_at(4.0, max_resets=2), *requests_at(4.0)]
    completions = engine.generate(asked)
    assert [c.visible_text for c in completions] == ["abc", "d", "abc"]
    assert [c.discarded for c in completions] == [(), ((A,), (A,)), ((A,),)]
    assert model.extended == [(1, A, R, *(A, B, C, E)[:n]) for n in range(1, 5)]
    trunk = [(1, A, B, C)[:n] for n in range(1, 5)]
    rest = [(1, A, R), (1, A, R, A, R), (1, A, R, A, R, D)]
    assert model.texts == [[text] for text in [*trunk, *rest]]


def test_draft_is_read_in_pieces(monkeypatch):
    # Two tokens of the draft at a time, behind the one that is read anyway. Between reads all rows
    # take a step, which goes on with the draft too.
    monkeypatch.setattr(engine_module, "DRAFT_TOKENS", 2)
    again = [A, B, C, D, A, B, C, D]
    engine, model = scripted([(1,), ((A, R), *again[1:], E)], [(1, R), (*again, E)])
    extend, lengths = model.extend, []
    model.extend = lambda slots, runs, positions: (
        lengths.extend(map(len, runs)) or extend(slots, runs, positions)
    )
    trunk, branch = engine.generate(requests_at(0.0, 2.0, max_new_tokens=20))
    assert trunk.visible_ids == branch.visible_ids == tuple(again)
    # R | a b c | d | a b c | d and the end.
    assert lengths == [3, 3]
    steps = ((1, R), (1, R, A, B, C, D), (1, R, A, B, C, D, A, B, C, D))
    assert model.texts[9:] == [[text] for text in steps]


@pytest.mark.parametrize("max_new_tokens", range(1, 9))
def test_draft_is_no_longer_than_the_budget(max_new_tokens):
    engine, model = scripted([(1,), (A, (B, R), C, D, E)], [(1, A, R), (A, B, C, D, E)])
    trunk, branch = engine.generate(requests_at(0.0, 2.0, max_new_tokens=max_new_tokens))
    assert trunk.visible_text == "abcd"[:max_new_tokens]
    assert branch.visible_text == ("abcd"[: max_new_tokens - 2] if max_new_tokens > 1 else "a")
    assert branch.num_generated == min(max_new_tokens, 7)
    assert max(map(len, model.extended), default=0) <= max_new_tokens


def test_draft_is_not_made_where_drafts_do_not_pay(monkeypatch):
    monkeypatch.setattr(board_module, "FIRST_DRAFTS", 2)
    dialogues = [
        line for n in range(1, 6) for line in ([(n,), ((A, R), B, E)], [(n, R), (A, C, C, E)])
    ]
    engine, model = scripted(*dialogues, batch_size=1)
    asked = [r for n in range(1, 6) for r in requests_at(0.0, 2.0, prompt=(n,))]
    completions = engine.generate(asked)
    assert [c.visible_text for c in completions] == ["ab", "acc"] * 5
    assert len({text[0] for text in model.extended}) == 2


def test_draft_may_be_what_another_prompt_was_told():
    # All prompts are told "dcba" after the reset, and "ab" before.
    dialogues = [
        line for n in range(1, 4) for line in ([(n,), ((A, R), B, E)], [(n, R), (D, C, B, A, E)])
    ]
    engine, model = scripted(*dialogues, batch_size=1)
    asked = [r for n in range(1, 4) for r in requests_at(0.0, 2.0, prompt=(n,))]
    assert [c.visible_text for c in engine.generate(asked)] == ["ab", "dcba"] * 3
    first, *others = dict.fromkeys(text[0][0] for text in model.texts)
    assert {text[0] for text in model.extended} == set(others)
    assert [text[1:] for text in model.extended if text[0] == others[0]] == [
        (R, *(D, C, B, A, E)[:n]) for n in range(1, 6)
    ]
    assert first not in {text[0] for text in model.extended}


def test_drafts_that_are_never_found_do_not_pay(monkeypatch):
    # Branches begin as nobody began: after two of them the others take free slots at once.
    monkeypatch.setattr(board_module, "FIRST_DRAFTS", 2)
    dialogues = [
        line for n in range(1, 6) for line in ([(n,), ((A, R), B, B, E)], [(n, R), (C + n, E)])
    ]
    engine, model = scripted(*dialogues, batch_size=2)
    asked = [r for n in range(1, 6) for r in requests_at(0.0, 2.0, prompt=(n,))]
    assert [c.num_resets for c in engine.generate(asked)] == [0, 1] * 5
    assert model.extended == []
    assert model.copies
