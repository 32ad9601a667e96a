"""The shell that job scripts share, run without a Slurm: which code, which environment, which compiled operators."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import ROOT

SHOWN = ("PWD", "PYTHONPATH", "PYTHONSAFEPATH", "CLKD_VENV")


def bash(script: str, cwd: Path, **variables: str) -> list[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "CLKD_LOCAL": str(cwd / "local"), **variables}
    done = subprocess.run(["bash", "-c", script], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def settings(home: Path, cwd: Path, **variables: str) -> list[str]:
    """What a rank has, whose script reads common.sh after the job's script did."""
    shown = "".join(f'echo "${{{name}:-}}"\n' for name in SHOWN)
    source = f'source "{home}/slurm/common.sh"\n'
    return bash(source + source + shown, cwd, CLKD_HOME=str(home), **variables)


def test_a_job_runs_where_it_was_submitted_with_the_code_of_its_home(tmp_path):
    assert settings(ROOT, tmp_path) == [str(tmp_path), str(ROOT), "1", f"{ROOT}/.venv"]
    found = settings(ROOT, tmp_path, PYTHONPATH="/site", CLKD_VENV="/venv")
    assert found == [str(tmp_path), f"{ROOT}:/site", "1", "/venv"]


def test_an_installed_package_is_found_in_its_environment(tmp_path):
    """Its home is the package itself, which holds no `pipeline`."""
    shutil.copytree(ROOT / "slurm", tmp_path / "site" / "pipeline" / "slurm")
    found = settings(tmp_path / "site" / "pipeline", tmp_path, CLKD_VENV=sys.prefix)
    assert found == [str(tmp_path), "", "1", sys.prefix]


def rank(tmp_path: Path, operators: Path, **variables: str) -> Path:
    """What rank 0's command finds as TORCH_EXTENSIONS_DIR."""
    logs = tmp_path / "logs"
    logs.mkdir(exist_ok=True)
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "RUN_LOGS": str(logs)}
    site = {"CLKD_HOME": str(ROOT), "CLKD_VENV": sys.prefix, "OPERATORS": str(operators)}
    show = "import os; print(os.environ['TORCH_EXTENSIONS_DIR'])"
    (line,) = bash(f'bash {ROOT}/slurm/rank.sh python -c "{show}"', tmp_path, **slurm, **site, **variables)
    assert (logs / "rank-0.status").read_text() == "0\n"
    return Path(line)


def test_compiled_operators_come_along_to_the_nodes_disk(tmp_path):
    """As they are: a file of another time would be compiled again."""
    compiled = tmp_path / "cache" / "torch-1-abc" / "op" / "op.so"
    compiled.parent.mkdir(parents=True)
    compiled.write_text("machine code")
    os.utime(compiled, (10**9, 10**9))
    local = rank(tmp_path, compiled.parents[1])
    assert local.parent.is_relative_to(tmp_path / "local") and local.name == "torch-1-abc"
    assert (local / "op" / "op.so").read_text() == "machine code"
    assert (local / "op" / "op.so").stat().st_mtime == 10**9
    # Another environment on the node has its own, here from where the site says.
    other = rank(tmp_path, tmp_path / "cache" / "torch-2-def", CLKD_OPS=str(compiled.parents[1]))
    assert other == local.with_name("torch-2-def") and (other / "op" / "op.so").is_file()
    # Nothing compiled yet: the first rank of the node does it there.
    assert not rank(tmp_path, tmp_path / "cache" / "torch-3-ghi").exists()
