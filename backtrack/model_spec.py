"""What `conf/model/*.yaml` may say about a model, and everything that is wrong with it at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING

from backtrack import CONF_DIR

if TYPE_CHECKING:
    from collections.abc import Mapping

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2")
_TEMPLATES = Path(CONF_DIR) / "model" / "templates"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LORA_KEYS = {"r", "alpha", "dropout", "target_modules"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The `model` section of a config.

    Attributes:
        path: Hub id or folder; None makes a random model from `init`.
        revision: Commit, tag or branch on the hub; folders ignore it.
        trust_remote_code: Run Python code that comes with the model.
        dtype: One of `DTYPES`.
        attn_implementation: One of `ATTENTION`; None takes sdpa, or eager where attention logits
            are soft-capped (Gemma 2).
        eos_token: Existing token to end texts with; None keeps the tokenizer's.
        pad_token: Existing token to pad with; None keeps the tokenizer's.
        chat_template: Name of a file in conf/model/templates or a Jinja text; used only where the
            tokenizer has none.
        reset_token: Reserved token to use as [RESET]; None adds a new one.
        vocab_multiple: Where rows are added to the embedding, round their number up to this.
        gradient_checkpointing: Recompute activations in the backward pass: of all layers (True), of
            none (False), or of this share of them.
        lora: None trains all weights; else `r`, `alpha`, `dropout`, `target_modules`.
        init: Sizes of the random model: `family` (a transformers model type) and keys of its
            config; the vocabulary is the tokenizer's.
    """

    path: str | None
    revision: str | None
    trust_remote_code: bool
    dtype: str
    attn_implementation: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    reset_token: str | None
    vocab_multiple: int
    gradient_checkpointing: bool | float
    lora: Mapping[str, Any] | None
    init: Mapping[str, Any] | None


def find_template(template: str) -> str | None:
    """Return the Jinja text of `model.chat_template`, or None if no such file exists."""
    if "{" in template:
        return template
    file = _TEMPLATES / (template if template.endswith(".jinja") else f"{template}.jinja")
    return file.read_text(encoding="utf-8") if file.is_file() else None


def model_problems(section: Mapping[str, Any]) -> list[str]:
    """Return everything wrong with a `model` section, each as `key: what is wrong, remedy`.

    Reads no weights and does not ask the hub.

    Args:
        section: Plain Python values, interpolations resolved.
    """
    known = {field.name for field in fields(ModelSpec)}
    problems = [f"model.{key}: unknown key, remove it" for key in sorted(set(section) - known)]
    missing = sorted(known - set(section))
    problems += [f"model.{key}: missing, see conf/model/*.yaml" for key in missing]
    if missing:
        return problems
    spec = ModelSpec(**{key: section[key] for key in known})
    return problems + _path_problems(spec) + _value_problems(spec) + _lora_problems(spec.lora)


def _path_problems(spec: ModelSpec) -> list[str]:
    if spec.path is None:
        return _init_problems(spec.init)
    folder = Path(spec.path).expanduser()
    if not folder.is_dir():
        if _HUB_ID.fullmatch(spec.path) is None or spec.path.startswith("."):
            return [f"model.path: there is no folder {spec.path!r}; give a folder or a hub id"]
        if spec.trust_remote_code and spec.revision is None:
            return [
                "model.revision: null, but trust_remote_code runs code of the hub: pin a commit"
            ]
        return []
    problems = []
    if not (folder / "config.json").is_file():
        problems.append(
            f"model.path: {spec.path!r} has no config.json; give a Hugging Face folder (for a "
            "training run, first `python -m backtrack.export`)"
        )
    elif not any(folder.glob("*.safetensors")):
        problems.append(
            f"model.path: {spec.path!r} has no *.safetensors; convert its weights, other formats "
            "can run code when they are loaded"
        )
    return problems


def _init_problems(init: Mapping[str, Any] | None) -> list[str]:
    if init is None:
        return ["model.path: null, and so is model.init; give a hub id or folder, or sizes"]
    family = str(init.get("family"))
    if family not in CONFIG_MAPPING:
        return [f"model.init.family: {family!r} is no model type of transformers; try llama"]
    # transformers keeps unknown keys as attributes, so a typing error would go unnoticed.
    config = CONFIG_MAPPING[family]()
    return [
        f"model.init.{key}: unknown key of {type(config).__name__}, remove it"
        for key in init
        if key != "family" and not hasattr(config, key)
    ]


def _value_problems(spec: ModelSpec) -> list[str]:
    problems = []
    if spec.dtype not in DTYPES:
        problems.append(f"model.dtype: {spec.dtype!r} is unknown, use one of {', '.join(DTYPES)}")
    if spec.attn_implementation not in (None, *ATTENTION):
        problems.append(
            f"model.attn_implementation: {spec.attn_implementation!r} is unknown, use null or one "
            f"of {', '.join(ATTENTION)}"
        )
    if not isinstance(spec.vocab_multiple, int) or spec.vocab_multiple < 1:
        problems.append(
            f"model.vocab_multiple: {spec.vocab_multiple!r} is no whole number from 1 on, use 1"
        )
    if spec.chat_template is not None and find_template(spec.chat_template) is None:
        names = ", ".join(sorted(file.stem for file in _TEMPLATES.glob("*.jinja")))
        problems.append(
            f"model.chat_template: there is no {spec.chat_template!r} in conf/model/templates, "
            f"which has {names}; a Jinja text is taken too"
        )
    if spec.trust_remote_code not in (True, False):
        problems.append(f"model.trust_remote_code: {spec.trust_remote_code!r}, use true or false")
    share = spec.gradient_checkpointing
    if not isinstance(share, bool | int | float) or not 0 <= share <= 1:
        problems.append(
            f"model.gradient_checkpointing: {share!r}, use true, false or the share of the layers, "
            "such as 0.5"
        )
    return problems


def _lora_problems(lora: Mapping[str, Any] | None) -> list[str]:
    if lora is None:
        return []
    if set(lora) != _LORA_KEYS:
        return [f"model.lora: has the keys {sorted(lora)}, needs exactly {sorted(_LORA_KEYS)}"]
    problems = []
    if not isinstance(lora["r"], int) or lora["r"] < 1:
        problems.append(f"model.lora.r: {lora['r']!r} is no rank, use a whole number from 1 on")
    if not isinstance(lora["alpha"], int | float) or lora["alpha"] <= 0:
        problems.append(f"model.lora.alpha: {lora['alpha']!r}, use a number above 0")
    if not isinstance(lora["dropout"], int | float) or not 0 <= lora["dropout"] < 1:
        problems.append(f"model.lora.dropout: {lora['dropout']!r}, use a number in [0, 1)")
    if not isinstance(lora["target_modules"], str | list) or not lora["target_modules"]:
        problems.append(
            f"model.lora.target_modules: {lora['target_modules']!r}, use all-linear or a list of "
            "names such as [q_proj, v_proj]"
        )
    return problems
