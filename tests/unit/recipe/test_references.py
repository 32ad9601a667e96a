"""References, and what the recipe says of folders where it does not name them."""

from pathlib import Path

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.recipe import Recipe, Reference, folder_of, load_recipe
from tests.helpers.paths import FROM_NOTHING, RECIPES

PAIR = {
    "run": {"dir": "/run"},
    "models": {
        "teacher": {"path": "/8b"},
        "student": {"path": "/2b"},
        "moe": {"upcycle": {"source": "jobs.base"}},
    },
    "jobs": {"base": {"init": "models.student", "steps": 1}, "kd": {"init": "models.moe", "steps": 1, "distill": {}}},
    "targets": {"teacher": "models.teacher"},
}


def changed(**parts: object) -> Recipe:
    return Recipe.model_validate(PAIR | parts)


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("models.a", "models", "a"),
        ("jobs.a.b", "jobs", "a.b"),
        ("/models/a.b", "folder", "/models/a.b"),
        ("jobs", "folder", "jobs"),
        ("./models.old", "folder", "./models.old"),
    ],
)
def test_a_reference_is_taken_apart(text, kind, name):
    assert Reference.parse(text) == Reference(kind, name)


def test_a_model_goes_back_to_what_it_is_made_from():
    recipe = changed()
    assert [f"{r.kind}.{r.name}" for r in recipe.lineage("jobs.kd")] == [
        "jobs.kd", "models.moe", "jobs.base", "models.student",
    ]  # fmt: skip
    assert recipe.origin("jobs.kd") == Path("/2b")
    assert recipe.origin("/somewhere") == Path("/somewhere")
    demo = load_recipe(FROM_NOTHING)
    assert [r.name for r in demo.lineage("jobs.clkd")] == ["clkd", "moe", "base", "student"]
    assert demo.origin("jobs.clkd") is None, "random weights"


def test_which_models_a_stage_of_ours_makes():
    recipe, demo = changed(), load_recipe(FROM_NOTHING)
    assert recipe.is_made("models.moe") and demo.is_made("models.teacher")
    assert not any(recipe.is_made(ref) for ref in ("models.teacher", "jobs.kd", "/models/moe"))


def test_a_circle_is_refused():
    jobs = {"base": {"init": "models.moe", "steps": 1}}
    with pytest.raises(
        ValueError, match=r"jobs\.base\.init: goes in a circle: jobs\.base <- models\.moe <- jobs\.base"
    ):
        changed(jobs=jobs)


def test_a_name_in_both_lists_of_models_is_refused():
    text, vision = {"num_hidden_layers": 1, "head_dim": 8}, {"depth": 1, "num_heads": 1}
    text |= dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 8)
    vision |= {"hidden_size": 8, "intermediate_size": 8}
    with pytest.raises(ValueError, match=r"models\.teacher: benchmark\.models\.teacher is there too"):
        changed(benchmark={"models": {"teacher": {"text": text, "vision": vision}}})


# -- folders that are not named -------------------------------------------------------------------------------------


def test_tokenizer_and_image_processor_are_the_teachers():
    assert changed().processor_dir == Path("/8b")
    assert changed(data={"processor": "/own"}).processor_dir == Path("/own")
    assert changed(targets={"teacher": "/teacher/hf"}).processor_dir == Path("/teacher/hf")
    trained = {"taught": {"init": "models.student", "steps": 1}} | PAIR["jobs"]
    assert changed(jobs=trained, targets={"teacher": "jobs.taught"}).processor_dir == Path("/2b")


def test_without_a_teacher_they_are_the_first_jobs():
    sft = {"base": {"init": "models.student", "steps": 1}}
    assert changed(jobs=sft, targets={}).processor_dir == Path("/2b")
    with pytest.raises(ConfigError, match=r"data\.processor: say which folder holds tokenizer and image processor"):
        _ = changed(models={}, jobs={}, targets={}).processor_dir


def test_with_the_benchmark_they_are_trained_and_data_is_drawn():
    recipe = load_recipe(FROM_NOTHING, ["run.dir=/r"])
    assert (recipe.processor_dir, recipe.data_root) == (Path("/r/processor"), Path("/r/data"))
    own = load_recipe(FROM_NOTHING, ["data.root=/d", "data.processor=/p"])
    assert (own.processor_dir, own.data_root) == (Path("/p"), Path("/d"))


def test_models_that_come_with_the_package_bring_their_processor():
    demo = load_recipe(RECIPES / "demo.yaml")
    folder = demo.model_dir("models.teacher")
    assert demo.processor_dir == demo.origin("models.teacher") == folder == folder_of("package:teacher")
    assert (folder / "tokenizer.json").is_file() and folder.name == "teacher"
    assert demo.origin("jobs.clkd") == folder_of("package:base") and not demo.is_made("models.base")
    assert folder_of("/my/package:x") == Path("/my/package:x") and folder_of(Path("some")) == Path("some")


def test_without_the_benchmark_data_must_be_named():
    with pytest.raises(ConfigError, match=r"data\.root: say which folder holds the data set"):
        _ = changed().data_root
    with pytest.raises(ConfigError, match="benchmark: the recipe has none"):
        _ = changed().required_benchmark
    with pytest.raises(ConfigError, match=r"targets\.teacher: this needs a teacher"):
        _ = changed(models={}, jobs={}, targets={}).teacher


def test_the_benchmark_gives_nobody_else_a_default(tmp_path):
    """With and without it, every other part of a recipe has the same values."""
    plain, drawn = tmp_path / "plain.yaml", tmp_path / "drawn.yaml"
    plain.write_text(yaml.safe_dump(PAIR))
    drawn.write_text(yaml.safe_dump(PAIR | {"benchmark": {}}))
    left, right = (load_recipe(path).model_dump(exclude={"benchmark"}) for path in (plain, drawn))
    assert left == right
