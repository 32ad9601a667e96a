"""What the report reads: results, answers, example frames and hardness tables, each whole or Missing."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.benchmark.scoring import SLICES, TASKS, mentions, score_answer
from pipeline.data.sample import Sample, load_image
from pipeline.data.splits import open_split
from pipeline.errors import UserError
from pipeline.evaluation.metrics import SCENE_SCORE, in_order, rouge_l
from pipeline.recipe import Recipe
from pipeline.targets.pool import open_every

NUM_EXAMPLES = 6
MAX_IMAGE_WIDTH = 640
JPEG_QUALITY = 82

Json = dict[str, Any]


class Missing(Exception):
    """A part of the report cannot be made; the message is the sentence printed in its place."""


class _Lenient(BaseModel):
    """What the report needs of a file; further keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


# -- what the files hold -----------------------------------------------------------------------------------------------


class ResultMetric(_Lenient):
    """A metric of the table; see `evaluation.metrics.Metric`."""

    name: str
    title: str
    unit: str
    lower_is_better: bool = False
    about: str = ""


class ResultValue(_Lenient):
    """A metric's value over `n` answers."""

    value: float
    n: int


class ResultGroup(ResultValue):
    """The same of a slice, and by task."""

    tasks: dict[str, ResultValue] = {}
    interval: tuple[float, float] | None = None


class ResultRow(_Lenient):
    """One line of the table."""

    name: str
    slug: str
    model: str
    blind: bool = False
    scores: dict[str, dict[str, ResultGroup]] = {}
    """By metric and slice."""
    overall: dict[str, ResultGroup] = {}
    blind_scores: dict[str, dict[str, ResultGroup]] = {}
    params_total: int | None = None
    params_active: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    speedup_vs_teacher: float | None = None
    cut: int = 0
    gap_closed: dict[str, ResultGroup] = {}
    """By slice, in the first metric."""

    def value(self, metric: str, part: str) -> float | None:
        """A metric's value on a slice."""
        group = self.scores.get(metric, {}).get(part)
        return group.value if group else None


class ResultBar(_Lenient):
    """A figure to reach."""

    name: str
    value: float | None = None
    target: float
    reached: bool
    kind: str = ""
    """See `evaluation.bars.Bar`."""
    metric: str | None = None
    slice: str | None = None
    against: str | None = None
    interval: tuple[float, float] | None = None


class Results(_Lenient):
    """`results.json`."""

    metrics: tuple[ResultMetric, ...] = ()
    rows: tuple[ResultRow, ...] = ()
    bars: tuple[ResultBar, ...] = ()
    machine: dict[str, Any] = {}
    date: str = ""
    seed: int | None = None
    notes: tuple[str, ...] = ()
    """Which answers are in no score."""
    latency: dict[str, Any] = {}

    @property
    def embedded(self) -> bool:
        """Whether the answers are about drawn scenes, whose words have a score of their own."""
        return any(metric.name == SCENE_SCORE.name for metric in self.metrics)

    def slices(self, metric: str) -> list[str]:
        """The slices that a metric has values of, in the table's order."""
        return list(dict.fromkeys(part for row in self.rows for part in row.scores.get(metric, {})))

    @property
    def teacher(self) -> ResultRow | None:
        """The first row."""
        return self.rows[0] if self.rows else None

    @property
    def student(self) -> ResultRow | None:
        """The last row, unless it is the teacher or a blind baseline."""
        last = self.rows[-1] if len(self.rows) > 1 else None
        return None if last is None or last.blind else last


class Answer(_Lenient):
    """One question with a model's answer."""

    sample_id: str
    task: str
    slice: str = "unknown"
    prompt: str
    gold: str
    prediction: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer with its mark."""

    who: str
    text: str
    mark: str
    """good, part, bad, or none where it is in no score."""
    label: str
    notes: tuple[str, ...] = ()
    """What it left out or made up."""


@dataclass(frozen=True, slots=True)
class Example:
    """A frame with question, gold answer and the models' answers."""

    task: str
    slice: str
    image: str | None
    """data: URI; None: the image could not be read."""
    prompt: str
    gold: str
    answers: tuple[Verdict, ...]


# -- reading them ------------------------------------------------------------------------------------------------------


def read_results(run_dir: Path) -> Results:
    """`results.json`. Raises Missing."""
    content = read_json(run_dir / "results.json", "the evaluation has not been run")
    if content.get("rows") and "metrics" not in content:
        raise Missing("results.json is of an earlier version, without scores by metric: run `clkd evaluate` again.")
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        raise Missing(f"results.json is not a result table: {_first_problem(error)}.") from None


def examples(recipe: Recipe, results: Results) -> list[Example]:
    """One frame per task and slice, the first one by sample_id. Ids are content hashes, so the choice is not ours.

    Raises:
        Missing: no answers or no data.
    """
    shown = [row for row in (results.teacher, results.student) if row]
    if not shown:
        raise Missing("There are no example frames: there is no result table that says whose answers to show.")
    answers = {row.name: read_answers(recipe.run.dir / "evaluation" / f"{row.slug}.json") for row in shown}
    try:
        samples = open_split(recipe, recipe.data.test_split)
    except (UserError, OSError, ValueError) as error:
        raise Missing(f"There are no example frames: the test data cannot be read ({error}).") from None
    common = set.intersection(*(set(by_id) for by_id in answers.values()))
    chosen = _choose([s for s in samples if s.sample_id in common])
    if not chosen:
        raise Missing("There are no example frames: the answers belong to other data than the test split on disk.")
    return [
        _example(sample, {name: by_id[sample.sample_id] for name, by_id in answers.items()}, results.embedded)
        for sample in chosen
    ]


def _choose(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of every slice and task, then the next ones until there are NUM_EXAMPLES.

    Of more slices and tasks than that, evenly spaced ones. Samples without a gold answer only where no other is left.
    """
    first: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        if sample.answer.strip():
            first.setdefault((sample.slice, sample.task), sample)
    slices, tasks = in_order({part for part, _ in first}, SLICES), in_order({task for _, task in first}, TASKS)
    firsts = [first[part, task] for part in slices for task in tasks if (part, task) in first]
    count = min(NUM_EXAMPLES, len(firsts))
    chosen = [firsts[place * len(firsts) // count] for place in range(count)]
    taken = {sample.sample_id for sample in chosen}
    rest = sorted((s for s in samples if s.sample_id not in taken), key=lambda s: not s.answer.strip())
    return (chosen + rest)[:NUM_EXAMPLES]


def _example(sample: Sample, answers: Mapping[str, Answer], embedded: bool) -> Example:
    verdicts = tuple(verdict(who, answer, embedded=embedded) for who, answer in answers.items())
    return Example(sample.task, sample.slice, data_uri(sample), sample.prompt, sample.answer, verdicts)


def verdict(who: str, answer: Answer, *, embedded: bool) -> Verdict:
    """The answer with its mark: of drawn scenes correct, wrong or the score in between; otherwise its ROUGE-L."""
    score = _score(answer, embedded)
    if score is None:
        return Verdict(who, answer.prediction, "none", "not scored")
    mark = "good" if score >= 1.0 else "bad" if score <= 0.0 else "part"
    if not embedded:
        return Verdict(who, answer.prediction, mark, f"ROUGE-L {score:.2f}")
    label = {"good": "correct", "bad": "wrong"}.get(mark, f"F1 {score:.2f}")
    notes = _differences(answer) if answer.task == "general" else ()
    return Verdict(who, answer.prediction, mark, label, notes)


def _score(answer: Answer, embedded: bool) -> float | None:
    if not answer.gold.strip():
        return None
    if embedded:
        return score_answer(answer.task, answer.prediction, answer.gold)
    return rouge_l(answer.prediction, answer.gold)


def _differences(answer: Answer) -> tuple[str, ...]:
    said, true = set(mentions(answer.prediction)), set(mentions(answer.gold))
    pairs = (("left out", true - said), ("made up", said - true))
    return tuple(f"{word}: {', '.join(sorted(kinds))}" for word, kinds in pairs if kinds)


def data_uri(sample: Sample, number: int = 0) -> str | None:
    """One of a sample's images for a page, made smaller; None if it cannot be read."""
    try:
        image = load_image(sample, number)
    except UserError:
        return None
    image.thumbnail((MAX_IMAGE_WIDTH, MAX_IMAGE_WIDTH), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def hardness_columns(path: Path) -> Json:
    """A hardness table's columns as lists. Raises Missing."""
    try:
        columns: Json = pq.read_table(
            path, columns=["sample_id", "stratum", "hardness", "rank", "last_step"]
        ).to_pydict()
    except FileNotFoundError:
        raise Missing("There is no hardness table: the hardness stage has not been run.") from None
    except (OSError, pa.ArrowException) as error:
        raise Missing(f"The hardness table {path.name} cannot be read ({error}).") from None
    if not columns["sample_id"]:
        raise Missing("The hardness table is empty.")
    return columns


def train_slices(recipe: Recipe) -> dict[str, str]:
    """Slice of every training sample by its id. Raises Missing."""
    try:
        samples = open_every(recipe)
    except (UserError, OSError, ValueError) as error:
        raise Missing(f"Slices are not told apart: the training data cannot be read ({error}).") from None
    return dict(zip(samples.sample_ids, samples.words("slice"), strict=True))


def read_answers(path: Path) -> dict[str, Answer]:
    """A row's answers by sample_id, under `samples` as the evaluation writes them, or `predictions`."""
    content = read_json(path, "this row has not been evaluated")
    listed = content.get("samples", content.get("predictions"))
    try:
        return {answer.sample_id: answer for answer in map(Answer.model_validate, listed or ())}
    except ValidationError as error:
        raise Missing(f"There are no example frames: {path.name} is broken: {_first_problem(error)}.") from None


def read_json(path: Path, why: str) -> Json:
    """A JSON object of the run's folder. Raises Missing; `why` says what it means that there is no such file."""
    if not path.is_file():
        raise Missing(f"There is no {path.name}: {why}.")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Missing(f"{path.name} cannot be read ({error}).") from None
    if not isinstance(content, dict):
        raise Missing(f"{path.name} does not hold a JSON object.")
    return content


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
