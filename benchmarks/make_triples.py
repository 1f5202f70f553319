"""Preference rows to lines of token ids, the input of the speed benchmarks.

    python benchmarks/make_triples.py DATA_FILE --model DIR_OR_ID --out FILE.jsonl [--seed 0]

A line holds {"prompt", "safe", "unsafe": token ids, "safe_cut", "unsafe_cut": tokens of a prefix,
"reset": id of [RESET]}: what a training run makes of the row in its first epoch, by the same code,
but for truncation (prompts and answers may have 4096 tokens). Rows that give no example are left
out and counted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from backtrack.build import model_spec
from backtrack.config import compose_config
from backtrack.data.encode import Limits, encode_example
from backtrack.data.examples import draw_cut
from backtrack.data.load import make_source
from backtrack.data.types import EncodedExample
from backtrack.models import load_tokenizer
from backtrack.tokens import reset_token_id

LIMITS = Limits(max_prompt_tokens=4096, max_response_tokens=4096)


def line_of(example: EncodedExample, *, seed: int, reset: int) -> str:
    """Return the line of one harmful example."""
    assert example.unsafe is not None, "rows of preferences carry both answers"

    def cut(ids: tuple[int, ...], stream: str) -> int:
        return draw_cut(len(ids), seed=seed, epoch=0, example_id=example.example_id, stream=stream)

    triple = {
        "prompt": [token for turn in example.turns for token in turn.ids],
        "safe": example.safe,
        "unsafe": example.unsafe,
        "safe_cut": cut(example.safe, "safe"),
        "unsafe_cut": cut(example.unsafe, "unsafe"),
        "reset": reset,
    }
    return json.dumps(triple) + "\n"


def main() -> None:
    """Write the lines and say how many."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="file of preference rows")
    parser.add_argument("--model", required=True, help="whose tokenizer: a folder or a hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the prefix lengths")
    args = parser.parse_args()
    tokenizer = load_tokenizer(model_spec(compose_config("generate", [f"checkpoint={args.model}"])))
    reset = reset_token_id(tokenizer)
    # Draws are keyed by the source's name as well: another one gives other prefix lengths.
    read = make_source("h", {"path": args.data}, on_bad_row="skip").read()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = num_bad = 0
    with args.out.open("w", encoding="utf-8") as file:
        for example in read.examples:
            try:
                encoded = encode_example(example, tokenizer, limits=LIMITS, refusal="")
            except ValueError:
                num_bad += 1
                continue
            if encoded.is_harmful:
                file.write(line_of(encoded, seed=args.seed, reset=reset))
                lines += 1
    print(f"{args.out}: {lines} triples, {len(read.skipped) + num_bad} rows skipped")


if __name__ == "__main__":
    main()
