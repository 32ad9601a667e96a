import json
import os
from pathlib import Path

import pytest

from pipeline.cluster.local import Stage, plan, run
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from tests.helpers.paths import RECIPES

DEMO = RECIPES / "demo.yaml"


def names(recipe):
    return [s.name for s in plan(recipe, [str(DEMO)], Path("ds.json"), 2)]


def test_what_a_stage_needs_comes_before_it():
    order = names(load_recipe(DEMO))
    assert order[:2] == ["scenes", "tokenizer"]
    for before, after in (
        ("model teacher", "train teacher"), ("train teacher", "teacher"), ("teacher", "hardness"),
        ("hardness", "train moe_kd"), ("train base", "model moe"), ("model moe", "train clkd"),
        ("train clkd", "evaluate"), ("evaluate", "report"),
    ):  # fmt: skip
        assert order.index(before) < order.index(after)
    assert len(order) == len(set(order))


def test_own_data_and_models_skip_what_they_bring():
    own = ["data.root=/d", "data.processor=/t", "models.big={path: /big}", "jobs.teacher.init=models.big"]
    assert not {"scenes", "tokenizer", "model teacher", "model big"} & set(names(load_recipe(DEMO, own)))


def test_a_failing_stage_stops_the_chain_and_is_named(tmp_path):
    stages = [
        Stage("good", (("true",),)),
        Stage("bad", (("false",),)),
        Stage("never", (("touch", str(tmp_path / "x")),)),
    ]
    with pytest.raises(UserError, match="stage 'bad' ended with status 1"):
        run(stages, tmp_path)
    assert not (tmp_path / "x").exists()
    assert set(json.loads((tmp_path / "stages.json").read_text())) == {"good", "bad"}


def test_the_teacher_pass_is_shared_by_as_many_workers_as_there_are_ranks():
    stages = {s.name: s for s in plan(load_recipe(DEMO), [str(DEMO)], Path("ds.json"), 3)}
    numbers = [command[command.index("--worker") + 1] for command in stages["teacher"].commands]
    assert (numbers, stages["teacher"].processes) == (["0", "1", "2"], 3)
    assert [len(stages[name].commands) for name in ("scenes", "train clkd", "evaluate")] == [1, 1, 1]


def test_commands_of_a_stage_run_at_once_and_a_failing_one_ends_the_others(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writes, reads = (f"echo hello > {tmp_path}/pipe", f"cat {tmp_path}/pipe > {tmp_path}/out")
    run([Stage("both", (("sh", "-c", writes), ("sh", "-c", reads)))], tmp_path)
    assert (tmp_path / "out").read_text() == "hello\n", "each waits for the other: one after the other would hang"
    with pytest.raises(UserError, match="status 3: sh -c exit 3"):
        run([Stage("half", (("sleep", "600"), ("sh", "-c", "exit 3")))], tmp_path)
