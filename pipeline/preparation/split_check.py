"""Every sample of a split, looked at as the stages will: images decoded, texts tokenized, lengths counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pipeline.data.problems import SHOWN, Problem, Problems
from pipeline.data.processor import NO_ANSWER, Processor
from pipeline.data.sample import POOL, Sample, box_problem
from pipeline.errors import DataError
from pipeline.preparation.data_facts import Length, Lengths, decoded_sizes, header_size, length_of
from pipeline.recipe import Recipe


@dataclass(frozen=True, slots=True)
class SplitCheck:
    """What was found in one split."""

    name: str
    lengths: Lengths
    images: int
    problems: Sequence[Problem]
    too_long_answers: int
    """Answers with more tokens than `evaluation.max_new_tokens`."""
    questions: int = 0
    """Samples without an answer, which the teacher is to answer."""
    no_room: int = 0
    """Of them: those whose longest answer `data.max_length` would not hold."""

    def __str__(self) -> str:
        words = ", ".join(f"{task} {kind} {count:,}" for (task, kind), count in sorted(self.lengths.words.items()))
        asked = f", {self.questions:,} of them for the teacher to answer" if self.questions else ""
        tokens = [self.lengths.quantile("tokens", share) for share in (0.5, 0.99, 1.0)]
        answers = [self.lengths.quantile("answer", share) for share in (0.5, 1.0)]
        return (
            f"{self.name}: {self.lengths.samples:,} samples of {self.images:,} images{asked}: {words}\n"
            f"tokens of a sample: median {tokens[0]:,}, 99% up to {tokens[1]:,}, longest {tokens[2]:,}; of an answer: "
            f"median {answers[0]:,}, longest {answers[1]:,}"
        )

    def problem_lines(self) -> list[str]:
        """One line for each problem, and how many more there are."""
        lines = [f"{problem.record}: {problem.problem}" for problem in self.problems[:SHOWN]]
        more = len(self.problems) - SHOWN
        return [*lines, f"and {more} more of split {self.name}"] if more > 0 else lines

    def surprises(self, recipe: Recipe) -> list[str]:
        """What is allowed and perhaps not meant."""
        found, data = [], recipe.data
        largest = self.lengths.quantile("pixels", 1.0)
        if largest > 2 * data.max_pixels:
            found.append(
                f"{self.name}: images of up to {largest:,} pixels are scaled down to data.max_pixels "
                f"{data.max_pixels:,}: small objects may be lost"
            )
        if self.too_long_answers:
            found.append(
                f"{self.name}: {self.too_long_answers:,} answer(s) are longer than evaluation.max_new_tokens "
                f"{recipe.evaluation.max_new_tokens}"
            )
        if self.no_room:
            found.append(
                f"{self.name}: {self.no_room:,} question(s) leave less than targets.answers.max_new_tokens for an "
                f"answer within data.max_length {data.max_length}: one that is too long is left out"
            )
        if self.name == data.test_split and len({kind for _, kind in self.lengths.words}) < 2:
            found.append(f"{self.name}: one slice only: the result table has one column for each metric")
        return found


def check_split(
    recipe: Recipe, name: str, samples: Sequence[Sample], processor: Processor, *, decode: bool
) -> SplitCheck:
    """Look at every sample of a split.

    Args:
        decode: decode every image as a whole; else its header is read.
    """
    paths = sorted({path for sample in samples for path in sample.images})
    if decode:
        with tqdm(total=len(paths), desc=f"images of {name}", disable=None) as bar:
            sizes = decoded_sizes(paths, recipe.data, bar.update)
    else:
        sizes = {}
    limit = recipe.evaluation.max_new_tokens
    answers = recipe.targets.answers if name in (recipe.data.train_split, recipe.data.pool_split) else None
    problems, lengths, too_long, questions, no_room = Problems(), Lengths(most=100_000), 0, 0, 0
    for sample in tqdm(samples, desc=f"texts of {name}", unit=" samples", disable=None):
        with problems.at(sample.meta.get("record", sample.sample_id)):
            is_question = answers is not None and sample.source == POOL
            if not sample.answer.strip() and name != recipe.data.test_split and not is_question:
                raise DataError(NO_ANSWER)
            length = _length(sample, sizes, processor)
            if is_question and answers is not None:
                questions += 1
                no_room += length.tokens + answers.max_new_tokens > processor.max_length
            too_long += length.answer > limit
            lengths.add(sample, length)
            if length.tokens > processor.max_length and recipe.data.long_answers == "refuse":
                raise DataError(
                    f"{length.tokens} tokens, data.max_length allows {processor.max_length}: "
                    f"{sum(length.image_tokens)} of images, {length.answer} of the answer"
                )
    return SplitCheck(name, lengths, len(paths), problems.found, too_long, questions, no_room)


def _length(sample: Sample, sizes: dict[Path, tuple[int, int] | str], processor: Processor) -> Length:
    """DataError for the first thing that the stages would refuse, without the sample's name."""

    def size(path: Path) -> tuple[int, int]:
        found = sizes.get(path) or header_size(path)
        if isinstance(found, str):
            raise DataError(found)
        if sample.box is not None and (problem := box_problem(sample.box, found)):
            raise DataError(f"{path}: {problem}")
        return found

    try:
        return length_of(sample, size, processor)
    except DataError as error:
        raise DataError(str(error).removeprefix(f"{sample.where}: ")) from None
