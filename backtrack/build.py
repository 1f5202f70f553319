"""The objects of a run, made from its configuration: tokenizer, data, module, trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import TQDMProgressBar
from omegaconf import DictConfig, OmegaConf

from backtrack import runs
from backtrack.adapters import add_lora
from backtrack.backbone import check_architecture
from backtrack.checks import method_of
from backtrack.compiled import compile_layers
from backtrack.data.examples import Recipe
from backtrack.data.load import load_data, make_source, write_report
from backtrack.data.mixture import mix_schedule
from backtrack.data.module import BatchSettings, ForestData
from backtrack.data.template import check_template
from backtrack.data.world import make_world
from backtrack.data.world_tokenizer import make_world_tokenizer
from backtrack.model_spec import ModelSpec
from backtrack.models import load_model, load_tokenizer, setup_tokenizer
from backtrack.modules.base import Assembly, ForestModule, OptimizerSettings
from backtrack.modules.checkpoint_io import AtomicCheckpointIO
from backtrack.modules.dpo import DPOModule, DPOSettings
from backtrack.modules.sft import SFTModule
from backtrack.sharding import is_sharded
from backtrack.strategies.build import make_strategy
from backtrack.tokens import reset_token_id
from backtrack.tree_attention import use_tree_attention

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def trains_on_gpu(cfg: DictConfig) -> bool:
    """Return whether the trainer of `cfg` will take a GPU."""
    return cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()


def model_spec(cfg: DictConfig) -> ModelSpec:
    """Return the `model` section as a record."""
    section = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(section, dict)
    return ModelSpec(**{str(key): value for key, value in section.items()})


def make_tokenizer(cfg: DictConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model, or of the embedded world for a model made from sizes.

    Raises:
        ValueError: If it lacks eos, pad or a template, or does not spell its own template.
    """
    spec = model_spec(cfg)
    if spec.path is not None:
        tokenizer = load_tokenizer(spec)
    elif "world" in cfg.data:
        tokenizer = setup_tokenizer(make_world_tokenizer(make_world(**cfg.data.world)), spec)
    else:
        raise ValueError(
            "model.path: null makes a random model with the tokenizer of the embedded world, which "
            "this data has not; name a model"
        )
    check_template(tokenizer)
    return tokenizer


def make_data(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> ForestData:
    """Return the data of a run, read and encoded; its report lies in `folder` afterwards."""
    section: Any = OmegaConf.to_container(cfg.data, resolve=True)
    loaded = load_data(
        *make_sources(cfg),
        tokenizer=tokenizer,
        settings=section,
        seed=cfg.seed,
        cache_dir=Path(cfg.paths.cache_dir),
        show_progress=cfg.trainer.enable_progress_bar,
    )
    if runs.is_first_rank():
        write_report(loaded, folder)
    sizes = [len(part) for part in loaded.train]
    shares = section["weights"] if cfg.data.path is None else None
    weights = shares and [shares[name] for name in loaded.names]
    num_slots = round(cfg.data.epochs * sum(sizes))
    if cfg.trainer.max_steps is not None:
        num_slots = cfg.trainer.max_steps * cfg.data.batch_size
    return ForestData(
        train=loaded.train,
        validation=loaded.validation,
        schedule=mix_schedule(sizes=sizes, weights=weights, num_slots=num_slots, seed=cfg.seed),
        recipe=make_recipe(cfg, reset_id=reset_token_id(tokenizer)),
        settings=BatchSettings(
            batch_size=cfg.data.batch_size,
            max_tokens=cfg.data.max_tokens,
            layout=cfg.data.layout,
            pad_id=tokenizer.pad_token_id,
            num_workers=cfg.data.num_workers,
        ),
        num_micro=cfg.trainer.accumulate_grad_batches,
        tokenizer=tokenizer,
    )


def make_recipe(cfg: DictConfig, *, reset_id: int) -> Recipe:
    """Return how trees are made of examples."""
    objective = cfg.objective
    return Recipe(
        method=method_of(cfg),
        seed=cfg.seed,
        reset_token_id=reset_id,
        safe_weight=objective.get("safe_weight", 0.0),
        backtrack_weight=objective.get("backtrack_weight", 0.0),
        elicit_weight=objective.get("elicit_weight", 0.0),
        discourage_weight=objective.get("discourage_weight", 0.0),
    )


def make_sources(cfg: DictConfig) -> tuple[list[Any], list[Any] | None]:
    """Return the training sources and the validation sources, None where they are split off."""
    policy = cfg.data.on_bad_row
    if cfg.data.path is not None:
        own = {name: cfg.data[name] for name in ("path", "format", "revision")}
        return [make_source("data", own, on_bad_row=policy)], None

    def build(sections: DictConfig) -> list[Any]:
        return [
            instantiate(section)
            if "_target_" in section
            else make_source(str(name), section, on_bad_row=policy)
            for name, section in sections.items()
            if section is not None
        ]

    validation = cfg.data.validation_sources
    return build(cfg.data.sources), None if validation is None else build(validation)


def make_base(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the model that a run begins with, as it is loaded.

    Raises:
        ValueError: If it cannot be loaded.
    """
    return load_model(model_spec(cfg), tokenizer, seed=cfg.seed)


def prepare_model(cfg: DictConfig, model: Any, *, reset_id: int) -> Any:
    """Return `model` ready to be trained: checked, with its attention, under LoRA where wanted.

    Raises:
        ValueError: If it takes no trees.
    """
    if not is_sharded(model):  # the check needs whole weights
        check_architecture(model, layout=cfg.data.layout)
    if cfg.data.layout == "forest":
        use_tree_attention(model, on_gpu=trains_on_gpu(cfg))
    if cfg.model.lora:
        model = add_lora(model, **cfg.model.lora, reset_token_id=reset_id)
    if cfg.trainer.compile_layers:
        compile_layers(model, has_fixed_shapes=trains_on_gpu(cfg) and cfg.data.layout == "forest")
    return model.train()


def untrained_model(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the model of a run as it began, under LoRA where wanted, for trained weights to enter.

    Raises:
        ValueError: If it cannot be loaded.
    """
    model = make_base(cfg, tokenizer)
    if cfg.model.lora:
        model = add_lora(model, **cfg.model.lora, reset_token_id=reset_token_id(tokenizer))
    return model


def make_module(
    cfg: DictConfig,
    model: Any,
    *,
    num_steps: int,
    reset_id: int,
    assembly: Assembly | None = None,
) -> ForestModule:
    """Return the Lightning module of the objective around `model`; see `ForestModule`."""
    optimizer = OptimizerSettings(**{**cfg.optimizer, "betas": tuple(cfg.optimizer.betas)})
    shared = {
        "optimizer": optimizer,
        "num_steps": num_steps,
        "chunk_size": cfg.objective.chunk_size,
        "reset_token_id": reset_id,
        "seed": cfg.seed,
        "assembly": assembly,
    }
    if cfg.objective.name == "sft":
        return SFTModule(model, **shared)
    objective = cfg.objective
    settings = DPOSettings(
        objective.loss,
        objective.beta,
        objective.label_smoothing,
        keeps_reference=objective.reference == "model",
    )
    return DPOModule(model, settings=settings, **shared)


def make_trainer(cfg: DictConfig, *, num_steps: int) -> pl.Trainer:
    """Return the trainer: one pass over the schedule, which holds every epoch."""
    section = cfg.trainer
    num_micro = section.accumulate_grad_batches
    # Deterministic mode would fill each new tensor with NaN first, to show who reads unset memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    trainer = pl.Trainer(
        accelerator=section.accelerator,
        devices=section.devices,
        num_nodes=section.num_nodes,
        strategy=make_strategy(
            cfg.strategy,
            on_gpu=trains_on_gpu(cfg),
            has_frozen=bool(cfg.model.lora) or cfg.objective.get("reference") == "model",
        ),
        precision=section.precision,
        max_epochs=1,
        accumulate_grad_batches=num_micro,
        gradient_clip_val=section.gradient_clip_val,
        log_every_n_steps=section.log_every_n_steps,
        val_check_interval=min(section.val_every_n_steps, num_steps) * num_micro,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=section.enable_progress_bar,
        enable_model_summary=False,
        deterministic=section.deterministic,
        callbacks=_callbacks(cfg),
        logger=[instantiate(item) for item in cfg.logger.values() if item],
        # Engines that write a folder do without; see strategies.staged.
        plugins=[AtomicCheckpointIO()] if cfg.strategy.name in ("single", "ddp") else [],
    )
    # What goes into the model is ids. What is float in a batch, weights and the reference's
    # log-probs, goes into the loss: in bf16 a log-prob of -300 would be off by one.
    trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
    return trainer


def _callbacks(cfg: DictConfig) -> list[pl.Callback]:
    callbacks = [instantiate(item) for item in cfg.callbacks.values() if item]
    if cfg.trainer.enable_progress_bar:
        # Showing a number waits for the GPU: only when it is logged anyway.
        callbacks.append(TQDMProgressBar(refresh_rate=cfg.trainer.log_every_n_steps))
    return callbacks
