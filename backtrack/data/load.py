"""From `conf/data` to encoded examples: which sources, what of them, and what was left out."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from backtrack.data.cache import SKIPPED, Counts, EncodedExamples
from backtrack.data.encode import Limits
from backtrack.data.encode_pool import Encoder
from backtrack.data.pipeline import Choice, prepare
from backtrack.data.sources import FileSource, HubSource
from backtrack.data.splits import check_fractions, is_kept

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from backtrack.data.sources import Source
    from backtrack.data.types import EncodedExample

log = logging.getLogger(__name__)
Item = TypeVar("Item")

SPLITS = ("train", "validation", "test")

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]{2,}")  # .jsonll, .txt; not the .5 of owner/data-v1.5


class LoadedData(NamedTuple):
    """Encoded examples of a run, memory-mapped.

    Attributes:
        names: Of the training sources.
        train: Examples of each training source.
        validation: Of all sources together.
        test: Of all sources together; empty where validation has sources of its own.
        skipped: Files that list the rows that gave no example, one JSON object a line.
        counts: What was left out or cut.
    """

    names: list[str]
    train: list[Sequence[EncodedExample]]
    validation: Sequence[EncodedExample]
    test: Sequence[EncodedExample]
    skipped: list[Path]
    counts: Counts


def make_source(name: str, section: Mapping[str, Any], *, on_bad_row: str) -> Source:
    """Return a file source where `path` is or looks like a file or folder, else one of the hub.

    Args:
        name: Of the source.
        section: `path` and, where wanted, `format`, `split`, `languages`, `limit`, `revision`,
            `subset`, `data_dir`.
        on_bad_row: `raise` or `skip`.

    Raises:
        ValueError: For keys that neither source has.
    """
    given = dict(section)
    shared: dict[str, Any] = {
        "name": name,
        "path": str(given.pop("path")),
        "format": given.pop("format", "auto"),
        "languages": given.pop("languages", None),
        "limit": given.pop("limit", None),
        "on_bad_row": on_bad_row,
    }
    split = given.pop("split", "train")
    hub = {key: given.pop(key, None) for key in ("subset", "data_dir", "revision")}
    if given:
        raise ValueError(f"data.sources.{name}: unknown keys {', '.join(sorted(given))}")
    if _is_local(shared["path"]):
        return FileSource(**shared, split=split)
    if not hub["revision"]:
        where = "data" if name == "data" else f"data.sources.{name}"
        raise ValueError(
            f"{where}.revision: {where}.path={shared['path']} is no file here, and a data set of "
            "the hub needs a pinned revision; correct the path, or give a commit or tag of "
            f"https://huggingface.co/datasets/{shared['path']}"
        )
    return HubSource(**shared, split=split, **hub)


def _is_local(path: str) -> bool:
    """Return whether `path` is there, or cannot be an id of the hub (`owner/name`)."""
    found = Path(path).expanduser()
    is_file_name = _FILE_SUFFIX.fullmatch(found.suffix) is not None
    return found.exists() or _HUB_ID.fullmatch(path) is None or is_file_name


def load_data(
    train: Sequence[Source],
    validation: Sequence[Source] | None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    seed: int,
    cache_dir: Path,
    show_progress: bool = False,
) -> LoadedData:
    """Return the encoded examples of a run.

    Args:
        train: Training sources.
        validation: Held-out sources; None splits validation and test off the training sources.
        tokenizer: With a chat template.
        settings: The `data` section: `split`, `limit`, `max_prompt_tokens`, `max_response_tokens`,
            `refusal`, `on_bad_row`.
        seed: Of the split.
        cache_dir: Encoded examples live in its folder `encoded`.
        show_progress: Show a bar while examples are encoded, where standard error is a terminal.

    Raises:
        ValueError: If rows are bad and `on_bad_row` is `raise`, or no training example is left.
    """
    fractions: Mapping[str, float] = {"train": 1.0} if validation is not None else settings["split"]
    check_fractions(fractions)
    if unknown := fractions.keys() - {*SPLITS}:
        raise ValueError(f"data.split: {min(unknown)!r} is none of {', '.join(SPLITS)}")
    limits = Limits(settings["max_prompt_tokens"], settings["max_response_tokens"])
    encoder = Encoder(tokenizer, limits, settings["refusal"], settings["on_bad_row"])
    jobs = [(source, Choice(fractions, settings["limit"], seed)) for source in train]
    held_out = Choice({"validation": 1.0}, settings["limit"], seed)
    jobs += [(source, held_out) for source in validation or ()]
    found = prepare(jobs, encoder, cache_dir=cache_dir, show_progress=show_progress)

    def of(split: str) -> EncodedExamples:
        return EncodedExamples([part.files[split] for part in found if split in part.files])

    if not len(of("train")):
        raise ValueError(
            "data.split: no training example is left; give more data, or a larger share to train"
        )
    return LoadedData(
        names=[source.name for source in train],
        train=[EncodedExamples([part.files["train"]]) for part in found[: len(train)]],
        validation=of("validation"),
        test=of("test"),
        skipped=[part.skipped for part in found],
        counts=Counts(*map(sum, zip(*(part.counts for part in found), strict=True))),
    )


def spread(items: Sequence[Item], most: int | None) -> list[Item]:
    """Return at most `most` items, evenly spread over the list so that no part is favoured."""
    total = len(items)
    return [item for place, item in enumerate(items) if is_kept(place, total=total, most=most)]


def write_report(data: LoadedData, folder: Path) -> None:
    """Write what was read, cut and left out: `data.json` and `skipped_rows.jsonl`, and log it."""
    report = {
        "train": dict(zip(data.names, map(len, data.train), strict=True)),
        "validation": len(data.validation),
        "test": len(data.test),
        **data.counts._asdict(),
    }
    (folder / "data.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with (folder / SKIPPED).open("wb") as file:
        for path in data.skipped:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)
    log.info("data: %s", json.dumps(report))
