"""Ranks that decode with shared weights make equally many forwards, whatever each has to say."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from backtrack import lockstep as lockstep_module
from backtrack.generation.engine import HFEngine, Request, Sampling
from backtrack.lockstep import Lockstep
from backtrack.tokens import add_reset_token
from tests.tiny import byte_tokenizer, tiny_model

GREEDY = Sampling(temperature=0, max_new_tokens=5, reset_bias=0, max_resets=1, seed=0)


class Group:
    """Ranks that are threads: an all-reduce waits for all, as torch.distributed's does."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=10)
        self.lock, self.given = threading.Lock(), []

    def is_initialized(self):
        return True

    def all_reduce(self, count):
        with self.lock:
            self.given.append(int(count))
        self.barrier.wait()
        total = sum(self.given)
        self.barrier.wait()
        self.given.clear()
        self.barrier.wait()
        count.fill_(total)


@pytest.mark.parametrize("works", [(0, 0), (3, 0), (2, 5), (1, 1, 4)])
def test_every_rank_makes_as_many_forwards_as_the_busiest(works, monkeypatch):
    monkeypatch.setattr(lockstep_module, "dist", Group(len(works)))
    made = [0] * len(works)

    def rank(number):
        def forward(**_):
            made[number] += 1

        together = Lockstep(forward, torch.device("cpu"), nullcontext)
        for _ in range(works[number]):
            together()
        together.finish()

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert made == [max(works)] * len(works)


def test_every_forward_of_an_engine_is_announced_and_runs_the_head():
    tokenizer = byte_tokenizer()
    add_reset_token(tokenizer, None)
    model = tiny_model()
    counts = SimpleNamespace(layers=0, head=0, announced=0)
    model.model.layers[0].register_forward_hook(
        lambda *_: setattr(counts, "layers", counts.layers + 1)
    )
    model.lm_head.register_forward_hook(lambda *_: setattr(counts, "head", counts.head + 1))

    def forward(**inputs):
        counts.announced += 1
        return model(**inputs)

    requests = [Request([n, n + 1], request_id=str(n), sampling=GREEDY) for n in range(1, 4)]
    plain = HFEngine(model, tokenizer, batch_size=2).generate(requests)
    counts.layers = counts.head = 0
    shared = HFEngine(model, tokenizer, batch_size=2, forward=forward).generate(requests)
    assert [c.visible_ids for c in shared] == [c.visible_ids for c in plain]
    assert counts.layers == counts.head == counts.announced > 0


def test_a_rank_that_failed_within_a_forward_ends_and_does_not_wait(monkeypatch):
    def fail(**_):
        raise MemoryError

    together = Lockstep(fail, torch.device("cpu"), nullcontext)
    with pytest.raises(MemoryError):
        together()
    with pytest.raises(RuntimeError, match="leave the callbacks that decode out"):
        together.finish()
