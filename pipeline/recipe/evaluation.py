"""`evaluation`: the result table."""

from typing import Self

from pydantic import model_validator

from pipeline.recipe.base import Number, Positive, PositiveFloat, Section


class EvaluationRow(Section):
    """One row of the result table."""

    name: str
    """Label in table and report."""
    model: str
    """Model reference."""
    blind: bool = False
    """Blank the image: what the text alone gives away."""


BySlice = dict[str, Number]


class BarsConfig(Section):
    """What the student, the last row, should reach. A missed bar is printed as such and fails nothing.

    Metrics and slices are named as in results.json. A metric that is better when lower is turned round.
    """

    speed: PositiveFloat = 2.0
    """End to end at batch 1, as a multiple of the teacher's."""
    quality: dict[str, BySlice] = {}
    """Share of the teacher's value, by metric and slice; those not named: 0.95."""
    gap: dict[str, BySlice] = {}
    """How far the teacher is ahead of the baseline: whether there is anything to distil."""
    gap_closed: dict[str, BySlice] = {}
    """(student - baseline) / (teacher - baseline)."""
    ahead: dict[str, BySlice] = {}
    """How far the student is ahead of every rival, beyond chance; 0: not behind beyond chance."""


class EvaluationConfig(Section):
    """The result table."""

    rows: tuple[EvaluationRow, ...] = ()
    """Rows in order. The first is the teacher that ratios refer to."""
    baseline: str | None = None
    """The row that learns from labels alone: what the gap to the teacher is measured from."""
    rivals: tuple[str, ...] = ()
    """Rows that the student must be ahead of."""
    bars: BarsConfig = BarsConfig()
    """What the student should reach."""
    limit: Positive | None = None
    """Samples per task and slice, those without a gold answer counted apart; None: all of the test split."""
    batch_size: Positive = 8
    """Questions answered at once: an 8B model and eight long prompts fit a GPU of 40 GB. Latency is always timed at
    batch 1."""
    max_new_tokens: Positive = 512
    """Longest answer in tokens, as in DriveBench's own script: an answer that is cut is scored as it stands."""
    latency_samples: Positive = 8
    """Samples timed at batch 1."""
    latency_repeats: Positive = 3
    """Timings of each sample, models interleaved; medians are reported."""

    @model_validator(mode="after")
    def _named_rows_are_there(self) -> Self:
        names = [row.name for row in self.rows]
        wanted = [*([self.baseline] if self.baseline is not None else []), *self.rivals]
        if absent := [name for name in wanted if name not in names]:
            raise ValueError(f"baseline and rivals must be rows: {absent} are none of {names}")
        if (self.bars.gap or self.bars.gap_closed) and self.baseline is None:
            raise ValueError("bars.gap and bars.gap_closed need a baseline: name the row that learns from labels alone")
        if self.bars.ahead and not self.rivals:
            raise ValueError("bars.ahead needs rivals: name the rows that the student must be ahead of")
        return self
