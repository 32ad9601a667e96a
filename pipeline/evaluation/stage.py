"""The result table: every row's model answers the test split, is scored by slice, and is timed against the teacher.

    clkd evaluate RECIPE.yaml

Writes `evaluation/<row>.json` (every answer), `evaluation/<row>.jsonl` (the same for handing in, a line an answer),
`evaluation/latency.json` (every timing) and `results.json`. Answers and timings on disk are used again if they were
made from the same weights, data and settings; scores are always computed anew. A missed bar is printed as such and is
no error. Samples without a gold answer are answered and counted, and are in no score.
"""

import gc
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.data.index.samples import Index
from pipeline.data.problems import LEFT_OUT, append_left_out
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.data.splits import open_split
from pipeline.errors import ConfigError, UserError
from pipeline.evaluation import latency, results
from pipeline.evaluation.bars import bar_lines, bars, gaps_closed
from pipeline.evaluation.generate import answers, open_model
from pipeline.evaluation.intervals import Values, add_intervals, draws
from pipeline.evaluation.likelihood import gold_cross_entropy
from pipeline.evaluation.metrics import Group, Scores, metrics_of, score_all, score_together
from pipeline.files import weights_hash, write_json, write_text
from pipeline.models import experts
from pipeline.models.loading import compute_device, parameter_counts
from pipeline.recipe import EvaluationRow, Recipe
from pipeline.targets.identity import dataset_fingerprint

Json = dict[str, Any]

FORMAT = 3
"""Of a row's file; part of its identity, so that answers in another format are made anew and never misread.
2: the likelihood of every gold answer, samples without one, scores by metric. 3: samples left out."""


# -- rows: answers and timings, from disk where they were made the same way --------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """One row of the table, answered and scored."""

    row: EvaluationRow
    params: tuple[int, int]
    """Total and active per token."""
    scores: Scores
    overall: Mapping[str, Group]
    """By metric, over all slices; see `metrics.score_together`."""
    spreads: Mapping[str, Mapping[str, Values]]
    """By metric and slice: the scores in draws of the frames."""
    cut: int
    """Answers that `max_new_tokens` ended."""
    left_out: int
    """Samples that could not be encoded."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one model did with all questions."""

    params: tuple[int, int]
    texts: Mapping[str, str]
    """Answers by sample_id."""
    cut: set[str]
    golds: Mapping[str, tuple[float, int]]
    """Nats and tokens of the gold answers, by sample_id of those that have one."""
    left_out: Mapping[str, str]
    """Why, by sample_id, of samples that could not be encoded; with `data.bad_samples: skip`."""


class Evaluation:
    """What all rows share: recipe, processor, questions and the weights' hashes."""

    def __init__(self, recipe: Recipe) -> None:
        """Check that every row can be evaluated before anything slow begins.

        Raises:
            UserError: no rows, rows whose names collide, missing models (all of them are named), or no test data.
        """
        self.recipe, self.rows, self.settings = recipe, recipe.evaluation.rows, recipe.evaluation
        self.device = compute_device(recipe.run.device)
        self.folder = recipe.run.dir / "evaluation"
        self.baselines = _baselines(self.rows)
        self.slugs = _slugs([*self.rows, *(row for row in self.baselines.values() if row not in self.rows)])
        self.weights = _weights(recipe, self.rows)
        self.processor = Processor.load(recipe.processor_dir, recipe.data)
        self.metrics = metrics_of(recipe)
        self.samples = questions(recipe)
        self.golds = with_gold(self.samples)
        self.draws = draws(self.golds)
        # On CPUs with AMX `medium` converts the whole weight to bf16 for every token: the demo teacher's answer at
        # batch 1 took 158 ms instead of 98.
        torch.set_float32_matmul_precision("highest" if self.device.type == "cpu" else recipe.run.matmul_precision)

    def open(self, reference: str) -> PreTrainedModel:
        """The model of a reference, ready to generate."""
        return open_model(self.recipe.model_dir(reference), self.processor, self.device)

    def answer(self, row: EvaluationRow) -> Answered:
        """Scored answers of one row, from its file where that was made the same way; the file is brought up to date."""
        path, identity = self.folder / f"{self.slugs[row.name]}.json", self._row_identity(row)
        stored = _read_if_same(path, identity)
        measured = self._measure_row(row) if stored is None else _measured(stored)
        records = [_record(sample, measured) for sample in self.samples if sample.sample_id in measured.texts]
        scores, overall = score_all(self.metrics, records), score_together(self.metrics, records)
        spreads = add_intervals(self.metrics, self.draws, scores, overall, records)
        content: Json = {
            "identity": identity,
            "name": row.name,
            "slug": self.slugs[row.name],
            "model": row.model,
            "blind": row.blind,
            "params_total": measured.params[0],
            "params_active": measured.params[1],
            "cut": len(measured.cut),
            "left_out": measured.left_out,
            "metrics": [metric.described() for metric in self.metrics],
            "scores": scores,
            "overall": overall,
            "samples": records,
        }
        if content != stored:
            write_json(path, content)
        _write_predictions(path.with_suffix(".jsonl"), records)
        return Answered(row, measured.params, scores, overall, spreads, len(measured.cut), len(measured.left_out))

    def timings(self) -> tuple[dict[str, list[latency.Timing]], Json]:
        """Timings of the rows' distinct models, keyed by model reference, and the settings they were taken with."""
        path, identity = self.folder / "latency.json", self._latency_identity()
        stored = _read_if_same(path, identity)
        if stored is None:
            timings = self._measure()
            stored = {
                "identity": identity,
                "settings": self._latency_settings(),
                "timings": {reference: [asdict(t) for t in rows] for reference, rows in timings.items()},
            }
            write_json(path, stored)
        timed = {ref: [latency.Timing(**t) for t in rows] for ref, rows in stored["timings"].items()}
        return timed, stored["settings"]

    def _measure_row(self, row: EvaluationRow) -> Measured:
        """The gold answers' likelihood first: it takes less time, and one that cannot be encoded ends the stage."""
        model, cut, size = self.open(row.model), set[str](), self.settings.batch_size
        left_out = dict[str, str]()
        with tqdm(total=len(self.golds), desc=f"{row.name}, gold answers", unit="answer", disable=None) as bar:
            golds = gold_cross_entropy(
                model, self.processor, self.golds, batch_size=size, blind=row.blind, on_progress=bar.update
            )
        with tqdm(total=len(self.samples), desc=row.name, unit="answer", disable=None) as bar:
            texts = answers(
                model,
                self.processor,
                self.samples,
                batch_size=size,
                max_new_tokens=self.settings.max_new_tokens,
                blind=row.blind,
                cut=cut,
                left_out=left_out,
                on_progress=bar.update,
            )
        append_left_out(self.recipe.run.dir / LEFT_OUT, left_out, {"stage": "evaluate", "row": row.name})
        return Measured(parameter_counts(model), texts, cut, golds, left_out)

    def _measure(self) -> dict[str, list[latency.Timing]]:
        gc.collect()
        models = {reference: self.open(reference) for reference in self.weights}
        prompts = [
            self.processor.encode_prompt(sample)
            for sample in timed_samples(self.samples, self.settings.latency_samples)
        ]
        total = len(models) * len(prompts) * self.settings.latency_repeats
        with tqdm(total=total, desc="latency", unit="answer", disable=None) as bar:
            return latency.measure(
                models, self.processor, prompts, repeats=self.settings.latency_repeats, on_progress=bar.update
            )

    def _common_identity(self) -> Json:
        """What changes an answer of any model."""
        return {
            "dataset": dataset_fingerprint(self.samples),
            **{f"processor_{name}": value for name, value in self.processor.identity().items()},
            "device": self.device.type,
            "matmul_precision": torch.get_float32_matmul_precision(),
        }

    def _row_identity(self, row: EvaluationRow) -> Json:
        settings = {"batch_size": self.settings.batch_size, "max_new_tokens": self.settings.max_new_tokens}
        about = {"format": FORMAT, "weights": self.weights[row.model], "blind": row.blind}
        return {**about, **settings, **self._common_identity()}

    def _latency_identity(self) -> Json:
        """Row names are not in it. The order of the models is: the first one is the reference."""
        shared = {"machine": results.machine(self.device), **self._latency_settings(), **self._common_identity()}
        return {"weights": [[reference, digest] for reference, digest in self.weights.items()], **shared}

    def _latency_settings(self) -> Json:
        return {
            "batch_size": 1,
            "new_tokens": latency.NEW_TOKENS,
            "samples": min(self.settings.latency_samples, len(self.samples)),
            "repeats": self.settings.latency_repeats,
            "threads": latency.CPU_THREADS if self.device.type == "cpu" else torch.get_num_threads(),
            "experts_implementation": experts.NAME if self.device.type == "cpu" else "transformers' default",
            "included": "vision tower, prompt, argmax, every forced token; not: image decoding, tokenizing",
            "statistic": "median over samples and repeats; ratios per interleaved pair first",
        }


# -- which samples -----------------------------------------------------------------------------------------------------


def questions(recipe: Recipe) -> Index:
    """The test split, sorted by sample_id: at most `evaluation.limit` per task and slice.

    The first ones by sample_id are taken. Ids are content hashes, so this is a random subset, and always the same.
    Samples without a gold answer are counted by themselves, so that they take no scored sample's place.
    """
    samples, limit = open_split(recipe, recipe.data.test_split), recipe.evaluation.limit
    counts, silent = defaultdict[tuple[str, str, bool], int](int), set(samples.unanswered().tolist())
    chosen = list[int]()
    for place, (task, part) in enumerate(zip(samples.words("task"), samples.words("slice"), strict=True)):
        counts[task, part, place in silent] += 1
        if limit is None or counts[task, part, place in silent] <= limit:
            chosen.append(place)
    return samples.select(chosen)


def with_gold(samples: Index) -> Index:
    """Those with a gold answer."""
    return samples.select(np.setdiff1d(np.arange(len(samples)), samples.unanswered()))


def timed_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples, dealt evenly from all tasks and slices in order of sample_id."""
    groups = defaultdict[tuple[str, str], list[Sample]](list)
    for sample in samples:
        groups[sample.task, sample.slice].append(sample)
    ranked = [(rank, group, sample) for group, members in groups.items() for rank, sample in enumerate(members)]
    return [sample for _, _, sample in sorted(ranked, key=lambda r: r[:2])[:count]]


# -- the table ---------------------------------------------------------------------------------------------------------


def evaluate(recipe: Recipe) -> Json:
    """Bring every row's file and `results.json` up to date; returns what `results.json` holds.

    Raises:
        UserError: see Evaluation.
    """
    evaluation = Evaluation(recipe)
    answered = [evaluation.answer(row) for row in evaluation.rows]
    blind = {model: evaluation.answer(row).scores for model, row in evaluation.baselines.items()}
    timings, settings = evaluation.timings()
    speeds = latency.summarise(timings, reference=evaluation.rows[0].model)
    rows = [_table_row(a, blind[a.row.model], evaluation.slugs[a.row.name], speeds[a.row.model]) for a in answered]
    spreads = {a.row.name: a.spreads for a in answered}
    closed = gaps_closed(rows, evaluation.metrics, recipe.evaluation, spreads)
    rows = [replace(row, gap_closed=closed.get(row.name, {})) for row in rows]
    measured = bars(rows, evaluation.metrics, recipe.evaluation, spreads)
    asked, silent = len(evaluation.samples), len(evaluation.samples) - len(evaluation.golds)
    unscored = results.gold_lines(rows[0].scores, evaluation.metrics, asked, silent)
    content: Json = {
        "metrics": [metric.described() for metric in evaluation.metrics],
        "rows": [asdict(row) for row in rows],
        "bars": [asdict(bar) for bar in measured],
        "machine": results.machine(evaluation.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": recipe.run.seed,
        "questions": asked,
        "unanswered": silent,
        "notes": unscored,
        "latency": settings,
        "config": recipe.model_dump(mode="json", exclude_unset=True),
    }
    write_json(recipe.run.dir / "results.json", content)
    notes = [*unscored, results.latency_line(settings)]
    if left_out := max(a.left_out for a in answered):
        notes.append(f"{left_out} bad sample(s) left out (data.bad_samples: skip), see {recipe.run.dir / LEFT_OUT}")
    if any(row.cut for row in rows):
        notes.append(results.cut_line(rows, asked, recipe.evaluation.max_new_tokens))
    parts = [results.table(rows, evaluation.metrics), "\n".join(notes)]
    print("\n\n".join([*parts, *([bar_lines(measured, evaluation.metrics)] if measured else [])]))
    return content


def _table_row(answered: Answered, blind: Scores, slug: str, speed: latency.Latency) -> results.Row:
    row = answered.row
    return results.Row(
        name=row.name,
        slug=slug,
        model=row.model,
        blind=row.blind,
        scores=answered.scores,
        overall=answered.overall,
        blind_scores=blind,
        params_total=answered.params[0],
        params_active=answered.params[1],
        ttft_ms=speed.ttft_ms,
        tpot_ms=speed.tpot_ms,
        e2e_ms=speed.e2e_ms,
        speedup_vs_teacher=speed.speedup,
        cut=answered.cut,
    )


# -- answers on disk ---------------------------------------------------------------------------------------------------


def _record(sample: Sample, measured: Measured) -> Json:
    """One answer; `id`: the record's own, where it has one; `cut`: it has `max_new_tokens` and no end."""
    own, gold = sample.meta.get("id"), measured.golds.get(sample.sample_id)
    return {
        **({"id": own} if own else {}),
        "sample_id": sample.sample_id,
        "task": sample.task,
        "slice": sample.slice,
        "prompt": sample.prompt,
        "gold": sample.answer,
        "prediction": measured.texts[sample.sample_id],
        "cut": sample.sample_id in measured.cut,
        **({"nats": gold[0], "tokens": gold[1]} if gold else {}),
    }


def _measured(stored: Json) -> Measured:
    """What a row's file holds."""
    samples = stored["samples"]
    return Measured(
        params=(stored["params_total"], stored["params_active"]),
        texts={r["sample_id"]: r["prediction"] for r in samples},
        cut={r["sample_id"] for r in samples if r["cut"]},
        golds={r["sample_id"]: (r["nats"], r["tokens"]) for r in samples if "nats" in r},
        left_out=stored["left_out"],
    )


def _write_predictions(path: Path, records: Sequence[Json]) -> None:
    """The answers, a line each, without what only this stage needs."""
    kept = [{key: value for key, value in r.items() if key not in ("nats", "tokens")} for r in records]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if not path.is_file() or path.read_text() != text:
        write_text(path, text)


# -- checks before anything slow begins --------------------------------------------------------------------------------


def _baselines(rows: Sequence[EvaluationRow]) -> dict[str, EvaluationRow]:
    """The blind row of every model: the recipe's own where it has one."""
    own = {row.model: row for row in rows if row.blind}
    first = {row.model: row for row in reversed(rows)}
    made = {m: EvaluationRow(name=f"{row.name}, blind", model=m, blind=True) for m, row in first.items()}
    return made | own


def _slugs(rows: Sequence[EvaluationRow]) -> dict[str, str]:
    """File name of each row, from its name. Raises ConfigError if there are no rows or two get the same."""
    if not rows:
        raise ConfigError(
            "evaluation.rows: is empty; name at least the teacher, e.g. `{name: teacher, model: jobs.teacher}`."
        )
    names: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        names[re.sub(r"[^a-z0-9]+", "_", row.name.lower()).strip("_")].append(row.name)
    clashes = [f"{found} -> {slug!r}" for slug, found in names.items() if len(found) > 1 or slug in ("", "latency")]
    if clashes:
        raise ConfigError(
            f"evaluation.rows: names must give distinct file names: {'; '.join(clashes)}. Rename these rows."
        )
    return {found[0]: slug for slug, found in names.items()}


def _weights(recipe: Recipe, rows: Sequence[EvaluationRow]) -> dict[str, str]:
    """Hash of each distinct model's weights, in order of the rows. Raises UserError naming all that are missing."""
    references = list(dict.fromkeys(row.model for row in rows))
    missing = [f"{r}: {recipe.model_dir(r)}" for r in references if not (recipe.model_dir(r) / "config.json").is_file()]
    if missing:
        raise UserError(
            "evaluation.rows: there is no model for\n  "
            + "\n  ".join(missing)
            + "\nTrain or build it first, or take its "
            "rows out of the recipe. Nothing was evaluated."
        )
    return {reference: weights_hash(recipe.model_dir(reference)) for reference in references}


def _read_if_same(path: Path, identity: Json) -> Json | None:
    """An earlier result, if it is whole and was made the same way."""
    try:
        content: Json = json.loads(path.read_text())
        return content if content["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main(recipe: Recipe, options: object) -> None:
    """The stage `evaluate`."""
    evaluate(recipe)
