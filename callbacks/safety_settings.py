"""When and how `SafetyEval` measures, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from backtrack.generation.types import Sampling, sampling_problems

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetySettings:
    """What `SafetyEval` is told, from `conf/callbacks/watch.yaml`.

    Attributes:
        run_dir: Gets `safety.jsonl`.
        every_n_steps: Optimiser steps from one evaluation to the next.
        at_start: Whether the model is measured as it comes, at step 0.
        at_end: Whether it is measured after the last step, wherever that falls.
        biases: Nats, each added to the logit of [RESET].
        max_prompts: Of a suite, evenly spread.
        batch_size: Answers that decode together on a rank.
        max_new_tokens: Of an answer; discarded ones count.
        max_resets: [RESET] is banned after so many.
        temperature: 0 is greedy.
        seed: Of the sampling noise.
        judge: Folder of a `LinearJudge`; None leaves answers unjudged, but for those of a world.
        world: Arguments of `make_world`: its development split is asked and its exact judge judges,
            unless `prompts` or `judge` name others. None where there is no world.
        prompts: Suite -> {path, is_harmful}, see `file_suite`; None asks the world or the run's
            validation prompts.
        on_error: `warn` leaves a gap in the curves, `raise` ends the run.

    Raises:
        ValueError: With everything that is wrong.
    """

    run_dir: str
    every_n_steps: int
    at_start: bool
    at_end: bool
    biases: Sequence[float]
    max_prompts: int
    batch_size: int
    max_new_tokens: int
    max_resets: int
    temperature: float
    seed: int
    judge: str | None
    world: Mapping[str, Any] | None
    prompts: Mapping[str, Mapping[str, Any]] | None
    on_error: Literal["warn", "raise"]

    def __post_init__(self) -> None:
        problems = [
            f"{key}: {getattr(self, key)!r} is not allowed; expected a whole number from 1"
            for key in ("every_n_steps", "max_prompts", "batch_size")
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1
        ]
        keys = ("max_new_tokens", "max_resets", "temperature", "seed")
        sampled = {key: getattr(self, key) for key in keys}
        problems += sampling_problems({**sampled, "reset_bias": 0.0})
        biases = list(self.biases)
        if not biases or len({float(bias) for bias in biases}) < len(biases):
            problems.append(f"biases: {biases} is not allowed; expected different numbers")
        if self.on_error not in ("warn", "raise"):
            problems.append(f"on_error: {self.on_error!r} is not allowed; expected warn or raise")
        problems += [
            f"prompts.{name}: expected path and is_harmful, found {', '.join(section) or 'none'}"
            for name, section in (self.prompts or {}).items()
            if set(section) != {"path", "is_harmful"}
        ]
        if problems:
            raise ValueError("\n".join(f"callbacks.safety_eval.{line}" for line in problems))

    @property
    def sampling(self) -> Sampling:
        """How answers are decoded."""
        return Sampling(
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            reset_bias=0.0,
            max_resets=self.max_resets,
            seed=self.seed,
        )
