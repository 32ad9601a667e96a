"""Recipes of tiny runs, all in one place: what changes in the recipe's schema changes here."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe import merge
from tests.helpers.paths import RECIPES
from tests.helpers.tiny_data import DATA

STEPS, WINDOW, BATCH = 8, 7, 8
"""An interrupt after step 2 to 6 lies inside the first window; the second is planned from the resumed table."""
DISTILL = {"token_tilt": [-1.0, 1.0], "alpha_end": 0.0, "release_from": 0.2, "release_to": 0.9}
"""Every part at work within a few steps, and the teacher gone at the end."""
JOB = {
    "trainable": "all", "batch": {"global_size": BATCH, "micro_size": 2},
    "performance": {"activation_checkpointing": False},
}  # fmt: skip
CLKD = {
    **JOB, "init": "models.moe", "steps": STEPS, "log_every": 1,
    "optimizer": {"lr": 0.01, "grad_clip": 0.1}, "distill": DISTILL,
    "curriculum": {"window_steps": WINDOW, "competence_start": 0.3, "competence_until": 0.5, "gamma": 1.0},
    "hardness": {"start": "teacher"},  # needs no student of its own: the table is ready before there is one
}  # fmt: skip
TINY: dict[str, Any] = {
    "benchmark": {
        "scenes": {"train": 12, "val": 2, "test": 4, "width": 128, "height": 96, "workers": 1},
        "vocab_size": 400,
        "models": {
            "small": {
                "text": {
                    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "head_dim": 16,
                },
                "vision": {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 4},
            },
        },
        "word_alignment": {"teacher": 1},
    },
    "data": {"min_pixels": 1024, "max_pixels": 128 * 96, "max_length": 256, "workers": 0},
    "models": {"moe": {"upcycle": {"source": "models.small"}}},
    "targets": {
        "teacher": "jobs.teacher", "dtype": "float32", "top_k": 8, "shard_samples": 16,
        "sketches": {"layer": 1, "dim": 64},
    },
    "jobs": {
        "teacher": {**JOB, "init": "models.small", "steps": 2, "optimizer": {"lr": 1e-3}},
        "clkd": CLKD,
    },
    "cluster": {"deepspeed": "cpu_smoke"},
}  # fmt: skip
"""A whole recipe: the run that tests/ranks/ trains in."""
FEATURES = {"student_layer": 1, "weight": 1.0, "tilt": [-1.0, 1.0], "release_to": 0.7}
SGD = {"optimizer": {"kind": "sgd", "lr": 0.5}}
"""Adam would hide a wrong scale of gradients."""
ADAPTIVE = {
    "optimizer": {"lr": 3e-4},  # so that the gap closes little by little
    "distill": {"release": "adaptive", "release_from": 0.0, "adaptive": {"samples": 9, "every": 0.25}},
    "hardness": {"dynamic": False},
}


def tiny(run: Path, **clkd: object) -> dict[str, Any]:
    """TINY in a folder, a copy of the caller's own; `clkd` changes settings of that job."""
    return merge({"run": {"dir": str(run)}, **deepcopy(TINY)}, {"jobs": {"clkd": clkd}})


def chain(run: Path, steps: int, every: int, scenes: int, shard_samples: int) -> dict[str, Any]:
    """All stages with tiny models, as the cluster's tests submit them; a checkpoint `every` so many steps."""
    evaluation = {
        "limit": 2, "max_new_tokens": 8, "latency_samples": 1, "latency_repeats": 1,
        "rows": [{"name": "teacher", "model": "jobs.teacher"}, {"name": "student", "model": "jobs.clkd"}],
    }  # fmt: skip
    changes = {
        "benchmark": {"scenes": {"train": scenes}},
        "targets": {"shard_samples": shard_samples},
        "evaluation": evaluation,
    }
    return merge(tiny(run, steps=steps, checkpoint={"every": every}), changes)


def write(path: Path, recipe: Mapping[str, Any]) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    return path


SMALLEST = {
    "text": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6},
    "vision": {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2},
}


def ablation(run: Path) -> dict[str, Any]:
    """The shipped ablation with tiny sizes."""
    batch = {"batch": {"global_size": 4, "micro_size": 4}}
    return {
        "extends": str(RECIPES / "ablation.yaml"),
        "run": {"dir": str(run)},
        "data": {"max_pixels": 96 * 64},
        "benchmark": {
            "scenes": {"train": 16, "val": 8, "test": 8, "width": 96, "height": 64, "workers": 1},
            "models": {"teacher": SMALLEST, "student": SMALLEST},
        },
        "jobs": {
            "teacher": {"steps": 2, **batch},
            "base": {"steps": 2, **batch},
            "student": {"steps": 30, **batch, "checkpoint": {"every": 2}, "log_every": 1},
        },
        "evaluation": {"limit": 2, "max_new_tokens": 3},
    }


SIZES = {
    "text": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    },
    "vision": {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 16},
}  # fmt: skip


def chat(run: Path, split: str, targets: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """A random teacher on chat records in `run`/data, whose `split` is read.

    `random`: names of more random models of the same sizes; other sections as they are.
    """
    names = ("teacher", *sections.pop("random", ()))
    return {
        "run": {"dir": str(run), "device": "cpu", "seed": 7},
        "data": {**DATA, "format": "chat", "root": str(run / "data"), f"{split}_split": split},
        "benchmark": {"models": dict.fromkeys(names, SIZES)},
        "targets": {"teacher": "models.teacher", **targets},
        **sections,
    }


def reported(run: Path, steps: int) -> dict[str, Any]:
    """A whole comparison, as a report shows it: teacher, dense student, three MoE students, six rows."""
    scenes = {"train": 60, "val": 2, "test": 12, "width": 256, "height": 160, "workers": 1, "corner_share": 0.3}
    return {
        "run": {"dir": str(run), "seed": 7},
        "benchmark": {"scenes": scenes},
        "models": {
            "big": {"path": "/big"},
            "small": {"path": "/small"},
            "moe": {"upcycle": {"source": "models.small"}},
        },
        "targets": {"teacher": "jobs.teacher"},
        "jobs": {
            "teacher": {"init": "models.big", "steps": steps},
            "dense_sft": {"init": "models.small", "steps": steps},
            "moe_sft": {"init": "models.moe", "steps": steps},
            "moe_kd": {"init": "models.moe", "steps": steps, "distill": {"release": "constant", "alpha_start": 0.7}},
            "clkd": {
                "init": "models.moe",
                "steps": steps,
                "distill": {"release": "cosine"},
                "curriculum": {},
                "hardness": {"start": "teacher"},
            },
        },
        "evaluation": {
            "rows": [
                {"name": "teacher", "model": "jobs.teacher"},
                {"name": "teacher, blind", "model": "jobs.teacher", "blind": True},
                {"name": "dense student SFT", "model": "jobs.dense_sft"},
                {"name": "MoE student SFT", "model": "jobs.moe_sft"},
                {"name": "MoE student vanilla KD", "model": "jobs.moe_kd"},
                {"name": "MoE student CLKD", "model": "jobs.clkd"},
            ]
        },
    }


def large(folder: Path, dense: Path) -> dict[str, Any]:
    """A job of the size that people run, on the checkpoint folder `dense`."""
    job = {
        "init": "models.moe", "steps": 2000, "trainable": "all", "distill": {},
        "batch": {"global_size": 256, "micro_size": 2}, "performance": {"activation_checkpointing": False},
    }  # fmt: skip
    return {
        "run": {"dir": str(folder / "run")},
        "data": {"format": "chat", "root": str(folder), "max_pixels": 602_112, "max_length": 4096},
        "models": {"dense": {"path": str(dense)}, "moe": {"upcycle": {"source": "models.dense"}}},
        "targets": {"teacher": "models.dense", "top_k": 64},
        "jobs": {"clkd": job},
        "job": "clkd",
    }
