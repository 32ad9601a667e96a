"""The stage `train`: one job, on as many ranks as the launcher starts.

    deepspeed train.py --config RECIPE.yaml --deepspeed_config ds_configs/X.json job=NAME    in a checkout
    deepspeed --module pipeline train RECIPE.yaml --deepspeed_config X job=NAME              anywhere
    torchrun --nproc_per_node N -m pipeline train RECIPE.yaml --deepspeed_config X job=NAME

Exit codes: 0 done; 2 refused, nothing lost; 75 lost contact with another rank, 85 checkpointed after SIGTERM or
SIGUSR1: start it again to go on.
"""

import argparse
import json

import torch

from pipeline.export import stage as export
from pipeline.models import checkpoint_folder
from pipeline.models.topology import read_deepspeed_config
from pipeline.recipe import JobConfig, Recipe
from pipeline.training.job_settings import refuse_other_settings, settings
from pipeline.training.loop import train
from pipeline.training.process import StopFlag, contact, leaving_in_order, only_one, start_distributed
from pipeline.training.setup import set_up


def finished(recipe: Recipe, name: str, job: JobConfig) -> bool:
    """Whether the job's final model is written: it was exported after the last step."""
    report = recipe.model_dir(f"jobs.{name}") / export.REPORT
    return report.is_file() and int(json.loads(report.read_text())["step"]) == job.steps


def main(recipe: Recipe, options: argparse.Namespace) -> int:
    """Train the job that the recipe's `job` names."""
    name, job = recipe.selected_job()
    ds_json = read_deepspeed_config(options.deepspeed_config or recipe.cluster.deepspeed)
    if finished(recipe, name, job):
        saved = checkpoint_folder.latest(recipe.job_dir(name) / "checkpoints")
        if saved is not None:
            fingerprint = checkpoint_folder.read_meta(saved)["state"]["fingerprint"]
            refuse_other_settings(recipe.job_dir(name), fingerprint, settings(recipe, name))
        print(f"job {name!r} is finished: {recipe.model_dir(f'jobs.{name}')}")
        return 0
    stop = StopFlag()
    torch.set_float32_matmul_precision(recipe.run.matmul_precision)
    with leaving_in_order():
        start_distributed()
    torch.manual_seed(recipe.run.seed)
    with leaving_in_order(), contact(), only_one(recipe.job_dir(name)):
        return train(set_up(recipe, name, job, ds_json), stop, change_settings=options.change_settings)
