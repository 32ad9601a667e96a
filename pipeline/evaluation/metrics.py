"""Which metrics a recipe's answers are scored by, and their values by slice and task: no model, no image.

A metric is one entry of METRICS. Every metric has columns of its own; nothing is averaged over different metrics.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from pipeline.benchmark.scoring import (
    SLICES,
    TASKS,
    Counts,
    rare_error_counts,
    rare_recall_counts,
    scene_counts,
    scene_score,
    share,
)
from pipeline.recipe import Recipe

Record = Mapping[str, Any]
"""An answer: sample_id, task, slice, prompt, gold, prediction; and nats and tokens of the gold answer."""
NO_SLICE = "unknown"
"""What readers call the slice of a record that names none."""


class Value(TypedDict):
    """A metric's value over some answers."""

    value: float
    n: int
    """Answers that it is computed from."""


class Group(Value):
    """The same, and by task."""

    tasks: dict[str, Value]
    interval: NotRequired[list[float]]
    """Its middle 95% over draws of the frames, see `intervals`."""


Scores = Mapping[str, Mapping[str, Group]]
"""By metric and slice."""


@dataclass(frozen=True, slots=True)
class Metric:
    """How a group of answers is scored."""

    name: str
    """Key in results.json."""
    title: str
    unit: Literal["%", "nats a token"]
    """%: values lie in [0, 1] and are shown in per cent."""
    lower_is_better: bool
    about: str
    """What it says and does not say, in a sentence."""
    counts: Callable[[Record], Counts | None]
    """What an answer that has a gold answer adds to the metric's sums, f64[P]; None: it says nothing about it."""
    value: Callable[[Counts], Counts]
    """[...] of sums [..., P] over any answers; NaN where nothing can be said."""
    applies: Callable[[Recipe], bool] = lambda recipe: True
    """Whether a recipe's data are what the metric was made for."""
    pooled: bool = True
    """Whether a value over the samples of all slices together means something."""
    partial: bool = False
    """Whether it is about some answers alone, by its nature."""

    def described(self) -> dict[str, str | bool]:
        """What results.json says about it."""
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "lower_is_better": self.lower_is_better,
            "about": self.about,
        }


def is_embedded(recipe: Recipe) -> bool:
    """Whether the data are the drawn scenes, in whose words the scene score is defined."""
    return recipe.benchmark is not None and recipe.data.root is None


# -- measures ----------------------------------------------------------------------------------------------------------


class _Words:
    """rouge_score's own words for ASCII; it drops all other letters, so that a correct answer in Chinese scores 0."""

    _WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters and digits in lower case; every Chinese or Japanese character is a word."""
        return self._WORD.findall(text.lower())


_ROUGE = RougeScorer(["rougeL"], tokenizer=_Words())


@lru_cache(maxsize=1 << 17)
def rouge_l(prediction: str, gold: str) -> float:
    """ROUGE-L F-measure in [0, 1]. Remembered: slices, tasks and all samples together ask for the same answers."""
    return float(_ROUGE.score(gold, prediction)["rougeL"].fmeasure)


def _rouge_counts(record: Record) -> Counts:
    return np.array([rouge_l(record["prediction"], record["gold"]), 1.0])


def _gold_ce_counts(record: Record) -> Counts | None:
    """Every token counts once: a long answer weighs more than a short one. None: it could not be encoded."""
    return np.array([record["nats"], record["tokens"]], float) if "tokens" in record else None


def _of_scenes(counts: Callable[[str, str, str], Counts | None]) -> Callable[[Record], Counts | None]:
    return lambda record: counts(record["task"], record["prediction"], record["gold"])


SCENE_SCORE = Metric(
    "scene_score",
    "scene score",
    "%",
    False,
    "Mean over the drawn scenes' three tasks. general: F1 with which each kind of object is mentioned, mean over "
    "kinds. region: the object in the red rectangle is named. suggestion: the right action is given.",
    _of_scenes(scene_counts),
    scene_score,
    is_embedded,
    pooled=False,  # half of the test scenes are corner cases by design, which says nothing about any road
)
RARE_RECALL = Metric(
    "rare_recall",
    "rare-object recall",
    "%",
    False,
    "Of the rare objects in a scene (deer, fallen cargo, ...), how many its descriptions name.",
    _of_scenes(rare_recall_counts),
    share,
    is_embedded,
    pooled=False,
    partial=True,
)
RARE_ERRORS = Metric(
    "rare_errors",
    "rare objects named wrongly",
    "%",
    True,
    "Descriptions that name a rare object which is not there.",
    _of_scenes(rare_error_counts),
    share,
    is_embedded,
    pooled=False,
    partial=True,
)
METRICS = (
    SCENE_SCORE,
    RARE_RECALL,
    RARE_ERRORS,
    Metric(
        "rouge_l",
        "ROUGE-L",
        "%",
        False,
        "Words that an answer shares with the gold answer, in their order: a weak proxy that cannot tell a wrong "
        "answer from a right one in other words.",
        _rouge_counts,
        share,
    ),
    Metric(
        "gold_ce",
        "gold cross-entropy",
        "nats a token",
        True,
        "How unlikely the model finds the gold answer, read token by token; lower is better. Models with other "
        "tokenizers do not compare.",
        _gold_ce_counts,
        share,
    ),
)
"""In order of their columns; the first that applies is the one that the report's first sentences speak of."""


def metrics_of(recipe: Recipe) -> tuple[Metric, ...]:
    """The metrics of a recipe's data."""
    return tuple(metric for metric in METRICS if metric.applies(recipe))


# -- by slice and task -------------------------------------------------------------------------------------------------


def score_all(metrics: Sequence[Metric], records: Sequence[Record]) -> dict[str, dict[str, Group]]:
    """Every metric by slice and task, of those that are there. Records without a gold answer are in no score."""
    golds = _with_gold(records)
    slices = in_order({r["slice"] for r in golds}, SLICES)
    members = {name: [r for r in golds if r["slice"] == name] for name in slices}
    found = {metric.name: {name: _group(metric, rows) for name, rows in members.items()} for metric in metrics}
    return {metric: {name: group for name, group in groups.items() if group} for metric, groups in found.items()}


def score_together(metrics: Sequence[Metric], records: Sequence[Record]) -> dict[str, Group]:
    """The metrics over the samples of all slices, where that means something and there are several slices."""
    golds = _with_gold(records)
    if len({r["slice"] for r in golds}) < 2:
        return {}
    found = {metric.name: _group(metric, golds) for metric in metrics if metric.pooled}
    return {name: group for name, group in found.items() if group}


def in_order(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """Names of `first` in its order, then the others by alphabet, and what has no name of its own at the end."""
    known = set(names)
    others = sorted(known - {*first, NO_SLICE})
    return [*(name for name in first if name in known), *others, *([NO_SLICE] if NO_SLICE in known else [])]


def _with_gold(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r["gold"].strip()]


def _group(metric: Metric, records: Sequence[Record]) -> Group | None:
    counts = [metric.counts(record) for record in records]
    whole = _value(metric, counts)
    if whole is None:
        return None
    tasks = dict[str, Value]()
    for task in in_order({r["task"] for r in records}, TASKS):
        mine = [c for c, record in zip(counts, records, strict=True) if record["task"] == task]
        if (of_task := _value(metric, mine)) is not None:
            tasks[task] = of_task
    return Group(value=whole["value"], n=whole["n"], tasks=tasks)


def _value(metric: Metric, counts: Sequence[Counts | None]) -> Value | None:
    kept = [each for each in counts if each is not None]
    value = float(metric.value(np.sum(kept, axis=0))) if kept else float("nan")
    return None if np.isnan(value) else Value(value=value, n=len(kept))
