"""A table of log-probs on disk: found by content, filled by several processes, memory-mapped.

A folder holds `index.npy`, (3, N) int64: sorted hashes of (epoch, example id), and where the
log-probs of each begin and end in `values.f32`. What nobody has computed is NaN there, so that a
killed pass goes on where it stopped. `checksum` comes last: a table without it is not finished.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from backtrack.locks import locked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from backtrack.data.types import Tree

log = logging.getLogger(__name__)

INDEX, VALUES, CHECKSUM, CLAIMS = "index.npy", "values.f32", "checksum", "claims"


class TableIndex(NamedTuple):
    """Where the log-probs of each tree stand.

    Attributes:
        key: Address of the table: a hash of reference weights, dtype and token ids of the trees.
        entries: (3, N) int64, see above.
        starts: (N + 1,) int64, where the log-probs of tree n begin, in the order of the trees.
    """

    key: str
    entries: NDArray[np.int64]
    starts: NDArray[np.int64]


def index_trees(trees: Sequence[Tree], *, fingerprint: str, dtype: str) -> TableIndex:
    """Return the index of a table of `trees`; reads each tree once and holds 48 bytes of it.

    Raises:
        ValueError: If two examples have one id, since the table could not tell them apart.
    """
    digest = blake2b(f"v2\0{fingerprint}\0{dtype}\0".encode(), digest_size=16)
    names, contents, counts = np.empty((3, len(trees)), dtype=np.int64)
    for number, tree in enumerate(trees):
        content = _digest(tree)
        digest.update(content)
        names[number] = _hash(tree.epoch, tree.example_id)
        contents[number] = int.from_bytes(content[:8], "big", signed=True)
        counts[number] = len(tree.paths)
    order = np.argsort(names, kind="stable")
    clashes = (np.diff(names[order]) == 0) & (np.diff(contents[order]) != 0)
    if clashes.any():
        clash = trees[int(order[1:][clashes][0])]
        raise ValueError(
            f"data.sources: two examples have the id {clash.example_id!r}; give each source "
            "of training and validation a name of its own"
        )
    starts = np.zeros(len(trees) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    entries = np.stack([names[order], starts[:-1][order], starts[1:][order]])
    return TableIndex(digest.hexdigest(), entries, starts)


def _digest(tree: Tree) -> bytes:
    digest = blake2b(digest_size=16)
    digest.update(f"{tree.epoch}\0{tree.example_id}\0{tree.paths}\0{tree.pairs}\0".encode())
    for segment in tree.segments:
        digest.update(np.asarray(segment.ids, dtype=np.int64).tobytes())
        digest.update(b"|")
    return digest.digest()


def _hash(epoch: int, example_id: str) -> int:
    """Return 64 bits of (epoch, example id); among 10 million, two agree with a chance of 3e-6."""
    digest = blake2b(f"{epoch}\0{example_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class ReferenceTable:
    """(epoch, example id) -> summed branch log-prob of each path, float32, nats; memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Map a finished table."""
        self._folder = folder
        self._names, self._starts, self._stops = np.load(folder / INDEX, mmap_mode="r")
        self._values = np.memmap(folder / VALUES, dtype=np.float32, mode="r")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, key: tuple[int, str]) -> NDArray[np.float32]:
        name = _hash(*key)
        place = int(np.searchsorted(self._names, name))
        if place == len(self._names) or self._names[place] != name:
            raise KeyError(key)
        return np.array(self._values[self._starts[place] : self._stops[place]])

    def __reduce__(self) -> tuple[Any, ...]:
        return ReferenceTable, (self._folder,)  # a copy in another process maps the same files


def open_table(folder: Path, index: TableIndex) -> ReferenceTable | None:
    """Return the finished table in `folder`, or None after making sure that one is begun there.

    What is damaged is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        table = load_table(folder)
        if table is None and not _is_begun(folder, index):
            _begin(folder, index)
        return table


def load_table(folder: Path) -> ReferenceTable | None:
    """Return the finished table in `folder`; None where there is none, or it is damaged."""
    if not (folder / CHECKSUM).exists():
        return None
    try:
        if (folder / CHECKSUM).read_text(encoding="ascii") != _checksum(folder):
            raise ValueError("it is not as it was written")
        return ReferenceTable(folder)
    except (OSError, ValueError) as error:
        log.warning("reference cache %s is not used (%s); it is made again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _checksum(folder: Path) -> str:
    digests = []
    for name in (INDEX, VALUES):
        with (folder / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return " ".join(digests)


class PartialTable:
    """A table in the making, shared by all processes that fill it; used as a context.

    Log-probs are written in windows of consecutive trees. Who claims a window computes it, and
    whoever waits for the claim finds it computed, or computes it where the claimer was killed.
    """

    def __init__(self, folder: Path, index: TableIndex) -> None:
        """Go on with what `open_table` left in `folder`."""
        self._folder, self._starts = folder, index.starts
        self._file = os.open(folder / VALUES, os.O_RDWR)

    def __enter__(self) -> PartialTable:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def claim(self, window: range, *, is_waiting: bool) -> AbstractContextManager[bool]:
        """Hold a window against other processes; yields whether it is held."""
        return locked(self._folder / CLAIMS, place=window.start, is_waiting=is_waiting)

    def is_computed(self, window: range) -> bool:
        """Return whether the log-probs of all trees in `window` are there."""
        first, last = self._bounds(window)
        content = os.pread(self._file, last - first, first)
        return not np.isnan(np.frombuffer(content, dtype=np.float32)).any()

    def write(self, window: range, values: NDArray[np.float32]) -> None:
        """Set the log-probs of the trees in `window`, and wait until the disk has them."""
        first, last = self._bounds(window)
        assert values.nbytes == last - first
        os.pwrite(self._file, values.astype(np.float32).tobytes(), first)
        os.fsync(self._file)

    def finish(self) -> None:
        """Declare the table complete."""
        partial = self._folder / f".{CHECKSUM}.{platform.node()}.{os.getpid()}"
        partial.write_text(_checksum(self._folder), encoding="ascii")
        partial.replace(self._folder / CHECKSUM)

    def _bounds(self, window: range) -> tuple[int, int]:
        return 4 * int(self._starts[window.start]), 4 * int(self._starts[window.stop])


def _is_begun(folder: Path, index: TableIndex) -> bool:
    try:
        size = (folder / VALUES).stat().st_size
        return size == 4 * index.starts[-1] and np.array_equal(
            np.load(folder / INDEX, mmap_mode="r"), index.entries
        )
    except (OSError, ValueError, EOFError):
        return False


def _begin(folder: Path, index: TableIndex) -> None:
    """Make `folder` with nothing computed; it appears whole or not at all."""
    partial = folder.with_name(f".{folder.name}")
    for path in (folder, partial):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir()
    np.save(partial / INDEX, index.entries)
    nothing = np.full(1 << 20, np.nan, dtype=np.float32)
    with (partial / VALUES).open("wb") as file:
        for first in range(0, int(index.starts[-1]), len(nothing)):
            file.write(nothing[: int(index.starts[-1]) - first].tobytes())
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder)
