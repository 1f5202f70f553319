"""Train: `python -m backtrack.train +experiment=NAME [key=value ...]`.

Reads as the object graph: data, then model, then module, then trainer.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import TQDMProgressBar
from omegaconf import DictConfig, OmegaConf

from backtrack import CONF_DIR, runs
from backtrack.adapters import add_lora
from backtrack.backbone import check_architecture
from backtrack.checks import check_values, method_of
from backtrack.config import ConfigError, check_command_line
from backtrack.cpu import tune_for_training
from backtrack.data.examples import Recipe
from backtrack.data.load import load_data, make_source, write_report
from backtrack.data.mixture import mix_schedule
from backtrack.data.module import BatchSettings, ForestData
from backtrack.data.template import check_template
from backtrack.data.world import make_world, save_world
from backtrack.data.world_tokenizer import make_world_tokenizer
from backtrack.model_spec import ModelSpec
from backtrack.models import load_model, load_tokenizer, model_fingerprint, setup_tokenizer
from backtrack.modules.base import ForestModule, OptimizerSettings
from backtrack.modules.checkpoint_io import AtomicCheckpointIO
from backtrack.modules.dpo import DPOModule, DPOSettings
from backtrack.modules.reference import reference_table
from backtrack.modules.sft import SFTModule
from backtrack.saving import save_folder
from backtrack.start import resolve_start
from backtrack.tokens import reset_token_id
from backtrack.tree_attention import use_tree_attention

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TrainResult(NamedTuple):
    """What a run leaves.

    Attributes:
        folder: Of the run.
        model: The trained model as a plain Hugging Face folder; None after Ctrl-C.
        metrics: Last logged value of each metric.
        was_interrupted: Whether Ctrl-C ended the run.
    """

    folder: Path
    model: Path | None
    metrics: dict[str, float]
    was_interrupted: bool = False


def train(cfg: DictConfig) -> TrainResult:
    """Return the run that `cfg` describes, trained to its end or to Ctrl-C.

    Raises:
        ConfigError: With every problem of the configuration.
        ValueError: If data, tokenizer, model or checkpoint do not fit; before weights load wherever
            that can be known.
    """
    problems = check_values(cfg)
    if problems:
        raise ConfigError(problems)
    cfg = resolve_start(cfg.copy(), train)
    run = runs.open_run(cfg)
    if run.is_complete:
        log.info("%s is complete", run.folder)
        return TrainResult(run.folder, run.folder / runs.MODEL, {})
    OmegaConf.update(cfg, "paths.run_dir", str(run.folder))
    if runs.is_first_rank():
        runs.save_config(run.folder, cfg)
        runs.keep_log(run.folder)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if not trains_on_gpu(cfg):
        tune_for_training()

    tokenizer = make_tokenizer(cfg)
    data = make_data(cfg, tokenizer, run.folder)
    trainer = make_trainer(cfg, num_steps=data.num_steps)
    model = load_model(model_spec(cfg), tokenizer, seed=cfg.seed)
    fingerprint = model_fingerprint(model) if cfg.objective.name == "dpo" else ""
    module = make_module(cfg, model, num_steps=data.num_steps, reset_id=reset_token_id(tokenizer))
    if cfg.objective.name == "dpo" and cfg.objective.reference == "precomputed":
        _add_reference(module, data, trainer, fingerprint=fingerprint, cfg=cfg)
    with runs.shared_with_ranks(run.folder):
        _fit(trainer, module, data, run.checkpoint)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.global_step < data.num_steps:
        log.warning(
            "stopped at step %d of %d; go on with resume=auto", trainer.global_step, data.num_steps
        )
        return TrainResult(run.folder, None, metrics, was_interrupted=True)
    is_saved = data.num_steps % cfg.trainer.save_every_n_steps == 0
    if not (is_saved and (run.folder / runs.CHECKPOINT).is_file()):
        trainer.save_checkpoint(run.folder / runs.CHECKPOINT, weights_only=False)
    if trainer.is_global_zero:
        _leave_model(module, tokenizer, run.folder, cfg)
    trainer.strategy.barrier("the model is saved")
    return TrainResult(run.folder, run.folder / runs.MODEL, metrics)


def _add_reference(
    module: ForestModule,
    data: ForestData,
    trainer: pl.Trainer,
    *,
    fingerprint: str,
    cfg: DictConfig,
) -> None:
    """Give `data` the log-probs of the model as it is now, in the precision it is trained in."""
    module.to(trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():
        data.reference = reference_table(
            module,
            data.all_trees(),
            cache_dir=Path(cfg.paths.cache_dir),
            address=f"{fingerprint} {cfg.trainer.precision}",
            batches=data.settings,
            show_progress=cfg.trainer.enable_progress_bar,
        )


def _leave_model(
    module: ForestModule, tokenizer: PreTrainedTokenizerBase, folder: Path, cfg: DictConfig
) -> None:
    save_folder(module.model, tokenizer, folder / runs.MODEL)
    if "world" in cfg.data:
        save_world(make_world(**cfg.data.world), folder / runs.MODEL)
    runs.point_latest(folder)


def _fit(
    trainer: pl.Trainer, module: ForestModule, data: ForestData, checkpoint: Path | None
) -> None:
    with warnings.catch_warnings():
        # The loader starts where the restored step counter says; Lightning cannot know.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings(
            "ignore", message=".*Checkpoint directory .* exists and is not empty.*"
        )
        # Nothing is deleted: `runs.keep_log` has moved it.
        warnings.filterwarnings("ignore", message="Experiment logs directory .* not empty.*")
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)


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
    objective = cfg.objective
    return ForestData(
        train=loaded.train,
        validation=loaded.validation,
        schedule=mix_schedule(sizes=sizes, weights=weights, num_slots=num_slots, seed=cfg.seed),
        recipe=Recipe(
            method=method_of(cfg),
            seed=cfg.seed,
            reset_token_id=reset_token_id(tokenizer),
            safe_weight=objective.get("safe_weight", 0.0),
            backtrack_weight=objective.get("backtrack_weight", 0.0),
            elicit_weight=objective.get("elicit_weight", 0.0),
            discourage_weight=objective.get("discourage_weight", 0.0),
        ),
        settings=BatchSettings(
            batch_size=cfg.data.batch_size,
            max_tokens=cfg.data.max_tokens,
            layout=cfg.data.layout,
            pad_id=tokenizer.pad_token_id,
            num_workers=cfg.data.num_workers,
        ),
        num_micro=cfg.trainer.accumulate_grad_batches,
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


def make_module(cfg: DictConfig, model: Any, *, num_steps: int, reset_id: int) -> ForestModule:
    """Return the Lightning module of the objective around `model`, under LoRA where wanted."""
    check_architecture(model, layout=cfg.data.layout)
    if cfg.data.layout == "forest":
        use_tree_attention(model, on_gpu=trains_on_gpu(cfg))
    if cfg.model.lora:
        model = add_lora(model, **cfg.model.lora, reset_token_id=reset_id)
    model.train()
    optimizer = OptimizerSettings(**{**cfg.optimizer, "betas": tuple(cfg.optimizer.betas)})
    shared = {
        "optimizer": optimizer,
        "num_steps": num_steps,
        "chunk_size": cfg.objective.chunk_size,
        "reset_token_id": reset_id,
    }
    if cfg.objective.name == "sft":
        return SFTModule(model, **shared)
    settings = DPOSettings(cfg.objective.loss, cfg.objective.beta, cfg.objective.label_smoothing)
    return DPOModule(model, settings=settings, **shared)


def make_trainer(cfg: DictConfig, *, num_steps: int) -> pl.Trainer:
    """Return the trainer: one pass over the schedule, which holds every epoch."""
    section = cfg.trainer
    num_micro = section.accumulate_grad_batches
    # Deterministic mode would fill each new tensor with NaN first, to show who reads unset memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return pl.Trainer(
        accelerator=section.accelerator,
        devices=section.devices,
        num_nodes=section.num_nodes,
        strategy=section.strategy,
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
        plugins=[AtomicCheckpointIO()],
    )


def _callbacks(cfg: DictConfig) -> list[pl.Callback]:
    callbacks = [instantiate(item) for item in cfg.callbacks.values() if item]
    if cfg.trainer.enable_progress_bar:
        # Showing a number waits for the GPU: only when it is logged anyway.
        callbacks.append(TQDMProgressBar(refresh_rate=cfg.trainer.log_every_n_steps))
    return callbacks


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="train")
def _main(cfg: DictConfig) -> float | None:
    try:
        result = train(cfg)
    except (ValueError, OSError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")  # here: Hydra would print a traceback
    except KeyboardInterrupt:  # before the first step
        sys.exit(130)
    if result.was_interrupted:
        sys.exit(130)
    if runs.is_first_rank():
        print(f"model: {result.model}")
    return result.metrics.get("val/loss")


def main() -> None:
    """Check the command line, then train; a problem ends in one clear message."""
    try:
        check_command_line("train", sys.argv[1:])
        _main()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
