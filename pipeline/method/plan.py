"""Which samples each step of a job sees: windows of a global order, planned ahead and part of the checkpoint.

The order is global: ranks take strides of it, so it is the same for every number of ranks. Windows begin at multiples
of `window_steps`. The first is planned when the job starts. Every other one is planned in a thread while the last steps
of the window before are trained, **from the table as it stands before step `end - lead`**: scores of the last `lead`
steps come too late for it. The table is not copied: scores that arrive meanwhile wait (`HardnessTable.freeze`).

A job that goes on with other samples than its checkpoint's plans the rest of the window it is in, from the step it goes
on at, as a window of that length; nothing of the plan before is kept.

A window's order and the hardness percentiles it was planned from are kept in the checkpoint, and the next window's as
well once its planning has begun. So a resumed job goes on bit for bit although the table has changed since.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.method import curriculum
from pipeline.method.hardness import HardnessTable
from pipeline.recipe import CurriculumConfig, HardnessConfig

Indices = NDArray[np.int64]
Percentiles = NDArray[np.float32]
LEAD_SHARE = 0.2
"""Share of a window's steps, at least one, during which the next window is planned. [ours]"""


@dataclass(frozen=True, slots=True)
class Order:
    """A window's samples, in order, and what they were planned from."""

    index: Indices
    percentile: Percentiles
    retired: NDArray[np.int64]
    """[1]: how many samples were retired then."""


ARRAYS = ("index", "percentile", "retired")
NOTHING = np.zeros(1, np.int64)


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
        self.lead = max(1, int(LEAD_SHARE * window_steps))
        # No step lies in [0, 0): the first `refresh` plans a window.
        self.start = self.end = 0
        self.current = Order(np.zeros(0, np.int64), np.zeros(0, np.float32), NOTHING)
        self._next: Order | None = None
        self._planning: Future[Order] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plan")

    def refresh(self, step: int, tau: float, table: HardnessTable | None) -> None:
        """Open the window of `step`; inside a window nothing changes. `tau`: share of training done at its start."""
        if self.start <= step < self.end:
            return
        self.settle(table)
        # Windows begin at fixed steps, but for a job that goes on with other samples: it plans the rest of a window.
        if self._next is None:
            self._next = self._drawn(self._plan(step, tau, step, table), step, table)
        self.start, self.end, self.current, self._next = step, step + self._steps_from(step), self._next, None

    def look_ahead(self, step: int, tau: float, table: HardnessTable | None) -> None:
        """Begin to plan the next window, if `step`, which is about to be trained, is the step to begin at.

        `tau`: share of training done where the next window starts. Until `settle` the table sets its updates aside.
        """
        if step != self.end - self.lead or self._next is not None or self._planning is not None:
            return
        if table is not None:
            table.freeze()
        self._planning = self._thread.submit(self._plan, self.end, tau, step, table)

    def settle(self, table: HardnessTable | None) -> None:
        """Wait for a plan that was begun, and let the table go on. Call it before the table is saved."""
        if self._planning is None:
            return
        planned, self._planning = self._planning.result(), None
        if table is not None:
            table.thaw()
        self._next = self._drawn(planned, self.end, table)

    def batch(self, step: int) -> tuple[Indices, Percentiles]:
        """Table indices and percentiles [batch_size] of one step of the window."""
        assert self.start <= step < self.end, (step, self.start, self.end)
        rows = slice((step - self.start) * self.batch_size, (step - self.start + 1) * self.batch_size)
        return self.current.index[rows], self.current.percentile[rows]

    def state_dict(self) -> dict[str, int]:
        """The window's place, for the checkpoint's JSON."""
        return {"start": self.start, "end": self.end}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The content of this window and of a planned next one, for the checkpoint's arrays. `settle` first."""
        assert self._planning is None
        orders = {"plan": self.current} | ({"plan/next": self._next} if self._next else {})
        return {f"{k}/{name}": getattr(o, name) for k, o in orders.items() for name in ARRAYS}

    def load(self, state: Mapping[str, int], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore what `state_dict` and `arrays` gave."""
        self.start, self.end = state["start"], state["end"]
        self.current = Order(*(arrays[f"plan/{name}"] for name in ARRAYS))
        if "plan/next/index" in arrays:
            self._next = Order(*(arrays[f"plan/next/{name}"] for name in ARRAYS))

    def untrained(self, step: int, state: Mapping[str, int], arrays: Mapping[str, NDArray[Any]]) -> Indices:
        """What `state_dict` and `arrays` gave and is not trained after `step` steps, the next window included."""
        rest = arrays["plan/index"][(step - state["start"]) * self.batch_size :]
        return np.concatenate([rest, arrays.get("plan/next/index", rest[:0])])

    def _drawn(self, order: Order, start: int, table: HardnessTable | None) -> Order:
        if table is not None:
            table.draw(order.index, start // self.window_steps)
        return order

    def _plan(self, start: int, tau: float, step: int, table: HardnessTable | None) -> Order:
        """The window from step `start` on, by the table before `step`. Reads the table, changes nothing."""
        size = self._steps_from(start) * self.batch_size
        if table is None:
            index = curriculum.uniform_order(self.num_samples, self.seed, start * self.batch_size, size)
            return Order(index, np.full(size, 0.5, np.float32), NOTHING)
        # Percentiles are needed without a curriculum too: the release of harder samples is delayed by them.
        half_life = self.hardness.half_life_epochs * self.num_samples / self.batch_size
        ranks, retired = table.ranks(step=step, half_life_steps=half_life), 0
        if self.settings is None:
            index = curriculum.uniform_order(self.num_samples, self.seed, start * self.batch_size, size)
        else:
            window = self._window(start, tau, size, self.settings)
            columns = table.visits, table.last_window, table.stratum, table.pool_S
            # A window's rest has random numbers of its own: with the window's, samples that it had first would come
            # first again.
            seed = self.seed + start if start % self.window_steps else self.seed
            index = curriculum.plan_window(ranks, *columns, window, seed)
            retired = curriculum.retired(ranks, table.pool_S, window.weights)
        return Order(index, ranks.of(table.stratum, index), np.array([retired]))

    def _steps_from(self, start: int) -> int:
        """Steps until the next window begins."""
        return self.window_steps - start % self.window_steps

    def _window(self, start: int, tau: float, size: int, settings: CurriculumConfig) -> curriculum.Window:
        return curriculum.Window(
            number=start // self.window_steps,
            size=size,
            competence=curriculum.competence(tau, settings.competence_start, settings.competence_until),
            floor=settings.stratum_floor,
            weights=_weights(settings),
        )


def _weights(settings: CurriculumConfig) -> curriculum.Weights:
    return curriculum.Weights(
        gamma=settings.gamma,
        mixture=settings.mixture,
        cap=settings.cap,
        visit_penalty=settings.visit_penalty,
        retire_below=settings.retire_below,
    )
