"""Reading a store: the records of one kind by sample_id, every byte checked before it is returned."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from pipeline.errors import StoreError
from pipeline.targets.container.folders import Folder, folder_at
from pipeline.targets.container.manifest import (
    Identity,
    identity_digest,
    kinds_of,
    read_identity,
    read_parts,
    refuse_differences,
)
from pipeline.targets.container.sealed import DamagedError
from pipeline.targets.container.shards import (
    Bytes,
    Commit,
    Kind,
    ShardIndex,
    check_shard,
    committed_shards,
    open_shards,
)

_REBUILD = "`clkd teacher RECIPE.yaml` rebuilds the shards that are missing or damaged"
DISCARD = "`clkd store verify RECIPE.yaml --discard` drops what is damaged, then `clkd teacher RECIPE.yaml` rebuilds it"


class StoreReader:
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
            expected_identity: what this run would make (`identity.expected_identity`); None takes any.

        Raises:
            StoreError: no store; another identity (every differing field with both values); a damaged shard.
        """
        folder = folder_at(url)
        identity = read_identity(folder)
        if expected_identity is not None:
            refuse_differences(folder, identity, expected_identity)
        shards, problems = open_shards(folder, cls.kind, identity_digest(identity))
        if problems:
            shown = "\n  ".join(problems[:5])
            raise DamagedError(f"{folder}: {len(problems)} damaged shard(s), nothing was read.\n  {shown}\n{_REBUILD}.")
        return cls(folder, identity, list(shards.values()))

    def read_record(self, sample_id: str) -> tuple[Bytes, int]:
        """A sample's bytes u8, checked and not decoded, and its rows.

        Raises:
            StoreError: the sample is not in the store, or its bytes do not match their checksum.
        """
        if sample_id not in self._where:
            raise StoreError(f"{self.folder}: no soft targets for sample {sample_id}; {_REBUILD}")
        number, place = self._where[sample_id]
        try:
            return self._shards[number].read(place)
        except DamagedError as error:
            raise DamagedError(f"{error}. {DISCARD}.") from None

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._where

    @property
    def sample_ids(self) -> list[str]:
        """All sample ids, in shard order."""
        return list(self._where)

    @property
    def commits(self) -> list[Commit]:
        """Commits in shard order."""
        return [shard.commit for shard in self._shards]

    @property
    def shard_members(self) -> list[tuple[int, tuple[str, ...]]]:
        """(shard number, sample ids) in shard order."""
        return [(shard.commit.shard, shard.sample_ids) for shard in self._shards]

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


def damaged_shards(url: str | Path) -> dict[tuple[int, Kind], str]:
    """What is wrong with which file, after reading every byte. Works on stores that refuse to open.

    Raises:
        StoreError: there is no store, or its manifest is damaged.
    """
    folder = folder_at(url)
    identity = read_identity(folder)
    read_parts(folder)
    digest, problems = identity_digest(identity), dict[tuple[int, Kind], str]()
    files = [(shard, kind) for kind in kinds_of(identity) for shard in committed_shards(folder, kind)]
    for shard, kind in tqdm(files, desc="verify", unit="file", disable=None):
        try:
            check_shard(folder, shard, kind, digest)
        except DamagedError as error:
            problems[shard, kind] = str(error)
    return problems
