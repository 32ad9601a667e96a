"""Samples from data sets on disk: CODA-LM's published layout and chat JSONL.

`sample_id` is a content hash and the only key that later stages join by. Images are never read outside the data root,
and never decoded before their size is checked.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from pipeline.errors import DataError

MAX_IMAGE_PIXELS = 64_000_000
"""Largest image that is decoded; a bound against decompression bombs."""
TASKS = ("general", "region", "suggestion", "chat")
SLICES = ("regular", "corner", "unknown")
PROMPTS = {
    "general": (
        "There is an image of traffic captured from the perspective of the ego car. Focus on objects influencing the "
        "ego car's driving behavior: describe their appearance and location, and explain why they matter."
    ),
    "region": (
        "Please describe the object inside the red rectangle in the image and explain why it affects ego car driving."
    ),
    "suggestion": "Give driving suggestions for the ego car based on the current scene.",
}
"""Prompts of CODA-LM's three tasks, in wording close to its own; used where a record has no `question`."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with its image(s) and answer."""

    sample_id: str
    images: tuple[Path, ...]
    prompt: str
    answer: str
    """Empty where a test split publishes none."""
    task: str
    """general, region, suggestion or chat."""
    slice: str
    """regular, corner or unknown: for evaluation only."""
    box: Box | None = None
    """x, y, w, h in pixels of the marked region."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Where the sample came from, for messages only: `record`, and `field` or `id`."""


def read_samples(format: str, root: Path, split: str) -> list[Sample]:
    """All samples of a split, ascending by sample_id.

    Raises:
        DataError: the split is missing or empty, a record is broken, or two records have the same content.
    """
    if format == "coda_lm":
        samples = read_coda_lm(root, split)
    elif format == "chat":
        samples = read_chat_jsonl(root / f"{split}.jsonl", root)
    else:
        raise DataError(f"data.format is {format!r}: known are 'coda_lm' and 'chat'.")
    if not samples:
        raise DataError(f"{root}, split {split!r}: no samples. Correct data.root or the split's name.")
    samples.sort(key=lambda s: s.sample_id)
    for first, second in pairwise(samples):
        if first.sample_id == second.sample_id:
            places = " and ".join(", ".join(filter(None, s.meta.values())) for s in (first, second))
            raise DataError(f"{root}: the same question, answer and image twice: {places}. Remove one.")
    return samples


def require_answers(samples: Sequence[Sample], where: str) -> None:
    """DataError when a sample has nothing to learn from; names the first few records.

    Args:
        where: the split and what it is read for, for the message.
    """
    empty = [", ".join(filter(None, s.meta.values())) for s in samples if not s.answer.strip()]
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise DataError(
            f"{where}: {len(empty)} of {len(samples)} samples have an empty answer: {'; '.join(empty[:3])}{more}. "
            "Fill in or remove them. Nothing was started."
        )


def read_coda_lm(root: Path, split: str) -> list[Sample]:
    """CODA-LM: `<root>/CODA-LM/<split>/<folder>_<NNNN>.json` about `<root>/<folder>/images/<NNNN>.jpg`.

    Raises:
        DataError: no such split, or a broken record, named with file and field.
    """
    folder = _split_folder(root / "CODA-LM", split)
    slices = _read_slices(root / "slices.json")
    samples: list[Sample] = []
    for path in sorted(folder.glob("*.json")):
        samples += _coda_record(root, path, slices.get(path.stem, "unknown"))
    return samples


def read_chat_jsonl(path: Path, root: Path) -> list[Sample]:
    """Chat JSONL: `{id, image|images, conversations|messages}` a line makes one sample.

    The last turn, the assistant's, is the answer; all earlier turns, joined by line breaks, are the prompt.

    Raises:
        DataError: no such file, or a broken record, named with file, line and field.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. Correct data.root or the split's name.")
    samples = []
    # Not splitlines(): it also cuts at U+2028 and U+0085, which JSON allows inside strings.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            samples.append(_chat_record(root, f"{path}:{number}", _parse(line, f"{path}:{number}")))
    return samples


def load_image(sample: Sample, index: int = 0) -> Image.Image:
    """Decode one image as RGB, the region marked by a red rectangle as CODA-LM does.

    Raises:
        DataError: the file cannot be read as an image, is larger than MAX_IMAGE_PIXELS, or the region lies outside it.
    """
    path = sample.images[index]
    try:
        with Image.open(path) as file:
            size = file.size
            image = file.convert("RGB") if size[0] * size[1] <= MAX_IMAGE_PIXELS else None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: at most {MAX_IMAGE_PIXELS} pixels are decoded: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        # Pillow's readers let SyntaxError, ValueError and struct.error through on damaged files.
        raise DataError(f"{path}: cannot be read as an image: {error}. Sample {sample.sample_id} needs it.") from None
    if image is None:
        raise DataError(f"{path}: {size[0]} x {size[1]} pixels, at most {MAX_IMAGE_PIXELS} are decoded.")
    if sample.box is not None:
        _draw_box(image, sample.box, path)
    return image


def content_id(images: tuple[Path, ...], prompt: str, answer: str, task: str, box: Box | None) -> str:
    """Hash of everything that a model sees or is asked to say: 32 hex digits."""
    content = [*map(_image_hash, images), prompt, answer, task, list(box) if box else None]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=1 << 20)
def _image_hash(path: Path) -> str:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _draw_box(image: Image.Image, box: Box, path: Path) -> None:
    """Red outline around (x, y, w, h), its width 1/100 of the shorter side, at least 2 pixels."""
    x, y, w, h = box
    if x >= image.width or y >= image.height or x + w <= 0 or y + h <= 0:
        raise DataError(f"{path}: box {list(box)} lies outside the image of {image.width} x {image.height} pixels.")
    width = max(2, round(min(image.size) / 100))
    ImageDraw.Draw(image).rectangle([x, y, x + w, y + h], outline=(255, 0, 0), width=width)


def _split_folder(parent: Path, split: str) -> Path:
    """The split's folder; another case of its name will do, since releases differ (`val`, `Val`)."""
    if (parent / split).is_dir():
        return parent / split
    found = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    same = [name for name in found if name.lower() == split.lower()]
    if len(same) != 1:
        raise DataError(
            f"{parent / split}: no such split folder; found {found}. Draw or download the data set first, "
            "or correct data.root."
        )
    return parent / same[0]


def _read_slices(path: Path) -> dict[str, str]:
    """Slice of each record by json stem; none without the file."""
    if not path.is_file():
        return {}
    slices = _parse(_read_text(path), str(path))
    for stem, name in slices.items():
        if name not in SLICES:
            raise DataError(f"{path}: {stem}: slice must be one of {SLICES}, got {name!r}")
    return slices


def _coda_record(root: Path, path: Path, slice_name: str) -> Iterator[Sample]:
    record = _parse(_read_text(path), str(path))
    image = _inside(root, _coda_image(root, path, record), str(path))
    make = _Maker(image, slice_name, path)
    general = _section(record, "general_perception", path)
    if general:
        answer = _text(general, "description and explanation", path, "general_perception")
        yield make("general", "general_perception", general.get("question"), answer)
    for number, region in sorted(_section(record, "region_perception", path).items()):
        where = f"region_perception.{number}"
        if not isinstance(region, dict):
            raise DataError(f"{path}: {where} must be an object, got {region!r}")
        answer = _text(region, "description and explanation", path, where)
        yield make("region", where, region.get("question"), answer, _box(region.get("box"), path, where))
    if "driving_suggestion" in _spaced(record):
        answer = _text(record, "driving suggestion", path, "")
        yield make("suggestion", "driving_suggestion", record.get("driving_suggestion_question"), answer)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes the samples of one record."""

    image: Path
    slice_name: str
    path: Path

    def __call__(self, task: str, where: str, question: Any, answer: str, box: Box | None = None) -> Sample:
        if question is not None and not isinstance(question, str):
            raise DataError(f"{self.path}: {where}: the question must be text, got {question!r}")
        prompt = question or PROMPTS[task]
        ident = content_id((self.image,), prompt, answer, task, box)
        meta = {"record": str(self.path), "field": where}
        return Sample(ident, (self.image,), prompt, answer, task, self.slice_name, box, meta)


def _coda_image(root: Path, path: Path, record: Mapping[str, Any]) -> Path:
    named = record.get("image")
    if named is not None:
        if not isinstance(named, str) or not named:
            raise DataError(f"{path}: image must be a path below the data root, got {named!r}")
        return root / named
    folder, _, number = path.stem.rpartition("_")
    if not folder:
        raise DataError(f"{path}: named neither `<folder>_<number>.json` nor holding an `image` key")
    return root / folder / "images" / f"{number}.jpg"


def _inside(root: Path, path: Path, where: str) -> Path:
    """The image's real path, refused outside the data root."""
    try:
        resolved = path.resolve()
        inside, exists = resolved.is_relative_to(root.resolve()), resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a NUL character
        raise DataError(f"{where}: image {str(path)!r} is no usable path: {error}") from None
    if not inside:
        raise DataError(f"{where}: image {path} lies outside the data root {root.resolve()}. Nothing was read.")
    if not exists:
        raise DataError(f"{where}: image {path} is missing")
    return resolved


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record is an object, got {type(record).__name__}")
    return record


def _spaced(record: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with `_` and ` ` written alike: published files use both."""
    return {key.replace(" ", "_"): value for key, value in record.items()}


def _section(record: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = _spaced(record).get(name) or {}
    if not isinstance(section, dict):
        raise DataError(f"{path}: {name} must be an object, got {type(section).__name__}")
    return section


def _text(section: Mapping[str, Any], key: str, path: Path, where: str) -> str:
    """An answer; empty where a test split publishes none."""
    value = _spaced(section).get(key.replace(" ", "_"))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{path}: {where or 'record'}: {key!r} must be text, got {value!r}")
    return value.strip()


def _box(value: Any, path: Path, where: str) -> Box:
    # NaN fails the comparison too; json.loads lets it through.
    numbers = isinstance(value, list) and len(value) == 4
    if not numbers or not all(type(v) in (int, float) and abs(v) < 1e9 for v in value) or min(value[2:]) <= 0:
        raise DataError(f"{path}: {where}: box must be [x, y, w, h] with w, h > 0, got {value!r}")
    x, y, w, h = map(float, value)
    return x, y, w, h


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _chat_record(root: Path, where: str, record: Mapping[str, Any]) -> Sample:
    turns = record.get("conversations") or record.get("messages")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: needs `conversations` or `messages`, a list of turns")
    prompt, answer = _exchange([_turn(turn, where) for turn in turns], where)
    listed = record.get("images") or record.get("image")
    names = [listed] if isinstance(listed, str) else listed
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
        raise DataError(f"{where}: needs `image` (a path) or `images` (a list of paths), got {listed!r}")
    images = tuple(_inside(root, root / name, where) for name in names)
    meta = {"record": where, "id": str(record.get("id", ""))}
    task = _one_of(record, "task", TASKS, "chat", where)
    slice_name = _one_of(record, "slice", SLICES, "unknown", where)
    return Sample(content_id(images, prompt, answer, task, None), images, prompt, answer, task, slice_name, None, meta)


def _exchange(spoken: Sequence[tuple[str, str]], where: str) -> tuple[str, str]:
    """(prompt, answer) of a conversation's (role, text) turns."""
    *earlier, (role, answer) = spoken
    if role != "assistant":
        raise DataError(f"{where}: the last turn must be the assistant's answer, it is the {role}'s")
    if not any(role == "user" and text for role, text in earlier):
        raise DataError(f"{where}: needs a user's turn with text before the assistant's answer")
    return "\n".join(text for _, text in earlier if text), answer


def _one_of(record: Mapping[str, Any], key: str, known: tuple[str, ...], default: str, where: str) -> str:
    value = record.get(key, default)
    if value not in known:
        raise DataError(f"{where}: {key} must be one of {known}, got {value!r}")
    return str(value)


def _turn(turn: Any, where: str) -> tuple[str, str]:
    """(role, text) of one turn, image placeholders removed."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: a turn is an object, got {turn!r}")
    role = _ROLES.get(str(turn.get("from", turn.get("role"))))
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if role is None or not isinstance(content, str):
        raise DataError(f"{where}: a turn needs from/role (user, assistant, system) and value/content, got {turn!r}")
    return role, content.replace("<image>", "").strip()


def _part(part: Any, where: str) -> str:
    """Text of one content part; empty for an image, which the record's `images` names."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
        return ""
    raise DataError(f"{where}: a content part must be text or an image, got {part!r}")
