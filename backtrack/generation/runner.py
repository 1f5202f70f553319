"""What runs the model while decoding: rows in slots of one key-value cache, a token a row a step.

A slot holds one text; its tokens stand at columns 0, 1, 2, ... of the cache, so that a column is a
position and no row needs padding on its left. A row that has ended hands its slot on; a row that
branches is copied as far as the branch. Nothing is ever computed again after [RESET].

Shapes: S slots, B slots in use (always the first ones), K key heads, L columns, C channels of a
head, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from backtrack.backbone import backbone_and_head, cache_mask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PREFILL_TOKENS = 4096
"""Tokens, padding included, that one forward reads at most while texts come in."""


class Runner(Protocol):
    """Decodes one token a step for the first slots."""

    def prefill(self, slots: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Read texts into slots; a text may be empty."""
        ...

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read token i at `positions[i]` of slot i; return (B, V) fp32 logits of what follows."""
        ...

    def extend(
        self, slots: Sequence[int], runs: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> Tensor:
        """Read run i from `positions[i]` of `slots[i]` on; return (n, T, V) fp32 logits.

        Entry [i, j] is what follows token j of run i; T is the longest run's length.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of a slot those of another one."""
        ...


@dataclass(slots=True)
class Turn:
    """What the layers of a cache are to do in the present forward.

    Attributes:
        num_slots: S.
        capacity: Columns of every slot.
        slots: (B,) int64, where the rows of the forward are.
        positions: (B, T) int64, columns of the new tokens; None while texts are read from column 0.
        width: Columns that the forward sees.
        is_all: Whether `slots` are the first ones, so that nothing has to be gathered.
    """

    num_slots: int
    capacity: int
    slots: Tensor
    positions: Tensor | None = None
    width: int = 0
    is_all: bool = True


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, (S, K, L, C) each."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, turn: Turn) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._turn = turn

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, of zeros: what is masked must still be finite."""
        turn = self._turn

        def buffer(like: Tensor) -> Tensor:
            return like.new_zeros(turn.num_slots, like.shape[1], turn.capacity, like.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep new keys and values, (B, K, T, C); return those that the queries may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        turn = self._turn
        if turn.positions is None:
            num_tokens = key_states.shape[2]
            self.keys[turn.slots, :, :num_tokens] = key_states
            self.values[turn.slots, :, :num_tokens] = value_states
            return key_states, value_states
        places = (turn.slots[:, None], slice(None), turn.positions)
        self.keys[places] = key_states.transpose(1, 2)
        self.values[places] = value_states.transpose(1, 2)
        rows = slice(len(turn.slots)) if turn.is_all else turn.slots
        return self.keys[rows, :, : turn.width], self.values[rows, :, : turn.width]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first columns of a slot."""
        for buffer in (self.keys, self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what a mask over texts that are being read spans: columns and their offset."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: positions and masks are always given, or begin at column 0."""
        return 0

    def get_max_length(self) -> int:
        """Return L."""
        return self._turn.capacity


class SlotRunner:
    """Runs a model of transformers over slots.

    Args:
        model: Any causal language model that `takes_slots`.
        num_slots: S; rows that decode together at most.
        capacity: Columns of a slot: the longest text and its answer.
        is_static: Whether every step has the same shapes (all slots, all columns), so that a
            compiled forward is made once; worth it on a GPU.
        forward: Called in place of the model for steps, such as a compiled one.
        is_shared: Whether every forward must go by `forward`, see `lockstep`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        capacity: int,
        is_static: bool = False,
        forward: Any = None,
        is_shared: bool = False,
    ) -> None:
        self._model = model
        self._backbone: Any = backbone_and_head(model).backbone
        self._forward = model if forward is None else forward
        self._ahead: Any = model
        if is_shared:
            # The logits of one place each, which nobody reads, so that the head runs everywhere.
            self._backbone = partial(self._forward, logits_to_keep=1)
            self._ahead = self._forward
        self._is_static = is_static
        everything = torch.arange(num_slots, device=model.device)
        self._slots = everything
        self._turn = Turn(num_slots, capacity, everything)
        config: Any = model.config.get_text_config()
        self._layers = [SlotLayer(self._turn) for _ in range(config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))

    def prefill(self, slots: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Read texts into slots, padded on the right; no logits are made."""
        filled = [(slot, text) for slot, text in zip(slots, texts, strict=True) if text]
        device = self._model.device
        while filled:
            size = max(1, PREFILL_TOKENS // max(len(text) for _, text in filled))
            group, filled = filled[:size], filled[size:]
            length = max(len(text) for _, text in group)
            padded = [[*text, *[0] * (length - len(text))] for _, text in group]
            self._turn.slots = torch.tensor([slot for slot, _ in group], device=device)
            self._turn.positions = None
            self._backbone(
                input_ids=torch.tensor(padded, device=device),
                position_ids=torch.arange(length, device=device)[None],
                past_key_values=self._cache,
                use_cache=True,
            )

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read token i at `positions[i]` of slot i; return (B, V) fp32 logits of what follows."""
        count, turn = len(tokens), self._turn
        width = max(positions) + 1
        if self._is_static:
            # Slots that are not in use read some token at column 0, which the next text replaces.
            rest, width = [0] * (turn.num_slots - count), turn.capacity
            tokens, positions = [*tokens, *rest], [*positions, *rest]
        turn.slots, turn.is_all = self._slots[: len(tokens)], True
        logits = self._run(self._forward, [[t] for t in tokens], [[p] for p in positions], width)
        return logits[:count, -1]

    def extend(
        self, slots: Sequence[int], runs: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> Tensor:
        """Read run i from `positions[i]` of `slots[i]` on; return (n, T, V) fp32 logits."""
        length = max(map(len, runs))
        # Short runs repeat their last token at its own place, which writes what stands there.
        tokens = [[*run, *[run[-1]] * (length - len(run))] for run in runs]
        columns = [
            [first + min(i, len(run) - 1) for i in range(length)]
            for first, run in zip(positions, runs, strict=True)
        ]
        self._turn.slots = torch.tensor(slots, device=self._model.device)
        self._turn.is_all = False
        width = max(row[-1] for row in columns) + 1
        return self._run(self._ahead, tokens, columns, width)

    def _run(
        self, forward: Any, tokens: list[list[int]], positions: list[list[int]], width: int
    ) -> Tensor:
        """Return (B, T, V) float32 logits; the slots are in the turn already."""
        turn, device = self._turn, self._model.device
        turn.positions, turn.width = torch.tensor(positions, device=device), width
        output = forward(
            input_ids=torch.tensor(tokens, device=device),
            position_ids=turn.positions,
            attention_mask=cache_mask(self._model.config, turn.positions, width),
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = output.logits.float()
        return logits

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of a slot those of another one."""
        for layer in self._layers:
            if layer.is_initialized:
                layer.copy(source, target, length)


class PlainRunner:
    """Runs a model that keeps no cache of ours: every row whole and alone at each step. Slow."""

    def __init__(self, model: PreTrainedModel, *, num_slots: int, forward: Any = None) -> None:
        self._model = model
        self._forward = model if forward is None else forward
        self._texts: list[list[int]] = [[] for _ in range(num_slots)]

    def prefill(self, slots: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Keep the texts."""
        for slot, text in zip(slots, texts, strict=True):
            self._texts[slot] = list(text)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Add token i to slot i; return (B, V) float32 logits of what follows."""
        rows = []
        for slot, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self._texts[slot] = [*self._texts[slot][:position], token]
            ids = torch.tensor([self._texts[slot]], device=self._model.device)
            rows.append(self._forward(input_ids=ids, use_cache=False).logits[0, -1].float())
        return torch.stack(rows)

    def extend(
        self, slots: Sequence[int], runs: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> Tensor:
        """Read run i from `positions[i]` of `slots[i]` on; return (n, T, V) fp32 logits."""
        rows, length = [], max(map(len, runs))
        for slot, run, position in zip(slots, runs, positions, strict=True):
            self._texts[slot] = [*self._texts[slot][:position], *run]
            ids = torch.tensor([self._texts[slot]], device=self._model.device)
            logits = self._forward(input_ids=ids, use_cache=False).logits[0, position:].float()
            rows.append(torch.nn.functional.pad(logits, (0, 0, 0, length - len(run))))
        return torch.stack(rows)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of a slot those of another one."""
        self._texts[target] = self._texts[source][:length]


def takes_slots(model: PreTrainedModel, forward: Any = None) -> bool:
    """Return whether rows in slots give what they give alone: two short texts tell.

    False for recurrent architectures, for those without positions (ALiBi) and for those that take
    no mask of ours.

    Args:
        model: To decode with.
        forward: By which every forward must go, if any; see `lockstep`.
    """
    tokens, alone_by = list(range(7)), model if forward is None else forward
    try:
        runner = SlotRunner(
            model, num_slots=2, capacity=8, forward=forward, is_shared=forward is not None
        )
        runner.prefill([1, 0], [tokens[:2], tokens[:6]])
        together = runner.step([tokens[6], tokens[2]], [6, 2])
        for row, length in enumerate((7, 3)):
            ids = torch.tensor([tokens[:length]], device=model.device)
            alone = alone_by(input_ids=ids, use_cache=False).logits[0, -1].float()
            tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
            if (together[row] - alone).norm() > tolerance * alone.norm() + 1e-6:
                return False
    except Exception as error:  # whatever an architecture that knows no such cache stumbles over
        log.info("%s decodes without slots (%s)", type(model).__name__, error)
        return False
    return True


def rotates_by_batch(model: PreTrainedModel, capacity: int) -> bool:
    """Return whether a long row would change how the positions of its neighbours are encoded.

    Rotary embeddings of the kinds "longrope" and "dynamic" take their frequencies from the longest
    position of a batch, once it is beyond the length that the model was first trained at.

    Args:
        model: To decode with.
        capacity: Tokens of the longest text and its answer.
    """
    config: Any = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return rope.get("rope_type") in ("longrope", "dynamic") and capacity > first


@contextmanager
def attending_by_sdpa(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that attends by FlexAttention or FlashAttention decode by sdpa or eager.

    Those take no dense mask over a cache, which rows of several lengths need.
    """
    swapped = []
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    other = "sdpa" if getattr(inner, "_supports_sdpa", False) else "eager"
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and ("flex" in name or "flash" in name):
            swapped.append((config, name))
            config._attn_implementation = other
    try:
        yield
    finally:
        for config, name in swapped:
            config._attn_implementation = name
