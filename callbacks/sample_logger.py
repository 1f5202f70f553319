"""What the model answers now: prompts, what was taken back, what a reader sees, in TensorBoard."""

from __future__ import annotations

import logging
import re
import string
import traceback
import unicodedata
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision

from backtrack.callbacks.decoding import engine_of, lockstep_of
from backtrack.generation.types import Request, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from transformers import PreTrainedTokenizerBase

    from backtrack.data.module import ForestData
    from backtrack.data.types import EncodedExample
    from backtrack.generation.types import Completion
    from backtrack.lockstep import Lockstep
    from backtrack.modules.base import ForestModule

log = logging.getLogger(__name__)

STRIKE = "\N{COMBINING LONG STROKE OVERLAY}"
"""TensorBoard's Markdown has no ~~ and its HTML no <del>; this strikes the character before it."""

_ENTITIES = {ord(sign): f"&#{ord(sign)};" for sign in string.punctuation if sign not in ",;?'\""}
_BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


class SampleLogger(pl.Callback):
    """Logs greedy answers to a few validation prompts, harmful ones first, as TensorBoard text.

    Before the first step, every N steps and at the end. Tags are `samples/<number>`. Rank zero
    decodes on its own. An error makes a warning and a gap; what the model said is in no message.
    """

    def __init__(
        self,
        *,
        every_n_steps: int,
        num_prompts: int,
        reset_bias: float,
        max_resets: int,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        """Log `num_prompts` answers once in `every_n_steps` optimiser steps.

        Args:
            every_n_steps: Optimiser steps between two logs.
            num_prompts: Of the validation set.
            reset_bias: See `Sampling`.
            max_resets: See `Sampling`.
            max_new_tokens: See `Sampling`.
            batch_size: Prompts that decode together.

        Raises:
            ValueError: If a value is out of range.
        """
        for name, value in (("every_n_steps", every_n_steps), ("num_prompts", num_prompts)):
            if value < 1:
                raise ValueError(
                    f"callbacks.sample_logger.{name}: {value} is not allowed; expected a whole "
                    "number from 1, or ~callbacks.sample_logger"
                )
        self.every_n_steps, self.num_prompts = every_n_steps, num_prompts
        self.batch_size = batch_size
        self.sampling = Sampling(
            temperature=0,
            max_new_tokens=max_new_tokens,
            reset_bias=reset_bias,
            max_resets=max_resets,
            seed=0,
        )
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Log what the model says as it comes; a resumed run has done so."""
        if trainer.global_step == 0:
            self._log(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: ForestModule,  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log after the last micro-batch of every N-th step."""
        is_step_end = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step_end and trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: ForestModule) -> None:  # type: ignore[override]
        """Log what was trained, unless that was just done or Ctrl-C ends the run."""
        if not trainer.should_stop:
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, module: ForestModule) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        is_due = trainer.global_step != self._last_step
        if not (boards and is_due):
            return
        self._last_step = trainer.global_step
        lockstep = lockstep_of(module)
        try:
            if trainer.is_global_zero:
                self._show(boards, trainer, module, lockstep)
        finally:
            if lockstep is not None:  # the other ranks lend their weights
                is_mixed = isinstance(trainer.precision_plugin, MixedPrecision)
                with trainer.precision_plugin.forward_context() if is_mixed else nullcontext():
                    lockstep.finish()

    def _show(
        self,
        boards: Sequence[TensorBoardLogger],
        trainer: pl.Trainer,
        module: ForestModule,
        lockstep: Lockstep | None,
    ) -> None:
        """Decode and log, whatever happens."""
        try:
            texts = self._samples(trainer, module, lockstep)
            for board in boards:
                for number, text in enumerate(texts):
                    board.experiment.add_text(f"samples/{number}", text, trainer.global_step)
        except Exception as error:  # whatever fails: training goes on
            # Not the message, which may quote what the model said.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            log.warning(
                "sample_logger: no samples at step %d: %s in %s (%s, line %d)",
                trainer.global_step,
                type(error).__name__,
                frame.name,
                Path(frame.filename).name,
                frame.lineno or 0,
            )

    def _samples(
        self, trainer: pl.Trainer, module: ForestModule, lockstep: Lockstep | None
    ) -> list[str]:
        engine = engine_of(trainer, module, self.batch_size, lockstep)
        data: ForestData = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer: Any = data.tokenizer
        examples = harmful_first(data.validation)[: self.num_prompts]
        requests = [
            Request(_prompt_ids(example), request_id=example.example_id, sampling=self.sampling)
            for example in examples
        ]
        # As training computes. Half precision needs nothing: the weights themselves are half.
        is_mixed = isinstance(trainer.precision_plugin, MixedPrecision)
        with trainer.precision_plugin.forward_context() if is_mixed else nullcontext():
            completions = engine.generate(requests)
        return [
            sample_markdown(_text(_prompt_ids(example), tokenizer), completion, example.is_harmful)
            for example, completion in zip(examples, completions, strict=True)
        ]


def harmful_first(examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Return the examples, harmful ones first, otherwise in their order."""
    return sorted(examples, key=lambda example: not example.is_harmful)


def sample_markdown(prompt: str, completion: Completion, is_harmful: bool) -> str:
    """Return one sample as Markdown whose structure no text in it can change."""
    parts = [f"**{'harmful' if is_harmful else 'benign'} prompt**", quoted(prompt)]
    for text in completion.discarded_texts:
        parts += ["**taken back**", quoted(text, is_struck=True)]
    reason = completion.finish_reason.replace("_", " ")
    parts += [f"**visible** ({reason})", quoted(completion.visible_text)]
    return "\n\n".join(parts)


def quoted(text: str, *, is_struck: bool = False) -> str:
    """Return `text` as a Markdown quotation, every character of it literal."""
    if not text:
        return "> *(nothing)*"
    lines = re.split(r"\r\n|[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]", text)
    return "\n".join(f"> {_literal(line, is_struck=is_struck)}  " for line in lines)


def _literal(line: str, *, is_struck: bool) -> str:
    """Return one line with what Markdown, HTML or a terminal would act on made harmless."""
    signs = ["\N{REPLACEMENT CHARACTER}" if _is_control(sign) else sign for sign in line]
    indent = len(signs) - len("".join(signs).lstrip())
    # Indented text would become code.
    spelled = ["&#160;"] * indent + [sign.translate(_ENTITIES) for sign in signs[indent:]]
    return "".join(sign + STRIKE for sign in spelled) if is_struck else "".join(spelled)


def _is_control(sign: str) -> bool:
    """Return whether a character is a control, half a surrogate pair, or turns text around."""
    return (
        unicodedata.category(sign) in ("Cc", "Cs")
        or unicodedata.bidirectional(sign) in _BIDI_CONTROLS
    )


def _prompt_ids(example: EncodedExample) -> tuple[int, ...]:
    return tuple(token for turn in example.turns for token in turn.ids)


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
