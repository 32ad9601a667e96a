"""What a job is, in its checkpoint: the settings that define its result, and what a model card says of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import differences, listed
from pipeline.recipe import Recipe

FREE: dict[str, Any] = {
    "log_every": True,
    "optimizer": {"max_bad_steps"},
    "batch": {"micro_size"},
    "moe": {"layer", "native"},
    "performance": True,
    "checkpoint": True,
}
"""Settings of a job that change no result: how it is spread over ranks, what it writes down, what it bears."""
CHANGEABLE = frozenset(
    "optimizer.lr optimizer.min_lr_share optimizer.warmup_share optimizer.betas optimizer.weight_decay "
    "optimizer.grad_clip moe.balance moe.z".split()
)
"""Settings that a person may change from a checkpoint on: what a training that goes astray is brought back with."""


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


def changes(
    job_dir: Path, saved: Mapping[str, Any], ours: Mapping[str, Any], *, allowed: bool, others: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """What the recipe says otherwise than a job's checkpoint: `setting`, `before` and `after` of each.

    Args:
        allowed: whether the user said that settings may change; those in CHANGEABLE then may, and the samples.
        others: lines about samples that are not the checkpoint's.

    Raises:
        UserError: with both values of every setting and with `others`, when something differs that may not.
    """
    lines = differences(saved, ours, ("checkpoint", "recipe"))
    names = [line.partition(":")[0] for line in lines]
    fixed = [name for name in names if name not in CHANGEABLE]
    if fixed or ((names or others) and not allowed):
        what = " and ".join(["settings"] * bool(names) + ["samples"] * bool(others))
        raise UserError(
            f"{job_dir}: this job was started with other {what}.{listed([*lines, *others])}\n"
            f"Restore them, or train under another job name{_way_out(names, fixed, others)}. Nothing was changed."
        )
    return [{"setting": name, "before": _value(saved, name), "after": _value(ours, name)} for name in names]


def _way_out(names: list[str], fixed: list[str], others: Sequence[str]) -> str:
    if not fixed:
        return "; or start with --change-settings to go on from the checkpoint with the new ones"
    free = [name for name in names if name not in fixed] + ["other samples"] * bool(others)
    return f". Of these, --change-settings allows {', '.join(free)} alone" if free else ""


def _value(settings: Mapping[str, Any], name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = value.get(part)
    return value


def refuse_other_settings(job_dir: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """UserError with both values of every setting in which a finished job's checkpoint and the recipe differ."""
    if lines := differences(saved, ours, ("checkpoint", "recipe")):
        raise UserError(
            f"{job_dir}: this job is finished, with other settings.{listed(lines)}\n"
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
