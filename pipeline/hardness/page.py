"""The page of `clkd hardness --inspect`: hard and easy samples, their hard tokens and image cells marked.

Shape suffixes: T = answer tokens, C = image cells (16 an image, row by row).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.report.data import data_uri
from pipeline.targets.sketches import CELLS

TEMPLATE = "template.html.j2"
END_MARK = "¶"
HARDEST_CELLS = 3
"""Cells of an image that are outlined."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the answer: one token, or several that share a character."""

    text: str
    hardness: float
    marked: bool
    """Among the sample's hardest."""
    note: str
    """Shown when pointed at."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of an image; edges in per cent of its sides."""

    top: float
    left: float
    distance: float
    shade: float
    """0 for the smallest distance on the page, 1 for the largest."""
    marked: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as data: URI; None: it cannot be read."""

    uri: str | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """One sample."""

    sample: Sample
    hardness: float
    rank: float
    pictures: tuple[Picture, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Cards under a heading."""

    title: str
    cards: tuple[Card, ...]


def render(title: str, summary: str, groups: Sequence[Group], *, has_cells: bool, command: str) -> str:
    """The page as HTML, everything inside.

    Args:
        summary: what was scored, in a sentence.
        has_cells: image cells are shaded.
        command: what makes the page again.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template(TEMPLATE)
    return template.render(
        title=title, summary=summary, groups=groups, has_cells=has_cells, command=command, side=100 / CELLS
    )


def pieces(
    sample: Sample, processor: Processor, hardness_T: Sequence[float], notes_T: Sequence[str], tail_share: float
) -> tuple[Piece, ...]:
    """The answers cut where their tokens are, each with its hardness; the last token of an answer is its end.

    Args:
        hardness_T, notes_T: of each token that is learnt.
        tail_share: share of the tokens that is marked, the hardest.
    """
    said, ends = "", list[int]()
    for answer in sample.answers if processor.learns_all else [sample.answer]:
        encoded = processor.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
        ends += [len(said) + end for end in (*(end for _, end in encoded["offset_mapping"]), len(answer) + 1)]
        said += answer + END_MARK
    ends = ends[: len(hardness_T)]  # `data.long_answers: cut`
    order = sorted(range(len(ends)), key=lambda t: -hardness_T[t])
    marked = set(order[: max(1, round(tail_share * len(ends)))])
    made, shown = [], 0
    for end, tokens in groupby(range(len(ends)), key=ends.__getitem__):  # bytes of one character end together
        members = list(tokens)
        worst = max(members, key=lambda t: hardness_T[t])
        made.append(
            Piece(said[shown:end], hardness_T[worst], worst in marked and hardness_T[worst] > 0, notes_T[worst])
        )
        shown = end
    return tuple(made)


def pictures(sample: Sample, distance_C: Sequence[float] | None, lowest: float, highest: float) -> tuple[Picture, ...]:
    """The sample's images, their cells shaded between the page's lowest and highest distance."""
    made = []
    for number in range(len(sample.images)):
        cells: tuple[Cell, ...] = ()
        if distance_C is not None:
            cells = _cells(distance_C[number * CELLS**2 : (number + 1) * CELLS**2], lowest, highest)
        made.append(Picture(data_uri(sample, number), cells))
    return tuple(made)


def _cells(distance_C: Sequence[float], lowest: float, highest: float) -> tuple[Cell, ...]:
    side, scale = 100 / CELLS, max(highest - lowest, 1e-9)
    hardest = set(sorted(range(len(distance_C)), key=lambda c: -distance_C[c])[:HARDEST_CELLS])
    return tuple(
        Cell(place // CELLS * side, place % CELLS * side, g, (g - lowest) / scale, place in hardest)
        for place, g in enumerate(distance_C)
    )
