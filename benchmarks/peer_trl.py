"""One side of a comparison: TRL's DPOTrainer or SFTTrainer, in an environment of its own.

Run by `train_vs_peer.py` with the interpreter of an environment that holds torch==2.13.0 and
trl==1.16.0; prints its outcome as the last line. Nothing of this project is imported: model,
triples and settings come by the command line.

TRL's own defaults stay (fused AdamW, the head in tiles, dynamic padding) but for what the
comparison needs: sequences in the order of the file instead of shuffled, so that a step holds the
same four triples on both sides; a cosine without warm-up; fp32; no checkpointing; nothing saved.
Its padding-free mode needs a kernel for GPUs. On a CPU its head scores every position, prompts and
padding included, and on GPUs only the supervised ones: the head takes about four fifths of its CPU
time here, so a ratio seen here says little about a GPU. `plain_loop.py` is the stricter peer.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


class Log(TrainerCallback):
    """Keeps loss and gap of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gaps: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take down a step's numbers; the summary at the end has none of them."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
        if "logps/chosen" in logs:
            self.gaps.append(float(logs["logps/chosen"]) - float(logs["logps/rejected"]))


class TokenizedDPO(DPOTrainer):
    """A DPOTrainer that takes token ids and times its reference pass."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        start = time.perf_counter()
        found = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.perf_counter() - start
        return found


def dpo_rows(triple: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Return the elicit pair and the discourage pair."""
    safe, unsafe, reset = triple["safe"], triple["unsafe"], [triple["reset"]]
    pairs = [
        (unsafe[: triple["unsafe_cut"]] + reset + safe, unsafe),
        (safe, safe[: triple["safe_cut"]] + reset + unsafe),
    ]
    return [
        {"prompt_ids": triple["prompt"], "chosen_ids": chosen, "rejected_ids": rejected}
        for chosen, rejected in pairs
    ]


def sft_rows(triple: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Return both sequences, -100 where nothing is supervised."""
    prefix = triple["unsafe"][: triple["unsafe_cut"]]
    parts = [
        (triple["prompt"], triple["safe"]),
        (triple["prompt"] + prefix, [triple["reset"], *triple["safe"]]),
    ]
    return [
        {"input_ids": given + wanted, "labels": [-100] * len(given) + wanted}
        for given, wanted in parts
    ]


def peak_rss_mib() -> float:
    """Return the most memory this process has held, not counting what its parent held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def make_trainer(args: argparse.Namespace, folder: str, log: Log) -> Any:
    """Return the trainer; DPO's reference pass is done when it is made."""
    settings = json.loads(args.settings)
    with args.triples.open(encoding="utf-8") as lines:
        triples = [json.loads(line) for line in lines][: args.limit]
    shared = {
        "output_dir": folder,
        "per_device_train_batch_size": 2 * settings["triples_per_step"],
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": settings["learning_rate"],
        "adam_beta1": settings["betas"][0],
        "adam_beta2": settings["betas"][1],
        "adam_epsilon": settings["eps"],
        "weight_decay": settings["weight_decay"],
        "max_grad_norm": settings["clip"],
        "lr_scheduler_type": "cosine",
        "max_length": 4096,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    given = {
        "model": AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        "processing_class": AutoTokenizer.from_pretrained(args.tokenizer),
        "callbacks": [log],
    }
    if args.objective == "sft":
        rows = Dataset.from_list([row for triple in triples for row in sft_rows(triple)])
        return SFTTrainer(args=SFTConfig(**shared), train_dataset=rows, **given)
    rows = Dataset.from_list([row for triple in triples for row in dpo_rows(triple)])
    config = DPOConfig(precompute_ref_log_probs=True, beta=settings["beta"], **shared)
    return TokenizedDPO(args=config, train_dataset=rows, **given)


def main() -> None:
    """Train and print the outcome."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=["sft", "dpo"], required=True)
    parser.add_argument("--triples", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to train")
    parser.add_argument("--tokenizer", required=True, help="folder; TRL asks for its padding")
    parser.add_argument("--settings", required=True, help="`work.SETTINGS` as JSON")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    tokens, log = [0], Log()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, folder, log)
        trainer.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs: tokens.append(inputs[0].numel())
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    outcome = {
        "seconds": seconds,
        "reference_seconds": getattr(trainer, "reference_seconds", 0.0),
        "tokens": sum(tokens),
        "losses": log.losses,
        "gaps": log.gaps,
        "peak_rss_mib": peak_rss_mib(),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
