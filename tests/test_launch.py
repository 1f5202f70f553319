"""Launching: a rank's place in the environment, what ranks agree on, what cannot work."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from omegaconf import OmegaConf
from torch.distributed import HashStore

from backtrack.config import check_command_line, compose_config
from backtrack.launch import (
    Launch,
    RankFilter,
    agree,
    error_line,
    follow_first,
    launch_of,
    launch_problems,
    multirun_problem,
    rank_of,
)
from backtrack.runs import RUN_DIR_VARIABLE
from backtrack.start import resolve_start
from backtrack.train import TrainResult, train
from tests.tiny_runs import ROOT, config_of, overrides_of

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
}
SLURM = {  # as SLURM 22.05 sets them in a step of `srun`
    "SLURM_JOB_ID": "481234",
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
BY_LIGHTNING = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "BACKTRACK_RUN_DIR": "logs/run"}
LAUNCHING = (*TORCHRUN, *SLURM, *BY_LIGHTNING, "MASTER_ADDR", "MASTER_PORT")
ALIKE = "optimizer.eps=1.0e-3"  # a small eps makes steps of the learning rate of round-off


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    for name in LAUNCHING:
        monkeypatch.delenv(name, raising=False)


def config(*, strategy="ddp", devices=4, num_nodes=2, accelerator="auto"):
    trainer = {"devices": devices, "num_nodes": num_nodes, "accelerator": accelerator}
    return OmegaConf.create({"strategy": {"name": strategy}, "trainer": trainer})


def without(environ, *names, **changed):
    return {key: value for key, value in {**environ, **changed}.items() if key not in names}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (BY_LIGHTNING, None),
        (TORCHRUN, Launch("torchrun", rank=5, num_ranks=8, attempt=2)),
        (SLURM, Launch("SLURM", rank=5, num_ranks=8)),
        ({**SLURM, **TORCHRUN}, Launch("torchrun", rank=5, num_ranks=8, attempt=2)),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, None),
    ],
)
def test_launch_is_read_from_the_environment(environ, expected):
    assert launch_of(environ) == expected


@pytest.mark.parametrize(
    ("environ", "rank"), [({}, 0), (BY_LIGHTNING, 1), (TORCHRUN, 5), (SLURM, 5)]
)
def test_launch_rank_counts_over_all_nodes(environ, rank):
    assert rank_of(environ) == rank


def test_launch_alone_decides_for_itself():
    assert agree(lambda: ["logs/run", None]) == ["logs/run", None]


def test_launch_ranks_follow_the_first_question_by_question():
    store = HashStore()

    def ask(rank):
        return [follow_first(store, rank, lambda i=i: [rank, i]) for i in range(3)]

    with ThreadPoolExecutor(3) as pool:
        answers = [*pool.map(ask, (2, 1, 0))]
    assert answers == [[[0, 0], [0, 1], [0, 2]]] * 3


def test_launch_first_rank_that_fails_fails_the_others():
    store = HashStore()

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow_first(store, 0, fail)
    with pytest.raises(ValueError, match=r"the first rank .* ended with an error"):
        follow_first(store, 1, fail)


FITTING = [
    (config(), TORCHRUN),
    (config(), SLURM),
    (config(devices="auto"), SLURM),
    (config(strategy="single", devices=1, num_nodes=1), {}),
    (config(num_nodes=1), {}),
    (config(num_nodes=1), {**BY_LIGHTNING, "SLURM_STEP_NUM_TASKS": "1"}),
    (config(devices=1, num_nodes=1), {"SLURM_NTASKS": "1"}),
]
CONTRADICTING = [
    (config(devices=8), TORCHRUN, "trainer.devices: 8 times trainer.num_nodes=2 .* 8 processes"),
    (config(devices=8, num_nodes=1), {"SLURM_NTASKS": "1"}, "SLURM started, 1 process;"),
    (config(strategy="single", devices=1), SLURM, "strategy: single, but SLURM started 8 "),
    (config(), without(SLURM, "SLURM_STEP_ID"), "SLURM_NTASKS: .* `srun python -m"),
    (config(), without(SLURM, "SLURM_NTASKS_PER_NODE"), "SLURM_NTASKS_PER_NODE: not set"),
    (config(), {**SLURM, "SLURM_JOB_NAME": "bash"}, "SLURM_JOB_NAME: .*srun --job-name=train"),
    (config(), {}, "trainer.num_nodes: 2, but no launcher"),
]


@pytest.mark.parametrize(("cfg", "environ"), FITTING)
def test_launch_that_fits_has_no_problem(cfg, environ):
    assert launch_problems(cfg, environ) == []


@pytest.mark.parametrize(("cfg", "environ", "expected"), CONTRADICTING)
def test_launch_that_contradicts_the_configuration_is_named(cfg, environ, expected):
    (problem,) = launch_problems(cfg, environ)
    assert re.search(expected, problem), problem


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
@pytest.mark.parametrize(("devices", "num_nodes"), [(2, 1), ("auto", 1), (1, 2)])
def test_launch_multirun_may_not_start_ranks_by_its_own_command_line(strategy, devices, num_nodes):
    cfg = config(strategy=strategy, devices=devices, num_nodes=num_nodes)
    problem = multirun_problem(cfg, {})
    assert problem.startswith(f"trainer.devices: {devices} with strategy={strategy} ")
    assert problem.endswith("or start the sweep under an outer launcher (torchrun, SLURM)")
    assert multirun_problem(cfg, TORCHRUN) is None
    assert multirun_problem(cfg, SLURM) is None


def test_launch_multirun_of_one_device_a_job_is_fine():
    assert multirun_problem(config(devices=1, num_nodes=1), {}) is None
    assert multirun_problem(config(strategy="single", devices="auto", num_nodes=1), {}) is None
    assert multirun_problem(config(devices="auto", num_nodes=1, accelerator="cpu"), {}) is None


def shown(monkeypatch, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    lines = []
    handler = logging.Handler()
    handler.addFilter(RankFilter())
    handler.emit = lambda record: lines.append(f"{record.rank}{record.getMessage()}")
    logger = logging.Logger("kettles")
    logger.addHandler(handler)
    logger.info("data: %d rows", 3)
    logger.warning("stopped at step %d", 2)
    return lines


def test_launch_first_rank_logs_all_and_the_others_what_went_wrong(monkeypatch):
    assert shown(monkeypatch, {}) == ["data: 3 rows", "stopped at step 2"]
    assert shown(monkeypatch, TORCHRUN) == ["rank 5: stopped at step 2"]


def test_launch_errors_say_whose_they_are():
    assert error_line(ValueError("seed: no"), {}) == "error: seed: no"
    assert error_line(ValueError("seed: no"), SLURM) == "rank 5: error: seed: no"


def test_launch_profiles_read_the_launcher(monkeypatch):
    def sizes(profile):
        trainer = compose_config("train", [f"trainer={profile}", "strategy=ddp"]).trainer
        return trainer.devices, trainer.num_nodes, trainer.accelerator, trainer.precision

    assert sizes("cpu") == (1, 1, "cpu", "32-true")
    assert sizes("one_node") == ("auto", 1, "auto", "bf16-mixed")
    assert sizes("many_nodes") == (8, 1, "auto", "bf16-mixed")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert sizes("many_nodes") == (4, 2, "auto", "bf16-mixed")
    for name, value in {**TORCHRUN, "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert sizes("many_nodes") == (2, 3, "auto", "bf16-mixed")


def test_launch_slurm_launcher_takes_what_submitit_does():
    command = ["-m", "+experiment=tiny_sft", "hydra/launcher=slurm", "seed=0,1"]
    check_command_line("train", [*command, "hydra.launcher.partition=gpu"])
    ours = OmegaConf.load(ROOT / "conf/hydra/launcher/slurm.yaml")
    theirs = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config")
    assert set(ours) <= set(OmegaConf.structured(theirs.SlurmQueueConf))


SCRIPT = ROOT / "docs/llama3_dpo.sbatch"


def script_command():
    """The command line of the training in the script, as bash joins it, and its other lines."""
    lines = SCRIPT.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    (command,) = [line for line in lines if line.startswith("srun ")]
    return command.partition("backtrack.train")[2].split(), lines


def test_launch_script_is_bash_and_its_command_is_accepted(tmp_path):
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    words, lines = script_command()
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert words[-1] == '"$@"'
    overrides = [word.replace('"$MODEL"', str(tmp_path)) for word in words[:-1]]
    check_command_line("train", overrides)
    asked = dict(
        line[10:].split()[0].split("=") for line in lines if line[:7] == "#SBATCH" and "=" in line
    )
    assert asked["nodes"] == "4"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["signal"] == "SIGUSR1@180"


GUIDE = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").replace("\\\n", " ")


@pytest.mark.parametrize(
    "words", re.findall(r"^ *torchrun .*-m backtrack\.train (.*)$", GUIDE, re.M)
)
def test_launch_documented_torchrun_is_accepted(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r"model\.path=(\S+)", words):  # what an earlier command leaves
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").touch()
        (tmp_path / folder / "model.safetensors").touch()
    check_command_line("train", words.split())


def test_launch_documented_torchrun_is_found():
    assert GUIDE.count("torchrun --standalone") == 2
    assert GUIDE.count("torchrun --nnodes=4") == 1


def ranks_of(launcher, overrides):
    """Run two ranks to their end; return what they print, errors last."""
    settings = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    train_command = ["-m", "backtrack.train", *overrides]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        # Neither a name of the run nor the endpoint is shared beyond what torchrun tells its ranks.
        done = subprocess.run(
            [*command, "--standalone", *train_command], check=False, timeout=300, **settings
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr
    step = {**SLURM, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    step |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NODEID": "0"}
    tasks = [
        subprocess.Popen(
            [sys.executable, *train_command],
            env={**os.environ, **step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            **settings,
        )
        for rank in "01"
    ]
    texts = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], texts
    return tuple("".join(parts) for parts in zip(*texts, strict=True))


def losses_of(folder):
    with (folder / "csv/metrics.csv").open(newline="") as file:
        rows = [row["train/loss"] for row in csv.DictReader(file)]
    return [float(value) for value in rows if value]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", "SLURM"])
def test_launch_two_ranks_share_a_folder_and_give_the_losses_of_one(tmp_path, launcher):
    alone = train(config_of(tmp_path, ALIKE, f"paths.log_dir={tmp_path / 'one'}", steps=3))
    more = (ALIKE, "strategy=ddp", "trainer.devices=2")
    stdout, stderr = ranks_of(launcher, overrides_of(tmp_path, *more, steps=3))
    folders = [p for p in (tmp_path / "logs/train/tiny_sft").iterdir() if not p.is_symlink()]
    assert len(folders) == 1
    ends = [line for line in stdout.splitlines() if line.startswith("model: ")]
    assert ends == [f"model: {folders[0] / 'model'}"]
    assert stderr.count("] data: ") == 1  # the first rank's line alone
    assert len(losses_of(folders[0])) == 3
    assert losses_of(folders[0]) == pytest.approx(losses_of(alone.folder), abs=1e-5)
    assert json.loads((folders[0] / "data.json").read_text())


def test_launch_ranks_train_together_what_they_start_from_in_a_folder_of_its_own(
    tmp_path, monkeypatch
):
    for name, value in {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "named"))
    inner = []

    def pretend(cfg):
        inner.append((cfg, os.environ.get(RUN_DIR_VARIABLE)))
        return TrainResult(tmp_path, tmp_path / "model", {})

    more = ("strategy=zero2", "trainer.devices=1", "start_from=tiny_base")
    found = resolve_start(config_of(tmp_path, *more), pretend)
    ((cfg, named),) = inner
    assert (cfg.name, cfg.strategy.name, cfg.trainer.accelerator) == ("tiny_base", "zero2", "cpu")
    assert named is None
    assert found.model.path == str(tmp_path / "model")
    assert os.environ[RUN_DIR_VARIABLE] == str(tmp_path / "named")


def test_launch_zero_without_deepspeed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("backtrack.launch.find_spec", lambda name: None)
    cfg = compose_config("train", ["+experiment=tiny_sft", "strategy=zero2"])
    (problem,) = launch_problems(cfg, {})
    assert problem.startswith("strategy: zero2 needs DeepSpeed")
    assert "pip install 'backtrack-lm[deepspeed]'" in problem
