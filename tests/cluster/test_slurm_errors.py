"""What people meet on a cluster: each gives one message that names the fix, where a person looks for it."""

import re
import sys
import time
from pathlib import Path

from tests.cluster.lanes import SMALL_STEP
from tests.cluster.slurm_runs import CHAIN, ROOT, run_status, site, start_script, submit


def refused(done, *texts):
    """Refused with status 2 and one message, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error: ") >= 1 and "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr


def failed(training, *texts):
    """The job has failed at once, and its one message is in its output and in the run's folder."""
    training.wait("FAILED", restarts=0)
    for text in texts:
        assert text in training.state()["error"], training.story()
        assert text in training.output()


def test_wrong_partition(cluster, training):
    done = submit(cluster, training.recipe, *CHAIN, check=False, SBATCH_PARTITION="gpus")
    refused(done, "invalid partition specified: gpus", "partitions: main, urgent. Set SBATCH_PARTITION to one")
    assert "Nothing was submitted" in done.stderr
    assert not cluster.run("squeue", "-h").stdout


def test_more_gpus_than_a_node_has(cluster, training):
    done = submit(cluster, training.recipe, *CHAIN, "--with", "train=--gpus-per-node=9", check=False)
    refused(done, "No node has that many GPUs or cores: ask for less, as in --with STAGE=")
    ids = re.findall(r"^ *(\d+)  ", done.stdout, re.MULTILINE)
    assert f"jobs {' '.join(ids)} are in the queue: scancel them" in done.stderr


def test_the_environment_is_missing_on_a_node(cluster, training):
    venv = cluster.folder / "local" / "venv"  # a disk of each node's own
    cluster.on_node("node1", "ln", "-s", sys.prefix, venv)
    training.start("--nodes=2", *SMALL_STEP, "--nodelist=node[1-2]", CLKD_VENV=str(venv))
    failed(training, f"node2: there is no {venv}/bin/python here. Set CLKD_VENV to an environment that every node sees")


def test_nodes_run_different_code(cluster, training, tmp_path):
    module, changed = ROOT / "pipeline" / "errors.py", tmp_path / "errors.py"
    changed.write_text(module.read_text() + "\n")
    cluster.on_node("node2", "mount", "--bind", changed, module)
    try:
        training.start("--nodes=2", *SMALL_STEP, "--nodelist=node[1-2]")
        failed(training, "the ranks do not run the same code:\n  pipeline: ", "Put project and environment on storage")
        assert re.search(r"pipeline: \w{16} on node1, \w{16} on node2\n", training.state()["error"])
    finally:  # or later tests would fail as well
        cluster.on_node("node2", "umount", module)


def test_ranks_that_the_expert_groups_do_not_divide(cluster, training):
    """Before it waits in the queue, and by the job that was sent by hand."""
    done = submit(cluster, training.recipe, *CHAIN, "--with", "train clkd=--nodes=1", check=False)
    message = (
        "expert_parallel.autoep_size 2 does not divide the 1 ranks. Choose a divisor of both 1 (ranks) and 4 (experts)"
    )
    refused(done, "stage 'train clkd', 1 rank(s): ", message, "--ntasks-per-node=M' sets the ranks")
    training.start("--nodes=1", *SMALL_STEP)
    failed(training, message)


def test_the_run_folder_cannot_be_written(cluster, training):
    folder = training.run
    for machine in (cluster.run, lambda *command: cluster.on_node("node1", *command)):
        machine("mount", "--bind", folder, folder)
        machine("mount", "-o", "remount,bind,ro", folder)
    done = submit(cluster, training.recipe, *CHAIN, check=False)
    reason = "cannot be written from {}: Read-only file system. Set run.dir to a folder on storage that all nodes see"
    refused(done, f"{folder}/slurm: {reason.format('head')}")
    training.start("--nodes=1", *SMALL_STEP, "--nodelist=node1")
    training.wait("FAILED", restarts=0)
    assert reason.format("node1") in training.output()
    cluster.run("umount", folder)
    cluster.on_node("node1", "umount", folder)


def test_a_time_limit_that_the_queue_never_grants(cluster, training):
    cluster.run("scontrol", "update", "PartitionName=main", "MaxTime=10")
    submit(cluster, training.recipe, *CHAIN, "--from", "train clkd", "--with", "train=--time=60")
    deadline = time.monotonic() + 30
    while "PartitionTimeLimit" not in (status := run_status(cluster, training.run).stdout):
        assert time.monotonic() < deadline, status
    cluster.run("scontrol", "update", "PartitionName=main", "MaxTime=INFINITE")
    assert re.search(r"train clkd +\d+ +waiting .*above the partition's; scontrol update JobId=\d+ TimeLimit=", status)


def test_a_job_that_slurm_ended_is_called_so(cluster, training):
    submit(cluster, training.recipe, *CHAIN, "--from", "train clkd")
    job = re.search(r"train clkd +(\d+)", run_status(cluster, training.run).stdout)
    assert job
    cluster.wait_for(job[1], lambda found: found["JobState"] == "RUNNING")
    deadline = time.monotonic() + 60
    while not (training.run / "slurm" / "train-clkd.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.run("scancel", job[1])
    cluster.wait(job[1])
    status = run_status(cluster, training.run).stdout
    assert re.search(r"^train clkd +\d+ +stopped", status, re.MULTILINE), status
    # Slurm's word depends on the moment; the last one where the ranks took longer to stop than it waits (KillWait).
    said = (
        "Slurm ended the job (CANCELLED: scancel)",
        "Slurm ended the job (COMPLETING: scancel",
        "not in the queue any more: cancelled or timed out",
    )
    assert any(text in status for text in said), status


def test_a_failing_stage_stops_the_chain_and_says_why(cluster, training):
    done = submit(cluster, training.recipe, *CHAIN, "--from", "train clkd", "data.train_split=nosuch")
    jobs = dict(re.findall(r"^ *(\d+)  (\w[\w ]*\w)(?:  after .*)?$", done.stdout, re.MULTILINE))
    states = {name: cluster.wait(job)["JobState"] for job, name in jobs.items()}
    assert states == {"train clkd": "FAILED", "evaluate": "CANCELLED", "export": "CANCELLED", "report": "CANCELLED"}
    status = run_status(cluster, training.run, check=False)
    assert status.returncode == 1
    assert re.search(r"^train clkd +\d+ +failed", status.stdout, re.MULTILINE), status.stdout
    assert re.search(r"last error, .*, train clkd:\n.*nosuch", status.stdout), status.stdout
    log = re.search(r"logs: (\S+)", status.stdout)
    assert log and (Path(log[1]) / "rank-0.log").is_file()


def test_the_same_run_is_not_submitted_twice(cluster, training):
    submit(cluster, training.recipe, *CHAIN, "--from", "report", "--with", "report=--hold")
    done = submit(cluster, training.recipe, *CHAIN, check=False)
    refused(done, f"{training.run}: submitted already, and in the queue: ", "(report, PENDING)", "scancel it first")


def test_modules_without_a_module_command(cluster, training):
    job = start_script(
        cluster, "hardness", training.recipe, f"--output={training.run}/hardness.out", CLKD_MODULES="cuda/12.8",
        CLKD_SETUP="",
    )  # fmt: skip
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert (
        "but there is no `module` command. Define it in the file that CLKD_SETUP names"
        in (training.run / "hardness.out").read_text()
    )
    assert "CLKD_MODULES" not in site(cluster)
