"""A model that says what its script says, and runs itself."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

TAKEN_ABACK = 0  # what it says off script


class ScriptedModel(nn.Module):
    """Looks a row's text up in `script` and prefers, in this order, what stands there.

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

    def prefill(self, slots, texts):
        for slot, text in zip(slots, texts, strict=True):
            self.slots[slot] = tuple(text)
            self.read.append(tuple(text))

    def step(self, tokens, positions):
        logits = torch.zeros(len(tokens), self.num_words)
        for slot, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            assert len(self.slots.get(slot, ())) >= position
            self.slots[slot] = (*self.slots.get(slot, ())[:position], token)
            for rank, choice in enumerate(self.script.get(self.slots[slot], (TAKEN_ABACK,))):
                logits[slot, choice] = 10.0 - rank
        self.texts.append([self.slots[slot] for slot in range(len(tokens))])
        return logits

    def copy(self, source, target, length):
        assert len(self.slots[source]) >= length
        self.slots[target] = self.slots[source][:length]


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
