"""A running Slurm, and runs on it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import Cluster, NotPermitted
from tests.cluster.slurm_runs import CHAIN, Training, copy_run, job_ids, run_status, submit, write_recipe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Not beside other tests: their load is not in these ones' time limits, and jobs on a busy machine start late."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.slurm)
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
    """A Slurm of six nodes; tests that need it are skipped where it cannot be had, but not where CI says so."""
    try:
        with Cluster(tmp_path_factory.mktemp("slurm"), nodes=6) as cluster:
            yield cluster
    except NotPermitted as reason:
        if os.environ.get("CLKD_TESTS_NEED_SLURM"):
            raise
        pytest.skip(str(reason))


@pytest.fixture
def cluster(running_cluster) -> Iterator[Cluster]:
    """The cluster, without another test's jobs and with all nodes up."""
    yield running_cluster
    running_cluster.tidy()


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


@pytest.fixture
def training(cluster, chain_run, tmp_path) -> Training:
    """A run in which everything before the student's training is made."""
    return copy_run(cluster, chain_run.training.run, tmp_path / "run")
