"""The records of a file of conversations: JSON lines, a JSON array, or Parquet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.readers.source import Source, parse_object
from pipeline.errors import DataError

LINES, ARRAY, PARQUET = ".jsonl", ".json", ".parquet"
SUFFIXES = (LINES, ARRAY, PARQUET)
_ROWS = 1024
"""Rows of a Parquet file that are objects in memory at a time."""
_BLANK = " \t\r\n"


def records(source: Source, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`path:number`, record) of every record of a file; one that is none becomes a problem.

    The number is a line's in JSON lines, and a record's, from 1, in an array or in Parquet.
    """
    if path.suffix == PARQUET:
        yield from _rows(source, path)
    elif path.suffix == ARRAY and is_array(path):
        yield from _elements(source, path)
    else:  # some write lines under the name of an array
        for where, line in source.lines(path):
            with source.problems.at(where):
                yield where, parse_object(line, where)


def is_array(path: Path) -> bool:
    """Whether a file starts as a JSON array does. DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _elements(source: Source, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One object at a time: a million of them at once would take many times the file's size."""
    text, decoder, number = "", json.JSONDecoder(), 0
    with source.problems.at(path):
        text = source.text(path)
    place = _skip(text, text.find("[") + 1)
    while place < len(text) and text[place] != "]":
        number += 1
        where, found = f"{path}:{number}", None
        with source.problems.at(where):
            found, place = _element(decoder, text, place, where)
            if not isinstance(found, dict):
                raise DataError(f"{where}: a record is an object, got {type(found).__name__}")
            yield where, found
        if found is None:  # what follows a broken record cannot be told from it
            return
        place = _skip(text, place)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            with source.problems.at(where):
                raise DataError(
                    f"{where}: not valid JSON: neither `,` nor `]` after this record; the rest was not read"
                )
            return


def _element(decoder: json.JSONDecoder, text: str, place: int, where: str) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, place)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}; the records after it were not read") from None


def _skip(text: str, place: int) -> int:
    """The next place that is not blank."""
    while place < len(text) and text[place] in _BLANK:
        place += 1
    return place


def _rows(source: Source, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number, size = 0, path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:  # type: ignore[no-untyped-call]
            for batch in file.iter_batches(_ROWS):  # type: ignore[no-untyped-call]
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
                source.done += size * batch.num_rows // max(file.metadata.num_rows, 1)
    except (OSError, pa.ArrowException) as error:
        with source.problems.at(path):
            raise DataError(f"{path}: cannot be read as Parquet after row {number}: {error}") from None
