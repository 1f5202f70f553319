"""A frontier from log-probs: one run with [RESET] banned, then one answer for each reset."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from backtrack.generation.frontier import approximate_frontier
from tests.generation.scripted import make_script
from tests.generation.stub_server import A, B, C, D, E, R, asked, engine_at, serving

# [RESET] has 7 against 10 at the first step, 9 against 10 at the second, 0 after.
SCRIPT = make_script(
    [(1,), ((A, B, C, R), (B, R), D, E)],
    [(1, R), (C, C, E)],
    [(1, A, R), (D, C, E)],
)
BIASES = (-math.inf, 0.0, 1.5, 2.0, 3.5)


class WithoutMargins:
    reset_id = R

    def __init__(self, engine):
        self.engine = engine

    def generate(self, requests):
        return [replace(c, reset_margins=()) for c in self.engine.generate(requests)]


def words_of(completion):
    """All of a completion but times and margins."""
    return replace(completion, seconds=0.0, reset_margins=())


@pytest.mark.parametrize("dialect", ["vllm", "llama"])
@pytest.mark.parametrize("prefill", [(), (A,), (A, R)])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 12])
def test_approximate_frontier_equals_separate_runs(dialect, prefill, max_new_tokens):
    requests = [asked(prefill=prefill, max_new_tokens=max_new_tokens)]
    with serving(SCRIPT, dialect=dialect) as server:
        engine = engine_at(server)
        found = approximate_frontier(engine, requests, BIASES)
        for bias, completions in zip(BIASES, found.completions, strict=True):
            again = [replace(r, sampling=replace(r.sampling, reset_bias=bias)) for r in requests]
            assert list(map(words_of, completions)) == list(map(words_of, engine.generate(again)))
            assert [len(c.reset_margins) for c in completions] == [completions[0].num_generated]
    assert not found.is_exact


def test_approximate_frontier_asks_once_for_each_reset():
    with serving(SCRIPT) as server:
        found = approximate_frontier(engine_at(server), [asked()], BIASES)
    assert [row[0].visible_ids for row in found.completions] == [
        (A, B, D),
        (A, B, D),
        (D, C),
        (D, C),
        (C, C),
    ]
    assert [question["prompt"] for question in server.questions[:1]] == [[1]]
    assert sorted(q["prompt"] for q in server.questions[1:]) == [[1, A, R], [1, R]]


def test_approximate_frontier_knows_the_margin_of_every_banned_token():
    """vLLM names [RESET] wherever it is asked to, however unlikely."""
    with serving(SCRIPT, dialect="vllm") as server:
        trunk = approximate_frontier(engine_at(server), [asked()], [0.0]).completions[0][0]
    assert trunk.reset_margins == pytest.approx((-3, -1, -10, -10))


def test_approximate_frontier_samples_as_often_as_the_model_does():
    """[RESET] against one other token: odds e^(9 - 10 + b) at T = 1, give or take the rest."""
    script = make_script([(1,), ((A, R), E)], [(1, R), (C, E)])
    requests = [asked(request_id=str(i), temperature=1, max_new_tokens=2) for i in range(300)]
    biases = (-2.0, 0.0, 1.0, 3.0)
    with serving(script) as server:
        found = approximate_frontier(engine_at(server, concurrency=8), requests, biases)
    rest = 258 * math.exp(-10)
    for bias, row in zip(biases, found.completions, strict=True):
        odds = math.exp(bias - 1) / (1 + rest)
        chance = odds / (1 + odds)
        error = math.sqrt(chance * (1 - chance) / len(requests))
        assert sum(c.num_resets for c in row) / len(row) == pytest.approx(chance, abs=4 * error)
    # The noise is the same at all biases: what resets at one resets at every larger one.
    resets = [{i for i, c in enumerate(row) if c.num_resets} for row in found.completions]
    assert resets[0] < resets[1] < resets[2] < resets[3]


def test_approximate_frontier_refuses_what_it_cannot_do():
    with serving(SCRIPT) as server:
        engine = engine_at(server)
        with pytest.raises(ValueError, match="max_resets: 2"):
            approximate_frontier(engine, [asked(max_resets=2)], [0.0])
        with pytest.raises(ValueError, match=r"biases: .*different"):
            approximate_frontier(engine, [asked()], [0.0, 0.0])
        with pytest.raises(ValueError, match="gives no margins"):
            approximate_frontier(WithoutMargins(engine), [asked()], [0.0])
