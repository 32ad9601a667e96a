"""What `clkd hardness --inspect` shows: which samples, and which numbers of each.

Shapes: T answer tokens of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.index.samples import words
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.hardness import page as hardness_page
from pipeline.hardness.page import Card, Group
from pipeline.hardness.scores import Scorer, Visit
from pipeline.method.hardness import HardnessTable
from pipeline.method.pooling import prior_hardness
from pipeline.recipe import DistillConfig, HardnessConfig, Recipe
from pipeline.targets.identity import dataset_fingerprint, known_identity
from pipeline.targets.pool import open_training_samples
from pipeline.targets.sketches import SketchStore
from pipeline.targets.store import SoftTargetStore

FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class Run:
    """What every form of `clkd hardness` reads, opened and checked."""

    recipe: Recipe
    processor: Processor
    samples: Sequence[Sample]
    store: SoftTargetStore
    sketches: SketchStore | None

    @classmethod
    def open(cls, recipe: Recipe) -> "Run":
        """Raises UserError when the data, the processor or the store is missing, or they do not belong together."""
        processor = Processor.load(recipe.processor_dir, recipe.data)
        samples = open_training_samples(recipe, processor)
        identity = known_identity(recipe, processor)
        store = SoftTargetStore.open(recipe.store_url, identity)
        store.require(samples.sample_ids, dataset_fingerprint(samples))
        sketches = SketchStore.open(recipe.store_url, identity) if recipe.targets.sketches else None
        return cls(recipe, processor, samples, store, sketches)

    @property
    def settings(self) -> tuple[HardnessConfig, DistillConfig]:
        """Those of the job that the recipe selects; the defaults without one."""
        job = self.recipe.jobs[self.recipe.job] if self.recipe.job else None
        hardness, distill = (job.hardness, job.distill) if job else (HardnessConfig(), None)
        return hardness, distill or DistillConfig()


def corner_shares(table: HardnessTable, samples: Sequence[Sample]) -> tuple[float, float] | None:
    """Share of corner cases among all samples and among the hardest tenth of each task; None if there are none."""
    corner = np.array([name == "corner" for name in words(samples, "slice")])
    if not corner.any():
        return None
    rank = table.percentile(step=0, half_life_steps=FOREVER)
    return float(corner.mean()), float(corner[rank >= 0.9].mean())


def chosen(table: HardnessTable, count: int) -> tuple[list[int], list[int]]:
    """Table indices of the hardest and the easiest samples, `count` of each, taken from the tasks in turn."""
    rank = table.percentile(step=0, half_life_steps=FOREVER)
    turns = []
    for code in range(len(table.strata)):
        members = np.flatnonzero(table.stratum == code)
        turns.append(members[np.argsort(rank[members], kind="stable")])
    longest = max(len(turn) for turn in turns)
    easiest = [int(turn[place]) for place in range(longest) for turn in turns if place < len(turn)][:count]
    hardest = [int(turn[-1 - place]) for place in range(longest) for turn in turns if place < len(turn)][:count]
    return hardest, easiest


def page(run: Run, table: HardnessTable, scorer: Scorer | None, count: int, command: str) -> str:
    """HTML of the hardest and easiest samples of a table: a student's, or the prior without one."""
    groups = dict(zip(("Hardest", "Easiest"), chosen(table, count), strict=True))
    samples = {index: run.samples[index] for index in sorted({i for part in groups.values() for i in part})}
    visits = dict(scorer.visits(list(samples.values()))) if scorer else {}
    distances = [float(g) for v in visits.values() if v.distance_C is not None for g in v.distance_C]
    bounds = (min(distances), max(distances)) if distances else (0.0, 1.0)
    rank = table.percentile(step=0, half_life_steps=FOREVER)

    def card(index: int) -> Card:
        sample = samples[index]
        visit = visits.get(sample.sample_id)
        values, notes = _token_view(run, sample, visit)
        cells = visit.distance_C.tolist() if visit is not None and visit.distance_C is not None else None
        return Card(
            sample,
            float(table.difficulty[index]),
            float(rank[index]),
            hardness_page.pictures(sample, cells, *bounds),
            hardness_page.pieces(sample, run.processor, values, notes, run.settings[0].tail_share),
        )

    made = [Group(title, tuple(map(card, indices))) for title, indices in groups.items()]
    title, summary = _words(run, table, scorer)
    return hardness_page.render(title, summary, made, has_cells=bool(distances), command=command)


def _token_view(run: Run, sample: Sample, visit: Visit | None) -> tuple[list[float], list[str]]:
    """(hardness, note) of each answer token: of the student's visit, or of the prior."""
    if visit is None:
        targets = run.store.read(sample.sample_id)
        values = prior_hardness(targets).tolist()
        pairs = zip(values, targets.entropy.tolist(), targets.gold_logprob.tolist(), strict=True)
        return values, [f"prior {h:.2f}; teacher: entropy {e:.2f}, cross-entropy {-p:.2f}" for h, e, p in pairs]
    columns = (visit.chased_T, visit.hardness_T, visit.ce_T, visit.teacher_ce_T)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    notes = [
        f"hardness {c:.2f} (ungated {h:.2f}); cross-entropy: student {q:.2f}, teacher {p:.2f}" for c, h, q, p in rows
    ]
    return visit.chased_T.tolist(), notes


def _words(run: Run, table: HardnessTable, scorer: Scorer | None) -> tuple[str, str]:
    shares = corner_shares(table, run.samples)
    corner = f" Corner cases are {shares[0]:.1%} of all and {shares[1]:.1%} of the hardest tenth." if shares else ""
    count = f"{len(table):,} samples of {run.recipe.data_root.name}, split {run.recipe.data.train_split}"
    if scorer is None:
        return "What the teacher finds hard", f"{count}, before any student: the teacher’s doubt and errors.{corner}"
    name = scorer.student.name
    fitted = scorer.map_RD is not None and not scorer.pools_features
    map_note = " The map between their features was fitted for this page, not trained." if fitted else ""
    return f"What {name} finds hard", f"{count}, by how far {name} is from its teacher.{map_note}{corner}"
