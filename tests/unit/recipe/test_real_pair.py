"""The recipe for a real pair of models: planned, dry-run and in order, with configurations of the published sizes."""

import json
import shlex

import pytest
from transformers import Qwen3VLConfig

from pipeline.cli import main as clkd
from pipeline.cluster.local import plan
from pipeline.recipe import load_recipe
from tests.helpers.paths import RECIPES

RECIPE = RECIPES / "qwen3vl_8b_to_2b_moe.yaml"
PUBLISHED = {
    "8B": {
        "text": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        "vision": {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "out_hidden_size": 4096},
        "deepstack": [8, 16, 24],
        "tied": False,
    },
    "2B": {
        "text": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "out_hidden_size": 2048},
        "deepstack": [5, 11, 17],
        "tied": True,
    },
}
"""Qwen3-VL-8B-Instruct and -2B-Instruct, as their config.json have it."""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """What a user changes: the paths. Folders with a config.json and no weights stand for the checkpoints."""
    folder = tmp_path_factory.mktemp("pair")
    for name, sizes in PUBLISHED.items():
        text = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, **sizes["text"]}
        vision = {"num_heads": 16, "deepstack_visual_indexes": sizes["deepstack"], **sizes["vision"]}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=sizes["tied"])
        config.save_pretrained(str(folder / name))
    paths = {"models.teacher.path": folder / "8B", "models.student.path": folder / "2B", "run.dir": folder / "run"}
    return [f"{key}={path}" for key, path in paths.items()]


@pytest.mark.parametrize(("gpus", "micro_batches"), [(8, 8), (64, 1)])
def test_it_fits_one_node_and_eight(own, tmp_path, gpus, micro_batches, capsys):
    out = tmp_path / "plan.json"
    options = ["--gpus", str(gpus), "--gpu-mem", "80", "--samples", "100000", "--json", str(out)]
    assert clkd(["plan", str(RECIPE), *options, "job=clkd", *own]) is None
    found = json.loads(out.read_text())
    assert f"{gpus} GPUs, ZeRO 2, bf16, expert-parallel 2, {micro_batches} micro-batch(es)" in capsys.readouterr().out
    mlp, layers = 3 * 2048 * 6144, 28
    assert found["parameters"]["total"] - found["parameters"]["active"] == layers // 2 * 2 * mlp
    assert 3.6e9 < found["parameters"]["total"] < 3.8e9, "the recipe says 3.7 B"
    assert 2.6e9 < found["parameters"]["active"] < 2.7e9, "the recipe says 2.7 B"
    assert clkd(["plan", str(RECIPE), "--topology", "--gpus", str(gpus), "job=clkd", *own]) == 0


def test_its_chain_on_one_machine(own):
    recipe = load_recipe(RECIPE, own)
    stages = plan(recipe, [str(RECIPE), *own], recipe.cluster.deepspeed, 8)
    assert [stage.name for stage in stages] == [
        "train sft", "model moe", "teacher", "hardness clkd", "train clkd", "evaluate", "export", "report",
    ]  # fmt: skip
    assert recipe.processor_dir == recipe.model_dir("models.teacher")
    assert recipe.model_dir("models.moe") == recipe.run.dir / "models" / "moe"
    features = recipe.jobs["clkd"].distill.active_features
    assert features.student_layer == PUBLISHED["2B"]["text"]["num_hidden_layers"] - 1
    assert recipe.targets.sketches.layer == PUBLISHED["8B"]["text"]["num_hidden_layers"] - 1


def test_its_jobs_on_a_cluster(own, capsys):
    clkd(["submit", str(RECIPE), "--dry-run", *own])
    commands = {words[0]: words for words in map(named, capsys.readouterr().out.splitlines())}
    assert list(commands) == [
        "train-sft",
        "model-moe",
        "teacher",
        "hardness-clkd",
        "train-clkd",
        "evaluate",
        "export",
        "report",
    ]
    assert {"--time=12:00:00", "--array=0,1,2,3,4,5,6,7", "WORKERS=8"} <= set(commands["teacher"])
    for job in ("train-sft", "train-clkd"):
        assert {"--nodes=1", "--time=24:00:00", "DS_CONFIG=zero2_ep"} <= set(commands[job])
    assert "--dependency=afterok:<model moe>:<hardness clkd>" in commands["train-clkd"]
    clkd(["submit", str(RECIPE), "--dry-run", "--with", "train=--nodes=8", "--workers", "2", *own])
    commands = {words[0]: words for words in map(named, capsys.readouterr().out.splitlines())}
    assert "--array=0,1" in commands["teacher"]
    assert commands["train-clkd"].index("--nodes=8") > commands["train-clkd"].index("--nodes=1"), "the later one counts"


def named(line):
    """A printed command's words, its stage's name first."""
    words = shlex.split(line)
    (job,) = (word for word in words if word.startswith("--job-name="))
    return [job.partition(":")[2], *words]
