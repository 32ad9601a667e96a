"""The teacher's side of a training job: soft targets, hardness table, weight normalisers, an adaptive release's gap.

It is made from files of the run, takes in what every step measures, and is part of the checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.index.samples import sample_ids
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.method.hardness import HardnessTable
from pipeline.method.losses import WeightNormaliser
from pipeline.method.release import ClosingGap
from pipeline.method.schedules import Schedules
from pipeline.models import checkpoint_folder
from pipeline.recipe import AdaptiveConfig, JobConfig, Recipe
from pipeline.targets.identity import known_identity
from pipeline.targets.sketches import SketchStore
from pipeline.targets.store import SoftTargetStore
from pipeline.training.data_change import TrainingData
from pipeline.training.process import from_first_rank
from pipeline.training.step import StepStats
from pipeline.training.validation_gap import GapProbe, hold_out


@dataclass(frozen=True, slots=True)
class Distillation:
    """What a job with a teacher or a curriculum has besides its student."""

    samples: Sequence[Sample]
    """Those that the job trains on: all, less what an adaptive release holds out."""
    store: SoftTargetStore
    table: HardnessTable
    sketches: SketchStore | None
    """None: a job without features."""
    gap: ClosingGap
    """Stays empty unless the release is adaptive."""
    probe: GapProbe | None
    """What measures the gap, for an adaptive release."""
    held_out: Sequence[str]
    """Ids of the samples that it measures; none without it."""
    normaliser: WeightNormaliser
    """Of the KL's token weights."""
    feature_normaliser: WeightNormaliser

    @classmethod
    def open(
        cls, recipe: Recipe, name: str, job: JobConfig, processor: Processor, data: TrainingData
    ) -> "Distillation | None":
        """Everything the job reads from a teacher, checked against its samples; None for plain SFT.

        Raises:
            StoreError: the store is of another run, or lacks samples.
            UserError: the hardness table was made for other samples.
        """
        if job.distill is None and job.curriculum is None:
            return None
        # The first rank asks: to tell the teacher may take reading all of its weights.
        identity = from_first_rank(lambda: known_identity(recipe, processor))
        store = SoftTargetStore.open(recipe.store_url, identity)
        samples = data.samples
        ids = sample_ids(samples)
        store.require(ids, data.fingerprint)
        table = _table(recipe, name, ids)
        sketches = None
        if job.distill is not None and job.distill.active_features is not None:
            sketches = SketchStore.open(recipe.store_url, identity)
        adaptive = job.distill.adaptive if job.distill else AdaptiveConfig()
        probe, held_ids = None, list[str]()
        if len(Schedules(job).gap_steps()):
            before = from_first_rank(lambda: _held_before(recipe.job_dir(name)))
            samples, held_out = hold_out(samples, adaptive.samples, recipe.run.seed, before)
            held_ids = list(sample_ids(held_out))
            table = table.subset(list(sample_ids(samples)))
            size, temperature = job.batch.micro_size, recipe.targets.temperature
            probe = GapProbe(held_out, processor, store, micro_batch_size=size, temperature=temperature)
        gap = ClosingGap(adaptive.ema)
        return cls(samples, store, table, sketches, gap, probe, held_ids, WeightNormaliser(), WeightNormaliser())

    def learn(self, stats: StepStats, step: int, job: JobConfig, most: int, device: Any) -> None:
        """Take in what a step measured: weights, and with a dynamic table the scores of all ranks' samples.

        Args:
            most: largest number of a rank's samples in a step.
        """
        if job.distill is None:
            return
        sums = stats.sums
        self.normaliser.update(sums["weighted"], sums["plain"])
        if "features" in sums:
            self.feature_normaliser.update(sums["feature_weighted"], sums["feature_plain"])
        if job.hardness.dynamic:
            index, scores = stats.gather_scores(most, device)
            self.table.update(index, scores, step, job.hardness.ema)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint's JSON; the table goes beside it, as arrays."""
        return {
            "normaliser": self.normaliser.state_dict(),
            "gap": self.gap.state_dict(),
            "feature_normaliser": self.feature_normaliser.state_dict(),
            "held_out": list(self.held_out),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; the table is restored by itself."""
        self.normaliser.load_state_dict(state["normaliser"])
        self.gap.load_state_dict(state["gap"])
        self.feature_normaliser.load_state_dict(state["feature_normaliser"])


def _held_before(job_dir: Path) -> list[str] | None:
    """Ids that the job's newest checkpoint says were held out; None if there are none, or no checkpoint."""
    newest = checkpoint_folder.latest(job_dir / "checkpoints")
    return None if newest is None else checkpoint_folder.read_meta(newest)["state"].get("held_out") or None


def _table(recipe: Recipe, name: str, ids: Sequence[str]) -> HardnessTable:
    path, student = recipe.starting_table(name), recipe.scored_student(name)
    command = "clkd hardness RECIPE.yaml" + (f" job={name}" if student else "")
    table = HardnessTable.load(path, command)
    if not recipe.jobs[name].pool:
        table = table.subset(ids)
    if not table.is_of(ids):
        raise UserError(
            f"{path}: made for {len(table)} other samples than the {len(ids)} of this run. "
            f"Make it again with `{command}`. Nothing was started."
        )
    return table
