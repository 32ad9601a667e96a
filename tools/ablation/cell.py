"""One cell of the ablation, in a process of its own: train what is not trained, score what is not scored.

    python -m tools.ablation.cell CELL_DIR --split val|test

`CELL_DIR/cell.json` and `recipe.yaml` come from `tools.ablation.run`. Training goes on from its newest checkpoint.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from pipeline.benchmark.scoring import score_answer
from pipeline.cli import main as clkd
from pipeline.data.processor import Processor
from pipeline.data.readers import read_samples
from pipeline.data.sample import Sample
from pipeline.errors import DataError, run_main
from pipeline.evaluation import results
from pipeline.evaluation.generate import answers, open_model
from pipeline.evaluation.likelihood import gold_cross_entropy
from pipeline.evaluation.stage import questions, with_gold
from pipeline.files import write_json
from pipeline.hardness.view import corner_shares
from pipeline.method.hardness import HardnessTable
from pipeline.models.loading import compute_device, parameter_counts
from pipeline.recipe import Recipe, Reference, load_recipe
from pipeline.training.stage import finished

JOB = "student"
Json = dict[str, Any]


def trained(recipe: Recipe, folder: Path, ds_config: Path) -> int:
    """Train the cell's student if need be; train's exit status."""
    job = recipe.jobs[JOB]
    if finished(recipe, JOB, job):
        return 0
    args = [str(folder / "recipe.yaml")]
    if recipe.is_made(job.init):
        clkd(["student", *args, "--model", Reference.parse(job.init).name])
    if job.distill or job.curriculum:
        clkd(["hardness", *args, f"job={JOB}"])
    if job.hardness.table is not None:
        table = ["--student", "models.dense", "--out", str(job.hardness.table)]
        clkd(["hardness", *args, *table, f"job={JOB}"])
    started = time.monotonic()
    status = clkd(["train", *args, "--deepspeed_config", str(ds_config), f"job={JOB}"]) or 0
    if status == 0:
        # The seconds of this process: a training that was interrupted shows less than it took.
        write_json(folder / "training.json", {"seconds": time.monotonic() - started, **_hardness_at_the_end(recipe)})
        shutil.rmtree(recipe.job_dir(JOB) / "checkpoints")  # the model is exported; checkpoints are seven times that
    return status


def scored(recipe: Recipe, model_dir: Path, split: str) -> Json:
    """Scores and gold cross-entropies of the split's questions, one record per sample, and the model's parameters."""
    data = recipe.data.model_copy(update={"test_split": getattr(recipe.data, f"{split}_split")})
    settings, processor = recipe.evaluation, Processor.load(recipe.processor_dir, recipe.data)
    samples = with_gold(questions(recipe.model_copy(update={"data": data})))
    device = compute_device(recipe.run.device)
    torch.set_float32_matmul_precision("highest")
    model = open_model(model_dir, processor, device)
    total, active = parameter_counts(model)
    ce = gold_cross_entropy(model, processor, samples, batch_size=settings.batch_size)
    said = answers(
        model, processor, samples, batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens
    )  # fmt: skip
    records = [_record(sample, said[sample.sample_id], ce[sample.sample_id]) for sample in samples]
    return {
        "params_total": total,
        "params_active": active,
        "slices": summary(records),
        "machine": results.machine(device),
        "samples": records,
    }


def summary(records: Sequence[Json]) -> dict[str, dict[str, float]]:
    """By slice: mean score, nats per answer token, number of samples, and the mean score of each task."""
    found = {}
    for name in sorted({r["slice"] for r in records}):
        rows = [r for r in records if r["slice"] == name]
        tasks = {
            task: fmean(r["score"] for r in rows if r["task"] == task) for task in sorted({r["task"] for r in rows})
        }
        ce = sum(r["nats"] for r in rows) / sum(r["tokens"] for r in rows)
        found[name] = {"score": fmean(r["score"] for r in rows), "ce": ce, "n": len(rows), **tasks}
    return found


def _record(sample: Sample, said: str, ce: tuple[float, int]) -> Json:
    """A cell's data root is a part of the drawn scenes, so their own score applies."""
    score = score_answer(sample.task, said, sample.answer)
    if score is None:
        raise DataError(
            f"{sample.meta['record']}: its gold answer holds no word of the drawn scenes, which this is about."
        )
    return {
        "sample_id": sample.sample_id,
        "scene": Path(sample.meta["record"]).stem,
        "task": sample.task,
        "slice": sample.slice,
        "score": score,
        "nats": ce[0],
        "tokens": ce[1],
    }


def _hardness_at_the_end(recipe: Recipe) -> Json:
    """Of the samples that were scored in training: rank correlations within strata of their hardness at the end with
    the teacher's prior (near 1: `dynamic` adds nothing) and with the answers' length (near 1: it ranks nothing else),
    and the share of corner cases among all and in the hardest decile."""
    path = recipe.job_dir(JOB) / "hardness.parquet"
    if not path.is_file():
        return {}
    table, data = HardnessTable.load(path), recipe.data
    ids = set(chain.from_iterable(block.to_pylist() for block in table.ids()))  # an adaptive release holds some out
    samples = [s for s in read_samples(data.format, recipe.data_root, data.train_split) if s.sample_id in ids]
    seen = table.last_step >= 0
    groups = [np.flatnonzero(seen & (table.stratum == code)) for code in range(len(table.strata))]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return {"scored": int(seen.sum())}
    others = {"prior": table.prior, "length": np.array([len(sample.answer) for sample in samples])}
    found = {
        f"hardness_and_{name}": float(
            np.average([rank_correlation(x[g], table.difficulty[g]) for g in groups], weights=[len(g) for g in groups])
        )
        for name, x in others.items()
    }
    shares = corner_shares(table, samples)
    corner = dict(zip(("corner", "corner_in_hardest_decile"), shares, strict=True)) if shares else {}
    return {"scored": int(seen.sum()), **found, **corner}


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's rho; ties by position: samples stand in order of a hash, so at random."""
    ranks = np.stack([np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (a, b)])
    return float(np.corrcoef(ranks)[0, 1])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.ablation.cell", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=("val", "test"), required=True)
    parser.add_argument("--deepspeed_config", type=Path, default=Path("ds_configs/one_rank.json"))
    options = parser.parse_args(argv)
    cell = json.loads((options.folder / "cell.json").read_text())
    recipe = load_recipe(options.folder / "recipe.yaml")
    if cell["model"] is None and (status := trained(recipe, options.folder, options.deepspeed_config)):
        return status
    model_dir = Path(cell["model"]) if cell["model"] else recipe.model_dir(f"jobs.{JOB}")
    started = time.monotonic()
    content = scored(recipe, model_dir, options.split)
    training = options.folder / "training.json"
    about = {
        **{key: cell[key] for key in ("row", "title", "seed", "commit")},
        "split": options.split,
        "fingerprint": cell["fingerprints"][options.split],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "training": json.loads(training.read_text()) if training.is_file() else None,
        "scoring_seconds": time.monotonic() - started,
    }
    write_json(options.folder / f"{options.split}.json", about | content)
    return 0


if __name__ == "__main__":
    run_main(main)
