"""Conversations about images, or about none: `<split>.jsonl`, `.json` or `.parquet`, a record each."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.data.readers.conversation import read_conversation
from pipeline.data.readers.records import ARRAY, LINES, PARQUET, SUFFIXES, is_array, records
from pipeline.data.readers.source import Source, SplitMissingError
from pipeline.data.sample import UNKNOWN, Sample
from pipeline.errors import DataError

_IDS = ("id", "question_id", "sample_id", "uid")
_LONGEST_NAME = 100


def chat_files(root: Path, split: str) -> list[Path]:
    """The split's file, or its parts `<split>-00000-of-00002.parquet`.

    Raises:
        SplitMissingError: none.
        DataError: files of several kinds, of which any could be meant.
    """
    found = [[path] for suffix in SUFFIXES if (path := root / f"{split}{suffix}").is_file()]
    parts = sorted(root.glob(f"{split}-*-of-*{PARQUET}"))
    found += [parts] if parts else []
    if not found:
        names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
        raise SplitMissingError(f"{root}: has none of {names}. Correct data.root or the split's name.")
    if len(found) > 1:
        names = ", ".join(files[0].name for files in found)
        raise DataError(f"{root}: {names} could all be split {split!r}. Move away those that are not meant.")
    return found[0]


def chat_splits(root: Path) -> list[str]:
    """Every split of the root. A `.json` file is one if it holds an array."""
    whole = {path.stem for suffix in (LINES, PARQUET) for path in root.glob(f"*{suffix}") if "-of-" not in path.stem}
    arrays = {path.stem for path in root.glob(f"*{ARRAY}") if path.is_file() and is_array(path)}
    parts = {path.stem.rsplit("-", 3)[0] for path in root.glob(f"*-*-of-*{PARQUET}")}
    return sorted(whole | arrays | parts)


def read_chat(source: Source) -> Iterator[Sample]:
    """A sample of each record: its last turn, the assistant's, is the answer."""
    for path in source.files:
        for where, record in records(source, path):
            yield from _samples(source, where, record)


def _samples(source: Source, where: str, record: Mapping[str, Any]) -> Iterator[Sample]:
    """The record's sample; none, and a problem for each part that is broken."""
    before, at = len(source.problems), source.problems.at
    spoken = images = None
    with at(where, "conversations"):
        spoken = _said_where(where, record)
    if spoken is not None:
        with at(where, "image"):
            images = tuple(source.image(name, where) for name in spoken.images)
    with at(where, "task"):
        task = _name(record, "task", "chat", where)
    with at(where, "slice"):
        slice_name = _name(record, "slice", UNKNOWN, where)
    if spoken is not None and images is not None and len(source.problems) == before:
        own = next((str(record[key]) for key in _IDS if record.get(key) is not None), "")
        meta = {"record": where, "id": own}
        yield Sample("", images, spoken.turns, spoken.answer, task, slice_name, None, meta)


def _said_where(where: str, record: Mapping[str, Any]) -> Any:
    try:
        return read_conversation(record)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _name(record: Mapping[str, Any], key: str, default: str, where: str) -> str:
    """A task's or slice's name: any short text or whole number."""
    value = record.get(key)
    if value is None:
        return default
    name = str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise DataError(f"{where}: {key} must be a name of up to {_LONGEST_NAME} characters, got {value!r}")
    return name
