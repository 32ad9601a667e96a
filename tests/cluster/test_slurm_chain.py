"""A recipe's whole chain on a real Slurm: two nodes, experts spread over them, every stage a job."""

import json
import re

from tests.cluster.slurm_runs import CHAIN, STEPS, run_status, start_script, submit
from tests.helpers.training import train

STAGES = [
    "scenes", "tokenizer", "model small", "train teacher", "model moe", "teacher", "hardness", "train clkd",
    "evaluate", "export", "report",
]  # fmt: skip


def sent(cluster, chain_run, *arguments):
    """Scripts that would be submitted, and the whole commands."""
    done = submit(cluster, chain_run.training.recipe, *CHAIN, "--dry-run", *arguments).stdout
    return re.findall(r"--job-name=run:(\S+)", done), done


def test_the_whole_chain_on_two_nodes(cluster, chain_run):
    run = chain_run.training.run
    assert chain_run.last["JobState"] == "COMPLETED", [p.read_text() for p in run.glob("slurm/*.out")]
    assert sorted(chain_run.jobs) == sorted(STAGES)
    status = run_status(cluster, run).stdout
    for stage in STAGES:
        assert re.search(rf"^{stage} +\d+ +done", status, re.MULTILINE), status
    assert f"step {STEPS}/{STEPS}" in status
    assert chain_run.training.steps() == list(range(1, STEPS + 1))
    running = r"^train clkd +\d+ +running +step \d+/60, loss \d.*, on node.*to its limit$"
    assert re.search(running, chain_run.status, re.MULTILINE), chain_run.status
    assert re.search(r"^report +\d+ +waiting +Dependency$", chain_run.status, re.MULTILINE), chain_run.status
    assert (run / "report.html").is_file()
    assert list((run / "exported").glob("*.safetensors"))
    recorded = json.loads(next((run / "slurm" / "train-clkd").glob("*/environment.json")).read_text())
    assert recorded["packages"]["deepspeed"] and len(recorded["code"]["commit"]) == 40
    assert recorded["variables"]["SLURM_JOB_NUM_NODES"] == "2"
    assert {p.name for p in (run / "slurm" / "train-clkd").glob("*/rank-*.log")} == {"rank-0.log", "rank-1.log"}


def test_two_nodes_equal_one_machine_bit_for_bit(training, undisturbed):
    (training.run / "recipe.yaml").write_text(training.recipe.read_text())
    train(training.run)  # torchrun, two ranks on this machine
    training.equals(undisturbed)


def test_only_what_is_missing_is_submitted(cluster, chain_run):
    assert submit(cluster, chain_run.training.recipe, *CHAIN).stdout.endswith("nothing is missing\n")
    stages, commands = sent(cluster, chain_run, "jobs.clkd.optimizer.lr=0.02")
    assert stages == ["train-clkd", "evaluate", "export", "report"]
    assert "afterok:<train clkd> --kill-on-invalid-dep=yes" in commands.replace("'", "")
    state = chain_run.training.run / "slurm" / "teacher-1.json"
    saved = state.read_text()
    state.write_text(saved.replace('"done"', '"failed"'))
    stages, commands = sent(cluster, chain_run)
    state.write_text(saved)
    assert stages == ["teacher"] and "--array=1 " in commands and "WORKERS=2 " in commands
    assert sent(cluster, chain_run, "--from", "evaluate")[0] == ["evaluate", "export", "report"]


def test_modules_and_containers_by_variables(cluster, training, tmp_path):
    """A site's file defines `module`; a command stands for the container."""
    setup = tmp_path / "setup.sh"
    setup.write_text('module() { export CLKD_LOADED="$*"; }\n')
    site = {"CLKD_SETUP": str(setup), "CLKD_MODULES": "cuda/12.8 gcc/13", "CLKD_INSIDE": "env CLKD_IMAGE=student.sif"}
    job = start_script(cluster, "hardness", training.recipe, f"--output={tmp_path}/hardness.out", **site)
    assert cluster.wait(job)["JobState"] == "COMPLETED", (tmp_path / "hardness.out").read_text()
    recorded = json.loads(next((training.run / "slurm" / "hardness").glob("*/environment.json")).read_text())
    assert recorded["variables"]["CLKD_LOADED"] == "load cuda/12.8 gcc/13"
    assert recorded["variables"]["CLKD_IMAGE"] == "student.sif"
    assert recorded["variables"]["HF_HOME"].startswith(str(cluster.folder / "local"))
