"""Scenarios on one cluster, two at a time: each has a lane, some nodes of its own, and so does not see the other."""

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.cluster.slurm_cluster import Cluster

SMALL_STEP = ("--cpus-per-task=1", "--ntasks-per-node=1", "--gpus-per-node=1")
TWO_NODES = ("--nodes=2", *SMALL_STEP)


@dataclass(frozen=True)
class Lane:
    """Nodes that one scenario has for itself."""

    name: str
    """Of its jobs."""
    nodes: tuple[str, ...]
    others: tuple[str, ...]

    def options(self, *wanted: str) -> tuple[str, ...]:
        """Options of sbatch for a job in this lane; one rank on each of two nodes unless something else is wanted."""
        return (f"--job-name={self.name}", f"--exclude={','.join(self.others)}", *(wanted or TWO_NODES))


class Lanes:
    """Runs scenarios in threads, each in the next free lane; use as a context."""

    def __init__(self, cluster: Cluster, count: int = 2) -> None:
        self.cluster = cluster
        every = [f"node{number}" for number in range(1, cluster.nodes + 1)]
        size = len(every) // count
        self.free: queue.Queue[Lane] = queue.Queue()
        for start in range(0, count * size, size):
            mine = every[start : start + size]
            others = tuple(node for node in every if node not in mine)
            self.free.put(Lane(f"lane-{mine[0]}", tuple(mine), others))
        self.threads = ThreadPoolExecutor(count)

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *exception: object) -> None:
        self.threads.shutdown(cancel_futures=True)

    def submit(self, scenario: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Have `scenario(lane, *arguments)` run; the result raises what it raises."""
        return self.threads.submit(self._run, scenario, arguments)

    def _run(self, scenario: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        lane = self.free.get()
        try:
            scenario(lane, *arguments)
        finally:
            self.cluster.tidy(lane.nodes, lane.name)
            self.free.put(lane)
