"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pipeline.training import operators
from tests.cluster.slurm_cluster import Cluster, NotPermitted
from tests.cluster.slurm_runs import CHAIN, SGD, Training, copy_run, job_ids, run_status, submit, write_recipe

operators.prepare()  # also for processes that tests start without going through the training stage

LONGEST = "train checkpoint feature_training teacher ablation expert_parallel families bench_tools footprint".split()
"""Files that take about a minute and more, by falling length."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: with several workers none of them is left to the end. Jobs on a busy machine start late."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.timeout(1200))


@dataclass
class ChainRun:
    """A recipe's whole chain, submitted and waited for."""

    training: Training
    jobs: dict[str, int]
    last: dict[str, str]
    """The last job's end."""
    status: str
    """What `clkd status` said while the student trained."""


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A Slurm of four nodes; tests that need it are skipped where it cannot be had, but not where CI says so."""
    try:
        with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster
    except NotPermitted as reason:
        if os.environ.get("CLKD_TESTS_NEED_SLURM"):
            raise
        pytest.skip(str(reason))


@pytest.fixture
def cluster(running_cluster) -> Iterator[Cluster]:
    """The cluster, without another test's jobs and with all nodes up."""
    yield running_cluster
    running_cluster.cancel_all()
    running_cluster.run("scontrol", "update", "NodeName=ALL", "State=resume", check=False)
    running_cluster.wait_for_nodes()


@pytest.fixture(scope="session")
def chain_run(running_cluster, tmp_path_factory) -> ChainRun:
    """The tiny recipe's chain on two nodes, experts spread over them."""
    run = tmp_path_factory.mktemp("chain") / "run"
    recipe = write_recipe(run)
    jobs = job_ids(submit(running_cluster, recipe, *CHAIN).stdout)
    training = Training(running_cluster, run, recipe, str(jobs["train clkd"]))
    training.wait_for_step(1, 400)
    status = run_status(running_cluster, run).stdout
    last = running_cluster.wait(jobs["report"], 400)
    return ChainRun(training, jobs, last, status)


@pytest.fixture
def undisturbed(chain_run) -> Training:
    """A finished training on two nodes."""
    return chain_run.training


@pytest.fixture(scope="session")
def undisturbed_sgd(running_cluster, chain_run, tmp_path_factory) -> Training:
    """A finished training with SGD, for comparison with other numbers of ranks."""
    training = copy_run(running_cluster, chain_run.training.run, tmp_path_factory.mktemp("sgd") / "run")
    training.start(words=SGD)
    training.wait(restarts=0)
    return training


@pytest.fixture
def training(cluster, chain_run, tmp_path) -> Training:
    """A run in which everything before the student's training is made."""
    return copy_run(cluster, chain_run.training.run, tmp_path / "run")
