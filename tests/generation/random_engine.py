"""Engines over random tiny models, and requests whose answers are all different."""

from __future__ import annotations

from dataclasses import replace

import torch

from backtrack.generation.engine import Completion, HFEngine, Request, Sampling
from backtrack.tokens import add_reset_token
from tests.tiny import END_ID, byte_tokenizer, tiny_model

R = 259
NUM_STOPS = 24
"""Special tokens that end an answer in the tests with random models, so that many do end."""


def engine_of(model, batch_size: int = 16):
    """An engine for a model of 320 rows, and what the oracle must know."""
    tokenizer = byte_tokenizer()
    assert add_reset_token(tokenizer, None) == R
    stops = [f"<stop{i}>" for i in range(NUM_STOPS)]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": stops}, replace_extra_special_tokens=False
    )
    assert len(tokenizer) == 260 + NUM_STOPS
    stop_ids = {END_ID, *range(260, 260 + NUM_STOPS)}
    model.generation_config.eos_token_id = sorted(stop_ids)
    known = {"reset_id": R, "stop_ids": stop_ids, "num_tokens": len(tokenizer)}
    return HFEngine(model, tokenizer, batch_size=batch_size), known


def random_engine(family: str = "llama", batch_size: int = 16, seed: int = 0):
    """An engine, its model, and what the oracle must know."""
    model = tiny_model(family, vocab_size=320, seed=seed)
    engine, known = engine_of(model, batch_size)
    # The rows that pad the vocabulary would win every time.
    with torch.no_grad():
        model.get_output_embeddings().weight[known["num_tokens"] :] *= 50
    return engine, model, known


def random_requests(temperature: float, num: int = 6, **changes) -> list[Request]:
    """Prompts of 3 to 18 tokens, longer than the sliding window of the tiny Gemma 2."""
    generator = torch.Generator().manual_seed(3)
    # Resets in about half of the answers of every family: the logits spread by about 0.6.
    sampling = Sampling(
        temperature=temperature, max_new_tokens=14, reset_bias=1.3, max_resets=1, seed=5
    )
    sampling = replace(sampling, **changes)
    lengths = [3 + (7 * i) % 16 for i in range(num)]
    prompts = [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]
    return [
        Request(prompt, prompt[: i % 3], request_id=f"r{i}", sample=i % 2, sampling=sampling)
        for i, prompt in enumerate(prompts)
    ]


def ids_of(completions: list[Completion]) -> list[tuple]:
    return [(c.visible_ids, c.discarded, c.finish_reason, c.num_generated) for c in completions]
