"""The embedded data set's own scores: what an answer says, parsed from text alone by the words that scenes are told in.

Object kinds, categories and actions are those of `world.py`. Outside the drawn scenes these words mean other things
("There is no need to stop" names the action "stop"), so these scores belong to them alone.

A score of many answers is a function of sums over them: each answer's counts are taken once, and any choice of answers
(a slice, a task, a resample for an interval) is a sum of some of them.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmark.world import ACTIONS, KINDS

Counts = NDArray[np.float64]
SLICES = ("regular", "corner")
TASKS = ("general", "region", "suggestion")
RARE = frozenset(name for name, kind in KINDS.items() if kind.rare)
"""Kinds that only corner cases hold."""
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(phrases, key=len, reverse=True)  # "overturned truck" is no "truck"
    return re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")s?\b", re.IGNORECASE)


_KINDS, _ACTIONS = _pattern(tuple(KINDS)), _pattern(ACTIONS)


@lru_cache(maxsize=1 << 15)
def _mentions(text: str) -> tuple[str, ...]:
    return tuple(m.lower() for m in _KINDS.findall(text))


def mentions(text: str) -> list[str]:
    """Object kinds in order of mention."""
    return list(_mentions(text))


def action(text: str) -> str | None:
    """The first action phrase; the "stop" of "stop sign" is none."""
    found = _ACTIONS.search(_KINDS.sub(" ", text))
    return found.group(1).lower() if found else None


# -- one answer --------------------------------------------------------------------------------------------------------


def mention_f1(prediction: str, gold: str) -> float:
    """F1 between the sets of object kinds (the 23 kinds below CODA-LM's seven classes) that two texts mention."""
    said, true = set(mentions(prediction)), set(mentions(gold))
    if not said and not true:
        return 1.0
    return 2 * len(said & true) / (len(said) + len(true))


def score_answer(task: str, prediction: str, gold: str) -> float | None:
    """One answer's score in [0, 1]: mention F1 (general), first category equal (region), action equal (suggestion).

    None: another task, or a gold answer that names no kind or action.
    """
    if task == "general" and mentions(gold):
        return mention_f1(prediction, gold)
    if task == "region" and mentions(gold):
        return float(mentions(prediction)[:1] == mentions(gold)[:1])
    if task == "suggestion" and action(gold):
        return float(action(prediction) == action(gold))
    return None


# -- many answers: counts of each, and the score of their sum ----------------------------------------------------------


def scene_counts(task: str, prediction: str, gold: str) -> Counts | None:
    """f64[2 + 2 + 3 x kinds]: region and suggestion (score, 1), then each kind's hits, mentions in both, in gold.

    None: an answer that `score_answer` does not score.
    """
    score = score_answer(task, prediction, gold)
    if score is None:
        return None
    if task != "general":
        pair = (score, 1.0, 0.0, 0.0) if task == "region" else (0.0, 0.0, score, 1.0)
        return np.array([*pair, *np.zeros(3 * len(KINDS))])
    said, true = set(mentions(prediction)), set(mentions(gold))
    kinds_3K = np.zeros((3, len(KINDS)))
    for row, kinds in zip(kinds_3K, ([said & true], [said, true], [true]), strict=True):
        for kind in (kind for part in kinds for kind in part):
            row[_NUMBER[kind]] += 1
    return np.concatenate([np.zeros(4), kinds_3K.reshape(-1)])


def scene_score(sums: Counts) -> Counts:
    """[...] of sums of `scene_counts` [..., P]: the mean over the tasks that are there of their scores; else NaN.

    general is the mean over object kinds of the F1 with which answers mention each, of the kinds that gold answers
    mention. region and suggestion are means of `score_answer`.
    """
    hits, both, gold = np.moveaxis(sums[..., 4:].reshape(*sums.shape[:-1], 3, len(KINDS)), -2, 0)
    asked = gold > 0
    general = _ratio((2 * hits / np.maximum(both, 1)).sum(-1, where=asked), asked.sum(-1))
    tasks = np.stack([general, _ratio(sums[..., 0], sums[..., 1]), _ratio(sums[..., 2], sums[..., 3])])
    there = ~np.isnan(tasks)
    return _ratio(np.where(there, tasks, 0.0).sum(0), there.sum(0))


def rare_recall_counts(task: str, prediction: str, gold: str) -> Counts | None:
    """(rare kinds of the gold answer that the prediction names, all of them). None: the gold answer has none."""
    true = RARE & set(mentions(gold)) if task in ("general", "region") else set[str]()
    return np.array([len(true & set(mentions(prediction))), len(true)], float) if true else None


def rare_error_counts(task: str, prediction: str, gold: str) -> Counts | None:
    """(whether the prediction names a rare kind that the gold answer does not, 1) of descriptions; else None."""
    if task not in ("general", "region"):
        return None
    return np.array([bool(RARE & set(mentions(prediction)) - set(mentions(gold))), 1], float)


def share(sums: Counts) -> Counts:
    """[...] of sums [..., 2]: the first over the second; NaN over 0."""
    return _ratio(sums[..., 0], sums[..., 1])


def _ratio(above: Counts, below: Counts | NDArray[np.int_]) -> Counts:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(above / np.where(below > 0, below, np.nan))
