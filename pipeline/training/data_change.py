"""Which samples a job's checkpoints are of, and what has changed when the job goes on with others.

A checkpoint says number and fingerprint of its samples. Their ids, 16 bytes each, are kept once for all checkpoints of
the same data, in `jobs/NAME/samples/FINGERPRINT.ids`: only a job whose data have changed reads them, mapped from disk.
Shapes: M samples that the job trains on now, B samples of the checkpoint, held-out ones included; ids ascending.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.index.samples import sample_ids
from pipeline.data.index.tables import ANSWERS
from pipeline.data.sample import Sample
from pipeline.errors import CheckpointError
from pipeline.files import replacing
from pipeline.training.process import from_first_rank

RawIds = NDArray[np.bytes_]
Indices = NDArray[np.int64]
FOLDER, SUFFIX = "samples", ".ids"
NAMED = 3
"""Samples of each kind that a message names."""
_RAW, _BYTES = "S16", 16
_ROWS = 1 << 18
"""Ids that are looked at together."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The training split as it is now."""

    samples: Sequence[Sample]
    """All of them, those held out too."""
    fingerprint: str
    """Of their ids in order, and of the teacher's answers; see `tables.Ordered`."""

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint's JSON."""
        return {"fingerprint": self.fingerprint, "count": len(self.samples)}

    def keep_ids(self, job_dir: Path) -> None:
        """Write the ids down, unless they are there. Collective.

        Raises:
            CheckpointError: they could not be written.
        """
        from_first_rank(lambda: self._keep_ids(_path(job_dir, self.fingerprint)))

    def _keep_ids(self, path: Path) -> None:
        if path.is_file():
            return
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                for block in raw_ids(sample_ids(self.samples)):
                    file.write(block.tobytes())
        except OSError as error:
            raise CheckpointError(
                f"{path}: could not be written: {error}. The previous checkpoint is still valid."
            ) from None


# -- what has changed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DataChange:
    """The samples of now against those of a checkpoint."""

    place_M: Indices
    """Where each was among the B; -1: it was not there."""
    removed: Indices
    """Places of those that are no longer there; ascending."""
    before_B: RawIds

    @property
    def added(self) -> int:
        """Samples that were not there."""
        return int((self.place_M < 0).sum())

    def lines(self, samples: Sequence[Sample]) -> list[str]:
        """What a refusal says. `samples`: the M."""
        before = len(self.before_B)
        now = before + self.added - len(self.removed)
        counts = f"{self.added:,} added, {len(self.removed):,} removed"
        if not self.added and not len(self.removed):
            lines = [f"samples: the {now:,} of the checkpoint, but the teacher's answers to the pool are others"]
        elif now == before:
            lines = [f"samples: as many as in the checkpoint ({now:,}), but {self.added:,} are others ({counts})"]
        else:
            lines = [f"samples: checkpoint {before:,}, now {now:,} ({counts})"]
        new = [samples[int(i)] for i in np.flatnonzero(self.place_M < 0)[:NAMED]]
        named = [f"{', '.join(filter(None, map(str, s.meta.values())))} ({s.sample_id})" for s in new]
        gone = [_text(self.before_B[place]) for place in self.removed[:NAMED]]
        return lines + _examples("added", named, self.added) + _examples("removed", gone, len(self.removed))

    def record(self) -> dict[str, Any]:
        """What is kept of it, as of a changed setting."""
        before, gone = len(self.before_B), len(self.removed)
        now = before + self.added - gone
        if not self.added and not gone:
            return {"setting": "the teacher's answers", "before": "as in the checkpoint", "after": "others"}
        return {"setting": "samples", "before": before, "after": now, "added": self.added, "removed": gone}

    def place_in_table(self, held_out: Sequence[str]) -> Indices:
        """Where each of the M was in the checkpoint's table, which lacks what was held out then; -1: it was not there.

        Args:
            held_out: ids that the checkpoint's job held out.
        """
        if not held_out:
            return self.place_M
        held = find([_raw(sorted(held_out))], self.before_B, len(held_out))
        trained = ~np.isin(self.place_M, held)
        return np.where(trained & (self.place_M >= 0), self.place_M - np.searchsorted(held, self.place_M), -1)


def change(
    job_dir: Path, saved: Mapping[str, Any] | None, data: TrainingData, samples: Sequence[Sample], held: Sequence[str]
) -> DataChange | None:
    """What has changed since a checkpoint; None: nothing. Collective.

    Args:
        saved: what the checkpoint says of its samples.
        samples: those that the job trains on now.
        held: ids of the rest, which the checkpoint has as well.

    Raises:
        CheckpointError: the checkpoint does not say, or its ids are missing or damaged.
    """
    if saved is None:
        raise CheckpointError(
            f"{job_dir}: the checkpoint does not say which samples it is of: an older version wrote it. Train under "
            "another job name. Nothing was changed."
        )
    if saved["fingerprint"] == data.fingerprint:
        return None
    path = _path(job_dir, saved["fingerprint"])
    from_first_rank(lambda: _verify(path, saved["fingerprint"], saved["count"]))
    before_B: RawIds = np.memmap(path, _RAW, "r")
    place_M = find(raw_ids(sample_ids(samples)), before_B, len(samples))
    gone_B = np.ones(len(before_B), bool)
    for start in range(0, len(place_M), _ROWS):
        block = place_M[start : start + _ROWS]
        gone_B[block[block >= 0]] = False
    gone_B[find([_raw(sorted(held))], before_B, len(held))] = False
    return DataChange(place_M, np.flatnonzero(gone_B), before_B)


def find(blocks: Iterator[RawIds] | Sequence[RawIds], among: RawIds, count: int) -> Indices:
    """The place of each of `count` ids, which come in blocks, among ascending ones; -1: it is not there."""
    places, start = np.empty(count, np.int64), 0
    for block in blocks:
        near = np.minimum(np.searchsorted(among, block), len(among) - 1)
        places[start : start + len(block)] = np.where(among[near] == block, near, -1)
        start += len(block)
    return places


# -- ids as bytes ------------------------------------------------------------------------------------------------------


def raw_ids(ids: Sequence[str]) -> Iterator[RawIds]:
    """Sample ids as 16 bytes each, in blocks. No id is longer than another, so they compare as their texts do."""
    rest = iter(ids)
    while block := list(islice(rest, _ROWS)):
        yield _raw(block)


def _raw(ids: Sequence[str]) -> RawIds:
    return np.frombuffer(bytes.fromhex("".join(ids)), _RAW)


def _text(raw: bytes) -> str:
    return raw.ljust(_BYTES, b"\0").hex()  # numpy takes zeros at the end away


def _path(job_dir: Path, fingerprint: str) -> Path:
    return job_dir / FOLDER / f"{_of_ids(fingerprint)}{SUFFIX}"


def _of_ids(fingerprint: str) -> str:
    """Without the part that is of the teacher's answers."""
    return fingerprint.partition(ANSWERS)[0]


def _verify(path: Path, fingerprint: str, count: int) -> None:
    """CheckpointError unless a file holds the ids of this fingerprint."""
    way_out = (
        "So it cannot be told which samples have changed. Restore the data that the job was trained on, or train under "
        "another job name. Nothing was changed."
    )
    try:
        if path.stat().st_size != count * _BYTES:
            raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes, not {count * _BYTES}. {way_out}")
        digest = xxhash.xxh3_128()
        with path.open("rb") as file:
            while block := file.read(_ROWS * _BYTES):
                digest.update(block.hex("\n", _BYTES) + "\n")  # as `dataset_fingerprint`: a line each
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. {way_out}") from None
    if digest.hexdigest() != _of_ids(fingerprint):
        raise CheckpointError(f"{path}: damaged: its ids are not those of its name. {way_out}")


def _examples(kind: str, named: Sequence[str], count: int) -> list[str]:
    more = f" and {count - len(named):,} more" if count > len(named) else ""
    return [f"{kind}: {'; '.join(named)}{more}"] if named else []
