"""A soak on a running Slurm: random faults over one training run and one teacher array, and then nothing may be lost.

    make soak                                                       30 faults, seed 0
    PYTHONPATH=. python tests/cluster/slurm_soak.py [--faults 30] [--seed 0]

First a recipe's chain runs undisturbed. Then its training and its teacher pass run again, at the same time and under
faults. At the end: the same weights and losses, bit for bit, and a store of the same bytes with every sample once.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.cluster.slurm_cluster import ENDED, Cluster
from tests.cluster.slurm_runs import (
    CHAIN,
    TWO_NODES,
    Training,
    copy_run,
    job_ids,
    same_stores,
    start_script,
    submit,
    write_recipe,
)

SIZES = {"steps": 600, "scenes": 60, "shard_samples": 2}
WORKERS = 2
PATIENCE = {"CLKD_COLLECTIVE_TIMEOUT_S": "20", "CLKD_MAX_CRASHES": "1000"}
LONGEST_S = 5400.0


class Soak:
    """A training job and a teacher array, and what befalls them."""

    def __init__(self, cluster: Cluster, training: Training, teaching: Training, seed: int) -> None:
        self.cluster, self.training, self.teaching = cluster, training, teaching
        self.random = random.Random(seed)
        self.began, self.sent = time.monotonic(), Counter[str]()
        self.teacher_job = ""
        self.train_again()
        self.teach_again()

    def train_again(self) -> None:
        self.training.start(*TWO_NODES, **PATIENCE)
        self.sent["train"] += 1

    def teach_again(self) -> None:
        log = f"--output={self.teaching.recipe.parent}/teacher-%A-%a.out"
        options = (f"--array=0-{WORKERS - 1}", "--cpus-per-task=1", "--gpus-per-node=1", log)
        self.teacher_job = start_script(self.cluster, "teacher_targets", self.teaching.recipe, *options, **PATIENCE)
        self.sent["teacher"] += 1

    # -- faults ------------------------------------------------------------------------------------------------

    def faults(self) -> dict[str, tuple[Callable[[], None], ...]]:
        """By what they befall."""
        both = (self.preempted, self.power_cut, self.cable_cut)
        return {
            "train": (self.signalled, self.requeued, self.rank_killed, self.rank_killed, *both),
            "teacher": (self.task_requeued, self.worker_killed, self.worker_killed, self.worker_killed, *both),
        }

    def signalled(self) -> None:
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.training.job, check=False)

    def requeued(self) -> None:
        self.cluster.run("scontrol", "requeue", self.training.job, check=False)

    def task_requeued(self) -> None:
        self.cluster.run("scontrol", "requeue", f"{self.teacher_job}_{self.random.randrange(WORKERS)}", check=False)

    def rank_killed(self) -> None:
        self.killed("^[^ ]*python -m pipeline train")

    def worker_killed(self) -> None:
        self.killed("^[^ ]*python -m pipeline teacher")

    def killed(self, pattern: str) -> None:
        """On one of the nodes where there is such a process."""
        nodes = [f"node{number}" for number in range(1, self.cluster.nodes + 1)]
        self.random.shuffle(nodes)
        for node in nodes:
            if self.cluster.on_node(node, "pkill", "-9", "-f", pattern, check=False).returncode == 0:
                return

    def preempted(self) -> None:
        urgent = ("--exclusive", "--partition=urgent", "-o/dev/null", "--wrap", "sleep 2")
        self.cluster.run("sbatch", f"-N{self.random.randint(1, self.cluster.nodes)}", *urgent)

    def power_cut(self) -> None:
        node = self.node_in_use()
        self.cluster.power_off(node)
        time.sleep(self.random.uniform(0, 15))
        self.cluster.power_on(node)

    def cable_cut(self) -> None:
        node = self.node_in_use()
        self.cluster.unplug(node)
        time.sleep(self.random.uniform(1, 20))
        self.cluster.plug_in(node)

    def node_in_use(self) -> str:
        """One that a job runs on; any when none does."""
        lists = self.cluster.run("squeue", "-h", "-t", "R", "-o", "%N").stdout.split()
        every = [f"node{number}" for number in range(1, self.cluster.nodes + 1)]
        used = self.cluster.run("scontrol", "show", "hostnames", ",".join(lists)).stdout.split() if lists else every
        return self.random.choice(sorted(set(used)))

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, faults: int) -> Counter[str]:
        """Faults until there were that many, then undisturbed to the end; how often each kind was."""
        counts = Counter[str]()
        while self.unfinished():
            assert time.monotonic() - self.began < LONGEST_S, f"not at the end after {LONGEST_S:g} s: {counts}"
            time.sleep(0.5)
            if counts.total() == faults:
                continue
            target = self.random.choice(self.unfinished())
            self.approach(target)
            fault = self.random.choice(self.faults()[target])
            fault()
            counts[fault.__name__] += 1
            steps = self.training.steps()
            print(
                f"{time.monotonic() - self.began:6.0f} s  {counts.total():2}. {fault.__name__:14} "
                f"training at step {steps[-1] if steps else 0}",
                flush=True,
            )
        assert counts.total() == faults, f"both were done after {counts.total()} faults: make the run longer"
        return counts

    def approach(self, target: str) -> None:
        """Into any phase of its life: the teacher at any moment, training mostly after some more steps."""
        if target == "teacher" or self.random.random() < 1 / 3:
            time.sleep(self.random.uniform(0, 12))
            return
        goal = len(self.training.steps()) + self.random.randint(1, 8)
        deadline = time.monotonic() + 120
        while len(self.training.steps()) < goal and "train" in self.unfinished() and time.monotonic() < deadline:
            time.sleep(0.1)

    def unfinished(self) -> list[str]:
        """What is still to be done; a job that ended otherwise than well is sent again, as a person would."""
        jobs = {"train": [self.training.job], "teacher": [f"{self.teacher_job}_{task}" for task in range(WORKERS)]}
        states = {name: [self.cluster.job(job)["JobState"] for job in of] for name, of in jobs.items()}
        for name, again in (("train", self.train_again), ("teacher", self.teach_again)):
            if all(state in ENDED for state in states[name]) and set(states[name]) != {"COMPLETED"}:
                again()
        return [name for name, of in states.items() if set(of) != {"COMPLETED"}]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, Cluster(Path(folder) / "slurm") as cluster:
        whole = Path(folder) / "whole" / "run"
        recipe = write_recipe(whole, **SIZES)
        began = time.monotonic()
        jobs = job_ids(submit(cluster, recipe, *CHAIN).stdout)
        assert cluster.wait(jobs["report"], LONGEST_S)["JobState"] == "COMPLETED"
        undisturbed = Training(cluster, whole, recipe, str(jobs["train clkd"]))
        print(f"undisturbed chain: {time.monotonic() - began:.0f} s", flush=True)
        training = copy_run(cluster, whole, Path(folder) / "training" / "run", **SIZES)
        teaching = copy_run(cluster, whole, Path(folder) / "teaching" / "run", **SIZES)
        for file in (teaching.run / "store").iterdir():
            file.unlink()
        soak = Soak(cluster, training, teaching, options.seed)
        try:
            counts = soak.run(options.faults)
        except BaseException:
            print(training.story(), file=sys.stderr)
            raise
        training.equals(undisturbed)
        samples = same_stores(teaching.run / "store", whole / "store")
        print(
            f"{counts.total()} faults of seed {options.seed} in {time.monotonic() - soak.began:.0f} s: "
            + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))
            + f"\ntraining: {len(training.logs(0))} starts, sent {soak.sent['train']} time(s); "
            f"weights and {len(training.steps())} losses equal bit for bit"
            f"\nteacher: sent {soak.sent['teacher']} time(s); targets of {samples} samples, each once, "
            "equal byte for byte"
        )


if __name__ == "__main__":
    main()
