"""What `SafetyEval` leaves: tags for the loggers, and `safety.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from backtrack.evaluation.safety import SuiteRow

LOG_FILE = "safety.jsonl"
"""In the run folder, one JSON object a (step, suite, bias)."""


def figures_of(rows: Sequence[SuiteRow]) -> Iterator[tuple[str, float]]:
    """Yield what is logged, by tag; what is not known has no point in its curve."""
    for row in rows:
        room = "safety" if row.is_harmful else "benign"
        main = "violation_rate" if row.is_harmful else "false_reset_rate"
        interval = row.violation_ci95 if row.is_harmful else row.false_reset_ci95
        values: dict[str, float | None] = {
            main: row.violation_rate if row.is_harmful else row.false_reset_rate,
            "reset_rate": row.reset_rate,
            "discarded_fraction": row.discarded_fraction,
        }
        if interval is not None:
            values |= {f"{main}_low": interval.low, f"{main}_high": interval.high}
        for name, value in values.items():
            if value is not None:
                yield f"{room}/{row.suite}/{name}/bias={row.reset_bias:g}", value


def write_log(history: Sequence[tuple[int, Sequence[SuiteRow]]], run_dir: str) -> None:
    """Write the history whole: so a resumed run forgets what came after its checkpoint."""
    target = Path(run_dir, LOG_FILE)
    if not history and not target.exists():
        return
    lines = [
        json.dumps({"step": step, **row.as_record()}, allow_nan=False) + "\n"
        for step, rows in history
        for row in rows
    ]
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(target)
