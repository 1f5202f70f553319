"""Rows to encoded examples: alike on any number of processes, in little memory, after kills."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from backtrack.data import encode_pool, pipeline
from backtrack.data.encode import encode_example
from backtrack.data.load import write_report
from tests.data.test_load import contents, load, source, write_rows

ROOT = Path(__file__).resolve().parents[2]
SLOW = pytest.mark.slow


@pytest.fixture
def many(monkeypatch):
    """Small data takes the way of large data: chunks of 16 examples, two processes."""
    monkeypatch.setattr(pipeline, "CHUNK", 16)
    monkeypatch.setattr(pipeline, "FEW", 0)
    monkeypatch.setattr(pipeline, "num_cores", lambda: 2)


def arrow_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.arrow"))}


@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("spawn", marks=SLOW), pytest.param("forkserver", marks=SLOW)],
)
def test_encoding_does_not_depend_on_the_number_of_processes(tmp_path, many, monkeypatch, method):
    path = write_rows(tmp_path / "rows.jsonl", 300)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        spread_out = load(tmp_path / "two", [source(path)], limit={"train": 100})
    finally:
        multiprocessing.set_start_method(before, force=True)
    monkeypatch.setattr(pipeline, "num_cores", lambda: 1)
    alone = load(tmp_path / "one", [source(path)], limit={"train": 100})
    assert contents(spread_out) == contents(alone)
    assert arrow_files(tmp_path / "two") == arrow_files(tmp_path / "one")
    assert "TOKENIZERS_PARALLELISM" in os.environ, "the tests' own setting is back"


def whereabouts(example, *args, **kwargs):
    """Encode every example but those whose number ends in 7; these tell who was to encode them."""
    if example.example_id.endswith("7"):
        raise ValueError(f"process {os.getpid()}")
    return encode_example(example, *args, **kwargs)


def test_examples_that_other_processes_cannot_encode_are_listed(tmp_path, many, monkeypatch):
    monkeypatch.setattr(encode_pool, "encode_example", whereabouts)
    path = write_rows(tmp_path / "rows.jsonl", 300)
    tolerant = source(path, on_bad_row="skip")
    loaded = load(tmp_path, [tolerant], split={"train": 1.0}, on_bad_row="skip")
    assert len(loaded.train[0]) == 270
    write_report(loaded, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").open()]
    assert [row["file"] for row in rows] == [f"crafts:{i}" for i in range(7, 300, 10)]
    assert f"process {os.getpid()}" not in {row["problem"] for row in rows}
    with pytest.raises(ValueError, match=r"data\.path: crafts:7: process .*on_bad_row=skip"):
        load(tmp_path, [source(path)], split={"train": 1.0})


def test_few_examples_are_encoded_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(encode_pool, "ProcessPoolExecutor", pytest.fail)
    monkeypatch.setattr(pipeline, "num_cores", lambda: 2)
    load(tmp_path, [source(write_rows(tmp_path / "rows.jsonl", 300))])


def test_chunks_are_read_only_as_far_ahead_as_processes_need(tmp_path):
    taken = []

    def chunks():
        for number in range(100):
            taken.append(number)
            yield []

    encoded = encode_pool.encode_chunks(chunks(), object(), num_processes=2)
    next(encoded)
    assert len(taken) <= 5
    encoded.close()


def test_second_process_waits_and_takes_what_the_first_has_made(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", 20)
    made = []
    write, lock = pipeline._write, pipeline.locked

    @contextmanager
    def lock_after_another(where):
        monkeypatch.setattr(pipeline, "locked", lock)
        load(tmp_path, [source(path)])  # by the first process, while this one waits
        assert made == [1]
        with lock(where):
            yield

    monkeypatch.setattr(pipeline, "locked", lock_after_another)
    monkeypatch.setattr(pipeline, "_write", lambda *args: (made.append(1), write(*args)))
    found = load(tmp_path, [source(path)])
    assert sum(map(len, contents(found))) == 20
    assert made == [1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("screen", "is_wanted", "is_shown"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_progress_is_shown_on_a_terminal_only(tmp_path, monkeypatch, screen, is_wanted, is_shown):
    path, stderr = write_rows(tmp_path / "rows.jsonl", 20), screen()
    monkeypatch.setattr(sys, "stderr", stderr)
    load(tmp_path, [source(path)], show_progress=is_wanted)
    assert ("encoding: 100%" in stderr.getvalue()) == is_shown
    again = screen()
    monkeypatch.setattr(sys, "stderr", again)
    load(tmp_path, [source(path)], show_progress=is_wanted)
    assert again.getvalue() == "", "there is nothing to wait for"


SCRIPT = """
import os, signal, sys
from pathlib import Path
from backtrack.data import cache, pipeline
from tests.data.test_load import load, source

folder, rows, event = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
pipeline.num_cores, pipeline.FEW = lambda: 2, 0
write, calls = cache.EncodedWriter.write, []

def write_some(self, *args):
    write(self, *args)
    calls.append(1)
    if len(calls) == 5 and event == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(calls) == 5 and event == "ctrl_c":
        os.killpg(os.getpid(), signal.SIGINT)

cache.EncodedWriter.write = write_some
if event != "none":
    pipeline.CHUNK = 16
try:
    load(folder, [source(rows)])
except KeyboardInterrupt:
    sys.exit(130)
status = Path("/proc/self/status")  # getrusage counts what the parent had before exec
if status.exists():
    print(*(line.split()[1] for line in status.open() if line.startswith("VmHWM")))
"""


def run_script(folder, rows, event):
    """Its output comes to an end only after its last process has."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(rows), event],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        start_new_session=True,
        check=False,
    )


@SLOW
@pytest.mark.parametrize(("event", "code"), [("kill", -signal.SIGKILL), ("ctrl_c", 130)])
def test_encoding_that_is_ended_half_way_leaves_no_process_and_is_made_again(tmp_path, event, code):
    path = write_rows(tmp_path / "rows.jsonl", 600)
    done = run_script(tmp_path, path, event)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    left = [path.name for path in (tmp_path / "cache" / "encoded").iterdir()]
    assert all(name.startswith(".") for name in left), "nothing looks complete"
    loaded = load(tmp_path, [source(path)])
    assert sum(map(len, contents(loaded))) == 600
    folders = [item for item in (tmp_path / "cache" / "encoded").iterdir() if item.is_dir()]
    assert len(folders) == 1


@SLOW
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux")
def test_preparing_more_rows_takes_no_more_memory(tmp_path):
    peaks, question = [], "How do I clean kettle {}, " + 40 * "gently " + "again?"
    for number in (1_000, 20_000):
        path = write_rows(tmp_path / f"{number}.jsonl", number, question)
        done = run_script(tmp_path / str(number), path, "none")
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1000)
    # 19,000 more examples as objects would be 30 MB, encoded ones 100 MB.
    assert peaks[1] < peaks[0] + 10, f"{peaks} MB"
