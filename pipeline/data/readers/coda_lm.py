"""CODA-LM in its published layout, with slices.json of ours beside it where there is one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.readers.checked import image_inside, parse_object, read_text
from pipeline.data.sample import SLICES, Box, Sample, content_id
from pipeline.errors import DataError

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
    slices = parse_object(read_text(path), str(path))
    for stem, name in slices.items():
        if name not in SLICES:
            raise DataError(f"{path}: {stem}: slice must be one of {SLICES}, got {name!r}")
    return slices


def _coda_record(root: Path, path: Path, slice_name: str) -> Iterator[Sample]:
    record = parse_object(read_text(path), str(path))
    image = image_inside(root, _coda_image(root, path, record), str(path))
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
