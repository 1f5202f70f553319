"""Hidden states to log-probabilities of edges and of paths, without logits of (tokens, vocabulary).

Legend: B rows, T tokens, D hidden size, V vocabulary, E edges, P paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def target_logps(logits: Tensor, targets: Tensor, *, softcap: float | None) -> Tensor:
    """Return the log-probability of each target, in nats, fp32.

    Args:
        logits: (E, V) in any float dtype.
        targets: (E,) int64.
        softcap: Gemma 2's final soft cap, applied before the softmax; None for most models.
    """
    logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def edge_logps(
    states: Tensor,
    targets: Tensor,
    *,
    head: Callable[[Tensor], Tensor],
    softcap: float | None,
    chunk_size: int,
) -> Tensor:
    """Return log p(target | path up to the predictor) of each edge, (E,) in nats, fp32.

    Only predictors pass the head, `chunk_size` at a time. Without gradient (the reference, probes)
    the peak memory is chunk_size * V; training takes `head_loss`.

    Args:
        states: (E, D), hidden states of the predictors.
        targets: (E,) int64.
        head: Maps (n, D) to (n, V).
        softcap: See `target_logps`.
        chunk_size: Edges per chunk.
    """
    chunks = zip(torch.split(states, chunk_size), torch.split(targets, chunk_size), strict=True)
    return torch.cat([target_logps(head(x), wanted, softcap=softcap) for x, wanted in chunks])


def path_logps(logps: Tensor, paths: Tensor, num_paths: int) -> Tensor:
    """Return the sum of the edge log-probs of each path: (P,) in nats.

    Args:
        logps: (E,) of `edge_logps`.
        paths: (E,) int64, path of each edge.
        num_paths: P.
    """
    return logps.new_zeros(num_paths).index_add(0, paths, logps)
