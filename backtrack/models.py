"""Tokenizers and models by hub id or folder, with a row for [RESET].

Legend: V rows of the embedding, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from backtrack.model_spec import find_template, model_problems
from backtrack.reset_row import add_reset
from backtrack.sharding import is_sharded, whole_shape
from backtrack.tokens import add_reset_token, reset_token_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from backtrack.model_spec import ModelSpec

# Keys of a config that do not change what the model computes, or that saving writes.
_VOLATILE = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
_frozen_hashes: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `spec.path`, made ready as `setup_tokenizer` does.

    Raises:
        ValueError: If it cannot be found, is not a fast one, or lacks something; see
            `setup_tokenizer`.
    """
    if spec.path is None:
        raise ValueError(
            "model.path: null, so there is no tokenizer to load; give a hub id or a folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _expand(spec.path), revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_loaded("tokenizer", spec.path, error)) from error
    return setup_tokenizer(tokenizer, spec)


def setup_tokenizer(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Return `tokenizer` itself, with eos, pad, chat template and [RESET] as `spec` says.

    Raises:
        ValueError: Names everything that is missing and the setting that supplies it.
    """
    problems = [] if tokenizer.is_fast else ["model.path: has no fast tokenizer (tokenizer.json)"]
    vocab = tokenizer.get_vocab()
    for kind in ("eos_token", "pad_token"):
        token = getattr(spec, kind)
        if token is None:
            continue
        if token in vocab:
            setattr(tokenizer, kind, token)
        else:
            problems.append(f"model.{kind}: {token!r} is not in the vocabulary; name one that is")
    if tokenizer.chat_template is None and spec.chat_template is not None:
        tokenizer.chat_template = find_template(spec.chat_template)
    problems += _lacks(tokenizer)
    if problems:
        raise ValueError("\n".join(problems))
    _setup_reset(tokenizer, spec.reset_token)
    return tokenizer


def _lacks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # Remedies are quoted twice, for the shell and for Hydra, which does not read a bare "<".
    problems = []
    if tokenizer.eos_token is None:
        names = ", ".join(map(str, tokenizer.all_special_tokens)) or "none"
        problems.append(
            "model.eos_token: the tokenizer has no eos token; set 'model.eos_token=\"TOKEN\"' to a "
            f"token of its vocabulary that ends a text (its special tokens: {names})"
        )
    if tokenizer.pad_token is None:
        problems.append(
            "model.pad_token: the tokenizer has no pad token; set 'model.pad_token=\""
            f"{tokenizer.eos_token or 'TOKEN'}\"' (padding is masked everywhere, so the eos token "
            "will do)"
        )
    if tokenizer.chat_template is None:
        problems.append(
            "model.chat_template: the tokenizer has none; name one of conf/model/templates, for "
            "example model.chat_template=plain"
        )
    return problems


def _setup_reset(tokenizer: PreTrainedTokenizerBase, reserved: str | None) -> None:
    try:
        present = tokenizer.convert_ids_to_tokens(reset_token_id(tokenizer))
    except ValueError:
        add_reset_token(tokenizer, reserved)
        return
    if reserved not in (None, present):
        raise ValueError(
            f"model.reset_token: {reserved!r}, but this tokenizer already uses {present!r} as "
            "[RESET]; set model.reset_token=null"
        )


def load_model(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PreTrainedModel:
    """Return the model of `spec`, in eval mode, with a row for the tokenizer's [RESET].

    Only safetensors are read. LoRA is put on top by `adapters.add_lora`.

    Args:
        spec: Where it is, or the sizes of a random one.
        tokenizer: Of `load_tokenizer` or `setup_tokenizer`.
        seed: Of the weights of a random model.

    Raises:
        ValueError: If it cannot be loaded, weights are missing, or it does not fit the tokenizer.
    """
    problems = model_problems({name: getattr(spec, name) for name in spec.__slots__})
    if problems:
        raise ValueError("\n".join(problems))
    config = _make_config(spec, tokenizer) if spec.path is None else load_config(spec, spec.path)
    settings = {
        "config": config,
        "dtype": getattr(torch, spec.dtype),
        "attn_implementation": choose_attention(config, spec.attn_implementation),
        "trust_remote_code": spec.trust_remote_code,
    }
    if spec.path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(**settings)  # type: ignore[no-untyped-call]
    else:
        model = _load_weights(spec.path, revision=spec.revision, **settings)
    add_reset(model, tokenizer, is_new=spec.reset_token is None, vocab_multiple=spec.vocab_multiple)
    checkpoint_layers(model, float(spec.gradient_checkpointing))
    return cast("PreTrainedModel", model.eval())


def checkpoint_layers(model: Any, share: float) -> None:
    """Recompute the activations of this share of the layers, evenly spread, when going backward."""
    if share == 0:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = int((number + 1) * share) > int(number * share)


def choose_attention(config: PreTrainedConfig, wanted: str | None) -> str:
    """Return the attention implementation to load a model with.

    Raises:
        ValueError: If sdpa is wanted for soft-capped attention logits, which it cannot compute.
    """
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if is_capped and wanted == "sdpa":
        raise ValueError(
            f"model.attn_implementation: sdpa, but {config.model_type} soft-caps its attention "
            "logits, which sdpa cannot compute; use eager (or flex_attention on a GPU)"
        )
    return wanted or ("eager" if is_capped else "sdpa")


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of all that decides what a model computes: its config and every weight.

    Equal for a model and its saved and reloaded copy; another one where any weight differs, or
    where an adapter is merged. Reads every byte (about 1 GB/s).
    """
    config = getattr(model, "config", None)
    kept = {} if config is None else config.to_dict()
    settings = {key: value for key, value in kept.items() if key not in _VOLATILE}
    text = json.dumps(settings, sort_keys=True, default=str)
    return _hash(text, model.state_dict())


def check_model_folder(path: str | Path) -> list[Path]:
    """Return the weight files of a model folder.

    Raises:
        ValueError: If it is no folder with safetensors: a hub id, say.
    """
    files = sorted(Path(path).expanduser().glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"model.path: {str(path)!r} is no folder with safetensors; weights that are spread "
            "over ranks come from one: `python -m backtrack.prepare model=NAME out=DIR`"
        )
    return files


def folder_fingerprint(path: str | Path) -> str:
    """Return a hash of config and weights of a model folder, by its files: nothing is loaded.

    Raises:
        ValueError: See `check_model_folder`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in (Path(path).expanduser() / "config.json", *check_model_folder(path)):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


def push_folder(folder: Path, repo_id: str) -> None:
    """Upload a model folder to a repository of the hub, which is made, private, if need be.

    Raises:
        OSError: If the hub refuses; the folder stays as it is.
    """
    hub = HfApi()
    try:
        hub.create_repo(repo_id, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise OSError(
            f"push_to_hub: {repo_id!r} could not be written ({reason}). "
            f"The model is in {folder}. Look at the name (NAME/MODEL) and at `hf auth login`, then "
            f"`hf upload {repo_id} {folder}`"
        ) from error


def model_identity(model: nn.Module) -> dict[str, Any]:
    """Return by what a checkpoint is recognised as one of `model`, as it goes on training.

    Names and shapes of all weights, the id of [RESET], and the contents of the frozen weights,
    which are in no checkpoint. Those are read once: they must not change while `model` lives.
    """
    weights = dict(model.named_parameters())
    wholes = {name: whole_shape(weight) for name, weight in weights.items()}
    shapes = json.dumps({name: list(shape) for name, shape in sorted(wholes.items())})
    if model not in _frozen_hashes and is_sharded(model):
        _frozen_hashes[model] = None
    if model not in _frozen_hashes:
        frozen = {name: weight for name, weight in weights.items() if not weight.requires_grad}
        _frozen_hashes[model] = _hash("", frozen) if frozen else None
    config = getattr(model, "config", None)
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "num_parameters": sum(shape.numel() for shape in wholes.values()),
        "shapes": _hash(shapes, {}),
        "reset_token_id": getattr(config, "reset_token_id", None),
        "frozen_weights": _frozen_hashes[model],
    }


def _hash(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        digest.update(content.data)
    return digest.hexdigest()


def _make_config(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    init = dict(cast("Mapping[str, Any]", spec.init))
    num_rows = max(tokenizer.get_vocab().values()) + 1
    return AutoConfig.for_model(
        init.pop("family"),
        vocab_size=-(-num_rows // spec.vocab_multiple) * spec.vocab_multiple,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **init,
    )


def load_config(spec: ModelSpec, path: str) -> PreTrainedConfig:
    """Return the config of a folder or hub model.

    Raises:
        ValueError: If it cannot be found.
    """
    try:
        config = AutoConfig.from_pretrained(
            _expand(path), revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_loaded("config", path, error)) from error
    return cast("PreTrainedConfig", config)


def _load_weights(path: str, **settings: Any) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _expand(path), use_safetensors=True, output_loading_info=True, **settings
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(_not_loaded("safetensors weights", path, error)) from error
    model, report = loaded
    lost = sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])})
    if lost:
        raise ValueError(
            f"model.path: {path!r} lacks {len(lost)} weights of its architecture, or has them in "
            f"another shape ({', '.join(lost[:3])}, ...); they would be random"
        )
    return cast("PreTrainedModel", model)


def _expand(path: str) -> str:
    """Return `path` with ~ resolved where it is a folder; hub ids stay as they are."""
    folder = Path(path).expanduser()
    return str(folder) if folder.is_dir() else path


def _not_loaded(what: str, path: str, error: Exception) -> str:
    kind = "folder" if Path(path).expanduser().is_dir() else "hub model (there is no such folder)"
    return (
        f"model.path: no {what} could be loaded from the {kind} {path!r}; give the folder of a "
        "saved Hugging Face model, or a hub id that this machine may download "
        f"({' '.join(str(error).split())[:300]})"
    )
