"""Figures of `tools.bench.moe` as a picture: time and memory a token, as tokens grow.

    python -m tools.bench.moe_plot FIGURES.json PICTURE.png

A flat line grows in proportion to the tokens; a rising one grows faster.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.errors import run_main
from tools.bench.moe_cases import CASES

COLOURS = ("#667085", "#c2578a", "#e08e45", "#0d9488", "#0284c7", "#4338ca", "#a16207", "#8b6fb8")
TITLES = {"layer": "One MoE layer", "step": "Training step", "step_checkpointing": "Step, activation checkpointing"}


def plot(figures: dict[str, Any], path: Path) -> None:
    """Write the picture: a row for each part, time on the left, memory on the right."""
    by_part = {part: [row for row in figures["rows"] if row["part"] == part and row["ms"]] for part in TITLES}
    by_part = {part: rows for part, rows in by_part.items() if rows}
    figure = Figure(figsize=(9, 0.7 + 2.9 * len(by_part)), layout="constrained")
    grid = figure.subplots(len(by_part), 2, squeeze=False)
    for (part, rows), (left, right) in zip(by_part.items(), grid, strict=True):
        _lines(left, rows, "ms", 1e3, f"{TITLES[part]}: µs a token")
        _lines(right, rows, "peak_mib", 2**10, f"{TITLES[part]}: peak memory, KiB a token")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def _lines(axes: Axes, rows: Sequence[dict[str, Any]], value: str, unit: float, title: str) -> None:
    for colour, (case, about) in zip(COLOURS, CASES.items(), strict=True):
        points = [(row["tokens"], unit * row[value] / row["tokens"]) for row in rows if row["case"] == case]
        if points:
            style = "--" if about.dense else "-"
            axes.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=4, label=about.label)
    ticks = sorted({row["tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tokens // 1024}k" if tokens >= 1024 else str(tokens) for tokens in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens", fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#e4e7ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    source, target = map(Path, sys.argv[1:] if argv is None else argv)
    plot(json.loads(source.read_text()), target)


if __name__ == "__main__":
    run_main(main)
