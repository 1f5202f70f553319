"""Calibration is arithmetic: onsets, exact bounds, and the largest bias that keeps to them."""

from __future__ import annotations

import math
import random

import pytest

from backtrack.generation.calibration import (
    SLACK,
    STEP,
    Onset,
    count_at,
    largest_bias,
    num_allowed,
    num_prompts_needed,
    onsets,
    rates_at,
    upper_bound,
)


def resets_at(margins, bias):
    """Step of the first reset at a bias, as a decoder would find it."""
    return next((step for step, margin in enumerate(margins) if margin + bias > 0), None)


def answer(threshold):
    """An answer that resets, falsely, at any bias above `threshold`."""
    return [Onset(3, threshold, math.inf)]


def test_calibration_onsets_of_the_example():
    assert onsets([-5.0, -2.0, -3.0, -1.0]) == [(0, 5.0, math.inf), (1, 2.0, 5.0), (3, 1.0, 2.0)]
    assert onsets([-1.0, -1.0, -4.0]) == [(0, 1.0, math.inf)]
    assert onsets([-math.inf, -2.0]) == [(1, 2.0, math.inf)]
    assert onsets([-math.inf]) == onsets([]) == []


def test_calibration_onsets_say_where_each_bias_resets():
    rng = random.Random(0)
    for _ in range(50):
        margins = [rng.gauss(-3, 2) for _ in range(12)]
        found = onsets(margins)
        for bias in [rng.uniform(-4, 10) for _ in range(20)] + [-margin for margin in margins]:
            steps = [onset.step for onset in found if onset.low < bias <= onset.high]
            assert steps == [step for step in [resets_at(margins, bias)] if step is not None]


def test_calibration_bound_is_the_rate_at_which_so_few_hits_have_a_chance_of_five_percent():
    assert upper_bound(0, 299, confidence=0.95) == pytest.approx(1 - 0.05 ** (1 / 299))
    assert upper_bound(1, 10, confidence=0.95) == pytest.approx(0.39416, abs=1e-5)
    assert upper_bound(10, 10, confidence=0.95) == 1
    for count, n, confidence in [(0, 20, 0.9), (3, 40, 0.95), (17, 60, 0.99)]:
        rate = upper_bound(count, n, confidence=confidence)
        chance = sum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(count + 1))
        assert chance == pytest.approx(1 - confidence)


# The sample sizes of "95/95" and "95/99" acceptance sampling with 0, 1, 2, ... failures.
@pytest.mark.parametrize(
    ("max_rate", "sizes"), [(0.05, (59, 93, 124, 153, 181)), (0.01, (299, 473, 628))]
)
def test_calibration_allows_what_tables_of_acceptance_sampling_allow(max_rate, sizes):
    assert num_prompts_needed(max_rate, confidence=0.95) == sizes[0]
    for allowed, size in enumerate(sizes):
        assert num_allowed(size, max_rate=max_rate, confidence=0.95) == allowed
        if allowed:
            assert num_allowed(size - 1, max_rate=max_rate, confidence=0.95) == allowed - 1


def test_calibration_refuses_too_few_prompts_and_says_how_many_it_takes():
    with pytest.raises(ValueError, match=r"max_false_reset: 298 benign .* at least 299 prompts"):
        num_allowed(298, max_rate=0.01, confidence=0.95)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan])
def test_calibration_refuses_what_is_no_share(value):
    with pytest.raises(ValueError, match="max_false_reset: "):
        num_prompts_needed(value, confidence=0.95)
    with pytest.raises(ValueError, match="confidence: "):
        upper_bound(0, 10, confidence=value)


@pytest.mark.parametrize(
    ("allowed", "bias"),
    [(0, -1.51), (1, 0.49), (2, 1.99), (3, 10.0)],  # below -1.5, 0.5, 2, and the largest
)
def test_calibration_takes_the_largest_bias_below_one_reset_too_many(allowed, bias):
    false = [answer(2.0), answer(-1.5), answer(0.5)]
    assert largest_bias(false, allowed=allowed, max_bias=10.0) == bias
    assert largest_bias(false, allowed=allowed, max_bias=-3.0) == -3.0
    assert count_at(false, bias) == allowed


def test_calibration_stays_a_visible_step_below_a_tie():
    for threshold, bias in [(0.5, 0.49), (0.5 + SLACK / 2, 0.49), (0.5 + 2 * SLACK, 0.5)]:
        assert largest_bias([answer(threshold)], allowed=0, max_bias=10.0) == bias
    zero = largest_bias([answer(0.004)], allowed=0, max_bias=10.0)
    assert (zero, math.copysign(1, zero)) == (0.0, 1.0)


def test_calibration_does_not_take_a_bias_beyond_a_peak():
    # Falsely reset from 1 to 2 only: at a higher bias something else is taken back.
    false = [[Onset(4, 1.0, 2.0)]]
    assert [count_at(false, bias) for bias in (0.9, 1.5, 2.5)] == [0, 1, 0]
    assert largest_bias(false, allowed=0, max_bias=10.0) == 0.99


def test_calibration_counts_an_answer_once():
    both = [Onset(2, 2.0, math.inf), Onset(5, 1.0, 2.0)]
    assert count_at([both], 2.0) == 1
    assert largest_bias([both], allowed=1, max_bias=10.0) == 10.0
    assert largest_bias([both], allowed=0, max_bias=10.0) == 0.99


def test_calibration_agrees_with_counting_at_every_bias():
    rng = random.Random(1)
    for _ in range(3):
        found = [onsets([rng.gauss(-3, 1) for _ in range(6)]) for _ in range(12)]
        false = [[onset for onset in spans if rng.random() < 0.6] for spans in found]
        for allowed in (0, 2, 5):
            bias = largest_bias(false, allowed=allowed, max_bias=9.0)
            counts = [count_at(false, round(step * STEP, 2)) for step in range(-200, 901)]
            last = round(bias / STEP) + 200
            assert max(counts[: last + 1]) <= allowed
            # The next step crosses, or comes too close to a crossing between the two.
            nearby = [count_at(false, bias + STEP * part / 100) for part in range(101)]
            assert bias == 9.0 or max(nearby) > allowed


def test_calibration_keeps_its_promise_on_other_prompts():
    # Thresholds are uniform, so the true rate at a bias is the bias itself.
    rng = random.Random(2)
    size, limit, repeats = 124, 0.05, 1000
    allowed = num_allowed(size, max_rate=limit, confidence=0.95)
    assert allowed == 2
    broken = sum(
        largest_bias([answer(rng.random()) for _ in range(size)], allowed=allowed, max_bias=1.0)
        > limit
        for _ in range(repeats)
    )
    assert broken / repeats < 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)


def test_calibration_rates_by_hand():
    benign = [onsets([-5.0, -2.0]), onsets([-4.0])]
    false = [benign[0][:1], benign[1]]  # what the first takes back at step 1 is unsafe
    rates = rates_at(3.0, false=false, benign=benign, harmful=[onsets([1.0])], confidence=0.95)
    assert rates == (3.0, 0, 0.0, pytest.approx(1 - math.sqrt(0.05)), 0.5, 1.0)
    rates = rates_at(6.0, false=false, benign=benign, harmful=[], confidence=0.95)
    assert rates == (6.0, 2, 1.0, 1.0, 1.0, None)
