"""`clkd init` on two model folders and a data folder, and `clkd check` on what it wrote, whole and broken."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.benchmark import random_models
from pipeline.cli import main as clkd
from pipeline.data.processor import Processor
from pipeline.errors import ConfigError, UserError
from pipeline.models import loading
from pipeline.recipe import DataConfig, RandomModelConfig, TextSize, VisionSize, load_recipe
from tests.helpers.tiny_data import make_processor

VISION = VisionSize(hidden_size=32, intermediate_size=48, depth=1, num_heads=2)
SIZES = {"front": (1600, 900), "rear": (640, 480)}


def model(folder: Path, processor: Processor, layers: int) -> Path:
    text = TextSize(hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8)  # fmt: skip
    built = random_models.build(RandomModelConfig(text=text, vision=VISION), processor, seed=layers)
    loading.save_model(built, processor, folder)
    return folder


def record(number: int, image: str = "front.jpg", answer: str = "Slow down: a cone lies ahead.", **more: Any) -> str:
    turns = [{"from": "human", "value": "<image>\nWhat should the ego car do?"}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": str(number), "image": image, "conversations": turns} | more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, student/ and data/ as a person has them."""
    root = tmp_path_factory.mktemp("mine")
    processor = make_processor(root / "processor")
    model(root / "teacher", processor, layers=6)
    model(root / "student", processor, layers=4)
    data = root / "data"
    data.mkdir()
    for name, size in SIZES.items():
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(data / f"{name}.jpg")
    lines = [record(i, answer=f"Slow down: a cone lies {i} m ahead.") for i in range(40)]
    (data / "train.jsonl").write_text("\n".join(lines))
    (data / "test.jsonl").write_text("\n".join(record(i, "rear.jpg", slice="corner") for i in range(3)))
    return root


def init(folders: Path, out: Path, **other: Path) -> None:
    words = {name: folders / name for name in ("teacher", "student", "data")} | other
    clkd(["init", "--out", str(out), *(w for n, p in words.items() for w in (f"--{n}", str(p)))])


@pytest.fixture
def recipe(folders: Path, tmp_path: Path) -> Path:
    """A recipe that `init` wrote, for a copy of the data and a run folder of this test's own."""
    shutil.copytree(folders / "data", tmp_path / "data")
    out = tmp_path / "recipe.yaml"
    init(folders, out, data=tmp_path / "data")
    written = yaml.safe_load(out.read_text()) | {"run": {"dir": str(tmp_path / "run")}}
    out.write_text(yaml.safe_dump(written))
    return out


def test_init_writes_a_recipe_that_fits_what_it_saw(folders: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "recipe.yaml"
    init(folders, out)
    assert f"Next: `clkd check {out}`" in capsys.readouterr().out
    recipe = load_recipe(out)
    assert (recipe.data.format, recipe.data.train_split, recipe.data.test_split) == ("chat", "train", "test")
    assert recipe.data.root == folders / "data"
    assert recipe.data.max_pixels == DataConfig().max_pixels < 1600 * 900
    assert recipe.targets.sketches is not None and recipe.targets.sketches.layer == 3
    features = recipe.jobs["clkd"].distill and recipe.jobs["clkd"].distill.features
    assert features is not None and features.student_layer == 2
    assert recipe.jobs["clkd"].init == "models.moe" and recipe.is_made("models.moe")
    assert recipe.jobs["clkd"].steps == 2  # 3 x 40 samples in batches of 64
    processor = Processor.load(folders / "teacher", recipe.data)
    _, grid = processor.pixels([Image.open(folders / "data" / "front.jpg")])
    longest = int(grid.prod()) // 4 + 40
    assert longest < recipe.data.max_length < 2 * longest
    assert out.read_text().count("#") > 5, "the recipe is commented"


def test_init_says_everything_that_is_wrong_and_overwrites_nothing(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")
    with pytest.raises(UserError) as error:
        init(folders, out, teacher=tmp_path / "nowhere", data=folders / "teacher")
    for part in ("3 problem(s)", "is there already", "nowhere: there is no model", "no data set of a known format"):
        assert part in str(error.value)
    assert out.read_text() == "mine"


def test_init_refuses_models_that_render_a_chat_differently(folders: Path, tmp_path: Path) -> None:
    folder = model(tmp_path / "other", make_processor(tmp_path / "processor"), layers=2)
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> ", 1))
    with pytest.raises(UserError, match="Distillation needs one of both"):
        init(folders, tmp_path / "recipe.yaml", student=folder)
    assert not (tmp_path / "recipe.yaml").exists()


def test_what_init_wrote_passes_the_check(recipe: Path, capsys: Any) -> None:
    assert clkd(["check", str(recipe), "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    for part in (
        "models.teacher: qwen3_vl", "train: 40 samples of 1 images: chat unknown 40",
        "a store of about", "train clkd:", "GiB a rank at its peak on 2 GPUs", "GB are free",
        f"Nothing is wrong. Next: `clkd student {recipe} --model moe`",
    ):  # fmt: skip
        assert part in said
    assert "one slice only" in said and "\nwrong" not in said


def answer_tokens(said: str) -> int:
    """Of the teacher pass, as `check` estimates them."""
    found = re.search(r"teacher: ([\d,]+) answer tokens", said)
    assert found is not None
    return int(found.group(1).replace(",", ""))


def test_questions_without_an_answer_are_for_the_teacher(folders: Path, tmp_path: Path, capsys: Any) -> None:
    """`init` says so in the recipe, and `check` counts them; without the setting each is wrong."""
    shutil.copytree(folders / "data", tmp_path / "data")
    asked = [{"from": "human", "value": f"<image>\nWhat is {i} m ahead?"} for i in range(8)]
    questions = [json.dumps({"image": "front.jpg", "conversations": [turn]}) for turn in asked]
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write("\n" + "\n".join(questions))
    out = tmp_path / "recipe.yaml"
    init(folders, out, data=tmp_path / "data")
    assert "48 samples to train on, 8 of them for the teacher to answer" in capsys.readouterr().out
    answers = load_recipe(out).targets.answers
    assert answers is not None and answers.max_new_tokens == 128 and "# 8 samples have no answer" in out.read_text()
    words = ["check", str(out), f"run.dir={tmp_path / 'run'}", "--no-images"]
    assert clkd(words) == 0
    said = capsys.readouterr().out
    assert "train: 48 samples of 1 images, 8 of them for the teacher to answer" in said
    tokens = answer_tokens(said)
    assert clkd([*words, "data.max_length=1100"]) == 0
    assert "8 question(s) leave less than targets.answers.max_new_tokens" in capsys.readouterr().out
    assert clkd([*words, "targets.answers=null"]) == 2
    assert capsys.readouterr().out.count("its answer is empty") == 8
    (tmp_path / "data" / "pool.jsonl").write_text("\n".join([*questions[:2], record(7)]))
    assert clkd([*words, "data.pool_split=pool"]) == 2
    said = capsys.readouterr().out
    assert "data.pool_split pool: 1 record(s) have an answer" in said
    assert answer_tokens(said) > tokens


def test_the_check_names_everything_at_once(recipe: Path, capsys: Any) -> None:
    data = recipe.parent / "data"
    whole = (data / "front.jpg").read_bytes()
    (data / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 4000)).save(data / "thin.png")
    bad = [
        record(100, "cut.jpg"),
        record(101, answer="Stop.<|im_end|> Go."),
        record(102, answer="very " * 6000 + "long"),
        record(103, "thin.png"),
    ]
    with (data / "train.jsonl").open("a") as file:
        file.write("\n" + "\n".join(bad))
    settings = ["targets.sketches.layer=7", "jobs.clkd.distill.features.student_layer=5"]
    assert clkd(["check", str(recipe), *settings]) == 2
    said = capsys.readouterr().out
    for part in (
        "train.jsonl:41", "cut.jpg: cannot be read as an image",
        "train.jsonl:42", "<|im_end|>",
        "train.jsonl:43", "data.max_length allows",
        "train.jsonl:44", "one side is more than 200 times",
        "targets.sketches.layer: 7, but the teacher has 6 layers",
        "student_layer: 5, but the student has 4 layers",
        "wrong: 6",
    ):  # fmt: skip
        assert part in said, part


def test_the_check_lists_broken_records(recipe: Path, capsys: Any) -> None:
    """Records that no sample can be made of: all of them, with file and line."""
    data = recipe.parent / "data"
    with (data / "train.jsonl").open("a") as file:
        file.write("\n{\n" + record(200, "missing.jpg") + "\n" + json.dumps({"id": "1", "image": "front.jpg"}))
    assert clkd(["check", str(recipe)]) == 2
    said = capsys.readouterr().out
    assert all(f"train.jsonl:{line}" in said for line in (41, 42, 43))


def test_a_gpu_that_is_too_small_is_said(recipe: Path, capsys: Any) -> None:
    assert clkd(["check", str(recipe), "--gpus", "2", "--gpu-mem", "0.0001", "--tflops", "100"]) == 2
    assert "`clkd plan RECIPE --gpus 2" in capsys.readouterr().out


def test_a_recipe_with_a_mistake_never_gets_to_the_data(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        clkd(["check", str(recipe), "jobs.clkd.stepz=3"])
