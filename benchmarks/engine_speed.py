"""The engine against `model.generate` with padding, same model, same greedy tokens.

    python benchmarks/engine_speed.py --model DIR --prompts FILE [--num 256] [--max-new-tokens 128]
        [--engine-batches 16 32 64] [--generate-batches 8 16 32 64] [--trial 64] [--repeats 2]

FILE is JSON lines or a JSON list with `prompt` or `instruction` (and `input`). The model gets a row
for [RESET] where it has none; [RESET] is banned. `generate` takes the prompts sorted by length, so
that batches are padded little, on the left, and each batch runs until its last answer has ended.
Each side's batch size is the one that was fastest on the first `--trial` prompts; then both decode
all prompts, in turn, `--repeats` times. Tokens are those generated, end of turn included, padding
not. Answers that differ are allowed only where the engine's closest choice fell by less than 1e-4
logits (`num_close`). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backtrack.config import compose_config
from backtrack.cpu import tune_for_training
from backtrack.data.template import encode_prompt
from backtrack.generation.engine import HFEngine, Request, Sampling
from backtrack.model_spec import ModelSpec
from backtrack.models import load_model, load_tokenizer

Answers = list[tuple[int, ...]]
CLOSE = 1e-4


def read_prompts(file: Path, count: int) -> list[str]:
    """Return the first prompts of a file."""
    text = file.read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
    found = []
    for row in rows:
        words = row.get("prompt") or "\n".join([row["instruction"], row.get("input", "")])
        found.append(words.strip())
    return found[:count]


def by_engine(
    engine: HFEngine, prompts: Sequence[Sequence[int]], budget: int
) -> tuple[float, Answers, list[float]]:
    """Return seconds, the ids of each answer without its end, and each closest choice."""
    sampling = Sampling(
        temperature=0.0, max_new_tokens=budget, reset_bias=0.0, max_resets=0, seed=0
    )
    start = time.perf_counter()
    done = engine.generate([Request(prompt, sampling=sampling) for prompt in prompts])
    seconds = time.perf_counter() - start
    return seconds, [c.visible_ids for c in done], [c.closest_choice for c in done]


@torch.no_grad()
def by_generate(
    model: Any, prompts: Sequence[Sequence[int]], budget: int, *, batch: int, ends: set[int]
) -> tuple[float, Answers]:
    """Return seconds and the ids of each answer without its end."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, tuple[int, ...]] = {}
    pad = min(ends)
    start = time.perf_counter()
    for first in range(0, len(order), batch):
        mine = order[first : first + batch]
        width = max(len(prompts[i]) for i in mine)
        padded = [[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in mine]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in mine]
        output = model.generate(
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=budget,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
        )
        for i, row in zip(mine, output[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(row) if token in ends), len(row))
            answers[i] = tuple(row[:end])
    return time.perf_counter() - start, [answers[i] for i in range(len(prompts))]


def count(answers: Answers, budget: int) -> int:
    """Return generated tokens; an answer below the budget ended with a token of its own."""
    return sum(min(len(answer) + 1, budget) for answer in answers)


def main() -> None:
    """Print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--engine-batches", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--generate-batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--trial", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    spec = ModelSpec(
        **compose_config(
            "train", ["model=smollm2", "model.lora=null", f"model.path={args.model}"]
        ).model
    )
    tokenizer = load_tokenizer(spec)
    model = load_model(spec, tokenizer, seed=0).eval()
    tune_for_training()  # the allocator's settings, for both
    texts = read_prompts(args.prompts, args.num)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": t}]) for t in texts]
    budget = args.max_new_tokens
    engines = {size: HFEngine(model, tokenizer, batch_size=size) for size in args.engine_batches}
    ends = next(iter(engines.values())).stop_ids
    stride = max(1, len(prompts) // args.trial)
    trial = prompts[::stride]
    tried = {size: by_engine(engine, trial, budget)[0] for size, engine in engines.items()}
    other = {
        size: by_generate(model, trial, budget, batch=size, ends=ends)[0]
        for size in args.generate_batches
    }
    best, peer = min(tried, key=tried.__getitem__), min(other, key=other.__getitem__)
    ratios, ours, theirs = [], [], []
    for _ in range(args.repeats):
        seconds, answers, closest = by_engine(engines[best], prompts, budget)
        spent, expected = by_generate(model, prompts, budget, batch=peer, ends=ends)
        ours.append(count(answers, budget) / seconds)
        theirs.append(count(expected, budget) / spent)
        ratios.append(ours[-1] / theirs[-1])
    different = [i for i, (a, b) in enumerate(zip(answers, expected, strict=True)) if a != b]
    result = {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "equal": all(closest[i] < CLOSE for i in different),
        "num_different": len(different),
        "num_close": sum(value < CLOSE for value in closest),
        "tokens_per_s_engine": round(statistics.median(ours), 1),
        "tokens_per_s_generate": round(statistics.median(theirs), 1),
        "tokens": count(answers, budget),
        "batch_engine": best,
        "batch_generate": peer,
        "trial_seconds": {"engine": tried, "generate": other},
        "prompts": len(prompts),
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
