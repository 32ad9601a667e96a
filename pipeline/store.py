"""The soft-target store: shards of records keyed by sample_id, bound to everything that made them.

`manifest.json` holds the identity (what changes a stored number) and the layout (which sample is in which
shard); `shards.py` describes a shard. Every byte is checked before a number made from it is returned.

    python -m pipeline.store {verify,inspect,stats} --config RECIPE.yaml
"""

import argparse
import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from tqdm import tqdm

from pipeline.codecs import CODECS, Bytes, spec_of
from pipeline.command_line import parse_args
from pipeline.config import Recipe
from pipeline.errors import StoreError, run_main
from pipeline.processor import Processor
from pipeline.shards import (
    CommitRecord,
    ShardDamagedError,
    ShardIndex,
    check_shard,
    clear_leftovers,
    open_shard,
    read_record,
    record_path,
    recorded_shards,
    sealed_json,
    unsealed_json,
    write_atomic,
    write_shard,
)
from pipeline.targets import SoftTargets

Identity = dict[str, Any]
"""JSON scalars by name; equality is the reuse test. Holds at least what `codecs.identity_of` gives."""

REBUILD = "`python -m pipeline.teacher --config RECIPE.yaml` rebuilds the shards that are missing or damaged"
START_AGAIN = "Delete the folder and run `python -m pipeline.teacher --config RECIPE.yaml` again."
DISCARD = (
    "`python -m pipeline.store verify --discard --config RECIPE.yaml` drops what is damaged, then "
    "`python -m pipeline.teacher --config RECIPE.yaml` rebuilds it"
)


class StoreWriter:
    """Adds shards to a store. Any number of processes may write different shards at once."""

    def __init__(self, root: Path, identity: Identity, *, num_samples: int, shard_samples: int) -> None:
        """Create the store's manifest, or check that the one on disk says the same.

        Raises:
            StoreError: the store was made for another identity or layout; nothing was changed.
        """
        self.root, self.identity = root, identity
        layout = {"num_samples": num_samples, "shard_samples": shard_samples}
        if not _manifest_path(root).exists():
            root.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another worker was first
                write_atomic(_manifest_path(root), sealed_json({"identity": identity, "layout": layout}))
        manifest = _read_manifest(root)  # read back, for the same reason
        clear_leftovers(_manifest_path(root))
        _refuse_differences(root, "identity", manifest["identity"], identity)
        _refuse_differences(root, "layout", manifest["layout"], layout)

    def write_shard(self, shard: int, samples: Sequence[tuple[str, SoftTargets]]) -> CommitRecord:
        """Encode and commit one shard, replacing a damaged one. Atomic against kill -9 and power cuts.

        Raises:
            StoreError: targets that the codec refuses, a repeated sample id, or two processes writing one shard.
        """
        if len({sample_id for sample_id, _ in samples}) != len(samples):
            raise StoreError(f"shard {shard}: a sample id occurs twice; nothing was written")
        return write_shard(
            self.root,
            shard,
            [(sample_id, len(targets), self._encode(sample_id, targets)) for sample_id, targets in samples],
            identity=identity_digest(self.identity),
            codec=self.identity["codec"],
        )

    def _encode(self, sample_id: str, targets: SoftTargets) -> Bytes:
        try:
            return CODECS[self.identity["codec"]].encode(targets, spec_of(self.identity))
        except StoreError as error:
            raise StoreError(f"sample {sample_id}: {error}") from None

    def is_whole(self, shard: int) -> bool:
        """Whether the shard is committed and undamaged now."""
        try:
            _check_origin(open_shard(self.root, shard).record, self.root, identity_digest(self.identity))
        except StoreError:
            return False
        return True

    def committed(self) -> tuple[set[int], list[str]]:
        """Shards that are whole, and one line for each that is damaged and has to be written again."""
        shards, problems = _open_shards(self.root, self.identity)
        for shard in shards.values():
            clear_leftovers(shard.path)  # of a run that was killed right after its commit
        return set(shards), problems


class SoftTargetStore:
    """Random access to soft targets by sample_id. Holds no open files: safe to fork and pickle."""

    def __init__(self, root: Path, identity: Identity, shards: Sequence[ShardIndex]) -> None:
        """Index shards that were opened before; use `SoftTargetStore.open`."""
        self.root, self.identity = root, identity
        self._codec, self._spec = identity["codec"], spec_of(identity)
        self._shards = tuple(shards)
        self._where = {
            sample_id: (number, row)
            for number, shard in enumerate(self._shards)
            for row, sample_id in enumerate(shard.sample_ids)
        }
        if len(self._where) != sum(len(shard.sample_ids) for shard in self._shards):
            raise StoreError(f"{root}: the same sample is in two shards. {START_AGAIN}")

    @classmethod
    def open(cls, root: Path, expected_identity: Mapping[str, Any] | None) -> "SoftTargetStore":
        """Open a store and check its index, not yet its records.

        Args:
            expected_identity: what this run would make (`teacher.expected_identity`); None takes any.

        Raises:
            StoreError: no store; another identity (every differing field with both values); a damaged shard.
        """
        root = Path(root)
        identity = dict(_read_manifest(root)["identity"])
        if expected_identity is not None:
            _refuse_differences(root, "identity", identity, expected_identity)
        if identity["codec"] not in CODECS:
            raise StoreError(f"{root}: unknown codec {identity['codec']!r}; known here: {sorted(CODECS)}")
        shards, problems = _open_shards(root, identity)
        if problems:
            shown = "\n  ".join(problems[:5])
            raise ShardDamagedError(
                f"{root}: {len(problems)} damaged shard(s), nothing was read.\n  {shown}\n{REBUILD}."
            )
        return cls(root, identity, list(shards.values()))

    def read(self, sample_id: str) -> SoftTargets:
        """A sample's targets, one row per answer token.

        Raises:
            StoreError: the sample is not in the store, or its bytes do not match their checksum.
        """
        raw, tokens = self.read_packed(sample_id)
        return CODECS[self._codec].decode(raw, tokens, self._spec)

    def read_packed(self, sample_id: str) -> tuple[Bytes, int]:
        """A sample's bytes u8, checked and not decoded, and its answer tokens. Raises StoreError as `read`."""
        if sample_id not in self._where:
            raise StoreError(f"{self.root}: no soft targets for sample {sample_id}; {REBUILD}")
        number, row = self._where[sample_id]
        try:
            return self._shards[number].read(row)
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

    def missing(self, sample_ids: Iterable[str]) -> list[str]:
        """Those of the samples that the store lacks, in order."""
        return [sample_id for sample_id in sample_ids if sample_id not in self._where]

    def verify(self) -> list[str]:
        """Read every byte again; one line per damaged shard."""
        return list(damaged_shards(self.root).values())


def damaged_shards(root: Path) -> dict[int, str]:
    """What is wrong, by shard number, after reading every byte. Works on stores that refuse to open.

    Raises:
        StoreError: there is no store, or its manifest is damaged.
    """
    digest = identity_digest(_read_manifest(root)["identity"])
    problems: dict[int, str] = {}
    for shard in tqdm(recorded_shards(root), desc="verify", unit="shard", disable=None):
        try:
            check_shard(root, shard)
            _check_origin(read_record(root, shard), root, digest)
        except ShardDamagedError as error:
            problems[shard] = str(error)
    return problems


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Short form of an identity that every commit record carries."""
    return xxhash.xxh3_128_hexdigest(json.dumps(dict(identity), sort_keys=True))


def _manifest_path(root: Path) -> Path:
    return root / "manifest.json"


def _read_manifest(root: Path) -> dict[str, Any]:
    path = _manifest_path(root)
    if not path.is_file():
        raise StoreError(f"{root}: no soft-target store; `python -m pipeline.teacher --config RECIPE.yaml` makes it")
    try:
        return unsealed_json(path)
    except ShardDamagedError as error:
        raise StoreError(f"{error}. {START_AGAIN}") from None


def _open_shards(root: Path, identity: Identity) -> tuple[dict[int, ShardIndex], list[str]]:
    """(whole shards by number, one line per damaged one)"""
    digest, shards, problems = identity_digest(identity), {}, []
    for number in recorded_shards(root):
        try:
            shard = open_shard(root, number)
            _check_origin(shard.record, root, digest)
            shards[number] = shard
        except ShardDamagedError as error:
            problems.append(str(error))
    return shards, problems


def _check_origin(record: CommitRecord, root: Path, digest: str) -> None:
    if record.identity != digest:
        path = record_path(root, record.shard)
        raise ShardDamagedError(f"{path}: was made for another identity than the store's manifest says")


def _refuse_differences(root: Path, what: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    keys = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if keys:
        lines = "\n  ".join(f"{k}: store {stored.get(k)!r}, this run {wanted.get(k)!r}" for k in keys)
        raise StoreError(
            f"{root}: the soft-target store was made with another {what}.\n  {lines}\n"
            "Set targets.store to another folder (or delete this one), then run "
            "`python -m pipeline.teacher --config RECIPE.yaml`. Nothing was read or changed."
        )


def _verify(recipe: Recipe, options: argparse.Namespace) -> int:
    problems = damaged_shards(recipe.store_dir)
    for shard, problem in problems.items():
        print(problem)
        if options.discard:
            record_path(recipe.store_dir, shard).unlink(missing_ok=True)
    whole = len(recorded_shards(recipe.store_dir)) - (0 if options.discard else len(problems))
    print(f"{recipe.store_dir}: {whole} shard(s) whole, {len(problems)} damaged")
    if problems:
        print("dropped; the teacher pass rebuilds them" if options.discard else DISCARD)
    return 1 if problems else 0


def _inspect(recipe: Recipe, options: argparse.Namespace) -> int:
    store = SoftTargetStore.open(recipe.store_dir, None)
    for key, value in store.identity.items():
        print(f"{key:22} {value}")
    layout = _read_manifest(store.root)["layout"]
    size, tokens = sum(r.bytes for r in store.records), sum(r.tokens for r in store.records)
    print(f"{len(store.records)} shard(s), {len(store)} of {layout['num_samples']} samples")
    print(f"{tokens} tokens, {size} bytes")
    if not len(store):
        return 0
    sample_id = options.sample or store.sample_ids[0]
    targets = store.read(sample_id)
    names = Processor.load(recipe.processor_dir, recipe.data).tokenizer.convert_ids_to_tokens
    what = "most often drawn first, in % of the draws" if targets.sampled else "most probable first, in %"
    print(f"sample {sample_id}: {len(targets)} answer tokens; {what}")
    for row in range(len(targets)):
        chances = [chance for chance in targets.logprobs[row, :5].exp().mul(100).tolist() if chance > 0]
        pairs = zip(names(targets.ids[row, : len(chances)].tolist()), chances, strict=True)
        tail, entropy = 100 * targets.tail_logprob[row].exp(), targets.entropy[row]
        shown = "  ".join(f"{name!r} {chance:.1f}" for name, chance in pairs)
        print(f"{row:4}  H {entropy:5.2f}  tail {tail:5.2f}  {shown}")
    return 0


def _stats(recipe: Recipe, options: argparse.Namespace) -> int:
    store = SoftTargetStore.open(recipe.store_dir, None)
    tokens, sums = 0, torch.zeros(4, dtype=torch.float64)
    for sample_id in tqdm(store.sample_ids, desc="read", unit="sample", disable=None):
        targets = store.read(sample_id)
        if targets.sampled:
            kept = [targets.logprobs[:, 0].exp(), targets.logprobs.isfinite().sum(dim=1).float()]
        else:
            kept = [targets.logprobs[:, 0].exp(), targets.tail_logprob.exp()]
        sums += torch.stack([targets.entropy, -targets.gold_logprob, *kept]).double().sum(dim=1)
        tokens += len(targets)
    of_kept = (
        ("largest share", "ids drawn") if store.identity["codec"] == "sampled" else ("top-1 probability", "tail mass")
    )
    names = ("entropy (nats)", "cross-entropy (nats)", *of_kept)
    for name, mean in zip(names, (sums / max(tokens, 1)).tolist(), strict=True):
        print(f"{name:22} {mean:.4f}")
    size = sum(record.bytes for record in store.records)
    print(f"{'tokens per sample':22} {tokens / max(len(store), 1):.1f}")
    print(f"{'bytes per token':22} {size / max(tokens, 1):.1f}")
    return 0


_ACTIONS = {"verify": _verify, "inspect": _inspect, "stats": _stats}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 when `verify` finds damage."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.store", description="Look at a soft-target store.")
    parser.add_argument("action", choices=_ACTIONS)
    parser.add_argument("--discard", action="store_true", help="verify: drop damaged shards, to be rebuilt")
    parser.add_argument("--sample", metavar="ID", help="inspect: the sample to show")
    arguments = parse_args("store", argv, parser)
    return _ACTIONS[arguments.options.action](arguments.recipe, arguments.options)


if __name__ == "__main__":
    run_main(main)
