"""Checkpoint folders: whole or not there, and one of them after a kill at any instant."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from backtrack.checkpoints import (
    MANIFEST,
    check,
    checksums,
    finish_swap,
    fresh_partial,
    is_complete,
    newest_complete,
    old_of,
    own_files,
    partial_of,
    read_manifest,
    swap_into_place,
    write_manifest,
)

NAMES = {
    "latest": 0,
    "checkpoint/mp_rank_00_model_states.pt": 0,
    "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt": 0,
    "checkpoint/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": 1,
    "__12_0.distcp": 12,
    ".metadata": 0,
}


class Killed(BaseException):
    pass


class Kills:
    """Lets the process die before its n-th change of the disk: every later one fails as well."""

    events = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "fsync")

    def __init__(self) -> None:
        self.root: str | None = None
        self.left = self.count = 0
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if self.root is None or event not in self.events:
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.count += 1
        if self.count > self.left:
            raise Killed

    def run(self, work: Callable[[], object], root: Path, after: int) -> bool:
        """Whether `work` ended before it made more than `after` changes."""
        self.root, self.left, self.count = str(root), after, 0
        try:
            work()
        except Killed:
            return False
        finally:
            self.root = None
        return True


@pytest.fixture(scope="module")
def kills() -> Kills:
    return Kills()  # an audit hook stays for the life of the process


@pytest.fixture(autouse=True)
def _audited_fsync(monkeypatch) -> None:
    """A kill may come before a flush too; to flush thousands of times would only take long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: sys.audit("fsync", descriptor))


def fill(folder: Path, step: int) -> None:
    for name in ("checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"step {step}")


def close(folder: Path) -> None:
    sums = checksums(folder, own_files(folder, rank=0))
    write_manifest(folder, sums, kind="deepspeed", world_size=1)


def save(target: Path, step: int) -> None:
    partial = fresh_partial(target)
    fill(partial, step)
    close(partial)
    swap_into_place(partial, target)


def step_of(path: Path) -> int:
    check(path)
    return int((path / "latest").read_text().split()[1]) if path.is_dir() else 0


def newest_step(folder: Path) -> int:
    newest = newest_complete(folder)
    return -1 if newest is None else step_of(newest)


def starts(tmp_path: Path) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Fresh checkpoint folders, before the first save and after one of either kind."""
    yield tmp_path / "none", lambda folder: None
    yield tmp_path / "folder", lambda folder: save(folder / "last.ckpt", 1)
    yield tmp_path / "file", lambda folder: torch.save({}, folder / "last.ckpt")


def test_checkpoint_survives_a_kill_at_every_change_of_the_disk(tmp_path, kills):
    num_kills = 0
    for home, prepare in starts(tmp_path):
        for after in range(1000):
            folder = home / str(after)
            folder.mkdir(parents=True)
            prepare(folder)
            before = newest_step(folder)
            is_done = kills.run(lambda folder=folder: save(folder / "last.ckpt", 2), folder, after)
            if is_done:
                break
            num_kills += 1
            assert newest_step(folder) in (before, 2), after
            save(folder / "last.ckpt", 3)  # the next run goes on as if nothing had been
            assert newest_step(folder) == 3
            assert [p.name for p in folder.iterdir()] == ["last.ckpt"]
    assert num_kills > 30


@pytest.mark.slow
def test_checkpoint_survives_a_second_kill_and_never_grows_older(tmp_path, kills):
    seen = set()
    for first in range(1000):
        is_over = False
        for second in range(1000):
            folder = tmp_path / f"{first}-{second}"
            folder.mkdir()
            save(folder / "last.ckpt", 1)
            is_over = kills.run(lambda folder=folder: save(folder / "last.ckpt", 2), folder, first)
            middle = newest_step(folder)
            is_done = kills.run(lambda folder=folder: save(folder / "last.ckpt", 3), folder, second)
            assert middle <= newest_step(folder) <= 3
            seen.add((middle, newest_step(folder)))
            if is_done or is_over:
                break
        if is_over:
            break
    assert seen == {(1, 1), (1, 3), (2, 2), (2, 3)}


def test_checkpoint_swap_is_finished_at_the_next_start(tmp_path, kills):
    target = tmp_path / "last.ckpt"
    for after in range(1000):
        save(target, 1)
        partial = fresh_partial(target)
        fill(partial, 2)
        close(partial)
        is_done = kills.run(lambda p=partial: swap_into_place(p, target), tmp_path, after)
        expected = newest_step(tmp_path)
        finish_swap(target)
        assert step_of(target) == expected == 2
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
        if is_done:
            break
    assert after > 3


def test_checkpoint_is_complete_with_its_manifest_and_every_byte(tmp_path):
    fill(tmp_path, 1)
    assert not is_complete(tmp_path)
    close(tmp_path)
    assert is_complete(tmp_path)
    check(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text[:-9])
    assert not is_complete(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    (tmp_path / "latest").write_text("step 11")
    assert not is_complete(tmp_path)
    (tmp_path / "latest").unlink()
    assert not is_complete(tmp_path)
    with pytest.raises(ValueError, match=r"latest is missing of 6 bytes; .*resume=null"):
        check(tmp_path)


def test_checkpoint_check_names_the_file_that_changed(tmp_path):
    fill(tmp_path, 1)
    close(tmp_path)
    (tmp_path / "latest").write_text("step 2")  # the same size
    assert is_complete(tmp_path)
    with pytest.raises(ValueError, match=r"latest is damaged .*name another checkpoint"):
        check(tmp_path)
    check(tmp_path, rank=0, num_ranks=2)
    with pytest.raises(ValueError, match="latest is damaged"):
        check(tmp_path, rank=1, num_ranks=2)


def test_checkpoint_check_reads_a_single_file(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"a": torch.arange(1000)}, path)
    check(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert is_complete(path)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        check(path)
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
        check(path)


def test_checkpoint_ranks_share_the_checksums_out(tmp_path):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    shares = {rank: own_files(tmp_path, rank=rank) for rank in range(13)}
    found = {p.relative_to(tmp_path).as_posix(): r for r, share in shares.items() for p in share}
    assert found == NAMES
    sums = {}
    for share in shares.values():
        sums |= checksums(tmp_path, share)
    write_manifest(tmp_path, sums, kind="dcp", world_size=13)
    assert read_manifest(tmp_path) == ("dcp", 13, sums)
    check(tmp_path)


def test_checkpoint_manifest_refuses_a_file_that_nobody_summed(tmp_path):
    fill(tmp_path, 1)
    sums = checksums(tmp_path, own_files(tmp_path, rank=0))
    (tmp_path / "more").touch()
    with pytest.raises(ValueError, match="more is there without a checksum"):
        write_manifest(tmp_path, sums, kind="dcp", world_size=1)
    assert not is_complete(tmp_path)


def test_checkpoint_of_another_format_is_refused(tmp_path):
    fill(tmp_path, 1)
    close(tmp_path)
    text = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(text | {"format": 2}))
    assert not is_complete(tmp_path)
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        read_manifest(tmp_path)


def test_checkpoint_unfinished_one_never_takes_the_place_of_another(tmp_path):
    target = tmp_path / "last.ckpt"
    save(target, 1)
    partial = fresh_partial(target)
    fill(partial, 2)
    with pytest.raises(ValueError, match="not complete"):
        swap_into_place(partial, target)
    assert newest_complete(tmp_path) == target
    assert step_of(target) == 1


def test_checkpoint_that_was_about_to_be_deleted_is_found_if_it_is_the_last(tmp_path):
    target = tmp_path / "last.ckpt"
    save(target, 1)
    target.rename(old_of(target))
    target.mkdir()  # and never finished
    assert newest_complete(tmp_path) == old_of(target)
    finish_swap(target)
    assert newest_complete(tmp_path) == target
    assert step_of(target) == 1


def test_checkpoint_newest_is_none_where_there_is_none(tmp_path):
    assert newest_complete(tmp_path) is None
    assert newest_complete(tmp_path / "absent") is None
    (tmp_path / "last.ckpt").mkdir()
    assert newest_complete(tmp_path) is None
    assert partial_of(tmp_path / "a") != old_of(tmp_path / "a")
