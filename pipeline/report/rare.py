"""Who names which rare object: the drawn scenes' rare kinds one by one, for every model of the table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.benchmark.scoring import RARE, mentions, rare_recall_counts
from pipeline.recipe import Recipe
from pipeline.report.data import Answer, Missing, Results, read_answers


@dataclass(frozen=True, slots=True)
class RareRow:
    """One model: of each kind's appearances, how many its descriptions name."""

    name: str
    blind: bool
    named: Sequence[int]
    wrong: int
    """Descriptions that name a rare object which is not there."""


@dataclass(frozen=True, slots=True)
class RareTable:
    """A row a model, a column a kind."""

    kinds: Sequence[str]
    shown: Sequence[int]
    """How often each is asked about."""
    rows: Sequence[RareRow]


def rare_objects(recipe: Recipe, results: Results) -> RareTable:
    """Counts over the test split's descriptions. Raises Missing where the data are no drawn scenes."""
    if not results.embedded:
        raise Missing("Rare objects are told apart in the drawn scenes alone.")
    rows, shown, kinds = [], [0], sorted(RARE)
    for row in results.rows:
        answers = read_answers(recipe.run.dir / "evaluation" / f"{row.slug}.json").values()
        shown, named = _counts(kinds, answers)
        rows.append(RareRow(row.name, row.blind, named, sum(map(_is_wrong, answers))))
    if not sum(shown):
        raise Missing("No question of the test split is about a rare object.")
    return RareTable(kinds, shown, rows)


def _counts(kinds: Sequence[str], answers: Iterable[Answer]) -> tuple[list[int], list[int]]:
    """(how often gold answers mention each kind, how often the model's do there)."""
    asked = [a for a in answers if rare_recall_counts(a.task, a.prediction, a.gold) is not None]
    pairs = [(set(mentions(a.gold)), set(mentions(a.prediction))) for a in asked]
    shown = [sum(kind in gold for gold, _ in pairs) for kind in kinds]
    return shown, [sum(kind in gold & said for gold, said in pairs) for kind in kinds]


def _is_wrong(answer: Answer) -> bool:
    if answer.task not in ("general", "region"):
        return False
    return bool(RARE & set(mentions(answer.prediction)) - set(mentions(answer.gold)))
