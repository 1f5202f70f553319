"""The trained weights of any checkpoint, whole and on the CPU, whoever wrote it.

A run leaves a file (one device, DDP), a folder of DeepSpeed or one of torch.distributed.checkpoint
(FSDP2). They come from someone you trust: all three hold pickles.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from backtrack.checkpoints import MANIFEST, is_complete

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

META = "meta.pt"
"""Beside the files of torch.distributed.checkpoint: what is no weight (Lightning's name)."""
LATEST, METADATA = "latest", ".metadata"  # by which DeepSpeed's and torch's folders are known

_WRAPPERS = ("_forward_module.", "module.")
_STATE = "state_dict."

# What DeepSpeed keeps in the file of rank 0 beside that which Lightning gave it.
_DEEPSPEED_KEYS = {
    "buffer_names",
    "checkpoint_parallel_dimensions",
    "data_sampler",
    "dp_world_size",
    "ds_config",
    "ds_version",
    "frozen_param_fragments",
    "frozen_param_shapes",
    "global_samples",
    "global_steps",
    "lr_scheduler",
    "module",
    "mp_world_size",
    "optimizer",
    "param_shapes",
    "random_ltd",
    "shared_params",
    "skipped_steps",
}


PREFIX = "model."
"""`ForestModule` keeps the trained model under this name."""


class Consolidated(NamedTuple):
    """What a checkpoint holds but for the state of the optimiser.

    Attributes:
        state_dict: Weights by their name in the LightningModule, on the CPU; fp32 from DeepSpeed,
            else in the dtype they were trained in. Frozen weights are in no checkpoint.
        extra: All else that Lightning saved: `global_step`, `model_identity`, `lr_schedulers`, ...
    """

    state_dict: dict[str, Tensor]
    extra: dict[str, Any]

    @property
    def model_weights(self) -> dict[str, Tensor]:
        """Weights by their name in the model that is trained."""
        weights = self.state_dict.items()
        return {name.removeprefix(PREFIX): w for name, w in weights if name.startswith(PREFIX)}


def consolidated(path: Path) -> Consolidated:
    """Return the weights of a checkpoint, whatever wrote it and on however many ranks.

    Memory: a file is mapped, so weights are read when they are used and states of the optimiser
    never. FSDP2: the weights alone. ZeRO: 4 bytes for each trained weight, plus for a moment what
    rank 0 kept of the model in 16 bits (ZeRO-1 and 2); the optimiser's files are mapped. Weights
    may share their storage: copy one before saving it by itself.

    Args:
        path: The checkpoint: a file, or a folder of DeepSpeed or torch.distributed.checkpoint.

    Raises:
        ValueError: If it is none, not finished or damaged, or if DeepSpeed is needed and missing.
    """
    if (path / MANIFEST).is_file() and not is_complete(path):
        raise ValueError(f"checkpoint: {path} lacks a part of its files; name another one")
    read: Callable[[Path], Consolidated]
    if path.is_file():
        read = _from_file
    elif (path / METADATA).is_file():
        read = _from_dcp
    elif (path / LATEST).is_file():
        read = _from_deepspeed
    else:
        raise ValueError(
            f"checkpoint: {path} is no finished checkpoint; name one of a run, such as "
            "checkpoints/last.ckpt"
        )
    try:
        return read(path)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # pickle raises whatever it stumbles over
        raise ValueError(
            f"checkpoint: {path} cannot be read ({error!r}); name another one"
        ) from error


def deepspeed_module(name: str) -> Any:
    """Return a module of DeepSpeed, which is an optional extra.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        # It reports to the standard output, which is for a program's result.
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"checkpoint: it was written by DeepSpeed, which cannot be imported here ({error}); "
            "pip install 'backtrack-lm[deepspeed]'"
        ) from error


def _from_file(path: Path) -> Consolidated:
    saved = _load(path)
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise ValueError(f"checkpoint: {path} holds no trained weights; name one of a run")
    extra = {k: v for k, v in saved.items() if k not in ("state_dict", "optimizer_states")}
    return Consolidated(_unwrapped(saved["state_dict"]), extra)


def _from_dcp(folder: Path) -> Consolidated:
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    weights: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(_STATE) and isinstance(entry, TensorStorageMetadata)
    }
    if not weights:
        raise ValueError(f"checkpoint: {folder} holds no trained weights; name one of a run")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*intent is to load in a single process.*")
        load_shards(weights, storage_reader=reader, no_dist=True)
    weights = {name.removeprefix(_STATE): weight for name, weight in weights.items()}
    return Consolidated(_unwrapped(weights), _load(folder / META))


def _from_deepspeed(folder: Path) -> Consolidated:
    reader = deepspeed_module("deepspeed.utils.zero_to_fp32")
    tag = (folder / LATEST).read_text(encoding="utf-8").strip()
    with contextlib.redirect_stdout(sys.stderr):
        weights = reader.get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
    first_rank = min((folder / tag).glob("*_model_states.pt"))
    saved = _load(first_rank)
    extra = {key: value for key, value in saved.items() if key not in _DEEPSPEED_KEYS}
    return Consolidated(_unwrapped(weights), extra)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by their names in the LightningModule, not in what a strategy put around."""
    clean = {}
    for name, weight in weights.items():
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        clean[name] = weight.detach()
    return clean
