"""Jobs that are stopped and go on with other samples: refused without a word, and known by id with one."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pipeline.data.readers import read_samples
from pipeline.method.hardness import NEVER, HardnessTable
from pipeline.models import checkpoint_folder
from tests.helpers.recipes import ADAPTIVE, BATCH, STEPS, WINDOW
from tests.helpers.training import (
    copied,
    interrupt,
    last_order,
    losses,
    metrics,
    newest,
    saved_step,
    stage,
    train,
)

OFTEN = {"jobs.clkd.checkpoint.every": 1, "jobs.clkd.checkpoint.keep": 20}


def records(run: Path) -> list[Path]:
    return sorted((run / "data" / "CODA-LM" / "Train").glob("*.json"))


def edit(path: Path, words: str) -> None:
    """Another answer: the same record makes another sample."""
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"driving_suggestion": f"{record['driving_suggestion']} {words}"}))


def remove(path: Path) -> None:
    path.unlink()


def add(path: Path) -> None:
    """A record of an image of its own, with other words on it."""
    images = path.parents[2] / "val" / "images"
    shutil.copy(images / f"{path.stem.split('_')[1]}.jpg", images / "0999.jpg")
    shutil.copy(path, path.with_name("val_0999.json"))
    edit(path.with_name("val_0999.json"), "Then go on.")


def scored_anew(run: Path) -> None:
    """What a job with a teacher needs of new samples."""
    stage(run, "teacher")
    stage(run, "hardness")


def going_on(run: Path, ranks: int, **overrides: object) -> str:
    """Train with other samples to the end: what was printed."""
    ds, size = ("cpu_smoke", 2) if ranks == 2 else ("dense", 4)
    return stage(
        run, "train", "--deepspeed_config", ds, "--change-settings", ranks=ranks, job="clkd",
        **{"jobs.clkd.batch.micro_size": size}, **OFTEN, **overrides,
    ).stdout  # fmt: skip


def at(run: Path, step: int) -> tuple[dict, dict[str, np.ndarray], list[str]]:
    """(state, arrays, ids of the split) of the checkpoint after `step` steps."""
    folder = run / "jobs" / "clkd" / "checkpoints" / f"step-{step:08d}"
    state = checkpoint_folder.read_meta(folder)["state"]
    raw = (run / "jobs" / "clkd" / "samples" / f"{state['samples']['fingerprint']}.ids").read_bytes()
    ids = [raw[i : i + 16].hex() for i in range(0, len(raw), 16)]
    return state, load_file(folder / "arrays.safetensors"), ids


@pytest.fixture(scope="module")
def stopped(prepared, tmp_path_factory):
    """A job stopped inside its first window, whose data set then lost a record, got one, and has another edited."""
    run = copied(prepared, tmp_path_factory.mktemp("changed") / "run")
    interrupt(run, after=2)
    edit(records(run)[1], "Slow down.")
    scored_anew(run)
    done = train(run, check=False)
    assert done.statuses == (2, 2) and "Traceback" not in done.stderr
    assert "started with other samples" in done.stderr and "but 1 are others (1 added, 1 removed)" in done.stderr
    remove(records(run)[0])
    add(records(run)[2])
    scored_anew(run)
    return run


@pytest.fixture(scope="module")
def gone_on(stopped, tmp_path_factory):
    """It went on, on two ranks that share the experts."""
    run = tmp_path_factory.mktemp("gone-on") / "run"
    shutil.copytree(stopped, run)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(stopped), str(run)))
    return run, going_on(run, 2)


def test_it_is_refused_with_what_has_changed(stopped):
    _, _, before = at(stopped, saved_step(stopped))
    now = {sample.sample_id for sample in read_samples("coda_lm", stopped / "data", "Train")}
    added, removed = len(now - set(before)), len(set(before) - now)
    assert added > 1 and removed > 1 and added != removed
    done = train(stopped, check=False)
    assert done.statuses == (2, 2) and "Traceback" not in done.stderr
    said = f"samples: checkpoint {len(before)}, now {len(now)} ({added} added, {removed} removed)"
    assert said in done.stderr and "val_0999.json" in done.stderr
    assert f"removed: {min(set(before) - now)}" in done.stderr
    assert "start with --change-settings to go on from the checkpoint" in done.stderr


def test_every_sample_keeps_what_is_known_of_it_and_new_ones_start_anew(gone_on):
    run, _ = gone_on
    step = at(run, STEPS)[0]["changes"][0]["step"]
    assert 2 <= step < WINDOW
    (before, old, old_ids), (_, new, ids) = at(run, step), at(run, step + 1)
    assert set(old_ids) - set(ids) and set(ids) - set(old_ids)
    in_step = {ids[i] for i in new["plan/index"][:BATCH]}
    untrained = Counter(old_ids[i] for i in old["plan/index"][(step - before["plan"]["start"]) * BATCH :])
    untrained += Counter(old_ids[i] for i in old.get("plan/next/index", []))
    planned = Counter(ids[i] for i in [*new["plan/index"], *new.get("plan/next/index", [])])
    prior = HardnessTable.load(run / "hardness.parquet")
    assert prior.is_of(ids)
    for place, sample_id in enumerate(ids):
        visits, known = new["hardness/visits"][place], sample_id in old_ids
        was = old_ids.index(sample_id) if known else place
        assert visits == planned[sample_id] + (old["hardness/visits"][was] - untrained[sample_id] if known else 0)
        if sample_id not in in_step:
            for column, start in (("difficulty", prior.prior[place]), ("last_step", NEVER)):
                assert new[f"hardness/{column}"][place] == (old[f"hardness/{column}"][was] if known else start)


def test_the_rest_of_the_window_is_planned_anew(gone_on):
    run, _ = gone_on
    step = at(run, STEPS)[0]["changes"][0]["step"]
    state, arrays, ids = at(run, step + 1)
    assert state["plan"] == {"start": step, "end": WINDOW}
    index = arrays["plan/index"]
    assert len(index) == (WINDOW - step) * BATCH and index.max() < len(ids)
    assert at(run, STEPS)[0]["plan"] == {"start": WINDOW, "end": 2 * WINDOW}


def test_it_is_recorded_with_counts(gone_on):
    run, printed = gone_on
    state, _, ids = at(run, STEPS)
    (change,) = state["changes"]
    _, _, before = at(run, change["step"])
    added, removed = len(set(ids) - set(before)), len(set(before) - set(ids))
    counts = {"before": len(before), "after": len(ids), "added": added, "removed": removed}
    assert change == {"step": change["step"], "setting": "samples", **counts}
    words = f"({added} added, {removed} removed)"
    assert f"samples {len(before)} -> {len(ids)} {words}" in printed
    card = (run / "jobs" / "clkd" / "model" / "README.md").read_text()
    assert f"samples was {len(ids)}, {len(before)} before {words}." in card


def test_another_world_size_plans_and_learns_the_same(stopped, gone_on, tmp_path):
    two, _ = gone_on
    one = tmp_path / "run"
    shutil.copytree(stopped, one)
    (one / "recipe.yaml").write_text((one / "recipe.yaml").read_text().replace(str(stopped), str(one)))
    going_on(one, 1)
    for step in {at(two, STEPS)[0]["changes"][0]["step"] + 1, STEPS}:
        assert np.array_equal(at(one, step)[1]["plan/index"], at(two, step)[1]["plan/index"])
        for name in ("visits", "last_step", "last_window"):
            assert np.array_equal(at(one, step)[1][f"hardness/{name}"], at(two, step)[1][f"hardness/{name}"])
    assert torch.equal(last_order(one), last_order(two))
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)


def test_a_job_without_a_table_goes_on_too(prepared, tmp_path):
    run = copied(prepared, tmp_path / "run", distill=None, curriculum=None)
    interrupt(run, after=2)
    step = saved_step(run)
    remove(records(run)[4])
    done = train(run, check=False)
    assert done.statuses == (2, 2) and "(0 added, " in done.stderr
    going_on(run, 2)
    assert metrics(run, "step") == list(range(1, STEPS + 1))
    assert at(run, STEPS)[0]["changes"][0]["step"] == step


def test_samples_held_out_stay_held_out_and_are_not_replaced(prepared, tmp_path):
    run = copied(prepared, tmp_path / "run", **ADAPTIVE)
    interrupt(run, after=3)
    step = saved_step(run)
    held = checkpoint_folder.read_meta(newest(run))["state"]["held_out"]
    assert len(held) == 9
    table = HardnessTable.load(run / "jobs" / "clkd" / "hardness.parquet")
    for path in records(run)[:5]:
        remove(path)
    stage(run, "hardness")
    going_on(run, 2)
    state, arrays, ids = at(run, STEPS)
    assert state["held_out"] == [i for i in held if i in ids] and 0 < len(state["held_out"]) < 9
    gone = 9 + len(table) - len(ids)
    assert state["changes"] == [
        {"step": step, "setting": "samples", "before": 9 + len(table), "after": len(ids), "added": 0, "removed": gone}
    ]
    assert len(arrays["hardness/visits"]) == len(ids) - len(state["held_out"])
    left = metrics(run, "gap_left")
    assert left == sorted(left, reverse=True)
