"""A store without its codecs: checked bytes by sample_id, bound to everything that made them.

`manifest.json` holds the identity: what changes a stored number. `part-00000.json` says which samples are in which
shard; data that come later add a part and touch nothing. `shards.py` describes a shard. Every byte is checked before a
number made from it is returned.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import xxhash
from tqdm import tqdm

from pipeline.errors import StoreError
from pipeline.files import differences, listed
from pipeline.targets.container.folders import Folder, folder_at
from pipeline.targets.container.shards import (
    Bytes,
    CommitRecord,
    Kind,
    ShardDamagedError,
    ShardIndex,
    check_shard,
    open_shard,
    record_name,
    recorded_shards,
    sealed_json,
    shard_name,
    unsealed_json,
    write_shard,
)

Identity = dict[str, Any]
"""JSON scalars by name; equality is the reuse test."""

REBUILD = "`clkd teacher RECIPE.yaml` rebuilds the shards that are missing or damaged"
START_AGAIN = "Delete the folder and run `clkd teacher RECIPE.yaml` again."
DISCARD = "`clkd store verify RECIPE.yaml --discard` drops what is damaged, then `clkd teacher RECIPE.yaml` rebuilds it"
_MANIFEST = "manifest.json"
_READERS = 16
"""Shards opened at the same time: an object store answers slowly, but many at once."""


class RecordWriter:
    """Adds shards to a store. Any number of processes may write different shards at once."""

    def __init__(self, url: str | Path, identity: Identity) -> None:
        """Create the store's manifest, or check that the one on disk says the same.

        Raises:
            StoreError: the store was made for another identity; nothing was changed.
        """
        self.folder, self.identity = folder_at(url), identity
        self.kinds = kinds_of(identity)
        if self.folder.size(_MANIFEST) is None:
            self.folder.create(_MANIFEST, sealed_json({"identity": identity}))
        refuse_differences(self.folder, read_identity(self.folder), identity)  # read back: another worker may be first

    def plan(
        self, sample_ids: Sequence[str], shard_samples: int, dataset: str, whole: Collection[int] | None = None
    ) -> dict[int, list[str]]:
        """Shards that hold these samples, committed or not: number -> sample ids in order.

        Samples that no shard will hold yet are spread over new ones, in their order. Workers that plan the same samples
        at the same time agree. A shard that is not whole and holds other samples too is left out: who has those can
        write it.

        Args:
            dataset: fingerprint of the data set that the samples are, for the record.
            whole: shards that `committed` has found whole; None: looks again.
        """
        available, whole = set(sample_ids), self.committed()[0] if whole is None else whole
        while True:
            parts = read_parts(self.folder)
            planned = dict(_numbered(parts))
            kept = {n: ids for n, ids in planned.items() if n in whole or available.issuperset(ids)}
            held = {sample_id for ids in kept.values() for sample_id in ids}
            new = [sample_id for sample_id in sample_ids if sample_id not in held]
            if not new:
                return {n: ids for n, ids in kept.items() if not available.isdisjoint(ids)}
            taken = {*planned, *(n for kind in self.kinds for n in recorded_shards(self.folder, kind))}
            part = {
                "first_shard": max(taken, default=-1) + 1,
                "shard_samples": shard_samples,
                "dataset": dataset,
                "sample_ids": new,
            }
            self.folder.create(_part_name(len(parts)), sealed_json(part))  # when another is first, theirs counts

    def write_shard(self, shard: int, samples: Sequence[tuple[str, int, Bytes]], kind: Kind) -> CommitRecord:
        """Commit one shard's file of a kind, replacing a damaged one. Atomic against kill -9 and power cuts.

        Args:
            samples: (sample_id, rows, bytes u8).

        Raises:
            StoreError: a repeated or bad sample id, or two processes writing one shard.
        """
        if len({sample_id for sample_id, _, _ in samples}) != len(samples):
            raise StoreError(f"shard {shard}: a sample id occurs twice; nothing was written")
        record = write_shard(self.folder, shard, kind, samples, identity_digest(self.identity))
        self.folder.tidy({shard_name(shard, kind), record_name(shard, kind)})
        return record

    def is_whole(self, shard: int) -> bool:
        """Whether the shard is committed and undamaged now."""
        digest = identity_digest(self.identity)
        try:
            for kind in self.kinds:
                _check_origin(open_shard(self.folder, shard, kind).record, self.folder, digest)
        except ShardDamagedError:
            return False
        return True

    def committed(self) -> tuple[set[int], list[str]]:
        """Shards that are whole, and one line for each file that is damaged and has to be written again."""
        opened = [_open_shards(self.folder, self.identity, kind) for kind in self.kinds]
        whole = set.intersection(*(set(shards) for shards, _ in opened))
        files = {name(shard, kind) for shard in whole for kind in self.kinds for name in (shard_name, record_name)}
        parts = (name for name in self.folder.names() if name.startswith("part-"))
        self.folder.tidy({_MANIFEST, *parts, *files})  # of workers that were killed after another had written the file
        return whole, [problem for _, problems in opened for problem in problems]


class RecordStore:
    """Random access to the records of one kind by sample_id. Holds no open files: safe to fork and pickle."""

    kind: Kind = "targets"

    def __init__(self, folder: Folder, identity: Identity, shards: Sequence[ShardIndex]) -> None:
        """Index shards that were opened before; use `open`. Of a sample in two shards the first one counts."""
        self.folder, self.identity = folder, identity
        self._shards = tuple(shards)
        self._where: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(self._shards):
            for place, sample_id in enumerate(shard.sample_ids):
                self._where.setdefault(sample_id, (number, place))

    @classmethod
    def open(cls, url: str | Path, expected_identity: Mapping[str, Any] | None) -> Self:
        """Open a store and check its index, not yet its records.

        Args:
            url: folder or fsspec URL.
            expected_identity: what this run would make (`teacher.expected_identity`); None takes any.

        Raises:
            StoreError: no store; another identity (every differing field with both values); a damaged shard.
        """
        folder = folder_at(url)
        identity = read_identity(folder)
        if expected_identity is not None:
            refuse_differences(folder, identity, expected_identity)
        shards, problems = _open_shards(folder, identity, cls.kind)
        if problems:
            shown = "\n  ".join(problems[:5])
            raise ShardDamagedError(
                f"{folder}: {len(problems)} damaged shard(s), nothing was read.\n  {shown}\n{REBUILD}."
            )
        return cls(folder, identity, list(shards.values()))

    def read_record(self, sample_id: str) -> tuple[Bytes, int]:
        """A sample's bytes u8, checked and not decoded, and its rows.

        Raises:
            StoreError: the sample is not in the store, or its bytes do not match their checksum.
        """
        if sample_id not in self._where:
            raise StoreError(f"{self.folder}: no soft targets for sample {sample_id}; {REBUILD}")
        number, place = self._where[sample_id]
        try:
            return self._shards[number].read(place)
        except ShardDamagedError as error:
            raise ShardDamagedError(f"{error}. {DISCARD}.") from None

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._where

    @property
    def sample_ids(self) -> list[str]:
        """All sample ids, in shard order."""
        return list(self._where)

    @property
    def records(self) -> list[CommitRecord]:
        """Commit records in shard order."""
        return [shard.record for shard in self._shards]

    @property
    def shard_members(self) -> list[tuple[int, tuple[str, ...]]]:
        """(shard number, sample ids) in shard order."""
        return [(shard.record.shard, shard.sample_ids) for shard in self._shards]

    def missing(self, sample_ids: Iterable[str]) -> list[str]:
        """Those of the samples that the store lacks, in order."""
        return [sample_id for sample_id in sample_ids if sample_id not in self._where]

    def require(self, sample_ids: Sequence[str], dataset: str) -> None:
        """StoreError when a sample of the data set has no record; says what the store was made for."""
        missing = self.missing(sample_ids)
        if missing:
            made_for = [part["dataset"] for part in read_parts(self.folder)]
            raise StoreError(
                f"{self.folder}: {len(missing)} of {len(sample_ids)} samples have no soft targets, as {missing[0]}.\n"
                f"  dataset: store {made_for}, this run {dataset!r}\n"
                "`clkd teacher RECIPE.yaml` adds them. Nothing was started."
            )


def kinds_of(identity: Mapping[str, Any]) -> tuple[Kind, ...]:
    """Kinds of files that each shard of a store has."""
    return ("targets", "sketches") if "sketch_layer" in identity else ("targets",)


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Short form of an identity that every commit record carries."""
    return xxhash.xxh3_128_hexdigest(json.dumps(dict(identity), sort_keys=True))


def read_identity(folder: Folder) -> Identity:
    """What the store was made from. StoreError when there is no store, or its manifest is damaged."""
    if folder.size(_MANIFEST) is None:
        raise StoreError(f"{folder}: no soft-target store; `clkd teacher RECIPE.yaml` makes it")
    try:
        return dict(unsealed_json(folder, _MANIFEST)["identity"])
    except ShardDamagedError as error:
        raise StoreError(f"{error}. {START_AGAIN}") from None


def read_parts(folder: Folder) -> list[dict[str, Any]]:
    """The parts in the order they were added. StoreError when one is damaged."""
    count = sum(name.startswith("part-") and name.endswith(".json") for name in folder.names())
    try:
        return [unsealed_json(folder, _part_name(number)) for number in range(count)]
    except ShardDamagedError as error:
        raise StoreError(f"{error}. {START_AGAIN}") from None


def damaged_shards(url: str | Path) -> dict[tuple[int, Kind], str]:
    """What is wrong with which file, after reading every byte. Works on stores that refuse to open.

    Raises:
        StoreError: there is no store, or its manifest is damaged.
    """
    folder = folder_at(url)
    identity = read_identity(folder)
    read_parts(folder)
    problems: dict[tuple[int, Kind], str] = {}
    files = [(shard, kind) for kind in kinds_of(identity) for shard in recorded_shards(folder, kind)]
    for shard, kind in tqdm(files, desc="verify", unit="file", disable=None):
        try:
            _check_origin(check_shard(folder, shard, kind), folder, identity_digest(identity))
        except ShardDamagedError as error:
            problems[shard, kind] = str(error)
    return problems


def refuse_differences(folder: Folder, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """StoreError naming every field of the identity that differs, with both values."""
    if differs := differences(stored, dict.fromkeys(stored) | dict(wanted), ("store", "this run")):
        raise StoreError(
            f"{folder}: the soft-target store was made with another identity.{listed(differs)}\n"
            "Set targets.store to another folder (or delete this one), then run "
            "`clkd teacher RECIPE.yaml`. Nothing was read or changed."
        )


def _open_shards(folder: Folder, identity: Identity, kind: Kind) -> tuple[dict[int, ShardIndex], list[str]]:
    """(whole shards by number, one line per damaged one)"""
    digest, shards, problems = identity_digest(identity), {}, []

    def opened(number: int) -> ShardIndex | str:
        try:
            shard = open_shard(folder, number, kind)
            _check_origin(shard.record, folder, digest)
            return shard
        except ShardDamagedError as error:
            return str(error)

    numbers = recorded_shards(folder, kind)
    with ThreadPoolExecutor(_READERS) as pool:
        for number, found in zip(numbers, pool.map(opened, numbers), strict=True):
            if isinstance(found, str):
                problems.append(found)
            else:
                shards[number] = found
    return shards, problems


def _check_origin(record: CommitRecord, folder: Folder, digest: str) -> None:
    if record.identity != digest:
        name = record_name(record.shard, record.kind)
        raise ShardDamagedError(f"{folder}/{name}: was made for another identity than the store's manifest says")


def _numbered(parts: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, list[str]]]:
    """(shard number, sample ids) of each planned shard"""
    for part in parts:
        ids, size = part["sample_ids"], part["shard_samples"]
        for place, start in enumerate(range(0, len(ids), size)):
            yield part["first_shard"] + place, ids[start : start + size]


def _part_name(number: int) -> str:
    return f"part-{number:05d}.json"
