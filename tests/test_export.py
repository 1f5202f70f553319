"""`backtrack.export`: a run's checkpoint becomes a plain folder with the run's logits."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from backtrack import runs
from backtrack.build import make_module, make_tokenizer, untrained_model
from backtrack.config import ConfigError, compose_config
from backtrack.data.world import load_world
from backtrack.export import export, main
from backtrack.tokens import reset_token_id

LORA = "model.lora={r: 2, alpha: 4, dropout: 0.0, target_modules: all-linear}"
IDS = torch.arange(12)[None]


def make_run(folder, *overrides):
    """A run folder as training leaves it after moving every trained weight; returns its logits."""
    cfg = compose_config("train", ["+experiment=tiny_sft", "start_from=null", *overrides])
    tokenizer = make_tokenizer(cfg)
    model = untrained_model(cfg, tokenizer)
    module = make_module(cfg, model, num_steps=1, reset_id=reset_token_id(tokenizer))
    generator = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, folder / runs.CHECKPOINT)
    runs.save_config(folder, cfg)
    with torch.no_grad():
        return module.model.eval()(IDS).logits


def run_export(checkpoint, out):
    return export(compose_config("export", [f"checkpoint={checkpoint}", f"out={out}"]))


@pytest.mark.parametrize("overrides", [[], [LORA]], ids=["full", "lora"])
def test_exported_folder_gives_the_logits_of_the_run(tmp_path, overrides):
    expected = make_run(tmp_path / "run", *overrides)
    folder = run_export(tmp_path / "run", tmp_path / "out")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 if overrides else 0)
    assert load_world(folder) is not None
    again = run_export(tmp_path / "run" / runs.CHECKPOINT, tmp_path / "again")
    first = (folder / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == first


def test_checkpoint_of_another_model_is_refused(tmp_path):
    make_run(tmp_path / "run", LORA)
    make_run(tmp_path / "other", LORA, "seed=1")  # another frozen base under the same adapter
    (tmp_path / "other" / runs.CHECKPOINT).replace(tmp_path / "run" / runs.CHECKPOINT)
    with pytest.raises(ValueError, match=r"another model.*frozen_weights"):
        run_export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: .*has no checkpoints/last\.ckpt"):
        run_export(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint: .*Hugging Face folder already"):
        run_export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("content", [b"not a checkpoint", None])
def test_damaged_checkpoint_is_named(tmp_path, content):
    make_run(tmp_path / "run")
    file = tmp_path / "run" / runs.CHECKPOINT
    if content is None:
        torch.save([1, 2], file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint: .*last\.ckpt"):
        run_export(tmp_path / "run", tmp_path / "out")


def test_export_reports_every_missing_key():
    with pytest.raises(ConfigError) as caught:
        export(compose_config("export", []))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["checkpoint", "out"]


def test_export_command_ends_in_one_message(monkeypatch, tmp_path, capsys):
    make_run(tmp_path / "run")
    command = ["export", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert f"model: {tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: out: .*holds something already"):
        main()


def test_exported_folder_goes_to_the_hub_where_it_is_wanted(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, **settings):
            calls.append(("create", repo_id, settings))

        def upload_folder(self, **settings):
            calls.append(("upload", settings))

    monkeypatch.setattr("backtrack.models.HfApi", Hub)
    make_run(tmp_path / "run")
    options = [f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "push_to_hub=me/mine"]
    out = export(compose_config("export", options))
    assert calls == [
        ("create", "me/mine", {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/mine", "folder_path": out}),
    ]


def test_hub_that_refuses_leaves_the_folder_and_says_what_to_do(tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, repo_id, **settings):
            raise OSError("no network")

    monkeypatch.setattr("backtrack.models.HfApi", Hub)
    make_run(tmp_path / "run")
    options = [f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "push_to_hub=me/mine"]
    with pytest.raises(OSError, match=r"push_to_hub: 'me/mine'.*no network.*hf auth login"):
        export(compose_config("export", options))
    assert (tmp_path / "out/model.safetensors").is_file()
