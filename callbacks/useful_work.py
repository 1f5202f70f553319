"""The arithmetic that a training step makes necessary.

Counted as `benchmarks/step_profile.py` counts: two operations a multiplication, forward once,
backward twice.

    6 x weights of the layers x tokens, each once
    + 6 x hidden x vocabulary x states that predict a supervised token, each once
    + 12 x width of attention x layers x (query, key) pairs along the branches

Frozen weights (the base under LoRA) have no gradient of their own and count 4 instead of 6. The
last token of an answer predicts nothing and is not counted. Sliding windows, dropout, norms, what
is recomputed under gradient checkpointing and a reference's pass are not counted either.

Legend: B rows, T tokens, S segments of the fullest row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from backtrack.backbone import backbone_and_head
from backtrack.sharding import whole_shape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from backtrack.data.forest import Forest


class Work(NamedTuple):
    """What a forest makes necessary.

    Attributes:
        tokens: Whose successors someone predicts.
        predictors: (), states that pass the output head.
        pairs: (), queries times the keys that they see.
    """

    tokens: int
    predictors: Tensor
    pairs: Tensor


class Rates(NamedTuple):
    """Operations, forward and backward, for one token, one predictor and one pair."""

    per_token: float
    per_predictor: float
    per_pair: float

    def operations(self, work: Work) -> Tensor:
        """Return the operations of `work`: () float32, on its device."""
        head = self.per_predictor * work.predictors.float()
        return self.per_token * work.tokens + head + self.per_pair * work.pairs.float()


def useful_work(forest: Forest) -> Work:
    """Return what `forest` makes necessary, without reading a tensor: a GPU goes on meanwhile.

    Under `data.layout=paths` a token is counted as often as it is computed.
    """
    segments = forest.segment_ids
    is_real = segments >= 0
    # A segment that is nobody's ancestor but its own ends an answer.
    is_leaf = forest.ancestors.sum(1) == 1
    is_last = torch.ones_like(is_real)
    is_last[:, :-1] = segments[:, 1:] != segments[:, :-1]
    is_end = is_last & is_leaf.gather(1, segments.clamp(min=0))
    is_predictor = torch.zeros(segments.numel(), dtype=torch.bool, device=segments.device)
    is_predictor.index_fill_(0, forest.predictors, True)
    return Work(
        tokens=forest.num_tokens - forest.num_paths,
        predictors=is_predictor.sum(),
        pairs=((forest.position_ids + 1) * (is_real & ~is_end)).sum(),
    )


def operation_rates(model: PreTrainedModel) -> Rates:
    """Return what one token, one predictor and one pair cost in `model`; it may carry LoRA."""
    parts = backbone_and_head(model)
    config: Any = model.config.get_text_config()
    looked_up = {
        id(parameter)
        for module in parts.backbone.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    } | {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    costs = [_operations(p) for p in parts.backbone.parameters() if id(p) not in looked_up]
    head = max(parts.head.parameters(), key=lambda p: whole_shape(p).numel())
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return Rates(
        per_token=float(sum(costs)),
        per_predictor=float(_operations(head)),
        per_pair=12.0 * width * config.num_hidden_layers,
    )


def _operations(weight: nn.Parameter) -> int:
    """Return the operations of one row through a matrix, none for a vector (norms, biases)."""
    shape = whole_shape(weight)
    return (6 if weight.requires_grad else 4) * shape.numel() if len(shape) > 1 else 0
