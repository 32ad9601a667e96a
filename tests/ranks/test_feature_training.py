"""Training with features as users start it: ranks, an interruption, the export. Real files, tiny models."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file

from pipeline.method.hardness import HardnessTable
from pipeline.models import checkpoint_folder
from pipeline.recipe import merge
from tests.helpers.paths import HELPERS
from tests.ranks.test_train import TINY, interrupt, losses, metrics, saved_step, stage, train, weights

pytestmark = pytest.mark.slow
FEATURES = {"student_layer": 1, "weight": 1.0, "tilt": [-1.0, 1.0], "release_to": 0.7}
SGD = {"optimizer": {"kind": "sgd", "lr": 0.5}}
W = "feature_map.weight"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder in which everything before the student's training is made, sketches among it."""
    run = tmp_path_factory.mktemp("run")
    changes = {
        "run": {"dir": str(run)},
        "targets": {"teacher": "models.small", "sketches": {"layer": 1, "dim": 64}},
        "jobs": {"clkd": SGD | {"distill": {"features": FEATURES}}},
    }
    recipe = merge(TINY, changes)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    stage(run, "-m", "pipeline", "scenes")
    stage(run, "-m", "pipeline", "tokenizer")
    stage(run, "-m", "pipeline", "student", "--model", "small", "--model", "moe")
    stage(run, "-m", "pipeline", "teacher")
    stage(run, "-m", "pipeline", "hardness")
    return run


def copied(prepared, folder):
    copy = folder / "run"
    shutil.copytree(prepared, copy)
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace(str(prepared), str(copy)))
    return copy


@pytest.fixture
def run(prepared, tmp_path):
    return copied(prepared, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """A finished job on two ranks that share the experts. SGD: Adam would hide a wrong scale."""
    run = copied(prepared, tmp_path_factory.mktemp("whole"))
    train(run)
    return run


def test_features_are_learned_and_released_before_the_logits(uninterrupted):
    hardness, alpha = (metrics(uninterrupted, f"feature_{name}") for name in ("hardness", "alpha"))
    assert hardness[-3] < hardness[0] - 0.02  # an untrained W stands near 0.5
    assert alpha[0] == pytest.approx(0.9) and alpha[-1] == 0 < metrics(uninterrupted, "alpha")[-1]


def test_the_exported_model_is_plain_hugging_face_without_w(uninterrupted):
    folder = uninterrupted / "jobs" / "clkd" / "model"
    names = {name for path in folder.glob("*.safetensors") for name in safe_open(path, "pt").keys()}  # noqa: SIM118
    assert W in weights(uninterrupted)
    assert not any("feature_map" in name for name in names)
    image = next((uninterrupted / "data").rglob("*.jpg"))
    script, out = HELPERS / "plain_transformers.py", uninterrupted / "answer"
    command = [sys.executable, "-I", str(script), str(folder), str(image), "What is ahead?", "3", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "feature_map" not in done.stderr  # no unexpected keys


def test_resumed_equals_uninterrupted_bit_for_bit(run, uninterrupted):
    interrupt(run, after=2)
    assert 2 <= saved_step(run) < 8
    train(run)
    whole, resumed = weights(uninterrupted), weights(run)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(run) == losses(uninterrupted)
    assert metrics(run, "feature_loss") == metrics(uninterrupted, "feature_loss")


def test_two_ranks_equal_one(run, uninterrupted):
    train(run, ds="dense", ranks=1, **{"jobs.clkd.batch.micro_size": 4})
    for name in ("loss", "feature_loss", "feature_hardness", "instance_hardness"):
        assert metrics(run, name) == pytest.approx(metrics(uninterrupted, name), rel=1e-5), name
    wanted = weights(uninterrupted)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_job_starts_from_the_table_that_it_names(run):
    stage(run, "-m", "pipeline", "hardness", "--student", "models.small")
    path = run / "hardness" / "models-small.parquet"
    named = {"jobs.clkd.hardness": f"{{table: {path}, dynamic: false}}", "jobs.clkd.steps": 1}
    train(run, ds="dense", ranks=1, **named, **{"jobs.clkd.batch.micro_size": 4})
    arrays = load_file(checkpoint_folder.latest(run / "jobs" / "clkd" / "checkpoints") / "arrays.safetensors")
    wanted, prior = (HardnessTable.load(p).difficulty for p in (path, run / "hardness.parquet"))
    assert np.array_equal(arrays["hardness/difficulty"], wanted)
    assert not np.array_equal(wanted, prior)
