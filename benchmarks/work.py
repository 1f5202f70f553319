"""The work that the speed benchmarks share: a model, triples of token ids, the settings of a step.

Every side of a comparison trains the same random Llama on the same triples with the same settings,
which are here and nowhere else. Nothing of the package is imported, so a peer loads none of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

SIZES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
"""Sizes of the random Llama; small has 31.5 M parameters, 25.2 M of them embedding and head."""

VOCABULARY = 49280
"""SmolLM2's 49,152 tokens and [RESET], rounded up."""

PAD_ID = 2

SETTINGS: dict[str, Any] = {
    "triples_per_step": 4,
    "learning_rate": 1e-6,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clip": 1.0,
    "beta": 0.1,
}
"""Of a step, on every side. The rate falls from its peak to zero along a cosine, without warm-up;
gradients are clipped by their norm; no gradient checkpointing, no dropout, fp32."""


class Triple(TypedDict):
    """One line of a file that `make_triples.py` writes."""

    prompt: list[int]
    safe: list[int]
    unsafe: list[int]
    safe_cut: int
    unsafe_cut: int
    reset: int


class Outcome(TypedDict):
    """What one side says of one run; its last line, as JSON.

    Attributes:
        seconds: Of the training loop, the making of batches and of the optimizer included.
        reference_seconds: Of the reference's pass over the same triples; 0 in SFT.
        tokens: That entered the embedding in training, padding counted.
        losses: Of each step.
        gaps: Of each step of DPO, mean over pairs of log p(chosen) - log p(rejected), in nats.
        peak_rss_mib: Of the whole process.
        threads: That torch computes with.
        versions: Of the packages that matter.
    """

    seconds: float
    reference_seconds: float
    tokens: int
    losses: list[float]
    gaps: list[float]
    peak_rss_mib: float
    threads: int
    versions: dict[str, str]


class Sequence(NamedTuple):
    """An ordinary sequence: what is conditioned on, and what is supervised."""

    given: list[int]
    wanted: list[int]


def make_model(**sizes: Any) -> LlamaForCausalLM:
    """Return a random Llama of these sizes, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": VOCABULARY, **sizes},
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def load_model(folder: Path) -> PreTrainedModel:
    """Return the model of `folder` in fp32, ready to train."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.train()


def read_triples(path: Path, limit: int | None = None) -> list[Triple]:
    """Return the first `limit` triples of a file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(limit or sys.maxsize))]  # noqa: B905


def steps_of(triples: list[Triple]) -> list[list[Triple]]:
    """Return the triples of each step, in the order of the file; the last step may be short."""
    size = SETTINGS["triples_per_step"]
    return [triples[first : first + size] for first in range(0, len(triples), size)]


def sft_sequences(triple: Triple) -> list[Sequence]:
    """Return prompt -> safe, and prompt unsafe_prefix -> [RESET] safe."""
    prefix = triple["unsafe"][: triple["unsafe_cut"]]
    return [
        Sequence(triple["prompt"], triple["safe"]),
        Sequence(triple["prompt"] + prefix, [triple["reset"], *triple["safe"]]),
    ]


def dpo_pairs(triple: Triple) -> list[tuple[Sequence, Sequence]]:
    """Return (chosen, rejected) of the elicit pair and of the discourage pair, each in full."""
    prompt, safe, unsafe = triple["prompt"], triple["safe"], triple["unsafe"]
    elicited = [*unsafe[: triple["unsafe_cut"]], triple["reset"], *safe]
    discouraged = [*safe[: triple["safe_cut"]], triple["reset"], *unsafe]
    return [
        (Sequence(prompt, elicited), Sequence(prompt, unsafe)),
        (Sequence(prompt, safe), Sequence(prompt, discouraged)),
    ]


class TokenCounter:
    """Counts the tokens that enter a model's embedding from now on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tokens = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.tokens += inputs[0].numel()


def peak_rss_mib() -> float:
    """Return the most memory this process has held.

    `ru_maxrss` would start from what the parent held when it forked, so Linux's own count is read
    where it is there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def no_progress_bars() -> None:
    """Keep transformers from drawing bars while weights load and are saved."""
    transformers.utils.logging.disable_progress_bar()


def side_arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the command line that every side of a comparison has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=["sft", "dpo"], required=True)
    parser.add_argument("--triples", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="take the first LIMIT triples")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to train")
    return parser
