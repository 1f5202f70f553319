"""A model that says what its script says, and runs itself."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import torch
from torch import nn

from backtrack.generation.engine import HFEngine, Request, Sampling
from backtrack.tokens import add_reset_token
from tests.tiny import END_ID, byte_tokenizer

GREEDY = Sampling(temperature=0, max_new_tokens=12, reset_bias=0, max_resets=1, seed=0)
A, B, C, D = (byte_tokenizer().convert_tokens_to_ids(letter) for letter in "abcd")
E = END_ID
R = 259
TAKEN_ABACK = 0  # what it says off script


class ScriptedModel(nn.Module):
    """Looks a row's text up in `script` and prefers, in this order, what stands there.

    Logits are 10 for the favourite, 9 for the next, and so on; 0 for what the script does not name.

    A `Runner` too: its slots keep texts where a cache keeps keys and values.

    Args:
        script: Text so far -> next tokens, the favourite first.
        num_words: Rows of its vocabulary.
        max_length: Tokens its context holds.
    """

    def __init__(
        self,
        script: dict[tuple[int, ...], tuple[int, ...]],
        *,
        num_words: int,
        max_length: int = 100,
    ) -> None:
        super().__init__()
        self.script = script
        self.num_words = num_words
        self.config = SimpleNamespace(vocab_size=num_words, max_position_embeddings=max_length)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.device = torch.device("cpu")
        self.slots: dict[int, tuple[int, ...]] = {}
        self.read: list[tuple[int, ...]] = []  # texts that were prefilled
        self.texts: list[list[tuple[int, ...]]] = []  # of each step
        self.extended: list[tuple[int, ...]] = []  # texts read ahead from drafts
        self.copies: list[tuple[int, int, int]] = []

    def say(self, text: tuple[int, ...]) -> torch.Tensor:
        """(V,) logits of what follows a text."""
        logits = torch.zeros(self.num_words)
        for rank, choice in enumerate(self.script.get(text, (TAKEN_ABACK,))):
            logits[choice] = 10.0 - rank
        return logits

    def prefill(self, slots, texts):
        for slot, text in zip(slots, texts, strict=True):
            self.slots[slot] = tuple(text)
            self.read.append(tuple(text))

    def step(self, tokens, positions):
        for slot, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            assert len(self.slots.get(slot, ())) >= position
            self.slots[slot] = (*self.slots.get(slot, ())[:position], token)
        self.texts.append([self.slots[slot] for slot in range(len(tokens))])
        return torch.stack([self.say(text) for text in self.texts[-1]])

    def extend(self, slots, runs, positions):
        logits = torch.zeros(len(runs), max(map(len, runs)), self.num_words)
        for row, (slot, run, position) in enumerate(zip(slots, runs, positions, strict=True)):
            assert len(self.slots[slot]) >= position
            for place, token in enumerate(run):
                text = (*self.slots[slot][: position + place], token)
                self.slots[slot] = text
                self.extended.append(text)
                logits[row, place] = self.say(text)
        return logits

    def copy(self, source, target, length):
        assert len(self.slots[source]) >= length
        self.slots[target] = self.slots[source][:length]
        self.copies.append((source, target, length))


class BabblingModel(ScriptedModel):
    """Says a, b, c, d, [RESET] or the end, with random logits that follow from the text alone.

    Exactly so: what it says in one batch is to the last bit what it says in another.

    Args:
        seed: Of what it says.
        forgets: Whether [RESET] makes it forget what it said since the first token, so that it is
            likely to say it again, as drafts hope.
    """

    def __init__(self, seed: int, *, forgets: bool = False, max_length: int = 100) -> None:
        super().__init__({}, num_words=260, max_length=max_length)
        self.seed, self.forgets = seed, forgets

    def say(self, text: tuple[int, ...]) -> torch.Tensor:
        if self.forgets and R in text:
            text = (text[0], *text[len(text) - text[::-1].index(R) :])
        dice = random.Random(f"{self.seed} {text}")
        logits = torch.full((self.num_words,), -30.0)
        for token in (A, B, C, D, R, E):
            logits[token] = dice.uniform(0, 4)
        return logits


def make_script(*dialogues):
    """Script of (prompt, answer) pairs; a tuple within an answer is a list of preferences.

    The answer goes on from the favourite; write alternatives as dialogues of their own.
    """
    script: dict[tuple[int, ...], tuple[int, ...]] = {}
    for prompt, answer in dialogues:
        text = tuple(prompt)
        for choice in answer:
            script[text] = choice if isinstance(choice, tuple) else (choice,)
            text = (*text, script[text][0])
    return script


def tokenizer_with_reset():
    tokenizer = byte_tokenizer()
    assert add_reset_token(tokenizer, None) == R
    return tokenizer


@cache
def shared_tokenizer():
    return tokenizer_with_reset()


def scripted(*dialogues, batch_size: int = 8, **options) -> tuple[HFEngine, ScriptedModel]:
    """An engine that decodes by the script of `dialogues`, and its model."""
    model = ScriptedModel(make_script(*dialogues), num_words=260, **options)
    return run_by_itself(model, batch_size), model


def run_by_itself(model: ScriptedModel, batch_size: int) -> HFEngine:
    """An engine whose model is its runner."""
    engine = HFEngine(model, shared_tokenizer(), batch_size=batch_size)
    engine._make_runner = lambda capacity, num_slots: model
    return engine


def requests_at(*biases: float, prompt=(1,), **changes) -> list[Request]:
    return [
        Request(prompt, sampling=replace(GREEDY, reset_bias=bias, **changes)) for bias in biases
    ]
