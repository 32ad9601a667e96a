"""The whole chain of a recipe, stage by stage, each as the command a person would type.

    clkd run pipeline/recipes/demo.yaml

Every stage is restartable and skips what is finished, so the same command goes on after Ctrl-C or kill -9.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.models import topology
from pipeline.recipe import Recipe, Reference

PR_SET_PDEATHSIG = 1
POLL_S = 0.1
CPU_RANKS = 2
"""Training processes without a GPU."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the chain: a command, or several that run at the same time."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    processes: int = 1
    """Processes that share this machine's cores."""


def plan(
    recipe: Recipe, recipe_args: Sequence[str], ds_config: Path, ranks: int, train_options: Sequence[str] = ()
) -> list[Stage]:
    """The commands that make everything the recipe names, in order of need.

    Jobs run in the recipe's order; a job's starting model is built first, and before the first job that
    distils (or orders by hardness) the teacher pass and the hardness table are made; the pass alone before one that
    trains on the teacher's answers.
    """
    launched = (sys.executable, "-m")
    # torchrun, because the ranks of the deepspeed launcher go on when it is killed. torchrun passes signals on to every
    # rank, and chooses a free port each time.
    torchrun = (*launched, "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m")
    stages: dict[str, Stage] = {}

    def command(stage: str, *options: str, launcher: Sequence[str] = launched) -> tuple[str, ...]:
        return (*launcher, "pipeline", stage, *recipe_args, *options)

    def add(name: str, *commands: tuple[str, ...], processes: int = 1) -> None:
        stages.setdefault(name, Stage(name, commands, processes))

    if recipe.benchmark and recipe.data.root is None:
        add("scenes", command("scenes"))
    if recipe.trains_tokenizer:
        add("tokenizer", command("tokenizer"))
    for name, job in recipe.jobs.items():
        if recipe.is_made(job.init):
            model = Reference.parse(job.init).name
            add(f"model {model}", command("student", "--model", model))
        if job.distill or job.curriculum or recipe.needs_answers(name):
            workers = [command("teacher", "--worker", str(i), "--workers", str(ranks)) for i in range(ranks)]
            add("teacher", *workers, processes=ranks)
        if job.distill or job.curriculum:
            table = hardness_stage(recipe, name)
            add(table, command("hardness", *([f"job={table.partition(' ')[2]}"] if " " in table else [])))
        options = ("--deepspeed_config", str(ds_config), f"job={name}", *train_options)
        add(f"train {name}", command("train", *options, launcher=torchrun), processes=ranks)
    if recipe.evaluation.rows:
        add("evaluate", command("evaluate"))
        if (last := Reference.parse(recipe.evaluation.rows[-1].model).job) is not None:
            add("export", command("export", "--out", str(recipe.run.dir / "exported"), f"job={last}"))
    add("report", command("report"))
    return list(stages.values())


def hardness_stage(recipe: Recipe, name: str) -> str:
    """The stage that makes the table a job starts from: of the teacher's view, or of a student that jobs may share."""
    student = recipe.scored_student(name)
    if student is None:
        return "hardness"
    return f"hardness {next(job for job in recipe.jobs if recipe.scored_student(job) == student)}"


def run(stages: Sequence[Stage], run_dir: Path, gpus: Sequence[str] = ()) -> None:
    """Run the stages in order, recording each one's wall time. UserError with the stage's command if one fails."""
    durations = _Durations(run_dir / "stages.json")
    for position, stage in enumerate(stages, 1):
        print(f"\n[{position}/{len(stages)}] {stage.name}", flush=True)
        started = time.monotonic()
        failed = _run_together(stage, gpus)
        durations.add(stage.name, time.monotonic() - started)
        if failed is not None:
            status, shown = failed[0], " ".join(failed[1])
            raise UserError(
                f"stage {stage.name!r} ended with status {status}: {shown}\nIts own message is above. What is finished "
                "is kept; the same command goes on from here."
            )
    print(f"\ntotal {sum(durations.seconds.values()):.0f} s in finished stages; report: {run_dir / 'report.html'}")


def _run_together(stage: Stage, gpus: Sequence[str]) -> tuple[int, tuple[str, ...]] | None:
    """Run the stage's commands to their end; status and command of the first that failed, after which the rest end."""
    running = {}
    for number, command in enumerate(stage.commands):
        variables = environment(stage.processes, gpus) | (one_of_many(number, gpus) if len(stage.commands) > 1 else {})
        running[subprocess.Popen(command, env=variables, preexec_fn=die_with_parent)] = command
    failed = None
    try:
        while running:
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                command = running.pop(process)
                if process.returncode and failed is None:
                    failed = process.returncode, command
                    _end(running)
            if not ended:
                time.sleep(POLL_S)
    finally:  # also after Ctrl-C: wait while training writes its checkpoint
        _end(running)
        for process in running:
            process.wait()
    return failed


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()


def one_of_many(number: int, gpus: Sequence[str]) -> dict[str, str]:
    """Variables of one of several workers: a GPU, where there are any, and a progress bar for the first alone.

    Args:
        gpus: names of the visible devices, as in CUDA_VISIBLE_DEVICES; workers beyond their number share them.
    """
    own = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
    return own | ({"TQDM_DISABLE": "1"} if number else {})


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs as CUDA_VISIBLE_DEVICES has them; none where DS_ACCELERATOR says cpu."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch  # slow, and a chain of one's own (slurm/) does without

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in named.split(",") if name] if named is not None else []
    count = torch.cuda.device_count()
    return names[:count] if names else [str(number) for number in range(count)]


class _Durations:
    """Seconds per stage in a JSON file, summed over restarts. The time of a stage killed with the chain is lost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 2)
        write_json(self.path, self.seconds)


def environment(processes: int, gpus: Sequence[str]) -> dict[str, str]:
    """Variables of a stage's processes: its share of the cores; the CPU where there is no GPU. The caller's stay."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {
        **({} if gpus else {"DS_ACCELERATOR": "cpu"}),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "PATH": _path(),
    }


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies: training then writes a checkpoint, and no two runs overlap."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def choose_ranks(wanted: int | None, gpus: int) -> int:
    """Training processes: one a GPU, or two on the CPU, unless the user says how many.

    Raises:
        UserError: more than one a GPU, which NCCL refuses.
    """
    if wanted is not None and gpus and wanted > gpus:
        raise UserError(
            f"--ranks {wanted}: a rank needs a GPU of its own, and {gpus} can be seen. Give --ranks {gpus}, or "
            "DS_ACCELERATOR=cpu to compute on the CPU. Nothing was started."
        )
    return wanted or gpus or CPU_RANKS


def fitting(ds_config: Path, ranks: int, run_dir: Path) -> Path:
    """The DeepSpeed JSON, or one in the run's folder whose expert-parallel groups so many ranks can form."""
    config = topology.read_deepspeed_config(ds_config)
    size = topology.expert_parallel_size(config)
    common = math.gcd(size, ranks)
    if common == size:
        return ds_config
    print(f"{ds_config}: {ranks} rank(s) share a layer's experts by {common}, in place of {size}")
    own = run_dir / "deepspeed.json"
    own.parent.mkdir(parents=True, exist_ok=True)
    write_json(own, config | {"expert_parallel": config["expert_parallel"] | {"autoep_size": common}})
    return own


def main(recipe: Recipe, options: argparse.Namespace) -> None:
    """The command `run`."""
    gpus = visible_gpus()
    ranks = choose_ranks(options.ranks, len(gpus))
    ds_config = options.deepspeed_config or fitting(recipe.cluster.deepspeed, ranks, recipe.run.dir)
    train_options = ["--change-settings"] * options.change_settings
    recipe_args = [str(options.recipe), *options.overrides]
    run(plan(recipe, recipe_args, ds_config, ranks, train_options), recipe.run.dir, gpus)
