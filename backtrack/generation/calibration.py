"""Which bias of [RESET] benign prompts bear: exact at every bias, from one run with [RESET] banned.

An answer that was decoded with [RESET] banned tells where it would have reset at any bias b: at the
first step whose margin + b is positive (`Completion.reset_margins`).

    margins         -5  -2  -3  -1
    bias            up to 1     above 1, to 2     above 2, to 5     above 5
    first reset     none        at step 3         at step 1         at step 0

So the count of false resets at each bias is a step function, which is exact for the prompts at
hand. What it says of other prompts is a one-sided bound with a given confidence. The bias that is
chosen is the largest up to which the bound holds all the way: the biases are tried in an order that
no answer changes, from below, until the first fails. That is why the confidence stands for the bias
that was found and needs no correction for how many were tried (fixed-sequence testing), as long as
the prompts are independent draws of what users ask.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from scipy.special import betaincinv  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STEP = 0.01
"""Nats: biases are multiples of it."""
SLACK = 1e-3
"""Nats: who is this close to a reset counts as reset; low bits differ from machine to machine."""


class Onset(NamedTuple):
    """The biases at which an answer has its first reset at one step.

    Attributes:
        step: Generated tokens before the reset: those that it takes back.
        low: The bias that is just too small, nats.
        high: The largest bias, nats.
    """

    step: int
    low: float
    high: float


Onsets = list[Onset]


class Rates(NamedTuple):
    """What a bias does to benign prompts, and to harmful ones where there were any.

    Attributes:
        reset_bias: Nats.
        num_false: False resets among the benign prompts.
        false_reset_rate: Their share.
        upper_bound: What that share is at most, with the confidence asked.
        reset_rate_benign: Share of benign prompts with any reset.
        reset_rate_harmful: Of harmful prompts; None without any.
    """

    reset_bias: float
    num_false: int
    false_reset_rate: float
    upper_bound: float
    reset_rate_benign: float
    reset_rate_harmful: float | None


def onsets(margins: Sequence[float]) -> Onsets:
    """Return at which biases an answer has its first reset where, the earliest step first.

    >>> [tuple(onset) for onset in onsets([-5.0, -2.0, -3.0, -1.0])]
    [(0, 5.0, inf), (1, 2.0, 5.0), (3, 1.0, 2.0)]

    Args:
        margins: `Completion.reset_margins` of an answer decoded with [RESET] banned.
    """
    found: Onsets = []
    least = math.inf
    for step, margin in enumerate(margins):
        if -margin < least:
            found.append(Onset(step, -margin, least))
            least = -margin
    return found


def upper_bound(count: int, num_prompts: int, *, confidence: float) -> float:
    """Return what a rate is at most, after `count` hits in `num_prompts` independent trials.

    One-sided and exact: at a higher rate, so few hits have a chance below 1 - confidence.

    Raises:
        ValueError: If not 0 <= count <= num_prompts, or confidence is not between 0 and 1.

    Source: Clopper and Pearson 1934.
    """
    _check_share(confidence, "confidence")
    if not 0 <= count <= num_prompts or not num_prompts:
        raise ValueError(f"count: {count} of {num_prompts} is not allowed; expected 0 to all")
    if count == num_prompts:
        return 1.0
    return float(betaincinv(count + 1, num_prompts - count, confidence))


def num_prompts_needed(max_rate: float, *, confidence: float) -> int:
    """Return with how many prompts no false reset at all shows that the rate is within the limit.

    About 3 / max_rate at a confidence of 0.95: solves (1 - max_rate) ** n <= 1 - confidence.

    Raises:
        ValueError: If a number is not between 0 and 1.
    """
    _check_share(max_rate, "max_false_reset")
    _check_share(confidence, "confidence")
    return math.ceil(math.log1p(-confidence) / math.log1p(-max_rate))


def num_allowed(num_prompts: int, *, max_rate: float, confidence: float) -> int:
    """Return how many false resets leave the bound within the limit.

    Raises:
        ValueError: If not even none does; it says how many prompts are needed.
    """
    needed = num_prompts_needed(max_rate, confidence=confidence)
    if num_prompts < needed:
        raise ValueError(
            f"max_false_reset: {num_prompts} benign prompts cannot show a rate of at most "
            f"{max_rate:g} with a confidence of {confidence:g}, even if none of them resets; "
            f"expected at least {needed} prompts, or a higher limit"
        )
    allowed = 0
    while upper_bound(allowed + 1, num_prompts, confidence=confidence) <= max_rate:
        allowed += 1
    return allowed


def largest_bias(false: Iterable[Onsets], *, allowed: int, max_bias: float) -> float:
    """Return the largest bias up to which no more than `allowed` answers have a false reset.

    Below it the number is as small: a judge may call what is taken back at a higher bias unsafe
    again, and a bias beyond such a peak is not taken.

    Args:
        false: For each benign prompt, its onsets that are false.
        allowed: Of `num_allowed`.
        max_bias: Larger ones are not looked at, nats.

    Returns:
        A multiple of `STEP`, at least `SLACK` below the first bias that is too large.
    """
    ends = [end for spans in false for low, high in _spans(spans) for end in ((low, 1), (high, -1))]
    count, limit = 0, math.inf
    for bias, change in sorted(ends, key=lambda end: (end[0], -end[1])):
        count += change
        if count > allowed:
            limit = bias
            break
    # At the limit itself there is one too many; up to max_bias all are allowed.
    steps = math.floor(max_bias / STEP + 1e-9)
    if limit < math.inf:
        steps = min(steps, math.ceil(limit / STEP) - 1)
    return round(steps * STEP, 2) + 0.0  # no -0.0


def count_at(false: Iterable[Onsets], bias: float) -> int:
    """Return how many answers have one of their onsets at a bias, or within `SLACK` of it."""
    return sum(any(low <= bias <= high for low, high in _spans(spans)) for spans in false)


def rates_at(
    bias: float,
    *,
    false: Sequence[Onsets],
    benign: Sequence[Onsets],
    harmful: Sequence[Onsets],
    confidence: float,
) -> Rates:
    """Return what a bias does.

    Args:
        bias: Nats.
        false: For each benign prompt, its onsets that are false.
        benign: For each benign prompt, all of them.
        harmful: For each harmful prompt, all of them; none is no harmful prompt.
        confidence: Of the bound.
    """
    num_false, total = count_at(false, bias), len(false)
    return Rates(
        reset_bias=bias,
        num_false=num_false,
        false_reset_rate=num_false / total,
        upper_bound=upper_bound(num_false, total, confidence=confidence),
        reset_rate_benign=count_at(benign, bias) / total,
        reset_rate_harmful=count_at(harmful, bias) / len(harmful) if harmful else None,
    )


def _spans(found: Onsets) -> list[tuple[float, float]]:
    """Return the biases of onsets as stretches that do not touch, `SLACK` added at both ends."""
    spans: list[tuple[float, float]] = []
    for onset in reversed(found):  # from the smallest bias on
        low, high = onset.low - SLACK, onset.high + SLACK
        if spans and low <= spans[-1][1]:
            spans[-1] = (spans[-1][0], high)
        else:
            spans.append((low, high))
    return spans


def _check_share(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}: {value!r} is not allowed; expected a number between 0 and 1")
