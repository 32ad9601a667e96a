"""Data sets on disk read as samples: a file a data set, and one list of them, READERS.

`sample_id`, a content hash, is the only key that later stages join by. A reader refuses a broken record with its file
and field named, and takes no image from outside the data root.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from pipeline.data.readers.chat import read_chat
from pipeline.data.readers.coda_lm import read_coda_lm
from pipeline.data.sample import Sample
from pipeline.errors import DataError

READERS: dict[str, Callable[[Path, str], list[Sample]]] = {"coda_lm": read_coda_lm, "chat": read_chat}
"""By `data.format`: all samples of (data root, split), in any order."""


def read_samples(format: str, root: Path, split: str) -> list[Sample]:
    """All samples of a split, ascending by sample_id.

    Raises:
        DataError: the split is missing or empty, a record is broken, or two records have the same content.
    """
    if format not in READERS:
        raise DataError(f"data.format is {format!r}: known are {' and '.join(map(repr, READERS))}.")
    samples = READERS[format](root, split)
    if not samples:
        raise DataError(f"{root}, split {split!r}: no samples. Correct data.root or the split's name.")
    samples.sort(key=lambda s: s.sample_id)
    for first, second in pairwise(samples):
        if first.sample_id == second.sample_id:
            places = " and ".join(", ".join(filter(None, s.meta.values())) for s in (first, second))
            raise DataError(f"{root}: the same question, answer and image twice: {places}. Remove one.")
    return samples
