"""What a job is, in its checkpoint: the settings that define its result, and what a model card says of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import differences, listed
from pipeline.recipe import Recipe

FREE: dict[str, Any] = {
    "log_every": True,
    "batch": {"micro_size"},
    "moe": {"layer", "native"},
    "performance": True,
    "checkpoint": True,
}
"""Settings of a job that change no result: how it is spread over ranks, and what it writes down."""


def settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """Settings that define the training's result; how it is spread over ranks is left out on purpose.

    The kind of MoE layer is left out too, unless it drops tokens or has a residual expert: otherwise both kinds compute
    the same.
    """
    job = recipe.jobs[name]
    values: dict[str, Any] = json.loads(job.model_dump_json(exclude=FREE))
    native = job.moe.native
    if native.drop_tokens or native.use_residual:
        values["moe"]["native"] = native.model_dump()
    return values | {"seed": recipe.run.seed, "word_alignment": recipe.word_alignment(name)}


def refuse_other_settings(job_dir: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """UserError with both values of every setting in which a job's checkpoint and the recipe differ."""
    if differs := differences(saved, ours, ("checkpoint", "recipe")):
        raise UserError(
            f"{job_dir}: this job was started with other settings.{listed(differs)}\n"
            "Restore them, or train under another job name. Nothing was changed."
        )


def about(recipe: Recipe, name: str, num_samples: int) -> dict[str, Any]:
    """What a model card says of a job besides its settings. Names only: paths mean nothing elsewhere."""
    data, distilled = recipe.data, recipe.jobs[name].distill is not None
    return {
        "job": name,
        "teacher": f"{recipe.teacher} ({recipe.model_dir(recipe.teacher).name})" if distilled else None,
        "data": {
            "data": f"{recipe.data_root.name}, split {data.train_split}, {num_samples:,} samples",
            "images": f"{data.min_pixels:,} to {data.max_pixels:,} pixels",
        },
    }
