"""The models that come with the package: whole, what their cards say they are, and able to do what they are for."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.benchmark.scenes import write_scenes
from pipeline.benchmark.scoring import RARE, mentions, score_answer
from pipeline.data.processor import Processor
from pipeline.data.readers import read_samples
from pipeline.evaluation.generate import answers, open_model
from pipeline.recipe import Recipe, ScenesConfig, folder_of, load_recipe
from tests.helpers.paths import ROOT

NAMES = ("teacher", "base")
SETTINGS = {"run": {"dir": "unused"}, "data": {"root": "unused", "min_pixels": 1024, "max_pixels": 40960}}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, ScenesConfig(train=1, val=24, test=1, width=256, height=160, seed=31))
    return root


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_of_the_card(name: str) -> None:
    folder = folder_of(f"package:{name}")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == json.loads((folder / "origin.json").read_text())["sha256"]
    assert digest in (folder / "README.md").read_text()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_that_made_it_is_there(name: str) -> None:
    about = json.loads((folder_of(f"package:{name}") / "origin.json").read_text())
    recipe = load_recipe(ROOT / about["made_by"].removeprefix("clkd run "))
    assert about["scenes"] == recipe.required_benchmark.scenes.model_dump(include=set(about["scenes"]))
    assert about["steps"] == recipe.jobs[about["job"]].steps


def test_nobody_has_seen_what_others_learn_from_or_are_scored_on() -> None:
    """Scenes are drawn from (seed, split, number): other seeds are other scenes."""
    demo = load_recipe(ROOT / "pipeline/recipes/demo.yaml").required_benchmark.scenes.seed
    seeds = [json.loads((folder_of(f"package:{name}") / "origin.json").read_text())["scenes"]["seed"] for name in NAMES]
    assert len({demo, *seeds}) == 3


def test_they_speak_with_the_same_words() -> None:
    folders = [folder_of(f"package:{name}") for name in NAMES]
    for file in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert len({(folder / file).read_bytes() for folder in folders}) == 1, file


def test_the_teacher_knows_rare_objects_and_the_base_student_common_ones(scenes: Path) -> None:
    samples = [s for s in read_samples("coda_lm", scenes, "val") if s.task == "region"]
    processor = Processor.load(folder_of("package:teacher"), Recipe.model_validate(SETTINGS).data)
    right = {}
    for name in NAMES:
        model = open_model(folder_of(f"package:{name}"), processor, torch.device("cpu"))
        said = answers(model, processor, samples, batch_size=16, max_new_tokens=48)
        for kind in ("rare", "common"):
            asked = [s for s in samples if bool(RARE & set(mentions(s.answer))) == (kind == "rare")]
            scores = [score_answer(s.task, said[s.sample_id], s.answer) or 0.0 for s in asked]
            assert len(scores) >= 5
            right[name, kind] = sum(scores) / len(scores)
    assert right["teacher", "rare"] > 0.5 and right["teacher", "common"] > 0.6
    assert right["base", "common"] > 0.4 and right["base", "rare"] < 0.2
