"""What a cluster job writes down about itself when it begins and ends. For the scripts in slurm/, inside a job.

clkd record begin RECIPE.yaml --stage STAGE     shell variables: RUN_DIR, RUN_LOGS, MASTER_PORT, OPERATORS
clkd record end RECIPE.yaml --stage STAGE --state RUNNING     one word: done, requeue or failed
"""

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.cluster import chain
from pipeline.errors import EXIT_CHECKPOINTED, EXIT_LOST_CONTACT, EXIT_USER_ERROR, UserError
from pipeline.files import home
from pipeline.recipe import Recipe
from pipeline.training.operators import own_folder

CRASHED = 1
"""Status of a Python traceback: running the job again would end in the same error."""
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "safetensors", "numpy")
ENDED = {
    "TIMEOUT": ": its time limit ran out before a checkpoint was written; give it more --time, or --signal=B:USR1@600",
    "CANCELLED": ": scancel",
    "COMPLETING": ": scancel, or a time limit",
}
"""What to say of Slurm's words for a job that did not end by itself."""
SHOWN_VARIABLES = re.compile(r"(SLURM|CLKD|NCCL|GLOO|TORCH|DS|OMP|CUDA|HF)_")
LAST_BYTES = 20_000


def begin(recipe: Recipe, name: str) -> dict[str, str]:
    """Open the logs of this run of the job and record environment and code version: variables for the script."""
    folder = chain.make_folder(recipe.run.dir)
    logs = folder / name / _attempt()
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    before = chain.read_state(recipe.run.dir, name)
    state = {
        "state": "running",
        "job": int(os.environ["SLURM_JOB_ID"]),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "ranks": int(os.environ.get("SLURM_NTASKS", "1")),
        "logs": str(logs),
        "fingerprint": _fingerprint(recipe, name),
        "began": time.time(),
        "crashes": before.get("crashes", 0) if before.get("job") == int(os.environ["SLURM_JOB_ID"]) else 0,
        "progress": before.get("progress", ""),
    }
    for place in (name, f"{name}/{_attempt()}/state"):
        chain.write_state(recipe.run.dir, place, state)
    return {
        "RUN_DIR": str(recipe.run.dir),
        "RUN_LOGS": str(logs.resolve()),
        "MASTER_PORT": str(_free_port()),
        "OPERATORS": _operators(),
    }


def end(recipe: Recipe, name: str, job_state: str) -> str:
    """Decide from the ranks' statuses how the job goes on, and write it down.

    Args:
        recipe: of the run.
        name: of the stage.
        job_state: Slurm's word for this job now; anything but RUNNING means that Slurm has decided already.
    """
    # This start's own state file. The stage's may be of a second job, which was refused because of this one.
    state = chain.read_state(recipe.run.dir, f"{name}/{_attempt()}/state")
    logs = Path(state["logs"])
    statuses = [_status(logs / f"rank-{rank}.status") for rank in range(state["ranks"])]
    progress = _progress(recipe, name)
    crashes = 0 if progress != state["progress"] else state["crashes"]
    interrupted = EXIT_CHECKPOINTED in statuses
    if set(statuses) == {0}:
        outcome = "done"
    elif EXIT_USER_ERROR in statuses or CRASHED in statuses:
        outcome = "failed"
    elif job_state != "RUNNING":
        outcome = "stopped"
    else:
        crashes += not interrupted
        outcome = "requeue" if crashes <= int(os.environ.get("CLKD_MAX_CRASHES", "3")) else "failed"
    error = "" if outcome == "done" or interrupted else _error(logs, statuses)
    if outcome == "stopped" and not interrupted:
        error = f"Slurm ended the job ({job_state}{ENDED.get(job_state, '')}). {error}"
    if error:
        print(f"{name}: {error}", file=sys.stderr)
    state |= {"state": outcome, "ended": time.time(), "error": error, "crashes": crashes, "progress": progress}
    try:
        chain.write_state(recipe.run.dir, name, state)
    except OSError as problem:  # the disk is full or read-only; the script still needs the outcome
        print(f"{name}: its state could not be written down: {problem}", file=sys.stderr)
    return outcome


def _attempt() -> str:
    """Name of this start of this job: its id and how often Slurm has restarted it."""
    return f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"


# -- environment and code ----------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions, code and variables that this job runs with."""
    installed = {package: _version(package) for package in PACKAGES}
    variables = {name: value for name, value in sorted(os.environ.items()) if SHOWN_VARIABLES.match(name)}
    host = {"node": socket.gethostname(), "python": sys.version.split()[0], "kernel": os.uname().release}
    return {**host, "packages": installed, "code": _code(), "variables": variables}


def _code() -> dict[str, str]:
    """Version, and of a checkout the commit and the changes that are not in it."""
    if not (home() / ".git").exists():  # installed: the repository around it, if any, is somebody else's
        return {"version": __version__}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(home()), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return {"version": __version__, "commit": git("rev-parse", "HEAD"), "changes": git("diff", "HEAD")[:1_000_000]}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _operators() -> str:
    """Where this environment keeps compiled operators; empty where DeepSpeed is only in the ranks' container."""
    try:
        return str(own_folder())
    except metadata.PackageNotFoundError:
        return ""


def _free_port() -> int:
    """A port that is free on this node, where rank 0 runs."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


# -- how the ranks ended -----------------------------------------------------------------------------------------------


def _fingerprint(recipe: Recipe, name: str) -> str:
    """Digest of the stage's settings, see `ClusterStage.fingerprint`; empty when the chain has no such stage."""
    workers = int(os.environ.get("WORKERS") or os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    found = [stage.fingerprint for stage in chain.chain(recipe, workers=workers) if name in stage.state_names()]
    return found[0] if found else ""


def _progress(recipe: Recipe, name: str) -> str:
    """The checkpoint that a restart would go on from. Crashes are counted anew once there is a newer one."""
    if not name.startswith("train-"):
        return ""
    pointer = recipe.job_dir(name.removeprefix("train-")) / "checkpoints" / "latest"
    return pointer.read_text().strip() if pointer.is_file() else ""


def _status(path: Path) -> int | None:
    """Exit status of a rank; None when it was killed together with its shell."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _error(logs: Path, statuses: list[int | None]) -> str:
    """Which ranks were killed, and the last error of a rank that failed by itself."""
    killed = [f"rank {rank}" for rank, status in enumerate(statuses) if status is None or status > 128]
    speakers = [rank for code in (EXIT_USER_ERROR, CRASHED, EXIT_LOST_CONTACT) for rank in _with(statuses, code)]
    said = next((f"rank {rank}: {text}" for rank in speakers if (text := last_error(logs / f"rank-{rank}.log"))), "")
    if killed and EXIT_USER_ERROR not in statuses and CRASHED not in statuses:
        why = "by a person, for lack of memory, or with their node"
        said = f"{', '.join(killed)} killed ({why}). {said}".strip()
    return said or f"no message; see {logs}"


def _with(statuses: list[int | None], wanted: int) -> list[int]:
    return [rank for rank, status in enumerate(statuses) if status == wanted]


def last_error(log: Path) -> str:
    """A log's last error message: from `error: ` to the end of what it says, or a traceback's last line."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    if starts:
        return "\n".join(lines[starts[-1] :][:12]).removeprefix("error: ")
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return raised[-1] if raised else ""


def main(recipe: Recipe, options: argparse.Namespace) -> None:
    """The command `record`, for slurm/*.sbatch."""
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("clkd record is for use in a Slurm job: SLURM_JOB_ID is not set")
    name = options.stage
    name += f"-{recipe.selected_job()[0]}" if name == "train" else ""
    name += f"-{os.environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
    if options.action == "begin":
        for variable, value in begin(recipe, name).items():
            print(f"{variable}={shlex.quote(value)}")
    else:
        print(end(recipe, name, options.state))
