"""Rows of a local file, read one by one: JSON lines, JSON, CSV, Parquet.

A row that cannot be read is a `RowProblem`; a file of which the rest cannot be read (a broken JSON
list, an open quote in CSV) is a ValueError, whatever the policy for bad rows.
"""

import csv
import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from backtrack.data.rows import NumberedRow, RowProblem

Record = NumberedRow | RowProblem
_BOM = b"\xef\xbb\xbf"


def find_file(path: str, *, split: str | None) -> Path:
    """Return the file at `path`, or the file of `split` where `path` is a folder.

    Raises:
        ValueError: If there is no such file or its format is unknown.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        found = _find_split(found, split)
    if not found.is_file():
        raise ValueError(f"data.path: there is no file {found}; {_suggest(found)}")
    if found.suffix.lower() not in READERS:
        raise ValueError(
            f"data.path: {found} ends in {found.suffix or 'nothing'!r}; expected one of "
            f"{', '.join(READERS)}"
        )
    return found


def read_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a file that `find_file` returned.

    Raises:
        ValueError: If the file cannot be read (to its end).
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise ValueError(f"data.path: cannot read {path}: {error.strerror or error}") from error


def _find_split(folder: Path, split: str | None) -> Path:
    names = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in READERS)
    matches = [name for name in names if split is not None and Path(name).stem == split]
    if len(matches) != 1:
        wanted = (
            "name a file"
            if split is None
            else f"`split` of the source: expected one file {split}.*"
        )
        raise ValueError(
            f"data.path: {folder} is a folder; {wanted}; it holds {', '.join(names) or 'no data'}"
        )
    return folder / matches[0]


def _suggest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = [item.name for item in folder.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"nothing in {folder} is named alike"


def _read_json_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if line.strip():
                yield _parse_line(number, line)


def _parse_line(number: int, line: bytes) -> Record:
    try:
        return _as_record(number, number, json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return RowProblem(number, f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return RowProblem(
            number,
            f"broken JSON ({error.msg}, column {error.colno}), expected one JSON object a line",
        )
    except (ValueError, RecursionError):  # a number of thousands of digits, endless nesting
        return RowProblem(number, "JSON that Python does not read, expected one object a line")


def _as_record(number: int, line: int, value: object) -> Record:
    if isinstance(value, dict):
        return NumberedRow(number, line, value)
    problem = f"of type {type(value).__name__}, expected an object with columns"
    return NumberedRow(number, line, {}).problem(problem)


def _read_json(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        start = next((line for line in file if line.removeprefix(_BOM).strip()), b"")
    if not start.removeprefix(_BOM).lstrip().startswith(b"["):
        yield from _read_json_lines(path)
        return
    # Bytes that are not UTF-8 become halves of surrogate pairs, which rows.check_text refuses.
    yield from _read_list(path, path.read_bytes().decode("utf-8-sig", errors="surrogateescape"))


def _read_list(path: Path, text: str) -> Iterator[Record]:
    """Yield the items of a JSON list, each with the line it starts on."""
    decoder = json.JSONDecoder()
    at, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    for number in itertools.count(1):
        start = _skip_space(text, at)
        if number > 1 and text[start : start + 1] == ",":
            start = _skip_space(text, start + 1)
        elif text[start : start + 1] == "]" and not text[start + 1 :].strip():
            return
        elif number > 1:
            raise _broken_list(path, text, start, "expected ',' or the end of the list")
        line += text.count("\n", at, start)
        try:
            value, at = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _broken_list(path, text, error.pos, error.msg) from None
        except (ValueError, RecursionError):
            raise _broken_list(path, text, start, "JSON that Python does not read") from None
        yield _as_record(number, line, value)
        line += text.count("\n", start, at)


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in {" ", "\t", "\n", "\r"}:
        at += 1
    return at


def _broken_list(path: Path, text: str, at: int, problem: str) -> ValueError:
    line = 1 + text.count("\n", 0, at)
    return ValueError(
        f"data.path: {path}:{line}: broken JSON ({problem}), the rest of the list cannot be read; "
        "repair it, or write one object a line (.jsonl)"
    )


def _read_csv(path: Path) -> Iterator[Record]:
    # Answers of models may be longer than the 128 KiB that a field may have by default; there is
    # no limit of one reader. A quote that is not closed is an error at the end of the file.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        line = 1
        try:
            for fields in reader:
                if header is None:
                    header = fields or None
                elif fields:
                    yield _as_csv_record(line, header, fields)
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"data.path: {path}:{line}: broken CSV ({error}), the rest of the file cannot be "
                "read; look for a quote that is not closed"
            ) from error


def _as_csv_record(line: int, header: list[str], fields: list[str]) -> Record:
    if not _is_utf8(fields):
        return RowProblem(line, "not UTF-8")
    if len(fields) != len(header):
        return RowProblem(line, f"{len(fields)} fields, expected {len(header)} as in the header")
    return NumberedRow(line, line, dict(zip(header, fields, strict=True)))


def _is_utf8(fields: Iterable[str]) -> bool:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[Record]:
    # Here: half a second that other formats need not wait for.
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield NumberedRow(number, number, row)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.path: {path}: no readable Parquet after row {number}; is the file complete?"
        ) from error


READERS: Final[dict[str, Callable[[Path], Iterator[Record]]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
