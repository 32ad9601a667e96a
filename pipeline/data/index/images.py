"""Hashes of image files, taken once: kept by path, size and time of change, so that no image is read a second time.

While an index is made, each new hash is also a line of a journal, so that what was read before a kill -9 is not read
again. A line is complete or no JSON: unlike a binary file, a journal that a power cut left half written shows it.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa

from pipeline.data.sample import hash_image
from pipeline.errors import DataError

_HASH_BYTES = 16
SCHEMA = pa.schema(
    {
        "path": pa.string(),  # below the data root, or absolute where a link leads out of it
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "hash": pa.binary(_HASH_BYTES),
    }
)
READERS = 16
"""Files that are read at once: network storage answers slowly, but many at the same time."""
_CHUNK = 32
"""Images of one thread's task."""
_ROWS = 1 << 16
T = TypeVar("T")


class Stamp(NamedTuple):
    """What tells an unchanged file without reading it."""

    size: int
    mtime_ns: int


def stamp(path: str | Path) -> Stamp:
    """Of a file now. OSError when it cannot be asked."""
    found = os.stat(path)
    return Stamp(found.st_size, found.st_mtime_ns)


class ImageHashes:
    """Every image of one split, a row each. About 200 bytes an image, in the one process that makes an index."""

    def __init__(self, root: Path) -> None:
        """Without images. `root`: the data root; paths below it are kept relative to it."""
        self._base = os.path.realpath(root) + os.sep
        self._rows: dict[str, int] = {}
        self._size, self._mtime, self._hash = array("q"), array("q"), bytearray()
        self._number = array("i")
        self._looked_at = bytearray()
        self._order: list[int] = []
        self.read = 0
        """Images whose bytes were read."""
        self.kept = 0
        """Images that were found unchanged."""

    # -- what is known from before -------------------------------------------------------------------------------------

    def know(self, path: str, found: Stamp, digest: bytes) -> int:
        """Remember a hash; returns its row."""
        row = self._rows.setdefault(path, len(self._rows))
        if row == len(self._size):
            self._size.append(0)
            self._mtime.append(0)
            self._hash += bytes(_HASH_BYTES)
            self._number.append(-1)
            self._looked_at.append(0)
        self._size[row], self._mtime[row] = found
        self._hash[_part(row)] = digest
        return row

    def know_table(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Remember what an index holds."""
        for batch in batches:
            for path, size, mtime_ns, digest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                self.know(os.path.join(self._base, path), Stamp(size, mtime_ns), digest)

    def know_journal(self, path: Path) -> None:
        """Remember what an interrupted process had read."""
        for line in path.read_bytes().split(b"\n"):
            try:
                name, size, mtime_ns, digest = json.loads(line)
                raw = bytes.fromhex(digest)
            except (ValueError, TypeError):  # the line that it was writing
                continue
            if len(raw) == _HASH_BYTES:
                self.know(name, Stamp(size, mtime_ns), raw)

    # -- what is there now ---------------------------------------------------------------------------------------------

    def look_at(self, paths: Iterable[Path], pool: ThreadPoolExecutor) -> tuple[list[str], dict[Path, str]]:
        """Read those that are new or changed, each image at most once.

        Returns:
            Lines for the journal, and what is wrong with those that could not be read.
        """
        new = {str(path): path for path in paths if not self._is_fresh(path)}  # paths themselves are slow to hash
        todo = [(path, self._known(path)) for path in new.values()]
        lines, wrong = list[str](), dict[Path, str]()
        for results in pool.map(_examine, _chunks(todo, _CHUNK)):
            for path, result in results:
                if isinstance(result, str):
                    wrong[path] = result
                    continue
                found, digest = result
                if digest is None:
                    self.kept += 1
                    row = self._rows[str(path)]
                else:
                    self.read += 1
                    row = self.know(str(path), found, digest)
                    lines.append(json.dumps([str(path), *found, digest.hex()]) + "\n")
                self._looked_at[row] = 1
        return lines, wrong

    def digest(self, path: Path) -> str:
        """The hash of an image that was looked at."""
        row = self._rows[str(path)]
        return self._hash[_part(row)].hex()

    def number(self, path: Path) -> int:
        """The image's row in the table that `batches` makes: they are numbered as they are asked for."""
        row = self._rows[str(path)]
        if self._number[row] < 0:
            self._number[row] = len(self._order)
            self._order.append(row)
        return self._number[row]

    def __len__(self) -> int:
        return len(self._order)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The numbered images, in order."""
        paths = list(self._rows)
        for rows in _chunks(self._order, _ROWS):
            columns = [
                [paths[row].removeprefix(self._base) for row in rows],
                [self._size[row] for row in rows],
                [self._mtime[row] for row in rows],
                [bytes(self._hash[_part(row)]) for row in rows],
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            yield pa.record_batch(arrays, schema=SCHEMA)

    def _is_fresh(self, path: Path) -> bool:
        row = self._rows.get(str(path))
        return row is not None and bool(self._looked_at[row])

    def _known(self, path: Path) -> Stamp | None:
        row = self._rows.get(str(path))
        return None if row is None else Stamp(self._size[row], self._mtime[row])


_Result = tuple[Stamp, bytes | None]


def _examine(images: Sequence[tuple[Path, Stamp | None]]) -> list[tuple[Path, _Result | str]]:
    """(stamp, hash) of each image, no hash where the stamp is the known one; a text: why it cannot be read."""
    results: list[tuple[Path, _Result | str]] = []
    for path, known in images:
        try:
            found = stamp(path)
            digest = None if found == known else bytes.fromhex(hash_image(path))
            if digest is not None and stamp(path) != found:
                raise DataError(f"{path}: changed while it was read. Run the command again.")
            results.append((path, (found, digest)))
        except OSError as error:
            results.append((path, f"{path}: cannot be read: {error}"))
        except DataError as error:
            results.append((path, str(error)))
    return results


def changed_images(root: Path, batches: Iterable[pa.RecordBatch]) -> int:
    """How many images of an index are gone or have another size or time of change; no image is read."""
    base, count = os.path.realpath(root), 0
    with ThreadPoolExecutor(READERS) as pool:
        for batch in batches:
            rows = zip(*(batch.column(name).to_pylist() for name in ("path", "size", "mtime_ns")), strict=True)
            known = [(os.path.join(base, path), Stamp(size, mtime)) for path, size, mtime in rows]
            count += sum(pool.map(_count_changed, _chunks(known, 1024)))
    return count


def _count_changed(images: Sequence[tuple[str, Stamp]]) -> int:
    return sum(not _is_same(path, known) for path, known in images)


def _is_same(path: str, known: Stamp) -> bool:
    try:
        return stamp(path) == known
    except OSError:
        return False


def _part(row: int) -> slice:
    return slice(_HASH_BYTES * row, _HASH_BYTES * (row + 1))


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
