import json
import os
from pathlib import Path

import pytest

from pipeline.cluster.chain import chain
from pipeline.cluster.local import Stage, choose_ranks, environment, fitting, one_of_many, plan, run, visible_gpus
from pipeline.errors import UserError
from pipeline.models.topology import read_deepspeed_config
from pipeline.recipe import load_recipe
from tests.helpers.paths import FROM_NOTHING, RECIPES

DEMO = RECIPES / "demo.yaml"


def names(recipe):
    return [s.name for s in plan(recipe, ["RECIPE"], Path("ds.json"), 2)]


def test_the_demo_starts_from_models_that_come_with_the_package():
    """The job that learns from labels alone waits for no teacher."""
    assert names(load_recipe(DEMO)) == [
        "scenes", "model moe", "train sft", "teacher", "train answers", "hardness", "train kd", "hardness clkd",
        "train clkd", "evaluate", "export", "report",
    ]  # fmt: skip


def test_what_a_stage_needs_comes_before_it():
    order = names(load_recipe(FROM_NOTHING))
    assert order[:2] == ["scenes", "tokenizer"]
    for before, after in (
        ("model teacher", "train teacher"), ("train teacher", "teacher"), ("teacher", "hardness"),
        ("hardness", "train moe_kd"), ("train base", "model moe"), ("model moe", "hardness clkd"),
        ("teacher", "hardness clkd"), ("hardness clkd", "train clkd"), ("train clkd", "evaluate"),
        ("evaluate", "report"),
    ):  # fmt: skip
        assert order.index(before) < order.index(after)
    assert len(order) == len(set(order))


def test_a_job_without_a_teacher_of_its_own_waits_for_the_teachers_answers_too():
    """But for the job that the teacher comes from, which has nobody to wait for."""
    answering = load_recipe(FROM_NOTHING, ["targets.answers={}"])
    plain = [name for name, job in answering.jobs.items() if not job.distill and not job.curriculum]
    sft, order = next(name for name in plain if name != "teacher"), names(answering)
    assert order.index("train teacher") < order.index("teacher") < order.index(f"train {sft}")
    stages = {stage.name: stage for stage in chain(answering)}
    assert "teacher" in stages[f"train {sft}"].needs and "teacher" not in stages["train teacher"].needs
    assert "teacher" not in {stage.name: stage for stage in chain(load_recipe(FROM_NOTHING))}[f"train {sft}"].needs


def test_own_data_and_models_skip_what_they_bring():
    own = ["data.root=/d", "data.processor=/t", "models.big={path: /big}", "jobs.teacher.init=models.big"]
    assert not {"scenes", "tokenizer", "model teacher", "model big"} & set(names(load_recipe(FROM_NOTHING, own)))


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


@pytest.mark.parametrize(("wanted", "gpus", "ranks"), [(None, 0, 2), (3, 0, 3), (None, 1, 1), (None, 8, 8), (4, 8, 4)])
def test_a_rank_for_every_gpu_or_two_on_the_cpu(wanted, gpus, ranks):
    assert choose_ranks(wanted, gpus) == ranks


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(UserError, match=r"--ranks 2: .* 1 can be seen\. Give --ranks 1, or DS_ACCELERATOR=cpu"):
        choose_ranks(2, 1)


def test_workers_compute_on_gpus_that_exist():
    devices = [one_of_many(number, ["3", "5"]).get("CUDA_VISIBLE_DEVICES") for number in range(5)]
    assert devices == ["3", "5", "3", "5", "3"]
    assert all(one_of_many(number, ["0"])["CUDA_VISIBLE_DEVICES"] == "0" for number in range(3))
    assert [one_of_many(number, []) for number in range(2)] == [{}, {"TQDM_DISABLE": "1"}]


def test_stages_go_to_the_cpu_only_where_there_is_no_gpu(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert environment(1, [])["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in environment(1, ["0"])
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert environment(1, [])["DS_ACCELERATOR"] == "cuda"  # the user's word


def test_gpus_that_can_be_seen_have_the_users_names(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for named, names in ((None, ["0", "1"]), ("4,6", ["4", "6"]), ("GPU-ab,GPU-cd", ["GPU-ab", "GPU-cd"])):
        if named is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert visible_gpus() == names
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert visible_gpus() == []


def test_the_deepspeed_json_fits_the_ranks(tmp_path):
    smoke = Path("cpu_smoke")
    assert fitting(smoke, 2, tmp_path) == fitting(smoke, 4, tmp_path) == smoke
    assert not list(tmp_path.iterdir())
    own = read_deepspeed_config(fitting(smoke, 1, tmp_path / "run"))
    assert own["expert_parallel"] == {"enabled": True, "autoep_size": 1}
    assert own["zero_optimization"] == read_deepspeed_config(smoke)["zero_optimization"]
