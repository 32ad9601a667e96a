"""What the stages of a recipe take: bytes on disk, memory a rank, and hours where a rate is known."""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from pipeline.cluster.plan import GIB, make_plan, model_config, soft_target_bytes, worst_load
from pipeline.errors import UserError
from pipeline.models.families import without_weights
from pipeline.models.loading import parameter_counts
from pipeline.models.topology import read_deepspeed_config
from pipeline.preparation.model_facts import ModelFacts
from pipeline.preparation.split_check import SplitCheck
from pipeline.recipe import JobConfig, Recipe

BYTES_OF_A_CHECKPOINT = 12
"""A parameter: float32 weights and two moments."""


def costs(
    recipe: Recipe,
    models: Mapping[str, ModelFacts],
    splits: Mapping[str, SplitCheck],
    options: argparse.Namespace,
    problems: list[str],
) -> list[str]:
    """Lines, one a stage. What a stage would refuse is added to `problems`."""
    lines, written = [], 0
    split = splits.get(recipe.data.train_split)
    teacher = models.get(recipe.targets.teacher or "")
    asked = splits.get(recipe.data.pool_split or "")
    if teacher and split:
        read = [split, asked] if asked else [split]
        size, tokens = sum(_store_bytes(recipe, teacher, each) for each in read), sum(map(_tokens, read))
        written += size if "://" not in recipe.store_url else 0
        weights = teacher.parameters * (2 if recipe.targets.dtype == "bfloat16" else 4)
        lines.append(
            f"teacher: {tokens:,} answer tokens, a store of about {size / 1e9:.2f} GB; "
            f"{weights / GIB:.1f} GiB of weights a worker, and a forward of {recipe.targets.batch_size} samples"
        )
    for name, job in recipe.jobs.items():
        try:
            line, size = _training(recipe, name, job, split, options)
        except UserError as error:
            problems.append(f"jobs.{name}: {error}")
            continue
        lines.append(line)
        written += size
    if written:
        free = shutil.disk_usage(_existing(recipe.run.dir)).free
        lines.append(f"disk: about {written / 1e9:.1f} GB in {recipe.run.dir}, {free / 1e9:.1f} GB are free")
        if written > free:
            need = f"about {written / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free"
            problems.append(f"run.dir {recipe.run.dir}: {need}")
    return lines


def _training(
    recipe: Recipe, name: str, job: JobConfig, split: SplitCheck | None, options: argparse.Namespace
) -> tuple[str, int]:
    """A job's line, and the bytes of its checkpoints."""
    model = without_weights(model_config(recipe, job.init))
    total, active = parameter_counts(model)
    sizes = SimpleNamespace(
        length=split.lengths.quantile("tokens", 1.0) if split else None,
        images=max((len(row.pixels) for row in split.lengths.rows), default=1) if split else 1,
        answers=split.lengths.quantile("answer", 1.0) if split else 128,
    )
    load = worst_load(recipe, job, model.config, argparse.Namespace(**vars(sizes)))
    plan = make_plan(model, job, read_deepspeed_config(recipe.cluster.deepspeed), options.gpus, load)
    kept = BYTES_OF_A_CHECKPOINT * total * (job.checkpoint.keep + 1)  # a new one is written before an old one goes
    line = (
        f"train {name}: {total / 1e9:.3f} B parameters, {active / 1e9:.3f} B active; "
        f"{plan.peak / GIB:.1f} GiB a rank at its peak on {options.gpus} GPUs ({recipe.cluster.deepspeed}); "
        f"checkpoints of {BYTES_OF_A_CHECKPOINT * total / 1e9:.1f} GB"
    )
    if options.tflops:
        hours = job.steps * plan.operations.computed / (options.tflops * 1e12) / 3600
        line += f"; {hours:.1f} h for {job.steps} steps at {options.tflops:g} TFLOP/s a GPU"
    if options.gpu_mem and plan.peak > options.gpu_mem * GIB:
        raise UserError(
            f"{plan.peak / GIB:.1f} GiB a rank at its peak, a GPU has {options.gpu_mem:g}: "
            f"`clkd plan RECIPE --gpus {options.gpus} --gpu-mem {options.gpu_mem:g} job={name}` says what would fit"
        )
    return line, kept


def _tokens(split: SplitCheck) -> int:
    """Answer tokens of the split, from the mean of the measured answers: those of the teacher are taken to be alike."""
    known = [row.answer for row in split.lengths.rows if row.answer]
    return round(sum(known) / max(len(known), 1) * split.lengths.samples)


def _store_bytes(recipe: Recipe, teacher: ModelFacts, split: SplitCheck) -> int:
    """Soft targets, and sketches of 4 x 4 cells an image and of every answer token."""
    size = soft_target_bytes(recipe, teacher.vocabulary, 1, _tokens(split))
    if recipe.targets.sketches is None:
        return size
    rows = split.lengths.rows
    images = sum(len(row.pixels) for row in rows) / max(len(rows), 1) * split.lengths.samples
    return size + round((_tokens(split) + 16 * images) * 1.03 * recipe.targets.sketches.dim)


def _existing(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place
