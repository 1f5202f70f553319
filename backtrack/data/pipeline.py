"""From sources to encoded examples on disk: streamed, on all cores, once for all processes.

Two passes over the rows. The first counts the examples of each split and finds the bad rows, before
anything is encoded; the second encodes those that the limits keep. Neither holds more than a few
chunks of examples in memory.
"""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm  # type: ignore[import-untyped]

from backtrack.data.bad_rows import BadRow
from backtrack.data.cache import EncodedWriter, encoding_key, open_encoded
from backtrack.data.encode_pool import encode_chunks, num_cores
from backtrack.data.splits import is_kept, split_of
from backtrack.locks import locked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from backtrack.data.bad_rows import Note
    from backtrack.data.cache import EncodedFolder
    from backtrack.data.encode_pool import Encoder
    from backtrack.data.sources import Source
    from backtrack.data.types import Example

CHUNK = 256
"""Examples that a process encodes at a time, and rows of a record batch at most."""
FEW = 4096
"""Fewer examples are encoded in this process: starting others takes longer than a second."""


class Choice(NamedTuple):
    """Which examples of a source are encoded, as what.

    Attributes:
        fractions: Share of each split; see `splits.split_of`.
        most: Examples of each split at most, evenly spread; absent or None for all.
        seed: Of the split.
    """

    fractions: Mapping[str, float]
    most: Mapping[str, int | None]
    seed: int

    def parts(self) -> list[object]:
        """Return what the choice depends on: no seed where there is only one split."""
        used = {name: share for name, share in self.fractions.items() if share > 0}
        most = {name: self.most.get(name) for name in used}
        return [used, most, self.seed if len(used) > 1 else None]


def prepare(
    jobs: Sequence[tuple[Source, Choice]],
    encoder: Encoder,
    *,
    cache_dir: Path,
    show_progress: bool,
) -> list[EncodedFolder]:
    """Return the encoded examples of each job, from the cache where it holds them.

    Every source is looked through before the first is encoded. Of several processes one encodes,
    and the others wait for it.

    Raises:
        ValueError: If rows are bad, or examples cannot be encoded, and are not to be skipped.
    """
    folders = [_folder(source, choice, encoder, cache_dir) for source, choice in jobs]
    found = [
        open_encoded(folder, choice.fractions)
        for folder, (_, choice) in zip(folders, jobs, strict=True)
    ]
    totals = [
        Counter() if ready else count_splits(source, choice)
        for ready, (source, choice) in zip(found, jobs, strict=True)
    ]
    numbers = [_num_kept(total, choice) for total, (_, choice) in zip(totals, jobs, strict=True)]
    with tqdm(
        total=sum(numbers),
        desc="encoding",
        unit=" examples",
        unit_scale=True,
        disable=None if show_progress and any(numbers) else True,  # None: where nobody looks
    ) as bar:
        for place, (source, choice) in enumerate(jobs):
            if found[place] is None:
                chosen = Chosen(source, choice, totals[place], numbers[place])
                found[place] = _make(folders[place], chosen, encoder, bar)
    return [folder for folder in found if folder is not None]


def _folder(source: Source, choice: Choice, encoder: Encoder, cache_dir: Path) -> Path:
    key = encoding_key(
        [source.address(), encoder.on_bad_row, *choice.parts()],
        tokenizer=encoder.tokenizer,
        limits=encoder.limits,
        refusal=encoder.refusal,
    )
    return cache_dir / "encoded" / key


def count_splits(source: Source, choice: Choice) -> Counter[str]:
    """Return the number of examples of each split.

    Raises:
        ValueError: See `Source.stream`.
    """
    return Counter(
        split_of(example, fractions=choice.fractions, seed=choice.seed)
        for example in source.stream(_forget)
    )


def _forget(row: BadRow) -> None:
    """Leave a bad row to the second pass, which lists it."""


def _num_kept(totals: Mapping[str, int], choice: Choice) -> int:
    return sum(
        min(total, total if (most := choice.most.get(split)) is None else most)
        for split, total in totals.items()
    )


class Chosen(NamedTuple):
    """The examples of a source that a choice keeps.

    Attributes:
        source: Whose.
        choice: Which.
        totals: Examples of each split before the limits.
        number: Those that are kept.
    """

    source: Source
    choice: Choice
    totals: Mapping[str, int]
    number: int

    def stream(self, note: Note) -> Iterator[tuple[str, Example]]:
        """Yield each example with its split; `note` is told of bad rows."""
        seen: Counter[str] = Counter()
        fractions, most, seed = self.choice
        for example in self.source.stream(note):
            split = split_of(example, fractions=fractions, seed=seed)
            place = seen[split]
            seen[split] += 1
            if is_kept(place, total=self.totals[split], most=most.get(split)):
                yield split, example


def _make(folder: Path, chosen: Chosen, encoder: Encoder, bar: tqdm[Any]) -> EncodedFolder:
    """Return `folder`, encoded by this process or by one that was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        found = open_encoded(folder, chosen.choice.fractions)
        if found is not None:
            return found
        partial = folder.with_name(f".{folder.name}")
        try:
            _write(partial, chosen, encoder, bar)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        found = open_encoded(folder, chosen.choice.fractions)
        assert found is not None
        return found


def _write(folder: Path, chosen: Chosen, encoder: Encoder, bar: tqdm[Any]) -> None:
    num_processes = 1 if chosen.number < FEW else num_cores()
    with EncodedWriter(folder, chosen.choice.fractions) as writer:
        chunks = _chunked(chosen.stream(writer.note))
        for chunk in encode_chunks(chunks, encoder, num_processes=num_processes):
            for example_id, problem in chunk.problems:
                if encoder.on_bad_row == "raise":
                    raise ValueError(
                        f"data.path: {example_id}: {problem}. Repair it, or leave such rows out "
                        "with data.on_bad_row=skip"
                    )
                writer.note(BadRow(example_id, 0, problem))
            for split, batch in chunk.batches.items():
                writer.write(split, batch)
            bar.update(chunk.num_examples)


def _chunked(items: Iterable[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    rest = iter(items)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk
