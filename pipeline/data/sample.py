"""A sample: a conversation about images and its last answer, its content hash, and its images decoded.

Images are never decoded before their size is checked.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps

from pipeline.errors import DataError

MAX_IMAGE_PIXELS = 64_000_000
"""Largest image that is decoded; a bound against decompression bombs."""
UNKNOWN = "unknown"
"""Slice of a sample that names none."""

LABELLED, POOL = "labelled", "pool"
"""Where an answer comes from: the record, or the teacher because the record has none."""

Box = tuple[float, float, float, float]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
IMAGE = None
"""Part of a turn that is the sample's next image."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a conversation says at a time."""

    role: str
    """SYSTEM, USER or ASSISTANT; only a user shows images."""
    parts: tuple[str | None, ...]
    """Texts, and IMAGE where an image stands between them."""

    @property
    def text(self) -> str:
        """Its words without images."""
        return "".join(part for part in self.parts if part is not None)


def question(prompt: str, images: int = 1) -> tuple[Turn, ...]:
    """The conversation that is one question, its images before the text."""
    return (Turn(USER, (*[IMAGE] * images, prompt)),)


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation up to an answer, and this answer."""

    sample_id: str
    images: tuple[Path, ...]
    """In the order of their places in `turns`, one each."""
    turns: tuple[Turn, ...]
    """All that comes before the answer; the last one is a user's."""
    answer: str
    """What the assistant says then. Empty where a test split publishes none."""
    task: str
    """Any name; rows of the result table."""
    slice: str
    """Any name, as regular and corner: for evaluation only."""
    box: Box | None = None
    """x, y, w, h in pixels of the marked region."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Where the sample came from, for messages only: `record`, and `field` or `id`."""
    source: str = LABELLED
    """LABELLED or POOL."""

    @property
    def where(self) -> str:
        """For messages: its record, the part or name of it, and its id."""
        origin = ", ".join(filter(None, self.meta.values()))
        return f"{origin} (sample {self.sample_id})" if origin else f"sample {self.sample_id}"

    @property
    def prompt(self) -> str:
        """The words before the answer, to look at: turns joined by line breaks, images left out."""
        return "\n".join(text for turn in self.turns if (text := turn.text.strip()))

    @property
    def answers(self) -> tuple[str, ...]:
        """What the assistant says in the conversation, the answer last."""
        return (*(turn.text for turn in self.turns if turn.role == ASSISTANT), self.answer)

    @property
    def characters(self) -> int:
        """Of all texts: a measure of their length."""
        return sum(len(turn.text) for turn in self.turns) + len(self.answer)


def content_id(image_hashes: Sequence[str], turns: Sequence[Turn], answer: str, task: str, box: Box | None) -> str:
    """Hash of everything that a model sees or is asked to say: 32 hex digits."""
    spoken = [[turn.role, list(turn.parts)] for turn in turns]
    content = [*image_hashes, spoken, answer, task, list(box) if box else None]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def hash_image(path: Path) -> str:
    """Hash of an image file's bytes: 32 hex digits. DataError when it cannot be read."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def identified(sample: Sample, image_hashes: Sequence[str]) -> Sample:
    """A reader's sample with its id and source. DataError when a text of it cannot be written as UTF-8."""
    texts = [("image", str(path)) for path in sample.images]
    texts += [("prompt", turn.text) for turn in sample.turns]
    texts += [("answer", sample.answer), ("task", sample.task), ("slice", sample.slice)]
    for name, text in (*texts, *sample.meta.items()):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON lets through
            raise DataError(f"{sample.meta['record']}: {name} is no valid Unicode: {error}") from None
    sample_id = content_id(image_hashes, sample.turns, sample.answer, sample.task, sample.box)
    return replace(sample, sample_id=sample_id, source=source_of(sample.answer))


def source_of(answer: str) -> str:
    """The source of a record with this answer."""
    return LABELLED if answer.strip() else POOL


def load_image(sample: Sample, index: int = 0, *, box_width: int = 2) -> Image.Image:
    """Decode one image, the region marked by a red rectangle.

    Args:
        box_width: of the rectangle's line in pixels; CODA-LM's is 2.

    Raises:
        DataError: as `decode`, or the region lies outside the image; it names the sample.
    """
    path = sample.images[index]
    try:
        image = decode(path)
        if sample.box is not None:
            _draw_box(image, sample.box, path, box_width)
    except DataError as error:
        raise DataError(f"{sample.where}: {error}") from None
    return image


def decode(path: Path) -> Image.Image:
    """An image as RGB of 8 bits, turned as its EXIF data say.

    Raises:
        DataError: the file cannot be read as an image, or is larger than MAX_IMAGE_PIXELS.
    """
    try:
        with Image.open(path) as file:
            size = file.size
            image = _as_rgb(file) if size[0] * size[1] <= MAX_IMAGE_PIXELS else None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: at most {MAX_IMAGE_PIXELS} pixels are decoded: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        # Pillow's readers let SyntaxError, ValueError and struct.error through on damaged files.
        raise DataError(f"{path}: cannot be read as an image: {error}") from None
    if image is None:
        raise DataError(f"{path}: {size[0]} x {size[1]} pixels, at most {MAX_IMAGE_PIXELS} are decoded.")
    return image


def turned_size(file: Image.Image) -> tuple[int, int]:
    """Width and height as `load_image` gives them, from an opened file's header."""
    sideways = file.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (file.height, file.width) if sideways else file.size


def _as_rgb(file: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
    return image.convert("RGB")


def box_problem(box: Box, size: tuple[int, int]) -> str | None:
    """What is wrong with a region in an image of (width, height); None if it can be drawn."""
    x, y, w, h = box
    if x < size[0] and y < size[1] and x + w > 0 and y + h > 0:
        return None
    return f"box {list(box)} lies outside the image of {size[0]} x {size[1]} pixels."


def _draw_box(image: Image.Image, box: Box, path: Path, width: int) -> None:
    """Red outline around (x, y, w, h), a line of `width` pixels inside its edges."""
    if problem := box_problem(box, image.size):
        raise DataError(f"{path}: {problem}")
    x, y, w, h = box
    ImageDraw.Draw(image).rectangle([x, y, x + w, y + h], outline=(255, 0, 0), width=width)
