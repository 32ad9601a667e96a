"""Questions without an answer, from the teacher pass to a resumed training: killed, shared by workers, on two ranks."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.data.processor import Processor
from pipeline.data.sample import POOL
from pipeline.data.splits import open_split
from pipeline.models import checkpoint_folder
from pipeline.recipe import Recipe, load_recipe
from pipeline.targets.pool import open_training_samples
from tests.helpers import pool_run, recipes
from tests.helpers import ranks as processes
from tests.helpers.ranks import Done
from tests.helpers.stores import contents
from tests.helpers.tiny_data import save_image

COUNT = 32
"""Records; every other one is a question."""
SHARD = 4


def records() -> list[dict[str, Any]]:
    """Four kinds in turn, half of each without the last answer."""
    made: list[dict[str, Any]] = []
    for i in range(COUNT):
        said = f"A cone, {i} m ahead."
        kinds: list[dict[str, Any]] = [
            {"image": "0.png", "messages": [("user", f"<image>Is there a car? ({i})"), ("assistant", "Yes."),
                                            ("user", "And now?"), ("assistant", said)], "slice": "night"},
            {"images": ["0.png", "1.png"], "messages": [("user", f"<image><image>What is it? ({i})"),
                                                        ("assistant", said)], "task": "views", "slice": "day"},
            {"messages": [("user", f"What is a cone? ({i})"), ("assistant", said)], "task": "text"},
            {"image": "1.png", "messages": [("user", f"<image>What is it? ({i})"), ("assistant", said)]},
        ]  # fmt: skip
        record = kinds[i % 4]
        turns = record["messages"][: -1 if i // 4 % 2 else None]
        record["messages"] = [{"role": role, "content": text} for role, text in turns]
        made.append({"id": f"r{i}"} | record)
    return made


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on such data, with the prepared run's student and a teacher that ends some of its answers; not begun."""
    run = tmp_path_factory.mktemp("answered")
    (run / "data").mkdir()
    for name, (width, height) in {"0": (96, 64), "1": (64, 96)}.items():
        save_image(run / "data" / f"{name}.png", width, height)
    (run / "data" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    shutil.copytree(prepared / "jobs/teacher/model", run / "teacher")
    given = {
        "format": "chat", "root": str(run / "data"), "train_split": "train", "workers": 1, "min_pixels": 1024,
        "max_pixels": 128 * 96, "max_length": 256, "processor": str(prepared / "models/small"),
    }  # fmt: skip
    clkd_job = recipes.CLKD | {"steps": 6, "distill": recipes.DISTILL | {"features": recipes.FEATURES}}
    targets = {
        "teacher": "models.big", "shard_samples": SHARD, "batch_size": 4,
        "answers": {"max_new_tokens": 8, "temperature": 1.0},
    }  # fmt: skip
    recipe = {
        "run": {"dir": str(run)},
        "data": given,
        "models": {"big": {"path": str(run / "teacher")}, "moe": {"path": str(prepared / "models/moe")}},
        "targets": recipes.TINY["targets"] | targets,
        "jobs": {"clkd": clkd_job, "sft": {**recipes.JOB, "init": "models.moe", "steps": 2}},
        "cluster": {"deepspeed": "cpu_smoke"},
    }
    recipes.write(run / "recipe.yaml", recipe)
    pool_run.make_lively(run / "teacher", processor_of(recipe_of(run)).eos_id, sharpness=60.0)
    return run


@pytest.fixture(scope="module")
def answered(folder: Path) -> Path:
    """Up to the prior, in one go."""
    said = clkd(folder, "teacher").stdout
    assert f"{COUNT} samples, {COUNT // 2} of them answered by the teacher" in said
    clkd(folder, "hardness")
    return folder


def clkd(run: Path, stage: str, *words: str, check: bool = True, ranks: int = 0) -> Done:
    return processes.run(processes.clkd, stage, run / "recipe.yaml", *words, ranks=ranks, check=check)


def recipe_of(run: Path, *overrides: str) -> Recipe:
    return load_recipe(run / "recipe.yaml", overrides)


def processor_of(recipe: Recipe) -> Processor:
    return Processor.load(recipe.processor_dir, recipe.data)


def train(run: Path, *words: str, job: str = "clkd", check: bool = True) -> Done:
    options = ("--deepspeed_config", "cpu_smoke", f"job={job}", *words)
    return clkd(run, "train", *options, check=check, ranks=2)


def elsewhere(answered: Path, run: Path) -> tuple[str, ...]:
    """Overrides for a run folder of one's own with the store, its index and the prior."""
    for name in ("store", "answers"):
        shutil.copytree(answered / name, run / name)
    shutil.copy(answered / "hardness.parquet", run)
    return f"run.dir={run}", f"data.index={answered / 'index'}"


def trained_and_open(answered: Path, run: Path, words: tuple[str, ...]) -> None:
    """Train the job `sft`, and make it one that goes on from its checkpoint."""
    train(answered, *words, job="sft")
    shutil.rmtree(run / "jobs/sft/model")


def test_training_before_the_teacher_has_answered_is_refused_with_the_command(folder: Path, tmp_path: Path) -> None:
    done = train(folder, f"run.dir={tmp_path}", job="sft", check=False)
    assert done.statuses == (2, 2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors and all("clkd teacher RECIPE.yaml" in line for line in errors) and "Traceback" not in done.stderr


def test_killed_while_answering_and_shared_by_workers_the_store_is_the_same(answered: Path, tmp_path: Path) -> None:
    reference, hit = contents(answered / "store"), 0
    words = ("teacher", answered / "recipe.yaml", f"run.dir={tmp_path}", f"data.index={answered / 'index'}")
    for worker in (0, 1):
        before = len(list((tmp_path / "store").glob("*.targets.json")))
        running = processes.start(processes.clkd, *words, "--worker", worker, "--workers", 2)
        while running.alive() and len(list((tmp_path / "store").glob("*.targets.json"))) <= before:
            time.sleep(0.002)
        running.signal(signal.SIGKILL)
        hit += running.wait().statuses == (-signal.SIGKILL,)
        done = len(list((tmp_path / "store").glob("*.targets.json")))
        assert done > 0 and (worker or done < COUNT // SHARD)
    assert hit, "no kill came in time"
    both = [processes.start(processes.clkd, *words, "--worker", i, "--workers", 2) for i in range(2)]
    assert [running.wait().returncode for running in both] == [0, 0]
    clkd(answered, "teacher", *map(str, words[2:]))  # what a dying worker held a moment ago
    assert contents(tmp_path / "store") == reference
    assert (tmp_path / "answers/train.jsonl").read_text() == (answered / "answers/train.jsonl").read_text()


def test_two_ranks_train_on_the_records_answers_and_the_teachers(answered: Path) -> None:
    recipe = recipe_of(answered)
    samples = open_training_samples(recipe, processor_of(recipe))
    pool = [s for s in samples if s.source == POOL]
    assert len(pool) >= 4 and all(s.answer for s in pool) and len(samples) == COUNT // 2 + len(pool)
    assert any(s.source == POOL and not s.answer for s in open_split(recipe, "train"))
    train(answered)
    train(answered, job="sft")
    for job in ("clkd", "sft"):
        newest = checkpoint_folder.latest(answered / "jobs" / job / "checkpoints")
        assert newest is not None
        state = checkpoint_folder.read_meta(newest)["state"]
        assert state["samples"] == {"fingerprint": samples.fingerprint, "count": len(samples)}
        assert (answered / "jobs" / job / "samples" / f"{samples.fingerprint.split('-')[0]}.ids").is_file()
    table = pq.read_table(answered / "jobs/clkd/hardness.parquet").to_pydict()
    visited = {i for i, visits in zip(table["sample_id"], table["visits"], strict=True) if visits}
    assert visited & {s.sample_id for s in pool} and visited - {s.sample_id for s in pool}


def test_a_job_notices_other_answers_of_the_same_samples(answered: Path, tmp_path: Path) -> None:
    words = elsewhere(answered, tmp_path)
    trained_and_open(answered, tmp_path, words)
    trained_and_open(answered, tmp_path, words)  # the same samples: nothing to say
    pool_run.reword(recipe_of(answered, *words), " Go.")
    done = train(answered, *words, job="sft", check=False)
    assert done.statuses == (2, 2) and "Traceback" not in done.stderr
    assert "but the teacher's answers to the pool are others" in done.stderr
    said = train(answered, "--change-settings", *words, job="sft").stdout
    assert "the teacher's answers 'as in the checkpoint' -> 'others'" in said


def test_a_higher_threshold_is_a_change_of_samples(answered: Path, tmp_path: Path) -> None:
    words = elsewhere(answered, tmp_path)
    recipe = recipe_of(answered)
    lines = [json.loads(line) for line in (answered / "answers/train.jsonl").read_text().splitlines()]
    least = sorted(line["certainty"] for line in lines)[1]
    trained_and_open(answered, tmp_path, words)
    done = train(answered, *words, f"targets.answers.min_certainty={least}", job="sft", check=False)
    assert done.statuses == (2, 2) and "(0 added, 1 removed)" in done.stderr
    assert f"1 below certainty {least:g}" in done.stdout
    assert len(open_training_samples(recipe, processor_of(recipe))) == COUNT // 2 + len(lines)


def test_check_and_status_know_questions(answered: Path) -> None:
    done = clkd(answered, "check", check=False)
    assert f"{COUNT} samples of 2 images, {COUNT // 2} of them for the teacher to answer" in done.stdout
    assert "its answer is empty" not in done.stdout
    refused = clkd(answered, "check", "targets.answers=null", check=False)
    assert refused.stdout.count("its answer is empty") == COUNT // 2
