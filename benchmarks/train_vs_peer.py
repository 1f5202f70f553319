"""Train on the same triples with this project and with a peer, and compare speed, memory and loss.

    python benchmarks/train_vs_peer.py --objective dpo|sft --triples FILE.jsonl \
        [--peer trl --peer-python PYTHON --tokenizer DIR | --peer plain] \
        [--limit N] [--repeats R] [--size small|tiny]

FILE is one that `make_triples.py` wrote. Both sides start from the same weights of a random Llama,
get the same token ids with the same prefix lengths, and take the same steps of `work.SETTINGS`:
four triples a step in the order of the file, so that losses can be compared step by step. The peer
is TRL (`peer_trl.py`, in an environment of its own whose interpreter is PYTHON) or the fastest loop
we could write without trees (`plain_loop.py`). Each side runs R times in a fresh process; who goes
first alternates. Timed is the training loop (`trainer.fit()`, `trainer.train()`); loading and the
reference's pass are not in it, and the pass is reported beside it.

What is compared: `ratio` is ours over the peer's in examples (triples) a second, the median over
repeats; `memory_ratio` is ours over the peer's in peak resident memory of the process, imports and
the reference's pass included; `loss_max_rel_diff` is the largest relative difference of a step's
loss. The DPO loss of a model that has hardly moved is log 2 whatever it saw, so `gap_max_rel_diff`
compares what it is made of as well: the mean over a step's pairs of log p(chosen) minus
log p(rejected), relative to the largest of them. `tokens_*` enter the embedding in one epoch of
training, padding counted. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from work import SETTINGS, SIZES, Outcome, make_model, no_progress_bars, read_triples

HERE = Path(__file__).resolve().parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def commands(args: argparse.Namespace, model: str) -> dict[str, list[str]]:
    """Return the command line of each side."""
    shared = ["--objective", args.objective, "--triples", str(args.triples), "--model", model]
    if args.limit:
        shared += ["--limit", str(args.limit)]
    peer = [sys.executable, str(HERE / "plain_loop.py"), *shared]
    if args.peer == "trl":
        more = ["--tokenizer", str(args.tokenizer), "--settings", json.dumps(SETTINGS)]
        peer = [str(args.peer_python), str(HERE / "peer_trl.py"), *shared, *more]
    return {"peer": peer, "ours": [sys.executable, str(HERE / "ours.py"), *shared]}


def run(command: list[str]) -> Outcome:
    """Return what one side said.

    Raises:
        RuntimeError: With the end of its output, if it failed.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **OFFLINE}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    outcome: Outcome = json.loads(done.stdout.strip().splitlines()[-1])
    return outcome


def largest_difference(ours: list[float], peer: list[float], scale: float | None = None) -> float:
    """Return the largest difference of a step, relative to `scale` or else to the peer's value."""
    return max(
        (abs(a - b) / (scale or abs(b)) for a, b in zip(ours, peer, strict=True)), default=0.0
    )


def compare(ours: list[Outcome], peer: list[Outcome], num_triples: int) -> dict[str, Any]:
    """Return the result of all repeats."""
    ratios = [other["seconds"] / own["seconds"] for own, other in zip(ours, peer, strict=True)]
    own, other = ours[0], peer[0]
    gap_scale = max(map(abs, other["gaps"]), default=1.0)

    def median(outcomes: list[Outcome], key: str) -> float:
        return float(statistics.median(outcome[key] for outcome in outcomes))  # type: ignore[literal-required]

    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "memory_ratio": round(median(ours, "peak_rss_mib") / median(peer, "peak_rss_mib"), 3),
        "loss_max_rel_diff": largest_difference(own["losses"], other["losses"]),
        "gap_max_rel_diff": largest_difference(own["gaps"], other["gaps"], gap_scale),
        "tokens_ours": own["tokens"],
        "tokens_peer": other["tokens"],
        "examples": num_triples,
        "steps": len(own["losses"]),
        "examples_per_s_ours": round(num_triples / median(ours, "seconds"), 4),
        "examples_per_s_peer": round(num_triples / median(peer, "seconds"), 4),
        "reference_s_ours": round(median(ours, "reference_seconds"), 3),
        "reference_s_peer": round(median(peer, "reference_seconds"), 3),
        "peak_rss_mib_ours": round(median(ours, "peak_rss_mib")),
        "peak_rss_mib_peer": round(median(peer, "peak_rss_mib")),
        "threads": own["threads"],
        "versions": {"ours": own["versions"], "peer": other["versions"]},
    }


def parse() -> argparse.Namespace:
    """Return the arguments; a peer in TRL needs an interpreter and a tokenizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=["sft", "dpo"], required=True)
    parser.add_argument("--triples", type=Path, required=True)
    parser.add_argument("--peer", choices=["trl", "plain"], default="trl")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder; TRL asks for one")
    parser.add_argument("--limit", type=int, help="take the first LIMIT triples")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the model")
    args = parser.parse_args()
    if args.peer == "trl" and not (args.peer_python and args.tokenizer):
        parser.error("--peer trl needs --peer-python and --tokenizer")
    return args


def main() -> None:
    """Run both sides in turn and print the comparison."""
    args = parse()
    no_progress_bars()
    num_triples = len(read_triples(args.triples, args.limit))
    found: dict[str, list[Outcome]] = {"peer": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(**SIZES[args.size]).save_pretrained(folder)
        sides = commands(args, folder)
        for repeat in range(args.repeats):
            for side in sorted(sides, reverse=repeat % 2 == 0):  # peer first, then ours first
                outcome = run(sides[side])
                found[side].append(outcome)
                print(
                    f"{repeat + 1}/{args.repeats} {args.peer if side == 'peer' else 'ours':5s} "
                    f"{num_triples / outcome['seconds']:7.3f} examples/s, reference "
                    f"{outcome['reference_seconds']:.1f} s, {outcome['tokens']} tokens, peak "
                    f"{outcome['peak_rss_mib']:.0f} MiB, {outcome['threads']} threads",
                    flush=True,
                )
    head = {"objective": args.objective, "peer": args.peer, "size": args.size}
    print(json.dumps({**head, **compare(found["ours"], found["peer"], num_triples)}))


if __name__ == "__main__":
    main()
