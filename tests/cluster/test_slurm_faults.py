"""Faults on a running Slurm: each ends in the undisturbed run's weights, bit for bit where the ranks are as many.

Most scenarios befall one training twice, and two scenarios run at a time, each on nodes of its own.
"""

import contextlib
import json
import threading
import time

import pytest

from tests.cluster.lanes import SMALL_STEP, Lanes
from tests.cluster.slurm_cluster import SMALL_BYTES
from tests.cluster.slurm_runs import EVERY, ROOT, SGD, STEPS, copy_run, same_stores, start_script

FIRST, SECOND = EVERY + EVERY // 2, 3 * EVERY + EVERY // 2
"""Steps at which something happens: behind a checkpoint, and steps away from the next."""
RANK, WORKER = "^[^ ]*python -m pipeline train", "^[^ ]*python -m pipeline teacher"


class Runs:
    """The chain's run, trainings that start where its student's did, and undisturbed ones to compare with."""

    def __init__(self, cluster, chain_run, folder):
        self.cluster, self.folder, self.undisturbed = cluster, folder, chain_run.training
        self._sgd, self._once = None, threading.Lock()

    def training(self, lane, name):
        """A run of that name in which everything before the student's training is made."""
        training = copy_run(self.cluster, self.undisturbed.run, self.folder / name / "run")
        training.lane = lane
        return training

    def sgd(self, lane):
        """Undisturbed with SGD, for comparison with other numbers of ranks; the first scenario to ask trains it."""
        with self._once:
            if self._sgd is None:
                training = self.training(lane, "undisturbed-sgd")
                training.start(words=SGD)
                training.wait(restarts=0)
                self._sgd = training
            return self._sgd


def signalled_before_the_time_limit_then_requeued_by_hand(lane, runs):
    """Slurm looks at time limits twice a minute: the ranks stand still until then."""
    training = runs.training(lane, "signalled")
    cluster, job = training.cluster, training.start()
    training.wait_for_step(FIRST)
    nodes = training.nodes()
    for node in nodes:
        cluster.on_node(node, "pkill", "-STOP", "-f", RANK)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=4")  # --signal=B:USR1@300 is due
    deadline = time.monotonic() + 90
    while "USR1: the ranks write a checkpoint and stop" not in training.output():
        assert time.monotonic() < deadline, training.story()
        time.sleep(0.2)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    for node in nodes:
        cluster.on_node(node, "pkill", "-CONT", "-f", RANK)
    training.wait_for_step(SECOND)
    cluster.run("scontrol", "requeue", job)
    training.wait(restarts=2)
    training.equals(runs.undisturbed)
    _, second, third = training.first_steps()
    assert second >= FIRST and third >= SECOND


def preempted_by_an_urgent_job_then_a_rank_is_killed(lane, runs):
    training = runs.training(lane, "preempted")
    cluster = training.cluster
    training.start()
    training.wait_for_step(FIRST)
    everywhere = (f"-N{len(lane.nodes)}", f"--nodelist={','.join(lane.nodes)}", "--exclusive", "--partition=urgent")
    cluster.run("sbatch", *everywhere, "-o/dev/null", "--wrap", "sleep 3")
    training.wait_for_step(SECOND)
    cluster.on_node(training.nodes()[1], "pkill", "-9", "-f", RANK)
    training.wait(restarts=2)
    training.equals(runs.undisturbed)
    first, second, third = training.first_steps()
    assert first == 0 and second >= FIRST and third == 3 * EVERY
    assert "rank 1 killed" in training.output()


def a_node_loses_power_then_a_cable_is_cut_for_good(lane, runs):
    """The node of rank 0 and of the job's script: the job goes to others. Without the cable, rank 0 waits for its
    collective until the stated time, and no longer; again the job goes to another node."""
    training = runs.training(lane, "power")
    cluster = training.cluster
    training.start(CLKD_COLLECTIVE_TIMEOUT_S="10")
    training.wait_for_step(FIRST)
    dead = training.nodes()[0]
    cluster.power_off(dead)
    training.wait_for_step(SECOND)
    nodes = training.nodes()
    assert dead not in nodes
    cluster.power_on(dead)
    cluster.wait_for_nodes(dead)
    cluster.unplug(nodes[1])
    training.wait()
    cluster.power_off(nodes[1])  # what its processes wait for does not come back
    cluster.power_on(nodes[1])
    training.equals(runs.undisturbed)
    assert "ranks wait 10 s for each other, CLKD_COLLECTIVE_TIMEOUT_S" in training.logs(0)[-2]


def the_checkpoints_turn_read_only_then_the_disk_is_full(lane, runs):
    """Both are refusals: the last checkpoint is whole, and the job goes on from it when it is sent again."""
    training = runs.training(lane, "disk")
    cluster, disk = training.cluster, training.cluster.folder / "small"
    cluster.run("mkdir", disk / "checkpoints")
    (training.run / "jobs" / "clkd").mkdir()
    (training.run / "jobs" / "clkd" / "checkpoints").symlink_to(disk / "checkpoints")
    training.start()
    training.wait_for_step(FIRST)
    node = training.nodes()[0]
    cluster.on_node(node, "mount", "--bind", disk / "checkpoints", disk / "checkpoints")
    cluster.on_node(node, "mount", "-o", "remount,bind,ro", disk / "checkpoints")
    training.wait("FAILED", restarts=0)
    cluster.on_node(node, "umount", disk / "checkpoints")
    assert "Read-only file system" in training.state()["error"]
    training.start()
    training.wait_for_step(SECOND)
    cluster.run("dd", "if=/dev/zero", f"of={disk}/filler", "bs=1M", f"count={SMALL_BYTES >> 20}", check=False)
    training.wait("FAILED", restarts=0)
    cluster.run("rm", disk / "filler")
    assert "No space left" in training.state()["error"]
    training.start()
    training.wait()
    training.equals(runs.undisturbed)
    assert training.first_steps() == [0, EVERY, 3 * EVERY]


def a_second_job_of_the_same_run_is_refused(lane, runs):
    training = runs.training(lane, "twice")
    cluster, first = training.cluster, training.start()
    training.wait_for_step(2)
    node = training.nodes()[0]
    cluster.run("scontrol", "suspend", first)
    second = training.start()
    training.wait("FAILED", restarts=0)
    assert "another run of this job is going on (process " in training.output()
    assert f"on {node}, Slurm job {first})" in training.output()
    cluster.run("scontrol", "resume", first)
    training.job = first
    training.wait(restarts=0)
    training.equals(runs.undisturbed)
    assert second != first


def fewer_nodes_after_the_requeue(lane, runs):
    """Two nodes of two ranks, then one: Slurm wants as many as before until somebody says otherwise."""
    undisturbed, training = runs.sgd(lane), runs.training(lane, "fewer")
    cluster = training.cluster
    job = training.start("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", words=SGD)
    training.wait_for_step(FIRST)
    first, second = training.nodes()
    drained = ",".join(node for node in lane.nodes if node != first)
    cluster.run("scontrol", "update", f"NodeName={drained}", "State=drain", "Reason=test")
    cluster.on_node(second, "pkill", "-9", "-f", RANK)
    cluster.wait_for(job, lambda found: found["JobState"] == "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=2", "NumCPUs=2")
    found = training.wait(restarts=1)
    assert found["NodeList"] == first
    assert training.first_steps() == [0, EVERY]
    training.close_to(undisturbed)


def experts_shared_between_nodes(lane, runs, nodes=2):
    """Two ranks a node, the experts of a layer on four ranks: expert groups reach over two nodes."""
    undisturbed, training = runs.sgd(lane), runs.training(lane, f"experts-{nodes}")
    ds_json = json.loads((ROOT / "ds_configs" / "cpu_smoke.json").read_text())
    ds_json["expert_parallel"]["autoep_size"] = 4
    path = training.recipe.parent / "ep4.json"
    path.write_text(json.dumps(ds_json))
    options = (f"--nodes={nodes}", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
    training.start(*options, words=(*SGD, f"jobs.clkd.batch.micro_size={4 // nodes}"), DS_CONFIG=str(path))
    training.wait(restarts=0)
    training.close_to(undisturbed)


def workers_of_the_teacher_are_killed(lane, runs):
    """At start, with the first lease, with the first shard; shards of one sample, so that there is time for it."""
    whole = runs.undisturbed.run / "store"
    training = copy_run(runs.cluster, whole.parent, runs.folder / "teacher" / "run", shard_samples=1)
    store, node = training.run / "store", lane.nodes[0]
    for file in store.iterdir():
        file.unlink()
    logs = f"--output={training.recipe.parent}/teacher-%a.out"
    options = lane.options("--array=0-1", "--cpus-per-task=4", "--gpus-per-node=4", f"--nodelist={node}", logs)
    job = start_script(runs.cluster, "teacher_targets", training.recipe, *options)
    deadline, killed = time.monotonic() + 150, 0
    while killed < 3 and time.monotonic() < deadline:
        phase = ("", "*.lease", "shard-*.json")[killed]
        if not phase or list(store.glob(phase)):
            done = runs.cluster.on_node(node, "pkill", "-9", "-o", "-f", WORKER, check=False)
            killed += done.returncode == 0
        time.sleep(0.02)
    states = [runs.cluster.wait(f"{job}_{task}")["JobState"] for task in (0, 1)]
    said = [path.read_text() for path in training.recipe.parent.glob("teacher-*.out")]
    assert states == ["COMPLETED", "COMPLETED"], said
    assert killed == 3
    assert same_stores(store, whole) > 30


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        a_node_loses_power_then_a_cable_is_cut_for_good,
        signalled_before_the_time_limit_then_requeued_by_hand,
        preempted_by_an_urgent_job_then_a_rank_is_killed,
        the_checkpoints_turn_read_only_then_the_disk_is_full,
        fewer_nodes_after_the_requeue,
        experts_shared_between_nodes,
        a_second_job_of_the_same_run_is_refused,
        workers_of_the_teacher_are_killed,
    )
}
"""Long ones first."""


@pytest.fixture(scope="module")
def outcomes(request, running_cluster, chain_run, tmp_path_factory):
    """Of every scenario that a test of this session asks for; they are under way while the first tests wait."""
    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    runs = Runs(running_cluster, chain_run, tmp_path_factory.mktemp("faults"))
    with Lanes(running_cluster) as lanes:
        yield {name: lanes.submit(SCENARIOS[name], runs) for name in SCENARIOS if name in asked}


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_befalls_a_run_changes_nothing_in_the_end(name, outcomes):
    outcomes[name].result()


@pytest.mark.nightly
def test_experts_shared_between_four_nodes(cluster, chain_run, tmp_path):
    with Lanes(cluster, count=1) as lanes:
        lanes.submit(experts_shared_between_nodes, Runs(cluster, chain_run, tmp_path), 4).result()


@pytest.mark.parametrize("seconds", [12, pytest.param(30, marks=pytest.mark.nightly)])
def test_a_cable_is_cut_for_a_while(cluster, training, undisturbed, seconds):
    with patience(cluster, 120):
        training.start("--nodes=2", *SMALL_STEP, "--nodelist=node[1-2]")
        training.wait_for_step(FIRST)
        cluster.unplug("node2")
        time.sleep(seconds)
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
