"""Planned bytes against a real DeepSpeed engine's, part by part; the formulae against brute force."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.cluster.plan import make_plan, shapes
from pipeline.models import upcycling
from pipeline.models.cost import footprint
from pipeline.models.cost.activations import Load, Settings, activations
from pipeline.models.cost.footprint import Spread, Weight
from pipeline.models.families import DENSE_FAMILIES, auto_class
from pipeline.recipe import UpcycleConfig
from tests.helpers import memory_run, tiny
from tests.unit.models import test_families

TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 1000,
    "rope_parameters": tiny.TEXT["rope_parameters"] | {"mrope_section": [4, 2, 2]},
}
VISION = {"hidden_size": 64, "intermediate_size": 160, "out_hidden_size": 128, "depth": 3, "num_heads": 4}
LOAD = {"sequences": 2, "length": 128, "side": 12, "answers": 32}
TOLERANCE = 0.10


def spec(
    ranks: int, stage: int, *, ep: int = 1, bf16: bool = False, float32_gradients: bool = False, steps: int = 1,
    trainable: str = "all", **more: object,
) -> dict[str, Any]:  # fmt: skip
    """A run that `memory_run` measures. `steps`: of accumulation."""
    job = {"steps": 5, "micro_size": LOAD["sequences"], "trainable": trainable}
    job |= {"global_size": LOAD["sequences"] * steps * ranks, "grad_clip": 0.0 if stage == 0 else 1.0}
    zero = {"stage": stage, "reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 300}
    raw = {"zero_optimization": zero, "bf16": {"enabled": bf16}, "steps_per_print": 10**9}
    raw["expert_parallel"] = {"enabled": True, "autoep_size": ep}
    if float32_gradients:
        raw |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32" if stage == 1 else "bf16"}
    sizes = {"text": TEXT, "vision": VISION, "load": LOAD, "attention": "eager"}
    return sizes | {"deepspeed": raw, "job": job} | more


def planned(run: dict[str, Any], ranks: int) -> dict[str, int]:
    """What the plan says of the run's parts, without its weights."""
    with torch.device("meta"):
        model = memory_run.build(run)
    images = LOAD["sequences"]
    load = Load(images, LOAD["length"], images * LOAD["side"] ** 2, images, images * LOAD["answers"])
    job = tiny.job(**run["job"], activation_checkpointing=run.get("checkpointing", False))
    plan = make_plan(model, job, run["deepspeed"], ranks, load, attention=run["attention"], on_cpu=True)
    parts = {name: getattr(plan.state, name) for name in ("weights", "gradients", "optimizer")}
    return parts | {"activations": plan.kept.saved, "peak": plan.peak, "all_to_all": plan.all_to_all}


def compare(run: dict[str, Any], ranks: int, measured: dict[str, float]) -> None:
    """Every part within the tolerance, and no other tensors of any size."""
    plan, ep = planned(run, ranks), run["deepspeed"]["expert_parallel"]["autoep_size"]
    for part in ("weights", "gradients", "optimizer", "activations", "peak"):
        assert plan[part] == pytest.approx(measured[part], rel=TOLERANCE), (run["deepspeed"], part)
    assert measured["rest"] < 0.01 * measured["weights"]
    if ep > 1:  # measured is what a rank puts in, rows for itself included; balanced routing leaves 1 / ep at home
        assert plan["all_to_all"] * ep / (ep - 1) == pytest.approx(measured["all_to_all"], rel=TOLERANCE)


ONE_RANK = {
    "zero0_bf16": spec(1, 0, bf16=True),
    "zero1": spec(1, 1),
    "zero1_frozen": spec(1, 1, trainable="mlp_and_router"),
    "zero2_bf16_sdpa": spec(1, 2, bf16=True, attention="sdpa", steps=2),
    "zero3_checkpointing": spec(1, 3, checkpointing=True),
    "zero1_bf16_float32_gradients": spec(1, 1, bf16=True, float32_gradients=True, steps=2),
    "zero2_bf16_float32_gradients": spec(1, 2, bf16=True, float32_gradients=True),
    "zero3_bf16_float32_gradients": spec(1, 3, bf16=True, float32_gradients=True, steps=2),
}
NATIVE = spec(2, 1, ep=2)
NATIVE["job"] |= {"layer": "native", "native": {"drop_tokens": True}}
TWO_RANKS = [
    spec(2, 1, ep=2, steps=2), spec(2, 2, bf16=True), spec(2, 3, ep=2), NATIVE,
    *(spec(2, stage, ep=2, bf16=True, float32_gradients=True, steps=2) for stage in (1, 2, 3)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_RANK)
def test_plan_of_one_rank(name: str) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    compare(ONE_RANK[name], 1, memory_run.run(ONE_RANK[name]))


@pytest.mark.slow
def test_plan_of_two_ranks(tmp_path: Path) -> None:
    out = tiny.run_ranks("memory_run.py", tmp_path, 2, {"runs": TWO_RANKS})
    for run, measured in zip(TWO_RANKS, json.loads(out.read_text()), strict=True):
        compare(run, 2, measured)


@pytest.mark.parametrize("family", DENSE_FAMILIES, ids="-".join)
def test_activations_of_every_family(family: tuple[str, str]) -> None:
    """Against what autograd saves in plain transformers, logits of all positions and no loss."""
    settings = UpcycleConfig(source="x", experts=4, top_k=2, every=2)
    config = upcycling.moe_config(upcycling.plan(test_families.dense_config(family), settings, "x"))
    model = auto_class(config).from_config(config, attn_implementation="eager").train()
    inputs, held = test_families.inputs(config), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        model(**inputs, use_cache=False)
    saved = memory_run.without(memory_run.storages(held), memory_run.storages(model.parameters()))
    text, vision = shapes(config)
    pixels = inputs.get("pixel_values", torch.empty(0))
    # Images are patches already, or tiles of 4 x 4 of them and a class token.
    tiles = len(inputs["image_grid_thw"]) if pixels.ndim == 2 else pixels.shape[:-3].numel() if len(pixels) else 0
    patches = len(pixels) if pixels.ndim == 2 else 17 * tiles
    load = Load(*inputs["input_ids"].shape, patches=patches, images=tiles, answers=0)
    kept = activations(text, vision, load, Settings(bytes=4, eager_attention=True))
    head_gradient = 4 * text.vocabulary * text.width  # of the fused loss, which does not run here
    assert kept.saved - head_gradient == pytest.approx(sum(saved.values()), rel=0.05)


WEIGHTS = [
    Weight(1000, expert=False, trains=False),
    Weight(70, expert=False, trains=True),
    Weight(33, expert=True, trains=True),
    Weight(501, expert=False, trains=True),
    Weight(9, expert=True, trains=True),
    Weight(200, expert=False, trains=True),
]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_gradients_of_partitions_cover_all_parameters_that_touch_them(ranks: int) -> None:
    """Brute force: every element knows its parameter and its rank."""
    spread = Spread(ranks, stage=2, bucket=0)
    wanted = 0
    for expert in (False, True):
        sizes = [w.numel for w in WEIGHTS if w.trains and w.expert is expert]
        owner = [i for i, size in enumerate(sizes) for _ in range(size)]
        part = -(-len(owner) // (2 * ranks)) * 2
        touched = [{*owner[r * part : (r + 1) * part]} for r in range(ranks)]
        wanted += max(sum(sizes[i] for i in indices) for indices in touched)
    assert footprint.state(WEIGHTS, spread).gradients == 4 * wanted


def test_partitions_shrink_with_the_ranks_that_hold_a_parameter() -> None:
    one, eight = (footprint.state(WEIGHTS, Spread(ranks, stage=3, persistent=0)) for ranks in (1, 8))
    assert one.weights == 4 * 1813 and one.optimizer == 12 * 813
    assert 1813 / 8 <= eight.weights / 4 < 1813 / 8 + len(WEIGHTS)
    experts = footprint.state(WEIGHTS, Spread(8, stage=3, persistent=0, expert_parallel=8))
    assert experts.weights - eight.weights == 4 * (33 + 9 - 5 - 2)  # local experts have no other rank to share with


def test_experts_are_counted_as_the_engine_holds_them() -> None:
    model = tiny.moe_model()
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    apart = footprint.local_weights(model.named_parameters(), Spread(2, expert_parallel=2, experts_apart=True))
    assert sum(w.numel for w in apart) == total - experts // 2
    assert sum(w.expert for w in apart) == 6  # gate, up and down of two layers
    whole = footprint.local_weights(model.named_parameters(), Spread(2))
    assert sum(w.numel for w in whole) == total and not any(w.expert for w in whole)
