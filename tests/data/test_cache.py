"""Encoded examples on disk: made once, found again, never stale, and copied into no memory."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from backtrack.data import cache, encode_pool
from backtrack.data.cache import EncodedExamples, EncodedWriter, open_encoded, to_batch
from tests.data.test_load import contents, source, write_rows
from tests.data.test_load import load as load_rows
from tests.modules.builders import some_examples
from tests.test_layers import imported_names, ours, sources, texts_of
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer

TEXT = "How do I clean {} kettle?"
CHANGES = {
    "nothing": {},
    "prompt limit": {"max_prompt_tokens": 9},
    "response limit": {"max_response_tokens": 9},
    "template": {"template": CHAT_TEMPLATE.replace("content'] +", "content'] + ' ' +")},
    "text": {"text": "How do I dry {} kettle?"},
    "vocabulary": {"token": True},
    "name": {"name": "others"},
    "limit": {"limit": {"train": 1, "validation": None}},
    "split": {"split": {"train": 1.0}},
    "seed": {"seed": 1},
    "refusal": {"refusal": "Never."},
    "policy": {"on_bad_row": "skip"},
    "policy of the source": {"source_policy": "skip"},
}
SAME_IDS = {
    "refusal",
    "policy",
    "policy of the source",
}  # triples need no refusal, and none of the rows is bad


@pytest.fixture
def counted(monkeypatch):
    """Example ids that are really encoded."""
    ids = []
    encode = encode_pool.encode_example

    def count(example, *args, **kwargs):
        ids.append(example.example_id)
        return encode(example, *args, **kwargs)

    monkeypatch.setattr(encode_pool, "encode_example", count)
    return ids


def read(tmp_path, *, text=TEXT, template=CHAT_TEMPLATE, name="crafts", **rest):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if rest.pop("token", False):
        tokenizer.add_tokens(["kettle"])
    path = write_rows(tmp_path / "rows.jsonl", 6, text)
    made = source(path, name, on_bad_row=rest.pop("source_policy", "raise"))
    return contents(load_rows(tmp_path, [made], tokenizer=tokenizer, **rest))


@pytest.mark.parametrize("change", CHANGES)
def test_cache_is_hit_by_the_same_and_missed_by_anything_else(tmp_path, counted, change):
    first = read(tmp_path)
    assert len(counted) == 6
    second = read(tmp_path, **CHANGES[change])
    if change == "nothing":
        assert len(counted) == 6
        assert second == first
    else:
        assert len(counted) > 6
        assert change in SAME_IDS or second != first


def test_cache_does_not_ask_for_the_seed_where_nothing_is_split(tmp_path, counted):
    read(tmp_path, split={"train": 1.0, "test": 0.0})
    read(tmp_path, split={"train": 1.0, "test": 0.0}, seed=1)
    assert len(counted) == 6


def test_cache_is_missed_by_other_code(tmp_path, counted, monkeypatch):
    read(tmp_path)
    monkeypatch.setattr(cache, "code_digest", lambda: b"of tomorrow")
    read(tmp_path)
    assert len(counted) == 12


def test_cache_key_holds_all_code_between_a_row_and_its_ids():
    modules = sources()
    texts, reached = texts_of(modules), set()
    pending = ["backtrack.data.sources", "backtrack.data.encode", "backtrack.data.cache"]
    pending.append("backtrack.data.splits")
    while pending:
        module = pending.pop()
        if module not in reached and not module.endswith("__init__"):
            reached.add(module)
            found = (ours(name, modules) for _, name in imported_names(texts[module], module))
            pending += [name for name in found if name]
    assert reached == {*cache.CODE}


def written(folder, *parts):
    with EncodedWriter(folder, ["train", "test"]) as writer:
        for part in parts:
            writer.write("train", to_batch(part))
    return open_encoded(folder, ["train", "test"])


def test_encoded_examples_are_a_sequence_of_what_was_written(tmp_path):
    examples = some_examples(7)
    examples[0] = replace(examples[0], num_cut=7)
    examples[3] = replace(examples[3], unsafe=None)
    found = written(tmp_path / "one", examples[:4], examples[4:])
    assert found.counts == cache.Counts(0, 1, 7)
    rows = EncodedExamples([found.files["train"]])
    assert len(rows) == 7
    assert [*rows] == examples
    assert [rows[i] for i in range(-7, 7)] == examples + examples
    assert rows[2:6:3] == examples[2:6:3]
    for index in (7, -8):
        with pytest.raises(IndexError):
            rows[index]
    twice = EncodedExamples([found.files["train"], found.files["test"], found.files["train"]])
    assert [*twice] == examples + examples
    copy = pickle.dumps(rows)
    assert len(copy) < 500, "a copy for another process maps the file"
    assert [*pickle.loads(copy)] == examples
    assert open_encoded(tmp_path / "two", ["train"]) is None


@pytest.mark.parametrize("damage", ["cut", "missing", "text", "no counts", "other sizes"])
def test_cache_that_is_damaged_is_made_again(tmp_path, counted, damage, caplog):
    first = read(tmp_path)
    patterns = {"no counts": "counts.json", "other sizes": "*.sizes.json"}
    for path in (tmp_path / "cache").rglob(patterns.get(damage, "*.arrow")):
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-200])
        elif damage in ("missing", "no counts"):
            path.unlink()
        elif damage == "other sizes":
            path.write_text("[1, 2, 3]")
        else:
            path.write_text("kettle")
    assert read(tmp_path) == first
    assert "made again" in caplog.text
    assert len(counted) == 12
    assert read(tmp_path) == first
    assert len(counted) == 12
