"""docs/CONFIG.md says what the files of pipeline/recipe/ say."""

import ast
import re
from typing import Annotated

import pytest
from pydantic import Field

from pipeline.recipe import Fraction, Positive, UpcycleConfig
from tests.helpers.paths import ROOT
from tools.docs.config_reference import places, render, type_text


def declared_fields() -> dict[str, set[str]]:
    """Section -> keys, read from the files' syntax trees: independent of pydantic and of the tool."""
    files = sorted((ROOT / "pipeline" / "recipe").glob("*.py"))
    classes = [n for file in files for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ClassDef)]
    return {
        c.name: {str(n.target.id) for n in c.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        for c in classes
        if any(isinstance(base, ast.Name) and base.id == "Section" for base in c.bases)
    }


def test_the_reference_on_disk_is_up_to_date():
    stored = (ROOT / "docs" / "CONFIG.md").read_text()
    assert stored == render(), "run: python -m tools.docs.config_reference > docs/CONFIG.md"


def test_every_section_and_key_is_listed():
    chapters = dict(re.findall(r"^##+ (.+?)\n(.*?)(?=^##|\Z)", render(), re.MULTILINE | re.DOTALL))
    declared = declared_fields()
    found = {}
    for place in places():
        chapter = chapters[f"`{place.path}`" if place.path else "The recipe"]
        found[place.section.__name__] = set(re.findall(r"^\| `(\w+)` \|", chapter, re.MULTILINE))
    assert len(declared) > 15
    assert found == declared


def test_sections_are_addressed_as_a_recipe_does():
    paths = {place.path for place in places()}
    assert {
        "",
        "run",
        "models.NAME.upcycle",
        "jobs.NAME.distill",
        "jobs.NAME.moe.native",
        "evaluation.rows[i]",
    } <= paths


def test_parts_are_chapters_in_the_recipes_order():
    chapters = re.findall(r"^## `(\w+)(?:\.NAME)?`$", render(), re.MULTILINE)
    assert chapters == ["run", "data", "benchmark", "models", "targets", "jobs", "evaluation", "cluster"]
    inside = re.findall(r"^### `([^`]+)`$", render(), re.MULTILINE)
    assert "jobs.NAME.optimizer" in inside and "benchmark.models.NAME.text" in inside


def test_a_row_has_type_default_and_meaning():
    text = render()
    assert "| `dir` | path | **required** | Folder that receives every file of the run. |" in text
    assert "| `top_k` | integer ≥ 1 and ≤ 256 | `32` | Teacher entries kept per answer token; " in text
    assert "| `limit` | integer ≥ 1, or null | `null` | Samples per task and slice," in text
    assert "| `format` | `coda_lm`, `chat` | `coda_lm` |" in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Fraction, "number ≥ 0.0 and ≤ 1.0"),
        (Positive | None, "integer ≥ 1, or null"),
        (Annotated[float, Field(gt=0.0)], "number > 0.0"),
        (tuple[float, float], "list of 2 x number"),
        (tuple[int, ...], "list of integer"),
        (dict[str, UpcycleConfig], "mapping of names to section"),
    ],
)
def test_types_in_plain_words(kind, words):
    assert type_text(kind) == words
