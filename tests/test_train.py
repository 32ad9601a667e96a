"""The training stage as users start it: processes, signals, other world sizes, broken inputs. Tiny, but real files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline import checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
STEPS = 8
TINY = {
    "scenes": {"train": 12, "val": 2, "test": 4, "width": 128, "height": 96, "workers": 1},
    "data": {"max_pixels": 128 * 96, "max_length": 256},
    "tokenizer": {"vocab_size": 400},
    "models": {
        "small": {
            "text": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16},
            "vision": {"hidden_size": 32, "intermediate_size": 48, "depth": 1},
        },
        "moe": {"upcycle": {"source": "models.small"}},
    },
    "targets": {"teacher": "jobs.teacher", "top_k": 8, "shard_samples": 16},
    "jobs": {
        "teacher": {"init": "models.small", "steps": 2, "global_batch_size": 8, "micro_batch_size": 2,
            "vision_words": 1},
        "clkd": {
            "init": "models.moe", "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "lr": 0.01,
            "grad_clip": 0.1, "checkpoint_every": 100, "log_every": 1, "distill": {}, "curriculum": {"window_steps": 3},
        },
    },
}  # fmt: skip


def stage(run, *command, ranks=0, check=True, **options):
    """Run a command of the pipeline on the run's recipe."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port()] if ranks else []
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    overrides = [f"{k}={v}" for k, v in options.items()]
    done = subprocess.run(
        [sys.executable, *launch, *command, "--config", str(run / "recipe.yaml"), *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def port():
    """A port that no other test of this process uses."""
    port.last = getattr(port, "last", 29600 + os.getpid() % 300) + 1
    return str(port.last)


def train(run, job="clkd", ds="cpu_smoke", ranks=2, check=True, **options):
    arguments = ("train.py", "--deepspeed_config", f"ds_configs/{ds}.json")
    return stage(run, *arguments, ranks=ranks, check=check, job=job, **options)


def weights(run, job="clkd"):
    return dict(checkpoint.read_parameters(checkpoint.latest(run / "jobs" / job / "checkpoints")))


def losses(run):
    lines = (run / "jobs" / "clkd" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder in which everything before the student's training is made."""
    run = tmp_path_factory.mktemp("run")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"run": {"dir": str(run)}, **TINY}))
    stage(run, "-m", "pipeline.scenes")
    stage(run, "-m", "pipeline.tokenizer")
    stage(run, "-m", "pipeline.student", "--model", "small", "--model", "moe")
    train(run, "teacher")
    stage(run, "-m", "pipeline.teacher")
    stage(run, "-m", "pipeline.hardness")
    return run


@pytest.fixture
def run(prepared, tmp_path):
    """A private copy of the prepared run."""
    copy = tmp_path / "run"
    shutil.copytree(prepared, copy)
    (copy / "recipe.yaml").write_text(yaml.safe_dump({"run": {"dir": str(copy)}, **TINY}))
    return copy


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """A finished job on two ranks with EP = 2."""
    copy = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(prepared, copy)
    (copy / "recipe.yaml").write_text(yaml.safe_dump({"run": {"dir": str(copy)}, **TINY}))
    train(copy)
    return copy


def interrupt(run, after, **options):
    """Start the job, send SIGTERM to the launcher when a step was logged, and wait for its end."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port(), "train.py",
        "--deepspeed_config", "ds_configs/cpu_smoke.json", "--config", str(run / "recipe.yaml"), "job=clkd",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = run / "jobs" / "clkd" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= after):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0


def test_resumed_equals_uninterrupted_bit_for_bit(run, uninterrupted):
    interrupt(run, after=2)
    saved = checkpoint.latest(run / "jobs" / "clkd" / "checkpoints")
    assert saved is not None
    assert 2 <= int(saved.name.split("-")[1]) < STEPS
    train(run)
    whole, resumed = weights(uninterrupted), weights(run)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(run) == losses(uninterrupted)


def test_two_ranks_with_expert_parallelism_equal_one_process(run, uninterrupted):
    sgd = {"jobs.clkd.optimizer": "sgd", "jobs.clkd.lr": 0.5, "jobs.clkd.router": "{balance: 0.01, z: 0.001}"}
    train(run, ds="dense", ranks=1, **sgd, **{"jobs.clkd.micro_batch_size": 4})
    one = weights(run), losses(run)
    shutil.rmtree(run / "jobs" / "clkd")
    train(run, ds="cpu_smoke", ranks=2, **sgd)
    two = weights(run), losses(run)
    assert two[1] == pytest.approx(one[1], rel=1e-5)
    for name, tensor in one[0].items():
        torch.testing.assert_close(two[0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_two_ranks_resume_on_one(run, uninterrupted):
    interrupt(run, after=2)
    train(run, ds="dense", ranks=1, **{"jobs.clkd.micro_batch_size": 4})
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(run):
    path = run / "models" / "moe" / "model.safetensors"
    files = [path] if path.exists() else sorted((run / "models" / "moe").glob("*.safetensors"))
    tensors = load_file(files[0])
    name = next(n for n in tensors if n.endswith("norm.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, files[0], metadata={"format": "pt"})
    done = train(run, check=False)
    assert done.returncode != 0
    assert "the loss is nan" in done.stderr
    assert checkpoint.latest(run / "jobs" / "clkd" / "checkpoints") is None


def test_a_store_of_another_temperature_is_refused_with_both_values(run):
    done = train(run, ranks=1, ds="dense", check=False, **{"targets.temperature": 2.0})
    assert done.returncode != 0
    assert "temperature" in done.stderr
    assert "1.0" in done.stderr
    assert "2.0" in done.stderr


def test_a_truncated_shard_is_refused(run):
    shard = next((run / "store").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    done = train(run, ranks=1, ds="dense", check=False)
    assert done.returncode != 0
    assert shard.name in done.stderr


def test_a_missing_image_is_refused_by_name(run):
    (run / "data" / "train" / "images" / "0003.jpg").unlink()
    done = train(run, ranks=1, ds="dense", check=False)
    assert done.returncode != 0
    assert "0003.jpg" in done.stderr


def test_world_size_not_divisible_by_expert_parallel_size(run):
    done = train(run, ranks=1, ds="cpu_smoke", check=False)
    assert done.returncode != 0
    assert "autoep_size 2 does not divide the 1 ranks" in done.stderr


def test_changed_settings_do_not_continue_another_job(run):
    interrupt(run, after=1)
    done = train(run, check=False, **{"jobs.clkd.lr": 0.02})
    assert done.returncode != 0
    assert "lr: checkpoint 0.01, recipe 0.02" in done.stderr


def test_the_chain_goes_on_after_kill_9(run, uninterrupted):
    command = [sys.executable, "-m", "pipeline.demo", "--config", str(run / "recipe.yaml")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    chain = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = run / "jobs" / "clkd" / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.02)
    chain.kill()
    chain.wait()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = weights(uninterrupted), weights(run)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (run / "report.html").is_file()
