from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from backtrack.data.load import make_source
from backtrack.data.sources import BadRow, FileSource, Source, SourceRead
from backtrack.data.types import Conversation, PreferenceTriple

ROWS = [
    {"prompt": "Knit a hat?", "chosen": "Yes, in wool.", "rejected": "No."},
    {"prompt": "Mend a kettle?", "chosen": "Solder it,\nthen wait.", "rejected": "Eh."},
    {"prompt": "Weave a t\u00e9?", "chosen": "Slowly.", "rejected": "[RESET]"},
]
TRIPLES = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]


def read(path: Path | str, **changes: Any) -> SourceRead:
    settings: dict[str, Any] = {
        "name": "s",
        "path": str(path),
        "split": None,
        "format": "auto",
        "languages": None,
        "on_bad_row": "raise",
        "limit": None,
    }
    return FileSource(**{**settings, **changes}).read()


def triples(source_read: SourceRead) -> list[tuple[str, str, str]]:
    found = []
    for example in source_read.examples:
        assert isinstance(example, PreferenceTriple)
        found.append((example.prompt[0]["content"], example.safe, example.unsafe))
    return found


def ids(source_read: SourceRead) -> list[str]:
    return [example.example_id for example in source_read.examples]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def json_lines(rows: list[dict[str, Any]] = ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


FORMATS: dict[str, tuple[str, Callable[[Path], object], list[int]]] = {
    "jsonl": ("a.jsonl", lambda path: write(path, json_lines()), [1, 2, 3]),
    "jsonl_blank_lines_crlf_bom": (
        "a.jsonl",
        lambda path: write(path, "\ufeff" + json_lines().replace("\n", "\r\n\r\n")),
        [1, 3, 5],
    ),
    "json_list": ("a.json", lambda path: write(path, json.dumps(ROWS)), [1, 2, 3]),
    "json_indented": ("a.json", lambda path: write(path, json.dumps(ROWS, indent=2)), [1, 2, 3]),
    "json_lines": ("a.json", lambda path: write(path, json_lines()), [1, 2, 3]),
    "csv": (
        "a.csv",
        lambda path: write(
            path,
            'prompt,chosen,rejected\nKnit a hat?,"Yes, in wool.",No.\n\n'
            'Mend a kettle?,"Solder it,\nthen wait.",Eh.\nWeave a t\u00e9?,Slowly.,[RESET]\n',
        ),
        [2, 4, 6],
    ),
    "parquet": ("a.PARQUET", as_parquet, [1, 2, 3]),
}


@pytest.mark.parametrize("case", FORMATS)
def test_file_source_reads_every_format_alike(case: str, tmp_path: Path) -> None:
    name, make, numbers = FORMATS[case]
    make(tmp_path / name)
    found = read(tmp_path / name)
    assert triples(found) == TRIPLES
    assert not found.skipped
    assert ids(found) == [f"s:{number}" for number in numbers]


def test_sources_satisfy_the_protocol(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines())
    source: Source = FileSource(
        name="mine",
        path=str(path),
        split=None,
        format="preference",
        languages=None,
        on_bad_row="raise",
        limit=None,
    )
    assert source.name == "mine"
    assert source.read().examples[0].example_id == "mine:1"


def test_file_source_limit_keeps_the_first(tmp_path: Path) -> None:
    broken_end = write(tmp_path / "a.jsonl", json_lines() + "{")
    assert ids(read(broken_end, limit=2)) == ["s:1", "s:2"]


def test_file_source_split_picks_a_file_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", json_lines())
    write(tmp_path / "test.json", json.dumps(ROWS[:1]))
    assert len(read(tmp_path, split="train").examples) == 3
    assert len(read(tmp_path, split="test").examples) == 1
    for split in (None, "validation"):
        with pytest.raises(ValueError, match=r"data\.path: .* it holds test\.json, train\.jsonl"):
            read(tmp_path, split=split)


def test_file_source_streams_and_ends_with_the_first_bad_row_unless_it_is_skipped(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.jsonl", json_lines() + "{\n" + json_lines() + "{\n")
    for policy, expected in (("raise", [1, 2, 3]), ("skip", [1, 2, 3, 5, 6, 7])):
        noted: list[BadRow] = []
        found = []
        source = make_source("s", {"path": str(path)}, on_bad_row=policy)
        stream = source.stream(noted.append)
        with pytest.raises(ValueError, match="2 bad rows") if policy == "raise" else nullcontext():
            for example in stream:
                assert len(noted) == (len(found) > 2), "one row after the other"
                found.append(example.example_id)
        assert found == [f"s:{line}" for line in expected]
        assert [row.line for row in noted] == [4, 8]


BAD_LINES = [
    (b'{"prompt": "Knit a hat?", "chosen": "Yes."', "broken JSON (Expecting ',' delimiter, column"),
    (b'{"prompt": "Knit a h\xff?"}', "not UTF-8 (byte 21 of the line)"),
    (b'["Knit a hat?"]', "of type list, expected an object with columns"),
    (b'{"prompt": "Knit a hat?", "chosen": "Yes."}', "`rejected` is missing, expected text"),
    (b'{"prompt": "Hat?", "chosen": "", "rejected": "No."}', "`chosen` is empty, expected text"),
    (b'{"prompt": "Hat?", "chosen": "No.", "rejected": "No."}', "both responses are equal"),
    (b"[" * 100_000, "JSON that Python does not read"),
    (b'{"prompt": ' + b"1" * 5000 + b"}", "JSON that Python does not read"),
]


def test_bad_rows_are_all_named_by_file_and_line(tmp_path: Path) -> None:
    good = json_lines(ROWS[:1]).encode()
    lines = b"".join(line + b"\n" + good for line, _ in BAD_LINES)
    path = write(tmp_path / "a.jsonl", good + lines)
    with pytest.raises(ValueError, match=r"data\.on_bad_row=skip") as caught:
        read(path)
    message = str(caught.value)
    assert f"8 bad rows in {path}" in message
    assert "Knit" not in message
    for i, (_, problem) in enumerate(BAD_LINES):
        assert f"{path}:{2 * i + 2}: {problem}" in message

    found = read(path, on_bad_row="skip")
    assert ids(found) == [f"s:{line}" for line in range(1, 18, 2)]
    assert [(row.file, row.line) for row in found.skipped] == [
        (str(path), line) for line in range(2, 18, 2)
    ]
    for row, (_, problem) in zip(found.skipped, BAD_LINES, strict=True):
        assert row.problem.startswith(problem)


def test_bad_rows_listing_is_capped_with_the_total(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n' * 25 + json_lines(ROWS[:1]))
    with pytest.raises(ValueError, match="and 5 more, 25 in all") as caught:
        read(path)
    assert str(caught.value).count(f"\n  {path}:") == 20
    # One that was listed before is not spelt out again.
    assert str(caught.value).count("accepted:") == 1
    assert len(read(path, on_bad_row="skip").skipped) == 25


def test_first_known_row_sets_the_format_of_all(tmp_path: Path) -> None:
    rows = [{"prompt": "Hat?"}, *ROWS[:1], {"prompt": "Hat?", "completion": "Yes."}]
    found = read(write(tmp_path / "a.jsonl", json_lines(rows)), on_bad_row="skip")
    assert ids(found) == ["s:2"]
    assert found.skipped[0].problem.startswith("no format fits the columns prompt; accepted:")
    assert found.skipped[1].problem == "`chosen` is missing, expected text"


def test_format_override_wins_over_the_columns(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hat?"}, {"role": "assistant", "content": "Yes."}]
    path = write(tmp_path / "a.jsonl", json_lines([{**ROWS[0], "messages": messages}]))
    assert isinstance(read(path).examples[0], PreferenceTriple)
    assert isinstance(read(path, format="conversation").examples[0], Conversation)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", '[{"prompt": "Hat?"},\n{"prompt": ]', "a.json:2: broken JSON (Expecting value)"),
        ("a.json", '[\n{"prompt": "Hat?"}', "a.json:2: broken JSON (expected ',' or the end"),
        ("a.json", '[{"prompt": "Hat?"}] 3', "a.json:1: broken JSON (expected ',' or the end"),
        ("a.json", "[\n\n" + "[" * 100_000, "a.json:3: broken JSON (JSON that Python does not"),
        ("a.csv", 'prompt,chosen\nHat?,"Yes.\nCap?,No.\n', "a.csv:2: broken CSV"),
        ("a.parquet", "PAR1", "no readable Parquet after row 0"),
        ("a.jsonl", "", "a.jsonl is empty; expected at least one row"),
        ("a.jsonl", "\n \n", "a.jsonl is empty"),
        ("a.json", "", "a.json is empty"),
        ("a.json", " [ ]\n", "a.json is empty"),
        ("a.csv", "prompt,chosen,rejected\n", "a.csv is empty"),
        ("a.txt", "Hat?", "ends in '.txt'; expected one of .jsonl, .json, .csv, .parquet"),
        ("a", "Hat?", "ends in 'nothing'; expected one of"),
    ],
)
def test_unreadable_file_is_an_error_under_any_policy(
    name: str, text: str, problem: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, text)
    for on_bad_row in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"^data\.path: ") as caught:
            read(path, on_bad_row=on_bad_row)
        assert problem in str(caught.value)
        assert "Hat" not in str(caught.value)


def test_file_without_a_usable_row_is_an_error_even_with_skip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "question,answer\nHat?,Yes.\n")
    with pytest.raises(ValueError, match=r"no row of .* gives an example") as caught:
        read(path, on_bad_row="skip")
    assert f"{path}:2: no format fits the columns question, answer; accepted:" in str(caught.value)


def test_bad_bytes_and_fields_of_csv_and_json_lists_are_bad_rows(tmp_path: Path) -> None:
    rows = b"prompt,chosen,rejected\nHat?,Y\xffs.,No.\nHat?,Yes.\nHat?,Yes.,No.\n"
    found = read(write(tmp_path / "a.csv", rows), on_bad_row="skip")
    assert ids(found) == ["s:4"]
    assert [(row.line, row.problem) for row in found.skipped] == [
        (2, "not UTF-8"),
        (3, "2 fields, expected 3 as in the header"),
    ]
    items = json.dumps([ROWS[0], 3, {**ROWS[0], "chosen": "Y?s"}], indent=0).encode()
    found = read(write(tmp_path / "a.json", items.replace(b"Y?s", b"Y\xffs")), on_bad_row="skip")
    assert ids(found) == ["s:1"]
    assert [(row.line, row.problem) for row in found.skipped] == [
        (7, "item 2: of type int, expected an object with columns"),
        (8, "item 3: `chosen` is not valid UTF-8"),
    ]


def test_missing_file_names_close_matches(tmp_path: Path) -> None:
    write(tmp_path / "kettles.jsonl", json_lines())
    with pytest.raises(ValueError, match=r"data\.path: .*did you mean kettles\.jsonl\?"):
        read(tmp_path / "ketles.jsonl")
    with pytest.raises(ValueError, match=r"data\.path: .*is named alike"):
        read(tmp_path / "0.csv")
    with pytest.raises(ValueError, match=r"data\.path: .*there is no folder .*knitting either"):
        read(tmp_path / "knitting" / "kettles.jsonl")


def test_settings_are_all_checked_at_once() -> None:
    with pytest.raises(ValueError, match=r"data\.format: 'xml' is unknown") as caught:
        read("a.jsonl", name="", format="xml", on_bad_row="ignore", limit=0)
    for key in ("data.name", "data.format", "data.on_bad_row", "data.limit"):
        assert f"{key}: " in str(caught.value)


def message(message_id: str, parent_id: str | None, text: str, **more: Any) -> dict[str, Any]:
    role = "assistant" if parent_id else "prompter"
    row = {"message_id": message_id, "parent_id": parent_id, "role": role, "text": text}
    return {**row, "lang": "en", **more}


def test_oasst_file_left_out_messages_are_listed_but_never_raise(tmp_path: Path) -> None:
    rows = [
        message("p1", None, "Tea?"),
        message("a1", "p1", "Boil.", rank=0),
        message("a2", "p1", "Eh.", rank=1, deleted=True),
    ]
    path = write(tmp_path / "a.jsonl", json_lines(rows))
    found = read(path)
    assert ids(found) == ["s:1"]
    assert found.skipped == [
        BadRow(str(path), 3, "left out: marked deleted, or refused in review"),
    ]
    with pytest.raises(ValueError, match=r"a\.jsonl:4: `text` is missing"):
        read(write(path, json_lines([*rows, {**message("a3", "p1", ""), "text": None}])))
    found = read(write(path, json_lines(rows) + "{"), on_bad_row="skip")
    assert ids(found) == ["s:1"]
    assert [row.line for row in found.skipped] == [3, 4]


def test_languages_are_for_oasst_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.languages: rows of format preference carry no"):
        read(write(tmp_path / "a.jsonl", json_lines()), languages=["en"])


@pytest.mark.parametrize(
    ("file", "kind", "num_examples", "num_skipped", "num_worst"),
    [
        ("hh-rlhf/harmless-base.jsonl", PreferenceTriple, 1890, 10, 0),
        ("oasst/oasst1_en_validation_messages.jsonl", Conversation, 474, 86, 415),
        ("oasst/en_100_tree.jsonl", Conversation, 254, 0, 212),
        ("oasst/pairs-derived.jsonl", Conversation, 2026, 0, 0),
        ("instructions/rasbt.json", Conversation, 1100, 0, 0),
    ],
)
@pytest.mark.shared
def test_real_files_give_known_counts(
    file: str,
    kind: type,
    num_examples: int,
    num_skipped: int,
    num_worst: int,
    shared_dir: Path,
) -> None:
    found = read(shared_dir / "data" / file, on_bad_row="skip")
    assert all(isinstance(example, kind) for example in found.examples)
    assert (len(found.examples), len(found.skipped)) == (num_examples, num_skipped)
    assert len(set(ids(found))) == num_examples
    assert sum(getattr(e, "worst", None) is not None for e in found.examples) == num_worst
