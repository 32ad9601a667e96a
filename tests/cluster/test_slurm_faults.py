"""Faults on a running Slurm: each ends in the undisturbed run's weights, bit for bit where the ranks are as many."""

import contextlib
import time

import pytest

from tests.cluster.slurm_cluster import SMALL_BYTES
from tests.cluster.slurm_runs import EVERY, SGD, SMALL_STEP, STEPS, copy_run, same_stores, start_script

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
MIDDLE = EVERY + EVERY // 2
"""Behind a checkpoint, and steps away from the next."""
RANK, WORKER = "^[^ ]*python -m pipeline train", "^[^ ]*python -m pipeline teacher"


def test_the_signal_before_the_time_limit(cluster, training, undisturbed):
    """Slurm looks at time limits twice a minute: the ranks stand still until then."""
    job = training.start()
    training.wait_for_step(MIDDLE)
    for node in ("node1", "node2"):
        cluster.on_node(node, "pkill", "-STOP", "-f", RANK)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=4")  # --signal=B:USR1@300 is due
    deadline = time.monotonic() + 90
    while "USR1: the ranks write a checkpoint and stop" not in training.output():
        assert time.monotonic() < deadline, training.story()
        time.sleep(0.2)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    for node in ("node1", "node2"):
        cluster.on_node(node, "pkill", "-CONT", "-f", RANK)
    training.wait(restarts=1)
    training.equals(undisturbed)
    assert training.first_steps()[1] >= MIDDLE


def test_requeued_by_hand(cluster, training, undisturbed):
    job = training.start()
    training.wait_for_step(MIDDLE)
    cluster.run("scontrol", "requeue", job)
    training.wait(restarts=1)
    training.equals(undisturbed)
    assert training.first_steps()[1] >= MIDDLE


def test_preempted_by_an_urgent_job(cluster, training, undisturbed):
    training.start()
    training.wait_for_step(MIDDLE)
    cluster.run("sbatch", "-N4", "--exclusive", "--partition=urgent", "-o/dev/null", "--wrap", "sleep 3")
    training.wait(restarts=1)
    training.equals(undisturbed)
    assert training.first_steps()[1] >= MIDDLE


def test_a_rank_is_killed(cluster, training, undisturbed):
    training.start()
    training.wait_for_step(MIDDLE)
    cluster.on_node("node2", "pkill", "-9", "-f", RANK)
    training.wait(restarts=1)
    training.equals(undisturbed)
    assert training.first_steps() == [0, EVERY]
    assert "rank 1 killed" in training.output()


def test_a_node_loses_power(cluster, training, undisturbed):
    """The node of rank 0 and of the job's script; the job goes to others."""
    training.start()
    training.wait_for_step(MIDDLE)
    cluster.power_off("node1")
    found = training.wait(restarts=1)
    cluster.power_on("node1")
    assert "node1" not in cluster.run("scontrol", "show", "hostnames", found["NodeList"]).stdout.split()
    training.equals(undisturbed)


def test_a_cable_is_cut_for_good(cluster, training, undisturbed):
    """Rank 0 waits for its collective until the stated time, and no longer; the job goes to another node."""
    training.start(CLKD_COLLECTIVE_TIMEOUT_S="10")
    training.wait_for_step(MIDDLE)
    cluster.unplug("node2")
    training.wait()
    cluster.power_off("node2")  # what its processes wait for does not come back
    cluster.power_on("node2")
    training.equals(undisturbed)
    assert "ranks wait 10 s for each other, CLKD_COLLECTIVE_TIMEOUT_S" in training.logs(0)[0]


def test_a_cable_is_cut_for_half_a_minute(cluster, training, undisturbed):
    with patience(cluster, 120):
        training.start()
        training.wait_for_step(MIDDLE)
        cluster.unplug("node2")
        time.sleep(30)
        assert training.steps()[-1] < STEPS
        cluster.plug_in("node2")
        training.wait(restarts=0)
    training.equals(undisturbed)


@contextlib.contextmanager
def patience(cluster, seconds):
    """Slurm gives up a silent node only after this time, as sites have it."""
    path = cluster.folder / "slurm.conf"
    saved = path.read_text()
    path.write_text(saved.replace("SlurmdTimeout=10", f"SlurmdTimeout={seconds}"))
    cluster.run("scontrol", "reconfigure")
    yield
    path.write_text(saved)
    cluster.run("scontrol", "reconfigure")


def test_the_checkpoints_folder_turns_read_only(cluster, training, undisturbed):
    folder = training.run / "jobs" / "clkd" / "checkpoints"
    training.start()
    training.wait_for_step(MIDDLE)
    cluster.on_node("node1", "mount", "--bind", folder, folder)
    cluster.on_node("node1", "mount", "-o", "remount,bind,ro", folder)
    training.wait("FAILED", restarts=0)
    cluster.on_node("node1", "umount", folder)
    assert "Read-only file system" in training.state()["error"]
    goes_on(training, undisturbed)


def test_the_disk_is_full(cluster, training, undisturbed):
    disk = cluster.folder / "small"
    cluster.run("mkdir", disk / "checkpoints")
    (training.run / "jobs" / "clkd").mkdir()
    (training.run / "jobs" / "clkd" / "checkpoints").symlink_to(disk / "checkpoints")
    training.start()
    training.wait_for_step(MIDDLE)
    cluster.run("dd", "if=/dev/zero", f"of={disk}/filler", "bs=1M", f"count={SMALL_BYTES >> 20}", check=False)
    training.wait("FAILED", restarts=0)
    cluster.run("rm", disk / "filler")
    assert "No space left" in training.state()["error"]
    goes_on(training, undisturbed)


def goes_on(training, undisturbed):
    """After a refusal: the last checkpoint is whole, and the job goes on from it when it is sent again."""
    training.start()
    training.wait()
    training.equals(undisturbed)
    assert training.first_steps() == [0, EVERY]


def test_a_second_job_of_the_same_run_is_refused(cluster, training, undisturbed):
    first = training.start()
    training.wait_for_step(2)
    cluster.run("scontrol", "suspend", first)
    second = training.start("--nodes=2", *SMALL_STEP, "--nodelist=node[3-4]")
    training.wait("FAILED", restarts=0)
    assert "another run of this job is going on (process " in training.output()
    assert f"on node1, Slurm job {first})" in training.output()
    cluster.run("scontrol", "resume", first)
    training.job = first
    training.wait(restarts=0)
    training.equals(undisturbed)
    assert second != first


def test_fewer_nodes_after_the_requeue(cluster, training, undisturbed_sgd):
    """Two nodes of two ranks, then one: Slurm wants as many as before until somebody says otherwise."""
    job = training.start("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", words=SGD)
    training.wait_for_step(MIDDLE)
    cluster.run("scontrol", "update", "NodeName=node[2-4]", "State=drain", "Reason=test")
    cluster.on_node("node2", "pkill", "-9", "-f", RANK)
    cluster.wait_for(job, lambda found: found["JobState"] == "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=2", "NumCPUs=2")
    found = training.wait(restarts=1)
    cluster.run("scontrol", "update", "NodeName=node[2-4]", "State=resume")
    assert found["NodeList"] == "node1"
    assert training.first_steps() == [0, EVERY]
    training.close_to(undisturbed_sgd)


def test_workers_of_the_teacher_are_killed(cluster, chain_run, tmp_path):
    """At start, with the first lease, with the first shard; shards of one sample, so that there is time for it."""
    whole = chain_run.training.run / "store"
    run = copy_run(cluster, whole.parent, tmp_path / "run", shard_samples=1)
    store = run.run / "store"
    for file in store.iterdir():
        file.unlink()
    options = ("--array=0-1", "--cpus-per-task=4", "--gpus-per-node=4", f"--output={tmp_path}/teacher-%a.out")
    job = start_script(cluster, "teacher_targets", run.recipe, *options)
    deadline, killed = time.monotonic() + 150, 0
    while killed < 3 and time.monotonic() < deadline:
        phase = ("", "*.lease", "shard-*.json")[killed]
        if not phase or list(store.glob(phase)):
            done = cluster.on_node("node1", "pkill", "-9", "-o", "-f", WORKER, check=False)
            killed += done.returncode == 0
        time.sleep(0.02)
    states = [cluster.wait(f"{job}_{task}")["JobState"] for task in (0, 1)]
    assert states == ["COMPLETED", "COMPLETED"], [path.read_text() for path in tmp_path.glob("*.out")]
    assert killed == 3
    assert same_stores(store, whole) > 30
