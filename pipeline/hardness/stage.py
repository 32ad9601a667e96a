"""H2G outside of training: the table that training starts from, scores of a whole data set, and a page about them.

    clkd hardness RECIPE.yaml job=NAME
    clkd hardness RECIPE.yaml
    clkd hardness RECIPE.yaml --student REF [job=NAME]
    clkd hardness RECIPE.yaml --inspect [--student REF] [--count N]

The first makes the table that a job starts from: its starting model's scores of every sample if it has a curriculum.
The second is the teacher's view, from its entropy and cross-entropy, no student needed. The third scores every sample
for any student (`jobs.NAME`, `models.NAME`, a Hugging Face folder or a training checkpoint); `jobs.NAME.hardness.table`
can name its table. The fourth writes a page with the hardest and easiest samples.
Shapes: M samples of the data set, T answer tokens of a sample.
"""

import argparse
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Never

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.data.index.samples import from_pool, sample_ids, words
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.files import replacing, write_text
from pipeline.hardness.scores import Scorer, matching_layer, open_student, scoring_identity
from pipeline.hardness.view import Run, corner_shares, page
from pipeline.method.hardness import ORIGIN, HardnessTable, strata_of, table_origin
from pipeline.method.pooling import teacher_prior
from pipeline.models.families import load_config
from pipeline.recipe import HardnessConfig, Recipe
from pipeline.targets.container.manifest import identity_digest
from pipeline.targets.identity import dataset_fingerprint
from pipeline.targets.store import SoftTargetStore

PART_SAMPLES = 4096
"""Samples whose scores are written together: what an interrupted scoring has to repeat at most."""


def prior_table(samples: Sequence[Sample], store: SoftTargetStore, settings: HardnessConfig) -> HardnessTable:
    """The table before training: every sample at its teacher-only prior; strata are the tasks."""
    ids = tqdm(sample_ids(samples), desc="hardness", mininterval=1)
    prior = np.fromiter((teacher_prior(store.read(i), settings) for i in ids), np.float32, len(samples))
    return _table(samples, prior)


def scored_table(scorer: Scorer, samples: Sequence[Sample], path: Path, origin: str) -> HardnessTable:
    """The table with a student's scores in the place of the prior. Goes on where an earlier call was interrupted.

    Args:
        path: where the table will be; parts lie beside it until all are there.
        origin: digest of all that the scores depend on.
    """
    folder, scores = path.with_suffix(".parts"), np.full(len(samples), np.nan, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(samples), desc="hardness", unit="sample", mininterval=1) as bar:
        for start in range(0, len(samples), PART_SAMPLES):
            rows = slice(start, min(start + PART_SAMPLES, len(samples)))
            part = folder / f"{start:012d}.parquet"
            if table_origin(part) != origin:
                _write_part(part, origin, _scores(scorer, samples[rows], bar))
            else:
                bar.update(rows.stop - rows.start)
            scores[rows] = pq.read_table(part)["hardness"].to_numpy()
    return _table(samples, scores)


def _scores(scorer: Scorer, samples: Sequence[Sample], bar: "tqdm[Never]") -> NDArray[np.float32]:
    place = {sample_id: i for i, sample_id in enumerate(sample_ids(samples))}
    scores = np.full(len(samples), np.nan, np.float32)
    for sample_id, visit in scorer.visits(samples):
        scores[place[sample_id]] = visit.score
        bar.update()
    return scores


def _write_part(path: Path, origin: str, scores: NDArray[np.float32]) -> None:
    with replacing(path) as temporary:
        pq.write_table(pa.table({"hardness": scores}).replace_schema_metadata({ORIGIN: origin}), temporary)


def _table(samples: Sequence[Sample], prior: NDArray[np.float32]) -> HardnessTable:
    return HardnessTable(sample_ids(samples), strata_of(words(samples, "task"), from_pool(samples)), prior)


def describe(table: HardnessTable, samples: Sequence[Sample]) -> str:
    """Strata, the hardest and easiest samples, and (metadata only) how corner cases are spread."""
    lines = [
        f"{len(table)} samples; "
        + ", ".join(f"{s}: {int((table.stratum == i).sum())}" for i, s in enumerate(table.strata))
    ]
    order = np.argsort(table.difficulty, kind="stable")
    for title, picked in (("hardest", order[::-1][:3]), ("easiest", order[:3])):
        for i in picked:
            sample = samples[i]
            about = f"{sample.task} {sample.slice}: {sample.prompt[:60]} -> {sample.answer[:80]}"
            lines.append(f"{title} {table.difficulty[i]:.3f} {about}")
    shares = corner_shares(table, samples)
    if shares is not None:
        lines.append(f"corner cases: {shares[0]:.1%} of all, {shares[1]:.1%} of the hardest decile")
    return "\n".join(lines)


def _scorer(run: Run, options: argparse.Namespace) -> Scorer:
    hardness, distill = run.settings
    student = open_student(run.recipe, options.student, run.processor)
    temperature = run.recipe.targets.temperature
    store, sketches, data = run.store, run.sketches, run.recipe.data
    return Scorer(student, run.processor, store, sketches, data, hardness, distill, temperature, options.batch_size)


def _fit_map(run: Run, scorer: Scorer, layer: int | None) -> None:
    """Fit a map W for the page, unless the student has its own or there are no sketches."""
    sketches = run.recipe.targets.sketches
    if sketches is None or scorer.map_RD is not None:
        return
    if layer is None:
        teacher = load_config(run.recipe.model_dir(run.recipe.teacher)).get_text_config()
        depth = scorer.student.model.config.get_text_config().num_hidden_layers
        layer = matching_layer(depth, teacher.num_hidden_layers, sketches.layer)
    scorer.fit_map(run.samples, layer)


def _student_table(run: Run, scorer: Scorer, path: Path) -> HardnessTable:
    origin = identity_digest(scoring_identity(scorer, dataset_fingerprint(run.samples)))
    if table_origin(path) != origin:
        scored_table(scorer, run.samples, path, origin).save(path, origin)
        shutil.rmtree(path.with_suffix(".parts"))
    return HardnessTable.load(path)


def _prior(run: Run, path: Path) -> HardnessTable:
    origin = identity_digest({**run.store.identity, "dataset": dataset_fingerprint(run.samples)})
    if table_origin(path) != origin:
        prior_table(run.samples, run.store, HardnessConfig()).save(path, origin)
    return HardnessTable.load(path)


def main(recipe: Recipe, options: argparse.Namespace) -> None:
    """The stage `hardness`."""
    torch.set_float32_matmul_precision(recipe.run.matmul_precision)
    if options.student is None and recipe.job is not None and not options.inspect:
        options.student = recipe.scored_student(recipe.job)
    run = Run.open(recipe)
    folder, scorer = recipe.run.dir / "hardness", None
    path = recipe.hardness_file(options.student)
    if options.student is None:
        if options.out is not None and not options.inspect:
            raise UserError(f"--out {options.out}: the prior's table is {path}, where training looks for it.")
        table = _prior(run, path)
    else:
        scorer = _scorer(run, options)
        path = options.out if options.out and not options.inspect else path
        table = _student_table(run, scorer, path)
    print(describe(table, run.samples))
    if not options.inspect:
        starting = any(recipe.starting_table(name) == path for name in recipe.jobs)
        print(f"{path}: the table" + ("" if starting else f"; a job starts from it with hardness.table={path}"))
        return
    if scorer is not None:
        _fit_map(run, scorer, options.student_layer)
    out = options.out or folder / f"{path.stem if options.student else 'prior'}.html"
    write_text(out, page(run, table, scorer, options.count, _command(options)))
    print(f"page: {out} ({out.stat().st_size / 1024:.0f} KiB)")


def _command(options: argparse.Namespace) -> str:
    """The command that makes the page again."""
    student = ["--student", options.student] if options.student else []
    return shlex.join(["clkd", "hardness", str(options.recipe), "--inspect", *student, *options.overrides])
