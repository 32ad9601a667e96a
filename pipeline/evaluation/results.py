"""The result table: rows, the bars they have to reach, the machine they were measured on. Arithmetic only."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.evaluation.metrics import NO_SLICE, SCENE_SCORE, Group, Metric, Scores

BLIND_TARGET = 2.0
"""A teacher that uses the image scores at least this many times as high as with the image blanked."""
QUALITY_TARGET = 0.95
SPEED_TARGET = 2.0
_PACKAGES = ("torch", "transformers", "deepspeed")
TOGETHER = "all samples"
"""Head of the column of all slices, and of the only one where records name none."""
_SPEED_HEADS = ("model", "active / total", "TTFT ms", "ms/token", "e2e ms", "speed-up")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    slug: str
    model: str
    """Model reference."""
    blind: bool
    scores: Scores
    """By metric and slice: value, number of answers, and the same of every task."""
    overall: Mapping[str, Group]
    """By metric, over the samples of all slices: where that means something and there are several."""
    blind_scores: Scores
    """The same model's scores with the image blanked: what the question alone gives away."""
    params_total: int
    params_active: int
    """Parameters that one token passes through."""
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    speedup_vs_teacher: float
    """End to end at batch 1, the same number of new tokens; above 1 is faster than the first row."""
    cut: int = 0
    """Answers that `max_new_tokens` ended: they are scored as they stand."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio and what it should be at least."""

    name: str
    value: float | None
    """None: not measured, or a number above 0 over 0. 0 over 0 counts as 0."""
    target: float
    reached: bool
    kind: Literal["blind", "teacher", "speed"]
    """Teacher against itself without the image; student against teacher in a metric; the same in speed."""
    metric: str | None = None
    slice: str | None = None


def bars(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[Bar]:
    """What the student should reach. The first row is the teacher, the last row the student.

    The drawn scenes have the demo's five bars, measured or not, on their own score. Other data have those that can be
    measured: student against teacher in every metric and slice, and speed.

    Args:
        rows: the table in order, at least one row.
        metrics: those of the rows' scores.
    """
    teacher, student = rows[0], rows[-1] if len(rows) > 1 and not rows[-1].blind else None
    speed = student.speedup_vs_teacher if student else None
    fast = _bar("clkd_speedup", speed, 1.0, SPEED_TARGET, "speed")
    if SCENE_SCORE in metrics:
        parts = teacher.scores.get(SCENE_SCORE.name, {})
        blind = [
            _quality(f"teacher_vs_blind_{part}", SCENE_SCORE, part, teacher.scores, teacher.blind_scores, "blind")
            for part in parts
        ]
        learned = [_learned(f"clkd_vs_teacher_{part}", SCENE_SCORE, part, teacher, student) for part in parts]
        return [*blind, *learned, fast]
    learned = [
        _learned(f"clkd_vs_teacher_{metric.name}_{part}", metric, part, teacher, student)
        for metric in metrics
        for part in teacher.scores.get(metric.name, {})
    ]
    return [bar for bar in [*learned, fast] if bar.value is not None]


def table(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """A block for each metric, then sizes (in millions) and speed, as aligned text."""
    blocks = [_metric_lines(metric, rows) for metric in metrics if any(row.scores.get(metric.name) for row in rows)]
    return "\n\n".join("\n".join(_aligned(lines)) for lines in [*blocks, [_SPEED_HEADS, *map(_speed, rows)]])


def latency_line(settings: Mapping[str, Any]) -> str:
    """The settings that the timings were taken with, in one line."""
    return (
        f"latency: batch {settings['batch_size']}, {settings['new_tokens']} forced new tokens, "
        f"{settings['samples']} samples x {settings['repeats']} repeats, {settings['threads']} thread(s), "
        f"expert loop of MoE models: {settings['experts_implementation']}"
    )


def cut_line(rows: Sequence[Row], questions: int, max_new_tokens: int) -> str:
    """Whose answers were cut, in one line."""
    counts = ", ".join(f"{row.name} {row.cut}" for row in rows if row.cut)
    return (
        f"cut at evaluation.max_new_tokens = {max_new_tokens}, of {questions} answers each, and scored as they stand: "
        f"{counts}"
    )


def bar_lines(measured: Sequence[Bar]) -> str:
    """The bars as aligned text."""
    lines = [
        (bar.name, "-" if bar.value is None else f"{bar.value:.3f}", f">= {bar.target:g}", _verdict(bar))
        for bar in measured
    ]
    return "\n".join(_aligned([("bar", "value", "target", ""), *lines]))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on: processor, cores this process may use, threads, accelerator, versions."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def gold_lines(scores: Scores, metrics: Sequence[Metric], questions: int, unanswered: int) -> list[str]:
    """Which answers are in no score, in a line each.

    Args:
        scores: of any row; the questions are the same for all.
        questions: samples that every model answered.
        unanswered: those of them without a gold answer.
    """
    if unanswered == questions:
        return [
            f"none of the {questions} samples has a gold answer: nothing can be scored; the answers are in "
            "evaluation/<row>.jsonl"
        ]
    golds = questions - unanswered
    lines = [f"{unanswered} of {questions} samples have no gold answer: answered, in no score"] if unanswered else []
    for metric in metrics:
        counted = sum(group["n"] for group in scores.get(metric.name, {}).values())
        if counted < golds:
            lines.append(
                f"{metric.title}: {golds - counted} of {golds} gold answers hold nothing that it knows: in no score"
            )
    return lines


def _learned(name: str, metric: Metric, part: str, teacher: Row, student: Row | None) -> Bar:
    return _quality(name, metric, part, student.scores if student else {}, teacher.scores, "teacher")


def _quality(
    name: str, metric: Metric, part: str, ours: Scores, theirs: Scores, kind: Literal["blind", "teacher"]
) -> Bar:
    """Ours over theirs in a metric and slice; the other way round where lower is better."""
    mine, other = (_value(scores.get(metric.name, {}).get(part)) for scores in (ours, theirs))
    above, below = (other, mine) if metric.lower_is_better else (mine, other)
    target = {"blind": BLIND_TARGET, "teacher": QUALITY_TARGET}[kind]
    return _bar(name, above, below, target, kind, metric.name, part)


def _bar(
    name: str,
    above: float | None,
    below: float | None,
    target: float,
    kind: Literal["blind", "teacher", "speed"],
    metric: str | None = None,
    part: str | None = None,
) -> Bar:
    if above is None or below is None:
        return Bar(name, None, target, False, kind, metric, part)
    value = above / below if below else None if above else 0.0
    return Bar(name, value, target, above > 0 and above >= target * below, kind, metric, part)


def _verdict(bar: Bar) -> str:
    if bar.value is None and not bar.reached:
        return "not measured"
    return "reached" if bar.reached else "MISSED"


def _metric_lines(metric: Metric, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Columns: the slices that are there, all of them together, and the slices without the image."""
    name, slices = metric.name, list(dict.fromkeys(part for row in rows for part in row.scores.get(metric.name, {})))
    together = [TOGETHER] if any(name in row.overall for row in rows) else []
    heads = [TOGETHER] if slices == [NO_SLICE] else slices
    lines = [(f"{metric.title}, {metric.unit}", *heads, *together, *(f"{head} (blind)" for head in heads))]
    for row in rows:
        seen, blind = row.scores.get(name, {}), row.blind_scores.get(name, {})
        groups = [*map(seen.get, slices), *([row.overall.get(name)] if together else []), *map(blind.get, slices)]
        lines.append((row.name, *(shown(metric.unit, _value(group)) for group in groups)))
    return lines


def shown(unit: str, value: float | None) -> str:
    """A metric's value as tables show it."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if unit == "%" else f"{value:.4f}"


def _value(group: Group | None) -> float | None:
    return group["value"] if group else None


def _speed(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.params_active / 1e6:.2f} / {row.params_total / 1e6:.2f} M",
        f"{row.ttft_ms:.1f}",
        f"{row.tpot_ms:.2f}",
        f"{row.e2e_ms:.1f}",
        f"{row.speedup_vs_teacher:.2f}x",
    )


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
