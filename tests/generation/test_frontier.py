"""The law of the frontier: one call gives what a run at each bias gives, token for token."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, chain

import pytest

from backtrack.generation.engine import Completion, Request
from backtrack.generation.frontier import CLOSE, Frontier, frontier
from tests.generation.random_engine import ids_of, random_engine, random_requests
from tests.generation.scripted import GREEDY, A, B, C, D, E, R, scripted
from tests.oracle_decode import naive_decode
from tests.tiny import FAMILIES

# In no order, and where random models part: [RESET] loses by about 1 if greedy, by 4 if sampled.
BIASES = {
    0.0: (0.0, -math.inf, 10.0, 1.0, -10.0, 0.6, 2.0, 1.5, 1.3),
    1.0: (0.0, -math.inf, 10.0, 2.5, -10.0, 5.0, 3.5, 3.0, 4.0),
}


def asked(temperature: float, num: int = 4) -> list[Request]:
    """Prompts with 0, 1, 2, 3 resets at most; four samples of each where they are sampled."""
    return [
        replace(request, sample=sample, sampling=replace(request.sampling, max_resets=i % 4))
        for i, request in enumerate(random_requests(temperature, num, max_new_tokens=10))
        for sample in range(4 if temperature else 1)
    ]


def at(bias: float, requests: list[Request]) -> list[Request]:
    return [replace(r, sampling=replace(r.sampling, reset_bias=bias)) for r in requests]


def is_close(completion: Completion) -> bool:
    return completion.closest_choice < CLOSE


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_frontier_equals_separate_runs(family, temperature):
    biases, seed = BIASES[temperature], 1 + FAMILIES.index(family)
    requests = asked(temperature)
    single = random_engine(family, 16, seed)[0]
    separate = [single.generate(at(bias, requests)) for bias in biases]
    # Slots that keep texts (test_properties.py) try one slot with samples too.
    for batch_size in (3, 64) if temperature else (1, 3, 64):
        found = frontier(random_engine(family, batch_size, seed)[0], requests, biases)
        assert found.biases == biases
        assert len(found.completions) == len(biases)
        num_equal = 0
        for runs, shared in zip(separate, found.completions, strict=True):
            for alone, completion in zip(runs, shared, strict=True):
                if not is_close(alone):
                    assert ids_of([completion]) == ids_of([alone])
                    assert completion.reset_margins == pytest.approx(alone.reset_margins, abs=1e-5)
                    assert completion.closest_choice == pytest.approx(
                        alone.closest_choice, abs=1e-5
                    )
                    num_equal += 1
        assert num_equal > 0.99 * len(requests) * len(biases)
    # The biases do tell answers apart, and every number of resets occurs.
    assert len({tuple(ids_of(runs)) for runs in separate}) > 4
    assert {c.num_resets for runs in separate for c in runs} == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_frontier_equals_the_naive_loop(temperature):
    engine, model, known = random_engine("gemma2", seed=7)
    requests = asked(temperature, num=3)[::3]
    found = frontier(engine, requests, (3.0, -math.inf, 1.3))
    for bias, completions in zip(found.biases, found.completions, strict=True):
        for request, completion in zip(at(bias, requests), completions, strict=True):
            naive = naive_decode(model, request, **known)
            assert list(completion.visible_ids) == naive.visible
            assert completion.num_resets == naive.num_resets
    assert found.num_close == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_frontier_margins_predict_the_first_reset(temperature):
    # The trunk alone tells where each bias will reset: at the first step with margin + bias > 0.
    engine, _, _ = random_engine(seed=3)
    requests = [replace(r, prefill_ids=()) for r in random_requests(temperature, 8)]
    banned = engine.generate(at(-math.inf, requests))
    found = frontier(engine, requests, BIASES[temperature])
    steps = set()
    for bias, completions in zip(found.biases, found.completions, strict=True):
        for trunk, completion in zip(banned, completions, strict=True):
            if is_close(completion):
                continue
            first = next((i for i, m in enumerate(trunk.reset_margins) if m + bias > 0), None)
            steps.add(first)
            if first is None:
                assert ids_of([completion]) == ids_of([trunk])
            else:
                assert completion.discarded == (trunk.visible_ids[:first],)
    # Some never reset, some at once, some in between.
    assert {None, 0} < steps


def test_frontier_lowest_bias_that_resets_is_minus_the_largest_margin():
    # As a calibration would use it.
    engine, _, _ = random_engine(seed=5)
    (request,) = random_requests(1.0, 1)
    (trunk,) = engine.generate(at(-math.inf, [request]))
    (first, largest) = max(enumerate(trunk.reset_margins), key=lambda item: item[1])
    below, above = frontier(engine, [request], (-largest - 1e-3, -largest + 1e-3)).completions
    assert (below[0].num_resets, above[0].num_resets) == (0, 1)
    assert above[0].num_discarded == first + len(request.prefill_ids)
    highest = list(accumulate(trunk.reset_margins, max))
    assert highest[-1] == largest


def test_frontier_works_with_any_engine():
    class Separate:
        """Decodes each request on its own, as a server would."""

        def generate(self, requests):
            engine, _, _ = random_engine(batch_size=1)
            return [engine.generate([request])[0] for request in requests]

    requests = random_requests(1.0, 2)
    whole = frontier(random_engine()[0], requests, (0.0, 2.0))
    apart = frontier(Separate(), requests, (0.0, 2.0))
    assert list(map(ids_of, whole.completions)) == list(map(ids_of, apart.completions))


def test_frontier_costs_what_differs():
    # Nine biases of which three reset, at steps two, three and three: by hand in test_board.py.
    engine, model = scripted(
        [(1,), (A, (B, C, D, R), (C, R), D, E)], [(1, A, B, R), (D, E)], [(1, A, R), (C, E)]
    )
    request = Request((1,), sampling=replace(GREEDY, reset_bias=99.0))
    found = frontier(engine, [request], (2.0, -1.0, 0.0, -math.inf, 4.0, 0.5, 2.5, -2.0, -3.0))
    texts = [c.visible_text for (c,) in found.completions]
    assert texts == ["d", "abcd", "abcd", "abcd", "c", "abcd", "d", "abcd", "abcd"]
    # 5 tokens of the trunk, and 2 after each of the two resets; and what drafts read ahead in vain.
    branches = {(1, A, B, R), (1, A, B, R, D), (1, A, R), (1, A, R, C)}
    stepped = set(chain.from_iterable(model.texts))
    assert stepped - branches == {(1, A, B, C, D)[:n] for n in range(1, 6)}
    assert (stepped | set(model.extended)) >= branches
    assert sum(map(len, model.texts)) <= 9


def test_frontier_counts_close_choices():
    engine, _ = scripted([(1,), ((A, R), E)])
    request = Request((1,), sampling=GREEDY)
    found = frontier(engine, [request], (0.0, 1.0, 1.0 + 5e-6, 1.1))
    # At a bias of 1 [RESET] is as likely as a, which has the lower id.
    assert [c.num_resets for (c,) in found.completions] == [0, 0, 1, 1]
    assert found.num_close == 2


@pytest.mark.parametrize("biases", [(), (1.0, 0.0, 1.0), (0.0, -0.0)])
def test_frontier_refuses_biases(biases):
    engine, _ = scripted([(1,), (A, E)])
    with pytest.raises(ValueError, match="biases: "):
        frontier(engine, [Request((1,), sampling=GREEDY)], biases)


def test_frontier_of_nothing_is_empty():
    engine, _ = scripted([(1,), (A, E)])
    assert frontier(engine, [], (0.0, 1.0)) == Frontier((0.0, 1.0), [[], []])
