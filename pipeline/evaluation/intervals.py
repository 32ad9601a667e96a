"""Intervals of scores over the test split's frames: a paired bootstrap.

Frames are drawn again with replacement, with all questions about them: answers about one image are not independent. All
models get the same draws, so a difference of two models has an interval of its own, narrower than those of its parts.
What another training or another set of questions of the same kind would change is not in it.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sample import Sample
from pipeline.evaluation.metrics import Group, Metric, Record, Scores
from pipeline.evaluation.results import TOGETHER

RESAMPLES = 2000
LEVEL = 0.95
_SEED = 0

Values = NDArray[np.float64]
Interval = tuple[float, float]


class Resamples:
    """Draws of the frames of some questions."""

    def __init__(self, frames: Mapping[str, str]) -> None:
        """Draw.

        Args:
            frames: the frame of each question, by sample_id.
        """
        numbers = {frame: number for number, frame in enumerate(sorted(set(frames.values())))}
        self._frame = {sample_id: numbers[frame] for sample_id, frame in frames.items()}
        count = len(numbers)
        rng = np.random.Generator(np.random.Philox(_SEED))
        self._times_BF = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)

    def values(self, metric: Metric, records: Sequence[Record]) -> Values:
        """[B]: the metric of the records in each draw; NaN where a draw has none of them."""
        counted = [(self._frame[record["sample_id"]], metric.counts(record)) for record in records]
        kept = [(frame, counts) for frame, counts in counted if counts is not None]
        if not kept:
            return np.full(RESAMPLES, np.nan)
        sums_FP = np.zeros((self._times_BF.shape[1], len(kept[0][1])))
        np.add.at(sums_FP, [frame for frame, _ in kept], [counts for _, counts in kept])
        return metric.value(self._times_BF @ sums_FP)


def interval(values: Values) -> Interval | None:
    """The middle 95% of a statistic's values over draws; None: too many draws have none for the ends to be known."""
    known = values[~np.isnan(values)]
    if len(known) <= LEVEL * len(values):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def draws(golds: Iterable[Sample]) -> dict[str, Resamples]:
    """Of the frames of each slice, and of all of them: drawn by slice, so that none is left with few."""
    frames = dict[str, dict[str, str]]()
    for sample in golds:
        frame = "\n".join(map(str, sample.images)) or sample.sample_id
        for part in (sample.slice, TOGETHER):
            frames.setdefault(part, {})[sample.sample_id] = frame
    return {part: Resamples(found) for part, found in frames.items()}


def add_intervals(
    metrics: Sequence[Metric],
    drawn: Mapping[str, Resamples],
    scores: Scores,
    overall: Mapping[str, Group],
    records: Sequence[Record],
) -> dict[str, dict[str, Values]]:
    """Give every score its interval; returns the scores in all draws, by metric and slice.

    Args:
        drawn: see `draws`.
        scores, overall: of the records, see `metrics`.
    """
    golds, spreads = [r for r in records if r["gold"].strip()], dict[str, dict[str, Values]]()
    for metric in metrics:
        spreads[metric.name] = {}
        for part, group in scores[metric.name].items():
            values = drawn[part].values(metric, [r for r in golds if r["slice"] == part])
            spreads[metric.name][part] = values
            _set_interval(group, values)
        if metric.name in overall:
            _set_interval(overall[metric.name], drawn[TOGETHER].values(metric, golds))
    return spreads


def _set_interval(group: Group, values: Values) -> None:
    if (ends := interval(values)) is not None:
        group["interval"] = [*ends]
