"""An index made from others: their rows, changed, left out or multiplied, and their images.

It is kept in a folder of its own as long as what it was made of stays the same, so that many processes and later runs
map one file.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from pipeline.data.index import images, rows
from pipeline.data.index.build import ABOUT, MAKING, About, tidy_interrupted
from pipeline.data.index.lock import Holder, held
from pipeline.data.index.samples import Index
from pipeline.data.index.tables import Buckets, Ordered, put_table, write_table
from pipeline.errors import DataError
from pipeline.files import write_json

Row = dict[str, Any]
Change = Callable[[Row], Iterable[Row] | str]
"""The rows in the place of one, by `rows.COLUMNS`; or why it is left out, in a word or two."""


def open_derived(folder: Path, bases: Sequence[Index], identity: dict[str, Any], change: Change, what: str) -> Index:
    """The index in this folder, made first if there is none of this origin.

    Args:
        bases: of one data root; of rows with one id the first counts.
        identity: JSON values that say all that `change` depends on; the bases' tables are added to it.
        what: is made, for the progress bar.

    Raises:
        DataError: the folder cannot be written.
        UserError: another process seems to make the index and does not go on.
    """
    wanted = identity | {
        "version": rows.FORMAT_VERSION,
        "bases": [[base.about.rows, base.about.image_table] for base in bases],
    }
    about = About.read(folder)
    if about is None or about.identity != wanted:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            about = _brought_up_to_date(folder, bases, wanted, change, what)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written: {error}. Nothing was started.") from None
    return Index(bases[0].root, folder, about)


def _brought_up_to_date(
    folder: Path, bases: Sequence[Index], wanted: dict[str, Any], change: Change, what: str
) -> About:
    with held(folder) as holder:
        before = About.read(folder)
        if before is not None and before.identity == wanted:  # another process has just made it
            return before
        if holder.alone:
            tidy_interrupted(folder)
        about = _make(folder, bases, wanted, change, tqdm(desc=what, unit=" samples", disable=None), holder)
        _tidy(folder, about, before)
        return about


def _make(
    folder: Path, bases: Sequence[Index], identity: dict[str, Any], change: Change, bar: "tqdm[Any]", holder: Holder
) -> About:
    left_out: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix=MAKING, dir=folder) as work, bar:
        buckets, ordered = Buckets(Path(work)), Ordered()
        for row in _seen(bar, holder, _rows_of(bases)):
            made = change(row)
            if isinstance(made, str):
                left_out[made] += 1
            else:
                buckets.add(tuple(each[name] for name in rows.COLUMNS) for each in made)
        samples_path, images_path = Path(work) / "samples", Path(work) / "images"
        write_table(samples_path, rows.SCHEMA, ordered.batches(buckets.tables()))
        write_table(images_path, images.SCHEMA, _images_of(bases))
        names = put_table(samples_path, folder, "samples"), put_table(images_path, folder, "images")
    about = About(
        identity=identity,
        files="",
        samples=ordered.count,
        images=sum(base.about.images for base in bases),
        fingerprint=ordered.fingerprint,
        duplicates=buckets.count - ordered.count,
        problems=0,
        bad_records=0,
        rows=names[0],
        image_table=names[1],
        bytes={name: (folder / name).stat().st_size for name in names},
        left_out=dict(left_out),
    )
    write_json(folder / ABOUT, asdict(about))
    return about


def _seen(bar: "tqdm[Any]", holder: Holder, given: Iterable[Row]) -> Iterator[Row]:
    """The rows, each a sign of life."""
    for row in given:
        holder.alive()
        bar.update()
        yield row


def _rows_of(bases: Sequence[Index]) -> Iterator[Row]:
    """All rows; images are numbered through all bases."""
    first = 0
    for base in bases:
        for row in base.rows():
            yield row | {"images": [first + number for number in row["images"]]}
        first += sum(len(columns["path"]) for columns in base.image_batches())


def _images_of(bases: Sequence[Index]) -> Iterator[pa.RecordBatch]:
    for base in bases:
        for columns in base.image_batches():
            yield pa.record_batch([columns[name] for name in images.SCHEMA.names], schema=images.SCHEMA)


def _tidy(folder: Path, about: About, before: About | None) -> None:
    """Remove tables that are older than the ones before."""
    kept = {name for each in (about, before) if each is not None for name in (each.rows, each.image_table)}
    for path in folder.glob("*.arrow"):
        if path.name not in kept:
            path.unlink(missing_ok=True)
