"""One side of a comparison: the fastest plain training loop we could write, with no tree in it.

Run by `train_vs_peer.py`; prints its `Outcome` as the last line. Every sequence is an ordinary one
and passes the model whole. A step's sequences (pairs, in DPO) are sorted by length and cut into
micro-batches, each padded to its own longest on the right, so that causal attention needs no mask;
each is sent backward at once, so that one micro-batch of activations is all there is. Only states
that predict a supervised token pass the head; all tokens of both answers are, as in every trainer
of DPO. The head keeps one buffer of logits, which turns into probabilities and then into their
gradient. AdamW is fused. Reference log-probs come from one pass by the same code beforehand.

Tried, on one core (AVX2, fp32, HH-RLHF, small model), in CPU time over that of what was kept, at
equal loss; the noise is about 0.05:

* DPO, cutting a step, with `F.cross_entropy`, over micro-batches of two pairs: one forward of all
  sequences 1.35; one graph over buckets of 8, 4, 2 sequences 1.07, 0.98, 0.97 (at 1.4 times the
  memory); micro-batches of 4 and 1 pairs 1.01, 1.08; one sequence a forward, no padding 1.4.
* DPO, the head: gather - logsumexp 1.02 and 128 states at a time 1.08, with checkpointing 1.20, all
  over `F.cross_entropy`, which takes 1.08 of the head in place. With that one: buckets of 4 and 2
  in one graph 1.04, 1.15; one pair 1.19; one head after all buckets 1.04, 256 states a time 0.99.
* SFT, over micro-batches of 4 with the head in place: 8, 2, 1 sequences 1.19, 1.05, 1.29; with
  `F.cross_entropy` 8, 4, 2, 1 sequences 1.39, 1.28, 1.09, 1.15; `F.linear_cross_entropy` without
  options 1.12, with its own choice of chunks 3.9, with chunks of 128 states 0.99.
* `torch.set_flush_denormal` 1.00. `torch.compile` of the layers with dynamic shapes 0.9 after 75
  seconds of compiling; left out on both sides.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup
from work import (
    PAD_ID,
    SETTINGS,
    Outcome,
    Sequence,
    TokenCounter,
    Triple,
    dpo_pairs,
    load_model,
    no_progress_bars,
    peak_rss_mib,
    read_triples,
    sft_sequences,
    side_arguments,
    steps_of,
)

from backtrack.cpu import tune_for_training

Pair = tuple[Sequence, Sequence]

MICRO = 4
"""Sequences of a micro-batch."""


class TargetLogps(torch.autograd.Function):
    """Log-probs of targets, (N,); the buffer of logits holds probabilities until backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return log softmax(states weight^T)[targets]."""
        values = states @ weight.t()
        chosen = values.gather(-1, targets[:, None])
        top = values.amax(-1, keepdim=True)
        torch.softmax(values, -1, out=values)
        ctx.save_for_backward(states, weight, targets)
        ctx.values = values
        return (chosen - top + values.amax(-1, keepdim=True).log_()).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return slope * (one-hot - probabilities), through the product."""
        states, weight, targets = ctx.saved_tensors
        values, ctx.values = ctx.values, None
        values.mul_(-slope[:, None])
        values[torch.arange(len(targets)), targets] += slope
        return values @ weight, values.t() @ states, None


def length(sequence: Sequence) -> int:
    """Return its tokens."""
    return len(sequence.given) + len(sequence.wanted)


def sequence_logps(model: PreTrainedModel, sequences: list[Sequence]) -> Tensor:
    """Return log p(wanted | given) of each sequence, (len(sequences),), from one forward pass."""
    width = max(map(length, sequences))
    input_ids = torch.full((len(sequences), width), PAD_ID)
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, (given, wanted) in enumerate(sequences):
        input_ids[row, : len(given) + len(wanted)] = torch.tensor(given + wanted)
        first = row * width + len(given) - 1
        predictors += range(first, first + len(wanted))
        targets += wanted
        owners += [row] * len(wanted)
    states = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    logps = cast(
        "Tensor",
        TargetLogps.apply(
            states.flatten(0, 1)[torch.tensor(predictors)],
            model.lm_head.weight,
            torch.tensor(targets),
        ),
    )
    return logps.new_zeros(len(sequences)).index_add(0, torch.tensor(owners), logps)


def by_length(pairs: list[Pair]) -> list[int]:
    """Return the numbers of pairs, longest first."""
    return sorted(range(len(pairs)), key=lambda i: -max(map(length, pairs[i])))


def gaps_of(model: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    """Return log p(chosen) - log p(rejected) of each pair: (len(pairs),)."""
    logps = sequence_logps(model, [side[i] for i in (0, 1) for side in pairs])
    chosen, rejected = logps.chunk(2)
    return chosen - rejected


def reference_gaps(model: PreTrainedModel, triples: list[Triple], size: int) -> Tensor:
    """Return the reference's gap of each pair of `triples`, (pairs,)."""
    pairs = [pair for triple in triples for pair in dpo_pairs(triple)]
    gaps, order = torch.zeros(len(pairs)), by_length(pairs)
    with torch.no_grad():
        for first in range(0, len(order), size):
            mine = order[first : first + size]
            gaps[mine] = gaps_of(model, [pairs[i] for i in mine])
    return gaps


def dpo_step(
    model: PreTrainedModel, triples: list[Triple], reference: Tensor, size: int
) -> tuple[float, float]:
    """Add the gradient of a step; return its loss and mean gap.

    Args:
        model: The policy.
        triples: Of the step.
        reference: (pairs,) gaps of the reference.
        size: Sequences of a micro-batch.
    """
    pairs = [pair for triple in triples for pair in dpo_pairs(triple)]
    order, loss, total = by_length(pairs), 0.0, 0.0
    for first in range(0, len(order), max(1, size // 2)):
        mine = order[first : first + max(1, size // 2)]
        gaps = gaps_of(model, [pairs[i] for i in mine])
        part = -F.logsigmoid(SETTINGS["beta"] * (gaps - reference[mine])).sum() / len(pairs)
        part.backward()
        loss, total = loss + part.item(), total + gaps.sum().item()
    return loss, total / len(pairs)


def sft_step(
    model: PreTrainedModel, triples: list[Triple], _: Tensor, size: int
) -> tuple[float, float]:
    """Add the gradient of a step; return its loss, the mean over supervised tokens, and 0."""
    sequences = [sequence for triple in triples for sequence in sft_sequences(triple)]
    sequences.sort(key=length, reverse=True)
    count, loss = sum(len(sequence.wanted) for sequence in sequences), 0.0
    for first in range(0, len(sequences), size):
        part = -sequence_logps(model, sequences[first : first + size]).sum() / count
        part.backward()
        loss += part.item()
    return loss, 0.0


STEPS: dict[str, Callable[..., tuple[float, float]]] = {"sft": sft_step, "dpo": dpo_step}


def train(
    model: PreTrainedModel, triples: list[Triple], objective: str, reference: Tensor, size: int
) -> Iterator[tuple[float, float]]:
    """Train one epoch; yield loss and mean gap of each step."""
    steps = steps_of(triples)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=SETTINGS["learning_rate"],
        betas=tuple(SETTINGS["betas"]),
        eps=SETTINGS["eps"],
        weight_decay=SETTINGS["weight_decay"],
        fused=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(steps))
    done = 0
    for own in steps:
        mine = reference[done : done + 2 * len(own)]
        done += 2 * len(own)
        yield STEPS[objective](model, own, mine, size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


def main() -> None:
    """Train and print the outcome."""
    parser = side_arguments(__doc__)
    parser.add_argument("--micro", type=int, default=MICRO, help="sequences of a micro-batch")
    parser.add_argument("--untuned", action="store_true", help="leave the allocator as it is")
    args = parser.parse_args()
    no_progress_bars()
    if not args.untuned:
        tune_for_training()
    triples, model = read_triples(args.triples, args.limit), load_model(args.model)
    start = time.perf_counter()
    is_dpo = args.objective == "dpo"
    reference = reference_gaps(model, triples, args.micro) if is_dpo else torch.zeros(0)
    reference_seconds = time.perf_counter() - start if is_dpo else 0.0
    counter = TokenCounter(model)
    start = time.perf_counter()
    steps = list(train(model, triples, args.objective, reference, args.micro))
    seconds = time.perf_counter() - start
    outcome = Outcome(
        seconds=seconds,
        reference_seconds=reference_seconds,
        tokens=counter.tokens,
        losses=[loss for loss, _ in steps],
        gaps=[gap for _, gap in steps] if is_dpo else [],
        peak_rss_mib=peak_rss_mib(),
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
