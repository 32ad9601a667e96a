"""README's examples are accepted by the code that they are about, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.readers import read_samples
from pipeline.recipe import load_recipe
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (160, 128)).save(path)


def test_the_recipes_for_ones_own_models_are_valid(tmp_path):
    caching, whole = tmp_path / "caching.yaml", tmp_path / "whole.yaml"
    for path, text in zip((caching, whole), blocks("yaml"), strict=True):
        path.write_text(text)
    recipe = load_recipe(caching)
    assert recipe.model_dir(recipe.targets.teacher) == Path(recipe.models["teacher"].path)
    assert recipe.store_url == "/scratch/targets"
    recipe = load_recipe(whole)
    assert recipe.model_dir(recipe.targets.teacher) == Path(recipe.models["teacher"].path)
    assert recipe.model_dir(recipe.models["moe"].upcycle.source) == Path(recipe.models["student"].path)
    assert recipe.jobs["clkd"].distill and recipe.jobs["clkd"].curriculum


def test_the_chat_lines_are_read(tmp_path):
    _, chat = blocks("json")
    (tmp_path / "train.jsonl").write_text(chat)
    for name in ("front/17.jpg", "left/18.jpg", "front/18.jpg"):
        draw(tmp_path / name)
    samples = {s.meta["id"]: s for s in read_samples("chat", tmp_path, "train")}
    assert samples["17"].prompt == "What should the ego car do?"
    assert (len(samples["18"].images), samples["18"].slice, samples["18"].answer) == (2, "corner", "A cone.")


def test_the_coda_lm_record_is_read_from_the_folders_shown(tmp_path):
    record, _ = blocks("json")
    folder = tmp_path / "CODA-LM" / "Train"
    folder.mkdir(parents=True)
    (folder / "val_0001.json").write_text(record)
    (tmp_path / "slices.json").write_text('{"val_0001": "corner"}')
    draw(tmp_path / "val" / "images" / "0001.jpg")
    samples = read_samples("coda_lm", tmp_path, "Train")
    assert {s.task for s in samples} == {"general", "region", "suggestion"}
    assert {s.slice for s in samples} == {"corner"}
    assert [s.box for s in samples if s.task == "region"] == [(40, 60, 80, 50)]


def named_files() -> list[str]:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    code = re.findall(r"\b(?:ds_configs|slurm|pipeline)/[\w/]+\.(?:json|sbatch|py|yaml)", README)
    modules = [
        f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m ((?:pipeline|tools)\.[a-z_.]+)", README)
    ]
    return sorted({*links, *code, *modules})


@pytest.mark.parametrize("name", named_files())
def test_files_that_readme_names_exist(name):
    assert (ROOT / name).is_file()
