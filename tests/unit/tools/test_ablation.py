"""The ablation: cells cached by their settings, resumed after kill -9, the test split scored once, its statistics."""

import json
import shutil
import signal
import time
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from pipeline.benchmark.scenes import write_scenes
from pipeline.cli import main as clkd
from pipeline.data.readers import read_samples
from pipeline.errors import UserError
from pipeline.method.hardness import HardnessTable
from pipeline.recipe import load_recipe
from tests.helpers import ranks, recipes
from tests.helpers.paths import RECIPES, ROOT
from tools.ablation.cell import _hardness_at_the_end, rank_correlation, summary
from tools.ablation.data import subset
from tools.ablation.rows import BASELINE, ROWS
from tools.ablation.run import begin, cell_recipe, data_root, make_cells, shared_digest
from tools.ablation.run import main as ablation
from tools.ablation.table import (
    BEGIN,
    END,
    difference,
    markdown,
    paired_bootstrap,
    plot,
    read_cells,
    write_between_markers,
    write_csv,
)

RECIPE = RECIPES / "ablation.yaml"


# -- rows and cells -------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """The real recipe, with something in place of the shared models' weights."""
    for name in ("teacher", "base"):
        model = tmp_path / "jobs" / name / "model"
        model.mkdir(parents=True)
        (model / "model.safetensors").write_bytes(name.encode())
    return load_recipe(RECIPE, [f"run.dir={tmp_path}"])


def cells_of(recipe, *names, seeds=(0,)):
    return make_cells(recipe, {name: ROWS[name] for name in names}, seeds)


def test_every_row_is_a_valid_recipe_and_another_training(recipe):
    cells = make_cells(recipe, ROWS, [0, 1])
    trained = [name for name, row in ROWS.items() if row.model is None]
    assert len(cells) == 2 * len(trained) + 2
    assert len({cell.fingerprints["training"] for cell in cells}) == len(cells)
    assert [cell.row for cell in cells[2 : 2 + len(trained)]] == trained, "all rows with one seed come first"


def test_rows_differ_from_clkd_in_what_their_names_say(recipe, tmp_path):
    def job(name):
        return load_job(cell_recipe(recipe, ROWS[name], 3, tmp_path))

    def load_job(raw):
        return type(recipe).model_validate(raw).jobs["student"]

    clkd = job("clkd")
    assert (clkd.distill.release, clkd.distill.gate, clkd.hardness.dynamic) == ("cosine", True, True)
    assert (job("sft").distill, job("sft").curriculum) == (None, None)
    kd = job("kd")
    assert (kd.distill.release, kd.distill.gate, kd.distill.token_tilt, kd.curriculum) == (
        "constant",
        False,
        (0, 0),
        None,
    )
    assert kd.distill.features is None and job("kd_features").distill.features.tilt == (0, 0)
    backwards = job("reversed")
    assert backwards.distill.features.tilt == tuple(-beta for beta in clkd.distill.features.tilt)
    assert {job(name).steps * job(name).batch.global_size for name in ROWS} == {250 * 16}, "equal budgets"
    assert cell_recipe(recipe, ROWS["kd_sampled"], 0, tmp_path)["targets"]["codec"] == "sampled"


def test_a_finished_cell_is_kept_and_one_with_other_settings_starts_anew(recipe, tmp_path):
    (cell,) = cells_of(recipe, "kd")
    assert begin(cell, "val")
    (cell.folder / "run").mkdir()
    assert begin(cell, "val"), "interrupted"
    assert (cell.folder / "run").is_dir(), "what it has trained stays"
    (cell.folder / "val.json").write_text(json.dumps({"fingerprint": cell.fingerprints["val"]}))
    assert not begin(cell, "val")
    (more,) = cells_of(load_recipe(RECIPE, [f"run.dir={tmp_path}", "evaluation.limit=7"]), "kd")
    assert begin(more, "val") and (cell.folder / "run").is_dir(), "scored again, not trained again"
    (other,) = cells_of(load_recipe(RECIPE, [f"run.dir={tmp_path}", "jobs.student.optimizer.lr=0.5"]), "kd")
    assert begin(other, "val")
    assert sorted(p.name for p in cell.folder.iterdir()) == ["cell.json", "recipe.yaml"]
    assert not begin(cell, "val"), "back to the old settings: it had been set aside"
    assert (cell.folder / "run").is_dir()


@pytest.mark.parametrize("change", ["jobs.student.optimizer.lr=0.5", "evaluation.limit=7"])
def test_the_test_split_is_scored_once(recipe, tmp_path, change):
    (cell,) = cells_of(recipe, "kd")
    begin(cell, "test")
    (cell.folder / "test.json").write_text(json.dumps({"fingerprint": cell.fingerprints["test"]}))
    assert not begin(cell, "test")
    (other,) = cells_of(load_recipe(RECIPE, [f"run.dir={tmp_path}", change]), "kd")
    with pytest.raises(UserError, match="test split has been scored for kd seed 0, with other settings"):
        begin(other, "test")
    assert (cell.folder / "test.json").is_file()


def test_another_teacher_is_another_cell_for_rows_that_have_one(recipe):
    before = {name: cells_of(recipe, name)[0].fingerprints["training"] for name in ("sft", "kd")}
    (recipe.model_dir("jobs.teacher") / "model.safetensors").write_bytes(b"other")
    after = {name: cells_of(recipe, name)[0].fingerprints["training"] for name in ("sft", "kd")}
    assert before["sft"] == after["sft"]
    assert before["kd"] != after["kd"]


def test_hardness_at_the_end_is_that_of_the_samples_that_were_not_held_out(tmp_path):
    """The last sample is in no table: an adaptive release measures its gap on it."""
    small = "benchmark.scenes={train: 8, val: 2, test: 2, width: 96, height: 64, workers: 1}"
    recipe = load_recipe(RECIPE, [small, f"run.dir={tmp_path}", f"data.root={tmp_path}/data", "job=student"])
    write_scenes(tmp_path / "data", recipe.benchmark.scenes)
    trained = read_samples("coda_lm", tmp_path / "data", "Train")[:-1]
    lengths = np.array([len(sample.answer) for sample in trained], np.float32)
    table = HardnessTable([s.sample_id for s in trained], [s.task for s in trained], lengths / 1000)
    table.update(np.arange(len(trained)), lengths / 500, step=3, ema=0.0)
    (tmp_path / "jobs" / "student").mkdir(parents=True)
    table.save(tmp_path / "jobs" / "student" / "hardness.parquet")
    found = _hardness_at_the_end(recipe)
    assert found["scored"] == len(trained)
    assert found["hardness_and_length"] == pytest.approx(1.0) == found["hardness_and_prior"]


def test_subsets_are_nested_and_whole(tmp_path):
    config = load_recipe(RECIPE, ["benchmark.scenes={train: 8, val: 2, test: 2, width: 96, height: 64, workers: 1}"])
    write_scenes(tmp_path / "data", config.benchmark.scenes)
    ids = {}
    for count in (2, 4):
        root = tmp_path / f"data-{count}"
        subset(tmp_path / "data", root, config.data, count)
        assert len(list((root / "CODA-LM" / "Train").glob("*.json"))) == count
        ids[count] = {s.sample_id for s in read_samples("coda_lm", root, "Train")}
        for split in ("val", "Test"):
            whole = read_samples("coda_lm", tmp_path / "data", split)
            assert [s.sample_id for s in read_samples("coda_lm", root, split)] == [s.sample_id for s in whole]
    every = {s.sample_id: s.slice for s in read_samples("coda_lm", tmp_path / "data", "Train")}
    assert ids[2] < ids[4] < set(every)


# -- statistics -----------------------------------------------------------------------------------------------------


def test_the_bootstrap_is_the_exact_one_in_the_limit():
    """Two seeds and three scenes have 4 x 27 equally likely draws: all of them, one by one."""
    diff, size = np.array([[0.3, -0.2, 0.9], [0.1, 0.4, -0.6]]), np.array([[2.0, 1.0, 3.0], [2.0, 1.0, 3.0]])
    exact = []
    for seeds, drawn in product(product(range(2), repeat=2), product(range(3), repeat=3)):
        pairs = list(product(seeds, drawn))
        exact.append(sum(diff[p] for p in pairs) / sum(size[p] for p in pairs))
    found = paired_bootstrap(diff, size, resamples=50_000)
    assert found.mean == pytest.approx(diff.sum() / size.sum())
    values = np.sort(exact)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        # A quantile of 108 values is one of them: the estimate lies on the same step, or the one beside it.
        near = values[max(0, int(share * 108) - 1) : int(share * 108) + 2]
        assert np.abs(near - end).min() < 1e-12


def test_the_bootstrap_of_many_scenes_is_the_normal_interval():
    diff = np.random.default_rng(1).normal(0.1, 1.0, (1, 800))
    found = paired_bootstrap(diff, np.ones_like(diff), resamples=4000)
    error = diff.std() / np.sqrt(diff.size)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)


def test_equal_rows_differ_by_nothing_and_a_constant_gain_is_certain():
    size = np.array([[1.0, 2.0, 1.0]] * 2)
    assert paired_bootstrap(0 * size, size).clear is False
    gain = paired_bootstrap(0.25 * size, size)
    assert (gain.low, gain.high) == pytest.approx((0.25, 0.25))
    assert gain.clear


def test_rank_correlation_of_known_orders():
    a = np.array([0.1, 0.7, 0.3, 0.9])
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(np.arange(4), np.array([0, 1, 3, 2])) == pytest.approx(1 - 6 * 2 / (4 * 15))


def result(row, seed, scores, nats=2.0):
    records = [
        {"sample_id": f"s{i}", "scene": f"{part}{i // 2}", "task": task, "slice": part,
         "score": score, "nats": nats, "tokens": 4}
        for part in ("regular", "corner")
        for i, (score, task) in enumerate(zip(scores, ("general", "region", "region", "suggestion"), strict=True))
    ]  # fmt: skip
    machine = {"cpu": "a CPU", "accelerator": None, "torch": "2", "transformers": "5", "deepspeed": "0"}
    about = {"row": row, "seed": seed, "split": "val", "machine": machine, "params_active": 3, "params_total": 4}
    training = {"seconds": 1.0, "hardness_and_prior": 0.5, "hardness_and_length": 0.1}
    return about | {"slices": summary(records), "samples": records, "training": training, "commit": "c", "date": "d"}


def test_the_summary_counts_every_answer_and_every_token_once():
    found = result("kd", 0, (1.0, 0.0, 1.0, 0.5))["slices"]["corner"]
    assert found == {"score": 0.625, "ce": 0.5, "n": 4, "general": 1.0, "region": 0.5, "suggestion": 0.5}


@pytest.fixture
def cells(tmp_path):
    folder = tmp_path / "cells"
    for row, gain, nats in (("clkd", 0.25, 1.0), (BASELINE, 0.0, 2.0), ("sft", 0.0, 2.0)):
        for seed in (0, 1):
            content = result(row, seed, [x + gain for x in (0.5, 0.25, 0.5 + 0.1 * seed, 0.5)], nats)
            (folder / f"{row}-seed{seed}").mkdir(parents=True)
            (folder / f"{row}-seed{seed}" / "val.json").write_text(json.dumps(content))
    return read_cells(folder, "val")


def test_the_table_has_the_rows_in_order_with_mean_spread_and_difference(cells, tmp_path):
    lines = markdown(cells, "val").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == 2 * ["sft", "kd", "clkd"]
    assert "| 2 | 45.0 ± 1.8 | 45.0 ± 1.8 | - | - |" in rows[1]
    assert rows[2].endswith("**+25.0** [+25.0, +25.0] | **+25.0** [+25.0, +25.0] |")
    assert rows[0].endswith("+0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] |")
    assert rows[5].endswith("**-0.2500** [-0.2500, -0.2500] | **-0.2500** [-0.2500, -0.2500] |")
    write_csv(cells, tmp_path / "t.csv")
    table = (tmp_path / "t.csv").read_text().splitlines()
    assert len(table) == 1 + 3 * 2 * 2
    assert table[1] == "sft,0,val,corner,0.4375,0.5,4,0.5,0.375,0.5,3,4,1.0,0.5,0.1,,c,d"
    plot(cells, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_rows_scored_on_different_samples_are_not_compared(cells):
    for record in cells["clkd"][0]["samples"]:
        record["sample_id"] += "x"
    with pytest.raises(UserError, match="clkd and kd: scored on different samples"):
        difference(cells, "clkd", "score", "corner")


def test_a_row_without_a_seed_of_the_baseline_has_no_difference(cells):
    only = {"clkd": {0: cells["clkd"][0]}, BASELINE: {1: cells[BASELINE][1]}}
    assert difference(only, "clkd", "score", "corner") is None


def test_the_document_keeps_what_stands_around_the_table(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_markers(path, "new")
    assert path.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    path.write_text("no markers")
    with pytest.raises(UserError, match="no <!-- ablation-table -->"):
        write_between_markers(path, "new")
    assert path.read_text() == "no markers"


# -- the whole harness ----------------------------------------------------------------------------------------------


def shared_files(path):
    """What `prepare` makes, but with random weights in place of trained ones, and in this process."""
    args = [str(path)]
    recipe = load_recipe(path)
    clkd(["scenes", *args])
    subset(recipe.data_root, data_root(recipe, 1), recipe.data, 16)
    clkd(["tokenizer", *args])
    clkd(["student", *args, "--model", "teacher", "--model", "student"])
    for job, model in (("teacher", "teacher"), ("base", "student")):
        shutil.copytree(recipe.model_dir(f"models.{model}"), recipe.model_dir(f"jobs.{job}"))
    clkd(["teacher", *args])
    stages = ("scenes", "tokenizer", "models", "train teacher", "train base", "soft targets store x1")
    (recipe.run.dir / "shared.json").write_text(json.dumps(dict.fromkeys(stages, shared_digest(recipe))))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["0", pytest.param("0,1", marks=pytest.mark.nightly)])
def test_rows_and_seeds_survive_a_kill_and_are_computed_once(tmp_path, monkeypatch, seeds):
    path = recipes.write(tmp_path / "tiny.yaml", recipes.ablation(tmp_path / "run"))
    shared_files(path)
    monkeypatch.chdir(ROOT)
    args = [str(path), "--jobs", "2", "--split", "val"]
    folder = tmp_path / "run" / "cells" / "kd-seed0"
    job = folder / "run" / "jobs" / "student"

    started = ranks.start(ablation, [*args, "--rows", "kd", "--seeds", "0"])
    while not (job / "checkpoints" / "latest").exists() and started.alive():
        time.sleep(0.02)
    started.signal(signal.SIGKILL)
    assert started.wait().statuses == (-signal.SIGKILL,)
    while holder_alive(job):  # its parent is dead: it writes a checkpoint and ends
        time.sleep(0.1)
    before = (job / "metrics.jsonl").read_text().splitlines()
    assert len(before) >= 2 and not (folder / "val.json").exists()

    args += ["--rows", "sft,kd", "--seeds", seeds]
    ablation(args)
    metrics = (job / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 30
    assert metrics[:2] == before[:2], "steps before the checkpoint were not trained again: their times are the old ones"
    found = read_cells(tmp_path / "run" / "cells", "val")
    wanted = [int(seed) for seed in seeds.split(",")]
    assert {row: list(cells) for row, cells in found.items()} == {"sft": wanted, "kd": wanted}
    assert found["kd"][0]["slices"].keys() == {"regular", "corner"}
    scored = [cell["samples"] for cells in found.values() for cell in cells.values()]
    assert all(one != other for one, other in combinations(scored, 2)), "row and seed matter"
    times = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.is_file()}
    assert not [path for path in times if "checkpoints" in path.parts], "only models are kept"

    ablation(args)
    assert times == {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.is_file()}
    assert len((tmp_path / "run" / "ablation-val.csv").read_text().splitlines()) == 1 + 2 * 2 * len(wanted)


def holder_alive(job):
    """Whether the process that holds the job's lock is there."""
    pid = (job / "lock").read_text().split(" ")[0]
    try:
        return pid.isdigit() and "tools.ablation.cell" in Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return False
