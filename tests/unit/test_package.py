"""The package as people install it: what is in the wheel, and that it works away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import pipeline
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
BUILT_FROM = (
    "pipeline", "ds_configs", "slurm", "pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "README.md",
    "LICENSE", "train.py",
)  # fmt: skip
BESIDE = ("ds_configs", "slurm")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a command prints; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CLKD_"))}
    done = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source distribution, which is built from what a clone has. No network."""
    folder = tmp_path_factory.mktemp("build")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')", cwd=folder)
    with tarfile.open(*(folder / "dist").glob("clkd-*.tar.gz")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
    (built,) = folder.glob("clkd-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder that the wheel is installed in, away from the checkout."""
    folder = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--no-compile", "--target", folder)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder.parent)
    return folder


def test_the_wheel_holds_the_package_and_the_folders_beside_it_and_nothing_else(wheel):
    def files(folder: str) -> set[str]:
        found = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        return {name for name in found if "__pycache__" not in name}

    expected = files("pipeline") | {f"pipeline/{name}" for folder in BESIDE for name in files(folder)}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {Path(name).suffix for name in expected} >= {
        ".py",
        ".typed",
        ".jinja",
        ".j2",
        ".yaml",
        ".json",
        ".sbatch",
        ".sh",
    }


def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        about = message_from_bytes(archive.read(name))
        assert f"{Path(name).parent}/licenses/LICENSE" in archive.namelist()
        assert "clkd = pipeline.cli:entry" in archive.read(f"{Path(name).parent}/entry_points.txt").decode()
    needs = re.findall(r"^([\w.-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    always = [text for text in about.get_all("Requires-Dist") if "extra ==" not in text]
    assert about["Version"] == pipeline.__version__
    assert sorted(re.match(r"[\w.-]+", text)[0] for text in always) == sorted(needs)
    assert about.get_all("Provides-Extra") == ["s3", "dev"]
    assert about.get_payload() == (ROOT / "README.md").read_text()


def test_commands_away_from_the_checkout(installed, tmp_path):
    site = {"PYTHONPATH": str(installed)}
    assert run(sys.executable, "-m", "pipeline", "--help", cwd=tmp_path, **site).startswith("usage: clkd STAGE RECIPE")
    assert run(installed / "bin" / "clkd", "--version", cwd=tmp_path, **site) == f"clkd {pipeline.__version__}\n"
    script = (
        "import pipeline; from pathlib import Path; from pipeline.files import home, shipped\n"
        "print(pipeline.__file__, home(), shipped(Path('demo'), 'recipes'), shipped(Path('dense'), 'ds_configs'))"
    )
    package = installed / "pipeline"
    places = ("__init__.py", "", "recipes/demo.yaml", "ds_configs/dense.json")
    found = run(sys.executable, "-c", script, cwd=tmp_path, **site).split()
    assert found == [str(package / place) for place in places]


def test_jobs_that_are_submitted_away_from_the_checkout(installed, tmp_path):
    """Scripts, recipe and environment are named so that a node finds them."""
    options = ("--dry-run", "run.dir=run", "--deepspeed_config", "cpu_smoke", "--with", "train=--ntasks-per-node=2")
    command = (sys.executable, "-m", "pipeline", "submit", "demo", *options)
    lines = run(*command, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert len(lines) > 10
    for line in lines:
        assert f"CLKD_HOME={installed / 'pipeline'} CLKD_VENV={sys.prefix} " in line
        assert " --output=run/slurm/" in line
        script, recipe = re.search(r" (\S+\.sbatch) (\S+\.yaml) ", line).groups()
        assert Path(script).is_file() and Path(recipe).is_file() and str(tmp_path) not in recipe


def test_compiled_loops_are_kept_where_the_installation_cannot_be_written(installed, tmp_path):
    """numba keeps them beside the code, else in the user's cache; a second process finds them."""
    unwritable = shutil.copytree(installed, tmp_path / "site")
    (
        unwritable / "pipeline" / "targets" / "__pycache__"
    ).touch()  # so that no folder can be made there, not by root either
    script = (
        "from pipeline.targets.packing import _exp\n"
        "assert abs(float(_exp(1.0)) - 0.36787944) < 1e-6\n"
        "print(sum(_exp.stats.cache_hits.values()), sum(_exp.stats.cache_misses.values()))"
    )

    def hits_and_misses(site: Path) -> str:
        variables = {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        return run(sys.executable, "-c", script, cwd=tmp_path, **variables)

    assert [hits_and_misses(unwritable) for _ in range(2)] == ["0 1\n", "1 0\n"]
    assert list((tmp_path / "cache").rglob("packing._exp-*.nbi"))
    hits_and_misses(installed)
    assert list((installed / "pipeline" / "targets" / "__pycache__").glob("packing._exp-*.nbi"))
