"""A bias beside a model: transformers honours it, our decoder takes it only when told to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from backtrack.generation.engine import HFEngine, Request, Sampling
from backtrack.models import load_model, load_tokenizer
from backtrack.saving import SECTION_START, save_bias, save_folder
from tests.chain import R, read, save_chain, spec_of, transformers_says
from tests.tiny import END_ID

BARE_FACTS = {
    "reset_token": "[RESET]",
    "reset_bias": 1.0,
    "max_resets": 1,
    "num_false": 0,
    "num_prompts": 30,
    "prompts": "benign.jsonl",
    "upper_bound": 0.095,
    "confidence": 0.95,
    "max_false_reset": 0.1,
    "false_reset": "any reset",
    "temperature": 0.0,
    "max_new_tokens": 16,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return save_chain(tmp_path_factory.mktemp("chain") / "model")


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy of its own: a bias is written beside the model."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


def test_bias_of_transformers_acts_on_the_first_token_and_not_on_our_engine(checkpoint):
    spec = spec_of(checkpoint)
    tokenizer = load_tokenizer(spec)
    facts = {**BARE_FACTS, "reset_bias": 500.0}
    save_bias(checkpoint, tokenizer, facts)
    assert transformers_says(checkpoint)[:2] == [R, R], "a bias is no ban of the second reset"
    model = load_model(spec, tokenizer, seed=0)
    assert model.generation_config.sequence_bias == [[[R], 500.0]]
    sampling = Sampling(temperature=0.0, max_new_tokens=8, reset_bias=0.0, max_resets=1, seed=0)
    ids = [tokenizer.encode("\n")[-1]]
    (done,) = HFEngine(model, tokenizer, batch_size=1).generate([Request(ids, sampling=sampling)])
    assert (done.discarded_texts, done.visible_text) == (("ab",), "cd")


def test_bias_keeps_other_biases_and_a_card_that_is_not_ours(checkpoint):
    tokenizer = load_tokenizer(spec_of(checkpoint))
    settings = read(checkpoint, "generation_config.json")
    other = [[65, 66], -2.0]
    settings |= {"sequence_bias": [[[R], 9.0], other], "top_k": 7}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    (checkpoint / "README.md").write_text("# Mine\n")
    save_bias(checkpoint, tokenizer, BARE_FACTS)
    written = read(checkpoint, "generation_config.json")
    assert written["sequence_bias"] == [other, [[R], 1.0]]
    assert written["top_k"] == 7
    assert (checkpoint / "README.md").read_text().startswith("# Mine\n\n" + SECTION_START)


def test_bias_leaves_the_end_of_answers_where_there_was_no_generation_config(checkpoint):
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "README.md").unlink()
    save_bias(checkpoint, load_tokenizer(spec_of(checkpoint)), BARE_FACTS)
    assert read(checkpoint, "generation_config.json")["eos_token_id"] == [END_ID]
    assert transformers_says(checkpoint)[-1] == END_ID


def test_bias_saved_model_that_went_on_training_drops_the_bias_of_its_start(checkpoint, tmp_path):
    tokenizer = load_tokenizer(spec_of(checkpoint))
    save_bias(checkpoint, tokenizer, BARE_FACTS)
    model = load_model(spec_of(checkpoint), tokenizer, seed=0)
    model.generation_config.sequence_bias = [[[65], -2.0], *model.generation_config.sequence_bias]
    folder = save_folder(model, tokenizer, tmp_path / "next")
    assert read(folder, "generation_config.json")["sequence_bias"] == [[[65], -2.0]]
    assert not (folder / "reset.json").exists()
