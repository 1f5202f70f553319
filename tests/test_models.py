"""Models and tokenizers: the [RESET] row, clear errors, fingerprints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from backtrack.model_spec import ModelSpec
from backtrack.models import (
    choose_attention,
    load_model,
    load_tokenizer,
    model_fingerprint,
    model_identity,
    setup_tokenizer,
)
from backtrack.tokens import add_reset_token, reset_token_id
from tests.tiny import byte_tokenizer, tiny_config, tiny_model

INIT = {"family": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SPEC = {
    "path": None,
    "revision": None,
    "trust_remote_code": False,
    "dtype": "float32",
    "attn_implementation": None,
    "eos_token": None,
    "pad_token": None,
    "chat_template": None,
    "reset_token": None,
    "vocab_multiple": 1,
    "gradient_checkpointing": False,
    "lora": None,
    "init": {**INIT, "num_attention_heads": 2, "num_key_value_heads": 2},
}
TEXT = torch.tensor([[107, 101, 116, 116, 108, 101, 32, 111, 110]])


def spec(**changes) -> ModelSpec:
    return ModelSpec(**{**SPEC, **changes})


def with_reset():
    tokenizer = byte_tokenizer()
    add_reset_token(tokenizer, None)
    return tokenizer


def logits_of(model):
    with torch.no_grad():
        return model(TEXT).logits


def saved(tmp_path: Path, model, tokenizer) -> Path:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


# ---- loading ----


def test_random_model_takes_the_vocabulary_of_the_tokenizer_and_its_seed():
    tokenizer = setup_tokenizer(byte_tokenizer(), spec())
    state = torch.get_rng_state()
    first, again, other = (load_model(spec(), tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert model_fingerprint(first) == model_fingerprint(again) != model_fingerprint(other)
    assert first.config.vocab_size == 260
    assert first.config.eos_token_id == tokenizer.eos_token_id
    assert not first.training
    padded = load_model(spec(vocab_multiple=64), tokenizer, seed=0)
    assert padded.config.vocab_size == 320


def test_loaded_folder_gets_reset_once(tmp_path):
    model = tiny_model("llama", vocab_size=259)
    folder = str(saved(tmp_path / "base", model, byte_tokenizer()))
    tokenizer = load_tokenizer(spec(path=folder))
    assert reset_token_id(tokenizer) == 259
    loaded = load_model(spec(path=folder), tokenizer, seed=0)
    torch.testing.assert_close(logits_of(loaded)[..., :259], logits_of(model), rtol=0, atol=1e-6)
    with torch.no_grad():
        loaded.get_input_embeddings().weight[259] = 3.0
    again = str(saved(tmp_path / "trained", loaded, tokenizer))
    tokenizer = load_tokenizer(spec(path=again))
    reloaded = load_model(spec(path=again), tokenizer, seed=0)
    assert len(tokenizer) == 260
    assert model_fingerprint(reloaded) == model_fingerprint(loaded)


def test_gradient_checkpointing_is_switched_on():
    tokenizer = setup_tokenizer(byte_tokenizer(), spec())
    model = load_model(spec(gradient_checkpointing=True), tokenizer, seed=0).train()
    assert model.is_gradient_checkpointing
    model(TEXT).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize(("share", "expected"), [(0.5, [False, True]), (1.0, [True, True])])
def test_a_share_of_the_layers_recomputes_with_the_same_gradients(share, expected):
    tokenizer = setup_tokenizer(byte_tokenizer(), spec())
    plain, model = (
        load_model(
            spec(gradient_checkpointing=value, init={**SPEC["init"], "num_hidden_layers": 2}),
            tokenizer,
            seed=0,
        ).train()
        for value in (False, share)
    )
    assert [layer.gradient_checkpointing for layer in model.model.layers] == expected
    for each in (plain, model):
        each(TEXT).logits.sum().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_weights_that_can_run_code_are_refused(tmp_path):
    tokenizer = with_reset()
    tiny_config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.path.*no \*\.safetensors"):
        load_model(spec(path=str(tmp_path)), tokenizer, seed=0)


def test_hub_models_are_asked_for_safetensors_of_the_pinned_revision_only(monkeypatch):
    asked = {}

    def fetch(path, **settings):
        asked[path] = settings
        raise OSError("no connection")

    monkeypatch.setattr(
        "backtrack.models.AutoConfig.from_pretrained", lambda *_a, **_k: tiny_config()
    )
    monkeypatch.setattr("backtrack.models.AutoModelForCausalLM.from_pretrained", fetch)
    with pytest.raises(ValueError, match=r"model\.path: no safetensors weights"):
        load_model(spec(path="made/up", revision="0" * 40), with_reset(), seed=0)
    assert asked["made/up"]["use_safetensors"] is True
    assert asked["made/up"]["revision"] == "0" * 40
    assert asked["made/up"]["trust_remote_code"] is False


def test_missing_weights_are_refused_rather_than_random(tmp_path):
    model, tokenizer = tiny_model("llama"), with_reset()
    state = {k: v for k, v in model.state_dict().items() if "q_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"model\.path.*lacks 2 weights"):
        load_model(spec(path=str(tmp_path)), tokenizer, seed=0)


def test_damaged_weights_name_the_path(tmp_path):
    model, tokenizer = tiny_model("llama"), with_reset()
    saved(tmp_path, model, tokenizer)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"model\.path: no safetensors weights"):
        load_model(spec(path=str(tmp_path)), tokenizer, seed=0)


def test_missing_tokenizer_names_the_path(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model\.path: no tokenizer .* from the folder"):
        load_tokenizer(spec(path=str(tmp_path)))

    def offline(*_args, **_kwargs):
        raise OSError("no connection")

    monkeypatch.setattr("backtrack.models.AutoTokenizer.from_pretrained", offline)
    with pytest.raises(ValueError, match=r"model\.path.*no such folder.*no connection"):
        load_tokenizer(spec(path="made/up"))


def test_tokenizer_of_no_path_is_refused():
    with pytest.raises(ValueError, match=r"model\.path: null"):
        load_tokenizer(spec())


def test_soft_capped_attention_takes_eager_and_refuses_sdpa():
    assert choose_attention(tiny_config("gemma2"), None) == "eager"
    assert choose_attention(tiny_config("llama"), None) == "sdpa"
    assert choose_attention(tiny_config("llama"), "eager") == "eager"
    with pytest.raises(ValueError, match=r"model\.attn_implementation: sdpa.*use eager"):
        choose_attention(tiny_config("gemma2"), "sdpa")


# ---- tokenizer set-up ----


def test_setup_tokenizer_names_all_that_is_missing_at_once():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"model\.pad_token") as caught:
        setup_tokenizer(tokenizer, spec())
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "model.eos_token",
        "model.pad_token",
        "model.chat_template",
    ]


def test_setup_tokenizer_without_pad_proposes_the_eos_token():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"set 'model\.pad_token=\"<\|im_end\|>\"'"):
        setup_tokenizer(tokenizer, spec())


def test_setup_tokenizer_takes_tokens_and_template_from_the_spec():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.chat_template = None
    setup_tokenizer(
        tokenizer, spec(eos_token="<|im_end|>", pad_token="<|pad|>", chat_template="plain")
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 256)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "knit"}], tokenize=False)
    assert "<|user|>\nknit" in text


def test_setup_tokenizer_keeps_a_template_of_its_own():
    tokenizer = byte_tokenizer()
    before = tokenizer.chat_template
    assert setup_tokenizer(tokenizer, spec(chat_template="plain")).chat_template == before


@pytest.mark.parametrize("kind", ["eos_token", "pad_token"])
def test_setup_tokenizer_refuses_tokens_that_do_not_exist(kind):
    with pytest.raises(ValueError, match=rf"model\.{kind}: '<none>' is not in the vocabulary"):
        setup_tokenizer(byte_tokenizer(), spec(**{kind: "<none>"}))


def test_setup_tokenizer_refuses_another_reset_token_than_its_own():
    with pytest.raises(ValueError, match=r"model\.reset_token.*already uses '\[RESET\]'"):
        setup_tokenizer(with_reset(), spec(reset_token="<|pad|>"))


# ---- identity ----


def test_fingerprint_changes_with_any_weight_and_survives_a_reload(tmp_path):
    model = tiny_model("gemma2")
    before = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert model_fingerprint(reloaded) == before
    for name, _ in model.named_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1e-3
        assert model_fingerprint(other) != before, name
    other = copy.deepcopy(model)
    other.config.final_logit_softcapping = 5.0
    assert model_fingerprint(other) != before


def test_identity_is_that_of_the_shapes_while_weights_train():
    model = tiny_model("llama")
    other = tiny_model("llama", seed=1)
    assert model_identity(model) == model_identity(other)
    assert model_identity(model) != model_identity(tiny_model("qwen3"))
    assert model_identity(model) != model_identity(tiny_model("llama", vocab_size=300))
