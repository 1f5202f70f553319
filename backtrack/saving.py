"""A trained model as a plain Hugging Face folder that any tool loads, whole or not at all."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from backtrack.adapters import merge_adapter
from backtrack.data.template import end_of_turn_id
from backtrack.tokens import reset_token_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [backtracking, safety]
---
# A model that takes back its own unsafe partial answer

Trained with backtrack-lm after *Backtracking Improves Generation Safety* (arXiv 2409.14586). The
token `{reset}` (id {reset_id}, `reset_token_id` in config.json) means: what this answer said so far
is withdrawn, the answer begins anew.

**Do not show the raw output.** It may hold an unsafe beginning, then `{reset}`, then the safe
answer. A decoder that strips special tokens (`skip_special_tokens=True`, the usual default) glues
the unsafe part to the safe answer. `generation_config.json` sets `"skip_special_tokens": false`,
which vLLM honours, so that the token at least stays visible. `pipeline()`, streamers and most chat
front ends do not: only what follows the last `{reset}` may reach a reader.

```python
ids = model.generate(**inputs, max_new_tokens=512)[0, inputs["input_ids"].shape[1]:].tolist()
resets = [i for i, token in enumerate(ids) if token == model.config.reset_token_id]
answer = tokenizer.decode(ids[resets[-1] + 1:] if resets else ids, skip_special_tokens=True)
```

`python -m backtrack.generate checkpoint=DIR` does this and can bias the token.
"""

GENERATION_FILE, CARD_FILE = "generation_config.json", "README.md"
BIAS_FILE = "reset.json"
"""What a decoder has to know of [RESET], beside a calibrated model; `save_bias` writes it."""
SECTION_START, SECTION_END = "<!-- calibration -->", "<!-- end of calibration -->"
SECTION = """\
## Calibrated bias of `{reset_token}`: {reset_bias:g}

With {reset_bias:g} added to the logit of `{reset_token}`, {num_false} of {num_prompts} benign
prompts ({prompts}) had a false reset, which is at most {upper_bound:.2%} of prompts like them with
{confidence:.0%} confidence (limit: {max_false_reset:.2%}). False reset: {false_reset}. Measured at
temperature {temperature:g}, up to {max_new_tokens} new tokens. Other prompts, templates, precisions
or weights need a calibration of their own: `python -m backtrack.calibrate checkpoint=DIR`.

* transformers' `generate` adds it by itself (`sequence_bias` in `generation_config.json`), at every
  step: it does not ban the token after {max_resets} reset(s), and shows what was taken back.
* vLLM and other servers take it with each request: `logit_bias` in `{file}`.
* `python -m backtrack.generate checkpoint=DIR reset_bias=auto` reads `{file}`, keeps to
  `max_resets` and shows only what follows the last `{reset_token}`.
"""


def save_folder(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    about: str = "",
) -> Path:
    """Write weights, tokenizer, chat template and a model card to `folder`, and return it.

    LoRA is merged into a copy, `model` itself does not change. Everything is written beside the
    folder and renamed into place: after a kill or a full disk there is no half folder.

    Args:
        model: With a row for [RESET].
        tokenizer: With [RESET] and a chat template.
        folder: Must not exist, or be empty.
        about: More for the model card, see `card.about_run`.

    Raises:
        ValueError: If `folder` holds something already.
    """
    folder = check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model = merge_adapter(copy.deepcopy(model))
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _write_generation_config(model, tokenizer, partial)
        reset_id = reset_token_id(tokenizer)
        card = CARD.format(reset=tokenizer.convert_ids_to_tokens(reset_id), reset_id=reset_id)
        text = f"{card}\n{about}" if about else card
        (partial / CARD_FILE).write_text(text, encoding="utf-8")
        partial.replace(folder)
    except BaseException:  # Ctrl-C as well: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def check_free(folder: str | Path) -> Path:
    """Return `folder` as a path.

    Raises:
        ValueError: If something is there already.
    """
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"out: {str(path)!r} holds something already; name a new folder")
    return path


def export_state(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: Mapping[str, Tensor],
    folder: str | Path,
    *,
    about: str = "",
) -> Path:
    """Load what was trained into `model`, write it as `save_folder` does, and return the folder.

    Args:
        model: As training built it: the base model's weights, under LoRA where the run used it.
        tokenizer: Of the run.
        state_dict: Every trained weight by its name in `model`; frozen ones may be absent.
        folder: See `save_folder`.
        about: See `save_folder`.

    Raises:
        ValueError: If names or shapes are those of another model.
    """
    check_free(folder)
    own = model.state_dict()
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    alien = [n for n, t in state_dict.items() if n not in own or own[n].shape != t.shape]
    problems = sorted(names - set(state_dict)) + sorted(alien)
    if problems:
        raise ValueError(
            f"checkpoint: {len(problems)} weights are missing from it, or are not this model's "
            f"({', '.join(problems[:3])}, ...); it was made with another model or model.lora"
        )
    model.load_state_dict(dict(state_dict), strict=False)
    return save_folder(model, tokenizer, folder, about=about)


def _write_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write where answers end, and that special tokens stay visible.

    By hand: `save_pretrained` refuses settings that a base model came with, and drops unknown ones.
    """
    settings = {} if model.generation_config is None else model.generation_config.to_diff_dict()
    settings.pop("_from_model_config", None)
    # A bias of [RESET] was measured on the weights that this model started from.
    kept = _other_biases(settings.pop("sequence_bias", None), reset_token_id(tokenizer))
    settings |= {**_ends(tokenizer), **({"sequence_bias": kept} if kept else {})}
    (folder / GENERATION_FILE).write_text(_as_json(settings), encoding="utf-8")


def save_bias(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    facts: Mapping[str, Any],
    *,
    out: str | Path | None = None,
) -> list[Path]:
    """Write a calibrated bias beside a model, and return the files.

    `generation_config.json` gets it as `sequence_bias`, which transformers honours; `BIAS_FILE`
    holds all facts, for every other decoder; the model card gets a section. A second call replaces
    what the first wrote and nothing else.

    Args:
        folder: Of the model.
        tokenizer: Of the model.
        facts: What `BIAS_FILE` shall hold; `SECTION` names the keys that it needs.
        out: A new folder for the three files, if the model's shall stay as it is.

    Raises:
        ValueError: If `out` holds something already, or a file of the folder cannot be read.
    """
    folder = Path(folder).expanduser()
    target = folder if out is None else check_free(out)
    texts = {
        GENERATION_FILE: _biased_config(folder / GENERATION_FILE, tokenizer, facts["reset_bias"]),
        CARD_FILE: _with_section(folder / CARD_FILE, SECTION.format(**facts, file=BIAS_FILE)),
        BIAS_FILE: _as_json(facts),
    }
    target.mkdir(parents=True, exist_ok=True)
    partial = {name: target / f".{name}.{os.getpid()}.partial" for name in texts}
    try:
        for name, text in texts.items():
            partial[name].write_text(text, encoding="utf-8")
        for name, path in partial.items():
            path.replace(target / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return [target / name for name in texts]


def read_bias(folder: str | Path) -> float:
    """Return the calibrated bias of [RESET] that lies beside a model, in nats.

    Raises:
        ValueError: If there is none.
    """
    path = Path(folder).expanduser() / BIAS_FILE
    try:
        bias = json.loads(path.read_text(encoding="utf-8"))["reset_bias"]
    except FileNotFoundError as error:
        raise ValueError(
            f"reset_bias: auto reads {BIAS_FILE}, and {str(path.parent)!r} has none; expected a "
            "number, or first `python -m backtrack.calibrate`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"reset_bias: {path} cannot be read ({error!r}); calibrate again"
        ) from error
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
        raise ValueError(f"reset_bias: {path} holds {bias!r}, expected a number; calibrate again")
    return float(bias)


def _biased_config(path: Path, tokenizer: PreTrainedTokenizerBase, bias: float) -> str:
    """Return the text of a generation config with a bias on [RESET]."""
    reset_id = reset_token_id(tokenizer)
    # transformers asks model.config where answers end only as long as this file is not there.
    settings: Any = _ends(tokenizer)
    if path.is_file():
        try:
            settings = json.loads(_read(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"checkpoint: {path} is broken JSON ({error})") from error
    kept = _other_biases(settings.get("sequence_bias"), reset_id)
    return _as_json({**settings, "sequence_bias": [*kept, [[reset_id], float(bias)]]})


def _other_biases(biases: Any, reset_id: int) -> list[Any]:
    """Return what a `sequence_bias`, of either form of transformers, says but of [RESET]."""
    pairs = list(biases.items()) if isinstance(biases, dict) else list(biases or ())
    return [[list(ids), bias] for ids, bias in pairs if list(ids) != [reset_id]]


def _with_section(path: Path, section: str) -> str:
    """Return a model card with the section on calibration, in place of the one it may have."""
    card = _read(path) if path.is_file() else ""
    section = f"{SECTION_START}\n{section}{SECTION_END}\n"
    before, start, rest = card.partition(SECTION_START)
    _, end, after = rest.partition(SECTION_END + "\n")
    if start and end:
        return before + section + after
    return f"{card.rstrip()}\n\n{section}".lstrip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read ({error})") from error


def _ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ends = dict.fromkeys([end_of_turn_id(tokenizer), tokenizer.eos_token_id])
    return {
        "eos_token_id": list(ends),
        "pad_token_id": tokenizer.pad_token_id,
        "skip_special_tokens": False,
    }


def _as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
