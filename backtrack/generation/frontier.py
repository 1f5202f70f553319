"""Many biases of [RESET] for little more than the price of one.

Raising the bias of [RESET] changes nothing before the first reset: answers at K biases share their
text up to there, noise included (`generation.reset.keyed_gumbel` does not know of biases). So one
trunk is decoded, with the margin by which [RESET] loses at each step; bias b branches off at the
first step whose margin + b is positive, and biases that branch at the same step go on together.
Where more resets are allowed, the branch is a trunk in turn.

`HFEngine` does this for any requests that differ in their bias alone (`generation.strands`), so a
frontier is one call of the engine. Engines that decode each request on its own give the same
answers at K times the price.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backtrack.generation.types import Completion, Engine, Request

CLOSE = 1e-5
"""Logits: a choice made by less may fall otherwise in another batch."""


class Frontier(NamedTuple):
    """Answers at several biases.

    Attributes:
        biases: Nats, in the order asked.
        completions: For each bias, one for each request.
    """

    biases: tuple[float, ...]
    completions: list[list[Completion]]

    @property
    def num_close(self) -> int:
        """Answers with a choice so close that another batch may choose otherwise."""
        return sum(c.closest_choice < CLOSE for row in self.completions for c in row)


def frontier(engine: Engine, requests: Sequence[Request], biases: Sequence[float]) -> Frontier:
    """Return the answers to `requests` at each of `biases`, whatever bias they name.

    Args:
        engine: Decodes; see the top of this file.
        requests: What is asked; greedy or sampled, any number of resets.
        biases: Nats; -inf bans [RESET].

    Raises:
        ValueError: If there is no bias, or one is given twice.

    Source: Zhang et al. 2025 (arXiv 2409.14586), figures 3 and 5.
    """
    if not biases or len(set(biases)) < len(biases):
        raise ValueError(f"biases: {list(biases)} is not allowed; expected different numbers")
    asked = [
        replace(request, sampling=replace(request.sampling, reset_bias=bias))
        for bias in biases
        for request in requests
    ]
    done = engine.generate(asked)
    size = len(requests)
    return Frontier(
        biases=tuple(biases),
        completions=[done[i * size : (i + 1) * size] for i in range(len(biases))],
    )
