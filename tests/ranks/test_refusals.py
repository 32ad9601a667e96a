"""What a training stage refuses: with status 2 and a message that names it, and nothing is written."""

import json
import shutil
import socket

import pytest

from pipeline.cli import main as clkd
from pipeline.errors import DataError, run_main
from pipeline.files import weights_hash
from pipeline.training.process import start_distributed
from tests.helpers import ranks
from tests.helpers.training import interrupt, stage, train


def refused(run, field, *values, **options):
    done = train(run, ranks=0, ds="dense", check=False, **options)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for value in (field, *values):
        assert str(value) in done.stderr
    assert not (run / "jobs" / "clkd" / "checkpoints").exists()


def test_a_store_of_another_origin_is_refused_with_both_values(run):
    refused(run, "temperature", 1.0, 2.0, **{"targets.temperature": 2.0})
    trained, untrained = (weights_hash(run / p) for p in ("jobs/teacher/model", "models/small"))
    refused(run, "teacher_weights", trained, untrained, **{"targets.teacher": "models.small"})
    stage(run, "tokenizer", **{
        "run.dir": run / "other", "data.root": run / "data", "benchmark.vocab_size": 380})  # fmt: skip
    refused(run, "processor_tokenizer", **{"data.processor": run / "other" / "processor"})


def test_an_empty_answer_is_refused_by_its_record_before_anything_starts(run):
    path = run / "data" / "CODA-LM" / "Train" / "val_0003.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"driving_suggestion": " "}))
    shutil.rmtree(run / "jobs" / "teacher")
    done = train(run, "teacher", ranks=0, ds="dense", check=False)
    assert done.returncode == 2
    assert "val_0003.json, driving_suggestion" in done.stderr and "empty answer" in done.stderr
    with pytest.raises(DataError, match=r"empty answer: .*val_0003\.json, driving_suggestion"):
        clkd(["teacher", str(run / "recipe.yaml")])


def test_a_truncated_shard_is_refused(run):
    shard = next((run / "store").glob("*.targets.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(run, shard.name)


def test_a_truncated_shard_of_sketches_is_refused_where_they_are_used(run):
    shard = next((run / "store").glob("*.sketches.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(run, shard.name, **{"jobs.clkd.distill.features": "{student_layer: 1}"})


def test_a_missing_image_is_refused_by_name(run):
    (run / "data" / "val" / "images" / "0003.jpg").unlink()
    refused(run, "0003.jpg")


def test_world_size_not_divisible_by_expert_parallel_size(run):
    done = train(run, ranks=1, ds="cpu_smoke", check=False)
    assert done.returncode == 2
    assert "autoep_size 2 does not divide the 1 ranks" in done.stderr


def test_changed_settings_do_not_continue_another_job(run):
    interrupt(run, after=1)
    done = train(run, check=False, **{"jobs.clkd.optimizer.lr": 0.02})
    assert done.statuses == (2, 2)
    assert "optimizer.lr: checkpoint 0.01, recipe 0.02" in done.stderr


def test_a_finished_job_is_left_alone_and_other_settings_are_refused(uninterrupted):
    path = uninterrupted / "jobs" / "clkd" / "model" / "export.json"
    before = path.stat().st_mtime_ns
    assert "is finished" in train(uninterrupted, ranks=0, ds="dense").stdout
    done = train(uninterrupted, ranks=0, ds="dense", check=False, **{"jobs.clkd.optimizer.lr": 0.02})
    assert done.returncode == 2
    assert "optimizer.lr: checkpoint 0.01, recipe 0.02" in done.stderr
    assert path.stat().st_mtime_ns == before


def test_a_port_that_is_in_use():
    """slurm/launch.sh takes a free one; should another program be faster, the job is queued again and takes another."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = ranks.run(join, env=launcher | {"CLKD_COLLECTIVE_TIMEOUT_S": "20"}, check=False)
    assert done.returncode == 75, done.stderr
    assert f"port {port} is in use here. Start the job again with another MASTER_PORT" in done.stderr


def join():
    """What a rank does first."""
    run_main(start_distributed)
