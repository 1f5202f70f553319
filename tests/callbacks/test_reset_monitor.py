"""The monitor says what the model says, and leaves no trace."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from backtrack.callbacks.reset_monitor import ResetMonitor, reset_logps
from tests.modules.builders import PAD, RESET, sft_module, some_examples
from tests.tiny import tiny_model
from tests.tiny_runs import random_states

PREFIX = 3


def data_of(examples, layout="forest", max_tokens=64):
    settings = SimpleNamespace(max_tokens=max_tokens, layout=layout, pad_id=PAD)
    return SimpleNamespace(settings=settings, validation=examples)


def naive_logp(model, example, response, prefix_tokens=PREFIX):
    """log p([RESET] | prompt, first tokens of the response but never its last one)."""
    prefix = response[: min(prefix_tokens, len(response) - 1)]
    ids = [i for turn in example.turns for i in turn.ids] + list(prefix)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return logits.log_softmax(-1)[RESET].item()


@pytest.mark.parametrize("layout", ["forest", "paths"])
@pytest.mark.parametrize("max_tokens", [48, 400])
def test_reset_logps_are_those_of_separate_sequences(layout, max_tokens):
    model = tiny_model()
    examples = [e for e in some_examples(8) if e.is_harmful]
    found = reset_logps(
        sft_module(model),
        examples,
        prefix_tokens=PREFIX,
        data=data_of(examples, layout, max_tokens),
    )
    wanted = [[naive_logp(model, e, e.unsafe), naive_logp(model, e, e.safe)] for e in examples]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=0)


class Logger:
    def __init__(self):
        self.logged = []

    def log_metrics(self, figures, step):
        self.logged.append((step, figures))


class Precision:
    """A plugin that counts the forwards under it."""

    def __init__(self):
        self.entered = 0

    @contextmanager
    def forward_context(self):
        self.entered += 1
        yield


def trainer_of(examples):
    return SimpleNamespace(
        datamodule=data_of(examples),
        loggers=[Logger()],
        callback_metrics={},
        precision_plugin=Precision(),
        global_step=7,
        sanity_checking=False,
        should_stop=False,
        is_global_zero=True,
    )


def test_monitor_leaves_modes_gradients_and_random_state_alone():
    module = sft_module(tiny_model()).train()
    module.model.lm_head.eval()  # one that differs from the others
    before = random_states()
    trainer = trainer_of(some_examples(4))
    ResetMonitor(prefix_tokens=[PREFIX], max_examples=2).on_validation_end(trainer, module)
    assert random_states() == before
    assert [part for part in module.modules() if not part.training] == [module.model.lm_head]
    assert all(p.grad is None for p in module.parameters())


def test_monitor_logs_means_gap_and_auc_of_harmful_examples_after_the_longest_prefix():
    module = sft_module(tiny_model())
    examples = some_examples(6)
    trainer = trainer_of(examples)
    monitor = ResetMonitor(prefix_tokens=[PREFIX, 1], max_examples=2)
    monitor.on_train_start(trainer, module)
    (step, figures), *rest = trainer.loggers[0].logged
    assert (step, rest) == (7, [])
    asked = [e for e in examples if e.is_harmful][:2]
    pairs = [
        (naive_logp(module.model, e, e.unsafe), naive_logp(module.model, e, e.safe)) for e in asked
    ]
    unsafe, safe = zip(*pairs, strict=True)
    assert figures["reset/logp_after_unsafe"] == pytest.approx(sum(unsafe) / 2, abs=1e-5)
    assert figures["reset/logp_after_safe"] == pytest.approx(sum(safe) / 2, abs=1e-5)
    assert figures["reset/gap"] == pytest.approx((sum(unsafe) - sum(safe)) / 2, abs=1e-5)
    wins = sum(u > s for u in unsafe for s in safe)
    assert figures["reset/auc"] == pytest.approx(wins / 4)
    assert trainer.callback_metrics["reset/auc"].item() == figures["reset/auc"]
    assert trainer.precision_plugin.entered == 2  # once a length, as training computes


def test_monitor_logs_mean_probabilities_after_prefixes_of_each_length():
    module = sft_module(tiny_model())
    trainer = trainer_of(some_examples(6))
    ResetMonitor(prefix_tokens=[4, 1], max_examples=3).on_train_start(trainer, module)
    (_, figures), *_ = trainer.loggers[0].logged
    asked = [e for e in trainer.datamodule.validation if e.is_harmful]
    assert len(asked) == 3
    for length in (1, 4):
        for side in ("unsafe", "safe"):
            logps = [naive_logp(module.model, e, getattr(e, side), length) for e in asked]
            wanted = sum(math.exp(logp) for logp in logps) / 3
            found = figures[f"reset/probability_after_{side}/tokens={length}"]
            assert found == pytest.approx(wanted, rel=1e-4), (side, length)
    assert "reset/probability" not in figures  # which the module logs at every step


@pytest.mark.parametrize("prefix_tokens", [[], [0, 5]])
def test_monitor_without_prefix_lengths_is_refused(prefix_tokens):
    with pytest.raises(ValueError, match=r"reset_monitor\.prefix_tokens: .* expected one or more"):
        ResetMonitor(prefix_tokens=prefix_tokens, max_examples=2)
    with pytest.raises(ValueError, match=r"reset_monitor\.max_examples: 0 is not allowed"):
        ResetMonitor(prefix_tokens=[1], max_examples=0)


def test_monitor_without_harmful_examples_is_silent():
    trainer = trainer_of([e for e in some_examples(6) if not e.is_harmful])
    ResetMonitor(prefix_tokens=[PREFIX], max_examples=2).on_train_start(trainer, None)
    assert trainer.loggers[0].logged == []


def test_monitor_ends_a_run_once():
    module = sft_module(tiny_model())
    trainer = trainer_of(some_examples(4))
    monitor = ResetMonitor(prefix_tokens=[PREFIX], max_examples=2)
    monitor.on_validation_end(trainer, module)
    monitor.on_train_end(trainer, module)
    assert len(trainer.loggers[0].logged) == 1
    trainer.global_step = 9
    monitor.on_train_end(trainer, module)
    assert [step for step, _ in trainer.loggers[0].logged] == [7, 9]
    trainer.global_step, trainer.should_stop = 10, True
    monitor.on_train_end(trainer, module)
    assert len(trainer.loggers[0].logged) == 2
