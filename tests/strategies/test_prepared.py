"""A prepared folder is read by each rank for its share, under LoRA as well."""

from __future__ import annotations

import pytest

from tests.strategies.ranks import figures_of, on_ranks, run_ranks

pytestmark = pytest.mark.distributed
LORA = "model.lora={r: 2, alpha: 4, dropout: 0.0, target_modules: all-linear}"


@pytest.mark.parametrize(
    "more", [(), (LORA,), ("objective.reference=model",)], ids=["full", "lora", "frozen-reference"]
)
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_ranks_load_their_shares_of_a_folder(tmp_path, strategy, more):
    base = run_ranks(tmp_path / "base", steps=1).folder / "model"
    more = (f"model.path={base}", *more)
    alone = run_ranks(tmp_path / "alone", *more, experiment="tiny_dpo", steps=3)
    assert alone.code == 0, alone.stderr
    ranks = on_ranks(strategy)
    together = run_ranks(tmp_path / "together", *more, *ranks, experiment="tiny_dpo", steps=3)
    assert together.code == 0, together.stderr
    losses = figures_of(alone.folder, "train/loss")
    assert len(losses) == 3
    found = figures_of(together.folder, "train/loss")
    assert found == pytest.approx(losses, rel=0, abs=1e-5)
