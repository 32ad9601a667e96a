"""What a job is, in its checkpoint: the settings that define its result, and what a model card says of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import differences, listed
from pipeline.recipe import JobConfig, Recipe


def settings(job: JobConfig, seed: int) -> dict[str, Any]:
    """Settings that define the training's result; how it is spread over ranks is left out on purpose.

    The kind of MoE layer is left out too, unless it drops tokens or has a residual expert: otherwise both kinds compute
    the same.
    """
    free = {"micro_batch_size", "checkpoint_every", "keep_checkpoints", "log_every", "activation_checkpointing"}
    values: dict[str, Any] = json.loads(job.model_dump_json(exclude=free | {"moe_layer", "native_moe"}))
    native = job.native_moe
    return values | {
        "seed": seed,
        "native_moe": native.model_dump() if native.drop_tokens or native.use_residual else None,
    }


def refuse_other_settings(job_dir: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """UserError with both values of every setting in which a job's checkpoint and the recipe differ."""
    if differs := differences(saved, ours, ("checkpoint", "recipe")):
        raise UserError(
            f"{job_dir}: this job was started with other settings.{listed(differs)}\n"
            "Restore them, or train under another job name. Nothing was changed."
        )


def about(recipe: Recipe, name: str, num_samples: int) -> dict[str, Any]:
    """What a model card says of a job besides its settings. Names only: paths mean nothing elsewhere."""
    data, teacher = recipe.data, recipe.targets.teacher
    return {
        "job": name,
        "teacher": f"{teacher} ({recipe.model_dir(teacher).name})" if recipe.jobs[name].distill else None,
        "data": {
            "data": f"{recipe.data_root.name}, split {data.train_split}, {num_samples:,} samples",
            "images": f"{data.min_pixels:,} to {data.max_pixels:,} pixels",
        },
    }
