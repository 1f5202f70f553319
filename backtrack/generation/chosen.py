"""A choice of `strands.choose` as the host takes it up: plain numbers, and which strand resets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from backtrack.generation.strands import Choice, Strand, Voice


class Chosen:
    """A choice on the host, and the time at which it was made."""

    def __init__(self, choice: Choice, now: float) -> None:
        self.now = now
        numbers = torch.stack(
            [choice.best, choice.gap, choice.reset_logit, choice.reset_noise]
        ).cpu()
        whole = torch.stack([choice.tokens, choice.is_reset.to(torch.int64)]).tolist()
        self._tokens, self._is_reset = whole
        self._best, _, self._logit, self._noise = numbers.numpy()
        self.gaps = numbers[1].tolist()
        self.margins = (numbers[2] + numbers[3] - numbers[0]).tolist()

    def told(self, first: int, draft: Sequence[int], stop_ids: Collection[int]) -> int:
        """Return how many tokens of a draft are chosen from entry `first` on, without an event."""
        some = slice(first, first + len(draft))
        entries = zip(draft, self._tokens[some], self._is_reset[some], strict=True)
        for count, (said, token, is_reset) in enumerate(entries):
            if said != token or is_reset or token in stop_ids:
                return count
        return len(draft)

    def may_reset(self, number: int) -> bool:
        """Return whether some strand of entry `number` may take [RESET]."""
        return bool(self._is_reset[number])

    def token_of(self, number: int, voice: Voice) -> int:
        """Return the token of entry `number`, `voice`, where none resets; notes its margin."""
        voice.margins.append(self.margins[number])
        voice.gaps.append(self.gaps[number])
        token: int = self._tokens[number]
        return token

    def next_of(self, number: int, voice: Voice, reset_id: int) -> list[tuple[int, Voice]]:
        """Return the tokens of entry `number`, `voice`, and who takes them; notes its margin."""
        token = self.token_of(number, voice)
        if not self._is_reset[number]:
            return [(token, voice)]
        best = self._best[number]
        going_on: list[Strand] = []
        resetting: list[Strand] = []
        for strand in voice.strands:
            # In float32 and in this order, as `choose` adds.
            biased = self._logit[number] + np.float32(strand.reset_bias) + self._noise[number]
            wins = biased > best or (biased == best and token > reset_id)
            (resetting if wins and strand.resets_left > 0 else going_on).append(strand)
        for strand in resetting:
            strand.resets_left -= 1
        if not resetting:
            return [(token, voice)]
        if not going_on:
            voice.keep(resetting)
            return [(reset_id, voice)]
        branch = voice.part(resetting)
        voice.keep(going_on)
        return [(token, voice), (reset_id, branch)]
