"""The training stage as users start it: processes, signals, other world sizes, broken inputs. Tiny, but real files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration

from pipeline.data.collate import collate
from pipeline.data.processor import Processor
from pipeline.data.readers import read_samples
from pipeline.files import weights_hash
from pipeline.method.hardness import HardnessTable
from pipeline.models import checkpoint_folder
from pipeline.recipe import load_recipe, merge
from pipeline.targets.store import SoftTargetStore
from pipeline.training.batches import MODEL_INPUTS
from pipeline.training.validation_gap import hold_out
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
STEPS, WINDOW, BATCH = 8, 7, 8
"""An interrupt after step 2 to 6 lies inside the first window; the second is planned from the resumed table."""
DISTILL = {"token_tilt": [-1.0, 1.0], "alpha_end": 0.0, "release_from": 0.2, "release_to": 0.9}
"""Every part at work within a few steps, and the teacher gone at the end."""
JOB = {
    "trainable": "all", "batch": {"global_size": BATCH, "micro_size": 2},
    "performance": {"activation_checkpointing": False},
}  # fmt: skip
TINY = {
    "benchmark": {
        "scenes": {"train": 12, "val": 2, "test": 4, "width": 128, "height": 96, "workers": 1},
        "vocab_size": 400,
        "models": {
            "small": {
                "text": {
                    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "head_dim": 16,
                },
                "vision": {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 4},
            },
        },
        "word_alignment": {"teacher": 1},
    },
    "data": {"min_pixels": 1024, "max_pixels": 128 * 96, "max_length": 256, "workers": 0},
    "models": {"moe": {"upcycle": {"source": "models.small"}}},
    "targets": {"teacher": "jobs.teacher", "dtype": "float32", "top_k": 8, "shard_samples": 16},
    "jobs": {
        "teacher": {**JOB, "init": "models.small", "steps": 2, "optimizer": {"lr": 1e-3}},
        "clkd": {
            **JOB, "init": "models.moe", "steps": STEPS, "log_every": 1,
            "optimizer": {"lr": 0.01, "grad_clip": 0.1}, "distill": DISTILL,
            "curriculum": {
                "window_steps": WINDOW, "competence_start": 0.3, "competence_until": 0.5, "tilt": [-1.0, 1.0],
            },
        },
    },
    "cluster": {"deepspeed": "cpu_smoke"},
}  # fmt: skip


def stage(run, *command, ranks=0, check=True, **options):
    """Run a command of the pipeline on the run's recipe."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port()] if ranks else []
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    overrides = [f"{k}={v}" for k, v in options.items()]
    done = subprocess.run(
        [sys.executable, *launch, *command, str(run / "recipe.yaml"), *overrides],
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
    return dict(checkpoint_folder.read_parameters(checkpoint_folder.latest(run / "jobs" / job / "checkpoints")))


def metrics(run, key):
    lines = (run / "jobs" / "clkd" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def losses(run):
    return metrics(run, "loss")


def saved_step(run):
    return int(checkpoint_folder.latest(run / "jobs" / "clkd" / "checkpoints").name.split("-")[1])


def last_order(run):
    """Table indices of the steps trained in the last window."""
    arrays = load_file(checkpoint_folder.latest(run / "jobs" / "clkd" / "checkpoints") / "arrays.safetensors")
    return arrays["plan/index"][: STEPS % WINDOW * BATCH]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder in which everything before the student's training is made."""
    run = tmp_path_factory.mktemp("run")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"run": {"dir": str(run)}, **TINY}))
    stage(run, "-m", "pipeline", "scenes")
    stage(run, "-m", "pipeline", "tokenizer")
    stage(run, "-m", "pipeline", "student", "--model", "small", "--model", "moe")
    train(run, "teacher")
    stage(run, "-m", "pipeline", "teacher")
    stage(run, "-m", "pipeline", "hardness")
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


def interrupt(run, after, ranks=2, number=signal.SIGTERM):
    """Start the job, signal the launcher (one rank: the job itself) when a step was logged: the exit status."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port()] if ranks == 2 else []
    ds = ("cpu_smoke" if ranks == 2 else "dense", 4 // ranks)
    command = [
        sys.executable, *launch, "train.py", "--deepspeed_config", f"ds_configs/{ds[0]}.json",
        "--config", str(run / "recipe.yaml"), "job=clkd", f"jobs.clkd.batch.micro_size={ds[1]}",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = run / "jobs" / "clkd" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") >= after):
        time.sleep(0.02)
    process.send_signal(number)
    status = process.wait(120)
    assert status != 0
    return status


def test_resumed_equals_uninterrupted_bit_for_bit(run, uninterrupted):
    interrupt(run, after=2)
    assert 2 <= saved_step(run) < STEPS
    train(run)
    whole, resumed = weights(uninterrupted), weights(run)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(run) == losses(uninterrupted)


def test_a_signalled_process_ends_with_85_and_goes_on(run):
    assert interrupt(run, after=1, ranks=1, number=signal.SIGUSR1) == 85
    first = saved_step(run)
    assert interrupt(run, after=first + 1, ranks=1, number=signal.SIGTERM) == 85
    assert 1 <= first < saved_step(run) < STEPS
    assert metrics(run, "step") == list(range(1, saved_step(run) + 1))
    assert not (run / "jobs" / "clkd" / "model").exists()


def test_two_ranks_with_expert_parallelism_equal_one_process(run, uninterrupted):
    sgd = {"jobs.clkd.optimizer.kind": "sgd", "jobs.clkd.optimizer.lr": 0.5}
    train(run, ds="dense", ranks=1, **sgd, **{"jobs.clkd.batch.micro_size": 4})
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
    train(run, ds="dense", ranks=1, **{"jobs.clkd.batch.micro_size": 4})
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
    assert checkpoint_folder.latest(run / "jobs" / "clkd" / "checkpoints") is None


def test_a_loss_that_bursts_later_leaves_the_last_checkpoint(run):
    burst = {"jobs.clkd.optimizer.lr": 1e30, "jobs.clkd.checkpoint.every": 1, "jobs.clkd.batch.micro_size": 4}
    done = train(run, ranks=0, ds="dense", check=False, **burst)
    assert done.returncode == 2
    last = checkpoint_folder.latest(run / "jobs" / "clkd" / "checkpoints")
    assert last is not None
    assert f"the last checkpoint is {last.name}" in done.stderr
    checkpoint_folder.verify(last)
    assert all(bool(t.isfinite().all()) for _, t in checkpoint_folder.read_parameters(last))
    assert not (run / "jobs" / "clkd" / "model").exists()


ADAPTIVE = {
    "optimizer": {"lr": 3e-4},  # so that the gap closes little by little
    "distill": DISTILL | {"release": "adaptive", "release_from": 0.0, "adaptive": {"samples": 9, "every": 0.25}},
    "hardness": {"dynamic": False},
}


def make_adaptive(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["jobs"]["clkd"] = merge(recipe["jobs"]["clkd"], ADAPTIVE)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


@pytest.fixture(scope="module")
def adaptive(prepared, tmp_path_factory):
    """A finished job on one rank whose release follows the gap to the teacher."""
    copy = tmp_path_factory.mktemp("adaptive") / "run"
    shutil.copytree(prepared, copy)
    (copy / "recipe.yaml").write_text(yaml.safe_dump({"run": {"dir": str(copy)}, **TINY}))
    train(make_adaptive(copy), ds="dense", ranks=1, **{"jobs.clkd.batch.micro_size": 4})
    return copy


def release_of(run):
    return [metrics(run, key) for key in ("alpha_min", "alpha_max", "gap_left", "targets_read")]


def test_an_adaptive_release_follows_the_gap_that_transformers_and_the_store_say(adaptive):
    """Before the first step: every held-out sample by itself through transformers' model, against the stored log p."""
    recipe = load_recipe(adaptive / "recipe.yaml")
    processor = Processor.load(recipe.processor_dir, recipe.data)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(adaptive / "models" / "moe", dtype=torch.float32)
    store = SoftTargetStore.open(recipe.store_url, None)
    trained, held = hold_out(read_samples("coda_lm", recipe.data_root, "Train"), 9, recipe.run.seed)
    student, teacher, tokens = 0.0, 0.0, 0
    for sample in held:
        batch = collate([processor.encode(sample)], processor.pad_id, processor.image_token_id)
        with torch.no_grad():
            logits = model(**{k: batch[k] for k in MODEL_INPUTS}).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        student += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        teacher -= float(store.read(sample.sample_id).gold_logprob.double().sum())
        tokens += int((labels != -100).sum())
    assert metrics(adaptive, "gap")[0] == pytest.approx((student - teacher) / tokens, abs=1e-5)
    left = metrics(adaptive, "gap_left")
    assert left[0] == left[1] == 1 and left[2] == left[3] and left[4] == left[5] and left == sorted(left, reverse=True)
    assert 0 < left[-1] < left[2] < 1
    assert all(64 * share == round(64 * share) for share in left)
    table = HardnessTable.load(adaptive / "jobs" / "clkd" / "hardness.parquet")
    assert table.is_of([s.sample_id for s in trained])
    assert table.visits.sum() == -(-STEPS // WINDOW) * WINDOW * BATCH  # of whole windows
    assert (table.last_step == -1).all()  # not dynamic: nothing was scored, and yet visits count


def test_an_adaptive_release_resumes_bit_for_bit(run, adaptive):
    interrupt(make_adaptive(run), after=3, ranks=1)
    assert 3 <= saved_step(run) < STEPS
    train(run, ds="dense", ranks=1, **{"jobs.clkd.batch.micro_size": 4})
    assert release_of(run) == release_of(adaptive)
    assert metrics(run, "gap") == metrics(adaptive, "gap")
    whole, resumed = weights(adaptive), weights(run)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_adaptive_release_is_the_same_on_two_ranks(run, adaptive):
    """Nine held-out samples: one rank has five, the other four and a filler."""
    train(make_adaptive(run))
    assert release_of(run) == release_of(adaptive)
    assert metrics(run, "gap") == pytest.approx(metrics(adaptive, "gap"), abs=1e-5)
    assert losses(run) == pytest.approx(losses(adaptive), rel=1e-5)


def refused(run, field, *values, **options):
    done = train(run, ranks=0, ds="dense", check=False, **options)
    assert done.returncode == 2, done.stderr[-2000:]
    assert field in done.stderr
    for value in values:
        assert str(value) in done.stderr
    assert not (run / "jobs" / "clkd" / "checkpoints").exists()


def test_a_store_of_another_origin_is_refused_with_both_values(run):
    refused(run, "temperature", 1.0, 2.0, **{"targets.temperature": 2.0})
    trained, untrained = (weights_hash(run / p) for p in ("jobs/teacher/model", "models/small"))
    refused(run, "teacher_weights", trained, untrained, **{"targets.teacher": "models.small"})
    stage(run, "-m", "pipeline", "tokenizer", **{
        "run.dir": run / "other", "data.root": run / "data", "benchmark.vocab_size": 380})  # fmt: skip
    refused(run, "processor_tokenizer", **{"data.processor": run / "other" / "processor"})


def test_an_empty_answer_is_refused_by_its_record_before_anything_starts(run):
    path = run / "data" / "CODA-LM" / "Train" / "val_0003.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"driving_suggestion": " "}))
    shutil.rmtree(run / "jobs" / "teacher")
    for done in (
        train(run, "teacher", ranks=0, ds="dense", check=False),
        stage(run, "-m", "pipeline", "teacher", check=False),
    ):
        assert done.returncode == 2
        assert "val_0003.json, driving_suggestion" in done.stderr
        assert "empty answer" in done.stderr


def test_a_truncated_shard_is_refused(run):
    shard = next((run / "store").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    done = train(run, ranks=1, ds="dense", check=False)
    assert done.returncode != 0
    assert shard.name in done.stderr


def test_a_missing_image_is_refused_by_name(run):
    (run / "data" / "val" / "images" / "0003.jpg").unlink()
    done = train(run, ranks=1, ds="dense", check=False)
    assert done.returncode != 0
    assert "0003.jpg" in done.stderr


def test_world_size_not_divisible_by_expert_parallel_size(run):
    done = train(run, ranks=1, ds="cpu_smoke", check=False)
    assert done.returncode != 0
    assert "autoep_size 2 does not divide the 1 ranks" in done.stderr


def test_changed_settings_do_not_continue_another_job(run):
    interrupt(run, after=1)
    done = train(run, check=False, **{"jobs.clkd.optimizer.lr": 0.02})
    assert done.returncode != 0
    assert "optimizer.lr: checkpoint 0.01, recipe 0.02" in done.stderr


def test_a_finished_job_is_left_alone_and_other_settings_are_refused(uninterrupted):
    path = uninterrupted / "jobs" / "clkd" / "model" / "export.json"
    before = path.stat().st_mtime_ns
    assert "is finished" in train(uninterrupted, ranks=0, ds="dense").stdout
    done = train(uninterrupted, ranks=0, ds="dense", check=False, **{"jobs.clkd.optimizer.lr": 0.02})
    assert done.returncode == 2
    assert "optimizer.lr: checkpoint 0.01, recipe 0.02" in done.stderr
    assert path.stat().st_mtime_ns == before


def test_the_chain_goes_on_after_kill_9(run, uninterrupted):
    command = [sys.executable, "-m", "pipeline", "run", str(run / "recipe.yaml")]
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
