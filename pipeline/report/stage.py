"""The one-page report of a run: a single HTML file with everything inside, to look at, print or send.

    clkd report RECIPE.yaml

Reads what the other stages left in the run's folder and writes `report.html` beside it. A part whose files are missing
or broken is left out, with a sentence that says so: a report never fails a run.
"""

import argparse
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.benchmark.scoring import TASKS
from pipeline.evaluation.metrics import NO_SLICE, in_order
from pipeline.evaluation.results import TOGETHER, shown
from pipeline.files import write_text
from pipeline.recipe import Recipe, Reference
from pipeline.report import plots
from pipeline.report.data import (
    Json,
    Missing,
    ResultBar,
    ResultGroup,
    ResultMetric,
    ResultRow,
    Results,
    examples,
    hardness_columns,
    read_json,
    read_results,
    train_slices,
)
from pipeline.report.plots import HardnessView, JobCurves
from pipeline.report.rare import rare_objects
from pipeline.training.metrics import read_metrics

TEMPLATE = "template.html.j2"
_KINDS = ("speed", "gap_closed", "teacher", "ahead", "gap", "blind")
"""Bars in the order shown."""
_PLACES = {"regular": "regular scenes", "corner": "corner cases", NO_SLICE: TOGETHER}
MOST_PLACES = 3
"""Slices that the summary names one by one."""

LEADING = 2
"""Metrics in the first table."""

T = TypeVar("T")


def build(recipe: Recipe, command: str) -> str:
    """The whole report as HTML.

    Args:
        command: what makes the run again, shown at the end.
    """
    results = _try(lambda: read_results(recipe.run.dir))
    known = results if isinstance(results, Results) else Results()
    curves = student_curves(recipe, known)
    parts = {
        "headline": results if isinstance(results, Missing) else known,
        "scores": _try(lambda: _scores(known)),
        "gap": _try(lambda: _gap_figure(recipe, known)),
        "rare": _try(lambda: rare_objects(recipe, known)),
        "examples": _try(lambda: examples(recipe, known)),
        "training": _try(lambda: _curves_figure(recipe, curves, plots.training_curves)),
        "schedules": _try(lambda: _curves_figure(recipe, curves, plots.schedule_curves)),
        "experts": _try(lambda: _experts_figure(recipe, curves)),
        "hardness": _try(lambda: _hardness_figure(recipe, known)),
        "durations": _try(lambda: _durations(recipe.run.dir)),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"millions": _millions, "number": _number, "percent": _percent, "duration": plots.duration}
    environment.filters |= {"shown": lambda group, unit: shown(unit, group.value if group else None), "head": _head}
    environment.filters |= {"ends": lambda group, unit: " to ".join(shown(unit, end) for end in group.interval)}
    environment.tests["missing"] = lambda part: isinstance(part, Missing)
    return environment.get_template(TEMPLATE).render(
        parts=parts,
        results=known,
        headline=headline(known),
        summary=summary(known),
        cards=cards(known.bars, known.metrics),
        table=table_metrics(known),
        first=table_metrics(known)[:LEADING],
        gap_slices=list(dict.fromkeys(part for row in known.rows for part in row.gap_closed)),
        colours=plots.slice_colours(_all_slices(known)),
        command=command,
        recipe_yaml=yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, width=100),
    )


# -- words and figures of the result table -----------------------------------------------------------------------------


def headline(results: Results) -> str:
    """What this is, in one sentence."""
    student = results.student
    experts = student is not None and student.params_active != student.params_total
    kind = "Mixture-of-Experts student" if experts or student is None else "student"
    speed = student.speedup_vs_teacher if student else None
    if speed is not None and speed > 1:
        return (
            f"A driving vision-language model, distilled into a {kind} that answers {_floor(speed):.2f} times as fast"
        )
    return f"A driving vision-language model, distilled into a {kind}"


def summary(results: Results) -> str:
    """Sizes and outcome in plain sentences; empty without a table."""
    teacher, student = results.teacher, results.student
    if teacher is None:
        return ""
    said = f"The teacher has {_millions(teacher.params_total)} parameters"
    if student is None:
        return f"{said}. No student has been evaluated yet."
    said += f", the student {_student_size(student)}."
    if not results.metrics:
        return said
    metric = results.metrics[0]
    parts, name = results.slices(metric.name), metric.title
    ratios = [(_place(p), _ratio(student.value(metric.name, p), teacher.value(metric.name, p))) for p in parts]
    if len(parts) > MOST_PLACES and metric.name in student.overall and metric.name in teacher.overall:
        both = student.overall[metric.name].value, teacher.overall[metric.name].value
        ratios = [(TOGETHER, _ratio(*both))]
    shares = [f"{_percent(_floor(ratio, 3))} on {place}" for place, ratio in ratios if ratio is not None]
    return f"{said} Of the teacher’s {name}, it reaches {_enumerated(shares)}." if shares else said


def cards(bars: Sequence[ResultBar], metrics: Sequence[ResultMetric]) -> list[Json]:
    """The bars as big figures, speed first, then those against the teacher; the first three lead."""
    known = {metric.name: metric for metric in metrics}
    ranked = sorted(bars, key=lambda bar: _KINDS.index(bar.kind) if bar.kind in _KINDS else len(_KINDS))
    return [_card(bar, known.get(bar.metric or "")) for bar in ranked]


def _card(bar: ResultBar, metric: ResultMetric | None) -> Json:
    unit, what, share = _bar_words(bar, metric)
    if bar.kind in ("ahead", "gap"):
        figure, target = _difference(bar.value, metric), _difference(bar.target, metric)
    else:
        figure = "–" if bar.value is None else _percent(_floor(bar.value, 3)) if share else f"{_floor(bar.value):.2f}×"
        target = f"{100 * bar.target:g}%" if share else f"{bar.target:g}×"
    verdict = "reached" if bar.reached else "not measured" if bar.value is None else "missed"
    return {"figure": figure, "unit": unit, "what": what, "target": target, "verdict": verdict}


def _difference(value: float | None, metric: ResultMetric | None) -> str:
    """In points where the metric is in per cent."""
    if value is None:
        return "–"
    return f"{100 * value:+.1f}" if metric is None or metric.unit == "%" else f"{value:+.3f}"


def _bar_words(bar: ResultBar, metric: ResultMetric | None) -> tuple[str, str, bool]:
    """(unit, of what, whether the figure is a share) of a bar."""
    title, place = metric.title if metric else bar.metric, _place(bar.slice or NO_SLICE)
    if bar.kind == "speed":
        return "the teacher’s speed", "end to end, one question at a time", False
    if bar.kind == "gap_closed":
        return f"of the gap from {bar.against} to the teacher closed", f"{title}, {place}", True
    if bar.kind == "ahead":
        return f"ahead of {bar.against}", f"{title}, {place}", False
    if bar.kind == "gap":
        return f"teacher ahead of {bar.against}", f"{title}, {place}: what there is to distil", False
    if bar.kind == "blind":
        return "the blind baseline’s score", f"teacher, {title}, {place}", False
    if bar.kind == "teacher" and metric and metric.lower_is_better:
        return f"teacher’s over student’s {title}", f"on {place}", True
    if bar.kind == "teacher":
        return f"of the teacher’s {title}", f"on {place}", True
    return "", bar.name.replace("_", " "), False


def table_metrics(results: Results) -> list[Json]:
    """What the tables show of each metric that has values: its slices, whether all of them together, their tasks."""
    shown_metrics = []
    for metric in results.metrics:
        slices, together = results.slices(metric.name), any(metric.name in row.overall for row in results.rows)
        few = len(slices) <= MOST_PLACES or not together
        if slices:
            tasks = _tasks(results, metric.name)
            shown_metrics.append({"metric": metric, "slices": slices, "together": together, "few": few, "tasks": tasks})
    return shown_metrics


def student_curves(recipe: Recipe, results: Results) -> list[JobCurves]:
    """Metrics of the jobs behind the students' rows, in the rows' order; without a table, of all jobs but the first."""
    teacher = results.teacher.model if results.teacher else recipe.targets.teacher
    names = {row.model: row.name for row in results.rows if not row.blind and row.model != teacher}
    if not names:
        names = {f"jobs.{name}": name for name in recipe.jobs if f"jobs.{name}" != teacher}
    jobs = {job: label for ref, label in names.items() if (job := Reference.parse(ref).job) is not None}
    colours = plots.job_colours(len(jobs))
    curves = [
        JobCurves(label, colour, _metrics(recipe.job_dir(name) / "metrics.jsonl"))
        for (name, label), colour in zip(jobs.items(), colours, strict=True)
    ]
    return [job for job in curves if job.rows]


# -- parts, each drawn from its files or Missing -----------------------------------------------------------------------


def _scores(results: Results) -> dict[str, Markup]:
    """A figure for each metric, by its name."""
    if not results.rows:
        raise Missing("There are no scores to draw.")
    figures = {
        metric.name: _scores_figure(results, metric) for metric in results.metrics if results.slices(metric.name)
    }
    if not figures:
        raise Missing("There are no scores to draw: no sample of the test split has a gold answer.")
    return figures


def _scores_figure(results: Results, metric: ResultMetric) -> Markup:
    slices = results.slices(metric.name)
    rows = [
        plots.ScoreRow(
            row.name,
            [_value(row.scores.get(metric.name, {}).get(part)) for part in slices],
            [_value(row.blind_scores.get(metric.name, {}).get(part)) for part in slices],
        )
        for row in results.rows
    ]
    colours = plots.slice_colours(_all_slices(results))
    return Markup(
        plots.score_bars(metric.name, metric.title, metric.unit, {_head(s): colours[s] for s in slices}, rows)
    )


def _gap_figure(recipe: Recipe, results: Results) -> Markup:
    baseline, teacher = recipe.evaluation.baseline, results.teacher
    slices = list(dict.fromkeys(part for row in results.rows for part in row.gap_closed))
    if baseline is None or teacher is None or not slices:
        raise Missing("There is no gap to draw: evaluation.baseline names no row that learns from labels alone.")
    rows = [
        plots.GapRow(row.name, [_share(row.gap_closed.get(part)) for part in slices])
        for row in results.rows
        if row.gap_closed
    ]
    colours = plots.slice_colours(_all_slices(results))
    return Markup(plots.gap_closed(baseline, teacher.name, {_head(part): colours[part] for part in slices}, rows))


def _share(group: ResultGroup | None) -> tuple[float, float, float] | None:
    """(value, low, high)."""
    return None if group is None else (group.value, *(group.interval or (group.value, group.value)))


def _curves_figure(recipe: Recipe, jobs: Sequence[JobCurves], draw: Callable[[Sequence[JobCurves]], str]) -> Markup:
    if not jobs:
        raise Missing(f"No student has logged metrics in {recipe.run.dir / 'jobs'} yet.")
    return Markup(draw(jobs))


def _experts_figure(recipe: Recipe, jobs: Sequence[JobCurves]) -> Json:
    figure = plots.expert_heat_map(jobs)
    if figure is None:
        raise Missing("No job has logged expert load: there is no Mixture-of-Experts student yet.")
    label, (_, load_SLE) = [(job.label, load) for job in jobs if (load := job.expert_load())][-1]
    last_LE = load_SLE[-1]
    ends = {"job": label, "low": last_LE.min(), "high": last_LE.max(), "even": 1 / last_LE.shape[1]}
    return {"figure": Markup(figure), "ends": ends}


def _hardness_figure(recipe: Recipe, results: Results) -> Json:
    """Histograms before and after training, and how corner cases are spread over the ranks."""
    before = hardness_columns(recipe.run.dir / "hardness.parquet")
    refs = [row.model for row in reversed(results.rows)] + [f"jobs.{name}" for name in reversed(recipe.jobs)]
    jobs = [job for ref in refs if (job := Reference.parse(ref).job) is not None]
    paths = [recipe.job_dir(job) / "hardness.parquet" for job in jobs]
    after_path = next((path for path in paths if path.is_file()), None)
    after = hardness_columns(after_path) if after_path else None
    slices = _try(lambda: train_slices(recipe))
    known = slices if isinstance(slices, dict) else {}
    tables = [("Before training", before), *([("After training", after)] if after else [])]
    views = [
        HardnessView(
            title,
            np.array(table["hardness"], float),
            [str(stratum) for stratum in table["stratum"]],
            [known.get(sample_id, "unknown") for sample_id in table["sample_id"]],
        )
        for title, table in tables
    ]
    return {
        "figure": Markup(plots.hardness_histograms(views)),
        "job": after_path.parent.name if after_path else None,
        "visited": sum(step >= 0 for step in after["last_step"]) if after else None,
        "count": len(before["sample_id"]),
        "deciles": [_corner_shares(title, table, known) for title, table in tables],
        "note": str(slices) if isinstance(slices, Missing) else None,
    }


def _corner_shares(title: str, table: Json, slices: Mapping[str, str]) -> Json | None:
    """Share of corner cases overall and among the tenth of samples that rank hardest within their task."""
    corner = np.array([slices.get(sample_id) == "corner" for sample_id in table["sample_id"]])
    hardest = np.array(table["rank"], float) >= 0.9
    if not corner.any() or not hardest.any():
        return None
    return {"title": title, "all": corner.mean(), "hardest": corner[hardest].mean()}


def _durations(run_dir: Path) -> Json:
    content = read_json(run_dir / "stages.json", "the stages were not run as one chain")
    seconds = {str(k): float(v) for k, v in content.items() if isinstance(v, int | float)}
    if not seconds:
        raise Missing("No stage has recorded its duration.")
    return {"figure": Markup(plots.duration_bars(seconds)), "total": sum(seconds.values())}


def _metrics(path: Path) -> list[Json]:
    try:
        return [row for row in read_metrics(path) if isinstance(row, dict) and "step" in row]
    except (OSError, UnicodeDecodeError):
        return []


def _try(make: Callable[[], T]) -> T | Missing:
    """A part of the report, or why it is left out. Broken files of other stages must not fail the report."""
    try:
        return make()
    except Missing as missing:
        return missing
    except (ValueError, TypeError, KeyError) as error:
        return Missing(f"This part cannot be drawn from the files as they are ({error}).")


def _tasks(results: Results, metric: str) -> dict[str, list[str]]:
    """The tasks of each slice, in order."""
    found: dict[str, set[str]] = {}
    for row in results.rows:
        for part, group in row.scores.get(metric, {}).items():
            found.setdefault(part, set()).update(group.tasks)
    return {part: in_order(tasks, TASKS) for part, tasks in found.items()}


def _all_slices(results: Results) -> list[str]:
    return list(dict.fromkeys(part for metric in results.metrics for part in results.slices(metric.name)))


def _value(group: ResultGroup | None) -> float | None:
    return group.value if group else None


def _head(part: str) -> str:
    """A slice as a column's head."""
    return TOGETHER if part == NO_SLICE else part


def _place(part: str) -> str:
    """A slice in a sentence."""
    return _PLACES.get(part, part)


def _enumerated(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _student_size(student: ResultRow) -> str:
    total, active = student.params_total, student.params_active
    if active is None or total == active:
        return _millions(total)
    return f"{_millions(total)}, of which {_millions(active)} are active for a token"


# -- numbers in words --------------------------------------------------------------------------------------------------


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _floor(value: float, digits: int = 2) -> float:
    """Rounded down, so that a bar that was just missed does not read as reached."""
    scale = 10.0**digits
    return math.floor(value * scale + 1e-9) / scale


def _millions(count: int | None) -> str:
    if count is None:
        return "–"
    if count >= 1e9:
        return f"{count / 1e9:.1f} billion"
    return f"{count / 1e6:.2f} million" if count < 1e7 else f"{count / 1e6:.0f} million"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def main(recipe: Recipe, options: argparse.Namespace) -> None:
    """The stage `report`."""
    command = shlex.join(["clkd", "run", str(options.recipe), *options.overrides])
    path = recipe.run.dir / "report.html"
    write_text(path, build(recipe, command))
    print(f"report: {path} ({path.stat().st_size / 1024:.0f} KiB)")
