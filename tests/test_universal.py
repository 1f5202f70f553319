"""A DeepSpeed checkpoint that goes on with any number of ranks as if nothing had been."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from backtrack.checkpoints import check, is_complete, partial_of, read_manifest
from backtrack.universal import loading_universal, to_universal
from tests.zero_ranks import KINDS, run_ranks, saved

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: pip install 'backtrack-lm[deepspeed]'",
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, dict[str, list[float]]]:
    folder, losses = saved(tmp_path_factory.getbasetemp())
    for kind in KINDS:
        to_universal(folder / kind, folder / f"{kind}.universal")
    return folder, losses


@needs_deepspeed
@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_universal_checkpoint_goes_on_with_any_number_of_ranks(converted, world):
    folder, expected = converted
    found = run_ranks("load", world, folder)
    for kind in KINDS:
        is_exact = kind != "zero1_bf16" or world == 2
        torch.testing.assert_close(
            found[kind], expected[kind], rtol=0, atol=1e-6 if is_exact else 2e-3
        )


@needs_deepspeed
@pytest.mark.distributed
def test_universal_checkpoint_is_whole_and_holds_no_share_of_rank_0(converted):
    folder, _ = converted
    for kind in KINDS:
        path = folder / f"{kind}.universal"
        assert is_complete(path)
        check(path)
        assert read_manifest(path).kind == "universal"
        assert (path / "latest_universal").read_text() == "checkpoint"
        state = torch.load(path / "checkpoint/zero/optimizer_state.pt", weights_only=False)
        assert "fp32_flat_groups" not in state
        assert [g["weight_decay"] for g in state["param_groups"]] == [0.3, 0.0, 0.0]


@needs_deepspeed
@pytest.mark.distributed
def test_universal_conversion_that_fails_leaves_the_last_one(converted, tmp_path):
    folder, _ = converted
    broken = tmp_path / "broken"
    (broken / "checkpoint").mkdir(parents=True)
    (broken / "latest").write_text("checkpoint")
    out = folder / "zero1.universal"
    with pytest.raises(ValueError, match=r"could not convert .*broken .*as many ranks as wrote it"):
        to_universal(broken, out)
    assert is_complete(out)
    assert not partial_of(out).exists()


@needs_deepspeed
@pytest.mark.distributed
def test_universal_checkpoint_is_refused_where_it_does_not_belong(converted):
    folder, _ = converted

    def engine(stage: int, num_groups: int) -> SimpleNamespace:
        optimizer = SimpleNamespace(param_groups=[{}] * num_groups)
        return SimpleNamespace(
            _config=SimpleNamespace(load_universal_checkpoint=False),
            optimizer=SimpleNamespace(optimizer=optimizer),
            zero_optimization_stage=lambda: stage,
        )

    for kind, stage, num_groups, message in (
        ("zero3", 2, 3, "was written by ZeRO-3"),
        ("zero1", 3, 3, "was written by ZeRO-1"),
        ("zero1", 2, 2, "saved with 3 groups of parameters, the optimiser has 2 here"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            loading_universal(engine(stage, num_groups), folder / f"{kind}.universal"),
        ):
            pass


@needs_deepspeed
def test_universal_conversion_refuses_another_folder(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint of DeepSpeed"):
        to_universal(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
