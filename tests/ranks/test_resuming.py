"""Training as users start it, interrupted and resumed, on other world sizes and with the other MoE layer."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.models import checkpoint_folder
from tests.helpers.recipes import STEPS
from tests.helpers.training import (
    ONE_RANK,
    interrupt,
    last_order,
    losses,
    metrics,
    newest,
    same_weights,
    saved_step,
    train,
    weights,
)


def test_resumed_equals_uninterrupted_bit_for_bit(run, uninterrupted):
    assert interrupt(run, after=2) == (85, 85)
    assert 2 <= saved_step(run) < STEPS
    train(run)
    assert same_weights(weights(run), weights(uninterrupted))
    assert losses(run) == losses(uninterrupted)


def test_a_complete_store_is_enough_and_no_rank_needs_the_teacher(run, uninterrupted):
    shutil.rmtree(run / "jobs" / "teacher")
    train(run)
    assert same_weights(weights(run), weights(uninterrupted))


def test_a_signalled_process_ends_with_85_and_goes_on(run):
    assert interrupt(run, after=1, ranks=1, number=signal.SIGUSR1) == (85,)
    first = saved_step(run)
    assert interrupt(run, after=first + 1, ranks=1, number=signal.SIGTERM) == (85,)
    assert 1 <= first < saved_step(run) < STEPS
    assert metrics(run, "step") == list(range(1, saved_step(run) + 1))
    assert not (run / "jobs" / "clkd" / "model").exists()


def test_two_ranks_with_expert_parallelism_equal_one_process(run):
    sgd = {"jobs.clkd.optimizer.kind": "sgd", "jobs.clkd.optimizer.lr": 0.5}
    train(run, **ONE_RANK, **sgd)
    one, order = (weights(run), losses(run)), last_order(run)
    assert min(metrics(run, "grad_norm")) > 0.1  # clipping is active in every step
    shutil.rmtree(run / "jobs" / "clkd")
    train(run, ds="cpu_smoke", ranks=2, **sgd)
    two = weights(run), losses(run)
    assert torch.equal(last_order(run), order)
    assert two[1] == pytest.approx(one[1], rel=1e-5)
    for name, tensor in one[0].items():
        torch.testing.assert_close(two[0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_two_ranks_resume_on_one(run, uninterrupted):
    interrupt(run, after=2)
    train(run, **ONE_RANK)
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-4)
    assert torch.equal(last_order(run), last_order(uninterrupted))


def test_deepspeeds_own_moe_layer_goes_on_where_autoep_stopped(run, uninterrupted):
    """Two ranks share the experts in both; the model is exported as after AutoEP."""
    interrupt(run, after=2)
    train(run, **{"jobs.clkd.moe.layer": "native"})
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-4)
    last = json.loads((run / "jobs" / "clkd" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["dropped"] == 0.0  # AutoEP has no such metric
    exported, wanted = (load_file(next((r / "jobs/clkd/model").glob("*.safetensors"))) for r in (run, uninterrupted))
    assert exported.keys() == wanted.keys()


def test_dropped_tokens_are_logged_and_a_residual_model_is_not_exported(run):
    settings = "{drop_tokens: true, capacity_factor: 0.5, use_rts: true, use_residual: true}"
    done = train(run, **{"jobs.clkd.moe.layer": "native", "jobs.clkd.moe.native": settings})
    assert 0.3 < min(metrics(run, "dropped")) < 0.8  # of an even share half is kept
    assert "no model is exported" in done.stdout
    assert not (run / "jobs" / "clkd" / "model").exists()
    assert any(".residual.mlp." in name for name in weights(run))


def test_weights_that_are_not_numbers_end_as_no_model(run):
    """No step changes anything; the job stops at its bound, or else nothing is exported, on every rank alike."""
    path = run / "models" / "moe" / "model.safetensors"
    files = [path] if path.exists() else sorted((run / "models" / "moe").glob("*.safetensors"))
    tensors = load_file(files[0])
    name = next(n for n in tensors if n.endswith("norm.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, files[0], metadata={"format": "pt"})
    done = train(run, check=False, **{"jobs.clkd.optimizer.max_bad_steps": 3})
    assert done.statuses == (2, 2)
    assert "the loss is nan" in done.stderr + done.stdout and "4 of 4 steps had a loss" in done.stderr
    assert saved_step(run) == 4
    done = train(run, check=False)
    assert done.statuses == (2, 2) and saved_step(run) == STEPS
    assert "the training engine's own logits are not finite" in done.stderr
    assert not (run / "jobs" / "clkd" / "model").exists()


def test_a_loss_that_bursts_later_leaves_checkpoints_and_no_model(run):
    burst = {
        "jobs.clkd.optimizer.lr": 1e30, "jobs.clkd.checkpoint.every": 1, "jobs.clkd.batch.micro_size": 4,
        "jobs.clkd.optimizer.max_bad_steps": 2,
    }  # fmt: skip
    done = train(run, ranks=0, ds="dense", check=False, **burst)
    assert done.returncode == 2
    last = newest(run)
    assert f"The checkpoint of step {saved_step(run)} is written" in done.stderr
    checkpoint_folder.verify(last)
    assert all(bool(t.isfinite().all()) for _, t in checkpoint_folder.read_parameters(last))
    assert not (run / "jobs" / "clkd" / "model").exists()
