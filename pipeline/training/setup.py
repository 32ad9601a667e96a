"""What a training job reads, checks and builds before its first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.benchmark.word_alignment import CellWords, VisionProbe
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.export import stage as export
from pipeline.method import features
from pipeline.method.fused_head import FusedHead
from pipeline.method.hardness import HardnessTable
from pipeline.method.plan import WindowPlan
from pipeline.method.release import ClosingGap
from pipeline.method.schedules import Schedules
from pipeline.models import compatibility, loading
from pipeline.models.checkpoint_folder import Template
from pipeline.models.families import moe_layers
from pipeline.models.router import RouterProbe
from pipeline.recipe import CurriculumConfig, JobConfig, Recipe
from pipeline.targets.identity import dataset_fingerprint
from pipeline.targets.pool import open_training_samples
from pipeline.training import engine
from pipeline.training.data_change import TrainingData
from pipeline.training.distillation import Distillation
from pipeline.training.export_probe import ExportProbe
from pipeline.training.incidents import Incidents
from pipeline.training.process import from_first_rank


@dataclass(frozen=True, slots=True)
class Setup:
    """One job on one rank, checked and ready to train. What changes while it trains is inside its parts."""

    recipe: Recipe
    name: str
    """Of the job."""
    job: JobConfig
    processor: Processor
    data: TrainingData
    """The whole training split; checkpoints say which it was."""
    samples: Sequence[Sample]
    """Those trained on; the plan's and the table's indices point into them."""
    distillation: Distillation | None
    """None: a job with neither a teacher nor a curriculum."""
    schedules: Schedules
    plan: WindowPlan
    engine: Any
    """DeepSpeed's, around the model."""
    head: FusedHead
    probe: RouterProbe | None
    """None for a dense model."""
    top_k: int
    """Experts a token; 0 for a dense model."""
    vision: VisionProbe | None
    """Of word alignment, as `cells`; None without it."""
    cells: CellWords | None
    export_probe: ExportProbe
    """Gives the logits that an export is held against."""
    template: Template | None
    """Files that an export needs besides weights; on rank 0, which writes checkpoints."""
    incidents: Incidents
    """Dropped steps and changed settings, which go into the checkpoint."""

    @property
    def dir(self) -> Path:
        """The job's folder."""
        return self.recipe.job_dir(self.name)

    @property
    def table(self) -> HardnessTable | None:
        """The hardness table, for a job that has one."""
        return self.distillation.table if self.distillation else None

    @property
    def gap(self) -> ClosingGap | None:
        """What an adaptive release follows."""
        return self.distillation.gap if self.distillation else None


def set_up(recipe: Recipe, name: str, job: JobConfig, ds_json: dict[str, Any]) -> Setup:
    """Everything that job `name` needs before its first step. Collective: every rank calls it.

    Args:
        ds_json: the parsed DeepSpeed JSON.

    Raises:
        UserError: data, teacher's files, model or settings are missing, broken or do not fit each other.
    """
    processor = Processor.load(recipe.processor_dir, recipe.data)
    split = from_first_rank(lambda: open_training_samples(recipe, processor, name))
    data = TrainingData(split, dataset_fingerprint(split))
    # An adaptive release holds some samples out.
    distillation = Distillation.open(recipe, name, job, processor, data)
    samples = distillation.samples if distillation else split
    model_engine = _engine(recipe, name, job, ds_json, processor, distillation)
    model, has_experts = model_engine.module, bool(moe_layers(model_engine.module.config))
    aligned = recipe.word_alignment(name) > 0
    folder = recipe.model_dir(job.init)
    return Setup(
        recipe=recipe,
        name=name,
        job=job,
        processor=processor,
        data=data,
        samples=samples,
        distillation=distillation,
        schedules=Schedules(job),
        plan=_plan(recipe, job, len(samples)),
        engine=model_engine,
        head=FusedHead(model),
        probe=RouterProbe(model) if has_experts else None,
        top_k=model.config.get_text_config().num_experts_per_tok if has_experts else 0,
        vision=VisionProbe(model) if aligned else None,
        cells=CellWords(processor) if aligned else None,
        export_probe=ExportProbe(model_engine, processor, job),
        template=export.template_files(folder, recipe.processor_dir, recipe.data) if dist.get_rank() == 0 else None,
        incidents=Incidents(recipe.job_dir(name), name, job.optimizer.max_bad_steps),
    )


def _engine(
    recipe: Recipe,
    name: str,
    job: JobConfig,
    ds_json: dict[str, Any],
    processor: Processor,
    distillation: Distillation | None,
) -> Any:
    """The model that the job starts from, checked against the processor, under DeepSpeed."""
    folder = recipe.model_dir(job.init)
    model = loading.load_model(folder, attention=loading.batch_attention())
    compatibility.check_compatible(model, processor)
    compatibility.check_own_files(folder, processor, recipe.data)
    if job.performance.activation_checkpointing:
        loading.enable_activation_checkpointing(model)
    loading.freeze(model, job.trainable)
    wanted = job.distill.active_features if job.distill else None
    if wanted is not None and distillation is not None and distillation.sketches is not None:
        # Made for its check alone: a layer that the student lacks is refused now, not at the first step.
        features.HiddenStates(model, wanted.student_layer, f"jobs.{name}.{features.SETTING}", "student")
        # The map W is trained with the model, so DeepSpeed must find it there.
        features.attach_map(model, int(distillation.sketches.identity["sketch_dim"]), recipe.run.seed)
    model.train()
    return engine.start(model, job, ds_json)


def _plan(recipe: Recipe, job: JobConfig, num_samples: int) -> WindowPlan:
    window_steps = (job.curriculum or CurriculumConfig()).window_steps
    batch, seed = job.batch.global_size, recipe.run.seed
    return WindowPlan(num_samples, batch, window_steps, seed, job.curriculum, job.hardness)
