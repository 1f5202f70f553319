"""Head and loss in one: values and gradients of the naive way, for any chunks and groups."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from backtrack.adapters import add_lora
from backtrack.backbone import backbone_and_head
from backtrack.head_loss import head_loss
from tests.tiny import tiny_model

NUM_EDGES, WIDTH, NUM_WORDS = 23, 8, 31
ENDS = {"edges": list(range(1, NUM_EDGES + 1)), "pairs": [2, 9, 10, 17, 23], "one": [NUM_EDGES]}


@pytest.fixture
def setup():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(NUM_EDGES, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(0, NUM_WORDS, (NUM_EDGES,), generator=generator)
    torch.manual_seed(0)
    return states, targets, nn.Linear(WIDTH, NUM_WORDS)


def loss_of_groups(ends):
    """A loss that is not linear in the log-probs: softplus of minus the sum of each group."""

    def loss(logps, edges):
        bounds = zip([0, *ends], ends, strict=False)
        inside = [(a, b) for a, b in bounds if edges.start <= a and b <= edges.stop]
        assert sum(b - a for a, b in inside) == len(logps)  # whole groups, each once
        shifted = [logps[a - edges.start : b - edges.start] for a, b in inside]
        return torch.stack([F.softplus(-part.sum() / 3) for part in shifted]).sum()

    return loss


def naive_logps(states, targets, head, softcap):
    logits = head(states)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 1000])
@pytest.mark.parametrize("groups", ENDS)
def test_head_loss_equals_the_naive_loss_and_its_gradients(setup, groups, chunk_size, softcap):
    states, targets, head = setup
    ends, inputs = ENDS[groups], [states, *head.parameters()]
    loss = loss_of_groups(ends)
    expected_logps = naive_logps(states, targets, head, softcap)
    expected = loss(expected_logps, slice(0, NUM_EDGES))
    found, logps = head_loss(
        states, targets, head=head, softcap=softcap, ends=ends, chunk_size=chunk_size, loss=loss
    )
    assert not logps.requires_grad
    assert_close(logps, expected_logps.detach())
    assert_close(found, expected)
    # Scaled, as under accumulation.
    for mine, naive in zip(
        torch.autograd.grad(found * 0.25, inputs),
        torch.autograd.grad(expected * 0.25, inputs),
        strict=True,
    ):
        assert_close(mine, naive, rtol=1e-5, atol=1e-6)


def test_no_chunk_is_larger_than_its_size_and_logits_are_made_once_where_a_group_fits(setup):
    states, targets, head = setup
    seen = []
    plain = head.forward
    head.forward = lambda some: (seen.append(len(some)), plain(some))[1]
    for groups, chunk_size in (("edges", 10), ("pairs", 10), ("one", 10)):
        seen.clear()
        ends = ENDS[groups]
        head_loss(
            states,
            targets,
            head=head,
            softcap=None,
            ends=ends,
            chunk_size=chunk_size,
            loss=loss_of_groups(ends),
        )
        assert max(seen) <= chunk_size
        assert sum(seen) == NUM_EDGES * (2 if groups == "one" else 1)


def test_no_edges_give_a_loss_and_a_gradient_of_zero(setup):
    _, _, head = setup
    states = torch.zeros(0, WIDTH, requires_grad=True)
    found, logps = head_loss(
        states,
        torch.zeros(0, dtype=torch.int64),
        head=head,
        softcap=None,
        ends=[],
        chunk_size=4,
        loss=loss_of_groups([]),
    )
    assert (found.item(), len(logps)) == (0.0, 0)
    found.backward()
    assert_close(head.weight.grad, torch.zeros_like(head.weight))


def test_very_unlikely_targets_keep_their_log_probability():
    # p = e^-200 is no fp32 number.
    states, head = torch.tensor([[1.0]]), nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[200.0], [0.0]])
    _, logps = head_loss(
        states.requires_grad_(),
        torch.tensor([1]),
        head=head,
        softcap=None,
        ends=[1],
        chunk_size=4,
        loss=lambda logps, _: -logps.sum(),
    )
    assert_close(logps, torch.tensor([-200.0]))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_frozen_head_with_a_trained_row_gets_the_gradient_of_the_row_alone(family):
    model = tiny_model(family)
    wrapped = add_lora(
        model, r=2, alpha=4, dropout=0.0, target_modules="all-linear", reset_token_id=259
    )
    head = backbone_and_head(wrapped).head
    trained = [p for p in head.parameters() if p.requires_grad]
    assert [p.shape for p in trained] == [(1, 32)]
    states = torch.randn(5, 32, requires_grad=True)
    targets = torch.tensor([259, 1, 2, 259, 4])
    found, _ = head_loss(
        states,
        targets,
        head=head,
        softcap=None,
        ends=range(1, 6),
        chunk_size=2,
        loss=lambda logps, _: -logps.sum(),
    )
    expected = -naive_logps(states, targets, head, None).sum()
    for mine, naive in zip(
        torch.autograd.grad(found, [states, *trained]),
        torch.autograd.grad(expected, [states, *trained]),
        strict=True,
    ):
        assert_close(mine, naive, rtol=1e-5, atol=1e-6)


def test_chunks_of_half_precision_add_up_in_fp32():
    torch.manual_seed(0)
    states = torch.randn(64, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, NUM_WORDS, (64,))
    head = nn.Linear(WIDTH, NUM_WORDS).to(torch.bfloat16)

    def weight_gradient(chunk_size):
        found, _ = head_loss(
            states,
            targets,
            head=head,
            softcap=None,
            ends=range(1, 65),
            chunk_size=chunk_size,
            loss=lambda logps, _: -logps.sum(),
        )
        return torch.autograd.grad(found, head.weight)[0].float()

    whole, parts = weight_gradient(64), weight_gradient(1)
    assert (whole - parts).norm() < 0.005 * whole.norm()  # 64 sums in bf16: about 0.02
