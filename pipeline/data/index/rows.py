"""A sample as a row of an index: the one place that says which columns there are.

A new field of `Sample` is a column in COLUMNS, a value in `row_of` and an argument in `sample_of`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.sample import LABELLED, POOL, Sample, Turn

FORMAT_VERSION = 3
"""Of the files of an index; one of another version is made again."""
_TEXT = pa.dictionary(pa.int32(), pa.string())
"""Text that often comes again, as a question: each batch of rows keeps one copy."""
_WORD = pa.dictionary(pa.int16(), pa.string())
"""One of a few words."""
COLUMNS: Mapping[str, pa.DataType] = {
    "sample_id": pa.binary(16),
    "images": pa.list_(pa.int32()),  # rows of the table of images
    "turns": _TEXT,  # JSON: [role, [part, ...]] each, null for an image
    "answer": pa.string(),
    "task": _WORD,
    "slice": _WORD,
    "box": pa.list_(pa.float64()),  # x, y, w, h; empty without one
    "file": _TEXT,  # of the record, below the data root
    "line": pa.int32(),  # of the record; 0 where a file is one record
    "meta_names": _WORD,  # of the rest of `meta`, joined by commas
    "meta": pa.list_(pa.string()),
    "characters": pa.int32(),  # of all turns and the answer
    "answered": pa.bool_(),
    "pool": pa.bool_(),  # the answer, if there is one, is the teacher's
}
SCHEMA = pa.schema(dict(COLUMNS))
PLAIN = pa.schema({name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in COLUMNS.items()})
"""The same without dictionaries: what rows are before they are in order."""
CONTENT = ("sample_id", "images", "turns", "answer", "task", "slice", "box", "pool")
"""Columns that a sample is made from."""
ORIGIN = ("file", "line", "meta_names", "meta")
"""Columns of its `meta`."""


class Place:
    """Where a data set lies: an index keeps paths relative to it."""

    def __init__(self, root: Path) -> None:
        self.root, self.real = root, os.path.realpath(root)


def row_of(sample: Sample, image_numbers: Sequence[int], place: Place) -> tuple[Any, ...]:
    """Values in the order of COLUMNS."""
    rest = dict(sample.meta)
    file, _, line = rest.pop("record").rpartition(":")
    if not line.isdecimal():  # a file that is one record
        file, line = sample.meta["record"], "0"
    return (
        bytes.fromhex(sample.sample_id),
        image_numbers,
        _turns_text(sample.turns),
        sample.answer,
        sample.task,
        sample.slice,
        sample.box or (),
        file.removeprefix(f"{place.root}{os.sep}"),
        int(line),
        ",".join(rest),
        list(rest.values()),
        sample.characters,
        bool(sample.answer.strip()),
        sample.source == POOL,
    )


def _turns_text(turns: Iterable[Turn]) -> str:
    return json.dumps([[turn.role, turn.parts] for turn in turns], ensure_ascii=False, separators=(",", ":"))


@lru_cache(maxsize=1024)
def _turns(text: str) -> tuple[Turn, ...]:
    return tuple(Turn(role, tuple(parts)) for role, parts in json.loads(text))


class Meta(Mapping[str, str]):
    """A sample's `meta`, read from its row when it is asked for: messages alone need it, and training none of it."""

    __slots__ = ("_read",)

    def __init__(self, read: Callable[[], dict[str, str]]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> str:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._read(),)


def meta_of(row: Mapping[str, Any], place: Place) -> dict[str, str]:
    """The `meta` of a row's ORIGIN."""
    record = str(place.root / row["file"]) + (f":{row['line']}" if row["line"] else "")
    names = row["meta_names"].split(",") if row["meta_names"] else []
    return {"record": record, **dict(zip(names, row["meta"], strict=True))}


def sample_of(row: Mapping[str, Any], images: Iterable[str], meta: Meta, place: Place) -> Sample:
    """The sample of a row's CONTENT, given its images' paths."""
    return Sample(
        sample_id=row["sample_id"].hex(),
        images=tuple(Path(os.path.join(place.real, path)) for path in images),
        turns=_turns(row["turns"]),
        answer=row["answer"],
        task=row["task"],
        slice=row["slice"],
        box=tuple(row["box"]) or None,
        meta=meta,
        source=POOL if row["pool"] else LABELLED,
    )


def table_of(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    """Rows as a table of PLAIN."""
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, PLAIN, strict=True)], schema=PLAIN)


def in_order(table: pa.Table) -> pa.Table:
    """A table of PLAIN ascending by sample_id; of rows with one id the first that came."""
    raw = np.frombuffer(b"".join(table["sample_id"].to_pylist()), ">u8").reshape(-1, 2)
    order = np.lexsort((raw[:, 1], raw[:, 0]))  # stable
    again = np.zeros(len(raw), bool)
    again[1:] = (raw[order][1:] == raw[order][:-1]).all(axis=1)
    return table.combine_chunks().take(pa.array(order[~again]))


def encoded(table: pa.Table) -> pa.RecordBatch:
    """A table of PLAIN as one batch of SCHEMA."""
    arrays = []
    for field in SCHEMA:
        column = table[field.name].combine_chunks()
        if pa.types.is_dictionary(field.type):
            column = column.dictionary_encode()
            column = pa.DictionaryArray.from_arrays(column.indices.cast(field.type.index_type), column.dictionary)
        arrays.append(column)
    return pa.record_batch(arrays, schema=SCHEMA)
