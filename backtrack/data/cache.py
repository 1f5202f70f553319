"""Encoded examples on disk: memory-mapped Arrow files, found by all that decides their content."""

from __future__ import annotations

import json
import logging
import operator
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from backtrack.data.types import EncodedExample, Turn

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedTokenizerBase

    from backtrack.data.bad_rows import BadRow
    from backtrack.data.encode import Limits

log = logging.getLogger(__name__)

_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("is_harmful", pa.bool_()),
        ("turns", pa.list_(_IDS)),
        ("supervised", pa.list_(pa.bool_())),
        ("safe", _IDS),
        ("unsafe", _IDS),
        ("num_cut", pa.int32()),
    ]
)
CODE = (
    "backtrack.tokens",
    "backtrack.data.bad_rows",
    "backtrack.data.cache",
    "backtrack.data.encode",
    "backtrack.data.files",
    "backtrack.data.oasst",
    "backtrack.data.rows",
    "backtrack.data.sources",
    "backtrack.data.splits",
    "backtrack.data.template",
    "backtrack.data.types",
)
"""Modules between a row and its ids: where one of them changes, examples are encoded anew."""
COUNTS, SKIPPED = "counts.json", "skipped_rows.jsonl"


class Counts(NamedTuple):
    """What preparing a source left out or cut."""

    skipped_rows: int = 0
    truncated_examples: int = 0
    truncated_tokens: int = 0


def encoding_key(
    parts: Iterable[object], *, tokenizer: PreTrainedTokenizerBase, limits: Limits, refusal: str
) -> str:
    """Return the address of an encoding: a hash of all that decides it, this project's code too.

    Args:
        parts: What decides which examples are encoded; told apart by their `repr`.
        tokenizer: Its vocabulary, rules and template count.
        limits: See `encode.py`.
        refusal: See `encode.py`.
    """
    digest = blake2b(code_digest(), digest_size=16)
    core = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((core.to_str() if core is not None else repr(tokenizer)).encode())
    settings = (tokenizer.chat_template, tokenizer.eos_token, limits, refusal, *parts)
    digest.update("\0".join(map(repr, settings)).encode())
    return digest.hexdigest()


@cache
def code_digest() -> bytes:
    """Return a hash of the modules in `CODE`, once: they may be edited while a process runs."""
    digest = blake2b(digest_size=16)
    for name in CODE:
        spec = find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        digest.update(Path(spec.origin).read_bytes())
    return digest.digest()


def to_batch(examples: Sequence[EncodedExample]) -> pa.RecordBatch:
    """Return `examples` as rows of `SCHEMA`."""
    columns = {
        "turns": [[turn.ids for turn in example.turns] for example in examples],
        "supervised": [[turn.is_supervised for turn in example.turns] for example in examples],
    }
    for name in ("example_id", "is_harmful", "safe", "unsafe", "num_cut"):
        columns[name] = [getattr(example, name) for example in examples]
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _from_row(row: dict[str, Any]) -> EncodedExample:
    return EncodedExample(
        example_id=row["example_id"],
        is_harmful=row["is_harmful"],
        turns=tuple(
            Turn(tuple(ids), is_supervised)
            for ids, is_supervised in zip(row["turns"], row["supervised"], strict=True)
        ),
        safe=tuple(row["safe"]),
        unsafe=None if row["unsafe"] is None else tuple(row["unsafe"]),
        num_cut=row["num_cut"],
    )


class EncodedExamples(Sequence[EncodedExample]):
    """The rows of Arrow files, one file after the other, each decoded when it is asked for.

    Only the sizes of the record batches are held in memory (opening reads none of them); a copy in
    another process maps the same files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Map the files.

        Args:
            paths: Of files that an `EncodedWriter` wrote.

        Raises:
            OSError: If one is missing.
            ValueError: If one is damaged.
        """
        self._paths = tuple(paths)
        readers = [pa.ipc.open_file(pa.memory_map(str(path))) for path in paths]
        if any(reader.schema != SCHEMA for reader in readers):
            raise ValueError("the columns are not those of encoded examples")
        self._batches = [(r, number) for r in readers for number in range(r.num_record_batches)]
        sizes = [n for path in paths for n in json.loads(_sizes_file(path).read_text("ascii"))]
        if len(sizes) != len(self._batches):
            raise ValueError("there are not as many record batches as were written")
        self._starts = np.cumsum([0, *sizes], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedExample]: ...
    def __getitem__(self, index: int | slice) -> EncodedExample | list[EncodedExample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place = operator.index(index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"{index} of {len(self)} examples")
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        reader, batch = self._batches[number]
        (row,) = reader.get_batch(batch).slice(place - int(self._starts[number]), 1).to_pylist()
        return _from_row(row)

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodedExamples, (self._paths,)


def _sizes_file(path: Path) -> Path:
    """Return where the rows of each record batch of an Arrow file are listed."""
    return path.with_suffix(".sizes.json")


class EncodedWriter:
    """Writes a folder of encoded examples, one Arrow file a split; used as a context."""

    def __init__(self, folder: Path, splits: Iterable[str]) -> None:
        """Make `folder` anew, with an empty file for each of `splits`."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.counts = Counts()
        self._folder = folder
        self._sizes: dict[str, list[int]] = {split: [] for split in splits}
        with ExitStack() as stack:
            self._files = {
                split: stack.enter_context(pa.ipc.new_file(folder / f"{split}.arrow", SCHEMA))
                for split in self._sizes
            }
            self._skipped = stack.enter_context((folder / SKIPPED).open("w", encoding="utf-8"))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stack.close()
        if kind is None:
            for split, sizes in self._sizes.items():
                file = _sizes_file(self._folder / f"{split}.arrow")
                file.write_text(json.dumps(sizes), encoding="ascii")
            text = json.dumps(self.counts._asdict()) + "\n"
            (self._folder / COUNTS).write_text(text, encoding="utf-8")

    def write(self, split: str, batch: pa.RecordBatch) -> None:
        """Add the rows of `to_batch`."""
        self._files[split].write_batch(batch)
        self._sizes[split].append(batch.num_rows)
        cut = batch.column("num_cut").to_numpy()
        self.counts = self.counts._replace(
            truncated_examples=self.counts.truncated_examples + int((cut > 0).sum()),
            truncated_tokens=self.counts.truncated_tokens + int(cut.sum()),
        )

    def note(self, row: BadRow) -> None:
        """List a row that gives no example."""
        self._skipped.write(json.dumps(row._asdict()) + "\n")
        self.counts = self.counts._replace(skipped_rows=self.counts.skipped_rows + 1)


class EncodedFolder(NamedTuple):
    """What an `EncodedWriter` wrote: the files of the splits, what was left out and how much."""

    files: dict[str, Path]
    skipped: Path
    counts: Counts


def open_encoded(folder: Path, splits: Iterable[str]) -> EncodedFolder | None:
    """Return a folder as it was written, or None where there is none that is whole."""
    if not folder.is_dir():
        return None
    try:
        files = {split: folder / f"{split}.arrow" for split in splits}
        EncodedExamples(tuple(files.values()))
        counts = Counts(**json.loads((folder / COUNTS).read_text(encoding="utf-8")))
        if not (folder / SKIPPED).is_file():
            raise ValueError(f"{SKIPPED} is missing")
    except (OSError, ValueError, TypeError) as error:
        log.warning("encoded examples in %s are not used (%s); made again", folder, error)
        return None
    return EncodedFolder(files, folder / SKIPPED, counts)
