"""Adding shards to a store: which ones to write, writing one, and which ones are whole."""

import time
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.targets.container.folders import folder_at
from pipeline.targets.container.manifest import (
    MANIFEST,
    Identity,
    create_manifest,
    identity_digest,
    kinds_of,
    part_name,
    planned_shards,
    read_parts,
)
from pipeline.targets.container.sealed import DamagedError, sealed_json
from pipeline.targets.container.shards import (
    Bytes,
    Commit,
    Kind,
    commit_name,
    committed_shards,
    open_shard,
    open_shards,
    shard_name,
    write_shard,
)

UNSEEN_S = 120.0
"""Seconds in which what another worker wrote must be seen: network file systems keep lists of names for a minute."""
_LOOK_S = 0.05


class StoreWriter:
    """Adds shards to a store. Any number of processes may write different shards at once."""

    def __init__(self, url: str | Path, identity: Identity) -> None:
        """Create the store's manifest, or check that the one on disk says the same.

        Raises:
            StoreError: the store was made for another identity; nothing was changed.
        """
        self.folder, self.identity = folder_at(url), identity
        self.kinds = kinds_of(identity)
        self._digest = identity_digest(identity)
        create_manifest(self.folder, identity)

    def plan(
        self, sample_ids: Sequence[str], shard_samples: int, dataset: str, whole: Collection[int] | None = None
    ) -> dict[int, list[str]]:
        """Shards that hold these samples, committed or not: number -> sample ids in order.

        Samples that are in no shard's plan yet get new shards, in their order: a part is added to the store. Workers
        that plan the same samples at the same time agree. A shard that is not whole and holds other samples too is left
        out: only a run that has those samples as well can write it.

        Args:
            dataset: fingerprint of the data set that the samples come from; kept in the part, for messages.
            whole: shards that `committed` has found whole; None: looks again.

        Raises:
            StoreError: another worker's part stays invisible for `UNSEEN_S`, or a part is damaged.
        """
        available, whole = set(sample_ids), self.committed()[0] if whole is None else whole
        began = time.monotonic()
        while True:
            parts = read_parts(self.folder)
            planned = dict(planned_shards(parts))
            kept = {n: ids for n, ids in planned.items() if n in whole or available.issuperset(ids)}
            held = {sample_id for ids in kept.values() for sample_id in ids}
            new = [sample_id for sample_id in sample_ids if sample_id not in held]
            if not new:
                return {n: ids for n, ids in kept.items() if not available.isdisjoint(ids)}
            taken = {*planned, *(n for kind in self.kinds for n in committed_shards(self.folder, kind))}
            part = {
                "first_shard": max(taken, default=-1) + 1,
                "shard_samples": shard_samples,
                "dataset": dataset,
                "sample_ids": new,
            }
            # When another worker creates this part first, theirs counts: it is read in the next round.
            if self.folder.create(part_name(len(parts)), sealed_json(part)):
                continue
            if time.monotonic() - began > UNSEEN_S:
                raise StoreError(
                    f"{self.folder}: {part_name(len(parts))} is said to be there and cannot be seen, for "
                    f"{UNSEEN_S:g} s now. The file system hides what other machines write; try again later, or set "
                    "targets.store to a folder elsewhere. Nothing was changed."
                )
            time.sleep(_LOOK_S)

    def write_shard(self, shard: int, samples: Sequence[tuple[str, int, Bytes]], kind: Kind) -> Commit:
        """Commit one shard's file of a kind, replacing a damaged one. Atomic against kill -9 and power cuts.

        Args:
            samples: (sample_id, rows, bytes u8).

        Raises:
            StoreError: a repeated or bad sample id, or two processes writing one shard.
        """
        if len({sample_id for sample_id, _, _ in samples}) != len(samples):
            raise StoreError(f"shard {shard}: a sample id occurs twice; nothing was written")
        commit = write_shard(self.folder, shard, kind, samples, self._digest)
        self.folder.tidy({shard_name(shard, kind), commit_name(shard, kind)})
        return commit

    def is_whole(self, shard: int) -> bool:
        """Whether the shard is committed and undamaged now."""
        try:
            for kind in self.kinds:
                open_shard(self.folder, shard, kind, self._digest)
        except DamagedError:
            return False
        return True

    def committed(self) -> tuple[set[int], list[str]]:
        """Shards that are whole, and one line for each file that is damaged and has to be written again."""
        opened = [open_shards(self.folder, kind, self._digest) for kind in self.kinds]
        whole = set.intersection(*(set(shards) for shards, _ in opened))
        files = {name(shard, kind) for shard in whole for kind in self.kinds for name in (shard_name, commit_name)}
        parts = (name for name in self.folder.names() if name.startswith("part-"))
        # A worker killed while writing leaves a temporary file, which nothing else removes once another has written it.
        self.folder.tidy({MANIFEST, *parts, *files})
        return whole, [problem for _, problems in opened for problem in problems]
