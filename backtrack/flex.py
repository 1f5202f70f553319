"""Attention over trees on a GPU: FlexAttention skips the blocks in which nothing is allowed.

Legend: B rows, T tokens, S segments of the fullest row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from backtrack.backbone import sliding_window, takes_mask_per_layer_type

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from backtrack.data.forest import Forest

SEGMENT_MULTIPLE = 64
"""S is rounded up to it: each new shape would compile the kernel anew."""


def flex_masks(forest: Forest, config: PreTrainedConfig) -> Any:
    """Return the BlockMask of a forest; a dict where layers of `config` differ.

    The mask is a function of segments, ancestors and depths, so no (T, T) matrix is made. Windows
    are measured in depth. A token of padding sees itself alone.

    Args:
        forest: On the device where attention runs, its rows of one length from batch to batch.
        config: Of the loaded model.
    """
    window = sliding_window(config)
    near = _block_mask(forest, window)
    if not takes_mask_per_layer_type(config):
        return near
    return {"full_attention": _block_mask(forest, None), "sliding_attention": near}


def _block_mask(forest: Forest, window: int | None) -> Any:
    num_rows, num_tokens = forest.segment_ids.shape
    missing = -forest.ancestors.shape[1] % SEGMENT_MULTIPLE
    ancestors = F.pad(forest.ancestors, (0, missing, 0, missing))
    is_real, segments = forest.segment_ids >= 0, forest.segment_ids.clamp(min=0)
    depth, far = forest.position_ids, num_tokens if window is None else window

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_above = ancestors[row, segments[row, query], segments[row, key]] & (query >= key)
        is_near = depth[row, query] - depth[row, key] < far
        both_real = is_real[row, query] & is_real[row, key]
        return (is_above & is_near & both_real) | (query == key)

    device = forest.segment_ids.device
    # Compiled, or evaluating `sees` would make the (T, T) matrix after all.
    return create_block_mask(
        sees,
        num_rows,
        None,
        num_tokens,
        num_tokens,
        device=str(device),
        _compile=torch.device(device).type == "cuda",
    )
