"""The speed benchmarks run, and what they compare is the same work."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def triples(tmp_path_factory) -> Path:
    """Four triples of random token ids."""
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, 400) for _ in range(count)]

    path = tmp_path_factory.mktemp("benchmarks") / "triples.jsonl"
    lines = [
        {
            "prompt": ids(20 + number),
            "safe": ids(9),
            "unsafe": ids(7 + number),
            "safe_cut": 4,
            "unsafe_cut": 1 + number,
            "reset": 400,
        }
        for number in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def last_line(script: str, *arguments: object) -> dict[str, Any]:
    """The JSON object that a benchmark prints at its end, on the smallest case."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    command += ["--size", "tiny", "--limit", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_benchmarks_ours_and_the_plain_loop_train_the_same(triples, objective):
    found = last_line(
        "train_vs_peer.py",
        *("--objective", objective, "--triples", triples, "--peer", "plain", "--repeats", 1),
    )
    assert {"ratio", "ratio_min", "ratio_max", "memory_ratio"} <= found.keys()
    assert found["ratio"] == found["ratio_min"] == found["ratio_max"] > 0
    assert found["loss_max_rel_diff"] < 1e-5  # a prefix one token longer: 5e-5
    assert found["gap_max_rel_diff"] < 1e-4
    # Trees of 20..23 + 9 + (1..4) + 10, in DPO of 20..23 + 2 (9 + (7..10)) + 2 tokens.
    least = sum((20 + n) + (9 + 1 + n + 10 if objective == "sft" else 38 + 2 * n) for n in range(4))
    assert least - 16 <= found["tokens_ours"] < found["tokens_peer"]


def test_benchmarks_step_profile_names_every_part_of_a_step(triples):
    found = last_line("step_profile.py", "--objective", "dpo", "--triples", triples)
    assert {"useful_share", "products_gflops_per_s", "step_seconds", "shares"} <= found.keys()
    assert found["useful_share"] > 0
    assert math.isclose(sum(found["shares"].values()), 1.0, abs_tol=1e-3)
    parts = {"layers, products", "head, products", "attention", "optimizer and clipping"}
    assert all(found["shares"][part] > 0 for part in parts)


def test_benchmarks_useful_work_is_counted_by_hand(monkeypatch):
    """x = [1 2], unsafe = [5 6 7 E], safe = [8 9 E], k = 2, j = 1; last tokens predict nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from step_profile import useful

    triple = {"prompt": [1, 2], "safe": [8, 9, 3], "unsafe": [5, 6, 7, 3]}
    triple |= {"safe_cut": 1, "unsafe_cut": 2, "reset": 4}
    # 1 2 (keys 1 2) | 8 9 (3 4) | 5 6 (3 4) | R 8 9 (5 6 7); predictors 2 8 9 and 6 R 8 9.
    assert useful(triple, "sft") == (9, 7, 3 + 7 + 7 + 18)
    # 1 2 | 5 6 | R 8 9 | 7 (5) | 8 (3) | 9 (4) | R 5 6 7 (4 5 6 7)
    # predictors: 6 R 8 9 and 7; 8 9 and R 5 6 7.
    assert useful(triple, "dpo") == (14, 11, 3 + 7 + 18 + 5 + 3 + 4 + 22)
