"""FSDP2 under Lightning: how a module is cut, and checkpoints that are whole or absent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from backtrack.strategies.staged import StagedSaving

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


class FSDP2Strategy(StagedSaving, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over all ranks, with staged checkpoints."""

    checkpoint_kind = "dcp"

    def setup_environment(self) -> None:
        """Lay all ranks of all nodes along the data-parallel side of the mesh."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()


def shard_module(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    entries: Sequence[str],
    reshard_after_forward: bool,
    half: bool,
) -> None:
    """Spread the weights of `module` over `mesh`: each decoder layer by itself, and all the rest.

    Args:
        module: Its layers are transformers' decoder layers.
        mesh: One-dimensional.
        entries: Methods of `module` that use its weights, each a forward to FSDP2.
        reshard_after_forward: Whether layers let go of their weights until the backward pass.
        half: Compute in bf16, with gradients summed in fp32.

    Raises:
        ValueError: If there are no such layers.
    """
    policy = MixedPrecisionPolicy()
    if half:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    layers = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            "strategy: fsdp2 finds no decoder layers of transformers in this model, to spread them "
            "one by one; expected zero3"
        )
    for layer in layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **settings)
    # Embedding and head stay whole from the forward to the backward pass: one may be the other.
    fully_shard(module, reshard_after_forward=False, **settings)
    for name in entries:
        register_fsdp_forward_method(module, name)
