"""What a step needs of each GPU: `python -m backtrack.plan +experiment=NAME [key=value ...]`.

Prints memory by kind, tokens and seconds of a step, and whether it fits; where it does not, the
smallest change with which it does. No weights are loaded: the model is made on torch's meta device.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from backtrack import CONF_DIR
from backtrack.adapters import add_lora
from backtrack.build import make_tokenizer, model_spec
from backtrack.checks import check_values, method_of
from backtrack.config import ConfigError, check_command_line
from backtrack.data.examples import most_tokens
from backtrack.memory_model import memory, step_operations
from backtrack.models import choose_attention, load_config
from backtrack.plan_job import PRECISIONS, Job, Shape
from backtrack.plan_search import Limits, smallest_change

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GIB = 2**30
PATHS = {"sft": 1, "sft_backtrack": 2, "dpo": 2, "dpo_backtrack": 4}
"""Paths of a tree, each with one answer that is predicted, by method."""

WORDS = {
    "weights": "weights, casts included",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "activations": "activations of the layers",
    "head": "chunked head, or what peaks else",
    "buffers": "communication",
    "reference": "reference model",
}
"""How the parts of `Memory` are called in the table."""


def plan(cfg: DictConfig) -> str:
    """Return the plan of a step of `cfg`, as text.

    Raises:
        ConfigError: With every problem of the configuration.
        ValueError: If the sizes of the model are not to be had.
    """
    problems = check_values(cfg) + own_problems(cfg)
    if problems:
        raise ConfigError(problems)
    job = job_of(cfg, shape_of(make_empty(cfg), has_eager_attention=_is_eager(cfg)))
    usable = cfg.device_memory_gib * (1 - cfg.headroom)
    limits = Limits(usable * GIB, cfg.host_memory_gib * GIB)
    parts = [_heading(cfg, job), _table(job), _speed(cfg, job), _verdict(cfg, job, limits)]
    return "\n\n".join(parts)


def own_problems(cfg: DictConfig) -> list[str]:
    """Return what is wrong with the keys of conf/plan.yaml, or too vague to be planned."""
    problems = [
        f"{key}: {cfg[key]!r} is not allowed; expected a number above 0"
        for key in ("device_memory_gib", "host_memory_gib", "flops_per_s", "mfu")
        if not _is_positive(cfg[key])
    ]
    if _is_positive(cfg.mfu) and cfg.mfu > 1:
        problems.append(
            f"mfu: {cfg.mfu} is not allowed; expected a share of flops_per_s, at most 1"
        )
    if not (cfg.headroom == 0 or _is_positive(cfg.headroom)) or cfg.headroom >= 1:
        problems.append(f"headroom: {cfg.headroom!r} is not allowed; expected 0 to below 1")
    tokens = cfg.example_tokens
    if tokens is not None and not (_is_positive(tokens) and 1 <= tokens <= cfg.data.max_tokens):
        problems.append(
            f"example_tokens: {tokens!r} is not allowed; expected 1 to data.max_tokens="
            f"{cfg.data.max_tokens}, or null"
        )
    if cfg.trainer.devices == "auto":
        problems.append("trainer.devices: auto cannot be planned; expected a number")
    if cfg.trainer.precision not in PRECISIONS:
        problems.append(
            f"trainer.precision: {cfg.trainer.precision!r} cannot be planned; expected one of "
            f"{', '.join(PRECISIONS)}"
        )
    return problems


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def architecture_of(cfg: DictConfig) -> PreTrainedConfig:
    """Return the sizes of the model, its row for [RESET] included; see conf/plan.yaml.

    Raises:
        ValueError: If the hub has to be asked and does not answer.
    """
    spec = model_spec(cfg)
    sizes: Any = OmegaConf.to_container(cfg.architectures)
    if spec.path is None:
        num_rows = max(make_tokenizer(cfg).get_vocab().values()) + 1
        config: Any = _made({**(spec.init or {}), "vocab_size": num_rows})
    elif spec.path in sizes:
        config = _made(sizes[spec.path])
        config.vocab_size += spec.reset_token is None
    else:
        config = load_config(spec, spec.path)
        is_prepared = getattr(config, "reset_token_id", None) is not None
        if is_prepared:
            return config  # type: ignore[no-any-return]
        config.vocab_size += spec.reset_token is None
    config.vocab_size = -(-config.vocab_size // spec.vocab_multiple) * spec.vocab_multiple
    return config  # type: ignore[no-any-return]


def _made(sizes: dict[str, Any]) -> PreTrainedConfig:
    sizes = dict(sizes)
    # The ids of special tokens change no size; the defaults may lie outside a small vocabulary.
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model(sizes.pop("family"), **ids, **sizes)


def _is_eager(cfg: DictConfig) -> bool:
    return choose_attention(architecture_of(cfg), cfg.model.attn_implementation) == "eager"


def make_empty(cfg: DictConfig) -> Any:
    """Return the model of `cfg` without weights, under LoRA where it is trained so."""
    config = architecture_of(cfg)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        if cfg.model.lora:
            model = add_lora(model, **cfg.model.lora, reset_token_id=config.vocab_size - 1)
    return model


def shape_of(model: Any, *, has_eager_attention: bool) -> Shape:
    """Return the sizes of a causal language model, with or without weights.

    Args:
        model: May carry LoRA.
        has_eager_attention: Whether it will make its attention scores in full.
    """
    config = model.config.get_text_config()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    weights = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    in_layers = sum(
        p.numel() for m in layers for name, p in m.named_parameters() if "lora_" not in name
    )
    is_gated = any(name.endswith("gate_proj") for name, _ in layers[0].named_modules())
    return Shape(
        hidden=config.hidden_size,
        # Without a gate half as much is kept: what enters the activation, and what leaves it.
        mlp=config.intermediate_size if is_gated else config.intermediate_size // 2,
        heads=config.num_attention_heads,
        key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        layers=len(layers),
        vocabulary=config.vocab_size,
        layer_weights=in_layers,
        num_trained=sum(weights.values()),
        num_frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        lora_rank=max(
            (p.shape[0] for n, p in model.named_parameters() if "lora_A" in n), default=0
        ),
        norms=sum("Norm" in type(child).__name__ for child in layers[0].children()),
        has_fp32_norms="gemma" in config.model_type,
        has_eager_attention=has_eager_attention,
        has_score_softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        has_final_softcap=getattr(config, "final_logit_softcapping", None) is not None,
        is_tied=bool(config.tie_word_embeddings),
    )


def job_of(cfg: DictConfig, shape: Shape) -> Job:
    """Return the step that `cfg` describes, of a model of `shape`."""
    data, trainer, method = cfg.data, cfg.trainer, method_of(cfg)
    most = most_tokens(
        method,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=data.max_response_tokens,
    )
    tokens = cfg.example_tokens or most
    edges = tokens * PATHS[method] * data.max_response_tokens / most
    job = Job(
        shape=shape,
        precision=trainer.precision,
        dtype_bytes=torch.finfo(getattr(torch, cfg.model.dtype)).bits // 8,
        strategy=cfg.strategy.name,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        micro=trainer.accumulate_grad_batches,
        batch_size=data.batch_size,
        example_tokens=tokens,
        example_edges=edges,
        max_tokens=data.max_tokens,
        has_fixed_rows=trainer.accelerator != "cpu" and data.layout == "forest",
        chunk_size=cfg.objective.chunk_size,
        checkpointing=float(cfg.model.gradient_checkpointing),
        reference=cfg.objective.get("reference", "precomputed"),
        reshards=cfg.strategy.get("reshard_after_forward", True),
        bucket_size=cfg.strategy.get("bucket_size", 0),
        attends_by_tree=trainer.accelerator == "cpu" and data.layout == "forest",
    )
    if data.layout == "forest":
        return job
    # Unrolled, every path is a row of its own: the prompt, a prefix and an answer.
    share = (data.max_prompt_tokens + 2 * data.max_response_tokens + 1) / most
    length = min(math.ceil(tokens * share), data.max_tokens)
    return job._replace(
        batch_size=job.batch_size * PATHS[method],
        example_tokens=length,
        example_edges=edges / PATHS[method],
        max_tokens=length,
    )


def _heading(cfg: DictConfig, job: Job) -> str:
    shape, trainer = job.shape, cfg.trainer
    numbers = shape.num_trained + shape.num_frozen
    tokens = "the mean you gave" if cfg.example_tokens else "the most that data.max_* allow"
    lines = [
        f"{cfg.name}: {cfg.model.path or 'a random model'}, {numbers / 1e9:.2f} B parameters, "
        f"{shape.num_trained / 1e9:.4g} B of them trained",
        f"{cfg.strategy.name}, {trainer.num_nodes} x {trainer.devices} GPUs, {trainer.precision}",
        f"a step: {cfg.data.batch_size} examples of {job.example_tokens:.0f} tokens ({tokens})",
        f"a GPU: {job.micro * (1 + job.runs_reference)} forwards a step, each of "
        f"{job.rows} x {job.length} tokens (rows x length, padding included)",
    ]
    return "\n".join(lines + _hints(cfg, job))


def _hints(cfg: DictConfig, job: Job) -> list[str]:
    """Return what is wasted, with the setting that wastes less."""
    shares, batch = job.ranks * job.micro, cfg.data.batch_size
    if batch < shares:
        return [
            f"mind: {shares - batch} of {shares} forwards are empty and cost as much as any; "
            f"expected trainer.accumulate_grad_batches={max(1, batch // job.ranks)}, or a larger "
            "data.batch_size"
        ]
    fit = max(1, int(job.max_tokens / job.example_tokens))
    fewest = max(1, -(-batch // (job.ranks * fit)))
    if job.has_fixed_rows and job.rows == 1 and 2 * fewest <= job.micro:
        return [
            f"mind: {fit} such examples fit into a row; trainer.accumulate_grad_batches={fewest} "
            f"computes {fewest * job.ranks * job.length} tokens a step, not "
            f"{shares * job.length}"
        ]
    return []


def _table(job: Job) -> str:
    """Return memory by kind, as configured, without recomputation and with all of it."""
    shares = dict.fromkeys([job.checkpointing, 0.0, 1.0])
    columns = [memory(job._replace(checkpointing=share)) for share in shares]
    titles = [f"recomputed {share:.0%}" for share in shares]
    titles[0] += " (yours)"
    rows = [
        ("GiB of a GPU", titles),
        *(
            (word, [_gib(getattr(column, name)) for column in columns])
            for name, word in WORDS.items()
        ),
        ("together", [_gib(column.total) for column in columns]),
    ]
    if columns[0].host:
        rows.append(("host, all of a node", [_gib(c.host * job.devices) for c in columns]))
    return "\n".join(f"{first:<34}" + "".join(f"{x:>24}" for x in rest) for first, rest in rows)


def _gib(number: float) -> str:
    return f"{number / GIB:.2f}"


def _speed(cfg: DictConfig, job: Job) -> str:
    operations = step_operations(job)
    seconds = operations / (cfg.flops_per_s * cfg.mfu)
    tokens = cfg.data.batch_size * (cfg.example_tokens or job.example_tokens)
    return (
        f"tokens of a step: {tokens:.0f} of examples, "
        f"{job.ranks * job.micro * job.rows * job.length} computed with padding, on all GPUs\n"
        f"a step takes about {seconds:.3g} s: {operations:.3g} operations a GPU at {cfg.mfu:g} of "
        f"{cfg.flops_per_s:.3g} a second; waiting for other GPUs is not in it"
    )


def _verdict(cfg: DictConfig, job: Job, limits: Limits) -> str:
    needed = memory(job)
    there = (
        f"{needed.total / GIB:.1f} of {cfg.device_memory_gib:g} GiB, {cfg.headroom:.0%} headroom"
    )
    if needed.host:
        there += f", {needed.host * job.devices / GIB:.0f} of {cfg.host_memory_gib:g} GiB of a host"
    if limits.holds(job):
        return f"fits: {there}"
    largest = most_tokens(
        method_of(cfg),
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        max_response_tokens=cfg.data.max_response_tokens,
    )
    found = smallest_change(job, limits, largest=largest)
    if found is None:
        return (
            f"does not fit: {there}; nor does it with anything that was tried, on 64 times the GPUs"
        )
    overrides, changed = found
    then = f"{memory(changed).total / GIB:.1f} GiB"
    return f"does not fit: {there}\nthe smallest change with which it fits ({then}): {overrides}"


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="plan")
def _main(cfg: DictConfig) -> None:
    try:
        print(plan(cfg))
    except ValueError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Check the command line, then plan; a problem ends in one clear message."""
    try:
        check_command_line("plan", sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    _main()


if __name__ == "__main__":
    main()
