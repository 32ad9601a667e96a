"""Planned bytes against a real DeepSpeed engine's, part by part, on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cluster.plan import make_plan
from pipeline.models.cost.activations import Load
from tests.helpers import memory_run, ranks, tiny

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
    count: int, stage: int, *, ep: int = 1, bf16: bool = False, float32_gradients: bool = False, steps: int = 1,
    trainable: str = "all", **more: object,
) -> dict[str, Any]:  # fmt: skip
    """A run on `count` ranks that `memory_run` measures. `steps`: of accumulation."""
    job = {"steps": 5, "micro_size": LOAD["sequences"], "trainable": trainable}
    job |= {"global_size": LOAD["sequences"] * steps * count, "grad_clip": 0.0 if stage == 0 else 1.0}
    zero = {"stage": stage, "reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 300}
    raw = {"zero_optimization": zero, "bf16": {"enabled": bf16}, "steps_per_print": 10**9}
    raw["expert_parallel"] = {"enabled": True, "autoep_size": ep}
    if float32_gradients:
        raw |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32" if stage == 1 else "bf16"}
    sizes = {"text": TEXT, "vision": VISION, "load": LOAD, "attention": "eager"}
    return sizes | {"deepspeed": raw, "job": job} | more


def planned(run: dict[str, Any], count: int) -> dict[str, int]:
    """What the plan says of the run's parts, without its weights."""
    with torch.device("meta"):
        model = memory_run.build(run)
    images = LOAD["sequences"]
    load = Load(images, LOAD["length"], images * LOAD["side"] ** 2, images, images * LOAD["answers"])
    job = tiny.job(**run["job"], activation_checkpointing=run.get("checkpointing", False))
    plan = make_plan(model, job, run["deepspeed"], count, load, attention=run["attention"], on_cpu=True)
    parts = {name: getattr(plan.state, name) for name in ("weights", "gradients", "optimizer")}
    return parts | {"activations": plan.kept.saved, "peak": plan.peak, "all_to_all": plan.all_to_all}


def compare(run: dict[str, Any], count: int, measured: dict[str, float]) -> None:
    """Every part within the tolerance, and no other tensors of any size."""
    plan, ep = planned(run, count), run["deepspeed"]["expert_parallel"]["autoep_size"]
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
TWO_RANKS = {
    "zero1_accumulated": spec(2, 1, ep=2, steps=2),
    "zero2_bf16": spec(2, 2, bf16=True),
    "zero3": spec(2, 3, ep=2),
    "native": NATIVE,
    **{f"zero{n}_float32_gradients": spec(2, n, ep=2, bf16=True, float32_gradients=True, steps=2) for n in (1, 2, 3)},
}


@pytest.mark.parametrize(("count", "runs"), [(1, ONE_RANK), (2, TWO_RANKS)], ids=["one-rank", "two-ranks"])
def test_what_is_planned_is_what_a_step_takes(count: int, runs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    ranks.run(memory_run.main, list(runs.values()), out, ranks=count)
    for run, measured in zip(runs.values(), json.loads(out.read_text()), strict=True):
        compare(run, count, measured)
