"""`jobs.NAME.curriculum` and `jobs.NAME.hardness`: the order of samples, and how hard each of them is."""

from pathlib import Path

from pipeline.recipe.base import Fraction, Positive, PositiveFloat, PositiveFraction, Range, Section


class CurriculumConfig(Section):
    """The hardness-ordered sampler (METHOD section 5). Absent: a seeded uniform shuffle."""

    competence_start: PositiveFraction = 0.9
    """c0: share of samples eligible at the start, easiest first."""
    competence_until: PositiveFraction = 0.2
    """tau_g: share of training at which all samples are eligible."""
    tilt: Range = (0.0, 0.5)
    """beta on samples at the start and once all are eligible: above 0 hard ones are preferred, below 0 easy ones;
    `[0, 0]` draws the eligible uniformly."""
    window_steps: Positive = 50
    """R: optimizer steps per planned window."""
    stratum_floor: Fraction = 0.5
    """Each stratum keeps at least this share of its proportional part of a window."""


class HardnessConfig(Section):
    """Instance hardness (METHOD section 4)."""

    table: Path | None = None
    """Table to start from, as `clkd hardness --student` writes it; None: `<run.dir>/hardness.parquet`."""
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
