"""Weights that are spread over ranks (FSDP2, ZeRO-3): whether they are, and how large they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether any weight of `model` is spread over ranks, at this moment or not."""
    # FSDP2 leaves weights whole after some forwards.
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    return any(isinstance(p, DTensor) or hasattr(p, "ds_shape") for p in model.parameters())


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a weight over all ranks; ZeRO-3 leaves an empty tensor on each."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def register_foreign_weights(module: nn.Module, weights: Iterable[Tensor]) -> None:
    """Let ZeRO-3 gather `weights` of other modules for the passes of `module`, which uses them.

    It gathers a module's own weights when that is called. Without ZeRO-3 nothing is done.
    """
    for weight in weights:
        if hasattr(weight, "ds_id"):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, weight)
