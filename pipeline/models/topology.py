"""How a job's ranks share batch and experts: what must divide what, and which ranks form a group. Arithmetic only.

DeepSpeed forms groups so that consecutive ranks share the experts of a layer (an expert group), and ranks that lie a
group's size apart hold the same experts (an expert-data group, over which their gradients are summed). With one task a
GPU, Slurm gives consecutive ranks to a node, so an expert group lies inside a node when its size divides the number of
the node's GPUs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.files import shipped
from pipeline.recipe import JobConfig


def accumulation_steps(job: JobConfig, ranks: int) -> int:
    """Micro-batches of a rank in an optimizer step. ConfigError when the global batch cannot be shared evenly."""
    per_pass = job.batch.micro_size * ranks
    if job.batch.global_size % per_pass:
        raise ConfigError(
            f"batch.global_size {job.batch.global_size} is not a multiple of batch.micro_size "
            f"{job.batch.micro_size} x {ranks} rank(s) = {per_pass}. "
            "Change one of them, or the number of ranks. Nothing was started."
        )
    return job.batch.global_size // per_pass


def expert_parallel_size(ds_json: Mapping[str, Any]) -> int:
    """Ranks that share the experts of one layer, as a DeepSpeed JSON says; 1 without expert parallelism."""
    block = ds_json.get("expert_parallel") or {}
    return int(block.get("autoep_size", 1)) if block.get("enabled", False) else 1


def check_expert_parallel_size(size: int, ranks: int, experts: int) -> None:
    """ConfigError unless the size divides both the ranks and the experts of a layer."""
    for what, whole in (("ranks", ranks), ("experts per layer", experts)):
        if whole % size:
            raise ConfigError(
                f"expert_parallel.autoep_size {size} does not divide the {whole} {what}. "
                f"Choose a divisor of both {ranks} (ranks) and {experts} (experts). "
                "Nothing was started."
            )


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks of a job on its nodes, `per_node` consecutive ones on each."""

    ranks: int
    per_node: int
    expert_parallel: int = 1
    """Divides `ranks`."""

    @property
    def nodes(self) -> int:
        """Nodes that the ranks fill, the last one perhaps in part."""
        return -(-self.ranks // self.per_node)

    @property
    def expert_groups(self) -> list[range]:
        """Ranks that share the experts of a layer and exchange tokens: all-to-all."""
        return [range(first, first + self.expert_parallel) for first in range(0, self.ranks, self.expert_parallel)]

    @property
    def expert_data_groups(self) -> list[range]:
        """Ranks that hold the same experts and sum their gradients."""
        return [range(first, self.ranks, self.expert_parallel) for first in range(self.expert_parallel)]

    @property
    def all_to_all_between_nodes(self) -> float:
        """Share of what ranks send each other in all-to-alls that leaves a node, when all experts are equally busy."""
        pairs = [(rank, other) for group in self.expert_groups for rank in group for other in group if rank != other]
        apart = sum(rank // self.per_node != other // self.per_node for rank, other in pairs)
        return apart / len(pairs) if pairs else 0.0

    def nodes_of(self, group: range) -> int:
        """Nodes that a group's ranks lie on."""
        return len({rank // self.per_node for rank in group})


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON: the user's file, or the name of one that comes with the package. ConfigError if it is none."""
    path = shipped(path, "ds_configs")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}. Nothing was started.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object, got {type(content).__name__}. Nothing was started.")
    return content
