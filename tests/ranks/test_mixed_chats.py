"""A data set as people have it, from check to evaluation: several turns and images, text alone, bad samples."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from pipeline.data.processor import Processor
from pipeline.data.splits import open_split
from pipeline.models import checkpoint_folder
from pipeline.recipe import Recipe, load_recipe
from pipeline.targets.soft_targets import SoftTargets
from pipeline.targets.store import SoftTargetStore
from tests.helpers import ranks as processes
from tests.helpers import recipes
from tests.helpers.ranks import Done
from tests.helpers.tiny_data import save_image

GOOD = 24
BAD = ("torn.png", "<|im_end|>", "tokens", "200")
"""What a message about each of the bad records says."""


def records() -> list[dict[str, object]]:
    """Four kinds in turn, each different."""
    made: list[dict[str, object]] = []
    for i in range(0, GOOD, 4):
        talk = [
            {"from": "human", "value": f"<image>\nIs there a car? ({i})"},
            {"from": "gpt", "value": "Yes, a red car."},
            {"from": "human", "value": "And now?"},
            {"from": "gpt", "value": f"Now there is a blue truck, {i} m ahead."},
        ]
        made += [
            {"id": f"talk{i}", "image": "0.png", "system": "Be brief.", "conversations": talk, "slice": "night"},
            {"images": ["0.png", "1.png"], "query": f"Front: <image> Back: <image> What is it? ({i})",
             "response": f"A cone, {i} m ahead.", "task": "views", "slice": "day"},
            {"query": f"What is a cone? ({i})", "response": "Something to drive around.", "task": "text"},
            {"image": "1.png", "query": f"What is it? ({i})", "response": i, "slice": "day"},
        ]  # fmt: skip
    return made


def bad_records() -> list[dict[str, object]]:
    return [
        {"image": "torn.png", "query": "What is it?", "response": "A car."},
        {"image": "0.png", "query": "What is it?", "response": "A car.<|im_end|> Go."},
        {"image": "0.png", "query": "What is it?", "response": "very " * 3000 + "long"},
        {"image": "sliver.png", "query": "What is it?", "response": "A wire."},
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training records of all kinds, bad ones between them; test records that are good but one, and one unanswered."""
    root = tmp_path_factory.mktemp("data")
    for name, (width, height) in {"0": (96, 64), "1": (64, 96), "sliver": (2000, 4)}.items():
        save_image(root / f"{name}.png", width, height)
    whole = (root / "0.png").read_bytes()
    (root / "torn.png").write_bytes(whole[: len(whole) // 2])
    good, bad = records(), bad_records()
    mixed = [*good[:5], bad[0], bad[1], *good[5:11], bad[2], *good[11:], bad[3]]
    (root / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in mixed))
    (root / "test.json").write_text(json.dumps([*good[:8], bad[0], {"id": "open", "query": "Open question?"}]))
    return root


@pytest.fixture(scope="module")
def folder(prepared: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on these data, with the prepared run's models, up to the prior; bad samples are left out."""
    run = tmp_path_factory.mktemp("chats")
    models = {"big": {"path": str(prepared / "jobs/teacher/model")}, "moe": {"path": str(prepared / "models/moe")}}
    job = recipes.CLKD | {"steps": 4, "distill": recipes.DISTILL | {"features": recipes.FEATURES}}
    recipe = {
        "run": {"dir": str(run)},
        "data": {
            "format": "chat", "root": str(data), "train_split": "train", "test_split": "test", "workers": 1,
            "min_pixels": 1024, "max_pixels": 128 * 96, "max_length": 256, "bad_samples": "skip",
            "processor": str(prepared / "models/small"),
        },
        "models": models,
        "targets": recipes.TINY["targets"] | {"teacher": "models.big"},
        "jobs": {"clkd": job},
        "cluster": {"deepspeed": "cpu_smoke"},
        "evaluation": {
            "max_new_tokens": 8, "latency_samples": 2, "latency_repeats": 1,
            "rows": [{"name": "teacher", "model": "models.big"}, {"name": "student", "model": "jobs.clkd"}],
        },
    }  # fmt: skip
    recipes.write(run / "recipe.yaml", recipe)
    said = clkd(run, "teacher").stdout
    assert "4 bad sample(s) LEFT OUT" in said
    clkd(run, "hardness")
    return run


def clkd(run: Path, stage: str, *words: str, check: bool = True, ranks: int = 0) -> Done:
    return processes.run(processes.clkd, stage, run / "recipe.yaml", *words, ranks=ranks, check=check)


def recipe_of(run: Path) -> Recipe:
    return load_recipe(run / "recipe.yaml")


def test_check_names_every_bad_record_with_file_and_line(folder: Path) -> None:
    done = clkd(folder, "check", "data.bad_samples=refuse", check=False)
    assert done.returncode == 2
    for line, word in zip((6, 7, 14, 28), BAD, strict=True):
        assert any(f"train.jsonl:{line}" in text and word in text for text in done.stdout.splitlines()), (line, word)
    assert done.stdout.count("train.jsonl:") == 4 and "its answer is empty" not in done.stdout


def test_a_bad_sample_that_is_not_to_be_left_out_ends_the_pass_with_one_line(folder: Path) -> None:
    """Also where a loader's worker meets it."""
    done = clkd(folder, "teacher", "data.bad_samples=refuse", f"targets.store={folder / 'other'}", check=False)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "train.jsonl:" in said[0] and any(word in said[0] for word in BAD)
    assert "Traceback" not in done.stderr


def test_the_store_has_the_teachers_rows_of_every_answer(folder: Path) -> None:
    """Of all turns' answers, against transformers' forward of each sample alone; none of what was left out."""
    recipe = recipe_of(folder)
    processor = Processor.load(recipe.processor_dir, recipe.data)
    store = SoftTargetStore.open(recipe.store_url, None)
    model = AutoModelForImageTextToText.from_pretrained(recipe.model_dir(recipe.teacher)).eval()
    found = {sample.sample_id: sample for sample in open_split(recipe, "train")}
    assert len(found) == GOOD + len(BAD)
    learned = set()
    for sample_id, sample in found.items():
        targets: SoftTargets = store.read(sample_id)
        encoded = processor.encode_or_leave_out(sample)
        if encoded.problem is not None:
            assert len(targets) == 0
            continue
        inputs = {"input_ids": encoded.input_ids[None]}
        if sample.images:
            inputs |= {"pixel_values": encoded.pixel_values, "image_grid_thw": encoded.image_grid_thw}
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).long()
        with torch.no_grad():
            logits = model(**inputs).logits[0, :-1, : processor.vocab_size].float()
        rows = encoded.labels[1:] != -100
        gold = logits[rows].log_softmax(-1).gather(-1, encoded.labels[1:][rows][:, None])[:, 0]
        torch.testing.assert_close(targets.gold_logprob, gold, rtol=1e-3, atol=2e-3)
        learned.add(len(sample.answers))
    assert learned == {1, 2}, "answers of single and of several turns"


@pytest.mark.parametrize("ds", ["zero1_ep", "zero3_ep"])
def test_training_goes_through_and_lists_what_it_left_out(folder: Path, tmp_path: Path, ds: str) -> None:
    """Micro-batches without an image under ZeRO-3 too, whose ranks share the vision tower's weights."""
    words = [f"run.dir={tmp_path}", f"targets.store={folder / 'store'}", "data.index=" + str(folder / "index")]
    (tmp_path / "hardness.parquet").write_bytes((folder / "hardness.parquet").read_bytes())
    clkd(folder, "train", "--deepspeed_config", ds, "job=clkd", "jobs.clkd.steps=8", *words, ranks=2)
    folder_of_checkpoint = checkpoint_folder.latest(tmp_path / "jobs/clkd/checkpoints")
    assert folder_of_checkpoint is not None
    left_out = [json.loads(line) for line in (tmp_path / "jobs/clkd/left_out.jsonl").read_text().splitlines()]
    assert 1 <= len(left_out) <= len(BAD)
    assert len({line["sample_id"] for line in left_out}) == len(left_out)
    assert all("train.jsonl:" in line["problem"] and any(word in line["problem"] for word in BAD) for line in left_out)


def test_evaluation_scores_by_task_and_slice_and_answers_what_has_no_gold(folder: Path) -> None:
    clkd(folder, "train", "--deepspeed_config", "cpu_smoke", "job=clkd", ranks=2)
    said = clkd(folder, "evaluate").stdout
    assert "1 bad sample(s) left out" in said
    results = json.loads((folder / "results.json").read_text())
    assert (results["questions"], results["unanswered"]) == (10, 1)
    scores = results["rows"][1]["scores"]
    assert set(scores) == {"rouge_l", "gold_ce"}
    assert {part: set(group["tasks"]) for part, group in scores["rouge_l"].items()} == {
        "night": {"chat"}, "day": {"chat", "views"}, "unknown": {"text"},
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "evaluation/student.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and {"talk0", "open"} <= {line.get("id") for line in lines}
