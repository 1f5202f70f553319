"""Decoding with weights that are spread over ranks: every forward takes all of them.

Ranks decode prompts of their own, some of them longer than others. So each forward is announced,
and a rank that is done makes forwards in vain until all are. Every announced forward is one of the
whole model, head included: engines gather the same weights in the same order on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


class Lockstep:
    """A forward that waits for the other ranks; for `HFEngine` in place of the model's own.

    Args:
        forward: Of the whole model, taken by all ranks together.
        device: Of the inputs.
        decoding: Makes the model ready to decode, as the ranks that decode have it.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        device: torch.device,
        decoding: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._forward, self._device, self._decoding = forward, device, decoding
        self._has_failed = False

    def __call__(self, **inputs: Any) -> Any:
        """Return what the model says to `inputs`, together with a forward of every other rank."""
        self._num_working(is_working=True)
        self._has_failed = True
        output = self._forward(**inputs)
        self._has_failed = False
        return output

    def finish(self) -> None:
        """Keep step with the ranks that still decode; every rank must end with this, once.

        Raises:
            RuntimeError: If a forward failed here, which the others still wait for: this rank has
                to end, so that they do.
        """
        if self._has_failed:
            raise RuntimeError(
                "decoding failed within a forward that all ranks make together, see above; leave "
                "the callbacks that decode out (callbacks=default), or give them less at a time"
            )
        token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        with self._decoding():
            while self._num_working(is_working=False):
                self._forward(input_ids=token, use_cache=False)

    def _num_working(self, *, is_working: bool) -> int:
        count = torch.tensor(int(is_working), device=self._device)
        if dist.is_initialized():
            dist.all_reduce(count)
        return int(count)
