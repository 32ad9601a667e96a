"""What the student should reach, and whether it does. Arithmetic on the result table only.

The first row is the teacher, the last row the student, unless it is a blind one. Differences and shares come with their
interval over draws of the frames, in which all rows share the draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.evaluation.intervals import Interval, Values, interval
from pipeline.evaluation.metrics import SCENE_SCORE, Group, Metric, Scores
from pipeline.evaluation.results import Row, aligned, shown, value_of
from pipeline.recipe import EvaluationConfig

BLIND_TARGET = 2.0
"""A teacher that uses the image scores at least this many times as high as with the image blanked."""
QUALITY_TARGET = 0.95

Kind = Literal["blind", "teacher", "speed", "gap", "gap_closed", "ahead"]
Spreads = Mapping[str, Mapping[str, Mapping[str, Values]]]
"""By row, metric and slice: the values over draws, see `intervals`."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and what it should be at least."""

    name: str
    value: float | None
    """None: not measured, or a number above 0 over 0. 0 over 0 counts as 0."""
    target: float
    reached: bool
    kind: Kind
    """blind: teacher against itself without the image. teacher, speed: student against teacher. gap: teacher less
    baseline. gap_closed: student's share of that. ahead: student less a rival."""
    metric: str | None = None
    slice: str | None = None
    against: str | None = None
    """The rival's name."""
    interval: Interval | None = None


def bars(
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    settings: EvaluationConfig | None = None,
    spreads: Spreads | None = None,
) -> list[Bar]:
    """What the student should reach.

    The drawn scenes have bars, measured or not, on their own score. Other data have those that can be measured:
    student against teacher in every metric and slice, and speed.

    Args:
        rows: the table in order, at least one row.
        metrics: those of the rows' scores.
        settings: the bars' targets, and the rows that they compare with.
        spreads: of the rows that bars compare; None: no intervals.
    """
    settings = settings or EvaluationConfig()
    made = _Bars(rows, metrics, settings, spreads or {})
    if SCENE_SCORE in metrics:
        return [*made.blind(), *made.quality(), *made.gaps(), *made.ahead(), made.speed()]
    measured = [*made.quality(), *made.gaps(), *made.ahead(), made.speed()]
    return [bar for bar in measured if bar.value is not None]


def gaps_closed(
    rows: Sequence[Row], metrics: Sequence[Metric], settings: EvaluationConfig, spreads: Spreads
) -> dict[str, dict[str, Group]]:
    """How much of the way from baseline to teacher each row goes in the first metric, by row and slice.

    Empty without a baseline. Blind rows, baseline and teacher themselves are not in it.
    """
    if settings.baseline is None:
        return {}
    made, name = _Bars(rows, metrics, settings, spreads), metrics[0].name
    others = [row for row in rows[1:] if not row.blind and row.name != settings.baseline]
    return {row.name: made.closed(row, name) for row in others}


class _Bars:
    def __init__(
        self, rows: Sequence[Row], metrics: Sequence[Metric], settings: EvaluationConfig, spreads: Spreads
    ) -> None:
        self.metrics = {metric.name: metric for metric in metrics}
        self.settings, self.targets, self.spreads = settings, settings.bars, spreads
        self.rows = {row.name: row for row in rows}
        self.teacher, self.student = rows[0], rows[-1] if len(rows) > 1 and not rows[-1].blind else None

    def blind(self) -> list[Bar]:
        name, teacher = SCENE_SCORE.name, self.teacher
        return [
            self._ratio(f"teacher_vs_blind_{part}", (name, part), teacher.scores, teacher.blind_scores, BLIND_TARGET)
            for part in teacher.scores.get(name, {})
        ]

    def quality(self) -> list[Bar]:
        """Student over teacher. Of drawn scenes in their own score and what the recipe names; else in all metrics."""
        scenes, wanted = SCENE_SCORE.name in self.metrics, self.targets.quality
        names = [name for name in self.metrics if not scenes or name == SCENE_SCORE.name or name in wanted]
        student = self.student.scores if self.student else {}
        found = []
        for name in names:
            targets = wanted.get(name, {})
            own_score = scenes and name == SCENE_SCORE.name
            for part in self.teacher.scores.get(name, {}):
                if scenes and not own_score and part not in targets:
                    continue
                label = f"clkd_vs_teacher_{part}" if own_score else f"clkd_vs_teacher_{name}_{part}"
                target = targets.get(part, QUALITY_TARGET)
                found.append(self._ratio(label, (name, part), student, self.teacher.scores, target, "teacher"))
        return found

    def speed(self) -> Bar:
        speed = self.student.speedup_vs_teacher if self.student else None
        target = self.targets.speed
        return Bar("clkd_speedup", speed, target, speed is not None and speed >= target, "speed")

    def gaps(self) -> list[Bar]:
        """Teacher less baseline, and the student's share of it."""
        if self.settings.baseline is None:
            return []
        base, found = self.rows[self.settings.baseline], list[Bar]()
        for name, parts in self.targets.gap.items():
            for part, target in parts.items():
                value, ends = self._compared((name, part), (self.teacher, base), lambda t, b: t - b)
                reached = value is not None and value >= target
                label = f"teacher_ahead_of_baseline_{name}_{part}"
                found.append(Bar(label, value, target, reached, "gap", name, part, base.name, ends))
        for name, parts in self.targets.gap_closed.items():
            for part, target in parts.items():
                value, ends = self._closed(self.student, name, part)
                reached = value is not None and value >= target
                label = f"gap_closed_{name}_{part}"
                found.append(Bar(label, value, target, reached, "gap_closed", name, part, base.name, ends))
        return found

    def closed(self, row: Row, name: str) -> dict[str, Group]:
        """The share of the gap that a row closes, by slice."""
        found = dict[str, Group]()
        for part, group in row.scores.get(name, {}).items():
            value, ends = self._closed(row, name, part)
            if value is not None:
                found[part] = Group(value=value, n=group["n"], tasks={})
                if ends is not None:
                    found[part]["interval"] = [*ends]
        return found

    def _closed(self, row: Row | None, name: str, part: str) -> tuple[float | None, Interval | None]:
        rows = (row, self.rows[self.settings.baseline or ""], self.teacher)
        return self._compared((name, part), rows, _share_of_gap)

    def ahead(self) -> list[Bar]:
        """Student less each rival: at least the target, and beyond chance."""
        found = []
        for rival in self.settings.rivals:
            for name, parts in self.targets.ahead.items():
                for part, target in parts.items():
                    rows = (self.student, self.rows[rival])
                    value, ends = self._compared((name, part), rows, lambda s, r: s - r)
                    label = f"ahead_of_{self.rows[rival].slug}_{name}_{part}"
                    reached = value is not None and _is_ahead(value, ends, target)
                    found.append(Bar(label, value, target, reached, "ahead", name, part, rival, ends))
        return found

    def _compared(
        self, where: tuple[str, str], rows: Sequence[Row | None], compare: Callable[..., Values]
    ) -> tuple[float | None, Interval | None]:
        """A figure of several rows' values and its interval; a metric that is better when lower is turned round."""
        name, part = where
        sign = -1.0 if name in self.metrics and self.metrics[name].lower_is_better else 1.0
        values = [value_of(row.scores.get(name, {}).get(part)) if row else None for row in rows]
        known = [sign * value for value in values if value is not None]
        if len(known) < len(rows):
            return None, None
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(compare(*np.array(known)))
            spreads = [self.spreads.get(row.name, {}).get(name, {}).get(part) for row in rows if row]
            drawn = [sign * spread for spread in spreads if spread is not None]
            ends = interval(compare(*drawn)) if len(drawn) == len(rows) else None
        return (value if np.isfinite(value) else None), ends

    def _ratio(
        self, label: str, where: tuple[str, str], ours: Scores, theirs: Scores, target: float, kind: Kind = "blind"
    ) -> Bar:
        """Ours over theirs in a metric and slice; the other way round where lower is better."""
        name, part = where
        mine, other = (value_of(scores.get(name, {}).get(part)) for scores in (ours, theirs))
        above, below = (other, mine) if self.metrics[name].lower_is_better else (mine, other)
        if above is None or below is None:
            return Bar(label, None, target, False, kind, name, part)
        value = above / below if below else None if above else 0.0
        reached = above >= target * below and (above > 0 or self.metrics[name].lower_is_better)
        return Bar(label, value, target, reached, kind, name, part)


def _share_of_gap(row: Values, baseline: Values, teacher: Values) -> Values:
    """NaN where there is no gap: the teacher is not ahead."""
    return (row - baseline) / np.where(teacher > baseline, teacher - baseline, np.nan)


def _is_ahead(value: float, ends: Interval | None, target: float) -> bool:
    """At least the target and, above 0, beyond chance; with the target 0 not behind beyond chance."""
    low, high = ends or (value, value)
    return value >= target and low > 0 if target > 0 else high >= 0


# -- as text -----------------------------------------------------------------------------------------------------------


def bar_lines(measured: Sequence[Bar], metrics: Sequence[Metric]) -> str:
    """The bars as aligned text."""
    units = {metric.name: metric.unit for metric in metrics}
    lines = [(bar.name, *_figures(bar, units.get(bar.metric or "", "")), _verdict(bar)) for bar in measured]
    return "\n".join(aligned([("bar", "value", "target", ""), *lines]))


def _figures(bar: Bar, unit: str) -> tuple[str, str]:
    """Value and target. Differences are in the metric's unit."""

    def text(value: float) -> str:
        return shown(unit, value) if bar.kind in ("gap", "ahead") else f"{value:.3f}"

    if bar.value is None:
        return "-", f">= {bar.target:g}"
    value = text(bar.value) + (f" [{', '.join(map(text, bar.interval))}]" if bar.interval else "")
    return value, f">= {text(bar.target) if bar.kind in ('gap', 'ahead') else f'{bar.target:g}'}"


def _verdict(bar: Bar) -> str:
    if bar.value is None and not bar.reached:
        return "not measured"
    return "reached" if bar.reached else "MISSED"
