"""Weights that are spread over ranks (FSDP2, ZeRO-3): whether they are, and to see them whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether any weight of `model` is spread over ranks."""
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


def whole_weights(module: nn.Module, *, keeps: bool) -> dict[str, Tensor]:
    """Return the trained weights of a module by name, gathered one at a time; every rank must call.

    Args:
        module: Its frozen weights are left out.
        keeps: Whether this rank wants them, on the CPU: as much memory as they take.

    Returns:
        Nothing where `keeps` is false. A weight with several names is there under each.
    """
    found: dict[str, Tensor] = {}
    named = module.named_parameters(remove_duplicate=False)
    for name, weight in [(name, weight) for name, weight in named if weight.requires_grad]:
        whole = _gathered(weight, keeps=keeps)
        if keeps:
            found[name] = whole
    return found


def _gathered(weight: Any, *, keeps: bool) -> Tensor:
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().cpu().clone() if keeps else torch.empty(0)
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return whole.detach().cpu().clone() if keeps else torch.empty(0)
