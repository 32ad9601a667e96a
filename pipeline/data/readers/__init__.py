"""Data sets on disk read as samples: a file a data set, and one list of them, READERS.

`sample_id`, a content hash, is the only key that later stages join by. A reader names every broken record with file and
field, and takes images only from where the data set may have them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.readers.chat import chat_files, chat_splits, read_chat
from pipeline.data.readers.coda_lm import coda_lm_files, coda_lm_splits, read_coda_lm
from pipeline.data.readers.source import Source
from pipeline.data.sample import Sample, hash_image, identified
from pipeline.errors import DataError


@dataclass(frozen=True, slots=True)
class Reader:
    """How one kind of data set is read."""

    files: Callable[[Path, str], list[Path]]
    """The annotation files of (data root, split). SplitMissingError when there is no such split."""
    read: Callable[[Source], Iterator[Sample]]
    """Its samples in the data set's order, without ids yet; what is broken goes into the source's problems."""
    splits: Callable[[Path], list[str]]
    """Names of the splits under a data root, ascending; none where the root holds something else."""
    layout: str
    """What a folder of this kind holds, for messages."""


READERS: dict[str, Reader] = {
    "coda_lm": Reader(coda_lm_files, read_coda_lm, coda_lm_splits, "CODA-LM/<split>/*.json beside <folder>/images/"),
    "chat": Reader(chat_files, read_chat, chat_splits, "<split>.jsonl, .json or .parquet with a conversation a record"),
}
"""By `data.format`."""


def reader_of(format: str) -> Reader:
    """The reader of a `data.format`. DataError when there is none."""
    if format not in READERS:
        raise DataError(f"data.format is {format!r}: known are {sorted(READERS)}.")
    return READERS[format]


def read_samples(format: str, root: Path, split: str, image_roots: Sequence[Path] = ()) -> list[Sample]:
    """All samples of a split, ascending by sample_id, read here and now; of equal ones the first.

    Stages take them from the index, see `data.index`.

    Raises:
        DataError: the split is missing or empty, or records are broken: all of them are named.
    """
    reader = reader_of(format)
    source = Source(root, split, reader.files(root, split), image_roots)
    hashes: dict[Path, str] = {}
    by_id: dict[str, Sample] = {}
    for sample in reader.read(source):
        with source.problems.at(sample.meta["record"], "image"):
            hashes |= {path: hash_image(path) for path in sample.images if path not in hashes}
            made = identified(sample, [hashes[path] for path in sample.images])
            by_id.setdefault(made.sample_id, made)
    if source.problems:
        raise source.problems.error(f"{root}, split {split!r}")
    if not by_id:
        raise DataError(no_samples(root, split))
    return [by_id[sample_id] for sample_id in sorted(by_id)]


def no_samples(root: Path, split: str) -> str:
    """What to say of an empty split."""
    return f"{root}, split {split!r}: no samples. Correct data.root or the split's name."
