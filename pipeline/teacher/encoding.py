"""Samples encoded ahead of the teacher: batches of similar length, a shard's samples together."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from pipeline.data.collate import Batch
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.data.shipping import loaded

WINDOW_BATCHES = 8
"""Batches whose samples are encoded together and sorted by length: little padding, bounded memory."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive samples of one shard."""

    shard: int
    samples: Sequence[Sample]


class EncodedWindows(Dataset[tuple[int, list[Batch]]]):
    """(shard, batches of similar length) of each window; encoding runs in DataLoader workers."""

    def __init__(self, windows: Sequence[Window], processor: Processor, batch_size: int) -> None:
        self.windows, self.processor, self.batch_size = windows, processor, batch_size

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[int, list[Batch]]:
        window, processor = self.windows[index], self.processor
        encoded = [processor.encode_or_leave_out(sample) for sample in window.samples]
        encoded.sort(key=lambda e: len(e.input_ids))  # stable: the batches are the same in every run
        chunks = [encoded[i : i + self.batch_size] for i in range(0, len(encoded), self.batch_size)]
        return window.shard, [processor.collate(chunk) for chunk in chunks]


def encoded_windows(
    shards: Mapping[int, Sequence[Sample]],
    processor: Processor,
    batch_size: int,
    workers: int,
    take: Callable[[int], bool],
) -> Iterator[tuple[int, list[Batch]]]:
    """(shard, batches) of the windows of every shard that `take` allows, in order.

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
