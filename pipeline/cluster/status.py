"""How a submitted run stands, in one screen: `clkd status RECIPE.yaml|RUN`."""

import argparse
import getpass
import math
import statistics
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster import chain
from pipeline.cluster.chain import ClusterStage
from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe
from pipeline.training.metrics import read_metrics

RECENT = 20
"""Logged steps whose mean pace gives the remaining time."""
ADVICE = {
    "PartitionTimeLimit": "its time limit is above the partition's; scontrol update JobId={job} TimeLimit=...",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives; scontrol update JobId={job} NumNodes=...",
    "DependencyNeverSatisfied": "a job that it needs has failed; scancel {job}",
    "DeadLine": "its deadline passes before it can start; scontrol update JobId={job} Deadline=...",
    "JobHeldUser": "it is held; scontrol release {job}",
    "JobHeldAdmin": "it is held by an administrator or after failed starts; scontrol release {job}, or ask them",
    "ReqNodeNotAvail": "nodes that it asks for are down or reserved; sinfo -R",
}
"""What to do about Slurm's reasons for a job that does not start."""


# -- Slurm's queue -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queued:
    """A job, or an array's task, in the queue."""

    job: int
    state: str
    reason: str
    nodes: str
    time_left: str


def queue() -> list[Queued]:
    """This user's jobs that wait or run; UserError when Slurm does not answer."""
    command = ["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%A|%F|%T|%r|%N|%L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("squeue: no such command. Call this on a login node of the cluster.") from None
    if done.returncode:
        raise UserError(f"squeue does not answer: {done.stderr.strip()}. Is Slurm up? Nothing was changed.")
    fields = [line.split("|") for line in done.stdout.splitlines()]
    return [Queued(int(array), state, reason, nodes, left) for _, array, state, reason, nodes, left in fields]


def queued(jobs: Collection[int]) -> dict[int, str]:
    """Those of the jobs that are still in the queue, and their states."""
    return {entry.job: entry.state for entry in queue() if entry.job in jobs} if jobs else {}


# -- the screen --------------------------------------------------------------------------------------------------------


def table(recipe: Recipe, stages: Sequence[ClusterStage], entries: Sequence[Queued]) -> list[str]:
    """One line per stage: its state, where and how far it is; then the last error."""
    jobs = chain.read_submission(recipe.run.dir).get("jobs", {})
    lines: list[str] = []
    errors: list[tuple[float, str, dict[str, Any]]] = []
    width = max(len(stage.name) for stage in stages)
    for stage in stages:
        mine = [entry for entry in entries if entry.job == jobs.get(stage.name)]
        states = [state for name in stage.state_names() if (state := chain.read_state(recipe.run.dir, name))]
        word, detail = _stands(recipe, stage, mine, states)
        lines.append(f"{stage.name:<{width}}  {jobs.get(stage.name, ''):>8}  {word:<11}  {detail}".rstrip())
        errors += [(state["ended"], stage.name, state) for state in states if state.get("error")]
    if errors:
        _, name, state = max(errors, key=lambda error: error[0])
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state["ended"]))
        over = "" if state["state"] in ("failed", "stopped") else f" (the job went on: {state['state']})"
        lines += ["", f"last error, {when}, {name}{over}:", *(f"  {line}" for line in state["error"].splitlines())]
        lines.append(f"  logs: {state['logs']}")
    return lines


def _stands(
    recipe: Recipe, stage: ClusterStage, mine: Sequence[Queued], states: Sequence[dict[str, Any]]
) -> tuple[str, str]:
    """How a stage stands: a word (running, waiting, done, failed, stopped, missing), and the details."""
    running = [entry for entry in mine if entry.state in ("RUNNING", "COMPLETING")]
    far = _progress(recipe, stage)
    if running:
        where = ",".join(sorted({entry.nodes for entry in running}))
        left = f"{running[0].time_left} to its limit"
        return "running", ", ".join(part for part in (far, f"on {where}", left) if part)
    if mine:
        reason = mine[0].reason
        advice = next((text.format(job=mine[0].job) for key, text in ADVICE.items() if reason.startswith(key)), "")
        restarts = max((state.get("restart", 0) for state in states), default=0)
        again = f"starts again (restart {restarts + 1})" if states and states[0].get("job") == mine[0].job else ""
        return "waiting", ", ".join(part for part in (far, again, f"{reason}{': ' if advice else ''}{advice}") if part)
    if not stage.missing(recipe.run.dir):
        return "done", far
    failed = [state for state in states if state["state"] in ("failed", "stopped")]
    if failed:
        return failed[0]["state"], far
    if any(state["state"] in ("running", "requeue") for state in states):
        return "stopped", ", ".join(part for part in (far, "not in the queue any more: cancelled or timed out") if part)
    return "missing", "done with other settings" if states else ""


# -- how far a stage is ------------------------------------------------------------------------------------------------


def _progress(recipe: Recipe, stage: ClusterStage) -> str:
    if stage.kind == "train":
        return _training(recipe, stage.name.partition(" ")[2])
    return _shards(recipe) if stage.kind == "teacher" else ""


def _training(recipe: Recipe, name: str) -> str:
    """Step, loss and remaining time from the job's metrics."""
    rows, job = read_metrics(recipe.job_dir(name) / "metrics.jsonl"), recipe.jobs[name]
    if not rows:
        return ""
    step, recent = rows[-1]["step"], rows[-RECENT:]
    pace = statistics.fmean(row["step_s"] + row["data_wait_s"] for row in recent)
    left = f", about {_duration(pace * (job.steps - step))} of training left" if step < job.steps else ""
    return f"step {step}/{job.steps}, loss {rows[-1]['loss']:.3f}{left}"


def _shards(recipe: Recipe) -> str:
    """Committed and planned shards of the store."""
    from pipeline.targets.container.folders import folder_at
    from pipeline.targets.container.manifest import read_parts
    from pipeline.targets.container.sealed import unsealed_json
    from pipeline.targets.container.shards import commit_name, committed_shards

    folder = folder_at(recipe.store_url)
    try:
        planned = sum(math.ceil(len(part["sample_ids"]) / part["shard_samples"]) for part in read_parts(folder))
        done, asks = committed_shards(folder, "targets"), recipe.targets.answers is not None
        answered = sum(unsealed_json(folder, commit_name(shard, "answers"))["samples"] for shard in done) if asks else 0
        return f"{len(done)}/{planned} shards" + (f", {answered:,} questions answered" if asks else "")
    except (OSError, UserError):
        return ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def main(recipe: None, options: argparse.Namespace) -> int:
    """The command `status`: 1 when a stage has failed, else 0."""
    if not options.words:
        raise UserError("clkd status: name the recipe, or the run's folder.")
    recipe_, stages = _of_run(Path(options.words[0]), options.words[1:])
    lines = table(recipe_, stages, queue())
    print("\n".join([f"{recipe_.run.dir.resolve()} at {time.strftime('%Y-%m-%d %H:%M:%S')}", *lines]))
    return int(any(" failed " in f"{line} " for line in lines[: len(stages)]))


def _of_run(place: Path, overrides: Sequence[str]) -> tuple[Recipe, list[ClusterStage]]:
    """Recipe and stages of a submission: of a recipe's file, or of what a run's folder was submitted with."""
    workers = None
    if place.is_dir():
        sent = chain.read_submission(place)
        if not sent:
            raise UserError(f"{place}: nothing was submitted from here with `clkd submit`. Give the recipe's file.")
        place, overrides, workers = Path(sent["recipe"]), sent["overrides"], int(sent["workers"])
    recipe = load_recipe(place, overrides)
    return recipe, chain.chain(recipe, workers=workers)
