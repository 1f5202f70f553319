"""The plan of a run: which examples a step holds, whoever computes it, and where it goes on."""

from __future__ import annotations

import signal
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backtrack.data.examples import Recipe
from backtrack.data.forest import loss_segments
from backtrack.data.mixture import mix_schedule
from backtrack.data.module import BatchSettings, ForestData, StepDataset, StepSampler
from backtrack.data.types import EncodedExample, Turn
from backtrack.logps import path_logps

BATCH, EXAMPLES = 6, 20  # 2.5 epochs: 50 slots, 9 steps, the last one of 2
RESET = 900


def example(number, name="kettles"):
    """Begins with a token of its own, so that it is recognised in a batch; sizes differ."""
    size = 2 + 5 * number % 9
    return EncodedExample(
        f"{name}:{number}",
        bool(number % 3),
        (Turn((number, 500), is_supervised=False),),
        tuple(range(600, 600 + size)),
        tuple(range(700, 702 + number % 4)),
    )


def make_data(seed=0, num_micro=1, validation=(), layout="forest", method="dpo_backtrack"):
    train = [[example(i) for i in range(EXAMPLES)]]
    return ForestData(
        train=train,
        validation=list(validation),
        schedule=mix_schedule(sizes=[EXAMPLES], weights=None, num_slots=50, seed=seed),
        recipe=Recipe(method, seed, RESET, 1.0, 1.0, 1.0, 1.0),
        settings=BatchSettings(
            batch_size=BATCH, max_tokens=120, layout=layout, pad_id=999, num_workers=0
        ),
        num_micro=num_micro,
    )


def attach(data, *, rank=0, num_ranks=1, global_step=0):
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=num_ranks,
        global_step=global_step,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def trees_in(batch):
    """Token ids of each tree of a batch, segment after segment."""
    forest = batch.forest
    found = []
    for row in range(len(forest.input_ids)):
        starts = ((forest.position_ids[row] == 0) & (forest.segment_ids[row] >= 0)).nonzero()[:, 0]
        bounds = [*starts.tolist(), int((forest.segment_ids[row] >= 0).sum())]
        for start, end in pairwise(bounds):
            found.append(tuple(forest.input_ids[row, start:end].tolist()))
    return found


def global_batches(data, num_ranks, num_micro):
    """Per step: all trees of all ranks and micro-batches, and the totals they were given."""
    datasets = [
        StepDataset(data, num_micro=num_micro, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    steps = []
    for step in range(data.num_steps):
        shares = [d[step * num_micro + m] for d in datasets for m in range(num_micro)]
        assert {share.step for share in shares} == {step}
        assert {share.num_shares for share in shares} == {num_ranks * num_micro}
        totals = {share.total_weight for share in shares}
        steps.append((sorted(t for share in shares for t in trees_in(share)), totals))
    return steps


def test_global_batches_depend_on_seed_and_step_alone_not_on_ranks_or_micro_batches():
    data = make_data()
    assert data.num_steps == 9
    expected = global_batches(data, 1, 1)
    assert [len(trees) for trees, _ in expected] == [6] * 8 + [2]
    for num_ranks in (1, 2, 4):
        for num_micro in (1, 2, 4):
            assert global_batches(data, num_ranks, num_micro) == expected
    assert global_batches(make_data(), 2, 1) == expected
    assert global_batches(make_data(seed=1), 1, 1) != expected


def test_global_batches_do_not_depend_on_the_order_of_reading():
    dataset = StepDataset(make_data(), num_micro=2, rank=0, num_ranks=2)
    forwards = [trees_in(dataset[i]) for i in range(len(dataset))]
    fresh = StepDataset(make_data(), num_micro=2, rank=0, num_ranks=2)
    backwards = [trees_in(fresh[i]) for i in reversed(range(len(fresh)))]
    assert backwards[::-1] == forwards


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_batches_do_not_depend_on_workers_or_the_random_state(num_workers):
    data = attach(make_data(num_micro=2))
    data.settings = data.settings._replace(num_workers=num_workers)
    torch.manual_seed(num_workers)
    before = torch.get_rng_state()
    loaded = list(data.train_dataloader())
    torch.testing.assert_close(torch.get_rng_state(), before)
    dataset = StepDataset(make_data(), num_micro=2, rank=0, num_ranks=1)
    assert len(loaded) == len(dataset) == 18
    for index, batch in enumerate(loaded):
        assert trees_in(batch) == trees_in(dataset[index])
        assert isinstance(batch.total_weight, float)
        assert batch.forest.num_paths == dataset[index].forest.num_paths


def test_workers_leave_ctrl_c_to_the_trainer():
    # Where processes are spawned they have no handler of the trainer's, and would die of it.
    before = signal.getsignal(signal.SIGINT)
    try:
        attach(make_data()).train_dataloader().worker_init_fn(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_every_example_is_seen_once_an_epoch_with_draws_of_its_own():
    data = make_data()
    trees = [tree for step in range(data.num_steps) for tree in data.trees_of_step(step)]
    assert len(trees) == 50
    for epoch, number in ((0, EXAMPLES), (1, EXAMPLES), (2, 10)):
        ids = [tree.example_id for tree in trees if tree.epoch == epoch]
        assert len(ids) == len({*ids}) == number
    stems = {}
    for tree in trees:
        stems.setdefault(tree.example_id, set()).add(tree.segments)
    assert sum(len(shapes) > 1 for shapes in stems.values()) > EXAMPLES // 2


def test_resumed_run_goes_on_with_the_step_it_has_reached():
    whole = list(attach(make_data(num_micro=2)).train_dataloader())
    rest = list(attach(make_data(num_micro=2), global_step=5).train_dataloader())
    assert [batch.step for batch in rest] == [5, 5, 6, 6, 7, 7, 8, 8]
    assert [trees_in(b) for b in rest] == [trees_in(b) for b in whole[10:]]
    sampler = StepSampler(first=10, total=18)
    assert (len(sampler), list(sampler)) == (18, list(range(10, 18)))


def test_every_rank_has_as_many_micro_batches():
    for rank in range(4):
        data = attach(make_data(num_micro=3), rank=rank, num_ranks=4)
        batches = list(data.train_dataloader())
        assert len(batches) == 27  # 12 shares for 6 examples: some are empty
        assert all(len(batch.forest.input_ids) for batch in batches)


def test_total_weight_is_that_of_the_whole_step():
    data = make_data()
    weights = {e.example_id: 2.0 if e.is_harmful else 1.0 for e in data.train[0]}
    dataset = StepDataset(data, num_micro=2, rank=1, num_ranks=2)
    for step in range(data.num_steps):
        expected = sum(weights[tree.example_id] for tree in data.trees_of_step(step))
        assert dataset[2 * step].total_weight == expected


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_micro", [1, 3])
def test_validation_covers_every_example_once_with_one_denominator(num_ranks, num_micro):
    held_out = [example(i, "held-out") for i in range(13)]
    ranks = [
        list(
            attach(
                make_data(num_micro=num_micro, validation=held_out), rank=rank, num_ranks=num_ranks
            ).val_dataloader()
        )
        for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    roots = sorted(tree[0] for batch in batches for tree in trees_in(batch))
    assert roots == list(range(13))
    assert {batch.num_shares for batch in batches} == {1}
    (total,) = {batch.total_weight for batch in batches}
    assert total == sum(batch.forest.pair_weights.sum().item() for batch in batches)


def test_no_validation_examples_give_no_loader():
    assert attach(make_data()).val_dataloader() == []


def test_validation_draws_do_not_move_with_the_epoch():
    data = make_data(validation=[example(3, "held-out")])
    assert [*data.trees_of_validation()] == [*data.trees_of_validation()]
    assert {tree.epoch for tree in data.trees_of_validation()} == {0}


def test_all_trees_covers_each_epoch_and_example_of_the_run_once():
    data = make_data(validation=[example(i, "held-out") for i in range(3)])
    trees = data.all_trees()
    keys = [(tree.epoch, tree.example_id) for tree in trees]
    assert len(keys) == len({*keys}) == 53
    wanted = {(t.epoch, t.example_id) for s in range(data.num_steps) for t in data.trees_of_step(s)}
    assert wanted | {(0, f"held-out:{i}") for i in range(3)} == {*keys}


def test_all_trees_are_made_when_they_are_asked_for():
    data = make_data(validation=[example(i, "held-out") for i in range(3)])
    trees = data.all_trees()
    assert len(trees) == 53
    assert trees[52].example_id == "held-out:2"
    assert trees[-1] == trees[52]
    assert [*trees[48:53:2]] == [trees[48], trees[50], trees[52]]
    with pytest.raises(IndexError):
        trees[53]
    assert [*trees][:6] == data.trees_of_step(0)


def test_loader_adds_up_how_long_its_reader_waited(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("backtrack.data.module.time.perf_counter", lambda: now[0])
    data = attach(make_data())
    plan = data.trees_of_step

    def slow_plan(step):
        now[0] += 3.0
        return plan(step)

    monkeypatch.setattr(data, "trees_of_step", slow_plan)
    loader = data.train_dataloader()
    for _ in loader:
        now[0] += 100.0  # the step itself
    assert loader.waited == 3.0 * data.num_steps


@pytest.mark.parametrize("layout", ["forest", "paths"])
def test_reference_logps_follow_their_paths_through_packing(layout):
    data = make_data(num_micro=2, layout=layout)

    def sums_of_targets(tree):
        """In place of log-probs: what each path's edges add up to, and so tells paths apart."""
        sums = np.zeros(len(tree.paths), dtype=np.float32)
        for path, segment, _ in loss_segments(tree):
            sums[path] += sum(tree.segments[segment].ids)
        return sums

    data.reference = {(t.epoch, t.example_id): sums_of_targets(t) for t in data.all_trees()}
    dataset = StepDataset(data, num_micro=2, rank=0, num_ranks=1)
    for batch in (dataset[index] for index in range(len(dataset))):
        forest = batch.forest
        expected = path_logps(forest.targets.float(), forest.paths, forest.num_paths)
        torch.testing.assert_close(batch.reference_logps, expected, rtol=0, atol=0)


def test_batches_without_a_table_carry_no_reference():
    assert StepDataset(make_data(), num_micro=1, rank=0, num_ranks=1)[0].reference_logps is None


def test_rows_on_a_gpu_have_one_length():
    lengths = []
    for device in ("cpu", "cuda"):
        data = attach(make_data())
        data.settings = data.settings._replace(max_tokens=512)
        data.trainer.strategy.root_device = torch.device(device)
        lengths.append(next(iter(data.train_dataloader())).forest.input_ids.shape[1])
    assert lengths[0] < lengths[1] == data.settings.max_tokens
