"""Attention over trees on a CPU: each tree on its own, only where it looks, no padding anywhere.

A dense mask over a row makes every tree look at every other one and throws the result away. Here
the real tokens of all rows form one row without padding, and attention runs in blocks: a trunk (the
leading tokens whose depth is their index: a prompt and one chain of branches below it) is an
ordinary causal sequence, and each subtree that hangs from it sees the trunk up to where it hangs,
and itself.

Legend: B rows, T tokens, N real tokens, H heads, K key heads, C channels of a head, E edges.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from backtrack.backbone import sliding_window, takes_mask_per_layer_type

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from backtrack.data.forest import Forest

log = logging.getLogger(__name__)

NAME = "sdpa_trees"
"""Of the attention implementation, in the registry of transformers."""


class Block(NamedTuple):
    """Queries `first:last` of a tree, which see its keys `:hang` and `first:last`.

    Attributes:
        first: Of the queries, counted from the tree's first token.
        last: Their end.
        hang: Tokens of the trunk that all of them see; 0 for the trunk itself.
        mask: (last - first, hang + last - first), to be added to the scores; None: causal.
    """

    first: int
    last: int
    hang: int
    mask: Tensor | None


class Span(NamedTuple):
    """One tree in the flat row: its tokens, and blocks that hold each of them once, in order."""

    size: int
    blocks: tuple[Block, ...]


class FlatForest(NamedTuple):
    """The real tokens of a forest in one row.

    Attributes:
        input_ids: (1, N) int64.
        position_ids: (1, N) int64.
        predictors: (E,) int64, positions in the flat row.
        masks: What the backbone takes as `attention_mask`.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    masks: Any


def use_tree_attention(model: PreTrainedModel | PeftModel, *, on_gpu: bool) -> None:
    """Let a model that attends by sdpa skip what no branch of a tree sees.

    On a CPU it attends tree by tree; ordinary masks still work (generation, `layout=paths`), they
    go to transformers' own function. On a GPU it attends by FlexAttention. Where an implementation
    was asked for by name, or the architecture has no FlexAttention, the model is left as it is.

    Args:
        model: As loaded.
        on_gpu: Whether it will be trained on one.
    """
    wanted = "flex_attention" if on_gpu else NAME
    if model.config._attn_implementation != "sdpa":
        log.info("attention over trees by %s, as the model is", model.config._attn_implementation)
        return
    if on_gpu and not getattr(model, "_supports_flex_attn", False):
        log.warning(
            "%s has no FlexAttention in transformers: attention over trees by sdpa and a dense "
            "mask, which is slower on long rows",
            model.config.model_type,
        )
        return
    # Python over blocks of changing sizes: nothing for torch.compile to look into.
    attention = torch.compiler.disable(_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = wanted


def attends_by_tree(config: PreTrainedConfig) -> bool:
    """Return whether a model of `config` takes the masks of `flatten`."""
    return bool(config._attn_implementation == NAME)


def flatten(forest: Forest, config: PreTrainedConfig) -> FlatForest:
    """Return the real tokens of `forest`, rows joined, with the masks of `config`'s layers.

    A forest without any real token (the empty share of a rank) keeps one token of padding, so that
    every rank runs a forward.
    """
    is_real = forest.segment_ids >= 0
    if forest.num_tokens == 0:
        is_real = torch.zeros_like(is_real)
        is_real[0, 0] = True
    place = is_real.flatten().cumsum(0) - 1
    position_ids = forest.position_ids[is_real]
    trees = _allowed(forest, is_real)
    window = sliding_window(config)
    spans = [_span(allowed, depth, None) for allowed, depth in trees]
    near = spans
    if window is not None:
        near = [_span(allowed, depth, window) for allowed, depth in trees]
    masks: Any = _carrier(near)
    if takes_mask_per_layer_type(config):
        masks = {"full_attention": _carrier(spans), "sliding_attention": _carrier(near)}
    return FlatForest(
        forest.input_ids[is_real][None], position_ids[None], place[forest.predictors], masks
    )


def _allowed(forest: Forest, is_real: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return, for each tree, (size, size) where a token may attend to another, and its depths."""
    found = []
    for row in range(len(is_real)):
        depth = forest.position_ids[row][is_real[row]]
        segments = forest.segment_ids[row][is_real[row]].clamp(min=0)
        ends = [*(depth == 0).nonzero().flatten().tolist(), len(depth)]
        for first, last in itertools.pairwise(ends):
            own = segments[first:last]
            allowed = forest.ancestors[row][own[:, None], own[None, :]].tril()
            found.append((allowed, depth[first:last]))
    return found


def _span(allowed: Tensor, depth: Tensor, window: int | None) -> Span:
    """Return the blocks of one tree.

    Args:
        allowed: (size, size) bool.
        depth: (size,) int64.
        window: Tokens, its own included, that a token sees along its branch; None: all.
    """
    size = len(depth)
    far = size if window is None else window
    near = allowed & (depth[:, None] - depth[None, :] < far)
    trunk = int((depth == torch.arange(size)).long().cumprod(0).sum())
    starts = [0]
    last_of_trunk = allowed[trunk:, :trunk].sum(1).tolist()  # tokens of the trunk that each sees
    blocks = []
    for token, seen in enumerate(last_of_trunk, start=trunk):
        # A token right below the trunk begins a subtree; deeper ones see more than the trunk.
        if int(depth[token]) == seen:
            starts.append(token)
    for first, last in zip(starts, [*starts[1:], size], strict=True):
        hang = int(depth[first])
        mask = None
        if first > 0 or window is not None:
            seen = torch.cat([near[first:last, :hang], near[first:last, first:last]], dim=1)
            mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        blocks.append(Block(first, last, hang, mask))
    return Span(size, tuple(blocks))


class _Carrier(torch.Tensor):
    """Takes the spans through a backbone, in the place of a 4-D mask.

    It has no entries: whatever reads it as a mask fails at once and never attends to too much.
    """

    spans: list[Span]


def _carrier(spans: list[Span]) -> Tensor:
    carrier = torch.empty(0, 0, 0, 0, dtype=torch.bool).as_subclass(_Carrier)
    carrier.spans = spans
    return carrier


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by tree where the mask carries trees, else as transformers does.

    Args:
        module: The attention layer, for transformers' function.
        query: (1, H, N, C).
        key: (1, K, N, C).
        value: (1, K, N, C).
        attention_mask: Of `flatten`, or an ordinary one.
        dropout: Share of the probabilities that are dropped.
        scaling: Of the scores; None: one over the root of C.
        **kwargs: For transformers' function.

    Returns:
        (1, N, H, C), and no weights.
    """
    if not isinstance(attention_mask, _Carrier):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    shared: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
    spans, outputs = attention_mask.spans, []
    sizes = [span.size for span in spans]
    rows = [block.last - block.first for span in spans for block in span.blocks]
    # Split once, not sliced for each block: the backward pass of a slice fills a whole row.
    queries, keys, values = (
        torch.split(x, parts, dim=2) for x, parts in ((query, rows), (key, sizes), (value, sizes))
    )
    next_query = iter(queries)
    for span, k, v in zip(spans, keys, values, strict=True):
        for block in span.blocks:
            output = scaled_dot_product_attention(
                next(next_query),
                _seen(k, block),
                _seen(v, block),
                attn_mask=None if block.mask is None else block.mask.to(query.dtype),
                is_causal=block.mask is None,
                **shared,
            )
            outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _seen(tree: Tensor, block: Block) -> Tensor:
    """Return the keys or values of a tree, (..., size, C), that a block sees."""
    own = tree[..., block.first : block.last, :]
    return torch.cat([tree[..., : block.hang, :], own], dim=-2) if block.hang else own
