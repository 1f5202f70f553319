"""Packing and dealing: every tree once, rows within bounds, shares about equal, without chance."""

import pytest

from backtrack.data.batching import deal, make_batch, pack, step_weight
from backtrack.data.load import make_source
from backtrack.data.types import Segment, Tree


def tree(name, size, weight=1.0):
    """A prompt of one token and an answer of size - 1."""
    segments = (Segment((1,), -1, 0.0), Segment(tuple(range(2, size + 1)), 0, weight))
    return Tree(name, 0, segments, ((0, 1),))


def sizes_of(number):
    return [2 + (7 * i * i + 3 * i) % 23 for i in range(number)]


def names(share):
    return [[item.example_id for item in row] for row in share]


def test_pack_puts_the_largest_first_and_fills_the_tightest_row():
    # 6 opens row 0 (4 left), 5 row 1 (5 left), 4 fits row 0 exactly, 3 and 2 fill row 1.
    assert pack([2, 5, 3, 6, 4], 10) == [[3, 4], [1, 2, 0]]


@pytest.mark.parametrize("max_tokens", [25, 40, 1000])
def test_pack_holds_each_item_once_in_rows_within_the_limit(max_tokens):
    sizes = sizes_of(60)
    rows = pack(sizes, max_tokens)
    assert sorted(item for row in rows for item in row) == list(range(60))
    loads = [sum(sizes[item] for item in row) for row in rows]
    assert max(loads) <= max_tokens
    assert sum(load <= max_tokens / 2 for load in loads) <= 1  # two half-empty rows would be one


def test_pack_names_the_setting_when_an_item_is_too_large():
    with pytest.raises(ValueError, match=r"data\.max_tokens=10.*11 tokens"):
        pack([3, 11], 10)
    assert pack([10], 10) == [[0]]
    assert pack([], 10) == []


def test_rows_of_real_data_are_almost_full(shared_dir):
    """Of all trees together (the reference pass), and of steps of 128 (rows of fixed length)."""
    path = str(shared_dir / "data" / "hh-rlhf" / "harmless-base.jsonl")
    triples = make_source("hh", {"path": path}, on_bad_row="skip").read().examples
    sizes = []  # of DPO trees, in words: their spread is that of tokens
    for triple in triples:
        prompt = sum(len(message["content"].split()) for message in triple.prompt)
        sizes.append(prompt + 2 * len(triple.safe.split()) + 2 * len(triple.unsafe.split()) + 2)

    def fill(some):
        return sum(some) / (1500 * len(pack(some, 1500)))

    assert fill(sizes) > 0.98
    steps = [sizes[first : first + 128] for first in range(0, len(sizes) - 128, 128)]
    assert sum(map(fill, steps)) / len(steps) > 0.95


@pytest.mark.parametrize("num_shares", [1, 2, 3, 8])
@pytest.mark.parametrize("number", [0, 1, 5, 40])
def test_deal_holds_each_tree_once_in_rows_within_the_limit(number, num_shares):
    trees = [tree(f"t{i}", size) for i, size in enumerate(sizes_of(number))]
    shares = deal(trees, max_tokens=30, num_shares=num_shares)
    assert len(shares) == num_shares
    dealt = [item for share in shares for row in share for item in row]
    assert sorted(t.example_id for t in dealt) == sorted(t.example_id for t in trees)
    for share in shares:
        assert share  # empty shares are a row without trees, never missing
        assert all(sum(t.num_tokens for t in row) <= 30 for row in share)
    again = deal(trees, max_tokens=30, num_shares=num_shares)
    assert [names(share) for share in again] == [names(share) for share in shares]


@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_deal_shares_are_about_equally_full(max_tokens):
    # Also where a row could hold everything: the other ranks must not stand idle.
    trees = [tree(f"t{i}", size) for i, size in enumerate(sizes_of(40))]
    shares = deal(trees, max_tokens=max_tokens, num_shares=4)
    loads = [sum(t.num_tokens for row in share for t in row) for share in shares]
    assert max(loads) - min(loads) <= max(t.num_tokens for t in trees)


def test_deal_evens_out_the_rows_of_a_share():
    # 5 + 5 + 2 tokens at 11 a row: rows of 5 + 2 and 5, not of 10 and 2, which pad to 20.
    (share,) = deal(
        [tree(n, s) for n, s in [("a", 5), ("b", 5), ("c", 2)]], max_tokens=11, num_shares=1
    )
    assert names(share) == [["a", "c"], ["b"]]
    # 6 6 4 4 4 fill two rows of 12 in one way only; evened out one would hold 6 4 4.
    sizes = [6, 6, 4, 4, 4]
    (share,) = deal([tree("x", size) for size in sizes], max_tokens=12, num_shares=1)
    assert [[t.num_tokens for t in row] for row in share] == [[6, 6], [4, 4, 4]]


def test_deal_leaves_shares_empty_when_trees_run_out():
    shares = deal([tree("a", 4)], max_tokens=8, num_shares=3)
    assert sorted(map(names, shares)) == [[[]], [[]], [["a"]]]


def test_deal_names_the_setting_when_a_tree_is_too_large():
    with pytest.raises(ValueError, match=r"data\.max_tokens=5"):
        deal([tree("a", 6)], max_tokens=5, num_shares=2)


def test_step_weight_sums_edges_for_sft_and_pairs_for_dpo():
    # Answers of 4 and 2 tokens with weights 1 and 0.5: 4 + 1. Pairs count their own weight.
    assert step_weight([tree("a", 5), tree("b", 3, weight=0.5)]) == 5.0
    segments = (Segment((1,), -1, 0.0), Segment((2, 3), 0, 0.0), Segment((4, 5, 6), 0, 0.0))
    pair = Tree("c", 0, segments, ((0, 1), (0, 2)), ((0, 1, 0.25),))
    assert step_weight([pair, pair]) == 0.5


def test_step_weight_of_nothing_does_not_divide_by_zero():
    assert step_weight([]) == 1.0


def test_make_batch_of_an_empty_share_has_rows_without_edges():
    batch = make_batch([[]], layout="forest", pad_id=7, total_weight=3.0, num_shares=2, step=5)
    assert batch.forest.input_ids.tolist() == [[7] * 8]
    assert batch.forest.targets.shape == (0,)
    assert batch.forest.pairs.shape == (0, 2)
    assert (batch.forest.num_paths, batch.forest.num_tokens) == (0, 0)
    assert (batch.total_weight, batch.num_shares, batch.step) == (3.0, 2, 5)


def test_rows_can_have_one_length_from_step_to_step():
    for rows in ([[tree("a", 5)]], [[tree("b", 9), tree("c", 4)], [tree("d", 2)]], [[]]):
        batch = make_batch(
            rows,
            layout="forest",
            pad_id=7,
            total_weight=1.0,
            num_shares=1,
            step=0,
            row_multiple=16,
        )
        assert batch.forest.input_ids.shape[1] == 16
