"""Figures of the report as inline SVG: pure functions of plain numbers, no files.

Shapes: S logged steps, L MoE layers, E experts, M samples.
"""

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

Floats = NDArray[np.float64]

INK, MUTED, HAIRLINE = "#1f2430", "#667085", "#e4e7ec"
SLICE_COLOURS = {"regular": "#5b84b1", "corner": "#e08e45", "unknown": "#98a2b3"}
ACCENT = "#4338ca"
_JOB_COLOURS = ("#98a2b3", "#0d9488", "#c2578a", "#a16207", "#0284c7", "#64748b")
_SLICE_COLOURS = ("#5b84b1", "#e08e45", "#3d9a8b", "#b25d8c", "#8f7a2e", "#7a6fc0")
_TASK_COLOURS = ("#0d9488", "#8b6fb8", "#c2578a", "#a16207")
_LOAD_COLOURS = LinearSegmentedColormap.from_list("load", ["#3f6fa6", "#a9c3de", "#f8f7f4", "#f0b98a", "#c4581f"])
_HALO = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
_BINS = 32
_MOST_GROUPS = 8
"""Tasks or slices that a histogram tells apart; the rarest beyond are drawn as one."""
_OTHERS = "others"
_MAX_HEAT_ROWS = 96
_STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": HAIRLINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a slice or task may be called anything
    # Text stays text: selectable, small, in the page's own font (narrower than the one measured here).
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
}


@dataclass(frozen=True, slots=True)
class JobCurves:
    """One training job's logged lines."""

    label: str
    colour: str
    rows: Sequence[Mapping[str, Any]]

    def series(self, key: str, *, over: str = "step", distilling: bool = False) -> tuple[Floats, Floats]:
        """(`over`, values) of a scalar, both [S]: lines that hold two finite numbers.

        Args:
            over: what the curve is drawn over, `step` or `samples`.
            distilling: leave out lines with alpha 0, where KL and hardness were not computed and read 0.
        """
        kept = [r for r in self.rows if _is_number(r.get(key)) and _is_number(r.get(over))]
        kept = [r for r in kept if r.get("alpha") or not distilling]
        return np.array([r[over] for r in kept], float), np.array([r[key] for r in kept], float)

    def expert_load(self) -> tuple[Floats, Floats] | None:
        """(steps [S], share of tokens [S, L, E], summing to 1 over E); None for a dense model."""
        kept = [r for r in self.rows if r.get("expert_load")]
        if not kept:
            return None
        return np.array([r["step"] for r in kept], float), np.array([r["expert_load"] for r in kept], float)


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot of a logged scalar."""

    key: str
    title: str
    distilling: bool = False
    """Only where the teacher has weight."""
    idle: float = 0.0
    """What jobs log that do not use this at all: a job with nothing else is not drawn."""
    top: float | None = None
    bottom: float | None = 0.0
    """None: as low as the values go, with a line at 0."""
    band: tuple[str, str] | None = None
    """Scalars between which a pale band is drawn."""


@dataclass(frozen=True, slots=True)
class HardnessView:
    """Hardness of M samples with what they are."""

    title: str
    hardness: Floats
    tasks: Sequence[str]
    slices: Sequence[str]


def job_colours(count: int) -> list[str]:
    """Colours of `count` jobs; the last, the student this run is about, gets the accent."""
    return [_JOB_COLOURS[i % len(_JOB_COLOURS)] for i in range(count - 1)] + [ACCENT] * (count > 0)


def slice_colours(names: Sequence[str]) -> dict[str, str]:
    """Every slice's colour; those of the drawn scenes keep theirs."""
    known = {name: SLICE_COLOURS[name] for name in names if name in SLICE_COLOURS}
    free = cycle([colour for colour in _SLICE_COLOURS if colour not in known.values()])
    return {name: known.get(name) or next(free) for name in names}


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One model's values of a metric, one a slice, with and without the image; None: not measured."""

    name: str
    values: Sequence[float | None]
    blind: Sequence[float | None]


@matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]
def score_bars(name: str, title: str, unit: str, colours: Mapping[str, str], rows: Sequence[ScoreRow]) -> str:
    """Horizontal bars of each row's values, with a mark where the same model stands without the image.

    The first row's values continue as dotted lines.

    Args:
        name: of the metric, for ids.
        unit: `%` for values in [0, 1]; others are drawn as they are.
        colours: of every slice, in order.
    """
    step, share = 0.72 / len(colours), unit == "%"
    figure, (axes,) = _figure(1, height=(0.2 * len(colours) + 0.22) * len(rows) + 0.8)
    top = 1.0 if share else max((v for row in rows for v in (*row.values, *row.blind) if v is not None), default=1.0)
    for place, (part, colour) in enumerate(colours.items()):
        values, blind = [row.values[place] for row in rows], [row.blind[place] for row in rows]
        y = np.arange(len(rows)) + (place - (len(colours) - 1) / 2) * step
        axes.barh(y, [v or 0.0 for v in values], height=0.89 * step, color=colour, label=part)
        marks = [float("nan") if v is None else v for v in blind]
        axes.plot(marks, y, linestyle="", marker="|", markersize=11, markeredgewidth=2, color=INK,
                  label=None if place else "without the image")  # fmt: skip
        for height, value in zip(y, values, strict=True):
            text = "not measured" if value is None else f"{100 * value:.1f}" if share else f"{value:.3f}"
            axes.text((value or 0.0) + 0.006 * top, height, text, va="center", fontsize=8.5, color=MUTED, bbox=_HALO)
        first = values[0] if values else None
        if first is not None:
            axes.axvline(first, color=colour, linewidth=1.1, linestyle=(0, (1, 2)), zorder=0)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], color=INK, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.06 * top or 1.0)
    if share:
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=min(6, len(colours) + 1), handlelength=1.0)
    return _svg(figure, f"scores-{name}", f"{title} by slice, one group of bars per model")


@dataclass(frozen=True, slots=True)
class GapRow:
    """One model's share of the gap, a slice, with its interval; None: not measured."""

    name: str
    shares: Sequence[tuple[float, float, float] | None]
    """(value, low, high)."""


@matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]
def gap_closed(baseline: str, teacher: str, colours: Mapping[str, str], rows: Sequence[GapRow]) -> str:
    """Dots with intervals between the baseline, at 0%, and the teacher, at 100%; one group a model.

    Args:
        colours: of every slice, in order.
    """
    step = 0.66 / len(colours)
    figure, (axes,) = _figure(1, height=(0.34 * len(colours) + 0.2) * len(rows) + 0.9)
    ends = [end for row in rows for share in row.shares if share is not None for end in share]
    lowest, highest = max(min(0.0, *ends), -0.5), min(max(1.0, *ends), 1.5)
    for place, (part, colour) in enumerate(colours.items()):
        known = [(y, row.shares[place]) for y, row in enumerate(rows)]
        for y, share in known:
            if share is None:
                continue
            value, low, high = share
            height = y + (place - (len(colours) - 1) / 2) * step
            axes.plot([low, high], [height, height], color=colour, linewidth=3, alpha=0.4)
            axes.plot([0, value], [height, height], color=colour, linewidth=1.2, zorder=0)
            axes.plot([value], [height], "o", color=colour, markersize=9, label=None if y else part)
            shown = min(max(value, lowest), highest)
            axes.annotate(f"{100 * value:.0f}%", (shown, height), xytext=(0, 8), textcoords="offset points",
                          ha="center", fontsize=8.5, color=INK, bbox=_HALO)  # fmt: skip
    for where, text in ((0.0, baseline), (1.0, teacher)):
        axes.axvline(where, color=INK, linewidth=1.2)
        axes.annotate(text, (where, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 5),
                      textcoords="offset points", ha="center", fontsize=9, color=INK)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.name for row in rows], color=INK, fontsize=10)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(lowest - 0.05, highest + 0.05)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside lower left", ncols=len(colours), handlelength=1.0)
    return _svg(figure, "gap", f"Share of the gap from {baseline} to {teacher} that each model closes")


@matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]
def training_curves(jobs: Sequence[JobCurves]) -> str:
    """Loss, cross-entropy and KL over steps, one line per job."""
    panels = (
        Panel("loss", "Loss that is optimized"),
        Panel("ce", "Cross-entropy (nats per token)"),
        Panel("kl", "KL from the teacher (nats per token)", distilling=True),
    )
    return _line_panels("training", "Training curves of the students", jobs, panels, smooth=True)


@matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]
def schedule_curves(jobs: Sequence[JobCurves]) -> str:
    """Release, competence, tilt, hardness, reads of the store and the gap over samples seen, one line per job."""
    panels = (
        Panel("alpha", "Weight of the teacher (alpha)", top=1.05, band=("alpha_min", "alpha_max")),
        Panel("competence", "Share of samples eligible", idle=1.0, top=1.05),
        Panel("sample_beta", "Tilt to hard samples (beta)", bottom=None),
        Panel("token_hardness", "Token hardness (mean)", distilling=True),
        Panel("targets_read", "Targets read in a step (samples)"),
        Panel("gap", "Gap to the teacher (nats a token)", bottom=None),
    )
    title = "Release, competence, tilt and hardness over samples seen"
    return _line_panels("schedules", title, jobs, panels, smooth=False, over="samples")


@matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]
def hardness_histograms(views: Sequence[HardnessView]) -> str:
    """A row of two panels per view: hardness by task and by slice, each group normalised to 1."""
    figure, axes = _figure(2, height=2.35 * len(views), rows=len(views))
    top = max((float(v.hardness.max(initial=0.0)) for v in views), default=0.0)
    edges = np.linspace(0, min(1.0, 1.05 * top) or 1.0, _BINS + 1)
    for row, view in enumerate(views):
        tasks, slices = _few(view.tasks), _few(view.slices)
        colours = {task: _TASK_COLOURS[i % len(_TASK_COLOURS)] for i, task in enumerate(sorted(set(tasks)))}
        _histogram(axes[2 * row], f"{view.title}, by task", view.hardness, tasks, colours, edges)
        known = [name for name in SLICE_COLOURS if name in slices]
        colours = slice_colours([*known, *sorted(set(slices) - set(known))])
        _histogram(axes[2 * row + 1], f"{view.title}, by slice", view.hardness, slices, colours, edges)
    for panel in axes[-2:]:
        panel.set_xlabel("hardness")
    return _svg(figure, "hardness", "Distribution of sample hardness by task and by slice, before and after training")


@matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]
def expert_heat_map(jobs: Sequence[JobCurves]) -> str | None:
    """Expert load over steps, a panel per MoE job: rows are layer x expert, colour is the load against an even one."""
    loads = [(job, *logged) for job in jobs if (logged := job.expert_load())]
    if not loads:
        return None
    num_rows = min(max(load_SLE[0].size for _, _, load_SLE in loads), _MAX_HEAT_ROWS)
    figure, axes = _figure(len(loads), height=max(1.9, 0.24 * num_rows + 0.9))
    for panel, (job, steps, load_SLE) in zip(axes, loads, strict=True):
        image = _heat_panel(panel, steps, load_SLE, labelled=panel is axes[0])
        panel.set_title(job.label)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015, aspect=14, ticks=[0, 0.5, 1, 1.5, 2])
    bar.ax.set_yticklabels(["idle", "half", "even", "1.5×", "≥ 2×"])
    bar.outline.set_visible(False)  # type: ignore[operator]
    return _svg(figure, "experts", "Share of tokens per expert over training, relative to an even load")


@matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]
def duration_bars(stages: Mapping[str, float]) -> str:
    """Seconds of every stage, in the order they ran."""
    figure, (axes,) = _figure(1, height=0.26 * len(stages) + 0.5)
    values = list(stages.values())
    axes.barh(range(len(values)), values, height=0.62, color="#b4bccb")
    for place, value in enumerate(values):
        axes.text(value + max(values) * 0.008, place, duration(value), va="center", fontsize=8.5, color=MUTED)
    axes.set_yticks(range(len(values)), list(stages), color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, max(max(values) * 1.12, 1e-9))
    axes.xaxis.set_visible(False)
    axes.spines[["bottom", "left"]].set_visible(False)
    return _svg(figure, "durations", "Duration of every stage")


def duration(seconds: float) -> str:
    """As people write it: `8.3 s`, `2 min 5 s`, `1 h 3 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _line_panels(
    name: str, title: str, jobs: Sequence[JobCurves], panels: Sequence[Panel], *, smooth: bool, over: str = "step"
) -> str:
    """Three panels a row."""
    rows = -(-len(panels) // 3)
    figure, axes = _figure(3, height=2.35 * rows + 0.35, rows=rows)
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        drawn = {job.label: line for job in jobs if (line := _draw_line(axis, job, panel, over, smooth=smooth))}
        handles |= drawn
        if not drawn:
            axis.text(0.5, 0.5, "not used", transform=axis.transAxes, ha="center", color=MUTED)
        axis.set_title(panel.title)
        axis.set_xlabel({"step": "optimizer step", "samples": "samples seen"}[over])
        axis.xaxis.set_major_locator(MaxNLocator(5 if over == "step" else 4, integer=True))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.grid(axis="y")
        axis.set_xlim(left=0, right=_last(jobs, over))
        axis.set_ylim(bottom=panel.bottom, top=panel.top)
        if panel.bottom is None:
            axis.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    shown = [job.label for job in jobs if job.label in handles]
    if shown:
        lines = [handles[label] for label in shown]
        figure.legend(lines, shown, loc="outside upper left", ncols=4, handlelength=1.4)
    return _svg(figure, name, title)


def _last(jobs: Sequence[JobCurves], over: str) -> float | None:
    """Where the longest job ends, so that all panels share their x axis."""
    return max((float(row[over]) for job in jobs for row in job.rows if _is_number(row.get(over))), default=None)


def _draw_line(axes: Axes, job: JobCurves, panel: Panel, over: str, *, smooth: bool) -> Any:
    """The line, or None if the job logged nothing but the idle value."""
    steps, values = job.series(panel.key, over=over, distilling=panel.distilling)
    if not (values != panel.idle).any():
        return None
    if panel.band:
        (low_x, low), (_, high) = (job.series(key, over=over) for key in panel.band)
        if len(low) == len(high):
            axes.fill_between(low_x, low, high, color=job.colour, alpha=0.2, linewidth=0)
    if smooth and len(values) >= 12:
        axes.plot(steps, values, color=job.colour, linewidth=0.7, alpha=0.28)
        values = _running_mean(values, len(values) // 12)
    width, marker = (2.0 if job.colour == ACCENT else 1.5), ("o" if len(values) == 1 else None)
    (line,) = axes.plot(steps, values, color=job.colour, linewidth=width, marker=marker)
    return line


def _running_mean(values: Floats, reach: int) -> Floats:
    """Centred mean over `reach` neighbours on each side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    mean: Floats = (sums[high] - sums[low]) / (high - low)
    return mean


def _histogram(
    axes: Axes, title: str, values: Floats, groups: Sequence[str], colours: Mapping[str, str], edges: Floats
) -> None:
    names = np.array(groups)
    for group, colour in colours.items():
        members = values[names == group]
        shares = np.histogram(members, edges)[0] / max(len(members), 1)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.16)
        axes.stairs(shares, edges, color=colour, linewidth=1.5, label=f"{group} ({len(members):,})")
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y")
    axes.legend(fontsize=8.5, handlelength=1.0, borderaxespad=0.2)


def _few(names: Sequence[str]) -> list[str]:
    """The names, with the rarest as one where there are more than a legend holds."""
    counts = Counter(names)
    if len(counts) <= _MOST_GROUPS:
        return list(names)
    kept = {name for name, _ in counts.most_common(_MOST_GROUPS - 1)}
    return [name if name in kept else _OTHERS for name in names]


def _heat_panel(axes: Axes, steps: Floats, load_SLE: Floats, *, labelled: bool) -> Any:
    """Draw one job's load; returns the drawn mesh."""
    _, layers, experts = load_SLE.shape
    relative_RS = (load_SLE * experts).reshape(len(steps), -1).T
    edges = np.concatenate([[min(steps[0] - 1, 0)], steps])
    mesh = axes.pcolormesh(
        edges, np.arange(layers * experts + 1), relative_RS, cmap=_LOAD_COLOURS, vmin=0, vmax=2, rasterized=True
    )
    for layer in range(1, layers):
        axes.axhline(layer * experts, color="white", linewidth=2.5)
    if layers * experts <= _MAX_HEAT_ROWS // 4:
        labels = [f"layer {layer + 1} · {expert + 1}" for layer in range(layers) for expert in range(experts)]
        axes.set_yticks(np.arange(layers * experts) + 0.5, labels if labelled else [""] * len(labels))
    else:
        labels = [f"layer {layer + 1}" for layer in range(layers)]
        axes.set_yticks((np.arange(layers) + 0.5) * experts, labels if labelled else [""] * layers)
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[:].set_visible(False)
    return mesh


def _figure(columns: int, *, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page and its panels, row by row. Sizes in inches."""
    figure = Figure(figsize=(10.6, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.patch.set_alpha(0.0)
    return figure, [axes for row in grid for axes in row]


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element to put into HTML: ids prefixed by `name`, so that figures cannot mix them up."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=110, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'((?:href="|url\()#)', rf"\1{name}-", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)
    return re.sub(r">\s+<", "><", svg.strip())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
