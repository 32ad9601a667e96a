"""What a data set is like: its splits, and sizes of images and lengths in tokens of its samples.

Image tokens are computed from an image's size by the image processor's own rule; pixels are read only where an image is
to be decoded to see whether it can be.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.processor import Processor
from pipeline.data.readers import READERS
from pipeline.data.sample import Sample, decode, turned_size
from pipeline.errors import DataError
from pipeline.recipe import DataConfig

TRAIN, VAL, TEST = ("train", "training"), ("val", "valid", "validation", "dev", "mini"), ("test", "testing", "eval")
"""Usual names of splits, in lower case."""
MAX_RATIO = 200
"""Longer to shorter side of an image, beyond which Qwen's image processor refuses it."""


@dataclass(frozen=True, slots=True)
class Length:
    """Sizes of one sample."""

    text: int
    """Tokens of its prompt without images."""
    answer: int
    """Tokens of its answer and end."""
    image_tokens: tuple[int, ...]
    pixels: tuple[int, ...]
    """Of each image, before it is scaled."""

    @property
    def tokens(self) -> int:
        """Of the whole sample."""
        return self.text + self.answer + sum(self.image_tokens)


@dataclass(slots=True)
class Lengths:
    """All samples counted by (task, slice), and the sizes of evenly spread ones."""

    most: int
    """Samples that are measured, twice that at the most."""
    samples: int = 0
    words: Counter[tuple[str, str]] = field(default_factory=Counter)
    questions: int = 0
    """Samples without an answer."""
    rows: list[Length] = field(default_factory=list)
    _stride: int = 1

    def due(self) -> bool:
        """Whether the next sample is one of those that are measured."""
        return self.samples % self._stride == 0

    def add(self, sample: Sample, length: Length | None) -> None:
        """Count a sample, and keep its sizes if it is one of those that are measured. None: it could not be."""
        due = self.due()
        self.samples += 1
        self.words[sample.task, sample.slice] += 1
        self.questions += not sample.answer.strip()
        if due and length is not None:
            self.rows.append(length)
        if len(self.rows) >= 2 * self.most:  # every other one, from here on and of those behind
            self.rows, self._stride = self.rows[::2], 2 * self._stride

    def quantile(self, what: str, share: float) -> int:
        """The value that `share` of all stay at or below; of `tokens` or `answer`, or over all images of `pixels`.

        Samples without an answer say nothing of answers.
        """
        rows = [row for row in self.rows if row.answer] if what == "answer" else self.rows
        values = np.array([value for row in rows for value in np.atleast_1d(getattr(row, what))])
        return int(np.quantile(values, share, method="inverted_cdf")) if len(values) else 0


def detect(root: Path) -> tuple[str, dict[str, str]]:
    """(format, splits by role: train, val, test) of a data folder.

    Raises:
        DataError: no known format, or no split for training.
    """
    for name, reader in READERS.items():
        splits = reader.splits(root)
        if splits:
            roles = {role: _named(splits, known) for role, known in (("train", TRAIN), ("val", VAL), ("test", TEST))}
            if roles["train"] is None and len(splits) > 1:
                raise DataError(
                    f"{root}: holds splits {splits} in format {name!r}, none of which is called train. Rename one, or "
                    "write the recipe's data.train_split yourself."
                )
            roles["train"] = roles["train"] or splits[0]
            return name, {role: split for role, split in roles.items() if split is not None}
    known = "; ".join(f"{name}: {reader.layout}" for name, reader in READERS.items())
    raise DataError(f"{root}: holds no data set of a known format. Known: {known}.")


def _named(splits: list[str], known: tuple[str, ...]) -> str | None:
    return next((split for name in known for split in splits if split.lower() == name), None)


def length_of(sample: Sample, size: Callable[[Path], tuple[int, int]], processor: Processor) -> Length:
    """Sizes of a sample whose images have the sizes that `size` says. DataError for what cannot be encoded."""
    text, answer = processor.count_text(sample)
    sizes = [size(path) for path in sample.images]
    tokens = tuple(image_tokens(each, processor) for each in sizes)
    return Length(text, answer, tokens, tuple(width * height for width, height in sizes))


def header_size(path: Path) -> tuple[int, int]:
    """Width and height from an image file's header. DataError when it has none that can be read."""
    try:
        with Image.open(path) as file:
            return turned_size(file)
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise DataError(f"{path}: cannot be read as an image: {error}") from None


def image_tokens(size: tuple[int, int], processor: Processor) -> int:
    """Tokens that an image of (width, height) takes. DataError when the image processor refuses its shape."""
    width, height = size
    if max(size) > MAX_RATIO * min(size):
        raise DataError(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other")
    patches = processor.image_processor.get_number_of_image_patches(height, width, {})
    return int(patches) // processor.image_processor.merge_size**2


def decoded_size(path: Path) -> tuple[int, int] | str:
    """(width, height) of an image that can be decoded whole; else what is wrong with it."""
    try:
        return decode(path).size
    except DataError as error:
        return str(error)


@contextmanager
def _mapped(workers: int) -> Iterator[Callable[[Iterable[Path]], Iterator[tuple[int, int] | str]]]:
    if workers == 0:
        yield partial(map, decoded_size)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield partial(pool.map, decoded_size, chunksize=16)


def decoded_sizes(
    paths: list[Path], data: DataConfig, progress: Callable[[], object]
) -> dict[Path, tuple[int, int] | str]:
    """`decoded_size` of every image, in `data.workers` processes."""
    found = {}
    with _mapped(data.workers) as run:
        for path, size in zip(paths, run(paths), strict=True):
            found[path] = size
            progress()
    return found
