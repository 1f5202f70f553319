"""Selected, chunked log-probs against the full softmax, gradients and memory shape included."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from backtrack.logps import edge_logps, path_logps, target_logps

NUM_EDGES = 11


@pytest.fixture
def setup():
    """Hidden states (2, 6, 8) of which some predict twice, a head with a bias, 13 words."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 8, generator=generator).requires_grad_()
    head = nn.Linear(8, 13)
    predictors = torch.tensor([0, 1, 1, 3, 4, 4, 4, 6, 7, 10, 11])
    targets = torch.randint(0, 13, (NUM_EDGES,), generator=generator)
    return hidden, head, predictors, targets


def compute(setup, *, softcap, chunk_size):
    hidden, head, predictors, targets = setup
    return edge_logps(
        hidden.flatten(0, 1)[predictors],
        targets,
        head=head,
        softcap=softcap,
        chunk_size=chunk_size,
    )


def expected_logps(setup, softcap):
    hidden, head, predictors, targets = setup
    logits = head(hidden)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    full = logits.log_softmax(-1).reshape(-1, 13)
    return torch.stack([full[p, t] for p, t in zip(predictors, targets, strict=True)])


def gradients(loss, setup):
    hidden, head, _, _ = setup
    return torch.autograd.grad(loss, [hidden, head.weight, head.bias])


def test_target_logps_has_the_values_worked_by_hand():
    # softmax of 0, log 3 is 1/4, 3/4.
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    logps = target_logps(logits, torch.tensor([0, 1]), softcap=None)
    assert_close(logps, torch.tensor([math.log(1 / 4), math.log(3 / 4)]))


def test_target_logps_caps_before_the_softmax():
    # cap 1: tanh(100) = 1 and tanh(0) = 0, so p = e / (e + 1) instead of 1.
    logps = target_logps(torch.tensor([[100.0, 0.0]]), torch.tensor([0]), softcap=1.0)
    assert_close(logps, torch.tensor([1 - math.log(math.e + 1)]))


def test_target_logps_are_fp32_whatever_the_logits():
    logits = torch.tensor([[200.0, 199.0]], dtype=torch.bfloat16)
    logps = target_logps(logits, torch.tensor([0]), softcap=None)
    assert logps.dtype == torch.float32
    assert_close(logps, torch.tensor([-math.log(1 + math.exp(-1))]))


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 4, 10, 11, 1000])
def test_chunked_head_equals_unchunked_with_gradients(setup, softcap, chunk_size):
    expected = expected_logps(setup, softcap)
    logps = compute(setup, softcap=softcap, chunk_size=chunk_size)
    assert_close(logps, expected)
    weights = torch.linspace(-1, 2, NUM_EDGES)
    wanted = gradients((expected * weights).sum(), setup)
    for found, right in zip(gradients((logps * weights).sum(), setup), wanted, strict=True):
        assert_close(found, right)


def test_chunked_head_equals_unchunked_without_gradients(setup):
    with torch.no_grad():
        logps = compute(setup, softcap=None, chunk_size=3)
    assert_close(logps, expected_logps(setup, None).detach())


def test_head_sees_at_most_a_chunk_of_predictors_at_a_time(setup):
    hidden, head, predictors, targets = setup
    seen = []

    def spy(states):
        seen.append(tuple(states.shape))
        return head(states)

    states = hidden.flatten(0, 1)[predictors]
    edge_logps(states, targets, head=spy, softcap=None, chunk_size=4)
    assert seen == [(4, 8), (4, 8), (3, 8)]  # 11 edges, never the 12 tokens


def test_no_edges_give_no_logps_but_a_gradient_of_zero(setup):
    hidden, head, _, _ = setup
    none = torch.zeros(0, dtype=torch.int64)
    logps = edge_logps(hidden.flatten(0, 1)[none], none, head=head, softcap=None, chunk_size=4)
    assert logps.shape == (0,)
    for gradient in gradients(path_logps(logps, none, 2).sum(), setup):
        assert_close(gradient, torch.zeros_like(gradient))


def test_path_logps_sums_the_edges_of_each_path():
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    paths = torch.tensor([2, 0, 2, 0])
    assert_close(path_logps(logps, paths, 4), torch.tensor([-10.0, 0.0, -5.0, 0.0]))
