"""How much likelier is [RESET] after an unsafe prefix than after a safe one, on held-out rows?

    python benchmarks/reset_probe.py RUN MODEL [MODEL ...] [--prefix-tokens 10] [--limit N]
        [--harmful FILE] [--json FILE]

RUN is the folder of a training run: its saved configuration names the data and the split, so the
rows of its `test` part are those that no training and no choice has seen. `--harmful` takes its
harmful rows from another file, split by the same rule: the unfiltered one, say. Each MODEL is a
Hugging Face folder; the first one should be the model before training. For every row the
log-probability of [RESET] after the first tokens of the unsafe and of the safe answer is measured.
Printed are both means, their difference with its 95 % interval (paired over rows), the rise of the
first over the first MODEL, and the AUC of telling unsafe from safe prefixes by it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from omegaconf import OmegaConf

from backtrack.build import make_sources
from backtrack.callbacks.reset_monitor import reset_logps
from backtrack.config import compose_config
from backtrack.data.load import load_data
from backtrack.data.module import BatchSettings
from backtrack.metrics import auc, mean_interval
from backtrack.model_spec import ModelSpec
from backtrack.models import load_model, load_tokenizer
from backtrack.modules.base import OptimizerSettings
from backtrack.modules.sft import SFTModule
from backtrack.runs import load_config
from backtrack.tokens import reset_token_id


class Rows:
    """The settings that `reset_logps` asks of a data module."""

    def __init__(self, settings: BatchSettings) -> None:
        self.settings = settings


def probe(
    folder: str, run: Path, *, prefix_tokens: int, limit: int, harmful: str | None
) -> torch.Tensor:
    """Return (N, 2) log p([RESET]) after unsafe and safe prefixes of held-out rows, nats."""
    spec = ModelSpec(**compose_config("generate", [f"checkpoint={folder}"]).model)
    tokenizer = load_tokenizer(spec)
    model = load_model(spec, tokenizer, seed=0)
    cfg = load_config(run)
    if harmful is not None:
        cfg.data.sources.harmful.path = harmful
    settings = OmegaConf.to_container(cfg.data, resolve=True)
    settings["limit"] = {"train": 1, "validation": 1, "test": limit}
    train, validation = make_sources(cfg)
    loaded = load_data(
        train,
        validation,
        tokenizer=tokenizer,
        settings=settings,
        seed=cfg.seed,
        cache_dir=Path(cfg.paths.cache_dir),
    )
    rows = [example for example in loaded.test if example.is_harmful][:limit]
    module = SFTModule(
        model,
        optimizer=OptimizerSettings(1.0, (0.9, 0.95), 1e-8, 0.0, 0.0, None),
        num_steps=1,
        chunk_size=1024,
        reset_token_id=reset_token_id(tokenizer),
    )
    data = Rows(BatchSettings(1, cfg.data.max_tokens, cfg.data.layout, tokenizer.pad_token_id, 0))
    return reset_logps(module, rows, prefix_tokens=prefix_tokens, data=data)


def label(folder: Path) -> str:
    """Return the experiment of a run's model, or else the name of the folder."""
    return folder.parent.parent.name if folder.name == "model" else folder.name


def main() -> None:
    """Probe each model and print one JSON line a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prefix-tokens", type=int, default=10)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--harmful")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results, first = [], None
    for folder in args.models:
        found = probe(
            folder,
            args.run,
            prefix_tokens=args.prefix_tokens,
            limit=args.limit,
            harmful=args.harmful,
        )
        unsafe, safe = found[:, 0], found[:, 1]
        first = unsafe if first is None else first
        gap, rise = mean_interval(unsafe - safe), mean_interval(unsafe - first)
        results.append(
            {
                "model": label(Path(folder)),
                "rows": len(found),
                "prefix_tokens": args.prefix_tokens,
                "logp_after_unsafe": round(unsafe.mean().item(), 3),
                "logp_after_safe": round(safe.mean().item(), 3),
                "gap": round((unsafe - safe).mean().item(), 3),
                "gap_ci95": [round(gap.low, 3), round(gap.high, 3)],
                "rise": round((unsafe - first).mean().item(), 3),
                "rise_ci95": [round(rise.low, 3), round(rise.high, 3)],
                "auc": round(auc(unsafe, safe), 3),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
