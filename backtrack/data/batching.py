"""The step planner: which examples a step holds, in which rows, on which rank.

The examples of optimiser step t follow from (seed, t) alone. They are packed into rows of at most
`max_tokens` and dealt to `ranks * micro-batches` shares; a share may be empty, never missing, so
that every rank runs the same number of forwards.
"""

from __future__ import annotations

import bisect
import heapq
from typing import TYPE_CHECKING, NamedTuple

from backtrack.data.forest import PLANTERS, Forest, loss_weight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from backtrack.data.types import Tree


class StepBatch(NamedTuple):
    """What one forward pass of one rank gets.

    Attributes:
        forest: Its rows.
        reference_logps: (P,) summed branch log-probs of the reference, or None where the reference
            is computed in the step (`objective.reference=adapter`) or not needed (SFT).
        total_weight: Denominator of the whole step, over all ranks and micro-batches.
        num_shares: Ranks times micro-batches: undoes the averaging of Lightning and of DDP.
        step: Number of the optimiser step, from 0.
    """

    forest: Forest
    reference_logps: Tensor | None
    total_weight: float
    num_shares: int
    step: int


def pack(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return rows of item numbers, each row at most `max_tokens`: best fit, largest first.

    Args:
        sizes: Tokens of each item.
        max_tokens: Of a row.

    Raises:
        ValueError: If an item is larger than a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[item] > max_tokens:
            raise ValueError(
                f"data.max_tokens={max_tokens} is smaller than one example of {sizes[item]} tokens"
            )
        place = bisect.bisect_left(room, (sizes[item], -1))
        if place == len(room):
            rows.append([item])
            bisect.insort(room, (max_tokens - sizes[item], len(rows) - 1))
        else:
            left, row = room.pop(place)
            rows[row].append(item)
            bisect.insort(room, (left - sizes[item], row))
    return rows


def balance(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Return item numbers in `num_bins` bins of about equal load: largest first, into the emptiest.

    Loads differ by at most one item, where no bin is empty.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]  # a heap
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, number = loads[0]
        bins[number].append(item)
        heapq.heapreplace(loads, (load + sizes[item], number))
    return bins


def deal(trees: Sequence[Tree], *, max_tokens: int, num_shares: int) -> list[list[list[Tree]]]:
    """Return `num_shares` lists of rows that hold every tree once, about equally full.

    Trees are spread over the shares first and packed after, so that no rank idles while another
    has a full row; a share's rows are evened out too, or a last, short row would cost a whole one.

    Args:
        trees: Of one optimiser step.
        max_tokens: Of a row.
        num_shares: Ranks times micro-batches.
    """
    sizes = [tree.num_tokens for tree in trees]
    shares = []
    for share in balance(sizes, num_shares):
        own = [sizes[item] for item in share]
        rows = pack(own, max_tokens)
        even = balance(own, len(rows))
        if all(sum(own[i] for i in row) <= max_tokens for row in even):
            rows = even
        shares.append([[trees[share[i]] for i in row] for row in rows] or [[]])
    return shares


def make_batch(
    rows: Sequence[Sequence[Tree]],
    *,
    layout: str,
    pad_id: int,
    total_weight: float,
    num_shares: int,
    step: int,
    reference_logps: Tensor | None = None,
    row_multiple: int = 8,
) -> StepBatch:
    """Return the tensors of one share of a step; rows are as long as a multiple of the last."""
    forest = PLANTERS[layout](rows, pad_id=pad_id, multiple=row_multiple)
    return StepBatch(forest, reference_logps, total_weight, num_shares, step)


def step_weight(trees: Sequence[Tree]) -> float:
    """Return the denominator of a step; at least a tiny number, so that an empty step is 0 / 1."""
    return sum(loss_weight(tree) for tree in trees) or 1.0
