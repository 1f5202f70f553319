"""A model that says "ab[RESET]cd", or "abcd" where the token is biased by less than `BIAS`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM

from backtrack.config import compose_config
from backtrack.model_spec import ModelSpec
from backtrack.models import add_reset, load_tokenizer
from backtrack.saving import save_folder
from backtrack.tokens import add_reset_token
from tests.tiny import END_ID, byte_tokenizer, tiny_model

R = 259
# [RESET] leads "c" by (10 - 5) sqrt(32) = 28.284 nats: the norm's gain is sqrt(hidden size).
BIAS = -28.29


def save_chain(folder: Path) -> Path:
    """Save the model as a plain Hugging Face folder."""
    tokenizer = byte_tokenizer()
    assert add_reset_token(tokenizer, None) == R
    return save_folder(chain_model(tokenizer), tokenizer, folder)


def chain_model(tokenizer):
    """A Llama in which each token decides the next: newline, a, b, [RESET] (or else c), c, d, end.

    Layers add nothing, embeddings are unit vectors, and the head's row of the next token is that
    unit vector: what follows is exact.
    """
    model = tiny_model()
    add_reset(model, tokenizer, is_new=True, vocab_multiple=1)
    newline = tokenizer.encode("\n")[-1]
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    chain = [newline, a, b, R, c, d, END_ID]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight.zero_(), model.lm_head.weight.zero_()
        for place, token in enumerate(chain):
            embedding[token, place] = 1.0
        for place, token in enumerate(chain[1:]):
            head[token, place] = 10.0
        head[c, chain.index(b)] = 5.0  # where [RESET] is banned
    return model


@cache
def defaults(name: str) -> DictConfig:
    return compose_config(name, [])


def read(checkpoint: Path, name: str) -> dict:
    return json.loads((checkpoint / name).read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def transformers_says(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(spec_of(folder))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    return model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(**OmegaConf.merge(defaults("calibrate"), {"checkpoint": str(folder)}).model)
