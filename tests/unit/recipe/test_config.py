import re
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.recipe import load_recipe
from tests.helpers.paths import RECIPES

DEMO = RECIPES / "demo.yaml"


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
    path = write(tmp_path, "run: {dir: x}\njobs: {a: {init: /m, steps: 1, optimizer: {learning_rate: 1, lrr: 2}}}\n")
    with pytest.raises(ConfigError, match=r"jobs\.a\.optimizer\.lrr: unknown key; did you mean 'lr'\?"):
        load_recipe(path)


def test_a_key_that_belongs_to_a_section_further_down_is_shown_there(tmp_path):
    path = write(tmp_path, "run: {dir: x}\njobs: {a: {init: /m, steps: 1, lr: 1, micro_size: 2}}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert "jobs.a.lr: unknown key; did you mean 'optimizer.lr'?" in str(caught.value)
    assert "jobs.a.micro_size: unknown key; did you mean 'batch.micro_size'?" in str(caught.value)


def test_all_problems_are_reported_together(tmp_path):
    path = write(tmp_path, "run: {dir: x, seed: no}\ntargets: {top_k: 0}\ndata: {format: parquet}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    for part in ("3 problem(s)", "run.seed", "targets.top_k", "data.format"):
        assert part in str(caught.value)


def test_command_line_overrides_are_yaml_typed():
    recipe = load_recipe(DEMO, ["jobs.clkd.optimizer.lr=0.5", "evaluation.limit=null", "job=clkd"])
    assert recipe.jobs["clkd"].optimizer.lr == 0.5
    assert recipe.evaluation.limit is None
    assert recipe.selected_job()[0] == "clkd"


def test_override_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"'jobs\.clkd\.lr' is not of the form section\.key=value"):
        load_recipe(DEMO, ["jobs.clkd.lr"])


def test_extends_merges_deeply_and_refuses_circles(tmp_path):
    write(tmp_path, "run: {dir: base, seed: 1}\nbenchmark: {scenes: {train: 5, val: 6}}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: recipe.yaml\nbenchmark: {scenes: {train: 7}}\n")
    recipe = load_recipe(top)
    assert (recipe.benchmark.scenes.train, recipe.benchmark.scenes.val, recipe.run.seed) == (7, 6, 1)
    write(tmp_path, "extends: top.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_recipe(top)


def test_references_that_lead_nowhere_are_named():
    with pytest.raises(ConfigError, match=r"jobs\.clkd\.init: no such entry 'models\.mooe'; models: \["):
        load_recipe(DEMO, ["jobs.clkd.init=models.mooe"])


def test_batch_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"jobs\.clkd\.batch: global_size 30 is not a multiple of micro_size 8"):
        load_recipe(DEMO, ["jobs.clkd.batch.global_size=30"])


def test_model_references_name_folders():
    recipe = load_recipe(DEMO, ["run.dir=/r", "models.big={path: /big}"])
    assert recipe.model_dir("jobs.clkd") == Path("/r/jobs/clkd/model")
    assert recipe.model_dir("models.moe") == Path("/r/models/moe")
    assert recipe.model_dir("models.student") == Path("/r/models/student")
    assert recipe.model_dir("models.big") == Path("/big")
    assert recipe.model_dir("/any/folder") == Path("/any/folder")


def test_a_typo_in_a_row_of_a_list_gets_a_hint(tmp_path):
    path = write(tmp_path, "run: {dir: x}\nevaluation: {rows: [{name: a, model: /m, blnd: true}]}\n")
    with pytest.raises(ConfigError, match=r"evaluation\.rows\.0\.blnd: unknown key; did you mean 'blind'\?"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: {dir: x", "not valid YAML"),
        (b"run: {dir: \xff}", "not valid YAML"),
        (b"- run", "a recipe is a mapping of sections, got list"),
        (b"extends: 5", "`extends` names another recipe's file, got 5"),
        (b"extends: other.yaml", "other.yaml: no such recipe"),
        (b"run: {dir: x}\ntargets:\n", "targets: Input should be a valid dictionary"),
        (
            b"run: {dir: x}\njobs: {a: {init: /m, steps: 1, optimizer: {lr: .inf}}}",
            "optimizer.lr: Input should be a finite",
        ),
        (b"run: {dir: x}\njobs: {a: {init: /m, steps: 1, distill: {release_to: 0.1}}}", "release_to 0.1 lies before"),
        (
            b"run: {dir: x}\njobs: {a: {init: /m, steps: 1, distill: {}}}",
            "jobs.a.distill: needs a teacher.",
        ),
        (b"run: {dir: x}\ntargets: {teacher: jobs.teacher}", "targets.teacher: no such entry"),
        (b"run: {dir: x}\nmodels: {m: {upcycle: {source: /s, top_k: 1}}}", "top_k 1 is not between 2 and experts 4"),
        (b"run: {dir: x}\nmodels: {m: {upcycle: {source: /s, top_k: 5}}}", "top_k 5 is not between 2 and experts 4"),
        (b"run: {dir: x}\nmodels: {m: {path: /a, upcycle: {source: /s}}}", "models.m: give exactly one of"),
        (b"run: {dir: x}\nmodels: {m: {}}", "models.m: give exactly one of"),
        (b"run: {dir: x}\ndata: {min_pixels: 9, max_pixels: 8}", "data: min_pixels 9 is above max_pixels 8"),
        (b"run: {dir: x}\njobs: {a: {init: /m, steps: 1, curriculum: {}}}", "jobs.a.curriculum: needs a teacher."),
        (b"run: {dir: x}\nbenchmark: {word_alignment: {a: 1}}", "benchmark.word_alignment.a: no such job; jobs: []"),
        (b"run: {dir: x}\nbenchmark: {}\ndata: {format: chat}", "data.format: the scenes of `benchmark` are in CODA"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(path)


def test_an_override_that_is_not_yaml_is_named():
    with pytest.raises(ConfigError, match=r"^run\.seed=\[1: not valid YAML"):
        load_recipe(DEMO, ["run.seed=[1"])


def test_references_are_all_reported_together():
    with pytest.raises(ConfigError) as caught:
        load_recipe(DEMO, ["jobs.clkd.init=jobs.nope", "targets.teacher=models.none", "job=gone"])
    for part in ("3 problem(s)", "jobs.clkd.init", "targets.teacher", "no such job 'gone'"):
        assert part in str(caught.value)
