"""DeepSpeed engines on several ranks: equal to plain torch, resumed exactly, and with every shipped configuration."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models import router
from tests.helpers import tiny
from tests.helpers.engine_worker import launch
from tests.helpers.paths import ROOT

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
EP2 = {"expert_parallel": {"enabled": True, "autoep_size": 2}}


@pytest.mark.parametrize(("stage", "micro_batch", "checkpointing"), [(1, 2, False), (2, 1, False), (3, 1, True)])
def test_two_ranks_equal_one_process(tmp_path: Path, stage: int, micro_batch: int, checkpointing: bool) -> None:
    """EP 2 on 2 ranks = plain torch: SGD, clipping active, uneven token counts, accumulation."""
    model = tiny.moe_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with router.RouterProbe(model) as probe:
        reference = tiny.reference_run(model, steps=5, lr=1.0, clip=0.05)
        num_layers = len(probe)
    recorded, parameters = launch(
        tmp_path,
        2,
        deepspeed=EP2 | {"zero_optimization": {"stage": stage}},
        job={"kind": "sgd", "lr": 1.0, "weight_decay": 0.0, "micro_size": micro_batch},
        steps=5,
        checkpointing=checkpointing,
    )
    assert recorded["converted"] == num_layers == 2
    for (loss, norm, _), (wanted_loss, wanted_norm) in zip(recorded["history"], reference, strict=True):
        assert norm > 10 * 0.05  # clipping is active
        assert loss == pytest.approx(wanted_loss, abs=2e-6)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
    wanted = {name: p.detach() for name, p in model.named_parameters()}
    assert parameters.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(parameters[name], tensor, rtol=0, atol=2e-7)
    moved = max(float((wanted[n] - before[n]).abs().max()) for n in wanted if ".experts." in n)
    assert moved > 1e-3  # the comparison would notice experts that do not train


@pytest.mark.parametrize(
    ("deepspeed", "trainable"),
    [
        ("zero1", "all"),
        ("zero2", "mlp_and_router"),
        ("zero3", "all"),
        ("zero3", "mlp_and_router"),
        ("zero1_ep.json", "all"),
        ("zero1_ep.json", "mlp_and_router"),
        ("zero2_ep.json", "all"),
        ("zero3_ep.json", "all"),
    ],
)
def test_two_ranks_resume_exactly(tmp_path: Path, deepspeed: str, trainable: str) -> None:
    """AdamW, clipping, uneven tokens, experts split over 2 ranks: resumed = uninterrupted, bit for bit."""
    config: Any = str(ROOT / "ds_configs" / deepspeed)
    if not deepspeed.endswith(".json"):
        config = {"zero_optimization": {"stage": int(deepspeed[-1])}}
        config |= {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    common: dict[str, Any] = {"deepspeed": config, "job": {}, "trainable": trainable, "steps": 4}
    whole, wanted = launch(tmp_path / "a", 2, **common, save=str(tmp_path / "c"), save_at=2)
    resumed, found = launch(tmp_path / "b", 2, **common, load=str(tmp_path / "c"))
    assert resumed["history"] == whole["history"][2:]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_other_ranks_stages_and_expert_sizes_equal_one_plain_process(tmp_path: Path) -> None:
    """AdamW and clipping over 2, 1 and 4 ranks, two steps each, against plain torch that is never interrupted.

    The tolerances are for fp32 sums in another order, which AdamW's division by small moments enlarges step by step.
    """
    legs = [(2, 1, 2), (1, 3, 1), (4, 2, 4)]  # ranks, ZeRO stage, expert-parallel size
    saved, history, found = str(tmp_path / "saved"), [], {}
    settings = tiny.job(lr=1e-3).optimizer
    for leg, (ranks, stage, experts) in enumerate(legs):
        config = {"zero_optimization": {"stage": stage}, "expert_parallel": {"enabled": True, "autoep_size": experts}}
        job = {"micro_size": 4 // ranks, "lr": settings.lr}
        steps = 2 * leg + 2
        spec: dict[str, Any] = {"steps": steps, "save": saved, "save_at": steps} | ({"load": saved} if leg else {})
        result, found = launch(tmp_path / f"leg{leg}", ranks, deepspeed=config, job=job, **spec)
        history += result["history"]
    model, decay = tiny.moe_model(), settings.weight_decay
    adamw = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=decay)
    reference = tiny.reference_run(model, 6, settings.lr, settings.grad_clip, adamw)
    assert min(norm for _, norm in reference) > settings.grad_clip  # clipping is active in every step
    assert [h[0] for h in history] == pytest.approx([loss for loss, _ in reference], abs=2e-6)
    assert [h[1] for h in history] == pytest.approx([norm for _, norm in reference], rel=5e-6)
    for name, tensor in dict(model.named_parameters()).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_two_ranks_train_with_the_file_as_it_is(path, tmp_path):
    """bf16, overlapped communication and all: the losses are finite and the model moves."""
    before = {name: p.detach().clone() for name, p in tiny.moe_model().named_parameters()}
    recorded, after = launch(tmp_path, 2, deepspeed=str(path), job={"grad_clip": 1.0}, steps=2)
    assert recorded["converted"] == (2 if "expert_parallel" in json.loads(path.read_text()) else 0)
    assert all(math.isfinite(loss) and norm > 0 for loss, norm, _ in recorded["history"])
    assert after.keys() == before.keys()
    moved = {name for name in before if float((after[name].float() - before[name]).abs().max()) > 1e-3}
    assert any(".experts." in name for name in moved)
    assert any(".visual." in name for name in moved)
