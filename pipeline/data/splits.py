"""Opening a split of the data set, as every stage does: its index is made where there is none or the data have changed.

    clkd index RECIPE.yaml [--split NAME]

Whether they have is seen by the annotation files' names, sizes and times of change. Images are looked at by
`clkd index` and while an index is made, so that the start of a stage reads none.
"""

import argparse
import contextlib
import errno
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.data.index import build
from pipeline.data.index.build import About, Made, Split
from pipeline.data.index.images import changed_images
from pipeline.data.index.lock import held
from pipeline.data.index.samples import Index
from pipeline.data.index.tables import read_batches
from pipeline.data.readers.source import SplitMissingError
from pipeline.data.sample import Sample
from pipeline.errors import DataError
from pipeline.files import differences, listed
from pipeline.recipe import Recipe

_CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


def open_split(recipe: Recipe, name: str, *, look_at_images: bool = False) -> Index:
    """The samples of a split, ascending by sample_id.

    Args:
        name: `recipe.data.train_split` or another one.
        look_at_images: see whether images have changed, too.

    Raises:
        DataError: the split is missing or empty, or has broken records and `data.bad_samples` refuses them.
        UserError: another process seems to make the index and does not go on.
    """
    split = Split.of(recipe, name)
    about = _current(split, look_at_images)
    if about is None:
        about = _bring_up_to_date(split, look_at_images)
    if about.problems:
        print(f"{split}: {about.bad_records} broken record(s) left out, see {split.folder / build.PROBLEMS}")
    return Index(split.root, split.folder, about)


def open_training_split(recipe: Recipe) -> Index:
    """The samples of the training split, all of which have an answer to learn from.

    Raises:
        DataError: see open_split; or samples have none and `data.bad_samples` refuses them.
    """
    name = recipe.data.train_split
    samples, where = open_split(recipe, name), f"{recipe.data_root}, split {name!r}"
    empty = samples.unanswered()
    if not len(empty):
        return samples
    if recipe.data.bad_samples == "skip" and len(empty) < len(samples):
        print(f"{where}: {len(empty)} sample(s) with an empty answer left out")
        return samples.select(np.setdiff1d(np.arange(len(samples)), empty))
    named, more = named_records(samples, empty)
    raise DataError(
        f"{where}: {len(empty)} of {len(samples)} samples have an empty answer: {named}{more}. Fill in or remove them, "
        "let the teacher answer them with `targets.answers: {}` and `clkd teacher`, or leave them out with "
        "data.bad_samples=skip. Nothing was started."
    )


def named_records(samples: Index, places: NDArray[np.int64]) -> tuple[str, str]:
    """(the records of the first three of these samples, how many more there are), for a message."""
    named = "; ".join(", ".join(filter(None, samples[i].meta.values())) for i in places[:3].tolist())
    return named, f" and {len(places) - 3} more" if len(places) > 3 else ""


def _current(split: Split, look_at_images: bool) -> About | None:
    """What the index is, if it is of the data as they are; a missing split is refused in any case."""
    files, about = split.files(), About.read(split.folder)
    if about is None or about.identity != split.identity() or about.files != build.files_digest(files):
        return None
    if about.problems and (look_at_images or not split.skip):
        return None  # what was wrong may have been a missing image
    if look_at_images and changed_images(split.root, read_batches(split.folder / about.image_table)):
        return None
    return about


def _bring_up_to_date(split: Split, look_at_images: bool) -> About:
    with _writing(split), held(split.folder) as holder:
        about = _current(split, look_at_images)
        if about is not None:  # another process has just made it
            return about
        if holder.alone:
            build.tidy_interrupted(split.folder)
        before, total = About.read(split.folder), sum(path.stat().st_size for path in split.files())
        _refuse_another_data_set(split, before)
        with tqdm(total=total, desc=f"index {split.name}", unit="B", unit_scale=True, disable=None) as bar:

            def progress(done: int, samples: int) -> None:
                holder.alive()
                bar.set_postfix_str(f"{samples:,} samples", refresh=False)
                bar.update(done - bar.n)

            made = build.make(split, before, progress)
    print(f"{split}: {_words(split, made, before)}")
    return made.about


@contextlib.contextmanager
def _writing(split: Split) -> Iterator[None]:
    """With the folder there; DataError when it cannot be written."""
    try:
        split.folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE and split.folder.is_dir():
            raise
        raise DataError(
            f"{split.folder}: the index cannot be written: {error}. Let data.index name a folder that can be written. "
            "Nothing was started."
        ) from None


def _refuse_another_data_set(split: Split, before: About | None) -> None:
    """Two runs that share a folder by mistake would make each other's index anew, over and over."""
    wanted = {key: value for key, value in split.identity().items() if key in ("format", "root")}
    if split.shared and before is not None and (differs := differences(before.identity, wanted, ("index", "recipe"))):
        raise DataError(
            f"{split.folder}: holds the index of another data set.{listed(differs)}\n"
            "Let data.index name another folder, or remove this one. Nothing was changed."
        )


def _words(split: Split, made: Made, before: About | None) -> str:
    """What was made, and what has changed since the index before."""
    about = made.about
    text = f"{about.samples:,} samples of {about.images:,} images, {made.images_read:,} of them read"
    text += f"; {about.duplicates:,} duplicate(s) left out" if about.duplicates else ""
    if before is None:
        return f"index made: {text}"
    added, removed, changed = compared(*(Index(split.root, split.folder, a) for a in (before, about)))
    return f"index brought up to date: {added:,} added, {removed:,} removed, {changed:,} changed; now {text}"


def compared(before: Index, now: Index) -> tuple[int, int, int]:
    """How many samples were added, removed, and changed in their place: the same record with other content.

    A record is known by its file and its id, or the part of it; by its line where it has no id.
    """
    old, new = (np.array(list(index.sample_ids), "S32") for index in (before, now))
    gone, came = (np.flatnonzero(~np.isin(a, b, assume_unique=True)) for a, b in ((old, new), (new, old)))
    records = [{_record(index[i]) for i in which.tolist()} for index, which in ((before, gone), (now, came))]
    changed = len(records[0] & records[1])
    return len(came) - changed, len(gone) - changed, changed


def _record(sample: Sample) -> tuple[str, ...]:
    record, *rest = sample.meta.values()
    return (re.sub(r":\d+$", "", record) if any(rest) else record, *rest)


def main(recipe: Recipe, options: argparse.Namespace) -> None:
    """The stage `index`: all splits that are there, their images looked at."""
    data, refused = recipe.data, list[str]()
    pool = [data.pool_split] if data.pool_split else []
    for name in options.split or dict.fromkeys([data.train_split, *pool, data.val_split, data.test_split]):
        try:
            index = open_split(recipe, name, look_at_images=True)
        except SplitMissingError as error:
            if options.split or name in (data.train_split, data.pool_split):
                refused.append(str(error))
            else:
                print(f"{recipe.data_root}, split {name!r}: is not there")
        except DataError as error:
            refused.append(str(error))
        else:
            counts = [f"{task} {slice_name} {count:,}" for (task, slice_name), count in _counts(index)]
            print(f"{Split.of(recipe, name).folder}: up to date, {len(index):,} samples: {', '.join(counts)}")
    if refused:
        raise DataError("\n".join(refused))


def _counts(index: Index) -> list[tuple[tuple[str, str], int]]:
    return sorted(Counter(zip(index.words("task"), index.words("slice"), strict=True)).items())
