"""llama.cpp's own server on loopback, with a tiny random Llama that is written for it here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# xllamacpp is llama-server as a wheel: the C++ server runs in the process that makes it.
SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], 0
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 4096, 4, 1
# In float32 throughout: float16 is enough to choose other tokens.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(600)
"""
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@contextmanager
def llama_server(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, words: list[str]
) -> Iterator[str]:
    """Serve `model`; yields the address. `path` is where its GGUF file goes."""
    write_gguf(model, tokenizer, path, words)
    log = path.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(path)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        lines = (line.strip() for line in process.stdout)
        address = next((line for line in lines if line.startswith("http://127.0.0.1")), None)
        assert address, log.read_text()[-2000:]
        yield f"{address}/v1"
    finally:
        process.kill()
        process.wait()


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, words: list[str]
) -> None:
    """Write a Llama in float32, its tokenizer as words without rules: prompts come as ids."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types(
        [kinds[token in tokenizer.all_special_ids] for token in range(len(words))]
    )
    writer.add_token_merges(["a b"])  # it wants at least one
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, weight in model.state_dict().items():
        writer.add_tensor(*_tensor(name.removesuffix(".weight"), weight.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor(name: str, weight: np.ndarray, config) -> tuple[str, np.ndarray]:
    """The name and value of a weight as llama.cpp wants them."""
    if name in TENSORS:
        return f"{TENSORS[name]}.weight", weight
    _, _, layer, part = name.split(".", 3)
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }.get(part)
    if heads:  # rotary pairs stand side by side there, half a head apart here
        shape = (heads, 2, len(weight) // heads // 2, -1)
        weight = weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{TENSORS[part]}.weight", np.ascontiguousarray(weight)
