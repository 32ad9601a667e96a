"""The embedded data set's own score: what an answer says, parsed from text alone by the words that scenes are told in.

Object kinds, categories and actions are those of `world.py`. Outside the drawn scenes these words mean other things
("There is no need to stop" names the action "stop"), so this score belongs to them alone.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pipeline.benchmark.world import ACTIONS, KINDS

SLICES = ("regular", "corner")
TASKS = ("general", "region", "suggestion")


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(phrases, key=len, reverse=True)  # "overturned truck" is no "truck"
    return re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")s?\b", re.IGNORECASE)


_KINDS, _ACTIONS = _pattern(tuple(KINDS)), _pattern(ACTIONS)


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


def score_answers(records: Sequence[Mapping[str, Any]]) -> tuple[float | None, int]:
    """(mean over the tasks of their scores, number of answers in it); None where no answer can be scored.

    `general` is `class_f1`, the other tasks' scores are means of `score_answer`. Answers for which that is None are in
    no mean.

    Args:
        records: with keys task, gold, prediction.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for r in records:
        if score_answer(r["task"], r["prediction"], r["gold"]) is not None:
            pairs.setdefault(r["task"], []).append((r["prediction"], r["gold"]))
    scores = [_task_score(task, of_task) for task, of_task in pairs.items()]
    return fmean(scores) if scores else None, sum(map(len, pairs.values()))


def _task_score(task: str, pairs: Sequence[tuple[str, str]]) -> float:
    if task == "general":
        return class_f1(pairs)
    return fmean(score_answer(task, prediction, gold) or 0.0 for prediction, gold in pairs)
