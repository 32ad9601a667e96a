"""Progressive release: how much of the teacher is left, as a function of the share of training done.

Shapes: G samples of a global batch. tau in [0, 1]: share of training done, in samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.recipe import DistillConfig

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]

FINAL_SHARE = 0.05
"""The last share of training, in which every sample is at alpha_end. [ours]"""
STAIRS = 4
"""Equal drops of the `step` release. [ours]"""
GAP_LEVELS = 64
"""Levels of the `adaptive` release: rounding noise of another world size must not move alpha. [ours]"""


# -- the gap that an adaptive release follows --------------------------------------------------------------------------


class ClosingGap:
    """The measured gap between student and teacher, and the share of the first one that is still open.

    With g_k the gap's running mean after measurement k (weight `ema` on the past, starting at the first gap),

        left_k = min(left_{k-1}, round(64 clip(g_k / g_0, 0, 1)) / 64),   left_0 = 1

    so a bad measurement never brings the teacher back. A first gap of 0 or less releases all samples at once. [ours]
    """

    def __init__(self, ema: float) -> None:
        self.ema = ema
        self.gap: float | None = None
        """Last measurement in nats."""
        self._first = self._smoothed = 0.0
        self._taus: list[float] = []
        self._lefts: list[float] = []

    @property
    def left(self) -> float:
        """Share of the first gap still open: 1 before any measurement."""
        return self._lefts[-1] if self._lefts else 1.0

    @property
    def last_tau(self) -> float:
        """When it was last measured; -1 before any measurement."""
        return self._taus[-1] if self._taus else -1.0

    def add(self, tau: float, gap: float) -> None:
        """Take in a measurement in nats, later than all before."""
        assert tau > self.last_tau, (tau, self.last_tau)
        if not self._taus:
            self._first = self._smoothed = gap
        self._smoothed = self.ema * self._smoothed + (1 - self.ema) * gap
        share = min(max(self._smoothed / self._first, 0.0), 1.0) if self._first > 0 else 0.0
        self._lefts.append(min(self.left, round(GAP_LEVELS * share) / GAP_LEVELS))
        self._taus.append(tau)
        self.gap = gap

    def left_at(self, tau_G: Doubles) -> Doubles:
        """Share that was open at each tau: of the last measurement until then, 1 before the first."""
        lefts = np.array([1.0, *self._lefts])
        return lefts[np.searchsorted(np.array(self._taus), tau_G, side="right")]

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint's JSON, which keeps every bit of a float."""
        return {
            "gap": self.gap,
            "first": self._first,
            "smoothed": self._smoothed,
            "taus": list(self._taus),
            "lefts": list(self._lefts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from the checkpoint."""
        self.gap, self._first, self._smoothed = state["gap"], state["first"], state["smoothed"]
        self._taus, self._lefts = list(state["taus"]), list(state["lefts"])


# -- alpha of each sample ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Clock:
    """Where each sample stands in its release; harder samples are behind."""

    tau_G: Doubles
    """Share of training done, less the delay."""
    progress_G: Doubles
    """Of the way from release_from to release_to, in [0, 1]."""
    gap: ClosingGap | None


def _adaptive(clock: Clock) -> Doubles:
    if clock.gap is None:
        raise ValueError("the adaptive release needs the measured gap between student and teacher")
    return np.where(clock.progress_G < 1, clock.gap.left_at(clock.tau_G), 0.0)


RELEASES: dict[str, Callable[[Clock], Doubles]] = {
    "cosine": lambda clock: 0.5 * (1 + np.cos(np.pi * clock.progress_G)),
    "linear": lambda clock: 1 - clock.progress_G,
    "step": lambda clock: 1 - np.floor(STAIRS * clock.progress_G) / STAIRS,
    "constant": lambda clock: np.ones_like(clock.progress_G),
    "adaptive": _adaptive,
}
"""Share of (alpha_start - alpha_end) that is left of each sample."""


def release_alpha(
    tau: float, percentile_G: Floats, pool_G: Bools, settings: DistillConfig, gap: ClosingGap | None = None
) -> Floats:
    """alpha_i = alpha(tau - eta u_i (t1 - t0)): harder samples are released later; all are in the last 5%.

    alpha(tau) = a1 + (a0 - a1) * left(clip((tau - t0) / (t1 - t0), 0, 1))
    [seed: gradually; published: annealing, BAM, arXiv:1907.04829; shapes and the delay by hardness ours]

    Samples that the teacher answered keep alpha_start: there is nothing better to release them to, as their label is
    the teacher's own. They are released by being drawn no more, see `curriculum.plan_window`. [ours]

    Args:
        percentile_G: hardness percentile u_i of each sample, in [0, 1].
        pool_G: which of them the teacher answered.
        settings: a copy with another `release_to` is a second release, beside the first.
        gap: what was measured so far; only the adaptive release looks at it.
    """
    start = settings.release_from
    span = max(settings.release_to - start, 1e-9)
    tau_G = tau - settings.hardness_delay * span * percentile_G.astype(np.float64)
    left_G = RELEASES[settings.release](Clock(tau_G, np.clip((tau_G - start) / span, 0, 1), gap))
    if settings.release != "constant" and tau >= 1 - FINAL_SHARE:
        left_G = np.zeros_like(left_G)
    left_G = np.where(pool_G, 1.0, left_G)
    return (settings.alpha_end + (settings.alpha_start - settings.alpha_end) * left_G).astype(np.float32)
