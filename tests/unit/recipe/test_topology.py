"""Groups of ranks against DeepSpeed's own, traffic against brute force, and the dry run for large clusters."""

import json

import pytest
import yaml
from deepspeed.utils import groups

from pipeline.cli import main as clkd
from pipeline.models.topology import Topology
from pipeline.recipe import merge
from tests.helpers.recipes import TINY


@pytest.mark.parametrize(("ranks", "size"), [(4, 2), (8, 1), (8, 8), (64, 8), (64, 16), (1024, 8), (1024, 64)])
def test_groups_are_deepspeeds(ranks, size):
    topology = Topology(ranks, 8, size)
    experts, data = groups._get_expert_parallel_ranks(ranks, 1, size)
    assert [list(group) for group in topology.expert_groups] == experts
    assert [list(group) for group in topology.expert_data_groups] == data


@pytest.mark.parametrize(
    ("ranks", "per_node", "size", "share"),
    [(8, 8, 8, 0.0), (8, 2, 1, 0.0), (16, 8, 16, 8 / 15), (64, 8, 8, 0.0), (8, 2, 4, 2 / 3), (12, 4, 6, 8 / 15)],
)
def test_share_of_the_all_to_all_that_leaves_a_node(ranks, per_node, size, share):
    """By hand: of 16 ranks on 2 nodes each sends to 15 others, 8 of them elsewhere. Groups of 6, nodes of 4: 4 + 2."""
    assert Topology(ranks, per_node, size).all_to_all_between_nodes == pytest.approx(share)


@pytest.fixture
def recipe(tmp_path):
    changes = {
        "run": {"dir": str(tmp_path)},
        "jobs": {"clkd": {"batch": {"global_size": 2048}}},
        "models": {"moe": {"upcycle": {"experts": 16}}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merge(TINY, changes)))
    return path


def dry_run(recipe, tmp_path, size, *options):
    ds_json = {"zero_optimization": {"stage": 1}, "expert_parallel": {"enabled": True, "autoep_size": size}}
    (tmp_path / "ds.json").write_text(json.dumps(ds_json))
    arguments = [str(recipe), "--deepspeed_config", str(tmp_path / "ds.json"), *options, "job=clkd"]
    return clkd(["plan", *arguments, "--topology", "targets.teacher=models.small"])


def test_eight_sixtyfour_and_a_thousand_gpus(recipe, tmp_path, capsys):
    assert dry_run(recipe, tmp_path, 16, "--gpus", "64,1024") == 0
    printed = capsys.readouterr().out
    assert "64 GPUs, 8 a node: 8 node(s), one data-parallel group, 16 micro-batch(es)" in printed
    assert "expert groups (4): 0-15  16-31  32-47  48-63" in printed
    assert "expert-data groups (16): 0,16,32,48  1,17,33,49  2,18,34,50  ...  15,31,47,63" in printed
    assert "all-to-all: over 2 nodes, 53% of it leaves a node" in printed
    assert "expert groups (64): 0-15  16-31  32-47  ...  1008-1023" in printed
    assert "16 a layer, 1 on a rank, 64 replica(s) of each" in printed


def test_what_does_not_come_out_even_is_refused_with_both_numbers(recipe, tmp_path, capsys):
    assert dry_run(recipe, tmp_path, 16, "--gpus", "8,64,96") == 2
    printed = capsys.readouterr().out
    assert "8 GPUs: refused: expert_parallel.autoep_size 16 does not divide the 8 ranks" in printed
    assert "96 GPUs: refused: batch.global_size 2048 is not a multiple of batch.micro_size 2 x 96 rank(s)" in printed
    assert "64 GPUs, 8 a node" in printed
