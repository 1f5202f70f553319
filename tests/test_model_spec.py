"""The `model` section of a config: every problem at once, before anything loads."""

from __future__ import annotations

import re

import pytest

from backtrack.model_spec import model_problems
from tests.test_models import SPEC


def test_model_problems_of_a_right_section_are_none(tmp_path):
    assert model_problems(SPEC) == []
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
    assert model_problems({**SPEC, "path": "org/name", "lora": lora}) == []


def test_model_problems_come_all_at_once():
    section = {
        **SPEC,
        "path": "./gone",
        "dtype": "float8",
        "attn_implementation": "best",
        "vocab_multiple": 0,
        "chat_template": "gone",
        "trust_remote_code": "no",
        "gradient_checkpoint": True,
        "lora": {"r": 0, "alpha": -1, "dropout": 1.0, "target_modules": []},
    }
    keys = [problem.split(":")[0] for problem in model_problems(section)]
    assert keys == [
        "model.gradient_checkpoint",
        "model.path",
        "model.dtype",
        "model.attn_implementation",
        "model.vocab_multiple",
        "model.chat_template",
        "model.trust_remote_code",
        "model.lora.r",
        "model.lora.alpha",
        "model.lora.dropout",
        "model.lora.target_modules",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init": None}, r"model\.path: null, and so is model\.init"),
        ({"init": {"family": "lama"}}, r"model\.init\.family: 'lama'"),
        ({"init": {"family": "llama", "hiden_size": 8}}, r"model\.init\.hiden_size: unknown"),
        ({"path": "org/name", "trust_remote_code": True}, r"model\.revision: null"),
        ({"gradient_checkpointing": 1.5}, r"model\.gradient_checkpointing: 1\.5.*the share"),
        ({"trust_remote_code": "no"}, r"model\.trust_remote_code: 'no', use true or false"),
        ({"lora": {"r": 4}}, r"model\.lora: has the keys \['r'\]"),
    ],
)
def test_model_problems_name_the_key(changes, expected):
    (problem,) = model_problems({**SPEC, **changes})
    assert re.match(expected, problem)


def test_model_problems_name_missing_keys():
    assert model_problems({k: v for k, v in SPEC.items() if k != "dtype"}) == [
        "model.dtype: missing, see conf/model/*.yaml"
    ]


def test_model_problems_see_what_a_folder_lacks(tmp_path):
    (problem,) = model_problems({**SPEC, "path": str(tmp_path)})
    assert "no config.json" in problem
    (tmp_path / "config.json").write_text("{}")
    (problem,) = model_problems({**SPEC, "path": str(tmp_path)})
    assert "no *.safetensors" in problem
