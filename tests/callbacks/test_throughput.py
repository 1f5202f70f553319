"""Speed and MFU count this rank's work and leave validation out; no tensor is read for them."""

from __future__ import annotations

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from backtrack.callbacks import throughput
from backtrack.callbacks.throughput import PEAK_FLOPS_PER_S, Throughput, known_peak, peak_gib
from backtrack.data.forest import plant
from tests.modules.builders import PAD, some_trees
from tests.tiny import tiny_model

CPU = torch.device("cpu")


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", made.perf_counter)
    return made


class Run:
    """Micro-batches of given tokens and seconds; `logged` has what came out."""

    def __init__(self, clock, every_n_steps, accumulate=1, first_step=0, peak=None):
        self.clock, self.accumulate = clock, accumulate
        self.callback = Throughput(every_n_steps=every_n_steps, peak_flops_per_s=peak)
        self.loader = SimpleNamespace(waited=0.0)
        self.trainer = SimpleNamespace(
            global_step=first_step,
            train_dataloader=self.loader,
            strategy=SimpleNamespace(root_device=CPU),
        )
        self.all_logged, self.micro = [], 0
        self.module = SimpleNamespace(log=self.log, model=tiny_model() if peak else None)
        self.callback.on_train_start(self.trainer, self.module)

    def log(self, name, value, prog_bar=False):
        self.all_logged.append((name, value))

    def of(self, name):
        return [item for item in self.all_logged if item[0] == name]

    @property
    def logged(self):
        return self.of("speed/tokens_per_s")

    @property
    def waits(self):
        return self.of("data/wait_s")

    def batch(self, tokens, seconds, wait=0.0, forest=None):
        self.loader.waited += wait
        batch = SimpleNamespace(forest=forest or SimpleNamespace(num_tokens=tokens))
        self.callback.on_train_batch_start(self.trainer, self.module, batch, self.micro)
        self.clock.now += seconds
        self.micro += 1
        if self.micro % self.accumulate == 0:
            self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, self.module, None, batch, self.micro)


def test_throughput_is_tokens_over_seconds_of_the_steps_between_two_logs(clock):
    run = Run(clock, every_n_steps=2)
    run.batch(100, 1.0)
    assert run.logged == []
    run.batch(50, 2.0)
    run.batch(30, 1.0)
    run.batch(30, 1.0)
    assert run.logged == [("speed/tokens_per_s", 50.0), ("speed/tokens_per_s", 30.0)]


def test_throughput_counts_every_micro_batch_of_a_step(clock):
    run = Run(clock, every_n_steps=1, accumulate=2)
    run.batch(100, 1.0)
    assert run.logged == []
    run.batch(60, 1.0)
    assert run.logged == [("speed/tokens_per_s", 80.0)]


def test_throughput_leaves_validation_out(clock):
    run = Run(clock, every_n_steps=2)
    run.batch(1000, 1.0)
    run.callback.on_validation_start(run.trainer, run.module)
    clock.now += 500.0
    run.batch(40, 1.0)
    run.batch(20, 1.0)
    assert run.logged == [("speed/tokens_per_s", 30.0)]


def test_wait_is_the_mean_over_the_steps_since_the_last_log(clock):
    # A resumed run: the loader begins anew, the steps do not.
    run = Run(clock, every_n_steps=2, accumulate=2, first_step=7)
    for wait in (1.0, 0.5, 0.25, 0.25, 0.5, 0.5, 4.0, 0.0):
        run.batch(10, 1.0, wait)
    assert run.waits == [("data/wait_s", 1.0), ("data/wait_s", 2.5)]


def test_wait_counts_all_steps_around_a_validation(clock):
    run = Run(clock, every_n_steps=2)
    run.batch(10, 1.0, 6.0)
    run.callback.on_validation_start(run.trainer, run.module)
    run.batch(10, 1.0, 0.0)
    run.batch(10, 1.0, 0.0)
    assert run.waits == [("data/wait_s", 2.0)]


def test_mfu_is_the_useful_operations_over_what_the_device_could_do(clock):
    run = Run(clock, every_n_steps=1, accumulate=2, peak=1e6)
    forest = plant([some_trees("sft_backtrack")], pad_id=PAD)
    run.batch(0, 1.5, forest=forest)
    assert run.of("speed/mfu") == []
    run.batch(0, 0.5, forest=forest)
    # tests/callbacks/test_useful_work.py works out operations by hand.
    per_batch = throughput.operation_rates(run.module.model).operations(
        throughput.useful_work(forest)
    )
    ((_, mfu),) = run.of("speed/mfu")
    assert mfu.item() == pytest.approx(2 * per_batch.item() / (2.0 * 1e6))
    run.callback.on_validation_start(run.trainer, run.module)
    clock.now += 100.0
    run.batch(0, 1.0, forest=forest)
    run.batch(0, 1.0, forest=forest)
    assert run.of("speed/mfu")[-1][1].item() == pytest.approx(mfu.item())


def test_mfu_reads_no_tensor(clock):
    class Unread(torch.Tensor):
        """A tensor whose reading would wait for a GPU."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            assert name not in {"item", "tolist", "cpu", "numpy", "nonzero", "unique"}, name
            assert name not in {"__bool__", "__int__", "__float__", "__index__"}, name
            return super().__torch_function__(func, types, args, kwargs or {})

    forest = plant([some_trees("dpo_backtrack")], pad_id=PAD)
    unread = {
        name: value.as_subclass(Unread)
        for name, value in forest._asdict().items()
        if isinstance(value, torch.Tensor)
    }
    run = Run(clock, every_n_steps=1, peak=1e6)
    run.batch(0, 1.0, forest=forest._replace(**unread))
    assert len(run.of("speed/mfu")) == 1


def test_mfu_is_absent_where_the_peak_is_not_known(clock):
    run = Run(clock, every_n_steps=1)
    run.batch(10, 1.0)
    assert run.of("speed/mfu") == []
    assert known_peak(CPU) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA T4", None),
    ],
)
def test_peak_of_a_gpu_is_that_of_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert known_peak(torch.device("cuda")) == peak
    assert len(PEAK_FLOPS_PER_S) == 6


def test_peak_memory_is_that_of_this_process_in_gib(clock):
    held = torch.ones(2**24)  # 64 MiB
    run = Run(clock, every_n_steps=1)
    run.batch(held.numel(), 1.0)
    ((_, peak),) = run.of("memory/peak_gib")
    unit = 2**30 if sys.platform == "darwin" else 2**20
    assert 2**-4 < peak <= 1.01 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    assert peak == pytest.approx(peak_gib(CPU), abs=0.1)
