"""The schedules of a recipe's jobs before anything runs: a table, and a picture over samples seen.

    python -m tools.docs.plot_schedules RECIPE.yaml [job=NAME] [--picture FILE.png]

Alpha is shown for the easiest, the median and the hardest sample. An adaptive release follows a gap that is measured
in training; shown is the latest that it can be.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from pipeline.errors import ConfigError, run_main
from pipeline.method.release import ClosingGap, Floats
from pipeline.method.schedules import Schedules
from pipeline.recipe import JobConfig, Recipe, parse_args

COLOURS = ("#4338ca", "#0d9488", "#c2578a", "#a16207", "#0284c7", "#64748b")
PERCENTILES = (0.0, 0.5, 1.0)
ROWS = 11
"""Lines of the table: every tenth of training."""


def scheduled(recipe: Recipe) -> dict[str, JobConfig]:
    """Jobs with a teacher or a curriculum, or the one that `job` names. ConfigError if there is none."""
    chosen = {recipe.job: recipe.jobs[recipe.job]} if recipe.job else recipe.jobs
    found = {name: job for name, job in chosen.items() if job.distill or job.curriculum}
    if not found:
        raise ConfigError(f"no job with `distill` or `curriculum` among {sorted(chosen)}: nothing to show.")
    return found


def values(job: JobConfig, steps: Sequence[int]) -> Floats:
    """A row for each step: samples seen before it, alpha at the three percentiles, competence."""
    schedules = Schedules(job)
    latest, percentiles = ClosingGap(ema=0.0), np.array(PERCENTILES, np.float32)
    rows = [
        [
            schedules.samples(step),
            *schedules.alpha(step, percentiles, np.zeros(len(percentiles), bool), latest),
            schedules.competence(step) if job.curriculum else 1.0,
        ]
        for step in steps
    ]
    return np.array(rows, np.float32)


def table(name: str, job: JobConfig) -> str:
    """The schedule in eleven lines."""
    steps = [round(tenth * (job.steps - 1) / (ROWS - 1)) for tenth in range(ROWS)]
    about = f"{job.steps:,} steps of {job.batch.global_size} samples"
    release = f", release: {job.distill.release}" if job.distill else ""
    lines = [f"{name}: {about}{release}", f"{'samples seen':>14}{'alpha: easy':>13}{'median':>9}{'hard':>9}"]
    lines[1] += f"{'competence':>12}"
    for samples, easy, median, hard, competence in values(job, steps).tolist():
        lines.append(f"{samples:>14,.0f}{easy:>13.3f}{median:>9.3f}{hard:>9.3f}{competence:>12.3f}")
    return "\n".join(lines)


def plot(jobs: dict[str, JobConfig], path: Path) -> None:
    """Write the picture: alpha with a band from easiest to hardest, competence."""
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for position, (name, job) in enumerate(jobs.items()):
        colour = COLOURS[position % len(COLOURS)]
        samples, easy, median, hard, competence = values(job, range(job.steps)).T
        panels[0].fill_between(samples, easy, hard, color=colour, alpha=0.2, linewidth=0)
        for panel, curve in zip(panels, (median, competence), strict=True):
            panel.plot(samples, curve, color=colour, label=name, linewidth=1.6)
    titles = ("Weight of the teacher on labelled samples (alpha)", "Share of samples eligible")
    for panel, title in zip(panels, titles, strict=True):
        _finish(panel, title)
    panels[0].set_ylim(0, 1.05)
    panels[1].set_ylim(0, 1.05)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _finish(panel: Axes, title: str) -> None:
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    panel.set_xlabel("samples seen", fontsize=9)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.tick_params(labelsize=9, length=0)
    panel.grid(axis="y", color="#e4e7ec")
    panel.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.docs.plot_schedules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--picture", type=Path, help="PNG, SVG or PDF that receives the picture")
    args = parse_args("plot_schedules", argv, parser)
    jobs = scheduled(args.recipe)
    print("\n\n".join(table(name, job) for name, job in jobs.items()))
    if args.options.picture:
        plot(jobs, args.options.picture)
        print(f"picture: {args.options.picture}")


if __name__ == "__main__":
    run_main(main)
