"""Whole weights out of every kind of checkpoint."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from backtrack import consolidate
from backtrack.checkpoints import all_files, checksums, write_manifest
from backtrack.consolidate import consolidated
from tests.zero_ranks import CLIENT_STATE, KINDS, Tiny, run_ranks, saved

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: pip install 'backtrack-lm[deepspeed]'",
)
WEIGHTS = {"model.up": torch.arange(6.0).view(2, 3), "model.row": torch.ones(3).bfloat16()}


def save_dcp(folder: Path) -> None:
    state = {"state_dict": dict(WEIGHTS), "optimizer_0": {"moment": torch.ones(1000)}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save(CLIENT_STATE, folder / "meta.pt")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


def test_consolidated_file_is_what_was_saved_without_the_optimiser(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(CLIENT_STATE | {"state_dict": WEIGHTS, "optimizer_states": [{"a": 1}]}, path)
    weights, extra = consolidated(path)
    assert_same(weights, WEIGHTS)
    assert extra == CLIENT_STATE


def test_consolidated_dcp_reads_the_weights_alone_in_their_dtype(tmp_path, monkeypatch):
    save_dcp(tmp_path)
    asked = []
    real = consolidate.load_shards

    def load(state: dict, **settings: object) -> None:
        asked.extend(state)
        real(state, **settings)

    monkeypatch.setattr(consolidate, "load_shards", load)
    weights, extra = consolidated(tmp_path)
    assert_same(weights, WEIGHTS)
    assert extra == CLIENT_STATE
    assert sorted(asked) == ["state_dict.model.row", "state_dict.model.up"]


def test_consolidated_names_are_the_modules_own(tmp_path):
    path = tmp_path / "last.ckpt"
    wrapped = {"_forward_module.model.a": torch.ones(1), "module.model.b": torch.zeros(1)}
    torch.save({"state_dict": wrapped}, path)
    assert list(consolidated(path).state_dict) == ["model.a", "model.b"]


@pytest.mark.distributed
def test_consolidated_dcp_of_two_ranks_is_the_sharded_model(tmp_path):
    run_ranks("shard", 2, tmp_path)
    weights, extra = consolidated(tmp_path / "dcp")
    assert_same(weights, torch.load(tmp_path / "dcp.weights"))
    assert "embed.weight" in weights
    assert "frozen.weight" not in weights
    assert extra == CLIENT_STATE


@needs_deepspeed
@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_consolidated_zero_of_two_ranks_is_the_trained_model(kind, tmp_path_factory, capfd):
    folder, _ = saved(tmp_path_factory.getbasetemp())
    weights, extra = consolidated(folder / kind)
    expected = torch.load(folder / f"{kind}.weights")
    trained = {name for name in expected if not name.startswith("frozen")}
    assert weights.keys() == trained | {"scale"}
    for name in trained:
        assert weights[name].dtype == torch.float32
        rounded = weights[name].to(expected[name].dtype)
        torch.testing.assert_close(rounded, expected[name], rtol=0, atol=0)
    torch.testing.assert_close(weights["head.weight"], weights["embed.weight"], rtol=0, atol=0)
    Tiny().load_state_dict(weights, strict=False)
    assert extra.keys() == CLIENT_STATE.keys() | {"lr_schedulers"}
    assert extra.items() >= CLIENT_STATE.items()
    assert capfd.readouterr().out == ""


@needs_deepspeed
@pytest.mark.distributed
def test_consolidated_zero_without_a_ranks_file_is_refused(tmp_path_factory, tmp_path):
    folder, _ = saved(tmp_path_factory.getbasetemp())
    shutil.copytree(folder / "zero2", tmp_path / "zero2")
    next((tmp_path / "zero2/checkpoint").glob("*rank_1_*optim*")).unlink()
    with pytest.raises(ValueError, match=r"Expected 2 of .*optim_states\.pt.* but found 1"):
        consolidated(tmp_path / "zero2")


def test_consolidated_says_what_to_install_where_deepspeed_is_missing(tmp_path, monkeypatch):
    (tmp_path / "latest").write_text("checkpoint")
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"pip install 'backtrack-lm\[deepspeed\]'"):
        consolidated(tmp_path)


def test_consolidated_refuses_what_is_no_whole_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is no finished checkpoint"):
        consolidated(tmp_path / "absent")
    with pytest.raises(ValueError, match="is no finished checkpoint"):
        consolidated(tmp_path)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt cannot be read"):
        consolidated(tmp_path / "text.ckpt")
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="holds no trained weights"):
        consolidated(tmp_path / "other.ckpt")


def test_consolidated_refuses_a_folder_that_lost_a_file_or_was_damaged(tmp_path):
    save_dcp(tmp_path)
    sums = checksums(tmp_path, all_files(tmp_path))
    write_manifest(tmp_path, sums, kind="dcp", world_size=1)
    consolidated(tmp_path)
    (tmp_path / "meta.pt").write_text("x")
    with pytest.raises(ValueError, match="lacks a part of its files"):
        consolidated(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*name another one"):
        consolidated(tmp_path)
