"""Whether a rank holds whole weights, which it must to decode or to save a model on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch import nn
    from torch.nn import Parameter


def is_sharded(model: nn.Module) -> bool:
    """Return whether any weight of `model` is spread over ranks (FSDP2, ZeRO-3)."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_shape") for p in model.parameters())


def whole_shape(parameter: Parameter) -> torch.Size:
    """Return the shape of a weight over all ranks; ZeRO-3 leaves an empty tensor on each."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
