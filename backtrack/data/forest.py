"""Trees to tensors: many trees a row, each token seen once, the loss as a list of edges.

Legend: B rows, T tokens, S segments of the fullest row, E edges, P paths, N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from backtrack.data.types import Tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Forest(NamedTuple):
    """Rows of trees and the edges of their loss.

    An edge is (predictor position, target token, path, weight): the last token of a prefix predicts
    the first token of each of its children, so targets are not a shift of the inputs.

    Attributes:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64, depth in the tree: 0 at each root; 0 on padding.
        segment_ids: (B, T) int64, number of the token's segment in its row; -1 on padding.
        ancestors: (B, S, S) bool, `[b, s, r]` where r is s or an ancestor of s.
        predictors: (E,) int64, flat positions `row * T + column`.
        targets: (E,) int64.
        paths: (E,) int64, number of the edge's path in this batch.
        weights: (E,) float32.
        pairs: (N, 2) int64, paths of chosen and rejected.
        pair_weights: (N,) float32.
        pair_ends: N numbers, ascending: the edges of a pair go from the end of the pair before it
            up to its own.
        num_paths: P.
        num_tokens: Tokens that are not padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    ancestors: Tensor
    predictors: Tensor
    targets: Tensor
    paths: Tensor
    weights: Tensor
    pairs: Tensor
    pair_weights: Tensor
    pair_ends: tuple[int, ...]
    num_paths: int
    num_tokens: int


@dataclass(slots=True)
class _Row:
    """A row while it is planted."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    ancestors: list[set[int]] = field(default_factory=list)

    def add(self, tree: Tree, order: Sequence[int]) -> dict[int, int]:
        """Append the segments `order` of `tree` (parents first); return where each begins."""
        starts: dict[int, int] = {}
        number: dict[int, int] = {}
        for index in order:
            segment = tree.segments[index]
            starts[index], number[index] = len(self.ids), len(self.ancestors)
            above: set[int] = set()
            depth = 0
            if segment.parent >= 0:
                above = self.ancestors[number[segment.parent]]
                end = starts[segment.parent] + len(tree.segments[segment.parent].ids)
                depth = self.positions[end - 1] + 1
            self.ids += segment.ids
            self.positions += range(depth, depth + len(segment.ids))
            self.segments += [number[index]] * len(segment.ids)
            self.ancestors.append(above | {number[index]})
        return starts


@dataclass(slots=True)
class _Edges:
    """The edges of a batch while it is planted; predictors as (row, column)."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    paths: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(
        self, tree: Tree, index: int, *, row: int, starts: dict[int, int], path: int, weight: float
    ) -> None:
        """Append one edge for each token of segment `index`."""
        segment, start = tree.segments[index], starts[index]
        ids, columns = list(segment.ids), list(range(start - 1, start + len(segment.ids) - 1))
        if segment.parent >= 0:
            columns[0] = starts[segment.parent] + len(tree.segments[segment.parent].ids) - 1
        else:  # nothing comes before the first token of a root: nobody predicts it
            ids, columns = ids[1:], columns[1:]
        self.rows += [row] * len(ids)
        self.columns += columns
        self.targets += ids
        self.paths += [path] * len(ids)
        self.weights += [weight] * len(ids)


def loss_segments(tree: Tree) -> list[tuple[int, int, float]]:
    """Return `(path, segment, weight)` of every segment whose tokens are targets.

    Without pairs each weighted segment counts once, on the first path that holds it. In a pair,
    what both paths share cancels in the margin and is left out.
    """
    if not tree.pairs:
        found: dict[int, tuple[int, int, float]] = {}
        for number, path in enumerate(tree.paths):
            for index in path:
                if tree.segments[index].weight > 0:
                    found.setdefault(index, (number, index, tree.segments[index].weight))
        return list(found.values())
    chosen_of = [(pair[0], pair[1]) for pair in tree.pairs]
    assert len({path for pair in chosen_of for path in pair}) == 2 * len(chosen_of), (
        "a path may be in one pair only"
    )
    branches = []
    for chosen, rejected in chosen_of:
        shared = set(tree.paths[chosen]) & set(tree.paths[rejected])
        branches += [
            (number, index, 1.0)
            for number in (chosen, rejected)
            for index in tree.paths[number]
            if index not in shared
        ]
    return branches


def loss_weight(tree: Tree) -> float:
    """Return what `tree` adds to the denominator of its step: weights of edges, or of pairs."""
    if tree.pairs:
        return sum(weight for _, _, weight in tree.pairs)
    return sum(
        weight * (len(tree.segments[index].ids) - (tree.segments[index].parent < 0))
        for _, index, weight in loss_segments(tree)
    )


def plant(rows: Sequence[Sequence[Tree]], *, pad_id: int, multiple: int = 8) -> Forest:
    """Return the forest of `rows`, each token of a tree once (`data.layout=forest`).

    Args:
        rows: The trees of each row; a row may be empty (all padding, no edges).
        pad_id: Fills rows up to the longest one.
        multiple: T is rounded up to it, so that fewer shapes occur.
    """
    planted, edges = [_Row() for _ in rows], _Edges()
    first_path = 0
    for number, (row, trees) in enumerate(zip(planted, rows, strict=True)):
        for tree in trees:
            starts = row.add(tree, range(len(tree.segments)))
            for path, index, weight in loss_segments(tree):
                edges.add(
                    tree, index, row=number, starts=starts, path=first_path + path, weight=weight
                )
            first_path += len(tree.paths)
    return _to_tensors(planted, edges, rows, pad_id=pad_id, multiple=multiple)


def plant_paths(rows: Sequence[Sequence[Tree]], *, pad_id: int, multiple: int = 8) -> Forest:
    """Return the same trees as ordinary sequences, one path a row (`data.layout=paths`).

    The edges and their paths are those of `plant`; each row is one segment, so plain causal
    attention serves. For architectures that take no custom mask, and as an oracle.
    """
    planted: list[_Row] = []
    edges = _Edges()
    first_path = 0
    for tree in (tree for trees in rows for tree in trees):
        places = []
        for path in tree.paths:
            row = _Row()
            places.append((len(planted), row.add(tree, path)))
            planted.append(row)
        for path_number, index, weight in loss_segments(tree):
            number, starts = places[path_number]
            edges.add(
                tree, index, row=number, starts=starts, path=first_path + path_number, weight=weight
            )
        first_path += len(tree.paths)
    planted = planted or [_Row()]
    forest = _to_tensors(planted, edges, rows, pad_id=pad_id, multiple=multiple)
    return forest._replace(
        segment_ids=forest.segment_ids.clamp(max=0),
        ancestors=torch.ones(len(planted), 1, 1, dtype=torch.bool),
    )


PLANTERS = {"forest": plant, "paths": plant_paths}


def attention_allowed(forest: Forest) -> Tensor:
    """Return (B, T, T) bool: may token i attend to token j?

    True where j's segment is i's or an ancestor of it and j does not come after i. Padding attends
    to itself, since a row of a softmax without entries is NaN.
    """
    width = forest.segment_ids.shape[1]
    segments = forest.segment_ids.clamp(min=0)
    batch = torch.arange(len(segments), device=segments.device)[:, None, None]
    allowed = forest.ancestors[batch, segments[:, :, None], segments[:, None, :]]
    is_real = forest.segment_ids >= 0
    allowed = allowed & is_real[:, :, None] & is_real[:, None, :]
    diagonal = torch.eye(width, dtype=torch.bool, device=segments.device)
    return allowed.tril() | diagonal


def move(forest: Forest, device: torch.device) -> Forest:
    """Return `forest` with its tensors on `device`."""
    moved: dict[str, Any] = {
        name: value.to(device)
        for name, value in forest._asdict().items()
        if isinstance(value, torch.Tensor)
    }
    return forest._replace(**moved)


def is_causal(forest: Forest) -> bool:
    """Return whether every row is one segment, so that no mask beside the causal one is needed."""
    return forest.ancestors.shape[1] == 1


def _to_tensors(
    planted: Sequence[_Row],
    edges: _Edges,
    rows: Sequence[Sequence[Tree]],
    *,
    pad_id: int,
    multiple: int,
) -> Forest:
    longest = max(1, *(len(row.ids) for row in planted)) if planted else 1
    width = -(-longest // multiple) * multiple
    fullest = max(1, *(len(row.ancestors) for row in planted)) if planted else 1
    input_ids = np.full((len(planted), width), pad_id, dtype=np.int64)
    position_ids = np.zeros((len(planted), width), dtype=np.int64)
    segment_ids = np.full((len(planted), width), -1, dtype=np.int64)
    ancestors = np.zeros((len(planted), fullest, fullest), dtype=bool)
    for number, row in enumerate(planted):
        length = len(row.ids)
        input_ids[number, :length] = row.ids
        position_ids[number, :length] = row.positions
        segment_ids[number, :length] = row.segments
        for segment, above in enumerate(row.ancestors):
            ancestors[number, segment, list(above)] = True
    pairs, pair_weights, first_path = [], [], 0
    for tree in (tree for trees in rows for tree in trees):
        for chosen, rejected, weight in tree.pairs:
            pairs.append((first_path + chosen, first_path + rejected))
            pair_weights.append(weight)
        first_path += len(tree.paths)
    sizes = np.bincount(np.asarray(edges.paths, np.int64), minlength=first_path)
    ends = np.cumsum([sizes[chosen] + sizes[rejected] for chosen, rejected in pairs])
    flat = np.asarray(edges.rows, dtype=np.int64) * width + np.asarray(edges.columns, np.int64)
    return Forest(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        segment_ids=torch.from_numpy(segment_ids),
        ancestors=torch.from_numpy(ancestors),
        predictors=torch.from_numpy(flat),
        targets=torch.tensor(edges.targets, dtype=torch.int64),
        paths=torch.tensor(edges.paths, dtype=torch.int64),
        weights=torch.tensor(edges.weights, dtype=torch.float32),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        pair_weights=torch.tensor(pair_weights, dtype=torch.float32),
        pair_ends=tuple(ends.astype(int).tolist()),
        num_paths=first_path,
        num_tokens=sum(len(row.ids) for row in planted),
    )
