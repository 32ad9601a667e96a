"""CODA-LM in its published layout, with slices.json of ours beside it where there is one."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.data.readers.source import Source, SplitMissingError, parse_object
from pipeline.data.sample import UNKNOWN, Box, Sample, question
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


SLICE_FILE = "slices.json"


def coda_lm_files(root: Path, split: str) -> list[Path]:
    """`<root>/CODA-LM/<split>/*.json`, and `<root>/slices.json` where there is one. SplitMissingError without them."""
    folder = _split_folder(root / "CODA-LM", split)
    records = [folder / entry.name for entry in os.scandir(folder) if entry.name.endswith(".json")]
    slices = root / SLICE_FILE
    return [*sorted(records), *([slices] if slices.is_file() else [])]


def coda_lm_splits(root: Path) -> list[str]:
    """Every folder of `<root>/CODA-LM` that holds records."""
    return sorted(folder.name for folder in (root / "CODA-LM").glob("*") if any(folder.glob("*.json")))


def read_coda_lm(source: Source) -> Iterator[Sample]:
    """CODA-LM: `<root>/CODA-LM/<split>/<folder>_<NNNN>.json` about `<root>/<folder>/images/<NNNN>.jpg`.

    Raises:
        DataError: the file of slices is broken.
    """
    slice_file = source.root / SLICE_FILE
    has_slices = source.files[-1:] == [slice_file]
    slices = _read_slices(source, slice_file) if has_slices else {}
    for path in source.files[: len(source.files) - has_slices]:
        yield from _samples(source, path, slices.get(path.stem, UNKNOWN))


def _split_folder(parent: Path, split: str) -> Path:
    """The split's folder; another case of its name will do, since releases differ (`val`, `Val`)."""
    if (parent / split).is_dir():
        return parent / split
    found = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    same = [name for name in found if name.lower() == split.lower()]
    if len(same) != 1:
        raise SplitMissingError(
            f"{parent / split}: no such split folder; found {found}. Draw or download the data set first, "
            "or correct data.root."
        )
    return parent / same[0]


def _read_slices(source: Source, path: Path) -> dict[str, str]:
    """Slice of each record by json stem."""
    slices = parse_object(source.text(path), str(path))
    for stem, name in slices.items():
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: {stem}: slice must be a name, got {name!r}")
    return slices


def _samples(source: Source, path: Path, slice_name: str) -> Iterator[Sample]:
    """The samples of one record; a problem for each part that is broken."""
    at, record, image = source.problems.at, None, None
    with at(path):
        record = parse_object(source.text(path), str(path))
    if record is None:
        return
    with at(path, "image"):
        image = source.image(_image_name(path, record), str(path))
    for task, field, section in _sections(source, path, record):
        with at(path, field):
            prompt, answer = _question(section, task, path, field), _answer(section, path, field)
            box = _box(section.get("box"), path, field) if task == "region" else None
            if image is not None:
                meta = {"record": str(path), "field": field}
                yield Sample("", (image,), question(prompt), answer, task, slice_name, box, meta)


def _sections(source: Source, path: Path, record: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(task, field, content) of the record's parts that make a sample each."""
    at, record = source.problems.at, _spaced(record)
    with at(path, "general_perception"):
        if general := _section(record, "general_perception", path):
            yield "general", "general_perception", general
    with at(path, "region_perception"):
        for number, region in sorted(_section(record, "region_perception", path).items()):
            field = f"region_perception.{number}"
            with at(path, field):
                if not isinstance(region, dict):
                    raise DataError(f"{path}: {field} must be an object, got {region!r}")
                yield "region", field, region
    if "driving_suggestion" in record:
        suggestion = {"driving suggestion": record["driving_suggestion"]}
        yield "suggestion", "driving_suggestion", suggestion | {"question": record.get("driving_suggestion_question")}


def _image_name(path: Path, record: Mapping[str, Any]) -> Any:
    if record.get("image") is not None:
        return record["image"]
    folder, _, number = path.stem.rpartition("_")
    if not folder:
        raise DataError(f"{path}: named neither `<folder>_<number>.json` nor holding an `image` key")
    return f"{folder}/images/{number}.jpg"


def _question(section: Mapping[str, Any], task: str, path: Path, field: str) -> str:
    question = section.get("question")
    if question is not None and not isinstance(question, str):
        raise DataError(f"{path}: {field}: the question must be text, got {question!r}")
    return question or PROMPTS[task]


def _spaced(record: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with `_` and ` ` written alike: published files use both."""
    return {key.replace(" ", "_"): value for key, value in record.items()}


def _section(record: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = record.get(name) or {}
    if not isinstance(section, dict):
        raise DataError(f"{path}: {name} must be an object, got {type(section).__name__}")
    return section


def _answer(section: Mapping[str, Any], path: Path, field: str) -> str:
    """An answer; empty where a test split publishes none."""
    key = "driving suggestion" if field == "driving_suggestion" else "description and explanation"
    value = _spaced(section).get(key.replace(" ", "_"))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{path}: {field}: {key!r} must be text, got {value!r}")
    return value.strip()


def _box(value: Any, path: Path, where: str) -> Box:
    # NaN fails the comparison too; json.loads lets it through.
    numbers = isinstance(value, list) and len(value) == 4
    if not numbers or not all(type(v) in (int, float) and abs(v) < 1e9 for v in value) or min(value[2:]) <= 0:
        raise DataError(f"{path}: {where}: box must be [x, y, w, h] with w, h > 0, got {value!r}")
    x, y, w, h = map(float, value)
    return x, y, w, h
