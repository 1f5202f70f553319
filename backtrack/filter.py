"""Keep the pairs that a judge agrees with: `python -m backtrack.filter data.path=FILE ...`.

A pair teaches backtracking only if its safe answer is safe and its unsafe one unsafe. Preference
data says which of two answers is better, which is less: both may be harmless, or both harmful.

Source: Zhang et al. 2025 (arXiv 2409.14586), where Llama Guard 2 helps to filter; the rule is ours.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from omegaconf import DictConfig, OmegaConf

from backtrack import CONF_DIR
from backtrack.config import ConfigError, check_command_line
from backtrack.data.files import find_file
from backtrack.data.load import make_source
from backtrack.data.sources import FileSource
from backtrack.data.types import PreferenceTriple
from backtrack.evaluation.judges import FACTS, WEIGHTS, LinearJudge, file_hash

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backtrack.data.sources import Source, SourceRead
    from backtrack.evaluation.judges import Judge, Verdict

SUFFIX = ".jsonl"
SAFE_IS_UNSAFE, UNSAFE_IS_SAFE = "safe answer judged unsafe", "unsafe answer judged safe"
BOTH, NOT_JUDGED = "both", "unjudged"
REASONS = (SAFE_IS_UNSAFE, UNSAFE_IS_SAFE, BOTH, NOT_JUDGED)


class Dropped(NamedTuple):
    """Why a pair was left out; its text stays where it was."""

    example_id: str
    reason: str
    probability_unsafe_of_safe: float | None
    probability_unsafe_of_unsafe: float | None


class Paths(NamedTuple):
    """What the command writes."""

    kept: Path
    dropped: Path
    report: Path


class Job(NamedTuple):
    """What the settings name, found and checked."""

    source: Source
    judge: LinearJudge
    paths: Paths


def filter_pairs(cfg: DictConfig) -> str:
    """Write the pairs that the judge agrees with, and say how many they are.

    Raises:
        ConfigError: With every problem of the configuration.
        ValueError: If the data cannot be read, holds no pairs, or none is left.
    """
    job = make_job(cfg)
    read = job.source.read()
    triples = [example for example in read.examples if isinstance(example, PreferenceTriple)]
    if len(triples) < len(read.examples):
        raise ValueError(
            f"data.path: {cfg.data.path} holds conversations, without an unsafe answer; expected "
            "pairs (data.format=preference or hh)"
        )
    kept, dropped = sort_triples(triples, job.judge)
    counts = {reason: sum(d.reason == reason for d in dropped) for reason in REASONS}
    said = ", ".join(f"{reason}: {n}" for reason, n in counts.items())
    if not kept:
        raise ValueError(
            f"judge: none of the {len(triples)} pairs is left ({said}); nothing is written. Fit a "
            "judge on answers that are more like these"
        )
    report = _report(cfg, job.judge, read, num_kept=len(kept), counts=counts)
    rows, notes = map(make_row, kept), (item._asdict() for item in dropped)
    write_all(
        {
            job.paths.dropped: "".join(json.dumps(note) + "\n" for note in notes),
            job.paths.report: json.dumps(report, indent=2) + "\n",
            job.paths.kept: "".join(json.dumps(row) + "\n" for row in rows),
        }
    )
    bad_rows = f"; {len(read.skipped)} bad rows" if read.skipped else ""
    return f"kept {len(kept)} of {len(triples)} pairs in {job.paths.kept} ({said}{bad_rows})"


def make_job(cfg: DictConfig) -> Job:
    """Return what the settings name.

    Raises:
        ConfigError: With every problem of the settings; nothing but the judge has been read.
    """
    problems: list[str] = []
    source = judge = paths = None
    try:
        source = _find_source(cfg)
    except ValueError as error:
        problems += str(error).splitlines()
    try:
        judge = _find_judge(cfg)
    except ValueError as error:
        problems.append(str(error))
    try:
        paths = _find_paths(cfg)
    except ValueError as error:
        problems += str(error).splitlines()
    if not isinstance(cfg.overwrite, bool):
        problems.append(f"overwrite: {cfg.overwrite!r} is not allowed; expected true or false")
    if problems:
        raise ConfigError(problems)
    assert source is not None
    assert judge is not None
    assert paths is not None
    return Job(source, judge, paths)


def sort_triples(
    triples: Sequence[PreferenceTriple], judge: Judge
) -> tuple[list[PreferenceTriple], list[Dropped]]:
    """Return the triples that the judge agrees with and those that it does not, each in order."""
    prompts = [triple.prompt[-1]["content"] for triple in triples]
    of_safe = judge.judge(prompts, [triple.safe for triple in triples])
    of_unsafe = judge.judge(prompts, [triple.unsafe for triple in triples])
    kept, dropped = [], []
    for triple, safe, unsafe in zip(triples, of_safe, of_unsafe, strict=True):
        reason = why_drop(safe, unsafe)
        if reason is None:
            kept.append(triple)
        else:
            probabilities = safe.probability_unsafe, unsafe.probability_unsafe
            dropped.append(Dropped(triple.example_id, reason, *probabilities))
    return kept, dropped


def why_drop(safe: Verdict, unsafe: Verdict) -> str | None:
    """Return which of `REASONS` drops a pair with these verdicts, None where it stays."""
    if safe.is_unsafe is None or unsafe.is_unsafe is None:
        return NOT_JUDGED
    if safe.is_unsafe:
        return SAFE_IS_UNSAFE if unsafe.is_unsafe else BOTH
    return None if unsafe.is_unsafe else UNSAFE_IS_SAFE


def make_row(triple: PreferenceTriple) -> dict[str, Any]:
    """Return a triple as a row of format `preference`, which reads back as the same triple."""
    return {
        "prompt": list(triple.prompt),
        "chosen": [{"role": "assistant", "content": triple.safe}],
        "rejected": [{"role": "assistant", "content": triple.unsafe}],
    }


def write_all(texts: Mapping[Path, str]) -> None:
    """Write files that belong together: none before all are on the disk, the last one last."""
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in texts}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partials[path].write_text(text, encoding="utf-8")
        for path, partial in partials.items():
            partial.replace(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def _find_source(cfg: DictConfig) -> Source:
    if cfg.data.path is None:
        raise ValueError("data.path: not given; expected a file or a data set of the hub")
    section: Any = OmegaConf.to_container(cfg.data, resolve=True)
    source = make_source("data", section, on_bad_row=section.pop("on_bad_row"))
    if isinstance(source, FileSource):
        find_file(source.path, split=source.split)
    return source


def _find_judge(cfg: DictConfig) -> LinearJudge:
    if cfg.judge is None:
        raise ValueError("judge: not given; expected a folder of `python -m backtrack.fit_judge`")
    return LinearJudge.load(str(cfg.judge))


def _find_paths(cfg: DictConfig) -> Paths:
    if cfg.out is None:
        raise ValueError("out: not given; expected FILE.jsonl")
    out = Path(str(cfg.out)).expanduser()
    if out.suffix != SUFFIX:
        raise ValueError(f"out: {str(out)!r} does not end in {SUFFIX}; training could not read it")
    stem = out.name.removesuffix(SUFFIX)
    paths = Paths(
        out, out.with_name(f"{stem}.dropped{SUFFIX}"), out.with_name(f"{stem}.filter.json")
    )
    data = Path(str(cfg.data.path)).expanduser()
    problems = []
    for path in paths:
        if path.exists() and data.exists() and path.samefile(data):
            problems.append(f"out: {path} is the data itself; name another file")
        elif path.exists() and cfg.overwrite is not True:
            problems.append(f"out: {path} is there already; name another, or set overwrite=true")
        elif path.is_dir():
            problems.append(f"out: {path} is a folder; name a file")
    if problems:
        raise ValueError("\n".join(problems))
    return paths


def _report(
    cfg: DictConfig,
    judge: LinearJudge,
    read: SourceRead,
    *,
    num_kept: int,
    counts: Mapping[str, int],
) -> dict[str, Any]:
    folder = Path(str(cfg.judge)).expanduser()
    return {
        "data": OmegaConf.to_container(cfg.data, resolve=True),
        "judge": {
            "name": judge.name,
            "threshold": judge.threshold,
            "sha256": {name: file_hash(folder / name) for name in (FACTS, WEIGHTS)},
        },
        "num_in": len(read.examples),
        "num_out": num_kept,
        "dropped": dict(counts),
        "bad_rows": [row._asdict() for row in read.skipped],
    }


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="filter")
def _main(cfg: DictConfig) -> None:
    try:
        print(filter_pairs(cfg))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Check the command line, then filter; a problem ends in one clear message."""
    try:
        check_command_line("filter", sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    _main()


if __name__ == "__main__":
    main()
