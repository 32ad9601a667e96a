"""One shard of a store: a safetensors file of each kind, and the commit that makes the file count.

The file holds flat tensors: `rec` u8 (the records, one behind the other), `off` i64[samples + 1] (where each begins in
`rec`), `rows` i64[samples], `crc32c` u32[samples], `sample_id` u8 (UTF-8, one id a line). The commit, a small JSON file
written last, holds sizes, counts and hashes. A shard without a commit does not exist. Bytes outside `rec` are hashed
when a shard is opened, `rec` carries one crc32c a record: no number is returned before its bytes were checked. What
belongs to the same samples but is read apart is another kind, with a file and a commit of its own.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save

from pipeline.errors import StoreError
from pipeline.targets.container.folders import Folder
from pipeline.targets.container.sealed import DamagedError, sealed_json, unsealed_json

FORMAT_VERSION = 3

Bytes = NDArray[np.uint8]
Kind = Literal["targets", "sketches", "answers"]
"""Soft targets (one row per answer token), feature sketches (one row per image cell and answer token), or the teacher's
own answers, of the samples whose records have none (one row per token)."""
_OPENERS = 16
"""Shards opened at the same time: an object store answers slowly, but many at once."""


# -- what a shard is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a shard's file must look like. Written after the file is safely on disk."""

    format_version: int
    kind: Kind
    shard: int
    """Shard number."""
    identity: str
    """Digest of the manifest's identity."""
    samples: int
    rows: int
    bytes: int
    """Size of the file."""
    rec_begin: int
    """File position of the records."""
    rec_end: int
    index_xxh3_64: str
    """Hash of every byte outside the records."""
    xxh3_128: str
    """Hash of the whole file."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where the records of one shard are. Checked against the commit."""

    folder: Folder
    commit: Commit
    sample_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    """i64[samples + 1], positions in `rec`."""
    rows: NDArray[np.int64]
    """i64[samples]"""
    crcs: NDArray[np.uint32]
    """u32[samples]"""

    def read(self, place: int) -> tuple[Bytes, int]:
        """The record of the sample at a place: its bytes u8, and its rows.

        Raises:
            DamagedError: the bytes in the store do not match their checksum.
        """
        first, last = int(self.offsets[place]), int(self.offsets[place + 1])
        begin, name = self.commit.rec_begin, shard_name(self.commit.shard, self.commit.kind)
        raw = _read(self.folder, name, begin + first, begin + last)
        if len(raw) != last - first or crc32c.crc32c(raw) != int(self.crcs[place]):
            sample_id = self.sample_ids[place]
            raise DamagedError(f"{self.folder}/{name}: sample {sample_id} does not match its checksum")
        # frombuffer is read-only, and torch wants memory that it may write to.
        return np.frombuffer(bytearray(raw), np.uint8), int(self.rows[place])


def shard_name(shard: int, kind: Kind) -> str:
    """File of a shard."""
    return f"shard-{shard:05d}.{kind}.safetensors"


def commit_name(shard: int, kind: Kind) -> str:
    """Commit of a shard."""
    return f"shard-{shard:05d}.{kind}.json"


def committed_shards(folder: Folder, kind: Kind) -> list[int]:
    """Numbers of the shards that have a commit, ascending."""
    ending = f".{kind}.json"
    names = [n for n in folder.names() if n.startswith("shard-") and n.endswith(ending)]
    return sorted(int(name.removeprefix("shard-").removesuffix(ending)) for name in names)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_shard(
    folder: Folder, shard: int, kind: Kind, samples: Sequence[tuple[str, int, Bytes]], identity: str
) -> Commit:
    """Write and commit one shard. Killed at any moment it leaves either no shard or the whole of it.

    Args:
        samples: (sample_id, rows, bytes u8); the bytes in the file are a function of these alone.
        identity: digest of the store's identity.

    Raises:
        StoreError: a bad sample id, or another process writes the shard too.
    """
    raw = _shard_bytes(samples)
    begin, end = _rec_span(raw)
    commit = Commit(
        format_version=FORMAT_VERSION,
        kind=kind,
        shard=shard,
        identity=identity,
        samples=len(samples),
        rows=sum(rows for _, rows, _ in samples),
        bytes=len(raw),
        rec_begin=begin,
        rec_end=end,
        index_xxh3_64=xxhash.xxh3_64_hexdigest(raw[:begin] + raw[end:]),
        xxh3_128=xxhash.xxh3_128_hexdigest(raw),
    )
    # The file first, and the commit only when it is safely there: a shard counts by its commit.
    try:
        folder.write(shard_name(shard, kind), raw)
        folder.write(commit_name(shard, kind), sealed_json(asdict(commit)))
    except FileNotFoundError:
        problem = f"{folder}/{shard_name(shard, kind)}: another process writes it too; give each a different --worker"
        raise StoreError(problem) from None
    return commit


# -- opening and checking ----------------------------------------------------------------------------------------------
# Opening reads the index alone, a small part of the file. A record's bytes are checked when it is read.


def open_shard(folder: Folder, shard: int, kind: Kind, identity: str) -> ShardIndex:
    """Read a shard's index, checking its commit, the file's size and every byte outside the records.

    Raises:
        DamagedError: any of these is missing or not as written.
    """
    commit, name = read_commit(folder, shard, kind, identity), shard_name(shard, kind)
    path, size = f"{folder}/{name}", folder.size(name)
    if size is None:
        raise DamagedError(f"{path}: missing, but its commit promises {commit.samples} samples")
    if size != commit.bytes:
        raise DamagedError(f"{path}: {size} bytes, but its commit says {commit.bytes}")
    index = _read(folder, name, 0, commit.rec_begin) + _read(folder, name, commit.rec_end, size)
    if xxhash.xxh3_64_hexdigest(index) != commit.index_xxh3_64:
        raise DamagedError(f"{path}: the index does not match the hash in its commit")
    tensors = _index_tensors(index, commit)
    ids = tensors["sample_id"].tobytes().decode().split("\n") if commit.samples else []
    offsets, rows, crcs = tensors["off"].view("<i8"), tensors["rows"].view("<i8"), tensors["crc32c"].view("<u4")
    return ShardIndex(folder, commit, tuple(ids), offsets, rows, crcs)


def open_shards(folder: Folder, kind: Kind, identity: str) -> tuple[dict[int, ShardIndex], list[str]]:
    """(whole shards by number, one line per damaged one) of all committed shards of a kind.

    Args:
        identity: digest of the store's identity, which every commit must carry.
    """

    def opened(number: int) -> ShardIndex | str:
        try:
            return open_shard(folder, number, kind, identity)
        except DamagedError as error:
            return str(error)

    shards: dict[int, ShardIndex] = {}
    problems = []
    numbers = committed_shards(folder, kind)
    with ThreadPoolExecutor(_OPENERS) as pool:
        for number, found in zip(numbers, pool.map(opened, numbers), strict=True):
            if isinstance(found, str):
                problems.append(found)
            else:
                shards[number] = found
    return shards, problems


def check_shard(folder: Folder, shard: int, kind: Kind, identity: str) -> Commit:
    """Read every byte of a shard and compare it with its commit.

    Raises:
        DamagedError: a difference.
    """
    index, name = open_shard(folder, shard, kind, identity), shard_name(shard, kind)
    if xxhash.xxh3_128_hexdigest(_read(folder, name, 0, index.commit.bytes)) != index.commit.xxh3_128:
        raise DamagedError(f"{folder}/{name}: the file does not match the hash in its commit")
    for place in range(len(index.sample_ids)):
        index.read(place)
    return index.commit


def read_commit(folder: Folder, shard: int, kind: Kind, identity: str) -> Commit:
    """A shard's commit.

    Raises:
        DamagedError: it is not as written, or of another shard, format or identity.
    """
    path, content = f"{folder}/{commit_name(shard, kind)}", unsealed_json(folder, commit_name(shard, kind))
    if content.get("format_version") != FORMAT_VERSION:
        raise DamagedError(f"{path}: format version {content.get('format_version')}, this code reads {FORMAT_VERSION}")
    try:
        commit = Commit(**content)
    except TypeError as error:
        raise DamagedError(f"{path}: not a commit of this version: {error}") from None
    if (commit.shard, commit.kind) != (shard, kind):
        raise DamagedError(f"{path}: describes shard {commit.shard}, {commit.kind}")
    if commit.identity != identity:
        raise DamagedError(f"{path}: was made for another identity than the store's manifest says")
    return commit


# -- the file's bytes --------------------------------------------------------------------------------------------------


def _shard_bytes(samples: Sequence[tuple[str, int, Bytes]]) -> bytes:
    broken = [sample_id for sample_id, _, _ in samples if not sample_id or "\n" in sample_id]
    if broken:
        raise StoreError(f"sample ids must be non-empty and without line breaks, got {broken[:3]}")
    ids = "\n".join(sample_id for sample_id, _, _ in samples).encode()
    tensors: dict[str, NDArray[Any]] = {
        "rec": np.concatenate([np.zeros(0, np.uint8), *(raw for _, _, raw in samples)]),
        "off": np.array([0, *(len(raw) for _, _, raw in samples)], np.int64).cumsum(),
        "rows": np.array([rows for _, rows, _ in samples], np.int64),
        "crc32c": np.array([crc32c.crc32c(np.ascontiguousarray(raw).data) for _, _, raw in samples], np.uint32),
        "sample_id": np.frombuffer(ids, np.uint8),
    }
    return save(tensors)


def _header(raw: bytes) -> tuple[dict[str, Any], int]:
    """safetensors' header and the position where its data begin."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def _rec_span(raw: bytes) -> tuple[int, int]:
    header, data = _header(raw)
    begin, end = header["rec"]["data_offsets"]
    return data + begin, data + end


def _index_tensors(index: bytes, commit: Commit) -> dict[str, Bytes]:
    """Raw bytes of the small tensors, from the file's bytes with the records cut out."""
    header, data = _header(index)
    cut = commit.rec_end - commit.rec_begin
    tensors: dict[str, Bytes] = {}
    for name in ("off", "rows", "crc32c", "sample_id"):
        begin, end = (data + offset for offset in header[name]["data_offsets"])
        shift = cut if begin >= commit.rec_end else 0
        tensors[name] = np.frombuffer(index[begin - shift : end - shift], np.uint8)
    return tensors


def _read(folder: Folder, name: str, begin: int, end: int) -> bytes:
    try:
        return folder.read(name, begin, end)
    except OSError as error:
        raise DamagedError(f"{folder}/{name}: cannot be read: {error}") from None
