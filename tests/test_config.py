from pathlib import Path

import pytest

from pipeline.config import load_recipe
from pipeline.errors import ConfigError

DEMO = Path(__file__).parent.parent / "pipeline" / "recipes" / "demo.yaml"


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_the_shipped_recipes_are_valid():
    for path in DEMO.parent.glob("*.yaml"):
        assert load_recipe(path).jobs


def test_unknown_key_names_its_neighbour(tmp_path):
    path = write(tmp_path, "run: {dir: x}\ntargets: {temprature: 2.0}\n")
    with pytest.raises(ConfigError, match=r"targets\.temprature: unknown key; did you mean 'temperature'\?"):
        load_recipe(path)


def test_unknown_key_inside_a_named_job_gets_a_hint(tmp_path):
    path = write(tmp_path, "run: {dir: x}\njobs: {a: {init: /m, steps: 1, learning_rate: 1, lrr: 2}}\n")
    with pytest.raises(ConfigError, match=r"jobs\.a\.lrr: unknown key; did you mean 'lr'\?"):
        load_recipe(path)


def test_all_problems_are_reported_together(tmp_path):
    path = write(tmp_path, "run: {dir: x, seed: soon}\ntargets: {top_k: 0}\ndata: {format: parquet}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    for part in ("3 problem(s)", "run.seed", "targets.top_k", "data.format"):
        assert part in str(caught.value)


def test_command_line_overrides_are_yaml_typed():
    recipe = load_recipe(DEMO, ["jobs.clkd.lr=0.5", "evaluation.limit=null", "job=clkd"])
    assert recipe.jobs["clkd"].lr == 0.5
    assert recipe.evaluation.limit is None
    assert recipe.selected_job()[0] == "clkd"


def test_override_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"'jobs\.clkd\.lr' is not of the form section\.key=value"):
        load_recipe(DEMO, ["jobs.clkd.lr"])


def test_extends_merges_deeply_and_refuses_circles(tmp_path):
    write(tmp_path, "run: {dir: base, seed: 1}\nscenes: {train: 5, val: 6}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: recipe.yaml\nscenes: {train: 7}\n")
    recipe = load_recipe(top)
    assert (recipe.scenes.train, recipe.scenes.val, recipe.run.seed) == (7, 6, 1)
    write(tmp_path, "extends: top.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_recipe(top)


def test_references_that_lead_nowhere_are_named():
    with pytest.raises(ConfigError, match=r"jobs\.clkd\.init: no such entry 'models\.mooe'; models: \["):
        load_recipe(DEMO, ["jobs.clkd.init=models.mooe"])


def test_batch_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"jobs\.clkd: global_batch_size 30 is not a multiple of micro_batch_size 16"):
        load_recipe(DEMO, ["jobs.clkd.global_batch_size=30"])


def test_model_references_name_folders():
    recipe = load_recipe(DEMO, ["run.dir=/r", "models.teacher={path: /big}"])
    assert recipe.model_dir("jobs.clkd") == Path("/r/jobs/clkd/model")
    assert recipe.model_dir("models.moe") == Path("/r/models/moe")
    assert recipe.model_dir("models.teacher") == Path("/big")
    assert recipe.model_dir("/any/folder") == Path("/any/folder")
