"""The pages as a reader finds them: links lead somewhere, named files exist, the first page stays short."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.documents import PAGES, blocks, headings, links, spans
from tests.helpers.paths import LAYERS, ROOT

WORDS = 1800
"""Most words of README.md."""
ELSEWHERE = {"srt/models/qwen3_moe.py", "qwen3_vl_moe.py", "qwen3_moe.py"}
"""Files of serving engines that docs/SERVING.md speaks of."""
FILE = re.compile(r"[\w.*/-]+\.(?:py|sh|sbatch|json|yaml|md|txt|toml|j2)")
FOLDER = re.compile(r"(?:pipeline|tools|tests|docs|slurm|ds_configs)(?:/[\w.]+)*/?")


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= WORDS


@pytest.mark.parametrize("link", list(links()), ids=str)
def test_a_link_leads_to_a_file_and_a_heading(link):
    path, _, anchor = link.text.partition("#")
    target = (ROOT / link.page).parent / path if path else ROOT / link.page
    assert target.exists(), f"{link}: {link.text}"
    if anchor:
        assert anchor in headings(target), f"{link}: no heading #{anchor} in {path or link.page}"


def tracked() -> set[str]:
    """Files of the project."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    return set(listed.stdout.split()) if listed.returncode == 0 else {str(p.relative_to(ROOT)) for p in ROOT.rglob("*")}


def test_files_and_folders_that_pages_name_exist():
    """A path from the top or below pipeline/; a bare file name is that of some file."""
    files = tracked()
    names = {Path(file).name for file in files}
    missing = []
    for span in spans():
        for word in span.text.split():
            if FILE.fullmatch(word) and "*" not in word and word not in ELSEWHERE:
                known = {word, f"pipeline/{word}"} & files or ("/" not in word and word in names)
                if not known and not made_by_a_run(word):
                    missing.append(f"{span}: {word}")
            elif "/" in word and FOLDER.fullmatch(word) and not (ROOT / word).exists():
                missing.append(f"{span}: {word}")
    assert not missing, "\n".join(missing)


def test_the_table_of_folders_is_the_order_of_the_layers():
    """CONTRIBUTING says where things live: every folder of the package, each below those that it imports from."""
    rows = re.findall(r"^\| `(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert rows == [word for word in LAYERS if (ROOT / "pipeline" / word).is_dir()]


def made_by_a_run(name: str) -> bool:
    """Files that a run, a person or another program writes."""
    return name in (
        "mine.yaml", "RECIPE.yaml", "OTHER.yaml", "config.json", "results.json", "environment.json", "slices.json",
        "jobs.json", "stages.json", "upcycle.json", "preprocessor_config.json", "processor_config.json", "README.md",
    ) or name.startswith("runs/")  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lists_begin_after_an_empty_line(page):
    """GitHub shows them as lists either way, the site only then."""
    lines = page.read_text().splitlines()
    for number, (before, line) in enumerate(itertools.pairwise(lines), 2):
        if re.match(r"(-|\d+\.) ", line) and not re.match(r"(-|\d+\.) |  |$", before):
            pytest.fail(f"{page.name}:{number}: a list without an empty line before it")


def test_every_page_is_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f": {'index.md' if page.name == 'README.md' else page.name}\n" in menu, page.name


def test_blocks_are_of_known_languages():
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) <= {"sh", "yaml", "json", "python"}
    assert len(list(blocks("sh"))) > 10
