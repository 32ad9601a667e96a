"""The samples of an index, read from disk as they are asked for.

An `Index` is a `Sequence[Sample]` whose tables are memory-mapped: all processes of a machine share them, and each has a
few kilobytes of its own. What needs one column of many samples takes it from here without making the samples; the
functions at the end do the same for any other sequence.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.data.index.build import About
from pipeline.data.index.images import Stamp, stamp
from pipeline.data.index.rows import COLUMNS, CONTENT, ORIGIN, Meta, Place, meta_of, sample_of
from pipeline.data.index.tables import ANSWERS, read_batches
from pipeline.data.sample import POOL, Sample
from pipeline.errors import DataError

Positions = NDArray[np.int64]
Columns = dict[str, Any]
"""Arrow arrays of one batch, by name."""
_RAW_ID = "S16"
_RUN = 1024
"""Rows that are looked at together."""


class _Table:
    """The batches of a table on disk."""

    def __init__(self, path: Path) -> None:
        batches = read_batches(path)
        self.batches: list[Columns] = [{name: batch.column(name) for name in batch.schema.names} for batch in batches]
        self.starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch_of(self, rows: Positions) -> Positions:
        """The number of the batch of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def at(self, row: int) -> tuple[Columns, int]:
        """The batch that holds a row, and the row's place in it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.batches[number], row - int(self.starts[number])


@lru_cache(maxsize=16)
def _table(path: Path, stamp: Stamp) -> _Table:
    """Mapped once a process, until another file has the name."""
    return _Table(path)


class Index(Sequence[Sample]):
    """The samples of a split, ascending by sample_id, or chosen ones. Safe to fork and to pickle."""

    def __init__(self, root: Path, folder: Path, about: About, rows: Positions | None = None) -> None:
        """Open an index; see `splits.open_split`.

        Args:
            root: the data root.
            rows: the rows that it shows, in this order; None: all.

        Raises:
            DataError: the tables cannot be read.
        """
        self._origin = root, folder, about
        self._place, self._rows = Place(root), rows
        paths = folder / about.rows, folder / about.image_table
        try:
            self._samples, self._images = (_table(path, stamp(path)) for path in paths)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{folder}: cannot be read on {os.uname().nodename}: {error}. All nodes must see this folder. If it is "
                "damaged, remove it: it is made again."
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (*self._origin, self._rows)

    def __len__(self) -> int:
        return len(self._samples) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> "Index": ...
    def __getitem__(self, place: int | slice) -> "Sample | Index":
        if isinstance(place, slice):
            return self.select(range(len(self))[place])
        return self._sample(*self._samples.at(self._row(place)))

    def __iter__(self) -> Iterator[Sample]:
        for columns, rows in self._runs():
            for row in rows.tolist():
                yield self._sample(columns, row)

    @property
    def sample_ids(self) -> "SampleIds":
        """The ids in order; none is in memory but while it is used."""
        return SampleIds(self)

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of all ids in order, a line each; then that of the teacher's answers in the whole index, if any."""
        whole = self._origin[2].fingerprint
        if self._rows is None:
            return whole
        digest = xxhash.xxh3_128()
        for sample_id in self.sample_ids:
            digest.update(f"{sample_id}\n")
        return digest.hexdigest() + "".join(whole.partition(ANSWERS)[1:])

    @property
    def about(self) -> About:
        """Of the whole index."""
        return self._origin[2]

    @property
    def root(self) -> Path:
        """The data root."""
        return self._origin[0]

    def select(self, places: Iterable[int] | Positions) -> "Index":
        """The samples at these places, in this order; 8 bytes each."""
        chosen = np.fromiter(places, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"places must lie in [0, {len(self)}), got {chosen.min()} to {chosen.max()}")
        view = object.__new__(Index)  # of the same tables, whose files may have been replaced meanwhile
        view.__dict__ |= self.__dict__ | {"_rows": chosen if self._rows is None else self._rows[chosen]}
        return view

    def places(self, sample_ids: Sequence[str]) -> Positions:
        """Where samples are. KeyError naming one that is not there."""
        # As fixed strings, which numpy compares as bytes: no id is longer than another.
        wanted = np.array([bytes.fromhex(sample_id) for sample_id in sample_ids], _RAW_ID)
        ids = [_view(columns["sample_id"], _RAW_ID) for columns in self._samples.batches]
        number = np.searchsorted(np.array([batch[0] for batch in ids]), wanted, side="right") - 1
        rows = np.full(len(wanted), -1)
        for batch in set(number[number >= 0].tolist()):
            mine = np.flatnonzero(number == batch)
            inside = np.minimum(np.searchsorted(ids[batch], wanted[mine]), len(ids[batch]) - 1)
            found = ids[batch][inside] == wanted[mine]
            rows[mine[found]] = self._samples.starts[batch] + inside[found]
        places = rows if self._rows is None else _find(self._rows, rows)
        if (places < 0).any():
            raise KeyError(sample_ids[int(np.argmin(places))])
        return places

    def words(self, name: Literal["task", "slice"]) -> Iterator[str]:
        """One column of all samples, in order."""
        for columns, rows in self._runs():
            known, codes = columns[name].dictionary.to_pylist(), _view(columns[name].indices, np.int16)
            yield from (known[code] for code in codes[rows])

    def sizes(self, places: Positions) -> tuple[Positions, Positions]:
        """(images, characters of all texts) of the samples at these places."""
        rows = places if self._rows is None else self._rows[places]
        number = self._samples.batch_of(rows)
        images, characters = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for batch in set(number.tolist()):
            columns, mine = self._samples.batches[batch], number == batch
            inside = rows[mine] - self._samples.starts[batch]
            characters[mine] = _view(columns["characters"], np.int32)[inside]
            ends = _view(columns["images"], np.int32, len(columns["images"]) + 1)  # a list's own buffer
            images[mine] = ends[inside + 1] - ends[inside]
        return images, characters

    def unanswered(self) -> Positions:
        """Places of the samples with an empty answer."""
        return np.flatnonzero(~self._truths("answered"))

    def from_pool(self) -> NDArray[np.bool_]:
        """bool[M]: the samples whose records have no answer, in order."""
        return self._truths("pool")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every sample's values by column, see `rows.COLUMNS`: what another index is made from."""
        for columns, places in self._runs():
            for place in places.tolist():
                yield {name: columns[name][place].as_py() for name in COLUMNS}

    def image_batches(self) -> list[Columns]:
        """The table of images, see `images.SCHEMA`; of the whole split."""
        return self._images.batches

    def _truths(self, name: str) -> NDArray[np.bool_]:
        """A column of truth values, in order."""
        found, start = np.empty(len(self), bool), 0
        for columns, rows in self._runs():
            bits = _view(columns[name], np.uint8, -(-len(columns[name]) // 8))
            found[start : start + len(rows)] = bits[rows >> 3] >> (rows & 7) & 1
            start += len(rows)
        return found

    def _row(self, place: int) -> int:
        if not -len(self) <= place < len(self):
            raise IndexError(f"sample {place} of {len(self)}")
        place %= len(self)
        return place if self._rows is None else int(self._rows[place])

    def _sample(self, columns: Columns, row: int) -> Sample:
        values = {name: columns[name][row].as_py() for name in CONTENT}
        paths = []
        for number in values["images"]:
            of_images, place = self._images.at(number)
            paths.append(of_images["path"][place].as_py())
        origin = Meta(lambda: meta_of({name: columns[name][row].as_py() for name in ORIGIN}, self._place))
        return sample_of(values, paths, origin, self._place)

    def _runs(self) -> Iterator[tuple[Columns, Positions]]:
        """(columns of a batch, rows in it) of all samples, in order, at most _RUN at a time."""
        for start in range(0, len(self), _RUN):
            rows = np.arange(start, min(start + _RUN, len(self))) if self._rows is None else self._rows[start:][:_RUN]
            number = self._samples.batch_of(rows)
            for part in np.split(rows, np.flatnonzero(np.diff(number)) + 1):
                batch = int(self._samples.batch_of(part[:1])[0])
                yield self._samples.batches[batch], part - self._samples.starts[batch]


def _view(array: Any, dtype: Any, length: int | None = None) -> NDArray[Any]:
    """The values of a column as they lie on disk. Arrow's own `to_numpy` and `take` load pandas, 30 MB in each rank."""
    return np.frombuffer(array.buffers()[1], dtype)[: len(array) if length is None else length]


def _find(rows: Positions, wanted: Positions) -> Positions:
    """Places in `rows` of those that are wanted; -1 where it is not among them."""
    order = np.argsort(rows)
    places = order[np.minimum(np.searchsorted(rows, wanted, sorter=order), len(rows) - 1)]
    return np.where(rows[places] == wanted, places, -1)


class SampleIds(Sequence[str]):
    """The ids of an index, in order."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        columns, row = self._index._samples.at(self._index._row(place))
        return str(columns["sample_id"][row].as_py().hex())

    def __iter__(self) -> Iterator[str]:
        for columns, rows in self._index._runs():
            text = _view(columns["sample_id"], _RAW_ID)[rows].tobytes().hex()
            yield from (text[start : start + 32] for start in range(0, len(text), 32))


# -- the same for any sequence of samples ------------------------------------------------------------------------------


def sample_ids(samples: Sequence[Sample]) -> Sequence[str]:
    """The ids in order."""
    return samples.sample_ids if isinstance(samples, Index) else [sample.sample_id for sample in samples]


def words(samples: Sequence[Sample], name: Literal["task", "slice"]) -> Iterable[str]:
    """One column in order."""
    return samples.words(name) if isinstance(samples, Index) else [getattr(sample, name) for sample in samples]


def sizes(samples: Sequence[Sample], places: Positions) -> tuple[Positions, Positions]:
    """(images, characters of all texts) of the samples at these places."""
    if isinstance(samples, Index):
        return samples.sizes(places)
    chosen = [samples[i] for i in places]
    characters = np.array([sample.characters for sample in chosen], np.int64)
    return np.array([len(sample.images) for sample in chosen], np.int64), characters


def from_pool(samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """bool[M]: the samples whose records have no answer, in order."""
    if isinstance(samples, Index):
        return samples.from_pool()
    return np.array([sample.source == POOL for sample in samples], bool)


def select(samples: Sequence[Sample], places: Iterable[int]) -> Sequence[Sample]:
    """The samples at these places, in this order."""
    return samples.select(places) if isinstance(samples, Index) else [samples[i] for i in places]
