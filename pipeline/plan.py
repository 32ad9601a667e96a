"""Which samples each step of a job sees: windows of a global order, planned ahead and part of the checkpoint.

The order is global: ranks take strides of it, so it is the same for every world size. A window's order and the
hardness percentiles it was planned from are kept in the checkpoint, so that a resumed run goes on bit for bit
although the hardness table has moved on since the window began.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import curriculum
from pipeline.config import CurriculumConfig, HardnessConfig
from pipeline.hardness import HardnessTable

Indices = NDArray[np.int64]
Percentiles = NDArray[np.float32]


class WindowPlan:
    """The current window: steps [start, end) of `batch_size` table indices each."""

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        window_steps: int,
        seed: int,
        settings: CurriculumConfig | None,
        hardness: HardnessConfig,
    ) -> None:
        self.num_samples, self.batch_size, self.window_steps, self.seed = (
            num_samples,
            batch_size,
            window_steps,
            seed,
        )
        self.settings, self.hardness = settings, hardness
        self.start = self.end = 0
        self.order: Indices = np.zeros(0, np.int64)
        self.percentile: Percentiles = np.zeros(0, np.float32)

    def refresh(self, step: int, tau: float, table: HardnessTable | None) -> None:
        """Plan the window that `step` opens; inside a window nothing changes. `tau`: share of training done."""
        if self.start <= step < self.end:
            return
        percentile_M = self._percentiles(step, table)
        self.start, self.end = step, step + self.window_steps
        self.order = self._plan(tau, percentile_M, table)
        self.percentile = percentile_M[self.order]

    def batch(self, step: int) -> tuple[Indices, Percentiles]:
        """Table indices and percentiles [batch_size] of one step of the window."""
        assert self.start <= step < self.end, (step, self.start, self.end)
        rows = slice((step - self.start) * self.batch_size, (step - self.start + 1) * self.batch_size)
        return self.order[rows], self.percentile[rows]

    def state_dict(self) -> dict[str, int]:
        """The window's place, for the checkpoint's JSON."""
        return {"start": self.start, "end": self.end}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The window's content, for the checkpoint's arrays."""
        return {"plan/order": self.order, "plan/percentile": self.percentile}

    def load(self, state: Mapping[str, int], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore what `state_dict` and `arrays` gave."""
        self.start, self.end = state["start"], state["end"]
        self.order, self.percentile = arrays["plan/order"], arrays["plan/percentile"]

    def _percentiles(self, step: int, table: HardnessTable | None) -> Percentiles:
        if table is None:
            return np.full(self.num_samples, 0.5, np.float32)
        steps_per_epoch = self.num_samples / self.batch_size
        half_life = self.hardness.half_life_epochs * steps_per_epoch
        return table.percentile(step=step, half_life_steps=half_life)

    def _plan(self, tau: float, percentile_M: Percentiles, table: HardnessTable | None) -> Indices:
        size = self.window_steps * self.batch_size
        if self.settings is None or table is None:
            return curriculum.uniform_order(self.num_samples, self.seed, self.start * self.batch_size, size)
        start = self.settings.competence_start
        competence = curriculum.competence(tau, start, self.settings.competence_until)
        return curriculum.plan_window(
            percentile_M,
            table.visits,
            table.stratum,
            seed=self.seed,
            window=self.start,
            size=size,
            competence=competence,
            beta=curriculum.tilt(competence, start, self.settings.tilt),
            floor=self.settings.stratum_floor,
        )
