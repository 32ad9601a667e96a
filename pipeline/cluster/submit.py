"""Send a recipe's chain to Slurm, or see how it stands.

    clkd submit RECIPE.yaml [section.key=value ...] [--from STAGE] [--dry-run] [--with STAGE=OPTIONS ...]
    clkd status RECIPE.yaml|RUN

Stages that are done with the recipe's settings are left out, and of an array the tasks that are. A job starts when the
jobs that it needs have succeeded; when one fails, those that wait for it are cancelled. `--with` gives a stage's job
more options of sbatch: `--with train="--nodes=4 --time=12:00:00"` for all training jobs, `--with "train clkd=..."` for
one. The recipe's `cluster.sbatch` says the same, before it. SBATCH_PARTITION, SBATCH_ACCOUNT and the like hold for all
jobs.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.cluster import chain
from pipeline.cluster import status as run_status
from pipeline.cluster.chain import ClusterStage
from pipeline.errors import ConfigError, UserError
from pipeline.files import home, locked, shipped
from pipeline.models import topology
from pipeline.recipe import Recipe

SUBMIT_WAIT_S = 300.0
"""Seconds to wait for another submission of the same run: far more than a chain takes to send."""


def submit(recipe: Recipe, command: argparse.Namespace) -> None:
    """Send jobs for the stages that are missing; prints one line per job."""
    everything = chain.chain(recipe, command.overrides, command.workers)
    options = stage_options(recipe.cluster.sbatch, command.options, [stage.name for stage in everything])
    stages = chosen(everything, command.start)
    todo = {s.name: s.missing(recipe.run.dir) or [0] * bool(command.start) for s in stages}
    for stage in stages:
        if stage.kind == "train" and todo[stage.name]:
            refuse_uneven(recipe, stage, ranks_of(stage.script, options[stage.name]), command.deepspeed_config)
    if command.dry_run:
        for stage in stages:
            if todo[stage.name]:
                words = sbatch_words(recipe, stage, command, todo, {name: f"<{name}>" for name in todo}, options)
                print(" ".join([*_assignments(stage, command), *map(shlex.quote, words)]))
        return
    if not shutil.which("sbatch"):
        raise UserError(
            "sbatch: no such command. Call this on a login node of the cluster; on one machine use "
            "`clkd run RECIPE.yaml`. Nothing was submitted."
        )
    with _one_submission(chain.make_folder(recipe.run.dir)):
        refuse_running(recipe)
        jobs: dict[str, int] = {}
        for stage in stages:
            if not todo[stage.name]:
                print(f"{'done':>8}  {stage.name}")
                continue
            jobs[stage.name] = _send(recipe, stage, command, todo, jobs, options)
            _remember(recipe, command, jobs)
            print(f"{jobs[stage.name]:>8}  {stage.name}{_waits_for(stage, jobs)}", flush=True)
    if jobs:
        print(f"follow it:  clkd status {recipe.run.dir}\nstop it:    scancel {_spaced(jobs)}")
    else:
        print("nothing is missing")


# -- what is asked for -------------------------------------------------------------------------------------------------


def chosen(stages: Sequence[ClusterStage], start: str | None) -> list[ClusterStage]:
    """All stages, or those from `start` on. ConfigError names the stages when there is no such one."""
    names = [stage.name for stage in stages]
    if start is None:
        return list(stages)
    if start not in names:
        raise ConfigError(f"--from {start!r}: no such stage; stages: {names}. Nothing was submitted.")
    return list(stages[names.index(start) :])


def stage_options(recipe: Mapping[str, str], given: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """More options of sbatch by stage name. Of two that contradict each other sbatch takes the later one.

    Args:
        recipe: `cluster.sbatch`: `all` comes before a kind of stage (`train`), and that before a stage.
        given: `STAGE=OPTIONS` of the command line, after the recipe's; a first word alone means all of that kind.
        names: of all stages.
    """
    options: dict[str, list[str]] = {name: [] for name in names}
    for who in sorted(recipe, key=lambda who: (who != "all", who in names)):
        meant = names if who == "all" else _meant(who, names)
        if not meant:
            raise ConfigError(f"cluster.sbatch.{who}: no such stage; stages: {list(names)}. Nothing was submitted.")
        for name in meant:
            options[name] += shlex.split(recipe[who])
    for text in given:
        who, sign, words = text.partition("=")
        meant = _meant(who, names)
        if not sign or not meant:
            raise ConfigError(f"--with {text!r}: wants STAGE=OPTIONS, a stage of {list(names)}. Nothing was submitted.")
        for name in meant:
            options[name] += shlex.split(words)
    return options


def _meant(who: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if who in (name, name.split()[0])]


def ranks_of(script: str, options: Sequence[str]) -> int:
    """Tasks of a job: those of the script's own `#SBATCH` lines, unless options say otherwise."""
    lines = (home() / script).read_text().splitlines()
    own = [word for line in lines if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", "-N", default="1")
    parser.add_argument("--ntasks-per-node", type=int, default=1)
    parser.add_argument("--ntasks", "-n", type=int)
    found, _ = parser.parse_known_args([*own, *options])
    nodes = int(found.nodes.rpartition("-")[2])  # of a range Slurm takes as many as it can
    return int(found.ntasks or nodes * found.ntasks_per_node)


def refuse_uneven(recipe: Recipe, stage: ClusterStage, ranks: int, ds_config: Path) -> None:
    """ConfigError when so many ranks cannot share batch or experts evenly: said now, not after waiting in a queue."""
    path = shipped(ds_config, "ds_configs")
    if not path.is_file():
        raise ConfigError(f"{path}: no such DeepSpeed config; see ds_configs/. Nothing was submitted.")
    job = recipe.jobs[stage.name.partition(" ")[2]]
    upcycled = [recipe.models[r.name].upcycle for r in recipe.lineage(job.init) if r.model in recipe.models]
    try:
        topology.accumulation_steps(job, ranks)
        for upcycle in filter(None, upcycled):
            size = topology.expert_parallel_size(json.loads(path.read_text()))
            topology.check_expert_parallel_size(size, ranks, upcycle.experts)
    except ConfigError as error:
        raise ConfigError(
            f"stage {stage.name!r}, {ranks} rank(s): {error} --with "
            f"{stage.kind}='--nodes=N --ntasks-per-node=M' sets the ranks."
        ) from None


# -- one job -----------------------------------------------------------------------------------------------------------


def sbatch_words(
    recipe: Recipe,
    stage: ClusterStage,
    command: argparse.Namespace,
    todo: Mapping[str, Sequence[int]],
    jobs: Mapping[str, object],
    options: Mapping[str, Sequence[str]],
) -> list[str]:
    """The command that submits a stage."""
    log = f"{recipe.run.dir}/{chain.FOLDER}/{stage.slug}-%{'A_%a' if stage.tasks else 'j'}.out"
    words = ["sbatch", "--parsable", f"--job-name={job_name(recipe, stage)}", f"--output={log}"]
    waits = [str(jobs[name]) for name in stage.needs if todo.get(name) and name in jobs]
    if waits:
        words += [f"--dependency=afterok:{':'.join(waits)}", "--kill-on-invalid-dep=yes"]
    if stage.tasks:
        words.append(f"--array={','.join(map(str, todo[stage.name]))}")
    return [*words, *options[stage.name], str(home() / stage.script), str(command.recipe), *stage.arguments]


def job_name(recipe: Recipe, stage: ClusterStage) -> str:
    """`<run>:<stage>`, as people see it in the queue."""
    return f"{recipe.run.dir.name}:{stage.slug}"


def _send(
    recipe: Recipe,
    stage: ClusterStage,
    command: argparse.Namespace,
    todo: Mapping[str, Sequence[int]],
    jobs: Mapping[str, int],
    options: Mapping[str, Sequence[str]],
) -> int:
    words = sbatch_words(recipe, stage, command, todo, jobs, options)
    environment = {**os.environ, **_environment(stage, command)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        sent = f"jobs {_spaced(jobs)} are in the queue: scancel them, or mend this and submit again when they are done"
        raise UserError(
            f"stage {stage.name!r}: {done.stderr.strip() or done.stdout.strip()}\n{_advice(done.stderr)}"
            f"The command was: {shlex.join(words)}\n" + (sent if jobs else "Nothing was submitted.")
        )
    return int(done.stdout.split(";")[0])


def _environment(stage: ClusterStage, command: argparse.Namespace) -> dict[str, str]:
    own = {"CLKD_HOME": str(home()), "CLKD_VENV": environment_of(home()), **stage.environment}
    if stage.tasks:
        own["WORKERS"] = str(stage.tasks)
    if stage.kind == "train":
        own["DS_CONFIG"] = str(command.deepspeed_config)
        if command.change_settings:
            own["CHANGE_SETTINGS"] = "1"
    return own


def environment_of(home: Path) -> str:
    """The Python environment of the jobs: what CLKD_VENV says, `.venv` of a checkout, or the one that submits."""
    own = home / ".venv"
    return os.environ.get("CLKD_VENV") or (str(own) if own.is_dir() else sys.prefix)


def _assignments(stage: ClusterStage, command: argparse.Namespace) -> list[str]:
    """The job's variables as a person would write them before the command."""
    return [f"{k}={shlex.quote(v)}" for k, v in _environment(stage, command).items() if v]


def _advice(complaint: str) -> str:
    """What to do about sbatch's complaint."""
    lower = complaint.lower()
    if "partition" in lower:
        found = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True).stdout.split()
        return f"This cluster's partitions: {', '.join(sorted(set(found))) or 'none'}. Set SBATCH_PARTITION to one.\n"
    if "account" in lower:
        return "Set SBATCH_ACCOUNT to an account of yours (`sacctmgr show associations user=$USER`).\n"
    if "node configuration" in lower or "more processors" in lower or "gres" in lower:
        return "No node has that many GPUs or cores: ask for less, as in --with STAGE='--gpus-per-node=4'.\n"
    if "time limit" in lower:
        return "Ask for less time with --with STAGE='--time=...': training goes on after its limit in a new turn.\n"
    return ""


# -- one submission at a time ------------------------------------------------------------------------------------------


def refuse_running(recipe: Recipe) -> None:
    """UserError when jobs of an earlier submission are still in the queue: two chains would write one folder."""
    sent = chain.read_submission(recipe.run.dir).get("jobs", {})
    earlier = {job: name for name, job in sent.items()}
    alive = [f"{job} ({earlier[job]}, {state})" for job, state in run_status.queued(earlier).items()]
    if alive:
        raise UserError(
            f"{recipe.run.dir}: submitted already, and in the queue: {', '.join(alive)}. Follow it with `clkd status "
            f"{recipe.run.dir}`, or scancel it first. Nothing was submitted."
        )


@contextlib.contextmanager
def _one_submission(folder: Path) -> Iterator[None]:
    """One submission at a time. A second one waits here, and then finds the first one's jobs in the queue."""

    def refusal(holder: str) -> str:
        return (
            f"{folder}: {holder} has been submitting this run for more than {SUBMIT_WAIT_S:g} s. End it if it hangs, "
            "then run the same command again. Nothing was submitted."
        )

    with locked(folder / "submit.lock", lambda holder: SUBMIT_WAIT_S, refusal):
        yield


def _remember(recipe: Recipe, command: argparse.Namespace, jobs: Mapping[str, int]) -> None:
    run_dir = recipe.run.dir
    earlier = chain.read_submission(run_dir).get("jobs", {})
    submission = {"recipe": str(command.recipe), "overrides": command.overrides, "workers": command.workers}
    chain.write_submission(run_dir, {**submission, "jobs": {**earlier, **jobs}})


def _waits_for(stage: ClusterStage, jobs: Mapping[str, int]) -> str:
    waits = [f"{jobs[name]} ({name})" for name in stage.needs if name in jobs]
    return f"  after {', '.join(waits)}" if waits else ""


def _spaced(jobs: Mapping[str, int]) -> str:
    return " ".join(map(str, jobs.values()))


def main(recipe: Recipe, options: argparse.Namespace) -> None:
    """The command `submit`."""
    options.recipe = shipped(options.recipe, "recipes").resolve()  # jobs are told a file, not a name
    options.workers = options.workers or recipe.cluster.teacher_tasks
    options.deepspeed_config = options.deepspeed_config or recipe.cluster.deepspeed
    submit(recipe, options)
