"""Rows become tables on disk, in the order of their ids.

Ids are hashes, hence spread evenly: rows go into buckets by the first byte of their id, and no more than a bucket is
sorted in memory.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from pipeline.data.index import rows
from pipeline.files import READ_BYTES, replacing

ROWS = 1 << 16
"""Rows of a batch, at least: each holds one copy of a text that comes often."""
ANSWERS = "-"
"""In a fingerprint, before the part that is of the teacher's answers."""
_BUCKETS = 64
_BUCKET_ROWS = 512
"""Rows of a bucket that wait in memory."""


# -- rows in order -----------------------------------------------------------------------------------------------------


class Buckets:
    """Rows by the first byte of their id, on disk."""

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"bucket-{number}" for number in range(_BUCKETS)]
        self._waiting: list[list[tuple[Any, ...]]] = [[] for _ in self._paths]
        self._files: dict[int, _Stream] = {}
        self.count = 0

    def add(self, made: Iterable[tuple[Any, ...]]) -> None:
        """Rows in the order of COLUMNS."""
        for row in made:
            number = row[0][0] * _BUCKETS >> 8
            self._waiting[number].append(row)
            self.count += 1
            if len(self._waiting[number]) == _BUCKET_ROWS:
                self._flush(number)

    def tables(self) -> Iterator[pa.Table]:
        """Each bucket's rows in order, equal ones once."""
        for number, path in enumerate(self._paths):
            if self._waiting[number]:
                self._flush(number)
            if number in self._files:
                self._files.pop(number).close()
                yield rows.in_order(pa.Table.from_batches(read_batches(path)))
                path.unlink()

    def _flush(self, number: int) -> None:
        if number not in self._files:
            self._files[number] = _Stream(self._paths[number], rows.PLAIN)
        self._files[number].writer.write_table(rows.table_of(self._waiting[number]))
        self._waiting[number].clear()


class Ordered:
    """Counts rows and takes their fingerprint while they are written."""

    def __init__(self) -> None:
        self.count, self.pool_answers = 0, 0
        self._ids, self._answers = xxhash.xxh3_128(), xxhash.xxh3_64()

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of all ids in order, a line each; then `-` and xxh3-64 of the teacher's answers, if there are any.

        An id is a hash of the record, which holds no answer of the teacher.
        """
        return self._ids.hexdigest() + (f"{ANSWERS}{self._answers.hexdigest()}" if self.pool_answers else "")

    def batches(self, tables: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
        """The tables' rows in batches of at least ROWS, but the last."""
        waiting: list[pa.Table] = []
        for table in tables:
            self.count += len(table)
            for sample_id in table["sample_id"].to_pylist():
                self._ids.update(f"{sample_id.hex()}\n")
            self._take_answers(table)
            waiting.append(table)
            if sum(map(len, waiting)) >= ROWS:
                yield rows.encoded(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            yield rows.encoded(pa.concat_tables(waiting))

    def _take_answers(self, table: pa.Table) -> None:
        columns = (table[name].to_pylist() for name in ("pool", "answered", "answer"))
        for pool, answered, answer in zip(*columns, strict=True):
            if pool and answered:
                self.pool_answers += 1
                self._answers.update(f"{len(answer)}\n{answer}")


# -- files -------------------------------------------------------------------------------------------------------------


def read_batches(path: Path) -> list[pa.RecordBatch]:
    """The batches of a table on disk, mapped into memory and not read."""
    return list(pa.ipc.open_stream(pa.memory_map(str(path))))


class _Stream:
    """A table that is being written."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_stream(self._file, schema)

    def close(self) -> None:
        self.writer.close()
        self._file.close()


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """A table on disk, as `read_batches` maps it."""
    stream = _Stream(path, schema)
    for batch in batches:
        stream.writer.write_batch(batch)
    stream.close()


def put_table(made: Path, folder: Path, kind: str) -> str:
    """Move a finished table into the folder, safely on disk; its name there."""
    digest = xxhash.xxh3_64()
    with made.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    name = f"{kind}-{digest.hexdigest()}.arrow"
    with replacing(folder / name) as temporary:
        os.replace(made, temporary)
    return name
