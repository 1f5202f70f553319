"""Where examples come from: local files and data sets of the hub.

A source reads rows (`files.py`), recognises their format and turns each into a `PreferenceTriple`
or a `Conversation` (`rows.py`, `oasst.py`), one after the other, so that memory does not grow with
the file. Rows that cannot be learned from are named by file and line; none is dropped unsaid.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

from backtrack.data.bad_rows import BadRow, Listing, Note
from backtrack.data.files import Record, find_file, read_records
from backtrack.data.oasst import parse_messages
from backtrack.data.rows import (
    NumberedRow,
    RowError,
    RowFormat,
    RowProblem,
    detect_format,
    parse_row,
)
from backtrack.data.types import Example

OnBadRow = Literal["raise", "skip"]


class SourceRead(NamedTuple):
    """What a source holds: its examples, and the rows that gave none, by line."""

    examples: list[Example]
    skipped: list[BadRow]


class Source(Protocol):
    """Something that yields examples; ids are unique within `name` and stable."""

    @property
    def name(self) -> str:
        """Name of the source; starts the ids of its examples."""

    def address(self) -> str:
        """Return text that differs wherever what `stream` yields may differ."""

    def stream(self, note: Note) -> Iterator[Example]:
        """Yield the examples one by one, every time the same; problems are raised at the end."""

    def read(self) -> SourceRead:
        """Return all examples at once, for data that is known to be small."""


def read_all(source: Source) -> SourceRead:
    """Return the examples of `source` and the rows that gave none."""
    skipped: list[BadRow] = []
    examples = list(source.stream(skipped.append))
    return SourceRead(examples, sorted(skipped, key=lambda row: row.line))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """A local file: .jsonl, .json (a list, or lines), .csv or .parquet.

    Attributes:
        name: Starts the example ids: `<name>:<line>` (row number for JSON lists and Parquet).
        path: A file, or a folder with one file per split.
        split: Which file of a folder, e.g. `train`; of no effect where `path` is a file.
        format: What the rows are, `auto` to tell from the columns.
        languages: Language codes to keep, for `oasst` only; None for all.
        on_bad_row: `raise` names all bad rows, `skip` goes on without them.
        limit: Read only this many examples, the first ones; None for all.

    Raises:
        ValueError: If a setting is none of its values; `read` raises it for the data.
    """

    name: str
    path: str
    split: str | None
    format: RowFormat
    languages: Sequence[str] | None
    on_bad_row: OnBadRow
    limit: int | None

    def __post_init__(self) -> None:
        _check_settings(self.name, self.format, self.on_bad_row, self.limit)

    def address(self) -> str:
        """Return the settings and a hash of the content of the file (about 1 GB/s).

        Raises:
            ValueError: If there is no such file, or it cannot be read.
        """
        path = find_file(self.path, split=self.split)
        return _address(self, str(path), _hash_file(path))

    def stream(self, note: Note) -> Iterator[Example]:
        """Yield the examples of the file, row by row.

        A list in `.json` and flat messages of `oasst` are held in memory; all else is not.

        Raises:
            ValueError: If there is no such file, it holds no example, or rows are bad and
                `on_bad_row` is `raise`: after the first of them no example comes any more.
        """
        path = find_file(self.path, split=self.split)
        yield from _stream(self, read_records(path), file=str(path), note=note)

    def read(self) -> SourceRead:
        """Return the examples of the file and the rows that gave none; raises as `stream`."""
        return read_all(self)


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A data set of the Hugging Face hub (or of its cache, with HF_HUB_OFFLINE=1).

    Attributes:
        name: Starts the example ids: `<name>:<row>`, rows from 1.
        path: Repository of the data set, e.g. `OpenAssistant/oasst2`.
        subset: Its configuration, None where it has one only.
        data_dir: Folder of the repository, e.g. `harmless-base` of `Anthropic/hh-rlhf`, or None.
        split: Its split, e.g. `train`.
        revision: Commit or tag: a branch may move between two runs.
        format: See `FileSource`, as for all below.
        languages: See `FileSource`.
        on_bad_row: See `FileSource`.
        limit: See `FileSource`.
    """

    name: str
    path: str
    subset: str | None
    data_dir: str | None
    split: str
    revision: str
    format: RowFormat
    languages: Sequence[str] | None
    on_bad_row: OnBadRow
    limit: int | None

    def __post_init__(self) -> None:
        _check_settings(self.name, self.format, self.on_bad_row, self.limit)
        if not self.revision:
            raise ValueError(
                f"data.sources.{self.name}.revision: none is pinned; give a commit or tag of "
                f"https://huggingface.co/datasets/{self.path}"
            )

    def address(self) -> str:
        """Return the settings and the fingerprint of the data set; downloads what is missing.

        The fingerprint follows the commit, so that a branch that moves is noticed.
        """
        return _address(self, self._file, self._table._fingerprint)

    def stream(self, note: Note) -> Iterator[Example]:
        """Yield the examples of the split; downloads what is missing.

        Raises:
            ValueError: As `FileSource.stream`, or if the hub does not give the data set.
        """
        rows = enumerate(self._table, start=1)
        records = (NumberedRow(number, number, row) for number, row in rows)
        yield from _stream(self, records, file=self._file, note=note)

    def read(self) -> SourceRead:
        """Return the examples of the split and the rows that gave none; raises as `stream`."""
        return read_all(self)

    @property
    def _file(self) -> str:
        return f"{self.path}[{self.split}]"

    @cached_property
    def _table(self) -> Any:
        """The rows, memory-mapped."""
        import datasets  # type: ignore[import-untyped]  # here: local files need not wait for it

        try:
            return datasets.load_dataset(
                self.path,
                self.subset,
                data_dir=self.data_dir,
                split=self.split,
                revision=self.revision,
            )
        except Exception as error:  # the hub, the network and the builders each have their own
            raise ValueError(
                f"data.path: the hub gave no {self.path!r} (subset {self.subset}, data_dir "
                f"{self.data_dir}, split {self.split}, revision {self.revision}): "
                f"{type(error).__name__}: {error}. Check these settings and the network, or give a "
                "local file: data.path=FILE.jsonl"
            ) from error


def parse_records(
    records: Iterable[Record],
    *,
    name: str,
    row_format: RowFormat,
    languages: Sequence[str] | None,
) -> Iterator[Example | RowProblem]:
    """Yield the example of every row, or why it gives none.

    With `auto`, the first row whose columns fit a format sets the format of all.

    Raises:
        ValueError: If languages are asked of rows that have none.
    """
    rest = iter(records)
    for record in rest:
        if isinstance(record, RowProblem):
            yield record
            continue
        try:
            if row_format == "auto":
                row_format = detect_format(record.row)
            if row_format == "oasst":
                break
            if languages is not None:
                raise ValueError(
                    f"data.languages: rows of format {row_format} carry no language; set it to "
                    "null (only oasst rows do)"
                )
            example_id = f"{name}:{record.number}"
            yield parse_row(record.row, row_format=row_format, example_id=example_id)
        except RowError as error:
            yield record.problem(str(error))
    else:
        return
    messages = itertools.chain([record], rest)
    yield from parse_messages(messages, name=name, languages=languages)


def _check_settings(name: str, row_format: str, on_bad_row: str, limit: int | None) -> None:
    problems = []
    if not name:
        problems.append("data.name: empty; give the source a name")
    if row_format not in get_args(RowFormat):
        formats = ", ".join(get_args(RowFormat))
        problems.append(f"data.format: {row_format!r} is unknown; expected one of {formats}")
    if on_bad_row not in get_args(OnBadRow):
        problems.append(f"data.on_bad_row: {on_bad_row!r} is unknown; expected raise or skip")
    if limit is not None and limit < 1:
        problems.append(f"data.limit: {limit} keeps nothing; expected 1 or more, or null for all")
    if problems:
        raise ValueError("\n".join(problems))


def _address(source: FileSource | HubSource, *content: str) -> str:
    languages = None if source.languages is None else list(source.languages)
    settings = (source.name, source.format, languages, source.on_bad_row, source.limit)
    return repr((type(source).__name__, *content, *settings))


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise ValueError(f"data.path: cannot read {path}: {error.strerror or error}") from error


def _stream(
    source: FileSource | HubSource, records: Iterable[Record], *, file: str, note: Note
) -> Iterator[Example]:
    """Yield the examples in `records`; raises what is wrong with them once all were looked at."""
    skipped, faults, num_examples = Listing(), Listing(), 0
    outcomes = parse_records(
        records, name=source.name, row_format=source.format, languages=source.languages
    )
    for outcome in outcomes:
        if isinstance(outcome, RowProblem):
            bad_row = BadRow(file, outcome.line, outcome.problem)
            note(bad_row)
            skipped.add(bad_row)
            if outcome.is_fault and source.on_bad_row == "raise":
                faults.add(bad_row)
            continue
        num_examples += 1
        if not faults.total:
            yield outcome
        if num_examples == source.limit:
            break
    if faults.total:
        raise ValueError(
            f"data.path: {faults.total} bad rows in {file}:\n{faults}\n"
            "Repair them, or leave them out with data.on_bad_row=skip"
        )
    if not num_examples and not skipped.total:
        raise ValueError(f"data.path: {file} is empty; expected at least one row")
    if not num_examples:
        raise ValueError(f"data.path: no row of {file} gives an example:\n{skipped}")
