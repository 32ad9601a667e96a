"""The chain of a recipe as jobs, without a Slurm: order, what depends on what, options, and what a log says last."""

import json
import sys
from pathlib import Path

import pytest

from pipeline.cluster import chain, job_record, submit
from pipeline.cluster import status as run_status
from pipeline.cluster.status import Queued
from pipeline.errors import ConfigError
from pipeline.recipe import load_recipe
from tests.cluster.slurm_runs import ROOT, write_recipe


@pytest.fixture
def recipe_path(tmp_path) -> Path:
    return write_recipe(tmp_path / "run")


def stages(path, *overrides):
    return {stage.name: stage for stage in chain.chain(load_recipe(path, overrides), overrides, workers=3)}


def test_stages_come_after_what_they_need(recipe_path):
    found = stages(recipe_path)
    names = list(found)
    assert all(names.index(need) < names.index(name) for name, stage in found.items() for need in stage.needs)
    assert found["train clkd"].needs == ("tokenizer", "model moe", "hardness")
    assert found["evaluate"].needs == ("tokenizer", "train teacher", "train clkd")
    assert found["teacher"].tasks == 3 and found["teacher"].state_names() == ["teacher-0", "teacher-1", "teacher-2"]
    assert all((ROOT / stage.script).is_file() for stage in found.values())


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("jobs.clkd.optimizer.lr=0.5", {"train clkd", "evaluate", "export", "report"}),
        ("targets.top_k=4", {"teacher", "hardness", "train clkd", "evaluate", "export", "report"}),
        ("evaluation.limit=1", {"evaluate", "report"}),
    ],
)
def test_a_setting_makes_again_what_depends_on_it(recipe_path, override, changed):
    before, after = stages(recipe_path), stages(recipe_path, override)
    assert {name for name in before if before[name].fingerprint != after[name].fingerprint} == changed


def test_done_means_output_and_state_of_these_settings(recipe_path):
    stage = stages(recipe_path)["teacher"]
    run = recipe_path.parent / "run"
    assert stage.missing(run) == [0, 1, 2]
    stage.output.mkdir(parents=True)
    (run / chain.FOLDER).mkdir()
    for task, fingerprint in enumerate((stage.fingerprint, stage.fingerprint, "another")):
        chain.write_state(run, f"teacher-{task}", {"state": "done", "fingerprint": fingerprint})
    assert stage.missing(run) == [2]
    chain.write_state(run, "teacher-0", {"state": "failed", "fingerprint": stage.fingerprint})
    assert stage.missing(run) == [0, 2]


def test_ranks_of_a_job():
    train = "slurm/train.sbatch"
    assert submit.ranks_of(train, []) == 8
    assert submit.ranks_of(train, ["--nodes=4", "--time=1:00"]) == 32
    assert submit.ranks_of(train, ["-N", "2-3", "--ntasks-per-node=4"]) == 12
    assert submit.ranks_of("slurm/hardness.sbatch", []) == 1


def test_jobs_run_in_the_environment_that_submits_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("CLKD_VENV", raising=False)
    assert submit.environment_of(tmp_path) == sys.prefix
    (tmp_path / ".venv").mkdir()
    assert submit.environment_of(tmp_path) == str(tmp_path / ".venv")
    monkeypatch.setenv("CLKD_VENV", "/site/venv")
    assert submit.environment_of(tmp_path) == "/site/venv"


def test_options_for_a_kind_and_for_one_stage():
    found = submit.stage_options(
        {}, ["train=--nodes=2", "train clkd=--time=9 --mem=1"], ["train a", "train clkd", "teacher"]
    )
    assert found == {"train a": ["--nodes=2"], "train clkd": ["--nodes=2", "--time=9", "--mem=1"], "teacher": []}
    with pytest.raises(ConfigError, match=r"'tain=-N2': wants STAGE=OPTIONS, a stage of \['train a'\]"):
        submit.stage_options({}, ["tain=-N2"], ["train a"])
    with pytest.raises(ConfigError, match=r"cluster\.sbatch\.tain: no such stage; stages: \['train a'\]"):
        submit.stage_options({"tain": "-N2"}, [], ["train a"])
    with pytest.raises(ConfigError, match="'nosuch': no such stage"):
        submit.chosen([], "nosuch")


def test_the_recipes_options_come_before_the_command_lines_and_general_ones_before_special_ones():
    recipe = {"train clkd": "--time=3", "train": "--time=2", "all": "--time=1 --account=me"}
    found = submit.stage_options(recipe, ["train=--time=4"], ["train a", "train clkd", "teacher"])
    assert found == {
        "train a": ["--time=1", "--account=me", "--time=2", "--time=4"],
        "train clkd": ["--time=1", "--account=me", "--time=2", "--time=3", "--time=4"],
        "teacher": ["--time=1", "--account=me"],
    }


def test_the_recipe_says_how_many_tasks_the_teacher_has(recipe_path):
    recipe = load_recipe(recipe_path, ["cluster.teacher_tasks=5"])
    assert [stage.tasks for stage in chain.chain(recipe) if stage.kind == "teacher"] == [5]
    assert [stage.tasks for stage in chain.chain(recipe, workers=2) if stage.kind == "teacher"] == [2]


def test_status_of_a_running_and_of_waiting_stages(recipe_path):
    recipe, found = load_recipe(recipe_path), list(stages(recipe_path).values())
    run = recipe_path.parent / "run"
    (run / "jobs" / "clkd").mkdir(parents=True)
    rows = [{"step": step, "loss": 2.0, "step_s": 0.5, "data_wait_s": 0.1} for step in range(1, 11)]
    (run / "jobs" / "clkd" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chain.make_folder(run)
    chain.write_submission(run, {"jobs": {"train clkd": 7, "evaluate": 8, "export": 9}})
    entries = [
        Queued(7, "RUNNING", "None", "node[1-2]", "11:00"),
        Queued(8, "PENDING", "Dependency", "", "1:00"),
        Queued(9, "PENDING", "PartitionTimeLimit", "", "1:00"),
    ]
    lines = run_status.table(recipe, found, entries)
    assert len(lines) == len(found)
    text = "\n".join(lines)
    assert "running      step 10/60, loss 2.000, about 0 min 30 s of training left, on node[1-2], 11:00 to" in text
    assert "waiting      Dependency" in text
    assert "PartitionTimeLimit: its time limit is above the partition's; scontrol update JobId=9 TimeLimit=" in text


def test_the_last_words_of_a_log(tmp_path):
    log = tmp_path / "rank-0.log"
    assert job_record.last_error(log) == ""
    log.write_text("Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\nbye\n")
    assert job_record.last_error(log) == "torch.OutOfMemoryError: CUDA out of memory"
    log.write_text("error: first\nstep 1\nerror: a: 1, b: 2\n  mend it\n")
    assert job_record.last_error(log) == "a: 1, b: 2\n  mend it"
