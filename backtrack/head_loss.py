"""The output head and the loss above it in one: exact gradients, logits made once and never kept.

A loss is a sum over groups of edges (one edge in SFT, the edges of one pair in DPO). Once the
log-probs of a whole group are known its gradient is known too, so it is taken in the forward pass,
chunk by chunk, while the logits are there: three matrix products where checkpointing needs four,
and (chunk_size, V) of memory instead of (E, V).

Legend: E edges, G groups, D hidden size, V vocabulary, n edges of a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from backtrack.logps import edge_logps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    GroupLoss = Callable[[Tensor, slice], Tensor]


class ChunkedHead(nn.Module):
    """The output head and all that is done with it, as one module of its own.

    Engines that spread weights over ranks gather those of a module for its forward and backward
    pass: here the head's are needed once a forward, not once a chunk, and by a gradient that is
    taken before the backward pass. The head stays a part of the model and is none of this module.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._hidden = (head,)  # in a tuple, or its weights would have a second name

    @property
    def head(self) -> nn.Module:
        """Maps (n, D) to (n, V)."""
        return self._hidden[0]

    def forward(
        self,
        states: Tensor,
        targets: Tensor,
        *,
        softcap: float | None,
        chunk_size: int,
        ends: Sequence[int] = (),
        loss: GroupLoss | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Return what `head_loss` does where there is a loss; else None and `edge_logps`."""
        settings: dict[str, Any] = {"head": self.head, "softcap": softcap, "chunk_size": chunk_size}
        if loss is None:
            return None, edge_logps(states, targets, **{**settings, "head": self.head.forward})
        return head_loss(states, targets, ends=ends, loss=loss, **settings)


def head_loss(
    states: Tensor,
    targets: Tensor,
    *,
    head: nn.Module,
    softcap: float | None,
    ends: Sequence[int],
    chunk_size: int,
    loss: GroupLoss,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss, a scalar, and the log-probs of the edges, (E,) in nats, fp32.

    Args:
        states: (E, D) hidden states of the predictors.
        targets: (E,) int64.
        head: Maps (n, D) to (n, V); its trainable parameters get their gradient.
        softcap: See `logps.target_logps`.
        ends: End of each group, ascending; the last one is E. Groups must not depend on each other.
        chunk_size: Edges per chunk. A larger group makes its logits twice, once for its log-probs
            and once for its gradient.
        loss: Takes the log-probs of some consecutive groups and their slice of the edges, and
            returns their summed loss. Differentiated with respect to the log-probs alone.
    """
    weights = [p for p in head.parameters() if p.requires_grad]
    found = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        states, targets, head, softcap, ends, chunk_size, loss, *weights
    )
    total, logps = found
    return total, logps


class _HeadLoss(torch.autograd.Function):
    """Takes the gradients in the forward pass and hands them out in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        head: nn.Module,
        softcap: float | None,
        ends: Sequence[int],
        chunk_size: int,
        loss: GroupLoss,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, log-probs); both leave without a graph of their own."""
        # fp32 by name: under `bf16-true` the default is another.
        logps = torch.zeros(len(targets), device=states.device, dtype=torch.float32)
        total = logps.new_zeros(())
        by_states = torch.zeros_like(states)
        by_weights: list[Tensor | None] = [None] * len(weights)
        for block in _blocks(ends, chunk_size):
            chunks = _chunks(block, chunk_size)
            made = None  # no two chunks at once
            for chunk in chunks:
                made = None
                made = _Chunk(states[chunk], targets[chunk], head, softcap)
                logps[chunk] = made.logps
            if len(chunks) > 1:
                made = None
            value, slopes = _slope(loss, logps[block], block)
            total += value
            for chunk, slope in zip(chunks, torch.split(slopes, chunk_size), strict=True):
                if made is None:
                    made = _Chunk(states[chunk], targets[chunk], head, softcap)
                by_states[chunk], *parts = made.gradients(slope, weights)
                by_weights = [_added(old, new) for old, new in zip(by_weights, parts, strict=True)]
                del parts  # of the size of the head: the next ones are made beside the sum alone
                made = None
        ctx.gradients = [
            by_states,
            *(
                torch.zeros_like(weight) if found is None else found.to(weight.dtype)
                for weight, found in zip(weights, by_weights, strict=True)
            ),
        ]
        ctx.mark_non_differentiable(logps)
        return total, logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Any, ...]:
        """Scale what the forward pass found; it is given away, so a second call fails."""
        gradients, ctx.gradients = ctx.gradients, None
        states, *weights = (gradient.mul_(slope) for gradient in gradients)
        return states, None, None, None, None, None, None, *weights


def _slope(loss: GroupLoss, logps: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return the loss of a block, and its derivative by the log-probs of the block."""
    with torch.enable_grad():
        leaf = logps.detach().clone().requires_grad_()
        value = loss(leaf, block)
    slope: Tensor = torch.autograd.grad(value, leaf)[0]
    return value.detach(), slope


def _added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients; of half-precision ones, in fp32 from the second on."""
    if old is None or new is None:
        return new if old is None else old
    if old.dtype in (torch.bfloat16, torch.float16):
        old = old.float()
    return old.add_(new)


def _chunks(block: slice, chunk_size: int) -> list[slice]:
    return [
        slice(first, min(first + chunk_size, block.stop))
        for first in range(block.start, block.stop, chunk_size)
    ]


class _Chunk:
    """Logits of some edges, turned to probabilities, and the graph back to states and weights."""

    def __init__(
        self, states: Tensor, targets: Tensor, head: nn.Module, softcap: float | None
    ) -> None:
        self.targets = targets
        with torch.enable_grad():
            self.states = states.detach().requires_grad_()
            self.raw = head.forward(self.states)  # no hooks: `ChunkedHead` has gathered it
        # No product saves its own result, so it may be overwritten: fp32 logits need no copy.
        values: Tensor = self.raw.detach().float()
        self.damping: Tensor | None = None
        if softcap is not None:
            values = (values / softcap).tanh_()
            self.damping = 1 - values**2
            values *= softcap
        chosen = values.gather(-1, targets[:, None]).squeeze(-1)
        top = values.amax(-1)
        self.chances = torch.softmax(values, -1, out=values)
        # The largest probability is no smaller than 1 / V, so its logarithm is exact. Two passes
        # of `amax` cost less than one of `max`, which looks for the place as well.
        self.logps = chosen - top + self.chances.amax(-1).log_()

    def gradients(self, slope: Tensor, weights: Sequence[Tensor]) -> list[Any]:
        """Return the gradient of (slope * logps).sum() by states and by weights.

        By the logits it is slope * (one-hot - probabilities).
        """
        values = self.chances.mul_(-slope[:, None])
        values[torch.arange(len(slope), device=values.device), self.targets] += slope
        if self.damping is not None:
            values *= self.damping
        inputs = [self.states, *weights]
        return list(
            torch.autograd.grad(self.raw, inputs, values.to(self.raw.dtype), allow_unused=True)
        )


def _blocks(ends: Sequence[int], chunk_size: int) -> Iterator[slice]:
    """Yield runs of whole groups with at most `chunk_size` edges; a larger group comes alone."""
    first = last = 0
    for end in ends:
        if end - first > chunk_size and last > first:
            yield slice(first, last)
            first = last
        last = end
    if last > first:
        yield slice(first, last)
