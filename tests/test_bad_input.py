"""Bad data through the whole of `train`: a clear error before weights load, or a list of skips."""

from __future__ import annotations

import json

import pytest

from backtrack.train import train
from tests.tiny_runs import config_of, overrides_of, start_command

GOOD = {"prompt": "How do I clean a kettle?", "chosen": "With vinegar.", "rejected": "With mud."}
BAD = {  # line -> what is written there, and what is said of it
    3: (b'{"prompt": "A kettle?", "chosen"', "broken JSON"),
    5: (json.dumps({"prompt": "A kettle?", "chosen": "Yes."}).encode(), "rejected"),
    7: (json.dumps({**GOOD, "rejected": GOOD["chosen"]}).encode(), "equal"),
    9: (json.dumps({**GOOD, "chosen": "  "}).encode(), "empty"),
    11: (b'{"prompt": "A k\xff\xfettle?"}', "not UTF-8"),
}


def write_data(tmp_path, *, is_bad=True):
    lines = [
        json.dumps({**GOOD, "prompt": f"How do I clean kettle {i} [RESET]?"}).encode()
        for i in range(60)
    ]
    for line, (raw, _) in BAD.items() if is_bad else ():
        lines[line - 1] = raw
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def own_data(tmp_path, *more, is_bad=True, **settings):
    path = write_data(tmp_path, is_bad=is_bad)
    more = (f"data.path={path}", "data.max_prompt_tokens=80", "data.max_tokens=400", *more)
    return path, config_of(tmp_path, *more, **settings)


def test_bad_rows_are_named_by_file_and_line_before_weights_load(tmp_path, monkeypatch):
    monkeypatch.setattr("backtrack.build.load_model", pytest.fail)
    path, cfg = own_data(tmp_path)
    with pytest.raises(ValueError, match=r"data\.path: 5 bad rows in") as caught:
        train(cfg)
    for line, (_, said) in BAD.items():
        listed = [part for part in str(caught.value).splitlines() if f"{path}:{line}: " in part]
        assert len(listed) == 1
        assert said in listed[0]
    assert "data.on_bad_row=skip" in str(caught.value)


@pytest.mark.parametrize("experiment", ["tiny_sft", "tiny_dpo"])
def test_bad_rows_are_skipped_and_listed_where_asked(tmp_path, experiment):
    more = ("data.on_bad_row=skip", "data.limit.validation=null")
    path, cfg = own_data(tmp_path, *more, experiment=experiment, steps=2)
    result = train(cfg)
    report = json.loads((result.folder / "data.json").read_text())
    assert report["skipped_rows"] == 5
    assert report["train"]["data"] + report["validation"] + report["test"] == 55
    listed = [json.loads(line) for line in (result.folder / "skipped_rows.jsonl").open()]
    assert [(row["file"], row["line"]) for row in listed] == [(str(path), line) for line in BAD]


def test_literal_reset_in_a_data_file_is_text_in_every_batch(tmp_path):
    from backtrack.build import make_data, make_tokenizer
    from backtrack.tokens import reset_token_id

    _, cfg = own_data(tmp_path, "data.backtrack=false", is_bad=False)
    tokenizer = make_tokenizer(cfg)
    data = make_data(cfg, tokenizer, tmp_path)
    reset = reset_token_id(tokenizer)
    trees = data.all_trees()
    assert trees
    for tree in trees:
        ids = [i for segment in tree.segments for i in segment.ids]
        assert reset not in ids
        assert "[RESET]" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.path=missing.jsonl",), "data.path: there is no file missing.jsonl"),
        (("data.path=kettles",), "data.path: there is no file kettles"),
        (("data.path=owner/kettles",), "data.revision: data.path=owner/kettles is no file here"),
        (("data.split={train: 0.5, validation: 0.1, test: 0.1}", "own"), "data.split: "),
        (("data.format=kettles", "own"), "data.format: 'kettles' is unknown"),
        (("data.world.num_items=2",), "data.world.num_items: 2 is not in"),
        (("model.path=/no/such/model",), "model.path: there is no folder '/no/such/model'"),
    ],
)
def test_bad_settings_are_named_before_weights_load(tmp_path, monkeypatch, overrides, said):
    monkeypatch.setattr("backtrack.build.load_model", pytest.fail)
    own = [f"data.path={write_data(tmp_path, is_bad=False)}"] if "own" in overrides else []
    given = [item for item in overrides if item != "own"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- looked at below
        train(config_of(tmp_path, *own, *given))
    assert said in str(caught.value)


@pytest.mark.parametrize("token", ["eos_token", "pad_token"])
def test_tokenizer_without_eos_or_pad_is_refused_before_weights_load(tmp_path, monkeypatch, token):
    from tests.tiny import byte_tokenizer, tiny_model

    monkeypatch.setattr("backtrack.build.load_model", pytest.fail)
    tokenizer = byte_tokenizer()
    setattr(tokenizer, token, None)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"model\.{token}: the tokenizer has no"):
        train(config_of(tmp_path, f"model.path={tmp_path / 'model'}"))


@pytest.mark.slow
def test_bad_data_ends_the_command_with_one_message_and_no_traceback(tmp_path):
    path = write_data(tmp_path)
    process = start_command("train", overrides_of(tmp_path, f"data.path={path}"))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stdout == ""
    assert stderr.count("error: ") == 1
    assert f"{path}:3: broken JSON" in stderr
    assert "Traceback" not in stderr
    assert "Error executing job" not in stderr


def test_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    from backtrack.modules import checkpoint_io
    from tests.tiny_runs import assert_same_end, checkpoint_of

    save, calls = checkpoint_io.torch.save, []

    def fill_up(checkpoint, file):
        calls.append(checkpoint["global_step"])
        if checkpoint["global_step"] == 4:
            file.write(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:603] file write failed")
        save(checkpoint, file)

    monkeypatch.setattr(checkpoint_io.torch, "save", fill_up)
    with pytest.raises(OSError, match="could not write the checkpoint"):
        train(config_of(tmp_path, steps=6))
    assert 4 in calls
    run = next(p for p in (tmp_path / "logs/train/tiny_sft").iterdir() if not p.is_symlink())
    assert checkpoint_of(run)["global_step"] == 2
    monkeypatch.undo()
    resumed = train(config_of(tmp_path, "resume=auto", steps=6))
    assert resumed.folder == run
    whole = train(config_of(tmp_path, f"paths.log_dir={tmp_path / 'whole'}", steps=6))
    assert_same_end(whole.folder, run)
