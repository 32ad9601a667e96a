"""The result table: rows, the bars they have to reach, the machine they were measured on. Arithmetic only."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

BLIND_TARGET = 2.0
"""A teacher that uses the image scores at least this many times as high as with the image blanked."""
QUALITY_TARGET = 0.95
SPEED_TARGET = 2.0
_PACKAGES = ("torch", "transformers", "deepspeed")
_HEADS = ("model", "regular", "corner", "(blind)", "(blind)", "ROUGE-L reg", "ROUGE-L cor", "active / total", "TTFT ms",
          "ms/token", "e2e ms", "speed-up")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    slug: str
    model: str
    """Model reference."""
    blind: bool
    regular: float | None
    """Mean over tasks of the objective score on regular samples, in [0, 1]; None: no such samples."""
    corner: float | None
    blind_regular: float | None
    """The same model's score with the image blanked: what the question alone gives away."""
    blind_corner: float | None
    scores: Mapping[str, Mapping[str, float]]
    """By slice: every task's score, `mean`, `rouge_l` (a proxy), `n`."""
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


def bars(rows: Sequence[Row]) -> list[Bar]:
    """The demo's five bars. The first row is the teacher, the last row the CLKD student.

    Args:
        rows: the table in order, at least one row.
    """
    teacher, student = rows[0], rows[-1] if len(rows) > 1 and not rows[-1].blind else None
    seen = {"regular": teacher.regular, "corner": teacher.corner}
    blind = {"regular": teacher.blind_regular, "corner": teacher.blind_corner}
    learned = {"regular": student.regular, "corner": student.corner} if student else {}
    return [
        *(_bar(f"teacher_vs_blind_{part}", seen[part], blind[part], BLIND_TARGET) for part in seen),
        *(_bar(f"clkd_vs_teacher_{part}", learned.get(part), seen[part], QUALITY_TARGET) for part in seen),
        _bar("clkd_speedup", student.speedup_vs_teacher if student else None, 1.0, SPEED_TARGET),
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text: scores in per cent, parameters in millions."""
    return "\n".join(_aligned([_HEADS, *map(_cells, rows)]))


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


def _bar(name: str, above: float | None, below: float | None, target: float) -> Bar:
    if above is None or below is None:
        return Bar(name, None, target, False)
    value = above / below if below else None if above else 0.0
    return Bar(name, value, target, above > 0 and above >= target * below)


def _verdict(bar: Bar) -> str:
    if bar.value is None and not bar.reached:
        return "not measured"
    return "reached" if bar.reached else "MISSED"


def _cells(row: Row) -> tuple[str, ...]:
    rouge = [row.scores.get(part, {}).get("rouge_l") for part in ("regular", "corner")]
    return (
        row.name,
        *map(_percent, (row.regular, row.corner, row.blind_regular, row.blind_corner, *rouge)),
        f"{row.params_active / 1e6:.2f} / {row.params_total / 1e6:.2f} M",
        f"{row.ttft_ms:.1f}",
        f"{row.tpot_ms:.2f}",
        f"{row.e2e_ms:.1f}",
        f"{row.speedup_vs_teacher:.2f}x",
    )


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


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
