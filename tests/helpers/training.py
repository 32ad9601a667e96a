"""Runs of the tiny recipe: prepared, trained, interrupted and looked at."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.models import checkpoint_folder
from tests.helpers import ranks as processes
from tests.helpers import recipes
from tests.helpers.ranks import Done
from tests.helpers.recipes import BATCH, STEPS, WINDOW

ONE_RANK: dict[str, Any] = {"ds": "dense", "ranks": 1, "jobs.clkd.batch.micro_size": 4}
"""Of `train`: one rank that sees what two do."""


def prepare(run: Path) -> None:
    """Everything before the student's training: scenes, tokenizer, models, a trained teacher, its store, the prior."""
    recipes.write(run / "recipe.yaml", recipes.tiny(run))
    stage(run, "scenes")
    stage(run, "tokenizer")
    stage(run, "student", "--model", "small", "--model", "moe")
    train(run, "teacher")
    stage(run, "teacher")
    stage(run, "hardness")


def copied(prepared: Path, run: Path, **clkd: object) -> Path:
    """A run folder of one's own, with other settings of the job `clkd`."""
    shutil.copytree(prepared, run)
    recipes.write(run / "recipe.yaml", recipes.tiny(run, **clkd))
    return run


def stage(run: Path, *words: str, check: bool = True, ranks: int = 0, **overrides: object) -> Done:
    """A stage and its options, on the run's recipe with some of its values replaced."""
    name, *options = words
    changes = [f"{key}={value}" for key, value in overrides.items()]
    return processes.run(processes.clkd, name, run / "recipe.yaml", *options, *changes, ranks=ranks, check=check)


def train(
    run: Path, job: str = "clkd", ds: str = "cpu_smoke", ranks: int = 2, check: bool = True, **overrides: object
) -> Done:
    """Train a job to its end. `ranks` 0: one process that no launcher started."""
    return stage(run, "train", "--deepspeed_config", ds, check=check, ranks=ranks, job=job, **overrides)


def interrupt(run: Path, after: int, ranks: int = 2, number: int = signal.SIGTERM) -> tuple[int, ...]:
    """Start the job `clkd`, signal every rank when step `after` was logged: their exit statuses."""
    path = run / "jobs" / "clkd" / "metrics.jsonl"
    words = ("train", run / "recipe.yaml", "--deepspeed_config", "cpu_smoke" if ranks == 2 else "dense", "job=clkd")
    running = processes.start(processes.clkd, *words, f"jobs.clkd.batch.micro_size={4 // ranks}", ranks=ranks)
    while running.alive() and not (path.exists() and path.read_text().count("\n") >= after):
        time.sleep(0.01)
    running.signal(number)
    done = running.wait()
    assert 0 not in done.statuses, done.stderr[-4000:]
    return done.statuses


def weights(run: Path, job: str = "clkd") -> dict[str, torch.Tensor]:
    """Parameters of the newest checkpoint."""
    return dict(checkpoint_folder.read_parameters(newest(run, job)))


def newest(run: Path, job: str = "clkd") -> Path:
    """Folder of the newest checkpoint."""
    folder = checkpoint_folder.latest(run / "jobs" / job / "checkpoints")
    assert folder is not None
    return folder


def metrics(run: Path, key: str) -> list[Any]:
    """One of the logged values, step by step."""
    lines = (run / "jobs" / "clkd" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def losses(run: Path) -> list[float]:
    return metrics(run, "loss")


def saved_step(run: Path) -> int:
    return int(newest(run).name.split("-")[1])


def last_order(run: Path) -> torch.Tensor:
    """Table indices of the steps trained in the last window."""
    return load_file(newest(run) / "arrays.safetensors")["plan/index"][: STEPS % WINDOW * BATCH]


def same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
