"""What a training step really holds at its peak, against what `backtrack.memory_model` says.

    python benchmarks/plan_peaks.py [--cases NAME ...] [--out FILE.json]

Each case is a process of its own: three real steps of forests (the modules, data and trainer of
`backtrack.train`) of a random Llama on random token ids, under torch's profiler. The peak is the
largest running sum of what torch's CPU allocator gave and took back, weights and optimiser
included; it is the same in every run, and what a GPU's allocator would call allocated. The process
is larger by its libraries and by what the profiler writes down. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ours import given_cuts, prepare, quiet
from torch.profiler import ProfilerActivity, profile
from work import Triple, make_model

from backtrack.memory_model import memory
from backtrack.plan import shape_of
from backtrack.plan_job import Job

SEED, STEPS, MIB = 0, 3, 2**20


class Case(NamedTuple):
    """One shape and one step: trees in it, tokens of prompt and of each answer, settings."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    vocabulary: int
    objective: str = "dpo"
    trees: int = 4
    prompt: int = 256
    answer: int = 128
    checkpointing: float = 0.0
    micro: int = 1

    def sizes(self) -> dict[str, int]:
        """Return what `make_model` takes; keys have half the heads."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
        }

    def triples(self) -> list[Triple]:
        """Return random triples for all steps, prefixes half an answer long."""
        draw = torch.Generator().manual_seed(SEED)

        def ids(count: int) -> list[int]:
            return torch.randint(3, self.vocabulary - 1, (count,), generator=draw).tolist()

        return [
            Triple(
                prompt=ids(self.prompt),
                safe=ids(self.answer),
                unsafe=ids(self.answer),
                safe_cut=self.answer // 2,
                unsafe_cut=self.answer // 2,
                reset=self.vocabulary - 1,
            )
            for _ in range(STEPS * self.trees)
        ]

    def job(self, model: Any) -> Job:
        """Return the step as the memory model takes it: on a CPU all real tokens are one row."""
        n = self.answer
        tokens, edges = self.prompt + n + n // 2 + n + 1, 2 * n + 1
        if self.objective == "dpo":
            tokens, edges = self.prompt + 4 * n + 2, 3 * n + 2
        return Job(
            shape=shape_of(model, has_eager_attention=False),
            precision="32-true",
            dtype_bytes=4,
            strategy="single",
            devices=1,
            num_nodes=1,
            micro=self.micro,
            batch_size=self.trees,
            example_tokens=tokens,
            example_edges=edges,
            max_tokens=self.trees * tokens,
            has_fixed_rows=False,
            chunk_size=1024,
            checkpointing=self.checkpointing,
            reference="precomputed",
            attends_by_tree=True,
        )


CASES = {
    "wide vocabulary": Case(256, 768, 8, 8, 49280),
    "wide vocabulary, SFT": Case(256, 768, 8, 8, 49280, objective="sft"),
    "middle": Case(512, 1536, 6, 8, 8192),
    "middle, recomputed": Case(512, 1536, 6, 8, 8192, checkpointing=1.0),
    "middle, 4 forwards": Case(512, 1536, 6, 8, 8192, micro=4),
    "deep": Case(512, 1408, 14, 8, 8192),
    "deep, half recomputed": Case(512, 1408, 14, 8, 8192, checkpointing=0.5),
    # Run once, after the model was done: nothing in it was chosen by these.
    "unseen, long": Case(384, 1024, 12, 6, 16384, trees=6, prompt=512, answer=64, micro=2),
    "unseen, SFT": Case(640, 2560, 5, 10, 12288, "sft", trees=3, prompt=128, answer=200),
}


def allocator_peak(prof: profile) -> float:
    """Return the largest running sum of torch's allocations, in bytes."""
    found = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return float(peak)


def measure(case: Case) -> dict[str, float]:
    """Return measured and predicted peaks of a case, in MiB; to be called in a fresh process."""
    quiet()
    triples = case.triples()
    with (
        given_cuts(triples),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof,
    ):
        model = make_model(**case.sizes())
        if case.checkpointing:
            from backtrack.models import checkpoint_layers

            checkpoint_layers(model, case.checkpointing)
        parameters = sum(p.numel() for p in model.parameters())
        more = [f"trainer.accumulate_grad_batches={case.micro}", f"data.batch_size={case.trees}"]
        job = prepare(model, triples, case.objective, more)
        job.trainer.fit(job.module, datamodule=job.data)
    expected = memory(case.job(model))
    return {
        "parameters": parameters,
        "measured": allocator_peak(prof) / MIB,
        "predicted": expected.total / MIB,
        **{f"part {name}": value / MIB for name, value in expected._asdict().items()},
    }


def main() -> None:
    """Measure every case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(CASES[args.child])))
        return
    rows = {}
    print("| case | parameters, M | measured, MiB | predicted, MiB | predicted / measured |")
    print("|---|---|---|---|---|")
    for name in args.cases:
        command = [sys.executable, __file__, "--child", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {name} | {row['parameters'] / 1e6:.1f} | {row['measured']:.0f} "
            f"| {row['predicted']:.0f} | {row['predicted'] / row['measured']:.3f} |"
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
