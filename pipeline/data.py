"""Samples from data sets on disk: CODA-LM's published layout and chat JSONL.

`sample_id` is a content hash and the only key that later stages join by. Images are never read outside the data root,
and never decoded before their size is checked.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, UnidentifiedImageError

from pipeline.errors import DataError

MAX_IMAGE_PIXELS = 64_000_000
"""Largest image that is decoded; a bound against decompression bombs."""
PROMPTS = {
    "general": (
        "There is an image of traffic captured from the perspective of the ego car. Focus on objects influencing the "
        "ego car's driving behavior: describe their appearance and location, and explain why they matter."
    ),
    "region": "Please describe the object inside the red rectangle in the image and explain why it affects ego car driving.",
    "suggestion": "Give driving suggestions for the ego car based on the current scene.",
}
"""CODA-LM's task prompts, used where a record has no `question` of its own."""

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


def read_samples(format: str, root: Path, split: str) -> list[Sample]:
    """All samples of a split, ascending by sample_id.

    Raises:
        DataError: the split is missing or empty, a record is broken, or two records have the same content.
    """
    reader = {"coda_lm": read_coda_lm, "chat": lambda root, split: read_chat_jsonl(root / f"{split}.jsonl", root)}[format]
    samples = sorted(reader(root, split), key=lambda s: s.sample_id)
    if not samples:
        raise DataError(f"{root}, split {split!r}: no samples")
    for first, second in zip(samples, samples[1:], strict=False):
        if first.sample_id == second.sample_id:
            raise DataError(f"{root}: the same question, answer and image twice: {first.meta} and {second.meta}. Remove one.")
    return samples


def read_coda_lm(root: Path, split: str) -> list[Sample]:
    """CODA-LM: `<root>/CODA-LM/<split>/<folder>_<NNNN>.json` about `<root>/<folder>/images/<NNNN>.jpg`."""
    folder = root / "CODA-LM" / split
    if not folder.is_dir():
        raise DataError(f"{folder}: no such split folder. Draw or download the data set first, or correct data.root.")
    slices_path = root / "slices.json"
    slices = json.loads(slices_path.read_text()) if slices_path.is_file() else {}
    samples: list[Sample] = []
    for path in sorted(folder.glob("*.json")):
        samples += _coda_record(root, path, slices.get(path.stem, "unknown"))
    return samples


def read_chat_jsonl(path: Path, root: Path) -> list[Sample]:
    """Chat JSONL: `{id, image|images, conversations|messages}` a line; the last assistant turn is the answer."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Correct data.root or the split's name.")
    samples = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            samples.append(_chat_record(root, f"{path}:{number}", _parse(line, f"{path}:{number}")))
    return samples


def load_image(sample: Sample, index: int = 0) -> Image.Image:
    """Decode one image as RGB, the region marked by a red rectangle as CODA-LM does.

    Raises:
        DataError: the file cannot be read as an image or is larger than MAX_IMAGE_PIXELS.
    """
    path = sample.images[index]
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_IMAGE_PIXELS:
                raise DataError(f"{path}: {file.width} x {file.height} pixels, at most {MAX_IMAGE_PIXELS} are decoded.")
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}. Sample {sample.sample_id} needs it.") from None
    if sample.box is not None:
        x, y, w, h = sample.box
        width = max(2, round(min(image.size) / 100))
        ImageDraw.Draw(image).rectangle([x, y, x + w, y + h], outline=(255, 0, 0), width=width)
    return image


def _coda_record(root: Path, path: Path, slice_name: str) -> Iterator[Sample]:
    record = _parse(path.read_text(), str(path))
    image = _inside(root, _coda_image(root, path, record), str(path))
    make = _Maker(image, slice_name, str(path))
    general = _section(record, "general_perception", path)
    if general:
        answer = _text(general, "description and explanation", path, "general_perception")
        yield make("general", general.get("question"), answer)
    for number, region in sorted(_section(record, "region_perception", path).items()):
        where = f"region_perception.{number}"
        if not isinstance(region, dict):
            raise DataError(f"{path}: {where} must be an object, got {region!r}")
        answer = _text(region, "description and explanation", path, where)
        yield make("region", region.get("question"), answer, _box(region.get("box"), path, where))
    if "driving_suggestion" in _spaced(record):
        answer = _text(record, "driving suggestion", path, "")
        yield make("suggestion", record.get("driving_suggestion_question"), answer)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes the samples of one record."""

    image: Path
    slice_name: str
    where: str

    def __call__(self, task: str, question: str | None, answer: str, box: Box | None = None) -> Sample:
        prompt = question or PROMPTS[task]
        ident = content_id((self.image,), prompt, answer, task, box)
        return Sample(ident, (self.image,), prompt, answer, task, self.slice_name, box, {"record": self.where})


def content_id(images: tuple[Path, ...], prompt: str, answer: str, task: str, box: Box | None) -> str:
    """Hash of everything that a model sees or is asked to say: 32 hex digits."""
    content = [*map(_image_hash, images), prompt, answer, task, list(box) if box else None]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=1 << 20)
def _image_hash(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _coda_image(root: Path, path: Path, record: Mapping[str, Any]) -> Path:
    if isinstance(record.get("image"), str):
        return root / str(record["image"])
    folder, _, number = path.stem.rpartition("_")
    if not folder:
        raise DataError(f"{path}: named neither `<folder>_<number>.json` nor holding an `image` key")
    return root / folder / "images" / f"{number}.jpg"


def _inside(root: Path, path: Path, where: str) -> Path:
    """The image's real path, refused outside the data root."""
    resolved = path.resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise DataError(f"{where}: image {path} lies outside the data root {root.resolve()}. Nothing was read.")
    if not resolved.is_file():
        raise DataError(f"{where}: image {path} is missing")
    return resolved


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
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
    numbers = isinstance(value, list) and len(value) == 4 and all(isinstance(v, int | float) for v in value)
    if not numbers or value[2] <= 0 or value[3] <= 0:
        raise DataError(f"{path}: {where}: box must be [x, y, w, h] with w, h > 0, got {value!r}")
    x, y, w, h = map(float, value)
    return x, y, w, h


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _chat_record(root: Path, where: str, record: Mapping[str, Any]) -> Sample:
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: needs `conversations` or `messages`, a list of turns")
    spoken = [_turn(turn, where) for turn in turns]
    if spoken[-1][0] != "assistant":
        raise DataError(f"{where}: the last turn must be the assistant's answer, it is the {spoken[-1][0]}'s")
    listed = record.get("images", record.get("image"))
    names = [listed] if isinstance(listed, str) else listed
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise DataError(f"{where}: needs `image` (a path) or `images` (a list of paths), got {listed!r}")
    images = tuple(_inside(root, root / name, where) for name in names)
    prompt, answer = "\n".join(text for _, text in spoken[:-1] if text), spoken[-1][1]
    meta = {"record": where, "id": str(record.get("id", ""))}
    task = str(record.get("task", "chat"))
    ident = content_id(images, prompt, answer, task, None)
    return Sample(ident, images, prompt, answer, task, str(record.get("slice", "unknown")), None, meta)


def _turn(turn: Any, where: str) -> tuple[str, str]:
    """(role, text) of one turn, image placeholders removed."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: a turn is an object, got {turn!r}")
    role = _ROLES.get(str(turn.get("from", turn.get("role"))))
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if role is None or not isinstance(content, str):
        raise DataError(f"{where}: a turn needs from/role (user, assistant, system) and value/content, got {turn!r}")
    return role, content.replace("<image>", "").strip()
