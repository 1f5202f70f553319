"""From the `data` section to encoded examples, and what is said of what is left out."""

from __future__ import annotations

import json

import pytest

from backtrack.data.encode import encode_example
from backtrack.data.load import load_data, make_source, spread, write_report
from backtrack.data.sources import FileSource, HubSource
from backtrack.tokens import add_reset_token, reset_token_id
from tests.tiny import byte_tokenizer

SETTINGS = {
    "split": {"train": 0.5, "validation": 0.25, "test": 0.25},
    "limit": {"train": None, "validation": None},
    "max_prompt_tokens": 64,
    "max_response_tokens": 16,
    "refusal": "No.",
    "on_bad_row": "raise",
}


def write_rows(path, number=24, text="How do I clean kettle {}?"):
    rows = [
        {"prompt": text.format(i), "chosen": "With vinegar.", "rejected": f"With mud {i}."}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path, name="crafts", on_bad_row="raise"):
    return make_source(name, {"path": str(path)}, on_bad_row=on_bad_row)


def load(
    tmp_path, train, validation=None, *, seed=0, tokenizer=None, show_progress=False, **changes
):
    return load_data(
        train,
        validation,
        tokenizer=tokenizer or byte_tokenizer(),
        settings={**SETTINGS, **changes},
        seed=seed,
        cache_dir=tmp_path / "cache",
        show_progress=show_progress,
    )


def contents(loaded):
    """What a run reads, decoded."""
    return [[*part] for part in (*loaded.train, loaded.validation, loaded.test)]


def test_load_splits_every_example_into_one_part(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    loaded = load(tmp_path, [source(path)])
    ids = [e.example_id for e in (*loaded.train[0], *loaded.validation, *loaded.test)]
    assert sorted(ids) == sorted(f"crafts:{i}" for i in range(1, 25))
    assert loaded.names == ["crafts"]
    again = load(tmp_path, [source(path)])
    assert contents(again) == contents(loaded)
    other = load(tmp_path, [source(path)], seed=1)
    assert {e.example_id for e in other.train[0]} != {e.example_id for e in loaded.train[0]}


def test_load_takes_all_of_the_training_sources_where_validation_has_its_own(tmp_path):
    train = source(write_rows(tmp_path / "train.jsonl", 6))
    held_out = source(write_rows(tmp_path / "val.jsonl", 5), "held_out")
    loaded = load(tmp_path, [train], [held_out], limit={"train": 4, "validation": 2})
    assert [e.example_id for e in loaded.train[0]] == [f"crafts:{i}" for i in (1, 2, 4, 5)]
    assert [e.example_id for e in loaded.validation] == ["held_out:1", "held_out:3"]
    assert not loaded.test


def test_spread_takes_evenly_and_keeps_the_order():
    assert spread(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    assert spread([1, 2, 3], 5) == spread([1, 2, 3], None) == [1, 2, 3]


def test_load_of_a_limit_takes_evenly_from_each_split(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 200)
    whole = load(tmp_path, [source(path)])
    some = load(tmp_path, [source(path)], limit={"train": 7, "validation": 3})
    assert [*some.train[0]] == spread(whole.train[0], 7)
    assert [*some.validation] == spread(whole.validation, 3)
    assert [*some.test] == [*whole.test]


@pytest.mark.parametrize("total", [1, 2, 7, 30, 100])
@pytest.mark.parametrize("most", [1, 2, 3, 29, 30, 99, 101, None])
def test_spread_takes_item_i_times_total_over_most(total, most):
    wanted = (
        range(total) if most is None or most >= total else [i * total // most for i in range(most)]
    )
    assert spread(range(total), most) == list(wanted)


def test_load_refuses_a_split_of_another_name(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 2)
    with pytest.raises(ValueError, match=r"data\.split: 'dev' is none of train, validation, test"):
        load(tmp_path, [source(path)], split={"train": 0.5, "dev": 0.5})


def test_load_looks_through_every_source_before_it_encodes_one(tmp_path, monkeypatch):
    good = write_rows(tmp_path / "good.jsonl", 3)
    bad = write_rows(tmp_path / "bad.jsonl", 3)
    bad.write_text(bad.read_text() + "{oops\n", encoding="utf-8")
    monkeypatch.setattr("backtrack.data.encode_pool.encode_example", pytest.fail)
    with pytest.raises(ValueError, match=r"bad\.jsonl:4: broken JSON"):
        load(tmp_path, [source(good), source(bad, "others")])
    assert not (tmp_path / "cache").exists()


def test_load_names_an_example_that_cannot_be_encoded(tmp_path, monkeypatch):
    def refuse(example, *args, **kwargs):
        if example.example_id == "crafts:2":
            raise ValueError("a response has no token of its own: expected some text")
        return encode_example(example, *args, **kwargs)

    monkeypatch.setattr("backtrack.data.encode_pool.encode_example", refuse)
    path, all_train = write_rows(tmp_path / "rows.jsonl", 3), {"train": 1.0}
    with pytest.raises(ValueError, match=r"data\.path: crafts:2: a response .*on_bad_row=skip"):
        load(tmp_path, [source(path)], split=all_train)
    assert not [*(tmp_path / "cache").rglob("*.arrow")]
    for _ in range(2):  # the second time from the cache, which lists it as well
        tolerant = source(path, on_bad_row="skip")
        loaded = load(tmp_path, [tolerant], split=all_train, on_bad_row="skip")
        write_report(loaded, tmp_path)
        (listed,) = (tmp_path / "skipped_rows.jsonl").read_text().splitlines()
        assert json.loads(listed)["file"] == "crafts:2"
        assert json.loads((tmp_path / "data.json").read_text())["skipped_rows"] == 1
        assert sum(map(len, contents(loaded))) == 2


def test_load_without_training_examples_says_so(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 2)
    with pytest.raises(ValueError, match=r"data\.split: no training example is left"):
        load(tmp_path, [source(path)], split={"train": 0.0, "validation": 1.0})


def test_load_counts_what_was_cut_and_lists_what_was_left_out(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 3)
    long = {"prompt": "A kettle?", "chosen": "Vinegar. " * 9, "rejected": "Mud."}
    path.write_text(path.read_text() + "{oops\n" + json.dumps(long) + "\n", encoding="utf-8")
    for _ in range(2):  # encoded, and from the cache
        loaded = load(
            tmp_path,
            [source(path, on_bad_row="skip")],
            split={"train": 1.0, "validation": 0.0, "test": 0.0},
            on_bad_row="skip",
        )
    write_report(loaded, tmp_path)
    report = json.loads((tmp_path / "data.json").read_text())
    # Stripped 80 bytes and the end of turn; 16 stay.
    assert report == {
        "train": {"crafts": 4},
        "validation": 0,
        "test": 0,
        "skipped_rows": 1,
        "truncated_examples": 1,
        "truncated_tokens": 65,
    }
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").open()]
    assert [(row["file"], row["line"]) for row in listed] == [(str(path), 4)]
    assert "broken JSON" in listed[0]["problem"]


def test_load_keeps_a_literal_reset_in_a_file_as_text(tmp_path):
    tokenizer = byte_tokenizer()
    add_reset_token(tokenizer, None)
    reset = reset_token_id(tokenizer)
    path = write_rows(tmp_path / "rows.jsonl", text="Is [RESET] a kettle? <|im_end|> {}")
    loaded = load(tmp_path, [source(path)], tokenizer=tokenizer)
    for example in (*loaded.train[0], *loaded.validation, *loaded.test):
        ids = [*(i for turn in example.turns for i in turn.ids), *example.safe, *example.unsafe]
        assert reset not in ids
        assert ids.count(tokenizer.eos_token_id) <= 3, "one for each turn's true end"
        assert list(b"[RESET]") != ids
        assert "[RESET]" in tokenizer.decode(example.turns[0].ids)


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "data/rows.jsonll", "rows", "./rows", "/no/where", "~/rows", "a/b/c"]
)
def test_make_source_takes_what_is_no_hub_id_for_a_file(path):
    made = make_source("data", {"path": path}, on_bad_row="raise")
    assert isinstance(made, FileSource)
    with pytest.raises(ValueError, match=r"data\.path: there is no file"):
        made.read()


def test_make_source_takes_an_existing_folder_for_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "crafts" / "kettles-v1.5").mkdir(parents=True)
    made = make_source("data", {"path": "crafts/kettles-v1.5"}, on_bad_row="raise")
    assert isinstance(made, FileSource)


@pytest.mark.parametrize(("name", "key"), [("data", "data"), ("harmful", "data.sources.harmful")])
def test_make_source_of_the_hub_needs_a_revision(name, key):
    section = {"path": "crafts/kettles-v1.5"}
    with pytest.raises(ValueError, match=f"{key}.revision: {key}.path=crafts/kettles-v1.5 is no"):
        make_source(name, section, on_bad_row="raise")
    made = make_source(name, {**section, "revision": "abc"}, on_bad_row="raise")
    assert isinstance(made, HubSource)


def test_make_source_refuses_unknown_keys():
    with pytest.raises(ValueError, match=r"data\.sources\.harmful: unknown keys splitt"):
        make_source("harmful", {"path": "rows.jsonl", "splitt": "train"}, on_bad_row="raise")
