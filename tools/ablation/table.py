"""The ablation's table from its cells' results: mean, spread, paired bootstrap; CSV, Markdown, picture.

Shapes: S seeds, C scenes of a slice, B bootstrap resamples.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.errors import UserError
from tools.ablation.rows import BASELINE, ROWS

Json = dict[str, Any]
Cells = Mapping[str, Mapping[int, Json]]
"""Results by row and seed."""
Floats = NDArray[np.float64]

SLICES = ("regular", "corner")
MEASURES = {"score": ("score", None), "ce": ("nats", "tokens")}
"""Measure: (what is summed over samples, what it is divided by; None: the number of samples)."""
RESAMPLES = 10_000
BEGIN, END = "<!-- ablation-table -->", "<!-- /ablation-table -->"
COLOURS = {"regular": "#0284c7", "corner": "#c2578a"}


@dataclass(frozen=True, slots=True)
class Difference:
    """A row against the baseline, with the ends of a 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def read_cells(folder: Path, split: str) -> dict[str, dict[int, Json]]:
    """Finished results of the known rows, in order of the table."""
    found: dict[str, dict[int, Json]] = {}
    for name in ROWS:
        paths = sorted(folder.glob(f"{name}-seed*/{split}.json"))
        contents = [json.loads(path.read_text()) for path in paths]
        if contents:
            found[name] = {c["seed"]: c for c in sorted(contents, key=lambda c: c["seed"])}
    return found


def paired_bootstrap(diff_SC: Floats, size_SC: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Mean difference sum(diff) / sum(size) and its 95% percentile interval, over resampled seeds and scenes.

    Seeds and scenes are drawn independently with replacement, and every question of a drawn scene comes with it:
    questions about one image are not independent, nor are a seed's answers. [published: bootstrap of two crossed
    factors, Owen 2007; it tends to be too wide rather than too narrow]

    Args:
        diff_SC: summed differences of each seed and scene.
        size_SC: what each of them is divided by: samples, or tokens.
    """
    rng = np.random.default_rng(seed)
    seeds, scenes = diff_SC.shape
    drawn_BS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    drawn_BC = rng.multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples)
    sums_B, sizes_B = (((drawn_BS @ x_SC) * drawn_BC).sum(1) for x_SC in (diff_SC, size_SC))
    low, high = np.quantile(sums_B / sizes_B, (0.025, 0.975))
    return Difference(float(diff_SC.sum() / size_SC.sum()), float(low), float(high))


def difference(cells: Cells, row: str, measure: str, part: str) -> Difference | None:
    """A row against the baseline over the seeds that both have; None: there is none, or it is the baseline.

    Raises:
        UserError: their results are of different samples.
    """
    seeds = sorted(set(cells.get(row, {})) & set(cells.get(BASELINE, {})))
    if not seeds or row == BASELINE or ROWS[row].model:
        return None
    ours, theirs = (
        [_by_scene(cells[name][seed], measure, part, seed) for seed in seeds] for name in (row, BASELINE)
    )  # fmt: skip
    if ours[0][2] != theirs[0][2]:
        raise UserError(f"{row} and {BASELINE}: scored on different samples. Score one of them again.")
    diff_SC = np.stack([o[0] - t[0] for o, t in zip(ours, theirs, strict=True)])
    return paired_bootstrap(diff_SC, np.stack([o[1] for o in ours]))


def _by_scene(cell: Json, measure: str, part: str, seed: int) -> tuple[Floats, Floats, list[str]]:
    """Sums and sizes of each scene [C], and the sample ids behind them."""
    above, below = MEASURES[measure]
    rows = [r for r in cell["samples"] if r["slice"] == part]
    scenes, place = np.unique([r["scene"] for r in rows], return_inverse=True)
    sums = np.bincount(place, [r[above] for r in rows], len(scenes)).astype(np.float64)
    sizes = np.bincount(place, [r[below] if below else 1 for r in rows], len(scenes))
    return sums, sizes.astype(np.float64), [r["sample_id"] for r in rows]


def values(cells: Mapping[int, Json], measure: str, part: str) -> list[float]:
    """A row's value of each seed."""
    return [cell["slices"][part][measure] for cell in cells.values() if part in cell["slices"]]


def markdown(cells: Cells, split: str) -> str:
    """Two tables, scores and cross-entropies, and a line that says how to read them."""
    some = next(iter(next(iter(cells.values())).values()))
    sizes = ", ".join(f"{some['slices'][part]['n']} {part}" for part in SLICES if part in some["slices"])
    machine = some["machine"]
    lines = [
        f"Split `{split}`: {sizes} questions. Mean ± standard deviation over seeds; difference to `{BASELINE}` with "
        "its 95% interval (paired bootstrap over seeds and scenes); bold: the interval leaves 0 out. "
        f"Machine: {machine['cpu']}, {machine['accelerator'] or 'no accelerator'}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, deepspeed {machine['deepspeed']}.",
        "",
        "Score in per cent (higher is better):",
        "",
        *_table(cells, "score", 100, 1),
        "",
        "Cross-entropy of the gold answers in nats per token (lower is better):",
        "",
        *_table(cells, "ce", 1, 4),
    ]
    return "\n".join(lines)


def _table(cells: Cells, measure: str, unit: float, digits: int) -> list[str]:
    heads = ("row", "", "seeds", *SLICES, *(f"{part}, difference" for part in SLICES))
    lines = ["| " + " | ".join(heads) + " |", "|---|---|--:|--:|--:|--:|--:|"]
    for row, by_seed in cells.items():
        means = [_mean(values(by_seed, measure, part), unit, digits) for part in SLICES]
        differences = [_interval(difference(cells, row, measure, part), unit, digits) for part in SLICES]
        lines.append("| " + " | ".join((f"`{row}`", ROWS[row].title, str(len(by_seed)), *means, *differences)) + " |")
    return lines


def _mean(found: Sequence[float], unit: float, digits: int) -> str:
    if not found:
        return "-"
    spread = f" ± {unit * np.std(found, ddof=1):.{digits}f}" if len(found) > 1 else ""
    return f"{unit * np.mean(found):.{digits}f}{spread}"


def _interval(found: Difference | None, unit: float, digits: int) -> str:
    if found is None:
        return "-"
    mean = f"{unit * found.mean:+.{digits}f}"
    return f"{f'**{mean}**' if found.clear else mean} [{unit * found.low:+.{digits}f}, {unit * found.high:+.{digits}f}]"


def write_between_markers(path: Path, content: str) -> None:
    """Replace what stands between the table's markers in a document.

    Raises:
        UserError: the document is missing, or has no such markers.
    """
    text = path.read_text() if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: there is no {BEGIN} followed by {END} to write the table between.")
    path.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}")


def write_csv(cells: Cells, path: Path) -> None:
    """One line per cell and slice."""
    fields = (
        *("row", "seed", "split", "slice", "score", "ce", "n", "general", "region", "suggestion"),
        *("params_active", "params_total", "seconds"),
        *("hardness_and_prior", "hardness_and_length", "corner_in_hardest_decile", "commit", "date"),
    )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", extrasaction="ignore")
        writer.writeheader()
        for by_seed in cells.values():
            for cell in by_seed.values():
                about = cell | (cell["training"] or {})
                writer.writerows(about | {"slice": part} | found for part, found in cell["slices"].items())


def plot(cells: Cells, path: Path) -> None:
    """Every seed as a dot, mean and standard deviation as a bar; scores on the left, cross-entropies on the right."""
    figure = Figure(figsize=(11, 1.2 + 0.34 * len(cells)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _dots(left, cells, "score", 100, "Score, %")
    _dots(right, cells, "ce", 1, "Cross-entropy of gold answers, nats per token")
    left.set_yticks(range(len(cells)), [ROWS[row].title for row in cells], fontsize=8)
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _dots(axes: Axes, cells: Cells, measure: str, unit: float, title: str) -> None:
    for part, shift in zip(SLICES, (-0.14, 0.14), strict=True):
        for place, by_seed in enumerate(cells.values()):
            found = unit * np.array(values(by_seed, measure, part))
            if not len(found):
                continue
            y = place + shift
            axes.plot(found, [y] * len(found), "o", color=COLOURS[part], markersize=3, alpha=0.45)
            spread = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
            label = part if place == 0 else None
            axes.errorbar(
                found.mean(), y, xerr=spread, fmt="|", color=COLOURS[part], markersize=9, capsize=2, label=label
            )
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="x", color="#e4e7ec", linewidth=0.8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
