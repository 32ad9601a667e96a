"""Every shipped DeepSpeed configuration: complete on paper, and trained with as it is in the file."""

import json

import pytest
import torch

from pipeline.cli import main as clkd
from pipeline.errors import ConfigError
from pipeline.models import deepspeed_config
from tests.helpers import single_rank, tiny
from tests.helpers.paths import ROOT

FOLDER = ROOT / "ds_configs"
CONFIGS = sorted(FOLDER.glob("*.json"))
RECIPE_OWNS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler",
}  # fmt: skip


def test_the_promised_configurations_are_there():
    assert {p.stem for p in CONFIGS} >= {"cpu_smoke", "zero1_ep", "zero2_ep", "zero3_ep"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_file_leaves_to_the_recipe_what_the_recipe_owns(path):
    raw = json.loads(path.read_text())
    assert not RECIPE_OWNS & raw.keys()
    config = deepspeed_config.complete(raw, tiny.job(), tiny.moe_model().config, world_size=2)
    assert config.keys() >= RECIPE_OWNS - {"scheduler"}
    if path.stem.startswith("zero"):
        assert f"zero{config['zero_optimization']['stage']}_ep" == path.stem


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[]", "must hold a JSON object, got list")])
def test_a_broken_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content)
    recipe = FOLDER.parent / "pipeline" / "recipes" / "demo.yaml"
    with pytest.raises(ConfigError, match=rf"broken\.json: {message}"):
        clkd(["train", str(recipe), "--deepspeed_config", str(path), "job=clkd", f"run.dir={tmp_path}"])
    assert [p.name for p in tmp_path.iterdir()] == ["broken.json"]


def accumulated(raw, samples):
    """What a step of SGD takes off the master weights: the sum of the samples' gradients, a micro-batch each."""
    exact = {"kind": "sgd", "lr": 1.0, "weight_decay": 0.0, "grad_clip": 0.0}
    engine = single_rank.configured(tiny.dense_model(), raw, global_size=len(samples), micro_size=1, **exact)
    before = single_rank.parameters(engine)
    for number in samples:
        inputs, labels = tiny.collate([tiny.sample(0, number)])
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        engine.backward(tiny.loss_sum(engine(**inputs).logits, labels) * len(samples))
        engine.step()
    after = single_rank.parameters(engine)
    return torch.cat([(before[name] - after[name]).double().flatten() for name in before])


def test_every_shipped_configuration_in_bf16_sums_gradients_in_float32():
    """Against the sum of steps of one micro-batch each. DeepSpeed's default sums in bf16."""
    raws = {path.stem: json.loads(path.read_text()) for path in CONFIGS}
    shipped = {name: raw for name, raw in raws.items() if raw.get("bf16", {}).get("enabled")}
    assert sorted(shipped) == ["zero1_ep", "zero2_ep", "zero3_ep"]
    default = shipped["zero2_ep"] | {"data_types": {}}
    wanted = sum(accumulated(default, [number]) for number in (0, 1))
    errors = {
        name: float((accumulated(raw, [0, 1]) - wanted).norm() / wanted.norm())
        for name, raw in {**shipped, "default": default}.items()
    }
    assert errors.pop("default") > 1e-3
    assert max(errors.values()) < 1e-6, errors
