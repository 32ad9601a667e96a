"""All schedules of a job by optimizer step. Each is a function of the samples seen, as a share of the job's samples.

So a job with another batch size and as many samples in all, or on another number of ranks, follows the same curves.
"""

import math

from pipeline.method.curriculum import competence, tilt
from pipeline.method.release import Bools, ClosingGap, Floats, release_alpha
from pipeline.recipe import CurriculumConfig, JobConfig


class Schedules:
    """Learning rate, competence, tilts and alpha of one job."""

    def __init__(self, job: JobConfig) -> None:
        self._job, self._sampling = job, job.curriculum or CurriculumConfig()

    def samples(self, step: int) -> int:
        """Samples seen before this step."""
        return step * self._job.batch.global_size

    def tau(self, step: int) -> float:
        """Share of training done before this step, in samples."""
        return self.samples(step) / self.samples(self._job.steps)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from the peak to `min_lr_share` of it; by the share done after this step."""
        settings, tau = self._job.optimizer, (step + 1) / self._job.steps
        if tau <= settings.warmup_share:
            return settings.lr * tau / settings.warmup_share
        decay = (tau - settings.warmup_share) / max(1.0 - settings.warmup_share, 1e-9)
        low = settings.min_lr_share
        return settings.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * decay)))

    def competence(self, step: int) -> float:
        """Share of samples eligible; a sampler's window keeps that of its first step."""
        return competence(self.tau(step), self._sampling.competence_start, self._sampling.competence_until)

    def token_beta(self, step: int) -> float:
        """Tilt of the KL's weights on token hardness; 0 without distillation."""
        return self._tilt(step, self._job.distill.token_tilt) if self._job.distill else 0.0

    def feature_beta(self, step: int) -> float:
        """Tilt of the feature term's weights on feature hardness; 0 without features."""
        features = self._job.distill.active_features if self._job.distill else None
        return self._tilt(step, features.tilt) if features else 0.0

    def _tilt(self, step: int, betas: tuple[float, float]) -> float:
        return tilt(self.competence(step), self._sampling.competence_start, betas)

    def alpha(self, step: int, percentile_G: Floats, pool_G: Bools, gap: ClosingGap | None = None) -> Floats:
        """Share of the KL term of samples at these hardness percentiles; 0 without distillation.

        Args:
            pool_G: which of them the teacher answered.
        """
        if self._job.distill is None:
            return 0 * percentile_G
        return release_alpha(self.tau(step), percentile_G, pool_G, self._job.distill, gap)

    def feature_alpha(
        self, step: int, percentile_G: Floats, pool_G: Bools, gap: ClosingGap | None = None
    ) -> Floats | None:
        """Share of the feature term; None for a job without features."""
        distill = self._job.distill
        if distill is None or distill.active_features is None:
            return None
        return release_alpha(self.tau(step), percentile_G, pool_G, distill.feature_release, gap)

    def gap_steps(self) -> range:
        """Steps before which an adaptive release measures the gap: evenly spaced from t0 to t1. Else empty."""
        distill, steps = self._job.distill, self._job.steps
        if distill is None or distill.release != "adaptive":
            return range(0)
        every = max(1, round(distill.adaptive.every * steps))
        # The small term keeps 0.55 * 100 from rounding up to 56.
        first, last = (math.ceil(share * steps / every - 1e-9) for share in (distill.release_from, distill.release_to))
        return range(first * every, last * every, every)
