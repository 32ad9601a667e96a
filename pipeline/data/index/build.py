"""Making a split's index: one pass over its reader, then the rows in order of their ids.

    index.json                what the index was made of, and the names of its two tables; written last
    samples-<hash>.arrow      a row a sample, ascending by sample_id: `rows.SCHEMA`
    images-<hash>.arrow       a row an image: `images.SCHEMA`
    problems.jsonl            what is wrong with records that were refused or left out
    hashed-<process>.jsonl    image hashes so far, while an index is made
    lock                      held by the process that makes it

Tables are named by their content, and the last one before stays, so that a process that has just read `index.json`
finds what it names.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

import xxhash

from pipeline.data.index import images, rows
from pipeline.data.index.images import ImageHashes, stamp
from pipeline.data.index.tables import Buckets, Ordered, put_table, read_batches, write_table
from pipeline.data.problems import Problems, write_problems
from pipeline.data.readers import no_samples, reader_of
from pipeline.data.readers.source import Source
from pipeline.data.sample import Sample, identified
from pipeline.errors import DataError
from pipeline.files import PACKAGE, write_json
from pipeline.recipe import Recipe

ABOUT, PROBLEMS = "index.json", "problems.jsonl"
MAKING = ".making-"
"""Prefix of the folder of rows that are not in order yet."""
_PASS = 2048
"""Samples whose images are looked at together."""


@dataclass(frozen=True, slots=True)
class Split:
    """One split of a data set, and the folder of its index."""

    format: str
    root: Path
    name: str
    folder: Path
    image_roots: tuple[Path, ...] = ()
    skip: bool = False
    """Leave broken records out."""
    shared: bool = False
    """The folder was named by the user, and may be another run's as well."""

    @classmethod
    def of(cls, recipe: Recipe, name: str) -> Self:
        """The split of this name of a recipe's data set."""
        data, root, folder = recipe.data, recipe.data_root, recipe.index_dir / name
        skip, shared = data.bad_samples == "skip", data.index is not None
        return cls(data.format, root, name, folder, data.image_roots, skip, shared)

    def __str__(self) -> str:
        return f"{self.root}, split {self.name!r}"

    def identity(self) -> dict[str, Any]:
        """What an index depends on besides the files: another reader may read the same files otherwise."""
        code = xxhash.xxh3_64()
        folder = PACKAGE / "data"
        for path in sorted([*(folder / "readers").glob("*.py"), folder / "sample.py", folder / "index" / "rows.py"]):
            code.update(path.read_bytes())
        return {
            "version": rows.FORMAT_VERSION,
            "code": code.hexdigest(),
            "format": self.format,
            "root": os.path.realpath(self.root),
            "split": self.name,
            "image_roots": [os.path.realpath(root) for root in self.image_roots],
        }

    def files(self) -> list[Path]:
        """The annotation files as they are now. DataError when the split is missing."""
        return reader_of(self.format).files(self.root, self.name)


@dataclass(frozen=True, slots=True)
class About:
    """What `index.json` says."""

    identity: dict[str, Any]
    files: str
    """Digest of the annotation files' names, sizes and times of change."""
    samples: int
    images: int
    fingerprint: str
    """Of all sample ids in order, and of the teacher's answers where there are any: `tables.Ordered`."""
    duplicates: int
    """Records that were equal to an earlier one."""
    problems: int
    bad_records: int
    """Records with a problem, left out."""
    rows: str
    """Name of the table of samples."""
    image_table: str
    bytes: dict[str, int]
    """Of the two tables, by name."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Of an index made from others: how many of their samples it lacks, by why."""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None: there is no index, or it is damaged or of another version."""
        try:
            about = cls(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
            whole = all((folder / name).stat().st_size == size for name, size in about.bytes.items())
            return about if whole and about.identity["version"] == rows.FORMAT_VERSION else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


@dataclass(frozen=True, slots=True)
class Made:
    """What making an index took."""

    about: About
    images_read: int
    images_kept: int
    """Not read, since they had not changed."""


Progress = Callable[[int, int], None]
"""Called with (bytes of annotation files read so far, samples so far)."""


def files_digest(files: Iterable[Path]) -> str:
    """Of names, sizes and times of change; nothing is read."""
    digest = xxhash.xxh3_128()
    for path in files:
        try:
            digest.update(f"{path.name}\n{stamp(path)}\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
    return digest.hexdigest()


def make(split: Split, before: About | None, progress: Progress) -> Made:
    """Read the split and put its index in the place of the one before.

    Stopped at any moment, it leaves the index before as it was, and the images read so far are not read again.

    Raises:
        DataError: broken records, if they are not to be left out; they are all named in `problems.jsonl`. No samples.
    """
    files, place = split.files(), rows.Place(split.root)
    digest, source = files_digest(files), Source(split.root, split.name, files, split.image_roots)
    hashes = ImageHashes(split.root)
    journals = _remember(hashes, split.folder, before)
    with tempfile.TemporaryDirectory(prefix=MAKING, dir=split.folder) as work:
        buckets = Buckets(Path(work))
        with (split.folder / f"hashed-{os.uname().nodename}-{os.getpid()}.jsonl").open("a") as journal:
            journals.add(Path(journal.name))
            for samples in _identified(split, source, hashes, journal, progress):
                buckets.add(rows.row_of(s, [hashes.number(i) for i in s.images], place) for s in samples)
        _refuse(split, source.problems, buckets.count)
        ordered = Ordered()
        samples_path, images_path = Path(work) / "samples", Path(work) / "images"
        write_table(samples_path, rows.SCHEMA, ordered.batches(buckets.tables()))
        write_table(images_path, images.SCHEMA, hashes.batches())
        if files_digest(split.files()) != digest:
            raise DataError(f"{split}: changed while it was read. Run the command again.")
        names = put_table(samples_path, split.folder, "samples"), put_table(images_path, split.folder, "images")
        about = About(
            identity=split.identity(),
            files=digest,
            samples=ordered.count,
            images=len(hashes),
            fingerprint=ordered.fingerprint,
            duplicates=buckets.count - ordered.count,
            problems=len(source.problems),
            bad_records=source.problems.records,
            rows=names[0],
            image_table=names[1],
            bytes={name: (split.folder / name).stat().st_size for name in names},
        )
        write_json(split.folder / ABOUT, asdict(about))
    _tidy(split.folder, [about, before], journals)
    return Made(about, hashes.read, hashes.kept)


def _identified(
    split: Split, source: Source, hashes: ImageHashes, journal: IO[str], progress: Progress
) -> Iterator[list[Sample]]:
    """The reader's samples with their ids, some at a time; those whose images cannot be read become problems."""
    stream, count = reader_of(split.format).read(source), 0
    with ThreadPoolExecutor(images.READERS) as pool:
        while samples := list(islice(stream, _PASS)):
            lines, wrong = hashes.look_at((path for sample in samples for path in sample.images), pool)
            journal.writelines(lines)
            journal.flush()
            made = []
            for sample in samples:
                with source.problems.at(sample.meta["record"], "image"):
                    if unread := [wrong[path] for path in sample.images if path in wrong]:
                        raise DataError("; ".join(unread))
                    made.append(identified(sample, [hashes.digest(path) for path in sample.images]))
            count += len(made)
            yield made
            progress(source.done, count)


def _remember(hashes: ImageHashes, folder: Path, before: About | None) -> set[Path]:
    """Take over what was hashed before; returns the journals of interrupted processes."""
    if before is not None:
        hashes.know_table(read_batches(folder / before.image_table))
    journals = set(folder.glob("hashed-*.jsonl"))
    for path in journals:
        hashes.know_journal(path)
    return journals


def _refuse(split: Split, problems: Problems, samples: int) -> None:
    """Write the problems down. DataError when they are not to be left out, or nothing is left."""
    path = split.folder / PROBLEMS
    if problems:
        write_problems(path, problems.found)
    else:
        path.unlink(missing_ok=True)
    if problems and not split.skip:
        raise problems.error(str(split), path)
    if not samples:
        left_out = f" {problems.records} broken record(s) were left out, see {path}." if problems else ""
        raise DataError(no_samples(split.root, split.name) + left_out)


# -- files -------------------------------------------------------------------------------------------------------------


def tidy_interrupted(folder: Path) -> None:
    """Remove what processes left behind that were killed; for whoever holds the lock."""
    for path in folder.glob(f"{MAKING}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _tidy(folder: Path, kept: Sequence[About | None], journals: Iterable[Path]) -> None:
    """Remove the journals, whose hashes are in the table now, and tables that are older than the one before."""
    names = {name for about in kept if about is not None for name in (about.rows, about.image_table)}
    for path in [*folder.glob("samples-*.arrow"), *folder.glob("images-*.arrow")]:
        if path.name not in names:
            path.unlink(missing_ok=True)
    for path in journals:
        path.unlink(missing_ok=True)
