"""Tokens per second count this rank's tokens and leave validation out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from backtrack.callbacks import throughput
from backtrack.callbacks.throughput import Throughput


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

    def __init__(self, clock, every_n_steps, accumulate=1, first_step=0):
        self.clock, self.accumulate = clock, accumulate
        self.callback = Throughput(every_n_steps=every_n_steps)
        self.loader = SimpleNamespace(waited=0.0)
        self.trainer = SimpleNamespace(global_step=first_step, train_dataloader=self.loader)
        self.logged, self.waits, self.micro = [], [], 0
        self.module = SimpleNamespace(log=self.log)
        self.callback.on_train_start(self.trainer, self.module)

    def log(self, name, value, prog_bar=False):
        (self.waits if name == "data/wait_s" else self.logged).append((name, value))

    def batch(self, tokens, seconds, wait=0.0):
        self.loader.waited += wait
        batch = SimpleNamespace(forest=SimpleNamespace(num_tokens=tokens))
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
