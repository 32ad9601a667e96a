"""`jobs.NAME.distill`: what the teacher adds to a job's loss."""

from typing import Literal, Self

from pydantic import model_validator

from pipeline.recipe.base import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    PositiveFraction,
    Range,
    Section,
    ShareBelowOne,
)


class AdaptiveConfig(Section):
    """How `release: adaptive` measures the gap between the student's and the teacher's cross-entropy."""

    samples: Positive = 64
    """Training samples that are held out for it: the job never trains on them. Which ones is drawn by `run.seed`."""
    every: PositiveFraction = 0.05
    """Share of training between two measurements; a measurement is a forward of all held-out samples."""
    ema: ShareBelowOne = 0.5
    """Weight of the past in the gap's running mean."""


class FeatureConfig(Section):
    """Distillation of hidden states against the store's sketches (METHOD sections 3, 6 and 7)."""

    student_layer: Count
    """Hidden states that this decoder layer of the student reads, from 0; the number of layers means those that the LM
    head reads. The teacher's layer is `targets.sketches.layer`."""
    weight: NonNegative = 10.0
    """l_f: weight of the feature term; 0 is the same as no `features`."""
    tilt: Range = (1.0, 1.0)
    """beta on feature rows at the start and once all samples are eligible: above 0 hard ones count more, below 0 easy
    ones, `[0, 0]` all alike."""
    release_to: Fraction | None = None
    """t1 of features: share of training at which their release ends; None: that of the KL term."""


class DistillConfig(Section):
    """What the teacher adds to the loss (METHOD section 7). Absent: plain SFT."""

    alpha_start: Fraction = 0.9
    """a0: share of the KL term before release."""
    alpha_end: Fraction = 0.5
    """a1: share of the KL term after release. At 0 the store is no longer read for a released sample."""
    release: Literal["cosine", "linear", "step", "constant", "adaptive"] = "cosine"
    """Shape of the release; `step` falls in four equal steps, `constant` keeps alpha_start (vanilla KD), `adaptive`
    follows the share of the gap to the teacher that is still open on held-out samples."""
    adaptive: AdaptiveConfig = AdaptiveConfig()
    """Settings of `release: adaptive`."""
    release_from: Fraction = 0.5
    """t0: share of training at which release begins."""
    release_to: Fraction = 1.0
    """t1: share of training at which release ends."""
    hardness_delay: NonNegative = 0.15
    """eta: how much later the hardest sample is released, as a share of t1 - t0."""
    gate: bool = True
    """rho: do not chase tokens that the teacher itself gets wrong."""
    gate_scale: PositiveFloat = 1.0
    """s in nats: softness of the gate."""
    token_tilt: Range = (0.0, 0.0)
    """beta on tokens at the start and once all samples are eligible: above 0 hard ones count more, below 0 easy ones,
    `[0, 0]` all alike."""
    features: FeatureConfig | None = None
    """Also distil hidden states; needs `targets.sketches`. Absent: logits alone."""

    @model_validator(mode="after")
    def _release_runs_forwards(self) -> Self:
        if self.release_to < self.release_from:
            raise ValueError(f"release_to {self.release_to} lies before release_from {self.release_from}")
        features_to = self.feature_release.release_to
        if features_to < self.release_from:
            raise ValueError(f"features.release_to {features_to} lies before release_from {self.release_from}")
        return self

    @model_validator(mode="after")
    def _adaptive_settings_are_used(self) -> Self:
        if self.release != "adaptive" and self.adaptive != AdaptiveConfig():
            raise ValueError(
                f"adaptive is set, but release is {self.release!r}; say `release: adaptive`, or leave it out"
            )
        return self

    @property
    def active_features(self) -> FeatureConfig | None:
        """`features`, unless their weight is 0."""
        return self.features if self.features is not None and self.features.weight > 0 else None

    @property
    def feature_release(self) -> "DistillConfig":
        """The release of features: as that of the KL term, but until their own `release_to` if they have one."""
        if self.features is None or self.features.release_to is None:
            return self
        return self.model_copy(update={"release_to": self.features.release_to})
