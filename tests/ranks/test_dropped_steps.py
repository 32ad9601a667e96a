"""Steps whose loss or gradient is not finite: they change nothing, are listed, and a person gets past them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli import main as clkd
from pipeline.models import checkpoint_folder
from tests.helpers import bad_samples, ranks, tiny
from tests.helpers.engine_worker import launch
from tests.helpers.paths import ROOT
from tests.helpers.training import copied, metrics, newest, same_weights, saved_step, stage, train, weights

EP2 = {"expert_parallel": {"enabled": True, "autoep_size": 2}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_dropped_step_is_as_if_it_had_not_been(tmp_path: Path, stage: int) -> None:
    """AdamW, clipping, accumulation, EP 2, against plain torch that leaves two of five steps out.

    One is dropped by word, though its gradients are finite; in the other one rank's gradients are NaN.
    """
    lr = 1e-3
    recorded, found = launch(
        tmp_path, 2, deepspeed=EP2 | {"zero_optimization": {"stage": stage}}, job={"lr": lr, "micro_size": 1},
        steps=5, bad={"1": "drop", "3": "gradient"},
    )  # fmt: skip
    assert [math.isfinite(norm) for _, norm, _ in recorded["history"]] == [True, False, True, False, True]
    settings, model = tiny.job(lr=lr).optimizer, tiny.moe_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=lr, betas=settings.betas, weight_decay=settings.weight_decay)
    reference = tiny.reference_run(model, 5, lr, settings.grad_clip, adamw, left_out=(1, 3))
    assert [h[0] for h in recorded["history"]] == pytest.approx([loss for loss, _ in reference], abs=2e-6)
    for name, tensor in dict(model.named_parameters()).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("config", ["zero1_ep", "zero2_ep", "zero3_ep", "stage0"])
def test_in_bf16_too(tmp_path: Path, config: str, clip: float) -> None:
    """Nothing but bad steps: the weights stay what they were, bit for bit."""
    ds: Any = str(ROOT / "ds_configs" / f"{config}.json")
    if config == "stage0":
        ds = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}
    common: dict[str, Any] = {"deepspeed": ds, "job": {"grad_clip": clip}}
    _, before = launch(tmp_path / "a", 2, **common, steps=0)
    recorded, after = launch(tmp_path / "b", 2, **common, steps=2, bad={"0": "gradient", "1": "drop"})
    assert not any(math.isfinite(norm) for _, norm, _ in recorded["history"])
    assert same_weights(after, before)
    _, moved = launch(tmp_path / "c", 2, **common, steps=2)
    assert not same_weights(moved, before)


def poisoned(run: Path, bad: str, *words: str, check: bool = True, **overrides: object) -> ranks.Done:
    """`clkd train` on two ranks, where the image of one sample is not a number."""
    changes = [f"{key}={value}" for key, value in overrides.items()]
    command = ("train", str(run / "recipe.yaml"), "--deepspeed_config", "cpu_smoke", "job=clkd", *words, *changes)
    return ranks.run(bad_samples.clkd, bad, *command, ranks=2, check=check)


@pytest.fixture(scope="module")
def bad(prepared: Path) -> str:
    """sample_id of a sample that several steps have."""
    return bad_samples.easiest(prepared)


def listed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "jobs" / "clkd" / "bad_steps.jsonl").read_text().splitlines()]


def test_a_job_gets_past_a_bad_sample(run: Path, bad: str) -> None:
    poisoned(run, bad, **{"jobs.clkd.checkpoint.every": 1})
    lines = listed(run)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps
    assert all(bad in line["samples"] and line["what"] == "loss" and line["value"] == "nan" for line in lines)
    assert set(metrics(run, "step")).isdisjoint(steps)
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
    state = checkpoint_folder.read_meta(newest(run))["state"]
    assert state["bad_steps"] == len(steps)
    # The exported model says so, and the hardness table holds numbers alone.
    card = (run / "jobs" / "clkd" / "model" / "README.md").read_text()
    assert f"{len(steps)} steps with a loss or gradient that is not finite changed nothing" in card


def test_too_many_bad_steps_end_it_with_its_state_saved_and_it_goes_on_with_other_settings(
    prepared: Path, run: Path, bad: str, tmp_path: Path
) -> None:
    done = poisoned(run, bad, check=False, **{"jobs.clkd.optimizer.max_bad_steps": 0})
    first = listed(run)[0]["step"]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "max_bad_steps allows (0)" in done.stderr and "--change-settings" in done.stderr
    assert saved_step(run) == first
    # Another bound needs no word; the same steps follow as in a run that had it from the start.
    other = copied(prepared, tmp_path / "other")
    poisoned(other, bad)
    poisoned(run, bad)
    assert listed(run) == listed(other)
    assert same_weights(weights(run), weights(other))


def test_settings_change_from_a_checkpoint_with_one_word_and_are_recorded(
    run: Path, bad: str, uninterrupted: Path
) -> None:
    stopped = {"jobs.clkd.optimizer.max_bad_steps": 0}
    poisoned(run, bad, check=False, **stopped)
    step, lower = saved_step(run), {"jobs.clkd.optimizer.lr": 0.005, "jobs.clkd.moe.balance": 0.02}
    for changes, said in (
        (lower, "go on from the checkpoint with the new ones"),
        (lower | {"jobs.clkd.steps": 9}, "--change-settings allows optimizer.lr, moe.balance alone"),
    ):
        done = train(run, check=False, **changes)
        assert done.returncode == 2 and said in done.stderr
        assert "optimizer.lr: checkpoint 0.01, recipe 0.005" in done.stderr
    done = stage(
        run, "train", "--deepspeed_config", "cpu_smoke", "--change-settings", check=False, ranks=2, job="clkd",
        **lower | {"jobs.clkd.steps": 9},
    )  # fmt: skip
    assert done.returncode == 2 and saved_step(run) == step
    stage(run, "train", "--deepspeed_config", "cpu_smoke", "--change-settings", ranks=2, job="clkd", **lower)
    ours, before = (dict(zip(metrics(r, "step"), metrics(r, "lr"), strict=True)) for r in (run, uninterrupted))
    assert len(ours) == 8 - step
    assert all(lr == pytest.approx(before[at] / 2) for at, lr in ours.items())
    changes = checkpoint_folder.read_meta(newest(run))["state"]["changes"]
    assert changes == [
        {"step": step, "setting": "optimizer.lr", "before": 0.01, "after": 0.005},
        {"step": step, "setting": "moe.balance", "before": 0.01, "after": 0.02},
    ]
    assert "optimizer.lr was 0.005, 0.01 before" in (run / "jobs" / "clkd" / "model" / "README.md").read_text()
    assert clkd(["train", str(run / "recipe.yaml"), "job=clkd", *(f"{k}={v}" for k, v in lower.items())]) == 0
