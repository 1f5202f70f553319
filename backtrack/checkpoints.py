"""Checkpoints that many processes write: whole or not there, and one of them at every instant.

A checkpoint is a file (renamed into place when it is written) or a folder. A folder is complete
once it holds `MANIFEST`, which is written last and lists every other file. All ranks save so:

    partial = fresh_partial(last)              rank 0; then all ranks write into `partial`
    sums = checksums(partial, own_files(...))  each rank; rank 0 gathers them
    write_manifest(partial, sums, ...)         rank 0
    swap_into_place(partial, last)             rank 0
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MANIFEST = "manifest.json"
FORMAT = 1
KINDS = ("deepspeed", "dcp", "universal")
REMEDY = "name another checkpoint, or resume=null to start anew"

# DeepSpeed's and torch.distributed.checkpoint's names say which rank wrote a file.
_RANK = re.compile(r"zero_pp_rank_(\d+)_|__(\d+)_\d+\.distcp$")
_CHUNK = 1 << 22  # bytes read at a time


class Sum(NamedTuple):
    """What a file holds: its size in bytes and the CRC-32 of its content."""

    size: int
    crc32: int


class Manifest(NamedTuple):
    """What is known of a complete folder.

    Attributes:
        kind: Who wrote it, one of `KINDS`.
        world_size: Ranks that wrote it.
        files: Sums by path relative to the folder, with "/" between its parts.
    """

    kind: str
    world_size: int
    files: dict[str, Sum]


def all_files(folder: Path) -> list[Path]:
    """Return the files of `folder` that a manifest has to list: all but itself."""
    mine = {MANIFEST, f".{MANIFEST}.partial"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in mine)


def own_files(folder: Path, *, rank: int) -> list[Path]:
    """Return the files of `folder` that `rank` wrote; those whose name tells no rank are rank 0's.

    So every file is of exactly one rank, and is read by the machine that has it in its cache.
    """
    return [path for path in all_files(folder) if _rank_of(path) == rank]


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, Sum]:
    """Return the sums of `files` by their name in `folder`, and flush them to the disk.

    Reads each file once: about a second for a gigabyte.
    """
    return {path.relative_to(folder).as_posix(): _sum(path, flush=True) for path in files}


def write_manifest(folder: Path, sums: Mapping[str, Sum], *, kind: str, world_size: int) -> Path:
    """Write the manifest that makes `folder` complete, and return it.

    Args:
        folder: Of the checkpoint; every other file is there already.
        sums: What the ranks' calls of `checksums` gave, merged.
        kind: One of `KINDS`.
        world_size: Ranks that wrote it.

    Raises:
        ValueError: If `sums` is not of exactly the files that are there.
    """
    assert kind in KINDS, kind
    here = {path.relative_to(folder).as_posix() for path in all_files(folder)}
    odd = sorted(here ^ set(sums))
    if odd:
        raise ValueError(
            f"{folder}: {', '.join(odd[:3])} is there without a checksum, or the other way round; "
            "the ranks do not see the same files: put paths.log_dir on a disk that they share"
        )
    text = {
        "format": FORMAT,
        "kind": kind,
        "world_size": world_size,
        "files": {name: {"size": s.size, "crc32": f"{s.crc32:08x}"} for name, s in sums.items()},
    }
    target = folder / MANIFEST
    partial = folder / f".{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(text, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
    _sync(folder)
    return target


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder.

    Raises:
        ValueError: If there is none, or not one that this version reads.
    """
    path = folder / MANIFEST
    try:
        text: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if text["format"] != FORMAT:
            raise ValueError(
                f"resume: {path} has format {text['format']}, this version reads {FORMAT}; use the "
                "version of backtrack-lm that wrote it"
            )
        files = {name: Sum(s["size"], int(s["crc32"], 16)) for name, s in text["files"].items()}
        return Manifest(text["kind"], text["world_size"], files)
    except FileNotFoundError as error:
        raise ValueError(
            f"resume: {folder} has no {MANIFEST}: it was never finished; {REMEDY}"
        ) from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"resume: {path} cannot be read ({error!r}); {REMEDY}") from error


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint is there with every file in its size; reads no content."""
    if path.is_file():
        return True
    try:
        manifest = read_manifest(path)
    except ValueError:
        return False
    return not any(_size(path / name) != s.size for name, s in manifest.files.items())


def check(path: Path, *, rank: int = 0, num_ranks: int = 1) -> None:
    """Read a checkpoint and raise unless it is what was written.

    Args:
        path: A file or a folder.
        rank: Which share of the files to read.
        num_ranks: Into how many shares they are dealt, so that no rank reads all of them.

    Raises:
        ValueError: With the first file that is missing, too short or changed.
    """
    if path.is_file():
        if rank == 0:
            _check_file(path)
        return
    files = sorted(read_manifest(path).files.items())
    for name, expected in files[rank::num_ranks]:
        file = path / name
        size = _size(file)
        if size != expected.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"resume: {file} {found} of {expected.size} bytes; {REMEDY}")
        found_sum = _sum(file, flush=False)
        if found_sum != expected:
            raise ValueError(
                f"resume: {file} is damaged (its checksum is {found_sum.crc32:08x}, "
                f"{expected.crc32:08x} was written); {REMEDY}"
            )


def partial_of(target: Path) -> Path:
    """Return the folder in which the checkpoint `target` grows."""
    return target.with_name(f".{target.name}.partial")


def old_of(target: Path) -> Path:
    """Return where the checkpoint that `target` replaces stays until it has."""
    return target.with_name(f".{target.name}.old")


def fresh_partial(target: Path) -> Path:
    """Return an empty folder to write the next `target` to; what a kill left is put in order."""
    finish_swap(target)
    partial = partial_of(target)
    _remove(partial)
    partial.mkdir(parents=True)
    return partial


def swap_into_place(partial: Path, target: Path) -> None:
    """Put the complete `partial` in the place of `target`, whose last state is then deleted.

    Killed at any instant, it leaves a complete checkpoint that `newest_complete` finds, and never
    an older one than before.

    Raises:
        ValueError: If `partial` is not complete; nothing has changed then.
    """
    if not is_complete(partial):
        raise ValueError(f"{partial}: it is not complete; {target} stays as it was")
    old = old_of(target)
    if _exists(target):
        _remove(old)
        target.rename(old)
    partial.rename(target)
    _sync(target.parent)
    _remove(old)


def finish_swap(target: Path) -> None:
    """Bring `target` to what `newest_complete` finds, after a kill; otherwise change nothing."""
    newest = newest_complete(target.parent, target.name)
    if newest == partial_of(target):
        swap_into_place(newest, target)
    elif newest == old_of(target):
        _remove(target)
        newest.rename(target)
        _sync(target.parent)
    elif newest == target:
        _remove(old_of(target))


def newest_complete(folder: Path, name: str = "last.ckpt") -> Path | None:
    """Return the newest complete checkpoint among `name` and what swaps leave, or None.

    Args:
        folder: The checkpoints of a run.
        name: Of the checkpoint.
    """
    target = folder / name
    # A complete partial was about to replace the target, which replaced the old one.
    candidates = (partial_of(target), target, old_of(target))
    return next((path for path in candidates if is_complete(path)), None)


def _rank_of(path: Path) -> int:
    match = _RANK.search(path.name)
    return int(match[1] or match[2]) if match else 0


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _sum(path: Path, *, flush: bool) -> Sum:
    size = crc32 = 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc32 = zlib.crc32(buffer[:count], crc32)
            size += count
        if flush:
            os.fsync(file.fileno())
    return Sum(size, crc32)


def _check_file(path: Path) -> None:
    """Raise unless every record of a file of torch.save has the checksum it was written with."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"resume: {path} cannot be read ({error}); {REMEDY}") from error
    if damaged:
        raise ValueError(f"resume: {path} is damaged (in {damaged}); {REMEDY}")


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _remove(path: Path) -> None:
    """Delete a file or a folder if it is there; a half deleted folder is no complete one."""
    if path.is_dir() and not path.is_symlink():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make renames in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
