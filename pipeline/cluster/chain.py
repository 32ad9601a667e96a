"""A recipe's chain of stages as Slurm jobs: the script of a stage, the stages it waits for, its settings, its state.

Jobs write their state to `<run.dir>/slurm`:

    STAGE.json          state, job, nodes, code version, error; of an array: STAGE-TASK.json
    STAGE/JOB-RESTART/  state.json as at the start, environment.json, and log and exit status of every rank
    jobs.json           what `clkd submit` sent
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from pipeline.cluster import local
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.recipe import Recipe, Reference

FOLDER = "slurm"
PROBE_BYTES = 1 << 16
SCRIPTS = {
    "teacher": "teacher_targets",
    "hardness": "hardness",
    "train": "train",
    "evaluate": "evaluate",
    "export": "export",
}
"""Scripts in slurm/ by the first word of a stage's name; the others are stages of slurm/prepare.sbatch."""
MODULES = {"model": "student"}
"""Stages whose module has another name."""


@dataclass(frozen=True, slots=True)
class ClusterStage:
    """One job, or one array of jobs."""

    name: str
    """As in `pipeline.cluster.local`: `train clkd`."""
    script: str
    arguments: tuple[str, ...]
    """After the recipe."""
    environment: Mapping[str, str]
    needs: tuple[str, ...]
    """Stages whose files it reads."""
    tasks: int
    """Of an array; 0 for a single job."""
    fingerprint: str
    """Digest of all settings that its files depend on, those of the stages that it needs included."""
    output: Path
    """A file or folder that exists once the stage is done."""

    @property
    def slug(self) -> str:
        """Name in files and of the job."""
        return self.name.replace(" ", "-")

    @property
    def kind(self) -> str:
        """First word of the name."""
        return _split(self.name)[0]

    def state_names(self) -> list[str]:
        """Names of the state files of its job, or of its array's tasks."""
        return [f"{self.slug}-{task}" for task in range(self.tasks)] if self.tasks else [self.slug]

    def missing(self, run_dir: Path) -> list[int]:
        """Tasks that are not done with these settings (a single job is task 0); empty when the stage is done."""
        if not self.output.exists():
            return list(range(max(1, self.tasks)))
        states = [read_state(run_dir, name) for name in self.state_names()]
        wanted = {"state": "done", "fingerprint": self.fingerprint}
        return [task for task, state in enumerate(states) if wanted != {key: state.get(key) for key in wanted}]


def chain(recipe: Recipe, overrides: Sequence[str] = (), workers: int | None = None) -> list[ClusterStage]:
    """The recipe's stages in order of need, those of `pipeline.cluster.local`.

    Args:
        recipe: with the overrides applied.
        overrides: passed on to every stage.
        workers: tasks of the teacher's array; None: `cluster.teacher_tasks`.
    """
    workers = recipe.cluster.teacher_tasks if workers is None else workers
    names = [stage.name for stage in local.plan(recipe, [], Path("unused"), 1)]
    needs = {name: [n for n in _needs(recipe, *_split(name), names) if n in names] for name in names}
    stages: dict[str, ClusterStage] = {}
    for name in TopologicalSorter(needs).static_order():
        kind, which = _split(name)
        below = [stages[need].fingerprint for need in needs[name]]
        prepare = {"PREPARE": MODULES.get(kind, kind), "MODEL": which if kind == "model" else ""}
        named = kind in ("train", "hardness") and which
        extra = [f"job={which}"] if named else _job_of_export(recipe) if kind == "export" else []
        stages[name] = ClusterStage(
            name=name,
            script=f"slurm/{SCRIPTS.get(kind, 'prepare')}.sbatch",
            arguments=(*extra, *overrides),
            environment={} if kind in SCRIPTS else prepare,
            needs=tuple(needs[name]),
            tasks=workers if kind == "teacher" else 0,
            fingerprint=_digest([name, _settings(recipe, kind, which), below]),
            output=_output(recipe, kind, which),
        )
    return list(stages.values())


def _split(name: str) -> tuple[str, str]:
    """Kind of a stage, and which of its kind."""
    kind, _, which = name.partition(" ")
    return kind, which


def _job_of_export(recipe: Recipe) -> list[str]:
    return [f"job={Reference.parse(recipe.evaluation.rows[-1].model).job}"]


def _needs(recipe: Recipe, kind: str, which: str, names: list[str]) -> list[str]:
    """Names of the stages that a stage waits for; those that the chain lacks are left out by the caller."""
    data = ["tokenizer" if "tokenizer" in names else "scenes"]
    if kind == "scenes":
        return []
    if kind == "tokenizer":
        return ["scenes"]
    if kind == "model":
        source = recipe.made_from(f"models.{which}")
        return [*data, *(_maker(source) if source else [])]
    if kind == "teacher":
        return [*data, *_maker(recipe.teacher)]
    if kind == "hardness":
        return ["teacher", *(_maker(recipe.jobs[which].init) if which else [])]
    if kind == "train":
        job = recipe.jobs[which]
        below = ["teacher"] if recipe.needs_answers(which) else []
        if job.distill or job.curriculum:
            below = [local.hardness_stage(recipe, which)]
        return [*data, *_maker(job.init), *below]
    if kind == "evaluate":
        return [*data, *dict.fromkeys(name for row in recipe.evaluation.rows for name in _maker(row.model))]
    if kind == "export":
        return _maker(recipe.evaluation.rows[-1].model)
    return [name for name in names if name != "report"]  # it shows them all


def _maker(reference: str) -> list[str]:
    """The stage that makes what a model reference names; none for a folder."""
    found = Reference.parse(reference)
    return [] if found.kind == "folder" else [f"{'train' if found.job else 'model'} {found.name}"]


def _settings(recipe: Recipe, kind: str, which: str) -> Any:
    """Settings of one stage that its files depend on, besides those of the stages it needs."""
    everything = json.loads(recipe.model_dump_json())
    benchmark = everything["benchmark"] or {}
    own = {
        "tokenizer": ["data"],
        "teacher": ["targets", "data"],
        "hardness": ["data"],
        "evaluate": ["evaluation", "data"],
        "report": ["evaluation"],
    }
    chosen = {name: everything[name] for name in own.get(kind, [])}
    if kind == "scenes":
        chosen["scenes"] = benchmark["scenes"]
    if kind == "tokenizer":
        chosen["vocab_size"] = benchmark["vocab_size"]
    if kind == "model":
        chosen["model"] = (everything["models"] | benchmark.get("models", {}))[which]
    if kind == "hardness" and which:
        chosen["job"] = {key: everything["jobs"][which][key] for key in ("init", "distill", "hardness")}
    if kind == "train":
        chosen |= {"train": everything["jobs"][which], "word_alignment": recipe.word_alignment(which)}
    return [chosen, everything["run"]["seed"], everything["run"]["dir"]]


def _output(recipe: Recipe, kind: str, which: str) -> Path:
    run = recipe.run.dir
    if kind == "hardness":
        return recipe.hardness_file(recipe.scored_student(which) if which else None)
    places = {
        "scenes": run / "data",
        "tokenizer": recipe.processor_dir,
        "model": run / "models" / which,
        "teacher": Path(recipe.store_url) if "://" not in recipe.store_url else run,
        "train": recipe.job_dir(which) / "model",
        "evaluate": run / "results.json",
        "export": run / "exported",
        "report": run / "report.html",
    }
    return places[kind]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# -- what jobs write down ----------------------------------------------------------------------------------------------


def read_state(run_dir: Path, name: str) -> dict[str, Any]:
    """What a job wrote down last; empty when there is nothing to be read."""
    return _read_json(run_dir / FOLDER / f"{name}.json")


def write_state(run_dir: Path, name: str, state: Mapping[str, Any]) -> None:
    """Replace what a job wrote down; a reader sees the old state or the new one, never a part."""
    write_json(run_dir / FOLDER / f"{name}.json", state)


def read_submission(run_dir: Path) -> dict[str, Any]:
    """What was submitted last: `recipe`, `overrides`, `workers`, and `jobs`, the last job of each stage by its name."""
    return _read_json(run_dir / FOLDER / "jobs.json")


def write_submission(run_dir: Path, submission: Mapping[str, Any]) -> None:
    """Replace what `read_submission` gives."""
    write_json(run_dir / FOLDER / "jobs.json", submission)


def make_folder(run_dir: Path) -> Path:
    """Make the run's `slurm` folder and write a file to it as a test. UserError if it cannot be written."""
    folder = run_dir / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.uname().nodename}-{os.getpid()}"
        probe.write_bytes(bytes(PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written from {os.uname().nodename}: {error.strerror}. Set run.dir to a folder on "
            "storage that all nodes see and this user may write, and mind its quota. Nothing was started."
        ) from None
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
