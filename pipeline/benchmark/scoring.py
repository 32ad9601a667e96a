"""Scores of answers by what they say, parsed from text alone: no model, no image.

Object kinds, categories and actions are those of the embedded data set (`world.py`); ROUGE-L is a labelled proxy
for everything else an answer says.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from pipeline.benchmark.world import ACTIONS, KINDS

SLICES = ("regular", "corner")
TASKS = ("general", "region", "suggestion")


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(phrases, key=len, reverse=True)  # "overturned truck" is no "truck"
    return re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")s?\b", re.IGNORECASE)


_KINDS, _ACTIONS = _pattern(tuple(KINDS)), _pattern(ACTIONS)
_ROUGE = RougeScorer(["rougeL"])


def mentions(text: str) -> list[str]:
    """Object kinds in order of mention."""
    return [m.lower() for m in _KINDS.findall(text)]


def action(text: str) -> str | None:
    """The first action phrase; the "stop" of "stop sign" is none."""
    found = _ACTIONS.search(_KINDS.sub(" ", text))
    return found.group(1).lower() if found else None


def mention_f1(prediction: str, gold: str) -> float:
    """F1 between the sets of object kinds (the 23 kinds below CODA-LM's seven classes) that two texts mention."""
    said, true = set(mentions(prediction)), set(mentions(gold))
    if not said and not true:
        return 1.0
    return 2 * len(said & true) / (len(said) + len(true))


def class_f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean over object kinds of the F1 with which (prediction, gold) texts mention each; gold's kinds count."""
    said, true = [set(mentions(prediction)) for prediction, _ in pairs], [set(mentions(gold)) for _, gold in pairs]
    kinds = sorted(set().union(*true))
    both = zip(said, true, strict=True)
    hits = Counter(kind for s, t in both for kind in s & t)
    total = Counter(kind for kinds_of_text in (*said, *true) for kind in kinds_of_text)
    return fmean(2 * hits[kind] / total[kind] for kind in kinds)


def score_answer(task: str, prediction: str, gold: str) -> float:
    """One answer's score in [0, 1]: mention F1 (general), first category equal (region), action equal (suggestion).

    ROUGE-L for other tasks, and where the gold answer names no kind or action that this module knows.
    """
    if task == "general" and mentions(gold):
        return mention_f1(prediction, gold)
    if task == "region" and mentions(gold):
        return float(mentions(prediction)[:1] == mentions(gold)[:1])
    if task == "suggestion" and action(gold):
        return float(action(prediction) == action(gold))
    return rouge_l(prediction, gold)


def _task_score(task: str, pairs: Sequence[tuple[str, str]]) -> float:
    with_kinds = [pair for pair in pairs if mentions(pair[1])]
    if task == "general" and with_kinds:
        return class_f1(with_kinds)
    return fmean(score_answer(task, prediction, gold) for prediction, gold in pairs)


def rouge_l(prediction: str, gold: str) -> float:
    """ROUGE-L F-measure."""
    return float(_ROUGE.score(gold, prediction)["rougeL"].fmeasure)


def score_all(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By slice: each task's score, their mean over tasks (`mean`), `rouge_l`, and the number of answers `n`.

    `general` is `class_f1`, the other tasks' scores are means of `score_answer`.

    Args:
        records: with keys task, slice, gold, prediction.
    """
    scores: dict[str, dict[str, float]] = {}
    for name in sorted({str(r["slice"]) for r in records}):
        rows = [r for r in records if r["slice"] == name]
        by_task = {
            task: _task_score(task, [(r["prediction"], r["gold"]) for r in rows if r["task"] == task])
            for task in sorted({str(r["task"]) for r in rows})
        }
        scores[name] = {
            **by_task,
            "mean": fmean(by_task.values()),
            "rouge_l": fmean(rouge_l(r["prediction"], r["gold"]) for r in rows),
            "n": len(rows),
        }
    return scores
