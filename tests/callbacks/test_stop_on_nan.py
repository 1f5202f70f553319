"""A loss or gradient that is not a number ends the run before it does harm, and keeps its batch."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backtrack.callbacks.stop_on_nan import NotFiniteError, StopOnNan
from backtrack.data.batching import make_batch
from backtrack.data.module import StepDataset
from backtrack.data.types import Segment, Tree
from backtrack.train import train
from tests.tiny_runs import checkpoint_of, config_of, overrides_of, start_command

TREE = Tree("a.jsonl:7", 0, (Segment((1, 2), -1, 0.0), Segment((3, 4), 0, 1.0)), ((0, 1),))


class Poison(pl.Callback):
    """Spoils the loss (its weights) or one gradient of one micro-batch; steps count from 0."""

    last: Poison

    def __init__(self, *, step: int, micro_batch: int, what: str, rank: int) -> None:
        self.place, self.what = (step, micro_batch, rank), what
        Poison.last = self

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        here = (batch.step, batch_idx % trainer.accumulate_grad_batches, trainer.global_rank)
        if here != self.place:
            return
        self.module = module
        self.before = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.data = trainer.datamodule
        if self.what == "loss":
            batch.forest.weights[0] = math.nan
        else:
            module.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)


def poisoned(*, step, micro_batch=1, what="loss", every=1, rank=0):
    target = "tests.callbacks.test_stop_on_nan.Poison"
    return (
        "trainer.accumulate_grad_batches=2",
        "++callbacks.stop_on_nan={_target_: backtrack.callbacks.stop_on_nan.StopOnNan, "
        f"run_dir: '${{paths.run_dir}}', every_n_steps: {every}}}",
        f"+callbacks.poison={{_target_: {target}, step: {step}, micro_batch: {micro_batch}, "
        f"what: {what}, rank: {rank}}}",
    )


def run_of(tmp_path):
    (run,) = (p for p in (tmp_path / "logs/train/tiny_sft").iterdir() if not p.is_symlink())
    return run


def kept(tmp_path, name):
    return torch.load(run_of(tmp_path) / "nan" / name, weights_only=True)


def test_nan_loss_stops_before_the_weights_are_touched_and_keeps_its_batch(tmp_path):
    with pytest.raises(NotFiniteError) as caught:
        train(config_of(tmp_path, *poisoned(step=2)))
    for part in ("step 2: the loss of rank 0 is nan in micro-batch 1", "step=2_rank=0.pt"):
        assert part in str(caught.value)
    for remedy in ("learning_rate", "precision", "rows", "resume=auto"):
        assert remedy in str(caught.value)
    for name, parameter in Poison.last.module.named_parameters():
        assert torch.equal(parameter, Poison.last.before[name])
    record = kept(tmp_path, "step=2_rank=0.pt")
    (micro_batch,) = record["micro_batches"]
    assert (record["step"], record["rank"], micro_batch["micro_batch"]) == (2, 0, 1)
    assert math.isnan(micro_batch["loss"])
    assert math.isnan(record["gradient_norm"])
    assert record["bad_gradients"]
    data = Poison.last.data
    planned = StepDataset(data, num_micro=2, rank=0, num_ranks=1)[2 * 2 + 1]
    forest = micro_batch["batch"]["forest"]
    assert torch.equal(forest["input_ids"], planned.forest.input_ids)
    tokens = {tree.example_id: tree.num_tokens for tree in data.trees_of_step(2)}
    found = sum(tokens[name] for name in micro_batch["example_ids"])
    assert found == planned.forest.num_tokens
    assert checkpoint_of(run_of(tmp_path))["global_step"] == 2


def test_bad_gradient_is_named_and_all_micro_batches_are_kept(tmp_path):
    with pytest.raises(NotFiniteError, match="step 1: the losses are finite, but the gradient"):
        train(config_of(tmp_path, *poisoned(step=1, what="gradient")))
    record = kept(tmp_path, "step=1_rank=0.pt")
    assert [entry["micro_batch"] for entry in record["micro_batches"]] == [0, 1]
    assert record["bad_gradients"] == ["model.model.norm.weight"]
    assert not math.isfinite(record["gradient_norm"])
    for name, parameter in Poison.last.module.named_parameters():
        assert torch.equal(parameter, Poison.last.before[name])


def test_bad_step_between_two_looks_gets_into_no_checkpoint(tmp_path):
    with pytest.raises(NotFiniteError, match="step 2: the loss of rank 0 is nan in micro-batch 0"):
        train(config_of(tmp_path, *poisoned(step=2, micro_batch=0, every=100), steps=6))
    # Saved after every second step: that of step 4 was refused.
    assert checkpoint_of(run_of(tmp_path))["global_step"] == 2
    assert kept(tmp_path, "step=2_rank=0.pt")["micro_batches"][0]["micro_batch"] == 0


def test_bad_last_step_leaves_no_model(tmp_path):
    more = ("trainer.save_every_n_steps=100", "trainer.val_every_n_steps=100")
    with pytest.raises(NotFiniteError, match="step 2"):
        train(config_of(tmp_path, *poisoned(step=2, every=100), *more, steps=3))
    assert not (run_of(tmp_path) / "model").exists()
    assert not (run_of(tmp_path) / "checkpoints/last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("every", [1, 100])
def test_nan_of_one_rank_stops_all_of_them(tmp_path, every):
    ranks = ("trainer.devices=2", "strategy=ddp")
    command = overrides_of(tmp_path, *poisoned(step=1, every=every, rank=1), *ranks, steps=40)
    process = start_command("train", command)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1, stderr
    assert "error: step 1: the loss of rank 1 is nan in micro-batch 1" in stderr
    assert os.listdir(run_of(tmp_path) / "nan") == ["step=1_rank=1.pt"]


class Reads(TorchDispatchMode):
    """Counts the times that a number is read from a tensor, for which a GPU has to be waited."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class FakeTrainer(SimpleNamespace):
    """Of one rank and two micro-batches a step, around `model`."""

    def __init__(self, model, *, precision="32-true"):
        super().__init__(
            accumulate_grad_batches=2,
            global_step=0,
            global_rank=0,
            world_size=1,
            precision=precision,
            datamodule=None,
            strategy=SimpleNamespace(
                model=model,
                root_device=torch.device("cpu"),
                reduce=lambda value, reduce_op: value,
                barrier=lambda name: None,
            ),
        )

    def step(self, callback, module, losses, *, gradient=1.0):
        """Call the hooks of an optimiser step as Lightning does for this kind of engine."""
        is_deepspeed = hasattr(self.strategy.model, "get_global_grad_norm")
        for micro_batch, loss in enumerate(losses):
            number = self.global_step * 2 + micro_batch
            batch = make_batch(
                [[TREE]], layout="forest", pad_id=0, total_weight=1.0, num_shares=2, step=0
            )
            callback.on_train_batch_start(self, module, batch, number)
            callback.on_before_backward(self, module, torch.tensor(loss))
            module.weight.grad = None if is_deepspeed else torch.full((2, 2), gradient)
            if is_deepspeed or micro_batch == 1:
                callback.on_before_optimizer_step(self, module, None)
            self.global_step += micro_batch
            callback.on_train_batch_end(self, module, None, batch, number)


@pytest.fixture
def module():
    return torch.nn.Linear(2, 2, bias=False)


def test_healthy_steps_read_one_number_a_look(tmp_path, module):
    callback, trainer = StopOnNan(run_dir=str(tmp_path), every_n_steps=3), FakeTrainer(module)
    counts = []
    for _ in range(6):
        with Reads() as reads:
            trainer.step(callback, module, [1.0, 2.0])
        counts.append(reads.count)
    assert counts == [0, 0, 1, 0, 0, 1]
    assert not (tmp_path / "nan").exists()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_any_loss_that_is_not_finite_stops(tmp_path, module, loss):
    callback, trainer = StopOnNan(run_dir=str(tmp_path), every_n_steps=1), FakeTrainer(module)
    with pytest.raises(NotFiniteError, match=f"is {loss} in micro-batch 0"):
        trainer.step(callback, module, [loss, 1.0])


def test_overflowing_gradients_of_fp16_are_no_fault(tmp_path, module):
    callback = StopOnNan(run_dir=str(tmp_path), every_n_steps=1)
    trainer = FakeTrainer(module, precision="16-mixed")
    trainer.step(callback, module, [1.0, 1.0], gradient=math.inf)
    with pytest.raises(NotFiniteError):
        trainer.step(callback, module, [1.0, math.nan])


@pytest.mark.parametrize("norm", [math.inf, torch.tensor(math.nan)])
def test_deepspeed_is_looked_at_after_its_step(tmp_path, module, norm):
    engine = SimpleNamespace(get_global_grad_norm=lambda: 1.0)
    callback, trainer = StopOnNan(run_dir=str(tmp_path), every_n_steps=1), FakeTrainer(engine)
    trainer.step(callback, module, [1.0, 1.0])
    engine.get_global_grad_norm = lambda: norm
    with pytest.raises(NotFiniteError, match="step 1: the losses are finite"):
        trainer.step(callback, module, [1.0, 1.0])
    record = torch.load(tmp_path / "nan/step=1_rank=0.pt", weights_only=True)
    assert len(record["micro_batches"]) == 2
    engine.get_global_grad_norm = lambda: None  # its taking of norms is turned off
    with pytest.raises(NotFiniteError, match="step 2: the loss of rank 0 is nan in micro-batch 0"):
        trainer.step(callback, module, [math.nan, 1.0])
