"""`evaluation`: the result table."""

from pipeline.recipe.base import Positive, Section


class EvaluationRow(Section):
    """One row of the result table."""

    name: str
    """Label in table and report."""
    model: str
    """Model reference."""
    blind: bool = False
    """Blank the image: what the text alone gives away."""


class EvaluationConfig(Section):
    """The result table."""

    rows: tuple[EvaluationRow, ...] = ()
    """Rows in order. The first is the teacher that ratios refer to."""
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
