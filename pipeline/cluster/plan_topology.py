"""Which ranks form which groups, for any number of GPUs, before any GPU is asked for.

    clkd plan RECIPE.yaml --topology --gpus 8,64,1024 [--gpus-per-node 8] [--deepspeed_config X.json] job=NAME

Checks for each number what training checks at its start: the ranks must be able to share batch and experts evenly.
Ends with status 2 when one number is refused. Reads configurations, never weights.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from pipeline.errors import EXIT_USER_ERROR, ConfigError
from pipeline.models import deepspeed_config, families
from pipeline.models.topology import Topology, accumulation_steps, expert_parallel_size
from pipeline.recipe import JobConfig

SHOWN = 3
"""Groups, and ranks of a group, that are written out before the last one."""


def describe(topology: Topology, experts: int, micro_batches: int) -> list[str]:
    """A few lines: the groups, what a rank holds, and what leaves a node.

    Args:
        topology: of the job.
        experts: of a layer; 0: the model has none.
        micro_batches: of a rank in an optimizer step.
    """
    lines = [
        f"{topology.ranks} GPUs, {topology.per_node} a node: {topology.nodes} node(s), "
        f"one data-parallel group, {micro_batches} micro-batch(es) of a rank in a step"
    ]
    if not experts:
        return lines
    size, groups, data_groups = topology.expert_parallel, topology.expert_groups, topology.expert_data_groups
    spread = max(map(topology.nodes_of, groups))
    share = topology.all_to_all_between_nodes
    lines += [
        f"  experts: {experts} a layer, {experts // size} on a rank, {topology.ranks // size} replica(s) of each",
        f"  expert groups ({len(groups)}): {_some([_ranks(group) for group in groups], '  ')}",
        f"  expert-data groups ({len(data_groups)}): {_some([_ranks(group) for group in data_groups], '  ')}",
        f"  all-to-all: {f'over {spread} nodes, {share:.0%} of it leaves a node' if spread > 1 else 'inside a node'}",
    ]
    return lines


def _ranks(group: range) -> str:
    return f"{group[0]}-{group[-1]}" if group.step == 1 and len(group) > 1 else _some([str(r) for r in group], ",")


def _some(parts: Sequence[str], separator: str) -> str:
    """All of a few parts, else the first ones and the last."""
    shown = list(parts) if len(parts) <= SHOWN + 2 else [*parts[:SHOWN], "...", parts[-1]]
    return separator.join(shown)


def show_topology(
    job: JobConfig, ds_json: Mapping[str, Any], config: PreTrainedConfig, options: argparse.Namespace
) -> int:
    """Print the groups for each of `options.gpus`; the exit status, 2 when one of them is refused."""
    family = families.moe_family(config) if families.moe_layers(config) else None
    experts = getattr(config.get_text_config(), family.num_experts_attr) if family else 0
    refused = False
    for ranks in options.gpus:
        try:
            deepspeed_config.complete(ds_json, job, config, ranks)
            topology = Topology(ranks, options.gpus_per_node, expert_parallel_size(ds_json) if experts else 1)
            print("\n".join(describe(topology, experts, accumulation_steps(job, ranks))))
        except ConfigError as error:
            refused = True
            print(f"{ranks} GPUs: refused: {error}")
    return EXIT_USER_ERROR if refused else 0
