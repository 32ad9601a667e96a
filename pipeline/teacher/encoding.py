"""Samples encoded ahead of the teacher: batches of similar length, a shard's samples together; questions apart."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from pipeline.data.collate import Batch, Encoded
from pipeline.data.processor import Processor
from pipeline.data.sample import POOL, Sample
from pipeline.data.shipping import loaded
from pipeline.errors import DataError

WINDOW_BATCHES = 8
"""Batches whose samples are encoded together and sorted by length: little padding, bounded memory."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive samples of one shard."""

    shard: int
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question for the teacher, encoded up to where its answer begins."""

    sample: Sample
    encoded: Encoded


@dataclass(frozen=True, slots=True)
class EncodedWindow:
    """A window's samples as tensors."""

    shard: int
    batches: list[Batch]
    """Of similar length: the samples that have an answer, and those that could not be encoded."""
    questions: list[list[Prompt]]
    """Of similar length: the samples that have none."""


class EncodedWindows(Dataset[EncodedWindow]):
    """Each window encoded; that runs in DataLoader workers."""

    def __init__(self, windows: Sequence[Window], processor: Processor, batch_size: int) -> None:
        self.windows, self.processor, self.batch_size = windows, processor, batch_size

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> EncodedWindow:
        window, processor, size = self.windows[index], self.processor, self.batch_size
        encoded, questions = list[Encoded](), list[Prompt]()
        for sample in window.samples:
            if sample.source != POOL or sample.answer:
                encoded.append(processor.encode_or_leave_out(sample))
                continue
            prompt = _prompt_or_stand_in(processor, sample)
            if prompt.problem is None:
                questions.append(Prompt(sample, prompt))
            else:
                encoded.append(prompt)
        questions.sort(key=lambda prompt: len(prompt.encoded.input_ids))
        asked = [questions[i : i + size] for i in range(0, len(questions), size)]
        return EncodedWindow(window.shard, similar_batches(encoded, processor, size), asked)


def similar_batches(encoded: Sequence[Encoded], processor: Processor, batch_size: int) -> list[Batch]:
    """Batches of similar length; the same in every run."""
    ordered = sorted(encoded, key=lambda e: len(e.input_ids))  # stable
    return [processor.collate(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]


def _prompt_or_stand_in(processor: Processor, sample: Sample) -> Encoded:
    """As `Processor.encode_or_leave_out`, for a question."""
    try:
        return processor.encode_prompt(sample)
    except DataError as error:
        if not processor.leaves_out:
            raise
        return processor.stand_in(sample, str(error))


def encoded_windows(
    shards: Mapping[int, Sequence[Sample]],
    processor: Processor,
    batch_size: int,
    workers: int,
    take: Callable[[int], bool],
) -> Iterator[EncodedWindow]:
    """The windows of every shard that `take` allows, in order.

    Args:
        shards: samples by shard number.
        workers: processes that encode while this one computes; 0: this one encodes too.
        take: asked once for each shard, shortly before its first window is encoded.
    """
    size = WINDOW_BATCHES * batch_size
    windows = [
        Window(shard, samples[start : start + size])
        for shard, samples in shards.items()
        for start in range(0, len(samples), size)
    ]
    by_shard = itertools.groupby(range(len(windows)), key=lambda place: windows[place].shard)
    taken = (place for shard, places in by_shard if take(shard) for place in places)
    dataset = EncodedWindows(windows, processor, batch_size)
    # The order is a generator: the loader asks it for a few windows ahead and not for all, so `take` is asked late.
    yield from loaded(dataset, workers, order=taken)
