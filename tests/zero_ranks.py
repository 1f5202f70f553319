"""Real DeepSpeed engines on CPU ranks: `run_ranks` starts this file once for each of them.

The model has what makes sharded checkpoints go wrong: tied weights, a buffer, a frozen matrix,
sizes that no number of ranks divides, and three groups with rates and decays of their own. As
under Lightning, the schedule is the caller's and engines never see it.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False), "zero1_bf16": (1, True)}
STEPS, LATER = 3, 4  # before the checkpoint and after it
TAG = "checkpoint"  # Lightning's
CLIENT_STATE = {"global_step": STEPS, "model_identity": {"layers": 2}}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(11, 6)
        self.frozen = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.up = nn.Linear(7, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.row = nn.Parameter(torch.full((2,), 0.1))
        self.register_buffer("scale", torch.tensor([2.0]))
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embed(ids))
        hidden = self.up(self.norm(torch.tanh(hidden * self.scale.to(hidden))))
        return self.head(torch.cat([hidden[..., :2] + self.row, hidden[..., 2:]], dim=-1))


def ndim(p: nn.Parameter) -> int:
    return len(getattr(p, "ds_shape", p.shape))  # under stage 3 `p` itself is flat


def groups(model: nn.Module) -> list[dict]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rest = [p for name, p in named if "row" not in name]
    return [
        {"params": [p for p in rest if ndim(p) >= 2], "weight_decay": 0.3},
        {"params": [p for p in rest if ndim(p) < 2], "weight_decay": 0.0},
        {"params": [p for name, p in named if "row" in name], "weight_decay": 0.0, "lr": 0.05},
    ]


def make_engine(stage: int, *, is_bf16: bool):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": stage,
            "sub_group_size": 40,  # several parts of the optimiser for a group under stage 3
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": is_bf16},
    }
    with deepspeed.zero.Init(enabled=stage == 3, config_dict_or_path=config):
        model = Tiny()
    optimizer = torch.optim.AdamW(groups(model), lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, schedule


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 11, (4, 6), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def train(engine, schedule, steps: range) -> list[float]:
    """Losses of the steps over the same global batches, whatever the number of ranks."""
    losses = []
    for step in steps:
        world, rank = dist.get_world_size(), dist.get_rank()
        inputs, targets = (part.chunk(world)[rank] for part in batch(step))
        logits = engine(inputs).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        engine.backward(loss)
        engine.step()
        schedule.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def full_weights(engine) -> dict[str, torch.Tensor]:
    import deepspeed

    weights = {}
    for name, p in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            weights[name] = p.detach().clone()
    return weights


def save(folder: Path) -> dict[str, list[float]]:
    """Train, save as Lightning does, go on; return the losses after the checkpoint."""
    losses = {}
    for kind, (stage, is_bf16) in KINDS.items():
        engine, schedule = make_engine(stage, is_bf16=is_bf16)
        train(engine, schedule, range(STEPS))
        state = CLIENT_STATE | {"lr_schedulers": [schedule.state_dict()]}
        engine.save_checkpoint(
            str(folder / kind), client_state=state, tag=TAG, exclude_frozen_parameters=True
        )
        weights = full_weights(engine)
        if dist.get_rank() == 0:
            torch.save(weights, folder / f"{kind}.weights")
        losses[kind] = train(engine, schedule, range(STEPS, STEPS + LATER))
    return losses


def load(folder: Path) -> dict[str, list[float]]:
    """Load what was converted and go on; return the losses."""
    from backtrack.universal import loading_universal

    losses = {}
    for kind, (stage, is_bf16) in KINDS.items():
        engine, schedule = make_engine(stage, is_bf16=is_bf16)
        path = folder / f"{kind}.universal"
        with loading_universal(engine, path):
            # As Lightning's DeepSpeedStrategy does.
            _, state = engine.load_checkpoint(
                str(path),
                load_optimizer_states=True,
                load_lr_scheduler_states=False,
                load_module_strict=False,
            )
        assert state.items() >= CLIENT_STATE.items()
        schedule.load_state_dict(state["lr_schedulers"][0])
        losses[kind] = train(engine, schedule, range(STEPS, STEPS + LATER))
    return losses


def shard(folder: Path) -> dict[str, list[float]]:
    """Save a model of FSDP2 as Lightning's ModelParallelStrategy does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Tiny()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(groups(model), lr=0.02)
    inputs, targets = batch(0)
    nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()
    trained = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    weights = {n: w for n, w in get_model_state_dict(model).items() if n in trained}
    moments = {"moment": optimizer.state[model.up.weight]["exp_avg"]}
    dcp.save({"state_dict": weights, "optimizer_0": moments}, checkpoint_id=folder / "dcp")
    full = {name: weight.full_tensor() for name, weight in weights.items()}
    if dist.get_rank() == 0:
        torch.save(CLIENT_STATE, folder / "dcp" / "meta.pt")
        torch.save(full, folder / "dcp.weights")
    return {}


def run_ranks(job: str, world: int, folder: Path) -> dict[str, list[float]]:
    """What rank 0 of `world` processes returns for a job: save, load or shard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, "-m", "tests.zero_ranks", job, str(folder)]
        with (folder / f"{job}-{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        # A rank that fails lets the others wait for it.
        while None in (codes := [process.poll() for process in ranks]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    logs = [(folder / f"{job}-{rank}.log").read_text()[-3000:] for rank in range(world)]
    assert not any(codes), "\n".join(logs)
    return json.loads((folder / f"{job}-{world}.json").read_text())


@functools.cache
def saved(base: Path) -> tuple[Path, dict[str, list[float]]]:
    """A folder with a checkpoint of each kind by two ranks, and the losses that followed them."""
    folder = base / "zero"
    folder.mkdir()
    return folder, run_ranks("save", 2, folder)


def main(job: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if job == "shard":
        dist.init_process_group("gloo")
    else:
        import deepspeed

        # Or it compiles a faster all-reduce first, which takes a compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
    losses = {"save": save, "load": load, "shard": shard}[job](folder)
    if dist.get_rank() == 0:
        (folder / f"{job}-{dist.get_world_size()}.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
