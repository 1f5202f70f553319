"""The best checkpoint becomes a plain folder; the trained weights stay as they are."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from backtrack.callbacks import hf_export
from backtrack.callbacks.hf_export import HFExport
from backtrack.callbacks.interrupt import GracefulInterrupt
from backtrack.config import compose_config
from backtrack.data.world import load_world
from backtrack.export import export
from backtrack.tokens import add_reset_token
from backtrack.train import train
from tests.modules.builders import sft_module
from tests.tiny import byte_tokenizer, tiny_model
from tests.tiny_runs import LORA, checkpoint_of, config_of

TOKENIZER = byte_tokenizer()
add_reset_token(TOKENIZER, None)
IDS = torch.arange(12)[None]
HF_EXPORT = (
    "+callbacks.hf_export._target_=backtrack.callbacks.hf_export.HFExport",
    "+callbacks.hf_export.folder=${paths.run_dir}/best",
    "+callbacks.hf_export.world=${oc.select:data.world,null}",
)


def logits_of(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def run_of(folder, *, best="best.ckpt", monitor="val/loss", callbacks=()):
    """(trainer, module) at the end of a run whose best weights were 1 less than its last ones."""
    module = sft_module(tiny_model()).train()
    state = {name: weight - 1 for name, weight in module.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, folder / "best.ckpt")
    checkpoint = ModelCheckpoint(dirpath=folder, monitor=monitor)
    checkpoint.best_model_path = best and str(folder / best)
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(tokenizer=TOKENIZER),
        callbacks=[*callbacks, checkpoint],
        checkpoint_callbacks=[checkpoint],
        is_global_zero=True,
        waited=[],
    )
    trainer.strategy = SimpleNamespace(barrier=trainer.waited.append)
    return trainer, module


def files_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "best.ckpt")


@pytest.mark.parametrize("more", [(), (LORA,)], ids=["full", "lora"])
def test_best_folder_is_what_the_export_command_makes_of_the_best_checkpoint(tmp_path, more):
    # The worst validation counts as the best one: the loss falls, so it is the first.
    first = ("callbacks.best_checkpoint.mode=max", "trainer.val_every_n_steps=1")
    rate = ("optimizer.learning_rate=0.01", "optimizer.warmup_fraction=0.0")
    result = train(config_of(tmp_path, *HF_EXPORT, *first, *rate, *more, steps=3))
    best = result.folder / "checkpoints" / "best.ckpt"
    assert checkpoint_of(result.folder, "best.ckpt")["global_step"] == 1
    by_hand = export(compose_config("export", [f"checkpoint={best}", f"out={tmp_path / 'out'}"]))
    torch.testing.assert_close(
        logits_of(result.folder / "best"), logits_of(by_hand), rtol=0, atol=1e-6
    )
    assert load_world(result.folder / "best") is not None
    # The last model is that of the last checkpoint, not of the best one.
    last = export(
        compose_config("export", [f"checkpoint={result.folder}", f"out={tmp_path / 'l'}"])
    )
    assert torch.equal(logits_of(result.model), logits_of(last))
    assert not torch.allclose(logits_of(result.model), logits_of(by_hand))


def test_trained_weights_come_back_bit_for_bit(tmp_path):
    trainer, module = run_of(tmp_path)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    HFExport(folder=str(tmp_path / "best"), world=None).on_train_end(trainer, module)
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    assert all(part.training for part in module.model.modules())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "best").state_dict()
    norm = "model.norm.weight"
    assert torch.equal(exported[norm], before[f"model.{norm}"] - 1)
    assert len(trainer.waited) == 1


def test_folder_of_an_earlier_part_of_the_run_is_replaced(tmp_path):
    trainer, module = run_of(tmp_path)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "stale").write_text("")
    (tmp_path / ".best.partial").mkdir()  # of a kill
    HFExport(folder=str(tmp_path / "best"), world=None).on_train_end(trainer, module)
    assert files_of(tmp_path) == ["best"]
    assert not (tmp_path / "best" / "stale").exists()
    assert (tmp_path / "best" / "model.safetensors").is_file()


def test_a_failure_warns_and_leaves_folder_and_weights_as_they_were(tmp_path, monkeypatch, caplog):
    trainer, module = run_of(tmp_path)
    (tmp_path / "best").mkdir()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    save = hf_export.export_state

    def fail(*args):
        save(*args)
        raise OSError("no space left on device")

    monkeypatch.setattr(hf_export, "export_state", fail)
    HFExport(folder=str(tmp_path / "best"), world=None).on_train_end(trainer, module)
    assert "was not written (OSError: no space left on device)" in caplog.text
    assert files_of(tmp_path) == ["best"]
    assert not list((tmp_path / "best").iterdir())
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    assert len(trainer.waited) == 1


def interrupted():
    callback = GracefulInterrupt()
    callback.was_interrupted = True
    return callback


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"monitor": None}, "no checkpoint watches a metric (callbacks.best_checkpoint was left"),
        ({"best": ""}, "val/loss was never measured"),
        ({"best": "gone.ckpt"}, "val/loss was never measured"),
        ({"callbacks": [interrupted()]}, "the run was interrupted"),
    ],
)
def test_nothing_to_export_is_said_in_one_line(tmp_path, caplog, settings, reason):
    trainer, module = run_of(tmp_path, **settings)
    with caplog.at_level(logging.INFO, logger=hf_export.__name__):
        HFExport(folder=str(tmp_path / "best"), world=None).on_train_end(trainer, module)
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert files_of(tmp_path) == []
    assert len(trainer.waited) == 1


def test_other_ranks_only_wait(tmp_path):
    trainer, module = run_of(tmp_path)
    trainer.is_global_zero = False
    HFExport(folder=str(tmp_path / "best"), world=None).on_train_end(trainer, module)
    assert files_of(tmp_path) == []
    assert len(trainer.waited) == 1
