"""How fast is a file of any size prepared for training, and in how much memory?

    python benchmarks/prepare_data.py MEGABYTES [--model FOLDER] [--folder FOLDER]

Writes a JSONL file of preference rows (harmless, invented text, about 1 kB a row), prepares it as
training does (tokenised on all cores, memory-mapped), opens it again from the cache, and reads rows
in random order. Prints one JSON line. `--model` names a Hugging Face folder for its tokenizer; the
embedded world's is used otherwise. `peak_mb` is the largest resident set of the process that reads
and writes, `base_mb` what it had before, `worker_mb` that of the largest encoding process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from backtrack.build import make_tokenizer
from backtrack.config import compose_config
from backtrack.data.encode_pool import num_cores
from backtrack.data.load import load_data, make_source

WORDS = (
    "the a of to with under over kettle basket loom candle lantern barrel wool clay copper willow "
    "slowly gently evenly twice again first then after before until bend fold rinse stir carve "
    "polish weigh measure gather dry warm cool thin heavy narrow round smooth old new little"
)
SETTINGS = {
    "split": {"train": 0.9, "validation": 0.05, "test": 0.05},
    "limit": {},
    "max_prompt_tokens": 512,
    "max_response_tokens": 256,
    "refusal": "I'm sorry, but I can't help with that.",
    "on_bad_row": "raise",
}
READS = 2000


def write_rows(path: Path, num_bytes: int) -> int:
    """Write about `num_bytes` of rows; returns their number."""
    rng, number, words = random.Random(0), 0, WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            prompt, chosen, rejected = (" ".join(rng.choices(words, k=k)) for k in (80, 50, 50))
            row = {"prompt": f"{number}: {prompt}?", "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")
            number += 1
    return number


def memory(who: int = resource.RUSAGE_SELF) -> float:
    """Largest resident set so far, in megabytes."""
    kilobytes = resource.getrusage(who).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return round(kilobytes / 1000, 1)


def measure(megabytes: float, model: str | None, folder: Path) -> dict[str, float]:
    """Prepare a file of `megabytes` in `folder`."""
    path = folder / "rows.jsonl"
    num_rows = write_rows(path, round(megabytes * 1e6))
    given = [] if model is None else [f"model.path={model}"]
    tokenizer = make_tokenizer(compose_config("train", ["+experiment=tiny_sft", *given]))
    base = memory()

    def load():
        source = make_source("rows", {"path": str(path)}, on_bad_row="raise")
        begin = time.perf_counter()
        loaded = load_data(
            [source],
            None,
            tokenizer=tokenizer,
            settings=SETTINGS,
            seed=0,
            cache_dir=folder / "cache",
            show_progress=True,
        )
        return loaded, time.perf_counter() - begin

    _, seconds = load()
    peak = memory()
    loaded, seconds_again = load()
    rng, examples = random.Random(0), loaded.train[0]
    begin = time.perf_counter()
    for _ in range(READS):
        examples[rng.randrange(len(examples))]
    return {
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "rows": num_rows,
        "cores": num_cores(),
        "seconds": round(seconds, 1),
        "rows_per_s": round(num_rows / seconds),
        "base_mb": base,
        "peak_mb": peak,
        "worker_mb": memory(resource.RUSAGE_CHILDREN),
        "cache_mb": round(sum(item.stat().st_size for item in folder.rglob("*.arrow")) / 1e6, 1),
        "seconds_from_cache": round(seconds_again, 2),
        "us_per_read": round((time.perf_counter() - begin) / READS * 1e6, 1),
    }


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("megabytes", type=float)
    parser.add_argument("--model")
    parser.add_argument("--folder", type=Path, help="on a disk with room; emptied by nobody")
    args = parser.parse_args()
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(args.megabytes, args.model, args.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args.megabytes, args.model, Path(folder))))


if __name__ == "__main__":
    main()
