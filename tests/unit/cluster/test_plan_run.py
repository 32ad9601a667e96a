"""Plans of whole jobs: parameters without weights, operations against torch's counter, refusals that help."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLConfig

from pipeline.cli import main as clkd
from pipeline.cluster import plan as plan_run
from pipeline.errors import UserError
from pipeline.models import loading, student
from pipeline.models.cost import flops
from pipeline.models.cost.activations import Load, Settings
from pipeline.models.families import without_weights
from pipeline.recipe import Recipe, load_recipe
from tests.helpers import recipes, tiny
from tests.helpers.paths import ROOT
from tools.bench.runs import make_run

LARGE = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151_936}
LARGE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16, "out_hidden_size": 4096}


def large_recipe(folder: Path) -> Path:
    """A job on a Qwen3-VL-8B-shaped checkpoint of which only config.json is there, upcycled."""
    dense = Qwen3VLConfig(text_config=LARGE, vision_config=TOWER, tie_word_embeddings=False)
    dense.save_pretrained(str(folder / "8b"))
    return recipes.write(folder / "recipe.yaml", recipes.large(folder, folder / "8b"))


def test_a_large_job_is_planned_without_its_weights(tmp_path, capsys):
    recipe, out = large_recipe(tmp_path), tmp_path / "plan.json"
    options = ["--gpus", "64", "--gpu-mem", "80", "--samples", "1000", "--tflops", "300", "--json", str(out)]
    clkd(["plan", str(recipe), *options, "jobs.clkd.performance.activation_checkpointing=true"])
    found = json.loads(out.read_text())
    mlp, layers = 3 * 4096 * 12288, 36
    attention = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 2 * 4096 + 2 * 128
    decoder = layers * attention + 2 * 4096 * 151_936 + 4096 + 18 * (mlp + 4 * 4096)
    vision = found["parameters"]["total"] - decoder - 18 * 4 * mlp
    assert 0.4e9 < vision < 0.7e9
    assert found["parameters"]["active"] == found["parameters"]["total"] - 18 * 2 * mlp
    assert found["bytes"]["weights"] == 2 * (found["parameters"]["total"] - 18 * 2 * mlp)  # expert-parallel 2, bf16
    assert found["soft_target_bytes"] == 1000 * 128 * 209  # docs/BENCHMARKS.md: packed, k = 64
    seconds = found["operations_per_rank_and_step"]["computed"] / 300e12
    assert found["hours"] == pytest.approx(2000 * seconds / 3600)
    assert "peak" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_and_the_advice_helps(tmp_path):
    recipe = large_recipe(tmp_path)
    command = [str(recipe), "--gpus", "64", "--gpu-mem", "40"]
    with pytest.raises(UserError) as error:
        clkd(["plan", *command])
    advice = str(error.value).splitlines()[1:]
    assert "activation_checkpointing" in advice[0] and advice[-1].endswith("fits")
    config = json.loads((ROOT / "ds_configs" / "zero2_ep.json").read_text())
    config["zero_optimization"]["stage"] = int(re.findall(r"stage (\d)", str(advice))[-1])
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command += ["--deepspeed_config", str(tmp_path / "ds.json"), "jobs.clkd.performance.activation_checkpointing=true"]
    clkd(["plan", *command])
    with pytest.raises(UserError, match="take more GPUs or a smaller model"):
        clkd(["plan", str(recipe), "--gpus", "64", "--gpu-mem", "5", "--reserve", "1"])


def test_models_that_are_not_made_yet_are_planned_as_they_will_be(tmp_path):
    recipe: Recipe = make_run(tmp_path / "run", 2, ["models.moe.upcycle.source=models.student"])
    planned = {ref: without_weights(plan_run.model_config(recipe, ref)) for ref in ("models.student", "models.moe")}
    for ref, model in planned.items():
        student.build_model(recipe, ref.removeprefix("models."))
        made = loading.load_model(recipe.model_dir(ref))
        assert loading.parameter_counts(model) == loading.parameter_counts(made)
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


def test_a_recipe_of_which_nothing_is_made_is_planned(tmp_path, capsys):
    recipe = ROOT / "pipeline" / "recipes" / "demo.yaml"
    smoke = ["--deepspeed_config", str(ROOT / "ds_configs" / "cpu_smoke.json")]
    clkd(["plan", str(recipe), "--gpus", "2", "--gpu-mem", "8", *smoke, f"run.dir={tmp_path}", "job=clkd"])
    assert "ZeRO 1, float32, expert-parallel 2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no config\.json"):
        plan_run.model_config(load_recipe(recipe, [f"run.dir={tmp_path}"]), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("make", [tiny.dense_model, tiny.moe_model])
def test_operations_equal_those_that_torch_counts(make: Any) -> None:
    """Forward and backward; whole logits, so that every row is an answer."""
    model = make().train()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # torch does not count grouped products
    loading._multiply_patches(model)
    inputs, _ = tiny.global_batch(0)
    sequences, length = inputs["input_ids"].shape
    patches = len(inputs["pixel_values"])
    load = Load(sequences, length, patches, len(inputs["image_grid_thw"]), sequences * length)
    text, vision = plan_run.shapes(model.config)
    with FlopCounterMode(display=False) as once:
        logits = model(**inputs).logits
    assert flops.forward(text, vision, load).total == pytest.approx(once.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as back:
        logits.sum().backward()
    planned = flops.training(text, vision, load, Settings(bytes=4, eager_attention=True))
    assert planned.needed == pytest.approx(once.get_total_flops() + back.get_total_flops(), rel=0.01)
    assert torch.isfinite(logits).all()
