"""Training with features as users start it: ranks, an interruption, the export. Real files, tiny models."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForImageTextToText

from pipeline.method.hardness import HardnessTable
from tests.helpers.recipes import FEATURES, SGD
from tests.helpers.training import (
    ONE_RANK,
    copied,
    interrupt,
    losses,
    metrics,
    newest,
    same_weights,
    saved_step,
    stage,
    train,
    weights,
)

W = "feature_map.weight"
SETTINGS = SGD | {"distill": {"features": FEATURES}}


@pytest.fixture
def run(prepared, tmp_path):
    return copied(prepared, tmp_path / "run", **SETTINGS)


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """A finished job on two ranks that share the experts."""
    run = copied(prepared, tmp_path_factory.mktemp("whole") / "run", **SETTINGS)
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
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert len(dict(model.named_parameters())) == len(weights(uninterrupted)) - 1


def test_resumed_equals_uninterrupted_bit_for_bit(run, uninterrupted):
    interrupt(run, after=2)
    assert 2 <= saved_step(run) < 8
    train(run)
    assert same_weights(weights(run), weights(uninterrupted))
    assert losses(run) == losses(uninterrupted)
    assert metrics(run, "feature_loss") == metrics(uninterrupted, "feature_loss")


def test_two_ranks_equal_one(run, uninterrupted):
    train(run, **ONE_RANK)
    for name in ("loss", "feature_loss", "feature_hardness", "instance_hardness"):
        assert metrics(run, name) == pytest.approx(metrics(uninterrupted, name), rel=1e-5), name
    wanted = weights(uninterrupted)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_job_starts_from_the_table_that_it_names(run):
    stage(run, "hardness", "--student", "models.small")
    path = run / "hardness" / "models-small.parquet"
    named = {"jobs.clkd.hardness": f"{{table: {path}, dynamic: false}}", "jobs.clkd.steps": 1}
    train(run, **ONE_RANK, **named)
    arrays = load_file(newest(run) / "arrays.safetensors")
    wanted, prior = (HardnessTable.load(p).difficulty for p in (path, run / "hardness.parquet"))
    assert np.array_equal(arrays["hardness/difficulty"], wanted)
    assert not np.array_equal(wanted, prior)
