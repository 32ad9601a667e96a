"""`jobs.NAME.curriculum` and `jobs.NAME.hardness`: the order of samples, and how hard each of them is."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.recipe.base import (
    Fraction,
    NonNegative,
    Number,
    Positive,
    PositiveFloat,
    PositiveFraction,
    Section,
    ShareBelowOne,
)

Half = Annotated[Number, Field(ge=0.0, multiple_of=0.5)]


class CurriculumConfig(Section):
    """The hardness-ordered sampler (METHOD section 5). Absent: a seeded uniform shuffle."""

    gamma: Half = 2.0
    """Weight of a sample: its hardness as a multiple of its stratum's mean, to this power; a multiple of 0.5, 0 draws
    uniformly."""
    cap: Annotated[Number, Field(ge=1.0)] = 50.0
    """w_max: largest such weight, at least 1."""
    mixture: Fraction = 1.0
    """m: share of the weight that hardness decides; the rest is even."""
    visit_penalty: NonNegative = 0.1
    """lambda: nats of log-weight that a visit costs against the least visited sample."""
    retire_below: ShareBelowOne = 0.25
    """delta: a sample of the pool with less than this share of its stratum's mean hardness is retired: drawn by the
    sweep alone until its hardness rises. 0: none is."""
    competence_start: PositiveFraction = 1.0
    """c0: share of samples eligible at the start, easiest first; 1: all are, from the start."""
    competence_until: PositiveFraction = 0.2
    """tau_g: share of training at which all samples are eligible."""
    window_steps: Positive = 50
    """R: optimizer steps per planned window."""
    stratum_floor: Fraction = 0.5
    """Each stratum keeps at least this share of its proportional part of a window."""


class HardnessConfig(Section):
    """Instance hardness (METHOD section 4)."""

    start: Literal["student", "teacher"] = "student"
    """Whose view a curriculum starts from: a forward of the job's own starting model over all samples, or the teacher's
    entropy and cross-entropy, which cost nothing and find less."""
    table: Path | None = None
    """Table to start from instead, as `clkd hardness --student` writes it."""
    dynamic: bool = True
    """Update the table from the losses of every visit; False keeps the prior."""
    ema: Fraction = 0.7
    """mu: weight of the past in D_i."""
    gate: bool = True
    """Count a token little where the teacher itself is wrong by more than 2 `gate_scale`. Needs `distill.gate`."""
    tail_weight: Fraction = 0.5
    """k: weight of the hardest tokens' mean against the plain mean."""
    tail_share: PositiveFraction = 0.2
    """Share of a sample's tokens that counts as its hardest."""
    half_life_epochs: PositiveFloat = 1.0
    """Epochs after which an unvisited entry has relaxed half-way to its stratum's mean."""
