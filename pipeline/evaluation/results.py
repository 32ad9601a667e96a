"""The result table: rows, and the machine they were measured on. Arithmetic only."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluation.metrics import NO_SLICE, Group, Metric, Scores

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
    gap_closed: Mapping[str, Group] = field(default_factory=dict)
    """By slice, in the first metric; see `bars.gaps_closed`."""


def table(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """A block for each metric, then sizes (in millions) and speed, as aligned text."""
    blocks = [_metric_lines(metric, rows) for metric in metrics if any(row.scores.get(metric.name) for row in rows)]
    if any(row.gap_closed for row in rows):
        blocks.insert(1, _gap_lines(rows, metrics[0]))
    return "\n\n".join("\n".join(aligned(lines)) for lines in [*blocks, [_SPEED_HEADS, *map(_speed, rows)]])


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
        if counted < golds and not metric.partial:
            lines.append(
                f"{metric.title}: {golds - counted} of {golds} gold answers hold nothing that it knows: in no score"
            )
    return lines


def _metric_lines(metric: Metric, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Columns: the slices that are there, all of them together, and the slices without the image."""
    name, slices = metric.name, list(dict.fromkeys(part for row in rows for part in row.scores.get(metric.name, {})))
    together = [TOGETHER] if any(name in row.overall for row in rows) else []
    heads = [TOGETHER] if slices == [NO_SLICE] else slices
    lines = [(f"{metric.title}, {metric.unit}", *heads, *together, *(f"{head} (blind)" for head in heads))]
    for row in rows:
        seen, blind = row.scores.get(name, {}), row.blind_scores.get(name, {})
        groups = [*map(seen.get, slices), *([row.overall.get(name)] if together else [])]
        cells = [_with_interval(metric.unit, group) for group in groups]
        lines.append((row.name, *cells, *(shown(metric.unit, value_of(blind.get(part))) for part in slices)))
    return lines


def _gap_lines(rows: Sequence[Row], metric: Metric) -> list[tuple[str, ...]]:
    slices = list(dict.fromkeys(part for row in rows for part in row.gap_closed))
    heads = [TOGETHER if part == NO_SLICE else part for part in slices]
    shares = [[_with_interval("%", row.gap_closed.get(part)) for part in slices] for row in rows if row.gap_closed]
    named = [row.name for row in rows if row.gap_closed]
    return [(f"gap closed in {metric.title}, %", *heads), *((n, *s) for n, s in zip(named, shares, strict=True))]


def _with_interval(unit: str, group: Group | None) -> str:
    text = shown(unit, value_of(group))
    if group is None or (ends := group.get("interval")) is None:
        return text
    return f"{text} [{', '.join(shown(unit, end) for end in ends)}]"


def shown(unit: str, value: float | None) -> str:
    """A metric's value as tables show it."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if unit == "%" else f"{value:.4f}"


def value_of(group: Group | None) -> float | None:
    """Its value, where there is one."""
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


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
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
