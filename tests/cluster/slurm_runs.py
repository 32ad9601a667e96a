"""Tiny runs on the test cluster: recipe, environment, submission, and training jobs to disturb."""

import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from pipeline.targets.store import SoftTargetStore
from tests.cluster.lanes import TWO_NODES, Lane
from tests.cluster.slurm_cluster import Cluster
from tests.helpers import recipes
from tests.helpers.paths import ROOT

STEPS, EVERY = 60, 10
SGD = ("jobs.clkd.optimizer.kind=sgd", "jobs.clkd.optimizer.lr=1.0", "jobs.clkd.steps=40")
"""AdamW makes a rounding in a small gradient as large as any: on other ranks it is soon another training."""
CHAIN = (
    "--workers", "2", "--deepspeed_config", "ds_configs/cpu_smoke.json", "--with", f"train={' '.join(TWO_NODES)}",
)  # fmt: skip


def write_recipe(run: Path, steps: int = STEPS, scenes: int = 12, shard_samples: int = 16) -> Path:
    """A whole recipe of tiny models on few scenes."""
    run.mkdir(parents=True, exist_ok=True)
    path = run.parent / f"{run.name}.yaml"
    return recipes.write(path, recipes.chain(run, steps, EVERY, scenes, shard_samples))


def site(cluster: Cluster) -> dict[str, str]:
    """What a site sets in its users' environment, for ranks on CPUs."""
    return {
        "CLKD_HOME": str(ROOT),
        "CLKD_VENV": sys.prefix,
        "CLKD_LOCAL": str(cluster.folder / "local"),
        "CLKD_INTERFACE": "eth0",
        "CLKD_COLLECTIVE_TIMEOUT_S": "300",
        "DS_ACCELERATOR": "cpu",
        "DS_CONFIG": "ds_configs/cpu_smoke.json",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
        "TORCHDYNAMO_DISABLE": "1",  # a compiler that DeepSpeed imports for 2 s of CPU, and nothing here uses
    }


def submit(cluster: Cluster, *arguments: str | Path, check: bool = True, **variables: str):
    """`clkd submit` on the login node."""
    command = (sys.executable, "-m", "pipeline", "submit", *arguments)
    return cluster.run(*command, cwd=ROOT, env=site(cluster) | variables, check=check)


def run_status(cluster: Cluster, run: Path, check: bool = True):
    """`clkd status` on the login node."""
    command = (sys.executable, "-m", "pipeline", "status", run)
    return cluster.run(*command, cwd=ROOT, env=site(cluster), check=check)


def job_ids(output: str) -> dict[str, int]:
    """Job of each stage from what `clkd submit` printed."""
    lines = [line.partition("  after ")[0].split(maxsplit=1) for line in output.splitlines()]
    return {words[1]: int(words[0]) for words in lines if len(words) == 2 and words[0].isdigit()}


def start_script(
    cluster: Cluster, script: str, recipe: Path, *options: str, words: tuple[str, ...] = (), **variables: str
) -> str:
    """Submit one of the job scripts by hand; its job."""
    command = ("sbatch", "--parsable", *options, f"slurm/{script}.sbatch", recipe, *words)
    return cluster.run(*command, cwd=ROOT, env=site(cluster) | variables).stdout.strip()


@dataclass
class Training:
    """A run with everything but the student's training, and the job that trains it."""

    cluster: Cluster
    run: Path
    recipe: Path
    job: str = ""
    lane: Lane | None = None

    def start(self, *options: str, words: tuple[str, ...] = (), **variables: str) -> str:
        """Submit `slurm/train.sbatch` with options of sbatch and overrides of the recipe; its job."""
        options = self.lane.options(*options) if self.lane else options or TWO_NODES
        options = (f"--output={self.recipe.parent}/train-%j.out", *options)
        words = ("job=clkd", *words)
        self.job = start_script(self.cluster, "train", self.recipe, *options, words=words, **variables)
        return self.job

    def wait_for_step(self, step: int, timeout_s: float = 300.0) -> None:
        """Wait until a step is logged."""
        deadline = time.monotonic() + timeout_s
        while not (self.steps() and self.steps()[-1] >= step):
            assert time.monotonic() < deadline, self.story()
            time.sleep(0.02)

    def wait(self, state: str = "COMPLETED", restarts: int | None = None) -> dict[str, str]:
        """Wait for the job's end, which must be this one."""
        found = self.cluster.wait(self.job)
        assert found["JobState"] == state, self.story()
        assert restarts is None or int(found["Restarts"]) == restarts, self.story()
        return found

    def nodes(self) -> list[str]:
        """Of the running job, rank 0's first."""
        found = self.cluster.wait_for(self.job, lambda found: found["JobState"] == "RUNNING")
        return self.cluster.run("scontrol", "show", "hostnames", found["NodeList"]).stdout.split()

    def steps(self) -> list[int]:
        return [row["step"] for row in self.metrics()]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics()]

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run / "jobs" / "clkd" / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the exported model, which appears after the last step."""
        files = sorted((self.run / "jobs" / "clkd" / "model").glob("*.safetensors"))
        assert files, self.story()
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def state(self) -> dict[str, Any]:
        return json.loads((self.run / "slurm" / "train-clkd.json").read_text())

    def logs(self, rank: int) -> list[str]:
        """Of every start of the job, in order."""
        folders = sorted((self.run / "slurm" / "train-clkd").iterdir(), key=lambda f: list(map(int, f.name.split("-"))))
        return [log.read_text() for folder in folders if (log := folder / f"rank-{rank}.log").exists()]

    def first_steps(self) -> list[int]:
        """Steps that were done already at every start, from rank 0's progress bars."""
        found = [re.search(r"clkd: [^/]*?(\d+)/\d+ \[", log) for log in self.logs(0)]
        return [int(match[1]) for match in found if match]

    def output(self) -> str:
        """Of the last job's script."""
        return (self.recipe.parent / f"train-{self.job}.out").read_text()

    def story(self) -> str:
        """For a failing test's message."""
        patterns = ("slurm/train-clkd*.json", "slurm/train-clkd/*/rank*")
        files = sorted(file for pattern in patterns for file in self.run.glob(pattern))
        files = [*self.recipe.parent.glob("train-*.out"), *files]
        return "\n".join(f"=== {file}\n{file.read_text()[-1500:]}" for file in files)

    def equals(self, undisturbed: "Training") -> None:
        """Same weights, bit for bit, and the same losses at every step."""
        ours, theirs = self.weights(), undisturbed.weights()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert self.steps() == undisturbed.steps()
        assert self.losses() == undisturbed.losses()

    def close_to(self, undisturbed: "Training") -> None:
        """The same training (with SGD) on another number of ranks: other sums of the same numbers.

        A rounding may send a token to another expert. Weights move by 0.27 in these steps.
        """
        assert self.steps() == undisturbed.steps()
        np.testing.assert_allclose(self.losses(), undisturbed.losses(), rtol=5e-3)
        ours = self.weights()
        for name, tensor in undisturbed.weights().items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-3, msg=name)


def copy_run(cluster: Cluster, source: Path, target: Path, **sizes: int) -> Training:
    """A private copy without the student's training; sizes as for `write_recipe`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("clkd", "slurm", "evaluation", "exported"))
    return Training(cluster, target, write_recipe(target, **sizes))


def same_stores(ours: Path, theirs: Path) -> int:
    """Every sample once, and the same bytes; how many samples."""
    store, whole = (SoftTargetStore.open(str(folder), None) for folder in (ours, theirs))
    assert len(set(store.sample_ids)) == len(store.sample_ids)
    assert sorted(store.sample_ids) == sorted(whole.sample_ids)
    for sample_id in whole.sample_ids:
        assert store.read_record(sample_id)[0].tobytes() == whole.read_record(sample_id)[0].tobytes(), sample_id
    return len(store.sample_ids)
