"""Word alignment reads the word embeddings outside their module: under ZeRO-3 they are in parts there."""

import json

import pytest
import torch

from tests.helpers.recipes import SGD
from tests.helpers.training import copied, losses, metrics, train, weights

EMBEDDINGS = "model.language_model.embed_tokens.weight"


@pytest.fixture
def run(prepared, tmp_path):
    return copied(prepared, tmp_path / "run", **SGD)


def test_zero_3_equals_zero_1(prepared, run, tmp_path):
    """fp32, SGD, EP 2: losses, the term itself and every weight."""
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    zero3 |= {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    aligned = {"benchmark.word_alignment": "{teacher: 1, clkd: 5}", "jobs.clkd.steps": 3}
    other = copied(prepared, tmp_path / "other", **SGD)
    train(run, **aligned)
    train(other, ds=str(tmp_path / "zero3.json"), **aligned)
    assert losses(other) == pytest.approx(losses(run), rel=1e-5)
    assert metrics(other, "vision") == pytest.approx(metrics(run, "vision"), rel=1e-5)
    assert metrics(run, "vision")[-1] < metrics(run, "vision")[0]
    wanted = weights(run)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_term_reaches_the_embeddings(prepared, run, tmp_path):
    """The test above would not notice a gradient that is lost under both. Clipping would move everything a little."""
    other = copied(prepared, tmp_path / "other", **SGD)
    one_step = {"jobs.clkd.steps": 1, "jobs.clkd.optimizer.grad_clip": 0}
    train(run, **one_step, **{"benchmark.word_alignment": "{teacher: 1, clkd: 5}"})
    train(other, **one_step)
    moved = (weights(run)[EMBEDDINGS] - weights(other)[EMBEDDINGS]).abs().max()
    assert moved > 1e-4
