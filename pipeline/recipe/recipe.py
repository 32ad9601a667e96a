"""A whole recipe: its sections, what must hold between them, and where a run's files are."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import model_validator

from pipeline.errors import ConfigError
from pipeline.recipe.base import Section
from pipeline.recipe.benchmark import BenchmarkConfig, RandomModelConfig
from pipeline.recipe.cluster import ClusterConfig
from pipeline.recipe.data import DataConfig
from pipeline.recipe.evaluation import EvaluationConfig
from pipeline.recipe.jobs import JobConfig
from pipeline.recipe.models import ModelConfig
from pipeline.recipe.references import Reference, folder_of
from pipeline.recipe.run import RunConfig
from pipeline.recipe.targets import TargetsConfig


class Recipe(Section):
    """A whole run."""

    run: RunConfig
    data: DataConfig = DataConfig()
    benchmark: BenchmarkConfig | None = None
    models: dict[str, ModelConfig] = {}
    targets: TargetsConfig = TargetsConfig()
    jobs: dict[str, JobConfig] = {}
    job: str | None = None
    """The job that `train.py` runs: a key of `jobs`. Usually given on the command line as `job=NAME`."""
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        problems = [*self._reference_problems(), *self._benchmark_problems(), *self._job_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    # -- what must hold between sections -----------------------------------------------------------------------

    def _reference_problems(self) -> list[str]:
        tables = {"models": {*self.models, *self.random_models}, "jobs": {*self.jobs}}
        problems = []
        for where, text in self._references():
            reference = Reference.parse(text)
            if reference.kind != "folder" and reference.name not in tables[reference.kind]:
                problems.append(f"{where}: no such entry {text!r}; {reference.kind}: {sorted(tables[reference.kind])}")
        if self.job is not None and self.job not in self.jobs:
            problems.append(f"job: no such job {self.job!r}; jobs: {sorted(self.jobs)}")
        return problems or self._circles()

    def _references(self) -> list[tuple[str, str]]:
        """(place in the recipe, reference) of every reference in it."""
        found = [(f"jobs.{name}.init", job.init) for name, job in self.jobs.items()]
        found += [(f"models.{n}.upcycle.source", m.upcycle.source) for n, m in self.models.items() if m.upcycle]
        found += [(f"evaluation.rows[{i}].model", row.model) for i, row in enumerate(self.evaluation.rows)]
        return found + ([("targets.teacher", self.targets.teacher)] if self.targets.teacher is not None else [])

    def _circles(self) -> list[str]:
        """What is made from itself; looked for only where every reference leads somewhere."""
        for name in self.jobs:
            seen = [f"jobs.{name}"]
            while (source := self.made_from(seen[-1])) is not None:
                if source in seen:
                    return [f"jobs.{name}.init: goes in a circle: {' <- '.join([*seen, source])}"]
                seen.append(source)
        return []

    def _benchmark_problems(self) -> list[str]:
        if self.benchmark is None:
            return []
        twice = sorted({*self.models} & {*self.benchmark.models})
        problems = [f"models.{name}: benchmark.models.{name} is there too; give one another name" for name in twice]
        problems += [
            f"benchmark.word_alignment.{name}: no such job; jobs: {sorted(self.jobs)}"
            for name in self.benchmark.word_alignment
            if name not in self.jobs
        ]
        if self.data.root is None and self.data.format != "coda_lm":
            problems.append(
                f"data.format: the scenes of `benchmark` are in CODA-LM's layout, not {self.data.format!r}. "
                "Leave it out, or let data.root name your own data"
            )
        return problems

    def _job_problems(self) -> list[str]:
        problems = []
        if self.targets.answers and self.targets.teacher is None:
            problems.append("targets.answers: nobody is there to answer. Set targets.teacher, or leave `answers` out")
        for name, job in self.jobs.items():
            if (job.distill or job.curriculum) and self.targets.teacher is None:
                part = "distill" if job.distill else "curriculum"
                problems.append(
                    f"jobs.{name}.{part}: needs a teacher. Set targets.teacher, as in `targets.teacher: models.teacher`"
                )
            if job.distill and job.distill.active_features and self.targets.sketches is None:
                problems.append(
                    f"jobs.{name}.distill.features: the store keeps no feature sketches. Set targets.sketches, as in "
                    "`targets.sketches: {layer: 6}`, and run the teacher pass again; or leave `features` out"
                )
        for name, model in self.models.items():
            if model.upcycle and not 2 <= model.upcycle.top_k <= model.upcycle.experts:
                problems.append(
                    f"models.{name}.upcycle: top_k {model.upcycle.top_k} is not between 2 and "
                    f"experts {model.upcycle.experts}"
                )
        return problems

    # -- models --------------------------------------------------------------------------------------------------

    @property
    def required_benchmark(self) -> BenchmarkConfig:
        """The benchmark's settings, for its own stages. ConfigError where the recipe has none."""
        if self.benchmark is None:
            raise ConfigError(
                "benchmark: the recipe has none, and this stage is the benchmark's: `benchmark: {}` draws scenes. "
                "Nothing was started."
            )
        return self.benchmark

    @property
    def random_models(self) -> dict[str, RandomModelConfig]:
        """Those of the benchmark."""
        return self.benchmark.models if self.benchmark else {}

    @property
    def teacher(self) -> str:
        """The teacher's reference. ConfigError where there is none."""
        if self.targets.teacher is None:
            raise ConfigError(
                "targets.teacher: this needs a teacher: set it, as in `targets.teacher: models.teacher`. "
                "Nothing was started."
            )
        return self.targets.teacher

    def made_from(self, ref: str) -> str | None:
        """The reference that a job starts from, or an upcycled model is made from; None: nothing of the recipe."""
        reference = Reference.parse(ref)
        if reference.job is not None:
            return self.jobs[reference.job].init
        upcycle = self.models[reference.name].upcycle if reference.model in self.models else None
        return upcycle.source if upcycle else None

    def lineage(self, ref: str) -> Iterator[Reference]:
        """What a reference names, then what that is made from, and so on down to a checkpoint or random weights."""
        source: str | None = ref
        while source is not None:
            yield Reference.parse(source)
            source = self.made_from(source)

    def makes_the_teacher(self, job: str) -> bool:
        """Whether the teacher comes from this job: it is trained before there is anybody to answer questions."""
        teacher = self.targets.teacher
        return teacher is not None and any(reference.job == job for reference in self.lineage(teacher))

    def needs_answers(self, job: str) -> bool:
        """Whether a job trains on the teacher's own answers, if there are questions without any."""
        return self.targets.answers is not None and self.jobs[job].pool and not self.makes_the_teacher(job)

    def origin(self, ref: str) -> Path | None:
        """Checkpoint folder from outside the run that a model goes back to; None: it goes back to random weights."""
        *_, first = self.lineage(ref)
        if first.kind == "folder":
            return folder_of(first.name)
        path = self.models[first.name].path if first.name in self.models else None
        return folder_of(path) if path is not None else None

    def is_made(self, ref: str) -> bool:
        """Whether `clkd student` makes what a reference names: an upcycled or a random model."""
        name = Reference.parse(ref).model
        return name in self.random_models or (name in self.models and self.models[name].path is None)

    # -- files ---------------------------------------------------------------------------------------------------

    @property
    def data_root(self) -> Path:
        """Root of the data set that is read. ConfigError where the recipe names none."""
        if self.data.root is not None:
            return self.data.root
        if self.benchmark is not None:
            return self.run.dir / "data"
        raise ConfigError(
            "data.root: say which folder holds the data set, as in `data.root: /data/driving`; without `benchmark` in "
            "the recipe nothing is drawn. Nothing was started."
        )

    @property
    def index_dir(self) -> Path:
        """Folder of the index, one folder in it for each split."""
        return self.data.index or self.run.dir / "index"

    @property
    def processor_dir(self) -> Path:
        """Folder of tokenizer and image processor. ConfigError where the recipe names none."""
        if self.data.processor is not None:
            return folder_of(self.data.processor)
        if self.trains_tokenizer:
            return self.run.dir / "processor"
        teacher = [self.targets.teacher] if self.targets.teacher is not None else []
        rows = [row.model for row in self.evaluation.rows]
        for ref in (*teacher, *(job.init for job in self.jobs.values()), *rows):
            if (origin := self.origin(ref)) is not None:
                return origin
        if self.benchmark is not None:
            return self.run.dir / "processor"
        raise ConfigError(
            "data.processor: say which folder holds tokenizer and image processor, as in `data.processor: "
            "/models/Qwen3-VL-8B-Instruct`: neither teacher nor jobs come from a checkpoint. Nothing was started."
        )

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the run has a tokenizer of its own: models with random weights are here, and no other is named."""
        return self.data.processor is None and bool(self.random_models)

    @property
    def store_url(self) -> str:
        """Folder or URL of the soft-target store."""
        return self.targets.store or str(self.run.dir / "store")

    def model_dir(self, ref: str) -> Path:
        """Folder of the Hugging Face checkpoint that a model reference names."""
        reference = Reference.parse(ref)
        if reference.kind == "folder":
            return folder_of(reference.name)
        if reference.kind == "jobs":
            return self.job_dir(reference.name) / "model"
        path = self.models[reference.name].path if reference.name in self.models else None
        return folder_of(path) if path is not None else self.run.dir / "models" / reference.name

    def job_dir(self, name: str) -> Path:
        """Folder of one training job: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `model/`."""
        return self.run.dir / "jobs" / name

    def hardness_file(self, student: str | None) -> Path:
        """The table of a student's scores by its reference, or of the teacher's view (None), as `clkd hardness` writes.

        Training looks for it there, see `starting_table`.
        """
        slug = re.sub(r"[^A-Za-z0-9]+", "-", student or "").strip("-")
        return self.run.dir / "hardness" / f"{slug}.parquet" if student else self.run.dir / "hardness.parquet"

    def scored_student(self, name: str) -> str | None:
        """The model whose scores a job's curriculum starts from; None: the teacher's view, or a table that is named."""
        job = self.jobs[name]
        scored = job.curriculum is not None and job.hardness.start == "student" and job.hardness.table is None
        return job.init if scored else None

    def starting_table(self, name: str) -> Path:
        """The hardness table that a job starts from."""
        return self.jobs[name].hardness.table or self.hardness_file(self.scored_student(name))

    # -- jobs ----------------------------------------------------------------------------------------------------

    def selected_job(self) -> tuple[str, JobConfig]:
        """The job named by `job`; a ConfigError names the choices when there is none."""
        if self.job is None:
            raise ConfigError(f"job: say which job to train, as in `job=NAME`; jobs: {sorted(self.jobs)}")
        return self.job, self.jobs[self.job]

    def word_alignment(self, name: str) -> float:
        """Weight of a job's word alignment; 0 outside the benchmark."""
        return self.benchmark.word_alignment.get(name, 0.0) if self.benchmark else 0.0
